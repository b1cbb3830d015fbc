"""The look of figures: colours, fonts, axes, small multiples, labels that stand apart."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Sheet
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist

# Okabe and Ito's palette: told apart with every common colour vision, and on white as on black.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#8a8f98",
)  # fmt: skip
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)

# Four neutral colours that the page can exchange for its own, light or dark.
INK, MUTED, RULE, GROUND = "#1c2126", "#666d76", "#dfe2e6", "#ffffff"

WIDTH = 6.6  # inches; 475 points

FONTS = ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")  # the last comes with matplotlib


class Scale(Enum):
    LINEAR = "linear"
    LOG = "log"


def look(salt: str) -> Any:
    """Settings of matplotlib, in force only while a sheet is drawn; the salt tells the ids of SVGs apart."""
    installed = set(font_manager.fontManager.get_font_names())
    return {
        "font.family": [name for name in FONTS if name in installed],
        "font.size": 9.5,
        "axes.labelsize": 9.5,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": GROUND,
        "axes.unicode_minus": True,
        "svg.fonttype": "path",
        "svg.hashsalt": salt,
        "text.parse_math": False,  # a $ in a label from data is a $
    }


# --- axes ----------------------------------------------------------------------------------------


def frame(axes: Axes, unit: str, xlabel: str, ylabel: str, yscale: Scale) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f"{ylabel} ({unit})" if unit and ylabel else ylabel)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    if yscale is Scale.LOG:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if unit == "%":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(100 * value)))


class _Decades(LogLocator):
    """Powers of ten, with 2 and 5 between them where the axis spans fewer than two."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        self.set_params(subs=(1, 2, 5) if vmax < 100 * vmin else (1,))
        return super().tick_values(vmin, vmax)


def log_ticks(axis: Axis) -> None:
    axis.set_major_locator(_Decades())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number on an axis, at most six digits: 0.05, 250, 2e−4, 1.5e6."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.6g}"
    else:
        digits, exponent = f"{value:.2e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "−")


def positive(values: np.ndarray, scale: Scale) -> np.ndarray:
    """The values that have a place on such an axis, NaN for the others: on a log axis what is not above 0."""
    return np.where(values > 0, values, np.nan) if scale is Scale.LOG else values


def foot(values: Iterable[float], scale: Scale) -> float:
    """Where bars begin: at 0, on a log axis at a 1, 2 or 5 clearly below every one of them."""
    known = [value for value in values if value > 0]  # NaN is not
    if scale is Scale.LINEAR or not known:
        return 0.0
    below = 0.7 * min(known)
    decade = 10.0 ** math.floor(math.log10(below))
    return max(step * decade for step in (1, 2, 5) if step == 1 or step * decade <= below)


def limits(axes: Axes, unit: str, ylim: tuple[float | None, float | None], readings: Iterable[float]) -> None:
    """Sets the y axis to hold the finite ones of the readings, whatever is drawn later. Where only one end is given,
    what lies beyond it has no say in the other. An axis that nothing says the extent of has no numbers."""
    known = np.array([value for value in readings if math.isfinite(value)])
    given = [end for end in ylim if end is not None]
    if given:
        known = np.clip(known, *ylim)
    axes.update_datalim(np.column_stack([known, known]), updatex=False)
    axes.autoscale_view(scalex=False)
    low, high = axes.get_ylim()
    if len(given) < 2 and not len(known):
        axes.yaxis.set_major_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
    elif len(given) == 1:
        scale = axes.yaxis.get_transform()
        within = np.append(known, given)
        at = scale.transform(within[within > 0] if axes.get_yscale() == "log" else within)
        margin = 0.05 * np.ptp(at)
        if margin:
            low, high = scale.inverted().transform([at.min() - margin, at.max() + margin])
    if unit == "%":  # a margin beyond what a share can be says nothing
        low, high = max(low, 0.0), min(high, 1.0)
    axes.set_ylim(low if ylim[0] is None else ylim[0], high if ylim[1] is None else ylim[1])


_LETTER = 5.0  # points; the advance of a digit at 9 points, more than that of most letters


def along_axis(axes: Axes, places: Sequence[float], points: float) -> np.ndarray:
    """Where the places lie on an x axis `points` wide, in points from its left end."""
    scale = axes.xaxis.get_transform()
    left, right = scale.transform(np.array(axes.get_xlim()))
    at: np.ndarray = (scale.transform(np.array(places, dtype=float)) - left) / (right - left) * points
    return at


