"""Expert labels: a small CSV that is either understood as a whole or refused with the line named."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crism_mlops.errors import SceneError
from crism_mlops.scenes.labels import read_labels


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "labels.csv"


def test_three_words_and_unknown_is_not_barren(table: Path) -> None:
    table.write_text(
        "observation_id,label\nFRT000047A3,Carbonate\nfrt0000643d, BARREN \nHRL00003e12,unknown\n", encoding="utf-8"
    )
    assert read_labels(table) == {"frt000047a3": True, "frt0000643d": False, "hrl00003e12": None}


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_as_spreadsheets_write_it(table: Path, start: bytes, end: bytes) -> None:
    """Byte order mark, CRLF, quotes, other columns in between, empty lines, capitals in the header."""
    lines = [
        b'"Label","seen by",Observation_ID',
        b'carbonate,"Ehlmann, 2008",frt00003e12',
        b"",
        b'barren,"two\nlines",frt0000644c',
        b",,",
        b"unknown,,frt0000645d",
    ]
    table.write_bytes(start + end.join(lines))
    assert read_labels(table) == {"frt00003e12": True, "frt0000644c": False, "frt0000645d": None}


def test_header_alone_labels_nothing(table: Path) -> None:
    table.write_text("observation_id,label\n")
    assert read_labels(table) == {}


def test_duplicates_that_agree(table: Path) -> None:
    table.write_text("observation_id,label\nfrt1,barren\nFRT1,Barren\nfrt2,unknown\nfrt2,unknown\n")
    assert read_labels(table) == {"frt1": False, "frt2": None}


@pytest.mark.parametrize("words", [("carbonate", "barren"), ("unknown", "barren"), ("carbonate", "unknown")])
def test_duplicates_that_disagree(table: Path, words: tuple[str, str]) -> None:
    table.write_text(f"observation_id,label\nfrt1,{words[0]}\nfrt2,barren\nfrt1,{words[0]}\nFRT1,{words[1]}\n")
    with pytest.raises(SceneError, match=r"labels\.csv, lines 2 and 5: two labels for frt1"):
        read_labels(table)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: 0 columns observation_id; .* found nothing"),
        ("\n\nobservation_id,kind\n", "line 3: 0 columns label; .* found observation_id,kind"),
        ("observation_id;label\nfrt1;barren\n", "line 1: 0 columns observation_id; .* with commas"),
        ("observation_id,label,label\n", "line 1: 2 columns label"),
        ("observation_id,label\nfrt1,barren\nfrt2,maybe\n", "line 3: frt2 is labelled 'maybe'; use carbonate, barren"),
        ("observation_id,label\nfrt1\n", "line 2: frt1 is labelled ''"),
        ("observation_id,label\n,barren\n", "line 2: no observation_id"),
        ('observation_id,label\n"two\nlines",barren\nfrt2,1\n', "line 4: frt2 is labelled '1'"),
        ('observation_id,label\n"frt\n1","bar\nren"\n', "line 4: frt 1 is labelled 'bar ren'"),
        ('observation_id,label\nfrt1,"barren\n', "not a readable table"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(table: Path, text: str, words: str) -> None:
    table.write_text(text)
    with pytest.raises(SceneError, match=words) as caught:
        read_labels(table)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    utf16 = tmp_path / "utf16.csv"
    utf16.write_bytes("observation_id,label\nfrt1,barren\n".encode("utf-16"))
    for path in (tmp_path / "missing.csv", tmp_path, utf16, Path("nul\0.csv")):
        with pytest.raises(SceneError, match="not a readable table"):
            read_labels(path)


@given(content=st.binary(max_size=200) | st.text(alphabet='obslabel_idcarnut,"\n\r\0 1', max_size=80).map(str.encode))
def test_nothing_else_escapes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    table = tmp_path_factory.getbasetemp() / "wild.csv"
    table.write_bytes(b"observation_id,label\n" + content)
    try:
        labels = read_labels(table)
    except SceneError as error:
        message = str(error)
    else:
        message = "wild.csv"
        assert all(name and name == name.strip().lower() for name in labels)
        assert set(labels.values()) <= {True, False, None}
    assert "wild.csv" in message
    assert "\n" not in message
