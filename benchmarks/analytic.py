"""Analytic device models against published latencies and energies, row by row.

    python benchmarks/analytic.py            # all of it, half a minute
    python benchmarks/analytic.py --rows     # and every single row
    python benchmarks/analytic.py --fit      # how far each profile is from its own fit

Part 1, MLPerf Tiny: for every board and tool with results for all four networks, three constants
(cycles a convolution MAC, cycles an output element, cycles a dense MAC) are solved from image
classification, wake words and anomaly detection; keyword spotting is predicted. Three boards of
v1.3 are predicted from v1.2. Energy is the mean power of the other networks times the predicted
time. Part 2: the shipped profiles against the rows that set them (*) and those that did not; the
errors that profiles carry come from the latter. Part 3: time of one prediction.

Needs the hardware dossier: AUTOQUANT_HARDWARE, or ../hardware beside AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from record import record
from zoo import NETWORKS

from autoquant.candidate import FLOAT, LayerChoice
from autoquant.cost.roofline import Operator, RooflineModel
from autoquant.hardware import Hardware, load_hardware

INT8 = LayerChoice(8, 8)
MLPERF_TINY = ("ic_resnet8", "vww_mbv1_025", "ad_fcae", "kws_dscnn")
CONVOLUTIONS = ("conv", "pointwise", "depthwise")


def dossier() -> dict[str, Any] | None:
    """The published figures, None where they are not on this machine."""
    default = Path(os.environ.get("AUTOQUANT_DATA", "data")).parent / "hardware"
    path = Path(os.environ.get("AUTOQUANT_HARDWARE", default)) / "hardware.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else None


@cache
def network(name: str) -> tuple[Operator, ...]:
    """A network of benchmarks/zoo.py."""
    return tuple(NETWORKS[name]())


def macs(name: str, *shapes: str) -> int:
    """Multiply-accumulates of the operators of these shapes (all without)."""
    return sum(op.macs for op in network(name) if not shapes or op.shape in shapes)


def predict(hardware: Hardware, name: str, choice: LayerChoice, batch: int = 1, threads: int = 1):
    """(ms, mJ or None) of one network at one precision."""
    return RooflineModel(network(name), hardware, batch, threads).predict(lambda _: choice)


def summary(errors: Iterable[float]) -> dict[str, float]:
    """Median of absolute relative errors, their median sign, how many are within 25 %."""
    found = np.array(list(errors))
    return {
        "rows": len(found),
        "median_error": round(float(np.median(abs(found))), 4),
        "median_bias": round(float(np.median(found)), 4),
        "within_25_percent": int((abs(found) <= 0.25).sum()),
        "worst": round(float(found[abs(found).argmax()]), 4),
    }


# --- part 1: MLPerf Tiny ---------------------------------------------------------------------


def live(rows: dict[str, Any]) -> str:
    """The wake-word network as the tool ran it: with or without its dead channels."""
    return "vww_live" if "live_mac_cyc" in rows["vww_mbv1_025"] else "vww_mbv1_025"


def solve(rows: dict[str, Any]) -> tuple[float, float, float]:
    """Convolution MACs a cycle, cycles an output, dense MACs a cycle; keyword spotting unseen."""
    names = ("ic_resnet8", live(rows), "ad_fcae")
    matrix = [
        [
            macs(name, *CONVOLUTIONS),
            sum(op.outputs for op in network(name)),
            macs(name, "dense"),
        ]
        for name in names
    ]
    mhz = rows["ic_resnet8"]["mhz"]
    cycles = [rows[name]["ms"] * mhz * 1e3 for name in ("ic_resnet8", "vww_mbv1_025", "ad_fcae")]
    conv, output, dense = np.linalg.solve(np.array(matrix, float), cycles)
    return 1 / conv, output, 1 / dense


def board(rows: dict[str, Any], mhz: float, power_of: Iterable[str]) -> Hardware:
    """An analytic profile of one board and tool, from three of its results."""
    conv, output, dense = solve(rows)
    power = [rows[m]["uj"] / rows[m]["ms"] for m in power_of if rows[m].get("uj")]

    def figure(value: float) -> dict[str, Any]:
        return {"value": value, "source": rows["ic_resnet8"]["path"]}

    device = {"clock_mhz": figure(mhz), "output_cycles": figure(output)}
    if power:
        device["active_mw"] = figure(float(np.mean(power)))
    return Hardware.model_validate(
        {
            "name": rows["ic_resnet8"]["d"],
            "latency": "analytic",
            "kernels": [
                {
                    "weight_bits": 8,
                    "activation_bits": 8,
                    "source": rows["ic_resnet8"]["path"],
                    "rates": {"conv": figure(conv), "dense": figure(dense)},
                }
            ],
            "device": device,
        }
    )


LATER = {  # board of v1.3 → board of v1.2 with the same core and tool family
    "STMicroelectronics/NUCLEO_L4R5ZI-P": "STMicroelectronics/NUCLEO_L4R5ZI",
    "STMicroelectronics/NUCLEO_U575ZI_Q": "STMicroelectronics/NUCLEO_U575ZI_Q",
    "STMicroelectronics/NUCLEO_U385RG_Q": "STMicroelectronics/NUCLEO_U575ZI_Q",
}
NO_ENERGY = {("STMicroelectronics/NUCLEO_L4R5ZI", "mlt11")}  # its two modes contradict each other


def mlperf_tiny(published: list[dict[str, Any]], show: bool) -> dict[str, Any]:
    """Keyword spotting and v1.3 held out, on every board and tool with all four networks."""
    groups: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for row in published:
        if row["s"].startswith("mlt") and row["p"] == "int8" and row.get("mhz"):
            groups[row["d"], row["s"]][row["m"]] = row
    complete = {key: g for key, g in groups.items() if set(MLPERF_TINY) <= set(g)}
    keyword, energy_kws, energy_all = [], [], []
    for key, rows in complete.items():
        mhz = rows["ic_resnet8"]["mhz"]
        for name in MLPERF_TINY:
            others = [m for m in MLPERF_TINY if m != name and m != "kws_dscnn"]
            known = live(rows) if name == "vww_mbv1_025" else name
            ms, mj = predict(board(rows, mhz, others), known, INT8)
            error = ms / rows[name]["ms"] - 1
            if name == "kws_dscnn":
                keyword.append(error)
                if show:
                    print(f"  {error:+7.1%}  {key[1]} {key[0]}")
            if rows[name].get("uj") and mj is not None and key not in NO_ENERGY:
                off = mj / (rows[name]["uj"] * 1e-3) - 1
                energy_all.append(off)
                if name == "kws_dscnn":
                    energy_kws.append(off)
    later, later_energy = [], []
    for new, old in LATER.items():
        rows, before = complete[new, "mlt13"], complete[old, "mlt12"]
        hardware = board(before, rows["ic_resnet8"]["mhz"], MLPERF_TINY)
        for name in MLPERF_TINY:
            known = live(rows) if name == "vww_mbv1_025" else name
            ms, mj = predict(hardware, known, INT8)
            later.append(ms / rows[name]["ms"] - 1)
            if new == old:  # the other two have another supply
                later_energy.append(mj / (rows[name]["uj"] * 1e-3) - 1)
            if show:
                print(f"  {later[-1]:+7.1%}  v1.3 {new} {name} from v1.2")
    return {
        "boards_and_tools": len(complete),
        "latency_keyword_spotting": summary(keyword),
        "latency_v1.3_from_v1.2": summary(later),
        "energy_keyword_spotting": summary(energy_kws),
        "energy_power_from_other_networks": summary(energy_all),
        "energy_v1.3_from_v1.2": summary(later_energy),
    }


# --- part 2: the shipped profiles ------------------------------------------------------------

ALIASES = {
    "mobilenet_v1_224": "mobilenet_v1_1.0_224",
    "mobilenet_v2_224": "mobilenet_v2_1.0_224",
    "mobilenet_v2": "mobilenet_v2_1.0_224",
    "squeezenet_224": "squeezenet1_1",
    "mobilenet_v2_0.35_128 imagenet": "mobilenet_v2_0.35_128",
    "mobilenet_v2_0.35_224 imagenet": "mobilenet_v2_0.35_224",
    "mobilenet_v2_1.0_224 imagenet": "mobilenet_v2_1.0_224",
    "mobilenet_v2_1.4_224 imagenet": "mobilenet_v2_1.4_224",
}


@dataclass(frozen=True, eq=False)
class Case:
    """Published rows of one device and software that a profile is about.

    ``used``: network → precisions that set the profile. ``mhz``: where the board's clock is
    another one. ``only``: the networks that count, where the others set the profile by part 1.
    """

    profile: str
    device: str
    software: str
    used: dict[str, str]
    threads: int = 1
    mhz: float | None = None
    only: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()  # with ``used``: only at these
    float16: bool = False  # a float layer is fp16 there


MV1, MV3 = "mobilenet_v1_1.0_224", "mobilenet_v3_large"
KWS = ("kws_dscnn",)
CASES = (
    Case("cortex-m4-cmsis-nn", "OctoML/microtvm_cmsis_nn/NUCLEO_L4R5ZI", "mlt10", {}, only=KWS),
    Case("cortex-m4-cmsis-nn", "Krai/NUCLEO-L4R5ZI_MICROTVM-CMSIS-NN", "mlt11", {}, only=KWS),
    Case("cortex-m4-x-cube-ai", "STMicroelectronics/NUCLEO_L4R5ZI", "mlt12", {}, only=KWS),
    Case("cortex-m4-x-cube-ai", "STMicroelectronics/NUCLEO_L4R5ZI-P", "mlt13", {}),
    Case("cortex-m7-x-cube-ai", "STMicroelectronics/NUCLEO_H7A3ZI_Q", "mlt12", {}, only=KWS),
    Case("cortex-m7-x-cube-ai", "stm32h747i_disco (400 MHz)", "st_mbv2_old", {}, mhz=400),
    Case("cortex-m7-cmsis-nn", "stm32h743", "CMSIS-NN", {}, mhz=480),
    Case("cortex-a53", "rpi3bplus_A53 (32-bit)", "xnnpack", {MV1: "fp32 int8", MV3: "fp32"}, 4),
    Case("cortex-a72", "rpi4_A72 (arm64)", "xnnpack", {MV1: "fp32 int8", MV3: "fp32"}, 4),
    Case(
        "cortex-a76",
        "pixel4_cpu (4 threads)",
        "efflite",
        {"efficientnet_lite0": "fp32 int8", "efficientnet_lite4": "fp32 int8"},
        4,
        2420,
    ),
    Case(
        "jetson-orin-nano",
        "jetson_orin_nano_super",
        "ul_jetson",
        {"yolo11n_640": "fp32 fp16 int8", "yolo11x_640": "fp32 fp16 int8"},
    ),
    Case("nvidia-t4", "nvidia_t4", "hawq", {"resnet18": "fp32 w8a8 w4a4"}),
    Case(
        "nvidia-a100", "nvidia_a100_80gb", "nv_dle_triton", {"resnet50": "fp16"}, batches=(1, 128)
    ),
    Case(
        "qualcomm-hexagon",
        "qualcomm_htp/s24_8gen3",
        "QAIRT 2.43 qnn_dlc",
        {"resnet18": "fp16 w8a8", "wideresnet50": "fp16 w8a8", MV3: "fp16 w8a16"},
        float16=True,
    ),
    Case(
        "edge-tpu",
        "coral_usb3",
        "coral",
        {"mobilenet_v1_224": "int8", "resnet50_v1_299": "int8"},
    ),
)
WIDTHS = {
    "int8": INT8,
    "w8a8": INT8,
    "w4a4": LayerChoice(4, 4),
    "w8a16": LayerChoice(8, 16),
    "fp16": LayerChoice(16, 16),
    "fp32": FLOAT,
}
# Parameters that `--fit` moves: each a group of values that move together.
FREE: dict[str, tuple[str, ...]] = {
    "cortex-a53": ("0.conv 0.depthwise", "1.conv 1.depthwise", "0.depthwise 1.depthwise"),
    "cortex-a72": ("0.conv 0.depthwise", "1.conv 1.depthwise", "0.depthwise 1.depthwise"),
    "cortex-a76": ("0.conv", "1.conv", "operator_us"),
    "jetson-orin-nano": ("0.conv", "1.conv", "2.conv", "inference_us"),
    "nvidia-t4": ("0.conv", "1.conv", "2.conv"),
    "nvidia-a100": ("1.conv", "inference_us"),
    "qualcomm-hexagon": (
        "0.conv 0.depthwise",
        "1.conv 1.depthwise",
        "2.conv 2.depthwise",
        "0.depthwise 1.depthwise 2.depthwise",
        "inference_us",
    ),
    "edge-tpu": ("0.conv", "off_chip"),
    "cortex-m55-ethos-u55": ("0.conv",),
}


@dataclass(frozen=True, eq=False)
class Row:
    """One published latency as a case reads it."""

    case: Case
    name: str
    precision: str
    batch: int
    ms: float
    used: bool

    def error(self, hardware: Hardware) -> float:
        """Relative error of the profile's prediction."""
        choice = WIDTHS[self.precision]
        if self.case.float16 and self.precision == "fp16":
            choice = FLOAT
        if self.case.mhz is not None:
            hardware = _moved(hardware, "clock_mhz", self.case.mhz)
        name = ALIASES.get(self.name, self.name)
        if self.case.device == "STMicroelectronics/NUCLEO_L4R5ZI-P" and name.startswith("vww"):
            name = "vww_live"
        found = predict(hardware, name, choice, self.batch, self.case.threads)[0]
        return found / self.ms - 1


