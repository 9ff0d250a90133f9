"""A small task that a search finishes in a second: network, data, space, profile, task file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import Weights, build, node, run

from autoquant.candidate import Candidate, LayerChoice
from autoquant.cost.table import signature
from autoquant.front import Member
from autoquant.graph import Graph
from autoquant.hardware import Hardware
from autoquant.result import Cost, Score
from autoquant.search import SearchSettings
from autoquant.search.trial import Context, Limits, prepare
from autoquant.space import Space
from autoquant.task import Array, Task

LAYERS = ("first", "second", "head")
SPACE = Space.model_validate(
    {"name": "small", "rules": [{"weight_bits": [2, 4, 8], "activation_bits": 8, "float": True}]}
)
TWO = Space.model_validate(
    {"name": "two", "rules": [{"weight_bits": [4, 8], "activation_bits": 8}]}
)  # 2³ candidates of three layers
Batches = list[tuple[Array, Array]]


@functools.cache
def model() -> onnx.ModelProto:
    """Two convolutions with Relu, a mean, a Gemm of four classes."""
    w = Weights(11)
    return build(
        [
            node("Conv", ["x", "first.weight", "first.bias"], ["c1"], pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"]),
            node("Conv", ["r1", "second.weight", "second.bias"], ["c2"], strides=[2, 2]),
            node("Relu", ["c2"], ["r2"]),
            node("GlobalAveragePool", ["r2"], ["g"]),
            node("Flatten", ["g"], ["f"]),
            node("Gemm", ["f", "head.weight", "head.bias"], ["y"], transB=1),
        ],
        {
            "first.weight": w(6, 2, 3, 3),
            "first.bias": w.bias(6),
            "second.weight": w(8, 6, 3, 3),
            "second.bias": w.bias(8),
            "head.weight": w(4, 8),
            "head.bias": np.float32([0.22, 2.61, -0.99, 0.21]),
        },
        {"x": ["N", 2, 8, 8]},
        ["y"],
    )


@functools.cache
def batches(seed: int, count: int = 96) -> Batches:
    """Random images; the labels are those of the float network, but for one in eight."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.2, 2, (count, 2, 1, 1))
    images = (generator.normal(size=(count, 2, 8, 8)) * scale).astype(np.float32)
    labels = run(model(), images)[0].argmax(1)
    labels[::8] = (labels[::8] + 1) % 4
    return [(images[i : i + 32], labels[i : i + 32]) for i in range(0, count, 32)]


def task(folder: Path, **changes: Any) -> Task:
    """The task; ``changes`` replace its fields."""
    path = folder / "small.onnx"
    if not path.is_file():
        onnx.save(model(), str(path))
    fields: dict[str, Any] = {
        "name": "small",
        "model": path,
        "example_inputs": (np.zeros((1, 2, 8, 8), np.float32),),
        "calibration": [x for x, _ in batches(1)],
        "validation": batches(2),
        "test": batches(3),
    }
    return Task(**{**fields, **changes})


TASK_FILE = """
from pathlib import Path

import numpy as np

from autoquant import Task


def task():
    folder = Path(__file__).parent
    data = np.load(folder / "small.npz")
    return Task(
        name="small",
        model=folder / "small.onnx",
        example_inputs=(np.zeros((1, 2, 8, 8), np.float32),),
        calibration=[data["x1"]],
        validation=[(data["x2"], data["y2"])],
        test=[(data["x3"], data["y3"])],
    )
"""


def write_task_file(folder: Path, more: str = "") -> str:
    """Network, data and ``task.py`` in ``folder``; the task as the command line names it."""
    task(folder)
    arrays = {}
    for seed in (1, 2, 3):
        for name, parts in zip("xy", zip(*batches(seed), strict=True), strict=True):
            arrays[f"{name}{seed}"] = np.concatenate(parts)
    np.savez(folder / "small.npz", allow_pickle=False, **arrays)
    (folder / "task.py").write_text(TASK_FILE + more, encoding="utf-8")
    return f"{folder / 'task.py'}:task"


@functools.cache
def graph() -> Graph:
    return Graph.read(model(), [np.zeros((1, 2, 8, 8), np.float32)])


@functools.cache
def profile() -> Hardware:
    """A device whose latencies are known: half a microsecond a thousand MACs in int8."""
    found = {}
    for layer in graph().layers:
        for precision, rate in (("float", 1.0), ("int8", 0.5)):
            found[signature(graph(), layer, precision)] = rate * layer.macs / 1e6
    kernel = {"weight_bits": 8, "activation_bits": 8, "source": "made up for a test"}
    return Hardware.model_validate(
        {
            "name": "made-up",
            "kernels": [kernel],
            "model": {
                "cpu": "none",
                "runtime": "onnxruntime 0",
                "batch": 1,
                "threads": 1,
                "kernel_ms": found,
                "coefficients": {"float": 1.0, "int8": 1.0, "to_int8": 0.5, "to_float": 0.5},
                "error": 0.01,
                "mixes": 8,
                "source": "made up for a test",
            },
        }
    )


def settings(folder: Path, **changes: Any) -> SearchSettings:
    """Eight trials in ``folder/runs``, on the device whose latencies are known."""
    fields: dict[str, Any] = {
        "space": SPACE,
        "hardware": profile(),
        "trials": 8,
        "name": "one",
        "runs_dir": folder / "runs",
    }
    return SearchSettings(**{**fields, **changes})


def context(
    folder: Path, space: Space = SPACE, limits: Limits | None = None, **changes: Any
) -> Context:
    """What the trials of a search of this task need."""
    return prepare(task(folder, **changes), space=space, hardware=profile(), limits=limits)


def uniform(*bits: int) -> Candidate:
    """One width a layer, or one for all, with 8-bit activations; 32 is float."""
    widths = bits * len(LAYERS) if len(bits) == 1 else bits
    return Candidate(
        {
            name: LayerChoice(width, 32 if width == 32 else 8)
            for name, width in zip(LAYERS, widths, strict=True)
        }
    )


def member(
    trial: int,
    accuracy: float,
    size: int,
    latency: float = 1.0,
    verified: dict[str, Any] | None = None,
    metric: str = "top1",
    candidate: Candidate | None = None,
) -> Member:
    """A member that no search has made; float's accuracy is 0.9."""
    score = Score(metric, accuracy, 0.01, 0.9 - accuracy, 0.005, 500, "validation")
    cost = Cost(latency, size, size // 2, 4.5, 10_000, 640_000, 4096)
    found = candidate or uniform(4 if trial % 2 else 8)
    return Member(trial, found, score, cost, verified, f"artifacts/{trial}.onnx")
