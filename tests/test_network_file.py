"""Seed plus BatchNorm is the network: a file without frozen weights gives back the trained network to the last bit."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import digits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bnscale
from bnscale import cli, network_file
from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.checkpoint import write
from bnscale.networks import build
from bnscale.networks.norm import composed
from bnscale.storage import storage
from bnscale.store import Store
from bnscale.train import Job, fail, run
from bnscale.trial import (
    Affine,
    Augmentation,
    Data,
    Network,
    Norm,
    NormInit,
    Outcome,
    OutputBias,
    Placement,
    Precision,
    Refusal,
    Trainable,
    Trial,
)

NOWHERE = "/nonexistent"
TRIALS: dict[str, dict[str, Any]] = {
    "bn": {},
    "all": {"trainable": Trainable.ALL},
    "two per channel": {"trainable": Trainable.TWO_PER_CHANNEL},
    "nothing": {"trainable": Trainable.NONE},
    "even biases": {"output_bias": OutputBias.EVEN},
    "no norm": {"norm": Norm.NONE, "trainable": Trainable.OUTPUT},
    "beta at stage ends": {"affine": Affine.BETA, "affine_at": Placement.STAGE_ENDS, "norm_init": NormInit.ONES},
    "noisy": {"norm": Norm.NOISY},
    "noise": {"norm": Norm.NOISE, "trainable": Trainable.ALL},
    "group": {"norm": Norm.GROUP, "groups": 4},
    "l1, ghost batches": {"norm": Norm.L1, "norm_batch": 8},
    "vgg, bf16": {"network": Network.VGG, "depth": 11, "precision": Precision.BF16},
    "linear": {
        "network": Network.LINEAR,
        "data": Data.LINEAR_TEACHER,
        "augmentation": Augmentation.NONE,
        "depth": 5,
        "width": 10,
        "lr": 1e-4,
    },
}
"""What a network can consist of, and what of it the seed does not give back."""


def trained(trial: Trial, store: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Train in a store, by the whole machinery; the network that it ended with."""
    networks = []

    def kept(trial: Trial) -> nn.Module:
        networks.append(build(trial))
        return networks[-1]

    monkeypatch.setattr("bnscale.train.build", kept)
    for _ in run([job(trial, store)], Gang(), 1, lambda: False):
        pass
    return networks[-1].eval()


def job(trial: Trial, store: Path) -> Job:
    return Job(trial, {}, str(store), NOWHERE, commit="abc", zero=0, save_every=30.0)


