from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.search.solver import GRID, curve, solve

CHOICES = (LayerChoice(2, 8), LayerChoice(4, 8), LayerChoice(8, 8), FLOAT)
Table = dict[str, tuple[float, ...]]


def problem(seed: int, layers: int = 5) -> tuple[dict[str, tuple[LayerChoice, ...]], Table, Table]:
    """Layers of random size whose divergence falls with their bits."""
    generator = np.random.default_rng(seed)
    choices = {f"layer{i}": CHOICES for i in range(layers)}
    loss = {
        n: tuple(sorted(generator.exponential(size=len(c)), reverse=True))
        for n, c in choices.items()
    }
    sizes = {n: int(generator.integers(10, 1000)) for n in choices}
    cost = {
        n: tuple(float(c.weight_bits * sizes[n]) for c in found) for n, found in choices.items()
    }
    return choices, loss, cost


def total(table: Table, candidate: Candidate) -> float:
    return sum(table[n][CHOICES.index(c)] for n, c in candidate.layers.items())


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_no_candidate_within_the_budget_is_better(seed: int, share: float) -> None:
    choices, loss, cost = problem(seed, layers=4)
    low = sum(min(c) for c in cost.values())
    high = sum(max(c) for c in cost.values())
    budget = low + share * (high - low)
    (found,) = solve(choices, loss, cost, [budget])
    slack = 4 * (high - low) / GRID  # each layer's cost is rounded up to the grid
    assert total(cost, found) <= budget + 1e-6
    best = min(
        sum(loss[n][i] for n, i in zip(choices, picks, strict=True))
        for picks in product(range(len(CHOICES)), repeat=len(choices))
        if sum(cost[n][i] for n, i in zip(choices, picks, strict=True)) <= budget - slack
        or all(i == int(np.argmin(cost[n])) for n, i in zip(choices, picks, strict=True))
    )
    assert total(loss, found) <= best + 1e-9


def test_a_budget_below_the_least_gets_the_cheapest() -> None:
    choices, loss, cost = problem(1)
    (found,) = solve(choices, loss, cost, [0.0])
    assert all(choice == CHOICES[0] for choice in found.layers.values())


def test_the_curve_rises_from_the_cheapest_to_the_widest_that_is_not_float() -> None:
    choices, loss, cost = problem(2)
    found = curve(choices, loss, cost, 12)
    costs = [total(cost, c) for c in found]
    losses = [total(loss, c) for c in found]
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True)
    assert costs[0] == sum(min(c) for c in cost.values())
    assert costs[-1] <= sum(cost[n][2] for n in choices) * (1 + 1 / GRID)
    assert len(found) == len(set(found)) > 5


@pytest.mark.parametrize("found", [(CHOICES[2],), (FLOAT,)])
def test_layers_without_a_choice_stay_as_they_are(found: tuple[LayerChoice, ...]) -> None:
    choices, loss, cost = problem(3)
    choices["layer1"], loss["layer1"], cost["layer1"] = found, (0.0,), (5.0,)
    assert {c.choice("layer1") for c in curve(choices, loss, cost, 6)} == set(found)
    only = {"layer1": found}
    assert curve(only, {"layer1": (0.0,)}, {"layer1": (5.0,)}, 6) == []
