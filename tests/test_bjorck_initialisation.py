"""The numbers of the initialisation study: from rows whose answers a hand computes, of trials that nobody trained."""

import importlib
import math
import sys
from pathlib import Path
from statistics import fmean

import pytest

from bnscale import query, report
from bnscale.probes import TABLES
from bnscale.probes.along import LossAlong, MomentsAlong
from bnscale.probes.batches import GradientNoise, MeanGradient
from bnscale.probes.class_bias import ClassBias
from bnscale.probes.gradient import Gradient
from bnscale.probes.moments import ChannelMoments
from bnscale.report import Verdict
from bnscale.store import Store
from bnscale.study.plan import Planned, plan, relate
from bnscale.trial import Outcome, OutputBias, Pixels, Placement, Trial, WeightInit

FOLDER = Path(__file__).parents[1] / "studies"
NONE, BATCH, EVENED = "no norm", "batch norm", "no norm, classes evened"
# In the order in which the study declares them.
SETTINGS = [
    NONE, BATCH, "batch norm at the end", "layer norm", "group norm", "instance norm", EVENED, "no norm, he normal",
    "no norm, orthogonal",
]  # fmt: skip
SEEDS = range(3)
T95 = {2: 12.7062047, 3: 4.3026527}  # Student's t for so many readings, 97.5 %


def declared():
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("bjorck_initialisation").study


def original(data):
    return Pixels.ORIGINAL


QUERIES = report.queries((FOLDER / "bjorck_initialisation.sql").read_text())
PAPER, DIGITS = plan(declared().paper, original), plan(declared().laptop, original)


def session_with(folder, readings, planned=PAPER, outcomes=None, more=()):
    """SQL over a store with these rows: by setting and seed, tables with their rows.

    Every trial without an outcome of its own has finished. `more`: trials beyond the plan, without rows.
    """
    store = Store(folder)
    for (setting, seed), tables in readings.items():
        trial = planned[SETTINGS.index(setting) * len(SEEDS) + seed].trial
        writer = store.writer(trial, dict.fromkeys(tables, "start"), {})
        for table, rows in tables.items():
            writer.write(table, rows)
        writer.finish((outcomes or {}).get((setting, seed), Outcome.FINISHED), trial.total_steps, {})
    for trial in more:
        store.writer(trial, {}, {}).finish(Outcome.FINISHED, trial.total_steps, {})
    session = query.open(folder, TABLES)
    relate(session, [*planned, *(Planned(trial, f"more {trial.id}", "") for trial in more)])
    return session


def ask(session, name, *by):
    """Rows of a query by the columns that tell them apart."""
    rows = session.sql(QUERIES[name].sql).dicts()
    if not by:
        return rows
    found = {tuple(row[each] for each in by) if len(by) > 1 else row[by[0]]: row for row in rows}
    assert len(found) == len(rows)
    return found


def only(session, name):
    (row,) = ask(session, name)
    return row


def number(row):
    return row["measured"], row["n"]


def near(measured, n):
    return pytest.approx(measured, rel=1e-9), n


def half(values):
    """Half the 95 % interval of their mean."""
    mean, n = fmean(values), len(values)
    return T95[n] * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1)) / math.sqrt(n)


def interval(row):
    return row["low"], row["high"]


def around(values):
    return pytest.approx((fmean(values) - half(values), fmean(values) + half(values)), rel=1e-6)


def around_in_logarithms(values):
    logs = [math.log(value) for value in values]
    ends = math.exp(fmean(logs) - half(logs)), math.exp(fmean(logs) + half(logs))
    return pytest.approx(ends, rel=1e-6)


def by_seed(setting, table, *rows):
    """Rows of seed 0, of seed 1, ..."""
    return {(setting, seed): {table: each} for seed, each in enumerate(rows)}


