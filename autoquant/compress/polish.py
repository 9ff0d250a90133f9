"""Refit and tune a candidate's weights against the float network's outputs, without labels.

The network is walked block by block (`compress/blocks.py`), each block on the inputs that the
quantized part before it really makes.

Refit, layer by layer: the weights move to the least-squares fit of the *float* output on these
inputs before they are rounded, ``W* = (Cov(y, x_q) + λ m W)(H + λ m I)⁻¹`` with H the covariance
of x_q and m its mean diagonal; then each output channel gets the spread (gain of the scale) and
the mean (shift of the bias) that it has in float.

Tune, block by block: integers, scales and biases follow the gradient of the squared error of the
block's output, rounded in the forward pass and passed straight through in the backward one
(Bengio et al. 2013; block by block as in Li et al. 2021, learned scales as in Esser et al. 2020).
What is tuned stays only if inputs that it did not see agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx

from autoquant.calibration import Calibration, Columns, Moments, rebatch
from autoquant.candidate import Candidate, block_size
from autoquant.compress.bank import (
    Bank,
    QuantizedWeight,
    broadcast_scale,
    own_bias,
    storable_scale,
    take_spread_and_mean,
    takes_bias,
)
from autoquant.compress.blocks import Block, Unsupported, run_block, split
from autoquant.compress.qdq import Grid, Plan, assemble, plan, tensor_grid, widths_read
from autoquant.compress.rounding import ROUNDINGS, integer_range
from autoquant.graph import Graph, Layer, prefix
from autoquant.runtime import OnnxRuntime, run_batches
from autoquant.task import Array

STRENGTH = 0.1  # λ: pull of the fit towards the float weight
STRENGTH_LARGE = 1.0  # for networks that are too large to be tuned
SAMPLES = 512  # calibration inputs that are seen
TUNED = 4  # bits: a block is tuned if a layer of it has so many or fewer
STEPS = 300  # of a block's tuning, fewer for larger networks
WORK = 1.2e12  # multiply-accumulates of all tuning; where they allow under 100 steps, none
BATCH = 32
RATE = 2e-3  # a step of the integers; of scales and biases in their own units
THREADS = 1  # of torch, whatever the machine has: sums in another order are other bytes
_HELD = 8  # one input of so many checks what is tuned on the others
_BYTES = 512 << 20  # of a block's inputs and outputs, each

Feeds = list[dict[str, Array]]  # a batch: tensor → values


def polish(
    graph: Graph,
    candidate: Candidate,
    calibration: Calibration,
    bank: Bank,
    batches: Sequence[tuple[Array, ...]],
    dialect: str,
    workers: int = 1,
) -> Bank:
    """A bank with the refitted and tuned weights of a resolved candidate; the given one is left
    alone.

    Convolutions and products with weights of at most 8 bits change (those with scales by block
    are refitted, not tuned); others keep the bank's weights. The result depends on the candidate
    and the first ``SAMPLES`` calibration inputs of ``batches`` alone (images also mirrored), not
    on ``workers``, the batches that run at a time.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)  # of this Python thread alone
    try:
        return _polished(graph, candidate, calibration, bank, batches, dialect, workers)
    finally:
        torch.set_num_threads(before)


