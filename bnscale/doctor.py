"""Would a study run here? Every answer is found by doing, on this machine or with one task on every node of a cluster.

state     ok, warning: a study runs, with what is said, would fail: one does not, or not with a gang
exit      1 where something would fail
"""

import hashlib
import importlib
import multiprocessing
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

import bnscale
from bnscale import start
from bnscale.schedule.token import has_token, token_from
from bnscale.storage import Folder, Storage, abilities, reason, storage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnscale.schedule.tune import Reply

GIB = 2**30
MIB = 2**20
LATE = 60.0  # seconds by which clocks may differ: what is told by wall time reads oddly beyond
PATIENCE = 120.0  # seconds in which two processes import what a gang needs, meet, and sum
NAMED = ("ray", "torch", "deepspeed", "duckdb", "pyarrow")  # packages that are told of where all is well, too
FAR_LESS = 0.05  # of what a check wants to be free: then it would fail


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILS = "would fail"


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    state: State
    said: str  # and, where it is not well, the command that mends it
    free: int | None = None  # bytes of what was measured


def doctor(store: str, data_sets: Path | None, console: Console) -> int:
    """This machine, as a table. The exit code."""
    return tell([(each, "") for each in this_machine(storage(store), data_sets)], console)


def doctor_cluster(store: str, data_sets: Path | None, address: str | None, console: Console) -> int:
    """Every node of a running cluster, as a table. The exit code. Raises `Refusal` where there is no cluster."""
    from bnscale.schedule import tune

    here = storage(store)
    with tune.connect(tune.running(address)) as cluster:
        found = [(each, "") for each in [_strangers(cluster.address), *of_store(here)]]
        found += _together(tune.on_every_node(node, here.url, data_sets, code()))
        if not any(each.state is State.FAILS and each.check == "store" for each, _ in found):
            found += _seen(tune.sight(here))
        began, replies = time.time(), tune.on_every_node(_now)
        found += clocks(began, {each.name: each.found for each in replies if each.found is not None}, time.time())
        found += [(each, "") for each in _gangs(tune.rehearse())]
    return tell(found, console)


def doctor_yaml(file: Path, console: Console) -> int:
    """A cluster file. The exit code. Raises `Refusal` for what Ray would not know."""
    from bnscale.schedule.tune.yaml import check_yaml

    left = check_yaml(file)
    said = f"{file}: Ray knows all of it"
    if not left:
        return tell([(Finding("yaml", State.OK, said), "")], console)
    return tell([(Finding("yaml", State.FAILS, f"{said}; still to fill in: {', '.join(left)}"), "")], console)


def tell(findings: Iterable[tuple[Finding, str]], console: Console) -> int:
    """A line for each finding, with the nodes that it is of. The exit code."""
    findings = list(findings)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check")
    if any(nodes for _, nodes in findings):
        table.add_column("nodes")
    table.add_column("state", no_wrap=True)
    table.add_column("", ratio=1)
    colour = {State.OK: "green", State.WARNING: "yellow", State.FAILS: "red"}
    for each, nodes in findings:
        middle = [Text(nodes)] if len(table.columns) == 4 else []
        table.add_row(Text(each.check), *middle, Text(each.state, colour[each.state]), Text(each.said))
    console.print(table)
    failing = sum(each.state is State.FAILS for each, _ in findings)
    if failing:
        console.print(f"\na study would fail here: {failing} thing{'s' if failing > 1 else ''} to mend", markup=False)
    return 1 if failing else 0


# --- one machine ---------------------------------------------------------------------------------


def this_machine(store: Storage, data_sets: Path | None) -> list[Finding]:
    """All checks that need no cluster."""
    return [
        *versions(),
        *gpus(),
        compiler(),
        _gang(*rehearse()),
        *of_store(store),
        *token(),
        *space(store),
        *_data(data_sets),
    ]


def node(store: str, data_sets: Path | None, drivers: str) -> list[Finding]:
    """The checks of one node of a cluster, called there. `drivers` is the code of the driver's bnscale."""
    same = Finding("bnscale", State.OK, f"{bnscale.__version__}, the driver's code")
    if code() != drivers:
        same = Finding(
            "bnscale",
            State.WARNING,
            f"{bnscale.__version__}, other code than the driver's ({start.ROOT}); bring the same to every node",
        )
    found = [each for each in versions() if each.check != "bnscale"]
    return [same, *found, *gpus(), compiler(), *token(), *space(storage(store)), *_data(data_sets)]


