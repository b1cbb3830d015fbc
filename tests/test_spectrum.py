"""Singular values of deep linear networks are those of the map that the network computes."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import digits

from bnscale.data import Resident
from bnscale.engine import Alone, Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.probes import END, Snapshot, spectrum, spectrum_histogram
from bnscale.probes.spectrum import _singular_values, edge
from bnscale.storage import storage
from bnscale.train import Course, train
from bnscale.trial import Augmentation, Data, Network, Norm, Outcome, Placement, Trainable, WeightInit

CPU = torch.device("cpu")


def snapshot(**changes: Any) -> Snapshot:
    fields = {
        "data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "network": Network.LINEAR, "depth": 4,
        "width": 20, "weight_init": WeightInit.GAUSSIAN, "trainable": Trainable.ALL, "batch": 64, "norm_batch": 64,
        "steps": 0,
    }  # fmt: skip
    trial = digits(**(fields | changes))
    engine = LocalEngine(build(trial), trial, Gang(), None)
    return Snapshot(trial, 0, engine, Resident(trial, Path("/nonexistent"), CPU))


def test_the_support_of_products_ends_where_the_theory_says():
    # Bjorck et al. 2018, figure 8, and the values of the formula computed apart from this code.
    assert [edge(m) for m in (1, 3, 5)] == pytest.approx([2.0, 3.0792, 3.8640], abs=1e-4)


def test_without_norms_they_are_of_the_product_of_the_matrices():
    at = snapshot(norm=Norm.NONE)
    matrices = [m.weight.double() for m in at.network.modules() if isinstance(m, torch.nn.Linear)]
    expected = torch.linalg.svdvals(matrices[3] @ matrices[2] @ matrices[1] @ matrices[0]) / math.sqrt(20) ** 4
    scale, values = _singular_values(at)
    assert scale == pytest.approx(20**2)
    torch.testing.assert_close(torch.from_numpy(values), expected)


@pytest.mark.parametrize("placement", [Placement.EVERY, Placement.EVERY_2])
def test_with_batch_norms_they_are_of_the_map_between_vectors_of_one_batch(placement):
    """In training the outputs of a batch differ as the map says of the difference of the inputs: means cancel."""
    at = snapshot(norm=Norm.BATCH, placement=placement)
    network, x_NK = at.network.double(), at.data.batch(0)[0].double()
    outputs_NK = network.train()(x_NK)
    inputs = x_NK.flatten(1)
    differences, mapped = inputs[1:] - inputs[:1], outputs_NK[1:] - outputs_NK[:1]
    product_KK = torch.linalg.lstsq(differences, mapped).solution.T  # 63 differences span the 20 dimensions
    scale, values = _singular_values(at)
    free = {Placement.EVERY: 1, Placement.EVERY_2: 3}[placement]
    assert scale == pytest.approx(math.sqrt(20) ** free)
    torch.testing.assert_close(
        torch.from_numpy(values) * scale, torch.linalg.svdvals(product_KK.detach()), rtol=1e-5, atol=0
    )


def test_a_row_says_the_largest_the_smallest_and_their_ratio_and_the_histogram_holds_every_value():
    at = snapshot(norm=Norm.NONE)
    (row,) = spectrum(at)
    _, values = _singular_values(at)
    assert (row.largest, row.smallest) == (values.max(), values.min())
    assert 10**row.log10_condition == pytest.approx(values.max() / values.min())
    bins = list(spectrum_histogram(at))
    assert sum(each.values for each in bins) == bins[0].all_values == 20
    assert all(a.high == b.low for a, b in itertools.pairwise(bins))
    for each in bins:
        assert each.values == ((values >= each.low) & (values < each.high)).sum()


def test_another_network_has_none():
    trial = digits()
    engine = LocalEngine(build(trial), trial, Gang(), None)
    at = Snapshot(trial, 0, engine, Resident(trial, Path("/nonexistent"), CPU))
    assert [*spectrum(at), *spectrum_histogram(at)] == []


def test_a_trial_of_no_steps_is_measured_at_its_initialisation_and_left_there(tmp_path):
    trial = snapshot().trial
    engine = LocalEngine(build(trial), trial, Gang(), storage(tmp_path))

    class Notebook:
        reached = None

        def __init__(self) -> None:
            self.rows: list[Any] = []
            self.ending: Any = None

        def write(self, table: str, rows: list[Any]) -> None:
            self.rows += rows

        def flush(self, step: int) -> None: ...
        def rewind(self, step: int) -> None: ...
        def finish(self, outcome: Outcome, step: int, facts: dict[str, Any]) -> None:
            self.ending = (outcome, step)

    notebook = Notebook()
    data = Resident(trial, Path("/nonexistent"), CPU)
    for _ in train([Course(trial, notebook, {spectrum: END})], Alone(engine), data, 30.0, lambda: False):
        pass
    assert notebook.ending == (Outcome.FINISHED, 0)
    assert [row.step for row in notebook.rows] == [0]
    for name, value in build(trial).state_dict().items():
        assert torch.equal(value, engine.module.state_dict()[name]), name
