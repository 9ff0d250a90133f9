"""Rescale a float network so that it quantizes better and computes the same.

A positive factor a channel can move through everything that is homogeneous: out of the weights
that make a channel and into the weights that read it. `cross_layer_equalization` (Nagel et al.
2019, "Data-Free Quantization Through Weight Equalization and Bias Correction") evens out the
ranges of the two weights; `smooth` (Xiao et al. 2023, "SmoothQuant") moves outliers of the
activations into the weights. Names of layers and tensors stay; a tensor's values may be scaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autoquant.graph import PRODUCT, Graph, Layer, attributes, clamp_bounds
from autoquant.task import Array

LIMIT = 100.0  # a channel is scaled by at most this, and at least its inverse
_SWEEPS = 20
_KINDS = ("Conv", "Gemm", "MatMul")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_SHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers with nothing but homogeneous operators between them, read by no one else.

    ``channel``: for each input channel of ``reader`` the output channel of ``writer`` that it is.
    """

    writer: Layer
    reader: Layer
    channel: Array


def cross_layer_equalization(graph: Graph) -> Graph:
    """Give both weights of every `Pair` the same range, channel by channel.

    Channel i is divided by ``s_i = sqrt(range_writer_i / range_reader_i)`` where it is made and
    multiplied by it where it is read; sweeps over all pairs until nothing moves, since a
    depthwise layer is in two of them. A Clip other than a Relu is not homogeneous: its layer
    is no writer. Without a pair the graph itself.
    """
    pairs = homogeneous_pairs(graph)
    rewrite = _Rewrite(graph)
    total = [np.ones(pair.writer.channels) for pair in pairs]
    for _ in range(_SWEEPS):
        moved = 0.0
        for pair, so_far in zip(pairs, total, strict=True):
            made = rewrite.output_peaks(pair.writer)
            read = _by_channel(rewrite.input_peaks(pair.reader), pair)
            wanted = so_far * np.sqrt(_ratio(made, read))
            scale = np.clip(wanted, 1 / LIMIT, LIMIT) / so_far
            so_far *= scale
            rewrite.move(pair, scale)
            moved = max(moved, float(np.abs(scale - 1).max()))
        if moved < 1e-3:
            break
    return rewrite.graph() if pairs else graph


def smooth(graph: Graph, peaks: Mapping[str, Array], alpha: float) -> Graph:
    """Divide activations by ``peak^alpha / weight_peak^(1 - alpha)``, channel by channel.

    Of the tensors that Gemm and MatMul layers read: those behind a LayerNormalization (or
    another product with a constant vector), scaled in its gain and bias, and those behind a
    layer that makes a `Pair` with the reader, as a value projection does with the output
    projection. All layers that read a tensor share its factors; other readers of a normalized
    tensor, as a skip connection, get it through a Mul that takes them back.

    ``peaks``: tensor of `smoothed_tensors` → largest magnitude of each channel of the last axis
    (`autoquant.calibration.channel_peaks`). ``alpha``: 0 evens out weights, 1 activations.
    """
    rewrite = _Rewrite(graph)
    for tensor, norm in _norms(graph).items():
        readers = _dense_readers(graph, tensor)
        weight = np.max([rewrite.input_peaks(layer) for layer in readers], axis=0)
        scale = _migration(peaks[tensor], weight, alpha)
        for name in norm:
            rewrite.multiply(name, 1 / scale)
        for layer in readers:
            rewrite.scale_inputs(layer, scale)
        if len(readers) < len(graph.consumers[tensor]):
            rewrite.restored[tensor] = scale
    for pair in _dense_pairs(graph):
        weight = _by_channel(rewrite.input_peaks(pair.reader), pair)
        peak = _by_channel(peaks[pair.reader.input], pair)
        rewrite.move(pair, _migration(peak, weight, alpha))
    return rewrite.graph()


def smoothed_tensors(graph: Graph) -> list[str]:
    """The tensors whose channels `smooth` scales, so needs to know."""
    return list(dict.fromkeys([*_norms(graph), *(p.reader.input for p in _dense_pairs(graph))]))


