"""Latency from kernels measured in isolation and boundaries fitted on mixes of the network.

``t = Σ a(precision)·kernel + b·(elements float → int8) + c·(elements int8 → float) + d``: the
kernel times come from one-layer models, the coefficients (none negative) from a few measured
mixes of the same network. The constant takes up all operators between the layers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autoquant.cache import cache_folder
from autoquant.calibration import Calibration, Histogram
from autoquant.candidate import FLOAT, NBITS, Candidate, LayerChoice
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.qdq import INT8_KINDS, Plan, mode, nbits_mode, plan, resolve
from autoquant.errors import HardwareError
from autoquant.graph import IR_VERSION, PRODUCT, Graph, Layer, attributes
from autoquant.hardware import LatencyModel
from autoquant.runtime import OnnxRuntime, describe, kernel_times, measure
from autoquant.task import Array

INT8 = LayerChoice(8, 8)
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput")
_NBITS = [
    LayerChoice(weight, activation, f"block{block}", dynamic=activation == 8, nbits=True)
    for weight in NBITS
    for block in (32, 64, 128)
    for activation in (32, 8)
]
PRECISIONS = {"float": FLOAT, "int8": INT8, "dynamic": LayerChoice(8, 8, dynamic=True)}
PRECISIONS |= {nbits_mode(choice): choice for choice in _NBITS}
_DENSE = ("Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class TableModel:
    """Kernel times by layer signature and precision, and the coefficients around them.

    ``error`` is the mean absolute relative error of leave-one-out predictions over ``mixes``.
    """

    kernel_ms: Mapping[str, float]
    coefficients: Mapping[str, float]
    error: float
    mixes: int
    batch: int
    threads: int

    def latency_ms(self, graph: Graph, candidate: Candidate, plan: Plan) -> float:
        """Predicted milliseconds of a planned candidate. Raises HardwareError."""
        features = _features(graph, plan, self.kernel_ms)
        return sum(self.coefficients.get(name, 0.0) * value for name, value in features.items())

    def energy_mj(self, graph: Graph, candidate: Candidate, plan: Plan) -> None:
        """Kernels are timed here, not metered."""
        return None

    def layer_ms(self, graph: Graph, layer: Layer, choice: LayerChoice) -> float:
        """What a layer's kernel adds at a choice, boundaries left out."""
        if layer.kind == "Gather":
            return 0.0
        name = precision(mode(layer, choice))
        if layer.kind == PRODUCT and signature(graph, layer, name) not in self.kernel_ms:
            return 0.0
        return self.coefficients.get(name, 1.0) * self.kernel_ms[signature(graph, layer, name)]


def from_profile(model: LatencyModel, batch: int, threads: int) -> TableModel:
    """The model that a profile or a run holds. Raises HardwareError for other settings."""
    if (model.batch, model.threads) != (batch, threads):
        raise HardwareError(
            f"the profile's latencies are for batch {model.batch} and {model.threads} threads, "
            f"not {batch} and {threads}"
        )
    error = float("nan") if model.error is None else model.error
    return TableModel(model.kernel_ms, model.coefficients, error, model.mixes, batch, threads)


def to_profile(model: TableModel) -> LatencyModel:
    """The form that profiles and runs store."""
    machine = describe()
    return LatencyModel(
        cpu=machine["cpu"],
        runtime=f"onnxruntime {machine['onnxruntime']}",
        batch=model.batch,
        threads=model.threads,
        kernel_ms=dict(model.kernel_ms),
        coefficients=dict(model.coefficients),
        error=None if math.isnan(model.error) else model.error,
        mixes=model.mixes,
        source="measured by autoquant on this machine",
    )


def extended(model: TableModel, graph: Graph, known: Graph) -> TableModel:
    """The model with times for kernels that it has none of, of another structure of ``known``.

    A narrower layer's is its own kernel's before, by the ratio of their MACs; that of a layer
    that ``known`` does not have follows from the timed kernel of its kind nearest in MACs.
    """
    found: dict[str, float] = {}
    for layer in (*graph.layers, *graph.products):
        for name in PRECISIONS if layer.kind != "Gather" else ():
            key = signature(graph, layer, name)
            if key in model.kernel_ms or not _has(layer, name):
                continue
            timed = [
                x
                for x in (*known.layers, *known.products)
                if x.kind == layer.kind
                and (x.group > 1) == (layer.group > 1)
                and signature(known, x, name) in model.kernel_ms
            ] or [
                x
                for x in known.layers
                if x.kind in INT8_KINDS and signature(known, x, name) in model.kernel_ms
            ]
            if timed:
                near = next((x for x in timed if x.name == layer.name), None) or min(
                    timed, key=lambda x: abs(math.log(max(x.macs, 1) / max(layer.macs, 1)))
                )
                ratio = layer.macs / max(near.macs, 1)
                found[key] = model.kernel_ms[signature(known, near, name)] * ratio
    return replace(model, kernel_ms={**model.kernel_ms, **found})


