"""The paper's headline: ResNet-866, BatchNorm alone, CIFAR-10, several learning rates as one cohort.

    python benchmarks/headline.py --data FOLDER --store STORE --device cuda --minutes 20

Trains the cells of `studies/frankle_depth.py` (preset paper: depth 866, trainable bn, one seed, its rates) by
`train.run` itself, in this process and without Ray, for so many minutes, and keeps rows and checkpoints in the store.
Run again it goes on from there, here or on another machine that has the store; `frankle_depth.py report --store STORE`
reads what there is. Frankle, Schwab & Morcos 2021 report 82 % after 160 epochs.

Nothing else may train these trials in the same store meanwhile: there is no lease without a study.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import table
import torch
from cohort import too_large
from step import recipes

from bnscale.data import pixels
from bnscale.engine import Gang
from bnscale.probes import END, EPOCH, Cadence, Probe, clamp, curve, gamma, gamma_histogram, sparsity
from bnscale.store import Store
from bnscale.train import Job, Progress, readings, run
from bnscale.trial import Precision, Trainable, Trial

PAPER = 0.82  # test accuracy, abstract (v3)
RATES = (0.01, 0.03, 0.1, 0.3)
PROBES: dict[Probe, Cadence] = {curve: EPOCH, gamma: END, gamma_histogram: END, clamp: END, sparsity: END}
SAY_EVERY = 20.0  # seconds


def trials(recipe: dict[str, Any], depth: int, rates: Sequence[float], **changes: Any) -> list[Trial]:
    """The study's own, of its first seed."""
    cell = {"depth": depth, "trainable": Trainable.BN, "seed": 0}
    return [Trial(**(recipe | cell | {"lr": lr} | changes)) for lr in rates]


def latest(store: Store, of: Trial) -> tuple[float | None, float | None]:
    """The latest test accuracy that the store has, and the epoch that it was measured after."""
    rows = [
        row
        for path in store.files("curve", {of.id})
        for row in pq.read_table(path, columns=["epoch", "split", "accuracy"]).to_pylist()
        if row["split"] == "test"
    ]
    last = max(rows, key=lambda row: row["epoch"], default=None)
    return (None, None) if last is None else (last["accuracy"], last["epoch"])


def train(
    asked: Sequence[Trial],
    store: Store,
    folder: Path,
    device: torch.device,
    minutes: float,
    save_every: float,
    *,
    recompute: bool,
) -> None:
    """Go on with those that are not done, in one pass where they stand at one step."""
    until = time.monotonic() + 60 * minutes
    wanted = readings(PROBES)
    manifests = {of.id: store.manifest(of.id) for of in asked}
    left = [of for of in asked if (manifest := manifests[of.id]) is None or not manifest.covers(wanted)]
    print(f"ResNet-{asked[0].depth}: {len(left)} of {len(asked)} trials are not done", flush=True)
    if not left:
        return
    recompute = recompute or too_large(left, device)
    jobs = [
        Job(of, PROBES, store.url, str(folder), None, 0, save_every, command="headline.py", recompute=recompute)
        for of in left
    ]
    began = time.monotonic()
    start: tuple[float, int] | None = None
    said = -SAY_EVERY
    at: Sequence[Progress] = []
    for at in run(jobs, Gang(device=device), torch.get_num_threads(), lambda: time.monotonic() > until):
        start = start or (time.monotonic(), _steps(at))
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say(left, at, said - began)
    if start is not None:
        say(left, at, time.monotonic() - began)
        taken = _steps(at) - start[1]
        if taken:
            seconds = time.monotonic() - start[0]
            print(f"{1000 * seconds / taken:.1f} ms a step of a trial, readings and checkpoints included", flush=True)


def _steps(at: Sequence[Progress]) -> int:
    """Of all trials."""
    return sum(each.step for each in at)


def say(trials: Sequence[Trial], at: Sequence[Progress], seconds: float) -> None:
    each = "  ".join(
        f"lr {of.lr:g}: {'-' if p.loss is None else f'{p.loss:.3f}'}"
        f"{'' if p.accuracy is None else f' {100 * p.accuracy:.1f} %'}{f' {p.outcome}' if p.outcome else ''}"
        for of, p in zip(trials, at, strict=True)
    )
    print(f"{seconds:6.0f} s  epoch {max(p.epoch for p in at):7.3f}  {each}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table.asked(parser)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; without it a rehearsal on digits")
    parser.add_argument("--store", required=True, help="folder or address of a bucket: rows and checkpoints")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="then it saves and stops; 0: only says (default: 20)"
    )
    parser.add_argument("--depth", type=int, default=866, help="layers (default: 866)")
    parser.add_argument("--lr", type=float, nargs="+", default=list(RATES), help="the cohort (default: the study's)")
    parser.add_argument("--epochs", type=int, default=160, help="of the whole training (default: 160)")
    parser.add_argument("--precision", type=Precision, default=Precision.FP32, help="(default: fp32, as the study)")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints (default: 60)")
    parser.add_argument("--recompute", action="store_true", help="compute activations again instead of keeping them")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device: torch.device = given.device
    print(table.told(device), flush=True)
    folder = (given.data or Path()).resolve()
    recipe: dict[str, Any] = recipes.FRANKLE_DIGITS if given.data is None else recipes.FRANKLE_CIFAR
    changes = {"epochs": given.epochs, "precision": given.precision, "pixels": pixels(recipe["data"], folder)}
    asked = trials(recipe, given.depth, given.lr, **changes)
    place = given.store if "://" in given.store else str(Path(given.store).resolve())
    store = Store(place)
    began = time.monotonic()
    try:
        if given.minutes > 0:
            train(asked, store, folder, device, given.minutes, given.save_every, recompute=given.recompute)
    except torch.OutOfMemoryError:
        if given.recompute:
            raise
        print("activations do not fit: once more from the start, computing them again", flush=True)
        minutes = max(given.minutes - (time.monotonic() - began) / 60, 0)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--recompute", "--minutes", str(minutes)])
    lines = table.Table(
        "headline",
        [
            table.Column("lr", "6g"),
            table.Column("epoch", "7.2f"),
            table.Column("of", "5d"),
            table.Column("test accuracy", "8.4f"),
            table.Column("paper", "6.2f"),
            table.Column("outcome", "10s"),
        ],
        ("lr",),
        device,
    )
    for of in asked:
        manifest = store.manifest(of.id)
        accuracy, epoch = latest(store, of)
        line = {"trial": of.id, "lr": of.lr, "epoch": epoch, "of": given.epochs, "test accuracy": accuracy}
        lines.line(line | {"paper": PAPER, "outcome": manifest and manifest.outcome})
    lines.save(given.out)


if __name__ == "__main__":
    main()
