"""Low rank: a layer becomes two or three smaller ones, each of which can be quantized.

====================  ===================================================================
rank of a Linear,     singular value decomposition, weighted by the inputs' second moments
MatMul or 1×1         (the best rank for the layer's *outputs*)
rank of a k×k         Tucker-2 (Kim et al. 2016): 1×1, k×k of ``rank`` channels on either
                      side at most, 1×1
``cp:RANK``           canonical polyadic (Lebedev et al. 2015): 1×1, depthwise k×k, 1×1
``separable``         depthwise k×k, then 1×1
====================  ===================================================================

The last piece is fitted to the layer's outputs on the calibration data, without labels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autoquant.calibration import Moments
from autoquant.compress.prune import statistics
from autoquant.errors import CandidateError, nearest
from autoquant.graph import Graph, Layer, attributes
from autoquant.task import Array

KINDS = ("Conv", "Gemm", "MatMul")
_DAMPING = 1e-6  # of the mean variance
_SWEEPS = 60  # of alternating least squares


def full_rank(layer: Layer) -> int:
    """The largest rank of a layer's weight: that of its smaller side. 0 where it has none."""
    if not can_factorize(layer):
        return 0
    outputs = layer.weight_shape[layer.channel_axis]
    inputs = layer.weight_shape[1 - layer.channel_axis]
    return min(outputs, inputs)


def can_factorize(layer: Layer) -> bool:
    """Whether a layer can be: a convolution of one group, a Gemm or a MatMul."""
    return layer.kind in KINDS and layer.group == 1 and len(layer.weight_shape) in (2, 3, 4)


def is_pointwise(layer: Layer) -> bool:
    """Whether all of a layer's inputs come from one position."""
    return math.prod(layer.weight_shape[2:]) == 1


def check(layer: Layer, rank: int | str) -> None:
    """Raises CandidateError for a rank that the layer cannot take."""
    where = f"rank of {layer.name!r} is {rank!r}"
    if not can_factorize(layer):
        raise CandidateError(
            f"{where}: a {layer.kind} of {layer.group} groups cannot be factorized; "
            "a Conv of one group, Gemm and MatMul can"
        )
    if isinstance(rank, str) and is_pointwise(layer):
        raise CandidateError(f"{where}: its kernel has one position; give a whole number")
    most = full_rank(layer)
    if isinstance(rank, str) and rank != "separable":
        sides = (*layer.weight_shape[:2], math.prod(layer.weight_shape[2:]))
        most = math.prod(sides) // max(sides)
        rank = int(rank.partition(":")[2])
    if isinstance(rank, int) and rank > most:
        raise CandidateError(f"{where}: it can be at most {most}")


def vbmf_rank(matrix: Array) -> int:
    """The rank that empirical variational Bayes finds, at least 1 (Nakajima et al. 2013, theorem
    2 and corollary 1: the global analytic solution, the noise variance searched)."""
    from scipy.optimize import minimize_scalar

    rows, columns = sorted(matrix.shape)
    values = np.linalg.svd(matrix, compute_uv=False)[:rows].astype(np.float64)
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)

    def energy(variance: float) -> float:
        x = values**2 / (columns * variance)
        kept, rest = x[x > edge], x[x <= edge]
        found = float(np.sum(rest - np.log(np.maximum(rest, 1e-300))))
        root = np.sqrt((kept - (1 + alpha)) ** 2 - 4 * alpha)
        t = 0.5 * (kept - (1 + alpha) + root)
        found += float(
            np.sum(kept - t)
            + np.sum(np.log((t + 1) / kept))
            + alpha * np.sum(np.log(t / alpha + 1))
        )
        return found

    total = float(np.sum(values**2))
    most = math.ceil(rows / (1 + alpha)) - 1
    tail = values[min(most, rows - 1) :] ** 2
    lower = max(values[min(most, rows - 1)] ** 2 / (columns * edge), float(tail.mean()) / columns)
    upper = total / (rows * columns)
    if not 0 < lower < upper:
        return max(1, int((np.cumsum(values**2) < 0.9 * total).sum()) + 1)
    best = minimize_scalar(energy, bounds=(lower, upper), method="bounded").x
    return max(1, int((values**2 > columns * best * edge).sum()))


def concrete(graph: Graph, layer: Layer, rank: int | float | str) -> int | str | None:
    """A space's rank as a candidate's: a share of the full rank or ``vbmf`` as a number, ``full``
    and what is no smaller as None. Raises CandidateError for one above the layer's."""
    full = full_rank(layer)
    if rank == "full" or not full:
        return None
    if isinstance(rank, float):
        return max(1, round(rank * full))
    if rank == "vbmf":
        weight = np.moveaxis(graph.array(layer.weight), layer.channel_axis, 0)
        sides = [weight.reshape(len(weight), -1)]
        if not is_pointwise(layer):
            sides.append(np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1))
        found = max(vbmf_rank(side) for side in sides)
        return found if found < full else None
    if isinstance(rank, str) and is_pointwise(layer):
        return None
    check(layer, rank)
    return rank


