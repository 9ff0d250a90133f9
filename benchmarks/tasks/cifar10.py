"""CIFAR-10: ResNet-20 and MLPerf Tiny's ResNet-8.

Validation is ``test[:2000]``, test is ``test[2000:]``; 512 training images calibrate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch

from autoquant.task import Array, Task
from data import Batches, cached_array, chosen, data_path, loader

VALIDATION, CALIBRATION, BATCH = 2000, 512, 250


def resnet20(seed: int = 0) -> Task:
    """ResNet-20 (269,722 parameters): float 91.55 on validation, 91.78 on test, 91.73 on all."""
    network = loader("resnet_cifar10")
    return _resnet("resnet20", network.load(20), network, seed)


def resnet62(seed: int = 0) -> Task:
    """62 layers with random weights, for times alone."""
    network = loader("resnet_cifar10")
    torch.manual_seed(seed)
    return _resnet("resnet62", network.resnet(62).eval(), network, seed)


def _resnet(name: str, model: torch.nn.Module, network: ModuleType, seed: int) -> Task:
    def prepare(images: Array) -> Array:
        x: Array = network.preprocess(images).numpy()
        return x

    return _task(name, model, prepare, seed)


def resnet20_data(seed: int = 0) -> Task:
    """ResNet-20's data, to go with an ONNX file of it."""
    return resnet20(seed)


def resnet8(seed: int = 0) -> Task:
    """ResNet-8 (78,186 parameters), raw pixels 0…255: float 87.19 on all 10,000 test images."""

    def prepare(images: Array) -> Array:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)

    return _task("resnet8", loader("mlperf_tiny").load(), prepare, seed)


def _task(name: str, model: torch.nn.Module, prepare: Callable[[Array], Array], seed: int) -> Task:
    train, train_labels = _images("train20k")
    test, test_labels = _images("test")

    def batches(images: Array, labels: Array, rows: Array) -> Batches:
        return Batches(lambda part: (prepare(images[part]), labels[part]), rows, BATCH)

    return Task(
        name=name,
        model=model,
        example_inputs=(torch.from_numpy(prepare(test[:1])),),
        calibration=Batches(
            lambda part: prepare(train[part]), chosen(len(train), CALIBRATION, seed), 128
        ),
        validation=batches(test, test_labels, np.arange(VALIDATION)),
        test=batches(test, test_labels, np.arange(VALIDATION, len(test))),
        train=Augmented(prepare, train, train_labels, seed),
    )


class Augmented(Batches):
    """Training batches; those of an `epoch` are shuffled, moved by up to 4 pixels (what comes in
    is black) and mirrored half of the time, by seed and number."""

    def __init__(
        self, prepare: Callable[[Array], Array], images: Array, labels: Array, seed: int
    ) -> None:
        def make(part: Array) -> tuple[Array, Array]:
            return prepare(images[part]), labels[part]

        super().__init__(make, np.arange(len(images)), BATCH)
        self.prepare, self.images, self.labels, self.seed = prepare, images, labels, seed

    def epoch(self, number: int) -> Iterator[tuple[Array, Array]]:
        generator = np.random.default_rng((self.seed, number))
        rows = generator.permutation(self.rows)
        padded = np.pad(self.images, ((0, 0), (4, 4), (4, 4), (0, 0)))
        views = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), (1, 2))
        for start in range(0, len(rows), self.size):
            part = rows[start : start + self.size]
            down, right = generator.integers(0, 9, (2, len(part)))
            moved = views[part, down, right].transpose(0, 2, 3, 1)
            mirror = generator.random(len(part)) < 0.5
            moved = np.where(mirror[:, None, None, None], moved[:, :, ::-1], moved)
            yield self.prepare(np.ascontiguousarray(moved)), self.labels[part]


def _images(split: str) -> tuple[Array, Array]:
    """uint8 images (N, 32, 32, 3) and int64 labels."""
    path = data_path("cifar10", f"{split}.npz")
    images = cached_array(f"cifar10-{split}-x", [path], lambda: np.load(path)["x"])
    labels = cached_array(f"cifar10-{split}-y", [path], lambda: np.load(path)["y"])
    return images, np.asarray(labels, dtype=np.int64)
