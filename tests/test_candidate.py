from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.candidate import (
    ACTIVATION_BITS,
    FLOAT,
    GRANULARITIES,
    NBITS,
    ROUNDING_NAMES,
    WEIGHT_BITS,
    Candidate,
    LayerChoice,
    block_size,
)
from autoquant.errors import CandidateError


@st.composite
def choices(draw: st.DrawFn) -> LayerChoice:
    weight_bits = draw(st.sampled_from(WEIGHT_BITS))
    activation_bits = draw(st.sampled_from(ACTIVATION_BITS))
    granularity = draw(st.sampled_from(GRANULARITIES))
    is_block = bool(block_size(granularity))
    nbits = is_block and weight_bits in NBITS and activation_bits in (8, 32)
    nbits = nbits and draw(st.booleans())
    if is_block and not nbits and max(weight_bits, activation_bits) <= 8:
        granularity = "channel"
    return LayerChoice(
        weight_bits,
        activation_bits,
        granularity=granularity,
        nbits=nbits,
        symmetric=draw(st.booleans()),
        dynamic=weight_bits <= 8 and activation_bits == 8 and draw(st.booleans()),
        int16=draw(st.booleans()),
        rounding=draw(st.none() | st.sampled_from(ROUNDING_NAMES)),
    )


names = st.text(min_size=1, max_size=8)
candidates = st.builds(
    Candidate,
    layers=st.dictionaries(names, choices(), max_size=5),
    pruning=st.dictionaries(names, st.floats(0, 0.9), max_size=2),
    rank=st.dictionaries(names, st.integers(1, 64), max_size=2),
    training=st.none() | st.fixed_dictionaries({"steps": st.integers(0, 9)}),
    polish=st.booleans(),
)


@given(candidates)
def test_json_gives_the_candidate_back(candidate: Candidate) -> None:
    again = Candidate.from_dict(json.loads(json.dumps(candidate.to_dict())))
    assert again.to_dict() == candidate.to_dict()
    assert again == candidate
    assert hash(again) == hash(candidate)


@given(choices())
def test_a_choice_is_written_with_both_bits_and_read_back(choice: LayerChoice) -> None:
    document = choice.to_dict()
    assert {"weight_bits", "activation_bits"} <= set(document)
    assert LayerChoice.from_dict(document) == choice


@given(candidates, st.randoms(use_true_random=False))
def test_the_key_ignores_order_and_float_layers(
    candidate: Candidate, generator: random.Random
) -> None:
    items = list(candidate.layers.items())
    generator.shuffle(items)
    spelled = Candidate(
        {**dict(items), "a layer left float": LayerChoice(32, 32, granularity="tensor")},
        {**candidate.pruning, "a group left whole": 0.0},
        candidate.rank,
        candidate.training,
        candidate.polish,
    )
    assert spelled.key == candidate.key
    assert spelled == candidate


def test_the_key_sees_what_has_an_effect() -> None:
    base = Candidate({"a": LayerChoice(4, 8)})
    others = [
        Candidate(),
        Candidate({"b": LayerChoice(4, 8)}),
        Candidate({"a": LayerChoice(3, 8)}),
        Candidate({"a": LayerChoice(4, 4)}),
        Candidate({"a": LayerChoice(4, 8, granularity="tensor")}),
        Candidate({"a": LayerChoice(4, 8, symmetric=True)}),
        Candidate({"a": LayerChoice(4, 8, dynamic=True)}),
        Candidate({"a": LayerChoice(4, 8)}, pruning={"g": 0.5}),
        Candidate({"a": LayerChoice(4, 8)}, rank={"a": 3}),
        Candidate({"a": LayerChoice(4, 8)}, training={"epochs": 1}),
        Candidate({"a": LayerChoice(4, 8)}, polish=True),
    ]
    assert len({c.key for c in [base, *others]}) == len(others) + 1
    assert all(other != base for other in others)


def test_empty_parts_do_not_change_the_key() -> None:
    assert Candidate(training={}).key == Candidate().key
    assert Candidate({}, {}, {}, None, False).key == Candidate().key


