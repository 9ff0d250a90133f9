"""ResNet-8 and ResNet-20 on CIFAR-10: the figures that the README claims, where the data is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("AUTOQUANT_DATA") or ROOT.parent / "shared" / "data")

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / "cifar10" / "test.npz").is_file(),
        reason="no real networks and data; set AUTOQUANT_DATA",
    ),
]

BARS = {"resnet8": (0.8719, 0.005), "resnet20": (0.9173, 0.003)}  # float on all 10,000, drop


@pytest.fixture(scope="module")
def networks() -> Iterator[ModuleType]:
    """benchmarks/networks.py, which measures what is asserted here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import networks

        yield networks
    for name in ("networks", "record"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module", params=sorted(BARS))
def measured(
    request: pytest.FixtureRequest, networks: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """A network's name and all its figures."""
    name = request.param
    found: dict[str, Any] = networks.measure(name, tmp_path_factory.mktemp(name))
    return name, found


def test_the_float_network_has_its_published_accuracy(
    measured: tuple[str, dict[str, Any]],
) -> None:
    name, found = measured
    assert found["samples"] == (2000, 8000)
    assert found["float_both"] == pytest.approx(BARS[name][0], abs=5e-5)


def test_8_bits_lose_next_to_nothing(measured: tuple[str, dict[str, Any]]) -> None:
    name, found = measured
    assert found["int8_drop"] <= BARS[name][1]
    assert 0 < found["int8_drop_standard_error"] < 0.003


@pytest.mark.parametrize("mix", ["uniform", "every_second"])
def test_int8_layers_run_in_int8_and_float_layers_do_not(
    measured: tuple[str, dict[str, Any]], mix: str
) -> None:
    kernels = measured[1][f"kernels_{mix}"]
    for wanted, ran in kernels.values():
        assert wanted == ran
    assert kernels["int8_convolutions"][0] > 3


def test_files_shrink_with_their_bits(measured: tuple[str, dict[str, Any]]) -> None:
    found = measured[1]
    sizes = [found["size_bytes"][bits] for bits in (2, 3, 4, 8, "float")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    assert found["size_prediction_worst"] < 0.01
