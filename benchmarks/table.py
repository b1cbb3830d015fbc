"""The tables that the benchmarks print: one line a measurement, beside it what the previous release took.

`previous.json` holds the figures of the release before, by benchmark, line and column, each with the machine, the
cores, the threads and the torch that they were measured with. Where processor, cores and threads are the same as here
the table says the ratio to it; where they are others, `other machine`: figures of two machines are no comparison.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bnscale.engine.machine import device_name

PREVIOUS = Path(__file__).with_name("previous.json")


@dataclass(frozen=True)
class Column:
    name: str
    format: str  # of a number: "8.1f", "18" for text
    compared: bool = False  # with the previous release's

    @property
    def width(self) -> int:
        return max(len(self.name), int(self.format.partition(".")[0].rstrip("dfgs") or 0))


class Table:
    """Prints each line as it is measured, and keeps it for programs.

    `key` names the columns that tell one line from another, in `previous.json` too: `110 fp32`.
    """

    def __init__(
        self, benchmark: str, columns: Sequence[Column], key: Sequence[str], device: torch.device, title: str = ""
    ) -> None:
        self.benchmark, self.columns, self.key, self.device = benchmark, columns, key, device
        self.lines: list[dict[str, Any]] = []
        if title:
            print(title)
        heads = [f"{column.name:>{column.width}}" for column in columns]
        print("  ".join([*heads, "to the previous release"] if any(c.compared for c in columns) else heads), flush=True)

    def line(self, values: dict[str, Any]) -> None:
        """Numbers or text by column; lists are the ratios of single turns. What has no column is kept, not printed."""
        self.lines.append(values)
        cells = []
        for column in self.columns:
            value = values.get(column.name)
            if isinstance(value, list):
                value = spread(value)
            text = "-" if value is None else value if isinstance(value, str) else f"{value:{column.format}}"
            cells.append(f"{text:>{column.width}}")
        told = [
            against(self.benchmark, " ".join(str(values[name]) for name in self.key), column.name, values, self.device)
            for column in self.columns
            if column.compared
        ]
        print("  ".join([*cells, *dict.fromkeys(told)]), flush=True)

    def save(self, folder: Path | None) -> None:
        """As `<benchmark>.json` in a folder, with the machine and the versions; nowhere for None."""
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"benchmark": self.benchmark, **here(self.device), "lines": self.lines}
        (folder / f"{self.benchmark}.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")


def against(benchmark: str, line: str, column: str, values: dict[str, Any], device: torch.device) -> str:
    """`1.20 x` the previous release's figure; `other machine`; or `-` where it measured no such thing."""
    before = _previous().get(benchmark)
    figure = before and before["lines"].get(line, {}).get(column)
    value = values.get(column)
    if not before or not figure or value is None:
        return "-"
    now = here(device)
    same = all(word in now["device"] for word in before["device"].split())
    if not same or any(now[name] != before[name] for name in ("cores", "threads")):
        return "other machine"
    return f"{value / figure:.2f} x"


@lru_cache
def _previous() -> dict[str, Any]:
    return json.loads(PREVIOUS.read_text()) if PREVIOUS.exists() else {}


def here(device: torch.device) -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def told(device: torch.device) -> str:
    """The same in a line."""
    facts = here(device)
    return (
        f"machine  {facts['device']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, "
        f"Python {facts['python']}"
    )


def spread(ratios: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def device(name: str) -> torch.device:
    """`cuda` is the first GPU."""
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)


def asked(parser: argparse.ArgumentParser) -> None:
    """The arguments that benchmarks share."""
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="cores that torch uses (default: all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the figures also go as JSON")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: digits, and the limit hardly measured")
