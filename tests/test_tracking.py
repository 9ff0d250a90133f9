"""MLflow: a real store in a folder of its own, and the server that shows it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient
from small_task import LAYERS, SPACE, member, profile, task

import autoquant
from autoquant.errors import RunError
from autoquant.front import Front, Member
from autoquant.result import TrialResult
from autoquant.runtime import OnnxRuntime, session_config
from autoquant.tracking import (
    MlflowTracker,
    _free_port,
    _server,
    serve,
    view_state,
    view_url,
)

ROOT = Path(__file__).resolve().parents[1]
STUDY = {
    "task": "small", "name": "one", "trials": 3, "max_drop": None, "space": {"rules": [1]},
    "objectives": ["accuracy", "latency_ms", "size_bytes"],
}  # fmt: skip
VERIFIED = {
    "accuracy": 0.88, "standard_error": 0.01, "drop": 0.02, "drop_standard_error": 0.01,
    "samples": 500, "split": "test", "latency_ms": 1.5, "latency_median_ms": 1.6,
    "latency_spread_ms": 0.1,
}  # fmt: skip


def results() -> list[dict[str, Any]]:
    """A member, a dominated trial, an infeasible one and a failed one."""
    found = []
    for trial, accuracy, size, status in (
        (0, 0.90, 3000, "complete"),
        (1, 0.89, 1000, "complete"),
        (2, 0.80, 4000, "infeasible"),
        (3, 0.80, 4000, "failed"),
    ):
        m = member(trial, accuracy, size)
        failed = status == "failed"
        found.append(
            TrialResult(
                trial,
                m.candidate,
                status,
                None if failed else m.searched,
                None if failed else m.predicted,
                {"size_bytes": size} if status == "complete" else None,
                {"compress": 0.5},
                error="ValueError: broken" if failed else None,
            ).to_dict()
        )
    return found


def front(*members: Member) -> dict[str, Any]:
    return Front(
        "one", "small", "made-up", tuple(STUDY["objectives"]), {"accuracy": 0.8}, 0.5, 4, 2.5,
        {"accuracy": 0.9, "size_bytes": 4000, "latency_ms": None, "test_accuracy": 0.91}, members,
    ).to_dict()  # fmt: skip


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def runs(client: MlflowClient, **tags: str) -> list[Run]:
    """Runs of all experiments with these tags."""
    experiments = [e.experiment_id for e in client.search_experiments(ViewType.ALL)]
    text = " and ".join(f"tags.`{k}` = '{v}'" for k, v in tags.items())
    return sorted(client.search_runs(experiments, text), key=lambda r: r.info.run_name)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, MlflowClient]]:
    """The store after one search."""
    folder = tmp_path_factory.mktemp("tracked")
    tracker = MlflowTracker(None, folder)
    tracker.start(STUDY)
    for result in results():
        tracker.trial(result)
    found = front(member(0, 0.9, 3000, verified=VERIFIED), member(1, 0.89, 1000))
    tracker.finish(found, "<html>page</html>", lambda _: "| a | b |\n")
    yield folder, MlflowClient(store(folder))


def test_a_search_is_a_parent_run(tracked: tuple[Path, MlflowClient]) -> None:
    folder, client = tracked
    (parent,) = runs(client, **{"autoquant.run": "one"})
    assert parent.info.run_name == "one" and parent.info.status == "FINISHED"
    assert client.get_experiment(parent.info.experiment_id).name == "small"
    assert parent.data.params["trials"] == "3" and "max_drop" not in parent.data.params
    assert json.loads(parent.data.params["space"]) == {"rules": [1]}
    assert parent.data.metrics["hypervolume"] == 0.5
    assert parent.data.metrics["float_accuracy"] == 0.9
    assert "float_latency_ms" not in parent.data.metrics
    assert parent.data.tags["mlflow.note.content"] == "| a | b |\n"
    names = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert names == {"front.html", "front.json"}
    (page,) = folder.glob("mlartifacts/**/front.html")
    assert page.read_text() == "<html>page</html>"


def children(client: MlflowClient) -> dict[str, Run]:
    (parent,) = runs(client, **{"autoquant.run": "one"})
    found = runs(client, **{"mlflow.parentRunId": parent.info.run_id})
    return {run.data.tags["trial"]: run for run in found}


def test_a_trial_is_a_child_run_with_bits_and_figures(
    tracked: tuple[Path, MlflowClient],
) -> None:
    found = children(tracked[1])
    assert sorted(found) == ["0", "1", "2", "3"]
    assert found["1"].data.params == dict.fromkeys(LAYERS, "4/8")
    metrics = found["1"].data.metrics
    assert metrics["accuracy"] == 0.89 and metrics["size_bytes"] == 1000
    assert metrics["measured_size_bytes"] == 1000 and metrics["seconds"] == 0.5
    assert "energy_mj" not in metrics
    assert found["0"].data.metrics["test_accuracy"] == 0.88
    assert found["0"].data.metrics["measured_latency_ms"] == 1.5
    assert found["3"].info.status == "FAILED" and found["3"].data.metrics == {"seconds": 0.5}
    assert found["3"].data.tags["error"] == "ValueError: broken"
    assert {r.info.status for n, r in found.items() if n != "3"} == {"FINISHED"}


def test_tags_say_what_is_on_the_front_and_feasible(
    tracked: tuple[Path, MlflowClient],
) -> None:
    tags = {n: r.data.tags for n, r in children(tracked[1]).items()}
    assert {n: t["pareto"] for n, t in tags.items()} == {
        "0": "true", "1": "true", "2": "false", "3": "false",
    }  # fmt: skip
    assert {n: t["feasible"] for n, t in tags.items()} == {
        "0": "true", "1": "true", "2": "false", "3": "false",
    }  # fmt: skip
    assert tags["2"]["status"] == "infeasible"
    assert len({t["key"] for t in tags.values()}) == 2  # two candidates in turn


def test_the_view_opens_on_the_trials_of_the_search(
    tracked: tuple[Path, MlflowClient],
) -> None:
    _, client = tracked
    (parent,) = runs(client, **{"autoquant.run": "one"})
    key = parent.data.tags["autoquant.view"]
    tags = client.get_experiment(parent.info.experiment_id).tags
    view = json.loads(tags[f"mlflow.sharedViewState.{key}"])
    assert json.loads(view["state"]) == view_state(parent.info.run_id, STUDY["objectives"])
    url = view_url("http://127.0.0.1:5000/", parent.info.experiment_id, key)
    assert url.startswith("http://127.0.0.1:5000/#/experiments/") and key in url
    axes = [c["xaxis"]["key"] for c in view["compareRunCharts"] if c["type"] == "SCATTER"]
    assert axes == ["latency_ms", "size_bytes"]


def test_a_resumed_search_duplicates_nothing(tmp_path: Path) -> None:
    known = results()
    first = MlflowTracker(None, tmp_path)
    first.start(STUDY)
    for result in known[:2]:
        first.trial(result)
    first.finish(front(member(0, 0.9, 3000)), "old", lambda _: "old")
    again = MlflowTracker(None, tmp_path)
    again.start(STUDY, resume=True)
    for result in known:
        again.trial(result)
    again.finish(front(member(1, 0.89, 1000)), "new", lambda _: "new")
    client = MlflowClient(store(tmp_path))
    (parent,) = runs(client, **{"autoquant.run": "one"})
    assert parent.data.tags["mlflow.note.content"] == "new" and parent.info.status == "FINISHED"
    found = children(client)
    assert sorted(found) == ["0", "1", "2", "3"]
    assert len(runs(client)) == 1 + 4
    assert {n: r.data.tags["pareto"] for n, r in found.items()} == {
        "0": "false", "1": "true", "2": "false", "3": "false",
    }  # fmt: skip
    other = MlflowTracker(None, tmp_path)
    other.start({**STUDY, "name": "it's"}, resume=True)  # none of that name: a new one
    other.fail("FAILED")
    (parent,) = [r for r in runs(client) if r.info.run_name == "it's"]
    assert parent.info.status == "FAILED"


def test_names_and_many_layers_that_mlflow_would_refuse(tmp_path: Path) -> None:
    layers = {f"block/{i}:conv[{i % 2}]": {"weight_bits": 4} for i in range(230)}
    layers |= {"a/b": {"weight_bits": 4}, "a.b": {"weight_bits": 8}, "x" * 300: {"weight_bits": 2}}
    result = {**results()[0], "candidate": {"layers": layers}}
    tracker = MlflowTracker(None, tmp_path)
    tracker.start({**STUDY, "note": "y" * 9000})
    tracker.trial(result)
    tracker.finish(front(member(0, 0.9, 3000)), "page", lambda _: "line\n" * 4000)
    client = MlflowClient(store(tmp_path))
    child = children(client)["0"]
    assert len(child.data.params) == 233
    assert sorted(v for k, v in child.data.params.items() if k.startswith("a.b")) == [
        "4/32", "8/32",
    ]  # fmt: skip
    (parent,) = runs(client, **{"autoquant.run": "one"})
    assert len(parent.data.tags["mlflow.note.content"]) <= 8000


@pytest.mark.parametrize(
    "uri",
    ["sqlite:////dev/null/x.db", "nonsense://x", "http://127.0.0.1:9/"],
)
def test_a_store_that_does_not_work_never_raises(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MlflowTracker(uri, tmp_path)
    tracker.start(STUDY)
    for result in results():
        tracker.trial(result)
    tracker.finish(front(member(0, 0.9, 3000)), "page", lambda _: "note")
    tracker.fail()
    captured = capsys.readouterr()
    assert captured.out == ""
    warnings = [x for x in captured.err.splitlines() if "MLflow tracking is off" in x]
    assert len(warnings) == 1


def test_ending_what_never_started_is_no_error(tmp_path: Path) -> None:
    MlflowTracker(None, tmp_path).fail()
    assert not list(tmp_path.iterdir())


# --- a server of someone else -----------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A tracking server on loopback that keeps artifacts itself, and a folder of runs."""
    store_folder = tmp_path_factory.mktemp("server")
    address = f"http://127.0.0.1:{_free_port('127.0.0.1', 0)}"
    with _server(store_folder, address):
        yield address, tmp_path_factory.mktemp("remote")


