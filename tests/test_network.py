"""The torch form of a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Weights, build, node, run
from test_prune import IMAGES, WORDS, evidence

from autoquant.calibration import Calibration
from autoquant.compress.network import Network
from autoquant.errors import ModelError
from autoquant.graph import Graph


def given(network: str) -> Calibration:
    found = evidence(network)
    return Calibration({}, dict(found.moments), (), len(IMAGES), "minmax")


@pytest.mark.parametrize("network", ["convolutions", "attention"])
@pytest.mark.parametrize("normalized", [False, True])
def test_it_computes_what_the_graph_does(network: str, normalized: bool) -> None:
    graph, data = evidence(network).graph, IMAGES if network == "convolutions" else WORDS
    module = Network(graph, given(network) if normalized else None).eval()
    assert bool(module.norms) == (normalized and network == "convolutions")
    expected = run(graph.model, data)[0]
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.from_numpy(data)).numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(run(module.model(), data)[0], expected, atol=1e-4)


def test_what_was_trained_is_in_the_model() -> None:
    graph = evidence().graph
    module = Network(graph, given("convolutions"))
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    data = torch.from_numpy(IMAGES)
    module.train()
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(data), torch.arange(96) % 5).backward()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        expected = module(data).numpy()
    assert np.abs(expected - run(graph.model, IMAGES)[0]).max() > 0.05
    trained = Graph.read(module.model(), [IMAGES])
    np.testing.assert_allclose(run(trained.model, IMAGES)[0], expected, atol=1e-3)
    assert [x.name for x in trained.layers] == [x.name for x in graph.layers]


def test_an_operator_that_torch_is_not_told_of_is_named() -> None:
    model = build(
        [
            node("Conv", ["x", "c.weight"], ["c"]),
            node("ThresholdedRelu", ["c"], ["y"], name="odd"),
        ],
        {"c.weight": Weights(1)(2, 3, 1, 1)},
        {"x": ["N", 3, 8, 8]},
        ["y"],
    )
    module = Network(Graph.read(model, [IMAGES]))
    with pytest.raises(ModelError, match=r"no operator for ThresholdedRelu \('odd'\)"):
        module(torch.from_numpy(IMAGES))
