"""Several trials in one pass, and several passes on one GPU, as the schedule has them: with real Ray and toy trials,
whose files are the evidence. The GPUs are declared to Ray and are none."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import test_tune
import torch
from examples import digits
from ray import cloudpickle
from test_tune import DIES, DIVERGES, RAISES, Listener, Progress, Toy, foresee, job, told

import bnscale
from bnscale import train
from bnscale.engine import Gang
from bnscale.engine.machine import keep_to_share
from bnscale.lease import Driver, holder
from bnscale.probes import STEP, curve, gamma
from bnscale.probes.snapshot import Snapshot
from bnscale.schedule.budget import Forecast
from bnscale.schedule.cohorts import MOST, Unit, alone, units_of
from bnscale.schedule.failure import Ending, Failure, Kind, Memory
from bnscale.schedule.loop import Training
from bnscale.schedule.needs import GIB, Cluster, Need, Node, needs_of
from bnscale.schedule.tune import run
from bnscale.schedule.tune.cluster import _spared
from bnscale.schedule.tune.driver import _Telling
from bnscale.schedule.tune.lead import Brief
from bnscale.schedule.turns import Elsewhere, Turn, take
from bnscale.storage import Folder
from bnscale.store import Store, TakenOver
from bnscale.study.passes import Passes
from bnscale.study.run import Way
from bnscale.trial import Outcome, Refusal, Trainable, Trial

for module in (test_tune, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)  # workers do not import tests

pytestmark = pytest.mark.timeout(400)  # a worker takes seconds to start, and many on a busy machine

TOO_MANY, TAKEN, CROWD, NARROW = 301, 302, 303, 304  # seeds that mean something to the toy
BREAKS = 0.4  # a rate that means something to a probe


class Together(Toy):
    """A toy whose trials take their steps in turn. Every pass adds a line to <store>/passes: who was in it."""

    def run(self, jobs: Sequence[Any], gang: Gang, threads: int, stop: Callable[[], bool]) -> Iterator[list[Progress]]:
        folder = Path(jobs[0].store)
        with (folder / "passes").open("a") as file:
            print(*(job.trial.id for job in jobs), file=file)
        steps = [super(Together, self).run([job], gang, threads, stop) for job in jobs]
        at: list[Any] = [None] * len(jobs)
        left = list(range(len(jobs)))
        while left:
            for place in list(left):
                moved = next(steps[place], None)
                if moved is None:
                    left.remove(place)
                else:
                    at[place] = moved[0]
                    self.befall(jobs, jobs[place], at[place])
            if left:
                yield list(at)

    @staticmethod
    def befall(jobs: Sequence[Any], job: Any, at: Progress) -> None:
        if job.trial.seed == TOO_MANY and len(jobs) > 2 and at.step == 2:
            raise MemoryError("not so many at once")
        if job.trial.seed == TAKEN and at.step == 2:
            if len(jobs) > 1:  # as by another driver, while this one slept
                writer = Store(job.store).writer(job.trial, train.readings(job.probes), {}, job.fence + 1)
                writer.finish(Outcome.DIVERGED, 2, {})
            raise TakenOver("another driver trains it")
        if job.trial.seed == CROWD:
            Path(job.store, f"{job.trial.id}.here").touch()
            deadline = time.monotonic() + 200
            while len(list(Path(job.store).glob("*.here"))) < 4 and time.monotonic() < deadline:
                time.sleep(0.05)
        if job.trial.seed == NARROW and at.step in (2, 3):  # its first life ends at 2
            shares = ray.get_runtime_context().get_assigned_resources()
            with Path(job.store, f"{job.trial.id}.share").open("a") as file:
                print(shares["GPU"], file=file)
            if shares["GPU"] < 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Killed(Training):
    """The real loop; its process is killed in a step of its first life, between two checkpoints."""

    def run(
        self, jobs: Sequence[train.Job], gang: Gang, threads: int, stop: Callable[[], bool]
    ) -> Iterator[list[train.Progress]]:
        first = Store(jobs[0].store).manifest(jobs[0].trial.id) is None
        for at in super().run(jobs, gang, threads, stop):
            if first and at[0].step == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            yield at


def fragile(at: Snapshot) -> Iterator[Any]:
    """A probe with a fault that shows in one trial."""
    if at.trial.lr == BREAKS and at.step == 8:
        raise ZeroDivisionError("the probe broke")
    return iter(())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with _spared():
        ray.init(
            "local", num_cpus=4, num_gpus=2, include_dashboard=False, object_store_memory=150 * 2**20,
            log_to_driver=False, logging_level="CRITICAL",
        )  # fmt: skip
    yield Cluster(ray.get_runtime_context().gcs_address, False, None, [Node(4, 2, 16 * GIB, None, 8 * GIB)])
    ray.shutdown()


def go(
    jobs: Sequence[Any], cluster: Cluster, *units: Sequence[Any], **more: Any
) -> tuple[dict[str, Ending], list[str]]:
    """Those that no unit names are alone. One worker at a time, unless `threads` leaves CPUs for others."""
    foreseen = foresee(list(jobs))
    parts = [Unit(tuple(each.trial.id for each in unit), foreseen[unit[0].trial.id]) for unit in units]
    named = {trial for part in parts for trial in part.trials}
    parts += alone([trial for trial in foreseen if trial not in named], foreseen)
    with Listener(list(jobs)) as watch:
        endings = run(
            list(jobs),
            foreseen,
            cluster,
            workers=1,
            rivals=None,
            watch=watch,
            mend="the same again",
            units=parts,
            **({"loop": Together(), "threads": 4} | more),
        )
    return endings, watch.said


def passes(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "passes").read_text().splitlines()]


def ids(*jobs: Any) -> list[str]:
    return [each.trial.id for each in jobs]


# --- who shares a pass ----------------------------------------------------------------------------


GPU = Cluster("", True, None, [Node(16, 4, 256 * GIB, "H100")])


def grid(count: int, **changes: Any) -> list[Trial]:
    return [digits(lr=0.001 * (1 + number), **changes) for number in range(count)]


def unite(
    trials: Sequence[Trial],
    cluster: Cluster = GPU,
    *,
    first: float = 100.0,
    more: float = 10.0,
    activations: int = GIB,
    worth: Callable[[Trial], bool] = lambda trial: True,
    **asked: Any,
) -> list[Unit]:
    """Where a pass takes `first` seconds and `more` for each further member."""

    def foresee(trial: Trial, members: int) -> Forecast:
        memory = members * activations
        return Forecast(first + more * (members - 1), GIB, on_gpu=memory if cluster.gpus else 0, disk=members)

    forecasts = {trial.id: foresee(trial, 1) for trial in trials}
    asked = {"readings": lambda trial: "curve", "reached": {}} | asked
    units = units_of(trials, forecasts, foresee, cluster, 1, worth=worth, **asked)
    assert sorted(trial for unit in units for trial in unit.trials) == sorted(trial.id for trial in trials)
    return units


def sizes(units: list[Unit]) -> list[int]:
    return sorted((len(unit.trials) for unit in units), reverse=True)


def test_trials_of_one_kin_and_the_same_readings_share_passes_of_equal_size_and_no_slot_idles() -> None:
    assert sizes(unite(grid(16))) == [4, 4, 4, 4]
    assert sizes(unite(grid(4))) == [1, 1, 1, 1]  # as many as the cluster runs at once
    assert sizes(unite(grid(20))) == [5, 5, 5, 5]
    assert sizes(unite(grid(6))) == [2, 2, 1, 1]
    assert sizes(unite(grid(300))) == sizes(unite(grid(300, seed=1)))
    assert max(sizes(unite(grid(300)))) <= MOST
    assert len(unite(grid(300))) % 4 == 0  # no GPU waits for the last pass of another


def test_seeds_weights_that_train_and_other_readings_keep_trials_apart() -> None:
    both = grid(8) + grid(8, seed=1)
    seeds = {trial.id: trial.seed for trial in both}
    assert all(len({seeds[trial] for trial in unit.trials}) == 1 for unit in unite(both))
    assert sizes(unite(grid(8, trainable=Trainable.ALL))) == [1] * 8
    odd = {trial.id for trial in grid(16)[::2]}
    for unit in unite(grid(16), readings=lambda trial: trial.id in odd):
        assert len({trial in odd for trial in unit.trials}) == 1
    for unit in unite(grid(16), reached=dict.fromkeys(odd, 7)):  # what has begun goes on apart from what has not
        assert len({trial in odd for trial in unit.trials}) == 1


def test_a_pass_has_as_many_members_as_memory_holds() -> None:
    few = Cluster("", True, None, [Node(16, 1, 256 * GIB, gpu_memory=24 * GIB)])
    assert max(sizes(unite(grid(32), few))) == 16  # of 21 that fit and 32: two passes of equal size
    assert max(sizes(unite(grid(32), few, activations=8 * GIB))) == 2
    assert sizes(unite(grid(32), few, activations=23 * GIB)) == [1] * 32
    cpu = Cluster("", True, None, [Node(2, 0, 8 * GIB)])

    def foresee(trial: Trial, members: int) -> Forecast:
        return Forecast(100.0 + members, memory=members * GIB, on_gpu=0, disk=1)

    trials = grid(40)
    forecasts = {trial.id: foresee(trial, 1) for trial in trials}
    asked = {"readings": lambda trial: "", "reached": {}, "worth": lambda trial: True}
    assert max(sizes(units_of(trials, forecasts, foresee, cpu, 1, **asked))) == 4  # so that two run at once


def test_where_stacking_does_not_pay_each_trains_alone_unless_it_is_asked_for() -> None:
    asked: list[Trial] = []

    def worth(trial: Trial) -> bool:
        asked.append(trial)
        return False

    assert sizes(unite(grid(16), worth=worth)) == [1] * 16
    assert len(asked) == 1  # one timing for all that are alike
    assert sizes(unite(grid(16), worth=worth, most=6)) == [6, 5, 5]
    assert sizes(unite(grid(4), most=4)) == [4]  # though three GPUs then idle
    assert sizes(unite(grid(16), most=1)) == [1] * 16
    assert len(asked) == 1
    assert sizes(unite(grid(4), worth=worth)) == [1] * 4
    assert len(asked) == 1  # nothing is timed in vain


def test_what_is_left_of_a_pass_takes_less_and_alone_what_one_takes() -> None:
    one = {name: Forecast(10.0, 100, 1000, 5) for name in "abcde"}
    unit = Unit(tuple("abcde"), Forecast(30.0, 300, 5000, 25))
    assert unit.of("ace", one).forecast == Forecast(20.0, 200, 3000, 15)
    assert unit.of("d", one) == Unit(("d",), one["d"])
    assert [part.trials for part in unit.halves(one)] == [("a", "b", "c"), ("d", "e")]
    assert unit.singles(one) == alone("abcde", one)


# --- shares of a GPU ------------------------------------------------------------------------------


def test_what_another_driver_held_of_a_pass_that_broke_up_is_trained_here_when_it_comes_back(tmp_path: Path) -> None:
    jobs = [job(tmp_path, seed) for seed in range(1, 5)]
    forecasts = foresee(jobs)
    names = [job.trial.id for job in jobs]
    brief = Brief({job.trial.id: job for job in jobs}, {}, forecasts, Training(), run="here", stall=60)
    with Listener(jobs) as watch:
        telling = _Telling(brief, watch, None, elastic=False, units=[Unit(tuple(names), forecasts[names[0]])])
        telling.settle(names[3], Elsewhere("another driver", over=False))
        failure = Failure(Kind.CODE, "wrong")
        for name in names[:3]:
            telling.judge.failed(name, failure, may_recompute=False)
        telling._break_up(names[:3], failure)
        assert sorted(unit.trials for unit in telling.left()) == sorted((name,) for name in names[:3])
        telling.settle(names[3], None)
        assert sorted(unit.trials for unit in telling.left()) == sorted((name,) for name in names)


def test_trials_share_a_gpu_as_memory_and_cpus_allow_and_never_more_than_eight() -> None:
    node = Node(16, 2, 64 * GIB, "H100", 80 * GIB)
    one = Cluster("", True, None, [node])
    assert one.sharers(1, on_gpu=7 * GIB) == 8  # the CPUs would be enough for no more, either
    assert one.sharers(2, on_gpu=7 * GIB) == 4
    assert one.sharers(1, on_gpu=20 * GIB) == 3  # each has room for a quarter more, and for what a process takes
    assert one.sharers(1, on_gpu=79 * GIB) == 1
    assert Cluster("", True, None, [Node(16, 2, 64 * GIB)]).sharers(1, on_gpu=GIB) == 1  # of what size, nobody told
    assert Cluster("", True, None, [Node(16, 2, 64 * GIB, "T4")]).sharers(1, on_gpu=3 * GIB) == 3  # by its type
    assert Cluster("", True, None, [node, Node(16, 2, 64 * GIB, "T4")]).sharers(1, on_gpu=3 * GIB) == 3
    assert Cluster("", True, None, [Node(16, 0, 64 * GIB)]).sharers(1, on_gpu=0) == 1
    assert [one.slots(2, GIB, sharers) for sharers in (1, 3, 8)] == [2, 6, 8]
    for sharers in range(1, 9):
        (bundle,) = Need(1, 2, 1, GIB, sharers=sharers).bundles()
        units = round(10_000 * bundle["GPU"])  # Ray counts in ten-thousandths
        assert units == pytest.approx(10_000 * bundle["GPU"], abs=1e-6)
        assert sharers * units <= 10_000 < (sharers + 1) * units
    assert Need(1, 2, 0, GIB, sharers=4).bundles() == [{"CPU": 2, "memory": GIB}]


def test_a_part_of_a_gpu_is_all_the_memory_that_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    class Properties:
        total_memory = 16 * GIB

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Properties())
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda share, device: told.append(share))
    keep_to_share(torch.device("cpu"), 4, GIB)
    assert told == []
    keep_to_share(torch.device("cuda", 0), 4, GIB)
    assert told == [3 / 16]
    crowded = Memory(total=16 * GIB, others=12 * GIB, peak=3 * GIB, forecast=3 * GIB)
    assert crowded.kind is Kind.OOM  # three times what it needs is others', and they are in their right
    assert crowded.shared(4) == Memory(4 * GIB, 0, 3 * GIB, 3 * GIB)
    assert crowded.shared(4).kind is Kind.OOM
    assert Memory(16 * GIB, 14 * GIB, 3 * GIB, 3 * GIB).shared(4).kind is Kind.NEIGHBOUR


def test_what_cannot_share_a_pass_or_a_gpu_is_refused_and_a_plan_says_how_many_passes_there_are() -> None:
    for words in ({"workers_per_trial": 2}, {"asha": True}):
        for name in ("cohort", "trials_per_gpu"):
            with pytest.raises(Refusal, match=f"--{name.replace('_', '-')} 4: .*leave"):
                Way(**words | {name: 4})
            assert Way(**words | {name: 1}).words[-2:] == [f"--{name.replace('_', '-')}", "1"]
    one = Forecast(100.0, GIB, 4 * GIB, 5)
    trials = {trial.id: trial for trial in grid(5)}
    a, b, c, d, e = trials
    passes = Passes([Unit(each, one) for each in ((a, b, c), (d,), (e,))], {d: 4}, {d: 3.0}, 1)
    assert passes.said == ", in 3 passes of at most 3, at most 4 on one GPU"
    assert passes.seconds == {a: 100, b: 100, c: 100, d: 300, e: 100}  # what shares a GPU takes longer
    assert passes.parts == {a: 1 / 3, b: 1 / 3, c: 1 / 3, d: 1, e: 1}
    assert [(load.seconds, load.slots) for load in passes.loads(trials)] == [(100, 1), (300, 0.25), (100, 1)]
    assert Passes([Unit((e,), one)], {}, {}, 1).said == ""


# --- with Ray -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def united(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run: passes in which something befalls a member."""
    folder = tmp_path_factory.mktemp("united")
    units = {
        "well": [job(folder, seed, lr=0.9) for seed in (1, 2, DIVERGES)],
        "raises": [job(folder, seed, lr=0.8) for seed in (3, RAISES, 4)],
        "dies": [job(folder, 5, lr=0.7, steps=3), job(folder, DIES, lr=0.7, steps=6), job(folder, 6, lr=0.7)],
        "too many": [job(folder, seed, lr=0.6) for seed in (7, TOO_MANY, 8, 9)],
    }
    jobs = [each for unit in units.values() for each in unit]
    endings, said = go(jobs, cluster, *units.values())
    return {"units": units, "said": said, "endings": endings, "passes": passes(folder), "folder": folder}