def together(*readings):
    """All tables of a trial, from several of the above."""
    found = {}
    for each in readings:
        for key, tables in each.items():
            assert not found.setdefault(key, {}).keys() & tables.keys()
            found[key] |= tables
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The rows of several tests, each of tables that no other of them asks."""
    readings = together(RANKS, VALLEYS, EXPLOSIONS, GROWING, GIVEN, UNITS, NOISE, WALLS)
    return session_with(tmp_path_factory.mktemp("shared"), readings)


# --- rows -----------------------------------------------------------------------------------------

TERMS = 128 * 32 * 32


def slope(layer_index, **given):
    """A layer's gradient; what is not given is of no account."""
    values = {
        "step": 0, "layer": "output" if layer_index == 110 else f"layers.{layer_index}", "weights": 9, "rms": 1.0,
        "kurtosis": 3.0, "hill": 6.0, "q50": 1.0, "q90": 1.0, "q99": 1.0, "largest": 1.0, "terms": TERMS,
        "sum_of_magnitudes": 1.0, "magnitude_of_sum": 1.0, "effective_rank": 8.0, "full_rank": 16,
        "channel_rank": 4.0, "full_channel_rank": 16,
    }  # fmt: skip
    return Gradient(layer_index=layer_index, **(values | given))


def losses(points, step=0, direction="gradient"):
    return [LossAlong(step, direction, length, 2.3 * relative, 2.3, relative) for length, relative in points]


def mean_slope(layer_index, **given):
    values = {
        "step": 0, "layer": f"layers.{layer_index}", "batches": 4, "batch": 128, "mean_square": 1.0,
        "batch_square": 1.0, "batch_variance": 0.0, "radial": 0.0, "tangential": 1.0, "weight_length": 1.0,
        "between_units": 1.0, "between_batches": 1.0,
    }  # fmt: skip
    return MeanGradient(layer_index=layer_index, **(values | given))


def moments(layer_index, mean, sd):
    return ChannelMoments(0, f"layers.{layer_index}", layer_index, 16, mean, mean / 2, sd, sd / 2)


def logits(rows, labels, biases="as they are"):
    """Of a mini-batch of 128 images, some."""
    found = []
    for image, (row, label) in enumerate(zip(rows, labels, strict=True)):
        total = sum(map(math.exp, row))
        for output, logit in enumerate(row):
            share = math.exp(logit) / total
            gradient = (share - (output == label)) / 128
            found.append(ClassBias(0, biases, image, label, output, float(logit), share, gradient))
    return found


def noise(c, power=1.0):
    """Variances C / |B| ** power, with C of the smallest mini-batches."""
    return [GradientNoise(0, batch, 4, c / 8 * (8 / batch) ** power, 1.0) for batch in (8, 32, 128)]


# --- settings -------------------------------------------------------------------------------------


def test_all_nine_settings_have_names_and_the_papers_size_and_two_of_them_are_compared(tmp_path):
    rows = ask(session_with(tmp_path, {(setting, 1): {} for setting in SETTINGS}), "settings", "setting", "seed")
    assert {key: row["trial"] for key, row in rows.items()} == {
        (setting, 1): PAPER[3 * place + 1].trial.id for place, setting in enumerate(SETTINGS)
    }
    assert all(row["papers"] for row in rows.values())
    assert {setting for (setting, _), row in rows.items() if row["compared"]} == {NONE, BATCH}


def like(setting, **changes):
    return Trial(**(PAPER[SETTINGS.index(setting) * len(SEEDS)].trial.model_dump() | changes))


def test_a_setting_with_two_trials_a_seed_is_no_setting_and_another_rate_is_not_the_papers(tmp_path):
    twice = session_with(tmp_path / "twice", {(BATCH, 0): {}, (NONE, 0): {}}, more=[like(BATCH, lr=0.05)])
    assert [(row["setting"], row["papers"]) for row in ask(twice, "settings")] == [(NONE, True)]
    other = session_with(tmp_path / "other", {}, more=[like(BATCH, lr=0.05), like(NONE, lr=0.1)])
    assert [(row["setting"], row["papers"]) for row in ask(other, "settings")] == [(BATCH, False), (NONE, False)]


def test_what_differs_in_another_axis_goes_by_no_other_settings_name(tmp_path):
    named = {
        "batch norm, first": like(BATCH, placement=Placement.FIRST),
        "layer norm at the end": like("layer norm", placement=Placement.LAST),
        "batch norm, classes evened": like(BATCH, output_bias=OutputBias.EVEN),
        "layer norm, orthogonal": like("layer norm", weight_init=WeightInit.ORTHOGONAL),
        "no norm, classes evened, orthogonal": like(EVENED, weight_init=WeightInit.ORTHOGONAL),
    }
    rows = ask(session_with(tmp_path, {}, more=named.values()), "settings", "setting")
    assert {name: row["trial"] for name, row in rows.items()} == {name: trial.id for name, trial in named.items()}
    assert not any(row["compared"] for row in rows.values())


