"""These tests run in two processes (`make test-integration`), the longest first, so that neither is left alone at the
end. Tests of a module share its fixtures and stay together, but for those that cost more than what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LONGEST = ("test_main_job", "test_stack", "test_study_engine", "test_mlflow_ui")
APART = ("test_study_engine", "test_resume")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem not in APART and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """Without its groups each process would make every module's servers and studies, which run into each other."""
    if node.config.option.dist != "loadgroup":
        return
    alone = [one for one in ids if "@" not in one and Path(one.split("::")[0]).stem not in APART]
    if alone:
        pytest.exit(f"xdist has lost the group of {alone[0]}: is pytest newer than in requirements.lock?", 1)
