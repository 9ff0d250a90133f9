"""Predicted against measured latencies of mixes that no fit has seen.

    AUTOQUANT_DATA=… python benchmarks/latency.py [SETTING …]

A setting is NETWORK:BATCH:THREADS; without any, all of `SETTINGS`, each in a process of its own
and none that the results have already. For each: the device model as a search measures it, and
``MIXES`` mixes of float and int8 of another seed (random, in blocks, alternating) that the fit
has not seen, timed in the same rounds: the mean absolute relative error, the share within 10 %,
and of the pairs that differ by more than 5 % the share in the right order. Nothing else should
run meanwhile. The setting ``resnet20:structures`` is ResNet-20 with random channels pruned, in
float, in int8 and mixed: the fit has seen the network as it is alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from record import RESULTS, record

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.qdq import plan, resolve
from autoquant.cost.table import TableModel, measure_device
from autoquant.runtime import OnnxRuntime, measure
from autoquant.search.dimensions import candidate_of
from autoquant.search.trial import latency_inputs, prepare
from autoquant.space import Space
from autoquant.tasks import load_task

TASKS = Path(__file__).parent / "tasks"
NETWORKS = {
    "resnet20": str(TASKS / "cifar10.py:resnet20"),
    "efficientnet_lite0": str(TASKS / "imagenet.py:efficientnet_lite0"),
    "minilm": str(TASKS / "stsb.py:minilm"),
    "resnet8": str(TASKS / "cifar10.py:resnet8"),
    "mnist": "mnist",
}
SETTINGS = (
    "resnet20:1:1", "resnet20:1:2", "resnet20:8:1", "resnet20:8:2", "efficientnet_lite0:1:1",
    "efficientnet_lite0:1:2", "minilm:1:1", "minilm:1:2", "resnet8:1:1", "resnet8:1:2",
    "mnist:1:1", "resnet20:structures",
)  # fmt: skip
MIXES, STRUCTURES = 44, 24


def structures() -> dict[str, Any]:
    """Pruned networks: predicted and measured."""
    space = Space.model_validate(
        {
            "rules": [{"weight_bits": 8, "activation_bits": 8, "float": True}],
            "pruning": [{"ratios": [0, 0.125, 0.25, 0.375, 0.5, 0.625]}],
            "importance": ["activation"],
        }
    )
    context = prepare(load_task(NETWORKS["resnet20"]), space=space)
    model, generator = context.cost.latency, np.random.default_rng(1)
    assert isinstance(model, TableModel)
    runtime, sessions, guess = OnnxRuntime(), {}, []
    for index in range(STRUCTURES):
        picks: dict[str, Any] = {
            n: options[generator.integers(len(options))] for n, options in context.options.items()
        }
        share = (0.0, 0.5, 1.0)[index % 3]  # of layers in int8
        for name in context.choices:
            low = generator.random() < share
            picks[name] = LayerChoice(8, 8) if low else LayerChoice()
        artifact = context.compress(candidate_of(picks))
        sessions[index] = runtime.open(artifact.model, 1)
        guess.append(float(context.cost_of(artifact).latency_ms or 0.0))
    found = measure(sessions, [context.sample[0][:1]], threads=1, seconds=1.0, min_rounds=20)
    actual = np.array([found[i].latency_ms for i in range(STRUCTURES)])
    return {
        **judged(np.array(guess), actual),
        "error_that_the_model_states": round(model.error, 4),
        "profile_seconds": round(model.seconds, 1),
    }


def judged(guess: np.ndarray, actual: np.ndarray) -> dict[str, Any]:
    """How far predictions are off, and whether they are in order."""
    error = guess / actual - 1
    first, second = np.triu_indices(len(actual), 1)
    apart = np.abs(np.log(actual[first] / actual[second])) > np.log(1.05)
    right = (guess[first] > guess[second]) == (actual[first] > actual[second])
    return {
        "mixes": len(actual),
        "mape": round(float(np.abs(error).mean()), 4),
        "bias": round(float(error.mean()), 4),
        "worst": round(float(error[np.abs(error).argmax()]), 4),
        "within_10_percent": int((np.abs(error) <= 0.1).sum()),
        "pairs": int(apart.sum()),
        "pairs_in_order": int(right[apart].sum()),
        "measured_ms": [round(float(x), 4) for x in actual],
        "predicted_ms": [round(float(x), 4) for x in guess],
    }


def evaluate(setting: str) -> dict[str, Any]:
    """All figures of one setting."""
    if setting.endswith(":structures"):
        return structures()
    name, batch, threads = setting.split(":")
    task = load_task(NETWORKS[name])
    context = prepare(task, space="int8", latency=False)
    graph, dialect = context.graph, context.hardware.dialect
    inputs = latency_inputs(task, graph, int(batch))
    if name == "minilm":  # 128 tokens
        inputs = [np.ones((len(x), 128), x.dtype) for x in inputs]
    model = measure_device(
        graph,
        context.calibration,
        context.bank,
        inputs,
        dialect=dialect,
        threads=int(threads),
        # The fit has some, and some are drawn twice.
        held_out=MIXES + 20 if len(graph.layers) > 15 else MIXES * 4,
    )
    guess, actual = np.array(model.checks[:MIXES]).T
    eight = resolve(graph, Candidate({x.name: LayerChoice(8, 8) for x in graph.layers[::2]}))
    clock = time.perf_counter()
    for _ in range(20):
        model.latency_ms(graph, eight, plan(graph, eight, dialect))
    each = (time.perf_counter() - clock) / 20
    return {
        **judged(guess, actual),
        "fitted_on": model.mixes,
        "error_that_the_model_states": round(model.error, 4),
        "profile_seconds": round(model.seconds, 1),
        "prediction_ms": round(each * 1e3, 3),
        "layers": len(graph.layers),
        "coefficients": {n: round(c, 5) for n, c in model.coefficients.items()},
    }


def main() -> None:
    path = RESULTS / "latency.json"
    asked = sys.argv[1:]
    if asked:
        for setting in asked:
            known = json.loads(path.read_text()).get("settings", {}) if path.is_file() else {}
            found = evaluate(setting)
            print(setting, {k: v for k, v in found.items() if not isinstance(v, (list, dict))})
            record("latency", {"seed": 1, "settings": {**known, setting: found}})
        return
    known = json.loads(path.read_text())["settings"] if path.is_file() else {}
    for setting in SETTINGS:
        if setting not in known:
            subprocess.run([sys.executable, __file__, setting], check=True)


if __name__ == "__main__":
    main()