def _migration(peak: Array, weight: Array, alpha: float) -> Array:
    usable = (peak > 0) & (weight > 0)
    peak, weight = np.where(usable, peak, 1.0), np.where(usable, weight, 1.0)
    scale: Array = np.clip(peak**alpha / weight ** (1 - alpha), 1 / LIMIT, LIMIT)
    return np.where(usable, scale, 1.0)


def _ratio(above: Array, below: Array) -> Array:
    """1 where either is 0, as for a dead channel."""
    usable = (above > 0) & (below > 0)
    found: Array = np.where(usable, above, 1.0) / np.where(usable, below, 1.0)
    return found


def _by_channel(found: Array, pair: Pair) -> Array:
    """A maximum of each input channel of the reader → of each output channel of the writer."""
    result = np.zeros(pair.writer.channels)
    np.maximum.at(result, pair.channel, found)
    return result


# --- what can be scaled ------------------------------------------------------------------------


def homogeneous_pairs(graph: Graph) -> list[Pair]:
    """All pairs, in the order of their writers."""
    return [pair for layer in graph.layers for pair in _pair(graph, layer)]


def _dense_pairs(graph: Graph) -> Iterator[Pair]:
    taken = _norms(graph)
    for pair in homogeneous_pairs(graph):
        if pair.reader.kind != "Conv" and pair.reader.input not in taken:
            yield pair


def _pair(graph: Graph, writer: Layer) -> Iterator[Pair]:
    """Follow the channels of a layer's output to the one layer that reads them.

    ``labels`` has the shape of the tensor, at batch 1, and says of each element which channel it
    belongs to: so a reshape into heads and back needs no pattern.
    """
    own = [writer.weight, *([writer.bias] if writer.bias else [])]
    inside = [graph.nodes[i] for i in writer.absorbed]
    if writer.kind not in _KINDS or not all(_owned(graph, name) for name in own):
        return
    if not all(node.op_type == "Add" or _is_homogeneous(graph, node) for node in inside):
        return
    tensor = writer.output
    shape = graph.tensors[tensor].shape
    axis = 1 if writer.kind == "Conv" else len(shape) - 1
    labels = _along(np.arange(writer.channels), axis, shape)
    while True:
        index = _sole_reader(graph, tensor)
        if index is None:
            return
        reader = graph.by_node.get(index)
        if reader is not None and reader.kind != PRODUCT:
            channel = _input_channels(reader, labels)
            fits = reader.input == tensor and reader.kind in _KINDS
            if fits and channel is not None and _owned(graph, reader.weight):
                yield Pair(writer, reader, channel)
            return
        found = _through(graph, graph.nodes[index], tensor, labels)
        if found is None:
            return
        tensor, labels = graph.nodes[index].output[0], found


def _through(graph: Graph, node: onnx.NodeProto, tensor: str, labels: Array) -> Array | None:
    """The labels behind a node; None where it is not homogeneous or mixes channels."""
    if len(node.output) != 1 or list(node.input).count(tensor) != 1:
        return None
    shape = graph.tensors[node.output[0]].shape
    if _is_homogeneous(graph, node):
        return labels
    if node.op_type in _POOLS:
        first = labels[(slice(None), slice(None), *[slice(1)] * (labels.ndim - 2))]
        return np.broadcast_to(first, shape) if bool((labels == first).all()) else None
    if node.op_type in _SHAPES and node.input[0] == tensor:
        return labels.reshape(shape) if shape[:1] == labels.shape[:1] else None
    if node.op_type == "Transpose":
        order = attributes(node).get("perm", list(range(labels.ndim))[::-1])
        return labels.transpose(order) if order[0] == 0 else None
    if node.op_type == "MatMul" and node.input[1] == tensor and labels.ndim > 2:  # attention · V
        row = labels[..., :1, :]
        same = bool((labels == row).all()) and shape[:-2] == labels.shape[:-2]
        return np.broadcast_to(row, shape) if same else None
    return None


