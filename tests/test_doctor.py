"""Would a study run here? What the doctor finds on this machine, and how it tells what nodes found."""

import io
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bnscale import cli, doctor, start
from bnscale.doctor import Finding, State
from bnscale.networks import native
from bnscale.schedule.token import has_token
from bnscale.schedule.tune import Reply
from bnscale.schedule.tune import nodes as tune_nodes
from bnscale.schedule.tune.entry import open_to_strangers
from bnscale.schedule.tune.nodes import Meeting
from bnscale.schedule.tune.yaml import check_yaml
from bnscale.storage import Folder
from bnscale.trial import Refusal


def told(*findings: tuple[Finding, str]) -> tuple[int, str]:
    out = io.StringIO()
    return doctor.tell(list(findings), Console(file=out, width=200, highlight=False)), out.getvalue()


@pytest.mark.timeout(200)
def test_a_sound_machine_is_told_line_by_line_and_nothing_is_left_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bnscale", "doctor", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert (ended.value.code, err) == (0, "")
    checks = [line.split()[0] for line in out.splitlines() if line[:1].strip()]
    known = [
        "check",
        "python",
        "bnscale",
        "deepspeed",
        "duckdb",
        "pyarrow",
        "ray",
        "torch",
        "GPU",
        "compiler",
        "gang",
        "store",
    ]
    assert checks == [*known, "token", "disk", "/tmp", "/dev/shm", "memory", "data"]
    assert "2 processes over " in out
    assert list(tmp_path.iterdir()) == []  # nor is the store made that a study would make


def test_it_ends_with_1_only_where_a_study_would_fail() -> None:
    well, odd, ill = (Finding("clock", state, "said") for state in State)
    assert told((well, ""), (odd, "")) == (0, told((well, ""), (odd, ""))[1])
    code, out = told((well, ""), (ill, ""), (ill, ""))
    assert code == 1
    assert out.endswith("\na study would fail here: 2 things to mend\n")
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["check", "clock", "clock", "clock"]


