"""Storages by URL, each a real one, and journals that a dead driver left."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from conftest import small_disk
from small_task import SPACE, context
from test_study import Fake, keys, open_study

from autoquant.errors import RunError
from autoquant.search.run import RESERVE
from autoquant.search.storage import JOURNAL, open_storage
from autoquant.search.study import read_trials
from autoquant.search.trial import Context

DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context(tmp_path_factory.mktemp("small"), SPACE)


def postgres(name: str) -> str | None:
    return shutil.which(name) or next((str(d / name) for d in DEBIAN if (d / name).exists()), None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, on a socket in a folder of our own."""
    pytest.importorskip("psycopg", reason="needs psycopg (pip install 'autoquant[postgresql]')")
    initdb, start = postgres("initdb"), postgres("postgres")
    if initdb is None or start is None:
        pytest.skip("needs PostgreSQL's initdb and postgres")
    with tempfile.TemporaryDirectory(prefix="pg") as name:  # a socket's path must be short
        folder, user = Path(name), {}
        if os.getuid() == 0:  # which PostgreSQL refuses
            user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            folder.chmod(0o777)
        data = str(folder / "data")
        try:
            quiet = ["-A", "trust", "-U", "tester", "--no-sync", "--no-instructions"]
            subprocess.run([initdb, "-D", data, *quiet], check=True, capture_output=True, **user)
            process = subprocess.Popen(
                [start, "-D", data, "-k", name, "-c", "listen_addresses="],
                stderr=subprocess.PIPE,
                text=True,
                **user,
            )
        except PermissionError:
            pytest.skip("needs a user that PostgreSQL accepts")
        assert process.stderr is not None
        for line in process.stderr:
            if "ready to accept connections" in line:
                break
        yield f"postgresql+psycopg://tester@/postgres?host={name}"
        process.send_signal(signal.SIGINT)  # does not wait for clients
        process.wait()
        process.stderr.close()


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        found: str = request.getfixturevalue("server")
        return found
    return f"{request.param}:///{str(tmp_path / 'study.db').lstrip('/')}".replace(":///", ":////")


def test_a_driver_that_stops_anywhere_goes_on_from_any_storage(
    small: Context, tmp_path: Path, url: str
) -> None:
    class Stopped(BaseException):
        """As if the process was gone: nothing is told any more."""

    def stop(result: object) -> None:
        raise Stopped

    study = open_study(small, tmp_path, storage=url, trials=5)
    assert study.run(Fake(small), []) == "trials"
    study._leave = lambda running: None  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        study.run(Fake(small, 2, before=stop), [], 12)
    study.close()
    before = read_trials(tmp_path / "trials.jsonl")
    said: list[str] = []
    again = open_study(small, tmp_path, resume=True, storage=url, say=said.append)
    assert said == ["2 trials were running when the run ended: they run again"]
    assert again.run(Fake(small), []) == "trials"
    assert keys(again.results)[:5] == keys(before)
    assert len(set(keys(again.results))) == len(again.results) == 12
    assert not again.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    again.close()


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/none"
    pytest.importorskip("psycopg", reason="needs psycopg")
    with pytest.raises(RunError, match=r"--storage postgresql\+psycopg://me:\*\*\*@") as caught:
        open_storage(url, tmp_path, print)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["tail", "middle", "gone"])
def test_a_damaged_journal_is_repaired_and_no_trial_repeated(
    small: Context, tmp_path: Path, damage: str
) -> None:
    study = open_study(small, tmp_path, trials=8)
    study.run(Fake(small), [])
    path = tmp_path / JOURNAL
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "tail":
        path.write_bytes(content[:-5])
    elif damage == "middle":
        path.write_bytes(content[:half] + b"\0" * 40 + content[half:])
    else:
        path.unlink()
    said: list[str] = []
    again = open_study(small, tmp_path, resume=True, say=said.append)
    assert any("cut off" in s or "is damaged" in s or "storage lost" in s for s in said)
    assert again.run(Fake(small), []) == "trials"
    assert keys(again.results)[:8] == keys(study.results)
    assert len(set(keys(again.results))) == len(again.results) == 12
    told = {t.number: t for t in again.study.trials}
    for result in again.results:
        assert told[result.trial].state.name == "COMPLETE"
        assert told[result.trial].params == again._params(result.candidate)


def test_a_journal_cut_anywhere_loses_no_trial(small: Context, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    study = open_study(small, run, trials=8)
    study.run(Fake(small), [])
    size = (run / JOURNAL).stat().st_size
    for tenth in range(10):
        copy = tmp_path / str(tenth)
        shutil.copytree(run, copy)
        os.truncate(copy / JOURNAL, size * tenth // 10)
        again = open_study(small, copy, resume=True)
        assert again.run(Fake(small), []) == "trials"
        assert keys(again.results)[:8] == keys(study.results)
        assert len(set(keys(again.results))) == len(again.results) == 12
        told = {t.number: t for t in again.study.trials}
        for result in again.results:
            assert told[result.trial].state.name == "COMPLETE", tenth


def test_a_candidate_that_ends_every_driver_is_set_aside(small: Context, tmp_path: Path) -> None:
    first = open_study(small, tmp_path, trials=4)
    first.run(Fake(small), [])
    _, poison = next(first._proposals({}))
    said: list[str] = []
    for _ in range(2):
        study = open_study(small, tmp_path, resume=True, trials=6, say=said.append)
        again = study.study.ask()
        assert study._candidate(again) == poison  # and the driver dies
    study = open_study(small, tmp_path, resume=True, trials=6, say=said.append)
    (failed,) = [r for r in study.results if r.status == "failed"]
    assert failed.candidate == poison and failed.error == ("set aside: 3 drivers died while it ran")
    assert study.run(Fake(small), []) == "trials" and len(set(keys(study.results))) == 6


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB."""
    with small_disk(tmp_path / "disk", "400k") as folder:
        yield folder


@pytest.mark.parametrize("reserved", [True, False])
def test_a_full_disk_keeps_every_finished_trial(small: Context, disk: Path, reserved: bool) -> None:
    study = open_study(small, disk, trials=60)
    if reserved:
        (disk / RESERVE).write_bytes(bytes(100 << 10))

    def fill(result: object) -> None:
        if len(study.results) == 9:
            with (disk / "filler").open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 12)):
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    if reserved:
        assert study.run(Fake(small, 2, before=fill), []) == "full"
        assert study.full is not None and "No space left" in study.full
        assert not (disk / RESERVE).exists()
    else:
        with pytest.raises(RunError, match="No space left on device"):
            study.run(Fake(small, 2, before=fill), [])
    kept = read_trials(disk / "trials.jsonl", repair=False)
    assert len(kept) >= 9 and {r.trial for r in study.leading} <= {r.trial for r in kept}
    (disk / "filler").unlink()
    again = open_study(small, disk, resume=True, trials=14)
    assert keys(again.results) == keys(kept)
    assert again.run(Fake(small), []) == "trials"
    assert len(set(keys(again.results))) == len(again.results) == 14
