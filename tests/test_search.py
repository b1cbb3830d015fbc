"""A study that searches: bisection finds what there is to find in few trials, and goes on where it was stopped."""

import io
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import FIELDS, digits
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bnscale import query
from bnscale.data import Resident
from bnscale.probes import TABLES, Curve
from bnscale.store import Store
from bnscale.study import Bisection, Preset, Study, grid
from bnscale.study.asked import Asked
from bnscale.study.command import app
from bnscale.study.plan import plan, verdicts
from bnscale.study.run import Way, run
from bnscale.study.say import say_status
from bnscale.study.search import Bracket
from bnscale.trial import Augmentation, Data, Network, Norm, Outcome, Pixels, Refusal, Trainable, Trial

ROOT = Path(__file__).parents[1]


def lattice(**changes):
    return Bisection(**({"axis": "lr", "low": 0.01, "high": 1.0, "factor": 10**0.5, "verdict": "trains"} | changes))


def original(data):
    return Pixels.ORIGINAL


# --- bisection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 15, 16, 24, 31, 32, 33])
def test_bisection_finds_every_threshold_in_as_few_trials_as_there_are_bits(count):
    for threshold in range(count + 1):  # so many of the values train
        known = {}
        while places := Bracket.of(known, count).open:
            assert not known.keys() & set(places)
            known |= {place: place < threshold for place in places}
        bracket = Bracket.of(known, count)
        assert (bracket.trains, bracket.fails) == (threshold - 1, threshold)
        assert len(known) <= math.ceil(math.log2(count)) + 1
        assert len(known) <= Bracket.of({}, count).rounds


@pytest.mark.parametrize("count", [4, 5, 15, 24])
def test_the_ends_of_the_lattice_are_tried_only_where_nothing_else_is_left(count):
    for threshold in range(count + 1):
        known = {}
        while places := Bracket.of(known, count).open:
            known |= {place: place < threshold for place in places}
        assert (0 in known) == (threshold <= 1)  # all above it fail
        assert (count - 1 in known) == (threshold >= count - 1)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.dictionaries(st.integers(0, n - 1), st.booleans()),
                                                      st.lists(st.booleans(), min_size=n, max_size=n))))  # fmt: skip
def test_whatever_is_known_the_search_ends_beside_the_largest_value_that_trains(case):
    count, known, truth = case
    before, taken = Bracket.of(known, count), 0
    while places := Bracket.of(known, count).open:
        assert not known.keys() & set(places)
        known |= {place: truth[place] for place in places}
        taken += 1
    found = Bracket.of(known, count)
    assert taken <= before.rounds
    assert found.fails == found.trains + 1
    assert found.trains == max((place for place, good in known.items() if good), default=-1)
    assert found.fails == count or known[found.fails] is False


def test_a_value_that_trains_above_one_that_does_not_counts():
    assert Bracket.of({3: True, 5: False, 9: True, 12: False}, 15) == Bracket(9, 12)
    assert Bracket.of({3: False, 9: True}, 10) == Bracket(9, 10)


def test_the_lattice_follows_from_its_lowest_value_and_its_factor_and_reads_well():
    assert lattice().values == [0.01, 0.0316, 0.1, 0.316, 1.0]
    assert lattice(high=2.0).values == lattice().values
    assert lattice(high=10.0).values[:5] == lattice().values
    assert lattice(low=1e-6, high=10, factor=2).values[:5] == [1e-6, 2e-6, 4e-6, 8e-6, 1.6e-5]
    assert lattice().open({}) == [2]
    assert lattice().open({2: True, 3: True}) == [4]
    assert lattice().rounds == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"low": 1.0}, "^search lr: from 1 to 1: must go from above 0 to a greater number"),
        ({"low": 0.0}, "^search lr: from 0 to 1: must go from above 0"),
        ({"high": math.nan}, "^search lr: from 0.01 to nan: must go from above 0"),
        ({"factor": 1.0}, "^search lr: factor 1: must be at least 1.01.*try 2"),
        ({"factor": 0.5}, "^search lr: factor 0.5: must be at least 1.01"),
        ({"axis": "lrr"}, "^search lrr: no such field; did you mean lr?"),
    ],
)
def test_a_lattice_that_is_none_is_refused(changes, said):
    with pytest.raises(Refusal, match=said):
        lattice(**changes)


