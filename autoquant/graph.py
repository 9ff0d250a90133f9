"""A float ONNX graph and what a search needs to know of it: layers, tensors, edges, MACs.

`Graph.read` brings any float32 model to one form (opset and IR pinned, batch normalization and
padding folded into convolutions, global means as pooling, constants as initializers), runs it
once on the example inputs for the true shape of every tensor, and finds the layers.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autoquant.errors import ModelError
from autoquant.runtime import OnnxRuntime
from autoquant.task import Array, to_numpy

OPSET = 21
MAX_OPSET = 26
IR_VERSION = 10
LAYER_KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
PRODUCT = "Product"  # kind of a MatMul of two activations
_QUANTIZED_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger")


@dataclass(frozen=True, slots=True)
class Layer:
    """A node with constant weights that can be quantized, and the nodes that run with it.

    ``input`` and ``output`` are tensor names; the output is that of the whole unit: the bias
    Add of a MatMul and the Relu or Clip behind a layer belong to it (``absorbed``: their
    indices). Shapes are at batch 1. ``channel_axis`` is the weight's output axis. ``macs``
    are multiply-accumulates for one sample. A product of two activations (kind ``Product``)
    has no weight but a second input, ``other``, whose shape is ``weight_shape``.
    """

    name: str
    kind: str
    node: int
    weight: str
    bias: str | None
    input: str
    output: str
    absorbed: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    channel_axis: int
    group: int
    macs: int
    other: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The activations that it reads: one, or two for a product."""
        return (self.input, self.other) if self.other else (self.input,)

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        return math.prod(self.weight_shape) if self.weight else 0

    @property
    def channels(self) -> int:
        """Length of the weight's channel axis."""
        return self.weight_shape[self.channel_axis]

    def to_dict(self) -> dict[str, Any]:
        """What ``autoquant inspect --json`` shows of a layer."""
        return {
            "name": self.name,
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
            "weight_shape": list(self.weight_shape),
            "group": self.group,
            "parameters": self.parameters,
            "macs": self.macs,
            "input": self.input,
            "output": self.output,
        }


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape (at batch 1) and element type of an activation."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements for one sample."""
        return math.prod(self.shape)


