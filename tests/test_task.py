from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoquant.errors import TaskError
from autoquant.task import Task, call, load_function, to_numpy
from autoquant.tasks import load_task

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.arange(6)


def _task(**fields: Any) -> Task:
    return Task(
        **{
            "name": "t",
            "model": "m.onnx",
            "example_inputs": (X[:1],),
            "calibration": [X],
            "validation": [(X, Y)],
            **fields,
        }
    )


TASK_FILE = """
    import numpy as np
    import neighbour
    from autoquant import Task

    X = np.zeros((2, 4), np.float32)

    def good():
        return Task(neighbour.NAME, "m.onnx", (X[:1],), [X], [(X, np.zeros(2, int))])

    def raises():
        raise ValueError("no\\ndata")

    def leaves():
        raise SystemExit(3)

    def something_else():
        return 3

    def needs_an_argument(x):
        return x

    constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(textwrap.dedent(TASK_FILE))
    (tmp_path / "neighbour.py").write_text("NAME = 'from a neighbour'\n")
    (tmp_path / "raising.py").write_text("raise RuntimeError('at\\nimport')\n")
    (tmp_path / "syntax.py").write_text("def broken(:\n")
    (tmp_path / "leaving.py").write_text("import sys; sys.exit('bye')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    for name in ("neighbour", "raising", "mine"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return tmp_path


# --- finding the task ------------------------------------------------------------------------


def test_a_task_is_loaded_by_file_and_function(folder: Path) -> None:
    assert load_task("mine.py:good").name == "from a neighbour"
    assert load_task(f"{folder / 'mine.py'}:good").name == "from a neighbour"


def test_a_task_is_loaded_by_module_and_function(folder: Path) -> None:
    assert load_task("mine:good").name == "from a neighbour"


def test_an_onnx_file_takes_its_data_from_a_function(folder: Path) -> None:
    (folder / "net.onnx").write_bytes(b"")
    task = load_task("net.onnx", data="mine.py:good")
    assert (task.name, task.model) == ("net", "net.onnx")
    assert task.split("validation").samples == 2


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        ("nothing.py:good", None, "nothing.py: no such file"),
        ("mine.py:", None, "expected file.py:function"),
        (":good", None, "expected file.py:function"),
        ("mine.py:goood", None, "no function 'goood'; did you mean 'good'"),
        ("mine.py:constant", None, "no function 'constant'"),
        ("no.such.module:good", None, "ModuleNotFoundError"),
        ("raising.py:f", None, "importing it raised RuntimeError: at import"),
        ("raising:f", None, "importing it raised RuntimeError: at import"),
        ("syntax.py:f", None, "importing it raised SyntaxError"),
        ("leaving.py:f", None, "importing it raised SystemExit"),
        ("mine.py:raises", None, "calling it raised ValueError: no data"),
        ("mine.py:leaves", None, "calling it raised SystemExit"),
        ("mine.py:something_else", None, "returned int, not an autoquant.Task"),
        ("mine.py:needs_an_argument", None, "calling it raised TypeError"),
        ("mnits", None, "no task 'mnits'; did you mean 'mnist'"),
        ("net.onnx", "mine.py:good", "net.onnx: no such file"),
        ("mine.py:good", "mine.py:good", "--data goes with an .onnx file"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_line(
    folder: Path, spec: str, data: str | None, message: str
) -> None:
    with pytest.raises(TaskError) as caught:
        load_task(spec, data)
    text = str(caught.value)
    assert message in text and "\n" not in text


def test_an_onnx_file_without_data_says_what_to_add(folder: Path) -> None:
    (folder / "net.onnx").write_bytes(b"")
    with pytest.raises(TaskError, match="--data"):
        load_task("net.onnx")


def test_importing_a_task_file_calls_nothing(folder: Path) -> None:
    assert callable(load_function("mine.py:raises"))


def test_an_error_that_a_task_raises_on_purpose_keeps_its_words() -> None:
    def function() -> Task:
        raise TaskError("the folder is empty")

    with pytest.raises(TaskError, match=r"^spec: the folder is empty$"):
        call("spec", function)


# --- the task itself -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"example_inputs": ()}, "example_inputs is empty"),
        ({"example_inputs": (3.0,)}, r"example_inputs\[0\]"),
        ({"example_inputs": (X[:1], np.float32(3))}, r"example_inputs\[1\]"),
        ({"example_inputs": (X[:0],)}, r"example_inputs\[0\]"),
        ({"metric": "top5"}, "metric is 'top5'"),
        ({"metric": None}, "metric is None"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        _task(**fields)


@pytest.mark.parametrize("inputs", (X[:1], torch.zeros(1, 4), [X[:1]], (X[:1],)))
def test_one_example_input_needs_no_tuple(inputs: Any) -> None:
    task = _task(example_inputs=inputs)
    assert len(task.example_inputs) == 1 and task.example_inputs[0].shape == (1, 4)


def test_the_metric_has_a_name() -> None:
    def spearman(outputs: Any, targets: Any) -> float:
        return 0.0

    assert _task().metric_name == "top1"
    assert _task(metric=spearman).metric_name == "spearman"


# --- splits ----------------------------------------------------------------------------------


def test_a_split_holds_batches_and_all_targets() -> None:
    split = _task(validation=[(X[:4], Y[:4]), (X[4:], Y[4:])]).split("validation")
    assert [b[0].shape for b in split.batches] == [(4, 4), (2, 4)]
    assert split.targets is not None and split.targets.tolist() == Y.tolist()
    assert (split.name, split.samples) == ("validation", 6)


def test_a_split_comes_from_a_loader_of_tensors() -> None:
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    for _ in range(2):  # it can be read again
        split = _task(validation=loader).split("validation")
        assert np.array_equal(np.concatenate([b[0] for b in split.batches]), X)
        assert all(isinstance(b[0], np.ndarray) for b in split.batches)


def test_integer_images_become_the_type_of_the_example() -> None:
    split = _task(validation=[(X.astype(np.uint8), Y)]).split("validation")
    assert split.batches[0][0].dtype == np.float32


def test_several_outputs_may_belong_to_one_target() -> None:
    split = _task(validation=[(X, Y[:3])]).split("validation")
    assert split.samples == 3


def test_several_inputs_come_as_a_tuple() -> None:
    two = (X[:1], np.zeros((1, 2), np.int64))
    inputs = (X, np.ones((6, 2), np.int64))
    split = _task(example_inputs=two, validation=[(inputs, Y)]).split("validation")
    assert [a.dtype for a in split.batches[0]] == [np.float32, np.int64]


def test_calibration_may_have_targets_or_not() -> None:
    one = [[X], [(X, Y)], [(X,)], [[X]]]
    for batches in one:
        split = _task(calibration=batches).split("calibration")
        assert len(split.batches[0]) == 1 and np.array_equal(split.batches[0][0], X)
        assert split.samples == 6
    assert _task(calibration=[X]).split("calibration").targets is None
    assert _task(calibration=[(X, Y)]).split("calibration").targets is not None


def test_calibration_of_two_inputs_may_have_targets_or_not() -> None:
    second = X[:, :2]
    for batch in ((X, second), [X, second], ((X, second), Y)):
        task = _task(example_inputs=(X[:1], second[:1]), calibration=[batch])
        found = task.split("calibration").batches[0]
        assert len(found) == 2 and np.array_equal(found[1], second)


def _nan() -> Any:
    bad = X.copy()
    bad[2, 1] = np.nan
    return bad


def _raising() -> Any:
    yield X, Y
    raise OSError("disk\ngone")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda: [], "is empty"),
        (lambda: iter(()), "is empty"),
        (lambda: [(X[:0], Y[:0])], "input 0 has shape"),
        (lambda: [(X[None], Y)], "input 0 has shape"),
        (lambda: [((X, X), Y)], "2 inputs, but example_inputs has 1"),
        (lambda: [(_nan(), Y)], "input 0 contains NaN"),
        (lambda: [(np.full_like(X, np.inf), Y)], "input 0 contains NaN or infinity"),
        (lambda: [(X.astype(str), Y)], "input 0 is"),
        (lambda: [(X, Y[:4])], "targets have shape"),
        (lambda: [(X, Y[:0])], "targets have shape"),
        (lambda: [(X, 3)], "targets have shape"),
        (lambda: [(X, np.full(6, np.nan))], "targets contain NaN"),
        (lambda: [(X, Y), (X, Y[:, None])], "targets of different shapes"),
        (lambda: [(X[:4], Y[:2]), (X[:4], Y[:4])], "batch 1: 4 inputs for 4 targets"),
        (lambda: [(X, Y), (X, None)], "some batches have targets"),
        (lambda: [X], "must be (inputs, targets)"),
        (lambda: [(X, Y, Y)], "must be (inputs, targets)"),
        (lambda: [(X, None)], "must be (inputs, targets)"),
        (lambda: 3, "reading it raised TypeError"),
        (_raising, "reading it raised OSError: disk gone"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(batches: Callable[[], Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        _task(validation=batches()).split("validation")
    text = str(caught.value)
    assert message in text and "validation" in text and "\n" not in text


def test_the_message_names_the_task_and_the_batch() -> None:
    with pytest.raises(TaskError, match="'t': validation batch 1: input 0 contains NaN"):
        _task(validation=[(X, Y), (_nan(), Y)]).split("validation")


def test_inputs_of_one_batch_must_agree() -> None:
    with pytest.raises(TaskError, match="differ in their batch"):
        _task(example_inputs=(X[:1], X[:1]), validation=[((X, X[:3]), Y)]).split("validation")


def test_a_split_that_is_not_there_says_how_to_give_it() -> None:
    with pytest.raises(TaskError, match="no test data"):
        _task().split("test")


def test_to_numpy_takes_what_needs_gradients() -> None:
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1.0, 1.0]
    assert to_numpy([1, 2]).tolist() == [1, 2]
