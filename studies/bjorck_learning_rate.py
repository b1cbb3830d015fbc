"""Is it the larger learning rate that makes batch normalization work?

After Bjorck, Gomes, Selman & Weinberger, "Understanding Batch Normalization" (arXiv:1806.02375, NeurIPS 2018), section
2 and appendix, and what its reviewers asked.

Question     Train one network with and without batch normalization over learning rates. How large a rate trains, and
             how much of the gain in test accuracy is left where both use the same rate? How much of it does a single
             norm before the classifier keep? Do layer, group and instance norm and batch renormalization allow as large
             rates, and do they come as far? Does a small batch with a small rate do as well without norms?
Prediction   Without norms 110 layers train at 0.0001 and diverge above it; with them they train at 0.1 and reach 93.3 %
             in place of 82.0 %. At 0.0001 batch normalization brings nothing (81.3 %). One norm before the
             classifier keeps two thirds of the gain.
Refuted by   unnormalized networks that train at rates as large, or a gain that stays at the small rate.
Cost         Laptop: 159 trainings, 6 minutes on 2 CPU cores. Paper preset: 620 trainings of 110 layers for 165 epochs;
             a cluster.

    python studies/bjorck_learning_rate.py plan    trials, hours, memory, disk; starts nothing
    python studies/bjorck_learning_rate.py         runs what is not yet done, then reports
    python studies/bjorck_learning_rate.py status  the map of cells
    python studies/bjorck_learning_rate.py sql largest_rate
"""

import math
from typing import Any

from recipes import BJORCK_CIFAR, BJORCK_DIGITS, RENORM

from bnscale.probes import EPOCH, curve
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import ORANGE, PURPLE, VERMILION, Along, PaperPoint, Scale, Series, bars, curves
from bnscale.study import Preset, Same, Study, grid
from bnscale.trial import Norm, Placement, Trainable

# The words that the queries have for norm and place, and the paper's four lines.
EVERY, LAST, NONE = "batch", "batch at last", "none"
FIG_1 = {"BN 0.1": (EVERY, 0.1), "BN 0.003": (EVERY, 0.003), "BN 0.0001": (EVERY, 1e-4), "no norm 0.0001": (NONE, 1e-4)}

STYLES = [
    Series(EVERY, "batch norm", "#c8452f"),
    Series(LAST, "batch norm, last layer only", "#e08a3c"),
    Series(Norm.RENORM, "batch renormalization", "#b99a1d"),
    Series(Norm.GROUP, "group norm", "#3f8f5f"),
    Series(Norm.LAYER, "layer norm", "#2f6fb3"),
    Series(Norm.INSTANCE, "instance norm", "#7d5ba6"),
    Series(NONE, "no norm", "#3b3f46"),
]
BATCH_STYLES = [each for each in STYLES if each.key in (EVERY, NONE)]
LINE_STYLES = [
    Series("BN 0.1", "BN 0.1", VERMILION),
    Series("BN 0.003", "BN 0.003", ORANGE),
    Series("BN 0.0001", "BN 0.0001", PURPLE),
    Series("no norm 0.0001", "no norm 0.0001", "#3b3f46"),
]

# Read off the paper's figure 1: at the end to about 0.2 points, else to about 0.5. The queries of the claims about
# training accuracy have these numbers, too.
AT_THE_END = dict(zip(FIG_1, [0.933, 0.904, 0.813, 0.820], strict=True))
BEFORE_THE_DROP = dict(zip(FIG_1, [0.873, 0.889, 0.808, 0.810], strict=True))
IN_TRAINING = dict(
    zip(
        FIG_1,
        [(0.845, 0.906, 0.938), (0.983, 0.994, 0.997), (0.807, 0.919, 0.986), (0.747, 0.855, 0.951)],
        strict=True,
    )
)
PAPER_TEST = [PaperPoint(line, 0.5, y, Standing.DIGITISED) for line, y in BEFORE_THE_DROP.items()] + [
    PaperPoint(line, 1.0, y, Standing.DIGITISED) for line, y in AT_THE_END.items()
]
PAPER_TRAIN = [
    PaperPoint(line, x, y, Standing.DIGITISED)
    for line, accuracies in IN_TRAINING.items()
    for x, y in zip((0.1, 0.2, 0.4), accuracies, strict=True)
]


