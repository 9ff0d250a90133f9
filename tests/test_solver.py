from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.errors import SpaceError
from autoquant.search.solver import (
    GAP,
    GRID,
    Boundary,
    curve,
    joint_curve,
    solve,
    solve_exact,
)

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


def test_bits_and_structures_are_solved_for_together() -> None:
    """What saves much for little goes first, what saves nothing never; ties are kept."""
    choices, loss, cost = problem(2)
    structures = {
        "prune:layer0": (0.5, 0.25, 0.0),
        "drop:block": (True, False),
        "rank:layer1": (3, None),  # costs more than the layer as it is
        "importance": ("l1", "taylor"),  # without a prior
    }
    top = sum(cost[n][2] for n in choices)
    loss |= {"prune:layer0": (9.0, 1e-6, 0.0), "drop:block": (1e-6, 0.0), "rank:layer1": (0.1, 0.0)}
    cost |= {"prune:layer0": (0.0, 0.1 * top, 0.2 * top), "drop:block": (0.0, 0.2 * top)}
    cost |= {"rank:layer1": (50.0, 0.0)}
    tied = (("layer0", "layer1"),)
    found = joint_curve(choices, structures, loss, cost, 5, tied)
    assert 3 < len(found) <= 5
    for candidate in found:
        assert candidate.choice("layer0") == candidate.choice("layer1")
        assert not candidate.rank and candidate.pruning and candidate.importance == "taylor"
        assert candidate.drop == ("block",)
    assert {c.pruning["layer0"] for c in found[1:]} == {0.25}
    assert joint_curve(choices, {"importance": ("l1",)}, loss, cost, 5) == []
    free = {n: (0.0,) * len(c) for n, c in cost.items()}
    assert joint_curve(choices, structures, loss, free, 5) == []


@pytest.mark.parametrize("found", [(CHOICES[2],), (FLOAT,)])
def test_layers_without_a_choice_stay_as_they_are(found: tuple[LayerChoice, ...]) -> None:
    choices, loss, cost = problem(3)
    choices["layer1"], loss["layer1"], cost["layer1"] = found, (0.0,), (5.0,)
    assert {c.choice("layer1") for c in curve(choices, loss, cost, 6)} == set(found)
    only = {"layer1": found}
    assert curve(only, {"layer1": (0.0,)}, {"layer1": (5.0,)}, 6) == []


# --- several budgets at once ------------------------------------------------------------------


def brute(
    choices: dict[str, tuple[LayerChoice, ...]],
    loss: Table,
    allowed: Callable[[dict[str, int]], bool],
) -> float | None:
    """The least loss of all candidates that are allowed; None where none is."""
    found = []
    for picks in product(*(range(len(c)) for c in choices.values())):
        named = dict(zip(choices, picks, strict=True))
        if allowed(named):
            found.append(sum(loss[n][i] for n, i in named.items()))
    return min(found, default=None)


def indices(candidate: Candidate) -> dict[str, int]:
    return {n: CHOICES.index(c) for n, c in candidate.layers.items()}


def within(cost: Table, budget: float, picks: dict[str, int]) -> bool:
    return sum(cost[n][i] for n, i in picks.items()) <= budget * (1 + 1e-6)


