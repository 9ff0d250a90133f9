from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autoquant.document import Document, builtin
from autoquant.errors import HardwareError
from autoquant.hardware import Figure, Hardware, load_hardware
from autoquant.runtime import RUNTIMES

KERNEL = "{weight_bits: 8, activation_bits: 8, source: measured}"


def _profile(folder: Path, text: str) -> Hardware:
    path = folder / "own.yaml"
    path.write_text(text)
    return load_hardware(path)


@pytest.mark.parametrize("name", sorted(builtin("hardware_profiles")))
def test_every_shipped_profile_has_its_sources(name: str) -> None:
    profile = load_hardware(name)
    assert profile.name == name and profile.description
    assert profile.runtime in RUNTIMES
    assert profile.kernels
    assert all(kernel.source.strip() for kernel in profile.kernels)


def test_the_default_profile_is_shipped() -> None:
    assert "onnxruntime-cpu" in builtin("hardware_profiles")


def test_a_profile_is_a_file_and_no_python(tmp_path: Path) -> None:
    profile = _profile(tmp_path, f"dialect: openvino\nkernels: [{KERNEL}]")
    assert (profile.name, profile.dialect, profile.runtime) == ("own", "openvino", "onnxruntime")
    assert load_hardware(profile) is profile


def test_a_measured_model_reads_back(tmp_path: Path) -> None:
    profile = _profile(
        tmp_path,
        f"""
        kernels: [{KERNEL}]
        model:
          cpu: a cpu
          runtime: onnxruntime 1.31
          batch: 1
          threads: 1
          kernel_ms: {{conv 8/8: 0.5}}
          coefficients: {{int8: 1.0, to_int8: 0.2, constant: 0.01}}
          error: 0.02
          source: autoquant profile
        """,
    )
    assert profile.model is not None and profile.model.kernel_ms == {"conv 8/8": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernels: []", "kernels"),
        (f"runtime: tensorrt\nkernels: [{KERNEL}]", "runtime"),
        (f"dialect: onnx\nkernels: [{KERNEL}]", "dialect"),
        ("kernels: [{weight_bits: 8, activation_bits: 8}]", "kernels.0.source: Field required"),
        (f"kernel: 3\nkernels: [{KERNEL}]", "did you mean 'kernels'"),
        (f"kernels: [{KERNEL}]\nmodel: {{cpu: x}}", "model.runtime: Field required"),
    ],
)
def test_a_profile_that_does_not_parse_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(HardwareError, match=message) as caught:
        _profile(tmp_path, text)
    assert "own.yaml:" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_profile_offers_what_is_close() -> None:
    with pytest.raises(HardwareError, match="did you mean 'onnxruntime-cpu'"):
        load_hardware("onnxruntime-cp")


ANALYTIC = """
latency: analytic
kernels:
  - weight_bits: 8
    activation_bits: 8
    source: a data sheet
    peak: {value: 2, source: a data sheet}
    rates:
      conv: {value: 1, source: measured, unverified: true}
device:
  clock_mhz: {value: 120, source: a data sheet}
  on_chip: {bytes: {value: 1000, source: a data sheet}, gb_s: {value: 2, source: a data sheet}}
  off_chip: {bytes: {value: 5000, source: a data sheet}, gb_s: {value: 1, source: a data sheet}}
"""


