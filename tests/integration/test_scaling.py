"""Building beyond one machine: a real Ray cluster that loses a node, a real S3 server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crism_mlops.cluster import Where, run
from crism_mlops.config import SweepConfig
from crism_mlops.dataset.build import build_data_sets
from crism_mlops.errors import SceneError
from crism_mlops.products.observations import observation_folders
from crism_mlops.products.simulate import Simulation, write_simulation
from crism_mlops.scenes.build import SceneTask, build_scenes, load_built, open_store
from crism_mlops.scenes.sources import load_scenes

pytestmark = [
    # Ray's own start-up, and sockets that its processes leave to the garbage collector.
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve simulated observations, 48 x 48 pixels."""
    return write_simulation(Simulation(scenes=12, size=48, seed=11), tmp_path_factory.mktemp("archive"))


def sweep_of(root: Path, **data: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "study": "scaling", "experiment": "tests",
            "data": {"source": "mtrdr", "path": str(root), "resolution": 32, **data},
            "model": {"kind": "unet", "encoder": "resnet18", "encoder_weights": None},
        }
    )  # fmt: skip


def silent(what: str, done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores and two nodes with one core each, so that all work is on the nodes."""
    # The nodes' workers import the tasks below from here.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def slow(item: tuple[int, str]) -> tuple[int, str]:
    """Says who begins it, and takes a while."""
    import ray

    number, folder = item
    node = ray.get_runtime_context().get_node_id()
    with (Path(folder) / f"{number}.log").open("a") as handle:
        handle.write(f"{node}\n")
    time.sleep(2.0)
    return number, node


def refuse(item: int) -> int:
    raise SceneError(f"scene {item} is no good")


def test_a_lost_node_s_work_is_done_again(ray_cluster: Any, tmp_path: Path) -> None:
    cluster, nodes = ray_cluster
    where = Where(ray=cluster.address)
    found: dict[int, tuple[int, str]] = {}
    for index, result in run(slow, [(number, str(tmp_path)) for number in range(6)], where):
        found[index] = result
        if len(found) == 2:
            time.sleep(0.5)  # Each node has begun its next task.
            cluster.remove_node(nodes[0], allow_graceful=False)
    assert {index: number for index, (number, _) in found.items()} == {i: i for i in range(6)}
    begun = {path.stem: path.read_text().split() for path in tmp_path.glob("*.log")}
    twice = [nodes for nodes in begun.values() if len(nodes) > 1]
    assert twice, "the lost node was at work on something"
    assert all(len(set(nodes)) == 2 for nodes in twice), "which was done again on the other one"


def test_an_observation_is_a_task(ray_cluster: Any, archive: Path) -> None:
    cluster, _ = ray_cluster
    where = Where(ray=cluster.address)
    here = load_scenes(sweep_of(archive, store=str(Path("here").absolute())).data)
    sweep = sweep_of(archive, store=str(Path("there").absolute()), cache=str(Path("cache").absolute()))
    report = build_data_sets(sweep, silent, where)
    assert (report.made, report.left_out) == (12, {})
    assert [scene.content for scene in report.scenes] == [scene.content for scene in here]
    assert report.data_sets[0].samples == len(open_store(sweep.data).names("samples")) * 7
    with pytest.raises(SceneError, match="scene 1 is no good"):
        list(run(refuse, [1], where))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on this machine, and a bucket of it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    # Servers of one process share what they hold: each test has a bucket of its own.
    name = f"mars-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(name)
    try:
        yield f"s3://{name}/crism"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def test_a_store_on_s3(bucket: str, archive: Path) -> None:
    import s3fs

    sweep = sweep_of(archive, store=bucket, cache="one")
    first = build_data_sets(sweep, silent, Where(workers=2))
    assert first.made == 12
    remote = s3fs.S3FileSystem().find(bucket.removeprefix("s3://"))
    assert len([name for name in remote if "/scenes/" in name]) == 12
    assert len([name for name in remote if "/datasets/" in name]) == 1
    assert not [name for name in remote if ".partial" in name or ".lock" in name]
    # Another machine: its mirror is empty, it has the folder of observations and the store's URL.
    again = build_data_sets(sweep_of(archive, store=bucket, cache="two"), silent)
    assert again.made == 0
    assert [scene.content for scene in again.scenes] == [scene.content for scene in first.scenes]
    assert again.data_sets == first.data_sets


def test_dropped_cubes_live_on_in_the_store(bucket: str, tmp_path: Path) -> None:
    root = write_simulation(Simulation(scenes=4, size=48, seed=12), tmp_path)
    config = sweep_of(root, store=bucket).data
    tasks = [SceneTask(folder, root, config, drop=True) for folder in observation_folders(root)]
    assert len(load_built(build_scenes(tasks), config)) == 4
    assert not list(root.rglob("*.img"))
    elsewhere = sweep_of(root, store=bucket, cache="another-machine").data
    assert [scene.carbonate_bearing is not None for scene in load_scenes(elsewhere)].count(True) >= 1
