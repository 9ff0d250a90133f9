from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.document import builtin
from autoquant.errors import SpaceError
from autoquant.search.dimensions import candidate_of, option_of
from autoquant.space import Space, load_space


@dataclass(frozen=True)
class Named:
    name: str
    kind: str


LAYERS = [
    Named("stem.conv", "Conv"),
    Named("stem.up", "ConvTranspose"),
    Named("block.query", "MatMul"),
    Named("head", "Gemm"),
    Named("words", "Gather"),
]


def _space(folder: Path, text: str) -> Space:
    path = folder / "own.yaml"
    path.write_text(text)
    return load_space(path)


def _short(space: Space) -> dict[str, list[str]]:
    return {name: [str(c) for c in found] for name, found in space.choices(LAYERS).items()}


def test_the_shipped_spaces_are_those_of_the_documentation() -> None:
    assert set(builtin("search_spaces")) >= {"int8", "mixed", "low-bit", "weight-only"}


@pytest.mark.parametrize(
    ("name", "conv", "gather"),
    [
        ("int8", ["8/8", "float"], ["8/32", "float"]),
        (
            "mixed",
            ["2/8", "3/8", "4/8", "6/8", "8/8", "float"],
            ["4/32", "6/32", "8/32", "float"],
        ),
        ("low-bit", ["2/4", "2/8", "3/4", "3/8", "4/4", "4/8"], ["3/32", "4/32"]),
        (
            "weight-only",
            ["2/32", "3/32", "4/32", "6/32", "8/32", "16/32", "float"],
            ["2/32", "3/32", "4/32", "6/32", "8/32", "16/32", "float"],
        ),
    ],
)
def test_the_choices_of_the_shipped_spaces(name: str, conv: list[str], gather: list[str]) -> None:
    space = load_space(name)
    assert space.name == name and space.description
    found = _short(space)
    assert found["stem.conv"] == found["head"] == found["block.query"] == conv
    assert found["words"] == gather


def test_the_last_rule_that_matches_decides(tmp_path: Path) -> None:
    space = _space(
        tmp_path,
        """
        rules:
          - {weight_bits: 8, activation_bits: 8}
          - {layers: "stem.*", weight_bits: 4, activation_bits: 8, float: true}
          - {layers: [stem.up, head], float: true}
        """,
    )
    found = _short(space)
    assert found["stem.conv"] == ["4/8", "float"]
    assert found["stem.up"] == found["head"] == ["float"]
    assert found["block.query"] == ["8/8"]


def test_a_layer_that_no_rule_matches_stays_float(tmp_path: Path) -> None:
    space = _space(tmp_path, "rules: [{layers: head, weight_bits: 8}]")
    assert space.choices(LAYERS)["stem.conv"] == (FLOAT,)


def test_a_rule_may_be_for_some_kinds(tmp_path: Path) -> None:
    text = "rules: [{kinds: [MatMul, Gemm], weight_bits: 8, activation_bits: 8, dynamic: true}]"
    found = _short(_space(tmp_path, text))
    assert found["head"] == found["block.query"] == ["8/8 dynamic"]
    assert found["stem.conv"] == ["float"]


def test_dynamic_is_for_products_at_eight_bits(tmp_path: Path) -> None:
    text = "rules: [{weight_bits: [4, 16], activation_bits: [8, 16], dynamic: true}]"
    found = _short(_space(tmp_path, text))
    assert found["head"] == ["4/8 dynamic", "4/16", "16/8", "16/16"]
    assert found["stem.conv"] == ["4/8", "4/16", "16/8", "16/16"]


def test_an_embedding_has_no_activations_and_no_choice_twice(tmp_path: Path) -> None:
    text = "rules: [{weight_bits: [4, 8], activation_bits: [4, 8, 16]}]"
    assert _short(_space(tmp_path, text))["words"] == ["4/32", "8/32"]


def test_choices_carry_the_settings_of_their_rule(tmp_path: Path) -> None:
    text = (
        "rules: [{weight_bits: [8, 16], activation_bits: 8, granularity: tensor, "
        "symmetric: true, int16: true}]"
    )
    assert _space(tmp_path, text).choices(LAYERS)["head"] == (
        LayerChoice(8, 8, "tensor", symmetric=True, int16=True),
        LayerChoice(16, 8, "tensor", symmetric=True, int16=True),
    )


