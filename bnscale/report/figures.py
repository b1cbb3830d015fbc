"""Figures as the papers draw them: each is a query and a function that draws its answer.

The drawing functions (`curves`, `panels`, `bands`, `histograms`, `bars`, `heatmaps`) take names of columns and return
what draws them. A cell without a reading is a gap, never a zero, and so is on a log axis what is not above 0.
Shares in [0, 1] are drawn as per cent where `unit` is `%`.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bnscale.report.claims import Standing
from bnscale.report.heat import MISSING, Ruler, colour_bar, range_of_colours
from bnscale.report.look import (
    BLUE,
    GREEN,
    GREY,
    GROUND,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RULE,
    SKY,
    VERMILION,
    WIDTH,
    Scale,
    abreast,
    abreast_of,
    along_axis,
    foot,
    frame,
    limits,
    log_ticks,
    look,
    multiples,
    name_ends,
    positive,
    say_absent,
    short,
    tick_each,
    tilt_if_crowded,
)
from bnscale.report.table import Series, Table, alone, in_order, number, on_grid, one_row_a_cell, outline, whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist

    from bnscale.query import Answer

__all__ = [
    "BLUE", "GREEN", "GREY", "GROUND", "INK", "MUTED", "ORANGE", "PURPLE", "RULE", "SKY", "VERMILION",
    "Along", "Figure", "PaperPoint", "Scale", "Series",
    "bands", "bars", "curves", "heatmaps", "histograms", "panels", "png", "render", "svg",
]  # fmt: skip


class Along(Enum):
    """What the x axis is."""

    GRID = "an axis of the study: each value is a cell, and a cell that one series lacks is a gap"
    TIME = "time or layers: many readings in a row, drawn without markers"


@dataclass(frozen=True)
class PaperPoint:
    """A number of the paper, drawn hollow beside ours."""

    series: Any
    x: Any  # a number; of bars, the group
    y: float  # in the unit of the y column
    standing: Standing
    panel: Any = None  # value of the panel column; None: only figures without panels draw it


@dataclass(frozen=True)
class Figure:
    title: str
    query: str  # name in the study's .sql file, and of the files beside the report
    caption: str
    draw: Callable[[Sheet, Answer], None]
    source: str  # "Frankle et al. 2021, figure 2"


def render(figure: Figure, answer: Answer, run: str) -> Sheet:
    """Draws the answer. Without a single reading the sheet says what to run."""
    with matplotlib.rc_context(look("")):
        sheet = Sheet(figsize=(WIDTH, 4.0), layout="constrained", facecolor=GROUND)
        if answer.rows:
            figure.draw(sheet, answer)
        if not any(axes.has_data() for axes in sheet.axes):
            sheet.clear()
            sheet.set_size_inches(WIDTH, 1.6)
            sheet.text(0.5, 0.58, "no data yet", ha="center", va="bottom", fontsize=13, color=MUTED)
            sheet.text(0.5, 0.48, f"run:  {run}", ha="center", va="top", fontsize=8.5, color=MUTED, wrap=True)
        return sheet


def png(sheet: Sheet) -> bytes:
    """300 dots an inch."""
    file = io.BytesIO()
    with matplotlib.rc_context(look("")):
        sheet.savefig(file, format="png", dpi=300, metadata={"Software": None})
    return file.getvalue()


def svg(sheet: Sheet, name: str) -> str:
    """Text is drawn as paths, so it looks the same everywhere. Same answer and name: same bytes."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(look(name)):
        sheet.savefig(file, format="svg", metadata=nothing)
    return file.getvalue()


# --- drawing functions ---------------------------------------------------------------------------


