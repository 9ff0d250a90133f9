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


def curve(
    choices: Mapping[str, Sequence[LayerChoice]],
    divergence: Mapping[str, Sequence[float]],
    cost: Mapping[str, Sequence[float]],
    points: int,
) -> list[Candidate]:
    """Up to ``points`` best candidates, at budgets spread evenly in the log of the cost.

    ``cost``: of each choice of each layer, not negative. Budgets go from the least possible
    cost to that of every layer's most costly choice that is not float, where there is one, and
    are rounded down to a grid of ``GRID`` steps. Cheapest first.
    """
    names = [name for name, found in choices.items() if len(found) > 1]
    low = sum(min(cost[name]) for name in choices)
    high = sum(max(cost[name]) for name in choices)
    fixed = {name: found[0] for name, found in choices.items() if len(found) == 1}
    if not names or high <= low:
        return []
    step = (high - low) / GRID
    best = np.zeros(GRID + 1)
    taken: list[Array] = []
    for name in names:
        least = min(cost[name])
        extra = [int(np.ceil((c - least) / step - 1e-9)) for c in cost[name]]
        options = np.full((len(extra), GRID + 1), np.inf)
        for i, (shift, loss) in enumerate(zip(extra, divergence[name], strict=True)):
            if shift <= GRID:
                options[i, shift:] = best[: GRID + 1 - shift] + loss
        taken.append(options.argmin(axis=0))
        best = options.min(axis=0)
    top = sum(_widest(choices[name], cost[name]) for name in choices)
    top = top if low < top < high else high
    budgets = np.exp(np.linspace(np.log(max(low, top / 1000)), np.log(top), points)) - low
    found = []
    for budget in budgets:
        index = int(np.clip(budget / step, 0, GRID))
        layers = dict(fixed)
        for name, pick in zip(reversed(names), reversed(taken), strict=True):
            choice = int(pick[index])
            layers[name] = choices[name][choice]
            index -= int(np.ceil((cost[name][choice] - min(cost[name])) / step - 1e-9))
        found.append(Candidate({name: layers[name] for name in choices}))
    return list(dict.fromkeys(found))


def _widest(choices: Sequence[LayerChoice], cost: Sequence[float]) -> float:
    """The most that a choice other than float costs."""
    coded = [c for choice, c in zip(choices, cost, strict=True) if not choice.is_float]
    return max(coded, default=max(cost))
