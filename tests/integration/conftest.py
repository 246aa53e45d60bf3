"""These tests run in two processes (`make test-integration`), the longest first, so that neither is left alone at the
end. Tests of a module share its fixtures and stay together, but for those that cost more than what they share."""

from __future__ import annotations

import pytest

LONGEST = ("test_main_job", "test_stack", "test_study_engine", "test_mlflow_ui")
APART = ("test_study_engine", "test_resume")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem not in APART and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish(session: pytest.Session) -> None:
    # Without its groups each process would make every module's servers and studies, which run into each other.
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        if item.get_closest_marker("xdist_group") is not None and "@" not in item.nodeid:
            raise pytest.UsageError("xdist does not see the tests' groups: is pytest newer than the lock file's?")
