"""A float ONNX file and its encodings: what Qualcomm's SNPE, QNN and AIMET read.

``encodings`` takes the grids out of a quantized graph: activations lose their Q/DQ pairs, weights
become the floats that their integers stand for, and a JSON document says on which grid each
tensor is (AIMET, "Encoding specification", version 0.6.1). There ``real = (q + offset) · scale``
with q from 0 to 2^bitwidth − 1, for signed grids too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autoquant.compress.readback import constants
from autoquant.errors import RunError
from autoquant.task import Array

FLOAT_MODEL, ENCODINGS = "float.onnx", "model.encodings"
VERSION = "0.6.1"
_GRIDS = ("QuantizeLinear", "DequantizeLinear")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")


def encodings_files(model: onnx.ModelProto) -> dict[str, bytes]:
    """``float.onnx`` and ``model.encodings`` of an artifact. Raises RunError naming the layer."""
    found, document = encodings(model)
    return {
        FLOAT_MODEL: found.SerializeToString(deterministic=True),
        ENCODINGS: (json.dumps(document, indent=1) + "\n").encode(),
    }


def encodings(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The float graph and the document; ``model`` is left alone.

    Biases are float in the graph and have no encodings: the converters round them to int32 with
    the scale of input × weight, as they are in ``model``. Raises RunError for ranges at run
    time, n-bit kernels and scales of blocks, which the format does not have.
    """
    return _Reader(model).run()


class _Reader:
    """Takes one quantized graph apart."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.producers = {name: n for n in self.nodes for name in n.output}
        self.initializers = {i.name: i for i in model.graph.initializer}
        self.constant: set[str] = set(self.initializers)
        for node in self.nodes:
            if all(not name or name in self.constant for name in node.input) and node.input:
                self.constant.update(node.output)
        self.activations: dict[str, list[dict[str, Any]]] = {}
        self.params: dict[str, list[dict[str, Any]]] = {}
        self.names: dict[str, str] = {}  # a float view → the tensor that stands for it
        self.outputs = {o.name for o in model.graph.output}

    def run(self) -> tuple[onnx.ModelProto, dict[str, Any]]:
        kept: list[onnx.NodeProto] = []
        for node in self.nodes:
            if node.op_type in ("DynamicQuantizeLinear", "MatMulInteger") or node.domain:
                name = node.name or node.output[0]
                raise RunError(f"layer {name!r} ({node.op_type}): encodings cannot say it")
            if all(name in self.constant for name in node.output):
                continue
            if node.op_type == "QuantizeLinear":
                continue
            if node.op_type == "DequantizeLinear":
                kept += self._pair(node)
                continue
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [self.names.get(name, name) for name in node.input]
            kept.append(copy)
        arrays = self._constants(kept)
        document = {
            "version": VERSION,
            "activation_encodings": self.activations,
            "param_encodings": self.params,
        }
        return self._model(kept, arrays), document

    def _value(self, name: str) -> Array:
        return numpy_helper.to_array(self.initializers[name])

    def _pair(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Drop a Q/DQ pair; a second grid of one tensor gets a tensor of its own."""
        quantize = self.producers[node.input[0]]
        source = self.names.get(quantize.input[0], quantize.input[0])
        result = node.output[0]
        scale = float(self._value(node.input[1]))
        zero = self._value(node.input[2])
        bits, offset = 8 * zero.itemsize, -int(zero)
        if zero.dtype.kind == "i":
            offset -= 2 ** (bits - 1)
        clip = self.producers.get(quantize.input[0])
        if clip is not None and clip.output[0].rpartition(".clip")[2].isdigit():
            bits = int(clip.output[0].rpartition(".clip")[2])
            offset = -int(zero)
            if zero.dtype.kind == "i" and float(self._value(clip.input[1])) < 0:
                offset -= 2 ** (bits - 1)
        found = encoding(scale, offset, bits, symmetric=False)
        if source not in self.activations and result not in self.outputs:
            self.names[result] = source
            self.activations[source] = [found]
            return []
        self.activations[result] = [found]
        return [helper.make_node("Identity", [source], [result])]

    def _constants(self, kept: list[onnx.NodeProto]) -> dict[str, Array]:
        """Values of the constants that the kept nodes read; weights with their encodings."""
        computed = [
            name
            for name in dict.fromkeys(n for node in kept for n in node.input)
            if name in self.constant and name not in self.initializers
        ]
        for node in kept:
            if node.op_type in _WEIGHTED:
                self._weight(node)
        return constants(self.model, computed, TensorProto.FLOAT)

    def _weight(self, node: onnx.NodeProto) -> None:
        """The encoding of a layer's stored weight, by the name of its float view."""
        if node.op_type == "Gather":
            if node.input[0] in self.constant:
                self._refuse_table(node)
            return
        name = node.input[1]
        maker = self.producers.get(name)
        if name not in self.constant or maker is None or name in self.params:
            return
        if maker.op_type == "Cast":
            self.params[name] = [{"bitwidth": 16, "dtype": "float"}]
            return
        layer = node.name or node.output[0]
        if maker.op_type == "DequantizeLinear":
            stored, scale = maker.input[0], self._value(maker.input[1])
        elif maker.op_type == "Mul" and maker.input[1] in self.initializers:
            stored = self.producers[maker.input[0]].input[0]
            scale = self._value(maker.input[1])
        else:
            raise RunError(f"layer {layer!r}: scales of blocks are not in encodings {VERSION}")
        bits = self._bits(stored)
        self.params[name] = [
            encoding(float(s), -(2 ** (bits - 1)), bits, symmetric=True) for s in scale.reshape(-1)
        ]

    def _refuse_table(self, node: onnx.NodeProto) -> None:
        table = self.initializers.get(node.input[0])
        if table is None or table.data_type not in (TensorProto.FLOAT, TensorProto.INT64):
            name = node.name or node.output[0]
            raise RunError(f"layer {name!r}: stored embeddings are not in encodings {VERSION}")

    def _bits(self, stored: str) -> int:
        """Bits of a stored weight: those of its blob's planes, or of its own integers."""
        if stored in self.initializers:
            return 8 * self._value(stored).itemsize
        node = self.producers[stored]
        while node.op_type != "Split":
            if node.op_type == "Gather":
                raise RunError(f"weight {stored!r}: codebooks are not in encodings {VERSION}")
            node = self.producers[node.input[0]]
        return int(node.input[0].removeprefix("packed").removesuffix(".w"))

    def _model(self, kept: list[onnx.NodeProto], arrays: Mapping[str, Array]) -> onnx.ModelProto:
        read = {name for node in kept for name in node.input}
        model = onnx.ModelProto(ir_version=self.model.ir_version, producer_name="autoquant")
        model.opset_import.extend(o for o in self.model.opset_import if not o.domain)
        model.graph.name = self.model.graph.name
        model.graph.node.extend(kept)
        model.graph.initializer.extend(i for n, i in self.initializers.items() if n in read)
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(a, order="C"), n) for n, a in arrays.items()
        )
        model.graph.input.extend(self.model.graph.input)
        model.graph.output.extend(self.model.graph.output)
        return model


