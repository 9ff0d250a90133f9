"""Searches whose trials, workers, nodes, drivers and disks really fail."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import small_disk
from ray._private.authentication_test_utils import reset_auth_token_state
from ray.cluster_utils import Cluster
from small_task import SPACE, profile, settings, uniform, write_task_file

from autoquant.candidate import Candidate
from autoquant.errors import NoFeasibleMember, RunError
from autoquant.front import Front
from autoquant.result import TrialResult
from autoquant.search import Callback, search
from autoquant.search.executor import Bounds, InProcess, RayExecutor, connected
from autoquant.search.run import RESERVE
from autoquant.search.status import status
from autoquant.search.trial import Context, prepare
from autoquant.tasks import load_task

CANDIDATES = [uniform(8), uniform(4, 8, 32), uniform(2), uniform(32), uniform(2, 8, 4)]

METRIC = '''

import hashlib
import os
import re
import signal
import time
from dataclasses import replace

HERE = Path(__file__).parent
LABELS = np.load(HERE / "small.npz")["y2"]
held = []


def accuracy(outputs, targets):
    if np.array_equal(targets, LABELS):  # not one of the resamples for its error
        misbehave(outputs)
    return float((outputs.argmax(1) == targets).mean())


def misbehave(outputs):
    """As the file ``all`` says for every trial, as ``one`` does for the first that reads it."""
    digest = hashlib.sha256(outputs.tobytes()).hexdigest()
    with (HERE / "evaluated").open("a") as file:
        file.write(f"{digest} {os.getpid()}\\n")
    if (HERE / "all").exists():
        fail((HERE / "all").read_text())
    if (HERE / "one").exists():
        try:
            with (HERE / "victim").open("x") as file:
                file.write(digest)
        except FileExistsError:
            pass
        if (HERE / "victim").read_text() == digest:
            fail((HERE / "one").read_text())


def fail(how):
    if how == "raise":
        raise ValueError("broken on purpose")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hold":
        held.append(b"x" * 800_000_000)
        time.sleep(60)
    if how == "lock":  # the interpreter's, for an hour
        re.match("(a+)+$", "a" * 40 + "b")
    if how == "places":
        import ray
        import threadpoolctl

        threads = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
        node = ray.get_runtime_context().get_node_id()
        with (HERE / "places").open("a") as file:
            file.write(f"{node} {max(threads)} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
        doomed = HERE / "doomed"
        time.sleep(30 if doomed.exists() and doomed.read_text() == node else 0.3)
    if how.startswith("sleep"):
        time.sleep(float(how.split()[1]))


def faulty():
    return replace(task(), metric=accuracy)


def on_a_gpu():
    return replace(faulty(), gpus=0.5)
'''


@pytest.fixture
def spec(tmp_path: Path) -> str:
    """The task whose trials do as the files beside it say."""
    return write_task_file(tmp_path, METRIC).replace(":task", ":faulty")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of one core: the first with the resource ``latency``, the second with a GPU that
    Ray is told of. Their environment asks for three threads a process."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("OMP_NUM_THREADS", "3")
        patch.setenv("RAY_health_check_period_ms", "1000")  # a dead node is noticed in 5 s, not 15
        reset_auth_token_state()
        head = {"num_cpus": 1, "resources": {"latency": 1}, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=head)
        found.add_node(num_cpus=1, num_gpus=1)
        with connected(found.address):
            yield found
        found.shutdown()
    reset_auth_token_state()


def lines(folder: Path, name: str = "one") -> list[dict[str, Any]]:
    path = folder / "runs" / name / "trials.jsonl"
    found = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in found if line.endswith(b"\n")]


def words(path: Path) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


def places(folder: Path) -> list[str]:
    """The nodes that trials ran on."""
    return [node for node, _, _ in words(folder / "places")]


def faulty_context(spec: str) -> Context:
    return prepare(load_task(spec), space=SPACE, hardware=profile())


def outcome(executor: Any, candidates: list[Candidate]) -> dict[int, TrialResult]:
    for number, candidate in enumerate(candidates):
        executor.submit(candidate, number, 0)
    found = [executor.wait() for _ in candidates]
    executor.close()
    return {result.trial: result for result in found}


class Told(Callback):
    """What a search says; ``fault`` is written where trials read it when the first starts."""

    def __init__(self, folder: Path, which: str = "", fault: str = "") -> None:
        self.folder, self.which, self.fault = folder, which, fault
        self.said: list[str] = []
        self.paces: list[tuple[int, int]] = []

    def start(self, *_: Any) -> None:
        (self.folder / "evaluated").write_text("")  # without the float network
        if self.which:
            (self.folder / self.which).write_text(self.fault)

    def stage(self, text: str) -> None:
        self.said.append(text)

    def pace(self, workers: int, retries: int) -> None:
        self.paces.append((workers, retries))


def searched(spec: str, told: Told, **changes: Any) -> Front:
    given = {"polish": False, "signal": "metric", **changes}
    return search(load_task(spec), settings(told.folder, **given), callbacks=[told])


# --- the same answer, and where it is found --------------------------------------------------


def test_two_nodes_find_what_this_process_does(cluster: Cluster, spec: str, tmp_path: Path) -> None:
    found = faulty_context(spec)
    here = outcome(InProcess(found), CANDIDATES)
    (tmp_path / "all").write_text("places")
    executor = RayExecutor(found, 1, cluster.address)
    assert executor.workers == 2  # one for each core of the cluster
    there = outcome(executor, CANDIDATES)
    for number, result in here.items():
        assert result.status == "complete" and result.sha256 and result.score
        assert replace(result, seconds=None) == replace(there[number], seconds=None)
    assert len(set(places(tmp_path))) == 2
    assert {threads for _, threads, _ in words(tmp_path / "places")} == {
        "1"
    }  # though the nodes ask for three


def test_a_task_that_asks_for_gpus_runs_where_they_are(
    cluster: Cluster, spec: str, tmp_path: Path
) -> None:
    found = prepare(
        load_task(spec.replace(":faulty", ":on_a_gpu")), space=SPACE, hardware=profile()
    )
    (tmp_path / "all").write_text("places")
    there = outcome(RayExecutor(found, 1, cluster.address), CANDIDATES[:3])
    assert {r.status for r in there.values()} == {"complete"}
    gpu = next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU"))
    assert [(node, device) for node, _, device in words(tmp_path / "places")] == [(gpu, "0")] * 3
    with pytest.raises(RunError, match="asks for 3 GPUs a trial; Ray has 1"):
        RayExecutor(replace(found, gpus=3.0), 1, cluster.address)


def test_latencies_are_measured_alone_on_the_node_for_them(cluster: Cluster) -> None:
    latency = next(n["NodeID"] for n in ray.nodes() if n["Resources"].get("latency"))

    def busy() -> tuple[str, float]:
        time.sleep(1)
        return ray.get_runtime_context().get_node_id(), time.time()

    def measure(text: str) -> tuple[str, float, int, str]:
        return ray.get_runtime_context().get_node_id(), time.time(), os.getpid(), text

    with connected(cluster.address) as alone:
        trials = [ray.remote(num_cpus=1)(busy).remote() for _ in range(2)]
        ray.wait(trials, timeout=0.3)
        node, began, process, text = alone(measure, "x")
        ended = dict(ray.get(trials))
    assert (node, text) == (latency, "x") and process != os.getpid()
    assert began >= ended[latency]  # it waited for the trial there


# --- workers, nodes and drivers that are lost ------------------------------------------------


def test_a_candidate_that_kills_two_workers_is_set_aside(
    cluster: Cluster, spec: str, tmp_path: Path
) -> None:
    told = Told(tmp_path, "one", "kill")
    front = searched(spec, told, ray_address=cluster.address)
    assert front.trials == 8 and front.members
    (failed,) = [t for t in lines(tmp_path) if t["status"] == "failed"]
    assert failed["error"] == "set aside: 2 workers died while they ran it (WorkerCrashedError)"
    victim = (tmp_path / "victim").read_text()
    tried = {pid for digest, pid in words(tmp_path / "evaluated") if digest == victim}
    assert len(tried) == 2
    assert told.paces[-1] == (2, 1)


def test_a_lost_node_costs_no_trial(cluster: Cluster, spec: str, tmp_path: Path) -> None:
    (tmp_path / "all").write_text("places")

    doomed = next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU"))
    (tmp_path / "doomed").write_text(doomed)  # what runs there is not done before it is lost

    class Lose(Told):
        def trial(self, result: TrialResult) -> None:
            if ray.cluster_resources()["CPU"] > 1 and doomed in places(self.folder):
                (node,) = cluster.worker_nodes
                cluster.remove_node(node, allow_graceful=False)
                while ray.cluster_resources()["CPU"] > 1:
                    time.sleep(0.1)

    told = Lose(tmp_path)
    try:
        searched(spec, told, ray_address=cluster.address, trials=20)
    finally:
        cluster.add_node(num_cpus=1, num_gpus=1)
    found = lines(tmp_path)
    assert len({t["key"] for t in found}) == len(found) == 20
    assert not [t for t in found if t["status"] == "failed"]
    assert told.paces[-1] == (1, 1)  # what ran there ran again
    assert status("one", tmp_path / "runs")["retries"] == 1
    (tmp_path / "all").unlink()
    here = faulty_context(spec)
    for trial in found:
        executor = InProcess(here)
        executor.submit(Candidate.from_dict(trial["candidate"]), trial["trial"], 0)
        result = executor.wait()
        assert result.sha256 == trial["sha256"]
        if trial["status"] == "complete":
            assert result.score is not None and result.score.to_dict() == trial["score"]


DRIVER = """
import sys
from pathlib import Path

