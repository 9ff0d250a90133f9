"""How well each sensitivity estimator ranks candidates, and what its solutions are worth.

    python benchmarks/priors.py [NETWORK …]     # about 10 minutes on two cores

For each network: every estimator's table and its processor time; Spearman's correlation of its
sums with the divergence (mean KL from float) and the drop in top-1 measured on the validation
split, over candidates from the estimators' own curves with random moves; and the measured
figures of its solutions at budgets of average weight bits. Beside them processor times of the
solver, a curve by dynamic programming and 200 layers × 8 choices by HiGHS, and what a prior takes
for a network of 62 layers. Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, record

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.runtime import OnnxRuntime
from autoquant.search.sensitivity import ESTIMATORS, divergence, estimate, predicted
from autoquant.search.solver import Boundary, curve, solve, solve_exact
from autoquant.search.trial import Context, float_model, prepare
from autoquant.space import Rule, Space

sys.path.insert(0, str(Path(__file__).parent / "tasks"))

WIDTHS = (2, 3, 4, 6, 8)
# case: (network, widths of activations, candidates, estimators, budgets of average bits)
CASES: dict[str, tuple[str, tuple[int, ...], int, Sequence[str], Sequence[float]]] = {
    "resnet8": ("resnet8", (8,), 40, list(ESTIMATORS), (2.5, 3.0, 4.0)),
    "resnet8, activations {4,6,8}": ("resnet8", (4, 6, 8), 40, list(ESTIMATORS), ()),
    "resnet20": ("resnet20", (8,), 40, list(ESTIMATORS), (2.1, 2.3, 2.5, 3.0, 4.0)),
    "efficientnet_lite0": (
        "efficientnet_lite0", (8,), 10, ["combined", "measured", "fisher", "bank"], (),
    ),
}  # fmt: skip


def clocked(call: Callable[..., Any], *given: Any, **named: Any) -> tuple[Any, float]:
    """A result and the processor seconds that it took."""
    start = time.process_time()
    return call(*given, **named), time.process_time() - start


def measure(case: str, seed: int = 0) -> dict[str, Any]:
    """Everything about one network."""
    import cifar10
    import imagenet

    name, activations, count, estimators, budgets = CASES[case]
    makers = {
        "resnet8": cifar10.resnet8,
        "resnet20": cifar10.resnet20,
        "efficientnet_lite0": imagenet.efficientnet_lite0,
    }
    task = makers[name](seed=seed)
    space = Space(name="benchmark", rules=(Rule(weight_bits=WIDTHS, activation_bits=activations),))
    context = prepare(task, space=space, latency=False)
    cost = context.additive_cost("size_bytes")
    reference = context.evaluator.outputs(OnnxRuntime().open(float_model(context.graph)))
    base = solve(context.choices, estimate(context, task).table, cost, [bits(context, 2.05)])[0]

    tables, seconds, notes = {}, {}, {}
    for estimator in estimators:
        found, seconds[estimator] = clocked(estimate, context, task, estimator=estimator)
        tables[estimator], notes[estimator] = found.table, found.notes
    if budgets:
        found, seconds["around a base"] = clocked(
            estimate, context, task, estimator="measured", base=base
        )
        tables["around a base"] = found.table

    def score(candidate: Candidate) -> tuple[float, float]:
        """Divergence from float and drop of top-1, both on validation."""
        session = OnnxRuntime().open(context.compress(candidate).model)
        outputs = context.evaluator.outputs(session).astype(np.float64)
        return divergence(reference.astype(np.float64), outputs, True), context.evaluator.score(
            session
        ).drop

    candidates = neighbours(context, tables, cost, count, seed)
    measured = np.array([score(c) for c in candidates])
    for row in measured:
        print(json.dumps([float(v) for v in row]), flush=True)
    rows = {}
    for estimator, table in tables.items():
        guess = [predicted(table, context.choices, c) for c in candidates]
        rows[estimator] = {
            "processor_seconds": round(seconds[estimator], 2),
            "spearman_divergence": spearman(guess, measured[:, 0]),
            "spearman_drop": spearman(guess, measured[:, 1]),
            "slope_of_logs": slope(guess, measured[:, 0]),
            "notes": list(notes.get(estimator, ())),
            "solutions": [],
        }
        for budget in budgets:
            (best,) = solve(context.choices, table, cost, [bits(context, budget)])
            kl, drop = score(best)
            rows[estimator]["solutions"].append(
                {"average_bits": budget, "divergence": kl, "drop_points": round(100 * drop, 3)}
            )
        print(json.dumps({case: {estimator: rows[estimator]}}), flush=True)
    times = [clocked(curve, context.choices, table, cost, 14)[1] for table in tables.values()]
    return {
        "layers": len(context.choices),
        "candidates": len(candidates),
        "validation_samples": context.evaluator.split.samples,
        "curve_processor_ms": round(1e3 * max(times), 2),
        "estimators": rows,
    }


def deep() -> dict[str, Any]:
    """What Fisher's prior and a curve take for a ResNet of 62 layers, whose weights are random."""
    import cifar10

    task = cifar10.resnet62()
    space = Space(name="benchmark", rules=(Rule(weight_bits=WIDTHS, activation_bits=(8,)),))
    context = prepare(task, space=space, latency=False)
    start = time.perf_counter()
    found, spent = clocked(estimate, context, task, estimator="fisher")
    wall = time.perf_counter() - start
    cost = context.additive_cost("size_bytes")
    _, curve_spent = clocked(curve, context.choices, found.table, cost, 14)
    return {
        "layers": len(context.choices),
        "fisher_seconds": round(wall, 2),
        "fisher_processor_seconds": round(spent, 2),
        "curve_processor_ms": round(1e3 * curve_spent, 2),
    }


