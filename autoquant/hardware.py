"""Hardware profiles: ``hardware_profiles/*.yaml`` → what a device runs and what it costs."""

from __future__ import annotations

import math
import re
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from autoquant import document
from autoquant.errors import HardwareError

RuntimeName = Literal["onnxruntime", "openvino", "openvino-bf16"]
CLASSES = ("conv", "pointwise", "depthwise", "dense")
_FORMAT_BITS = {"integer": 0, "float32": 32, "float16": 16, "bfloat16": 16}


class Figure(document.Document):
    """A number above zero, and where it comes from.

    ``unverified``: nobody has read it in a document that measured or specified it.
    """

    value: float = Field(gt=0, allow_inf_nan=False)
    source: str
    unverified: bool = False

    @model_validator(mode="before")
    @classmethod
    def _sourced(cls, value: Any) -> Any:
        if isinstance(value, (int, float)):
            raise ValueError(f"a number needs its source: {{value: {value}, source: …}}")
        return value

    @field_validator("source")
    @classmethod
    def _named(cls, value: str) -> str:
        return _not_blank(value)


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("the source is empty: name a publication, a repository or a command")
    return value


class Rates(document.Document):
    """Multiply-accumulates that a kernel really does in a cycle of one core, by shape of layer.

    ``pointwise`` (1×1 convolutions) and ``dense`` (products with a matrix) are ``conv`` where
    they are left out; ``depthwise`` has one input channel a group.
    """

    conv: Figure
    pointwise: Figure | None = None
    depthwise: Figure | None = None
    dense: Figure | None = None

    def of(self, shape: str) -> Figure:
        """The rate of one of `CLASSES`."""
        found: Figure | None = getattr(self, shape)
        return found or self.conv


class Sparse(document.Document):
    """What a kernel makes of weights with a pattern of zeros, ``"N:M"``: N of M are not zero.

    Its rate is ``speedup`` times the dense one; it reads the N weights and their places.
    """

    pattern: str = "2:4"
    speedup: Figure

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        found = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", value)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(f"{value!r} is no pattern in quotes such as '2:4'")
        return value

    @property
    def share(self) -> tuple[float, float]:
        """Of the weights that are read, and bits a weight for their places."""
        kept, of = map(int, self.pattern.split(":"))
        return kept / of, kept / of * math.ceil(math.log2(of))


class Kernel(document.Document):
    """A pair of widths that the device computes with; narrower stored bits run on it.

    ``format``: what it computes in; a 32/32 kernel may compute float layers in float16.
    ``bit_serial``: a multiplication takes time and energy by the product of the bits that a
    layer has; ``rates`` and ``pj_per_mac`` are those at full width. ``dynamic``: it takes the
    range of activations at run time. ``sparse``: what it gains from a pattern of zeros; without
    it, and from other zeros, nothing. ``rates``, their ``peak`` (no rate may be above it) and
    ``pj_per_mac`` are for analytic profiles.
    """

    weight_bits: int = Field(ge=1, le=32)
    activation_bits: int = Field(ge=1, le=32)
    kinds: tuple[str, ...] | None = None
    source: str
    format: Literal["integer", "float32", "float16", "bfloat16"] = "integer"
    bit_serial: bool = False
    dynamic: bool = False
    sparse: Sparse | None = None
    peak: Figure | None = None
    rates: Rates | None = None
    pj_per_mac: Figure | None = None

    @field_validator("source")
    @classmethod
    def _named(cls, value: str) -> str:
        return _not_blank(value)

    @model_validator(mode="after")
    def _below_the_peak(self) -> Self:
        for name in CLASSES:
            rate = None if self.rates is None else getattr(self.rates, name)
            if rate is not None and self.peak is not None and rate.value > self.peak.value:
                raise ValueError(
                    f"rates.{name} is {rate.value:g}, above the kernel's peak of "
                    f"{self.peak.value:g}"
                )
        return self

    @property
    def pair(self) -> str:
        """``8/8``: weight bits and activation bits."""
        return f"{self.weight_bits}/{self.activation_bits}"

    @property
    def moved(self) -> tuple[int, int]:
        """Bits of a weight and of an activation as the kernel reads them."""
        bits = _FORMAT_BITS[self.format]
        return bits or self.weight_bits, bits or self.activation_bits

    def runs(self, kind: str) -> bool:
        """Whether it is for layers of this ONNX operator."""
        return self.kinds is None or kind in self.kinds


