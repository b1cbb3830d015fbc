"""The machine under an engine: what stands beside every number measured on it."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def facts_of(device: torch.device) -> dict[str, Any]:
    """Host, device and the versions of everything that could change a number."""
    versions = {name: _version(name) for name in ("bnscale", "torch", "ray", "deepspeed")}
    return {"host": socket.gethostname(), "device": device_name(device), "python": platform.python_version()} | versions


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Let this process reuse what it frees instead of handing it back to the system, until `release_memory`.

    A training step frees and takes the same activations again; glibc returns blocks of their size at once, and the
    system clears every page anew, a fifth of a CPU step. Does nothing without glibc.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)


def release_memory() -> None:
    """Hand freed memory back: the next trial may be a small one."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def release_gpu(device: torch.device) -> None:
    """Let go of what no trial holds any more: a recorded step is a ring of references, and holds as much as a trial."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Start measuring peak memory anew: one process trains many trials."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since `forget_peak`: of the device, or of the process on a CPU (None outside of Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # also what a recorded step keeps between its replays
    status = Path("/proc/self/status")
    found = _PEAK.search(status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def keep_to_share(device: torch.device, sharers: int, context: int) -> None:
    """Of a GPU that so many processes share this one takes an equal part and no more, from now on: what is beyond it is
    out of memory. `context` are the bytes that a process takes beside its tensors. A CPU's memory Ray watches."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, 1 / sharers - context / total), device)


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes of the device's memory, or of the machine's, and how many of them other processes hold now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, max(0, total - free - torch.cuda.memory_reserved(device))
    machine = psutil.virtual_memory()
    return machine.total, max(0, machine.total - machine.available - psutil.Process().memory_info().rss)


def in_bytes(count: float) -> str:
    """`10.3 GiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


@lru_cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@lru_cache
def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


@lru_cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
