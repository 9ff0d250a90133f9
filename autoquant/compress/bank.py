"""The weight bank: every layer at every width, rounded once, packed and corrected.

The bank calls a `Rounding` for each (weight, bits, granularity) that a search can ask for, in
threads, and keeps the result; a candidate is then assembled from the bank in milliseconds.
Entries are a function of the network, the calibration's moments and the roundings' settings: by
a hash of these they are saved, and taken from an earlier run.
"""

from __future__ import annotations

import hashlib
import json
import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from autoquant.cache import write_atomically
from autoquant.calibration import Calibration, Moments
from autoquant.candidate import LayerChoice, block_size
from autoquant.compress.rounding import ROUNDINGS, Rounding, blocks, hessian, scale_of_weights
from autoquant.compress.sparsity import codebook, keep_mask
from autoquant.errors import CandidateError, ModelError, nearest
from autoquant.graph import Graph, Layer, attributes
from autoquant.task import Array

# A width is stored as planes of 4, 2 and 1 bits: they fill bytes without straddling them.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}

ALGORITHM = 3  # of roundings and corrections: saved entries of another are not taken


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers in the weight's own layout with their scales.

    ``values``: int8 (int16 for 16 bits), the shape of the weight. ``scale``: float32, one for
    each index of ``axis``, or of length 1 for a whole tensor, or of shape (channels, blocks)
    where ``block`` inputs of a channel share one (in the order of `matrix`). ``shift``: float32
    a channel, to be added to the layer's bias; None where there is none. ``error``: mean squared
    error of the weights, each weighted by the second moment of its input where that is known (the
    moments are scaled to a mean of 1). ``table``: int8, the 2^bits sorted values that ``values``
    has where a codebook holds them; None: the integers have ``bits`` themselves.
    """

    values: Array
    scale: Array
    bits: int
    axis: int
    shift: Array | None = None
    error: float = 0.0
    block: int = 0
    table: Array | None = None

    @cached_property
    def planes(self) -> tuple[Array, ...]:
        """The bit planes as uint8, padded to a multiple of 8 weights; see `pack`.

        With a table, those of the places in it.
        """
        if self.table is None:
            return pack(self.values, self.bits)
        places = np.searchsorted(self.table, self.values)
        return pack(places.astype(np.int16) - 2 ** (self.bits - 1), self.bits)

    @cached_property
    def coded_bytes(self) -> int:
        """What the integers take in an entropy code; see `coding.coded_bytes`."""
        from autoquant.compress.coding import coded_bytes

        return coded_bytes(self.values)

    @cached_property
    def half_scale(self) -> bool:
        """Whether the scales are stored as float16: those of blocks are, where it is exact."""
        return bool(self.block) and bool((self.scale.astype(np.float16) == self.scale).all())

    def dequantized(self, kind: type[np.floating[Any]] = np.float32) -> Array:
        """The weight that the integers stand for."""
        scales = self.scale.astype(kind)
        if self.block:
            rows = self.matrix()
            matrix = rows * scale_of_weights(scales, rows.shape[1], self.block)
            shape = np.moveaxis(self.values, self.axis, 0).shape
            return np.ascontiguousarray(np.moveaxis(matrix.reshape(shape), 0, self.axis))
        scale = broadcast_scale(scales, self.axis, self.values.ndim)
        return np.asarray(self.values.astype(kind) * scale)

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


class Key(NamedTuple):
    """What an entry depends on; layers may share a weight along different axes."""

    weight: str
    axis: int
    bits: int
    granularity: str
    rounding: str
    sparsity: float | str = 0.0
    codebook: bool = False


def as_rows(weight: Array, layer: Layer) -> Array:
    """A layer's weight as (channels, n), laid out as `Moments` says.

    A transposed convolution's (in, out/g, k…) becomes (out/g, g · k… · in/g): each kernel
    position multiplies the same inputs.
    """
    if layer.kind == "ConvTranspose":
        parts = weight.reshape(layer.group, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        rows = parts.transpose(2, 0, 3, 1)
    else:
        rows = np.moveaxis(weight, layer.channel_axis, 0)
    return np.ascontiguousarray(rows.reshape(rows.shape[0], -1))


def kernel_positions(layer: Layer) -> int:
    """How many weights of a row of `as_rows` that follow each other read one input channel."""
    return int(np.prod(layer.weight_shape[2:])) if layer.kind == "Conv" else 1


def as_weight(rows: Array, layer: Layer) -> Array:
    """Undo `as_rows`."""
    shape = layer.weight_shape
    if layer.kind == "ConvTranspose":
        taps = int(np.prod(shape[2:]))
        parts = rows.reshape(shape[1], layer.group, taps, shape[0] // layer.group)
        return np.ascontiguousarray(parts.transpose(1, 3, 0, 2).reshape(shape))
    axis = layer.channel_axis
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis))


def takes_bias(layer: Layer) -> bool:
    """Whether a shift of the layer's output can be stored: it has a bias or may get one."""
    if layer.kind == "MatMul":
        return layer.bias is not None
    return layer.kind in ("Conv", "ConvTranspose", "Gemm")


