"""The cluster file against Ray's own schema, and against what Ray would do with it on AWS."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
FILE = ROOT / "cluster" / "ray_cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of the file, with its defaults, once it has found no fault in it."""
    whole = prepare_config(copy.deepcopy(cluster))
    validate_config(whole)
    return whole


def starts(cluster: dict[str, Any]) -> dict[str, str]:
    """The command that starts Ray, on the head and on a worker."""
    return {
        role: next(c for c in prepared(cluster)[f"{role}_start_ray_commands"] if "ray start" in c)
        for role in ("head", "worker")
    }


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    assert set(prepared(cluster)["available_node_types"]) == {"head", "spot_gpu"}


@pytest.mark.parametrize("where", [(), ("available_node_types", "spot_gpu"), ("auth",)])
def test_a_misspelt_key_is_found(cluster: dict[str, Any], where: tuple[str, ...]) -> None:
    part = cluster
    for key in where:
        part = part[key]
    part["max_wrokers"] = 1
    with pytest.raises(ValidationError, match="max_wrokers"):
        prepared(cluster)


def test_the_link_at_the_root_is_the_same_file() -> None:
    assert (ROOT / "ray_cluster.yaml").resolve() == FILE


def test_ray_is_never_left_to_make_a_security_group(cluster: dict[str, Any]) -> None:
    # Ray's AWS provider adds SSH from 0.0.0.0/0 to each group that it makes (_create_default_ssh_inbound_rules).
    for node_type in prepared(cluster)["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"]


def test_every_node_asks_for_the_token_and_reports_to_nobody(cluster: dict[str, Any]) -> None:
    for command in starts(cluster).values():
        assert "RAY_AUTH_MODE=token ray start" in command
        assert "--disable-usage-stats" in command
    assert prepared(cluster)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_dashboard_is_shown_on_the_head_alone(cluster: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in starts(cluster)["head"]


def test_workers_come_and_go_and_are_spot_machines(cluster: dict[str, Any]) -> None:
    workers = prepared(cluster)["available_node_types"]["spot_gpu"]
    assert workers["min_workers"] == 0 < workers["max_workers"] <= cluster["max_workers"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_what_a_node_is_sent_exists_and_is_all_that_its_installation_reads(cluster: dict[str, Any]) -> None:
    sent = {local for remote, local in cluster["file_mounts"].items() if remote.startswith("~/bnscale/")}
    assert {"Makefile", "pyproject.toml", "cluster", "README.md", "bnscale", "studies"} <= sent
    assert [local for local in sent if not (ROOT / local).exists()] == []
