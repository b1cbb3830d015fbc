"""A trained network in a file, without the weights that its seed gives back: seed plus BatchNorm is the network.

One safetensors file. Its metadata is a JSON text under `bnscale` (see `About`). Its tensors are few, because each entry
of the header costs 100 bytes: `gamma` holds the gammas of all norm layers, one after the other in the order of the
network, and so do `beta`, `running_mean` and the like; counters that all agree are stored once. Whatever else the seed
does not give back has a tensor of its own, by its own name.
"""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bnscale.engine.checkpoint import Checkpoint, read
from bnscale.engine.machine import in_bytes
from bnscale.engine.state import frozen_sum, load_state
from bnscale.networks import build, unseeded
from bnscale.networks.norm import Noise, NormLayer
from bnscale.networks.trainable import PairConv2d
from bnscale.storage import place
from bnscale.store import Manifest, Store
from bnscale.trial import Outcome, Refusal, Trial, near


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


_BNSCALE, _TORCH = _version("bnscale"), _version("torch")


class About(BaseModel):
    """What the file says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    trial: str  # the id
    fields: dict[str, Any]  # of the trial
    step: int  # updates taken
    outcome: Outcome
    commit: str | None  # of the code that declared the trial
    frozen: str  # SHA-256 over the weights that the seed gives back
    stored: str  # SHA-256 over all else that is said here and the tensors of the file
    bnscale: str
    torch: str  # by which the seed gave these weights


class _Format(BaseModel):
    """As much as any version of the format says."""

    format: int
    bnscale: str = "a later version"


class Written(NamedTuple):
    """A file, beside what all parameters and buffers of its network take."""

    path: Path
    bytes: int
    whole: int  # bytes

    def __str__(self) -> str:
        times = self.whole / self.bytes
        return (
            f"wrote {self.path}: {in_bytes(self.bytes)}; the whole network, weights and all, takes "
            f"{in_bytes(self.whole)} ({times:.{0 if times >= 10 else 1}f} times as much)"
        )


def export(store: Store, trial: str, path: Path) -> Written:
    """Write the network that a finished trial ended with; `trial` is its id or a unique beginning of it.

    Raises `Refusal` for a trial that is not there or has no trained network, for a checkpoint that is missing, damaged
    or built on weights that this torch does not draw, and for a path that cannot be written or holds something else.
    """
    _writable(path)
    manifest = _finished(store, trial)
    checkpoint = _last(store, manifest)
    network = build(manifest.recalled)
    if checkpoint.facts.get("frozen") != frozen_sum(network, manifest.recalled):
        raise Refusal(
            f"trial {manifest.trial}: its frozen weights are from torch {manifest.facts.get('torch')}, and this torch, "
            f"{_TORCH}, draws others from its seed; export with that torch"
        )
    if checkpoint.tensors.keys() != {f"network.{name}" for name in unseeded(network, manifest.recalled)}:
        raise Refusal(
            f"trial {manifest.trial}: its checkpoint has other tensors than the network of bnscale {_BNSCALE}; "
            f"export with bnscale {manifest.bnscale}, which trained it"
        )
    load_state(network, checkpoint.tensors)
    return write(path, network, manifest.recalled, checkpoint.step, Outcome.FINISHED, manifest.facts.get("commit"))


def write(
    path: Path, network: nn.Module, trial: Trial, step: int, outcome: Outcome, commit: str | None
) -> Written:  # fmt: skip
    """Write the network of a trial, whole or not at all. Raises `Refusal` for a path that cannot be written."""
    tensors = _packed(network, trial)
    about = About(
        format=1,
        trial=trial.id,
        fields=trial.model_dump(mode="json"),
        step=step,
        outcome=outcome,
        commit=commit,
        frozen=frozen_sum(network, trial),
        stored="",
        bnscale=_BNSCALE,
        torch=_TORCH,
    )
    about = about.model_copy(update={"stored": _sum(about, tensors)})
    content = save(tensors, {"bnscale": about.model_dump_json()})
    try:
        place(path, content)
    except OSError as error:
        raise Refusal(f"out {path}: cannot be written ({_reason(error)}); choose another place") from None
    return Written(path, len(content), sum(t.numel() * t.element_size() for t in network.state_dict().values()))


def load(path: Path) -> nn.Module:
    """The trained network, on the CPU in evaluation mode, its trial in its attribute `trial`.

    Raises `Refusal` for a file that is missing, damaged, of a later format or not one of these, and where this torch
    draws other frozen weights from the seed than the file's.
    """
    about, tensors = _read(path)
    try:
        trial = Trial.recall(about.fields)
    except Refusal as error:
        raise Refusal(
            f"network file {path}: its trial is not one of bnscale {_BNSCALE} ({error}); "
            f"load it with bnscale {about.bnscale}, which wrote it"
        ) from None
    if trial.id != about.trial or _sum(about, tensors) != about.stored:
        raise Refusal(f"network file {path}: is damaged, for its sums do not agree; export {about.trial} again")
    network = build(trial)
    if frozen_sum(network, trial) != about.frozen:
        raise Refusal(
            f"network file {path}: its frozen weights are from torch {about.torch}, and this torch, "
            f"{_TORCH}, draws others from the seed; load it with that torch"
        )
    if not _unpack(network, trial, tensors):
        raise Refusal(
            f"network file {path}: its tensors are not those of {trial.id} in bnscale {_BNSCALE}; "
            f"load it with bnscale {about.bnscale}, which wrote it"
        )
    # As the local engine holds it: the order in memory decides in which order a convolution adds up.
    network = network.to(memory_format=torch.channels_last)
    network.trial = trial  # type: ignore[assignment]  # torch types attributes as tensors and modules
    return network.eval()


# --- tensors ----------------------------------------------------------------------------------------


def _packs(network: nn.Module, trial: Trial) -> dict[str, list[str]]:
    """The tensors of the file: under each name, the network's tensors that lie in it one after the other."""
    packs: dict[str, list[str]] = {}
    for name in unseeded(network, trial):
        path, _, own = name.rpartition(".")
        module = network.get_submodule(path)
        if isinstance(module, NormLayer):
            pack = {"weight": "gamma", "bias": "beta"}.get(own, own)
        else:
            pack = own if isinstance(module, PairConv2d | Noise) else name
        packs.setdefault(pack, []).append(name)
    return packs


