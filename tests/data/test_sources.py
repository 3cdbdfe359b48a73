"""Rows from real files and folders, good and bad."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import http.server
import json
import logging
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from adaptax.config import UserError
from adaptax.data.sources import (
    MAX_ROW_BYTES,
    Rows,
    content_digest,
    find_units,
    open_rows,
    parse_hub,
    stream_rows,
)

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
GOOD = json.dumps(ROWS[0])
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(i)}]} for i in range(5)]
Write = Callable[..., Path]


def read(name: str | Path) -> list[Any]:
    """All rows by index; streaming must give the same, a bad row as its error."""
    rows = open_rows(str(name))
    outcomes = [outcome(rows, index) for index in range(len(rows))]
    streamed = [(place, str(row) if isinstance(row, UserError) else row) for place, row in stream_rows(str(name))]
    assert streamed == [(rows.place(index), row) for index, row in enumerate(outcomes)]
    assert not any("\n" in row for row in outcomes if isinstance(row, str))
    return outcomes


def outcome(rows: Rows, index: int) -> Any:
    """A row, or what is said of it."""
    try:
        return rows[index]
    except UserError as error:
        return str(error)


def refusal(name: str | Path, path: str | Path | None = None) -> str:
    """What is said of a name that cannot be read: one line that begins with it, whether by index or streamed."""
    with pytest.raises(UserError) as caught:
        open_rows(str(name))
    with pytest.raises(UserError) as streamed:
        list(stream_rows(str(name)))
    message = str(caught.value)
    assert message == str(streamed.value)
    assert "\n" not in message
    assert message.startswith(str(path or name))
    return message.removeprefix(str(path or name))


def write(path: Path, content: str | bytes) -> Path:
    """A file with that content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_arrow(path: Path, rows: list[dict[str, Any]], *, as_stream: bool) -> Path:
    """An Arrow file in one of its two forms, in batches of two rows."""
    table = pyarrow.Table.from_pylist(rows)
    new = pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def test_jsonl(write_jsonl: Write) -> None:
    path = write_jsonl(ROWS)
    rows = open_rows(str(path))
    assert (rows.name, rows.columns, len(rows)) == (str(path), ["prompt", "completion"], 2)
    assert rows.place(1) == f"{path} row 2"
    assert read(path) == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("blank_lines.jsonl", f"\n{json.dumps(ROWS[0])}\n \t\r\n\n{json.dumps(ROWS[1])}"),
        ("windows.jsonl", f"\ufeff{json.dumps(ROWS[0])}\r\n{json.dumps(ROWS[1])}\r\n"),
        ("indented.ndjson", f"  {json.dumps(ROWS[0])}  \n\t{json.dumps(ROWS[1])}\n"),
        ("array.json", json.dumps(ROWS)),
        ("pretty.json", f"\ufeff\n {json.dumps(ROWS, indent=2)} \n"),
        ("lines.json", f"{json.dumps(ROWS[0])}\n{json.dumps(ROWS[1])}\n"),
        ("UPPER.JSONL", f"{json.dumps(ROWS[0])}\n{json.dumps(ROWS[1])}\n"),
        ("quoted.csv", '"prompt","completion"\n"a","b"\n"c","d"'),
        ("windows.csv", "\ufeffprompt,completion\r\na,b\r\n\r\nc,d\r\n\r\n"),
        ("blank_before.Csv", "\n\nprompt,completion\na,b\nc,d\n"),
        ("rows.tsv", "prompt\tcompletion\na\tb\nc\td\n"),
    ],
)
def test_other_ways_to_write_the_same(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path / name, content)) == ROWS


