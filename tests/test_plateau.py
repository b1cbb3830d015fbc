"""The rate drops where training stops getting better, decided from the losses of whole epochs."""

from examples import digits
from hypothesis import given
from hypothesis import strategies as st

from bnscale.plateau import Plateau


def plateau(patience: int | None = 2, epoch_steps: int = 3) -> Plateau:
    return Plateau(patience, epoch_steps)


def hear(listener: Plateau, epochs: list[float]) -> list[int]:
    """Epochs of a constant loss; the drops after each."""
    drops = []
    for number, loss in enumerate(epochs, 1):
        listener.hear(number * listener.epoch_steps, [loss] * listener.epoch_steps)
        drops.append(listener.drops)
    return drops


def test_it_drops_after_as_many_epochs_without_a_new_best_as_its_patience():
    assert hear(plateau(2), [3.0, 2.0, 2.0, 2.0, 1.0, 1.5, 1.2, 0.5]) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert hear(plateau(1), [3.0, 2.0, 2.0, 2.0]) == [0, 0, 1, 2]


def test_a_gain_of_less_than_a_ten_thousandth_is_no_new_best():
    assert hear(plateau(1), [1.0, 0.99995]) == [0, 1]
    assert hear(plateau(1), [1.0, 0.9998]) == [0, 0]


def test_without_patience_it_never_drops_and_keeps_nothing():
    listener = plateau(None)
    assert hear(listener, [1.0] * 50)[-1] == 0
    assert listener.facts() == {}
    assert not listener.due(3)


@given(st.lists(st.floats(0.1, 10), min_size=12, max_size=30), st.data())
def test_it_hears_the_same_however_the_losses_are_handed_over_and_across_checkpoints(losses, draw):
    losses = losses[: len(losses) // 3 * 3]
    at_once, in_parts = plateau(1), plateau(1)
    for end in range(3, len(losses) + 1, 3):
        at_once.hear(end, losses[end - 3 : end])
    step = 0
    while step < len(losses):
        end = min(step + draw.draw(st.integers(1, 3)), (step // 3 + 1) * 3)
        in_parts.hear(end, losses[step:end])
        step = end
        in_parts = Plateau(1, 3, **in_parts.facts())
    assert in_parts == at_once


def test_it_asks_to_hear_at_the_end_of_each_epoch():
    trial = digits(plateau=4, steps=None, epochs=3)
    listener = Plateau.of(trial, None)
    assert [step for step in range(1, 200) if listener.due(step)] == [trial.steps_per_epoch, 2 * trial.steps_per_epoch]
