"""Every command: what it prints on a small task, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import helper, numpy_helper
from small_task import LAYERS, model, profile, task, uniform, write_task_file

from autoquant import tracking
from autoquant.cli import main
from autoquant.compress import compress
from autoquant.hardware import load_hardware
from autoquant.search.trial import prepare

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "search", "front", "compare", "export", "unpack", "verify", "compress", "inspect",
    "profile", "ui", "spaces", "hardware", "tasks",
)  # fmt: skip


@dataclass(frozen=True)
class Output:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout, strictly."""
        return json.loads(self.out, parse_constant=pytest.fail)

    def error(self, status: int = 2) -> str:
        """The one line of a mistake; what was said before it are lines of the search's log."""
        assert self.status == status, self
        assert self.out == ""
        assert "Traceback" not in self.err
        *before, last = self.err.splitlines()
        assert last.startswith("autoquant: ")
        logs = ("training the built-in", "lowering", "scoring", "calibrating", "weight bank")
        logs += ("timing", "latency model")
        assert all(line.startswith("autoquant: ") for line in before)
        assert all(any(word in line for word in logs) for line in before), self.err
        return last


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    def run(*arguments: object) -> Output:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Output(status, captured.out, captured.err)

    return run


def process(*arguments: object, cwd: Path = ROOT, **environment: str) -> Output:
    """The command in a process of its own, as a user runs it."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-m", "autoquant", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "100", **environment},
        timeout=120,
        check=False,
    )
    return Output(found.returncode, found.stdout, found.stderr)


@dataclass(frozen=True)
class Made:
    """A folder with a task file, a profile, a space, and one finished run."""

    folder: Path
    task: str
    profile: Path
    space: Path
    search: Output

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def common(self) -> tuple[object, ...]:
        return ("--hardware", self.profile, "--space", self.space, "--runs-dir", self.runs)

    @property
    def front(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.runs / "one" / "front.json").read_text())
        return found


SPACE_FILE = """\
name: small
rules:
  - weight_bits: [2, 4, 8]
    activation_bits: 8
    float: true
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("cli")
    spec = write_task_file(folder)
    hardware, space = folder / "made-up.yaml", folder / "small.yaml"
    document = profile().model_dump(mode="json", exclude_defaults=True)
    hardware.write_text(yaml.safe_dump(document))
    space.write_text(SPACE_FILE)
    options = ["--hardware", hardware, "--space", space, "--runs-dir", folder / "runs"]
    output = process("search", spec, *options, "--trials", 8, "--name", "one", "--json")
    yield Made(folder, spec, hardware, space, output)


# --- what is printed --------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    output = process("--help")
    assert output.status == 0 and output.err == ""
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\s", output.out, re.MULTILINE), command


