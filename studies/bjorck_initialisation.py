"""What is wrong with a deep network before it learns, that batch normalization repairs?

After Bjorck, Gomes, Selman & Weinberger, "Understanding Batch Normalization" (arXiv:1806.02375), figures 2 to 7, table
1 and section 2.1; and what its reviewers asked for.

Question     At initialisation and in the first steps, with batch normalization and without: how are gradients
             distributed, how far can a step along them go, what do the layers compute, which classes does the network
             favour, and how much of a gradient depends on the images at all? Do other norms and initialisations, or
             evened class biases, repair the same?
Prediction   Without it gradients are two decades larger, heavy-tailed, of low rank, and hardly depend on the images;
             one class takes nearly all of them; channel means grow with every layer; a step that is 30 times too long
             multiplies the loss by a million. With it none of this is so.
Refuted by   a network without norms whose gradients differ between mini-batches as those with batch norm do, or a step
             along the gradient that diverges at the same length with it and without.
Cost         6 updates at most. Paper preset, ResNet-110 on CIFAR-10, batch 128, 27 trials: 12 minutes on 2 CPU cores.

    python studies/bjorck_initialisation.py plan --preset paper     trials, hours, memory; starts nothing
    python studies/bjorck_initialisation.py --preset paper          measures what is not yet done, then reports
    python studies/bjorck_initialisation.py --preset paper sql sums_of_gradients
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from recipes import BJORCK_CIFAR

from bnscale.probes import (
    START,
    STEP,
    at_layers,
    channel_moments,
    class_bias,
    gradient,
    gradient_histogram,
    gradient_matrix,
    gradient_noise,
    loss_along_gradient,
    loss_along_mean_gradient,
    mean_gradient,
    moments_along_gradient,
)
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import (
    Along,
    PaperPoint,
    Scale,
    Series,
    bars,
    curves,
    heatmaps,
    histograms,
    panels,
)
from bnscale.study import Preset, Study
from bnscale.trial import Augmentation, Data, Norm, OutputBias, Placement, Trainable, WeightInit

PAPER = "Bjorck et al. 2018"
NONE, BATCH = "no norm", "batch norm"

COMPARED = [Series(NONE, NONE, "#3b3f46"), Series(BATCH, BATCH, "#c8452f")]
STYLES = [
    *COMPARED,
    Series("batch norm at the end", "batch norm at the end", "#e08a3c"),
    Series("layer norm", "layer norm", "#2f6fb3"),
    Series("group norm", "group norm", "#3f8f5f"),
    Series("instance norm", "instance norm", "#7d5ba6"),
    Series("no norm, classes evened", "no norm, classes evened", "#9aa0a8"),
    Series("no norm, he normal", "no norm, He", "#b99a1d"),
    Series("no norm, orthogonal", "no norm, orthogonal", "#56b4e9"),
]

# Figure 5 of the paper, its "Log" of the magnitude without norm, read off to 0.1.
DEEP = [6, 18, 30, 42, 54, 66, 78, 90, 102, 110]
LOG_MEAN = [-1.55, -1.45, -0.27, -0.30, -0.37, 0.78, 1.24, 1.88, 2.83, 3.50]
LOG_SD = [-1.25, -1.15, -0.27, -0.24, 0.13, 0.88, 1.41, 2.21, 3.01, 1.97]
# Table 1: sum of magnitudes, magnitude of the sum, and their ratio at layers 18, 54 and 90.
SUMS = {
    BATCH: {18: (7.5e-5, 3.0e-7), 54: (1.9e-5, 1.7e-7), 90: (6.6e-6, 1.6e-7)},
    NONE: {18: (6.3e-5, 3.6e-5), 54: (2.2e-4, 8.4e-5), 90: (2.6e-4, 1.2e-4)},
}
TABLE = {BATCH: {18: 251.8, 54: 112.8, 90: 40.7}, NONE: {18: 1.7, 54: 2.6, 90: 2.1}}


def along(query: str, sentence: str, row: dict[str, Any], paper: float) -> Claim:
    """A number of figure 3, on either axis."""
    rough = row["setting"] == BATCH
    wide = 10**0.1 if rough and row.get("reading") == "loss" else 2  # a loss that hardly falls is known to 0.1 decades
    return Claim(
        sentence=sentence,
        source=f"{PAPER}, figure 3",
        query=query,
        row=row,
        paper=paper,
        unit="",
        band=(float(f"{paper / wide:.3g}"), float(f"{paper * wide:.3g}")),
        reason=f"A factor of {wide:.3g} for the seed: the figure shows one network. "
        + ("Read off it roughly." if rough else "Reading it takes 20 % of that."),
        standing=Standing.DIGITISED,
        needs=3,
    )


def crossing(setting: str, mini_batch: int, level: float, paper: float) -> Claim:
    times = {1.0: "back at what it was", 1e6: "a million times what it was"}[level]
    sentence = f"Step size at which the loss is {times}: {setting}, mini-batch {mini_batch}."
    return along("crossings", sentence, {"setting": setting, "mini_batch": mini_batch, "level": level}, paper)


def least(setting: str, mini_batch: int, length: float, loss: float) -> list[Claim]:
    at = {"setting": setting, "mini_batch": mini_batch}
    where = f"{setting}, mini-batch {mini_batch}"
    return [
        along("least_losses", f"Step size at which the loss is least: {where}.", at | {"reading": "length"}, length),
        along("least_losses", f"Least loss over the loss before: {where}.", at | {"reading": "loss"}, loss),
    ]


def alignment(setting: str, layer: int) -> Claim:
    paper = TABLE[setting][layer]
    return Claim(
        sentence=f"Sum of magnitudes over magnitude of the sum, layer {layer}, {setting}.",
        source=f"{PAPER}, table 1",
        query="sums_of_gradients",
        row={"setting": setting, "layer_index": layer},
        paper=paper,
        unit="",
        band=(max(1.0, round(paper / 1.5, 2)), round(paper * 1.5, 2)),
        reason="A factor of 1.5 for the seed of one network; the table is remembered, not seen.",
        standing=Standing.MEMORY,
        needs=3,
    )


def sums(setting: str, layer: int, part: str) -> Claim:
    paper = SUMS[setting][layer]["ab".index(part)]
    what = {"a": "Sum of magnitudes", "b": "Magnitude of the sum"}[part]
    return Claim(
        sentence=f"{what} over images and pixels, layer {layer}, {setting}.",
        source=f"{PAPER}, table 1",
        query="table_1",
        row={"setting": setting, "layer_index": layer, "part": part},
        paper=paper,
        unit="",
        band=(paper / 2, paper * 2),
        reason="A factor of 2: gradients scale with the loss at initialisation, which is one network's; the table is "
        "remembered, not seen. That it divides by images and pixels is our reading.",
        standing=Standing.MEMORY,
        needs=3,
    )


CLAIMS = [
    # --- figure 2
    Claim(
        sentence="In layer 55 gradients are almost two decades larger without batch norm.",
        source=f"{PAPER}, figure 2",
        query="decades_between_ranges",
        paper=2.0,
        unit="decades",
        band=(1.5, 2.5),
        reason="Ranges of ±0.04 and ±4 read off the axes, of one network; half a decade either way for the seed. "
        "Measured: the largest magnitudes.",
        standing=Standing.MEMORY,
        needs=3,
    ),
    Claim(
        sentence="With batch norm the gradient of layer 55 lies within about ±0.04.",
        source=f"{PAPER}, figure 2",
        query="range_of_layer_55",
        row={"setting": BATCH},
        paper=0.04,
        unit="",
        band=(0.02, 0.08),
        reason="A factor of 2 for reading where a histogram ends, and for the seed.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="Without norm its tails reach beyond ±4.",
        source=f"{PAPER}, figure 2",
        query="range_of_layer_55",
        row={"setting": NONE},
        paper=4.0,
        unit="",
        band=(4.0, math.inf),
        reason="The figure ends at 4 and the tails do not.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="Without norm the gradient of layer 55 is a spike with heavy tails (kurtosis).",
        source=f"{PAPER}, figure 2",
        query="shape_of_layer_55",
        row={"setting": NONE},
        paper=None,
        unit="",
        band=(6.0, math.inf),
        reason="A normal distribution has 3 and a Laplace distribution, which is a spike with exponential tails, 6.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="With batch norm it is a bell (kurtosis).",
        source=f"{PAPER}, figure 2",
        query="shape_of_layer_55",
        row={"setting": BATCH},
        paper=None,
        unit="",
        band=(2.0, 4.5),
        reason="Nearer to a normal distribution's 3 than to a Laplace distribution's 6.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="Gradients have heavier tails without batch norm (share of the layers).",
        source="Summary of Bjorck et al. 2018, on the learning rate",
        query="heavier_tails",
        paper=None,
        unit="%",
        band=(0.9, 1.0),
        reason="Share of the layers in which the gradient's kurtosis is larger without batch norm than with it. "
        "Chance alone would give half of them.",
        standing=Standing.FOUND,
        needs=3,
    ),
    # --- figure 3
    crossing(NONE, 1, 1.0, 8e-4),
    crossing(NONE, 1, 1e6, 2.8e-3),
    crossing(NONE, 4, 1e6, 4.5e-3),
    crossing(NONE, 7, 1e6, 7e-3),
    crossing(BATCH, 1, 1.0, 0.06),
    crossing(BATCH, 4, 1.0, 0.1),
    *least(NONE, 1, 2.5e-4, 0.1),
    *least(BATCH, 1, 0.03, 0.85),
    *least(BATCH, 4, 0.04, 0.71),
    *least(BATCH, 7, 0.1, 0.78),
    Claim(
        sentence="Batch norm, mini-batch 7: a step of 0.2 does not bring the loss back to what it was.",
        source=f"{PAPER}, figure 3",
        query="loss_at_a_fifth",
        paper=None,
        unit="",
        band=(0.0, 1.0),
        reason="The curve crosses 1 beyond 0.2. Measured: the loss over the loss before, at 0.215.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="With batch norm no step up to 0.2 diverges (a loss of 1,000 times what it was).",
        source=f"{PAPER}, figure 3",
        query="divergence_with_batch_norm",
        paper=0,
        unit="",
        band=(0, 0),
        reason="Counts the step sizes that do, at mini-batches 1, 4 and 7 over all seeds; the figure has none.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    # --- figures 4 and 5
    Claim(
        sentence="While an update diverges, means explode in later layers: from layer 8 to layer 80.",
        source=f"{PAPER}, figure 4",
        query="explosion",
        paper=8.3,
        unit="decades",
        band=(2.0, math.inf),
        reason="The paper does not say how long its step was, and the size depends on it. Ours is the shortest "
        "looked at that multiplies the loss by more than 1,000; two decades more in layer 80 than in layer 8 is an "
        "explosion.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    *(
        Claim(
            sentence=f"Without norm channel {moment}s grow from layer 6 to layer 102, {said}.",
            source=f"{PAPER}, figure 5",
            query="growth_of_moments",
            row={"setting": NONE, "moment": moment, "unit": unit},
            paper=paper,
            unit="",
            band=(round(paper - 1, 2), round(paper + 1, 2)),
            reason="The figure's axis says Log and no base, so it is read both ways. One unit of that axis for the "
            "seed of one network and for reading it to 0.1.",
            standing=Standing.INFERRED,
            needs=3,
        )
        for moment, paper in (("mean", 4.38), ("deviation", 4.26))
        for unit, said in (("natural", "if Log is natural"), ("decades", "if Log is decimal"))
    ),
    Claim(
        sentence="With batch norm channel means do not explode (natural logarithm, layer 6 to 102).",
        source="Summary of Bjorck et al. 2018, on the learning rate",
        query="growth_of_moments",
        row={"setting": BATCH, "moment": "mean", "unit": "natural"},
        paper=None,
        unit="",
        band=(-1.45, 1.45),
        reason="Within a stage each of 18 blocks adds a branch of variance 1, so the sum's deviation may grow by the "
        "root of 18, which is 1.45 in natural logarithms, and starts anew at the next stage.",
        standing=Standing.FOUND,
        needs=3,
    ),
    # --- figure 6
    Claim(
        sentence="Without norm one class takes nearly every image at initialisation.",
        source=f"{PAPER}, figure 6",
        query="favoured_class",
        row={"setting": NONE, "biases": "as they are"},
        paper=None,
        unit="%",
        band=(0.9, 1.0),
        reason="The figure's column is saturated in nearly all rows; nine in ten is nearly all.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="Its logit's gradient is saturated at 1/128 for the images of other classes (in 128ths).",
        source=f"{PAPER}, figure 6",
        query="saturation",
        row={"setting": NONE},
        paper=1.0,
        unit="",
        band=(0.9, 1.0),
        reason="The figure's scale ends at ±1/128, which is a softmax of 1; nearly all rows are there.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="With batch norm the gradients at the output depend on the image.",
        source=f"{PAPER}, figure 6",
        query="saturation",
        row={"setting": BATCH},
        paper=None,
        unit="",
        band=(0.0, 0.5),
        reason="The figure has one column mildly positive: below half of what saturation would be.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="Evening the class biases does not repair the layers within.",
        source="Review of Bjorck et al. 2018, on figure 6",
        query="left_after_evening",
        paper=None,
        unit="times",
        band=(10.0, math.inf),
        reason="The reviewer expects a general phenomenon that biases cannot mend: gradients within still a decade "
        "larger than with batch norm.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    # --- table 1 and figure 7
    *(alignment(setting, layer) for setting in (BATCH, NONE) for layer in (18, 54, 90)),
    *(sums(setting, layer, part) for setting in (BATCH, NONE) for layer in (18, 54, 90) for part in "ab"),
    Claim(
        sentence="Without batch norm the terms of a gradient add up; with it they cancel, a decade more in every "
        "layer.",
        source=f"{PAPER}, table 1",
        query="least_gain_in_alignment",
        paper=19.4,
        unit="times",
        band=(10.0, math.inf),
        reason="The ratio of the table with batch norm over that without, in the layer where that is least (40.7 / "
        "2.1 there); a decade counts.",
        standing=Standing.MEMORY,
        needs=3,
    ),
    Claim(
        sentence="The gradient matrix of layer 45 is of low rank without norm (share of full rank).",
        source=f"{PAPER}, figure 7",
        query="rank_of_layer_45",
        row={"setting": NONE},
        paper=None,
        unit="%",
        band=(0.0, 0.18),
        reason="Of magnitudes over input and output channels, as the figure shows them; magnitudes of independent "
        "normal numbers have 36 % of full rank, so at most half of that.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="With batch norm it is less so.",
        source=f"{PAPER}, figure 7",
        query="rank_of_layer_45",
        row={"setting": BATCH},
        paper=None,
        unit="%",
        band=(0.18, 1.0),
        reason="More than half of what independent normal numbers have.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="Without norm gradients are of low rank.",
        source="Review of Bjorck et al. 2018; figure 7",
        query="loss_of_rank",
        paper=None,
        unit="",
        band=(0.0, 0.5),
        reason="Effective rank over that with batch norm, mean over the layers: half of it or less.",
        standing=Standing.FOUND,
        needs=3,
    ),
    # --- section 2.1 and the first reviewer
    Claim(
        sentence="Without norm gradients differ between a layer's units far more than between mini-batches.",
        source="Review of Bjorck et al. 2018",
        query="units_against_batches",
        row={"setting": NONE},
        paper=None,
        unit="times",
        band=(10.0, math.inf),
        reason="Ratio of the two variances, median over the layers; a decade is far more.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="With batch norm they do not.",
        source="Review of Bjorck et al. 2018",
        query="units_against_batches",
        row={"setting": BATCH},
        paper=None,
        unit="times",
        band=(0.0, 10.0),
        reason="The same ratio, below a decade.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    *(
        Claim(
            sentence=f"The variance of a gradient estimate falls as 1 / |B|, {setting}: exponent.",
            source=f"{PAPER}, section 2.1",
            query="fall_of_noise",
            row={"setting": setting},
            paper=-1.0,
            unit="",
            band=(-1.1, -0.9),
            reason="Exact without norms over images, but for 4 to 24 mini-batches of a size; the proof does not hold "
            "with batch norm, where an image's gradient depends on the others.",
            standing=Standing.FOUND,
            needs=3,
        )
        for setting in (NONE, BATCH)
    ),
    Claim(
        sentence="The larger rate that batch norm allows makes the noise of a step larger.",
        source=f"{PAPER}, section 2.1",
        query="gain_in_noise",
        paper=None,
        unit="decades",
        band=(0.0, math.inf),
        reason="lr^2 times the variance of the gradient at rates 0.1 and 0.0001; the rate's square alone gives 6 "
        "decades, which larger gradients without norm take back in part.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    # --- the third reviewer
    Claim(
        sentence="Without norm the part of the gradient that does not depend on the images dominates.",
        source="Review of Bjorck et al. 2018",
        query="common_share",
        row={"setting": NONE},
        paper=None,
        unit="",
        band=(0.5, 1.0),
        reason="Share of a mini-batch's squared gradient that all share, mean over layers: more than half dominates.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="With batch norm it does not.",
        source="Review of Bjorck et al. 2018",
        query="common_share",
        row={"setting": BATCH},
        paper=None,
        unit="",
        band=(-math.inf, 0.5),
        reason="Less than half. Without bias: where nothing is common it may come out below 0.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="It points in the radial direction (a reviewer's hypothesis).",
        source="Review of Bjorck et al. 2018",
        query="radial_share",
        row={"setting": NONE},
        paper=None,
        unit="%",
        band=(0.5, 1.0),
        reason="Share of its square along the weights themselves, mean over layers: more than half would be mostly "
        "radial.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="Following it reduces the loss at first ...",
        source="Review of Bjorck et al. 2018",
        query="descent_along_the_common_part",
        paper=None,
        unit="",
        band=(0.0, 0.9),
        reason="The reviewer's question. Least loss over the loss before: a tenth less is a reduction.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="... in a very narrow minimum: a random step as long as the one that diverges hardly matters.",
        source="Review of Bjorck et al. 2018",
        query="narrowness",
        paper=None,
        unit="times",
        band=(0.0, 10.0),
        reason="The reviewer's question. Loss over the loss before for a random direction, where the common part "
        "gives more than 1,000: less than 10 is another order.",
        standing=Standing.FOUND,
        needs=3,
    ),
]


def by_layer(
    y: str,
    ylabel: str,
    unit: str = "",
    yscale: Scale = Scale.LINEAR,
    ylim: tuple[float | None, float | None] = (None, None),
) -> Callable[[Any, Any], None]:
    """A line a setting from the stem, on the left, to the output."""
    return curves(
        x="layer_index",
        y=y,
        series="setting",
        styles=STYLES,
        xlabel="layer",
        ylabel=ylabel,
        unit=unit,
        scale=Scale.LINEAR,
        yscale=yscale,
        along=Along.TIME,
        ylim=ylim,
    )


MOMENTS = [
    PaperPoint(NONE, layer, math.exp(value), Standing.DIGITISED, panel)
    for panel, values in (("channel means", LOG_MEAN), ("channel deviations", LOG_SD))
    for layer, value in zip(DEEP, values, strict=True)
]


def by_moment(
    styles: list[Series], low: str | None = None, high: str | None = None, paper: Sequence[PaperPoint] = ()
) -> Callable[[Any, Any], None]:
    """Means beside deviations, by layer."""
    return panels(
        x="layer_index",
        y="reading",
        series="setting",
        styles=styles,
        panel="panel",
        xlabel="layer",
        ylabel="mean over channels",
        unit="",
        xscale=Scale.LINEAR,
        yscale=Scale.LOG,
        low=low,
        high=high,
        paper=paper,
    )


FIGURES = [
    Figure(
        title="Gradient of layer 55",
        query="gradient_of_layer_55",
        caption="Share of the weights of layer 55 by their gradient on the first mini-batch; one network each, each "
        "on its own scale.",
        draw=histograms(
            left="low",
            right="high",
            share="share",
            series="setting",
            styles=COMPARED,
            panel="setting",
            panel_title="{}",
            xlabel="gradient",
            ylabel="share of weights",
        ),
        source=f"{PAPER}, figure 2",
    ),
    Figure(
        title="Size of gradients",
        query="size_of_gradients",
        caption="Root mean square of each layer's gradient on the first mini-batch; the stem is on the left.",
        draw=by_layer("rms", "gradient", yscale=Scale.LOG),
        source=f"{PAPER}, section 3.1",
    ),
    Figure(
        title="Tails of gradients",
        query="tails",
        caption="Hill's tail index of the magnitudes of each layer's gradient over its largest 5 %: the smaller, the "
        "heavier the tail. A normal distribution has about 6.",
        draw=by_layer("hill", "tail index", ylim=(0, 10)),
        source=f"{PAPER}, section 3.1",
    ),
    Figure(
        title="Loss along the gradient",
        query="loss_along_the_gradient",
        caption="Loss after a step along the gradient of a mini-batch, over the loss before it, on the same "
        "mini-batch; geometric mean and range over seeds, up to where the first seed is beyond a million. Networks "
        "train at their own rate from one mini-batch to the next.",
        draw=panels(
            x="length",
            y="relative",
            series="setting",
            styles=COMPARED,
            panel="mini_batch",
            xlabel="step size",
            ylabel="relative loss",
            unit="",
            xscale=Scale.LOG,
            yscale=Scale.LOG,
            low="minimum",
            high="maximum",
            level=1.0,
            ylim=(0.03, 1e6),
        ),
        source=f"{PAPER}, figure 3",
    ),
    Figure(
        title="Moments while an update diverges",
        query="moments_while_diverging",
        caption="Means and variances of the channels of layers 8, 44 and 80 without norm, on the way along the "
        "gradient to the shortest step looked at that multiplies the loss by more than 1,000; one network. The "
        "paper's colour bars end at 1.45, 3.9e3 and 3.1e8 (means) and at 1.02, 5.4e6 and 5.6e16 (variances), at a "
        "step whose length it does not give.",
        draw=heatmaps(
            x="channel",
            y="fraction",
            value="reading",
            panel="panel",
            xlabel="channel",
            ylabel="share of the step",
            label="",
        ),
        source=f"{PAPER}, figure 4",
    ),
    Figure(
        title="Channel means and deviations by layer",
        query="moments_by_layer",
        caption="The channels' means (magnitudes) and standard deviations over images and pixels, of what a layer "
        "computes before any norm: means over the channels, bands one deviation of the channels either way. Hollow: "
        "the paper's Log without norm, whose base it does not state, drawn as if natural.",
        draw=by_moment(COMPARED, "low", "high", MOMENTS),
        source=f"{PAPER}, figure 5",
    ),
    Figure(
        title="The same for every setting",
        query="moments_of_settings",
        caption="Means over the channels, as above.",
        draw=by_moment(STYLES),
        source=f"{PAPER}, figure 5",
    ),
    Figure(
        title="Gradients at the output",
        query="gradients_of_classes",
        caption="Gradient of the loss with respect to each image's logits, on the first mini-batch, with the "
        "classifier's biases as they are and evened over the mini-batch; one network each.",
        draw=heatmaps(
            x="output", y="image", value="reading", panel="panel", xlabel="class", ylabel="image", label="", across=4
        ),
        source=f"{PAPER}, figure 6",
    ),
    Figure(
        title="Activations at the output",
        query="activations_of_classes",
        caption="The logits themselves, which a reviewer asked to see apart.",
        draw=heatmaps(
            x="output", y="image", value="reading", panel="panel", xlabel="class", ylabel="image", label="", across=4
        ),
        source="Review of Bjorck et al. 2018, on figure 6",
    ),
    Figure(
        title="Sums of gradients",
        query="sums_of_gradients",
        caption="A weight's gradient is a sum over images and pixels: the sum of the terms' magnitudes over the "
        "magnitude of their sum, at the layers of the paper's table. 1 where all terms have one sign.",
        draw=bars(
            x="layer_index",
            y="ratio",
            series="setting",
            styles=STYLES,
            xlabel="layer",
            ylabel="ratio",
            unit="",
            low="low",
            high="high",
            yscale=Scale.LOG,
            paper=[
                PaperPoint(setting, layer, ratio, Standing.MEMORY)
                for setting, row in TABLE.items()
                for layer, ratio in row.items()
            ],
        ),
        source=f"{PAPER}, table 1, as a bar plot (a reviewer)",
    ),
    Figure(
        title="Gradient over channels, layer 45",
        query="matrix_of_layer_45",
        caption="Magnitude of the gradient, mean over the places of a kernel, by input and output channel; one "
        "network each.",
        draw=heatmaps(
            x="input",
            y="output",
            value="magnitude",
            panel="setting",
            xlabel="input channel",
            ylabel="output channel",
            label="",
        ),
        source=f"{PAPER}, figure 7",
    ),
    Figure(
        title="Rank over channels",
        query="rank_over_channels",
        caption="Effective rank (exponential of the entropy of the singular values) of the matrix above, in each "
        "layer, over the most that it can be. Magnitudes of independent normal numbers have 36 %.",
        draw=by_layer("channel_rank", "effective rank", "%", ylim=(0, 1)),
        source=f"{PAPER}, figure 7",
    ),
    Figure(
        title="Rank of gradients",
        query="rank_of_gradients",
        caption="Effective rank of each layer's gradient as a matrix (exponential of the entropy of its singular "
        "values) over the most that it can be.",
        draw=by_layer("rank", "effective rank", "%", ylim=(0, 1)),
        source=f"{PAPER}, figure 7",
    ),
    Figure(
        title="Units against mini-batches",
        query="variance_between_units",
        caption="Variance of the length of the gradient between the units (output channels) of a layer, over that "
        "between mini-batches.",
        draw=by_layer("ratio", "ratio", yscale=Scale.LOG),
        source="Review of Bjorck et al. 2018",
    ),
    Figure(
        title="Noise of a gradient estimate",
        query="noise",
        caption="|B| times the variance of a mini-batch's gradient, over the same for the smallest mini-batches: 1 "
        "where the variance falls as 1 / |B|, as the bound says; geometric mean and range over seeds.",
        draw=curves(
            x="images",
            y="ratio",
            series="setting",
            styles=STYLES,
            xlabel="images in a mini-batch",
            ylabel="|B| variance",
            unit="",
            scale=Scale.LOG,
            along=Along.GRID,
            ylim=(0, None),
        ),
        source=f"{PAPER}, section 2.1",
    ),
    Figure(
        title="Noise of a step",
        query="noise_and_bound",
        caption="Variance of a step at the trial's rate, 0.1 with batch norm and 0.0001 without: lr^2 times that of "
        "a mini-batch's gradient. Beside it the bound, with C from the smallest mini-batches. Means over seeds.",
        draw=panels(
            x="images",
            y="variance",
            series="what",
            styles=[Series("measured", "measured", "#c8452f"), Series("lr^2 C / |B|", "lr^2 C / |B|", "#2f6fb3")],
            panel="setting",
            xlabel="images in a mini-batch",
            ylabel="variance of a step",
            unit="",
            xscale=Scale.LOG,
            yscale=Scale.LOG,
        ),
        source=f"{PAPER}, section 2.1",
    ),
    Figure(
        title="The part of the gradient that does not depend on the images",
        query="independent_part",
        caption="Share of a mini-batch's squared gradient that four mini-batches have in common.",
        draw=by_layer("common", "common to mini-batches", "%"),
        source="Review of Bjorck et al. 2018",
    ),
    Figure(
        title="Its radial component",
        query="radial_part",
        caption="Share of the squared mean gradient of four mini-batches that points along the weights themselves. "
        "Where a norm follows, it is 0: scaling the weights changes nothing.",
        draw=by_layer("radial", "radial share", "%", ylim=(0, None)),
        source="Review of Bjorck et al. 2018",
    ),
    Figure(
        title="Loss along the common gradient and along a random direction",
        query="loss_along_the_common_part",
        caption="Loss after a step along the mean gradient of four mini-batches, and along a random direction that "
        "is orthogonal to it and as long, over the loss before; geometric mean and range over seeds, up to where the "
        "first seed is beyond a million.",
        draw=panels(
            x="length",
            y="relative",
            series="direction",
            styles=[
                Series("mean gradient", "mean gradient", "#c8452f"),
                Series("random", "random, orthogonal", "#2f6fb3"),
            ],
            panel="setting",
            xlabel="step size",
            ylabel="relative loss",
            unit="",
            xscale=Scale.LOG,
            yscale=Scale.LOG,
            low="minimum",
            high="maximum",
            level=1.0,
            ylim=(0.03, 1e6),
        ),
        source="Review of Bjorck et al. 2018",
    ),
]

# The paper's figure 3 looks at mini-batches 1, 4 and 7 of a training; all else is measured before any update.
SIX_STEPS = {"steps": 6}
NO_STEPS = {"steps": 0}
GLOROT = {"weight_init": WeightInit.GLOROT_NORMAL, "output_bias": OutputBias.RANDOM}
UNNORMALIZED = {"norm": Norm.NONE, "placement": Placement.NONE, "groups": None, "lr": 1e-4}
NORMALIZED = {"placement": Placement.EVERY, "groups": None, "lr": 0.1}

SETTINGS = [
    UNNORMALIZED | GLOROT | SIX_STEPS,
    NORMALIZED | GLOROT | SIX_STEPS | {"norm": Norm.BATCH},
    NORMALIZED | GLOROT | NO_STEPS | {"norm": Norm.BATCH, "placement": Placement.LAST},
    NORMALIZED | GLOROT | NO_STEPS | {"norm": Norm.LAYER},
    NORMALIZED | GLOROT | NO_STEPS | {"norm": Norm.GROUP, "groups": 8},
    NORMALIZED | GLOROT | NO_STEPS | {"norm": Norm.INSTANCE},
    UNNORMALIZED | GLOROT | NO_STEPS | {"output_bias": OutputBias.EVEN},
    UNNORMALIZED | GLOROT | NO_STEPS | {"weight_init": WeightInit.HE_NORMAL},
    UNNORMALIZED | GLOROT | NO_STEPS | {"weight_init": WeightInit.ORTHOGONAL},
]

FIXED = BJORCK_CIFAR | {"trainable": Trainable.ALL, "validation": 0, "epochs": None, "milestones": ()}

study = Study(
    name="bjorck_initialisation",
    doc=__doc__,
    paper=Preset(
        fixed=FIXED,
        scientific=SETTINGS,
        nuisance=[{}],
        seeds=range(3),
        note="Three networks a setting; the paper shows one, and does not say which of its numbers are means.",
    ),
    laptop=Preset(
        fixed=FIXED | {"data": Data.DIGITS, "augmentation": Augmentation.NONE},
        scientific=SETTINGS,
        nuisance=[{}],
        seeds=range(3),
        note="This preset measures the paper's network on scikit-learn's digits (8x8 pixels), not on its CIFAR-10: "
        "it asks whether the paper's trends show, not whether its numbers do. --preset paper takes 12 minutes.",
    ),
    probes={
        channel_moments: START,
        gradient: START,
        at_layers(gradient_histogram, 55): START,
        at_layers(gradient_matrix, 45): START,
        class_bias: START,
        loss_along_gradient: 3 * STEP,
        at_layers(moments_along_gradient, 8, 44, 80): START,
        mean_gradient: START,
        gradient_noise: START,
        loss_along_mean_gradient: START,
    },
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
