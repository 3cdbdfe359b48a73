"""Rows from real files, good and bad."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from adaptax.config import UserError
from adaptax.data.sources import open_rows

COLUMNS = ["messages", "prompt", "completion", "text"]
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
GOOD = json.dumps(ROWS[0])
Write = Callable[..., Path]


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file."""
    found, rows, columns = open_rows(str(path), COLUMNS)
    assert found == path
    assert all(list(row) == columns for row in rows)
    return list(rows)


def refusal(path: Path) -> str:
    """What is said of a file that cannot be read: one line that begins with its path."""
    with pytest.raises(UserError) as caught:
        list(open_rows(str(path), COLUMNS)[1])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path))


def test_jsonl(write_jsonl: Write) -> None:
    assert read(write_jsonl(ROWS)) == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("blank_lines.jsonl", f"\n{json.dumps(ROWS[0])}\n\n{json.dumps(ROWS[1])}"),
        ("windows.jsonl", f"\ufeff{json.dumps(ROWS[0])}\r\n{json.dumps(ROWS[1])}\r\n"),
        ("array.json", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("UPPER.JSONL", f"{json.dumps(ROWS[0])}\n{json.dumps(ROWS[1])}\n"),
    ],
)
def test_other_ways_to_write_the_same(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name) == ROWS


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == ROWS


def test_parquet_without_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "none.parquet")
    assert refusal(tmp_path / "none.parquet").startswith(" cannot be read as Parquet, or holds no rows: ")


def test_embedded_files() -> None:
    path, rows, columns = open_rows("embedded:home/eval.jsonl", COLUMNS)
    assert path.is_file()
    assert columns == ["messages"]
    assert len(rows) > 0


def test_home_folder(write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    path, rows, _ = open_rows("~/rows.jsonl", COLUMNS)
    assert path == tmp_path / "rows.jsonl"
    assert list(rows) == ROWS


def test_relative_path(write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(ROWS)
    monkeypatch.chdir(tmp_path)
    assert list(open_rows("rows.jsonl", COLUMNS)[1]) == ROWS


def test_a_file_that_changed_is_read_again(write_jsonl: Write) -> None:
    assert read(write_jsonl(ROWS)) == ROWS
    changed = [{"prompt": "x", "completion": "y"}, {"prompt": "z", "completion": "w"}]
    assert read(write_jsonl(changed)) == changed


@pytest.mark.parametrize(
    "name", ["rows[12].jsonl", "rows?.jsonl", "*.jsonl", "a b#c%20.jsonl", "a::b.jsonl", "é.jsonl"]
)
def test_a_name_is_a_name_and_no_pattern(write_jsonl: Write, name: str) -> None:
    write_jsonl([{"text": "another"}], "rows1.jsonl")
    assert read(write_jsonl(ROWS, name)) == ROWS


def test_dates_stay_text(write_jsonl: Write) -> None:
    rows = [{"prompt": "When?", "completion": "2024-01-01"}, {"prompt": "And?", "completion": "2024-01-02 10:00:00"}]
    assert read(write_jsonl(rows)) == rows
    turns = [{"messages": [{"role": "user", "content": "2024-01-01"}, {"role": "assistant", "content": "2024-01-02"}]}]
    assert read(write_jsonl(turns)) == turns


def test_rows_without_a_common_schema(write_jsonl: Write) -> None:
    rows = [{"text": "a", "tags": [1]}, {"text": "b", "tags": "x"}, {"text": "c", "tags": {"k": None}}, {"text": "d"}]
    assert [row["text"] for row in read(write_jsonl(rows))] == ["a", "b", "c", "d"]
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": "b"}, {"messages": [{"role": 1}]}]
    assert read(write_jsonl(rows)) == rows


def test_absent_columns_are_null(write_jsonl: Write) -> None:
    rows = read(write_jsonl([{"prompt": "a", "completion": "b"}, {"prompt": "c"}]))
    assert rows[1] == {"prompt": "c", "completion": None}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, "{bad"], " line 2: not valid JSON ("),
        (["not json"], " line 1: not valid JSON ("),
        ([GOOD, "", '{"prompt": "c", "compl'], " line 3: not valid JSON ("),
        (["{'prompt': 'a'}"], " line 1: not valid JSON ("),
        ([GOOD, "[1, 2]"], " line 2: each line must be a JSON object, not list"),
        ([GOOD, '"text"'], " line 2: each line must be a JSON object, not str"),
        (['"text"', '"text"'], " line 1: each line must be a JSON object, not str"),
        (["3"], " line 1: each line must be a JSON object, not int"),
        (["", ""], " holds no rows"),
    ],
)
def test_bad_lines_are_named(write_jsonl: Write, lines: list[str], words: str) -> None:
    assert refusal(write_jsonl(lines)).startswith(words)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "completion": "b"}\n')
    assert refusal(path).startswith(" line 2: not valid UTF-8 (")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert refusal(tmp_path / name) == " is empty"


@pytest.mark.parametrize("content", [b"abc", b"PAR1" + bytes(100) + b"PAR1", GOOD.encode()])
def test_what_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert re.fullmatch(r" cannot be read as Parquet, or holds no rows: .*(Parquet|thrift).*", refusal(path))


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt", "rows", "rows.jsonl.gz"])
def test_unknown_extensions(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompt,completion\na,b\n")
    assert refusal(tmp_path / name) == ": rows are read from .jsonl, .json, .parquet files"


@pytest.mark.parametrize("name", ["gone.jsonl", "."])
def test_missing_files(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == ": no such file"


def test_the_error_is_all_that_is_said(
    write_jsonl: Write, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, logger="datasets"):
        refusal(write_jsonl([GOOD, "{bad"]))
        read(write_jsonl(ROWS, "good.jsonl"))
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert tuple(capfd.readouterr()) == ("", "")


OFFLINE = """\
import os, socket, sys
socket.getaddrinfo = lambda *args, **kwargs: os._exit(3)
from adaptax.data.sources import open_rows
print(len(open_rows(sys.argv[1], [])[1]))
"""


def test_reading_a_file_asks_nobody(write_jsonl: Write) -> None:
    """Not the hub either, though it may be asked: a process of its own, whose look-ups of any host end it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", OFFLINE, str(write_jsonl(ROWS))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