def versions() -> list[Finding]:
    """Python, bnscale, and what it stands on, against what the project file asks for."""
    found = [
        Finding("python", State.OK, f"{platform.python_version()}, {sys.executable}"),
        Finding("bnscale", State.OK, f"{bnscale.__version__}, {start.ROOT}"),
    ]
    locked = start.locked()
    for each in start.requirements():
        version = start.installed(each.name)
        asked = f"{each.rule} {each.version} is asked for"
        if version is None or not each.new_enough(version):
            found.append(Finding(each.name, State.FAILS, f"{version or 'not installed'}, {asked}; {start.mend()}"))
        elif not each.met(version):
            found.append(Finding(each.name, State.WARNING, f"{version}, {asked}; {start.mend()}"))
        elif (broken := _broken(each.name)) is not None:
            found.append(Finding(each.name, State.FAILS, f"{version}, and does not import ({broken}); {start.mend()}"))
        elif each.name in NAMED:
            lock = locked.get(each.name, version)
            other = "" if version.split("+")[0] == lock else f", the lock has {lock}"
            found.append(Finding(each.name, State.OK, version + other))
    return found


def _broken(package: str) -> str | None:
    """Why one of those that are told of cannot be imported. DeepSpeed's turn comes in the gang."""
    if package in NAMED and package != "deepspeed":
        try:
            importlib.import_module(package)
        except Exception as error:  # whatever its own code raises
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def gpus() -> list[Finding]:
    """Each computes something."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            return [Finding("GPU", State.OK, "none: trials train on the CPU")]
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return [
            Finding(
                "GPU",
                State.WARNING,
                f"there is NVIDIA's driver {driver} and torch {torch.__version__} ({built}) sees no GPU: trials train "
                "on the CPU; install a torch for this driver, or a newer driver",
            )
        ]
    found = []
    for number in range(torch.cuda.device_count()):
        name = f"{torch.cuda.get_device_name(number)}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
        try:
            ones = torch.ones(256, 256, device=f"cuda:{number}")
            total = float((ones @ ones).sum())
            free = torch.cuda.mem_get_info(number)[0]
        except RuntimeError as error:
            found.append(Finding(f"GPU {number}", State.FAILS, f"{name}: {str(error).strip().splitlines()[0]}"))
            continue
        well = total == 256.0**3
        state = State.FAILS if not well else State.OK if free > 2 * GIB else State.WARNING
        computed = f"{free / GIB:.1f} GiB free" if well else "a product of ones is wrong: take it out of service"
        found.append(Finding(f"GPU {number}", state, f"{name}, {computed}"))
    return found


def _driver() -> str | None:
    """The version of NVIDIA's kernel module; None where there is none."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def compiler() -> Finding:
    """What makes steps fast is compiled where it runs: kernels on a CPU, blocks on a GPU."""
    from bnscale.networks import native

    found = native.compiler()
    if found is None:
        slow = "none: trials train all the same, more slowly; Debian: apt install gcc, or name one with $CC"
        return Finding("compiler", State.WARNING, slow)
    if native.kernels() is None:
        why = "what it makes does not load; name another with $CC" if native.wide() else "this CPU has no AVX-512"
        return Finding("compiler", State.OK, f"{found[0]}; norms are not fused: {why}")
    return Finding("compiler", State.OK, f"{found[0]}: norms are fused on the CPU")


def token() -> list[Finding]:
    """Where a cluster's token would come from, and who else may read it."""
    mode = os.environ.get("RAY_AUTH_MODE")
    source, file = token_from()
    said = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE not set"
    if mode is not None and mode.lower() != "token":
        return [
            Finding("token", State.WARNING, f"{said}: a cluster started here lets in anybody; `unset RAY_AUTH_MODE`")
        ]
    if file is None:
        return [Finding("token", State.OK, f"in {source}; {said}")]
    if not has_token():
        if mode:
            return [Finding("token", State.FAILS, f"{said} and none in {file}; `ray get-auth-token --generate`")]
        return [Finding("token", State.OK, "none, and none needed: a cluster of this machine alone makes its own")]
    rights = stat.S_IMODE(file.stat().st_mode)
    if rights & 0o077:
        return [Finding("token", State.WARNING, f"{file} is readable by others ({rights:04o}); `chmod 600 {file}`")]
    return [Finding("token", State.OK, f"{file}, mode {rights:04o}; {said}")]


def space(store: Storage) -> list[Finding]:
    """Free disk where results and Ray's files go, free shared memory and free memory."""
    places: list[tuple[str, Path, int, str]] = [
        ("/tmp", Path(tempfile.gettempdir()), GIB, "Ray's sockets and logs"),
        ("/dev/shm", Path("/dev/shm"), 150 * MIB, "Ray's object store"),
    ]
    if isinstance(store, Folder):
        places.insert(0, ("disk", _there(store.root), GIB, f"the store {store.url}"))
    found = []
    for name, path, wanted, what in places:
        try:
            free = shutil.disk_usage(path).free
        except OSError as error:
            found.append(Finding(name, State.FAILS, f"{path}: {reason(error)}; it holds {what}"))
            continue
        found.append(_room(name, free, wanted, f"for {what}"))
    return [*found, _room("memory", psutil.virtual_memory().available, 2 * GIB, "; a worker takes 1 GiB and more")]


