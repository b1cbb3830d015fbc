"""Whether a running cluster would let this process in: its token, and its versions of Ray and Python.

Ray itself tries for 20 s to reach a cluster that refuses its token, and then says that it cannot be reached.
"""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import check_version_info
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.exceptions import AuthenticationError, RayError

from bnscale.schedule.token import TokenFrom, has_token, token_from
from bnscale.trial import Refusal


def knock(address: str) -> None:
    """Raises `Refusal` where the cluster at host:port does not know this process's token, or runs other versions."""
    maybe_enable_token_auth_if_token_available()  # Ray does this itself only where it finds the address itself
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() == "token" and not has_token():  # Ray ends the whole process there
        raise Refusal(
            f"address {address}: RAY_AUTH_MODE is token, and there is none in {token_from()[1]}; {_fetch(address)}"
        )
    try:
        with no_stderr():
            versions = get_cluster_metadata(GcsClient(address=address))
    except AuthenticationError:
        raise Refusal(f"address {address}: {_turned_away(address)}") from None
    except RayError as error:
        said = str(error).strip().splitlines()[0].rstrip(".").lower()
        raise Refusal(
            f"address {address}: what answers there is no Ray cluster ({said}); start one with `ray start --head`, or "
            "leave the address out to run on this machine"
        ) from None
    try:
        check_version_info(versions, "this machine")
    except RuntimeError:
        raise Refusal(f"address {address}: {_differs(versions)}") from None


def open_to_strangers(address: str, patience: float = 60.0) -> bool | None:
    """Whether the cluster lets in a process that shows no token; None where it does not tell in `patience` seconds."""
    knocks = f"from ray._raylet import GcsClient; GcsClient(address={address!r})"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    try:
        ended = subprocess.run([sys.executable, "-c", knocks], env=environment, capture_output=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return None
    return ended.returncode == 0


def _turned_away(address: str) -> str:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        return f"the cluster asks for a token and RAY_AUTH_MODE={mode} keeps it back; `unset RAY_AUTH_MODE`"
    if not has_token():
        return f"the cluster asks for a token and there is none in {token_from()[1]}; {_fetch(address)}"
    source, file = token_from()
    also = "" if source is TokenFrom.FILE else f", and `unset {source}`"
    return f"the token in {file or source} is not the cluster's; {_fetch(address)}{also}"


def _fetch(address: str) -> str:
    """The command that brings the cluster's token here."""
    host = address.rpartition(":")[0].strip("[]")
    return f"from its head: `install -d -m 700 ~/.ray && scp -p {host}:.ray/auth_token ~/.ray/`"


def _differs(versions: dict[str, str]) -> str:
    theirs = {"Ray": versions["ray_version"], "Python": versions["python_version"]}
    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    said = "the cluster runs {} and this process {}".format(
        *(" and ".join(f"{name} {version}" for name, version in each.items()) for each in (theirs, ours))
    )
    if theirs["Ray"] != ours["Ray"]:
        return f"{said}; set its nodes up with this copy of bnscale: `ray up cluster/....yaml`, or `make setup` on each"
    minor = ".".join(theirs["Python"].split(".")[:2])
    return f"{said}; set up here with its Python: `make clean setup PYTHON=python{minor}`, of {theirs['Python']}"


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Ray's C++ tells there of each of its twenty tries, past Python's own stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
