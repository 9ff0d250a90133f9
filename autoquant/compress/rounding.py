"""Weight quantizers, and the bank that holds every layer at every width, made once.

A `Rounding` turns one weight matrix into integers and scales. The bank calls it for each
(weight, bits, granularity) that a search can ask for, in threads, and keeps the result; a
candidate is then assembled from the bank in milliseconds.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from autoquant.calibration import Calibration, Moments
from autoquant.candidate import LayerChoice
from autoquant.errors import CandidateError, nearest
from autoquant.graph import Graph, Layer
from autoquant.task import Array

# A width is stored as planes of 4, 2 and 1 bits: they fill bytes without straddling them.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers in the weight's own layout with their scales.

    ``values``: int8 (int16 for 16 bits), the shape of the weight. ``scale``: float32, one for
    each index of ``axis``, or of length 1 for a whole tensor. ``shift``: float32 a channel, to
    be added to the layer's bias; None where there is none. ``error``: mean squared error of
    the weights, each weighted by the second moment of its input where that is known (the
    moments are scaled to a mean of 1).
    """

    values: Array
    scale: Array
    bits: int
    axis: int
    shift: Array | None = None
    error: float = 0.0

    @cached_property
    def planes(self) -> tuple[Array, ...]:
        """The bit planes as uint8, padded to a multiple of 8 weights; see `pack`."""
        return pack(self.values, self.bits)

    def dequantized(self) -> Array:
        """The float32 weight that the integers stand for."""
        scale = broadcast_scale(self.scale, self.axis, self.values.ndim)
        return np.asarray(self.values.astype(np.float32) * scale)


