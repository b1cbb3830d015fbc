"""A stream that keeps nobody waiting: a stopped terminal, or a pipe that nobody reads, must not stop training."""

import io
import threading
from collections import deque
from typing import TextIO

MOST = 1000  # pieces of text that wait to be read


class Patient(io.TextIOBase):
    """Hands text on to another stream from a thread. What finds no room there, nor among the `MOST` pieces that may
    wait, is dropped, and counted in one line once there is room again."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: deque[str] = deque()
        self._dropped = 0
        self._over = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._hand_on, name="patient", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        with self._news:
            if len(self._waiting) < MOST:
                self._waiting.append(text)
                self._news.notify()
            else:
                self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """Nothing to wait for."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a property there, too, but declared as a variable
        return self._stream.encoding

    def drain(self) -> None:
        """Wait until all has been read; nothing may be written any more."""
        with self._news:
            self._over = True
            self._news.notify()
        self._thread.join()

    def _hand_on(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._over)
                if not self._waiting:
                    return
                text = "".join(self._waiting)
                self._waiting.clear()
                if self._dropped:
                    text += f"\n({self._dropped} more pieces of this were not shown: nobody read them)\n"
                    self._dropped = 0
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):  # its reader has gone: training goes on
                pass
