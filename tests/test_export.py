"""A tiny search, its package, and every way in which a package can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from conftest import NETWORKS, Weights, build, images, node
from onnx import TensorProto, numpy_helper

from autoquant.candidate import Candidate, LayerChoice
from autoquant.cli import main
from autoquant.compress.coding import compress
from autoquant.errors import PackageError, RunError, TaskError
from autoquant.export import (
    FILES,
    MANIFEST,
    Manifest,
    _layer_problems,
    export,
    tolerances,
    verify,
)
from autoquant.front import Front, Member
from autoquant.runtime import OnnxRuntime, session_config
from autoquant.runtime_openvino import is_installed
from autoquant.search import SearchSettings, search
from autoquant.space import Space
from autoquant.task import Task

SPACE = Space.model_validate(
    {"name": "tiny", "rules": [{"weight_bits": [3, 4, 8], "activation_bits": [8], "float": True}]}
)


def tiny_network() -> onnx.ModelProto:
    """Two convolutions with Relu, a mean and a Gemm."""
    w = Weights(7)
    return build(
        [
            node("Conv", ["image", "first.weight", "first.bias"], ["c1"], pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"]),
            node("Conv", ["r1", "second.weight", "second.bias"], ["c2"], strides=[2, 2]),
            node("Relu", ["c2"], ["r2"]),
            node("GlobalAveragePool", ["r2"], ["g"]),
            node("Flatten", ["g"], ["f"]),
            node("Gemm", ["f", "head.weight", "head.bias"], ["scores"], transB=1),
        ],
        {
            "first.weight": w(8, 3, 3, 3),
            "first.bias": w.bias(8),
            "second.weight": w(16, 8, 3, 3),
            "second.bias": w.bias(16),
            "head.weight": w(5, 16),
            "head.bias": w.bias(5),
        },
        {"image": ["N", 3, 8, 8]},
        ["scores"],
    )


def tiny_task(folder: Path) -> Task:
    """Labels are what the network says, a tenth of them wrong."""
    path = folder / "tiny.onnx"
    onnx.save(tiny_network(), str(path))
    session = OnnxRuntime().open(path)
    generator = np.random.default_rng(3)

    def batches(seed: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for i in range(count):
            data = images(3, 8, 8, seed=100 * seed + i)
            labels = session.run([data])[0].argmax(1)
            wrong = generator.random(len(labels)) < 0.1
            found.append((data, np.where(wrong, (labels + 1) % 5, labels)))
        return found

    return Task(
        name="tiny",
        model=path,
        example_inputs=(images(3, 8, 8)[:1],),
        calibration=[data for data, _ in batches(1, 2)],
        validation=batches(2, 4),
        test=batches(3, 5),
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def front(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("search")
    settings = SearchSettings(
        space=SPACE,
        objectives=("accuracy", "size_bytes"),
        trials=8,
        name="run",
        runs_dir=folder / "runs",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQUANT_CACHE", str(folder / "cache"))
        found = search(task, settings)
    assert found.folder is not None
    yield found


def packed(front: Front) -> Member:
    """The member with the most layers stored in 4 bits or fewer."""
    return max(
        front.members, key=lambda m: sum(c.weight_bits <= 4 for c in m.candidate.layers.values())
    )


@pytest.fixture(scope="module")
def original(front: Front, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(packed(front), tmp_path_factory.mktemp("package") / "tiny", front=front)


@pytest.fixture
def package(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "package"))


@pytest.fixture
def run_copy(front: Front, tmp_path: Path) -> Front:
    """The run in a folder to spoil."""
    assert front.folder is not None
    return Front.read(shutil.copytree(front.folder, tmp_path / "run"))


# --- writing ---------------------------------------------------------------------------------


def test_package_is_complete(front: Front, original: Path) -> None:
    member = packed(front)
    assert sorted(p.name for p in original.iterdir()) == sorted((*FILES, MANIFEST))
    manifest = json.loads((original / MANIFEST).read_text())
    assert manifest.keys() == Manifest.model_fields.keys()
    assert front.folder is not None and member.artifact is not None
    assert (original / "model.onnx").read_bytes() == (front.folder / member.artifact).read_bytes()
    assert Candidate.read(original / "candidate.yaml").key == manifest["key"] == member.key
    for name in FILES:
        assert manifest["files"][name] == sha256(original / name)
    assert manifest["inputs"] == [{"name": "image", "shape": ["N", 3, 8, 8], "dtype": "float32"}]
    assert manifest["outputs"][0]["name"] == "scores"
    assert list(manifest["layers"]) == ["first", "second", "head"]
    assert manifest["session_config"] == session_config()
    assert manifest["opset"] == 21
    assert manifest["verified"]["split"] == "test"
    assert manifest["searched"] == member.searched.to_dict()
    assert {"torch", "onnx", "onnxruntime", "python"} <= manifest["versions"].keys()
    sample = np.load(original / "sample.npz", allow_pickle=False)
    assert set(sample.files) == {"image", "scores"}
    assert sample["image"].shape == (8, 3, 8, 8)


def test_every_member_can_be_exported(front: Front, tmp_path: Path) -> None:
    assert front.folder is not None
    for member in Front.read(front.folder).members:
        folder = export(member, tmp_path / str(member.trial))
        assert verify(folder)["ok"]


def test_a_compressed_package_unpacks_to_the_model(
    front: Front, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(packed(front), tmp_path / "small", front=front, compressed=True)
    stored, whole = folder / "model.aqz", (folder / "model.onnx").read_bytes()
    assert stored.stat().st_size < 0.8 * len(whole)
    assert "autoquant unpack model.aqz -o model.onnx" in (folder / "README.md").read_text()
    checks = {check["name"]: check for check in verify(folder)["checks"]}
    assert "unpacks to model.onnx" in checks["compressed"]["detail"]
    assert main(["unpack", str(stored), "-o", str(tmp_path / "again.onnx"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "model": str(tmp_path / "again.onnx"),
        "size_bytes": len(whole),
        "stored_bytes": stored.stat().st_size,
    }
    assert (tmp_path / "again.onnx").read_bytes() == whole
    assert main(["unpack", str(stored), "-o", str(tmp_path / "again.onnx")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "again.onnx")


def test_a_compressed_model_that_is_another_is_found(front: Front, tmp_path: Path) -> None:
    folder = export(packed(front), tmp_path / "small", front=front, compressed=True)
    stored = folder / "model.aqz"
    other = front.members[0] if front.members[0] != packed(front) else front.members[-1]
    assert front.folder is not None and other.artifact is not None
    for data, message in (
        (compress((front.folder / other.artifact).read_bytes()), "holds another model than"),
        (stored.read_bytes()[:-9], "model.aqz: (the file ends early|damaged|a coded tensor)"),
    ):
        stored.write_bytes(data)
        edit(folder, lambda m: m["files"].update({"model.aqz": sha256(stored)}))
        with pytest.raises(PackageError, match=message):
            verify(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PK", "small.aqz: not a compressed model"), (None, "small.aqz: cannot be read: No such")],
)
def test_what_cannot_be_unpacked_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "small.aqz").write_bytes(content)
    status = main(["unpack", str(tmp_path / "small.aqz"), "-o", str(tmp_path / "x.onnx")])
    output = capsys.readouterr()
    assert status == 2 and output.out == "" and message in output.err
    assert output.err.count("\n") == 1 and not (tmp_path / "x.onnx").exists()


def test_two_exports_are_equal(front: Front, original: Path, tmp_path: Path) -> None:
    second = export(packed(front), tmp_path / "deep" / "second", front=front)
    for path in original.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_an_empty_folder_is_taken(front: Front, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert verify(export(packed(front), tmp_path / "empty", front=front))["ok"]
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("kind", ["folder", "file", "below a file"])
def test_nothing_is_overwritten(front: Front, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "taken"
    if kind == "folder":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    else:
        target.write_text("mine")
    where = target / "below" if kind == "below a file" else target
    with pytest.raises(RunError, match=re.escape(str(where))):
        export(packed(front), where, front=front)
    mine = target / "mine.txt" if kind == "folder" else target
    assert mine.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_crash_leaves_no_half_package(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="No space left"):
        export(packed(front), tmp_path / "package", front=front)
    assert list(tmp_path.iterdir()) == []


def drop_artifact(run: Path, member: Member) -> None:
    (run / str(member.artifact)).unlink()


def spoil_artifact(run: Path, member: Member) -> None:
    path = run / str(member.artifact)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def drop_inputs(run: Path, member: Member) -> None:
    (run / "inputs.npz").unlink()


def rename_inputs(run: Path, member: Member) -> None:
    np.savez(run / "inputs.npz", picture=np.zeros((1, 3, 8, 8), np.float32))


def narrow_inputs(run: Path, member: Member) -> None:
    np.savez(run / "inputs.npz", image=np.zeros((1, 4, 8, 8), np.float32))


def pickle_inputs(run: Path, member: Member) -> None:
    np.savez(run / "inputs.npz", image=np.array([{}], dtype=object))


def drop_trials(run: Path, member: Member) -> None:
    (run / "trials.jsonl").write_text("")


def drop_environment(run: Path, member: Member) -> None:
    (run / "environment.json").unlink()


def empty_study(run: Path, member: Member) -> None:
    (run / "study.yaml").write_text("name: run\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_artifact, r"artifacts/\d+\.onnx: cannot be read"),
        (spoil_artifact, r"artifacts/\d+\.onnx: is not the file that was scored"),
        (drop_inputs, r"inputs\.npz: no such file"),
        (rename_inputs, r"inputs\.npz: has picture; the model's inputs are image"),
        (narrow_inputs, r"inputs\.npz: the model cannot run it"),
        (pickle_inputs, r"inputs\.npz: cannot be read: .*allow_pickle"),
        (drop_trials, r"trials\.jsonl: no trial"),
        (drop_environment, r"environment\.json: cannot be read"),
        (empty_study, r"study\.yaml or environment\.json lack: 'hardware'"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_broken_runs_are_refused(
    run_copy: Front, tmp_path: Path, spoil: Callable[[Path, Member], None], message: str
) -> None:
    member = packed(run_copy)
    assert run_copy.folder is not None
    spoil(run_copy.folder, member)
    with pytest.raises(RunError, match=message) as caught:
        export(member, tmp_path / "package", front=run_copy)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "package").exists()


def test_a_member_without_run_or_artifact(front: Front, tmp_path: Path) -> None:
    member = packed(front)
    with pytest.raises(RunError, match="its run is not known"):
        export(dataclasses.replace(member, folder=None), tmp_path / "package")
    with pytest.raises(RunError, match="its folder is not known"):
        export(member, tmp_path / "package", front=dataclasses.replace(front, folder=None))
    with pytest.raises(RunError, match="has no artifact"):
        export(dataclasses.replace(member, artifact=None), tmp_path / "package", front=front)


# --- running without autoquant ---------------------------------------------------------------


def test_run_py_runs_alone(package: Path, tmp_path: Path) -> None:
    done = run_script(package)
    assert done.returncode == 0, done.stderr
    assert "scores: float32 (8, 5)" in done.stdout
    assert "max abs difference 0," in done.stdout
    text = (package / "run.py").read_text()
    assert len(text.splitlines()) <= 40
    assert "autoquant" not in text

    np.savez(tmp_path / "other.npz", image=images(3, 8, 8, seed=9))  # without outputs
    done = run_script(package, tmp_path / "other.npz")
    assert (done.returncode, done.stdout) == (0, "scores: float32 (48, 5)\n"), done.stderr

    change_sample(package, lambda a: a["scores"].__iadd__(np.float32(10)))
    done = run_script(package)
    assert done.returncode == 1
    assert "max abs difference 10, tolerance" in done.stdout


@pytest.mark.slow
def test_it_runs_in_a_new_environment(original: Path, tmp_path: Path) -> None:
    """Where nothing is installed but onnxruntime and numpy."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    version = f"onnxruntime=={importlib.metadata.version('onnxruntime')}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [str(python), "-m", "pip", "install", "-q", version, "numpy"]
    installed = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"pip reaches no package index: {installed.stderr.strip().splitlines()[-1]}")
    found = subprocess.run(
        [str(python), "-c", "import autoquant"], env=clean, cwd=tmp_path, capture_output=True,
        check=False,
    )  # fmt: skip
    assert found.returncode != 0, "autoquant must not be there"
    done = subprocess.run(
        [str(python), str(original / "run.py")], env=clean, cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "max abs difference 0" in done.stdout


def test_the_readme_runs(original: Path) -> None:
    text = (original / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1 and len(code[0].splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", code[0]], cwd=original, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[(8, 5)]\n"), done.stderr


def run_script(package: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", str(package / "run.py"), *map(str, arguments)],
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=False,
    )


# --- checking --------------------------------------------------------------------------------


def test_verify_reports_every_check(original: Path) -> None:
    report = verify(original)
    assert report["package"] == str(original)
    assert report["ok"] is True and report["accuracy"] is None
    details = {check["name"]: check["detail"] for check in report["checks"]}
    names = ["manifest", "files", "candidate", "figures", "model", "bits", "outputs"]
    assert list(details) == names + ["openvino"] * is_installed()
    assert all(check["ok"] and check["detail"] for check in report["checks"])
    assert "exactly" in details["outputs"]
    json.dumps(report)


def test_n_bit_kernels_and_products_survive_a_search_and_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))
    net, path = NETWORKS["attention"](), tmp_path / "attention.onnx"
    onnx.save(net.graph.model, str(path))
    data = [(net.inputs[0], net.reference[0])]
    found_task = Task(
        name="attention",
        model=path,
        example_inputs=(net.inputs[0][:1],),
        calibration=[net.inputs[0]],
        validation=data,
        test=data,
        metric=closeness,
    )
    nbits = {"weight_bits": 4, "activation_bits": [8, 32], "granularity": "block32", "nbits": True}
    rules = [nbits, {"kinds": ["Product"], "activation_bits": 8, "float": True}]
    found = search(
        found_task,
        SearchSettings(
            space=Space.model_validate({"name": "own", "rules": rules}),
            trials=7,
            name="run",
            runs_dir=tmp_path / "runs",
        ),
    )
    choices = [c for m in found.members for c in m.candidate.layers.values()]
    assert {c.nbits for c in choices} == {True} or LayerChoice(32, 8) in choices
    for member in found.members:
        size = len((tmp_path / "runs" / "run" / str(member.artifact)).read_bytes())
        assert member.predicted.size_bytes == pytest.approx(size, rel=0.01)
        assert member.predicted.latency_ms is not None
        report = verify(export(member, tmp_path / str(member.trial), front=found), found_task)
        assert report["ok"] is True


