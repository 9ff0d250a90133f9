"""One pass of the float graph over the calibration data: ranges, second moments, outputs.

Everything is accumulated batch by batch; no activation outlives its batch. Memory: a batch's
activations (bounded by splitting it), a histogram a tensor, K×K float64 for each layer with K
inputs to an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from autoquant.errors import ModelError, TaskError, nearest
from autoquant.graph import PRODUCT, Graph, Layer, attributes
from autoquant.runtime import OnnxRuntime, OnnxSession
from autoquant.task import Array, Split

METHODS = ("minmax", "percentile", "mse", "entropy", "downstream")
WIDTHS = (4, 6, 8)  # that ``downstream`` finds ranges for
BINS = 8192
_BATCH_BYTES = 256 << 20  # of activations at a time
_POSITIONS = 1 << 13  # of an input that its second moments see at least, where there are as many
_COLUMNS = 1 << 18  # numbers a layer that ``downstream`` judges ranges on
_SAMPLE = 1 << 16  # histogram samples a tensor and batch; minimum and maximum see every element


@dataclass(slots=True)
class Histogram:
    """Counts over ``BINS`` equal bins of [-limit, limit], with the exact minimum and maximum.

    ``limit`` doubles (bins merge in pairs) when a later batch is larger.
    """

    minimum: float = float("inf")
    maximum: float = float("-inf")
    limit: float = 0.0
    counts: Array = field(default_factory=lambda: np.zeros(BINS))

    def add(self, values: Array) -> None:
        """Count ``values`` (any shape, finite): a strided sample, extremes over all."""
        flat = values.reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("NaN or infinity")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        peak = max(abs(low), abs(high))
        if self.limit == 0.0:
            self.limit = 2.0 ** np.ceil(np.log2(max(peak, 1e-30)))
        while peak > self.limit:
            half = BINS // 4
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros(BINS)
            self.counts[half : 3 * half] = merged
            self.limit *= 2
        step = max(1, flat.size // _SAMPLE) | 1  # odd: does not alias with channel counts
        index = (flat[::step].astype(np.float64) + self.limit) * (BINS / (2 * self.limit))
        index = np.clip(index.astype(np.int64), 0, BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    def centers(self) -> tuple[Array, Array]:
        """Centres and counts of the bins that hold anything, centres inside the extremes."""
        used = np.flatnonzero(self.counts)
        width = 2 * self.limit / BINS
        centers = np.clip((used + 0.5) * width - self.limit, self.minimum, self.maximum)
        return centers, self.counts[used]

    def range(self, method: str, bits: int) -> tuple[float, float]:
        """The range to quantize to with ``bits``; it always contains zero.

        ``minmax``; ``percentile``: 99.99 % of the values; ``mse``: least squared error at
        these bits (Choukroun et al. 2019); ``entropy``: least KL divergence (Migacz 2017);
        ``downstream``: as ``mse``, for tensors that no layer reads.
        """
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        if not np.isfinite(low) or high - low < 1e-12:
            return 0.0, max(high, 1e-6)
        centers, counts = self.centers()
        if method == "minmax" or bits > 8 or len(centers) < 2:
            return low, high
        if method == "percentile":
            share = np.cumsum(counts) / counts.sum()
            first = centers[np.searchsorted(share, 5e-5)]
            last = centers[min(int(np.searchsorted(share, 1 - 5e-5)), len(centers) - 1)]
            return min(float(first), 0.0), max(float(last), 1e-6 if low == 0 else 0.0)
        error = _divergence if method == "entropy" else _squared_error
        levels = 2**bits - 1
        best = (low, high)
        least = error(centers, counts, low, high, levels)
        shrink = np.linspace(1.0, 0.15 if bits < 8 else 0.4, 40)[1:]
        for side in ("both", "low", "high") if low < 0 < high else ("both",):
            start = best
            for factor in shrink:
                trial = (
                    start[0] * (factor if side != "high" else 1.0),
                    start[1] * (factor if side != "low" else 1.0),
                )
                value = error(centers, counts, *trial, levels)
                if value < least:
                    least, best = value, trial
        return best


def _squared_error(x: Array, weight: Array, low: float, high: float, levels: int) -> float:
    scale = (high - low) / levels
    quantized = np.clip(np.round((x - low) / scale), 0, levels) * scale + low
    return float(weight @ (x - quantized) ** 2)


def _divergence(x: Array, weight: Array, low: float, high: float, levels: int) -> float:
    """KL of the histogram from its quantized self; what is clipped counts at the edges."""
    scale = (high - low) / levels
    level = np.clip(np.round((x - low) / scale), 0, levels).astype(np.int64)
    mass = np.bincount(level, weight, minlength=levels + 1)
    inside = (x >= low) & (x <= high)
    bins = np.bincount(level, inside, minlength=levels + 1)
    spread = mass[level] / np.maximum(bins[level], 1)
    p = weight / weight.sum()
    q = np.where(inside, spread, 1e-9 * weight)
    q = np.maximum(q / q.sum(), 1e-12)
    return float((p * np.log(p / q)).sum())


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of what a layer's weights multiply.

    ``second``: E[x xᵀ], shape (groups, K, K); ``mean``: E[x], shape (groups, K); K is the
    inputs of one output (k·k·I/g for a convolution, I/g for a transposed one, whose kernel
    positions all see the same vectors). ``samples``: positions seen. What is derived from
    them is kept with them.

    They fit a (channels, n) weight in two ways. With n = K each channel belongs to one group,
    group by group. Otherwise every channel has n / K vectors that share its scale: for each
    group, ``taps`` of them.
    """

    second: Array
    mean: Array
    samples: int
    kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def centred(self) -> Array:
        """Covariance E[x xᵀ] − E[x] E[x]ᵀ, shape (groups, K, K); do not write to it.

        The rows and columns of an input whose variance is lost in float32 rounding (below a
        millionth of its square) are zero: it is a constant.
        """
        if "centred" not in self.kept:
            found = self.mean[:, :, None] * self.mean[:, None, :]
            np.subtract(self.second, found, out=found)
            square = np.einsum("gkk->gk", self.second)
            constant = np.einsum("gkk->gk", found) <= 1e-6 * square
            if constant.any():
                for group, unused in zip(found, constant, strict=True):
                    group[unused] = 0.0
                    group[:, unused] = 0.0
            self.kept["centred"] = found
        kept: Array = self.kept["centred"]
        return kept

    def taps(self, weight: Array) -> int:
        """Vectors of each channel in each group; 0 where a channel is one vector of one group."""
        groups, inputs = self.mean.shape
        return 0 if weight.shape[1] == inputs else weight.shape[1] // (groups * inputs)

    def split(self, weight: Array) -> Array:
        """A (channels, n) weight as (groups, rows, K): the rows are what multiplies inputs."""
        groups, inputs = self.mean.shape
        if weight.shape[1] == inputs or groups == 1:
            return weight.reshape(groups, -1, inputs)
        rows = np.moveaxis(weight.reshape(len(weight), groups, -1, inputs), 1, 0)
        return rows.reshape(groups, -1, inputs)

    def join(self, rows: Array, weight: Array) -> Array:
        """Undo `split`: (groups, rows, K) in the shape of ``weight``."""
        groups, inputs = self.mean.shape
        if weight.shape[1] == inputs or groups == 1:
            return rows.reshape(weight.shape)
        parts = rows.reshape(groups, len(weight), -1, inputs)
        return np.moveaxis(parts, 0, 1).reshape(weight.shape)

    def by_row(self, channels: Array, weight: Array) -> Array:
        """One value a channel of ``weight`` → one a row of `split`, (groups, rows)."""
        groups, inputs = self.mean.shape
        if weight.shape[1] == inputs:
            return channels.reshape(groups, -1)
        return np.tile(np.repeat(channels, self.taps(weight)), (groups, 1))

    def by_channel(self, rows: Array, weight: Array) -> Array:
        """One value a row of `split`, (groups, rows) → their sum for each channel."""
        if weight.shape[1] == self.mean.shape[1]:
            return rows.reshape(-1)
        summed: Array = rows.reshape(len(rows), len(weight), -1).sum(axis=(0, 2))
        return summed


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one pass over the calibration data found.

    ``histograms``: by tensor name. ``moments``: by layer name, empty unless asked for.
    ``outputs``: the float network's outputs on the calibration inputs, for each output one
    array a batch (a dynamic axis may differ).
    """

    histograms: dict[str, Histogram]
    moments: dict[str, Moments]
    outputs: tuple[tuple[Array, ...], ...]
    samples: int
    method: str = "mse"
    _ranges: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)

    def without_moments(self) -> Calibration:
        """The same without second moments, which only the weight bank needs."""
        return replace(self, moments={})

    def with_ranges(self, ranges: Mapping[tuple[str, int], tuple[float, float]]) -> Calibration:
        """The same with other ranges of some tensors at some bits."""
        return replace(self, _ranges={**self._ranges, **ranges})

    def range(self, tensor: str, bits: int) -> tuple[float, float]:
        """The calibrated range of an activation tensor; contains zero. Kept once found."""
        key = (tensor, bits)
        if key not in self._ranges:
            self._ranges[key] = self.histograms[tensor].range(self.method, bits)
        return self._ranges[key]


def calibrate(
    graph: Graph,
    split: Split,
    *,
    method: str = "mse",
    moments: bool = False,
    widths: Sequence[int] = WIDTHS,
    threads: int = 0,
) -> Calibration:
    """Run the float graph once over ``split``. Raises TaskError where data does not fit.

    ``widths``: activation bits that ``downstream`` finds ranges for; it takes other widths'
    ranges from the histogram, as ``mse`` does.
    """
    if method not in METHODS:
        raise TaskError(f"calibration method {method!r}: {nearest(method, METHODS)}")
    tensors = [n for n in _activations(graph) if n not in graph.inputs]
    tensors.sort(key=graph.producer.__getitem__)  # the first that overflows is named
    inputs = [n for n in graph.inputs if graph.tensors[n].dtype == "float32"]
    session = _open(graph, tensors, threads)
    histograms = {name: Histogram() for name in [*inputs, *tensors]}
    sums: dict[str, _MomentSum] = {}
    if moments:
        shared: dict[str, _MomentSum] = {}  # layers that see the same vectors share the sum
        rows_in_all = sum(b[0].shape[0] for b in split.batches)
        for layer in graph.layers:
            if layer.kind != "Gather":
                columns = Columns(layer, graph, rows_in_all)
                sums[layer.name] = shared.setdefault(columns.key, _MomentSum(columns))
    judges: dict[str, _Downstream] = {}
    if method == "downstream":
        judges = {n: _Downstream(graph, n, split) for n in histograms if _readers(graph, n)}
    distinct = list({id(s): s for s in sums.values()}.values())
    outputs: list[list[Array]] = []
    per_sample = 4 * sum(graph.tensors[n].elements for n in tensors)
    rows = max(1, min(256, _BATCH_BYTES // max(1, per_sample)))
    samples = 0
    for batch in rebatch(split.batches, fixed_batch(graph) or rows, exact=bool(fixed_batch(graph))):
        try:
            values = session.run(batch)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise TaskError(f"{split.name} data: the network cannot run it: {reason}") from None
        found = dict(zip(session.output_names, values, strict=True))
        found |= dict(zip(graph.inputs, batch, strict=True))
        samples += batch[0].shape[0]
        for name, histogram in histograms.items():
            try:
                histogram.add(found[name])
            except ValueError:
                raise ModelError(
                    f"tensor {name!r} is NaN or infinite on the {split.name} data"
                ) from None
        for total in distinct:
            total.add(found[total.columns.layer.input])
        for name, judge in judges.items():
            judge.add(found[name])
        # copies: an output that is kept keeps all memory that its session has allocated
        outputs.append([found[name].copy() for name in graph.outputs])
    by_output = tuple(zip(*outputs, strict=True))
    ranges = {
        (name, bits): judge.range(histograms[name], bits)
        for name, judge in judges.items()
        for bits in widths
        if bits <= 8
    }
    results = {id(total): total.result() for total in distinct}
    by_layer = {name: results[id(total)] for name, total in sums.items()}
    return Calibration(histograms, by_layer, by_output, samples, method, ranges)


def channel_peaks(
    graph: Graph, split: Split, tensors: Sequence[str], threads: int = 0
) -> dict[str, Array]:
    """Largest magnitude of each channel of the last axis of some tensors, over ``split``."""
    inner = [name for name in tensors if name not in graph.inputs]
    if not tensors:
        return {}
    session = _open(graph, inner, threads)
    peaks: dict[str, Array] = {}
    per_sample = 4 * sum(graph.tensors[n].elements for n in inner)
    rows = fixed_batch(graph) or max(1, min(256, _BATCH_BYTES // max(1, per_sample)))
    for batch in rebatch(split.batches, rows, exact=bool(fixed_batch(graph))):
        found = dict(zip(session.output_names, session.run(batch), strict=True))
        found |= dict(zip(graph.inputs, batch, strict=True))
        for name in tensors:
            peak = np.abs(found[name]).reshape(-1, found[name].shape[-1]).max(axis=0)
            peaks[name] = np.maximum(peaks.get(name, 0.0), peak)
    return peaks


def fixed_batch(graph: Graph) -> int | None:
    """The batch that the graph insists on, or None where it is dynamic."""
    dims = graph.model.graph.input[0].type.tensor_type.shape.dim
    return dims[0].dim_value if dims and dims[0].HasField("dim_value") else None


def rebatch(
    batches: Sequence[tuple[Array, ...]], rows: int, exact: bool = False
) -> list[tuple[Array, ...]]:
    """Split batches into at most ``rows`` samples each; ``exact`` drops a short remainder."""
    parts = []
    for batch in batches:
        for start in range(0, batch[0].shape[0], rows):
            part = tuple(a[start : start + rows] for a in batch)
            if not exact or part[0].shape[0] == rows:
                parts.append(part)
    return parts


def _activations(graph: Graph) -> list[str]:
    """Float tensors that a rewrite may quantize: all but what a unit keeps to itself."""
    return [
        name
        for name, tensor in graph.tensors.items()
        if tensor.dtype == "float32" and name not in graph.hidden and tensor.shape
    ]


def _open(graph: Graph, tensors: Sequence[str], threads: int) -> OnnxSession:
    probe = onnx.ModelProto()
    probe.CopyFrom(graph.model)
    for name in tensors:
        if name not in graph.outputs:
            probe.graph.output.append(onnx.ValueInfoProto(name=name))
    return OnnxRuntime().open(probe.SerializeToString(), threads)


class Columns:
    """A layer's input tensor → the vectors that its weights multiply, as a torch tensor.

    Called with a batch it gives (groups, K, positions), K the ``inputs`` of one output. Of many
    positions an even grid is taken: over ``rows`` samples at least ``_POSITIONS`` and 64 for
    each input. Layers of equal ``key`` see the same vectors.
    """

    def __init__(self, layer: Layer, graph: Graph, rows: int) -> None:
        self.layer = layer
        self.attributes: dict[str, Any] = attributes(graph.nodes[layer.node])
        dense = layer.kind in ("Gemm", "MatMul")
        kernel = layer.weight_shape[2:] if not dense else ()
        self.key = f"{layer.input} {layer.group} {kernel} {dense or self.attributes}"
        self.inputs = layer.weight_shape[1 - layer.channel_axis] * int(np.prod(kernel))
        if layer.kind == "ConvTranspose":
            self.key = f"{layer.input} {layer.group} transposed"
            self.inputs = layer.weight_shape[0] // layer.group
        self.share = max(64 * self.inputs, _POSITIONS) / max(1, rows)  # positions a sample

    def __call__(self, values: Array) -> Any:
        """Vectors of one batch of the input tensor."""
        import torch

        most = int(np.ceil(self.share * values.shape[0]))
        return _columns(self.layer, self.attributes, torch.from_numpy(values), most)


class _MomentSum:
    """Running Σ x xᵀ and Σ x of one layer's columns."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.second: Array = np.zeros(())
        self.mean: Array = np.zeros(())
        self.count = 0

    def add(self, values: Array) -> None:
        import torch

        columns = self.columns(values)
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # of this Python thread: sums in another order are other numbers
        try:
            second = (columns @ columns.transpose(1, 2)).double().numpy()
            mean = columns.sum(2).double().numpy()
        finally:
            torch.set_num_threads(before)
        if self.count:
            self.second += second
            self.mean += mean
        else:
            self.second, self.mean = second, mean
        self.count += columns.shape[2]

    def result(self) -> Moments:
        """The means; once, since the sums become them. Raises ModelError."""
        self.second /= max(1, self.count)
        self.mean /= max(1, self.count)
        if not np.isfinite(self.second).all():
            raise ModelError(
                f"layer {self.columns.layer.name!r}: the squares of its inputs overflow on the "
                "calibration data"
            )
        return Moments(self.second, self.mean, self.count)


