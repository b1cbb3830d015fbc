"""The `bnscale` command: what needs no study file, and study files that cannot even be read.

bnscale sql "select ..."            ask a store
bnscale export results.duckdb       every view as a table, for other tools
bnscale verify [--repair]           every file against its checksums; what to run again
bnscale networks                    every word a trial may choose, and the parameters of the networks
bnscale export-network TRIAL ...    a trained network as a file of what its seed does not give back
bnscale doctor [--cluster]          would a study run here? proved by doing
bnscale study FILE [plan|run|...]   a study file's own commands; a mistake in the file is told in one line
"""

import runpy
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from bnscale.trial import Refusal

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ask the results of studies, look up what a trial may choose, or run a study file.",
)

StorePlace = Annotated[
    str, typer.Option("--store", help="Results: a folder, s3://bucket/prefix or gs://bucket/prefix.")
]
Skip = Annotated[bool, typer.Option("--skip-damaged", help="Leave out files that cannot be read, and say which.")]


@app.command("sql")
def _sql(
    statement: Annotated[str, typer.Argument(help="One statement that reads.")],
    store: StorePlace = "results",
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
    store: StorePlace = "results",
    skip: Skip = False,
) -> None:
    """Every table of the results in one DuckDB file."""
    from bnscale import query
    from bnscale.probes import TABLES

    query.open(store, TABLES, skip_damaged=skip).export(file)
    print(f"wrote {file}")


@app.command("export-network")
def _export_network(
    trial: Annotated[str, typer.Argument(help="The id of a finished trial, or a unique beginning of one.")],
    out: Annotated[Path, typer.Option("--out", help="A safetensors file to write; an earlier one is replaced.")],
    store: StorePlace = "results",
) -> None:
    """A trained network as one small file; bnscale.load_network(file) rebuilds it from its seed."""
    from bnscale import network_file
    from bnscale.store import Store

    print(network_file.export(Store.existing(store), trial, out))


@app.command("verify")
def _verify(
    store: StorePlace = "results",
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged files aside and write lost manifests anew; deletes nothing.")
    ] = False,
) -> None:
    """Read every file of the results and hold it against its checksums; exit 1 where something is damaged."""
    from bnscale import verify
    from bnscale.store import Store

    kept = Store.existing(store)
    verdict = verify.verify(kept)
    for line in verify.lines(verdict):
        print(line)
    if not verdict.harms:
        return
    if repair:
        verify.repair(kept, verdict, lambda line: print(f"repair: {line}", flush=True))
    else:
        print(f"to mend what can be: bnscale verify --repair --store {shlex.quote(kept.url)}")
    for command in verify.again(verdict, kept):
        print(f"{'then ' if not repair else ''}run again what was lost: {command}")
    if not repair or verify.verify(kept).harms:
        raise SystemExit(1)


@app.command("networks")
def _networks(
    network: Annotated[str | None, typer.Option("--network", help="Count one family only.")] = None,
    depth: Annotated[str | None, typer.Option("--depth", help="Depths, such as 14,56.")] = None,
    width: Annotated[str | None, typer.Option("--width", help="The papers' own if not given.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="cifar10, or linear_teacher for linear.")] = None,
) -> None:
    """Every word a trial may choose, and how many parameters the networks have; with an option, only these."""
    from rich.console import Console

    from bnscale import catalogue

    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 112)
    depths = None if depth is None else [each.strip() for each in depth.split(",")]
    trials = catalogue.asked(network, depths, width, data)
    if (network, depth, width, data) == (None,) * 4:
        catalogue.say_words(console)
    catalogue.say_counts(trials, console)


@app.command("doctor")
def _doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Every node of a Ray cluster.")] = False,
    address: Annotated[str | None, typer.Option("--address", help="Of the cluster, if not on this machine.")] = None,
    store: StorePlace = "results",
    folder: Annotated[Path | None, typer.Option("--data", help="A folder of data sets to look at, too.")] = None,
    file: Annotated[Path | None, typer.Option("--yaml", help="Check this cluster file, and nothing else.")] = None,
) -> None:
    """Would a study run? Versions, GPUs, a gang, store, token, disk, and of a cluster its clocks; exit 1 if not."""
    from rich.console import Console

    from bnscale import doctor

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 112)
    if file is not None:
        raise typer.Exit(doctor.doctor_yaml(file, console))
    if cluster or address:
        raise typer.Exit(doctor.doctor_cluster(store, folder, address, console))
    raise typer.Exit(doctor.doctor(store, folder, console))


@app.command(
    "study", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def _study(context: typer.Context, file: Annotated[Path, typer.Argument(help="A study file.")]) -> None:
    """Run a study file with the words that follow it."""
    from bnscale.study.mistake import sentence

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
    """Entry point: a user's mistake is one message and exit code 2; a store that fails is one and exit code 1."""
    from bnscale.storage import StoreFailure

    try:
        app()
    except Refusal as mistake:
        print(mistake, file=sys.stderr)
        raise SystemExit(2) from None
    except StoreFailure as failure:
        print(failure, file=sys.stderr)
        raise SystemExit(1) from None