@pytest.mark.parametrize("change", ("accuracy_level", "bits"))
def test_an_edited_n_bit_kernel_is_noticed(change: str) -> None:
    net = NETWORKS["attention"]()
    choice = LayerChoice(4, 8, "block32", nbits=True)
    candidate = net.resolved({"query": choice, "mix": LayerChoice(32, 8)})
    model = net.assemble(candidate)
    kinds = {n.name: n.op_type for n in model.graph.node}
    stated = SimpleNamespace(
        dialect="onnxruntime", layers={n: SimpleNamespace(kind=kinds[n]) for n in candidate.layers}
    )
    assert not _layer_problems(model, candidate, stated)  # type: ignore[arg-type]
    (layer,) = (n for n in model.graph.node if n.op_type == "MatMulNBits")
    (attribute,) = (a for a in layer.attribute if a.name == change)
    attribute.i = 0 if change == "accuracy_level" else 2
    assert _layer_problems(model, candidate, stated)  # type: ignore[arg-type]


def test_verify_with_the_task_reproduces_the_accuracy(
    front: Front, task: Task, tmp_path: Path
) -> None:
    for member in front.members[:2]:
        folder = export(member, tmp_path / str(member.trial), front=front)
        report = verify(folder, task)
        assert member.verified is not None
        assert report["accuracy"]["accuracy"] == member.verified["accuracy"]
        assert report["accuracy"]["split"] == "test"
        assert report["checks"][-1]["name"] == "accuracy"


