"""Predicted against measured latencies of mixes that no fit has seen.

    AUTOQUANT_DATA=… python benchmarks/latency.py [SETTING …]

A setting is NETWORK:BATCH:THREADS; without any, all of `SETTINGS`, each in a process of its own
and none that the results have already. For each: the device model as a search measures it, and
``MIXES`` mixes of float and int8 of another seed (random, in blocks, alternating) that the fit
has not seen, timed in the same rounds: the mean absolute relative error, the share within 10 %,
and of the pairs that differ by more than 5 % the share in the right order. Nothing else should
run meanwhile.
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
from autoquant.cost.table import measure_device
from autoquant.search.trial import latency_inputs, prepare
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
    "mnist:1:1",
)  # fmt: skip
MIXES = 44


def evaluate(setting: str) -> dict[str, Any]:
    """All figures of one setting."""
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
    error = guess / actual - 1
    first, second = np.triu_indices(len(actual), 1)
    apart = np.abs(np.log(actual[first] / actual[second])) > np.log(1.05)
    right = (guess[first] > guess[second]) == (actual[first] > actual[second])
    return {
        "mixes": len(actual),
        "fitted_on": model.mixes,
        "mape": round(float(np.abs(error).mean()), 4),
        "bias": round(float(error.mean()), 4),
        "worst": round(float(error[np.abs(error).argmax()]), 4),
        "within_10_percent": int((np.abs(error) <= 0.1).sum()),
        "pairs": int(apart.sum()),
        "pairs_in_order": int(right[apart].sum()),
        "error_that_the_model_states": round(model.error, 4),
        "profile_seconds": round(model.seconds, 1),
        "prediction_ms": round(each * 1e3, 3),
        "layers": len(graph.layers),
        "measured_ms": [round(float(x), 4) for x in actual],
        "predicted_ms": [round(float(x), 4) for x in guess],
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
