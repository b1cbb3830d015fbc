"""What users get wrong, and what is wrong with their data: told in a sentence before anything starts, or done once."""

import contextlib
import gzip
import hashlib
import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from asking import WARM, Told, bnscale, study_file, train
from examples import digits
from pictures import write_idx

from bnscale import data
from bnscale.choices import _FACTS as FACTS
from bnscale.data import prepare
from bnscale.store import Store
from bnscale.trial import Data, Outcome, Refusal

# --- 38: a value that cannot be --------------------------------------------------------------------

WRONG = {
    "depth=15": "depth 15: a CIFAR ResNet has 6n+2 layers; try 14 or 20",
    "lr=-1": "lr -1: must be greater than 0",
    "lr='0.1'": """lr "'0.1'": is text and must be a number""",
    "lr=nan": "lr nan: must be a finite number",
    "sed=1": "--set sed: no such field; did you mean seed?",
    "lr=": "--set lr: the axis is empty; give it at least one value",
    "norm=btach": "norm 'btach': must be one of none, batch, ",
    "norm_batch=5": "norm_batch 5: must divide batch 16; try 4",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_file(tmp_path_factory.mktemp("study"), cells="grid(trainable=[Trainable.BN])")


@pytest.mark.parametrize("setting", WRONG)
def test_38_a_value_that_cannot_be_run_is_one_sentence_with_a_way_out(
    study: Path, tmp_path: Path, setting: str
) -> None:
    for command in ("plan", "run"):
        told = bnscale("study", study, command, "--preset", "laptop", "--set", setting, "--store", tmp_path / "store")
        assert (told.code, told.out) == (2, ""), command
        assert told.err.startswith(WRONG[setting])
        assert len(told.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("grid(lr=['0.1'])", "lr '0.1': is text and must be a number; write lr=0.1 without quotes"),
        ("grid(trainable=['bn'])", "trainable 'bn': is text and must be Trainable.BN"),
        ("grid(lr=[])", "line 16: lr: the axis is empty; give it at least one value"),
        ("grid(dept=[14])", "dept: no such field; did you mean depth?"),
    ],
)
def test_38_so_it_is_where_the_study_file_says_it(tmp_path: Path, cells: str, said: str) -> None:
    told = bnscale("study", study_file(tmp_path, cells), "plan", "--preset", "laptop", "--store", tmp_path / "store")
    assert (told.code, told.out) == (2, "")
    assert said in told.err
    assert len(told.err.splitlines()) <= 2  # `dept` leaves `trainable` missing too


def test_38_a_value_that_stands_twice_is_merged_with_a_word(study: Path, tmp_path: Path) -> None:
    words = ("status", "--preset", "laptop", "--store", tmp_path / "store")
    with pytest.warns(UserWarning, match=r"^--set lr 0.1: stands 2 times on its axis and counts once$"):
        told = bnscale("study", study, *words, "--set", "lr=0.1,0.10")
    assert told.code == 0
    assert told.out.splitlines()[-1] == "2 trials: 2 missing"  # two seeds
    doubled = study_file(tmp_path, "2 * grid(trainable=[Trainable.BN])")
    told = bnscale("study", doubled, "plan", "--preset", "laptop", "--store", tmp_path / "store")
    assert "2 trials (2 more would be the same training again), 0 done" in told.out


# --- 40, 41: columns that change -------------------------------------------------------------------


@dataclass(frozen=True)
class Mine:
    step: int
    sharpness: float


@dataclass(frozen=True)
class Worded:
    step: int
    sharpness: str


@dataclass(frozen=True)
class Renamed:
    step: int
    flatness: float


def sql(store: Path, question: str, *words: str) -> Told:
    return bnscale("sql", question, "--store", store, *words)


def answer(told: Told) -> list[str]:
    """The rows of an answer, less its two lines of heading."""
    assert told.code == 0, told.err
    return [" ".join(line.split()) for line in told.out.splitlines()[2:]]


def test_40_a_metric_that_becomes_a_word_is_refused_when_it_is_written_and_spoils_no_other_trial(
    tmp_path: Path,
) -> None:
    good, bad = digits(), digits(seed=1)
    writer = Store(tmp_path).writer(good, {}, {})
    writer.write("mine", [Mine(0, 0.5), Mine(1, 1.5)])
    writer.finish(Outcome.FINISHED, 10, {})
    writer = Store(tmp_path).writer(bad, {}, {})
    writer.write("mine", [Mine(0, 2.5)])
    for row in (Worded(1, "high"), Mine(1, "high")):  # type: ignore[arg-type]
        with pytest.raises(Refusal, match=rf"^trial {bad.id}, table mine.*(Worded|sharpness)"):
            writer.write("mine", [row])
    writer.flush(1)
    again = Store(tmp_path).writer(bad, {}, {})
    with pytest.raises(Refusal, match=rf"^trial {bad.id}, table mine, column sharpness: is varchar and was double"):
        again.write("mine", [Worded(1, "high")])
    told = sql(tmp_path, "select typeof(max(sharpness)), max(sharpness) from mine")
    assert answer(told) == ["DOUBLE 2.5"]


