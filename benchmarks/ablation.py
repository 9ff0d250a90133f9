"""What each step of post-training quantization is worth: one at a time, on and off.

    python benchmarks/ablation.py [NETWORK …] [--seeds N] [--first 0] [--steps "minmax;smooth .5"]

About ten minutes on two idle cores. Every row changes one step of the default (second-order
rounding with centred moments, bias shift and gain; ``mse`` ranges; no rescaling) and scores the
same uniform candidate on the *validation* split: the drop against float in points, and the error of
the outputs, relative to their variance, which is the finer measure. MiniLM is scored on every third
batch of its split. Rows of networks, seeds and steps that are not measured this time stay in the
record; the summary counts the draws of calibration data (``seeds``). Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
from record import RESULTS, record

from autoquant.calibration import Calibration, Moments, calibrate, channel_peaks
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import bank as bank_module
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.equalize import cross_layer_equalization, smooth, smoothed_tensors
from autoquant.compress.lower import lower
from autoquant.graph import Graph
from autoquant.runtime import OnnxRuntime
from autoquant.search.trial import evaluator_for, float_model

WORKERS = 2
# network: (task, seeds, {label: (weight bits, activation bits, first and last layer at 8/8)})
NETWORKS = {
    "resnet20": (
        ("cifar10", "resnet20"),
        3,
        {"3/8": (3, 8, False), "4/8": (4, 8, False), "4/4, ends 8/8": (4, 4, True)},
    ),
    "resnet8": (("cifar10", "resnet8"), 3, {"4/8": (4, 8, False), "4/4, ends 8/8": (4, 4, True)}),
    "minilm": (("stsb", "minilm"), 2, {"8/8": (8, 8, False), "4/8": (4, 8, False)}),
    "efficientnet_lite0": (
        ("imagenet", "efficientnet_lite0"),
        1,
        {"8/8": (8, 8, False), "4/8": (4, 8, False)},
    ),
}


@contextmanager
def raw_moments() -> Iterator[None]:
    """Second moments in place of covariances."""
    with mock.patch.object(Moments, "centred", lambda self: self.second):
        yield


@contextmanager
def without(gain: bool = False, shift: bool = False) -> Iterator[None]:
    """The bank's corrections, one left out."""
    operand = bank_module._Operand
    spread, moved = bank_module.take_spread_and_mean, operand.shift

    def same_scale(values, scale, *about):
        after, lost = spread(values, scale, *about)
        return scale if gain else after, lost

    def no_shift(self, layer, entry):
        found = moved(self, layer, entry)
        return np.zeros_like(found) if shift else found

    with (
        mock.patch.object(bank_module, "take_spread_and_mean", same_scale),
        mock.patch.object(operand, "shift", no_shift),
    ):
        yield


@contextmanager
def unchanged() -> Iterator[None]:
    """The product's code."""
    yield


@dataclass(frozen=True)
class Step:
    """One way to quantize: the default but for what is given."""

    equalize: bool = False
    smooth: float | None = None
    method: str = "mse"
    rounding: str = "second-order"
    patch: Callable = unchanged


STEPS = {
    "default": Step(),
    "minmax": Step(method="minmax"),
    "percentile": Step(method="percentile"),
    "entropy": Step(method="entropy"),
    "downstream": Step(method="downstream"),
    "equalize": Step(equalize=True),
    "equalize, downstream": Step(equalize=True, method="downstream"),
    "smooth .25": Step(smooth=0.25),
    "smooth .5": Step(smooth=0.5),
    "smooth .75": Step(smooth=0.75),
    "smooth .5, downstream": Step(smooth=0.5, method="downstream"),
    "nearest, no corrections": Step(rounding="nearest"),
    "moments not centred": Step(patch=raw_moments),
    "no bias shift": Step(patch=lambda: without(shift=True)),
    "no gain": Step(patch=lambda: without(gain=True)),
}


def candidate(graph: Graph, weight: int, activation: int, ends: bool) -> Candidate:
    """The same choice for every layer; embeddings at 8 bits, and the ends if asked."""
    names = [layer.name for layer in graph.layers]
    chosen = {name: LayerChoice(weight, activation) for name in names}
    eight = [names[0], names[-1]] if ends else []
    eight += [layer.name for layer in graph.layers if layer.kind == "Gather"]
    return Candidate(chosen | {name: LayerChoice(8, 8) for name in eight})


