"""How far can BatchNorm alone carry a deep network?

After Frankle, Schwab & Morcos, "Training BatchNorm and Only BatchNorm" (arXiv:2003.00152, v3, ICLR 2021).

Question     Freeze every weight at its random initialisation and train only gamma and beta. How does test
             accuracy grow with depth, and with width, beside the same network trained whole, with two random
             weights a channel trained instead, and with its output layer alone trained?
Prediction   It grows at every step of the depth ladder, faster than with width, and reaches 82 % on CIFAR-10
             at 866 layers; it stays far above as many random weights; about a third of the gammas end
             near zero, and setting those to zero changes nothing.
Refuted by   A BN-only curve that falls between two depths by more than its seeds spread, or random weights that
             come as far.

    python studies/frankle_depth.py plan      trials, hours, memory, disk; starts nothing
    python studies/frankle_depth.py           runs what is not yet done, then reports
    python studies/frankle_depth.py status    the map of cells
    python studies/frankle_depth.py sql accuracy_over_depth
"""

import math

from recipes import FRANKLE_CIFAR, FRANKLE_DIGITS

from bnscale.probes import END, EPOCH, clamp, curve, gamma, gamma_histogram, sparsity
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import Along, PaperPoint, Scale, Series, bands, bars, curves, histograms
from bnscale.study import Preset, Study, grid
from bnscale.trial import Trainable

DEPTHS = [14, 32, 56, 110, 218, 434, 866]
WIDTHS = [1, 2, 4, 8, 16, 32]
SETS = [
    Trainable.ALL,
    Trainable.BN,
    Trainable.BN_OUTPUT,
    Trainable.BN_SHORTCUT_OUTPUT,
    Trainable.SHORTCUT_OUTPUT,
    Trainable.OUTPUT,
    Trainable.TWO_PER_CHANNEL,
    Trainable.NONE,
]

STYLES = [
    Series(Trainable.ALL, "all parameters", "#3b3f46"),
    Series(Trainable.BN, "BN only", "#c8452f"),
    Series(Trainable.BN_OUTPUT, "BN + output", "#e08a3c"),
    Series(Trainable.BN_SHORTCUT_OUTPUT, "BN + shortcut + output", "#b99a1d"),
    Series(Trainable.SHORTCUT_OUTPUT, "shortcut + output", "#3f8f5f"),
    Series(Trainable.TWO_PER_CHANNEL, "two weights a channel", "#2f6fb3"),
    Series(Trainable.OUTPUT, "output only", "#7d5ba6"),
    Series(Trainable.NONE, "none", "#9aa0a8"),
]
GAMMA_STYLES = [each for each in STYLES if each.key in ("all", "bn", "bn_output", "bn_shortcut_output")]


def points(series: Trainable, at: list[int], per_cent: list[float]) -> list[PaperPoint]:
    """Numbers read off the paper's figures, to about 0.4 points where a curve is free and 1.5 where it is not."""
    return [PaperPoint(series, x, y / 100, Standing.DIGITISED) for x, y in zip(at, per_cent, strict=True)]


# CIFAR-10 test accuracy in v1 of the paper, read off its figure by digitising. BN only at 866 layers is hidden
# there; the abstracts say 83 % (v1) and 82 % (v2, v3).
PAPER_DEPTH = [
    *points(Trainable.ALL, DEPTHS, [90.4, 92.2, 93.1, 93.4, 93.4, 92.9, 92.8]),
    *points(Trainable.BN, DEPTHS[:-1], [47.7, 57.6, 62.9, 69.7, 75.6, 79.7]),
    PaperPoint(Trainable.BN, 866, 0.82, Standing.FOUND),
    *points(Trainable.BN_SHORTCUT_OUTPUT, DEPTHS, [63.2, 66.7, 71.1, 74.7, 78.8, 80, 81.9]),
    *points(Trainable.SHORTCUT_OUTPUT, DEPTHS, [48.9, 45.7, 42.4, 19.2, 17.2, 12.9, 13.2]),
    *points(Trainable.NONE, DEPTHS, [10.6, 10.2, 10.9, 10.4, 10.0, 10.4, 10.1]),
]
PAPER_WIDTH = [
    *points(Trainable.ALL, WIDTHS, [90.4, 93.0, 94.1, 94.8, 95.1, 95.2]),
    *points(Trainable.SHORTCUT_OUTPUT, WIDTHS, [49.2, 58.1, 66.1, 73.1, 77.4, 79.6]),
    *points(Trainable.NONE, WIDTHS, [10.6, 10.4, 9.4, 10.1, 10.1, 9.6]),
]

