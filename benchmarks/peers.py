"""The same networks and splits through other tools, and docs/comparison.md.

    python benchmarks/peers.py --setup ENVIRONMENTS              # once, about 2.5 GB
    python benchmarks/peers.py --environments ENVIRONMENTS       # all rows, about an hour a core
    python benchmarks/peers.py --ours [--environments ENVIRONMENTS]   # ours; peers' rows are kept
    python benchmarks/peers.py --page                            # the page from the results

Sony's Model Compression Toolkit and NNCF run in environments of their own (the scripts in
benchmarks/peers/), onnxruntime's own quantizers here. All get the calibration images of seed 0
and the same float weights; their answers are judged on the test split with float on the same
samples. ``--work`` keeps what the peers made: a job that is already there is not run again.
Ours are the exact solutions under the measured prior, as in low_bits.py, not searched members.
``--searches`` also times whole searches. Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from low_bits import PLAIN, WIDE, rules, task
from record import RESULTS, record

from autoquant.compress.lower import lower
from autoquant.evaluate import Evaluator
from autoquant.runtime import OnnxRuntime, OnnxSession, measure
from autoquant.search.sensitivity import sensitivity
from autoquant.search.solver import solve
from autoquant.search.trial import evaluator_for, float_model, latency_inputs, prepare
from autoquant.task import Array

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "comparison.md"
Row = dict[str, Any]

PACKAGES = {
    "mct": (
        ["torch==2.13.0"],
        ["model-compression-toolkit==2.6.1", "onnx==1.23.2", "onnxscript==0.7.2"],
        ["--no-deps", "torchvision==0.28.0"],  # imported by the toolkit, which does not ask for it
    ),
    "nncf": (["nncf==3.4.0", "openvino==2026.4.1", "onnx==1.23.2", "numpy>=2.2"],),
}
# network: (folder of its loader, the loader's arguments)
LOADERS: dict[str, tuple[str, list[int]]] = {
    "resnet20": ("resnet_cifar10", [20]),
    "efficientnet_lite0": ("efficientnet_lite0", []),
}
# network: [(label, setting of mct_run.py)]
MCT: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "resnet20": [
        *(("default", {"bits": bits}) for bits in (8, 4, 3, 2.5)),
        *(("Hessian scores", {"bits": bits, "hessian": True}) for bits in (4, 3, 2.5)),
        (
            "gradient-based rounding, 20 epochs, Hessian scores of 16 images",
            {"bits": 3, "epochs": 20, "attention": False},
        ),
    ],
    "efficientnet_lite0": [("default", {"bits": bits}) for bits in (8, 4, 3)],
}
# network: [(widths, label, budgets in average bits)], polished too?
OURS: dict[str, tuple[list[tuple[list[int], list[float]]], bool]] = {
    "resnet20": ([(PLAIN, [4, 3, 2.5]), (WIDE, [8, 4, 3, 2.5])], True),
    "efficientnet_lite0": ([(PLAIN, [4, 3]), (WIDE, [8, 4, 3])], False),
    "minilm": ([(WIDE, [8])], False),
}
# network: settings of quantize_static, its default first (int8 activations, which leave half of
# ResNet-20's convolutions unfused); the histograms of Entropy and Percentile are slow, and would
# take more memory than there is on the larger networks
STATIC = {
    "resnet20": ["MinMax", "MinMax, uint8", "Entropy, uint8", "Percentile, uint8"],
    "efficientnet_lite0": ["MinMax", "MinMax, uint8", "MinMax, uint8, moving average"],
    "minilm": ["MinMax"],
}
TITLES = {
    "resnet20": "ResNet-20, CIFAR-10, top-1 on 8,000 test images",
    "efficientnet_lite0": "EfficientNet-Lite0, ImageNet subset, top-1 on 800 test images",
    "minilm": "MiniLM-L6, STS benchmark, Spearman × 100 on the test split",
}
TOOLS = {"autoquant": 0, "MCT": 1, "onnxruntime": 2, "NNCF": 3}
# what a search is compared with: as many budgets as MCT was asked for here
SEARCHES = {
    "resnet20": "cifar10.py:resnet20",
    "efficientnet_lite0": "imagenet.py:efficientnet_lite0",
}


class Network:
    """One network with its splits, its float reference and its float file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.task = task(name, 0)
        self.graph = lower(self.task)
        self.float_model = float_model(self.graph)
        self.test = self.evaluator("test")

    def evaluator(self, split: str) -> Evaluator:
        """An evaluator that knows float's answers on ``split``."""
        found = evaluator_for(self.task, self.graph, split)
        found.set_reference(OnnxRuntime().open(self.float_model))
        return found

    @cached_property
    def names(self) -> list[str]:
        """The inputs' names."""
        return list(OnnxRuntime().open(self.float_model).input_names)

    def write(self, folder: Path) -> Path:
        """What the peers' environments read: float.onnx, calibration.npz, inputs.npz, test.npy."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "float.onnx").write_bytes(self.float_model)
        batches = self.task.split("calibration").batches
        named = {
            f"{i:04}/{name}": array
            for i, batch in enumerate(batches)
            for name, array in zip(self.names, batch, strict=True)
        }
        np.savez(folder / "calibration.npz", **named)
        inputs = latency_inputs(self.task, self.graph, 1)
        np.savez(folder / "inputs.npz", **dict(zip(self.names, inputs, strict=True)))
        if self.name in LOADERS:
            test = self.task.split("test").batches
            np.save(folder / "test.npy", np.concatenate([batch[0] for batch in test]))
        return folder

    def judged(self, answer: OnnxSession | Array) -> Row:
        """Score and drop of a session, or of the class it gave every test image, in points."""
        reference, targets = self.test.reference, self.test.split.targets
        assert reference is not None and targets is not None
        if self.test.metric != "top1":
            assert isinstance(answer, OnnxSession)
            score = self.test.score(answer)
            return _points(score.value, score.drop, score.drop_standard_error)
        if isinstance(answer, OnnxSession):
            answer = self.test.outputs(answer).argmax(-1)
        correct = answer == targets
        assert reference.correct is not None
        difference = reference.correct.astype(np.float64) - correct
        error = float(difference.std() / math.sqrt(len(correct)))
        packed = base64.b64encode(np.packbits(correct)).decode()
        drop = reference.value - float(correct.mean())
        return {**_points(float(correct.mean()), drop, error), "correct": packed}


def _points(value: float, drop: float, error: float) -> Row:
    return {
        "score": round(100 * value, 3),
        "drop_points": round(100 * drop, 3),
        "drop_standard_error_points": round(100 * error, 3),
    }


def plain_session(model: bytes | Path) -> OnnxSession:
    """A session as onnxruntime opens it when nothing is asked for but one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model
    return OnnxSession(ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]))


