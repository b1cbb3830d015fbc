"""How large a learning rate can a deep network bear, with and without batch normalization?

After Bjorck, Gomes, Selman & Weinberger, "Understanding Batch Normalization" (arXiv:1806.02375), section 4 and
appendix: without norms a deep network's activations and gradients grow with its depth, so its rates must be small.

Question     What is the largest learning rate at which a ResNet trains, and how does it change with depth, with batch
             normalization and without, over initialisations?
Prediction   Without norms it falls with depth. With batch normalization it is larger at every depth, depends on depth
             much less, and depends on the initialisation less.
Refuted by   A largest rate without norms that stays from the shallowest network to the deepest, or one with batch
             normalization that is no larger at some depth.
Method       Bisection over a lattice of rates, each twice the one before, for every network, initialisation and seed.
             A rate trains where the loss stays finite and the network ends with at least twice as many training images
             right as chance has. A network that has died, with all ReLUs at zero, gives every image one class and is
             right by chance at a finite loss of ln 10; one whose loss began in the hundreds may be far above ln 10 and
             learn; so accuracy tells and loss does not. The learning-rate study, which trains to the end of a
             schedule, also asks for a lower loss than at first. A rate can also be too small to train in so few steps,
             and bisection takes each that fails for too large: it goes down, and may step over all that train. Where
             none trains, or none fails, the largest rate was not found; such a search is counted and is in no claim.
Cost         Laptop preset: 168 trials or so of 150 steps in five rounds, 4 minutes on 2 CPU cores. Paper
             preset: at most 720 trials of three epochs, for GPUs; `plan` times a few steps and says how many hours.

    python studies/bjorck_depth.py plan      the next round, and the most trials; starts nothing
    python studies/bjorck_depth.py           trains round after round, then reports
    python studies/bjorck_depth.py status    how far each search is
    python studies/bjorck_depth.py --set lr=0.01,0.1     trains these rates, without a search
"""

import math

from recipes import BJORCK_CIFAR, FRANKLE_DIGITS

from bnscale.probes import END, curve
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import Along, Scale, Series, curves
from bnscale.study import Bisection, Preset, Study, grid
from bnscale.trial import Norm, NormInit, Trainable, WeightInit

# Every preset searches on one lattice, so that they share trials. The paper trains 110 layers without norms at 1e-4
# and with them at 0.1; two decades of room on either side.
RATES = Bisection(axis="lr", low=1e-6, high=10.0, factor=2.0, verdict="trains")

# What both presets ask for: a figure says of all that stands here whether it was measured. Others get a colour too.
STYLES = [
    Series("none, glorot_normal", "none, Glorot", "#8a3324"),
    Series("none, he_normal", "none, He", "#c8452f"),
    Series("none, orthogonal", "none, orthogonal", "#e08a3c"),
    Series("batch, glorot_normal", "batch, Glorot", "#1f3f77"),
    Series("batch, he_normal", "batch, He", "#2f6fb3"),
    Series("batch, orthogonal", "batch, orthogonal", "#56a3c9"),
]

STEP_OF_LATTICE = "A factor of two, one step of the lattice, is 0.3 decades; less than that is not told apart. "

CLAIMS = [
    Claim(
        sentence="Without norms, the deeper the network, the smaller its largest learning rate.",
        source="Summary of Bjorck et al. 2018, on random initialization",
        query="least_effect",
        row={"effect": "fall"},
        paper=None,
        unit="decades",
        band=(0.3, math.inf),
        reason=STEP_OF_LATTICE + "From the shallowest depth to the deepest, for the initialisation with which the rate "
        "falls least. The summary gives the direction; the paper's numbers were not recovered.",
        standing=Standing.FOUND,
        needs=2,
    ),
    Claim(
        sentence="Batch normalization allows a larger learning rate at every depth.",
        source="Bjorck et al. 2018, section 3",
        query="least_effect",
        row={"effect": "lead"},
        paper=None,
        unit="decades",
        band=(0.3, math.inf),
        reason=STEP_OF_LATTICE
        + "At the depth and for the initialisation where the lead is smallest. At 110 layers the "
        "paper trains at 0.1 with batch normalization and at 0.0001 without: three decades.",
        standing=Standing.INFERRED,
        needs=2,
    ),
    Claim(
        sentence="With batch normalization the largest learning rate depends on depth much less.",
        source="Bjorck et al. 2018, section 4",
        query="least_effect",
        row={"effect": "spared fall"},
        paper=None,
        unit="decades",
        band=(0.3, math.inf),
        reason=STEP_OF_LATTICE + "By how much less it falls from the shallowest depth to the deepest, for the "
        "initialisation with which that is least. The paper argues that normalization stops the growth with depth.",
        standing=Standing.INFERRED,
        needs=2,
    ),
    Claim(
        sentence="Without norms the initialisation decides how large a rate the deepest network bears; with batch "
        "normalization it matters less.",
        source="Ours, after Bjorck et al. 2018, section 4, and the works that its reviewers name",
        query="least_effect",
        row={"effect": "spared spread"},
        paper=None,
        unit="decades",
        band=(0.3, math.inf),
        reason=STEP_OF_LATTICE
        + "By how much further apart the largest rates of the initialisations lie without norms, "
        "over the seeds for which every initialisation has one. Reviewers point to works in which orthogonal weights "
        "alone keep a deep network well-conditioned.",
        standing=Standing.INFERRED,
        needs=2,
    ),
]

