"""The command line of a study file: plan, run, status, report, sql.

Every command checks all it was given before it starts anything. A user's mistake is one sentence on
stderr and exit code 2; Ctrl-C is 130.
"""

import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bnscale import data, query, report
from bnscale.probes import TABLES
from bnscale.schedule import budget
from bnscale.schedule.budget import Forecast
from bnscale.store import Manifest, Store
from bnscale.study.declare import Study
from bnscale.study.plan import Planned, commit, plan, relate, settings
from bnscale.train import Job, readings
from bnscale.trial import Data, Outcome, Refusal, Trial

COMMANDS = ("plan", "run", "status", "report", "sql")
QUIET = 120.0  # seconds without a word from a trial after which it no longer counts as running

PresetName = Annotated[str | None, typer.Option("--preset", help="laptop or paper; laptop where there is no GPU.")]
StorePath = Annotated[Path, typer.Option("--store", help="Folder of results; made if it is not there.")]
DataPath = Annotated[
    Path | None, typer.Option("--data", help="Folder of data sets; else $BNSCALE_DATA, else ~/.cache/bnscale.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE,...", help="Narrow, widen or fix a field of the trials; repeatable."),
]
Workers = Annotated[int, typer.Option("--workers-per-trial", min=1, help="Workers that share a trial (DeepSpeed).")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of each worker.")]


def main(study: Study, file: Path) -> None:
    """Run the command line of `file`, which declares `study`."""
    words = sys.argv[1:]
    if not words or (words[0] not in COMMANDS and words[0] != "--help"):
        words = ["run", *words]
    try:
        app(study, file)(args=words, prog_name=f"python {_here(file)}")
    except Refusal as mistake:
        print(mistake, file=sys.stderr)
        raise SystemExit(2) from None


@dataclass(frozen=True)
class Asked:
    """A study at one size, with everything checked that can be checked without starting anything."""

    study: Study
    preset: str
    note: str
    planned: list[Planned]
    merged: int  # cells that turned out to be a trial of another cell
    axes: list[str]
    store: Path
    data: Path
    file: Path
    again: str  # the command that asks for the same

    @classmethod
    def of(
        cls, study: Study, file: Path, preset: str, sets: Sequence[str] | None, store: Path, folder: Path | None
    ) -> "Asked":
        """Raises `Refusal` for the first thing in it that cannot be run."""
        grid = study.preset(preset)
        for axis, values in settings(sets or []).items():
            grid = grid.setting(axis, values)
        folder = (folder or data.default_folder()).expanduser().resolve()
        planned = plan(grid, {each: data.pixels(each, folder) for each in Data})
        words = ["--preset", preset, *(word for each in sets or [] for word in ("--set", each)), "--store", str(store)]
        if any(each.trial.data is not Data.DIGITS for each in planned):
            words += ["--data", str(folder)]
        return cls(
            study=study,
            preset=preset,
            note=grid.note,
            planned=planned,
            merged=len(grid.scientific) * len(grid.nuisance) * len(grid.seeds) - len(planned),
            axes=grid.axes,
            store=store.resolve(),
            data=folder,
            file=file,
            again=shlex.join(["python", str(_here(file)), "run", *words]),
        )

    @property
    def folder(self) -> Path:
        """Where its report goes."""
        return self.store / "reports" / f"{self.study.name}-{self.preset}"

    def session(self) -> query.Session:
        """SQL over the store, with the study's tables `plan` and `chosen`."""
        session = query.open(self.store, TABLES)
        relate(session, self.planned)
        return session

    def forecasts(self, workers: int, threads: int, *, gpu: bool) -> dict[str, Forecast]:
        """By trial id. Times a few steps on this machine."""
        device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
        pace = budget.Pace(device, threads)
        return {
            each.trial.id: budget.forecast(each.trial, self.study.probes, pace, workers, gpu=gpu)
            for each in self.planned
        }


def app(study: Study, file: Path) -> typer.Typer:
    """The commands of one study."""
    title = study.doc.strip().splitlines()[0]
    commands = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=title)
    console = Console(highlight=False)

    @commands.command("plan")
    def _plan(
        preset: PresetName = None,
        sets: Settings = None,
        store: StorePath = Path("results"),
        folder: DataPath = None,
        workers: Workers = 1,
        threads: Threads = 1,
    ) -> None:
        """Trials, and what they take in hours, memory and disk. Starts nothing."""
        asked = Asked.of(study, file, preset or _by_this_machine(), sets, store, folder)
        _say_plan(asked, workers, threads, console)

    @commands.command("run")
    def _run(
        preset: PresetName = None,
        sets: Settings = None,
        store: StorePath = Path("results"),
        folder: DataPath = None,
        address: Annotated[
            str | None, typer.Option("--address", help="Ray cluster; else one that runs here, else our own.")
        ] = None,
        workers: Workers = 1,
        threads: Threads = 1,
        zero: Annotated[int, typer.Option("--zero", min=0, max=1, help="DeepSpeed ZeRO stage of a gang.")] = 0,
        save_every: Annotated[float, typer.Option("--save-every", min=0, help="Seconds between checkpoints.")] = 30.0,
        asha: Annotated[bool, typer.Option("--asha", help="Stop the worse nuisance values of a cell early.")] = False,
    ) -> None:
        """Train what is not yet done, then report. Run again, it goes on where it stopped (the default command)."""
        asked = Asked.of(study, file, preset or "laptop", sets, store, folder)
        _prepare(asked, workers)
        code = commit(file.resolve().parent)
        said = {"--address": address, "--workers-per-trial": workers, "--threads": threads, "--zero": zero}
        words = [word for name, value in said.items() if value not in (None, 0, 1) for word in (name, str(value))]

        def job(trial: Trial) -> Job:
            return Job(trial, study.probes, str(asked.store), str(asked.data), code, zero, save_every)

        carry_out(asked, preset is None, sets, address, workers, threads, job, words, console, asha=asha)

    @commands.command("status")
    def _status(
        preset: PresetName = None, sets: Settings = None, store: StorePath = Path("results"), folder: DataPath = None
    ) -> None:
        """The map of cells: done, running, failed, diverged, missing."""
        _say_status(Asked.of(study, file, preset or _by_this_machine(), sets, store, folder), console)

    @commands.command("report")
    def _report(
        preset: PresetName = None, sets: Settings = None, store: StorePath = Path("results"), folder: DataPath = None
    ) -> None:
        """Claims, figures and the HTML page, from what is in the store."""
        Store.existing(store)
        make_report(Asked.of(study, file, preset or _by_this_machine(), sets, store, folder), console)

    @commands.command("sql")
    def _sql(
        statement: Annotated[
            str, typer.Argument(help="One statement that reads, or the name of a query of the study.")
        ],
        preset: PresetName = None,
        sets: Settings = None,
        store: StorePath = Path("results"),
        folder: DataPath = None,
    ) -> None:
        """Ask the results. Tables: trials, cells, plan, chosen, and one a probe."""
        Store.existing(store)
        asked = Asked.of(study, file, preset or _by_this_machine(), sets, store, folder)
        if statement.isidentifier():
            statement = report.queries(file.with_suffix(".sql").read_text())[statement].sql
        print(asked.session().sql(statement))

    return commands


