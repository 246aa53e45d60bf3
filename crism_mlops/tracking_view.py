"""How MLflow's UI shows an experiment of ours: which of its views, which columns of the runs table, and a note that
leads there.

The UI keeps columns in the browser, where no program can put them, and has no default but its own. What it has is a
shared view: an experiment tag with the state of the page as JSON, which a URL names. (Found in the code of MLflow
3.17's page; `tests/integration/test_mlflow_ui.py` looks at it in a browser.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

VIEW = "crism"
_VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
# Machine learning: runs, charts, models. What the UI shows as the experiment's kind; which menus it has is a switch
# in the browser, GenAI at first, that the URL sets as well.
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"
NOTE = "mlflow.note.content"
_NOTE_BEGIN = "Runs with their settings and scores: "
_SECTION = "crism-trials"
# The runs table, from left to right: what a column is of, its key, its width in pixels.
COLUMNS = (
    ("tags", "crism.kind", 85),
    ("tags", "crism.study", 120),
    ("params", "data.variant", 95),
    ("params", "train.learning_rate", 140),
    ("metrics", "objective", 80),
    ("metrics", "test/rmse", 80),
    ("metrics", "test/rmse_low", 108),
    ("metrics", "test/rmse_high", 112),
    ("metrics", "test/skill", 78),
    ("metrics", "test/pcc", 78),
    ("metrics", "test/ssim", 85),
    ("metrics", "test/lpips", 85),
    ("params", "model.prompt", 170),
    ("params", "model.text_encoder", 150),
    ("metrics", "val/rmse", 85),
    ("tags", "crism.model", 130),
    ("attributes", "Dataset", 250),
    ("attributes", "Models", 120),
)


def view_state() -> dict[str, Any]:
    """The state of the page of runs: the best of all kinds first, by their error on the test scenes."""
    ids = {f"{of}.`{key}`": width for of, key, width in COLUMNS}
    return {
        "orderByKey": "metrics.`test/rmse`",
        "orderByAsc": True,
        "selectedColumns": list(ids),
        # The duration, which the table always has, comes last.
        "columnOrder": [*ids, "duration"],
        "columnWidths": ids,
        "compareRunCharts": _charts(),
        "compareRunSections": [{"uuid": _SECTION, "name": "Trials compared", "display": True, "isReordered": True}],
        # The UI would sort our section in among those that it makes of metrics.
        "isAccordionReordered": True,
        "runsHiddenMode": "FIRST_20_RUNS",
    }


def _charts() -> list[dict[str, Any]]:
    """Those that the page of charts shows before the one of each metric that it makes itself."""
    shared = {"runsCountToCompare": 20, "metricSectionId": _SECTION, "deleted": False, "isGenerated": False}
    # Runs that lack one of these, as floors do, are not in it. There is room for four axes.
    axes = ["data.variant", "train.learning_rate"]
    parallel: dict[str, Any] = {
        "type": "PARALLEL", "uuid": f"{_SECTION}-parallel",
        "selectedParams": axes, "selectedMetrics": ["test/skill", "test/rmse"], "showAllRuns": True,
    }  # fmt: skip
    bars: list[dict[str, Any]] = [
        {"type": "BAR", "uuid": f"{_SECTION}-{key}", "metricKey": key, "displayName": key}
        for key in ("test/rmse", "test/pcc", "test/ssim", "test/lpips", "test/skill")
    ]
    return [{**shared, **one} for one in (parallel, *bars)]


def experiment_path(experiment_id: str, tags: Mapping[str, str] | None = None) -> str:
    """Where the experiment's runs are seen, from the server's address on: with our columns, but where its `tags`
    lack the view."""
    path = f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return path if tags is not None and _VIEW_TAG not in tags else f"{path}&viewStateShareKey={VIEW}"


def wanted_tags(experiment_id: str | None, known: Mapping[str, str]) -> dict[str, str]:
    """The tags that an experiment lacks, or has otherwise; `experiment_id` None for one that is yet to be made.

    A kind that somebody chose in the UI stays, and so does a note of theirs.
    """
    tags = {_VIEW_TAG: json.dumps(view_state(), separators=(",", ":"))}
    if known.get(_KIND_TAG, "no_inferred_type") in ("", "no_inferred_type", "custom_model_development_inferred"):
        tags[_KIND_TAG] = _KIND
    if experiment_id is not None and known.get(NOTE, _NOTE_BEGIN).startswith(_NOTE_BEGIN):
        link = experiment_path(experiment_id).removeprefix("/")
        tags[NOTE] = f"{_NOTE_BEGIN}[open the table]({link}), the best on the test scenes first."
    return {key: value for key, value in tags.items() if known.get(key) != value}


def dress(client: Any, experiment: Any) -> None:
    """Give an experiment what it lacks of these tags."""
    from mlflow.exceptions import MlflowException

    for key, value in wanted_tags(experiment.experiment_id, experiment.tags).items():
        try:
            client.set_experiment_tag(experiment.experiment_id, key, value)
        except MlflowException:
            # Two processes that set a new tag at once: in a database one of them is refused.
            if client.get_experiment(experiment.experiment_id).tags.get(key) != value:
                raise


def dress_all(client: Any) -> dict[str, str]:
    """Dress every experiment that holds runs of ours; their names and paths (see `experiment_path`)."""
    found = {}
    token = None
    while True:
        page = client.search_experiments(page_token=token)
        for experiment in page:
            ours = client.search_runs([experiment.experiment_id], "tags.`crism.kind` LIKE '%'", max_results=1)
            if ours:
                dress(client, experiment)
                found[experiment.name] = experiment_path(experiment.experiment_id)
        token = page.token
        if not token:
            return found