def test_choices_come_in_order_whatever_the_file_says(tmp_path: Path) -> None:
    text = "rules: [{weight_bits: [8, 2, 4, 2], activation_bits: [16, 8]}]"
    found = _short(_space(tmp_path, text))["head"]
    assert found == ["2/8", "2/16", "4/8", "4/16", "8/8", "8/16"]


def test_thirty_two_bits_of_both_are_float(tmp_path: Path) -> None:
    found = _short(_space(tmp_path, "rules: [{weight_bits: [8, 32], activation_bits: [8, 32]}]"))
    assert found["head"] == ["8/8", "8/32", "32/8", "float"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{layers: tail, weight_bits: 8}]", "rule 1 .* matches no layer; there is: stem"),
        ("rules: [{weight_bits: 8, granularity: row}]", "granularity is 'row'"),
    ],
)
def test_a_rule_that_does_not_fit_the_network_is_named(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        _space(tmp_path, text).choices(LAYERS)
    assert "'own'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{weight_bits: 9}]", "9 is not one of 2, 3"),
        ("rules: [{weight_bits: [8, x]}]", "valid integer"),
        ("rules: [{activation_bits: 5}]", "5 is not one of 3, 4, 6"),
        ("rules: [{weight_bits: true}]", "weight_bits"),
        ("rules: [{kinds: [Convolution]}]", "'Convolution' is not one of Conv"),
        ("rules: [{weight_bit: 8}]", "did you mean 'weight_bits'"),
        ("rules: []", "at least 1"),
        ("rule: []", "rules"),
    ],
)
def test_a_space_that_does_not_parse_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        _space(tmp_path, text)
    assert "own.yaml:1: " in str(caught.value)


def test_a_space_is_named_after_its_file_unless_it_says(tmp_path: Path) -> None:
    assert _space(tmp_path, "rules: [{float: true}]").name == "own"
    space = _space(tmp_path, "name: mine\nrules: [{float: true}]")
    assert space.name == "mine"
    assert load_space(space) is space


def test_an_unknown_space_offers_what_is_close() -> None:
    with pytest.raises(SpaceError, match="did you mean 'mixed'"):
        load_space("mixd")


def test_rescalings_are_off_unless_asked_for(tmp_path: Path) -> None:
    plain = _space(tmp_path, "rules: [{weight_bits: 8}]")
    assert (plain.equalize, plain.smooth) == (False, None)
    text = "equalize: true\nsmooth: 0.5\ncalibration: downstream\nrules: [{weight_bits: 8}]"
    found = _space(tmp_path, text)
    assert (found.equalize, found.smooth, found.calibration) == (True, 0.5, "downstream")


@pytest.mark.parametrize("value", ["-0.1", "1.5", "much"])
def test_alpha_lies_between_0_and_1(tmp_path: Path, value: str) -> None:
    with pytest.raises(SpaceError, match=r"own.yaml:1: smooth"):
        _space(tmp_path, f"smooth: {value}\nrules: [{{weight_bits: 8}}]")


def test_products_of_activations_are_asked_for_by_their_kind(tmp_path: Path) -> None:
    layers = [Named("fc", "MatMul"), Named("scores", "Product")]

    def found(rules: str) -> tuple[LayerChoice, ...]:
        return _space(tmp_path, rules).choices(layers)["scores"]

    assert found("rules: [{weight_bits: 8, activation_bits: 8}]") == (FLOAT,)
    assert found("rules: [{kinds: [MatMul], weight_bits: 8, activation_bits: 8}]") == (FLOAT,)
    eight = LayerChoice(32, 8)
    assert found("rules: [{kinds: [Product], activation_bits: [4, 8]}]") == (eight,)
    both = "kinds: [MatMul, Product], weight_bits: 4, activation_bits: 8, float: true"
    assert found(f"rules: [{{{both}}}]") == (eight, FLOAT)
    assert found("rules: [{kinds: [Product], weight_bits: 4}]") == (FLOAT,)


