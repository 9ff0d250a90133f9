"""Run ONNX files: open a session, run batches, measure latency, read the kernels that ran.

Every session of onnxruntime opens with ``session_config()``. Left alone, it quantizes float layers
that sit between int8 layers (WeightBiasQuantization), so that the artifact would no longer be
what its candidate says; and it turns MatMul + Add into a Gemm whose float bias keeps it from
running in int8 (MatMulAddFusion). On x86 without VNNI instructions its sums of uint8 × int8
products saturate at 16 bits: there it is told to take uint8 weights, which are right. Elsewhere
that would only make it slow.
"""

from __future__ import annotations

import functools
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from autoquant.errors import ModelError
from autoquant.result import Latency
from autoquant.runtime_openvino import OpenVINO
from autoquant.task import Array

if TYPE_CHECKING:
    import onnxruntime

SESSION_CONFIG = {
    "optimization.disable_specified_optimizers": "WeightBiasQuantization;MatMulAddFusion"
}
WITHOUT_VNNI = {"session.x64quantprecision": "1"}  # beside the others, where `saturates`


@functools.cache
def saturates() -> bool:
    """Whether onnxruntime's sums of uint8 × int8 products overflow 16 bits on this processor."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "saturates",
        [value("x", TensorProto.UINT8, [1, 2])],
        [value("y", TensorProto.INT32, [1, 1])],
        [helper.make_tensor("w", TensorProto.INT8, [2, 1], [127, 127])],
    )
    opset = helper.make_opsetid("", 13)
    model = helper.make_model(graph, ir_version=10, opset_imports=[opset])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, 2), 255, np.uint8)})
    return bool(found.item() != 2 * 255 * 127)


def session_config() -> dict[str, str]:
    """The session options with which onnxruntime runs artifacts as they say on this processor."""
    return SESSION_CONFIG | (WITHOUT_VNNI if saturates() else {})


class Session(Protocol):
    """An open model: arrays in, arrays out, safe to call from several threads."""

    @property
    def input_names(self) -> Sequence[str]:
        """Names of the inputs, in order."""
        ...

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run one batch; outputs in graph order."""
        ...


class Runtime(Protocol):
    """Where an artifact runs. To add one: a class here and a line in ``RUNTIMES``."""

    name: str

    @property
    def version(self) -> str:
        """The name and the version of the library, which latencies depend on."""
        ...

    def open(
        self, model: bytes | str | Path, threads: int = 1, inputs: Sequence[Array] | None = None
    ) -> Session:
        """Load a model for ``threads`` intra-operator threads; ModelError if it cannot.

        ``inputs``: the session is to be timed on inputs of their shapes, and runs no others.
        """
        ...

    def kernel_times(
        self, model: bytes, inputs: Sequence[Array], threads: int = 1, runs: int = 20
    ) -> dict[str, float]:
        """Milliseconds of each kernel of a model by ``operator/node name``."""
        ...


class OnnxSession:
    """An onnxruntime session on the CPU provider."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self._input_names = tuple(i.name for i in session.get_inputs())
        self.output_names = tuple(o.name for o in session.get_outputs())

    @property
    def input_names(self) -> Sequence[str]:
        """Names of the inputs, in order."""
        return self._input_names

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run one batch; outputs in graph order."""
        feed = dict(zip(self.input_names, inputs, strict=True))
        outputs: list[Array] = self.session.run(None, feed)
        return outputs