def logits(network: nn.Module, trial: Trial) -> torch.Tensor:
    images_NCHW, _ = next(Resident(trial, Path(NOWHERE), torch.device("cpu")).batches("test", 50))
    half = torch.autocast("cpu", torch.bfloat16, enabled=trial.precision is Precision.BF16)
    # An engine fuses norms with what follows, and rounds otherwise; a network from a file is computed as by torch.
    with composed(network), torch.no_grad(), half:
        return network(images_NCHW)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `bnscale` prints; for a mistake, what it says of it."""

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["bnscale", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code in ((2,) if err else (0, None))
        return err or out

    return call


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, Path]:
    """A store with one finished trial, which no test may change."""
    trial, store = digits(), tmp_path_factory.mktemp("finished") / "results"
    for _ in run([job(trial, store)], Gang(), 1, lambda: False):
        pass
    return trial, store


@pytest.fixture
def file(results: tuple[Trial, Path], tmp_path: Path) -> Path:
    trial, store = results
    return network_file.export(Store.existing(store), trial.id, tmp_path / "net.safetensors").path


# --- the network comes back -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRIALS)
def test_seed_and_file_give_back_the_trained_network_to_the_last_bit(kind, tmp_path, monkeypatch, command):
    trial = digits(**TRIALS[kind])
    network = trained(trial, tmp_path / "results", monkeypatch)
    out = tmp_path / "net.safetensors"
    said = command("export-network", trial.id[:-4], "--out", out, "--store", tmp_path / "results")
    assert said.startswith(f"wrote {out}: ")
    again = bnscale.load_network(out)
    assert not again.training
    assert again.trial == trial
    theirs, ours = network.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name
        assert value.stride() == ours[name].stride(), name
    assert torch.equal(logits(network, trial), logits(again, trial))
    # Training moved something, so that a network at its initialisation would not have passed.
    assert any(not torch.equal(value, ours[name]) for name, value in build(trial).state_dict().items())
    assert out.stat().st_size < (2 * 2**20 if trial.trainable is Trainable.ALL else 64 * 2**10)


def test_another_process_computes_the_same_logits(results, tmp_path, monkeypatch, command):
    trial, _ = results
    network = trained(trial, tmp_path / "results", monkeypatch)
    command("export-network", trial.id, "--out", tmp_path / "net.safetensors", "--store", tmp_path / "results")
    images_NCHW = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"images": images_NCHW}, tmp_path / "images.safetensors")
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, bnscale; assert 'torch' not in sys.modules\n"
            "network = bnscale.load_network('net.safetensors')\n"
            "from safetensors.torch import load_file, save_file\n"
            "logits = network(load_file('images.safetensors')['images']).detach()\n"
            "save_file({'logits': logits}, 'logits.safetensors')",
        ],
        cwd=tmp_path,
        check=True,
    )
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], network(images_NCHW))


def test_a_loaded_network_trains_what_its_trial_trains_and_prints_its_layers(file, results):
    network = bnscale.load_network(str(file))
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        n for n, p in build(results[0]).named_parameters() if p.requires_grad
    }
    assert "(norm1): BatchNorm(16, gamma, beta, norm_batch=16)" in str(network)


# --- the file ---------------------------------------------------------------------------------------


def test_a_file_tells_where_it_comes_from_in_the_metadata_that_any_safetensors_reader_shows(file, results):
    trial, store = results
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["bnscale"])
    assert Trial.recall(about["fields"]) == trial
    assert {name: about[name] for name in ("format", "trial", "step", "outcome", "commit", "torch")} == {
        "format": 1,
        "trial": trial.id,
        "step": 10,
        "outcome": "finished",
        "commit": "abc",
        "torch": version("torch"),
    }
    checkpoint = json.loads((store / "checkpoints" / f"trial={trial.id}" / "step-10.json").read_text())
    assert about["frozen"] == checkpoint["facts"]["frozen"]


def test_a_file_holds_few_tensors_whatever_the_depth(file):
    channels = 16 + 2 * 16 + 3 * 32 + 3 * 64  # the stem, a block of each stage, shortcuts of two
    assert {name: tuple(value.shape) for name, value in load_file(file).items()} == {
        "gamma": (channels,),
        "beta": (channels,),
        "running_mean": (channels,),
        "running_var": (channels,),
        "num_batches_tracked": (1,),
    }


def test_resnet866_is_half_a_mebibyte_and_its_whole_network_over_fifty(tmp_path):
    trial = digits(depth=866)
    network = build(trial)
    with torch.no_grad():  # counters that differ are stored each
        network.norm.num_batches_tracked.add_(1)
    out = tmp_path / "net.safetensors"
    written = network_file.write(out, network, trial, 0, Outcome.FINISHED, None)
    floats = 4 * 4 * 64_736 // 2
    assert floats < written.bytes == out.stat().st_size < floats + 10_000 < 0.52 * 2**20
    assert written.whole > 53 * 2**20
    again = bnscale.load_network(out).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())


def test_the_command_says_how_small_the_file_is_beside_the_network(results, tmp_path, command, monkeypatch):
    trial, store = results
    monkeypatch.chdir(tmp_path)
    said = command("export-network", trial.id, "--out", "net.safetensors", "--store", store)
    size = (tmp_path / "net.safetensors").stat().st_size
    whole = sum(t.numel() * t.element_size() for t in build(trial).state_dict().values())
    assert said == (
        f"wrote net.safetensors: {size / 1024:.1f} KiB; the whole network, weights and all, "
        f"takes {whole / 1024:.1f} KiB ({whole / size:.0f} times as much)\n"
    )
    assert whole > 30 * size


def test_the_same_network_is_the_same_file(file, results, tmp_path):
    trial, store = results
    again = network_file.export(Store.existing(store), trial.id, tmp_path / "again.safetensors")
    assert again.path.read_bytes() == file.read_bytes()


def test_an_earlier_file_is_replaced_whole_or_stays(file, results, tmp_path, monkeypatch):
    trial, store = results
    before = file.read_bytes()
    network_file.export(Store.existing(store), trial.id, file)
    assert file.read_bytes() == before

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Refusal, match="cannot be written \\(no space left on device\\); choose another place"):
        network_file.export(Store.existing(store), trial.id, file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


# --- mistakes of who exports ------------------------------------------------------------------------


def test_a_trial_that_is_not_there_or_not_one_is_refused(results, tmp_path, command):
    trial, store = results
    out = ("--out", tmp_path / "net.safetensors", "--store", store)
    assert command("export-network", f"{trial.id}x", *out) == (
        f"trial {trial.id}x: no trial in {store} begins so; did you mean {trial.id}? "
        f'`bnscale sql "select trial from trials" --store {store}` lists them\n'
    )
    assert f"no trial in {store} begins so. `bnscale sql" in command("export-network", "vgg", *out)
    assert "there is none; run a study" in command("export-network", "vgg", *out[:2], "--store", tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_beginning_of_several_ids_is_refused_and_a_whole_id_is_not(tmp_path, command):
    store = Store(tmp_path / "results")
    trials = [digits(lr=0.1 * i) for i in range(1, 6)]
    for trial in trials:
        store.writer(trial, {}, {}).finish(Outcome.DIVERGED, 3, {"diverged_step": 2})
    said = command("export-network", "resnet8", "--out", tmp_path / "n", "--store", store.url)
    assert said.startswith("trial resnet8: 5 trials begin so: resnet8-bn-lr0.1-s0-")
    assert said.endswith(" and 2 more; write more of the id\n")
    said = command("export-network", trials[0].id, "--out", tmp_path / "n", "--store", store.url)
    assert said.startswith(f"trial {trials[0].id}: diverged at step 2, so no trained network is left; ")


def test_a_trial_without_a_trained_network_is_refused_with_how_far_it_is(tmp_path, command):
    unfinished, failed = digits(lr=0.2), digits(lr=0.3)
    looks = iter([False] * 4 + [True] * 9)
    for _ in run([job(unfinished, tmp_path / "results")], Gang(), 1, lambda: next(looks)):
        pass
    fail(job(failed, tmp_path / "results"), "Traceback\n  ...\nRuntimeError: out of luck", "code")
    out = ("--out", tmp_path / "net.safetensors", "--store", tmp_path / "results")
    assert command("export-network", unfinished.id, *out) == (
        f"trial {unfinished.id}: has not finished: 4 of 10 steps are recorded; let its study go on to the end\n"
    )
    assert command("export-network", failed.id, *out) == (
        f"trial {failed.id}: failed at step 0 (RuntimeError: out of luck); run its study again, which repeats it\n"
    )


def test_a_checkpoint_that_is_missing_damaged_or_of_another_torch_is_refused(tmp_path, command):
    trial = digits(steps=2)
    store = tmp_path / "results"
    for _ in run([job(trial, store)], Gang(), 1, lambda: False):
        pass
    out = ("export-network", trial.id, "--out", tmp_path / "net.safetensors", "--store", store)
    folder = store / "checkpoints" / f"trial={trial.id}"
    about, tensors = folder / "step-2.json", folder / "step-2.safetensors"
    facts = json.loads(about.read_text())
    del facts["sum"]  # as before there were any

    about.write_text(json.dumps(facts | {"facts": facts["facts"] | {"frozen": "others"}}))
    assert f"this torch, {version('torch')}, draws others from its seed; export with that" in command(*out)
    about.write_text(json.dumps(facts))

    content = tensors.read_bytes()
    write(
        storage(folder),
        2,
        {name: value for name, value in load_file(tensors).items() if "norm1" not in name},
        facts["facts"],
    )
    assert "its checkpoint has other tensors than the network of bnscale" in command(*out)
    about.write_text(json.dumps(facts))
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = f"to train it again delete {store}/manifests/{trial.id}.json and run its study\n"
    assert command(*out) == f"trial {trial.id}: its last checkpoint is damaged in {folder}; {again}"
    about.unlink()
    tensors.unlink()
    assert command(*out) == f"trial {trial.id}: its last checkpoint is missing in {folder}; {again}"
    assert not (tmp_path / "net.safetensors").exists()


def test_a_place_that_cannot_be_written_or_holds_something_else_is_refused(results, tmp_path, command):
    trial, store = results
    (tmp_path / "notes.txt").write_text("of value")

    def said(out: Path) -> str:
        return command("export-network", trial.id, "--out", out, "--store", store)

    gone = tmp_path / "gone"
    assert said(gone / "n") == f"out {gone / 'n'}: there is no folder {gone}; create it or choose another place\n"
    assert said(tmp_path) == f"out {tmp_path}: is a folder; try {tmp_path / 'net.safetensors'}\n"
    assert "notes.txt: exists and is no network of bnscale; choose another name" in said(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "of value"
    # A name longer than the disk takes.
    assert "cannot be written (file name too long); choose another place" in said(tmp_path / ("n" * 254))


# --- mistakes of who loads --------------------------------------------------------------------------


def changed(file: Path, **changes: Any) -> None:
    """Rewrite what a file says of itself."""
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["bnscale"])
    save_file(load_file(file), file, {"bnscale": json.dumps(about | changes)})


def resealed(file: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    """The same, with a sum that agrees: as another bnscale would have written it."""
    with safe_open(file, "pt") as opened:
        about = network_file.About(**(json.loads(opened.metadata()["bnscale"]) | changes))
    about = about.model_copy(update={"stored": network_file._sum(about, tensors)})
    save_file(tensors, file, {"bnscale": about.model_dump_json()})


def test_a_file_whose_frozen_weights_this_torch_does_not_draw_is_refused_with_both_versions(file):
    resealed(file, load_file(file), frozen="others", torch="1.13.1")
    with pytest.raises(Refusal, match="are from torch 1.13.1, and this") as said:
        bnscale.load_network(file)
    assert f"this torch, {version('torch')}, draws others from the seed; load it with that torch" in str(said.value)


def test_a_file_of_a_later_format_is_refused_with_the_version_that_reads_it(file):
    changed(file, format=2, bnscale="9.0", news="unheard of")
    with pytest.raises(Refusal, match="has format 2, of bnscale 9.0, and bnscale .* reads format 1"):
        bnscale.load_network(file)


def test_a_trial_with_a_field_of_a_later_version_is_refused(file, results):
    changed(file, fields=results[0].model_dump(mode="json") | {"mood": 1}, bnscale="9.0")
    with pytest.raises(Refusal, match="mood: no such field.*; load it with bnscale 9.0, which wrote it"):
        bnscale.load_network(file)


def test_a_file_that_is_cut_short_anywhere_is_refused(file):
    content = file.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(Refusal, match=r"is cut short or no safetensors file \(.*\); export it again"):
            bnscale.load_network(file)


def test_a_changed_bit_or_field_is_refused(file, results):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Refusal, match="is damaged, for its sums do not agree; export .* again"):
        bnscale.load_network(file)
    file.write_bytes(content)
    for lie in ({"fields": results[0].model_dump(mode="json") | {"seed": 1}}, {"step": 1}, {"commit": "another"}):
        file.write_bytes(content)
        changed(file, **lie)
        with pytest.raises(Refusal, match="its sums do not agree"):
            bnscale.load_network(file)


def test_a_file_with_other_tensors_than_its_network_is_refused(file):
    tensors = load_file(file)
    for others in ({"gamma": tensors["gamma"][:-1]}, {"more": torch.ones(1)}, {"beta": tensors["beta"].double()}):
        resealed(file, tensors | others)
        with pytest.raises(Refusal, match="its tensors are not those of .*; load it with bnscale .*, which wrote it"):
            bnscale.load_network(file)


def test_what_is_no_file_of_bnscale_is_refused(tmp_path):
    def refused(path: Path) -> str:
        with pytest.raises(Refusal) as said:
            bnscale.load_network(path)
        return str(said.value)

    other, text = tmp_path / "other.safetensors", tmp_path / "text"
    save_file({"gamma": torch.ones(3)}, other)
    assert refused(other) == (
        f"network file {other}: is not of bnscale; `bnscale export-network` writes those that are"
    )
    save_file({"gamma": torch.ones(3)}, other, {"bnscale": '{"format": 1}'})
    assert refused(other) == f"network file {other}: is damaged (trial: Field required); export it again"
    text.write_text("gamma\n" * 100)
    assert "is cut short or no safetensors file" in refused(text)
    assert refused(tmp_path / "none").endswith("there is none; `bnscale export-network` writes one")
    assert refused(tmp_path).endswith("cannot be read (is a folder); give a file")
