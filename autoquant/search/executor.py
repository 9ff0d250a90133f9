"""Where trials run: in this process, or as Ray tasks. The driver owns the study and retries."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from autoquant.cache import write_atomically
from autoquant.candidate import Candidate
from autoquant.compress.prune import first_rows
from autoquant.errors import RunError
from autoquant.result import TrialResult
from autoquant.search.trial import Against, Context, run_trial
from autoquant.search.variant import CALIBRATED

RETRIES = 5  # of a trial whose node was lost
AHEAD = 1  # trials that wait for a worker, so that no worker waits for the driver
KILLS = 2  # workers that may die with one candidate before it is set aside
GRACE = 2.0  # seconds beyond its bound after which a trial that lets nobody stop it is killed
# workers share a machine by processes: none of their libraries starts threads
_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

_TASK = "autoquant_task_"  # what `autoquant.task` calls the module of a task file

Alone = Callable[..., Any]  # calls a function with its arguments beside nothing else


class Executor(Protocol):
    """Runs candidates; takes at most ``slots`` at a time, those that run and those that wait.
    ``retries``: trials that were started again so far."""

    slots: int
    retries: int

    @property
    def workers(self) -> int:
        """How many trials can run at a time now."""
        ...

    def submit(
        self,
        candidate: Candidate,
        trial: int,
        seed: int,
        against: Against | None = None,
        save: Path | None = None,
    ) -> None:
        """Start (or queue) one trial; ``save``: where the driver keeps its file."""
        ...

    def wait(self) -> TrialResult:
        """Block until a submitted trial is finished, and return it."""
        ...

    def close(self) -> None:
        """End what still runs and free what was started."""
        ...


class InProcess:
    """One trial at a time in this process; parallel over the batches of an evaluation."""

    slots = workers = 1
    retries = 0

    def __init__(self, context: Context) -> None:
        self.context = context
        self.queue: deque[tuple[Candidate, int, int, Against | None, Path | None]] = deque()

    def submit(
        self,
        candidate: Candidate,
        trial: int,
        seed: int,
        against: Against | None = None,
        save: Path | None = None,
    ) -> None:
        """Queue one trial; it runs in `wait`."""
        self.queue.append((candidate, trial, seed, against, save))

    def wait(self) -> TrialResult:
        """Run the oldest queued trial."""
        candidate, trial, seed, against, save = self.queue.popleft()
        return run_trial(self.context, candidate, trial, seed, save, against)

    def close(self) -> None:
        """Forget what is queued."""
        self.queue.clear()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one trial may take: ``seconds`` of wall time, ``memory_bytes`` resident in its
    worker, context and all. None is no bound."""

    seconds: float | None = None
    memory_bytes: int | None = None

    def __bool__(self) -> bool:
        return self.seconds is not None or self.memory_bytes is not None


@dataclass(slots=True)
class _Running:
    candidate: Candidate
    trial: int
    seed: int
    against: Against | None
    save: Path | None = None
    kills: int = 0  # workers that died with it
    losses: int = 0  # nodes and objects that were lost with it


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Alone]:
    """The cluster at an address, if there is one; yields how a measurement runs beside nothing.

    On this machine the driver measures, before and after the trials. On a cluster it is a task
    on the one node with the resource ``latency`` that takes all of its cores, and so waits
    for the trials there; without such a node the driver measures too. Raises RunError.
    """
    if not address:
        yield here
        return
    started = _connect(1, address)
    try:
        yield _on_the_latency_node if _latency_node() else here
    finally:
        if started:
            import ray

            ray.shutdown()