def encoding(scale: float, offset: int, bits: int, *, symmetric: bool) -> dict[str, Any]:
    """One grid: ``real = (q + offset) · scale``, q from 0 to 2^bits − 1."""
    return {
        "bitwidth": bits,
        "dtype": "int",
        "is_symmetric": str(symmetric),
        "max": (2**bits - 1 + offset) * scale,
        "min": offset * scale,
        "offset": offset,
        "scale": scale,
    }


def requantized(model: onnx.ModelProto, document: Mapping[str, Any]) -> onnx.ModelProto:
    """The float graph with every tensor rounded to its encoding, as a converter would do it.

    Weights keep their float values, which lie on their grids. For checks: a plain graph of
    standard operators.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    final = {o.name for o in model.graph.output}
    encoded = document["activation_encodings"]

    def quantize(tensor: str, source: str, target: str) -> None:
        found = encoded[tensor][0]
        values = {
            "scale": np.float32(found["scale"]),
            "low": np.float32(found["offset"]),
            "high": np.float32(2 ** found["bitwidth"] - 1 + found["offset"]),
        }
        for name, value in values.items():
            result.graph.initializer.append(
                numpy_helper.from_array(np.asarray(value), f"{tensor}.enc.{name}")
            )
        part = [f"{tensor}.enc.{i}" for i in range(3)]
        result.graph.node.extend(
            [
                helper.make_node("Div", [source, f"{tensor}.enc.scale"], [part[0]]),
                helper.make_node("Round", [part[0]], [part[1]]),
                helper.make_node(
                    "Clip", [part[1], f"{tensor}.enc.low", f"{tensor}.enc.high"], [part[2]]
                ),
                helper.make_node("Mul", [part[2], f"{tensor}.enc.scale"], [target]),
            ]
        )

    renamed = {}
    for value in model.graph.input:
        if value.name in encoded:
            renamed[value.name] = f"{value.name}.enc"
            quantize(value.name, value.name, renamed[value.name])
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        result.graph.node.append(copy)
        for i, name in enumerate(node.output):
            if name not in encoded:
                continue
            if name in final:
                copy = result.graph.node[-1]
                copy.output[i] = f"{name}.raw.enc"
                quantize(name, copy.output[i], name)
            else:
                renamed[name] = f"{name}.enc"
                quantize(name, name, renamed[name])
    return result