def test_a_diverged_trial_counts_and_a_failed_one_does_not(tmp_path):
    rows = by_seed(NONE, "gradient", *[[slope(55, kurtosis=kurtosis)] for kurtosis in (20.0, 40.0, 90.0)])
    outcomes = {(NONE, 1): Outcome.DIVERGED, (NONE, 2): Outcome.FAILED}
    row = only(session_with(tmp_path, rows, outcomes=outcomes), "shape_of_layer_55")
    assert number(row) == near((20 + 40) / 2, 2)
    assert interval(row) == around([20, 40])


# --- figure 2 -------------------------------------------------------------------------------------


def test_ranges_and_shapes_of_gradients_are_compared_seed_by_seed(tmp_path):
    def seed(largest, kurtosis, beside):
        """Layer 55, and others whose kurtosis is larger without norm in three of four, the output not counted."""
        others = [slope(layer, kurtosis=kurtosis) for layer, kurtosis in zip((3, 9, 27, 110), beside, strict=True)]
        return [slope(55, largest=largest, kurtosis=kurtosis), *others]

    without, with_norm = [1.0, 10.0, 100.0], [0.01, 0.1]  # the third seed has no partner
    session = session_with(
        tmp_path,
        by_seed(NONE, "gradient", *[seed(x, 30.0 + x, (9.0, 9.0, 3.0, 99.0)) for x in without])
        | by_seed(BATCH, "gradient", *[seed(x, 3.0, (3.0, 3.0, 4.0, 3.0)) for x in with_norm]),
    )
    assert number(only(session, "decades_between_ranges")) == near(2.0, 2)
    ranges = ask(session, "range_of_layer_55", "setting")
    assert number(ranges[NONE]) == near(10.0, 3)
    assert interval(ranges[NONE]) == around_in_logarithms(without)
    assert interval(ranges[BATCH]) == around_in_logarithms(with_norm)
    shapes = ask(session, "shape_of_layer_55", "setting")
    assert number(shapes[NONE]) == near(30 + 111 / 3, 3)
    assert interval(shapes[NONE]) == around([31, 40, 130])
    assert number(shapes[BATCH]) == near(3.0, 2)
    assert number(only(session, "heavier_tails")) == near(3 / 4, 2)


# --- figure 3 -------------------------------------------------------------------------------------


def valley(bottom, power, to):
    """1.5 on the way down to 0.1 at `bottom`; behind it 0.1 (length / bottom) ** power, over `to` decades of length."""
    rise = [(bottom * 10**place, 0.1 * 10 ** (power * place)) for place in range(1, to + 1)]
    return [(bottom / 10, 1.5), (bottom, 0.1), *rise]


# Behind the minimum at b the loss is 0.1 (length / b)^4: it crosses L at b (10 L)^(1/4).
BOTTOMS = [1e-4, 2e-4, 4e-4]
VALLEYS = (
    by_seed(NONE, "loss_along_gradient", *[losses(valley(bottom, 4, to=2)) for bottom in BOTTOMS])
    | by_seed(BATCH, "loss_along_gradient", losses([(0.01, 0.8), (0.1, 0.7)]), losses([(0.01, 0.8), (0.1, 0.9)]))
    | by_seed("layer norm", "loss_along_gradient", losses(valley(1e-4, 4, to=2)))
)


def test_the_loss_crosses_a_level_where_a_power_law_says(shared):
    rows = ask(shared, "crossings", "setting", "mini_batch", "level")
    # with batch norm it never comes back to 1, and layer norm is not compared
    assert set(rows) == {(NONE, 1, level) for level in (1.0, 1e3, 1e6)}
    for level in (1.0, 1e3, 1e6):
        row, places = rows[NONE, 1, level], [bottom * (10 * level) ** (1 / 4) for bottom in BOTTOMS]
        assert number(row) == near(places[1], 3)  # the geometric mean of a, 2a and 4a
        assert interval(row) == around_in_logarithms(places)


def test_the_first_crossing_counts_and_only_seeds_that_reach_a_level_do(tmp_path):
    hilly = [(1e-4, 5.0), (1e-3, 0.1), (1e-2, 10.0), (2e-2, 0.2), (4e-2, 1e9)]  # twice over 1: first at 10^-2.5
    short = [(1e-3, 0.1), (1e-1, 10.0)]  # over 1 at 10^-2, and no further
    session = session_with(tmp_path, by_seed(NONE, "loss_along_gradient", losses(hilly, 3), losses(short, 3)))
    rows = ask(session, "crossings", "setting", "mini_batch", "level")
    assert number(rows[NONE, 4, 1.0]) == near(10**-2.25, 2)
    far = 2e-2 * 2 ** (math.log(1e6 / 0.2) / math.log(1e9 / 0.2))
    assert number(rows[NONE, 4, 1e6]) == near(far, 1)
    assert interval(rows[NONE, 4, 1e6]) == (None, None)


