"""The command line: parse, call one public function, print.

Data goes to stdout, everything else to stderr. Imports of what is slow stay inside commands.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.errors import AutoquantError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

_HELP = """Automated mixed-precision compression: a Pareto front of ONNX files that were really run.

\b
First:
  autoquant search                        the built-in mnist task, about half a minute
  autoquant inspect my_task.py:task       the layers of your own network
  autoquant search my_task.py:task        its front; then: autoquant export RUN -o DIR
"""

app = typer.Typer(
    name="autoquant",
    help=_HELP,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _complete_runs(context: typer.Context, incomplete: str) -> list[str]:
    base = Path(context.params.get("runs_dir") or RUNS)
    names = [path.parent.name for path in base.glob("*/study.yaml")]
    return sorted(name for name in names if name.startswith(incomplete))


def _complete_builtin(folder: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        from autoquant.document import builtin

        return [name for name in builtin(folder) if name.startswith(incomplete)]

    return complete


def _complete_tasks(incomplete: str) -> list[str]:
    from autoquant.tasks import TASKS

    return [name for name in TASKS if name.startswith(incomplete)]


def _complete_samplers(incomplete: str) -> list[str]:
    return [name for name in _SAMPLERS if name.startswith(incomplete)]


RUNS = Path("runs")
_INTERRUPTED = 130
_SAMPLERS = ("surrogate", "tpe", "nsga2", "random")
TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="built-in name, file.py:function, package.module:function, or model.onnx with --data",
        autocompletion=_complete_tasks,
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE.PY:FUNCTION", help="data for an .onnx file"),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", metavar="DIR", help="where runs live")]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="name under --runs-dir, or folder", autocompletion=_complete_runs
    ),
]
HardwareOption = Annotated[
    str,
    typer.Option(
        "--hardware",
        metavar="NAME|FILE",
        help="hardware profile",
        autocompletion=_complete_builtin("hardware_profiles"),
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, metavar="N", help="batch of latencies")]
Threads = Annotated[int, typer.Option("--threads", min=1, metavar="N", help="threads of latencies")]


@app.command()
def search(
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="[TASK]",
            help="as for compress; default mnist",
            autocompletion=_complete_tasks,
        ),
    ] = None,
    data: Data = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="search space; default mixed",
            autocompletion=_complete_builtin("search_spaces"),
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="profile; default onnxruntime-cpu",
            autocompletion=_complete_builtin("hardware_profiles"),
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="default accuracy,latency_ms,size_bytes"),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="in total, with --resume too; default 60")
    ] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="for trials")] = None,
    max_size_bytes: Annotated[int | None, typer.Option(metavar="N")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(metavar="X")] = None,
    max_energy_mj: Annotated[float | None, typer.Option(metavar="X")] = None,
    max_peak_memory_bytes: Annotated[
        int | None, typer.Option(metavar="N", help="of activations")
    ] = None,
    max_stored_bytes: Annotated[
        int | None, typer.Option(metavar="N", help="entropy-coded, as export --compressed")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="X", help="in the metric's units, on validation")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="of latencies; default 1")] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="of latencies; default 1")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="trials at a time, as Ray tasks; default 1")
    ] = None,
    evaluation_threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="batches a trial evaluates at once; default all cores"),
    ] = None,
    ray_address: Annotated[str | None, typer.Option(metavar="ADDR", help="Ray cluster")] = None,
    trial_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="end a trial that takes longer")
    ] = None,
    trial_memory: Annotated[
        int | None, typer.Option(metavar="BYTES", help="end a trial whose worker holds more")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="journal://, sqlite:// or postgresql://; default a journal file"
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="surrogate (default), tpe, nsga2, random, or another of Optuna's",
            autocompletion=_complete_samplers,
        ),
    ] = None,
    signal: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="what the sampler follows: divergence from the float outputs (default) or metric",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(metavar="N", help="end after N trials without a change of the front"),
    ] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=W/A",
            help="keep layers at one choice, as 'head*=8/8' or 'stem=float'; repeatable",
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            metavar="RUN[:TRIAL]",
            help="run the front, or one trial, of an old run first; the space may be another",
            autocompletion=_complete_runs,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="default 0")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="of the run")] = None,
    runs_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="default runs")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow; default DIR/mlflow.db")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run of --name")] = False,
    polish: Annotated[
        bool | None,
        typer.Option("--polish/--no-polish", help="refit low-bit members at the end; default on"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a study.yaml to repeat; options win")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search for the Pareto front of a task (default: the built-in mnist)."""
    given = {
        "task": task,
        "data": data,
        "space": space,
        "hardware": hardware,
        "objectives": [o.strip() for o in objectives.split(",")] if objectives else None,
        "trials": trials,
        "timeout": timeout,
        "max_size_bytes": max_size_bytes,
        "max_latency_ms": max_latency_ms,
        "max_energy_mj": max_energy_mj,
        "max_peak_memory_bytes": max_peak_memory_bytes,
        "max_stored_bytes": max_stored_bytes,
        "max_drop": max_drop,
        "batch": batch,
        "threads": threads,
        "workers": workers,
        "evaluation_threads": evaluation_threads,
        "ray_address": ray_address,
        "trial_timeout": trial_timeout,
        "trial_memory": trial_memory,
        "storage": storage,
        "sampler": sampler,
        "signal": signal,
        "patience": patience,
        "fix": fix or None,
        "start_from": start_from,
        "seed": seed,
        "name": name,
        "runs_dir": runs_dir,
        "tracking_uri": tracking_uri,
        "resume": resume or None,
        "polish": polish,
    }
    given = {key: value for key, value in given.items() if value is not None}
    _check_names(given, config)
    from autoquant import api

    settings = {**(api.read_config(config) if config else {}), **given}
    if config and "name" not in given:
        settings.pop("name", None)  # a repeated search is a new run
    found = api.search(settings.pop("task", "mnist"), **settings)
    if as_json:
        _print_json(found.to_dict())
        return
    from autoquant.report import front_table

    _print_table(front_table(found.to_dict()))
    knee = found.knee()
    option = (
        "" if found.folder is None or found.folder.parent == RUNS else _runs_option(found.folder)
    )
    _say(f"run: {found.folder} (front.html shows the front; trials.jsonl every trial)")
    _say(f"look: autoquant ui{option}")
    _say(f"ship: autoquant export {found.run}{option} --trial {knee.trial} -o {found.task}-package")


