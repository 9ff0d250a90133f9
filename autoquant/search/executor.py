"""Where trials run: in this process, or as Ray tasks. The driver owns the study and retries."""

from __future__ import annotations

import os
import sys
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Protocol

from autoquant.candidate import Candidate
from autoquant.errors import RunError
from autoquant.result import TrialResult
from autoquant.search.trial import Against, Context, run_trial

RETRIES = 2  # of a trial whose worker died


class Executor(Protocol):
    """Runs candidates; keeps at most ``slots`` at a time."""

    slots: int

    def submit(
        self, candidate: Candidate, trial: int, seed: int, against: Against | None = None
    ) -> None:
        """Start (or queue) one trial."""
        ...

    def wait(self) -> TrialResult:
        """Block until a submitted trial is finished, and return it."""
        ...

    def close(self) -> None:
        """End what still runs and free what was started."""
        ...


class InProcess:
    """One trial at a time in this process; parallel over the batches of an evaluation."""

    slots = 1

    def __init__(self, context: Context) -> None:
        self.context = context
        self.queue: deque[tuple[Candidate, int, int, Against | None]] = deque()

    def submit(
        self, candidate: Candidate, trial: int, seed: int, against: Against | None = None
    ) -> None:
        """Queue one trial; it runs in `wait`."""
        self.queue.append((candidate, trial, seed, against))

    def wait(self) -> TrialResult:
        """Run the oldest queued trial."""
        candidate, trial, seed, against = self.queue.popleft()
        return run_trial(self.context, candidate, trial, seed, against=against)

    def close(self) -> None:
        """Forget what is queued."""
        self.queue.clear()


@dataclass(slots=True)
class _Running:
    candidate: Candidate
    trial: int
    seed: int
    against: Against | None
    attempts: int


class RayExecutor:
    """Ray tasks, one core each. The context is put in the object store once, and each worker
    process keeps the one it has unpacked.

    ``address`` None starts Ray on this machine; an address joins that cluster. A trial whose
    worker or node died runs again, up to ``RETRIES`` times; an exception inside a trial is
    its result.
    """

    def __init__(self, context: Context, workers: int, address: str | None = None) -> None:
        import ray

        self.slots = max(1, workers)
        self.started = not ray.is_initialized()
        if self.started:
            try:
                if address is None:
                    ray.init(
                        address="local",
                        num_cpus=self.slots,
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
                reason = " ".join(str(error).split())[:200]
                raise RunError(f"{what}: {reason}") from None
        _ship_task_files()
        alone = replace(context, evaluator=_single_worker(context), inputs=())
        self.context = ray.put(alone)
        self.remote = ray.remote(num_cpus=1, max_retries=0)(_remote_trial)
        self.running: dict[Any, _Running] = {}
        self.lost = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.RayActorError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.OutOfMemoryError,
        )

    def submit(
        self, candidate: Candidate, trial: int, seed: int, against: Against | None = None
    ) -> None:
        """Start one trial as a Ray task."""
        self._start(_Running(candidate, trial, seed, against, 0))

    def _start(self, item: _Running) -> None:
        future = self.remote.remote(
            [self.context], item.candidate, item.trial, item.seed, item.against
        )
        self.running[future] = item

    def wait(self) -> TrialResult:
        """Block until a trial is finished or has lost its worker too often."""
        import ray

        while True:
            done, _ = ray.wait(list(self.running), num_returns=1)
            item = self.running.pop(done[0])
            try:
                result: TrialResult = ray.get(done[0])
                return result
            except self.lost as error:
                item.attempts += 1
                if item.attempts <= RETRIES:
                    self._start(item)
                    continue
                message = f"its worker died {item.attempts} times: {type(error).__name__}"
            except Exception as error:
                message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return TrialResult(
                item.trial,
                item.candidate,
                "failed",
                seconds={},
                seed=item.seed,
                error=message,
                origin=None if item.against is None else item.against.origin,
            )

    def close(self) -> None:
        """Cancel what runs; end Ray where this executor started it."""
        import ray

        for future in self.running:
            ray.cancel(future, force=True)
        self.running.clear()
        if self.started:
            ray.shutdown()


_context: dict[str, Context] = {}


def _remote_trial(
    reference: list[Any],
    candidate: Candidate,
    trial: int,
    seed: int,
    against: Against | None = None,
) -> TrialResult:
    """Runs in a worker: unpack the context once a process."""
    import ray

    key = reference[0].hex()
    if key not in _context:
        _context.clear()
        _context[key] = ray.get(reference[0])
    return run_trial(_context[key], candidate, trial, seed, against=against)


def _single_worker(context: Context) -> Any:
    """The evaluator for one core: Ray runs a trial on each."""
    import copy

    evaluator = copy.copy(context.evaluator)
    evaluator.workers = 1
    return evaluator


def _ship_task_files() -> None:
    """Send functions of task files (a metric) by value: workers cannot import those files."""
    import ray.cloudpickle

    for name, module in list(sys.modules.items()):
        if name.startswith("autoquant_task_"):
            ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]


def make(context: Context, workers: int, ray_address: str | None) -> Executor:
    """The executor for the settings: Ray for several workers or an address."""
    if workers > 1 or ray_address:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        return RayExecutor(context, workers, ray_address)
    return InProcess(context)
