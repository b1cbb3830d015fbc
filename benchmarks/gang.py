"""What a gang of two costs against one worker that trains the same batch alone.

    python benchmarks/gang.py                       ResNet-20 and -56, BatchNorm alone and all weights; gloo, two cores
    python benchmarks/gang.py --device cuda         the same over NCCL, on two GPUs of this machine

On a CPU each worker of the gang has one thread, and the gang takes turns with one worker of one thread and one of two:
against the first a gang that costs nothing takes half the time, against the second as long. On GPUs every worker has
one. Random images, not loaded and not augmented, batch 128.

A message is one collective call, its bytes are what this worker hands in. `blocked` is how long a worker stands in
collective calls; of that, `transfer` is the least of the workers at each message: the last one to come waits for
nobody, so what is left is the message itself. Both are of the wall. On GPUs waits are in the stream and the host does
not stand: there `blocked` is the time of NCCL's kernels, which wait for one another, and there is no `transfer`.
`work` is the processor time of the whole gang over that of one worker of one thread: what the gang computes and passes
on beside the training, whoever else is on the machine.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from step import CPU, machine, recipes, spread
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnscale.engine import Engine, Gang
from bnscale.engine.local import LocalEngine
from bnscale.engine.machine import device_name, keep_freed_memory
from bnscale.networks import build
from bnscale.trial import Pixels, Trainable, Trial

BATCH = 128
WARM_UP = 3  # updates; the last one's messages are counted


def trial(depth: int, trainable: Trainable, batch: int) -> Trial:
    size = {"depth": depth, "batch": batch, "norm_batch": batch, "pixels": Pixels.ORIGINAL, "validation": 0}
    return Trial(**(recipes.FRANKLE_CIFAR | size | {"trainable": trainable, "lr": 0.01, "seed": 0}))


class Took(NamedTuple):
    """What one worker says of so many updates."""

    seconds: float
    processor: float  # seconds
    waits: list[float]  # seconds, by message; empty on GPUs
    kernels: float  # seconds of NCCL's kernels, on GPUs


class Messages(TorchDispatchMode):
    """Counts the collective calls inside, and the bytes that this worker hands in."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            given = args[1] if "gather" in str(function) else args[0]
            tensors = [given] if isinstance(given, Tensor) else list(given)
            self.bytes.append(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)))
        return function(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[float]]:
    """Inside, the seconds that this process stands in each wait for a message."""
    seconds: list[float] = []
    kind: Any = dist.Work
    own = kind.wait

    def wait(work: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return own(work, *arguments)
        finally:
            seconds.append(time.perf_counter() - start)

    kind.wait = wait
    try:
        yield seconds
    finally:
        kind.wait = own


class Worker:
    """One process: a member of a gang, or alone."""

    def __init__(self, of: Trial, gang: Gang, zero: int) -> None:
        self.trial = of
        if gang.workers == 1:
            self.engine: Engine = LocalEngine(build(of), of, gang, None)
        else:
            from bnscale.engine.deepspeed import DeepSpeedEngine

            self.engine = DeepSpeedEngine(build(of), of, gang, None, zero)
        draws = torch.Generator().manual_seed(gang.rank)
        share = of.batch // gang.workers
        images_NCHW = torch.randn(share, 3, 32, 32, generator=draws).to(gang.device)
        self.batch = (
            images_NCHW.contiguous(memory_format=torch.channels_last),
            torch.randint(10, (share,), generator=draws).to(gang.device),
        )
        for _ in range(WARM_UP - 1):
            self.update()
        with Messages() as messages:
            self.update()
        self.messages = messages.bytes

    def update(self) -> None:
        loss = self.engine(*self.batch)
        self.engine.backward(loss)
        self.engine.step(self.trial.lr)

    def wait(self) -> None:
        if self.engine.gang.device.type == "cuda":
            torch.cuda.synchronize(self.engine.gang.device)

    def run(self, steps: int) -> Took:
        self.wait()
        with waits() as seconds:
            start, processor = time.perf_counter(), time.process_time()
            for _ in range(steps):
                self.update()
            self.wait()
            took = time.perf_counter() - start
        return Took(took, time.process_time() - processor, seconds, 0.0)

    def kernels(self, steps: int) -> float:
        """Seconds of NCCL's kernels in so many updates."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                self.update()
            self.wait()
        return sum(e.device_time_total for e in profile.key_averages() if "nccl" in e.key.lower()) / 1e6


def serve(end: Connection, of: Trial, rank: int, workers: int, threads: int, kind: str, zero: int) -> None:
    """What a worker's process does: meets the others, and runs what it is told."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    device = torch.device("cuda", rank) if kind == "cuda" else CPU
    gang = Gang(device=device)
    if workers > 1:
        from bnscale.engine import deepspeed

        if rank == 0:
            end.send(deepspeed.host("127.0.0.1", workers))
        address, port = end.recv()
        gang = deepspeed.join(rank, workers, address, port, device)
    worker = Worker(of, gang, zero)
    end.send(worker.messages)
    while (steps := end.recv()) is not None:
        took = worker.run(steps)
        end.send(took._replace(kernels=worker.kernels(steps) if workers > 1 and kind == "cuda" else 0.0))


class Crew:
    """The processes of one side of the comparison."""

    def __init__(self, of: Trial, workers: int, threads: int, kind: str, zero: int) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(workers)]
        self.ends = [here for here, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(there, of, rank, workers, threads, kind, zero))
            for rank, (_, there) in enumerate(pipes)
        ]
        for process, (_, there) in zip(self.processes, pipes, strict=True):
            process.start()
            there.close()  # so that a process that dies is noticed
        if workers > 1:
            self._tell(self.ends[0].recv())
        self.messages: list[int] = self._hear()[0]

    def run(self, steps: int) -> list[Took]:
        self._tell(steps)
        return self._hear()

    def stop(self) -> None:
        self._tell(None)
        for process in self.processes:
            process.join()

    def _tell(self, what: Any) -> None:
        for end in self.ends:
            end.send(what)

    def _hear(self) -> list[Any]:
        return [end.recv() for end in self.ends]


