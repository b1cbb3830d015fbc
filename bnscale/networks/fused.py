"""Batch normalization, an addition and relu as one operation on the CPU: relu(norm(x) + plus), forward and backward.

torch's own operations read or write the images six to eight times forward and as often backward; fused.c does three or
four, and five or six; in evaluation two or three. What it keeps for the backward pass is x and, behind an addition, one
bit a value. To keep y instead and invert it would keep as much, and divide by gammas of which BN-only training brings
many near 0. It is compiled on this machine, for its processor, once; without a C compiler, or without AVX-512, whose
width it is written in, `kernels` is None and networks compute with torch's operations. Numbers agree with those to
rounding, and with themselves to the last bit, whatever the number of threads.

Legend: N images, C channels, H, W pixels, G groups of images with a statistic of their own.
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
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LANES = 16  # channels that are computed at once: their number is a multiple of it
CHUNK = 4096  # values behind one partial sum: 16 KiB in float32, so that a second look finds them in the first cache
_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp", f"-DCHUNK={CHUNK}")
_TYPES = (torch.float32, torch.bfloat16)


def fits(images_NCHW: Tensor) -> bool:
    """Whether these images can be normalised here: on a CPU, in float32 or bfloat16, and so many channels."""
    return (
        images_NCHW.device.type == "cpu"
        and images_NCHW.dtype in _TYPES
        and images_NCHW.shape[1] % LANES == 0
        and kernels() is not None
    )


def rectified(
    images_NCHW: Tensor,
    plus_NCHW: Tensor | None,
    gamma_GC: Tensor,
    beta_GC: Tensor,
    running_mean_GC: Tensor,
    running_var_GC: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """relu(gamma * (x - mean) / sqrt(variance + eps) + beta + plus), each of G consecutive groups of images by its own
    statistics, towards which the running ones move; the running variance moves by the unbiased one.

    Of images that `fits`. Can be differentiated once.
    """
    layout = _layout(images_NCHW)
    images_NCHW = images_NCHW.contiguous(memory_format=layout)
    if plus_NCHW is not None:
        plus_NCHW = plus_NCHW.to(images_NCHW.dtype).contiguous(memory_format=layout)
    given = (gamma_GC, beta_GC, running_mean_GC, running_var_GC)
    _check(given)
    if images_NCHW.numel() < 2 * gamma_GC.numel():
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {images_NCHW.shape}")
    return _Rectified.apply(images_NCHW, plus_NCHW, *given, momentum, eps)


def evaluated(
    images_NCHW: Tensor,
    plus_NCHW: Tensor | None,
    gamma_GC: Tensor,
    beta_GC: Tensor,
    mean_GC: Tensor,
    var_GC: Tensor,
    eps: float,
) -> Tensor:
    """The same by statistics that are given and stay as they are, in the place of the images.

    Of images that `fits`. Has no gradient.
    """
    library = kernels()
    assert library is not None, "asked for images that fit"
    layout, channels = _layout(images_NCHW), images_NCHW.shape[1]
    images_NCHW = images_NCHW.contiguous(memory_format=layout)
    if plus_NCHW is not None:
        plus_NCHW = plus_NCHW.to(images_NCHW.dtype).contiguous(memory_format=layout)
    groups = gamma_GC.numel() // channels
    count = images_NCHW.numel() // channels // groups
    _check((gamma_GC, beta_GC, mean_GC, var_GC))
    scale_GC = torch.empty(groups, channels, dtype=torch.float32)
    library.bnscale_evaluate(
        groups, count, channels, images_NCHW.data_ptr(), _at(plus_NCHW), gamma_GC.data_ptr(), beta_GC.data_ptr(),
        mean_GC.data_ptr(), var_GC.data_ptr(), eps, scale_GC.data_ptr(), images_NCHW.data_ptr(), _half(images_NCHW),
        torch.get_num_threads(),
    )  # fmt: skip
    return images_NCHW


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images_NCHW: Tensor,
        plus_NCHW: Tensor | None,
        gamma_GC: Tensor,
        beta_GC: Tensor,
        running_mean_GC: Tensor,
        running_var_GC: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        library = kernels()
        assert library is not None, "asked for images that fit"
        channels = images_NCHW.shape[1]
        groups = gamma_GC.numel() // channels
        count = images_NCHW.numel() // channels // groups
        wide = torch.empty(3, groups, channels, dtype=torch.float32)  # mean, 1 / deviation, scale
        y_NCHW = torch.empty_like(images_NCHW)
        signs = None if plus_NCHW is None else torch.empty(images_NCHW.numel() // LANES, dtype=torch.int16)
        room = _room(groups, count, channels)
        library.bnscale_forward(
            groups, count, channels, images_NCHW.data_ptr(), _at(plus_NCHW), gamma_GC.data_ptr(), beta_GC.data_ptr(),
            running_mean_GC.data_ptr(), running_var_GC.data_ptr(), momentum, eps, *(part.data_ptr() for part in wide),
            y_NCHW.data_ptr(), _at(signs), room.data_ptr(), _half(images_NCHW), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(images_NCHW, wide, beta_GC, *([] if signs is None else [signs]))
        ctx.sizes, ctx.shape = (groups, count, channels), gamma_GC.shape
        return y_NCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        library = kernels()
        assert library is not None
        images_NCHW, wide, beta_GC, *rest = ctx.saved_tensors
        signs = rest[0] if rest else None
        groups, count, channels = ctx.sizes
        gradient_NCHW = gradient_NCHW.to(images_NCHW.dtype).contiguous(memory_format=_layout(images_NCHW))
        of_gamma_GC, of_beta_GC = torch.empty(2, *ctx.shape, dtype=torch.float32)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx_NCHW = torch.empty_like(images_NCHW) if wanted else None
        dplus_NCHW = torch.empty_like(images_NCHW) if wanted and signs is not None else None
        room = _room(groups, count, channels)
        library.bnscale_backward(
            groups, count, channels, gradient_NCHW.data_ptr(), images_NCHW.data_ptr(), _at(signs),
            *(part.data_ptr() for part in wide), beta_GC.data_ptr(), of_gamma_GC.data_ptr(), of_beta_GC.data_ptr(),
            _at(dx_NCHW), _at(dplus_NCHW), room.data_ptr(), _half(images_NCHW), torch.get_num_threads(),
        )  # fmt: skip
        return dx_NCHW, dplus_NCHW, of_gamma_GC, of_beta_GC, None, None, None, None


def _check(of_channels: tuple[Tensor, ...]) -> None:
    """What is read by its address alone: a float32 for each group and channel, in order."""
    for each_GC in of_channels:
        assert each_GC.dtype is torch.float32, each_GC.dtype
        assert each_GC.is_contiguous(), each_GC.stride()
        assert each_GC.shape == of_channels[0].shape, each_GC.shape


def _layout(images_NCHW: Tensor) -> torch.memory_format:
    return torch.channels_last if images_NCHW.dim() == 4 else torch.contiguous_format


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _half(images_NCHW: Tensor) -> int:
    return int(images_NCHW.dtype is torch.bfloat16)


def _room(groups: int, count: int, channels: int) -> Tensor:
    """For two sums of each chunk and channel."""
    rows = max(1, CHUNK // channels)
    return torch.empty(2 * groups * -(-count // rows) * channels, dtype=torch.float32)


# --- the library --------------------------------------------------------------------------------------


@lru_cache
def kernels() -> Any:
    """The compiled fused.c, or None where this machine cannot have it or would not gain by it.

    It is kept under the cache folder, by what it was made from, so that whoever comes later finds it; where that cannot
    be, each process has its own.
    """
    found = compiler()
    if found is None or "avx512f" not in _processor():  # half as wide, it takes several times as long as torch's own
        return None
    made_from = hashlib.sha256(_SOURCE.read_bytes() + repr((_FLAGS, found, _processor())).encode()).hexdigest()
    with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError):  # no home, or no place for code
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnscale"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        library = home / f"fused-{made_from[:16]}.so"
        if _ours(home) and (not library.exists() or _ours(library)):
            if library.exists():
                with contextlib.suppress(OSError):  # of a file that a crash cut short
                    return _declared(ctypes.CDLL(str(library)))
            _compile(found, library)
            return _declared(ctypes.CDLL(str(library)))
    with contextlib.suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory() as own:
        _compile(found, Path(own) / "fused.so")
        return _declared(ctypes.CDLL(str(Path(own) / "fused.so")))
    return None


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
        part, whole = Path(folder) / "fused.o", Path(folder) / library.name
        quiet: dict[str, Any] = {"check": True, "capture_output": True, "timeout": 120}
        wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
        subprocess.run([*command, *_FLAGS, *wide, "-c", str(_SOURCE), "-o", str(part)], **quiet)
        subprocess.run([*command, "-shared", str(part), "-o", str(whole)], **quiet)
        whole.replace(library)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its arguments. Raises OSError where it lacks something."""
    size, real, place, small = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
    arguments = {
        "bnscale_forward": [*[size] * 3, *[place] * 6, real, real, *[place] * 6, small, small],
        "bnscale_evaluate": [*[size] * 3, *[place] * 6, real, *[place] * 2, small, small],
        "bnscale_backward": [*[size] * 3, *[place] * 12, small, small],
    }
    for name, types in arguments.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(str(error)) from None
        function.argtypes, function.restype = types, None
    return library


def _processor() -> str:
    """What the compiled code may ask of the processor: a home may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *dict.fromkeys(told)])