def _check_names(given: dict[str, Any], config: Path | None) -> None:
    """What is wrong in YAML or names shows before torch loads."""
    from autoquant.hardware import load_hardware
    from autoquant.space import load_space

    if not config or "space" in given:
        load_space(given.get("space", "mixed"))
    if not config or "hardware" in given:
        load_hardware(given.get("hardware", "onnxruntime-cpu"))


def _runs_option(folder: Path) -> str:
    return f" --runs-dir {folder.parent}"


@app.command()
def status(run: RunArgument, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Show how a search goes, or where it ended: live, dead or finished."""
    from autoquant.search.status import status as read_status

    found = read_status(run, runs_dir)
    if as_json:
        _print_json(found)
    else:
        from autoquant.report import status_table

        _print_table(status_table(found))


@app.command()
def front(run: RunArgument, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Show the front of a finished search."""
    from autoquant.front import Front

    found = Front.read(run, runs_dir).to_dict()
    if as_json:
        _print_json(found)
    else:
        from autoquant.report import front_table

        _print_table(front_table(found))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN…",
            help="names under --runs-dir, or folders, of one task",
            autocompletion=_complete_runs,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="the fronts as plots")
    ] = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Compare the fronts of runs of one task."""
    from autoquant.front import Front

    if len(runs) < 2:
        raise UserError("compare: give at least two runs")
    fronts = [Front.read(run, runs_dir).to_dict() for run in runs]
    from autoquant.report import compare_fronts, compare_html, compare_table

    compared = compare_fronts(fronts)
    if output is not None:
        page = compare_html(fronts)
        _write(lambda: output.write_text(page, encoding="utf-8"), output)
        _say(f"the fronts are overlaid in {output}")
    if as_json:
        _print_json(compared)
    else:
        _print_table(compare_table(compared))


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="new folder")],
    trial: Annotated[int | None, typer.Option(metavar="N", help="this member")] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="nearest to float's accuracy at no cost (default)")
    ] = False,
    max_drop: Annotated[
        float | None, typer.Option(metavar="X", help="the cheapest within this drop")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(metavar="X", help="the most accurate within this latency")
    ] = None,
    max_size_bytes: Annotated[
        int | None, typer.Option(metavar="N", help="the most accurate within this size")
    ] = None,
    precompiled: Annotated[
        bool, typer.Option("--precompiled", help="also what onnxruntime makes of it here")
    ] = False,
    compressed: Annotated[
        bool, typer.Option("--compressed", help="also model.aqz, entropy-coded, for `unpack`")
    ] = False,
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow; default DIR/mlflow.db")
    ] = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Package a member of a front for deployment: by number, by limits, or the front's knee."""
    limits = (max_drop, max_latency_ms, max_size_bytes)
    if trial is not None and (knee or limits != (None, None, None)):
        raise UserError("--trial names the member: leave out the limits and --knee")
    if knee and limits != (None, None, None):
        raise UserError("--knee names the member: leave out the limits")
    from autoquant import api
    from autoquant.front import Front
    from autoquant.report import choice_lines

    found = Front.read(run, runs_dir)
    if trial is not None:
        member = found.member(trial)
    else:
        member = found.choose(
            max_drop=max_drop, max_latency_ms=max_latency_ms, max_size_bytes=max_size_bytes
        )
    nearby = {what: other.trial for what, other in found.nearby(member).items()}
    folder = api.export(
        member,
        output,
        precompiled=precompiled,
        compressed=compressed,
        tracking_uri=tracking_uri,
    )
    if as_json:
        _print_json({"package": str(folder), **member.to_dict(), "nearby": nearby})
        return
    typer.echo(folder)
    for line in choice_lines(found.to_dict(), member.trial, nearby):
        _say(line)
    _say(f"check it with: autoquant verify {folder}")


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a model.aqz of export")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="X.onnx")],
    as_json: Json = False,
) -> None:
    """Make the ONNX file that an entropy-coded one was made from, byte by byte."""
    from autoquant.compress import coding
    from autoquant.errors import PackageError

    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    try:
        model = coding.decompress(data)
    except PackageError as error:
        raise PackageError(f"{file}: {error}") from None
    _write(lambda: output.write_bytes(model), output)
    if as_json:
        _print_json({"model": str(output), "size_bytes": len(model), "stored_bytes": len(data)})
        return
    typer.echo(output)
    _say(f"{len(model):,} bytes from {len(data):,}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="an exported package")],
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="check the accuracy too")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Re-run an exported package against its manifest."""
    from autoquant import api

    report = api.verify(folder, task, data)
    if as_json:
        _print_json(report)
        return
    for check in report["checks"]:
        typer.echo(f"{'ok' if check['ok'] else 'FAILED':6} {check['name']}: {check['detail']}")


@app.command()
def compress(
    task: TaskArgument,
    candidate: Annotated[
        Path, typer.Option("--candidate", metavar="FILE", help="YAML or JSON; left out is float")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="X.onnx")],
    data: Data = None,
    hardware: HardwareOption = "onnxruntime-cpu",
    batch: Batch = 1,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Build, predict and score one candidate."""
    from autoquant.candidate import Candidate
    from autoquant.hardware import load_hardware

    parsed, profile_ = Candidate.read(candidate), load_hardware(hardware)
    from autoquant import api

    scored = api.compress(
        task, parsed, data=data, hardware=profile_, batch=batch, threads=threads, progress=True
    )
    _write(lambda: scored.artifact.save(output), output)
    if as_json:
        _print_json(scored.to_dict())
        return
    score, cost = scored.score, scored.predicted
    typer.echo(output)
    _say(
        f"{score.metric} {score.value:.4f} ± {score.standard_error:.4f} on {score.samples:,} "
        f"{score.split} samples, drop {score.drop:+.4f} ± {score.drop_standard_error:.4f}; "
        f"{scored.artifact.size_bytes:,} bytes, {cost.average_weight_bits:.2f} bits a weight"
        + ("" if cost.latency_ms is None else f", {cost.latency_ms:.3f} ms predicted")
    )