def test_the_key_is_the_same_in_every_process() -> None:
    """Runs are resumed and shared: a key must not depend on the hash seed."""
    document = {"layers": {name: {"weight_bits": 4} for name in "abc"}}
    code = f"from autoquant.candidate import *; print(Candidate.from_dict({document!r}).key)"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {Candidate.from_dict(document).key}


def test_what_a_candidate_leaves_out_is_float() -> None:
    candidate = Candidate({"a": LayerChoice(4, 8)})
    assert candidate.choice("b") == FLOAT
    assert candidate.choice("b").is_float and not candidate.choice("a").is_float
    assert LayerChoice.from_dict({"weight_bits": 4}) == LayerChoice(4, 32)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (LayerChoice(), "float"),
        (LayerChoice(4, 8), "4/8"),
        (LayerChoice(4, 32), "4/32"),
        (LayerChoice(8, 8, dynamic=True), "8/8 dynamic"),
        (LayerChoice(8, 8, "tensor", symmetric=True), "8/8 tensor symmetric"),
        (LayerChoice(16, 32, int16=True), "16/32 int16"),
    ],
)
def test_choices_have_a_short_form(choice: LayerChoice, text: str) -> None:
    assert str(choice) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_bits": 9}, "weight_bits is 9"),
        ({"weight_bits": True}, "weight_bits is True"),
        ({"weight_bits": 8.0}, "weight_bits is 8.0"),
        ({"weight_bits": "8"}, "weight_bits is '8'"),
        ({"weight_bits": None}, "weight_bits is None"),
        ({"activation_bits": 5}, "activation_bits is 5"),
        ({"granularity": "row"}, "granularity is 'row'"),
        ({"granularity": ["channel"]}, "granularity is"),
        ({"symmetric": 1}, "symmetric is 1"),
        ({"dynamic": "yes"}, "dynamic is 'yes'"),
        ({"weight_bits": 8, "dynamic": True}, "dynamic needs activation_bits 8"),
        ({"weight_bits": 16, "activation_bits": 8, "dynamic": True}, "dynamic needs"),
        ({"weight_bit": 8}, "'weight_bit'; did you mean 'weight_bits'"),
        ({1: 8}, "unknown field 1"),
    ],
)
def test_a_bad_field_is_named_with_its_layer(fields: dict[Any, Any], message: str) -> None:
    with pytest.raises(CandidateError) as caught:
        Candidate.from_dict({"layers": {"conv1": fields}})
    text = str(caught.value)
    assert "'conv1'" in text and message in text and "\n" not in text


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "expected a mapping"),
        ("x", "expected a mapping"),
        (None, "expected a mapping"),
        ({"layer": {}}, "did you mean 'layers'"),
        ({"layers": [1]}, "'layers' must map"),
        ({"layers": 0}, "'layers' must map"),
        ({"layers": {"a": 8}}, "layer 'a': expected fields"),
        ({"pruning": {"g": "half"}}, "pruning of 'g' is 'half'"),
        ({"pruning": {"g": 1.0}}, "pruning of 'g' is 1.0"),
        ({"pruning": {"g": float("nan")}}, "pruning of 'g' is nan"),
        ({"pruning": {"g": [1]}}, "pruning of 'g'"),
        ({"rank": {"a": 2.5}}, "rank of 'a' is 2.5"),
        ({"rank": {"a": 0}}, "rank of 'a' is 0"),
        ({"training": 3}, "'training' must be"),
        ({"polish": "no"}, "polish is 'no'"),
    ],
)
def test_a_bad_document_is_one_line_that_says_where(document: Any, message: str) -> None:
    with pytest.raises(CandidateError) as caught:
        Candidate.from_dict(document, where="c.yaml")
    text = str(caught.value)
    assert text.startswith("c.yaml: ") and message in text and "\n" not in text


def test_read_takes_yaml_and_json(tmp_path: Path) -> None:
    expected = Candidate({"conv1": LayerChoice(4, 8)})
    yaml_file, json_file = tmp_path / "c.yaml", tmp_path / "c.json"
    yaml_file.write_text("layers:\n  conv1: {weight_bits: 4, activation_bits: 8}\n")
    json_file.write_text(json.dumps(expected.to_dict()))
    assert Candidate.read(yaml_file) == Candidate.read(str(json_file)) == expected