# --- a preset that searches -------------------------------------------------------------------------

FIXED = {k: v for k, v in FIELDS.items() if k not in ("pixels", "lr", "seed", "depth")}


def preset(**changes):
    whole = {
        "fixed": FIXED, "scientific": grid(depth=[8, 14]), "nuisance": grid(), "seeds": range(2), "search": lattice()
    }  # fmt: skip
    return Preset(**(whole | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scientific": grid(lr=[0.1])}, "^search lr: the preset sets lr too"),
        ({"nuisance": grid(lr=[0.1])}, "^search lr: the preset sets lr too"),
        ({"fixed": FIXED | {"lr": 0.1}}, "^search lr: the preset sets lr too"),
        ({"search": lattice(axis="seed")}, "^search seed: the preset sets seed too"),
        ({"nuisance": grid(momentum=[0.0, 0.9])}, "^search lr: momentum has 2 values to choose among"),
    ],
)
def test_an_axis_that_is_set_elsewhere_cannot_be_searched(changes, said):
    with pytest.raises(Refusal, match=said):
        preset(**changes)


def test_the_trials_of_a_search_differ_in_its_axis_and_share_a_cell():
    planned = plan(preset(), original)
    assert len(planned) == 2 * 2 * 5
    assert {(each.cell, each.trial.seed) for each in planned} == {(f"depth={d}", s) for d in (8, 14) for s in (0, 1)}
    assert {each.trial.lr for each in planned} == set(lattice().values)
    assert "-lr0.0316-" in planned[1].trial.id


def test_values_of_the_axis_take_the_place_of_the_search():
    plain = preset().setting("lr", [0.1, 0.2])
    assert plain.search is None
    assert {each.cell for each in plan(plain, original)} == {f"depth={d} lr={r}" for d in (8, 14) for r in (0.1, 0.2)}
    narrowed = preset().setting("depth", [8]).setting("seed", [7])
    assert narrowed.search == lattice()
    assert {(e.trial.depth, e.trial.seed) for e in plan(narrowed, original)} == {(8, 7)}


def test_what_trains_nothing_is_one_trial_whatever_the_rate():
    assert len(plan(preset(fixed=FIXED | {"trainable": Trainable.NONE}), original)) == 2 * 2


# --- what a store knows of it -----------------------------------------------------------------------

SQL = """
-- name: trains
-- One row per trial with a result.
select
    trials.trial,
    outcome = 'finished' and coalesce(arg_max_null(accuracy, curve.step) >= 0.2, false) as trains
from trials
left join curve on curve.trial = trials.trial and split = 'train'
where outcome in ('finished', 'diverged')
group by trials.trial, outcome
"""


def asking(folder: Path, sql: str = SQL, **changes) -> Study:
    (folder / "asking.sql").write_text(sql)
    return Study(
        name="asking", doc="What?", paper=preset(**changes), laptop=preset(**changes), probes={}, claims=[], figures=[]
    )


def commands(folder: Path, *words: str) -> None:
    """A command of the study, with its mistakes as they are raised."""
    given = [*words, "--preset", "laptop", "--store", str(folder / "results")]
    app(asking(folder), folder / "asking.py")(args=given, standalone_mode=False)


def ask(folder: Path, sql: str = SQL, sets: tuple[str, ...] = (), **changes) -> Asked:
    return Asked.of(
        asking(folder, sql, **changes), folder / "asking.py", "laptop", list(sets), folder / "results", folder
    )


def record(folder: Path, trial: Trial, outcome: Outcome, accuracy: float | None = None) -> None:
    writer = Store(folder / "results").writer(trial, {}, {})
    if accuracy is not None:
        writer.write("curve", [Curve(trial.total_steps, 1.0, "train", 100, 1.0, accuracy, 1.0)])
    writer.finish(outcome, trial.total_steps, {})


def rates(asked: Asked) -> set[tuple[int, int, float]]:
    return {(each.trial.depth, each.trial.seed, each.trial.lr) for search in asked.searches for each in search.next}


def trial(lr: float, seed: int = 0, depth: int = 8) -> Trial:
    return digits(lr=lr, seed=seed, depth=depth)


