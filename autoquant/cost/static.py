"""Costs that follow from the graph alone: file size, weights, BOPs, peak activation memory."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from onnx import helper

from autoquant.candidate import Candidate, LayerChoice, block_size
from autoquant.compress.bank import PLANES, Bank
from autoquant.compress.coding import LEAST_CODED
from autoquant.compress.qdq import (
    NBITS_DOMAIN,
    OPENVINO,
    TENSORRT,
    Plan,
    from_softmax,
    nbits_attributes,
)
from autoquant.graph import Graph, Layer, clamp_bounds

_KEEP_SIGN = ("GlobalAveragePool", "AveragePool", "MaxPool", "Flatten", "Reshape", "Transpose")
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


def block_scale_bytes(layer: Layer, choice: LayerChoice) -> int:
    """Bytes of a layer's scales where blocks have their own: float16 each."""
    block = block_size(choice.granularity)
    return 2 * layer.channels * math.ceil(layer.parameters / layer.channels / block) if block else 0


def bops(graph: Graph, candidate: Candidate) -> int:
    """Bit operations of a sample: Σ MACs × weight bits × activation bits (Baskin et al. 2018).

    Products between activations have the bits of their inputs.
    """
    total = graph.other_macs * 32 * 32
    for layer in graph.products:
        total -= layer.macs * (32 * 32 - candidate.choice(layer.name).activation_bits ** 2)
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
    inner = graph.hidden | {graph.nodes[index].output[0] for index in plan.units}
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


# --- file size: protobuf arithmetic over what the rewrite writes -----------------------------


class FileSize:
    """Sizes of the files that `compress` writes for candidates of one graph, without writing.

    ``bank``: where a layer's bias shift comes from; None for none. Exact but for constants of
    equal value, of which the file holds one.
    """

    def __init__(
        self, graph: Graph, bank: Bank | None = None, dialect: str = "onnxruntime"
    ) -> None:
        self.graph, self.bank, self.dialect = graph, bank, dialect
        body = graph.model.graph
        self.nodes = [
            (node.ByteSize(), tuple(node.input), tuple(node.output)) for node in graph.nodes
        ]
        self.uses = Counter(name for _, inputs, _ in self.nodes for name in inputs)
        self.uses.update(graph.outputs)
        self.initializers = {
            n: _framed(i.ByteSize()) for n, i in graph.initializers.items() if self.uses[n]
        }
        self.from_zero: set[str] = set()  # what comes out of a Relu, or pools or moves that
        for node in graph.nodes:
            bounds = clamp_bounds(node, graph.initializers)
            keeps = node.op_type in _KEEP_SIGN and node.input[0] in self.from_zero
            if keeps or (bounds is not None and bounds[0] == 0):
                self.from_zero.update(node.output)
        self.ends = sum(_framed(v.ByteSize()) for v in (*body.input, *body.output))
        self.ends += _framed(len("autoquant"))
        imports = graph.model.opset_import
        self.domains = {opset.domain for opset in imports}
        self.outside = sum(_framed(o.ByteSize()) for o in (*imports, *graph.model.functions))
        metadata = _string(len("autoquant.candidate")) + _string(16)
        self.outside += 2 + _string(len("autoquant")) + _framed(metadata)

    def predict(self, candidate: Candidate, plan: Plan) -> tuple[int, int]:
        """Bytes of the file of a resolved candidate with its plan, and of its entropy-coded form.

        The second is exact for the weights' codes. The rest is LZMA, as fitted to the files of
        the tests' networks, ResNet-8 and ResNet-20: within 2 % for files above 30 kB. Without a
        bank, weights count by `LayerChoice.stored_bits`.
        """
        file = _File(self, candidate, plan)
        size = file.size()
        others = size - file.plain - file.data - file.floats
        left = 0.92 * file.floats + 0.63 * file.data + 3.15 * others**0.7 + 30 * file.tables + 194
        return size, round(file.coded + left)

    def coded_bytes(self, layer: Layer, choice: LayerChoice) -> float:
        """What the layer's weights take: in the entropy code, where they have at most 8 bits."""
        if self.bank is None or choice.weight_bits > 8:
            return layer.parameters * choice.stored_bits / 8
        return float(self.bank.get(layer, choice).coded_bytes)


