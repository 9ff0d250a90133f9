"""The report and MLflow's pages in headless Chromium; screenshots stay in pytest's folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_task import LAYERS, settings, task

from autoquant import search
from autoquant.front import Front
from autoquant.tracking import _answers, _end, _server, view_url

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = next((p for p in ("chromium", "chromium-browser") if shutil.which(p)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SECONDS = 60_000  # ms that a busy machine may take


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser whose profile is new; a context is new for every page."""
    assert CHROMIUM is not None
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(
            executable_path=shutil.which(CHROMIUM), args=list(ARGUMENTS)
        )
        yield found
        found.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A search of twelve trials with its page and its store."""
    folder = tmp_path_factory.mktemp("run")
    fields = settings(folder, trials=12)
    changes = {name: getattr(fields, name) for name in ("space", "hardware", "trials", "name")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQUANT_CACHE", str(folder / "cache"))
        yield search(task(folder), runs_dir=folder / "runs", progress=False, **changes)


def opened(browser: Browser, path: Path, **options: Any) -> Page:
    """A page of a fresh profile without a network; an error of its script fails the test."""
    context = browser.new_context(offline=True, **options)
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(f"script error: {error}"))
    page.goto(path.as_uri())
    page.wait_for_selector("#cost-size_bytes .scatterlayer .point", state="attached")
    return page


@pytest.fixture
def report(browser: Browser, run: Front) -> Iterator[Page]:
    assert run.folder is not None
    page = opened(browser, run.folder / "front.html", viewport={"width": 1280, "height": 900})
    yield page
    page.context.close()


def points(page: Page, plot: str) -> dict[int, tuple[float, float]]:
    """Where the points of the front are on the screen, by trial."""
    found = page.evaluate(
        """plot => {
          const div = document.getElementById(plot), box = div.getBoundingClientRect();
          const front = div.data.find(t => t.name === 'front');
          const x = div._fullLayout.xaxis, y = div._fullLayout.yaxis;
          return front.customdata.map((trial, i) => [trial,
            box.left + x._offset + x.d2p(front.x[i]), box.top + y._offset + y.d2p(front.y[i])]);
        }""",
        plot,
    )
    return {int(trial): (x, y) for trial, x, y in found}


def test_the_report_draws_every_member_and_what_they_are_beside(report: Page, run: Front) -> None:
    for cost in ("latency_ms", "size_bytes"):
        names = report.evaluate(
            "id => document.getElementById(id).data.map(t => [t.name, t.x.length])", f"cost-{cost}"
        )
        drawn = {name: count for name, count in names if name}
        assert drawn["front"] == len(run.members) and drawn["float"] == 1
        assert any(name.startswith("uniform 8") for name in drawn)
        assert any(name.startswith("uniform 4") for name in drawn)
        bars = report.locator(f"#cost-{cost} .errorbar").count()
        assert bars >= len(run.members)
    assert report.locator("#cost-latency_ms").get_by_text("Latency, predicted").count()


def test_hover_shows_a_member_and_a_click_selects_it(
    report: Page, run: Front, tmp_path: Path
) -> None:
    title, command = report.locator("#chosen-title"), report.locator("#chosen-command")
    first = title.inner_text()
    assert first.startswith("Selected: trial")
    where = points(report, "cost-size_bytes")
    assert set(where) == {m.trial for m in run.members}
    other = next(t for t in where if f"trial {t}" != first.removeprefix("Selected: "))
    report.locator("#cost-size_bytes").scroll_into_view_if_needed()
    where = points(report, "cost-size_bytes")
    report.mouse.move(*where[other])
    playwright.expect(title).to_have_text(f"Under the mouse: trial {other}")
    hover = report.locator("#cost-size_bytes .hoverlayer").text_content() or ""
    assert f"trial {other}" in hover and "bits a weight" in hover
    report.mouse.move(5, 5)
    playwright.expect(title).to_have_text(first)
    report.mouse.click(*where[other])
    playwright.expect(title).to_have_text(f"Selected: trial {other}")
    playwright.expect(command).to_have_text(f"autoquant export one --trial {other} -o one-{other}")
    selected = report.locator("tr.selected")
    assert selected.count() == 1 and selected.get_attribute("data-trial") == str(other)
    cells = report.locator("#strip button")
    bits = {m.trial: m.candidate for m in run.members}[other]
    shown = ["f" if bits.choice(n).is_float else str(bits.choice(n).weight_bits) for n in LAYERS]
    assert cells.all_inner_texts() == shown
    cells.first.hover()
    playwright.expect(report.locator("#strip-note")).to_contain_text("first: ")
    report.screenshot(path=tmp_path / "selected.png", full_page=True)


def test_a_row_selects_too_and_the_command_is_copied(
    browser: Browser, run: Front, tmp_path: Path
) -> None:
    assert run.folder is not None
    page = opened(browser, run.folder / "front.html", permissions=["clipboard-write"])
    row = page.locator("tr[data-trial]").last
    row.focus()
    page.keyboard.press("Enter")
    trial = row.get_attribute("data-trial")
    playwright.expect(page.locator("#chosen-title")).to_have_text(f"Selected: trial {trial}")
    page.locator("#copy").click()
    playwright.expect(page.locator("#copy")).to_have_text("Copied")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_in_light_and_dark(
    browser: Browser, run: Front, tmp_path: Path, scheme: str, width: int
) -> None:
    assert run.folder is not None
    size = {"width": width, "height": 844}
    page = opened(browser, run.folder / "front.html", viewport=size, color_scheme=scheme)
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate(
        "['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k])"
    )
    text, ground = (sum(map(int, c[4:-1].split(", "))) for c in colours)
    assert (text < 200 < 600 < ground) if scheme == "light" else (ground < 200 < 600 < text)
    page.context.close()


def test_it_prints_on_white_with_every_plot(browser: Browser, run: Front, tmp_path: Path) -> None:
    assert run.folder is not None
    page = opened(browser, run.folder / "front.html", color_scheme="dark")
    printed = page.pdf(path=tmp_path / "front.pdf", format="A4")
    assert printed.startswith(b"%PDF") and len(printed) > 20_000
    page.emulate_media(media="print", color_scheme="light")
    page.screenshot(path=tmp_path / "print.png", full_page=True)
    assert page.locator("#copy").is_hidden()
    page.context.close()


# --- MLflow -----------------------------------------------------------------------------------


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def charts(browser: Browser, url: str, screenshot: Path) -> Page:
    """The shared view in a fresh profile, once it has drawn."""
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".scatterlayer .point", timeout=SECONDS, state="attached")
    page.wait_for_selector("g.parcoords, .parcoords", timeout=SECONDS, state="attached")
    page.screenshot(path=screenshot)
    return page


def scatters(page: Page) -> list[int]:
    """How many points each scatter has."""
    return page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].filter(d => d.data[0].type.startsWith("
        "'scatter')).map(d => d.data.reduce((n, t) => n + t.x.length, 0))"
    )


def check_view(browser: Browser, address: str, uri: str, run: Front, folder: Path) -> None:
    """Scatters with every scored trial, the note with its table, the report, a member's files."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("small")
    parents = client.search_runs([experiment.experiment_id], "tags.`autoquant.run` = 'one'")
    parent = parents[0].info.run_id
    page = charts(browser, view_url(address, experiment.experiment_id, parent), folder / "view.png")
    assert len(scatters(page)) == 2 and set(scatters(page)) == {12}
    assert page.get_by_text("Parallel").count() or page.locator(".parcoords").count()
    base = f"{address}/#/experiments/{experiment.experiment_id}/runs"
    page.goto(f"{base}/{parent}")
    member = run.members[0]
    page.get_by_text("Show more").last.click(timeout=SECONDS)
    link = page.get_by_role("link", name=str(member.trial), exact=True).first
    link.wait_for(timeout=SECONDS)
    page.screenshot(path=folder / "note.png", full_page=True)
    with page.context.expect_page() as opened_tab:  # MLflow opens it in a tab of its own
        link.click()
    tab = opened_tab.value
    tab.wait_for_url("**/runs/*", timeout=SECONDS)
    child = re.split(r"[/?]", tab.url.rpartition("/runs/")[2])[0]
    assert child != parent
    tab.get_by_text("Artifacts", exact=True).first.click(timeout=SECONDS)
    tab.get_by_text("candidate.json").first.wait_for(timeout=SECONDS)
    tab.screenshot(path=folder / "member.png")
    page.goto(f"{base}/{parent}/artifacts/front.html")
    inner = page.frame_locator("iframe").first
    inner.locator("#chosen-title").wait_for(timeout=SECONDS)
    page.screenshot(path=folder / "artifact.png")
    page.context.close()
    files = {a.path for a in client.list_artifacts(child)}
    assert {"candidate.json", f"{member.trial}.onnx"} <= files