def measure(name: str, seed: int, steps: list[str]) -> list[dict[str, object]]:
    """All steps of one network with one draw of calibration data."""
    spec, _, cases = NETWORKS[name]
    task = getattr(importlib.import_module(spec[0]), spec[1])(seed=seed)
    if name == "minilm":  # every third batch of pairs, which are sorted by length
        task = replace(task, validation=task.validation[::3])
    original = lower(task)
    evaluator = evaluator_for(task, original, "validation", workers=WORKERS)
    session = OnnxRuntime().open(float_model(original))
    reference = evaluator.set_reference(session)
    exact = evaluator.outputs(session)
    power = float(((exact - exact.mean(axis=0)) ** 2).mean())
    split = task.split("calibration")
    graphs: dict[tuple[bool, float | None], tuple[Graph, Calibration]] = {}
    banks: dict[tuple[object, ...], Bank] = {}
    rows = []

    def prepared(step: Step) -> tuple[Graph, Calibration]:
        key = (step.equalize, step.smooth)
        if key not in graphs:
            graph = cross_layer_equalization(original) if step.equalize else original
            if step.smooth is not None:
                peaks = channel_peaks(graph, split, smoothed_tensors(graph), WORKERS)
                graph = smooth(graph, peaks, step.smooth)
            widths = sorted({case[1] for case in cases.values()} | {8})
            found = calibrate(
                graph, split, method="downstream", moments=True, widths=widths, threads=WORKERS
            )
            graphs.clear()  # one at a time: second moments are large
            graphs[key] = graph, found
        return graphs[key]

    for label, step in sorted(
        STEPS.items(), key=lambda item: (item[1].equalize, item[1].smooth or 0.0)
    ):
        if label not in steps or (step.smooth is not None and not smoothed_tensors(original)):
            continue
        graph, found = prepared(step)
        calibration = found
        if step.method != "downstream":
            calibration = replace(found, method=step.method, _ranges={})
        alone = "" if step.patch is unchanged else label
        key = (step.equalize, step.smooth, step.rounding, alone)
        if key not in banks:
            banks[key] = Bank(graph, step.rounding, calibration)
        for case, (weight, activation, ends) in cases.items():
            if weight == 8 and (step.rounding == "nearest" or step.patch is not unchanged):
                continue
            built = candidate(graph, weight, activation, ends)
            with step.patch():
                todo = [(x, built.choice(x.name)) for x in graph.layers]
                banks[key].build(todo, WORKERS)
                artifact = compress(graph, built, calibration, banks[key], "onnxruntime")
            outputs = evaluator.outputs(OnnxRuntime().open(artifact.model))
            targets = evaluator.split.targets
            if task.metric == "top1":
                value = float((outputs.argmax(-1) == targets).mean())
            else:
                value = float(task.metric(outputs, targets))
            rows.append(
                {
                    "network": name,
                    "bits": case,
                    "step": label,
                    "seed": seed,
                    "drop_points": round(100 * (reference.value - value), 3),
                    "output_error": round(float(((outputs - exact) ** 2).mean()) / power, 6),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def summarize(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Mean and spread over seeds, and the gain over the default on the same seeds."""
    found = []
    for key in dict.fromkeys((r["network"], r["bits"], r["step"]) for r in rows):
        same = [r for r in rows if (r["network"], r["bits"], r["step"]) == key]
        base = {
            r["seed"]: r
            for r in rows
            if (r["network"], r["bits"], r["step"]) == (*key[:2], "default")
        }
        drops = np.array([r["drop_points"] for r in same], float)
        errors = np.array([r["output_error"] for r in same], float)
        gains = np.array([base[r["seed"]]["drop_points"] for r in same], float) - drops
        before = np.array([base[r["seed"]]["output_error"] for r in same], float)
        found.append(
            {
                "network": key[0],
                "bits": key[1],
                "step": key[2],
                "seeds": len(same),
                "mean_drop_points": round(float(drops.mean()), 3),
                "gain_points": round(float(gains.mean()), 3),
                "gain_spread_points": round(float(np.ptp(gains)), 3),
                "output_error": round(float(errors.mean()), 5),
                "error_ratio": round(float((errors / before).mean()), 3),
                "error_ratio_spread": round(float(np.ptp(errors / before)), 3),
            }
        )
    return found


def main() -> None:
    """The networks asked for, with what the record has of others; summary and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, help="draws of calibration data")
    parser.add_argument("--first", type=int, default=0, help="the first draw to run")
    parser.add_argument("--steps", help="separated by semicolons: measure these beside the default")
    options = parser.parse_args()
    steps = ["default", *options.steps.split(";")] if options.steps else list(STEPS)
    path = RESULTS / "ablation.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    for name in options.networks:
        for seed in range(options.first, options.seeds or NETWORKS[name][1]):
            found = measure(name, seed, steps)
            known = json.loads(path.read_text())["rows"] if path.is_file() else []
            again = {(r["network"], r["seed"], r["step"]) for r in found}
            rows = [r for r in known if (r["network"], r["seed"], r["step"]) not in again] + found
            order = list(NETWORKS)
            rows.sort(key=lambda r: (order.index(r["network"]), r["seed"]))
            record("ablation", {"summary": summarize(rows), "rows": rows})
    for row in summarize(rows):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
