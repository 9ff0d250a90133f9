"""Structure: every transform on four networks, and what training brings back on ResNet-20.

``python benchmarks/structure.py transforms`` prunes, factorizes, shortens and quantizes four
networks without training: the share of MACs left, the metric of the int8 file on the first images
of validation, and the seconds of a trial. ``python benchmarks/structure.py trained`` takes half
and a third of ResNet-20's MACs away, trains what is left by distillation, and scores the float
and the int8 file on the test split; float latency against the whole network's, interleaved.
Results are added to ``results/structure.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import record

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.channels import Channels
from autoquant.compress.factorize import can_factorize, check, full_rank, is_pointwise
from autoquant.compress.structure import droppable
from autoquant.errors import CandidateError
from autoquant.graph import Graph
from autoquant.runtime import OnnxRuntime, measure
from autoquant.search.trial import Context, evaluator_for, float_model, prepare, run_trial
from autoquant.space import Space, TrainingRanges
from autoquant.task import Task
from autoquant.tasks import load_task

HERE = Path(__file__).resolve().parent
TASKS = {
    "resnet20": "cifar10.py:resnet20",
    "resnet8": "cifar10.py:resnet8",
    "efficientnet_lite0": "imagenet.py:efficientnet_lite0",
    "minilm": "stsb.py:minilm",
}
ANY = Space.model_validate(
    {
        "name": "any",
        "rules": [{"weight_bits": 8, "activation_bits": 8, "float": True}],
        "pruning": [{"ratios": [0, 0.5]}],
    }
)
RESULTS = HERE / "results" / "structure.json"


def ranked(graph: Graph, rank: float | str) -> dict[str, int | str]:
    """Layers that can take a rank, each at it; a share is of the full rank."""
    found: dict[str, int | str] = {}
    for layer in graph.layers:
        if not can_factorize(layer) or (isinstance(rank, str) and is_pointwise(layer)):
            continue
        value = rank if isinstance(rank, str) else max(1, round(rank * full_rank(layer)))
        try:
            check(layer, value)
        except CandidateError:
            continue
        found[layer.name] = value
    return found


def candidates(graph: Graph) -> dict[str, Candidate]:
    """One of each transform, and all of them at a time."""
    groups, blocks = Channels(graph).groups, list(droppable(graph))
    quarter = dict.fromkeys(groups, 0.25)
    svd = {n: r for n, r in ranked(graph, 0.5).items() if is_pointwise(graph.by_name[n])}
    tucker = {n: r for n, r in ranked(graph, 0.75).items() if n not in svd}
    found = {
        **{f"pruned by {i}": Candidate(pruning=quarter, importance=i) for i in ("l2", "taylor")},
        "svd": Candidate(rank=svd),
        "tucker": Candidate(rank=tucker),
        "cp": Candidate(rank=ranked(graph, "cp:8")),
        "separable": Candidate(rank=ranked(graph, "separable")),
        "dropped": Candidate(drop=tuple(blocks[-1:])),
        "all": Candidate(pruning=quarter, rank={**tucker, **svd}, drop=tuple(blocks[-1:])),
    }
    return {n: c for n, c in found.items() if c.is_structural}


def transforms(names: Sequence[str]) -> dict[str, Any]:
    """Every transform of each network, as an int8 file."""
    found: dict[str, Any] = {}
    for name in names:
        task = load_task(str(HERE / "tasks" / TASKS[name]))
        context = prepare(task, space=ANY, latency=False)
        eight = {n: LayerChoice(8, 8) for n in context.choices if context.graph.by_name[n].weight}
        reference = context.evaluator.reference
        assert reference is not None
        rows: dict[str, Any] = {"float": {"value": reference.value}}
        for label, candidate in {"int8": Candidate(), **candidates(context.graph)}.items():
            start = time.perf_counter()
            result = run_trial(context, replace(candidate, layers=eight), 0)
            if result.status != "complete" or result.score is None or result.predicted is None:
                raise SystemExit(f"{name}: {label}: {result.status}: {result.error}")
            rows[label] = {
                "macs": result.predicted.macs / context.graph.macs,
                "size_bytes": result.measured["size_bytes"],
                "value": result.score.value,
                "seconds": time.perf_counter() - start,
            }
            print(name, label, rows[label], flush=True)
        found[name] = rows
    return {"transforms": found}


STEPS = {"half": 6500, "low rank": 3000}
INNER = {"layer1": 0.625, "layer2": 0.5, "layer3": 0.25}  # share of the channels that go
TRAINING = {
    "optimizer": "adam",
    "learning_rate": 0.01,
    "batch_size": 64,
    "alpha": 1.0,
    "temperature": 4.0,
    "batch_norm": "live",
}
MIXUP = {"half": 0.3, "low rank": 1.0}


def trained(steps: dict[str, int], widths: Sequence[str]) -> dict[str, Any]:
    """Half the MACs removed by pruning inside the blocks, and a third by Tucker-2."""
    task = load_task(str(HERE / "tasks" / TASKS["resnet20"]))
    space = ANY.model_copy(update={"training": TrainingRanges(steps=(0, 1))})
    context = prepare(task, space=space, latency=False)
    graph = context.graph
    structures = {"half": half(graph), "low rank": a_third_fewer(context)}
    structures = {n: c for n, c in structures.items() if n in steps}
    test = evaluator_for(task, graph, "test")
    whole = test.set_reference(OnnxRuntime().open(float_model(context.original)))
    rows: dict[str, Any] = {"float": {"test": whole.value}}
    for label, structure in structures.items():
        settings = {**TRAINING, "mixup": MIXUP[label], "steps": steps[label]}
        made = {}
        for bits in widths:
            choice = LayerChoice() if bits == "float" else LayerChoice(8, 8)
            layers = dict.fromkeys(context.choices, choice)
            start = time.perf_counter()
            artifact = context.compress(replace(structure, layers=layers, training=settings))
            session = OnnxRuntime().open(artifact.model)
            made[bits] = {
                "macs": context.cost_of(artifact).macs / graph.macs,
                "size_bytes": artifact.size_bytes,
                "validation": context.evaluator.score(session).value,
                "test": test.score(session).value,
                "seconds": time.perf_counter() - start,
            }
            if bits == "float":
                made[bits]["speed"] = speed(task, context, artifact.model)
            print(label, bits, made[bits], flush=True)
        rows[label] = {"training": settings, **made}
    return {"trained": rows}


def half(graph: Graph) -> Candidate:
    """ResNet-20 without the block `layer1.1`, and with fewer channels inside the others: the
    more the larger their images are, since there a weight costs most MACs."""
    inner = [g for g in Channels(graph).groups if g.endswith(".conv1") and "layer1.1" not in g]
    pruning = {name: INNER[name.split(".")[0]] for name in inner}
    return Candidate(pruning=pruning, importance="activation", drop=("layer1.1",))


def a_third_fewer(context: Context) -> Candidate:
    """Every residual convolution by Tucker-2, at the largest share of its full rank at which a
    third of the network's MACs are gone."""
    graph = context.graph
    for share in range(80, 30, -1):
        rank = {n: r for n, r in ranked(graph, share / 100).items() if "layer" in n}
        candidate = Candidate(rank=rank)
        if context.predict(candidate).macs <= graph.macs * 2 / 3:
            return candidate
    raise SystemExit("no rank takes a third of the MACs away")


def speed(task: Task, context: Context, model: bytes) -> float:
    """How many times as fast as the whole float network a float file is, at batch 1."""
    runtime = OnnxRuntime()
    sessions = {
        "whole": runtime.open(float_model(context.original), 1),
        "part": runtime.open(model, 1),
    }
    inputs = [context.sample[0][:1]]
    found = measure(sessions, inputs, threads=1, seconds=1.0)
    return found["whole"].latency_ms / found["part"].latency_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["transforms", "trained"])
    parser.add_argument("--networks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--bits", nargs="+", default=["float", "int8"], choices=["float", "int8"])
    parser.add_argument("--cases", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--steps", type=int, help="of training, in place of the default")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.part == "transforms":
        found = transforms(arguments.networks)
    else:
        steps = {n: arguments.steps or STEPS[n] for n in arguments.cases}
        found = trained(steps, arguments.bits)
    merged = {name: {**known.get(name, {}), **rows} for name, rows in found.items()}
    rest = {name: rows for name, rows in known.items() if name != "environment"}
    record("structure", {**rest, **merged})


if __name__ == "__main__":
    main()
