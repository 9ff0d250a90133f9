"""OpenVINO runs what a candidate says, as onnxruntime does; where it cannot, it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NETWORKS, Network
from small_task import SPACE, settings, task

from autoquant import runtime_openvino
from autoquant.api import profile
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.lower import lower
from autoquant.compress.qdq import assemble
from autoquant.cost import CostModel, table
from autoquant.cost.table import from_profile, measure_device, to_profile
from autoquant.errors import HardwareError, ModelError
from autoquant.export import export, verify
from autoquant.front import Front
from autoquant.hardware import Hardware, load_hardware
from autoquant.runtime import RUNTIMES, OnnxRuntime
from autoquant.runtime_openvino import OpenVINO, is_installed
from autoquant.search import search
from autoquant.search.trial import prepare
from autoquant.task import Array
from autoquant.tasks import load_task

needs = pytest.mark.skipif(not is_installed(), reason="pip install 'autoquant[openvino]'")


def _has_vnni() -> bool:
    """Whether int8 products add up in 32 bits: on other processors than x86 they do."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    return not text or "vnni" in text or "flags" not in text


right = pytest.mark.skipif(not _has_vnni(), reason="OpenVINO's int8 needs VNNI instructions")
CHOICES = {
    **{f"{bits}/8": LayerChoice(bits, 8) for bits in range(2, 9)},
    "4/4": LayerChoice(4, 4),
    "8/8 symmetric": LayerChoice(8, 8, symmetric=True),
    "8/16": LayerChoice(8, 16),
    **{f"{bits}/32": LayerChoice(bits, 32) for bits in (3, 4, 8, 16)},
    "4/32 in blocks": LayerChoice(4, 32, "block32"),
    "4/8 codebook": LayerChoice(4, 8, codebook=True),
}


def written(found: Network, choice: LayerChoice, dialect: str = "openvino") -> bytes:
    """The file in which every layer has a choice."""
    candidate = found.resolved(
        {x.name: choice for x in found.graph.layers if not (choice.codebook and x.kind == "Gather")}
    )
    model = assemble(found.graph, candidate, found.calibration, found.bank, dialect)
    return model.SerializeToString()


def off(first: Array, second: Array) -> float:
    """Root of the mean square of the difference, over the spread of the second."""
    return float(np.sqrt(((first - second) ** 2).mean()) / second.std())


@needs
@right
@pytest.mark.parametrize("choice", CHOICES.values(), ids=list(CHOICES))
@pytest.mark.parametrize("name", ["conv2d", "depthwise", "gemm", "residual", "text", "attention"])
def test_a_file_of_its_dialect_computes_what_onnxruntime_does(
    name: str, choice: LayerChoice
) -> None:
    """Its rounding moves the outputs, by less than the quantization itself does."""
    found = NETWORKS[name]()
    model = written(found, choice)
    known = OnnxRuntime().open(model).run(found.inputs)[0]
    own = OpenVINO().open(model).run(found.inputs)[0]
    assert off(own, known) < 1.5 * off(known, found.reference[0]) + 1e-4


@needs
@pytest.mark.parametrize("bits", (3, 4, 8))
def test_layers_run_in_the_precision_of_the_candidate(bits: int) -> None:
    found = NETWORKS["chain"]()
    lower = dict.fromkeys(("l0", "l2", "l4"), LayerChoice(bits, 8))
    candidate = found.resolved(lower)
    model = assemble(found.graph, candidate, found.calibration, found.bank, "openvino")
    for precision, floats in (("f32", "f32"), ("bf16", "bf16")):
        try:
            session = OpenVINO(precision).open(model.SerializeToString())  # type: ignore[arg-type]
        except ModelError as error:
            assert precision == "bf16" and "no bf16" in str(error)
            continue
        session.run(found.inputs)
        ran = {}
        for node, (kind, primitive) in session.kernels().items():
            if kind == "Convolution":
                owner = next(x.name for x in found.graph.layers if x.name in node.split("/")[0])
                ran[owner] = primitive.rpartition("_")[2]
        assert ran == {x.name: "I8" if x.name in lower else floats for x in found.graph.layers}, (
            precision
        )


@needs
def test_operators_on_bits_are_what_its_dialect_leaves_out() -> None:
    found = NETWORKS["chain"]()
    kinds = {}
    for dialect in ("onnxruntime", "openvino"):
        candidate = found.resolved(found.uniform(7, 8))
        model = assemble(found.graph, candidate, found.calibration, found.bank, dialect)
        kinds[dialect] = {node.op_type for node in model.graph.node}
    assert {"BitShift", "BitwiseAnd", "BitwiseOr"} <= kinds["onnxruntime"]
    assert not {x for x in kinds["openvino"] if x.startswith("Bit")}
    both = [
        OnnxRuntime().open(written(found, LayerChoice(7, 8), x)).run(found.inputs)[0] for x in kinds
    ]
    assert np.array_equal(*both)


