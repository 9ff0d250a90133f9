"""Sparse and clustered weights: masks and codebooks."""

from __future__ import annotations

import numpy as np

from autoquant.calibration import Moments
from autoquant.candidate import parse_sparsity
from autoquant.task import Array


def keep_mask(scores: Array, sparsity: float | str, taps: int = 1) -> Array:
    """Which weights of a (channels, n) matrix stay: those of the highest scores.

    A ratio counts over the whole matrix; ``"N:M"`` keeps N of every M input channels in a row
    (of a rest that is shorter, N at most). n is input channels × ``taps``: kernel positions,
    each with groups of its own, as sparse tensor cores take them. Ties fall to the first.
    """
    wanted = parse_sparsity(sparsity)
    if isinstance(wanted, tuple):
        kept, of = wanted
        by_tap = scores.reshape(len(scores), -1, taps).swapaxes(1, 2)
        inputs = by_tap.shape[2]
        padded = np.full((*by_tap.shape[:2], -(-inputs // of) * of), -np.inf)
        padded[:, :, :inputs] = by_tap
        order = np.argsort(-padded.reshape(*by_tap.shape[:2], -1, of), axis=3, kind="stable")
        mask = np.zeros(order.shape, bool)
        np.put_along_axis(mask, order[..., :kept], True, axis=3)
        found: Array = mask.reshape(padded.shape)[:, :, :inputs].swapaxes(1, 2)
        return np.ascontiguousarray(found.reshape(scores.shape))
    flat: Array = np.ones(scores.size, bool)
    flat[np.argsort(scores.reshape(-1), kind="stable")[: round(wanted * scores.size)]] = False
    return flat.reshape(scores.shape)


def kmeans(values: Array, clusters: int, weights: Array | None = None) -> Array:
    """Centres of least weighted squared distance to the values, sorted; Lloyd's algorithm.

    One dimension, started at quantiles of the values, so nothing is random. Returns float64,
    at most ``clusters``: fewer where there are fewer different values.
    """
    order = np.argsort(values, axis=None, kind="stable")
    x = np.asarray(values, np.float64).reshape(-1)[order]
    w = np.ones(x.size) if weights is None else np.asarray(weights, np.float64).reshape(-1)[order]
    different = np.unique(x)
    if len(different) <= clusters:
        return different
    mass, moment = np.cumsum(w), np.cumsum(w * x)
    total = np.concatenate([[0.0], mass]), np.concatenate([[0.0], moment])
    linear = np.linspace(x[0], x[-1], clusters)  # as Deep Compression: large weights keep theirs
    spread = x[np.minimum((np.arange(clusters) + 0.5) / clusters * x.size, x.size - 1).astype(int)]
    centres = 0.5 * (linear + spread)
    for _ in range(300):
        edges = np.searchsorted(x, 0.5 * (centres[1:] + centres[:-1]))
        bounds = np.concatenate([[0], edges, [x.size]])
        share = np.diff(total[0][bounds])
        means = np.diff(total[1][bounds]) / np.where(share > 0, share, 1.0)
        moved = np.where(share > 0, means, centres)
        if np.allclose(moved, centres, rtol=1e-9, atol=0):
            break
        centres = np.sort(moved)
    return np.asarray(centres)


def codebook(
    weight: Array, bits: int, moments: Moments | None = None, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """k-means of a (channels, n) weight in units of each channel's size, on the int8 grid.

    Squared errors count by the second moment of their input where ``moments`` are known; zero
    is one of the values where there is a ``mask``. Returns (integers int16, scale float32 a
    channel, table int8 of 2^bits sorted values).
    """
    rows = np.where(mask, weight, 0.0) if mask is not None else weight
    rows = rows.astype(np.float64)
    size = np.sqrt((rows**2).sum(1) / np.maximum((rows != 0).sum(1), 1))
    size = np.where(size > 0, size, 1.0)[:, None]
    importance = np.broadcast_to(size**2, rows.shape)
    if moments is not None:
        diagonal = np.einsum("gkk->gk", moments.centred())[:, None, :]
        of_rows = np.broadcast_to(diagonal, moments.split(rows).shape)
        importance = importance * np.maximum(moments.join(of_rows, rows), 1e-9 * diagonal.max())
    unit = rows / size
    kept = np.ones(rows.shape, bool) if mask is None else np.asarray(mask, bool)
    count = 2**bits - (mask is not None)
    centres = kmeans(unit[kept], count, importance[kept]) if kept.any() else np.zeros(1)
    step = max(np.abs(centres).max() / 127.0, 1e-12)
    found = np.round(centres / step)
    if mask is not None:
        found = np.append(found, 0.0)
    found = np.unique(found).astype(np.int8)
    table = np.concatenate([found, np.full(2**bits - len(found), found[-1], np.int8)])
    middles = 0.5 * (found[1:].astype(np.float64) + found[:-1])
    values = found[np.searchsorted(middles, unit / step)].astype(np.int16)
    values = np.where(kept, values, 0).astype(np.int16)
    return values, (size[:, 0] * step).astype(np.float32), table


def gradual(sparsity: float, done: float) -> float:
    """The share of zeros when ``done`` (0 to 1) of the pruning is over: it grows with the cube
    of what is left, fast while many weights matter little (Zhu & Gupta 2017)."""
    return sparsity * (1 - (1 - min(1.0, done)) ** 3)