@app.command()
def inspect(
    task: TaskArgument = "mnist",
    data: Data = None,
    space: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="whose choices sensitivity is about")
    ] = "mixed",
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity/--no-sensitivity", help="what low bits cost each layer; default on"
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Show a network's layers (shapes, MACs, sensitivity), channel groups and blocks."""
    from autoquant import api

    found = api.inspect(task, data, sensitivity=sensitivity, space=space, progress=True)
    if as_json:
        _print_json(found)
        return
    from autoquant.report import groups_table, layers_table

    _print_table(layers_table(found["layers"]))
    if found["groups"]:
        _print_table(groups_table(found["groups"]))
    if found["blocks"]:
        typer.echo(f"blocks that can be dropped: {', '.join(found['blocks'])}")


@app.command()
def profile(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="YAML to write")],
    task: TaskArgument = "mnist",
    data: Data = None,
    space: Annotated[
        str, typer.Option("--space", metavar="NAME|FILE", help="whose kernels are timed")
    ] = "int8",
    hardware: HardwareOption = "onnxruntime-cpu",
    batch: Batch = 1,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Measure this machine on a task's kernels into a hardware profile."""
    from autoquant import api

    found = api.profile(
        task,
        output,
        data=data,
        space=space,
        hardware=hardware,
        batch=batch,
        threads=threads,
        progress=True,
    )
    if as_json:
        _print_json(found.model_dump(mode="json", exclude_defaults=True))
        return
    typer.echo(output)
    _say(f"use it with: autoquant search {task} --hardware {output}")


