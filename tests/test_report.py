"""The report: claims are judged by numbers that are there, figures draw what is there, the page stands alone."""

import datetime
import io
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from matplotlib.colors import to_hex
from rich.console import Console

from bnscale.report import claims, figures, heat, look, page, ridges
from bnscale.report.claims import Claim, Judged, Standing, Verdict, judge, queries
from bnscale.report.figures import Along, Figure, PaperPoint, Scale, Series
from bnscale.trial import Refusal

# --- a session and a study's SQL, as small as they get --------------------------------------------


class Answer:
    def __init__(self, columns: list[str], rows: list[tuple]) -> None:
        self.columns, self.rows = columns, rows

    def dicts(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class Session:
    def __init__(self) -> None:
        self.database = duckdb.connect()

    def sql(self, text: str) -> Answer:
        result = self.database.execute(text)
        return Answer([column[0] for column in result.description], result.fetchall())


@pytest.fixture
def session():
    session = Session()
    yield session
    session.database.close()


def claim(**changes: Any) -> Claim:
    return Claim(
        **{
            "sentence": "BatchNorm alone reaches 82 % at 866 layers.",
            "source": "Frankle et al. 2021, abstract",
            "query": "deepest",
            "paper": 0.82,
            "unit": "%",
            "band": (0.78, 0.86),
            "reason": "Four points either way.",
            "standing": Standing.FOUND,
            "needs": 3,
        }
        | changes
    )


def measured(session: Session, sql: str, **changes: Any) -> Judged:
    return judge(claim(**changes), session, queries(f"-- name: deepest\n-- one row\n{sql};"))


# --- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "select 0.82 as measured, 3 as n where false",
        "select null as measured, 5 as n",
        "select 'nan'::double as measured, 5 as n",
        "select 'inf'::double as measured, 5 as n",
        "select 0.82 as measured, 2 as n",
        "select 0.82 as measured, null as n",
    ],
)
def test_without_a_number_from_enough_seeds_nothing_is_reproduced(session, sql):
    everything = (-math.inf, math.inf)
    assert measured(session, sql, band=everything).verdict is Verdict.NOT_ENOUGH_DATA


def test_a_number_from_too_few_seeds_is_shown_all_the_same(session):
    judged = measured(session, "select 0.82 as measured, 2 as n")
    assert (judged.measured_text, judged.n_text) == ("82.0 %", "2 of 3")


@pytest.mark.parametrize(
    ("number", "said"),
    [("12183857160", "1.22e+10"), ("8.2e6", "8.2e+06"), ("53214.6", "53215"), ("0.5", "0.500")],
)
def test_a_number_of_many_digits_is_written_as_the_papers_are(session, number, said):
    judged = measured(session, f"select {number}::double as measured, 3 as n", unit="", band=(0.0, 1e12))
    assert judged.measured_text == said


@pytest.mark.parametrize(
    ("number", "verdict"),
    [
        ("0.78", Verdict.REPRODUCED),
        ("0.86", Verdict.REPRODUCED),
        ("0.7799999", Verdict.NOT_REPRODUCED),
        ("0.8600001", Verdict.NOT_REPRODUCED),
    ],
)
@pytest.mark.parametrize("kind", ["double", "decimal(9, 7)"])
def test_the_ends_of_a_band_belong_to_it(session, number, verdict, kind):
    assert measured(session, f"select {number}::{kind} as measured, 3 as n").verdict is verdict


def test_a_claim_takes_its_own_row_of_several_and_none_is_not_enough(session):
    sql = "select * from (values (8, 0.5, 3), (866, 0.82, 4)) as rows (depth, measured, n)"
    assert (measured(session, sql, row={"depth": 866}).measured, measured(session, sql, row={"depth": 8}).n) == (
        0.82,
        3,
    )
    assert measured(session, sql, row={"depth": 9}).verdict is Verdict.NOT_ENOUGH_DATA
    with pytest.raises(Refusal, match="gives depth, measured, n and no width"):
        measured(session, sql, row={"width": 1})
    with pytest.raises(Refusal, match="gives 2 rows"):
        measured(session, sql)


def test_a_band_may_be_open_at_an_end(session):
    at_least = {"unit": "pt", "paper": None, "band": (0.0, math.inf)}
    assert measured(session, "select 0.3 as measured, 3 as n", **at_least).verdict is Verdict.REPRODUCED
    assert measured(session, "select -0.001 as measured, 3 as n", **at_least).verdict is Verdict.NOT_REPRODUCED
    assert claim(**at_least).band_text == "at least 0 pt"


@given(some.floats(0, 1))
def test_a_written_number_is_on_the_same_side_of_the_band_as_the_number(value):
    judged = Judged(claim(), value, None, None, 3, Verdict.REPRODUCED, "")
    written = float(judged.measured_text.removesuffix(" %")) / 100
    assert claim().holds(written) == claim().holds(value) or abs(written - value) < 1e-9


def test_the_papers_number_keeps_the_digits_the_paper_gave():
    assert [claim(paper=paper).paper_text for paper in (0.82, 0.697, 1.0, None)] == ["82 %", "69.7 %", "100 %", "–"]
    assert claim(standing=Standing.DIGITISED).standing_text == "≈, digitised"
    assert claim(paper=None).standing_text == "no number; found"


def test_intervals_are_written_from_low_to_high_with_the_digits_of_their_middle(session):
    judged = measured(session, "select 0.8012 as measured, 0.7949 as low, 0.8101 as high, 5 as n")
    assert (judged.measured_text, judged.interval_text) == ("80.1 %", "79.5–81.0")
    judged = measured(
        session, "select -0.0112 as measured, -0.0349 as low, 0.01 as high, 5 as n", unit="pt", paper=None, band=(-1, 0)
    )
    assert (judged.measured_text, judged.interval_text) == ("−1.1 pt", "−3.5 to +1.0")
    assert measured(session, "select 0.8 as measured, null as low, 'nan'::double as high, 5 as n").interval_text == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"band": (0.86, 0.78)}, "band"),
        ({"band": (math.nan, 0.78)}, "band"),
        ({"paper": 82.0}, "82 % is 0.82"),
        ({"band": (78.0, 86.0)}, "78 % is 0.78"),
        ({"standing": "certain"}, "found, digitised"),
        ({"needs": 0}, "at least 1"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(changes, says):
    with pytest.raises(Refusal, match=re.escape(says)):
        claim(**changes)


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("select 82.0 as measured, 3 as n", "82 % is 0.82"),
        ("select 0.8 as accuracy, 3 as n", "no measured"),
        ("select 0.8 as measured", "no n"),
        ("select unnest([0.8, 0.9]) as measured, 3 as n", "2 rows"),
        ("select 'high' as measured, 3 as n", "must be a number"),
        ("select true as measured, 3 as n", "must be a number"),
    ],
)
def test_a_query_that_does_not_answer_its_claim_is_refused(session, sql, says):
    with pytest.raises(Refusal, match=re.escape(says)):
        measured(session, sql)


def test_a_claim_about_a_query_that_is_not_there_names_the_nearest():
    with pytest.raises(Refusal, match="did you mean deepest"):
        judge(claim(query="depest"), None, queries("-- name: deepest\nselect 1"))  # type: ignore[arg-type]


def test_every_verdict_is_counted_also_the_one_nobody_has(session):
    counted = claims.tally([measured(session, "select 0.82 as measured, 3 as n")])
    assert counted == {Verdict.REPRODUCED: 1, Verdict.NOT_REPRODUCED: 0, Verdict.NOT_ENOUGH_DATA: 0}


# --- the .sql file --------------------------------------------------------------------------------


def test_a_file_of_queries_is_read_by_name_with_comment_and_sql():
    found = queries(
        "-- Analysis of a study.\n\n-- name: one\n-- What it is.\n-- one row\nselect 1  -- the number;\n  as a;\n\n"
        "-- name: two\nwith t as (\n    -- one row per thing\n    select 2\n)\n\nselect * from t\n"
    )
    assert list(found) == ["one", "two"]
    assert found["one"] == ("What it is.\none row", "select 1  -- the number;\n  as a")
    assert found["two"] == ("", "with t as (\n    -- one row per thing\n    select 2\n)\n\nselect * from t")