def clocks() -> tuple[float, float]:
    """CPU seconds of this process and wall seconds."""
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> Row:
    """What went by since `clocks`."""
    cpu, wall = clocks()
    return {"cpu_seconds": round(cpu - start[0], 2), "wall_seconds": round(wall - start[1], 2)}


# ours


def ours(network: Network, folder: Path) -> Iterator[Row]:
    """Our rows; the files go to ``folder``.

    ``shared_cpu_seconds`` is what all budgets of a width set share: float scores, calibration,
    weight bank, sensitivity.
    """
    cases, polished = OURS[network.name]
    graph, workers = network.graph, os.cpu_count() or 1
    for widths, budgets in cases:
        start = clocks()
        make = rules(widths)
        space = make(graph.layers[0].name, graph.layers[-1].name)
        context = prepare(network.task, space=space, latency=False)
        prior = sensitivity(context, workers)
        shared = since(start)["cpu_seconds"]
        counted = {
            n: graph.by_name[n] for n in context.choices if graph.by_name[n].kind != "Gather"
        }
        cost = {
            n: tuple(c.weight_bits * counted[n].parameters if n in counted else 0.0 for c in f)
            for n, f in context.choices.items()
        }
        weights = sum(layer.parameters for layer in counted.values())
        for bits in budgets:
            for polish in (False, True) if polished else (False,):
                start = clocks()
                (candidate,) = solve(context.choices, prior, cost, [bits * weights])
                artifact = context.compress(replace(candidate, polish=polish))
                spent = since(start)
                average = sum(
                    artifact.candidate.choice(n).weight_bits * layer.parameters
                    for n, layer in counted.items()
                )
                setting = f"{{{','.join(map(str, widths))}}}" + (", polished" if polish else "")
                yield {
                    "tool": "autoquant",
                    "setting": setting,
                    "budget_bits": bits,
                    "average_bits": round(average / weights, 3),
                    "size_bytes": artifact.size_bytes,
                    "file": "ONNX, packed integers",
                    "shared_cpu_seconds": shared,
                    **spent,
                    **network.judged(OnnxRuntime().open(artifact.model)),
                    "path": str(artifact.save(folder / f"{slug(setting)}-{bits}.onnx")),
                }


