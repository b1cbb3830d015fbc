"""Measurements: a probe is a function from a `Snapshot` to rows, and it only looks.

The name of the function is the name of its SQL table; the fields of its row are the columns. A probe
is told nothing of cadence, files or ranks. One file a family:

    curve.py    loss and accuracy on training, validation and test images
    gamma.py    gamma and beta of every norm layer, and what is left when small gammas are clamped
    sparsity.py how much of each layer's output is zero
    spectrum.py singular values of deep linear networks
"""

from bnscale.probes.cadence import END, EPOCH, STEP, Cadence
from bnscale.probes.curve import Curve, curve
from bnscale.probes.gamma import HISTOGRAM, Clamp, Gamma, GammaHistogram, clamp, gamma, gamma_histogram
from bnscale.probes.snapshot import Probe, Row, Snapshot
from bnscale.probes.sparsity import Sparsity, sparsity
from bnscale.probes.spectrum import Spectrum, SpectrumHistogram, spectrum, spectrum_histogram

TABLES: dict[str, type] = {
    "curve": Curve,
    "gamma": Gamma,
    "gamma_histogram": GammaHistogram,
    "clamp": Clamp,
    "sparsity": Sparsity,
    "spectrum": Spectrum,
    "spectrum_histogram": SpectrumHistogram,
}
"""Every table that the project's own probes write, with its row."""

HISTOGRAM_BINS = len(HISTOGRAM) - 1

__all__ = [
    "END",
    "EPOCH",
    "HISTOGRAM_BINS",
    "STEP",
    "TABLES",
    "Cadence",
    "Curve",
    "Probe",
    "Row",
    "Snapshot",
    "clamp",
    "curve",
    "gamma",
    "gamma_histogram",
    "sparsity",
    "spectrum",
    "spectrum_histogram",
]
