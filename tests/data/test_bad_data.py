"""Malformed data: each is one line that names the file, the row or column, and the way out; nothing is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from adaptax.config import UserError
from adaptax.data.catalog import check_sources
from adaptax.data.feed import open_feed
from adaptax.data.tokenizer import Tokenizer
from rows import chat, data_config, run_config

GOOD = json.dumps(chat("Hi", "Hello"))
USER, ANSWER = chat("Hi", "Hello")["messages"]
Make = Callable[[Path], None]


def messages(*turns: Any) -> str:
    """A line of JSON."""
    return json.dumps({"messages": list(turns)})


def refusal(folder: Path, tokenizer: Tokenizer, train: Any = None, **settings: Any) -> str:
    """What is said of the data: one line."""
    config = run_config(data_config(train, **settings))

    def read() -> None:
        check_sources(config)
        open_feed(config, tokenizer)

    with pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{folder}/", "")


# Row 3 of rows.jsonl is the bad one; (line, what is said of it).
BAD_ROWS: dict[str, tuple[str | bytes, list[str]]] = {
    "broken JSON": ('{"messages": [', ["not valid JSON"]),
    "single quotes": ("{'messages': []}", ["not valid JSON"]),
    "a list for an object": ('[{"role": "user"}]', ["JSON object", "list"]),
    "a text for an object": ('"Hi"', ["JSON object", "str"]),
    "invalid UTF-8": (b'{"messages": "caf\xe9"}', ["UTF-8"]),
    "null for messages": ('{"messages": null}', ["messages must be a list of turns, not None"]),
    "a text for messages": ('{"messages": "Hi"}', ["messages must be a list of turns, not 'Hi'"]),
    "a number for messages": ('{"messages": 3}', ["messages must be a list of turns, not 3"]),
    "empty messages": ('{"messages": []}', ["messages must be a list of turns, not []"]),
    "another format's row": ('{"prompt": "a", "completion": "b"}', ["column messages", "prompt, completion"]),
    "a text for a message": (messages("Hi", "Hello"), ["messages[0] must be an object with role and content"]),
    "null for a message": (messages(USER, None), ["messages[1] must be an object"]),
    "no role": (messages({"content": "Hi"}, ANSWER), ["messages[0].role is None", "user, assistant"]),
    "a misspelt role": (messages({"role": "usr", "content": "a"}, ANSWER), ["messages[0].role", "did you mean user"]),
    "a number for a role": (messages({"role": 1, "content": "a"}, ANSWER), ["messages[0].role is 1"]),
    "a tool turn": (messages(USER, {"role": "tool", "content": "{}"}), ["messages[1]", "tool", "write it as text"]),
    "a tool call": (
        messages(USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
        ["messages[1]", "tool", "write it as text"],
    ),
    "no content": (messages({"role": "user"}, ANSWER), ["messages[0].content must be a text, not None"]),
    "null content": (messages(USER, {"role": "assistant", "content": None}), ["messages[1].content", "not None"]),
    "a number for content": (messages({"role": "user", "content": 3}, ANSWER), ["messages[0].content", "not 3"]),
    "an object for content": (messages({"role": "user", "content": {"a": 1}}, ANSWER), ["messages[0].content", "{'a"]),
    "empty content": (messages(USER, {"role": "assistant", "content": ""}), ["messages[1].content is empty"]),
    "blank content": (messages({"role": "user", "content": " \n"}, ANSWER), ["messages[0].content is empty"]),
    "empty parts": (messages({"role": "user", "content": []}, ANSWER), ["messages[0].content is empty"]),
    "an image": (
        messages({"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER),
        ["messages[0].content[0] is of type 'image'", "only text", "take it out"],
    ),
    "a part without text": (
        messages({"role": "user", "content": [{"type": "text"}]}, ANSWER),
        ["messages[0].content[0].text must be a text, not None"],
    ),
    "a bare text as part": (messages({"role": "user", "content": ["Hi"]}, ANSWER), ["messages[0].content[0]", "type"]),
    "the assistant first": (messages(ANSWER, USER), ["messages[0] is assistant", "alternate"]),
    "two users in a row": (messages(USER, USER, ANSWER), ["messages[1] is user", "alternate"]),
    "a late system turn": (
        messages(USER, ANSWER, {"role": "system", "content": "s"}),
        ["messages[2]: a system turn may only come first"],
    ),
    "a system turn alone": (messages({"role": "system", "content": "s"}), ["no user turn"]),
    "no assistant turn": (messages(USER), ["no assistant turn, so nothing to train on"]),
    "a text for train": (messages(USER, ANSWER | {"train": "no"}), ["messages[1].train must be true or false"]),
    "half a weight": (messages(USER, ANSWER | {"weight": 0.5}), ["messages[1].weight must be 0 or 1, not 0.5"]),
    "train against weight": (messages(USER, ANSWER | {"train": True, "weight": 0}), ["messages[1].train", "keep one"]),
    "half a surrogate pair": ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', ["no assistant turn"]),
    "half a surrogate pair in an answer": (
        messages(USER, {"role": "assistant", "content": "\ud83d"}),
        ["half a surrogate pair"],
    ),
    "a line of 50 MB": (b'{"messages": "' + b"a" * 50_000_000 + b'"}', ["long", "16 MiB"]),
    "deeply nested": ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", ["not valid JSON", "recursion"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    line, words = BAD_ROWS[name]
    raw = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), GOOD.encode(), raw, GOOD.encode()]))
    text = refusal(tmp_path, tokenizer, path)
    assert text.startswith("rows.jsonl row 3: "), text
    assert all(word in text for word in words), text
    assert len(text) < 400


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_skipped_where_that_is_asked_for(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    line, words = BAD_ROWS[name]
    raw = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), GOOD.encode(), raw, GOOD.encode()]))
    with caplog.at_level(logging.WARNING):
        feed = open_feed(run_config(data_config(path, on_bad_row="skip")), tokenizer)
    assert feed.train is not None
    assert (len(feed.train.examples), feed.train.counts.bad) == (3, 1)
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "1 row skipped, as they cannot be used" in told
    assert "rows.jsonl row 3: " in told
    assert all(word in told for word in words)


def write_utf16(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(GOOD, encoding="utf-16")


def write_half_parquet(folder: Path) -> None:
    pa.parquet.write_table(pa.table({"text": ["a" * 100] * 50}), folder / "rows.parquet")
    whole = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(whole[: len(whole) // 2])


def write_half_arrow(folder: Path) -> None:
    table = pa.table({"text": ["abcdef" * 1000] * 50})
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    whole = (folder / "rows.arrow").read_bytes()
    (folder / "rows.arrow").write_bytes(whole[: len(whole) // 2])


def write_parquet_with_null(folder: Path) -> None:
    pa.parquet.write_table(pa.table({"prompt": ["a", None], "completion": ["b", "c"]}), folder / "rows.parquet")


def write_parquet_with_numbers(folder: Path) -> None:
    pa.parquet.write_table(pa.table({"prompt": ["a", "b"], "completion": [1, 2]}), folder / "rows.parquet")


def write(name: str, text: str | bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text) and None


PAIR = '{"prompt": "a", "completion": "b"}\n'

# (files, data.train, other settings, how the message begins, what it says)
BAD_FILES: dict[str, tuple[Make, str, dict[str, Any], str, list[str]]] = {
    "missing": (lambda folder: None, "gone.jsonl", {}, "data.train=", ["gone.jsonl: no such file"]),
    "empty": (write("rows.jsonl", ""), "rows.jsonl", {}, "rows.jsonl", ["empty"]),
    "blank lines alone": (write("rows.jsonl", "\n\n \n"), "rows.jsonl", {}, "rows.jsonl", ["no rows"]),
    "UTF-16": (write_utf16, "rows.jsonl", {}, "rows.jsonl", ["UTF-16", "UTF-8"]),
    "compressed": (write("rows.jsonl.gz", b"\x1f\x8b"), "rows.jsonl.gz", {}, "rows.jsonl.gz", ["unpack it"]),
    "of an unknown kind": (write("rows.txt", "a"), "rows.txt", {}, "rows.txt", [".jsonl"]),
    "a glob that matches nothing": (write("a.jsonl", GOOD), "b*.jsonl", {}, "data.train=", ["no file matches"]),
    "half a Parquet file": (write_half_parquet, "rows.parquet", {}, "rows.parquet", ["Parquet"]),
    "half an Arrow file": (write_half_arrow, "rows.arrow", {}, "rows.arrow", ["Arrow"]),
    "Parquet with a null": (write_parquet_with_null, "rows.parquet", {}, "rows.parquet row 2", ["prompt", "None"]),
    "Parquet with numbers": (write_parquet_with_numbers, "rows.parquet", {}, "rows.parquet row 1", ["completion", "1"]),
    "half a JSON list": (write("rows.json", f"[{GOOD}, "), "rows.json", {}, "rows.json", ["JSON"]),
    "a JSON object": (
        write("rows.json", '{\n"data": [\n' + GOOD + "]}"),
        "rows.json",
        {},
        "rows.json",
        ["data"],
    ),
    "CSV with a ragged row": (
        write("rows.csv", "prompt,completion\na,b\nc,d,e\n"),
        "rows.csv",
        {},
        "rows.csv row 2",
        ["3", "2"],
    ),
    "CSV without rows": (write("rows.csv", "prompt,completion\n"), "rows.csv", {}, "rows.csv", ["no rows"]),
    "CSV in Latin-1": (write("rows.csv", b"prompt,completion\ncaf\xe9,b\n"), "rows.csv", {}, "rows.csv", ["UTF-8"]),
    "CSV with an empty cell": (
        write("rows.csv", "prompt,completion\na,b\nc,\n"),
        "rows.csv",
        {},
        "rows.csv row 2",
        ["completion is empty"],
    ),
    "missing beside one of nearly its name": (
        write("chats.jsonl", GOOD),
        "chat.jsonl",
        {},
        "data.train=chat.jsonl: no such file",
        ["did you mean chats.jsonl?"],
    ),
    "CSV with semicolons": (
        write("rows.csv", "prompt;completion\na;b\n"),
        "rows.csv",
        {},
        "rows.csv",
        ["single column 'prompt;completion'", "save it with commas"],
    ),
    "CSV with a space in its header": (
        write("rows.csv", "prompt, completion\na,b\n"),
        "rows.csv",
        {},
        "rows.csv",
        ["' completion'", "take it out of the header"],
    ),
    "no known columns": (
        write("rows.jsonl", '{"question": "a", "answer": "b"}'),
        "rows.jsonl",
        {},
        "rows.jsonl",
        ["question, answer", "no format fits", "data.columns={prompt: question"],
    ),
    "columns of another format": (
        write("rows.jsonl", PAIR),
        "rows.jsonl",
        {"format": "alpaca"},
        "rows.jsonl",
        ["instruction, output", "data.format=alpaca", "it has prompt, completion"],
    ),
    "an unknown format": (
        write("rows.jsonl", PAIR),
        "rows.jsonl",
        {"format": "alpacca"},
        "data.format=alpacca",
        ["did you mean alpaca"],
    ),
    "a mapped column that is not there": (
        write("rows.jsonl", PAIR),
        "rows.jsonl",
        {"columns": {"prompt": "question"}},
        "rows.jsonl",
        ["no column question", "data.columns", "prompt, completion"],
    ),
    "a column map of an unknown name": (
        write("rows.jsonl", PAIR),
        "rows.jsonl",
        {"columns": {"promt": "question"}},
        "data.columns",
        ["promt", "did you mean prompt"],
    ),
    "a mapped column in a later row": (
        write("rows.jsonl", '{"q": "a", "a": "b"}\n{"q": "a", "a": ""}\n'),
        "rows.jsonl",
        {"columns": {"prompt": "q", "completion": "a"}},
        "rows.jsonl row 2",
        ["a is empty"],
    ),
    "a filter on a column that is not there": (
        write("rows.jsonl", PAIR),
        "rows.jsonl",
        {"filter": {"lang": "en"}},
        "data.filter",
        ["rows.jsonl", "no column lang", "prompt, completion"],
    ),
    "a filter that cannot be read": (
        write("rows.jsonl", PAIR),
        "rows.jsonl",
        {"filter": {"prompt": "~("}},
        "data.filter.prompt",
        ["regular expression"],
    ),
    "a filter that compares a text with a number": (
        write("rows.jsonl", PAIR),
        "rows.jsonl",
        {"filter": {"prompt": "> 3"}},
        "rows.jsonl row 1",
        ["prompt must be a number", "'a'"],
    ),
    "a filter that takes nothing": (
        write("rows.jsonl", PAIR * 3),
        "rows.jsonl",
        {"filter": {"prompt": "z"}},
        "data.train",
        ["rows.jsonl", "3 rows left out by data.filter"],
    ),
    "every row masked": (
        write("rows.jsonl", messages(USER, ANSWER | {"train": False}) + "\n"),
        "rows.jsonl",
        {},
        "data.train",
        ["rows.jsonl", "nothing to train"],
    ),
    "every answer cut off": (
        write("rows.jsonl", json.dumps(chat("word " * 200, "b"))),
        "rows.jsonl",
        {"max_length": 16},
        "data.train",
        ["rows.jsonl", "nothing to train"],
    ),
    "every terminator cut off": (
        write("rows.jsonl", json.dumps(chat("a", "word " * 200))),
        "rows.jsonl",
        {"max_length": 32},
        "data.train",
        ["<end_of_turn>", "rows.jsonl", "raise data.max_length"],
    ),
    "every row too long": (
        write("rows.jsonl", json.dumps(chat("a", "word " * 200))),
        "rows.jsonl",
        {"max_length": 32, "overlong": "drop"},
        "data.train",
        ["1 row of more than data.max_length=32"],
    ),
    "every row too short": (
        write("rows.jsonl", GOOD),
        "rows.jsonl",
        {"min_length": 60},
        "data.train",
        ["1 row of fewer than data.min_length=60"],
    ),
    "BOS doubled": (
        write("rows.jsonl", '{"text": "<bos>Hello"}'),
        "rows.jsonl",
        {},
        "rows.jsonl row 1",
        ["text begins with <bos>", "doubled", "take it out"],
    ),
    "an evaluation set that is all masked": (
        write("rows.jsonl", messages(USER, ANSWER | {"weight": 0}) + "\n"),
        "embedded:home/train.jsonl",
        {"eval": "rows.jsonl"},
        "data.eval",
        ["rows.jsonl", "nothing to train"],
    ),
    "an evaluation file that is not there": (
        lambda folder: None,
        "embedded:home/train.jsonl",
        {"eval": "gone.jsonl"},
        "data.eval=",
        ["gone.jsonl: no such file"],
    ),
    "too few rows to hold one out": (
        write("rows.jsonl", GOOD),
        "rows.jsonl",
        {"eval_fraction": 0.5},
        "data.train has 1",
        ["too few to hold out", "data.eval=FILE"],
    ),
    "a mixture without weight": (
        write("rows.jsonl", GOOD),
        "",
        {"mixture": [{"path": "rows.jsonl"}]},
        "data.mixture[0].weight",
        ["is missing", "such as 1"],
    ),
    "a mixture with a misspelt key": (
        write("rows.jsonl", GOOD),
        "",
        {"mixture": [{"path": "rows.jsonl", "wieght": 1}]},
        "data.mixture[0].wieght",
        ["did you mean weight"],
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make, train, settings, start, words = BAD_FILES[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    text = refusal(tmp_path, tokenizer, train or None, **settings)
    assert text.startswith(start), text
    assert all(word in text for word in words), text


def test_special_tokens_that_break_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Where special tokens of the rows are allowed, what they make must still be the template."""
    allowing = Tokenizer(tokenizer.path, allow_special=True)
    path = tmp_path / "rows.jsonl"
    for text, words in (("a<start_of_turn>b", "without its <end_of_turn>"), ("<bos>", "BOS is doubled")):
        path.write_text(f"{GOOD}\n{json.dumps(chat(text, 'Hello'))}\n")
        said = refusal(tmp_path, allowing, path, allow_special_tokens=True)
        assert said.startswith("rows.jsonl row 2: ")
        assert words in said


def test_there_are_enough_of_them() -> None:
    assert len(BAD_ROWS) + len(BAD_FILES) >= 40
