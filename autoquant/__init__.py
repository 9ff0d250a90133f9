"""autoquant: automated mixed-precision compression whose answers are files that were really run.

``search`` finds a Pareto front, ``export`` packages one of its members, ``compress`` builds one
candidate. Everything loads on first use: importing autoquant loads none of torch, ray or mlflow.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoquant.api import compress, export, inspect, profile, search, verify
    from autoquant.candidate import Candidate, LayerChoice
    from autoquant.errors import AutoquantError, NoFeasibleMember, UserError
    from autoquant.front import Front, Member
    from autoquant.result import Cost, Latency, Score, TrialResult
    from autoquant.search.study import Callback
    from autoquant.task import Task
    from autoquant.tasks import load_task

__all__ = [
    "AutoquantError",
    "Callback",
    "Candidate",
    "Cost",
    "Front",
    "Latency",
    "LayerChoice",
    "Member",
    "NoFeasibleMember",
    "Score",
    "Task",
    "TrialResult",
    "UserError",
    "compress",
    "export",
    "inspect",
    "load_task",
    "profile",
    "search",
    "verify",
]

__version__ = "0.1.0"

_HOMES = {
    "api": ("compress", "export", "inspect", "profile", "search", "verify"),
    "candidate": ("Candidate", "LayerChoice"),
    "errors": ("AutoquantError", "NoFeasibleMember", "UserError"),
    "front": ("Front", "Member"),
    "result": ("Cost", "Latency", "Score", "TrialResult"),
    "search.study": ("Callback",),
    "task": ("Task",),
    "tasks": ("load_task",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'autoquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"autoquant.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`autoquant.search` is the function, whoever imports the package of that name first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