def curves(
    *,
    x: str,
    y: str,
    series: str,
    styles: Sequence[Series],
    xlabel: str,
    ylabel: str,
    unit: str,
    scale: Scale,
    along: Along,
    low: str | None = None,
    high: str | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
    paper: Sequence[PaperPoint] = (),
    chance: float | None = None,
    diverged: str | None = None,
    yscale: Scale = Scale.LINEAR,
) -> Callable[[Sheet, Answer], None]:
    """One line a series, named at its right end, with a band `low` to `high` and the paper's points hollow beside it.

    `diverged` is a column with the share of trials that diverged; where it is above 0 a cross stands at the foot.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (x, y, series, low, high, diverged))
        if not table.readings(y):
            return
        axes = sheet.add_subplot()
        frame(axes, unit, xlabel, ylabel, yscale)
        axes.set_xscale(scale.value)
        styled = table.styled(series, styles)
        points = [point for point in paper if point.panel is None]
        every_x = np.unique(table.places(x))
        drawn_x = every_x[np.isfinite(positive(every_x, scale))]
        room = 72 * WIDTH - 80 - 5 * max(len(style.label) for style in styles or styled)  # points, of the x axis
        tight = False
        if along is Along.GRID:  # the axis holds each x, also those of which there is no reading but that it diverged
            axes.update_datalim([(place, 1) for place in drawn_x], updatey=False)
            axes.autoscale_view()
            tight = bool((np.diff(along_axis(axes, drawn_x, room)) < 30).any())
        ends: list[tuple[float, str, str]] = []  # y of the last point, label, colour
        crosses: Counter[float] = Counter()  # at each x, one above the other

        for style in styled:
            own = table.where(series, style.key)
            at, value, bottom, top = _columns(own, x, y, low, high, scale, yscale)
            one_row_a_cell(at, answer, x, series, style.key)
            lost = own.numbers(diverged) if diverged else np.zeros_like(value)
            if along is Along.GRID:
                at, value, bottom, top, lost = on_grid(every_x, at, value, bottom, top, lost)
            else:
                at, value, bottom, top, lost = (column[np.argsort(at)] for column in (at, value, bottom, top, lost))
            _line(axes, at, value, bottom, top, style.colour, along)
            for where in np.flatnonzero(lost > 0):
                axes.annotate(
                    f"× {100 * lost[where]:.0f} %", (at[where], 0), (0, 3 + (29 if tight else 9) * crosses[at[where]]),
                    xycoords=("data", "axes fraction"), textcoords="offset points", color=style.colour, fontsize=7.5,
                    ha="center", va="bottom", zorder=6, rotation=90 if tight else 0,
                )  # fmt: skip
                crosses[at[where]] += 1
            finite = np.flatnonzero(np.isfinite(value))
            if len(finite):
                ends.append((float(value[finite[-1]]), style.label, style.colour))

        standings = _paper(axes, points, table.styled(series, styles, also=[p.series for p in points]), ends)
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=0.9, dashes=(1, 2), zorder=1)
        if scale is Scale.LOG:
            log_ticks(axes.xaxis)
        limits(axes, unit, ylim, [*table.every(y, low, high), *(point.y for point in points)])
        if along is Along.GRID and len(every_x) <= (40 if scale is Scale.LOG else 12):
            tick_each(axes, sorted({*drawn_x, *(point.x for point in points)}), room)
        name_ends(axes, ends)
        band = _band(low, high) if low is not None and high is not None and table.readings(low) else ""
        _legend(axes, along, band, standings, chance, bool(crosses))
        say_absent(sheet, [s.label for s in styles if s.key not in {t.key for t in styled}])

    return draw


def panels(
    *,
    x: str,
    y: str,
    series: str,
    styles: Sequence[Series],
    panel: str,
    xlabel: str,
    ylabel: str,
    unit: str,
    xscale: Scale,
    yscale: Scale,
    panel_title: str = "{}",
    low: str | None = None,
    high: str | None = None,
    level: float | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
    paper: Sequence[PaperPoint] = (),
) -> Callable[[Sheet, Answer], None]:
    """Small multiples of curves on a common y axis, one for each value of the column `panel` as it first appears.

    One line a series along x, with a light band `low` to `high` and the paper's points of that panel hollow beside it;
    `level` is a dashed line across. The axes cut off what is beyond `ylim`, +inf too, and the line leads there.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (x, y, series, panel, low, high))
        if not table.readings(y):
            return
        points = [point for point in paper if point.panel is not None]
        values = list(dict.fromkeys([*table.values(panel), *(point.panel for point in points)]))
        styled = table.styled(series, styles, also=[point.series for point in points])
        titles = [panel_title.format(value) for value in values]
        shown = multiples(sheet, titles, abreast_of(len(values)), 2.1, "all")
        for (axes, leftmost, lowest), value in zip(shown, values, strict=True):
            frame(axes, unit, xlabel if lowest else "", ylabel if leftmost else "", yscale)
            axes.set_xscale(xscale.value)
            axes.set_autoscaley_on(ylim == (None, None))  # what the axes cut off may be too far to scale to
            part = table.where(panel, value)
            for style in styled:
                own = part.where(series, style.key)
                at, height, bottom, top = _columns(own, x, y, low, high, xscale, yscale)
                one_row_a_cell(at, answer, x, series, style.key)
                if ylim[1] is not None:  # far above; how steep a line to +inf is nobody knows
                    far = ylim[1] * 1e30 if yscale is Scale.LOG else ylim[1] + 1e6 * (abs(ylim[1]) + 1)
                    height = np.where(own.overflows(y) & np.isfinite(positive(at, xscale)), far, height)
                order = np.argsort(at)
                _line(axes, at[order], height[order], bottom[order], top[order], style.colour, Along.TIME)
            _paper(axes, [point for point in points if point.panel == value], styled, [])
            if level is not None:
                axes.axhline(level, color=MUTED, linewidth=0.9, dashes=(5, 3), zorder=1)
            if xscale is Scale.LOG:
                log_ticks(axes.xaxis)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole(table.numbers(x))))
        readings = [*table.every(y, low, high), *(point.y for point in points), math.nan if level is None else level]
        limits(shown[0].axes, unit, ylim, readings)
        keys: list[Artist] = [Line2D([], [], color=style.colour, linewidth=2, label=style.label) for style in styled]
        if low and high and table.readings(low):
            keys.append(Patch(color=GREY, alpha=0.35, linewidth=0, label=f"{low} to {high}"))
        keys += _paper_keys({point.standing for point in points}, line="--")
        sheet.legend(handles=keys, loc="outside upper center", ncols=abreast(keys))
        there = {row[series] for row in table.rows}
        say_absent(sheet, [style.label for style in styles if style.key not in there])

    return draw


