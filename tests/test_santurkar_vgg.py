"""The numbers of the VGG study: from rows whose answers a hand computes, of trials that nobody trained."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from bnscale import query, report
from bnscale.probes import TABLES, looking
from bnscale.probes.activations import ActivationHistogram, Activations, MomentChange
from bnscale.probes.bound import GradientBound
from bnscale.probes.curve import BatchCurve, Curve
from bnscale.probes.landscape import Landscape
from bnscale.probes.probe import Only
from bnscale.probes.shift import CovariateShift
from bnscale.report import Verdict
from bnscale.store import Store
from bnscale.study.plan import plan, relate, settings
from bnscale.trial import Data, Norm, Outcome, Pixels

FOLDER = Path(__file__).parents[1] / "studies"
QUERIES = report.queries((FOLDER / "santurkar_vgg.sql").read_text())
T95 = 4.3026527  # Student's t for three readings, 97.5 %


def declared():
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("santurkar_vgg")


def planned(preset, *sets):
    asked = getattr(declared().study, preset)
    for axis, values in settings(sets).items():
        asked = asked.setting(axis, values)
    return plan(asked, lambda data: Pixels.ORIGINAL)


def session_with(folder, every, rows_of, outcome=Outcome.FINISHED):
    """SQL over a store with these trials; `rows_of` gives a trial's tables with their rows."""
    store = Store(folder)
    for each in every:
        tables = rows_of(each.trial)
        writer = store.writer(each.trial, dict.fromkeys(tables, "1 steps"), {})
        for table, rows in tables.items():
            writer.write(table, rows)
        writer.finish(outcome, each.trial.total_steps, {})
    session = query.open(folder, TABLES)
    relate(session, every)
    return session


def answer(session, name, *by):
    """Rows of a query by the columns that tell them apart."""
    rows = session.sql(QUERIES[name].sql).dicts()
    return {tuple(row[each] for each in by) if len(by) > 1 else row[by[0]]: row for row in rows}


def batch_curve(steps, accuracies):
    return [BatchCurve(int(step), 0.0, 128, 1.0, float(a)) for step, a in zip(steps, accuracies, strict=True)]


def way(step, losses, changes, beta):
    """What the landscape probe writes at one step: some step sizes."""
    return [
        Landscape(step, 2.0**i, 0.1 * 2**i, 1.0, 1.0, loss, 1.0, change, beta)
        for i, (loss, change) in enumerate(zip(losses, changes, strict=True))
    ]


# --- the paper's own numbers ----------------------------------------------------------------------

EVERY_100 = range(0, 15_001, 100)


def papers(trial):
    """What the paper's networks would have written, as far as its figures tell, every 100 steps."""
    study, kind = declared(), str(trial.norm)
    line = f"{kind} {trial.lr:g}"
    tests = study.TEST.get(line, (0.9,) * 6)
    tables = {"curve": [Curve(s, 0.0, "test", 10_000, 1.0, a, a) for s, a in zip(study.STEPS_READ, tests, strict=True)]}
    known = {0: 0.1, 1000: study.AT_1K.get(kind, 0.3), 15_000: study.AT_THE_END.get(kind, 0.99)}
    known |= study.CURVE.get(kind, {})
    known = dict(sorted(known.items()))
    tables["batch_curve"] = batch_curve(EVERY_100, np.interp(EVERY_100, list(known), list(known.values())))
    tables["moment_change"] = [
        MomentChange(
            step, f"layers.{layer}.conv", layer, 64, *(moved(study, moment, kind, layer) for moment in MOMENTS)
        )
        for step in EVERY_100
        for layer in (2, 9, 13)
    ]
    tables["covariate_shift"] = [
        CovariateShift(step, f"layers.{layer}.conv", layer, 1.0, 1.0, *shifted(study, kind, trial.lr, step, layer))
        for step in EVERY_100
        for layer in (2, 5, 10)
    ]
    if kind != "noise":  # other norms' landscapes are said to be as smooth as batch norm's
        tables["landscape"] = [row for step in EVERY_100 for row in landscape(kind, step)]
    return tables


MOMENTS = ("mean", "variance")


def moved(study, moment, kind, layer):
    return study.CHANGES.get((moment, kind), {}).get(layer, 0.002)