FIGURES = [
    Figure(
        title="Largest learning rate over depth",
        query="largest_rate",
        caption="The largest learning rate that trains: geometric mean and range over the seeds for which one was "
        "found. A search in which no rate trains, or none fails, found none and is left out; n_not_found counts them.",
        draw=curves(
            x="depth",
            y="rate",
            series="network",
            styles=STYLES,
            xlabel="layers",
            ylabel="largest learning rate",
            unit="",
            scale=Scale.LOG,
            yscale=Scale.LOG,
            along=Along.GRID,
            low="minimum",
            high="maximum",
        ),
        source="Bjorck et al. 2018, appendix; its numbers were not recovered",
    ),
    Figure(
        title="What the bisections saw at the deepest network",
        query="accuracy_at_rates_tried",
        caption="Accuracy on training images at the end of training, at each rate that a search of the deepest network "
        "tried, mean over seeds. From 20 % on a rate counts as one that trains. A trial that diverged has no accuracy.",
        draw=curves(
            x="rate",
            y="accuracy",
            series="network",
            styles=STYLES,
            xlabel="learning rate",
            ylabel="training accuracy",
            unit="%",
            scale=Scale.LOG,
            along=Along.TIME,
            ylim=(0, 1),
            chance=0.1,
        ),
        source="Bjorck et al. 2018, section 3",
    ),
]

NORMS = [Norm.NONE, Norm.BATCH]

study = Study(
    name="bjorck_depth",
    doc=__doc__,
    paper=Preset(
        fixed=BJORCK_CIFAR | {"trainable": Trainable.ALL, "validation": 0, "epochs": 3, "milestones": ()},
        scientific=grid(
            depth=[20, 32, 44, 56, 80, 110],
            norm=NORMS,
            weight_init=[
                WeightInit.GLOROT_NORMAL,
                WeightInit.HE_NORMAL,
                WeightInit.ORTHOGONAL,
                WeightInit.DELTA_ORTHOGONAL,
            ],
        ),
        nuisance=grid(),
        seeds=range(3),
        search=RATES,
        note="The protocol of the paper's appendix on depth was not recovered: data, networks, batch and momentum are "
        "those of its other experiments; three epochs at a constant rate are ours. A longer training may recover from "
        "a rate that a short one does not.",
    ),
    laptop=Preset(
        fixed=FRANKLE_DIGITS
        | {
            "norm_init": NormInit.ONES,
            "weight_decay": 5e-4,
            "trainable": Trainable.ALL,
            "batch": 16,
            "norm_batch": 16,
            "epochs": 2,
            "milestones": (),
        },
        scientific=grid(
            depth=[20, 32, 44],
            norm=NORMS,
            weight_init=[WeightInit.HE_NORMAL, WeightInit.ORTHOGONAL],
        ),
        nuisance=grid(),
        seeds=range(3),
        search=RATES,
        note="This preset trains on scikit-learn's digits (8x8 pixels, 1,200 training images), not on the paper's "
        "CIFAR-10, and for 150 steps of 16 images: it asks whether the paper's trends show. In so few steps a network "
        "with batch normalization may not recover from a rate that it could bear in the long run.",
    ),
    probes={curve: END},
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
