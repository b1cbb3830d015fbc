"""Real worker processes that stay warm over many tests: starting them costs seconds, a call milliseconds."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


class Crew:
    """`workers` fresh processes. Calling it runs a function on all, with the worker's rank first; answers by rank."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.workers = workers
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for end in self._ends:
            end.send((function, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < self.workers:
            silent = [end for rank, end in enumerate(self._ends) if rank not in answers]
            heard = wait(silent, timeout=100)
            assert heard, f"of {self.workers} workers only {sorted(answers)} answered {function.__name__}{arguments}"
            for end in heard:
                rank = self._ends.index(end)
                answer, failure = end.recv()
                # At once: the others may wait for this one for ever.
                assert failure is None, f"worker {rank} of {self.workers}:\n{failure}"
                answers[rank] = answer
        return [answers[rank] for rank in range(self.workers)]

    def dismiss(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()  # ending by itself, a process with DeepSpeed in it takes seconds
            process.join()


def _work(rank: int, end: Connection) -> None:
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((function(rank, *arguments), None))
        except Exception:  # it is handed to the test
            end.send((None, traceback.format_exc()))
