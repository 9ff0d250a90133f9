"""ResNet-8 and ResNet-20 on CIFAR-10: the figures that the README claims, where the data is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from autoquant.calibration import calibrate
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.channels import Channels
from autoquant.compress.factorize import can_factorize, full_rank, is_pointwise
from autoquant.compress.lower import lower
from autoquant.compress.prune import Evidence
from autoquant.compress.structure import droppable, structured
from autoquant.runtime import OnnxRuntime
from autoquant.task import Split
from autoquant.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("AUTOQUANT_DATA") or ROOT.parent / "shared" / "data")

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / "cifar10" / "test.npz").is_file(),
        reason="no real networks and data; set AUTOQUANT_DATA",
    ),
]

BARS = {"resnet8": (0.8719, 0.005), "resnet20": (0.9173, 0.003)}  # float on all 10,000, drop


@pytest.fixture(scope="module")
def networks() -> Iterator[ModuleType]:
    """benchmarks/networks.py, which measures what is asserted here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import networks

        yield networks
    for name in ("networks", "record"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module", params=sorted(BARS))
def measured(
    request: pytest.FixtureRequest, networks: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """A network's name and all its figures."""
    name = request.param
    found: dict[str, Any] = networks.measure(name, tmp_path_factory.mktemp(name))
    return name, found


def test_the_float_network_has_its_published_accuracy(
    measured: tuple[str, dict[str, Any]],
) -> None:
    name, found = measured
    assert found["samples"] == (2000, 8000)
    assert found["float_both"] == pytest.approx(BARS[name][0], abs=5e-5)


def test_8_bits_lose_next_to_nothing(measured: tuple[str, dict[str, Any]]) -> None:
    name, found = measured
    assert found["int8_drop"] <= BARS[name][1]
    assert 0 < found["int8_drop_standard_error"] < 0.003


@pytest.mark.parametrize("mix", ["uniform", "every_second"])
def test_int8_layers_run_in_int8_and_float_layers_do_not(
    measured: tuple[str, dict[str, Any]], mix: str
) -> None:
    kernels = measured[1][f"kernels_{mix}"]
    for wanted, ran in kernels.values():
        assert wanted == ran
    assert kernels["int8_convolutions"][0] > 3


def test_files_shrink_with_their_bits(measured: tuple[str, dict[str, Any]]) -> None:
    found = measured[1]
    sizes = [found["size_bytes"][bits] for bits in (2, 3, 4, 8, "float")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    assert found["size_prediction_worst"] < 0.01


@pytest.mark.parametrize(
    "spec", ["cifar10.py:resnet8", "imagenet.py:efficientnet_lite0", "stsb.py:minilm"]
)
def test_every_structure_runs(spec: str) -> None:
    """Pruning (heads and hidden widths, depthwise), low rank, dropped blocks, and all at a time:
    smaller, quantized at 8 bits, of the same output shape, and finite."""
    task = load_task(str(ROOT / "benchmarks" / "tasks" / spec))
    graph = lower(task)
    rows = tuple(tuple(a[:16] for a in batch) for batch in task.split("calibration").batches[:1])
    split = Split("calibration", rows, None, len(rows[0][0]))
    moments = calibrate(graph, split, moments=True).moments
    evidence = Evidence(graph, moments, rows, task.metric == "top1")
    example = [np.asarray(value)[:1] for value in task.example_inputs]
    expected = OnnxRuntime().open(graph.model.SerializeToString()).run(rows[0])[0]
    quarter = dict.fromkeys(Channels(graph).groups, 0.25)
    half = {
        x.name: max(1, full_rank(x) // 2)
        for x in graph.layers
        if can_factorize(x) and "0" in x.name
    }
    kernels = [n for n in half if not is_pointwise(graph.by_name[n])][:2]
    last = tuple(droppable(graph))[-1:]
    found = [
        Candidate(pruning=quarter, importance="taylor"),
        Candidate(rank=half),
        Candidate(rank=dict(zip(kernels, ("cp:4", "separable"), strict=False))),
        Candidate(drop=last),
        Candidate(pruning=quarter, rank=half, drop=last),
    ]
    for candidate in (c for c in found if c.is_structural):
        made = structured(graph, candidate, evidence, example)
        assert made.graph.macs < graph.macs
        uniform = dict.fromkeys((x.name for x in graph.layers), LayerChoice(8, 8))
        choices = made.choices(replace(candidate, layers=uniform))
        calibration = calibrate(made.graph, split)
        artifact = compress(made.graph, choices, calibration, Bank(made.graph), "onnxruntime")
        outputs = OnnxRuntime().open(artifact.model).run(rows[0])[0]
        assert outputs.shape == expected.shape and np.isfinite(outputs).all()
