"""Every file of a store against its manifest and its own checksums; what can be mended, and what to run again.

Nothing is ever deleted: what is damaged is set aside below `damaged/`, under the name that it had; where something
else is already there, with a part of its checksum added. A manifest that is
damaged or lost is written anew from what its trial's data files say of themselves (`store.rebuilt`). What cannot be
known is not invented: a trial whose files do not call themselves a whole result has none, and goes on from its last
checkpoint that they reach, or from its beginning.
"""

import hashlib
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bnscale import lease
from bnscale.engine import checkpoint
from bnscale.lease import BEATS, LIMIT, Driver, Held, Lease
from bnscale.storage import StoreFailure, reason
from bnscale.store import DamagedManifest, Footer, Manifest, Part, Store, footer, is_named_for, rebuilt, rows_of
from bnscale.trial import Refusal

_DATA = re.compile(r"(?P<table>[a-z][a-z0-9_]*)/trial=(?P<trial>[^/]+)/(?P<file>[^/]+\.parquet)")
_CHECKPOINT = re.compile(r"checkpoints/trial=(?P<trial>[^/]+)/step-(?P<step>\d+)\.(json|safetensors)")
LOOKS = 3  # at a trial that changes while it is looked at


@dataclass(frozen=True)
class Harm:
    """A file that is not as it should be."""

    trial: str
    key: str
    wrong: str
    lost: str = ""  # what of the results it was

    def __str__(self) -> str:
        return f"{self.key}: {self.wrong}" + (f"; lost: {self.lost}" if self.lost else "")


@dataclass
class Verdict:
    """What was found in a store."""

    trials: int = 0
    files: int = 0  # that count
    bytes: int = 0  # of those
    checkpoints: int = 0
    orphans: int = 0  # data files that no manifest names: a crash or a running trial leaves them, and nobody reads them
    harms: list[Harm] = field(default_factory=list)
    commands: dict[str, str | None] = field(default_factory=dict)  # of each trial with harm, what trained it


@dataclass
class _Kept:
    """The keys of one trial."""

    data: dict[str, str] = field(default_factory=dict)  # key to table
    checkpoints: set[int] = field(default_factory=set)  # their steps


def verify(store: Store) -> Verdict:
    """Read all of a store. Raises `StoreFailure` where it cannot even be listed."""
    kept = _keys(store)
    verdict = Verdict(trials=len(kept))
    for found in store.storage.each(lambda trial: _look(store, trial, kept[trial]), sorted(kept)):
        verdict.files += found.files
        verdict.bytes += found.bytes
        verdict.checkpoints += found.checkpoints
        verdict.orphans += found.orphans
        verdict.harms += found.harms
        verdict.commands |= found.commands
    return verdict


def repair(
    store: Store, verdict: Verdict, say: Callable[[str], None] = lambda line: None, *, limit: float = LIMIT
) -> list[str]:
    """Mend what can be; what became of each trial, which is also said at once. Trials that somebody trains are left
    alone. Who trains one and gives no sign of life is listened to for `limit` seconds, and then is dead.

    What stops one trial from being mended stops no other. Raises `StoreFailure` where nothing can be.
    """
    said = []
    with Driver(store.storage, "verify", limit=limit) as driver:
        for trial in sorted({harm.trial for harm in verdict.harms}):
            try:
                line = f"{trial}: {_mend_alone(store, trial, driver, say, limit)}"
            except (Refusal, StoreFailure) as error:
                line = f"{trial}: left as it is; {error}"
            said.append(line)
            say(line)
    return said


def again(verdict: Verdict, store: Store) -> list[str]:
    """The commands that train what the trials with harm have lost."""
    of: dict[str | None, list[str]] = defaultdict(list)
    for trial, command in sorted(verdict.commands.items()):
        of[command].append(trial)
    return [
        f"{command} --store {shlex.quote(store.url)}"
        if command
        else f"the study that asked for {', '.join(trials)}, with --store {shlex.quote(store.url)}"
        for command, trials in of.items()
    ]


# --- one trial ------------------------------------------------------------------------------------


def _keys(store: Store) -> dict[str, _Kept]:
    """What there is of each trial, by id."""
    kept: dict[str, _Kept] = {trial: _Kept() for trial in store.ids()}
    saved = []
    for key in store.storage.list(""):
        if data := _DATA.fullmatch(key):
            kept.setdefault(data["trial"], _Kept()).data[key] = data["table"]
        elif found := _CHECKPOINT.fullmatch(key):
            saved.append((found["trial"], int(found["step"])))
    for trial, step in saved:  # after the data files, by which a trial without a manifest is known
        if trial in kept:
            kept[trial].checkpoints.add(step)
    return kept