def test_a_row_of_jsonl_is_numbered_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", f"\n{GOOD}\n\n \n{GOOD}\n{{bad\n\n{GOOD}\n\n\n")
    rows = open_rows(str(path))
    assert [rows.place(index) for index in range(len(rows))] == [f"{path} row {line}" for line in (2, 5, 6, 8)]
    assert read(path)[2].startswith("not valid JSON (")


def test_rows_are_a_sequence(write_jsonl: Write) -> None:
    rows = open_rows(str(write_jsonl(ROWS)))
    assert list(rows) == ROWS  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        rows[2]


def test_a_limit_leaves_the_rest_alone(write_jsonl: Write, tmp_path: Path) -> None:
    path = write_jsonl([*ROWS, *ROWS, "{bad"])
    assert len(open_rows(str(path), limit=3)) == 3
    assert [open_rows(str(path), limit=3)[index] for index in range(3)] == [*ROWS, ROWS[0]]
    assert len(open_rows(str(path), limit=99)) == 5
    csv = write(tmp_path / "rows.csv", "prompt,completion\na,b\nc,d\na,b\n")
    array = write(tmp_path / "rows.json", json.dumps(ROWS * 2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 2), tmp_path / "rows.parquet")
    for other in (csv, array, tmp_path / "rows.parquet"):
        rows = open_rows(str(other), limit=2)
        assert [rows[index] for index in range(len(rows))] == ROWS
        with pytest.raises(IndexError):
            rows[2]


def test_random_access_is_exact(write_jsonl: Write, tmp_path: Path) -> None:
    dice = random.Random(0)
    texts = ["", "é\u2028 ü\x85", '"quoted" \\ \n new\r\nline', "😀" * 3, "x" * 5000]
    rows = [{"n": n, "text": dice.choice(texts), "tags": [dice.random()] * dice.randrange(3)} for n in range(100_000)]
    lines = [json.dumps(row, ensure_ascii=dice.random() < 0.5) for row in rows]
    opened = open_rows(str(write_jsonl(lines)))
    assert len(opened) == len(rows)
    order = dice.sample(range(len(rows)), 5000)
    assert [opened[index] for index in order] == [rows[index] for index in order]
    assert sum(row != rows[n] for n, (_, row) in enumerate(stream_rows(str(tmp_path / "rows.jsonl")))) == 0


def test_threads_read_at_once(write_jsonl: Write, tmp_path: Path) -> None:
    rows = [{"text": f"{n} " * (n % 50)} for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (write_jsonl(rows), tmp_path / "rows.parquet"):
        opened, order = open_rows(str(path)), random.Random(1).choices(range(len(rows)), k=8000)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(opened.__getitem__, order)) == [rows[index] for index in order]


def test_files_are_closed(write_jsonl: Write, tmp_path: Path) -> None:
    csv = write(tmp_path / "rows.csv", "prompt,completion\na,b\n")
    names = [str(write_jsonl(ROWS)), str(csv)]
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for name in names * 20:
        rows = open_rows(name)
        assert rows[0] == ROWS[0]
        next(stream_rows(name))
    del rows
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


BIG = """\
import json, random, resource, sys
import numpy
from adaptax.data.sources import open_rows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
rows = open_rows(sys.argv[1])
indexed = peak()
dice = random.Random(0)
for index in (dice.randrange(len(rows)) for _ in range(2000)):
    row = rows[index]
    assert row["n"] == index and len(row["text"]) == 1000 + index % 1000, index
print(json.dumps([len(rows), indexed - before, peak() - before, "datasets" in sys.modules]))
"""


@pytest.mark.slow
def test_a_big_file_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    try:
        with path.open("w") as file:
            for n in range(1_000_000):
                file.write(f'{{"n": {n}, "text": "{"x" * (1000 + n % 1000)}"}}\n')
        assert path.stat().st_size > 1.4 * 2**30
        command = [sys.executable, "-c", BIG, str(path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.unlink()
    assert done.returncode == 0, done.stderr
    num_rows, index_mib, all_mib, has_datasets = json.loads(done.stdout)
    assert num_rows == 1_000_000
    assert index_mib <= all_mib < 300
    assert not has_datasets


def test_a_row_that_is_too_long(write_jsonl: Write) -> None:
    at_most = '{"text": "' + "x" * (MAX_ROW_BYTES - 12) + '"}'
    assert len(at_most) == MAX_ROW_BYTES
    path = write_jsonl([GOOD, at_most, "x" + at_most, "y" * 50_000_000, "", GOOD, " " * 20_000_000, "z" * 40_000_000])
    rows = read(path)
    assert rows[0] == rows[4] == ROWS[0]
    assert len(rows[1]["text"]) == MAX_ROW_BYTES - 12
    assert rows[2] == "16.8 MB long; a row may have 16 MiB: is a newline missing?"
    assert rows[3] == "50.0 MB long; a row may have 16 MiB: is a newline missing?"
    assert rows[5] == "40.0 MB long; a row may have 16 MiB: is a newline missing?"
    assert open_rows(str(path)).place(5) == f"{path} row 8"


def test_a_file_that_is_one_endless_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "[" + "1, " * 10_000_000 + "1]")
    assert refuse_all(path) == " row 1: 30.0 MB long; a row may have 16 MiB: is a newline missing?"


def refuse_all(path: Path) -> str:
    """What is said of a JSONL file without a good row: the first row's error, which streaming hands out."""
    with pytest.raises(UserError) as caught:
        open_rows(str(path))
    place, error = next(stream_rows(str(path)))
    assert isinstance(error, UserError)
    assert str(caught.value) == f"{place}: {error}"
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{bad", r"not valid JSON \(Expecting property name enclosed in double quotes at column 2\)"),
        ("not json", r"not valid JSON \(Expecting value at column 1\)"),
        ('{"prompt": "c", "compl', r"not valid JSON \(Unterminated string starting at at column 17\)"),
        ("{'prompt': 'a'}", r"not valid JSON \(.*\)"),
        (GOOD + GOOD, r"not valid JSON \(Extra data at column 35\)"),
        (GOOD + ",", r"not valid JSON \(Extra data at column 35\)"),
        ('{"text": "a\tb"}', r"not valid JSON \(Invalid control character at at column 12\)"),
        ('{"text": "a\x00b"}', r"holds NUL bytes: was the file cut off while it was written\?"),
        ("[1, 2]", "not a JSON object but list"),
        ('"text"', "not a JSON object but str"),
        ("3", "not a JSON object but int"),
        ("null", "not a JSON object but NoneType"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' occurs twice in .*"),
        ('{"messages": [{"role": "user", "role": "user"}]}', "the key 'role' occurs twice in .*"),
        ("[" * 100_000, r"not valid JSON \(.*recursion.*\)"),
        ('{"n": ' + "9" * 5000 + "}", r"not valid JSON \(Exceeds the limit .*\)"),
    ],
)
def test_bad_rows(write_jsonl: Write, line: str, words: str) -> None:
    filler = [GOOD] * 200  # NUL bytes at the beginning would say that the file is no text
    path = write_jsonl([*filler, line, GOOD])
    *good, bad, last = read(path)
    assert [*good, last] == [ROWS[0]] * 201
    assert re.fullmatch(words, bad)
    assert open_rows(str(path)).place(200) == f"{path} row 201"
    if "\x00" not in line:
        assert re.fullmatch(f" row 2: {words}", refuse_all(write_jsonl(["", line], "bad.jsonl")))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD.encode() + b'\n{"prompt": "caf\xe9", "completion": "b"}\n')
    assert read(path)[1].startswith("not valid UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 15")
    path = write(tmp_path / "rows.csv", b"prompt,completion\na,b\ncaf\xe9,d\n")
    assert re.fullmatch(r"not valid UTF-8 \(.* byte 0xe9 .*\), at line 3.*", read(path)[1])
    path = write(tmp_path / "rows.json", b'[{"prompt": "caf\xe9"}]')
    assert re.fullmatch(r": not valid JSON \(.*utf-8.* byte 0xe9 .*\)", refusal(path))


def test_what_json_may_hold(write_jsonl: Write, tmp_path: Path) -> None:
    line = '{"a": NaN, "b": [Infinity, -Infinity], "c": 1e400, "d": 12345678901234567890123, "e": "\\ud83d\\ude00"}'
    for path in (write_jsonl([line]), write(tmp_path / "rows.json", f"[{line}]")):
        assert repr(read_one(path)) == repr(json.loads(line))


def read_one(path: Path) -> Any:
    """The first row, streamed."""
    return next(stream_rows(str(path)))[1]


def test_dates_and_numbers_stay_what_they_are(write_jsonl: Write) -> None:
    rows = [{"prompt": "When?", "completion": "2024-01-01"}, {"prompt": 3, "completion": "2024-01-02 10:00:00"}]
    assert read(write_jsonl(rows)) == rows


def test_rows_without_a_common_schema(write_jsonl: Write) -> None:
    rows: list[dict[str, Any]]
    rows = [{"text": "a", "tags": [1]}, {"text": "b", "tags": "x"}, {"text": "c", "tags": {"k": None}}, {"extra": 1}]
    path = write_jsonl(["{bad", *(json.dumps(row) for row in rows)])
    assert read(path)[1:] == rows
    assert open_rows(str(path)).columns == ["text", "tags", "extra"]
    late = write_jsonl([*rows[:1] * 100, {"late": 1}], "late.jsonl")
    assert open_rows(str(late)).columns == ["text", "tags"]
    assert open_rows(str(write_jsonl(["{bad"] * 999 + rows[3:], "last.jsonl"))).columns == ["extra"]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    for suffix in ("jsonl", "csv", "parquet"):
        for text in ("a", "b", "c"):
            path, rows = tmp_path / f"rows.{suffix}", [{"text": text * 3}]
            if suffix == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            else:
                write(path, json.dumps(rows[0]) if suffix == "jsonl" else f"text\n{text * 3}\n")
            assert read(path) == rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n"a": [{}], "b": [{}]}', " is one JSON value, not rows: write a list of objects, or JSON lines"),
        ('{\n"text": "a"\n}', " is one JSON value, not rows: write a list of objects, or JSON lines"),
        ("3", " is one JSON value, not rows: write a list of objects, or JSON lines"),
        ('[{"text": "a"},\n {"text": ', " line 2 column 11: not valid JSON (Expecting value)"),
        ('[{"text": "a"},\n]', r".*not valid JSON \(.*"),
        ('{\n"text": "a"\n}\n{\n"text": "b"\n}\n', " line 4 column 1: not valid JSON (Extra data)"),
        ("hello", " line 1 column 1: not valid JSON (Expecting value)"),
        ('[{"a": 1, "a": 2}]', ": not valid JSON (the key 'a' occurs twice in {'a': 2})"),
        ("[" * 100_000, r": not valid JSON \(.*recursion.*\)"),
        ("[]", " holds no rows"),
        (" \n", " holds no rows"),
    ],
)
def test_json_files_that_are_no_rows(tmp_path: Path, content: str, words: str) -> None:
    said = refusal(write(tmp_path / "rows.json", content))
    assert said == words or re.fullmatch(words, said)


