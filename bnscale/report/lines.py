"""Lines over an x axis: a series with its band, where it leaves the axes, and the paper's points beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from bnscale.report.claims import Standing
from bnscale.report.look import GROUND, MUTED, Scale, abreast, positive
from bnscale.report.table import Series, Table, alone

if TYPE_CHECKING:
    from matplotlib.artist import Artist


class Along(Enum):
    """What the x axis is."""

    GRID = "an axis of the study: each value is a cell, and a cell that one series lacks is a gap"
    OWN = "something counted: each series has places of its own, and its line leads from one to the next"
    TIME = "time or layers: many readings in a row, drawn without markers"


@dataclass(frozen=True)
class PaperPoint:
    """A number of the paper, drawn hollow beside ours."""

    series: Any
    x: Any  # a number; of bars, the group
    y: float  # in the unit of the y column
    standing: Standing
    panel: Any = None  # value of the panel column; None: only figures without panels draw it


# --- ours ----------------------------------------------------------------------------------------


def values_along(
    table: Table, x: str, y: str, low: str | None, high: str | None, xscale: Scale, yscale: Scale
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places, readings and both ends of their band, +inf where they overflowed. What a log axis has no place for is
    NaN, but where only the lower end of a band is not above 0 the band goes on to the foot of the axes."""
    at = table.places(x)
    off = np.isnan(positive(at, xscale))
    value = positive(table.heights(y), yscale)
    bottom = table.heights(low) if low else np.full_like(at, np.nan)
    top = positive(table.heights(high), yscale) if high else np.full_like(at, np.nan)
    value[off] = bottom[off] = top[off] = np.nan
    return at, value, bottom, top


def on_axis(table: Table, x: str, xscale: Scale, *columns: str | None) -> np.ndarray:
    """The numbers of several columns in a row, of what has a place along x."""
    there = np.isfinite(positive(table.places(x), xscale))
    return np.concatenate([table.numbers(name)[there] for name in columns if name is not None])


def line(
    axes: Axes, at: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, along: Along
) -> None:
    """One series: its band, its line, and a marker at each reading; of many in a row only where one stands alone.

    The y axis must have its limits: +inf is drawn as what leaves them, the line and the band lead there.
    """
    finite = np.isfinite(value)
    value, low, high = (cut_off(axes, column) for column in (value, low, high))
    has_band = np.isfinite(low) & np.isfinite(high)
    if has_band.any():
        axes.fill_between(at, low, high, where=has_band, color=colour, alpha=0.22, linewidth=0, zorder=2)
    if along is not Along.TIME:
        axes.vlines(at[has_band], low[has_band], high[has_band], colour, linewidth=1, alpha=0.8, zorder=3)
    marked = finite & (alone(value) if along is Along.TIME else True)
    axes.plot(at, value, color=colour, linewidth=1.7, zorder=4)
    axes.plot(
        at[marked], value[marked], "o", color=colour, markersize=4.6, zorder=5, markeredgecolor=GROUND,
        markeredgewidth=0.6,
    )  # fmt: skip


def cut_off(axes: Axes, heights: np.ndarray) -> np.ndarray:
    """+inf becomes a height just above the top of the axes, which cut it off."""
    scale = axes.yaxis.get_transform()
    low, top = scale.transform(np.array(axes.get_ylim()))
    above = float(scale.inverted().transform(np.array([top + 0.03 * (top - low)]))[0])
    return np.where(heights == np.inf, above, heights)


_TRIANGLE = 5.0  # points


def overflowed(axes: Axes, places: Sequence[tuple[str, np.ndarray]]) -> bool:
    """A triangle of each colour at the top edge wherever a reading is +inf; where there are several at one place, one
    below the other. The y axis must have its limits. Says whether there was any."""
    sheet = axes.get_figure(root=True)
    assert sheet is not None
    stacked: Counter[float] = Counter()
    for colour, at in places:
        level = np.array([stacked[place] for place in at])
        stacked.update(at)
        for down in np.unique(level):
            here = at[level == down]
            axes.update_datalim(np.column_stack([here, here]), updatey=False)
            below = ScaledTranslation(0, -down * _TRIANGLE / 72, sheet.dpi_scale_trans)
            axes.plot(
                here, np.ones_like(here), "^", transform=axes.get_xaxis_transform() + below, color=colour,
                markersize=_TRIANGLE, markeredgewidth=0, clip_on=False, zorder=6,
            )  # fmt: skip
    axes.autoscale_view(scaley=False)
    return bool(stacked)


def overflow_keys(there: Sequence[bool]) -> list[Artist]:
    """What the triangles say, if any panel has one."""
    words = "overflowed: infinite"
    key = Line2D([], [], color=MUTED, linestyle="", marker="^", markersize=_TRIANGLE, markeredgewidth=0, label=words)
    return [key] if any(there) else []


def what_band(low: str, high: str) -> str:
    """What a band is, by its columns: `low` to `high` is an interval, and `minimum` to `maximum` is none."""
    return "interval over seeds" if low.endswith("low") else f"{low} to {high} over seeds".replace("_", " ")


def legend(axes: Axes, along: Along, band: str, others: Sequence[Artist]) -> None:
    """What is ours and what is not; which series is which stands at the lines themselves."""
    marker = "" if along is Along.TIME else "o"
    ours = f"measured, with {band}" if band else "measured"
    keys: list[Artist] = [Line2D([], [], color=MUTED, linewidth=1.7, marker=marker, markersize=4.6, label=ours)]
    keys += others
    if len(keys) > 1 or band:
        figure = axes.get_figure()
        assert figure is not None
        figure.legend(handles=keys, loc="outside upper left", ncols=abreast(keys), columnspacing=1.6)


# --- the paper's ---------------------------------------------------------------------------------

# Round where the paper says it, a diamond where it is only near what the paper says.
MARKERS = {
    Standing.FOUND: "o",
    Standing.CODE: "s",
    Standing.DIGITISED: "D",
    Standing.MEMORY: "^",
    Standing.INFERRED: "v",
}


def paper_points(
    axes: Axes, paper: Sequence[PaperPoint], styled: list[Series], ends: list[tuple[float, str, str]]
) -> None:
    """The paper's points, hollow on a dashed line; a series we have nothing of is named at its paper's end."""
    for style in styled:
        points = sorted((point for point in paper if point.series == style.key), key=lambda point: point.x)
        if not points:
            continue
        axes.plot(
            [point.x for point in points], [point.y for point in points], color=style.colour, linewidth=1,
            dashes=(4, 2.5), alpha=0.75, zorder=3.2,
        )  # fmt: skip
        for point in points:
            axes.plot(
                point.x, point.y, MARKERS[point.standing], color=style.colour, markerfacecolor=GROUND,
                markeredgewidth=1.1, markersize=4.6 if point.standing != Standing.DIGITISED else 4, zorder=3.4,
            )  # fmt: skip
        if style.label not in {label for _, label, _ in ends}:
            ends.append((points[-1].y, style.label, style.colour))


def paper_keys(paper: Sequence[PaperPoint], line: Literal["", "--"]) -> list[Artist]:
    standings = {point.standing for point in paper}
    return [
        Line2D(
            [], [], color=MUTED, linestyle=line, linewidth=1, marker=MARKERS[standing], markersize=4.6,
            markerfacecolor=GROUND, label=f"paper ({Standing(standing).mark})",
        )
        for standing in Standing
        if standing in standings
    ]  # fmt: skip