def here(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """An `Alone` in this process."""
    return function(*args, **options)


def _resources() -> dict[str, float]:
    import ray

    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def _latency_node() -> dict[str, float] | None:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    found = [n["Resources"] for n in nodes if n["Alive"] and n["Resources"].get("latency")]
    return found[0] if found else None


def _on_the_latency_node(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    import ray

    node = _latency_node()
    if node is None:
        raise RunError("--ray-address: the node with the resource 'latency' is gone")
    _ship_task_files()
    remote = ray.remote(num_cpus=node.get("CPU", 0), resources={"latency": 1})(function)
    return ray.get(remote.remote(*args, **options))


def _connect(workers: int, address: str | None) -> bool:
    """Start or join Ray; whether it was not there before. Raises RunError."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return False
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        else:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        what = (
            f"--workers {workers}: Ray cannot start"
            if address is None
            else f"--ray-address {address}: cannot connect"
        )
        raise RunError(f"{what}: {' '.join(str(error).split())[:200]}") from None
    return True


class RayExecutor:
    """Ray tasks, one core each. The context is put in the object store once, and each worker
    process keeps the one it has unpacked.

    ``address`` None starts Ray on this machine; an address joins that cluster, and one worker
    then means one for each of its cores. A trial whose worker died runs once more, one whose
    node was lost up to ``RETRIES`` times; a candidate that two workers died with is set aside. An
    exception inside a trial, and a trial that passes its ``bounds``, are results.
    """

    def __init__(
        self,
        context: Context,
        workers: int,
        address: str | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self.started = _connect(workers, address)
        import ray

        resources = _resources()
        self.most = workers
        if address is not None and workers == 1:
            self.most = max(1, int(resources.get("CPU", 1)))
        self.slots = self.most + AHEAD
        if context.gpus > resources.get("GPU", 0):
            self.close_ray()
            raise RunError(
                f"the task asks for {context.gpus:g} GPUs a trial; "
                f"Ray has {resources.get('GPU', 0):g}"
            )
        _ship_task_files()
        # Structures are calibrated where they are made; nothing else there reads the inputs.
        inputs = first_rows(context.inputs, CALIBRATED) if context.options else ()
        alone = replace(context, evaluator=_single_worker(context), inputs=tuple(inputs))
        self.context = ray.put(alone)
        self.bounds = bounds or Bounds()
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": 0}
        options["runtime_env"] = {"env_vars": _ENVIRONMENT}
        if context.gpus:
            options["num_gpus"] = context.gpus
        self.remote = ray.remote(**options)(_remote_trial)
        self.running: dict[Any, _Running] = {}
        self.retries = 0
        found = ray.exceptions
        self.killed = (found.WorkerCrashedError, found.OutOfMemoryError)
        self.lost = (
            *(found.NodeDiedError, found.ObjectLostError, found.RayActorError),
            *(found.ActorUnavailableError, found.TaskUnschedulableError),
        )

    @property
    def workers(self) -> int:
        """How many trials can run at a time now: fewer after a node is lost."""
        return min(self.most, int(_resources().get("CPU", 0)))

    def submit(
        self,
        candidate: Candidate,
        trial: int,
        seed: int,
        against: Against | None = None,
        save: Path | None = None,
    ) -> None:
        """Start one trial as a Ray task."""
        self._start(_Running(candidate, trial, seed, against, save))

    def _start(self, item: _Running) -> None:
        remote = self.remote
        if item.kills:  # in a new process: Ray may not know yet that the old one is dead
            again = {**_ENVIRONMENT, "AUTOQUANT_KILLED": str(item.kills)}
            remote = remote.options(runtime_env={"env_vars": again})
        what = item.candidate, item.trial, item.seed, item.against, item.save is not None
        future = remote.remote([self.context], *what, self.bounds)
        self.running[future] = item

    def wait(self) -> TrialResult:
        """Block until a trial is finished or has lost its worker too often."""
        import ray

        while True:
            done, _ = ray.wait(list(self.running), num_returns=1)
            item = self.running.pop(done[0])
            try:
                found: tuple[TrialResult, bytes | None] | None = ray.get(done[0])
                if found is not None:
                    return _kept(*found, item.save)
                self._start(item)  # it came to a process that was about to end
                continue
            except self.killed as error:
                item.kills += 1
                name = type(error).__name__
                message = f"set aside: {item.kills} workers died while they ran it ({name})"
                again = item.kills < KILLS
            except self.lost as error:
                item.losses += 1
                message = f"lost {item.losses} times with its node: {type(error).__name__}"
                again = item.losses <= RETRIES
            except Exception as error:
                message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                again = False
            if again:
                self.retries += 1
                self._start(item)
                continue
            return _failed(item.candidate, item.trial, item.seed, item.against, message)

    def close(self) -> None:
        """Cancel what runs; end Ray where this executor started it."""
        import ray

        for future in self.running:
            ray.cancel(future, force=True)
        self.running.clear()
        self.close_ray()

    def close_ray(self) -> None:
        """End Ray where this executor started it."""
        import ray

        if self.started:
            ray.shutdown()


def _kept(result: TrialResult, model: bytes | None, path: Path | None) -> TrialResult:
    """The result, after its file is written; failed where that cannot be."""
    if model is None or path is None:
        return result
    try:
        write_atomically(path, lambda file: file.write(model))
    except OSError as error:
        return replace(result, status="failed", error=f"OSError: {error}")
    return result


def _failed(
    candidate: Candidate, trial: int, seed: int, against: Against | None, message: str
) -> TrialResult:
    origin = None if against is None else against.origin
    return TrialResult(
        trial, candidate, "failed", seconds={}, seed=seed, error=message, origin=origin
    )


_context: dict[str, Context] = {}
_ending = threading.Event()  # a trial has passed its bounds, and its thread cannot be stopped


def _remote_trial(
    reference: list[Any],
    candidate: Candidate,
    trial: int,
    seed: int,
    against: Against | None,
    keep: bool,
    bounds: Bounds,
) -> tuple[TrialResult, bytes | None] | None:
    """Runs in a worker: unpack the context once a process. The result, and the file where the
    driver is to ``keep`` it. None: the process is ending."""
    import ray

    if _ending.is_set():
        time.sleep(0.05)
        return None
    key = reference[0].hex()
    if key not in _context:
        _context.clear()
        _context[key] = ray.get(reference[0])
    found = _context[key]
    results: list[tuple[TrialResult, bytes | None]] = []

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx" if keep else None
            result = run_trial(found, candidate, trial, seed, path, against)
            written = path is not None and path.is_file()
            results.append((result, path.read_bytes() if path and written else None))

    if not bounds:
        run()
        return results[0]
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if bounds.seconds is not None:  # code that holds the interpreter's lock stops this thread too
        last = bounds.seconds + GRACE
        faulthandler.dump_traceback_later(last, exit=True, file=2)
    passed = _passed(thread, bounds)
    faulthandler.cancel_dump_traceback_later()
    if passed is None:
        return results[0]
    _ending.set()
    threading.Timer(0.5, os._exit, (1,)).start()  # after this result is on its way
    return _failed(candidate, trial, seed, against, passed), None


def _passed(thread: threading.Thread, bounds: Bounds) -> str | None:
    """Wait for a trial's thread; which of its bounds it passes, None if it ends within them."""
    end = None if bounds.seconds is None else time.monotonic() + bounds.seconds
    while thread.is_alive():
        thread.join(0.02)
        if end is not None and time.monotonic() > end and thread.is_alive():
            return f"ended: it took more than its {bounds.seconds:g} s"
        if bounds.memory_bytes is not None and resident_bytes() > bounds.memory_bytes:
            return f"ended: its worker held more than {bounds.memory_bytes / 1e6:,.0f} MB"
    return None


def resident_bytes() -> int:
    """Memory of this process that is resident now. Raises OSError where there is no /proc."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _single_worker(context: Context) -> Any:
    """The evaluator for one core: Ray runs a trial on each."""
    import copy

    evaluator = copy.copy(context.evaluator)
    evaluator.workers = 1
    return evaluator


def _ship_task_files() -> None:
    """Send what a task file and its neighbours define (a metric, a data set) by value: workers
    cannot import them."""
    import ray.cloudpickle

    modules = sys.modules.copy()  # at once: another thread may be importing
    files = {name: getattr(module, "__file__", None) for name, module in modules.items()}
    folders = {os.path.dirname(f) for n, f in files.items() if f and n.startswith(_TASK)}  # noqa: PTH120
    for name, file in files.items():
        if file and os.path.dirname(file) in folders and name != "__main__":  # noqa: PTH120
            ray.cloudpickle.register_pickle_by_value(modules[name])  # type: ignore[no-untyped-call]


def make(
    context: Context, workers: int, ray_address: str | None, bounds: Bounds | None = None
) -> Executor:
    """The executor for the settings: Ray for several workers, an address, or bounds, which
    need a process that can be ended."""
    if workers > 1 or ray_address or bounds:
        return RayExecutor(context, workers, ray_address, bounds)
    return InProcess(context)
