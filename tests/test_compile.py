"""However a step is computed, by compiled blocks or as one recording, it is the same step."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from examples import digits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from bnscale import score
from bnscale.data import Resident
from bnscale.engine import Gang, compiled, evaluation
from bnscale.engine.cohort import CohortEngine
from bnscale.engine.local import LocalEngine
from bnscale.engine.objective import Objective
from bnscale.engine.recorded import Recorded, again
from bnscale.engine.way import Way, ways
from bnscale.networks import build
from bnscale.networks.recompute import Activations
from bnscale.score import Score
from bnscale.storage import storage
from bnscale.trial import Network, Norm, Precision, Trainable, Trial

NOWHERE = Path("/nonexistent")
CPU = torch.device("cpu")

# torch's compiler looks at what it is given in a way that torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Compiles by a backend that counts its graphs and computes them as they are: no C++ is generated."""
    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda code, **how: real(code, backend=counter, **how))
    compiled._code.cache_clear()
    torch._dynamo.reset()
    yield counter
    compiled._code.cache_clear()
    torch._dynamo.reset()


def engine_of(
    trial: Trial, way: Way, activations: Activations = Activations.KEPT, folder: Path | None = None
) -> LocalEngine:
    kept = None if folder is None else storage(folder)
    return LocalEngine(build(trial), trial, Gang(), kept, activations, way)


def trained(trial: Trial, engine: LocalEngine, steps: range) -> list[Tensor]:
    """Losses, then everything that training changes."""
    data, losses = Resident(trial, NOWHERE, CPU), []
    for step in steps:
        loss = engine(*data.batch(step))
        engine.backward(loss)
        engine.step(trial.rate(step))
        losses.append(loss.detach())
    return [torch.stack(losses), *(each.clone() for each in engine.module.state_dict().values())]


def assert_same(one: list[Tensor], other: list[Tensor], close: float = 1e-5) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


def test_a_deep_network_compiles_as_few_graphs_as_a_shallow_one(graphs: CompileCounterWithBackend) -> None:
    found = []
    for depth in (14, 32, 50):
        trial = digits(depth=depth, batch=4, norm_batch=4)
        engine = engine_of(trial, Way.COMPILED)
        engine.backward(engine(*Resident(trial, NOWHERE, CPU).batch(0)))
        found.append(graphs.frame_count)
    # The kinds of block: one in the first stage, and in each other one that halves and one that does not.
    assert found[0] <= 6
    assert found == found[:1] * 3