class Memory(document.Document):
    """One level of memory: how much it holds, 10⁹ bytes a second, picojoules a byte."""

    bytes: Figure | None = None
    gb_s: Figure | None = None
    pj_per_byte: Figure | None = None


class Device(document.Document):
    """What an analytic latency and energy are made of, beside the kernels.

    ``clock_mhz``: without one, a cycle of the rates is a nanosecond. ``cores``: how many work
    with that many threads; without them, the rates are the whole device's.
    ``stored_weight_bits``: widths that weights keep in memory until a kernel reads them; other
    widths are stored at the next one, or at the kernel's. ``on_chip`` holds the tensors around a
    layer where they fit, then weights (none if ``on_chip_holds`` is activations); the rest
    streams from ``off_chip``. Without ``off_chip``, weights and activations must fit.
    ``output_cycles`` of one core go into every element that an operator writes (requantization,
    the store, the loops around it): on small processors what makes depthwise layers slow.
    ``operator_us`` is spent on every operator, ``inference_us`` once. ``active_mw`` is drawn as
    long as the inference takes. ``error``: nine tenths of the published latencies that
    did not set the profile are within this share of the prediction.
    """

    clock_mhz: Figure | None = None
    cores: Figure | None = None
    stored_weight_bits: tuple[int, ...] = ()
    on_chip: Memory | None = None
    off_chip: Memory | None = None
    on_chip_holds: Literal["all", "activations"] = "all"
    output_cycles: Figure | None = None
    operator_us: Figure | None = None
    inference_us: Figure | None = None
    active_mw: Figure | None = None
    error: Figure | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        inner, outer = self.on_chip, self.off_chip
        if inner and outer:
            for name, wrong in (("gb_s", -1), ("bytes", 1), ("pj_per_byte", 1)):
                near, far = getattr(inner, name), getattr(outer, name)
                if near and far and (near.value - far.value) * wrong > 0:
                    words = "slower" if name == "gb_s" else "more"
                    raise ValueError(
                        f"on_chip.{name} is {near.value:g}, {words} than off_chip's {far.value:g}"
                    )
        if inner and inner.bytes is None:
            raise ValueError("on_chip needs its bytes")
        if self.on_chip_holds == "activations" and not (inner and outer):
            raise ValueError("on_chip_holds: activations needs on_chip and off_chip memory")
        return self


class LatencyModel(document.Document):
    """A measured latency model: what `autoquant profile` writes.

    ``kernel_ms``: signature of a layer at a precision → isolated kernel time.
    ``coefficients``: of the kernel sum of each precision, of the elements converted to int8 and
    to float (in millions), and the constant in ms. ``error``: mean absolute relative error on
    mixes beside the ``mixes`` that the coefficients were fitted on; ``spread``: the median over
    them of the interquartile range of a latency, relative to it. ``runtime``: its name and
    version, ``onnxruntime 1.31.1``.
    """

    cpu: str
    runtime: str
    batch: int
    threads: int
    kernel_ms: dict[str, float]
    coefficients: dict[str, float]
    error: float | None = None
    mixes: int = 0
    spread: float | None = None
    source: str

    @property
    def measured_with(self) -> str:
        """The name of the runtime."""
        return self.runtime.partition(" ")[0]