from small_task import settings

from autoquant.search import search
from autoquant.tasks import load_task

spec, folder, address = sys.argv[1:]
given = {"trials": 14, "signal": "metric", "polish": False, "ray_address": address or None}
search(load_task(spec), settings(Path(folder), **given))
"""


def started(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A Python process of its own that leaves what it says in ``log``."""
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (folder / "log").open("wb") as log:
        arguments = (sys.executable, *arguments)
        return subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)


def until(driver: subprocess.Popen[bytes], folder: Path, trials: int) -> None:
    """Wait for lines of a driver's trials."""
    while len(lines(folder)) < trials:
        assert driver.poll() is None, (folder / "log").read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("where", ["in-process", "cluster"])
def test_a_driver_killed_in_mid_search_goes_on_with_resume(
    cluster: Cluster, spec: str, tmp_path: Path, where: str
) -> None:
    (tmp_path / "all").write_text("sleep 0.2")
    address = cluster.address if where == "cluster" else ""
    driver = started(tmp_path, "-c", DRIVER, spec, str(tmp_path), address)
    until(driver, tmp_path, 4)
    live = status("one", tmp_path / "runs")
    assert live["state"] == "running" and live["owner"]["pid"] == driver.pid
    assert 4 <= live["trials"] < 14 == live["total"]
    assert live["workers"] == (2 if address else 1)
    given: dict[str, Any] = {"trials": 14, "resume": True, "ray_address": address or None}
    with pytest.raises(RunError, match=f"is being written by process {driver.pid} on"):
        searched(spec, Told(tmp_path), **given)
    driver.kill()
    driver.wait()
    path = tmp_path / "runs" / "one" / "trials.jsonl"
    whole = [x for x in path.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")]
    dead = status("one", tmp_path / "runs")
    assert dead["state"] == "dead" and dead["owner"] is None and dead["trials"] == len(whole)
    assert dead["last_heard_of"] and dead["trials_per_minute"] > 0
    assert 4 <= len(whole) < 14
    before = {digest for digest, _ in words(tmp_path / "evaluated")}
    (tmp_path / "all").unlink()
    told = Told(tmp_path)
    front = searched(spec, told, **given)
    assert any("were running when the run ended" in s for s in told.said)
    assert path.read_bytes().startswith(b"".join(whole)) and front.trials == 14
    found = lines(tmp_path)
    assert len({t["key"] for t in found}) == len(found) == 14
    assert {t["status"] for t in found} <= {"complete", "stopped"}
    assert status("one", tmp_path / "runs")["state"] == "finished"
    repeated = before & {digest for digest, _ in words(tmp_path / "evaluated")}
    assert len(repeated) <= live["workers"]  # what was running


# --- trials that fail ------------------------------------------------------------------------


def test_an_exception_is_recorded_with_its_traceback_and_not_retried(
    cluster: Cluster, spec: str, tmp_path: Path
) -> None:
    told = Told(tmp_path, "one", "raise")
    front = searched(spec, told, ray_address=cluster.address)
    assert front.trials == 8 and front.members
    (failed,) = [t for t in lines(tmp_path) if t["status"] == "failed"]
    assert failed["error"].endswith("the metric raised ValueError: broken on purpose")
    text = (tmp_path / "runs" / "one" / "errors" / f"{failed['trial']}.txt").read_text()
    assert text.startswith("Traceback") and "in misbehave" in text
    assert 'raise ValueError("broken on purpose")' in text
    assert told.paces[-1] == (2, 0)
    victim = (tmp_path / "victim").read_text()
    assert [digest for digest, _ in words(tmp_path / "evaluated")].count(victim) == 1


def test_a_search_stops_by_itself_when_most_trials_fail(spec: str, tmp_path: Path) -> None:
    told = Told(tmp_path, "all", "raise")
    with pytest.raises(NoFeasibleMember, match=r"all 10 trials failed, the last with: .* broken"):
        searched(spec, told, trials=40)
    (said,) = [s for s in told.said if s.startswith("stopped")]
    assert "most of the last trials failed" in said and "broken on purpose" in said
    assert len(list((tmp_path / "runs" / "one" / "errors").iterdir())) == 10


def test_a_trial_that_passes_its_time_is_ended(cluster: Cluster, spec: str, tmp_path: Path) -> None:
    told = Told(tmp_path, "one", "sleep 60")
    front = searched(spec, told, ray_address=cluster.address, trial_timeout=5)
    assert front.trials == 8 and len(lines(tmp_path)) == 8
    (failed,) = [t for t in lines(tmp_path) if t["status"] == "failed"]
    assert failed["error"] == "ended: it took more than its 5 s"
    assert told.paces[-1] == (2, 0)  # no retry


def test_a_trial_that_lets_nobody_stop_it_is_killed(
    cluster: Cluster, spec: str, tmp_path: Path
) -> None:
    found = faulty_context(spec)
    (tmp_path / "one").write_text("lock")
    executor = RayExecutor(found, 1, cluster.address, Bounds(seconds=0.5))
    there = outcome(executor, CANDIDATES[:3])
    failed = [r for r in there.values() if r.status == "failed"]
    assert len(failed) == 1 and "set aside: 2 workers died" in str(failed[0].error)


def test_a_trial_that_passes_its_memory_is_ended(
    cluster: Cluster, spec: str, tmp_path: Path
) -> None:
    found = faulty_context(spec)
    (tmp_path / "one").write_text("hold")
    executor = RayExecutor(found, 1, cluster.address, Bounds(memory_bytes=700_000_000))
    there = outcome(executor, CANDIDATES)
    failed = [r for r in there.values() if r.status == "failed"]
    assert [r.error for r in failed] == ["ended: its worker held more than 700 MB"]
    assert executor.retries <= 1  # of a trial that came to the process as it ended


# --- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB for runs."""
    with small_disk(tmp_path / "runs", "40m") as folder:
        yield folder


def command(folder: Path, spec: str, *more: str) -> list[str]:
    """The arguments of ``autoquant search``."""
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE.model_dump(mode="json", by_alias=True)))
    made = profile().model_dump(mode="json", exclude_defaults=True)
    (folder / "device.yaml").write_text(yaml.safe_dump(made))
    given = {
        "--space": folder / "space.yaml",
        "--hardware": folder / "device.yaml",
        "--runs-dir": folder / "runs",
        "--name": "one",
        "--signal": "metric",
        "--trials": "14",
    }
    options = [str(part) for pair in given.items() for part in pair]
    return ["-m", "autoquant", "search", spec, *options, "--no-polish", *more]