def tick_each(axes: Axes, places: Sequence[float], points: float) -> None:
    """A tick at each place of an x axis `points` wide, and a label where there is room: powers of ten come first."""
    at = along_axis(axes, places, points)
    texts = [short(place) for place in places]
    round_ones = [not math.log10(place) % 1 if place > 0 and axes.get_xscale() == "log" else False for place in places]
    labelled: list[int] = []
    for index in sorted(range(len(places)), key=lambda index: (not round_ones[index], index)):
        if all(
            abs(at[index] - at[other]) > _LETTER * (len(texts[index]) + len(texts[other])) / 2 + 3 for other in labelled
        ):
            labelled.append(index)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter([text * (i in labelled) for i, text in enumerate(texts)]))
    axes.xaxis.set_minor_locator(NullLocator())


def tilt_if_crowded(axes: Axes, texts: Sequence[str], points: float) -> None:
    """Labels of groups on an axis `points` wide lean where the widest has no room."""
    if _LETTER * (max(map(len, texts)) + 1) > points / len(texts):
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")


class Panel(NamedTuple):
    """One of the small multiples on a sheet."""

    axes: Axes
    leftmost: bool
    lowest: bool  # no other below it


def multiples(
    sheet: Sheet, titles: Sequence[str], across: int, tall: float, share: Literal["all", "none"]
) -> list[Panel]:
    """Small multiples, `tall` inches a row; `share` is what matplotlib's `sharey` says."""
    across = min(across, len(titles))
    down = math.ceil(len(titles) / across)
    sheet.set_size_inches(WIDTH, 0.9 + tall * down if len(titles) > 1 else 4.0)
    grid = sheet.subplots(down, across, sharex=False, sharey=share, squeeze=False)
    for axes in grid.flat[len(titles) :]:
        axes.remove()
    for axes, title in zip(grid.flat, titles, strict=False):
        lines = textwrap.fill(title, int(72 * (WIDTH - 0.8) / across / _LETTER))
        axes.set_title(lines, fontsize=9.5, loc="left", color=INK)
    return [
        Panel(axes, index % across == 0, index + across >= len(titles))
        for index, axes in enumerate(grid.flat[: len(titles)])
    ]


def abreast_of(count: int) -> int:
    """How many panels of curves stand in a row."""
    return 2 if count == 4 else min(count, 3)


# --- words ---------------------------------------------------------------------------------------


def abreast(keys: Sequence[Artist]) -> int:
    """How many columns of a legend fit side by side, at about 4.3 points a letter of the longest in each."""
    letters = [len(str(key.get_label())) for key in keys]
    fitting = (
        count
        for count in range(len(keys), 1, -1)
        if sum(4.3 * max(column) + 46 for column in np.array_split(letters, count)) < 72 * WIDTH
    )
    return next(fitting, 1)


def spread(heights: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """The heights, moved as little as keeps them `gap` apart, in order, and between `low` and `high` if they fit."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    blocks: list[tuple[float, int]] = []  # middle of a run of labels and how many stand in it
    for index in order:
        middle, size = max(low, min(high, heights[index])), 1
        while blocks and blocks[-1][0] + (blocks[-1][1] + size) / 2 * gap > middle:
            below, below_size = blocks.pop()
            middle = (below * below_size + middle * size) / (below_size + size)
            size += below_size
            reach = (size - 1) / 2 * gap
            middle = max(low + reach, min(high - reach, middle))
        blocks.append((middle, size))
    placed = [middle + (k - (size - 1) / 2) * gap for middle, size in blocks for k in range(size)]
    result = [0.0] * len(heights)
    for index, height in zip(order, placed, strict=True):
        result[index] = height
    return result


def name_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """The series' names right of the axes at the heights of their last points."""
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(np.array(axes.get_ylim()))
    heights = [float((scale.transform(value) - low) / (high - low)) for value, _, _ in ends]
    for height, (_, label, colour) in zip(spread(heights, gap=0.055), ends, strict=True):
        swatch = Line2D(
            [1.015, 1.04], [height] * 2, transform=axes.transAxes, color=colour, linewidth=2.4, clip_on=False
        )
        axes.add_artist(swatch)
        axes.text(1.05, height, label, transform=axes.transAxes, color=INK, fontsize=9, va="center", ha="left")


def say_absent(sheet: Sheet, labels: list[str]) -> None:
    if labels:
        sheet.supxlabel(f"not measured: {', '.join(labels)}", fontsize=8, color=MUTED, x=0.99, ha="right")