# --- one machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "state", "said"),
    [
        (None, State.FAILS, "not installed, >= 2.11 is asked for; run `make "),
        ("2.2.0", State.FAILS, "2.2.0, >= 2.11 is asked for; run `make "),
        ("2.11.1+cu130", State.OK, "2.11.1+cu130, the lock has "),
    ],
)
def test_a_version_is_held_against_the_project_file_and_the_lock(
    version: str | None, state: State, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = start.installed
    monkeypatch.setattr(start, "installed", lambda name: version if name == "torch" else installed(name))
    [found] = [each for each in doctor.versions() if each.check == "torch"]
    assert found.state is state
    assert found.said.startswith(said)


def test_a_version_that_is_newer_than_what_was_tried_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = start.installed
    monkeypatch.setattr(start, "installed", lambda name: "99.0" if name == "ray" else installed(name))
    [found] = [each for each in doctor.versions() if each.check == "ray"]
    assert found.state is State.WARNING
    assert found.said.startswith("99.0, == ")


def test_a_package_that_does_not_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "duckdb.py").write_text("raise OSError('libstdc++.so.6: version not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "duckdb", raising=False)
    [found] = [each for each in doctor.versions() if each.check == "duckdb"]
    monkeypatch.delitem(sys.modules, "duckdb", raising=False)
    assert found.state is State.FAILS
    assert "does not import (OSError: libstdc++.so.6: version not found); run `make " in found.said


def token(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, rights: int = 0o600, **variables: str
) -> Finding:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": str(home)}).items():
        monkeypatch.setenv(name, value)
    if text is not None:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(text)
        (home / ".ray" / "auth_token").chmod(rights)
    [found] = doctor.token()
    return found


def test_a_machine_without_a_compiler_is_told_what_it_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.compiler().state is (State.OK if native.compiler() else State.WARNING)
    monkeypatch.setenv("CC", "/nonexistent/cc")
    native.kernels.cache_clear()
    found = doctor.compiler()
    native.kernels.cache_clear()
    assert found.state is State.WARNING
    assert "apt install gcc" in found.said


def test_no_token_is_needed_where_no_cluster_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert token(tmp_path, monkeypatch, None).state is State.OK


def test_a_token_that_others_may_read_is_a_warning_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = token(tmp_path, monkeypatch, "secret", 0o644)
    assert found.state is State.WARNING
    assert (
        found.said == f"{tmp_path}/.ray/auth_token is readable by others (0644); `chmod 600 {tmp_path}/.ray/auth_token`"
    )
    (tmp_path / ".ray" / "auth_token").chmod(0o600)
    assert doctor.token()[0] == Finding(
        "token", State.OK, f"{tmp_path}/.ray/auth_token, mode 0600; RAY_AUTH_MODE not set"
    )


def test_a_mode_that_asks_for_a_token_that_is_not_there_would_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = token(tmp_path, monkeypatch, None, RAY_AUTH_MODE="token")
    assert found.state is State.FAILS
    assert found.said.endswith(f"none in {tmp_path}/.ray/auth_token; `ray get-auth-token --generate`")


def test_a_mode_that_asks_nobody_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert token(tmp_path, monkeypatch, "secret", RAY_AUTH_MODE="disabled").state is State.WARNING


def test_a_token_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "secret" not in token(tmp_path, monkeypatch, "secret", 0o644).said
    assert "secret" not in token(tmp_path, monkeypatch, None, RAY_AUTH_TOKEN="secret").said


@pytest.mark.parametrize(("free", "state"), [(1.0, State.OK), (0.5, State.WARNING), (0.01, State.FAILS)])
def test_little_room_is_a_warning_and_none_would_fail(
    free: float, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": int(free * doctor.GIB)})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    disk = doctor.space(Folder(tmp_path / "not" / "there"))[0]
    assert (disk.check, disk.state) == ("disk", state)
    assert str(tmp_path / "not" / "there") in disk.said


def test_a_gang_whose_process_dies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_member", _dies)
    who, error = doctor.rehearse()
    assert who.startswith("2 processes over ")
    assert error == "a process died"


def _dies(rank: int, gpu: bool, end: object) -> None:
    os._exit(1)


def test_data_that_is_not_there_or_may_not_be_read_is_found(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    assert doctor._data(tmp_path) == [Finding("data", State.OK, f"{tmp_path}: cifar10")]
    [found] = doctor._data(tmp_path / "none")
    assert found.state is State.FAILS
    assert doctor._data(None) == []


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user may not enter; root is somebody else for that time."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


def test_what_lies_below_a_folder_that_may_not_be_entered_is_a_finding(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor._data(closed / "data")[0].said.startswith(f"{closed}/data: permission denied; ")
    [found] = doctor.of_store(Folder(closed / "a" / "results"))
    assert (found.state, "cannot be made (permission denied)" in found.said) == (State.FAILS, True)
    assert doctor.space(Folder(closed / "a" / "results"))[0].check == "disk"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(closed / "token"))
    assert not has_token()
    assert doctor.token()[0].state is State.FAILS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cluster_name: \xe9\n", "is no YAML: 'utf-8' codec can't decode byte 0xe9"),
        (
            b"cluster_name: a\nprovider: {type: aws, 5: b}\n",
            "the key provider.5 is read as int, and Ray wants text; put",
        ),
        (b"available_node_types: {on: {}}\n", "the key available_node_types.True is read as bool, and Ray wants text"),
        (b"setup_commands: [{null: a}]\n", "the key setup_commands.0.None is read as NoneType, and Ray wants text"),
    ],
)
def test_a_cluster_file_that_is_no_text_or_has_such_keys_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(Refusal, match=f"^{re.escape(f'{file}: {said}')}"):
        check_yaml(file)


def test_a_cluster_that_does_not_say_whether_it_asks_for_a_token_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert open_to_strangers(address, patience=0.01) is None


# --- several -------------------------------------------------------------------------------------


def reply(name: str, *found: Finding, error: str | None = None) -> Reply[list[Finding]]:
    return Reply(f"id of {name}", name, None if error else list(found), error, lost=error is not None)


def test_nodes_that_found_the_same_share_a_line_and_a_silent_one_would_fail() -> None:
    same, other = Finding("ray", State.OK, "2.60.0"), Finding("ray", State.WARNING, "2.61.0")
    nodes = [reply("a", same), reply("b", same), reply("c", other), reply("d", error="no answer within 60 s")]
    assert [(each.state, said, names) for each, names in doctor._together(nodes) for said in [each.said]] == [
        (State.OK, "2.60.0", "a, b"),
        (State.WARNING, "2.61.0", "c"),
        (State.FAILS, "no answer within 60 s; `ray status` shows what is there", "d"),
    ]
    assert doctor._together(nodes[:2]) == [(same, "all 2")]


def test_of_room_that_is_enough_the_least_is_told() -> None:
    nodes = [
        reply(name, doctor._room("disk", size * doctor.GIB, doctor.GIB, "")) for name, size in [("a", 5), ("b", 3)]
    ]
    [(found, names)] = doctor._together(nodes)
    assert (found.said.strip(), names) == ("3.0 GiB free", "all 2")


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (1000.0, "within 60 s"),
        (1070.0, "within 60 s"),  # the question took so long
        (1680.0, "600 s ahead of"),
        (400.0, "600 s behind"),
    ],
)
def test_a_clock_is_judged_by_what_the_drivers_own_said_before_and_after(at: float, said: str) -> None:
    [(found, names)] = doctor.clocks(1000.0, {"far": at}, 1080.0)
    assert found.said.startswith(said)
    assert found.state is (State.OK if "within" in said else State.WARNING)
    assert names == "far"


