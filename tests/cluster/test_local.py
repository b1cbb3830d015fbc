"""cluster/local.yaml brought up by `ray up` over hosts of this machine, used as a user would, and taken down again.

The client has no part in the cluster. The head has no CPU for trials, the two workers have one each, so that every
study is one of two hosts. What hosts share is a folder, as over NFS.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from hosts import ROOT, SHARED, Host, hosts, lacking
from pydantic import TypeAdapter

import bnscale
from bnscale import train
from bnscale.engine import Gang
from bnscale.probes import EPOCH, curve
from bnscale.store import Manifest, Store
from bnscale.train import Job
from bnscale.trial import Outcome, Trial

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(lacking()), reason=f"make test-cluster needs {', '.join(lacking())}"),
]

ENVIRONMENT = Path(sys.prefix)
# Real trainings of the laptop preset, made few and each a little longer than it takes to see that it goes on.
STUDY = "studies/frankle_depth.py --preset laptop --set depth=8 --set lr=0.1"
TRIALS = "--set trainable=bn,output --set epochs=20 --set seed=0,1,2"
GANG = f"{STUDY} --set trainable=bn --set epochs=2 --set seed=0 --workers-per-trial 2"
SECONDS = "AUTOSCALER_UPDATE_INTERVAL_S=1"  # between two looks of the autoscaler; 5 by default
# A host that answers nothing is dead after 5 s instead of 30; workers leave when their head is gone for 5 s, not 60.
SOON = "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 RAY_gcs_rpc_server_reconnect_timeout_s=5"


@dataclass(frozen=True)
class Local:
    """A cluster that is up."""

    client: Host
    head: Host
    workers: list[Host]
    shared: Path  # as this machine sees it
    reference: "subprocess.Popen[bytes]"  # the same study on this machine alone
    dashboard: "subprocess.Popen[bytes]"  # its way to the client's own port 8265
    gang: "subprocess.Popen[str] | None"  # the first job, which runs while others look who may enter

    def store(self, name: str) -> Store:
        return Store.existing(self.shared / name)

    def manifests(self, name: str) -> list[Manifest]:
        with contextlib.suppress(Exception):
            return self.store(name).manifests()
        return []

    def submit(self, command: str) -> "subprocess.Popen[str]":
        """Give a job to the cluster, from the client, through the dashboard. Prints what it prints, ends as it ends."""
        words = f"ray job submit --address http://localhost:8265 -- bash -c {command!r}"
        return subprocess.Popen(
            self.client.command(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finished(job: "subprocess.Popen[str]") -> str:
    """Wait for a job's end, which is to be a good one. What it printed."""
    with job:
        log, _ = job.communicate(timeout=240)
    assert job.returncode == 0, log
    return log


def eventually(happens: Callable[[], object], *, within: float, otherwise: Callable[[], object] = str) -> None:
    """Wait for it; where it does not come, say what else there is."""
    end = time.monotonic() + within
    while not happens():
        assert time.monotonic() < end, f"not within {within:g} s; {otherwise()}"
        time.sleep(0.3)