def shifted(study, kind, lr, step, layer):
    whole = study.L2["l2"].get(kind, 1.0)
    start = study.L2["l2 at the start"].get(kind, 1.0)
    return (whole if step else start), study.COSINES.get((lr, layer), {}).get(kind, 0.5)


def landscape(kind, step):
    """Medians, early means and spikes as figure 4 has them: 151 steps, of which the first 31 are early."""
    none = kind == "none"
    early = step <= 3000
    spike = step == (12_000 if none else 0)
    loss = (9.7 if none else 3.3) if spike else 1.0
    # A reading and a spike, without norm and with batch norm.
    changes = {True: ((88.9, 254.9), (28.0, 144.7)), False: ((47.0, 254.9), (21.7, 21.7))}[early][0 if none else 1]
    beta = (20.0 if none else 19.95) + (5.5 if none else 1.2) * (step // 100 % 3 - 1)
    if spike:
        beta = 45.6 if none else 25.3
    if not none and 500 <= step <= 1000:
        beta = 15.6
    return way(step, [loss - (0.94 if none else 0.2), loss], [1.0, changes[spike]], beta)


def test_batch_norms_accuracy_at_1000_steps_is_one_number_in_all_figures():
    study = declared()
    assert study.CURVE["batch"][1000] == study.AT_1K["batch"] == 0.828


AUGMENTED = "test_accuracy_with_augmentation"


def cifar(session, augmented=False):
    study = declared().study
    return {
        (claim.query, *claim.row.values()): report.judge(claim, session, QUERIES)
        for claim in study.claims
        if "CIFAR-10" in claim.sentence and (claim.query == AUGMENTED) is augmented
    }


def test_the_papers_own_curves_reproduce_its_numbers_but_not_what_its_text_says_of_them(tmp_path):
    judged = cifar(session_with(tmp_path, planned("paper"), papers))
    assert len(judged) == 63
    wrong = {key for key, each in judged.items() if each.verdict is not Verdict.REPRODUCED}
    assert wrong == {("early_change_on_cifar10", "text")}
    assert judged["early_change_on_cifar10", "text"].verdict is Verdict.NOT_REPRODUCED
    for key, each in judged.items():
        if key[0] == "test_accuracy_on_cifar10":
            assert each.measured == pytest.approx(each.claim.paper)
        if key[0] == "noise_on_cifar10":
            assert each.measured == pytest.approx(each.claim.paper, rel=0.03)
        if key[0] == "steps_to_on_cifar10":
            assert each.measured == pytest.approx(each.claim.paper, abs=200)


@pytest.mark.parametrize(
    "sets",
    [
        ["data=digits"],
        ["depth=19"],
        ["width=2"],
        ["weight_init=he_normal"],
        ["batch=64"],
        ["momentum=0.9"],
        ["weight_decay=0.0005"],
        ["augmentation=flip_shift"],
        ["validation=5000"],
        ["milestones=0.5"],
        ["output_bias=zero,random"],  # two settings of one seed
    ],
)
def test_the_papers_numbers_are_held_against_its_own_network_and_protocol_alone(sets, tmp_path):
    judged = cifar(session_with(tmp_path, planned("paper", "norm=batch,none", "lr=0.1", *sets), papers))
    assert {each.verdict for each in judged.values()} == {Verdict.NOT_ENOUGH_DATA}


FLAGS = [
    "data=cifar100",
    "network=linear",
    "depth=13",
    "width=2",
    "weight_init=he_normal",
    "output_bias=zero",
    "validation=5000",
    "batch=64",
    "augmentation=flip_shift",
    "trainable=output",
    "momentum=0.9",
    "weight_decay=0.0005",
    "milestones=0.5",
    "plateau=10",
    "warmup=0.1",
    "precision=bf16",
]
OF_NORMS = [
    "norm_batch=64",
    "affine=gamma",
    "affine_at=none",
    "affine_at=every_2",
    "norm_init=uniform",
    "norm_decay=0.001",
    "gamma_l1=0.001",
    "gamma_l2=0.001",
    "beta_l1=0.001",
    "beta_l2=0.001",
]


def papers_own(folder, sets):
    """Norms whose trainings are held against the paper's."""
    every = planned("paper", "lr=0.1", *sets.split())
    session = session_with(folder, every, lambda trial: {"batch_curve": batch_curve([0], [0.1])})
    return {kind for kind, row in answer(session, "settings", "kind").items() if row["papers"]}


@pytest.mark.parametrize("flag", FLAGS)
def test_one_other_choice_and_a_training_is_not_the_papers(flag, tmp_path):
    assert papers_own(tmp_path, f"norm=batch,none {flag}") == set()


@pytest.mark.parametrize("flag", OF_NORMS)
def test_one_other_choice_about_norms_and_a_training_with_norms_is_not_the_papers(flag, tmp_path):
    assert papers_own(tmp_path, f"norm=batch {flag}") == set()


def test_each_norm_of_the_paper_is_the_papers_also_where_another_is_trained_beside_it(tmp_path):
    kinds = {"batch", "none", "noisy", "noise", "l1", "l2", "linf"}
    assert papers_own(tmp_path / "own", "norm=batch,none,noisy,noise,l1,l2,linf") == kinds
    assert papers_own(tmp_path / "placed", "norm=batch,none placement=every,last") >= {"batch", "none"}


def test_the_beginning_of_the_papers_training_answers_for_its_beginning_alone(tmp_path):
    def beginning(trial):
        return {name: [row for row in rows if row.step <= 3000] for name, rows in papers(trial).items()}

    every = planned("paper", "norm=batch,none", "lr=0.1", "steps=3000")
    judged = cifar(session_with(tmp_path, every, beginning))
    assert {key for key, each in judged.items() if each.measured is not None} == {
        *(("test_accuracy_on_cifar10", kind, 0.1, step) for kind in ("none", "batch") for step in (1000, 3000)),
        *(("training_at_1k_on_cifar10", kind) for kind in ("none", "batch")),
        *(("shift_on_cifar10", kind, 0.1, 5, "l2 at the start") for kind in ("none", "batch")),
    }


def trends(session):
    """The verdicts on what any size can answer."""
    claims = [claim for claim in declared().study.claims if "CIFAR-10" not in claim.sentence]
    return {(each.query, *each.row.values()): report.judge(each, session, QUERIES).verdict for each in claims}


def test_one_training_of_each_kind_is_enough_for_a_trend_where_it_is_the_papers_own_and_not_elsewhere(tmp_path):
    shown = {"speeds", "best_in_training", "shift_with_batch_norm", "while_learning", "two_over_rate"}
    judged = {
        sets: {
            key: verdict
            for key, verdict in trends(session_with(tmp_path / sets, planned("paper", sets), papers)).items()
            if key[0] in shown and not {0.01, 0.5, "noise"} & set(key)
        }
        for sets in ("steps=15000", "depth=19", "steps=14999")
    }
    assert Verdict.NOT_ENOUGH_DATA not in judged["steps=15000"].values()
    assert judged["steps=15000"]["speeds", "none", "batch"] is Verdict.REPRODUCED
    assert {*judged["depth=19"].values(), *judged["steps=14999"].values()} == {Verdict.NOT_ENOUGH_DATA}


def test_a_training_that_diverged_or_went_on_longer_does_not_answer_for_the_papers_whole_training(tmp_path):
    whole = {"landscape_on_cifar10", "noise_on_cifar10", "final_training_on_cifar10", "early_change_on_cifar10"}
    for number, (steps, outcome) in enumerate([(15_000, Outcome.DIVERGED), (30_000, Outcome.FINISHED)]):
        every = planned("paper", f"steps={steps}", "lr=0.1")
        judged = cifar(session_with(tmp_path / str(number), every, papers, outcome))
        assert {each.verdict for key, each in judged.items() if key[0] in whole} == {Verdict.NOT_ENOUGH_DATA}
        assert judged["training_at_1k_on_cifar10", "batch"].verdict is Verdict.REPRODUCED


def test_augmented_images_answer_for_the_papers_accuracy_with_augmentation_and_original_ones_do_not(tmp_path):
    def right(trial):
        accuracy = 0.92 if trial.norm is Norm.BATCH else 0.7
        return {"curve": [Curve(15_000, 0.0, "test", 10_000, 1.0, accuracy, accuracy)]}

    verdicts = {}
    for kind in ("flip_shift", "none"):
        every = planned("paper", "norm=batch,none", f"augmentation={kind}", "lr=0.1")
        judged = cifar(session_with(tmp_path / kind, every, right), augmented=True)
        verdicts[kind] = [judged[AUGMENTED, norm].verdict for norm in ("batch", "none")]
    assert verdicts["flip_shift"] == [Verdict.REPRODUCED, Verdict.NOT_REPRODUCED]
    assert verdicts["none"] == [Verdict.NOT_ENOUGH_DATA] * 2


def test_a_standard_network_that_diverges_has_not_trained(tmp_path):
    def lost(trial):
        return {"curve": [Curve(1000, 0.0, "test", 10_000, 9.0, 0.1, 0.5)]}

    every = planned("paper", "norm=none", "lr=0.5")
    session = session_with(tmp_path, every, lost, Outcome.DIVERGED)
    assert cifar(session)["never_trains_on_cifar10", "none", 0.5].verdict is Verdict.REPRODUCED


# --- what any size answers -------------------------------------------------------------------------


def laptop(*sets):
    return planned("laptop", *sets)


def learns_at(step, steps):
    """One reading a step: chance, and everything right from `step` on; the five-point mean is 82 % one step before."""
    return batch_curve(steps, [1.0 if each >= step else 0.1 for each in steps])


def test_speeds_are_ratios_of_a_seed_and_a_training_that_never_comes_so_far_counts_with_all_its_steps(tmp_path):
    reaches = {
        "batch": {0: 8, 1: 8, 2: 8},
        "noisy": {0: 8, 1: 16, 2: 32},
        "none": {0: 98, 1: 98, 2: 1000},  # the last never
    }
    every = laptop("norm=batch,noisy,none", "lr=0.1", "steps=100")
    # Five readings of 1 have a mean of 1, and four of them with one of 0.1 have 0.82.
    session = session_with(
        tmp_path, every, lambda trial: {"batch_curve": learns_at(reaches[str(trial.norm)][trial.seed] - 2, range(101))}
    )
    speeds = answer(session, "speeds", "kind", "against")
    mean, sd = math.log(2), math.log(2)  # of log 1, log 2 and log 4
    noisy = speeds["noisy", "batch"]
    assert noisy["measured"] == pytest.approx(2)
    assert noisy["high"] == pytest.approx(math.exp(mean + T95 * sd / math.sqrt(3)), rel=1e-5)
    assert speeds["none", "batch"]["measured"] == pytest.approx((98 * 98 * 100) ** (1 / 3) / 8)
    assert speeds["batch", "none"]["n"] == 3


def test_a_network_is_said_not_to_train_only_where_batch_norm_had_time_to(tmp_path):
    every = laptop("norm=batch,noise", "lr=0.1", "steps=40", "seed=0,1,2,3")
    session = session_with(
        tmp_path,
        every,
        lambda trial: {"batch_curve": learns_at(10 if trial.norm is Norm.BATCH and trial.seed else 99, range(41))},
    )
    noise = answer(session, "best_in_training", "kind", "lr")["noise", 0.1]
    assert (noise["measured"], noise["n"]) == (pytest.approx(0.1), 3)  # not the seed in which nothing learned


def test_networks_are_compared_while_they_learn_and_over_the_whole_training(tmp_path):
    """All vary alike until they have learned, those with norms at step 10 of 100, and a hundredth of that behind it;
    with the l_2 norm twice as much. The second layer, behind a single one, is another thing, and says nothing."""

    def rows(trial):
        until = 100 if trial.norm is Norm.NONE else 10
        scale = 3.0 if trial.norm is Norm.BATCH else 1.0
        wide = 2.0 if trial.norm is Norm.L2 else 1.0
        steps = range(101)
        size = {step: (1.0 if step <= until else 0.01) for step in steps}
        return {
            "batch_curve": learns_at(until - 2, steps),
            "landscape": [row for s in steps for row in way(s, [0.0, wide * size[s]], [0.0, wide * size[s]], 1.0)],
            "covariate_shift": [
                CovariateShift(s, "layers.5.conv", 5, 1.0, 1.0, scale * size[s], 0.5 - 0.1 * scale * size[s])
                for s in steps
            ]
            + [CovariateShift(s, "layers.2.conv", 2, 1.0, 1.0, scale**9, scale / 4) for s in steps],
        }

    session = session_with(tmp_path, laptop("norm=batch,none,l2", "lr=0.1", "steps=100"), rows)
    learning = answer(session, "while_learning", "kind", "reading")
    assert {key: (row["measured"], row["n"]) for key, row in learning.items()} == {
        ("batch", "variation"): (pytest.approx(1.0), 3),
        ("batch", "change"): (pytest.approx(1.0), 3),
        ("batch", "shift"): (pytest.approx(3.0), 3),
        ("batch", "cosine"): (pytest.approx(-0.2), 3),
        ("l2", "variation"): (pytest.approx(0.5), 3),
        ("l2", "change"): (pytest.approx(0.5), 3),
        ("l2", "shift"): (pytest.approx(1.0), 3),
        ("l2", "cosine"): (pytest.approx(0.0, abs=1e-12), 3),
    }
    assert answer(session, "smoother_than_standard", "kind", "reading")["batch", "variation"][
        "measured"
    ] == pytest.approx(100)
    after = 0.01 ** (90 / 101)  # geometric mean over the training: 11 readings of 3 and 90 of 0.03
    shift = answer(session, "shift_with_batch_norm", "reading")
    assert shift["l2"]["measured"] == pytest.approx(3 * after)
    assert shift["cosine"]["measured"] == pytest.approx(0.1 - 0.1 * 3 * (11 + 90 * 0.01) / 101)


def test_a_loss_beyond_the_float32_numbers_stands_in_the_figure_as_infinite_and_not_in_a_claim(tmp_path):
    def rows(trial):
        blown = math.inf if trial.norm is Norm.NONE else 1.0
        return {
            "landscape": [row for s in range(5) for row in way(s, [0.5, blown if s == 3 else 1.0], [1.0, 1.0], 2.0)]
        }

    session = session_with(tmp_path, laptop("norm=batch,none", "lr=0.1", "steps=4"), rows)
    by_step = answer(session, "loss_along_the_gradient", "kind", "step")
    assert by_step["none", 3]["largest"] == math.inf
    assert (by_step["none", 2]["largest"], by_step["none", 2]["least"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert answer(session, "smoother_than_standard", "kind", "reading")["batch", "variation"][
        "measured"
    ] == pytest.approx(1.0)


def test_a_distribution_that_is_shifted_from_reading_to_reading_drifts_by_the_shift(tmp_path):
    """Uniform values on an interval that moves by 1, or by a quarter behind an l_2 norm, at every reading. It counts in
    deviations: what moves a quarter as far at a quarter of the scale has moved as far."""

    def rows(trial, scale=1.0):
        by = 0.25 if trial.norm is Norm.L2 else 1.0
        return {
            "activations": [
                Activations(step, 3, place, 200, 0.0, scale * (2.0 if place == "output" else 9.0), 0.0, 3.0, 0.1)
                for step in (0, 10, 20)
                for place in ("input", "output")
            ],
            "activation_histogram": [
                ActivationHistogram(step, 3, "output", by * number + i / 4, by * number + (i + 1) / 4, 25, 200)
                for number, step in enumerate((0, 10, 20))
                for i in range(8)
            ],
        }

    session = session_with(tmp_path, laptop("norm=l2,none", "lr=0.1"), rows)
    drifts = session.sql(QUERIES["drifts"].sql).dicts()
    assert {(row["kind"], row["step"]) for row in drifts} == {(k, s) for k in ("none", "l2") for s in (10, 20)}
    for row in drifts:
        assert row["drift"] == pytest.approx(0.5 if row["kind"] == "none" else 0.125)
    against = answer(session, "drift_against_standard", "kind")["l2"]
    assert (against["measured"], against["n"]) == (pytest.approx(0.25), 3)
    every = laptop("norm=l2,none", "lr=0.1")
    session = session_with(tmp_path / "scaled", every, lambda trial: rows(trial, 0.25 if trial.norm is Norm.L2 else 1))
    assert answer(session, "drift_against_standard", "kind")["l2"]["measured"] == pytest.approx(1.0)


def test_what_noisy_batch_norm_changes_is_held_against_the_algorithm_and_against_the_standard_network(tmp_path):
    """Changes of a mean and a variance: 0.3 and 0.2 with noise behind batch norm, 0.03 and 0.1 without norm."""
    moved = {Norm.NOISY: (0.3, 0.2), Norm.NONE: (0.03, 0.1), Norm.BATCH: (0.001, 0.002)}

    def rows(trial):
        return {
            "moment_change": [
                MomentChange(step, f"layers.{layer}.conv", layer, 8, *moved[trial.norm])
                for step in (0, 20)
                for layer in (2, 5)
            ]
        }

    session = session_with(tmp_path, laptop("norm=batch,noisy,none", "lr=0.1"), rows)
    noise = answer(session, "noise_of_the_algorithm", "moment")
    assert {key: row["measured"] for key, row in noise.items()} == {
        "mean": pytest.approx(0.3), "variance": pytest.approx(0.2)
    }  # fmt: skip
    against = answer(session, "change_against_standard", "kind", "moment")
    assert against["noisy", "mean"]["measured"] == pytest.approx(10.0)
    assert against["noisy", "variance"]["measured"] == pytest.approx(2.0)
    assert against["batch", "variance"]["measured"] == pytest.approx(0.02)


def test_a_norm_whose_outputs_are_twice_as_far_from_normal_as_behind_batch_norm_is_twice_less_normal(tmp_path):
    """Before the first update, and at a layer's input, distances are others and say nothing."""

    def rows(trial):
        far = 0.2 if trial.norm is Norm.L1 else 0.1
        return {
            "activations": [
                Activations(step, layer, place, 200, 0.0, 1.0, 0.0, 3.0, far if step and place == "output" else far**3)
                for step in (0, 10, 20)
                for layer in (3, 8)
                for place in ("input", "output")
            ]
        }

    session = session_with(tmp_path, laptop("norm=batch,l1", "lr=0.1"), rows)
    less = answer(session, "less_normal_than_batch", "kind")
    assert {kind: (row["measured"], row["n"]) for kind, row in less.items()} == {"l1": (pytest.approx(2.0), 3)}


def test_the_figure_of_inputs_draws_inputs_without_their_zeros_and_that_of_outputs_draws_outputs(tmp_path):
    """Eight values in intervals of length 1: inputs from 0 on, a quarter of them in the lowest; outputs from -2 on."""

    def rows(trial):
        return {
            "activation_histogram": [
                ActivationHistogram(0, 3, place, float(low), low + 1.0, count, 8)
                for place, counts in (("input", {0: 2, 1: 6}), ("output", {-2: 3, -1: 5}))
                for low, count in counts.items()
            ]
        }

    session = session_with(tmp_path, laptop("norm=batch", "lr=0.1"), rows)
    drawn = {name: session.sql(QUERIES[f"{name}_over_training"].sql).dicts() for name in ("inputs", "outputs")}
    assert {name: {row["low"]: row["share"] for row in rows} for name, rows in drawn.items()} == {
        "inputs": {1.0: 0.75}, "outputs": {-2.0: 0.375, -1.0: 0.625}
    }  # fmt: skip


def test_an_interval_of_accuracies_stays_between_none_and_all(tmp_path):
    """Three seeds at 10, 10 and 90 %, and at 90, 100 and 100 %, whose intervals reach below 0 and above 1."""
    best = {Norm.NOISE: (0.1, 0.1, 0.9), Norm.BATCH: (0.9, 1.0, 1.0)}
    every = laptop("norm=batch,noise", "lr=0.1", "steps=10")
    session = session_with(
        tmp_path, every, lambda trial: {"batch_curve": batch_curve(range(11), [best[trial.norm][trial.seed]] * 11)}
    )
    rows = answer(session, "best_in_training", "kind", "lr")
    noise, batch = rows["noise", 0.1], rows["batch", 0.1]
    assert (noise["low"], noise["high"]) == (0, 1)  # 37 % and 115 points, as the deviation is 0.8 / sqrt(3)
    assert (batch["low"], batch["high"]) == (pytest.approx(2.9 / 3 - T95 * 0.1 / 3), 1)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_gradient_that_changes_as_a_power_of_the_step_grows_by_that_power_of_eight(power, tmp_path):
    def rows(trial):
        return {
            "landscape": [
                Landscape(s, m, 0.1 * m, m, 1.0, 1.0, 1.0, m**power, m ** (power - 1))
                for s in range(5)
                for m in (0.5, 1.0, 2.0, 4.0)
            ]
        }

    session = session_with(tmp_path, laptop("norm=batch,none", "lr=0.1", "steps=4"), rows)
    grown = answer(session, "change_over_step_sizes", "kind")["batch"]
    assert (grown["measured"], grown["n"]) == (pytest.approx(8**power), 3)
    beta = answer(session, "beta_by_step_size", "kind", "multiple")
    assert beta["batch", 4.0]["beta"] == pytest.approx(4 ** (power - 1))


def test_beta_is_two_over_the_rate_where_its_product_with_half_the_rate_is_one(tmp_path):
    every = laptop("norm=batch")
    session = session_with(
        tmp_path,
        every,
        lambda trial: {"landscape": [row for s in (0, 10, 20) for row in way(s, [1.0], [1.0], 2 / trial.lr)]},
    )
    rows = answer(session, "beta_times_rate", "kind", "lr")
    assert {key: row["measured"] for key, row in rows.items()} == {
        ("batch", lr): pytest.approx(1.0) for lr in (0.01, 0.1, 0.5)
    }


def test_the_theorem_holds_for_the_share_of_units_whose_left_side_is_no_larger(tmp_path):
    def unit(number, left, right, plain_right):
        return GradientBound(0, 1, "layers.1.norm", number, 8, 1.0, 1.0, left, right, right, 0.0, 0.0, 1.0, plain_right)

    units = [
        unit(0, 1.0, 1.0, 2.0),
        unit(1, 1.0, 1.05, 0.5),
        unit(2, 0.0, 0.0, 0.0),
        unit(3, 1.0, 1.0, None),
        unit(4, 1.0, 1.0, 0.0),
    ]
    session = session_with(tmp_path, laptop("norm=batch", "lr=0.1"), lambda trial: {"gradient_bound": units})
    holds = answer(session, "theorem_holds", "gradient")
    # A unit without a gradient, and one whose network without the norm overflowed, say nothing; one that has a gradient
    # and would have none without the norm is as far from the theorem as can be.
    assert {key: row["measured"] for key, row in holds.items()} == {
        "at the layer's output": pytest.approx(1.0), "without this norm": pytest.approx(1 / 3)
    }  # fmt: skip
    drawn = answer(session, "theorem_by_layer", "gradient")["without this norm"]
    assert (drawn["ratio"], drawn["p95"], drawn["units"]) == (2.0, math.inf, 9)
    (identity,) = answer(session, "theorem_is_an_identity", "n").values()
    assert (identity["measured"], identity["n"]) == (pytest.approx(3 / 4), 3)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_theorem_holds_for_every_unit_or_not_at_all(wrong, tmp_path):
    units = [
        GradientBound(0, 1, "layers.1.norm", number, 8, 1.0, 1.0, left, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0)
        for number, left in enumerate([1.0005] * 999 + [1.0 + wrong])
    ]
    session = session_with(tmp_path, laptop("norm=batch", "lr=0.1"), lambda trial: {"gradient_bound": units})
    expected = Verdict.NOT_REPRODUCED if wrong else Verdict.REPRODUCED
    assert trends(session)["theorem_holds", "without this norm"] is expected


# --- what looks, and how often ---------------------------------------------------------------------


def inner(probe):
    """What looks, whatever the trials that it looks at."""
    return inner(probe.probe) if isinstance(probe, Only) else probe


def test_the_paper_preset_reads_at_the_papers_steps_and_layers_and_both_presets_read_six_times():
    study = declared().study
    for preset in ("paper", "laptop"):
        for each in planned(preset):
            probes = looking(study.probes, each.trial)
            names = [probe.__name__ for probe in probes]
            assert len(set(names)) == len(names)
            assert ("gradient_bound" in names) == (each.trial.norm is Norm.BATCH)
            readings = {probe.__name__: cadence.readings(each.trial) for probe, cadence in probes.items()}
            rare = readings.pop("gradient_bound", 6)
            assert min(readings.values()) >= 6
            assert rare >= 5
            if preset == "paper":
                assert readings["landscape"] == readings["batch_curve"] == readings["covariate_shift"] == 151
                assert readings["curve"] == 16
            else:
                # At the rate at which norms are compared, so that each has six readings until it has learned.
                compared = each.trial.lr == 0.1
                pair = each.trial.norm in (Norm.NONE, Norm.BATCH)
                assert readings["covariate_shift"] == (101 if compared and pair else 21)
                often = {Norm.NOISY: 51, Norm.NOISE: 21}.get(each.trial.norm, 101)
                assert readings["landscape"] == (often if compared else 21)
    layers = {
        (probe.__name__, Data.DIGITS in dict(probe.fields)["data"]): getattr(inner(probe), "layers", None)
        for probe in study.probes
    }
    assert layers["covariate_shift", False] == (2, 5, 10)
    assert layers["moment_change", False] == (2, 9, 13)
    assert layers["activation_histogram", False] == layers["activations", False] == (3, 11)
