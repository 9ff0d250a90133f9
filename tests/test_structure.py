"""The structural part of a candidate, and trials of structures."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Weights, build, node, run
from test_channels import IMAGE, convolutions
from test_prune import evidence

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.compress.qdq import resolve
from autoquant.compress.structure import drop, droppable, structured, to_dict
from autoquant.cost.table import TableModel, signature
from autoquant.errors import CandidateError, SpaceError, TaskError
from autoquant.export import export, verify
from autoquant.graph import Graph
from autoquant.search import SearchSettings, search
from autoquant.search.trial import Context, prepare, run_trial
from autoquant.space import Space, TrainingRanges
from autoquant.task import Array, Task

INT8 = LayerChoice(8, 8)


def of(candidate: Candidate) -> Graph:
    return structured(convolutions(), candidate, evidence(), [IMAGE]).graph


# --- the graph --------------------------------------------------------------------------------


def test_pruning_and_rank_together_keep_names_and_outputs() -> None:
    candidate = Candidate(pruning={"inner": 0.5, "stem": 0.5}, rank={"back": 4, "left": 3})
    found = structured(convolutions(), candidate, evidence(), [IMAGE])
    graph = found.graph
    assert found.pieces["back"] == ("back.0", "back.1", "back.2")
    assert found.pieces["left"] == ("left.0", "left.1") and found.pieces["stem"] == ("stem",)
    assert graph.by_name["inner"].weight_shape == (6, 8, 3, 3)
    assert graph.by_name["depth"].group == 8 and graph.by_name["group"].weight_shape[:2] == (12, 2)
    assert graph.by_name["back.1"].weight_shape == (4, 4, 3, 3)
    assert run(graph.model, IMAGE)[0].shape == run(convolutions().model, IMAGE)[0].shape
    again = structured(convolutions(), candidate, evidence(), [IMAGE]).graph
    assert again.fingerprint == graph.fingerprint


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(pruning={"inner": 0.5, "stem": 0.5}, rank={"back": 4, "left": 3}),
        Candidate(rank={"back": "cp:5", "left": 2}),
        Candidate(rank={"back": "separable"}, pruning={"inner": 0.25}, importance="activation"),
    ],
    ids=["pruned and Tucker", "polyadic", "separable"],
)
def test_without_fits_only_the_weights_differ(candidate: Candidate) -> None:
    real = structured(convolutions(), candidate, evidence(), [IMAGE])
    quick = structured(convolutions(), candidate, evidence(), [IMAGE], fitted=False)
    assert quick.pieces == real.pieces
    assert [n.op_type for n in quick.graph.nodes] == [n.op_type for n in real.graph.nodes]
    for one, other in zip(quick.graph.layers, real.graph.layers, strict=True):
        assert replace(one, bias=None) == replace(other, bias=None)
        assert (one.bias is None) == (other.bias is None)
    shapes = {n: t.shape for n, t in real.graph.tensors.items()}
    assert {n: t.shape for n, t in quick.graph.tensors.items()} == shapes


def test_a_rank_that_pruning_leaves_no_room_for_changes_nothing() -> None:
    pruned = of(Candidate(pruning={"inner": 0.75}))
    assert of(Candidate(pruning={"inner": 0.75}, rank={"back": 4})).fingerprint == (
        pruned.fingerprint
    )


def test_pieces_take_their_layers_choice_or_their_own() -> None:
    four = LayerChoice(4, 8)
    candidate = Candidate({"back": INT8, "back.1": four, "stem": INT8}, rank={"back": 4})
    found = structured(convolutions(), candidate, evidence(), [IMAGE]).choices(candidate)
    assert dict(found.layers) == {"stem": INT8, "back.0": INT8, "back.1": four, "back.2": INT8}
    wrong = Candidate({"back.3": INT8}, rank={"back": 4})
    with pytest.raises(CandidateError, match=r"unknown layer 'back.3'; did you mean"):
        structured(convolutions(), wrong, evidence(), [IMAGE]).choices(wrong)


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (Candidate(pruning={"iner": 0.5}), "unknown channel group 'iner'; did you mean 'inner'"),
        (Candidate(pruning={"inner": 0.99}), "none of its 12 units would be left"),
        (Candidate(rank={"back": 99}), "it can be at most 12"),
        (Candidate(drop=("block",)), "unknown block 'block' in drop; there is: none"),
    ],
)
def test_an_impossible_structure_is_one_line(candidate: Candidate, said: str) -> None:
    with pytest.raises(CandidateError, match=said):
        of(candidate)


def residual() -> onnx.ModelProto:
    """A stem and three residual blocks, the second of them wider."""
    w, same = Weights(12), {"pads": [1, 1, 1, 1]}
    weights: dict[str, Array] = {"stem.weight": w(6, 2, 3, 3), "head.weight": w(4, 8)}
    weights["stem.bias"], weights["head.bias"] = w.bias(6), w.bias(4)
    nodes = [
        node("Conv", ["x", "stem.weight", "stem.bias"], ["s"], **same),
        node("Relu", ["s"], ["t0"]),
    ]
    for i, (inputs, count) in enumerate(((6, 6), (6, 8), (8, 8))):
        name = f"blocks.{i}"
        for part, shape in (("a", (5, inputs, 3, 3)), ("b", (count, 5, 3, 3))):
            weights[f"{name}.{part}.weight"] = 0.5 * w(*shape)
            weights[f"{name}.{part}.bias"] = w.bias(shape[0])
        nodes += [
            node("Conv", [f"t{i}", f"{name}.a.weight", f"{name}.a.bias"], [f"a{i}"], **same),
            node("Relu", [f"a{i}"], [f"r{i}"]),
            node("Conv", [f"r{i}", f"{name}.b.weight", f"{name}.b.bias"], [f"b{i}"], **same),
        ]
        skip = f"t{i}"
        if inputs != count:
            weights[f"{name}.skip.weight"] = w(count, inputs, 1, 1)
            nodes.append(node("Conv", [skip, f"{name}.skip.weight"], [f"k{i}"]))
            skip = f"k{i}"
        nodes += [node("Add", [f"b{i}", skip], [f"u{i}"]), node("Relu", [f"u{i}"], [f"t{i + 1}"])]
    nodes += [
        node("GlobalAveragePool", ["t3"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    return build(nodes, weights, {"x": ["N", 2, 8, 8]}, ["y"])


def test_blocks_of_one_shape_can_be_dropped() -> None:
    data = np.random.default_rng(0).normal(size=(3, 2, 8, 8)).astype(np.float32)
    graph = Graph.read(residual(), [data])
    assert droppable(graph) == {"blocks.0": ("t0", "t1"), "blocks.2": ("t2", "t3")}
    assert to_dict(graph)["blocks"] == ["blocks.0", "blocks.2"]
    shorter = Graph.read(drop(graph, ["blocks.0"]), [data])
    names = [x.name for x in shorter.layers]
    assert not any(n.startswith("blocks.0") for n in names) and len(names) == 7
    without = residual()
    for proto in without.graph.initializer:
        if proto.name.startswith("blocks.0.b"):  # the branch adds nothing
            array = np.zeros_like(onnx.numpy_helper.to_array(proto))
            proto.CopyFrom(onnx.numpy_helper.from_array(array, proto.name))
    np.testing.assert_allclose(run(shorter.model, data)[0], run(without, data)[0], atol=1e-5)
    both = Graph.read(drop(graph, ["blocks.2", "blocks.0"]), [data])
    assert [x.name for x in both.layers] == [n for n in names if "blocks.2" not in n]


# --- trials -----------------------------------------------------------------------------------

SPACE = Space.model_validate(
    {
        "name": "structures",
        "rules": [{"weight_bits": [4, 8], "activation_bits": 8, "float": True}],
        "pruning": [{"ratios": [0, 0.25, 0.5]}],
        "rank": [{"layers": "blocks.*", "ranks": ["full", 0.5, "separable"]}],
        "drop": ["blocks.*"],
    }
)


def test_the_kernels_of_what_a_space_offers_are_timed_beforehand(tmp_path: Path) -> None:
    """Every pair of channel counts in a layer, and each rank on channels as they are."""
    space = SPACE.model_copy(update={"drop": ()})
    found = prepare(task(tmp_path), space=space, seed=1)
    model = found.cost.latency
    assert isinstance(model, TableModel) and found.variants is not None
    groups = [n[6:] for n, o in found.options.items() if n.startswith("prune:") and len(o) > 1]
    ranks = {n[5:]: o[0] for n, o in found.options.items() if n.startswith("rank:")}
    generator = np.random.default_rng(0)
    several = [
        Candidate(pruning={g: float(generator.choice([0.25, 0.5])) for g in groups[:count]})
        for count in range(1, len(groups) + 1)
    ]
    timed = missing = 0
    for candidate in [*several, Candidate(rank=ranks)]:
        graph = found.variants.get(found, candidate).graph
        keys = [signature(graph, x, p) for x in graph.layers for p in ("float", "int8")]
        timed += sum(key in model.kernel_ms for key in keys)
        missing += sum(key not in model.kernel_ms for key in keys)
        result = found.predict(candidate)
        assert result.latency_ms is not None and result.latency_ms > 0
    assert missing <= 0.1 * timed  # three groups may meet where two were varied


class Small(torch.nn.Module):
    """A student of some width."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(2, width, 3, padding=1)
        self.head = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.stem(x).relu().mean((2, 3)))
        return found


