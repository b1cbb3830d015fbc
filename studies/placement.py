"""Does a deep network need a norm after every convolution?

After the students' "Yet Another Batch Norm Analysis: Interim Report", sections 3 to 6. It plans these experiments and
has no results: what it aims to find out stands here as a hypothesis.

Question     Train ResNets of 50, 152 and 200 layers with batch normalization after every convolution, after every
             second, every fifth, at stage ends, before the classifier only, and nowhere; and gamma and beta alone. Do
             fewer norms keep the accuracy? Is it larger blocks between norms that help, or only that there are fewer
             norms? What of the generalisation gap? Do fewer norms save time, in training and at inference?
Control      Networks of about half as many layers with every norm: 26, 74 and 98 layers, for a ResNet has 6n+2 of them
             and these are the legal depths nearest to 25, 76 and 100. After every second of 152 or 200 layers there are
             as many norms, 75 and 99, as in 74 or 98 layers with all of theirs; after every second of 50 layers 24, in
             26 layers 27. So two networks of about as many norms differ in convolutions, and two of one depth in norms.
Place        A norm is put behind the layers whose number from the stem is a multiple of 2 or 5; a shortcut counts as
             the layer beside it. In a block norms stand in the branch: behind its first convolution (every second
             layer), or at its end. No norm stands behind the sum of branch and shortcut, so stage ends, which have one
             at the end of the last branch, bound that branch and not the signal. With He's weights a block without a
             norm doubles the variance of the signal.
Prediction   A norm after every second convolution keeps the accuracy and beats half the layers with every norm. Without
             norms nothing trains. Time falls with every norm left out, and at inference, where a norm can be folded
             into the convolution before it (Jacob et al. 2018), there is nothing left to save.
Refuted by   accuracy that falls with the first norms left out, half the layers that do as well with as many norms, or a
             step that takes as long with half the norms.
Cost         Laptop: 132 trainings, 5 minutes on 2 CPU cores. Paper preset: 420 trainings of 160 epochs; a cluster.

    python studies/placement.py plan    trials, hours, memory, disk; starts nothing
    python studies/placement.py         runs what is not yet done, then reports
    python studies/placement.py status  the map of cells
    python studies/placement.py sql told_apart
    python studies/placement.py --preset paper --set depth=50 --set placement=every,every_2 --set epochs=1 --set seed=0
"""

import math
from typing import Any

from recipes import FRANKLE_CIFAR, FRANKLE_DIGITS

from bnscale.probes import EPOCH, START, curve, only, timing, unless
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, Along, Scale, Series, bars, curves
from bnscale.study import Preset, Study, grid
from bnscale.trial import Placement, Trainable

REPORT = "Interim report"
NAMES = {
    Placement.EVERY_2: "after every 2nd convolution",
    Placement.EVERY_5: "after every 5th convolution",
    Placement.STAGE_ENDS: "at the ends of the stages",
    Placement.LAST: "before the classifier only",
}
TIMED = (
    "The two take turns in one process, and the shortest of the turns counts. There is a number only where its 95 % "
    "interval is within a twentieth either way."
)

KINDS = [
    Series(Placement.EVERY, "every", "#c8452f"),
    Series(Placement.EVERY_2, "every 2nd", "#e08a3c"),
    Series(Placement.EVERY_5, "every 5th", "#b99a1d"),
    Series(Placement.STAGE_ENDS, "stage ends", "#3f8f5f"),
    Series(Placement.LAST, "last only", "#2f6fb3"),
    Series(Placement.NONE, "no norm", "#3b3f46"),
    Series("bn, every", "BN only", "#7d5ba6"),
]
FAMILIES = [
    Series("every", "every norm, depth changes", VERMILION),
    Series("26 layers", "26 layers", SKY),
    Series("50 layers", "50 layers", BLUE),
    Series("152 layers", "152 layers", GREEN),
    Series("200 layers", "200 layers", PURPLE),
]
APART = [
    Series("every", "every norm", VERMILION),
    Series("every_2", "half the norms", ORANGE),
    Series("half the depth", "every norm, half the layers", BLUE),
]
MODES = [
    Series("train", "training step", VERMILION),
    Series("evaluation", "inference", ORANGE),
    Series("folded", "inference, norms folded", BLUE),
]


