"""MLflow: a parent run a search, a child run a trial, and a view that opens on the front.

Tracking never stops a search: it runs on a thread of its own, and its first error is one line
on stderr after which nothing more is tracked.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.candidate import Candidate
from autoquant.errors import RunError
from autoquant.runtime import session_config

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_RUN, _TRIAL, _VIEW = "autoquant.run", "trial", "autoquant.view"
_PARETO = "pareto"
# The colour of a run in MLflow's charts: the front stands out of the other trials.
_ON_FRONT = {_PARETO: "true", "mlflow.runColor": "#d55e00"}
_OFF_FRONT = {_PARETO: "false", "mlflow.runColor": "#a6adb8"}
_RUN_STATUS = {"failed": "FAILED", "stopped": "KILLED"}  # else FINISHED
_PARAMS_A_BATCH = 100
_NAME_LENGTH = 250
_NOTE_LENGTH = 8000
_DRAIN_SECONDS = 120.0


class MlflowTracker:
    """Logs one search to MLflow from a background thread, in order.

    ``tracking_uri``: any MLflow tracking URI; None for ``<runs_dir>/mlflow.db`` with artifacts
    in ``<runs_dir>/mlartifacts``. No method raises for what MLflow does.
    """

    def __init__(self, tracking_uri: str | None, runs_dir: Path) -> None:
        self._uri = tracking_uri or _store_uri(runs_dir)
        remote = self._uri.startswith(("http:", "https:", "databricks"))
        self._artifacts = None if remote else _artifacts(runs_dir)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._broken = False
        # Below: touched by the thread alone.
        self._client: MlflowClient
        self._experiment = ""
        self._parent = ""
        self._children: dict[int, str] = {}
        self._pareto: set[int] = set()

    def start(self, study: Mapping[str, Any], resume: bool = False) -> None:
        """Open the experiment named by the task and the parent run named by the run.

        ``study`` is the content of ``study.yaml``. With ``resume`` the latest parent run of that
        name goes on, and trials that it has already are not logged again.
        """
        self._begin(lambda: self._start(study, resume))

    def trial(self, result: Mapping[str, Any]) -> None:
        """Log a finished trial as a child run; ``result`` is ``TrialResult.to_dict()``."""
        end = _now()
        self._queue.put(lambda: self._trial(result, end))

    def finish(
        self,
        front: Mapping[str, Any],
        html: str,
        note: Callable[[Mapping[int, str]], str],
        folder: Path | None = None,
        chosen: int | None = None,
        status: str = "FINISHED",
    ) -> None:
        """Tag the members, log front.json, front.html and the note, end the parent run, and wait.

        ``note``: from the links to the members' runs, by trial, to Markdown. ``folder``: the
        run's, from which the members' files are logged. ``chosen``: the trial to register as a
        model version with the alias ``chosen``. ``status``: of the parent run, FINISHED or
        KILLED.
        """
        self._queue.put(lambda: self._finish(front, html, note, folder, chosen, status))
        self._drain()

    def choose(self, front: Mapping[str, Any], folder: Path, trial: int) -> None:
        """Register another member of a finished search as the chosen one, and wait."""
        self._begin(lambda: self._choose(front, folder, trial))
        self._drain()

    def fail(self, status: str = "KILLED") -> None:
        """End the parent run without a front, as KILLED (interrupted) or FAILED, and wait."""
        self._queue.put(lambda: self._client.set_terminated(self._parent, status.upper()))
        self._drain()

    def _begin(self, job: Callable[[], None]) -> None:
        try:
            _quiet_mlflow()  # imported here: imports in two threads can deadlock
        except Exception as error:
            self._give_up(error)
            return
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._queue.put(job)

    # -- the thread ------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if not self._broken:
                try:
                    job()
                except Exception as error:
                    self._give_up(error)

    def _drain(self) -> None:
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(_DRAIN_SECONDS)
        if self._thread.is_alive():
            self._give_up(TimeoutError(f"no answer within {_DRAIN_SECONDS:.0f} s"))
        self._thread = None

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"warning: MLflow tracking is off for this run: {line[:200]}", file=sys.stderr)

    def _start(self, study: Mapping[str, Any], resume: bool) -> None:
        self._client = client = _client(self._uri)
        name = str(study["name"])
        self._experiment = self._open_experiment(str(study["task"]))
        user = _user()
        if resume:
            self._parent = self._latest(name, f" and tags.`mlflow.user` = {_quoted(user)}")
            if self._parent:
                client.update_run(self._parent, status="RUNNING")
                for cut_off in self._read_children():
                    client.delete_run(cut_off)
        if not self._parent:
            tags = {_RUN: name, "mlflow.user": user, "mlflow.source.name": "autoquant search"}
            run = client.create_run(self._experiment, tags=tags, run_name=name)
            self._parent = run.info.run_id
            self._log(self._parent, {}, _parameters(study), {_VIEW: self._parent})
        state = view_state(self._parent, [str(o) for o in study["objectives"]])
        # As a saved view it has a name in the list of views; older versions read the state itself.
        view = {
            **state,
            "name": name,
            "createdAt": _now(),
            "updatedAt": _now(),
            "state": json.dumps(state),
        }
        key = f"mlflow.sharedViewState.{self._parent}"
        client.set_experiment_tag(self._experiment, key, json.dumps(view))

    def _open_experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # Without this kind the pages open in the layout for language-model applications.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            location = None if self._artifacts is None else str(self._artifacts)
            return str(self._client.create_experiment(name, location, tags))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _latest(self, name: str, more: str = "") -> str:
        """The latest parent run of a name; "" where there is none."""
        runs = self._client.search_runs(
            [self._experiment],
            f"tags.`{_RUN}` = {_quoted(name)}{more}",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return str(runs[0].info.run_id) if runs else ""

    def _read_children(self) -> list[str]:
        """Learn of the parent's trials; returns the runs that are still being written."""
        unfinished = []
        for run in _search_all(self._client, self._experiment, self._parent):
            if run.info.status == "RUNNING":
                unfinished.append(run.info.run_id)
            elif run.data.tags.get(_TRIAL, "").isdigit():
                number = int(run.data.tags[_TRIAL])
                self._children[number] = run.info.run_id
                if run.data.tags.get(_PARETO) == "true":
                    self._pareto.add(number)
        return unfinished

    def _trial(self, result: Mapping[str, Any], end: int) -> None:
        number, status = int(result["trial"]), str(result["status"])
        if number in self._children:
            return
        tags = {
            "mlflow.parentRunId": self._parent,
            "mlflow.user": _user(),
            "mlflow.source.name": "autoquant search",
            _TRIAL: str(number),
            "key": str(result["key"]),
            "status": status,
            "feasible": str(status == "complete").lower(),
            **_OFF_FRONT,
        }
        if result.get("error"):
            tags["error"] = str(result["error"])[:5000]
        score = result.get("score") or {}
        metrics = {
            **{k: score.get(k) for k in ("accuracy", "standard_error")},
            **{k: score.get(k) for k in ("drop", "drop_standard_error")},
            **(result.get("predicted") or {}),
            **{f"measured_{_bare(k)}": v for k, v in (result.get("measured") or {}).items()},
            "seconds": result.get("seconds"),
        }
        begin = end - round(1000 * float(result.get("seconds") or 0))
        run = self._client.create_run(
            self._experiment, start_time=begin, tags=tags, run_name=f"trial {number}"
        )
        child = run.info.run_id
        self._log(child, metrics, _choices(result["candidate"]), {})
        self._client.set_terminated(child, _RUN_STATUS.get(status, "FINISHED"), end)
        self._children[number] = child

    def _finish(
        self,
        front: Mapping[str, Any],
        html: str,
        note: Callable[[Mapping[int, str]], str],
        folder: Path | None,
        chosen: int | None,
        status: str,
    ) -> None:
        client, members = self._client, {int(m["trial"]): m for m in front["members"]}
        for number in self._pareto - set(members):
            self._log(self._children[number], {}, {}, _OFF_FRONT)
        for number, member in members.items():
            if number not in self._children:
                continue
            verified = member.get("verified") or {}
            metrics = {
                (f"measured_{_bare(k)}" if "latency" in k else f"test_{k}"): v
                for k, v in verified.items()
                if k != "samples"
            }
            self._log(self._children[number], metrics, {}, _ON_FRONT)
            if folder is not None:
                self._log_files(number, member, folder)
        metrics = {
            "hypervolume": front.get("hypervolume"),
            "members": len(members),
            "trials": front.get("trials"),
            "seconds": front.get("seconds"),
            **{f"float_{name}": value for name, value in front["baseline"].items()},
            **{
                f"int8_{'test_' if name == 'accuracy' else ''}{name}": value
                for name, value in front["baseline"].get("uniform_int8", {}).items()
                if name in ("accuracy", "size_bytes") or name.startswith("latency")
            },
        }
        runs = f"#/experiments/{self._experiment}/runs"
        text = note({n: f"{runs}/{self._children[n]}" for n in members if n in self._children})
        if len(text) > _NOTE_LENGTH:
            text = text[: _NOTE_LENGTH - 4].rpartition("\n")[0] + "\n\n…"
        self._log(self._parent, metrics, {}, {"mlflow.note.content": text})
        client.log_text(self._parent, json.dumps(front, indent=1), "front.json")
        client.log_text(self._parent, html, "front.html")
        if folder is not None and chosen in members:
            self._register(front, members[chosen], folder)
        client.set_terminated(self._parent, status)

    def _log_files(self, number: int, member: Mapping[str, Any], folder: Path) -> None:
        """A member's file and candidate, as artifacts of its run."""
        child, candidate = self._children[number], json.dumps(member["candidate"], indent=1)
        if not self._client.list_artifacts(child):
            self._client.log_text(child, candidate, "candidate.json")
            self._client.log_artifact(child, str(folder / member["artifact"]))

    def _choose(self, front: Mapping[str, Any], folder: Path, trial: int) -> None:
        self._client = _client(self._uri)
        found = self._client.get_experiment_by_name(str(front["task"]))
        if found is None:  # searched without tracking, or tracked elsewhere
            return
        self._experiment = str(found.experiment_id)
        self._parent = self._latest(str(front["run"]))
        if not self._parent:
            return
        self._read_children()  # a search that resumes may be writing there: nothing is deleted
        member = next(m for m in front["members"] if int(m["trial"]) == trial)
        if trial in self._children:
            self._register(front, member, folder)

    def _register(self, front: Mapping[str, Any], member: Mapping[str, Any], folder: Path) -> None:
        """One version of the task's registered model for each member that was ever chosen."""
        from importlib.metadata import version

        import onnx
        from mlflow.exceptions import MlflowException

        client, child = self._client, self._children[int(member["trial"])]
        name = re.sub(r"[/:]", ".", str(front["task"])) or "model"
        with contextlib.suppress(MlflowException):  # it is there already
            client.create_registered_model(name)
        versions = [*client.search_model_versions(f"name = {_quoted(name)} and run_id = '{child}'")]
        if not versions:
            with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about type hints within MLflow
                import mlflow.onnx

                path = Path(temporary) / "model"
                mlflow.onnx.save_model(
                    _checked(onnx.load(folder / member["artifact"])),
                    str(path),
                    onnx_execution_providers=["CPUExecutionProvider"],
                    onnx_session_options={"extra_session_config": session_config()},
                    pip_requirements=[f"{p}=={version(p)}" for p in ("onnx", "onnxruntime")],
                    metadata={"key": str(member["key"])},
                )
                client.log_artifacts(child, str(path), "model")
            source = f"{client.get_run(child).info.artifact_uri}/model"
            tags = {_RUN: str(front["run"]), _TRIAL: str(member["trial"])}
            versions = [client.create_model_version(name, source, run_id=child, tags=tags)]
        client.set_registered_model_alias(name, "chosen", versions[0].version)

    def _log(
        self,
        run: str,
        metrics: Mapping[str, Any],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        """One call where the limit on parameters allows it; what is not a number is left out."""
        from mlflow.entities import Metric, Param, RunTag

        now = _now()
        numbers = [
            Metric(name, float(value), now, 0)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        entries = [Param(name, value) for name, value in params.items()]
        labels = [RunTag(name, value) for name, value in tags.items()]
        for begin in range(0, max(len(entries), 1), _PARAMS_A_BATCH):
            batch = entries[begin : begin + _PARAMS_A_BATCH]
            self._client.log_batch(run, numbers, batch, labels, synchronous=True)
            numbers, labels = [], []


def _checked(model: Any) -> Any:
    """The model with shapes of its outputs, which MLflow's loader asks for."""
    import onnx

    if all(output.type.tensor_type.HasField("shape") for output in model.graph.output):
        return model
    return onnx.shape_inference.infer_shapes(model)


def view_state(parent: str, objectives: Sequence[str]) -> dict[str, Any]:
    """The state of MLflow's experiment page that shows the trials of one search.

    Accuracy over every cost of ``objectives``, and parallel coordinates of all of them; the
    charts that MLflow makes by itself are folded away.
    """
    costs = [name for name in objectives if name != "accuracy"] or ["size_bytes"]
    columns = list(dict.fromkeys([*costs, "average_weight_bits", "accuracy"]))
    charts: list[dict[str, Any]] = [
        {
            "uuid": f"scatter-{cost}",
            "type": "SCATTER",
            "metricSectionId": "front",
            "xaxis": {"key": cost, "type": "METRIC"},
            "yaxis": {"key": "accuracy", "type": "METRIC"},
        }
        for cost in costs
    ]
    charts.append(
        {
            "uuid": "parallel",
            "type": "PARALLEL",
            "metricSectionId": "objectives",
            "selectedParams": [],
            "selectedMetrics": columns,
            "showAllRuns": True,
        }
    )
    shared = {"deleted": False, "isGenerated": False, "runsCountToCompare": 1000}
    section = {"isReordered": False, "deleted": False, "isGenerated": False}
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "orderByKey": f"tags.`{_PARETO}`",  # a page has 100 runs: the front is among them
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*(f"metrics.`{c}`" for c in reversed(columns)), f"tags.`{_PARETO}`"],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [{**shared, **chart} for chart in charts],
        "compareRunSections": [
            {**section, "uuid": "front", "name": "Front", "display": True, "columns": 2},
            {**section, "uuid": "objectives", "name": "Objectives", "display": True, "columns": 1},
            {**section, "uuid": "model", "name": "Model metrics", "display": False},
            {**section, "uuid": "system", "name": "System metrics", "display": False},
        ],
        "isAccordionReordered": True,
        "viewMaximized": False,
        "runListHidden": False,
    }