def check_registered(uri: str, run: Front) -> None:
    """The knee loads back as a model version with the option that it needs."""
    import mlflow
    import numpy as np

    from autoquant.runtime import OnnxRuntime, session_config

    assert run.folder is not None
    knee = run.knee()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/small@chosen")
        model = mlflow.onnx.load_model("models:/small@chosen")
    finally:
        mlflow.set_tracking_uri(before)
    options = loaded.metadata.flavors["onnx"]["onnx_session_options"]
    assert options["extra_session_config"] == session_config()
    with np.load(run.folder / "inputs.npz") as file:
        inputs = {name: file[name] for name in file.files}
    session = OnnxRuntime().open(run.folder / str(knee.artifact))
    expected = session.run([inputs[n] for n in session.input_names])[0]
    assert np.array_equal(loaded.predict(inputs)["y"], expected)
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata["autoquant.candidate"] == knee.key


def test_mlflow_opens_on_the_front(browser: Browser, run: Front, tmp_path: Path) -> None:
    assert run.folder is not None
    runs_dir = run.folder.parent
    address = f"http://127.0.0.1:{port()}"
    with _server(runs_dir, address):
        check_view(browser, address, address, run, tmp_path)
    check_registered(f"sqlite:///{runs_dir / 'mlflow.db'}", run)


def test_a_remote_server_with_proxied_artifacts_shows_the_same(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))
    address = f"http://127.0.0.1:{port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", address.rpartition(":")[2]]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'there.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "there")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **quiet},
        start_new_session=True,
    )
    try:
        assert _answers(f"{address}/health", server)
        fields = settings(tmp_path, trials=12)
        changes = {n: getattr(fields, n) for n in ("space", "hardware", "trials", "name")}
        found = search(
            task(tmp_path),
            runs_dir=tmp_path / "runs",
            tracking_uri=address,
            progress=False,
            **changes,
        )
        assert not (tmp_path / "runs" / "mlflow.db").exists()
        stored = [p.name for p in (tmp_path / "there").rglob("*") if p.is_file()]
        assert {"front.html", "front.json", "MLmodel"} <= set(stored)
        check_view(browser, address, address, found, tmp_path)
        check_registered(address, found)
        front = json.loads(next((tmp_path / "there").rglob("front.json")).read_text())
        assert front == found.to_dict()
    finally:
        _end(server)