def student(width: int = 4) -> torch.nn.Module:
    torch.manual_seed(width)
    return Small(width)


def task(folder: Path, **changes: Any) -> Task:
    path = folder / "residual.onnx"
    onnx.save(residual(), str(path))

    def data(seed: int) -> list[tuple[Array, Array]]:
        images = np.random.default_rng(seed).normal(size=(64, 2, 8, 8)).astype(np.float32)
        return [(images, run(residual(), images)[0].argmax(1))]

    fields: dict[str, Any] = {
        "name": "residual",
        "model": path,
        "example_inputs": (np.zeros((1, 2, 8, 8), np.float32),),
        "calibration": [x for x, _ in data(1)],
        "validation": data(2),
        "test": data(3),
        "student": student,
    }
    return Task(**{**fields, **changes})


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    space = SPACE.model_copy(update={"student": {"width": (3, None)}})
    folder = tmp_path_factory.mktemp("residual")
    return prepare(task(folder), space=space, latency=False, evaluation_workers=1)


def test_a_space_offers_structures_by_dimension(context: Context) -> None:
    options = context.options
    assert options["prune:blocks.0.a"] == pytest.approx((0.4, 0.2, 0))  # fewer than round_to
    assert options["prune:blocks.1.b"] == (0.0,)  # eight: none can go
    assert options["rank:blocks.2.b"] == ("separable", 2, None)
    assert options["drop:blocks.0"] == (True, False) and "drop:blocks.1" not in options
    assert options["student:width"] == (3, None) and options["importance"] == ("l2",)