def test_an_empty_file_is_the_float_network(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    assert Candidate.read(tmp_path / "c.yaml") == Candidate()


@pytest.mark.parametrize(
    "content", [b"layers: [", b"\xff\xfe", b"x: 2020-13-45", b"- 1", b"? [1]\n: 2"]
)
def test_a_file_that_does_not_parse_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(CandidateError, match=r"broken\.yaml") as caught:
        Candidate.read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match=r"none\.yaml"):
        Candidate.read(tmp_path / "none.yaml")


def test_normalized_changes_the_layers_alone() -> None:
    candidate = Candidate({"a": LayerChoice(4, 8)}, polish=True, pruning={"g": 0.5})
    changed = candidate.normalized({"b": LayerChoice(2, 8)})
    assert dict(changed.layers) == {"b": LayerChoice(2, 8)}
    assert changed.polish and dict(changed.pruning) == {"g": 0.5}
    assert dict(candidate.layers) == {"a": LayerChoice(4, 8)}


@pytest.mark.parametrize(
    "fields, wrong",
    [
        ({"weight_bits": 4, "nbits": True}, "nbits needs .* not 4, 32 and channel"),
        (
            {"weight_bits": 3, "granularity": "block32", "nbits": True},
            "nbits needs weight_bits 2, 4 or 8",
        ),
        (
            {"weight_bits": 4, "activation_bits": 16, "granularity": "block32", "nbits": True},
            "activation_bits 8 or 32",
        ),
        (
            {"weight_bits": 4, "activation_bits": 8, "granularity": "block32"},
            "granularity 'block32' needs activation_bits 16 or 32, or nbits",
        ),
        ({"weight_bits": 4, "granularity": "block16"}, "granularity is 'block16'"),
        ({"weight_bits": 4, "nbits": 1}, "nbits is 1"),
    ],
)
def test_blocks_need_a_kernel_that_has_them(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(CandidateError, match=wrong) as found:
        LayerChoice.from_dict(fields, "layer 'a'")
    assert str(found.value).startswith("layer 'a': ") and "\n" not in str(found.value)


def test_blocks_and_their_kernel_show_in_the_short_form() -> None:
    choice = LayerChoice(4, 8, "block64", dynamic=True, nbits=True)
    assert str(choice) == "4/8 block64 dynamic nbits"
    assert LayerChoice.from_dict(choice.to_dict()) == choice
    assert [block_size(g) for g in GRANULARITIES] == [0, 0, 32, 64, 128]


def test_a_rounding_is_hashed_where_it_has_an_effect() -> None:
    def key(weight_bits: int, rounding: str | None) -> str:
        return Candidate({"a": LayerChoice(weight_bits, 8, rounding=rounding)}).key

    assert len({key(4, name) for name in (None, *ROUNDING_NAMES)}) == 4
    assert key(16, "adaround") == key(16, None)
    assert "rounding" not in LayerChoice(4, 8).to_dict()
    assert LayerChoice(4, 8, rounding="nearest").to_dict()["rounding"] == "nearest"
    assert str(LayerChoice(4, 8, rounding="adaround")) == "4/8 adaround"


@pytest.mark.parametrize("bad", ["nearst", "", 3, True])
def test_an_unknown_rounding_names_the_layer_and_the_field(bad: Any) -> None:
    with pytest.raises(CandidateError, match=r"'a': rounding is .*second-order, adaround"):
        Candidate.from_dict({"layers": {"a": {"weight_bits": 4, "rounding": bad}}})


def test_the_bits_that_an_entropy_code_takes() -> None:
    assert LayerChoice(4, 8).stored_bits == 4 and FLOAT.stored_bits == 32
    half = LayerChoice(4, 8, sparsity=0.5).stored_bits  # which are zero, and 15 values
    assert half == pytest.approx(1 + 0.5 * math.log2(15))
    pattern = LayerChoice(4, 8, sparsity="2:4").stored_bits  # one of six patterns a four
    assert pattern == pytest.approx(math.log2(6) / 4 + 0.5 * math.log2(15))
    assert pattern < half < LayerChoice(4, 8, sparsity=0.1).stored_bits < 4
