"""Do gamma and beta receive larger gradients than the rest of a network, and learn more for it?

After the interim report "Yet Another Batch Norm Analysis", sections 1, 6 and 7, figures 2 and 3.

Question     VGG-38 with residual connections on CIFAR-100, everything trained: over training, how large is the mean
             absolute gradient of gamma, beta, convolutions and output, per parameter? And relative to the size of the
             parameter, as a share of the whole gradient, layer by layer? How large are the updates, and how far does
             each kind get from where it started?
Prediction   "Over 100 epochs, the absolute gradient of the BatchNorm layers is far higher than the rest and stays high.
             This means that these layers keep learning far more than the other ones"; "on average each BN parameter
             receives larger gradients and hence updates". The report's figures give no number.
Refuted by   an epoch at which the rest receives as much, or gradients of gamma and beta that fade.
Why          Gamma's gradient and that of a weight in front of it are sums over the same images and pixels, so the
             number of terms explains nothing. A weight's terms carry gamma (sd x) / sigma where gamma's carry the
             normalized y. As sigma is (rms weight) sqrt(fan-in) (sd x), gamma's gradient is (rms weight) sqrt(fan-in) /
             gamma times a weight's: with He's weights sqrt(2) / gamma, 2.8 at a mean gamma of 1/2 and 1.4 at gamma 1.
             The outputs do not depend on the scale of weights in front of a norm, and this ratio does: weights of
             variance 1 make it 12 times larger. Relative to sizes it turns round: a gamma of 1/2 receives 0.4 times
             what a weight of VGG-38 does. A ratio of mean absolute gradients speaks of how a network is written down.
Limits       Gradients are those of the loss on one batch at each reading, decay left out; an update is that of momentum
             and decay, over the learning rate. Beta starts at 0, where a gradient has no relative size: it is compared
             to gamma instead. The report says of its protocol only network, data and epochs; how its gammas and weights
             start, which the ratio hangs on, is not among it. So gamma is started both uniform and at 1.
Cost         Laptop: 15 trainings of 500 steps on digits, 3 minutes on 2 CPU cores. Paper preset: 15 trainings of 100
             epochs on CIFAR-100; a GPU. On a laptop with CIFAR-10:

    python studies/vgg38_gradients.py plan --preset paper    trials, hours, memory, disk; starts nothing
    python studies/vgg38_gradients.py                        runs what is not yet done, then reports
    python studies/vgg38_gradients.py --preset paper --set data=cifar10 --set epochs=1 --set seed=0 --data ~/data
    python studies/vgg38_gradients.py sql gamma_over_convolution
"""

import math
from collections.abc import Callable
from typing import Any

from recipes import VGG38_CIFAR100, VGG38_DIGITS

from bnscale.probes import EPOCH, curve, parameter_gradient
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILION, Scale, Series, panels
from bnscale.study import Preset, Study
from bnscale.trial import Network, Norm, NormInit, Trainable, WeightInit

REPORT = "Interim report"

# The legs as the queries name them.
VGG38, FROM_ONE, UNSCALED, RESNET, NO_NORM = "VGG-38", "gamma from 1", "unscaled weights", "ResNet", "no norm"
NAMES = {
    VGG38: "VGG-38",
    FROM_ONE: "VGG-38 with gamma from 1",
    UNSCALED: "VGG-38 with unscaled weights",
    RESNET: "ResNet-38",
}

KINDS = [
    Series("gamma", "gamma", VERMILION),
    Series("beta", "beta", ORANGE),
    Series("convolution", "convolutions", BLUE),
    Series("shortcut", "shortcut convolutions", PURPLE),
    Series("output weight", "output weights", GREEN),
    Series("output bias", "output biases", GREY),
]
SIDES = [Series("measured", "measured", VERMILION), Series("expected", "from the sizes of gamma and weights", INK)]

# --- claims -----------------------------------------------------------------------------------------------------


