"""Post-training accuracy at 2 to 8 average weight bits, without labels or training.

    python benchmarks/low_bits.py [NETWORK …] [--seeds 3] [--first 0] [--missing]    # 45 minutes

For each network, width set and budget of average bits: the exact solution under the priors that
a search starts from, its file scored in onnxruntime on the test split, for three draws of
calibration data; and again after polishing where the budget is below 6 bits (not for MiniLM).
512 calibration images or sentences, 256 for EfficientNet-Lite0; activations 8 bits where not said
otherwise. A row is recorded as soon as it is measured, beside those that
are there; with ``--missing`` only rows that are not there are measured. Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, record

from autoquant.compress.lower import lower
from autoquant.runtime import OnnxRuntime
from autoquant.search import mean_of
from autoquant.search.sensitivity import priors
from autoquant.search.solver import Table, solve
from autoquant.search.trial import Context, evaluator_for, float_model, prepare
from autoquant.space import Rule, Space

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
Row = dict[str, Any]


def rules(widths: list[int], activations: int = 8, ends: bool = False, embedding: int = 8):
    """Weights of the given widths; ``ends`` keeps the first and last layer at 8/8."""

    def make(first: str, last: str) -> Space:
        found = [
            Rule(weight_bits=tuple(widths), activation_bits=(activations,)),
            Rule(kinds=("Gather",), weight_bits=(embedding,)),
        ]
        if ends:
            found.append(Rule(layers=(first, last), weight_bits=(8,), activation_bits=(8,)))
        return Space(name="benchmark", rules=tuple(found))

    return make


WIDE, PLAIN = [2, 3, 4, 6, 8], [2, 4, 8]
# network: (label, space, width set within it, budgets in average bits → bar, the drop against
# float it allows); cases of one space share what is prepared
WIDE8, LOW_EMBEDDING = rules(WIDE), rules(WIDE, embedding=4)
CASES = {
    "resnet20": [
        ("{2,3,4,6,8}/8", WIDE8, WIDE, {2.0: 2.23, 2.5: 1.03, 3.0: 0.43, 4.0: 0.13}),
        ("{2,4,8}/8", WIDE8, PLAIN, {2.5: 1.93, 3.0: 1.13, 4.0: 0.23}),
        ("4/4, ends 8/8", rules([4], 4, ends=True), [4, 8], {4.0: 2.23}),
    ],
    "resnet8": [("{2,3,4,6,8}/8", WIDE8, WIDE, {3.0: 2.19, 4.0: 0.59})],
    "efficientnet_lite0": [
        ("{2,3,4,6,8}/8", WIDE8, WIDE, {8.0: 0.49, 4.0: 1.39, 3.0: 4.69}),
        ("{2,4,8}/8", WIDE8, PLAIN, {4.0: 1.69, 3.0: 6.19}),
    ],
    "minilm": [
        ("{2,3,4,6,8}/8, embeddings 8", WIDE8, WIDE, {8.0: 0.23, 4.0: 0.83, 3.0: 2.53}),
        ("{2,3,4,6,8}/8, embeddings 4", LOW_EMBEDDING, WIDE, {4.0: 1.23}),
    ],
}


def task(name: str, seed: int):
    """The network's task with one draw of calibration data."""
    import cifar10
    import imagenet
    import stsb

    makers = {
        "resnet20": cifar10.resnet20,
        "resnet8": cifar10.resnet8,
        "efficientnet_lite0": imagenet.efficientnet_lite0,
        "minilm": stsb.minilm,
    }
    return makers[name](seed=seed)


