"""Low rank: pieces that make up a layer, exact where the rank allows it."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Weights, build, node, run
from test_prune import IMAGES, WORDS, evidence, outputs

from autoquant.compress.factorize import concrete, factorize, full_rank, vbmf_rank
from autoquant.errors import CandidateError
from autoquant.graph import Graph


@pytest.mark.parametrize(
    ("network", "rank", "count", "shapes"),
    [
        ("convolutions", {"back": 6}, 3, [(6, 12, 1, 1), (6, 6, 3, 3), (16, 6, 1, 1)]),
        ("convolutions", {"back": "cp:10"}, 3, [(10, 12, 1, 1), (10, 1, 3, 3), (16, 10, 1, 1)]),
        ("convolutions", {"back": "separable"}, 2, [(12, 1, 3, 3), (16, 12, 1, 1)]),
        ("convolutions", {"left": 3}, 2, [(3, 24, 1, 1), (8, 3, 1, 1)]),
        ("convolutions", {"head": 2}, 2, [(2, 14), (5, 2)]),
        ("attention", {"fc1": 5}, 2, [(16, 5), (5, 24)]),
    ],
)
def test_a_layer_becomes_pieces_that_are_layers(
    network: str, rank: dict[str, int | str], count: int, shapes: list[tuple[int, ...]]
) -> None:
    found = evidence(network)
    data = IMAGES if network == "convolutions" else WORDS
    model, names = factorize(found.graph, rank, found.moments)
    graph = Graph.read(model, [data])
    ((layer, pieces),) = names.items()
    assert pieces == tuple(f"{layer}.{i}" for i in range(count))
    assert [graph.by_name[n].weight_shape for n in pieces] == shapes
    assert layer not in graph.by_name and graph.macs < found.graph.macs
    expected = outputs(found.graph, data)
    error = np.square(outputs(graph, data) - expected).mean()
    assert error < 0.3 * np.square(expected).mean()


def test_pieces_of_full_rank_are_the_layer() -> None:
    """Up to rounding: Tucker and SVD at the full rank, and CP of a kernel that has that rank."""
    found = evidence()
    expected = outputs(found.graph, IMAGES)
    model, _ = factorize(found.graph, {"left": 8, "head": 5, "inner": 12}, found.moments)
    got = outputs(Graph.read(model, [IMAGES]), IMAGES)
    # `inner` keeps 12 of its 16 input directions
    assert np.square(got - expected).mean() < 0.01 * np.square(expected).mean()
    model, _ = factorize(found.graph, {"left": 8, "head": 5}, found.moments)
    got = outputs(Graph.read(model, [IMAGES]), IMAGES)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_a_kernel_of_low_rank_is_found() -> None:
    """CP of rank 3 and a separable pair give back a convolution that is one."""
    w = Weights(8)
    a, b, c = w(8, 3), w(6, 3), w(9, 3)
    low = np.einsum("or,ir,kr->oik", a, b, c).reshape(8, 6, 3, 3)
    pair = np.einsum("oi,ik->oik", w(8, 6), w(6, 9)).reshape(8, 6, 3, 3)
    data = np.random.default_rng(0).normal(size=(16, 6, 7, 7)).astype(np.float32)
    for weight, rank in ((low, "cp:3"), (pair, "separable")):
        model = build(
            [node("Conv", ["x", "c.weight"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2])],
            {"c.weight": weight.astype(np.float32)},
            {"x": ["N", 6, 7, 7]},
            ["y"],
        )
        graph = Graph.read(model, [data])
        changed, _ = factorize(graph, {"c": rank}, {})
        got = run(Graph.read(changed, [data]).model, data)[0]
        np.testing.assert_allclose(got, run(model, data)[0], atol=0.05)


def test_variational_bayes_finds_the_rank_under_noise() -> None:
    generator = np.random.default_rng(0)
    signal = generator.normal(size=(40, 6)) @ generator.normal(size=(6, 90))
    assert vbmf_rank(signal + 0.3 * generator.normal(size=(40, 90))) == 6
    assert vbmf_rank(generator.normal(size=(40, 90))) <= 2


def test_ranks_of_a_space_become_numbers() -> None:
    graph = evidence().graph
    back, left = graph.by_name["back"], graph.by_name["left"]
    assert full_rank(back) == 12 and full_rank(graph.by_name["depth"]) == 0
    ranks = [concrete(graph, back, r) for r in ("full", 0.5, 4, "cp:9", "separable")]
    assert ranks == [None, 6, 4, "cp:9", "separable"]
    assert concrete(graph, left, "separable") is None
    found = concrete(graph, back, "vbmf")
    assert found is None or 1 <= int(found) < 12


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        ({"back": 13}, "rank of 'back' is 13: it can be at most 12"),
        ({"depth": 2}, "'depth' is 2: a Conv of 16 groups cannot be factorized"),
        ({"left": "separable"}, "'left' is 'separable': its kernel has one position"),
        ({"bak": 2}, "unknown layer 'bak' in rank; did you mean 'back'"),
    ],
)
def test_an_impossible_rank_is_one_line(rank: dict[str, int | str], said: str) -> None:
    found = evidence()
    with pytest.raises(CandidateError, match=said):
        factorize(found.graph, rank, found.moments)
