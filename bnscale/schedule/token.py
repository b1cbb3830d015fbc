"""Where this process would have a cluster's token from. Nothing here knows Ray."""

import os
from enum import StrEnum
from pathlib import Path


class TokenFrom(StrEnum):
    """In the order in which Ray looks."""

    VARIABLE = "RAY_AUTH_TOKEN"
    NAMED_FILE = "RAY_AUTH_TOKEN_PATH"
    FILE = "~/.ray/auth_token"


def token_from() -> tuple[TokenFrom, Path | None]:
    """The source that Ray would take, and its file, which may not exist; None for a variable."""
    if os.environ.get(TokenFrom.VARIABLE):
        return TokenFrom.VARIABLE, None
    named = os.environ.get(TokenFrom.NAMED_FILE)
    if named:
        return TokenFrom.NAMED_FILE, Path(named).expanduser()
    return TokenFrom.FILE, Path.home() / ".ray" / "auth_token"


def has_token() -> bool:
    """Whether Ray would find one there; none is found where this user may not look."""
    _, file = token_from()
    try:
        return file is None or (file.is_file() and file.stat().st_size > 0)
    except OSError:
        return False
