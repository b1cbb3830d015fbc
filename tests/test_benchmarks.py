"""The benchmarks run, at a size of seconds; what they measure is no test's verdict."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import store

from bnscale.store import Store
from bnscale.trial import Outcome


def test_the_store_s_benchmark_writes_trials_that_answer_every_query_of_its_study(tmp_path: Path) -> None:
    trials = [each.trial for each in store.planned(2)]
    readings = 161 * (3 + 41) + 2  # curve, gamma_histogram; clamp
    rows = [rows for _, rows in store.write(trials, tmp_path)]
    assert rows == [readings + 161 * (len(trial.norms) + trial.depth) for trial in trials]
    kept = Store.existing(tmp_path)
    assert {manifest.outcome for manifest in kept.manifests()} == {Outcome.FINISHED}
    assert sum(1 for _ in tmp_path.rglob("*.parquet")) == 2 * 5
    named = store.QUERIES.read_text().count("-- name: ")
    assert len(store.ask(tmp_path, 2)) == 3 + named
