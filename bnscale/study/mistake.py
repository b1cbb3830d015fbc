"""A study file that cannot be read is its author's mistake: one sentence, exit code 2, no traceback.

A study file is a script, so what is wrong in it shows before any of its commands runs. Importing this
module makes Python say it our way. Other errors keep their traceback: they are ours.
"""

import sys
import traceback
import warnings
from pathlib import Path
from types import TracebackType

from bnscale.trial import Refusal


class Twice(UserWarning):
    """What was said twice and counts once: no mistake, but worth a word."""


def sentence(error: BaseException, file: str | Path) -> str | None:
    """`file, line 12: what is wrong`, where it was made in that file; None for an error that is not its author's."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}, line {error.lineno}: SyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(file)]
    if isinstance(error, Refusal):
        return f"{file}, line {own[-1].lineno}: {error}" if own else str(error)
    if isinstance(error, Exception) and own and own[-1] is frames[-1]:
        return f"{file}, line {own[-1].lineno}: {type(error).__name__}: {error}"
    return None


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a mistake in the study file with its line and exit with 2; hand everything else to Python."""
    said = sentence(error, getattr(sys.modules.get("__main__"), "__file__", None) or "")
    if said is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(said, file=sys.stderr)
        raise SystemExit(2)


def word(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """How a warning is printed: of ours only what it says, with the line where a study file is its cause."""
    if not issubclass(category, Twice):
        return _PLAIN(message, category, filename, lineno, line)
    own = filename == getattr(sys.modules.get("__main__"), "__file__", None)
    return f"{filename}, line {lineno}: {message}\n" if own else f"{message}\n"


_PLAIN = warnings.formatwarning
warnings.formatwarning = word
sys.excepthook = tell
