from __future__ import annotations

from pathlib import Path

import pytest

from autoquant.document import builtin
from autoquant.errors import HardwareError
from autoquant.hardware import Hardware, load_hardware
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