CLAIMS = [
    Claim(
        sentence="BN-only accuracy grows at every step of the depth ladder.",
        source="Frankle et al. 2021, figure 2",
        query="steps_that_fall",
        paper=0,
        unit="",
        band=(0, 0),
        reason="Counts the steps between two depths at which the mean falls by more than the spread of the seeds "
        "(half the range at either depth, added up). The paper's curve has none.",
        standing=Standing.DIGITISED,
        needs=2,
    ),
    Claim(
        sentence="The deepest BN-only network is well above the shallowest.",
        source="Frankle et al. 2021, figure 2",
        query="gain_over_the_ladder",
        paper=None,
        unit="pt",
        band=(0.02, math.inf),
        reason="The paper gains 34 points from 14 to 866 layers on CIFAR-10. Data sets and ladders differ, so any gain "
        "of the means above 2 points counts; whether seeds alone could make it, the interval beside it says.",
        standing=Standing.INFERRED,
        needs=2,
    ),
    Claim(
        sentence="At every depth BN only is far above as many random weights.",
        source="Frankle et al. 2021, section 4",
        query="lead_over_random_weights",
        paper=None,
        unit="pt",
        band=(0.1, math.inf),
        reason="The paper's abstract says 'far higher' and its numbers were not recovered; ten points at the depth "
        "where the lead is smallest is a far cry.",
        standing=Standing.MEMORY,
        needs=2,
    ),
    Claim(
        sentence="Training every parameter beats BN only at every depth.",
        source="Frankle et al. 2021, figure 2",
        query="lead_of_all",
        paper=None,
        unit="pt",
        band=(0.0, math.inf),
        reason="The paper's two curves never meet: the lead is 43 points at 14 layers and 11 at 866.",
        standing=Standing.DIGITISED,
        needs=2,
    ),
    Claim(
        sentence="BN only, 866 layers, CIFAR-10.",
        source="Frankle et al. 2021, abstract (v3)",
        query="accuracy_on_cifar10",
        row={"trainable": Trainable.BN, "depth": 866},
        paper=0.82,
        unit="%",
        band=(0.80, 0.85),
        reason="v1 says 83 % and v3 82 %; 5,000 of the 50,000 training images are held out here.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="BN only, 110 layers, CIFAR-10.",
        source="Frankle et al. 2020 (v1), figure",
        query="accuracy_on_cifar10",
        row={"trainable": Trainable.BN, "depth": 110},
        paper=0.697,
        unit="%",
        band=(0.667, 0.727),
        reason="Three points: one for the seeds, two for 5,000 training images held out and a tuned rate.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="BN only, 14 layers, CIFAR-10.",
        source="Frankle et al. 2020 (v1), figure",
        query="accuracy_on_cifar10",
        row={"trainable": Trainable.BN, "depth": 14},
        paper=0.477,
        unit="%",
        band=(0.447, 0.507),
        reason="Three points: 1.5 for reading a partly covered curve, the rest for seeds and held-out images.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="All parameters, 14 layers, CIFAR-10.",
        source="Frankle et al. 2020 (v1), figure",
        query="accuracy_on_cifar10",
        row={"trainable": Trainable.ALL, "depth": 14},
        paper=0.904,
        unit="%",
        band=(0.889, 0.919),
        reason="1.5 points: 0.4 for reading the curve, the rest for seeds and held-out images.",
        standing=Standing.DIGITISED,
        needs=3,
    ),
    Claim(
        sentence="BN-only training ends with about a third of the gammas near zero (|gamma| < 0.01), CIFAR-10.",
        source="Frankle et al. 2021, abstract and section 5",
        query="dead_gammas",
        paper=0.33,
        unit="%",
        band=(0.2, 0.5),
        reason="v1 says a quarter to a third and 27 % for ResNet-110; v3 'around a third'. Measured at the deepest "
        "network of 110 layers or more.",
        standing=Standing.FOUND,
        needs=3,
    ),
    Claim(
        sentence="Setting every |gamma| < 0.01 to zero changes BN-only test accuracy by less than half a point.",
        source="Frankle et al. 2021, section 5",
        query="clamping",
        paper=0.005,
        unit="pt",
        band=(0.0, 0.005),
        reason="The paper's own bound, as remembered. Measured: the largest change, as a mean over seeds, at any depth "
        "at which at least 5 % of the gammas were that small; where fewer are, setting them to zero says little.",
        standing=Standing.MEMORY,
        needs=2,
    ),
]