@dataclass(frozen=True, slots=True)
class _Piece:
    """One of the layers that take another's place."""

    weight: Array
    attributes: Mapping[str, Any]


def factorize(
    graph: Graph,
    rank: Mapping[str, int | str],
    moments: Mapping[str, Moments],
    fitted: bool = True,
) -> tuple[onnx.ModelProto, dict[str, tuple[str, ...]]]:
    """The graph's model with layers factorized, and by layer the names of its pieces.

    ``fitted``: else the pieces have any weights, for costs. Raises CandidateError for an unknown
    layer and a rank that the layer cannot take.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    protos = {proto.name: proto for proto in model.graph.initializer}
    uses = [name for node in model.graph.node for name in node.input]
    names: dict[str, tuple[str, ...]] = {}
    replaced: dict[int, list[onnx.NodeProto]] = {}
    for name, value in rank.items():
        if name not in graph.by_name:
            raise CandidateError(f"unknown layer {name!r} in rank; {nearest(name, graph.by_name)}")
        layer = graph.by_name[name]
        check(layer, value)
        pieces = _pieces(graph, layer, value, fitted)
        shift = np.zeros(layer.channels)
        if fitted:
            last, shift = _fit(graph, layer, pieces, moments.get(name))
            pieces[-1] = _Piece(last, pieces[-1].attributes)
        node = model.graph.node[layer.node]
        bias = layer.bias
        if bias is not None and uses.count(bias) == 1:
            old = numpy_helper.to_array(protos[bias])
            moved = (old + shift.reshape(old.shape)).astype(np.float32)
            protos[bias].CopyFrom(numpy_helper.from_array(moved, bias))
        elif bias is None and layer.kind != "MatMul":
            bias = f"{name}.{len(pieces) - 1}.bias"
            model.graph.initializer.append(numpy_helper.from_array(shift.astype(np.float32), bias))
        made, tensor = [], node.input[0]
        for i, piece in enumerate(pieces):
            weight, is_last = f"{name}.{i}.weight", i == len(pieces) - 1
            model.graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(piece.weight, np.float32), weight)
            )
            output = node.output[0] if is_last else f"{node.output[0]}.{i}"
            inputs = [tensor, weight]
            if is_last and layer.kind != "MatMul" and bias:
                inputs.append(bias)
            made.append(
                helper.make_node(
                    layer.kind, inputs, [output], name=f"{name}.{i}", **dict(piece.attributes)
                )
            )
            tensor = output
        replaced[layer.node] = made
        names[name] = tuple(f"{name}.{i}" for i in range(len(pieces)))
    nodes = [
        new for i, node in enumerate(model.graph.node) for new in replaced.get(i, [node])
    ]  # a copy: the list is written to next
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model, names


def _layout(
    layer: Layer, found: Mapping[str, Any], rank: int | str
) -> list[tuple[tuple[int, ...], Mapping[str, Any]]]:
    """Weight shapes in the layer's own layout, and attributes, of the pieces in their order;
    ``found``: the layer's attributes."""
    outputs = layer.weight_shape[layer.channel_axis]
    inputs = layer.weight_shape[1 - layer.channel_axis]
    if layer.kind != "Conv":
        plain = {k: v for k, v in found.items() if k == "transB"}
        shapes = [(int(rank), inputs), (outputs, int(rank))]
        return [(s if layer.channel_axis == 0 else s[::-1], plain) for s in shapes]
    spatial = tuple(layer.weight_shape[2:])
    one, ones = {"kernel_shape": [1] * len(spatial)}, (1,) * len(spatial)
    if is_pointwise(layer):
        count = int(rank)
        return [((count, inputs, *ones), found), ((outputs, count, *ones), one)]
    if rank == "separable":
        depthwise = {**found, "group": inputs}
        return [((inputs, 1, *spatial), depthwise), ((outputs, inputs, *ones), one)]
    if isinstance(rank, str):
        count = int(rank.partition(":")[2])
        depthwise = {**found, "group": count}
        return [
            ((count, inputs, *ones), one),
            ((count, 1, *spatial), depthwise),
            ((outputs, count, *ones), one),
        ]
    after, before = min(rank, outputs), min(rank, inputs)
    return [
        ((before, inputs, *ones), one),
        ((after, before, *spatial), found),
        ((outputs, after, *ones), one),
    ]


def _pieces(graph: Graph, layer: Layer, rank: int | str, fitted: bool) -> list[_Piece]:
    """The pieces, the last still to be fitted; without ``fitted`` they have any weights."""
    weight = graph.array(layer.weight).astype(np.float64)
    layout = _layout(layer, attributes(graph.nodes[layer.node]), rank)
    if not fitted:
        return [_Piece(np.resize(weight, shape), found) for shape, found in layout]
    factors = _factors(layer, weight, rank)
    made = [_Piece(f.reshape(shape), a) for f, (shape, a) in zip(factors, layout, strict=False)]
    return [*made, _Piece(np.zeros(layout[-1][0]), layout[-1][1])]