def _polished(
    graph: Graph,
    candidate: Candidate,
    calibration: Calibration,
    bank: Bank,
    batches: Sequence[tuple[Array, ...]],
    dialect: str,
    workers: int,
) -> Bank:
    import torch

    polished = bank.overlay()
    names = graph.inputs
    seen = list(_first(rebatch(batches, BATCH), SAMPLES))
    exact = [dict(zip(names, batch, strict=True)) for batch in _mirrored(graph, seen)]
    coarse = exact
    planned = plan(graph, candidate, dialect)
    grids = _Grids(graph, planned, calibration, candidate, dialect)
    for block in split(graph):
        written = assemble(graph, candidate, calibration, polished, dialect)
        if block.source:
            exact = _advance(graph.model, block.source, exact, names, workers)
            coarse = _advance(written, block.source, coarse, names, workers)
        changed = [x for x in block.layers if _changes(x, candidate, bank)]
        fitted = {}
        for layer in changed:
            source = layer.input
            if planned.modes[layer.name] != "dynamic":
                source = next(n.input[0] for n in written.graph.node if n.name == layer.name)
            fit = _Fit(graph, layer, sum(next(iter(f.values())).shape[0] for f in exact))
            for pair in zip(
                _values(graph.model, layer.input, exact, workers),
                _values(written, source, coarse, workers),
                strict=True,
            ):
                fit.add(*pair)
            zeros = bank.get(layer, candidate.choice(layer.name)).values == 0
            fitted[layer.name], entry = _refit(graph, layer, candidate, fit, zeros)
            polished.overrides[layer.name] = entry
            written = assemble(graph, candidate, calibration, polished, dialect)
        tuned = [x for x in changed if not polished.overrides[x.name].block]
        if is_tuned(graph) and any(candidate.choice(x.name).weight_bits <= TUNED for x in tuned):
            outputs = _values(graph.model, block.target, exact, workers)
            try:
                found = _Tuning(graph, block, tuned, fitted, polished, grids, coarse, outputs)
                with torch.enable_grad():
                    polished.overrides.update(found.run())
            except Unsupported:  # torch has no such operator: the refit stays
                continue
    return polished


def _changes(layer: Layer, candidate: Candidate, bank: Bank) -> bool:
    choice = candidate.choice(layer.name)
    return (
        layer.kind in ("Conv", "Gemm", "MatMul")
        and choice.weight_bits <= 8
        and not choice.codebook
        and not bank.is_shared(layer)
    )


def _steps(graph: Graph) -> int:
    """Steps of tuning a block; 0 where a network is too large to be tuned in a minute or two."""
    steps = int(WORK / (3 * BATCH * max(1, graph.macs)))
    return 0 if steps < STEPS // 3 else min(steps, STEPS)


def is_tuned(graph: Graph) -> bool:
    """Whether polishing tunes a network, which takes one thread for most of its time."""
    return _steps(graph) > 0


def _first(batches: Sequence[tuple[Array, ...]], samples: int) -> Iterator[tuple[Array, ...]]:
    """Batches up to a number of samples, one at least."""
    for batch in batches:
        yield batch
        samples -= batch[0].shape[0]
        if samples <= 0:
            return


