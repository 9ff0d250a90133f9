"""Reading an artifact back: the bits of every layer, from the graph alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autoquant.compress.bank import PLANES, unpack
from autoquant.errors import PackageError
from autoquant.runtime import OnnxRuntime
from autoquant.task import Array


def read_bits(model: onnx.ModelProto, layers: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(weight_bits, activation_bits) of every named layer, from the graph alone.

    In the dialect ``tensorrt`` weights of 2…8 bits all read as 8: the file keeps them as int8.

    Weights: the packed planes, integers or floats that the layer's weight comes from.
    Activations: the levels of the grid that its input is on; a float layer whose input exists
    only quantized reads as 8. A product has no weights, which reads as 32, and two inputs.
    Raises PackageError for a missing layer or an unknown format.
    """
    nodes = {n.name: n for n in model.graph.node if n.name}
    producers = {name: n for n in model.graph.node for name in n.output}
    initializers = {i.name: i for i in model.graph.initializer}
    result = {}
    for name in layers:
        node = nodes.get(name)
        if node is None:
            raise PackageError(f"the model has no layer {name!r}")
        if node.op_type == "MatMulNBits":
            found = {a.name: a.i for a in node.attribute}
            inner = 8 if found.get("accuracy_level") == 4 else 32
            result[name] = (
                found["bits"],
                min(inner, _grid_bits(node.input[0], producers, initializers)),
            )
            continue
        if is_product(node, producers, initializers):
            grids = [_grid_bits(tensor, producers, initializers) for tensor in node.input]
            result[name] = (32, max(grids))
            continue
        position = 0 if node.op_type == "Gather" else 1
        weight_bits = _stored_bits(node.input[position], producers, initializers)
        activation_bits = 32
        if node.op_type == "MatMulInteger":
            activation_bits = 8
        elif node.op_type != "Gather":
            activation_bits = _grid_bits(node.input[0], producers, initializers)
        result[name] = (weight_bits, activation_bits)
    return result


def is_product(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    initializers: Mapping[str, TensorProto],
) -> bool:
    """Whether a node is a MatMul of two activations: nothing stored reaches its second input."""
    if node.op_type != "MatMul":
        return False
    todo, seen = [node.input[1]], set()
    while todo:
        tensor = todo.pop()
        source = producers.get(tensor)
        if source is None:
            if tensor and tensor not in initializers:
                return True  # an input of the graph
        elif tensor not in seen:
            seen.add(tensor)
            todo.extend(source.input)
    return False


def _stored_bits(
    tensor: str,
    producers: dict[str, onnx.NodeProto],
    initializers: dict[str, TensorProto],
) -> int:
    """Follow a weight back to what is stored."""
    widths: dict[int, int] = {
        TensorProto.FLOAT: 32,
        TensorProto.FLOAT16: 16,
        TensorProto.INT16: 16,
        TensorProto.INT8: 8,
        TensorProto.INT4: 4,
    }
    while tensor not in initializers:
        node = producers.get(tensor)
        if node is None:
            raise PackageError(f"weight {tensor!r} has no source")
        if node.op_type == "Split":
            return _plane_bits(node.input[0], producers, initializers)
        tensor = node.input[node.op_type == "Gather"]  # a codebook is read at its places
    kind = initializers[tensor].data_type
    if kind not in widths:
        raise PackageError(f"weight {tensor!r} is stored as {TensorProto.DataType.Name(kind)}")
    return widths[kind]


def _plane_bits(
    tensor: str,
    producers: dict[str, onnx.NodeProto],
    initializers: dict[str, TensorProto],
) -> int:
    """Width of a packed blob: the bits of the masks (or remainders) of all its planes."""
    bits, todo = 0, [tensor]
    while todo:
        node = producers.get(todo.pop())
        if node is None:
            continue
        if node.op_type in ("BitwiseAnd", "Mod"):
            first = int(numpy_helper.to_array(initializers[node.input[1]]).flat[0])
            bits += (first - (node.op_type == "Mod")).bit_length()
        else:
            todo.extend(node.input)
    return bits


def _grid_bits(
    tensor: str,
    producers: dict[str, onnx.NodeProto],
    initializers: dict[str, TensorProto],
) -> int:
    """Bits of the grid that a layer's input is on; 32 where it is float."""
    dequantize = producers.get(tensor)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return 32
    scale = float(numpy_helper.to_array(initializers[dequantize.input[1]]))
    kind = numpy_helper.to_array(initializers[dequantize.input[2]]).dtype
    quantize = producers.get(dequantize.input[0])
    clip = producers.get(quantize.input[0]) if quantize is not None else None
    if (
        clip is not None
        and clip.op_type == "Clip"
        and clip.output[0].rpartition(".clip")[2].isdigit()
    ):
        low, high = (float(numpy_helper.to_array(initializers[n])) for n in clip.input[1:3])
        return round((high - low) / scale).bit_length()
    return 16 if kind.itemsize == 2 else 8


