"""The studies as they are declared: every claim and figure has its query, every query answers, and the ones that
compute more than a mean give what a hand computes."""

import importlib
import math
import sys
from pathlib import Path

import pytest
from examples import FIELDS

from bnscale import query, report
from bnscale.engine import Gang
from bnscale.probes import END, TABLES, Curve, clamp, curve, gamma, gamma_histogram, sparsity
from bnscale.report import Verdict, figures
from bnscale.store import Store
from bnscale.study import Preset, Same, grid
from bnscale.study.asked import Asked
from bnscale.study.plan import Planned, plan, relate, relate_searches, searches, settings, verdicts
from bnscale.train import Job, run
from bnscale.trial import Norm, Outcome, Pixels, Placement, Refusal, Trainable, Trial, WeightInit

FOLDER = Path(__file__).parents[1] / "studies"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "recipes")


def study_of(name):
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name).study


def queries_of(name):
    return report.queries((FOLDER / f"{name}.sql").read_text())


def original(data):
    return Pixels.ORIGINAL


def asking(name, folder, planned):
    """SQL with the tables that the study's own commands have."""
    session = query.open(folder, TABLES)
    relate(session, planned)
    search = study_of(name).laptop.search
    if search:
        known = verdicts(session, search.verdict, queries_of(name)[search.verdict].sql)
        relate_searches(session, searches(planned, search.axis, known))
    return session


# --- every study ----------------------------------------------------------------------------------