def test_an_object_with_the_rows_under_a_key(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", '{"the data": [{"text": "a"}],\n "n": 3, "tags": ["b"]}')
    said = refusal(path)
    assert said.startswith(" is one object with the rows under ['the data']: jq -c ")
    assert said.endswith(f": jq -c '.[\"the data\"][]' {path} > rows.jsonl")


def test_elements_of_a_list_that_are_no_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", '[{"text": "a"}, 3, ["b"], {"text": "c"}]')
    assert read(path) == [{"text": "a"}, "not a JSON object but int", "not a JSON object but list", {"text": "c"}]
    assert open_rows(str(path)).place(2) == f"{path} row 3"


def test_json_over_a_gibibyte(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", "[\n")
    os.truncate(path, 2**30 + 1)  # a hole, which takes no room
    with path.open("r+b") as file:
        file.write(b"[" + b"\n" * 5000)
    said = refusal(path)
    assert said.endswith(f": jq -c '.[]' {path} > rows.jsonl")


CSV = """\
prompt,completion,n
"a, b","say ""hi""\r\n\r\nthere",4
2024-01-01,NA,

é,5" disk,007
"x
y",null,1e5
"""


def test_csv_values_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", CSV)
    assert read(path) == [
        {"prompt": "a, b", "completion": 'say "hi"\r\n\r\nthere', "n": "4"},
        {"prompt": "2024-01-01", "completion": "NA", "n": ""},
        {"prompt": "é", "completion": '5" disk', "n": "007"},
        {"prompt": "x\ny", "completion": "null", "n": "1e5"},
    ]
    rows = open_rows(str(path))
    assert rows.columns == ["prompt", "completion", "n"]
    assert rows.place(3) == f"{path} row 4"
    assert read(write(tmp_path / "rows.tsv", 'text\tn\na, "b"\t\n\t\n')) == [
        {"text": 'a, "b"', "n": ""},
        {"text": "", "n": ""},
    ]


def test_csv_of_long_texts(tmp_path: Path) -> None:
    text = 'a "word", and\n' * 50_000  # more than the csv module takes as it comes
    quoted = text.replace('"', '""')
    assert read(write(tmp_path / "rows.csv", f'text,n\n"{quoted}",1\nb,2\n')) == [
        {"text": text, "n": "1"},
        {"text": "b", "n": "2"},
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("c", "1 values under 2 columns, at line 4: is a quote missing?"),
        ("c,d,e", "3 values under 2 columns, at line 4: is a quote missing?"),
        ("c,d,", "3 values under 2 columns, at line 4: is a quote missing?"),
        ('"c"d,e', "not valid CSV (',' expected after '\"'), at line 4: is a quote missing?"),
        ("c\rd,e", "not valid CSV (new-line character seen in unquoted field"),
        ('"c\nd"e,f', "not valid CSV (',' expected after '\"'), at line 4: is a quote missing?"),
    ],
)
def test_bad_rows_of_csv(tmp_path: Path, body: str, words: str) -> None:
    path = write(tmp_path / "rows.csv", f"prompt,completion\n\na,b\n{body}\na,b\n")
    first, bad, last = read(path)
    assert first == last == ROWS[0]
    assert bad.startswith(words)


@pytest.mark.parametrize("body", ['"c,d\na,b\n', '"c,d\n"a","b"\n', 'x"y,"c\n"a","b"\n', 'c,"d\na,b\n"a","b"\n'])
def test_a_quote_that_does_not_close(tmp_path: Path, body: str) -> None:
    rows = read(write(tmp_path / "rows.csv", f"prompt,completion\na,b\n{body}"))
    assert rows[0] == ROWS[0]
    assert re.fullmatch(r"not valid CSV \(.*\), at line 3: is a quote missing\?", rows[1])


def test_a_quote_that_does_not_close_in_a_long_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'prompt,completion\na,b\n"c,d\n' + "a long line of text,b\n" * 1_000_000)
    rows = read(path)
    assert rows == [ROWS[0], "22.0 MB long; a row may have 16 MiB: is a newline missing?"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,completion\n", " holds no rows"),
        ("prompt,completion", " holds no rows"),
        ("\n\r\n\n", " holds no rows"),
        ("prompt,completion,prompt\na,b,c\n", ": the header has a name twice: ['prompt', 'completion', 'prompt']"),
        ("prompt,caf\udce9\na,b\n", ": the header is not valid UTF-8 ("),
        ('"prompt,completion\na,b\n', ": the header is not valid CSV (unexpected end of data), at line 1"),
    ],
)
def test_headers_of_csv(tmp_path: Path, content: str, words: str) -> None:
    assert refusal(write(tmp_path / "rows.csv", content.encode("utf-8", "surrogateescape"))).startswith(words)


