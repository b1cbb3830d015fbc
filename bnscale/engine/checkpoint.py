"""Checkpoints: tensors as safetensors, the rest as JSON; whole or absent, the last two kept.

`step-<n>.json` is the commit: it carries the SHA-256 of `step-<n>.safetensors` and of what else it says, and is written
after it. A checkpoint that fails a sum is passed over for the one before.
"""

import hashlib
import json
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from bnscale.storage import Storage, StoreFailure

_SAID = {"step", "sha256", "facts"}  # of the tensors


class Checkpoint(NamedTuple):
    step: int  # updates taken
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write(place: Storage, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], kept: int = 2) -> None:
    """Only the `kept` newest stay. Raises `StoreFailure`, as for a full disk; what was there before stays whole."""
    content = save(at_hand(tensors))
    about = {"step": step, "sha256": hashlib.sha256(content).hexdigest(), "facts": facts}
    place.write(f"step-{step}.safetensors", content)
    place.write(f"step-{step}.json", json.dumps(about | {"sum": _sum(about)}, indent=1).encode())
    # Of later steps none: this process may have slept while another went on from here.
    old = [each for each in _steps(place) if each <= step][:-kept]
    for each in old:  # first what says that it is there
        place.delete(f"step-{each}.json")
    if old:
        place.sweep("", lambda key: _step(key) in old)


def at_hand(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU."""
    away = {name: t.detach() for name, t in tensors.items() if t.device.type != "cpu"}
    fetched = fetch(away)
    return {name: fetched[name] if name in away else t.detach().contiguous() for name, t in tensors.items()}


def fetch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a type in one copy: deep networks have thousands of a few numbers each, and copies wait for a device."""
    here: dict[str, Tensor] = {}
    for kind in {t.dtype for t in tensors.values()}:
        same = {name: t for name, t in tensors.items() if t.dtype is kind}
        pieces = torch.cat([t.flatten() for t in same.values()]).cpu().split([t.numel() for t in same.values()])
        here |= {name: piece.view(t.shape) for (name, t), piece in zip(same.items(), pieces, strict=True)}
    return here


def newest(place: Storage, most: int | None = None) -> Checkpoint | None:
    """The latest checkpoint whose sum is right, of at most so many steps; None where there is none.

    Where a listing lags behind it may be an earlier one. Raises `StoreFailure` where none could be read for a reason
    that may pass: beginning anew would cost more.
    """
    failure = None
    for step in reversed(_steps(place)):
        if most is not None and step > most:
            continue
        try:
            found = read(place, step)
        except StoreFailure as error:
            failure = failure or error
            continue
        if found is not None:
            return found
    if failure is not None:
        raise failure
    return None


def whole(place: Storage, most: int) -> list[int]:
    """The steps, up to this one, of the checkpoints whose sums are right. Raises `StoreFailure`."""
    return [step for step in _steps(place) if step <= most and flaw(place, step) is None]


def read(place: Storage, step: int) -> Checkpoint | None:
    """The checkpoint of a step; None where there is none, or one whose sum is wrong. Raises `StoreFailure`."""
    found = _look(place, step)
    if isinstance(found, str):
        return None
    about, content = found
    return Checkpoint(about["step"], load(content), about["facts"])


def flaw(place: Storage, step: int) -> str | None:
    """What is wrong with the checkpoint of a step. Raises `StoreFailure`."""
    found = _look(place, step)
    return found if isinstance(found, str) else None


def _look(place: Storage, step: int) -> tuple[dict[str, Any], bytes] | str:
    """What is said of the tensors and what they are written in; or what is wrong."""
    try:
        about = json.loads(place.read(f"step-{step}.json"))
        content = place.read(f"step-{step}.safetensors")
    except FileNotFoundError:
        return "a part of it is not there"
    except ValueError:
        return "what is said of it cannot be read"
    if not isinstance(about, dict):
        return "what is said of it cannot be read"
    said = about.pop("sum", None)  # checkpoints had none once
    if (said is None and about.keys() != _SAID) or said not in (None, _sum(about)) or about.get("step") != step:
        return "what is said of it does not have its sum"
    if hashlib.sha256(content).hexdigest() != about.get("sha256"):
        return "its checksum is not the one of its checkpoint"
    return about, content


def _sum(about: dict[str, Any]) -> str:
    """Of what is said of the tensors: a step with a flipped bit would be another step."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _steps(place: Storage) -> list[int]:
    steps = {_step(key) for key in place.list("") if key.endswith(".json")}
    return sorted(step for step in steps if step is not None)


def _step(key: str) -> int | None:
    name = key.partition(".")[0].removeprefix("step-")
    return int(name) if name.isdigit() else None
