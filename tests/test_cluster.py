"""The files that describe clusters: against Ray's own schema, the clouds' own, and what Ray would do with them."""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import botocore.session
import googleapiclient
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import Draft202012Validator, ValidationError
from ray.autoscaler._private.kuberay import autoscaling_config as kuberay
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilityRecord, NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
from ray.autoscaler._private.util import prepare_config, validate_config

from bnscale.schedule.needs import GIB, Node
from bnscale.schedule.tune import cluster as tune_cluster
from bnscale.study.plan import commit

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster"
NODE = FOLDER / "node.sh"
BY_RAY_UP = ["ray_cluster.yaml", "gcp.yaml", "local.yaml"]
CLOUDS = ["ray_cluster.yaml", "gcp.yaml"]
L4 = "accelerator_type:L4"  # of which a trial asks for a little, with --same-gpu
TOKEN = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "bnscale-token", "key": "auth_token"}}}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def prepared(file: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a file, with its defaults, once it has found no fault in it."""
    whole = prepare_config(copy.deepcopy(file))
    validate_config(whole)
    return whole


def workers(name: str) -> dict[str, dict[str, Any]]:
    whole = prepared(read(name))
    return {kind: node for kind, node in whole["available_node_types"].items() if kind != whole["head_node_type"]}


# --- what `ray up` reads -------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_RAY_UP)
def test_ray_accepts_every_file(name: str) -> None:
    assert prepared(read(name))["available_node_types"]


@pytest.mark.parametrize("name", BY_RAY_UP)
@pytest.mark.parametrize("where", [(), ("auth",), ("available_node_types", "spot_gpu")])
def test_a_misspelt_key_is_found(name: str, where: tuple[str, ...]) -> None:
    part = file = read(name)
    for key in where:
        if key not in part:
            pytest.skip("own machines are of no kind")
        part = part[key]
    part["max_wrokers"] = 1
    with pytest.raises(ValidationError, match="max_wrokers"):
        prepared(file)


def test_the_link_at_the_root_is_the_same_file() -> None:
    assert (ROOT / "ray_cluster.yaml").resolve() == FOLDER / "ray_cluster.yaml"


@pytest.mark.parametrize("name", BY_RAY_UP)
def test_every_node_is_set_up_and_started_by_the_one_script(name: str) -> None:
    whole = prepared(read(name))
    script = "bash ~/bnscale/cluster/node.sh"
    for role in ("head", "worker"):
        assert whole[f"{role}_setup_commands"] == [f"{script} setup"]
    # Ray looks for both words here, and warns that no worker will come where it does not find them.
    assert whole["head_start_ray_commands"] == [
        f"{script} ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml"
    ]
    assert whole["worker_start_ray_commands"] == [f"{script} ray start --address=$RAY_HEAD_IP:6379"]


@pytest.mark.parametrize("name", BY_RAY_UP)
def test_the_token_is_a_file_of_the_user_s_and_never_text(name: str) -> None:
    assert read(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"\b[0-9a-f]{32,}\b", (FOLDER / name).read_text())


@pytest.mark.parametrize("name", BY_RAY_UP)
def test_what_a_node_is_sent_exists_and_is_all_that_its_installation_reads(name: str) -> None:
    sent = {local for remote, local in read(name)["file_mounts"].items() if remote.startswith("~/bnscale/")}
    assert {"Makefile", "pyproject.toml", "cluster", "README.md", "bnscale", "studies"} <= sent
    assert [local for local in sent if not (ROOT / local).exists()] == []


@pytest.mark.skipif(shutil.which("rsync") is None, reason="there is no rsync")
@pytest.mark.parametrize("name", BY_RAY_UP)
def test_a_node_is_sent_the_commit_s_id_and_neither_history_nor_remote(name: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    git = ["git", "-C", str(here), "-c", "user.name=a", "-c", "user.email=a@b"]
    (here / "studies").mkdir(parents=True)
    there.mkdir()
    subprocess.run(["git", "init", "-q", here], check=True)
    for each, text in {"studies/sent": "1", "tests": "not sent", "gone": "a secret of old"}.items():
        (here / each).write_text(text)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    subprocess.run([*git, "rm", "-q", "gone"], check=True)
    subprocess.run([*git, "commit", "-qm", "b"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://user:a-password@192.0.2.1/x"], check=True)
    excluded = [f"--exclude={each}" for each in read(name)["rsync_exclude"]]
    for each in (".git", "studies"):  # as Ray does
        subprocess.run(["rsync", "-az", *excluded, f"{here / each}/", f"{there / each}/"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit(here) == commit(there) == head
    kept = [each for each in (there / ".git").rglob("*") if each.is_file()]
    assert not any(b"a-password" in each.read_bytes() for each in kept)
    assert list((there / ".git" / "objects").iterdir()) == []
    assert {each.relative_to(there / ".git").parts[0] for each in kept} <= {
        "COMMIT_EDITMSG", "HEAD", "ORIG_HEAD", "description", "index", "packed-refs", "refs",
    }  # fmt: skip
    (there / "studies" / "sent").write_text("2")
    assert commit(there) == f"{head}+"


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_come_and_go_and_cost_has_a_ceiling(name: str) -> None:
    file = read(name)
    assert file["idle_timeout_minutes"] <= 10
    assert file["provider"]["cache_stopped_nodes"] is False
    for kind in workers(name).values():
        assert kind["min_workers"] == 0 < kind["max_workers"] == file["max_workers"]


@pytest.mark.parametrize("name", CLOUDS)
def test_what_is_yours_to_fill_in_says_so_and_no_key_has_a_place(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert "FILL-IN" in text
    assert not re.search(r"access_key|secret|credentials|private_key", text)


# --- AWS -----------------------------------------------------------------------------------------


def test_what_is_asked_of_amazon_is_what_amazon_knows() -> None:
    session = botocore.session.get_session()
    service = session.get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    for kind, node in prepared(read("ray_cluster.yaml"))["available_node_types"].items():
        asked = node["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert ParamValidator().validate(asked, shape).generate_report() == "", kind
        assert "InstanceMarketOption" in ParamValidator().validate({"InstanceMarketOption": 1}, shape).generate_report()


def test_ray_is_never_left_to_make_a_security_group_or_a_role() -> None:
    # Its AWS provider adds SSH from 0.0.0.0/0 to each group that it makes (_create_default_ssh_inbound_rules), and
    # gives a role that it makes all of EC2 and all of S3 (_configure_iam_role).
    for node in prepared(read("ray_cluster.yaml"))["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"]
        assert node["node_config"]["IamInstanceProfile"]["Name"]


def test_spot_machines_and_those_on_demand_differ_in_their_market_alone() -> None:
    kinds = workers("ray_cluster.yaml")
    spot, demand = (kinds[kind]["node_config"] for kind in ("spot_gpu", "on_demand_gpu"))
    assert spot == demand | {"InstanceMarketOptions": {"MarketType": "spot"}}
    kinds = workers("gcp.yaml")
    spot, demand = (kinds[kind]["node_config"] for kind in ("spot_gpu", "on_demand_gpu"))
    assert spot["scheduling"]["provisioningModel"] == "SPOT"
    assert "provisioningModel" not in demand["scheduling"]
    assert spot | {"scheduling": 0} == demand | {"scheduling": 0}


def test_the_head_s_role_ends_and_tags_no_machine_of_others() -> None:
    text = (FOLDER / "README.md").read_text()
    given = [json.loads(each) for each in re.findall(r"""^(?:start|tag|end|pass)='(.*)'$""", text, re.MULTILINE)]
    assert {each["Action"] for each in given if isinstance(each["Action"], str)} == {"ec2:CreateTags", "iam:PassRole"}
    conditions = {
        action: [each.get("Condition", {}).get("StringEquals") for each in given if action in each["Action"]]
        for action in ("ec2:TerminateInstances", "ec2:CreateTags")
    }
    ours = {"aws:ResourceTag/ray-cluster-name": read("ray_cluster.yaml")["cluster_name"]}  # Ray starts them with it
    assert conditions == {
        "ec2:TerminateInstances": [ours],
        "ec2:CreateTags": [{"ec2:CreateAction": "RunInstances"}, ours],
    }
    assert "$start,$tag,$end,$pass" in text


# --- Google Cloud --------------------------------------------------------------------------------


def unknown(value: Any, schema: dict[str, Any], schemas: dict[str, Any], path: str = "") -> list[str]:
    """What a value has that the schema of a Google API does not."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    match value:
        case dict():
            known = schema.get("properties", {})
            found = [f"{path}.{key}" for key in value if key not in known]
            return found + [
                each for key in value.keys() & known.keys()
                for each in unknown(value[key], known[key], schemas, f"{path}.{key}")
            ]  # fmt: skip
        case list():
            items = schema.get("items", {})
            return [each for n, item in enumerate(value) for each in unknown(item, items, schemas, f"{path}[{n}]")]
    types = {"string": str, "boolean": bool, "integer": int}
    fits = isinstance(value, types[schema["type"]]) or schema.get("format") == "int64"
    return [] if fits and value in schema.get("enum", [value]) else [f"{path}: {value}"]


def test_what_is_asked_of_google_is_what_google_knows() -> None:
    documents = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    instance = schemas["Instance"]
    for node in prepared(read("gcp.yaml"))["available_node_types"].values():
        assert unknown(node["node_config"], instance, schemas) == []
    assert unknown({"scheduling": {"preemptable": True}}, instance, schemas) == [".scheduling.preemptable"]
    assert unknown({"scheduling": {"onHostMaintenance": "END"}}, instance, schemas) == [
        ".scheduling.onHostMaintenance: END"
    ]


def test_google_s_workers_say_the_memory_that_trials_ask_for() -> None:
    # Ray looks no machine type of Google's up, and an autoscaler starts nothing that lacks what is asked for.
    for kind in workers("gcp.yaml").values():
        assert kind["resources"] == {"CPU": 4, "GPU": 1, L4: 1, "memory": kind["resources"]["memory"]}
        assert 8 * GIB < kind["resources"]["memory"] < 16 * GIB


# --- Kubernetes ----------------------------------------------------------------------------------


def flaws(file: dict[str, Any]) -> list[str]:
    schema = yaml.safe_load((ROOT / "tests" / "cluster" / "raycluster.schema.yaml").read_text())
    Draft202012Validator.check_schema(schema)
    return [flaw.message for flaw in Draft202012Validator(schema).iter_errors(file)]


def test_the_kubernetes_file_is_a_ray_cluster_without_flaw() -> None:
    assert flaws(read("kubernetes.yaml")) == []


@pytest.mark.parametrize(
    "where",
    [
        (),
        ("spec",),
        ("spec", "autoscalerOptions"),
        ("spec", "workerGroupSpecs", 0),
        ("spec", "workerGroupSpecs", 0, "template", "spec"),
        ("spec", "headGroupSpec", "template", "spec", "containers", 0),
        ("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits"),
    ],
)
def test_a_misspelt_key_is_found_in_the_kubernetes_file_too(where: tuple[str | int, ...]) -> None:
    file: dict[str, Any] = read("kubernetes.yaml")
    part: Any = file
    for key in where:
        part = part[key]
    part["maxReplcias"] = 1
    assert any("maxReplcias" in flaw for flaw in flaws(file))


def test_every_container_asks_for_the_token_of_the_secret_and_reports_to_nobody() -> None:
    spec = read("kubernetes.yaml")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [each for group in groups for each in group["template"]["spec"]["containers"]]
    for environment in [spec["autoscalerOptions"]["env"], *(each["env"] for each in containers)]:
        assert TOKEN in environment
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in environment
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in environment
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "300"} in environment
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_the_image_and_the_file_have_the_ray_of_the_lock() -> None:
    locked = re.search(r"^ray==(\S+)", (FOLDER / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert read("kubernetes.yaml")["spec"]["rayVersion"] == locked[1]
    copied = re.findall(r"^COPY (.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert [each for line in copied for each in line.split() if not (ROOT / each).exists()] == []


# --- the autoscaler ------------------------------------------------------------------------------


class NoNodes:
    """A provider that has started nothing yet."""

    def non_terminated_nodes(self, tags: dict[str, str]) -> list[str]:
        return []


def launched(name: str, *refused: str, bundles: int = 2) -> dict[str, int]:
    """What Ray's autoscaler starts for so many waiting trials of a GPU each, where a cloud refused some kinds."""
    whole = prepared(read(name))
    kinds = whole["available_node_types"]
    for kind in kinds.values():  # as Ray fills them in, where it knows a cloud's machines
        if not kind["resources"]:
            kind["resources"] = {"CPU": 4, "GPU": 1, "memory": 11 * GIB}
    scheduler = ResourceDemandScheduler(
        NoNodes(), kinds, whole["max_workers"], whole["head_node_type"], upscaling_speed=1
    )
    records = {kind: NodeAvailabilityRecord(kind, False, 0, None) for kind in refused}
    found, _ = scheduler.get_nodes_to_launch(
        [], {}, [{"CPU": 2, "GPU": 1, "memory": 8 * GIB}] * bundles, {}, [], {}, [],
        node_availability_summary=NodeAvailabilitySummary(records),
    )  # fmt: skip
    return {kind: count for kind, count in found.items() if kind != whole["head_node_type"]}


@pytest.fixture
def our_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """As node.sh gives it to the autoscaler."""
    given = re.search(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+)", NODE.read_text())
    assert given
    monkeypatch.setenv("RAY_AUTOSCALER_UTILIZATION_SCORER", given[1])


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_machines_are_started_first_and_others_where_the_cloud_refused_them(name: str, our_score: None) -> None:
    assert launched(name) == {"spot_gpu": 2}
    assert launched(name, "spot_gpu") == {"on_demand_gpu": 2}
    assert launched(name, "spot_gpu", "on_demand_gpu") == {"spot_gpu": 2}
    assert launched(name, bundles=9) == {"spot_gpu": 4}


def test_by_its_own_score_ray_asks_for_ever_for_what_it_was_refused() -> None:
    # The day that this fails, Ray does by itself what bnscale/schedule/fallback.py is for.
    assert launched("ray_cluster.yaml", "spot_gpu") == {"spot_gpu": 2}


def test_a_study_knows_what_kubernetes_may_bring_the_cluster_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(KubernetesHttpApiClient, "get", lambda self, path: read("kubernetes.yaml") | {"path": path})
    monkeypatch.setattr(tune_cluster, "SERVICE_ACCOUNT", tmp_path)
    (tmp_path / "namespace").write_text("default\n")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "192.0.2.1")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "bnscale")
    assert tune_cluster._most("192.0.2.1:6379") == [Node(0, 0, 8 * GIB), *[Node(4, 1, 16 * GIB, "L4")] * 4]


def test_ray_s_autoscaler_reads_the_kubernetes_file() -> None:
    derived = kuberay._derive_autoscaling_config_from_ray_cr(read("kubernetes.yaml"))
    assert derived["idle_timeout_minutes"] == 10
    gpu = derived["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 4)
    assert gpu["resources"] == {"CPU": 4, "GPU": 1, L4: 1, "memory": 16 * GIB}


def test_a_study_knows_what_the_autoscaler_of_its_head_was_told(tmp_path: Path) -> None:
    """The process that was told is there; what Ray keeps to itself is read from its command line."""
    told = prepared(read("gcp.yaml"))
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(told))
    words = ["--gcs-address=192.0.2.1:6379", f"--autoscaling-config={file}"]
    monitor = subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE)
    try:
        four = [Node(4, 1, 11_000_000_000, "L4")] * 4  # not eight: both kinds together may be four
        assert tune_cluster._most("192.0.2.1:6379") == [Node(0, 0, 0), *four]
        assert tune_cluster._most("192.0.2.2:6379") is None  # another cluster's
        file.write_text(yaml.safe_dump(prepared(read("local.yaml"))))
        assert tune_cluster._most("192.0.2.1:6379") is None  # nothing comes that is not there
    finally:
        monitor.communicate(b"\n")


