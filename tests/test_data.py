"""A batch is a function of (trial, step); every layout of files gives the same images; what is missing is told once."""

import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from examples import digits
from pictures import write_cifar, write_hub, write_idx

from bnscale import data, loss
from bnscale.choices import _FACTS as FACTS
from bnscale.data import Resident, pixels, prepare, shifted
from bnscale.networks import build
from bnscale.trial import Augmentation, Data, Network, Norm, Pixels, Refusal, Trainable

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[2] / "shared" / "data"
NOWHERE = Path("/nonexistent")


@pytest.fixture(autouse=True)
def _forget():
    data._load.cache_clear()
    yield
    data._load.cache_clear()


@pytest.fixture
def small(monkeypatch):
    """Data sets with the real formats and a handful of images."""
    for name, facts in FACTS.items():
        monkeypatch.setitem(FACTS, name, facts._replace(train=20, test=6) if name is not Data.DIGITS else facts)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# --- files --------------------------------------------------------------------------------------


def loaded(name: Data, folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = data._load(name, folder, CPU, 0)
    return {
        part: (getattr(found, part).images_NCHW.permute(0, 2, 3, 1).numpy(), getattr(found, part).labels_N.numpy())
        for part in ("train", "test")
    }


def assert_same(read, written):
    for part in ("train", "test"):
        np.testing.assert_array_equal(read[part][0], written[part][0])
        np.testing.assert_array_equal(read[part][1], written[part][1])


@pytest.mark.usefixtures("small", "offline")
@pytest.mark.parametrize("name", [Data.CIFAR10, Data.CIFAR100])
def test_torchvisions_pickles_are_read_as_they_were_written(name, tmp_path, monkeypatch):
    written = write_cifar(tmp_path, name, monkeypatch)
    assert_same(loaded(name, tmp_path), written)
    assert pixels(name, tmp_path) is Pixels.ORIGINAL


@pytest.mark.usefixtures("small", "offline")
@pytest.mark.parametrize("name", [Data.MNIST, Data.FASHION_MNIST])
def test_mnists_own_format_is_read_as_it_was_written(name, tmp_path):
    written = write_idx(tmp_path, name)
    assert_same(loaded(name, tmp_path), written)


@pytest.mark.usefixtures("small", "offline")
@pytest.mark.parametrize("name", [Data.CIFAR10, Data.CIFAR100, Data.MNIST, Data.FASHION_MNIST])
def test_the_hubs_parquet_of_lossless_images_is_read_as_it_was_written(name, tmp_path):
    written = write_hub(tmp_path, name, "PNG", files=2)
    assert_same(loaded(name, tmp_path), written)
    assert pixels(name, tmp_path) is Pixels.ORIGINAL


@pytest.mark.usefixtures("small", "offline")
def test_images_that_went_through_jpeg_are_another_trials_data(tmp_path):
    write_hub(tmp_path, Data.CIFAR10, "JPEG")
    assert pixels(Data.CIFAR10, tmp_path) is Pixels.JPEG
    trial = digits(data=Data.CIFAR10, validation=0, pixels=Pixels.JPEG)
    assert trial.data_title == "CIFAR-10 (JPEG)"
    prepare(trial, tmp_path)
    with pytest.raises(Refusal, match=r"^pixels original: .* holds jpeg images; .*pixels=jpeg"):
        prepare(digits(data=Data.CIFAR10, validation=0), tmp_path)


@pytest.mark.usefixtures("offline")
def test_a_missing_data_set_is_one_message_that_names_folder_and_formats(tmp_path):
    with pytest.raises(Refusal) as told:
        prepare(digits(data=Data.CIFAR10, validation=0), tmp_path)
    for part in [str(tmp_path), "cifar10/train-*.parquet", "cifar-10-batches-py", "no network", "data=digits"]:
        assert part in str(told.value)


@pytest.mark.usefixtures("small", "offline")
def test_a_file_that_is_not_whole_is_refused(tmp_path, monkeypatch):
    write_cifar(tmp_path, Data.CIFAR10, monkeypatch)
    victim = next((tmp_path / "cifar-10-batches-py").glob("data_batch_1"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(Refusal, match="^data cifar10: not found"):
        prepare(digits(data=Data.CIFAR10, validation=0), tmp_path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "cannot be read as Parquet"),
        (lambda file: pq.write_table(pq.read_table(file).slice(1), file), r"\(19, 32, 32, 3\)"),
        (lambda file: pq.write_table(pq.read_table(file).drop_columns("label"), file), "no column label"),
        (lambda file: pq.write_table(pq.read_table(file).drop_columns("img"), file), "no image column"),
        (lambda file: pq.write_table(pq.read_table(file).slice(0, 0), file), "has no rows"),
        (lambda file: pq.write_table(_spoilt(pq.read_table(file)), file), "an image that cannot be decoded"),
    ],
)
def test_a_damaged_hub_file_is_named(harm, said, tmp_path):
    write_hub(tmp_path, Data.CIFAR10, "PNG")
    harm(tmp_path / "cifar10" / "train-00000-of-00001.parquet")
    with pytest.raises(Refusal, match=said):
        _as_a_command(tmp_path)


def _as_a_command(folder):
    pixels(Data.CIFAR10, folder)  # its first look
    prepare(digits(data=Data.CIFAR10, validation=0), folder)


def _spoilt(table):
    images = [{**each, "bytes": b"no image"} for each in table.column("img").to_pylist()]
    return table.set_column(table.schema.get_field_index("img"), "img", pa.array(images))


@pytest.mark.usefixtures("small")
def test_files_of_torchvision_that_hold_something_else_are_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"junk" * 10)
    with pytest.raises(Refusal, match=r"MNIST/raw: cannot be read \("):
        prepare(digits(data=Data.MNIST, validation=0), tmp_path)