def test_a_search_is_tracked_by_a_server_and_the_chosen_member_loads_back(
    remote: tuple[str, Path],
) -> None:
    address, folder = remote
    options = {"space": SPACE, "hardware": profile(), "trials": 8, "polish": False, "name": "one"}
    found = autoquant.search(
        task(folder), runs_dir=folder, tracking_uri=address, progress=False, **options
    )
    client = MlflowClient(address)
    (parent,) = runs(client, **{"autoquant.run": "one"})
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {
        "front.html", "front.json",
    }  # fmt: skip
    assert "autoquant export" in parent.data.tags["mlflow.note.content"]
    assert not list(folder.glob("mlflow.db")) and not list(folder.glob("mlartifacts"))
    of_trial = {
        int(run.data.tags["trial"]): run
        for run in runs(client, **{"mlflow.parentRunId": parent.info.run_id})
    }
    for m in found.members:
        names = {a.path for a in client.list_artifacts(of_trial[m.trial].info.run_id)}
        assert {f"{m.trial}.onnx", "candidate.json"} <= names

    knee = found.knee()
    assert chosen_trial(client) == knee.trial
    mlflow.set_tracking_uri(address)
    images = task(folder).split("validation").batches[0][0]
    for m in (knee, next(m for m in found.members if m.trial != knee.trial)):
        if m is not knee:
            autoquant.export(m, folder / "package", tracking_uri=address)
        assert chosen_trial(client) == m.trial
        loaded = mlflow.pyfunc.load_model("models:/small@chosen")
        config = loaded._model_impl.rt.get_session_options()
        for key, value in session_config().items():
            assert config.get_session_config_entry(key) == value
        ours = OnnxRuntime().open(found.folder / m.artifact).run([images])[0]
        np.testing.assert_array_equal(loaded.predict({"x": images})["y"], ours)
    autoquant.export(knee, folder / "again", tracking_uri=address)
    assert chosen_trial(client) == knee.trial
    assert len(client.search_model_versions("name = 'small'")) == 2