def outcomes(united: dict[str, Any], name: str) -> list[Outcome | None]:
    return [united["endings"][each.trial.id].outcome for each in united["units"][name]]


def with_any(united: dict[str, Any], name: str) -> list[list[str]]:
    """The passes in which any of these were."""
    return [each for each in united["passes"] if set(each) & set(ids(*united["units"][name]))]


def test_a_pass_trains_all_its_members_and_each_has_its_own_end(united: dict[str, Any]) -> None:
    assert outcomes(united, "well") == [Outcome.FINISHED, Outcome.FINISHED, Outcome.DIVERGED]
    assert with_any(united, "well") == [ids(*united["units"]["well"])]
    assert max(united["said"].count(line) for line in united["said"]) == 1


def test_one_member_s_error_ends_the_pass_and_the_others_go_on_alone_and_finish(united: dict[str, Any]) -> None:
    unit = united["units"]["raises"]
    assert outcomes(united, "raises") == [Outcome.FINISHED, Outcome.FAILED, Outcome.FINISHED]
    together, *apart = with_any(united, "raises")
    assert together == ids(*unit)
    assert sorted(apart) == sorted([name] for name in ids(*unit))
    begun = [[int(line[1]) for line in told(each) if line[0] == "began"] for each in unit]
    assert [len(each) for each in begun] == [2, 2, 2]
    assert all(second > 0 for _, second in begun)  # from their checkpoints
    assert [(Path(unit[0].store) / f"{name}.failed").exists() for name in ids(*unit)] == [False, True, False]
    (line,) = [line for line in united["said"] if "goes on each alone" in line]
    assert unit[0].trial.id in line
    assert "ArithmeticError: the toy broke" in line


