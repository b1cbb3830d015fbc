"""Kernels are compiled once, by this machine, and no code runs that another may have written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnscale.networks import native

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="this machine has no C compiler, or no AVX-512")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled in a second, to code that nobody runs."""
    monkeypatch.setattr(native, "_FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in native._FLAGS))
    native.kernels.cache_clear()
    yield
    native.kernels.cache_clear()


@pytest.mark.parametrize("others_may_write", ["folder", "file"])
def test_code_that_somebody_else_may_have_written_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others_may_write: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.kernels.cache_clear()
    try:
        assert native.kernels() is not None
        (library,) = (tmp_path / "bnscale").iterdir()
        library.write_bytes(b"somebody else's")
        (library if others_may_write == "file" else library.parent).chmod(0o777)
        native.kernels.cache_clear()
        assert native.kernels() is not None  # made anew, and elsewhere
        assert library.read_bytes() == b"somebody else's"
    finally:
        native.kernels.cache_clear()


def test_a_library_that_a_crash_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for home in ("whole", "cut short"):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
            native.kernels.cache_clear()
            assert native.kernels() is not None
            (library,) = (tmp_path / home / "bnscale").iterdir()
            assert library.stat().st_size > 0
            other = tmp_path / "cut short" / "bnscale"
            if home == "whole":
                other.mkdir(parents=True, mode=0o700)
                (other / library.name).write_bytes(b"")
    finally:
        native.kernels.cache_clear()


def test_the_library_is_kept_for_whoever_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.kernels.cache_clear()
    try:
        assert native.kernels() is not None
        (library,) = (tmp_path / "bnscale").iterdir()
        written = library.stat().st_mtime_ns
        native.kernels.cache_clear()
        assert native.kernels() is not None
        assert library.stat().st_mtime_ns == written
    finally:
        native.kernels.cache_clear()


def test_what_cannot_be_loaded_is_compiled_once_and_never_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, asked = tmp_path / "cc", tmp_path / "asked"
    compiler.write_text(f'#!/bin/sh\necho "$@" >>{asked}\nfor last; do :; done\necho nothing >"$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for _ in range(2):
        native.kernels.cache_clear()
        assert native.kernels() is None
    assert len(asked.read_text().splitlines()) == len(native._SOURCES) + 1
    os.utime(compiler, (0, 0))  # another version, it may be
    native.kernels.cache_clear()
    assert native.kernels() is None
    assert len(asked.read_text().splitlines()) == 2 * (len(native._SOURCES) + 1)
