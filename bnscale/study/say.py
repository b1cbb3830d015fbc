"""What the commands of a study say: the plan, the map of cells, the claims."""

import shlex
from collections import Counter, defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bnscale import report
from bnscale.engine.machine import in_bytes
from bnscale.lease import holder
from bnscale.schedule import budget
from bnscale.schedule.makespan import Makespan
from bnscale.storage import storage
from bnscale.store import Manifest, Store
from bnscale.study.asked import Asked, cost_of, here, store_there
from bnscale.study.declare import MANY, MOST, Preset, Study
from bnscale.study.passes import Passes, Sharing
from bnscale.study.plan import Planned, Search
from bnscale.study.slots import Slots, makespan_of
from bnscale.trial import Outcome


def say_plan(asked: Asked, how: Sharing, slots: Slots, console: Console) -> None:
    workers, threads = how.workers, how.threads
    gpu = torch.cuda.is_available()
    forecasts = asked.forecasts(workers, threads, gpu=gpu)
    store = store_there(asked.store)
    left = asked.left(store) if store else [each.trial for each in asked.planned]
    done = len(asked.planned) - len(left)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in asked.axes:
        table.add_column(name)
    for name in ("trials", "hours", "memory", "disk"):
        table.add_column(name, justify="right")
    cells: dict[str, list[Planned]] = defaultdict(list)
    for each in asked.planned:
        cells[each.cell].append(each)
    for each, rounds in asked.later:  # as if each were of the same cost, as trials that differ in a rate are
        cells[each.cell] += [each] * rounds
    for members in cells.values():
        cost = budget.total(forecasts[each.trial.id] for each in members)
        values = [str(getattr(members[0].trial, name)) for name in asked.axes]
        hours = _hours(cost.seconds * workers)
        table.add_row(*values, str(len(members)), hours, in_bytes(max(cost.memory, cost.on_gpu)), in_bytes(cost.disk))
    console.print(table)
    cost = budget.total(forecasts[each.trial.id] for members in cells.values() for each in members)
    merged = f" ({asked.merged} more would be the same training again)" if asked.merged else ""
    if asked.search:
        _say_search(asked, len(left), console)
    most = "at most " if asked.search else ""
    console.print(
        f"\n{asked.study.name}, preset {asked.preset}: {most}{sum(map(len, cells.values())):,} trials{merged}, "
        f"{done:,} done. "
        f"{_hours(cost.seconds * workers)} hours of one worker on {_device(gpu)}, timed just now with {threads} "
        f"thread{'s' if threads > 1 else ''}; at most {in_bytes(cost.memory)} of memory a worker"
        + (f" and {in_bytes(cost.on_gpu)} on its GPU" if gpu else "")
        + f"; at most {in_bytes(cost.disk)} of disk when all have finished. Data: {_data(asked)}.",
        soft_wrap=True,
    )
    if left:
        passes = Passes.of(asked, left, forecasts, slots.cluster(threads), how, asked.begun(store))
        loads = passes.loads({trial.id: trial for trial in left})
        span = makespan_of(asked, loads, forecasts, workers, slots.count)
        _say_makespan(span, f"{len(left):,} left{passes.said}", slots, console)


def _say_makespan(span: Makespan, left: str, slots: Slots, console: Console) -> None:
    """When what is left would be done, longest first."""
    console.print(
        f"On {slots.said}, each as fast as that: {_hours(span.seconds)} hours for the {left}, longest first, "
        f"with {span.slots} slot{'s' if span.slots > 1 else ''} {100 * span.utilisation:.0f} % in use; no order takes "
        f"less than {_hours(span.bound)} hours. Starting the workers takes seconds more.",
        soft_wrap=True,
    )


def say_size(study: Study, name: str, grid: Preset, folder: Path, console: Console) -> None:
    """Of a grid too large to be built: how many, and about what they cost."""
    limit = f"more than {MANY:,} are trained, and planned one by one, only with --yes"
    if grid.trials > MOST:
        limit = f"more than {MOST:,} are not trained at all"
    console.print(f"{study.name}, preset {name}: {cost_of(study, grid, folder)}; {limit}", soft_wrap=True)


def _say_search(asked: Asked, left: int, console: Console) -> None:
    search = asked.search
    assert search is not None
    turn = f"; {asked.round} has {left:,} trials" if left else ""
    console.print(
        f"\nLargest {search.axis} that trains, among {len(search.values)} from {search.values[0]:g} to "
        f"{search.values[-1]:g}, by bisection in each of {len(asked.searches):,} cells and seeds{turn}.",
        soft_wrap=True,
    )