SHARED = """\
-- name: numbers
-- one row per number
select unnest([1, 2, 3]) as x

-- name: doubled
-- one row per number
with
-- one row
two as (select 2 as factor)

select x * factor as y from numbers, two;

-- name: total
-- one row
select sum(y) + (select sum(x) from numbers) as z
from doubled
"""


def test_a_query_may_select_from_others_of_its_file_and_is_whole_by_itself(session):
    found = queries(SHARED)
    assert found["total"].comment == "one row"
    assert found["total"].sql.startswith("with\n-- one row per number\nnumbers as (\n    select unnest")
    assert found["numbers"].sql == "select unnest([1, 2, 3]) as x"
    assert session.sql(found["doubled"].sql).rows == [(2,), (4,), (6,)]
    assert session.sql(found["total"].sql).rows == [(18,)]  # numbers once, though two of them use it
    assert found["total"].sql.count("unnest") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("-- name: a\nselect 1;\n-- name: a\nselect 2;", "named on line 1 and again on line 3"),
        ("-- name: a\n-- only words\n-- name: b\nselect 2;", "query a (line 1): has no SQL"),
        ("select 1;\n-- name: a\nselect 2;", "SQL without a name"),
        ("-- name: Two words\nselect 2;", "lower-case"),
        ("-- name: ../../escape\nselect 2;", "lower-case"),
    ],
)
def test_a_file_of_queries_that_cannot_be_read_is_refused_with_its_line(text, says):
    with pytest.raises(Refusal, match=re.escape(says)):
        queries(text)


# --- figures --------------------------------------------------------------------------------------

STYLES = [Series("all", "All parameters", figures.BLUE), Series("bn", "BatchNorm", figures.VERMILION)]
ACCURACY = {
    "x": "depth",
    "y": "accuracy",
    "series": "trainable",
    "styles": STYLES,
    "xlabel": "Depth",
    "ylabel": "Test accuracy",
    "unit": "%",
}
CURVES = ACCURACY | {"scale": Scale.LOG, "along": Along.GRID}
COLUMNS = ["trainable", "depth", "accuracy", "low", "high", "diverged"]


def cell(trainable: str, depth: int, accuracy: float | None, diverged: float = 0.0) -> tuple:
    if accuracy is None:
        return (trainable, depth, None, None, None, diverged)
    return (trainable, depth, accuracy, accuracy - 0.01, accuracy + 0.01, diverged)


def figure(draw: Any, **changes: Any) -> Figure:
    return Figure(
        **{"title": "Accuracy", "query": "accuracy", "caption": "Mean.", "draw": draw, "source": "After a paper"}
        | changes
    )


def sheet_of(draw: Any, rows: list[tuple], columns: list[str] = COLUMNS) -> Any:
    return figures.render(figure(draw), Answer(columns, rows), "python study.py")  # type: ignore[arg-type]


def words(sheet: Any) -> str:
    inside = [text for axes in sheet.axes for text in axes.texts]
    legends = [text for legend in sheet.legends for text in legend.get_texts()]
    below = [sheet._supxlabel] if sheet._supxlabel else []
    return "\n".join(text.get_text() for text in [*sheet.texts, *inside, *legends, *below])


@pytest.mark.parametrize("missing", ["no row", "null", "nan"])
def test_a_missing_cell_is_a_gap_in_a_curve_and_never_a_zero(missing):
    rows = [cell("all", depth, 0.9) for depth in (8, 14, 20, 32)] + [cell("bn", depth, 0.5) for depth in (8, 14, 32)]
    rows += {"no row": [], "null": [cell("bn", 20, None)], "nan": [cell("bn", 20, math.nan)]}[missing]
    (axes,) = sheet_of(figures.curves(**CURVES, low="low", high="high"), rows).axes
    drawn = {
        colour: line.get_xydata()
        for line in axes.lines
        if line.get_marker() == "None" and (colour := line.get_color()) in (figures.BLUE, figures.VERMILION)
        and len(line.get_xdata()) == 4
    }  # fmt: skip
    assert drawn[figures.BLUE][:, 1].tolist() == [0.9] * 4
    assert drawn[figures.VERMILION][:, 0].tolist() == [8, 14, 20, 32]
    assert [math.isnan(y) for y in drawn[figures.VERMILION][:, 1]] == [False, False, True, False]


def test_readings_over_time_break_only_where_a_reading_is_missing():
    rows = [cell("all", step, 0.5) for step in range(6)] + [
        cell("bn", step, 0.4 if step else None) for step in (0, 2, 4)
    ]
    (axes,) = sheet_of(figures.curves(**CURVES | {"along": Along.TIME, "scale": Scale.LINEAR}), rows).axes
    values = next(list(line.get_ydata()) for line in axes.lines if line.get_color() == figures.VERMILION)
    assert math.isnan(values[0])
    assert values[1:] == [0.4, 0.4]


def test_a_series_with_places_of_its_own_has_a_line_through_them_and_a_marker_at_each():
    rows = [cell("all", count, 0.9) for count in (8, 20)] + [cell("bn", count, 0.5) for count in (5, 14, 32)]
    (axes,) = sheet_of(figures.curves(**CURVES | {"along": Along.OWN}, low="low", high="high"), rows).axes
    own = [line for line in axes.lines if line.get_color() == figures.VERMILION and len(line.get_xdata()) == 3]
    assert {line.get_marker() for line in own} == {"None", "o"}
    assert all(line.get_xdata().tolist() == [5, 14, 32] and np.isfinite(line.get_ydata()).all() for line in own)


def test_a_missing_cell_has_no_bar_and_says_so():
    rows = [cell("all", 8, 0.9), cell("all", 14, 0.9), cell("bn", 8, 0.5), cell("bn", 14, None)]
    sheet = sheet_of(figures.bars(**ACCURACY, low="low", high="high"), rows)
    (axes,) = sheet.axes
    assert sorted(bar.get_height() for bar in axes.patches) == [0.5, 0.9, 0.9]
    assert words(sheet).count("no data") == 1


def test_a_missing_bin_is_a_gap_in_a_histogram():
    columns = ["left", "right", "share", "trainable", "depth"]
    rows = [(0.0, 0.1, 0.5, "bn", 8), (0.1, 0.2, None, "bn", 8), (0.2, 0.3, 0.2, "bn", 8), (0.4, 0.5, 0.3, "bn", 8)]
    draw = figures.histograms(
        left="left", right="right", share="share", series="trainable", styles=STYLES, panel="depth",
        panel_title="ResNet-{}", xlabel="|γ|", ylabel="Share",
    )  # fmt: skip
    (axes,) = sheet_of(draw, rows, columns).axes
    outline = axes.lines[0].get_xydata()
    assert sorted(bar.get_height() for bar in axes.patches) == [0.2, 0.3, 0.5]
    assert [x for x, y in outline if math.isnan(y)] == [0.1, 0.2, 0.3]
    assert axes.get_title(loc="left") == "ResNet-8"


def test_panels_of_histograms_hold_the_highest_bar_of_all():
    columns = ["left", "right", "share", "trainable", "depth"]
    rows = [(0.0, 0.1, 0.1, "bn", 8), (0.0, 0.1, 0.9, "bn", 14), (0.0, 0.1, 0.3, "bn", 20)]
    draw = figures.histograms(
        left="left", right="right", share="share", series="trainable", styles=STYLES, panel="depth",
        panel_title="ResNet-{}", xlabel="|γ|", ylabel="Share",
    )  # fmt: skip
    for axes in sheet_of(draw, rows, columns).axes:
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top > 0.9


