"""docs/faults.md against the tests that are there: every row is held by one at least, and every test named exists."""

import ast
import re
from pathlib import Path

ROWS = range(1, 47)
HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs" / "faults.md"
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def collected() -> set[str]:
    """The tests of this folder with a number, as pytest finds them, without those that are always skipped."""
    found = set()
    for file in HERE.glob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and re.match(r"test_\d\d_", node.name):
                assert node.name not in found, f"{node.name} is there twice"
                if not any(ast.unparse(each).startswith("pytest.mark.skip(") for each in node.decorator_list):
                    found.add(node.name)
    return found


def test_every_fault_has_a_row_with_its_promise_and_a_test_of_its_number() -> None:
    rows = ROW.findall(TABLE.read_text())
    assert [int(number) for number, *_ in rows] == list(ROWS)
    there = collected()
    for number, fault, promise, tests in rows:
        named = re.findall(r"`(\w+)`", tests)
        assert len(fault) > 10
        assert promise.endswith((".", ")")), number
        assert named, f"row {number} names no test"
        assert set(named) <= there, f"row {number} names tests that are not there: {set(named) - there}"
        assert all(name.startswith(f"test_{int(number):02}_") for name in named), number


def test_every_test_with_a_number_has_the_number_of_a_row() -> None:
    assert {int(name[5:7]) for name in collected()} == set(ROWS)
