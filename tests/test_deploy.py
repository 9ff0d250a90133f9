"""Packages with the formats of other runtimes: written, checked, spoiled."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_task import TWO, profile, settings, task

from autoquant.deploy import FORMATS, PRECOMPILED
from autoquant.errors import HardwareError, PackageError, RunError
from autoquant.export import FILES, MANIFEST, export, verify
from autoquant.front import Front
from autoquant.hardware import Hardware, load_hardware
from autoquant.search import search
from autoquant.search.trial import prepare
from autoquant.space import Space

STORED = Space.model_validate(
    {"name": "stored", "rules": [{"weight_bits": [4, 8], "activation_bits": 32}]}
)

FOUR = Space.model_validate(
    {"name": "four", "rules": [{"weight_bits": [3, 4], "activation_bits": 8}]}
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Front]:
    """The front of a small search for a device like this one, made once for each."""
    folder = tmp_path_factory.mktemp("runs")
    fronts: dict[str, Front] = {}

    def front(name: str, space: Space = TWO, **changes: Any) -> Front:
        if name not in fronts:
            found = settings(
                folder,
                name=name,
                space=space,
                hardware=profile().model_copy(update=changes),
                trials=4,
                objectives=("accuracy", "size_bytes"),
            )
            fronts[name] = search(task(folder), found)
        return fronts[name]

    return front


def packed(front: Front, folder: Path, **options: Any) -> Path:
    return export(front.members[0], folder / "package", front=front, **options)


def names(package: Path) -> set[str]:
    return {path.name for path in package.iterdir()}


def checks(package: Path) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in verify(package)["checks"]}


def rehash(package: Path, name: str) -> None:
    manifest = json.loads((package / MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256((package / name).read_bytes()).hexdigest()
    manifest["size_bytes"] = (package / "model.onnx").stat().st_size
    (package / MANIFEST).write_text(json.dumps(manifest))


def shift(model: onnx.ModelProto) -> None:
    """A node without effect that TensorRT does not have."""
    model.graph.initializer.append(numpy_helper.from_array(np.uint8([4]), "four"))
    model.graph.node.append(
        helper.make_node("BitShift", ["four", "four"], ["other"], name="odd", direction="LEFT")
    )


def test_tensorrt_packages_are_checked(made: Callable[..., Front], tmp_path: Path) -> None:
    front = made("rt", dialect="tensorrt")
    package = packed(front, tmp_path)
    assert json.loads((package / MANIFEST).read_text())["dialect"] == "tensorrt"
    assert "nothing in the graph" in checks(package)["tensorrt"]
    assert "trtexec --onnx=model.onnx" in (package / "README.md").read_text()
    model = onnx.load(str(package / "model.onnx"))
    shift(model)
    (package / "model.onnx").write_bytes(model.SerializeToString())
    rehash(package, "model.onnx")
    with pytest.raises(PackageError, match=r"layer 'odd' \(BitShift\): TensorRT has no such"):
        verify(package)


def test_stored_bits_are_checked_by_their_range(made: Callable[..., Front], tmp_path: Path) -> None:
    front = made("four", FOUR, dialect="tensorrt")
    member = front.members[0]
    low = [n for n, c in member.candidate.layers.items() if c.weight_bits == 4]
    assert low
    package = export(member, tmp_path / "package", front=front)
    model = onnx.load(str(package / "model.onnx"))
    name = f"{low[0]}.w4"
    weight = next(i for i in model.graph.initializer if i.name == name)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = 9
    weight.CopyFrom(numpy_helper.from_array(values, name))
    (package / "model.onnx").write_bytes(model.SerializeToString())
    rehash(package, "model.onnx")
    with pytest.raises(PackageError, match=f"layer '{low[0]}': weights go from .* to 9, 4 bits"):
        verify(package)


def test_export_refuses_what_tensorrt_would(made: Callable[..., Front], tmp_path: Path) -> None:
    front = made("rt", dialect="tensorrt")
    assert front.folder is not None
    copy = Front.read(shutil.copytree(front.folder, tmp_path / "run"))
    member = copy.members[0]
    path = tmp_path / "run" / str(member.artifact)
    model = onnx.load(str(path))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    shift(model)
    path.write_bytes(model.SerializeToString())
    log = tmp_path / "run" / "trials.jsonl"
    log.write_text(log.read_text().replace(before, hashlib.sha256(path.read_bytes()).hexdigest()))
    with pytest.raises(RunError, match=r"TensorRT would refuse it: layer 'odd' \(BitShift\)"):
        packed(copy, tmp_path)
    assert not (tmp_path / "package").exists()


def test_a_device_without_a_choice_of_the_space(tmp_path: Path) -> None:
    device = profile().model_copy(update={"dialect": "tensorrt"})
    with pytest.raises(HardwareError, match="layer 'first': TensorRT keeps weights"):
        prepare(task(tmp_path), space=STORED, hardware=device)


EVERY = ("encodings", "c-header", "tflite")


def test_formats_are_in_the_package(made: Callable[..., Front], tmp_path: Path) -> None:
    front = made("formats", formats=EVERY)
    package = packed(front, tmp_path)
    extra = {name for format in FORMATS.values() for name in format.files}
    assert names(package) == {*FILES, MANIFEST, *extra}
    found = checks(package)
    assert found["encodings"] == "float.onnx, model.encodings: follow from model.onnx"
    assert found["tflite"] == "model.tflite: follow from model.onnx"
    assert found["c-header"] == "model.h, autoquant_ref.h, main.c: follow from model.onnx"
    readme = (package / "README.md").read_text()
    assert "qairt-converter" in readme and "cc -O2 main.c -lm" in readme
    assert packed(front, tmp_path / "again").is_dir()
    for path in package.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "package" / path.name).read_bytes()


@pytest.mark.parametrize("name", sorted(n for f in FORMATS.values() for n in f.files))
def test_changed_format_files_are_caught(
    made: Callable[..., Front], tmp_path: Path, name: str
) -> None:
    package = packed(made("formats", formats=EVERY), tmp_path)
    path = package / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(PackageError, match=f"{name}: changed"):
        verify(package)
    rehash(package, name)
    with pytest.raises(PackageError, match=f"{name}: does not follow from model.onnx"):
        verify(package)
    path.unlink()
    with pytest.raises(PackageError, match=f"{name}: missing"):
        verify(package)


def test_a_format_that_cannot_say_a_member_is_left_out(
    made: Callable[..., Front], tmp_path: Path
) -> None:
    front = made("stored", STORED, formats=("encodings", "c-header"))
    package = packed(front, tmp_path)
    assert json.loads((package / MANIFEST).read_text())["formats"] == ["encodings"]
    assert "model.h" not in names(package) and "float.onnx" in names(package)
    assert "There is no c-header: layer 'first' (Conv)" in (package / "README.md").read_text()
    assert "c-header" not in checks(package)


def test_a_precompiled_graph_is_optional(made: Callable[..., Front], tmp_path: Path) -> None:
    front = made("formats", formats=EVERY)
    assert PRECOMPILED not in names(packed(front, tmp_path / "without"))
    package = packed(front, tmp_path, precompiled=True)
    assert checks(package)["precompiled"].endswith("gives the recorded outputs")
    assert "ORT_DISABLE_ALL" in (package / "README.md").read_text()
    (package / PRECOMPILED).write_bytes(b"no model")
    rehash(package, PRECOMPILED)
    with pytest.raises(PackageError, match=r"precompiled\.onnx: cannot be run"):
        verify(package)


def test_an_unknown_format_is_named(made: Callable[..., Front], tmp_path: Path) -> None:
    package = packed(made("formats", formats=EVERY), tmp_path)
    manifest = json.loads((package / MANIFEST).read_text())
    manifest["formats"] = ["encoding"]
    (package / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=r"unknown 'encoding'.*encodings"):
        verify(package)


def test_profiles_name_the_formats_that_there_are() -> None:
    annotation = Hardware.model_fields["formats"].annotation
    assert set(get_args(get_args(annotation)[0])) == set(FORMATS)
    for name in ("nvidia-t4", "nvidia-a100", "jetson-orin-nano"):
        assert load_hardware(name).dialect == "tensorrt"
    assert load_hardware("qualcomm-hexagon").formats == ("encodings", "tflite")
    assert load_hardware("cortex-m7-cmsis-nn").formats == ("c-header",)