def test_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*CHATS, {"messages": [{"role": "user", "content": None}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
    assert read(tmp_path / "rows.parquet") == rows
    assert open_rows(str(tmp_path / "rows.parquet")).columns == ["messages"]
    rows = [{"n": n, "text": f"{n}", "label": None} for n in range(700)]  # more than are streamed at once
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "many.PARQUET")
    assert read(tmp_path / "many.PARQUET") == rows


def test_absent_keys_of_a_struct_are_null(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "name": "c"}]
    filled = [{"messages": [turns[0] | {"name": None}, turns[1]]}]
    table = pyarrow.Table.from_pylist(filled)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == filled


def test_what_datasets_wrote_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["x", "y"]), "image": datasets.Image()})
    image = {"bytes": b"no image", "path": None}
    mixed = datasets.Dataset.from_dict({"label": [1, 0], "image": [None, image]}, features=features)
    mixed.to_parquet(tmp_path / "rows.parquet")
    mixed.save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        rows = open_rows(str(tmp_path / name))
        streamed = [row for _, row in stream_rows(str(tmp_path / name))]
        assert rows[0] == streamed[0] == {"label": 1, "image": None}
        assert outcome(rows, 1).startswith("the row cannot be read: ")
        assert str(streamed[1]).startswith("the row cannot be read: ")


