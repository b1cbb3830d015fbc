"""A study's grid: what is asked is what runs, each trial once, and test images choose nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from examples import FIELDS

from bnscale import cli, query
from bnscale.probes import TABLES, Curve
from bnscale.store import Store
from bnscale.study import Preset, grid
from bnscale.study.mistake import Twice
from bnscale.study.plan import commit, plan, relate, settings
from bnscale.trial import Augmentation, Data, Network, Outcome, Pixels, Refusal, Trainable, Trial


def original(data):
    return Pixels.ORIGINAL


FIXED = {k: v for k, v in FIELDS.items() if k not in ("pixels", "lr", "seed", "trainable")}


def preset(**changes):
    whole = Preset(
        fixed=FIXED,
        scientific=grid(depth=[8, 14, 20], trainable=[Trainable.BN, Trainable.ALL])
        + grid(width=[1, 2], trainable=[Trainable.BN]),
        nuisance=grid(lr=[0.1, 0.3]),
        seeds=range(2),
    )
    return replace(whole, **changes)


def cells(of):
    return {(t.depth, t.width, str(t.trainable)) for t in (each.trial for each in plan(of, original))}


# --- grids --------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes():
    assert grid(a=[1, 2], b="xy") == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"lr": []}, "^lr: the axis is empty"),
        ({"a": range(1000), "b": range(1000)}, "1,000,000 cells"),
    ],
)
def test_a_slip_of_the_pen_in_a_grid_is_refused(axes, said):
    with pytest.raises(Refusal, match=said):
        grid(**axes)


@pytest.mark.parametrize("values", [[0.1, 0.10], [1, 1.0]])
def test_a_value_that_stands_twice_on_its_axis_counts_once_with_a_word(values):
    with pytest.warns(Twice, match=f"^lr {values[0]}: stands 2 times on its axis and counts once$"):
        assert grid(lr=[*values, 3.0]) == [{"lr": values[0]}, {"lr": 3.0}]
    with pytest.warns(Twice, match="^--set lr 0.1: stands 2 times"):
        assert settings(["lr=0.1,0.10"]) == {"lr": [0.1]}


def test_a_trial_that_two_parts_of_a_grid_name_is_planned_once():
    planned = plan(preset(), original)
    assert len(planned) == (6 + 1) * 2 * 2
    assert len({each.trial.id for each in planned}) == len(planned)
    assert {e.cell for e in planned if (e.trial.depth, e.trial.trainable) == (8, Trainable.BN)} == {
        "depth=8 trainable=bn width=1",
        "depth=8 trainable=bn width=2",
    }


def test_an_axis_that_is_set_keeps_its_own_part_of_the_grid():
    assert cells(preset().setting("depth", [14])) == {(14, 1, "bn"), (14, 1, "all")}
    assert cells(preset().setting("width", [2])) == {(8, 2, "bn")}
    assert cells(preset().setting("trainable", [Trainable.ALL])) == {(8, 1, "all"), (14, 1, "all"), (20, 1, "all")}


def test_a_new_value_of_an_axis_gets_the_cells_that_all_others_have():
    assert cells(preset().setting("depth", [14, 32])) == {(d, 1, t) for d in (14, 32) for t in ("bn", "all")}


def test_axes_keep_their_order_when_one_is_set():
    several = preset(scientific=grid(width=[1, 2], depth=[8, 14], trainable=[Trainable.BN]))
    assert several.setting("depth", [14, 20]).setting("trainable", [Trainable.ALL]).axes == [
        "width", "depth", "trainable"
    ]  # fmt: skip


def test_a_study_without_nuisance_axes_answers_with_all_its_trials(tmp_path):
    bare = preset(
        fixed=FIXED | {"validation": 0}, scientific=grid(lr=[0.1, 0.3], trainable=[Trainable.BN]), nuisance=[{}]
    )
    planned = plan(bare, original)
    assert {(e.cell, e.nuisance) for e in planned} == {("lr=0.1 trainable=bn", ""), ("lr=0.3 trainable=bn", "")}
    store = Store(tmp_path)
    for each in planned:
        writer = store.writer(each.trial, {"curve": "1 epochs"}, {})
        writer.write("curve", [Curve(10, 0.1, "test", 100, 1.0, each.trial.lr, 1.0)])
        writer.finish(Outcome.FINISHED if each.trial.lr == 0.1 else Outcome.DIVERGED, 10, {})
    session = query.open(tmp_path, TABLES)
    relate(session, planned)
    rows = session.sql("select lr, seed, accuracy from chosen join trials using (trial) order by all").rows
    assert rows == [(0.1, 0, 0.1), (0.1, 1, 0.1), (0.3, 0, None), (0.3, 1, None)]


def test_a_fixed_field_is_replaced_by_one_value_and_becomes_an_axis_with_several():
    assert {e.trial.batch for e in plan(preset().setting("batch", [32]), original)} == {32}
    several = preset().setting("momentum", [0.0, 0.9])
    assert len(plan(several, original)) == 2 * len(plan(preset(), original))
    assert "momentum" in several.axes


def test_seeds_and_nuisance_axes_are_set_like_any_other():
    planned = plan(preset().setting("seed", [7]).setting("lr", [0.05]), original)
    assert {(e.trial.seed, e.trial.lr, e.nuisance) for e in planned} == {(7, 0.05, "lr=0.05")}


def test_a_cell_that_names_its_seed_is_trained_for_that_one_alone_until_seeds_are_asked_for():
    uneven = preset(
        scientific=grid(depth=[8]) + grid(depth=[14], seed=[0]),
        nuisance=grid(lr=[0.1]),
        fixed=FIXED | {"trainable": Trainable.ALL},
        seeds=range(3),
    )
    planned = [(each.cell, each.trial.seed) for each in plan(uneven, original)]
    assert planned == [("depth=8", 0), ("depth=8", 1), ("depth=8", 2), ("depth=14", 0)]
    asked = plan(uneven.setting("seed", [4, 5]), original)
    assert [(each.cell, each.trial.seed) for each in asked] == [
        ("depth=8", 4), ("depth=8", 5), ("depth=14", 4), ("depth=14", 5)
    ]  # fmt: skip


def test_a_cell_that_names_a_nuisance_axis_is_trained_at_its_own_value_and_chooses_none(tmp_path):
    whole = preset(
        scientific=grid(depth=[8]) + grid(depth=[8, 14], label_noise=[1.0], lr=[0.3]) + grid(depth=[8], lr=[0.1]),
        fixed=FIXED | {"trainable": Trainable.ALL},
        seeds=[0],
    )
    planned = plan(whole, original)
    assert [(each.cell, each.nuisance) for each in planned] == [
        ("depth=8 label_noise=0.0", "lr=0.1"),
        ("depth=8 label_noise=0.0", "lr=0.3"),
        ("depth=8 label_noise=1.0", "lr=0.3"),
        ("depth=14 label_noise=1.0", "lr=0.3"),
    ]
    assert whole.axes == ["depth", "label_noise"]
    assert whole.combinations == len(planned) + 1  # one of them twice: with a rate of its own, and with both
    asked = plan(whole.setting("lr", [0.05]), original)
    assert {(each.trial.lr, each.trial.label_noise) for each in asked} == {(0.05, 0.0), (0.05, 1.0)}


def test_a_new_value_gets_the_cells_that_all_others_have_whatever_their_seeds():
    both = grid(depth=[8, 14], lr=[0.1, 0.3])
    uneven = preset(
        scientific=both + grid(depth=[8], lr=[0.2], seed=[0]) + grid(depth=[20], lr=[0.1], seed=[1]),
        nuisance=[{}],
        fixed=FIXED | {"trainable": Trainable.ALL},
        seeds=range(3),
    )
    assert uneven.combinations == len(plan(uneven, original)) == 4 * 3 + 2
    assert uneven.setting("lr", [0.5]).scientific == [{"depth": 8, "lr": 0.5}]
    assert uneven.setting("depth", [26]).scientific == [{"depth": 26, "lr": 0.1}]
    assert uneven.setting("lr", [0.2, 0.5]).scientific == [
        {"depth": 8, "lr": 0.2, "seed": 0},
        {"depth": 8, "lr": 0.5},
    ]
    apart = preset(scientific=grid(depth=[8], lr=[0.1]) + grid(depth=[14], lr=[0.3]), nuisance=[{}], fixed=FIXED)
    with pytest.raises(Refusal, match="depth 20: the grid has cells for 8, 14 alone; try one of them"):
        apart.setting("depth", [20])


def test_settings_are_read_as_the_fields_types():
    assert settings(["depth=14,32", "trainable=bn,all", "lr=1e-1", "steps=none", "milestones=0.5/0.75"]) == {
        "depth": [14, 32],
        "trainable": [Trainable.BN, Trainable.ALL],
        "lr": [0.1],
        "steps": [None],
        "milestones": [(0.5, 0.75)],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("depth", "must be field=value"),
        ("dept=14", r"no such field; did you mean depth\?"),
        ("depth=", "the axis is empty"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(text, said):
    with pytest.raises(Refusal, match=said):
        settings([text])


def test_a_setting_with_a_bad_value_is_refused_by_the_trials_own_rule():
    for text, said in [("depth=15", "try 14 or 20"), ("trainable=b", "must be one of"), ("lr=abc", "must be a number")]:
        (axis, values), *_ = settings([text]).items()
        with pytest.raises(Refusal, match=said):
            plan(preset().setting(axis, values), original)


def test_several_values_to_choose_among_need_held_out_images():
    bare = preset(fixed=FIXED | {"validation": 0})
    with pytest.raises(Refusal, match=r"^validation 0: lr has 2 values .* test images choose nothing"):
        plan(bare, original)
    assert plan(bare.setting("lr", [0.1]), original)


def test_a_grid_without_end_is_refused_before_it_is_built():
    with pytest.raises(Refusal, match="trials; 100,000 at most"):
        plan(preset(seeds=range(10**7)), original)


# --- what was chosen ----------------------------------------------------------------------------


def store_with(folder: Path, results: dict[tuple[float, int], tuple[Outcome, float, float]]):
    """A store of one cell; results by (lr, seed): outcome, validation and test accuracy."""
    planned = plan(preset(scientific=grid(depth=[8], trainable=[Trainable.BN])), original)
    store = Store(folder)
    for each in planned:
        outcome, validation, test = results[each.trial.lr, each.trial.seed]
        writer = store.writer(each.trial, {"curve": "1 epochs"}, {})
        for step, shift in [(0, -0.05), (10, 0.0)]:
            for split, accuracy in [("validation", validation), ("test", test)]:
                writer.write("curve", [Curve(step, 0.1, split, 100, 1.0, accuracy + shift, 1.0)])
        writer.finish(outcome, 10, {})
    session = query.open(folder, TABLES)
    relate(session, planned)
    return session


DONE = Outcome.FINISHED


def test_the_nuisance_value_is_chosen_on_validation_images_and_test_images_choose_nothing(tmp_path):
    session = store_with(
        tmp_path,
        {
            (0.1, 0): (DONE, 0.7, 0.2),
            (0.1, 1): (DONE, 0.7, 0.3),
            (0.3, 0): (DONE, 0.6, 0.9),
            (0.3, 1): (DONE, 0.6, 0.9),
        },
    )
    chosen = session.sql("select nuisance, seed, accuracy from chosen join trials using (trial) order by seed").rows
    assert chosen == [("lr=0.1", 0, 0.2), ("lr=0.1", 1, 0.3)]


def test_a_regression_has_no_accuracy_and_its_nuisance_value_is_chosen_by_the_held_out_loss(tmp_path):
    fields = FIXED | {
        "data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "network": Network.LINEAR, "width": 10,
        "trainable": Trainable.ALL,
    }  # fmt: skip
    planned = plan(preset(fixed=fields, scientific=grid(depth=[8])), original)
    store = Store(tmp_path)
    for each in planned:
        writer = store.writer(each.trial, {"curve": "1 epochs"}, {})
        held_out, tested = (2.0, 9.0) if each.trial.lr == 0.1 else (3.0, 1.0)
        for split, loss in [("validation", held_out), ("test", tested)]:
            writer.write("curve", [Curve(10, 0.1, split, 100, loss, None, None)])
        writer.finish(DONE, 10, {})
    session = query.open(tmp_path, TABLES)
    relate(session, planned)
    assert session.sql("select distinct nuisance, avg(accuracy) from chosen group by all").rows == [("lr=0.1", None)]


def test_a_value_at_which_a_seed_diverged_is_never_chosen_before_one_at_which_none_did(tmp_path):
    session = store_with(
        tmp_path,
        {
            (0.1, 0): (DONE, 0.5, 0.5),
            (0.1, 1): (DONE, 0.5, 0.5),
            (0.3, 0): (DONE, 0.9, 0.9),
            (0.3, 1): (Outcome.DIVERGED, float("nan"), float("nan")),
        },
    )
    assert {row[0] for row in session.sql("select nuisance from chosen").rows} == {"lr=0.1"}


def test_where_every_value_diverged_the_cell_stays_and_its_accuracy_is_missing(tmp_path):
    bad = (Outcome.DIVERGED, float("nan"), float("nan"))
    session = store_with(tmp_path, dict.fromkeys([(0.1, 0), (0.1, 1), (0.3, 0), (0.3, 1)], bad))
    assert session.sql("select count(*), count(accuracy) from chosen").rows == [(2, 0)]


def test_failed_and_missing_trials_answer_nothing(tmp_path):
    failed = (Outcome.FAILED, 0.9, 0.9)
    session = store_with(
        tmp_path, {(0.1, 0): failed, (0.1, 1): failed, (0.3, 0): (DONE, 0.5, 0.5), (0.3, 1): (DONE, 0.5, 0.5)}
    )
    assert {row[0] for row in session.sql("select nuisance from chosen").rows} == {"lr=0.3"}


def test_a_value_that_lacks_a_seed_is_not_chosen_before_one_that_has_all(tmp_path):
    session = store_with(
        tmp_path,
        {
            (0.1, 0): (DONE, 0.7, 0.7),
            (0.1, 1): (DONE, 0.8, 0.8),
            (0.3, 0): (Outcome.FAILED, 0.1, 0.1),
            (0.3, 1): (DONE, 0.76, 0.76),
        },
    )
    assert {row[0] for row in session.sql("select nuisance from chosen").rows} == {"lr=0.1"}


def test_a_value_without_a_result_is_not_chosen_before_one_that_diverged(tmp_path):
    failed, bad = (Outcome.FAILED, 0.9, 0.9), (Outcome.DIVERGED, float("nan"), float("nan"))
    session = store_with(tmp_path, {(0.1, 0): failed, (0.1, 1): failed, (0.3, 0): (DONE, 0.5, 0.5), (0.3, 1): bad})
    assert session.sql("select distinct nuisance from chosen").rows == [("lr=0.3",)]


def test_what_trains_nothing_is_planned_once_whatever_the_learning_rate():
    planned = plan(preset(scientific=grid(depth=[8], trainable=[Trainable.BN, Trainable.NONE])), original)
    assert sorted((str(e.trial.trainable), e.trial.lr, e.trial.seed) for e in planned) == [
        ("bn", 0.1, 0), ("bn", 0.1, 1), ("bn", 0.3, 0), ("bn", 0.3, 1), ("none", 0.1, 0), ("none", 0.1, 1)
    ]  # fmt: skip


# --- mistakes in a study file -------------------------------------------------------------------

STUDY = """
from bnscale.study import grid
{line}
"""
MISTAKES = {
    "grid(lr=[])": "line 3: lr: the axis is empty; give it at least one value",
    "undefined": "line 3: NameError: name 'undefined' is not defined",
    "def (:": "line 3: SyntaxError: invalid syntax",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_in_a_study_file_is_one_line_and_exit_code_2(line, tmp_path, monkeypatch, capsys):
    file = tmp_path / "wrong.py"
    file.write_text(STUDY.format(line=line))
    monkeypatch.setattr(sys, "argv", ["bnscale", "study", str(file)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{file}, {MISTAKES[line]}\n"


@pytest.mark.parametrize("line", ["grid(lr=[])", "undefined"])
def test_so_it_is_where_python_itself_runs_the_file(line, tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(STUDY.format(line=line))
    run = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == f"{file}, {MISTAKES[line]}\n"


def test_an_error_that_is_ours_keeps_its_traceback(tmp_path, monkeypatch):
    file = tmp_path / "right.py"
    file.write_text("import json\njson.loads('{')\n")
    monkeypatch.setattr(sys, "argv", ["bnscale", "study", str(file)])
    with pytest.raises(ValueError, match="Expecting property name"):
        cli.main()


def test_the_commit_is_named_and_marked_where_files_were_changed(tmp_path):
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    clean = commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == clean + "+"


def test_the_imagenet_protocol_is_declared_in_fields_that_trials_have():
    sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
    from recipes import FRANKLE_CIFAR, FRANKLE_IMAGENET

    trial = Trial(
        **(FIELDS | FRANKLE_CIFAR | FRANKLE_IMAGENET | {"depth": 50, "validation": 0, "pixels": Pixels.ORIGINAL})
    )
    by_epoch = {epoch: trial.rate(epoch * trial.steps_per_epoch) for epoch in (0, 5, 29, 31, 61, 81)}
    assert by_epoch[0] < by_epoch[5] / 5  # warm-up
    assert [by_epoch[epoch] for epoch in (5, 29, 31, 61, 81)] == pytest.approx([0.4, 0.4, 0.04, 0.004, 0.0004])


def test_the_papers_study_is_declared_at_the_papers_size():
    sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
    from frankle_depth import study

    planned = plan(study.paper, original)
    assert {e.trial.depth for e in planned} == {14, 32, 56, 110, 218, 434, 866}
    assert {e.trial.width for e in planned if e.trial.depth == 14} == {1, 2, 4, 8, 16, 32}
    assert {e.trial.trainable for e in planned} == set(Trainable) - {
        Trainable.GAMMA, Trainable.BETA, Trainable.WEIGHTS
    }  # fmt: skip
    assert {(e.trial.epochs, e.trial.batch, e.trial.data) for e in planned} == {(160, 128, Data.CIFAR10)}
    assert len({e.trial.seed for e in planned}) == 5
    assert len(planned) == (7 + 5) * (7 * 4 + 1) * 5  # what trains nothing has no learning rate


def test_random_matrices_are_declared_at_the_papers_size():
    sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
    from random_matrices import study

    planned = [each.trial for each in plan(study.paper, original)]
    assert {(t.network, t.width, t.steps, str(t.weight_init)) for t in planned} == {("linear", 1000, 0, "gaussian")}
    assert {(t.depth, str(t.norm)) for t in planned} == {(m, "none") for m in range(1, 6)} | {
        (m, "batch") for m in range(2, 6)
    }
    assert len(planned) == 9 * 10  # ten repeats


def test_the_command_that_a_manifest_keeps_names_no_absolute_path(tmp_path, monkeypatch):
    from bnscale.study.asked import Asked

    file = Path(__file__).parents[1] / "studies" / "frankle_depth.py"
    sys.path.insert(0, str(file.parent))
    from frankle_depth import study

    monkeypatch.chdir(tmp_path)
    sets = ["depth=14", "width=1", "seed=0", "trainable=bn", "lr=0.1"]
    asked = Asked.of(study, file, "paper", sets, tmp_path / "results", tmp_path / "data")
    assert str(tmp_path / "data") in asked.words
    assert asked.recipe == [
        *("python", "frankle_depth.py", "run", "--preset", "paper"),
        *(word for each in sets for word in ("--set", each)),
    ]
