"""The engine of a gang: DeepSpeed, ZeRO 0 or 1, over gloo (CPU) or NCCL (GPU).

The only `import deepspeed`, and that inside functions: it takes seconds, and one worker never pays them.
DeepSpeed averages gradients, shards the momentum (ZeRO 1) and steps torch's own SGD. Its own mixed precision, its
checkpoints and its launcher stay unused: see `objective`, `checkpoint` and `join`.
"""

import logging
import os
import socket
import time
from datetime import timedelta
from itertools import groupby
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.checkpoint import newest, write
from bnscale.engine.evaluation import Evaluation
from bnscale.engine.objective import Objective, decays
from bnscale.engine.state import frozen_sum, load_state, state
from bnscale.engine.way import Way
from bnscale.networks import trained, workers
from bnscale.networks.norm import fuse
from bnscale.networks.recompute import Activations, recomputing
from bnscale.score import Score
from bnscale.storage import Storage
from bnscale.trial import Refusal, Trial

# A worker may wait this long for the leading one, which measures alone.
PATIENCE = timedelta(hours=1)

# Without the norm of the gradient, ZeRO also takes no step less for a non-finite one. Gradients travel while the layers
# below compute theirs, 8 MiB at a time: a ResNet-110's are one message. ZeRO 0 sends all after the last.
ZERO_1 = {"stage": 1, "compute_grad_norm": False, "overlap_comm": True, "reduce_bucket_size": 2**21}

_hosted: dict[int, dist.TCPStore] = {}  # by port, until the leading worker joins; then its process group holds it


def host(address: str, workers: int) -> tuple[str, int]:
    """Open the meeting place of a gang on the leading worker: its address and a free port, for everybody's `join`.

    `address` is this machine's, as the other workers reach it. The store listens there and nowhere else,
    on a port that the system chose: two gangs on one machine never collide.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        port = server.getsockname()[1]
        _hosted[port] = dist.TCPStore(
            address,
            port,
            workers,
            is_master=True,
            timeout=PATIENCE,
            wait_for_workers=False,
            master_listen_fd=server.detach(),
        )
    return address, port


def join(rank: int, workers: int, address: str, port: int, device: torch.device) -> Gang:
    """Meet the other workers where the leading one is host. The process group is kept for all later trials.

    Collective: returns when all have come.
    """
    assert not dist.is_initialized(), "this process already belongs to a gang"
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed picks its GPU by it
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(address, port))

    store = _hosted.pop(port) if rank == 0 else dist.TCPStore(address, port, workers, is_master=False, timeout=PATIENCE)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=workers,
        timeout=PATIENCE,
        device_id=device if on_gpu else None,
    )

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU DeepSpeed would now compile a shared-memory all-reduce: 38 s and a compiler, for inference only. Before
    # that it looks into this table of what the machine can build, whose filling in itself runs compilers.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return Gang(rank, workers, device)


def rehearse(gang: Gang) -> float:
    """Seconds of one sum over the gang, after a first one. Collective. Raises RuntimeError for a wrong sum."""
    for _ in range(2):
        mine = torch.full((1 << 16,), float(gang.rank + 1), device=gang.device)
        began = time.perf_counter()
        dist.all_reduce(mine)
        found = mine.unique().tolist()  # waits for a GPU
        seconds = time.perf_counter() - began
        if found != [gang.workers * (gang.workers + 1) / 2]:
            raise RuntimeError(f"a sum over {gang.workers} workers gave {found}")
    return seconds


def leave() -> None:
    """End the process group that `join` began. DeepSpeed's own call: torch's would break its next gang."""
    import deepspeed

    deepspeed.comm.destroy_process_group()


def _interface(address: str, port: int) -> str:
    """The network interface on the way to `address`. Left alone, gloo takes the one of the host's name,
    which on many machines is a loopback that no other machine reaches."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing
        own = probe.getsockname()[0]
    if own.startswith("127."):  # all of it is the loopback, which lists this one alone
        own = "127.0.0.1"
    return next(name for name, held in psutil.net_if_addrs().items() if own in {each.address for each in held})


