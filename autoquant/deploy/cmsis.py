"""A C header of an int8 artifact in CMSIS-NN's convention, for microcontrollers.

``model.h`` holds weights (int8, OHWI), biases (int32), a multiplier and a shift for each output,
input and output offsets and one arena for activations; ``aq_run`` calls the portable kernels of
``autoquant_ref.h`` in order. uint8 grids become int8 ones by moving the zero point by 128. The
kernels round twice, as CMSIS-NN and TensorFlow Lite do, where onnxruntime rounds once: a value
may differ by one step (least significant bit) after each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from autoquant.compress.readback import stored_weights
from autoquant.errors import RunError
from autoquant.graph import attributes, clamp_bounds
from autoquant.task import Array

HEADER, KERNELS, DRIVER = "model.h", "autoquant_ref.h", "main.c"
_LAYERS = ("Conv", "Gemm", "MatMul")
_ALIASES = ("Flatten", "Reshape", "Squeeze")
_UNBOUNDED = (-math.inf, math.inf)


def header_files(model: onnx.ModelProto) -> dict[str, bytes]:
    """The three C files of an artifact. Raises RunError naming the layer that is not int8."""
    here = Path(__file__).parent
    files = {name: (here / name).read_bytes() for name in (KERNELS, DRIVER)}
    return {HEADER: Header(model).text().encode(), **files}


def multiplier_and_shift(scale: float) -> tuple[int, int]:
    """``scale`` as multiplier · 2^(shift − 31) with 31 bits (Jacob et al. 2018, section 2.2)."""
    fraction, shift = math.frexp(scale)
    multiplier = round(fraction * 2**31)
    if multiplier == 2**31:
        multiplier, shift = 2**30, shift + 1
    return (0, 0) if shift < -31 else (multiplier, shift)


@dataclass(frozen=True, slots=True)
class Int8Tensor:
    """An int8 activation: (C, H, W) without the batch, its grid, the buffer that holds it."""

    shape: tuple[int, int, int]
    scale: float
    zero: int
    buffer: int
    flat: bool = False

    @property
    def size(self) -> int:
        """Values of one sample."""
        return math.prod(self.shape)


@dataclass(slots=True)
class _Buffer:
    size: int
    birth: int
    death: int
    offset: int = 0


class Header:
    """Follows one quantized graph from its input, a step a QuantizeLinear."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producers = {name: n for n in self.nodes for name in n.output}
        self.initializers = {i.name: i for i in model.graph.initializer}
        self.inputs = [i.name for i in model.graph.input]
        self.outputs = [o.name for o in model.graph.output]
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise RunError("int8 steps are for networks of one input and one output")
        self.shapes = _shapes(model)
        layers = [n.name for n in self.nodes if n.op_type in _LAYERS and n.name]
        for node in self.nodes:
            if node.op_type in _LAYERS and self._dequantize(node.input[1]) is None:
                raise not_int8(node, "it does not compute in int8")
        self.weights = stored_weights(model, layers)
        self.tensors: dict[str, Int8Tensor] = {}  # by the name of the integers
        self.buffers: list[_Buffer] = []
        self.arrays: list[str] = []
        self.calls: list[tuple[str, list[Int8Tensor], Int8Tensor | None]] = []

    def text(self) -> str:
        """``model.h``."""
        return self._written(*self.walk())

    def walk(self) -> tuple[Int8Tensor | None, list[float]]:
        """Every step; the int8 output, or None and the scales of the last accumulators."""
        for node in self.nodes:
            if node.op_type == "QuantizeLinear":
                self.tensors[node.output[0]] = self._step(node)
        last = self._dequantize(self.outputs[0])
        if last is None:
            return None, self._accumulators().tolist()
        output = self.tensors[last.input[0]]
        self.buffers[output.buffer].death = len(self.calls)
        return output, [output.scale]

    # reading

    def _value(self, name: str) -> Array | None:
        found = self.initializers.get(name)
        return None if found is None else numpy_helper.to_array(found)

    def _dequantize(self, name: str) -> onnx.NodeProto | None:
        node = self.producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _int8(self, name: str, reader: onnx.NodeProto) -> Int8Tensor:
        """The int8 tensor behind a float view, read now."""
        node = self._dequantize(name)
        if node is None or node.input[0] not in self.tensors:
            raise not_int8(reader, f"it reads {name!r}, which is float")
        found = self.tensors[node.input[0]]
        self.buffers[found.buffer].death = len(self.calls)
        return found

    def _new(self, shape: tuple[int, int, int], scale: float, zero: int) -> Int8Tensor:
        now = len(self.calls)
        self.buffers.append(_Buffer(math.prod(shape), now, now))
        return Int8Tensor(shape, scale, zero, len(self.buffers) - 1)

    def _unit(self, tensor: str) -> tuple[onnx.NodeProto | None, tuple[float, float], Array | None]:
        """The node behind Relu, Clip and the Add of a bias; their bounds; the bias."""
        low, high = _UNBOUNDED
        node = self.producers.get(tensor)
        while node is not None:
            bounds = clamp_bounds(node, self.initializers)
            if bounds is None:
                break
            low, high = max(low, bounds[0]), min(high, bounds[1])
            node = self.producers.get(node.input[0])
        if node is not None and node.op_type == "Add":
            for i in (0, 1):
                bias, source = self._value(node.input[i]), self.producers.get(node.input[1 - i])
                if bias is not None and source is not None and source.op_type == "MatMul":
                    return source, (low, high), bias.reshape(-1)
        return node, (low, high), None

    def _grid(self, node: onnx.NodeProto) -> tuple[float, int]:
        scale, zero = self._value(node.input[1]), self._value(node.input[2])
        assert scale is not None and zero is not None
        if zero.dtype.itemsize != 1:
            raise not_int8(node, "16-bit activations")
        return float(scale), int(zero) - (128 if zero.dtype == np.uint8 else 0)

    # one step

    def _step(self, quantize: onnx.NodeProto) -> Int8Tensor:
        """The tensor that a QuantizeLinear makes, and the call that makes it."""
        scale, zero = self._grid(quantize)
        name = quantize.input[0]
        if name in self.inputs:
            return self._new(self._shape(name, quantize), scale, zero)
        node, bounds, bias = self._unit(name)
        if node is None:
            raise not_int8(quantize, "its input is not int8")
        if node.op_type in _ALIASES:
            return self._alias(node)
        limits = [
            int(np.clip(np.round(b / scale) + zero, -128, 127)) if math.isfinite(b) else end
            for b, end in zip(bounds, (-128, 127), strict=True)
        ]
        view = node.output[0] if node.op_type == "DequantizeLinear" else node.input[0]
        source = self._int8(view, node)
        if node.op_type in ("Gemm", "MatMul"):
            shape = (self._channels(node), 1, 1)
        else:
            shape = self._shape(node.output[0], node)
        result = self._new(shape, scale, zero)
        if node.op_type == "Add":
            self._add(node, source, result, limits)
        elif node.op_type in _LAYERS:
            self._layer(node, source, result, limits, bias)
        elif node.op_type in ("MaxPool", "AveragePool", "GlobalAveragePool"):
            self._pool(node, source, result, limits)
        elif node.op_type == "DequantizeLinear":
            found = multiplier_and_shift(source.scale / scale)
            self._call(
                f"aq_requantize_s8({{0}}, {-source.zero}, {found[0]}, {found[1]}, {zero}, "
                f"{limits[0]}, {limits[1]}, {source.size}, {{out}})",
                [source],
                result,
            )
            return replace(result, flat=source.flat)
        else:
            raise not_int8(node, "there is no s8 kernel for it")
        return result

    def _alias(self, node: onnx.NodeProto) -> Int8Tensor:
        """A reshape to one row: the same bytes in another order than ONNX has."""
        source = self._int8(node.input[0], node)
        shape = self.shapes.get(node.output[0], ())
        if len(shape) != 2 and self._shape(node.output[0], node) != source.shape:
            raise not_int8(node, "only a reshape to one row has an s8 form")
        return replace(source, flat=len(shape) == 2)

    def _shape(self, name: str, node: onnx.NodeProto) -> tuple[int, int, int]:
        """(C, H, W) of a tensor of rank 2, 3 or 4."""
        dims = self.shapes.get(name, ())
        if not 2 <= len(dims) <= 4 or not all(dims[1:]):
            raise not_int8(node, f"{name!r} has the shape {list(dims)}, not (N, C, H, W)")
        if len(dims) == 3:
            return dims[1], 1, dims[2]
        return (dims[1], 1, 1) if len(dims) == 2 else (dims[1], dims[2], dims[3])

    def _window(
        self, node: onnx.NodeProto, source: Int8Tensor, result: Int8Tensor, limits: Sequence[int],
        kernel: Sequence[int], groups: int = 1,
    ) -> str:  # fmt: skip
        """An ``aq_window``; one spatial dimension is a row."""
        found = attributes(node)
        if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise not_int8(node, "auto_pad")
        stride = tuple(found.get("strides", (1,) * len(kernel)))
        dilation = tuple(found.get("dilations", (1,) * len(kernel)))
        pads = tuple(found.get("pads", (0,) * 2 * len(kernel)))[: len(kernel)]
        if len(kernel) == 1:
            kernel, stride, dilation, pads = (1, *kernel), (1, *stride), (1, *dilation), (0, *pads)
        (ic, ih, iw), (oc, oh, ow) = source.shape, result.shape
        parts = (ih, iw, ic, oh, ow, oc, *kernel, *stride, *pads, *dilation, groups)
        return self._struct((*parts, -source.zero, result.zero, *limits))

    def _struct(self, parts: Sequence[int]) -> str:
        name = f"aq_p{len(self.calls)}"
        self.arrays.append(f"static const aq_window {name} = {{{', '.join(map(str, parts))}}};")
        return f"&{name}"

    def _pool(
        self, node: onnx.NodeProto, source: Int8Tensor, result: Int8Tensor, limits: Sequence[int]
    ) -> None:
        found = attributes(node)
        kernel = tuple(found.get("kernel_shape", source.shape[1:]))
        if node.op_type == "MaxPool":
            window = self._window(node, source, result, limits, kernel)
            if (source.scale, source.zero) != (result.scale, result.zero):
                raise not_int8(node, "its output has another grid than its input")
            self._call(f"aq_max_pool_s8({window}, {{0}}, {{out}})", [source], result)
            return
        plain = not any(found.get("pads", ())) and not found.get("ceil_mode", 0)
        if not plain or any(d != 1 for d in found.get("dilations", ())):
            raise not_int8(node, "it has padding, ceil_mode or dilations")
        window = self._window(node, source, result, limits, kernel)
        scale = source.scale / (result.scale * math.prod(kernel))
        multiplier, shift = multiplier_and_shift(scale)
        call = f"aq_avg_pool_s8({window}, {multiplier}, {shift}, {{0}}, {{out}})"
        self._call(call, [source], result)

    def _add(
        self, node: onnx.NodeProto, first: Int8Tensor, result: Int8Tensor, limits: Sequence[int]
    ) -> None:
        second = self._int8(node.input[1], node)
        if first.shape != second.shape:
            raise not_int8(node, "its inputs have different shapes")
        most = 2 * max(first.scale, second.scale)
        a, b = (multiplier_and_shift(t.scale / most) for t in (first, second))
        out = multiplier_and_shift(most / (2**20 * result.scale))
        self._call(
            f"aq_elementwise_add_s8({{0}}, {-first.zero}, {a[0]}, {a[1]}, "
            f"{{1}}, {-second.zero}, {b[0]}, {b[1]}, {result.zero}, {out[0]}, {out[1]}, "
            f"{limits[0]}, {limits[1]}, {result.size}, {{out}})",
            [first, second],
            result,
        )

    def _channels(self, node: onnx.NodeProto) -> int:
        by_row = node.op_type == "Gemm" and attributes(node).get("transB", 0)
        return int(self.weights[node.name].shape[0 if by_row else 1])

    def _layer(
        self, node: onnx.NodeProto, source: Int8Tensor, result: Int8Tensor, limits: Sequence[int],
        bias: Array | None,
    ) -> None:  # fmt: skip
        """A convolution or product: its arrays and its call."""
        tag = len(self.calls)
        if node.op_type != "Conv":
            scales = self._product(node, source, bias, tag)
            window = self._dense(source, result.shape[0], result.zero, limits)
            call = f"aq_fully_connected_s8({window}"
        else:
            weight, scales = self.weights[node.name], self._scales(node, source)
            if weight.ndim == 3:
                weight = weight[:, :, None]
            if weight.ndim != 4:
                raise not_int8(node, "it has more than two spatial dimensions")
            groups = int(attributes(node).get("group", 1))
            depthwise = groups > 1 and weight.shape[1] == 1 and groups == source.shape[0]
            order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
            self._array("int8_t", f"aq_w{tag}", weight.transpose(order))
            self._bias(node, None, source, scales, tag)
            kernel = attributes(node).get("kernel_shape", self.weights[node.name].shape[2:])
            window = self._window(node, source, result, limits, tuple(kernel), groups)
            call = f"aq_{'depthwise_conv' if depthwise else 'convolve'}_s8({window}"
        pairs = [multiplier_and_shift(float(s) / result.scale) for s in scales]
        self._array("int32_t", f"aq_m{tag}", np.array([p[0] for p in pairs]))
        self._array("int32_t", f"aq_s{tag}", np.array([p[1] for p in pairs]))
        arrays = f"aq_m{tag}, aq_s{tag}, {{0}}, aq_w{tag}, aq_b{tag}"
        self._call(f"{call}, {arrays}, {{out}})", [source], result)

    def _scales(self, node: onnx.NodeProto, source: Int8Tensor) -> Array:
        """Input scale × weight scale, for every output, in double precision."""
        dequantize = self._dequantize(node.input[1])
        assert dequantize is not None
        scale = self._value(dequantize.input[1])
        assert scale is not None
        count = self._channels(node) if node.op_type != "Conv" else self.weights[node.name].shape[0]
        found: Array = np.broadcast_to(scale.reshape(-1), (count,)).astype(np.float64)
        return found * source.scale

    def _dense(self, source: Int8Tensor, outputs: int, zero: int, limits: Sequence[int]) -> str:
        ones = (1,) * 4 + (0, 0, 1, 1, 1)
        return self._struct((1, 1, source.size, 1, 1, outputs, *ones, -source.zero, zero, *limits))

    def _product(
        self, node: onnx.NodeProto, source: Int8Tensor, bias: Array | None, tag: int
    ) -> Array:
        """Weights of a product as (outputs, inputs), inputs in HWC order; its scales."""
        found, weight = attributes(node), self.weights[node.name]
        odd = found.get("transA", 0) or any(found.get(k, 1.0) != 1.0 for k in ("alpha", "beta"))
        if odd or len(self.shapes.get(node.input[0], ())) != 2:
            raise not_int8(node, "only a product of one row and a matrix has an s8 form")
        rows = weight if node.op_type == "Gemm" and found.get("transB", 0) else weight.T
        if source.flat:
            rows = rows.reshape(-1, *source.shape).transpose(0, 2, 3, 1)
        scales = self._scales(node, source)
        self._array("int8_t", f"aq_w{tag}", rows)
        self._bias(node, bias, source, scales, tag)
        return scales

    def _bias(
        self, node: onnx.NodeProto, added: Array | None, source: Int8Tensor, scales: Array, tag: int
    ) -> None:
        """int32 biases on the scale input × weight."""
        values: Array | None = added
        if values is None and len(node.input) > 2 and node.input[2]:
            stored = self._dequantize(node.input[2])
            values = self._value(node.input[2] if stored is None else stored.input[0])
        if values is None:
            values = np.zeros(len(scales), np.int32)
        if values.dtype.kind == "f":
            values = np.round(values.reshape(-1) / scales)
        values = np.broadcast_to(values, (len(scales),))
        self._array("int32_t", f"aq_b{tag}", values.astype(np.int64))

    def _accumulators(self) -> Array:
        """The last product, whose float output is its accumulators times these scales."""
        node, bounds, bias = self._unit(self.outputs[0])
        if node is None or node.op_type not in ("Gemm", "MatMul") or bounds != _UNBOUNDED:
            raise RunError(
                f"output {self.outputs[0]!r}: the form needs an int8 output or a product as "
                "the last layer"
            )
        source = self._int8(node.input[0], node)
        tag = len(self.calls)
        scales = self._product(node, source, bias, tag)
        window = self._dense(source, len(scales), 0, (-128, 127))
        arrays = f"{{0}}, aq_w{tag}, aq_b{tag}"
        self._call(f"aq_fully_connected_s8_s32({window}, {arrays}, output)", [source], None)
        return scales

    # writing

    def _call(self, text: str, sources: list[Int8Tensor], result: Int8Tensor | None) -> None:
        self.calls.append((text, sources, result))

    def _array(self, kind: str, name: str, values: Array) -> None:
        flat = [str(v) for v in np.ascontiguousarray(values).reshape(-1).tolist()]
        lines = [", ".join(flat[i : i + 16]) for i in range(0, len(flat), 16)]
        body = ",\n    ".join(lines)
        self.arrays.append(f"static const {kind} {name}[{len(flat)}] = {{\n    {body}}};")

    def _written(self, output: Int8Tensor | None, scales: Sequence[float]) -> str:
        first = self.tensors[next(
            n.output[0] for n in self.nodes
            if n.op_type == "QuantizeLinear" and n.input[0] in self.inputs
        )]  # fmt: skip
        arena = _place(self.buffers)
        lines = []
        for text, sources, result in self.calls:
            places = [f"aq_arena + {self.buffers[t.buffer].offset}" for t in sources]
            out = "" if result is None else f"aq_arena + {self.buffers[result.buffer].offset}"
            lines.append(f"    {text.format(*places, out=out)};")
        copy = ""
        shape = output.shape if output is not None else (len(scales), 1, 1)
        if output is not None:
            start = self.buffers[output.buffer].offset
            copy = f"    memcpy(output, aq_arena + {start}, {output.size});\n"
        start = self.buffers[first.buffer].offset
        body, arrays = "\n".join(lines), "\n".join(self.arrays)
        listed = ", ".join(f"{np.float32(s):.9e}f" for s in scales)
        return f"""\
/* Written by autoquant: int8 weights and activations in CMSIS-NN's convention. */
#ifndef AUTOQUANT_MODEL_H
#define AUTOQUANT_MODEL_H

#include <string.h>

#include "autoquant_ref.h"

#define AQ_INPUT_C {first.shape[0]}
#define AQ_INPUT_SIZE {first.size}
#define AQ_INPUT_SCALE {np.float32(first.scale):.9e}f
#define AQ_INPUT_ZERO_POINT {first.zero}
#define AQ_OUTPUT_C {shape[0]}
#define AQ_OUTPUT_SIZE {math.prod(shape)}
#define AQ_OUTPUT_SCALES {len(scales)}
#define AQ_OUTPUT_ZERO_POINT {0 if output is None else output.zero}
typedef {"int32_t" if output is None else "int8_t"} aq_output_t;
static const float aq_output_scale[{len(scales)}] = {{{listed}}};

{arrays}

static int8_t aq_arena[{arena}];

/* One sample: input and output in HWC order, real = (q - zero point) * scale. */
static inline void aq_run(const int8_t *input, aq_output_t *output)
{{
    memcpy(aq_arena + {start}, input, AQ_INPUT_SIZE);
{body}
{copy}}}

#endif
"""


def _place(buffers: Sequence[_Buffer]) -> int:
    """Give every buffer a place in one arena, largest first; returns the arena's bytes."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.size):
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            together = other.birth <= buffer.death and buffer.birth <= other.death
            if together and offset < other.offset + other.size:
                if offset + buffer.size <= other.offset:
                    break
                offset = other.offset + other.size
        buffer.offset = offset
        placed.append(buffer)
    return max((b.offset + b.size for b in buffers), default=1)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors for one sample; 0 where a dimension is not known."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in single.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def not_int8(node: onnx.NodeProto, reason: str) -> RunError:
    """The error that a node has no int8 form, and why."""
    name = node.name or node.output[0]
    return RunError(f"layer {name!r} ({node.op_type}): {reason}: no such form")
