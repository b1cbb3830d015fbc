"""A trial is a frozen value with one identity, and refuses at the border what cannot be run."""

import json
import math
import subprocess
import sys
from typing import Annotated

import pytest
import torch
from examples import FIELDS, digits
from hypothesis import given
from hypothesis import strategies as st

from bnscale.networks import build
from bnscale.trial import (
    Affine,
    Augmentation,
    Before,
    Data,
    DecayOn,
    Network,
    Norm,
    NormInit,
    OutputBias,
    Placement,
    Precision,
    Refusal,
    Trainable,
    Trial,
    WeightInit,
    parse,
    seed_for,
)

VGG = {"network": Network.VGG, "depth": 11}
LINEAR = {
    "data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "network": Network.LINEAR, "depth": 5, "width": 10,
}  # fmt: skip
RENORM = {
    "norm": Norm.RENORM,
    "renorm_r": 3.0,
    "renorm_d": 5.0,
    "renorm_start": 0.1,
    "renorm_r_end": 0.5,
    "renorm_d_end": 0.5,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 15}, r"^depth 15: .*6n\+2.*try 14 or 20$"),
        ({"depth": 2}, r"^depth 2: .*try 8$"),
        ({"lr": -1}, r"^lr -1: must be greater than 0"),
        ({"lr": 0}, r"^lr 0: must be greater than 0"),
        ({"lr": math.nan}, r"^lr nan: must be a finite number"),
        ({"lr": math.inf}, r"^lr inf: must be a finite number"),
        ({"lr": "0.1"}, r"^lr '0.1': is text and must be a number; write lr=0.1 without quotes"),
        ({"learning_rate": 0.1}, r"^learning_rate: no such field"),
        ({"dept": 14}, r"^dept: no such field; did you mean depth\?"),
        ({"trainable": "b"}, r"^trainable 'b': must be one of all, bn, .*did you mean bn\?"),
        ({"data": "cifar11"}, r"^data 'cifar11': must be one of .*did you mean cifar10\?"),
        ({"seed": -1}, r"^seed -1: must be at least 0; try 0"),
        ({"norm_batch": 5}, r"^norm_batch 5: must divide batch 16; try 4"),
        ({"batch": 2000, "norm_batch": 2000}, r"^batch 2000: digits has 1337 training images .*try 1337 or fewer"),
        ({"epochs": 3}, r"^epochs 3, steps 10: .*give one"),
        ({"steps": None}, r"^epochs None, steps None: .*give one"),
        ({"milestones": (80.0,)}, r"^milestones \(80.0,\): must be increasing shares"),
        ({"milestones": (0.5, 0.5)}, r"^milestones \(0.5, 0.5\): must be increasing shares"),
        ({"momentum": 1.0}, r"^momentum 1.0: must be less than 1"),
        ({"norm": Norm.GROUP}, r"^groups None: group norm needs a number of groups; try 8$"),
        ({"norm": Norm.GROUP, "groups": 5}, r"^groups 5: does not divide the 16 channels of norm; try 4 or 8$"),
        ({"norm": Norm.GROUP, "groups": 32}, r"^groups 32: does not divide the 16 channels of norm; try 16$"),
        ({"norm": Norm.GROUP, "groups": 0}, r"^groups 0: must be at least 1; try 1"),
        (VGG | {"norm": Norm.INSTANCE}, r"^norm instance: the maps of layers.5.norm on digits are 1x1, .*try batch$"),
        (VGG | {"norm": Norm.GROUP, "groups": 16}, None),
        (VGG | {"norm": Norm.GROUP, "groups": 128}, r"^groups 128: does not divide the 16 channels"),
        (VGG | {"norm_batch": 1}, r"^norm_batch 1: the maps of layers.5.norm on digits are 1x1, .*; try 2$"),
        ({"norm_batch": 1}, None),  # 2x2 pixels have a variance
        ({"placement": Placement.LAST, "norm_batch": 1}, r"^norm_batch 1: the maps of head_norm .* 1x1"),
        ({"placement": Placement.LAST, "norm": Norm.INSTANCE}, r"^norm instance: the maps of head_norm .* 1x1"),
        (
            {"placement": Placement.EVERY_10},
            r"^placement every_10: a CIFAR ResNet of depth 8 has no such place; try every",
        ),
        (
            {"norm": Norm.NONE},
            r"^trainable bn: .*norm none, .* has no gamma or beta to train; try all or output",
        ),
        ({"affine_at": Placement.NONE}, r"^trainable bn: .* has no gamma or beta to train"),
        ({"norm": Norm.NOISE}, r"^trainable bn: .* has no gamma or beta to train"),
        ({"trainable": Trainable.GAMMA, "affine": Affine.BETA}, r"^trainable gamma: .* has no gamma to train"),
        ({"trainable": Trainable.BETA, "affine": Affine.GAMMA}, r"^trainable beta: .* has no beta to train"),
        (
            VGG | {"trainable": Trainable.SHORTCUT_OUTPUT},
            r"^trainable shortcut_output: a VGG has no convolution on a sh",
        ),
        (
            LINEAR | {"trainable": Trainable.TWO_PER_CHANNEL},
            r"^trainable two_per_channel: .*has no convolution to train",
        ),
        (
            {"placement": Placement.EVERY_2, "affine_at": Placement.STAGE_ENDS},
            r"^affine_at stage_ends: no norm stands there with placement every_2; try every, for all norms, or none",
        ),
        ({"norm": Norm.RENORM}, r"^renorm_r None: batch renormalization needs it; try 3"),
        (RENORM | {"renorm_r": 0.5}, r"^renorm_r 0.5: must be at least 1; try 1"),
        (
            RENORM | {"renorm_start": 0.5, "renorm_r_end": 0.1, "renorm_d_end": 0.1},
            r"^renorm_r_end 0.1: must not be before renorm_start; try 0.5",
        ),
        ({"gamma_l1": -1.0}, r"^gamma_l1 -1.0: must be at least 0; try 0"),
        (
            {"affine": Affine.BETA, "gamma_l1": 0.1},
            r"^gamma_l1 0.1: there is no gamma that trains with trainable bn; try 0",
        ),
        ({"plateau": 0}, r"^plateau 0: must be at least 1; try 1"),
        ({"network": Network.IMAGENET_RESNET, "depth": 18}, r"^width 1: an ImageNet ResNet has 64 channels .*; try 4"),
        (
            LINEAR | {"network": Network.RESNET},
            r"^network resnet: linear_teacher has vectors and no images; try linear",
        ),
        (LINEAR | {"augmentation": Augmentation.SHIFT}, r"^augmentation shift: linear_teacher has no images; try none"),
        (LINEAR | {"output_bias": OutputBias.EVEN}, r"^output_bias even: .* has no biases; try random"),
        (LINEAR | {"norm": Norm.INSTANCE}, r"^norm instance: the maps of layers.1.norm on linear teacher are 1x1"),
        ({"norm": "btach"}, r"^norm 'btach': must be one of none, batch, .*did you mean batch\?"),
    ],
)
def test_a_value_that_cannot_run_is_refused_with_field_value_rule_and_a_way_out(change, said):
    if said is None:  # its neighbour that can run
        digits(**change)
        return
    with pytest.raises(Refusal, match=said):
        digits(**change)


