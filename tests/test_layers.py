"""The house of ARCHITECTURE: a stage imports only from stages above it, and mlflow, optuna and ray
each have their rooms. Read from the source, so that a lazy import inside a function counts too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import crism_mlops

ROOT = Path(crism_mlops.__file__).parent
STAGES = {
    "errors": 0, "config": 0, "config_promotion": 0, "config_run": 0, "config_search": 0, "config_study": 0,
    "config_text": 0, "cluster": 0, "interrupts": 0, "quiet": 0, "untrusted": 0, "redact": 0,
    "products": 1, "scenes": 2, "dataset": 3, "models": 4, "training": 5, "evaluation": 6, "tracking": 7,
    "tracking_store": 7, "tracking_send": 7, "tracking_model": 7, "tracking_data": 7, "tracking_view": 7,
    "tracking_system": 7, "tracking_registry": 7, "tracking_lineage": 7, "outbox": 7, "buffered": 7,
    "studies": 8, "reports": 9, "registry": 10, "terminal": 11, "cli_data": 11, "cli_doctor": 11, "cli_lineage": 11,
    "cli_predict": 11, "cli_registry": 11, "cli_report": 11, "cli_schema": 11, "cli_score": 11, "cli_serve": 11,
    "cli_study": 11, "cli_status": 11,
    "watch": 11, "cli_vae": 11, "cli": 11,
}  # fmt: skip
ROOMS = {
    "mlflow": ("tracking", "registry/"),
    "optuna": ("studies/", "reports/"),
    "ray": ("cluster.py",),
}
MODULES = sorted(ROOT.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def stage_of(module: str) -> int | None:
    parts = module.split(".")
    return STAGES.get(parts[1]) if parts[0] == "crism_mlops" and len(parts) > 1 else None


def test_every_module_has_a_stage() -> None:
    for path in MODULES:
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert part in STAGES or part == "__init__", f"{path}: in no stage"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_up_only(path: Path) -> None:
    own = STAGES.get(path.relative_to(ROOT).parts[0].removesuffix(".py"), 11)
    for module in imports_of(path):
        stage = stage_of(module)
        assert stage is None or stage <= own, f"{path.name} (stage {own}) imports {module} (stage {stage})"


@pytest.mark.parametrize("library", sorted(ROOMS))
def test_libraries_stay_in_their_rooms(library: str) -> None:
    for path in MODULES:
        where = str(path.relative_to(ROOT))
        if any(name == library or name.startswith(library + ".") for name in imports_of(path)):
            assert where.startswith(ROOMS[library]), f"{where} imports {library}"
