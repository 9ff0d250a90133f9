"""ImageNet subset: EfficientNet-Lite0.

Validation is the first 500 rows of ``val1300.tsv``, test the other 800; 256 of the 320
calibration images, chosen by seed.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from autoquant.task import Array, Task
from data import Batches, cached_array, chosen, data_path, loader

VALIDATION, CALIBRATION, BATCH = 500, 256, 50


def efficientnet_lite0(seed: int = 0) -> Task:
    """EfficientNet-Lite0 (4,652,008 parameters): float 82.69 on all 1,300 images.

    An easier subset than the whole: compare only with float on the same images.
    """
    network = loader("efficientnet_lite0")
    images, labels = _images(network, "val1300")
    calibration, _ = _images(network, "calib320")

    def labelled(part: Array) -> tuple[Array, Array]:
        return _normalised(images[part]), labels[part]

    return Task(
        name="efficientnet_lite0",
        model=network.load(),
        example_inputs=(torch.from_numpy(_normalised(images[:1])),),
        calibration=Batches(
            lambda part: _normalised(calibration[part]),
            chosen(len(calibration), CALIBRATION, seed),
            32,
        ),
        validation=Batches(labelled, np.arange(VALIDATION), BATCH),
        test=Batches(labelled, np.arange(VALIDATION, len(images)), BATCH),
    )


def _normalised(images: Array) -> Array:
    return (images.astype(np.float32) - 127) / 128


def _images(network: ModuleType, split: str) -> tuple[Array, Array]:
    """Cropped uint8 images (N, 3, 224, 224) and int64 labels, in the order of the .tsv."""
    table = data_path("imagenet", f"{split}.tsv")
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    files = [data_path("imagenet", split, row[0]) for row in rows]

    def decode() -> Array:
        from PIL import Image

        images = np.empty((len(files), 3, 224, 224), dtype=np.uint8)
        for i, file in enumerate(files):
            with Image.open(file) as image:
                images[i] = (network.preprocess(image) * 128 + 127).numpy()  # exact in float32
        return images

    images = cached_array(f"imagenet-{split}", [table, *files], decode)
    return images, np.array([int(row[1]) for row in rows], dtype=np.int64)
