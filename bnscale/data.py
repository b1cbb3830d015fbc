"""Data sets, decoded once to uint8 and resident on the device; a batch is a function of (trial, step).

Legend: N images, C channels, H height, W width.

Where the files are looked for, in this order, under the data folder:

    <name>/train-*.parquet, <name>/test-*.parquet   images as the Hugging Face Hub serves them
    what torchvision downloads                      cifar-10-batches-py, cifar-100-python, MNIST, FashionMNIST

`digits` comes inside scikit-learn and needs no file; the linear teacher is drawn.
"""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from bnscale.trial import Augmentation, Data, Pixels, Refusal, Trial, seed_for

# Frankle's code normalises CIFAR with the statistics of ImageNet (open_lth, datasets/cifar10.py).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_SD = (0.229, 0.224, 0.225)

# torchvision's class and the folder of its files.
_TORCHVISION = {
    Data.MNIST: ("MNIST", "MNIST/raw"),
    Data.FASHION_MNIST: ("FashionMNIST", "FashionMNIST/raw"),
    Data.CIFAR10: ("CIFAR10", "cifar-10-batches-py"),
    Data.CIFAR100: ("CIFAR100", "cifar-100-python"),
}


class Pictures(NamedTuple):
    """One part of a data set as it was stored."""

    images_NHWC: np.ndarray  # uint8
    labels_N: np.ndarray  # int64


class Split(NamedTuple):
    """One part of a data set on the device."""

    images_NCHW: Tensor  # uint8; of a regression float32, (N, K, 1, 1)
    labels_N: Tensor  # int64; of a regression its targets, float32, (N, K)


class Loaded(NamedTuple):
    """A data set on a device."""

    train: Split
    test: Split
    mean_C: Tensor  # of a pixel in [0, 1], shaped (C, 1, 1)
    sd_C: Tensor


def default_folder() -> Path:
    return Path(os.environ.get("BNSCALE_DATA") or Path.home() / ".cache" / "bnscale")


def pixels(data: Data, folder: Path) -> Pixels:
    """Whether what the folder holds is the original or went through JPEG; reads one image."""
    for path in _hub_files(data, folder, "train")[:1]:
        with _parquet(path), pq.ParquetFile(path) as file:
            first = next(file.iter_batches(batch_size=1), None)
        if first is None:
            raise Refusal(f"data {path}: has no rows; fetch it again")
        jpeg = first.column(_image_column(first.schema, path)).field("bytes")[0].as_py()[:2] == b"\xff\xd8"
        return Pixels.JPEG if jpeg else Pixels.ORIGINAL
    return Pixels.ORIGINAL


def prepare(trial: Trial, folder: Path) -> None:
    """Make sure that a trial's data can be read here, downloading it if need be. Raises `Refusal`."""
    _load(trial.data, folder, torch.device("cpu"), _dimensions(trial))
    _same_pixels(trial, folder)
    _load.cache_clear()  # whoever asks does not train: workers read it themselves


def _same_pixels(trial: Trial, folder: Path) -> None:
    found = pixels(trial.data, folder)
    if found is not trial.pixels:
        raise Refusal(
            f"pixels {trial.pixels}: {folder / trial.data} holds {found} images; "
            f"point --data at a folder with {trial.pixels} ones, or set pixels={found}"
        )


