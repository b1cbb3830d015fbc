"""Probes read what they say: against values worked out another way."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from examples import digits
from torch import nn

from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.networks.norm import BatchNorm
from bnscale.probes import END, EPOCH, START, STEP, TABLES, Snapshot, clamp, curve, gamma, gamma_histogram, sparsity
from bnscale.trial import Precision, Trainable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained():
    """A trial after 30 steps."""
    trial = digits(steps=60, trainable=Trainable.BN)
    engine = LocalEngine(build(trial), trial, Gang(), None)
    data = Resident(trial, Path("/nonexistent"), CPU)
    for step in range(30):
        engine.backward(engine(*data.batch(step)))
        engine.step(0.1)
    return trial, engine, data


@pytest.fixture
def at(trained):
    trial, engine, data = trained
    return Snapshot(trial, 30, engine, data)


def whole(data: Resident, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(data.batches(part, 10_000))
    assert len(batches) == 1
    return batches[0]


def test_every_table_is_the_name_of_its_probe_and_every_row_has_a_step(at):
    for probe in (curve, gamma, gamma_histogram, clamp, sparsity):
        rows = list(probe(at))
        assert rows
        assert {type(row) for row in rows} == {TABLES[probe.__name__]}
        assert {row.step for row in rows} == {30}


def test_curve_is_the_mean_over_the_images_in_evaluation_mode(trained, at):
    _, engine, data = trained
    rows = {row.split: row for row in curve(at)}
    assert set(rows) == {"train", "validation", "test"}
    engine.module.eval()
    for part, row in rows.items():
        images, labels = whole(data, part)
        with torch.no_grad():
            logits = engine.module(images)
        assert row.images == len(labels)
        assert row.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
        assert row.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()), abs=1e-6)
        ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
        assert row.top5 == pytest.approx(float((ranks < 5).float().mean()), abs=1e-6)
    engine.module.train()


def test_gamma_is_read_per_layer_from_the_stem_to_the_output(trained, at):
    _, engine, _ = trained
    norms = [(n, m) for n, m in engine.module.named_modules() if isinstance(m, BatchNorm)]
    rows = list(gamma(at))
    assert [(r.layer, r.layer_index, r.channels) for r in rows] == [
        (n, i, m.channels) for i, (n, m) in enumerate(norms)
    ]
    for row, (_, norm) in zip(rows, norms, strict=True):
        values = norm.weight.detach().double()
        assert row.gamma_dead == pytest.approx(float((values.abs() < 0.01).double().mean()))
        assert row.gamma_q50 == pytest.approx(float(torch.quantile(values.abs(), 0.5)))
        assert row.gamma_mean == pytest.approx(float(values.mean()))
        assert row.beta_sd == pytest.approx(float(norm.bias.detach().double().std(unbiased=False)))


def test_the_gradient_read_is_the_one_that_the_next_update_takes(trained, at):
    _, engine, data = trained
    rows = {row.layer: row for row in gamma(at)}
    buffers = {n: b.clone() for n, b in engine.module.named_buffers()}
    engine.backward(engine(*data.batch(30)))
    for name, module in engine.module.named_modules():
        if isinstance(module, BatchNorm):
            assert rows[name].gamma_gradient_rms == pytest.approx(
                float(module.weight.grad.square().mean().sqrt()), rel=1e-5
            )
            assert rows[name].beta_gradient_rms == pytest.approx(
                float(module.bias.grad.square().mean().sqrt()), rel=1e-5
            )
    engine.module.zero_grad()
    engine.module.load_state_dict(buffers, strict=False)


def test_gammas_gradient_is_read_also_where_gamma_is_frozen():
    trial = digits(trainable=Trainable.OUTPUT)
    engine = LocalEngine(build(trial), trial, Gang(), None)
    rows = list(gamma(Snapshot(trial, 0, engine, Resident(trial, Path("/nonexistent"), CPU))))
    assert all(row.gamma_gradient_rms > 0 for row in rows)
    assert all(p.grad is None for p in engine.module.parameters())


def test_the_histogram_counts_every_gamma_once(trained, at):
    _, engine, _ = trained
    values = torch.cat([m.weight.detach().abs() for m in engine.module.modules() if isinstance(m, BatchNorm)])
    rows = list(gamma_histogram(at))
    assert sum(row.channels for row in rows) == rows[0].all_channels == len(values)
    for row in rows:
        assert row.channels == int(((values >= row.low) & (values < row.high)).sum())
    assert [r.high for r in rows[:-1]] == [r.low for r in rows[1:]]


def test_clamping_sets_small_gammas_to_zero_and_nothing_else(trained, at):
    trial, engine, data = trained
    with torch.no_grad():
        engine.module.norm.weight[:4] = 0.009  # below the threshold, and far from nothing after normalisation
    rows = {row.split: row for row in clamp(Snapshot(trial, 30, engine, data))}
    by_hand = build(trial)
    by_hand.load_state_dict(engine.module.state_dict())
    with torch.no_grad():
        for module in by_hand.modules():
            if isinstance(module, BatchNorm):
                module.weight[module.weight.abs() < 0.01] = 0
    by_hand.eval()
    images, labels = whole(data, "test")
    with torch.no_grad():
        accuracy = float((by_hand(images).argmax(1) == labels).double().mean())
    assert rows["test"].accuracy_clamped == pytest.approx(accuracy)
    assert rows["test"].clamped > 0
    assert float(engine.module.norm.weight[0].detach()) == pytest.approx(0.009)


def test_sparsity_is_the_share_of_zeros_behind_each_relu(trained, at):
    _, engine, data = trained
    images, _ = whole(data, "test")
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        m.register_forward_hook(lambda _m, _i, out, name=n: outputs.update({name: out.detach().clone()}))
        for n, m in engine.module.named_modules()
        if isinstance(m, nn.ReLU)
    ]
    engine.module.eval()
    with torch.no_grad():
        engine.module(images)
    engine.module.train()
    for handle in handles:
        handle.remove()
    rows = {row.layer: row for row in sparsity(at)}
    assert rows.keys() == outputs.keys()
    for name, output in outputs.items():
        off = ((output == 0).double().mean(0) > 0.99).double().mean()
        assert rows[name].images == len(images)
        assert rows[name].units == output[0].numel()
        assert rows[name].zero == pytest.approx(float((output == 0).double().mean()))
        assert rows[name].off == pytest.approx(float(off))
    assert not any(m._forward_hooks for m in engine.module.modules())


def test_evaluation_in_bf16_is_near_evaluation_in_fp32(trained):
    trial, engine, data = trained
    half = digits(steps=60, precision=Precision.BF16)
    rough = LocalEngine(build(half), half, Gang(), None)
    rough.module.load_state_dict(engine.module.state_dict())
    full = next(iter(curve(Snapshot(trial, 30, engine, data))))
    coarse = next(iter(curve(Snapshot(half, 30, rough, data))))
    assert coarse.loss != full.loss
    assert coarse.loss == pytest.approx(full.loss, rel=0.05)


@pytest.mark.parametrize(
    ("cadence", "steps", "text"),
    [
        (EPOCH, [0, 83, 166, 200], "1 epochs"),
        (2 * EPOCH, [0, 166, 200], "2 epochs"),
        (50 * STEP, [0, 50, 100, 150, 200], "50 steps"),
        (END, [200], "end"),
        (START, [0], "start"),
    ],
)
def test_a_cadence_includes_start_and_end(cadence, steps, text):
    trial = digits(steps=200)
    assert trial.steps_per_epoch == 83
    assert [step for step in range(201) if cadence.due(step, trial)] == steps
    assert cadence.readings(trial) == len(steps)
    assert str(cadence) == text