class Graph:
    """A normalized float network. Treat it as immutable; it pickles.

    ``products``: the MatMuls of two activations (attention). They are no layers, since they
    have no weights, but `by_name` and `by_node` know them too: their inputs can be quantized.
    ``steps``: each node as (operator, inputs, outputs), and ``owned``: those of a layer's unit.
    ``hidden``: tensors that a layer's unit keeps to itself. ``producer``: tensor → node index;
    ``consumers``: tensor → node indices in order.
    ``other_macs``: of products between activations, for one sample.
    """

    def __init__(
        self, model: onnx.ModelProto, layers: Sequence[Layer], tensors: dict[str, Tensor]
    ) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.tensors = tensors
        self.nodes = list(model.graph.node)
        self.steps = [(n.op_type, tuple(n.input), tuple(n.output)) for n in self.nodes]
        self.owned = frozenset(i for x in self.layers for i in (x.node, *x.absorbed))
        self.initializers = {i.name: i for i in model.graph.initializer}
        self.inputs = tuple(i.name for i in model.graph.input)
        self.outputs = tuple(o.name for o in model.graph.output)
        self.producer, self.consumers = _edges(self.nodes)
        self.products = _find_products(self.nodes, self.initializers, tensors, self.layers)
        self.by_name = {layer.name: layer for layer in (*self.layers, *self.products)}
        self.by_node = {layer.node: layer for layer in (*self.layers, *self.products)}
        written = {self.nodes[i].output[0] for x in self.layers for i in (x.node, *x.absorbed)}
        self.hidden = frozenset(written - {layer.output for layer in self.layers})
        self.fingerprint = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()[
            :16
        ]
        known = {layer.node for layer in self.layers}
        self.other_macs = sum(
            _product_macs(n, tensors) for i, n in enumerate(self.nodes) if i not in known
        )
        self._arrays: dict[str, Array] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.model.SerializeToString(), self.layers, self.tensors)

    def array(self, name: str) -> Array:
        """An initializer as an array (shared, read-only)."""
        if name not in self._arrays:
            array = numpy_helper.to_array(self.initializers[name])
            array.setflags(write=False)
            self._arrays[name] = array
        return self._arrays[name]

    def with_arrays(self, arrays: Mapping[str, Array]) -> Graph:
        """The same graph with other values in some initializers, of the same shapes."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for proto in model.graph.initializer:
            if proto.name in arrays:
                value = np.asarray(arrays[proto.name], np.float32, order="C")
                proto.CopyFrom(numpy_helper.from_array(value, proto.name))
        return Graph(model, self.layers, self.tensors)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return sum(layer.macs for layer in self.layers) + self.other_macs

    @classmethod
    def read(cls, model: onnx.ModelProto | str | Path, example_inputs: Sequence[Any]) -> Graph:
        """Normalize a float32 model and find its layers; shapes come from one real run.

        Raises ModelError: broken, already quantized, not float32, NaN weights, inputs that
        do not fit, or no layer to quantize.
        """
        where = "the model"
        if isinstance(model, (str, Path)):
            where = str(model)
            try:
                model = onnx.load(where)
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ModelError(f"{where}: not a readable ONNX file: {reason}") from None
        model = normalize(model, where)
        for item in model.graph.input:
            dims = item.type.tensor_type.shape.dim
            if dims and dims[0].dim_value > 1:
                raise ModelError(
                    f"{where}: input {item.name!r} has a fixed batch of {dims[0].dim_value}; "
                    "export it with a dynamic batch, or with 1"
                )
        example = [to_numpy(value)[:1] for value in example_inputs]
        tensors = _run_once(model, example, where)
        layers = _find_layers(model, tensors)
        if not layers:
            raise ModelError(
                f"{where}: no layer to quantize; looked for {', '.join(LAYER_KINDS)} "
                "with constant float weights"
            )
        for layer in layers:
            model.graph.node[layer.node].name = layer.name
        return cls(model, layers, tensors)


def _unpickle(data: bytes, layers: Sequence[Layer], tensors: dict[str, Tensor]) -> Graph:
    return Graph(onnx.ModelProto.FromString(data), layers, tensors)


def _edges(
    nodes: Sequence[onnx.NodeProto],
) -> tuple[dict[str, int], dict[str, list[int]]]:
    producer: dict[str, int] = {}
    consumers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for name in node.output:
            producer[name] = index
        for name in dict.fromkeys(node.input):
            consumers[name].append(index)
    return producer, dict(consumers)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# --- normalize -------------------------------------------------------------------------------


def normalize(model: onnx.ModelProto, where: str = "the model") -> onnx.ModelProto:
    """Bring a float32 model to the one form that the rewrite knows. Raises ModelError."""
    _check_float(model, where)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset > MAX_OPSET:
        raise ModelError(f"{where}: opset {opset}; export it with opset {OPSET} to {MAX_OPSET}")
    if opset < OPSET:
        from onnx import version_converter

        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{where}: opset {opset} cannot be converted to {OPSET}: {reason}; "
                f"export it with opset {OPSET}"
            ) from None
    out = onnx.ModelProto()
    out.CopyFrom(model)
    out.ir_version = IR_VERSION
    graph = out.graph
    for node in graph.node:
        node.ClearField("doc_string")
    _constants_to_initializers(graph)
    _remove_identities(graph)
    _fold_batch_norm(graph)
    _fold_pads(graph)
    _mean_to_pool(graph)
    _fold_gemm_factors(graph)
    _drop_unused(graph)
    _check_weights(graph, where)
    taken: set[str] = set()
    for node in graph.node:
        scope = _scope(node) if node.op_type in LAYER_KINDS else None
        name = scope or node.name or node.output[0]
        node.name = name if name not in taken else f"{name}/{node.output[0]}"
        taken.add(node.name)
        node.ClearField("metadata_props")
    for proto in graph.initializer:
        proto.ClearField("metadata_props")
        proto.ClearField("doc_string")
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    out.ClearField("metadata_props")
    out.producer_name = "autoquant"
    return out


def _check_float(model: onnx.ModelProto, where: str) -> None:
    if not model.graph.node:
        raise ModelError(f"{where}: the graph has no nodes")
    for node in model.graph.node:
        if node.op_type in _QUANTIZED_OPS or node.op_type.startswith("QLinear"):
            raise ModelError(
                f"{where}: already quantized ({node.op_type} {node.name!r}); give the float model"
            )
    half = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    for proto in model.graph.initializer:
        if proto.data_type in half:
            kind = onnx.TensorProto.DataType.Name(proto.data_type).lower()
            raise ModelError(f"{where}: {proto.name!r} is {kind}; give a float32 model")


def _check_weights(graph: onnx.GraphProto, where: str) -> None:
    weights = {n for node in graph.node if node.op_type in LAYER_KINDS for n in node.input}
    for proto in graph.initializer:
        if proto.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(proto)
            is_mask = proto.name not in weights and array.ndim != 1  # attention masks have -inf
            if np.isnan(array).any() or (np.isinf(array).any() and not is_mask):
                raise ModelError(f"{where}: {proto.name!r} contains NaN or infinity")


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        value = attributes(node).get("value") if node.op_type == "Constant" else None
        if isinstance(value, onnx.TensorProto):
            proto = onnx.TensorProto()
            proto.CopyFrom(value)
            proto.name = node.output[0]
            graph.initializer.append(proto)
        elif node.op_type == "Constant":
            (name, raw), *_ = attributes(node).items()
            dtype = np.float32 if "float" in name else np.int64
            graph.initializer.append(
                numpy_helper.from_array(np.asarray(raw, dtype), node.output[0])
            )
        else:
            kept.append(node)
    _set_nodes(graph, kept)
    named = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in named]  # IR 3 listed weights as inputs
    del graph.input[:]
    graph.input.extend(inputs)


def _set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def _remove_identities(graph: onnx.GraphProto) -> None:
    outputs = {o.name for o in graph.output}
    rename: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)
        passes = node.op_type == "Identity" or (
            node.op_type == "Dropout" and (len(node.output) < 2 or not node.output[1])
        )
        if passes and node.output[0] not in outputs:
            rename[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    _set_nodes(graph, kept)


def _new_name(name: str, taken: Container[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _sole_consumer(graph: onnx.GraphProto, tensor: str) -> onnx.NodeProto | None:
    """The one node that reads ``tensor``, unless it is also an output."""
    readers: list[onnx.NodeProto] = [n for n in graph.node if tensor in n.input]
    if len(readers) == 1 and tensor not in {o.name for o in graph.output}:
        return readers[0]
    return None


def _fold_batch_norm(graph: onnx.GraphProto) -> None:
    """Conv → BatchNormalization becomes Conv (Jacob et al. 2018, section 3.2)."""
    if not any(n.op_type == "BatchNormalization" for n in graph.node):
        return
    arrays = {i.name: i for i in graph.initializer}
    users: dict[str, int] = defaultdict(int)
    for node in graph.node:
        for name in node.input:
            users[name] += 1
    producers = {n.output[0]: n for n in graph.node}
    outputs = {o.name for o in graph.output}
    removed = []
    for bn in graph.node:
        conv = producers.get(bn.input[0]) if bn.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose"):
            continue
        group = int(attributes(conv).get("group", 1))
        names = [conv.input[1], *list(conv.input)[2:3], *list(bn.input)[1:5]]
        if (
            users[conv.output[0]] != 1
            or conv.output[0] in outputs
            or any(n not in arrays for n in names)
            or users[conv.input[1]] != 1
            or (conv.op_type == "ConvTranspose" and group != 1)
        ):
            continue
        weight = numpy_helper.to_array(arrays[conv.input[1]])
        gamma, beta, mean, variance = (
            numpy_helper.to_array(arrays[n]) for n in list(bn.input)[1:5]
        )
        factor = gamma / np.sqrt(variance + attributes(bn).get("epsilon", 1e-5))
        axis = 0 if conv.op_type == "Conv" else 1
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        old = numpy_helper.to_array(arrays[conv.input[2]]) if len(conv.input) > 2 else 0.0
        bias_name = _new_name(f"{conv.input[1]}_bias", arrays)
        folded = (weight * factor.reshape(shape)).astype(np.float32)
        arrays[conv.input[1]].CopyFrom(numpy_helper.from_array(folded, conv.input[1]))
        bias = ((old - mean) * factor + beta).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(bias, bias_name))
        arrays[bias_name] = graph.initializer[-1]
        conv.input[:] = [conv.input[0], conv.input[1], bias_name]
        conv.output[0] = bn.output[0]
        removed.append(bn.output[0])
    _set_nodes(
        graph,
        [
            n
            for n in graph.node
            if not (n.op_type == "BatchNormalization" and n.output[0] in removed)
        ],
    )


def _fold_pads(graph: onnx.GraphProto) -> None:
    """A zero Pad of the spatial axes moves into the one Conv that reads it."""
    arrays = {i.name: i for i in graph.initializer}
    for pad in [n for n in graph.node if n.op_type == "Pad"]:
        conv = _sole_consumer(graph, pad.output[0])
        if (
            conv is None
            or conv.op_type != "Conv"
            or pad.input[1] not in arrays
            or attributes(pad).get("mode", b"constant") != b"constant"
            or (len(pad.input) > 3 and pad.input[3])
            or attributes(conv).get("auto_pad", b"NOTSET") != b"NOTSET"
        ):
            continue
        if len(pad.input) > 2 and pad.input[2]:
            value = arrays.get(pad.input[2])
            if value is None or float(numpy_helper.to_array(value).reshape(-1)[0]) != 0.0:
                continue
        pads = numpy_helper.to_array(arrays[pad.input[1]])
        rank = len(pads) // 2
        if rank < 3 or (pads < 0).any() or pads[:2].any() or pads[rank : rank + 2].any():
            continue
        extra = np.concatenate([pads[2:rank], pads[rank + 2 :]])
        own = np.asarray(attributes(conv).get("pads", [0] * len(extra)))
        for attribute in [a for a in conv.attribute if a.name == "pads"]:
            conv.attribute.remove(attribute)
        conv.attribute.append(helper.make_attribute("pads", [int(v) for v in own + extra]))
        conv.input[0] = pad.input[0]
        graph.node.remove(pad)


def _mean_to_pool(graph: onnx.GraphProto) -> None:
    """ReduceMean over both spatial axes becomes GlobalAveragePool, which has an int8 kernel."""
    arrays = {i.name: i for i in graph.initializer}
    ranks = {}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in arrays:
            ranks[node.output[0]] = len(arrays[node.input[1]].dims)
        elif node.op_type in ("Relu", "Clip", "Add", "Mul", "Sigmoid", "HardSwish", "Concat"):
            known = [ranks[name] for name in node.input if name in ranks]
            if known:
                ranks[node.output[0]] = known[0]
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in arrays:
            continue
        axes = [int(a) for a in numpy_helper.to_array(arrays[node.input[1]]).reshape(-1)]
        rank = ranks.get(node.input[0])
        if (
            rank is None
            or not attributes(node).get("keepdims", 1)
            or sorted(a % rank for a in axes) != list(range(2, rank))
        ):
            continue
        node.op_type = "GlobalAveragePool"
        del node.input[1:]
        del node.attribute[:]


def _fold_gemm_factors(graph: onnx.GraphProto) -> None:
    """Gemm's alpha and beta move into its weight and bias where these are constants."""
    arrays = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type != "Gemm":
            continue
        for attribute, position in (("alpha", 1), ("beta", 2)):
            factor = attributes(node).get(attribute, 1.0)
            if factor == 1.0 or len(node.input) <= position or node.input[position] not in arrays:
                continue
            old = numpy_helper.to_array(arrays[node.input[position]])
            name = _new_name(f"{node.input[position]}_{attribute}", arrays)
            proto = numpy_helper.from_array((old * factor).astype(np.float32), name)
            graph.initializer.append(proto)
            arrays[name] = proto
            node.input[position] = name
            for a in node.attribute:
                if a.name == attribute:
                    a.f = 1.0


