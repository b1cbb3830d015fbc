"""The makespan: known schedules, what bounds any of them, and the words of `plan`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnscale.schedule.makespan import Makespan, Unit, makespan, rounds
from bnscale.study.slots import Slots
from bnscale.trial import Refusal


def test_the_longest_trial_begins_first() -> None:
    """Three of 2 and two of 3 on two slots: 3+2 and 3+2+2, where the order as given would take 2+2+3 and 2+3."""
    assert makespan([Unit(2), Unit(2), Unit(2), Unit(3), Unit(3)], 2).seconds == 7


def test_one_slot_takes_the_sum_and_many_the_longest() -> None:
    units = [Unit(seconds) for seconds in (5, 1, 4)]
    assert makespan(units, 1) == Makespan(seconds=10, work=10, slots=1, bound=10)
    assert makespan(units, 3) == Makespan(seconds=5, work=10, slots=3, bound=5)
    assert makespan(units, 3).utilisation == pytest.approx(10 / 15)


def test_a_gang_waits_for_whole_slots_and_shares_of_one_lie_side_by_side() -> None:
    """On two slots: the gang of two takes 4 s, then four quarters share the first slot for 3 s."""
    quarters = [Unit(3, 0.25) for _ in range(4)]
    assert makespan([Unit(4, 2), *quarters], 2).seconds == 7
    assert makespan([*quarters, Unit(2)], 2).seconds == 3
    assert makespan([Unit(3, 1 / 3) for _ in range(3)], 1).seconds == 3
    assert makespan([Unit(3, 0.4) for _ in range(3)], 1).seconds == 6


def test_what_does_not_fit_yet_keeps_no_smaller_trial_waiting() -> None:
    """A gang of two cannot begin beside the 5 s of one slot; the trial of 1 s can."""
    assert makespan([Unit(5), Unit(4, 2), Unit(1)], 2).seconds == 9


def test_the_rounds_of_a_search_follow_one_another() -> None:
    found = rounds([[Unit(2), Unit(1)], [Unit(3)], []], 2)
    assert (found.seconds, found.bound) == (5, 5)
    assert found.utilisation == pytest.approx(6 / 10)
    assert rounds([], 4).utilisation == 1


def test_a_gang_larger_than_the_cluster_is_refused() -> None:
    with pytest.raises(Refusal, match="4 slots for one trial: there are 2"):
        makespan([Unit(1, 4)], 2)


@given(st.lists(st.floats(0.1, 100), max_size=40), st.integers(1, 8))
def test_no_makespan_is_below_its_bound_or_above_graham_s(seconds: list[float], slots: int) -> None:
    """Graham 1969, longest first: at most 4/3 - 1/(3m) of the best schedule, which may itself be up to twice the bound;
    any list schedule is at most the work shared evenly, and the longest beside it."""
    found = makespan([Unit(each) for each in seconds], slots)
    assert found.seconds >= found.bound * (1 - 1e-9)
    assert found.seconds <= (found.work / slots + max(seconds, default=0)) * (1 + 1e-9)
    assert 0 <= found.utilisation <= 1 + 1e-9


@pytest.mark.parametrize(
    ("asked", "slots"),
    [
        ((64, None, 1, 1), (64, "64 GPUs", 64)),
        ((1, 16, 1, 4), (1, "1 GPU and 16 CPUs", 1)),
        ((8, 16, 1, 4), (4, "8 GPUs and 16 CPUs", 8)),
        ((None, 6, 1, 4), (1, "6 CPUs", 0)),
    ],
)
def test_a_slot_is_a_gpu_and_the_cpus_of_a_worker(
    asked: tuple[int | None, int | None, int, int], slots: tuple[int, str, int]
) -> None:
    found = Slots.of(*asked)
    assert (found.count, found.said, found.gpus) == slots
    cluster = found.cluster(asked[3])
    assert (cluster.slots(asked[3], 0), cluster.gpus) == (found.count, found.gpus)


def test_a_plan_for_less_than_one_trial_takes_is_refused_with_the_ways_out() -> None:
    with pytest.raises(Refusal, match="2 GPUs: room for 2 workers of 1 CPUs, and a trial has 4; .*--workers-per-trial"):
        Slots.of(2, None, 4, 1)
    with pytest.raises(Refusal, match="3 CPUs: room for 0 workers of 4 CPUs"):
        Slots.of(None, 3, 1, 4)
