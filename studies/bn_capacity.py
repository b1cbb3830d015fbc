"""Can gamma and beta overfit, and how many labels can they memorise?

After the interim report "Yet Another Batch Norm Analysis" (G42), sections 3, 5 and 6, which plans it; what it builds on
is Frankle, Schwab & Morcos 2021 (arXiv:2003.00152). Random labels are those of Zhang et al. 2017 (arXiv:1611.03530).

Question     Freeze every weight at its random initialisation and train gamma and beta alone. Is there a gap between
             training and test accuracy, how does it grow with depth, and is it that of the same network trained
             whole? Do penalties on gamma and beta close it? Do other initial values help, or fewer of the two? How many
             random labels can gamma and beta memorise, by depth and by their number?
Prediction   BN alone overfits, less than the network trained whole; the gap grows with depth, and each penalty on gamma
             or beta reduces it. BN alone memorises random labels, more of them at each step of depth, and never as
             many as the network trained whole.
Refuted by   a training accuracy of BN only that is not above its test accuracy by more than images and seeds leave
             uncertain, a penalty that leaves the gap as it is, or random labels that stay at chance.
Cost         Laptop: 93 trainings, 4 minutes on 2 CPU cores. Paper preset: 1,782 trainings of 50 to 200 layers for 160
             epochs on three data sets; a cluster.

    python studies/bn_capacity.py plan      trials, hours, memory, disk; starts nothing
    python studies/bn_capacity.py           runs what is not yet done, then reports
    python studies/bn_capacity.py status    the map of cells
    python studies/bn_capacity.py sql changes

Where MNIST, CIFAR-10 or CIFAR-100 cannot be had, `--set data=fashion_mnist`, or any of them that can.
"""

import math
from typing import Any

from recipes import FRANKLE_CIFAR, FRANKLE_DIGITS

from bnscale.probes import EPOCH, curve, only, unless
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, Scale, Series, bars, panels
from bnscale.study import Preset, Study, grid
from bnscale.trial import Affine, Augmentation, Data, NormInit, Placement, Trainable

SETS = [Trainable.BN, Trainable.ALL]
PENALTIES = ["gamma_l1", "gamma_l2", "beta_l1", "beta_l2"]

STYLES = [Series("bn", "BN only", VERMILION), Series("all", "all parameters", "#3b3f46")]
LINE_STYLES = [
    Series("bn train", "BN only, training images", VERMILION),
    Series("bn test", "BN only, test images", ORANGE),
    Series("all train", "all parameters, training images", "#3b3f46"),
    Series("all test", "all parameters, test images", SKY),
]
NOISE_STYLES = [
    Series("bn 1", "BN only, random labels", VERMILION),
    Series("bn 0.5", "BN only, half random", ORANGE),
    Series("bn 0", "BN only, true labels", GREEN),
    Series("all 1", "all parameters, random labels", "#3b3f46"),
    Series("all 0.5", "all parameters, half random", BLUE),
    Series("all 0", "all parameters, true labels", PURPLE),
]

ASKS = "Interim report, section 3, which asks"
NO_NUMBER = "The report asks and has no number."
# Of all differences whose size nobody has foretold.
TWO_ERRORS = (
    "The sign counts, beyond two standard errors: of the seeds, and of the images, which all seeds share, so that more "
    "seeds do not make them fewer. " + NO_NUMBER
)
TO_THE_END = (
    " Only where the networks trained whole have 95 % of the random labels right at every depth: before that, labels "
    "memorised say how fast a network learns."
)


def penalty_claim(penalty: str, what: str) -> Claim:
    return Claim(
        sentence=f"{what} reduces the gap of BN only.",
        source="Interim report, section 6, which asks",
        query="penalties",
        row={"penalty": penalty},
        paper=None,
        unit="standard errors",
        band=(-math.inf, -2.0),
        reason="Of several strengths the one that is best on held-out images; of several data sets the one on which it "
        "reduces the gap least. " + TWO_ERRORS,
        standing=Standing.INFERRED,
        needs=3,
    )


