"""What went wrong is told from real errors, and what follows is a table. Nothing here starts Ray."""

import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, NodeDiedError

from bnscale.schedule.failure import ALIKE, POLICY, Failure, Judge, Kind, Memory, Then
from bnscale.schedule.notice import Cloud, Notice
from bnscale.schedule.patient import MOST, Patient
from bnscale.schedule.tune.watchdog import Pulse, stacks
from bnscale.storage import Folder, StoreFailure

GIB = 2**30

# --- evidence -------------------------------------------------------------------------------------


def raised(act: Callable[[], Any]) -> Failure:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - of every class
        act()
    return Failure.of(caught.value)


def in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_server(server.getsockname())


def refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()
    socket.create_connection(free)


def same_port_for_torch() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        torch.distributed.TCPStore("127.0.0.1", server.getsockname()[1], 1, is_master=True)


def nobody_comes() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    store.wait(["never"], torch.distributed.default_pg_timeout / 1e5)


def full() -> None:
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def forbidden() -> None:
    """A data set or a library that this user may not read: nothing of the store."""
    raise PermissionError(errno.EACCES, "Permission denied", "/data/cifar")


def from_a_broken_store() -> None:
    try:
        raise StoreFailure("results: cannot be written (connection reset by peer)")
    except StoreFailure as error:
        raise RuntimeError("training stopped") from error


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda: torch.empty(2**50), Kind.OOM),
        (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), Kind.OOM),
        (lambda: bytearray(2**60), Kind.OOM),
        (in_use, Kind.PORT),
        (same_port_for_torch, Kind.PORT),
        (refused, Kind.WORKER),
        (nobody_comes, Kind.HANG),
        (full, Kind.STORAGE),
        (lambda: Folder("/proc/none").write("x", b""), Kind.STORAGE),
        (from_a_broken_store, Kind.STORAGE),
        (lambda: torch.ones(2) @ torch.ones(3), Kind.CODE),
        (lambda: {}["key"], Kind.CODE),
        (forbidden, Kind.CODE),
        (lambda: open("/nonexistent"), Kind.CODE),  # noqa: SIM115
    ],
)
def test_an_error_tells_its_kind(act: Callable[[], Any], kind: Kind) -> None:
    assert raised(act).kind is kind


def test_real_memory_that_runs_out_is_an_out_of_memory() -> None:
    def limited() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
        try:
            torch.ones(2**29)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    failure = raised(limited)
    assert failure.kind is Kind.OOM
    assert "allocate memory" in failure.short


def test_the_words_of_ray_tell_a_worker_from_a_node() -> None:
    assert Failure.of_death(str(ActorDiedError())).kind is Kind.WORKER
    assert Failure.of_death(str(ActorDiedError()), preempted=True).kind is Kind.PREEMPTED
    assert (
        Failure.of_death(str(NodeDiedError("The actor died because its node has died. Node Id: 3"))).kind is Kind.NODE
    )
    assert Failure.of_death("\tthe actor's node was preempted: spot").kind is Kind.PREEMPTED
    low = "Task was killed due to the node running low on memory."
    assert Failure.of_death(low).kind is Kind.OOM
    told = "The actor died because of an error raised in its creation task, WorkerDiedError: a worker is gone"
    assert Failure.of_death(told).kind is Kind.WORKER
    told = "The actor died because of an error raised in its creation task, ImportError: no torch"
    assert Failure.of_death(told).kind is Kind.CODE
    # What is said to every death, and says nothing.
    words = "The actor is dead because its worker process has died. Common causes include: the OOM killer"
    assert Failure.of_death(words) == Failure(Kind.WORKER, "The actor is dead because its worker process has died")


def test_of_two_failures_in_a_gang_the_cause_is_told_from_what_it_caused() -> None:
    cause, caused = raised(lambda: torch.ones(2) @ torch.ones(3)), raised(refused)
    assert cause.or_(caused) is caused.or_(cause) is cause.or_(None) is cause


@pytest.mark.parametrize(
    ("total", "others", "peak", "forecast", "kind"),
    [
        (16, 0, 15, 20, Kind.OOM),  # too large for the device
        (16, 0, 15, 10, Kind.OOM),  # alone, and larger than forecast
        (16, 8, 7, 10, Kind.NEIGHBOUR),  # it would have had room
        (16, 8, 7, 20, Kind.OOM),  # not even alone
        (16, 2, 3, 10, Kind.OOM),  # there is room beside them: something else is wrong
        (16, 0.25, 15.5, 15.9, Kind.OOM),  # a driver's own memory is no neighbour
    ],
)
def test_a_neighbour_is_who_holds_what_would_have_been_enough(
    total: float, others: float, peak: float, forecast: float, kind: Kind
) -> None:
    assert Memory(*(round(each * GIB) for each in (total, others, peak, forecast))).kind is kind


