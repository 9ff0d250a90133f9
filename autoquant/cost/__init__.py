"""What a candidate costs, predicted before anything is built."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.bank import Bank
from autoquant.compress.qdq import Plan, plan, resolve
from autoquant.cost import static
from autoquant.cost.roofline import RooflineModel
from autoquant.graph import Graph, Layer
from autoquant.result import Cost

__all__ = ["CostModel", "DeviceModel"]


class DeviceModel(Protocol):
    """Time and energy on a device: `table.TableModel`, `roofline.RooflineModel`."""

    @property
    def error(self) -> float:
        """Relative error on figures that did not set the model; NaN where it is not known."""
        ...

    def latency_ms(self, graph: Graph, candidate: Candidate, plan: Plan) -> float:
        """Milliseconds of one batch of a resolved, planned candidate."""
        ...

    def energy_mj(self, graph: Graph, candidate: Candidate, plan: Plan) -> float | None:
        """Millijoules of one sample; None where the model does not know."""
        ...

    def layer_ms(self, graph: Graph, layer: Layer, choice: LayerChoice) -> float:
        """What one layer adds to the latency at a choice, boundaries left out."""
        ...


class CostModel:
    """Predicts every figure of `Cost` for resolved candidates of one graph.

    ``latency`` None leaves ``latency_ms`` and ``energy_mj`` None. ``bank``: the weights that
    `compress` will store, since some come with a bias. About a millisecond for 100 layers.
    """

    def __init__(
        self,
        graph: Graph,
        dialect: str,
        latency: DeviceModel | None = None,
        bank: Bank | None = None,
    ) -> None:
        self.graph, self.dialect, self.latency = graph, dialect, latency
        self.file_size = static.FileSize(graph, bank, dialect)

    def predict(self, candidate: Candidate) -> Cost:
        """The cost of a resolved candidate, for one sample (latency: one batch)."""
        where = plan(self.graph, candidate, self.dialect)
        packed, weights = static.weight_bytes(self.graph, candidate)
        size, stored = self.file_size.predict(candidate, where)
        return Cost(
            latency_ms=None
            if self.latency is None
            else self.latency.latency_ms(self.graph, candidate, where),
            size_bytes=size,
            weight_bytes=packed,
            average_weight_bits=8 * packed / max(1, weights),
            macs=self.graph.macs,
            bops=static.bops(self.graph, candidate),
            peak_memory_bytes=static.peak_memory_bytes(self.graph, where),
            energy_mj=None
            if self.latency is None
            else self.latency.energy_mj(self.graph, candidate, where),
            stored_bytes=stored,
        )

    def baseline(self) -> Cost:
        """The float network's cost; an analytic device's latency and energy are those of its
        widest kernels, since it may have none for float."""
        candidate = resolve(self.graph, Candidate())
        if not isinstance(self.latency, RooflineModel):
            return self.predict(candidate)
        without = CostModel(self.graph, self.dialect).predict(candidate)
        latency, energy = self.latency.widest()
        return replace(without, latency_ms=latency, energy_mj=energy)