@given(st.integers(0, 10_000), st.floats(-0.05, 1.0))
@settings(max_examples=20)
def test_one_budget_is_solved_as_by_trying_all(seed: int, share: float) -> None:
    choices, loss, cost = problem(seed, layers=4)
    low, high = (sum(f(c) for c in cost.values()) for f in (min, max))
    budget = low + share * (high - low)
    found = solve_exact(choices, loss, {"size": cost}, {"size": budget})
    best = brute(choices, loss, lambda picks: within(cost, budget, picks))
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert within(cost, budget, indices(found))
        assert total(loss, found) <= best * (1 + 2 * GAP) + 1e-9


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_all_constraints_together_are_solved_as_by_trying_all(seed: int) -> None:
    choices, loss, size = problem(seed, layers=5)
    _, _, time = problem(seed + 1, layers=5)
    names = list(choices)
    generator = np.random.default_rng(seed)
    int8, floats = frozenset({0, 1, 2}), frozenset({3})
    paid = [
        Boundary([[(a, x), (b, y)]], float(generator.uniform(0, 5000)))
        for a, b in pairwise(names)
        for x, y in ((int8, floats), (floats, int8))
    ]
    paid.append(Boundary([[(names[0], int8)], [(names[1], int8), (names[2], int8)]], 900.0))
    budgets = {
        "size": 0.5 * sum(map(max, size.values())),
        "time": 0.5 * sum(map(max, time.values())),
    }
    peaks = {
        "memory": [{names[0]: size[names[0]], names[1]: size[names[1]]}, {names[2]: (9, 5, 2, 1)}]
    }
    budgets["memory"] = 0.7 * (max(size[names[0]]) + max(size[names[1]]))
    tied = [names[3:5]]
    forbidden = [((names[0], CHOICES[0]), (names[1], CHOICES[0]))]

    def allowed(p: dict[str, int]) -> bool:
        spent = sum(time[n][i] for n, i in p.items()) + sum(b.cost for b in paid if b.paid(p))
        return (
            within(size, budgets["size"], p)
            and spent <= budgets["time"] * (1 + 1e-6)
            and p[names[3]] == p[names[4]]
            and not p[names[0]] == p[names[1]] == 0
            and size[names[0]][p[names[0]]] + size[names[1]][p[names[1]]] <= budgets["memory"]
        )

    found = solve_exact(
        choices, loss, {"size": size, "time": time}, budgets,
        peaks=peaks, tied=tied, forbidden=forbidden, boundaries={"time": paid},
    )  # fmt: skip
    best = brute(choices, loss, allowed)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert allowed(indices(found))
        assert total(loss, found) <= best * (1 + 2 * GAP) + 1e-9


def test_it_agrees_with_the_dynamic_programme_on_many_layers() -> None:
    choices, loss, cost = problem(5, layers=60)
    budget = 0.4 * sum(map(max, cost.values()))
    (grid,) = solve(choices, loss, cost, [budget])
    found = solve_exact(choices, loss, {"size": cost}, {"size": budget})
    assert found is not None and within(cost, budget, indices(found))
    assert total(loss, found) <= total(loss, grid) * (1 + GAP)
    assert total(loss, found) == pytest.approx(total(loss, grid), rel=0.02)


def test_a_budget_needs_costs_and_an_infinite_divergence_is_avoided() -> None:
    choices, loss, cost = problem(6)
    with pytest.raises(SpaceError, match="budget 'energy' has no costs"):
        solve_exact(choices, loss, {"size": cost}, {"energy": 1.0})
    loss["layer0"] = (np.inf, *loss["layer0"][1:])
    budget = sum(c[1] for c in cost.values())
    found = solve_exact(choices, loss, {"size": cost}, {"size": budget})
    assert found is not None and found.choice("layer0") != CHOICES[0]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    choices, loss, cost = problem(7, layers=30)
    solve_exact(choices, loss, {"size": cost}, {"size": 0.3 * sum(map(max, cost.values()))})
    assert capfd.readouterr() == ("", "")


def test_tied_layers_take_one_choice_in_a_curve_too() -> None:
    choices, loss, cost = problem(8)
    choices["layer1"] = CHOICES[1:]
    loss["layer1"], cost["layer1"] = loss["layer1"][1:], cost["layer1"][1:]
    groups = [["layer0", "layer1"], ["layer1", "layer3"], ["layer4", "elsewhere"]]
    found = curve(choices, loss, cost, 8, groups)
    assert len(found) > 3
    for candidate in found:
        assert len({candidate.choice(n) for n in ("layer0", "layer1", "layer3")}) == 1
    budget = 0.3 * sum(map(max, cost.values()))
    exact = solve_exact(choices, loss, {"size": cost}, {"size": budget}, tied=groups)
    assert exact is not None
    assert exact.choice("layer0") == exact.choice("layer1") == exact.choice("layer3") != CHOICES[0]


def test_tied_layers_without_a_common_choice_are_an_error() -> None:
    choices, loss, cost = problem(9)
    choices["layer1"], loss["layer1"], cost["layer1"] = (LayerChoice(3, 8),), (0.0,), (5.0,)
    for attempt in (
        lambda: curve(choices, loss, cost, 4, [["layer0", "layer1"]]),
        lambda: solve_exact(choices, loss, {"s": cost}, {"s": 1e9}, tied=[["layer0", "layer1"]]),
    ):
        with pytest.raises(SpaceError, match="layer0, layer1 are tied"):
            attempt()