def output_spread(weight: Array, moments: Moments) -> tuple[Array, Array]:
    """Variance ``W H Wᵀ`` and mean ``W E[x]`` of every output of a (channels, n) weight.

    Where a channel has several vectors both are their sums.
    """
    rows = moments.split(weight)
    variance = np.concatenate([_squared(part, moments) for part in _parts(rows)], axis=1)
    mean = np.einsum("grk,gk->gr", rows, moments.mean)
    return moments.by_channel(variance, weight), moments.by_channel(mean, weight)


def _squared(rows: Array, moments: Moments) -> Array:
    """``r H rᵀ`` of every row of (groups, rows, K)."""
    found: Array = np.einsum("grk,grk->gr", rows @ moments.centred(), rows)
    return found


def _parts(rows: Array) -> list[Array]:
    """(groups, rows, K) in parts of rows whose products fit in memory."""
    step = max(1, (1 << 22) // (rows.shape[0] * rows.shape[2]))
    return [rows[:, start : start + step] for start in range(0, rows.shape[1], step)]


def _reach(layer: Layer, found: dict[str, Any]) -> Array:
    """Share of the outputs of a transposed convolution that each kernel position reaches."""
    kernel, rank = layer.weight_shape[2:], len(layer.weight_shape) - 2
    strides, dilations = (found.get(n, [1] * rank) for n in ("strides", "dilations"))
    share = np.ones(())
    for axis, size in enumerate(kernel):
        count, outputs = layer.input_shape[2 + axis], layer.output_shape[2 + axis]
        whole = strides[axis] * (count - 1) + (size - 1) * dilations[axis] + 1
        begin = found["pads"][axis] if "pads" in found else max(0, whole - outputs) // 2
        place = np.arange(count)[:, None] * strides[axis] + np.arange(size) * dilations[axis]
        inside = (place >= begin) & (place < begin + outputs)
        share = np.multiply.outer(share, inside.sum(0) / outputs)
    return share.reshape(-1)


def take_spread_and_mean(
    values: Array, scale: Array, moments: Moments, variance: Array, mean: Array, block: int = 0
) -> tuple[Array, Array]:
    """Scales with a gain, and the bias shift: each output gets this variance and mean.

    The gain is within [0.5, 2] a channel; one scale a tensor has none. The mean is what Nagel
    et al. 2019 (section 4.2) correct. ``values``: (channels, n) integers.
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
    second = moments.centred()
    unit = float(np.einsum("gkk->gk", second).mean()) or 1.0
    parts = _parts(moments.split(gap))
    return float(sum(((part @ second) * part).sum() for part in parts) / unit / gap.size)


def own_bias(graph: Graph, layer: Layer) -> Array:
    """The layer's bias in float32; zeros where it has none."""
    if layer.bias is None:
        return np.zeros(layer.channels, np.float32)
    return graph.array(layer.bias).reshape(-1)


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
        self._store: dict[Key, QuantizedWeight] = {}
        self._shifted: dict[tuple[str, Key], QuantizedWeight] = {}  # of layers that share a weight
        self.overrides: dict[str, QuantizedWeight] = {}  # by layer, for one candidate
        self.loaded = 0  # entries that came from files
        self._lock = threading.Lock()

    def get(self, layer: Layer, choice: LayerChoice) -> QuantizedWeight:
        """The layer's integers at ``choice.weight_bits`` (2…8, or 16 with ``int16``).

        Raises ModelError for weights or moments that are not finite.
        """
        if layer.name in self.overrides:
            return self.overrides[layer.name]
        key = self._key(layer, choice)
        found = self._shifted.get((layer.name, key)) or self._store.get(key)
        if found is None or self._lacks_shift(layer, key):
            found = self._make(layer, key, _Operand(self, layer))
        return found

    def build(
        self, choices: Iterable[tuple[Layer, LayerChoice]], workers: int = 1
    ) -> tuple[int, int]:
        """Make every entry that ``choices`` needs; returns entries held and their bytes.

        A thread makes all widths of one weight: they share what is derived from its moments.
        """
        jobs: dict[tuple[str, int], dict[tuple[str, Key], Layer]] = defaultdict(dict)
        for layer, key in self._keys(choices):
            if key not in self._store or self._lacks_shift(layer, key):
                jobs[key[:2]][layer.name, key] = layer

        def run(job: dict[tuple[str, Key], Layer]) -> None:
            operand = _Operand(self, next(iter(job.values())))
            for (_, key), layer in job.items():
                entry = self._make(layer, key, operand)
                if entry.bits < 8:
                    entry.planes  # noqa: B018  packs now rather than in the first trial

        largest_first = sorted(jobs.values(), key=lambda j: -next(iter(j.values())).parameters)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(run, largest_first))
        return len(self._store), sum(e.values.nbytes for e in self._store.values())

    def lacks(self, choices: Iterable[tuple[Layer, LayerChoice]]) -> bool:
        """Whether any entry that ``choices`` need is still to be made."""
        return any(key not in self._store for _, key in self._keys(choices))

    def _keys(self, choices: Iterable[tuple[Layer, LayerChoice]]) -> Iterator[tuple[Layer, Key]]:
        """The entries of those choices that have one."""
        for layer, c in choices:
            if c.weight_bits <= 8 or (c.weight_bits == 16 and c.int16):
                yield layer, self._key(layer, c)

    def _key(self, layer: Layer, choice: LayerChoice) -> Key:
        rounding = choice.rounding or self.rounding
        bits = choice.weight_bits
        return Key(
            layer.weight,
            layer.channel_axis,
            bits,
            choice.granularity,
            rounding,
            choice.sparsity,
            choice.codebook,
        )

    def _lacks_shift(self, layer: Layer, key: Key) -> bool:
        """Whether the layer shares its integers, has a shift of its own, and it is not made."""
        return (
            self.is_shared(layer)
            and self._takes_shift(layer, key)
            and (layer.name, key) not in self._shifted
        )

    def _takes_shift(self, layer: Layer, key: Key) -> bool:
        """Whether the layer's outputs are moved back to their mean."""
        known = self.calibration is not None and layer.name in self.calibration.moments
        needs = ROUNDINGS[key.rounding].needs_moments
        return known and needs and key.bits <= 8 and takes_bias(layer)

    def _make(self, layer: Layer, key: Key, operand: _Operand) -> QuantizedWeight:
        """The entry, made and kept where it is not there yet."""
        entry = self._store.get(key)
        if entry is None:
            entry = operand.quantize(key)
            if self._takes_shift(layer, key) and not self.is_shared(layer):
                entry = replace(entry, shift=operand.shift(layer, entry))
            with self._lock:
                entry = self._store.setdefault(key, entry)
        if not (self.is_shared(layer) and self._takes_shift(layer, key)):
            return entry
        shifted = replace(entry, shift=operand.shift(layer, entry))
        with self._lock:
            return self._shifted.setdefault((layer.name, key), shifted)

    def is_shared(self, layer: Layer) -> bool:
        """Whether several layers have this layer's weight."""
        return self._shared[layer.weight] > 1

    def overlay(self) -> Bank:
        """A bank over the same entries whose ``overrides`` are its own."""
        bank = Bank.__new__(Bank)
        bank.__dict__.update(self.__dict__)
        bank.overrides = {}
        return bank

    def content_key(self) -> str:
        """Hash of all that entries follow from: network, moments, roundings and versions."""
        settings = {name: (type(r).__name__, vars(r)) for name, r in ROUNDINGS.items()}
        about = [ALGORITHM, settings, *(version(name) for name in ("numpy", "torch"))]
        return hashlib.sha256(repr(about).encode() + self._inputs).hexdigest()

    @cached_property
    def _inputs(self) -> bytes:
        """Hash of the network and the moments."""
        digest = hashlib.sha256(self.graph.model.SerializeToString(deterministic=True))
        moments = self.calibration.moments if self.calibration else {}
        hashed: dict[int, bytes] = {}  # layers may share their moments
        for name, found in sorted(moments.items()):
            if id(found) not in hashed:
                part = hashlib.sha256(np.ascontiguousarray(found.second).data)
                part.update(np.ascontiguousarray(found.mean).data)
                hashed[id(found)] = part.digest()
            digest.update(name.encode() + b"\0" + hashed[id(found)])
        return digest.digest()

    def save(self, path: Path) -> None:
        """Write the entries with their content key as one ``.npz``. Raises OSError."""
        arrays, index = {}, []
        for i, (key, entry) in enumerate(
            sorted(self._store.items(), key=lambda item: str(item[0]))
        ):
            index.append({"key": list(key), "error": entry.error})
            arrays[f"{i}.values"], arrays[f"{i}.scale"] = entry.values, entry.scale
            for name in ("shift", "table"):
                if getattr(entry, name) is not None:
                    arrays[f"{i}.{name}"] = getattr(entry, name)
        text = json.dumps({"content": self.content_key(), "entries": index}).encode()
        arrays["index"] = np.frombuffer(text, np.uint8)
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))

    def load(self, path: Path) -> int:
        """Take the entries of a file that `save` wrote; returns how many.

        0 where there is none, it is damaged or its content is another.
        """
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                about = json.loads(file["index"].tobytes())
                if about["content"] != self.content_key():
                    return 0
                found = {
                    Key(*item["key"]): self._loaded(Key(*item["key"]), item["error"], i, file)
                    for i, item in enumerate(about["entries"])
                }
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error):
            return 0
        with self._lock:
            self.loaded += len(found.keys() - self._store.keys())
            self._store = {**found, **self._store}
        return len(found)

    def _loaded(self, key: Key, error: float, i: int, file: Any) -> QuantizedWeight:
        """One entry of a file. Raises ValueError where it does not fit the network."""
        values, scale = file[f"{i}.values"], file[f"{i}.scale"]
        shift = file.get(f"{i}.shift")
        shape, block = self.graph.array(key.weight).shape, block_size(key.granularity)
        channels = shape[key.axis]
        counts: tuple[int, ...] = (1 if key.granularity == "tensor" else channels,)
        if block:
            counts = (channels, -(-int(np.prod(shape)) // channels // block))
        kind = np.int8 if key.bits <= 8 else np.int16
        found = (values.shape, values.dtype, scale.shape, scale.dtype)
        if found != (shape, kind, counts, np.float32):
            raise ValueError(f"{key}: another shape or type")
        table = file.get(f"{i}.table")
        if (table is not None) != key.codebook:
            raise ValueError(f"{key}: another format")
        return QuantizedWeight(values, scale, key.bits, key.axis, shift, float(error), block, table)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "calibration")} | {
            "calibration": None
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class _Operand:
    """One weight as a rounding takes it: its matrix, and the moments of all that it multiplies.

    Layers that share the weight along one axis share its integers: their moments are averaged,
    with an embedding among them counted as white. Where the layers disagree about the layout,
    there are no moments. The mean of the inputs leaves the moments where a shift of the bias
    can undo it in every output: not in a transposed convolution, whose outputs see different
    kernel positions.
    """

    def __init__(self, bank: Bank, layer: Layer) -> None:
        self.graph, self.layer = bank.graph, layer
        self.found = bank.calibration.moments if bank.calibration else {}
        self.matrix = as_rows(bank.graph.array(layer.weight), layer)
        if not np.isfinite(self.matrix).all():
            raise ModelError(f"layer {layer.name!r}: its weight contains NaN or infinity")
        users = [
            x
            for x in bank.graph.layers
            if (x.weight, x.channel_axis) == (layer.weight, layer.channel_axis)
        ]
        self.moments = self._average(users)

    def _average(self, users: Sequence[Layer]) -> Moments | None:
        for layer in users:
            found = self.found.get(layer.name)
            if found is not None and not np.isfinite(found.second).all():
                raise ModelError(f"layer {layer.name!r}: the moments of its inputs are not finite")
        each = [self._of(layer) for layer in users if layer.name in self.found]
        if len(users) == 1 or not each:
            return each[0] if each else None
        alike = {(x.group, x.kind == "ConvTranspose") for x in users if x.name in self.found}
        if len(alike) > 1 or len({m.second.shape for m in each}) > 1:
            return None
        second = np.mean([m.centred() for m in each], axis=0)
        unseen = sum(x.kind == "Gather" for x in users)
        if unseen:
            white = np.einsum("gkk->gk", second).mean() * np.eye(second.shape[1])
            second = (len(each) * second + unseen * white) / (len(each) + unseen)
        samples = sum(m.samples for m in each)
        return Moments(second, np.zeros(second.shape[:2]), samples)

    def _of(self, layer: Layer) -> Moments:
        found = self.found[layer.name]
        stays = layer.kind == "ConvTranspose" or not takes_bias(layer)
        mean = np.zeros_like(found.mean) if stays else found.mean
        return Moments(found.second, mean, found.samples)

    def quantize(self, key: Key) -> QuantizedWeight:
        """The entry, without a shift.

        The blocks of a transposed convolution run across its kernel positions, so that they
        share inputs with other blocks: they are rounded without moments.
        """
        matrix, moments, rounding = self.matrix, self.moments, ROUNDINGS[key.rounding]
        block = block_size(key.granularity)
        across = bool(block) and self.layer.kind == "ConvTranspose"
        if across:
            weight = np.moveaxis(self.graph.array(self.layer.weight), key.axis, 0)
            matrix, moments = np.ascontiguousarray(weight.reshape(len(weight), -1)), None
        mask = None
        if key.sparsity:
            saliency = self._saliency(matrix, moments, rounding)
            mask = keep_mask(saliency, key.sparsity, kernel_positions(self.layer))
        table = None
        if key.codebook:
            values, scale, table = codebook(matrix, key.bits, moments, mask)
        else:
            values, scale = rounding(matrix, key.bits, key.granularity, moments, mask)
        if moments is not None and rounding.needs_moments and key.bits <= 8:
            kept = output_spread(matrix, moments)
            scale, _ = take_spread_and_mean(values, scale, moments, *kept, block)
        if not np.isfinite(scale).all():
            raise ModelError(
                f"layer {self.layer.name!r}: rounding to {key.bits} bits found no finite scale"
            )
        laid = as_weight(values, self.layer)
        if block and self.layer.kind == "ConvTranspose":
            laid = np.ascontiguousarray(np.moveaxis(values.reshape(weight.shape), 0, key.axis))
        entry = QuantizedWeight(
            laid.astype(np.int8 if key.bits <= 8 else np.int16),
            storable_scale(scale, block),
            key.bits,
            key.axis,
            block=block,
            table=table,
        )
        rounded = as_rows(entry.dequantized(np.float64), self.layer)
        return replace(entry, error=_weighted_error(self.matrix, rounded, self.moments))

    def _saliency(self, matrix: Array, moments: Moments | None, rounding: Rounding) -> Array:
        """What a weight does to its output, in units of the channel's weights: its square by the
        inverse Hessian's diagonal (Hassibi & Stork 1993), as `SecondOrder` feeds errors on; else
        its square. Channels count alike: their scales are BatchNorm's as much as theirs."""
        squares = matrix.astype(np.float64) ** 2
        squares /= np.maximum(squares.mean(1, keepdims=True), 1e-30)
        if moments is None or not rounding.needs_moments:
            return squares
        squared = moments.split(squares)
        groups = len(moments.mean)
        cost = np.empty((groups, 1, moments.mean.shape[1]))
        for group in range(groups):
            found = hessian(moments, 0.01, group)
            cost[group, 0, found.order.numpy()] = (
                1.0 / (found.factor[0] ** 2).sum(0).clamp_min(1e-30).numpy()
            )
        return moments.join(squared * cost, matrix)

    def shift(self, layer: Layer, entry: QuantizedWeight) -> Array:
        """What the layer's outputs lack in the mean, for every output channel, float32."""
        rounded = as_rows(entry.dequantized(np.float64), layer)
        lost = self._mean(layer, self.matrix) - self._mean(layer, rounded)
        return lost.astype(np.float32)

    def _mean(self, layer: Layer, matrix: Array) -> Array:
        """Mean of every output channel."""
        found = self.found[layer.name]
        if layer.kind != "ConvTranspose":
            mean: Array = np.einsum("grk,gk->gr", found.split(matrix), found.mean)
            return mean.reshape(-1)
        groups, inputs = found.mean.shape
        parts = matrix.reshape(layer.channels, groups, -1, inputs)
        reach = _reach(layer, attributes(self.graph.nodes[layer.node]))
        found_mean: Array = np.einsum("cgtk,gk,t->gc", parts, found.mean, reach)
        return found_mean.reshape(-1)
