"""STS benchmark: the all-MiniLM-L6-v2 sentence encoder.

Dev validates, test tests; the 512 sentences of 256 training pairs calibrate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from autoquant.task import Array, Task
from data import Batches, chosen, data_path, loader

CALIBRATION_PAIRS, BATCH_PAIRS = 256, 32


def minilm(seed: int = 0) -> Task:
    """MiniLM-L6 (22,565,376 parameters): float Spearman 0.8672 on dev, 0.8203 on test.

    Inputs ``ids`` and ``mask``, int64 (N, sequence); rows 2i and 2i + 1 are the sentences of
    pair i. Outputs (N, 384), unit length.
    """
    model, tokenizer = loader("minilm_l6").load()

    def tokens(texts: list[str]) -> tuple[Array, Array]:
        ids, mask = tokenizer.batch(texts)
        return ids.numpy(), mask.numpy()

    def batches(split: str) -> Batches:
        pairs, scores = _pairs(split)
        make = _maker(tokens, pairs)
        return Batches(lambda part: (make(part), scores[part]), _by_length(pairs), BATCH_PAIRS)

    train, _ = _pairs("train")
    picked = [train[i] for i in chosen(len(train), CALIBRATION_PAIRS, seed)]
    return Task(
        name="minilm",
        model=model,
        example_inputs=tuple(map(torch.from_numpy, tokens(list(train[0])))),
        calibration=Batches(_maker(tokens, picked), _by_length(picked), BATCH_PAIRS),
        validation=batches("dev"),
        test=batches("test"),
        train=batches("train"),
        metric=sts_spearman,
        dynamic_axes={"ids": {1: "sequence"}, "mask": {1: "sequence"}},
    )


def sts_spearman(outputs: Array, targets: Array) -> float:
    """Spearman's rank correlation of the scores with the cosines of the pairs.

    ``outputs``: (2N, width), the sentences of a pair one after the other; ``targets``: (N,).
    NaN where all cosines are equal.
    """
    from scipy.stats import spearmanr

    unit = outputs / np.maximum(np.linalg.norm(outputs, axis=1, keepdims=True), 1e-12)
    cosines = (unit[0::2] * unit[1::2]).sum(axis=1)
    return float(spearmanr(cosines, targets).statistic)


def _maker(
    tokens: Callable[[list[str]], tuple[Array, Array]], pairs: list[tuple[str, str]]
) -> Callable[[Array], tuple[Array, Array]]:
    return lambda part: tokens([text for i in part for text in pairs[i]])


def _by_length(pairs: list[tuple[str, str]]) -> Array:
    """The rows sorted by the longer sentence, so that a batch has little padding."""
    return np.argsort([max(map(len, pair)) for pair in pairs], kind="stable")


def _pairs(split: str) -> tuple[list[tuple[str, str]], Array]:
    """The sentence pairs and their scores, 0…5."""
    lines = data_path("text", "stsb", f"{split}.tsv").read_text(encoding="utf-8").split("\n")
    rows = [line.split("\t") for line in lines[1:] if line]
    return [(row[1], row[2]) for row in rows], np.array([float(row[0]) for row in rows])
