"""Latency from kernels measured in isolation, and coefficients fitted on mixes of the network.

``t = Σ a(precision)·kernel + conversions + operators between the layers + d``: kernel times come
from one-layer models. Conversions count by direction, each and by element; operators between
the layers by element, in int8 and in float. The coefficients (none negative) are fitted on
measured mixes of the same network, and drawn to what is usual where those say nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autoquant.cache import cache_folder
from autoquant.calibration import Calibration, Histogram
from autoquant.candidate import FLOAT, NBITS, Candidate, LayerChoice
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.qdq import Plan, mode, nbits_mode, plan, resolve
from autoquant.errors import HardwareError
from autoquant.graph import IR_VERSION, PRODUCT, Graph, Layer, attributes
from autoquant.hardware import LatencyModel
from autoquant.runtime import RUNTIMES, Runtime, describe, measure
from autoquant.task import Array

INT8 = LayerChoice(8, 8)
_CONVERSIONS = (
    *("QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"),
    *("Subgraph", "Reorder", "FakeQuantize", "Convert"),  # as OpenVINO names them
)
_NBITS = [
    LayerChoice(weight, activation, f"block{block}", dynamic=activation == 8, nbits=True)
    for weight in NBITS
    for block in (32, 64, 128)
    for activation in (32, 8)
]
PRECISIONS = {"float": FLOAT, "int8": INT8, "dynamic": LayerChoice(8, 8, dynamic=True)}
PRECISIONS |= {nbits_mode(choice): choice for choice in _NBITS}
_DENSE = ("Gemm", "MatMul")
HELD_OUT = 8  # mixes that tell the error
_ROUNDS = 4  # of which the fastest tells a kernel's time


@dataclass(frozen=True, slots=True)
class TableModel:
    """Kernel times by layer signature and precision, and the coefficients around them.

    ``error``: mean absolute relative error on measured mixes that the fit on ``mixes`` others
    has not seen; ``checks``: those, (predicted, measured) ms. ``seconds``: what measuring took,
    0 where the model was read. ``runtime``: of `RUNTIMES`, what it was measured with.
    """

    kernel_ms: Mapping[str, float]
    coefficients: Mapping[str, float]
    error: float
    mixes: int
    batch: int
    threads: int
    seconds: float = field(default=0.0, compare=False)
    checks: tuple[tuple[float, float], ...] = field(default=(), compare=False)
    spread: float | None = field(default=None, compare=False)
    runtime: str = "onnxruntime"

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
        coefficient = self.coefficients.get(_kernel_feature(layer, name), 1.0)
        return coefficient * self.kernel_ms[signature(graph, layer, name)]

    def timed(
        self, graphs: Sequence[Graph], known: Graph, precisions: Sequence[str] = ("float", "int8")
    ) -> TableModel:
        """The model with measured times for the kernels of other structures of its network.

        Times only what is neither in the model nor in the cache on disk, in proportion to
        kernels of ``known``, which the model has. Nothing else should run meanwhile: a search
        calls it before its workers start.
        """
        layers = [(g, x) for g in graphs for x in g.layers if x.kind != "Gather"]
        runtime = RUNTIMES[self.runtime]()
        found = _kernel_table(
            layers, known, precisions, self.batch, self.threads, runtime, self.kernel_ms
        )
        return replace(self, kernel_ms={**self.kernel_ms, **found})


def from_profile(model: LatencyModel, batch: int, threads: int) -> TableModel:
    """The model that a profile or a run holds. Raises HardwareError for other settings."""
    if (model.batch, model.threads) != (batch, threads):
        raise HardwareError(
            f"the profile's latencies are for batch {model.batch} and {model.threads} threads, "
            f"not {batch} and {threads}"
        )
    error = float("nan") if model.error is None else model.error
    return TableModel(
        model.kernel_ms,
        model.coefficients,
        error,
        model.mixes,
        batch,
        threads,
        spread=model.spread,
        runtime=model.measured_with,
    )


def to_profile(model: TableModel) -> LatencyModel:
    """The form that profiles and runs store."""
    return LatencyModel(
        cpu=describe()["cpu"],
        runtime=RUNTIMES[model.runtime]().version,
        batch=model.batch,
        threads=model.threads,
        kernel_ms=dict(model.kernel_ms),
        coefficients=dict(model.coefficients),
        error=None if math.isnan(model.error) else model.error,
        mixes=model.mixes,
        spread=model.spread,
        source="measured by autoquant on this machine",
    )


def extended(model: TableModel, graph: Graph, known: Graph) -> TableModel:
    """The model with times for kernels that it has none of, of another structure of ``known``.

    A kernel's time follows from the timed one of the same operator nearest in shape (else of
    its kind, else of any convolution or product), by the ratio of their MACs.
    `TableModel.timed` measures them instead.
    """
    timed: dict[str, list[tuple[str, tuple[int, ...], float]]] = {name: [] for name in PRECISIONS}
    for key, value in model.kernel_ms.items():
        kind, shape, name = _parsed(key)
        timed.setdefault(name, []).append((kind, shape, value))
    found: dict[str, float] = {}
    for layer in (*graph.layers, *graph.products):
        for name in PRECISIONS if layer.kind != "Gather" else ():
            key = signature(graph, layer, name)
            if key in model.kernel_ms or not _has(layer, name):
                continue
            kind, shape, _ = _parsed(key)
            near = [x for x in timed[name] if x[0] == kind and len(x[1]) == len(shape)]
            near = near or [x for x in timed[name] if len(x[1]) == len(shape)] or timed[name]
            if near:
                _, other, value = min(near, key=lambda x: _distance(shape, x[1]))
                found[key] = value * math.prod(shape) / max(1, math.prod(other))
    return replace(model, kernel_ms={**model.kernel_ms, **found})


def _parsed(key: str) -> tuple[str, tuple[int, ...], str]:
    """Of a signature: operator with attributes; the factors of its MACs, input positions and
    the weight's shape; precision."""
    start, _, rest = key.partition(" [")
    read, _, rest = rest.partition("] [")
    weight, _, rest = rest.partition("] ")
    about, _, name = rest.rpartition(" ")
    inputs = [int(n) for n in read.split(", ") if n]
    sizes = [int(n) for n in weight.split(", ") if n]
    convolution = len(inputs) == len(sizes) > 2
    positions = math.prod(inputs[2:] if convolution else inputs[:-1])
    single = sizes[1:2] == [1] and convolution  # depthwise
    kind = start.partition("+")[0]
    return f"{kind} {single} {re.sub(_GROUP, '', about)}", (positions, *sizes), name