def test_another_task_is_noticed(task: Task, package: Path, tmp_path: Path) -> None:
    shifted = [(data, (labels + 1) % 5) for data, labels in task.test or ()]
    with pytest.raises((PackageError, TaskError)):  # below chance
        verify(package, dataclasses.replace(task, test=shifted))
    fewer = dataclasses.replace(task, test=list(task.test or ())[:3])
    with pytest.raises(PackageError, match=r"verified\.samples is 240, task 'tiny' gives 144"):
        verify(package, fewer)
    with pytest.raises(TaskError, match="no test data"):
        verify(package, dataclasses.replace(task, test=None))
    with pytest.raises(PackageError, match="metric is 'top1', that of task 'tiny' is 'other'"):
        verify(package, dataclasses.replace(task, metric=other))
    model = tiny_network()
    for name, final in (("head.weight", "top.weight"), ("head.bias", "top.bias")):
        for found in (*model.graph.initializer,):
            if found.name == name:
                found.name = final
        model.graph.node[-1].input[:] = [
            final if n == name else n for n in model.graph.node[-1].input
        ]
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(PackageError, match="layer 'head' is not both in it and in task"):
        verify(package, dataclasses.replace(task, model=tmp_path / "other.onnx"))


def other(outputs: Any, targets: Any) -> float:
    return 0.0


