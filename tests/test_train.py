"""The loop: nothing plugged in changes what it trains, a stop or a kill changes nothing either, every knob counts."""

import gc
import json
import math
import platform
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import digits

from bnscale.choices import Choice
from bnscale.data import Resident
from bnscale.engine import Alone, Gang, checkpoint
from bnscale.engine.local import LocalEngine
from bnscale.networks import build, trained
from bnscale.probes import (
    END,
    EPOCH,
    START,
    STEP,
    Cadence,
    Probe,
    Timing,
    activation_histogram,
    activations,
    at_layers,
    at_multiples,
    batch_curve,
    channel_moments,
    clamp,
    class_bias,
    covariate_shift,
    curve,
    demand,
    descent,
    gamma,
    gamma_histogram,
    gamma_scaling,
    gradient,
    gradient_bound,
    gradient_histogram,
    gradient_matrix,
    gradient_noise,
    landscape,
    looking,
    loss_along_gradient,
    loss_along_mean_gradient,
    mean_gradient,
    moment_change,
    moments_along_gradient,
    norm_gradient,
    only,
    parameter_gradient,
    sparsity,
    timing,
    weight_scaling,
)
from bnscale.storage import storage
from bnscale.store import Store
from bnscale.train import Course, Job, fail, initialised, readings, train
from bnscale.train import run as work
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
    Placement,
    Precision,
    Trainable,
    Trial,
    WeightInit,
)

FAMILIES = [
    (Network.VGG, 11, 1),
    (Network.VGG_RESIDUAL, 8, 1),
    (Network.IMAGENET_RESNET, 18, 4),
    (Network.LINEAR, 3, 8),
]

NOWHERE = Path("/nonexistent")
EVERYTHING: dict[Probe, Cadence] = {
    curve: 3 * STEP,
    gamma: STEP,
    gamma_histogram: EPOCH,
    clamp: END,
    sparsity: 2 * STEP,
    # These are dear, and if they moved anything, it would show from the first update on.
    channel_moments: START,
    gradient: START,
    at_layers(gradient_histogram, 3): START,
    at_layers(gradient_matrix, 1, 3): START,
    class_bias: 5 * STEP,
    loss_along_gradient: START,
    at_layers(moments_along_gradient, 1, 3): START,
    parameter_gradient: 5 * STEP,
    mean_gradient: 5 * STEP,
    gradient_noise: START,
    loss_along_mean_gradient: START,
    batch_curve: 2 * STEP,
    at_multiples(landscape, 0.5, 4): 5 * STEP,
    at_layers(covariate_shift, 1, 3): 5 * STEP,
    at_layers(moment_change, 1, 3): 5 * STEP,
    at_layers(activations, 1, 3): START,
    at_layers(activation_histogram, 1, 3): START,
    only(gradient_bound, norm=[Norm.BATCH]): 5 * STEP,
    timing: START,
    norm_gradient: START,
    at_multiples(descent, 1, 100): 5 * STEP,
    weight_scaling: START,
    gamma_scaling: START,
}


def everything(trial: Trial) -> dict[Probe, Cadence]:
    """All probes but those that the trial cannot serve."""
    return {
        probe: cadence for probe, cadence in looking(EVERYTHING, trial).items() if demand(probe).lacks(trial) is None
    }


def written(notebook: "Notebook") -> list[str]:
    """Its rows, sorted, less what a clock said: seconds are never the same twice."""
    rows = [(t, replace(row, seconds=0.0) if isinstance(row, Timing) else row) for t, row in notebook.kept]
    return sorted(map(repr, rows))


class Notebook:
    """Keeps rows in memory by the store's rules: what was not flushed before a rewind is gone."""

    reached = None

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any]] = []
        self.loose: list[tuple[str, Any]] = []
        self.ending: tuple[Outcome, int, dict[str, Any]] | None = None

    def write(self, table: str, rows: list[Any]) -> None:
        self.loose += [(table, row) for row in rows]

    def flush(self, step: int) -> None:
        assert all(row.step < step for _, row in self.loose), "rows of the step itself would be there twice"
        self.kept, self.loose = self.kept + self.loose, []

    def rewind(self, step: int) -> None:
        self.kept, self.loose = [(t, r) for t, r in self.kept if r.step < step], []

    def finish(self, outcome: Outcome, step: int, facts: dict[str, Any]) -> None:
        self.kept, self.loose = self.kept + self.loose, []
        self.ending = (outcome, step, facts)