_GROUP = re.compile(r'"group": \d+')


def _distance(first: Sequence[int], second: Sequence[int]) -> float:
    """Between two shapes of one rank: the sum of the factors between their sizes, in log."""
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(first, second, strict=False))


def signature(graph: Graph, layer: Layer, precision: str) -> str:
    """What a kernel's time depends on: operator, attributes, shapes, what is fused, precision."""
    known = _SIGNATURES.setdefault(graph, {})
    if layer.name not in known:
        known[layer.name] = _signature(graph, layer)
    return f"{known[layer.name]} {precision}"


_SIGNATURES: WeakKeyDictionary[Graph, dict[str, str]] = WeakKeyDictionary()


def _signature(graph: Graph, layer: Layer) -> str:
    node = graph.nodes[layer.node]
    found = {k: v for k, v in attributes(node).items() if k != "auto_pad"}
    after = "+".join(graph.nodes[i].op_type for i in layer.absorbed)
    return (
        f"{layer.kind}{'+' + after if after else ''} {list(layer.input_shape)} "
        f"{list(layer.weight_shape)} {json.dumps(found, sort_keys=True, default=str)}"
    )


def precision(mode: str) -> str:
    """The kernel that runs a mode of `Plan.modes`: weight-only layers run in float."""
    return mode if mode in PRECISIONS else "float"


def _kernel_feature(layer: Layer, name: str) -> str:
    """The coefficient of a layer's kernel: depthwise ones wait for memory more than others."""
    alone = layer.kind == "Conv" and layer.group > 1 and layer.weight_shape[1] == 1
    return f"{name} depthwise" if alone else name


