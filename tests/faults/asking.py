"""A user at the terminal: our commands in this process, a study file of two tiny networks, and trials that end."""

import contextlib
import io
import multiprocessing
import sys
from pathlib import Path
from typing import NamedTuple

from bnscale import cli
from bnscale.engine import Gang
from bnscale.probes import END, Cadence, Probe, curve
from bnscale.train import Job, run
from bnscale.trial import Trial

# Processes to kill. What takes seconds to import is imported once, in the process that they are forked from.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["bnscale.train", "torchvision.datasets", "pictures", "asking"])


class Told(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


def bnscale(*words: object) -> Told:
    """`bnscale WORDS`; `bnscale study FILE ...` is a study file's own command line. An error of ours comes through."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, list(sys.path)
    sys.argv = ["bnscale", *map(str, words)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv, sys.path[:] = before
    return Told(code, out.getvalue(), err.getvalue())


STUDY = '''"""Does a tiny network learn?

Question  Whether ten steps on digits are enough.
"""

from examples import FIELDS

from bnscale.probes import END, curve
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import Along, Scale, Series, curves
from bnscale.study import Preset, Study, grid
from bnscale.trial import Trainable

size = Preset(
    fixed={{name: value for name, value in FIELDS.items() if name not in ("pixels", "trainable", "seed")}} | {changes},
    scientific={cells},
    nuisance=[{{}}],
    seeds={seeds},
)
claim = Claim(
    sentence="It learns.", source="Nobody", query="accuracy", paper=None, unit="%", band=(0.0, 1.0), reason="Any.",
    standing=Standing.INFERRED, needs=2,
)
figure = Figure(
    title="Accuracy", query="accuracy", caption="By what trains.", source="Nobody",
    draw=curves(
        x="depth", y="measured", low="low", high="high", series="trainable", styles=[Series("bn", "BN", "#c8452f")],
        xlabel="layers", ylabel="accuracy", unit="", scale=Scale.LINEAR, along=Along.GRID,
    ),
)
study = Study(
    name="tiny", doc=__doc__, paper=size, laptop=size, probes={{curve: END}}, claims=[claim], figures=[figure]
)
if __name__ == "__main__":
    study.main()
'''

SQL = """-- name: accuracy
-- One row per depth and what trains.
select
    depth,
    trainable,
    count(*) as n,
    avg(accuracy) as measured,
    avg(accuracy) - t95 * stddev_samp(accuracy) / sqrt(count(*)) as low,
    avg(accuracy) + t95 * stddev_samp(accuracy) / sqrt(count(*)) as high
from chosen
join trials using (trial)
left join student on student.n = 2
group by depth, trainable, t95
"""


def study_file(
    folder: Path, cells: str = "grid(trainable=[Trainable.BN])", seeds: str = "range(2)", changes: str = "{}"
) -> Path:
    """A study of digits, 8 layers and ten steps, with these cells, seeds and fixed fields written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.py"
    file.write_text(STUDY.format(cells=cells, seeds=seeds, changes=changes))
    file.with_suffix(".sql").write_text(SQL)
    return file


def train(trial: Trial, store: Path, probes: dict[Probe, Cadence] | None = None, save_every: float = 30.0) -> None:
    """Train as a worker does, to the end."""
    job = Job(trial, probes or {curve: END}, str(store), str(store), commit=None, zero=0, save_every=save_every)
    for _ in run([job], Gang(), 1, lambda: False):
        pass
