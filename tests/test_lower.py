from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Weights, build, images, node, run
from torch import Tensor, nn

from autoquant.compress.lower import lower
from autoquant.errors import ModelError, TaskError
from autoquant.graph import Graph
from autoquant.task import Task

IMAGE = (torch.zeros(1, 3, 8, 8),)


def _task(model: Any, example: tuple[Any, ...] = IMAGE, **fields: Any) -> Task:
    return Task("t", model, example, [], [], **fields)


class Pixels(nn.Module):
    """What image networks are made of, batch normalization with real statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.drop = nn.Dropout()
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.relu6(x + self.depthwise(x))
        return self.head(self.up(self.drop(x)).mean((2, 3)))


class Words(nn.Module):
    """Two inputs of dynamic length; a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) * mask[:, :, None]
        x = torch.relu(self.mix(torch.tanh(self.mix(x))))
        return self.head(x.sum(1))


WORDS = (torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5))


def _seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


@functools.cache
def _pixels() -> tuple[nn.Module, Graph]:
    model = _seeded(Pixels)
    return model, lower(_task(model))


@functools.cache
def _words() -> tuple[nn.Module, Graph]:
    model = _seeded(Words)
    axes = {"ids": {1: "sequence"}, 1: {1: "sequence"}}
    return model, lower(_task(model, WORDS, dynamic_axes=axes))


def test_a_module_computes_the_same_as_a_graph() -> None:
    model, graph = _pixels()
    for rows in (1, 5):  # the batch is dynamic
        x = images(3, 8, 8)[:rows]
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(run(graph.model, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_layers_have_the_names_of_the_modules() -> None:
    _, graph = _pixels()
    assert [(x.name, x.kind) for x in graph.layers] == [
        ("stem", "Conv"), ("depthwise", "Conv"), ("up", "ConvTranspose"), ("head", "Gemm")
    ]  # fmt: skip
    assert "BatchNormalization" not in {n.op_type for n in graph.nodes}
    assert graph.by_name["stem"].bias is not None
    assert graph.macs == 64 * 8 * 27 + 64 * 8 * 9 + 64 * 8 * 4 * 4 + 4 * 5


@pytest.mark.parametrize("length", (3, 9))
def test_several_inputs_of_dynamic_length(length: int) -> None:
    model, graph = _words()
    assert graph.inputs == ("ids", "mask")
    ids = np.random.default_rng(0).integers(0, 11, (4, length))
    mask = np.ones((4, length), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(run(graph.model, ids, mask)[0], expected, rtol=1e-4, atol=1e-5)


def test_layers_that_share_a_weight_have_names_of_their_own() -> None:
    _, graph = _words()
    names = [layer.name for layer in graph.layers]
    assert len(set(names)) == len(names) == 4
    assert {"words", "head"} < set(names)
    assert len({layer.weight for layer in graph.layers}) == 3


def test_a_module_is_left_in_the_mode_it_was_in() -> None:
    model = _seeded(Pixels).train()
    model.norm.eval()  # as one does to freeze statistics
    before = {name: module.training for name, module in model.named_modules()}
    graph = lower(_task(model))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert graph.fingerprint == _pixels()[1].fingerprint  # no dropout, statistics used


def test_an_onnx_file_is_read(tmp_path: Path) -> None:
    model = build([node("Gemm", ["x", "w"], ["y"])], {"w": Weights()(5, 3)}, {"x": ["N", 5]}, ["y"])
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    for source in (path, str(path)):
        assert [x.name for x in lower(_task(source, (images(5)[:1],))).layers] == ["y"]


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the user's\nown mistake")


def _with_nan() -> nn.Module:
    model = _seeded(Pixels)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    return model


class State(Pixels):
    """Extra state in a ``state_dict`` is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_extra_state_is_no_weight() -> None:
    assert len(lower(_task(_seeded(State))).layers) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Raising, "torch.onnx.export failed: RuntimeError: the user's own mistake"),
        (_with_nan, "'head.weight' contains NaN"),
        (nn.ReLU, "no layer to quantize"),
        (lambda: _seeded(Pixels).double(), "is double"),
    ],
)
def test_a_module_that_cannot_be_lowered_is_one_line(
    make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    kind = next((p.dtype for p in model.parameters()), torch.float32)
    with pytest.raises(ModelError) as caught:
        lower(_task(model.eval(), (torch.zeros(1, 3, 8, 8, dtype=kind),)))
    text = str(caught.value)
    assert message in text and "\n" not in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tokens": {1: "s"}}, "dynamic_axes names 'tokens'; the inputs are ids, mask"),
        ({5: {1: "s"}}, "dynamic_axes names 5"),
        ({"ids": {2: "s"}}, "has axis 2; the input has axes 0 to 1"),
    ],
)
def test_dynamic_axes_that_do_not_exist(axes: dict[Any, dict[int, str]], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        lower(_task(_seeded(Words), WORDS, dynamic_axes=axes))
    assert message in str(caught.value)


def test_what_is_no_model() -> None:
    with pytest.raises(TaskError, match="model is int"):
        lower(_task(3))