def test_every_field_must_be_given():
    for name in FIELDS:
        with pytest.raises(Refusal, match=f"^{name}: missing"):
            Trial(**{k: v for k, v in FIELDS.items() if k != name})


def test_several_mistakes_are_told_at_once():
    with pytest.raises(Refusal) as told:
        digits(lr=-1, seed=-1)
    assert len(str(told.value).splitlines()) == 2


def test_a_trial_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        digits().lr = 1.0


@given(st.data())
def test_the_identity_is_a_function_of_every_field(draw):
    other = {
        "validation": 0, "depth": 14, "width": 2, "trainable": Trainable.ALL, "batch": 8, "steps": 11, "lr": 0.2,
        "milestones": (), "lr_drop": 0.5, "warmup": 0.1, "momentum": 0.0, "weight_decay": 0.0, "seed": 1,
        "norm_batch": 8, "data": Data.MNIST, "precision": Precision.BF16,
        "norm": Norm.LAYER, "placement": Placement.EVERY_2, "affine": Affine.GAMMA, "affine_at": Placement.BRANCH,
        "weight_init": WeightInit.BINARY, "output_bias": OutputBias.EVEN, "network": Network.VGG_RESIDUAL,
        "plateau": 3, "decay_on": DecayOn.WEIGHTS, "norm_decay": 0.0, "gamma_l1": 0.1, "gamma_l2": 0.1, "beta_l1": 0.1,
        "beta_l2": 0.1, "label_noise": 0.5,
    }  # fmt: skip
    name = draw.draw(st.sampled_from(sorted(other)))
    changes = {name: other[name]} | ({"norm_batch": 8} if name == "batch" else {})
    assert digits(**changes).fingerprint != digits().fingerprint
    assert digits(**changes).id != digits().id


