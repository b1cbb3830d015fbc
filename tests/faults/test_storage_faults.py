"""A full disk, a flipped bit, half a file, a damaged manifest, a newer format, half a compaction."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import bnscale, train
from examples import digits
from operations import watched

from bnscale import query
from bnscale.engine import checkpoint
from bnscale.probes import STEP, Curve, curve
from bnscale.storage import StoreFailure, storage
from bnscale.store import Store, Writer
from bnscale.trial import Outcome, Refusal

TRIAL = digits(steps=6)
READINGS = {curve: 2 * STEP}
EVERY = "select step, count(*), count(distinct split) from curve group by all order by all"
WHOLE = [(step, 3, 3) for step in (0, 2, 4, 6)]
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: forcing each file to the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def reading(step: int) -> Curve:
    return Curve(step, step / 10, "test", 360, 2.5 - step / 10, 0.5, 0.9)


def flushed(store: Store, steps: int = 3, seed: int = 0) -> Writer:
    """A writer with a part for each step."""
    writer = store.writer(digits(seed=seed), {}, {})
    for step in range(steps):
        writer.write("curve", [reading(step)])
        writer.flush(step + 1)
    return writer


def steps(root: Path) -> list[int]:
    return [row[0] for row in query.open(root).sql("select step from curve order by all").rows]


# --- 16, 17: a full disk -----------------------------------------------------------------------------

SMALL = f"""
import json, os, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import random
from test_storage_faults import reading
from bnscale.store import Store, StoreFailure
from bnscale.trial import Outcome
from examples import digits

disk = sys.argv[1]
store = Store(disk + "/store")
writer = store.writer(digits(), {{}}, {{}})
said = None
step = 0
draws = random.Random(0)
while said is None and step < 10_000:
    splits = [str(draws.random()) for _ in range(1000)]  # so that nothing can be compressed
    writer.write("noise", [__import__("dataclasses").replace(reading(step), split=each) for each in splits])
    try:
        writer.flush(step + 1)
    except StoreFailure as failure:
        said = str(failure), failure.errno
    step += 1
there = Store.existing(disk + "/store").manifest(digits().id)
half = [str(path) for path in __import__("pathlib").Path(disk).rglob(".*.tmp")]
ballast = disk + "/ballast"
os.unlink(ballast)  # space is freed
writer.finish(Outcome.FINISHED, step, {{}})
after = Store.existing(disk + "/store").manifest(digits().id)
print(json.dumps({{
    "said": said, "failed_at": step, "committed": there.step, "half": half,
    "rows": sum(part.rows for part in after.parts["noise"]), "damaged": [
        store.damage(key, part) for _, key, part in store.named(after) if store.damage(key, part)
    ],
}}))
"""


def mountable() -> bool:
    words = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