def test_what_nodes_run_is_known_by_its_content(tmp_path: Path) -> None:
    doctor.code.cache_clear()
    [same, *_] = doctor.node(str(tmp_path), None, doctor.code())
    [other, *_] = doctor.node(str(tmp_path), None, "0" * 64)
    assert (same.state, other.state) == (State.OK, State.WARNING)
    assert "other code than the driver's" in other.said


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, object]:
    return {"NodeID": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "met"),
    [
        # As the files in cluster/ have it: a head that takes no trials and has no GPU is in no gang.
        ([node("head"), node("a", CPU=4, GPU=1), node("b", CPU=4, GPU=1)], [Meeting(["a", "b"], gpu=True)]),
        ([node("head"), node("a", CPU=4), node("b", CPU=4)], [Meeting(["a", "b"], gpu=False)]),
        (
            [node("head", CPU=8), node("a", CPU=4, GPU=1), node("b", CPU=4, GPU=1), node("c", CPU=1)],
            [Meeting(["a", "b"], gpu=True), Meeting(["head", "c"], gpu=False)],
        ),
        ([node("head"), node("a", CPU=4, GPU=1)], [Meeting(["a", "a"], gpu=False)]),
        ([node("head", CPU=8, GPU=2), node("a", alive=False, CPU=8)], [Meeting(["head", "head"], gpu=True)]),
        ([node("head"), node("a", alive=False, CPU=8)], []),
    ],
)
def test_a_gang_meets_on_the_nodes_that_trials_may_run_on_those_with_gpus_by_themselves(
    nodes: list[dict[str, object]], met: list[Meeting]
) -> None:
    assert tune_nodes.meetings(nodes, 2) == met


def test_where_no_node_takes_trials_yet_it_is_said_and_nothing_would_fail() -> None:
    [found] = doctor._gangs([])
    assert found.state is State.WARNING
    assert "is there yet" in found.said


@pytest.mark.parametrize("gpu", [False, True])
def test_a_worker_of_a_gang_uses_a_gpu_only_where_all_do(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides no GPU of a worker that asked for none."""
    devices = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("bnscale.engine.deepspeed.join", lambda *words: devices.append(words[-1].type))
    monkeypatch.setattr("bnscale.engine.deepspeed.rehearse", lambda gang: 0.0)
    tune_nodes._Worker(gpu).join(0, 2, "127.0.0.1", 1)
    assert devices == ["cuda" if gpu else "cpu"]