def test_parquet_with_a_damaged_page(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {n}" for n in range(10_000)]}), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = random.Random(0).randbytes(3000)
    assert refusal(write(path, bytes(content))).startswith(" cannot be read: ")


@pytest.mark.parametrize("content", [b"abc", b"PAR1" + bytes(100) + b"PAR1", GOOD.encode()])
def test_what_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    said = refusal(write(tmp_path / "rows.parquet", content))
    assert re.fullmatch(r" cannot be read: .*(Parquet|parquet|thrift).*", said)


def test_parquet_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    write(path, path.read_bytes()[:-20])
    assert refusal(path).startswith(" cannot be read: ")


def test_tables_without_rows(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(table, tmp_path / "none.parquet")
    assert refusal(tmp_path / "none.parquet") == " holds no rows"
    with pyarrow.ipc.new_file(str(tmp_path / "none.arrow"), table.schema):
        pass
    assert refusal(tmp_path / "none.arrow") == " holds no rows"
    datasets.Dataset(table).save_to_disk(tmp_path / "none")
    assert refusal(tmp_path / "none") == " holds no rows"


@pytest.mark.parametrize("as_stream", [True, False])
def test_arrow(tmp_path: Path, as_stream: bool) -> None:
    path = write_arrow(tmp_path / "rows.arrow", CHATS, as_stream=as_stream)
    assert read(path) == CHATS
    write(path, path.read_bytes()[:-150])
    assert refusal(path).startswith(" cannot be read: ")


def test_what_is_no_arrow(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "rows.arrow", GOOD)).startswith(" cannot be read: ")


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    saved = datasets.Dataset.from_list(CHATS).with_format("numpy")
    saved.save_to_disk(folder, num_shards=2)
    assert find_units(str(folder)) == [str(folder)]
    assert read(folder) == CHATS
    assert open_rows(str(folder)).place(0) == f"{folder} row 1"
    (folder / "state.json").write_text("{}")
    assert refusal(folder).startswith(" cannot be read: ")


def test_a_saved_dataset_of_splits(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder)
    assert find_units(f"{folder}@train") == [str(folder / "train")]
    assert read(f"{folder}@train") == ROWS
    assert read(f"{folder}@test") == ROWS[:1]
    assert read(folder / "test") == ROWS[:1]
    said = f" has the splits test, train: name one, as {folder}@SPLIT"
    assert refusal(folder) == refusal(f"{folder}@gone", folder) == said
    assert refusal(f"{folder / 'test'}@train", folder / "test") == " has no splits: leave @train away"
    datasets.DatasetDict({"only": test}).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ROWS[:1]


def test_folders_of_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.ndjson", "README.md", ".hidden.jsonl", "dataset_info.json", "sub/c.jsonl"):
        write(tmp_path / "lines" / name, GOOD)
    assert find_units(str(tmp_path / "lines")) == [str(tmp_path / "lines" / name) for name in ("a.ndjson", "b.jsonl")]
    assert find_units(f"{tmp_path}/lines/") == find_units(str(tmp_path / "lines"))
    (tmp_path / "arrows").mkdir()
    write_arrow(tmp_path / "arrows" / "rows.arrow", ROWS, as_stream=True)
    assert read(tmp_path / "arrows") == ROWS
    assert refusal(tmp_path / "lines") == " stands for 2 files: open them one by one"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jsonl", "b.csv"], r" holds .csv, .jsonl files: name a kind, such as .*/\*.csv"),
        (["a.jsonl", "b.jsonl.gz"], r" holds .gz, .jsonl files: .*"),
        (["README.md", "sub/a.jsonl"], r" holds no .jsonl, .* file; .*/\*\*/\*.jsonl takes those of its folders"),
        ([".hidden.jsonl"], r" holds no .jsonl, .*"),
    ],
)
def test_folders_that_are_not_clear(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        write(tmp_path / "data" / name, GOOD)
    assert re.fullmatch(words, refusal(tmp_path / "data"))


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv", "sub/d.jsonl", "sub/deep/e.jsonl", "folder.jsonl/f.jsonl"):
        write(tmp_path / name, GOOD)
    monkeypatch.chdir(tmp_path)
    assert find_units("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert find_units(f"{tmp_path}/[ab].jsonl") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert find_units("sub/**/*.jsonl") == ["sub/d.jsonl", "sub/deep/e.jsonl"]
    assert read("b.json?") == [ROWS[0]]
    assert refusal("*.jsonl") == " stands for 2 files: open them one by one"
    assert refusal("*.parquet") == ": no file matches this pattern"


@pytest.mark.parametrize(
    "name", ["rows[12].jsonl", "rows?.jsonl", "*.jsonl", "a b#c%20.jsonl", "a::b.jsonl", "é.jsonl", "a@b.jsonl"]
)
def test_a_name_is_a_name_first(write_jsonl: Write, name: str) -> None:
    write_jsonl([{"text": "another"}], "rows1.jsonl")
    path = write_jsonl(ROWS, name)
    assert find_units(str(path)) == [str(path)]
    assert read(path) == ROWS


@pytest.mark.parametrize("name", ["rows[12]", "rows?", "a b#c%20", "é", "a@b"])
def test_names_of_other_kinds(tmp_path: Path, name: str) -> None:
    write(tmp_path / "rows1.csv", "text\nanother\n")
    assert read(write(tmp_path / f"{name}.csv", "prompt,completion\na,b\nc,d\n")) == ROWS
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / f"{name}.parquet")
    assert read(tmp_path / f"{name}.parquet") == ROWS
    assert read(write_arrow(tmp_path / f"{name}.arrow", ROWS, as_stream=True)) == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / name)
    assert read(tmp_path / name) == ROWS


