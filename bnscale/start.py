"""What bnscale stands on, looked at before anything of it is imported: a package that is missing or too old is one
message with the command that mends it, whichever command was given.

Nothing but the standard library, in words that an older Python reads too.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from types import TracebackType
from typing import NamedTuple, NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = (3, 11)

_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?\s*(==|~=|>=)\s*([\d.]+)")
_LOCKED = re.compile(r"^([\w.-]+)==([\w.+]+)", re.MULTILINE)


class NotReady(ImportError):
    """Something that bnscale needs is missing or too old. Where it ends a program it is one line and exit code 2."""


class Requirement(NamedTuple):
    """`ray[tune]==2.60.0`, taken apart."""

    name: str
    rule: str  # ==, ~= or >=
    version: str

    def new_enough(self, version: str) -> bool:
        return _numbers(version) >= _numbers(self.version)

    def met(self, version: str) -> bool:
        """By its rule, which may also find a version too new."""
        wanted, found = _numbers(self.version), _numbers(version)
        if self.rule == "==":
            return found == wanted
        same = self.version.count(".") if self.rule == "~=" else 0
        return found >= wanted and found[:same] == wanted[:same]


def check() -> None:
    """Raises `NotReady`, which names all that is missing or too old and the command that installs it."""
    if sys.version_info < PYTHON:
        _refuse("Python {}.{} runs this and bnscale needs {}.{}".format(*sys.version_info[:2], *PYTHON))
    found = {each: installed(each.name) for each in requirements()}
    wrong = [
        f"{each.name} {version} is too old, {each.version} is needed"
        for each, version in found.items()
        if version is not None and not each.new_enough(version)
    ]
    missing = [each.name for each, version in found.items() if version is None]
    if missing:
        wrong.append(f"{', '.join(missing)} {'are' if missing[1:] else 'is'} not installed")
    if wrong:
        _refuse(f"{sys.executable}: {'; '.join(wrong)}")


def requirements() -> list[Requirement]:
    """What bnscale asks for, without what the tests and a cluster need beyond it."""
    file = os.path.join(ROOT, "pyproject.toml")
    if os.path.exists(file):  # of a checkout: what was once installed from it may be older
        import tomllib

        with open(file, "rb") as opened:
            texts = tomllib.load(opened)["project"]["dependencies"]
    else:
        try:
            texts = [each for each in importlib.metadata.requires("bnscale") or [] if "extra ==" not in each]
        except importlib.metadata.PackageNotFoundError:
            return []
    found = [_REQUIREMENT.match(text) for text in texts]
    return [Requirement(*each.groups()) for each in found if each]


def installed(name: str) -> str | None:
    """The version of a package that an import would find."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def locked() -> dict[str, str]:
    """Version by package in the lock of a checkout; nothing elsewhere."""
    try:
        with open(os.path.join(ROOT, "requirements.lock"), encoding="utf-8") as opened:
            return dict(_LOCKED.findall(opened.read()))
    except OSError:
        return {}


def mend() -> str:
    """How to install what this copy of bnscale needs."""
    if os.path.exists(os.path.join(ROOT, "Makefile")):
        return f"run `make -C {ROOT} setup`, then {os.path.join(ROOT, '.venv', 'bin', 'python')} in its place"
    return f"run `{sys.executable} -m pip install --upgrade bnscale`"


def _numbers(version: str) -> list[int]:
    """Of 2.13.0+cu130 [2, 13, 0, 0], so that 2.13 and 2.13.0 are the same."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]
    return (numbers + [0] * 4)[:4]


def _refuse(what: str) -> NoReturn:
    sys.excepthook = _tell
    raise NotReady(f"{what}; {mend()}")


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, NotReady):
        sys.__excepthook__(kind, error, trace)
        return
    print(error, file=sys.stderr)
    raise SystemExit(2)