# Reading of a training, sentence, section of the report, band, reason.
SAID: list[tuple[str, str, str, tuple[float, float], str]] = [
    (
        "least",
        "The absolute gradient of batch norm's parameters is higher than that of the rest at every reading (least "
        "ratio, per parameter)",
        "section 7 and figure 2",
        (1.0, math.inf),
        "'Higher than the rest', 'over 100 epochs': above 1 at each of them. The figure's curves gave no number.",
    ),
    (
        "gradient",
        "... and is far higher (mean ratio over training)",
        "section 7",
        (2.0, math.inf),
        "'Far higher': at least twice, which a linear axis shows at a glance.",
    ),
    (
        "output",
        "... and higher than that of the output layer alone (mean ratio over training)",
        "section 7",
        (1.0, math.inf),
        "Above 1: the output layer is of the rest. Pooled with the convolutions it does not count.",
    ),
    (
        "stays",
        "... and stays high (batch norm's gradient in the last fifth of training over that in the first)",
        "section 7",
        (0.5, math.inf),
        "'Stays': at least half of what it was. A loss that falls takes every gradient with it.",
    ),
    (
        "update",
        "Each batch norm parameter receives larger updates than the rest (mean ratio over training)",
        "section 1",
        (1.0, math.inf),
        "'Larger gradients and hence updates': above 1. Measured are the updates made, with momentum and decay.",
    ),
    (
        "moved",
        "These layers keep learning far more than the others (distance from the start, per parameter, at the end)",
        "section 7",
        (2.0, math.inf),
        "'Far more': at least twice as far. What learns, goes somewhere; the report shows gradients alone.",
    ),
]


def as_said(reading: str, sentence: str, section: str, band: tuple[float, float], reason: str) -> list[Claim]:
    """A sentence of the report, held against its own training, and against whatever was trained."""
    return [
        Claim(
            sentence=f"{sentence}: CIFAR-100, 100 epochs.",
            source=f"{REPORT}, {section}",
            query="over_seeds",
            row={"leg": VGG38, "scope": "report", "reading": reading},
            paper=None,
            unit="times",
            band=band,
            reason=reason,
            standing=Standing.FOUND,
            needs=3,
        ),
        Claim(
            sentence=f"{sentence}: the network trained here.",
            source=f"Ours, from {REPORT.lower()}, {section}",
            query="over_seeds",
            row={"leg": VGG38, "scope": "any", "reading": reading},
            paper=None,
            unit="times",
            band=band,
            reason=f"{reason} The same sentence of other data and fewer epochs is ours.",
            standing=Standing.INFERRED,
            needs=3,
        ),
    ]


def ours(
    sentence: str, reading: str, band: tuple[float, float], reason: str, leg: str = VGG38, unit: str = "times"
) -> Claim:
    return Claim(
        sentence=sentence,
        source=f"Ours, from {REPORT.lower()}, section 7",
        query="over_seeds",
        row={"leg": leg, "scope": "any", "reading": reading},
        paper=None,
        unit=unit,
        band=band,
        reason=reason,
        standing=Standing.INFERRED,
        needs=3,
    )


def between(sentence: str, what: str, band: tuple[float, float], reason: str, paper: float | None = None) -> Claim:
    return Claim(
        sentence=sentence,
        source="Ours",
        query="between_legs",
        row={"what": what},
        paper=paper,
        unit="times",
        band=band,
        reason=reason,
        standing=Standing.INFERRED,
        needs=3,
    )


FROM_SIZES = (
    "A factor of 1.5 either way. The two are equal if terms are independent and every input of a layer varies alike; "
    "that they do not is worth some ten per cent and not a half, where the smallest of these ratios is 1.4."
)