def _readers(graph: Graph, tensor: str) -> list[Layer]:
    """Layers that multiply a tensor with a weight."""
    found = [graph.by_node.get(index) for index in graph.consumers.get(tensor, ())]
    kinds = ("Gather", PRODUCT)
    return [x for x in found if x is not None and x.input == tensor and x.kind not in kinds]


class _Downstream:
    """The error that quantizing a tensor makes in what reads it, on some of its columns.

    The sum over the layers that read it of ``‖W (x − Q(x))‖² / ‖W x‖²``, and of
    ``‖x − Q(x)‖² / ‖x‖²`` for its other readers taken together.
    """

    def __init__(self, graph: Graph, tensor: str, split: Split) -> None:
        self.samples = split.samples
        layers = _readers(graph, tensor)
        self.columns = {c.key: c for c in (Columns(x, graph, split.samples) for x in layers)}
        self.weights: dict[str, list[Array]] = {key: [] for key in self.columns}
        for layer in layers:
            weight = graph.array(layer.weight)
            columns = Columns(layer, graph, split.samples)
            if layer.kind == "ConvTranspose":  # (I, O/g, k)
                laid = weight.reshape(layer.group, weight.shape[0] // layer.group, -1)
                laid = laid.transpose(0, 2, 1)
            else:
                laid = np.moveaxis(weight, layer.channel_axis, 0)
                laid = laid.reshape(layer.group, -1, columns.inputs)
            self.weights[columns.key].append(laid)
        self.others = len(layers) < len(graph.consumers[tensor]) or tensor in graph.outputs
        self.kept: dict[str, list[Any]] = {key: [] for key in self.columns}

    def add(self, values: Array) -> None:
        """Keep some columns of a batch: several of each of some samples."""
        import torch

        for key, columns in self.columns.items():
            count = int(np.clip(_COLUMNS / (columns.inputs * columns.layer.group), 128, 4096))
            most = int(np.ceil(count * values.shape[0] / max(1, self.samples)))
            rows = values
            if columns.layer.kind not in ("Gemm", "MatMul"):
                rows = values[:: max(1, 16 * values.shape[0] // most)]
            found = _columns(columns.layer, columns.attributes, torch.from_numpy(rows), most)
            self.kept[key].append(found.clone(memory_format=torch.contiguous_format))

    def range(self, histogram: Histogram, bits: int) -> tuple[float, float]:
        """The range of least error; it contains zero."""
        low, high = histogram.range("minmax", bits)
        levels = 2**bits - 1
        parts = [self._part(key) for key in self.columns]
        best, least = (low, high), _total(parts, low, high, levels)
        for side in ("both", "low", "high") if low < 0 < high else ("both",):
            start, width = best, 0.85 if bits < 8 else 0.6
            factors = np.linspace(1.0, 1.0 - width, 11)[1:]
            for step in (width / 10, width / 40):  # coarse, then around the best
                at = 1.0
                for factor in factors:
                    trial = (
                        start[0] * (factor if side != "high" else 1.0),
                        start[1] * (factor if side != "low" else 1.0),
                    )
                    value = _total(parts, *trial, levels)
                    if value < least:
                        least, best, at = value, trial, float(factor)
                factors = at + step / 4 * np.array([-3, -2, -1, 1, 2, 3])
                factors = factors[factors <= 1.0]
        return best

    def _part(self, key: str) -> tuple[Any, Any, float]:
        """Columns x, factors R with ``RᵀR = Σ WᵀW / ‖W x‖²``, and the weight of ``‖x − Q(x)‖²``."""
        import torch

        x = torch.cat(self.kept[key], dim=2)
        rows = []
        for weight in self.weights[key]:
            found = torch.from_numpy(np.array(weight, order="C"))
            power = float(((found @ x) ** 2).sum())
            rows.append(found / max(power, 1e-30) ** 0.5)
        joined = torch.cat(rows, dim=1)
        if joined.shape[1] > joined.shape[2]:
            joined = torch.linalg.qr(joined.double(), mode="r").R.float()
        share = 1.0 / max(float((x**2).sum()), 1e-30) / len(self.columns) if self.others else 0.0
        return x, joined, share


def _total(parts: Sequence[tuple[Any, Any, float]], low: float, high: float, levels: int) -> float:
    scale = max((high - low) / levels, 1e-12)
    zero = float(np.clip(round(-low / scale), 0, levels))
    total = 0.0
    for x, factors, share in parts:
        gap = x - (x / scale).round().clamp(-zero, levels - zero) * scale
        total += float(((factors @ gap) ** 2).sum())
        total += share * float((gap**2).sum()) if share else 0.0
    return total


def _columns(layer: Layer, found: dict[str, Any], x: Any, most: int) -> Any:
    """A layer's input as (groups, K, positions): the vectors that its weights multiply.

    About ``most`` positions, on an even grid.
    """
    import torch
    from torch.nn import functional

    if layer.kind in ("Gemm", "MatMul"):
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: max(1, flat.shape[0] // most)].T[None]
    n, group = x.shape[0], layer.group
    if layer.kind == "ConvTranspose":
        columns = x.reshape(n, group, x.shape[1] // group, -1)
        step = max(1, n * columns.shape[3] // most) | 1  # odd: does not alias with even widths
        return columns[..., ::step].permute(1, 2, 0, 3).flatten(2)
    rank = x.ndim - 2
    kernel = list(layer.weight_shape[2:])
    strides = list(found.get("strides", [1] * rank))
    dilations = list(found.get("dilations", [1] * rank))
    pads = pads_of(found, list(x.shape[2:]), kernel, strides, dilations)
    x = functional.pad(x, [p for i in reversed(range(rank)) for p in (pads[i], pads[i + rank])])
    for axis in range(rank):  # unfold every spatial axis: works for 1, 2 and 3 dimensions
        span = (kernel[axis] - 1) * dilations[axis] + 1
        x = x.unfold(2 + axis, span, strides[axis])[..., :: dilations[axis]]
    total = n * int(np.prod(x.shape[2 : 2 + rank]))
    step = max(1, int((total / most) ** (1 / rank)))
    x = x[(slice(None), slice(None), *[slice(step // 2, None, step)] * rank)]
    out = x.shape[2 : 2 + rank]
    kernels, places = range(2 + rank, 2 + 2 * rank), range(2, 2 + rank)
    columns = x.permute(1, *kernels, 0, *places).reshape(group, -1, n * int(np.prod(out)))
    return columns if columns.dtype == torch.float32 else columns.float()


def pads_of(
    found: dict[str, Any],
    size: list[int],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
) -> list[int]:
    """ONNX pads, with auto_pad SAME resolved."""
    rank = len(kernel)
    auto = found.get("auto_pad", b"NOTSET")
    if auto not in (b"SAME_UPPER", b"SAME_LOWER"):
        return list(found.get("pads", [0] * 2 * rank))
    begin, end = [], []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small = total // 2
        begin.append(small if auto == b"SAME_UPPER" else total - small)
        end.append(total - begin[-1])
    return begin + end