def chosen_trial(client: MlflowClient) -> int:
    return int(client.get_model_version_by_alias("small", "chosen").tags["trial"])


# --- the server -------------------------------------------------------------------------------


def descendants(pid: int) -> set[int]:
    """Processes below ``pid``, from /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found: set[int] = set()
    while True:
        more = {p for p, parent in parents.items() if parent in found | {pid}} - found
        if not more:
            return found
        found |= more


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_server_answers_on_loopback_and_leaves_nothing_behind(
    tracked: tuple[Path, MlflowClient],
) -> None:
    folder, client = tracked
    started: set[int] = set()
    command = [sys.executable, "-m", "autoquant", "ui", "--runs-dir", str(folder), "--no-browser"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [*command, "--port", "5311"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()  # printed once it answers
        (parent,) = runs(client, **{"autoquant.run": "one"})
        assert url.startswith("http://127.0.0.1:") and parent.info.run_id in url
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url.partition("#")[0], timeout=30) as answer:
            assert answer.status == 200 and b"<html" in answer.read().lower()
        started = descendants(server.pid)
        assert started
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    finally:
        server.kill()
        _, errors = server.communicate()
    assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, started))


def test_without_a_store_there_is_nothing_to_serve(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no MLflow store"):
        serve(tmp_path, open_browser=False)