def view_url(base_url: str, experiment_id: str, key: str) -> str:
    """Where an MLflow server shows the view that was saved under ``key``."""
    return (
        f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs?viewStateShareKey={key}"
        "&compareRunsMode=CHART&workflowType=machine_learning"
    )


# -- autoquant ui --------------------------------------------------------------------------


def serve(
    runs_dir: Path, host: str = "127.0.0.1", port: int = 5000, open_browser: bool = True
) -> int:
    """Run MLflow's server on the store of ``runs_dir`` until Ctrl-C; prints the URL to open.

    Takes a free port where ``port`` is in use. Returns 0 after Ctrl-C. Raises RunError if there
    is no store or the server does not start or ends by itself.
    """
    store = runs_dir / "mlflow.db"
    if not store.is_file():
        raise RunError(
            f"{store}: no MLflow store; run `autoquant search` first or name its --runs-dir"
        )
    address = f"http://{host}:{_free_port(host, port)}"
    url = _latest_view(_client(_store_uri(runs_dir)), address)
    try:
        with _server(runs_dir, address) as process:
            print(url, flush=True)
            print("Ctrl-C ends the server.", file=sys.stderr)
            if open_browser:
                webbrowser.open(url)
            status = process.wait()
    except KeyboardInterrupt:
        return 0
    raise RunError(f"the MLflow server at {address} ended by itself with status {status}")


