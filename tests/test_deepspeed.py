"""A gang on DeepSpeed trains the network that one worker trains, and holds nothing after a trial."""

import copy
import gc
import os
import socket
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from crew import Crew
from examples import FIELDS
from torch import Tensor, nn

from bnscale import networks
from bnscale.data import Resident
from bnscale.engine import Gang, checkpoint
from bnscale.engine.local import LocalEngine
from bnscale.engine.objective import Objective, decays
from bnscale.engine.way import Way
from bnscale.networks.norm import BatchNorm
from bnscale.probes import (
    Snapshot,
    activations,
    at_layers,
    at_multiples,
    batch_curve,
    channel_moments,
    class_bias,
    covariate_shift,
    descent,
    gamma_scaling,
    gradient,
    gradient_bound,
    gradient_noise,
    landscape,
    loss_along_gradient,
    mean_gradient,
    moment_change,
    norm_gradient,
    parameter_gradient,
    timing,
    weight_scaling,
)
from bnscale.storage import storage
from bnscale.trial import (
    Affine,
    Augmentation,
    DecayOn,
    Network,
    Norm,
    Placement,
    Precision,
    Refusal,
    Trainable,
    Trial,
)

BATCH = 16
STEPS = 6


def trial(**fields: Any) -> Trial:
    usual: dict[str, Any] = FIELDS | {
        "validation": 0,
        "augmentation": Augmentation.NONE,
        "trainable": Trainable.ALL,
        "batch": BATCH,
        "norm_batch": BATCH,
        "steps": STEPS,
        "warmup": 0.4,
        "weight_decay": 5e-4,
    }
    return Trial(**usual | fields)


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """A batch of numbers that are no digits, but can be learnt."""
    generator = torch.Generator().manual_seed(step)
    labels_N = torch.randint(10, (size,), generator=generator)
    images_NCHW = torch.randn(size, 1, 8, 8, generator=generator) + labels_N.view(-1, 1, 1, 1) / 4
    return images_NCHW, labels_N


def by_one(of: Trial, steps: int = STEPS) -> dict[str, Any]:
    """The same training by nothing but torch: one worker, the whole batch."""
    network = networks.build(of)
    objective = Objective(network, of)
    trained = networks.trained(network)
    sgd = torch.optim.SGD(decays(network, of), of.lr, momentum=of.momentum)
    losses = []
    for step in range(steps):
        for group in sgd.param_groups:
            group["lr"] = of.rate(step)
        loss = objective(*batch(step, of.batch))
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        losses.append(loss.item())
    momentum = {n: sgd.state[p]["momentum_buffer"] for n, p in trained.items() if of.momentum}
    return {"losses": losses, "state": copy.deepcopy(network.state_dict()), "momentum": momentum}


# --- what the workers do ------------------------------------------------------------------------

gang: Gang
folder: Path  # each worker has its own disk


def prepare(rank: int, root: str, workers: int) -> int | None:
    """As on a laptop without a compiler, with every warning an error and all output kept."""
    global folder
    folder = Path(root) / f"disk-{rank}"
    folder.mkdir()
    for stream in (1, 2):
        os.dup2(os.open(folder / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ["PATH"] = str(folder)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "compiled")
    torch.set_num_threads(1)
    from bnscale.engine import deepspeed as engine

    assert "deepspeed" not in sys.modules, "one worker alone would pay for an engine it never uses"
    return engine.host("127.0.0.1", workers)[1] if rank == 0 else None


def meet(rank: int, workers: int, port: int) -> None:
    global gang
    from bnscale.engine import deepspeed as engine

    gang = engine.join(rank, workers, "127.0.0.1", port, torch.device("cpu"))
    warnings.simplefilter("error")


def engine_for(of: Trial, zero: int, checkpoints: str = "none") -> Any:
    from bnscale.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(networks.build(of), of, gang, storage(folder / checkpoints), zero)


def updates(engine: Any, of: Trial, steps: range) -> list[float]:
    """Mean losses over the gang."""
    losses = []
    for step in steps:
        mine = [whole.chunk(gang.workers)[gang.rank] for whole in batch(step, of.batch)]
        loss = engine(*mine)
        assert loss.dtype is torch.float32
        engine.backward(loss)
        engine.step(of.rate(step))
        losses.append(engine.total(loss.detach()).item() / gang.workers)
    return losses


def everything(engine: Any) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in engine.module.state_dict().items()},
        "momentum": engine.momentum(),
        "statistics": {n: value for n, value in engine.statistics().items() if "running" in n},
    }


