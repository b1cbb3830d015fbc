"""What a user runs: the study's commands as processes, with real Ray, interrupted and killed as users and machines do.

One small piece of the laptop preset serves all: digits, 8 layers.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bnscale
from bnscale import cli
from bnscale.storage import storage
from bnscale.store import Manifest, Store
from bnscale.study.asked import Asked
from bnscale.trial import Outcome, Refusal

ROOT = Path(__file__).parents[1]
FILE = ROOT / "studies" / "frankle_depth.py"
PIECE = ["--preset", "laptop", "--set", "depth=8", "--set", "seed=0"]
FEW = [*PIECE, "--set", "lr=0.3", "--set", "epochs=none", "--set", "steps=4"]
SHORT = [*FEW, "--set", "trainable=bn,output"]  # 2 trials
GROWN = ["seed=0,1" if word == "seed=0" else word for word in SHORT]  # 4 trials
LONG = [*PIECE, "--set", "trainable=bn,output", "--set", "lr=0.1", "--set", "epochs=20"]  # 2 trials


def start(*words: str, folder: Path = ROOT) -> subprocess.Popen[str]:
    """The study file in a process group of its own, as a terminal gives it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, str(FILE), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what it said; nothing may come on stderr, least of all Ray's or a traceback."""
    output, errors = process.communicate(timeout=200)
    assert errors == ""
    return process.returncode, output