def run(
    trial: Trial,
    folder: Path,
    notebook: Notebook | None = None,
    probes: dict[Probe, Cadence] | None = None,
    stop: Callable[[], bool] = lambda: False,
    save_every: float = 30.0,
) -> dict[str, torch.Tensor]:
    """Train in a fresh network and engine, as a new process would; the final state."""
    data = Resident(trial, NOWHERE, torch.device("cpu"))
    network = initialised(trial, data)
    engine = LocalEngine(network, trial, Gang(), storage(folder))
    course = Course(trial, notebook or Notebook(), probes or {})
    for _ in train([course], Alone(engine), data, save_every, stop):
        pass
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def stop_after(steps: int) -> Callable[[], bool]:
    """True at the look after so many steps. On a CPU there is a look at every step, the first one before step 1."""
    looks = iter([False] * steps + [True] * 100)
    return lambda: next(looks)


@pytest.mark.parametrize("trainable", [Trainable.BN, Trainable.ALL])
@pytest.mark.parametrize("precision", list(Precision))
def test_training_with_every_probe_and_with_none_is_equal_to_the_last_bit(trainable, precision, tmp_path):
    # Plain descent, which some probes need; with momentum and decay the others look below.
    trial = digits(trainable=trainable, precision=precision, momentum=0.0, weight_decay=0.0)
    notebook = Notebook()
    looked = run(trial, tmp_path / "a", notebook, everything(trial))
    fine = {"gradient_bound", "norm_gradient", "descent", "weight_scaling"}
    refused = fine if precision is Precision.BF16 else set()  # its rounding would be all that is seen
    assert {table for table, _ in notebook.kept} == {probe.__name__ for probe in EVERYTHING} - refused
    assert_equal(looked, run(trial, tmp_path / "b"))


@pytest.mark.parametrize("trainable", list(Trainable))
def test_training_leaves_every_frozen_tensor_at_its_initialisation_and_moves_every_other(trainable, tmp_path):
    trial = digits(trainable=trainable)
    before = build(trial)
    moving = set(trained(before))
    after = run(trial, tmp_path)
    for name, value in before.named_parameters():
        assert torch.equal(value, after[name]) == (name not in moving), name
    assert not torch.equal(after["norm.running_mean"], before.norm.running_mean)


def test_what_is_read_of_momentum_does_not_hang_on_where_a_trial_was_stopped_not_even_after_its_last_update(tmp_path):
    trial, probes = digits(trainable=Trainable.ALL, steps=2), {parameter_gradient: STEP}
    whole, parts = Notebook(), Notebook()
    run(trial, tmp_path / "whole", whole, probes)
    for _ in range(2):
        run(trial, tmp_path / "parts", parts, probes, stop_after(1))
    run(trial, tmp_path / "parts", parts, probes)
    assert parts.ending[:2] == (Outcome.FINISHED, 2)
    assert sorted(map(repr, parts.kept)) == sorted(map(repr, whole.kept))
    assert {row.step for _, row in whole.kept if row.last_update is not None} == {1}


@pytest.mark.parametrize("trainable", [Trainable.BN, Trainable.ALL, Trainable.TWO_PER_CHANNEL, Trainable.NONE])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_stopped_trial_resumes_to_the_last_bit_and_reads_every_row_once(trainable, at, tmp_path):
    trial = digits(trainable=trainable)
    whole, parts = Notebook(), Notebook()
    expected = run(trial, tmp_path / "whole", whole, everything(trial))
    run(trial, tmp_path / "parts", parts, everything(trial), stop_after(at))
    assert parts.ending is None
    resumed = run(trial, tmp_path / "parts", parts, everything(trial))
    assert_equal(expected, resumed)
    assert written(parts) == written(whole)
    assert parts.ending[:2] == whole.ending[:2] == (Outcome.FINISHED, 10)


def test_a_trial_killed_without_a_word_resumes_from_its_last_checkpoint(tmp_path):
    trial = digits()
    expected, killed = run(trial, tmp_path / "whole"), Notebook()
    engine = LocalEngine(build(trial), trial, Gang(), storage(tmp_path / "killed"))
    course = Course(trial, killed, everything(trial))
    data = Resident(trial, NOWHERE, torch.device("cpu"))
    training = train([course], Alone(engine), data, 0.0, lambda: False)
    for _ in range(6):
        next(training)  # and never again
    assert [f.name for f in sorted((tmp_path / "killed").glob("*.json"))] == ["step-4.json", "step-5.json"]
    whole = Notebook()
    run(trial, tmp_path / "rows", whole, everything(trial))
    assert_equal(expected, run(trial, tmp_path / "killed", killed, everything(trial)))
    assert written(killed) == written(whole)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    trial, notebook = digits(), Notebook()
    run(trial, tmp_path, notebook, everything(trial), stop_after(6), save_every=0.0)
    file = tmp_path / "step-6.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checkpoint.newest(storage(tmp_path)).step == 5
    assert_equal(run(trial, tmp_path, notebook, everything(trial)), run(trial, tmp_path / "whole"))


