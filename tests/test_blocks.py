from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import NETWORKS, run

from autoquant.compress.blocks import Block, run_block, split
from autoquant.graph import Graph, prefix


def values(graph: Graph, block: Block, inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What the block reads, as torch tensors."""
    feeds = {name: torch.from_numpy(value) for name, value in inputs.items()}
    if block.source:
        part = prefix(graph.model, block.source)
        fed = [inputs[value.name] for value in part.graph.input]
        feeds[block.source] = torch.from_numpy(run(part, *fed)[0])
    return feeds


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_layer_is_in_one_block_in_order(name: str) -> None:
    graph = NETWORKS[name]().graph
    found = [layer.name for block in split(graph) for layer in block.layers]
    assert found == [layer.name for layer in graph.layers]
    for block in split(graph):
        assert {layer.node for layer in block.layers} <= set(block.nodes)
        assert list(block.nodes) == sorted(block.nodes)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_torch_gives_what_onnxruntime_gives(name: str) -> None:
    net = NETWORKS[name]()
    inputs = dict(zip(net.graph.inputs, net.inputs, strict=True))
    for block in split(net.graph):
        feeds = values(net.graph, block, inputs)
        got = run_block(net.graph, block, feeds).detach().numpy()
        part = prefix(net.graph.model, block.target)
        (expected, *_) = run(part, *[inputs[value.name] for value in part.graph.input])
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_a_sum_and_what_it_joins_are_one_block() -> None:
    graph = NETWORKS["residual"]().graph
    for node in graph.nodes:
        if node.op_type == "Add":
            index = graph.producer[node.output[0]]
            (block,) = [b for b in split(graph) if index in b.nodes]
            assert all(
                graph.producer[n] in block.nodes or n == block.source
                for n in node.input
                if n in graph.producer
            )
