"""Hosts of a cluster on one machine, for tests: each has its own network, processes, home, /tmp, /dev/shm and sshd.

A host is a tree of processes in namespaces without a name, and so is the switch that joins them: when this process
ends, however it ends, the kernel ends them and nothing is left, neither an interface nor a mount nor a file. The rest
of the machine is there as it is, read-only. No address of theirs is known outside. Needs root, and Debian's iproute2,
openssh-server, rsync and util-linux.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = "/srv/home"  # of root, on every host
SHARED = "/srv/shared"  # the one folder that all hosts see, as they would over NFS
TOOLS = ["ip", "sshd", "ssh", "ssh-keygen", "rsync", "unshare", "nsenter", "setpriv", "pgrep"]

# Whoever starts it ends it, also by a kill.
TIED = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--net"]

SWITCH = """
set -eu
ip link add name bridge type bridge
ip link set bridge up
exec sleep infinity
"""

# The first process of a host. Arguments: name, address, shared folder, folder of keys, and what must stay visible.
HOST = """
set -eu
name=$1 address=$2 shared=$3 keys=$4 home=$5
shift 5
hostname "$name"
mount --make-rprivate /
mount -t tmpfs -o mode=755 host /srv
mkdir -p "$home/.ssh" /srv/shared /srv/etc /srv/keep
mount --bind "$shared" /srv/shared
cp "$keys"/host_key /srv/etc
cp "$keys"/key.pub "$home/.ssh/authorized_keys"
cp "$keys"/key "$home/.ssh/id_ed25519"
echo '. ~/.bashrc' >"$home/.profile"
touch "$home/.bashrc"
n=0
for each; do  # a checkout in /tmp is hidden by the host's own /tmp, and brought back
    mkdir /srv/keep/$((n += 1))
    mount --bind "$each" /srv/keep/$n
done
mount -o remount,bind,ro /
for each in /tmp /var/tmp /run /dev/shm; do mount -t tmpfs -o mode=1777 host $each; done
mkdir -p -m 755 /run/sshd
n=0
for each; do
    n=$((n + 1))
    [ -e "$each" ] || { mkdir -p "$each" && mount --bind /srv/keep/$n "$each"; }
done
echo "root:x:0:0:root:$home:/bin/bash
sshd:x:100:65534::/run/sshd:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin" >/srv/etc/passwd
echo 'root:*:20000:0:99999:7:::' >/srv/etc/shadow
echo "127.0.0.1 localhost
$address $name" >/srv/etc/hosts
for each in passwd shadow hosts; do mount --bind /srv/etc/$each /etc/$each; done
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done
ip address add "$address/24" dev eth0
ip link set eth0 up
echo "ListenAddress $address
HostKey /srv/etc/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
UseDNS no" >/srv/etc/sshd_config
/usr/sbin/sshd -D -e -f /srv/etc/sshd_config 2>/srv/etc/sshd.log &
wait  # and whoever loses its parent has this one, which waits for it
"""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    _root: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Of its first process, as this machine counts. Raises `LookupError` where there is none."""
        try:
            return int(Path(f"/proc/{self._root.pid}/task/{self._root.pid}/children").read_text().split()[0])
        except (OSError, IndexError):
            raise LookupError(f"{self.name} is gone") from None

    def command(self, command: str) -> list[str]:
        """What runs a shell command there, as a login does."""
        into = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--uts", "--ipc", f"--wd={ROOT}"]
        return [*into, "env", "-i", f"HOME={HOME}", "TERM=dumb", f"PATH={PATH}", "bash", "--login", "-c", command]

    def run(self, command: str, *, timeout: float = 60) -> str:
        """Its output, both streams. Raises `CalledProcessError` with it where it fails."""
        done = self.ask(command, timeout=timeout)
        if done.returncode:
            raise AssertionError(f"{self.name}: {command} failed with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def ask(self, command: str, *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """How it ended, and its output, both streams."""
        return subprocess.run(
            self.command(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def write(self, path: str, text: str) -> None:
        """A file there, with this text."""
        subprocess.run(self.command(f"cat >{path}"), input=text, text=True, check=True)

    def processes(self) -> list[str]:
        """The commands of all that runs there."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [command for pid, command in _processes() if _in(pid, space)]

    def kill(self) -> None:
        """The plug is pulled: every process ends at once, and its address answers no more."""
        os.kill(self.pid, 9)
        self._root.wait()


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def lacking() -> list[str]:
    """What this machine needs and has not."""
    found = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    return [*([] if os.geteuid() == 0 else ["root"]), *([] if sys.platform == "linux" else ["Linux"]), *found]


@contextlib.contextmanager
def hosts(names: list[str], folder: Path) -> Iterator[dict[str, Host]]:
    """Hosts of these names, on one network, with keys to enter each other. `folder` is for what they share."""
    keys, shared = folder / "keys", folder / "shared"
    keys.mkdir()
    shared.mkdir()
    for each in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / each], check=True)
    visible = [ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_tied([*TIED, "bash", "-c", SWITCH]))
        made = {}
        for n, name in enumerate(names, start=1):
            address = f"192.0.2.{n}"
            unshared = [*TIED, "--mount", "--pid", "--mount-proc", "--uts", "--ipc"]
            command = [*unshared, "bash", "-c", HOST, "host", name, address, shared, keys, HOME, *visible]
            made[name] = Host(name, address, stack.enter_context(_tied(command)))
        inside = ["nsenter", f"--net=/proc/{_child(switch)}/ns/net"]
        _eventually(lambda: subprocess.run([*inside, "ip", "link", "show", "up", "bridge"], capture_output=True).stdout)
        for name, host in made.items():
            pair = ["type", "veth", "peer", "name", "eth0", "netns", str(_child(host._root))]
            subprocess.run([*inside, "ip", "link", "add", "name", name, *pair], check=True)
            subprocess.run([*inside, "ip", "link", "set", name, "master", "bridge", "up"], check=True)
        for host in made.values():
            _eventually(lambda host=host: "Server listening" in host.ask("cat /srv/etc/sshd.log").stdout)
        yield made


@contextlib.contextmanager
def _tied(command: list[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _child(process: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    _eventually(lambda: children.read_text().strip())
    return int(children.read_text())


def _eventually(happens: object, *, within: float = 30) -> None:
    assert callable(happens)
    end = time.monotonic() + within
    while not happens():
        assert time.monotonic() < end, f"not within {within:g} s"
        time.sleep(0.02)


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def _in(pid: int, space: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") == space
    except OSError:
        return False


if __name__ == "__main__":  # where `make test-cluster` ends, for a test that is skipped looks like one that passed
    sys.exit(f"make test-cluster needs {', '.join(lacking())}" if lacking() else 0)
