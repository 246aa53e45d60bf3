"""Search and download against a local server that answers in ODE's form and misbehaves."""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ode_server import Fault, OdeServer, ode_server

from crism_mlops.errors import CrismError
from crism_mlops.products import transfer
from crism_mlops.products.download import DownloadReport, download, estimate, fetch_observation, select
from crism_mlops.products.observations import open_observation
from crism_mlops.products.ode import Box, FoundFile, Observation, Query, Service, _product, _results, parse_box, search
from crism_mlops.products.service import ArchiveError, Patience, TryAgainError, checked_url
from crism_mlops.products.transfer import DiskFullError

BIG = "_07_if164j_mtr3.img"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def ode() -> Iterator[OdeServer]:
    with ode_server() as server:
        yield server


@pytest.fixture
def full(ode: OdeServer, observation: Path) -> OdeServer:
    """A server with one simulated observation (six files, 3.2 MB)."""
    ode.add_folder(observation)
    return ode


def to(ode: OdeServer, **settings: Any) -> Service:
    """The service at the local server; nobody sleeps."""
    return Service(f"{ode.url}/live2", (ode.host,), **({"backoff_s": 0.0, "timeout_s": 5.0} | settings))


def found(ode: OdeServer) -> Observation:
    (one,) = search(Query(ids=("FRT",)), to(ode))
    return one


def path_of(ode: OdeServer, ending: str) -> str:
    (path,) = (path for path in ode.files if path.lower().endswith(ending))
    return path


def same(folder: Path, original: Path) -> None:
    """The archive's files are all there, byte for byte, and nothing else is to be seen."""
    names = {p.name for p in original.iterdir() if p.suffix in (".img", ".hdr", ".lbl")}
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == names
    for name in names:
        assert (folder / name).read_bytes() == (original / name).read_bytes(), name
    assert not list(folder.glob(".*.part"))


# Search


def test_a_product_comes_as_a_list_as_one_and_not_at_all(ode: OdeServer, observation: Path) -> None:
    assert search(Query(ids=("FRT",)), to(ode)) == []
    ode.add_folder(observation)
    (one,) = search(Query(ids=(observation.name,)), to(ode))
    assert one.observation_id == observation.name
    assert [product.kind for product in one.products] == ["de", "if"]
    first = one.products[0]
    assert (first.level, first.longitude_deg, first.latitude_deg) == ("mtr", -74.5, 22.113)
    assert first.box is not None
    assert (first.box.west, first.box.south, first.box.north) == (pytest.approx(-74.6), 22.0, 22.2)
    assert first.footprint_wkt is not None
    assert first.footprint_wkt.startswith("POLYGON")
    assert first.start_utc == "2007-01-30T12:34:56.789000"
    assert {file.name.rpartition(".")[2] for file in first.files} == {"IMG", "HDR", "LBL"}
    image = next(file for file in first.files if file.name.endswith(".IMG"))
    assert image.bytes == pytest.approx(40 * 40 * 14 * 4, abs=2048)
    del ode.products[1:]
    (one,) = search(Query(ids=("FRT",)), to(ode))
    assert len(one.products) == 1


def test_the_query_is_in_odes_words(ode: OdeServer) -> None:
    search(Query(ids=("frt000047a3",)), to(ode))
    search(Query(region="Nili fossae"), to(ode))
    by_id, by_region = (request.query for request in ode.log)
    fixed = {"query": "product", "results": "opmf", "output": "JSON", "target": "mars", "ihid": "MRO", "iid": "CRISM"}
    assert by_id == fixed | {"pt": "MTRDR", "pdsid": "FRT000047A3*", "limit": "200", "offset": "0"}
    box = {"minlat": "17", "maxlat": "26", "westernlon": "71", "easternlon": "80"}
    assert by_region == fixed | box | {"pt": "MTRDR", "limit": "200", "offset": "0"}


@pytest.mark.parametrize("largest", [1000, 7])
@pytest.mark.parametrize("count", ["25", "", "10"])
def test_pages_until_all_is_there(ode: OdeServer, largest: int, count: str) -> None:
    """Also where the service gives fewer than asked for, no count, or the page's count."""
    ode.products = [ode.product(f"frt{n:08x}_07_if164j_mtr3", []) for n in range(25)]
    ode.largest_page = largest

    def answer(query: dict[str, str]) -> Any:
        content = ode.page(query)
        content["ODEResults"]["Count"] = count
        return content

    ode.answer = answer
    observations = search(Query(region="nili_fossae"), to(ode, page=10))
    expected = 10 if (largest, count) == (7, "10") else 25
    assert len(observations) >= expected
    assert len({one.observation_id for one in observations}) == len(observations)
    if largest == 1000 and count == "25":
        assert [request.query["offset"] for request in ode.log] == ["0", "10", "20"]
    assert len(search(Query(region="nili_fossae"), to(ode, page=10), limit=3)) == 3


