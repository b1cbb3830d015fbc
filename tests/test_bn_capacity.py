"""The numbers of the capacity study: from rows whose answers a hand computes, and from networks really trained."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bnscale import query, report
from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.probes import STEP, TABLES, Curve, curve
from bnscale.report import Verdict
from bnscale.store import Store
from bnscale.study.plan import plan, relate, settings
from bnscale.train import Job, run
from bnscale.trial import Affine, Data, Outcome, Pixels, Trainable

FOLDER = Path(__file__).parents[1] / "studies"
NOWHERE = Path("/nonexistent")
CPU = torch.device("cpu")
QUERIES = report.queries((FOLDER / "bn_capacity.sql").read_text())
T95 = 4.3026527  # Student's t for three readings, 97.5 %


def declared():
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("bn_capacity").study


def planned(preset, *sets):
    asked = declared().preset(preset)
    for axis, values in settings(sets).items():
        asked = asked.setting(axis, values)
    return plan(asked, lambda data: Pixels.ORIGINAL)


def keep(store, trial, train, test, held_out=0.5, *, parameters=1000, outcome=Outcome.FINISHED):
    """A trial whose curve is at chance before, better than at its end in the middle, and ends with these accuracies."""
    writer = store.writer(trial, {"curve": "2 epochs"}, {"trainable_parameters": parameters})
    for step, of in [(0, {}), (trial.total_steps // 2, {"train": 1.0, "test": 1.0}), (trial.total_steps, None)]:
        ends = {"train": train, "test": test, "validation": held_out} if of is None else of
        rows = [
            Curve(step, 0.0, split, 360, 1.0, ends.get(split, 0.1), 1.0) for split in ("train", "test", "validation")
        ]
        writer.write("curve", rows)
    writer.finish(outcome, trial.total_steps, {})


def session_of(folder, every, reached):
    """SQL where `reached` says of each trial what it came to: the arguments of `keep`, or None where it was not run."""
    store = Store(folder)
    for each in every:
        result = reached(each.trial)
        if result is not None:
            keep(store, each.trial, **result)
    session = query.open(folder, TABLES)
    relate(session, every)
    return session


def ask(session, name, *by):
    rows = session.sql(QUERIES[name].sql).dicts()
    if not by:
        return rows
    found = {tuple(row[each] for each in by) if len(by) > 1 else row[by[0]]: row for row in rows}
    assert len(found) == len(rows)
    return found


def verdicts(session):
    judged = [report.judge(claim, session, QUERIES) for claim in declared().claims]
    return {(each.claim.query, *each.claim.row.values()): each.verdict for each in judged}


# --- what is declared -----------------------------------------------------------------------------


def test_the_paper_preset_is_the_protocol_of_the_report_on_its_data_and_depths():
    every = [each.trial for each in planned("paper")]
    assert len(every) == 1782
    assert {t.data for t in every} == {Data.MNIST, Data.CIFAR10, Data.CIFAR100}
    assert {t.depth for t in every} == {50, 152, 200}
    protocol = {
        (t.epochs, t.batch, t.momentum, t.weight_decay, t.milestones, t.lr_drop, str(t.decay_on), str(t.weight_init))
        for t in every
    }
    assert protocol == {(160, 128, 0.9, 1e-4, (0.5, 0.75), 0.1, "all", "he_normal")}
    assert {t.lr for t in every if t.label_noise == 0} == {0.03, 0.1, 0.3}
    random = [t for t in every if t.label_noise]
    assert {(t.lr, str(t.augmentation), str(t.norm_init)) for t in random} == {(0.1, "none", "uniform")}
    assert {str(t.augmentation) for t in every if t.lr != 0.1} == {"flip_shift"}


def test_a_data_set_can_be_asked_for_alone_or_in_place_of_another():
    for data in ("cifar100", "fashion_mnist"):
        every = planned("paper", f"data={data}", "depth=50")
        assert {str(each.trial.data) for each in every} == {data}
        assert len(every) == 1782 / 9


# --- the gap --------------------------------------------------------------------------------------


def test_the_gap_is_training_less_test_accuracy_of_one_network_at_its_last_step(tmp_path):
    every = planned("laptop", "depth=8", "label_noise=0", "trainable=bn")

    def reached(trial):
        return {"train": 0.9 + trial.seed / 100, "test": 0.8}

    (row,) = ask(session_of(tmp_path, every, reached), "gap_by_depth")
    assert (row["n"], row["depth"], row["kind"]) == (3, 8, "bn")
    assert row["gap"] == pytest.approx(0.11)
    assert row["points"] == pytest.approx(11)
    assert row["high"] - row["points"] == pytest.approx(100 * T95 * 0.01 / math.sqrt(3))
    assert row["image_error"] == pytest.approx(math.sqrt((0.91 * 0.09 + 0.8 * 0.2) / 360))


def test_the_gap_of_a_trained_network_is_what_counting_its_answers_gives(tmp_path):
    every = planned("laptop", "depth=8", "label_noise=0", "trainable=bn", "seed=0", "epochs=none", "steps=40")
    (trial,) = (each.trial for each in every)
    job = Job(trial, {curve: 5 * STEP}, str(tmp_path), str(NOWHERE), None, 0, 60.0)
    for _ in run([job], Gang(), 1, lambda: False):
        pass
    session = query.open(tmp_path, TABLES)
    relate(session, every)
    (row,) = ask(session, "gap_by_depth")
    engine, data = LocalEngine(build(trial), trial, Gang(), None), Resident(trial, NOWHERE, CPU)
    for step in range(40):
        engine.backward(engine(*data.batch(step)))
        engine.step(trial.rate(step))
    engine.module.eval()
    right = {}
    for part in ("train", "test"):
        images, labels = next(data.batches(part, 360))
        with torch.no_grad():
            right[part] = float((engine.module(images).argmax(1) == labels).double().mean())
    assert row["gap"] == pytest.approx(right["train"] - right["test"], abs=1e-9)
    assert right["train"] > 0.3


def test_a_trial_that_diverged_or_has_no_number_at_its_end_is_in_no_mean(tmp_path):
    every = planned("laptop", "depth=8", "label_noise=0", "trainable=bn")
    ends = [
        {"train": 0.9, "test": 0.8},
        {"train": math.nan, "test": math.nan},
        {"train": 1.0, "test": 0.1, "outcome": Outcome.DIVERGED},
    ]
    (row,) = ask(session_of(tmp_path, every, lambda trial: ends[trial.seed]), "gap_by_depth")
    assert (row["n"], row["gap"]) == (1, pytest.approx(0.1))


def test_settings_that_the_study_does_not_name_are_never_taken_for_seeds(tmp_path):
    every = planned("laptop", "depth=8", "width=1,2")
    session = session_of(tmp_path, every, lambda trial: {"train": 0.9, "test": 0.8})
    assert ask(session, "gap_by_depth") == []
    assert {row["change"] for row in ask(session, "ends")} == {"width=1", "width=2"}
    assert set(verdicts(session).values()) == {Verdict.NOT_ENOUGH_DATA}


# --- changes of batch norm ------------------------------------------------------------------------


def test_what_a_change_adds_is_taken_seed_by_seed_and_every_change_has_its_name(tmp_path):
    every = planned("laptop", "label_noise=0", "trainable=bn,gamma,beta") + planned("laptop", "depth=14")

    def reached(trial):
        more = trial.gamma_l1 > 0
        return {"train": 0.9 + trial.seed / 10, "test": 0.8 + trial.seed / 10 + (0.02 + trial.seed / 1000) * more}

    every = list({each.trial.id: each for each in every}.values())
    rows = ask(session_of(tmp_path, every, reached), "changes", "change")
    assert set(rows) == {
        "plain", "gamma_l1 0.001", "gamma_l2 0.001", "beta_l1 0.001", "beta_l2 0.001",
        "start ones", "start ones_ones", "start symmetric", "start normal",
        "affine at every_2", "affine at stage_ends", "no gamma", "only gamma trains", "only beta trains",
    }  # fmt: skip
    changed = rows["gamma_l1 0.001"]
    assert changed["test_gain"] == pytest.approx(0.021)
    assert changed["gap_gain"] == pytest.approx(-0.021)
    assert changed["test_gain_high"] - 0.021 == pytest.approx(T95 * 0.001 / math.sqrt(3))  # seeds differ by 100 times
    assert rows["plain"]["test_gain"] == 0


def test_a_penaltys_strength_and_the_best_change_are_chosen_on_held_out_images_alone(tmp_path):
    every = planned("laptop", "gamma_l1=0,0.001,0.01", "depth=14")

    def reached(trial):
        held_out, test = {0.0: (0.8, 0.8), 0.001: (0.9, 0.70), 0.01: (0.85, 0.99)}[trial.gamma_l1]
        return {"train": 0.99, "test": test, "held_out": held_out}

    session = session_of(tmp_path, every, reached)
    (row,) = ask(session, "penalties")
    assert (row["strength"], row["gap_gain"]) == (0.001, pytest.approx(0.1))
    (best,) = ask(session, "best_change")
    assert (best["change"], best["test_gain"]) == ("gamma_l1 0.001", pytest.approx(-0.1))
    of_images = math.sqrt((0.7 * 0.3 + 0.8 * 0.2) / 360)  # no two seeds differ
    assert best["measured"] == pytest.approx(-0.1 / of_images)
    assert row["measured"] == pytest.approx(0.1 / math.sqrt(of_images**2 + 2 * 0.99 * 0.01 / 360))


def test_a_change_that_diverged_at_a_depth_is_not_held_against_means_over_all_depths(tmp_path):
    """Gaps grow with depth; this penalty leaves them as they are, and only diverges in the deepest network."""
    every = planned("paper", "data=cifar10", "depth=50,200", "trainable=bn,gamma,beta", "lr=0.1")

    def reached(trial):
        if trial.label_noise or trial.norm_init != "uniform" or trial.gamma_l1 == 1e-4 or trial.gamma_l2:
            return None
        lost = (trial.gamma_l1 and trial.depth == 200) or (trial.trainable is Trainable.BETA and trial.depth == 50)
        ends = {"train": 0.9, "test": 0.9 - trial.depth / 1000}
        return ends | {"outcome": Outcome.DIVERGED} if lost else ends

    session = session_of(tmp_path, every, reached)
    rows = ask(session, "gap_by_change", "change")
    assert rows["plain"]["points"] == pytest.approx(12.5)
    assert "gamma_l1 0.001" not in rows
    assert "only beta trains" not in rows
    assert rows["only gamma trains"]["n"] == 3
    assert [row["n"] for row in ask(session, "gamma_over_beta")] == [0]


def test_where_beta_starts_at_zero_gamma_trained_alone_is_the_network_without_beta():
    (trial,) = (each.trial for each in planned("laptop", "depth=8", "label_noise=0", "trainable=bn", "seed=0"))
    answers = []
    for change in ({"trainable": Trainable.GAMMA}, {"affine": Affine.GAMMA}):
        changed = type(trial)(**(trial.model_dump() | change))
        engine, data = LocalEngine(build(changed), changed, Gang(), None), Resident(changed, NOWHERE, CPU)
        for step in range(3):
            engine.backward(engine(*data.batch(step)))
            engine.step(trial.rate(step))
        answers.append(engine.module(data.batch(3)[0]))
    assert torch.equal(*answers)


def test_a_change_is_held_against_the_plain_network_at_its_own_depths(tmp_path):
    every = planned("laptop")

    def reached(trial):
        return {"train": 0.9, "test": 0.9 - trial.depth / 100} if not trial.label_noise else None

    for row in ask(session_of(tmp_path, every, reached), "gap_by_change"):
        assert row["points"] == pytest.approx(14), row["change"]


# --- random labels --------------------------------------------------------------------------------


def test_who_knows_the_true_labels_and_nothing_else_has_memorised_none(tmp_path):
    """Whatever share of the labels is random: training images' noisy labels are guessed as well as unseen ones'."""
    every = planned("laptop", "depth=8", "trainable=all", "seed=0,1,2,3,4,5")

    def reached(trial):
        noisy = Resident(trial, NOWHERE, CPU)._loaded.train.labels_N
        true = Resident(trial.model_copy(update={"label_noise": 0.0}), NOWHERE, CPU)._loaded.train.labels_N
        return {"train": float((noisy == true).double().mean()), "test": 1.0}

    for row in ask(session_of(tmp_path, every, reached), "memorised"):
        assert row["beyond"] == pytest.approx(0, abs=4 * math.sqrt(0.25 / 1437))
        assert row["labels"] == pytest.approx((240 if row["label_noise"] else 1200) * row["beyond"])


def test_labels_memorised_are_those_right_beyond_what_unseen_images_would_give(tmp_path):
    every = planned("laptop", "depth=8", "trainable=bn")
    ends = {0.0: (0.95, 0.9), 0.5: (0.7, 0.8), 1.0: (0.6, 0.12)}

    def reached(trial):
        train, test = ends[trial.label_noise]
        return {"train": train, "test": test, "parameters": 500}

    rows = ask(session_of(tmp_path, every, reached), "memorised_by_depth", "label_noise")
    assert rows[0.0]["labels"] == pytest.approx(1200 * 0.05)  # the gap
    assert rows[0.5]["labels"] == pytest.approx(240 * (0.7 - (0.5 * 0.1 + 0.5 * 0.8)))
    assert rows[1.0]["labels"] == pytest.approx(240 * (0.6 - 0.1))  # above chance, whatever test images gave
    assert rows[1.0]["per_parameter"] == pytest.approx(240 * 0.5 / 500)


def test_chance_is_one_in_a_hundred_on_cifar100(tmp_path):
    every = planned("paper", "data=cifar100", "depth=50", "trainable=bn", "label_noise=1")
    rows = ask(session_of(tmp_path, every, lambda trial: {"train": 0.31, "test": 0.01}), "memorised_by_depth")
    assert [(row["depth"], row["labels"]) for row in rows] == [(50, pytest.approx(45_000 * 0.3))]


def test_true_labels_are_shown_beside_random_ones_at_the_rate_of_these_and_several_rates_are_not_chosen_among(tmp_path):
    narrow = ("data=cifar10", "depth=50", "trainable=bn")

    def reached(trial):
        plain = trial.norm_init == "uniform"
        return (
            {"train": 0.9 if trial.lr == 0.1 else 0.8, "test": 0.6, "held_out": 0.1 if trial.lr == 0.1 else 0.9}
            if plain
            else None
        )

    session = session_of(tmp_path / "one", planned("paper", *narrow), reached)
    shown = ask(session, "memorised_by_depth", "label_noise")
    assert shown[0.0]["beyond"] == pytest.approx(0.3)  # at 0.1, though another rate is better
    assert ask(session, "gap_by_depth")[0]["gap"] == pytest.approx(0.2)  # chosen, and augmented
    several = session_of(tmp_path / "two", planned("paper", *narrow, "lr=0.1,0.3"), reached)
    assert ask(several, "memorised_by_depth") == []


def test_the_loss_of_a_random_label_trial_is_of_the_labels_drawn_for_it():
    losses = []
    every = planned("laptop", "depth=8", "trainable=all", "label_noise=0,1", "validation=237", "seed=0")
    for trial in (each.trial for each in every):
        engine, data = LocalEngine(build(trial), trial, Gang(), None), Resident(trial, NOWHERE, CPU)
        images, labels = data.batch(0)
        value = engine(images, labels).item()
        assert value == pytest.approx(F.cross_entropy(build(trial)(images), labels).item(), rel=1e-4)
        losses.append((images, labels, value))
    (images, true, low), (others, random, high) = losses
    assert torch.equal(images, others)  # one seed: the same images in the same order, from the same weights
    assert float((true == random).double().mean()) < 0.4
    assert low != high


# --- verdicts -------------------------------------------------------------------------------------


def as_predicted(trial):
    """A world in which everything that the study foresees is so."""
    deep = {8: 0.0, 14: 0.1, 26: 0.2}[trial.depth]
    if trial.label_noise == 1:
        whole = trial.trainable is Trainable.ALL
        return {"train": 0.97 if whole else 0.3 + deep, "test": 0.1}
    if trial.trainable is Trainable.ALL:
        return {"train": 1.0, "test": 0.5}
    if trial.trainable is Trainable.BETA:
        return {"train": 0.5, "test": 0.4}
    held = trial.gamma_l1 + trial.gamma_l2 + trial.beta_l1 + trial.beta_l2 > 0
    return {"train": 0.7 + 1.4 * deep, "test": 0.6 + deep / 2 + 0.2 * held, "held_out": 0.6 + 0.1 * held}


def as_refuted(trial):
    """A world in which nothing of it is, but that the network trained whole memorises more."""
    if trial.label_noise == 1:
        return {"train": 0.12 - trial.depth / 1000 if trial.trainable is Trainable.BN else 0.97, "test": 0.1}
    if trial.trainable is Trainable.ALL:
        return {"train": 0.5, "test": 0.5 + 0.1}
    held = trial.gamma_l1 + trial.gamma_l2 + trial.beta_l1 + trial.beta_l2 > 0
    test = 0.6 - trial.depth / 1000 + 0.1 * (trial.trainable is Trainable.BETA)
    return {"train": 0.6 - trial.depth / 500 + 0.05 * held, "test": test}


def at_chance(trial):
    """A world in which no network does anything."""
    return {"train": 0.1, "test": 0.1}


def all_alike(trial):
    """A world in which every network has learned everything and nothing makes a difference."""
    return {"train": 1.0, "test": 1.0 if trial.label_noise < 1 else 0.1}


def by_a_hair(trial):
    """A world in which all is as foreseen, by less than so few images tell; no two seeds differ in it."""
    if trial.label_noise == 1:
        whole = trial.trainable is Trainable.ALL
        return {"train": 0.96 + whole / 500 + trial.depth / 5000, "test": 0.1}
    held = trial.gamma_l1 + trial.gamma_l2 + trial.beta_l1 + trial.beta_l2 > 0
    better = trial.depth / 2000 + 0.015 * held - 0.01 * (trial.trainable is Trainable.BETA)
    train = 0.92 + trial.depth / 1000 + 0.02 * (trial.trainable is Trainable.ALL)
    return {"train": train, "test": 0.90 + better, "held_out": 0.6 + 0.1 * held}


TO_THE_END = {("memorised_steps",), ("memorised_gain",), ("whole_memorises_more",)}


@pytest.mark.parametrize(
    ("world", "reproduced", "unknown"),
    [
        (as_predicted, None, set()),
        (as_refuted, {("whole_memorises_more",)}, set()),
        (at_chance, set(), TO_THE_END),
        (all_alike, {("memorises",)}, set()),
        (by_a_hair, {("memorises",)}, set()),
    ],
)
def test_the_verdicts_are_those_of_the_world_and_cifars_number_is_held_against_cifar_alone(
    world, reproduced, unknown, tmp_path
):
    found = verdicts(session_of(tmp_path, planned("laptop"), world))
    assert found.pop(("fitted_on_cifar10",)) is Verdict.NOT_ENOUGH_DATA
    expected = set(found) if reproduced is None else reproduced
    assert {claim for claim, verdict in found.items() if verdict is Verdict.REPRODUCED} == expected
    assert {claim for claim, verdict in found.items() if verdict is Verdict.NOT_ENOUGH_DATA} == unknown


@pytest.mark.parametrize("missing", [None, {"train": 1.0, "test": 0.1, "outcome": Outcome.DIVERGED}])
def test_the_greatest_depth_and_every_depth_are_those_of_the_preset_whatever_has_been_run(missing, tmp_path):
    def reached(trial):
        return as_predicted(trial) if trial.depth < 26 else missing

    found = verdicts(session_of(tmp_path, planned("laptop"), reached))
    changes = {("penalties", penalty) for penalty in ("gamma_l1", "gamma_l2", "beta_l1", "beta_l2")}
    judged = {claim for claim, verdict in found.items() if verdict is not Verdict.NOT_ENOUGH_DATA}
    assert judged == changes | {("best_change",), ("gamma_over_beta",)}  # at 14 layers


def test_a_data_set_of_the_preset_that_has_not_been_run_leaves_no_verdict(tmp_path):
    every = planned("paper", "data=mnist,cifar10", "depth=50", "lr=0.1")

    def reached(trial):
        return as_predicted(trial.model_copy(update={"depth": 26})) if trial.data is Data.MNIST else None

    assert set(verdicts(session_of(tmp_path, every, reached)).values()) == {Verdict.NOT_ENOUGH_DATA}


def test_until_whole_networks_have_learned_their_random_labels_memory_has_no_verdict_but_that_there_is_some(tmp_path):
    def reached(trial):
        whole = trial.label_noise == 1 and trial.trainable is Trainable.ALL
        return {"train": 0.94, "test": 0.1} if whole and trial.depth == 14 else as_predicted(trial)

    found = verdicts(session_of(tmp_path, planned("laptop"), reached))
    assert {claim for claim, verdict in found.items() if verdict is Verdict.NOT_ENOUGH_DATA} == TO_THE_END | {
        ("fitted_on_cifar10",)
    }


@pytest.mark.parametrize(
    ("sets", "train", "verdict"),
    [
        ([], 0.995, Verdict.REPRODUCED),
        ([], 0.9, Verdict.NOT_REPRODUCED),
        (["epochs=20"], 0.995, Verdict.NOT_ENOUGH_DATA),
        (["data=mnist"], 0.995, Verdict.NOT_ENOUGH_DATA),
        (["seed=0,1"], 0.995, Verdict.NOT_ENOUGH_DATA),
        (["depth=50"], 0.995, Verdict.NOT_ENOUGH_DATA),
        (["width=4"], 0.995, Verdict.NOT_ENOUGH_DATA),
        (["batch=1280", "norm_batch=1280"], 0.995, Verdict.NOT_ENOUGH_DATA),
        (["weight_decay=0"], 0.995, Verdict.NOT_ENOUGH_DATA),
        (["lr=0.2"], 0.995, Verdict.NOT_ENOUGH_DATA),
        (["placement=last"], 0.995, Verdict.NOT_ENOUGH_DATA),
    ],
)
def test_fitting_random_labels_is_held_against_whole_trainings_on_cifar10(sets, train, verdict, tmp_path):
    axes = {"data=cifar10", "label_noise=1", "trainable=all"}
    axes = {each for each in axes if each.split("=")[0] not in {one.split("=")[0] for one in sets}}
    session = session_of(tmp_path, planned("paper", *axes, *sets), lambda trial: {"train": train, "test": 0.1})
    assert verdicts(session)[("fitted_on_cifar10",)] is verdict


def test_on_several_data_sets_a_trend_must_show_on_each(tmp_path):
    every = planned("paper", "label_noise=1")

    def reached(trial):
        if trial.trainable is Trainable.ALL:
            return {"train": 0.99, "test": 0.1}
        falls = trial.data is Data.CIFAR100
        return {"train": 0.5 + trial.depth / 1000 * (-1 if falls else 1), "test": 0.1}

    session = session_of(tmp_path, every, reached)
    (row,) = ask(session, "memorised_gain")
    assert (row["data"], row["measured"]) == ("cifar100", pytest.approx(-0.15))
    assert row["low"] < row["measured"] < row["high"]
    assert ask(session, "memorised_steps")[0]["gain"] == pytest.approx(-0.102)
    assert verdicts(session)[("memorised_gain",)] is Verdict.NOT_REPRODUCED