def test_an_edited_accuracy_is_caught_by_the_task(task: Task, package: Path) -> None:
    def better(manifest: dict[str, Any]) -> None:  # consistently
        manifest["verified"]["accuracy"] += 0.02
        manifest["verified"]["drop"] = (
            manifest["baseline"]["test_accuracy"] - manifest["verified"]["accuracy"]
        )

    edit(package, better)
    assert verify(package)["ok"]
    with pytest.raises(PackageError, match=r"manifest\.json: verified\.accuracy is .*tiny.*gives"):
        verify(package, task)

    def easier(manifest: dict[str, Any]) -> None:
        manifest["verified"]["accuracy"] -= 0.02
        manifest["baseline"]["test_accuracy"] += 0.02
        manifest["verified"]["drop"] = (
            manifest["baseline"]["test_accuracy"] - manifest["verified"]["accuracy"]
        )

    edit(package, easier)
    with pytest.raises(PackageError, match=r"baseline\.test_accuracy is"):
        verify(package, task)


def test_an_unverified_member_is_compared_on_validation(
    front: Front, task: Task, package: Path
) -> None:
    edit(package, lambda m: m.update(verified=None))
    report = verify(package, task)
    assert report["accuracy"]["split"] == "validation"
    assert report["accuracy"]["accuracy"] == packed(front).searched.value


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((package / MANIFEST).read_text())
    change(manifest)
    (package / MANIFEST).write_text(json.dumps(manifest))


