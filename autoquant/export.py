"""The deployment package: write it for one member of a front, and check one again.

A package is a folder: ``model.onnx``, ``candidate.yaml``, ``manifest.json``, ``sample.npz``,
``run.py``, ``README.md``, and the files of the formats that the device's profile names (`deploy`).
The manifest holds the SHA-256 of every other file and what the model claims to be. `verify` trusts
none of it: it reads bits and shapes back from the model, makes the formats again, and runs it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import tempfile
import zipfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper
from pydantic import ConfigDict, ValidationError

from autoquant.candidate import Candidate, LayerChoice, parse_sparsity
from autoquant.compress import coding
from autoquant.compress.lower import lower
from autoquant.compress.qdq import TENSORRT
from autoquant.compress.readback import read_bits, stored_weights
from autoquant.compress.rounding import integer_range
from autoquant.deploy import FORMATS, PRECOMPILED
from autoquant.deploy.tensorrt import check_tensorrt
from autoquant.document import Document
from autoquant.errors import PackageError, RunError, UserError, nearest
from autoquant.evaluate import divergence
from autoquant.front import Front, Member
from autoquant.graph import LAYER_KINDS
from autoquant.hardware import Hardware, RuntimeName
from autoquant.result import Score
from autoquant.runtime import (
    RUNTIMES,
    SESSION_CONFIG,
    WITHOUT_VNNI,
    OnnxRuntime,
    OnnxSession,
    describe,
    session_config,
)
from autoquant.runtime_openvino import OPENVINO_RUNTIMES, is_installed
from autoquant.search.run import describe_environment
from autoquant.search.trial import evaluator_for, float_model
from autoquant.task import Array, Task

FORMAT: Final = 1
COMPRESSED = "model.aqz"
MANIFEST = "manifest.json"
FILES = ("model.onnx", "candidate.yaml", "sample.npz", "run.py", "README.md")
STEPS = 4  # steps of the narrowest activation grid that outputs may differ by between machines
FLOAT_TOLERANCE = 1e-3  # share of the output's range, where no grid is that coarse


class _Strict(Document):
    """No conversions: a number in quotes is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorSpec(_Strict):
    """An input or output. Symbolic dimensions are strings, unknown ones null."""

    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: str


class LayerSpec(_Strict):
    """A layer: its operator in the file and its bits as in ``candidate.yaml``."""

    kind: str
    weight_bits: int
    activation_bits: int


class Manifest(_Strict):
    """The content of ``manifest.json``.

    ``files``: name → SHA-256. ``searched``, ``predicted``, ``verified`` and ``baseline`` are as
    in ``front.json``. ``session_config``: session options that the model needs to be what it
    claims. ``runtime``: what scored it. ``formats``: the forms that it has for other runtimes.
    ``tolerance``: for each output the largest absolute difference from ``sample.npz`` on another
    ``machine`` than the one that recorded it.
    """

    format: Literal[1]
    autoquant: str
    key: str
    run: str
    task: str
    trial: int
    hardware: str
    runtime: RuntimeName = "onnxruntime"
    dialect: str
    metric: str
    files: dict[str, str]
    formats: tuple[str, ...] = ()
    size_bytes: int
    opset: int
    ir_version: int
    session_config: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: dict[str, LayerSpec]
    searched: dict[str, Any]
    predicted: dict[str, Any]
    verified: dict[str, Any] | None
    baseline: dict[str, Any]
    tolerance: dict[str, float]
    machine: dict[str, str]
    versions: dict[str, str]


# --- writing ---------------------------------------------------------------------------------


def export(
    member: Member,
    folder: str | Path,
    *,
    front: Front | None = None,
    precompiled: bool = False,
    compressed: bool = False,
) -> Path:
    """Write the package of one member of a run and return its folder.

    ``folder`` is made; it must not exist or be empty. The package is checked as `verify` does
    and then moved into place at once. Without ``front`` that of the member's run is read.
    Formats of the device that cannot say this member are left out; its README says why.
    ``precompiled``: also the graph as onnxruntime optimizes it for this machine. ``compressed``:
    also the model entropy-coded, `autoquant.compress.coding`.
    Raises RunError: the folder is in use or cannot be written, or the run lacks the artifact,
    has another one than was scored, or has no sample inputs.
    """
    target = Path(folder)
    place = _free(target)
    if front is None:
        if member.folder is None:
            raise RunError(f"trial {member.trial}: its run is not known; give front=…")
        front = Front.read(member.folder)
    source = _Source.read(front, member)
    model, session = _parsed(source.model), OnnxRuntime().open(source.model)
    sample, tolerance = _sample(source.folder / "inputs.npz", session, member.candidate)
    if source.dialect == TENSORRT:
        problems = check_tensorrt(model)
        if problems:
            raise RunError(f"{source.artifact}: TensorRT would refuse it: {_few(problems)}")
    extra, missing = _formats(source.formats, model)
    if precompiled:
        extra[PRECOMPILED] = _precompiled(source.model)
    if compressed:
        extra[COMPRESSED] = coding.compress(source.model)
    contents = {
        "model.onnx": source.model,
        "candidate.yaml": _yaml(member.candidate.to_dict()),
        "sample.npz": _npz(sample),
        "run.py": _SCRIPT.encode(),
        "README.md": (_readme(front, member) + _uses(extra, missing, source)).encode(),
        **extra,
    }
    nodes = {node.name: node for node in model.graph.node}
    kinds = {
        layer: nodes[name].op_type
        for name, (layer, _) in _stored(nodes, member.candidate).items()
        if name in nodes
    }
    manifest = Manifest(
        format=FORMAT,
        autoquant=describe_environment()["versions"]["autoquant"],
        key=member.key,
        run=front.run,
        task=front.task,
        trial=member.trial,
        hardware=front.hardware,
        runtime=source.runtime,
        dialect=source.dialect,
        metric=member.searched.metric,
        files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        formats=tuple(name for name in source.formats if name not in missing),
        size_bytes=len(source.model),
        session_config=session_config(),
        layers={
            name: LayerSpec(
                kind=kinds.get(name, "dropped" if member.candidate.is_structural else "missing"),
                weight_bits=choice.weight_bits,
                activation_bits=choice.activation_bits,
            )
            for name, choice in member.candidate.layers.items()
        },
        searched=member.searched.to_dict(),
        predicted=member.predicted.to_dict(),
        verified=None if member.verified is None else dict(member.verified),
        baseline=dict(front.baseline),
        tolerance=tolerance,
        machine=_machine(),
        versions=source.versions,
        **_interface(model),
    )
    contents[MANIFEST] = (manifest.model_dump_json(indent=1) + "\n").encode()
    try:
        _place(contents, place)
    except PackageError as error:
        raise RunError(f"{source.artifact}: cannot be packaged: {error}") from None
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target


