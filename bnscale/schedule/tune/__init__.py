"""Trials -> Ray Tune -> gangs of workers, warm from trial to trial. The only package that imports ray.

Tune is a queue and a scheduler here, not a store: what a trial reached is in the store's manifests and checkpoints,
Tune's own files live in a temporary folder and are thrown away.

    driver   run()    a queue of trials, longest first; Ctrl-C; the progress view
    actor    Lead     one per running trial: the leading worker; it advances the training loop in slices
    actor    Member   the other workers of a gang, raised by the Lead and owned by it: they die with it
"""

import os

# Read by ray when it is imported. Tune's loggers, its state file, its own Ctrl-C and its advice have no use here.
os.environ.update(
    RAY_AIR_NEW_OUTPUT="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
    TUNE_GLOBAL_CHECKPOINT_S="1000000000",
    TUNE_PRINT_ALL_TRIAL_ERRORS="0",
)

from bnscale.schedule.needs import Cluster
from bnscale.schedule.tune.cluster import connect, running
from bnscale.schedule.tune.driver import run
from bnscale.schedule.tune.nodes import Reply, on_every_node, rehearse
from bnscale.schedule.tune.sight import check_sight, sight

__all__ = [
    "Cluster",
    "Reply",
    "check_sight",
    "connect",
    "on_every_node",
    "rehearse",
    "run",
    "running",
    "sight",
]