def signature(graph: Graph, layer: Layer, precision: str) -> str:
    """What a kernel's time depends on: operator, attributes, shapes, what is fused, precision."""
    node = graph.nodes[layer.node]
    found = {k: v for k, v in attributes(node).items() if k != "auto_pad"}
    after = "+".join(graph.nodes[i].op_type for i in layer.absorbed)
    return (
        f"{layer.kind}{'+' + after if after else ''} {list(layer.input_shape)} "
        f"{list(layer.weight_shape)} {json.dumps(found, sort_keys=True, default=str)} {precision}"
    )


def precision(mode: str) -> str:
    """The kernel that runs a mode of `Plan.modes`: weight-only layers run in float."""
    return mode if mode in PRECISIONS else "float"


def _features(graph: Graph, plan: Plan, kernel_ms: Mapping[str, float]) -> dict[str, float]:
    """Kernel ms by precision, millions of converted elements by direction, and one.

    Float products that were not timed are part of the constant.
    """
    found = dict.fromkeys(PRECISIONS, 0.0)
    for layer in (*graph.layers, *graph.products):
        if layer.kind == "Gather":
            continue
        name = precision(plan.modes[layer.name])
        key = signature(graph, layer, name)
        if key not in kernel_ms:
            if layer.kind == PRODUCT and name == "float":
                continue
            raise HardwareError(
                f"the latency model has no kernel for layer {layer.name!r} "
                f"({name}): measure it with autoquant profile on this task"
            )
        found[name] += kernel_ms[key]
    to_int8, to_float = plan.boundaries(graph)
    return {**found, "to_int8": to_int8 / 1e6, "to_float": to_float / 1e6, "constant": 1.0}


def measure_device(
    graph: Graph,
    calibration: Calibration,
    bank: Bank,
    inputs: Sequence[Array],
    *,
    dialect: str,
    precisions: Sequence[str] = ("float", "int8"),
    threads: int = 1,
    seed: int = 0,
    products: bool = False,
) -> TableModel:
    """Time every distinct kernel of ``graph`` here and fit the coefficients.

    ``inputs``: one batch at the size that the latency is for. ``products``: the products of
    activations can be int8 too. Kernel times are cached on disk
    by CPU, runtime version, threads and batch.
    """
    batch = int(inputs[0].shape[0])
    timed = [x for x in graph.layers if x.kind != "Gather"]
    timed += graph.products if products else ()
    kernel_ms = _kernel_table(graph, timed, precisions, batch, threads)
    mixes = _mixes(timed, [p for p in precisions if p != "float"], seed)
    features, sessions = [], {}
    for index, mix in enumerate(mixes):
        resolved = resolve(graph, mix)
        features.append(_features(graph, plan(graph, resolved, dialect), kernel_ms))
        artifact = compress(graph, mix, calibration, bank, dialect)
        sessions[index] = OnnxRuntime().open(artifact.model, threads)
    found = measure(sessions, inputs, threads=threads, seconds=0.5, min_rounds=20, max_rounds=200)
    times = np.array([found[i].latency_ms for i in range(len(mixes))])
    names = [name for name in features[0] if any(f[name] for f in features)]
    matrix = np.array([[f[name] for name in names] for f in features])
    coefficients = _fit(matrix, times)
    errors = []
    for left in range(len(mixes) if len(mixes) > 5 else 0):
        kept = np.arange(len(mixes)) != left
        guess = matrix[left] @ _fit(matrix[kept], times[kept])
        errors.append(abs(guess / times[left] - 1))
    return TableModel(
        kernel_ms=kernel_ms,
        coefficients={n: float(c) for n, c in zip(names, coefficients, strict=True)},
        error=float(np.mean(errors)) if errors else float("nan"),
        mixes=len(mixes),
        batch=batch,
        threads=threads,
    )


def _fit(matrix: Array, times: Array) -> Array:
    """Non-negative least squares on relative errors."""
    from scipy.optimize import nnls

    weight = 1.0 / times
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    solution, _ = nnls(matrix / scale * weight[:, None], np.ones(len(times)))
    return np.asarray(solution / scale)


def _has(layer: Layer, name: str) -> bool:
    """Whether a layer can run at a precision."""
    if layer.kind == PRODUCT:
        return name in ("float", "int8")
    return name in ("float", "int8") or layer.kind in _DENSE