def band(paper: float, points: float) -> tuple[float, float]:
    """So many percentage points either way."""
    return round(paper - points / 100, 4), round(paper + points / 100, 4)


def where(line: str) -> dict[str, Any]:
    kind, lr = FIG_1[line]
    return {"kind": kind, "lr": lr}


def said(line: str) -> str:
    kind, lr = FIG_1[line]
    return f"{'Batch norm' if kind == EVERY else 'No norm'}, rate {f'{lr:f}'.rstrip('0')}"


def at_the_end(line: str) -> Claim:
    small = FIG_1[line][1] == 1e-4
    return Claim(
        sentence=f"{said(line)}, CIFAR-10: test accuracy.",
        source="Bjorck et al. 2018, figure 1",
        query="accuracy_on_cifar10",
        row=where(line),
        paper=AT_THE_END[line],
        unit="%",
        band=band(AT_THE_END[line], 3 if small else 1.5),
        reason="0.2 points for reading the figure; 5,000 of 50,000 training images are held out, and epochs, weight "
        "decay and initial weights are from memory. "
        + (
            "At this rate training is far from its end: a tenth fewer updates counts, and the paper's band is 1.2 "
            "points either way: 3 points."
            if small
            else "1.5 points in all."
        ),
        standing=Standing.DIGITISED,
        needs=3,
    )


def before_the_drop(line: str) -> Claim:
    return Claim(
        sentence=f"{said(line)}, CIFAR-10: test accuracy before the rate drops at half of the training.",
        source="Bjorck et al. 2018, figure 1",
        query="before_the_drop_on_cifar10",
        row=where(line),
        paper=BEFORE_THE_DROP[line],
        unit="%",
        band=band(BEFORE_THE_DROP[line], 3),
        reason="At a constant rate the accuracy of one epoch lies a point or two off the next one's; 0.5 for reading "
        "the figure, and the protocol is partly from memory: 3 points.",
        standing=Standing.DIGITISED,
        needs=3,
    )


def in_training(line: str) -> Claim:
    numbers = ", ".join(f"{100 * each:g}" for each in IN_TRAINING[line])
    return Claim(
        sentence=f"{said(line)}, CIFAR-10: training accuracy {numbers} % after 10, 20, 40 % of training (largest "
        "difference).",
        source="Bjorck et al. 2018, figure 1",
        query="off_the_training_curve_on_cifar10",
        row=where(line),
        paper=0,
        unit="pt",
        band=(0.0, 0.04),
        reason="0.5 points for reading the figure; that the paper's images were augmented when it counted, or not, is "
        "not known, and is worth some points: 4. Where a curve climbs, a tenth fewer updates is worth as much.",
        standing=Standing.DIGITISED,
        needs=3,
    )


def larger_rate(kind: str, sentence: str, source: str, standing: Standing, paper: str) -> Claim:
    return Claim(
        sentence=sentence,
        source=source,
        query="rate_gain",
        row={"kind": kind},
        paper=None,
        unit="decades",
        band=(0.47, math.inf),
        reason="The rates stand half a decade apart (a factor of 3 or 3.3), so one step on average over the seeds is "
        "the least that the grid can tell from none. A seed that trains at the largest rate tried with the norm makes "
        f"the number a lower bound. {paper}",
        standing=standing,
        needs=3,
    )


NO_NUMBER = "The reviewer asks and the paper has no number."