def measure(name: str, seed: int, known: Set[tuple[str, float]] = frozenset()) -> Iterator[Row]:
    """Every case of one network with one draw of calibration data, but for the known ones,
    (label, budget)."""
    if all((label, bits) in known for label, _, _, budgets in CASES[name] for bits in budgets):
        return
    found = task(name, seed)
    graph = lower(found)
    test = evaluator_for(found, graph, "test")
    baseline = test.set_reference(OnnxRuntime().open(float_model(graph))).value
    ready: dict[object, tuple[Context, Table, float]] = {}
    for label, make, widths, budgets in CASES[name]:
        if all((label, bits) in known for bits in budgets):
            continue
        if make not in ready:
            start = time.perf_counter()
            space = make(graph.layers[0].name, graph.layers[-1].name)
            context = prepare(found, space=space, latency=False)
            tables = priors(context, found, workers=os.cpu_count() or 1)
            mean = mean_of({n: r.table for n, r in tables.items()})
            ready[make] = context, mean, time.perf_counter() - start
        context, mean, seconds = ready[make]
        kept = {
            n: [i for i, c in enumerate(f) if len(f) == 1 or c.weight_bits in widths]
            for n, f in context.choices.items()
        }
        choices = {n: [context.choices[n][i] for i in k] for n, k in kept.items()}
        prior = {n: [mean[n][i] for i in k] for n, k in kept.items()}
        counted = {n: graph.by_name[n] for n in choices if graph.by_name[n].kind != "Gather"}
        cost = {
            n: tuple(c.weight_bits * counted[n].parameters if n in counted else 0.0 for c in f)
            for n, f in choices.items()
        }
        weights = sum(layer.parameters for layer in counted.values())
        asked = [bits * weights for bits in budgets]
        for (bits, allowed), candidate in zip(
            budgets.items(), solve(choices, prior, cost, asked), strict=True
        ):
            if (label, bits) in known:
                continue
            artifact = context.compress(candidate)
            score = test.score(OnnxRuntime().open(artifact.model))
            polished, polishing = None, None
            if bits < 6 and name != "minilm":
                start = time.process_time()
                refitted = context.compress(replace(candidate, polish=True))
                polishing = round(time.process_time() - start, 1)
                polished = round(100 * test.score(OnnxRuntime().open(refitted.model)).drop, 3)
            spent = sum(
                artifact.candidate.choice(n).weight_bits * x.parameters for n, x in counted.items()
            )
            row = {
                "network": name,
                "space": label,
                "budget_bits": bits,
                "average_bits": round(spent / weights, 3),
                "seed": seed,
                "float": baseline,
                "test": score.value,
                "drop_points": round(100 * score.drop, 3),
                "drop_standard_error_points": round(100 * score.drop_standard_error, 3),
                "polished_drop_points": polished,
                "polish_processor_seconds": polishing,
                "allowed_drop_points": allowed,
                "size_bytes": artifact.size_bytes,
                "prepare_seconds": round(seconds, 1),
            }
            print(json.dumps(row), flush=True)
            yield row


def summarize(rows: list[Row]) -> list[dict[str, object]]:
    """One line a case: means and spread over the seeds beside the bar."""
    summary: list[dict[str, object]] = []
    for key in dict.fromkeys((r["network"], r["space"], r["budget_bits"]) for r in rows):
        same = [r for r in rows if (r["network"], r["space"], r["budget_bits"]) == key]
        bank = [r["drop_points"] for r in same]
        refitted = [r["polished_drop_points"] for r in same]
        drops = [b if p is None else p for b, p in zip(bank, refitted, strict=True)]
        summary.append(
            {
                "network": key[0],
                "space": key[1],
                "budget_bits": key[2],
                "seeds": len(same),
                "bank_mean_drop_points": round(float(np.mean(bank)), 3),
                "polished": same[0]["polished_drop_points"] is not None,
                "mean_drop_points": round(float(np.mean(drops)), 3),
                "spread_points": round(float(np.ptp(drops)), 3),
                "allowed_drop_points": same[0]["allowed_drop_points"],
                "reached": bool(np.mean(drops) <= same[0]["allowed_drop_points"]),
            }
        )
    return summary


def main() -> None:
    """All cases, a summary over seeds, the record; what is left out keeps its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--missing", action="store_true", help="keep the rows that are there")
    parser.add_argument("--first", type=int, default=0, help="the first draw to run")
    options = parser.parse_args()
    for name in options.networks:
        for seed in range(options.first, options.seeds):
            same = [r for r in recorded() if (r["network"], r["seed"]) == (name, seed)]
            known = {(r["space"], r["budget_bits"]) for r in same if options.missing}
            for fresh in measure(name, seed, known):
                rows = [r for r in recorded() if key_of(r) != key_of(fresh)] + [fresh]
                order = list(CASES)
                rows.sort(key=lambda r: (order.index(r["network"]), r["space"], r["seed"]))
                record("low_bits", {"summary": summarize(rows), "rows": rows})
    print("\n".join(map(json.dumps, summarize(recorded()))))


def recorded() -> list[Row]:
    """The rows of the record as it is now: another network may run beside this one."""
    path = RESULTS / "low_bits.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row measures."""
    return tuple(row[name] for name in ("network", "space", "budget_bits", "seed"))


if __name__ == "__main__":
    main()
