"""The numbers of the study of Bjorck's depths, of networks whose largest rates are known beforehand."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnscale import report
from bnscale.probes import Curve
from bnscale.report import Judged, Verdict, figures
from bnscale.store import Store
from bnscale.study.asked import Asked
from bnscale.study.plan import Search
from bnscale.study.search import Bracket
from bnscale.trial import Outcome, Trial

FOLDER = Path(__file__).parents[1] / "studies"
STEP = math.log10(2)  # of the lattice, in decades
T95 = 12.7062  # Student's t of two readings
QUERIES = report.queries((FOLDER / "bjorck_depth.sql").read_text())
EFFECTS = ("fall", "lead", "spared fall", "spared spread")
NO, YES, TOO_FEW = Verdict.NOT_REPRODUCED, Verdict.REPRODUCED, Verdict.NOT_ENOUGH_DATA

# The place on the lattice of the largest rate that trains, at 20, 32 and 44 layers.
PLACES = {
    ("none", "glorot_normal"): (16, 15, 14),
    ("none", "he_normal"): (12, 8, 4),
    ("none", "orthogonal"): (16, 15, 14),
    ("batch", "glorot_normal"): (19, 19, 18),
    ("batch", "he_normal"): (19, 18, 17),
    ("batch", "orthogonal"): (19, 19, 18),
}
OF_SEED_1 = {("none", "he_normal", 44): 2, ("batch", "glorot_normal", 44): 17}  # where it differs
NOTHING, EVERYTHING = -1, 23


def study() -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("bjorck_depth").study


def known(trial: Trial, **other: int) -> int:
    """The largest place that trains. `other`: `he_normal_44_1=-1`, of networks without norms."""
    norm, init, depth = str(trial.norm), str(trial.weight_init), trial.depth
    if norm == "none" and (named := f"{init}_{depth}_{trial.seed}") in other:
        return other[named]
    own = OF_SEED_1.get((norm, init, depth)) if trial.seed == 1 else None
    return PLACES[norm, init][(20, 32, 44).index(depth)] if own is None else own


def searched(
    folder: Path,
    *sets: str,
    largest: Callable[[Trial], int] = known,
    begun: Callable[[Trial], bool] = lambda trial: True,
) -> Asked:
    """The study, of two seeds and three initialisations, over a store in which each begun search is at its end."""
    named = {each.partition("=")[0] for each in sets}
    own = ["seed=0,1", "weight_init=glorot_normal,he_normal,orthogonal"]
    sets = (*sets, *(each for each in own if each.partition("=")[0] not in named))
    asked = Asked.of(study(), FOLDER / "bjorck_depth.py", "laptop", sets, folder, folder)
    store = Store(folder)
    for search in asked.searches:
        if not begun(search.ladder[0].trial):
            continue
        place = largest(search.ladder[0].trial)
        for each, trains in zip(search.ladder[max(place, 0) : place + 2], [True, False][place < 0 :], strict=False):
            writer = store.writer(each.trial, {}, {})
            if trains:
                writer.write("curve", [Curve(each.trial.total_steps, 1.0, "train", 100, 1.0, 0.9, 1.0)])
            writer.finish(Outcome.FINISHED if trains else Outcome.DIVERGED, each.trial.total_steps, {})
    return asked.again()


def judged(asked: Asked) -> dict[str, Judged]:
    session = asked.session()
    found = [report.judge(claim, session, QUERIES) for claim in study().claims]
    assert tuple(each.claim.row["effect"] for each in found) == EFFECTS
    return {each.claim.row["effect"]: each for each in found}


def rows(asked: Asked, query: str) -> list[dict[str, Any]]:
    return asked.session().sql(QUERIES[query].sql).dicts()


def verdicts(asked: Asked) -> list[tuple[Verdict, int]]:
    return [(each.verdict, each.n) for each in judged(asked).values()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return searched(tmp_path_factory.mktemp("whole"))


def test_each_effect_is_what_a_hand_counts_in_the_setting_where_it_is_least(whole: Asked) -> None:
    # Steps of the lattice of each seed: Glorot falls by 16 - 14; at 20 layers it leads by 19 - 16; with norms it falls
    # by 1 and 2 of those 2; the initialisations lie 14 - 4 and 14 - 2 apart without norms, and 1 with.
    steps = {"fall": (2, 2), "lead": (3, 3), "spared fall": (1, 0), "spared spread": (10 - 1, 12 - 1)}
    for effect, found in judged(whole).items():
        first, second = steps[effect]
        half = T95 * abs(first - second) / 2  # the standard error of two readings is half their distance
        assert found.measured == pytest.approx((first + second) / 2 * STEP, abs=0.005)  # rates have three digits
        assert found.low == pytest.approx(((first + second) / 2 - half) * STEP, abs=0.05)
        assert found.n == 2
    assert verdicts(whole) == [(YES, 2), (YES, 2), (NO, 2), (YES, 2)]


def test_one_step_of_the_lattice_is_the_band_of_every_claim_and_what_the_query_counts_seeds_by() -> None:
    assert {claim.band for claim in study().claims} == {(0.3, math.inf)}
    assert abs(STEP - 0.3) < 0.002
    assert "measured < 0.3," in QUERIES["least_effect"].sql


def test_the_largest_rate_is_a_geometric_mean_with_its_range(whole: Asked) -> None:
    (he,) = [row for row in rows(whole, "largest_rate") if (row["network"], row["depth"]) == ("none, he_normal", 44)]
    assert (he["n"], he["n_not_found"]) == (2, 0)
    assert [he["minimum"], he["rate"], he["maximum"]] == pytest.approx([4e-6, 8e-6, 1.6e-5])


@pytest.mark.parametrize(
    "missing",
    [
        lambda t: (str(t.norm), str(t.weight_init), t.depth, t.seed) == ("batch", "orthogonal", 32, 1),
        lambda t: t.depth == 44,
        lambda t: str(t.norm) == "batch",
    ],
    ids=["a search", "a depth", "a norm"],
)
def test_while_a_search_has_not_begun_there_is_no_verdict(missing: Callable[[Trial], bool], tmp_path: Path) -> None:
    asked = searched(tmp_path, begun=lambda trial: not missing(trial))
    assert verdicts(asked) == [(TOO_FEW, 0)] * 4
    assert rows(asked, "largest_rate")
    began = asked.session().sql("select count(*), count(*) filter (where settled) from bracket").rows
    assert began == [(36, sum(not missing(search.ladder[0].trial) for search in asked.searches))]


@pytest.mark.parametrize("place", [NOTHING, EVERYTHING])
def test_a_search_that_found_no_rate_is_counted_and_bears_out_no_claim(place: int, tmp_path: Path) -> None:
    asked = searched(tmp_path, largest=lambda trial: known(trial, he_normal_44_1=place))
    # Glorot's two seeds are enough to refute the third; what is left of He's is not enough for the others.
    assert verdicts(asked) == [(TOO_FEW, 1), (TOO_FEW, 1), (NO, 2), (TOO_FEW, 1)]
    assert judged(asked)["spared spread"].measured == pytest.approx(9 * STEP, abs=0.005)
    (he,) = [row for row in rows(asked, "largest_rate") if row["n_not_found"]]
    assert (he["network"], he["depth"], he["n"], he["n_not_found"]) == ("none, he_normal", 44, 1, 1)
    assert he["rate"] == pytest.approx(1.6e-5)


def test_where_no_seed_found_a_rate_there_is_none_and_the_setting_is_not_forgotten(tmp_path: Path) -> None:
    asked = searched(tmp_path, largest=lambda trial: known(trial, he_normal_44_0=NOTHING, he_normal_44_1=NOTHING))
    assert verdicts(asked) == [(TOO_FEW, 0), (TOO_FEW, 0), (NO, 2), (TOO_FEW, 0)]
    (he,) = [row for row in rows(asked, "largest_rate") if row["n_not_found"]]
    assert (he["rate"], he["minimum"], he["n"], he["n_not_found"]) == (None, None, 0, 2)


def test_a_network_that_trains_in_a_narrow_band_alone_may_be_missed_and_then_has_no_rate(tmp_path: Path) -> None:
    places = {8, 9}  # 2.6e-4 and 5.1e-4: below the first that is tried and above the second
    asked = Asked.of(study(), FOLDER / "bjorck_depth.py", "laptop", ["seed=0"], tmp_path, tmp_path)
    tried: dict[int, bool] = {}
    while opened := Bracket.of(tried, 24).open:
        tried |= {place: place in places for place in opened}
    missed = Search("lr", asked.searches[0].ladder, tried)
    assert not places & tried.keys()
    assert missed.ends == (None, 1e-6)


def test_two_batch_sizes_are_no_two_seeds(tmp_path: Path) -> None:
    asked = searched(tmp_path, "seed=0", "batch=16,32")
    assert len(asked.searches) == 2 * 18
    assert verdicts(asked) == [(TOO_FEW, 0)] * 4
    assert rows(asked, "largest_rate") == rows(asked, "accuracy_at_rates_tried") == []


def test_the_figure_says_that_its_band_is_a_range_and_misses_nothing_that_was_not_asked_for(whole: Asked) -> None:
    figure = study().figures[0]
    sheet = figures.render(figure, whole.session().sql(QUERIES[figure.query].sql), "python study.py")
    (legend,) = sheet.legends
    assert [text.get_text() for text in legend.get_texts()] == ["measured, with minimum to maximum over seeds"]
    assert "not measured" not in "".join(text.get_text() for text in sheet.findobj() if hasattr(text, "get_text"))
