"""Quantization-aware training: a graph in torch, with the quantizers of its artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoquant.compress.blocks import Block, Quantize, Unsupported, run_block
from autoquant.errors import ModelError
from autoquant.graph import Graph


class GraphNetwork:
    """A float graph as torch runs it, a `Network` without anything to train; taps are layers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        nodes = tuple(range(len(graph.nodes)))
        self.whole = Block("", graph.outputs[0], nodes, graph.layers)

    def run(
        self,
        inputs: tuple[Any, ...],
        taps: Sequence[str],
        weights: Mapping[str, Any] | None = None,
        biases: Mapping[str, Any] | None = None,
        quantize: Quantize | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """First output and taps. Raises ModelError for an operator that torch has no form of."""
        feeds = dict(zip(self.graph.inputs, inputs, strict=True))
        kept = {self.graph.by_name[name].output: None for name in taps}
        try:
            output = run_block(self.graph, self.whole, feeds, weights, biases, quantize, kept)
        except Unsupported as error:
            raise ModelError(f"training: no torch form of {error}; leave training out") from None
        return output, {name: kept[self.graph.by_name[name].output] for name in taps}

    def __call__(self, inputs: tuple[Any, ...], taps: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """See `Network`."""
        return self.run(inputs, taps)

    def groups(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def weights(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing but what tells the network from others."""
        import torch

        return {"fingerprint": torch.tensor(int(self.graph.fingerprint[:12], 16))}

    def layers(self) -> list[str]:
        """Layers of the graph."""
        return [layer.name for layer in self.graph.layers]

    def prepare(self, training: bool) -> None:
        """Nothing to do."""
