"""The report of a study: one HTML file that opens with no network, its figures and its SQL beside it."""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from bnscale.report import figures as drawing
from bnscale.report.claims import Judged, Query, Verdict, tally
from bnscale.report.figures import Figure
from bnscale.trial import Refusal

if TYPE_CHECKING:
    from bnscale.query import Answer, Session

ROWS_SHOWN = 400  # rows of a figure's table in the page; the SQL beside it gives them all

PROVENANCE = """\
-- Where the numbers come from: one row for the whole study.
with planned as (
    -- one row per trial of the study
    select distinct trial from plan
),
begun as (
    -- one row per trial of the study; all NULL where it has not begun
    select trials.*
    from planned
    left join trials on trials.trial = planned.trial
)
select
    count(*) as planned,
    count(*) filter (where outcome = 'finished') as finished,
    count(*) filter (where outcome = 'diverged') as diverged,
    count(*) filter (where outcome = 'failed') as failed,
    count(*) filter (where trial is not null and outcome is null) as unfinished,
    count(*) filter (where trial is null) as missing,
    string_agg(distinct data_title, ', ' order by data_title) as data,
    string_agg(distinct "commit", ', ' order by "commit") as commits,
    string_agg(distinct bnscale, ', ' order by bnscale) as bnscale,
    string_agg(distinct python, ', ' order by python) as python,
    string_agg(distinct torch, ', ' order by torch) as torch,
    string_agg(distinct ray, ', ' order by ray) as ray,
    string_agg(distinct deepspeed, ', ' order by deepspeed) as deepspeed,
    string_agg(distinct host, ', ' order by host) as hosts,
    string_agg(distinct device, ', ' order by device) as devices,
    string_agg(distinct "precision", ', ' order by "precision") as precisions,
    sum(seconds) as seconds,
    sum(seconds * workers) as worker_seconds,
    epoch(min(started)) as first_start,
    epoch(max(ended)) as last_end
from begun"""


