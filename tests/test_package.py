"""The package as others meet it: names, imports, options, documents."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import autoquant
from autoquant.cli import app

ROOT = Path(__file__).resolve().parents[1]

# What other programs rely on: the command line's long options.
OPTIONS = {
    "search": {
        "--space", "--hardware", "--objectives", "--trials", "--timeout", "--max-size-bytes",
        "--max-latency-ms", "--max-drop", "--batch", "--threads", "--workers", "--ray-address",
        "--storage", "--sampler", "--seed", "--name", "--runs-dir", "--tracking-uri", "--resume",
        "--config", "--data", "--json",
    },
    "status": {"--json", "--runs-dir"},
    "front": {"--json", "--runs-dir"},
    "compare": {"-o", "--json", "--runs-dir"},
    "export": {
        "--trial", "--max-drop", "--max-latency-ms", "--max-size-bytes", "-o", "--json",
        "--runs-dir",
    },
    "unpack": {"-o", "--json"},
    "verify": {"--task", "--data", "--json"},
    "compress": {"--candidate", "-o", "--hardware", "--data", "--json"},
    "inspect": {"--data", "--json"},
    "profile": {"-o", "--data"},
    "ui": {"--runs-dir"},
    "spaces": {"--json"},
    "hardware": {"--json"},
    "tasks": {"--json"},
}  # fmt: skip
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def python(code: str) -> str:
    """What a new process prints."""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


# --- names ------------------------------------------------------------------------------------


def test_all_is_what_is_visible() -> None:
    assert sorted(autoquant.__all__) == dir(autoquant)
    assert len(set(autoquant.__all__)) == len(autoquant.__all__)


@pytest.mark.parametrize("name", autoquant.__all__)
def test_every_public_name_loads_and_is_described(name: str) -> None:
    value = getattr(autoquant, name)
    assert callable(value) and value.__doc__
    assert value.__name__ == name


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = autoquant.serach  # type: ignore[attr-defined]


def test_importing_loads_nothing_slow() -> None:
    slow = "{'torch', 'ray', 'mlflow', 'onnxruntime', 'optuna', 'onnx', 'plotly', 'numpy'}"
    assert python(f"import sys, autoquant; print(sorted({slow} & set(sys.modules)))") == "[]"


def test_public_functions_stay_functions_whatever_is_imported_first() -> None:
    modules = [
        "autoquant.search", "autoquant.search.study", "autoquant.search.trial",
        "autoquant.compress", "autoquant.compress.qdq", "autoquant.export", "autoquant.api",
        "autoquant.cli",
    ]  # fmt: skip
    code = f"""
import importlib, sys
for first in {modules}:
    for name in [n for n in sys.modules if n.partition(".")[0] == "autoquant"]:
        del sys.modules[name]
    importlib.import_module(first)
    import autoquant
    for name in ("search", "compress", "export"):
        found = getattr(autoquant, name)
        assert callable(found) and found.__module__ == "autoquant.api", (first, name, found)
        assert importlib.import_module("autoquant." + name).__name__ == "autoquant." + name
        assert getattr(autoquant, name) is found, (first, name)
    from autoquant import search
    assert search is autoquant.search
    import autoquant.search.executor
    assert autoquant.search is search
print("fine")
"""
    assert python(code) == "fine"


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert autoquant.__version__ == project["version"]
    module, _, function = project["scripts"]["autoquant"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_package_is_typed() -> None:
    assert (Path(autoquant.__file__).parent / "py.typed").is_file()


# --- the command line -------------------------------------------------------------------------


def test_the_commands_are_those_of_the_contract() -> None:
    assert set(COMMANDS) == set(OPTIONS)
    assert all(command.help for command in COMMANDS.values())


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_every_option_of_the_contract_exists(command: str) -> None:
    found = {name for parameter in COMMANDS[command].params for name in parameter.opts}
    assert found >= OPTIONS[command]


def test_only_the_documented_arguments_are_required() -> None:
    required = {n: {p.name for p in c.params if p.required} for n, c in COMMANDS.items()}
    assert {n: found for n, found in required.items() if found} == {
        "status": {"run"},
        "front": {"run"},
        "compare": {"runs"},
        "export": {"run", "output"},
        "unpack": {"file", "output"},
        "verify": {"folder"},
        "compress": {"task", "candidate", "output"},
        "profile": {"output"},
    }


# --- documents --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme() -> str:
    path = ROOT / "README.md"
    if not path.is_file():
        pytest.skip("README.md is not here")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_the_readme_documents_every_command(readme: str, command: str) -> None:
    code = " ".join(re.findall(r"`([^`\n]+)`", readme))
    assert re.search(rf"\b{command}\b", code), command


def test_the_readme_names_only_what_exists(readme: str) -> None:
    code = re.findall(r"`([^`\n]+)`", readme)
    code += "\n".join(re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)).splitlines()
    calls = [call for part in code for call in re.findall(r"\bautoquant ([a-z].*)", part)]
    assert len(calls) > 10
    for call in calls:
        command, *words = call.split()
        assert command in COMMANDS, call
        options = {o for p in COMMANDS[command].params for o in (*p.opts, *p.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= options | {"--help"}, call


def test_the_readme_has_the_two_commands(readme: str) -> None:
    for marker, words in (("run", "autoquant search"), ("tests", "pytest")):
        block = re.search(rf"<!-- {marker} -->\n```sh\n(.*?)```", readme, re.DOTALL)
        assert block is not None and words in block[1]
        assert len(block[1].strip().splitlines()) == 1


def test_the_readme_lists_the_built_in_spaces_and_devices(readme: str) -> None:
    for path in (ROOT / "search_spaces").glob("*.yaml"):
        assert f"`{path.stem}`" in readme
