"""The report and MLflow's view of a large run in headless Chromium; the README's pictures.

    python benchmarks/pages.py                     # 1,000 trials of mnist, about five minutes
    python benchmarks/pages.py --run runs/NAME     # of a run that is there, no search
    python benchmarks/pages.py --pictures          # and write docs/images/*.png

The size of ``front.html``, and the time from opening it until it can be read and until the last
plot is drawn (a new profile without a network, medians of five); the same for MLflow's shared
view, which draws the first 100 runs, the front first; its server is started here and ended. Needs
Chromium and playwright (extra ``dev``).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from record import record

from autoquant.tracking import _free_port, _server, view_url

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
DRAWN = """() => {
  const plots = [...document.querySelectorAll('.js-plotly-plot')];
  return plots.length && plots.every(p => p.querySelector('g.trace, g.hm'));
}"""
POINTS = """() => Math.min(...[...document.querySelectorAll('.js-plotly-plot')].filter(
  d => d.data && d.data[0].type.startsWith('scatter')).map(
  d => d.data.reduce((n, t) => n + t.x.length, 0)))"""
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def report(browser: Any, path: Path, picture: Path | None) -> dict[str, Any]:
    """Size and time to open the report."""
    seconds, painted = [], []
    for _ in range(5):
        context = browser.new_context(offline=True, viewport={"width": 1280, "height": 1000})
        page = context.new_page()
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("#cost-size_bytes .scatterlayer .point", state="attached")
        page.wait_for_function(DRAWN)
        seconds.append(time.perf_counter() - start)
        painted.append(page.evaluate(PAINTED) / 1000)
        if picture is not None:
            page.screenshot(path=picture)
        context.close()
    return {
        "bytes": path.stat().st_size,
        "seconds_to_read": round(median(painted), 3),
        "seconds_to_last_plot": round(median(seconds), 3),
    }


def view(browser: Any, runs_dir: Path, count: int, picture: Path | None) -> dict[str, Any]:
    """Time until MLflow's shared view has drawn every scored trial."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs_dir / 'mlflow.db'}")
    experiment = client.search_experiments(filter_string="name != 'Default'")[0].experiment_id
    parents = client.search_runs([experiment], "tags.`autoquant.run` != ''", max_results=1000)
    parent = next(r.info.run_id for r in parents if "mlflow.parentRunId" not in r.data.tags)
    address = f"http://127.0.0.1:{_free_port('127.0.0.1', 5050)}"
    with _server(runs_dir, address):
        context = browser.new_context(viewport={"width": 1500, "height": 1000})
        page = context.new_page()
        start = time.perf_counter()
        page.goto(view_url(address, experiment, parent))
        page.wait_for_selector(".scatterlayer .point", timeout=120_000, state="attached")
        seconds, points = time.perf_counter() - start, int(page.evaluate(POINTS))
        for _ in range(60):  # until nothing more comes
            page.wait_for_timeout(1000)
            now = int(page.evaluate(POINTS))
            if now == points:
                break
            seconds, points = time.perf_counter() - start, now
        if picture is not None:
            close = page.get_by_role("button", name="Close").last  # MLflow's Assistant
            if close.count():
                close.click()
            page.wait_for_timeout(2000)
            page.screenshot(path=picture)
        context.close()
    return {"seconds_to_draw": round(seconds, 2), "points": points, "scored": count}


def main() -> None:
    """The search where none is given, both pages, the record."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--run", type=Path, help="a run's folder instead of a new search")
    parser.add_argument("--pictures", action="store_true")
    options = parser.parse_args()
    if options.pictures:
        IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        run = options.run
        if run is None:
            run = Path(temporary) / "large"
            command = [sys.executable, "-m", "autoquant", "search", "mnist", "--space", "mixed"]
            command += ["--trials", str(options.trials), "--name", "large", "--seed", "0"]
            subprocess.run([*command, "--runs-dir", temporary], check=True)
        lines = (run / "trials.jsonl").read_text().splitlines()
        scored = sum('"status": "complete"' in x or '"status":"complete"' in x for x in lines)
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            pictures = IMAGES if options.pictures else None
            found = {
                "trials": len(lines),
                "complete": scored,
                "report": report(browser, run / "front.html", pictures and IMAGES / "report.png"),
                "mlflow": view(browser, run.parent, scored, pictures and IMAGES / "mlflow.png"),
            }
            browser.close()
    missed = []
    if found["report"]["bytes"] > 8e6:
        missed.append(f"report of {found['report']['bytes']:,} bytes, bar 8 MB")
    if found["report"]["seconds_to_last_plot"] > 2:
        missed.append(f"last plot after {found['report']['seconds_to_last_plot']} s, bar 2")
    print(found, "missed:", missed or "nothing")
    record("pages", {**found, "missed": missed})


if __name__ == "__main__":
    main()