def test_blocks_come_with_the_kernels_that_have_them(tmp_path: Path) -> None:
    rule = "weight_bits: [3, 4], activation_bits: [8, 32], granularity: [channel, block32]"
    plain = _space(tmp_path, f"rules: [{{{rule}}}]").choices([Named("fc", "MatMul")])["fc"]
    assert [str(c) for c in plain] == ["3/8", "3/32", "3/32 block32", "4/8", "4/32", "4/32 block32"]
    layers = [Named("fc", "MatMul"), Named("conv", "Conv")]
    found = _space(tmp_path, f"rules: [{{{rule}, nbits: true}}]").choices(layers)
    assert [str(c) for c in found["fc"]] == [
        "3/8",
        "3/32",
        "3/32 block32",
        "4/8",
        "4/8 block32 dynamic nbits",
        "4/32",
        "4/32 block32 nbits",
    ]
    assert found["conv"] == plain


def test_a_rule_may_offer_several_roundings(tmp_path: Path) -> None:
    space = _space(
        tmp_path,
        """
        rules:
          - {weight_bits: [4, 16], activation_bits: 32, rounding: [second-order, adaround]}
          - {layers: head, weight_bits: 4, rounding: nearest}
        """,
    )
    found = _short(space)
    assert found["stem.conv"] == ["4/32 second-order", "4/32 adaround", "16/32"]
    assert found["head"] == ["4/32 nearest"]


def test_a_space_takes_adaround_and_refuses_what_is_no_rounding(tmp_path: Path) -> None:
    space = _space(tmp_path, "rounding: adaround\nrules: [{weight_bits: 4}]")
    assert space.rounding == "adaround"
    with pytest.raises(SpaceError, match="rounding"):
        _space(tmp_path, "rounding: best\nrules: [{weight_bits: 4}]")
    with pytest.raises(SpaceError, match="'best' is not one of nearest, second-order, adaround"):
        _space(tmp_path, "rules: [{weight_bits: 4, rounding: best}]")


def test_ties_and_forbidden_pairs_are_read_and_checked(tmp_path: Path) -> None:
    rules = "rules: [{weight_bits: 8}]\n"
    found = _space(
        tmp_path,
        rules + "tie: [residual, [head, 'block.*']]\n"
        "forbid: [[{layers: head, weight_bits: 2}, {layers: stem.conv, activation_bits: [4]}]]\n",
    )
    assert found.tie == ("residual", ("head", "block.*"))
    first, second = found.forbid[0]
    assert first.matches("head", LayerChoice(2, 8)) and not first.matches("head", LayerChoice(3, 8))
    assert second.matches("stem.conv", LayerChoice(8, 4)) and not second.matches("head", FLOAT)
    with pytest.raises(SpaceError, match=r"own.yaml:2: tie: 'resdual' is not one of residual, att"):
        _space(tmp_path, rules + "tie: [resdual]\n")
    with pytest.raises(SpaceError, match=r"own.yaml:2: forbid.*11 is not one of"):
        _space(tmp_path, rules + "forbid: [[{weight_bits: 11}, {layers: a}]]\n")


# --- structure and training -------------------------------------------------------------------

STRUCTURE = """
rules: [{weight_bits: 8, activation_bits: 8}]
pruning:
  - {ratios: [0, 0.5, 0.25]}
  - {groups: [stem, "layer?.*"], ratios: 0.5}
rank: [{layers: "layer1.*", ranks: [full, 0.5, 8, "cp:4", separable, vbmf]}]
drop: "layer1.*"
student: {width: [0.5, 1]}
importance: [l1, taylor]
training: {steps: [0, 200], learning_rate: 0.01}
"""


def test_structure_is_offered_by_name_patterns(tmp_path: Path) -> None:
    space = _space(tmp_path, STRUCTURE)
    assert space.is_structural
    assert space.ratios(["stem", "layer1.0", "head"]) == {
        "stem": (0.5,),
        "layer1.0": (0.5,),
        "head": (0.5, 0.25, 0.0),
    }
    ranks = ("full", 0.5, 8, "cp:4", "separable", "vbmf")
    assert space.ranks(["stem", "layer1.0"]) == {"layer1.0": ranks}
    assert space.dropped(["layer1.0", "layer2.0"]) == ["layer1.0"]
    assert space.training.dimensions() == {
        "train:steps": (0, 200),
        "train:learning_rate": (0.01,),
    }