def test_a_loss_that_left_the_numbers_crosses_every_level_at_its_last_step_size_at_most(tmp_path):
    infinite = [(1e-3, 0.1), (2e-3, 10.0), (2.5e-3, math.inf)]
    session = session_with(tmp_path, by_seed(BATCH, "loss_along_gradient", losses(infinite)))
    rows = ask(session, "crossings", "setting", "mini_batch", "level")
    assert number(rows[BATCH, 1, 1.0]) == near(1e-3 * 2 ** (1 / 2), 1)
    # infinity counts as 1e30: a million is 5 of the 29 decades on the way from 10
    assert number(rows[BATCH, 1, 1e6]) == near(2e-3 * 1.25 ** (5 / 29), 1)


def test_the_least_loss_has_a_size_and_a_place(tmp_path):
    session = session_with(
        tmp_path,
        by_seed(NONE, "loss_along_gradient", *[losses(valley(bottom, 2, to=1)) for bottom in (1e-4, 1e-3, 1e-2)])
        | by_seed(
            BATCH,
            "loss_along_gradient",
            *[losses([(0.1, low), (0.215, end)], 6) for low, end in ((0.8, 0.9), (0.8, 3.6), (0.8, 0.9))],
        ),
    )
    rows = ask(session, "least_losses", "setting", "mini_batch", "reading")
    assert number(rows[NONE, 1, "loss"]) == near(0.1, 3)
    assert number(rows[NONE, 1, "length"]) == near(1e-3, 3)
    assert interval(rows[NONE, 1, "length"]) == around_in_logarithms([1e-4, 1e-3, 1e-2])
    assert number(rows[BATCH, 7, "loss"]) == near(0.8, 3)
    assert number(rows[BATCH, 7, "length"]) == near(0.1, 3)
    assert number(only(session, "loss_at_a_fifth")) == near(0.9 * 4 ** (1 / 3), 3)


def test_curves_have_the_lengths_that_every_seed_was_looked_at_with_a_loss(tmp_path):
    session = session_with(
        tmp_path,
        by_seed(
            NONE,
            "loss_along_gradient",
            losses([(1e-3, 2.0), (2e-3, 6.0), (1e-2, 9.0), (1e-1, 9.0)]) + losses([(1e-3, 7.0)], step=1),
            losses([(1e-3, 4.0), (1e-2, math.inf)]),  # lacks 2e-3, which was looked at where another one's loss jumped
            losses([(1e-3, 8.0), (1e-2, 9.0)]),
        )
        | by_seed("layer norm", "loss_along_gradient", losses([(1e-3, 2.0)])),
    )
    (row,) = ask(session, "loss_along_the_gradient")
    assert (row["mini_batch"], row["setting"], row["length"]) == ("mini-batch 1", NONE, 1e-3)
    assert row["relative"] == pytest.approx(4.0)  # the geometric mean of 2, 4 and 8
    assert (row["minimum"], row["maximum"], row["n"]) == (2.0, 8.0, 3)


def test_steps_diverge_of_seeds_that_were_read_at_all_three_mini_batches(tmp_path):
    tame = [(0.1, 0.9), (0.215, 1000.0)]  # not more than 1,000
    session = session_with(
        tmp_path,
        by_seed(
            BATCH,
            "loss_along_gradient",
            losses(tame, 0) + losses([(0.1, 1001.0), (0.215, math.inf)], 3) + losses(tame, 6),
            losses(tame, 0) + losses(tame, 3) + losses([(0.1, 1e4)], 4) + losses(tame, 6),
            losses([(0.1, 1e9)], 0) + losses([(0.1, 1e9)], 3),  # no reading at step 6
        ),
    )
    assert number(only(session, "divergence_with_batch_norm")) == (2, 2)
    alone = session_with(tmp_path / "alone", by_seed(BATCH, "loss_along_gradient", losses(tame, 0)))
    assert ask(alone, "divergence_with_batch_norm") == []