def _drop_unused(graph: onnx.GraphProto) -> None:
    needed = {o.name for o in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:  # a subgraph reads outer tensors by name
                for inner in attribute.g.node:
                    needed.update(inner.input)
    _set_nodes(graph, kept[::-1])
    initializers = [i for i in graph.initializer if i.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def prefix(model: onnx.ModelProto, tensor: str, given: Sequence[str] = ()) -> onnx.ModelProto:
    """The part of a model that makes ``tensor``, its only output, from the inputs.

    ``given``: float32 tensors that become inputs too; what makes them is left out.
    """
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.output[:]
    part.graph.output.append(onnx.ValueInfoProto(name=tensor))
    if given:
        kept = [n for n in part.graph.node if not any(o in given for o in n.output)]
        _set_nodes(part.graph, kept)
        known = {value.name for value in part.graph.input}
        part.graph.input.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in given
            if name not in known
        )
    _drop_unused(part.graph)
    needed = {name for node in part.graph.node for name in node.input}
    inputs = [value for value in part.graph.input if value.name in needed]
    del part.graph.input[:]
    part.graph.input.extend(inputs)
    return part


def _scope(node: onnx.NodeProto) -> str | None:
    """The torch module path of a node, from the exporter's metadata."""
    import ast

    for prop in node.metadata_props:
        if prop.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = [s for s in ast.literal_eval(prop.value)[:-1] if s]
            except (ValueError, SyntaxError):
                return None
            return str(scopes[-1]) if scopes and not scopes[-1].startswith("_") else None
    return None


# --- shapes and layers -----------------------------------------------------------------------


def _run_once(model: onnx.ModelProto, example: Sequence[Array], where: str) -> dict[str, Tensor]:
    """Shape and type of every tensor, from one run on the example inputs at batch 1."""
    if len(model.graph.input) != len(example):
        names = ", ".join(i.name for i in model.graph.input)
        raise ModelError(
            f"{where}: it has {len(model.graph.input)} inputs ({names}), "
            f"but example_inputs has {len(example)}"
        )
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {o.name for o in probe.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                probe.graph.output.append(onnx.ValueInfoProto(name=name))
    try:
        session = OnnxRuntime().open(probe.SerializeToString(), optimize=False)
        values = session.run(example)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{where}: running it on example_inputs failed: {reason}") from None
    tensors = {
        name: Tensor(tuple(value.shape), str(value.dtype))
        for name, value in zip(session.output_names, values, strict=True)
        if isinstance(value, np.ndarray)
    }
    for item, array in zip(model.graph.input, example, strict=True):
        tensors[item.name] = Tensor(tuple(array.shape), str(array.dtype))
    for name in (o.name for o in model.graph.output):
        value = values[session.output_names.index(name)]
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ModelError(f"{where}: output {name!r} is NaN or infinite on example_inputs")
    return tensors


def _product_macs(node: onnx.NodeProto, tensors: Mapping[str, Tensor]) -> int:
    if node.op_type != "MatMul" or any(n not in tensors for n in node.input):
        return 0
    return tensors[node.output[0]].elements * tensors[node.input[0]].shape[-1]


def _find_layers(model: onnx.ModelProto, tensors: dict[str, Tensor]) -> list[Layer]:
    graph = model.graph
    nodes = list(graph.node)
    _, consumers = _edges(nodes)
    dims = {
        i.name: tuple(i.dims) for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT
    }
    arrays = {i.name: i for i in graph.initializer}
    outputs = {o.name for o in graph.output}
    layers: list[Layer] = []
    taken = {n.name for n in nodes}
    for index, node in enumerate(nodes):
        position = 0 if node.op_type == "Gather" else 1
        if node.op_type not in LAYER_KINDS or len(node.input) <= position:
            continue
        weight = node.input[position]
        source = node.input[1 - position]
        shape = dims.get(weight)
        if shape is None or source not in tensors or node.output[0] not in tensors:
            continue
        found = attributes(node)
        in_shape, out_shape = tensors[source].shape, tensors[node.output[0]].shape
        bias = (node.input[2] or None) if node.op_type != "Gather" and len(node.input) > 2 else None
        if node.op_type in ("Conv", "ConvTranspose"):
            if len(shape) < 3 or (bias and bias not in dims):
                continue
            axis = 0 if node.op_type == "Conv" else 1
            kernel = math.prod(shape[1:])
            pixels = math.prod((out_shape if axis == 0 else in_shape)[1:])
            macs = pixels * kernel
        elif node.op_type == "Gemm":
            if found.get("transA", 0) or found.get("alpha", 1.0) != 1.0 or len(shape) != 2:
                continue
            if bias and (bias not in dims or found.get("beta", 1.0) != 1.0):
                continue
            axis = 0 if found.get("transB", 0) else 1
            if bias and dims[bias] not in ((shape[axis],), (1, shape[axis])):
                continue
            macs = math.prod(shape) * in_shape[0]
        elif node.op_type == "MatMul":
            if len(shape) != 2 or len(in_shape) < 2:
                continue
            axis, macs = 1, math.prod(in_shape[:-1]) * math.prod(shape)
        else:
            if len(shape) != 2 or found.get("axis", 0) != 0 or shape[0] < 2:
                continue
            axis, macs = 0, 0
        absorbed: list[int] = []
        output = node.output[0]

        def follower(tensor: str) -> int | None:
            """The index of the one reader of ``tensor``."""
            readers = consumers.get(tensor, [])
            return readers[0] if len(readers) == 1 and tensor not in outputs else None

        after = follower(output)
        if node.op_type == "MatMul" and after is not None and nodes[after].op_type == "Add":
            other = [n for n in nodes[after].input if n != output]
            if other and dims.get(other[0]) == (shape[1],):
                bias, output = other[0], nodes[after].output[0]
                absorbed.append(after)
                after = follower(output)
        if node.op_type != "Gather" and after is not None and clamp_bounds(nodes[after], arrays):
            absorbed.append(after)
            output = nodes[after].output[0]
        name = node.name
        if weight.endswith(".weight"):
            stem, count = weight.removesuffix(".weight"), 2
            name = stem
            while name in taken and name != node.name:  # a weight that several layers share
                name, count = f"{stem}#{count}", count + 1
        taken.add(name)
        layers.append(
            Layer(
                name=name,
                kind=node.op_type,
                node=index,
                weight=weight,
                bias=bias,
                input=source,
                output=output,
                absorbed=tuple(absorbed),
                input_shape=in_shape,
                output_shape=out_shape,
                weight_shape=shape,
                channel_axis=axis,
                group=int(found.get("group", 1)),
                macs=macs,
            )
        )
    return layers


def _find_products(
    nodes: Sequence[onnx.NodeProto],
    initializers: Container[str],
    tensors: Mapping[str, Tensor],
    layers: Sequence[Layer],
) -> tuple[Layer, ...]:
    """MatMuls of two different float activations, under their nodes' names."""
    taken, found = {layer.name for layer in layers}, []
    for index, node in enumerate(nodes):
        inputs = list(node.input)
        if node.op_type != "MatMul" or len(set(inputs)) != 2:
            continue
        is_float = all(n in tensors and tensors[n].dtype == "float32" for n in inputs)
        if not is_float or any(n in initializers for n in inputs) or node.name in taken:
            continue
        left, right = (tensors[n].shape for n in inputs)
        output = node.output[0]
        if min(len(left), len(right)) < 2 or output not in tensors or not node.name:
            continue
        found.append(
            Layer(
                name=node.name,
                kind=PRODUCT,
                node=index,
                weight="",
                bias=None,
                input=inputs[0],
                output=output,
                absorbed=(),
                input_shape=left,
                output_shape=tensors[output].shape,
                weight_shape=right,
                channel_axis=len(right) - 1,
                group=1,
                macs=_product_macs(node, tensors),
                other=inputs[1],
            )
        )
    return tuple(found)


def clamp_bounds(
    node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto]
) -> tuple[float, float] | None:
    """The bounds of a Relu, or of a Clip with constant bounds around zero; else None."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    names = (*list(node.input)[1:], "", "")[:2]
    if node.op_type != "Clip" or any(n and n not in initializers for n in names):
        return None
    low, high = (
        float(numpy_helper.to_array(initializers[n])) if n else default
        for n, default in zip(names, (-math.inf, math.inf), strict=True)
    )
    return (low, high) if low <= 0 <= high else None
