"""The kernels in C: compiled on this machine, for its processor, once.

Without a C compiler, or without AVX-512, whose width they are written in, there are none, and networks compute with
torch's operations.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LANES = 16  # channels that are computed at once: their number is a multiple of it
CHUNK = 4096  # values behind one partial sum: 16 KiB in float32, so that a second look finds them in the first cache
_HERE = Path(__file__).parent
_SOURCES = [_HERE / name for name in ("fused.c", "chain.c")]
_HEADERS = [_HERE / "lanes.h"]
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp", f"-DCHUNK={CHUNK}")


@lru_cache
def kernels() -> Any:
    """The compiled library, or None where this machine cannot have it or would not gain by it.

    It is kept under the cache folder, by what it was made from, so that whoever comes later finds it, or that it cannot
    be loaded; where nothing can be kept, each process has its own.
    """
    found = compiler()
    if found is None or not wide():  # half as wide, it takes several times as long as torch's own
        return None
    source = b"".join(path.read_bytes() for path in (*_SOURCES, *_HEADERS))
    about = Path(found[0]).stat()  # another version is another size or another time
    made_from = repr((_flags(), found, about.st_size, about.st_mtime_ns, _processor())).encode()
    name = f"kernels-{hashlib.sha256(source + made_from).hexdigest()[:16]}.so"
    with contextlib.suppress(OSError, RuntimeError):  # no home, or no place for code
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnscale"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        library = home / name
        if _ours(home) and (not library.exists() or _ours(library)):
            return _made(found, library)
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as own:
        return _made(found, Path(own) / name)
    return None


def _made(command: tuple[str, ...], library: Path) -> Any:
    """What is there or is compiled now; None where it cannot be compiled or loaded. Raises OSError without a place."""
    hopeless = library.with_suffix(".failed")
    if hopeless.exists():
        return None
    if library.exists():
        with contextlib.suppress(OSError):  # of a file that a crash cut short
            return _declared(ctypes.CDLL(str(library)))
    try:
        _compile(command, library)
    except subprocess.SubprocessError:
        return None
    try:
        return _declared(ctypes.CDLL(str(library)))
    except OSError as error:  # as where a compiler asks for an OpenMP of its own
        hopeless.write_text(f"{error}\n")
        return None


def wide() -> bool:
    """Whether the processor computes as the kernels are written."""
    return "avx512f" in _processor()


def _ours(path: Path) -> bool:
    """Whether nobody else can have written it: it is code that will run."""
    about = path.lstat()
    return about.st_uid == os.getuid() and not about.st_mode & 0o022 and not stat.S_ISLNK(about.st_mode)


def compiler() -> tuple[str, ...] | None:
    """The C compiler: $CC, or cc. None outside of Linux: elsewhere torch has another OpenMP than compilers."""
    words = shlex.split(os.environ.get("CC") or "cc")
    there = platform.system() == "Linux" and shutil.which(words[0])
    return (there, *words[1:]) if there else None


def _compile(command: tuple[str, ...], library: Path) -> None:
    """Whole or not at all: workers may come at once.

    Linked without OpenMP's own library, so that it takes what torch has loaded: two would fight for the cores.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        whole = Path(folder) / library.name
        parts = [Path(folder) / f"{source.stem}.o" for source in _SOURCES]
        quiet: dict[str, Any] = {"check": True, "capture_output": True, "timeout": 120}
        for source, part in zip(_SOURCES, parts, strict=True):
            subprocess.run([*command, *_flags(), "-c", str(source), "-o", str(part)], **quiet)
        subprocess.run([*command, "-shared", *map(str, parts), "-o", str(whole)], **quiet)
        whole.replace(library)


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, "-mprefer-vector-width=512") if platform.machine() == "x86_64" else _FLAGS


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its arguments. Raises OSError where it lacks something."""
    size, real, place, small = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
    arguments = {
        "bnscale_forward": [*[size] * 3, *[place] * 6, real, real, *[place] * 6, small, small],
        "bnscale_evaluate": [*[size] * 3, *[place] * 6, real, *[place] * 2, small, small],
        "bnscale_backward": [*[size] * 3, *[place] * 12, small, small],
        "bnscale_chain_forward": [*[size] * 5, *[place] * 12, real, real, *[place] * 5, small, small],
        "bnscale_chain_backward": [*[size] * 5, *[place] * 7, small, *[place] * 13, small, small],
        "bnscale_chain_end": [*[size] * 5, *[place] * 10, small, small],
        "bnscale_chain_last": [*[size] * 5, *[place] * 7, small, small],
        "bnscale_chain_half": [],
    }
    for name, types in arguments.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(str(error)) from None
        function.argtypes, function.restype = types, None if types else small
    return library


def _processor() -> str:
    """What the compiled code may ask of the processor: a home may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *dict.fromkeys(told)])


_imagined = False


@contextlib.contextmanager
def imagined() -> Iterator[None]:
    """Inside, tensors that have shapes and no content are taken, and nothing is computed of them."""
    global _imagined
    _imagined = True
    try:
        yield
    finally:
        _imagined = False


def call(name: str, *given: Tensor | float | None) -> None:
    """A kernel, by the addresses of the tensors that it is given. Raises RuntimeError for one that has no content."""
    if any(isinstance(each, FakeTensor) for each in given):
        if _imagined:
            return
        raise RuntimeError(f"{name} computes at once and cannot be traced; use bnscale.networks.norm.composed")
    library = kernels()
    assert library is not None, "asked for images that fit"
    getattr(library, name)(*(each.data_ptr() if isinstance(each, Tensor) else each for each in given))


def half(images_NCHW: Tensor) -> int:
    return int(images_NCHW.dtype is torch.bfloat16)
