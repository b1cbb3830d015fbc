"""Train what a study's store lacks on a Ray cluster, and report. A search takes several rounds of training."""

import contextlib
import math
import os
import shlex
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from bnscale.lease import Driver, Lease, claim, release
from bnscale.probes import looking
from bnscale.schedule import budget
from bnscale.schedule.failure import Ending, Failure, Hopeless, OutOfTime
from bnscale.schedule.makespan import makespan
from bnscale.schedule.needs import on_one_type
from bnscale.schedule.progress import Watch
from bnscale.storage import check, storage
from bnscale.store import Manifest, Store
from bnscale.study.asked import Asked
from bnscale.study.passes import Passes, Sharing
from bnscale.study.plan import commit
from bnscale.study.say import duration, make_report
from bnscale.train import Job
from bnscale.trial import Outcome, Refusal, Trial

if TYPE_CHECKING:
    from bnscale.schedule.tune import Cluster


_UNITS = {"max-hours": "hours", "save-every": "seconds"}


@dataclass(frozen=True)
class Way:
    """How trials are run: nothing here changes a number."""

    address: str | None = None  # of a Ray cluster; None for one that runs here, else our own
    workers_per_trial: int = 1
    threads: int = 1  # CPUs of each worker
    zero: int = 0  # DeepSpeed's ZeRO stage of a gang
    save_every: float = 30.0  # seconds between checkpoints
    asha: bool = False  # stop the worse nuisance values of a cell early
    max_hours: float | None = None  # of wall time, after which all ends at its checkpoint
    same_gpu: bool = False  # only on GPUs of the type on which the study began
    cohort: int | None = None  # trials in one pass at most; None: what the forecast makes of it
    trials_per_gpu: int | None = None  # that share one; None: what their memory makes of it
    yes: bool = False  # also more trials than are trained without asking twice

    def __post_init__(self) -> None:
        for name, value in (("max-hours", self.max_hours), ("save-every", self.save_every)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                out = "leave it out" if name == "max-hours" else "its least is 0"
                raise Refusal(f"--{name} {value:g}: is a number of {_UNITS[name]}, and not without end; {out}")
        _ = self.sharing  # refuses what cannot be together

    @property
    def sharing(self) -> Sharing:
        return Sharing(self.cohort, self.trials_per_gpu, self.workers_per_trial, self.threads, self.asha)

    @property
    def words(self) -> list[str]:
        """The options that ask for it, without the ones that say what is so anyway."""
        said = []
        for field in fields(self):
            value, option = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value != field.default:
                said += (
                    [option] if value is True else [option, f"{value:g}" if isinstance(value, float) else str(value)]
                )
        return said


def run(asked: Asked, way: Way, console: Console, *, by_cluster: bool) -> None:
    """Train what is missing, then report. Exits with 1 where a trial failed, and with 124 where its time was up.

    `by_cluster`: no preset was asked for, and the paper's is meant where there are GPUs.
    """
    with _leaving(shlex.join([*asked.words, *way.words])):
        try:
            _run(asked, way, console, by_cluster=by_cluster)
        except OutOfTime:
            raise SystemExit(124) from None
        except Hopeless:
            raise SystemExit(1) from None


def _run(asked: Asked, way: Way, console: Console, *, by_cluster: bool) -> None:
    from bnscale.schedule import tune  # seconds to import, and of no use to the other commands

    if way.asha and asked.search:
        axis = asked.search.axis
        raise Refusal(
            f"--asha: this study searches for the largest {axis} that trains, and a trial stopped early does not say; "
            f"leave it out, or name values of {axis} with --set {axis}=..."
        )
    until = math.inf if way.max_hours is None else time.monotonic() + 3600 * way.max_hours
    asked.prepare(way.workers_per_trial)
    store = Store(asked.store)
    endings: dict[str, Ending] = {}
    if by_cluster or asked.left(store, asha=way.asha):
        check(storage(asked.store))
        with tune.connect(way.address) as cluster:
            tune.check_sight(storage(asked.store))
            _check_size(way, cluster)
            if by_cluster and cluster.gpus:
                asked = asked.at("paper")
                asked.prepare(way.workers_per_trial)
            elif by_cluster and asked.left(store, asha=way.asha):
                _say_paper(asked, console, cluster.slots(way.threads, 0))
            with Driver(store.storage, asked.study.name) as driver:
                _say_others(driver, way, console)
                asked, endings = _train_rounds(asked, store, way, cluster, driver, console, until)
    else:
        _say_size(asked, [], console, "")
    _check_verdicts(asked, store)
    make_report(asked, console)
    failed = [trial for trial, ending in endings.items() if ending.outcome is Outcome.FAILED]
    aside = {trial: each.failure for trial, each in endings.items() if each.outcome is None and each.failure}
    if failed:
        _say_failed(failed, store, console)
    if aside:
        _say_aside(aside, console)
    if failed or aside:
        raise SystemExit(1)


def _train_rounds(
    asked: Asked, store: Store, way: Way, cluster: "Cluster", driver: Driver, console: Console, until: float
) -> tuple[Asked, dict[str, Ending]]:
    """Train until nothing is left: in one round, or in as many as a search takes. What was asked for, as it is known
    now, and how the trials of the last round ended. A round without all its results is the last: another would be the
    same."""
    while True:
        left = asked.left(store, asha=way.asha)
        endings = _train(asked, store, left, way, cluster, driver, console, until)
        if not left or asked.search is None:
            return asked, endings
        asked = asked.again()
        outcomes = {ending.outcome for ending in endings.values()}
        if not {Outcome.FINISHED, Outcome.DIVERGED}.issuperset(outcomes) or not asked.left(store):
            return asked, endings


def _train(
    asked: Asked,
    store: Store,
    left: list[Trial],
    way: Way,
    cluster: "Cluster",
    driver: Driver,
    console: Console,
    until: float,
) -> dict[str, Ending]:
    """Run these trials, until a moment of the monotonic clock; the end of each by its id."""
    from bnscale.schedule import tune

    if not left:
        _say_size(asked, left, console, "")
        return {}
    if way.same_gpu:
        cluster = on_one_type(cluster, _devices(asked, store))
    forecasts = asked.forecasts(way.workers_per_trial, way.threads, gpu=cluster.gpus > 0)
    slots = max(1, cluster.slots(way.threads, 0) // way.workers_per_trial)
    begun = asked.begun(store)
    passes = Passes.of(asked, left, forecasts, cluster, way.sharing, begun)
    loads = passes.loads({trial.id: trial for trial in left})
    foreseen = makespan(loads, slots * way.workers_per_trial)
    _say_size(asked, left, console, f"{passes.said}, about {duration(foreseen.seconds)} for {slots} at a time")
    code = commit(asked.file.resolve().parent)
    known = {manifest.trial: manifest for manifest in begun}
    _warn_changed([known[trial.id] for trial in left if trial.id in known], code, console)
    jobs = [
        Job(
            trial,
            looking(asked.study.probes, trial),
            asked.store,
            str(asked.data),
            code,
            way.zero,
            way.save_every,
            attempts=known[trial.id].attempts if trial.id in known else 0,
            command=shlex.join([*asked.recipe, *way.words]),
        )
        for trial in left
    ]
    later = sum(forecasts[each.trial.id].seconds * n for each, n in asked.later) / slots
    with Watch(passes.seconds, console, later, passes.parts) as watch:
        endings = tune.run(
            jobs,
            forecasts,
            cluster,
            workers=way.workers_per_trial,
            threads=way.threads,
            rivals={each.trial.id: (each.cell, each.trial.seed) for each in asked.planned} if way.asha else None,
            watch=watch,
            mend=shlex.join([*asked.words, *way.words]),
            driver=driver,
            until=until,
            units=passes.units,
            sharers=passes.sharers,
        )
    for trial in [trial for trial, ending in endings.items() if way.asha and ending == Ending()]:
        _give_up(store, trial, driver)
    return endings


def _give_up(store: Store, trial: str, driver: Driver) -> None:
    """What successive halving stopped, and its worker could not note: unless another driver trains it by now."""
    manifest = store.manifest(trial)
    if manifest is None or manifest.outcome is not None or manifest.facts.get("stopped_early"):
        return
    held = claim(store.storage, trial, driver.id, driver.dead(), above=manifest.fence)
    if isinstance(held, Lease):
        store.stop_early(trial)
        release(store.storage, held)


def _devices(asked: Asked, store: Store) -> list[str]:
    """Those on which trials of this study have trained, in the order of time."""
    found = store.storage.each(store.manifest, [each.trial.id for each in asked.planned])
    facts = [manifest.facts for manifest in found if manifest]
    dated = [(each["started"], each["device"] or "") for each in facts if each.get("started") and each.get("device")]
    return [device for _, device in sorted(dated)]


def _check_size(way: Way, cluster: "Cluster") -> None:
    """Raises `Refusal` for workers that no part of the cluster has room for, whatever they train."""
    room = cluster.slots(way.threads, 0)
    if room < way.workers_per_trial:
        all_nodes = cluster.most or cluster.nodes
        has = "may have" if cluster.most else "has"
        nodes = Counter(f"{node.cpus} CPUs and {node.gpus} GPUs" for node in all_nodes)
        threads = max((node.cpus for node in all_nodes), default=1)
        fits = f"--workers-per-trial {room}" if room else f"--threads {max(1, threads)}"
        raise Refusal(
            f"--workers-per-trial {way.workers_per_trial} --threads {way.threads}: there is no room for them; the "
            f"cluster {has} {', '.join(f'{count} x ({node})' for node, count in nodes.items())}; at most {fits} fits; "
            "`ray status` shows what may still come, --address names a larger cluster"
        )


def _check_verdicts(asked: Asked, store: Store) -> None:
    """Raises `Refusal` where the query of a search leaves nothing to train and no answer."""
    stuck = [each.trial.id for search in asked.searches for each in search.next]
    if asked.search and stuck and not asked.left(store):
        raise Refusal(
            f"query {asked.search.verdict}: says nothing of {stuck[0]}, which has a result; the query of a search "
            "has a row for every trial that finished or diverged"
        )


@contextlib.contextmanager
def _leaving(again: str) -> Iterator[None]:
    """Ctrl-C while nothing trains: the end, at once. As an exception it would be lost in one of Ray's callbacks."""

    def leave(number: int, frame: FrameType | None) -> None:
        print(f"stopped; nothing is lost. To go on: {again}", flush=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- what is said --------------------------------------------------------------------------------


def _say_size(asked: Asked, left: list[Trial], console: Console, wait: str) -> None:
    count = len(asked.planned)
    turn = f"{asked.round}, " if left and asked.search else ""
    console.print(
        f"{asked.study.name}, preset {asked.preset}: {turn}{count:,} trials, {count - len(left):,} done, "
        f"{len(left):,} to train{wait}",
        soft_wrap=True,
    )


def _say_others(driver: Driver, way: Way, console: Console) -> None:
    """Who else works on this store, and what becomes of the trials that both want."""
    for other in driver.others().values():
        console.print(f"{other.who} works on this store, too; what it trains is left to it", soft_wrap=True)
    if driver.others() and way.asha:
        console.print(
            "--asha: each driver compares the trials that it trains itself; what one gives up the other leaves alone",
            soft_wrap=True,
        )


def _say_paper(asked: Asked, console: Console, slots: int) -> None:
    """What the other preset would take here."""
    try:
        paper = asked.at("paper")
    except Refusal:
        return  # what was set has a meaning for this preset only
    forecasts = paper.forecasts(1, 1, gpu=False)
    later = [forecasts[each.trial.id] for each, n in paper.later for _ in range(n)]
    cost = budget.total([*forecasts.values(), *later])
    most = "at most " if paper.search else ""
    console.print(
        f"no GPU in this cluster: preset laptop. The paper's preset has {most}{len(forecasts) + len(later):,} trials "
        "and would take "
        f"about {duration(cost.seconds / max(1, slots))} here; --preset paper runs it",
        soft_wrap=True,
    )


def _warn_changed(manifests: list[Manifest], code: str | None, console: Console) -> None:
    """Of trials that other code began, and that go on now."""
    begun = [each for each in manifests if each.outcome is None and each.step]
    changed = {each.trial: each.facts["commit"] for each in begun if each.facts.get("commit") not in (None, code)}
    if changed:
        first = next(iter(changed))
        console.print(
            f"warning: {len(changed)} of these trials go on from checkpoints of other code, as {first} of "
            f"{_short(changed[first])} (now {_short(code)}). Each keeps all its commits in the column commits; what "
            "should be of one code alone begins anew without its manifest",
            soft_wrap=True,
            markup=False,
        )


def _short(code: str | None) -> str:
    """A commit as people say it, with its plus."""
    return code.rstrip("+")[:9] + "+" * code.count("+") if code else "no commit"


def _say_aside(aside: dict[str, Failure], console: Console) -> None:
    """Trials that nothing is wrong with."""
    console.print(f"{len(aside)} set aside; running the study again goes on from their checkpoints:", soft_wrap=True)
    for trial, failure in aside.items():
        console.print(f"  {trial}: {failure.short}", soft_wrap=True, markup=False)


def _say_failed(failed: list[str], store: Store, console: Console) -> None:
    """The last line of each error, and where the whole of it is."""
    console.print(f"{len(failed)} failed; running the study again tries them again:", soft_wrap=True)
    errors: dict[str, list[str]] = {}
    for trial in failed:
        manifest = store.manifest(trial)
        error = (manifest.facts.get("error") if manifest else None) or "no error was recorded"
        errors.setdefault(error.strip().splitlines()[-1], []).append(trial)
    for error, trials in errors.items():
        console.print(f"  {', '.join(trials)}: {error}", soft_wrap=True, markup=False)
    whole = shlex.join(["bnscale", "sql", "select trial, error from trials where error is not null"])
    console.print(f"all of each: {whole} --store {shlex.quote(store.url)}", soft_wrap=True, markup=False)