def bits(context: Context, average: float) -> float:
    """Bytes of all weights at an average width."""
    return average / 8 * sum(context.graph.by_name[n].parameters for n in context.choices)


def neighbours(
    context: Context,
    tables: Mapping[str, Mapping[str, tuple[float, ...]]],
    cost: Mapping[str, tuple[float, ...]],
    count: int,
    seed: int,
) -> list[Candidate]:
    """Solutions of every table in turn, at random budgets, each layer moved with chance .3."""
    generator = np.random.default_rng(seed)
    names, found = list(tables), []
    for index in range(count):
        budget = bits(context, float(generator.uniform(2.3, 6)))
        (start,) = solve(context.choices, tables[names[index % len(names)]], cost, [budget])
        layers = {}
        for name, choices in context.choices.items():
            place = list(choices).index(start.choice(name))
            if generator.random() < 0.3:
                place = int(np.clip(place + generator.integers(-2, 3), 0, len(choices) - 1))
            layers[name] = choices[place]
        found.append(Candidate(layers))
    return list(dict.fromkeys(found))


def spearman(a: Sequence[float], b: Any) -> float:
    from scipy.stats import spearmanr

    return round(float(spearmanr(a, b).statistic), 4)


def slope(guess: Sequence[float], found: Any) -> float:
    """Of log divergence over log guess; 1 where sums are right."""
    return round(float(np.polyfit(np.log(guess), np.log(found), 1)[0]), 3)


def exact(seeds: int = 3) -> list[dict[str, Any]]:
    """200 layers of 8 choices: one budget, and two with boundaries, ties and a forbidden pair."""
    offered = (*(LayerChoice(b, 8) for b in range(2, 9)), FLOAT)
    rows = []
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        names = [f"layer{i}" for i in range(200)]
        choices = dict.fromkeys(names, offered)
        draw = {n: np.exp(generator.normal(size=3) * [1.5, 1.2, 1.0]) for n in names}
        loss = {n: [draw[n][0] * 4.0**-c.weight_bits for c in offered] for n in names}
        size = {n: [draw[n][1] * c.weight_bits for c in offered] for n in names}
        time_ = {n: [draw[n][2] * (1 if c.is_float else 0.35) for c in offered] for n in names}
        int8, float_ = frozenset(range(7)), frozenset([7])
        paid = [
            Boundary([[(a, x), (b, y)]], 0.3)
            for a, b in itertools.pairwise(names)
            for x, y in ((int8, float_), (float_, int8))
        ]
        most = {n: sum(max(v) for v in t.values()) for n, t in (("s", size), ("t", time_))}
        for share in (0.09, 0.125, 0.2):
            one, single = clocked(solve_exact, choices, loss, {"s": size}, {"s": share * most["s"]})
            two, several = clocked(
                solve_exact,
                choices,
                loss,
                {"s": size, "t": time_},
                {"s": 2 * share * most["s"], "t": 0.4 * most["t"]},
                boundaries={"t": paid},
                tied=[names[i : i + 3] for i in range(0, 60, 6)],
                forbidden=[((names[-1], offered[0]), (names[-2], offered[0]))],
            )
            rows.append(
                {
                    "seed": seed,
                    "share": share,
                    "feasible": one is not None and two is not None,
                    "one_budget_processor_seconds": round(single, 3),
                    "two_budgets_with_boundaries_processor_seconds": round(several, 3),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """All cases, the solver, the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    options = parser.parse_args()
    path = RESULTS / "priors.json"
    found = json.loads(path.read_text())["networks"] if path.is_file() else {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AUTOQUANT_CACHE"] = cache  # or another run would time what one has kept
        solver, layers = exact(), deep()
        print(json.dumps(layers), flush=True)
        for case in options.cases:  # each is kept as soon as it is there
            found[case] = measure(case)
            record("priors", {"networks": found, "exact": solver, "resnet62": layers})


if __name__ == "__main__":
    main()
