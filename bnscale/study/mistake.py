"""A study file that cannot be read is its author's mistake: one sentence, exit code 2, no traceback.

A study file is a script, so what is wrong in it shows before any of its commands runs. Importing this
module makes Python say it our way. Other errors keep their traceback: they are ours.
"""

import inspect
import sys
from types import TracebackType

from bnscale.trial import Refusal


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a mistake in the study file with its line and exit with 2; hand everything else to Python."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    frames = inspect.getinnerframes(trace) if trace else []
    own = [frame for frame in frames if frame.filename == main]
    if isinstance(error, Refusal) or (isinstance(error, Exception) and own and frames[-1].filename == main):
        place = f"{main}, line {own[-1].lineno}: " if own else ""
        said = str(error) if isinstance(error, Refusal) else f"{kind.__name__}: {error}"
        print(f"{place}{said}", file=sys.stderr)
        raise SystemExit(2)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = tell
