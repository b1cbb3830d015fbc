"""What a trial may choose, each choice with one line that says what it is and where it comes from.

`bnscale networks` prints these lines: they are the catalogue.
"""

from enum import StrEnum
from typing import NamedTuple, Self


class Choice(StrEnum):
    """A choice by its word, with a line about each: `HE = "he", "what it is (source)"`."""

    about: str

    def __new__(cls, value: str, about: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.about = about
        return member


# --- data -------------------------------------------------------------------------------------------


class DataFacts(NamedTuple):
    """What a data set is, whatever its files look like."""

    title: str
    train: int  # images
    test: int  # images
    classes: int  # or outputs of a regression
    channels: int
    side: int  # pixels
    regression: bool = False  # half squared error, added up over the batch, instead of mean cross-entropy


class Data(Choice):
    DIGITS = "digits", "scikit-learn's digits, 8x8 grey pixels; needs no file"
    MNIST = "mnist", "28x28 grey handwritten digits (LeCun et al. 1998)"
    FASHION_MNIST = "fashion_mnist", "28x28 grey clothes (Xiao et al. 2017)"
    CIFAR10 = "cifar10", "32x32 colour photographs, 10 classes (Krizhevsky 2009)"
    CIFAR100 = "cifar100", "32x32 colour photographs, 100 classes (Krizhevsky 2009)"
    LINEAR_TEACHER = (
        "linear_teacher",
        "x and A x for 1,000 Gaussian x and a Gaussian A of `width` squared (Santurkar et al. 2018, section 3.1)",
    )

    @property
    def facts(self) -> DataFacts:
        return _FACTS[self]

    @property
    def has_files(self) -> bool:
        return self not in (Data.DIGITS, Data.LINEAR_TEACHER)


_FACTS = {
    # scikit-learn's digits come without a split; data.py draws this one, the same for everybody.
    Data.DIGITS: DataFacts("digits", 1437, 360, 10, 1, 8),
    Data.MNIST: DataFacts("MNIST", 60_000, 10_000, 10, 1, 28),
    Data.FASHION_MNIST: DataFacts("Fashion-MNIST", 60_000, 10_000, 10, 1, 28),
    Data.CIFAR10: DataFacts("CIFAR-10", 50_000, 10_000, 10, 3, 32),
    Data.CIFAR100: DataFacts("CIFAR-100", 50_000, 10_000, 100, 3, 32),
    # Inputs and outputs have as many dimensions as the network is wide: `Trial.facts` knows.
    Data.LINEAR_TEACHER: DataFacts("linear teacher", 1000, 1000, 0, 0, 1, regression=True),
}


class Pixels(Choice):
    """What happened to the images before we got them. A lossy copy gives other numbers."""

    ORIGINAL = "original", "as they were published"
    JPEG = "jpeg", "compressed once, with losses, on their way here"


class Augmentation(Choice):
    NONE = "none", "images as they are"
    SHIFT = "shift", "moved by up to 1/8 of the side in each direction, black outside: 4 pixels at 32"
    FLIP_SHIFT = "flip_shift", "the same, and mirrored with probability 1/2 (Frankle et al. 2021)"


# --- networks ---------------------------------------------------------------------------------------


class Network(Choice):
    RESNET = "resnet", "CIFAR ResNet: three stages of blocks of two (He et al. 2016, section 4.2; Frankle et al. 2021)"
    VGG = "vgg", "VGG for CIFAR with one linear layer (Frankle's code); Santurkar et al. 2018's is like VGG-16"
    VGG_RESIDUAL = "vgg_residual", "VGG of one width with skips around blocks of two, 38 layers (interim report)"
    IMAGENET_RESNET = "imagenet_resnet", "torchvision's ResNet-18 to -152, and -200 (He et al. 2016, table 1)"
    LINEAR = "linear", "deep linear network, a product of matrices (Santurkar et al. 2018, 3.1; Bjorck et al. 2018, 4)"


class Norm(Choice):
    """What normalizes. All give each channel its own gamma and beta where `affine` says so."""

    NONE = "none", "nothing"
    BATCH = "batch", "batch normalization over `norm_batch` images (Ioffe & Szegedy 2015)"
    LAYER = "layer", "over all channels and pixels of an image (Ba et al. 2016)"
    GROUP = "group", "over the pixels of each of `groups` groups of channels of an image (Wu & He 2018)"
    INSTANCE = "instance", "over the pixels of each channel of an image (Ulyanov et al. 2016)"
    RENORM = "renorm", "batch renormalization, corrected towards the running statistics (Ioffe 2017)"
    L1 = "l1", "mean removed, divided by the mean |x| taken before (Santurkar et al. 2018, section 3.3)"
    L2 = "l2", "mean removed, divided by the root mean x^2 taken before (Santurkar et al. 2018, section 3.3)"
    LINF = "linf", "mean removed, divided by the largest |x| taken before (Santurkar et al. 2018, section 3.3)"
    NOISY = "noisy", "batch normalization, then random scale and shift anew each step (Santurkar et al. 2018, alg. 1)"
    NOISE = "noise", "the same random scale and shift without normalization (Santurkar et al. 2018, section 2.1)"

    @property
    def over_images(self) -> bool:
        """Whether its statistics are of several images at once."""
        return self in (Norm.BATCH, Norm.RENORM, Norm.L1, Norm.L2, Norm.LINF, Norm.NOISY)

    @property
    def parameterless(self) -> bool:
        """Whether it has no gamma and beta."""
        return self in (Norm.NONE, Norm.NOISE)


class Placement(Choice):
    """Where norms stand; and of those, which have gamma and beta (`affine_at`, where `every` is every norm placed).

    A shortcut's norm counts as the layer that the shortcut runs beside.
    """

    EVERY = "every", "after every convolution, on shortcuts too (Frankle et al. 2021)"
    EVERY_2 = "every_2", "after every 2nd layer (interim report, section 6)"
    EVERY_3 = "every_3", "after every 3rd layer"
    EVERY_4 = "every_4", "after every 4th layer"
    EVERY_5 = "every_5", "after every 5th layer (interim report, section 6)"
    EVERY_10 = "every_10", "after every 10th layer"
    FIRST = "first", "after the first layer only"
    LAST = "last", "one before the classifier only (Bjorck et al. 2018, appendix)"
    STAGE_ENDS = "stage_ends", "after the last layer of each stage"
    BRANCH = "branch", "within residual branches only: not at the stem, not on shortcuts"
    NONE = "none", "nowhere"


class Affine(Choice):
    """Which of gamma and beta a norm layer has, where `affine_at` gives it any."""

    BOTH = "both", "gamma and beta (Ioffe & Szegedy 2015)"
    GAMMA = "gamma", "gamma only: no shift (interim report, section 6)"
    BETA = "beta", "beta only: no scale (interim report, section 6)"


class Trainable(Choice):
    """Which tensors training may change. Every other one stays at its initialisation."""

    ALL = "all", "everything"
    BN = "bn", "gamma and beta, of shortcuts too (Frankle et al. 2021)"
    BN_OUTPUT = "bn_output", "gamma, beta and the classifier (Frankle et al. 2021, ImageNet)"
    BN_SHORTCUT_OUTPUT = "bn_shortcut_output", "gamma, beta, shortcut convolutions and the classifier (Frankle v1)"
    SHORTCUT_OUTPUT = "shortcut_output", "shortcut convolutions and the classifier (Frankle v1)"
    OUTPUT = "output", "the classifier"
    GAMMA = "gamma", "gamma alone"
    BETA = "beta", "beta alone"
    WEIGHTS = "weights", "everything but gamma and beta (Frankle et al. 2021, introduction)"
    TWO_PER_CHANNEL = (
        "two_per_channel",
        "two random weights of each channel, as many as gamma and beta (Frankle, 4)",
    )
    NONE = "none", "nothing (Frankle et al. 2021)"


class NormInit(Choice):
    """Initial gamma and beta (Frankle's code, bn_initializers)."""

    UNIFORM = "uniform", "gamma uniform on [0, 1], beta 0 (Frankle et al. 2021)"
    ONES = "ones", "gamma 1, beta 0 (Ioffe & Szegedy 2015)"
    ONES_ONES = "ones_ones", "gamma 1, beta 1 (Frankle's code, oneone)"
    SYMMETRIC = "symmetric", "gamma uniform on [-1, 1], beta 0 (Frankle's code, positivenegative)"
    NORMAL = "normal", "gamma standard normal, beta 0"


class WeightInit(Choice):
    HE_NORMAL = "he_normal", "normal, variance 2 / fan-in (He et al. 2015, equation 10)"
    HE_UNIFORM = "he_uniform", "uniform, variance 2 / fan-in (He et al. 2015)"
    GLOROT_NORMAL = "glorot_normal", "normal, variance 2 / (fan-in + fan-out) (Glorot & Bengio 2010, equation 12)"
    GLOROT_UNIFORM = "glorot_uniform", "uniform, variance 2 / (fan-in + fan-out) (Glorot & Bengio 2010, equation 16)"
    ORTHOGONAL = "orthogonal", "orthonormal rows or columns of the flattened weight (Saxe et al. 2014)"
    DELTA_ORTHOGONAL = "delta_orthogonal", "orthonormal at the kernel's centre, 0 elsewhere (Xiao et al. 2018)"
    BINARY = "binary", "plus or minus sqrt(2 / fan-in) (Frankle's code, binary)"
    GAUSSIAN = "gaussian", "standard normal, unscaled (Bjorck et al. 2018, section 4)"


class OutputBias(Choice):
    """The classifier's biases at initialisation."""

    RANDOM = "random", "uniform within 1 / sqrt(fan-in) of 0 (torch's; Frankle's code leaves it alone)"
    ZERO = "zero", "all 0"
    EVEN = "even", "such that the mean softmax over the first batch is even (a reviewer of Bjorck et al. 2018)"


# --- training ---------------------------------------------------------------------------------------


class DecayOn(Choice):
    """What weight decay acts on, among what trains."""

    ALL = "all", "every parameter, gamma and beta too (Frankle et al. 2021)"
    WEIGHTS = "weights", "weights only: not gamma, beta or other biases (He et al. 2019, section 3.1)"


class Precision(Choice):
    FP32 = "fp32", "32-bit floating point"
    BF16 = "bf16", "autocast: convolutions in bfloat16; gamma, beta and all statistics stay float32"