class OnnxRuntime:
    """onnxruntime on the CPU."""

    name = "onnxruntime"

    @property
    def version(self) -> str:
        """``onnxruntime 1.31.1``."""
        import onnxruntime as ort

        return f"{self.name} {ort.__version__}"

    def open(
        self,
        model: bytes | str | Path,
        threads: int = 1,
        inputs: Sequence[Array] | None = None,
        profile: Path | None = None,
        optimized: Path | None = None,
        optimize: bool = True,
    ) -> OnnxSession:
        """Load a model; ``inputs`` change nothing here. ``profile``: prefix of a kernel trace;
        ``optimized``: where to write the graph that runs; ``optimize=False`` keeps the graph as
        it is in the file.

        Raises ModelError with onnxruntime's reason.
        """
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        for key, value in session_config().items():
            options.add_session_config_entry(key, value)
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        # Or a session's threads would go on spinning on the cores that the next one is timed on.
        # A traced session is alone, and its first kernel should not wait for threads to wake.
        stop = "1" if profile is None else "0"
        options.add_session_config_entry("session.force_spinning_stop", stop)
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        source = str(model) if isinstance(model, Path) else model
        try:
            session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise ModelError(f"onnxruntime cannot load the model: {reason}") from None
        return OnnxSession(session)

    def kernel_times(
        self, model: bytes, inputs: Sequence[Array], threads: int = 1, runs: int = 20
    ) -> dict[str, float]:
        """Milliseconds of each kernel by ``operator/node name``: the mean of the faster half of
        ``runs``, since the trace counts in whole microseconds."""
        with tempfile.TemporaryDirectory() as folder:
            session = self.open(model, threads, profile=Path(folder) / "trace")
            for _ in range(runs):
                session.run(inputs)
            events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
        found: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = f"{event['args']['op_name']}/{event['name'].removesuffix('_kernel_time')}"
                found.setdefault(name, []).append(event["dur"] / 1e3)
        return {n: float(np.mean(sorted(t)[: max(1, len(t) // 2)])) for n, t in found.items()}


RUNTIMES: dict[str, Callable[[], Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINO,
    "openvino-bf16": lambda: OpenVINO("bf16"),
}


def run_batches(
    session: Session, batches: Sequence[Sequence[Array]], workers: int = 1
) -> list[list[Array]]:
    """Outputs of every batch, in order; ``workers`` batches at a time.

    Parallel over batches, not inside them: the result does not depend on ``workers``.
    """
    if workers <= 1 or len(batches) == 1:
        return [session.run(batch) for batch in batches]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(session.run, batches))


def measure(
    sessions: Mapping[Any, Session],
    inputs: Sequence[Array],
    *,
    threads: int,
    runtime: str = "onnxruntime",
    seconds: float = 2.0,
    min_rounds: int = 15,
    max_rounds: int = 200,
) -> dict[Any, Latency]:
    """Latency of every session, interleaved: one run of each a round, in turn.

    ``seconds``: time to spend a session, within the bounds on rounds. ``threads`` is what the
    sessions were opened with, and is recorded. This function makes every latency that
    autoquant reports; see `Latency` for the statistics.
    """
    for session in sessions.values():
        session.run(inputs)  # first run allocates
    times: dict[Any, list[float]] = {key: [] for key in sessions}
    clock, end = time.perf_counter, time.perf_counter() + seconds * max(1, len(sessions))
    for rounds in range(max_rounds):
        if rounds >= min_rounds and clock() > end:
            break
        for key, session in sessions.items():
            session.run(inputs)  # warms the caches that the previous session used
            start = clock()
            session.run(inputs)
            times[key].append(clock() - start)
    batch = int(inputs[0].shape[0])
    result = {}
    for key, samples in times.items():
        low, median, high = np.percentile(np.asarray(samples) * 1e3, [25, 50, 75])
        result[key] = Latency(
            latency_ms=min(samples) * 1e3,
            latency_median_ms=float(median),
            latency_spread_ms=float(high - low),
            rounds=len(samples),
            batch=batch,
            threads=threads,
            runtime=runtime,
        )
    return result


def optimized_graph(model: bytes) -> Any:
    """The ModelProto that onnxruntime runs after its own rewrites."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        OnnxRuntime().open(model, optimized=path)
        return onnx.load(str(path))


def kernels(model: bytes) -> Counter[str]:
    """How often each operator stands in the graph that onnxruntime runs."""
    return Counter(node.op_type for node in optimized_graph(model).graph.node)


def describe() -> dict[str, str]:
    """What a latency on this machine depends on: CPU, cores, runtime version."""
    import os

    import onnxruntime as ort

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": str(os.cpu_count() or 1),
        "system": f"{platform.system()} {platform.machine()}",
        "onnxruntime": ort.__version__,
    }