def bands(
    *,
    x: str,
    quantiles: tuple[str, str, str, str, str],
    series: str,
    styles: Sequence[Series],
    panel: str,
    panel_title: str,
    xlabel: str,
    ylabel: str,
    unit: str,
) -> Callable[[Sheet, Answer], None]:
    """A distribution along x from five columns: median line, middle half filled, the outermost two as thin lines.

    One panel for each value of the column `panel`; `panel_title` is a template, `"ResNet-{}"`.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (x, *quantiles, series, panel))
        if not table.readings(quantiles[2]):
            return
        styled = table.styled(series, styles)
        for axes, part in _parts(sheet, table, panel, panel_title, unit, xlabel, ylabel, Scale.LINEAR):
            for style in styled:
                own = part.where(series, style.key)
                at = own.places(x)
                one_row_a_cell(at, answer, x, series, style.key)
                order = np.argsort(at)
                first, lower, middle, upper, last = (own.numbers(name)[order] for name in quantiles)
                at = at[order]
                axes.fill_between(at, lower, upper, color=style.colour, alpha=0.22, linewidth=0)
                for edge in (first, last):
                    axes.plot(at, edge, color=style.colour, linewidth=0.8, alpha=0.7)
                axes.plot(at, middle, color=style.colour, linewidth=1.5)
                lone = alone(middle)
                axes.plot(at[lone], middle[lone], "o", color=style.colour, markersize=4)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole(table.numbers(x))))
        keys: list[Artist] = [Line2D([], [], color=style.colour, linewidth=2, label=style.label) for style in styled]
        keys += [
            Line2D([], [], color=INK, linewidth=1.5, label="median"),
            Patch(color=GREY, alpha=0.35, linewidth=0, label="middle half"),
            Line2D([], [], color=GREY, linewidth=0.8, label=f"{quantiles[0]} and {quantiles[-1]}"),
        ]
        sheet.legend(handles=keys, loc="outside upper center", ncols=abreast(keys))

    return draw


def histograms(
    *,
    left: str,
    right: str,
    share: str,
    series: str,
    styles: Sequence[Series],
    panel: str,
    panel_title: str,
    xlabel: str,
    ylabel: str,
    mark: float | None = None,
    yscale: Scale = Scale.LINEAR,
) -> Callable[[Sheet, Answer], None]:
    """Binned distributions: a row is one bin from `left` to `right` with its share of the whole, in [0, 1].

    `mark` draws a vertical line, such as the threshold below which a gamma counts as dead.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (left, right, share, series, panel))
        if not table.readings(share):
            return
        styled = table.styled(series, styles)
        base = foot(table.numbers(share), yscale)
        for axes, part in _parts(sheet, table, panel, panel_title, "%", xlabel, ylabel, yscale):
            for style in styled:
                own = part.where(series, style.key)
                begin, end, height = own.places(left), own.places(right), own.numbers(share)
                one_row_a_cell(begin, answer, left, series, style.key)
                order = np.argsort(begin)
                begin, end, height = begin[order], end[order], height[order]
                known = np.isfinite(positive(height, yscale))
                axes.bar(
                    begin[known], height[known] - base, (end - begin)[known], base, align="edge", color=style.colour,
                    alpha=0.25, linewidth=0,
                )  # fmt: skip
                outline_x, outline_y = outline(begin, end, height)
                axes.plot(outline_x, outline_y, color=style.colour, linewidth=1.3)
            if mark is not None:
                axes.axvline(mark, color=MUTED, linewidth=0.9, dashes=(1, 2))
            axes.xaxis.set_major_locator(MaxNLocator(5))
        for axes in sheet.axes:  # once all are drawn: the panels share an axis, and it must hold the highest of them
            axes.set_ylim(bottom=base)
        keys: list[Artist] = [Line2D([], [], color=style.colour, linewidth=2.5, label=style.label) for style in styled]
        sheet.legend(handles=keys, loc="outside upper center", ncols=abreast(keys))

    return draw


