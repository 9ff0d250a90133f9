"""A float graph as a torch module: what has no module of the user's can be trained too.

Pruned heads, factors and ONNX files are graphs; their torch form runs the graph's own operators.
Batch normalization that lowering folded comes back as it would be estimated on the calibration
data, so that training normalizes by its batches, and is folded again into the trained graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch.nn import functional

from autoquant.calibration import Calibration
from autoquant.compress.blocks import Unsupported, apply
from autoquant.compress.train import ModuleNetwork, first
from autoquant.errors import ModelError
from autoquant.graph import Graph, attributes
from autoquant.task import Array

_EPSILON = 1e-5
_MOMENTUM = 0.1
_LEAST = 1e-3  # size of a parameter, for its learning rate


class Network(torch.nn.Module):
    """The graph with its float weights as parameters; functions and names are the graph's.

    ``calibration`` (with moments) gives every convolution a batch normalization that changes
    nothing in eval mode. Raises ModelError for an operator that torch is not told of.
    """

    def __init__(self, graph: Graph, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.graph = graph
        trained = _trained(graph)
        self.names = {name: _key(i) for i, name in enumerate(trained)}
        self.weights = torch.nn.ParameterDict(
            {
                key: torch.nn.Parameter(torch.from_numpy(np.array(graph.array(name))))
                for name, key in self.names.items()
            }
        )
        self.constants = [n for n in graph.initializers if n not in self.names]
        for i, name in enumerate(self.constants):
            self.register_buffer(
                f"constant{i}", torch.from_numpy(np.array(graph.array(name))), persistent=False
            )
        self.norms = torch.nn.ModuleDict()
        uses = Counter(layer.weight for layer in graph.layers)
        for layer in graph.layers if calibration is not None else ():
            found = None if calibration is None else calibration.moments.get(layer.name)
            if layer.kind == "Conv" and found is not None and uses[layer.weight] == 1:
                self.norms[_key(layer.node)] = _norm(*_output(graph, layer.name, found))
        last = {name: i for i, node in enumerate(graph.nodes) for name in node.input}
        self.kept: dict[str, torch.Tensor | None] = {}  # tensors that the next run leaves here
        self.done: dict[int, list[str]] = {}
        for name, index in last.items():
            if name in graph.producer and name not in graph.outputs:
                self.done.setdefault(index, []).append(name)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The graph's outputs: one tensor, or a tuple where there are several."""
        values: dict[str, Any] = dict(zip(self.graph.inputs, inputs, strict=True))
        values |= {name: self.weights[key] for name, key in self.names.items()}
        values |= {n: getattr(self, f"constant{i}") for i, n in enumerate(self.constants)}
        for index, node in enumerate(self.graph.nodes):
            given: list[Any] = [values[n] if n else None for n in node.input]
            if node.op_type == "Split":
                sizes = [self.graph.tensors[n].shape[_axis(node)] for n in node.output]
                values |= zip(node.output, given[0].split(sizes, _axis(node)), strict=True)
                continue
            try:
                found = apply(self.graph, node, given)
            except Unsupported as error:
                raise ModelError(
                    f"the torch form of the network has no operator for {error} ({node.name!r})"
                ) from None
            key = _key(index)
            found = self.norms[key](found) if key in self.norms else found
            values[node.output[0]] = found
            if node.output[0] in self.kept:
                self.kept[node.output[0]] = found
            for name in self.done.get(index, ()):
                del values[name]
        outputs = tuple(values[name] for name in self.graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def model(self) -> onnx.ModelProto:
        """The graph's model with the weights of now; batch normalization is folded."""
        model = onnx.ModelProto()
        model.CopyFrom(self.graph.model)
        arrays = {n: self.weights[key].detach().numpy().copy() for n, key in self.names.items()}
        for key, module in self.norms.items():
            norm: Any = module
            node = model.graph.node[int(key[1:])]
            factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
            mean, shift = norm.running_mean.numpy(), norm.bias.detach().numpy()
            weight = node.input[1]
            arrays[weight] = arrays[weight] * factor.reshape(-1, *[1] * (arrays[weight].ndim - 1))
            old: Any = 0.0
            if len(node.input) > 2 and node.input[2]:
                old = arrays[node.input[2]]
            else:
                node.input[2:] = [f"{weight}_bias"]
            arrays[node.input[2]] = (old - mean) * factor + shift
        known = {proto.name: proto for proto in model.graph.initializer}
        for name, array in arrays.items():
            proto = numpy_helper.from_array(np.asarray(array, np.float32), name)
            if name in known:
                known[name].CopyFrom(proto)
            else:
                model.graph.initializer.append(proto)
        return model


class Normalized(ModuleNetwork):
    """A graph whose batch normalization is back, to be trained by `train.fit`: it normalizes by
    the batches that it trains on. Taps and weights are the graph's layers; a learning rate
    counts in units of each parameter's own size, as in quantization-aware training."""

    def __init__(self, module: Network) -> None:
        super().__init__(module, "live")
        self.network, self.graph = module, module.graph

    def __call__(self, inputs: tuple[Any, ...], taps: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """See `train.Network`."""
        tensors = {name: self.graph.by_name[name].output for name in taps}
        self.network.kept = dict.fromkeys(tensors.values())
        output = self.network(*inputs)
        found = {name: self.network.kept[tensor] for name, tensor in tensors.items()}
        self.network.kept = {}
        return (output if hasattr(output, "shape") else first(output)), found

    def groups(self) -> list[dict[str, Any]]:
        """A group a parameter."""
        return [
            {"params": [p], "unit": max(_rms(p), _LEAST), "decays": p.ndim > 1}
            for p in self.network.parameters()
        ]

    def weights(self) -> dict[str, Any]:
        """See `train.Network`."""
        network = self.network
        return {x.name: network.weights[network.names[x.weight]] for x in self.graph.layers}

    def layers(self) -> list[str]:
        """See `train.Network`."""
        return [layer.name for layer in self.graph.layers]


def _rms(parameter: torch.Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt())


def _axis(node: onnx.NodeProto) -> int:
    return int(attributes(node).get("axis", 0))


def _key(index: int) -> str:
    return f"n{index}"


def _trained(graph: Graph) -> list[str]:
    """Float initializers that a layer or a normalization multiplies or adds."""
    found: dict[str, None] = {}
    for layer in graph.layers:
        found.update(dict.fromkeys([layer.weight, *([layer.bias] if layer.bias else [])]))
    for node in graph.nodes:
        if node.op_type in ("LayerNormalization", "InstanceNormalization", "PRelu"):
            found.update(dict.fromkeys(n for n in list(node.input)[1:] if n in graph.initializers))
    return [n for n in found if graph.initializers[n].data_type == onnx.TensorProto.FLOAT]


def _output(graph: Graph, name: str, moments: Any) -> tuple[Array, Array]:
    """Mean and variance of every output channel of a convolution on the calibration data."""
    layer = graph.by_name[name]
    rows = graph.array(layer.weight).reshape(layer.channels, -1).astype(np.float64)
    parts = moments.split(rows)
    mean = np.einsum("grk,gk->gr", parts, moments.mean).reshape(-1)
    variance = np.einsum("grk,gkl,grl->gr", parts, moments.centred(), parts).reshape(-1)
    if layer.bias:
        mean = mean + graph.array(layer.bias).reshape(-1)
    return mean, np.maximum(variance, 0.0)


def _norm(mean: Array, variance: Array) -> torch.nn.BatchNorm2d:
    norm = _Norm(len(mean), eps=_EPSILON, momentum=_MOMENTUM)
    with torch.no_grad():
        spread = torch.from_numpy(np.sqrt(variance + _EPSILON))
        norm.weight.copy_(spread)
        norm.bias.copy_(torch.from_numpy(mean))
        norm.running_mean.copy_(torch.from_numpy(mean))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.from_numpy(variance))  # type: ignore[union-attr]
    return norm.eval()


class _Norm(torch.nn.BatchNorm2d):
    """Batch normalization over any number of spatial axes."""

    def _check_input_dim(self, _: torch.Tensor) -> None:
        return


def loss(output: Any, classes: bool, generator: torch.Generator) -> torch.Tensor:
    """Negative log-likelihood of labels that the network itself draws, in the mean over samples;
    for outputs that are no classes, of a unit Gaussian around them."""
    first = output[0] if isinstance(output, tuple) else output
    if classes:
        with torch.no_grad():
            drawn = torch.multinomial(first.softmax(-1), 1, generator=generator)[:, 0]
        return functional.cross_entropy(first, drawn)
    with torch.no_grad():
        target = first + torch.randn(first.shape, generator=generator)
    found: torch.Tensor = 0.5 * ((first - target) ** 2).flatten(1).sum(1).mean()
    return found
