"""Float ONNX graph + candidate → quantized ONNX graph: the artifact that is scored and ships.

`plan` decides where precision changes; `assemble` writes the graph. Both take milliseconds.

The rules, each measured in onnxruntime: a layer and its Relu or Clip are one unit with one
QuantizeLinear behind it, on a grid inside the bounds of the Clip; every tensor has one Q/DQ
pair that its int8 consumers share; the output of an int8 convolution, or Gemm with Relu, is
always quantized, else it does not run in int8; a sum, product or concatenation of quantized
tensors is quantized too; reshapes, slices and max-pools carry the grid of their input; biases
are int32. Weights of 2…7 bits are packed planes in one blob a width, joined by standard
operators that fold into int8 at load. Activations below 8 bits are clipped in float first,
since ONNX Runtime has no narrower kernel.

The dialect ``tensorrt`` follows TensorRT's explicit quantization: every grid is int8 with zero
point 0, biases stay float, weights of 2…8 bits are int8 initializers in front of a
DequantizeLinear, and stored weights of a float layer are int4 in blocks; see `refusal`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autoquant.calibration import Calibration
from autoquant.candidate import Candidate, LayerChoice, block_size
from autoquant.compress.bank import PLANES, Bank, QuantizedWeight, broadcast_scale
from autoquant.errors import CandidateError, nearest
from autoquant.graph import IR_VERSION, OPSET, PRODUCT, Graph, Layer, attributes, clamp_bounds
from autoquant.task import Array

NBITS_DOMAIN = "com.microsoft"
DIALECTS = ("onnxruntime", "openvino", "tensorrt")
INT8_KINDS = ("Conv", "Gemm", "MatMul")
OPENVINO, TENSORRT = "openvino", "tensorrt"
_MOVES = (
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad"
)  # fmt: skip
_POOLS = ("GlobalAveragePool", "AveragePool")
_MOVES_OR_POOLS = frozenset((*_MOVES, *_POOLS))
_JOINS = ("Add", "Mul", "Concat")


@dataclass(frozen=True, slots=True)
class Grid:
    """An activation grid: real = (q - zero_point) · scale, with integers low…high."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: str

    @property
    def real_range(self) -> tuple[float, float]:
        """The real values that the grid's ends stand for."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale


@dataclass(slots=True)
class Plan:
    """Where a candidate changes precision.

    ``modes``: layer → float, int8, dynamic, weight-only (stored below 32 bits, float kernel) or
    an n-bit kernel; see `mode`.
    ``roots``: tensor on an 8-bit grid → tensor whose grid it shares (itself, or further up).
    ``int8_nodes``: nodes whose output exists only quantized. ``narrow``: tensor → widths other
    than 8 (3, 4, 6, 16) that consumers read. ``units``: join node → node that ends its unit.
    """

    modes: dict[str, str] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    int8_nodes: set[int] = field(default_factory=set)
    narrow: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    symmetric: set[str] = field(default_factory=set)
    units: dict[int, int] = field(default_factory=dict)

    def boundaries(self, graph: Graph) -> tuple[int, int]:
        """Elements that a sample converts: (float → int8, int8 → float)."""
        to_int8, to_float = self.conversions(graph)
        return sum(to_int8), sum(to_float)

    def conversions(self, graph: Graph) -> tuple[list[int], list[int]]:
        """Elements of every tensor that is converted: (float → int8, int8 → float)."""
        to_int8: list[int] = []
        to_float: list[int] = []
        for tensor in self.roots:
            elements = graph.tensors[tensor].elements
            if not self.quantized_at_source(graph, tensor):
                to_int8.append(elements)
            elif tensor in graph.outputs or any(
                not self.reads_int8(graph, index) for index in graph.consumers.get(tensor, ())
            ):
                to_float.append(elements)
        for tensor, widths in self.narrow.items():
            elements = graph.tensors[tensor].elements
            to_int8 += [elements] * len(widths)
            if self.quantized_at_source(graph, tensor):
                to_float.append(elements)
        return to_int8, to_float

    def quantized_at_source(self, graph: Graph, tensor: str) -> bool:
        """Whether the tensor comes out of an int8 kernel, and so exists only on its grid."""
        return graph.producer.get(tensor, -1) in self.int8_nodes

    def reads_int8(self, graph: Graph, index: int) -> bool:
        """Whether a node consumes 8-bit tensors as they are."""
        layer = graph.by_node.get(index)
        if layer is not None:
            return self.modes[layer.name] == "int8"
        return index in self.int8_nodes


def resolve(graph: Graph, candidate: Candidate) -> Candidate:
    """The candidate as the graph takes it: names checked, settings without effect dropped.

    An embedding's activations are indices, so its ``activation_bits`` become 32; it has no
    moments to round by, unless it shares its weight. One block a channel is the granularity
    ``channel``, but for ``nbits``, which with 8-bit activations is ``dynamic``. Layers come in
    graph order, each with a choice, then the products that are not float. Raises CandidateError.
    """
    uses = Counter(layer.weight for layer in graph.layers)
    for name in candidate.layers:
        if name not in graph.by_name:
            raise CandidateError(f"unknown layer {name!r}; {nearest(name, graph.by_name)}")
    layers = {}
    for layer in graph.layers:
        choice = candidate.choice(layer.name)
        for name in ("dynamic", "nbits"):
            if getattr(choice, name) and layer.kind not in ("Gemm", "MatMul"):
                raise CandidateError(
                    f"layer {layer.name!r} is a {layer.kind}: {name} is for Gemm and MatMul"
                )
        if choice.nbits:
            choice = _without(choice, dynamic=choice.activation_bits == 8)
        elif block_size(choice.granularity) >= layer.parameters // layer.channels:
            choice = _without(choice, granularity="channel")
        if layer.kind == "Gather":
            choice = _without(choice, activation_bits=32, symmetric=False)
        if choice.weight_bits > 8 or (layer.kind == "Gather" and uses[layer.weight] == 1):
            choice = _without(choice, rounding=None)
        if choice.codebook and layer.kind == "Gather":
            raise CandidateError(f"layer {layer.name!r} is a Gather: codebook is for products")
        if choice.weight_bits != 16:
            choice = _without(choice, int16=False)
        if choice.weight_bits >= 16 and not choice.int16:
            choice = _without(choice, granularity="channel")
        if choice.activation_bits == 32 or choice.dynamic:
            choice = _without(choice, symmetric=False)
        layers[layer.name] = choice
    for layer in graph.products:
        choice = candidate.choice(layer.name)
        if choice.weight_bits != 32 or choice.activation_bits not in (8, 32) or choice.dynamic:
            raise CandidateError(
                f"layer {layer.name!r} is a product of two activations: it can have "
                f"activation_bits 8 or 32 (and weight_bits 32), not {choice}"
            )
        if not choice.is_float:
            layers[layer.name] = LayerChoice(32, 8, symmetric=choice.symmetric)
    return candidate.normalized(layers)


def _without(choice: LayerChoice, **defaults: Any) -> LayerChoice:
    return replace(choice, **defaults)


def mode(layer: Layer, choice: LayerChoice) -> str:
    """How the layer runs: ``float``, ``int8``, ``dynamic``, ``weight-only``, or ``nbits4b32``:
    4-bit weights in blocks of 32; ``nbits4b32a8`` with 8-bit activations."""
    if choice.is_float:
        return "float"
    if choice.nbits:
        return nbits_mode(choice)
    if layer.kind == PRODUCT:
        return "int8"
    if choice.weight_bits <= 8 and choice.activation_bits <= 8 and layer.kind in INT8_KINDS:
        return "dynamic" if choice.dynamic else "int8"
    return "weight-only"


def nbits_mode(choice: LayerChoice) -> str:
    """The mode of a choice with ``nbits``: weight bits, block, and what it computes in."""
    inputs = "a8" if choice.activation_bits == 8 else ""
    return f"nbits{choice.weight_bits}b{block_size(choice.granularity)}{inputs}"


def refusal(layer: Layer, choice: LayerChoice, dialect: str) -> str | None:
    """Why a dialect does not have a choice; None where it has.

    TensorRT: NVIDIA, "Working with Quantized Types": int8 activations and weights, or int4
    weights alone, in blocks that divide the inputs of a product.
    """
    if choice.nbits and dialect != "onnxruntime":
        return f"nbits is for onnxruntime; dialect {dialect!r} has no such kernel"
    if dialect != TENSORRT:
        return None
    if choice.codebook:
        return "codebook is not for TensorRT, which looks no weights up; give plain integers"
    how, block = mode(layer, choice), block_size(choice.granularity)
    if how == "dynamic":
        return "dynamic is not for TensorRT, which takes no ranges at run time"
    if choice.activation_bits == 16 or choice.int16:
        return "TensorRT has no int16; give 8 bits, float16 weights or float"
    if how != "weight-only" or choice.weight_bits > 8:
        return None
    fits = block and (layer.parameters // layer.channels) % block == 0
    if layer.kind in ("Gemm", "MatMul") and choice.weight_bits == 4 and fits:
        return None
    return (
        "TensorRT keeps weights of a float layer in 4 bits, in blocks that divide the inputs of "
        "a Gemm or MatMul; or in 16"
    )


def plan(graph: Graph, candidate: Candidate, dialect: str = "onnxruntime") -> Plan:
    """Decide every tensor's precision. ``candidate`` must be resolved."""
    result = Plan()
    wanted: set[str] = set()  # tensors that must have an 8-bit grid
    for layer in (*graph.layers, *graph.products):
        choice = candidate.choice(layer.name)
        result.modes[layer.name] = mode(layer, choice)
        if choice.activation_bits < 32 and not choice.dynamic:
            if choice.activation_bits == 8:
                wanted.update(layer.inputs)
            else:
                result.narrow[layer.input].add(choice.activation_bits)
            if choice.symmetric or dialect == TENSORRT:
                result.symmetric.update(layer.inputs)
        if result.modes[layer.name] == "int8" and (
            layer.kind == "Conv"
            or (layer.kind == "Gemm" and [graph.steps[i][0] for i in layer.absorbed] == ["Relu"])
        ):
            wanted.add(layer.output)
            result.int8_nodes.add(graph.producer[layer.output])
            result.int8_nodes.add(layer.node)
            if dialect == TENSORRT:
                result.symmetric.add(layer.output)
    lazy: dict[str, tuple[int, str]] = {}  # could be quantized: (node, input that it follows)

    def available(tensor: str) -> bool:
        return tensor in wanted or tensor in lazy

    def settle(tensor: str) -> None:
        """Quantize ``tensor``, and what it follows."""
        if tensor in lazy:
            index, source = lazy.pop(tensor)
            settle(source)
            result.int8_nodes.add(index)
            follows = graph.steps[index][0] in _MOVES
            result.roots[tensor] = result.roots[source] if follows else tensor
        result.roots.setdefault(tensor, tensor)
        wanted.add(tensor)

    for name in graph.inputs:
        if name in wanted:
            settle(name)
    for index, (operator, sources, outputs) in enumerate(graph.steps):
        if index in graph.owned:
            pass
        elif operator in _MOVES_OR_POOLS and len(outputs) == 1:
            if available(sources[0]) and _keeps_zero(graph, graph.nodes[index]):
                lazy[outputs[0]] = (index, sources[0])
        elif operator in _JOINS:
            end = _unit_end(graph, index)
            if len(sources) > 1 and all(available(s) for s in sources):
                for source in sources:
                    settle(source)
                result.int8_nodes.update((index, end))
                result.units[index] = end
                wanted.add(graph.steps[end][2][0])
        for name in outputs:
            if name in wanted:
                settle(name)
    result.symmetric = {result.roots.get(name, name) for name in result.symmetric}
    return result


