"""The `bnscale` command: what needs no study file, and study files that cannot even be read.

bnscale sql "select ..."            ask a store
bnscale export results.duckdb       every view as a table, for other tools
bnscale study FILE [plan|run|...]   a study file's own commands; a mistake in the file is told in one line
"""

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from bnscale.study.mistake import sentence
from bnscale.trial import Refusal

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ask the results of studies, or run a study file.",
)

StorePath = Annotated[Path, typer.Option("--store", help="Folder of results.")]
Skip = Annotated[bool, typer.Option("--skip-damaged", help="Leave out files that cannot be read, and say which.")]


@app.command("sql")
def _sql(
    statement: Annotated[str, typer.Argument(help="One statement that reads.")],
    store: StorePath = Path("results"),
    skip: Skip = False,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Longest time the answer may take.")] = 60.0,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Most rows of the answer.")] = 100_000,
) -> None:
    """Ask the results: tables trials, cells, and one a probe (curve, gamma, ...)."""
    from bnscale import query
    from bnscale.probes import TABLES

    print(query.open(store, TABLES, seconds=seconds, rows=rows, skip_damaged=skip).sql(statement))


@app.command("export")
def _export(
    file: Annotated[Path, typer.Argument(help="A DuckDB file to write; an earlier export is replaced.")],
    store: StorePath = Path("results"),
    skip: Skip = False,
) -> None:
    """Every table of the results in one DuckDB file."""
    from bnscale import query
    from bnscale.probes import TABLES

    query.open(store, TABLES, skip_damaged=skip).export(file)
    print(f"wrote {file}")


@app.command(
    "study", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def _study(context: typer.Context, file: Annotated[Path, typer.Argument(help="A study file.")]) -> None:
    """Run a study file with the words that follow it."""
    if not file.is_file():
        raise Refusal(f"study {file}: there is no such file; the studies are in studies/")
    sys.argv = [str(file), *context.args]
    sys.path.insert(0, str(file.resolve().parent))
    try:
        runpy.run_path(str(file), run_name="__main__")
    except Exception as error:
        said = sentence(error, file)
        if said is None:
            raise  # ours, not the study's: the traceback is what we need
        raise Refusal(said) from None


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2."""
    try:
        app()
    except Refusal as mistake:
        print(mistake, file=sys.stderr)
        raise SystemExit(2) from None
