"""The built-in tasks, and how every command finds the task that it was given."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from autoquant.errors import TaskError, nearest
from autoquant.task import Task, call, load_function

TASKS = {"mnist": "autoquant.tasks.mnist:mnist"}
DESCRIPTIONS = {"mnist": "5,000 real digits, a residual network with a depthwise convolution"}


def load_task(spec: str = "mnist", data: str | None = None) -> Task:
    """Load a task by built-in name, ``file.py:function``, ``module:function`` or ONNX file.

    ``data``: with an ``.onnx`` file, the ``file.py:function`` whose Task has the data; its
    own ``model`` is ignored. Raises TaskError.
    """
    if spec.endswith(".onnx"):
        if not Path(spec).is_file():
            raise TaskError(f"{spec}: no such file")
        if data is None:
            raise TaskError(f"{spec}: an ONNX file needs its data: add --data file.py:function")
        task = call(data, load_function(data))
        return replace(task, name=Path(spec).stem, model=spec)
    if data is not None:
        raise TaskError(f"--data goes with an .onnx file, not with {spec!r}")
    if spec in TASKS:
        module, _, name = TASKS[spec].partition(":")
        return call(spec, getattr(importlib.import_module(module), name))
    if ":" not in spec:
        hint = nearest(spec, TASKS)
        raise TaskError(f"no task {spec!r}; {hint} Or give file.py:function or model.onnx")
    return call(spec, load_function(spec))