def kept(place: Placement) -> Claim:
    planned = place in (Placement.EVERY_2, Placement.EVERY_5)
    return Claim(
        sentence=f"Batch normalization {NAMES[place]} is about as accurate as after every one, at equal depth.",
        source=f"{REPORT}, sections 3 and 6" + ("" if planned else "; this place is ours"),
        query="kept_accuracy",
        row={"placement": place},
        paper=None,
        unit="pt",
        band=(-0.02, math.inf),
        reason="A hypothesis: 'without sacrificing significant accuracy'. Two points: twice what the mean of a few "
        "seeds is uncertain by. Any data can judge it. A seed that diverged at the chosen rate counts as chance.",
        standing=Standing.INFERRED,
        needs=3,
    )


def fits_better(place: Placement) -> Claim:
    return Claim(
        sentence=f"Blocks without norms inside express more: the training loss is lower {NAMES[place]} than after "
        "every one (ratio, equal depth).",
        source=f"{REPORT}, section 6",
        query="expressive_power",
        row={"placement": place},
        paper=None,
        unit="",
        band=(0.0, 0.9),
        reason="A hypothesis: whether 'the expressive power of larger blocks can be improved by not regularising "
        "internally'. Expressive power is how well the training images can be fitted; the loss, unlike accuracy, has "
        "no ceiling. A tenth less is the least that we would call improved.",
        standing=Standing.INFERRED,
        needs=3,
    )


def overfits(place: Placement) -> Claim:
    return Claim(
        sentence=f"With norms {NAMES[place]} the generalisation gap is larger than with all of them, at equal depth.",
        source=f"{REPORT}, sections 1, 4 and 6",
        query="wider_gap",
        row={"placement": place},
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="A hypothesis: norms are said to regularise (Luo et al. 2018), so fewer would do so less. The sign "
        "counts, beyond two standard errors, of seeds and of images. Only where both networks have 90 % of the "
        "training images right.",
        standing=Standing.INFERRED,
        needs=3,
    )


def saves(place: Placement, mode: str) -> Claim:
    what = {"train": "A training step", "evaluation": "Inference, norms as they are,"}[mode]
    return Claim(
        sentence=f"{what} takes less time with norms {NAMES[place]} (over every norm, equal depth).",
        source=f"{REPORT}, section 3",
        query="time_saved",
        row={"placement": place, "mode": mode, "other": Placement.EVERY},
        paper=None,
        unit="",
        band=(0.0, 0.95),
        reason="A hypothesis: 'improved training or inference times'. Below a saving of a twentieth nobody would "
        "change a network. " + TIMED,
        standing=Standing.INFERRED,
        needs=3,
    )


def on_cifar10(trainable: Trainable, depth: int, low: float, high: float, between: str) -> Claim:
    what = "BN only" if trainable is Trainable.BN else "All parameters, every norm"
    return Claim(
        sentence=f"{what}, {depth} layers, CIFAR-10, rate 0.1: test accuracy.",
        source=f"{REPORT}, section 6, 'to confirm' Frankle et al. 2020 (v1), figure",
        query="accuracy_on_cifar10",
        row={"trainable": trainable, "depth": depth},
        paper=None,
        unit="%",
        band=(low, high),
        reason=f"Frankle et al. have no network of this depth, but {between}; 1.5 points beyond either, for reading "
        "the figure, the seeds and 5,000 held-out images.",
        standing=Standing.INFERRED,
        needs=3,
    )