def test_an_analytic_profile_reads(tmp_path: Path) -> None:
    profile = _profile(tmp_path, ANALYTIC)
    assert profile.device is not None and profile.device.clock_mhz is not None
    assert profile.device.clock_mhz.value == 120
    rates = profile.kernels[0].rates
    assert rates is not None and rates.conv.unverified and rates.of("depthwise") is rates.conv
    again = Hardware.model_validate(profile.model_dump(mode="json", exclude_defaults=True))
    assert again == profile
    assert profile.room is None  # there is memory behind the chip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("clock_mhz: {value: 120, source: a data sheet}", "clock_mhz: 120", "needs its source"),
        ("{value: 120, source: a data sheet}", "{value: 120}", "clock_mhz.source: Field required"),
        ("{value: 120, source: a data sheet}", "{value: 120, source: ' '}", "source is empty"),
        ("{value: 120, ", "{value: 0, ", "clock_mhz.value"),
        ("{value: 120, ", "{value: .inf, ", "clock_mhz.value"),
        ("conv: {value: 1,", "conv: {value: 3,", "rates.conv is 3, above the kernel's peak of 2"),
        ("gb_s: {value: 2,", "gb_s: {value: 0.5,", "on_chip.gb_s is 0.5, slower than off_chip's 1"),
        ("bytes: {value: 5000,", "bytes: {value: 500,", "on_chip.bytes is 1000, more than"),
        ("bytes: {value: 1000, source: a data sheet}, gb", "gb", "on_chip needs its bytes"),
        ("latency: analytic", "latency: measured", "needs latency: analytic"),
        ("    rates:\n      conv: {value: 1, source: measured, unverified: true}\n", "",
         "an analytic profile needs rates"),
        ("weight_bits: 8\n    activation_bits: 8", "weight_bits: 32\n    activation_bits: 32",
         "what is its format"),
        ("device:\n", "device:\n  stored_weight_bits: [16]\n", "16: no kernel is that wide"),
        ("device:\n", "device:\n  clock: 3\n", "did you mean 'clock_mhz'"),
        ("device:\n", "  - {weight_bits: 8, activation_bits: 8, source: x, rates: {conv: "
         "{value: 1, source: x}}}\ndevice:\n", "two kernels for 8/8"),
    ],
)  # fmt: skip
def test_a_profile_that_is_without_a_source_or_contradicts_itself_does_not_load(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in ANALYTIC
    with pytest.raises(HardwareError) as caught:
        _profile(tmp_path, ANALYTIC.replace(old, new, 1))
    assert message in str(caught.value)
    assert "own.yaml:" in str(caught.value) and "\n" not in str(caught.value)


def _figures(value: object, path: str = "") -> Iterator[tuple[str, Figure]]:
    if isinstance(value, Figure):
        yield path, value
    elif isinstance(value, Document):
        for name in type(value).model_fields:
            yield from _figures(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _figures(item, f"{path}.{index}")


@pytest.mark.parametrize("name", sorted(builtin("hardware_profiles")))
def test_what_nobody_read_is_marked_so(name: str) -> None:
    profile = load_hardware(name)
    for path, figure in _figures(profile):
        guessed = any(w in figure.source for w in ("general knowledge", "placeholder", "no time"))
        assert figure.unverified or not guessed, path
    if profile.latency == "analytic":
        assert any(path.startswith(".device") for path, _ in _figures(profile))


def test_the_next_kernel_is_the_narrowest_that_is_wide_enough() -> None:
    t4 = load_hardware("nvidia-t4")

    def pair(weights: int, activations: int) -> str | None:
        found = t4.kernel("Conv", weights, activations)
        return None if found is None else found.pair

    assert [pair(2, 4), pair(4, 4), pair(4, 8), pair(3, 6), pair(8, 4), pair(16, 16)] == [
        "4/4", "4/4", "8/8", "8/8", "8/8", "32/32",
    ]  # fmt: skip
    sensor = load_hardware("imx500")
    assert sensor.kernel("Conv", 16, 8) is None and sensor.kernel("Conv", 32, 32) is None
    assert sensor.room == (8388608, True)
    assert load_hardware("cortex-m4-cmsis-nn").room == (655360, False)
    assert load_hardware("onnxruntime-cpu").room is None
    assert load_hardware("bitfusion").pairs("Conv") == "16/16 and every width below"


@pytest.mark.parametrize("pattern", ["4:2", "half", "2:4:8"])
def test_a_pattern_that_is_none_is_named(tmp_path: Path, pattern: str) -> None:
    sparse = f'sparse: {{pattern: "{pattern}", speedup: {{value: 2, source: a sheet}}}}'
    kernel = f"{{weight_bits: 8, activation_bits: 8, source: here, {sparse}}}"
    with pytest.raises(HardwareError, match=f"'{pattern}' is no pattern in quotes such as '2:4'"):
        _profile(tmp_path, f"kernels: [{kernel}]")
