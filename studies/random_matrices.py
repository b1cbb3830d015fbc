"""How ill-conditioned is a deep network before it learns? Products of random matrices, with and without norms.

After Bjorck, Gomes, Selman & Weinberger, "Understanding Batch Normalization" (arXiv:1806.02375), section 4: a network
without its nonlinearities is at initialisation a product of random matrices.

Question     How do the singular values of a product of M Gaussian N x N matrices spread with M, and what does batch
             normalization between the factors change?
Prediction   They blow up towards the origin: the largest reaches sqrt((M+1)^(M+1) / M^M) sqrt(N)^M, ever more lie near
             zero, and the condition number grows with every factor. Batch normalization resets the scale.
Refuted by   a condition number that stays, or a largest singular value off the theory by more than N = 1000 explains.
Cost         Nothing is trained. Paper preset, N = 1000 and 10 repeats: 2 minutes on 2 CPU cores. Laptop, N = 200:
             half a minute.

    python studies/random_matrices.py plan      trials and disk; starts nothing
    python studies/random_matrices.py           measures what is not yet done, then reports
"""

import math

from recipes import SANTURKAR_LINEAR

from bnscale.probes import END, spectrum, spectrum_histogram
from bnscale.report import Claim, Figure, Standing
from bnscale.report.figures import Along, Scale, Series, curves, histograms
from bnscale.study import Preset, Study, grid
from bnscale.trial import Norm, Trainable, WeightInit

STYLES = [Series(Norm.NONE, "no norm", "#3b3f46"), Series(Norm.BATCH, "batch norm between factors", "#c8452f")]

# One matrix has no place for a norm between factors.
FACTORS = grid(depth=[1, 2, 3, 4, 5], norm=[Norm.NONE]) + grid(depth=[2, 3, 4, 5], norm=[Norm.BATCH])

GAUSSIAN = SANTURKAR_LINEAR | {"weight_init": WeightInit.GAUSSIAN, "trainable": Trainable.ALL, "steps": 0}


def largest(factors: int, paper: float) -> Claim:
    return Claim(
        sentence=f"Largest singular value over sqrt(N)^M, M = {factors}, N = 1000.",
        source="Bjorck et al. 2018, figure 8",
        query="largest",
        row={"depth": factors},
        paper=paper,
        unit="",
        band=(round(0.97 * paper, 2), round(1.01 * paper, 2)),
        reason="The edge of the theory for large N, where the figure's supports end (2.0, about 3.1, about 3.8). At "
        "N = 1000 the largest stays below it, by 2 % for 5 factors.",
        standing=Standing.DIGITISED,
        needs=3,
    )


def near_zero(factors: int, paper: float) -> Claim:
    return Claim(
        sentence=f"Of {factors} matrices, singular values in the figure's first bar (below 1/50 of the support).",
        source="Bjorck et al. 2018, figure 8",
        query="near_zero",
        row={"depth": factors},
        paper=paper,
        unit="%",
        band=(round(paper - 0.02, 3), round(paper + 0.02, 3)),
        reason="About 2,150 (M = 3) and 3,800 (M = 5) of 10,000 read off the bar; two points for reading it.",
        standing=Standing.DIGITISED,
        needs=3,
    )


CLAIMS = [
    largest(1, 2.0),
    largest(3, 3.079),
    largest(5, 3.864),
    near_zero(3, 0.215),
    near_zero(5, 0.38),
    Claim(
        sentence="The condition number grows with every factor.",
        source="Bjorck et al. 2018, section 4",
        query="least_growth",
        paper=None,
        unit="decades",
        band=(0.0, math.inf),
        reason="The mean of its decimal logarithm from M to M + 1 factors, where that grows least. The paper argues "
        "that it grows exponentially and its numbers were not recovered.",
        standing=Standing.INFERRED,
        needs=3,
    ),
    Claim(
        sentence="Batch normalization between the factors resets the scale.",
        source="Summary of Bjorck et al. 2018, on random initialization",
        query="growth_of_scale_with_norms",
        paper=None,
        unit="decades",
        band=(-0.3, 0.3),
        reason="Decades by which the largest singular value itself grows with each factor. Without norms it grows by "
        "the root of N: 1.5 decades at N = 1000 and 1.15 at N = 200.",
        standing=Standing.INFERRED,
        needs=3,
    ),
]

FIGURES = [
    Figure(
        title="Singular values of products of Gaussian matrices",
        query="distribution",
        caption="Share of the singular values in each fiftieth of the theory's support, over all repeats; counted in "
        "the root of N for each factor that no norm follows.",
        draw=histograms(
            left="low",
            right="high",
            share="share",
            series="norm",
            styles=STYLES,
            panel="depth",
            panel_title="M = {}",
            xlabel="singular value",
            ylabel="share",
        ),
        source="Bjorck et al. 2018, figure 8",
    ),
    Figure(
        title="Condition number",
        query="condition",
        caption="Decimal logarithm of the largest over the smallest singular value: mean over repeats, 95 % interval.",
        draw=curves(
            x="depth",
            y="condition",
            series="norm",
            styles=STYLES,
            xlabel="matrices",
            ylabel="log10 condition number",
            unit="",
            scale=Scale.LINEAR,
            along=Along.GRID,
            low="low",
            high="high",
        ),
        source="Bjorck et al. 2018, section 4",
    ),
]

study = Study(
    name="random_matrices",
    doc=__doc__,
    paper=Preset(
        fixed=GAUSSIAN | {"width": 1000},
        scientific=FACTORS,
        nuisance=grid(lr=[1e-6]),
        seeds=range(10),
        note="Nothing is trained: the learning rate has no meaning here.",
    ),
    laptop=Preset(
        fixed=GAUSSIAN | {"width": 200},
        scientific=FACTORS,
        nuisance=grid(lr=[1e-6]),
        seeds=range(10),
        note="N = 200, not the paper's 1000: --preset paper takes minutes. Nothing is trained: the learning rate has "
        "no meaning here.",
    ),
    probes={spectrum: END, spectrum_histogram: END},
    claims=CLAIMS,
    figures=FIGURES,
)

if __name__ == "__main__":
    study.main()