def test_a_checkpoint_whose_frozen_weights_the_seed_no_longer_gives_is_not_continued(tmp_path):
    trial = digits()
    run(trial, tmp_path, stop=stop_after(4))
    file = tmp_path / "step-4.json"
    about = json.loads(file.read_text())
    del about["sum"]  # as checkpoints were once; with one, this change would be damage
    about["facts"]["frozen"] = "another torch's"
    file.write_text(json.dumps(about))
    assert_equal(run(trial, tmp_path), run(trial, tmp_path / "whole"))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoint.write(storage(tmp_path), 1, {"a": torch.ones(3)}, {})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.write(storage(tmp_path), 2, {"a": torch.zeros(3)}, {})
    assert checkpoint.newest(storage(tmp_path)).step == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_finished_trial_keeps_one_checkpoint_without_momentum_or_frozen_weights(tmp_path):
    trial = digits()
    final = run(trial, tmp_path)
    step, tensors, _ = checkpoint.newest(storage(tmp_path))
    assert step == 10
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["step-10.safetensors"]
    moving = set(trained(build(trial))) | {n for n, _ in build(trial).named_buffers()}
    assert {name.removeprefix("network.") for name in tensors} == moving
    assert all(torch.equal(value, final[name.removeprefix("network.")]) for name, value in tensors.items())


def test_a_loss_that_leaves_the_numbers_ends_the_trial_as_diverged_with_its_step(tmp_path):
    trial = digits(lr=1e30, trainable=Trainable.ALL, momentum=0.0)
    notebook = Notebook()
    run(trial, tmp_path, notebook, {curve: STEP})
    outcome, step, facts = notebook.ending
    assert outcome is Outcome.DIVERGED
    assert 1 <= facts["diverged_step"] < step <= 10
    assert math.isfinite(facts["last_finite_loss"])
    assert all(math.isfinite(row.loss) for _, row in notebook.kept if row.step == 0)
    assert max(row.step for _, row in notebook.kept) <= facts["diverged_step"]


def test_the_scheduler_is_shown_validation_accuracy_and_test_accuracy_only_where_nothing_is_held_out(tmp_path):
    for validation, split in [(100, "validation"), (0, "test")]:
        trial, notebook = digits(validation=validation), Notebook()
        engine = LocalEngine(build(trial), trial, Gang(), storage(tmp_path / str(validation)))
        data = Resident(trial, NOWHERE, torch.device("cpu"))
        course = Course(trial, notebook, {curve: END})
        (last,) = list(train([course], Alone(engine), data, 30.0, lambda: False))[-1]
        assert last.accuracy == next(row.accuracy for _, row in notebook.kept if row.split == split)


RENORM = {
    "norm": Norm.RENORM,
    "renorm_r": 3.0,
    "renorm_d": 5.0,
    "renorm_start": 0.0,
    "renorm_r_end": 0.5,
    "renorm_d_end": 0.5,
}

KNOBS: list[dict[str, Any]] = [
    *({"network": each, "depth": depth, "width": width} for each, depth, width in FAMILIES),
    *({"weight_init": each} for each in WeightInit if each is not WeightInit.HE_NORMAL),
    *({"output_bias": each} for each in OutputBias if each is not OutputBias.RANDOM),
    *({"norm": each} for each in Norm if each.over_images and each not in (Norm.BATCH, Norm.RENORM)),
    {"norm": Norm.LAYER},
    {"norm": Norm.INSTANCE},
    {"norm": Norm.GROUP, "groups": 4},
    {"norm": Norm.NONE, "trainable": Trainable.ALL},
    {"norm": Norm.NOISE, "trainable": Trainable.ALL},
    RENORM,
    *({"placement": each} for each in Placement if each not in (Placement.EVERY, Placement.EVERY_10, Placement.NONE)),
    *({"affine": each} for each in Affine if each is not Affine.BOTH),
    *({"affine_at": each} for each in (Placement.FIRST, Placement.EVERY_2, Placement.BRANCH)),
    {"norm_init": NormInit.NORMAL},
    {"steps": None, "epochs": 12, "plateau": 1, "validation": 1405, "lr": 1.0, "milestones": ()},
    {"decay_on": DecayOn.WEIGHTS},
    {"norm_decay": 0.1},
    {"gamma_l1": 0.1},
    {"gamma_l2": 0.1},
    {"beta_l1": 0.1},
    {"beta_l2": 0.1},
    {"validation": 200},
    {"augmentation": Augmentation.NONE},
    {"augmentation": Augmentation.SHIFT},
    {"label_noise": 0.5},
    {"depth": 14},
    {"width": 2},
    {"norm_init": NormInit.ONES},
    {"norm_init": NormInit.ONES_ONES},
    {"norm_init": NormInit.SYMMETRIC},
    *({"trainable": each} for each in Trainable if each is not Trainable.BN),
    {"batch": 32, "norm_batch": 16},
    {"norm_batch": 8},
    {"steps": 9},
    {"epochs": 1, "steps": None, "validation": 1277},
    {"lr": 0.05},
    {"milestones": ()},
    {"lr_drop": 0.5},
    {"warmup": 0.5},
    {"momentum": 0.5},
    {"weight_decay": 0.1},
    {"precision": Precision.BF16},
    {"seed": 1},
]