def rows_of(case: Case, published: list[dict[str, Any]]) -> list[Row]:
    """The rows of a case whose network benchmarks/zoo.py has."""
    found = []
    for row in published:
        if row["d"] != case.device or case.software not in (row["s"], row.get("sw")):
            continue
        name, batch = row["m"], row.get("b", 1)
        if ALIASES.get(name, name) not in NETWORKS or row["p"] not in WIDTHS:
            continue
        if case.only and name not in case.only:
            continue
        used = row["p"] in case.used.get(name, "").split()
        used = used and (not case.batches or batch in case.batches)
        found.append(Row(case, name, row["p"], batch, row["ms"], used))
    return found


def _moved(hardware: Hardware, path: str, value: float, scale: bool = False) -> Hardware:
    """The profile with one value set or scaled: ``0.conv``, or a field of the device."""
    document = hardware.model_dump(mode="json", by_alias=True)
    head, _, tail = path.partition(".")
    if tail:
        figure = document["kernels"][int(head)]["rates"][tail]
    elif head == "off_chip":
        figure = document["device"]["off_chip"]["gb_s"]
    else:
        figure = document["device"][head]
    figure["value"] = figure["value"] * value if scale else value
    return Hardware.model_validate(_without_peaks(document))


def _without_peaks(document: dict[str, Any]) -> dict[str, Any]:
    """A fit may pass through a rate above a peak."""
    for kernel in document["kernels"]:
        kernel["peak"] = None
    return document