def test_a_full_disk_stops_the_search_with_its_front(disk: Path, spec: str, tmp_path: Path) -> None:
    (tmp_path / "all").write_text("sleep 0.2")
    driver = started(tmp_path, *command(tmp_path, spec))
    until(driver, tmp_path, 5)
    with (disk / "filler").open("wb", buffering=0) as file:
        size = 1 << 20  # most of it at once, before the search is through
        while (disk / "one" / RESERVE).exists():  # until the search gives up its reserve
            try:
                file.write(bytes(size))
            except OSError:
                size = 1 << 12
    code = driver.wait()
    text = (tmp_path / "log").read_text()
    assert "No space left on device" in text and "make room and go on with --resume" in text
    assert "Traceback" not in text and code == 0, text
    front = Front.read(disk / "one")
    kept = lines(tmp_path)
    assert 5 <= len(kept) == front.trials < 14 and front.members
    for member in front.members:
        assert member.verified is not None and (disk / "one" / str(member.artifact)).is_file()
    assert status("one", disk)["state"] == "ended early"
    (disk / "filler").unlink()
    (tmp_path / "all").unlink()
    again = started(tmp_path, *command(tmp_path, spec, "--resume"))
    assert again.wait() == 0, (tmp_path / "log").read_text()
    assert lines(tmp_path)[: len(kept)] == kept and len(lines(tmp_path)) == 14