def test_embedded_files() -> None:
    (unit,) = find_units("embedded:home/eval.jsonl")
    rows = open_rows("embedded:home/eval.jsonl")
    assert rows.name == unit
    assert rows.columns == ["messages"]
    assert len(rows) == len(read(unit)) > 0


def test_home_folder(write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_units("~/rows.jsonl") == [str(path)]
    assert [row for _, row in stream_rows("~/rows.jsonl")] == ROWS
    assert refusal("~nobody-of-that-name/rows.jsonl").startswith(" cannot be read: Could not determine home")


def test_relative_path(write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(ROWS)
    monkeypatch.chdir(tmp_path)
    assert read("rows.jsonl") == ROWS
    assert open_rows("./rows.jsonl").place(0) == "rows.jsonl row 1"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_empty_files(tmp_path: Path, suffix: str) -> None:
    assert refusal(write(tmp_path / f"rows.{suffix}", b"")) == " is empty"


def test_blank_files(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "rows.jsonl", "\n  \r\n\t\n")) == " holds no rows"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_utf_16(tmp_path: Path, encoding: str, suffix: str) -> None:
    said = refusal(write(tmp_path / f"rows.{suffix}", GOOD.encode(encoding)))
    assert said == " is UTF-16 or no text: turn it into UTF-8, such as with iconv -f UTF-16 -t UTF-8"


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    assert refusal(write(tmp_path / "rows.parquet", pointer)) == " is a pointer of Git LFS: run git lfs pull"


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.xlsx", "rows.jsonl.bak"])
def test_unknown_suffixes(tmp_path: Path, name: str) -> None:
    said = refusal(write(tmp_path / name, GOOD))
    assert said == ": rows are read from .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow files"


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.ZST", "rows.zip"])
def test_packed_files(tmp_path: Path, name: str) -> None:
    assert refusal(write(tmp_path / name, GOOD)) == " is packed: unpack it first"


@pytest.mark.parametrize("name", ["gone.jsonl", "gone@train", "a/b/c.jsonl"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == ": no such file"


@pytest.mark.parametrize("name", ["org/name", "HuggingFaceH4/ultrachat_200k", "org/name-v1.5", "org/name@test"])
def test_missing_files_that_look_like_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(name) == f": no such file; for a dataset of the hub write hub:{name}"
    assert refusal(f"{name}.jsonl") == ": no such file"


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert refusal(tmp_path / "pipe.jsonl").startswith(": rows are read from ")
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    assert refusal(tmp_path / "link.jsonl") == ": no such file"
    assert refusal(tmp_path / ("x" * 300 + ".jsonl")).startswith(" cannot be read: File name too long")


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Who may not read what root may."""
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


def test_permission_denied(write_jsonl: Write) -> None:
    path = write_jsonl(ROWS)
    path.chmod(0o000)
    with somebody_else():
        said = refusal(path)
    assert said == " cannot be read: Permission denied; let this user read it, such as with chmod u+r"


def test_digests(tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl(ROWS)
    assert content_digest(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content_digest(str(write(tmp_path / "bad.jsonl", "{bad"))) == hashlib.sha256(b"{bad").hexdigest()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    assert content_digest(str(tmp_path / "rows.parquet")) == hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match="no such file"):
        content_digest(str(tmp_path / "gone.jsonl"))


def test_digests_of_saved_datasets(tmp_path: Path) -> None:
    def digest(name: str, rows: list[dict[str, Any]], num_shards: int = 1) -> str:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name, num_shards=num_shards)
        return content_digest(str(tmp_path / name))

    first = digest("a", CHATS)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == digest("b", CHATS)
    assert len({first, digest("c", CHATS[::-1]), digest("d", CHATS[1:]), digest("e", CHATS, num_shards=2)}) == 4


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hub:org/name", ("org/name", None, "train")),
        ("hub:org/name@test", ("org/name", None, "test")),
        ("hub:org/name/main", ("org/name", "main", "train")),
        ("hub:org/na.me-2/20231101.en@train.sft", ("org/na.me-2", "20231101.en", "train.sft")),
    ],
)
def test_names_of_the_hub(name: str, parts: tuple[str, str | None, str]) -> None:
    assert parse_hub(name) == parts
    assert find_units(name) == [name]


@pytest.mark.parametrize(
    "name", ["hub:", "hub:name", "hub:org/", "hub:../name", "hub:/org/name", "hub:org/name@train[:10%]", "hub:a/b/c/d"]
)
def test_names_that_the_hub_cannot_have(name: str) -> None:
    said = ": a dataset of the hub is hub:ORG/NAME[/CONFIG][@SPLIT], and SPLIT a name, no slice"
    assert refusal(name) == said


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out_of_reach = " is not in the local cache and the hub is out of reach: connect once, with HF_HUB_OFFLINE unset"
    assert refusal("hub:org/name@test") == out_of_reach
    with pytest.raises(UserError, match="out of reach"):
        content_digest("hub:org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert refusal("hub:org/name").startswith(": datasets would read the folder org/name")


def test_the_hub_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched before is read again offline; a dataset of the hub lies in the cache as these folders do."""
    monkeypatch.chdir(tmp_path)
    for config, rows in (("one", ROWS), ("two", CHATS)):
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "org___cached" / config / "0.0.0" / "abc"
        folder.mkdir(parents=True)
        write_arrow(folder / "cached-train.arrow", rows, as_stream=True)
        info = datasets.Dataset.from_list(rows).info
        info.config_name, info.dataset_name, info.builder_name = config, "cached", "parquet"
        info.splits = datasets.SplitDict()
        info.splits.add(datasets.SplitInfo("train", num_examples=len(rows), dataset_name="cached"))
        info.write_to_directory(folder)
    assert read("hub:org/cached/one") == ROWS
    assert open_rows("hub:org/cached/two@train").place(1) == "hub:org/cached/two@train row 2"
    assert len(open_rows("hub:org/cached/two", limit=3)) == 3
    assert content_digest("hub:org/cached/one") != content_digest("hub:org/cached/two")
    assert refusal("hub:org/cached/one@test") == " has no split test: it has train"
    for name in ("hub:org/cached", "hub:org/cached/three"):
        said = refusal(name)
        assert re.match(r" could not be loaded \(ValueError: .*\bone\b.*\btwo\b|.*\btwo\b.*\bone\b", said)
        assert said.endswith("; the name is hub:ORG/NAME[/CONFIG][@SPLIT]")


ASK = """\
import sys
from adaptax.config import UserError
from adaptax.data.sources import open_rows, stream_rows
for read in (open_rows, lambda name: next(stream_rows(name))):
    try:
        read(sys.argv[1])
    except UserError as error:
        print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has a gated dataset, and no other."""

    def do_GET(self) -> None:
        """Refuses."""
        is_gated = "/org/gated" in self.path
        self.send_response(403 if is_gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gated", " is gated: ask for access at {page}, then set HF_TOKEN or run `hf auth login`"),
        (
            "gone",
            " does not exist or is private: look at {page}, and set HF_TOKEN or run `hf auth login` if it is yours",
        ),
        pytest.param(
            None,
            " is not in the local cache and the hub is out of reach: connect once, with HF_HUB_OFFLINE unset",
            marks=pytest.mark.slow,  # huggingface_hub tries again and again
        ),
    ],
)
def test_what_the_hub_refuses(tmp_path: Path, name: str | None, words: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1] if name else 9  # where nobody listens
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", ASK, f"hub:org/{name}"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    line = f"hub:org/{name}{words}\n".replace("{page}", f"https://huggingface.co/datasets/org/{name}")
    assert done.stdout == line * 2, done.stderr


def test_the_error_is_all_that_is_said(
    write_jsonl: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    with caplog.at_level(logging.DEBUG, logger="datasets"):
        refusal(write(tmp_path / "bad.parquet", "abc"))
        read(tmp_path / "rows.parquet")
        read(write_jsonl(ROWS, "good.jsonl"))
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert tuple(capfd.readouterr()) == ("", "")


OFFLINE = """\
import os, socket, sys
socket.getaddrinfo = lambda *args, **kwargs: os._exit(3)
from adaptax.data.sources import content_digest, open_rows, stream_rows
for name in sys.argv[2:]:
    content_digest(name)
    print(len(open_rows(name)), len(list(stream_rows(name))), sys.argv[1] in sys.modules)
"""


def test_reading_a_file_asks_nobody(write_jsonl: Write, tmp_path: Path) -> None:
    """Not the hub either, though it may be asked: a process of its own, whose look-ups of any host end it."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    texts = [
        write_jsonl(ROWS),
        write(tmp_path / "rows.json", json.dumps(ROWS)),
        write(tmp_path / "rows.csv", "prompt,completion\na,b\nc,d\n"),
        write(tmp_path / "rows.tsv", "prompt\tcompletion\na\tb\nc\td\n"),
    ]
    stream = write_arrow(tmp_path / "stream.arrow", ROWS, as_stream=True)
    tables = [tmp_path / "rows.parquet", stream, tmp_path / "saved"]
    tables.append(write_arrow(tmp_path / "file.arrow", ROWS, as_stream=False))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", OFFLINE, "datasets", *map(str, texts + tables)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    expected = "2 2 False\n" * len(texts) + "2 2 True\n" * len(
        tables
    )  # text needs no datasets, which is slow to import
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