def _room(check: str, free: int, wanted: int, what: str) -> Finding:
    state = State.OK if free >= wanted else State.WARNING if free > FAR_LESS * wanted else State.FAILS
    little = "" if state is State.OK else f"; less than {wanted / GIB:.2g} GiB, free some"
    join = "" if what.startswith(";") else " "
    return Finding(check, state, f"{free / GIB:.1f} GiB free{join}{what}{little}", free)


def _there(path: Path) -> Path:
    """The nearest folder at or above it that exists, as far as this user may see."""
    return next(each for each in [path, *path.parents] if _is_folder(each))


def _is_folder(path: Path) -> bool:
    """Not of one below a folder that this user may not enter."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _data(folder: Path | None) -> list[Finding]:
    """Whether data sets can be read there; digits need no folder."""
    if folder is None:
        return []
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise NotADirectoryError
        held = sorted(each.name for each in folder.iterdir() if _is_folder(each))
    except (FileNotFoundError, NotADirectoryError):
        return [Finding("data", State.FAILS, f"{folder}: there is no such folder; mount or fill it, or name another")]
    except OSError as error:
        return [
            Finding("data", State.FAILS, f"{folder}: {reason(error)}; `chmod -R u+rX` what this user may not enter")
        ]
    return [Finding("data", State.OK, f"{folder}: {', '.join(held) or 'empty; what is asked for is downloaded'}")]


# --- a gang --------------------------------------------------------------------------------------


def rehearse() -> tuple[str, str | None]:
    """Raise a gang of two processes on this machine as a trial raises its own, and let it sum once: over NCCL where
    there are two GPUs, else over gloo. Who took part, and the error it ended with."""
    import torch

    gpu = torch.cuda.device_count() >= 2
    who = f"2 processes over {'NCCL' if gpu else 'gloo'}"
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(2)]
    members = [
        spawn.Process(target=_member, args=(rank, gpu, theirs), daemon=True) for rank, (_, theirs) in enumerate(pipes)
    ]
    ours = [each for each, _ in pipes]
    try:
        for each, (_, theirs) in zip(members, pipes, strict=True):
            each.start()
            theirs.close()  # so that its end is heard
        deadline = time.monotonic() + PATIENCE
        meeting = _heard(ours[0], deadline)
        ours[1].send(meeting)
        seconds = max(float(_heard(each, deadline)) for each in ours)
        return f"{who}, {1000 * seconds:.1f} ms", None
    except (RuntimeError, OSError, EOFError) as error:
        return who, str(error).strip().splitlines()[-1] if str(error).strip() else "a process died"
    finally:
        for each in members:
            if each.pid is not None:
                each.kill()
                each.join()


def _heard(end: Connection, deadline: float) -> Any:
    if not end.poll(max(0.0, deadline - time.monotonic())):
        raise RuntimeError(f"did not meet within {PATIENCE:.0f} s")
    answer = end.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _member(rank: int, gpu: bool, end: Connection) -> None:
    """One process of the gang: the first tells where it is host, the second is told."""
    with _silent():
        try:
            import torch

            from bnscale.engine import deepspeed

            address, port = deepspeed.host("127.0.0.1", 2) if rank == 0 else end.recv()
            if rank == 0:
                end.send((address, port))
            device = torch.device("cuda", rank) if gpu else torch.device("cpu")
            end.send(deepspeed.rehearse(deepspeed.join(rank, 2, address, port, device)))
        except Exception as error:
            end.send(f"{type(error).__name__}: {error}")
        with suppress(EOFError):
            end.recv()  # until it is killed: who leaves first would break the other's sum


@contextmanager
def _silent() -> "Iterator[None]":
    """DeepSpeed and gloo talk on their way, past Python's own streams."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    yield


def _gang(who: str, error: str | None) -> Finding:
    if error is None:
        return Finding("gang", State.OK, who)
    return Finding("gang", State.FAILS, f"{who}: {error}; until it is mended, only with --workers-per-trial 1")


def _gangs(met: list[tuple[str, str | None]]) -> list[Finding]:
    if met:
        return [_gang(*each) for each in met]
    said = "no node that trials may run on is there yet, so none met; ask again while a study runs"
    return [Finding("gang", State.WARNING, said)]


# --- a store -------------------------------------------------------------------------------------


