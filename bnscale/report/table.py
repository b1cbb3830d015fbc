"""An answer as a figure reads it: columns that are there, numbers or NaN, one row a cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from bnscale.report.look import GREY, PALETTE
from bnscale.trial import Refusal, near

if TYPE_CHECKING:
    from bnscale.query import Answer


@dataclass(frozen=True)
class Series:
    """How the rows with one value of the series column are drawn."""

    key: Any  # value in the answer
    label: str
    colour: str


class Table:
    """Rows of an answer whose columns are known to be there."""

    def __init__(self, answer: Answer, columns: Sequence[str | None], rows: list[dict[str, Any]] | None = None) -> None:
        for name in columns:
            if name is not None and name not in answer.columns:
                raise Refusal(
                    f"column {name}: a figure draws it and its query lacks it{near(name, list(answer.columns))} "
                    f"It gives {', '.join(answer.columns)}; select it in the query"
                )
        self.answer = answer
        self.rows = answer.dicts() if rows is None else rows

    def where(self, column: str, value: Any) -> Table:
        return Table(self.answer, (), [row for row in self.rows if row[column] == value])

    def numbers(self, column: str) -> np.ndarray:
        """One float a row; NaN where there is no reading."""
        for row in self.rows:
            if row[column] is not None and not isinstance(row[column], int | float | Decimal):
                raise Refusal(
                    f"column {column}: {row[column]!r} is no number and cannot be drawn; cast it in the query"
                )
        return np.array([number(row[column]) for row in self.rows], dtype=float)

    def places(self, column: str) -> np.ndarray:
        """Numbers of a column in which every row has one: where to draw it."""
        numbers = self.numbers(column)
        if not np.isfinite(numbers).all():
            raise Refusal(f"column {column}: a row without it has no place in a figure; filter the query")
        return numbers

    def every(self, *columns: str | None) -> np.ndarray:
        """The numbers of several columns in a row."""
        return np.concatenate([self.numbers(name) for name in columns if name is not None])

    def readings(self, column: str) -> int:
        return int(np.isfinite(self.numbers(column)).sum()) if self.rows else 0

    def heights(self, column: str) -> np.ndarray:
        """As `numbers`, but a reading that overflowed is +inf: no number, and above every limit of an axis."""
        self.numbers(column)  # refuses what is none
        return np.array([reading(row[column]) for row in self.rows], dtype=float)

    def drawable(self, column: str) -> bool:
        """Whether there is any reading, be it infinite."""
        return bool(self.rows) and not bool(np.isnan(self.heights(column)).all())

    def values(self, column: str) -> list[Any]:
        """The distinct values that are there, in the order in which they first appear."""
        return list(dict.fromkeys(row[column] for row in self.rows if row[column] is not None))

    def rows_of(self, column: str) -> list[Any]:
        """The distinct values, in order, of a column in which every row has one: the rows of a figure."""
        if any(row[column] is None or row[column] != row[column] for row in self.rows):
            raise Refusal(f"column {column}: a row without it has no place in a figure; filter the query")
        return in_order(row[column] for row in self.rows)

    def styled(self, column: str, styles: Sequence[Series], also: Sequence[Any] = ()) -> list[Series]:
        """The series that are there, in the order of `styles`; what nobody styled comes last and is drawn too."""
        there = list(dict.fromkeys([row[column] for row in self.rows] + list(also)))
        known = {style.key for style in styles}
        free = [colour for colour in PALETTE if colour not in {style.colour for style in styles}] or [GREY]
        unstyled = [key for key in there if key not in known]
        return [style for style in styles if style.key in there] + [
            Series(key, str(key), free[index % len(free)]) for index, key in enumerate(unstyled)
        ]


def number(value: Any) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


def reading(value: Any) -> float:
    """As `number`, but +inf stays."""
    return math.inf if value == math.inf else number(value)


def one_row_a_cell(at: Iterable[Any], answer: Answer, place: str, column: str, key: Any) -> None:
    """`at` holds the places of the rows whose `column` is `key`; `place` names their columns."""
    places = list(at)
    if len(set(places)) < len(places):
        raise Refusal(
            f"columns {column}, {place}: {key} has several rows with one {place}; a figure draws one row for each; "
            f"aggregate the query that gives {', '.join(answer.columns)}"
        )


def in_order(values: Iterable[Any]) -> list[Any]:
    """The distinct values: numbers from low to high, text in the order in which it first appears."""
    there = list(dict.fromkeys(value for value in values if value is not None))
    return sorted(there) if all(isinstance(value, int | float | Decimal) for value in there) else there


def on_grid(every_x: np.ndarray, at: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    """The columns at every x of the figure, NaN where this series has no row: there its line breaks."""
    where = np.searchsorted(every_x, at)
    spread = [np.full(len(every_x), np.nan) for _ in columns]
    for wide, column in zip(spread, columns, strict=True):
        wide[where] = column
    return [every_x, *spread]


def alone(values: np.ndarray) -> np.ndarray:
    """Readings without a reading on either side: a line would not show them."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    alone: np.ndarray = known[1:-1] & ~known[:-2] & ~known[2:]
    return alone


def outline(begin: np.ndarray, end: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper edge of a histogram; it breaks where a bin is missing or has no reading."""
    xs: list[float] = []
    ys: list[float] = []
    for index in range(len(begin)):
        if index and not math.isclose(begin[index], end[index - 1], abs_tol=1e-9 * (end[-1] - begin[0])):
            xs, ys = [*xs, end[index - 1]], [*ys, math.nan]
        xs, ys = [*xs, begin[index], end[index]], [*ys, height[index], height[index]]
    return np.array(xs), np.array(ys)


def whole(values: np.ndarray) -> bool:
    return bool(np.all(np.mod(values[np.isfinite(values)], 1) == 0))