TINY = FIELDS | {"trainable": Trainable.ALL, "steps": 3, "groups": 8, "norm_batch": Same("batch")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A store of real trials of 8 layers and three steps, some of which diverge, and their plan."""
    folder = tmp_path_factory.mktemp("tiny")
    preset = Preset(
        fixed=TINY,
        scientific=grid(norm=[Norm.BATCH, Norm.NONE, Norm.GROUP], batch=[16], lr=[0.01, 0.1, 1e6])
        + grid(norm=[Norm.BATCH], placement=[Placement.LAST], batch=[16], lr=[0.1])
        + grid(norm=[Norm.BATCH, Norm.NONE], batch=[32], lr=[0.1]),
        nuisance=[{}],
        seeds=range(2),
    )
    planned = plan(preset, original)
    probes = {curve: END, gamma: END, gamma_histogram: END, clamp: END, sparsity: END}
    for each in planned:
        job = Job(each.trial, probes, str(folder), str(folder), None, 0, 60.0)
        for _ in run([job], Gang(), 1, lambda: False):
            pass
    return folder, planned


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_and_every_figure_of_a_study_has_its_query_and_every_query_has_a_comment(name):
    study, queries = study_of(name), queries_of(name)
    asked = [each.query for each in (*study.claims, *study.figures)]
    assert set(asked) <= set(queries)
    assert all(each.comment for each in queries.values())
    assert study.name == name
    rows = [(each.query, *sorted(each.row.items())) for each in study.claims]
    assert len(set(rows)) == len(rows)  # no two claims read one row


@pytest.mark.parametrize("name", NAMES)
def test_every_query_of_a_study_answers_on_whatever_was_trained(name, tiny):
    folder, planned = tiny
    session = asking(name, folder, planned)
    assert session.sql("select distinct outcome from trials order by all").rows == [("diverged",), ("finished",)]
    study, queries = study_of(name), queries_of(name)
    for each in queries.values():
        session.sql(each.sql)
    for claim in study.claims:
        report.judge(claim, session, queries)
    for figure in study.figures:
        figures.render(figure, session.sql(queries[figure.query].sql), "python study.py")


@pytest.mark.parametrize("name", NAMES)
def test_every_query_of_a_study_answers_before_anything_was_trained(name, tmp_path):
    Store(tmp_path)
    study, queries = study_of(name), queries_of(name)
    session = asking(name, tmp_path, plan(study.laptop, original)[:3])
    for each in queries.values():
        session.sql(each.sql)
    for claim in study.claims:
        assert report.judge(claim, session, queries).verdict is Verdict.NOT_ENOUGH_DATA


@pytest.mark.parametrize("name", NAMES)
def test_both_presets_of_a_study_hold_out_images_or_tune_nothing(name):
    study = study_of(name)
    for preset in (study.paper, study.laptop):
        assert plan(preset, original)


# --- bjorck_learning_rate: its grid ---------------------------------------------------------------


def test_the_learning_rate_study_is_declared_at_the_papers_size():
    planned = plan(study_of("bjorck_learning_rate").paper, original)
    trials = [each.trial for each in planned]
    assert {(str(t.data), t.depth, t.epochs, t.momentum, t.weight_decay, t.validation) for t in trials} == {
        ("cifar10", 110, 165, 0.9, 5e-4, 5000)
    }
    assert {str(t.norm) for t in trials} == {"batch", "none", "layer", "group", "instance", "renorm"}
    ladders = {}
    for t in trials:
        if t.batch == 128:
            ladders.setdefault((t.norm, t.placement), set()).add(t.lr)
    assert len(ladders) == 7
    assert all({0.1, 0.03, 0.003, 0.0001} < rates for rates in ladders.values())
    assert len(set(map(frozenset, ladders.values()))) == 1  # every norm over the same rates
    assert {t.norm_batch == t.batch for t in trials} == {True}
    assert {each.nuisance for each in planned} == {""}
    assert len(planned) == 620


def asked(tmp_path, *sets):
    study = study_of("bjorck_learning_rate")
    return Asked.of(study, FOLDER / "bjorck_learning_rate.py", "laptop", list(sets), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("sets", "count"),
    [
        (["lr=0.03"], (7 + 2) * 3),  # 7 norms at batch 48, batch norm at two other sizes
        (["lr=0.05"], 1 * 3),  # a new rate: for batch norm alone, which is tried at all others
        (["norm=none"], (7 + 4) * 3),
        (["norm=l1"], 5 * 3),  # the rates that all norms are tried at
        (["placement=first"], 7 * 3),
        (["norm=group", "groups=4,8"], 2 * 5 * 3),
        (["depth=26"], 159),
        (["batch=12"], 3 * 3),
        (["batch=24"], 3 * 3),
        (["norm=batch", "placement=every", "lr=0.1", "batch=32", "norm_batch=16", "seed=0"], 1),
    ],
)
def test_any_axis_of_the_learning_rate_study_can_be_set(sets, count, tmp_path):
    planned = asked(tmp_path, *sets).planned
    assert len(planned) == count
    if not any(each.startswith("norm_batch") for each in sets):
        assert all(each.trial.norm_batch == each.trial.batch for each in planned)


# --- bjorck_learning_rate: its numbers ------------------------------------------------------------

NAN = float("nan")
CHANCE, FELL, ROSE = 0.1, (2.3, 0.5), (2.3, 7.0)
DONE, DIVERGED = Outcome.FINISHED, Outcome.DIVERGED


def done(held_out, test, train=0.9, losses=FELL):
    return DONE, held_out, test, train, losses


LOST = (DIVERGED, NAN, NAN, NAN, (2.3, NAN))

# By kind and rate: what three seeds reached.
RESULTS = {
    ("none", 0.01): [done(0.7, 0.60), done(0.7, 0.62), done(0.7, 0.64)],
    ("none", 0.1): [done(0.1, 0.1, CHANCE), done(0.1, 0.1, CHANCE), LOST],
    ("none", 1.0): [LOST, LOST, LOST],
    ("batch", 0.01): [done(0.65, 0.61), done(0.65, 0.63), done(0.65, 0.65)],
    ("batch", 0.1): [done(0.9, 0.80), done(0.9, 0.82), done(0.9, 0.84)],
    ("batch", 1.0): [done(0.5, 0.99), done(0.5, 0.99, 0.9, ROSE), LOST],  # test images choose nothing
    ("last", 0.01): [done(0.6, 0.60), done(0.6, 0.60), done(0.6, 0.60)],
    ("last", 0.1): [done(0.8, 0.74), done(0.8, 0.76), done(0.8, 0.78)],
    ("last", 1.0): [None, LOST, LOST],  # one trial is missing
}


def session_with(folder, results, validation=100):
    store, planned = Store(folder), []
    for (kind, lr, *more), outcomes in results.items():
        norm = Norm.BATCH if kind == "last" else Norm(kind)
        place = Placement.LAST if kind == "last" else Placement.EVERY
        size, setting = more[0] if more else 16, more[1:]  # such as ("weight_init", "glorot_normal")
        axes = ["norm", "placement", "batch", "lr", *(name for name, _ in setting)]
        for seed, result in enumerate(outcomes):
            changes = {
                "norm": norm, "placement": place, "lr": lr, "seed": seed, "trainable": Trainable.ALL,
                "validation": validation, "batch": size, "norm_batch": size, "groups": 8,
                "renorm_r": 3.0, "renorm_d": 5.0, "renorm_start": 0.05, "renorm_r_end": 0.3, "renorm_d_end": 0.2,
                **dict(setting),
            }  # fmt: skip
            trial = Trial(**(FIELDS | changes))
            planned.append(Planned(trial, " ".join(f"{axis}={getattr(trial, axis)}" for axis in axes), ""))
            if result is not None:
                keep(store, trial, result)
    session = query.open(folder, TABLES)
    relate(session, planned)
    return session


def keep(store, trial, result):
    outcome, held_out, test, train, losses = result
    writer = store.writer(trial, {"curve": "1 epochs"}, {})
    for step, loss, share in [(0, losses[0], 0.0), (trial.total_steps, losses[1], 1.0)]:
        epoch = share * (trial.epochs or 1)
        readings = [("train", train), ("test", test)] + [("validation", held_out)] * (trial.validation > 0)
        for split, accuracy in readings:
            at = accuracy if share else CHANCE
            writer.write("curve", [Curve(step, epoch, split, 100, loss, at, at)])
    writer.finish(outcome, trial.total_steps, {})


def session_of(folder, preset, result, *sets):
    """The tables of a preset with some axes set, whose trials gave `result`: None where one has not been run."""
    asked = getattr(study_of("bjorck_learning_rate"), preset)
    for axis, values in settings(sets).items():
        asked = asked.setting(axis, values)
    planned, store = plan(asked, original), Store(folder)
    for each in planned:
        if (reached := result(each.trial)) is not None:
            keep(store, each.trial, reached)
    session = query.open(folder, TABLES)
    relate(session, planned)
    return session


def judged_of(session):
    """Verdicts of the study's claims that have one, and their seeds, by query and row."""
    study, queries = study_of("bjorck_learning_rate"), queries_of("bjorck_learning_rate")
    judged = [report.judge(claim, session, queries) for claim in study.claims]
    return {
        (each.claim.query, *each.claim.row.values()): (str(each.verdict), each.n)
        for each in judged
        if each.verdict is not Verdict.NOT_ENOUGH_DATA
    }


def answer(session, name, *by):
    """Rows of a query by the columns that tell them apart."""
    rows = session.sql(queries_of("bjorck_learning_rate")[name].sql).dicts()
    return {tuple(row[each] for each in by) if len(by) > 1 else row[by[0]]: row for row in rows} if by else rows


def test_a_trial_trains_if_it_finished_below_its_first_loss_and_well_above_chance(tmp_path):
    session = session_with(tmp_path, RESULTS)
    trained = {key: row["trains"] for key, row in answer(session, "trained", "kind", "lr", "seed").items()}
    assert {key for key, trains in trained.items() if trains} == (
        {(kind, 0.01, s) for kind in ("none", "batch", "batch at last") for s in range(3)}
        | {(kind, 0.1, s) for kind in ("batch", "batch at last") for s in range(3)}
        | {("batch", 1.0, 0)}
    )
    assert len(trained) == 9 * 3 - 1


def test_the_largest_rate_is_a_mean_over_seeds_that_have_a_result_at_every_rate(tmp_path):
    session = session_with(tmp_path, RESULTS)
    largest = answer(session, "largest_rate", "kind")
    assert {kind: (row["n"], pytest.approx(row["largest"])) for kind, row in largest.items()} == {
        "none": (3, -2.0),
        "batch": (3, -2 / 3),  # 1, 0.1 and 0.1
        "batch at last": (2, -1.0),
    }
    gains = answer(session, "rate_gain", "kind")
    assert set(gains) == {"batch", "batch at last"}
    assert (gains["batch"]["measured"], gains["batch"]["n"]) == (pytest.approx(4 / 3), 3)
    half = 4.302653 * math.sqrt(1 / 3) / math.sqrt(3)  # Student's t for 3, of 2, 1 and 1 decades
    assert gains["batch"]["low"] == pytest.approx(4 / 3 - half, rel=1e-5)
    assert (gains["batch at last"]["measured"], gains["batch at last"]["n"]) == (pytest.approx(1.0), 2)


def test_the_share_of_the_gain_is_at_rates_chosen_on_held_out_images(tmp_path):
    session = session_with(tmp_path, RESULTS)
    assert {kind: row["lr"] for kind, row in answer(session, "best", "kind").items()} == {
        "none": 0.01, "batch": 0.1, "batch at last": 0.1
    }  # fmt: skip
    (gain,) = answer(session, "gain_at_the_best_rate")
    assert (gain["measured"], gain["n"]) == (pytest.approx(0.82 - 0.62), 3)
    shares = answer(session, "share_of_the_gain", "kind")
    assert set(shares) == {"batch at last", "batch at the rate of none"}
    last, same = shares["batch at last"], shares["batch at the rate of none"]
    assert (last["measured"], last["n"]) == (pytest.approx(0.15 / 0.2), 2)  # one seed lacks a rate: 0.76 and 0.78
    assert (same["measured"], same["n"]) == (pytest.approx(0.01 / 0.2), 3)
    squared_error = 0.02**2 / 3  # of each mean; the derivatives of the ratio are 1, -0.05 and -0.95 over the gain
    error = math.sqrt((1 + 0.05**2 + 0.95**2) * squared_error) / 0.2
    assert same["high"] - same["measured"] == pytest.approx(4.302653 * error, rel=1e-5)


@pytest.mark.parametrize(("gain", "count"), [(0.065, 0), (0.075, 2)])
def test_a_gain_whose_interval_holds_zero_has_no_shares(gain, count, tmp_path):
    # The standard error is sqrt(2 * 0.02**2 / 3) = 0.0163, 4.303 of them are 0.0703; two of them would be 0.033.
    tests = [0.62 + gain + spread for spread in (-0.02, 0, 0.02)]
    session = session_with(tmp_path, RESULTS | {("batch", 0.1): [done(0.9, test) for test in tests]})
    assert len(answer(session, "share_of_the_gain")) == count
    (row,) = answer(session, "gain_at_the_best_rate")
    assert row["measured"] == pytest.approx(gain)
    assert (row["low"] > 0) == (count > 0)


def test_a_gain_that_test_images_could_make_by_chance_does_not_count(tmp_path):
    close = {("none", 0.01): [done(0.7, 0.62)] * 3, ("batch", 0.01): [done(0.9, 0.65)] * 3}
    assert judged_of(session_with(tmp_path, close)) == {("gain_at_the_best_rate",): ("not reproduced", 3)} | {
        ("share_of_the_gain", "batch at the rate of none"): ("not reproduced", 3)
    }


def test_without_held_out_images_no_rate_is_the_best(tmp_path):
    session = session_with(tmp_path, RESULTS, validation=0)
    assert answer(session, "best") == []
    assert answer(session, "gain_at_the_best_rate") == answer(session, "share_of_the_gain") == []
    assert answer(session, "largest_rate", "kind")["none"]["largest"] == pytest.approx(-2.0)


def test_diverged_trials_are_shares_and_never_accuracies(tmp_path):
    session = session_with(tmp_path, RESULTS)
    rows = answer(session, "accuracy_over_rate", "kind", "lr")
    assert {name: rows["none", 1.0][name] for name in ("n", "accuracy", "diverged", "untrained")} == {
        "n": 0, "accuracy": None, "diverged": 1.0, "untrained": 1.0
    }  # fmt: skip
    mixed = rows["batch", 1.0]
    assert (mixed["n"], mixed["accuracy"]) == (2, pytest.approx(0.99))
    assert (mixed["diverged"], mixed["untrained"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


OTHERS = {
    (kind, lr): [done(held_out, test + spread) for spread in (-0.01, 0, 0.01)] if held_out else [LOST] * 3
    for kind, lr, held_out, test in [
        ("group", 0.01, 0.8, 0.70), ("group", 0.1, 0.9, 0.79), ("group", 1.0, 0.7, 0.9), ("group", 3.0, 0, 0),
        ("layer", 0.01, 0.8, 0.30), ("layer", 0.1, 0, 0), ("layer", 1.0, 0, 0), ("layer", 3.0, 0, 0),
        ("instance", 0.01, 0, 0), ("instance", 0.1, 0, 0),
        ("renorm", 0.01, 0.8, 0.80), ("renorm", 0.1, 0.9, 0.81), ("renorm", 1.0, 0.7, 0.9),
    ]
}  # fmt: skip
NOT_AT_THREE = {("batch", 3.0): [LOST] * 3, ("none", 3.0): [LOST] * 3}


def test_norms_that_train_at_as_large_a_rate_are_compared_where_they_are_best(tmp_path):
    (row,) = answer(session_with(tmp_path, RESULTS | NOT_AT_THREE | OTHERS), "shortfall")
    # Layer norm does not train at 0.1, instance norm nowhere; renorm at the end of its rates, above batch norm's.
    assert (row["measured"], row["n"], row["n_as_large"]) == (pytest.approx(0.79 - 0.82), 3, 2)


def test_norms_are_not_compared_before_all_four_are_there(tmp_path):
    three = {key: each for key, each in OTHERS.items() if key[0] != "instance"}
    assert answer(session_with(tmp_path, RESULTS | NOT_AT_THREE | three), "shortfall") == []


def test_the_largest_rate_tried_does_not_decide_which_norms_train_at_as_large_a_rate(tmp_path):
    session = session_with(tmp_path, RESULTS | OTHERS)  # a seed of batch norm trains at 1, and nobody looked above
    (row,) = answer(session, "shortfall")
    assert (row["measured"], row["n"]) == (None, 0)
    assert answer(session, "largest_rate", "kind")["batch"]["at_top"] == 1
    gains = answer(session, "rate_gain", "kind")
    assert {kind: row["at_top"] for kind, row in gains.items()} == {
        "batch": 1, "batch at last": 0, "renorm": 3, "group": 0, "layer": 0, "instance": 0
    }  # fmt: skip


def test_a_seed_that_trains_without_norms_at_the_largest_rate_tried_has_no_gain(tmp_path):
    at_top = [done(0.6, 0.5), LOST, LOST]
    gains = answer(session_with(tmp_path, RESULTS | {("none", 1.0): at_top}), "rate_gain", "kind")
    assert (gains["batch"]["measured"], gains["batch"]["n"]) == (pytest.approx(1.0), 2)  # not the seed with 1


def test_a_seed_that_trains_at_no_rate_tried_is_counted_and_has_no_largest_rate(tmp_path):
    lost = {("none", 0.01): [LOST, done(0.7, 0.62), done(0.7, 0.64)]}
    lost |= {("layer", lr): [LOST] * 3 for lr in (0.01, 0.1, 1.0)}
    session = session_with(tmp_path, RESULTS | lost)
    largest = answer(session, "largest_rate", "kind")
    assert {kind: (largest[kind]["n"], largest[kind]["not_found"]) for kind in ("none", "layer", "batch")} == {
        "none": (2, 1), "layer": (0, 3), "batch": (3, 0)
    }  # fmt: skip
    assert (largest["none"]["largest"], largest["layer"]["largest"]) == (pytest.approx(-2.0), None)
    gains = answer(session, "rate_gain", "kind")
    assert {kind: (gains[kind]["n"], gains[kind]["not_found"]) for kind in ("layer", "batch")} == {
        "layer": (0, 3), "batch": (2, 1)
    }  # fmt: skip
    assert gains["layer"]["measured"] is None
    figure = next(each for each in study_of("bjorck_learning_rate").figures if each.query == "largest_rate")
    figures.render(figure, session.sql(queries_of("bjorck_learning_rate")["largest_rate"].sql), "python study.py")


def test_settings_of_another_axis_are_told_apart_and_never_counted_as_seeds(tmp_path):
    inits = [("weight_init", WeightInit(name)) for name in ("he_normal", "glorot_normal", "orthogonal")]
    one_seed = {(*key, 16, init): each[:1] for key, each in RESULTS.items() if key[0] != "last" for init in inits}
    session = session_with(tmp_path, one_seed)
    assert judged_of(session) == {}
    largest = answer(session, "largest_rate", "kind")
    assert {kind: row["n"] for kind, row in largest.items()} == {
        f"{norm}, weight_init={init}": 1 for norm in ("none", "batch") for _, init in inits
    }


def test_settings_of_one_norm_leave_the_others_their_names(tmp_path):
    session = session_of(tmp_path, "laptop", trend, "norm=none,group,batch", "groups=2,4", "seed=0,1,2")
    assert set(answer(session, "largest_rate", "kind")) == {
        "none", "batch", "batch at last", "group, groups=2", "group, groups=4"
    }  # fmt: skip
    assert judged_of(session)["rate_gain", "batch"] == ("reproduced", 3)


def trend(trial):
    """Without norms up to 0.01, with them up to 0.1: 10 points better."""
    bare = trial.norm is Norm.NONE
    return LOST if trial.lr > (0.01 if bare else 0.1) else done(0.8 if bare else 0.9, 0.8 if bare else 0.9)


def test_nothing_is_said_of_another_batch_size_while_the_compared_one_is_to_be_run(tmp_path):
    session = session_of(tmp_path, "laptop", lambda trial: trend(trial) if trial.batch == 12 else None)
    assert answer(session, "compared_size") == [{"batch": 48}]
    assert judged_of(session) == {}


def test_nothing_is_said_before_every_rate_has_been_tried(tmp_path):
    sets = ["norm=batch,none", "batch=12,48"]
    session = session_of(tmp_path, "laptop", lambda trial: trend(trial) if trial.lr < 0.3 else None, *sets)
    assert judged_of(session) == {}


def test_the_whole_laptop_preset_answers_its_trends(tmp_path):
    verdicts = judged_of(session_of(tmp_path, "laptop", trend))
    assert set(verdicts.values()) == {("reproduced", 3), ("not reproduced", 3)}
    assert {key for key, said in verdicts.items() if said[0] == "reproduced"} == (
        {("rate_gain", kind) for kind in ("batch", "batch at last", "group", "layer", "instance", "renorm")}
        | {("gain_at_the_best_rate",), ("shortfall",)}
    )  # all have one accuracy with norms: each keeps the whole gain, and small steps without norms none of it


PAPERS_RATES = "lr=0.1,0.03,0.003,0.0001"


def papers(trial):
    """The test accuracies of the paper's figure 1."""
    test = {(Norm.BATCH, 0.1): 0.933, (Norm.BATCH, 0.003): 0.904, (Norm.BATCH, 1e-4): 0.813, (Norm.NONE, 1e-4): 0.82}
    return done(0.8, test[trial.norm, trial.lr], 0.997) if (trial.norm, trial.lr) in test else LOST


LINES = [("batch", 0.1), ("batch", 0.003), ("batch", 1e-4), ("none", 1e-4)]


@pytest.mark.parametrize(
    ("sets", "judged"),
    [
        ([], LINES),
        (["trainable=output"], []),
        (["network=vgg_residual", "depth=38"], []),
        (["width=2"], []),
        (["weight_decay=0"], []),
        (["momentum=0"], []),
        (["weight_init=he_normal"], []),
        (["augmentation=none"], []),
        (["milestones=none"], []),
        (["lr_drop=0.2"], []),
        (["norm_batch=32"], LINES[-1:]),  # nothing to a network without norms
        (["output_bias=zero,random"], []),  # two settings of one seed
    ],
)
def test_the_papers_numbers_are_held_against_its_own_network_and_protocol_alone(sets, judged, tmp_path):
    sets = ["norm=batch,none", "placement=every", "batch=128", PAPERS_RATES, "seed=0,1,2", *sets]
    said = judged_of(session_of(tmp_path, "paper", papers, *sets))
    at_the_end = {tuple(row): each for (name, *row), each in said.items() if name == "accuracy_on_cifar10"}
    assert at_the_end == dict.fromkeys(judged, ("reproduced", 3))
    assert any(name.endswith("_on_cifar10") for name, *_ in said) == bool(judged)


@pytest.mark.parametrize(
    ("rates", "only", "verdict"),
    [
        ("lr=0.0003", 0.0, {}),
        ("lr=0.0003,0.001,0.003,0.01,0.03,0.1", 0.0, {("lost_on_cifar10",): ("reproduced", 3)}),
        ("lr=0.0003,0.001,0.003,0.01,0.03,0.1", 0.001, {}),  # one of them not yet run
    ],
)
def test_every_rate_above_the_smallest_diverges_is_said_of_all_of_them(rates, only, verdict, tmp_path):
    sets = ["norm=none", "placement=every", "batch=128", rates, "seed=0,1,2"]
    session = session_of(tmp_path, "paper", lambda trial: None if trial.lr == only else LOST, *sets)
    assert judged_of(session) == verdict


def test_small_batches_count_at_rates_up_to_the_best_without_norms(tmp_path):
    small = {
        ("none", 0.01, 8): [done(0.75, 0.79), done(0.75, 0.80), done(0.75, 0.81)],
        ("none", 0.1, 8): [done(0.99, 0.95)] * 3,
        ("none", 0.01, 32): [done(0.99, 0.95)] * 3,
        ("batch", 0.1, 8): [done(0.8, 0.7)] * 3,
    }
    session = session_with(tmp_path, RESULTS | small)
    (row,) = answer(session, "small_steps")
    assert (row["measured"], row["n"]) == (pytest.approx(0.80 - 0.82), 3)
    assert answer(session, "best", "kind")["batch"]["test"] == pytest.approx(0.82)  # of the compared batch size


def test_batch_sizes_are_compared_at_rates_that_all_of_them_were_tried_at(tmp_path):
    other = {
        ("batch", 0.1, 8): [done(0.8, 0.7)] * 3,
        ("batch", 0.01, 8): [done(0.85, 0.6)] * 3,
        ("none", 0.01, 8): [LOST] * 3,
    }
    rows = answer(session_with(tmp_path, RESULTS | other), "accuracy_over_batch", "kind", "batch")
    picked = {key: (row["lr"], row["n"], row["diverged"]) for key, row in rows.items()}
    assert picked == {
        ("batch", 8): (0.01, 3, 0.0), ("batch", 16): (0.1, 3, 0.0),
        ("none", 8): (0.01, 0, 1.0), ("none", 16): (0.01, 3, 0.0),
    }  # fmt: skip


def test_digits_say_nothing_about_the_papers_numbers(tmp_path):
    session = session_with(tmp_path, RESULTS)
    study, queries = study_of("bjorck_learning_rate"), queries_of("bjorck_learning_rate")
    judged = [report.judge(claim, session, queries) for claim in study.claims if "CIFAR-10" in claim.sentence]
    assert len(judged) == 15
    assert {each.verdict for each in judged} == {Verdict.NOT_ENOUGH_DATA}


def test_a_value_that_is_the_same_as_another_fields_follows_it_and_a_slip_of_the_pen_is_refused():
    fixed = TINY | {"pixels": Pixels.ORIGINAL}
    preset = Preset(fixed=fixed, scientific=grid(batch=[8, 16]), nuisance=[{}], seeds=[0])
    assert [(e.trial.batch, e.trial.norm_batch, e.nuisance) for e in plan(preset, original)] == [
        (8, 8, ""),
        (16, 16, ""),
    ]
    assert [e.trial.norm_batch for e in plan(preset.setting("norm_batch", [4]), original)] == [4, 4]
    wrong = Preset(fixed=fixed | {"norm_batch": Same("bacth")}, scientific=[{}], nuisance=[{}], seeds=[0])
    with pytest.raises(Refusal, match=r"are given no bacth; did you mean batch\?"):
        plan(wrong, original)