def by_gang(rank: int, of: Trial, zero: int) -> dict[str, Any]:
    engine = engine_for(of, zero)
    got = {"losses": updates(engine, of, range(STEPS)), **everything(engine)}
    assert all(p.grad is None for p in engine.module.parameters())
    engine.close()
    return got


# --- the theorems -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gather(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Crew]]:
    """Gangs by number of workers, raised once."""
    crews: dict[int, Crew] = {}

    def gather(workers: int) -> Crew:
        if workers not in crews:
            crews[workers] = Crew(workers)
            root = tmp_path_factory.mktemp("gang")
            port = crews[workers](prepare, str(root), workers)[0]
            crews[workers](meet, workers, port)
        return crews[workers]

    yield gather
    for crew in crews.values():
        crew.dismiss()


@pytest.fixture(scope="module")
def two(gather: Callable[[int], Crew]) -> Crew:
    return gather(2)


def assert_same_training(got: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for each in got:
        torch.testing.assert_close(each["losses"], expected["losses"], rtol=1e-5, atol=0)
        assert all(torch.equal(value, each["state"][name]) for name, value in each["statistics"].items())
        for kind in ("state", "momentum"):
            assert each[kind].keys() == expected[kind].keys()
            for name, value in expected[kind].items():
                torch.testing.assert_close(
                    each[kind][name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
                assert torch.equal(each[kind][name], got[0][kind][name]), f"{name} differs between workers"


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("trainable", [Trainable.ALL, Trainable.BN])
@pytest.mark.parametrize("norm_batch", [BATCH, BATCH // 2, BATCH // 4])
def test_one_worker_and_two_train_the_same_network(two, norm_batch, trainable, zero):
    of = trial(norm_batch=norm_batch, trainable=trainable)
    expected = by_one(of)
    assert_same_training(two(by_gang, of, zero), expected)
    assert expected["losses"][-1] < expected["losses"][0]


def test_one_worker_and_four_train_the_same_network_where_two_share_a_statistic(gather):
    of = trial(norm_batch=BATCH // 2)
    assert_same_training(gather(4)(by_gang, of, 1), by_one(of))


@pytest.mark.parametrize("trainable", [Trainable.OUTPUT, Trainable.SHORTCUT_OUTPUT, Trainable.TWO_PER_CHANNEL])
@pytest.mark.parametrize("fields", [{"momentum": 0.0}, {"weight_decay": 0.0}], ids=str)
def test_every_trainable_set_momentum_and_weight_decay_reach_the_gang(two, trainable, fields):
    of = trial(trainable=trainable, **fields)
    assert_same_training(two(by_gang, of, 1), by_one(of))


@pytest.mark.parametrize("zero", [0, 1])
def test_frozen_weights_keep_their_initialisation_to_the_last_bit(two, zero):
    of = trial(trainable=Trainable.BN)
    network = networks.build(of)
    for got in two(by_gang, of, zero):
        for name, p in network.named_parameters():
            assert torch.equal(got["state"][name], p) is not p.requires_grad, name


OTHERS: list[dict[str, Any]] = [
    *({"norm": each} for each in Norm if each.over_images and each is not Norm.RENORM),
    {
        "norm": Norm.RENORM,
        "renorm_r": 3.0,
        "renorm_d": 5.0,
        "renorm_start": 0.0,
        "renorm_r_end": 0.5,
        "renorm_d_end": 0.5,
    },
    {"norm": Norm.GROUP, "groups": 4},
    {"norm": Norm.LAYER},
    {"norm": Norm.INSTANCE},
    {"norm": Norm.NONE, "lr": 0.01},
    {"norm": Norm.NOISE, "lr": 0.001},
    {"placement": Placement.LAST, "lr": 0.01},
    {"gamma_l1": 0.01, "beta_l2": 0.01, "norm_decay": 0.1, "decay_on": DecayOn.WEIGHTS},
    {"network": Network.VGG, "depth": 11, "affine": Affine.GAMMA},
    {"network": Network.VGG_RESIDUAL, "depth": 14},
]


# Where maps are 1x1, four images are four values: a silent feature is divided by almost nothing, a rounding with it.
# One worker whose images are off by 1e-7 then drifts as far from itself. test_norm_kinds has groups of four in float64.
TINY = [fields for fields in OTHERS if "network" in fields or fields.get("placement") is Placement.LAST]
GROUPED = [{**fields, "norm_batch": BATCH // 4} for fields in OTHERS if fields not in TINY]
GROUPED = [fields for fields in GROUPED if trial(**fields).norm_batch == BATCH // 4]


@pytest.mark.parametrize("fields", OTHERS + GROUPED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_one_worker_and_two_agree_for_every_norm_placement_and_penalty(two, fields):
    of = trial(**fields)
    assert_same_training(two(by_gang, of, 1), by_one(of))


def after_a_broken_image(rank: int, zero: int) -> dict[str, Tensor]:
    engine = engine_for(trial(), zero)
    images_NCHW, labels_N = (whole.chunk(2)[rank] for whole in batch(0, BATCH))
    if rank == 1:
        images_NCHW[0] = float("inf")
    engine.backward(engine(images_NCHW, labels_N))
    engine.step(0.1)
    state = everything(engine)["state"]
    engine.close()
    return state


@pytest.mark.parametrize("zero", [0, 1])
def test_a_gradient_that_is_not_finite_is_applied_and_not_passed_over(two, zero):
    """A skipped update would hide that a trial diverged."""
    for state in two(after_a_broken_image, zero):
        assert state["output.weight"].isnan().all()


def labels(rank: int, of: Trial) -> Tensor:
    return Resident(of, folder, torch.device("cpu")).batch(0, slice(rank * BATCH // 2, (rank + 1) * BATCH // 2))[1]


def test_two_processes_learn_the_noisy_labels_of_one(two):
    of = trial(label_noise=0.5)
    alone = Resident(of, Path("/nonexistent"), torch.device("cpu")).batch(0)[1]
    assert torch.equal(torch.cat(two(labels, of)), alone)


def types(rank: int, of: Trial) -> dict[str, Any]:
    engine = engine_for(of, 0)
    seen = set()
    for module in engine.module.modules():
        if isinstance(module, nn.Conv2d | BatchNorm):
            module.register_forward_hook(lambda m, _, out: seen.add((type(m).__name__, out.dtype)))
    losses = updates(engine, of, range(STEPS))
    kept = {value.dtype for value in engine.module.state_dict().values()}
    engine.close()
    return {"losses": losses, "seen": seen, "kept": kept}


def test_bfloat16_reaches_the_convolutions_and_leaves_parameters_and_statistics_in_float32(two):
    of = trial(precision=Precision.BF16)
    exact = by_one(trial())["losses"]
    for got in two(types, of):
        assert got["seen"] == {("Conv2d", torch.bfloat16), ("BatchNorm", torch.bfloat16)}
        assert got["kept"] == {torch.float32, torch.int64}
        assert got["losses"] != exact
        torch.testing.assert_close(got["losses"], exact, rtol=0.1, atol=0)


# --- checkpoints --------------------------------------------------------------------------------


def unbroken(rank: int, of: Trial, zero: int) -> dict[str, Any]:
    engine = engine_for(of, zero)
    losses = updates(engine, of, range(STEPS))
    got = everything(engine)
    engine.close()
    return {"losses": losses[3:], **got}


def broken(rank: int, of: Trial, first: int, then: int, where: str) -> dict[str, Any]:
    """Three updates under one ZeRO stage, a checkpoint, and three in a new engine that may use the other."""
    engine = engine_for(of, first, where)
    assert engine.restore() == (0, {})
    updates(engine, of, range(3))
    engine.save(3, {"seconds": 1.5})
    engine.close()
    engine = engine_for(of, then, where)
    assert engine.restore() == (3, {"seconds": 1.5})
    losses = updates(engine, of, range(3, STEPS))
    got = everything(engine)
    engine.close()
    assert (folder / where).exists() is gang.leads, "only the leading worker touches its disk"
    return {"losses": losses, **got}


@pytest.mark.parametrize("then", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_a_restored_gang_goes_on_to_the_last_bit(two, first, then):
    of = trial(trainable=Trainable.BN_OUTPUT, norm_batch=4)
    expected = two(unbroken, of, then)
    for got, reference in zip(two(broken, of, first, then, f"{first}-{then}"), expected, strict=True):
        assert got["losses"] == reference["losses"]
        for kind in ("state", "momentum"):
            for name, value in reference[kind].items():
                assert torch.equal(got[kind][name], value), name


def handed_over(rank: int, of: Trial, zero: int) -> dict[str, Any]:
    """One update by one worker, two by two, and the rest by one: the same folder all the way."""
    where = f"handed-{zero}"
    disk = storage(folder / where)

    def local(steps: range) -> dict[str, Any]:
        engine = LocalEngine(networks.build(of), of, Gang(), disk)
        assert engine.restore()[0] == steps.start
        losses = []
        for step in steps:
            loss = engine(*batch(step, of.batch))
            engine.backward(loss)
            engine.step(of.rate(step))
            losses.append(loss.item())
        engine.save(steps.stop, {})
        return {"losses": losses, "state": engine.module.state_dict()}

    losses = local(range(1))["losses"] if rank == 0 else []
    engine = engine_for(of, zero, where)
    assert engine.restore() == (1, {})
    losses += updates(engine, of, range(1, 3))
    engine.save(3, {})
    engine.close()
    if rank != 0:
        return {}
    last = local(range(3, STEPS))
    return {"losses": losses + last["losses"], "state": last["state"], "momentum": {}, "statistics": {}}


@pytest.mark.parametrize("zero", [0, 1])
def test_one_worker_and_a_gang_go_on_from_each_others_checkpoints(two, zero):
    of = trial(trainable=Trainable.BN)
    assert_same_training(two(handed_over, of, zero)[:1], by_one(of) | {"momentum": {}})


def saved(rank: int, of: Trial, zero: int, steps: int) -> dict[str, Tensor] | None:
    engine = engine_for(of, zero, f"saved-{zero}")
    updates(engine, of, range(steps))
    engine.save(steps, {})
    engine.close()
    found = checkpoint.newest(storage(folder / f"saved-{zero}"))
    return found.tensors if found else None


@pytest.mark.parametrize("zero", [0, 1])
def test_a_checkpoint_holds_whole_tensors_and_the_last_no_momentum(two, zero):
    of = trial(trainable=Trainable.BN)
    trained = networks.trained(networks.build(of))
    kept = {f"network.{name}" for name in [*trained, *dict(networks.build(of).named_buffers())]}
    tensors, nothing = two(saved, of, zero, 3)
    assert nothing is None, "only the leading worker writes"
    assert tensors.keys() == kept | {f"momentum.{name}" for name in trained}
    for name, buffer in by_one(of, 3)["momentum"].items():
        torch.testing.assert_close(tensors[f"momentum.{name}"], buffer, rtol=1e-4, atol=2e-5)
    assert two(saved, of, zero, STEPS)[0].keys() == kept


def from_another_seed(rank: int) -> tuple[int, dict[str, Any]]:
    engine = engine_for(trial(trainable=Trainable.BN, seed=1), 0, "saved-0")
    answer = engine.restore()
    engine.close()
    return answer


def test_a_checkpoint_over_other_frozen_weights_is_not_taken(two):
    two(saved, trial(trainable=Trainable.BN), 0, 1)
    assert two(from_another_seed) == [(0, {})] * 2


def cannot_write(rank: int) -> str:
    of = trial()
    engine = engine_for(of, 0, "a-file")
    if rank == 0:
        (folder / "a-file").write_text("no folder")
    with pytest.raises(OSError if rank == 0 else RuntimeError) as error:
        engine.save(0, {})
    engine.close()
    return str(error.value)


def test_a_checkpoint_that_cannot_be_written_fails_on_every_worker_and_hangs_none(two):
    leading, other = two(cannot_write)
    assert other == f"the leading worker could not write the checkpoint of step 0: {leading}"


# --- the gang itself ----------------------------------------------------------------------------


def talk(rank: int) -> tuple[float, float, bool, bool, bool]:
    engine = engine_for(trial(), 0)
    mine = torch.tensor(float(rank + 1))
    total = engine.total(mine)
    answer = total.item(), mine.item(), engine.agree(rank == 0), engine.agree(rank != 0), engine.agree(False)
    engine.close()
    return answer


def test_totals_are_sums_and_what_any_worker_says_all_agree_to(two):
    assert two(talk) == [(3.0, 1.0, True, True, False), (3.0, 2.0, True, True, False)]


def looked(rank: int, of: Trial) -> tuple[list[str], dict[str, Tensor]]:
    """What probes that take gradients read before the first update, and the network after two that follow."""
    engine = engine_for(of, 0)
    at = Snapshot(of, 0, engine, Resident(of, Path("/nonexistent"), torch.device("cpu")))
    rows = [repr(row) for probe in LOOKING for row in probe(at)]
    assert [row.mode for row in timing(at)][:3] == ["train", "evaluation", "folded"]  # its seconds are its own
    updates(engine, of, range(2))
    state = copy.deepcopy(engine.module.state_dict())
    engine.close()
    return rows, state


LOOKING = [
    channel_moments, gradient, mean_gradient, gradient_noise, loss_along_gradient, class_bias, gradient_bound,
    at_multiples(landscape, 0.5, 4), at_layers(covariate_shift, 2, 5), at_layers(moment_change, 3),
    at_layers(activations, 3), batch_curve, parameter_gradient, norm_gradient, at_multiples(descent, 1, 10),
    weight_scaling, gamma_scaling,
]  # fmt: skip


@pytest.mark.parametrize("norm_batch", [4, 16])  # within a worker's share of 8, and over both
def test_the_workers_of_a_gang_read_what_one_worker_reads_and_train_on_as_if_they_had_not(two, norm_batch):
    of = trial(norm_batch=norm_batch, depth=8)
    network = networks.build(of)
    engine = LocalEngine(network, of, Gang(), None, way=Way.PLAIN)  # the gang has no compiler, either
    at = Snapshot(of, 0, engine, Resident(of, Path("/nonexistent"), torch.device("cpu")))
    expected = [repr(row) for probe in LOOKING for row in probe(at)]
    state = by_one(of, 2)["state"]
    for rows, after in two(looked, of):
        assert rows == expected  # each holds the whole batch, so even the last digit
        for name, value in after.items():
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


def looked_between(rank: int, of: Trial, zero: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What is read of all parameters between two updates, and the network after them."""
    engine = engine_for(of, zero)
    updates(engine, of, range(1))
    at = Snapshot(of, 1, engine, Resident(of, Path("/nonexistent"), torch.device("cpu")))
    rows = [vars(row) for row in parameter_gradient(at)]
    updates(engine, of, range(1, 3))
    state = copy.deepcopy(engine.module.state_dict())
    engine.close()
    return rows, state


@pytest.mark.parametrize("zero", [0, 1])
def test_the_workers_of_a_gang_read_the_last_update_of_every_parameter_and_train_on_as_if_they_had_not(two, zero):
    of = trial(norm_batch=16, depth=8)
    engine = LocalEngine(networks.build(of), of, Gang(), None)
    engine.backward(engine(*batch(0, of.batch)))
    engine.step(of.rate(0))
    at = Snapshot(of, 1, engine, Resident(of, Path("/nonexistent"), torch.device("cpu")))
    expected = [vars(row) for row in parameter_gradient(at)]
    assert all(row["last_update"] > 0 for row in expected if row["trains"])
    state = by_one(of, 3)["state"]
    for rows, after in two(looked_between, of, zero):
        for row, known in zip(rows, expected, strict=True):
            numbers = {name for name, value in known.items() if isinstance(value, float)}
            assert {name: row[name] for name in known.keys() - numbers} == {
                name: known[name] for name in known.keys() - numbers
            }
            for name in numbers:
                assert row[name] == pytest.approx(known[name], rel=1e-3, abs=1e-6), (row["parameter"], name)
        for name, value in after.items():
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


def held(rank: int, trials: list[Trial], zero: int) -> list[tuple[int, int, int]]:
    process = psutil.Process()
    counts, networks_seen = [], []
    for of in trials:
        engine = engine_for(of, zero)
        networks_seen.append(weakref.ref(engine.module))
        updates(engine, of, range(2))
        engine.close()
        del engine
        gc.collect()
        alive = sum(seen() is not None for seen in networks_seen)
        counts.append((process.num_threads(), process.num_fds(), alive))
    return counts


@pytest.mark.parametrize("zero", [0, 1])
def test_ten_trials_of_other_shapes_leave_no_thread_no_file_and_no_network_behind(two, zero):
    trials = [trial(depth=8 + 6 * (i % 2), batch=8 + 8 * (i % 3), norm_batch=4, seed=i) for i in range(10)]
    for counts in two(held, trials, zero):
        assert counts[-1] == (*counts[2][:2], 0), counts


def refusals(rank: int) -> list[str]:
    said = []
    for of, zero in [(trial(trainable=Trainable.NONE), 0), (trial(batch=15, norm_batch=5), 0), (trial(), 2)]:
        with pytest.raises(Refusal) as refused:
            engine_for(of, zero)
        said.append(str(refused.value))
    return said


def test_what_a_gang_cannot_share_is_refused_before_it_starts(two):
    for said in two(refusals):
        assert said == [
            "trainable none: trains nothing for 2 workers to share; use 1 worker",
            "workers 2: must divide batch 15 into equal shares; try 1 or 3",
            "zero 2: gangs shard nothing (0) or the momentum (1); try 1",
        ]


def reaches(address: str, port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(2)
        return client.connect_ex((address, port)) == 0


def test_a_host_listens_on_its_address_only_and_two_never_collide():
    from bnscale.engine.deepspeed import host

    (address, first), (_, second) = host("127.0.0.2", 2), host("127.0.0.2", 2)
    assert address == "127.0.0.2"
    assert first != second
    assert reaches("127.0.0.2", first)
    assert not reaches("127.0.0.1", first)


def leave_and_return(rank: int, port: int | None) -> tuple[int | None, list[float]]:
    """With a port: meet there. Without: part, and the leading worker hosts the next meeting."""
    from bnscale.engine import deepspeed as engine

    if port is None:
        engine.leave()
        assert not dist.is_initialized()
        return (engine.host("127.0.0.1", 2)[1] if rank == 0 else None), []
    meet(rank, 2, port)
    engine_ = engine_for(trial(), 1)
    losses = updates(engine_, trial(), range(2))
    engine_.close()
    return None, losses


def what_was_said(rank: int) -> tuple[str, bool]:
    return (folder / "said").read_text(), (folder / "compiled").exists()


def test_a_gang_can_part_and_meet_again_and_all_the_while_says_and_compiles_nothing(two):
    port = two(leave_and_return, None)[0][0]
    expected = by_one(trial(), 2)["losses"]
    for _, losses in two(leave_and_return, port):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert two(what_was_said) == [("", False)] * 2