# --- figures 4 and 5 ------------------------------------------------------------------------------


def on_the_way(early, late, fraction=1.0, diverges=True):
    """Channels of layers 8 and 80."""
    return [
        MomentsAlong(0, layer, 1e-3, diverges, fraction, channel, mean, 1.0)
        for layer, means in ((8, early), (80, late))
        for channel, mean in enumerate(means)
    ]


EXPLOSIONS = by_seed(
    NONE,
    "moments_along_gradient",
    on_the_way([1.0, -10.0], [1e3, -1e9]) + on_the_way([1.0, 1.0], [1e30, 1.0], fraction=0.8),
    on_the_way([0.1, -0.01], [1e5, None]),  # one channel overflowed
    on_the_way([1.0, 1.0], [1e30, 1.0], diverges=False),
) | by_seed(BATCH, "moments_along_gradient", on_the_way([1.0], [1e20]))


def test_an_explosion_is_measured_at_the_end_of_steps_that_diverge(shared):
    row = only(shared, "explosion")
    assert number(row) == near((8 + 6) / 2, 2)
    assert interval(row) == around([8, 6])


GROWTHS = [3.0, 4.0, 8.0]
GROWING = by_seed(
    NONE,
    "channel_moments",
    *[[moments(6, 0.2, 3.0), moments(102, 0.2 * math.exp(x), 3.0 * 10**x)] for x in GROWTHS],
) | by_seed(BATCH, "channel_moments", [moments(6, 0.2, 1.0), moments(102, 0.1, 1.0)], [moments(6, 0.2, 1.0)])


def test_moments_grow_by_as_much_in_either_unit(shared):
    rows = ask(shared, "growth_of_moments", "setting", "moment", "unit")
    ten = math.log(10)
    for moment, unit, size in [
        ("mean", "natural", 1.0), ("mean", "decades", 1 / ten), ("deviation", "natural", ten),
        ("deviation", "decades", 1.0),
    ]:  # fmt: skip
        row = rows[NONE, moment, unit]
        assert number(row) == near(5.0 * size, 3)
        assert interval(row) == around([growth * size for growth in GROWTHS])
    assert number(rows[BATCH, "mean", "natural"]) == near(-math.log(2), 1)  # layer 102 of seed 1 overflowed


# --- figure 6 -------------------------------------------------------------------------------------


FIRST, SECOND, THIRD = [2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 5.0]  # logits that favour this class
GIVEN = by_seed(
    NONE,
    "class_bias",
    logits([FIRST, FIRST, FIRST, FIRST], [0, 1, 2, 0]) + logits([FIRST, SECOND, THIRD, FIRST], [0, 1, 2, 0], "evened"),
    logits([SECOND, SECOND, THIRD, SECOND], [0, 1, 2, 0])
    + logits([FIRST, SECOND, SECOND, FIRST], [0, 1, 2, 0], "evened"),
    logits([THIRD, THIRD, THIRD, THIRD], [0, 1, 2, 0]) + logits([FIRST, SECOND, SECOND, FIRST], [0, 1, 2, 0], "evened"),
)


def test_the_commonest_class_is_favoured_by_the_share_of_images_that_are_given_it(shared):
    rows = ask(shared, "favoured_class", "setting", "biases")
    assert number(rows[NONE, "as they are"]) == near((1 + 3 / 4 + 1) / 3, 3)
    assert interval(rows[NONE, "as they are"]) == around([1, 3 / 4, 1])
    assert number(rows[NONE, "evened"]) == near(1 / 2, 3)


def test_a_logits_gradient_is_saturated_where_the_softmax_of_the_favoured_class_is_one(tmp_path):
    def favouring(chance):
        """Three classes; of every image the softmax of class 2 is this. One image is of that class."""
        odds = math.log(2 * chance / (1 - chance))
        return logits([[0.0, 0.0, odds]] * 4, [0, 1, 2, 0])

    sure = logits([[0.0, 0.0, 800.0 - 100.0]] * 4, [0, 1, 2, 0])
    session = session_with(
        tmp_path,
        by_seed(NONE, "class_bias", sure, sure, sure)
        | by_seed(BATCH, "class_bias", *[favouring(chance) for chance in (0.4, 0.5, 0.9)]),
    )
    rows = ask(session, "saturation", "setting")
    assert number(rows[NONE]) == near(1.0, 3)
    assert number(rows[BATCH]) == near((0.4 + 0.5 + 0.9) / 3, 3)  # gradients of other classes' images: p / 128
    assert interval(rows[BATCH]) == around([0.4, 0.5, 0.9])