def test_each_value_of_the_panel_column_has_its_own_panel():
    quantiles = ("q05", "q25", "q50", "q75", "q95")
    columns = ["layer", "trainable", "depth", *quantiles]
    rows = [(layer, "bn", depth, 0.0, 0.1, 0.2, 0.3, 0.4) for depth in (8, 14, 20, 32) for layer in range(depth)]
    draw = figures.bands(
        x="layer", quantiles=quantiles, series="trainable", styles=STYLES, panel="depth", panel_title="ResNet-{}",
        xlabel="Layer", ylabel="|γ|", unit="",
    )  # fmt: skip
    sheet = sheet_of(draw, rows, columns)
    assert [axes.get_title(loc="left") for axes in sheet.axes] == [f"ResNet-{depth}" for depth in (8, 14, 20, 32)]
    assert [len(axes.lines[-2].get_xdata()) for axes in sheet.axes] == [8, 14, 20, 32]


def test_a_figure_without_a_reading_says_what_to_run():
    for rows in ([], [cell("bn", 8, None), cell("bn", 14, math.nan)]):
        for draw in (figures.curves(**CURVES), figures.bars(**ACCURACY)):
            said = words(sheet_of(draw, rows))
            assert "no data yet" in said
            assert "python study.py" in said


def test_the_papers_points_are_hollow_and_named_apart_from_ours():
    paper = [PaperPoint("bn", 8, 0.5, Standing.FOUND), PaperPoint("bn", 14, 0.6, Standing.DIGITISED)]
    sheet = sheet_of(figures.curves(**CURVES, paper=paper), [cell("bn", 8, 0.4), cell("bn", 14, 0.5)])
    (axes,) = sheet.axes
    hollow = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_markerfacecolor() == figures.GROUND]
    assert hollow == [[8, 0.5], [14, 0.6]]
    said = words(sheet)
    assert "measured" in said
    assert "paper (found)" in said
    assert "paper (≈, digitised)" in said


def test_series_that_nobody_styled_are_drawn_and_styled_ones_without_data_are_named():
    said = words(sheet_of(figures.curves(**CURVES), [cell("none", 8, 0.1), cell("all", 8, 0.9)]))
    assert "none" in said.splitlines()
    assert "not measured: BatchNorm" in said


def test_a_diverged_share_is_marked_and_no_share_is_not():
    rows = [cell("bn", 8, 0.5), cell("bn", 14, None, diverged=0.4)]
    assert "× 40 %" in words(sheet_of(figures.curves(**CURVES, diverged="diverged"), rows))
    assert "×" not in words(sheet_of(figures.curves(**CURVES, diverged="diverged"), rows[:1]))


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        ([("bn", 8, 0.5)], ["trainable", "dept", "accuracy"], "did you mean dept"),
        ([("bn", 8, 0.5), ("bn", 8, 0.6)], COLUMNS[:3], "several rows with one depth"),
        ([("bn", 8, "high")], COLUMNS[:3], "is no number"),
        ([("bn", None, 0.5)], COLUMNS[:3], "has no place"),
    ],
)
def test_an_answer_that_cannot_be_drawn_is_refused(rows, columns, says):
    with pytest.raises(Refusal, match=says):
        sheet_of(figures.curves(**CURVES), rows, columns)


# --- figures: small multiples and images -----------------------------------------------------------

RELATIVE = {
    "x": "rate",
    "y": "relative",
    "series": "norm",
    "styles": [Series("batch", "with BatchNorm", figures.BLUE), Series("none", "without", figures.VERMILION)],
    "panel": "batch",
    "xlabel": "step size",
    "ylabel": "new loss / old loss",
    "unit": "",
    "xscale": Scale.LOG,
    "yscale": Scale.LOG,
}
RELATIVE_COLUMNS = ["batch", "norm", "rate", "relative", "low", "high"]
CELLS = {"x": "channel", "y": "step", "value": "mean", "panel": "layer"} | dict.fromkeys(
    ("xlabel", "ylabel", "label"), ""
)
CELLS_COLUMNS = ["layer", "channel", "step", "mean"]


def relative(batch: str, norm: str, readings: dict[float, float | None]) -> list[tuple]:
    return [(batch, norm, rate, value, value and value / 2, value and value * 2) for rate, value in readings.items()]


def lines_of(axes: Any, colour: str) -> list[list[list[float]]]:
    """x and y of the lines of this colour that have no markers and are not dashed."""
    plain = [line for line in axes.lines if line.get_marker() == "None" and line.get_linestyle() == "-"]
    return [line.get_xydata().tolist() for line in plain if line.get_color() == colour]


def titles(sheet: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in sheet.axes]


def image_of(axes: Any) -> Any:
    (image,) = axes.images
    return image


@pytest.mark.parametrize("kind", ["panels", "heatmaps"])
def test_panels_stand_in_the_order_of_the_answer(kind):
    names = ["mini-batch 7", "mini-batch 1", "mini-batch 10", "mini-batch 4"]
    if kind == "panels":
        rows = [row for name in names for row in relative(name, "batch", {0.1: 1.0, 0.2: 2.0})]
        sheet = sheet_of(figures.panels(**RELATIVE), rows, RELATIVE_COLUMNS)
    else:
        rows = [(name, channel, 0, 1.0) for channel in range(3) for name in names]
        sheet = sheet_of(figures.heatmaps(**CELLS), rows, CELLS_COLUMNS)
    assert titles(sheet) == names


def test_at_most_three_panels_stand_in_a_row_on_a_common_axis():
    rows = [row for batch in range(7) for row in relative(f"b{batch}", "none", {0.1: 1.0, 0.2: 10.0**batch})]
    sheet = sheet_of(figures.panels(**RELATIVE, panel_title="after {}"), rows, RELATIVE_COLUMNS)
    assert titles(sheet) == [f"after b{batch}" for batch in range(7)]
    assert len({axes.get_position().x0 for axes in sheet.axes}) == 3
    assert len({axes.get_ylim() for axes in sheet.axes}) == 1


@pytest.mark.parametrize("gap", [0.0, -2.0, None, math.nan])
def test_what_has_no_place_on_a_log_axis_is_a_gap(gap):
    rows = relative("b1", "none", {0.1: 1.0, 0.2: 2.0, 0.3: gap, 0.4: 2.0, 0.5: 1.0, 0.0: 5.0})
    (axes,) = sheet_of(figures.panels(**RELATIVE), rows, RELATIVE_COLUMNS).axes
    (line,) = lines_of(axes, figures.VERMILION)
    assert [x for x, y in line if math.isnan(y)] == [0.0, 0.3]
    assert [y for _, y in line if not math.isnan(y)] == [1.0, 2.0, 2.0, 1.0]
    curve = figures.curves(**CURVES | {"unit": "", "along": Along.TIME}, yscale=Scale.LOG)
    (axes,) = sheet_of(curve, [("bn", x + 1, y) for x, y in enumerate([1, 2, gap, 2, 1])], COLUMNS[:3]).axes
    assert [x for x, y in lines_of(axes, figures.VERMILION)[0] if math.isnan(y)] == [3]


def test_a_band_whose_lower_end_is_not_above_zero_reaches_the_foot_of_a_log_axis():
    rows = [("b1", "none", rate, 1.0, low, 2.0) for rate, low in ((0.1, 0.5), (0.2, -1.0), (0.3, 0.5))]
    (axes,) = sheet_of(figures.panels(**RELATIVE, low="low", high="high"), rows, RELATIVE_COLUMNS).axes
    (band,) = axes.collections
    assert [x for x, y in band.get_paths()[0].vertices if y == -1.0] == [0.2]
    assert 0 < axes.get_ylim()[0] <= 0.5


@pytest.mark.parametrize("beyond", [1e6, 1e300, math.inf])
@pytest.mark.parametrize("yscale", Scale)
def test_a_line_that_leaves_the_top_is_cut_by_the_axes_and_not_before(beyond, yscale):
    rows = relative("b1", "none", {0.1: 1.0, 0.2: 0.5, 0.3: beyond})
    draw = figures.panels(**RELATIVE | {"yscale": yscale}, ylim=(None, 1e3), level=1.0)
    sheet = sheet_of(draw, rows, RELATIVE_COLUMNS)
    (axes,) = sheet.axes
    (line,) = lines_of(axes, figures.VERMILION)
    assert line[-1][0] == 0.3
    assert 1e3 < line[-1][1] < math.inf
    bottom, top = axes.get_ylim()
    assert top == 1e3
    assert -100 < bottom < 0.5  # what is cut off does not stretch the axis
    figures.svg(sheet, "relative")