def test_a_pass_whose_worker_dies_goes_on_as_one_without_those_that_have_ended(united: dict[str, Any]) -> None:
    ended, dies, other = united["units"]["dies"]
    assert outcomes(united, "dies") == [Outcome.FINISHED] * 3
    first, second = with_any(united, "dies")
    assert first == ids(ended, dies, other)
    assert second in (ids(dies, other), ids(ended, dies, other))  # whether its end was heard of before the death
    assert set(second) >= set(ids(dies, other))
    assert int(next(line for line in told(dies)[1:] if line[0] == "began")[1]) == 2
    assert sum("a worker died" in line for line in united["said"]) == 1


def test_a_pass_that_needs_too_much_memory_goes_on_in_halves(united: dict[str, Any]) -> None:
    names = ids(*united["units"]["too many"])
    assert outcomes(united, "too many") == [Outcome.FINISHED] * 4
    together, *halves = with_any(united, "too many")
    assert together == names
    assert sorted(halves) == sorted([names[:2], names[2:]])
    (line,) = [line for line in united["said"] if "in halves" in line]
    assert "4 trials were trained in one pass" in line


def test_each_member_has_its_own_lease_and_what_others_train_leaves_the_pass(cluster: Cluster, tmp_path: Path) -> None:
    def real(seed: int, **changes: Any) -> train.Job:
        of = test_tune.job(tmp_path, seed, **changes).trial
        return train.Job(of, {curve: STEP}, str(tmp_path), str(tmp_path), None, 0, 1.0)

    mine, held, taken, last = real(1), real(2), real(TAKEN), real(3, steps=8)
    with Driver(Folder(tmp_path), "here") as here, Driver(Folder(tmp_path), "there") as there:
        turn = take(held, there.id, halving=False)
        assert isinstance(turn, Turn)

        def finish() -> None:
            while not told(last) or told(last)[-1][0] != "ended":
                time.sleep(0.05)
            assert holder(turn.store.storage, held.trial.id) is not None
            writer = turn.store.writer(held.trial, train.readings(held.probes), {}, turn.job.fence)
            writer.finish(Outcome.FINISHED, 4, {})
            turn.end()

        other = threading.Thread(target=finish)
        other.start()
        endings, said = go([mine, held, taken, last], cluster, [mine, held, taken, last], driver=here)
        other.join()
        assert all(holder(Folder(tmp_path), each.trial.id) is None for each in (mine, held, taken, last))
    assert {name: ending.outcome for name, ending in endings.items()} == {
        mine.trial.id: Outcome.FINISHED,
        held.trial.id: Outcome.FINISHED,
        taken.trial.id: Outcome.DIVERGED,
        last.trial.id: Outcome.FINISHED,
    }
    assert passes(tmp_path) == [ids(mine, taken, last), ids(mine, last)]
    assert told(held) == []
    assert any("is trained by" in line and held.trial.id in line for line in said)


