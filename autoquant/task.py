"""What the user brings: a trained network, its data and its metric.

A task file is code that runs as the user's own: `load_function` imports it and calls the one
function that was named, nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autoquant.errors import TaskError, nearest

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Metric = Callable[[Array, Array], float]


@dataclass(frozen=True, slots=True)
class Task:
    """A network, its data and how it is judged.

    ``model``: a ``torch.nn.Module`` in eval mode, or the path of an ONNX file.
    ``example_inputs``: a tuple of tensors or arrays, batch first.
    ``calibration``, ``validation``, ``test``, ``train``: re-iterables (a list, a DataLoader)
    of ``(inputs, targets)``; ``inputs`` is an array, a tensor or a tuple of them; calibration
    may yield inputs alone. Where a batch has k outputs for each target (pairs of sentences),
    the outputs of one target follow each other.
    ``metric``: ``"top1"`` or a callable ``(outputs, targets) -> float`` over the concatenated
    split, higher is better.
    ``dynamic_axes``: beside the batch, ``{input name or index: {axis: name}}``.
    ``train`` may have a method ``epoch(number)`` that gives the batches of one pass, shuffled
    and augmented, the same whenever it is asked for that number; else it is read once and
    shuffled. ``teacher``: a module or ONNX file to distil from, in place of the network.
    ``loss``: of training, ``(outputs, targets)`` as torch tensors → a scalar tensor; without it
    cross-entropy for ``top1``, and else the squared error of targets shaped as the outputs.
    ``student``: makes a smaller network with the same inputs and outputs from keywords (width,
    depth) that a space chooses.
    ``gpus``: how many a trial needs of Ray, or which share of one; 0 for none.
    """

    name: str
    model: torch.nn.Module | str | Path
    example_inputs: tuple[Any, ...]
    calibration: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any] | None = None
    train: Iterable[Any] | None = None
    metric: str | Metric = "top1"
    dynamic_axes: Mapping[Any, Mapping[int, str]] | None = None
    teacher: torch.nn.Module | str | Path | None = None
    loss: Callable[[Any, Any], Any] | None = None
    student: Callable[..., torch.nn.Module] | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.example_inputs, tuple):
            if isinstance(self.example_inputs, list):
                object.__setattr__(self, "example_inputs", tuple(self.example_inputs))
            else:
                object.__setattr__(self, "example_inputs", (self.example_inputs,))
        if not self.example_inputs:
            raise TaskError(f"task {self.name!r}: example_inputs is empty; give one batch")
        for i, value in enumerate(self.example_inputs):
            if not hasattr(value, "shape") or len(value.shape) < 1 or value.shape[0] < 1:
                raise TaskError(
                    f"task {self.name!r}: example_inputs[{i}] must be a tensor, batch first"
                )
        if not 0 <= self.gpus < float("inf"):
            raise TaskError(f"task {self.name!r}: gpus is {self.gpus!r}; it must be 0 or more")
        if self.metric != "top1" and not callable(self.metric):
            raise TaskError(
                f"task {self.name!r}: metric is {self.metric!r}; "
                "it can be 'top1' or a function (outputs, targets) -> float"
            )

    @property
    def metric_name(self) -> str:
        """``top1``, or the name of the callable."""
        return (
            self.metric
            if isinstance(self.metric, str)
            else getattr(self.metric, "__name__", type(self.metric).__name__)
        )

    def split(self, name: str) -> Split:
        """Load ``calibration``, ``validation``, ``test`` or ``train`` into memory, checked.

        Raises TaskError for a missing, empty, mis-shaped or non-finite split.
        """
        batches = getattr(self, name)
        if batches is None:
            raise TaskError(f"task {self.name!r} has no {name} data; give Task(…, {name}=…)")
        return Split.load(f"task {self.name!r}: {name}", name, batches, self.example_inputs)

    def epoch(self, number: int) -> Iterator[tuple[tuple[Array, ...], Array]]:
        """The batches of ``train.epoch(number)``, checked. Raises TaskError."""
        where = f"task {self.name!r}: train"
        for i, item in enumerate(self.train.epoch(number)):  # type: ignore[union-attr]
            inputs, target = _inputs_and_target(item, len(self.example_inputs), "train")
            checked = _checked_inputs(f"{where} batch {i}", inputs, self.example_inputs)
            yield checked, to_numpy(target)


@dataclass(frozen=True, slots=True)
class Split:
    """One split in memory: batches of inputs (tuples of arrays) and the targets of all."""

    name: str
    batches: tuple[tuple[Array, ...], ...]
    targets: Array | None
    samples: int = field(default=0)

    @classmethod
    def load(cls, where: str, name: str, source: Iterable[Any], example: Sequence[Any]) -> Split:
        """Read a re-iterable of batches. Raises TaskError naming ``where`` and the batch."""
        batches: list[tuple[Array, ...]] = []
        targets: list[Array] = []
        try:
            for item in source:
                inputs, target = _inputs_and_target(item, len(example), name)
                at = f"{where} batch {len(batches)}"
                batches.append(_checked_inputs(at, inputs, example))
                if target is not None:
                    array = to_numpy(target)
                    rows, first = batches[-1][0].shape[0], batches[0][0].shape[0]
                    if array.ndim == 0 or array.shape[0] == 0 or rows % array.shape[0]:
                        raise TaskError(
                            f"{at}: targets have shape {array.shape} for {rows} inputs; "
                            "the first axis must be the samples"
                        )
                    if targets and rows * len(targets[0]) != first * len(array):
                        raise TaskError(
                            f"{at}: {rows} inputs for {len(array)} targets, but batch 0 has "
                            f"{first} for {len(targets[0])}; every target needs as many inputs"
                        )
                    targets.append(array)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(f"{where}: reading it raised {_one_line(error)}") from error
        if not batches:
            raise TaskError(f"{where} is empty; give at least one batch of (inputs, targets)")
        if targets and len(targets) != len(batches):
            raise TaskError(f"{where}: some batches have targets and some do not")
        if name != "calibration" and not targets:
            raise TaskError(f"{where}: batches must be (inputs, targets)")
        try:
            joined = np.concatenate(targets) if targets else None
        except ValueError as error:
            raise TaskError(f"{where}: targets of different shapes: {error}") from None
        if joined is not None and joined.dtype.kind == "f" and not np.isfinite(joined).all():
            raise TaskError(f"{where}: targets contain NaN or infinity")
        rows = sum(batch[0].shape[0] for batch in batches)
        return cls(name, tuple(batches), joined, len(joined) if joined is not None else rows)


def _inputs_and_target(item: Any, count: int, name: str) -> tuple[Any, Any]:
    """Split one batch; calibration may be inputs alone."""
    if name == "calibration":
        is_pair = isinstance(item, (tuple, list)) and len(item) == 2
        if not is_pair:
            return item, None
        if count == 1 or isinstance(item[0], (tuple, list)):
            return item[0], item[1]
        return item, None  # two inputs without targets
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TaskError(f"{name}: a batch must be (inputs, targets), not {type(item).__name__}")
    return item[0], item[1]


def _checked_inputs(at: str, inputs: Any, example: Sequence[Any]) -> tuple[Array, ...]:
    values = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if len(values) != len(example):
        raise TaskError(f"{at}: {len(values)} inputs, but example_inputs has {len(example)}")
    arrays = []
    for i, (value, model) in enumerate(zip(values, example, strict=True)):
        array, want = to_numpy(value), to_numpy(model)
        if array.ndim != want.ndim or array.shape[0] == 0:
            raise TaskError(
                f"{at}: input {i} has shape {array.shape}; "
                f"example_inputs[{i}] has {want.shape} (any batch)"
            )
        if array.dtype != want.dtype:
            if array.dtype.kind != want.dtype.kind and not (
                want.dtype.kind == "f" and array.dtype.kind in "iu"
            ):
                raise TaskError(f"{at}: input {i} is {array.dtype}, example_inputs is {want.dtype}")
            array = array.astype(want.dtype)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise TaskError(f"{at}: input {i} contains NaN or infinity")
        arrays.append(np.ascontiguousarray(array))
    if len({a.shape[0] for a in arrays}) != 1:
        raise TaskError(f"{at}: inputs differ in their batch: {[a.shape for a in arrays]}")
    return tuple(arrays)


def to_numpy(value: Any) -> Array:
    """A torch tensor, an array or a sequence as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def load_function(spec: str) -> Callable[[], Any]:
    """Import ``path/file.py:function`` or ``package.module:function``.

    Raises TaskError: no such file, module or function, or importing it raised.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise TaskError(f"{spec!r}: expected file.py:function or package.module:function")
    try:
        if source.endswith(".py"):
            path = Path(source)
            if not path.is_file():
                raise TaskError(f"{source}: no such file")
            module_name = f"autoquant_task_{path.stem}"
            module_spec = importlib.util.spec_from_file_location(module_name, path)
            if module_spec is None or module_spec.loader is None:
                raise TaskError(f"{source}: not a Python file")
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_name] = module
            folder = str(path.resolve().parent)
            if folder not in sys.path:
                sys.path.insert(0, folder)  # a task file may import its neighbours
            module_spec.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(source)
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{source}: importing it raised {_one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise TaskError(f"{source}: no function {name!r}; {nearest(name, functions)}")
    return function  # type: ignore[no-any-return]


def call(spec: str, function: Callable[[], Any]) -> Task:
    """Call a task function. Raises TaskError if it raises or returns no Task."""
    try:
        task = function()
    except TaskError as error:
        raise TaskError(f"{spec}: {error}") from None
    except (Exception, SystemExit) as error:
        raise TaskError(f"{spec}: calling it raised {_one_line(error)}") from error
    if not isinstance(task, Task):
        raise TaskError(f"{spec}: returned {type(task).__name__}, not an autoquant.Task")
    return task


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
