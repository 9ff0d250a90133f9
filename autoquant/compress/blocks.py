"""Blocks of a float network, and their differentiable execution in torch.

A block is what lies between two tensors through which everything passes: a residual block with
its sum, a plain layer where there are no branches. Tuning compares block outputs, so that errors
of neighbouring layers may cancel (Li et al. 2021, BRECQ).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from autoquant.calibration import pads_of
from autoquant.graph import Graph, Layer, attributes, clamp_bounds


@dataclass(frozen=True, slots=True)
class Block:
    """Nodes between two cuts. ``source``: the tensor that it reads, "" for the graph inputs
    alone; ``target``: the tensor that it makes; ``nodes``: indices in graph order."""

    source: str
    target: str
    nodes: tuple[int, ...]
    layers: tuple[Layer, ...]


def split(graph: Graph) -> list[Block]:
    """Blocks in graph order, each with a layer at least; every layer is in one of them.

    A network without a cut is one block. What only moves or pools between cuts is in none.
    """
    last = {tensor: max(nodes) for tensor, nodes in graph.consumers.items()}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    made: set[str] = set()  # float tensors that follow from a layer
    blocks, source, start = [], "", 0
    for index, node in enumerate(graph.nodes):
        if index in graph.by_node or any(name in made for name in node.input):
            made.update(n for n in node.output if _is_float(graph, n))
        alive = [name for name in made if last.get(name, -1) > index]
        if len(alive) != 1 or not _is_cut(graph, alive[0]):
            continue
        layers = tuple(x for x in graph.layers if start <= x.node <= index)
        if layers:
            blocks.append(Block(source, alive[0], _between(graph, source, alive[0]), layers))
        source, start = alive[0], index + 1
    rest = tuple(x for x in graph.layers if x.node >= start)
    if rest:
        target = graph.outputs[0]
        blocks.append(Block(source, target, _between(graph, source, target), rest))
    return blocks


def _is_float(graph: Graph, name: str) -> bool:
    return name in graph.tensors and graph.tensors[name].dtype == "float32"


def _is_cut(graph: Graph, tensor: str) -> bool:
    """Not inside a unit, and not before the Relu or Clip that ends one."""
    readers = graph.consumers.get(tensor, [])
    if tensor in graph.hidden:
        return False
    return not (
        len(readers) == 1 and clamp_bounds(graph.nodes[readers[0]], graph.initializers) is not None
    )


def _between(graph: Graph, source: str, target: str) -> tuple[int, ...]:
    needed, found, todo = {source}, set(), [target]
    while todo:
        index = graph.producer.get(todo.pop())
        if index is None or index in found:
            continue
        found.add(index)
        todo += [n for n in graph.nodes[index].input if n not in needed]
    return tuple(sorted(found))


class Unsupported(Exception):
    """An operator that the torch form of a block does not know."""


Quantize = Callable[[str, Any, int], Any]


def run_block(
    graph: Graph,
    block: Block,
    feeds: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    biases: Mapping[str, Any] | None = None,
    quantize: Quantize | None = None,
    kept: dict[str, Any] | None = None,
) -> Any:
    """The block's target as a torch tensor that gradients pass through.

    ``feeds``: its source and graph inputs. ``weights``, ``biases``: by layer, in place of the
    graph's. ``quantize(tensor, value, node)``: what a node, by its index, reads for a
    value. ``kept``: tensors whose values it is given. Raises Unsupported.
    """
    import torch

    weights, biases, values = weights or {}, biases or {}, dict(feeds)

    def read(name: str) -> Any:
        if not name:
            return None
        if name not in values:
            if name not in graph.initializers:
                raise Unsupported(f"tensor {name!r}")
            values[name] = torch.from_numpy(np.array(graph.array(name)))
        return values[name]

    for index in block.nodes:
        node, layer = graph.nodes[index], graph.by_node.get(index)
        inputs = [read(name) for name in node.input]
        if quantize is not None:
            for i, name in enumerate(node.input):
                if name in graph.tensors and name not in graph.initializers:
                    inputs[i] = quantize(name, inputs[i], index)
        if layer is not None and layer.kind == "Gather":
            inputs[0] = weights.get(layer.name, inputs[0])
        elif layer is not None:
            inputs[1] = weights.get(layer.name, inputs[1])
            if layer.name in biases and layer.kind != "MatMul":
                inputs[2:] = [biases[layer.name]]
        owner = _absorbing(graph, index)
        if owner is not None and owner.kind == "MatMul" and owner.name in biases:
            inputs[list(node.input).index(owner.bias or "")] = biases[owner.name]
        values[node.output[0]] = apply(graph, node, inputs)
    for name in kept or ():
        kept[name] = values[name]  # type: ignore[index]
    return values[block.target]


def apply(graph: Graph, node: onnx.NodeProto, inputs: Sequence[Any]) -> Any:
    """The one output of a node on torch tensors. Raises Unsupported."""
    bounds = clamp_bounds(node, graph.initializers)
    if bounds == (0.0, float("inf")):
        return inputs[0].relu()  # the gradient of a clamp takes several times as long
    if bounds is not None:
        return inputs[0].clamp(*bounds)
    if node.op_type not in _OPERATORS or len(node.output) != 1:
        raise Unsupported(node.op_type)
    return _OPERATORS[node.op_type](attributes(node), *inputs)


def _absorbing(graph: Graph, index: int) -> Layer | None:
    """The layer whose bias Add this node is."""
    if graph.nodes[index].op_type != "Add":
        return None
    return next((x for x in graph.layers if index in x.absorbed), None)


def _conv(found: dict[str, Any], x: Any, weight: Any, bias: Any = None) -> Any:
    from torch.nn import functional

    rank = x.ndim - 2
    strides = list(found.get("strides", [1] * rank))
    dilations = list(found.get("dilations", [1] * rank))
    pads = pads_of(found, list(x.shape[2:]), list(weight.shape[2:]), strides, dilations)
    padding = pads[:rank]
    if pads[rank:] != padding:
        x = functional.pad(x, [p for i in reversed(range(rank)) for p in (pads[i], pads[i + rank])])
        padding = [0] * rank
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return run(x, weight, bias, strides, padding, dilations, int(found.get("group", 1)))


def _gemm(found: dict[str, Any], x: Any, weight: Any, bias: Any = None) -> Any:
    product = x @ (weight.T if found.get("transB", 0) else weight)
    return product if bias is None else product + bias


def _pool(found: dict[str, Any], x: Any, mean: bool) -> Any:
    from torch.nn import functional

    kernel, rank = list(found["kernel_shape"]), x.ndim - 2
    strides, pads = list(found.get("strides", [1] * rank)), list(found.get("pads", [0] * 2 * rank))
    plain = not found.get("ceil_mode", 0) and not found.get("auto_pad", b"NOTSET").startswith(b"S")
    if rank != 2 or pads[:rank] != pads[rank:] or not plain or found.get("dilations"):
        raise Unsupported("pooling with these attributes")
    if mean:
        padded = bool(found.get("count_include_pad", 0))
        return functional.avg_pool2d(x, kernel, strides, pads[:rank], count_include_pad=padded)
    return functional.max_pool2d(x, kernel, strides, pads[:rank])


def _slice(_: dict[str, Any], x: Any, starts: Any, ends: Any, axes: Any, steps: Any = None) -> Any:
    taken = [slice(None)] * x.ndim
    steps = [1] * len(starts) if steps is None else steps.tolist()
    for start, end, axis, step in zip(
        starts.tolist(), ends.tolist(), axes.tolist(), steps, strict=True
    ):
        if step < 1:
            raise Unsupported("Slice backwards")
        taken[axis] = slice(start, end, step)
    return x[tuple(taken)]


def _pad(found: dict[str, Any], x: Any, pads: Any, value: Any = None, axes: Any = None) -> Any:
    from torch.nn import functional

    if found.get("mode", b"constant") != b"constant" or axes is not None:
        raise Unsupported("Pad with this mode")
    both, rank = pads.tolist(), x.ndim
    flat = [p for i in reversed(range(rank)) for p in (both[i], both[i + rank])]
    return functional.pad(x, flat, value=0.0 if value is None else float(value))


def _reshape(_: dict[str, Any], x: Any, shape: Any) -> Any:
    return x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(shape.tolist())])


def _flatten(found: dict[str, Any], x: Any) -> Any:
    if found.get("axis", 1) != 1:
        raise Unsupported("Flatten at this axis")
    return x.flatten(1)


def _layer_norm(found: dict[str, Any], x: Any, scale: Any, bias: Any = None) -> Any:
    from torch.nn import functional

    axis = int(found.get("axis", -1)) % x.ndim
    epsilon = found.get("epsilon", 1e-5)
    return functional.layer_norm(x, list(x.shape[axis:]), scale, bias, epsilon)


def _gelu(found: dict[str, Any], x: Any) -> Any:
    from torch.nn import functional

    return functional.gelu(x, approximate=found.get("approximate", b"none").decode())


def _torch(name: str) -> Callable[..., Any]:
    """An operator that torch has under this name, without attributes."""

    def run(_: dict[str, Any], *inputs: Any) -> Any:
        import torch

        return getattr(torch, name)(*inputs)

    return run


def _concat(found: dict[str, Any], *parts: Any) -> Any:
    import torch

    return torch.cat(parts, int(found["axis"]))


def _conv_transpose(found: dict[str, Any], x: Any, weight: Any, bias: Any = None) -> Any:
    from torch.nn import functional

    rank = x.ndim - 2
    strides, pads = list(found.get("strides", [1] * rank)), list(found.get("pads", [0] * 2 * rank))
    if pads[:rank] != pads[rank:] or found.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise Unsupported("ConvTranspose with these pads")
    extra = list(found.get("output_padding", [0] * rank))
    dilations, group = list(found.get("dilations", [1] * rank)), int(found.get("group", 1))
    run = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    return run[rank - 1](x, weight, bias, strides, pads[:rank], extra, group, dilations)


def _range(_: dict[str, Any], start: Any, limit: Any, step: Any) -> Any:
    import torch

    return torch.arange(start.item(), limit.item(), step.item())


def _gather(found: dict[str, Any], x: Any, index: Any) -> Any:
    import torch

    axis = int(found.get("axis", 0)) % x.ndim
    flat = torch.where(index < 0, index + x.shape[axis], index).reshape(-1).long()
    return x.index_select(axis, flat).reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _axes(found: dict[str, Any], given: Any, rank: int) -> list[int]:
    axes = found.get("axes") if given is None else given.reshape(-1).tolist()
    return [int(a) % rank for a in (range(rank) if axes is None else axes)]


def _reduce(name: str) -> Callable[..., Any]:
    def run(found: dict[str, Any], x: Any, axes: Any = None) -> Any:
        over, keep = _axes(found, axes, x.ndim), bool(found.get("keepdims", 1))
        if name == "norm":
            return (x * x).sum(over, keepdim=keep).sqrt()
        return getattr(x, name)(over, keepdim=keep)

    return run


def _unsqueeze(found: dict[str, Any], x: Any, axes: Any = None) -> Any:
    given = list(found.get("axes", ())) if axes is None else axes.reshape(-1).tolist()
    for axis in sorted(int(a) % (x.ndim + len(given)) for a in given):
        x = x.unsqueeze(axis)
    return x


def _squeeze(found: dict[str, Any], x: Any, axes: Any = None) -> Any:
    for axis in sorted(_axes(found, axes, x.ndim), reverse=True):
        if x.shape[axis] == 1:
            x = x.squeeze(axis)
    return x


def _expand(_: dict[str, Any], x: Any, shape: Any) -> Any:
    wanted = [1] * (x.ndim - len(shape)) + shape.tolist()
    own = [1] * (len(wanted) - x.ndim) + list(x.shape)
    return x.expand([max(a, b) for a, b in zip(own, wanted, strict=True)])


def _shape(found: dict[str, Any], x: Any) -> Any:
    import torch

    sizes = list(x.shape)[found.get("start", 0) : found.get("end")]
    return torch.tensor(sizes, dtype=torch.int64)


def _cast(found: dict[str, Any], x: Any) -> Any:
    import torch
    from onnx import helper

    kind = helper.tensor_dtype_to_np_dtype(int(found["to"]))
    return x.to(torch.from_numpy(np.empty(0, kind)).dtype)


def _filled(found: dict[str, Any], shape: Any) -> Any:
    import torch
    from onnx import numpy_helper

    value = np.zeros(1, np.float32)
    if "value" in found:
        value = numpy_helper.to_array(found["value"]).copy()
    return torch.from_numpy(value).reshape(()).expand(shape.tolist())


def _clip(_: dict[str, Any], x: Any, low: Any = None, high: Any = None) -> Any:
    return x.clamp(None if low is None else low, None if high is None else high)


def _divide(_: dict[str, Any], a: Any, b: Any) -> Any:
    whole = not a.is_floating_point() and not b.is_floating_point()
    return a.div(b, rounding_mode="trunc") if whole else a / b


_OPERATORS: dict[str, Callable[..., Any]] = {
    "ConvTranspose": _conv_transpose,
    "Gather": _gather,
    "ReduceMean": _reduce("mean"),
    "ReduceSum": _reduce("sum"),
    "ReduceL2": _reduce("norm"),
    "ReduceMax": _reduce("amax"),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Shape": _shape,
    "Cast": _cast,
    "ConstantOfShape": _filled,
    "Clip": _clip,
    "Where": _torch("where"),
    "Equal": _torch("eq"),
    "Less": _torch("lt"),
    "Greater": _torch("gt"),
    "And": _torch("logical_and"),
    "Or": _torch("logical_or"),
    "Not": _torch("logical_not"),
    "Max": _torch("maximum"),
    "Min": _torch("minimum"),
    "Range": _range,
    "Neg": _torch("neg"),
    "Abs": _torch("abs"),
    "Exp": _torch("exp"),
    "Log": _torch("log"),
    "Reciprocal": _torch("reciprocal"),
    "Identity": lambda _, x: x,
    "LeakyRelu": lambda f, x: x.where(x >= 0, x * f.get("alpha", 0.01)),
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _torch("matmul"),
    "Add": _torch("add"),
    "Sub": _torch("sub"),
    "Mul": _torch("mul"),
    "Div": _divide,
    "Pow": _torch("pow"),
    "Sqrt": _torch("sqrt"),
    "Erf": _torch("erf"),
    "Tanh": _torch("tanh"),
    "Sigmoid": _torch("sigmoid"),
    "Gelu": _gelu,
    "Softmax": lambda found, x: x.softmax(int(found.get("axis", -1))),
    "LayerNormalization": _layer_norm,
    "HardSwish": lambda _, x: x * (x / 6 + 0.5).clamp(0, 1),
    "HardSigmoid": lambda f, x: (x * f.get("alpha", 0.2) + f.get("beta", 0.5)).clamp(0, 1),
    "GlobalAveragePool": lambda _, x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "AveragePool": lambda found, x: _pool(found, x, mean=True),
    "MaxPool": lambda found, x: _pool(found, x, mean=False),
    "Concat": _concat,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": lambda found, x: x.permute(*found.get("perm", range(x.ndim)[::-1])),
    "Slice": _slice,
    "Pad": _pad,
}