# --- run -----------------------------------------------------------------------------------------


def carry_out(
    asked: Asked,
    by_cluster: bool,
    sets: Sequence[str] | None,
    address: str | None,
    workers: int,
    threads: int,
    job: Callable[[Trial], Job],
    words: list[str],
    console: Console,
    *,
    asha: bool,
) -> None:
    """Train what the store lacks on a Ray cluster, and report. Exits with 1 where a trial failed.

    `by_cluster`: the preset was not asked for, and the paper's is meant where there are GPUs. `words`: what the
    command that goes on must say besides.
    """
    from bnscale.schedule import tune  # seconds to import, and of no use to the other commands
    from bnscale.schedule.progress import Watch

    store = Store(asked.store)
    with tune.connect(address) as cluster:
        gpu = cluster.gpus > 0
        if by_cluster and gpu:
            asked = Asked.of(asked.study, asked.file, "paper", sets, asked.store, asked.data)
            _prepare(asked, workers)
        left = _left(asked, store)
        counts = f"{len(asked.planned)} trials, {len(asked.planned) - len(left)} done, {len(left)} to train"
        said = f"{asked.study.name}, preset {asked.preset}: {counts}"
        failed = []
        if not left:
            console.print(said, soft_wrap=True)
        else:
            forecasts = asked.forecasts(workers, threads, gpu=gpu)
            slots = max(1, cluster.slots(threads, 0) // workers)
            if by_cluster and not gpu:
                _say_paper(asked, sets, console, slots)
            wait = sum(forecasts[trial.id].seconds for trial in left) / slots
            console.print(f"{said}, about {_duration(wait)} for {slots} at a time", soft_wrap=True)
            rivals = {each.trial.id: (each.cell, each.trial.seed) for each in asked.planned} if asha else None
            with Watch({trial.id: forecasts[trial.id].seconds for trial in left}) as watch:
                outcomes = tune.run(
                    [job(trial) for trial in left],
                    forecasts,
                    cluster,
                    workers=workers,
                    threads=threads,
                    rivals=rivals,
                    watch=watch,
                    mend=shlex.join([*shlex.split(asked.again), *words]),
                )
            failed = [trial for trial, outcome in outcomes.items() if outcome is Outcome.FAILED]
    make_report(asked, console)
    if failed:
        _say_failed(failed, store, asked, console)
        raise SystemExit(1)


def _prepare(asked: Asked, workers: int) -> None:
    """Whatever a gang cannot do, and whatever data are not there, shows before anything starts."""
    from bnscale.networks.norm import check

    for each in asked.planned:
        check(each.trial.batch, each.trial.norm_batch, workers)
    for each in {planned.trial.data: planned for planned in asked.planned}.values():
        data.prepare(each.trial, asked.data)


def _left(asked: Asked, store: Store) -> list[Trial]:
    """Trials that have no result yet, or none with the readings that this study needs."""
    wanted = readings(asked.study.probes)
    found = {manifest.trial: manifest for manifest in store.manifests()}

    def done(trial: Trial) -> bool:
        manifest = found.get(trial.id)
        return manifest is not None and manifest.covers(wanted)

    return [each.trial for each in asked.planned if not done(each.trial)]


def _say_paper(asked: Asked, sets: Sequence[str] | None, console: Console, slots: int) -> None:
    """What the other preset would take here."""
    try:
        paper = Asked.of(asked.study, asked.file, "paper", sets, asked.store, asked.data)
    except Refusal:
        return  # what was set has a meaning for this preset only
    cost = budget.total(paper.forecasts(1, 1, gpu=False).values())
    console.print(
        f"no GPU in this cluster: preset laptop. The paper's preset has {len(paper.planned):,} trials and would take "
        f"about {_duration(cost.seconds / slots)} here; --preset paper runs it",
        soft_wrap=True,
    )


def _say_failed(failed: list[str], store: Store, asked: Asked, console: Console) -> None:
    """The last line of each error, and where the whole of it is."""
    console.print(f"{len(failed)} failed; running the study again tries them again:", soft_wrap=True)
    for trial in failed:
        manifest = store.manifest(trial)
        error = (manifest.facts.get("error") if manifest else None) or "no error was recorded"
        console.print(f"  {trial}: {error.strip().splitlines()[-1]}", soft_wrap=True, markup=False)
    whole = shlex.join(["bnscale", "sql", "select trial, error from trials where outcome = 'failed'"])
    console.print(f"all of each: {whole} --store {shlex.quote(str(asked.store))}", soft_wrap=True, markup=False)


# --- what is said --------------------------------------------------------------------------------


def _say_plan(asked: Asked, workers: int, threads: int, console: Console) -> None:
    gpu = torch.cuda.is_available()
    forecasts = asked.forecasts(workers, threads, gpu=gpu)
    done = len(asked.planned) - len(_left(asked, Store.existing(asked.store))) if _is_store(asked.store) else 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in asked.axes:
        table.add_column(name)
    for name in ("trials", "hours", "memory", "disk"):
        table.add_column(name, justify="right")
    cells: dict[str, list[Planned]] = defaultdict(list)
    for each in asked.planned:
        cells[each.cell].append(each)
    for members in cells.values():
        cost = budget.total(forecasts[each.trial.id] for each in members)
        values = [str(getattr(members[0].trial, name)) for name in asked.axes]
        hours = f"{cost.seconds * workers / 3600:,.2f}"
        table.add_row(*values, str(len(members)), hours, _bytes(max(cost.memory, cost.on_gpu)), _bytes(cost.disk))
    console.print(table)
    cost = budget.total(forecasts.values())
    merged = f" ({asked.merged} more were the same trial twice)" if asked.merged else ""
    console.print(
        f"\n{asked.study.name}, preset {asked.preset}: {len(asked.planned):,} trials{merged}, {done:,} done. "
        f"{cost.seconds * workers / 3600:,.1f} hours of one worker on {_device(gpu)}, timed just now with {threads} "
        f"thread{'s' if threads > 1 else ''}; at most {_bytes(cost.memory)} of memory a worker"
        + (f" and {_bytes(cost.on_gpu)} on its GPU" if gpu else "")
        + f"; at most {_bytes(cost.disk)} of disk. Data: {_data(asked)}.",
        soft_wrap=True,
    )


def _say_status(asked: Asked, console: Console) -> None:
    manifests = {m.trial: m for m in Store.existing(asked.store).manifests()} if _is_store(asked.store) else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in asked.axes:
        table.add_column(name)
    states = ("done", "running", "stopped", "failed", "diverged", "missing")
    for name in states:
        table.add_column(name, justify="right")
    cells: dict[str, list[Planned]] = defaultdict(list)
    for each in asked.planned:
        cells[each.cell].append(each)
    every: Counter[str] = Counter()
    for members in cells.values():
        counts = Counter(_state(manifests.get(each.trial.id), asked.store) for each in members)
        every += counts
        values = [str(getattr(members[0].trial, name)) for name in asked.axes]
        table.add_row(*values, *(str(counts[name] or "·") for name in states))
    console.print(table)
    console.print(
        f"\n{len(asked.planned)} trials: " + ", ".join(f"{every[name]} {name}" for name in states if every[name])
    )


def _state(manifest: Manifest | None, store: Path) -> str:
    """A running trial writes at least every half minute or two; one that fell silent has stopped."""
    if manifest is None:
        return "missing"
    if manifest.outcome is not None:
        return {Outcome.FINISHED: "done", Outcome.DIVERGED: "diverged", Outcome.FAILED: "failed"}[manifest.outcome]
    age = time.time() - (store / "manifests" / f"{manifest.trial}.json").stat().st_mtime
    return "running" if age < QUIET else "stopped"


def make_report(asked: Asked, console: Console) -> None:
    """The claims on the terminal, and the page with its figures beside the results."""
    session = asked.session()
    queries = report.queries(asked.file.with_suffix(".sql").read_text())
    judged = [report.judge(claim, session, queries) for claim in asked.study.claims]
    page = report.write(
        asked.folder,
        title=asked.study.doc.strip().splitlines()[0],
        doc=asked.study.doc,
        preset=asked.preset,
        run=asked.again,
        claims=judged,
        figures=asked.study.figures,
        session=session,
        queries=queries,
        provenance=report.provenance(session, str(asked.store)),
        notes=[asked.note] if asked.note else [],
        damaged=session.damaged,
    )
    console.print(report.terminal(judged))
    for line in session.damaged:
        console.print(f"damaged: {line}", soft_wrap=True, markup=False)
    console.print(f"report: {_here(page)}", soft_wrap=True)


def _by_this_machine() -> str:
    """The preset where no cluster is asked: what `run` would choose on this machine alone."""
    preset = "paper" if torch.cuda.is_available() else "laptop"
    print(f"preset {preset}: this machine has {'a' if preset == 'paper' else 'no'} GPU", file=sys.stderr)
    return preset


def _is_store(path: Path) -> bool:
    return (path / "manifests").is_dir()


def _device(gpu: bool) -> str:
    from bnscale.engine.machine import device_name

    return device_name(torch.device("cuda" if gpu else "cpu"))


def _data(asked: Asked) -> str:
    return ", ".join(dict.fromkeys(each.trial.data_title for each in asked.planned))


def _here(path: Path) -> Path:
    with suppress(ValueError):
        return path.resolve().relative_to(Path.cwd())
    return path


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _bytes(count: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