def test_a_service_that_repeats_itself_or_ends_early(ode: OdeServer, caplog: pytest.LogCaptureFixture) -> None:
    ode.products = [ode.product(f"frt{n:08x}_07_if164j_mtr3", []) for n in range(10)]
    ode.answer = lambda query: ode.page(query | {"offset": "0"})
    assert len(search(Query(region="nili_fossae"), to(ode, page=4))) == 4
    assert len(ode.log) == 2

    def early(query: dict[str, str]) -> Any:
        content = ode.page(query)
        content["ODEResults"]["Count"] = "1000000"
        return content

    ode.answer = early
    assert len(search(Query(region="nili_fossae"), to(ode, page=4))) == 10
    assert len(ode.log) == 2 + 4
    assert [record.getMessage().partition(" ")[2] for record in caplog.records if record.levelname == "WARNING"] == [
        "announces 10 products and gives 4", "announces 1000000 products and gives 10",
    ]  # fmt: skip


def test_products_are_grouped_and_none_is_there_twice(ode: OdeServer) -> None:
    stems = ["frt000047a3_07_sr164j_mtr3", "frt000047a3_07_if164j_mtr3", "hrl000047a4_07_if164j_mtr3"]
    ode.products = [ode.product(stem, []) for stem in [*stems, *stems, "nonsense"]] + [{}]
    one, other = search(Query(ids=("FRT", "HRL", "FRT000047A3")), to(ode))
    assert [p.kind for p in one.products] == ["if", "sr"]
    assert other.observation_id == "hrl000047a4"


@pytest.mark.parametrize("status", ["OK", "success", "SUCCESS", None])
def test_any_status_but_error_is_right(ode: OdeServer, status: str | None) -> None:
    ode.products = [ode.product("frt000047a3_07_if164j_mtr3", [])]

    def answer(query: dict[str, str]) -> Any:
        content = ode.page(query)
        content["ODEResults"]["Status"] = status
        return content

    ode.answer = answer
    assert len(search(Query(ids=("FRT",)), to(ode))) == 1


@pytest.mark.parametrize("status", ["ERROR", "Error", " error"])
def test_an_error_of_the_service_is_one_line(ode: OdeServer, status: str) -> None:
    ode.answer = lambda query: {"ODEResults": {"Status": status, "Error": "no such\n\x1b[31mproduct type"}}
    with pytest.raises(ArchiveError, match=r"refuses the query: no such \[31mproduct type$") as caught:
        search(Query(ids=("FRT",)), to(ode))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("answer", "words"),
    [([], "no ODEResults"), ({}, "no ODEResults"), ({"ODEResults": "x"}, "no ODEResults")],
)
def test_json_in_another_form(ode: OdeServer, answer: Any, words: str) -> None:
    ode.answer = lambda query: answer
    with pytest.raises(ArchiveError, match=words):
        search(Query(ids=("FRT",)), to(ode))


def test_a_web_page_in_the_place_of_json(ode: OdeServer) -> None:
    ode.faults["/live2"] = [Fault(text="<!DOCTYPE html><h1>Down for maintenance")]
    with pytest.raises(ArchiveError, match="not a JSON answer but text/html that begins '<!DOCTYPE html>"):
        search(Query(ids=("FRT",)), to(ode))


