"""OpenVINO's CPU plugin as a runtime: the same files, int8 layers in int8, the others in float32
or bfloat16. Needs the extra ``openvino``.

Left alone, OpenVINO computes float layers in bfloat16 where the processor can, and gives
products with compressed weights int8 activations; both are set here, so that the artifact is what
its candidate says. Without VNNI instructions the plugin's int8 kernels add pairs of products in
16 bits, which overflow: `autoquant.search.trial.prepare` compares its answers with onnxruntime's.
"""

from __future__ import annotations

import importlib.util
import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from autoquant.errors import ModelError
from autoquant.task import Array

if TYPE_CHECKING:
    import openvino

OPENVINO_RUNTIMES = ("openvino", "openvino-bf16")
_TICK_MS = 1e-3  # OpenVINO's profiler counts in whole microseconds and drops the rest


def is_installed() -> bool:
    """Whether the extra is here."""
    return importlib.util.find_spec("openvino") is not None


class OpenVINOSession:
    """A compiled model; every thread that calls it has a request of its own."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self.compiled = compiled
        self._input_names = tuple(port.get_any_name() for port in compiled.inputs)
        self._local = threading.local()

    @property
    def input_names(self) -> Sequence[str]:
        """Names of the inputs, in order."""
        return self._input_names

    @property
    def request(self) -> openvino.InferRequest:
        """The calling thread's request."""
        found = getattr(self._local, "request", None)
        if found is None:
            found = self._local.request = self.compiled.create_infer_request()
        return found

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run one batch; outputs in graph order."""
        if len(inputs) != len(self._input_names):
            raise ValueError(f"{len(inputs)} inputs, the model has {len(self._input_names)}")
        request = self.request
        request.infer(list(inputs), share_inputs=True)
        return [np.array(tensor.data) for tensor in request.output_tensors]

    def kernels(self) -> dict[str, tuple[str, str]]:
        """(operator, primitive) of every node that runs: ``brgconv_avx512_amx_I8`` is an int8
        convolution. Named by the nodes of the file that it stands for, joined by commas."""
        found = {}
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            about = {key: str(value.value) for key, value in node.get_rt_info().items()}
            name = about.get("originalLayersNames") or node.get_friendly_name()
            found[name] = (about.get("layerType", ""), about.get("primitiveType", ""))
        return found


class OpenVINO:
    """OpenVINO on the CPU, float layers in ``precision``: f32 or bf16."""

    def __init__(self, precision: Literal["f32", "bf16"] = "f32") -> None:
        self.precision = precision
        self.name = OPENVINO_RUNTIMES[precision == "bf16"]

    @property
    def version(self) -> str:
        """``openvino 2026.4.1``: name and version of the library. Raises ModelError."""
        return f"{self.name} {_openvino().__version__.partition('-')[0]}"

    def open(
        self,
        model: bytes | str | Path,
        threads: int = 1,
        inputs: Sequence[Array] | None = None,
        profile: bool = False,
    ) -> OpenVINOSession:
        """Compile a model for several callers at a time, ``threads`` each; for inputs of the
        shapes of ``inputs`` alone and one caller, which is faster, if those are given.

        Raises ModelError with OpenVINO's reason, and where the extra or bfloat16 is missing.
        """
        openvino = _openvino()
        callers = 1 if inputs is not None else max(1, (os.cpu_count() or 1) // threads)
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": threads * callers,
            "NUM_STREAMS": callers,
            "ENABLE_CPU_PINNING": False,  # another process may hold that core
            "PERF_COUNT": profile,
        }
        if isinstance(model, (str, Path)) and not Path(model).is_file():
            raise ModelError(f"OpenVINO cannot load the model: {model}: no such file")
        try:
            core = openvino.Core()
            capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            if self.precision.upper() not in (*capabilities, "F32"):
                raise ModelError(
                    f"this processor has no {self.precision}: OpenVINO offers "
                    f"{', '.join(capabilities)}; use openvino-cpu"
                )
            read = core.read_model(io.BytesIO(model) if isinstance(model, bytes) else str(model))
            if inputs is not None:
                shapes = {p: list(a.shape) for p, a in zip(read.inputs, inputs, strict=True)}
                read.reshape(shapes)
            return OpenVINOSession(core.compile_model(read, "CPU", settings))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[-400:]
            raise ModelError(f"OpenVINO cannot load the model: {reason}") from None

    def kernel_times(
        self, model: bytes, inputs: Sequence[Array], threads: int = 1, runs: int = 20
    ) -> dict[str, float]:
        """Milliseconds of each kernel by ``operator/node name``, the mean over ``runs``."""
        session = self.open(model, threads, inputs, profile=True)
        for _ in range(runs):
            session.run(inputs)
        return {
            f"{info.node_type}/{info.node_name}": info.real_time.total_seconds() * 1e3 + _TICK_MS
            for info in session.request.get_profiling_info()
            if info.status == info.Status.EXECUTED
        }


def _openvino() -> Any:
    """The library. Raises ModelError naming the extra."""
    try:
        import openvino
    except ImportError:
        raise ModelError("OpenVINO is not installed: pip install 'autoquant[openvino]'") from None
    # Its binding sets itself up at the first array, and two threads that get there at once can
    # wait for each other for good (seen with 2026.4.1).
    openvino.Tensor(np.zeros(1, np.float32), shared_memory=True)
    return openvino
