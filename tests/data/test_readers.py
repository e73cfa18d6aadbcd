"""Every kind of source gives its documents, in the order of names; what is not text is named, not read."""

from __future__ import annotations

import gzip
import json
import os
import sys
import sysconfig
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.base.errors import DataError
from armillary.data.readers import Reader, cut
from armillary.data.settings import SourceSettings

Arrow = Any


def read(path: Path | str, *, max_document: int | None = None, avoid: Path | None = None, **settings: Any) -> list[str]:
    reader = Reader(SourceSettings(path=str(path), **settings), max_document=max_document, avoid=avoid)
    return [data.decode() for data, _ in reader.documents()]


def names(path: Path, **settings: Any) -> list[str]:
    return [name for _, name in Reader(SourceSettings(path=str(path), **settings)).documents()]


def plant(folder: Path, **files: str | bytes) -> Path:
    """Files by name; `__` stands for a slash and `_dot_` for a dot."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


# -- folders of text


def test_a_folder_gives_one_document_per_file_in_the_order_of_names(tmp_path: Path) -> None:
    plant(tmp_path, b_dot_txt="two", a__z_dot_md="one", c__a_dot_py="three", c__b__x_dot_rst="four")
    assert read(tmp_path) == ["one", "two", "three", "four"]
    assert names(tmp_path) == ["a/z.md", "b.txt", "c/a.py", "c/b/x.rst"]


def test_the_order_does_not_come_from_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, **{f"{letter}_dot_txt": letter for letter in "cabed"})
    scan = os.scandir

    class Backwards:
        def __init__(self, path: Any) -> None:
            self.entries = scan(path)

        def __enter__(self) -> Any:
            return reversed(sorted(self.entries, key=lambda entry: entry.name))

        def __exit__(self, *error: Any) -> None:
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Backwards)
    assert read(tmp_path) == list("abcde")


def test_hidden_files_and_folders_links_in_circles_and_pipes_are_passed_by(tmp_path: Path) -> None:
    plant(tmp_path, a_dot_txt="seen", _dot_hidden="no", _dot_git__config="no", sub__b_dot_txt="also")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "twin").symlink_to(tmp_path / "sub")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    reader = Reader(SourceSettings(path=str(tmp_path)))
    assert [data for data, _ in reader.documents()] == [b"seen", b"also"]
    assert reader.skipped.names == ["lost: a link that leads nowhere"] and reader.skipped.count == 1


def test_patterns_choose_files_and_folders(tmp_path: Path) -> None:
    plant(tmp_path, a_dot_txt="1", b_dot_md="2", old__c_dot_txt="3", new__d_dot_txt="4", new__e_dot_md="5")
    assert read(tmp_path, include=("*.txt",)) == ["1", "4", "3"]
    assert read(tmp_path, include=("*.txt",), exclude=("old",)) == ["1", "4"]
    assert read(tmp_path, include=("new/*",)) == ["4", "5"]
    assert read(tmp_path, exclude=("new/*.md", "a.*")) == ["2", "4", "3"]


def test_binary_and_misencoded_files_are_named_skipped_and_counted(tmp_path: Path) -> None:
    plant(
        tmp_path,
        a_dot_bin=b"\x89PNG\0\0",
        b_dot_txt="caf\xe9".encode("latin-1"),
        c_dot_txt="café",
        d_dot_txt="wide".encode("utf-16"),
        e_dot_txt=b"cut off \xe2\x82",
        f_dot_txt=b"\xef\xbb\xbfmarked",
        g_dot_txt=" \n\t",
        h_dot_txt="",
    )
    reader = Reader(SourceSettings(path=str(tmp_path)))
    assert [data.decode() for data, _ in reader.documents()] == ["café", "marked"]
    assert reader.skipped.count == 4 and reader.empty == 2
    assert reader.skipped.names == [
        "a.bin: binary (it holds NUL bytes)",
        "b.txt: not valid UTF-8",
        "d.txt: binary (it holds NUL bytes)",
        "e.txt: not valid UTF-8",
    ]
    assert len(list(reader.documents())) == 2 and reader.skipped.count == 4  # counted anew, not on top


def test_names_that_are_not_utf8_are_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("inside")
    assert names(tmp_path) == ["caf\\xe9.txt"]
    assert read(tmp_path) == ["inside"]


def test_the_folder_being_written_is_not_read(tmp_path: Path) -> None:
    plant(tmp_path, a_dot_txt="text", out__manifest_dot_json="{}")
    assert read(tmp_path, avoid=tmp_path / "out") == ["text"]


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder") as caught:
        read(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)
    with pytest.raises(DataError, match="python:stdlib"):
        read("python:stdlb")


def test_the_standard_library_without_its_tests() -> None:
    reader = Reader(SourceSettings(path="python:stdlib"))
    found = [file.name for file in reader.files()]
    root = Path(sysconfig.get_path("stdlib"))
    assert {"os.py", "json/decoder.py", "email/message.py"} <= set(found)
    assert all(name.endswith(".py") and (root / name).is_file() for name in found)
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


# -- cutting


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \n€😀")), limit=st.integers(4, 40), block=st.integers(1, 30))
def test_cutting_loses_nothing_and_keeps_characters_whole(text: str, limit: int, block: int) -> None:
    data = text.encode()
    pieces = list(cut([data[i : i + block] for i in range(0, len(data), block)], limit))
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= limit and piece.decode() for piece in pieces) or pieces == [b""]
    assert pieces == list(cut([data], limit))  # however it came in


def test_cuts_prefer_blank_lines_then_lines_then_spaces() -> None:
    assert list(cut([b"aaaaa\n\nb\nc d"], 10)) == [b"aaaaa\n\n", b"b\nc d"]
    assert list(cut([b"aaaa bb\ncc dd"], 10)) == [b"aaaa bb\n", b"cc dd"]
    assert list(cut([b"aaaa bbb cc"], 10)) == [b"aaaa bbb ", b"cc"]
    assert list(cut([b"aaaaaaaaaaaa"], 10)) == [b"a" * 10, b"aa"]


def test_a_single_large_file_becomes_many_documents(tmp_path: Path) -> None:
    lines = "".join(f"line {number} of the only file\n" for number in range(20_000))  # about 600 kB
    (tmp_path / "all.txt").write_text(lines)
    documents = read(tmp_path / "all.txt")
    assert "".join(documents) == lines and 64 <= len(documents) <= 140
    assert read(tmp_path / "all.txt", max_document=10**6) == [lines]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    record = json.dumps({"text": "word " * 200}) + "\n"
    (tmp_path / "big.jsonl").write_text(record * 16_000)  # 16 MB
    (tmp_path / "big.txt").write_text(("word " * 200 + "\n") * 16_000)
    tracemalloc.start()
    try:
        for name in ("big.jsonl", "big.txt"):
            assert sum(1 for _ in Reader(SourceSettings(path=str(tmp_path / name))).documents()) > 60
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 2**20


# -- JSONL


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    content = '{"text": "one"}\n\n{"text": "t\\u00e9o", "other": 1}\r\n{"text": null}\n{"text": "  "}\n{"text": "last"}'
    plant(tmp_path, a_dot_jsonl=b"\xef\xbb\xbf" + content.encode(), b_dot_jsonl_dot_gz=gzip.compress(content.encode()))
    reader = Reader(SourceSettings(path=str(tmp_path)))
    assert [data.decode() for data, _ in reader.documents()] == ["one", "téo", "last"] * 2
    assert reader.empty == 4
    assert names(tmp_path)[:3] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:6"]
    assert read(tmp_path / "a.jsonl", format="text")[0].startswith('{"text": "one"}')


def test_jsonl_takes_the_named_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "T", "body": "B"}\n')
    assert read(tmp_path, field="body") == ["B"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "unfinished', "not JSON"),
        ("[1, 2]", "not a JSON object but list"),
        ('{"txt": "x"}', "no 'text'"),
        ('{"text": 5}', "'text' is not text but int"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 6 + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert caught.value.where == f"{path}:7"
    if "txt" in line:
        assert caught.value.hint is not None and "'txt'" in caught.value.hint


def test_records_that_are_not_utf8_are_skipped_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "\\ud800"}\n{"text": "four"}\n')
    reader = Reader(SourceSettings(path=str(tmp_path)))
    assert [data for data, _ in reader.documents()] == [b"one", b"four"]
    assert reader.skipped.names == ["a.jsonl:2: not valid UTF-8", "a.jsonl:3: not valid UTF-8"]


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b'{"text": "number %d"}\n' % i for i in range(1000)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="gzip file is damaged") as caught:
        read(path)
    assert caught.value.where == str(path)


# -- Parquet and saved datasets (written by pyarrow, the peer)


@pytest.fixture
def arrow() -> Arrow:
    return pytest.importorskip("pyarrow")


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_columns(tmp_path: Path, arrow: Arrow, kind: str) -> None:
    import pyarrow.parquet as parquet

    types = {"dictionary": arrow.dictionary(arrow.int32(), arrow.string())}
    texts = arrow.array(["one", None, "zwei €", "", "one"]).cast(types.get(kind) or getattr(arrow, kind)())
    parquet.write_table(arrow.table({"id": [1, 2, 3, 4, 5], "text": texts}), tmp_path / "a.parquet", row_group_size=2)
    reader = Reader(SourceSettings(path=str(tmp_path)))
    assert [data.decode() for data, _ in reader.documents()] == ["one", "zwei €", "one"]
    assert reader.empty == 2
    with pytest.raises(DataError, match="no column 'body'"):
        read(tmp_path, field="body")
    with pytest.raises(DataError, match="'id' is not text but int64"):
        read(tmp_path, field="id")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable Parquet") as caught:
        read(tmp_path)
    assert caught.value.where == str(tmp_path / "a.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pyarrow") as caught:
        read(tmp_path)
    assert "armillary[parquet]" in str(caught.value)


def save_dataset(arrow: Arrow, folder: Path, parts: list[list[str]]) -> None:
    """The layout of `datasets.save_to_disk`: Arrow streams, `state.json` that lists them, `dataset_info.json`."""
    import pyarrow.ipc as ipc

    folder.mkdir(parents=True)
    files = []
    for number, texts in enumerate(parts):
        name = f"data-{number:05d}-of-{len(parts):05d}.arrow"
        table = arrow.table({"text": texts, "label": list(range(len(texts)))})
        with ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
        files.append({"filename": name})
    state = {
        "_data_files": files,
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string", "_type": "Value"}}}))


def test_a_saved_dataset(tmp_path: Path, arrow: Arrow) -> None:
    save_dataset(arrow, tmp_path / "set", [["b", "a", "c"], ["d"]])
    assert read(tmp_path / "set") == ["b", "a", "c", "d"]
    assert names(tmp_path / "set")[-1] == "data-00001-of-00002.arrow:0"
    with pytest.raises(DataError, match="no column 'txt'"):
        read(tmp_path / "set", field="txt")


def test_a_saved_dictionary_of_datasets_gives_train_unless_asked(tmp_path: Path, arrow: Arrow) -> None:
    root = tmp_path / "dict"
    for split, texts in {"train": ["a", "b"], "validation": ["v"], "test": ["t"]}.items():
        save_dataset(arrow, root / split, [texts])
    (root / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    assert read(root) == ["a", "b"]
    assert read(root, include=("test", "val*")) == ["v", "t"]
    with pytest.raises(DataError, match="train, validation, test"):
        read(root, include=("dev",))


def damage_missing(folder: Path) -> None:
    (folder / "data-00000-of-00001.arrow").unlink()


def damage_outside(folder: Path) -> None:
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')


def damage_list(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


def damage_json(folder: Path) -> None:
    (folder / "state.json").write_text("{")


def damage_old(folder: Path) -> None:
    (folder / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}')


def damage_arrow(folder: Path) -> None:
    (folder / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff\x10\0\0\0 nothing of the kind")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "missing"),
        (damage_outside, "leads outside"),
        (damage_list, "_data_files"),
        (damage_json, "not JSON"),
        (damage_old, "old version"),
        (damage_arrow, "not a readable Arrow file"),
    ],
)
def test_damaged_datasets_are_named(tmp_path: Path, arrow: Arrow, damage: Callable[[Path], None], message: str) -> None:
    save_dataset(arrow, tmp_path / "set", [["a"]])
    damage(tmp_path / "set")
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "set")
    assert caught.value.where is not None and str(tmp_path / "set") in caught.value.where


# -- surveys


def test_the_survey_sees_every_change_without_reading(tmp_path: Path) -> None:
    plant(tmp_path, a_dot_txt="one", b_dot_txt="two")
    os.utime(tmp_path / "a.txt", ns=(10**18, 10**18))

    def survey() -> tuple[str, int]:
        return Reader(SourceSettings(path=str(tmp_path))).survey()

    first = survey()
    assert first[1] == 6 and survey() == first
    (tmp_path / "a.txt").write_text("uno")
    second = survey()
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    third = survey()
    assert len({first[0], second[0], third[0]}) == 3