@pytest.mark.parametrize("change", KNOBS, ids=str)
def test_every_knob_has_an_effect_on_what_is_trained(change, tmp_path):
    # Beside the trial that it turns away from: the same but for the knob, and for what makes the knob have a meaning.
    without = {"plateau": None} if "plateau" in change else {"trainable": change.get("trainable", Trainable.BN)}
    base = change | without if "plateau" in change else without if "norm" in change else {}
    plain, turned = run(digits(**base), tmp_path / "plain"), run(digits(**change), tmp_path / "turned")
    shared = [n for n in plain if n in turned and plain[n].shape == turned[n].shape and plain[n].is_floating_point()]
    assert plain.keys() != turned.keys() or any(not torch.equal(plain[n], turned[n]) for n in shared)
    assert not ({"depth", "placement", "affine", "affine_at"} & change.keys()) or plain.keys() != turned.keys()


def test_every_field_but_the_data_has_a_knob_above():
    # The data set itself is test_data's; the bounds of batch renormalization are test_norm_kinds'.
    assert {name for change in KNOBS for name in change} == set(Trial.model_fields) - {"data", "pixels"}


def test_every_choice_has_a_knob_above_and_a_line_in_the_catalogue():
    turned = {value for change in KNOBS for value in change.values() if isinstance(value, Choice)}
    for kind in (Network, Norm, Placement, Affine, Trainable, NormInit, WeightInit, OutputBias, DecayOn, Augmentation):
        at_rest = {getattr(digits(), name) for name in Trial.model_fields if isinstance(getattr(digits(), name), kind)}
        # Nowhere is the same as no norm; with eight layers there is no tenth.
        assert set(kind) - turned - at_rest <= {Placement.EVERY_10, Placement.NONE}, kind
        assert all(len(member.about) > 3 for member in kind)


# --- what other networks, norms and schedules bring ---------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "noise": {"norm": Norm.NOISY, "trainable": Trainable.ALL},
    "batch renormalization": RENORM,
    "l_inf": {"norm": Norm.LINF},
    "no norm, even classes, frozen": {
        "norm": Norm.NONE, "trainable": Trainable.WEIGHTS, "output_bias": OutputBias.EVEN, "lr": 0.001,
    },
    "even classes that do not train": {"output_bias": OutputBias.EVEN},
    "noise in plain descent": {
        "norm": Norm.NOISY, "network": Network.VGG, "depth": 11, "trainable": Trainable.ALL, "momentum": 0.0,
        "weight_decay": 0.0,
    },
    "VGG": {"network": Network.VGG, "depth": 11, "norm": Norm.GROUP, "groups": 4, "trainable": Trainable.ALL},
    "residual VGG": {"network": Network.VGG_RESIDUAL, "depth": 14, "placement": Placement.EVERY_2},
    "gamma alone, at some layers": {"affine": Affine.GAMMA, "affine_at": Placement.BRANCH},
    "penalties": {"gamma_l1": 0.01, "beta_l2": 0.01, "norm_decay": 0.0, "trainable": Trainable.ALL},
    "plateau": {"steps": None, "epochs": 5, "plateau": 1, "validation": 1405, "lr": 1.0, "milestones": ()},
    "linear teacher": {
        "data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "network": Network.LINEAR, "depth": 5,
        "width": 10, "batch": 900, "norm_batch": 900, "lr": 1e-6, "trainable": Trainable.ALL, "momentum": 0.0,
    },
    "torchvision's": {
        "network": Network.IMAGENET_RESNET, "depth": 18, "width": 4, "trainable": Trainable.OUTPUT, "steps": 2,
    },
}  # fmt: skip


