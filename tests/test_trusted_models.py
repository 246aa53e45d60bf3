"""A registered model is loaded only where its code is the package's own."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import mlflow
import pytest
import yaml
from test_checkpoint import UNET, make_checkpoint

from crism_mlops.errors import ModelError
from crism_mlops.models import unet
from crism_mlops.models.checkpoint import save_checkpoint
from crism_mlops.registry import trusted
from crism_mlops.registry.trusted import check_model_folder, load_checked
from crism_mlops.tracking_model import MODEL_CODE

# Of registry/pyfunc.py. A change of one byte has every model that is logged already refused, champions too. Where
# this test fails: first see whether the change can go elsewhere (studies/served.py, studies/request.py). If not, and
# the code of the version before still works with this package (`Served`, `Request`, `Answer` as it uses them), add its
# digest, the one that stands here, to OLDER in registry/trusted.py; if it does not, CHANGELOG.md says that earlier
# models are refused. Then set this to the new digest.
PYFUNC = "0bc48f248bc4dcedcfb01ba9ae63636ed3ae3d9d73bd0ef457ebe443041d4278"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as MLflow writes it; look, don't touch."""
    root = tmp_path_factory.mktemp("logged")
    save_checkpoint(unet.build(UNET, 3, 1), root / "checkpoint", make_checkpoint())
    mlflow.pyfunc.save_model(
        root / "model",
        python_model=str(MODEL_CODE),
        artifacts={"checkpoint": str(root / "checkpoint")},
        pip_requirements=["crism-mlops"],
    )
    return root / "model"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "model", copy_function=_linked)
    shutil.rmtree(tmp_path / "model" / "__pycache__", ignore_errors=True)
    return tmp_path / "model"


def _linked(source: str, target: str) -> None:
    """The weights are large, and no test changes them."""
    (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)


def _flavor(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = yaml.safe_load((folder / "MLmodel").read_text())
        flavor = content["flavors"]["python_function"]
        for key, value in changes.items():
            flavor[key] = value
        (folder / "MLmodel").write_text(yaml.safe_dump(content))

    return change


def _other_flavor(folder: Path) -> None:
    content = yaml.safe_load((folder / "MLmodel").read_text())
    content["flavors"]["sklearn"] = {"pickled_model": "model.pkl"}
    (folder / "MLmodel").write_text(yaml.safe_dump(content))


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)

    return write


def _append(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + content)


def _aliases(place: bytes) -> Callable[[Path], object]:
    """A file of a kilobyte whose aliases, written out, are ten million values."""
    lists = [
        b"a0: &a0 [x, x]",
        *(b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 8)),
    ]
    return _write("MLmodel", b"\n".join([*lists, b"flavors: {python_function: {%s}}" % place]))


def _long(key: bytes) -> Callable[[Path], object]:
    """A key's value is a list, which as a text has a hundred million letters."""
    flavor = b"loader_module: %s, %s: [%s]" % (trusted.LOADER.encode(), key, b",".join([b" *a"] * 1000))
    return _write("MLmodel", b"long: &a %s\nflavors: {python_function: {%s}}" % (b"x" * 100_000, flavor))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_append("pyfunc.py", b"\nimport os\n"), r"pyfunc\.py: refused, it is not this version's .*requirements\.txt"),
        (_flavor(loader_module="mlflow.pyfunc.model"), r"its loader is mlflow\.pyfunc\.model; expected"),
        (_flavor(loader_module="os"), "its loader is os"),
        (_flavor(python_model="python_model.pkl"), "python_model stands in it"),
        (_flavor(code="code"), "on Python's path"),
        (_flavor(data="/etc"), "data stands in it"),
        (_flavor(model_code_path="other.py"), "not in the folder"),
        (_flavor(model_code_path=7), "not in the folder"),
        (_flavor(artifacts={"checkpoint": {"path": "../../checkpoint", "uri": ""}}), "its artifacts are"),
        (_flavor(artifacts={"checkpoint": {"path": "/etc", "uri": ""}}), "its artifacts are"),
        (_flavor(artifacts=[1]), "its artifacts are"),
        (_other_flavor, "the flavor sklearn"),
        (_write("python_model.pkl", b"\x80\x04."), r"python_model\.pkl: refused"),
        (_write("code/crism_mlops.py", b""), r"crism_mlops\.py: refused"),
        (_write("__pycache__/pyfunc.cpython-311.pyc", b""), "remove this bytecode"),
        (_write("artifacts/checkpoint/optimizer.pt", b""), r"optimizer\.pt: refused"),
        (_write("artifacts/other/model.safetensors", b""), "refused; a model of this package"),
        (_write("MLmodel", b"[" * 3_000), "cannot be read as MLflow's model file"),
        (_write("MLmodel", b"#" * (2 << 20)), "more than"),
        (_aliases(b"loader_module: *a7"), "cannot be read.*with its aliases written out"),
        (_aliases(b"code: *a7"), "cannot be read.*with its aliases written out"),
        (_aliases(b"artifacts: {checkpoint: {path: *a7}}"), "cannot be read.*with its aliases written out"),
        (_write("MLmodel", b"flavors: {python_function: {a: 1, a: 2}}"), "cannot be read.*the key a stands twice"),
        (
            _write("MLmodel", b"flavors: {python_function: {loader_module: 0x%s}}" % (b"f" * 9000)),
            "its loader is a value of type int",
        ),
        (_flavor(loader_module=["x"]), "its loader is a value of type list"),
        (_long(b"code"), "it puts the folder a value of type list on"),
        (_long(b"model_code_path"), "its code is a value of type list, which"),
        (_long(b"model_code_path: pyfunc.py, artifacts"), "its artifacts are a value of type list"),
        (_write("MLmodel", b"flavors: {}"), "cannot be read"),
        (_write("MLmodel", b"!!python/object/apply:os.system [true]"), "cannot be read"),
        (lambda f: (f / "MLmodel").unlink(), "not a model of MLflow's"),
        (lambda f: (f / "linked").symlink_to("/etc"), "refused, it is a link"),
        (lambda f: os.mkfifo(f / "pipe"), "no ordinary file"),
    ],
)
def test_what_is_not_ours_is_refused(folder: Path, change: Callable[[Path], object], says: str) -> None:
    change(folder)
    with pytest.raises(ModelError, match=says) as error:
        check_model_folder(folder)
    assert "\n" not in str(error.value)


def test_a_change_of_the_served_code_is_a_decision() -> None:
    assert sha256(MODEL_CODE.read_bytes()).hexdigest() == PYFUNC, "see the comment at PYFUNC"


def test_code_of_an_earlier_version_is_admitted_by_its_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _append("pyfunc.py", b"# 0.0.9\n")(folder)
    monkeypatch.setattr(trusted, "OLDER", {sha256((folder / "pyfunc.py").read_bytes()).hexdigest(): "0.0.9"})
    check_model_folder(folder)


def test_bytecode_beside_the_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Python would take bytecode for the source that lies beside it."""
    check_model_folder(folder)
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nraise RuntimeError\n")
    place = Path(importlib.util.cache_from_source(str(folder / "pyfunc.py")))
    py_compile.compile(
        str(evil), cfile=str(place), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, doraise=True
    )
    model = load_checked(folder)
    assert model.metadata.flavors["python_function"]["loader_module"] == trusted.LOADER
    assert not (tmp_path / "was run").exists()
    with pytest.raises(ModelError, match="bytecode"):
        check_model_folder(folder)