def _mixes(timed: Sequence[Layer], precisions: Sequence[str], seed: int) -> list[Candidate]:
    """Ends, blocks, alternations and random mixes: what identifies the coefficients."""
    count = len(timed)
    masks = [np.zeros(count, bool), np.ones(count, bool)]
    half = np.arange(count) < count // 2
    masks += [half, ~half, np.arange(count) % 2 == 0, np.arange(count) // 4 % 2 == 0]
    generator = np.random.default_rng(seed)
    masks += [generator.random(count) < share for share in (0.2, 0.35, 0.5, 0.5, 0.65, 0.8, 0.9)]
    found = []
    for name in precisions:
        for mask in masks:
            layers = {
                layer.name: _choice(layer, name)
                for layer, on in zip(timed, mask, strict=True)
                if on and _has(layer, name)
            }
            found.append(Candidate(layers))
    return list(dict.fromkeys(found)) or [Candidate()]


def _choice(layer: Layer, name: str) -> LayerChoice:
    choice = PRECISIONS[name]
    return replace(choice, weight_bits=32) if layer.kind == PRODUCT else choice


def _kernel_table(
    graph: Graph, timed: Sequence[Layer], precisions: Sequence[str], batch: int, threads: int
) -> dict[str, float]:
    machine = json.dumps({**describe(), "batch": batch, "threads": threads}, sort_keys=True)
    digest = hashlib.sha256(machine.encode()).hexdigest()[:12]
    path = cache_folder() / f"kernels-{digest}.json"
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        known = {str(key): float(value) for key, value in read.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or damaged
        known = {}
    table, fresh = {}, False
    for layer in timed:
        for name in {"float", *precisions}:
            if not _has(layer, name):
                continue
            key = signature(graph, layer, name)
            if key not in known:
                known[key], fresh = _kernel_time(graph, layer, name, batch, threads), True
            table[key] = known[key]
    if fresh:
        _write(path, known)
    return table


def _write(path: Path, known: Mapping[str, float]) -> None:
    """Replace the cache file at once; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(dict(known), file, indent=0, sort_keys=True)
        Path(temporary).replace(path)
    except OSError:
        return


def _kernel_time(graph: Graph, layer: Layer, name: str, batch: int, threads: int) -> float:
    """Milliseconds of a layer alone at one precision, conversions around it left out."""
    shapes = [layer.input_shape, layer.weight_shape][: len(layer.inputs)]
    shapes = [(shape[0] * batch, *shape[1:]) for shape in shapes]
    single = _single(graph, layer, shapes)
    generator = np.random.default_rng(0)
    values = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    calibration = Calibration({}, {}, (), 1, "minmax")
    clamped = any(graph.nodes[i].op_type in ("Relu", "Clip") for i in layer.absorbed)
    ends = [*((tensor, -4.0) for tensor in layer.inputs), (layer.output, 0.0 if clamped else -4.0)]
    for tensor, low in ends:
        histogram = Histogram()
        histogram.add(np.array([low, 4.0]))
        calibration.histograms[tensor] = histogram
    candidate = Candidate({layer.name: _choice(layer, name)})
    artifact = compress(single, candidate, calibration, Bank(single), "onnxruntime")
    runs = int(np.clip(2e9 / max(1, layer.macs * batch), 15, 100))
    times = kernel_times(artifact.model, values, threads=threads, runs=runs)
    return sum(t for key, t in times.items() if key.split("/")[0] not in _CONVERSIONS)


def _single(graph: Graph, layer: Layer, shapes: Sequence[tuple[int, ...]]) -> Graph:
    """A graph of one layer and what it absorbs, on inputs of ``shapes``."""
    inputs: list[onnx.ValueInfoProto] = []
    for name, shape in zip(layer.inputs, shapes, strict=True):
        fixed = 1 if layer.kind in ("Conv", "ConvTranspose") else len(shape) - 1
        free = [f"d{i}" if i < fixed else n for i, n in enumerate(shape)]  # as in the network
        if layer.kind == PRODUCT:
            free = [f"{len(inputs)}d{i}" for i in range(len(shape))]
        inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, free))
    indices = (layer.node, *layer.absorbed)
    nodes = [graph.nodes[i] for i in indices]
    names = {n for node in nodes for n in node.input if n in graph.initializers}
    initializers = [numpy_helper.from_array(graph.array(n), n) for n in sorted(names)]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "layer",
            inputs,
            [helper.make_tensor_value_info(layer.output, onnx.TensorProto.FLOAT, None)],
            initializers,
        ),
        opset_imports=list(graph.model.opset_import),
        ir_version=IR_VERSION,
    )
    lone = replace(layer, node=0, absorbed=tuple(range(1, len(nodes))))
    tensors = {n: graph.tensors[n] for node in nodes for n in node.output}
    tensors |= {name: graph.tensors[name] for name in layer.inputs}
    return Graph(model, [] if layer.kind == PRODUCT else [lone], tensors)