# --- what follows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_is_tried_as_often_as_the_table_says_without_getting_further(kind: Kind) -> None:
    judge, policy = Judge(10), POLICY[kind]
    then = [judge.failed("a", Failure(kind, ""), may_recompute=False) for _ in range(policy.patience + 1)]
    assert then == [Then.AGAIN] * policy.patience + [policy.then]
    assert policy.then in (Then.FAILED, Then.ASIDE)


def test_no_number_of_deaths_ends_a_trial_that_gets_further_in_between() -> None:
    judge = Judge(1)
    for step in range(1, 100):
        judge.progressed("a", step)
        assert judge.failed("a", Failure(Kind.WORKER, "killed"), may_recompute=False) is Then.AGAIN
        judge.progressed("a", step // 2)  # back at its checkpoint, which is no progress


def test_a_trial_whose_worker_dies_again_and_again_at_one_step_has_failed_and_says_where() -> None:
    judge = Judge(1)
    judge.progressed("a", 7)
    for _ in range(4):
        judge.progressed("a", 5)
        then = judge.failed("a", Failure(Kind.WORKER, "segmentation fault"), may_recompute=False)
    assert then is Then.FAILED
    said = judge.story("a", Failure(Kind.WORKER, "segmentation fault")).text
    assert said == "a worker died 4 times at step 7 or before it; the last time: segmentation fault"


def test_out_of_memory_is_tried_once_more_with_activation_checkpointing() -> None:
    judge, failure = Judge(2), Failure(Kind.OOM, "out of memory")
    assert judge.failed("a", failure, may_recompute=True) is Then.RECOMPUTING
    assert judge.recomputing("a")
    judge.progressed("a", 100)
    assert judge.failed("a", failure, may_recompute=True) is Then.FAILED
    assert judge.failed("b", failure, may_recompute=False) is Then.FAILED


def code(line: int) -> Failure:
    return Failure(Kind.CODE, "KeyError: 'x'", f"KeyError at loop.py:{line}")


@pytest.mark.parametrize(
    ("trials", "ended", "hopeless"),
    [
        (30, [code(1)] * (ALIKE - 1), False),
        (30, [code(1)] * ALIKE, True),
        (30, [code(1), code(1), code(2)], False),  # not alike
        (30, [code(1), None, code(1), code(1), code(1)], False),  # one of the first trained
        (30, [Failure(Kind.STORAGE, "disk full")] * ALIKE, True),
        (30, [Failure(Kind.WORKER, f"died at step {step}") for step in range(ALIKE)], True),  # each again and again
        (30, [Failure(Kind.HANG, f"no step in {seconds} s") for seconds in range(ALIKE)], True),
        (30, [Failure(Kind.WORKER, "died"), Failure(Kind.HANG, "no step"), Failure(Kind.WORKER, "died")], False),
        (30, [Failure(Kind.NODE, "lost")] * ALIKE, False),  # the machines' error is not the study's
        (30, [Failure(Kind.OOM, "out of memory")] * ALIKE, False),  # the longest come first; a smaller one may fit
        (2, [code(1)] * 2, True),
    ],
)
def test_a_study_is_hopeless_where_its_first_trials_end_in_one_error(
    trials: int, ended: list[Failure | None], hopeless: bool
) -> None:
    judge = Judge(trials)
    for failure in ended:
        judge.ended(failure)
    assert (judge.hopeless is not None) == hopeless


# --- the pulse ------------------------------------------------------------------------------------


def test_a_step_that_takes_too_long_is_noticed_and_readings_have_their_time() -> None:
    heard = threading.Event()
    told: list[str] = []

    def stalled(wrong: str) -> None:
        told.append(wrong)
        heard.set()

    pulse = Pulse(0.0, stalled, floor=0.4)
    try:
        for _ in range(5):
            pulse.going()
            pulse.beat()
        time.sleep(1.0)  # between two steps: a reading
        assert not told
        pulse.going()
        assert heard.wait(60)
    finally:
        pulse.end()
    assert "no step in" in told[0]
    assert "the limit is 0 s" in told[0]


def test_the_limit_is_ten_median_steps_ten_foreseen_ones_before_there_are_any_and_never_less_than_its_floor() -> None:
    pulse = Pulse(60.0, lambda wrong: None, floor=120.0)
    try:
        pulse.going()
        assert pulse.limit == 600.0
        pulse._taken.extend([20.0, 30.0, 4000.0])
        assert pulse.limit == 300.0
        pulse._taken.extend([1.0] * 10)
        assert pulse.limit == 120.0
    finally:
        pulse.end()


def test_what_comes_between_two_steps_has_a_longer_limit_and_idle_time_none() -> None:
    heard = threading.Event()
    told: list[str] = []

    def stalled(wrong: str) -> None:
        told.append(wrong)
        heard.set()

    pulse = Pulse(0.0, stalled, floor=60.0, rest=0.4)
    try:
        pulse.going()
        pulse.beat()
        pulse.idle()
        time.sleep(1.0)  # until the schedule calls again
        assert not told
        pulse.going()
        pulse.beat()
        assert heard.wait(60)  # a checkpoint or a reading that never ends
    finally:
        pulse.end()
    assert "no end of what comes between two steps" in told[0]


def test_a_reading_may_take_ten_times_as_long_as_the_longest_and_as_long_as_a_thousand_steps() -> None:
    pulse = Pulse(1.0, lambda wrong: None)
    try:
        assert pulse.limit == 1000.0  # the first, where a step is foreseen to take a second
        pulse._taken.append(0.1)
        assert pulse.limit == 900.0
        pulse._longest = 200.0
        assert pulse.limit == 2000.0
    finally:
        pulse.end()


def test_stacks_show_every_thread() -> None:
    over = threading.Event()

    def hangs_here() -> None:
        over.wait()

    thread = threading.Thread(target=hangs_here)
    thread.start()
    try:
        told = stacks()
    finally:
        over.set()
        thread.join()
    assert "hangs_here" in told
    assert "test_stacks_show_every_thread" in told


# --- notice ---------------------------------------------------------------------------------------

ASKS = """
import os, signal, time
from bnscale.schedule.notice import Notice
notice = Notice()
notice.listen()
notice.busy = True
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.05)
print("given", notice.given.is_set(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""


def test_the_first_sigterm_is_a_notice_and_the_second_an_end() -> None:
    done = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, timeout=60)
    assert done.stdout == "given True\n"
    assert done.returncode == 143


def test_a_process_with_nothing_to_save_ends_at_once() -> None:
    lazy = ASKS.replace("notice.busy = True", "")
    done = subprocess.run([sys.executable, "-c", lazy], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("", 143)


def test_a_cloud_is_known_by_its_firmware(tmp_path: Path) -> None:
    firmware = tmp_path / "sys_vendor"
    assert Cloud.here(firmware) is None
    for said, cloud in (("Amazon EC2\n", Cloud.AWS), ("Google\n", Cloud.GCP), ("QEMU\n", None)):
        firmware.write_text(said)
        assert Cloud.here(firmware) is cloud


def test_notice_that_cannot_be_read_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    assert not Cloud.AWS.takes(f"http://127.0.0.1:{free}")
    assert not Cloud.GCP.takes(f"http://127.0.0.1:{free}")


def test_notice_begins_empty() -> None:
    assert not Notice().given.is_set()


# --- a terminal that nobody reads -----------------------------------------------------------------


def test_who_writes_to_a_full_pipe_does_not_wait_and_the_reader_hears_what_is_missing() -> None:
    here, there = os.pipe()
    with open(here) as reader, open(there, "w") as stream:
        patient = Patient(stream)
        start = time.monotonic()
        for number in range(3 * MOST):
            patient.write(f"{number} {'x' * 1000}\n")
        assert time.monotonic() - start < 30
        assert patient.isatty() is False
        read: list[str] = []
        reading = threading.Thread(target=lambda: read.extend(reader))
        reading.start()
        patient.drain()
        stream.close()
        reading.join()
    lines = [line for line in read if line.strip()]
    numbers = [int(line.split()[0]) for line in lines if line[0].isdigit()]
    assert numbers == list(range(len(numbers)))  # in order, from the first
    assert len(numbers) >= MOST
    assert any(f"({3 * MOST - len(numbers)} more pieces" in line for line in lines)


def test_a_reader_that_goes_away_disturbs_nobody() -> None:
    here, there = os.pipe()
    os.close(here)
    stream = os.fdopen(there, "w")
    patient = Patient(stream)
    patient.write("anybody?")
    patient.drain()
    with contextlib.suppress(OSError):
        stream.close()
