"""Are a student's formulas for batch norm's gradients right, and does batch norm make every step a descent step?

After R. Deshmukh, "Batch Norm" (a note of two pages, April 22, 2020), whose claims are these.

Question     Section 1: the gradients of a batch norm layer are g_gamma = zhat' g_y, g_beta = g_y and g_z = gamma /
             sqrt(variance + epsilon) g_y. Are they autograd's, at which batch sizes, where in a network?
             Section 2: along d = -gradient the loss is L - alpha |d|^2 + alpha^2 / 2 d'Hd, and where the third term is
             no smaller than the second, d is no direction of descent. Batch norm scales gradient and Hessian by 1 /
             sigma, so that the terms become alpha |d|^2 / sigma^2 and alpha^2 d'Hd / (2 sigma^3); then the third can
             no longer be the greater, and any step size will do. And gamma raises gradients that vanish.
Prediction   g_gamma and g_beta, summed over images and pixels, are exact. g_z holds mean and variance constant: exact
             where they are; in training it keeps two parts, along 1 and along zhat, that the true gradient has not.
             What a layer hands on does not depend on the length of the weights before its norm, so their gradient goes
             as 1 / sigma, but their Hessian as 1 / sigma^2, and the third term as 1 / sigma^4. Gamma, beta and the
             output are not scaled at all, so at some rate the third term is the greater. d is a direction of descent
             whatever H is: it is the step that is too long. The note writes the series as an equality; but a ReLU has
             kinks and no curvature, d'Hd knows nothing of them, and the loss may leave the series at far shorter steps
             than those at which its terms are equal. That is measured, too. A norm divides by what the gamma before
             it multiplied with: but for the last, gammas change no gradient.
Refuted by   a g_z in training that is autograd's to rounding; a third term that goes as 1 / sigma^3; a network with
             batch norm in which it stays below the second at every rate; a gradient at the stem that grows with the
             gammas of inner norms.
Networks     The note names none, and no data: what it says is said of any. Here a ResNet, the interim report's of 50
             layers, and a VGG, which has no skips and whose gradients vanish without norms. Plain gradient descent at a
             fixed rate without decay, which is the note's step. Rates go down to where ResNet-50 trains without norms.
             Formulas and scale are read at rate 0.1, or at one that is set: `--set lr=0.3`. Digits need no file; on
             other images: `--set data=cifar10 --set batch=128 --set norm_batch=128 --data ...`.
Cost         Paper preset: 144 trainings of 300 steps of ResNet-50 and VGG-13 on digits, 8 minutes on two cores.
             Laptop: 108 of ResNet-14 and VGG-11, 250 steps, 4 minutes.

    python studies/bn_gradients.py plan --preset paper    trials, hours; starts nothing
    python studies/bn_gradients.py --preset paper         trains, then reports
    python studies/bn_gradients.py --preset paper sql exponents
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from recipes import SANTURKAR_DIGITS

from bnscale.probes import (
    END,
    START,
    STEP,
    Probe,
    at_multiples,
    curve,
    descent,
    gamma_scaling,
    gradient,
    norm_gradient,
    only,
    unless,
    weight_scaling,
)
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, Scale, Series, panels
from bnscale.study import Preset, Study, grid
from bnscale.trial import Network, Norm, Trainable, WeightInit

NOTE = "Deshmukh 2020"
FORMULAS, SERIES, DERIVATION = (f"{NOTE}, section 1", f"{NOTE}, section 2, the series", f"{NOTE}, section 2, last page")

RATES = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)
AT = 0.1  # of these, the rate whose trials are asked about formulas and scale as well
MULTIPLES = (0.001, 0.01, 0.1, 1.0, 10.0)  # of the rate, along the gradient

TITLES = {Network.RESNET: "ResNet", Network.VGG: "VGG"}
COMPARED = [Series(Norm.NONE, "no norm", "#3b3f46"), Series(Norm.BATCH, "batch norm", "#c8452f")]
PLACES = [
    Series("norm", "at the norm's input", BLUE),
    Series("weights", "of the weights before the norm", VERMILION),
    Series("every norm", "at the norm's input, formula in every later norm too", ORANGE),
]
SIZES = [
    Series("2 images", "2 images", SKY),
    Series("8 images", "8 images", BLUE),
    Series("whole batch", "whole batch", "#3b3f46"),
]

EQUAL = (
    "Both are computed in float64, whose rounding is 1e-16 a number and stays below 1e-10 in sums of this many; a term "
    "that is left out shows in the first digits."
)


TRAINS = (
    "To train is to have learned a bit about an image's label by the last fifth of training: a batch's loss, in "
    "training mode, of ln 2 less than the ln(classes) of a guess, as if half of the classes were out."
)


def formula(name: str, statistics: str, sentence: str, reason: str, standing: Standing = Standing.FOUND) -> Claim:
    return Claim(
        sentence=f"{sentence}: greatest relative error.",
        source=FORMULAS if standing is Standing.FOUND else f"Ours, from {FORMULAS}",
        query="formulas",
        row={"formula": name, "statistics": statistics},
        paper=0.0 if standing is Standing.FOUND else None,
        unit="",
        band=(0.0, 1e-6),
        reason=f"{reason} {EQUAL}".strip(),
        standing=standing,
        needs=3,
    )


def input_formula(place: str, size: str, sentence: str, network: Network) -> Claim:
    return Claim(
        sentence=f"{sentence}, {size}, {TITLES[network]}: median relative error over layers.",
        source=FORMULAS,
        query="errors_in_training",
        row={"network": network, "place": place, "size": size},
        paper=0.0,
        unit="",
        band=(0.0, 1e-6),
        reason=EQUAL,
        standing=Standing.FOUND,
        needs=3,
    )


def towards_the_output(network: Network) -> Claim:
    return Claim(
        sentence="g_z is further off towards the output, where a statistic stands on fewer values: error at the norm's "
        f"input in the last third of the layers over that in the first, whole batch, {TITLES[network]}.",
        source=f"Ours, from {FORMULAS}",
        query="growth_over_positions",
        row={"network": network, "place": "norm"},
        paper=None,
        unit="times",
        band=(1.0, math.inf),
        reason="More than 1. Of m independent numbers the parts that g_z should lack are the root of 1 / m, and maps "
        "shrink.",
        standing=Standing.INFERRED,
        needs=3,
    )


def always(network: Network) -> Claim:
    return Claim(
        sentence=f"With batch norm the quadratic term is never the greater: steps at which it is not, "
        f"{TITLES[network]}, over training at every rate.",
        source=DERIVATION,
        query="condition_holds",
        row={"network": network, "norm": Norm.BATCH},
        paper=1.0,
        unit="%",
        band=(1.0, 1.0),
        reason="Never: one step is enough to refute it.",
        standing=Standing.FOUND,
        needs=3,
    )


def goes_down(network: Network) -> Claim:
    return Claim(
        sentence=f"With batch norm a step of any size lowers the loss of its batch: steps that do, at the rate with "
        f"the fewest, {TITLES[network]}.",
        source=DERIVATION,
        query="falls_at_worst",
        row={"network": network, "norm": Norm.BATCH},
        paper=1.0,
        unit="%",
        band=(0.99, 1.0),
        reason="'We can choose step size without worrying about descent': all steps; one in a hundred may fail where "
        "the loss is near 0.",
        standing=Standing.FOUND,
        needs=3,
    )


def trains_without(network: Network) -> Claim:
    return Claim(
        sentence=f"Without norms, too, the network trains at one of the rates: share of seeds, {TITLES[network]}.",
        source="Ours",
        query="seeds_that_train",
        row={"network": network, "norm": Norm.NONE},
        paper=None,
        unit="%",
        band=(1.0, 1.0),
        reason=f"All: else there is no training without batch norm to compare with. {TRAINS}",
        standing=Standing.INFERRED,
        needs=3,
    )


def any_rate(network: Network) -> Claim:
    return Claim(
        sentence="With batch norm the network trains at any rate that is not too small for so few steps: share of the "
        f"rates from the smallest that trains on, {TITLES[network]}.",
        source=DERIVATION,
        query="rates_that_train",
        row={"network": network, "norm": Norm.BATCH},
        paper=1.0,
        unit="%",
        band=(1.0, 1.0),
        reason=f"Any, up to {RATES[-1]:g}. {TRAINS}",
        standing=Standing.FOUND,
        needs=3,
    )


def larger_steps(network: Network) -> Claim:
    return Claim(
        sentence="Batch norm lets a step be longer before the quadratic term is the greater, same weights before the "
        f"first update: share of seeds, {TITLES[network]}.",
        source=DERIVATION,
        query="longer_steps",
        row={"network": network},
        paper=None,
        unit="%",
        band=(0.51, 1.0),
        reason="Most: what is left of 'no longer greater' if it need not hold for every step. Where d'Hd is not above "
        "0, a step can be as long as one likes.",
        standing=Standing.INFERRED,
        needs=3,
    )


def larger_rate(network: Network) -> Claim:
    return Claim(
        sentence="The largest rate that trains is larger with batch norm than without (at least, where none trains "
        f"without), {TITLES[network]}.",
        source=DERIVATION,
        query="larger_rate",
        row={"network": network},
        paper=None,
        unit="times",
        band=(2.0, math.inf),
        reason="Rates are a decade apart; a geometric mean of 2 over three seeds is one seed of them. Where none "
        "trains without, the largest that does is taken to be a decade below the smallest; where none trains with "
        "batch norm, it is 0.",
        standing=Standing.INFERRED,
        needs=3,
    )


def says(norm: Norm, case: str) -> Claim:
    name = "with batch norm" if norm is Norm.BATCH else "without norms"
    sentence = {
        "holds": "Where the quadratic term is the smaller, the loss falls",
        "fails": "Where the quadratic term is the greater, the loss does not fall",
    }[case]
    return Claim(
        sentence=f"{sentence}, {name}: share of step sizes along the gradient, over trainings that train.",
        source=SERIES,
        query="what_the_condition_says",
        row={"norm": norm, "condition": case},
        paper=1.0,
        unit="%",
        band=(0.95, 1.0),
        reason="The note writes the series as an equality. One in twenty is left to its higher terms, near the length "
        "at which both are equal; what changes the loss by less than 1e-5 of it is rounding, and not counted.",
        standing=Standing.FOUND,
        needs=3,
    )


def equality(norm: Norm) -> Claim:
    name = "with batch norm" if norm is Norm.BATCH else "without norms"
    return Claim(
        sentence="The loss is what the series says to its second-order term, at steps so short that this is a tenth of "
        f"the first-order one or less, {name}: what is left, over the second-order term, median.",
        source=SERIES,
        query="beyond_the_series",
        row={"norm": norm},
        paper=0.0,
        unit="times",
        band=(0.0, 0.1),
        reason="The note writes an equality. A tenth is left to the third-order term, if it is to the second as that "
        "to the first.",
        standing=Standing.FOUND,
        needs=3,
    )


def exponent(reading: str, note: float, parameters: str, sentence: str, reason: str, network: Network) -> Claim:
    return Claim(
        sentence=f"{sentence}, {TITLES[network]}.",
        source=DERIVATION,
        query="exponents",
        row={"network": network, "parameters": parameters, "reading": reading},
        paper=note,
        unit="",
        band=(note - 0.1, note + 0.1),
        reason=f"{reason} A tenth, since exponents are whole numbers.",
        standing=Standing.FOUND,
        needs=3,
    )


def gammas(which: str, sentence: str) -> Claim:
    return Claim(
        sentence=f"{sentence}, {TITLES[Network.VGG]}.",
        source=DERIVATION,
        query="gamma_exponents",
        row={"gammas": which},
        paper=1.0,
        unit="",
        band=(0.9, 1.1),
        reason="In g_z = gamma / sigma g_y each norm multiplies what passes back by its gamma: gammas ten times as "
        "small make the stem's gradient smaller by ten for each norm behind it, an exponent of 1 a norm. (Not in a "
        "ResNet, whose skips lead past most.) Measured between a tenth of the gammas and all of them; a tenth more or "
        "less, since the loss changes too.",
        standing=Standing.INFERRED,
        needs=3,
    )


TRUE_EXPONENT = "In truth the gradient goes as 1 / sigma and the Hessian as 1 / sigma^2."
# Reading, the note's exponent, parameters, sentence, reason.
EXPONENTS: list[tuple[str, float, str, str, str]] = [
    ("gradient", -1.0, "weights", "The gradient scales by 1 / sigma: exponent of its length", TRUE_EXPONENT),
    ("hessian", -1.0, "weights", "The Hessian scales by 1 / sigma: exponent of d'Hd / |d|^2", TRUE_EXPONENT),
    (
        "first order",
        -2.0,
        "weights",
        "The first-order term scales by 1 / sigma^2",
        "Of the weights before norms, scaled by 1 to 100.",
    ),
    (
        "second order",
        -3.0,
        "weights",
        "The second-order term scales by 1 / sigma^3",
        f"{TRUE_EXPONENT} So the term goes as 1 / sigma^4: larger weights make a step safer than the note says.",
    ),
    (
        "first order",
        -2.0,
        "everything",
        "... the first-order term, with theta all that trains",
        "The note's theta has no exceptions; but nothing of gamma, beta and the output is divided by sigma, and what "
        "they give does not shrink.",
    ),
    ("second order", -3.0, "everything", "... the second-order term, with theta all that trains", "As above."),
]


def below_epsilon(network: Network) -> Claim:
    return Claim(
        sentence="The first-order term scales by 1 / sigma^2 however small sigma is: exponent in the weights' length "
        f"from a thousandth to a hundredth of it, {TITLES[network]}.",
        source=f"Ours, from {DERIVATION}",
        query="exponent_below_epsilon",
        row={"network": network},
        paper=None,
        unit="",
        band=(-2.1, -1.9),
        reason="The same law. But there sigma is near sqrt(epsilon) = 0.003, a norm hardly divides by its variance, "
        "and weights that are smaller have smaller gradients.",
        standing=Standing.INFERRED,
        needs=3,
    )


CLAIMS = [
    # --- section 1: the formulas
    formula(
        "g_gamma",
        "training",
        "g_gamma = zhat' g_y is autograd's",
        "Over the sum of the terms' magnitudes, as of g_beta: the sum itself can be 0.",
    ),
    formula(
        "g_beta",
        "training",
        "g_beta = g_y, summed over images and pixels, is autograd's",
        "The note has no sum here, and one in zhat' g_y: as it stands g_beta has an entry for each value and beta one "
        "a channel. It is taken for a slip.",
    ),
    *(
        input_formula("norm", size, "g_z = gamma / sigma g_y is autograd's in training", network)
        for size in ("2 images", "8 images", "whole batch")
        for network in TITLES
    ),
    *(
        input_formula(place, "whole batch", sentence, network)
        for place, sentence in (
            ("weights", "... and gives the gradient of the weights before the norm"),
            ("every norm", "... and, put in every norm behind, the gradient at a norm's input"),
        )
        for network in TITLES
    ),
    *(map(towards_the_output, TITLES)),
    *(
        formula(name, "constant", f"{name} is autograd's where mean and variance are constants", "")
        for name in ("g_gamma", "g_beta", "g_z")
    ),
    formula(
        "g_z and both terms",
        "training",
        "g_z less its parts along 1 and zhat is autograd's in training",
        "Ioffe & Szegedy 2015, section 3. In units of the note's g_z, for where a channel has two values nothing is "
        "left.",
        Standing.INFERRED,
    ),
    # --- section 2: the series and the condition
    *(map(trains_without, TITLES)),
    *(map(equality, (Norm.BATCH, Norm.NONE))),
    says(Norm.BATCH, "holds"),
    says(Norm.BATCH, "fails"),
    says(Norm.NONE, "holds"),
    says(Norm.NONE, "fails"),
    Claim(
        sentence="Where the quadratic term is the greater, d is no direction of descent: of those steps, at how many a "
        "step of less than a tenth of the length at which both are equal does not lower the loss either.",
        source=SERIES,
        query="no_direction_of_descent",
        paper=1.0,
        unit="%",
        band=(0.95, 1.0),
        reason="As the note says it. But -gradient is a direction of descent whatever H is; then it is 0.",
        standing=Standing.FOUND,
        needs=3,
    ),
    # --- section 2: what batch norm does to it
    *(exponent(*each, network) for each in EXPONENTS for network in TITLES),
    *(map(below_epsilon, TITLES)),
    *(claim(network) for claim in (always, goes_down, any_rate, larger_steps, larger_rate) for network in TITLES),
    # --- section 2: gamma
    gammas("every", "Gamma multiplies the gradient: exponent of the stem's in all gammas, a norm"),
    gammas("inner", "... in all gammas but the last norm's, a norm"),
    Claim(
        sentence="Batch norm keeps gradients from vanishing: the stem's with it over without, VGG from Glorot's "
        "weights, which let it vanish.",
        source=DERIVATION,
        query="times_the_gradient",
        row={"weight_init": WeightInit.GLOROT_NORMAL},
        paper=None,
        unit="times",
        band=(10.0, math.inf),
        reason="More than ten times: a decade is more than gradients of one kind of network differ by between seeds. "
        "Before the first update gamma is 1, so whatever it is, it is 1 / sigma that does it.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    *(
        Claim(
            sentence="Gamma, which is learned, increases gradients: the stem's at the end of training over what it is "
            f"there with all gammas put back to 1, rate {AT:g}, VGG from {title} weights.",
            source=DERIVATION,
            query="gain_of_gammas",
            row={"network": Network.VGG, "weight_init": weights},
            paper=None,
            unit="times",
            band=(1.1, math.inf),
            reason="'A method of increasing the gradient magnitude through a learnable parameter': by a tenth, when "
            f"what vanishes does so by decades. Of trainings that train. {why}",
            standing=Standing.INFERRED,
            needs=3,
        )
        for weights, title, why in (
            (WeightInit.GLOROT_NORMAL, "Glorot's", "From these weights gradients vanish without norms."),
            (WeightInit.HE_NORMAL, "He's", "From these they do not."),
        )
    ),
]


def lines(
    x: str,
    y: str,
    series: str,
    styles: Sequence[Series],
    xlabel: str,
    ylabel: str,
    xscale: Scale,
    yscale: Scale,
    *,
    unit: str = "",
    band: str | None = None,
    level: float | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
) -> Callable[[Any, Any], None]:
    """Small multiples by the column `panel`, with a band from `low` to `high` where there is a word for it."""
    return panels(
        x=x,
        y=y,
        series=series,
        styles=styles,
        panel="panel",
        xlabel=xlabel,
        ylabel=ylabel,
        unit=unit,
        xscale=xscale,
        yscale=yscale,
        low="low" if band else None,
        high="high" if band else None,
        band=band,
        level=level,
        ylim=ylim,
    )


FACTORS = [
    Series(0.01, "gamma / 100", PURPLE),
    Series(0.1, "gamma / 10", BLUE),
    Series(1.0, "gamma", "#3b3f46"),
    Series(10.0, "10 gamma", VERMILION),
]
BY_RATE = [
    Series(rate, f"rate {rate:g}", colour)
    for rate, colour in zip(RATES, (INK, GREY, PURPLE, BLUE, SKY, GREEN, ORANGE, VERMILION), strict=True)
]

FIGURES = [
    Figure(
        title="Error of g_z over the batch",
        query="error_by_size",
        caption="Relative error of g_z = gamma / sigma g_y in training, median over layers, steps and seeds, with the "
        "middle 80 %. At a norm's input little is wrong; but what is wrong there is the same for all values of a "
        "channel, and adds up in the gradient of the weights before the norm, where right terms cancel.",
        draw=lines(
            "images", "error", "place", PLACES, "images behind a statistic", "relative error", Scale.LOG, Scale.LOG,
            band="middle 80 %",
        ),
        source=FORMULAS,
    ),
    Figure(
        title="Error of g_z by position",
        query="error_by_position",
        caption="The same by layer, medians over steps and seeds. Maps get smaller towards the output, and a statistic "
        "stands on fewer values.",
        draw=lines("layer_index", "error", "size", SIZES, "layer", "relative error", Scale.LINEAR, Scale.LOG),
        source=FORMULAS,
    ),
    Figure(
        title="The two terms that g_z lacks",
        query="missing_terms",
        caption="Length of the part of the note's g_z along 1, which the mean takes away, and along zhat, which the "
        "variance takes away, over its whole length; median over layers, steps and seeds. Of independent numbers each "
        "part would be the root of one over the number of values.",
        draw=lines(
            "images", "part", "term",
            [Series("mean", "along 1", BLUE), Series("variance", "along zhat", VERMILION)],
            "images behind a statistic", "share of the length", Scale.LOG, Scale.LOG, unit="%",
        ),
        source=f"Ours, from {FORMULAS}",
    ),
    Figure(
        title="Radial part of the weights' gradient",
        query="radial_part",
        caption="Where a norm follows, the true gradient of the weights is orthogonal to them, channel by channel, but "
        "for epsilon. With the note's g_z in the norm it has a part along them; median over layers, steps and seeds.",
        draw=lines(
            "images", "radial", "gradient",
            [Series("note", "with the note's g_z", VERMILION), Series("true", "autograd's", BLUE)],
            "images behind a statistic", "radial part", Scale.LOG, Scale.LOG,
        ),
        source=f"Ours, from {FORMULAS}",
    ),
    Figure(
        title="The condition over training",
        query="condition_over_training",
        caption="Quadratic over first-order term at each trial's own rate, geometric mean over seeds with their range; "
        "above the dashed line the step is too long, says the note. Trainings that train; where d'Hd is negative there "
        "is no point.",
        draw=lines(
            "step", "ratio", "norm", COMPARED, "step", "quadratic / first order", Scale.LINEAR, Scale.LOG,
            band="range over seeds", level=1.0,
        ),
        source=SERIES,
    ),
    Figure(
        title="Does the condition say whether the loss falls?",
        query="falls_by_ratio",
        caption="Share of steps along the gradient that lower the loss of their batch, by the quadratic over the "
        "first-order term; all rates that train, steps and step sizes. If the series ended there, it would fall from "
        "100 % to 0 at 1.",
        draw=lines(
            "ratio", "falls", "norm", COMPARED, "quadratic / first order", "steps that go down", Scale.LOG,
            Scale.LINEAR, unit="%", ylim=(0, 1),
        ),
        source=SERIES,
    ),
    Figure(
        title="How far the loss follows the series",
        query="beyond_by_length",
        caption="|loss - series| over the first-order term by step size; median over readings, those after the start "
        "of trainings that train. At the dashed line what the series leaves out is as large as its first-order term. "
        "Kinks of ReLUs, of which d'Hd knows nothing, count at every length.",
        draw=lines(
            "length", "beyond", "norm", COMPARED, "step size", "|loss - series| / first order", Scale.LOG, Scale.LOG,
            level=1.0,
        ),
        source=SERIES,
    ),
    Figure(
        title="The longest step that the condition allows",
        query="longest_step",
        caption="2 |d|^2 / d'Hd over training, median over seeds; no point where d'Hd is not above 0, and any length "
        "is allowed. With batch norm a step that is too long makes weights grow and the next one safer, or leaves a "
        "network of which only the output's bias learns. How far the loss follows the series is another matter, "
        "in the figure before.",
        draw=lines("step", "longest", "lr", BY_RATE, "step", "step size", Scale.LINEAR, Scale.LOG),
        source=f"Ours, from {SERIES}",
    ),
    Figure(
        title="What is learned, over rates",
        query="bits_over_rates",
        caption="log2(classes) less a batch's loss in bits, in training mode, over the last fifth of training: what "
        "is known of an image's label. Mean over seeds with their range; 0 where a training diverged. Above the dashed "
        "line a network trains.",
        draw=lines(
            "lr", "bits", "norm", COMPARED, "learning rate", "bits", Scale.LOG, Scale.LINEAR,
            band="range over seeds", level=1.0, ylim=(0, None),
        ),
        source=DERIVATION,
    ),
    Figure(
        title="The terms of the series over sigma",
        query="terms_over_sigma",
        caption="First- and second-order term at step size 1 where the weights before norms are multiplied, over their "
        "values at factor 1; sigma is the geometric mean over channels. Geometric means over seeds. Below 0.003 "
        "epsilon is all that a norm divides by.",
        draw=lines(
            "sigma", "relative", "term",
            [Series("first order", "first order", BLUE), Series("second order", "second order", VERMILION)],
            "sigma", "relative to factor 1", Scale.LOG, Scale.LOG,
        ),
        source=DERIVATION,
    ),
    Figure(
        title="Gradients by layer, as gammas shrink and grow",
        query="gradients_by_gamma",
        caption="Length of the gradient of each layer's weights before the first update, with some gammas multiplied; "
        "geometric means over seeds.",
        draw=lines("layer_index", "gradient", "factor", FACTORS, "layer", "length", Scale.LINEAR, Scale.LOG),
        source=DERIVATION,
    ),
    Figure(
        title="Gradients that vanish",
        query="vanishing_gradients",
        caption="Length of the gradient of each layer's weights before the first update; geometric means over seeds. "
        "Batch norm keeps it up; a tenth of all gammas but the last makes no difference.",
        draw=lines(
            "layer_index", "gradient", "kind",
            [
                Series("none", "no norm", "#3b3f46"),
                Series("batch", "batch norm", "#c8452f"),
                Series("small", "batch norm, inner gammas / 10", SKY),
            ],
            "layer", "length", Scale.LINEAR, Scale.LOG,
        ),
        source=DERIVATION,
    ),
]  # fmt: skip

FIXED = SANTURKAR_DIGITS | {"trainable": Trainable.ALL, "validation": 0}


def cells(resnet: int, vgg: int, rates: Sequence[float]) -> list[dict[str, object]]:
    """Networks of these depths at all rates from He's weights, and the VGG also from weights that are too small."""
    common = grid(norm=[Norm.BATCH, Norm.NONE], lr=rates)
    networks = [
        {"network": Network.RESNET, "depth": resnet, "weight_init": WeightInit.HE_NORMAL},
        {"network": Network.VGG, "depth": vgg, "weight_init": WeightInit.HE_NORMAL},
        {"network": Network.VGG, "depth": vgg, "weight_init": WeightInit.GLOROT_NORMAL},
    ]
    return [network | cell for network in networks for cell in common]