def test_what_evening_leaves_is_a_geometric_mean_over_the_layers_before_the_output(tmp_path):
    def sizes(first, second):
        return [slope(1, rms=first), slope(2, rms=second), slope(110, rms=1e9 * first)]

    session = session_with(
        tmp_path,
        by_seed(EVENED, "gradient", sizes(40.0, 90.0), sizes(4.0, 9.0), sizes(1e9, 1e9))
        | by_seed(BATCH, "gradient", sizes(0.2, 0.8), sizes(0.2, 0.8)),
    )
    # sqrt(40 * 90) / sqrt(0.2 * 0.8) = 150, and a tenth of it
    assert number(only(session, "left_after_evening")) == near(150 / math.sqrt(10), 2)


# --- table 1 and figure 7 -------------------------------------------------------------------------


def sums(table, scales=(1.0, 1.0, 1.0)):
    """By layer the sum of magnitudes and the magnitude of the sum, over the terms; the former times a scale a seed."""
    return [
        [
            slope(layer, sum_of_magnitudes=TERMS * a * scale, magnitude_of_sum=TERMS * b)
            for layer, (a, b) in table.items()
        ]
        for scale in scales
    ]


CANCEL = {18: (1e-4, 1e-6), 54: (3e-5, 5e-7), 90: (8e-6, 2e-7), 91: (1.0, 1e-9)}  # ratios 100, 60 and 40
ADD_UP = {18: (6e-5, 3e-5), 54: (3e-4, 1e-4), 90: (1e-4, 1e-4), 91: (1.0, 1e-9)}  # 2, 3 and 1


def test_sums_of_gradients_are_the_papers_table(tmp_path):
    scales = [1 / 4, 1.0, 4.0]
    session = session_with(
        tmp_path,
        by_seed(BATCH, "gradient", *sums(CANCEL, scales)) | by_seed(NONE, "gradient", *sums(ADD_UP)),
    )
    rows = ask(session, "sums_of_gradients", "setting", "layer_index")
    table = ask(session, "table_1", "setting", "layer_index", "part")
    assert set(rows) == {(setting, layer) for setting in (NONE, BATCH) for layer in (18, 54, 90)}
    assert set(table) == {(*key, part) for key in rows for part in "ab"}
    for (setting, layer), row in rows.items():
        a, b = {BATCH: CANCEL, NONE: ADD_UP}[setting][layer]
        assert number(row) == near(a / b, 3)
        assert (row["a"], row["b"]) == pytest.approx((a, b))
        assert number(table[setting, layer, "a"]) == near(a, 3)
        assert number(table[setting, layer, "b"]) == near(b, 3)
    assert interval(rows[BATCH, 54]) == around_in_logarithms([60 * scale for scale in scales])
    assert number(only(session, "least_gain_in_alignment")) == near(60 / 3, 3)  # of 50, 20 and 40


def ranks(shares):
    """By layer the share of full rank."""
    return [
        slope(layer, effective_rank=16.0 * share, channel_rank=8.0 * share / 2, full_channel_rank=8)
        for layer, share in shares.items()
    ]


RANKS = by_seed(
    NONE,
    "gradient",
    ranks({1: 1.0, 45: 0.1, 46: 0.2, 110: 0.9}),
    ranks({1: 1.0, 45: 0.3, 46: 0.2, 110: 0.9}),
) | by_seed(BATCH, "gradient", *[ranks({1: 0.1, 45: 0.8, 46: 0.4, 110: 0.1})] * 3)


def test_rank_is_lost_on_average_over_the_layers_between_the_stem_and_the_output(shared):
    rows = ask(shared, "rank_of_gradients", "setting", "layer_index")
    assert (rows[NONE, 45]["rank"], rows[NONE, 45]["channel_rank"], rows[NONE, 45]["n"]) == (
        pytest.approx(0.2), pytest.approx(0.1), 2,
    )  # fmt: skip
    assert (NONE, 1) not in rows
    assert number(ask(shared, "rank_of_layer_45", "setting")[BATCH]) == near(0.4, 3)
    assert number(only(shared, "loss_of_rank")) == near((0.2 / 0.8 + 0.2 / 0.4) / 2, 2)


# --- section 2.1 and the first reviewer -----------------------------------------------------------