CLAIMS = [
    *(claim for said in SAID for claim in as_said(*said)),
    # --- per size, as a share, by layer
    ours(
        "Relative to its size, too, a gamma receives a larger gradient than a weight of a convolution (mean ratio over "
        "training).",
        "relative",
        (1.0, math.inf),
        "Above 1, if gradients tell what learns more. At the start sizes have it at 0.4: He's weights of 288 inputs "
        "are 0.066 on average, a gamma 0.5.",
    ),
    ours(
        "Relative to its size, too, a gamma gets further from its start than a weight of a convolution (at the end).",
        "moved relative",
        (1.0, math.inf),
        "Above 1, if these layers learn more. Of sizes at the end.",
    ),
    ours(
        "Batch norm's parameters have most of the gradient's squared length (mean over training).",
        "share",
        (0.5, 1.0),
        "Most: half. They are 0.7 % of the parameters.",
        unit="%",
    ),
    ours(
        "In every layer gamma's gradient is larger than that of the convolution before it (share of layers and "
        "readings).",
        "layers",
        (0.95, 1.0),
        "All of them, one in twenty for the noise of one batch.",
        unit="%",
    ),
    # --- why
    *(
        ours(
            "At the start gamma's gradient over the convolution's is what the sizes of gamma and weights give, by no "
            f"number of terms: measured over expected, {NAMES[leg]}.",
            "expected",
            (0.667, 1.5),
            FROM_SIZES,
            leg,
        )
        for leg in NAMES
    ),
    ours(
        "... and so it is in training.",
        "expected in training",
        (0.667, 1.5),
        "A factor of 1.5 either way, as above. Beyond it, gamma's terms cancel less than a weight's, or more.",
    ),
    ours(
        "At the start beta's gradient is as large as gamma's: it sums as many terms, of the same size.",
        "beta",
        (0.667, 1.5),
        "A factor of 1.5 either way, as above: equal if the gradient at a norm's output and what the norm hands on are "
        "independent.",
    ),
    between(
        "Unscaled weights in front of norms, which compute the same, make gamma's excess larger by as much as they are "
        "larger: 12 times, at the start.",
        UNSCALED,
        (9.6, 15.0),
        "sqrt(288 / 2) in all layers but the first, whose fan-in is 9 or 27; a factor of 1.25 for the classifier, "
        "whose weights are unscaled as well, so that other images count.",
        12.0,
    ),
    *(
        ours(
            f"Batch norm's gradient is higher than that of the rest at every reading: {NAMES[leg]}.",
            "least",
            (1.0, math.inf),
            "Above 1. The report does not say how its gammas start; sizes have the ratio at 1.4 at the start, from "
            "gamma 1."
            if leg == FROM_ONE
            else "Above 1, if it is no trait of one network.",
            leg,
        )
        for leg in (FROM_ONE, RESNET)
    ),
    ours(
        "Relative to its size, too, a gamma receives a larger gradient than a weight (mean ratio over training): "
        f"{NAMES[FROM_ONE]}.",
        "relative",
        (1.0, math.inf),
        "Above 1. At the start sizes have it at 0.1, from gamma 1.",
        FROM_ONE,
    ),
    between(
        "Without norms the convolutions' gradients are larger than with them, at the start.",
        NO_NORM,
        (1.0, math.inf),
        "Above 1: without norms a residual network's signal, and its gradient, grow with every block (Bjorck et al. "
        "2018, section 3). If so, batch norm's parameters do not take over what convolutions lose.",
    ),
]

# --- figures ----------------------------------------------------------------------------------------------------


def over_training(
    y: str, ylabel: str, low: str | None = None, high: str | None = None, styles: list[Series] = KINDS
) -> Callable[[Any, Any], None]:
    """A line a kind over the steps, a panel a network."""
    return panels(
        x="step",
        y=y,
        series="kind" if styles is KINDS else "reading",
        styles=styles,
        panel="leg",
        xlabel="step",
        ylabel=ylabel,
        unit="",
        xscale=Scale.LINEAR,
        yscale=Scale.LOG,
        low=low,
        high=high,
    )


LEGS = (
    "VGG-38: gamma uniform on [0, 1], He's weights. Beside it the same with gamma from 1, with weights of variance 1, "
    "a ResNet of as many layers, and VGG-38 without norms at a hundredth of the rate."
)

