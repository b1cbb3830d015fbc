"""Figures as the papers draw them: each is a query and a function that draws its answer.

The drawing functions (`curves`, `panels`, `bands`, `histograms`, `ridges`, `bars`, `heatmaps`) take names of columns
and return what draws them. A cell without a reading is a gap, never a zero, and so is on a log axis what is not above
0. A reading of +inf, as of a loss that overflowed, leaves the top of the axes, and a triangle stands there; a heat map,
which has no top, hatches it as a gap.
Shares in [0, 1] are drawn as per cent where `unit` is `%`.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bnscale.report.heat import MISSING, Ruler, colour_bar, range_of_colours
from bnscale.report.lines import (
    MARKERS,
    Along,
    PaperPoint,
    cut_off,
    legend,
    line,
    on_axis,
    overflow_keys,
    overflowed,
    paper_keys,
    paper_points,
    values_along,
    what_band,
)
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
from bnscale.report.ridges import Ridge, common_range, face, ridge_abreast, ridge_height, tick_rows
from bnscale.report.table import Series, Table, alone, in_order, on_grid, one_row_a_cell, outline, reading, whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist

    from bnscale.query import Answer

__all__ = [
    "BLUE", "GREEN", "GREY", "GROUND", "INK", "MUTED", "ORANGE", "PURPLE", "RULE", "SKY", "VERMILION",
    "Along", "Figure", "PaperPoint", "Scale", "Series",
    "bands", "bars", "curves", "heatmaps", "histograms", "panels", "png", "render", "ridges", "svg",
]  # fmt: skip


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
    band: str | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
    paper: Sequence[PaperPoint] = (),
    chance: float | None = None,
    diverged: str | None = None,
    yscale: Scale = Scale.LINEAR,
) -> Callable[[Sheet, Answer], None]:
    """One line a series, named at its right end, with a band `low` to `high` and the paper's points hollow beside it.

    `band` says what the band is, "interval over seeds" where nothing is said, behind "measured, with" in the legend.
    `diverged` is a column with the share of trials that diverged; where it is above 0 a cross stands at the foot.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (x, y, series, low, high, diverged))
        if not table.drawable(y):
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
        if along is not Along.TIME:  # the axis holds each x, even where all there is is that it diverged
            axes.update_datalim([(place, 1) for place in drawn_x], updatey=False)
            axes.autoscale_view()
            if scale is Scale.LOG and len({*drawn_x, *(point.x for point in points)}) == 1:
                axes.set_xlim(drawn_x[0] / 2, drawn_x[0] * 2)  # a log axis of one place has no width of its own
            tight = bool((np.diff(along_axis(axes, drawn_x, room)) < 30).any())
        known = [*on_axis(table, x, scale, y, low, high), *(point.y for point in points)]
        limits(axes, unit, ylim, known if chance is None else [*known, chance])
        ends: list[tuple[float, str, str]] = []  # y of the last point, label, colour
        infinite: list[tuple[str, np.ndarray]] = []  # colour, places
        crosses: Counter[float] = Counter()  # at each x, one above the other

        for style in styled:
            own = table.where(series, style.key)
            at, value, bottom, top = values_along(own, x, y, low, high, scale, yscale)
            one_row_a_cell(at, answer, x, series, style.key)
            lost = own.numbers(diverged) if diverged else np.zeros_like(value)
            if along is Along.GRID:
                at, value, bottom, top, lost = on_grid(every_x, at, value, bottom, top, lost)
            else:
                at, value, bottom, top, lost = (column[np.argsort(at)] for column in (at, value, bottom, top, lost))
            line(axes, at, value, bottom, top, style.colour, along)
            for where in np.flatnonzero(lost > 0):
                axes.annotate(
                    f"× {100 * lost[where]:.0f} %", (at[where], 0), (0, 3 + (29 if tight else 9) * crosses[at[where]]),
                    xycoords=("data", "axes fraction"), textcoords="offset points", color=style.colour, fontsize=7.5,
                    ha="center", va="bottom", zorder=6, rotation=90 if tight else 0,
                )  # fmt: skip
                crosses[at[where]] += 1
            known_at = np.flatnonzero(~np.isnan(value))
            if len(known_at):
                ends.append((float(value[known_at[-1]]), style.label, style.colour))
            infinite.append((style.colour, at[(value == np.inf) | (top == np.inf)]))

        paper_points(axes, points, table.styled(series, styles, also=[p.series for p in points]), ends)
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=0.9, dashes=(1, 2), zorder=1)
        if scale is Scale.LOG:
            log_ticks(axes.xaxis)
        keys = paper_keys(points, line="--")
        if chance is not None:
            keys.append(Line2D([], [], color=MUTED, linewidth=0.9, dashes=(1, 2), label="chance"))
        if crosses:
            keys.append(Line2D([], [], color=MUTED, linestyle="", marker="x", markersize=4.6, label="share diverged"))
        keys += overflow_keys([overflowed(axes, infinite)])
        if along is not Along.TIME and len(every_x) <= (40 if scale is Scale.LOG else 12):
            tick_each(axes, sorted({*drawn_x, *(point.x for point in points)}), room)
        name_ends(axes, ends)
        said = band or what_band(low, high) if low is not None and high is not None and table.readings(low) else ""
        legend(axes, along, said, keys)
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
    band: str | None = None,
    level: float | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
    paper: Sequence[PaperPoint] = (),
) -> Callable[[Sheet, Answer], None]:
    """Small multiples of curves on a common y axis, one for each value of the column `panel` as it first appears.

    One line a series along x, with a light band `low` to `high` and the paper's points of that panel hollow beside it;
    `band` says what the band is, for the legend, and `level` is a dashed line across. The axes cut off what is beyond
    `ylim`, and the line leads there.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (x, y, series, panel, low, high))
        if not table.drawable(y):
            return
        points = [point for point in paper if point.panel is not None]
        values = list(dict.fromkeys([*table.values(panel), *(point.panel for point in points)]))
        styled = table.styled(series, styles, also=[point.series for point in points])
        titles = [panel_title.format(value) for value in values]
        shown = multiples(sheet, titles, abreast_of(len(values)), 2.1, "all")
        for axes, leftmost, lowest in shown:
            frame(axes, unit, xlabel if lowest else "", ylabel if leftmost else "", yscale)
            axes.set_xscale(xscale.value)
        known = [*on_axis(table, x, xscale, y, low, high), *(point.y for point in points)]
        limits(shown[0].axes, unit, ylim, known if level is None else [*known, level])
        triangles: list[bool] = []  # whether a panel has some
        for axes, value in zip((each.axes for each in shown), values, strict=True):
            part = table.where(panel, value)
            infinite: list[tuple[str, np.ndarray]] = []  # colour, places
            for style in styled:
                own = part.where(series, style.key)
                at, height, bottom, top = values_along(own, x, y, low, high, xscale, yscale)
                one_row_a_cell(at, answer, x, series, style.key)
                order = np.argsort(at)
                line(axes, at[order], height[order], bottom[order], top[order], style.colour, Along.TIME)
                infinite.append((style.colour, at[(height == np.inf) | (top == np.inf)]))
            triangles.append(overflowed(axes, infinite))
            paper_points(axes, [point for point in points if point.panel == value], styled, [])
            if level is not None:
                axes.axhline(level, color=MUTED, linewidth=0.9, dashes=(5, 3), zorder=1)
            if xscale is Scale.LOG:
                log_ticks(axes.xaxis)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole(table.numbers(x))))
        keys: list[Artist] = [Line2D([], [], color=style.colour, linewidth=2, label=style.label) for style in styled]
        if low and high and table.readings(low):
            keys.append(Patch(color=GREY, alpha=0.35, linewidth=0, label=band or f"{low} to {high}"))
        keys += paper_keys(points, line="--") + overflow_keys(triangles)
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
        if not table.drawable(quantiles[2]):
            return
        styled = table.styled(series, styles)
        parts = _parts(sheet, table, panel, panel_title, unit, xlabel, ylabel, Scale.LINEAR)
        limits(parts[0][0], unit, (None, None), table.every(*quantiles))
        triangles: list[bool] = []  # whether a panel has some
        for axes, part in parts:
            infinite: list[tuple[str, np.ndarray]] = []  # colour, places
            for style in styled:
                own = part.where(series, style.key)
                at = own.places(x)
                one_row_a_cell(at, answer, x, series, style.key)
                order = np.argsort(at)
                heights = [own.heights(name)[order] for name in quantiles]
                at = at[order]
                infinite.append((style.colour, at[np.isposinf(heights).any(axis=0)]))
                known = np.isfinite(heights[2])
                first, lower, middle, upper, last = (cut_off(axes, each) for each in heights)
                axes.fill_between(at, lower, upper, color=style.colour, alpha=0.22, linewidth=0)
                for edge in (first, last):
                    axes.plot(at, edge, color=style.colour, linewidth=0.8, alpha=0.7)
                axes.plot(at, middle, color=style.colour, linewidth=1.5)
                lone = known & alone(middle)
                axes.plot(at[lone], middle[lone], "o", color=style.colour, markersize=4)
            triangles.append(overflowed(axes, infinite))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole(table.numbers(x))))
        keys: list[Artist] = [Line2D([], [], color=style.colour, linewidth=2, label=style.label) for style in styled]
        keys += [
            Line2D([], [], color=INK, linewidth=1.5, label="median"),
            Patch(color=GREY, alpha=0.35, linewidth=0, label="middle half"),
            Line2D([], [], color=GREY, linewidth=0.8, label=f"{quantiles[0]} and {quantiles[-1]}"),
            *overflow_keys(triangles),
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


def ridges(
    *,
    left: str,
    right: str,
    share: str,
    series: str,
    styles: Sequence[Series],
    panel: str,
    over: str,
    panel_title: str,
    xlabel: str,
    ylabel: str,
    over_label: str = "{}",
) -> Callable[[Sheet, Answer], None]:
    """Binned distributions as they change: in each panel one small one for each value of `over`, as it grows from the
    top down, the last in front of those behind it. A row is one bin from `left` to `right` with its share of the
    whole, in [0, 1].

    Drawn is density, share over width, to one scale within a panel. The panels' common x axis holds 99.9 % of every
    distribution and cuts the rest off. `over_label` is a template for the numbers of `over`, `"{:,}"`.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (left, right, share, series, panel, over))
        if not table.readings(share):
            return
        styled = table.styled(series, styles)
        panes, overs = in_order(table.values(panel)), table.rows_of(over)
        feet = [float(len(overs) - 1 - row) for row in range(len(overs))]
        there: dict[Any, list[list[tuple[Series, Ridge]]]] = {}  # of each panel; of each value of over, its ridges
        for pane in panes:
            part = table.where(panel, pane)
            there[pane] = [[] for _ in overs]
            for behind, key in zip(there[pane], overs, strict=True):
                for style in styled:
                    own = part.where(over, key).where(series, style.key)
                    begin, end = own.places(left), own.places(right)
                    one_row_a_cell(begin, answer, left, f"{series}, {over}", f"{style.key}, {key}")
                    if own.readings(share):
                        behind.append((style, Ridge.of(begin, end, own.numbers(share), right)))
        every = [ridge for rows in there.values() for row in rows for _, ridge in row]
        extent = common_range(every)
        across = ridge_abreast(len(panes))
        tall = 1.4 + min(2.4, 0.11 * len(overs)) if len(panes) > 1 else 3.1
        top = feet[0] + 1.0
        shown = multiples(sheet, [panel_title.format(pane) for pane in panes], across, tall, "all")
        for (axes, leftmost, lowest), pane in zip(shown, panes, strict=True):
            frame(axes, "", xlabel if lowest else "", ylabel if leftmost else "", Scale.LINEAR)
            axes.grid(False)
            height = ridge_height(ridge for row in there[pane] for _, ridge in row)
            several = max(map(len, there[pane]))
            for foot_of, row in zip(feet, there[pane], strict=True):
                for style, ridge in row:
                    ridge.draw(axes, foot_of, height, style, face(style.colour, several))
                    top = max(top, foot_of + ridge.top(height))
            axes.set_xlim(extent)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        shown[0].axes.set_ylim(-0.25, top + 0.1)
        tick_rows(shown[0].axes, feet, [over_label.format(key) for key in overs], 72 * (tall - 0.55))
        keys: list[Artist] = [Patch(color=style.colour, linewidth=0, label=style.label) for style in styled]
        sheet.legend(handles=keys, loc="outside upper center", ncols=abreast(keys))
        say_absent(sheet, [style.label for style in styles if style.key not in {each.key for each in styled}])

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
    """Groups of bars, one bar a series, `low` to `high` a whisker. A cell without a reading says so, and so does one of
    +inf, whose bar reaches the top.

    Bars begin at zero, on a log axis at its foot. Groups that are numbers are sorted, text stands as it first appears.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = Table(answer, (x, y, series, low, high))
        if not table.drawable(y):
            return
        axes = sheet.add_subplot()
        points = [point for point in paper if point.panel is None]
        groups = in_order([*table.values(x), *(point.x for point in points)])
        styled = table.styled(series, styles)
        width = 0.8 / len(styled)
        base = foot([*table.every(y, low), *(point.y for point in points)], yscale)
        scale = yscale if base else Scale.LINEAR  # without a number above 0 there is no log axis
        frame(axes, unit, xlabel, ylabel, scale)
        infinite: list[tuple[float, str]] = []  # places of bars without an end, colours
        without_end: list[tuple[float, float]] = []  # whiskers: places, lower ends
        for order, style in enumerate(styled):
            rows = table.where(series, style.key).rows
            one_row_a_cell([row[x] for row in rows], answer, x, series, style.key)
            own = {row[x]: row for row in rows}
            for index, group in enumerate(groups):
                at = index + (order - (len(styled) - 1) / 2) * width
                row = own.get(group, {})
                value = reading(row.get(y))
                if value == math.inf:
                    infinite.append((at, style.colour))
                elif math.isnan(value) or (scale is Scale.LOG and value <= 0):
                    said = " no data" if math.isnan(value) else f" {short(value)}"
                    axes.text(at, base, said, rotation=90, fontsize=7, color=MUTED, ha="center", va="bottom")
                else:
                    axes.bar(at, value - base, width * 0.88, base, color=style.colour, linewidth=0)
                ends = (reading(row.get(low)), reading(row.get(high))) if low and high else (math.nan, math.nan)
                if all(map(math.isfinite, ends)):
                    axes.vlines(at, *ends, color=INK, linewidth=1)
                elif math.isfinite(value) and math.isfinite(ends[0]) and ends[1] == math.inf:
                    without_end.append((at, ends[0]))
                for point in points:
                    if point.series == style.key and point.x == group:
                        axes.plot(at, point.y, MARKERS[point.standing], color=INK, markerfacecolor=GROUND, markersize=5)
        texts = [str(group) for group in groups]
        axes.set_xticks(range(len(groups)), texts)
        tilt_if_crowded(axes, texts, 72 * WIDTH - 60)
        if scale is Scale.LOG:
            axes.set_ylim(bottom=base)
        top = axes.get_ylim()[1]
        if infinite or without_end:
            axes.set_ylim(axes.get_ylim() if axes.has_data() else (base, top))
        if not axes.has_data():
            axes.set_yticks([])
        for at, colour in infinite:
            axes.bar(at, top - base, width * 0.88, base, color=colour, linewidth=0)
            axes.annotate(
                "inf", (at, 1), (0, 1.5), xycoords=("data", "axes fraction"), textcoords="offset points", rotation=90,
                fontsize=7, color=INK, ha="center", va="bottom",
            )  # fmt: skip
        for at, end in without_end:
            axes.vlines(at, end, top, color=INK, linewidth=1)
        cut = overflowed(axes, [(INK, np.array([at for at, _ in without_end]))])
        axes.axhline(base, color=INK, linewidth=0.8)
        keys: list[Artist] = [Patch(color=style.colour, linewidth=0, label=style.label) for style in styled]
        if low and table.readings(low):
            keys.append(Line2D([], [], color=INK, linewidth=1, label="interval"))
        keys += paper_keys(points, line="") + overflow_keys([cut])
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


def _parts(
    sheet: Sheet, table: Table, column: str, title: str, unit: str, xlabel: str, ylabel: str, yscale: Scale
) -> list[tuple[Axes, Table]]:
    """Small multiples of distributions on a common y axis."""
    values = in_order(table.values(column))
    shown = multiples(sheet, [title.format(value) for value in values], abreast_of(len(values)), 2.1, "all")
    for axes, leftmost, lowest in shown:
        frame(axes, unit, xlabel if lowest else "", ylabel if leftmost else "", yscale)
    return [(each.axes, table.where(column, value)) for each, value in zip(shown, values, strict=True)]