def test_ctrl_c_saves_every_member_and_the_pass_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    pair = [job(tmp_path, seed, steps=100_000) for seed in (1, 2)]

    def press() -> None:
        while not all((tmp_path / f"{name}.checkpoint").exists() for name in ids(*pair)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        go(pair, cluster, pair)
    assert [told(each)[-1][0] for each in pair] == ["saved", "saved"]


def test_as_many_trials_run_at_once_as_the_gpus_have_parts_and_one_too_large_gets_a_whole_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Each of the first waits until all four are there: one after the other they would wait in vain."""
    crowd = [job(tmp_path, CROWD, steps=2, lr=0.1 * (5 + number)) for number in range(4)]
    large = job(tmp_path, NARROW, lr=0.1)
    needs = needs_of(crowd, foresee(crowd), cluster, 1, 1, dict.fromkeys(ids(*crowd), 2))
    assert [need.bundles()[0]["GPU"] for need in needs.values()] == [0.5] * 4
    began = time.monotonic()
    endings, said = go([*crowd, large], cluster, threads=1, sharers=dict.fromkeys(ids(*crowd, large), 2))
    assert time.monotonic() - began < 200
    assert {ending.outcome for ending in endings.values()} == {Outcome.FINISHED}
    assert (tmp_path / f"{large.trial.id}.share").read_text().split() == ["0.5", "1.0"]
    (line,) = [line for line in said if large.trial.id in line and not line.startswith("finished")]
    assert "out of memory in 1/2 of a GPU" in line
    assert "goes on with one to itself" in line


def test_a_study_in_passes_has_the_tables_of_one_trained_alone_also_after_a_kill_and_an_error(
    cluster: Cluster, tmp_path: Path
) -> None:
    def jobs(store: Path) -> list[train.Job]:
        probes = {curve: 2 * STEP, gamma: 5 * STEP, fragile: STEP}
        trials = [digits(lr=lr) for lr in (0.1, 0.2, 0.3, BREAKS)]
        return [train.Job(trial, probes, str(store), str(store), "abc", 0, 1e-9) for trial in trials]

    whole, united = jobs(tmp_path / "alone"), jobs(tmp_path / "united")
    for each in whole[:3]:  # in this process, one after the other
        for _ in train.run([each], Gang(), 1, lambda: False):
            pass
    endings, said = go(united, cluster, united, threads=1, loop=Killed())
    assert [endings[name].outcome for name in ids(*united)] == [Outcome.FINISHED] * 3 + [Outcome.FAILED]
    assert sum("a worker died" in line for line in said) == 1
    assert sum("goes on each alone" in line and "the probe broke" in line for line in said) == 1
    store = Store.existing(tmp_path / "united")
    manifests = [store.manifest(name) for name in ids(*united)]
    assert [each.attempts for each in manifests[:3] if each] == [3, 3, 3]  # as one, again as one, and alone
    for table in ("curve", "gamma"):
        ask = f"select * from {table} where trial in (select trial from trials where outcome = 'finished') order by all"
        found, expected = (bnscale.open(tmp_path / name).sql(ask).rows for name in ("united", "alone"))
        assert len(found) == len(expected) > 0
        for rows in zip(found, expected, strict=True):
            for here, there in zip(*rows, strict=True):
                assert here == (pytest.approx(there, rel=1e-5, abs=1e-5) if isinstance(there, float) else there)