def _features(graph: Graph, plan: Plan, kernel_ms: Mapping[str, float]) -> dict[str, float]:
    """Kernel ms by precision, conversions by direction (each, and millions of elements),
    millions of elements that operators between the layers write, and one.

    Float products that were not timed are part of the constant.
    """
    found: dict[str, float] = {}
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
        feature = _kernel_feature(layer, name)
        found[feature] = found.get(feature, 0.0) + kernel_ms[key]
    for name, elements in zip(("to_int8", "to_float"), plan.conversions(graph), strict=True):
        found |= {name: sum(elements) / 1e6, f"{name} each": float(len(elements))}
    int8 = others = 0
    for index, written in _between(graph):
        int8 += written if index in plan.int8_nodes else 0
        others += 0 if index in plan.int8_nodes else written
    return {**found, "int8 between": int8 / 1e6, "float between": others / 1e6, "constant": 1.0}


def _between(graph: Graph) -> list[tuple[int, int]]:
    """(node, float elements that it writes) of every operator that belongs to no layer."""
    if graph not in _BETWEEN:
        layers = (*graph.layers, *graph.products)
        owned = {i for x in layers for i in (x.node, *x.absorbed)}
        _BETWEEN[graph] = [
            (index, sum(graph.tensors[n].elements for n in node.output if n in graph.tensors))
            for index, node in enumerate(graph.nodes)
            if index not in owned
            and any(n in graph.tensors and graph.tensors[n].dtype == "float32" for n in node.output)
        ]
    return _BETWEEN[graph]


_BETWEEN: WeakKeyDictionary[Graph, list[tuple[int, int]]] = WeakKeyDictionary()


def measure_device(
    graph: Graph,
    calibration: Calibration,
    bank: Bank,
    inputs: Sequence[Array],
    *,
    dialect: str,
    runtime: str = "onnxruntime",
    precisions: Sequence[str] = ("float", "int8"),
    threads: int = 1,
    seed: int = 0,
    products: bool = False,
    held_out: int = HELD_OUT,
) -> TableModel:
    """Time every distinct kernel of ``graph`` here, and mixes of it: fit the coefficients on
    those but ``held_out``, which tell the error.

    All mixes are timed in the same rounds, since a machine's speed drifts. ``inputs``: one batch
    at the size that the latency is for. ``products``: the products of activations can be int8
    too. Kernel times are cached on disk
    by CPU, runtime version, threads and batch.
    """
    start = time.perf_counter()
    batch = int(inputs[0].shape[0])
    timed = [x for x in graph.layers if x.kind != "Gather"]
    timed += graph.products if products else ()
    there = RUNTIMES[runtime]()
    kernel_ms = _kernel_table([(graph, x) for x in timed], graph, precisions, batch, threads, there)
    lower = [p for p in precisions if p != "float"]
    mixes = _mixes(timed, lower, seed)
    unseen = [x for x in _held_out(timed, lower, held_out, seed + 1) if x not in mixes]
    features, sessions = [], {}
    for index, mix in enumerate((*mixes, *unseen)):
        where = plan(graph, resolve(graph, mix), dialect)
        features.append(_features(graph, where, kernel_ms))
        artifact = compress(graph, mix, calibration, bank, dialect)
        sessions[index] = there.open(artifact.model, threads, inputs)
    found = measure(
        sessions,
        inputs,
        threads=threads,
        runtime=runtime,
        seconds=0.6,
        min_rounds=20,
        max_rounds=200,
    )
    times = np.array([found[i].latency_ms for i in range(len(features))])
    names = sorted({name for f in features for name in f if f[name]})
    matrix = np.array([[f.get(name, 0.0) for name in names] for f in features])
    count = len(mixes)
    coefficients = _fit(matrix[:count], times[:count], names)
    checks = np.column_stack([matrix @ coefficients, times])[count:]
    errors = np.abs(checks[:, 0] / checks[:, 1] - 1)
    return TableModel(
        kernel_ms=kernel_ms,
        coefficients={n: float(c) for n, c in zip(names, coefficients, strict=True)},
        error=float(np.mean(errors)) if len(errors) else float("nan"),
        mixes=count,
        batch=batch,
        threads=threads,
        seconds=time.perf_counter() - start,
        spread=float(np.median([x.latency_spread_ms / x.latency_ms for x in found.values()])),
        checks=tuple((float(guess), float(actual)) for guess, actual in checks),
        runtime=runtime,
    )


