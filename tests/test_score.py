"""Scores: of a network alone and in a cohort the same, and for all members in one pass."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import digits
from torch import Tensor

from bnscale import score
from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.cohort import CohortEngine
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.networks.layers import mode
from bnscale.probes import Snapshot, clamp, curve
from bnscale.score import EVALUATION_BATCH, batch_of
from bnscale.storage import storage
from bnscale.trial import Affine, Augmentation, Data, Network, NormInit, Precision

CPU = torch.device("cpu")
NOWHERE = Path("/nonexistent")
OWN: list[dict[str, Any]] = [
    {},
    {"lr": 0.3, "norm_init": NormInit.NORMAL},
    {"affine": Affine.BETA},
]


class Images(Resident):
    """Says how often it was read."""

    reads = 0

    def batches(self, part: str, size: int, share: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        self.reads += 1
        return super().batches(part, size, share)


def cohort(steps: int = 2, folder: Path | None = None, **common: Any) -> tuple[CohortEngine, Images]:
    """After some steps."""
    trials = [digits(**(common | own)) for own in OWN]
    places = [None if folder is None else storage(folder / str(place)) for place in range(len(trials))]
    engine, data = CohortEngine(build(trials[0]), trials, Gang(), places), Images(trials[0], NOWHERE, CPU)
    for step in range(steps):
        go_on(engine, data, step)
    return engine, data


def go_on(engine: CohortEngine, data: Resident, step: int) -> None:
    engine.backward(engine(*data.batch(step)))
    engine.step(*(member.trial.rate(step) for member in engine.members))


def apart(member: Any) -> LocalEngine:
    """The same network alone."""
    engine = LocalEngine(build(member.trial), member.trial, Gang(), None)
    engine.module.load_state_dict(member.module.state_dict())
    return engine


LINEAR: dict[str, Any] = {
    "data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "network": Network.LINEAR, "depth": 4, "width": 10,
    "validation": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "common",
    [{}, {"precision": Precision.BF16}, {"network": Network.VGG, "depth": 11}, LINEAR],
    ids=["float32", "bfloat16", "a VGG", "a regression"],
)
def test_a_member_scores_as_the_same_trial_alone_does(common: dict[str, Any]) -> None:
    engine, data = cohort(**common)
    close = 2.0**-6 if "precision" in common else 1e-5
    for member in engine.members:
        one = apart(member)
        for part in data.parts:
            mine, its = member.score(part, data), one.score(part, data)
            assert mine.images == its.images
            for a, b in ((mine.loss, its.loss), (mine.accuracy, its.accuracy), (mine.top5, its.top5)):
                assert a == (b if b is None else pytest.approx(b, rel=close, abs=close))


def test_a_score_is_the_mean_over_the_images_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = digits()
    engine, data = LocalEngine(build(trial), trial, Gang(), None), Images(trial, NOWHERE, CPU)
    ((images, labels),) = data.batches("test", 10_000)
    with mode(engine.module, training=False), torch.no_grad():
        logits = engine.module(images)
    found = engine.score("test", data)
    assert found.images == len(labels)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    monkeypatch.setattr(score, "EVALUATION_BATCH", 100)
    assert LocalEngine(build(trial), trial, Gang(), None).score("test", data) == found


def test_members_are_scored_in_one_pass_once_a_step() -> None:
    engine, data = cohort()
    before = [member.score("test", data) for member in engine.members]
    assert [member.score("test", data) for member in engine.members] == before
    assert data.reads == 1
    engine.members[0].score("train", data)
    assert data.reads == 2
    go_on(engine, data, 2)
    after = [member.score("test", data) for member in engine.members]
    assert data.reads == 3
    assert all(a.loss != b.loss for a, b in zip(before, after, strict=True))


def test_no_score_outlives_the_network_that_it_is_of(tmp_path: Path) -> None:
    engine, data = cohort(folder=tmp_path)
    for member in engine.members:
        member.save(2, {})
    before = [member.score("test", data) for member in engine.members]
    go_on(engine, data, 2)
    engine.members[0].score("test", data)
    for member in engine.members:
        member.restore()
    assert [member.score("test", data) for member in engine.members] == before
    engine.keep([0, 2])
    left = [member.score("test", data) for member in engine.members]
    for mine, its in zip(left, [before[0], before[2]], strict=True):
        assert mine.loss == pytest.approx(its.loss, rel=1e-5)


def test_a_member_whose_outputs_are_no_numbers_touches_no_other() -> None:
    engine, data = cohort()
    before = [member.score("test", data) for member in engine.members]
    engine.changed()
    engine.members[1].module.get_parameter("norm.weight").data[3] = math.nan
    spoilt = engine.members[1].score("test", data)
    assert math.isnan(spoilt.loss)
    assert math.isnan(spoilt.accuracy)
    for place in (0, 2):
        assert engine.members[place].score("test", data) == before[place]


def test_scoring_moves_nothing_and_leaves_every_module_in_its_mode() -> None:
    engine, data = cohort()
    before = [{n: t.clone() for n, t in member.module.state_dict().items()} for member in engine.members]
    engine.members[0].score("test", data)
    assert all(
        torch.equal(value, member.module.state_dict()[name])
        for member, state in zip(engine.members, before, strict=True)
        for name, value in state.items()
    )
    assert all(module.training for member in engine.members for module in member.module.modules())
    assert all(module.training for module in engine._stacked.modules())


def test_hooks_and_changed_parameters_are_seen_by_the_member_that_has_them() -> None:
    engine, data = cohort()
    member = engine.members[1]
    at = Snapshot(member.trial, 2, member, data)
    plain = at.evaluate("test")
    seen: list[int] = []
    relu = member.module.get_submodule("blocks.0.relu1")
    hook = relu.register_forward_hook(lambda module, given, output: seen.append(len(output)))
    assert at.evaluate("test").loss == pytest.approx(plain.loss, rel=1e-5)
    assert sum(seen) == plain.images
    hook.remove()
    gamma_C = member.module.get_parameter("norm.weight").detach()
    assert at.evaluate("test", {"norm.weight": gamma_C}).loss == pytest.approx(plain.loss, rel=1e-5)
    assert at.evaluate("test", {"norm.weight": gamma_C * 0}).loss != pytest.approx(plain.loss, rel=1e-3)


def test_probes_read_of_a_member_what_they_read_of_the_trial_alone() -> None:
    engine, data = cohort()
    member = engine.members[1]
    mine, its = (
        [row for probe in (curve, clamp) for row in probe(Snapshot(member.trial, 2, each, data))]  # type: ignore[arg-type]
        for each in (member, apart(member))
    )
    for row, same in zip(mine, its, strict=True):
        for a, b in zip(vars(row).values(), vars(same).values(), strict=True):
            assert a == (pytest.approx(b, rel=1e-5) if isinstance(b, float) else b)


def test_the_images_in_one_pass_are_few_and_parts_of_the_data_are_whole_batches() -> None:
    assert batch_of(1) == EVALUATION_BATCH
    for networks in range(2, 40):
        assert EVALUATION_BATCH % batch_of(networks) == 0
        assert EVALUATION_BATCH / 2 <= networks * batch_of(networks) <= 2 * EVALUATION_BATCH
    assert batch_of(10**6) == 1