@contextlib.contextmanager
def _server(runs_dir: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers at ``address``; it and its workers end with the block."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", port]
    command += ["--backend-store-uri", _store_uri(runs_dir), "--workers", "1"]
    command += ["--artifacts-destination", _artifacts(runs_dir).as_uri()]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with tempfile.TemporaryFile() as log, _terminated_as_interrupt():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the group
        )
        try:
            if not _answers(f"{address}/health", process):
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                raise RunError(
                    f"the MLflow server did not start at {address}: "
                    f"{lines[-1] if lines else 'it said nothing'}"
                )
            yield process
        finally:
            _end(process)


def _answers(url: str, process: subprocess.Popen[bytes], seconds: float = 120.0) -> bool:
    """Wait for a server; False if it ended or took too long."""
    deadline = time.monotonic() + seconds
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(url, timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers: politely, then for certain."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, number)
            else:
                process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM is KeyboardInterrupt, so that what was opened is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port(host: str, port: int) -> int:
    for wanted in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, wanted))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RunError(f"no port is free on {host}")


def _latest_view(client: MlflowClient, address: str) -> str:
    """The view of the search that started last; the list of experiments if there is none."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(
        experiments,
        f"tags.`{_VIEW}` LIKE '%'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not runs:
        return f"{address}/#/experiments"
    return view_url(address, runs[0].info.experiment_id, runs[0].data.tags[_VIEW])


# -- small parts ---------------------------------------------------------------------------


def _client(uri: str) -> MlflowClient:
    """A client; the first one of a store makes its tables, which takes a second."""
    _quiet_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _quiet_mlflow() -> None:
    """Import MLflow: nothing on stdout, no telemetry, and it gives up soon on a dead server."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
    ):
        os.environ.setdefault(name, value)
    import mlflow.tracking  # noqa: F401

    # It announces the making of tables, and prints a traceback where `_give_up` says it all.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _search_all(client: MlflowClient, experiment: str, parent: str) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment], f"tags.`mlflow.parentRunId` = '{parent}'", page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _store_uri(runs_dir: Path) -> str:
    return f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def _artifacts(runs_dir: Path) -> Path:
    return runs_dir.resolve() / "mlartifacts"


