"""Does batch normalization make the landscape of a deep linear network smoother?

After Santurkar, Tsipras, Ilyas & Madry, "How Does Batch Normalization Help Optimization?" (arXiv:1805.11604, NeurIPS
2018), sections 2.2, 3.1 and 3.2, figures 3b, 5 and 10, theorem 4.1.

Question     25 matrices of 10 by 10 learn a Gaussian teacher by full-batch gradient descent. With batch normalization
             between them, with l_1, l_2 and l_inf norms and with none: how fast does the loss fall, how far does an
             update of the earlier layers turn a layer's gradient (internal covariate shift), and how do loss and
             gradient change on the way of an update (landscape)? Does theorem 4.1 hold on real activations?
Prediction   With batch norm the loss falls to 479 (rate 1e-6; 1,661 without) and the covariate shift is larger, not
             smaller: 4.4e3 in place of 3.5 in layer 9. The loss along an update stays below 1.1e5 and reaches 6.2e14
             without; the gradient's change stays below 3.1e6 and reaches 1.9e16; the effective beta stays near
             2.0e6, which is 2 / LR, and reaches 1.2e15 without.
Refuted by   a covariate shift that batch norm makes smaller, or, at the rate of figure 10, 1e-6, a maximum of the
             effective beta over training that is as large with it as without. A median says little here: a network
             that rests at a saddle has a small gradient, which hardly changes, and needs no norm for that.
Other rates  The figure shows no other rate, and what it shows does not carry over: of our networks the maximum of beta
             is 509 times as large without norms as with batch norm at 1e-6, and 0.06 times at 1e-7 (0.02 to 1.7).
             Claims ask at 1e-7 too.
Also asked   Why is the plateau of the effective beta 2 / LR? Either the sharpness is 2 / LR, the edge of stability of
             gradient descent; then beta is the same at the shortest step. Or the gradient turns by its own length
             already at the shortest step looked at, which is LR / 100; then the plateau were 100 / LR.
Draws        The teacher and its vectors are one draw for all seeds, and not the paper's, of which no seed is known; a
             seed draws other weights.
Saddles      A network learns the teacher's ten directions one by one, the strongest first, and rests at a saddle before
             each. With k of them not yet learned its loss is half the sum of the k smallest squared singular values of
             the teacher's outputs: of ours 911, 2,797, 5,973, 9,529 and 16,442 for k = 3 to 7. A final loss counts
             the directions that are left, in lumps; that is why it can be several times the paper's for every seed.
             The paper's 1,661 and 479 are about 3.6 and 2.5 directions of a typical teacher.
Cost         Paper preset: 18 trainings of 10,000 steps, three seeds without norms and with batch norm, one with l_p
             norms; a step with l_1 or l_2 costs about 1.6 times one with batch norm, with l_inf twice. On two cores
             about 8 minutes. Laptop: 24 trainings of 1,000 steps, about 2 minutes.

    python studies/deep_linear.py plan --preset paper    trials, hours; starts nothing
    python studies/deep_linear.py --preset paper         trains, then reports
    python studies/deep_linear.py --preset paper sql plateau
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from recipes import SANTURKAR_LINEAR

from bnscale.probes import (
    STEP,
    activation_histogram,
    activations,
    at_layers,
    at_multiples,
    batch_curve,
    covariate_shift,
    gradient_bound,
    landscape,
    only,
)
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import PaperPoint, Scale, Series, bars, histograms, panels
from bnscale.study import Preset, Study, grid
from bnscale.trial import Norm, Trainable

PAPER = "Santurkar et al. 2018"

STYLES = [
    Series(Norm.NONE, "no norm", "#3b3f46"),
    Series(Norm.BATCH, "batch norm", "#c8452f"),
    Series(Norm.L1, "l_1", "#2f6fb3"),
    Series(Norm.L2, "l_2", "#3f8f5f"),
    Series(Norm.LINF, "l_inf", "#e08a3c"),
]
COMPARED = STYLES[:2]
NAMES = {Norm.NONE: "no norm", Norm.BATCH: "batch norm", Norm.L1: "l_1", Norm.L2: "l_2", Norm.LINF: "l_inf"}
L_P = [Norm.L1, Norm.L2, Norm.LINF]
FROM_THE_RATE, SHORTEST = "steps from LR on", "the shortest step"  # readings of beta

LARGE, SMALL = 1e-6, 1e-7  # the paper's rates
MULTIPLES = (0.01, 0.1, 1.0, 10.0, 10**1.5)  # at 1e-6, the paper's step sizes: 1e-8 to 10^-4.5

# Read off the paper's vector graphics to 1 %: the loss after 10,000 steps; and the factor by which what is left of a
# loss differs between two draws of the teacher A. A network that has learned A but for its k least singular values
# has 500 times the sum of their squares left. Of 20,000 Gaussian 10 by 10 matrices these sums have geometric means of
# 222, 912, 2,350, 4,836, 8,710 and 14,400 for k = 2 to 7, and two draws differ by less than a factor of 9.1, 3.9, 2.7
# and 2.2, for k = 2 to 5, in 95 of 100 pairs. The factors here are those, interpolated in logarithms.
LOSSES = {
    (Norm.NONE, LARGE): (1661.0, 3.1),
    (Norm.BATCH, LARGE): (479.0, 5.7),
    (Norm.NONE, SMALL): (3969.0, 2.3),
    (Norm.BATCH, SMALL): (710.0, 4.5),
}


def rate(lr: float) -> str:
    """With a minus sign, at which no line breaks."""
    return f"LR {lr:g}".replace("e-0", "e−")


FINAL = [PaperPoint(norm, rate(lr), loss, Standing.DIGITISED) for (norm, lr), (loss, _) in LOSSES.items()]


def times(paper: float, factor: float) -> tuple[float, float]:
    """So many times more or less."""
    return float(f"{paper / factor:.3g}"), float(f"{paper * factor:.3g}")


def final_loss(norm: Norm, lr: float) -> Claim:
    paper, factor = LOSSES[norm, lr]
    return Claim(
        sentence=f"Loss after 10,000 steps, {NAMES[norm]}, {rate(lr)}.",
        source=f"{PAPER}, figure 3b",
        query="losses",
        row={"norm": norm, "lr": lr, "place": "end"},
        paper=paper,
        unit="",
        band=times(paper, factor),
        reason=f"A factor of {factor:g} for the draw of the teacher: by so much the sum of the few smallest squared "
        "singular values of two Gaussian 10 by 10 matrices differs in 95 of 100 pairs, and that is what is left of the "
        "loss when all other directions are learned. Beyond it lies a network that rests at a saddle with more "
        "directions left than the paper's: one more is a factor of 1.7 to 4. That the paper's loss is half the squared "
        "error, added up, is our reading.",
        standing=Standing.DIGITISED,
        needs=3,
    )


def first_loss(norm: Norm, paper: float) -> Claim:
    return Claim(
        sentence=f"Loss before the first step, {NAMES[norm]}.",
        source=f"{PAPER}, figure 3b",
        query="losses",
        row={"norm": norm, "lr": LARGE, "place": "start"},
        paper=paper,
        unit="",
        band=times(paper, 1.5),
        reason="A factor of 1.5 for the draw of the teacher: the loss is about 500 times the sum of its 100 squared "
        "entries, which varies by 14 %; two draws differ by less than a factor of 1.5 in 95 of 100 pairs.",
        standing=Standing.DIGITISED,
        needs=3,
    )


def less_loss(lr: float) -> Claim:
    ratio = LOSSES[Norm.NONE, lr][0] / LOSSES[Norm.BATCH, lr][0]
    return Claim(
        sentence=f"Batch norm trains faster: loss after all steps without norms over that with it, {rate(lr)}.",
        source=f"{PAPER}, figure 3b",
        query="times_less_loss",
        row={"lr": lr},
        paper=round(ratio, 2),
        unit="times",
        band=(1.0, math.inf),
        reason="More than 1; how much more hangs on the teacher's smallest singular values.",
        standing=Standing.DIGITISED,
        needs=3,
    )


MIDDLE_SEED = (
    "The verdict is the middle seed's. Where the range of the seeds beside it reaches over an end of the band, one "
    "network, as the paper's, could have had either verdict."
)


def shift(norm: Norm, layer: int, reading: str, paper: float, band: tuple[float, float], reason: str) -> Claim:
    what = {"l2": "|G - G'|, geometric mean", "cosine": "cosine of G and G', mean"}[reading]
    return Claim(
        sentence=f"Covariate shift of layer {layer} over training, {NAMES[norm]}, {rate(SMALL)}: {what}.",
        source=f"{PAPER}, figure 3b",
        query="shift",
        row={"norm": norm, "lr": SMALL, "layer_index": layer, "reading": reading},
        paper=paper,
        unit="",
        band=band,
        reason=f"{reason} {MIDDLE_SEED}",
        standing=Standing.DIGITISED,
        needs=3,
    )


def no_less_shift(lr: float, reading: str, band: tuple[float, float], sentence: str, reason: str) -> Claim:
    return Claim(
        sentence=f"{sentence}, {rate(lr)}.",
        source=f"{PAPER}, section 2.2",
        query="shift_with_and_without",
        row={"lr": lr, "reading": reading},
        paper=None,
        unit="" if reading == "cosine" else "times",
        band=band,
        reason=f"{reason} Seed by seed, from the same weights, then the median.",
        standing=Standing.FOUND if reading != "relative" else Standing.INFERRED,
        needs=3,
    )


def extreme(
    norm: Norm, quantity: str, statistic: str, paper: float, factor: float, reason: str, sentence: str
) -> Claim:
    return Claim(
        sentence=f"{sentence}, {NAMES[norm]}, {rate(LARGE)}: {statistic} over training.",
        source=f"{PAPER}, figure 10",
        query="extremes",
        row={"norm": norm, "lr": LARGE, "quantity": quantity, "statistic": statistic},
        paper=paper,
        unit="",
        band=times(paper, factor),
        reason=reason,
        standing=Standing.DIGITISED,
        needs=3,
    )


# The paper's largest number over training without norms over that with batch norm, at 1e-6. Of its medians those of
# beta alone were recovered.
MAXIMA = {"loss range": 5.6e9, "gradient difference": 6.1e9, "beta": 1.5e8}


SMOOTH = {"loss range": "range of the loss", "gradient difference": "change of the gradient", "beta": "effective beta"}


def smoother(quantity: str, statistic: str, lr: float, what: str) -> Claim:
    """Whether a quantity is larger without norms, after a training of any length."""
    source, standing = f"Ours, from figure 10 of {PAPER}", Standing.INFERRED
    if statistic == "median":
        reason = (
            "More than 1, if norms make it smaller at a typical step as at the worst. A network without norms rests at "
            "a saddle for most of a training, where its small gradient hardly changes along an update."
        )
    elif lr == LARGE:
        source, standing = f"{PAPER}, figure 10", Standing.DIGITISED
        reason = (
            f"More than 1. The paper's two maxima, which the paper's own training is held against, are "
            f"{MAXIMA[quantity]:.1e} times apart; a ratio of maxima of single networks is known to decades at most."
        )
    else:
        reason = "More than 1, if it holds at the other rate too, of which the paper shows losses and covariate shift."
    return Claim(
        sentence=f"Batch norm makes the {what} smaller ({statistic} over training, without over with), {rate(lr)}.",
        source=source,
        query="times_smoother",
        row={"lr": lr, "quantity": quantity, "statistic": statistic},
        paper=None,
        unit="times",
        band=(1.0, math.inf),
        reason=reason,
        standing=standing,
        needs=3,
    )


EDGE = (
    "A tenth: sharpness hovers just about 2 / LR, whatever the draw, if gradient descent is at the edge of stability."
)


def two_over_lr(norm: Norm, lr: float, reading: str = FROM_THE_RATE) -> Claim:
    """Whether beta is 2 / LR in the second half of a training: at steps from LR on, or at the shortest."""
    once = norm in L_P
    why = {
        FROM_THE_RATE: "Where the sharpness is far below 2 / LR, what the gradient changes by over a shorter step than "
        "LR is float32's rounding: left out here. At LR itself x' is the next iterate: a gradient that turns from g to "
        "-g gives 2 / LR there, whatever the curvature. It says bouncing; the shortest step says sharpness.",
        SHORTEST: "Over LR / 100 the gradient changes by curvature alone, or, where it is small, by rounding.",
    }[reading]
    return Claim(
        sentence=f"The effective beta has its plateau at 2 / LR: in that unit, {NAMES[norm]}, {rate(lr)}, {reading}.",
        source=f"Ours, from figure 10 of {PAPER}",
        query="plateau",
        row={"norm": norm, "lr": lr, "reading": reading},
        paper=None,
        unit="",
        band=(0.9, 1.1),
        reason=f"{EDGE} {why}" + (" One seed may do: it is a median over half a training." if once else ""),
        standing=Standing.INFERRED,
        needs=1 if once else 3,
    )


AS_BATCH = (
    " Of l_p norms it says nothing: behind a norm without activation functions a unit's mean is zero but for beta, so "
    "its root mean square, by which l_2 divides, is batch norm's deviation. It is asked of l_2 this once."
)


def l_p_trains(norm: Norm, reading: str) -> Claim:
    when = {"end": "after all steps", "on the way": "on the way there, geometric mean"}[reading]
    return Claim(
        sentence=f"The {NAMES[norm]} norm trains as well as batch norm or better: loss over its loss {when}, "
        f"{rate(LARGE)}.",
        source=f"{PAPER}, section 3.3",
        query="times_the_loss_of_batch_norm",
        row={"norm": norm, "lr": LARGE, "reading": reading},
        paper=None,
        unit="times",
        band=(0.0, 1.1),
        reason="'Comparable or even better': a tenth more loss is still comparable. Same teacher and weights, so no "
        "allowance for a draw. One seed may do: the paper shows one network." + (AS_BATCH if norm is Norm.L2 else ""),
        standing=Standing.FOUND,
        needs=1,
    )


OVERSHOOT = (
    "Three decades: without norms the output at a long step grows with the 25th power of its length and the squared "
    "error with the 50th, so a step 15 % longer than the paper's gives a thousand times as much."
)
ONE_NETWORK = f"A factor of 3: the largest of 201 readings of one network of another draw. {MIDDLE_SEED}"

CLAIMS = [
    # --- trends, of a training of any length: figure 3b
    less_loss(LARGE),
    less_loss(SMALL),
    *(
        claim
        for lr in (LARGE, SMALL)
        for claim in (
            no_less_shift(
                lr,
                "l2",
                (1.0, math.inf),
                "Batch norm does not reduce covariate shift: |G - G'| with it over that without, where least",
                "At least 1 in every layer looked at: 5, 9, 13, 17 and 21. Gradients shrink as a network learns, so "
                "one that comes further has smaller ones.",
            ),
            no_less_shift(
                lr,
                "relative",
                (1.0, math.inf),
                "... and in units of |G|, where least",
                "The same, without the size of the gradient, which differs between the networks. Ours.",
            ),
            no_less_shift(
                lr,
                "cosine",
                (-2.0, 0.0),
                "... and turns no gradient less: cosine with it less that without, where greatest",
                "At most 0 in every layer looked at.",
            ),
        )
    ),
    # --- figure 10
    *(smoother(quantity, "maximum", lr, what) for lr in (LARGE, SMALL) for quantity, what in SMOOTH.items()),
    smoother("loss range", "median", LARGE, SMOOTH["loss range"]),
    smoother("gradient difference", "median", LARGE, SMOOTH["gradient difference"]),
    # --- 2 / LR
    *(two_over_lr(Norm.BATCH, lr, reading) for reading in (FROM_THE_RATE, SHORTEST) for lr in (LARGE, SMALL)),
    two_over_lr(Norm.L1, LARGE),
    two_over_lr(Norm.LINF, LARGE),
    *(two_over_lr(Norm.NONE, lr) for lr in (LARGE, SMALL)),
    # --- section 3.3
    *(l_p_trains(norm, reading) for norm in (Norm.L1, Norm.LINF) for reading in ("end", "on the way")),
    l_p_trains(Norm.L2, "end"),
    # --- theorem 4.1
    Claim(
        sentence="Theorem 4.1 holds, as an equality with the gradient at the layer's output (units within 1 %).",
        source=f"{PAPER}, theorem 4.1 by its fact C.1",
        query="bound",
        row={"lr": LARGE, "place": "on the way", "question": "equal"},
        paper=1.0,
        unit="%",
        band=(0.99, 1.0),
        reason="All units, but for those whose deviation is so small that the epsilon of 1e-5 beside its square shows.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    *(
        Claim(
            sentence="Theorem 4.1 with the gradient in the same network without this one norm: share of units, "
            f"{when}, {rate(LARGE)}.",
            source=f"{PAPER}, theorem 4.1 as it is written",
            query="bound",
            row={"lr": LARGE, "place": place, "question": "bounded"},
            paper=None,
            unit="%",
            band=(1.0, 1.0),
            reason="All units: the theorem is of one batch and holds for every unit or not at all, and a thousandth "
            "above the right side already counts as rounding. Its proof has the gradient at the layer's output there. "
            "Without this norm what follows sees other values, and nothing makes it hold. That the two networks differ "
            "in one norm is from memory.",
            standing=Standing.MEMORY,
            needs=3,
        )
        for place, when in (("start", "before training"), ("on the way", "in training"))
    ),
    # --- the paper's numbers, of its own training: figure 3b, the loss
    *(final_loss(norm, lr) for norm, lr in LOSSES),
    first_loss(Norm.NONE, 3.5e4),
    first_loss(Norm.BATCH, 5.6e4),
    # --- figure 3b, internal covariate shift
    shift(
        Norm.NONE,
        9,
        "l2",
        3.5,
        (0.35, 35),
        "A decade: it spans four over a training, and the time between two falls of the loss, where it is least, is "
        "one network's.",
    ),
    shift(
        Norm.BATCH,
        9,
        "l2",
        4.4e3,
        times(4.4e3, 3),
        "A factor of 3: gradients scale with the loss that is left, which differs so between draws of the teacher.",
    ),
    shift(Norm.NONE, 9, "cosine", 1.0, (0.95, 1.0), "'About 1' in the figure."),
    shift(
        Norm.BATCH,
        9,
        "cosine",
        0.17,
        (-0.13, 0.47),
        "0.3 either way for one network; over the layers it runs from 1 to about -1.",
    ),
    shift(
        Norm.BATCH,
        17,
        "cosine",
        -0.08,
        (-0.38, 0.22),
        "0.3 either way for one network; over the layers it runs from 1 to about -1.",
    ),
    # --- figure 10
    extreme(
        Norm.BATCH,
        "beta",
        "median",
        2.0e6,
        1.1,
        "A tenth: the paper's median is 2 / LR, whatever the draw, if gradient descent is at the edge of stability.",
        "Effective beta",
    ),
    extreme(
        Norm.NONE,
        "beta",
        "median",
        1.2e7,
        3,
        f"A factor of 3 for one network of another draw: the paper's is 6 times 2 / LR. {MIDDLE_SEED}",
        "Effective beta",
    ),
    extreme(Norm.BATCH, "beta", "maximum", 8.1e6, 3, ONE_NETWORK, "Effective beta"),
    extreme(Norm.NONE, "beta", "maximum", 1.2e15, 1e3, OVERSHOOT, "Effective beta"),
    extreme(Norm.BATCH, "loss", "maximum", 1.1e5, 3, ONE_NETWORK, "Greatest loss along an update"),
    extreme(Norm.NONE, "loss", "maximum", 6.2e14, 1e3, OVERSHOOT, "Greatest loss along an update"),
    extreme(
        Norm.BATCH, "gradient difference", "maximum", 3.1e6, 3, ONE_NETWORK, "Greatest change of the gradient along it"
    ),
    extreme(
        Norm.NONE, "gradient difference", "maximum", 1.9e16, 1e3, OVERSHOOT, "Greatest change of the gradient along it"
    ),
    Claim(
        sentence="The gradient's change grows as the step: its largest over its least over step sizes, batch norm, "
        "LR 1e−6.",
        source=f"{PAPER}, figure 10b",
        query="growth_of_gradient_difference",
        row={"norm": Norm.BATCH, "lr": LARGE},
        paper=2200,
        unit="times",
        band=(1100, 4400),
        reason="A factor of 2 for one network. A gradient that is linear along the step, so that beta is a sharpness, "
        "gives 3,162; one that turns by its own length at the shortest step about 1.",
        standing=Standing.INFERRED,
        needs=3,
    ),
]

# --- figures ----------------------------------------------------------------------------------------------------


def over_training(
    y: str,
    ylabel: str,
    styles: list[Series],
    panel: str = "panel",
    series: str = "norm",
    low: str | None = None,
    high: str | None = None,
    yscale: Scale = Scale.LOG,
    unit: str = "",
    level: float | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
) -> Callable[[Any, Any], None]:
    """A line a norm over the steps, a panel a rate."""
    return panels(
        x="step",
        y=y,
        series=series,
        styles=styles,
        panel=panel,
        xlabel="step",
        ylabel=ylabel,
        unit=unit,
        xscale=Scale.LINEAR,
        yscale=yscale,
        low=low,
        high=high,
        level=level,
        ylim=ylim,
    )


def by_layer(y: str, ylabel: str, yscale: Scale, paper: Sequence[PaperPoint]) -> Callable[[Any, Any], None]:
    return panels(
        x="layer_index",
        y=y,
        series="norm",
        styles=STYLES,
        panel="panel",
        xlabel="layer",
        ylabel=ylabel,
        unit="",
        xscale=Scale.LINEAR,
        yscale=yscale,
        low="minimum",
        high="maximum",
        paper=paper,
    )


ONE = "One network a norm, as the paper shows it."
STEPS = "Step sizes from LR / 100 to 31.6 LR, as the paper's at 1e-6."
TIMES = [Series("start", "before training", "#8a8f98"), Series("end", "after all steps", "#c8452f")]
SIDES = [
    Series("gradient at the output", "gradient at the layer's output", "#2f6fb3"),
    Series("without this norm", "gradient in the network without this norm", "#c8452f"),
]


def ranges(of: str, styles: list[Series], panel: str, which: str) -> list[Figure]:
    """Figures 10a and 10b of some norms."""
    return [
        Figure(
            title=f"Loss along an update{which}",
            query=f"loss_along_updates{of}",
            caption="Range of the loss over step sizes along the gradient, and the loss before the step as a line. "
            f"{STEPS} {ONE}",
            draw=over_training("loss", "loss", styles, panel=panel, low="least", high="most"),
            source=f"{PAPER}, figure 10a",
        ),
        Figure(
            title=f"Change of the gradient along an update{which}",
            query=f"gradient_along_updates{of}",
            caption="Range of |g(x) - g(x')| over step sizes along the gradient; the line is that of the update "
            f"itself. {STEPS} {ONE}",
            draw=over_training("change", "gradient difference", styles, panel=panel, low="least", high="most"),
            source=f"{PAPER}, figure 10b",
        ),
    ]


FIGURES = [
    Figure(
        title="Loss",
        query="loss_over_training",
        caption="Half the squared error, added up over the 1,000 vectors; geometric mean over seeds, with their range.",
        draw=over_training("loss", "loss", STYLES, low="minimum", high="maximum"),
        source=f"{PAPER}, figures 3b and 5",
    ),
    Figure(
        title="Directions left to learn",
        query="directions_over_training",
        caption="How many of the teacher's ten directions the loss says are not yet learned, set between the losses of "
        f"the best maps that lack so many: at a saddle a whole number. {ONE}",
        draw=over_training("directions_left", "directions left", STYLES, yscale=Scale.LINEAR, ylim=(0, 10.2)),
        source=f"Ours, from figure 3b of {PAPER}",
    ),
    Figure(
        title="Loss at the end",
        query="last_losses",
        caption="After the last step; geometric mean over seeds, with their range. Hollow: the paper's networks after "
        "10,000 steps, of another teacher.",
        draw=bars(
            x="rate",
            y="loss",
            series="norm",
            styles=STYLES,
            xlabel="",
            ylabel="loss",
            unit="",
            low="minimum",
            high="maximum",
            paper=FINAL,
            yscale=Scale.LOG,
        ),
        source=f"{PAPER}, figure 3b",
    ),
    Figure(
        title="Internal covariate shift: size",
        query="shift_over_training",
        caption="|G - G'|: by how much an update of the earlier layers changes a layer's gradient (definition 2.1). "
        f"{ONE}",
        draw=over_training("l2", "|G − G'|", COMPARED),
        source=f"{PAPER}, figure 3b",
    ),
    Figure(
        title="Internal covariate shift: direction",
        query="turn_over_training",
        caption=f"Cosine of the angle between G and G'. {ONE}",
        draw=over_training("cosine", "cosine", COMPARED, yscale=Scale.LINEAR, ylim=(-1.05, 1.05)),
        source=f"{PAPER}, figure 3b",
    ),
    Figure(
        title="Internal covariate shift by layer: size",
        query="size_of_shift",
        caption="Geometric mean of |G - G'| over training; median over seeds, with their range.",
        draw=by_layer(
            "l2",
            "|G − G'|",
            Scale.LOG,
            [
                PaperPoint(Norm.NONE, 9, 3.5, Standing.DIGITISED, rate(SMALL)),
                PaperPoint(Norm.BATCH, 9, 4.4e3, Standing.DIGITISED, rate(SMALL)),
            ],
        ),
        source=f"{PAPER}, figure 3b",
    ),
    Figure(
        title="Internal covariate shift by layer: direction",
        query="turn_of_shift",
        caption="Mean cosine of G and G' over training; median over seeds, with their range.",
        draw=by_layer(
            "cosine",
            "cosine",
            Scale.LINEAR,
            [
                PaperPoint(Norm.NONE, 9, 1.0, Standing.DIGITISED, rate(SMALL)),
                PaperPoint(Norm.BATCH, 9, 0.17, Standing.DIGITISED, rate(SMALL)),
                PaperPoint(Norm.BATCH, 17, -0.08, Standing.DIGITISED, rate(SMALL)),
            ],
        ),
        source=f"{PAPER}, figure 3b",
    ),
    *ranges("", COMPARED, "panel", ""),
    Figure(
        title="Effective beta-smoothness",
        query="beta_along_updates",
        caption="Largest |g(x) - g(x')| / |x - x'| over step sizes along the gradient. Where the gradient hardly "
        "changes over the shortest step, it is rounding: without norms at LR 1e−7, for most of the time. "
        f"{STEPS} {ONE}",
        draw=over_training("beta", "effective beta", COMPARED),
        source=f"{PAPER}, figure 10c",
    ),
    *ranges("_of_l_p", STYLES[2:], "norm_panel", ", l_p norms"),
    Figure(
        title="Effective beta-smoothness, l_p norms",
        query="beta_along_updates_of_l_p",
        caption=f"As above. {ONE}",
        draw=over_training("beta", "effective beta", STYLES[1:]),
        source=f"{PAPER}, section 3.3",
    ),
    Figure(
        title="The plateau of the effective beta is 2 / LR",
        query="two_over_lr",
        caption="Median over the second half of training, times LR / 2: the largest beta over every step size, which "
        "is the paper's, over those from LR on, and beta at LR / 100 alone. At the edge of stability all are 1; a "
        "gradient that turned by its own length at the shortest step would put the first and last at 50. Far below 1 "
        "the first is rounding. Geometric means over seeds.",
        draw=panels(
            x="lr",
            y="measured",
            series="norm",
            styles=STYLES,
            panel="reading",
            xlabel="learning rate",
            ylabel="beta LR / 2",
            unit="",
            xscale=Scale.LOG,
            yscale=Scale.LOG,
            level=1.0,
        ),
        source=f"Ours, from figure 10c of {PAPER}",
    ),
    Figure(
        title="Beta by step size",
        query="beta_by_step_size",
        caption="|g(x) - g(x')| / |x - x'| times LR / 2 at each step size, median over the second half of training and "
        "seeds. Flat at 1: the gradient is linear along the step, with curvature 2 / LR. It falls as 1 over the step "
        "where the change stops growing, or is rounding.",
        draw=panels(
            x="times",
            y="beta",
            series="norm",
            styles=STYLES,
            panel="panel",
            xlabel="step size / LR",
            ylabel="beta LR / 2",
            unit="",
            xscale=Scale.LOG,
            yscale=Scale.LOG,
            level=1.0,
        ),
        source=f"Ours, from figure 10 of {PAPER}",
    ),
    Figure(
        title="Theorem 4.1: units for which it holds",
        query="bound_over_training",
        caption="Share of the units of the 24 batch norm layers, over seeds. With the gradient at the layer's output "
        "the theorem is an identity. With the gradient in the same network without this one norm, which sees other "
        "values from there on, nothing makes it hold.",
        draw=over_training(
            "holds", "share of units", SIDES, series="side", yscale=Scale.LINEAR, unit="%", ylim=(0, 1.02)
        ),
        source=f"{PAPER}, theorem 4.1",
    ),
    Figure(
        title="Theorem 4.1: left side over right side",
        query="bound_by_unit",
        caption="Median over units and seeds; the band holds the middle 90 %. The theorem says: at most 1.",
        draw=over_training("ratio", "left / right", SIDES, series="side", low="5 %", high="95 %", level=1.0),
        source=f"{PAPER}, theorem 4.1",
    ),
    Figure(
        title="What layer 17 hands on",
        query="distributions",
        caption=f"Values behind the norm over units and vectors, in standard deviations from their mean, at LR 1e−6; "
        f"the middle 99.9 %, as the share in a tenth of a deviation. {ONE}",
        draw=histograms(
            left="low",
            right="high",
            share="share",
            series="time",
            styles=TIMES,
            panel="panel",
            panel_title="{}",
            xlabel="standard deviations",
            ylabel="share",
        ),
        source=f"Ours, as figure 14 of {PAPER} for VGG",
    ),
]

# In the paper's preset what costs most is trained once, as in the paper; the rest has an interval over seeds.
BARE_AND_BATCH = grid(norm=[Norm.NONE, Norm.BATCH], lr=[LARGE, SMALL])
L_P_ONCE = grid(norm=L_P, lr=[SMALL], seed=[0])
FIXED = SANTURKAR_LINEAR | {"trainable": Trainable.ALL}
DRAW = "The teacher and its 1,000 vectors are one draw, not the paper's; seeds draw weights."

study = Study(
    name="deep_linear",
    doc=__doc__,
    paper=Preset(
        fixed=FIXED,
        scientific=BARE_AND_BATCH + grid(norm=L_P, lr=[LARGE], seed=[0]) + L_P_ONCE,
        nuisance=[{}],
        seeds=range(3),
        note=f"{DRAW} The paper shows one network of each kind; here no norm and batch norm have three seeds at its "
        "two rates, and l_p norms one. Landscapes are read every 100 steps, of l_p norms every 200.",
    ),
    laptop=Preset(
        fixed=FIXED | {"steps": 1000},
        scientific=BARE_AND_BATCH + grid(norm=L_P, lr=[LARGE]) + L_P_ONCE,
        nuisance=[{}],
        seeds=range(3),
        note="This preset trains the paper's network for 1,000 steps, not for its 10,000: it asks whether the paper's "
        f"trends show, not whether its numbers do. {DRAW}",
    ),
    probes={
        batch_curve: 100 * STEP,
        # Figure 10 is of the first two kinds.
        only(at_multiples(landscape, *MULTIPLES), norm=[Norm.NONE, Norm.BATCH]): 100 * STEP,
        only(at_multiples(landscape, *MULTIPLES), norm=L_P): 200 * STEP,
        at_layers(covariate_shift, 5, 9, 13, 17, 21): 200 * STEP,
        only(gradient_bound, norm=[Norm.BATCH]): 500 * STEP,
        at_layers(activations, 9, 17): 500 * STEP,
        at_layers(activation_histogram, 9, 17): 1000 * STEP,
    },
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