def test_what_comes_next_follows_from_the_store_and_only_from_results(tmp_path: Path) -> None:
    asked = ask(tmp_path)
    assert rates(asked) == {(depth, seed, 0.1) for depth in (8, 14) for seed in (0, 1)}
    assert asked.round == "round 1 of at most 3"
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)  # trains
    record(tmp_path, trial(0.1, seed=1), Outcome.FINISHED, 0.1)  # finished, and learned nothing
    record(tmp_path, trial(0.1, depth=14), Outcome.DIVERGED)
    record(tmp_path, trial(0.1, seed=1, depth=14), Outcome.FAILED)  # says nothing
    asked = asked.again()
    assert rates(asked) == {(8, 0, 0.316), (8, 1, 0.0316), (14, 0, 0.0316), (14, 1, 0.1)}
    assert asked.round == "round 1 of at most 3"
    record(tmp_path, trial(0.1, seed=1, depth=14), Outcome.DIVERGED)
    assert asked.again().round == "round 2 of at most 3"
    assert {t.id for t in asked.again().left(Store(tmp_path / "results"))} == {
        each.trial.id for search in asked.again().searches for each in search.next
    }


def test_brackets_say_where_each_search_is_and_what_was_tried(tmp_path: Path) -> None:
    for lr, outcome, accuracy in [(0.1, Outcome.FINISHED, 0.9), (0.316, Outcome.FINISHED, 0.1)]:
        record(tmp_path, trial(lr), outcome, accuracy)
    for lr in (0.1, 0.0316, 0.01):
        record(tmp_path, trial(lr, depth=14), Outcome.DIVERGED)
    record(tmp_path, trial(0.1, seed=1), Outcome.FINISHED, 0.9)
    session = ask(tmp_path).session()
    bracket = "select depth, seed, trains, fails, settled from bracket join trials using (trial) order by all"
    assert session.sql(bracket).rows == [(8, 0, 0.1, 0.316, True), (8, 1, 0.1, None, False), (14, 0, None, 0.01, True)]
    assert session.sql("select count(*), count(*) filter (where trains) from tried").rows == [(6, 2)]
    assert session.sql("select count(*) from plan").rows == [(6 + 1 + 1,)]  # and the next of two searches


def test_a_search_that_has_not_begun_has_a_row_without_ends_and_is_not_settled(tmp_path: Path) -> None:
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)
    record(tmp_path, trial(0.316), Outcome.DIVERGED)
    session = ask(tmp_path).session()
    rows = session.sql("select trial, trains, fails, settled from bracket order by settled desc, trial").rows
    to_come = sorted(trial(0.1, seed, depth).id for seed, depth in [(1, 8), (0, 14), (1, 14)])
    assert rows == [(trial(0.316).id, 0.1, 0.316, True), *((each, None, None, False) for each in to_come)]


def test_where_nothing_trains_the_map_says_that_nothing_was_found_and_gives_no_bound(tmp_path: Path) -> None:
    for lr in (0.1, 0.0316, 0.01):
        record(tmp_path, trial(lr), Outcome.DIVERGED)
    said = Console(record=True, width=200, quiet=False, file=io.StringIO())
    say_status(ask(tmp_path, sets=("depth=8", "seed=0")), said)
    assert said.export_text().splitlines()[1].rstrip().endswith("  not found")


def test_a_damaged_file_of_a_search_is_mended_by_what_the_refusal_names(tmp_path: Path) -> None:
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)
    (file,) = (tmp_path / "results" / "curve").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Refusal) as refused:
        ask(tmp_path)
    manifest = tmp_path / "results" / "manifests" / f"{trial(0.1).id}.json"
    assert f"{file}: has " in str(refused.value)
    assert f"; delete {manifest} to train the trial again; " in str(refused.value)
    manifest.unlink()
    assert (8, 0, 0.1) in rates(ask(tmp_path))
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)
    assert (8, 0, 0.316) in rates(ask(tmp_path))