def _unit_end(graph: Graph, index: int) -> int:
    """A join's Relu or Clip, where it is the only reader; else the join."""
    output = graph.nodes[index].output[0]
    readers = graph.consumers.get(output, [])
    sole = len(readers) == 1 and output not in graph.outputs
    if sole and clamp_bounds(graph.nodes[readers[0]], graph.initializers) is not None:
        return readers[0]
    return index


def _keeps_zero(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a moving node adds no value beside zero, and is not about shapes."""
    if graph.tensors[node.output[0]].dtype != "float32":
        return False
    if node.op_type != "Pad":
        return True
    if attributes(node).get("mode", b"constant") != b"constant":
        return True
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = graph.initializers.get(node.input[2])
    return value is not None and not numpy_helper.to_array(value).any()


def grid(calibration: Calibration, tensor: str, bits: int, symmetric: bool, dialect: str) -> Grid:
    """The grid of an activation at ``bits``; zero is always exact (Jacob et al. 2018)."""
    low, high = calibration.range(tensor, bits)
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    if dialect == TENSORRT:  # below 8 bits, values without sign may use every code
        top = levels if low >= 0 and bits < 8 else half - 1
        least = 0 if low >= 0 else -top
        return Grid(_float32(max(-low, high) / top), 0, least, top, "int8")
    if symmetric and low < 0:  # without negative values, unsigned is symmetric
        scale = _float32(max(-low, high) / (half - 1))
        return Grid(scale, half, 1, levels, _kind(bits))
    scale = _float32((high - low) / levels)
    zero = int(np.clip(round(-low / scale), 0, levels))
    return Grid(scale, zero, 0, levels, _kind(bits))


def tensor_grid(
    graph: Graph, found: Plan, calibration: Calibration, tensor: str, bits: int, dialect: str
) -> Grid:
    """The grid that the artifact has for a tensor: that of its root, inside the root's Clip."""
    root = found.roots.get(tensor, tensor)
    if from_softmax(graph, root):
        if dialect == TENSORRT:
            top = min(2**bits - 1, 127)
            return Grid(_float32(1 / top), 0, 0, top, "int8")
        return Grid(_float32(1 / (2**bits - 1)), 0, 0, 2**bits - 1, _kind(bits))
    symmetric = root in found.symmetric or dialect == TENSORRT
    result = grid(calibration, root, bits, symmetric, dialect)
    producer = graph.producer.get(root)
    if producer is None:
        return result
    bounds = clamp_bounds(graph.nodes[producer], graph.initializers)
    return _within(result, bounds, symmetric) if bounds else result


def widths_read(
    graph: Graph, found: Plan, candidate: Candidate, node: int, tensor: str
) -> tuple[int, ...]:
    """The widths of the grids that a node reads a tensor through, in order; empty for float.

    Where a kernel makes the tensor in 8 bits, a narrower grid comes after that one.
    """
    at_source = tensor in found.roots and found.quantized_at_source(graph, tensor)
    kernel = (8,) if at_source else ()
    layer = graph.by_node.get(node)
    if layer is not None and tensor in layer.inputs:
        choice = candidate.choice(layer.name)
        if choice.activation_bits == 8 and not choice.dynamic:
            return (8,)
        if choice.activation_bits < 32 and not choice.dynamic:
            return (*kernel, choice.activation_bits)
    return (8,) if tensor in found.roots and node in found.int8_nodes else kernel


def _float32(value: float) -> float:
    return float(np.float32(max(value, 1e-12)))


def _within(found: Grid, bounds: tuple[float, float], symmetric: bool) -> Grid:
    """The grid moved by less than a step, so that no code lies beyond the bounds of a Clip.

    Only then does onnxruntime drop the Clip behind a layer and run the layer in int8. Where a
    symmetric grid cannot lie inside, it stays as it is.
    """
    codes, best = np.iinfo(found.dtype), found
    for move in (0,) if symmetric else (0, -1, 1):
        zero, scale = found.zero_point + move, np.float32(found.scale)
        if not found.low <= zero <= found.high:
            continue
        for code, bound in ((codes.min, bounds[0]), (codes.max, bounds[1])):
            steps = np.float32(code - zero)
            if steps and np.isfinite(bound):
                scale = min(scale, np.float32(bound / steps))
                while abs(steps * scale) > abs(bound):
                    scale = np.nextafter(scale, np.float32(0))
        if best is found or scale > best.scale:
            best = replace(found, scale=float(scale), zero_point=zero)
    return best if best.scale > 0.97 * found.scale else found


def _kind(bits: int) -> str:
    return "uint8" if bits <= 8 else "uint16"


def assemble(
    graph: Graph,
    candidate: Candidate,
    calibration: Calibration,
    bank: Bank,
    dialect: str = "onnxruntime",
    key: str = "",
) -> onnx.ModelProto:
    """Write the quantized graph of a resolved candidate. Layer nodes are named by layer.

    ``key``: the candidate's key in the file, by default the resolved candidate's. Raises
    CandidateError for what the dialect does not have.
    """
    if dialect not in DIALECTS:
        raise CandidateError(f"dialect {dialect!r}; {nearest(dialect, DIALECTS)}")
    for name, choice in candidate.layers.items():
        reason = refusal(graph.by_name[name], choice, dialect)
        if reason is not None:
            raise CandidateError(f"layer {name!r}: {reason}")
    model = _Writer(graph, candidate, calibration, bank, dialect).write()
    model.metadata_props.add(key="autoquant.candidate", value=key or candidate.key)
    return model


class _Writer:
    """One artifact in the making: nodes and initializers, in order."""

    def __init__(
        self,
        graph: Graph,
        candidate: Candidate,
        calibration: Calibration,
        bank: Bank,
        dialect: str,
    ) -> None:
        self.graph, self.candidate, self.calibration = graph, candidate, calibration
        self.bank, self.dialect = bank, dialect
        self.plan = plan(graph, candidate, dialect)
        self.nodes: list[onnx.NodeProto] = []
        self.written: set[str] = set()
        self.biases: dict[tuple[int, str], str] = {}  # (node, bias) → what it reads instead
        self.initializers: dict[str, TensorProto] = {}
        self.constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.grids: dict[tuple[str, int], Grid] = {}
        self.packed: dict[int, dict[str, QuantizedWeight]] = defaultdict(dict)

    def write(self) -> onnx.ModelProto:
        graph, outputs = self.graph, set(self.graph.outputs)
        for name in graph.inputs:
            self._quantize(name, name)
        for index, node in enumerate(graph.nodes):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            layer = graph.by_node.get(index)
            for i, name in enumerate(copy.input):
                copy.input[i] = self._source(index, name)
            for i, name in enumerate(copy.output):
                if name in outputs and name in self.plan.roots and index in self.plan.int8_nodes:
                    copy.output[i] = f"{name}.raw"
            written = list(copy.output)
            if layer is not None and self.plan.modes[layer.name] != "float":
                self._layer(layer, copy)
            else:
                self.nodes.append(copy)
            for name, final in zip(node.output, written, strict=True):
                self._quantize(name, final)
        return self._model()

    # activations

    def _grid(self, tensor: str, bits: int) -> Grid:
        key = (self.plan.roots.get(tensor, tensor), bits)
        if key not in self.grids:
            self.grids[key] = tensor_grid(
                self.graph, self.plan, self.calibration, tensor, bits, self.dialect
            )
        return self.grids[key]

    def _dequantized(self, tensor: str, bits: int = 8) -> str:
        """Name of the tensor's float view on its grid."""
        at_source = self.plan.quantized_at_source(self.graph, tensor)
        if bits == 8 and tensor in self.graph.outputs and at_source:
            return tensor
        return f"{tensor}.dq" if bits == 8 else f"{tensor}.dq{bits}"

    def _source(self, index: int, tensor: str) -> str:
        """What node ``index`` reads for ``tensor``."""
        if tensor in self.graph.initializers or not tensor:
            return self.biases.get((index, tensor), tensor)
        layer = self.graph.by_node.get(index)
        if layer is not None and tensor in layer.inputs:
            choice = self.candidate.choice(layer.name)
            if choice.activation_bits < 32 and not choice.dynamic:
                return self._dequantized(tensor, choice.activation_bits)
        absorbed = tensor not in self.plan.roots
        if absorbed:
            return tensor
        if index in self.plan.int8_nodes or self.plan.quantized_at_source(self.graph, tensor):
            return self._dequantized(tensor)
        return tensor

    def _quantize(self, tensor: str, written: str) -> None:
        """Q/DQ pairs of a tensor that was just written (or is a graph input)."""
        source = written
        if tensor in self.plan.roots:
            self._pair(written, self._dequantized(tensor), f"{tensor}.q", self._grid(tensor, 8))
            if self.plan.quantized_at_source(self.graph, tensor):
                source = self._dequantized(tensor)
        for bits in sorted(self.plan.narrow.get(tensor, ())):
            found = self._grid(tensor, bits)
            clipped = source
            if bits < 8:
                low, high = found.real_range
                clipped = f"{tensor}.clip{bits}"
                bounds = [self._constant(np.float32(low)), self._constant(np.float32(high))]
                self._node("Clip", [source, *bounds], clipped)
            self._pair(clipped, self._dequantized(tensor, bits), f"{tensor}.q{bits}", found)

    def _pair(self, source: str, result: str, quantized: str, found: Grid) -> None:
        scale = self._constant(np.float32(found.scale))
        zero = self._constant(np.dtype(found.dtype).type(found.zero_point))
        self._node("QuantizeLinear", [source, scale, zero], quantized)
        self._node("DequantizeLinear", [quantized, scale, zero], result)

    # layers

    def _layer(self, layer: Layer, node: onnx.NodeProto) -> None:
        choice, how = self.candidate.choice(layer.name), self.plan.modes[layer.name]
        if layer.kind == PRODUCT:
            self.nodes.append(node)
        elif layer.kind == "Gather":
            self._embedding(layer, choice, node)
        elif choice.nbits:
            self._nbits(layer, choice, node)
        elif how == "dynamic":
            self._dynamic(layer, choice, node)
        elif how == "int8":
            found = self._grid(layer.input, choice.activation_bits)
            is_float = self.dialect == TENSORRT  # its kernels add the bias in float
            entry = (
                self.bank.get(layer, choice)
                if is_float
                else self._entry(layer, choice, found.scale)
            )
            node.input[1] = self._int8_weight(layer, self._weight(layer, choice, entry), entry)
            bias = self._shifted_bias(layer, entry)
            if layer.kind == "MatMul":
                self._shift_after(layer, entry)
            elif bias is not None and not is_float:
                _set_bias(node, self._bias(layer, bias, entry, found.scale))
            elif bias is not None and entry.shift is not None:
                _set_bias(node, self._named(f"{layer.name}.b", bias))
            self.nodes.append(node)
        else:
            if choice.weight_bits < 32:
                node.input[1] = self._float_weight(layer, choice)
            if choice.weight_bits <= 8:
                entry = self.bank.get(layer, choice)
                bias = self._shifted_bias(layer, entry)
                if layer.kind == "MatMul":
                    self._shift_after(layer, entry)
                elif bias is not None and entry.shift is not None:
                    _set_bias(node, self._named(f"{layer.name}.b", bias))
            self.nodes.append(node)

    def _shifted_bias(self, layer: Layer, entry: QuantizedWeight) -> Array | None:
        """The layer's bias with the entry's shift; None where there is neither."""
        bias = None if layer.bias is None else self.graph.array(layer.bias).reshape(-1)
        if entry.shift is None:
            return bias
        return entry.shift if bias is None else (bias + entry.shift).astype(np.float32)

    def _shift_after(self, layer: Layer, entry: QuantizedWeight) -> None:
        """A MatMul's bias is added by the node behind it: that node reads the shifted one."""
        bias = self._shifted_bias(layer, entry)
        if bias is not None and entry.shift is not None and layer.bias is not None:
            name = self._named(f"{layer.name}.b", bias)
            self.biases[layer.absorbed[0], layer.bias] = name

    def _stem(self, layer: Layer, choice: LayerChoice) -> str:
        """Name of the stored weight, shared by layers that store the same one alike."""
        block = block_size(choice.granularity)
        suffix = f"b{block}" if block else "t" if choice.granularity == "tensor" else ""
        suffix += f"a{layer.channel_axis}" if layer.channel_axis else ""
        suffix += f".{choice.rounding}" if choice.rounding else ""
        suffix += f".s{choice.sparsity}".replace(":", "_") if choice.sparsity else ""
        suffix += ".c" if choice.codebook else ""
        return f"{layer.weight.removesuffix('.weight')}.w{choice.weight_bits}{suffix}"

    def _weight(self, layer: Layer, choice: LayerChoice, entry: QuantizedWeight) -> str:
        """Name of the layer's integer weight (int8, or int16)."""
        name = self._stem(layer, choice)
        if entry is not self.bank.get(layer, choice):  # this layer's own
            name = f"{name}.{layer.name}"
        if choice.weight_bits in PLANES and self.dialect != TENSORRT:
            self.packed[choice.weight_bits][name] = entry
        elif name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(entry.values, name)
        return name

    def _int8_weight(self, layer: Layer, weight: str, entry: QuantizedWeight) -> str:
        name = f"{weight}.dq"
        if name in self.written:
            return name
        per_channel = len(entry.scale) > 1 or layer.channels == 1
        scale = np.asarray(entry.scale if per_channel else entry.scale[0])
        axis = {"axis": layer.channel_axis} if per_channel else {}
        # Without a zero point onnxruntime does not fuse Gemm. It is the weight's own: where uint8
        # weights are to be taken (WITHOUT_VNNI), onnxruntime makes another of each in its place.
        zero = self._named(f"{weight}.z", np.zeros(scale.shape, np.int8))
        inputs = [weight, self._named(f"{weight}.s", scale), zero]
        self._node("DequantizeLinear", inputs, name, **axis)
        return name

    def _entry(self, layer: Layer, choice: LayerChoice, input_scale: float) -> QuantizedWeight:
        """The bank's entry; with larger scales where the int32 bias would not fit.

        That is a channel whose weights hardly count beside its bias, as pruned ones have.
        The kernels take the bias to be on the scale input × weight, whatever the file says.
        """
        entry = self.bank.get(layer, choice)
        bias = self._shifted_bias(layer, entry)
        if bias is None or layer.kind == "MatMul":
            return entry
        least = np.abs(bias) / (2.0**30 * input_scale)
        if len(entry.scale) == 1:
            least = least.max(keepdims=True)
        if (entry.scale >= least).all():
            return entry
        scale = np.maximum(entry.scale, least).astype(np.float32)
        shrink = broadcast_scale(entry.scale / scale, entry.axis, entry.values.ndim)
        values = np.round(entry.values * shrink).astype(entry.values.dtype)
        if entry.table is not None:
            middles = 0.5 * (entry.table[1:].astype(np.float32) + entry.table[:-1])
            values = entry.table[np.searchsorted(middles, values)]
        return replace(entry, values=values, scale=scale)

    def _bias(self, layer: Layer, bias: Array, entry: QuantizedWeight, input_scale: float) -> str:
        """The int32 bias with scale input × weight."""
        name = f"{layer.name}.b"
        per_channel = len(entry.scale) > 1 or layer.channels == 1
        scale = entry.scale * np.float32(input_scale)
        values = np.round(bias / scale.astype(np.float64))
        quantized = self._named(f"{name}32", values.astype(np.int32))
        scale_name = self._named(f"{name}.s", scale if per_channel else scale[0])
        axis = {"axis": 0} if per_channel else {}
        self._node("DequantizeLinear", [quantized, scale_name], name, **axis)
        return name

    def _float_weight(self, layer: Layer, choice: LayerChoice) -> str:
        """A stored weight that folds back to float at load."""
        name = f"{self._stem(layer, choice)}.f"
        if name in self.written:
            return name
        if choice.weight_bits == 16 and not choice.int16:
            half = self._named(self._stem(layer, choice), _half(self.graph.array(layer.weight)))
            self._node("Cast", [half], name, to=TensorProto.FLOAT)
            return name
        entry = self.bank.get(layer, choice)
        if self.dialect == TENSORRT:
            return self._int4_weight(layer, choice, entry, name)
        weight = self._weight(layer, choice, entry)
        if entry.block:
            scale = self._block_scale(layer, weight, entry)
        else:
            shaped = broadcast_scale(entry.scale, layer.channel_axis, len(layer.weight_shape))
            scale = self._named(f"{weight}.fs", shaped if len(entry.scale) > 1 else entry.scale)
        self._node("Cast", [weight], f"{weight}.c", to=TensorProto.FLOAT)
        self._node("Mul", [f"{weight}.c", scale], name)
        return name

    def _int4_weight(
        self, layer: Layer, choice: LayerChoice, entry: QuantizedWeight, name: str
    ) -> str:
        """int4 weights of a product in blocks along its inputs, as TensorRT reads them.

        Stored as (channels, K): of blocks along the first axis onnxruntime makes MatMulNBits,
        which rounds the activations to 8 bits.
        """
        from ml_dtypes import int4

        stem = self._stem(layer, choice)
        weight = self._named(stem, entry.matrix().astype(int4))
        scale = self._named(f"{stem}.fs", entry.scale)
        view = f"{stem}.ft" if layer.channel_axis else name
        self._node("DequantizeLinear", [weight, scale], view, axis=1, block_size=entry.block)
        if layer.channel_axis:
            self._node("Transpose", [view], name, perm=[1, 0])
        return name

    def _block_scale(self, layer: Layer, weight: str, entry: QuantizedWeight) -> str:
        """Block scales in the weight's shape: repeated over each block, the last one cut.

        Expand, Reshape and Slice of constants fold at load. A channel axis that is not the
        first (MatMul, Gemm, ConvTranspose) is moved there and back.
        """
        channels, count = entry.scale.shape
        scale = self._scales(f"{weight}.fs", entry, entry.scale[:, :, None])
        shape = self._constant(np.array([channels, count, entry.block], np.int64))
        self._node("Expand", [scale, shape], f"{weight}.fe")
        axis, rank = layer.channel_axis, len(layer.weight_shape)
        order = [axis, *(i for i in range(rank) if i != axis)]
        moved = [layer.weight_shape[i] for i in order]
        inputs = layer.parameters // channels
        flat, last = f"{weight}.fr", f"{weight}.fe"
        if inputs % entry.block:
            shape = self._constant(np.array([channels, -1], np.int64))
            self._node("Reshape", [last, shape], f"{weight}.ff")
            ends = [self._constant(np.array([v], np.int64)) for v in (0, inputs, 1)]
            self._node("Slice", [f"{weight}.ff", *ends], f"{weight}.fc")
            last = f"{weight}.fc"
        self._node("Reshape", [last, self._constant(np.array(moved, np.int64))], flat)
        if not axis:
            return flat
        back = [order.index(i) for i in range(rank)]
        self._node("Transpose", [flat], f"{weight}.ft", perm=back)
        return f"{weight}.ft"

    def _scales(self, name: str, entry: QuantizedWeight, scale: Array) -> str:
        """Scales of blocks as float32, stored as float16 where that is exact."""
        if not entry.half_scale:
            return self._named(name, scale)
        view = f"{name}c"
        if view not in self.written:
            self._named(name, scale.astype(np.float16))
            self._node("Cast", [name], view, to=TensorProto.FLOAT)
        return view

    def _nbits(self, layer: Layer, choice: LayerChoice, node: onnx.NodeProto) -> None:
        """MatMulNBits: packed weights and block scales as they are, the bias of a Gemm in it."""
        entry, weight = self.bank.get(layer, choice), f"{self._stem(layer, choice)}.n"
        if weight not in self.initializers:
            self._named(weight, entry.packed_blocks())
        inputs = [node.input[0], weight, self._scales(f"{weight}s", entry, entry.scale)]
        bias = self._shifted_bias(layer, entry)
        if layer.kind == "MatMul":
            self._shift_after(layer, entry)
        elif bias is not None:
            inputs += ["", "", self._named(f"{layer.name}.b", bias)]
        found = helper.make_node(
            "MatMulNBits", inputs, list(node.output), name=layer.name, domain=NBITS_DOMAIN
        )
        for name, value in nbits_attributes(layer, choice).items():
            found.attribute.append(helper.make_attribute(name, value))
        self.nodes.append(found)

    def _embedding(self, layer: Layer, choice: LayerChoice, node: onnx.NodeProto) -> None:
        """Gather the stored rows, then make them float: the table stays small in memory."""
        output = node.output[0]
        node.output[0] = f"{output}.stored"
        if choice.weight_bits == 16 and not choice.int16:
            half = self._named(self._stem(layer, choice), _half(self.graph.array(layer.weight)))
            node.input[0] = half
            self.nodes.append(node)
            self._node("Cast", [node.output[0]], output, to=TensorProto.FLOAT)
            return
        entry = self.bank.get(layer, choice)
        weight = self._weight(layer, choice, entry)
        node.input[0] = weight
        self.nodes.append(node)
        per_row = len(entry.scale) > 1
        stored = entry.scale[:, None] if per_row and not entry.block else entry.scale
        if entry.half_scale:
            stored = stored.astype(np.float16)
        scale = self._named(f"{weight}.fs", stored)
        if per_row:
            self._node("Gather", [scale, node.input[1]], f"{output}.scale", axis=0)
            scale = f"{output}.scale"
        if entry.half_scale:
            self._node("Cast", [scale], f"{output}.wide", to=TensorProto.FLOAT)
            scale = f"{output}.wide"
        if entry.block:
            owner = self._constant(np.arange(layer.weight_shape[1], dtype=np.int64) // entry.block)
            self._node("Gather", [scale, owner], f"{output}.scales", axis=-1)
            scale = f"{output}.scales"
        self._node("Cast", [node.output[0]], f"{output}.cast", to=TensorProto.FLOAT)
        self._node("Mul", [f"{output}.cast", scale], output)

    def _dynamic(self, layer: Layer, choice: LayerChoice, node: onnx.NodeProto) -> None:
        """DynamicQuantizeLinear → MatMulInteger → scale → bias, which onnxruntime fuses."""
        entry, source, output = self.bank.get(layer, choice), node.input[0], node.output[0]
        weight = self._weight(layer, choice, entry)
        if layer.kind == "Gemm" and layer.channel_axis == 0:
            self._node("Transpose", [weight], f"{weight}.t.{layer.name}", perm=[1, 0])
            weight = f"{weight}.t.{layer.name}"
        prefix = f"{layer.name}.dynamic"
        parts = [f"{prefix}.q", f"{prefix}.s", f"{prefix}.z"]
        quantized = f"{source}.dynamic"
        if quantized not in self.written:
            self.written.add(quantized)
            self.nodes.append(
                helper.make_node(
                    "DynamicQuantizeLinear",
                    [source],
                    [quantized, f"{quantized}.scale", f"{quantized}.zero"],
                )
            )
        zero = self._named(f"{prefix}.zero", np.zeros((), np.int8))  # not shared, as above
        self.nodes.append(
            helper.make_node(
                "MatMulInteger",
                [quantized, weight, f"{quantized}.zero", zero],
                [parts[0]],
                name=layer.name,
            )
        )
        scale = self._named(f"{prefix}.weight_scale", entry.scale)
        self._node("Mul", [f"{quantized}.scale", scale], parts[1])
        self._node("Cast", [parts[0]], parts[2], to=TensorProto.FLOAT)
        bias = self._shifted_bias(layer, entry)
        has_bias = layer.kind == "Gemm" and bias is not None
        if layer.kind == "MatMul":
            self._shift_after(layer, entry)
        self._node("Mul", [parts[2], parts[1]], f"{prefix}.y" if has_bias else output)
        if has_bias:
            assert bias is not None
            self._node("Add", [f"{prefix}.y", self._named(f"{prefix}.bias", bias)], output)

    # the model

    def _model(self) -> onnx.ModelProto:
        head: list[onnx.NodeProto] = []
        body, self.nodes = self.nodes, head
        for bits, entries in sorted(self.packed.items()):
            self._unpack(bits, entries)
        nodes = head + body
        source = self.graph.model
        used = {name for node in nodes for name in node.input} | set(self.graph.outputs)
        for name, proto in self.graph.initializers.items():
            if name in used:
                self.initializers.setdefault(name, proto)
        model = onnx.ModelProto(ir_version=source.ir_version or IR_VERSION)
        model.producer_name = "autoquant"
        model.opset_import.extend(source.opset_import or [helper.make_opsetid("", OPSET)])
        domains = {opset.domain for opset in model.opset_import}
        if NBITS_DOMAIN not in domains and any(n.domain == NBITS_DOMAIN for n in nodes):
            model.opset_import.append(helper.make_opsetid(NBITS_DOMAIN, 1))
        model.graph.name = "autoquant"
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(p for n, p in self.initializers.items() if n in used)
        model.graph.input.extend(source.graph.input)
        model.graph.output.extend(source.graph.output)
        model.functions.extend(source.functions)
        return model

    def _unpack(self, bits: int, entries: dict[str, QuantizedWeight]) -> None:
        """All weights of one width: blob → planes → integers → Split → Reshape a weight.

        OpenVINO folds no operators on bits, runs the layers behind them in float, and gets some
        wrong: there they are int32 arithmetic, which onnxruntime takes three times as long to fold.
        """
        stem, joined = f"packed{bits}", ""
        for i, width in enumerate(PLANES[bits]):
            blob = np.concatenate([e.planes[i] for e in entries.values()])
            name, plane = f"{stem}.{i}", self._named(f"{stem}.{i}", blob)
            places = np.arange(0, 8, width, dtype=np.uint8)[None]
            if self.dialect == OPENVINO:
                units = self._constant(2 ** places.astype(np.int32))
                values = self._constant(np.int32(2**width))
                self._node("Cast", [plane], f"{name}.c", to=TensorProto.INT32)
                self._node("Div", [f"{name}.c", units], f"{name}.s")
                self._node("Mod", [f"{name}.s", values], f"{name}.m")
            else:
                shift = self._constant(places)
                mask = self._constant(np.uint8(2**width - 1))
                self._node("BitShift", [plane, shift], f"{name}.s", direction="RIGHT")
                self._node("BitwiseAnd", [f"{name}.s", mask], f"{name}.m")
            flat = self._constant(np.array([-1], np.int64))
            self._node("Reshape", [f"{name}.m", flat], f"{name}.f")
            if joined and self.dialect == OPENVINO:
                self._node("Mul", [joined, values], f"{name}.l")
                self._node("Add", [f"{name}.l", f"{name}.f"], f"{name}.j")
            elif joined:
                by = self._constant(np.uint8(width))
                self._node("BitShift", [joined, by], f"{name}.l", direction="LEFT")
                self._node("BitwiseOr", [f"{name}.l", f"{name}.f"], f"{name}.j")
            joined = f"{name}.j" if joined else f"{name}.f"
        if self.dialect == OPENVINO:
            self._node("Sub", [joined, self._constant(np.int32(2 ** (bits - 1)))], f"{stem}.u")
            self._node("Cast", [f"{stem}.u"], f"{stem}.w", to=TensorProto.INT8)
        else:
            self._node("Cast", [joined], f"{stem}.u", to=TensorProto.INT8)
            self._node("Sub", [f"{stem}.u", self._constant(np.int8(2 ** (bits - 1)))], f"{stem}.w")
        sizes, parts = [], []
        for name, entry in entries.items():
            count = entry.values.size
            sizes.append(count)
            parts.append(f"{name}.flat")
            if count % 8:
                sizes.append(-count % 8)
                parts.append(f"{name}.padding")
        split = self._named(f"{stem}.sizes", np.array(sizes, np.int64))
        self.nodes.append(helper.make_node("Split", [f"{stem}.w", split], parts, axis=0))
        for name, entry in entries.items():
            shape = self._constant(np.array(entry.values.shape, np.int64))
            if entry.table is None:
                self._node("Reshape", [f"{name}.flat", shape], name)
                continue
            table = self._named(f"{name}.t", np.roll(entry.table, -(2 ** (bits - 1))))
            self._node("Reshape", [f"{name}.flat", shape], f"{name}.i")
            self._node("Cast", [f"{name}.i"], f"{name}.j", to=TensorProto.INT32)
            self._node("Gather", [table, f"{name}.j"], name, axis=0)  # from its end below 0

    def _node(self, op: str, inputs: Sequence[str], output: str, **found: Any) -> None:
        self.written.add(output)
        self.nodes.append(helper.make_node(op, list(inputs), [output], **found))

    def _named(self, name: str, value: Array) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def _constant(self, value: Any) -> str:
        """A small constant, shared by value."""
        array = np.asarray(value)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            name = f"k{len(self.constants)}"
            while name in self.graph.initializers or name in self.graph.tensors:
                name += "_"
            self.constants[key] = self._named(name, array)
        return self.constants[key]


def _set_bias(node: onnx.NodeProto, name: str) -> None:
    """Give a Conv, ConvTranspose or Gemm this bias."""
    node.input[:] = [*list(node.input)[:2], name]


def nbits_attributes(layer: Layer, choice: LayerChoice) -> dict[str, int]:
    """Attributes of a layer's MatMulNBits; accuracy level 4 quantizes its input by blocks."""
    return {
        "K": layer.parameters // layer.channels,
        "N": layer.channels,
        "accuracy_level": 4 if choice.activation_bits == 8 else 0,
        "bits": choice.weight_bits,
        "block_size": block_size(choice.granularity),
    }


def from_softmax(graph: Graph, tensor: str) -> bool:
    """Whether a tensor comes out of a Softmax: its grid is that of [0, 1]."""
    index = graph.producer.get(tensor)
    return index is not None and graph.nodes[index].op_type == "Softmax"


def _half(array: Array) -> Array:
    """float16 storage, saturating instead of overflowing."""
    limit = float(np.finfo(np.float16).max)
    return np.clip(array, -limit, limit).astype(np.float16)