# --- batches ------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_trial_and_step():
    trial = digits(epochs=3, steps=None)
    first, again = Resident(trial, NOWHERE, CPU), Resident(trial, NOWHERE, CPU)
    later = trial.steps_per_epoch + 2
    expected = [first.batch(step) for step in range(later + 1)][later]
    for one, other in zip(expected, again.batch(later), strict=True):  # asked for alone, out of order
        assert torch.equal(one, other)
    other_seed = Resident(digits(epochs=3, steps=None, seed=1), NOWHERE, CPU).batch(later)
    assert not torch.equal(expected[0], other_seed[0])


def test_an_epoch_shows_each_training_image_once_and_no_held_out_one():
    trial = digits(augmentation=Augmentation.NONE, batch=7, norm_batch=7)
    resident = Resident(trial, NOWHERE, CPU)
    shown = torch.cat([resident.batch(step)[0] for step in range(trial.steps_per_epoch)]).flatten(1)
    held = torch.cat([images for images, _ in resident.batches("validation", 50)]).flatten(1)
    assert len(shown) == 1337
    assert len(held) == 100
    whole = data._load(Data.DIGITS, NOWHERE, CPU, 0).train.images_NCHW.flatten(1)
    unique = len(torch.unique(whole, dim=0))
    assert len(torch.unique(torch.cat([shown, held]), dim=0)) == unique
    assert len(torch.unique(shown, dim=0)) + len(torch.unique(held, dim=0)) == unique


def test_the_held_out_images_are_the_same_for_every_seed_and_batch_size():
    held = [
        torch.cat([i for i, _ in Resident(trial, NOWHERE, CPU).batches("validation", size)])
        for trial, size in [(digits(), 7), (digits(seed=5, lr=1.0), 50)]
    ]
    assert torch.equal(*held)


