"""Checkpoints: tensors as safetensors, the rest as JSON; whole or absent, the last two kept.

`step-<n>.json` is the commit: it carries the SHA-256 of `step-<n>.safetensors`, and is renamed into
place after the tensors are on disk. A checkpoint that fails its sum is passed over for the one before.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor


class Checkpoint(NamedTuple):
    step: int  # updates taken
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], kept: int = 2) -> None:
    """Only the `kept` newest stay. Raises OSError for a full or read-only disk; what was there before stays whole."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    about = {"step": step, "sha256": hashlib.sha256(content).hexdigest(), "facts": facts}
    place(folder / f"step-{step}.safetensors", content)
    place(folder / f"step-{step}.json", json.dumps(about, indent=1).encode())
    for old in _steps(folder)[:-kept]:
        (folder / f"step-{old}.json").unlink(missing_ok=True)
        (folder / f"step-{old}.safetensors").unlink(missing_ok=True)


def newest(folder: Path) -> Checkpoint | None:
    """The latest checkpoint whose sum is right, or None."""
    for step in reversed(_steps(folder)):
        try:
            about = json.loads((folder / f"step-{step}.json").read_bytes())
            content = (folder / f"step-{step}.safetensors").read_bytes()
        except (OSError, ValueError):
            continue
        if hashlib.sha256(content).hexdigest() == about.get("sha256"):
            return Checkpoint(about["step"], load(content), about["facts"])
    return None


def _steps(folder: Path) -> list[int]:
    names = (path.stem.removeprefix("step-") for path in folder.glob("step-*.json"))
    return sorted(int(name) for name in names if name.isdigit())


def place(path: Path, content: bytes) -> None:
    """Temporary name, fsync, rename: a reader sees the whole file or none. Raises OSError where the disk does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