def compared(of: Trial, kind: str, zero: int, turns: int, steps: int) -> dict[str, Any]:
    """A gang of two, and one worker alone with as many threads as one of them and, on a CPU, as both."""
    gang, *alone = crews = [
        Crew(of, 2, 1, kind, zero),
        Crew(of, 1, 1, kind, zero),
        *([Crew(of, 1, 2, kind, zero)] if kind == "cpu" else []),
    ]
    seen = [[crew.run(steps) for crew in crews] for _ in range(turns)]
    for crew in crews:
        crew.stop()
    wall = [[max(took.seconds for took in side) / steps for side in turn] for turn in seen]
    members = [turn[0] for turn in seen]
    return {
        "seconds": median(turn[0] for turn in wall),
        "ratios": [[turn[0] / turn[i] for turn in wall] for i in range(1, len(alone) + 1)],
        "work": [sum(t.processor for t in turn[0]) / turn[1][0].processor for turn in seen],
        "messages": len(gang.messages),
        "bytes": sum(gang.messages),
        "blocked": [
            sum(sum(t.waits) + t.kernels for t in each) / len(each) / steps / turn[0]
            for each, turn in zip(members, wall, strict=True)
        ],
        "transfer": [
            sum(map(min, zip(*(t.waits for t in each), strict=True))) / steps / turn[0]
            for each, turn in zip(members, wall, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56], help="layers (default: 20 56)")
    parser.add_argument(
        "--trainable", type=Trainable, nargs="+", default=[Trainable.BN, Trainable.ALL], help="(default: bn all)"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help=f"of both workers (default: {BATCH})")
    parser.add_argument("--zero", type=int, choices=[0, 1], default=0, help="ZeRO stage (default: 0)")
    parser.add_argument("--turns", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="updates a turn (default: 5)")
    parser.add_argument("--json", action="store_true", help="one line a network, for programs")
    given = parser.parse_args()
    if given.device == "cuda" and torch.cuda.device_count() < 2:
        raise SystemExit(f"--device cuda: {torch.cuda.device_count()} GPUs are here and a gang of two needs 2; use cpu")
    lines: list[Callable[[dict[str, Any]], str]] = [
        lambda found: f"{1000 * found['seconds']:8.1f}",
        lambda found: f"{found['messages']:8d}  {found['bytes'] / 1024:7.1f}",
        lambda found: f"{spread([100 * share for share in found['blocked']]):20}",
        lambda found: f"{spread([100 * share for share in found['transfer']]) if given.device == 'cpu' else '-':20}",
        lambda found: "  ".join(f"{spread(ratio):18}" for ratio in found["ratios"]),
        lambda found: spread(found["work"]),
    ]
    if not given.json:
        print(machine() if given.device == "cpu" else f"machine  2 x {device_name(torch.device('cuda'))}")
        against = "one of 1 thread     one of 2 threads  " if given.device == "cpu" else "one worker        "
        print(
            f"a gang of two over {'gloo' if given.device == 'cpu' else 'NCCL'}, batch {given.batch}, fp32, "
            f"ZeRO {given.zero}; medians of {given.turns} turns of {given.steps} steps (min-max)\n"
            f"depth  trains  ms a step  messages  KiB sent  {'% blocked':20}  {'% transfer':20}  {against}  work"
        )
    for depth in given.depth:
        for trainable in given.trainable:
            found = compared(trial(depth, trainable, given.batch), given.device, given.zero, given.turns, given.steps)
            if given.json:
                print(json.dumps({"depth": depth, "trainable": trainable, **found}), flush=True)
            else:
                print(f"{depth:5}  {trainable:6}  " + "  ".join(line(found) for line in lines), flush=True)


if __name__ == "__main__":
    main()