FIGURES = [
    Figure(
        title="Mean absolute gradient",
        query="gradient_over_training",
        caption="Of the loss on the next batch, mean over the parameters of a kind; geometric mean over seeds, with "
        f"their range. {LEGS}",
        draw=over_training("gradient", "mean |gradient|", "minimum", "maximum"),
        source=f"{REPORT}, figures 2 and 3",
    ),
    Figure(
        title="Mean absolute gradient, relative to size",
        query="relative_over_training",
        caption="The same over the mean size of the parameters of a kind. Beta starts at 0, and is small for long.",
        draw=over_training("relative", "mean |gradient| / mean size"),
        source=f"Ours, from figures 2 and 3 of the {REPORT.lower()}",
    ),
    Figure(
        title="Mean absolute update",
        query="update_over_training",
        caption="The last update over its learning rate, momentum and weight decay with it, mean over the parameters "
        "of a kind. Gradients that last add up to ten times themselves, noise to 2.3 times.",
        draw=over_training("last_update", "mean |update| / rate"),
        source=f"Ours, from section 1 of the {REPORT.lower()}",
    ),
    Figure(
        title="Distance from the start",
        query="distance_over_training",
        caption="Mean absolute difference between a parameter and its initial value.",
        draw=over_training("moved", "mean distance"),
        source=f"Ours, from section 7 of the {REPORT.lower()}",
    ),
    Figure(
        title="Gamma's gradient over that of the convolution before it",
        query="gamma_over_convolution",
        caption="Geometric mean over layers and seeds; and what the sizes of gamma and weights of the moment give, if "
        "terms are as good as independent: (rms weight) sqrt(fan-in) / (mean |gamma|).",
        draw=over_training("times", "ratio", styles=SIDES),
        source="Ours",
    ),
    Figure(
        title="Mean absolute gradient by layer",
        query="layers",
        caption="Geometric mean over the readings of a training and seeds, with the range over seeds; a norm stands at "
        "the layer before it, and the stem on the left.",
        draw=panels(
            x="layer_index",
            y="gradient",
            series="kind",
            styles=KINDS[:3],
            panel="leg",
            xlabel="layer",
            ylabel="mean |gradient|",
            unit="",
            xscale=Scale.LINEAR,
            yscale=Scale.LOG,
            low="minimum",
            high="maximum",
        ),
        source="Ours",
    ),
    Figure(
        title="Share of the gradient's squared length",
        query="share_over_training",
        caption="By kind, mean over seeds. Gamma and beta are 0.7 % of the parameters of VGG-38.",
        draw=panels(
            x="step",
            y="share",
            series="kind",
            styles=KINDS,
            panel="leg",
            xlabel="step",
            ylabel="share",
            unit="%",
            xscale=Scale.LINEAR,
            yscale=Scale.LINEAR,
            ylim=(0, 1),
        ),
        source=f"Ours, from section 7 of the {REPORT.lower()}",
    ),
]

# --- the study --------------------------------------------------------------------------------------------------

LEG: dict[str, Any] = {
    "network": Network.VGG_RESIDUAL,
    "width": 2,
    "norm": Norm.BATCH,
    "norm_init": NormInit.UNIFORM,
    "weight_init": WeightInit.HE_NORMAL,
    "lr": 0.1,
}
GRID = [
    LEG,
    LEG | {"norm_init": NormInit.ONES},
    LEG | {"weight_init": WeightInit.GAUSSIAN},
    LEG | {"network": Network.RESNET, "width": 1},
    LEG | {"norm": Norm.NONE, "lr": 0.001},  # of 0.001, 0.003 and 0.01, at which digits all train
]
SAYS = (
    "The report names network, data and epochs; rate, batch, decay and augmentation are those of its other networks, "
    "at a constant rate, and 5,000 training images are held out though nothing is chosen."
)

study = Study(
    name="vgg38_gradients",
    doc=__doc__,
    paper=Preset(
        fixed=VGG38_CIFAR100 | {"trainable": Trainable.ALL},
        scientific=GRID,
        nuisance=[{}],
        seeds=range(3),
        note=SAYS,
    ),
    laptop=Preset(
        fixed=VGG38_DIGITS | {"trainable": Trainable.ALL},
        scientific=GRID,
        nuisance=[{}],
        seeds=range(3),
        note="This preset trains the report's network on scikit-learn's digits (8x8 pixels, 1,200 training images) for "
        "20 epochs, not on CIFAR-100 for 100: it asks whether the report's sentences hold there, too. Claims about "
        "CIFAR-100 have no data here.",
    ),
    probes={parameter_gradient: EPOCH, curve: 5 * EPOCH},
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
