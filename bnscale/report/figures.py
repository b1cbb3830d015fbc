"""Figures as the papers draw them: each is a query and a function that draws its answer.

The drawing functions (`curves`, `bands`, `histograms`, `bars`) take names of columns and return what draws them.
A cell without a reading is a gap, never a zero. Shares in [0, 1] are drawn as per cent where `unit` is `%`.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bnscale.report.claims import Standing
from bnscale.trial import Refusal, near

if TYPE_CHECKING:
    from matplotlib.artist import Artist

    from bnscale.query import Answer

# Okabe and Ito's palette: told apart with every common colour vision, and on white as on black.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#8a8f98",
)  # fmt: skip
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)

# Four neutral colours that the page can exchange for its own, light or dark.
INK, MUTED, RULE, GROUND = "#1c2126", "#666d76", "#dfe2e6", "#ffffff"

_WIDTH = 6.6  # inches; 475 points

_FONTS = ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")  # the last comes with matplotlib


class Scale(Enum):
    LINEAR = "linear"
    LOG = "log"


class Along(Enum):
    """What the x axis is."""

    GRID = "an axis of the study: each value is a cell, and a cell that one series lacks is a gap"
    TIME = "time or layers: many readings in a row, drawn without markers"


@dataclass(frozen=True)
class Series:
    """How the rows with one value of the series column are drawn."""

    key: Any  # value in the answer
    label: str
    colour: str


@dataclass(frozen=True)
class PaperPoint:
    """A number of the paper, drawn hollow beside ours."""

    series: Any
    x: float
    y: float  # in the unit of the y column
    standing: Standing


@dataclass(frozen=True)
class Figure:
    title: str
    query: str  # name in the study's .sql file, and of the files beside the report
    caption: str
    draw: Callable[[Sheet, Answer], None]
    source: str  # "Frankle et al. 2021, figure 2"


def render(figure: Figure, answer: Answer, run: str) -> Sheet:
    """Draws the answer. Without a single reading the sheet says what to run."""
    with matplotlib.rc_context(_look("")):
        sheet = Sheet(figsize=(_WIDTH, 4.0), layout="constrained", facecolor=GROUND)
        if answer.rows:
            figure.draw(sheet, answer)
        if not any(axes.has_data() for axes in sheet.axes):
            sheet.clear()
            sheet.set_size_inches(_WIDTH, 1.6)
            sheet.text(0.5, 0.58, "no data yet", ha="center", va="bottom", fontsize=13, color=MUTED)
            sheet.text(0.5, 0.48, f"run:  {run}", ha="center", va="top", fontsize=8.5, color=MUTED, wrap=True)
        return sheet


def png(sheet: Sheet) -> bytes:
    """300 dots an inch."""
    file = io.BytesIO()
    with matplotlib.rc_context(_look("")):
        sheet.savefig(file, format="png", dpi=300, metadata={"Software": None})
    return file.getvalue()


def svg(sheet: Sheet, name: str) -> str:
    """Text is drawn as paths, so it looks the same everywhere. Same answer and name: same bytes."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_look(name)):
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
) -> Callable[[Sheet, Answer], None]:
    """One line a series, named at its right end, with a band `low` to `high` and the paper's points hollow beside it.

    `diverged` is a column with the share of trials that diverged; where it is above 0 a cross stands at the foot.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = _Table(answer, (x, y, series, low, high, diverged))
        if not table.readings(y):
            return
        axes = sheet.add_subplot()
        _frame(axes, unit, xlabel, ylabel)
        axes.set_xscale(scale.value)
        every_x = np.unique(table.places(x))
        styled = table.styled(series, styles)
        ends: list[tuple[float, str, str]] = []  # y of the last point, label, colour
        crosses: Counter[float] = Counter()  # at each x, one above the other

        for style in styled:
            own = table.where(series, style.key)
            at, value = own.places(x), own.numbers(y)
            _one_row_a_cell(at, answer, x, series, style)
            bottom = own.numbers(low) if low else np.full_like(value, np.nan)
            top = own.numbers(high) if high else np.full_like(value, np.nan)
            lost = own.numbers(diverged) if diverged else np.zeros_like(value)
            if along is Along.GRID:
                at, value, bottom, top, lost = _on(every_x, at, value, bottom, top, lost)
            else:
                at, value, bottom, top, lost = (column[np.argsort(at)] for column in (at, value, bottom, top, lost))
            has_band = np.isfinite(bottom) & np.isfinite(top)
            if has_band.any():
                axes.fill_between(
                    at, bottom, top, where=has_band, color=style.colour, alpha=0.16, linewidth=0, zorder=2
                )
            if along is Along.GRID:
                axes.vlines(
                    at[has_band], bottom[has_band], top[has_band], style.colour, linewidth=1, alpha=0.8, zorder=3
                )
            alone = _alone(value) if along is Along.TIME else np.ones_like(value, dtype=bool)
            axes.plot(at, value, color=style.colour, linewidth=1.7, zorder=4)
            axes.plot(
                at[alone], value[alone], "o", color=style.colour, markersize=4.6, zorder=5,
                markeredgecolor=GROUND, markeredgewidth=0.6,
            )  # fmt: skip
            for where in np.flatnonzero(lost > 0):
                axes.annotate(
                    f"× {100 * lost[where]:.0f} %", (at[where], 0), (0, 3 + 9 * crosses[at[where]]),
                    xycoords=("data", "axes fraction"), textcoords="offset points", color=style.colour, fontsize=7.5,
                    ha="center", va="bottom", zorder=6,
                )  # fmt: skip
                crosses[at[where]] += 1
            finite = np.flatnonzero(np.isfinite(value))
            if len(finite):
                ends.append((float(value[finite[-1]]), style.label, style.colour))

        standings = _paper(axes, paper, table.styled(series, styles, also=[p.series for p in paper]), ends)
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=0.9, dashes=(1, 2), zorder=1)
        if along is Along.GRID and len(every_x) <= 12:
            ticks = sorted({*every_x, *(point.x for point in paper)})
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _limits(axes, unit, ylim)
        _name_ends(axes, ends)
        interval = low is not None and bool(table.readings(low))
        _legend(axes, along, interval, standings, chance, bool(crosses))
        _say_absent(sheet, [s.label for s in styles if s.key not in {t.key for t in styled}])

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
        table = _Table(answer, (x, *quantiles, series, panel))
        if not table.readings(quantiles[2]):
            return
        styled = table.styled(series, styles)
        for axes, part in _panels(sheet, table, panel, panel_title, unit, xlabel, ylabel):
            for style in styled:
                own = part.where(series, style.key)
                at = own.places(x)
                _one_row_a_cell(at, answer, x, series, style)
                order = np.argsort(at)
                first, lower, middle, upper, last = (own.numbers(name)[order] for name in quantiles)
                at = at[order]
                axes.fill_between(at, lower, upper, color=style.colour, alpha=0.22, linewidth=0)
                for edge in (first, last):
                    axes.plot(at, edge, color=style.colour, linewidth=0.8, alpha=0.7)
                axes.plot(at, middle, color=style.colour, linewidth=1.5)
                alone = _alone(middle)
                axes.plot(at[alone], middle[alone], "o", color=style.colour, markersize=4)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=_whole(table.numbers(x))))
        keys: list[Artist] = [Line2D([], [], color=style.colour, linewidth=2, label=style.label) for style in styled]
        keys += [
            Line2D([], [], color=INK, linewidth=1.5, label="median"),
            Patch(color=GREY, alpha=0.35, linewidth=0, label="middle half"),
            Line2D([], [], color=GREY, linewidth=0.8, label=f"{quantiles[0]} and {quantiles[-1]}"),
        ]
        sheet.legend(handles=keys, loc="outside upper center", ncols=_abreast(keys))

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
) -> Callable[[Sheet, Answer], None]:
    """Binned distributions: a row is one bin from `left` to `right` with its share of the whole, in [0, 1].

    `mark` draws a vertical line, such as the threshold below which a gamma counts as dead.
    """

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = _Table(answer, (left, right, share, series, panel))
        if not table.readings(share):
            return
        styled = table.styled(series, styles)
        for axes, part in _panels(sheet, table, panel, panel_title, "%", xlabel, ylabel):
            for style in styled:
                own = part.where(series, style.key)
                begin, end, height = own.places(left), own.places(right), own.numbers(share)
                _one_row_a_cell(begin, answer, left, series, style)
                order = np.argsort(begin)
                begin, end, height = begin[order], end[order], height[order]
                known = np.isfinite(height)
                axes.bar(
                    begin[known], height[known], (end - begin)[known], align="edge", color=style.colour, alpha=0.25,
                    linewidth=0,
                )  # fmt: skip
                outline_x, outline_y = _outline(begin, end, height)
                axes.plot(outline_x, outline_y, color=style.colour, linewidth=1.3)
            if mark is not None:
                axes.axvline(mark, color=MUTED, linewidth=0.9, dashes=(1, 2))
            axes.xaxis.set_major_locator(MaxNLocator(5))
        for axes in sheet.axes:  # once all are drawn: the panels share an axis, and it must hold the highest of them
            axes.set_ylim(bottom=0)
        keys: list[Artist] = [Line2D([], [], color=style.colour, linewidth=2.5, label=style.label) for style in styled]
        sheet.legend(handles=keys, loc="outside upper center", ncols=_abreast(keys))

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
) -> Callable[[Sheet, Answer], None]:
    """Groups of bars from zero, one bar a series, `low` to `high` a whisker. A cell without a reading says so."""

    def draw(sheet: Sheet, answer: Answer) -> None:
        table = _Table(answer, (x, y, series, low, high))
        if not table.readings(y):
            return
        axes = sheet.add_subplot()
        _frame(axes, unit, xlabel, ylabel)
        groups = sorted({row[x] for row in table.rows if row[x] is not None} | {point.x for point in paper})
        styled = table.styled(series, styles)
        width = 0.8 / len(styled)
        for order, style in enumerate(styled):
            own = {row[x]: row for row in table.where(series, style.key).rows}
            _one_row_a_cell([row[x] for row in table.where(series, style.key).rows], answer, x, series, style)
            for index, group in enumerate(groups):
                at = index + (order - (len(styled) - 1) / 2) * width
                row = own.get(group, {})
                value = _number(row.get(y))
                if math.isnan(value):
                    axes.text(at, 0, " no data", rotation=90, fontsize=7, color=MUTED, ha="center", va="bottom")
                else:
                    axes.bar(at, value, width * 0.88, color=style.colour, linewidth=0)
                ends = (_number(row.get(low)), _number(row.get(high))) if low and high else (math.nan, math.nan)
                if all(map(math.isfinite, ends)):
                    axes.vlines(at, *ends, color=INK, linewidth=1)
                for point in paper:
                    if point.series == style.key and point.x == group:
                        axes.plot(
                            at, point.y, _MARKERS[point.standing], color=INK, markerfacecolor=GROUND, markersize=5
                        )
        axes.set_xticks(range(len(groups)), [str(group) for group in groups])
        axes.axhline(0, color=INK, linewidth=0.8)
        keys: list[Artist] = [Patch(color=style.colour, linewidth=0, label=style.label) for style in styled]
        if low and table.readings(low):
            keys.append(Line2D([], [], color=INK, linewidth=1, label="interval"))
        keys += _paper_keys({point.standing for point in paper}, line="")
        sheet.legend(handles=keys, loc="outside upper center", ncols=_abreast(keys))
        _say_absent(sheet, [s.label for s in styles if s.key not in {t.key for t in styled}])

    return draw


# --- reading an answer ---------------------------------------------------------------------------


class _Table:
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

    def where(self, column: str, value: Any) -> _Table:
        return _Table(self.answer, (), [row for row in self.rows if row[column] == value])

    def numbers(self, column: str) -> np.ndarray:
        """One float a row; NaN where there is no reading."""
        for row in self.rows:
            if row[column] is not None and not isinstance(row[column], int | float | Decimal):
                raise Refusal(
                    f"column {column}: {row[column]!r} is no number and cannot be drawn; cast it in the query"
                )
        return np.array([_number(row[column]) for row in self.rows], dtype=float)

    def places(self, column: str) -> np.ndarray:
        """Numbers of a column in which every row has one: where to draw it."""
        numbers = self.numbers(column)
        if not np.isfinite(numbers).all():
            raise Refusal(f"column {column}: a row without it has no place in a figure; filter the query")
        return numbers

    def readings(self, column: str) -> int:
        return int(np.isfinite(self.numbers(column)).sum()) if self.rows else 0

    def styled(self, column: str, styles: Sequence[Series], also: Sequence[Any] = ()) -> list[Series]:
        """The series that are there, in the order of `styles`; what nobody styled comes last and is drawn too."""
        there = list(dict.fromkeys([row[column] for row in self.rows] + list(also)))
        known = {style.key for style in styles}
        free = [colour for colour in PALETTE if colour not in {style.colour for style in styles}] or [GREY]
        unstyled = [key for key in there if key not in known]
        return [style for style in styles if style.key in there] + [
            Series(key, str(key), free[index % len(free)]) for index, key in enumerate(unstyled)
        ]


def _number(value: Any) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _one_row_a_cell(at: Any, answer: Answer, x: str, series: str, style: Series) -> None:
    if len(set(at)) < len(at):
        raise Refusal(
            f"columns {series}, {x}: {style.key} has several rows with one {x}; a figure draws one row for each; "
            f"aggregate the query that gives {', '.join(answer.columns)}"
        )


def _on(every_x: np.ndarray, at: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    """The columns at every x of the figure, NaN where this series has no row: there its line breaks."""
    where = np.searchsorted(every_x, at)
    spread = [np.full(len(every_x), np.nan) for _ in columns]
    for wide, column in zip(spread, columns, strict=True):
        wide[where] = column
    return [every_x, *spread]


def _alone(values: np.ndarray) -> np.ndarray:
    """Readings without a reading on either side: a line would not show them."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    alone: np.ndarray = known[1:-1] & ~known[:-2] & ~known[2:]
    return alone