CLAIMS = [
    *map(kept, NAMES),
    Claim(
        sentence="Batch normalization after every convolution beats none.",
        source=f"{REPORT}, sections 1 and 6",
        query="gain_of_norms",
        paper=None,
        unit="pt",
        band=(0.02, math.inf),
        reason="The report's baseline, without a number. Two points, twice what the mean of a few seeds is uncertain "
        "by. A seed that diverged at the chosen rate counts as chance. Any data can judge it.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="Larger blocks help, not fewer norms: norms after every 2nd convolution do better than every norm at "
        "the same depth, and than every norm, about as many, in half the layers.",
        source=f"{REPORT}, section 6",
        query="larger_blocks",
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="A hypothesis: 'that the large blocks were contributing to expressive power, and changes did not simply "
        "come from a lower number of BN layers'. The smaller of the two differences: where depth alone matters the "
        "first is none, where fewer norms alone do the second. The sign counts, beyond two standard errors, of seeds "
        "and of images. Any data can judge it.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    *(fits_better(place) for place in (Placement.EVERY_2, Placement.EVERY_5)),
    *(overfits(place) for place in (Placement.EVERY_2, Placement.EVERY_5)),
    *(saves(place, mode) for mode in ("train", "evaluation") for place in (Placement.EVERY_2, Placement.EVERY_5)),
    Claim(
        sentence="At inference folded norms cost nothing: every norm folded takes as long as no norm at all (ratio).",
        source="Jacob et al. 2018, section 3.2",
        query="time_saved",
        row={"placement": Placement.EVERY, "mode": "folded", "other": Placement.NONE},
        paper=None,
        unit="",
        band=(0.95, 1.05),
        reason="Ours: the paper folds for integer arithmetic and has no such number. A folded network has a bias more "
        "a convolution than one without norms. " + TIMED,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="With norms folded, half as many save nothing at inference (over every norm, folded).",
        source="Jacob et al. 2018, section 3.2",
        query="time_saved",
        row={"placement": Placement.EVERY_2, "mode": "folded", "other": Placement.EVERY},
        paper=None,
        unit="",
        band=(0.95, 1.05),
        reason="Ours, from the above. " + TIMED,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="Gamma and beta alone learn more in a deeper network (deepest less shallowest).",
        source=f"{REPORT}, section 6; Frankle et al. 2021, figure 2",
        query="bn_only_gain",
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="Frankle et al. gain 34 points from 14 to 866 layers. Data and ladders differ, so the sign counts, "
        "beyond two standard errors, of seeds and of images. Any data can judge it.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    on_cifar10(Trainable.BN, 50, 0.561, 0.644, "57.6 % at 32 layers and 62.9 % at 56"),
    on_cifar10(Trainable.BN, 152, 0.682, 0.771, "69.7 % at 110 layers and 75.6 % at 218"),
    on_cifar10(Trainable.BN, 200, 0.682, 0.771, "69.7 % at 110 layers and 75.6 % at 218"),
    on_cifar10(Trainable.ALL, 50, 0.907, 0.946, "92.2 % at 32 layers and 93.1 % at 56"),
    on_cifar10(Trainable.ALL, 152, 0.919, 0.949, "93.4 % at 110 layers and at 218"),
    on_cifar10(Trainable.ALL, 200, 0.919, 0.949, "93.4 % at 110 layers and at 218"),
]

FIGURES = [
    Figure(
        title="Accuracy over depth",
        query="accuracy_over_depth",
        caption="Test accuracy at the end by where norms stand; learning rate chosen on held-out training images; "
        "lines are means over seeds, bands 95 % intervals.",
        draw=curves(
            x="depth",
            y="accuracy",
            series="kind",
            styles=KINDS,
            xlabel="layers",
            ylabel="test accuracy",
            unit="%",
            scale=Scale.LOG,
            along=Along.GRID,
            low="low",
            high="high",
            ylim=(0, 1),
            chance=0.1,
            diverged="diverged",
        ),
        source=f"{REPORT}, section 6",
    ),
    Figure(
        title="Generalisation gap over depth",
        query="gap_over_depth",
        caption="Training less test accuracy of the same weights at the end, in evaluation mode and on images that no "
        "augmentation touched; means over seeds, 95 % intervals. What does not fit its training images has no gap to "
        "speak of.",
        draw=curves(
            x="depth",
            y="gap",
            series="kind",
            styles=KINDS,
            xlabel="layers",
            ylabel="training less test accuracy",
            unit="%",
            scale=Scale.LOG,
            along=Along.GRID,
            low="low",
            high="high",
        ),
        source=f"{REPORT}, sections 4 and 6",
    ),
    Figure(
        title="Accuracy over the number of norms",
        query="accuracy_over_norms",
        caption="Two ways to have fewer norms, everything trained: fewer layers with a norm after each, or the same "
        "layers with norms left out. Where the second lies above the first, convolutions without norms are of use. "
        "Means over seeds, 95 % intervals.",
        draw=curves(
            x="norms",
            y="accuracy",
            series="family",
            styles=FAMILIES,
            xlabel="norm layers",
            ylabel="test accuracy",
            unit="%",
            scale=Scale.LOG,
            along=Along.OWN,
            low="low",
            high="high",
            ylim=(0, 1),
            chance=0.1,
        ),
        source=f"{REPORT}, section 6",
    ),
    Figure(
        title="Fewer norms and larger blocks, told apart",
        query="told_apart",
        caption="Test accuracy. The first two bars differ in norms alone; the last two have about as many norms, and "
        "differ in convolutions. Means over seeds, 95 % intervals.",
        draw=bars(
            x="depth",
            y="accuracy",
            series="network",
            styles=APART,
            xlabel="layers",
            ylabel="test accuracy",
            unit="%",
            low="low",
            high="high",
        ),
        source=f"{REPORT}, section 6",
    ),
    Figure(
        title="Time by where norms stand",
        query="time_over_every",
        caption="Time of a pass over one batch, over that of the same kind of pass with every norm at the same depth, "
        "timed in turns in one process; geometric means over seeds, 95 % intervals. Where clock is processor, it is "
        "the time that one CPU thread computed. A training step is forward and backward, without the update. What has "
        "no norm has none to fold.",
        draw=bars(
            x="network",
            y="ratio",
            series="mode",
            styles=MODES,
            xlabel="layers and where norms stand",
            ylabel="time, every norm = 1",
            unit="",
            low="low",
            high="high",
        ),
        source=f"{REPORT}, section 3",
    ),
]


def placed(depths: list[int], rates: dict[Placement, list[float]]) -> list[dict[str, Any]]:
    """Every place at every depth, each over its own rates."""
    return [
        cell
        for depth in depths
        for place, own in rates.items()
        for cell in grid(depth=[depth], placement=[place], lr=own)
    ]


def bn_only(depths: list[int], rates: list[float]) -> list[dict[str, Any]]:
    """Gamma and beta alone, a norm everywhere. Without an axis of places, so that choosing places leaves them out."""
    return grid(depth=depths, trainable=[Trainable.BN], lr=rates)


# Four decades each, around the rates that train. Without norms the signal of 50 layers is thousands of times as large
# at the output, and what trains with every norm overflows at once. On CIFAR-10, with most norms: a decade either side
# of the report's 0.1.
MANY, FIFTH, LAST, FEW = ([10.0**power for power in range(least, least + 4)] for least in (-3, -4, -5, -6))
RATES = {
    Placement.EVERY: MANY[1:],
    Placement.EVERY_2: MANY[1:],
    Placement.EVERY_5: FIFTH,
    Placement.LAST: LAST,
    Placement.STAGE_ENDS: FEW,
    Placement.NONE: FEW,
}

study = Study(
    name="placement",
    doc=__doc__,
    paper=Preset(
        fixed=FRANKLE_CIFAR | {"trainable": Trainable.ALL},
        scientific=placed([50, 152, 200], RATES)
        + placed([26, 74, 98], {Placement.EVERY: MANY[1:]})
        + bn_only([50, 152, 200], [0.03, 0.1, 0.3]),
        nuisance=[{}],
        chosen="lr",
        seeds=range(5),
        note="The report's schedule starts at rate 0.1, at which networks without norms diverge: each has rates of its "
        "own, and 5,000 of the 50,000 training images are held out to choose one. The report has no results: "
        "its claims are what it aims to find out.",
    ),
    laptop=Preset(
        fixed=FRANKLE_DIGITS | {"trainable": Trainable.ALL},
        # Of the four decades those around the one that digits are learned best at; all four for the two places that
        # are held against each other, and two where nothing trains.
        scientific=placed(
            [50],
            {
                Placement.EVERY: MANY,
                Placement.EVERY_2: MANY,
                Placement.EVERY_5: FIFTH[1:],
                Placement.LAST: LAST[:3],
                Placement.STAGE_ENDS: FEW[1:3],
                Placement.NONE: FEW[1:3],
            },
        )
        + placed(
            [26],
            {
                Placement.EVERY: MANY,
                Placement.EVERY_2: MANY,
                Placement.EVERY_5: FIFTH[1:],
                Placement.NONE: FEW[2:],
            },
        )
        + placed([14], {Placement.EVERY: MANY})
        + bn_only([14, 26, 50], [0.1, 0.3, 1.0]),
        nuisance=[{}],
        chosen="lr",
        seeds=range(3),
        note="This preset trains on scikit-learn's digits (8x8 pixels, 1,200 training images) for 6 epochs, not on "
        "CIFAR-10 for 160. Networks of 14 layers are the controls of 26, and these of 50. The report has no results: "
        "its claims are what it aims to find out.",
    ),
    # A pass takes as long at one rate as at another, so some of them will do; and gamma and beta alone are not timed.
    probes={curve: 10 * EPOCH, only(unless(timing, lr=[1e-6, 1e-3, 1.0]), trainable=[Trainable.ALL]): START},
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