def test_infinity_at_a_place_that_a_log_axis_lacks_is_a_gap():
    rows = relative("b1", "none", {0.0: math.inf, 0.1: 1.0, 0.2: 0.5})
    (axes,) = sheet_of(figures.panels(**RELATIVE, ylim=(None, 1e3)), rows, RELATIVE_COLUMNS).axes
    assert [math.isnan(y) for _, y in lines_of(axes, figures.VERMILION)[0]] == [True, False, False]


OVERFLOWED = "overflowed: infinite"


def triangles_of(axes: Any) -> list[tuple[str, float, float]]:
    """Colour, x in data and height in points above the top edge of the axes of every filled triangle."""
    height = axes.get_window_extent().y1
    return sorted(
        (line.get_color(), float(x), float(line.get_transform().transform((x, y))[1] - height) * 72 / axes.figure.dpi)
        for line in axes.lines
        if line.get_marker() == "^" and line.get_markerfacecolor() != figures.GROUND
        for x, y in line.get_xydata()
    )


def drawn_as(kind: str, rows: list[tuple], **changes: Any) -> Any:
    """The axes of a figure of this kind with these rows, columns as of `RELATIVE_COLUMNS`."""
    if kind == "panels":
        draw = figures.panels(**RELATIVE | {"low": "low", "high": "high"} | changes)
    elif kind == "bands":
        draw = figures.bands(
            x="rate", quantiles=("low", "low", "relative", "high", "high"), series="norm", styles=RELATIVE["styles"],
            panel="batch", panel_title="{}", xlabel="", ylabel="", unit="",
        )  # fmt: skip
    else:
        names = ("x", "y", "series", "styles", "xlabel", "ylabel", "unit", "yscale")
        own = {name: RELATIVE[name] for name in names} | {"low": "low", "high": "high", "scale": Scale.LOG}
        draw = figures.curves(**own | {"along": Along.GRID if kind == "grid" else Along.TIME} | changes)
    (axes,) = sheet_of(draw, rows, RELATIVE_COLUMNS).axes
    return axes


LINES = ["panels", "grid", "time", "bands"]
AXES = [
    (kind, {"yscale": yscale, "ylim": ylim})
    for kind in LINES[:3]
    for yscale in Scale
    for ylim in ((None, None), (None, 1e3), (0.1, None))
]


@pytest.mark.parametrize(("kind", "changes"), [*AXES, ("bands", {})])
def test_a_triangle_stands_at_every_infinite_reading_and_the_axis_is_that_of_the_finite_ones(kind, changes):
    readings = {0.1: 1.0, 0.2: math.inf, 0.3: 0.5, 0.4: math.nan, 0.5: None, 0.6: math.inf, 0.7: 2.0}
    other = relative("b1", "batch", {rate: 3.0 for rate in readings})
    axes = drawn_as(kind, relative("b1", "none", readings) + other, **changes)
    assert triangles_of(axes) == [(figures.VERMILION, 0.2, 0.0), (figures.VERMILION, 0.6, 0.0)]
    assert words(axes.figure).splitlines().count(OVERFLOWED) == 1
    finite = {rate: None if reading == math.inf else reading for rate, reading in readings.items()}
    without = drawn_as(kind, relative("b1", "none", finite) + other, **changes)
    assert axes.get_ylim() == without.get_ylim()
    assert axes.get_xlim() == without.get_xlim()
    assert triangles_of(without) == []
    assert OVERFLOWED not in words(without.figure)
    line = next(each for each in lines_of(axes, figures.VERMILION) if len(each) == len(readings) and each[0][1] == 1.0)
    top = axes.get_ylim()[1]
    assert [x for x, y in line if y > top] == [0.2, 0.6]  # the line leads there
    assert [x for x, y in line if math.isnan(y)] == [0.4, 0.5]
    figures.svg(axes.figure, "overflow")


@pytest.mark.parametrize(("kind", "changes"), [*AXES, ("bands", {})])
def test_a_band_without_an_upper_end_goes_on_to_the_top_of_the_axes(kind, changes):
    rows = [("b1", "none", rate, 1.0, 0.5, high) for rate, high in ((0.1, 2.0), (0.2, math.inf), (0.3, 1.5))]
    axes = drawn_as(kind, rows, **changes)
    (vertices,) = [
        path.vertices
        for each in axes.collections for path in each.get_paths() if len(path.vertices) > 2
    ]  # fmt: skip
    top = axes.get_ylim()[1]
    assert {x for x, y in vertices if y >= top} == {0.2}
    assert {y for x, y in vertices if x == 0.1} == {0.5, 2.0}
    assert triangles_of(axes) == [(figures.VERMILION, 0.2, 0.0)]
    closed = drawn_as(kind, [row if row[2] != 0.2 else (*row[:5], 1.0) for row in rows], **changes)
    assert axes.get_ylim() == closed.get_ylim()


@pytest.mark.parametrize("kind", LINES)
def test_a_series_of_which_all_readings_are_infinite_is_triangles_only(kind):
    rates = (0.1, 0.2, 0.3)
    rows = relative("b1", "none", dict.fromkeys(rates, math.inf)) + relative("b1", "batch", dict.fromkeys(rates, 2.0))
    axes = drawn_as(kind, rows)
    assert triangles_of(axes) == [(figures.VERMILION, rate, 0.0) for rate in rates]
    assert "without" in words(axes.figure).splitlines()
    top = axes.get_ylim()[1]
    assert top < 6
    assert all(y > top for line in lines_of(axes, figures.VERMILION) for x, y in line if x in rates)


@pytest.mark.parametrize("kind", LINES)
def test_an_axis_of_infinite_readings_alone_has_no_numbers(kind):
    axes = drawn_as(kind, relative("b1", "none", {0.1: math.inf, 0.2: math.inf}))
    assert [x for _, x, _ in triangles_of(axes)] == [0.1, 0.2]
    assert list(axes.get_yticks()) == []
    assert OVERFLOWED in words(axes.figure)


@pytest.mark.parametrize("kind", LINES)
def test_triangles_of_several_series_at_one_place_stand_one_below_the_other(kind):
    rows = relative("b1", "none", {0.1: 1.0, 0.2: math.inf}) + relative("b1", "batch", {0.1: math.inf, 0.2: math.inf})
    at = {(colour, x): height for colour, x, height in triangles_of(drawn_as(kind, rows))}
    assert sorted(at) == [(figures.BLUE, 0.1), (figures.BLUE, 0.2), (figures.VERMILION, 0.2)]
    assert at[figures.BLUE, 0.1] == at[figures.BLUE, 0.2] == 0
    assert at[figures.VERMILION, 0.2] == pytest.approx(-5)


@pytest.mark.parametrize("kind", LINES[:3])
def test_the_caller_may_say_what_a_band_is(kind):
    rows = relative("b1", "none", {0.1: 1.0, 0.2: 2.0})
    said = words(drawn_as(kind, rows, band="range of loss").figure)
    assert said.count("range of loss") == 1
    today = "low to high" if kind == "panels" else "measured, with interval over seeds"
    assert today in words(drawn_as(kind, rows).figure)
    assert "range of loss" not in words(drawn_as(kind, rows, band="range of loss", low=None, high=None).figure)


@pytest.mark.parametrize("yscale", Scale)
def test_a_bar_of_infinity_reaches_the_top_and_says_so(yscale):
    rows = [
        ("all", 8, 1.0, 0.5, 2.0), ("bn", 8, math.inf, 1.0, math.inf),
        ("all", 14, 3.0, 1.0, math.inf), ("bn", 14, None, None, None),
    ]  # fmt: skip
    draw = figures.bars(**ACCURACY | {"unit": ""}, yscale=yscale, low="low", high="high")
    (axes,) = sheet_of(draw, rows, COLUMNS[:5]).axes
    top = axes.get_ylim()[1]
    assert sorted(bar.get_y() + bar.get_height() for bar in axes.patches) == pytest.approx([1.0, 3.0, top])
    assert 3.0 < top < 6
    assert sorted(text.get_text().strip() for text in axes.texts) == ["inf", "no data"]
    assert [(colour, height) for colour, _, height in triangles_of(axes)] == [(figures.INK, 0.0)]  # of the whisker
    drawn = sheet_of(draw, [(*row[:2], *(None if v == math.inf else v for v in row[2:])) for row in rows], COLUMNS[:5])
    assert axes.get_ylim() == drawn.axes[0].get_ylim()