UNITS = by_seed(
    NONE,
    "mean_gradient",
    *[
        [mean_slope(layer, between_units=units, between_batches=batches) for layer, (units, batches) in seed.items()]
        for seed in (
            {1: (4.0, 1.0), 2: (5.0, 1.0), 3: (100.0, 1.0)},
            {1: (8.0, 3.0), 2: (5.0, 1.0), 3: (300.0, 1.0)},
        )
    ],
)


def test_units_against_batches_is_the_median_over_layers_of_a_ratio_of_means(shared):
    ratios = ask(shared, "variance_between_units", "setting", "layer_index")
    assert {layer: row["ratio"] for (_, layer), row in ratios.items()} == pytest.approx({1: 12 / 4, 2: 5, 3: 400 / 2})
    assert number(ask(shared, "units_against_batches", "setting")[NONE]) == near(5.0, 2)


NOISE = by_seed(NONE, "gradient_noise", noise(1.0), noise(4.0), noise(16.0)) | by_seed(
    BATCH, "gradient_noise", noise(2.0, 0.5), noise(2.0, 0.25), noise(2.0, 0.75)
)


def test_noise_that_falls_as_one_over_the_batch_has_ratio_one_slope_minus_one_and_meets_its_bound(shared):
    rows = ask(shared, "noise", "setting", "images")
    for images in (8, 32, 128):
        row = rows[NONE, images]
        assert (row["ratio"], row["low"], row["high"], row["c"]) == pytest.approx((1, 1, 1, 4))
        # |B| / |B|^power over the same at 8: (|B| / 8)^(1 - power), with powers 0.75, 0.5 and 0.25
        row, times = rows[BATCH, images], images / 8
        assert (row["low"], row["ratio"], row["high"]) == pytest.approx((times**0.25, times**0.5, times**0.75))
    assert {row["n"] for row in rows.values()} == {3}

    falls = ask(shared, "fall_of_noise", "setting")
    assert number(falls[NONE]) == near(-1.0, 3)
    assert interval(falls[NONE]) == pytest.approx((-1.0, -1.0))
    assert number(falls[BATCH]) == near(-0.5, 3)
    assert interval(falls[BATCH]) == around([-0.5, -0.25, -0.75])

    steps = ask(shared, "noise_of_a_step", "setting", "images")
    either = ask(shared, "noise_and_bound", "setting", "images", "what")
    for images in (8, 32, 128):
        expected = {
            NONE: (1e-4**2 * 4 / images, 1e-4**2 * 4 / images),
            BATCH: (0.1**2 * 2 / 8 * (8 / images) ** 0.5, 0.1**2 * 2 / images),
        }
        for setting, (variance, bound) in expected.items():
            row = steps[setting, images]
            assert (row["variance"], row["bound"]) == pytest.approx((variance, bound), rel=1e-9)
            assert row["n"] == 3
            assert either[setting, images, "measured"]["variance"] == pytest.approx(variance, rel=1e-9)
            assert either[setting, images, "lr^2 C / |B|"]["variance"] == pytest.approx(bound, rel=1e-9)
    assert len(either) == 2 * len(steps)

    # at 128 images: 0.1^2 2/8 / 4 with batch norm and 1e-4^2 4/128 without
    assert number(only(shared, "gain_in_noise")) == near(math.log10(1e6 * (2 / 8 / 4) / (4 / 128)), 3)


# --- the third reviewer ---------------------------------------------------------------------------


def test_what_mini_batches_share_is_all_none_or_by_chance_less_than_none(tmp_path):
    # Of pure noise of variance 4 the mean of four batches has squared length 1, more or less by chance.
    def seed(chance):
        return [
            mean_slope(1, mean_square=2.0, batch_square=2.0, batch_variance=0.0, radial=1.0),
            mean_slope(2, mean_square=1.0 + chance, batch_square=4.0, batch_variance=4.0, radial=0.0),
        ]

    session = session_with(
        tmp_path,
        by_seed(NONE, "mean_gradient", seed(0.5), seed(-0.5))
        | by_seed(
            BATCH, "mean_gradient", *[[mean_slope(2, mean_square=0.6, batch_square=4.0, batch_variance=4.0)]] * 3
        ),
    )
    rows = ask(session, "independent_part", "setting", "layer_index")
    assert rows[NONE, 1]["common"] == pytest.approx(1.0)
    assert rows[NONE, 2]["common"] == pytest.approx(0.0, abs=1e-12)
    assert rows[BATCH, 2]["common"] == pytest.approx(-0.4 / 4)
    assert rows[NONE, 1]["radial"] == pytest.approx(1 / 2)
    common, radial = ask(session, "common_share", "setting"), ask(session, "radial_share", "setting")
    assert number(common[NONE]) == near(1 / 2, 2)
    assert number(common[BATCH]) == near(-0.1, 3)
    assert number(radial[NONE]) == near((1 / 2 + 0) / 2, 2)


