"""A search for latency on EfficientNet-Lite0 (`int8` space) beside onnxruntime's own int8.

    python benchmarks/fastest.py [--trials 20] [--drop 0.01]     # about five minutes on two cores

The search's objectives are accuracy and latency. Of its front, the fastest member that lost no
more than ``--drop`` on validation; of `quantize_static`, the calibration method that is best on
validation. Both, float and all layers at 8/8 are then timed in the same rounds (one sample, one
thread; as every file asks to be opened: ours with the session option of its package, the peer's
with onnxruntime's defaults), and scored on the test split. Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from peers import HERE, Network, onnxruntime_rows, plain_session
from record import record

import autoquant
from autoquant.runtime import OnnxRuntime, measure
from autoquant.search.trial import latency_inputs, score_candidate

TASK = "imagenet.py:efficientnet_lite0"


def main() -> None:
    """The search, the peer, one measurement of all, the bars, the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--drop", type=float, default=0.01)
    options = parser.parse_args()
    network = Network("efficientnet_lite0")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        front = autoquant.search(
            str(HERE / "tasks" / TASK),
            space="int8",
            objectives=["accuracy", "latency_ms"],
            trials=options.trials,
            name="fastest",
            runs_dir=folder,
            tracking=False,
        )
        fitting = [m for m in front.members if m.searched.drop <= options.drop]
        fast = min(fitting, key=lambda m: m.predicted.latency_ms or float("inf"))
        rows = list(onnxruntime_rows(network, folder / "static"))
        peer = max(rows, key=lambda r: r["validation"])
        runtime = OnnxRuntime()
        everywhere = {x.name: autoquant.LayerChoice(8, 8) for x in network.graph.layers}
        uniform = folder / "uniform.onnx"
        candidate = autoquant.Candidate(everywhere)
        score_candidate(network.task, candidate, latency=False).artifact.save(uniform)
        sessions = {
            "float": plain_session(network.float_model),
            "fastest member": runtime.open((folder / "fastest" / str(fast.artifact)).read_bytes()),
            "all layers at 8/8": runtime.open(uniform.read_bytes()),
            f"onnxruntime {peer['setting']}": plain_session(Path(peer["path"])),
        }
        inputs = latency_inputs(network.task, network.graph, 1)
        times = measure(sessions, inputs, threads=1, seconds=10.0, max_rounds=400)
        found: dict[str, Any] = {}
        for name, session in sessions.items():
            score = network.judged(session)
            found[name] = {
                "latency_ms": round(times[name].latency_ms, 4),
                "latency_median_ms": round(times[name].latency_median_ms, 4),
                "test": score["score"],
                "drop_points": score["drop_points"],
                "drop_standard_error_points": score["drop_standard_error_points"],
            }
    ours, theirs = found["fastest member"], found[f"onnxruntime {peer['setting']}"]
    against_peer = theirs["latency_ms"] / ours["latency_ms"]
    against_float = found["float"]["latency_ms"] / ours["latency_ms"]
    missed = []
    if against_peer < 0.97:
        missed.append(f"{against_peer:.3f} times as fast as quantize_static, bar 0.97")
    if ours["test"] < theirs["test"]:
        missed.append(f"test {ours['test']}, quantize_static {theirs['test']}")
    if against_float < 1.8:
        missed.append(f"{against_float:.2f} times as fast as float, bar 1.8")
    figures = {
        "network": network.name,
        "trials": options.trials,
        "seed": 0,
        "trial": fast.trial,
        "searched_drop": fast.searched.drop,
        "predicted_latency_ms": fast.predicted.latency_ms,
        "files": found,
        "times_as_fast_as_quantize_static": round(against_peer, 3),
        "times_as_fast_as_float": round(against_float, 3),
        "missed": missed,
    }
    record("fastest", figures)
    print(figures)


if __name__ == "__main__":
    main()