CASES: dict[str, dict[str, Any]] = {
    "gamma and beta alone": {},
    "all of it": {"trainable": Trainable.ALL},
    "penalties and decay": {"gamma_l1": 1e-3, "beta_l2": 1e-2, "weight_decay": 1e-2},
    "bfloat16": {"precision": Precision.BF16},
    "a VGG": {"network": Network.VGG, "depth": 11, "trainable": Trainable.ALL},
    "layer norm": {"norm": Norm.LAYER},
    "without momentum": {"momentum": 0.0},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("way", [Way.REPLAYED, Way.COMPILED, Way.RECORDED])
def test_compiled_blocks_and_a_recorded_step_train_the_same_network(
    way: Way, changes: dict[str, Any], graphs: CompileCounterWithBackend
) -> None:
    trial = digits(**({"depth": 8, "batch": 16, "norm_batch": 16, "lr": 0.05} | changes))
    plain, other = engine_of(trial, Way.PLAIN), engine_of(trial, way)
    close = 3e-2 if trial.precision is Precision.BF16 else 1e-5
    assert_same(trained(trial, plain, range(3)), trained(trial, other, range(3)), close)
    assert plain.momentum().keys() == other.momentum().keys()
    assert_same(list(plain.momentum().values()), list(other.momentum().values()), close)
    assert (graphs.frame_count > 0) is way.compiles


def test_a_block_compiled_to_machine_code_computes_what_it_computed() -> None:
    trial = digits(depth=8, batch=4, norm_batch=4)
    torch._dynamo.reset()
    try:
        plain, other = engine_of(trial, Way.PLAIN), engine_of(trial, Way.COMPILED)
        # One kind of block: each takes a C++ compiler seconds.
        for network in (plain.module, other.module):
            network.blocks = nn.Sequential(network.blocks[0])  # type: ignore[union-attr,index,operator]
            network.output = nn.Linear(16, 10)
            nn.init.ones_(network.output.weight)
            nn.init.zeros_(network.output.bias)
            network.head_norm = nn.Identity()
        assert_same(trained(trial, plain, range(2)), trained(trial, other, range(2)))
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("way", [Way.PLAIN, Way.RECORDED])
def test_activations_computed_again_are_those_of_the_same_way(way: Way, graphs: CompileCounterWithBackend) -> None:
    trial = digits(depth=8, batch=16, norm_batch=16, trainable=Trainable.ALL)
    kept, again_ = engine_of(trial, way), engine_of(trial, way, Activations.RECOMPUTED)
    assert_same(trained(trial, kept, range(2)), trained(trial, again_, range(2)), 1e-6)


def test_a_recorded_training_goes_on_from_its_checkpoint(graphs: CompileCounterWithBackend, tmp_path: Path) -> None:
    trial = digits(depth=8, batch=16, norm_batch=16)
    whole = engine_of(trial, Way.RECORDED, folder=tmp_path / "a")
    first = engine_of(trial, Way.RECORDED, folder=tmp_path / "b")
    trained(trial, first, range(2))
    first.save(2, {})
    later = engine_of(trial, Way.RECORDED, folder=tmp_path / "b")
    assert later.restore()[0] == 2
    end = trained(trial, whole, range(4))
    goes_on = trained(trial, later, range(2, 4))
    assert torch.equal(end[0][2:], goes_on[0])
    assert all(torch.equal(a, b) for a, b in zip(end[1:], goes_on[1:], strict=True))


def test_recording_moves_nothing(graphs: CompileCounterWithBackend) -> None:
    trial = digits(depth=8)
    before = build(trial).state_dict()
    engine = engine_of(trial, Way.RECORDED)
    assert all(torch.equal(before[name], value) for name, value in engine.module.state_dict().items())
    assert engine.momentum() == {}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_what_a_recording_reads_and_writes_stays_where_it_is(momentum: float) -> None:
    # A graph knows addresses: what a step put elsewhere, such as a new rate, no replay would see.
    trials = [digits(depth=8, momentum=momentum, lr=lr, seed=0) for lr in (0.1, 0.05)]
    alone = engine_of(trials[0], Way.REPLAYED)
    cohort = CohortEngine(build(trials[0]), trials, Gang(), [None, None], way=Way.REPLAYED)
    read: list[Callable[[], list[Tensor]]] = [
        lambda: [*alone.changing(), *(group["lr"] for group in alone._sgd.param_groups)],
        lambda: [*cohort.changing(), cohort._rate_A, cohort._keep_A, cohort._stacked.gradients_A],
    ]
    for engine, tensors in zip((alone, cohort), read, strict=True):
        before = [each.data_ptr() for each in tensors()]
        for step, rate in enumerate((0.1, 0.01)):
            loss = engine(*Resident(trials[0], NOWHERE, CPU).batch(step))
            engine.backward(loss)
            engine.step(*([rate] if engine is alone else [rate, rate / 2]))
            assert [each.data_ptr() for each in tensors()] == before


def test_a_replay_reads_its_own_batch_and_hands_out_losses_that_stay() -> None:
    total = torch.zeros(())

    def update(images: Tensor, targets: Tensor) -> Tensor:
        total.add_(images.sum())
        return (images.sum() + targets.sum()) * 1

    recorded = Recorded(update, torch.ones(2), torch.ones(2), [total], again)
    assert total == 0
    losses = []
    for value in (1.0, 2.0):
        recorded(torch.full((2,), value), torch.zeros(2))
        losses.append(recorded.losses.clone())
    assert [float(loss) for loss in losses] == [2, 4]
    assert total == 6


@pytest.mark.parametrize("way", [Way.PLAIN, Way.FUSED, Way.COMPILED, Way.RECORDED])
@pytest.mark.parametrize("activations", Activations)
def test_a_cohort_is_the_same_cohort_however_its_steps_are_computed(
    way: Way, activations: Activations, graphs: CompileCounterWithBackend
) -> None:
    trials = [digits(depth=8, batch=16, norm_batch=16, lr=lr, gamma_l1=l1) for lr, l1 in ((0.1, 0.0), (0.02, 1e-3))]
    cohort = CohortEngine(build(trials[0]), trials, Gang(), [None, None], activations, way)
    data = Resident(trials[0], NOWHERE, CPU)
    losses = []
    for step in range(3):
        losses_K = cohort(*data.batch(step))
        cohort.backward(losses_K)
        cohort.step(*(trial.rate(step) for trial in trials))
        losses.append(losses_K.detach())
    for place, trial in enumerate(trials):
        alone = trained(trial, engine_of(trial, Way.PLAIN), range(3))
        member = cohort.members[place]
        assert_same(alone, [torch.stack(losses)[:, place], *member.module.state_dict().values()])
        assert member.momentum().keys() == {name for name, p in member.module.named_parameters() if p.requires_grad}
    cohort.keep([1])
    losses_K = cohort(*data.batch(3))
    cohort.backward(losses_K)
    cohort.step(trials[1].rate(3))
    right = trained(trials[1], engine_of(trials[1], Way.PLAIN), range(4))
    assert_same(right[1:], list(cohort.members[0].module.state_dict().values()))


def test_where_nothing_can_be_compiled_a_gpu_records_operation_by_operation_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*given: Any, **how: Any) -> Any:
        raise RuntimeError("no compiler")

    compiled._code.cache_clear()
    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr("bnscale.engine.local.ways", lambda trial, device: ways(trial, torch.device("cuda")))
    trial = digits(depth=8)
    engine = LocalEngine(build(trial), trial, Gang(), None)
    assert engine.way is Way.REPLAYED
    assert "compiled blocks, the whole step recorded: RuntimeError: no compiler" in engine.backend
    assert_same(trained(trial, engine, range(2)), trained(trial, engine_of(trial, Way.PLAIN), range(2)), 0)
    compiled._code.cache_clear()