class Hardware(document.Document):
    """A device: the runtime that executes an artifact, its dialect, its kernels.

    ``formats``: what a package for it holds beside the ONNX file (see `deploy.FORMATS`).
    ``latency``: ``measured`` on this machine, or ``analytic``, predicted from ``device`` and the
    kernels' rates for a device that is elsewhere. ``runtime`` scores the artifacts either way.
    ``round_to``: channels that pruning leaves come in multiples of it, where there are as many.
    """

    name: str = ""
    description: str = ""
    runtime: RuntimeName = "onnxruntime"
    dialect: Literal["onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    formats: tuple[Literal["encodings", "c-header", "tflite"], ...] = ()
    latency: Literal["measured", "analytic"] = "measured"
    kernels: tuple[Kernel, ...] = Field(min_length=1)
    round_to: int = Field(default=8, ge=1)
    model: LatencyModel | None = None
    device: Device | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        analytic = self.latency == "analytic"
        if analytic and (self.device is None or self.model is not None):
            raise ValueError("an analytic profile has a device and no measured model")
        if not analytic and self.device is not None:
            raise ValueError("a profile with a device needs latency: analytic")
        if self.model is not None and self.model.measured_with != self.runtime:
            raise ValueError(
                f"the model was measured with {self.model.runtime}, the profile's runtime is "
                f"{self.runtime}"
            )
        for index, kernel in enumerate(self.kernels):
            if not analytic:
                break
            where = f"kernels.{index} ({kernel.pair})"
            if kernel.rates is None:
                raise ValueError(f"{where}: an analytic profile needs rates")
            if kernel.pair == "32/32" and kernel.format == "integer":
                raise ValueError(f"{where}: float layers run on it: what is its format?")
            if (kernel.pj_per_mac is None) != (self.kernels[0].pj_per_mac is None):
                raise ValueError(f"{where}: give pj_per_mac for all kernels or for none")
        for a, b in combinations(self.kernels, 2):
            same = (a.pair, a.dynamic) == (b.pair, b.dynamic)
            if same and (a.kinds is None or b.kinds is None or set(a.kinds) & set(b.kinds)):
                raise ValueError(f"two kernels for {a.pair} and the same operators")
        if self.device is not None:
            widest = max(kernel.weight_bits for kernel in self.kernels)
            for bits in self.device.stored_weight_bits:
                if not 1 <= bits <= widest:
                    raise ValueError(f"stored_weight_bits {bits}: no kernel is that wide")
        return self

    def kernel(
        self, kind: str, weight_bits: int, activation_bits: int, dynamic: bool = False
    ) -> Kernel | None:
        """The narrowest kernel that is at least as wide in both, None where there is none.

        Activations decide before weights. Ranges at run time need a kernel that takes them.
        """
        fitting = [
            kernel
            for kernel in self.kernels
            if kernel.weight_bits >= weight_bits
            and kernel.activation_bits >= activation_bits
            and kernel.runs(kind)
            and (not dynamic or kernel.dynamic)
        ]
        order = [(k.activation_bits, k.weight_bits, k.dynamic != dynamic) for k in fitting]
        return fitting[order.index(min(order))] if fitting else None

    def pairs(self, kind: str) -> str:
        """The pairs that it has for an operator, for messages: ``8/8, 4/8``."""
        found = [
            f"{k.pair} and every width below" if k.bit_serial else k.pair
            for k in self.kernels
            if k.runs(kind)
        ]
        return ", ".join(dict.fromkeys(found)) or "no kernel"

    @property
    def room(self) -> tuple[int, bool] | None:
        """(bytes, whether weights count) that a candidate must fit into; None for no bound."""
        if self.device is None or self.device.on_chip is None:
            return None
        alone = self.device.off_chip is None
        size = self.device.on_chip.bytes
        if size is None or not (alone or self.device.on_chip_holds == "activations"):
            return None
        return int(size.value), alone


def load_hardware(name: str | Path | Hardware) -> Hardware:
    """Read a profile by built-in name or path. Raises HardwareError."""
    if isinstance(name, Hardware):
        return name
    path = document.find(str(name), "hardware_profiles", "hardware", HardwareError)
    profile = document.read(path, Hardware, HardwareError)
    return profile.model_copy(update={"name": profile.name or path.stem})