def fit(name: str, rows: list[Row]) -> dict[str, float]:
    """Factors that take the profile's values to the least squares of log errors of used rows."""
    from scipy.optimize import least_squares

    base, groups = load_hardware(name), FREE[name]

    def errors(logs: Any) -> list[float]:
        hardware = base
        for group, log in zip(groups, logs, strict=True):
            for path in group.split():
                hardware = _moved(hardware, path, float(np.exp(log)), scale=True)
        return [float(np.log1p(row.error(hardware))) for row in rows if row.used]

    found = least_squares(errors, np.zeros(len(groups)), bounds=(-3, 3))
    return {g: round(float(np.exp(x)), 3) for g, x in zip(groups, found.x, strict=True)}


def ethos(published: list[dict[str, Any]], document: dict[str, Any]) -> Row:
    """The one result behind the Ethos-U55 profile: MobileNetV2 on Corstone-300."""
    device = next(d for d in document["devices"] if d["name"] == "corstone300_m55_ethos_u55")
    cycles = device["calibration"]["mobilenet_v2_224_cycles"]["v"]
    case = Case("cortex-m55-ethos-u55", "corstone300", "alif_kit", {})
    return Row(case, "mobilenet_v2", "int8", 1, cycles / 500e3, used=True)


def profiles(document: dict[str, Any], show: bool, fitting: bool) -> dict[str, Any]:
    """Errors of every shipped profile, on what set it and on what did not."""
    published = document["published_latencies"]
    rows: dict[str, list[Row]] = defaultdict(list)
    for case in CASES:
        rows[case.profile] += rows_of(case, published)
    rows["cortex-m55-ethos-u55"] = [ethos(published, document)]
    result: dict[str, Any] = {}
    every = [
        row.error(load_hardware(name)) for name, f in rows.items() for row in f if not row.used
    ]
    pooled = float(np.median(np.abs(every)))
    for name, found in rows.items():
        hardware = load_hardware(name)
        errors = {row: row.error(hardware) for row in found}
        held_out = [error for row, error in errors.items() if not row.used]
        device = hardware.device
        assert device is not None
        carried = None if device.error is None else device.error.value
        result[name] = {
            "used": sum(row.used for row in found),
            "held_out": summary(held_out) if held_out else None,
            "error": round(carried_error(held_out, pooled), 3) if held_out else None,
            "error_in_profile": carried,
        }
        print(f"{name:22} {_line(result[name])}")
        if show:
            for row, error in errors.items():
                mark = "*" if row.used else " "
                print(f"  {mark} {error:+7.1%}  {row.name} {row.precision} batch {row.batch}")
        if fitting and name in FREE:
            print(f"  fit: {fit(name, found)}")
    tiny = ("cortex-m4", "cortex-m7-x")
    others = [
        e for n, f in rows.items() for r in f
        if not r.used and not (n.startswith(tiny) and r.case.software.startswith("mlt"))
        for e in [r.error(load_hardware(n))]
    ]  # fmt: skip
    result["all_held_out"] = summary(every)
    result["held_out_beyond_mlperf_tiny"] = summary(others)
    return result


