"""Ties, forbidden pairs and boundaries, against the graph and the plan."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NETWORKS, Weights, build, images, network, node
from small_task import profile, task

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.compress.qdq import plan, resolve
from autoquant.cost.table import TableModel
from autoquant.errors import SpaceError
from autoquant.graph import Graph
from autoquant.search import SearchSettings, search
from autoquant.search.coupling import (
    attention_projections,
    boundaries,
    breaks,
    conform,
    forbidden_pairs,
    residual_partners,
    tied_groups,
)
from autoquant.search.solver import solve_exact
from autoquant.search.study import read_trials
from autoquant.space import Space

CHOICES = (LayerChoice(4, 8), LayerChoice(8, 8), FLOAT)
PRODUCTS = (FLOAT, LayerChoice(32, 8), FLOAT)  # of activations, at the places of `CHOICES`


def space(**fields: Any) -> Space:
    rules = [{"weight_bits": [4, 8], "activation_bits": 8, "float": True}]
    return Space.model_validate({"name": "own", "rules": rules, **fields})


def offered(graph: Graph) -> dict[str, tuple[LayerChoice, ...]]:
    return {layer.name: CHOICES for layer in graph.layers}


def stage() -> Graph:
    """Two residual blocks: the outputs of stem, a and b meet in Adds."""
    w = Weights(1)
    model = build(
        [
            node("Conv", ["x", "stem.weight"], ["s"], pads=[1, 1, 1, 1]),
            node("Relu", ["s"], ["r0"]),
            node("Conv", ["r0", "in.weight"], ["i"], pads=[1, 1, 1, 1]),
            node("Conv", ["i", "a.weight"], ["a"], pads=[1, 1, 1, 1]),
            node("Add", ["a", "r0"], ["s1"]),
            node("Relu", ["s1"], ["r1"]),
            node("Conv", ["r1", "b.weight"], ["b"], pads=[1, 1, 1, 1]),
            node("Add", ["r1", "b"], ["y"]),
        ],
        {f"{name}.weight": w(4, 4, 3, 3) for name in ("stem", "in", "a", "b")},
        {"x": ["N", 4, 6, 6]},
        ["y"],
    )
    return network(model, images(4, 6, 6)).graph


def test_residual_partners_meet_in_an_add_through_other_adds() -> None:
    assert residual_partners(stage()) == [["a", "stem"], ["a", "stem", "b"]]
    graph = stage()
    assert tied_groups(graph, space(tie=["residual"]), offered(graph)) == (("stem", "a", "b"),)
    assert residual_partners(NETWORKS["chain"]().graph) == []


def test_products_of_the_same_tensor_are_tied() -> None:
    graph = NETWORKS["text"]().graph
    assert attention_projections(graph) == [["query", "key"]]
    assert tied_groups(graph, space(tie=["attention"]), offered(graph)) == (("query", "key"),)


def test_patterns_tie_what_they_match() -> None:
    graph = stage()
    assert tied_groups(graph, space(tie=[["s*", "b"], ["in", "a"]]), offered(graph)) == (
        ("stem", "b"),
        ("in", "a"),
    )
    with pytest.raises(SpaceError, match="tie nothing matches no layer; a group needs two"):
        tied_groups(graph, space(tie=[["nothing"]]), offered(graph))
    with pytest.raises(SpaceError, match="no choice is common"):
        tied_groups(graph, space(tie=[["a", "b"]]), {**offered(graph), "b": (LayerChoice(2, 8),)})


def test_forbidden_pairs_are_those_that_match() -> None:
    graph = stage()
    rule = [{"layers": "stem", "weight_bits": 4}, {"layers": ["a", "b"], "weight_bits": [4, 32]}]
    found = forbidden_pairs(space(forbid=[rule]), graph, offered(graph))
    low = ("stem", CHOICES[0])
    assert set(found) == {(low, (n, c)) for n in ("a", "b") for c in (CHOICES[0], FLOAT)}
    wrong = [{"layers": "stem", "weight_bits": 3}, {"layers": "a"}]
    with pytest.raises(SpaceError, match="forbid 1: no layer that matches stem"):
        forbidden_pairs(space(forbid=[wrong]), graph, offered(graph))


def test_patterns_mean_layers_with_weights() -> None:
    graph = NETWORKS["attention"]().graph
    found = tied_groups(graph, space(tie=[["*"]]), offered(graph))
    assert found == (("query", "key", "value", "output"),)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize(
    "name", ["chain", "residual", "wide", "gemm", "matmul", "stage", "attention"]
)
def test_boundaries_are_those_of_the_plan_for_every_mix(name: str, products: bool) -> None:
    graph = stage() if name == "stage" else NETWORKS[name]().graph
    choices = offered(graph)
    if products:
        choices |= {layer.name: PRODUCTS for layer in graph.products}
    into, back = (
        boundaries(graph, choices, TableModel({}, {direction: 1e6}, 0.0, 0, 1, 1))
        for direction in ("to_int8", "to_float")
    )
    for mask in product((1, 2), repeat=len(choices)):
        picks = dict(zip(choices, mask, strict=True))
        candidate = resolve(graph, Candidate({n: choices[n][i] for n, i in picks.items()}))
        counted = [sum(b.cost for b in found if b.paid(picks)) for found in (into, back)]
        assert counted == list(plan(graph, candidate).boundaries(graph)), mask


def test_a_tight_budget_of_boundaries_keeps_precisions_together() -> None:
    graph = NETWORKS["chain"]().graph
    choices = offered(graph)
    loss = {n: (0.3, 0.2, 0.0) if i % 2 else (0.2, 0.1, 0.0) for i, n in enumerate(choices)}
    cost = dict.fromkeys(choices, (1000.0, 1000.0, 3000.0))
    model = TableModel({}, {"to_int8": 1e6, "to_float": 1e6}, 0.0, 0, 1, 1)
    paid = {"latency_ms": boundaries(graph, choices, model)}
    elements = graph.tensors["x"].elements

    def changes(budget: float) -> int:
        found = solve_exact(
            choices, loss, {"latency_ms": cost}, {"latency_ms": budget}, boundaries=paid
        )
        assert found is not None
        return int(np.abs(np.diff([found.choice(n).is_float for n in choices])).sum())

    assert changes(9000.0 + 6 * elements) == 4  # boundaries do not bind: float where it helps most
    assert changes(9000.0 + 3 * elements) == 1


def test_a_candidate_is_made_to_conform() -> None:
    low, high = CHOICES[0], CHOICES[1]
    choices = {"a": CHOICES, "b": (high, FLOAT), "c": CHOICES}
    forbidden = [(("a", high), ("c", low)), (("a", high), ("c", high))]
    free = Candidate({"a": high, "b": high, "c": FLOAT})
    assert conform(free, choices, [["a", "b"]], forbidden) is free
    found = conform(Candidate({"a": low, "b": FLOAT, "c": low}), choices, [["a", "b"]], forbidden)
    assert found == Candidate({"a": high, "b": high, "c": FLOAT})
    assert not breaks(found.layers, forbidden)


def test_a_search_keeps_to_ties_and_forbidden_pairs(tmp_path: Path) -> None:
    own = space(
        tie=[["first", "second"]],
        forbid=[[{"layers": "first", "weight_bits": 8}, {"layers": "head", "weight_bits": 4}]],
    )
    settings = SearchSettings(
        space=own, hardware=profile(), trials=6, name="tied", runs_dir=tmp_path, polish=False
    )
    search(task(tmp_path), settings)
    trials = read_trials(tmp_path / "tied" / "trials.jsonl")
    assert len(trials) == 6
    for trial in trials:
        choice = trial.candidate.choice
        assert choice("first") == choice("second")
        assert (choice("first").weight_bits, choice("head").weight_bits) != (8, 4)
