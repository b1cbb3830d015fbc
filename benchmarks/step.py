"""Images a second: bnscale against a plain PyTorch loop and against the limit of the machine; and first steps.

    python benchmarks/step.py                             tables and first steps; some ten minutes on 2 cores
    python benchmarks/step.py --deep --data FOLDER        a few steps of 866 layers on CIFAR-10 at batch 32 and 128

Both loops train gamma and beta alone at batch 128, each with its own data and augmentation and in a process of its
own. They take turns, so that whatever else the machine does falls on both, and only ratios of neighbours are compared.
`of limit` is the time that limit.py counts and measures over the time that a step of ours takes.

The first step of a new shape also compiles. Ours of 866 layers, with nothing compiled beforehand, is held against the
first step of the plain network of 110 layers under torch.compile as a whole.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import plain
import pyarrow as pa
import pyarrow.parquet as pq
import table
import torch
from PIL import Image

from bnscale.data import Resident, blank, pixels
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.engine.machine import device_name, forget_peak, keep_freed_memory, peak_memory
from bnscale.networks import build, trained
from bnscale.trial import Data, Pixels, Precision, Trainable, Trial

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))
import recipes as recipes  # what is timed is a paper's protocol

BATCH = 128
DEPTHS = (20, 110)
SECONDS = 3.0  # of the plain loop in each turn
CPU = torch.device("cpu")


def trial(depth: int, batch: int, precision: Precision, images: Pixels) -> Trial:
    """BatchNorm alone on CIFAR-10, as Frankle et al. train it."""
    changes = {"pixels": images, "depth": depth, "batch": batch, "norm_batch": batch, "precision": precision}
    return Trial(
        **(recipes.FRANKLE_CIFAR | {"validation": 0, "trainable": Trainable.BN, "lr": 0.1, "seed": 0} | changes)
    )


class Ours:
    """bnscale's own training step, as train.py takes it: a batch from the resident data, the engine, the update."""

    def __init__(self, of: Trial, folder: Path) -> None:
        keep_freed_memory()
        self.trial = of
        self.data = Resident(of, folder, CPU)
        self.engine = LocalEngine(build(of), of, Gang(device=CPU), None)
        self.at = 0
        self.run(plain.WARM_UP)

    def run(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of so many updates, data and augmentation included."""
        start = clock()
        for _ in range(steps):
            loss = self.engine(*self.data.batch(self.at))
            self.engine.backward(loss)
            self.engine.step(self.trial.rate(self.at))
            assert torch.isfinite(loss)  # train.py looks at every loss, too
            self.at += 1
        return clock() - start


class Apart:
    """A loop in a process of its own, as `run` of it here."""

    def __init__(self, make: Callable[..., Ours | plain.Loop], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.end, there = context.Pipe()
        given = (there, torch.get_num_threads(), make, arguments)
        # Not a daemon: the plain loop may have DataLoader processes.
        self.process = context.Process(target=_serve, args=given)
        self.process.start()
        there.close()  # so that a process that dies is noticed

    def run(self, steps: int, clock: Callable[[], float]) -> float:
        self.end.send((steps, clock))
        return self.end.recv()

    def stop(self) -> None:
        self.end.send(None)
        self.process.join()


def _serve(end: Connection, threads: int, make: Callable[..., Ours | plain.Loop], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    loop = make(*arguments)
    while (asked := end.recv()) is not None:
        end.send(loop.run(*asked))


@contextmanager
def images(given: Path | None) -> Iterator[Path]:
    """The folder with CIFAR-10, or one with as many random images in its place."""
    if given is not None:
        yield given
        return
    draw = np.random.default_rng(0)
    pngs = []
    for _ in range(500):
        file = BytesIO()
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "PNG")
        pngs.append({"bytes": file.getvalue()})
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / Data.CIFAR10
        home.mkdir()
        for part, count in (("train", Data.CIFAR10.facts.train), ("test", Data.CIFAR10.facts.test)):
            table = pa.table({"img": [pngs[i % 500] for i in range(count)], "label": [i % 10 for i in range(count)]})
            pq.write_table(table, home / f"{part}-0.parquet")
        yield Path(folder)


def bf16_units() -> list[str]:
    """What this CPU computes bfloat16 with, as Linux names it."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return [unit for unit in ("amx_bf16", "avx512_bf16", "bf16") if unit in words]


def machine() -> str:
    return (
        f"machine  {device_name(CPU)}, {os.cpu_count()} cores, bf16 units: {', '.join(bf16_units()) or 'none'}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    )


def spread(ratios: list[float]) -> str:
    return f"{median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def compare(folder: Path, depths: list[int], turns: int, clock: Callable[[], float], out: Path | None) -> None:
    """One line a depth: medians of the images a second, and of the ratio of each turn to the plain loop beside it.

    Processor time is of one process, so under that clock the plain loop loads its data in its own.
    """
    found = pixels(Data.CIFAR10, folder)
    import limit  # which has its trials from here

    most = limit.measured(CPU, torch.get_num_threads(), limit.effort(CPU, quick=False))
    print(f"images a second, batch {BATCH}, gamma and beta train; medians of {turns} turns, ratios to plain (min-max)")
    columns = [table.Column("depth", "5d"), table.Column("plain", "7.0f", compared=True)]
    for name in Precision:
        for what, how in (("", "7.0f"), (" ratio", "18s"), (" of limit", "8.0%")):
            columns.append(table.Column(f"{name}{what}", how, compared=not what))
    lines = table.Table("step", [*columns, table.Column("loaders", "7d")], ("depth",), CPU)
    for depth in depths:
        workers = 0 if clock is time.process_time else plain.best_workers(depth, BATCH, most=2)
        loops = [Apart(plain.Loop, depth, BATCH, workers)]
        trials = [trial(depth, BATCH, precision, found) for precision in Precision]
        loops += [Apart(Ours, of, folder) for of in trials]
        for loop in loops:
            loop.run(1, clock)  # until all have started
        steps = max(4, round(SECONDS / (loops[0].run(2, clock) / 2)))
        seconds = [[loop.run(steps, clock) for loop in loops] for _ in range(turns)]
        for loop in loops:
            loop.stop()
        took = [median(each) for each in zip(*seconds, strict=True)]
        line: dict[str, Any] = {"depth": depth, "loaders": workers, "plain": BATCH * steps / took[0], "steps": steps}
        for place, of in enumerate(trials, start=1):
            least = limit.limit(of, 1, most).seconds
            line |= {
                f"{of.precision}": BATCH * steps / took[place],
                f"{of.precision} ratio": spread([turn[0] / turn[place] for turn in seconds]),
                f"{of.precision} of limit": steps * least / took[place],
            }
        lines.line(line)
    lines.save(out)


def first(command: list[str], **nowhere: str) -> tuple[float, float]:
    """Seconds until the first step is done, imports and data left out, and seconds of one more; in a process that finds
    nothing compiled."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        run = subprocess.run(
            [sys.executable, __file__, *command], check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
    return tuple(json.loads(run.stdout.splitlines()[-1]))


def firsts() -> None:
    """Ours of 866 layers, and the plain network of 110 compiled as a whole."""
    ours, again = first(["--first", "ours", "--depth", "866"])
    print(f"first step, nothing compiled before: ours, 866 layers  {ours:.1f} s (the next {again:.1f} s)", flush=True)
    whole, again = first(["--first", "whole", "--depth", "110"])
    print(
        f"    torch.compile of the plain network as a whole, 110 layers  {whole:.1f} s (the next {again:.1f} s): "
        f"{whole / ours:.1f} times as long for an eighth of the depth",
        flush=True,
    )


def begin(kind: str, depth: int) -> tuple[float, float]:
    """The first step and one more, of images without meaning."""
    of = trial(depth, BATCH, Precision.FP32, Pixels.ORIGINAL)
    images_NCHW, labels_N = blank(of, CPU)
    images_NCHW.normal_()
    keep_freed_memory()
    if kind == "ours":
        network = build(of)
        start = time.perf_counter()
        engine = LocalEngine(network, of, Gang(device=CPU), None)

        def step() -> None:
            loss = engine(images_NCHW, labels_N)
            engine.backward(loss)
            engine.step(of.lr)
    else:
        net = plain.resnet(depth).train()
        start = time.perf_counter()
        compiled = torch.compile(net)
        sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

        def step() -> None:
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(compiled(images_NCHW), labels_N).backward()
            sgd.step()

    step()
    between = time.perf_counter()
    step()
    return between - start, time.perf_counter() - between


def deep(folder: Path, batch: int, steps: int) -> dict[str, float]:
    """Peak memory and seconds a step of 866 layers; the first step, which chooses kernels, is not timed."""
    of = trial(866, batch, Precision.FP32, pixels(Data.CIFAR10, folder))
    loop = Ours(of, folder)
    forget_peak(CPU)
    seconds = [loop.run(1) for _ in range(steps)]
    return {
        "parameters": sum(p.numel() for p in loop.engine.module.parameters()),
        "trained": sum(p.numel() for p in trained(loop.engine.module).values()),
        "seconds": median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "memory": peak_memory(CPU) or 0,
    }


def alone(folder: Path, batch: int, steps: int) -> dict[str, float]:
    """`deep` in a process of its own, so that its peak is its own."""
    command = [sys.executable, __file__, "--data", str(folder), "--steps", str(steps), "--one", str(batch)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; random images where it is not given")
    parser.add_argument("--depth", type=int, nargs="+", default=list(DEPTHS), help="layers (default: 20 110)")
    parser.add_argument("--turns", type=int, default=7, help="repetitions of each loop (default: 7)")
    parser.add_argument("--threads", type=int, help="cores that torch uses (default: all)")
    parser.add_argument(
        "--shared", action="store_true", help="on a shared machine: processor time of one thread, not time on the wall"
    )
    parser.add_argument("--deep", action="store_true", help="866 layers instead: seconds a step and peak memory")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of --deep (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the figures also go as JSON")
    parser.add_argument("--no-first", action="store_true", help="leave the first steps out, which take minutes")
    parser.add_argument("--one", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    parser.add_argument("--first", choices=["ours", "whole"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    threads, clock = (1, time.process_time) if given.shared else (given.threads, time.perf_counter)
    if threads:
        torch.set_num_threads(threads)
    if given.first:
        print(json.dumps(begin(given.first, given.depth[0])))
        return
    if given.one:
        print(json.dumps(deep(given.data, given.one, given.steps)))
        return
    print(machine())
    print(f"data     {given.data or 'random images, for want of --data'}")
    if given.shared:
        print("clock    processor time of one thread")
    if not bf16_units():
        print("note     this CPU has no bf16 units: bfloat16 is emulated here, and its ratios speak of this CPU only")
    with images(given.data) as folder:
        if not given.deep:
            compare(folder, given.depth, given.turns, clock, given.out)
            if not given.no_first:
                firsts()
            return
        for batch in (32, 128):
            found = alone(folder, batch, given.steps)
            print(
                f"866 layers, {found['parameters']:,} parameters, {found['trained']:,} trained, fp32, batch {batch}: "
                f"{found['seconds']:.1f} s a step ({found['fastest']:.1f}-{found['slowest']:.1f}), "
                f"peak memory {found['memory'] / 2**30:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