def carried_error(held_out: list[float], pooled: float) -> float:
    """What a profile says of itself: nine tenths of its own held-out rows, and never less than
    the median over all profiles, since few rows agree by luck."""
    return max(float(np.quantile(np.abs(held_out), 0.9)), pooled)


def _line(found: dict[str, Any]) -> str:
    held = found["held_out"]
    if held is None:
        return f"{found['used']:2} rows set it, none held out"
    return (
        f"{found['used']:2} rows set it; {held['rows']:2} held out: median "
        f"{held['median_error']:.1%}, worst {held['worst']:+.1%}, "
        f"{held['within_25_percent']} within 25 %; error {found['error']} "
        f"(in the profile: {found['error_in_profile']})"
    )


# --- part 3 ----------------------------------------------------------------------------------


def prediction_time() -> dict[str, float]:
    """CPU milliseconds of one prediction, layers cached as in a search: ResNet-101 (105 layers)."""
    work = network("resnet101")
    names = [op.layer for op in work if op.layer]
    model = RooflineModel(work, load_hardware("cortex-m4-cmsis-nn"))
    generator = np.random.default_rng(0)
    picks = [LayerChoice(4, 8), INT8, LayerChoice(8, 16)]
    mixes = [dict(zip(names, generator.choice(3, len(names)), strict=True)) for _ in range(300)]
    for mix in mixes[:20]:
        model.predict(lambda name, mix=mix: picks[mix[name]])
    start = time.process_time()
    for mix in mixes:
        model.predict(lambda name, mix=mix: picks[mix[name]])
    took = (time.process_time() - start) / len(mixes)
    return {"layers": len(names), "cpu_ms": round(took * 1e3, 3)}


def main() -> None:
    """Print all parts and write results/analytic.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    document = dossier()
    if document is None:
        sys.exit("skipped: no hardware dossier; set AUTOQUANT_HARDWARE")
    for name in MLPERF_TINY:
        assert macs(name) == document["networks"][name]["macs"], name
    print("MLPerf Tiny, predicted from three constants a board and tool")
    tiny = mlperf_tiny(document["published_latencies"], arguments.rows)
    for key, value in tiny.items():
        print(f"  {key}: {value}")
    print("Shipped profiles")
    shipped = profiles(document, arguments.rows, arguments.fit)
    for key in ("all_held_out", "held_out_beyond_mlperf_tiny"):
        print(f"  {key}: {shipped[key]}")
    speed = prediction_time()
    print(f"One prediction: {speed}")
    figures = {"mlperf_tiny": tiny, "profiles": shipped, "prediction": speed}
    record("analytic", figures, write=not arguments.no_record)


if __name__ == "__main__":
    main()