def _input_channels(layer: Layer, labels: Array) -> Array | None:
    """The label of each input channel; None where a channel has several."""
    axis = 1 if layer.kind == "Conv" else labels.ndim - 1
    first = labels[tuple(slice(None) if i == axis else slice(1) for i in range(labels.ndim))]
    return first.reshape(-1) if bool((labels == first).all()) else None


def _along(vector: Array, axis: int, shape: tuple[int, ...]) -> Array:
    laid = vector.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.broadcast_to(laid, shape)


def _is_homogeneous(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether f(s·x) = s·f(x) for s > 0, element by element."""
    bounds = clamp_bounds(node, graph.initializers)
    if bounds is not None:
        return all(bound == 0 or math.isinf(bound) for bound in bounds)
    return node.op_type == "LeakyRelu"


def _read_inside(graph: Graph) -> set[str]:
    """Names that subgraphs (of If, Loop, Scan) read."""
    return {
        name
        for node in graph.nodes
        for attribute in node.attribute
        if attribute.HasField("g")
        for inner in attribute.g.node
        for name in inner.input
    }


def _sole_reader(graph: Graph, tensor: str) -> int | None:
    readers = graph.consumers.get(tensor, [])
    alone = len(readers) == 1 and tensor not in graph.outputs
    return readers[0] if alone and tensor not in _read_inside(graph) else None


def _owned(graph: Graph, name: str) -> bool:
    """Whether an initializer is read once."""
    readers = graph.consumers.get(name, [])
    if len(readers) != 1 or name not in graph.initializers or name in _read_inside(graph):
        return False
    return list(graph.nodes[readers[0]].input).count(name) == 1


def _norms(graph: Graph) -> dict[str, list[str]]:
    """Tensor that dense layers read → the vectors that scale and shift its channels."""
    found = {}
    for tensor in dict.fromkeys(layer.input for layer in graph.layers):
        index = graph.producer.get(tensor)
        if index is None or tensor in graph.outputs or tensor in _read_inside(graph):
            continue
        if not _dense_readers(graph, tensor):
            continue
        vectors = _affine(graph, graph.nodes[index], graph.tensors[tensor].shape[-1:])
        if vectors and all(_owned(graph, name) for name in vectors):
            found[tensor] = vectors
    return found


def _affine(graph: Graph, node: onnx.NodeProto, width: tuple[int, ...]) -> list[str]:
    """The gain, and bias, of a normalization or of what it was decomposed into."""
    if node.op_type == "LayerNormalization":
        names = [n for n in list(node.input)[1:3] if n]
        plain = len([n for n in node.output if n]) == 1
        return names if plain and all(_has_shape(graph, n, width) for n in names) else []
    constant = [n for n in node.input if _has_shape(graph, n, width)]
    if len(node.input) != 2 or len(constant) != 1:
        return []
    if node.op_type == "Mul":
        return constant
    source = next(n for n in node.input if n not in constant)
    if node.op_type != "Add" or source not in graph.producer:
        return []
    before = graph.nodes[graph.producer[source]]
    if before.op_type != "Mul" or _sole_reader(graph, source) is None:
        return []
    gain = _affine(graph, before, width)
    return [*gain, *constant] if gain else []


def _has_shape(graph: Graph, name: str, shape: tuple[int, ...]) -> bool:
    return name in graph.initializers and tuple(graph.initializers[name].dims) == shape


def _dense_readers(graph: Graph, tensor: str) -> list[Layer]:
    """Gemm and MatMul layers that read the tensor with a weight of their own."""
    readers = [graph.by_node.get(index) for index in graph.consumers.get(tensor, ())]
    return [
        layer
        for layer in readers
        if layer is not None
        and layer.kind in ("Gemm", "MatMul")
        and layer.input == tensor
        and _owned(graph, layer.weight)
    ]


# --- the rewritten graph -----------------------------------------------------------------------


class _Rewrite:
    """A graph in the making: float64 copies of the initializers that change.

    ``restored``: tensor → what readers other than dense layers multiply it by.
    """

    def __init__(self, graph: Graph) -> None:
        self.source = graph
        self.changed: dict[str, Array] = {}
        self.restored: dict[str, Array] = {}

    def array(self, name: str) -> Array:
        """The initializer as it is by now, to be written to."""
        if name not in self.changed:
            self.changed[name] = np.array(self.source.array(name), np.float64, order="C")
        return self.changed[name]

    def multiply(self, name: str, factor: Array) -> None:
        """Scale a vector, whatever its shape."""
        array = self.array(name)
        array *= factor.reshape(array.shape)

    def output_peaks(self, layer: Layer) -> Array:
        """Largest magnitude of the weights of each output channel."""
        weight = np.abs(self.array(layer.weight))
        rest = tuple(i for i in range(weight.ndim) if i != layer.channel_axis)
        peaks: Array = weight.max(axis=rest)
        return peaks

    def _by_input(self, layer: Layer) -> tuple[Array, tuple[int, ...]]:
        """A view of the weight, and its axes that are not about input channels."""
        weight = self.array(layer.weight)
        if layer.kind != "Conv":
            return weight, (layer.channel_axis,)
        per_group = weight.shape[1]
        return weight.reshape(layer.group, weight.shape[0] // layer.group, per_group, -1), (1, 3)

    def input_peaks(self, layer: Layer) -> Array:
        """Largest magnitude of the weights that read each input channel."""
        weight, rest = self._by_input(layer)
        peaks: Array = np.abs(weight).max(axis=rest).reshape(-1)
        return peaks

    def scale_inputs(self, layer: Layer, factor: Array) -> None:
        """Multiply the weights that read each input channel."""
        weight, rest = self._by_input(layer)
        weight *= factor.reshape([1 if i in rest else n for i, n in enumerate(weight.shape)])

    def move(self, pair: Pair, scale: Array) -> None:
        """Divide the writer's channels by ``scale``, multiply what reads them."""
        writer = pair.writer
        weight = self.array(writer.weight)
        weight /= scale.reshape([-1 if i == writer.channel_axis else 1 for i in range(weight.ndim)])
        if writer.bias:
            self.multiply(writer.bias, 1 / scale)
        self.scale_inputs(pair.reader, scale[pair.channel])

    def graph(self) -> Graph:
        """The new graph: same names, and a Mul for each restored tensor."""
        source = self.source
        model = onnx.ModelProto()
        model.CopyFrom(source.model)
        for proto in model.graph.initializer:
            if proto.name in self.changed:
                array = self.changed[proto.name].astype(np.float32)
                proto.CopyFrom(numpy_helper.from_array(array, proto.name))
        tensors, place = dict(source.tensors), {}
        nodes: list[onnx.NodeProto] = []
        after = {source.producer[tensor]: tensor for tensor in self.restored}
        for index, node in enumerate(model.graph.node):
            place[index] = len(nodes)
            nodes.append(node)
            if index in after:
                tensor = after[index]
                factor, restored = f"{tensor}.scale", f"{tensor}.restored"
                vector = self.restored[tensor].astype(np.float32)
                model.graph.initializer.append(numpy_helper.from_array(vector, factor))
                nodes.append(helper.make_node("Mul", [tensor, factor], [restored], name=restored))
                tensors[restored] = source.tensors[tensor]
                dense = {layer.node for layer in _dense_readers(source, tensor)}
                for reader in set(source.consumers[tensor]) - dense:
                    names = model.graph.node[reader].input
                    names[:] = [restored if name == tensor else name for name in names]
        layers = [
            replace(
                layer,
                node=place[layer.node],
                absorbed=tuple(place[i] for i in layer.absorbed),
                input=model.graph.node[layer.node].input[1 if layer.kind == "Gather" else 0],
            )
            for layer in source.layers
        ]
        if len(nodes) > len(model.graph.node):
            kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del model.graph.node[:]
            model.graph.node.extend(kept)
        return Graph(model, layers, tensors)