def test_bars_of_infinity_alone_have_no_numbers_beside_them():
    draw = figures.bars(**ACCURACY | {"unit": ""}, yscale=Scale.LOG)
    (axes,) = sheet_of(draw, [("bn", 8, math.inf), ("all", 8, math.inf)], COLUMNS[:3]).axes
    assert [bar.get_height() for bar in axes.patches] == [axes.get_ylim()[1]] * 2
    assert list(axes.get_yticks()) == []
    assert [text.get_text() for text in axes.texts] == ["inf", "inf"]


def test_lines_run_along_x_whatever_the_order_of_the_rows():
    rows = relative("b1", "none", {0.3: 3.0, 0.1: 1.0, 0.2: 2.0})
    (axes,) = sheet_of(figures.panels(**RELATIVE), rows, RELATIVE_COLUMNS).axes
    assert lines_of(axes, figures.VERMILION) == [[[0.1, 1.0], [0.2, 2.0], [0.3, 3.0]]]


def test_the_papers_points_land_in_their_panel_and_without_one_in_figures_without_panels():
    paper = [
        PaperPoint("none", 0.1, 0.5, Standing.DIGITISED, panel="b4"),
        PaperPoint("batch", 0.2, 0.7, Standing.FOUND, panel="b7"),
        PaperPoint("none", 0.3, 0.9, Standing.CODE),
    ]
    rows = relative("b4", "none", {0.1: 1.0, 0.2: 2.0}) + relative("b1", "none", {0.1: 1.0, 0.2: 2.0})
    sheet = sheet_of(figures.panels(**RELATIVE, paper=paper), rows, RELATIVE_COLUMNS)

    def hollow(axes: Any) -> list[list[float]]:
        return [line.get_xydata()[0].tolist() for line in axes.lines if line.get_markerfacecolor() == figures.GROUND]

    assert dict(zip(titles(sheet), map(hollow, sheet.axes), strict=True)) == {
        "b4": [[0.1, 0.5]], "b1": [], "b7": [[0.2, 0.7]],
    }  # fmt: skip
    said = words(sheet).splitlines()
    assert {"without", "with BatchNorm", "paper (≈, digitised)", "paper (found)"} <= set(said)
    assert "not measured: with BatchNorm" in said
    plain = figures.curves(**CURVES | {"unit": "", "styles": RELATIVE["styles"]}, paper=paper)
    (axes,) = sheet_of(plain, [("none", 0.1, 1.0)], COLUMNS[:3]).axes
    assert hollow(axes) == [[0.3, 0.9]]


def test_a_level_is_one_dashed_line_across_every_panel():
    rows = relative("b4", "none", {0.1: 3.0, 0.2: 2.0}) + relative("b1", "none", {0.1: 3.0, 0.2: 2.0})
    for axes in sheet_of(figures.panels(**RELATIVE, level=1.0), rows, RELATIVE_COLUMNS).axes:
        (level,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert list(level.get_ydata()) == [1.0, 1.0]
        assert axes.get_ylim()[0] < 1.0


def test_a_missing_cell_of_an_image_is_blank_whatever_it_lacks():
    lacks = {(1, 0): None, (2, 0): math.nan, (3, 0): math.inf, (4, 1): -math.inf}
    rows = [("l", c, s, lacks.get((c, s), 1.0)) for c in range(8) for s in range(2) if (c, s) != (5, 1) and c != 6]
    sheet = sheet_of(figures.heatmaps(**CELLS), rows, CELLS_COLUMNS)
    (axes,) = sheet.axes
    cells = image_of(axes).get_array()
    blank = {(c, s) for s, row in enumerate(cells.mask) for c, is_blank in enumerate(row) if is_blank}
    assert cells.shape == (2, 8)
    assert blank == {*lacks, (5, 1), (6, 0), (6, 1)}  # no row of channel 6 at all: a column all the same
    assert (cells.compressed() == 1.0).all()
    assert "no reading" in words(sheet)
    assert "no reading" not in words(sheet_of(figures.heatmaps(**CELLS), [("l", 0, 0, 1.0)], CELLS_COLUMNS))


def test_cells_lie_where_their_numbers_say_and_rows_run_downwards():
    rows = [("l", layer, step / 10, layer + step) for step in (2, 0, 1) for layer in (18, 6, 30)]
    (axes,) = sheet_of(figures.heatmaps(**CELLS), rows, CELLS_COLUMNS).axes
    assert image_of(axes).get_array().tolist() == [[6, 18, 30], [7, 19, 31], [8, 20, 32]]
    assert image_of(axes).get_extent() == pytest.approx([0, 36, 0.25, -0.05])


@given(some.lists(some.one_of(some.integers(-300, 300), some.floats(0, 1)), min_size=1, max_size=12))
def test_every_number_keeps_a_place_of_its_own_along_an_image(places):
    ruler = heat.Ruler(np.array(places, dtype=float))
    index = ruler.index(np.array(places, dtype=float))
    assert ruler.places[index].tolist() == [float(place) for place in places]
    assert index.max() < ruler.count
    assert ruler.edges[0] < ruler.edges[1]


@pytest.mark.parametrize(
    ("readings", "limits", "two_signs"),
    [
        ([-3.0, 1.0], (-3, 3), True),
        ([-0.5, 2.0, math.inf], (-2, 2), True),
        ([-3.0, -1.0], (-3, 3), True),
        ([1e-9, 4.0], (0, 4), False),
        ([0.9, 1.0], (0.9, 1.0), False),
        ([7.0, 7.0], (0, 7), False),
        ([0.0, 0.0], (0, 1), False),
        ([-1e38, 5.6e37], (-1e38, 1e38), True),
    ],
)
def test_each_image_has_the_colours_of_its_own_readings(readings, limits, two_signs):
    rows = [("other", 0, 0, 1e3)] + [("own", channel, 0, value) for channel, value in enumerate(readings)]
    sheet = sheet_of(figures.heatmaps(**CELLS), rows, CELLS_COLUMNS)
    image = image_of(sheet.axes[1])
    assert image.get_clim() == limits
    assert (image.get_cmap().name == heat.TWO_SIGNS) == two_signs
    (bar,) = sheet.axes[1].child_axes
    assert bar.get_ylim() == limits
    assert image_of(sheet.axes[0]).get_clim() == (0, 1e3)


def maps(layers: int, images: int, classes: int) -> list[tuple]:
    return [
        (f"layer {layer}", k, i, math.sin(7 * i * k + layer) * 10.0**-layer)
        for layer in range(layers) for i in range(images) for k in range(classes)
    ]  # fmt: skip


@pytest.mark.parametrize(("images", "classes"), [(128, 10), (64, 11)])
def test_an_image_makes_a_small_file_without_others_beside_it(images, classes):
    rows = maps(1, images, classes)
    drawn = figures.svg(sheet_of(figures.heatmaps(**CELLS), rows, CELLS_COLUMNS), "a")
    assert len(drawn) < 50_000
    targets = re.findall(r'xlink:href="([^"]*)"', drawn)
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert sum(target.startswith("data:") for target in targets) == 2  # the cells and the bar


def test_the_same_answer_draws_the_same_bytes_of_panels_and_images():
    rows = relative("b4", "none", {0.1: 3.0, 0.2: 2.0}) + relative("b1", "none", {0.1: 3.0, 0.2: 2.0})
    for draw, answer, columns in (
        (figures.panels(**RELATIVE, low="low", high="high"), rows, RELATIVE_COLUMNS),
        (figures.heatmaps(**CELLS), maps(3, 8, 4), CELLS_COLUMNS),
    ):
        first, second = (figures.svg(sheet_of(draw, answer, columns), "a") for _ in range(2))
        assert first == second


def test_the_page_leaves_the_colours_of_images_alone_and_tells_equal_images_apart():
    rows = [("first", 0, 0, 1.0), ("first", 1, 1, 0.5), ("second", 0, 0, 1.0), ("second", 1, 1, 0.5)]
    drawing = figure(figures.heatmaps(**CELLS), query="cells")
    inline = str(page._inline(figures.svg(sheet_of(drawing.draw, rows, CELLS_COLUMNS), "cells"), drawing))
    ids = re.findall(r'\bid="([^"]+)"', inline)
    assert len(ids) == len(set(ids))
    assert inline.count("data:image/png;base64,") == 4
    assert "var(--ink)" in inline
    assert heat.MISSING["facecolor"] in inline
    neutral = {figures.INK, figures.MUTED, figures.RULE, figures.GROUND}
    assert neutral.isdisjoint({heat.MISSING["facecolor"], heat.MISSING["edgecolor"]})
    for name in (heat.ONE_SIGN, heat.TWO_SIGNS):
        assert neutral.isdisjoint(map(to_hex, matplotlib.colormaps[name](range(256))))


@pytest.mark.parametrize(
    ("draw", "rows", "columns", "says"),
    [
        (figures.panels(**RELATIVE), [("b", "n", 1, 1.0)], ["bach", *RELATIVE_COLUMNS[1:4]], "did you mean bach"),
        (figures.panels(**RELATIVE, low="lo"), [("b", "n", 1, 1, 1, 1)], RELATIVE_COLUMNS, "column lo: "),
        (figures.panels(**RELATIVE), [("b", "n", 1, v, 0, 0) for v in (1, 2)], RELATIVE_COLUMNS, "rows with one rate"),
        (figures.heatmaps(**CELLS), [("l", 1, 1, 1.0)], ["lay", *CELLS_COLUMNS[1:]], "did you mean lay"),
        (figures.heatmaps(**CELLS), [("l", 1, 1, v) for v in (1, 2)], CELLS_COLUMNS, "l has several rows with one"),
        (figures.heatmaps(**CELLS), [("l", None, 1, 1.0)], CELLS_COLUMNS, "has no place"),
        (figures.heatmaps(**CELLS), [("l", 1, "a", 1.0)], CELLS_COLUMNS, "is no number"),
    ],
)
def test_panels_and_images_refuse_what_they_cannot_draw(draw, rows, columns, says):
    with pytest.raises(Refusal, match=says):
        sheet_of(draw, rows, columns)


def test_panels_and_images_without_a_reading_say_what_to_run():
    nothing = PaperPoint("none", 0.1, 0.5, Standing.FOUND, panel="b4")
    for rows in ([], [("b", 1, 1, None, None, None)]):
        assert "no data yet" in words(
            sheet_of(figures.panels(**RELATIVE, paper=[nothing], level=1.0), rows, RELATIVE_COLUMNS)
        )
    for rows in ([], [("l", 1, 1, None)], [("l", 1, 1, math.inf)]):
        assert "no data yet" in words(sheet_of(figures.heatmaps(**CELLS), rows, CELLS_COLUMNS))


def test_bars_on_a_log_axis_stand_on_its_foot_and_what_has_no_place_there_says_so():
    paper = [PaperPoint("bn", "layer 90", 40.7, Standing.MEMORY)]
    rows = [("bn", "layer 18", 250.0), ("bn", "layer 90", 40.0), ("all", "layer 18", 1.7), ("all", "layer 90", 0.0)]
    sheet = sheet_of(figures.bars(**ACCURACY | {"unit": ""}, yscale=Scale.LOG, paper=paper), rows, COLUMNS[:3])
    (axes,) = sheet.axes
    foot = axes.get_ylim()[0]
    assert 0 < foot < 1.7
    assert {bar.get_y() for bar in axes.patches} == {foot}
    assert sorted(bar.get_y() + bar.get_height() for bar in axes.patches) == pytest.approx([1.7, 40, 250])
    assert [text.get_text().strip() for text in axes.texts] == ["0"]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_markerfacecolor() == figures.GROUND] == [40.7]


