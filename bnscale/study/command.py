"""The command line of a study file: plan, run, status, report, sql.

Every command checks all it was given before it starts anything. A user's mistake is one sentence on
stderr and exit code 2; Ctrl-C is 130.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bnscale import report
from bnscale.query import Session
from bnscale.report.claims import Queries
from bnscale.storage import StoreFailure
from bnscale.store import Store
from bnscale.study.asked import Asked, folder_of, here, preset_of
from bnscale.study.declare import MANY, MOST, Study
from bnscale.study.passes import Sharing
from bnscale.study.run import Way, run
from bnscale.study.say import make_report, say_plan, say_size, say_status
from bnscale.study.slots import Slots
from bnscale.trial import Refusal, near

COMMANDS = ("plan", "run", "status", "report", "sql")

PresetName = Annotated[str | None, typer.Option("--preset", help="laptop or paper; laptop where there is no GPU.")]
StorePlace = Annotated[
    str, typer.Option("--store", help="Results: a folder, made if it is not there, s3://bucket/prefix or gs://...")
]
DataPath = Annotated[
    Path | None, typer.Option("--data", help="Folder of data sets; else $BNSCALE_DATA, else ~/.cache/bnscale.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE,...", help="Narrow, widen or fix a field of the trials; repeatable."),
]
Yes = Annotated[bool, typer.Option("--yes", help=f"Also more than {MANY:,} trials.")]
Workers = Annotated[int, typer.Option("--workers-per-trial", min=1, help="Workers that share a trial (DeepSpeed).")]
Cohort = Annotated[
    int | None,
    typer.Option("--cohort", min=1, help="BN-only trials in one pass at most; 1: none; else what saves time and fits."),
]
TrialsPerGpu = Annotated[
    int | None,
    typer.Option("--trials-per-gpu", min=1, help="Trials that share a GPU; 1: none; else what saves time and fits."),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of each worker.")]


def main(study: Study, file: Path) -> None:
    """Run the command line of `file`, which declares `study`."""
    words = sys.argv[1:]
    if not words or (words[0] not in COMMANDS and words[0] != "--help"):
        words = ["run", *words]
    try:
        app(study, file)(args=words, prog_name=f"python {here(file)}")
    except Refusal as mistake:
        print(mistake, file=sys.stderr)
        raise SystemExit(2) from None
    except StoreFailure as failure:
        print(failure, file=sys.stderr)
        raise SystemExit(1) from None


def app(study: Study, file: Path) -> typer.Typer:
    """The commands of one study."""
    title = study.doc.strip().splitlines()[0]
    commands = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=title)
    # In a log there is no width to ask for, and 80 columns make the claims long.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 112)

    @commands.command("plan")
    def _plan(
        preset: PresetName = None,
        sets: Settings = None,
        store: StorePlace = "results",
        folder: DataPath = None,
        workers: Workers = 1,
        threads: Threads = 1,
        gpus: Annotated[
            int | None,
            typer.Option("--gpus", min=1, help="Forecast the makespan on so many GPUs; else on this machine."),
        ] = None,
        cpus: Annotated[
            int | None, typer.Option("--cpus", min=1, help="The same on so many CPUs; with --gpus, theirs.")
        ] = None,
        cohort: Cohort = None,
        trials_per_gpu: TrialsPerGpu = None,
        yes: Yes = False,
    ) -> None:
        """Trials, what they take in hours, memory and disk, and until when. Starts nothing."""
        slots = Slots.of(gpus, cpus, workers, threads)
        preset = preset or _this_machine_s()
        grid = preset_of(study, preset, sets)
        if grid.trials > (MOST if yes else MANY):
            say_size(study, preset, grid, folder_of(folder), console)
            return
        asked = Asked.of(study, file, preset, sets, store, folder)
        say_plan(asked, Sharing(cohort, trials_per_gpu, workers, threads), slots, console)

    @commands.command("run")
    def _run(
        preset: PresetName = None,
        sets: Settings = None,
        store: StorePlace = "results",
        folder: DataPath = None,
        address: Annotated[
            str | None, typer.Option("--address", help="Ray cluster; else one that runs here, else our own.")
        ] = None,
        workers: Workers = 1,
        threads: Threads = 1,
        zero: Annotated[int, typer.Option("--zero", min=0, max=1, help="DeepSpeed ZeRO stage of a gang.")] = 0,
        save_every: Annotated[float, typer.Option("--save-every", min=0, help="Seconds between checkpoints.")] = 30.0,
        asha: Annotated[bool, typer.Option("--asha", help="Stop the worse nuisance values of a cell early.")] = False,
        max_hours: Annotated[
            float | None, typer.Option("--max-hours", min=0, help="End at a checkpoint after so long; exit code 124.")
        ] = None,
        same_gpu: Annotated[
            bool, typer.Option("--same-gpu", help="Only on GPUs of the type on which the study began.")
        ] = False,
        cohort: Cohort = None,
        trials_per_gpu: TrialsPerGpu = None,
        yes: Yes = False,
    ) -> None:
        """Train what is not yet done, then report. Run again, it goes on where it stopped (the default command)."""
        asked = Asked.of(study, file, preset or "laptop", sets, store, folder, MOST if yes else MANY)
        way = Way(address, workers, threads, zero, save_every, asha, max_hours, same_gpu, cohort, trials_per_gpu, yes)
        run(asked, way, console, by_cluster=preset is None)

    @commands.command("status")
    def _status(
        preset: PresetName = None, sets: Settings = None, store: StorePlace = "results", folder: DataPath = None
    ) -> None:
        """The map of cells: done, running, failed, diverged, missing."""
        say_status(Asked.of(study, file, preset or _this_machine_s(), sets, store, folder), console)

    @commands.command("report")
    def _report(
        preset: PresetName = None, sets: Settings = None, store: StorePlace = "results", folder: DataPath = None
    ) -> None:
        """Claims, figures and the HTML page, from what is in the store."""
        Store.existing(store)
        make_report(Asked.of(study, file, preset or _this_machine_s(), sets, store, folder), console)

    @commands.command("sql")
    def _sql(
        statement: Annotated[
            str, typer.Argument(help="One statement that reads, or the name of a query of the study or of a table.")
        ],
        preset: PresetName = None,
        sets: Settings = None,
        store: StorePlace = "results",
        folder: DataPath = None,
    ) -> None:
        """Ask the results. Tables: trials, cells, plan, chosen, one a probe, and of a search tried and bracket."""
        known = Store.existing(store)
        asked = Asked.of(study, file, preset or _this_machine_s(), sets, store, folder)
        session = asked.session()
        if statement.isidentifier():
            statement = _named(statement, report.queries(file.with_suffix(".sql").read_text()), session)
            if {each.trial.id for each in asked.planned}.isdisjoint(each.trial for each in known.manifests()):
                print(_none_of_these(asked), file=sys.stderr)
        print(session.sql(statement))

    return commands


def _none_of_these(asked: Asked) -> str:
    return (
        f"none of the {len(asked.planned):,} trials of preset {asked.preset} is in {asked.store}. --preset, "
        "--set and, for data in files, --data say which trials those are: give what the run was given"
    )


def _named(name: str, queries: Queries, session: Session) -> str:
    """The query of that name, or all of the table. Raises `Refusal` where there is neither."""
    if name not in queries and name.lower() in session.tables:
        return f"from {name}"
    try:
        return queries[name].sql
    except Refusal as mistake:
        tables = session.tables
        raise Refusal(
            f"{mistake}. Nor is there such a table{near(name, tables)} The tables: {', '.join(tables)}"
        ) from None


def _this_machine_s() -> str:
    """The preset where no cluster is asked: what `run` would choose on this machine alone."""
    preset = "paper" if torch.cuda.is_available() else "laptop"
    print(f"preset {preset}: this machine has {'a' if preset == 'paper' else 'no'} GPU", file=sys.stderr)
    return preset