CLAIMS = [
    larger_rate(
        EVERY,
        "With batch normalization larger rates train than without.",
        "Bjorck et al. 2018, section 2",
        Standing.FOUND,
        "At 110 layers the paper's normal rates are 0.1 and 0.0001, 3 decades apart; fewer layers tolerate larger "
        "rates without norms.",
    ),
    Claim(
        sentence="Batch normalization at its best rate beats no norm at its own.",
        source="Bjorck et al. 2018, figure 1",
        query="gain_at_the_best_rate",
        paper=0.113,
        unit="pt",
        band=(0.032, math.inf),
        reason="The paper gains 93.3 - 82.0 = 11.3 points on CIFAR-10 at 110 layers; data and depths differ, so its "
        "size does not count. Twice what one seed's test images leave uncertain: of 360 at 90 % the standard error is "
        "1.6 points. Whether seeds alone could make such a gain, the interval beside it says.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="At the best rate without norms, batch normalization brings little (share of that gain).",
        source="Bjorck et al. 2018, figure 1",
        query="share_of_the_gain",
        row={"kind": "batch at the rate of none"},
        paper=-0.06,
        unit="",
        band=(-math.inf, 0.33),
        reason="The paper: (81.3 - 82.0) / 11.3. 'Most or all of the benefit' (a reviewer) comes with the larger rate "
        "if at most a third of it is there without. As a share, it compares data sets with large and small gains; "
        "where the interval of the gain holds zero there are no shares.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="Batch normalization before the classifier alone keeps two thirds of the gain.",
        source="Bjorck et al. 2018, appendix (as summarised)",
        query="share_of_the_gain",
        row={"kind": LAST},
        paper=0.67,
        unit="",
        band=(0.5, 0.83),
        reason="'2/3rds of the overall improvement': nearer to two thirds than to one third or to all of it.",
        standing=Standing.FOUND,
        needs=3,
    ),
    larger_rate(
        LAST,
        "Batch normalization before the classifier alone allows larger rates than no norm.",
        "Bjorck et al. 2018, appendix",
        Standing.MEMORY,
        "At 110 layers the paper's rate is 0.03, from memory, where without norms it is 0.0001: 2.5 decades.",
    ),
    Claim(
        sentence="Without norms, a small rate with a small batch does as well as batch normalization.",
        source="Reviewer 1 of Bjorck et al. 2018, who asks",
        query="small_steps",
        paper=None,
        unit="pt",
        band=(-0.02, math.inf),
        reason="'Comparably': within two points, twice what the mean of a few seeds is uncertain by.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    *(
        larger_rate(
            kind,
            f"{name} allows larger rates than no norm.",
            "Reviewer 3 of Bjorck et al. 2018, who asks",
            Standing.INFERRED,
            NO_NUMBER,
        )
        for kind, name in [
            (Norm.GROUP, "Group norm"),
            (Norm.LAYER, "Layer norm"),
            (Norm.INSTANCE, "Instance norm"),
            (Norm.RENORM, "Batch renormalization"),
        ]
    ),
    Claim(
        sentence="Of these four, those that train at as large a rate as batch normalization come as far (least).",
        source="Reviewer 3 of Bjorck et al. 2018, who asks",
        query="shortfall",
        paper=None,
        unit="pt",
        band=(-0.02, math.inf),
        reason="'Equally well': within two points, twice what the mean of a few seeds is uncertain by. No number "
        "where none of the four trains at as large a rate, or where the largest rate tried decides that. " + NO_NUMBER,
        standing=Standing.INFERRED,
        needs=3,
    ),
    *(at_the_end(line) for line in FIG_1),
    *(before_the_drop(line) for line in FIG_1),
    *(in_training(line) for line in FIG_1),
    Claim(
        sentence="All four fit the training images of CIFAR-10 at the end (the least of them).",
        source="Bjorck et al. 2018, figure 1",
        query="fitted_on_cifar10",
        paper=0.996,
        unit="%",
        band=(0.98, 1.0),
        reason="The paper's four end at 99.6 to 100 %, read to 0.5 points; a tenth fewer updates at the smallest rate: "
        "1.6 points below the least.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="Without norms every rate above 0.0001 diverges, CIFAR-10, 110 layers.",
        source="Bjorck et al. 2018, section 2",
        query="lost_on_cifar10",
        paper=1.0,
        unit="%",
        band=(0.95, 1.0),
        reason="All of them, but for one trial in twenty that is lucky. Counted: trials that diverge and trials that "
        "finish without having trained, once every rate planned from 0.0003 to 0.1 has them.",
        standing=Standing.MEMORY,
        needs=3,
    ),
    Claim(
        sentence="Batch norm on the last layer only, rate 0.03, CIFAR-10: test accuracy.",
        source="Ours, from the paper's appendix and figure 1",
        query="accuracy_on_cifar10",
        row={"kind": LAST, "lr": 0.03},
        paper=0.895,
        unit="%",
        band=band(0.895, 3),
        reason="82.0 + 2/3 of 11.3; the rate is from memory, and 'about 2/3' may be a quarter of 11.3 off: 3 points.",
        standing=Standing.INFERRED,
        needs=3,
    ),
]