_NOISE = 0.01  # relative, of a measured mix
# feature → what its coefficient usually is (ms), and how far off that may be, relatively
_USUAL = {
    "to_int8": (0.3, 1.0),
    "to_float": (0.3, 1.0),
    "to_int8 each": (0.002, 2.0),
    "to_float each": (0.002, 2.0),
    "int8 between": (0.15, 2.0),
    "float between": (0.3, 2.0),
    "constant": (0.01, 5.0),
}


def _fit(matrix: Array, times: Array, names: Sequence[str]) -> Array:
    """Coefficients, none negative, of least relative errors, drawn to the usual ones; mixes far
    off are given little weight (Huber 1964).
    """
    from scipy.optimize import nnls

    usual = np.array([_USUAL.get(name, (1.0, 0.3)) for name in names])
    relative = matrix / times[:, None] * usual[:, 0]  # in units of the usual coefficients
    pull = np.diag(_NOISE / usual[:, 1])
    weight = np.ones(len(times))
    solution = np.ones(len(names))
    for _ in range(4):
        rows = np.vstack([relative * weight[:, None], pull])
        solution, _ = nnls(rows, np.concatenate([weight, pull.diagonal()]))
        off = np.abs(relative @ solution - 1)
        bound = 2.0 * max(1.48 * float(np.median(off)), _NOISE / 4)
        weight = np.sqrt(np.minimum(1.0, bound / np.maximum(off, 1e-12)))
    return np.asarray(solution * usual[:, 0])


def _has(layer: Layer, name: str) -> bool:
    """Whether a layer can run at a precision."""
    if layer.kind == PRODUCT:
        return name in ("float", "int8")
    return name in ("float", "int8") or layer.kind in _DENSE