def test_hints_are_one_value_and_their_weight_is_a_choice(tmp_path: Path) -> None:
    base = "rules: [{weight_bits: 8}]\ntraining:\n  steps: 20\n  hints: [stem, head]\n"
    space = _space(tmp_path, f"{base}  hint_weight: [0, 1]\n")
    assert space.training.dimensions() == {
        "train:steps": (20,),
        "train:hints": (("stem", "head"),),
        "train:hint_weight": (0, 1),
    }
    picks = {name: values[-1] for name, values in space.training.dimensions().items()}
    candidate = candidate_of(picks)
    again = Candidate.from_dict(json.loads(json.dumps(candidate.to_dict())), "here")
    assert again.key == candidate.key
    for name, values in space.training.dimensions().items():
        assert option_of(again, name, values) == picks[name]
    halving = _space(tmp_path, f"{base}  halving: true\n")
    assert halving.training.ladder() == [{"hints": ("stem", "head"), "steps": 20}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pruning: [{ratios: 1.0}]", "pruning.0.ratios: 1.0 is not a ratio from 0 to below 1"),
        ("rank: [{ranks: [1.5]}]", "rank.0.ranks: 1.5 is not a rank"),
        ("rank: [{ranks: ['cp:0']}]", "rank.0.ranks: 'cp:0' is not a rank"),
        ("importance: l3", "importance: 'l3' is not one of l1, l2"),
        ("training: {steps: -1}", "training: steps is -1; it can be a whole number from 0"),
        ("training: {teacher: [float, me]}", "training: teacher is 'me'; it can be float, task"),
        ("training: {steps: 1, epochs: 1}", "training: give steps or epochs, not both"),
        ("training: {step: 1}", "step"),
    ],
)
def test_an_impossible_structure_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpaceError) as caught:
        _space(tmp_path, f"rules: [{{weight_bits: 8}}]\n{text}")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_pattern_without_a_match_names_the_nearest(tmp_path: Path) -> None:
    space = _space(tmp_path, STRUCTURE)
    with pytest.raises(SpaceError, match=r"pruning: rule 2: 'stem' matches none; .*'steam'"):
        space.ratios(["steam", "layer1.0"])
    with pytest.raises(SpaceError, match=r"rank: rule 1: 'layer1\.\*' matches none"):
        space.ranks(["head"])
    with pytest.raises(SpaceError, match="drop: 'layer1"):
        space.dropped(["layer2.0"])


def test_sparsities_and_codebooks_are_choices_beside_the_widths(tmp_path: Path) -> None:
    found = _short(
        _space(
            tmp_path,
            """
            rules:
              - weight_bits: [4, 16]
                activation_bits: 8
                sparsity: [0, 0.5, "2:4"]
                codebook_bits: 3
                float: true
              - layers: "head"
                weight_bits: 8
                activation_bits: 8
              - kinds: [Gather]
                weight_bits: 4
                sparsity: [0.75]
                codebook_bits: [2, 3]
            """,
        )
    )
    assert found["stem.conv"] == [
        "3/8 codebook sparse 2:4", "3/8 codebook sparse 0.5", "4/8 sparse 2:4", "4/8 sparse 0.5",
        "3/8 codebook", "4/8", "16/8", "float",
    ]  # fmt: skip
    assert found["head"] == ["8/8"]
    assert found["words"] == ["4/32 sparse 0.75"]  # an embedding has no codebook


def test_a_list_without_zero_offers_no_dense_weights(tmp_path: Path) -> None:
    text = "rules: [{weight_bits: [4, 32], activation_bits: [8], sparsity: 0.9}]"
    assert _short(_space(tmp_path, text))["stem.conv"] == ["4/8 sparse 0.9", "32/8"]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("sparsity: 1.0", "sparsity is 1.0; it can be the share of zeros from 0 to <1, or a patt"),
        ("sparsity: 2:4", "sparsity is 124.*; it can be .* a pattern in quotes such as '2:4'"),
        ('sparsity: ["4:2"]', "sparsity is '4:2'"),
        ("codebook_bits: 8", "8 is not one of 2, 3, 4, 5, 6, 7"),
    ],
)
def test_other_sparsities_and_codebooks_are_named(tmp_path: Path, field: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        _space(tmp_path, f"rules: [{{weight_bits: 4, activation_bits: 8, {field}}}]")
    assert "own.yaml:1" in str(caught.value) and "\n" not in str(caught.value)