def over_training(query: str, which: str, paper: list[PaperPoint]) -> Figure:
    return Figure(
        title=f"{which.capitalize()} accuracy over training",
        query=query,
        caption=f"{which.capitalize()} accuracy: the paper's rates, and the rates that are best with batch "
        "normalization and without on held-out training images; lines are means over seeds that have not diverged by "
        "then, bands 95 % intervals. Hollow points: the paper, ResNet-110 on CIFAR-10.",
        draw=curves(
            x="share",
            y="accuracy",
            series="line",
            styles=LINE_STYLES,
            xlabel="share of training",
            ylabel=f"{which} accuracy",
            unit="%",
            scale=Scale.LINEAR,
            along=Along.TIME,
            low="low",
            high="high",
            ylim=(0, 1),
            paper=paper,
            chance=0.1,
        ),
        source="Bjorck et al. 2018, figure 1",
    )


FIGURES = [
    over_training("test_over_training", "test", PAPER_TEST),
    over_training("train_over_training", "training", PAPER_TRAIN),
    Figure(
        title="Accuracy over learning rate",
        query="accuracy_over_rate",
        caption="Test accuracy at the end; lines are means over the seeds that finished. Crosses: the share of "
        "seeds that diverged.",
        draw=curves(
            x="lr",
            y="accuracy",
            series="kind",
            styles=STYLES,
            xlabel="learning rate",
            ylabel="test accuracy",
            unit="%",
            scale=Scale.LOG,
            along=Along.GRID,
            ylim=(0, 1),
            chance=0.1,
            diverged="diverged",
        ),
        source="Bjorck et al. 2018, section 2; reviewer 3",
    ),
    Figure(
        title="Largest rate that trains",
        query="largest_rate",
        caption="The largest rate at which a seed trains, geometric mean with a 95 % interval over the seeds that "
        "train at any (not_found counts the others). Where a seed trains at the largest rate tried (at_top counts "
        "them), the bar says that it is at least so large. A trial trains if it finishes, its training loss ends below "
        "where it began, and it has twice as many training images right as chance; accuracy alone would count rates "
        "that drive the loss up.",
        draw=bars(
            x="batch",
            y="rate",
            series="kind",
            styles=STYLES,
            xlabel="batch size",
            ylabel="largest rate",
            unit="",
            low="rate_low",
            high="rate_high",
            yscale=Scale.LOG,
        ),
        source="Bjorck et al. 2018, section 2; reviewer 3",
    ),
    Figure(
        title="Accuracy over batch size",
        query="accuracy_over_batch",
        caption="Test accuracy at the rate that is best on held-out training images among those that all batch sizes "
        "were tried at; means over seeds, 95 % intervals. Small batches take more steps: all see as many images.",
        draw=curves(
            x="batch",
            y="accuracy",
            series="kind",
            styles=BATCH_STYLES,
            xlabel="batch size",
            ylabel="test accuracy",
            unit="%",
            scale=Scale.LOG,
            along=Along.GRID,
            low="low",
            high="high",
            chance=0.1,
            diverged="diverged",
        ),
        source="Bjorck et al. 2018, section 2.1 and appendix; reviewer 1",
    ),
]