def broadcast_scale(scale: Array, axis: int, rank: int) -> Array:
    """Scales shaped to multiply a weight of ``rank`` axes."""
    shaped: Array = scale.reshape([-1 if i == axis else 1 for i in range(rank)])
    return shaped


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest weight integer: all codes below 8 bits, symmetric from 8 on."""
    top = 2 ** (bits - 1)
    return (-top, top - 1) if bits < 8 else (1 - top, top - 1)


def pack(values: Array, bits: int) -> tuple[Array, ...]:
    """Pack integers of 2…7 bits into uint8 planes, high bits first, low index in low bits.

    ``values`` are signed, any shape; they are offset by 2^(bits-1), flattened in C order and
    padded to a multiple of 8. Each plane of p bits has shape (count·p/8, 1).
    """
    unsigned = values.reshape(-1).astype(np.int16) + 2 ** (bits - 1)
    unsigned = np.pad(unsigned, (0, -len(unsigned) % 8)).astype(np.uint8)
    planes, shift = [], bits
    for width in PLANES[bits]:
        shift -= width
        fields = ((unsigned >> shift) & (2**width - 1)).reshape(-1, 8 // width)
        places = np.arange(0, 8, width, dtype=np.uint8)
        planes.append(np.bitwise_or.reduce(fields << places, axis=1)[:, None].astype(np.uint8))
    return tuple(planes)


def unpack(planes: Iterable[Array], bits: int, count: int) -> Array:
    """The first ``count`` signed int8 integers of ``pack``'s planes, flat."""
    joined = None
    for plane, width in zip(planes, PLANES[bits], strict=True):
        places = np.arange(0, 8, width, dtype=np.uint8)
        fields = ((plane.reshape(-1, 1) >> places) & (2**width - 1)).reshape(-1)
        joined = fields if joined is None else (joined << width) | fields
    assert joined is not None
    signed: Array = (joined.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return signed[:count]


class Rounding(Protocol):
    """Weights and what is known of their inputs → integers and scales."""

    needs_moments: bool

    def __call__(
        self, weight: Array, bits: int, granularity: str, moments: Moments | None
    ) -> tuple[Array, Array]:
        """``weight``: (channels, K) float32. Returns integers of that shape (int16) and
        float32 scales of length ``channels``, or 1 for granularity ``tensor``."""
        ...


class Nearest:
    """Round to nearest with, for each channel, the scale of least squared error."""

    needs_moments = False

    def __call__(
        self, weight: Array, bits: int, granularity: str, moments: Moments | None = None
    ) -> tuple[Array, Array]:
        """See `Rounding`; the moments are not used."""
        rows = weight if granularity == "channel" else weight.reshape(1, -1)
        scale = least_squares_scale(rows, bits)
        low, high = integer_range(bits)
        values = np.clip(np.round(rows / scale[:, None]), low, high).astype(np.int16)
        return values.reshape(weight.shape), scale


def least_squares_scale(rows: Array, bits: int, weights: Array | None = None) -> Array:
    """Scale of every row with the least (weighted) squared rounding error.

    A search over clip points, each refined to the least-squares scale of its integers.
    ``weights``: importance of each element, shape of ``rows``.
    """
    low, high = integer_range(bits)
    peak = np.abs(rows).max(axis=1)
    peak = np.where(peak > 1e-30, peak, 1.0).astype(np.float32)
    if bits >= 8:
        return peak / high
    target = rows if weights is None else rows * weights
    best = np.ones(len(rows), np.float32)
    least = np.full(len(rows), np.inf)
    for factor in np.linspace(1.0, {2: 0.125, 3: 0.35, 4: 0.5}.get(bits, 0.7), 28):
        scale = np.float32(factor) * peak / np.float32(high)
        code = np.clip(np.round(rows / scale[:, None]), low, high)
        heavy = code if weights is None else code * weights
        norm = np.einsum("ij,ij->i", code, heavy)  # the least-squares scale for these codes
        fitted = np.einsum("ij,ij->i", code, target) / np.maximum(norm, 1e-30)
        scale = np.where((norm > 0) & (fitted > 0), fitted, scale).astype(np.float32)
        code = np.clip(np.round(rows / scale[:, None]), low, high)
        gap = (rows - code * scale[:, None]) ** 2
        error = (gap if weights is None else gap * weights).sum(axis=1)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best.astype(np.float32)


class SecondOrder:
    """Round so that the layer's *output* changes least: ``tr((W − W_q) H (W − W_q)ᵀ)``.

    H is the (centred) second moment of the layer's inputs. Columns are rounded in the order of
    their moments, and each error is fed to the columns that follow (GPTQ, Frantar et al. 2022);
    then sweeps of coordinate descent move each integer to the best one given all others. The
    scale of a row minimizes its error weighted by the moments' diagonal. Without moments it
    falls back to `Nearest`. Memory: rows go in blocks of at most ``block_bytes``; for K inputs
    the rest is a few K×K matrices of float32 (4,096 wide: under 1 GB in all).
    """

    needs_moments = True

    def __init__(self, damping: float = 0.01, sweeps: int = 3, block_bytes: int = 64 << 20) -> None:
        self.damping, self.sweeps, self.block_bytes = damping, sweeps, block_bytes

    def __call__(
        self, weight: Array, bits: int, granularity: str, moments: Moments | None = None
    ) -> tuple[Array, Array]:
        """See `Rounding`."""
        if moments is None or bits > 8:
            return Nearest()(weight, bits, granularity, moments)
        groups, inputs = moments.mean.shape
        second = moments.centred()
        rows = weight.reshape(groups, -1, inputs)
        diagonal = np.einsum("gkk->gk", second)
        floor = 1e-6 * diagonal.max(initial=1e-30) + 1e-30
        importance = np.maximum(diagonal, floor)[:, None, :]
        weighted = np.broadcast_to(importance, rows.shape).reshape(weight.shape)
        if granularity == "channel":
            scale = least_squares_scale(weight, bits, weighted)
        else:
            flat = (weight.reshape(1, -1), bits, weighted.reshape(1, -1))
            scale = least_squares_scale(*flat)
        row_scale = np.broadcast_to(scale, len(weight)).reshape(groups, -1)
        values = np.empty(rows.shape, np.int16)
        block = max(1, self.block_bytes // (16 * inputs))
        for group in range(groups) if inputs > 64 else (slice(None),):
            part = slice(group, group + 1) if isinstance(group, int) else group
            for start in range(0, rows.shape[1], block):
                take = slice(start, start + block)
                values[part, take] = self._round(
                    rows[part, take], row_scale[part, take], second[part], bits
                )
        return values.reshape(weight.shape), scale

    def _round(self, rows: Array, scale: Array, second: Array, bits: int) -> Array:
        """Integers of (groups, rows, K) weights under (groups, K, K) moments."""
        import torch

        low, high = integer_range(bits)
        w = torch.from_numpy(np.array(rows, dtype=np.float32))
        s = torch.from_numpy(np.array(scale, dtype=np.float32))
        h = torch.from_numpy(np.array(second))
        mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)
        h = h + torch.diag_embed((self.damping * mean)[:, None].expand(-1, h.shape[1]))
        order = h.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True)
        h = h[:, order][:, :, order]
        w = w[:, :, order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        factor = torch.linalg.cholesky(inverse, upper=True).float()
        hessian = h.float()
        left = w.clone()
        q = torch.empty_like(w)
        count = w.shape[2]
        for start in range(0, count, 128):
            end = min(start + 128, count)
            errors = torch.empty_like(left[:, :, start:end])
            for j in range(start, end):
                column = left[:, :, j]
                q[:, :, j] = torch.clamp(torch.round(column / s), low, high)
                error = (column - q[:, :, j] * s) / factor[:, j, j, None]
                errors[:, :, j - start] = error
                left[:, :, j:end] -= error[:, :, None] * factor[:, None, j, j:end]
            left[:, :, end:] -= errors @ factor[:, start:end, end:]
        residual = w - q * s[:, :, None]
        slope = residual @ hessian
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        for _ in range(self.sweeps):
            for start in range(0, count, 128):
                end = min(start + 128, count)
                moves = torch.zeros_like(q[:, :, start:end])
                local = slope[:, :, start:end].clone()
                for j in range(start, end):
                    step = local[:, :, j - start] / (diagonal[:, j, None] * s)
                    best = torch.clamp(torch.round(q[:, :, j] + step), low, high)
                    move = (best - q[:, :, j]) * s
                    q[:, :, j] = best
                    moves[:, :, j - start] = move
                    local -= move[:, :, None] * hessian[:, None, j, start:end]
                slope -= moves @ hessian[:, start:end]
        result = torch.empty_like(q)
        result[:, :, order] = q
        return result.numpy().astype(np.int16)


ROUNDINGS: dict[str, Rounding] = {"nearest": Nearest(), "second-order": SecondOrder()}


def _key(layer: Layer, choice: LayerChoice) -> tuple[str, int, int, str]:
    """What an entry depends on; layers may share a weight along different axes."""
    return layer.weight, layer.channel_axis, choice.weight_bits, choice.granularity


def takes_bias(layer: Layer) -> bool:
    """Whether a shift of the layer's output can be stored: it has a bias or may get one."""
    return layer.kind in ("Conv", "Gemm") or (layer.kind == "MatMul" and layer.bias is not None)


def _correct(weight: Array, values: Array, scale: Array, moments: Moments) -> tuple[Array, Array]:
    """Scales with a gain, and the shift of the bias: each output keeps its spread and mean.

    ``gain² = W H Wᵀ / W_q H W_qᵀ`` a channel, within [0.5, 2] (a whole tensor: none);
    ``shift = (W − W_q)·E[x]`` (Nagel et al. 2019, section 4.2).
    """
    groups, inputs = moments.mean.shape
    second = moments.centred()

    def grouped(matrix: Array) -> Array:
        return matrix.reshape(groups, -1, inputs)

    def spread(matrix: Array) -> Array:
        found = grouped(matrix)
        total: Array = np.einsum("grk,grk->gr", found @ second, found)
        return total.reshape(-1)

    rounded = values * scale.reshape(-1, 1).astype(np.float64)
    if len(scale) == len(weight):
        after = spread(rounded)
        ratio = np.where(after > 1e-30, spread(weight) / np.maximum(after, 1e-30), 1.0)
        gain = np.clip(np.sqrt(np.maximum(ratio, 0.0)), 0.5, 2.0)
        scale = (scale * gain).astype(np.float32)
        rounded = values * scale[:, None].astype(np.float64)
    shift = np.einsum("grk,gk->gr", grouped(weight - rounded), moments.mean)
    return scale, shift.reshape(-1).astype(np.float32)


def _weighted_error(weight: Array, rounded: Array, moments: Moments | None) -> float:
    """Error of the layer's output for each weight, in units of the mean squared input."""
    gap = weight - rounded
    if moments is None:
        return float((gap**2).mean())
    groups, inputs = moments.mean.shape
    second = moments.centred()
    unit = float(np.einsum("gkk->gk", second).mean()) or 1.0
    grouped = gap.reshape(groups, -1, inputs)
    return float(((grouped @ second) * grouped).sum() / unit / gap.size)


class Bank:
    """Quantized weights by layer and choice: built ahead or on demand, kept for good.

    Thread-safe; pickles with what it holds, so that workers get it complete.
    """

    def __init__(
        self, graph: Graph, rounding: str = "nearest", calibration: Calibration | None = None
    ) -> None:
        if rounding not in ROUNDINGS:
            raise CandidateError(f"rounding {rounding!r}: {nearest(rounding, ROUNDINGS)}")
        self.graph = graph
        self.rounding = rounding
        self.calibration = calibration
        self._shared = Counter(layer.weight for layer in graph.layers)
        self._store: dict[tuple[str, int, int, str], QuantizedWeight] = {}
        self._lock = threading.Lock()

    def get(self, layer: Layer, choice: LayerChoice) -> QuantizedWeight:
        """The layer's integers at ``choice.weight_bits`` (2…8, or 16 with ``int16``)."""
        key = _key(layer, choice)
        found = self._store.get(key)
        if found is None:
            found = self._quantize(layer, choice)
            with self._lock:
                found = self._store.setdefault(key, found)
        return found

    def build(
        self, choices: Iterable[tuple[Layer, LayerChoice]], workers: int = 1
    ) -> tuple[int, int]:
        """Make every entry that ``choices`` needs; returns entries held and their bytes."""
        todo = {
            _key(layer, c): (layer, c)
            for layer, c in choices
            if c.weight_bits <= 8 or (c.weight_bits == 16 and c.int16)
        }
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for entry in pool.map(lambda item: self.get(*item), todo.values()):
                if entry.bits < 8:
                    entry.planes  # noqa: B018  packs now rather than in the first trial
        return len(self._store), sum(e.values.nbytes for e in self._store.values())

    def _quantize(self, layer: Layer, choice: LayerChoice) -> QuantizedWeight:
        weight = self.graph.array(layer.weight)
        rows = np.moveaxis(weight, layer.channel_axis, 0)
        matrix = np.ascontiguousarray(rows.reshape(rows.shape[0], -1))
        moments = self.calibration.moments.get(layer.name) if self.calibration else None
        if layer.kind == "ConvTranspose" or self._shared[layer.weight] > 1:
            moments = None  # one weight, several inputs
        if moments is not None and not takes_bias(layer):
            moments = Moments(moments.second, np.zeros_like(moments.mean), moments.samples)
        rounding = ROUNDINGS[self.rounding]
        values, scale = rounding(matrix, choice.weight_bits, choice.granularity, moments)
        shift = None
        if moments is not None and rounding.needs_moments and choice.weight_bits <= 8:
            scale, shift = _correct(matrix, values, scale, moments)
            shift = shift if takes_bias(layer) else None
        rounded = values * scale.reshape(-1, 1).astype(np.float64)
        kind = np.int8 if choice.weight_bits <= 8 else np.int16
        values = np.moveaxis(values.reshape(rows.shape), 0, layer.channel_axis).astype(kind)
        return QuantizedWeight(
            np.ascontiguousarray(values),
            scale,
            choice.weight_bits,
            layer.channel_axis,
            shift,
            _weighted_error(matrix, rounded, moments),
        )

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "calibration")} | {
            "calibration": None
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