CLAIMS = [
    Claim(
        sentence="BN alone overfits: at the greatest depth its training accuracy is above its test accuracy.",
        source=ASKS,
        query="overfits",
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="Two standard errors, of images and of seeds: the seeds share their images, so that of 360 images at "
        "90 % a gap of 4 points is none however many seeds there are. " + NO_NUMBER,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="The network trained whole has a larger gap than BN only at every depth.",
        source=ASKS,
        query="whole_overfits_more",
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="BN only has about one in two hundred of the parameters. Where the difference is least. " + TWO_ERRORS,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="The gap of BN only grows with depth.",
        source="Interim report, section 6, which asks",
        query="gains_over_the_ladder",
        row={"quantity": "gap"},
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="From the least depth to the greatest. " + TWO_ERRORS,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="The test accuracy of BN only grows with depth.",
        source="Frankle et al. 2021, figure 2",
        query="gains_over_the_ladder",
        row={"quantity": "test"},
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="The paper gains 34 points from 14 to 866 layers on CIFAR-10; data and ladders differ, so any gain "
        "counts that is above two standard errors, of seeds and of images.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    penalty_claim("gamma_l1", "A penalty on |gamma|"),
    penalty_claim("gamma_l2", "A penalty on gamma squared"),
    penalty_claim("beta_l1", "A penalty on |beta|"),
    penalty_claim("beta_l2", "A penalty on beta squared"),
    Claim(
        sentence="The change of batch norm that is best on held-out images improves BN-only test accuracy.",
        source=ASKS,
        query="best_change",
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="Chosen on held-out images and measured on test images. " + TWO_ERRORS,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="Gamma trained alone comes further than beta trained alone.",
        source="Interim report, section 6, which asks",
        query="gamma_over_beta",
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="Frankle et al. find that BN-only training uses gamma to turn features off; of beta alone nothing was "
        "recovered. " + TWO_ERRORS,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="BN alone memorises random labels at the greatest depth (share of them beyond chance).",
        source=ASKS,
        query="memorises",
        paper=None,
        unit="pt",
        band=(0.07, math.inf),
        reason="Whoever gives all images the class that is most frequent among 240 random labels is 3.2 points above "
        "chance, and so few images leave 1.9 uncertain: 3.2 and twice 1.9. " + NO_NUMBER,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="The labels that BN only memorises grow at every step of depth.",
        source=ASKS,
        query="memorised_steps",
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="At the step at which they grow least. " + TWO_ERRORS + TO_THE_END,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="The deepest BN-only network memorises more random labels than the shallowest (share of them).",
        source=ASKS,
        query="memorised_gain",
        paper=None,
        unit="pt",
        band=(0.055, math.inf),
        reason="Twice the 2.7 points that two times 240 images leave uncertain at chance. " + NO_NUMBER + TO_THE_END,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="The network trained whole memorises more random labels than BN only at every depth.",
        source=ASKS,
        query="whole_memorises_more",
        paper=None,
        unit="standard errors",
        band=(2.0, math.inf),
        reason="It can do all that BN only can. Where the difference is least. " + TWO_ERRORS + TO_THE_END,
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="200 layers trained whole fit the random labels of CIFAR-10 (training accuracy).",
        source="Zhang et al. 2017, table 1",
        query="fitted_on_cifar10",
        paper=1.0,
        unit="%",
        band=(0.98, 1.0),
        reason="Their networks reach 99 to 100 % without augmentation and weight decay; here is weight decay, and "
        "another schedule: two points below.",
        standing=Standing.MEMORY,
        needs=3,
    ),
]


def memorised(title: str, query: str, x: str, xlabel: str, xscale: Scale, styles: list[Series]) -> Figure:
    return Figure(
        title=title,
        query=query,
        caption="Training labels that are right beyond what the same network would have right of as many images that "
        "it never saw, with labels as noisy: on random labels accuracy above chance times training images, on true "
        "labels the gap times these. Lines are means over seeds, bands 95 % intervals.",
        draw=panels(
            x=x,
            y="labels",
            series="line",
            styles=styles,
            panel="data_title",
            xlabel=xlabel,
            ylabel="labels memorised",
            unit="",
            xscale=xscale,
            yscale=Scale.LINEAR,
            low="low",
            high="high",
            band="95 % interval",
            level=0.0,
        ),
        source="Ours; random labels as Zhang et al. 2017, section 2.2",
    )


FIGURES = [
    Figure(
        title="Generalisation gap over depth",
        query="gap_by_depth",
        caption="Training accuracy less test accuracy of one network at the end of its training, in evaluation mode, "
        "on images without augmentation. Lines are means over seeds, bands 95 % intervals over seeds.",
        draw=panels(
            x="depth",
            y="points",
            series="kind",
            styles=STYLES,
            panel="data_title",
            xlabel="layers",
            ylabel="training less test accuracy",
            unit="pt",
            xscale=Scale.LINEAR,
            yscale=Scale.LINEAR,
            low="low",
            high="high",
            band="95 % interval",
            level=0.0,
        ),
        source="Interim report, section 6",
    ),
    Figure(
        title="Accuracy over training",
        query="over_training",
        caption="Training and test accuracy of the same networks at the same steps. Lines are means over seeds, bands "
        "95 % intervals.",
        draw=panels(
            x="share",
            y="accuracy",
            series="line",
            styles=LINE_STYLES,
            panel="panel",
            xlabel="share of training",
            ylabel="accuracy",
            unit="%",
            xscale=Scale.LINEAR,
            yscale=Scale.LINEAR,
            low="low",
            high="high",
            band="95 % interval",
            ylim=(0, 1),
        ),
        source="Interim report, section 6",
    ),
    Figure(
        title="Generalisation gap by change of batch norm",
        query="gap_by_change",
        caption="Gap of BN only, a mean over depths, with 95 % intervals over seeds. A number behind a penalty is its "
        "strength.",
        draw=bars(
            x="change",
            y="points",
            series="data_title",
            styles=[],
            xlabel="",
            ylabel="training less test accuracy",
            unit="pt",
            low="low",
            high="high",
        ),
        source="Interim report, section 6",
    ),
    Figure(
        title="Test accuracy by change of batch norm",
        query="test_by_change",
        caption="What each change adds to the test accuracy of BN only, seed by seed and as a mean over depths, with "
        "95 % intervals over seeds.",
        draw=bars(
            x="change",
            y="points",
            series="data_title",
            styles=[],
            xlabel="",
            ylabel="test accuracy gained",
            unit="pt",
            low="low",
            high="high",
        ),
        source="Interim report, section 6",
    ),
    memorised("Labels memorised over depth", "memorised_by_depth", "depth", "layers", Scale.LINEAR, NOISE_STYLES),
    memorised(
        "Labels memorised over trained parameters",
        "memorised_by_parameters",
        "parameters",
        "parameters that train",
        Scale.LOG,
        [each for each in NOISE_STYLES if not each.key.endswith(" 0")],
    ),
]


def changes(strengths: list[float], starts: list[NormInit], places: list[Placement]) -> list[dict[str, Any]]:
    """What BN only is changed by, one thing at a time: penalties, initial values, fewer gammas and betas."""
    return (
        [cell for penalty in PENALTIES for cell in grid(trainable=[Trainable.BN], **{penalty: strengths})]
        + grid(trainable=[Trainable.BN], norm_init=starts)
        + grid(trainable=[Trainable.BN], affine_at=places)
        # Without beta would be gamma trained alone once more: where beta starts at 0, the two are one network.
        + grid(trainable=[Trainable.BN], affine=[Affine.BETA])
        + grid(trainable=[Trainable.GAMMA, Trainable.BETA])
    )


# So few images that the network trained whole knows every label at the end, whatever it is.
FEW_AND_LONG: dict[str, Any] = {"validation": [1197], "epochs": [64]}
STARTS = [NormInit.ONES, NormInit.ONES_ONES, NormInit.SYMMETRIC, NormInit.NORMAL]
NOISES = [0.0, 0.5, 1.0]

study = Study(
    name="bn_capacity",
    doc=__doc__,
    paper=Preset(
        fixed=FRANKLE_CIFAR,
        scientific=[
            at | cell
            for at in grid(data=[Data.MNIST, Data.CIFAR10, Data.CIFAR100], depth=[50, 152, 200])
            for cell in grid(trainable=SETS)
            + changes([1e-4, 1e-3], STARTS, [Placement.EVERY_2, Placement.EVERY_5, Placement.STAGE_ENDS])
            # Random labels say nothing of which rate is best: the report's own. Moved and mirrored images would be
            # several to memorise for each label (Zhang et al. 2017 leave augmentation out, too).
            + grid(trainable=SETS, label_noise=NOISES, augmentation=[Augmentation.NONE], lr=[0.1])
        ],
        nuisance=grid(lr=[0.03, 0.1, 0.3]),
        seeds=range(3),
        note="5,000 training images are held out to choose the learning rate of true labels; the report trains on all "
        "of them at 0.1 (--set validation=0 --set lr=0.1). Its section 5 mirrors all images, and so the digits of "
        "MNIST here. Networks on random labels, and those compared with them, see images without augmentation, at 0.1.",
    ),
    laptop=Preset(
        fixed=FRANKLE_DIGITS | {"lr": 0.1},
        scientific=grid(depth=[8, 14, 26], trainable=SETS, label_noise=[0.0])
        + grid(depth=[8, 14, 26], trainable=SETS, label_noise=[0.5, 1.0], **FEW_AND_LONG)
        + [
            at | cell
            for at in grid(depth=[14])
            for cell in changes([1e-3], STARTS, [Placement.EVERY_2, Placement.STAGE_ENDS])
        ],
        nuisance=grid(validation=[237], epochs=[16]),
        seeds=range(3),
        note="This preset trains on scikit-learn's digits (8x8 pixels, 1,200 training images) without augmentation, "
        "for 16 epochs at the report's one rate, 0.1; batch norm is changed at 14 layers. It asks for trends. "
        "Held-out images choose among changes. Accuracy is of 360 training and 360 test images. Noisy labels are "
        "those of 240 images, learned for 64 epochs, about as many steps: of 1,200 in so few the network trained whole "
        "has not learned all either, and speed would be counted for capacity. 240 bound what can be memorised.",
    ),
    probes={only(curve, label_noise=[0.0]): 2 * EPOCH, unless(curve, label_noise=[0.0]): 16 * EPOCH},
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