def rehash(package: Path) -> None:
    edit(package, lambda m: m["files"].update({n: sha256(package / n) for n in FILES}))
    size = (package / "model.onnx").stat().st_size
    edit(package, lambda m: m.update(size_bytes=size))


def change_sample(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    arrays = dict(np.load(package / "sample.npz", allow_pickle=False))
    change(arrays)
    np.savez(package / "sample.npz", **arrays)
    rehash(package)


def change_model(package: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    model = onnx.load(str(package / "model.onnx"))
    change(model)
    (package / "model.onnx").write_bytes(model.SerializeToString())
    rehash(package)


def change_candidate(package: Path, **fields: Any) -> None:
    """Other settings for the first layer, with the key and hash that go with them."""
    candidate = Candidate.read(package / "candidate.yaml")
    first = dataclasses.replace(candidate.choice("first"), **fields)
    candidate = candidate.normalized({**candidate.layers, "first": first})
    (package / "candidate.yaml").write_text(yaml.safe_dump(candidate.to_dict()))
    rehash(package)
    edit(package, lambda m: m.update(key=candidate.key))
    bits = {"weight_bits": first.weight_bits, "activation_bits": first.activation_bits}
    edit(package, lambda m: m["layers"]["first"].update(bits))
    change_model(package, lambda m: m.metadata_props[0].__setattr__("value", candidate.key))


def initializer(model: onnx.ModelProto, prefix: str) -> TensorProto:
    return next(i for i in model.graph.initializer if i.name.startswith(prefix))


def replace_initializer(model: onnx.ModelProto, prefix: str, change: Callable[[Any], Any]) -> None:
    found = initializer(model, prefix)
    found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found)), found.name))


def truncate_model(package: Path) -> None:
    path = package / "model.onnx"
    path.write_bytes(path.read_bytes()[:-500])
    rehash(package)


def point_outside(package: Path) -> None:
    (package.parent / "elsewhere.onnx").write_bytes((package / "model.onnx").read_bytes())
    edit(package, lambda m: m["files"].update({"../elsewhere.onnx": m["files"]["model.onnx"]}))


def link_model(package: Path) -> None:
    outside = package.parent / "elsewhere.onnx"
    (package / "model.onnx").rename(outside)
    (package / "model.onnx").symlink_to(outside)