def test_an_answer_without_end(ode: OdeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crism_mlops.products.service.MAX_JSON_BYTES", 1 << 20)
    ode.answer = lambda query: "x" * (2 << 20)
    with pytest.raises(ArchiveError, match="more than 1 MB"):
        search(Query(ids=("FRT",)), to(ode))


@pytest.mark.parametrize(
    "fault", [Fault(status=503), Fault(status=500), Fault(cut=10), Fault(cut=0, reset=True), Fault(status=429)]
)
def test_the_service_is_asked_again(full: OdeServer, fault: Fault) -> None:
    full.faults["/live2"] = [fault, fault]
    assert len(search(Query(ids=("FRT",)), to(full))) == 1
    assert len(full.log) == 3


def test_a_slow_service_ends_in_a_line(ode: OdeServer) -> None:
    ode.faults["/live2"] = [Fault(stall=0.5)] * 2
    with pytest.raises(ArchiveError, match=r"no answer from http://.* within 0.05 s; given up after 2 tries"):
        search(Query(ids=("FRT",)), to(ode, timeout_s=0.05, tries=2))


def test_nobody_there() -> None:
    with pytest.raises(ArchiveError, match=r"no connection .*refused.* given up after 2 tries"):
        search(Query(ids=("FRT",)), Service("http://127.0.0.1:1/live2", ("127.0.0.1",), tries=2, backoff_s=0.0))


def test_waits_grow_and_the_servers_word_counts() -> None:
    waits: list[float] = []
    patience = Patience(Service(tries=6, backoff_s=1.0, longest_wait_s=9.0, sleep=waits.append), "it")
    for _ in range(5):
        patience.wait(TryAgainError("503"))
    assert [2 <= waits[0] <= 3, 4 <= waits[1] <= 5, 8 <= waits[2] <= 9, waits[3]] == [True, True, True, 9.0]
    with pytest.raises(ArchiveError, match="it: 503; given up after 6 tries"):
        patience.wait(TryAgainError("503"))
    del waits[:]
    patience.reset()
    for after in ("0", "3", "86400", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "9" * 400):
        patience.reset()
        patience.wait(TryAgainError("429", after))
    assert waits == [3.0, 9.0, 9.0]


# Places


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("74,20,76,23", [(74, 76)]),
        ("-10,-5,10,5", [(350, 360), (0, 10)]),
        ("350,-5,10,5", [(350, 360), (0, 10)]),
        ("170,-5,-170,5", [(170, 190)]),
        ("170,-5,190,5", [(170, 190)]),
        ("-180,-90,180,90", [(0, 360)]),
        ("0,-90,360,90", [(0, 360)]),
        ("-38,-37.5,-34,-34", [(322, 326)]),
        ("350,0,360,1", [(350, 360)]),
    ],
)
def test_boxes(text: str, asked: list[tuple[float, float]]) -> None:
    assert parse_box(text).asked() == asked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2,3", "not a box"), ("a,b,c,d", "not a box"), ("", "not a box"), ("1,5,2,5", "latitudes"),
        ("1,5,2,4", "latitudes"), ("1,-91,2,4", "latitudes"), ("-181,0,2,4", "longitudes"), ("1,0,361,4", "longitudes"),
        ("nan,0,1,1", "four numbers"), ("inf,0,1,1", "four numbers"), ("5,0,5,1", "0 degrees wide"),
        ("-170,0,350,1", "520 degrees wide"),
    ],
)  # fmt: skip
def test_what_is_no_box(text: str, words: str) -> None:
    with pytest.raises(ArchiveError, match=words):
        parse_box(text)


@given(st.tuples(*[st.floats(-180, 360)] * 2), st.floats(-180, 360))
def test_a_box_asks_for_what_it_holds(edges: tuple[float, float], longitude: float) -> None:
    box = Box(edges[0], 0.0, edges[1], 1.0)
    try:
        asked = box.asked()
    except ArchiveError:
        return
    assert all(0.0 <= w <= e <= 360.0 for w, e in asked)
    width = (edges[1] - edges[0]) if edges[0] <= edges[1] else edges[1] - edges[0] + 360.0
    assert sum(e - w for w, e in asked) == pytest.approx(width, abs=1e-9)
    beyond = (longitude - edges[0]) % 360.0
    if 1e-6 < beyond < width - 1e-6:
        point = longitude % 360.0
        assert any(w - 1e-6 <= point <= e + 1e-6 for w, e in asked)


def test_a_region_nobody_knows_names_those_that_are(ode: OdeServer) -> None:
    with pytest.raises(ArchiveError, match=r"no region 'Olympus'; known are coprates, .*nili_fossae"):
        search(Query(region="Olympus"), to(ode))
    for name in ("NILI FOSSAE", "nili_fossae", "NiliFossae"):
        search(Query(region=name), to(ode))
    assert {request.query["westernlon"] for request in ode.log} == {"71"}


@pytest.mark.parametrize("identity", ["FRT000047A3*", "FRT 1", "../x", "", "FRT000047A3A", "FRTXYZ", "FRT&pt=EDR"])
def test_ids_that_are_none(ode: OdeServer, identity: str) -> None:
    with pytest.raises(ArchiveError, match="is not an observation id"):
        search(Query(ids=(identity,)), to(ode))
    assert ode.log == []