def bars(
    *,
    x: str,
    y: str,
    series: str,
    styles: Sequence[Series],
    xlabel: str,
    ylabel: str,
    unit: str,
    low: str | None = None,
    high: str | None = None,
    paper: Sequence[PaperPoint] = (),
    yscale: Scale = Scale.LINEAR,
) -> Callable[[Sheet, Answer], None]:
    """Groups of bars, one bar a series, `low` to `high` a whisker. A cell without a reading says so.

    Bars begin at zero, on a log axis at its foot. Groups that are numbers are sorted, text stands as it first appears.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (x, y, series, low, high))
        if not table.readings(y):
            return
        axes = sheet.add_subplot()
        frame(axes, unit, xlabel, ylabel, yscale)
        points = [point for point in paper if point.panel is None]
        groups = in_order([*table.values(x), *(point.x for point in points)])
        styled = table.styled(series, styles)
        width = 0.8 / len(styled)
        base = foot([*table.every(y, low), *(point.y for point in points)], yscale)
        for order, style in enumerate(styled):
            rows = table.where(series, style.key).rows
            one_row_a_cell([row[x] for row in rows], answer, x, series, style.key)
            own = {row[x]: row for row in rows}
            for index, group in enumerate(groups):
                at = index + (order - (len(styled) - 1) / 2) * width
                row = own.get(group, {})
                value = number(row.get(y))
                if math.isnan(value) or (yscale is Scale.LOG and value <= 0):
                    said = " no data" if math.isnan(value) else f" {short(value)}"
                    axes.text(at, base, said, rotation=90, fontsize=7, color=MUTED, ha="center", va="bottom")
                else:
                    axes.bar(at, value - base, width * 0.88, base, color=style.colour, linewidth=0)
                ends = (number(row.get(low)), number(row.get(high))) if low and high else (math.nan, math.nan)
                if all(map(math.isfinite, ends)):
                    axes.vlines(at, *ends, color=INK, linewidth=1)
                for point in points:
                    if point.series == style.key and point.x == group:
                        axes.plot(
                            at, point.y, _MARKERS[point.standing], color=INK, markerfacecolor=GROUND, markersize=5
                        )
        texts = [str(group) for group in groups]
        axes.set_xticks(range(len(groups)), texts)
        tilt_if_crowded(axes, texts, 72 * WIDTH - 60)
        if yscale is Scale.LOG:
            axes.set_ylim(bottom=base)
        axes.axhline(base, color=INK, linewidth=0.8)
        keys: list[Artist] = [Patch(color=style.colour, linewidth=0, label=style.label) for style in styled]
        if low and table.readings(low):
            keys.append(Line2D([], [], color=INK, linewidth=1, label="interval"))
        keys += _paper_keys({point.standing for point in points}, line="")
        sheet.legend(handles=keys, loc="outside upper center", ncols=abreast(keys))
        say_absent(sheet, [s.label for s in styles if s.key not in {t.key for t in styled}])

    return draw


def heatmaps(
    *,
    x: str,
    y: str,
    value: str,
    panel: str,
    xlabel: str,
    ylabel: str,
    label: str,
    panel_title: str = "{}",
    across: int = 2,
) -> Callable[[Sheet, Answer], None]:
    """One image for each value of the column `panel` as it first appears, `across` in a row; y grows downwards.

    Each has its own colours and bar: from -m to m where a reading is negative, m the greatest magnitude; else from 0,
    or from the least reading where that is over half of the greatest. A cell without a finite reading is hatched.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (x, y, value, panel))
        if not table.readings(value):
            return
        values = table.values(panel)
        shown = multiples(sheet, [panel_title.format(each) for each in values], across, 2.0, "none")
        gaps = False
        for index, ((axes, leftmost, lowest), key) in enumerate(zip(shown, values, strict=True)):
            own = table.where(panel, key)
            one_row_a_cell(zip(own.places(x), own.places(y), strict=True), answer, f"{x}, {y}", panel, key)
            columns, rows = Ruler(own.places(x)), Ruler(own.places(y))
            cells = np.full((rows.count, columns.count), np.nan)
            cells[rows.index(own.places(y)), columns.index(own.places(x))] = own.numbers(value)
            gaps |= not np.isfinite(cells).all()
            axes.patch.set(**MISSING)
            least, most, colours = range_of_colours(cells)
            image = axes.imshow(
                np.ma.masked_invalid(cells), cmap=colours, vmin=least, vmax=most, aspect="auto", interpolation="none",
                extent=(*columns.edges, *reversed(rows.edges)), gid=f"cells-{index}",
            )  # fmt: skip
            axes.set(xlabel=xlabel if lowest else "", ylabel=ylabel if leftmost else "")
            columns.tick(axes.xaxis)
            rows.tick(axes.yaxis)
            if np.isfinite(cells).any():
                last = index % across == across - 1 or index == len(shown) - 1
                colour_bar(axes, image, label if last else "", min(across, len(shown)), f"bar-{index}")
        if gaps:
            sheet.legend(handles=[Patch(**MISSING, label="no reading")], loc="outside upper right")

    return draw