def test_of_an_engine_that_is_closed_nothing_stays() -> None:
    trial = digits(depth=8)
    for engine in (
        engine_of(trial, Way.REPLAYED),
        CohortEngine(build(trial), [trial, digits(depth=8, lr=0.01)], Gang(), [None, None], way=Way.REPLAYED),
    ):
        recorded = weakref.ref(engine._steps._recorded)
        engine.close()
        gc.collect()
        assert recorded() is None


def test_noise_that_is_drawn_anew_each_step_is_never_recorded() -> None:
    assert Way.RECORDED in ways(digits(), torch.device("cuda"))
    assert Way.RECORDED not in ways(digits(norm=Norm.NOISY, trainable=Trainable.ALL), torch.device("cuda"))


# --- evaluation ----------------------------------------------------------------------------------------


def scored(trials: list[Trial], way: Way) -> tuple[CohortEngine | LocalEngine, list[Score]]:
    engine: CohortEngine | LocalEngine = (
        CohortEngine(build(trials[0]), trials, Gang(), [None] * len(trials), Activations.KEPT, way)
        if len(trials) > 1
        else engine_of(trials[0], way)
    )
    data = Resident(trials[0], NOWHERE, CPU)
    members = engine.members if isinstance(engine, CohortEngine) else [engine]
    return engine, [member.score("test", data) for member in members]


@pytest.mark.parametrize("trials", [[digits()], [digits(lr=rate) for rate in (0.1, 0.2)]], ids=["alone", "a cohort"])
def test_where_steps_are_compiled_whole_batches_of_an_evaluation_are(
    trials: list[Trial], graphs: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "EVALUATION_BATCH", 100)  # of 360 images
    _, plain = scored(trials, Way.PLAIN)
    assert graphs.frame_count == 0
    engine, found = scored(trials, Way.COMPILED)
    assert graphs.frame_count == 3 + 3  # of eight layers there is a block a stage: in training, and in evaluation
    for one, other in zip(plain, found, strict=True):
        assert one.images == other.images == 360
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.01)
    assert all(module.training for module in engine._evaluation._objective.modules())


def test_an_evaluation_that_cannot_be_compiled_is_computed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "EVALUATION_BATCH", 100)
    trial = digits()
    objective, data = Objective(build(trial), trial), Resident(trial, NOWHERE, CPU)
    tries: list[int] = []

    def no_more(*told: object) -> NoReturn:
        tries.append(1)
        raise RuntimeError("recompile_limit reached with fullgraph=True")

    plain = evaluation.Evaluation(objective, Way.PLAIN)("test", data)
    monkeypatch.setattr(evaluation, "computing", no_more)
    compiling = evaluation.Evaluation(objective, Way.COMPILED)
    assert torch.equal(compiling("test", data), plain)
    assert torch.equal(compiling("test", data), plain)
    assert len(tries) == 1
