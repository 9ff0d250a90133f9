"""The weight bank: every layer at every width, rounded once, packed and corrected.

The bank calls a `Rounding` for each (weight, bits, granularity) that a search can ask for, in
threads, and keeps the result; a candidate is then assembled from the bank in milliseconds.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autoquant.calibration import Calibration, Moments
from autoquant.candidate import LayerChoice, block_size
from autoquant.compress.rounding import ROUNDINGS, blocks, scale_of_weights
from autoquant.errors import CandidateError, nearest
from autoquant.graph import Graph, Layer
from autoquant.task import Array

# A width is stored as planes of 4, 2 and 1 bits: they fill bytes without straddling them.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers in the weight's own layout with their scales.

    ``values``: int8 (int16 for 16 bits), the shape of the weight. ``scale``: float32, one for
    each index of ``axis``, or of length 1 for a whole tensor, or of shape (channels, blocks)
    where ``block`` inputs of a channel share one (in the order of `matrix`). ``shift``: float32
    a channel, to be added to the layer's bias; None where there is none. ``error``: mean squared
    error of the weights, each weighted by the second moment of its input where that is known (the
    moments are scaled to a mean of 1).
    """

    values: Array
    scale: Array
    bits: int
    axis: int
    shift: Array | None = None
    error: float = 0.0
    block: int = 0

    @cached_property
    def planes(self) -> tuple[Array, ...]:
        """The bit planes as uint8, padded to a multiple of 8 weights; see `pack`."""
        return pack(self.values, self.bits)

    @cached_property
    def half_scale(self) -> bool:
        """Whether the scales are stored as float16: those of blocks are, where it is exact."""
        return bool(self.block) and bool((self.scale.astype(np.float16) == self.scale).all())

    def dequantized(self) -> Array:
        """The float32 weight that the integers stand for."""
        if self.block:
            rows = self.matrix()
            matrix = rows * scale_of_weights(self.scale, rows.shape[1], self.block)
            shape = np.moveaxis(self.values, self.axis, 0).shape
            return np.ascontiguousarray(np.moveaxis(matrix.reshape(shape), 0, self.axis))
        scale = broadcast_scale(self.scale, self.axis, self.values.ndim)
        return np.asarray(self.values.astype(np.float32) * scale)

    def matrix(self) -> Array:
        """The integers as (channels, K)."""
        return np.moveaxis(self.values, self.axis, 0).reshape(self.values.shape[self.axis], -1)

    def packed_blocks(self) -> Array:
        """What MatMulNBits reads: uint8 (channels, blocks, block · bits / 8), low index in low
        bits, integers offset by 2^(bits-1) and the last block padded with zeros."""
        unsigned = blocks(self.matrix(), self.block).astype(np.int16) + 2 ** (self.bits - 1)
        fields = unsigned.astype(np.uint8).reshape(len(unsigned), -1, 8 // self.bits)
        places = np.arange(0, 8, self.bits, dtype=np.uint8)
        packed = np.bitwise_or.reduce(fields << places, axis=2)
        return np.asarray(packed.reshape(*self.scale.shape, -1))


def storable_scale(scale: Array, block: int) -> Array:
    """Scales of blocks rounded to float16, unless one is too small or too large for that.

    There are so many that float32 would add a bit a weight for blocks of 32.
    """
    half = np.finfo(np.float16)
    if not block or scale.min() < half.tiny or scale.max() > half.max:
        return scale
    return scale.astype(np.float16).astype(np.float32)


def broadcast_scale(scale: Array, axis: int, rank: int) -> Array:
    """Scales shaped to multiply a weight of ``rank`` axes."""
    shaped: Array = scale.reshape([-1 if i == axis else 1 for i in range(rank)])
    return shaped


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


def _key(layer: Layer, choice: LayerChoice) -> tuple[str, int, int, str]:
    """What an entry depends on; layers may share a weight along different axes."""
    return layer.weight, layer.channel_axis, choice.weight_bits, choice.granularity


def takes_bias(layer: Layer) -> bool:
    """Whether a shift of the layer's output can be stored: it has a bias or may get one."""
    return layer.kind in ("Conv", "Gemm") or (layer.kind == "MatMul" and layer.bias is not None)


def output_spread(weight: Array, moments: Moments) -> tuple[Array, Array]:
    """Variance ``W H Wᵀ`` and mean ``W E[x]`` of every output of a (channels, K) weight."""
    groups, inputs = moments.mean.shape
    rows = weight.reshape(groups, -1, inputs)
    variance = np.einsum("grk,grk->gr", rows @ moments.centred(), rows)
    mean = np.einsum("grk,gk->gr", rows, moments.mean)
    return variance.reshape(-1), mean.reshape(-1)


def take_spread_and_mean(
    values: Array, scale: Array, moments: Moments, variance: Array, mean: Array, block: int = 0
) -> tuple[Array, Array]:
    """Scales with a gain, and the bias shift: each output gets this variance and mean.

    The gain is within [0.5, 2] a channel; one scale a tensor has none. The mean is what Nagel
    et al. 2019 (section 4.2) correct. ``values``: (channels, K) integers.
    """
    rounded = values * scale_of_weights(scale, values.shape[1], block).astype(np.float64)
    if len(scale) == len(values):
        after, _ = output_spread(rounded, moments)
        ratio = np.where(after > 1e-30, variance / np.maximum(after, 1e-30), 1.0)
        gain = np.clip(np.sqrt(np.maximum(ratio, 0.0)), 0.5, 2.0)
        scale = (scale * (gain[:, None] if block else gain)).astype(np.float32)
        rounded = values * scale_of_weights(scale, values.shape[1], block).astype(np.float64)
    shift = mean - output_spread(rounded, moments)[1]
    return scale, shift.astype(np.float32)


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
        self.overrides: dict[str, QuantizedWeight] = {}  # by layer, for one candidate
        self._lock = threading.Lock()

    def get(self, layer: Layer, choice: LayerChoice) -> QuantizedWeight:
        """The layer's integers at ``choice.weight_bits`` (2…8, or 16 with ``int16``)."""
        if layer.name in self.overrides:
            return self.overrides[layer.name]
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

    def is_shared(self, layer: Layer) -> bool:
        """Whether several layers have this layer's weight."""
        return self._shared[layer.weight] > 1

    def overlay(self) -> Bank:
        """A bank over the same entries whose ``overrides`` are its own."""
        bank = Bank.__new__(Bank)
        bank.__dict__.update(self.__dict__)
        bank.overrides = {}
        return bank

    def _quantize(self, layer: Layer, choice: LayerChoice) -> QuantizedWeight:
        weight = self.graph.array(layer.weight)
        rows = np.moveaxis(weight, layer.channel_axis, 0)
        matrix = np.ascontiguousarray(rows.reshape(rows.shape[0], -1))
        moments = self.calibration.moments.get(layer.name) if self.calibration else None
        if layer.kind == "ConvTranspose" or self.is_shared(layer):
            moments = None  # one weight, several inputs
        if moments is not None and not takes_bias(layer):
            moments = Moments(moments.second, np.zeros_like(moments.mean), moments.samples)
        rounding = ROUNDINGS[self.rounding]
        values, scale = rounding(matrix, choice.weight_bits, choice.granularity, moments)
        shift, block = None, block_size(choice.granularity)
        if moments is not None and rounding.needs_moments and choice.weight_bits <= 8:
            kept = output_spread(matrix, moments)
            scale, found = take_spread_and_mean(values, scale, moments, *kept, block)
            shift = found if takes_bias(layer) else None
        scale = storable_scale(scale, block)
        rounded = values * scale_of_weights(scale, values.shape[1], block).astype(np.float64)
        kind = np.int8 if choice.weight_bits <= 8 else np.int16
        values = np.moveaxis(values.reshape(rows.shape), 0, layer.channel_axis).astype(kind)
        return QuantizedWeight(
            np.ascontiguousarray(values),
            scale,
            choice.weight_bits,
            layer.channel_axis,
            shift,
            _weighted_error(matrix, rounded, moments),
            block,
        )

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "calibration")} | {
            "calibration": None
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