def whole_search(name: str) -> Row:
    """CPU and wall seconds of one default search, everything of its process counted."""
    source = (
        "import sys, autoquant\n"
        "front = autoquant.search(sys.argv[1], trials=60, name='timed', runs_dir=sys.argv[2])\n"
        "print(len(front.members))"
    )
    spec = str(HERE / "tasks" / SEARCHES[name])
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", source, spec, folder], check=True, capture_output=True, text=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "network": name,
        "trials": 60,
        "members": int(done.stdout.split()[-1]),
        "cpu_seconds": round(cpu, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
    }


# onnxruntime's own quantizers


class Reader:
    """Calibration inputs as onnxruntime's quantizers ask for them, one batch at a time."""

    def __init__(self, batches: Sequence[dict[str, Array]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, None at the end."""
        return next(self.batches, None)


def onnxruntime_rows(network: Network, folder: Path) -> Iterator[Row]:
    """quantize_static by each calibration method, chosen on validation, and the dynamic one."""
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder.mkdir(parents=True, exist_ok=True)
    source, prepared = folder / "float.onnx", folder / "prepared.onnx"
    source.write_bytes(network.float_model)
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    batches = [
        dict(zip(network.names, [a[i : i + 32] for a in batch], strict=True))
        for batch in network.task.split("calibration").batches
        for i in range(0, len(batch[0]), 32)
    ]
    validation = network.evaluator("validation")
    tried: dict[str, tuple[float, Row]] = {}
    for method in STATIC[network.name]:
        path = folder / f"static-{slug(method)}.onnx"
        kind, *extra = method.split(", ")
        start = clocks()
        try:
            quantize_static(
                str(prepared),
                str(path),
                Reader(batches),  # type: ignore[arg-type]
                per_channel=True,
                activation_type=QuantType.QUInt8 if "uint8" in extra else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[kind],
                extra_options={"CalibMovingAverage": "moving average" in extra},
            )
        except Exception as error:  # a method that cannot calibrate this network
            print(f"quantize_static {method}: {type(error).__name__}: {error}"[:300])
            continue
        row = since(start)
        value = validation.score(plain_session(path)).value
        tried[method] = (value, {**row, "path": str(path), "validation": round(100 * value, 3)})
    spent = round(sum(row["cpu_seconds"] for _, row in tried.values()), 2)
    best = max(tried, key=lambda method: tried[method][0])
    for method in dict.fromkeys([STATIC[network.name][0], best]):
        row = tried[method][1]
        label = f"quantize_static, {method}"
        if method == best and len(tried) > 1:
            label += f" (best of {len(tried)} on validation)"
            row["cpu_seconds"] = spent
        yield int8_row(network, row, "onnxruntime", onnxruntime.__version__, label)
    if network.name == "minilm":
        path = folder / "dynamic.onnx"
        start = clocks()
        quantize_dynamic(str(prepared), str(path), per_channel=True)
        row = {**since(start), "path": str(path)}
        yield int8_row(network, row, "onnxruntime", onnxruntime.__version__, "quantize_dynamic")


def int8_row(network: Network, row: Row, tool: str, version: str, setting: str) -> Row:
    """A row of an int8 ONNX file that onnxruntime runs."""
    path = Path(row["path"])
    return {
        "tool": tool,
        "version": version,
        "setting": setting,
        "budget_bits": 8,
        "average_bits": 8.0,
        "size_bytes": path.stat().st_size,
        "file": "ONNX, int8",
        **row,
        **network.judged(plain_session(path)),
    }


# tools in environments of their own


def setup(environments: Path) -> None:
    """Make the peers' environments."""
    for name, steps in PACKAGES.items():
        subprocess.run([sys.executable, "-m", "venv", str(environments / name)], check=True)
        for packages in steps:
            pip = [str(environments / name / "bin" / "python"), "-m", "pip", "install", "-q"]
            subprocess.run([*pip, *packages], check=True)


def run_job(python: Path, script: str, folder: Path, job: Row) -> Row:
    """Run ``script`` on ``folder``, unless the same job already ran there; its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, figures = folder / "job.json", folder / "figures.json"
    same = wanted.is_file() and json.loads(wanted.read_text()) == job
    if not (same and figures.is_file()):
        figures.unlink(missing_ok=True)
        wanted.write_text(json.dumps(job))
        with (folder / "log").open("w") as log:
            subprocess.run(
                [str(python), str(HERE / "peers" / script), str(folder)],
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
            )
    found: Row = json.loads(figures.read_text())
    return found


def mct_rows(network: Network, data: Path, folder: Path, python: Path) -> Iterator[Row]:
    """Sony's Model Compression Toolkit at every setting of ``MCT``."""
    from data import data_path

    loader, arguments = LOADERS[network.name]
    common = {
        "loader": str(data_path("models", loader, "loader.py")),
        "arguments": arguments,
        "data": str(data),
        "hessian": False,
        "epochs": 0,
        "attention": True,
    }
    for label, setting in MCT[network.name]:
        kind = {"default": "", "Hessian scores": "-hessian"}.get(label, "-gradient")
        place = folder / f"mct-{setting['bits']}{kind}"
        found = run_job(python, "mct_run.py", place, {**common, **setting})
        exported = place / "model.onnx"
        yield {
            "tool": "MCT",
            "version": found["tool_version"],
            "setting": label,
            "budget_bits": setting["bits"],
            "average_bits": round(found["average_bits"], 3),
            "size_bytes": exported.stat().st_size if exported.is_file() else None,
            "file": "ONNX, float weights",
            "packed_bytes": round(found["average_bits"] * found["elements"] / 8),
            "reported_weights_bytes": found["reported_weights_bytes"],
            "layer_bits": found["bits"],
            "cpu_seconds": round(found["cpu_seconds"], 2),
            "wall_seconds": round(found["wall_seconds"], 2),
            **network.judged(np.load(place / "predictions.npy")),
            "path": str(exported) if exported.is_file() else None,
        }


def nncf_rows(network: Network, data: Path, folder: Path, python: Path) -> Iterator[Row]:
    """NNCF's int8 quantization of the ONNX file, and through OpenVINO where it can be judged."""
    transformer = network.name not in LOADERS
    for backend in ("onnx",) if transformer else ("onnx", "openvino"):
        job = {
            "model": str(data / "float.onnx"),
            "data": str(data),
            "backend": backend,
            "transformer": transformer,
        }
        place = folder / f"nncf-{backend}"
        found = run_job(python, "nncf_run.py", place, job)
        row = {
            "cpu_seconds": round(found["cpu_seconds"], 2),
            "wall_seconds": round(found["wall_seconds"], 2),
        }
        if backend == "onnx":
            row["path"] = str(place / "model.onnx")
            yield int8_row(network, row, "NNCF", found["tool_version"], "ONNX file")
            continue
        parts = [place / "model.xml", place / "model.bin"]
        yield {
            "tool": "NNCF",
            "version": found["tool_version"],
            "setting": "OpenVINO file",
            "budget_bits": 8,
            "average_bits": 8.0,
            "size_bytes": sum(part.stat().st_size for part in parts),
            "file": "OpenVINO, int8",
            **row,
            **network.judged(np.load(place / "predictions.npy")),
            "path": str(parts[0]),
        }


# latency


def add_latencies(network: Network, rows: Sequence[Row], folder: Path, python: Path | None) -> None:
    """Latency of every row's file relative to float, side by side in one process.

    Batch 1, one thread; ours with the package's session settings, everything else with
    onnxruntime's defaults. In OpenVINO too where its environment (``python``) is there.
    """
    sessions: dict[Any, Any] = {"float": plain_session(network.float_model)}
    for i, row in enumerate(rows):
        if row.get("path", "") and row["path"].endswith(".onnx"):
            path = Path(row["path"])
            mine = row["tool"] == "autoquant"
            sessions[i] = OnnxRuntime().open(path) if mine else plain_session(path)
    found = measure(sessions, latency_inputs(network.task, network.graph, 1), threads=1, seconds=1)
    for i in sessions:
        if i != "float":
            ratio = found[i].latency_ms / found["float"].latency_ms
            rows[i]["onnxruntime_latency_ratio"] = round(ratio, 3)
    if python is None:
        return
    source = folder / "float.onnx"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(network.float_model)
    inputs = folder / "inputs.npz"
    arrays = latency_inputs(network.task, network.graph, 1)
    np.savez(inputs, **dict(zip(network.names, arrays, strict=True)))
    models = {str(i): row["path"] for i, row in enumerate(rows) if row.get("path")}
    job = {"models": {"float": str(source), **models}, "inputs": str(inputs), "at": time.time()}
    openvino = run_job(python, "openvino_latency.py", folder, job)
    for i, reason in openvino["refused"].items():
        print(f"OpenVINO refuses {rows[int(i)]['path']}: {reason}")
    milliseconds = openvino["latency_ms"]
    for i, latency in milliseconds.items():
        if i != "float":
            rows[int(i)]["openvino_latency_ratio"] = round(latency / milliseconds["float"], 3)


def slug(text: str) -> str:
    """Letters, digits and dashes."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


# the page


def correct(row: Row, samples: int) -> Array | None:
    """Which test samples a row has right."""
    if "correct" not in row:
        return None
    return np.unpackbits(np.frombuffer(base64.b64decode(row["correct"]), np.uint8), count=samples)


def counterpart(row: Row, rows: Sequence[Row]) -> Row | None:
    """Our row to set beside a peer's: same budget, same widths if we ran them, polished if so.

    Chosen by what was asked for, never by what came out.
    """
    mine = [r for r in rows if r["tool"] == "autoquant" and r["network"] == row["network"]]
    mine = [r for r in mine if r["budget_bits"] == row["budget_bits"]]
    widths = "{2,4,8}" if row["tool"] == "MCT" else "{2,3,4,6,8}"
    mine.sort(key=lambda r: (r["setting"].startswith(widths), "polished" in r["setting"]))
    return mine[-1] if mine else None


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def signed(value: float, error: float | None) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return text if error is None else f"{text} ± {error:.2f}"


def network_table(name: str, document: Row) -> list[str]:
    """One network: every row, from many bits to few."""
    rows = [r for r in document["rows"] if r["network"] == name]
    base = document["float"][name]
    lines = [
        f"## {TITLES[name]}",
        "",
        f"Float: {base['score']:.2f}, {base['size_bytes']:,} bytes. Calibration: "
        f"{base['calibration']} samples, no labels.",
        "",
        "| tool | setting | budget | average bits | score | drop | file, bytes | CPU s | "
        "latency, onnxruntime | latency, OpenVINO |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows.sort(key=lambda r: (-r["budget_bits"], TOOLS[r["tool"]], r["setting"]))
    for r in rows:
        cpu = number(r["cpu_seconds"], 1)
        if "shared_cpu_seconds" in r:
            cpu = f"{number(r['shared_cpu_seconds'], 1)} + {cpu}"
        version = f" {r['version']}" if "version" in r else ""
        size = number(r["size_bytes"], 0)
        if "packed_bytes" in r:
            size += f" ({r['packed_bytes']:,} if packed)"
        cells = [
            f"**{r['tool']}**" if r["tool"] == "autoquant" else f"{r['tool']}{version}",
            r["setting"],
            f"{r['budget_bits']:g}",
            number(r["average_bits"]),
            number(r["score"]) + (" †" if miscomputed(r) else ""),
            f"{r['drop_points']:.2f} ± {r['drop_standard_error_points']:.2f}".replace("-", "−"),
            size,
            cpu,
            number(r.get("onnxruntime_latency_ratio")),
            number(r.get("openvino_latency_ratio")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if any(map(miscomputed, rows)):
        lines += [
            "",
            "† OpenVINO's CPU plugin computed this network's int8 files wrongly in this run, "
            "NNCF's ONNX file and ours among them, though onnxruntime runs those two rightly (on "
            "processors with VNNI it was right since: see deploying.md). The row says nothing of "
            "NNCF, is left out below, and the int8 latencies in OpenVINO are those of wrong "
            "answers.",
        ]
    return [*lines, ""]


def miscomputed(row: Row) -> bool:
    """Whether a row tells of its runtime, not of its tool.

    OpenVINO 2026.4 gets ResNet-20 wrong in int8 on the machine of the first record: the same for
    NNCF's ONNX file and for ours, which are right in onnxruntime.
    """
    return bool(row["file"].startswith("OpenVINO") and row["drop_points"] > 20)


def head_to_head(document: Row) -> tuple[list[str], list[str]]:
    """Ours beside each peer's row, and in words where the peer is ahead."""
    lines = [
        "| network | budget | peer | ours | ours − peer, points | file, ours / peer | "
        "latency, ours / peer | CPU, ours / peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ahead = []
    for r in document["rows"]:
        if r["tool"] == "autoquant" or miscomputed(r):
            continue
        mine = counterpart(r, document["rows"])
        if mine is None:
            continue
        samples = document["float"][r["network"]]["samples"]
        theirs, own = correct(r, samples), correct(mine, samples)
        gain, error = mine["score"] - r["score"], None
        if theirs is not None and own is not None:
            difference = own.astype(float) - theirs
            gain = 100 * float(difference.mean())
            error = 100 * float(difference.std() / math.sqrt(samples))
        size = mine["size_bytes"] / r["size_bytes"] if r["size_bytes"] else None
        runtime = "openvino" if r["file"].startswith("OpenVINO") else "onnxruntime"
        key = f"{runtime}_latency_ratio"
        latency = mine[key] / r[key] if key in mine and key in r else None
        cpu = (mine["shared_cpu_seconds"] + mine["cpu_seconds"]) / r["cpu_seconds"]
        who = f"{r['tool']}, {r['setting']}"
        lines.append(
            f"| {r['network']} | {r['budget_bits']:g} | {who} | {mine['setting']} | "
            f"{signed(gain, error)} | {number(size)} | {number(latency)} | {number(cpu)} |"
        )
        where = f"{r['network']} at {r['budget_bits']:g} bits, {who}"
        if gain < 0:
            within = "" if error is None or gain < -2 * error else " (within two standard errors)"
            ahead.append(f"- Accuracy, {where}: {-gain:.2f} points better than ours{within}.")
        if size is not None and size > 1.005:
            ahead.append(f"- File, {where}: ours is {size:.2f} times as large.")
        if latency is not None and latency > 1.03:
            ahead.append(
                f"- Latency in {runtime}, {where}: ours takes {latency:.2f} times as long."
            )
        if cpu > 1:
            ahead.append(f"- CPU time, {where}: ours takes {cpu:.1f} times as long for one budget.")
    return lines, ahead


def times(document: Row) -> list[str]:
    """Several budgets together, and whole searches, beside MCT's budgets."""
    lines = []
    for name in document["float"]:
        rows = [r for r in document["rows"] if r["network"] == name and "{2,4,8}" in r["setting"]]
        theirs = {
            r["budget_bits"]: r["cpu_seconds"]
            for r in document["rows"]
            if (r["network"], r["tool"], r["setting"]) == (name, "MCT", "default")
        }
        for suffix in ("", ", polished"):
            mine = [r for r in rows if r["setting"] == "{2,4,8}" + suffix]
            mine = [r for r in mine if r["budget_bits"] in theirs]
            if mine:
                spent = mine[0]["shared_cpu_seconds"] + sum(r["cpu_seconds"] for r in mine)
                lines.append(
                    _time(name, "{2,4,8}" + suffix, spent, [r["budget_bits"] for r in mine], theirs)
                )
        for found in (s for s in document["searches"] if s["network"] == name):
            label = f"whole search, {found['trials']} trials, {found['members']} members"
            budgets = sorted(theirs)[:3]
            lines.append(_time(name, label, found["cpu_seconds"], budgets, theirs))
    if not lines:
        return []
    return [
        "## Time for several budgets",
        "",
        "CPU seconds. A whole search is a default one with everything that its process does "
        "(imports, lowering, timing the device's kernels, scoring every trial's file, polishing, "
        "verification, MLflow); of MCT only the quantization is counted.",
        "",
        "| network | ours | CPU s | MCT's budgets | CPU s | ours / MCT |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
    ]


def _time(name: str, label: str, spent: float, budgets: list[float], theirs: Row) -> str:
    total = sum(theirs[bits] for bits in budgets)
    shown = ", ".join(f"{bits:g}" for bits in sorted(budgets, reverse=True))
    return f"| {name} | {label} | {spent:.1f} | {shown} | {total:.1f} | {spent / total:.2f} |"


def unmeasured(document: Row) -> list[str]:
    """What the benchmark can run and the results do not hold."""
    rows = document["rows"]
    done = {(r["network"], r["tool"]) for r in rows}
    missing = [f"{tool} on {name}" for name in OURS for tool in TOOLS if (name, tool) not in done]
    missing = [text for text in missing if text != "MCT on minilm"]  # it takes images here
    settings = {(r["network"], r["setting"], r["budget_bits"]) for r in rows if r["tool"] == "MCT"}
    for name, cases in MCT.items():
        for label, setting in cases:
            found = (name, label, setting["bits"]) in settings
            if not found and (name, "MCT") in done:
                missing.append(f"MCT on {name} at {setting['bits']:g} bits ({label})")
    searched = {s["network"] for s in document["searches"]}
    missing += [f"a whole search of {name}" for name in SEARCHES if name not in searched]
    if not missing:
        return []
    return ["## Not measured yet", "", *(f"- {text}" for text in missing)]


def page(document: Row) -> str:
    """docs/comparison.md."""
    versions = {r["tool"]: r["version"] for r in document["rows"] if "version" in r}
    named = ", ".join(f"{tool} {version}" for tool, version in versions.items())
    table, ahead = head_to_head(document)
    lines = [
        "# Beside other tools",
        "",
        "Written by `python benchmarks/peers.py`; the figures are in "
        "`benchmarks/results/peers.json`. "
        f"Measured on {document['environment']['cpu']}, with {named}.",
        "",
        *READING,
        "",
    ]
    for name in document["float"]:
        lines += network_table(name, document)
    lines += [
        "## Head to head",
        "",
        "Ours at the same budget (the width set {2,4,8} beside MCT where it was run, polished "
        "where polishing was run), on the same test samples, with the standard error of the "
        "paired difference. Latency is in onnxruntime, and in OpenVINO for OpenVINO files.",
        "",
        *table,
        "",
        *times(document),
        "## Where a peer is ahead",
        "",
        *(ahead or ["Nowhere in these figures."]),
        "",
        *unmeasured(document),
    ]
    return "\n".join(lines).rstrip() + "\n"


READING = [
    "**How to read it.** Every tool starts from the same float weights and the same calibration "
    "samples (seed 0), and every answer is judged on the same test split, which steered nothing. "
    "*Drop* is float minus the row on the same samples, in points, with the standard error of the "
    "paired difference; drops closer than two of those are not told apart here. *Average bits* "
    "are over the weights of convolutions and linear layers; activations are 8 bits everywhere, "
    "biases and embeddings are outside the budget. Ours is scored as a file in onnxruntime and is "
    "the exact solution under the measured prior, not the best of a search; *polished* refits the "
    "weights, still without labels. MCT is scored as the PyTorch module that it returns: its ONNX "
    "export keeps the fake-quantized weights in float32, so that its file is as large as float's, "
    "whatever the bits; the size that the integers would take if someone packed them stands in "
    "brackets. Its default target also restricts activation scales to powers of two, which ours "
    "and the others do not. onnxruntime's and NNCF's answers are real int8 files. *CPU s* is the "
    "process's time for "
    "quantizing alone, without imports and scoring; ours is what all budgets of a width set share "
    "plus the row's own, and the shared part includes scoring float on the validation split. "
    "*Latency* is relative to the float file in the same runtime, "
    "batch 1, one thread, files run in turn in one process; least of many runs. The peers' and "
    "the float files are opened with the runtime's defaults, ours with the settings that its "
    "package ships: with the defaults, onnxruntime itself makes int8 weights of MCT's float ones "
    "between quantized activations, which is why those files are fast. OpenVINO computes float "
    "layers in float32 here.",
]


def main() -> None:
    """All rows or only ours, the record, the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="of " + ", ".join(OURS))
    parser.add_argument("--setup", type=Path, metavar="ENVIRONMENTS")
    parser.add_argument("--environments", type=Path, help="the folder that --setup made")
    parser.add_argument("--work", type=Path, help="keeps the peers' files; default: temporary")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), help="whose rows to measure")
    parser.add_argument("--ours", action="store_true", help="--tools autoquant")
    parser.add_argument("--searches", action="store_true", help="time whole searches too")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    if options.setup:
        setup(options.setup.resolve())
        return
    if options.ours:
        options.tools = ["autoquant"]
    stored = RESULTS / "peers.json"
    document: Row = json.loads(stored.read_text()) if stored.is_file() else {}
    document.pop("environment", None)
    for key, empty in (("float", {}), ("rows", []), ("searches", [])):
        document.setdefault(key, empty)
    if not options.page:
        with tempfile.TemporaryDirectory() as temporary:
            work = (options.work or Path(temporary)).resolve()
            for name in options.networks or OURS:
                run(name, document, options, work)
    PAGE.write_text(page(json.loads(stored.read_text())), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(HERE.parent)}")


def run(name: str, document: Row, options: argparse.Namespace, work: Path) -> None:
    """One network: new rows take the place of the same tools' rows in ``document``, which is
    recorded after every row, so that a run that is stopped keeps what it has."""
    network = Network(name)
    environments = options.environments.resolve() if options.environments else None
    data, jobs = work / "data" / name, work / "jobs" / name
    python = {n: environments / n / "bin" / "python" for n in PACKAGES} if environments else {}
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "autoquant": lambda: ours(network, jobs / "ours"),
        "onnxruntime": lambda: onnxruntime_rows(network, jobs / "onnxruntime"),
    }
    if python:
        makers["NNCF"] = lambda: nncf_rows(network, data, jobs, python["nncf"])
    if python and name in MCT:
        makers["MCT"] = lambda: mct_rows(network, data, jobs, python["mct"])
    makers = {tool: make for tool, make in makers.items() if tool in options.tools}
    if {"NNCF", "MCT"} & set(makers):
        network.write(data)
    reference = network.test.reference
    assert reference is not None
    document["float"][name] = {
        "score": round(100 * reference.value, 3),
        "size_bytes": len(network.float_model),
        "samples": network.test.split.samples,
        "calibration": network.task.split("calibration").samples,
    }
    kept, rows = document["rows"], list[Row]()
    for tool, make in makers.items():
        kept = [r for r in kept if r["network"] != name or r["tool"] != tool]
        for row in make():
            rows.append({"network": name, **row})
            save(document, kept, rows)
            shown = {k: v for k, v in row.items() if k not in ("correct", "layer_bits", "path")}
            print(json.dumps({"network": name, **shown}), flush=True)
    add_latencies(network, rows, jobs / "openvino", python.get("nncf"))
    save(document, kept, rows)
    if options.searches and name in SEARCHES:
        others = [s for s in document["searches"] if s["network"] != name]
        document["searches"] = [*others, whole_search(name)]
        print(json.dumps(document["searches"][-1]), flush=True)
        save(document, kept, rows)


def save(document: Row, kept: Sequence[Row], rows: Sequence[Row]) -> None:
    """Record the kept and the new rows, without the paths of this machine."""
    fresh = [{k: v for k, v in row.items() if k != "path"} for row in rows]
    document["rows"] = [*kept, *fresh]
    record("peers", document)


if __name__ == "__main__":
    main()