def test_41_a_metric_that_comes_late_or_goes_is_null_elsewhere(tmp_path: Path) -> None:
    before, after, between = digits(), digits(seed=1), digits(seed=2)
    for trial, row in ((before, Mine(0, 0.5)), (after, Renamed(0, 9.5))):
        writer = Store(tmp_path).writer(trial, {}, {})
        writer.write("mine", [row])
        writer.finish(Outcome.FINISHED, 10, {})
    for row in (Mine(0, 0.25), Renamed(1, 7.5)):  # the code changed between two attempts
        writer = Store(tmp_path).writer(between, {}, {})
        writer.write("mine", [row])
        writer.flush(row.step + 1)
    question = "select seed, mine.step, sharpness, flatness from mine join trials using (trial) order by all"
    rows = ["0 0 0.5", "1 0 9.5", "2 0 0.25", "2 1 7.5"]
    assert answer(sql(tmp_path, question)) == rows
    assert answer(sql(tmp_path, "select count(sharpness), count(flatness), count(*) from mine")) == ["2 2 4"]
    writer.finish(Outcome.FINISHED, 10, {})  # merged into one file with both columns
    assert answer(sql(tmp_path, question)) == rows


# --- 42: questions ---------------------------------------------------------------------------------

ENDLESS = "select count(*) from range(100000000000) a, range(100000000000) b"
QUESTIONS = {
    "selec depth from trials": 'syntax error at or near "selec"',
    "select acuracy from curve": "column acuracy: no such column in these tables; did you mean accuracy?",
    "from curv": "table curv: no such table; did you mean curve?",
    "drop table trials": "statement writes: DROP is refused; results are read-only",
    "copy trials to '{}/x.csv'": "statement writes: COPY is refused",
    "attach '{}/x.duckdb'": "statement writes: ATTACH is refused",
    ENDLESS: "took longer than 0.5 s and was stopped; ask for less, or give it more seconds",
    "from range(1000000000)": "has more than 1,000 rows; add `limit 1000`, or aggregate",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one trial, really trained."""
    store = tmp_path_factory.mktemp("trained")
    train(digits(), store)
    return store


@pytest.mark.parametrize("question", QUESTIONS)
def test_42_a_question_that_is_wrong_writes_or_never_ends_is_one_sentence(trained: Path, question: str) -> None:
    before = sorted(trained.rglob("*"))
    began = time.monotonic()
    told = sql(trained, question.format(trained), "--seconds", "0.5", "--rows", "1000")
    assert (told.code, told.out) == (2, "")
    assert QUESTIONS[question] in told.err
    assert len(told.err.splitlines()) == 1
    assert time.monotonic() - began < 60  # not for ever
    assert sorted(trained.rglob("*")) == before


# --- 43: a study with nothing, with failures alone, with one seed ----------------------------------


def fail(store: Path) -> None:
    Store(store).writer(digits(), {}, {}).finish(Outcome.FAILED, 0, {"error": "no such kernel"})


def nothing(store: Path) -> None:
    Store(store)


CASES: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "no trial": ("[]", "range(2)", nothing, "0 trials: none is planned"),
    "failures alone": ("grid(trainable=[Trainable.BN])", "range(1)", fail, "1 trials: 1 failed"),
    "one seed": (
        "grid(trainable=[Trainable.BN])",
        "range(1)",
        lambda store: train(digits(), store),
        "1 trials: 1 done",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_43_every_command_works_and_intervals_are_null_for_a_study_with(case: str, tmp_path: Path) -> None:
    cells, seeds, fill, state = CASES[case]
    file, store = study_file(tmp_path, cells, seeds), tmp_path / "store"
    fill(store)

    def ask(*words: object) -> str:
        told = bnscale("study", file, *words, "--preset", "laptop", "--store", store)
        assert told.code == 0, told.err
        return told.out

    assert "trials, " in ask("plan")
    assert ask("status").splitlines()[-1] == state
    assert "not enough data" in ask("report")
    assert (store / "reports" / "tiny-laptop" / "report.html").stat().st_size > 0
    rows = ask("sql", "accuracy").splitlines()[2:]
    assert len(rows) == (case == "one seed")
    if case != "failures alone":  # it would be tried again, on a cluster
        assert " 0 to train" in ask("run")
    for table in ("trials", "cells", "curve", "gamma"):
        assert sql(store, f"from {table}").code == 0
    bounds = "test_low is null and test_high is null and validation_low is null and validation_high is null"
    counts = sql(store, f"select count(*), count(*) filter ({bounds}), count(test_mean) from cells")
    assert answer(counts) == {"no trial": ["0 0 0"], "failures alone": ["1 1 0"], "one seed": ["1 1 1"]}[case]
    assert bnscale("export", tmp_path / "all.duckdb", "--store", store).code == 0
    if case == "failures alone":
        assert answer(sql(store, "select outcome, error from trials")) == ["failed no such kernel"]


# --- 44: data sets ---------------------------------------------------------------------------------


class Fetch:
    """A process that lacks the data of MNIST, in small, and fetches it from a mirror."""

    def __init__(self, mirror: str, sums: list[tuple[str, str]], folder: Path) -> None:
        self.end, there = WARM.Pipe()
        self.process = WARM.Process(target=_fetch, args=(there, mirror, sums, folder), daemon=True)
        self.process.start()
        there.close()

    def said(self) -> str | None:
        """What it ended with: a refusal, or None."""
        assert self.end.poll(100)
        said: str | None = self.end.recv()
        self.close()
        return said

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.end.close()


def _fetch(end: Connection, mirror: str, sums: list[tuple[str, str]], folder: Path) -> None:
    from torchvision import datasets

    FACTS[Data.MNIST] = Data.MNIST.facts._replace(train=20, test=6)
    setattr(datasets.MNIST, "mirrors", [mirror])  # noqa: B010 - untyped
    setattr(datasets.MNIST, "resources", sums)  # noqa: B010
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # a bar of progress
            prepare(digits(data=Data.MNIST, validation=0), folder)
        end.send(None)
    except Refusal as refusal:
        end.send(str(refusal))


class Mirror:
    """A server of MNIST's four files in small. What it serves of each may be cut short or held back."""

    def __init__(self, folder: Path) -> None:
        write_idx(folder, Data.MNIST)
        self.home = folder / "MNIST" / "raw"
        for file in list(self.home.iterdir()):
            (self.home / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
        self.sums = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in sorted(self.home.iterdir())]
        self.asked: list[str] = []
        self.cut: set[str] = set()  # names of which half is sent
        self.waiting, self.go_on = threading.Event(), threading.Event()  # before the last file
        self.go_on.set()
        mirror = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                if mirror.sums[-1][0] in self.path:
                    mirror.waiting.set()
                    mirror.go_on.wait(60)
                super().do_GET()

            def copyfile(self, source: Any, outputfile: Any) -> None:
                content = source.read()
                short = self.path.strip("/") in mirror.cut
                outputfile.write(content[: len(content) // 2] if short else content)

            def log_message(self, *words: Any) -> None:
                pass

        handler = partial(Handler, directory=str(self.home))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fetch(self, folder: Path, sums: list[tuple[str, str]] | None = None) -> Fetch:
        return Fetch(f"http://127.0.0.1:{self.server.server_port}/", sums or self.sums, folder)


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    mirror = Mirror(tmp_path / "served")
    yield mirror
    mirror.go_on.set()
    mirror.server.shutdown()
    mirror.server.server_close()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".mnist.lock"}


PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
WHOLE = {f"MNIST/raw/{part}-ubyte" for part in PARTS}


def test_44_two_that_lack_a_data_set_download_it_once_and_a_killed_download_is_never_taken_for_one(
    mirror: Mirror, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    mirror.go_on.clear()
    killed = mirror.fetch(folder)
    assert mirror.waiting.wait(100)
    assert not files(folder) & WHOLE  # a process that looks now sees nothing, rather than half of it
    killed.close()
    mirror.asked.clear()
    mirror.go_on.set()
    both = [mirror.fetch(folder) for _ in range(2)]
    assert [each.said() for each in both] == [None, None]
    # torchvision asks for a file twice, the first time only to learn where its address leads.
    assert sorted(mirror.asked) == sorted(2 * [f"/{name}" for name, _ in mirror.sums])
    assert files(folder) == WHOLE
    file = folder / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert mirror.fetch(folder).said() is None
    assert file.read_bytes() == whole


def test_44_half_a_file_and_a_wrong_sum_are_refused_with_the_synthetic_set_offered(
    mirror: Mirror, tmp_path: Path
) -> None:
    mirror.cut.add(mirror.sums[1][0])
    half = mirror.fetch(tmp_path / "half")
    wrong = mirror.fetch(tmp_path / "wrong", [(name, "0" * 32) for name, _ in mirror.sums])
    for fetch, folder in ((half, tmp_path / "half"), (wrong, tmp_path / "wrong")):
        said = fetch.said()
        assert said is not None
        assert said.startswith(f"data mnist: not found in {folder}, and it could not be downloaded (Error downloading")
        assert said.endswith("or use data=digits, which needs no files")
        assert len(said.splitlines()) == 1
        assert files(folder) == set()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(FACTS, Data.MNIST, Data.MNIST.facts._replace(train=20, test=6))
    data._load.cache_clear()
    yield
    data._load.cache_clear()


def refuse(*words: object, **more: object) -> None:
    raise OSError("no network")


@pytest.mark.usefixtures("small")
def test_44_a_read_only_folder_is_read_and_one_without_the_data_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    trial = digits(data=Data.MNIST, validation=0)
    with pytest.raises(Refusal, match=r"^data mnist: not found in .*\(.*no network.*use data=digits"):
        prepare(trial, tmp_path)
    with pytest.raises(Refusal, match=r"^data mnist: not found in /proc/data, .*use data=digits"):
        prepare(trial, Path("/proc/data"))  # even root makes no folder there
    write_idx(tmp_path / "there", Data.MNIST)
    monkeypatch.setattr(data, "FileLock", refuse)  # what is there is read without a lock, a folder or a network
    prepare(trial, tmp_path / "there")