@pytest.mark.parametrize("name", ["gcp.yaml", "kubernetes.yaml"])
def test_the_autoscaler_starts_a_machine_for_a_trial_that_asks_for_one_type_of_gpu(name: str) -> None:
    asked = {"CPU": 2, "GPU": 1, "memory": 8 * GIB, L4: 0.001}
    if name == "kubernetes.yaml":
        kinds = kuberay._derive_autoscaling_config_from_ray_cr(read(name))["available_node_types"]
    else:
        kinds = prepared(read(name))["available_node_types"]
    able = [kind for kind, node in kinds.items() if all(node["resources"].get(key, 0) >= asked[key] for key in asked)]
    assert sorted(able) == sorted(kind for kind in kinds if "gpu" in kind)


# --- the script ----------------------------------------------------------------------------------


def node(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`node.sh` on a machine with that home, whose `ray` only tells how it was called."""
    binaries = home / "venv" / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    (binaries / "ray").write_text('#!/bin/sh\necho "ray $*"\nenv | sort\n')
    (binaries / "pgrep").write_text("#!/bin/sh\nexit 1\n")  # nothing of Ray's runs there, whatever does here
    for each in binaries.iterdir():
        each.chmod(0o755)
    given = {"HOME": str(home), "PATH": os.environ["PATH"], "BNSCALE_VENV": str(home / "venv")}
    return subprocess.run(
        ["bash", str(NODE), *words], env=given | environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Of a machine that is set up and has the token."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a token")
    (tmp_path / ".ray" / "auth_token").chmod(0o644)
    (tmp_path / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")
    assert node(tmp_path, "setup").returncode == 0
    return tmp_path


def test_every_shell_that_ray_opens_finds_the_environment_and_asks_for_the_token(home: Path) -> None:
    node(home, "setup")
    assert (home / ".bashrc").read_text().count(".bnscale.sh") == 1
    # Not interactive: what a machine's own ~/.bashrc says first must not end it.
    told = subprocess.run(
        ["bash", "-c", "source ~/.bashrc; ray status"], env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "RAY_AUTH_MODE=token" in told
    assert "RAY_USAGE_STATS_ENABLED=0" in told
    assert "RAY_JOB_STOP_WAIT_TIME_S=300" in told  # `ray job stop` reads it where the job's supervisor runs


def test_the_head_shows_its_dashboard_to_nobody_and_the_token_only_to_its_user(home: Path) -> None:
    told = node(home, "ray", "start", "--head", "--autoscaling-config=x.yaml")
    line = told.stdout.splitlines()[0]
    assert line.startswith("ray start ")
    for option in ("--head", "--autoscaling-config=x.yaml", "--port=6379", "--dashboard-host=127.0.0.1"):
        assert option in line.split()
    assert "--disable-usage-stats" in line
    assert "RAY_AUTH_MODE=token" in told.stdout
    assert "RAY_enable_autoscaler_v2=0" in told.stdout
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def test_a_worker_has_the_address_by_which_it_was_reached(home: Path) -> None:
    told = node(home, "ray", "start", "--address=192.0.2.1:6379", SSH_CONNECTION="192.0.2.1 51234 192.0.2.7 22")
    line = told.stdout.splitlines()[0].split()
    assert {"--node-ip-address=192.0.2.7", "--address=192.0.2.1:6379", "--disable-usage-stats"} <= set(line)
    assert not {"--dashboard-host=127.0.0.1", "--port=6379"} & set(line)


def test_no_node_starts_without_a_token(home: Path) -> None:
    (home / ".ray" / "auth_token").unlink()
    told = node(home, "ray", "start", "--head")
    assert told.returncode == 2
    assert re.search(rf"node.sh: {socket.gethostname()}: no token .*ray get-auth-token --generate", told.stderr)
    assert told.stdout == ""


def test_a_wrong_verb_is_told_the_right_ones(home: Path) -> None:
    told = node(home, "instal")
    assert (told.returncode, "say `setup` or `ray start ...`, not `instal`" in told.stderr) == (2, True)


def test_an_environment_without_ray_is_refused_before_it_is_used(tmp_path: Path) -> None:
    told = node(tmp_path, "setup", BNSCALE_VENV=str(tmp_path / "nowhere"))
    assert told.returncode == 2
    assert "no ray in" in told.stderr


# --- what installs and tests ---------------------------------------------------------------------


def steps(folder: Path, *words: str) -> str:
    """What make would do there, with .venv and the locks of a set-up that was whole."""
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text())
    (folder / "cluster").mkdir(exist_ok=True)
    for each in ("requirements.lock", "cluster/requirements.lock", "pyproject.toml"):
        (folder / each).touch()
        os.utime(folder / each, (1, 1))
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", "--dry-run", *words], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("ready", "words", "installs"),
    [
        (None, ["setup"], "requirements.lock"),
        (None, ["setup", "LOCK=cluster/requirements.lock"], "cluster/requirements.lock"),
        ("", ["setup", "LOCK=cluster/requirements.lock"], "cluster/requirements.lock"),  # made when it named none
        ("requirements.lock", ["setup", "LOCK=cluster/requirements.lock"], "cluster/requirements.lock"),
        ("requirements.lock", ["setup"], None),
        ("cluster/requirements.lock", ["setup", "LOCK=cluster/requirements.lock"], None),
        ("cluster/requirements.lock", ["study"], None),  # has all that the other has
        ("cluster/requirements.lock", ["setup", "LOCK=requirements.lock"], "requirements.lock"),
        ("gone.lock", ["setup"], None),
    ],
)
def test_what_is_installed_is_the_lock_that_was_asked_for(
    ready: str | None, words: list[str], installs: str | None, tmp_path: Path
) -> None:
    (tmp_path / ".venv").mkdir()
    if ready is not None:
        (tmp_path / ".venv" / "ready").write_text(ready and f"{ready}\n")
    told = steps(tmp_path, *words)
    assert re.findall(r"--build-constraints (\S+) ", told) == ([installs] if installs else [])
    if installs:
        assert f"echo '{installs}' >.venv/ready" in told


def test_the_real_cluster_is_never_left_out_in_silence() -> None:
    source = (ROOT / "tests" / "cluster" / "hosts.py").read_text()
    needed = re.search(r"^TOOLS = (\[.*\])$", source, re.MULTILINE)
    assert needed
    asked = re.search(r"for each in (.*?); do", (ROOT / ".ci" / "run").read_text(), re.DOTALL)
    assert asked
    installed = {each.partition(":")[0] for each in asked[1].replace("\\\n", " ").split()}
    assert set(json.loads(needed[1])) <= installed
    words = [sys.executable, str(ROOT / "tests" / "cluster" / "hosts.py")]
    assert " ".join(["python", *words[1:]]).replace(f"{ROOT}/", "") in (ROOT / "Makefile").read_text()
    lacks = "import os, runpy, sys; os.geteuid = lambda: 1000; runpy.run_path(sys.argv[1], run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", lacks, words[1]], capture_output=True, text=True)
    assert (ended.returncode, "make test-cluster needs root" in ended.stderr) == (1, True)