def say_status(asked: Asked, console: Console) -> None:
    store = store_there(asked.store)
    manifests = store.known({each.trial.id for each in asked.planned}) if store else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in asked.axes:
        table.add_column(name)
    states = ("done", "running", "stopped", "failed", "diverged", "missing")
    for name in states:
        table.add_column(name, justify="right")
    brackets: dict[str, list[str]] = defaultdict(list)
    for search in asked.searches:
        brackets[search.ladder[0].cell].append(_bracket(search))
    if asked.search:
        table.add_column(f"largest {asked.search.axis} that trains, by seed")
    cells: dict[str, list[Planned]] = defaultdict(list)
    for each in asked.planned:
        cells[each.cell].append(each)
    every: Counter[str] = Counter()
    held = _held(store, [each.trial.id for each in asked.planned], manifests) if store else {}
    for members in cells.values():
        counts = Counter(_state(each.trial.id, manifests, held) for each in members)
        every += counts
        values = [str(getattr(members[0].trial, name)) for name in asked.axes]
        found = ["  ".join(brackets[members[0].cell])] if asked.search else []
        table.add_row(*values, *(str(counts[name] or "·") for name in states), *found)
    console.print(table)
    console.print(
        f"\n{len(asked.planned)} trials: "
        + (", ".join(f"{every[name]} {name}" for name in states if every[name]) or "none is planned")
    )
    for who in sorted(set(held.values())):
        console.print(f"{who} trains {', '.join(trial for trial in held if held[trial] == who)}", soft_wrap=True)
    for _, wrong in store.damaged if store else []:
        console.print(f"damaged: {wrong}", soft_wrap=True, markup=False)


def _bracket(search: Search) -> str:
    """`0.1`, found; `0.1..0.8` or `?..?`, between the two; `≥10`, all that was tried trains; `not found`, nothing does,
    which bounds it from no side: there may be rates that train between those that are too small and too large."""
    trains, fails = ("?" if end is None else f"{end:g}" for end in search.ends)
    if search.next:
        return f"{trains}..{fails}"
    return "not found" if trains == "?" else f"≥{trains}" if fails == "?" else trains


def _held(store: Store, planned: list[str], manifests: dict[str, Manifest]) -> dict[str, str]:
    """Who trains each of the trials that are trained now."""
    if not store.storage.list("drivers"):
        return {}
    known = {trial: manifests.get(trial) for trial in planned}
    open_ = [trial for trial, manifest in known.items() if manifest is None or not manifest.has_result]
    found = store.storage.each(lambda trial: holder(store.storage, trial), open_)
    return {each.trial: each.who for each in found if each}


def _state(trial: str, manifests: dict[str, Manifest], held: dict[str, str]) -> str:
    """A trial without an end that nobody has leased was stopped, or its driver has died."""
    if trial in held:
        return "running"
    manifest = manifests.get(trial)
    if manifest is None:
        return "missing"
    if manifest.outcome is not None:
        return {Outcome.FINISHED: "done", Outcome.DIVERGED: "diverged", Outcome.FAILED: "failed"}[manifest.outcome]
    return "stopped"


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
        run=shlex.join(asked.words),
        claims=judged,
        figures=asked.study.figures,
        session=session,
        queries=queries,
        provenance=report.provenance(session, asked.store),
        notes=[asked.note] if asked.note else [],
        damaged=session.damaged,
    )
    console.print(report.terminal(judged))
    for line in session.damaged:
        console.print(f"damaged: {line}", soft_wrap=True, markup=False)
    place = storage(asked.store)
    if place.far:
        for path in sorted(asked.folder.iterdir()):
            place.write(f"{asked.report_key}/{path.name}", path.read_bytes())
        console.print(f"report: {here(page)}, and in {place.url}/{asked.report_key}", soft_wrap=True)
    else:
        console.print(f"report: {here(page)}", soft_wrap=True)


def _device(gpu: bool) -> str:
    from bnscale.engine.machine import device_name

    return device_name(torch.device("cuda" if gpu else "cpu"))


def _data(asked: Asked) -> str:
    return ", ".join(dict.fromkeys(each.trial.data_title for each in asked.planned)) or "none"


def _hours(seconds: float) -> str:
    """With two digits at least: a cell of seconds is no cell of nothing."""
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}" if hours < 1 else f"{hours:.1f}"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