class _File:
    """One file: adds up nodes and initializers by the lengths of their names and contents."""

    def __init__(self, sizes: FileSize, candidate: Candidate, plan: Plan) -> None:
        self.sizes, self.graph = sizes, sizes.graph
        self.candidate, self.plan = candidate, plan
        self.is_tensorrt = sizes.dialect == TENSORRT
        self.is_openvino = sizes.dialect == OPENVINO
        self.total = self.outside = 0
        self.floats = self.data = 0  # contents that are not coded: the network's own, and others
        self.plain = self.tables = 0  # those that are: as they are, and how many
        self.coded = 0.0
        self.known: set[Any] = set()  # constants, weights and their views that are written
        self.packed: dict[int, list[int]] = defaultdict(list)  # width → weights an entry
        self.packed_names: dict[int, int] = defaultdict(int)
        self.constants = 0
        self.shift: dict[int, int] = defaultdict(int)  # node → bytes that its copy differs by
        self.left: Counter[str] = Counter()  # initializer → uses that are gone
        self.gone: set[int] = set()  # nodes that are replaced

    def size(self) -> int:
        graph, plan = self.graph, self.plan
        for layer in graph.layers:
            if plan.modes[layer.name] != "float":
                self._layer(layer, self.candidate.choice(layer.name))
        for tensor in plan.roots:
            name = len(tensor)
            self._pair(name, name + 2, name + 3 if self._renamed(tensor) else name, tensor, 8)
        for tensor, widths in plan.narrow.items():
            name = len(tensor)
            view = name + 3 if plan.quantized_at_source(graph, tensor) else name
            for bits in widths:
                digits, source = len(str(bits)), view
                if bits < 8:
                    source = name + 5 + digits
                    low: Any = () if tensor in self.sizes.from_zero else (tensor, bits)
                    bounds = [self._constant(("low", low), (), 4)]
                    bounds.append(self._constant(("high", tensor, bits), (), 4))
                    self._node("Clip", [view, *bounds], [source])
                self._pair(source, name + 2 + digits, name + 3 + digits, tensor, bits)
        for bits in self.packed:
            self._unpack(bits)
        for index, (size, inputs, outputs) in enumerate(self.sizes.nodes):
            if index not in self.gone:
                size += self.shift[index] + sum(self._read(index, name) for name in inputs)
                if index in plan.int8_nodes:
                    size += sum(4 for n in outputs if n in plan.roots and n in graph.outputs)
                self.total += _framed(size)
        for name, size in self.sizes.initializers.items():
            if not self.left[name] or self.left[name] < self.sizes.uses[name]:
                self.total += size
                self.floats += size
        return _framed(self.total + self.sizes.ends) + self.sizes.outside + self.outside

    def _renamed(self, tensor: str) -> bool:
        """Whether the float view of a tensor has another name than the tensor."""
        at_source = self.plan.quantized_at_source(self.graph, tensor)
        return not (at_source and tensor in self.graph.outputs)

    def _read(self, index: int, tensor: str) -> int:
        """How much longer the name is that a node reads for a tensor."""
        layer = self.graph.by_node.get(index)
        if layer is not None and tensor in layer.inputs:
            choice = self.candidate.choice(layer.name)
            if choice.activation_bits not in (8, 32):
                return 3 + len(str(choice.activation_bits))
        elif tensor not in self.plan.roots:
            return 0
        reads = index in self.plan.int8_nodes or self.plan.quantized_at_source(self.graph, tensor)
        if layer is not None and tensor in layer.inputs:
            reads |= choice.activation_bits == 8 and not choice.dynamic
        return 3 if reads and tensor in self.plan.roots and self._renamed(tensor) else 0

    # layers

    def _layer(self, layer: Layer, choice: LayerChoice) -> None:
        how, bits, index = self.plan.modes[layer.name], choice.weight_bits, layer.node
        stem = len(layer.weight.removesuffix(".weight")) + 2 + len(str(bits))
        stem += choice.granularity == "tensor"
        block = block_size(choice.granularity)
        stem += 1 + len(str(block)) if block else 0
        stem += 1 + len(str(layer.channel_axis)) if layer.channel_axis else 0
        stem += 1 + len(choice.rounding) if choice.rounding else 0
        stem += 2 + len(str(choice.sparsity)) if choice.sparsity else 0
        stem += 2 * choice.codebook
        key = (
            layer.weight,
            layer.channel_axis,
            bits,
            choice.granularity,
            choice.rounding,
            choice.sparsity,
            choice.codebook,
        )
        if bits == 32:
            return
        self.left[layer.weight] += 1
        if layer.kind == "Gather":
            self._embedding(layer, choice, stem, key)
        elif choice.nbits:
            self._nbits(layer, choice, stem, key)
        elif bits == 16 and not choice.int16:
            self.shift[index] += stem + 2 - len(layer.weight)
            if self._first(key, "float"):
                self._tensor(stem, layer.weight_shape, 2, True)
                self._node("Cast", [stem], [stem + 2], attributes=_CAST)
        elif how == "weight-only" and self.is_tensorrt:
            self._int4(layer, choice, stem, key)
        else:
            self._weight(layer, choice, stem, key)
            shifted = self._shifted(layer, choice)
            if how == "dynamic":
                self._dynamic(layer, stem, key, shifted)
            elif how == "int8":
                self._int8(layer, stem, key, shifted)
            else:
                self._unfolded(layer, choice, stem, key, shifted)

    def _int8(self, layer: Layer, stem: int, key: Any, shifted: bool) -> None:
        """Weight and bias behind a DequantizeLinear each."""
        name, channels = len(layer.name) + 2, layer.channels
        scales = (channels,) if key[3] == "channel" or channels == 1 else ()
        axis = _AXIS if scales else 0
        self.shift[layer.node] += stem + 3 - len(layer.weight)
        if self._first(key, "int8"):
            self._tensor(stem + 2, scales, 4)
            self._tensor(stem + 2, scales, 1)
            self.data -= math.prod(scales)  # zeros: they take nothing in the entropy code
            inputs = [stem, stem + 2, stem + 2]
            self._node("DequantizeLinear", inputs, [stem + 3], attributes=axis)
        if layer.kind == "MatMul":
            self._added_bias(layer, shifted)
        elif self.is_tensorrt:
            self._shifted_bias(layer, shifted)
        elif layer.bias is not None or shifted:
            self._node_bias(layer)
            self._tensor(name + 2, (channels,), 4)
            self._tensor(name + 2, scales, 4)
            product = 4 * math.prod(scales)  # of two that are stored
            self.data, self.plain = self.data - product, self.plain + product
            self._node("DequantizeLinear", [name + 2, name + 2], [name], attributes=axis)

    def _unfolded(
        self, layer: Layer, choice: LayerChoice, stem: int, key: Any, shifted: bool
    ) -> None:
        """A weight-only layer: Cast and Mul make the weight float."""
        channels, rank = layer.channels, len(layer.weight_shape)
        self.shift[layer.node] += stem + 2 - len(layer.weight)
        if self._first(key, "float"):
            ones = (1,) * (rank - 1)  # the order of dimensions changes no size
            if block_size(key[3]):
                self._block_scale(layer, choice, stem)
            else:
                self._tensor(stem + 3, (*ones, channels) if key[3] == "channel" else (1,), 4)
            self._node("Cast", [stem], [stem + 2], attributes=_CAST)
            self._node("Mul", [stem + 2, stem + 3], [stem + 2])
        self._shifted_bias(layer, shifted)

    def _int4(self, layer: Layer, choice: LayerChoice, stem: int, key: Any) -> None:
        """A product's weights as int4 behind a DequantizeLinear of blocks (tensorrt)."""
        block, inputs = block_size(choice.granularity), layer.parameters // layer.channels
        self.shift[layer.node] += stem + 2 - len(layer.weight)
        if self._first(key, "float"):
            self._tensor(stem, (1, math.ceil(layer.parameters / 2)), 1, True)
            self._tensor(stem + 3, (layer.channels, inputs // block), 4)
            attributes = _attribute("axis", 1) + _attribute("block_size", block)
            view = stem + 3 if layer.channel_axis else stem + 2
            self._node("DequantizeLinear", [stem, stem + 3], [view], attributes=attributes)
            if layer.channel_axis:
                self._node("Transpose", [view], [stem + 2], attributes=_PERM)
        self._shifted_bias(layer, self._shifted(layer, choice))

    def _scales(self, name: int, layer: Layer, choice: LayerChoice, dims: Sequence[int]) -> int:
        """Scales of blocks, as float16 with a Cast where they are; the length of the name."""
        half = self._half_scale(layer, choice)
        self._tensor(name, dims, 2 if half else 4)
        if half:
            self._node("Cast", [name], [name + 1], attributes=_CAST)
        return name + half

    def _half_scale(self, layer: Layer, choice: LayerChoice) -> bool:
        bank = self.sizes.bank
        if not block_size(choice.granularity):
            return False
        return bank is None or bank.get(layer, choice).half_scale

    def _block_scale(self, layer: Layer, choice: LayerChoice, stem: int) -> None:
        """Scales of blocks, repeated to the weight's shape by constant nodes."""
        block = block_size(choice.granularity)
        channels, rank, part = layer.channels, len(layer.weight_shape), stem + 3
        inputs = layer.parameters // channels
        count = math.ceil(inputs / block)
        scale = self._scales(part, layer, choice, (channels, count, 1))
        shape = self._constant(("shape", channels, count, block), (3,), 8)
        self._node("Expand", [scale, shape], [part])
        if inputs % block:
            flat = self._constant(("shape", channels, -1), (2,), 8)
            self._node("Reshape", [part, flat], [part])
            ends = [self._constant(("end", v), (1,), 8) for v in (0, inputs, 1)]
            self._node("Slice", [part, *ends], [part])
        first = layer.weight_shape[layer.channel_axis]
        others = [n for i, n in enumerate(layer.weight_shape) if i != layer.channel_axis]
        moved = self._constant((first, *others), (rank,), 8)
        self._node("Reshape", [part, moved], [part])
        if layer.channel_axis:
            perm = _attribute("perm", list(range(rank)))
            self._node("Transpose", [part], [part], attributes=perm)

    def _nbits(self, layer: Layer, choice: LayerChoice, stem: int, key: Any) -> None:
        """MatMulNBits in place of the layer's node, with its own packed weight and scales."""
        node, name = self.graph.nodes[layer.node], len(layer.name)
        self.gone.add(layer.node)
        block, channels = block_size(choice.granularity), layer.channels
        count = math.ceil(layer.parameters // channels / block)
        if self._first(key, "nbits"):
            self._tensor(stem + 2, (channels, count, block * choice.weight_bits // 8), 1, True)
            self._scales(stem + 3, layer, choice, (channels, count))
        scale = stem + 3 + self._half_scale(layer, choice)
        inputs = [len(layer.input) + self._read(layer.node, layer.input), stem + 2, scale]
        shifted = self._shifted(layer, choice)
        if layer.kind == "MatMul":
            self._added_bias(layer, shifted)
        elif layer.bias is not None or shifted:
            if layer.bias is not None:
                self.left[layer.bias] += 1
            self._tensor(name + 2, (channels,), 4)
            inputs += [0, 0, name + 2]
        found = sum(_attribute(k, v) for k, v in nbits_attributes(layer, choice).items())
        domain = _string(len(NBITS_DOMAIN))
        self._node("MatMulNBits", inputs, [len(node.output[0])], name, found + domain)
        if self._first(NBITS_DOMAIN, "import") and NBITS_DOMAIN not in self.sizes.domains:
            opset = helper.make_opsetid(NBITS_DOMAIN, 1)
            self.outside += _framed(opset.ByteSize())

    def _shifted(self, layer: Layer, choice: LayerChoice) -> bool:
        """Whether the stored weight comes with a shift of the bias."""
        if self.sizes.bank is None or choice.weight_bits > 8:
            return False
        return self.sizes.bank.get(layer, choice).shift is not None

    def _node_bias(self, layer: Layer) -> None:
        """A Conv or Gemm reads another bias, or gets one."""
        if layer.bias is None:
            self.shift[layer.node] += _string(len(layer.name) + 2)
        else:
            self.shift[layer.node] += len(layer.name) + 2 - len(layer.bias)
            self.left[layer.bias] += 1

    def _shifted_bias(self, layer: Layer, shifted: bool) -> None:
        """A float bias with the weight's shift, where there is one."""
        if layer.kind == "MatMul":
            self._added_bias(layer, shifted)
        elif shifted:
            self._node_bias(layer)
            outputs = layer.channels * (layer.group if layer.kind == "ConvTranspose" else 1)
            self._tensor(len(layer.name) + 2, (outputs,), 4)

    def _added_bias(self, layer: Layer, shifted: bool) -> None:
        """The Add behind a MatMul reads a shifted bias."""
        if shifted and layer.bias is not None:
            self.shift[layer.absorbed[0]] += len(layer.name) + 2 - len(layer.bias)
            self.left[layer.bias] += 1
            self._tensor(len(layer.name) + 2, (layer.channels,), 4)

    def _weight(self, layer: Layer, choice: LayerChoice, stem: int, key: Any) -> None:
        """A stored integer weight, once."""
        if not self._first(key, "stored"):
            return
        count, bits = layer.parameters, choice.weight_bits
        if bits <= 8 and count >= LEAST_CODED:
            width = bits if bits in PLANES and not self.is_tensorrt else 8
            size = math.ceil(count / 8) * width if width < 8 else count
            self.plain, self.data = self.plain + size, self.data - size  # its contents follow
            self.coded += self.sizes.coded_bytes(layer, choice)
            self.tables += 1
        if bits in PLANES and not self.is_tensorrt:
            self.packed[bits].append(count)
            self.packed_names[bits] += _string(stem + 5)
            self.packed_names[bits] += _string(stem + 8) if count % 8 else 0
            shape = self._constant(layer.weight_shape, (len(layer.weight_shape),), 8)
            if key[-1]:  # places in a table
                self._node("Reshape", [stem + 5, shape], [stem + 2])
                self._node("Cast", [stem + 2], [stem + 2], attributes=_CAST)
                self._tensor(stem + 2, (2**bits,), 1)
                self._node("Gather", [stem + 2, stem + 2], [stem], attributes=_AXIS)
                return
            self._node("Reshape", [stem + 5, shape], [stem])
        else:
            self._tensor(stem, layer.weight_shape, 2 if bits == 16 else 1, bits == 16)

    def _embedding(self, layer: Layer, choice: LayerChoice, stem: int, key: Any) -> None:
        output = len(self.graph.nodes[layer.node].output[0])
        self.shift[layer.node] += stem - len(layer.weight) + len(".stored")
        stored = output + len(".stored")
        if choice.weight_bits == 16 and not choice.int16:
            if self._first(key, "float"):
                self._tensor(stem, layer.weight_shape, 2, True)
            self._node("Cast", [stored], [output], attributes=_CAST)
            return
        self._weight(layer, choice, stem, key)
        scale, per_row = stem + 3, choice.granularity != "tensor" and layer.channels > 1
        block = block_size(choice.granularity)
        count = math.ceil(layer.weight_shape[1] / block) if block else 1
        if self._first(key, "float"):
            size = 2 if self._half_scale(layer, choice) else 4
            self._tensor(scale, (layer.channels, count) if per_row else (1,), size)
        if per_row:
            indices = len(self.graph.nodes[layer.node].input[1])
            self._node("Gather", [scale, indices], [output + 6], attributes=_AXIS)
            scale = output + 6
        if self._half_scale(layer, choice):
            self._node("Cast", [scale], [output + 5], attributes=_CAST)
            scale = output + 5
        if block:
            inputs = layer.weight_shape[1]
            owner = self._constant(("owner", inputs, block), (inputs,), 8)
            last = _attribute("axis", -1)
            self._node("Gather", [scale, owner], [output + 7], attributes=last)
            scale = output + 7
        self._node("Cast", [stored], [output + 5], attributes=_CAST)
        self._node("Mul", [output + 5, scale], [output])

    def _dynamic(self, layer: Layer, stem: int, key: Any, shifted: bool) -> None:
        node, name = self.graph.nodes[layer.node], len(layer.name)
        self.gone.add(layer.node)
        source = layer.input if self._read(layer.node, layer.input) == 0 else f"{layer.input}.dq"
        weight, prefix, output = stem, name + 8, len(node.output[0])
        if layer.kind == "Gemm" and layer.channel_axis == 0:
            weight = stem + 3 + name
            self._node("Transpose", [stem], [weight], attributes=_PERM)
        read = len(source) + 8
        if self._first(source, "dynamic"):
            self._node("DynamicQuantizeLinear", [len(source)], [read, read + 6, read + 5])
        self._tensor(prefix + 5, (), 1)
        self._node("MatMulInteger", [read, weight, read + 5, prefix + 5], [prefix + 2], name)
        scales = layer.channels if key[3] == "channel" else 1
        self._tensor(prefix + 13, (scales,), 4)
        self._node("Mul", [read + 6, prefix + 13], [prefix + 2])
        self._node("Cast", [prefix + 2], [prefix + 2], attributes=_CAST)
        has_bias = layer.kind == "Gemm" and (layer.bias is not None or shifted)
        self._node("Mul", [prefix + 2, prefix + 2], [prefix + 2 if has_bias else output])
        if layer.kind == "MatMul":
            self._added_bias(layer, shifted)
        elif layer.bias is not None:
            self.left[layer.bias] += 1
        if has_bias:
            self._tensor(prefix + 5, (layer.channels,), 4)
            self._node("Add", [prefix + 2, prefix + 5], [output])

    # parts

    def _pair(self, source: int, quantized: int, result: int, tensor: str, bits: int) -> None:
        """QuantizeLinear and DequantizeLinear of a tensor; its scale and zero point."""
        root = self.plan.roots.get(tensor, tensor)
        size = 2 if bits == 16 else 1
        unit = from_softmax(self.graph, root)
        scale = self._constant(("scale", "" if unit else root, bits), (), 4)
        shared: Any = (root, bits)
        if unit or root in self.sizes.from_zero:
            shared = ("lowest", size)
        elif root in self.plan.symmetric:
            shared = ("middle", bits)
        zero = self._constant(("zeros", ()) if self.is_tensorrt else ("zero", shared), (), size)
        self._node("QuantizeLinear", [source, scale, zero], [quantized])
        self._node("DequantizeLinear", [quantized, scale, zero], [result])

    def _unpack(self, bits: int) -> None:
        """Blob → planes → integers → Split: the nodes that all weights of one width share."""
        stem, entries = len(f"packed{bits}"), self.packed[bits]
        for i, width in enumerate(PLANES[bits]):
            self._tensor(stem + 2, (sum(math.ceil(n / 8) for n in entries) * width, 1), 1)
            places: Any = (1, 8 // width)
            if self.is_openvino:
                units = self._constant(("units", width), places, 4)
                count = self._constant(("int32", 2**width), (), 4)
                self._node("Cast", [stem + 2], [stem + 4], attributes=_CAST)
                self._node("Div", [stem + 4, units], [stem + 4])
                self._node("Mod", [stem + 4, count], [stem + 4])
            else:
                shift = self._constant(("places", width), places, 1)
                mask = self._constant(("uint8", 2**width - 1), (), 1)
                self._node("BitShift", [stem + 2, shift], [stem + 4], attributes=_RIGHT)
                self._node("BitwiseAnd", [stem + 4, mask], [stem + 4])
            self._node("Reshape", [stem + 4, self._constant("flat", (1,), 8)], [stem + 4])
            if i and self.is_openvino:
                self._node("Mul", [stem + 4, count], [stem + 4])
                self._node("Add", [stem + 4, stem + 4], [stem + 4])
            elif i:
                by = self._constant(("uint8", width), (), 1)
                self._node("BitShift", [stem + 4, by], [stem + 4], attributes=_LEFT)
                self._node("BitwiseOr", [stem + 4, stem + 4], [stem + 4])
        kind = ("int32", 4) if self.is_openvino else ("int8", 1)
        offset = self._constant((kind[0], 2 ** (bits - 1)), (), kind[1])
        self._node("Cast", [stem + 4], [stem + 2], attributes=_CAST)
        self._node("Sub", [stem + 2, offset], [stem + 2])
        parts = len(entries) + sum(1 for n in entries if n % 8)
        self._tensor(stem + 6, (parts,), 8)
        split = 2 * _string(0) + 2 * stem + 8 + self.packed_names[bits] + _string(5) + _AXIS
        self.total += _framed(split)

    def _first(self, key: Any, what: str) -> bool:
        new = (key, what) not in self.known
        self.known.add((key, what))
        return new

    def _constant(self, key: Any, dims: Sequence[int], size: int) -> int:
        """A shared constant; returns the length of its name."""
        name = 1 + len(str(self.constants))
        if self._first(key, "constant"):
            self.constants += 1
            self._tensor(name, dims, size)
        return name

    def _tensor(self, name: int, dims: Sequence[int], size: int, weights: bool = False) -> None:
        """An initializer: dimensions, type, name, contents; ``weights`` that are not coded."""
        content = 2 + _string(name) + _string(size * math.prod(dims))
        if weights:
            self.floats += size * math.prod(dims)
        else:
            self.data += size * math.prod(dims)
        self.total += _framed(content + sum(1 + _varint(d) for d in dims))

    def _node(
        self,
        op: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        name: int = 0,
        attributes: int = 0,
    ) -> None:
        size = sum(map(_string, (*inputs, *outputs))) + _string(len(op)) + attributes
        self.total += _framed(size + (_string(name) if name else 0))


def _varint(value: int) -> int:
    """Bytes of a number in a protobuf."""
    return (value.bit_length() + 6) // 7 or 1


def _framed(size: int) -> int:
    """A field of ``size`` bytes with its tag and length: most of the arithmetic here."""
    return size + 2 if size < 128 else 1 + _varint(size) + size


_string = _framed


def _attribute(name: str, value: Any) -> int:
    return _framed(helper.make_attribute(name, value).ByteSize())


_AXIS, _CAST = _attribute("axis", 0), _attribute("to", 1)
_RIGHT, _LEFT = _attribute("direction", "RIGHT"), _attribute("direction", "LEFT")
_PERM = _attribute("perm", [1, 0])
