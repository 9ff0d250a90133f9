"""Structured pruning: which channels of a group go, and what the layers that read them become.

An importance gives every weight a saliency; a channel's is the sum over what goes with it. The
layers that lose inputs are fitted to their old outputs in the least squares of the calibration
data, without labels: ``W' = W H_·K (H_KK + λ)⁻¹`` with H the centred second moments of the inputs
and K those that stay, and the bias takes up the mean of what went (He et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from autoquant.calibration import Moments, rebatch
from autoquant.compress.channels import ChannelGroup, Channels
from autoquant.errors import CandidateError, nearest
from autoquant.graph import Graph, Layer
from autoquant.task import Array

DAMPING = 1e-2  # of the mean variance, added to every input's
_SAMPLES, _ROWS = 256, 16  # of gradients: inputs, and how many at a time
_NOISE, _COPIES = 0.05, 4  # of `stability`: relative perturbation of the weights, and how often


@dataclass(frozen=True, slots=True)
class Evidence:
    """What saliencies and fits are computed from, of one float graph.

    ``moments``: of every layer's inputs. ``inputs``: batches of calibration inputs. ``classes``:
    the first output is logits. ``kept``: what was computed before.
    """

    graph: Graph
    moments: Mapping[str, Moments]
    inputs: Sequence[tuple[Array, ...]]
    classes: bool
    seed: int = 0
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def channels(self) -> Channels:
        """The channels of the graph."""
        if "channels" not in self.kept:
            self.kept["channels"] = Channels(self.graph)
        found: Channels = self.kept["channels"]
        return found

    def saliency(self, importance: str) -> Mapping[str, Array]:
        """Initializer → a saliency for each of its elements, for what `IMPORTANCES` names."""
        if importance not in self.kept:
            self.kept[importance] = IMPORTANCES[importance](self)
        found: Mapping[str, Array] = self.kept[importance]
        return found


# --- importances -----------------------------------------------------------------------------


def _magnitude(power: int) -> Callable[[Evidence], dict[str, Array]]:
    """|w| or w², relative to the mean of its tensor: layers of a group weigh alike."""

    def run(evidence: Evidence) -> dict[str, Array]:
        found = {}
        for layer in evidence.graph.layers:
            array = np.abs(evidence.graph.array(layer.weight).astype(np.float64)) ** power
            found[layer.weight] = array / (array.mean() or 1.0)
        return found

    return run


def _batchnorm(evidence: Evidence) -> dict[str, Array]:
    """The scale that normalization gave a channel (network slimming: Liu et al. 2017).

    Where batch normalization was folded its |γ| is the standard deviation of the channel's
    output, which the moments tell; a network without gets the same measure.
    """
    return {
        layer.weight: _spread_over(evidence.graph, layer, np.sqrt(_variance(evidence, layer)))
        for layer in evidence.graph.layers
        if layer.name in evidence.moments
    }


def _activation(evidence: Evidence) -> dict[str, Array]:
    """Energy of a channel in what reads it: ``w²·E[x²]`` of every reader's weight."""
    found = {}
    for layer in evidence.graph.layers:
        if layer.name not in evidence.moments or layer.kind == "ConvTranspose":
            continue
        moments = evidence.moments[layer.name]
        rows = _rows(evidence.graph, layer) ** 2
        energy = np.einsum("gkk->gk", moments.second)[:, None, :]
        total = moments.join(moments.split(rows) * energy, rows)
        found[layer.weight] = _unrows(evidence.graph, layer, total / (total.sum() or 1.0))
    return found


def _taylor(evidence: Evidence) -> dict[str, Array]:
    """``|g·w|``, the first-order change (Molchanov et al. 2017)."""
    return _by_gradient(evidence, lambda g, w: np.abs(g * w))


def _hessian(evidence: Evidence) -> dict[str, Array]:
    """``½ w²·E[g²]``: Optimal Brain Damage (LeCun et al. 1990) with Fisher's diagonal for the
    Hessian's."""
    return _by_gradient(evidence, lambda g, w: 0.5 * g**2 * w**2)


def _stability(evidence: Evidence) -> dict[str, Array]:
    """The part of the Taylor saliency that a perturbation of the weights leaves: the mean over
    noisy copies of the network, less a standard deviation, at least a hundredth of the mean."""
    runs = []
    for copy in range(_COPIES):
        runs.append(_by_gradient(evidence, lambda g, w: np.abs(g * w), noise=copy + 1))
    found = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        mean = values.mean(axis=0)
        found[name] = np.maximum(mean - values.std(axis=0), 0.01 * mean)
    return found


