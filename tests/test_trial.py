"""A trial is a frozen value with one identity, and refuses at the border what cannot be run."""

import json
import math
import subprocess
import sys
from typing import Annotated

import pytest
from examples import FIELDS, digits
from hypothesis import given
from hypothesis import strategies as st

from bnscale.trial import Before, Data, Precision, Refusal, Trainable, Trial, seed_for


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
    ],
)
def test_a_value_that_cannot_run_is_refused_with_field_value_rule_and_a_way_out(change, said):
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
