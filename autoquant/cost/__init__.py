"""What a candidate costs, predicted before anything is built."""

from __future__ import annotations

from autoquant.candidate import Candidate
from autoquant.compress.bank import Bank
from autoquant.compress.qdq import plan
from autoquant.cost import static
from autoquant.cost.table import TableModel
from autoquant.graph import Graph
from autoquant.result import Cost

__all__ = ["CostModel"]


class CostModel:
    """Predicts every figure of `Cost` for resolved candidates of one graph.

    ``latency`` None leaves ``latency_ms`` None. ``bank``: the weights that `compress` will
    store, since some come with a bias. About a millisecond for 100 layers.
    """

    def __init__(
        self,
        graph: Graph,
        dialect: str,
        latency: TableModel | None = None,
        bank: Bank | None = None,
    ) -> None:
        self.graph, self.dialect, self.latency = graph, dialect, latency
        self.file_size = static.FileSize(graph, bank)

    def predict(self, candidate: Candidate) -> Cost:
        """The cost of a resolved candidate, for one sample (latency: one batch)."""
        where = plan(self.graph, candidate, self.dialect)
        stored, weights = static.weight_bytes(self.graph, candidate)
        return Cost(
            latency_ms=None
            if self.latency is None
            else self.latency.latency_ms(self.graph, candidate, where),
            size_bytes=self.file_size.predict(candidate, where),
            weight_bytes=stored,
            average_weight_bits=8 * stored / max(1, weights),
            macs=self.graph.macs,
            bops=static.bops(self.graph, candidate),
            peak_memory_bytes=static.peak_memory_bytes(self.graph, where),
        )
