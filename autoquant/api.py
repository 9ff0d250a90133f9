"""What ``import autoquant`` offers; each command of the command line is one of these calls."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoquant import report
from autoquant.candidate import Candidate
from autoquant.compress import structure
from autoquant.compress.lower import lower
from autoquant.cost.table import TableModel, to_profile
from autoquant.errors import HardwareError, ModelError, RunError, TaskError
from autoquant.front import Front, Member
from autoquant.hardware import Hardware, load_hardware
from autoquant.progress import ProgressBar
from autoquant.result import TrialResult
from autoquant.search import SearchSettings
from autoquant.search import search as run_search
from autoquant.search.run import write_text
from autoquant.search.sensitivity import estimate
from autoquant.search.study import Callback, read_trials
from autoquant.search.trial import Scored, prepare, score_candidate
from autoquant.space import Space
from autoquant.task import Task
from autoquant.tasks import load_task
from autoquant.tracking import MlflowTracker


class _Report(Callback):
    """Writes front.html at the end."""

    def __init__(self) -> None:
        self.layers: Sequence[Mapping[str, Any]] = ()
        self.html = ""

    def start(
        self,
        study: Mapping[str, Any],
        layers: Sequence[Mapping[str, Any]],
        done: Sequence[TrialResult],
    ) -> None:
        self.layers = layers

    def finish(self, front: Front) -> None:
        assert front.folder is not None
        trials = [r.to_dict() for r in read_trials(front.folder / "trials.jsonl")]
        path = front.folder / "learned.json"
        learned = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        self.html = report.front_html(front.to_dict(), trials, self.layers, learned)
        write_text(front.folder / "front.html", self.html)


class _Tracking(Callback):
    """Logs to MLflow; the note and the page come from the report."""

    def __init__(self, tracker: MlflowTracker, page: _Report, task: str, resume: bool) -> None:
        self.tracker, self.page, self.task, self.resume = tracker, page, task, resume

    def start(
        self,
        study: Mapping[str, Any],
        layers: Sequence[Mapping[str, Any]],
        done: Sequence[TrialResult],
    ) -> None:
        self.tracker.start({**study, "task": self.task}, resume=self.resume)
        for result in done:
            self.tracker.trial(result.to_dict())

    def trial(self, result: TrialResult) -> None:
        self.tracker.trial(result.to_dict())

    def finish(self, front: Front) -> None:
        document = front.to_dict()
        chosen = front.knee().trial if front.members else None

        def note(links: Mapping[int, str]) -> str:
            return report.front_markdown(document, links, chosen)

        self.tracker.finish(document, self.page.html, note, front.folder, chosen)


@contextlib.contextmanager
def _said(progress: bool) -> Iterator[Callable[[str], None]]:
    """What stages are told to, shown on stderr or not."""
    bar = ProgressBar()
    try:
        yield bar.stage if progress else (lambda _: None)
    finally:
        bar.close()


def search(
    task: Task | str = "mnist",
    *,
    data: str | None = None,
    tracking: bool = True,
    tracking_uri: str | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Front:
    """Search for the Pareto front of a task; the result's folder holds the files.

    ``task``: a Task or what the command line takes, with ``data`` for an ONNX file.
    ``settings``: the fields of `SearchSettings` (space, hardware, objectives, trials, timeout,
    max_size_bytes, max_latency_ms, max_energy_mj, max_peak_memory_bytes, max_stored_bytes,
    max_drop, batch, threads, workers, seed, name, runs_dir, resume, …). Raises UserError,
    NoFeasibleMember.
    """
    try:
        options = SearchSettings(**settings)
    except TypeError as error:
        raise RunError(f"search: {str(error).rpartition('() ')[2]}") from None
    source: dict[str, Any] = {"task": task.name if isinstance(task, Task) else task, "data": data}
    found = task if isinstance(task, Task) else load_task(task, data)
    page = _Report()
    bar = ProgressBar()
    heard: list[Callback] = [bar] if progress else []
    heard.append(page)
    tracker = MlflowTracker(tracking_uri, Path(options.runs_dir)) if tracking else None
    if tracker is not None:
        heard.append(_Tracking(tracker, page, found.name, options.resume))
    heard += callbacks
    try:
        return run_search(found, options, source=source, callbacks=heard)
    except BaseException as error:
        if tracker is not None:
            tracker.fail("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        bar.close()


def export(
    member: Member,
    folder: str | Path,
    *,
    precompiled: bool = False,
    compressed: bool = False,
    tracking_uri: str | None = None,
) -> Path:
    """Write a member's deployment package to a new folder and return it.

    Where its search was tracked (in the store beside its run, or at ``tracking_uri``), the
    member becomes the ``chosen`` version of the registered model. Raises RunError where the run
    is gone or the folder is not empty.
    """
    from autoquant.export import export as write_package

    front = None if member.folder is None else Front.read(member.folder)
    package = write_package(
        member, folder, front=front, precompiled=precompiled, compressed=compressed
    )
    if front is not None and front.folder is not None:
        runs_dir = front.folder.parent
        if tracking_uri or (runs_dir / "mlflow.db").is_file():
            tracker = MlflowTracker(tracking_uri, runs_dir)
            tracker.choose(front.to_dict(), front.folder, member.trial)
    return package


def verify(folder: str | Path, task: Task | str | None = None, data: str | None = None) -> Any:
    """Re-run a package against its manifest, and its accuracy where a task is given.

    Returns the checks; raises PackageError at the first that fails.
    """
    found = load_task(task, data) if isinstance(task, str) else task
    from autoquant.export import verify as verify_package

    return verify_package(folder, found)


def compress(
    task: Task | str,
    candidate: Candidate | str | Path,
    *,
    data: str | None = None,
    hardware: str | Hardware = "onnxruntime-cpu",
    batch: int = 1,
    threads: int = 1,
    split: str = "validation",
    progress: bool = False,
) -> Scored:
    """Build one candidate (or a file that holds it), predict its cost and score it.

    By the path that a search takes. Raises UserError.
    """
    found = task if isinstance(task, Task) else load_task(task, data)
    if not isinstance(candidate, Candidate):
        candidate = Candidate.read(candidate)
    with _said(progress) as say:
        return score_candidate(
            found, candidate, hardware=hardware, batch=batch, threads=threads, split=split, say=say
        )


def inspect(
    task: Task | str,
    data: str | None = None,
    *,
    sensitivity: bool = True,
    space: str | Space = "mixed",
    progress: bool = False,
) -> dict[str, Any]:
    """The layers of a task's network, with shapes, MACs and sensitivity, and what can become of
    its structure: the channel groups, the blocks that can be dropped, the layers' full ranks.

    A layer's ``sensitivity`` maps each choice of ``space`` to the divergence of the network's
    outputs that it alone causes, by the cheapest sound estimator: ``fisher`` for a torch module,
    else ``measured``. The data is calibrated on for it; where that fails, the reason stands
    under ``sensitivity`` and the layers are shown without. Raises UserError.
    """
    found = task if isinstance(task, Task) else load_task(task, data)
    say = ProgressBar().stage if progress else (lambda _: None)
    about: dict[str, Any] | None = None
    try:
        context = prepare(found, space=space, latency=False, say=say) if sensitivity else None
    except (ModelError, TaskError) as error:  # a network that cannot be lowered raises again
        context, about = None, {"unavailable": str(error)}
    graph = context.graph if context is not None else lower(found)
    if about is not None:
        say(f"no sensitivity: {about['unavailable']}")
    layers = [layer.to_dict() for layer in (*graph.layers, *graph.products)]
    if context is not None:
        has_module = not isinstance(found.model, (str, Path))
        estimator = "fisher" if has_module else "measured"
        result = estimate(
            context, found, estimator=estimator, workers=os.cpu_count() or 1, say=say
        ).to_dict()
        values = result.pop("layers")
        layers = [{**x, "sensitivity": values.get(x["name"], {})} for x in layers]
        metric = "kl" if context.evaluator.metric == "top1" else "relative squared error"
        about = {**result, "divergence": metric}
    return {
        "task": found.name,
        "inputs": {name: list(graph.tensors[name].shape) for name in graph.inputs},
        "outputs": {name: list(graph.tensors[name].shape) for name in graph.outputs},
        "macs": graph.macs,
        "parameters": sum(layer.parameters for layer in graph.layers),
        "sensitivity": about,
        "layers": layers,
        **structure.to_dict(graph),
    }


def profile(
    task: Task | str = "mnist",
    path: str | Path = "profile.yaml",
    *,
    data: str | None = None,
    space: str | Space = "int8",
    hardware: str | Hardware = "onnxruntime-cpu",
    batch: int = 1,
    threads: int = 1,
    progress: bool = False,
) -> Hardware:
    """Measure this machine on a task's kernels and write the hardware profile.

    The profile predicts latencies of that network at that batch and thread count, in what
    ``space`` offers: its kernels, channel counts and ranks. ``hardware``: whose runtime; raises
    HardwareError for a device elsewhere.
    """
    device = load_hardware(hardware)
    if device.latency == "analytic":
        raise HardwareError(f"hardware {device.name!r} is elsewhere: nothing to measure here")
    device = device.model_copy(update={"model": None})
    found = task if isinstance(task, Task) else load_task(task, data)
    with _said(progress) as say:
        context = prepare(
            found, space=space, hardware=device, batch=batch, threads=threads, say=say
        )
    assert isinstance(context.cost.latency, TableModel)
    model = to_profile(context.cost.latency)
    result = device.model_copy(
        update={
            "name": Path(path).stem,
            "description": f"{model.cpu}, measured on {found.name}",
            "model": model,
        }
    )
    document = result.model_dump(mode="json", exclude_defaults=True)
    write_text(Path(path), yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    return result


def read_config(path: str | Path) -> dict[str, Any]:
    """A study.yaml as keyword arguments of `search`. Raises RunError naming file and field."""
    from dataclasses import fields

    from autoquant.errors import nearest

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RunError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected fields such as task, space and trials")
    valid = {f.name for f in fields(SearchSettings)} | {"task", "data", "tracking_uri"}
    for name in content:
        if name not in valid:
            raise RunError(f"{path}: unknown field {name!r}; {nearest(str(name), valid)}")
    for name, model in (("space", Space), ("hardware", Hardware)):
        if isinstance(content.get(name), dict):
            try:
                content[name] = model.model_validate(content[name])
            except ValueError as error:
                first = " ".join(str(error).split())[:200]
                raise RunError(f"{path}: {name}: {first}") from None
    return content
