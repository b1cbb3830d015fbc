"""Whether a running cluster would let this process in: its token, and its versions of Ray and Python.

Ray itself tries for 20 s to reach a cluster that refuses its token, and then says that it cannot be reached.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import check_version_info
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]  # compiled
from ray.exceptions import AuthenticationError, RayError

from bnscale.trial import Refusal


class TokenFrom(StrEnum):
    """Where this process has its token from, in the order in which Ray looks."""

    VARIABLE = "RAY_AUTH_TOKEN"
    NAMED_FILE = "RAY_AUTH_TOKEN_PATH"
    FILE = "~/.ray/auth_token"
    NOWHERE = "nowhere"


def token_from() -> tuple[TokenFrom, Path | None]:
    """And the file that holds it, whether that exists or not; None for a variable."""
    if os.environ.get(TokenFrom.VARIABLE):
        return TokenFrom.VARIABLE, None
    named = os.environ.get(TokenFrom.NAMED_FILE)
    if named:
        return TokenFrom.NAMED_FILE, Path(named).expanduser()
    file = Path.home() / ".ray" / "auth_token"
    return (TokenFrom.FILE if file.exists() else TokenFrom.NOWHERE), file


def knock(address: str) -> None:
    """Raises `Refusal` where the cluster at host:port does not know this process's token, or runs other versions."""
    maybe_enable_token_auth_if_token_available()  # Ray does this itself only where it finds the address itself
    source, file = token_from()
    # Ray ends the whole process where it is told to use a token and finds none.
    if os.environ.get("RAY_AUTH_MODE") == "token" and not AuthenticationTokenLoader.instance().has_token(
        ignore_auth_mode=True
    ):
        raise Refusal(f"address {address}: RAY_AUTH_MODE is token, and there is no token in {file}; {_fetch(address)}")
    try:
        with no_stderr():
            versions = get_cluster_metadata(GcsClient(address=address))
    except AuthenticationError:
        raise Refusal(f"address {address}: {_turned_away(source, file, address)}") from None
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


def _turned_away(source: TokenFrom, file: Path | None, address: str) -> str:
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return (
            f"the cluster asks for a token and RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} keeps this process from "
            "showing one; `unset RAY_AUTH_MODE`"
        )
    if source is TokenFrom.NOWHERE:
        return f"the cluster asks for a token and there is none in {file}; {_fetch(address)}"
    held = source if file is None else file
    return f"the token in {held} is not the cluster's; {_fetch(address)}" + (
        f", and `unset {source}`" if source is not TokenFrom.FILE else ""
    )


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
