"""Costs that follow from the graph alone: file size, weights, BOPs, peak activation memory."""

from __future__ import annotations

import math
from collections import defaultdict

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.qdq import Plan
from autoquant.compress.rounding import PLANES
from autoquant.graph import Graph, Layer

_BYTES = {"float32": 4, "int64": 8, "int32": 4, "float16": 2, "bool": 1, "uint8": 1, "int8": 1}


def weight_bytes(graph: Graph, candidate: Candidate) -> tuple[int, int]:
    """(bytes, count) of the quantizable layers' weights, packed at their own bits.

    Biases and scales are left out; a weight that several layers share counts once.
    """
    bits: dict[str, tuple[int, int]] = {}
    for layer in graph.layers:
        width = candidate.choice(layer.name).weight_bits
        known = bits.get(layer.weight, (0, 0))[1]
        bits[layer.weight] = (layer.parameters, max(known, width))
    stored = sum(math.ceil(count * width / 8) for count, width in bits.values())
    return stored, sum(count for count, _ in bits.values())


def bops(graph: Graph, candidate: Candidate) -> int:
    """Bit operations of a sample: Σ MACs × weight bits × activation bits (Baskin et al. 2018).

    Products between activations count with 32 bits.
    """
    total = graph.other_macs * 32 * 32
    for layer in graph.layers:
        choice = candidate.choice(layer.name)
        total += layer.macs * choice.weight_bits * choice.activation_bits
    return total


def peak_memory_bytes(graph: Graph, plan: Plan) -> int:
    """Most bytes of live activation tensors at any node, for one sample.

    A tensor lives from its producer to its last reader. It holds one byte an element on a grid
    of up to 8 bits (two at 16), its own type where a float reader or producer needs it, and
    both where both exist. What a unit keeps to itself (before its Relu) takes nothing.
    """
    births: dict[int, int] = defaultdict(int)
    deaths: dict[int, int] = defaultdict(int)
    starts = {layer.output: layer.node for layer in graph.layers}
    starts |= {graph.nodes[end].output[0]: index for index, end in plan.units.items()}
    inner = {graph.nodes[i].output[0] for x in graph.layers for i in (x.node, *x.absorbed)}
    inner |= {graph.nodes[index].output[0] for index in plan.units}
    for name, tensor in graph.tensors.items():
        if name in inner and name not in starts:
            continue
        size = tensor.elements * _held(graph, plan, name)
        start = starts.get(name, graph.producer.get(name, 0))
        end = max(graph.consumers.get(name, ()), default=start)
        births[start] += size
        deaths[len(graph.nodes) if name in graph.outputs else end] += size
    live = peak = 0
    for index in range(len(graph.nodes) + 1):
        live += births[index]
        peak = max(peak, live)
        live -= deaths[index]
    return peak


def _held(graph: Graph, plan: Plan, name: str) -> int:
    """Bytes an element of all forms in which a tensor exists."""
    size = _BYTES.get(graph.tensors[name].dtype, 4)
    narrow = sum(2 if bits == 16 else 1 for bits in plan.narrow.get(name, ()))
    if name not in plan.roots:
        return size + narrow
    at_source = plan.quantized_at_source(graph, name)
    float_reader = name in graph.outputs or any(
        not plan.reads_int8(graph, i) for i in graph.consumers.get(name, ())
    )
    return 1 + narrow + (size if float_reader or not at_source else 0)


# --- file size: protobuf arithmetic over what the rewrite adds -------------------------------


def base_bytes(graph: Graph) -> int:
    """The float file without the weights of its layers."""
    weights = {layer.weight for layer in graph.layers}
    return int(graph.model.ByteSize()) - sum(
        _framed(graph.initializers[name].ByteSize()) for name in weights
    )


def added_bytes(graph: Graph, candidate: Candidate, plan: Plan) -> int:
    """What a candidate adds to `base_bytes`: weights, scales, biases, Q/DQ pairs, unpacking."""
    total = 40  # metadata
    stored: set[str] = set()
    widths: dict[int, int] = {}
    for layer in graph.layers:
        choice = candidate.choice(layer.name)
        how = plan.modes[layer.name]
        total += _layer_bytes(graph, layer, choice, how, stored, widths)
    for bits, count in widths.items():
        planes = PLANES[bits]
        total += sum(_tensor(9, math.ceil(count / 8) * width, 2) for width in planes)
        total += 180 + 185 * len(planes) + 60 * (len(planes) - 1)
    for tensor in plan.roots:
        total += 2 * len(tensor) + _pair(len(tensor))
    for tensor, narrow in plan.narrow.items():
        for bits in narrow:
            total += _pair(len(tensor)) + 2 * len(tensor) + 6
            total += len(tensor) * 2 + 60 if bits < 8 else 0
    return total


def _layer_bytes(
    graph: Graph,
    layer: Layer,
    choice: LayerChoice,
    how: str,
    stored: set[str],
    widths: dict[int, int],
) -> int:
    bits, name = choice.weight_bits, len(layer.name)
    stem = len(layer.weight.removesuffix(".weight")) + 3
    count, rank = layer.parameters, len(layer.weight_shape)
    channels = layer.channels if choice.granularity == "channel" else 1
    key = f"{layer.weight}/{bits}/{choice.granularity}"
    first, total = key not in stored, 0
    stored.add(key)
    if bits == 32:
        return _tensor(len(layer.weight), 4 * count, rank) if first else 0
    if not first:
        return 0
    if bits in PLANES:
        widths[bits] = widths.get(bits, 0) + math.ceil(count / 8) * 8
        total += 3 * stem + 2 * 7 + 26 + 9  # Reshape, its place in Split, its size
        total += 9 if count % 8 == 0 else stem + 30
    elif bits == 16 and not choice.int16:
        return _tensor(stem + 1, 2 * count, rank) + 2 * stem + 25
    else:
        total += _tensor(stem, count * (2 if bits == 16 else 1), rank)
    total += _tensor(stem + 2, 4 * channels, 1)  # scales
    if how == "int8":
        total += 3 * stem + 45  # DequantizeLinear
        if layer.kind != "Conv":
            total += channels + 22 + stem // 4
        if layer.bias is not None and layer.kind != "MatMul":
            width = layer.channels
            total += _tensor(name + 4, 4 * width, 1) + _tensor(name + 4, 4 * channels, 1)
            total += 3 * name + 52 - _tensor(len(layer.bias), 4 * width, 1)
    elif how == "dynamic":
        total += 8 * name + 3 * len(layer.input) + 170
    elif layer.kind == "Gather":
        total += 5 * len(layer.output) + 2 * stem + 110
    else:
        total += 5 * stem + 40
    return total


def _pair(name: int) -> int:
    """QuantizeLinear and DequantizeLinear of a tensor, and its scale."""
    return 2 * name + 89


def _tensor(name: int, payload: int, rank: int) -> int:
    """An initializer: payload, name and dimensions."""
    return _framed(payload + name + 4 + 2 * rank + 3)


def _framed(size: int) -> int:
    """A message with its tag and length."""
    return size + 2 + (size > 127) + (size > 16383) + (size > 2097151)