@pytest.mark.parametrize("query", [Query(), Query(region="x", ids=("FRT",)), Query(box=Box(1, 0, 2, 1), region="y")])
def test_one_way_of_asking(ode: OdeServer, query: Query) -> None:
    with pytest.raises(ArchiveError, match="give one of"):
        search(query, to(ode))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=2)
PLACES = ["Center_latitude", "Center_longitude", "Westernmost_longitude", "Easternmost_longitude", "Minimum_latitude"]
FIELDS = st.dictionaries(st.sampled_from([*PLACES, "pdsid", "Footprint_C0_geometry", "UTC_start_time"]), LEAVES)
FILES = st.dictionaries(st.sampled_from(["FileName", "URL", "KBytes", "Type"]), LEAVES)


@given(FIELDS, st.one_of(FILES, st.lists(FILES | LEAVES, max_size=3), LEAVES), LEAVES, LEAVES)
def test_whatever_stands_in_an_answer(fields: dict[str, Any], files: Any, count: Any, status: Any) -> None:
    product = fields | {"Product_files": {"Product_file": files}}
    answer = {"ODEResults": {"Status": status, "Count": count, "Products": {"Product": product}}}
    try:
        products, total = _results(answer, Service())
    except CrismError:
        return
    assert total is None or total >= 0
    parsed = _product("FRT000047A3_07_IF164J_MTR3", products[0])
    assert parsed.longitude_deg is None or -180.0 <= parsed.longitude_deg <= 180.0
    assert select(Observation("frt000047a3", (parsed,))).files == ()


@pytest.mark.parametrize("wkt", ["", "POLYGON ((1 2", "POINT EMPTY", "x", 5, None, {"a": "b"}, "POINT (nan 1)"])
def test_a_footprint_that_is_none(wkt: Any) -> None:
    assert _product("FRT000047A3_07_IF164J_MTR3", {"Footprint_C0_geometry": wkt}).footprint_wkt is None


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7168), ("0", 0), ("-5", None), ("x", None), ("1e99", None), (3, 3072)]
)
def test_sizes(text: Any, size: int | None) -> None:
    fields = {"Product_files": {"Product_file": {"FileName": "a", "KBytes": text}}}
    assert _product("x", fields).files[0].bytes == size


# Addresses


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://pds-geosciences.wustl.edu/mro/x.img", "https://pds-geosciences.wustl.edu/mro/x.img"),
        ("http://PDS-geosciences.wustl.edu:80/x", "https://pds-geosciences.wustl.edu/x"),
        ("https://pds-geosciences.wustl.edu:443/x", "https://pds-geosciences.wustl.edu/x"),
    ],
)
def test_the_archives_hosts_are_asked_over_https(url: str, asked: str) -> None:
    assert checked_url(url, Service()) == asked


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/x", "https://pds-geosciences.wustl.edu.example.org/x", "https://wustl.edu/x",
        "https://pds-geosciences.wustl.edu:8443/x", "https://pds-geosciences.wustl.edu@example.org/x",
        "https://me:pw@pds-geosciences.wustl.edu/x", "https://example.org\\@pds-geosciences.wustl.edu/x",
        "file:///etc/passwd", "ftp://pds-geosciences.wustl.edu/x", "//pds-geosciences.wustl.edu/x", "x", "",
        "https://pds-geosciences.wustl.edu/a b", "https://127.0.0.1/x", "https://[::1]/x", "https://[x/",
        "https://pds-geosciences.wustl.edu./x",
    ],
)  # fmt: skip
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ArchiveError):
        checked_url(url, Service())


def test_a_host_that_the_user_names() -> None:
    service = Service(allowed=("mirror.example.org", "127.0.0.1:8000"))
    for url in ("http://mirror.example.org/x", "https://mirror.example.org:99/x", "http://127.0.0.1:8000/x"):
        assert checked_url(url, service) == url
    with pytest.raises(ArchiveError, match=r"on the host 127.0.0.1:8001; .*--allow-host 127.0.0.1:8001"):
        checked_url("http://127.0.0.1:8001/x", service)
    with pytest.raises(ArchiveError, match="not a host"):
        checked_url("http://x/", Service(allowed=("http://x",)))


@given(st.text())
def test_no_address_is_a_surprise(text: str) -> None:
    for url in (text, f"https://{text}", f"https://pds-geosciences.wustl.edu/{text}"):
        try:
            asked = checked_url(url, Service())
        except ArchiveError:
            continue
        assert asked.startswith(("https://pds-geosciences.wustl.edu/", "https://oderest.rsl.wustl.edu/"))


