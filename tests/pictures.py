"""A handful of images in every format that data sets come in, with the images that were written."""

import hashlib
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torchvision import datasets

from bnscale.trial import Data, DataFacts


def pictures(facts: DataFacts, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    images = draws.integers(0, 256, (count, facts.side, facts.side, facts.channels), dtype=np.uint8)
    return images, draws.integers(0, facts.classes, count)


def write_hub(folder: Path, name: Data, form: str, files: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Parquet as the Hugging Face Hub serves image data sets."""
    written = {}
    for part, count, seed in [("train", 20, 0), ("test", 6, 1)]:
        images, labels = pictures(name.facts, count, seed)
        encoded = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image.squeeze()).save(buffer, form, **({"quality": 75} if form == "JPEG" else {}))
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        (folder / name).mkdir(exist_ok=True, parents=True)
        column = "fine_label" if name is Data.CIFAR100 else "label"
        for i, rows in enumerate(np.array_split(np.arange(count), files)):
            table = pa.table({"img": [encoded[r] for r in rows], column: labels[rows]})
            pq.write_table(table, folder / name / f"{part}-{i:05d}-of-{files:05d}.parquet")
        written[part] = (images, labels)
    return written


def write_cifar(folder: Path, name: Data, monkeypatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Python pickles as Toronto serves them, and torchvision's sums of them."""
    kind = datasets.CIFAR10 if name is Data.CIFAR10 else datasets.CIFAR100
    label = "labels" if name is Data.CIFAR10 else "fine_labels"
    home = folder / kind.base_folder
    home.mkdir(parents=True)
    written = {}
    for part, listed, count, seed in [("train", kind.train_list, 20, 0), ("test", kind.test_list, 6, 1)]:
        images, labels = pictures(name.facts, count, seed)
        sums = []
        for (file, _), rows in zip(listed, np.array_split(np.arange(count), len(listed)), strict=True):
            flat = images[rows].transpose(0, 3, 1, 2).reshape(len(rows), -1)
            content = pickle.dumps({"data": flat, label: labels[rows].tolist()})
            (home / file).write_bytes(content)
            sums.append([file, hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(kind, f"{part}_list", sums)
        written[part] = (images, labels)
    names = pickle.dumps({kind.meta["key"]: [str(i) for i in range(name.facts.classes)]})
    (home / kind.meta["filename"]).write_bytes(names)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": hashlib.md5(names).hexdigest()})
    return written


def write_idx(folder: Path, name: Data) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """MNIST's own format, gzipped where torchvision unpacks it."""
    home = folder / ("MNIST" if name is Data.MNIST else "FashionMNIST") / "raw"
    home.mkdir(parents=True)
    written = {}
    for part, stem, count, seed in [("train", "train", 20, 0), ("test", "t10k", 6, 1)]:
        images, labels = pictures(name.facts, count, seed)
        (home / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes())
        (home / f"{stem}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, count) + labels.astype("u1").tobytes()
        )
        written[part] = (images, labels)
    return written