def _formats(
    names: Sequence[str], model: onnx.ModelProto
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Files of the formats, and the reasons of those that cannot say this model."""
    files: dict[str, bytes] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            files |= FORMATS[name].make(model)
        except RunError as error:
            missing[name] = str(error)
    return files, missing


def _precompiled(model: bytes) -> bytes:
    """The graph that onnxruntime runs on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PRECOMPILED
        OnnxRuntime().open(model, optimized=path)
        return path.read_bytes()


def _free(target: Path) -> Path:
    """The absolute folder, which is absent or empty. Raises RunError."""
    try:
        place = target.resolve()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            kind = "a folder with files in it" if place.is_dir() else "a file"
            raise RunError(f"{target}: is {kind}; give a new or empty folder")
    except OSError as error:
        raise RunError(f"{target}: cannot be used: {error.strerror or error}") from None
    return place


def _place(contents: Mapping[str, bytes], place: Path) -> None:
    """Write beside ``place``, check, then rename: a crash leaves no half package."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as temporary:
        package = Path(temporary) / "package"
        package.mkdir()
        for name, data in contents.items():
            (package / name).write_bytes(data)
        _check(package, None)
        if place.exists():
            place.rmdir()
        package.rename(place)


@dataclass(frozen=True, slots=True)
class _Source:
    """What a package needs of the run folder."""

    folder: Path
    artifact: Path
    model: bytes
    runtime: RuntimeName
    dialect: str
    formats: tuple[str, ...]
    versions: dict[str, str]

    @classmethod
    def read(cls, front: Front, member: Member) -> _Source:
        """Read the artifact, checked against the trial's line, and the records of the run."""
        if front.folder is None:
            raise RunError(f"run {front.run!r}: its folder is not known; use Front.read(folder)")
        folder, trial = front.folder, member.trial
        if member.artifact is None:
            raise RunError(f"run {front.run!r}: trial {trial} has no artifact; --resume the search")
        path = folder / member.artifact
        line = _trial_line(folder / "trials.jsonl", trial)
        if line.get("key") != member.key:
            raise RunError(f"{folder}: front.json and trials.jsonl differ on trial {trial}")
        try:
            model = path.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{path}: cannot be read: {reason}; --resume makes it again") from None
        if hashlib.sha256(model).hexdigest() != line.get("sha256"):
            raise RunError(
                f"{path}: is not the file that was scored (sha256 in trials.jsonl); "
                "--resume the search to make it again"
            )
        study = _mapping(folder / "study.yaml")
        environment = _mapping(folder / "environment.json")
        try:
            hardware = Hardware.model_validate(study["hardware"])
            versions = {
                "python": str(environment["python"]),
                **{str(k): str(v) for k, v in environment["versions"].items()},
                "onnxruntime": str(environment["onnxruntime"]),
            }
        except (KeyError, AttributeError, ValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"{folder}: study.yaml or environment.json lack: {reason}") from None
        formats = tuple(hardware.formats)
        return cls(folder, path, model, hardware.runtime, hardware.dialect, formats, versions)


def _trial_line(path: Path, trial: int) -> dict[str, Any]:
    """The line of one trial in trials.jsonl. Raises RunError."""
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # half-written
            if isinstance(line, dict) and line.get("trial") == trial:
                return line
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    raise RunError(f"{path}: no trial {trial}")


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON mapping. Raises RunError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise RunError(f"{path}: expected fields")
    return found


def _sample(
    path: Path, session: OnnxSession, candidate: Candidate
) -> tuple[dict[str, Array], dict[str, float]]:
    """Inputs of the run with the outputs that the model gives, and tolerances. Raises RunError."""
    if not path.is_file():
        raise RunError(
            f"{path}: no such file; an older version made this run: "
            "repeat the search, which saves its sample inputs"
        )
    try:
        inputs = _arrays(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if set(inputs) != set(session.input_names):
        raise RunError(
            f"{path}: has {', '.join(inputs)}; the model's inputs are "
            f"{', '.join(session.input_names)}"
        )
    try:
        outputs = _outputs(session, inputs)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path}: the model cannot run it: {reason}") from None
    for name, value in outputs.items():
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise RunError(f"{path}: the model's output {name!r} is NaN for it")
    return {**inputs, **outputs}, tolerances(outputs, candidate)


def tolerances(outputs: Mapping[str, Array], candidate: Candidate) -> dict[str, float]:
    """How far outputs may be from recorded ones on another machine, absolute, by output.

    Kernels of another processor or version of onnxruntime sum in another order. That moves a
    float output by about 1e-6 of its range; on a grid, a value that lies on the border between
    two codes moves by a whole step (one least significant bit), and later layers add up such
    moves. So the tolerance is four steps of the narrowest activation grid of the candidate,
    taken over the range of the recorded output: 1.6 % of it at 8 bits, 27 % at 4; without a
    grid of 8 bits or fewer 0.1 %. Integer outputs must be equal.
    """
    bits = min((c.activation_bits for c in candidate.layers.values()), default=32)
    share = max(STEPS / (2**bits - 1), FLOAT_TOLERANCE)
    result = {}
    for name, value in outputs.items():
        finite = value[np.isfinite(value)].astype(np.float64) if value.dtype.kind == "f" else None
        if finite is None or not finite.size:
            result[name] = 0.0
        else:
            span = float(np.ptp(finite)) or float(np.abs(finite).max())
            result[name] = share * span
    return result


def _machine() -> dict[str, str]:
    """What decides which kernels run: two machines with the same give the same bytes."""
    about = describe()
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.partition(":")[0].strip() in ("flags", "Features"):
                flags = " ".join(sorted(line.partition(":")[2].split()))
                break
    return {
        "onnxruntime": about["onnxruntime"],
        "cpu": about["cpu"],
        "cpu_features": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "system": platform.system(),
    }


def _outputs(session: OnnxSession, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name for the inputs among ``arrays``."""
    outputs = session.run([arrays[name] for name in session.input_names])
    return dict(zip(session.output_names, map(np.asarray, outputs), strict=True))


def _yaml(content: Any) -> bytes:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def _npz(arrays: Mapping[str, Array]) -> bytes:
    """An ``.npz`` file, byte for byte the same for the same arrays; names may be anything."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _arrays(data: bytes) -> dict[str, Array]:
    """The arrays of an ``.npz`` file, without pickles. Raises ValueError."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"not an npz file: {type(error).__name__}: {reason}") from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"not an npz file: {name!r} is not an array")
    return found


_SCRIPT = '''\
"""Run the model on sample.npz, or on the .npz given, and compare with the outputs in it."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).resolve().parent
manifest = json.loads((here / "manifest.json").read_text(encoding="utf-8"))

options = ort.SessionOptions()
for key, value in manifest["session_config"].items():  # without them it is another network
    options.add_session_config_entry(key, value)
session = ort.InferenceSession(
    str(here / "model.onnx"), options, providers=["CPUExecutionProvider"]
)

arrays = np.load(sys.argv[1] if len(sys.argv) > 1 else here / "sample.npz", allow_pickle=False)
inputs = {i.name: arrays[i.name] for i in session.get_inputs()}
names = [o.name for o in session.get_outputs()]
failed = False
for name, output in zip(names, session.run(names, inputs)):
    print(f"{name}: {output.dtype} {output.shape}")
    if name not in arrays:
        continue
    recorded, tolerance = arrays[name], manifest["tolerance"][name]
    difference = np.inf
    if output.shape == recorded.shape:
        difference = np.abs(output.astype(float) - recorded).max(
            where=output != recorded, initial=0
        )
    print(f"  max abs difference {difference:.3g}, tolerance {tolerance:.3g}")
    failed |= not difference <= tolerance
sys.exit(1 if failed else 0)
'''


def _readme(front: Front, member: Member) -> str:
    found: Mapping[str, Any] = member.verified or member.searched.to_dict()
    latency = member.latency_ms
    measured = bool(member.verified and member.verified.get("latency_ms") is not None)
    kind = "" if measured else f" predicted for {front.hardware}"
    speed = "" if latency is None else f", {latency:.3f} ms{kind}"
    entries = "\n".join(
        f'options.add_session_config_entry("{key}", "{value}")'
        for key, value in session_config().items()
    )
    return f"""\
# {front.task}: trial {member.trial} of run {front.run}

{found["metric"]} {found["accuracy"]:.4f} on {found["samples"]:,} {found["split"]} samples \
(drop {found["drop"]:+.4f}){speed}. Needs `onnxruntime` and `numpy`:

```python
import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
{entries}
session = ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
sample = np.load("sample.npz")
outputs = session.run(None, {{i.name: sample[i.name] for i in session.get_inputs()}})
print([output.shape for output in outputs])
```

The session options belong to the model: without them onnxruntime changes its precision. On x86
processors without VNNI instructions `session.x64quantprecision` must be 1, or its sums saturate.
`python run.py` compares with the outputs in `sample.npz`; `autoquant verify .` checks everything
that `manifest.json` says.
"""


_OPENVINO = """\
The figures are OpenVINO's, opened so (`pip install openvino`):

```python
import numpy as np
import openvino as ov

core, sample = ov.Core(), np.load("sample.npz")
model = core.read_model("model.onnx")
inputs = {{port.get_any_name(): sample[port.get_any_name()] for port in model.inputs}}
model.reshape({{name: list(array.shape) for name, array in inputs.items()}})  # faster fixed
settings = {{"INFERENCE_PRECISION_HINT": "{precision}", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}}
outputs = core.compile_model(model, "CPU", settings)(inputs)
print([output.shape for output in outputs.values()])
```
"""


def _uses(extra: Mapping[str, bytes], missing: Mapping[str, str], source: _Source) -> str:
    """How to run the model where it is for, and the other files of the package."""
    parts = []
    if source.runtime in OPENVINO_RUNTIMES:
        parts.append(_OPENVINO.format(precision="bf16" if "bf16" in source.runtime else "f32"))
    if source.dialect == TENSORRT:
        parts.append(
            "`model.onnx` is quantized as TensorRT reads it (int8 around zero, explicit Q/DQ):\n\n"
            "```sh\ntrtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.engine\n```\n"
        )
    parts += [f.use for f in FORMATS.values() if f.files[0] in extra]
    parts += [f"There is no {name}: {reason}.\n" for name, reason in missing.items()]
    if COMPRESSED in extra:
        parts.append(
            f"`{COMPRESSED}` is `model.onnx` entropy-coded, in {len(extra[COMPRESSED]):,} bytes:\n"
            f"`autoquant unpack {COMPRESSED} -o model.onnx` makes the same file of it.\n"
        )
    if PRECOMPILED in extra:
        parts.append(
            f"`{PRECOMPILED}` is what onnxruntime makes of `model.onnx` when it opens it on the\n"
            "machine that the manifest describes, and is for that one alone. Open it with\n"
            "`options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL`.\n"
        )
    return "".join(f"\n{part}" for part in parts)


# --- checking --------------------------------------------------------------------------------


def verify(folder: str | Path, task: Task | None = None) -> dict[str, Any]:
    """Re-run a package against its manifest; with ``task`` its accuracy too.

    Outputs must equal the recorded ones exactly on a machine with the same processor, its
    features and onnxruntime as the one that recorded them, and within `tolerances` elsewhere:
    a rounding difference of one step (least significant bit) of an activation grid is no fault.
    Accuracy must be that of the manifest up to a quarter of its standard error (a sample or two
    for top1), for the same reason. What a forger could still do is edit every file consistently;
    giving the task then shows it.

    Returns ``{"package", "checks": [{"name", "ok", "detail"}], "accuracy", "ok"}``. Raises
    PackageError: one line with file and difference; TaskError where the task lacks the split.
    """
    try:
        checks, accuracy = _check(Path(folder), task)
    except PackageError as error:
        raise PackageError(f"{folder}: {error}") from None
    return {"package": str(folder), "checks": checks, "accuracy": accuracy, "ok": True}


def _check(folder: Path, task: Task | None) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Every check in order; the first that finds differences raises PackageError with them."""
    checks: list[dict[str, Any]] = []

    def passed(name: str, detail: str) -> None:
        checks.append({"name": name, "ok": True, "detail": detail})

    manifest = _read_manifest(folder)
    passed("manifest", f"trial {manifest.trial} of run {manifest.run}, format {manifest.format}")
    contents = _read_files(folder, manifest)
    passed("files", f"{len(contents)} files have the SHA-256 of the manifest")
    candidate = _read_candidate(contents["candidate.yaml"], manifest)
    passed("candidate", f"key {candidate.key}, {len(candidate.layers)} layers")
    _raise(_figure_problems(manifest))
    passed("figures", "accuracies and drops agree with the baseline")
    model = _parsed(contents["model.onnx"])
    session = _opened(contents["model.onnx"])
    _raise(_interface_problems(model, len(contents["model.onnx"]), manifest))
    passed("model", f"{manifest.size_bytes:,} bytes, opset {manifest.opset}, opens in onnxruntime")
    _raise(_layer_problems(model, candidate, manifest))
    passed("bits", f"weights and activations of {len(candidate.layers)} layers, from the model")
    passed("outputs", _compare_outputs(contents["sample.npz"], session, candidate, manifest))
    if manifest.dialect == TENSORRT:
        _raise([f"model.onnx: TensorRT would refuse it: {p}" for p in check_tensorrt(model)])
        passed("tensorrt", "nothing in the graph that TensorRT would refuse")
    if manifest.dialect != TENSORRT and is_installed():
        passed("openvino", _openvino_detail(contents, manifest))
    for name in manifest.formats:
        passed(name, _format_detail(name, model, contents, manifest))
    if PRECOMPILED in contents:
        passed("precompiled", _precompiled_detail(contents, manifest))
    if COMPRESSED in contents:
        passed("compressed", _compressed_detail(contents))
    accuracy = None
    if task is not None:
        accuracy = _accuracy(task, contents["model.onnx"], manifest)
        passed(
            "accuracy",
            f"{accuracy['metric']} {accuracy['accuracy']:.4f} on {accuracy['split']}, "
            f"recorded {accuracy['recorded']:.4f}",
        )
    return checks, accuracy


def _raise(problems: Sequence[str]) -> None:
    """Raise PackageError with the first few of ``problems``, if there are any."""
    if problems:
        raise PackageError(_few(problems))


def _few(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    return "; ".join(problems[:4]) + more


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise PackageError("no such folder")
    try:
        text = _regular(folder / MANIFEST)
    except FileNotFoundError:
        raise PackageError(f"no {MANIFEST}: not a package, or an incomplete one") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        known = {"extra_forbidden": "unknown field", "missing": "missing"}
        message = known.get(first["type"], first["msg"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise PackageError(f"{MANIFEST}: {field + ': ' if field else ''}{message}{more}") from None
    if manifest.session_config not in (SESSION_CONFIG, SESSION_CONFIG | WITHOUT_VNNI):
        raise PackageError(
            f"{MANIFEST}: session_config is {manifest.session_config}, "
            f"the model needs {SESSION_CONFIG}"
        )
    return manifest


def _regular(path: Path) -> bytes:
    """The bytes of a file that is no link. Raises PackageError, FileNotFoundError."""
    if path.is_symlink():
        raise PackageError(f"{path.name}: is a symbolic link; a package holds its files itself")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PackageError(f"{path.name}: cannot be read: {error.strerror or error}") from None


def _read_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The package's files, by the names that a package has and no others."""
    unknown = [n for n in manifest.formats if n not in FORMATS]
    _raise([f"{MANIFEST}: formats: unknown {n!r}; {nearest(n, FORMATS)}" for n in unknown])
    names = [*FILES, *(n for format in manifest.formats for n in FORMATS[format].files)]
    problems = [f"{MANIFEST}: files lacks {n}" for n in names if n not in manifest.files]
    names += [name for name in (PRECOMPILED, COMPRESSED) if name in manifest.files]
    problems += [f"{MANIFEST}: files has {n!r}" for n in manifest.files if n not in names]
    _raise(problems)
    known = {*names, MANIFEST}
    problems = [
        f"{path.name}: does not belong to the package"
        for path in sorted(folder.iterdir())
        if path.name not in known and not path.name.startswith(".")  # as editors and shares leave
    ]
    contents = {}
    for name in names:
        try:
            contents[name] = _regular(folder / name)
        except FileNotFoundError:
            problems.append(f"{name}: missing")
            continue
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != manifest.files[name]:
            problems.append(
                f"{name}: changed: SHA-256 is {found[:12]}…, "
                f"the manifest says {manifest.files[name][:12]}…"
            )
    _raise(problems)
    return contents


def _read_candidate(data: bytes, manifest: Manifest) -> Candidate:
    try:
        candidate = Candidate.from_dict(yaml.safe_load(data.decode()), where="candidate.yaml")
    except UserError as error:
        raise PackageError(str(error)) from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise PackageError(f"candidate.yaml: not a candidate: {_one_line(error)}") from None
    problems = []
    if set(candidate.layers) != set(manifest.layers):
        names = sorted(set(candidate.layers) ^ set(manifest.layers))
        problems.append(f"candidate.yaml: it and the manifest do not both have layer {names[0]!r}")
    for name, choice in candidate.layers.items():
        stated = manifest.layers.get(name)
        bits = (choice.weight_bits, choice.activation_bits)
        if stated is not None and bits != (stated.weight_bits, stated.activation_bits):
            problems.append(
                f"candidate.yaml: layer {name!r} has {bits[0]}/{bits[1]} bits, the manifest "
                f"says {stated.weight_bits}/{stated.activation_bits}"
            )
    if candidate.key != manifest.key:
        problems.append(f"candidate.yaml: key is {candidate.key}, the manifest says {manifest.key}")
    _raise(problems)
    return candidate


def _figure_problems(manifest: Manifest) -> list[str]:
    """Differences between figures of the manifest that must agree."""
    problems = []
    for part in ("searched", "verified"):
        figures = getattr(manifest, part)
        if figures is None:
            continue
        try:
            score = Score.from_dict(figures)
            if score.split not in ("validation", "test") or not isinstance(score.samples, int):
                problems.append(f"{MANIFEST}: {part}: split or samples are no such thing")
                continue
            base = manifest.baseline[_baseline(score.split)]
            if not abs(base - score.value - score.drop) <= 1e-9 * max(1.0, abs(base)):
                problems.append(
                    f"{MANIFEST}: {part}.drop is {score.drop}, but accuracy is {score.value} "
                    f"and that of the baseline {base}"
                )
            if score.metric != manifest.metric:
                problems.append(
                    f"{MANIFEST}: {part}.metric is {score.metric!r}, metric {manifest.metric!r}"
                )
        except (KeyError, TypeError) as error:
            problems.append(f"{MANIFEST}: {part} or baseline is incomplete: {_one_line(error)}")
    return problems


def _baseline(split: str) -> str:
    return "test_accuracy" if split == "test" else "accuracy"


def _parsed(data: bytes) -> onnx.ModelProto:
    """The model, which must keep all its data in the file. Raises PackageError."""
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own
        raise PackageError(f"model.onnx: not a readable ONNX file: {_one_line(error)}") from None
    for tensor in (t for part in (model.graph, *model.functions) for t in _tensors(part)):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise PackageError(f"model.onnx: {tensor.name!r} keeps its data in another file")
    return model


def _tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterable[TensorProto]:
    """All tensors of a graph or function, of its attributes and subgraphs."""
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _opened(data: bytes) -> OnnxSession:
    try:
        return OnnxRuntime().open(data)
    except UserError as error:
        raise PackageError(f"model.onnx: {error}") from None


def _interface(model: onnx.ModelProto) -> dict[str, Any]:
    """Those fields of the manifest that the model file has too."""
    opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    return {
        "opset": opsets.get("ai.onnx", 0),
        "ir_version": model.ir_version,
        "inputs": tuple(map(_spec, model.graph.input)),
        "outputs": tuple(map(_spec, model.graph.output)),
    }


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or None
            for d in tensor.shape.dim
        )
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else ""
    return TensorSpec(name=value.name, shape=shape, dtype=dtype)


def _interface_problems(model: onnx.ModelProto, size: int, manifest: Manifest) -> list[str]:
    """Differences in size, versions, names, shapes and dtypes."""
    problems = []
    for field, found in {"size_bytes": size, **_interface(model)}.items():
        stated = getattr(manifest, field)
        if found == stated:
            continue
        if isinstance(found, tuple):
            differing = [p for p in zip(found, stated, strict=False) if p[0] != p[1]]
            found, stated = differing[0] if differing else (f"{len(found)}", f"{len(stated)}")
        problems.append(f"model.onnx: {field}: {found}, the manifest says {stated}")
    key = {p.key: p.value for p in model.metadata_props}.get("autoquant.candidate")
    if key != manifest.key:
        problems.append(f"model.onnx: made for candidate {key}, the manifest says {manifest.key}")
    return problems


def _stored(nodes: Container[str], candidate: Candidate) -> dict[str, tuple[str, LayerChoice]]:
    """Layer of the file → the candidate's layer, and the choice it has: the pieces of a
    factorized layer each, and none of what a structure leaves out."""
    found: dict[str, tuple[str, LayerChoice]] = {}
    for layer, choice in candidate.layers.items():
        pieces = [f"{layer}.{i}" for i in range(3) if f"{layer}.{i}" in nodes]
        if layer in candidate.rank and pieces and layer not in nodes:
            found.update({p: (layer, candidate.layers.get(p, choice)) for p in pieces})
        elif layer in nodes or not candidate.is_structural:
            found[layer] = layer, choice
    return found


def _layer_problems(model: onnx.ModelProto, candidate: Candidate, manifest: Manifest) -> list[str]:
    """Differences between layers as the file stores them and as the candidate says."""
    nodes = {node.name: node for node in model.graph.node}
    stored = _stored(nodes, candidate)
    try:
        found = read_bits(model, stored)
        weights = stored_weights(model, stored)
    except PackageError as error:
        return [f"model.onnx: {error}"]
    except Exception as error:  # a graph that autoquant did not write
        return [f"model.onnx: its layers cannot be read back: {_one_line(error)}"]
    problems = []
    for name, (layer, choice) in stored.items():
        where, node = f"model.onnx: layer {name!r}", nodes[name]
        weight_bits, activation_bits = found[name]
        if node.op_type != manifest.layers[layer].kind:
            kind = manifest.layers[layer].kind
            problems.append(f"{where} is a {node.op_type}, the manifest says {kind}")
        if (node.op_type == "MatMulNBits") != choice.nbits:
            problems.append(f"{where}: n-bit kernel or not: not as candidate.yaml says")
        if (node.op_type == "MatMulInteger") != (choice.dynamic and not choice.nbits):
            problems.append(f"{where}: range at run time or not: not as candidate.yaml says")
        as_int8 = manifest.dialect == TENSORRT and choice.weight_bits < weight_bits == 8
        if weight_bits != choice.weight_bits and not as_int8:  # then their range is checked
            problems.append(
                f"{where} stores weights of {weight_bits} bits, "
                f"candidate.yaml says {choice.weight_bits}"
            )
        if activation_bits != choice.activation_bits and not (
            choice.activation_bits == 32
            and activation_bits == 8
            and _exists_only_quantized(model, node.input[0])
        ):
            problems.append(
                f"{where} has activations of {activation_bits} bits, "
                f"candidate.yaml says {choice.activation_bits}"
            )
        if name in weights:
            problems += [f"{where}: {p}" for p in _weight_problems(weights[name], choice)]
    return problems


def _weight_problems(weight: Array, choice: LayerChoice) -> list[str]:
    """Whether stored weights are of the type and in the range of their width."""
    wide = {16: "int16" if choice.int16 else "float16", 32: "float32"}
    dtype = wide.get(choice.weight_bits, "int8")
    if weight.dtype != dtype:
        return [f"weights are {weight.dtype}, {choice.weight_bits} bits are kept as {dtype}"]
    if weight.dtype.kind == "i" and weight.size:
        low, high = integer_range(8 if choice.codebook else choice.weight_bits)
        count = len(np.unique(weight)) if choice.codebook else 0
        if count > 2**choice.weight_bits:
            return [f"{count} different weights, the codebook has {2**choice.weight_bits}"]
        pattern = parse_sparsity(choice.sparsity)
        zeros = 1 - np.count_nonzero(weight) / weight.size
        if isinstance(pattern, float) and zeros < pattern - 0.5 / weight.size - 1e-9:
            return [f"{zeros:.1%} of the weights are zero, not {pattern:.1%}"]
        if weight.min() < low or weight.max() > high:
            return [
                f"weights go from {weight.min()} to {weight.max()}, "
                f"{choice.weight_bits} bits from {low} to {high}"
            ]
    return []


def _exists_only_quantized(model: onnx.ModelProto, tensor: str) -> bool:
    """Whether a tensor behind a DequantizeLinear comes out of an int8 kernel.

    A layer with float activations then reads it from its grid: there is no other form of it.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    initializers = {i.name for i in model.graph.initializer}
    node = producers.get(tensor)
    for between in ("DequantizeLinear", "QuantizeLinear"):
        if node is None or node.op_type != between:
            return False
        node = producers.get(node.input[0])
    if node is not None and node.op_type in ("Relu", "Clip"):
        node = producers.get(node.input[0])
    if node is None:
        return False
    read = [name for name in node.input if name and name not in initializers]
    if node.op_type in LAYER_KINDS:
        read = list(node.input)[:2]
    return all(n in producers and producers[n].op_type == "DequantizeLinear" for n in read)


def _compare_outputs(
    data: bytes, session: OnnxSession, candidate: Candidate, manifest: Manifest
) -> str:
    """Run the sample; a line on what was found. Raises PackageError."""
    try:
        arrays = _arrays(data)
    except ValueError as error:
        raise PackageError(f"sample.npz: {error}") from None
    specs = (*manifest.inputs, *manifest.outputs)
    if set(arrays) != {spec.name for spec in specs}:
        raise PackageError(
            f"sample.npz: has {', '.join(sorted(arrays))}; the model's inputs and outputs are "
            f"{', '.join(sorted(spec.name for spec in specs))}"
        )
    _raise([p for spec in specs for p in _misfit(spec, arrays[spec.name])])
    recorded = {spec.name: arrays[spec.name] for spec in manifest.outputs}
    allowed = tolerances(recorded, candidate)
    try:
        outputs = _outputs(session, arrays)
    except Exception as error:
        raise PackageError(f"sample.npz: the model cannot run it: {_one_line(error)}") from None
    exact = _machine() == manifest.machine
    worst, problems = 0.0, []
    for name, value in outputs.items():
        difference = _difference(value, recorded[name])
        worst = max(worst, difference)
        limit = 0.0 if exact else allowed[name]
        if not difference <= limit:
            problems.append(
                f"sample.npz: output {name!r} of model.onnx differs from the recorded one by "
                f"{difference:.3g}, allowed is {limit:.3g}"
            )
    if not problems and manifest.tolerance != allowed:
        problems = [f"{MANIFEST}: tolerance is {manifest.tolerance}, it must be {allowed}"]
    _raise(problems)
    rows = len(arrays[manifest.inputs[0].name]) if manifest.inputs else 0
    if exact:
        return f"{rows} samples give exactly the recorded outputs"
    there = f"{manifest.machine['cpu']}, onnxruntime {manifest.machine['onnxruntime']}"
    return f"{rows} samples within {worst:.3g} of the outputs recorded on {there}"


def _openvino_detail(contents: Mapping[str, bytes], manifest: Manifest) -> str:
    """Whether OpenVINO opens the model and computes the recorded outputs.

    Two runtimes round differently, and that adds up over layers: outputs are others' where they
    are further away than half the recorded ones' spread. Raises PackageError for a package that
    was scored in OpenVINO; another need not run there.
    """
    runtime = manifest.runtime if manifest.runtime in OPENVINO_RUNTIMES else OPENVINO_RUNTIMES[0]
    arrays, worst, problem = _arrays(contents["sample.npz"]), 0.0, ""
    try:
        session = RUNTIMES[runtime]().open(contents["model.onnx"])
        outputs = session.run([arrays[name] for name in session.input_names])
        for spec, value in zip(manifest.outputs, outputs, strict=True):
            recorded = arrays[spec.name]
            difference = _difference(value, recorded)
            worst = max(worst, difference)
            if math.isinf(difference) or divergence(recorded, value, classes=False) > 0.25:
                problem = f"it computes another output {spec.name!r}, {difference:.3g} away"
    except Exception as error:
        problem = f"it does not run the model: {_one_line(error)}"
    if problem and runtime == manifest.runtime:
        raise PackageError(f"model.onnx: in OpenVINO {problem}")
    if problem:
        return f"for onnxruntime alone ({problem}); search with --hardware openvino-cpu"
    return f"opens in OpenVINO, outputs within {worst:.3g} of the recorded ones"


def _format_detail(
    name: str, model: onnx.ModelProto, contents: Mapping[str, bytes], manifest: Manifest
) -> str:
    """Whether a format's files are those that follow from the model. Raises PackageError."""
    names = ", ".join(FORMATS[name].files)
    if manifest.autoquant != describe_environment()["versions"]["autoquant"]:
        return f"{names}: unchanged since autoquant {manifest.autoquant} wrote them"
    if not FORMATS[name].is_installed():
        return f"{names}: unchanged; what makes them is not installed here"
    try:
        files = FORMATS[name].make(model)
    except UserError as error:
        raise PackageError(f"model.onnx: has no {name}: {error}") from None
    _raise([f"{n}: does not follow from model.onnx" for n in files if files[n] != contents[n]])
    return f"{names}: follow from model.onnx"


def _precompiled_detail(contents: Mapping[str, bytes], manifest: Manifest) -> str:
    """Run the precompiled graph on the machine that it is for. Raises PackageError."""
    if _machine() != manifest.machine:
        return f"{PRECOMPILED} is for {manifest.machine['cpu']}, so it was not run"
    try:
        session = OnnxRuntime().open(contents[PRECOMPILED], optimize=False)
        arrays = _arrays(contents["sample.npz"])
        outputs = _outputs(session, arrays)
    except Exception as error:
        raise PackageError(f"{PRECOMPILED}: cannot be run: {_one_line(error)}") from None
    problems = []
    for name, value in outputs.items():
        difference = _difference(value, arrays[name])
        if not difference <= manifest.tolerance[name]:
            problems.append(
                f"{PRECOMPILED}: output {name!r} differs from the recorded one by {difference:.3g}"
            )
    _raise(problems)
    return f"{PRECOMPILED} gives the recorded outputs"


def _compressed_detail(contents: Mapping[str, bytes]) -> str:
    """Whether the entropy-coded model is the model. Raises PackageError."""
    try:
        found = coding.decompress(contents[COMPRESSED])
    except PackageError as error:
        raise PackageError(f"{COMPRESSED}: {error}") from None
    if found != contents["model.onnx"]:
        raise PackageError(f"{COMPRESSED}: holds another model than model.onnx")
    return f"{COMPRESSED} ({len(contents[COMPRESSED]):,} bytes) unpacks to model.onnx"


def _misfit(spec: TensorSpec, array: Array) -> list[str]:
    """Whether an array of the sample cannot be the input or output of that name."""
    fits = spec.shape is None or (
        len(spec.shape) == array.ndim
        and all(
            not isinstance(want, int) or want == have
            for want, have in zip(spec.shape, array.shape, strict=True)
        )
    )
    if fits and array.ndim and str(array.dtype) == spec.dtype:
        return []
    return [
        f"sample.npz: {spec.name!r} is {array.dtype} {array.shape}, "
        f"the model's is {spec.dtype} {spec.shape}"
    ]


def _difference(value: Array, recorded: Array) -> float:
    """Largest absolute difference; infinite for other shapes or a NaN."""
    if value.shape != recorded.shape or value.dtype != recorded.dtype:
        return math.inf
    differing = value != recorded
    if not differing.any():
        return 0.0
    apart = np.abs(value[differing].astype(np.float64) - recorded[differing])
    return math.inf if np.isnan(apart).any() else float(apart.max())


def _accuracy(task: Task, model: bytes, manifest: Manifest) -> dict[str, Any]:
    """Score the model, in the runtime that did, on the split of the manifest's figures. Raises
    PackageError, TaskError; ModelError where that runtime is not installed."""
    graph = lower(task)
    products = {layer.name for layer in graph.products}
    names = sorted((set(graph.by_name) ^ set(manifest.layers)) - products)
    if names:
        raise PackageError(
            f"{MANIFEST}: layer {names[0]!r} is not both in it and in task {task.name!r}: "
            f"the package was made for task {manifest.task!r}"
        )
    if task.metric_name != manifest.metric:
        raise PackageError(
            f"{MANIFEST}: metric is {manifest.metric!r}, "
            f"that of task {task.name!r} is {task.metric_name!r}"
        )
    stated = Score.from_dict(manifest.verified or manifest.searched)
    evaluator = evaluator_for(task, graph, stated.split)
    base = evaluator.set_reference(OnnxRuntime().open(float_model(graph))).value
    score = evaluator.score(RUNTIMES[manifest.runtime]().open(model))
    quarter = score.standard_error / 4
    tolerance = max(
        quarter if math.isfinite(quarter) else 0.0,
        1.5 / score.samples if task.metric == "top1" else 0.0,
        1e-6 * max(1e-6, abs(score.value)),
    )
    part = "searched" if manifest.verified is None else "verified"
    baseline = _baseline(stated.split)
    problems = [
        f"{MANIFEST}: {field} is {recorded}, task {task.name!r} gives {value} on {stated.split}"
        for field, recorded, value, limit in (
            (f"{part}.samples", stated.samples, score.samples, 0.0),
            (f"baseline.{baseline}", manifest.baseline[baseline], base, tolerance),
            (f"{part}.accuracy", stated.value, score.value, tolerance),
        )
        if not abs(recorded - value) <= limit
    ]
    _raise(problems)
    return {**score.to_dict(), "recorded": stated.value, "tolerance": tolerance}