def both(common, random):
    return {"loss_along_mean_gradient": losses(common, 0, "mean gradient") + losses(random, 0, "random")}


WALLS = {
    (NONE, 0): both([(1e-3, 0.5), (4e-3, 2e3), (2e-2, math.inf)], [(1e-3, 1.0), (4e-3, 2.0), (2e-2, 99.0)]),
    # where a loss jumps there are readings between: the random direction has none there
    (NONE, 1): both([(1e-3, 0.8), (2e-3, 50.0), (3e-3, 2e3), (4e-3, 1e5)], [(1e-3, 1.0), (4e-3, 4.0), (2e-2, 99.0)]),
    (NONE, 2): both([(1e-3, 0.2), (4e-3, math.inf)], [(1e-3, 1.0), (4e-3, 8.0)]),
    (BATCH, 0): both([(1e-3, 0.01), (4e-3, 1e4)], [(1e-3, 1.0), (4e-3, 1e4)]),
}


def test_a_random_step_is_as_long_as_the_one_that_diverges_or_as_the_next_that_both_were_looked_at(shared):
    assert number(only(shared, "narrowness")) == near(4.0, 3)  # of 2, 4 and 8
    assert number(only(shared, "descent_along_the_common_part")) == near((0.5 * 0.8 * 0.2) ** (1 / 3), 3)


def test_a_loss_that_left_the_numbers_refutes_and_leaves_no_claim_open(tmp_path):
    wide = both([(1e-3, 0.5), (4e-3, 2e3)], [(1e-3, 1.0), (4e-3, math.inf)])
    session = session_with(
        tmp_path,
        {(NONE, seed): wide for seed in SEEDS}
        | by_seed(BATCH, "loss_along_gradient", *[losses([(0.1, 0.5), (0.215, math.inf)], 6)] * 3),
    )
    for name in ("narrowness", "loss_at_a_fifth"):
        (claim,) = [each for each in declared().claims if each.query == name]
        judged = report.judge(claim, session, QUERIES)
        assert (judged.verdict, judged.n) == (Verdict.NOT_REPRODUCED, 3)


# --- claims ---------------------------------------------------------------------------------------


def test_digits_say_nothing_about_the_papers_numbers_and_the_same_rows_of_cifar_do(tmp_path):
    layers = [slope(55, largest=2.0)]
    everywhere = [row for step in (0, 3, 6) for row in losses(valley(1e-3, 4, to=2), step)]
    shown = logits([[0.0, 1.0]] * 2, [0, 1])
    readings = together(
        *[
            together(
                by_seed(setting, "gradient", *[layers + each for each in sums(table)]),
                by_seed(setting, "loss_along_gradient", *[everywhere] * 3),
                by_seed(setting, "moments_along_gradient", *[on_the_way([1.0], [2.0])] * 3),
                by_seed(setting, "channel_moments", *[[moments(6, 1.0, 1.0), moments(102, 2.0, 2.0)]] * 3),
                by_seed(setting, "class_bias", *[shown] * 3),
            )
            for setting, table in ((NONE, ADD_UP), (BATCH, CANCEL))
        ]
    )
    # One claim a query, of those with a number of the paper's. The exponent of the noise is -1 on any data.
    numbers = [each for each in declared().claims if each.paper is not None and each.query != "fall_of_noise"]
    assert len(numbers) == 3 + 15 + 1 + 4 + 1 + 19  # of figures 2 to 6 and of table 1
    claims = list({each.query: each for each in numbers}.values())
    for planned, known in ((DIGITS, False), (PAPER, True)):
        session = session_with(tmp_path / str(known), readings, planned)
        judged = [report.judge(claim, session, QUERIES) for claim in claims]
        assert {each.measured is not None for each in judged} == {known}
        assert {each.verdict is not Verdict.NOT_ENOUGH_DATA for each in judged} == {known}
        if known:
            assert {each.n for each in judged} == {3}