def _mirrored(graph: Graph, batches: Sequence[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
    """Where a network of convolutions reads one image and is small enough to be tuned, each
    batch and its mirror image in turn.

    The float network says what its outputs are, so that these are inputs like any other.
    """
    first = batches[0][0]
    is_image = len(batches[0]) == 1 and first.ndim == 4 and first.shape[1] in (1, 3, 4)
    small = is_image and first.dtype == np.float32 and is_tuned(graph)
    if not small or graph.layers[0].kind != "Conv":
        return list(batches)
    return [pair for b in batches for pair in (b, (np.ascontiguousarray(b[0][..., ::-1]),))]


def _advance(
    model: onnx.ModelProto, tensor: str, feeds: Feeds, names: Sequence[str], workers: int
) -> Feeds:
    """The graph inputs and ``tensor`` of every batch: what the next block reads."""
    values = _values(model, tensor, feeds, workers)
    return [
        {**{name: feed[name] for name in names}, tensor: value}
        for feed, value in zip(feeds, values, strict=True)
    ]


def _values(model: onnx.ModelProto, tensor: str, feeds: Feeds, workers: int) -> list[Array]:
    """A tensor of the model on every batch; only the part that makes it from ``feeds`` runs."""
    if tensor in feeds[0]:
        return [feed[tensor] for feed in feeds]
    part = prefix(model, tensor, tuple(feeds[0]))
    session = OnnxRuntime().open(part.SerializeToString())
    fed = [[feed[name] for name in session.input_names] for feed in feeds]
    return [outputs[0] for outputs in run_batches(session, fed, workers)]


def _refit(
    graph: Graph, layer: Layer, candidate: Candidate, fit: _Fit, zeros: Array
) -> tuple[Array, QuantizedWeight]:
    """The fitted weight before rounding, in the weight's own layout, and what it rounds to.

    ``zeros``: where the bank has them; those of a sparse layer stay.
    """
    choice = candidate.choice(layer.name)
    weight, moments, mean, spread = fit.solve()
    rounding = ROUNDINGS["adaround" if choice.rounding == "adaround" else "second-order"]
    kept = None
    if choice.sparsity:
        kept = np.moveaxis(~zeros, layer.channel_axis, 0).reshape(weight.shape)
    values, scale = rounding(weight, choice.weight_bits, choice.granularity, moments, kept)
    block = block_size(choice.granularity)
    scale, shift = take_spread_and_mean(values, scale, moments, spread, mean, block)
    rows = np.moveaxis(graph.array(layer.weight), layer.channel_axis, 0)

    def laid(matrix: Array) -> Array:
        found = np.moveaxis(matrix.reshape(rows.shape), 0, layer.channel_axis)
        return np.ascontiguousarray(found)

    entry = QuantizedWeight(
        laid(values.astype(np.int8)),
        storable_scale(scale, block),
        choice.weight_bits,
        layer.channel_axis,
        shift if takes_bias(layer) else None,
        block=block,
    )
    return laid(weight), entry


class _Fit:
    """Running sums over the positions of one layer: float outputs y, quantized inputs x."""

    def __init__(self, graph: Graph, layer: Layer, rows: int) -> None:
        self.columns = Columns(layer, graph, rows)
        self.takes_bias = takes_bias(layer)
        self.strength = STRENGTH if is_tuned(graph) else STRENGTH_LARGE
        matrix = np.moveaxis(graph.array(layer.weight), layer.channel_axis, 0)
        self.weight = np.array(matrix.reshape(layer.group, -1, self.columns.inputs))
        self.count = 0
        self.xx: Array | float = 0.0
        self.yx: Array | float = 0.0
        self.yy: Array | float = 0.0
        self.x: Array | float = 0.0
        self.y: Array | float = 0.0

    def add(self, exact: Array, coarse: Array) -> None:
        """One batch: the layer's float input and its quantized one."""
        import torch

        x = self.columns(coarse)
        y = torch.from_numpy(self.weight) @ self.columns(exact)
        self.xx = self.xx + (x @ x.transpose(1, 2)).double().numpy()
        self.yx = self.yx + (y @ x.transpose(1, 2)).double().numpy()
        self.yy = self.yy + (y * y).sum(2).double().numpy()
        self.x = self.x + x.sum(2).double().numpy()
        self.y = self.y + y.sum(2).double().numpy()
        self.count += x.shape[2]

    def solve(self) -> tuple[Array, Moments, Array, Array]:
        """The fitted weight (channels, K), the moments of x, and mean and variance of y."""
        n = max(1, self.count)
        xx, yx, x, y = (np.asarray(s) / n for s in (self.xx, self.yx, self.x, self.y))
        if not self.takes_bias:  # nothing can stand for the means: they count as values
            x, y = np.zeros_like(x), np.zeros_like(y)
        moments = Moments(xx, x, self.count)
        h = moments.centred()
        cross = yx - y[:, :, None] * x[:, None, :]
        inputs = x.shape[1]
        unit = np.maximum(np.einsum("gkk->gk", h).mean(axis=1), 1e-20)[:, None, None]
        unit = unit * self.strength
        left = h + unit * np.eye(inputs)
        right = cross + unit * self.weight
        fitted = np.linalg.solve(left, right.transpose(0, 2, 1)).transpose(0, 2, 1)
        variance = np.maximum(np.asarray(self.yy) / n - y**2, 0.0)
        weight = fitted.reshape(-1, inputs).astype(np.float32)
        return np.ascontiguousarray(weight), moments, y.reshape(-1), variance.reshape(-1)


class _Grids:
    """Activation grids of an artifact, as torch sees them."""

    def __init__(
        self,
        graph: Graph,
        planned: Plan,
        calibration: Calibration,
        candidate: Candidate,
        dialect: str,
    ) -> None:
        self.graph, self.plan, self.candidate = graph, planned, candidate

        @cache
        def grid(tensor: str, bits: int) -> Grid:
            return tensor_grid(graph, planned, calibration, tensor, bits, dialect)

        self.grid = grid

    def __call__(self, tensor: str, value: Any, node: int) -> Any:
        """What a node reads for a tensor: the value on its grids, where it has any."""
        for bits in widths_read(self.graph, self.plan, self.candidate, node, tensor):
            found = self.grid(tensor, bits)
            low, high = found.real_range
            clipped = value.clamp(low, high)
            value = _straight((clipped / found.scale).round() * found.scale, clipped)
        return value


def _straight(rounded: Any, value: Any) -> Any:
    """``rounded`` forward, the gradient of ``value`` backward."""
    return value + (rounded - value).detach()


class _Tuned:
    """One layer's integers, scales and bias as torch parameters."""

    def __init__(
        self,
        graph: Graph,
        layer: Layer,
        entry: QuantizedWeight,
        fitted: Array,
        is_sparse: bool = False,
    ) -> None:
        import torch

        self.entry = entry
        self.kept = torch.from_numpy((entry.values != 0) | (not is_sparse))
        self.low, self.high = integer_range(entry.bits)
        scale = broadcast_scale(entry.scale, entry.axis, entry.values.ndim)
        codes = entry.values.astype(np.float32)
        # half of the way: what the rounding moved on purpose does not flip at the first step
        inside = np.clip(fitted / scale - codes, -0.49, 0.49) / 2
        self.codes = torch.from_numpy((codes + inside).astype(np.float32)).requires_grad_()
        self.scale = torch.from_numpy(np.array(scale)).requires_grad_()
        self.bias = None
        if entry.shift is not None:
            self.own = own_bias(graph, layer)
            self.bias = torch.from_numpy(self.own + entry.shift).requires_grad_()

    def weight(self) -> Any:
        """The float weight that the rounded integers stand for."""
        codes = _straight(self.codes.round(), self.codes).clamp(self.low, self.high)
        return codes * self.kept * self.scale

    def result(self) -> QuantizedWeight:
        """What is stored."""
        codes = self.codes.detach().round().clamp(self.low, self.high) * self.kept
        scale = np.maximum(self.scale.detach().numpy().reshape(-1), np.float32(1e-12))
        shift = None if self.bias is None else self.bias.detach().numpy() - self.own
        values = codes.numpy().astype(np.int8)
        return replace(self.entry, values=values, scale=scale, shift=shift)


class _Tuning:
    """The tuning of one block.

    ``feeds``: the quantized inputs; ``outputs``: the float target of every batch.
    """

    def __init__(
        self,
        graph: Graph,
        block: Block,
        layers: Sequence[Layer],
        fitted: Mapping[str, Array],
        bank: Bank,
        grids: _Grids,
        feeds: Feeds,
        outputs: Sequence[Array],
    ) -> None:
        import torch

        self.graph, self.block, self.grids = graph, block, grids
        chosen = {layer.name: grids.candidate.choice(layer.name) for layer in block.layers}
        self.tuned = {
            x.name: _Tuned(
                graph,
                x,
                bank.get(x, chosen[x.name]),
                fitted[x.name],
                bool(chosen[x.name].sparsity),
            )
            for x in layers
        }
        self.weights: dict[str, Any] = {}
        self.biases: dict[str, Any] = {}
        for layer in block.layers:
            if layer.name not in self.tuned and chosen[layer.name].weight_bits <= 8:
                entry = bank.get(layer, chosen[layer.name])
                self.weights[layer.name] = torch.from_numpy(entry.dequantized())
                if entry.shift is not None:
                    bias = own_bias(graph, layer) + entry.shift
                    self.biases[layer.name] = torch.from_numpy(bias)
        reads = {n for i in block.nodes for n in graph.nodes[i].input} & set(feeds[0])
        rows = [{n: torch.from_numpy(feed[n]) for n in reads} for feed in feeds]
        self.rows = _joined(
            [{**r, "": torch.from_numpy(y)} for r, y in zip(rows, outputs, strict=True)]
        )
        variance = float(np.mean([part[""].var(correction=0) for part in self.rows]))
        self.unit = max(variance, 1e-20)

    def run(self) -> dict[str, QuantizedWeight]:
        """Follow the gradient; the result only where held inputs agree."""
        import torch

        held, seen = [], []
        for part in self.rows:
            count = len(part[""])
            cut = count - max(1, count // _HELD) if count > 1 else count
            if cut > 2 * BATCH:  # an image and its mirror image on one side
                cut -= cut % (2 * BATCH)
            seen.append({n: v[:cut] for n, v in part.items()})
            held.append({n: v[cut:] if cut < count else v for n, v in part.items()})
        start = self._error(held)
        spread = float(np.sqrt(self.unit))
        groups: list[dict[str, Any]] = []
        for found in self.tuned.values():
            groups.append({"params": [found.codes], "peak": RATE})
            groups.append(
                {"params": [found.scale], "peak": RATE * float(found.scale.detach().mean())}
            )
            if found.bias is not None:
                groups.append({"params": [found.bias], "peak": RATE * spread})
        optimizer = torch.optim.Adam([{**g, "lr": g["peak"]} for g in groups])
        generator = torch.Generator().manual_seed(0)
        shares = torch.tensor([float(len(part[""])) for part in seen])
        steps = _steps(self.graph)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1 + np.cos(np.pi * step / steps))
            part = seen[int(torch.multinomial(shares, 1, generator=generator))]
            rows = torch.randint(len(part[""]), (BATCH,), generator=generator)
            loss = self._loss({n: v[rows] for n, v in part.items()}).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not self._error(held) < start:
            return {}
        return {name: found.result() for name, found in self.tuned.items()}

    def _loss(self, part: Mapping[str, Any]) -> Any:
        weights = {**self.weights, **{n: t.weight() for n, t in self.tuned.items()}}
        biases = {**self.biases, **{n: t.bias for n, t in self.tuned.items() if t.bias is not None}}
        feeds = {n: v for n, v in part.items() if n}
        output = run_block(self.graph, self.block, feeds, weights, biases, self.grids)
        return (output - part[""]) ** 2 / self.unit

    def _error(self, parts: Sequence[Mapping[str, Any]]) -> float:
        import torch

        total, count = 0.0, 0
        with torch.no_grad():
            for part in parts:
                for start in range(0, len(part[""]), BATCH):
                    loss = self._loss({n: v[start : start + BATCH] for n, v in part.items()})
                    total, count = total + float(loss.double().sum()), count + loss.numel()
        return total / max(1, count)


def _joined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches of one shape as one, up to ``_BYTES`` of their largest tensor."""
    import torch

    groups: dict[Any, list[dict[str, Any]]] = {}
    for part in parts:
        key = tuple((n, tuple(v.shape[1:])) for n, v in sorted(part.items()))
        groups.setdefault(key, []).append(part)
    found = []
    for group in groups.values():
        largest = max(v[0].numel() * v.element_size() for v in group[0].values())
        most = max(BATCH, _BYTES // max(1, largest))
        whole = {n: torch.cat([p[n] for p in group])[:most] for n in group[0]}
        found.append({n: _dense(v) for n, v in whole.items()})
    return found


def _dense(values: Any) -> Any:
    """Images with the channels last, which convolutions are faster on."""
    import torch

    if values.ndim != 4:
        return values
    return values.contiguous(memory_format=torch.channels_last)