def test_equal_trials_have_one_id_in_every_process_and_however_a_number_is_written():
    code = "import sys; sys.path.insert(0, 'tests'); from examples import digits; print(digits(lr=0.10).id)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digits(lr=0.1).id
    assert digits(weight_decay=0).id == digits(weight_decay=0.0).id


def test_the_id_is_readable_and_safe_as_a_file_name():
    assert digits(seed=2).id.startswith("resnet8-bn-lr0.1-s2-")
    assert digits(width=4).id.startswith("resnet8x4-bn-")
    assert all(c.isalnum() or c in "-._" for c in digits(trainable=Trainable.BN_SHORTCUT_OUTPUT).id)


def test_a_later_field_at_the_value_of_all_earlier_code_keeps_old_ids_and_any_other_value_makes_new_ones():
    class Later(Trial):
        dropout: Annotated[float, Before(0.0)]

    assert Later(**FIELDS, dropout=0.0).id == digits().id
    assert Later(**FIELDS, dropout=0.5).id != digits().id
    with pytest.raises(Refusal, match="^dropout: missing"):
        Later(**FIELDS)
    stored = json.loads(digits().model_dump_json())
    assert Later.recall(stored) == Later(**FIELDS, dropout=0.0)


def test_what_was_stored_is_recalled_as_the_same_trial():
    for trial in (digits(), digits(milestones=()), digits(epochs=2, steps=None, lr=3)):
        assert Trial.recall(json.loads(trial.model_dump_json())) == trial