def test_the_workers_of_a_gang_have_the_batch_between_them():
    resident = Resident(digits(), NOWHERE, CPU)
    whole = resident.batch(3)
    halves = [resident.batch(3, slice(0, 8)), resident.batch(3, slice(8, 16))]
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([half[i] for half in halves]))
    parts = [list(resident.batches("test", 50, slice(rank, None, 2))) for rank in (0, 1)]
    assert sorted(len(labels) for part in parts for _, labels in part) == [10] + [50] * 7


def test_shifts_are_crops_of_the_black_bordered_image():
    images = torch.randint(1, 256, (81, 3, 32, 32), dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    moved = shifted(images, offsets)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for image, (down, right), result in zip(padded, offsets.tolist(), moved, strict=True):
        assert torch.equal(result, image[:, down : down + 32, right : right + 32])


def test_flips_and_shifts_are_drawn_per_image_and_uniform():
    resident = Resident(digits(), NOWHERE, CPU)
    _, flips, shifts = resident._plan(0)
    assert float(flips.float().mean()) == pytest.approx(0.5, abs=0.06)
    assert torch.bincount(shifts[:, 0], minlength=3).float().div(1337).allclose(torch.full((3,), 1 / 3), atol=0.06)
    assert set(shifts.flatten().tolist()) == {0, 1, 2}  # 1/8 of 8 pixels, each way


def test_augmentation_none_gives_the_images_as_they_are_stored():
    plain = Resident(digits(augmentation=Augmentation.NONE), NOWHERE, CPU).batch(0)[0]
    moved = Resident(digits(augmentation=Augmentation.SHIFT), NOWHERE, CPU).batch(0)[0]
    stored = data._load(Data.DIGITS, NOWHERE, CPU, 0)
    known = (stored.train.images_NCHW / 255 - stored.mean_C) / stored.sd_C
    known = {tuple(image.flatten().tolist()) for image in known}
    assert all(tuple(image.flatten().tolist()) in known for image in plain)
    assert not all(tuple(image.flatten().tolist()) in known for image in moved)


def test_digits_have_mean_zero_and_deviation_one_over_the_training_images():
    found = data._load(Data.DIGITS, NOWHERE, CPU, 0)
    normal = (found.train.images_NCHW / 255 - found.mean_C) / found.sd_C
    assert float(normal.mean()) == pytest.approx(0, abs=1e-4)
    assert float(normal.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.skipif(not SHARED.exists(), reason="the JPEG copy of CIFAR-10 is not beside this checkout")
def test_the_real_cifar10_is_whole_and_balanced():
    found = data._load(Data.CIFAR10, SHARED, CPU, 0)
    assert torch.bincount(found.train.labels_N).tolist() == [5000] * 10
    assert torch.bincount(found.test.labels_N).tolist() == [1000] * 10
    # Channel means of CIFAR-10's training images, as published many times over; JPEG moves them by less than 0.002.
    means = found.train.images_NCHW.float().div(255).mean((0, 2, 3))
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=2e-3, rtol=0)


# --- label noise ----------------------------------------------------------------------------------


def labels_of(trial):
    """By part: all labels of a part as whoever reads it gets them."""
    resident = Resident(trial, NOWHERE, CPU)
    read = {part: torch.cat([labels for _, labels in resident.batches(part, 77)]) for part in resident.parts}
    return resident, resident._loaded.train.labels_N, read


def test_noisy_labels_are_a_function_of_the_seed_and_of_nothing_else():
    noisy = digits(label_noise=0.5)
    expected = labels_of(noisy)[1]
    for other in ({"validation": 0}, {"norm_batch": 8}, {"steps": 99}, {"trainable": Trainable.ALL}, {"depth": 14}):
        assert torch.equal(labels_of(digits(label_noise=0.5, **other))[1], expected), other
    assert not torch.equal(labels_of(digits(label_noise=0.5, seed=1))[1], expected)


def test_a_label_is_drawn_anew_with_the_probability_asked_for_and_uniformly_over_all_classes():
    true_N = labels_of(digits())[1]
    for noise in (0.2, 0.5, 1.0):
        noisy_N = labels_of(digits(label_noise=noise))[1]
        wrong = float((noisy_N != true_N).double().mean())  # of 1,437 images: nine tenths of those drawn anew
        assert wrong == pytest.approx(0.9 * noise, abs=4 * (0.25 / 1437) ** 0.5)
    counts = torch.bincount(noisy_N, minlength=10)
    assert float((counts - 143.7).square().sum() / 143.7) < 33.7  # chi-squared, 9 degrees of freedom: 1 in 10,000
    together = torch.zeros(10, 10).index_put_((true_N, noisy_N), torch.ones(1437), accumulate=True)
    assert float((together - 14.4).square().sum() / 14.4) < 157  # whatever a label was: 90 degrees, 1 in 50,000


def test_labels_that_are_wrong_stay_so_as_noise_grows():
    fewer, more = (labels_of(digits(label_noise=noise))[1] for noise in (0.3, 0.6))
    true_N = labels_of(digits())[1]
    changed = fewer != true_N
    assert torch.equal(fewer[changed], more[changed])
    assert int((more != true_N).sum()) > int(changed.sum())


def test_test_images_keep_their_labels_and_held_out_ones_do_not():
    _, _, clean = labels_of(digits())
    resident, _, noisy = labels_of(digits(label_noise=1.0))
    assert torch.equal(clean["test"], noisy["test"])
    for part in ("train", "validation"):
        assert float((clean[part] == noisy[part]).double().mean()) == pytest.approx(0.1, abs=0.08)
    images, labels = next(resident.batches("validation", 100))
    plain = next(Resident(digits(), NOWHERE, CPU).batches("validation", 100))
    assert torch.equal(images, plain[0])
    assert not torch.equal(labels, plain[1])


def test_what_is_trained_on_are_the_labels_that_the_curve_counts():
    trial = digits(label_noise=1.0, augmentation=Augmentation.NONE)
    resident = Resident(trial, NOWHERE, CPU)

    def known(batches):
        pairs = [pair for images, labels in batches for pair in zip(images, labels, strict=True)]
        return {(tuple(image.flatten().tolist()), int(label)) for image, label in pairs}

    # Five epochs: each leaves out the 9 of 1,337 images that fill no batch, other ones each time.
    shown = known(resident.batch(step) for step in range(5 * trial.steps_per_epoch))
    assert known(resident.batches("train", 50)) <= shown


def test_each_worker_of_a_gang_draws_the_same_noisy_labels():
    trial = digits(label_noise=0.7)
    whole = Resident(trial, NOWHERE, CPU).batch(3)[1]
    workers = [Resident(trial, NOWHERE, CPU) for _ in range(2)]
    halves = [each.batch(3, slice(8 * rank, 8 * rank + 8))[1] for rank, each in enumerate(workers)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, Resident(digits(), NOWHERE, CPU).batch(3)[1])


def test_the_noise_of_one_trial_is_not_the_next_ones():
    stored = data._load(Data.DIGITS, NOWHERE, CPU, 0).train.labels_N.clone()
    assert not torch.equal(labels_of(digits(label_noise=1.0))[1], stored)
    assert torch.equal(labels_of(digits())[1], stored)


def test_a_regression_has_no_labels_to_draw_anew():
    with pytest.raises(Refusal, match=r"^label_noise 0.5: linear_teacher has targets and no labels; try 0"):
        teacher(label_noise=0.5)


# --- the linear teacher ---------------------------------------------------------------------------


def teacher(**changes):
    fields = {"data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "network": Network.LINEAR, "depth": 25}
    return digits(**(fields | {"width": 10, "trainable": Trainable.ALL, "validation": 0} | changes))


def test_a_linear_teacher_is_a_gaussian_matrix_over_gaussian_vectors_and_one_for_all_seeds():
    trial = teacher(batch=1000, norm_batch=1000)
    data = Resident(trial, NOWHERE, CPU)
    (x_NCHW, targets_NK), (test_NCHW, test_targets_NK) = data.batch(0), next(data.batches("test", 1000))
    assert x_NCHW.shape == (1000, 10, 1, 1)
    assert targets_NK.shape == (1000, 10)
    for values in (x_NCHW, test_NCHW):
        assert float(values.mean()) == pytest.approx(0, abs=0.05)
        assert float(values.var()) == pytest.approx(1, rel=0.05)
    matrix_KK = torch.linalg.lstsq(x_NCHW.flatten(1), targets_NK).solution
    torch.testing.assert_close(test_NCHW.flatten(1) @ matrix_KK, test_targets_NK, rtol=1e-4, atol=1e-4)
    assert float(matrix_KK.var()) == pytest.approx(1, rel=0.5)
    other = Resident(teacher(batch=1000, norm_batch=1000, seed=1), NOWHERE, CPU).batch(0)[0]
    torch.testing.assert_close(other.flatten(1).sort(0).values, x_NCHW.flatten(1).sort(0).values)


def test_full_batch_descent_sees_every_vector_at_every_step():
    data = Resident(teacher(batch=1000, norm_batch=1000, steps=3), NOWHERE, CPU)
    first, later = (data.batch(step)[0].flatten() for step in (0, 2))
    assert torch.equal(first.sort().values, later.sort().values)


def test_a_teacher_is_as_wide_as_the_network():
    trial = teacher(width=30)
    assert (trial.facts.channels, trial.facts.classes) == (30, 30)
    images, targets = Resident(trial, NOWHERE, CPU).batch(0)
    assert (images.shape[1], targets.shape[1]) == (30, 30)


def test_its_loss_is_half_the_squared_error_added_up_over_the_batch_from_any_equal_share():
    trial = teacher(batch=100, norm_batch=100)
    outputs, targets = torch.randn(100, 10), torch.randn(100, 10)
    expected = sum(0.5 * float((o - t) @ (o - t)) for o, t in zip(outputs, targets, strict=True))
    assert float(loss.of_batch(trial, outputs, targets)) == pytest.approx(expected, rel=1e-5)
    halves = [loss.of_batch(trial, outputs[part], targets[part]) for part in (slice(50), slice(50, None))]
    assert float(sum(halves)) / 2 == pytest.approx(expected, rel=1e-5)
    assert loss.right(trial, outputs, targets) is None


def test_a_linear_network_of_one_matrix_finds_the_teacher():
    trial = teacher(depth=1, batch=1000, norm_batch=1000, norm=Norm.NONE)
    network, data = build(trial), Resident(trial, NOWHERE, CPU)
    for step in range(60):
        value = loss.of_batch(trial, network(data.batch(step)[0]), data.batch(step)[1])
        (gradient,) = torch.autograd.grad(value, network.output.weight)
        with torch.no_grad():
            network.output.weight -= 8e-4 * gradient
    assert value < 1e-3


def test_digits_are_read_and_divided_as_scikit_learn_reads_and_divides_them() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    whole = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None], source.target.astype(np.int64)
    for number in (360, 359, 1000):  # also where classes draw lots for what rounding leaves over
        wanted = train_test_split(range(1797), test_size=number, stratify=source.target, random_state=0)
        for ours, theirs in zip(data._stratified(whole[1], number), wanted, strict=True):
            assert ours.tolist() == theirs
    train, test = data._digits()
    wanted = train_test_split(*whole, test_size=360, stratify=whole[1], random_state=0)
    for ours, theirs in zip((train[0], test[0], train[1], test[1]), wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_digits_need_nothing_of_scikit_learn_but_its_file() -> None:
    told = (
        "import sys, bnscale.data as data; data._digits(); print([name for name in sys.modules if 'sklearn' in name])"
    )
    assert subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True).stdout == "[]\n"