@pytest.mark.parametrize(
    ("groups", "stand"),
    [
        (["layer 90", "layer 18", "layer 100"], ["layer 90", "layer 18", "layer 100"]),
        ([90, 18, 100], ["18", "90", "100"]),
    ],
)
def test_groups_of_bars_are_sorted_where_they_are_numbers_and_stand_as_they_appear_where_text(groups, stand):
    (axes,) = sheet_of(figures.bars(**ACCURACY), [("bn", group, 0.5) for group in groups], COLUMNS[:3]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == stand


def test_a_histogram_on_a_log_axis_fills_each_share_from_its_foot():
    columns = ["left", "right", "share", "trainable", "depth"]
    rows = [(0.0, 0.1, 0.5, "bn", "b"), (0.1, 0.2, 0.0, "bn", "b"), (0.2, 0.3, 1e-4, "bn", "b"), (0, 1, 0.3, "bn", "a")]
    draw = figures.histograms(
        left="left", right="right", share="share", series="trainable", styles=STYLES, panel="depth",
        panel_title="{}", xlabel="|γ|", ylabel="Share", yscale=Scale.LOG,
    )  # fmt: skip
    sheet = sheet_of(draw, rows, columns)
    assert titles(sheet) == ["b", "a"]
    axes = sheet.axes[0]
    foot = axes.get_ylim()[0]
    assert 0 < foot < 1e-4
    assert [bar.get_y() + bar.get_height() for bar in axes.patches] == pytest.approx([0.5, 1e-4])
    assert {bar.get_y() for bar in axes.patches} == {foot}


def test_many_rates_have_a_tick_each_and_labels_that_do_not_touch():
    rates = [digit * 10.0**power for power in range(-5, 1) for digit in (1, 2, 3, 5)]
    rows = [cell("bn", rate, 0.5 if rate < 0.3 else None, 0.0 if rate < 0.3 else 1.0) for rate in rates]  # type: ignore[arg-type]
    sheet = sheet_of(figures.curves(**CURVES, diverged="diverged"), rows)
    sheet.draw_without_rendering()
    (axes,) = sheet.axes
    assert axes.get_xticks() == pytest.approx(sorted(rates))
    assert axes.get_xlim()[1] > 5  # a rate at which all diverged has its place
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    assert {"1e−5", "1e−4", "0.001", "0.01", "0.1", "1"} <= {label.get_text() for label in labels}
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (-2e-4, "−2e−4"), (1e-5, "1e−5"), (250, "250"), (1.5e6, "1.5e6"), (-3.9e3, "−3900")],
)
def test_numbers_on_axes_are_short(value, text):
    assert look.short(value) == text


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figures.svg(sheet_of(figures.curves(**CURVES), [cell("bn", 8, 0.5)]), "accuracy")
    assert dict(matplotlib.rcParams) == before


def test_the_same_answer_draws_the_same_bytes():
    rows = [cell("all", 8, 0.9), cell("bn", 8, 0.5)]
    first, second = (
        figures.svg(sheet_of(figures.curves(**CURVES, low="low", high="high"), rows), "a") for _ in range(2)
    )
    assert first == second


@given(some.lists(some.floats(0, 1), min_size=1, max_size=8))
def test_labels_stand_apart_in_order_and_move_only_where_they_must(heights):
    gap = 0.1
    placed = look.spread(heights, gap)
    in_order = [placed[index] for index in sorted(range(len(heights)), key=lambda index: heights[index])]
    assert all(above - below > gap - 1e-9 for below, above in pairwise(in_order))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in placed)
    ranked = sorted(heights)
    if all(above - below > gap for below, above in pairwise(ranked)):
        assert placed == heights


# --- figures: ridges -------------------------------------------------------------------------------