def packed_weight(model: onnx.ModelProto, layer: str) -> Array | None:
    """The integers of a layer stored in 2…7 bits, unpacked from the file; None otherwise.

    In the weight's layout, but (channels, K) where MatMulNBits reads them (8 bits too).
    """
    producers = {name: n for n in model.graph.node for name in n.output}
    initializers = {i.name: i for i in model.graph.initializer}
    node = next((n for n in model.graph.node if n.name == layer), None)
    if node is None:
        raise PackageError(f"the model has no layer {layer!r}")
    if node.op_type == "MatMulNBits":
        return unpack_blocks(node, initializers)
    tensor, shape, table = node.input[0 if node.op_type == "Gather" else 1], None, None
    while tensor not in initializers:
        source = producers[tensor]
        if source.op_type == "Reshape":
            shape = numpy_helper.to_array(initializers[source.input[1]])
        if source.op_type == "Split":
            bits = _plane_bits(source.input[0], producers, initializers)
            planes = [
                numpy_helper.to_array(initializers[f"packed{bits}.{i}"])
                for i in range(len(PLANES[bits]))
            ]
            sizes = numpy_helper.to_array(initializers[source.input[1]])
            index = list(source.output).index(tensor)
            start, count = int(sizes[:index].sum()), int(sizes[index])
            flat = unpack(planes, bits, start + count)[start:]
            assert shape is not None
            return flat.reshape(shape) if table is None else table[flat].reshape(shape)
        if source.op_type == "Gather":
            table = numpy_helper.to_array(initializers[source.input[0]])
        tensor = source.input[source.op_type == "Gather"]
    return None


def unpack_blocks(node: onnx.NodeProto, initializers: Mapping[str, TensorProto]) -> Array:
    """The signed int8 (channels, K) integers that a MatMulNBits reads."""
    found = {a.name: a.i for a in node.attribute}
    packed, bits = numpy_helper.to_array(initializers[node.input[1]]), found["bits"]
    places = np.arange(0, 8, bits, dtype=np.uint8)
    fields = ((packed[..., None] >> places) & (2**bits - 1)).reshape(found["N"], -1)
    signed = fields[:, : found["K"]].astype(np.int16) - 2 ** (bits - 1)
    return np.asarray(signed.astype(np.int8))


def stored_weights(model: onnx.ModelProto, layers: Iterable[str]) -> dict[str, Array]:
    """The stored numbers of every layer's weight, packed ones as the file itself unpacks them.

    Products of activations have none.
    """
    from ml_dtypes import int4

    nodes = {node.name: node for node in model.graph.node}
    producers = {name: node for node in model.graph.node for name in node.output}
    initializers = {i.name: i for i in model.graph.initializer}
    sources, blocked = {}, {}
    for layer in layers:
        node = nodes[layer]
        if node.op_type == "MatMulNBits":
            blocked[layer] = unpack_blocks(node, initializers)
            continue
        if is_product(node, producers, initializers):
            continue
        tensor = node.input[0 if node.op_type == "Gather" else 1]
        while tensor in producers and producers[tensor].op_type in _TO_STORED:
            tensor = producers[tensor].input[0]
        sources[layer] = tensor
    packed = [t for t in dict.fromkeys(sources.values()) if t not in initializers]
    values = constants(model, packed)
    for tensor in sources.values():
        if tensor not in values:
            found = numpy_helper.to_array(initializers[tensor])
            values[tensor] = found.astype(np.int8) if found.dtype == int4 else found
    return blocked | {layer: values[tensor] for layer, tensor in sources.items()}


_TO_STORED = ("DequantizeLinear", "Mul", "Cast", "Transpose")  # between a weight and its layer


def constants(
    model: onnx.ModelProto, tensors: Sequence[str], dtype: int = TensorProto.INT8
) -> dict[str, Array]:
    """Values of ``tensors``, all of one type, that follow from initializers alone, computed by
    onnxruntime."""
    if not tensors:
        return {}
    needed, nodes = set(tensors), []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    graph = helper.make_graph(
        nodes[::-1],
        "weights",
        [],
        [helper.make_tensor_value_info(t, dtype, None) for t in tensors],
        [i for i in model.graph.initializer if i.name in needed],
    )
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    values = OnnxRuntime().open(part.SerializeToString()).run([])
    return dict(zip(tensors, values, strict=True))