class DeepSpeedEngine:
    """An `Engine` for several workers: each computes its share of the batch, all hold the same network.

    `checkpoints` is where the leading worker keeps them, or None for runs that keep nothing.
    Raises Refusal for a trial that several workers cannot share: nothing to train, or batch statistics
    that `norm_batch` and equal shares do not allow.
    """

    def __init__(
        self,
        module: nn.Module,
        trial: Trial,
        gang: Gang,
        checkpoints: Storage | None,
        zero: int,
        activations: Activations = Activations.KEPT,
    ) -> None:
        import deepspeed

        self._trained = trained(module)
        if not self._trained:
            raise Refusal(
                f"trainable {trial.trainable}: trains nothing for {gang.workers} workers to share; use 1 worker"
            )
        if zero not in (0, 1):
            raise Refusal(f"zero {zero}: gangs shard nothing (0) or the momentum (1); try 1")
        workers.check(trial, gang.workers)
        self.gang = gang
        self.backend = f"deepspeed zero {zero}"
        self._frozen = frozen_sum(module, trial) if gang.leads and checkpoints else None
        self.module = module.to(gang.device)
        self.module.train()
        workers.spread(module, trial.batch)
        fuse(module)  # where a worker has whole statistics: always when it reads, as one worker would
        self._checkpoints = checkpoints
        self._total_steps = trial.total_steps
        self._trial = trial
        self._sgd = torch.optim.SGD(decays(module, trial), trial.lr, momentum=trial.momentum)
        self._zero = zero
        self._activations = activations
        objective = Objective(module, trial)
        self._evaluation = Evaluation(objective, Way.PLAIN)
        share = trial.batch // gang.workers
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=self._sgd,
            config={
                "train_batch_size": trial.batch,
                "train_micro_batch_size_per_gpu": share,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0,  # its default clips the norm at 1
                "zero_optimization": dict(ZERO_1) if zero else {"stage": 0},
                "zero_allow_untested_optimizer": True,
            },
        )
        if gang.device.type == "cuda":  # same trial, same machines: same bits
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """Mean loss of this worker's share of the batch: a float32 scalar on the device."""
        with recomputing(self.module, self._activations):
            return self._engine(images_NCHW.contiguous(memory_format=torch.channels_last), labels_N)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean loss over the workers."""
        self._engine.backward(loss)

    def step(self, lr: float) -> None:
        """One update with this learning rate; gradients are gone afterwards.

        Running statistics are the same on every worker afterwards, at every step: averaging them
        only where someone looks would let the looking round them.
        """
        for group in self._sgd.param_groups:
            group["lr"] = lr
        self._engine.step()
        workers.settle(self.module)

    def total(self, value: Tensor) -> Tensor:
        """Sum of `value` over the workers, the same on each."""
        value = value.clone()
        dist.all_reduce(value)
        return value

    def agree(self, flag: bool) -> bool:
        """Whether any worker says so, on every worker."""
        said = torch.tensor(int(flag), device=self.gang.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def statistics(self) -> dict[str, Tensor]:
        """Copies of the network's buffers, which `step` has made the same on every worker."""
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def score(self, part: str, data: Resident) -> Score:
        """How the network as it stands does on a part of the data, in evaluation mode: each worker evaluates some."""
        mine_14 = self._evaluation(part, data, slice(self.gang.rank, None, self.gang.workers))
        return Score.of(self._trial, self.total(mine_14)[0].tolist())

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """A checkpoint after `step` updates, whole or absent; the last two are kept.

        Returns on every worker when the leading one has written it. Raises OSError on the leading worker and
        RuntimeError on the others where it could not.
        """
        if self._checkpoints is None:
            raise Refusal("checkpoints None: this engine was opened to keep nothing")
        # Nothing follows the last step: its checkpoint is the trained network, without momentum.
        last = step == self._total_steps
        momentum = {} if last else self.momentum()
        failure = None
        if self.gang.leads:
            facts = facts | {"frozen": self._frozen}
            try:
                write(self._checkpoints, step, state(self.module, self._trial, momentum), facts, 1 if last else 2)
            except OSError as error:
                failure = error
        told = _tell(str(failure) if failure else None)
        if failure:
            raise failure
        if told:
            raise RuntimeError(f"the leading worker could not write the checkpoint of step {step}: {told}")

    @torch.no_grad()
    def restore(self, most: int | None = None) -> tuple[int, dict[str, Any]]:
        """Load the newest whole checkpoint: its step and facts, or (0, {}) where there is none.

        Any number of workers may have written it. Only the leading worker reads; the others need not see its disk.
        """
        found = newest(self._checkpoints, most) if self.gang.leads and self._checkpoints else None
        if found is not None and found.facts.pop("frozen") != self._frozen:
            found = None
        momentum = {} if found is None else load_state(self.module, found.tensors)
        told = _tell(None if found is None else (found.step, found.facts, list(momentum)))
        if told is None:
            return 0, {}
        step, facts, names = told
        if found is None:
            momentum = {name: torch.zeros_like(self._trained[name]) for name in names}
        _broadcast(list(state(self.module, self._trial, momentum).values()))
        if self._zero:
            self._optimizer.refresh_fp32_params()
        self._set_momentum(momentum)
        return step, facts

    def close(self) -> None:
        """Release what this trial held. The process group stays for the next one."""
        self._engine.destroy()

    def momentum(self) -> dict[str, Tensor]:
        """Whole momentum buffers by parameter; none before the first update, or where momentum is 0. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not any(kept.get("momentum_buffer") is not None for kept in self._sgd.state.values()):
            return {}
        if self._zero:
            self._link()
            return {name: safe_get_full_optimizer_state(p, "momentum_buffer") for name, p in self._trained.items()}
        return {name: self._sgd.state[p]["momentum_buffer"] for name, p in self._trained.items()}

    def _set_momentum(self, momentum: dict[str, Tensor]) -> None:
        """Put whole momentum buffers where SGD looks for them: per parameter, or in this worker's partition."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if not self._zero:
            for name, buffer in momentum.items():
                self._sgd.state[self._trained[name]]["momentum_buffer"] = buffer
        elif momentum:
            for group in self._sgd.param_groups:
                for partition in group["params"]:
                    self._sgd.state[partition]["momentum_buffer"] = torch.zeros_like(partition)
            self._link()
            for name, buffer in momentum.items():
                safe_set_full_optimizer_state(self._trained[name], buffer, "momentum_buffer")

    def _link(self) -> None:
        """Link every parameter to its part of the partitioned momentum.

        DeepSpeed does so once, when it has updated the first group of parameters: the others have no momentum yet. And
        after a restore its first update lies behind us.
        """
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()


def _tell(what: Any) -> Any:
    """What the leading worker holds, on every worker."""
    said = [what]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _broadcast(tensors: list[Tensor]) -> None:
    """Overwrite `tensors` with those of the leading worker: one message for each type of number."""
    for _, same in groupby(sorted(tensors, key=lambda t: str(t.dtype)), key=lambda t: t.dtype):
        group = list(same)
        flat = torch.cat([t.flatten() for t in group])
        dist.broadcast(flat, src=0)
        for tensor, whole in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(whole.view_as(tensor))
