"""What TensorRT would refuse of a quantized ONNX graph, without TensorRT.

The rules are those of explicit quantization (NVIDIA, TensorRT documentation, "Working with
Quantized Types" and the ONNX parser's operator table): symmetric int8, a DequantizeLinear on
int8 or int4 constants or on what a QuantizeLinear made, scales that are constants, per tensor for
activations; int4 for weights alone, in blocks; biases in float.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from autoquant.graph import attributes
from autoquant.task import Array

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_REFUSED = (
    "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "ConvInteger",
    "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
)  # fmt: skip
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGERS = {
    TensorProto.UINT8: "uint8", TensorProto.INT16: "int16", TensorProto.UINT16: "uint16",
    TensorProto.UINT4: "uint4",
}  # fmt: skip


def check_tensorrt(model: onnx.ModelProto) -> list[str]:
    """What TensorRT would refuse: ``layer 'name' (Operator): reason`` each; empty if nothing.

    Reads the graph only: an empty list is no promise that an engine builds.
    """
    return _Check(model).run()


class _Check:
    """The nodes of one graph against the rules."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producers = {name: n for n in self.nodes for name in n.output}
        self.initializers = {i.name: i for i in model.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.problems: list[str] = []

    def run(self) -> list[str]:
        for node in self.nodes:
            if node.domain not in ("", "ai.onnx"):
                self._refuse(node, f"TensorRT has no operators of the domain {node.domain!r}")
            elif node.op_type in _REFUSED:
                self._refuse(node, "TensorRT has no such operator")
            elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                self._grid(node)
            elif node.op_type in _LAYERS:
                self._layer(node)
        for name, tensor in self.initializers.items():
            kind = _INTEGERS.get(tensor.data_type)
            if kind and name in self.readers and not self._is_zero_point(name):
                self._refuse(self.readers[name][0], f"{name!r} is stored as {kind}, not int8")
        return self.problems

    def _refuse(self, node: onnx.NodeProto, reason: str) -> None:
        name = node.name or (node.output[0] if node.output else "?")
        self.problems.append(f"layer {name!r} ({node.op_type}): {reason}")

    def _is_zero_point(self, name: str) -> bool:
        """Whether a tensor is only the zero point of nodes, which are judged themselves."""
        return all(
            n.op_type in ("QuantizeLinear", "DequantizeLinear") and list(n.input).index(name) == 2
            for n in self.readers[name]
        )

    def _constant(self, name: str) -> Array | None:
        found = self.initializers.get(name)
        return None if found is None else numpy_helper.to_array(found)

    def _grid(self, node: onnx.NodeProto) -> None:
        """A QuantizeLinear or DequantizeLinear: scale, zero point, what it reads."""
        source, producer = self.initializers.get(node.input[0]), self.producers.get(node.input[0])
        scale = self._constant(node.input[1])
        if node.op_type == "DequantizeLinear" and source is None:
            if producer is None:
                self._refuse(node, f"dequantizes the input {node.input[0]!r} of the graph")
                return
            if producer.op_type != "QuantizeLinear":
                self._refuse(node, f"dequantizes what a {producer.op_type} made")
                return
        if scale is None:
            self._refuse(node, f"scale {node.input[1]!r} is no constant")
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            self._refuse(node, f"scale {node.input[1]!r} is not above zero")
        elif scale.size > 1 and (node.op_type == "QuantizeLinear" or source is None):
            self._refuse(node, "activations have one scale a tensor")
        has_zero = len(node.input) > 2 and bool(node.input[2])
        zero = self._constant(node.input[2]) if has_zero else None
        if has_zero and (zero is None or (zero != 0).any()):
            self._refuse(node, "the zero point is not 0: TensorRT's grids are symmetric")
        if node.op_type == "QuantizeLinear":
            if zero is not None and zero.dtype != np.int8:
                self._refuse(node, f"quantizes to {zero.dtype}, not int8")
            elif not has_zero and attributes(node).get("output_dtype") != TensorProto.INT8:
                self._refuse(node, "quantizes to uint8, not int8: it has no zero point")
            return
        if source is not None and source.data_type == TensorProto.INT4:
            self._int4(node, source)
        elif source is not None and source.data_type not in (TensorProto.INT8, *_INTEGERS):
            kind = TensorProto.DataType.Name(source.data_type).lower()
            self._refuse(node, f"dequantizes {kind}, not int8 or int4")

    def _int4(self, node: onnx.NodeProto, weight: TensorProto) -> None:
        """int4 is for the weights of products with float activations, in blocks."""
        found = attributes(node)
        block, axis = found.get("block_size", 0), found.get("axis", 1)
        if not block or len(weight.dims) != 2:
            self._refuse(node, "int4 weights need blocks (block_size) of a matrix")
        elif weight.dims[axis] % block:
            self._refuse(node, f"blocks of {block} do not divide {weight.dims[axis]} inputs")
        readers = self.readers.get(node.output[0], [])
        for reader in list(readers):
            if reader.op_type == "Transpose":
                readers = [r for r in readers if r is not reader]
                readers += self.readers.get(reader.output[0], [])
        for reader in readers:
            if reader.op_type not in ("Gemm", "MatMul"):
                self._refuse(reader, "int4 weights are for Gemm and MatMul")
            elif self._dequantizes(reader.input[0]) is not None:
                self._refuse(reader, "int4 weights are for float activations")

    def _dequantizes(self, name: str) -> onnx.NodeProto | None:
        node = self.producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _layer(self, node: onnx.NodeProto) -> None:
        """A layer: int8 weights need int8 activations, a scale for each output, float biases."""
        weights = self._dequantizes(node.input[1])
        source = None if weights is None else self.initializers.get(weights.input[0])
        if weights is not None and source is not None and source.data_type == TensorProto.INT8:
            if self._dequantizes(node.input[0]) is None:
                self._refuse(node, "int8 weights need int8 activations")
            scale = self._constant(weights.input[1])
            axis = int(attributes(weights).get("axis", 1)) % max(1, len(source.dims))
            if scale is not None and scale.size > 1 and axis != _output_axis(node, source):
                self._refuse(node, f"weights have their scales along axis {axis}")
        if node.op_type == "MatMul" or len(node.input) < 3 or not node.input[2]:
            return
        bias = self.initializers.get(node.input[2])
        if bias is None and self._dequantizes(node.input[2]) is not None:
            self._refuse(node, "the bias is quantized; TensorRT adds float biases")
        elif bias is not None and bias.data_type not in _FLOATS:
            self._refuse(node, "the bias is not float")


def _output_axis(node: onnx.NodeProto, weight: TensorProto) -> int:
    """The axis of a layer's weight along its outputs."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attributes(node).get("transB", 0) else 1
    return 1 if node.op_type == "ConvTranspose" else len(weight.dims) - 1