def _outline(begin: np.ndarray, end: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper edge of a histogram; it breaks where a bin is missing or has no reading."""
    xs: list[float] = []
    ys: list[float] = []
    for index in range(len(begin)):
        if index and not math.isclose(begin[index], end[index - 1], abs_tol=1e-9 * (end[-1] - begin[0])):
            xs, ys = [*xs, end[index - 1]], [*ys, math.nan]
        xs, ys = [*xs, begin[index], end[index]], [*ys, height[index], height[index]]
    return np.array(xs), np.array(ys)


def _whole(values: np.ndarray) -> bool:
    return bool(np.all(np.mod(values[np.isfinite(values)], 1) == 0))


# --- the look ------------------------------------------------------------------------------------


def _look(salt: str) -> Any:
    """Settings of matplotlib, in force only while a sheet is drawn; the salt tells the ids of SVGs apart."""
    installed = set(font_manager.fontManager.get_font_names())
    return {
        "font.family": [name for name in _FONTS if name in installed],
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


def _frame(axes: Axes, unit: str, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f"{ylabel} ({unit})" if unit else ylabel)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if unit == "%":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}"))


def _limits(axes: Axes, unit: str, ylim: tuple[float | None, float | None]) -> None:
    low, high = axes.get_ylim()
    if unit == "%":  # a margin beyond what a share can be says nothing
        low, high = max(low, 0.0), min(high, 1.0)
    axes.set_ylim(low if ylim[0] is None else ylim[0], high if ylim[1] is None else ylim[1])


def _panels(
    sheet: Sheet, table: _Table, column: str, title: str, unit: str, xlabel: str, ylabel: str
) -> list[tuple[Axes, _Table]]:
    """Small multiples on a common y axis, at most three in a row."""
    values = sorted({row[column] for row in table.rows if row[column] is not None})
    across = 2 if len(values) == 4 else min(len(values), 3)
    down = math.ceil(len(values) / across)
    sheet.set_size_inches(_WIDTH, 0.9 + 2.1 * down if across > 1 else 4.0)
    grid = sheet.subplots(down, across, sharex=False, sharey=True, squeeze=False)
    shown = []
    for axes in grid.flat[len(values) :]:
        axes.remove()
    for index, (axes, value) in enumerate(zip(grid.flat, values, strict=False)):
        below = index + across < len(values)
        _frame(axes, unit, "" if below else xlabel, ylabel)
        if index % across:
            axes.set_ylabel("")
        axes.set_title(title.format(value), fontsize=9.5, loc="left", color=INK)
        shown.append((axes, table.where(column, value)))
    return shown


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


def _legend(
    axes: Axes, along: Along, interval: bool, standings: set[Standing], chance: float | None, crosses: bool
) -> None:
    """What is ours and what is the paper's; which series is which stands at the lines themselves."""
    marker = "o" if along is Along.GRID else ""
    ours = "measured, with interval over seeds" if interval else "measured"
    keys: list[Artist] = [Line2D([], [], color=MUTED, linewidth=1.7, marker=marker, markersize=4.6, label=ours)]
    keys += _paper_keys(standings, line="--")
    if chance is not None:
        keys.append(Line2D([], [], color=MUTED, linewidth=0.9, dashes=(1, 2), label="chance"))
    if crosses:
        keys.append(Line2D([], [], color=MUTED, linestyle="", marker="x", markersize=4.6, label="share diverged"))
    if len(keys) > 1 or interval:
        figure = axes.get_figure()
        assert figure is not None
        figure.legend(handles=keys, loc="outside upper left", ncols=_abreast(keys), columnspacing=1.6)


def _abreast(keys: Sequence[Artist]) -> int:
    """How many entries of a legend fit side by side, at about 4.3 points a letter of the longest."""
    widest = max(len(str(key.get_label())) for key in keys)
    return max(1, min(len(keys), int(72 * _WIDTH / (4.3 * widest + 46))))


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


def _name_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """The series' names right of the axes at the heights of their last points."""
    low, high = axes.get_ylim()
    heights = [(value - low) / (high - low) for value, _, _ in ends]
    for height, (_, label, colour) in zip(spread(heights, gap=0.055), ends, strict=True):
        swatch = Line2D(
            [1.015, 1.04], [height] * 2, transform=axes.transAxes, color=colour, linewidth=2.4, clip_on=False
        )
        axes.add_artist(swatch)
        axes.text(1.05, height, label, transform=axes.transAxes, color=INK, fontsize=9, va="center", ha="left")


def _say_absent(sheet: Sheet, labels: list[str]) -> None:
    if labels:
        sheet.supxlabel(f"not measured: {', '.join(labels)}", fontsize=8, color=MUTED, x=0.99, ha="right")
