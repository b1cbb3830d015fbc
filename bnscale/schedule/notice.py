"""Whether this machine is about to be taken away: SIGTERM, or the word of the cloud that lends it.

A spot machine of AWS hears two minutes ahead, one of GCP half a minute. Both are asked at their metadata address, and
only where the firmware says that this is their machine; what a Ray cluster knows, its driver asks (schedule/tune).
"""

import contextlib
import os
import signal
import threading
import urllib.request
from enum import Enum
from pathlib import Path
from types import FrameType

POLL = 5.0  # seconds between two questions
FIRMWARE = Path("/sys/class/dmi/id/sys_vendor")


class Cloud(Enum):
    """By the name that its firmware gives; each with its metadata server."""

    AWS = "Amazon EC2", "http://169.254.169.254"
    GCP = "Google", "http://metadata.google.internal"

    @classmethod
    def here(cls, firmware: Path = FIRMWARE) -> "Cloud | None":
        """Whose machine this is; None for nobody's that gives notice."""
        try:
            vendor = firmware.read_text().strip()
        except OSError:
            return None
        return next((cloud for cloud in cls if cloud.value[0] == vendor), None)

    def takes(self, server: str | None = None) -> bool:
        """Whether it has said that this machine is about to go. Silence says nothing."""
        server = server or self.value[1]
        try:
            if self is Cloud.GCP:
                return _ask(f"{server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}) == "TRUE"
            seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
            token = _ask(f"{server}/latest/api/token", seconds, method="PUT")
            return bool(_ask(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
        except (OSError, ValueError):  # 404: there is no notice
            return False


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    # The address is a constant; a proxy of the environment does not know this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=2) as answer:
        return str(answer.read().decode().strip())


class Notice:
    """Set once the end of this process has been announced."""

    def __init__(self) -> None:
        self.given = threading.Event()
        self.busy = False  # whether there is anything to save

    def listen(self) -> None:
        """From now on; called on the main thread of a worker."""
        before = signal.getsignal(signal.SIGTERM)

        def hear(number: int, frame: FrameType | None) -> None:
            if self.busy and not self.given.is_set():
                self.given.set()  # the loop saves a checkpoint and ends
            elif callable(before):
                before(number, frame)
            else:
                os._exit(128 + number)

        signal.signal(signal.SIGTERM, hear)
        cloud = Cloud.here()
        if cloud:
            threading.Thread(target=self._poll, args=(cloud,), name="notice", daemon=True).start()

    def _poll(self, cloud: Cloud) -> None:
        while not self.given.wait(POLL):
            with contextlib.suppress(Exception):  # whatever a metadata server answers, training goes on
                if cloud.takes():
                    self.given.set()
