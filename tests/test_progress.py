"""What a person sees of a run, on a terminal and in a log."""

import io
import time
from dataclasses import dataclass

import pytest
from rich.console import Console

from bnscale.schedule import progress
from bnscale.schedule.progress import Watch, clock
from bnscale.trial import Outcome


@dataclass(frozen=True)
class At:
    """The fields of train.Progress."""

    step: int
    total: int = 100
    epoch: float = 1.0
    epochs: float = 4.0
    loss: float | None = 0.5
    accuracy: float | None = None
    outcome: Outcome | None = None


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def log(seconds: dict[str, float]) -> tuple[Watch, io.StringIO]:
    text = io.StringIO()
    return Watch(seconds, Console(file=text, width=200, force_terminal=False)), text


def test_a_log_gets_a_line_for_each_trial_that_ends_and_few_others(passing: Clock) -> None:
    watch, text = log({"a": 10.0, "b": 10.0, "c": 10.0, "d": 10.0})
    with watch:
        watch.started("a")
        for step in range(100):
            passing.now += 0.1
            watch.progressed("a", At(step, accuracy=0.25), began=0)
        watch.ended("a", Outcome.FINISHED)
        watch.started("b")
        watch.ended("b", Outcome.DIVERGED)
        watch.started("c")
        watch.lost("c", "a worker of c died: the node is gone")
        watch.ended("c", None)
    lines = text.getvalue().splitlines()
    counts = [line for line in lines if "waiting" in line]
    assert 2 <= len(counts) <= 4  # of 100 reports in 10 seconds
    assert counts[-1] == "1 done, 0 running, 0 failed, 1 diverged, 1 stopped early, 1 waiting; 10 s left"
    assert "finished a  accuracy 0.2500  (1/4)" in lines
    assert "diverged b  (2/4)" in lines
    assert "stopped early c  (3/4)" in lines
    assert sum("a worker of c died" in line and "the node is gone" in line for line in lines) == 1


def test_the_time_left_follows_the_measured_speed_and_the_trials_at_work(passing: Clock) -> None:
    watch, _ = log({"a": 10.0, "b": 10.0, "c": 40.0})
    assert watch.left == 60.0
    watch.started("a")
    watch.started("b")
    assert watch.left == 40.0  # two at a time, but c alone takes 40
    passing.now += 10.0
    watch.progressed("a", At(50), began=0)
    watch.progressed("b", At(50), began=0)
    # Each did 5 forecast seconds in 10: twice as slow. 5 + 5 + 40 forecast seconds are left for two.
    assert watch.slowness == 2.0
    assert watch.left == 80.0
    passing.now += 10.0
    watch.ended("a", Outcome.FAILED)  # says nothing about the speed
    watch.progressed("b", At(100), began=0)
    watch.ended("b", Outcome.FINISHED)
    assert watch.slowness == 2.0
    assert watch.left == 80.0
    watch.started("c")
    passing.now += 1.0
    watch.progressed("c", At(90), began=90)  # it goes on from a checkpoint: no speed is read from that
    assert watch.slowness == pytest.approx(2.0, rel=0.1)
    assert watch.left == pytest.approx(8.0, rel=0.1)


def test_a_slow_first_step_says_nothing_of_the_time_left(passing: Clock) -> None:
    watch, _ = log({"a": 100.0})
    watch.started("a")
    passing.now += 9.0  # its data, its first readings
    watch.progressed("a", At(0.01), began=0)
    assert watch.left == pytest.approx(100.0, rel=0.01)
    passing.now += 11.0
    watch.progressed("a", At(10), began=0)
    assert watch.left == pytest.approx(180.0)


def test_a_terminal_shows_each_running_trial_and_survives_a_thousand() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, height=50, force_terminal=True)
    names = [f"resnet8-bn-lr0.1-s{n}" for n in range(1000)]
    with Watch(dict.fromkeys(names, 1.0), console) as watch:
        began = time.process_time()
        for name in names[:950]:
            watch.started(name)
            watch.progressed(name, At(100, accuracy=0.5), began=0)
            watch.ended(name, Outcome.FINISHED)
        for name in names[950:]:
            watch.started(name)
            watch.progressed(name, At(25, accuracy=0.5), began=0)
        console.print(watch._view())
        assert time.process_time() - began < 5
    shown = text.getvalue()
    assert "950 done, 50 running, 0 failed, 0 diverged, 0 waiting" in shown
    assert "resnet8-bn-lr0.1-s950" in shown
    assert "1.0/4" in shown
    assert "0.5000" in shown
    assert "and 34 more" in shown
    assert shown.count("finished") == 0  # the counts say it
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_the_time_of_a_round_is_told_beside_the_most_that_all_rounds_take(passing: Clock) -> None:
    watch = Watch({"a": 10.0, "b": 10.0}, Console(file=io.StringIO()), later=60.0)
    watch.started("a")
    watch.progressed("a", At(0), began=0)
    passing.now += 10
    watch.progressed("a", At(50), began=0)  # twice as slow as foreseen
    assert watch.counts().endswith("1 waiting; 30 s left, at most 2 min for all rounds")


def test_a_failure_is_told_on_a_terminal_too() -> None:
    text = io.StringIO()
    with Watch({"a": 1.0}, Console(file=text, width=120, force_terminal=True)) as watch:
        watch.started("a")
        watch.ended("a", Outcome.FAILED)
    assert "failed a  (1/1)" in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(40, "40 s"), (170, "3 min"), (7500, "2 h 05 min"), (273_600, "3 d 4 h"), (3590, "1 h 00 min")],
)
def test_a_duration_is_as_exact_as_a_forecast_deserves(seconds: float, said: str) -> None:
    assert clock(seconds) == said
