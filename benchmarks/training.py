"""Quantization-aware training and distillation of ResNet-20 on 20,000 training images.

    python benchmarks/training.py [w4a4 w2a8 w3a3] [--steps N]    # 10 to 15 minutes a case
    python benchmarks/training.py ablation [--steps 300]          # what each part adds

Every layer at the given bits, the first and the last at 8/8; the file is scored in onnxruntime on
the test split, beside the float network and beside what training saw (the same images through
the network in torch). Each row keeps its settings; a run of some cases keeps the others' rows.
Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, record

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import compress
from autoquant.compress.lower import lower
from autoquant.compress.qat import Quantized, train
from autoquant.compress.qdq import resolve
from autoquant.runtime import OnnxRuntime
from autoquant.search.trial import Context, evaluator_for, float_model, prepare
from autoquant.training import TrainingSettings

sys.path.insert(0, str(Path(__file__).parent / "tasks"))

BASE = {"batch_size": 64, "learning_rate": 1e-3}
CASES = {  # weight bits, activation bits, steps, bar on the test split
    "w4a4": (4, 4, 2400, 91.0),
    "w2a8": (2, 8, 1600, 90.5),
    "w3a3": (3, 3, 2000, 90.0),
}
ABLATION: dict[str, dict[str, Any]] = {
    "straight-through, labels": {"quantizer": "ste", "teacher": "none"},
    "learned steps, labels": {"teacher": "none"},
    "learned steps, responses": {"alpha": 0.9},
    "learned steps, responses alone": {"alpha": 1.0},
    "learned steps, responses and hints": {"hints": ["layer1.2.conv2", "layer2.2.conv2"]},
    "learned steps, responses and relations": {"relation_weight": 1.0},
    "learned steps, its own average": {"teacher": "self"},
    "learned steps, beside its 8-bit form": {"teacher": "mutual"},
}


def choices(graph: Any, weights: int, activations: int) -> dict[str, LayerChoice]:
    layers = {x.name: LayerChoice(weights, activations) for x in graph.layers}
    for layer in (graph.layers[0], graph.layers[-1]):
        layers[layer.name] = LayerChoice(8, 8)
    return layers


class Bench:
    """One pair of widths: what is prepared once, and rows of scores."""

    def __init__(self, weights: int, activations: int) -> None:
        import cifar10

        self.task = cifar10.resnet20()
        layers = choices(lower(self.task), weights, activations)
        self.candidate = Candidate(layers)
        self.context: Context = prepare(
            self.task, space=self.candidate, latency=False, evaluation_workers=1
        )
        self.test = evaluator_for(self.task, self.context.graph, "test", workers=1)
        session = OnnxRuntime().open(float_model(self.context.original))
        self.float = 100 * self.test.set_reference(session).value

    def untrained(self, polish: bool) -> dict[str, Any]:
        start = time.perf_counter()
        artifact = self.context.compress(replace(self.candidate, polish=polish))
        return self._row(artifact.model, time.perf_counter() - start)

    def trained(self, settings: dict[str, Any]) -> dict[str, Any]:
        c, wanted = self.context, TrainingSettings.from_dict({**BASE, **settings})
        found = resolve(c.graph, replace(self.candidate, training=wanted.to_dict()))
        start = time.perf_counter()
        made = train(c.graph, found, c.calibration, c.bank, "onnxruntime", self.task)
        seconds = time.perf_counter() - start
        artifact = compress(made.graph, found, made.calibration, made.bank, "onnxruntime")
        row = self._row(artifact.model, seconds)
        network = Quantized(made.graph, found, made.calibration, made.bank, "onnxruntime")
        saw = 100 * accuracy(network, self.task.test)
        return {
            **row,
            "what_training_saw": round(saw, 3),
            "difference_points": round(row["test"] - saw, 3),
            "settings": wanted.to_dict(),
            "ms_a_step": round(1000 * seconds / made.history.steps, 1),
        }

    def _row(self, model: bytes, seconds: float) -> dict[str, Any]:
        session = OnnxRuntime().open(model)
        score = self.test.score(session)
        return {
            "float_test": round(self.float, 3),
            "test": round(100 * score.value, 3),
            "drop_points": round(100 * score.drop, 3),
            "drop_standard_error_points": round(100 * score.drop_standard_error, 3),
            "validation": round(100 * self.context.evaluator.score(session).value, 3),
            "size_bytes": len(model),
            "seconds": round(seconds, 1),
        }


def accuracy(network: Quantized, split: Any) -> float:
    """Share of a split that the network in torch has right."""
    import torch

    right = count = 0
    with torch.no_grad():
        for images, labels in split:
            x = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            found = network((x,), ())[0].argmax(1).numpy()
            right, count = right + int((found == labels).sum()), count + len(labels)
    return right / count


def keep(rows: list[dict[str, Any]]) -> None:
    """Write the rows over those of the same name in the record."""
    path = RESULTS / "training.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    fresh = {r["name"] for r in rows}
    kept = [r for r in known if r["name"] not in fresh]
    every = sorted([*kept, *rows], key=lambda r: str(r["name"]))
    record("training", {"network": "resnet20", "seed": 0, "split": "test[2000:]", "rows": every})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[*CASES, "ablation"])
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    for name in options.cases:
        if name in CASES:
            weights, activations, steps, bar = CASES[name]
            bench = Bench(weights, activations)
            before = bench.untrained(False)
            row = bench.trained({"steps": options.steps or steps})
            about = {"name": name, "untrained_test": before["test"], "bar": bar}
            row = {**about, **row, "reached": bool(np.greater_equal(row["test"], bar))}
            print(json.dumps(row), flush=True)
            keep([row])
            continue
        bench = Bench(2, 8)
        steps = options.steps or 300
        rows = [{"name": "ablation w2a8: not trained", **bench.untrained(False)}]
        rows.append({"name": "ablation w2a8: polished, no labels", **bench.untrained(True)})
        keep(rows)
        for label, settings in ABLATION.items():
            row = bench.trained({"steps": steps, **settings})
            rows = [{"name": f"ablation w2a8: {label}", **row}]
            print(json.dumps(rows[0]), flush=True)
            keep(rows)


if __name__ == "__main__":
    main()
