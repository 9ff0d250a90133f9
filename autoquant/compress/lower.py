"""A task's network → float ONNX graph, once: the form that everything later starts from."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.errors import ModelError, TaskError
from autoquant.graph import OPSET, Graph
from autoquant.task import Task

if TYPE_CHECKING:
    import onnx


def lower(task: Task) -> Graph:
    """Read or export the task's network as a normalized float `Graph`.

    The batch axis of every input is dynamic, with the axes of ``task.dynamic_axes``. A module
    in training mode is exported in eval mode and left as it was. Raises ModelError.
    """
    if isinstance(task.model, (str, Path)):
        return Graph.read(task.model, task.example_inputs)
    import torch

    if not isinstance(task.model, torch.nn.Module):
        raise TaskError(
            f"task {task.name!r}: model is {type(task.model).__name__}; "
            "it can be a torch.nn.Module or the path of an ONNX file"
        )
    for name, value in task.model.state_dict().items():
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if is_float and not bool(torch.isfinite(value).all()):
            raise ModelError(f"task {task.name!r}: weight {name!r} contains NaN or infinity")
    return Graph.read(export(task), task.example_inputs)


def export(task: Task) -> onnx.ModelProto:
    """Export a torch module with the ``torch.export`` based exporter, opset pinned."""
    import torch

    assert isinstance(task.model, torch.nn.Module)
    training = {module: module.training for module in task.model.modules()}
    examples = tuple(_two_rows(torch.as_tensor(value)) for value in task.example_inputs)
    names = _input_names(task)
    shapes = _dynamic_shapes(task, names)
    try:
        task.model.eval()
        with _quiet():
            program = torch.onnx.export(
                task.model,
                examples,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                dynamic_shapes=shapes,
                verbose=False,
            )
        assert program is not None
        model: onnx.ModelProto = program.model_proto
        _name_axes(model, task, names)
        return model
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter's own message is advice
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise ModelError(f"task {task.name!r}: torch.onnx.export failed: {reason}") from error
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _name_axes(model: onnx.ModelProto, task: Task, names: list[str]) -> None:
    """Call the dynamic axes ``batch`` and what the task calls them, not ``s77``."""
    axes = [{0: "batch"} for _ in names]
    for key, found in (task.dynamic_axes or {}).items():
        axes[key if isinstance(key, int) else names.index(key)].update(found)
    rename: dict[str, str] = {}
    for value, wanted in zip(model.graph.input, axes, strict=True):
        for axis, name in wanted.items():
            dim = value.type.tensor_type.shape.dim[axis]
            if dim.dim_param:
                rename.setdefault(dim.dim_param, name)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in rename:
                dim.dim_param = rename[dim.dim_param]


def _two_rows(value: Any) -> Any:
    """Contiguous, since other strides end up in the graph; torch.export takes a batch of one
    for a constant: repeat it."""
    import torch

    return (torch.cat([value, value]) if value.shape[0] == 1 else value).contiguous()


def _input_names(task: Task) -> list[str]:
    import inspect

    forward = inspect.signature(task.model.forward)  # type: ignore[union-attr]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [n for n, p in forward.parameters.items() if p.kind in plain]
    count = len(task.example_inputs)
    if len(names) < count:
        names = [f"input{i}" for i in range(count)]
    return names[:count]


def _dynamic_shapes(task: Task, names: list[str]) -> tuple[dict[int, Any], ...]:
    import torch

    shapes: list[dict[int, Any]] = [{0: torch.export.Dim.DYNAMIC} for _ in names]
    for key, axes in (task.dynamic_axes or {}).items():
        if isinstance(key, int) and 0 <= key < len(names):
            index = key
        elif key in names:
            index = names.index(key)
        else:
            raise TaskError(
                f"task {task.name!r}: dynamic_axes names {key!r}; the inputs are {', '.join(names)}"
            )
        rank = len(task.example_inputs[index].shape)
        for axis in axes:
            if not 0 <= axis < rank:
                raise TaskError(
                    f"task {task.name!r}: dynamic_axes of {key!r} has axis {axis}; "
                    f"the input has axes 0 to {rank - 1}"
                )
            shapes[index][axis] = torch.export.Dim.DYNAMIC
    return tuple(shapes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and prints much that is of no use to the user."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
