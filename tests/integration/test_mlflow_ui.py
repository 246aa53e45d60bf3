"""MLflow's UI in a real browser, over a store that the console script made: what a scientist sees first."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from browser import Page, browser, no_browser
from test_main_job import BIN, PATIENCE, SHRUNK, Workspace, answer, free_port, wait_for

from crism_mlops.tracking import RunInfo

pytestmark = pytest.mark.skipif(no_browser() is not None, reason=str(no_browser()))

EXPERIMENT = "crism-quickstart"
SWEEP = (
    *SHRUNK, "budget.trials=3", "train.epochs=3", "train.validate_every=1", "engine.system_metrics_seconds=0.5",
    "search.data.variant={choice: [pnr, rect]}", "evaluate.panel_scenes=3",
)  # fmt: skip
# MLflow asks who is there, and takes it that nobody is where its server has no accounts; the browser asks for an icon;
# MLflow's parallel coordinates begin to draw before they have a size, and its charts move while they are measured.
HARMLESS = ("/mlflow/users/current", "/favicon.ico", ": Expected number, \"", ": Trailing garbage, \"", "NaN",
            "attribute height: A negative value", "ResizeObserver loop")  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three finished trials of a U-Net, and floors."""
    made = Workspace(tmp_path_factory.mktemp("mlflow-ui"))
    _, err = made.run(*made.sweep("quickstart-unet", SWEEP))
    assert "3 finished" in err.splitlines()[-1]
    return made


@pytest.fixture(scope="module")
def trials(store: Workspace) -> list[RunInfo]:
    return store.tracker().find(crism_kind="trial")


@pytest.fixture(scope="module")
def links(store: Workspace) -> Iterator[list[str]]:
    """The lines that `crism-mlops ui` prints, while it serves."""
    port = free_port()
    with store.started(BIN / "crism-mlops", "ui", "--port", port) as process:
        base = f"http://127.0.0.1:{port}"
        wait_for(lambda: answer(f"{base}/health", timeout=5), "the UI's first answer", process)
        assert process.stdout is not None
        yield [process.stdout.readline().strip() for _ in range(2)]
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60 * PATIENCE)


@pytest.fixture(scope="module")
def base(links: list[str]) -> str:
    return links[0].split(": ")[1].split()[0]


@pytest.fixture
def page(base: str) -> Iterator[Page]:
    """A browser whose user has closed MLflow's assistant once."""
    with browser(1600, 1000) as made:
        # Not a page: it asks for nothing.
        made.open(f"{base}/static-files/favicon.ico")
        made.script(
            "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"
            "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')"
        )
        yield made
        severe = [line for line in made.errors() if not any(part in line for part in HARMLESS)]
        assert severe == []
        elsewhere = {url for url in made.requests() if url.startswith("http") and not url.startswith(base)}
        assert elsewhere == set()


def test_the_runs_table_has_our_columns(page: Page, links: list[str], trials: list[RunInfo]) -> None:
    assert links[1].startswith(f"{EXPERIMENT}: http")
    page.open(links[1].partition(": ")[2])
    page.until_text("quickstart-unet-000", "boosted rect physical")
    shown = page.until(lambda: page.text(".ag-root") if "test/lpips" in page.text(".ag-root") else "", "columns")
    for name in ("crism.kind", "crism.study", "data.variant", "train.learning_rate", "objective", "test/rmse",
                 "test/skill", "test/pcc"):  # fmt: skip
        assert name in shown, name
    for run in trials:
        assert run.name in shown
        assert str(run.metrics["test/rmse"])[:10] in shown
    assert "floor" in shown
    assert "GenAI" in page.text()
    assert "Agent versions" not in page.text(), "the menus of machine learning"
    time.sleep(1)
    page.screenshot("mlflow-runs")


def test_charts_compare_the_trials(page: Page, links: list[str]) -> None:
    page.open(links[1].partition(": ")[2] + "&compareRunsMode=CHART")
    page.until_text("Trials compared", "Parallel Coordinates")
    page.until(lambda: axes(page) >= {"data.variant", "test/skill", "test/rmse"}, "axes", seconds=60)
    page.until(lambda: len(page.all(".js-plotly-plot .barlayer .point")) > 0, "bars")
    time.sleep(1)
    page.screenshot("mlflow-charts")


def axes(page: Page) -> set[str]:
    return set(
        page.script("return [...document.querySelectorAll('.parcoords text, .axis-title')].map(e => e.textContent)")
    )


def test_from_the_list_of_experiments_it_is_two_clicks(page: Page, base: str) -> None:
    page.open(f"{base}/#/experiments")
    page.click("a", EXPERIMENT)
    page.click("a", "open the table")
    # In a tab of its own.
    page.until(lambda: len(page.driver.window_handles) == 2, "the other tab")
    page.driver.switch_to.window(page.driver.window_handles[1])
    page.until_text("data.variant", "test/skill")


def test_a_run_describes_itself(page: Page, base: str, store: Workspace, trials: list[RunInfo]) -> None:
    page.open(f"{base}/#/experiments/{store.tracker().experiment_id}/runs/{trials[0].run_id}")
    page.until_text("Trial 0 of study", "test RMSE", "simulated-", "-train", "train.learning_rate", "Logged models")
    page.screenshot("mlflow-run")


def test_a_run_shows_its_panels(page: Page, base: str, store: Workspace, trials: list[RunInfo]) -> None:
    where = f"{base}/#/experiments/{store.tracker().experiment_id}/runs/{trials[0].run_id}"
    page.open(f"{where}/model-metrics")
    page.until_text("_panels", "validation", "test")

    def loaded(key: str) -> bool:
        sources = page.script(
            "return [...document.images].filter(i => i.naturalWidth > 50).map(i => decodeURIComponent(i.src))"
        )
        return any(f"_panels~{key}+step" in source for source in sources)

    page.until(lambda: loaded("validation") and loaded("test"), "pictures of both panels")
    page.screenshot("mlflow-images")
    page.open(f"{where}/artifacts/panels/test.png")
    page.until(lambda: page.script("return [...document.images].some(i => i.naturalWidth > 800)"), "the test panel")
    assert page.broken_images() == []
    page.screenshot("mlflow-panel")


def test_a_run_has_system_metrics(page: Page, base: str, store: Workspace, trials: list[RunInfo]) -> None:
    experiment = store.tracker().experiment_id
    page.open(f"{base}/#/experiments/{experiment}/runs/{trials[-1].run_id}/system-metrics")
    page.until_text("cpu_utilization_percentage")
    page.screenshot("mlflow-system")


def test_models_have_their_data_sets(page: Page, base: str, store: Workspace) -> None:
    page.open(f"{base}/#/experiments/{store.tracker().experiment_id}/models?workflowType=machine_learning")
    page.until_text("simulated-", "quickstart-unet-000")
    page.screenshot("mlflow-models")


def test_three_runs_in_parallel_coordinates(page: Page, base: str, store: Workspace, trials: list[RunInfo]) -> None:
    ids = "[" + ",".join(f'"{run.run_id}"' for run in trials) + "]"
    page.open(f'{base}/#/compare-runs?runs={ids}&experiments=["{store.tracker().experiment_id}"]')
    page.until_text("Parallel Coordinates Plot")
    # The page takes the first three parameters that differ.
    page.until(lambda: "data.variant" in axes(page), "axes")
    page.screenshot("mlflow-compare")