RIDGES = {
    "left": "left", "right": "right", "share": "share", "series": "norm", "styles": RELATIVE["styles"],
    "panel": "layer", "over": "step", "panel_title": "layer {}", "xlabel": "activation", "ylabel": "training step",
}  # fmt: skip
RIDGES_COLUMNS = ["layer", "norm", "step", "left", "right", "share"]


def binned(layer: int, step: Any, edges: list[float], shares: list[float | None], norm: str = "none") -> list[tuple]:
    return [(layer, norm, step, a, b, share) for (a, b), share in zip(pairwise(edges), shares, strict=True)]


def area(outline: Any) -> float:
    x, y = outline.get_xy().T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def feet(axes: Any) -> list[float]:
    """Where each outline stands, from the first drawn, at the back, to the last."""
    return [float(outline.get_xy()[:, 1].min()) for outline in axes.patches]


shares_of = some.lists(some.floats(0.01, 1), min_size=1, max_size=8)


@given(some.lists(some.tuples(shares_of, some.floats(0.1, 10)), min_size=1, max_size=5))
def test_the_area_of_a_ridge_is_its_share_whatever_the_width_of_its_bins(distributions):
    rows = []
    for step, (weights, width) in enumerate(distributions):
        edges = [width * place**1.5 for place in range(len(weights) + 1)]  # each bin wider than the last
        rows += binned(3, step, edges, [weight / sum(weights) for weight in weights])
    (axes,) = sheet_of(figures.ridges(**RIDGES), rows, RIDGES_COLUMNS).axes
    areas = [area(outline) for outline in axes.patches]
    assert areas == pytest.approx([areas[0]] * len(distributions))
    heights = [float(np.ptp(outline.get_xy()[:, 1])) for outline in axes.patches]
    assert max(heights) == pytest.approx(ridges.TALLEST)


def test_ridges_run_from_the_top_down_and_each_stands_in_front_of_those_before_it():
    rows = [row for step in (500, 0, 10000, 1000) for row in binned(3, step, [0, 1, 2], [0.4, 0.6])]
    (axes,) = sheet_of(figures.ridges(**RIDGES, over_label="{:,}"), rows, RIDGES_COLUMNS).axes
    assert feet(axes) == [3, 2, 1, 0]
    assert [outline.get_facecolor()[3] for outline in axes.patches] == [1] * 4  # opaque
    assert list(axes.get_yticks()) == [3, 2, 1, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "500", "1,000", "10,000"]


def test_ridges_of_several_series_are_translucent_and_named():
    rows = binned(3, 0, [0, 1], [1.0], "none") + binned(3, 0, [0, 2], [1.0], "batch")
    sheet = sheet_of(figures.ridges(**RIDGES), rows, RIDGES_COLUMNS)
    assert all(0 < outline.get_facecolor()[3] < 1 for outline in sheet.axes[0].patches)
    assert {"without", "with BatchNorm"} <= set(words(sheet).splitlines())
    alone = sheet_of(figures.ridges(**RIDGES), rows[:1], RIDGES_COLUMNS)
    assert "not measured: with BatchNorm" in words(alone)


def test_a_missing_bin_or_ridge_is_a_gap_and_an_empty_bin_is_none():
    rows = binned(3, 0, [0, 1, 2, 3], [0.5, None, 0.5]) + binned(3, 10, [0, 1, 2, 3], [0.5, 0.0, 0.5])
    rows += binned(3, 20, [0, 1], [None]) + binned(9, 20, [0, 1], [1.0]) + binned(3, 30, [0, 1], [1.0])
    three, nine = sheet_of(figures.ridges(**RIDGES), rows, RIDGES_COLUMNS).axes
    assert feet(three) == [3, 3, 2, 0]
    assert feet(nine) == [1]
    assert [(float(o.get_xy()[:, 0].min()), float(o.get_xy()[:, 0].max())) for o in three.patches] == [
        (0, 1), (2, 3), (0, 3), (0, 1),
    ]  # fmt: skip
    assert titles(three.figure) == ["layer 3", "layer 9"]


def test_the_common_axis_of_ridges_holds_nearly_all_of_each_and_no_outlier_stretches_it():
    rows = binned(3, 0, [-1, 0, 1, 1000], [0.5, 0.4999, 0.0001]) + binned(9, 10, [-4, 4], [1.0])
    rows += binned(9, 0, [-5, -4, 0, 1e6], [0.01, 0.98995, 0.00005])  # far more than 0.1 % lies below -4
    sheet = sheet_of(figures.ridges(**RIDGES), rows, RIDGES_COLUMNS)
    (low, high), other = (axes.get_xlim() for axes in sheet.axes)
    assert (low, high) == other
    assert -5.3 < low < -4.9
    assert 3.9 < high < 4.5


@given(some.lists(some.floats(0, 1), min_size=1, max_size=12), some.floats(1e-3, 1e3))
def test_what_an_axis_of_ridges_holds_is_99_9_per_cent_of_each(weights, width):
    edges = np.arange(len(weights) + 1) * width
    ridge = ridges.Ridge.of(edges[:-1], edges[1:], np.array(weights), "right")
    low, high = ridge.held
    if not sum(weights):
        assert math.isnan(low)
        return
    mass = np.append(0, np.cumsum(weights)) / sum(weights)
    held = np.interp(high, edges, mass) - np.interp(low, edges, mass)
    assert held == pytest.approx(ridges.HELD, abs=1e-6)


def test_a_bin_without_width_is_a_line_that_has_no_say_in_the_heights_of_others():
    rows = [*binned(3, 0, [0, 1], [1.0]), (3, "none", 10, 0.5, 0.5, 1.0), (3, "none", 20, 0.5, 0.5, 0.0)]
    (axes,) = sheet_of(figures.ridges(**RIDGES), rows, RIDGES_COLUMNS).axes
    assert feet(axes) == [2]
    assert [path.vertices.tolist() for each in axes.collections for path in each.get_paths()] == [
        [[0.5, 1.0], [0.5, 1.0 + ridges.TALLEST]]
    ]


@pytest.mark.parametrize(("panels", "steps"), [(1, 1), (1, 31), (4, 12), (7, 31), (2, 200)])
def test_labels_of_ridges_do_not_touch_and_no_ridge_leaves_its_panel(panels, steps):
    rows = [row for p in range(panels) for step in range(steps) for row in binned(p, 500 * step, [0, 1, 2], [0.9, 0.1])]
    sheet = sheet_of(figures.ridges(**RIDGES), rows, RIDGES_COLUMNS)
    sheet.draw_without_rendering()
    assert len(sheet.axes) == panels
    for axes in sheet.axes:
        labels = [label for label in axes.get_yticklabels() if label.get_text() and label.get_visible()]
        boxes = [label.get_window_extent() for label in labels]
        assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))
        low, high = axes.get_ylim()
        assert all(low < y < high for outline in axes.patches for y in outline.get_xy()[:, 1])
    shown = [label.get_text() for label in sheet.axes[0].get_yticklabels() if label.get_text()]
    assert shown[0] == "0"
    assert len(shown) >= min(steps, 8)


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        (binned(3, 0, [0, 1], [1.0]), ["layr", *RIDGES_COLUMNS[1:]], "did you mean layr"),
        (binned(3, 0, [0, 1], [1.0]) * 2, RIDGES_COLUMNS, "none, 0 has several rows with one left"),
        (binned(3, None, [0, 1], [1.0]), RIDGES_COLUMNS, "column step: a row without it"),
        (binned(3, math.nan, [0, 1], [1.0]), RIDGES_COLUMNS, "column step: a row without it"),
        (binned(3, 0, [0, math.inf], [1.0]), RIDGES_COLUMNS, "column right: a row without it"),
        (binned(3, 0, [1, 0], [1.0]), RIDGES_COLUMNS, "column right: a bin from 1 to 0 ends before it begins"),
    ],
)
def test_ridges_refuse_what_they_cannot_draw(rows, columns, says):
    with pytest.raises(Refusal, match=says):
        sheet_of(figures.ridges(**RIDGES), rows, columns)