def _look(store: Store, trial: str, kept: _Kept) -> Verdict:
    """At one trial; again where it went on meanwhile, for then files may be gone that its manifest named."""
    for _ in range(LOOKS):
        found = Verdict()
        manifest = _manifest(store, trial, kept, found)
        if manifest is not None:
            _look_at_files(store, manifest, found)
            found.orphans = len(kept.data.keys() - {key for _, key, _ in store.named(manifest)})
        _look_at_checkpoints(store, trial, kept, found)
        if found.harms:
            found.commands[trial] = manifest.facts.get("command") if manifest else None
            if manifest is not None and manifest != _manifest(store, trial, kept, Verdict()):
                kept = _keys(store).get(trial, _Kept())
                continue
        return found
    return found


def _manifest(store: Store, trial: str, kept: _Kept, found: Verdict) -> Manifest | None:
    key = store.where(trial).removeprefix(f"{store.url}/")
    try:
        manifest = store.manifest(trial)
    except (Refusal, OSError) as error:
        found.harms.append(Harm(trial, key, reason(error) if isinstance(error, OSError) else str(error)))
        return None
    if manifest is None and kept.data:
        lost = f"what counts of {len(kept.data)} data files"
        found.harms.append(Harm(trial, key, "no such file or directory", lost))
    return manifest


def _look_at_files(store: Store, manifest: Manifest, found: Verdict) -> None:
    for table, key, part in store.named(manifest):
        found.files += 1
        found.bytes += part.bytes
        wrong = _wrong(store, key, part)
        if wrong:
            lost = f"{part.rows} rows of {table}, steps {part.first_step} to {part.last_step}"
            found.harms.append(Harm(manifest.trial, key, wrong, lost))


def _wrong(store: Store, key: str, part: Part) -> str | None:
    wrong = store.flaw(key, part)
    if wrong:
        return wrong
    try:
        content = store.storage.read(key)
        rows = rows_of(content)
    except (OSError, ValueError) as error:
        return reason(error) if isinstance(error, OSError) else str(error)
    if hashlib.sha256(content).hexdigest() != part.sha256:
        return "its checksum is not the one of its manifest"
    return None if rows == part.rows else f"has {rows} rows and its manifest says {part.rows}"


def _look_at_checkpoints(store: Store, trial: str, kept: _Kept, found: Verdict) -> None:
    place = store.checkpoints(trial)
    for step in sorted(kept.checkpoints):
        if place.size(f"step-{step}.json") is None:
            continue  # its writer was killed, or has put a later one in its place
        try:
            wrong = checkpoint.flaw(place, step)
        except StoreFailure as failure:
            wrong = reason(failure)
        if wrong and place.size(f"step-{step}.json") is None:
            continue  # a later one took its place meanwhile
        found.checkpoints += 1
        if wrong:
            lost = "the weights of that step; the checkpoint before it serves, or the trial begins anew"
            found.harms.append(Harm(trial, f"checkpoints/trial={trial}/step-{step}.safetensors", wrong, lost))


# --- mending --------------------------------------------------------------------------------------


def _mend_alone(store: Store, trial: str, driver: Driver, say: Callable[[str], None], limit: float) -> str:
    """Mend one trial under its lease."""
    held = _claim(store, trial, driver, say, limit)
    if isinstance(held, Held):
        return f"left as it is, for it is trained by {held.who}"
    try:
        return _mend(store, trial, held.fence)
    finally:
        lease.release(store.storage, held)


def _claim(store: Store, trial: str, driver: Driver, say: Callable[[str], None], limit: float) -> Lease | Held:
    """The lease of a trial, unless its holder lives: it has given a sign of life since we looked, or its silence has
    not lasted long enough in twice the time that it takes."""
    held = lease.claim(store.storage, trial, driver.id, driver.dead())
    if isinstance(held, Lease):
        return held
    until = time.monotonic() + 2 * limit
    first = lease.drivers(store.storage).get(held.driver)
    say(f"{trial}: is trained by {held.who}; listening for at most {limit:g} s whether that is alive")
    while isinstance(held, Held) and time.monotonic() < until:
        time.sleep(limit / BEATS / 2)
        now = lease.drivers(store.storage).get(held.driver)
        if now is not None and first is not None and now.beat != first.beat:
            return held
        first = now
        held = lease.claim(store.storage, trial, driver.id, driver.dead())
    return held