def at_one_rate(probe: Probe, norm: Norm) -> Probe:
    """Whatever rate is set that is none of the others looks as well."""
    return unless(only(probe, norm=[norm]), lr=[rate for rate in RATES if rate != AT])


study = Study(
    name="bn_gradients",
    doc=__doc__,
    paper=Preset(
        fixed=FIXED | {"steps": 300},
        scientific=cells(50, 13, RATES),
        nuisance=[{}],
        seeds=range(3),
        note="The note has no protocol and no data of its own. This preset takes networks of 50 and 13 layers on "
        "digits.",
    ),
    laptop=Preset(
        fixed=FIXED | {"steps": 250},
        scientific=cells(14, 11, RATES[2:]),
        nuisance=[{}],
        seeds=range(3),
        note="The note has no protocol and no data of its own. This preset takes networks of 14 and 11 layers on "
        "digits.",
    ),
    probes={
        at_multiples(descent, *MULTIPLES): 25 * STEP,
        at_one_rate(norm_gradient, Norm.BATCH): 150 * STEP,
        at_one_rate(weight_scaling, Norm.BATCH): START,
        at_one_rate(gamma_scaling, Norm.BATCH): 1000 * STEP,  # before the first update and after the last
        at_one_rate(gradient, Norm.NONE): START,
        curve: END,
    },
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