def left(host: Host) -> list[str]:
    """What runs there and is neither its first process nor its sshd's."""
    return [each for each in host.processes() if not each.startswith(("sshd", "bash -c"))]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("cluster")
    with hosts(["client", "head", "one", "two"], folder) as each, contextlib.ExitStack() as stack:
        client, head, *workers = each.values()
        for host in each.values():
            cpus = 1 if host in workers else 0
            host.write(
                "~/.bashrc",
                f"export BNSCALE_VENV={ENVIRONMENT} {SECONDS} {SOON} RAY_OVERRIDE_RESOURCES='{{\"CPU\":{cpus}}}'\n",
            )
        client.write("~/.bashrc", f"export PATH={ENVIRONMENT}/bin:$PATH RAY_AUTH_MODE=token\n")
        client.run("ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
        file = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
        file["provider"] |= {"head_ip": head.address, "worker_ips": [each.address for each in workers]}
        file["auth"]["ssh_user"] = "root"
        client.write("~/local.yaml", yaml.safe_dump(file))
        reference = stack.enter_context(alone(folder / "shared" / "alone"))
        up = client.run("ray up -y ~/local.yaml", timeout=200)
        assert "will not" not in up  # launch workers, start the runtime
        dashboard = stack.enter_context(ending(client.command("ray dashboard ~/local.yaml")))
        for host in workers:
            eventually(lambda host=host: any("DashboardAgent" in each for each in host.processes()), within=120)
        eventually(lambda: "2.0 CPU" in head.ask("ray status").stdout, within=60)
        made = Local(client, head, workers, folder / "shared", reference, dashboard, None)
        yield replace(made, gang=made.submit(f"cd ~/bnscale && python {GANG} --store {SHARED}/gang"))


@contextlib.contextmanager
def ending(command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is ended with the block."""
    nothing = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=ROOT, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """And what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def alone(store: Path) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    """The study on this machine alone, with no cluster but its own."""
    return ending([sys.executable, *f"{STUDY} {TRIALS} --address local --store {store}".split()])


def rows(store: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every reading, and what became of every trial, as bits: NaN is equal to itself."""
    session = bnscale.open(store)
    tables = ["curve", "gamma", "gamma_histogram", "clamp", "sparsity"]
    read = {table: session.sql(f"from {table} order by all").rows for table in tables}
    read["trials"] = session.sql("select trial, outcome, step from trials order by all").rows
    return {table: [tuple(map(repr, row)) for row in found] for table, found in read.items()}


# --- who may enter -------------------------------------------------------------------------------

ASK = (
    "import sys, urllib.request as r, urllib.error as e\n"
    "q = r.Request(sys.argv[1], headers=dict([sys.argv[2].split(': ')] if sys.argv[2:] else []))\n"
    "try: print(r.urlopen(q, timeout=20).status)\n"
    "except e.HTTPError as error: print(error.code)\n"
)


@pytest.mark.parametrize(("header", "answer"), [("", "401"), ("Authorization: Bearer wrong", "403")])
@pytest.mark.parametrize("url", ["http://127.0.0.1:8265/api/jobs/", "http://192.0.2.3:52365/api/job_agent/jobs/"])
def test_without_the_token_the_dashboard_and_its_agents_answer_nobody(
    local: Local, url: str, header: str, answer: str
) -> None:
    assert local.head.run(f'python -c "{ASK}" {url} {header and repr(header)}').split()[-1] == answer


@pytest.mark.parametrize("given", ["RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong", "RAY_AUTH_MODE=disabled"])
def test_without_the_token_a_client_is_refused(local: Local, given: str) -> None:
    told = local.workers[0].ask(f"{given} ray status --address {local.head.address}:6379")
    assert told.returncode != 0
    assert re.search("(?i)auth|token", told.stdout), told.stdout
    assert "CPU" not in told.stdout


def test_the_dashboard_is_on_the_head_s_own_address_alone(local: Local) -> None:
    told = local.client.ask(f'python -c "{ASK}" http://{local.head.address}:8265/')
    assert "refused" in told.stdout


def test_every_node_has_the_token_for_its_user_s_eyes(local: Local) -> None:
    for host in (local.head, *local.workers):
        assert host.run("stat -c %a ~/.ray/auth_token ~/.ray").split() == ["600", "700"]


# --- studies -------------------------------------------------------------------------------------


def test_a_gang_trains_over_two_hosts_what_one_worker_trains(local: Local, tmp_path: Path) -> None:
    """Each host has one CPU for trials: two workers of one are two hosts."""
    assert local.gang
    finished(local.gang)
    (gang,) = local.manifests("gang")
    assert gang.outcome is Outcome.FINISHED
    assert gang.facts["workers"] == 2
    kinds = {name: TypeAdapter(field.annotation) for name, field in Trial.model_fields.items()}
    trial = Trial(**{name: kinds[name].validate_python(value) for name, value in gang.fields.items()})
    assert trial.id == gang.trial
    here = Job(trial, {curve: EPOCH}, str(tmp_path / "one"), str(tmp_path), None, 0, 60.0)
    for _ in train.run([here], Gang(), 1, lambda: False):
        pass
    losses = [
        [loss for (loss,) in bnscale.open(store).sql("select loss from curve order by step, split").rows]
        for store in (local.shared / "gang", tmp_path / "one")
    ]
    # Equal but for the order of summation; a change of the last bit in one worker's norms grows to 0.2 % in 25 updates.
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_doctor_sees_every_node_the_store_that_they_share_and_a_gang_of_those_that_train(local: Local) -> None:
    told = local.head.run(f"cd ~/bnscale && COLUMNS=200 bnscale doctor --cluster --store {SHARED}/gang", timeout=200)
    found = [" ".join(line.split()) for line in told.splitlines()]
    assert "store all 3 ok each sees what the others write" in found, told  # the head, too
    assert any(line.startswith("gang ok 2 processes on 2 nodes over ") for line in found), told
    assert "would fail" not in told


def test_a_study_over_two_hosts_of_which_one_is_lost_half_way_ends_with_the_tables_of_one(local: Local) -> None:
    job = local.submit(f"cd ~/bnscale && python {STUDY} {TRIALS} --store {SHARED}/study --save-every 1")
    lost = local.workers[1]

    def busy() -> bool:
        """It has trained one trial to its end, and has begun another."""
        of = [each for each in local.manifests("study") if each.facts.get("host") == lost.name]
        ended = [each for each in of if each.outcome is not None]
        return bool(ended) and any(each.outcome is None and each.step > 0 for each in of)

    eventually(busy, within=120)
    lost.kill()
    interrupted = [
        each.trial for each in local.manifests("study") if each.outcome is None and each.facts.get("host") == lost.name
    ]
    log = finished(job)
    assert "6 done" in log, log
    assert local.reference.wait(timeout=120) == 0
    assert rows(local.shared / "study") == rows(local.shared / "alone")
    manifests = {each.trial: each for each in local.manifests("study")}
    assert {each.facts["host"] for each in manifests.values()} == {"one", "two"}
    for trial in interrupted:
        assert manifests[trial].attempts > 1
        assert manifests[trial].facts["host"] == "one"


def test_down_leaves_nothing_running(local: Local) -> None:
    end(local.dashboard)
    local.client.run("ray down -y ~/local.yaml", timeout=120)
    for host in (local.head, local.workers[0]):
        eventually(lambda host=host: not left(host), within=60, otherwise=lambda host=host: left(host))
