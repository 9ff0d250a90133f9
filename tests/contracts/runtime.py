"""What every entry of ``RUNTIMES`` must do. Parametrize a subclass over ``runtime``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import build, node

from autoquant.errors import ModelError
from autoquant.runtime import Runtime
from autoquant.task import Array


def _two_outputs() -> onnx.ModelProto:
    """y = x · w, z = x + u."""
    return build(
        [node("Add", ["x", "u"], ["z"]), node("MatMul", ["x", "w"], ["y"])],
        {"w": _w()},
        {"x": ["N", 4], "u": ["N", 4]},
        ["y", "z"],
    )


def _w() -> Array:
    return np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def _inputs(rows: int) -> list[Array]:
    generator = np.random.default_rng(1)
    return [generator.normal(size=(rows, 4)).astype(np.float32) for _ in range(2)]


class RuntimeContract:
    def test_the_version_begins_with_the_name(self, runtime: Runtime) -> None:
        name, _, version = runtime.version.partition(" ")
        assert name == runtime.name and version[:1].isdigit()

    @pytest.mark.parametrize("threads", (1, 2))
    def test_inputs_and_outputs_come_in_graph_order(self, runtime: Runtime, threads: int) -> None:
        session = runtime.open(_two_outputs().SerializeToString(), threads)
        assert list(session.input_names) == ["x", "u"]
        x, u = _inputs(5)
        y, z = session.run([x, u])
        close = {"rtol": 1e-5, "atol": 1e-6}
        if "bf16" in runtime.name:  # eight bits of mantissa, whatever is asked of a product
            close = {"rtol": 2e-2, "atol": 2e-2}
            assert not np.allclose(y, x @ _w(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(y, x @ _w(), **close)
        np.testing.assert_allclose(z, x + u, **close)

    def test_it_opens_bytes_and_paths(self, runtime: Runtime, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        onnx.save(_two_outputs(), path)
        inputs = _inputs(3)
        expected = runtime.open(_two_outputs().SerializeToString()).run(inputs)
        for source in (path, str(path)):
            for a, b in zip(runtime.open(source).run(inputs), expected, strict=True):
                assert np.array_equal(a, b)

    def test_a_dynamic_batch_takes_any_batch(self, runtime: Runtime) -> None:
        session = runtime.open(_two_outputs().SerializeToString())
        for rows in (1, 7, 2):
            assert session.run(_inputs(rows))[0].shape == (rows, 3)

    def test_a_session_to_be_timed_gives_the_same(self, runtime: Runtime) -> None:
        data, inputs = _two_outputs().SerializeToString(), _inputs(3)
        timed = runtime.open(data, 1, inputs)
        for a, b in zip(timed.run(inputs), runtime.open(data).run(inputs), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-2 if "bf16" in runtime.name else 1e-6)

    def test_outputs_outlive_the_next_run(self, runtime: Runtime) -> None:
        session, inputs = runtime.open(_two_outputs().SerializeToString()), _inputs(3)
        first = session.run(inputs)
        kept = [array.copy() for array in first]
        session.run([array + 1 for array in inputs])
        assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))

    def test_kernel_times_name_operators(self, runtime: Runtime) -> None:
        found = runtime.kernel_times(_two_outputs().SerializeToString(), _inputs(3), runs=3)
        assert len(found) >= 2 and all(0 <= time < 1000 for time in found.values())
        assert all(key.partition("/")[0].isidentifier() for key in found)

    def test_a_session_is_safe_in_several_threads(self, runtime: Runtime) -> None:
        session = runtime.open(_two_outputs().SerializeToString())
        batches = [_inputs(rows) for rows in (1, 2, 3, 4) * 8]
        alone = [session.run(batch)[0] for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            together = [out[0] for out in pool.map(session.run, batches)]
        assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))

    @pytest.mark.parametrize("data", (b"", b"not a model"))
    def test_what_is_no_model_is_a_model_error_of_one_line(
        self, runtime: Runtime, data: bytes
    ) -> None:
        with pytest.raises(ModelError) as caught:
            runtime.open(data)
        assert "\n" not in str(caught.value)

    def test_a_missing_file_is_a_model_error_that_names_it(
        self, runtime: Runtime, tmp_path: Path
    ) -> None:
        with pytest.raises(ModelError, match=r"nothing\.onnx"):
            runtime.open(tmp_path / "nothing.onnx")
