"""What ``import autoquant`` offers, on a small task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from small_task import LAYERS, SPACE, profile, task, uniform, write_task_file

import autoquant
from autoquant import Callback, Candidate, Front, LayerChoice, TrialResult
from autoquant.api import read_config
from autoquant.errors import HardwareError, RunError, TaskError
from autoquant.hardware import load_hardware
from autoquant.search import SearchSettings
from autoquant.search import trial as trials


def small_search(folder: Path, **changes: Any) -> Front:
    options: dict[str, Any] = {
        "space": SPACE,
        "hardware": profile(),
        "trials": 5,
        "name": "one",
        "runs_dir": folder / "runs",
        "tracking": False,
        "progress": False,
    }
    return autoquant.search(changes.pop("task", task(folder)), **{**options, **changes})


def test_search_finds_a_front_and_draws_it(tmp_path: Path) -> None:
    class Counter(Callback):
        heard = 0

        def trial(self, result: TrialResult) -> None:
            self.heard += 1

    counter = Counter()
    front = small_search(tmp_path, callbacks=[counter])
    assert isinstance(front, Front) and counter.heard == front.trials == 5
    assert front.folder == tmp_path / "runs" / "one"
    html = (front.folder / "front.html").read_text()
    assert all(f"--trial {m.trial} " in html for m in front.members)
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    assert front.knee() in front.members and front.choose(max_drop=1.0) in front.members


def test_search_takes_a_task_as_the_command_line_does(tmp_path: Path) -> None:
    spec = write_task_file(tmp_path)
    front = small_search(tmp_path, task=spec, trials=2)
    assert front.task == "small"
    study = yaml.safe_load((tmp_path / "runs" / "one" / "study.yaml").read_text())
    assert study["task"] == spec and study["data"] is None


def test_an_onnx_file_takes_the_data_of_a_task(tmp_path: Path) -> None:
    spec = write_task_file(tmp_path)
    path = str(tmp_path / "renamed.onnx")
    (tmp_path / "small.onnx").rename(path)
    front = small_search(tmp_path, task=path, data=spec, trials=2)
    assert front.task == "renamed"
    with pytest.raises(TaskError, match="--data"):
        autoquant.inspect(path)


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="trails"):
        small_search(tmp_path, trails=3)


def test_a_member_becomes_a_package_that_verifies(tmp_path: Path) -> None:
    front = small_search(tmp_path)
    folder = autoquant.export(front.choose(max_drop=1.0), tmp_path / "package")
    assert {p.name for p in folder.iterdir()} >= {
        "model.onnx", "candidate.yaml", "manifest.json", "sample.npz", "run.py", "README.md",
    }  # fmt: skip
    report = autoquant.verify(folder, task(tmp_path))
    assert report["checks"] and all(check["ok"] for check in report["checks"])
    with pytest.raises(RunError):
        autoquant.export(front.members[0], folder)


def test_a_front_that_was_read_exports_too(tmp_path: Path) -> None:
    small_search(tmp_path)
    member = Front.read("one", tmp_path / "runs").members[0]
    assert (autoquant.export(member, tmp_path / "package") / "model.onnx").is_file()


def test_compress_is_what_a_trial_does(tmp_path: Path) -> None:
    front = small_search(tmp_path)
    member = front.members[-1]
    scored = autoquant.compress(task(tmp_path), member.candidate, hardware=profile())
    assert member.artifact is not None and front.folder is not None
    assert scored.artifact.model == (front.folder / member.artifact).read_bytes()
    assert scored.score == member.searched
    assert scored.predicted == member.predicted
    assert scored.to_dict()["key"] == member.key


def test_compress_reads_a_file_and_leaves_the_rest_float(tmp_path: Path) -> None:
    path = tmp_path / "candidate.yaml"
    path.write_text("layers:\n  second: {weight_bits: 4, activation_bits: 8}\n")
    scored = autoquant.compress(task(tmp_path), path, hardware=profile(), split="test")
    assert scored.artifact.candidate == Candidate({"second": LayerChoice(4, 8)})
    assert scored.score.split == "test"
    assert onnx.load_from_string(scored.artifact.model).graph.node


def test_inspect_describes_the_network(tmp_path: Path) -> None:
    found = autoquant.inspect(task(tmp_path))
    assert [layer["name"] for layer in found["layers"]] == list(LAYERS)
    assert found["task"] == "small" and found["inputs"] == {"x": [1, 2, 8, 8]}
    assert found["outputs"] == {"y": [1, 4]}
    assert found["macs"] == 6 * 2 * 9 * 64 + 8 * 6 * 9 * 9 + 32
    assert found["parameters"] == 6 * 2 * 9 + 8 * 6 * 9 + 32
    assert found["sensitivity"]["estimator"] == "measured"
    assert found["sensitivity"]["divergence"] == "kl"
    for layer in found["layers"]:
        assert layer["sensitivity"]["2/8"] > layer["sensitivity"]["8/8"] > 0


def test_inspect_without_sensitivity_reads_no_data(tmp_path: Path) -> None:
    found = autoquant.inspect(task(tmp_path, calibration=[]), sensitivity=False)
    assert found["sensitivity"] is None and "sensitivity" not in found["layers"][0]


def test_inspect_shows_layers_whose_data_cannot_be_used(tmp_path: Path) -> None:
    found = autoquant.inspect(task(tmp_path, calibration=[]))
    assert "calibration is empty" in found["sensitivity"]["unavailable"]
    assert [layer["name"] for layer in found["layers"]] == list(LAYERS)


def test_a_profile_of_this_machine_predicts_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "here.yaml"
    written = autoquant.profile(task(tmp_path), path)
    read = load_hardware(path)
    assert read == written and read.name == "here" and read.model is not None

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(trials, "measure_device", refuse)
    scored = autoquant.compress(task(tmp_path), uniform(8), hardware=read)
    assert scored.predicted.latency_ms is not None and scored.predicted.latency_ms > 0
    with pytest.raises(HardwareError, match="batch 1"):
        autoquant.compress(task(tmp_path), uniform(8), hardware=read, batch=2)


# --- configurations ---------------------------------------------------------------------------


def test_a_study_repeats_from_its_file(tmp_path: Path) -> None:
    spec = write_task_file(tmp_path)
    first = small_search(tmp_path, task=spec, trials=6, max_drop=0.5)
    config = read_config(tmp_path / "runs" / "one" / "study.yaml")
    assert config.pop("name") == "one" and config.pop("task") == spec
    again = autoquant.search(
        spec, **config, name="two", runs_dir=tmp_path / "runs", tracking=False, progress=False
    )
    assert [m.key for m in again.members] == [m.key for m in first.members]
    assert [m.searched for m in again.members] == [m.searched for m in first.members]
    assert again.hypervolume == first.hypervolume
    settings = SearchSettings(**{k: v for k, v in config.items() if k != "data"})
    assert settings.trials == 6 and settings.max_drop == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trails: 5", "unknown field 'trails'; did you mean 'trials'"),
        ("[1, 2]", "expected fields"),
        ("", "expected fields"),
        ("a: [", "not YAML"),
        ("space: {rules: [{weight_bits: 9}]}", "space"),
        ("hardware: {kernels: []}", "hardware"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RunError, match="cannot be read"):
        read_config(tmp_path / "missing.yaml")


def test_a_torch_module_is_a_network_too() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    inputs = torch.randn(64, 6, generator=generator)
    labels = network(inputs).argmax(1)
    found = autoquant.Task(
        name="module",
        model=network.eval(),
        example_inputs=(inputs[:1],),
        calibration=[inputs],
        validation=[(inputs, labels)],
    )
    assert [layer["kind"] for layer in autoquant.inspect(found)["layers"]] == ["Gemm", "Gemm"]
    scored = autoquant.compress(found, Candidate(), hardware=without_latency(found))
    assert scored.score.value == 1.0 and scored.score.drop == 0.0


def without_latency(found: autoquant.Task) -> Any:
    """A profile with zero for every kernel of the task's network."""
    from autoquant.compress.lower import lower
    from autoquant.cost.table import signature

    graph = lower(found)
    times = {signature(graph, layer, p): 1e-3 for layer in graph.layers for p in ("float", "int8")}
    known = profile()
    assert known.model is not None
    return known.model_copy(update={"model": known.model.model_copy(update={"kernel_ms": times})})
