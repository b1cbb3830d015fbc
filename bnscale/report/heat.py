"""Images of cells: where they lie, their colours and the bar beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bnscale.report.look import short
from bnscale.report.table import whole

# Perceptually uniform, told apart with every common colour vision, and 0 is dark in both.
ONE_SIGN, TWO_SIGNS = "viridis", "berlin"

# How a cell without a reading is filled. Neither map has this grey, and the page leaves it alone, light or dark.
MISSING: dict[str, Any] = {"facecolor": "#c5cad0", "edgecolor": "#9298a0", "hatch": "//////", "linewidth": 0}


class Ruler:
    """Where the cells of an image lie along one side.

    Whole numbers are laid out evenly, with a blank cell for each that no row has. So are evenly spaced fractions;
    others stand one beside the other, and the ticks say which they are.
    """

    def __init__(self, places: np.ndarray) -> None:
        self.places = np.unique(places)
        self.whole = whole(places)
        steps = np.diff(self.places)
        if self.whole and len(steps) and len(steps) * 4 > np.ptp(places) / np.gcd.reduce(steps.astype(int)):
            step = np.gcd.reduce(steps.astype(int))
            self.places = np.arange(self.places[0], self.places[-1] + step, step)
            steps = np.diff(self.places)
        self.count = len(self.places)
        self.even = not len(steps) or bool(np.allclose(steps, steps[0], rtol=1e-3))
        half = steps[0] / 2 if len(steps) else 0.5
        self.edges = (self.places[0] - half, self.places[-1] + half) if self.even else (-0.5, self.count - 0.5)

    def index(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.places, places)

    def tick(self, axis: Axis) -> None:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=self.whole or not self.even))
        if not self.even:
            axis.set_major_formatter(
                FuncFormatter(
                    lambda at, _: short(float(f"{self.places[round(at)]:.3g}")) if 0 <= round(at) < self.count else ""
                )
            )


def range_of_colours(cells: np.ndarray) -> tuple[float, float, str]:
    """Ends of the colour bar and the name of the map."""
    known = cells[np.isfinite(cells)]
    least, most = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if least < 0:
        bound = max(-least, most)
        return -bound, bound, TWO_SIGNS
    begin = least if most / 2 < least < most else 0.0
    return begin, most or 1.0, ONE_SIGN


def colour_bar(axes: Axes, image: AxesImage, label: str, across: int, gid: str) -> None:
    """As tall as the axes, right of them; `gid` names its image in the SVG.

    An image of 256 dots: matplotlib's own bar draws as many shapes and is a hundred times as large.
    """
    low, high = image.get_clim()
    bar = axes.inset_axes((1.01 + 0.015 * across, 0, 0.01 + 0.025 * across, 1))
    bar.imshow(
        np.linspace(low, high, 256)[:, None], cmap=image.get_cmap(), vmin=low, vmax=high, extent=(0, 1, low, high),
        origin="lower", aspect="auto", interpolation="none", gid=gid,
    )  # fmt: skip
    bar.spines[:].set_visible(True)
    bar.xaxis.set_visible(False)
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    bar.tick_params(labelsize=8)
    bar.set_ylabel(label)
