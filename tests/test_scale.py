"""The schedule on GPUs that are not there: benchmarks/scale.py at a size of seconds, with real Ray and processes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale

from bnscale.schedule.makespan import Unit, makespan

pytestmark = pytest.mark.timeout(300)  # a worker takes seconds to start, and many on a busy machine


def test_the_makespan_of_a_plan_is_that_of_the_schedule(tmp_path: Path) -> None:
    """Two dozen trials on three logical GPUs, by a clock that a busy machine does not hurry or stretch."""
    seconds = scale.lasting(24, 1.0)
    watch, took = scale.scheduled(seconds, 3, tmp_path, scale.Time.SIMULATED)
    assert len(watch.ends) == 24
    forecast = makespan([Unit(each) for each in seconds], 3)
    assert took == pytest.approx(forecast.seconds, rel=0.15)
    assert took >= forecast.bound