def _factors(layer: Layer, weight: Array, rank: int | str) -> list[Array]:
    """The weights of all pieces but the last, in the order of their elements."""
    if layer.kind != "Conv":
        out = weight if layer.channel_axis == 0 else weight.T  # (outputs, inputs)
        first = _right(out, int(rank))
        return [first if layer.channel_axis == 0 else first.T]
    outputs, inputs = weight.shape[:2]
    if is_pointwise(layer):
        return [_right(weight.reshape(outputs, inputs), int(rank))]
    if rank == "separable":
        return [np.stack([_leading(weight[:, c].reshape(outputs, -1)) for c in range(inputs)])]
    if isinstance(rank, str):
        count = int(rank.partition(":")[2])
        _, b, c = _parafac(weight.reshape(outputs, inputs, -1), count)
        return [b.T, c.T]
    core, (_, before) = _tucker(weight, (min(rank, outputs), min(rank, inputs)))
    return [before.T, core]


def _right(matrix: Array, rank: int) -> Array:
    """The leading right singular vectors, (rank, inputs); `_fit` weighs them where it can."""
    return np.linalg.svd(matrix, full_matrices=False)[2][:rank]


def _leading(matrix: Array) -> Array:
    return np.asarray(np.linalg.svd(matrix, full_matrices=False)[2][0])


def _tucker(weight: Array, ranks: tuple[int, int]) -> tuple[Array, Sequence[Array]]:
    from tensorly.decomposition import partial_tucker

    found: Any = partial_tucker(weight, rank=list(ranks), modes=[0, 1], init="svd")
    core, factors = found[0]
    return np.asarray(core), factors


def _parafac(weight: Array, rank: int) -> tuple[Array, Array, Array]:
    """Factors of outputs, inputs and kernel positions, (each, rank)."""
    from tensorly.decomposition import parafac

    scale = float(np.abs(weight).max()) or 1.0
    with warnings.catch_warnings():  # a rank above a side's is started at random, from the seed
        warnings.simplefilter("ignore")
        weights, (a, b, c) = parafac(
            weight / scale, rank=rank, init="svd", n_iter_max=_SWEEPS, random_state=0
        )
    return np.asarray(a * weights * scale), np.asarray(b), np.asarray(c)


def _fit(
    graph: Graph, layer: Layer, pieces: list[_Piece], moments: Moments | None
) -> tuple[Array, Array]:
    """The last piece that fits the layer's outputs best, and what the bias gains.

    With ``basis`` what the other pieces make of the layer's inputs and H their second moments:
    ``W H basisᵀ (basis H basisᵀ)⁻¹``. A Linear's or 1×1's first piece becomes the basis of its
    outputs' principal components, which no other of its rank surpasses.
    """
    rows = np.moveaxis(graph.array(layer.weight).astype(np.float64), layer.channel_axis, 0)
    rows = rows.reshape(len(rows), -1)
    covariance, mean = np.eye(rows.shape[1]), np.zeros(rows.shape[1])
    if moments is not None:
        covariance, mean = statistics(layer, moments)
        unit = np.trace(covariance) / len(covariance)
        covariance = covariance + _DAMPING * (unit or 1.0) * np.eye(len(covariance))
    if (len(pieces) == 2 and layer.kind != "Conv") or is_pointwise(layer):
        flipped = layer.channel_axis == 1
        count = pieces[0].weight.shape[1 if flipped else 0]
        spread = rows @ covariance @ rows.T
        outputs = np.linalg.eigh(spread)[1][:, ::-1][:, :count]  # principal components
        basis = outputs.T @ rows
        norms = np.linalg.norm(basis, axis=1, keepdims=True)
        basis = basis / np.where(norms > 0, norms, 1.0)
        first = basis.T if flipped else basis.reshape(pieces[0].weight.shape)
        pieces[0] = _Piece(first, pieces[0].attributes)
    else:
        basis = _basis(pieces, rows.shape[1])
    inner = basis @ covariance @ basis.T
    inner = inner + 1e-9 * (np.trace(inner) / len(inner) or 1.0) * np.eye(len(inner))
    fitted = np.linalg.solve(inner, basis @ covariance @ rows.T).T
    shift = rows @ mean - fitted @ (basis @ mean)
    last = fitted.T if layer.channel_axis == 1 else fitted.reshape(pieces[-1].weight.shape)
    return last, shift


def _basis(pieces: Sequence[_Piece], inputs: int) -> Array:
    """What all pieces but the last make of the inputs of one output, (channels, inputs)."""
    first = pieces[0].weight
    if len(pieces) == 2:  # depthwise
        kernel = first.reshape(len(first), -1)
        found = np.zeros((len(first), len(first), kernel.shape[1]))
        found[np.arange(len(first)), np.arange(len(first))] = kernel
        return found.reshape(len(first), inputs)
    mix = first.reshape(len(first), -1)  # (rank, channels)
    middle = pieces[1].weight
    kernel = middle.reshape(*middle.shape[:2], -1)
    if middle.shape[1] == 1 and len(mix) == len(middle):  # depthwise
        found = np.einsum("rc,rk->rck", mix, kernel[:, 0])
        return np.asarray(found).reshape(len(middle), inputs)
    found = np.einsum("ork,rc->ock", kernel, mix)
    return np.asarray(found).reshape(len(middle), inputs)