@needs
def test_a_session_for_timing_is_of_fixed_shapes() -> None:
    found = NETWORKS["conv2d"]()
    one = [array[:1] for array in found.inputs]
    session = OpenVINO().open(found.graph.model.SerializeToString(), 1, one)
    assert all(port.partial_shape.is_static for port in session.compiled.inputs)
    np.testing.assert_allclose(session.run(one)[0], found.reference[0][:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="2 inputs, the model has 1"):
        session.run([*one, *one])


def test_without_the_extra_it_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelError, match=r"pip install 'autoquant\[openvino\]'$"):
        OpenVINO().open(b"")
    with pytest.raises(ModelError, match=r"not installed: pip install"):
        prepare(task(tmp_path), space="int8", hardware="openvino-cpu")


class Refusing:
    """A library on a processor without bfloat16."""

    __version__ = "2026.4"

    def get_property(self, device: str, name: str) -> list[str]:
        return ["FP32", "INT8"]

    @staticmethod
    def Core() -> Refusing:
        return Refusing()


def test_a_processor_without_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_openvino, "_openvino", Refusing)
    with pytest.raises(ModelError, match=r"no bf16: OpenVINO offers FP32, INT8; use openvino-cpu$"):
        OpenVINO("bf16").open(b"")


# --- wrong answers ---------------------------------------------------------------------------


class Saturating:
    """A session whose int8 answers are off, as sums in 16 bits make them."""

    def __init__(self, session: Any, by: float) -> None:
        self.session, self.by = session, by
        self.input_names = session.input_names

    def run(self, inputs: Any) -> list[Array]:
        outputs = self.session.run(inputs)
        return [np.minimum(out, np.quantile(out, 1 - self.by)) for out in outputs]