def _packed(network: nn.Module, trial: Trial) -> dict[str, Tensor]:
    whole, packed = network.state_dict(), {}
    for pack, names in _packs(network, trial).items():
        if names == [pack]:
            packed[pack] = whole[pack].cpu().contiguous()
            continue
        flat = torch.cat([whole[name].cpu().reshape(-1) for name in names])
        alike = not flat.is_floating_point() and bool((flat == flat[0]).all())
        packed[pack] = flat[:1].clone() if alike else flat
    return packed


@torch.no_grad()
def _unpack(network: nn.Module, trial: Trial, packed: dict[str, Tensor]) -> bool:
    """Put the tensors of a file into the network; False where they do not fit."""
    whole, packs = network.state_dict(), _packs(network, trial)
    if packs.keys() != packed.keys():
        return False
    for pack, names in packs.items():
        sizes = [whole[name].numel() for name in names]
        flat = packed[pack].reshape(-1)
        if flat.numel() == 1:
            flat = flat.expand(sum(sizes))
        if flat.numel() != sum(sizes) or flat.dtype != whole[names[0]].dtype:
            return False
        for name, values in zip(names, flat.split(sizes), strict=True):
            whole[name].copy_(values.view_as(whole[name]))
    return True


def _sum(about: About, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over what the file says of itself and over names and values, by name."""
    digest = hashlib.sha256(about.model_dump_json(exclude={"stored"}).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the file ---------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[About, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("bnscale")
            tensors = {name: file.get_tensor(name) for name in file.keys()} if said else {}  # noqa: SIM118
    except FileNotFoundError:
        raise Refusal(f"network file {path}: there is none; `bnscale export-network` writes one") from None
    except OSError as error:
        reason = "is a folder" if path.is_dir() else _reason(error)
        raise Refusal(f"network file {path}: cannot be read ({reason}); give a file") from None
    except SafetensorError as error:
        raise Refusal(
            f"network file {path}: is cut short or no safetensors file ({error}); export it again"
        ) from None  # fmt: skip
    if said is None:
        raise Refusal(f"network file {path}: is not of bnscale; `bnscale export-network` writes those that are")
    try:
        version = _Format.model_validate_json(said)
        if version.format > 1:
            raise Refusal(
                f"network file {path}: has format {version.format}, of bnscale {version.bnscale}, and bnscale "
                f"{_BNSCALE} reads format 1; load it with that bnscale"
            )
        return About.model_validate_json(said), tensors
    except ValidationError as error:
        wrong = error.errors()[0]
        raise Refusal(
            f"network file {path}: is damaged ({'.'.join(map(str, wrong['loc']))}: {wrong['msg']}); export it again"
        ) from None


def _writable(path: Path) -> None:
    """Raises `Refusal` where nothing can be written, or another file would be lost."""
    if not path.parent.is_dir():
        raise Refusal(f"out {path}: there is no folder {path.parent}; create it or choose another place")
    if path.is_dir():
        raise Refusal(f"out {path}: is a folder; try {path / 'net.safetensors'}")
    if path.exists():
        try:
            _read(path)
        except Refusal:
            raise Refusal(f"out {path}: exists and is no network of bnscale; choose another name") from None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


# --- the trial --------------------------------------------------------------------------------------


def _finished(store: Store, beginning: str) -> Manifest:
    """Of the one trial whose id begins so. Raises `Refusal` where there is none, or it has no trained network."""
    ids = store.ids()
    begin = [each for each in ids if each == beginning] or [each for each in ids if each.startswith(beginning)]
    ask = f'`bnscale sql "select trial from trials" --store {store.url}` lists them'
    if not begin:
        raise Refusal(f"trial {beginning}: no trial in {store.url} begins so{near(beginning, ids)} {ask}")
    if len(begin) > 1:
        more = f" and {len(begin) - 3} more" if len(begin) > 3 else ""
        listed = ", ".join(begin[:3]) + more
        raise Refusal(f"trial {beginning}: {len(begin)} trials begin so: {listed}; write more of the id")
    manifest = store.manifest(begin[0])
    assert manifest is not None, "it was listed just now"
    match manifest.outcome:
        case Outcome.FINISHED:
            return manifest
        case Outcome.DIVERGED:
            at = manifest.facts.get("diverged_step")
            said, way = f"diverged at step {at}, so no trained network is left", "export a trial that finished"
        case Outcome.FAILED:
            error = (manifest.facts.get("error") or "").strip().splitlines() or ["no error was recorded"]
            said, way = f"failed at step {manifest.step} ({error[-1]})", "run its study again, which repeats it"
        case None:
            said = f"has not finished: {manifest.step} of {manifest.total_steps} steps are recorded"
            way = "let its study go on to the end"
    raise Refusal(f"trial {manifest.trial}: {said}; {way}")


def _last(store: Store, manifest: Manifest) -> Checkpoint:
    """The checkpoint that a finished trial ends with."""
    kept, step = store.checkpoints(manifest.trial), manifest.recalled.total_steps
    found = read(kept, step)
    if found is not None:
        return found
    what = "is damaged" if kept.size(f"step-{step}.safetensors") is not None else "is missing"
    raise Refusal(
        f"trial {manifest.trial}: its last checkpoint {what} in {kept.url}; to train it again delete "
        f"{store.where(manifest.trial)} and run its study"
    )