def compared(rates: list[float], batch: int) -> list[dict[str, Any]]:
    """Every norm over the same rates."""
    norms = [Norm.BATCH, Norm.NONE, Norm.LAYER, Norm.GROUP, Norm.INSTANCE, Norm.RENORM]
    everywhere = grid(norm=norms, placement=[Placement.EVERY], batch=[batch], lr=rates)
    return everywhere + grid(norm=[Norm.BATCH], placement=[Placement.LAST], batch=[batch], lr=rates)


def batches(sizes: list[int], normed: list[float], without: list[float]) -> list[dict[str, Any]]:
    """Batch normalization and none, each over its own rates, at other batch sizes."""
    every = [Placement.EVERY]
    return [
        cell
        for size in sizes
        for cell in grid(norm=[Norm.BATCH], placement=every, batch=[size], lr=normed)
        + grid(norm=[Norm.NONE], placement=every, batch=[size], lr=without)
    ]


# On a laptop: the rates that every norm is tried at. A norm with which a seed trains at the largest of them is tried
# above it, up to a rate at which no seed trains, lest the end of the rates decide what its largest is. The lowest are
# left to the networks without norms, which are best there, and to what is compared with them at their rate.
SHARED = [0.003, 0.01, 0.03, 0.1, 0.3]

# What the norms of the grid are given, where they have a use for it; a batch statistic is always of the whole batch.
GIVEN = RENORM | {"groups": 8, "norm_batch": Same("batch"), "trainable": Trainable.ALL}

study = Study(
    name="bjorck_learning_rate",
    doc=__doc__,
    paper=Preset(
        fixed=BJORCK_CIFAR | GIVEN,
        scientific=compared([1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3], batch=128)
        + batches([8, 16, 32, 64, 256, 512], [3e-3, 1e-2, 3e-2, 0.1, 0.3], [1e-5, 3e-5, 1e-4, 3e-4]),
        nuisance=[{}],
        seeds=range(5),
        note="5,000 of the 50,000 training images are held out to choose each norm's best rate; the paper trains on "
        "all of them. Epochs, weight decay and initial weights are from memory. Group norm has 8 groups; what sets "
        "batch renormalization free is a share of training.",
    ),
    laptop=Preset(
        fixed=BJORCK_DIGITS | GIVEN,
        scientific=grid(norm=[Norm.NONE], placement=[Placement.EVERY], batch=[48], lr=[3e-4, 0.001, *SHARED])
        + grid(norm=[Norm.BATCH], placement=[Placement.EVERY], batch=[48], lr=[3e-4, 0.001, *SHARED, 1.0, 3.0, 10.0])
        + grid(norm=[Norm.BATCH], placement=[Placement.LAST], batch=[48], lr=[0.001, *SHARED, 1.0])
        + grid(norm=[Norm.RENORM], placement=[Placement.EVERY], batch=[48], lr=[*SHARED, 1.0, 3.0])
        + grid(norm=[Norm.INSTANCE], placement=[Placement.EVERY], batch=[48], lr=[*SHARED, 1.0])
        + grid(norm=[Norm.LAYER, Norm.GROUP], placement=[Placement.EVERY], batch=[48], lr=SHARED)
        + batches([12, 192], [0.03], [0.001, 0.003]),
        nuisance=[{}],
        seeds=range(3),
        note="This preset trains 20 layers on scikit-learn's digits (8x8 pixels, 1,200 training images), not the "
        "paper's 110 on CIFAR-10, for 6 epochs, and from He's weights, so that they explode without norms as the "
        "paper's do: it asks for the paper's trends, not for its numbers. From Glorot's weights "
        "(--set weight_init=glorot_normal) 20 layers do not explode.",
    ),
    probes={curve: EPOCH},
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
