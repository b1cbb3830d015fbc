"""The script for a GPU is whole and right before it meets one; what a step must do is counted, not guessed."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bnscale.schedule.budget import work
from bnscale.train import readings
from bnscale.trial import Pixels, Precision, Refusal, Trainable, Trial

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    before = list(sys.path)
    sys.path[:0] = [str(REPO / "benchmarks"), str(REPO / "studies")]
    yield
    sys.path[:] = before


def benchmark(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.timeout(300)
def test_the_script_for_a_gpu_measures_every_part_and_keeps_the_headlines_store(tmp_path):
    environment = os.environ | {
        "DEVICE": "cpu", "TINY": "1", "PYTHON": sys.executable, "STORE": str(tmp_path / "store"),
        "PYTHONPATH": str(REPO),
    }  # fmt: skip
    done = subprocess.run(
        [REPO / "benchmarks" / "gpu.sh", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "gpu.txt").read_text().splitlines()[-1].endswith("whole")

    def lines(name: str) -> list[dict[str, Any]]:
        return json.loads((tmp_path / "out" / f"{name}.json").read_text())["lines"]

    assert {(line["trials"], line["precision"]) for line in lines("limit")} == {
        (count, precision) for count in (1, 2) for precision in ("fp32", "bf16")
    }
    for line in lines("8/cohort"):
        assert line["ms a step"] > 0
        assert line["x plain"][0] > 0
        assert line["% of the limit"] > 0
    assert [line["trials"] for line in lines("8/cohort")] == [1, 2]
    for line in lines("headline"):
        assert line["outcome"] == "finished"
        assert 0 < line["test accuracy"] <= 1
        assert line["epoch"] == 1
    with tarfile.open(tmp_path / "out" / "store.tar.gz") as packed:
        inside = packed.getnames()
    for line in lines("headline"):
        assert any(line["trial"] in name for name in inside)


def test_the_script_says_what_it_lacks_before_it_starts(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [REPO / "benchmarks" / "gpu.sh", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "sees no GPU; run it where there is one" in done.stderr


def test_the_headlines_trials_and_readings_are_those_of_the_study():
    headline, study = benchmark("headline"), benchmark("frankle_depth").study
    recipe = benchmark("recipes").FRANKLE_CIFAR
    ours = headline.trials(recipe, 866, headline.RATES, pixels=Pixels.ORIGINAL)
    cells = [
        Trial(**(study.paper.fixed | cell | nuisance | {"seed": 0, "pixels": Pixels.ORIGINAL}))
        for cell in study.paper.scientific
        if cell.get("depth") == 866 and cell["trainable"] is Trainable.BN
        for nuisance in study.paper.nuisance
    ]
    assert [of.id for of in ours] == [of.id for of in cells]
    assert readings(headline.PROBES) == readings(study.probes)


# --- the limit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [8, 20, 110])
def test_the_operations_of_a_step_are_those_that_torch_counts(depth):
    limit = benchmark("limit")
    of = limit.trial(depth, 128, Precision.FP32)
    assert sum(each.flops for each in limit.operations(of, 1)) == work(of).flops


def test_the_maps_that_a_step_of_resnet_8_must_move_are_those_counted_by_hand():
    """Of one image, in values of 16 channels of 32 x 32: A. The second stage has maps of A / 2, the third of A / 4."""
    limit = benchmark("limit")
    of = limit.trial(8, 4, Precision.FP32)
    image, a = 3 * 32 * 32, 16 * 32 * 32
    stem = (image + a) + a + 2 * a + 3 * a  # convolution; statistics; apply; sums of two gradients and x
    plain_conv = 2 * 2 * a  # forward and back
    inner_norm = 1 + 2 + 2 + 3  # statistics, apply, sums, gradient
    end_norm = 1 + 3 + 5 + 3
    first = 2 * plain_conv + (inner_norm + end_norm) * a
    shortcut_norm = 1 + 2 + 3

    def later(before: float, after: float, end: int) -> float:
        convolutions = 2 * (before + after) + 2 * 2 * after + 2 * (before + after)
        return convolutions + (inner_norm + end + shortcut_norm) * after

    second, third = later(a, a / 2, end_norm), later(a / 2, a / 4, end_norm - 1)  # one gradient meets the last
    head = 2 * (a / 4 + 64) + 2 * (64 + 10)
    assert sum(each.maps for each in limit.operations(of, 1)) == 4 * (stem + first + second + third + head)


def test_trials_of_one_seed_share_the_first_convolution_and_the_weights_and_nothing_else():
    limit = benchmark("limit")
    of = limit.trial(8, 4, Precision.FP32)
    one, four = (limit.operations(of, members) for members in (1, 4))
    weights = sum(each.fixed for each in one[:-1])
    assert sum(each.fixed for each in four[:-1]) == weights  # the last is the update
    assert four[-1].fixed == 4 * one[-1].fixed
    assert four[0] == one[0]
    for single, stacked in list(zip(one, four, strict=True))[4:-1]:
        assert (stacked.flops, stacked.maps) == (4 * single.flops, 4 * single.maps)


def test_a_step_is_held_to_the_slower_of_memory_and_arithmetic_operation_by_operation():
    limit = benchmark("limit")
    of = limit.trial(8, 4, Precision.BF16)
    rates = dict.fromkeys(Precision, 1e9)
    slow_memory = limit.Machine("", {2**20: 1e3}, rates, {})
    found = limit.limit(of, 2, slow_memory)
    assert found.bound == 1
    assert found.seconds == pytest.approx(found.bytes / 1e3)
    fast_memory = limit.Machine("", {2**20: 1e18}, rates, {})
    assert limit.limit(of, 2, fast_memory).seconds == pytest.approx(found.flops / 1e9, rel=1e-3)
    cached = limit.Machine("", {2**20: 4e9, 2**30: 1e9}, rates, {})
    assert (cached.bandwidth(10), cached.bandwidth(2**25), cached.bandwidth(2**40)) == (4e9, 1e9, 1e9)


def test_a_trial_whose_traffic_is_not_counted_is_refused():
    limit = benchmark("limit")
    of = limit.trial(8, 4, Precision.FP32)
    with pytest.raises(Refusal, match="trainable all: .* use resnet, batch and bn"):
        limit.operations(Trial(**(of.model_dump() | {"trainable": Trainable.ALL})), 1)


# --- the tables ---------------------------------------------------------------------------------


def test_a_figure_is_held_to_the_previous_releases_only_on_the_machine_that_both_were_measured_on(monkeypatch):
    table = benchmark("table")
    here = table.here(torch.device("cpu"))
    kept = {"cores": here["cores"], "threads": here["threads"], "lines": {"20 fp32": {"ms": 50.0}}}
    known = {"mine": kept | {"device": here["device"]}, "other": kept | {"device": "Abacus"}}
    monkeypatch.setattr(table, "_previous", lambda: known)
    asked = ("20 fp32", "ms", {"ms": 60.0}, torch.device("cpu"))
    assert table.against("mine", *asked) == "1.20 x"
    assert table.against("other", *asked) == "other machine"
    assert table.against("nowhere", *asked) == "-"
    assert table.against("mine", "110 fp32", *asked[1:]) == "-"
    monkeypatch.setitem(kept, "threads", here["threads"] + 1)
    known["mine"] = kept | {"device": here["device"]}
    assert table.against("mine", *asked) == "other machine"