# Seconds a reading in a network of eleven million weights, and of norms like those of the others.
SPARED = {Network.IMAGENET_RESNET: (gradient_bound, norm_gradient, weight_scaling, gamma_scaling)}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_it_resumes_to_the_last_bit_reads_every_row_once_and_is_not_changed_by_looking(fields, tmp_path):
    trial, whole, parts = digits(**fields), Notebook(), Notebook()
    probes = {
        probe: cadence for probe, cadence in everything(trial).items() if probe not in SPARED.get(trial.network, ())
    }
    expected = run(trial, tmp_path / "whole", whole, probes)
    run(trial, tmp_path / "parts", parts, probes, stop_after(min(5, trial.total_steps // 2)))
    assert parts.ending is None
    assert_equal(expected, run(trial, tmp_path / "parts", parts, probes))
    assert written(parts) == written(whole)
    assert whole.ending[0] is Outcome.FINISHED
    assert_equal(expected, run(trial, tmp_path / "unseen"))
    before = initialised(trial, Resident(trial, NOWHERE, torch.device("cpu")))
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, expected[name]) == (not parameter.requires_grad), name


# --- a training that fails before it begins ------------------------------------------------------------


def test_a_result_keeps_its_rows_and_its_outcome_where_the_training_of_what_it_lacks_fails_before_it_begins(tmp_path):
    trial = digits(steps=4)
    job = Job(trial, {curve: STEP}, str(tmp_path), str(tmp_path), None, 0, 1e9)
    list(work([job], Gang(), 1, lambda: False))
    store = Store(tmp_path)
    before = store.manifest(trial.id)
    more = replace(job, probes={curve: STEP, gamma: END})
    fail(more, "RuntimeError: out of luck", "code")
    failed = store.manifest(trial.id)
    assert failed.facts["error"] == "RuntimeError: out of luck"
    assert failed.model_copy(update={"facts": before.facts}) == before
    assert not failed.covers(readings(more.probes))
    list(work([more], Gang(), 1, lambda: False))
    after = store.manifest(trial.id)
    assert (after.outcome, after.facts.get("error")) == (Outcome.FINISHED, None)
    assert sum(part.rows for part in after.parts["curve"]) == sum(part.rows for part in before.parts["curve"])


def test_an_interrupted_trial_that_fails_before_it_reads_something_else_begins_anew(tmp_path):
    trial = digits(steps=4)
    job = Job(trial, {curve: STEP}, str(tmp_path), str(tmp_path), None, 0, 0.0)
    looks = iter([False] * 3 + [True] * 9)
    list(work([job], Gang(), 1, lambda: next(looks)))
    more = replace(job, probes={curve: STEP, gamma: END})
    fail(more, "RuntimeError: out of luck", "code")
    store = Store(tmp_path)
    assert store.manifest(trial.id).step == 0
    assert store.checkpoints(trial.id).list("") == []
    list(work([more], Gang(), 1, lambda: False))
    manifest = store.manifest(trial.id)
    assert manifest.outcome is Outcome.FINISHED
    assert {part.first_step for part in manifest.parts["curve"]} == {0}
    assert sum(part.rows for part in manifest.parts["curve"]) == 3 * 5  # train, validation and test


def test_a_trial_alone_on_a_cpu_leaves_no_tensor_to_be_found_by_a_search_for_garbage(tmp_path):
    def left(seed: int) -> int:
        job = Job(digits(seed=seed, steps=2), {curve: END}, str(tmp_path), str(NOWHERE), None, 0, 30.0)
        for _ in work([job], Gang(), 1, lambda: False):
            pass
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        assert left(seed=1) == left(seed=2) == left(seed=3)
    finally:
        gc.enable()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only of glibc is memory asked back")
def test_the_memory_of_a_pass_stays_for_the_next_if_that_is_like_it_and_is_handed_back_before_any_other(tmp_path):
    def faults(seed: int, **fields: Any) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        job = Job(digits(seed=seed, steps=2, **fields), {curve: END}, str(tmp_path), str(NOWHERE), None, 0, 30.0)
        for _ in work([job], Gang(), 1, lambda: False):
            pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    for seed in range(3):
        faults(seed)
    alike = faults(seed=3, lr=0.01)
    faults(seed=4, momentum=0.8)
    assert alike < faults(seed=5) / 4