def inside(*words: str) -> int:
    """The study's command line in this process, which spares it seconds of imports. The exit code."""
    before = sys.argv, list(sys.path)
    sys.argv = [str(FILE), *words]
    sys.path.insert(0, str(FILE.parent))
    try:
        runpy.run_path(str(FILE), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv, sys.path[:] = before
    raise AssertionError("a command ends with SystemExit")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a run and what follows it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "results"


@pytest.fixture(scope="module")
def said(store: Path) -> str:
    """What a first run says, without a word about the preset."""
    code, output = finish(start(*SHORT[2:], "--store", str(store)))
    assert code == 0, output
    return output


def test_a_run_says_what_it_does_and_ends_with_claims_and_a_report(said: str, store: Path) -> None:
    lines = said.splitlines()
    assert lines[0].startswith("no GPU in this cluster: preset laptop. The paper's preset has 2 trials and would take")
    assert lines[1].startswith("frankle_depth, preset laptop: 2 trials, 0 done, 2 to train, about ")
    assert sum(line.startswith("finished resnet8-") for line in lines) == 2
    assert "At every depth BN only" in said
    assert "not enough data" in said
    report = store / "reports" / "frankle_depth-laptop"
    assert lines[-1] == f"report: {report / 'report.html'}"
    names = {path.name for path in report.iterdir()}
    assert {"report.html", "queries.sql", "accuracy_over_depth.png", "accuracy_over_depth.svg"} <= names


def test_the_results_answer_sql_from_the_shell_and_from_python(said: str, store: Path, capsys: Any) -> None:
    question = (
        "select trainable, max(accuracy) as best from curve join trials using (trial) where split = 'test' group by all"
    )
    rows = bnscale.open(store).sql(f"{question} order by all").rows
    assert [row[0] for row in rows] == ["bn", "output"]
    assert all(0 < row[1] < 1 for row in rows)
    capsys.readouterr()
    assert inside("sql", question, "--store", str(store)) == 0
    out = capsys.readouterr().out
    assert "trainable" in out.splitlines()[0]
    assert len(out.splitlines()) == 4
    assert inside("sql", "accuracy_over_depth", *SHORT, "--store", str(store)) == 0
    found = capsys.readouterr()
    assert len(found.out.splitlines()) == 4
    assert not found.err
    assert inside("sql", "accuracy_over_depth", *SHORT, "--set", "momentum=0.5", "--store", str(store)) == 0
    assert "none of the 2 trials of preset laptop is in " in capsys.readouterr().err


def test_bnscale_asks_and_exports_any_store(
    said: str, store: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bnscale", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code

    call("sql", "select count(*) from gamma", "--store", str(store))
    assert int(capsys.readouterr().out.splitlines()[-1]) > 0
    call("export", str(tmp_path / "all.duckdb"), "--store", str(store))
    assert (tmp_path / "all.duckdb").stat().st_size > 0


def test_plan_status_and_report_start_nothing(said: str, store: Path, capsys: Any, unstarted: None) -> None:
    before = contents(store)
    assert inside("plan", *GROWN, "--store", str(store), "--gpus", "1", "--cpus", "16") == 0
    planned = capsys.readouterr().out
    assert "4 trials, 2 done." in planned
    assert "On 1 GPU and 16 CPUs, each as fast as that: " in planned
    assert " hours for the 2 left, longest first, with 1 slot 100 % in use; " in planned
    assert inside("status", *GROWN, "--store", str(store)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 trials: 2 done, 2 missing"
    assert contents(store) == before
    assert inside("report", *SHORT, "--store", str(store)) == 0
    assert contents(store / "manifests") == {Path(name).name: b for name, b in before.items() if "manifests" in name}


def test_a_second_run_trains_nothing_and_a_grown_study_only_what_is_new(said: str, store: Path, capsys: Any) -> None:
    def readings() -> dict[str, bytes]:
        return {name: content for name, content in contents(store).items() if not name.startswith("reports")}

    before = readings()
    assert inside(*SHORT, "--store", str(store)) == 0
    assert "2 trials, 2 done, 0 to train" in capsys.readouterr().out
    assert readings() == before
    assert inside(*GROWN, "--address", "local", "--store", str(store)) == 0
    assert "4 trials, 2 done, 2 to train" in capsys.readouterr().out
    assert readings().items() > before.items()


def test_a_gang_of_two_measures_what_one_worker_measures(said: str, store: Path, tmp_path: Path) -> None:
    asked = [*FEW, "--set", "trainable=bn", "--workers-per-trial", "2", "--address", "local"]
    assert inside(*asked, "--store", str(tmp_path)) == 0
    gang, alone = bnscale.open(tmp_path), bnscale.open(store)
    assert gang.sql("select workers, backend from trials").rows == [(2, "deepspeed zero 0")]
    loss = (
        "select trial, curve.step, split, loss from curve join trials using (trial) where trainable = 'bn' and seed = 0"
    )
    theirs, ours = gang.sql(f"{loss} order by all").rows, alone.sql(f"{loss} order by all").rows
    assert [row[:3] for row in theirs] == [row[:3] for row in ours]
    assert {row[1] for row in ours} == {0, 4}
    assert [row[3] for row in theirs] == pytest.approx([row[3] for row in ours], rel=1e-4)  # summed in another order


@pytest.mark.timeout(400)
def test_a_study_in_a_bucket_has_the_tables_of_one_in_a_folder(
    said: str, store: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, output = finish(start(*SHORT, "--store", bucket, folder=tmp_path / "here"))
    assert code == 0, output
    report = "reports/frankle_depth-laptop"
    assert output.splitlines()[-1] == f"report: {report}/report.html, and in {bucket}/{report}"
    place = storage(bucket)
    assert {path.name for path in (tmp_path / "here" / report).iterdir()} == {
        key.rpartition("/")[2] for key in place.list(report)
    }
    assert {key.partition("/")[0] for key in place.list("")} >= {"manifests", "checkpoints", "curve", "reports"}
    ours, theirs = bnscale.open(bucket), bnscale.open(store)
    for table in ("curve", "gamma", "gamma_histogram", "clamp", "sparsity"):
        question = f"select {table}.* from {table} join trials using (trial) where seed = 0 order by all"
        assert ours.sql(question).rows, table
        assert repr(ours.sql(question).rows) == repr(theirs.sql(question).rows), table
    capsys.readouterr()
    assert inside(*SHORT, "--store", bucket) == 0
    assert "2 trials, 2 done, 0 to train" in capsys.readouterr().out
    assert inside("status", *SHORT, "--store", bucket) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 trials: 2 done"
    assert not (tmp_path / "here" / "results").exists()


# --- interrupted and killed -----------------------------------------------------------------------


def manifests(store: Path) -> dict[str, Manifest]:
    if not (store / "manifests").is_dir():
        return {}
    return {each.trial: each for each in Store.existing(store).manifests()}


def until(store: Path, process: subprocess.Popen[str], reached: Callable[[dict[str, Manifest]], bool]) -> None:
    deadline = time.monotonic() + 100
    while not reached(manifests(store)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, manifests(store)
        time.sleep(0.02)


def ended(found: dict[str, Manifest]) -> set[str]:
    return {trial for trial, each in found.items() if each.outcome is Outcome.FINISHED}


def running(found: dict[str, Manifest]) -> set[str]:
    """Trials that have trained a few steps and have more than half before them."""
    return {trial for trial, each in found.items() if each.outcome is None and 3 < each.step < each.total_steps / 2}


@pytest.mark.timeout(400)  # two runs of the study
def test_a_study_that_was_interrupted_says_how_to_go_on_and_goes_on(tmp_path: Path) -> None:
    words = [*LONG, "--save-every", "0", "--store", str(tmp_path)]
    process = start(*words)
    until(tmp_path, process, lambda found: len(running(found)) > 0)
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130
    assert "stopping: saving checkpoints" in output
    assert output.splitlines()[-1].startswith("stopped; every running trial has its checkpoint. To go on: python ")
    assert f"run {' '.join(LONG)} --store {tmp_path}" in output
    stopped = manifests(tmp_path)
    assert running(stopped)

    process = start(*words)
    until(tmp_path, process, lambda found: any(found[each].attempts == 2 for each in running(stopped)))
    assert all(manifests(tmp_path)[each].step >= stopped[each].step for each in running(stopped))
    code, output = finish(process)
    assert code == 0, output
    assert "2 trials, 0 done, 2 to train" in output
    assert len(ended(manifests(tmp_path))) == 2


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(address: str | None) -> None:
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr("bnscale.schedule.tune.connect", connect)


REFUSED = {
    "--set depth=15": "depth 15: a CIFAR ResNet has 6n+2 layers; try 14 or 20",
    "--set lr=-1": "lr -1: must be greater than 0",
    "--set lr=nan": "lr nan: must be a finite number",
    "--set lr=": "--set lr: the axis is empty; give it at least one value",
    "--set lr=fast": "lr 'fast': is text and must be a number",
    "--set sed=1": "--set sed: no such field; did you mean seed?",
    "--set data=digit": "data 'digit': must be one of",
    "--set milestones=a": "milestones 'a': must be shares of training, such as 0.5/0.75, or none",
    "--set lr=0.1 --set lr=0.3": "--set lr: given twice; give all its values at once",
    "--set validation=1437": "validation 1437: digits has 1437 training images, and some must be left",
    "--set depth": "--set depth: must be field=value",
    "--preset laptpo": "preset laptpo: must be one of laptop, paper; did you mean laptop?",
    "--workers-per-trial 5": "workers 5: must divide batch 48 into equal shares; try 4 or 6",
    "--data /no/such --set data=cifar10 --set validation=0 --set lr=0.1": "data cifar10: not found in /no/such, and",
    "--address 127.0.0.1:1": "address 127.0.0.1:1: no Ray cluster answers there",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_run_is_one_message_and_exit_code_2(
    words: str, tmp_path: Path, capsys: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    if "--address" not in words:
        request.getfixturevalue("unstarted")
    assert inside(*words.split(), "--store", str(tmp_path / "results")) == 2
    said = capsys.readouterr()
    assert said.err.startswith(REFUSED[words]), said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    left = [name for name in contents(tmp_path) if ".locks/" not in name]  # whether the store serves is tried first
    assert not left


def test_a_store_that_cannot_be_written_is_refused_before_anything_starts(
    tmp_path: Path, capsys: Any, unstarted: None
) -> None:
    (tmp_path / "file").write_text("mine")
    assert inside(*SHORT, "--store", str(tmp_path / "file" / "results")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"store {tmp_path / 'file' / 'results'}: cannot be written (")
    assert len(said.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_manifest_is_named_before_anything_starts(
    said: str, store: Path, tmp_path: Path, capsys: Any, unstarted: None
) -> None:
    damaged = Path(shutil.copytree(store, tmp_path / "results"))
    manifest = next((damaged / "manifests").glob("*-bn-*-s0-*.json"))
    manifest.write_text("{")
    capsys.readouterr()
    assert inside(*SHORT, "--store", str(damaged)) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"manifest {manifest}: is damaged")
    assert len(told.splitlines()) == 1
    assert inside("status", *SHORT, "--store", str(damaged)) == 0
    assert f"damaged: manifest {manifest}" in capsys.readouterr().out


def test_an_option_that_does_not_exist_is_refused(capsys: Any, unstarted: None) -> None:
    assert inside("--bogus", "1") == 2
    assert "No such option: --bogus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statement", "answer"),
    [
        ("drop table curve", "statement writes: DROP is refused"),
        ("copy curve to 'out.csv'", "statement writes: COPY is refused"),
        ("select accurcy from curve", "column accurcy: no such column in these tables; did you mean accuracy?"),
        ("selec 1", "query: "),
        ("acuracy_over_depth", "query acuracy_over_depth: the study's .sql file has no such query; did you mean"),
    ],
)
def test_a_question_that_writes_or_means_nothing_is_refused(
    said: str, store: Path, statement: str, answer: str, capsys: Any
) -> None:
    before = contents(store)
    capsys.readouterr()
    assert inside("sql", statement, *SHORT, "--store", str(store)) == 2
    answered = capsys.readouterr()
    assert answered.err.startswith(answer), answered.err
    assert answered.out == ""
    assert contents(store) == before


def test_a_store_that_is_not_there_has_no_answers(tmp_path: Path, capsys: Any) -> None:
    for command in (["sql", "select 1"], ["report"]):
        assert inside(*command, "--store", str(tmp_path / "none")) == 2
        assert "there is none; run a study that writes it" in capsys.readouterr().err
    with pytest.raises(Refusal):
        bnscale.open(tmp_path / "none")


def test_a_question_without_end_is_stopped(
    said: str, store: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = "select count(*) from range(10000000000) a, range(10000000000) b"
    monkeypatch.setattr(sys, "argv", ["bnscale", "sql", endless, "--seconds", "0.5", "--store", str(store)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("query: took longer than 0.5 s and was stopped")


def test_what_successive_halving_gave_up_stays_so_until_all_are_asked_for(
    said: str, store: Path, tmp_path: Path
) -> None:
    given_up = Path(shutil.copytree(store, tmp_path / "results"))
    manifest = next((given_up / "manifests").glob("*-bn-*-s0-*.json"))
    known = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(known | {"outcome": None}))
    Store(given_up).stop_early(known["trial"])
    sys.path.insert(0, str(FILE.parent))
    from frankle_depth import study

    sets = ["depth=8", "seed=0", "lr=0.3", "epochs=none", "steps=4", "trainable=bn,output"]
    asked = Asked.of(study, FILE, "laptop", sets, given_up, tmp_path)
    assert [trial.id for trial in asked.left(Store(given_up))] == [known["trial"]]
    assert asked.left(Store(given_up), asha=True) == []
    assert bnscale.open(given_up).sql("select trial from trials where stopped_early").rows == [(known["trial"],)]