FIGURES = [
    Figure(
        title="Accuracy over depth",
        query="accuracy_over_depth",
        caption="Test accuracy at the end of training; learning rate chosen on held-out training images; lines are "
        "means over seeds, bands 95 % intervals. Hollow points: the paper, on CIFAR-10.",
        draw=curves(
            x="depth",
            y="accuracy",
            series="trainable",
            styles=STYLES,
            xlabel="layers",
            ylabel="test accuracy",
            unit="%",
            scale=Scale.LOG,
            along=Along.GRID,
            low="low",
            high="high",
            ylim=(0, 1),
            paper=PAPER_DEPTH,
            chance=0.1,
            diverged="diverged",
        ),
        source="Frankle et al. 2021, figure 2 left; points from v1",
    ),
    Figure(
        title="Accuracy over width at 14 layers",
        query="accuracy_over_width",
        caption="As above, at 14 layers and growing width (1 is 16 channels in the first stage).",
        draw=curves(
            x="width",
            y="accuracy",
            series="trainable",
            styles=STYLES,
            xlabel="width",
            ylabel="test accuracy",
            unit="%",
            scale=Scale.LOG,
            along=Along.GRID,
            low="low",
            high="high",
            ylim=(0, 1),
            paper=PAPER_WIDTH,
            chance=0.1,
            diverged="diverged",
        ),
        source="Frankle et al. 2021, figure 2 right; points from v1",
    ),
    Figure(
        title="Distribution of |gamma| after training",
        query="gamma_distribution",
        caption="Share of all gammas in each interval of 0.05, mean over seeds. All start uniform on [0, 1].",
        draw=histograms(
            left="low",
            right="high",
            share="share",
            series="trainable",
            styles=GAMMA_STYLES,
            panel="depth",
            panel_title="ResNet-{}",
            xlabel="|gamma|",
            ylabel="share of gammas",
            mark=0.01,
        ),
        source="Frankle et al. 2021, figure 5",
    ),
    Figure(
        title="|gamma| by layer",
        query="gamma_by_layer",
        caption="Quantiles of |gamma| over the channels of each norm layer after training, mean over seeds; the stem "
        "is on the left.",
        draw=bands(
            x="layer_index",
            quantiles=("q05", "q25", "q50", "q75", "q95"),
            series="trainable",
            styles=GAMMA_STYLES,
            panel="depth",
            panel_title="ResNet-{}",
            xlabel="norm layer",
            ylabel="|gamma|",
            unit="",
        ),
        source="Frankle et al. 2021, section 5",
    ),
    Figure(
        title="Gammas near zero",
        query="dead_by_depth",
        caption="Share of gammas with |gamma| < 0.01 after training.",
        draw=bars(
            x="depth",
            y="dead",
            series="trainable",
            styles=GAMMA_STYLES,
            xlabel="layers",
            ylabel="|gamma| < 0.01",
            unit="%",
            low="low",
            high="high",
        ),
        source="Frankle et al. 2021, figure 6",
    ),
    Figure(
        title="Sparsity of activations",
        query="sparsity_by_layer",
        caption="Share of ReLU outputs that are exactly zero on test images after training, by ReLU from the stem to "
        "the output; deepest network, mean and range over seeds.",
        draw=curves(
            x="layer_index",
            y="zero",
            series="trainable",
            styles=STYLES,
            xlabel="ReLU",
            ylabel="outputs that are zero",
            unit="%",
            scale=Scale.LINEAR,
            along=Along.TIME,
            low="low",
            high="high",
            ylim=(0, 1),
        ),
        source="Frankle et al. 2021, section 5",
    ),
]

study = Study(
    name="frankle_depth",
    doc=__doc__,
    paper=Preset(
        fixed=FRANKLE_CIFAR | {"depth": 14},
        scientific=grid(depth=DEPTHS, trainable=SETS) + grid(width=WIDTHS, trainable=SETS),
        nuisance=grid(lr=[0.01, 0.03, 0.1, 0.3]),
        seeds=range(5),
        note="5,000 of the 50,000 training images are held out to choose the learning rate; the paper trains on all of "
        "them at rate 0.1. The paper's numbers by depth and width are those of version 1, read off its figures.",
    ),
    laptop=Preset(
        fixed=FRANKLE_DIGITS,
        scientific=grid(
            depth=[8, 14, 32, 56],
            trainable=[Trainable.BN, Trainable.ALL, Trainable.TWO_PER_CHANNEL, Trainable.OUTPUT],
        ),
        nuisance=grid(lr=[0.1, 0.3]),
        seeds=range(3),
        note="This preset trains on scikit-learn's digits (8x8 pixels, 1,200 training images), not on the paper's "
        "CIFAR-10, and for 6 epochs: it asks whether the paper's trends show, not whether its numbers do.",
    ),
    probes={curve: EPOCH, gamma: END, gamma_histogram: END, clamp: END, sparsity: END},
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