def _choices(candidate: Mapping[str, Any]) -> dict[str, str]:
    """A candidate as parameters: ``4/8`` under the name of each layer, then what else is set."""
    read = Candidate.from_dict(candidate)
    params = {name: str(choice) for name, choice in read.layers.items()}
    params |= {f"pruning of {group}": f"{ratio:g}" for group, ratio in read.pruning.items()}
    params |= {f"rank of {name}": str(rank) for name, rank in read.rank.items()}
    if read.training is not None:
        params |= {f"training {name}": str(value) for name, value in read.training.items()}
    params |= {"polish": "true"} if read.polish else {}
    return _named(params)


def _parameters(study: Mapping[str, Any]) -> dict[str, str]:
    """The study as parameters of the parent run; what is nested is written as JSON."""
    return _named(
        {
            str(name): value if isinstance(value, str) else json.dumps(value, default=str)
            for name, value in study.items()
            if value is not None
        }
    )


def _named(params: Mapping[str, str]) -> dict[str, str]:
    """The same under names that MLflow takes, all different, with values that it takes."""
    named: dict[str, str] = {}
    for name, value in params.items():
        base = re.sub(r"[^\w. -]", "_", name.replace("/", "."))
        base = base.strip(". ")[: _NAME_LENGTH - 8] or "_"
        key, copy = base, 1
        while key in named:
            copy += 1
            key = f"{base} {copy}"
        named[key] = value[:5000]
    return named


def _bare(name: str) -> str:
    return name.removeprefix("measured_")


def _quoted(text: str) -> str:
    """A string of MLflow's filter language, which has no escapes: the quote that fits."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _now() -> int:
    return round(time.time() * 1000)
