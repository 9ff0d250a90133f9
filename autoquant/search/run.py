"""The run folder: made, resumed and written so that a reader never sees half a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autoquant import document
from autoquant.errors import RunError
from autoquant.front import Front
from autoquant.hardware import Hardware, LatencyModel
from autoquant.runtime import describe

_SAME_ON_RESUME = (
    *("task", "space", "hardware", "objectives", "batch", "threads", "seed", "start_from"),
)


@dataclass(slots=True)
class Run:
    """A run folder, new or continued."""

    name: str
    folder: Path
    content: dict[str, Any]
    fresh: bool
    seconds: float = 0.0

    @property
    def latency(self) -> Path:
        """Where the run keeps its latency model: one run, one model."""
        return self.folder / "latency.json"

    def hardware(self, profile: Hardware) -> Hardware:
        """The profile with the latency model of the run that is resumed."""
        if profile.model is None and self.latency.is_file():
            model = document.read(self.latency, LatencyModel, RunError)
            return profile.model_copy(update={"model": model})
        return profile

    def write(self, environment: Mapping[str, Any]) -> None:
        """Write study.yaml and environment.json."""
        text = yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True)
        write_text(self.folder / "study.yaml", text)
        write_json(self.folder / "environment.json", environment)

    def discard(self) -> None:
        """Remove a new folder that never got to hold a trial."""
        if self.fresh:
            for path in self.folder.iterdir():
                if path.is_file() or path.is_symlink():
                    path.unlink()
            self.folder.rmdir()


def open_run(base: Path, name: str, content: dict[str, Any], resume: bool) -> Run:
    """Make the run folder, or check that the one to resume fits ``content``, what study.yaml
    is to hold. Raises RunError."""
    folder = base / name
    if resume:
        path = folder / "study.yaml"
        if not path.is_file():
            raise RunError(f"--resume: there is no run {name!r} under {base}")
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(before, dict):
            raise RunError(f"{path}: expected the fields of a search")
        if content.get("start_from") is None:
            content["start_from"] = before.get("start_from")
        for key in _SAME_ON_RESUME:
            if before.get(key) != json.loads(json.dumps(content.get(key))):
                raise RunError(
                    f"--resume: {key} differs from {path}; "
                    "give the same one, or choose another --name"
                )
        try:
            seconds = Front.read(folder).seconds
        except RunError:  # none yet, or damaged: it is written anew
            seconds = 0.0
        return Run(name, folder, content, fresh=False, seconds=seconds)
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        if folder.exists():
            raise RunError(
                f"run {name!r} exists in {base}: add --resume to continue it, or another --name"
            ) from None
        raise RunError(f"{folder}: cannot be made: {error.strerror}") from None
    return Run(name, folder, content, fresh=True)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once. Raises RunError."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once. Raises RunError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def describe_environment() -> dict[str, Any]:
    """Versions and machine, for environment.json and manifests."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("autoquant", "numpy", "torch", "onnx", "onnxscript", "optuna", "ray", "mlflow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **describe(),
        "versions": versions,
    }
