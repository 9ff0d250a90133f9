from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autoquant.task import Array, Task
from autoquant.tasks import load_task, mnist

SPLITS = ("train", "calibration", "validation", "test")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def task() -> Task:
    """With the weights of the user's cache; trained (about 15 s) where there are none."""
    return load_task("mnist")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quick(_: torch.Tensor, __: torch.Tensor) -> Weights:
    """Weights in no time."""
    torch.manual_seed(5)
    return mnist.Digits().eval().state_dict()


def refuse(*_: object) -> Weights:
    raise AssertionError("trained again")


def forget() -> None:
    """As a new process."""
    mnist._weights.cache_clear()


def images(task: Task, name: str) -> Array:
    return np.concatenate([batch[0] for batch in task.split(name).batches])


# --- data -------------------------------------------------------------------------------------


def test_the_splits_have_the_sizes_that_are_documented(task: Task) -> None:
    sizes = {name: task.split(name).samples for name in SPLITS}
    assert sizes == mnist.SIZES == {
        "train": 2500, "calibration": 256, "validation": 1000, "test": 1244,
    }  # fmt: skip
    assert sum(sizes.values()) == 5000
    for name in SPLITS:
        found = images(task, name)
        assert found.shape[1:] == (1, 28, 28) and found.dtype == np.float32


def test_no_image_is_in_two_splits(task: Task) -> None:
    seen = {name: {image.tobytes() for image in images(task, name)} for name in SPLITS}
    assert len(set.union(*seen.values())) == sum(map(len, seen.values())) == 5000


def test_every_split_has_its_share_of_each_class(task: Task) -> None:
    for name in ("train", "validation", "test"):
        targets = task.split(name).targets
        assert targets is not None
        counts = np.bincount(targets, minlength=10)
        assert counts.max() - counts.min() <= 1


def test_images_are_normalised(task: Task) -> None:
    found = images(task, "train")
    assert abs(found.mean()) < 0.05 and abs(found.std() - 1) < 0.05
    assert found.min() == pytest.approx(-mnist.MEAN / mnist.STD, abs=1e-5)


def test_calibration_has_no_labels(task: Task) -> None:
    assert task.split("calibration").targets is None


# --- network ----------------------------------------------------------------------------------


def test_the_network_reaches_97_percent_on_test(task: Task) -> None:
    assert isinstance(task.model, torch.nn.Module) and not task.model.training
    for name in ("validation", "test"):
        targets = task.split(name).targets
        with torch.no_grad():
            logits = task.model(torch.from_numpy(images(task, name)))
        assert (logits.argmax(1).numpy() == targets).mean() >= 0.97


def test_the_network_has_a_bit_of_everything(task: Task) -> None:
    assert isinstance(task.model, torch.nn.Module)
    groups = [m.groups for m in task.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(groups) == 8 and groups.count(64) == 1
    assert any(isinstance(m, mnist.Residual) for m in task.model.modules())


def test_training_is_reproducible_and_leaves_torch_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mnist, "Training", functools.partial(mnist.Training, epochs=1, threads=1))
    data = [torch.from_numpy(a[:200]) for a in mnist._splits()["train"]]
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = mnist._train(*data)
    torch.manual_seed(99)
    torch.set_rng_state(before)
    second = mnist._train(*data)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_another_training_has_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mnist.weights_file()
    monkeypatch.setattr(mnist, "Training", functools.partial(mnist.Training, seed=1))
    assert mnist.weights_file() != before


# --- cache ------------------------------------------------------------------------------------


def test_the_weights_are_trained_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mnist, "_train", quick)
    first = mnist.mnist()
    assert [p.name for p in cache.iterdir()] == [mnist.weights_file().name]
    captured = capsys.readouterr()
    assert captured.out == "" and "training the built-in mnist network once" in captured.err
    forget()
    monkeypatch.setattr(mnist, "_train", refuse)
    second = mnist.mnist()
    assert capsys.readouterr().err == ""
    assert isinstance(first.model, torch.nn.Module) and isinstance(second.model, torch.nn.Module)
    again = second.model.state_dict()
    assert all(torch.equal(v, again[n]) for n, v in first.model.state_dict().items())
    assert first.model is not second.model  # training one does not change the other


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"not weights" * 100)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for position in range(middle, middle + 256):  # more than the padding between records
        content[position] ^= 0xFF
    path.write_bytes(bytes(content))


def other(path: Path) -> None:
    torch.save({"stem.conv.weight": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [empty, garbage, cut, flipped, other])
def test_a_damaged_file_is_made_again(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    monkeypatch.setattr(mnist, "_train", quick)
    mnist.mnist()
    path = mnist.weights_file()
    content = path.read_bytes()
    damage(path)
    forget()
    capsys.readouterr()
    mnist.mnist()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "is damaged" in said[0] and str(path) in said[0]
    assert len(path.read_bytes()) == len(content)
    forget()
    monkeypatch.setattr(mnist, "_train", refuse)
    mnist.mnist()
    assert [p.name for p in cache.iterdir()] == [path.name]  # nothing half-written is left


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(mnist, "_train", quick)
    assert mnist.mnist().name == "mnist"
    assert "AUTOQUANT_CACHE" in capsys.readouterr().err.splitlines()[-1]