def test_help_of_a_command_loads_nothing_slow() -> None:
    code = (
        "import sys\nfrom autoquant.cli import main\n"
        "for a in (['--help'], ['search', '--help'], ['spaces'], ['hardware'], ['tasks']):\n"
        "    assert main(a) == 0\n"
        "slow = {'torch', 'ray', 'mlflow', 'optuna', 'onnxruntime', 'onnx', 'plotly', 'scipy'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stderr.strip() == "[]"


def test_without_a_command_there_is_help(cli: Callable[..., Output]) -> None:
    output = cli()
    assert output.status == 2
    text = output.out + output.err
    assert "Usage" in text and all(command in text for command in COMMANDS)
    assert len(text.splitlines()) > len(COMMANDS)


def test_search_prints_its_front_and_nothing_else(made: Made) -> None:
    output = made.search
    assert output.status == 0, output.err
    assert output.json == made.front
    assert "Traceback" not in output.err and "autoquant: " in output.err
    assert {p.name for p in (made.runs / "one").iterdir()} >= {
        "study.yaml", "environment.json", "trials.jsonl", "study.journal", "front.json",
        "front.html", "artifacts",
    }  # fmt: skip
    assert (made.runs / "mlflow.db").is_file() and (made.runs / "mlartifacts").is_dir()
    study = yaml.safe_load((made.runs / "one" / "study.yaml").read_text())
    assert study["task"] == made.task and study["trials"] == 8


def test_search_prints_a_table_and_what_to_do_next(
    made: Made, cli: Callable[..., Output], no_tracking: None
) -> None:
    options = ("--trials", 4, "--name", "table", "--objectives", "accuracy, size_bytes")
    output = cli("search", made.task, *made.common, *options)
    assert output.status == 0
    assert "trial" in output.out and "float" in output.out
    assert max(len(line) for line in output.out.splitlines()) <= 100
    assert "autoquant export table" in output.err and "autoquant ui" in output.err
    command = re.search(r"autoquant (export .*)", output.err)
    assert command is not None
    arguments = command[1].split()
    arguments[-1] = str(made.folder / "as-told")
    assert cli(*arguments).status == 0
    assert (made.folder / "as-told" / "model.onnx").is_file()


@pytest.fixture
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes a store of its own in seconds; one search with it is enough."""
    for name in ("start", "trial", "finish", "fail"):
        monkeypatch.setattr(tracking.MlflowTracker, name, lambda *_, **__: None)


def test_search_repeats_a_configuration(
    made: Made, cli: Callable[..., Output], no_tracking: None
) -> None:
    config = made.runs / "one" / "study.yaml"
    options = ("--name", "again", "--runs-dir", made.runs, "--json")
    output = cli("search", "--config", config, *options)
    assert output.status == 0, output.err
    assert [m["key"] for m in output.json["members"]] == [m["key"] for m in made.front["members"]]
    fewer = cli("search", "--config", config, "--trials", 2, "--name", "fewer", *options[2:])
    assert fewer.json["trials"] == 2
    unnamed = cli("search", "--config", config, "--trials", 1, *options[2:])
    assert unnamed.json["run"] not in ("one", "again")


def test_search_resumes(made: Made, cli: Callable[..., Output], no_tracking: None) -> None:
    options = (*made.common, "--name", "longer", "--json")
    assert cli("search", made.task, *options, "--trials", 3).json["trials"] == 3
    output = cli("search", made.task, *options, "--trials", 5, "--resume")
    assert output.status == 0 and output.json["trials"] == 5
    lines = (made.runs / "longer" / "trials.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == 5


SLOW = """
import time


def slow(outputs, targets):
    time.sleep(0.001)  # and 200 times for the bootstrap
    return float((outputs.argmax(1) == targets).mean())


def slow_task():
    from dataclasses import replace

    return replace(task(), metric=slow)
"""


def test_a_search_survives_being_killed_and_ends_at_ctrl_c(made: Made, tmp_path: Path) -> None:
    spec = write_task_file(tmp_path, SLOW).replace(":task", ":slow_task")
    trials = made.runs / "slow" / "trials.jsonl"
    options = (spec, *made.common, "--name", "slow", "--trials", 60, "--json")
    counts = []
    for number, more in ((signal.SIGKILL, ()), (signal.SIGINT, ("--resume",))):
        command = [sys.executable, "-m", "autoquant", "search", *map(str, options), *more]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        search = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        before = sum(counts)
        while search.poll() is None:
            done = trials.read_text().count("\n") if trials.is_file() else 0
            if done >= before + 2:
                search.send_signal(number)
                break
            time.sleep(0.02)
        output = Output(0, *search.communicate(timeout=60))
        counts.append(trials.read_text().count("\n") - before)
    assert search.returncode == 0, output.err
    assert output.json["trials"] == sum(counts) < 60 and output.json["members"]
    assert "interrupted" in output.err and "Traceback" not in output.err
    found = [json.loads(line) for line in trials.read_text().splitlines()]
    assert len({t["key"] for t in found}) == len({t["trial"] for t in found}) == len(found)
    assert min(counts) >= 2


def test_nothing_feasible_exits_with_1(
    made: Made, cli: Callable[..., Output], no_tracking: None
) -> None:
    options = ("--trials", 3, "--name", "none", "--max-size-bytes", 10, "--json")
    output = cli("search", made.task, *made.common, *options)
    assert output.status == 1 and output.out == "" and "Traceback" not in output.err
    assert "none of 3 trials satisfies the limits" in output.err.splitlines()[-1]
    limits = ("--max-size-bytes", 10, "-o", made.folder / "never")
    assert "no member within the limits" in cli(
        "export", "one", "--runs-dir", made.runs, *limits
    ).error(1)
    assert not (made.folder / "never").exists()


def test_front_prints_a_table_or_the_document(made: Made, cli: Callable[..., Output]) -> None:
    table = cli("front", "one", "--runs-dir", made.runs)
    assert table.status == 0 and table.err == ""
    assert "float" in table.out and max(map(len, table.out.splitlines())) <= 100
    for member in made.front["members"]:
        assert re.search(rf"^\s*{member['trial']}\s", table.out, re.MULTILINE)
    assert cli("front", made.runs / "one", "--json").json == made.front


def test_export_verify_and_run(made: Made, cli: Callable[..., Output]) -> None:
    trial = made.front["members"][0]["trial"]
    package = made.folder / "package"
    options = ("--runs-dir", made.runs, "--trial", trial, "-o", package)
    output = cli("export", "one", *options, "--json")
    assert output.json["package"] == str(package) and output.json["trial"] == trial
    text = cli("verify", package)
    assert text.status == 0 and text.err == ""
    assert text.out.splitlines() and all(line.startswith("ok") for line in text.out.splitlines())
    found = cli("verify", package, "--task", made.task, "--json").json
    assert len(found["checks"]) > len(text.out.splitlines())
    with (package / "model.onnx").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    assert "model.onnx" in cli("verify", package).error()
    assert "new or empty folder" in cli("export", "one", *options).error()


@pytest.mark.parametrize("limit", ["--max-drop", "--max-latency-ms", "--max-size-bytes"])
def test_export_chooses_within_a_limit(
    made: Made, cli: Callable[..., Output], tmp_path: Path, limit: str
) -> None:
    options = ("--runs-dir", made.runs, "-o", tmp_path / "package")
    output = cli("export", "one", *options, limit, 1_000_000)
    assert output.status == 0 and output.out == f"{tmp_path / 'package'}\n"
    assert (tmp_path / "package" / "manifest.json").is_file()


def test_export_says_what_was_close(made: Made, cli: Callable[..., Output], tmp_path: Path) -> None:
    output = cli("export", "one", "--runs-dir", made.runs, "-o", tmp_path / "knee", "--knee")
    assert output.status == 0 and output.out == f"{tmp_path / 'knee'}\n"
    chosen, *_, check = output.err.splitlines()
    assert re.search(r"trial \d+: drop .* of float", chosen) and "autoquant verify" in check
    assert len(made.front["members"]) > 1 and "close: " in output.err
    options = ("--runs-dir", made.runs, "-o", tmp_path / "json", "--json")
    found = cli("export", "one", *options).json
    assert f"trial {found['trial']}:" in chosen  # without options it is the knee
    assert set(found["nearby"].values()) <= {m["trial"] for m in made.front["members"]}


def test_compare_overlays_runs(
    made: Made, cli: Callable[..., Output], tmp_path: Path, no_tracking: None
) -> None:
    options = ("--name", "compared", "--trials", 2, "--start-from", "one", "--json")
    assert cli("search", made.task, *made.common, *options).status == 0
    page = tmp_path / "fronts.html"
    output = cli("compare", "one", "compared", "--runs-dir", made.runs, "-o", page)
    assert output.status == 0 and "one" in output.out and "compared" in output.out
    assert max(map(len, output.out.splitlines())) <= 100
    assert "<title>one and compared" in page.read_text()
    found = cli("compare", "one", "compared", "--runs-dir", made.runs, "--json").json
    assert [run["run"] for run in found["runs"]] == ["one", "compared"]
    assert "at least two runs" in cli("compare", "one", "--runs-dir", made.runs).error()
    nowhere = tmp_path / "no" / "x.html"
    options = ("--runs-dir", made.runs, "-o", nowhere)
    assert "cannot be written" in cli("compare", "one", "compared", *options).error()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("se", {"search"}),
        ("search mn", {"mnist"}),
        ("search --space lo", {"low-bit"}),
        ("search --hardware cortex-m55", {"cortex-m55-ethos-u55"}),
        ("search --sampler ns", {"nsga2"}),
        ("search --start-fr", {"--start-from"}),
        ("front --runs-dir RUNS on", {"one"}),
    ],
)
def test_a_shell_completes_names(made: Made, words: str, found: set[str]) -> None:
    line = f"autoquant {words.replace('RUNS', str(made.runs))}"
    position = str(len(line.split()) - 1)
    output = process(_AUTOQUANT_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=position)
    assert output.err == "" and set(output.out.split()) == found


def test_compress_builds_one_candidate(
    made: Made, cli: Callable[..., Output], tmp_path: Path
) -> None:
    member = made.front["members"][-1]
    path, output = tmp_path / "candidate.json", tmp_path / "x.onnx"
    path.write_text(json.dumps(member["candidate"]))
    options = ("--candidate", path, "--hardware", made.profile, "-o", output)
    found = cli("compress", made.task, *options, "--json").json
    assert set(found) == {"key", "predicted", "score"}
    assert found["key"] == member["key"] and found["predicted"] == member["predicted"]
    assert found["score"] == member["searched"]
    assert output.read_bytes() == (made.runs / "one" / member["artifact"]).read_bytes()
    text = cli("compress", made.task, *options)
    assert text.out == f"{output}\n" and "bits a weight" in text.err


def test_inspect_shows_the_layers(made: Made, cli: Callable[..., Output]) -> None:
    found = cli("inspect", made.task, "--json").json
    assert [layer["name"] for layer in found["layers"]] == list(LAYERS)
    table = cli("inspect", made.task)
    assert table.status == 0 and all(name in table.out for name in LAYERS)
    assert found["layers"][0]["sensitivity"]["4/8"] > 0 and "at 4/8" in table.out
    assert "sensitivity of 3 layers: measured" in table.err
    plain = cli("inspect", made.task, "--no-sensitivity")
    assert "at 4/8" not in plain.out and "sensitivity" not in plain.err


def test_inspect_of_an_onnx_file_with_data(made: Made, cli: Callable[..., Output]) -> None:
    path = made.folder / "small.onnx"
    assert len(cli("inspect", path, "--data", made.task, "--json").json["layers"]) == 3


def test_profile_measures_into_a_file(
    made: Made, cli: Callable[..., Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    path = tmp_path / "here.yaml"
    output = cli("profile", made.task, "-o", path, "--json")
    found = load_hardware(path)
    assert output.json == found.model_dump(mode="json", exclude_defaults=True)
    assert found.model is not None and found.model.kernel_ms


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (
            "spaces",
            {
                "int8", "low-bit", "mixed", "weight-only", "joint", "prune-then-quantize",
                "distil",
            },
        ),
        (
            "hardware",
            {
                "onnxruntime-cpu", "openvino-cpu", "openvino-cpu-bf16", "cortex-m4-cmsis-nn",
                "cortex-m4-x-cube-ai",
                "cortex-m7-cmsis-nn", "cortex-m7-x-cube-ai", "cortex-m55-ethos-u55", "cortex-a53",
                "cortex-a72", "cortex-a76", "jetson-orin-nano", "nvidia-t4", "nvidia-a100",
                "xeon-amx", "qualcomm-hexagon", "edge-tpu", "imx500", "bitfusion",
            },
        ),
        ("tasks", {"mnist"}),
    ],
)  # fmt: skip
def test_what_is_built_in(cli: Callable[..., Output], command: str, names: set[str]) -> None:
    found = {item["name"]: item["description"] for item in cli(command, "--json").json}
    assert set(found) == names and all(found.values())
    text = cli(command)
    assert text.status == 0 and text.err == ""
    lines = text.out.splitlines()
    assert {line.split()[0] for line in lines if line[0] != " "} == names
    assert max(map(len, lines)) <= 100


# --- mistakes ---------------------------------------------------------------------------------


def test_a_mistake_in_a_process_is_one_line_and_status_2() -> None:
    output = process("search", "mnits")
    assert output.error() == output.err.strip()
    assert "did you mean 'mnist'" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "mnits"), "did you mean 'mnist'"),
        (("inspect", "no.py:task"), "no.py: no such file"),
        (("inspect", "no.onnx"), "no.onnx: no such file"),
        (("inspect", "no_such_module:task"), "no_such_module"),
        (("search", "--space", "mixt"), "did you mean 'mixed'"),
        (("search", "--space", "no.yaml"), "no.yaml: no such file"),
        (("search", "--hardware", "onnx"), "onnxruntime-cpu"),
        (("search", "--trials", "0"), "--trials is 0"),
        (("search", "--trials", "many"), "--trials"),
        (("search", "--resume"), "--resume needs --name"),
        (("search", "--config", "no.yaml"), "no.yaml: cannot be read"),
        (("search", "--no-such-option"), "--no-such-option"),
        (("serch",), "serch"),
        (("front", "no-run"), "no run 'no-run'"),
        (("front",), "RUN"),
        (("export", "no-run", "-o", "x"), "no run 'no-run'"),
        (("export", "x", "-o", "y", "--trial", "1", "--max-drop", "1"), "--trial names"),
        (("export", "x", "-o", "y", "--trial", "1", "--knee"), "--trial names"),
        (("export", "x", "-o", "y", "--knee", "--max-drop", "1"), "--knee names"),
        (("compare", "no-run", "other"), "no run 'no-run'"),
        (("search", "--sampler", "surogate"), "did you mean 'surrogate'"),
        (("search", "--start-from", "no-run"), "no run 'no-run'"),
        (("serch",), "Did you mean 'search'"),
        (("search", "--trails", "3"), "--trials"),
        (("verify", "no-package"), "no-package"),
        (("compress", "mnist", "--candidate", "no.yaml", "-o", "x.onnx"), "no.yaml"),
        (("ui", "--runs-dir", "no-runs"), "no MLflow store"),
    ],
)
def test_a_wrong_name_is_one_line(
    cli: Callable[..., Output],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in cli(*arguments).error()
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules:\n  - weight_bit: 8\n", "space.yaml:2: rules.0.weight_bit: unknown field"),
        ("rules:\n  - weight_bits: 9\n", "9 is not one of 2, 3"),
        ("rules: [\n", "not YAML"),
        ("rules: []\n", "space.yaml:1: rules"),
        ("- 1\n", "expected fields"),
    ],
)
def test_a_mistake_in_a_space_is_one_line(
    made: Made, cli: Callable[..., Output], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    options = ("--space", path, "--hardware", made.profile, "--runs-dir", tmp_path)
    assert message in cli("search", made.task, *options).error()


def test_an_unknown_field_of_a_profile_is_one_line(
    made: Made, cli: Callable[..., Output], tmp_path: Path
) -> None:
    path = tmp_path / "hardware.yaml"
    path.write_text("kernel: []\n")
    line = cli("search", made.task, "--hardware", path).error()
    assert "hardware.yaml:1: kernel: unknown field; did you mean 'kernels'" in line


def test_a_layer_that_a_space_names_must_exist(
    made: Made, cli: Callable[..., Output], tmp_path: Path
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("rules:\n  - layers: frist\n    weight_bits: 8\n")
    options = ("--space", path, "--hardware", made.profile, "--runs-dir", tmp_path / "runs")
    line = cli("search", made.task, *options).error()
    assert "frist" in line and "first" in line
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: {frist: {weight_bits: 8}}", "unknown layer 'frist'; did you mean 'first'"),
        ("layers: {first: {weight_bits: 9}}", "layer 'first': weight_bits is 9"),
        ("layers: {first: {bits: 8}}", "unknown field 'bits'"),
        ("layer: {}", "unknown field 'layer'; did you mean 'layers'"),
        ("pruning: {frist: 0.5}", "unknown channel group 'frist'; did you mean 'first'"),
        ("[]", "expected a mapping"),
        ("{", "not YAML"),
    ],
)
def test_a_mistake_in_a_candidate_is_one_line(
    made: Made, cli: Callable[..., Output], tmp_path: Path, text: str, message: str
) -> None:
    path, output = tmp_path / "candidate.yaml", tmp_path / "x.onnx"
    path.write_text(text)
    options = ("--candidate", path, "-o", output, "--hardware", made.profile)
    assert message in cli("compress", made.task, *options).error()
    assert not output.exists()


TASKS = {
    "raises": ('raise ValueError("no\\ndata")', "importing it raised ValueError: no data"),
    "exits": ("import sys; sys.exit(3)", "importing it raised SystemExit"),
    "syntax": ("def task(:", "importing it raised SyntaxError"),
    "function": ("def other(): pass", "no function 'task'"),
    "call": ("def task(): return 1 / 0", "calling it raised ZeroDivisionError"),
    "none": ("def task(): pass", "returned NoneType, not an autoquant.Task"),
    "argument": ("def task(path): pass", "calling it raised TypeError"),
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_file_that_fails_is_one_line(
    cli: Callable[..., Output], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(TASKS[name][0])
    line = cli("inspect", f"{path}:task").error()
    assert TASKS[name][1] in line and "broken.py" in line


CHANGES = {
    "empty": ("validation=[]", "validation is empty"),
    "empty calibration": ("calibration=[]", "calibration is empty"),
    "shape": (
        'validation=[(np.zeros((4, 2, 8), "f"), np.zeros(4, int))]',
        "input 0 has shape (4, 2, 8)",
    ),
    "channels": ('validation=[(np.zeros((4, 3, 8, 8), "f"), np.zeros(4, int))]', "failed"),
    "targets": (
        'validation=[(np.zeros((4, 2, 8, 8), "f"), np.zeros(3, int))]',
        "targets have shape (3,) for 4 inputs",
    ),
    "labels": (
        'validation=[(np.zeros((4, 2, 8, 8), "f"), np.full(4, 9))]',
        "labels go from 9 to 9, but the network has 4 outputs",
    ),
    "no labels": ('validation=[np.zeros((4, 2, 8, 8), "f")]', "(inputs, targets)"),
    "nan data": (
        'calibration=[np.full((4, 2, 8, 8), np.nan, "f")]',
        "input 0 contains NaN or infinity",
    ),
    "nan metric": ("metric=lambda o, t: float('nan')", "on validation is nan"),
    "metric raises": ("metric=lambda o, t: o[99999]", "the metric raised IndexError"),
    "metric of no value": ("metric=lambda o, t: None", "the metric raised TypeError"),
    "metric name": ("metric='top5'", "metric is 'top5'"),
    "below chance": (
        "validation=[(x, (y + 2) % 4) for x, y in task().validation]",
        "below chance (0.2500)",
    ),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_data_or_a_metric_that_is_wrong_is_one_line(
    made: Made, cli: Callable[..., Output], tmp_path: Path, no_tracking: None, name: str
) -> None:
    change, message = CHANGES[name]
    changed = (
        f"from dataclasses import replace\n\ndef changed():\n    return replace(task(), {change})\n"
    )
    spec = write_task_file(tmp_path, changed).replace(":task", ":changed")
    options = ("--hardware", made.profile, "--space", made.space, "--runs-dir", tmp_path / "runs")
    assert message in cli("search", spec, *options).error()
    assert not list((tmp_path / "runs").glob("*/*"))


def broken(path: Path) -> None:
    path.write_bytes(model().SerializeToString()[:500])


def text(path: Path) -> None:
    path.write_text("not a model")


def not_float(path: Path) -> None:
    found = onnx.ModelProto()
    found.CopyFrom(model())
    for initializer in found.graph.initializer:
        array = numpy_helper.to_array(initializer).astype(np.float16)
        initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
    for value in (*found.graph.input, *found.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(found, str(path))


def quantized(path: Path) -> None:
    context = prepare(task(path.parent), space=uniform(8), hardware=profile())
    artifact = compress(context.graph, uniform(8), context.calibration, context.bank, "onnxruntime")
    path.write_bytes(artifact.model)


def nan(path: Path) -> None:
    found = onnx.ModelProto()
    found.CopyFrom(model())
    found.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.full((6, 2, 3, 3), np.nan, np.float32), "first.weight")
    )
    onnx.save(found, str(path))


def nothing(path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    kind = onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(n, kind, ["N", 2, 8, 8]) for n in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        str(path),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken, "not a readable ONNX file"),
        (text, "not a readable ONNX file"),
        (not_float, "float"),
        (quantized, "quantized"),
        (nan, "'first.weight' contains NaN"),
        (nothing, "no layer to quantize"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_network_that_cannot_be_used_is_one_line(
    made: Made,
    cli: Callable[..., Output],
    tmp_path: Path,
    make: Callable[[Path], None],
    message: str,
) -> None:
    path = tmp_path / "network.onnx"
    make(path)
    line = cli("inspect", path, "--data", made.task).error()
    assert message in line and "network.onnx" in line


def test_a_used_name_is_one_line(made: Made, cli: Callable[..., Output]) -> None:
    output = cli("search", made.task, *made.common, "--name", "one")
    assert "run 'one' exists" in output.error()


@pytest.mark.parametrize("command", ["search", "compress", "profile", "export"])
def test_a_folder_that_cannot_be_written_is_one_line(
    made: Made, cli: Callable[..., Output], tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "x"
    candidate = tmp_path / "candidate.yaml"
    candidate.write_text("layers: {}")
    arguments: dict[str, tuple[object, ...]] = {
        "search": (made.task, *made.common, "--runs-dir", inside),
        "compress": (
            made.task, "--candidate", candidate, "--hardware", made.profile, "-o", inside,
        ),
        "profile": (made.task, "-o", inside),
        "export": ("one", "--runs-dir", made.runs, "-o", inside),
    }  # fmt: skip
    assert str(tmp_path / "file") in cli(command, *arguments[command]).error()


def test_a_trial_that_is_not_on_the_front_is_one_line(
    made: Made, cli: Callable[..., Output], tmp_path: Path
) -> None:
    options = ("--runs-dir", made.runs, "--trial", 99, "-o", tmp_path / "x")
    assert "trial 99 is not on the front" in cli("export", "one", *options).error()


def test_a_bug_of_ours_is_not_hidden(
    cli: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("autoquant.tasks.load_task", bug)
    monkeypatch.setattr("autoquant.api.load_task", bug)
    with pytest.raises(ZeroDivisionError):
        cli("inspect", "mnist")


def test_a_full_disk_is_one_line(
    made: Made, cli: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr("autoquant.api.load_task", full)
    assert cli("inspect", made.task).error() == "autoquant: somewhere: No space left on device"


def test_ctrl_c_exits_with_130(
    made: Made, cli: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoquant.api.load_task", interrupt)
    output = cli("inspect", made.task)
    assert output.status == 130 and output.err.strip() == "autoquant: interrupted"