# Choice of files


def listed(*names: str) -> Observation:
    files = tuple(FoundFile(name, "https://pds-geosciences.wustl.edu/x", 1024, "Product") for name in names)
    return Observation("frt000047a3", (replace(_product("FRT000047A3_07_IF164J_MTR3", {}), files=files),))


def test_files_in_the_order_of_fetching() -> None:
    stem = "FRT000047A3_07_IF164J_MTR3"
    chosen = select(
        listed(f"{stem}.IMG", f"{stem}.LBL", f"{stem}.HDR", "FRT000047A3_07_BRTANJ_MTR3.IMG", f"{stem}.PNG")
    )
    assert [file.name for file in chosen.files] == [f"{stem}.{s}".lower() for s in ("HDR", "LBL", "IMG")]
    assert chosen.left_out == ("of another kind", "a suffix that is not kept")
    assert chosen.missing == ()
    assert [f.name for f in select(listed("FRT000047A3_07_BRTANJ_MTR3.IMG"), ("br",)).files] == [
        "frt000047a3_07_brtanj_mtr3.img"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "../frt000047a3_07_if164j_mtr3.img", "/etc/frt000047a3_07_if164j_mtr3.img", "..\\frt000047a3_07_if.img",
        ".frt000047a3_07_if164j_mtr3.img", "frt000047a3_07_if164j_mtr3.img/..", "frt000047a3_07_if164j_mtr3.img\0",
        "frt000047a3_07_if164j_mtr3.img\n", "frt000047a3_07_if164j_mtr3.img.exe", "frt000047a3_07_if164j_mtr3", "",
        "frt000047a4_07_if164j_mtr3.img", "readme.txt", "frt000047a3_07_if164j_mtr3.", "C:frt000047a3_07_if.img",
        "frt000047a3_07_\u0131f164j_mtr3.img",
    ],
)  # fmt: skip
def test_names_that_are_not_taken(name: str) -> None:
    chosen = select(listed(name))
    assert chosen.files == ()
    assert len(chosen.left_out) == len(chosen.missing) == 1


@given(st.text())
def test_no_name_leaves_the_folder(name: str) -> None:
    for file in select(listed(name, f"frt000047a3_07_if164j_mtr3{name}")).files:
        assert Path(file.name).name == file.name
        assert not file.name.startswith(".")


@pytest.mark.parametrize("kind", ["../", "i", "IF", "ifs", ""])
def test_kinds_that_are_none(kind: str) -> None:
    with pytest.raises(ArchiveError, match="not a kind"):
        select(listed(), (kind,))


# Download


def test_files_come_whole_and_only_once(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    changes: list[int] = []
    report = download([found(full)], tmp_path / "data", to(full), on_bytes=changes.append)
    size = sum(len(content) for content in full.files.values())
    assert report == DownloadReport(6, 0, size, (), ())
    assert sum(changes) == size
    folder = tmp_path / "data" / observation.name
    same(folder, observation)
    assert open_observation(folder)["if"].shape == (40, 40, 489)
    full.log.clear()
    assert download([found(full)], tmp_path / "data", to(full)) == DownloadReport(0, 6, 0, (), ())
    assert [request.path for request in full.log] == ["/live2"]


def test_a_file_from_elsewhere_is_compared_with_the_archives(
    full: OdeServer, observation: Path, tmp_path: Path
) -> None:
    folder = tmp_path / observation.name
    shutil.copytree(observation, folder, ignore=shutil.ignore_patterns("truth*"))
    image = next(folder.glob(f"*{BIG}"))
    image.write_bytes(image.read_bytes()[:1000])
    report = download([found(full)], tmp_path, to(full))
    assert (report.fetched, report.there, report.failed) == (1, 5, ())
    same(folder, observation)


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=503), Fault(status=503)],
        [Fault(status=429, headers={"Retry-After": "0"})],
        [Fault(cut=100_000)],
        [Fault(cut=100_000, reset=True), Fault(cut=200_000)],
        [Fault(cut=0, reset=True)],
        [Fault(cut=100_000, stall=1.0)],
        [Fault(lie=500)],
        [Fault(cut=100_000), Fault(no_range=True)],
        [Fault(cut=100_000), Fault(more=5)],
        [Fault(cut=100_000), Fault(status=206, headers={"Content-Range": "bytes 5-9/10"})],
        [Fault(cut=100_000), Fault(status=206)],
        [Fault(cut=100_000), Fault(status=416)],
        [Fault(no_length=True)],
    ],
)
def test_what_passes_passes(full: OdeServer, observation: Path, tmp_path: Path, faults: list[Fault]) -> None:
    path = path_of(full, BIG)
    full.faults[path] = list(faults)
    report = download([found(full)], tmp_path, to(full, timeout_s=0.3))
    assert report.failed == ()
    same(tmp_path / observation.name, observation)


