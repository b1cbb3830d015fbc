"""bnscale: why does batch normalization work? Experiments at scale, answered in SQL.

bnscale.open("results").sql("select depth, max(accuracy) from curve join trials using (trial) group by depth")
bnscale.load_network("net.safetensors")(images_NCHW)
"""

from pathlib import Path
from typing import TYPE_CHECKING

from bnscale import start

if TYPE_CHECKING:
    from torch import nn

    from bnscale.query import Session

__version__ = "0.1.0"
__all__ = ["load_network", "open"]

start.check()


def open(store: str | Path) -> "Session":
    """The results in a store, for SQL in a notebook. Raises `Refusal` where there is no store."""
    from bnscale import query  # so that `import bnscale` costs nothing
    from bnscale.probes import TABLES

    return query.open(store, TABLES)


def load_network(path: str | Path) -> "nn.Module":
    """The trained network in a file of `bnscale export-network`, rebuilt from its seed: the same to the last bit.

    On the CPU, in evaluation mode, with its trial as `network.trial`. It takes images as the trial's data gives them,
    normalised, and in float32: a trial with precision bf16 was measured within torch's bfloat16 autocast.

    Raises `Refusal` for a file that cannot be read, and where this torch draws other weights from the seed.
    """
    from bnscale import network_file

    return network_file.load(Path(path))
