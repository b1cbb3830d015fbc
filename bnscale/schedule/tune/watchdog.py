"""Watches the other workers of a gang."""

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

PATIENCE = 10.0  # seconds until a process that hangs in a collective, because another worker is gone, is ended
NOTICE = 3.0  # seconds in which Ray learns of a death that other workers have already felt


class Watchdog:
    """Watches what the other workers are doing, from a thread: this process may hang in a collective meanwhile.

    When one of them dies or fails it ends the others, which breaks the collective; if that does not
    free this process either, it calls `lost`.
    """

    def __init__(self, members: list[Any], answers: list[Any], lost: Callable[[], None]) -> None:
        self.members = members
        self.answers = answers
        self.lost = lost
        self.found: str | None = None  # the error that a worker met; None for a death
        self.barked = threading.Event()
        self.over = threading.Event()  # all answered and well
        self.freed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def dismiss(self) -> bool:
        """Wait for the end of what they do. Whether it went well."""
        while not self.barked.is_set():
            if self.over.wait(0.005):
                return True
        self.freed.set()
        return False

    def verdict(self, own: str) -> str | None:
        """The error to record, where `own` is what this process met; None where a worker died."""
        self.freed.set()
        return self.found if self.barked.wait(2 * NOTICE) else own

    def _watch(self) -> None:
        left = self.answers
        while left:
            ready, left = ray.wait(left)
            dead, error = self._hear(ready)
            if not dead and error is None:
                continue
            # A death reaches the others as a broken connection: is there one behind this error?
            if not dead and left:
                late, _ = ray.wait(left, num_returns=len(left), timeout=NOTICE)
                dead, _ = self._hear(late)
            self.found = None if dead else error
            self.barked.set()
            for member in self.members:
                ray.kill(member)
            if not self.freed.wait(PATIENCE):
                self.lost()
            return
        self.over.set()

    @staticmethod
    def _hear(answers: list[Any]) -> tuple[bool, str | None]:
        """Whether a worker died, and the error that one of them met."""
        error = None
        for answer in answers:
            try:
                error = ray.get(answer) or error
            except RayActorError:
                return True, None
            except RayError as raised:
                error = str(raised)
        return False, error
