"""bnscale: why does batch normalization work? Experiments at scale, answered in SQL.

bnscale.open("results").sql("select depth, max(accuracy) from curve join trials using (trial) group by depth")
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnscale.query import Session

__version__ = "0.1.0"
__all__ = ["open"]


def open(store: str | Path) -> "Session":
    """The results in a store, for SQL in a notebook. Raises `Refusal` where there is no store."""
    from bnscale import query  # so that `import bnscale` costs nothing
    from bnscale.probes import TABLES

    return query.open(store, TABLES)
