"""Refit a candidate's weights layer by layer against the float network's outputs, without labels.

In graph order, each layer takes its inputs from the already quantized part of the network, and
its weights move to the least-squares fit of the *float* output on these inputs, before they are
rounded: ``W* = (Cov(y, x_q) + λ m W)(H + λ m I)⁻¹`` with H the covariance of x_q and m its mean
diagonal. Then each output channel gets the spread (gain of the scale) and the mean (shift of the
bias) that it has in float. This undoes much of what earlier layers broke; it costs a run of both
networks up to each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx

from autoquant.calibration import Calibration, Columns, Moments, rebatch
from autoquant.candidate import Candidate
from autoquant.compress.bank import Bank, QuantizedWeight, take_spread_and_mean
from autoquant.compress.qdq import assemble
from autoquant.compress.rounding import ROUNDINGS
from autoquant.graph import Graph, Layer, prefix
from autoquant.runtime import OnnxRuntime, run_batches
from autoquant.task import Array

STRENGTH = 0.1  # λ: pull of the fit towards the float weight
SAMPLES = 256  # calibration inputs that a fit sees


def polish(
    graph: Graph,
    candidate: Candidate,
    calibration: Calibration,
    bank: Bank,
    batches: Sequence[tuple[Array, ...]],
    dialect: str,
    workers: int = 1,
) -> Bank:
    """A bank with the refitted weights of a resolved candidate; the given one is left alone.

    Convolutions and Gemms of at most 8 bits are refitted; others keep the bank's weights. The
    result depends on the candidate and the first ``SAMPLES`` calibration inputs of ``batches``
    alone, not on ``workers``, the batches that run at a time.
    """
    polished = bank.overlay()
    batches = list(_first(rebatch(batches, 32), SAMPLES))
    for layer in graph.layers:
        choice = candidate.choice(layer.name)
        rounding = ROUNDINGS["adaround" if choice.rounding == "adaround" else "second-order"]
        if layer.kind not in ("Conv", "Gemm") or choice.weight_bits > 8 or bank.is_shared(layer):
            continue
        written = assemble(graph, candidate, calibration, polished, dialect)
        source = next(n.input[0] for n in written.graph.node if n.name == layer.name)
        fit = _Fit(graph, layer, batches)
        exact = _values(graph.model, layer.input, batches, workers)
        coarse = _values(written, source, batches, workers)
        for pair in zip(exact, coarse, strict=True):
            fit.add(*pair)
        weight, moments, mean, spread = fit.solve()
        values, scale = rounding(weight, choice.weight_bits, choice.granularity, moments)
        scale, shift = take_spread_and_mean(values, scale, moments, spread, mean)
        rows = np.moveaxis(graph.array(layer.weight), layer.channel_axis, 0)
        laid = np.moveaxis(values.reshape(rows.shape), 0, layer.channel_axis).astype(np.int8)
        polished.overrides[layer.name] = QuantizedWeight(
            np.ascontiguousarray(laid), scale, choice.weight_bits, layer.channel_axis, shift
        )
    return polished


def _first(batches: Sequence[tuple[Array, ...]], samples: int) -> Iterator[tuple[Array, ...]]:
    """Batches up to a number of samples, one at least."""
    for batch in batches:
        yield batch
        samples -= batch[0].shape[0]
        if samples <= 0:
            return


def _values(
    model: onnx.ModelProto, tensor: str, batches: Sequence[tuple[Array, ...]], workers: int
) -> list[Array]:
    """A tensor of the model on every batch; only the part that makes it runs."""
    names = [value.name for value in model.graph.input]
    if tensor in names:
        return [batch[names.index(tensor)] for batch in batches]
    session = OnnxRuntime().open(prefix(model, tensor).SerializeToString())
    used = [names.index(name) for name in session.input_names]
    fed = [[batch[i] for i in used] for batch in batches]
    return [outputs[0] for outputs in run_batches(session, fed, workers)]


class _Fit:
    """Running sums over the positions of one layer: float outputs y, quantized inputs x."""

    def __init__(self, graph: Graph, layer: Layer, batches: Sequence[tuple[Array, ...]]) -> None:
        self.columns = Columns(layer, graph, sum(b[0].shape[0] for b in batches))
        rows = np.moveaxis(graph.array(layer.weight), layer.channel_axis, 0)
        self.weight = np.array(rows.reshape(layer.group, -1, self.columns.inputs))
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
        moments = Moments(xx, x, self.count)
        h = moments.centred()
        cross = yx - y[:, :, None] * x[:, None, :]
        inputs = x.shape[1]
        unit = np.maximum(np.einsum("gkk->gk", h).mean(axis=1), 1e-20)[:, None, None] * STRENGTH
        left = h + unit * np.eye(inputs)
        right = cross + unit * self.weight
        fitted = np.linalg.solve(left, right.transpose(0, 2, 1)).transpose(0, 2, 1)
        variance = np.maximum(np.asarray(self.yy) / n - y**2, 0.0)
        weight = fitted.reshape(-1, inputs).astype(np.float32)
        return np.ascontiguousarray(weight), moments, y.reshape(-1), variance.reshape(-1)