# --- ours and the paper's ---------------------------------------------------------------------------


def _columns(
    table: Table, x: str, y: str, low: str | None, high: str | None, xscale: Scale, yscale: Scale
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places, readings and both ends of their band. What a log axis has no place for is NaN, but where only the lower
    end of a band is not above 0 the band goes on to the foot of the axes."""
    at = table.places(x)
    off = np.isnan(positive(at, xscale))
    value = positive(table.numbers(y), yscale)
    bottom = table.numbers(low) if low else np.full_like(at, np.nan)
    top = positive(table.numbers(high), yscale) if high else np.full_like(at, np.nan)
    value[off] = bottom[off] = top[off] = np.nan
    return at, value, bottom, top


def _line(
    axes: Axes, at: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, along: Along
) -> None:
    """One series: its band, its line, and markers on a grid or where a reading stands alone."""
    has_band = np.isfinite(low) & np.isfinite(high)
    if has_band.any():
        axes.fill_between(at, low, high, where=has_band, color=colour, alpha=0.16, linewidth=0, zorder=2)
    if along is Along.GRID:
        axes.vlines(at[has_band], low[has_band], high[has_band], colour, linewidth=1, alpha=0.8, zorder=3)
    marked = alone(value) if along is Along.TIME else np.ones_like(value, dtype=bool)
    axes.plot(at, value, color=colour, linewidth=1.7, zorder=4)
    axes.plot(
        at[marked], value[marked], "o", color=colour, markersize=4.6, zorder=5, markeredgecolor=GROUND,
        markeredgewidth=0.6,
    )  # fmt: skip


def _parts(
    sheet: Sheet, table: Table, column: str, title: str, unit: str, xlabel: str, ylabel: str, yscale: Scale
) -> list[tuple[Axes, Table]]:
    """Small multiples of distributions on a common y axis."""
    values = in_order(table.values(column))
    shown = multiples(sheet, [title.format(value) for value in values], abreast_of(len(values)), 2.1, "all")
    for axes, leftmost, lowest in shown:
        frame(axes, unit, xlabel if lowest else "", ylabel if leftmost else "", yscale)
    return [(each.axes, table.where(column, value)) for each, value in zip(shown, values, strict=True)]


# Round where the paper says it, a diamond where it is only near what the paper says.
_MARKERS = {
    Standing.FOUND: "o",
    Standing.CODE: "s",
    Standing.DIGITISED: "D",
    Standing.MEMORY: "^",
    Standing.INFERRED: "v",
}


def _paper(
    axes: Axes, paper: Sequence[PaperPoint], styled: list[Series], ends: list[tuple[float, str, str]]
) -> set[Standing]:
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
                point.x, point.y, _MARKERS[point.standing], color=style.colour, markerfacecolor=GROUND,
                markeredgewidth=1.1, markersize=4.6 if point.standing != Standing.DIGITISED else 4, zorder=3.4,
            )  # fmt: skip
        if style.label not in {label for _, label, _ in ends}:
            ends.append((points[-1].y, style.label, style.colour))
    return {point.standing for point in paper}


def _paper_keys(standings: set[Standing], line: Literal["", "--"]) -> list[Artist]:
    return [
        Line2D(
            [], [], color=MUTED, linestyle=line, linewidth=1, marker=_MARKERS[standing], markersize=4.6,
            markerfacecolor=GROUND, label=f"paper ({Standing(standing).mark})",
        )
        for standing in Standing
        if standing in standings
    ]  # fmt: skip


def _band(low: str, high: str) -> str:
    """What a band is, by its columns: `low` to `high` is an interval, and `minimum` to `maximum` is none."""
    return "interval over seeds" if low.endswith("low") else f"{low} to {high} over seeds".replace("_", " ")


def _legend(axes: Axes, along: Along, band: str, standings: set[Standing], chance: float | None, crosses: bool) -> None:
    """What is ours and what is the paper's; which series is which stands at the lines themselves."""
    marker = "o" if along is Along.GRID else ""
    ours = f"measured, with {band}" if band else "measured"
    keys: list[Artist] = [Line2D([], [], color=MUTED, linewidth=1.7, marker=marker, markersize=4.6, label=ours)]
    keys += _paper_keys(standings, line="--")
    if chance is not None:
        keys.append(Line2D([], [], color=MUTED, linewidth=0.9, dashes=(1, 2), label="chance"))
    if crosses:
        keys.append(Line2D([], [], color=MUTED, linestyle="", marker="x", markersize=4.6, label="share diverged"))
    if len(keys) > 1 or band:
        figure = axes.get_figure()
        assert figure is not None
        figure.legend(handles=keys, loc="outside upper left", ncols=abreast(keys), columnspacing=1.6)