ALL: dict[str, Any] = {
    "pruning": {"blocks.1.a": 0.4, "stem": 0.5},
    "rank": {"blocks.2.b": 2, "blocks.1.b": "separable"},
    "drop": ("blocks.0",),
}


def test_a_structural_trial_is_smaller_and_scored(context: Context) -> None:
    whole = run_trial(context, Candidate(dict.fromkeys(context.choices, INT8)), 0)
    candidate = Candidate(dict.fromkeys(context.choices, INT8), **ALL)
    found = run_trial(context, candidate, 1)
    assert found.status == "complete", found.error
    assert found.candidate.key == candidate.key and found.score is not None
    assert found.predicted is not None and whole.predicted is not None
    assert found.predicted.macs < 0.6 * whole.predicted.macs
    assert found.measured["size_bytes"] < whole.measured["size_bytes"]
    assert found.predicted.size_bytes == pytest.approx(found.measured["size_bytes"], rel=0.01)
    quick = context.predict(candidate)
    assert quick.macs == found.predicted.macs
    assert quick.size_bytes == pytest.approx(found.predicted.size_bytes, rel=0.1)
    real = context.variant(candidate)
    choices = resolve(real.graph, real.structured.choices(candidate))
    assert quick == real.estimate.predict(choices)


def test_a_structure_is_built_the_same_each_time_and_elsewhere(context: Context) -> None:
    candidate = Candidate(dict.fromkeys(context.choices, LayerChoice(4, 8)), **ALL)
    first = context.compress(candidate)
    elsewhere = pickle.loads(pickle.dumps(context))
    assert not elsewhere.variants.held
    assert elsewhere.compress(candidate).sha256 == first.sha256
    props = {p.key: p.value for p in onnx.load_from_string(first.model).metadata_props}
    assert props["autoquant.candidate"] == candidate.key


def test_a_polished_structure_is_a_trial(context: Context) -> None:
    candidate = Candidate(dict.fromkeys(context.choices, LayerChoice(4, 8)), polish=True, **ALL)
    found = run_trial(context, candidate, 0)
    assert found.status == "complete", found.error


