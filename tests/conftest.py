"""One thread everywhere: small tensors on many threads take ten times as long, and bits depend on the number."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3 as s3_server

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3() -> Iterator[s3_server.Server]:
    """An S3 server of this machine, for all tests."""
    server = s3_server.Server()
    yield server
    server.end()


_bucket = itertools.count()


@pytest.fixture
def bucket(s3: s3_server.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of an empty place in a bucket, which this process and its children can open."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (s3_server.ENVIRONMENT | {"AWS_ENDPOINT_URL": s3.url}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"s3://{s3_server.BUCKET}/{os.getpid()}-{next(_bucket)}"


# Files of a minute and more begin first: one that came last would keep a single process busy while the others wait.
# By turns one that starts clusters and one that computes: two clusters that start at once starve each other.
LONG = (
    "test_worker_faults.py",
    "test_budget.py",
    "test_command.py",
    "test_train.py",
    "test_tune.py",
    "test_deepspeed.py",
    "test_schedule_cohorts.py",
    "test_cohort.py",
    "test_drivers.py",
    "test_norm_kinds.py",
    "test_killed_study.py",
    "test_compile.py",
    "test_search.py",
    "test_report.py",
    "test_cluster_faults.py",
    "test_gpu_script.py",
    "test_process_faults.py",
    "test_scale.py",
    "test_santurkar_vgg.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
