"""A real Ray cluster of two nodes on this machine, for as long as a test module: `ray start`, with a token.

The second node has a folder of its own where the first has another, as a machine that does not mount the shared one,
and a clock ten minutes ahead, as far as Python tells.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from bnscale.schedule.tune import cluster

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
AHEAD = 600  # seconds
OPTIONS = (
    "--node-ip-address=127.0.0.1", "--object-store-memory=80000000", "--disable-usage-stats", "--block",
    "--include-log-monitor=False",
)  # fmt: skip
CLOCK = f"import time\n_now = time.time\ntime.time = lambda: _now() + {AHEAD}\n"


@dataclass(frozen=True)
class Ground:
    address: str
    environment: dict[str, str]  # of whoever is let in
    shared: Path  # the same for both nodes
    apart: Path | None  # each node has its own there; None where this machine does not allow that
    folder: Path


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    """All its files are below `folder`, whose name must be short: Ray keeps sockets there."""
    shared, apart, late = folder / "shared", folder / "apart", folder / "late"
    for each in (shared, apart, late, folder / "ray"):
        each.mkdir()
    (late / "sitecustomize.py").write_text(CLOCK)
    # The token of this process's own clusters: Ray reads it once, and other tests may have been before.
    token = os.environ.setdefault("RAY_AUTH_TOKEN", cluster._TOKEN)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[:1]]),
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    separate = alone(apart)
    with contextlib.ExitStack() as running:
        head = ["start", "--head", f"--port={port}", f"--temp-dir={folder / 'ray'}", "--include-dashboard=False"]
        running.enter_context(_node([str(RAY), *head, "--num-cpus=1", *OPTIONS], environment, folder / "head.log"))
        worker = [str(RAY), "start", f"--address=127.0.0.1:{port}", "--num-cpus=1", *OPTIONS]
        ahead = environment | {"PYTHONPATH": os.pathsep.join([str(late), environment["PYTHONPATH"]])}
        running.enter_context(_node([*separate, *worker], ahead, folder / "node.log"))
        yield Ground(f"127.0.0.1:{port}", environment, shared, apart if separate else None, folder)


def alone(place: Path, size: str = "1g") -> list[str]:
    """The beginning of a command to which `place` is a disk of its own, of this size; nothing where that cannot be."""
    for unshare in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        words = [*unshare, "sh", "-c", f'mount -t tmpfs -o size={size} none "{place}" && exec "$@"', "sh"]
        with contextlib.suppress(OSError):
            if subprocess.run([*words, "true"], capture_output=True).returncode == 0:
                return words
    return []


@contextlib.contextmanager
def _node(words: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("w") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        while "block forever" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *started):  # politely it would take half a minute to drain
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.kill()
        process.wait()