class Resident:
    """The images of one trial on one device: `batch` trains, `batches` are what probes read.

    The validation images are the same for every trial of a data set, whatever its seed, so that
    nuisance axes are chosen on one set of images that no trial trains on. With label noise the labels of all training
    images are as in `noisy`, whoever reads them; test images have their own.
    """

    def __init__(self, trial: Trial, folder: Path, device: torch.device) -> None:
        _same_pixels(trial, folder)
        self.trial = trial
        self.device = device
        loaded = _load(trial.data, folder, device, _dimensions(trial))
        self._loaded = loaded._replace(train=noisy(loaded.train, trial))
        train, test = self._loaded.train, self._loaded.test
        order = torch.randperm(len(train.labels_N), generator=_draws(0, f"validation/{trial.data}")).to(device)
        held, kept = order[: trial.validation], order[trial.validation :]
        self._kept = kept.sort().values  # the images that train
        everything = torch.arange(len(test.labels_N), device=device)
        # Evaluating on as many training images as there are test images makes the gap a fair one.
        self._parts = {"train": (train, kept[: len(everything)].sort().values), "test": (test, everything)}
        if trial.validation:
            self._parts["validation"] = (train, held.sort().values)
        self._epoch: tuple[int, _Plan] | None = None

    @property
    def parts(self) -> list[str]:
        """train, test, and validation where images are held out."""
        return list(self._parts)

    def batch(self, step: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Float images and labels (or targets) of the update from `step` to `step + 1`; `share` is a worker's part."""
        epoch, place = divmod(step, self.trial.steps_per_epoch)
        plan = self._plan(epoch)
        taken = slice(place * self.trial.batch, (place + 1) * self.trial.batch)
        chosen_N = plan.order_N[taken][share]
        # Not images[chosen]: that copies pixel by pixel, thirty times as slowly on a CPU.
        images_NCHW = self._loaded.train.images_NCHW.index_select(0, chosen_N)
        if plan.shift_N2 is not None:
            images_NCHW = shifted(images_NCHW, plan.shift_N2[taken][share])
        if plan.flip_N is not None:
            images_NCHW = torch.where(plan.flip_N[taken][share][:, None, None, None], images_NCHW.flip(3), images_NCHW)
        return self._normalised(images_NCHW), self._loaded.train.labels_N.index_select(0, chosen_N)

    def batches(self, part: str, size: int, share: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """A part in order and without augmentation; `share` takes every n-th batch for a worker of a gang."""
        split, chosen = self._parts[part]
        for start in range(0, len(chosen), size)[share]:
            some = chosen[start : start + size]
            yield self._normalised(split.images_NCHW.index_select(0, some)), split.labels_N.index_select(0, some)

    def _normalised(self, images_NCHW: Tensor) -> Tensor:
        """uint8 to float32 with the data set's mean 0 and standard deviation 1, channels last in memory."""
        images_NCHW = images_NCHW.to(torch.float32, memory_format=torch.channels_last)
        if self.trial.facts.regression:
            return images_NCHW
        return images_NCHW.div_(255).sub_(self._loaded.mean_C).div_(self._loaded.sd_C)

    def _plan(self, epoch: int) -> "_Plan":
        """Drawn at once on the CPU, so that every device sees the same."""
        if self._epoch is None or self._epoch[0] != epoch:
            seed, n, augmentation = self.trial.seed, len(self._kept), self.trial.augmentation
            order = torch.randperm(n, generator=_draws(seed, f"order/{epoch}"))
            flip_N = shift_N2 = None
            if augmentation is Augmentation.FLIP_SHIFT:
                flip_N = torch.randint(2, (n,), generator=_draws(seed, f"flip/{epoch}")).bool().to(self.device)
            if augmentation is not Augmentation.NONE:
                reach = self.trial.facts.side // 8
                shifts = torch.randint(2 * reach + 1, (n, 2), generator=_draws(seed, f"shift/{epoch}"))
                shift_N2 = shifts.to(self.device)
            self._epoch = epoch, _Plan(self._kept.index_select(0, order.to(self.device)), flip_N, shift_N2)
        return self._epoch[1]


class _Plan(NamedTuple):
    """The N training images in the order of one epoch, and how each is moved, where the trial moves any."""

    order_N: Tensor
    flip_N: Tensor | None
    shift_N2: Tensor | None


def blank(trial: Trial, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of the trial's shapes and types, as `Resident.batch` gives it: black images, the first class."""
    facts = trial.facts
    images_NCHW = torch.zeros(trial.batch, facts.channels, facts.side, facts.side, device=device)
    shape, kind = ((trial.batch, facts.classes), torch.float32) if facts.regression else ((trial.batch,), torch.int64)
    return images_NCHW.to(memory_format=torch.channels_last), torch.zeros(shape, dtype=kind, device=device)


def noisy(train: Split, trial: Trial) -> Split:
    """The training images with `label_noise`: each label is drawn anew with that probability, uniformly over all
    classes, so that by chance some stay as they were (Zhang et al. 2017, arXiv:1611.03530, section 2.2).

    The share of labels drawn anew is near the probability and not exactly it. Held-out images are among them: a
    practitioner does not know which labels are wrong. Of one seed, the labels drawn anew at a lower probability are
    among those at a higher one, with the same new labels. Drawn on the CPU, so that every device and worker has the
    same.
    """
    if not trial.label_noise:
        return train
    count = len(train.labels_N)
    anew_N = torch.rand(count, generator=_draws(trial.seed, "label_noise/which")) < trial.label_noise
    drawn_N = torch.randint(trial.facts.classes, (count,), generator=_draws(trial.seed, "label_noise/labels"))
    device = train.labels_N.device
    return train._replace(labels_N=torch.where(anew_N.to(device), drawn_N.to(device), train.labels_N))


def shifted(images_NCHW: Tensor, shift_N2: Tensor) -> Tensor:
    """Each image moved by its own (down, right) in [0, 2 * reach] less reach pixels, black outside.

    The crop of a padded image, as torchvision's RandomCrop does, for all images at once.
    """
    side = images_NCHW.shape[-1]
    reach = side // 8
    padded = torch.nn.functional.pad(images_NCHW, (reach,) * 4)
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # (N, C, 2*reach+1, 2*reach+1, H, W), a view
    each = torch.arange(len(images_NCHW), device=images_NCHW.device)
    return windows[each, :, shift_N2[:, 0], shift_N2[:, 1]]


def _draws(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(seed, purpose))


# --- reading, once a process --------------------------------------------------------------------


def _dimensions(trial: Trial) -> int:
    """Of the linear teacher, which is as wide as the network; 0 for images, which are what they are."""
    return trial.facts.classes if trial.facts.regression else 0


@lru_cache(maxsize=2)
def _load(data: Data, folder: Path, device: torch.device, dimensions: int) -> Loaded:
    if data is Data.LINEAR_TEACHER:
        return _teacher(dimensions, device)
    parts = _read(data, folder)
    if data in (Data.CIFAR10, Data.CIFAR100):
        mean, sd = IMAGENET_MEAN, IMAGENET_SD
    else:
        pixels_NHWC = parts[0].images_NHWC / 255.0
        mean, sd = pixels_NHWC.mean((0, 1, 2)), pixels_NHWC.std((0, 1, 2))
    train, test = (
        Split(
            torch.from_numpy(part.images_NHWC).permute(0, 3, 1, 2).contiguous().to(device),
            torch.from_numpy(part.labels_N).to(device),
        )
        for part in parts
    )
    mean_C, sd_C = (torch.tensor(np.asarray(v), dtype=torch.float32, device=device)[:, None, None] for v in (mean, sd))
    return Loaded(train, test, mean_C, sd_C)


def _read(data: Data, folder: Path) -> tuple[Pictures, Pictures]:
    """Training and test images, checked against what the data set is known to hold."""
    if data is Data.DIGITS:
        return _digits()
    if not folder.is_dir() and folder.exists():
        raise Refusal(f"data {folder}: is no folder; give --data a folder")
    parts = _hub(data, folder) if _hub_files(data, folder, "train") else _torchvision(data, folder)
    facts = data.facts
    for name, part, count in zip(("train", "test"), parts, (facts.train, facts.test), strict=True):
        shape = (count, facts.side, facts.side, facts.channels)
        if part.images_NHWC.shape != shape or part.labels_N.shape != (count,) or part.labels_N.max() >= facts.classes:
            raise Refusal(
                f"data {folder}: its {name} part of {data} has images of shape {part.images_NHWC.shape} and labels up "
                f"to {part.labels_N.max()}; {facts.title} has {shape} and {facts.classes} classes; fetch it again"
            )
    return parts


def _teacher(dimensions: int, device: torch.device) -> Loaded:
    """x standard normal and targets A x, A of standard normal entries, one for all seeds (Santurkar et al. 3.1)."""
    teacher_KK = torch.randn(dimensions, dimensions, generator=_draws(0, f"teacher/{dimensions}"))
    splits = []
    for part, count in (("train", Data.LINEAR_TEACHER.facts.train), ("test", Data.LINEAR_TEACHER.facts.test)):
        x_NK = torch.randn(count, dimensions, generator=_draws(0, f"teacher/{dimensions}/{part}"))
        splits.append(Split(x_NK[..., None, None].to(device), (x_NK @ teacher_KK.T).to(device)))
    nothing = torch.zeros(0, device=device)
    return Loaded(splits[0], splits[1], nothing, nothing)


def _digits() -> tuple[Pictures, Pictures]:
    """1,437 training and 360 test images of 8x8 with 17 grey levels, scaled to 0..255.

    Read and divided as scikit-learn does, to the bit, without importing it: in a worker of a short trial that would be
    a tenth of the worker's start.
    """
    found = find_spec("sklearn")
    assert found is not None
    assert found.submodule_search_locations is not None
    table = np.loadtxt(Path(found.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", delimiter=",")
    images_NHWC = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]
    labels_N = table[:, -1].astype(np.int64)
    train, test = _stratified(labels_N, Data.DIGITS.facts.test)
    return Pictures(images_NHWC[train], labels_N[train]), Pictures(images_NHWC[test], labels_N[test])


def _stratified(labels_N: np.ndarray, test: int) -> tuple[np.ndarray, np.ndarray]:
    """Which are for training and which for the test, as `train_test_split` draws it for a `random_state` of 0."""
    random = np.random.RandomState(0)

    def shares(counts: np.ndarray, whole: int) -> np.ndarray:
        """So many of each class; those of equal claim to what rounding leaves over draw lots."""
        exact = counts / counts.sum() * whole
        taken = np.floor(exact)
        over = exact - taken
        for claim in np.unique(over)[::-1]:
            if missing := int(whole - taken.sum()):
                (equal,) = np.where(over == claim)
                taken[random.choice(equal, size=min(len(equal), missing), replace=False)] += 1
        return taken.astype(int)

    counts = np.bincount(labels_N)
    classes = np.split(np.argsort(labels_N, kind="stable"), np.cumsum(counts)[:-1])
    in_train = shares(counts, len(labels_N) - test)
    in_test = shares(counts - in_train, test)
    chosen: tuple[list[int], list[int]] = ([], [])
    for of, first, then in zip(classes, in_train, in_test, strict=True):
        shuffled = of[random.permutation(len(of))]
        chosen[0].extend(shuffled[:first])
        chosen[1].extend(shuffled[first : first + then])
    return random.permutation(chosen[0]), random.permutation(chosen[1])


def _hub_files(data: Data, folder: Path, part: str) -> list[Path]:
    return sorted((folder / data).glob(f"{part}-*.parquet"))


@contextmanager
def _parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise Refusal(f"data {path}: cannot be read as Parquet ({error}); fetch it again") from None


def _image_column(schema: pa.Schema, path: Path) -> str:
    for field in schema:
        if pa.types.is_struct(field.type) and "bytes" in {inner.name for inner in field.type}:
            return field.name
    raise Refusal(
        f"data {path}: has no image column (struct with `bytes`), only {', '.join(schema.names)}; fetch it again"
    )


def _hub(data: Data, folder: Path) -> tuple[Pictures, Pictures]:
    """Parquet with a column of encoded images (struct of bytes and path) and one of labels."""
    mode = "RGB" if data.facts.channels == 3 else "L"
    parts = []
    for part in ("train", "test"):
        images, labels = [], []
        files = _hub_files(data, folder, part)
        if not files:
            raise Refusal(f"data {folder / data}: has train-*.parquet but no {part}-*.parquet; fetch the rest")
        for path in files:
            with _parquet(path):
                table = pq.read_table(path)
            label = next((n for n in ("label", "fine_label", "labels") if n in table.column_names), None)
            if label is None:
                raise Refusal(f"data {path}: has no column label, only {', '.join(table.column_names)}; fetch it again")
            encoded = table.column(_image_column(table.schema, path)).combine_chunks().field("bytes")
            try:
                images += [np.asarray(Image.open(io.BytesIO(each.as_py())).convert(mode)) for each in encoded]
            except (OSError, TypeError) as error:
                raise Refusal(f"data {path}: has an image that cannot be decoded ({error}); fetch it again") from None
            labels.append(table.column(label).to_numpy().astype(np.int64))
        if len({image.shape for image in images}) != 1:
            raise Refusal(f"data {folder / data}: its {part} images are none, or of several sizes; fetch it again")
        stacked = np.stack(images)
        pa.default_memory_pool().release_unused()  # the files' bytes: Arrow would keep them for the next ones
        parts.append(Pictures(stacked if mode == "RGB" else stacked[..., None], np.concatenate(labels)))
    return parts[0], parts[1]


def _torchvision(data: Data, folder: Path) -> tuple[Pictures, Pictures]:
    """torchvision's own files, downloaded by one process at a time and checked by torchvision's sums."""
    from torchvision import datasets  # seconds to import, and only these data sets need it

    name, files = _TORCHVISION[data]

    def opened(root: Path, *, download: bool) -> tuple[Pictures, Pictures]:
        parts = []
        for train in (True, False):
            source = getattr(datasets, name)(str(root), train=train, download=download)
            images = np.asarray(source.data)
            labels_N = np.asarray(source.targets, np.int64)
            parts.append(Pictures(images if images.ndim == 4 else images[..., None], labels_N))
        return parts[0], parts[1]

    def found() -> tuple[Pictures, Pictures] | None:
        try:
            return opened(folder, download=False)
        except RuntimeError:  # torchvision's word for: not there, or not whole
            return None
        except Exception as error:  # files that are there and hold something else end it in many ways
            raise Refusal(
                f"data {folder / files}: cannot be read ({type(error).__name__}: {error}); delete it and fetch it again"
            ) from None

    def fetched() -> tuple[Pictures, Pictures]:
        """Downloaded out of sight and moved when they are whole: of MNIST, torchvision takes half a file for one."""
        beside = folder / f".{data}.part"
        shutil.rmtree(beside, ignore_errors=True)  # of a download that was killed
        try:
            parts = opened(beside, download=True)
            (folder / files).mkdir(parents=True, exist_ok=True)
            for file in (beside / files).iterdir():
                if file.suffix != ".gz":
                    file.replace(folder / files / file.name)
            return parts
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    there = found()
    if there is not None:
        return there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{data}.lock"):
            return found() or fetched()  # another process may have fetched them while this one waited
    except (RuntimeError, OSError, HTTPException) as error:  # URLError is an OSError
        _missing(data, folder, files, error)


def _missing(data: Data, folder: Path, files: str, error: Exception) -> NoReturn:
    said = " ".join(str(error).split())
    raise Refusal(
        f"data {data}: not found in {folder}, and it could not be downloaded ({said}). Looked for "
        f"{folder / data}/train-*.parquet (Hugging Face Hub layout) and {folder / files} (torchvision's files); "
        "put either there, or give --data a folder that has one, or use data=digits, which needs no files"
    ) from None