def of_store(store: Storage) -> list[Finding]:
    """What a study asks of its store, each proved by doing it. A folder that is not there is not made: what is above
    it is asked, in a folder of its own."""
    if not isinstance(store, Folder) or _is_folder(store.root):
        return proved(store)
    above = _there(store.root)
    try:
        own = tempfile.mkdtemp(prefix=".bnscale-doctor-", dir=above)
    except OSError as error:
        return [
            Finding("store", State.FAILS, f"{store.url}: cannot be made ({reason(error)}); `--store` names another")
        ]
    try:
        return proved(Folder(own), f"{store.url} (not there yet)")
    finally:
        shutil.rmtree(own, ignore_errors=True)


def proved(store: Storage, name: str | None = None) -> list[Finding]:
    """One finding where all is well, else one for each thing that the store cannot do."""
    found = abilities(store).named()
    name = name or store.url
    if not any(ability.error for ability in found.values()):
        did = ", ".join(f"{what} {1000 * ability.seconds:.0f}" for what, ability in found.items())
        return [Finding("store", State.OK, f"{name}: {did} ms")]
    meant = {
        "create": ": two drivers must not share it; use a disk, or a bucket with conditional puts",
        "swap": ": two drivers must not share it; use a disk, or a bucket with conditional puts",
        "list": ": studies run, and what they wrote shows late",
    }
    return [
        Finding(
            "store",
            State.WARNING if what == "list" else State.FAILS,
            f"{name}: {what}: {ability.error}{meant.get(what, '; choose another with --store')}",
        )
        for what, ability in found.items()
        if ability.error
    ]


# --- a cluster -----------------------------------------------------------------------------------


def _strangers(address: str) -> Finding:
    from bnscale.schedule.tune.entry import open_to_strangers

    entered = open_to_strangers(address)
    if entered is None:
        said = f"{address} left it open for a minute whether it lets in who has no token; is it busy? ask again"
        return Finding("cluster", State.WARNING, said)
    if entered:
        return Finding(
            "cluster",
            State.WARNING,
            f"{address} lets in anybody who reaches it, to run anything; start every node with RAY_AUTH_MODE=token",
        )
    return Finding("cluster", State.OK, f"{address}: who has no token is refused")


def _together(replies: "list[Reply[list[Finding]]]") -> list[tuple[Finding, str]]:
    """What the nodes found, those with the same finding on one line; of room that is enough the least."""
    by: dict[tuple[str, ...], dict[str, Finding]] = {}
    for reply in replies:
        lost = [Finding("node", State.FAILS, f"{reply.error}; `ray status` shows what is there")]
        for each in reply.found if reply.found is not None else lost:
            enough = each.state is State.OK and each.free is not None  # no two nodes have the same, and none matters
            by.setdefault((each.check, each.state, "" if enough else each.said), {})[reply.name] = each
    order = list(dict.fromkeys(check for check, *_ in by))
    return [
        (min(nodes.values(), key=lambda each: each.free or 0), _named(list(nodes), len(replies)))
        for _, nodes in sorted(by.items(), key=lambda line: order.index(line[0][0]))
    ]


def _seen(wrong: dict[str, str | None]) -> list[tuple[Finding, str]]:
    by: dict[str | None, list[str]] = {}
    for name, error in wrong.items():
        by.setdefault(error, []).append(name)
    return [
        (
            Finding("store", State.OK, "each sees what the others write")
            if error is None
            else Finding("store", State.FAILS, f"{error}; mount the same folder there, or give a bucket"),
            _named(names, len(wrong)),
        )
        for error, names in by.items()
    ]


def clocks(began: float, nodes: dict[str, float], ended: float) -> list[tuple[Finding, str]]:
    """What each node's clock said between two looks at the driver's, in seconds since 1970."""
    off = {name: now - min(max(now, began), ended) for name, now in nodes.items()}
    found = [
        (
            Finding(
                "clock",
                State.WARNING,
                f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the driver's: times mislead, "
                "results do not; `timedatectl set-ntp true`",
            ),
            name,
        )
        for name, seconds in off.items()
        if abs(seconds) > LATE
    ]
    good = [name for name, seconds in off.items() if abs(seconds) <= LATE]
    if good:
        found.insert(0, (Finding("clock", State.OK, f"within {LATE:.0f} s of the driver's"), _named(good, len(nodes))))
    return found


def _now() -> float:
    return time.time()


def _named(names: list[str], of: int) -> str:
    return f"all {of}" if len(names) == of > 1 else ", ".join(names)


@lru_cache
def code() -> str:
    """What this process's bnscale is made of, as a digest."""
    made = hashlib.sha256()
    package = Path(bnscale.__file__).parent
    for file in sorted(package.rglob("*.py")):
        made.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return made.hexdigest()
