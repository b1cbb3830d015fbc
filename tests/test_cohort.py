"""Cohorts: trials trained in one pass have the numbers that each has alone."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import digits
from torch import Tensor

import bnscale
from bnscale import loss
from bnscale.data import Resident
from bnscale.engine import Gang, checkpoint
from bnscale.engine.cohort import CohortEngine
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.networks.cohort import Stacked, StackedNorm, kin, members
from bnscale.networks.layers import mode
from bnscale.networks.recompute import Activations
from bnscale.probes import STEP, curve, gamma, gradient, parameter_gradient
from bnscale.rules import RENORM
from bnscale.store import Store
from bnscale.train import Job, Progress, run
from bnscale.trial import (
    Affine,
    Augmentation,
    Data,
    DecayOn,
    Network,
    Norm,
    NormInit,
    Outcome,
    OutputBias,
    Pixels,
    Placement,
    Precision,
    Trainable,
    Trial,
    WeightInit,
)

CPU = torch.device("cpu")
NOWHERE = Path("/nonexistent")

# --- who may share a pass ------------------------------------------------------------------------------

MAY_DIFFER: list[dict[str, Any]] = [
    {"lr": 0.3},
    {"milestones": ()},
    {"milestones": (), "plateau": 1},
    {"lr_drop": 0.5},
    {"warmup": 0.2},
    {"momentum": 0.0},
    {"weight_decay": 0.0},
    {"decay_on": DecayOn.WEIGHTS},
    {"norm_decay": 0.1},
    {"gamma_l1": 0.1, "beta_l2": 0.1},
    {"gamma_l2": 0.1, "beta_l1": 0.1},
    {"norm_init": NormInit.NORMAL},
    {"trainable": Trainable.GAMMA},
    {"trainable": Trainable.BETA},
    {"affine": Affine.BETA},
    {"affine": Affine.GAMMA, "norm_init": NormInit.SYMMETRIC},
    {"affine_at": Placement.BRANCH},
]


@pytest.mark.parametrize("fields", MAY_DIFFER, ids=str)
def test_trials_that_differ_in_gamma_and_beta_and_their_optimisation_are_kin(fields):
    assert kin(digits(**fields)) == kin(digits()) is not None


def test_every_field_may_differ_within_a_cohort_or_parts_it() -> None:
    apart: list[dict[str, Any]] = [
        {"validation": 200}, {"label_noise": 0.5}, {"augmentation": Augmentation.NONE},
        {"network": Network.VGG_RESIDUAL}, {"depth": 14}, {"width": 2}, {"seed": 1}, {"batch": 8, "norm_batch": 8},
        {"steps": 20}, {"epochs": 1, "steps": None},
        {"precision": Precision.BF16}, {"placement": Placement.EVERY_2}, {"output_bias": OutputBias.ZERO},
        {"data": Data.MNIST}, {"pixels": Pixels.JPEG}, {"weight_init": WeightInit.BINARY},
    ]  # fmt: skip
    for fields in apart:
        assert kin(digits(**fields)) not in (None, kin(digits())), fields
    alone = {"norm", "groups", *RENORM}  # of norms that have no stacked form
    assert {name for fields in [*MAY_DIFFER, *apart] for name in fields} | alone == set(Trial.model_fields)


def test_an_epoch_counts_as_the_steps_that_it_has():
    epochs = digits(epochs=1, steps=None)
    assert kin(epochs) == kin(digits(steps=epochs.total_steps))


@pytest.mark.parametrize(
    "fields",
    [
        {"trainable": Trainable.ALL},
        {"trainable": Trainable.BN_OUTPUT},
        {"trainable": Trainable.NONE},
        {"norm": Norm.LAYER},
        {"norm": Norm.NOISY},
        {"norm_batch": 8},
        {"output_bias": OutputBias.EVEN},
    ],
    ids=str,
)
def test_what_has_no_stacked_form_trains_alone(fields):
    assert kin(digits(**fields)) is None


def test_a_trial_of_which_nothing_is_its_own_is_its_own_kin():
    once = kin(digits())
    assert isinstance(once, Trial)
    assert kin(once) == once


# --- the numbers of one pass ---------------------------------------------------------------------------

# Two steps an epoch, so that a plateau is heard of within a few.
SHORT: dict[str, Any] = {"validation": 1405, "milestones": ()}
DIFFERENT: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rate": {"lr": 0.3, "decay_on": DecayOn.WEIGHTS, "milestones": (0.2, 0.6), "lr_drop": 0.5, "warmup": 0.1},
    "no momentum, much decay": {"momentum": 0.0, "weight_decay": 0.01},
    "penalties": {"gamma_l1": 0.001, "gamma_l2": 0.01, "beta_l2": 0.01, "norm_init": NormInit.SYMMETRIC},
    "gamma alone trains": {"trainable": Trainable.GAMMA, "norm_init": NormInit.ONES_ONES},
    "no gamma, and beta in branches": {"affine": Affine.BETA, "affine_at": Placement.BRANCH, "norm_decay": 0.1},
}


def different(**common: Any) -> list[Trial]:
    return [digits(**(common | fields)) for fields in DIFFERENT.values()]


def numbers(engine: Any) -> dict[str, Tensor]:
    """All that training changes, and all that it does not."""
    return {name: value.clone() for name, value in engine.module.state_dict().items()} | {
        f"momentum of {name}": value.clone() for name, value in engine.momentum().items()
    }


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], within: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=within, atol=within, msg=lambda m, n=name: f"{n}: {m}")


def in_one_pass(trials: list[Trial], activations: Activations = Activations.KEPT) -> tuple[list[Any], Tensor]:
    """Members at the end, and all losses, (steps, K)."""
    engine = CohortEngine(build(trials[0]), trials, Gang(), [None] * len(trials), activations)
    data = Resident(trials[0], NOWHERE, CPU)
    losses = []
    for step in range(trials[0].total_steps):
        losses.append(engine(*data.batch(step)))
        engine.backward(losses[-1])
        engine.step(*(trial.rate(step) for trial in trials))
    return engine.members, torch.stack(losses).detach()


def alone(trial: Trial) -> tuple[LocalEngine, Tensor]:
    engine, data = LocalEngine(build(trial), trial, Gang(), None), Resident(trial, NOWHERE, CPU)
    losses = []
    for step in range(trial.total_steps):
        losses.append(engine(*data.batch(step)))
        engine.backward(losses[-1])
        engine.step(trial.rate(step))
    return engine, torch.stack(losses).detach()


def test_a_member_equals_the_same_trial_alone_over_50_steps() -> None:
    trials = different(steps=50, batch=32, norm_batch=32)
    assert len({kin(trial) for trial in trials}) == 1
    cohort, losses_SK = in_one_pass(trials)
    for member, losses_S, trial in zip(cohort, losses_SK.T, trials, strict=True):
        engine, expected_S = alone(trial)
        torch.testing.assert_close(losses_S, expected_S, rtol=1e-5, atol=1e-5)
        assert_close(numbers(member), numbers(engine), 1e-5)


def test_a_member_in_bfloat16_equals_the_same_trial_alone_as_far_as_that_rounds() -> None:
    trials = different(steps=5, precision=Precision.BF16)[:3]
    cohort, losses_SK = in_one_pass(trials)
    for member, losses_S, trial in zip(cohort, losses_SK.T, trials, strict=True):
        engine, expected_S = alone(trial)
        torch.testing.assert_close(losses_S, expected_S, rtol=2**-6, atol=2**-6)
        assert_close(numbers(member), numbers(engine), 2**-5)


def test_activations_computed_again_give_the_same_bits() -> None:
    trials = different(steps=3)[:3]
    for one, other in zip(in_one_pass(trials)[0], in_one_pass(trials, Activations.RECOMPUTED)[0], strict=True):
        assert_close(numbers(one), numbers(other), 0.0)


FAMILIES: dict[str, dict[str, Any]] = {
    "a ResNet": {},
    "no norm behind the first convolution": {"placement": Placement.BRANCH},
    "norms here and there": {"placement": Placement.EVERY_3},
    "one norm, at the end": {"placement": Placement.LAST},
    "a VGG, whose convolutions have biases": {"network": Network.VGG, "depth": 11},
    "a VGG with skips": {"network": Network.VGG_RESIDUAL},
    "torchvision's ResNet": {"network": Network.IMAGENET_RESNET, "depth": 18, "width": 4},
    "a product of matrices and its squared error": {
        "data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "network": Network.LINEAR, "depth": 4,
        "width": 10,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", [StackedNorm.in_kernels, StackedNorm.in_operations])
@pytest.mark.parametrize("named", FAMILIES)
def test_in_double_precision_losses_gradients_statistics_and_outputs_are_those_of_the_networks_apart(
    named: str, way: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StackedNorm, "forward", way)
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # of the losses
    own = [{"norm_init": each} for each in (NormInit.UNIFORM, NormInit.NORMAL, NormInit.ONES_ONES)]
    trials = [digits(**(FAMILIES[named] | fields)) for fields in own]
    images, targets = (each.double() if each.is_floating_point() else each for each in batch(trials[0]))
    shared = build(trials[0]).double()
    networks = [network.double() for network in members(shared, trials)]
    apart = [build(trial).double().train() for trial in trials]
    for one, other in zip(networks, apart, strict=True):
        assert_close(one.state_dict(), other.state_dict(), 0.0)
        for mine, its in zip(one.parameters(), other.parameters(), strict=True):
            assert mine.requires_grad == its.requires_grad

    stacked = Stacked(shared, networks, trials[0])
    losses_K = loss.of_each(trials[0], stacked(images), targets)
    losses_K.sum().backward()
    for place, (trial, network) in enumerate(zip(trials, apart, strict=True)):
        expected = loss.of_batch(trial, network(images), targets)
        expected.backward()
        torch.testing.assert_close(losses_K[place], expected, rtol=1e-12, atol=0)
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        scale = max(float(gradient.abs().max()) for gradient in gradients.values())
        assert_close(
            stacked.of(place, stacked.gradients_A / scale), {n: g / scale for n, g in gradients.items()}, 1e-11
        )
        assert_close(dict(networks[place].named_buffers()), dict(network.named_buffers()), 1e-12)

    with mode(stacked, training=False), torch.no_grad():
        outputs = stacked(images)
    for outputs_BC, network in zip(outputs.unflatten(0, (len(apart), -1)), apart, strict=True):
        with mode(network, training=False), torch.no_grad():
            torch.testing.assert_close(outputs_BC, network(images), rtol=1e-11, atol=1e-11)
    assert_close(dict(networks[0].named_buffers()), dict(apart[0].named_buffers()), 1e-12)


def batch(trial: Trial) -> tuple[Tensor, Tensor]:
    return Resident(trial, NOWHERE, CPU).batch(0)


# --- the loop ------------------------------------------------------------------------------------------

PROBES = {curve: 6 * STEP, gamma: 4 * STEP, gradient: 8 * STEP, parameter_gradient: 4 * STEP}
LOOP: dict[str, dict[str, Any]] = {
    "as it is": {},
    "plateau": {"plateau": 1, "lr": 1.0},
    "warm": {"warmup": 0.3, "momentum": 0.0},
    "beta alone trains": {"trainable": Trainable.BETA, "norm_init": NormInit.ONES_ONES},
}
STEPS = 12


def jobs(store: Path, **more: Any) -> list[Job]:
    fields = SHORT | {"epochs": STEPS // 2, "steps": None} | more
    return [Job(digits(**(fields | own)), PROBES, str(store), str(NOWHERE), None, 0, 1e9) for own in LOOP.values()]


def trained(some: list[Job], until: int | None = None) -> list[Progress]:
    """To the end, or to where they are told to stop."""
    looks = iter(range(10**6))
    *_, last = run(some, Gang(), 1, lambda: until is not None and next(looks) >= until)
    return last


def saved(job: Job) -> dict[str, Tensor]:
    found = checkpoint.newest(Store(job.store).checkpoints(job.trial.id))
    assert found is not None
    return found.tensors


def assert_same_rows(one: Path, other: Path) -> None:
    for table in (probe.__name__ for probe in PROBES):
        asked = f"select * from {table} order by all"
        assert bnscale.open(one).sql(asked).rows == bnscale.open(other).sql(asked).rows, table


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of trials that were trained one by one."""
    store = tmp_path_factory.mktemp("apart")
    for job in jobs(store):
        (last,) = trained([job])
        assert last.outcome is Outcome.FINISHED
    return store


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same trials, trained in one pass."""
    store = tmp_path_factory.mktemp("together")
    assert [each.outcome for each in trained(jobs(store))] == [Outcome.FINISHED] * len(LOOP)
    return store


def test_the_tables_of_a_cohort_are_those_of_its_trials_alone(apart: Path, together: Path) -> None:
    for table in (probe.__name__ for probe in PROBES):
        one, other = (
            bnscale.open(store).sql(f"select * from {table} order by all").rows for store in (apart, together)
        )
        assert len(one) == len(other) > 0
        for row, same in zip(one, other, strict=True):
            for value, its in zip(row, same, strict=True):
                assert value == (pytest.approx(its, rel=1e-5, abs=1e-5) if isinstance(its, float) else its), table


def test_what_is_saved_of_a_member_is_what_is_saved_of_the_trial_alone(apart: Path, together: Path) -> None:
    for one, other in zip(jobs(apart), jobs(together), strict=True):
        assert_close(saved(one), saved(other), 1e-5)


def test_a_member_whose_rate_drops_at_plateaus_hears_its_own_losses(apart: Path, together: Path) -> None:
    heard = []
    for store in (apart, together):
        job = jobs(store)[list(LOOP).index("plateau")]
        found = checkpoint.newest(Store(store).checkpoints(job.trial.id))
        assert found is not None
        heard.append(found.facts["plateau"])
    assert heard[0] == pytest.approx(heard[1], rel=1e-5)
    assert heard[0]["drops"] > 0


def test_every_manifest_says_how_many_trials_shared_the_pass_and_counts_its_share_of_the_time(
    apart: Path, together: Path
) -> None:
    facts = (
        "select cohort, outcome, step, parameters, trainable_parameters, last_finite_loss from trials order by trial"
    )
    one, other = (bnscale.open(store).sql(facts).rows for store in (apart, together))
    assert [row[0] for row in one] == [None] * len(LOOP)
    assert [row[0] for row in other] == [len(LOOP)] * len(LOOP)
    assert [row[1:5] for row in one] == [row[1:5] for row in other]
    assert [row[5] for row in one] == pytest.approx([row[5] for row in other], rel=1e-5)
    spent = "select sum(seconds), max(epoch_us(ended)) - min(epoch_us(started)) from trials"
    ((seconds, microseconds),) = bnscale.open(together).sql(spent).rows
    assert 0 < seconds <= microseconds / 1e6 + 0.01


def test_a_stopped_cohort_goes_on_to_the_same_bits(together: Path, tmp_path: Path) -> None:
    assert [each.outcome for each in trained(jobs(tmp_path), until=5)] == [None] * len(LOOP)
    assert [each.outcome for each in trained(jobs(tmp_path))] == [Outcome.FINISHED] * len(LOOP)
    for one, other in zip(jobs(together), jobs(tmp_path), strict=True):
        assert_close(saved(one), saved(other), 0.0)
    assert_same_rows(together, tmp_path)


def test_a_cohort_killed_without_a_word_goes_on_to_the_same_bits_and_reads_no_row_twice(
    together: Path, tmp_path: Path
) -> None:
    often = [replace(job, save_every=0.0) for job in jobs(tmp_path)]
    training = run(often, Gang(), 1, lambda: False)
    for _ in range(8):
        next(training)  # and never again
    last = trained(jobs(tmp_path))
    assert [each.outcome for each in last] == [Outcome.FINISHED] * len(LOOP)
    for one, other in zip(jobs(together), jobs(tmp_path), strict=True):
        assert_close(saved(one), saved(other), 0.0)
    assert_same_rows(together, tmp_path)


def test_members_go_on_alone_and_trials_that_began_alone_go_on_in_passes_of_those_that_stand_together(
    apart: Path, tmp_path: Path
) -> None:
    first, second, third, fourth = jobs(tmp_path)
    trained([first, second, third], until=4)
    for _ in range(2):
        trained([third], until=3)  # to step 10, so that it has no checkpoint of step 4 any more
    passes = list(run([first, second, third, fourth], Gang(), 1, lambda: False))
    assert [each.step for each in passes[0]] == [4, 4, 10, 0]
    assert [each.outcome for each in passes[-1]] == [Outcome.FINISHED] * 4
    cohorts = [Store(tmp_path).manifest(job.trial.id).facts["cohort"] for job in jobs(tmp_path)]
    assert cohorts == [2, 2, None, None]
    for one, other in zip(jobs(apart), jobs(tmp_path), strict=True):
        assert_close(saved(one), saved(other), 1e-5)


def test_trials_that_share_an_earlier_checkpoint_go_back_to_it_and_read_no_row_twice(
    together: Path, tmp_path: Path
) -> None:
    often = [replace(job, save_every=0.0) for job in jobs(tmp_path)]
    trained(often, until=6)
    trained(often[:1], until=1)  # one has a checkpoint more than the others, and still the one of step 6
    assert [each.step for each in next(run(often, Gang(), 1, lambda: False))] == [6] * len(often)
    trained(jobs(tmp_path))
    assert_same_rows(together, tmp_path)


def test_a_member_that_diverges_leaves_and_the_others_have_the_numbers_that_they_have_without_it(
    together: Path, tmp_path: Path
) -> None:
    wild = Job(
        digits(**(SHORT | {"epochs": STEPS // 2, "steps": None, "lr": 1e30})), PROBES, str(tmp_path), "", None, 0, 1e9
    )
    others = jobs(tmp_path)
    some = [others[0], wild, *others[1:]]
    last = trained(some)
    assert [each.outcome for each in last] == [Outcome.DIVERGED if job is wild else Outcome.FINISHED for job in some]
    assert math.isfinite(last[1].loss)
    trained([Job(wild.trial, PROBES, str(tmp_path / "alone"), "", None, 0, 1e9)])
    mine, its = (Store(store).manifest(wild.trial.id) for store in (tmp_path, tmp_path / "alone"))
    assert (mine.outcome, mine.step, mine.facts["diverged_step"]) == (its.outcome, its.step, its.facts["diverged_step"])
    for one, other in zip(jobs(together), others, strict=True):
        assert_close(saved(one), saved(other), 0.0)


def test_a_checkpoint_of_other_frozen_weights_is_taken_up_by_nobody(tmp_path: Path) -> None:
    trial = digits(steps=2)
    places = [Store(tmp_path).checkpoints(each.id) for each in (trial, digits(steps=2, lr=0.2))]
    engine = CohortEngine(build(trial), [trial, digits(steps=2, lr=0.2)], Gang(), places)
    for member in engine.members:
        member.save(1, {"loss": 0.5})
    again = CohortEngine(build(trial), [trial, digits(steps=2, lr=0.2)], Gang(), places)
    assert [member.restore() for member in again.members] == [(1, {"loss": 0.5})] * 2
    drawn = [digits(steps=2, seed=1), digits(steps=2, seed=1, lr=0.2)]
    assert [m.restore() for m in CohortEngine(build(drawn[0]), drawn, Gang(), places).members] == [(0, {})] * 2


def test_tensors_fetched_in_one_copy_are_themselves() -> None:
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = {"counted": torch.tensor(7), "row": torch.randn(3, 4)[1], "last": last, "steps": torch.arange(3)}
    assert_close(checkpoint.fetch(tensors), tensors, 0.0)
    assert_close(checkpoint.at_hand(tensors), tensors, 0.0)
    assert checkpoint.at_hand(tensors)["last"].is_contiguous()