def test_a_truncated_body_is_gone_on_with(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    path = path_of(full, BIG)
    size = len(full.files[path])
    full.faults[path] = [Fault(cut=size // 2), Fault(cut=size // 4)]
    download([found(full)], tmp_path, to(full))
    same(tmp_path / observation.name, observation)
    first, second, third = full.requests(path)
    assert (first.range, second.status, third.status) == (None, 206, 206)
    assert third.range is not None
    assert int(third.range[6:-1]) > size * 0.7
    assert second.if_range == third.if_range
    assert second.if_range is not None
    # What was read before a break-off may be lost, a piece (64 KiB) at most.
    assert first.sent + second.sent + third.sent <= size + 2 * (1 << 16)


def test_a_file_that_changed_is_fetched_anew(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    path = path_of(full, BIG)
    right = full.files[path]
    full.files[path] = bytes(len(right))
    full.faults[path] = [Fault(cut=100_000)]
    assert download([found(full)], tmp_path, to(full, tries=1)).failed
    part = tmp_path / observation.name / f".{observation.name}{BIG}.part"
    assert 30_000 < part.stat().st_size <= 100_000
    full.files[path] = right
    assert download([found(full)], tmp_path, to(full)).complete
    same(tmp_path / observation.name, observation)


def test_without_validators_the_length_decides(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    full.validators = False
    path = path_of(full, BIG)
    full.faults[path] = [Fault(cut=1_000_000)]
    assert download([found(full)], tmp_path, to(full)).complete
    assert full.requests(path)[1].status == 206
    same(tmp_path / observation.name, observation)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=503), "answers 503 Service Unavailable; given up after 3 tries"),
        (Fault(status=404), "answers 404 Not Found"),
        (Fault(lie=7), "given up after 3 tries"),
        (Fault(text="<html>log in"), "a web page in the place of the file"),
        (Fault(lie=10**13), "more than any product has"),
        (Fault(no_length=True, more=10**6), "more than the [0-9]+ bytes announced"),
        (Fault(cut=9_000, no_range=True), "given up after 3 tries"),
        (Fault(status=302, headers={"Location": "https://example.org/x.img"}), "on the host example.org"),
        (Fault(status=302, headers={"Location": "file:///etc/passwd"}), "not an address"),
        (Fault(status=302, headers={"Location": "/data/loop"}), "redirected more than 5 times"),
    ],
)
def test_what_stays_wrong_is_named_and_the_others_come(
    full: OdeServer, observation: Path, tmp_path: Path, fault: Fault, words: str
) -> None:
    path = path_of(full, BIG)
    full.faults[path] = [fault] * 20
    full.faults["/data/loop"] = [Fault(status=302, headers={"Location": "/data/loop"})] * 20
    report = download([found(full)], tmp_path, to(full, tries=3))
    (line,) = report.failed
    assert line.startswith(f"{observation.name}{BIG}: ")
    assert re.search(words, line), line
    assert report.fetched == 5
    assert not (tmp_path / observation.name / f"{observation.name}{BIG}").exists()
    full.faults.clear()
    assert download([found(full)], tmp_path, to(full)).complete
    same(tmp_path / observation.name, observation)


def test_a_redirect_within_the_allowed_hosts(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    path = path_of(full, BIG)
    full.faults[path] = [Fault(status=301, headers={"Location": "/moved"}), Fault(cut=5)]
    full.files["/moved"] = full.files[path]
    assert download([found(full)], tmp_path, to(full)).complete
    same(tmp_path / observation.name, observation)


def test_a_file_on_another_host(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    for product in full.products:
        for file in product["Product_files"]["Product_file"]:
            if file["FileName"].endswith(".LBL"):
                file["URL"] = "https://example.org/" + file["FileName"]
    report = download([found(full)], tmp_path, to(full))
    assert len(report.failed) == 2
    assert all("on the host example.org" in line for line in report.failed)
    assert report.fetched == 4


def test_names_with_a_path_write_nothing(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    evil = ["../../evil.img", "/tmp/evil_07_if164j_mtr3.img", f"../{observation.name}_07_if164j_mtr3.img"]
    for name in evil:
        full.products[0]["Product_files"]["Product_file"].append(
            {"FileName": name, "URL": f"{full.url}{path_of(full, BIG)}", "KBytes": "1"}
        )
    report = download([found(full)], tmp_path / "data", to(full))
    assert report.complete
    assert report.left_out == (("a name that is not a plain file name", 3),)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    same(tmp_path / "data" / observation.name, observation)


def test_a_folder_that_is_a_link_out(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / observation.name).symlink_to(outside)
    (line,) = download([found(full)], tmp_path / "data", to(full)).failed
    assert "a link out of" in line
    assert list(outside.iterdir()) == []


def test_a_part_that_is_a_link(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / observation.name
    folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("mine")
    (folder / f".{observation.name}{BIG}.part").symlink_to(tmp_path / "precious")
    (line,) = download([found(full)], tmp_path / "data", to(full)).failed
    assert BIG in line
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_image_that_does_not_fit_its_header(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    path = path_of(full, BIG)
    right = full.files[path]
    full.files[path] = right[:-4]
    report = download([found(full)], tmp_path, to(full))
    (line,) = report.failed
    folder = tmp_path / observation.name
    assert line.startswith(f"{observation.name}{BIG}: ")
    assert "put aside" in line
    assert not (folder / f"{observation.name}{BIG}").exists()
    assert (folder / f".{observation.name}{BIG}.wrong").stat().st_size == len(right) - 4
    full.files[path] = right
    assert download([found(full)], tmp_path, to(full)).complete
    same(folder, observation)


def test_room_on_the_disk(full: OdeServer, observation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = found(full)
    need = estimate([one], tmp_path / "not" / "yet")
    assert (need.observations, need.files, need.here_bytes, need.unknown) == (1, 6, 0, 0)
    assert need.bytes == pytest.approx(sum(map(len, full.files.values())), abs=6 * 1024)
    free = need.bytes + transfer.RESERVE_BYTES - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(DiskFullError, match=r"0.00 GB to fetch, 0.27 GB free"):
        download([one], tmp_path / "data", to(full))
    assert not (tmp_path / "data").exists()
    # Sizes that the archive does not tell are seen when the file comes.
    unknown = replace(one, products=tuple(
        replace(p, files=tuple(replace(f, bytes=None) for f in p.files)) for p in one.products
    ))  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=transfer.RESERVE_BYTES + 10**6))
    with pytest.raises(DiskFullError, match=f"^{observation.name}{BIG}: .* GB to fetch"):
        download([unknown], tmp_path / "data", to(full))
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert download([unknown], tmp_path / "data", to(full)).complete


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_disk_that_fills_up(
    full: OdeServer, observation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    other = replace(found(full), observation_id="frt00000001")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(DiskFullError, match="the disk is full; what was fetched is kept"):
            download([found(full), other], tmp_path, to(full), jobs=jobs)
    assert list((tmp_path / observation.name).glob(".*.part"))
    assert download([found(full)], tmp_path, to(full)).complete
    same(tmp_path / observation.name, observation)


def test_a_folder_that_cannot_be_written(full: OdeServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CrismError, match="file"):
        fetch_observation(found(full), tmp_path / "file", to(full))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"url": 1}}', "\0", "[" * 100_000])
def test_a_damaged_record(full: OdeServer, observation: Path, tmp_path: Path, content: str) -> None:
    folder = fetch_observation(found(full), tmp_path, to(full))
    (folder / transfer.RECORD).write_text(content)
    logging.disable(logging.WARNING)
    try:
        assert download([found(full)], tmp_path, to(full)).there == 6
    finally:
        logging.disable(logging.NOTSET)
    same(folder, observation)


def test_several_at_a_time(ode: OdeServer, observation: Path, tmp_path: Path) -> None:
    for number in range(5):
        folder = tmp_path / "source" / f"frt0000000{number}"
        folder.mkdir(parents=True)
        for path in observation.iterdir():
            if path.suffix in (".img", ".hdr", ".lbl"):
                text = path.name.replace(observation.name, folder.name)
                content = path.read_bytes()
                if path.suffix == ".lbl":
                    content = content.replace(observation.name.upper().encode(), folder.name.upper().encode())
                (folder / text).write_bytes(content)
        ode.add_folder(folder)
    bad = path_of(ode, f"frt00000003{BIG}")
    ode.faults[bad] = [Fault(status=404)] * 9
    said: list[str] = []
    report = download(
        search(Query(ids=("FRT",)), to(ode)), tmp_path / "data", to(ode), jobs=3,
        on_observation=lambda name, one: said.append(f"{name} {len(one.failed)}"),
    )  # fmt: skip
    assert sorted(said) == [f"frt0000000{n} {int(n == 3)}" for n in range(5)]
    assert (report.fetched, len(report.failed)) == (29, 1)
    for number in (0, 1, 2, 4):
        same(tmp_path / "data" / f"frt0000000{number}", tmp_path / "source" / f"frt0000000{number}")


@pytest.mark.parametrize("jobs", [0, 9])
def test_jobs_have_a_limit(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(ArchiveError, match="expected 1 to 8"):
        download([], tmp_path, Service(), jobs=jobs)


def test_one_observation_for_the_builder(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    one, service = pickle.loads(pickle.dumps((found(full), to(full))))
    assert (one, service) == (found(full), to(full))
    same(fetch_observation(one, tmp_path, service), observation)
    del full.products[0]["Product_files"]["Product_file"][:]
    full.files.clear()
    with pytest.raises(ArchiveError, match=rf"^{observation.name} is not complete: .*404.* \(and 2 more\)$"):
        fetch_observation(found(full), tmp_path / "other", service)


def test_in_a_worker_process(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        task = (found(full), tmp_path, to(full))
        folders = pool.starmap(fetch_observation, [task, task])
    assert folders == [tmp_path / observation.name] * 2
    same(folders[0], observation)
    # The second one waited for the first, and found all there.
    assert [r.status for r in full.requests(path_of(full, BIG))] == [200]


FETCH = """
import sys
from pathlib import Path
from crism_mlops.products.download import download
from crism_mlops.products.ode import Query, Service, search
service = Service(sys.argv[1] + "/live2", (sys.argv[2],), backoff_s=0.0, timeout_s=30.0)
print(download(search(Query(ids=("FRT",)), service), Path(sys.argv[3]), service, jobs=int(sys.argv[4])).complete)
"""


@pytest.mark.parametrize(("kill", "jobs"), [(signal.SIGKILL, 2), (signal.SIGINT, 2), (signal.SIGINT, 1)])
def test_a_killed_download_goes_on(
    full: OdeServer, observation: Path, tmp_path: Path, kill: signal.Signals, jobs: int
) -> None:
    # A second observation, so that there are threads; it hangs from the start.
    other = full.product("frt00000001_07_if164j_mtr3", ["frt00000001_07_if164j_mtr3.hdr"])
    other["Product_files"]["Product_file"]["KBytes"] = "1"
    full.products.append(other)
    full.faults["/data/FRT00000001_07_IF164J_MTR3.HDR"] = [Fault(stall=20.0)] if jobs == 2 else []
    path = path_of(full, BIG)
    full.faults[path] = [Fault(cut=2_000_000, stall=20.0)]
    command = [sys.executable, "-c", FETCH, full.url, full.host, str(tmp_path / "data"), str(jobs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "data" / observation.name / f".{observation.name}{BIG}.part"
    for _ in itertools.takewhile(lambda _: process.poll() is None, range(3000)):
        if part.is_file() and part.stat().st_size > 1_900_000:
            break
        time.sleep(0.01)
    begun = time.monotonic()
    process.send_signal(kill)
    _, errors = process.communicate(timeout=15)
    assert time.monotonic() - begun < 10.0, "threads held the end up"
    assert process.returncode in (-kill, 130), errors
    assert part.stat().st_size > 1_900_000
    full.products.pop()
    assert download([found(full)], tmp_path / "data", to(full)).complete
    same(tmp_path / "data" / observation.name, observation)
    again = full.requests(path)[-1]
    assert (again.status, again.sent < 1_300_000) == (206, True)


def test_two_downloads_of_one_folder(full: OdeServer, observation: Path, tmp_path: Path) -> None:
    full.faults[path_of(full, BIG)] = [Fault(cut=100_000, stall=0.3)]
    reports: list[DownloadReport] = []
    one = found(full)
    threads = [threading.Thread(target=lambda: reports.append(download([one], tmp_path, to(full)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((r.fetched, r.there) for r in reports) == [(0, 6), (6, 0)]
    same(tmp_path / observation.name, observation)