IMPORTANCES: dict[str, Callable[[Evidence], dict[str, Array]]] = {
    "l1": _magnitude(1),
    "l2": _magnitude(2),
    "batchnorm": _batchnorm,
    "taylor": _taylor,
    "hessian": _hessian,
    "activation": _activation,
    "stability": _stability,
}


def _by_gradient(
    evidence: Evidence, score: Callable[[Array, Array], Array], noise: int = 0
) -> dict[str, Array]:
    """The mean of a score of gradient and weight over batches of calibration inputs; labels are
    drawn from the network, as for the Fisher matrix. ``noise`` perturbs the weights first."""
    import torch

    from autoquant.compress.network import Network, loss

    network = Network(evidence.graph).eval()
    generator = torch.Generator().manual_seed(evidence.seed + 1000 * noise)
    if noise:
        with torch.no_grad():
            for weight in network.weights.values():
                spread = _NOISE * weight.std(unbiased=False)
                weight += spread * torch.randn(weight.shape, generator=generator)
    names = {x.weight for x in evidence.graph.layers} & network.names.keys()
    sums = {name: np.zeros(evidence.graph.array(name).shape) for name in names}
    count = 0
    for batch in rebatch(first_rows(evidence.inputs, _SAMPLES), _ROWS):
        network.zero_grad()
        with torch.enable_grad():
            output = network(*map(torch.from_numpy, batch))
            loss(output, evidence.classes, generator).backward()  # type: ignore[no-untyped-call]
        count += 1
        for name in names:
            weight = network.weights[network.names[name]]
            if weight.grad is not None:
                sums[name] += score(weight.grad.numpy(), weight.detach().numpy())
    return {name: total / max(count, 1) for name, total in sums.items()}


def first_rows(batches: Sequence[tuple[Array, ...]], count: int) -> list[tuple[Array, ...]]:
    """The first ``count`` samples of some batches."""
    found = []
    for batch in batches:
        rows = min(count, len(batch[0]))
        if rows <= 0:
            break
        found.append(tuple(a[:rows] for a in batch))
        count -= rows
    return found


def _rows(graph: Graph, layer: Layer) -> Array:
    """The weight as (output channels, inputs), float64."""
    weight = np.moveaxis(graph.array(layer.weight).astype(np.float64), layer.channel_axis, 0)
    return weight.reshape(len(weight), -1)


def _unrows(graph: Graph, layer: Layer, rows: Array) -> Array:
    moved = _moved(graph.array(layer.weight).shape, layer)
    return np.moveaxis(rows.reshape(moved), 0, layer.channel_axis)


def _moved(shape: Sequence[int], layer: Layer) -> list[int]:
    """A weight's shape with the output axis first."""
    axis = layer.channel_axis
    return [shape[axis], *(n for i, n in enumerate(shape) if i != axis)]


def _spread_over(graph: Graph, layer: Layer, channels: Array) -> Array:
    """One value for each output channel, on its weights in equal parts."""
    rows = _rows(graph, layer)
    return _unrows(graph, layer, np.broadcast_to(channels[:, None] / rows.shape[1], rows.shape))


def _variance(evidence: Evidence, layer: Layer) -> Array:
    """Of every output channel on the calibration data."""
    moments = evidence.moments[layer.name]
    rows = _rows(evidence.graph, layer)
    parts = moments.split(rows)
    each = np.maximum(((parts @ moments.centred()) * parts).sum(-1), 0.0)
    if moments.taps(rows):
        return np.asarray(each.reshape(-1, len(rows)).mean(0))
    return np.asarray(each.reshape(-1))


# --- pruning ---------------------------------------------------------------------------------


def units_removed(group: ChannelGroup, ratio: float) -> int:
    """How many units a ratio removes. Raises CandidateError for one that leaves none."""
    gone = round(group.units * ratio)
    if gone >= group.units:
        raise CandidateError(
            f"pruning of {group.name!r} is {ratio}: none of its {group.units} units would be "
            f"left; at most {1 - 1 / group.units:.4g}"
        )
    return gone