@app.command()
def ui(
    runs_dir: RunsDir = RUNS,
    port: Annotated[int, typer.Option(min=1, max=65535, help="first port to try")] = 5000,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open it")] = True,
) -> None:
    """Open MLflow on the runs, at the front of the latest search."""
    from autoquant.tracking import serve

    raise typer.Exit(serve(runs_dir, port=port, open_browser=browser))


@app.command()
def spaces(as_json: Json = False) -> None:
    """List the built-in search spaces."""
    from autoquant.document import builtin
    from autoquant.space import load_space

    _print_names({n: load_space(n).description for n in builtin("search_spaces")}, as_json)


@app.command("hardware")
def hardware_(as_json: Json = False) -> None:
    """List the built-in hardware profiles."""
    from autoquant.document import builtin
    from autoquant.hardware import load_hardware

    _print_names({n: load_hardware(n).description for n in builtin("hardware_profiles")}, as_json)


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the built-in tasks."""
    from autoquant.tasks import DESCRIPTIONS

    _print_names(DESCRIPTIONS, as_json)


def _print_names(names: dict[str, str], as_json: bool) -> None:
    if as_json:
        _print_json([{"name": n, "description": text} for n, text in names.items()])
        return
    width = max(map(len, names), default=0)
    for name, text in names.items():
        indent = " " * (width + 2)
        typer.echo(textwrap.fill(f"{name:{width}}  {text}", 100, subsequent_indent=indent))


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def _print_table(table: Table) -> None:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    Console(width=None if terminal else 100).print(table)


def _say(text: str) -> None:
    typer.echo(f"autoquant: {text}", err=True)


def _write(write: Any, path: Path) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; errors become one line on stderr and an exit status."""
    command = typer.main.get_command(app)
    try:
        result = command.main(arguments, prog_name="autoquant", standalone_mode=False)
        status = result if isinstance(result, int) else 0
    except AutoquantError as error:
        typer.echo(f"autoquant: {error}", err=True)
        status = error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"autoquant: {where}{error.strerror or error}", err=True)
        status = 2
    except Exception as error:
        if not hasattr(error, "format_message"):  # not what the parser raises
            raise
        message = error.format_message()
        if type(error).__name__ != "NoArgsIsHelpError":
            message = f"autoquant: {' '.join(message.split())}"
        typer.echo(message, err=True)
        status = 2
    if status == _INTERRUPTED:  # the parser turns Ctrl-C into this status too
        typer.echo("autoquant: interrupted", err=True)
    if arguments is None:
        sys.exit(status)
    return status