@needs
@pytest.mark.parametrize(("share", "wrong"), [(0.0, False), (0.4, True)])
def test_answers_that_disagree_with_onnxruntime_stop_a_search(
    share: float, wrong: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The runtime is onnxruntime here, so that without the fault nothing is off anywhere."""
    opened: list[bytes] = []

    class Faulty(OpenVINO):
        def open(self, model: bytes, *rest: Any, **named: Any) -> Any:  # type: ignore[override]
            opened.append(model)
            quantized = b"QuantizeLinear" in model
            return Saturating(OnnxRuntime().open(model), share if quantized else 0.0)

    monkeypatch.setitem(RUNTIMES, "openvino", Faulty)
    if wrong:
        with pytest.raises(HardwareError, match=r"openvino 20.*wrongly.*VNNI.*onnxruntime-cpu$"):
            prepare(task(tmp_path), space=SPACE, hardware="openvino-cpu", latency=False)
    else:
        prepare(task(tmp_path), space=SPACE, hardware="openvino-cpu", latency=False)
    assert len(opened) == 2


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import onnx
from conftest import Weights, build, node, run
from small_task import task
from autoquant.errors import HardwareError
from autoquant.search.trial import prepare

# Bright images and weights of one sign: the sum of two products of bytes is above 32,767.
generator = np.random.default_rng(0)
weight = generator.uniform(0.8, 1, (6, 2, 3, 3)).astype(np.float32)
nodes = [
    node("Conv", ["x", "c.weight"], ["c"]),
    node("GlobalAveragePool", ["c"], ["g"]),
    node("Flatten", ["g"], ["f"]),
    node("Gemm", ["f", "d.weight"], ["y"]),
]
parts = {"c.weight": weight, "d.weight": Weights(1)(6, 4)}
model = build(nodes, parts, {"x": ["N", 2, 8, 8]}, ["y"])
path = Path(sys.argv[1]) / "bright.onnx"
onnx.save(model, path)
images = [generator.uniform(0.5, 1, (32, 2, 8, 8)).astype(np.float32) for _ in range(9)]
pairs = [(x, run(model, x)[0].argmax(1)) for x in images]
bright = task(
    path.parent, model=path, calibration=images[:3], validation=pairs[3:6], test=pairs[6:]
)
try:
    prepare(bright, space="int8", hardware="openvino-cpu", latency=False)
except HardwareError as error:
    print("told:", error)
"""


@needs
@pytest.mark.skipif("avx512" not in Path("/proc/cpuinfo").read_text(), reason="no such kernels")
@pytest.mark.parametrize(("instructions", "told"), [("AVX2", True), ("DEFAULT", False)])
def test_a_processor_without_vnni_is_told(instructions: str, told: bool, tmp_path: Path) -> None:
    """The same kernels that a processor without VNNI gets, on this one."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={
            **os.environ,
            "ONEDNN_MAX_CPU_ISA": instructions,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert ("told: openvino" in found.stdout) is told, found.stderr


# --- a search ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    if not is_installed():
        pytest.skip("pip install 'autoquant[openvino]'")
    folder = tmp_path_factory.mktemp("openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQUANT_CACHE", str(folder / "cache"))
        return search(task(folder), settings(folder, hardware="openvino-cpu", trials=6))


@needs
@right
def test_a_search_scores_and_measures_there(front: Front) -> None:
    assert front.hardware == "openvino-cpu" and front.members
    for member in front.members:
        assert member.verified is not None
        assert member.verified["runtime"] == "openvino" and member.verified["latency_ms"] > 0
        assert member.predicted.latency_ms is not None and member.predicted.latency_ms > 0
    assert front.baseline["runtime"] == front.baseline["uniform_int8"]["runtime"] == "openvino"
    assert front.folder is not None
    kept = json.loads((front.folder / "latency.json").read_text())
    assert kept["runtime"] == OpenVINO().version
    environment = json.loads((front.folder / "environment.json").read_text())
    assert environment["versions"]["openvino"] in kept["runtime"]
    model = (front.folder / str(front.members[0].artifact)).read_bytes()
    evaluated = prepare(
        task(front.folder), space=front.members[0].candidate, hardware="openvino-cpu", latency=False
    )
    score = evaluated.evaluator.score(OpenVINO().open(model))
    assert score.value == front.members[0].searched.value


@needs
@right
def test_its_package_is_checked_and_scored_there(front: Front, tmp_path: Path) -> None:
    package = export(front.members[0], tmp_path / "package", front=front)
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["runtime"] == "openvino"
    assert '"INFERENCE_PRECISION_HINT": "f32"' in (package / "README.md").read_text()
    assert front.folder is not None
    checked = verify(package, task(front.folder))
    details = {check["name"]: check["detail"] for check in checked["checks"]}
    assert details["openvino"].startswith("opens in OpenVINO, outputs within")
    assert "accuracy" in details


@needs
def test_a_package_for_onnxruntime_says_whether_openvino_runs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = search(task(tmp_path), settings(tmp_path, trials=6))
    package = export(found.members[0], tmp_path / "package", front=found)

    def detail() -> str:
        checks = verify(package)["checks"]
        return next(str(c["detail"]) for c in checks if c["name"] == "openvino")

    assert "OpenVINO" in detail() or "onnxruntime alone" in detail()
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(sys.modules["autoquant.export"], "is_installed", lambda: True)
    assert detail().startswith("for onnxruntime alone (it does not run the model: ModelError")
    monkeypatch.setattr(sys.modules["autoquant.export"], "is_installed", lambda: False)
    assert "openvino" not in {c["name"] for c in verify(package)["checks"]}


@needs
def test_a_model_of_its_kernels_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    found = NETWORKS["chain"]()
    one = [array[:1] for array in found.inputs]
    model = measure_device(
        found.graph, found.calibration, found.bank, one, dialect="openvino", runtime="openvino"
    )
    assert model.runtime == "openvino" and all(time > 0 for time in model.kernel_ms.values())
    stored = to_profile(model)
    assert stored.runtime == OpenVINO().version and from_profile(stored, 1, 1) == model
    kernel = {"weight_bits": 8, "activation_bits": 8, "source": "made up for a test"}
    content = {"kernels": [kernel], "model": stored.model_dump(mode="json")}
    with pytest.raises(ValueError, match=r"with openvino .*, the profile's runtime is onn"):
        Hardware.model_validate(content)
    Hardware.model_validate({**content, "runtime": "openvino"})
    costs = CostModel(found.graph, "openvino", model)
    predicted = costs.predict(found.resolved(found.uniform(4, 8))).latency_ms
    assert predicted is not None and predicted > 0

    def refuse(*_: object, **__: object) -> dict[str, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(OpenVINO, "kernel_times", refuse)
    monkeypatch.setattr(OnnxRuntime, "kernel_times", lambda *_, **__: {"Conv/x": 0.25})
    assert model.timed([found.graph], found.graph).kernel_ms == model.kernel_ms
    layers = [(found.graph, x) for x in found.graph.layers]
    there = table._kernel_table(layers, found.graph, (), 1, 1, OnnxRuntime())
    assert set(there.values()) == {0.25}  # another runtime is another table


@needs
def test_a_profile_is_measured_with_its_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    profile(task(tmp_path), tmp_path / "here.yaml", hardware="openvino-cpu")
    found = load_hardware(tmp_path / "here.yaml")
    assert (found.runtime, found.dialect) == ("openvino", "openvino")
    assert found.model is not None and found.model.measured_with == "openvino"


def test_a_device_elsewhere_has_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="'cortex-m7-cmsis-nn' is elsewhere"):
        profile(task(tmp_path), tmp_path / "x.yaml", hardware="cortex-m7-cmsis-nn")
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.data
@needs
@right
@pytest.mark.skipif(not os.environ.get("AUTOQUANT_DATA"), reason="needs AUTOQUANT_DATA")
def test_a_real_network_in_int8_and_in_3_bits() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "tasks" / "cifar10.py"
    found = load_task(f"{path}:resnet20")
    names = [layer.name for layer in lower(found).layers]
    mixed = Candidate({n: LayerChoice((3, 4, 8)[i % 3], 8) for i, n in enumerate(names)})
    context = prepare(found, space=mixed, hardware="openvino-cpu", latency=False)
    model = context.compress(mixed).model
    scores = [context.evaluator.score(x.open(model)) for x in (OnnxRuntime(), OpenVINO())]
    assert scores[0].value > 0.88 and abs(scores[0].value - scores[1].value) < 0.01