@pytest.mark.parametrize("name", ["tried", "bracket", "plan", "student", "Trials", "trains"])
def test_a_table_and_a_query_may_be_asked_by_their_names(name: str, tmp_path: Path, capsys: Any) -> None:
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)
    commands(tmp_path, "sql", name)
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_a_name_that_is_neither_a_query_nor_a_table_is_refused_with_both_lists(tmp_path: Path) -> None:
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)
    with pytest.raises(Refusal, match=r"^query brackett: .* no such query\. .* table; did you mean bracket\? .*tried"):
        commands(tmp_path, "sql", "brackett")


def test_values_that_were_set_have_brackets_too(tmp_path: Path) -> None:
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)
    record(tmp_path, trial(0.25), Outcome.DIVERGED)
    session = ask(tmp_path, sets=("lr=0.1,0.25", "depth=8", "seed=0")).session()
    assert session.sql("select trains, fails, settled from bracket").rows == [(0.1, 0.25, True)]


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        (SQL.replace("name: trains", "name: train"), "^query trains: .* no such query; did you mean train?"),
        (
            SQL.replace(" as trains", " as good"),
            "^query trains: gives trial varchar, good boolean; .* trial and trains",
        ),
        (
            "-- name: trains\nselect trial, 1 as trains from trials",
            "^query trains: gives trial varchar, trains integer",
        ),
        (
            "-- name: trains\nselect trial, unnest([true, false]) as trains from trials",
            "^query trains: says of resnet8-bn-lr0.1-s0-.* that it trains and that it does not",
        ),
    ],
)
def test_a_verdict_that_is_none_is_refused(sql: str, said: str, tmp_path: Path) -> None:
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)
    with pytest.raises(Refusal, match=said):
        ask(tmp_path, sql)


def test_a_verdict_that_leaves_a_result_out_ends_the_run_and_does_not_spin(tmp_path: Path) -> None:
    record(tmp_path, trial(0.1), Outcome.FINISHED, 0.9)
    asked = ask(tmp_path, SQL.replace("group by", "and false group by"), sets=("depth=8", "seed=0"))
    with pytest.raises(Refusal, match="^query trains: says nothing of resnet8-bn-lr0.1-s0-"):
        run(asked, Way(), Console(quiet=True), by_cluster=False)


# --- a real study of a quadratic --------------------------------------------------------------------

