"""What bnscale stands on: what is missing or too old is one message, before anything is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnscale import start
from bnscale.start import Requirement

ROOT = Path(__file__).parents[1]
COMMANDS = {"bnscale": ["-m", "bnscale.cli", "sql", "select 1"], "study": [str(ROOT / "studies" / "frankle_depth.py")]}


def python(words: list[str], *paths: Path) -> subprocess.CompletedProcess[str]:
    """Python without what is installed for it, as a user who forgot to activate .venv has it, but with `paths`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    return subprocess.run([sys.executable, "-S", *words], env=environment, capture_output=True, text=True, timeout=60)


def site(folder: Path, **versions: str) -> Path:
    """A folder in which these packages are installed, as far as their metadata tell."""
    wanted = {each.name: each.version for each in start.requirements()} | versions
    for name, version in wanted.items():
        notes = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        notes.mkdir(parents=True)
        (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_installed_is_one_message_with_the_command_that_mends_it(command: str) -> None:
    ended = python(COMMANDS[command])
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert {"duckdb", "ray", "torch"} <= set(ended.stderr.replace(",", "").split())
    assert f"run `make -C {ROOT} setup`" in ended.stderr


@pytest.mark.parametrize("package", ["ray", "torch", "duckdb"])
def test_a_package_that_is_too_old_is_named_with_both_versions(package: str, tmp_path: Path) -> None:
    ended = python(COMMANDS["study"], site(tmp_path, **{package: "0.9.1"}))
    wanted = next(each.version for each in start.requirements() if each.name == package)
    assert ended.returncode == 2
    assert f": {package} 0.9.1 is too old, {wanted} is needed; run `make" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_as_a_library_it_raises_what_a_program_would_print(tmp_path: Path) -> None:
    lines = "import sys\ntry:\n    import bnscale\nexcept ImportError as error:\n    print('caught', error)"
    ended = python(["-c", lines], site(tmp_path, torch="1.13.1+cu117"))
    assert ended.stdout.startswith(f"caught {sys.executable}: torch 1.13.1+cu117 is too old")


def test_this_python_has_all_that_the_project_file_asks_for() -> None:
    start.check()
    names = {each.name for each in start.requirements()}
    assert {"ray", "torch", "duckdb", "deepspeed", "pyarrow"} <= names
    assert names <= start.locked().keys()


@pytest.mark.parametrize(
    ("rule", "wanted", "met", "unmet"),
    [
        ("==", "2.60.0", ["2.60.0", "2.60"], ["2.59.9", "2.60.1", "2.61.0"]),
        ("~=", "2.0.0", ["2.0.0", "2.0.7"], ["1.9.9", "2.1.0", "3.0.0"]),
        ("~=", "26.0", ["26.0.1", "26.9"], ["25.0", "27.0"]),
        (">=", "2.11", ["2.11.0+cu130", "2.12", "3.0"], ["2.9.1", "2.2"]),
    ],
)  # fmt: skip
def test_a_rule_is_the_one_that_pip_knows(rule: str, wanted: str, met: list[str], unmet: list[str]) -> None:
    from packaging.specifiers import SpecifierSet

    asked = Requirement("torch", rule, wanted)
    assert [asked.met(version) for version in met + unmet] == [True] * len(met) + [False] * len(unmet)
    assert [version in SpecifierSet(rule + wanted) for version in met + unmet] == [asked.met(v) for v in met + unmet]


def test_a_version_is_too_old_only_where_it_is_older() -> None:
    asked = Requirement("ray", "==", "2.60.0")
    assert asked.new_enough("2.61.0")
    assert not asked.new_enough("2.9.3")
