"""Measurements: a probe is a function from a `Snapshot` to rows, and it only looks.

The name of the function is the name of its SQL table; the fields of its row are the columns. A probe
is told nothing of cadence, files or ranks. One file a family:

    curve.py      loss and accuracy on training, validation and test images, or on the batches as they come
    gamma.py      gamma and beta of every norm layer, and what is left when small gammas are clamped
    sparsity.py   how much of each layer's output is zero
    spectrum.py   singular values of deep linear networks
    moments.py    means and deviations of the channels of each layer
    gradient.py   tails, alignment and rank of each layer's gradient
    batches.py    what the gradients of several mini-batches share, and their noise
    along.py      the loss and the layers' moments along a direction
    class_bias.py what the classifier says of each image
    parameters.py gradients of all parameters, gamma and beta beside weights
    landscape.py  loss and gradient on the way of an update
    shift.py      internal covariate shift
    activations.py distributions of what layers get and hand on, and how an update moves them
    bound.py      both sides of a theorem on batch norm's gradients
    timing.py     seconds of a step and of inference
    formulas.py   a note's formulas for batch norm's gradients, against autograd
    descent.py    the loss along the gradient, against its second-order series
    scaling.py    what norms make of the scale of weights and of gammas
"""

from bnscale.probes.activations import (
    ActivationHistogram,
    Activations,
    MomentChange,
    activation_histogram,
    activations,
    moment_change,
)
from bnscale.probes.along import (
    LossAlong,
    MomentsAlong,
    loss_along_gradient,
    loss_along_mean_gradient,
    moments_along_gradient,
)
from bnscale.probes.batches import GradientNoise, MeanGradient, gradient_noise, mean_gradient
from bnscale.probes.bound import GradientBound, gradient_bound
from bnscale.probes.cadence import END, EPOCH, START, STEP, Cadence
from bnscale.probes.class_bias import ClassBias, class_bias
from bnscale.probes.curve import BatchCurve, Curve, batch_curve, curve
from bnscale.probes.descent import Descent, descent
from bnscale.probes.formulas import NormGradient, norm_gradient
from bnscale.probes.gamma import Clamp, Gamma, GammaHistogram, clamp, gamma, gamma_histogram
from bnscale.probes.gradient import (
    Gradient,
    GradientHistogram,
    GradientMatrix,
    gradient,
    gradient_histogram,
    gradient_matrix,
)
from bnscale.probes.landscape import Landscape, landscape
from bnscale.probes.moments import ChannelMoments, channel_moments
from bnscale.probes.parameters import ParameterGradient, parameter_gradient
from bnscale.probes.probe import Probe, at_layers, at_multiples, check, demand, described, looking, only, unless
from bnscale.probes.scaling import GammaScaling, WeightScaling, gamma_scaling, weight_scaling
from bnscale.probes.shift import CovariateShift, covariate_shift
from bnscale.probes.snapshot import Row, Snapshot
from bnscale.probes.sparsity import Sparsity, sparsity
from bnscale.probes.spectrum import Spectrum, SpectrumHistogram, spectrum, spectrum_histogram
from bnscale.probes.timing import Timing, timing

TABLES: dict[str, type] = {
    "activation_histogram": ActivationHistogram,
    "activations": Activations,
    "batch_curve": BatchCurve,
    "channel_moments": ChannelMoments,
    "clamp": Clamp,
    "class_bias": ClassBias,
    "covariate_shift": CovariateShift,
    "curve": Curve,
    "descent": Descent,
    "gamma": Gamma,
    "gamma_histogram": GammaHistogram,
    "gamma_scaling": GammaScaling,
    "gradient": Gradient,
    "gradient_bound": GradientBound,
    "gradient_histogram": GradientHistogram,
    "gradient_matrix": GradientMatrix,
    "gradient_noise": GradientNoise,
    "landscape": Landscape,
    "loss_along_gradient": LossAlong,
    "loss_along_mean_gradient": LossAlong,
    "mean_gradient": MeanGradient,
    "moment_change": MomentChange,
    "moments_along_gradient": MomentsAlong,
    "norm_gradient": NormGradient,
    "parameter_gradient": ParameterGradient,
    "sparsity": Sparsity,
    "spectrum": Spectrum,
    "spectrum_histogram": SpectrumHistogram,
    "timing": Timing,
    "weight_scaling": WeightScaling,
}
"""Every table that the project's own probes write, with its row."""

__all__ = [
    "END",
    "EPOCH",
    "START",
    "STEP",
    "TABLES",
    "Cadence",
    "Curve",
    "Probe",
    "Row",
    "Snapshot",
    "activation_histogram",
    "activations",
    "at_layers",
    "at_multiples",
    "batch_curve",
    "channel_moments",
    "check",
    "clamp",
    "class_bias",
    "covariate_shift",
    "curve",
    "demand",
    "descent",
    "described",
    "gamma",
    "gamma_histogram",
    "gamma_scaling",
    "gradient",
    "gradient_bound",
    "gradient_histogram",
    "gradient_matrix",
    "gradient_noise",
    "landscape",
    "looking",
    "loss_along_gradient",
    "loss_along_mean_gradient",
    "mean_gradient",
    "moment_change",
    "moments_along_gradient",
    "norm_gradient",
    "only",
    "parameter_gradient",
    "sparsity",
    "spectrum",
    "spectrum_histogram",
    "timing",
    "unless",
    "weight_scaling",
]