def _mend(store: Store, trial: str, fence: int) -> str:
    """Mend one trial, which nobody trains; what was done. Raises `Refusal` for a manifest that is not damaged but
    not for us to read, and `StoreFailure`."""
    kept = _keys(store).get(trial, _Kept())
    found = Verdict()
    try:
        manifest = store.manifest(trial)
    except DamagedManifest:
        manifest = None
        _set_aside(store, store.where(trial).removeprefix(f"{store.url}/"))
    _look_at_checkpoints(store, trial, kept, found)
    if manifest is None:
        said = _rebuild(store, trial, kept, fence)
    else:
        _look_at_files(store, manifest, found)
        said = _without(store, manifest, {harm.key for harm in found.harms}, fence)
    for harm in found.harms:
        _set_aside(store, harm.key)
        if harm.key.endswith(".safetensors"):
            _set_aside(store, harm.key.replace(".safetensors", ".json"))
            said.append("a damaged checkpoint was set aside")
    return "; ".join(dict.fromkeys(said))


def _rebuild(store: Store, trial: str, kept: _Kept, fence: int) -> list[str]:
    """Write a trial's manifest from its data files."""
    files: dict[str, dict[str, tuple[Part, Footer]]] = defaultdict(dict)
    damaged = mute = 0
    for key, table in kept.data.items():
        try:
            content = store.storage.read(key)
            rows = rows_of(content) if is_named_for(content, key) else None
        except ValueError:
            rows = None
        if rows is None:
            damaged += 1
            _set_aside(store, key)
            continue
        about = footer(content)
        if about is None or about.trial != trial or about.table != table:
            mute += 1
            continue
        name = key.rpartition("/")[2]
        part = Part(
            file=name,
            first_step=about.first_step,
            last_step=about.last_step,
            rows=rows,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        files[table][name] = part, about
    said = [f"{damaged} damaged data files were set aside"] if damaged else []
    said += [f"{mute} data files do not say whose they are"] if mute else []
    manifest = rebuilt(dict(files))
    if manifest is None:
        return [*said, "nothing of it can be known, so it is trained from its beginning"]
    store.replace(manifest.model_copy(update={"fence": fence}))
    if manifest.has_result:
        return [*said, f"its manifest was written anew: {manifest.outcome}, as its data files say"]
    went = f"step {manifest.step}" if manifest.step else "its beginning"
    return [*said, f"its manifest was written anew, without a result: it goes on from {went}"]


def _without(store: Store, manifest: Manifest, damaged: set[str], fence: int) -> list[str]:
    """Take damaged data files out of a manifest."""
    gone = [(table, part) for table, key, part in store.named(manifest) if key in damaged]
    if not gone:
        return []
    tables = {table for table, _ in gone}
    parts = {
        table: [part for part in listed if store.key(table, manifest.trial, part) not in damaged]
        for table, listed in manifest.parts.items()
    }
    steps = [part.first_step for table, part in gone if table not in manifest.kept]
    changes: dict[str, object] = {
        "fence": fence,
        "kept": {table: cadence for table, cadence in manifest.kept.items() if table not in tables},
    }
    if manifest.has_result:  # what else it has stays; the study trains it once more for what it lacks
        changes["probes"] = {table: each for table, each in manifest.probes.items() if table not in tables}
        parts = {table: listed for table, listed in parts.items() if table not in tables}
        said = f"its tables {', '.join(sorted(tables))} are to be read again, the others stay"
    else:
        step = min([manifest.step, *steps])
        changes["step"] = step
        said = f"it goes on from step {step}" if step else "it is trained from its beginning"
    store.replace(manifest.model_copy(update=changes | {"parts": parts}))
    return [f"{len(gone)} damaged data files were set aside; {said}"]


def _set_aside(store: Store, key: str) -> None:
    """Move it below `damaged/`, over nothing that is there."""
    try:
        content = store.storage.read(key)
    except FileNotFoundError:
        return
    aside = f"damaged/{key}"
    if store.storage.create(aside, content) is None and store.storage.read(aside) != content:
        store.storage.write(f"{aside}.{hashlib.sha256(content).hexdigest()}", content)
    store.storage.delete(key)


# --- what is said ---------------------------------------------------------------------------------


def lines(verdict: Verdict) -> Iterable[str]:
    """The verdict, for a person."""
    for harm in verdict.harms:
        yield f"damaged: {harm}"
    yield (
        f"{verdict.trials:,} trials, {verdict.files:,} data files of {verdict.bytes / 2**20:.1f} MiB, "
        f"{verdict.checkpoints:,} checkpoints: "
        + (f"{len(verdict.harms):,} damaged" if verdict.harms else "all as they were written")
        + (f"; {verdict.orphans:,} data files that no manifest names, and nobody reads" if verdict.orphans else "")
    )