def _mixes(timed: Sequence[Layer], precisions: Sequence[str], seed: int) -> list[Candidate]:
    """Ends, blocks, alternations, each depthwise or not, and random mixes: what identifies the
    coefficients. A precision after the first has fewer."""
    count = len(timed)
    generator = np.random.default_rng(seed)
    index = np.arange(count)
    alone = np.array([_kernel_feature(x, "").strip() == "depthwise" for x in timed], bool)
    masks = [np.zeros(count, bool), np.ones(count, bool), index < count // 2, index >= count // 2]
    masks += [index % 2 == 0, index % 2 == 1, index // 4 % 2 == 0, index // 4 % 2 == 1, alone]
    masks += [index // 8 % 2 == 0, ~alone, index < count // 4, index >= count * 3 // 4]
    shares = (0.15, 0.25, 0.35, 0.5, 0.5, 0.65, 0.75, 0.85, 0.95)
    found = []
    for place, name in enumerate(precisions):
        random = [generator.random(count) < share for share in shares[:: 1 + (place > 0)]]
        found += [_mix(timed, mask, [name] * count) for mask in (masks[1:6] if place else masks)]
        found += [_mix(timed, mask, [name] * count) for mask in random]
    return list(dict.fromkeys(found)) or [Candidate()]


def _held_out(
    timed: Sequence[Layer], precisions: Sequence[str], count: int, seed: int
) -> list[Candidate]:
    """Mixes of all ``precisions`` that no fit has seen: random, in blocks, alternating, in turn."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count if precisions else 0):
        share = generator.uniform(0.1, 0.95)
        size = (1, int(generator.integers(2, 9)), 1)[number % 3]
        mask = np.repeat(generator.random(-(-len(timed) // size)) < share, size)[: len(timed)]
        if number % 3 == 2:  # alternating in a part, one way outside
            start, end = sorted(generator.integers(0, len(timed) + 1, 2))
            inside = (np.arange(len(timed)) >= start) & (np.arange(len(timed)) < end)
            period = int(generator.integers(2, 4))
            mask = np.where(inside, np.arange(len(timed)) % period == 0, bool(number % 2))
        names = [precisions[i] for i in generator.integers(0, len(precisions), len(timed))]
        found.append(_mix(timed, mask, names))
    return list(dict.fromkeys(found))


def _mix(timed: Sequence[Layer], mask: Array, names: Sequence[str]) -> Candidate:
    """Float, but for the layers of ``mask`` that have the precision named for them."""
    return Candidate(
        {
            layer.name: _choice(layer, name)
            for layer, on, name in zip(timed, mask, names, strict=True)
            if on and _has(layer, name)
        }
    )


def _choice(layer: Layer, name: str) -> LayerChoice:
    choice = PRECISIONS[name]
    return replace(choice, weight_bits=32) if layer.kind == PRODUCT else choice


def _kernel_table(
    timed: Sequence[tuple[Graph, Layer]],
    anchors: Graph,
    precisions: Sequence[str],
    batch: int,
    threads: int,
    runtime: Runtime,
    given: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Signature → ms of every kernel; those ``given`` stay as they are.

    A machine's speed drifts, and a sum of kernels needs them in proportion: what is new is
    multiplied by what the known kernels of ``anchors`` took before over what they take now.
    """
    about = {**describe(), "runtime": runtime.version, "batch": batch, "threads": threads}
    digest = hashlib.sha256(json.dumps([about, _ROUNDS], sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"kernels-{digest[:12]}.json"
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        known = {str(key): float(value) for key, value in read.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or damaged
        known = {}
    known = {**known, **(given or {})}
    wanted: dict[str, tuple[Graph, Layer, str]] = {}
    for graph, layer in timed:
        for name in {"float", *precisions}:
            if _has(layer, name):
                wanted.setdefault(signature(graph, layer, name), (graph, layer, name))
    fresh = {key: place for key, place in wanted.items() if key not in known}
    if fresh:
        again = _anchors(anchors, {name for *_, name in fresh.values()}, known)
        kernels = {key: _kernel(*place, batch) for key, place in {**fresh, **again}.items()}
        found = dict.fromkeys(kernels, math.inf)
        for _ in range(_ROUNDS):  # one after the other: what else a machine does comes in bursts
            for key, kernel in kernels.items():
                found[key] = min(found[key], _kernel_time(kernel, threads, runtime))
        for key, (*_, name) in fresh.items():
            ratios = [known[k] / max(found[k], 1e-9) for k, (*_, n) in again.items() if n == name]
            drift = float(np.clip(np.median(ratios), 0.5, 2.0)) if ratios else 1.0
            known[key] = drift * found[key]
        _write(path, known)
    return {key: known[key] for key in wanted}


def _anchors(
    graph: Graph, precisions: Collection[str], known: Mapping[str, float]
) -> dict[str, tuple[Graph, Layer, str]]:
    """A few known kernels of a graph in each precision, short and long ones."""
    found = {}
    for name in precisions:
        layers = {signature(graph, x, name): x for x in graph.layers if x.kind != "Gather"}
        able = sorted(layers.keys() & known.keys(), key=known.__getitem__)
        for share in (0.3, 0.6, 0.9) if able else ():
            key = able[round(share * (len(able) - 1))]
            found[key] = (graph, layers[key], name)
    return found


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


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A layer at one precision as a model of its own, and how often a round runs it."""

    model: bytes
    shapes: Sequence[tuple[int, ...]]
    runs: int


def _kernel(graph: Graph, layer: Layer, name: str, batch: int) -> _Kernel:
    shapes = [layer.input_shape, layer.weight_shape][: len(layer.inputs)]
    shapes = [(shape[0] * batch, *shape[1:]) for shape in shapes]
    single = _single(graph, layer, shapes)
    calibration = Calibration({}, {}, (), 1, "minmax")
    clamped = any(graph.nodes[i].op_type in ("Relu", "Clip") for i in layer.absorbed)
    ends = [*((tensor, -4.0) for tensor in layer.inputs), (layer.output, 0.0 if clamped else -4.0)]
    for tensor, low in ends:
        histogram = Histogram()
        histogram.add(np.array([low, 4.0]))
        calibration.histograms[tensor] = histogram
    candidate = Candidate({layer.name: _choice(layer, name)})
    artifact = compress(single, candidate, calibration, Bank(single), "onnxruntime")
    return _Kernel(artifact.model, shapes, int(np.clip(2e9 / max(1, layer.macs * batch), 15, 500)))


def _kernel_time(kernel: _Kernel, threads: int, runtime: Runtime) -> float:
    """Milliseconds of one round, conversions around the layer left out."""
    generator = np.random.default_rng(0)
    values = [generator.normal(size=shape).astype(np.float32) for shape in kernel.shapes]
    runs = kernel.runs // _ROUNDS if threads == 1 else kernel.runs  # a session's threads may
    times = runtime.kernel_times(kernel.model, values, threads, runs)  # share a core for good
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