def test_ridges_without_a_reading_say_what_to_run_and_the_same_answer_draws_the_same_bytes():
    assert "no data yet" in words(sheet_of(figures.ridges(**RIDGES), binned(3, 0, [0, 1], [None]), RIDGES_COLUMNS))
    rows = binned(3, 0, [0, 1, 2], [0.5, 0.5]) + binned(9, 0, [0, 1, 2], [0.5, 0.5])
    first, second = (figures.svg(sheet_of(figures.ridges(**RIDGES), rows, RIDGES_COLUMNS), "a") for _ in range(2))
    assert first == second


# --- the page -------------------------------------------------------------------------------------

EVIL = "<script>alert('bn')</script>"

SQL = """\
-- name: deepest
-- one row
select 0.82 as measured, 0.81 as low, 0.83 as high, 5 as n;

-- name: accuracy
-- one row per trainable set and depth, where a < b
select * from (values ('bn', 8, 0.5), ('<script>alert(''bn'')</script>', 8, 0.6)) as t (trainable, depth, accuracy)
where depth < 100;

-- name: later
select * from (values ('bn', 8, 0.5)) as t (trainable, depth, accuracy) where false;
"""


def written(folder: Path, session: Session, **changes: Any) -> str:
    found = queries(SQL)
    arguments: dict[str, Any] = {
        "title": f"How far? {EVIL}",
        "doc": f"How far? {EVIL}\n\n    After a paper {EVIL}.\n\n    Question     What {EVIL}\n",
        "preset": "laptop",
        "run": "python studies/x.py",
        "claims": [judge(claim(sentence=f"It is so. {EVIL}"), session, found)],
        "figures": [
            figure(figures.curves(**CURVES), caption=f"Mean. {EVIL}"),
            figure(figures.curves(**CURVES), query="later"),
        ],
        "session": session,
        "queries": found,
        "provenance": {"Data": "digits", "Hosts": EVIL},
        "notes": [f"Measured on digits. {EVIL}"],
        "damaged": [f"part-0.parquet: truncated {EVIL}"],
    }
    return page.write(folder, **arguments | changes).read_text()


class Links(HTMLParser):
    """Everything in a page that a browser would load or run, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        loading = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.targets += [value or "" for name, value in attrs if name in loading]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_but_itself_and_links_only_to_files_beside_it(tmp_path, session):
    html = written(tmp_path, session)
    links = Links(html)
    assert links.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "img", "base"})
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert any(target.startswith("#") for target in links.targets)
    for target in links.targets:
        assert target.startswith("#") or (tmp_path / target).is_file(), target


def test_every_drawing_refers_to_its_own_shapes(tmp_path, session):
    html = written(tmp_path, session)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_text_from_data_stays_text(tmp_path, session):
    html = written(tmp_path, session)
    assert "<script" not in html
    assert Links(html).text.count(EVIL) >= 9  # title, heading, doc, claim, caption, data, provenance, note, damaged


def test_the_sql_behind_every_figure_and_claim_is_in_the_page_and_beside_it(tmp_path, session):
    text = Links(written(tmp_path, session)).text
    for query in queries(SQL).values():
        assert query.text in text
    assert page.PROVENANCE in text
    beside = queries((tmp_path / "queries.sql").read_text())
    assert beside == queries(SQL)


def test_the_page_shows_claim_numbers_band_standing_and_verdict(tmp_path, session):
    text = Links(written(tmp_path, session)).text
    for said in ("82 %", "found", "82.0 %", "81.0–83.0", "78–86 %", "reproduced", "Four points either way."):
        assert said in text


def test_every_figure_lies_beside_the_page_as_png_and_svg(tmp_path, session):
    written(tmp_path, session)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy.png", "accuracy.svg", "later.png", "later.svg", "queries.sql", "report.html",
    ]  # fmt: skip
    png = (tmp_path / "accuracy.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20]) > 1500
    assert "http://www.w3.org/2000/svg" in (tmp_path / "accuracy.svg").read_text()


def test_a_report_that_cannot_be_finished_leaves_the_last_one_whole(tmp_path, session, monkeypatch):
    written(tmp_path, session)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "fsync", full)
    with pytest.raises(Refusal, match="No space left on device"):
        written(tmp_path, session, preset="paper")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_that_cannot_be_written_is_refused(tmp_path, session):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="choose another folder"):
        written(tmp_path / "file" / "report", session)


def test_two_figures_of_one_query_are_refused_before_anything_is_written(tmp_path, session):
    with pytest.raises(Refusal, match="two figures"):
        written(tmp_path / "report", session, figures=[figure(figures.curves(**CURVES))] * 2)
    assert not (tmp_path / "report").exists()


def test_a_docstring_keeps_its_terms_and_its_columns():
    doc = """Title

    Words that
    run on.

    Question     Freeze every weight.
                 And then?
    Refuted by   a curve that falls.

        python x.py plan      hours
        python x.py           runs
    """
    assert page.paragraphs(doc, "Title") == [
        page.Paragraph("text", "Words that run on."),
        page.Paragraph(
            "terms", terms=[("Question", "Freeze every weight. And then?"), ("Refuted by", "a curve that falls.")]
        ),
        page.Paragraph("lines", "python x.py plan      hours\npython x.py           runs"),
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_shows_every_claim_whole_in_plain_lines(session, width):
    judged = [
        measured(session, "select 0.8012 as measured, 0.7949 as low, 0.8101 as high, 5 as n"),
        measured(session, "select null as measured, 1 as n", standing=Standing.DIGITISED),
        measured(
            session,
            "select -0.2 as measured, -0.31 as low, -0.1 as high, 5 as n",
            unit="pt",
            paper=None,
            band=(0.1, math.inf),
        ),
    ]
    file = io.StringIO()
    Console(file=file, width=width).print(page.terminal(judged))
    said = file.getvalue()
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= width
    for part in ("80.1 %", "79.5–81.0", "1 of 3", "≈, digitised", "−31.0 to −10.0", "at least +10 pt", *Verdict):
        assert part in said
    assert "…" not in said


# --- provenance -----------------------------------------------------------------------------------


def test_provenance_counts_every_planned_trial_once_and_no_other(session):
    session.database.execute(
        "create table trials (trial text, outcome text, data_title text, commit text, bnscale text, python text, "
        "torch text, ray text, deepspeed text, host text, device text, precision text, seconds double, workers int, "
        "started timestamptz, ended timestamptz)"
    )
    session.database.execute("create table plan (depth int, trial text)")
    start = datetime.datetime(2026, 11, 20, 10, tzinfo=datetime.UTC)
    for index, outcome in enumerate(["finished", "finished", "diverged", "failed", None, "finished"]):
        values = [
            f"t{index}",
            outcome,
            "digits",
            "3f9c2d1+",
            "0.1.0",
            "3.12",
            "2.15.0",
            "2.60.0",
            None,
            f"node{index % 2}",
        ]
        values += ["cpu", "fp32", 1800.0, 2, start, None if outcome is None else start + datetime.timedelta(hours=3)]
        session.database.execute(f"insert into trials values ({', '.join('?' * len(values))})", values)
    for trial in ("t0", "t1", "t2", "t3", "t4", "t4", "not_begun"):  # t5 is another study's
        session.database.execute("insert into plan values (8, ?)", [trial])
    told = page.provenance(session, "results")  # type: ignore[arg-type]
    assert told["Trials"] == "6 planned: 2 finished, 1 diverged, 1 failed, 1 unfinished, 1 missing"
    assert told["Training time"] == "2.5 h (5.0 h counting each worker)"
    assert told["When"] == "2026-11-20 10:00 UTC to 2026-11-20 13:00 UTC"
    assert told["Hosts"] == "node0, node1"
    assert told["Store"] == "results"
    assert told["Data"] == "digits"
    assert "not committed" in told["Commit"]
    assert "deepspeed" not in told["Versions"]

    session.database.execute("delete from trials")
    assert page.provenance(session, "results")["Trials"] == "6 planned: 6 missing"  # type: ignore[arg-type]


def test_queries_that_need_each_other_are_refused():
    with pytest.raises(Refusal, match="query a: needs itself by way of a, b"):
        queries("-- name: a\nselect * from b\n-- name: b\nselect * from a\n")