def offered(group: ChannelGroup, ratios: Sequence[float], round_to: int) -> tuple[float, ...]:
    """The ratios that a device likes best near those asked for: what stays is a multiple of
    ``round_to`` channels where the group has as many. The most pruned first, each once."""
    step = max(1, round_to // group.size) if group.size < round_to else 1
    step = step if group.units >= step else 1
    found = []
    for ratio in ratios:
        if ratio <= 0:
            found.append(0.0)
            continue
        left = group.units - units_removed(group, ratio)
        kept = max(step, round(left / step) * step)
        found.append(max(0.0, 1 - kept / group.units))
    return tuple(sorted(set(found), reverse=True))


def scores(channels: Channels, group: ChannelGroup, saliency: Mapping[str, Array]) -> Array:
    """The importance of every unit of a group."""
    found: dict[int, float] = dict.fromkeys(group.labels, 0.0)
    for name, axis in group.members:
        if name not in saliency:
            continue
        others = tuple(i for i in range(saliency[name].ndim) if i != axis)
        each = saliency[name].sum(axis=others)
        for label, value in zip(channels.axes[name][axis].tolist(), each.tolist(), strict=True):
            if label in found:
                found[label] += value
    return np.array([found[label] for label in group.labels])


def prune(
    channels: Channels,
    pruning: Mapping[str, float],
    importance: str,
    evidence: Evidence,
    fitted: bool = True,
) -> tuple[set[int], onnx.ModelProto]:
    """The labels of the least important units of each group, and the graph's model without them.

    ``fitted``: else weights are not, for costs (see `refitted`). Raises CandidateError for an
    unknown group and for a ratio that empties one.
    """
    gone: set[int] = set()
    for name, ratio in pruning.items():
        if name not in channels.groups:
            raise CandidateError(
                f"unknown channel group {name!r}; {nearest(name, channels.groups)}"
            )
        group = channels.groups[name]
        count = units_removed(group, ratio)
        if count:
            order = np.argsort(
                scores(channels, group, evidence.saliency(importance)), kind="stable"
            )
            gone.update(group.labels[i] for i in order[:count])
    model = channels.without(gone)
    return gone, refitted(channels, model, gone, evidence.moments, fitted)


def refitted(
    channels: Channels,
    model: onnx.ModelProto,
    gone: set[int],
    moments: Mapping[str, Moments],
    fitted: bool = True,
) -> onnx.ModelProto:
    """Fit the layers that lost inputs to their old outputs (see above), in place; without
    ``fitted`` they get the biases of that and no more."""
    graph = channels.graph
    protos = {proto.name: proto for proto in model.graph.initializer}
    nodes = {node.output[0]: node for node in model.graph.node}
    for layer in graph.layers:
        found = moments.get(layer.name)
        if found is None or layer.kind not in ("Conv", "Gemm", "MatMul") or layer.group != 1:
            continue
        kept = channels.kept(layer.weight, gone)
        made = kept[layer.channel_axis]
        read = [k for i, k in enumerate(kept) if i != layer.channel_axis]
        if all(k.all() for k in read):
            continue
        shift = np.zeros(int(made.sum()))
        if fitted:
            stays = np.ones(1, bool)
            for part in read:
                stays = np.logical_and.outer(stays, part).reshape(-1)
            rows = _rows(graph, layer)[made]
            best, shift = _fitted(rows, stays, *statistics(layer, found))
            moved = _moved(protos[layer.weight].dims, layer)
            weight = np.moveaxis(best.reshape(moved), 0, layer.channel_axis).astype(np.float32)
            protos[layer.weight].CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(weight), layer.weight)
            )
        if layer.bias:
            old = numpy_helper.to_array(protos[layer.bias])
            new = (old.astype(np.float64) + shift.reshape(old.shape)).astype(np.float32)
            protos[layer.bias].CopyFrom(numpy_helper.from_array(new, layer.bias))
        elif layer.kind != "MatMul":
            bias = f"{layer.weight}_bias"
            node = nodes[graph.nodes[layer.node].output[0]]
            node.input[2:] = [bias]
            model.graph.initializer.append(numpy_helper.from_array(shift.astype(np.float32), bias))
    return model


def statistics(layer: Layer, moments: Moments) -> tuple[Array, Array]:
    """Covariance and mean of a layer's inputs; without a bias that could take up a mean, the
    second moments and none."""
    if layer.kind == "MatMul" and layer.bias is None:
        second = moments.second[0].astype(np.float64)
        return second, np.zeros(len(second))
    return moments.centred()[0].astype(np.float64), moments.mean[0].astype(np.float64)


def _fitted(rows: Array, stays: Array, covariance: Array, mean: Array) -> tuple[Array, Array]:
    """The weights of the inputs that stay, and what the bias gains."""
    inner = covariance[np.ix_(stays, stays)]
    damping = DAMPING * (np.trace(inner) / max(len(inner), 1) or 1.0)
    gone = ~stays
    right = rows[:, gone] @ covariance[np.ix_(gone, stays)]
    inner = inner + damping * np.eye(len(inner))
    fitted = rows[:, stays] + np.linalg.solve(inner, right.T).T
    return fitted, rows @ mean - fitted @ mean[stays]
