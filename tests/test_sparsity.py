"""Sparse and clustered weights, and their artifacts."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import NETWORKS
from hypothesis import given
from hypothesis import strategies as st

from autoquant.candidate import LayerChoice
from autoquant.compress.coding import compress, decompress
from autoquant.compress.readback import packed_weight, read_bits
from autoquant.compress.sparsity import gradual, keep_mask, kmeans
from autoquant.cost import CostModel
from autoquant.errors import CandidateError
from autoquant.runtime import kernels


@given(st.integers(1, 5), st.integers(1, 30), st.floats(0, 0.99))
def test_a_mask_keeps_the_highest(rows: int, inputs: int, share: float) -> None:
    scores = np.random.default_rng(0).random((rows, inputs))
    mask = keep_mask(scores, share)
    assert (~mask).sum() == round(share * scores.size)
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


def test_a_pattern_keeps_two_of_four() -> None:
    mask = keep_mask(np.random.default_rng(0).random((3, 16)), "2:4")
    assert (mask.reshape(3, 4, 4).sum(2) == 2).all()


def test_a_pattern_goes_along_the_input_channels_of_each_kernel_position() -> None:
    mask = keep_mask(np.random.default_rng(0).random((3, 8 * 9)), "2:4", taps=9)
    by_tap = mask.reshape(3, 2, 4, 9)
    assert (by_tap.sum(2) == 2).all()


def test_pruning_is_gradual() -> None:
    shares = [gradual(0.8, step / 10) for step in range(12)]
    assert shares[0] == 0 and shares[-1] == shares[-2] == pytest.approx(0.8)
    steps = np.diff(shares[:11])
    assert (steps > 0).all() and (np.diff(steps) < 0).all()


def test_clusters_are_found() -> None:
    values = np.repeat([-3.0, 0.5, 7.0], 50) + np.random.default_rng(0).normal(0, 0.01, 150)
    assert kmeans(values, 3) == pytest.approx([-3, 0.5, 7], abs=0.01)


@pytest.mark.parametrize("bad", ["4:2", "2:", 1, -0.1, True])
def test_other_sparsities_are_refused(bad: object) -> None:
    with pytest.raises(CandidateError, match="sparsity is"):
        LayerChoice(4, 8, sparsity=bad)  # type: ignore[arg-type]


def test_a_codebook_of_8_bits_is_refused() -> None:
    with pytest.raises(CandidateError, match="codebook needs weight_bits 2 to 7"):
        LayerChoice(8, 8, codebook=True)


def test_the_key_is_that_of_before_without_them() -> None:
    assert LayerChoice(4, 8).to_dict() == {"weight_bits": 4, "activation_bits": 8}


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"embedding"}))
@pytest.mark.parametrize("activation_bits", [8, 32])
def test_every_kind_of_network_can_be_sparse_and_clustered(name: str, activation_bits: int) -> None:
    net = NETWORKS[name]()
    choice = LayerChoice(4, activation_bits, codebook=True, sparsity=0.5)
    layers = {x.name: choice for x in net.graph.layers}
    for layer in net.graph.layers:
        if layer.kind == "Gather":
            layers[layer.name] = LayerChoice(4, 32, sparsity=0.5)
    candidate = net.resolved(layers)
    model = net.assemble(candidate)
    outputs = net.run(model)
    assert all(np.isfinite(y).all() for y in outputs)
    data = model.SerializeToString(deterministic=True)
    predicted = CostModel(net.graph, "onnxruntime", bank=net.bank).predict(candidate)
    assert predicted.size_bytes == pytest.approx(len(data), rel=0.01, abs=70)
    stored = compress(data)
    assert decompress(stored) == data
    assert predicted.stored_bytes == pytest.approx(len(stored), rel=0.25)  # files of a kilobyte
    for layer in net.graph.layers:
        stored = packed_weight(model, layer.name)
        if stored is not None and layer.kind != "Gather":
            assert (stored == 0).mean() >= 0.5 - 1 / stored.size


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_codebook_runs_the_int8_kernel(bits: int, sparsity: float) -> None:
    net = NETWORKS["conv2d"]()
    layer = net.graph.layers[0]
    candidate = net.resolved(net.uniform(bits, 8, codebook=True, sparsity=sparsity))
    model = net.assemble(candidate)
    assert kernels(model.SerializeToString())["QLinearConv"] == 1
    assert read_bits(model, [layer.name]) == {layer.name: (bits, 8)}
    entry = net.bank.get(layer, candidate.choice(layer.name))
    stored = packed_weight(model, layer.name)
    assert stored is not None and (stored == entry.values).all()
    assert len(np.unique(stored)) <= 2**bits
    assert (stored == 0).mean() >= sparsity - 0.5 / stored.size
    data = model.SerializeToString(deterministic=True)
    assert decompress(compress(data)) == data
    predicted = CostModel(net.graph, "onnxruntime", bank=net.bank).predict(candidate)
    assert predicted.size_bytes == pytest.approx(len(data), rel=0.01, abs=70)