def test_a_student_takes_the_networks_place(context: Context) -> None:
    layers = {"stem": LayerChoice(4, 8), "blocks.0.a": INT8, "head": INT8}
    found = run_trial(context, Candidate(layers, student={"width": 3}), 0)
    assert found.status == "complete", found.error
    assert found.predicted is not None and found.predicted.macs == 3 * (2 * 9 * 64 + 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pruning": {"blocks.1.a": 0.95}}, "none of its 5 units would be left"),
        ({"rank": {"blocks.1.a": 7}}, "it can be at most 5"),
        ({"drop": ("blocks.1",)}, "unknown block 'blocks.1' in drop"),
        ({"student": {"width": 0}}, "student(width=0) raised"),
        ({"student": {"depth": 3}}, "student(depth=3) raised TypeError"),
        ({"student": {"width": 3}, "drop": ("blocks.0",)}, "a student is neither pruned"),
    ],
)
def test_an_impossible_structure_is_a_failed_trial(
    context: Context, changes: dict[str, Any], said: str
) -> None:
    found = run_trial(context, Candidate(dict.fromkeys(context.choices, INT8), **changes), 0)
    assert found.status == "failed" and said in str(found.error) and "\n" not in str(found.error)


def test_a_run_without_structures_says_so(tmp_path: Path) -> None:
    plain = prepare(task(tmp_path), space="int8", latency=False, evaluation_workers=1)
    found = run_trial(plain, Candidate(drop=("blocks.0",)), 0)
    assert found.status == "failed" and "the space offers no structure" in str(found.error)


def test_a_pattern_of_a_space_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    space = SPACE.model_copy(update={"drop": ("block.*",)})
    with pytest.raises(SpaceError, match=r"drop: 'block\.\*' matches none; did you mean 'blocks"):
        prepare(task(tmp_path), space=space, latency=False, evaluation_workers=1)


def test_a_search_over_structures_verifies_its_front(tmp_path: Path) -> None:
    """Members are rebuilt, scored on the test split, and some of them are structural."""
    front = search(
        task(tmp_path),
        SearchSettings(
            space=SPACE,
            objectives=("accuracy", "size_bytes"),
            trials=24,
            name="one",
            runs_dir=tmp_path / "runs",
            polish=False,
            hardware="cortex-m7-cmsis-nn",
        ),
    )
    structural = [m for m in front.members if m.candidate.is_structural]
    factorized = [m for m in structural if m.candidate.rank]
    for number, member in enumerate([structural[0], *factorized[:1]]):
        package = export(member, tmp_path / f"package{number}", front=front)
        assert verify(package)  # the file's layers, pieces too, are what candidate.yaml says
        text = (package / "candidate.yaml").read_text(encoding="utf-8")
        assert "pruning" in text and member.key in (package / "manifest.json").read_text()
    assert all(m.verified is not None for m in front.members)
    assert FLOAT not in front.members[-1].candidate.layers.values()


# --- training ---------------------------------------------------------------------------------

TRAINING = {"steps": 12, "learning_rate": 0.003, "batch_size": 16}


def trained_context(folder: Path, **changes: Any) -> Context:
    space = SPACE.model_copy(
        update={"training": TrainingRanges(steps=(0, 12), learning_rate=(0.003,))}
    )
    fields = {"train": task(folder).validation, **changes}
    return prepare(task(folder, **fields), space=space, latency=False, evaluation_workers=1)


def test_a_structure_is_trained_in_its_trial(tmp_path: Path) -> None:
    """On what scores it, for once: training then has to bring the score up."""
    found = trained_context(tmp_path)
    assert found.options["train:steps"] == (0, 12)
    layers = dict.fromkeys(found.choices, INT8)
    plain = run_trial(found, Candidate(layers, **ALL), 0)
    candidate = Candidate(layers, training=TRAINING, **ALL)
    trained = run_trial(found, candidate, 1)
    assert trained.status == "complete", trained.error
    assert trained.candidate.key == candidate.key and trained.sha256 != plain.sha256
    assert trained.score is not None and plain.score is not None
    assert trained.score.divergence is not None and plain.score.divergence is not None
    assert trained.score.divergence < plain.score.divergence
    assert trained.predicted is not None
    assert trained.predicted.size_bytes == pytest.approx(trained.measured["size_bytes"], rel=0.01)
    elsewhere = pickle.loads(pickle.dumps(found))  # as a worker or a verification makes it again
    assert elsewhere.compress(candidate).sha256 == trained.sha256


def test_training_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"has no train data; give Task\(…, train=…\)"):
        trained_context(tmp_path, train=None)
    found = trained_context(tmp_path)
    for settings, said in (
        ({**TRAINING, "learning_rate": 9.0, "optimizer": "sgd"}, "training: "),
        ({**TRAINING, "hints": ["blocks.7.a"]}, "hint layer 'blocks.7.a' is not in the network"),
        ({**TRAINING, "setps": 1}, "unknown setting 'setps'; did you mean 'steps'"),
    ):
        result = run_trial(found, Candidate(training=settings), 0)
        assert result.status == "failed" and said in str(result.error)
