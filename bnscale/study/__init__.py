"""A study: one question about normalization, and everything that follows from asking it.

A study file declares a `Study` and calls its `main()`, which gives the file its command line: `plan`, `run`
(what it does when nothing is said), `status`, `report`, `sql`.
"""

from bnscale.study import mistake  # first: what follows may already be wrong
from bnscale.study.declare import Preset, Same, Study, grid
from bnscale.study.search import Bisection

__all__ = ["Bisection", "Preset", "Same", "Study", "grid", "mistake"]
