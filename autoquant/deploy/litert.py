"""A TFLite file of an int8 artifact, for LiteRT on phones: the flatbuffer written directly.

Tensors are NHWC int8 (uint8 grids become int8 ones by moving the zero point by 128), weights int8
by channel, biases int32, as LiteRT's specification of quantization has them; padding is an op of
its own. Input and output are float32, the input in NHWC. A last product whose output ONNX leaves
float is a float product of the dequantized weights. LiteRT's kernels round in another order than
onnxruntime's: a value may differ by one step after each layer. Needs the extra ``litert``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from autoquant.deploy.cmsis import Header, Int8Tensor
from autoquant.errors import RunError
from autoquant.task import Array

TFLITE = "model.tflite"
_DTYPES = {"float32": "FLOAT32", "int32": "INT32", "int8": "INT8"}
# Version of each operator for int8 tensors, as LiteRT's table of operators has them.
_VERSIONS = {
    "ADD": 2, "AVERAGE_POOL_2D": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "DEQUANTIZE": 5,
    "FULLY_CONNECTED": 12, "MAX_POOL_2D": 2, "MEAN": 2, "PAD": 2, "QUANTIZE": 2,
}  # fmt: skip


def is_installed() -> bool:
    """Whether the schema of TFLite files is here."""
    return importlib.util.find_spec("ai_edge_litert") is not None


def tflite_files(model: onnx.ModelProto) -> dict[str, bytes]:
    """The TFLite file of an artifact. Raises RunError naming the layer that it cannot say."""
    if not is_installed():
        raise RunError("needs the schema of TFLite files: pip install 'autoquant[litert]'")
    return {TFLITE: _Flatbuffer(model).file()}


class _Flatbuffer(Header):
    """The steps of a C header, each as an operator of a TFLite graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from ai_edge_litert import schema_py_generated as schema

        super().__init__(model)
        self.schema: Any = schema
        self.tables: list[Any] = []  # tensors of the file
        self.data: list[bytes] = [b""]
        self.operators: list[Any] = []
        self.codes: list[str] = []
        self.places: list[int] = []  # tensor of the file, by buffer
        self.values: dict[str, Array] = {}
        self.scales = np.empty(0)
        self.window: Sequence[int] = ()
        self.entry: int | None = None

    def file(self) -> bytes:
        import flatbuffers

        output, _ = self.walk()
        if output is None:
            last = len(self.tables) - 1
        else:
            last = self._tensor("output", self.tables[self.places[output.buffer]].shape, "float32")
            self._operator("DEQUANTIZE", [self.places[output.buffer]], last)
        schema = self.schema
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = self.tables, self.operators
        graph.inputs, graph.outputs, graph.name = [self.entry], [last], "main"
        whole = schema.ModelT()
        whole.version, whole.description = 3, "autoquant"
        whole.subgraphs = [graph]
        for name in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, name)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = _VERSIONS[name]
            whole.operatorCodes = [*(whole.operatorCodes or ()), code]
        whole.buffers = []
        for data in self.data:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data, np.uint8) if data else None
            whole.buffers.append(buffer)
        builder = flatbuffers.Builder(1024)
        builder.Finish(whole.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    # the file's parts

    def _tensor(
        self, name: str, shape: Sequence[int], dtype: str, scales: Any = None, zero: int = 0,
        axis: int = 0, values: Array | None = None,
    ) -> int:  # fmt: skip
        """A new tensor, constant where ``values`` are given; its index."""
        found = self.schema.TensorT()
        found.name, found.shape = name, np.array(shape, np.int32)
        found.type = getattr(self.schema.TensorType, _DTYPES[dtype])
        if scales is not None:
            grid = self.schema.QuantizationParametersT()
            grid.scale = np.atleast_1d(np.float32(scales))
            grid.zeroPoint = np.full(len(grid.scale), zero, np.int64)
            grid.quantizedDimension = axis
            found.quantization = grid
        if values is not None:
            found.buffer = len(self.data)
            self.data.append(np.ascontiguousarray(values, dtype).tobytes())
        self.tables.append(found)
        return len(self.tables) - 1

    def _operator(
        self, name: str, inputs: Sequence[int], output: int, options: str = "", **fields: Any
    ) -> None:
        if name not in self.codes:
            self.codes.append(name)
        found = self.schema.OperatorT()
        found.opcodeIndex = self.codes.index(name)
        found.inputs, found.outputs = list(inputs), [output]
        if options:
            found.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            found.builtinOptions = getattr(self.schema, f"{options}T")()
            for key, value in fields.items():
                assert hasattr(found.builtinOptions, key), key
                setattr(found.builtinOptions, key, value)
        self.operators.append(found)

    # the steps of a header

    def _new(self, shape: tuple[int, int, int], scale: float, zero: int) -> Int8Tensor:
        found = super()._new(shape, scale, zero)
        c, h, w = shape
        self.places.append(self._tensor(f"t{found.buffer}", (1, h, w, c), "int8", scale, zero))
        return found

    def _step(self, quantize: onnx.NodeProto) -> Int8Tensor:
        found = super()._step(quantize)
        if quantize.input[0] in self.inputs:
            place = self.places[found.buffer]
            if self.entry is None:
                self.entry = self._tensor(self.inputs[0], self.tables[place].shape, "float32")
            self._operator("QUANTIZE", [self.entry], place)
        return found

    def _scales(self, node: onnx.NodeProto, source: Int8Tensor) -> Array:
        self.scales = super()._scales(node, source)
        return self.scales

    def _array(self, kind: str, name: str, values: Array) -> None:
        self.values[name] = values

    def _struct(self, parts: Sequence[int]) -> str:
        self.window = tuple(parts)
        return ""

    def _call(self, text: str, sources: list[Int8Tensor], result: Int8Tensor | None) -> None:
        tag, kernel = len(self.calls), text.partition("(")[0]
        super()._call(text, sources, result)
        inputs = [self.places[t.buffer] for t in sources]
        if result is None:
            self._last_product(tag, sources[0], inputs[0])
            return
        out = self.places[result.buffer]
        if kernel == "aq_elementwise_add_s8":
            low, high = (int(v) for v in text.split(", ")[-4:-2])
            act = self._activation(result, low, high)
            self._operator("ADD", inputs, out, "AddOptions", fusedActivationFunction=act)
        elif kernel == "aq_requantize_s8":
            low, high = (int(v) for v in text.split(", ")[-4:-2])
            if self._activation(result, low, high):
                raise RunError("a clamp between two grids has no TFLite form")
            self._operator("QUANTIZE", inputs, out)
        elif kernel == "aq_avg_pool_s8":
            self._average(sources[0], inputs[0], result, out)
        elif kernel == "aq_max_pool_s8":
            self._operator(
                "MAX_POOL_2D", [self._padded(sources[0], inputs[0], True)], out, "Pool2DOptions",
                **self._pooling(result),
            )  # fmt: skip
        elif kernel == "aq_fully_connected_s8":
            self._product_operator(tag, sources[0], inputs[0], result, out)
        else:
            self._convolution(tag, sources[0], inputs[0], result, out, "depthwise" in kernel)

    # operators

    def _activation(self, result: Int8Tensor, low: int, high: int) -> int:
        """The fused activation that clamps to these integers."""
        kinds = self.schema.ActivationFunctionType
        six = min(127, round(6 / result.scale) + result.zero)
        zero = max(-128, result.zero)
        for kind, limits in (
            (kinds.NONE, (-128, 127)),
            (kinds.RELU, (zero, 127)),
            (kinds.RELU6, (zero, six)),
        ):
            if limits == (low, high):
                return int(kind)
        raise RunError(f"a clamp to {low}…{high} has no TFLite form")

    def _padded(self, source: Int8Tensor, place: int, maximum: bool = False) -> int:
        """The input with the window's padding, which is the zero point."""
        ih, iw, _, oh, ow, _, kh, kw, sh, sw, top, left, dh, dw = self.window[:14]
        bottom = max(0, (oh - 1) * sh + (kh - 1) * dh + 1 - ih - top)
        right = max(0, (ow - 1) * sw + (kw - 1) * dw + 1 - iw - left)
        if not any((top, left, bottom, right)):
            return place
        if maximum and source.zero != -128:
            raise RunError("a padded maximum of signed values has no TFLite form")
        pads = np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
        shape = (1, ih + top + bottom, iw + left + right, source.shape[0])
        amounts = self._tensor(f"pads{place}", (4, 2), "int32", values=pads)
        found = self._tensor(f"padded{place}", shape, "int8", source.scale, source.zero)
        self._operator("PAD", [place, amounts], found, "PadOptions")
        return found

    def _strides(self) -> dict[str, int]:
        return {
            "padding": self.schema.Padding.VALID,
            "strideH": self.window[8],
            "strideW": self.window[9],
        }

    def _pooling(self, result: Int8Tensor) -> dict[str, int]:
        return {
            **self._strides(),
            "filterHeight": self.window[6],
            "filterWidth": self.window[7],
            "fusedActivationFunction": self._activation(result, *self.window[-2:]),
        }

    def _average(self, source: Int8Tensor, place: int, result: Int8Tensor, out: int) -> None:
        """The mean of all, or a pool on the input's grid that is then moved to its own."""
        if self.window[6:8] == self.window[:2]:
            if self._activation(result, *self.window[-2:]):
                raise RunError("a clamped mean has no TFLite form")
            axes = self._tensor(f"axes{place}", (2,), "int32", values=np.array([1, 2]))
            self._operator("MEAN", [place, axes], out, "ReducerOptions", keepDims=True)
            return
        shape = self.tables[out].shape
        between = self._tensor(f"pooled{place}", shape, "int8", source.scale, source.zero)
        self._operator(
            "AVERAGE_POOL_2D", [place], between, "Pool2DOptions", **self._pooling(result)
        )
        self._operator("QUANTIZE", [between], out)

    def _constants(
        self, tag: int, source: Int8Tensor, weight: Array, axis: int = 0
    ) -> tuple[int, int]:
        """Weights and biases."""
        by_channel, bias = self.scales / source.scale, self.values[f"aq_b{tag}"]
        return (
            self._tensor(f"w{tag}", weight.shape, "int8", by_channel, 0, axis, weight),
            self._tensor(f"b{tag}", bias.shape, "int32", self.scales, values=bias),
        )

    def _convolution(
        self, tag: int, source: Int8Tensor, place: int, result: Int8Tensor, out: int,
        depthwise: bool,
    ) -> None:  # fmt: skip
        weight = self.values[f"aq_w{tag}"]  # OHWI, or 1HWC
        if not depthwise and self.window[14] != 1:
            raise RunError("a convolution of several groups has no TFLite form")
        inputs = [
            self._padded(source, place),
            *self._constants(tag, source, weight, 3 if depthwise else 0),
        ]
        act = self._activation(result, *self.window[-2:])
        options = {
            **self._strides(),
            "dilationHFactor": self.window[12],
            "dilationWFactor": self.window[13],
            "fusedActivationFunction": act,
        }
        if depthwise:
            options["depthMultiplier"] = weight.shape[3] // source.shape[0]
            name, kind = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        else:
            name, kind = "CONV_2D", "Conv2DOptions"
        self._operator(name, inputs, out, kind, **options)

    def _rows(self, tag: int) -> Array:
        """Weights of a product as (outputs, inputs)."""
        return self.values[f"aq_w{tag}"].reshape(len(self.scales), -1)

    def _product_operator(
        self, tag: int, source: Int8Tensor, place: int, result: Int8Tensor, out: int
    ) -> None:
        self.tables[out].shape = np.array([1, result.shape[0]], np.int32)
        weights = self._constants(tag, source, self._rows(tag))
        act = self._activation(result, *self.window[-2:])
        self._operator(
            "FULLY_CONNECTED", [place, *weights], out, "FullyConnectedOptions",
            fusedActivationFunction=act,
        )  # fmt: skip

    def _last_product(self, tag: int, source: Int8Tensor, place: int) -> None:
        """A float product of integers whose accumulators are the outputs."""
        weight = self._rows(tag)
        stored = self._tensor(
            f"w{tag}", weight.shape, "int8", self.scales / source.scale, values=weight
        )
        floats = self._tensor(f"w{tag}f", weight.shape, "float32")
        self._operator("DEQUANTIZE", [stored], floats)
        shape = self.tables[place].shape
        features = self._tensor("features", shape, "float32")
        self._operator("DEQUANTIZE", [place], features)
        bias = self.values[f"aq_b{tag}"] * self.scales
        biases = self._tensor(f"b{tag}", bias.shape, "float32", values=bias)
        output = self._tensor("output", (1, len(bias)), "float32")
        self._operator(
            "FULLY_CONNECTED", [features, floats, biases], output, "FullyConnectedOptions"
        )
