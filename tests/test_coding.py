"""Entropy coding: round trips, sizes, damaged files."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from autoquant.compress import coding
from autoquant.errors import PackageError
from autoquant.task import Array


@st.composite
def symbols(draw: st.DrawFn) -> Array:
    """Symbols of one of several spreads, from one value to all 256."""
    count = draw(st.integers(1, 3000))
    levels = draw(st.integers(1, 256))
    share = draw(st.sampled_from([0.0, 0.5, 0.9, 0.999]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    found = random.integers(0, levels, count)
    return np.where(random.random(count) < share, levels // 2, found).astype(np.uint8)


@given(symbols())
@settings(max_examples=60, deadline=None)
def test_symbols_come_back(found: Array) -> None:
    lengths = coding.code_lengths(np.bincount(found))
    data = coding.encode(found, lengths)
    assert (coding.decode(data, lengths, len(found)) == found).all()
    assert len(data) == -(-int(lengths[found].astype(int).sum()) // 8)


@given(symbols())
@settings(max_examples=60, deadline=None)
def test_a_code_is_within_a_bit_of_the_entropy(found: Array) -> None:
    counts = np.bincount(found)
    lengths = coding.code_lengths(counts)
    share = counts[counts > 0] / len(found)
    entropy = -(share * np.log2(share)).sum()
    mean = lengths[found].mean()
    assert entropy - 1e-9 <= mean <= entropy + 1
    assert (2.0 ** -lengths[lengths > 0].astype(float)).sum() <= 1


def test_codes_stay_short() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(sum(fibonacci[-2:]))
    lengths = coding.code_lengths(np.array(fibonacci))
    assert lengths.min() > 0 and lengths.max() <= coding.LONGEST


def model(values: Array) -> bytes:
    """A graph with one int8 weight."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.INT8, list(values.shape))],
        [numpy_helper.from_array(values, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString(deterministic=True))


@given(symbols())
@settings(max_examples=40, deadline=None)
def test_a_model_comes_back(found: Array) -> None:
    before = model((found.astype(np.int16) - 128).astype(np.int8))
    assert coding.decompress(coding.compress(before)) == before


def test_sparse_weights_are_stored_by_their_gaps() -> None:
    random = np.random.default_rng(0)
    values = random.integers(1, 9, 20_000)
    values[random.random(20_000) < 0.95] = 0
    share = 0.05
    entropy = -share * np.log2(share / 8) - 0.95 * np.log2(0.95)
    size = len(coding.compress(model(values.astype(np.int8)))) - len(
        coding.compress(model(np.zeros(20_000, np.int8)))
    )
    assert size < 20_000 * (entropy + 0.02) / 8 + 64  # one bit a zero would be 2,375 bytes more


def test_a_file_that_others_wrote_comes_back() -> None:
    odd = model(np.ones(200, np.int8)) + b"\xfa\x06\x01x"  # a field that ONNX has not
    assert coding.decompress(coding.compress(odd)) == odd


def test_damage_is_named() -> None:
    random = np.random.default_rng(1)
    whole = coding.compress(model(random.integers(-8, 8, 4000).astype(np.int8)))
    with pytest.raises(PackageError, match="does not begin with AQZ1"):
        coding.decompress(b"PK\3\4")
    with pytest.raises(PackageError, match="ends early"):
        coding.decompress(whole[:-10])
    with pytest.raises(PackageError, match="no ONNX file"):
        coding.compress(b"no model")
    for place in range(4, len(whole), 37):
        broken = bytearray(whole)
        broken[place] ^= 0x41
        with pytest.raises(PackageError):
            coding.decompress(bytes(broken))


def test_onnx_still_reads_what_was_unpacked() -> None:
    before = model(np.arange(-100, 100, dtype=np.int8))
    found = onnx.load_from_string(coding.decompress(coding.compress(before)))
    assert numpy_helper.to_array(found.graph.initializer[0]).tolist() == list(range(-100, 100))


def test_the_scale_of_a_bias_is_not_stored_where_it_follows() -> None:
    net = NETWORKS["residual"]()
    model = net.assemble(net.uniform(8, 8))
    data = model.SerializeToString(deterministic=True)
    stored = coding.compress(data)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = tensors["conv1.b.s"]
    scale.raw_data = (1.001 * np.frombuffer(scale.raw_data, np.float32)).tobytes()
    other = model.SerializeToString(deterministic=True)
    assert coding.decompress(stored) == data
    assert coding.decompress(coding.compress(other)) == other
    assert len(coding.compress(other)) > len(stored) + 2 * len(scale.raw_data) // 3
