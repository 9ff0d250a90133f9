"""Exact best candidates under an additive prior: the whole trade-off curve at once.

Dynamic programming over the budget of one additive cost (multiple-choice knapsack): each layer
adds its divergence and its cost, and every budget on a fine grid gets its best candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autoquant.candidate import Candidate, LayerChoice
from autoquant.task import Array

GRID = 4000  # steps of the budget

Choices = Mapping[str, Sequence[LayerChoice]]
Table = Mapping[str, Sequence[float]]  # a figure for each choice of each layer


def solve(
    choices: Choices, divergence: Table, cost: Table, budgets: Sequence[float]
) -> list[Candidate]:
    """The candidate of least summed divergence within each budget of the summed cost.

    ``cost`` must not be negative. A budget is rounded down to a grid of ``GRID`` steps between
    the least and the most possible cost; one below the least gets the cheapest candidate.
    """
    names = [name for name, found in choices.items() if len(found) > 1]
    low = sum(min(cost[name]) for name in choices)
    high = sum(max(cost[name]) for name in choices)
    step = (high - low) / GRID or 1.0
    steps = {
        n: np.ceil((np.array(cost[n]) - min(cost[n])) / step - 1e-9).astype(int) for n in names
    }
    best = np.zeros(GRID + 1)
    taken: dict[str, Array] = {}
    for name in names:
        options = np.full((len(choices[name]), GRID + 1), np.inf)
        for i, (shift, loss) in enumerate(zip(steps[name], divergence[name], strict=True)):
            options[i, min(shift, GRID) :] = best[: GRID + 1 - min(shift, GRID)] + loss
        taken[name] = options.argmin(axis=0)
        best = options.min(axis=0)
    found = []
    for budget in budgets:
        index = int(np.clip((budget - low) / step, 0, GRID))
        picks = {}
        for name in reversed(names):
            picks[name] = int(taken[name][index])
            index -= steps[name][picks[name]]
        found.append(Candidate({n: c[picks.get(n, 0)] for n, c in choices.items()}))
    return found


def curve(choices: Choices, divergence: Table, cost: Table, points: int) -> list[Candidate]:
    """Up to ``points`` solutions at budgets spread evenly in the log of the cost, cheapest first.

    Budgets go from the least possible cost to that of every layer's most costly choice that is
    not float, where there is one.
    """
    low = sum(min(cost[name]) for name in choices)
    high = sum(max(cost[name]) for name in choices)
    if high <= low:
        return []
    top = sum(_widest(found, cost[name]) for name, found in choices.items())
    top = top if low < top < high else high
    budgets = np.exp(np.linspace(np.log(max(low, top / 1000)), np.log(top), points))
    return list(dict.fromkeys(solve(choices, divergence, cost, budgets.tolist())))


def _widest(choices: Sequence[LayerChoice], cost: Sequence[float]) -> float:
    """The most that a choice other than float costs."""
    coded = [c for choice, c in zip(choices, cost, strict=True) if not choice.is_float]
    return max(coded, default=max(cost))
