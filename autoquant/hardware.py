"""Hardware profiles: ``hardware_profiles/*.yaml`` → what a device runs and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from autoquant import document
from autoquant.errors import HardwareError


class Kernel(document.Document):
    """A pair of widths that the device computes with; narrower stored bits run on it."""

    weight_bits: int
    activation_bits: int
    kinds: tuple[str, ...] | None = None
    source: str


class LatencyModel(document.Document):
    """A measured latency model: what `autoquant profile` writes.

    ``kernel_ms``: signature of a layer at a precision → isolated kernel time.
    ``coefficients``: of the kernel sum of each precision, of the elements converted to int8 and
    to float (in millions), and the constant in ms. ``error``: mean absolute relative error on
    held-out ones of the ``mixes`` that the coefficients were fitted on.
    """

    cpu: str
    runtime: str
    batch: int
    threads: int
    kernel_ms: dict[str, float]
    coefficients: dict[str, float]
    error: float | None = None
    mixes: int = 0
    source: str


class Hardware(document.Document):
    """A device: the runtime that executes an artifact, its dialect, its kernels."""

    name: str = ""
    description: str = ""
    runtime: Literal["onnxruntime"] = "onnxruntime"
    dialect: Literal["onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    latency: Literal["measured"] = "measured"
    kernels: tuple[Kernel, ...] = Field(min_length=1)
    model: LatencyModel | None = None


def load_hardware(name: str | Path | Hardware) -> Hardware:
    """Read a profile by built-in name or path. Raises HardwareError."""
    if isinstance(name, Hardware):
        return name
    path = document.find(str(name), "hardware_profiles", "hardware", HardwareError)
    profile = document.read(path, Hardware, HardwareError)
    return profile.model_copy(update={"name": profile.name or path.stem})
