"""Real worker processes that stay warm over many tests: starting them costs seconds, a call milliseconds."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
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
        answers = []
        for rank, end in enumerate(self._ends):
            assert end.poll(120), f"worker {rank} of {self.workers} did not answer {function.__name__}{arguments}"
            answers.append(end.recv())
        for rank, (_, failure) in enumerate(answers):
            assert failure is None, f"worker {rank} of {self.workers}:\n{failure}"
        return [answer for answer, _ in answers]

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
