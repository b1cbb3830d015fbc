"""Ridges: small binned distributions stacked one behind the other, as in a joy plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import FixedFormatter, FixedLocator

from bnscale.report.look import GROUND
from bnscale.report.table import Series, outline
from bnscale.trial import Refusal

HELD = 0.999  # share of every ridge that lies within the x axis
TALLEST = 2.4  # height of a panel's tallest ridge, where 1 is from one ridge to the next


@dataclass(frozen=True)
class Ridge:
    """One binned distribution: bins from left to right."""

    begin: np.ndarray
    end: np.ndarray
    share: np.ndarray  # of the whole, in [0, 1]; NaN where there is no reading

    @classmethod
    def of(cls, begin: np.ndarray, end: np.ndarray, share: np.ndarray, column: str) -> Ridge:
        """`column` names the right ends. Raises `Refusal` where a bin ends before it begins."""
        if (end < begin).any():
            first = int(np.flatnonzero(end < begin)[0])
            raise Refusal(
                f"column {column}: a bin from {begin[first]:g} to {end[first]:g} ends before it begins; "
                "swap the two columns of the query"
            )
        order = np.argsort(begin)
        return cls(begin[order], end[order], share[order])

    @property
    def density(self) -> np.ndarray:
        """Share per unit of x; NaN for a bin without width, which has none."""
        width = self.end - self.begin
        return np.divide(self.share, width, out=np.full_like(width, np.nan), where=width > 0)

    @property
    def peak(self) -> float:
        """The greatest density; 0 where there is none."""
        return float(np.max(self.density, initial=0.0, where=np.isfinite(self.density)))

    @property
    def points(self) -> np.ndarray:
        """Where all of a bin without width lies, if it has a share."""
        return self.begin[(self.end == self.begin) & (self.share > 0)]

    @property
    def held(self) -> tuple[float, float]:
        """Where the middle `HELD` of what was read lies, a bin's share evenly spread over it; NaN where there is
        nothing."""
        mass = np.nancumsum(self.share)
        if not len(mass) or not mass[-1] > 0:
            return math.nan, math.nan
        edges = np.column_stack([self.begin, self.end]).ravel()
        below = np.column_stack([mass - np.nan_to_num(self.share), mass]).ravel() / mass[-1]
        outside = (1 - HELD) / 2
        return float(np.interp(outside, below, edges)), float(np.interp(1 - outside, below, edges))

    def top(self, height: float) -> float:
        """Above its foot, in rows."""
        return TALLEST if len(self.points) else height * self.peak

    def outlines(self, foot: float, height: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Closed outlines, standing on `foot`, of the bins side by side, `height` for each unit of density."""
        xs, ys = outline(self.begin, self.end, self.density)
        runs = np.flatnonzero(np.diff(np.concatenate([[False], np.isfinite(ys), [False]])))
        closed: list[tuple[np.ndarray, np.ndarray]] = []
        for first, last in zip(runs[::2], runs[1::2], strict=True):
            x, y = xs[first:last], ys[first:last]
            corner = np.ones(len(x), dtype=bool)  # a point between two of its height says nothing
            corner[1:-1] = (y[1:-1] != y[:-2]) | (y[1:-1] != y[2:])
            x, y = x[corner], y[corner]
            closed.append((np.array([x[0], *x, x[-1]]), foot + height * np.array([0.0, *y, 0.0])))
        return closed

    def draw(self, axes: Axes, foot: float, height: float, style: Series, face: Any) -> None:
        """The filled outline, and a line for each bin without width, as tall as the panel's tallest ridge."""
        for x, y in self.outlines(foot, height):
            axes.fill(x, y, facecolor=face, edgecolor=style.colour, linewidth=0.8, joinstyle="round", zorder=2)
        if len(self.points):
            axes.vlines(self.points, foot, foot + TALLEST, style.colour, linewidth=1.2, zorder=2)


def common_range(ridges: Iterable[Ridge]) -> tuple[float, float]:
    """An x axis that holds `HELD` of every ridge, with a margin; what lies outside it is cut off."""
    ends = np.array([ridge.held for ridge in ridges])
    if not np.isfinite(ends).any():
        return 0.0, 1.0
    low, high = float(np.nanmin(ends[:, 0])), float(np.nanmax(ends[:, 1]))
    margin = 0.02 * (high - low) or 0.05 * abs(low) or 1.0
    return low - margin, high + margin


def ridge_height(ridges: Iterable[Ridge]) -> float:
    """Of a unit of density, in rows, such that the tallest ridge is `TALLEST`; 1 where there is none."""
    return TALLEST / (max((ridge.peak for ridge in ridges), default=0.0) or TALLEST)


def face(colour: str, several: int) -> Any:
    """How a ridge is filled: where it stands alone so that it hides what is behind it, among others translucent."""
    if several > 1:
        return (*to_rgb(colour), 0.35)
    return tuple(0.45 * own + 0.55 * ground for own, ground in zip(to_rgb(colour), to_rgb(GROUND), strict=True))


def tick_rows(axes: Axes, feet: Sequence[float], texts: Sequence[str], points: float) -> None:
    """A tick at the foot of every ridge, and a label at each, each second, fifth or tenth ... one, as many as fit on
    a y axis `points` tall."""
    low, high = axes.get_ylim()
    apart = points / (high - low)  # points from one ridge to the next
    every = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power * apart >= 10.5)
    axes.yaxis.set_major_locator(FixedLocator(list(feet)))
    axes.yaxis.set_major_formatter(FixedFormatter([text * (row % every == 0) for row, text in enumerate(texts)]))


def ridge_abreast(count: int) -> int:
    """How many panels of ridges stand in a row: they are narrow, and to be compared side by side."""
    return 4 if count in (4, 7, 8) or count > 9 else min(count, 3)