def test_the_rate_follows_the_papers_schedule():
    trial = digits(data=Data.CIFAR10, validation=0, batch=128, norm_batch=128, epochs=160, steps=None,
                   milestones=(80 / 160, 120 / 160))  # fmt: skip
    epoch = trial.steps_per_epoch
    assert epoch == 390
    rates = [trial.rate(e * epoch + d) for e, d in [(0, 0), (80, -1), (80, 0), (120, -1), (120, 0), (160, -1)]]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_warm_up_climbs_in_equal_steps_to_the_whole_rate():
    trial = digits(steps=100, warmup=0.05, milestones=())
    assert [trial.rate(step) for step in range(6)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_seeds_of_different_purposes_or_seeds_differ_and_stay():
    assert len({seed_for(s, p) for s in range(50) for p in ("order/0", "order/1", "weight/conv")}) == 150
    # SHA-256 of "0/order/0", first 8 bytes, shifted right by one: computed with sha256sum.
    assert seed_for(0, "order/0") == int("6dcae06b2febca6e", 16) >> 1


def test_trials_of_code_that_knew_fewer_fields_keep_their_ids():
    # Given out before any of these fields existed: digits, 8 layers, gamma and beta trained.
    assert digits().id == "resnet8-bn-lr0.1-s0-63507416"
    assert digits(seed=2, lr=0.3).id == "resnet8-bn-lr0.3-s2-3bd23900"
    later = {"norm", "placement", "affine", "affine_at", "weight_init", "output_bias", "groups", "plateau", "decay_on"}
    later |= {"label_noise"}
    assert not later & json.loads(digits().canonical()).keys()


def test_a_field_that_makes_no_difference_makes_no_other_trial():
    for same in ({"groups": 4}, RENORM | {"norm": Norm.BATCH}):
        assert digits(**same) == digits()
    none = digits(norm=Norm.NONE, trainable=Trainable.ALL)
    for same in ({"norm_batch": 4}, {"affine": Affine.GAMMA}, {"placement": Placement.FIRST}, {"norm_decay": 0.1}):
        assert digits(**({"norm": Norm.NONE, "trainable": Trainable.ALL} | same)) == none
    assert Trial(**none.model_dump()) == none


SAME: list[tuple[dict, dict]] = [
    ({"norm": Norm.GROUP, "groups": 1}, {"norm": Norm.LAYER}),
    ({"affine": Affine.BETA, "norm_init": NormInit.NORMAL}, {"affine": Affine.BETA, "norm_init": NormInit.ONES}),
    ({"affine": Affine.GAMMA, "norm_init": NormInit.ONES_ONES}, {"affine": Affine.GAMMA, "norm_init": NormInit.ONES}),
    ({"placement": Placement.LAST, "affine_at": Placement.LAST}, {"placement": Placement.LAST}),
    ({"placement": Placement.BRANCH, "affine_at": Placement.BRANCH}, {"placement": Placement.BRANCH}),
    ({"norm_decay": 1e-4}, {}),
    ({"trainable": Trainable.OUTPUT, "norm_decay": 0.3}, {"trainable": Trainable.OUTPUT}),
    ({"decay_on": DecayOn.WEIGHTS, "norm_decay": 0.0}, {"decay_on": DecayOn.WEIGHTS}),
    (LINEAR | {"weight_init": WeightInit.DELTA_ORTHOGONAL}, LINEAR | {"weight_init": WeightInit.ORTHOGONAL}),
    (LINEAR | {"norm": Norm.GROUP, "groups": 5, "width": 10}, None),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_the_same_training_is_the_same_trial_however_it_is_said(one, other):
    if other is None:
        assert digits(**one).norm is Norm.GROUP  # its neighbour that is no other norm
        return
    assert digits(**one) == digits(**other)
    networks = [build(digits(**each)).state_dict() for each in (one, other)]
    assert networks[0].keys() == networks[1].keys()
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_what_is_wrong_is_refused_also_where_it_would_make_no_difference():
    for wrong in ({"groups": "banana"}, {"renorm_r": "abc"}, {"norm": Norm.LAYER, "norm_batch": 0}):
        with pytest.raises(Refusal, match=f"^{next(reversed(wrong))} "):
            digits(**wrong)


@given(
    st.sampled_from([Norm.GROUP, Norm.LAYER, Norm.INSTANCE, Norm.BATCH]),
    st.sampled_from([None, 1, 3, 4, 9, 16, 64]),
    st.sampled_from([1, 8, 9, 16]),
    st.sampled_from([1, 2, 5, 16]),
    st.sampled_from([Placement.EVERY, Placement.LAST, Placement.EVERY_3]),
)
def test_a_way_out_leads_out(norm, groups, width, batch, placement):
    """What a refusal says to try is not refused for the same reason again."""
    fields = LINEAR | {
        "norm": norm, "groups": groups, "width": width, "batch": batch, "norm_batch": 1, "placement": placement,
        "trainable": Trainable.ALL,
    }  # fmt: skip
    for _ in range(4):
        try:
            digits(**fields)
            return
        except Refusal as refusal:
            said = str(refusal)
        name, way = said.split(" ", 1)[0], said.rpartition("; try ")[2].split(" ")[0].rstrip(",")
        value = parse(Trial, name, way)
        assert value != fields.get(name), said
        fields |= {name: value} | ({"norm_batch": value} if name == "batch" else {})
    raise AssertionError(said)


def test_the_id_says_which_norm_and_where():
    changes = {"norm": Norm.GROUP, "groups": 8, "placement": Placement.EVERY_2, "width": 2}
    assert digits(**changes).id.startswith("resnet8x2-group-every_2-bn-lr0.1-s0-")
    assert digits(norm=Norm.NONE, trainable=Trainable.ALL).id.startswith("resnet8-none-all-lr0.1-s0-")


def test_the_rate_also_drops_at_each_plateau():
    trial = digits(steps=100, milestones=(0.5,), plateau=2)
    assert [trial.rate(10, n) for n in range(3)] == pytest.approx([0.1, 0.01, 0.001])
    assert trial.rate(60, 1) == pytest.approx(0.001)
