"""A search for OpenVINO on this machine, beside float, uniform int8 and NNCF's int8 model.

    AUTOQUANT_DATA=… python benchmarks/openvino_cpu.py [--network resnet20] [--environments DIR]

DIR/nncf is the environment of `benchmarks/peers.py --setup DIR`; without it NNCF's row is left
out, and what it made is kept in DIR. The front of each profile (`openvino-cpu`,
`openvino-cpu-bf16`) is searched and verified by `autoquant.search`; then float, all layers at 8/8,
NNCF's model (its defaults, the same calibration inputs one at a time) and the members are timed
side by side in one process, batch 1, one thread, and scored on the test split, each in the runtime
that it is for. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "tasks"))

from peers import Network, run_job
from record import RESULTS, record

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.qdq import INT8_KINDS
from autoquant.hardware import load_hardware
from autoquant.runtime import RUNTIMES, measure
from autoquant.search import SearchSettings, search
from autoquant.search.trial import latency_inputs, prepare

PROFILES = ("openvino-cpu", "openvino-cpu-bf16")
WITHIN = 0.01  # of float's accuracy: what may be given up for the fastest member


def evaluate(
    name: str, trials: int, environments: Path | None, profiles: Sequence[str]
) -> dict[str, Any]:
    """All figures of one network."""
    network = Network(name)
    inputs = latency_inputs(network.task, network.graph, 1)
    sessions: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}

    def add(label: str, runtime: str, model: bytes | str, **found: Any) -> None:
        there = RUNTIMES[runtime]()
        score = network.test.score(there.open(model))
        rows[label] = {
            "runtime": runtime,
            "test": round(score.value, 5),
            "drop": round(score.drop, 5),
            "drop_standard_error": round(score.drop_standard_error, 5),
            **found,
        }
        sessions[label] = there.open(model, 1, inputs)

    add("float", "openvino", network.float_model)
    add("float, bf16", "openvino-bf16", network.float_model)
    with tempfile.TemporaryDirectory() as folder:
        if environments is not None:
            data = network.write(environments / "data" / name)
            job = {
                "model": str(data / "float.onnx"),
                "data": str(data),
                "backend": "openvino",
                "transformer": False,
            }
            place = environments / "made" / name
            made = run_job(environments / "nncf" / "bin" / "python", "nncf_run.py", place, job)
            size = sum((place / x).stat().st_size for x in ("model.xml", "model.bin"))
            add(
                f"NNCF {made['tool_version']}",
                "openvino",
                str(place / "model.xml"),
                size_bytes=size,
            )
        searches = {}
        for profile in profiles:
            start = time.perf_counter()
            settings = SearchSettings(
                space="int8",
                hardware=profile,
                objectives=("accuracy", "latency_ms"),
                trials=trials,
                name=profile,
                runs_dir=folder,
            )
            front = search(network.task, settings)
            runtime = load_hardware(profile).runtime
            assert front.folder is not None
            model = json.loads((front.folder / "latency.json").read_text())
            searches[profile] = {
                "trials": front.trials,
                "seconds": round(time.perf_counter() - start, 1),
                "latency_model_error": round(model["error"], 4),
                "float_accuracy_validation": front.baseline["accuracy"],
                "members": len(front.members),
            }
            for member in front.members:
                verified = member.verified or {}
                add(
                    f"{profile}, trial {member.trial}",
                    runtime,
                    (front.folder / str(member.artifact)).read_bytes(),
                    validation=round(member.searched.value, 5),
                    int8_layers=sum(c.weight_bits == 8 for c in member.candidate.layers.values()),
                    size_bytes=member.predicted.size_bytes,
                    predicted_ms=round(float(member.predicted.latency_ms or 0), 4),
                    verified_ms=round(float(verified["latency_ms"]), 4),
                )
        layers = [x.name for x in network.graph.layers if x.kind in INT8_KINDS]
        int8 = Candidate(dict.fromkeys(layers, LayerChoice(8, 8)))
        context = prepare(network.task, space=int8, hardware=PROFILES[0], latency=False)
        model = context.compress(int8).model
        add("all layers 8/8", "openvino", model, size_bytes=len(model))
        times = measure(
            sessions, inputs, threads=1, runtime="openvino", seconds=2.0, max_rounds=400
        )
    for label, found in times.items():
        rows[label]["latency_ms"] = round(found.latency_ms, 4)
        rows[label]["latency_median_ms"] = round(found.latency_median_ms, 4)
        rows[label]["latency_spread_ms"] = round(found.latency_spread_ms, 4)
    return {"searches": searches, "rows": rows, "fastest": fastest(rows, profiles)}


def fastest(rows: dict[str, dict[str, Any]], profiles: Sequence[str]) -> dict[str, Any]:
    """For each profile the fastest member within a point of float, chosen on validation, and how
    often as fast the others are (above 1: it is faster)."""
    found = {}
    for profile in profiles:
        members = {k: r for k, r in rows.items() if k.startswith(f"{profile}, ")}
        best = max(r["validation"] for r in members.values())
        good = {k: r for k, r in members.items() if best - r["validation"] <= WITHIN}
        label = min(good, key=lambda k: good[k]["verified_ms"])
        own = rows[label]["latency_ms"]
        errors = [r["predicted_ms"] / r["verified_ms"] - 1 for r in members.values()]
        found[profile] = {
            "member": label,
            "test": rows[label]["test"],
            "drop": rows[label]["drop"],
            "times_as_fast_as": {
                k: round(r["latency_ms"] / own, 3) for k, r in rows.items() if k not in members
            },
            "worst_prediction_error": round(max(errors, key=abs), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=PROFILES)
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    found = evaluate(given.network, given.trials, given.environments, given.profiles)
    for label, row in found["rows"].items():
        print(f"{label:32} {row['latency_ms']:8.4f} ms  test {row['test']:.4f}", flush=True)
    print(json.dumps(found["fastest"], indent=1))
    path = RESULTS / "openvino.json"
    known = json.loads(path.read_text())["networks"] if path.is_file() else {}
    networks = {**known, given.network: found}
    record("openvino", {"seed": 0, "networks": networks}, not given.no_record)


if __name__ == "__main__":
    main()
