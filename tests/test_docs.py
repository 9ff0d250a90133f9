"""Every command block of the pages is run, in order, as a reader would run it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICKSTART = "quickstart.md"
RUNNABLE = [p.name for p in PAGES if "```bash" in p.read_text() and p.name != QUICKSTART]


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, options and text of every fenced block."""
    return FENCE.findall((DOCS / page).read_text(encoding="utf-8"))


def follow(page: str, folder: Path) -> None:
    """Write the files that a page shows and run its commands, in order."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    python = shlex.quote(sys.executable)
    for name, what in (("autoquant", f"{python} -m autoquant"), ("python", python)):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {what} "$@"\n')
        script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(commands), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for language, options, text in blocks(page):
        title = re.search(r'title="([^"]+)"', options)
        if title and language != "bash":
            (folder / title[1]).write_text(text, encoding="utf-8")
        if language != "bash":
            continue
        found = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert found.returncode == 0, f"{page}:\n{text}\n{found.stdout}\n{found.stderr}"
        assert "Traceback" not in found.stderr


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader is who has followed the quickstart."""
    folder = tmp_path_factory.mktemp("docs")
    follow(QUICKSTART, folder)
    return folder


@pytest.mark.slow
def test_the_quickstart_does_what_it_says(started: Path) -> None:
    assert (started / "runs" / "digits" / "front.html").is_file()
    lines = (started / "runs" / "digits" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 16 and (started / "package" / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_the_commands_of_a_page_run(started: Path, tmp_path: Path, page: str) -> None:
    shutil.copytree(started / "runs", tmp_path / "runs")
    follow(page, tmp_path)


def test_five_commands_lead_to_a_package() -> None:
    """The first is what the README sets up with; the others stand in a block that is run."""
    page = "your-model.md"
    text = (DOCS / page).read_text(encoding="utf-8")
    first = re.search(r"five commands: `(pip install [^`]+)`", text)
    assert first and first[1] in (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(t for x, options, t in blocks(page) if "four commands" in options and x == "bash")
    lines = block.strip().splitlines()
    assert len(lines) == 4 and "my_task.py" in lines[0] and "export" in lines[-2]


def test_a_command_block_is_bash_and_so_is_run() -> None:
    for page in PAGES:
        for language, options, text in blocks(page.name):
            assert language in ("bash", "python", "yaml", ""), (page.name, language)
            assert language == "bash" or not re.search(r"^\$? ?autoquant ", text, re.MULTILINE)
            if language == "python":
                compile(text, page.name, "exec")
                assert 'title="' in options or "import autoquant" in text


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = {next(iter(i.values())) if isinstance(i, dict) else i for i in site["nav"]}
    pages = {p.name for p in PAGES}
    assert listed == pages
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+\.md)", page.read_text()):
            assert (DOCS / target).is_file(), (page.name, target)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "autoquant.api.search" in (tmp_path / "api" / "index.html").read_text()