# One matrix and half the squared error, added up over all vectors: gradient descent is stable below 2 / curvature.
QUADRATIC = """
'''How large a rate does a quadratic bear?'''
import sys
sys.path.insert(0, {studies!r})
from recipes import SANTURKAR_LINEAR
from bnscale.probes import curve, EPOCH
from bnscale.study import Bisection, Preset, Study, grid
from bnscale.trial import Norm, Trainable

def fragile(at):
    if at.trial.seed == 13:
        raise ArithmeticError("the probe broke")
    yield from ()

size = Preset(
    fixed=SANTURKAR_LINEAR | {{"norm": Norm.NONE, "trainable": Trainable.ALL, "steps": 60}},
    scientific=grid(depth=[1]),
    nuisance=grid(),
    seeds=[0, 1],
    search=Bisection(axis="lr", low=1e-3, high=8e-3, factor=2**0.5, verdict="trains"),
)
study = Study("quadratic", __doc__, size, size, {{curve: EPOCH, fragile: EPOCH}}, claims=[], figures=[])
if __name__ == "__main__":
    study.main()
"""
FALLS = """
-- name: trains
-- One row per trial with a result: whether its loss has fallen.
select
    trials.trial,
    outcome = 'finished' and coalesce(arg_max(loss, curve.step) < arg_min(loss, curve.step), false) as trains
from trials
left join curve on curve.trial = trials.trial and split = 'train'
where outcome in ('finished', 'diverged')
group by trials.trial, outcome
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "quadratic.py"
    file.write_text(QUADRATIC.format(studies=str(ROOT / "studies")))
    file.with_suffix(".sql").write_text(FALLS)
    return file


def start(file: Path, *words: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, str(file), *words, "--store", str(file.parent / "results")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, errors = process.communicate(timeout=200)
    assert errors == "", errors
    return process.returncode, output


def inside(file: Path, *words: str) -> int:
    """A command in this process, which spares it seconds of imports. The exit code."""
    before = sys.argv, list(sys.path)
    sys.argv = [str(file), *words, "--preset", "laptop", "--store", str(file.parent / "results")]
    try:
        runpy.run_path(str(file), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv, sys.path[:] = before
    raise AssertionError("a command ends with SystemExit")


def curvature() -> float:
    """The largest eigenvalue of X^T X over the vectors that the study trains on."""
    fields = {
        "data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "validation": 0, "network": Network.LINEAR,
        "depth": 1, "width": 10, "norm": Norm.NONE, "trainable": Trainable.ALL, "batch": 1000,
    }  # fmt: skip
    x_NK = Resident(digits(**fields), Path(), torch.device("cpu")).batch(0)[0].flatten(1).double().numpy()
    return float(np.linalg.eigvalsh(x_NK.T @ x_NK).max())


def test_plan_and_status_of_a_search_that_has_not_begun_start_nothing(study: Path, capsys: Any) -> None:
    assert inside(study, "plan") == 0
    said = capsys.readouterr().out
    assert "round 1 of at most 3 has 2 trials" in said
    assert "quadratic, preset laptop: at most 6 trials, 0 done." in said
    assert inside(study, "status") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["?..?", "?..?"]
    assert inside(study, "plan", "--set", "lr=0.001,0.002") == 0
    assert "quadratic, preset laptop: 4 trials, 0 done." in capsys.readouterr().out
    assert not (study.parent / "results").exists()


def test_successive_halving_of_a_search_is_refused_before_anything_starts(study: Path, capsys: Any) -> None:
    assert inside(study, "run", "--asha") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("--asha: this study searches for the largest lr that trains")
    assert len(said.err.splitlines()) == 1


@pytest.mark.timeout(300)  # two runs
def test_the_largest_rate_of_a_quadratic_is_two_over_its_curvature_also_where_the_search_was_stopped(
    study: Path, capsys: Any
) -> None:
    store = study.parent / "results"
    process = start(study, "run", "--preset", "laptop")
    deadline = time.monotonic() + 200
    while not (store / "manifests").is_dir() or len(Store.existing(store).manifests()) < 3:  # the second round
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130
    assert "quadratic, preset laptop: round 1 of at most 3, 2 trials, 0 done, 2 to train" in output
    stopped = {each.trial: each for each in Store.existing(store).manifests() if each.has_result}
    assert 2 <= len(stopped) < 6

    code, output = finish(start(study, "run", "--preset", "laptop"))
    assert code == 0, output
    assert "round 1 of" not in output
    assert "of at most 3, " in output
    after = {each.trial: each for each in Store.existing(store).manifests()}
    assert stopped.items() <= after.items()  # none is trained twice
    assert len(after) <= 6

    trains = verdicts(query.open(store, TABLES), "trains", FALLS)
    for seed in (0, 1):
        known = {each.recalled.lr: trains[each.trial] for each in after.values() if each.recalled.seed == seed}
        largest = max(rate for rate, good in known.items() if good)
        above = min(rate for rate, good in known.items() if not good)
        assert above / largest == pytest.approx(2**0.5, rel=0.01)
        assert largest < 2 / curvature() < above
    assert inside(study, "status") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == [f"{largest:g}"] * 2
    assert inside(study, "run") == 0  # which starts no cluster
    assert f"{len(after)} trials, {len(after)} done, 0 to train" in capsys.readouterr().out


def test_a_trial_that_fails_ends_the_search_and_the_run_says_so(study: Path, capsys: Any) -> None:
    assert inside(study, "run", "--set", "seed=13", "--address", "local") == 1
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.count("round 1 of at most 3") == 1
    assert "round 2" not in output
    assert "1 failed; running the study again tries them again:" in output
    assert "ArithmeticError: the probe broke" in output


def test_the_study_of_bjorcks_depths_is_declared_at_the_papers_size() -> None:
    sys.path.insert(0, str(ROOT / "studies"))
    from bjorck_depth import study as declared

    planned = [each.trial for each in plan(declared.paper, original)]
    assert {(t.data, t.batch, t.epochs) for t in planned} == {(Data.CIFAR10, 128, 3)}
    assert {t.depth for t in planned} == {20, 32, 44, 56, 80, 110}
    assert {str(t.norm) for t in planned} == {"none", "batch"}
    assert len(planned) == 6 * 2 * 4 * 3 * 24
    assert {1e-6, 0.00205, 8.39} <= {t.lr for t in planned}