def provenance(session: Session, store: str) -> dict[str, str]:
    """What the numbers rest on, label to text. `session` carries the study's relation `plan` with a column `trial`."""
    (row,) = session.sql(PROVENANCE).dicts()

    def said(name: str) -> str:
        return str(row[name]) if row[name] else "–"

    counts = [
        f"{row[name]} {name}" for name in ("finished", "diverged", "failed", "unfinished", "missing") if row[name]
    ]
    versions = [
        f"{name} {row[name]}" for name in ("bnscale", "python", "torch", "ray", "deepspeed") if row[name] is not None
    ]
    commits = said("commits")
    spent = _duration(row["seconds"])
    if row["seconds"] and row["worker_seconds"] and row["worker_seconds"] > row["seconds"]:
        spent += f" ({_duration(row['worker_seconds'])} counting each worker)"
    when = "–"
    if row["first_start"] is not None:
        ends = [row["first_start"], row["first_start"] if row["last_end"] is None else row["last_end"]]
        when = " to ".join(
            dict.fromkeys(datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%d %H:%M UTC") for end in ends)
        )
    return {
        "Data": said("data"),
        "Trials": f"{row['planned']} planned: {', '.join(counts) or 'none'}",
        "Training time": spent,
        "When": when,
        "Commit": commits + (" (+: with changes that were not committed)" if "+" in commits else ""),
        "Versions": ", ".join(versions) or "–",
        "Hosts": said("hosts"),
        "Devices": said("devices"),
        "Precision": said("precisions"),
        "Store": store,
    }


def write(
    folder: str | Path,
    *,
    title: str,
    doc: str,
    preset: str,
    run: str,
    claims: Sequence[Judged],
    figures: Sequence[Figure],
    session: Session,
    queries: Mapping[str, Query],
    provenance: Mapping[str, str],
    notes: Sequence[str],
    damaged: Sequence[str],
) -> Path:
    """Writes `report.html`, `queries.sql` and a PNG and an SVG a figure into `folder`; returns the page's path.

    `run` is the command that trains what is missing; a figure without data names it. `notes` stand at the top:
    say there where the data set is not the paper's. `damaged` lists what could not be read. Each file is replaced
    whole. Raises `Refusal` where the folder cannot be written or two figures draw one query.
    """
    names = [figure.query for figure in figures]
    for name in names:
        if names.count(name) > 1:
            raise Refusal(f"query {name}: drawn by two figures, and names the files of each; give each its own query")
    drawn = [_draw(number, figure, session, queries[figure.query], run) for number, figure in enumerate(figures, 1)]
    used = dict.fromkeys([*names, *(each.claim.query for each in claims)])
    html = _template().render(
        title=title,
        doc=paragraphs(doc, title),
        preset=preset,
        run=run,
        when=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        claims=claims,
        tally=tally(list(claims)),
        verdicts=Verdict,
        strip=strip,
        queries=queries,
        figures=drawn,
        provenance=provenance,
        provenance_sql=PROVENANCE,
        notes=notes,
        damaged=damaged,
        colours={"ink": drawing.INK, "muted": drawing.MUTED, "rule": drawing.RULE, "card": drawing.GROUND},
    )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for each in drawn:
            _replace(folder / f"{each.figure.query}.png", each.png)
            _replace(folder / f"{each.figure.query}.svg", each.svg.encode())
        sql = "\n\n".join(f"-- name: {name}\n{queries[name].text};" for name in used)
        _replace(folder / "queries.sql", f"{sql}\n".encode())
        _replace(folder / "report.html", html.encode())
    except OSError as error:
        raise Refusal(f"report {folder}: cannot be written ({error.strerror}); choose another folder") from None
    return folder / "report.html"


def terminal(judged: Sequence[Judged]) -> Table:
    """The claims for a terminal of 80 columns or more; without colours and lines where it is a file."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), leading=1)
    table.add_column("claim", ratio=1)
    table.add_column("paper", justify="right", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("verdict (band)", no_wrap=True)
    for each in judged:
        standing = "" if each.claim.paper is None else each.claim.standing_text
        table.add_row(
            Text(each.claim.sentence),
            Text.assemble(each.claim.paper_text, (f"\n{standing}", "dim")),
            Text.assemble(each.measured_text, (f"\n{each.interval_text}", "dim")),
            Text(each.n_text),
            Text.assemble((str(each.verdict), _TERMINAL_COLOURS[each.verdict]), (f"\n{each.claim.band_text}", "dim")),
        )
    return table


_TERMINAL_COLOURS = {
    Verdict.REPRODUCED: "bold green",
    Verdict.NOT_REPRODUCED: "bold red",
    Verdict.NOT_ENOUGH_DATA: "yellow",
}


# --- text ----------------------------------------------------------------------------------------


class Paragraph(NamedTuple):
    """A piece of a docstring: `text` runs on, `terms` are labelled lines, `lines` keep their columns."""

    kind: str  # "text", "terms" or "lines"
    text: str = ""
    terms: Sequence[tuple[str, str]] = ()


_TERM = re.compile(r"(\w[\w /-]{0,18}?) {2,}(\S.*)")


def paragraphs(doc: str, title: str) -> list[Paragraph]:
    """A docstring cut at its blank lines. A first line that only repeats the title is left out."""
    found: list[Paragraph] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.splitlines()
        text = " ".join(line.strip() for line in lines)
        if not text or (not found and text == title):
            continue
        if block.startswith(" "):
            found.append(Paragraph("lines", inspect.cleandoc("\n" + block)))
        elif _TERM.fullmatch(lines[0]) and all(_TERM.fullmatch(line) or line.startswith("  ") for line in lines):
            terms: list[tuple[str, str]] = []
            for line in lines:
                head = None if line.startswith(" ") else _TERM.fullmatch(line)
                if head:
                    terms.append((head[1], head[2]))
                else:
                    terms[-1] = (terms[-1][0], f"{terms[-1][1]} {line.strip()}")
            found.append(Paragraph("terms", terms=terms))
        else:
            found.append(Paragraph("text", text))
    return found


def _duration(seconds: float | None) -> str:
    if not seconds:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


# --- pictures ------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A figure, ready for the page."""

    number: int
    figure: Figure
    query: Query
    png: bytes
    svg: str
    inline: Markup
    columns: list[str]
    rows: list[list[str]]  # the first of them
    total: int


def _draw(number: int, figure: Figure, session: Session, query: Query, run: str) -> Drawn:
    answer: Answer = session.sql(query.sql)
    sheet = drawing.render(figure, answer, run)
    svg = drawing.svg(sheet, figure.query)
    rows = [[_cell(value) for value in row] for row in answer.rows[:ROWS_SHOWN]]
    columns = [str(name) for name in answer.columns]
    png = drawing.png(sheet)
    return Drawn(number, figure, query, png, svg, _inline(svg, figure), columns, rows, len(answer.rows))


def _inline(svg: str, figure: Figure) -> Markup:
    """The drawing as a part of the page: its neutral colours become the page's, its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure.query}-", svg)
    for name, colour in (
        ("ink", drawing.INK),
        ("muted", drawing.MUTED),
        ("rule", drawing.RULE),
        ("card", drawing.GROUND),
    ):
        svg = svg.replace(f": {colour}", f": var(--{name})")
    label = Markup.escape(f"{figure.title}. {figure.caption}")
    svg = re.sub(
        r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1
    )
    return Markup(svg)


def strip(judged: Judged) -> Markup:
    """A small scale: the band, what was measured with its interval, and a hollow point for the paper."""
    if judged.measured is None:
        return Markup("")
    ends = [end for end in judged.claim.band if abs(end) != float("inf")]
    marks = [
        value for value in (judged.measured, judged.low, judged.high, judged.claim.paper, *ends) if value is not None
    ]
    least, most = min(marks), max(marks)
    margin = 0.12 * (most - least) or 1.0
    least, most = least - margin, most + margin

    def at(value: float) -> float:
        return round(100 * (min(max(value, least), most) - least) / (most - least), 2)

    left, right = at(judged.claim.band[0]), at(judged.claim.band[1])
    parts = [
        f'<rect class="band" x="{left}" y="1" width="{max(right - left, 0.6):.2f}" height="10" rx="1"/>',
        '<line class="axis" x1="0" x2="100" y1="6" y2="6"/>',
    ]
    if judged.low is not None and judged.high is not None:
        parts.append(f'<line class="whisker" x1="{at(judged.low)}" x2="{at(judged.high)}" y1="6" y2="6"/>')
    if judged.claim.paper is not None:
        parts.append(f'<circle class="paper" cx="{at(judged.claim.paper)}" cy="6" r="2.6"/>')
    parts.append(f'<circle class="measured" cx="{at(judged.measured)}" cy="6" r="2.6"/>')
    return Markup(f'<svg class="strip" viewBox="0 0 100 12" aria-hidden="true">{"".join(parts)}</svg>')


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.6g}"
    return str(value)


# --- files ---------------------------------------------------------------------------------------


def _template() -> jinja2.Template:
    place = Path(__file__).parent
    room = jinja2.Environment(
        loader=jinja2.FileSystemLoader(place),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return room.get_template("page.html")


def _replace(path: Path, content: bytes) -> None:
    """The whole new file or the whole old one, whatever happens."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