def external_data(model: onnx.ModelProto) -> None:
    found = initializer(model, "head")
    found.ClearField("raw_data")
    found.data_location = TensorProto.EXTERNAL
    found.external_data.add(key="location", value="/etc/hostname")


def pickled_sample(package: Path) -> None:
    np.savez(package / "sample.npz", image=np.array([{}], dtype=object))
    rehash(package)


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "no manifest.json"),
    "manifest is no JSON": (
        lambda p: (p / MANIFEST).write_text("{"),
        "manifest.json: Invalid JSON",
    ),
    "manifest lacks a field": (
        lambda p: edit(p, lambda m: m.pop("session_config")),
        "manifest.json: session_config: missing",
    ),
    "manifest has another field": (
        lambda p: edit(p, lambda m: m.update(extra=1)),
        "manifest.json: extra: unknown field",
    ),
    "manifest has a wrong type": (
        lambda p: edit(p, lambda m: m["layers"]["head"].update(weight_bits="8")),
        "manifest.json: layers.head.weight_bits: Input should be a valid integer",
    ),
    "another format": (lambda p: edit(p, lambda m: m.update(format=2)), "manifest.json: format"),
    "other session options": (
        lambda p: edit(p, lambda m: m.update(session_config={"a": "b"})),
        "manifest.json: session_config is {'a': 'b'}",
    ),
    "no hash": (
        lambda p: edit(p, lambda m: m["files"].pop("run.py")),
        "manifest.json: files lacks run.py",
    ),
    "a path outside": (point_outside, "manifest.json: files has '../elsewhere.onnx'"),
    "an absolute path": (
        lambda p: edit(p, lambda m: m["files"].update({"/etc/hostname": "0"})),
        "manifest.json: files has '/etc/hostname'",
    ),
    "a link": (link_model, "model.onnx: is a symbolic link"),
    "a file too many": (
        lambda p: (p / "numpy.py").write_text(""),
        "numpy.py: does not belong to the package",
    ),
    "a truncated model": (truncate_model, "model.onnx: not a readable ONNX file"),
    "a model of garbage": (
        lambda p: ((p / "model.onnx").write_bytes(b"\x00garbage"), rehash(p)),
        "model.onnx: not a readable ONNX file",
    ),
    "a model with data elsewhere": (
        lambda p: change_model(p, external_data),
        "model.onnx: '.*' keeps its data in another file",
    ),
    "a model for another candidate": (
        lambda p: change_model(p, lambda m: m.metadata_props[0].__setattr__("value", "0" * 16)),
        "model.onnx: made for candidate 0000000000000000",
    ),
    "another opset in the manifest": (
        lambda p: edit(p, lambda m: m.update(opset=22)),
        "model.onnx: opset: 21, the manifest says 22",
    ),
    "a model of a later opset than the runtime's": (
        lambda p: (
            change_model(p, lambda m: m.opset_import[0].__setattr__("version", 99)),
            edit(p, lambda m: m.update(opset=99)),
        ),
        "model.onnx: .*opset",
    ),
    "a model of a later IR than the runtime's": (
        lambda p: (
            change_model(p, lambda m: m.__setattr__("ir_version", 99)),
            edit(p, lambda m: m.update(ir_version=99)),
        ),
        "model.onnx: .*IR version",
    ),
    "outputs that another onnxruntime recorded": (
        lambda p: (
            edit(p, lambda m: m["machine"].update(onnxruntime="1.0.0")),
            change_sample(p, lambda a: a["scores"].__imul__(np.float32(1.5))),
        ),
        "sample.npz: output 'scores' of model.onnx differs",
    ),
    "another size in the manifest": (
        lambda p: edit(p, lambda m: m.update(size_bytes=1)),
        r"model.onnx: size_bytes: \d+, the manifest says 1$",
    ),
    "another shape in the manifest": (
        lambda p: edit(p, lambda m: m["inputs"][0]["shape"].__setitem__(1, 1)),
        "model.onnx: inputs: .*the manifest says .*'image'",
    ),
    "an input too many in the manifest": (
        lambda p: edit(p, lambda m: m["inputs"].append(m["inputs"][0])),
        "model.onnx: inputs: 1, the manifest says 2",
    ),
    "other bits in the manifest": (
        lambda p: edit(p, lambda m: m["layers"]["first"].update(weight_bits=7)),
        r"candidate.yaml: layer 'first' has \d/8 bits, the manifest says 7/8",
    ),
    "another key in the manifest": (
        lambda p: edit(p, lambda m: m.update(key="0" * 16)),
        "candidate.yaml: key is",
    ),
    "a layer too many in the manifest": (
        lambda p: edit(p, lambda m: m["layers"].update(more=m["layers"]["head"])),
        "candidate.yaml: it and the manifest do not both have layer 'more'",
    ),
    "another operator in the manifest": (
        lambda p: edit(p, lambda m: m["layers"]["head"].update(kind="MatMul")),
        "model.onnx: layer 'head' is a Gemm, the manifest says MatMul",
    ),
    "other weight bits everywhere but in the model": (
        lambda p: change_candidate(p, weight_bits=7),
        r"model.onnx: layer 'first' stores weights of \d bits, candidate.yaml says 7",
    ),
    "other activation bits everywhere but in the model": (
        lambda p: change_candidate(p, activation_bits=4),
        "model.onnx: layer 'first' has activations of 8 bits, candidate.yaml says 4",
    ),
    "float activations everywhere but in the model": (
        lambda p: change_candidate(p, activation_bits=32),
        "model.onnx: layer 'first' has activations of 8 bits, candidate.yaml says 32",
    ),
    "a candidate of another form": (
        lambda p: ((p / "candidate.yaml").write_text("- 1\n"), rehash(p)),
        "candidate.yaml: expected a mapping",
    ),
    "a better accuracy": (
        lambda p: edit(p, lambda m: m["verified"].update(accuracy=0.999)),
        "manifest.json: verified.drop is .*, but accuracy is 0.999",
    ),
    "no accuracy": (
        lambda p: edit(p, lambda m: m["searched"].pop("accuracy")),
        "manifest.json: searched or baseline is incomplete",
    ),
    "another split": (
        lambda p: edit(p, lambda m: m["verified"].update(split="metric")),
        "manifest.json: verified: split or samples",
    ),
    "other recorded outputs": (
        lambda p: change_sample(p, lambda a: a["scores"].__setitem__((0, 0), a["scores"][0, 1])),
        "sample.npz: output 'scores' of model.onnx differs",
    ),
    "other inputs": (
        lambda p: change_sample(p, lambda a: a["image"].__imul__(np.float32(0.5))),
        "sample.npz: output 'scores' of model.onnx differs",
    ),
    "fewer outputs": (
        lambda p: change_sample(p, lambda a: a.update(scores=a["scores"][:4])),
        "sample.npz: output 'scores' of model.onnx differs from the recorded one by inf",
    ),
    "inputs of another type": (
        lambda p: change_sample(p, lambda a: a.update(image=a["image"].astype(np.float64))),
        "sample.npz: 'image' is float64",
    ),
    "no outputs": (
        lambda p: change_sample(p, lambda a: a.pop("scores")),
        "sample.npz: has image; the model's",
    ),
    "a pickle": (pickled_sample, "sample.npz: not an npz file: ValueError: .*allow_pickle"),
    "a wide tolerance": (
        lambda p: edit(p, lambda m: m["tolerance"].update(scores=1e9)),
        "manifest.json: tolerance is",
    ),
    "other weights": (
        lambda p: change_model(p, lambda m: replace_initializer(m, "packed", lambda a: a ^ 3)),
        "sample.npz: output 'scores' of model.onnx differs",
    ),
    "other scales": (
        lambda p: change_model(p, lambda m: replace_initializer(m, "head.w", lambda a: a * 2)),
        "sample.npz: output 'scores' of model.onnx differs",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_caught(package: Path, name: str) -> None:
    tamper, message = TAMPERED[name]
    tamper(package)
    with pytest.raises(PackageError, match=message) as caught:
        verify(package)
    assert str(caught.value).startswith(f"{package}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_every_file_counts(package: Path, name: str, how: str) -> None:
    path = package / name
    if how == "changed":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(PackageError, match=f"{re.escape(name)}: {how}"):
        verify(package)


def test_a_model_of_other_bits_is_caught(front: Front, package: Path) -> None:
    """Even with its hash, size and name of the candidate put right."""
    key = packed(front).key
    assert front.folder is not None
    for member in front.members:
        if member.key == key:
            continue
        shutil.copy(front.folder / str(member.artifact), package / "model.onnx")
        rehash(package)
        with pytest.raises(PackageError, match=r"model\.onnx: made for candidate"):
            verify(package)
        change_model(package, lambda m: m.metadata_props[0].__setattr__("value", key))
        with pytest.raises(PackageError, match=r"model\.onnx: layer .* candidate\.yaml says"):
            verify(package)


def test_integers_out_of_range_are_caught(package: Path) -> None:
    """Packed weights are judged by what the file itself makes of them."""

    def other_offset(model: onnx.ModelProto) -> None:
        offset = next(n for n in model.graph.node if n.op_type == "Sub").input[1]
        replace_initializer(model, offset, np.zeros_like)

    change_model(package, other_offset)
    with pytest.raises(PackageError, match=r"weights go from \d to \d+, \d bits from -\d to \d"):
        verify(package)


def test_many_differences_are_one_line(package: Path) -> None:
    for name in FILES:
        (package / name).unlink()
    with pytest.raises(PackageError, match=r"model\.onnx: missing; .*; and 1 more$"):
        verify(package)


def test_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no such folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(PackageError, match=r"no manifest\.json"):
        verify(tmp_path)


def test_hidden_files_are_left_alone(package: Path) -> None:
    (package / ".gitignore").write_text("*")
    assert verify(package)["ok"]


def test_another_machine_gets_a_tolerance(package: Path) -> None:
    """Up to four steps of the activation grid are taken for rounding, more are not."""
    edit(package, lambda m: m["machine"].update(cpu="another"))
    limit = json.loads((package / MANIFEST).read_text())["tolerance"]["scores"]
    span = np.ptp(np.load(package / "sample.npz")["scores"])
    assert limit == pytest.approx(4 / 255 * span)

    recorded = np.load(package / "sample.npz")["scores"]
    middle = np.unravel_index(np.argsort(recorded, axis=None)[recorded.size // 2], recorded.shape)

    def move(share: float) -> None:
        moved = recorded[middle] + np.float32(share * limit)
        change_sample(package, lambda a: a["scores"].__setitem__(middle, moved))

    move(0.9)
    details = {check["name"]: check["detail"] for check in verify(package)["checks"]}
    assert "another" in details["outputs"]
    move(1.1)
    with pytest.raises(PackageError, match="differs from the recorded one by"):
        verify(package)


def test_tolerances() -> None:
    outputs = {
        "y": np.array([-1.0, 3.0, np.inf], np.float32),
        "same": np.full(3, 2.0, np.float32),
        "label": np.array([1, 2]),
    }
    four = Candidate({"a": LayerChoice(8, 4), "b": LayerChoice(8, 8)})
    assert tolerances(outputs, four) == {
        "y": pytest.approx(4 * 4 / 15), "same": pytest.approx(2 * 4 / 15), "label": 0.0
    }  # fmt: skip
    assert tolerances(outputs, Candidate())["y"] == pytest.approx(4e-3)


def test_several_inputs_and_a_metric_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integer inputs, run-time ranges, an embedding, and outputs named by the graph."""
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))
    text = NETWORKS["text"]()
    model = tmp_path / "text.onnx"
    onnx.save(text.graph.model, str(model))
    targets = text.reference[0] + images(3, seed=4) * 0.01
    task = Task(
        name="text",
        model=model,
        example_inputs=tuple(a[:1] for a in text.inputs),
        calibration=[text.inputs],
        validation=[(text.inputs, targets)],
        metric=closeness,
    )
    rule = {"weight_bits": [4, 8], "activation_bits": [8], "dynamic": True}
    settings = SearchSettings(
        space=Space.model_validate({"name": "dynamic", "rules": [rule]}),
        objectives=("accuracy", "size_bytes"),
        trials=2,
        name="run",
        runs_dir=tmp_path / "runs",
    )
    front = search(task, settings)
    folder = export(front.members[0], tmp_path / "package", front=front)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [i["dtype"] for i in manifest["inputs"]] == ["int64", "float32"]
    assert manifest["layers"]["query"]["kind"] == "MatMulInteger"
    assert manifest["layers"]["words"]["activation_bits"] == 32
    report = verify(folder, task)
    assert report["accuracy"]["metric"] == "closeness"
    assert report["accuracy"]["split"] == "validation"
    assert run_script(folder).returncode == 0


def closeness(outputs: Any, targets: Any) -> float:
    return -float(np.square(outputs - targets).mean())
