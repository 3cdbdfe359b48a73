"""Rows to tokens: each as alone, in order, cut as asked, and everything that was left out counted."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from adaptax.config import UserError
from adaptax.data.catalog import train_sources
from adaptax.data.chat import Example
from adaptax.data.encode import CHUNK_ROWS, count_all, describe_counts, encode_source, stream_examples
from adaptax.data.pipeline import load_data
from adaptax.data.store import Counts, Examples
from adaptax.data.tokenizer import BOS, END_OF_TURN, START_OF_TURN, Tokenizer
from rows import Write, chat, data_config, encode_chat, encode_text

GOOD = chat("Hi", "Hello")


def encode(path: Any, tokenizer: Tokenizer, **changes: Any) -> tuple[Examples, Counts]:
    """(rows, counts) of all training files."""
    config = data_config(path, **changes)
    stores = [store for source in train_sources(config) for store in encode_source(source, config, tokenizer)]
    return Examples(stores), count_all(stores)


def stream(path: Any, tokenizer: Tokenizer, **changes: Any) -> tuple[list[Example], Counts]:
    """(rows, counts) of all training files, read one after another."""
    config, total = data_config(path, **changes), Counts()
    sources = train_sources(config)
    return [row.example for s in sources for row in stream_examples(s, config, tokenizer, total)], total


def targets(example: Example) -> list[int]:
    """What is trained of a sequence."""
    return example.tokens[1:][example.is_trained[1:]].tolist()


def numbers_of(examples: Examples) -> list[int]:
    """The numbers that the rows have in their files."""
    return [int(examples.place(i).rpartition(" ")[2]) for i in range(len(examples))]


def assert_equal(examples: Any, expected: list[Example]) -> None:
    """The same rows in the same order."""
    assert len(examples) == len(expected)
    for ours, theirs in zip(examples, expected, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.is_trained.tolist() == theirs.is_trained.tolist()


# Each row as alone, in the order of the files


def test_every_row_of_every_file(write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer) -> None:
    chats = write_jsonl([chat("Hi", "Hello"), chat("a", "b")], "chats.jsonl")
    pairs = write_jsonl([{"prompt": "c", "completion": "d"}], "pairs.jsonl")
    texts = write_jsonl([{"text": "plain"}], "texts.jsonl")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat("e", "f")]), tmp_path / "more.parquet")
    names = [str(path) for path in (chats, pairs, texts, tmp_path / "more.parquet")]
    turns = [chat("Hi", "Hello"), chat("a", "b"), chat("c", "d")]
    expected = [encode_chat(turn["messages"], tokenizer) for turn in turns]
    expected += [encode_text("plain", tokenizer), encode_chat(chat("e", "f")["messages"], tokenizer)]
    examples, counts = encode(names, tokenizer)
    assert_equal(examples, expected)
    assert counts == Counts(rows=5, chats=4, terminators=4)
    assert [store.format for store in examples.stores] == ["messages", "prompt_completion", "text", "messages"]
    assert examples.place(1) == f"{chats} row 2"
    assert_equal(stream(names, tokenizer)[0], expected)


@pytest.mark.parametrize("num_rows", [CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3000])
def test_rows_stay_in_their_order_whichever_thread_is_first(
    write_jsonl: Write, tokenizer: Tokenizer, num_rows: int
) -> None:
    """The first rows take longest."""
    path = write_jsonl({"text": f"row {i} " + "lamp " * (300 if i < CHUNK_ROWS else 1)} for i in range(num_rows))
    examples, counts = encode(path, tokenizer, max_length=2048)
    assert counts.rows == num_rows
    assert numbers_of(examples) == list(range(1, num_rows + 1))
    for i in (0, CHUNK_ROWS - 2, num_rows - 1):
        assert tokenizer.decode(examples[i].tokens.tolist()).startswith(f"row {i} ")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be held to one core here")
def test_the_number_of_cores_does_not_change_a_byte(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    words = ["lamp", "Zażółć", "你好", "<end_of_turn>", "\n\n", "🏠"]
    rows = [chat(f"{i}", "x" + " ".join(draw.choices(words, k=draw.randrange(60)))) for i in range(2000)]
    path, cores = write_jsonl(rows), os.sched_getaffinity(0)
    stores = []
    for chosen in (cores, {min(cores)}):
        os.sched_setaffinity(0, chosen)
        try:
            stores.append(encode(path, tokenizer, overlong="split", max_length=32)[0].stores[0])
        finally:
            os.sched_setaffinity(0, cores)
    assert stores[0].counts == stores[1].counts
    assert {n: a.tobytes() for n, a in stores[0].arrays.items()} == {
        n: a.tobytes() for n, a in stores[1].arrays.items()
    }


def test_a_named_format_and_columns(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([GOOD | {"text": "plain", "question": "q", "answer": "a"}])
    assert_equal(encode(path, tokenizer)[0], [encode_chat(GOOD["messages"], tokenizer)])
    assert_equal(encode(path, tokenizer, format="text")[0], [encode_text("plain", tokenizer)])
    columns = {"prompt": "question", "completion": "answer"}
    assert_equal(encode(path, tokenizer, columns=columns)[0], [encode_chat(chat("q", "a")["messages"], tokenizer)])
    with pytest.raises(UserError, match=r"rows.jsonl has no column prompt, completion, which data.format="):
        encode(path, tokenizer, format="prompt_completion")


@pytest.mark.parametrize("supervise", ["assistant", "last_assistant", "all"])
def test_what_is_supervised(write_jsonl: Write, tokenizer: Tokenizer, supervise: str) -> None:
    messages = chat("q1", "a1")["messages"] + chat("q2", "a2")["messages"]
    examples, _ = encode(write_jsonl([{"messages": messages}]), tokenizer, supervise=supervise)
    assert_equal(examples, [encode_chat(messages, tokenizer, supervise)])
    trained = tokenizer.decode(examples[0].tokens[examples[0].is_trained].tolist())
    turns = "<start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"
    assert (
        trained
        == {
            "assistant": "a1<end_of_turn>a2<end_of_turn>",
            "last_assistant": "a2<end_of_turn>",
            "all": turns + turns.replace("q1", "q2").replace("a1", "a2"),
        }[supervise]
    )


@pytest.mark.parametrize("max_rows", [1, 4, 5, 299, 1000])
def test_at_most_so_many_rows_of_a_source(
    write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer, max_rows: int
) -> None:
    """From its start, however many files it is; those left out count."""
    for name, count in (("a.jsonl", 4), ("b.jsonl", 300)):
        write_jsonl([{"text": f"{name} {i}", "n": i} for i in range(count)], name)
    changes: dict[str, Any] = {"max_rows": max_rows, "filter": {"n": "> 0"}}
    examples, counts = encode(tmp_path, tokenizer, **changes)
    taken = min(max_rows, 304)
    assert counts.rows == taken
    assert len(examples) == taken - (1 if taken <= 4 else 2)
    streamed, streamed_counts = stream(tmp_path, tokenizer, **changes)
    assert streamed_counts == counts
    assert_equal(streamed, list(examples))


# Bad rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, GOOD, {"messages": [{"role": "usr", "content": "a"}]}], " row 3: messages[0].role is 'usr': did you"),
        ([GOOD, chat("", "b")], " row 2: messages[0].content is empty"),
        ([GOOD, {"messages": GOOD["messages"][:1]}], " row 2: messages has no assistant turn, so nothing to train on"),
        ([{"messages": GOOD["messages"][1:]}], " row 1: messages[0] is assistant: roles must alternate"),
        ([GOOD, {"messages": GOOD["messages"] + GOOD["messages"][1:]}], " row 2: messages[2] is assistant: roles must"),
        ([GOOD, {"messages": "Hi"}], " row 2: messages must be a list of turns, not 'Hi'"),
        ([GOOD, "null"], " row 2: "),
        ([GOOD, {"other": 1}], " row 2: column messages is not there; the row has other"),
        ([GOOD, {"messages": [{"role": "user", "content": 3}]}], " row 2: messages[0].content must be a text, not 3"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}], " row 2: completion must be a text"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], " row 2: column completion is not there"),
        ([{"text": "a"}, {"text": " "}], " row 2: text is empty"),
        ([{"text": "a"}, {"text": "<bos>a"}], " row 2: text begins with <bos>, which is put there anyway: BOS would"),
        ([{"text": "a"}, '{"text": "\\ud800"}'], " row 2: character 1 of '\\ud800' is half a surrogate pair"),
        ([GOOD, "{bad"], " row 2: "),
        ([{"question": "a", "answer": "b"}], " has the columns question, answer; no format fits"),
    ],
)
@pytest.mark.parametrize("read", [encode, stream])
def test_bad_rows_are_named_with_their_file(
    write_jsonl: Write, tokenizer: Tokenizer, rows: list[Any], words: str, read: Any
) -> None:
    good, bad = write_jsonl([GOOD], "good.jsonl"), write_jsonl(rows, "bad.jsonl")
    with pytest.raises(UserError) as caught:
        read([str(good), str(bad)], tokenizer)
    assert str(caught.value).startswith(f"{bad}{words}")


def test_bad_rows_of_parquet_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 20, "completion": ["b"] * 16 + [""] * 4}), path)
    for read in (encode, stream):
        with pytest.raises(UserError) as caught:
            read(path, tokenizer)
        assert str(caught.value) == f"{path} row 17: completion is empty"


@pytest.mark.parametrize("read", [encode, stream])
@pytest.mark.parametrize("kind", ["of tokens", "of text", "of JSON"])
def test_the_first_bad_row_of_the_file_is_named_whichever_is_found_first(
    write_jsonl: Write, tokenizer: Tokenizer, read: Any, kind: str
) -> None:
    """The rows before it take long; those after it, bad as well, do not."""
    broken: dict[str, Any] = {"of tokens": {"text": "\ud800"}, "of text": {"text": " "}, "of JSON": "{"}
    rows: list[Any] = [{"text": "lamp " * (2000 if i < 600 else 1)} for i in range(2500)]
    for place, other in ((650, kind), (700, "of text"), (1400, "of JSON"), (2499, "of tokens")):
        rows[place] = broken[other]
    path = write_jsonl(rows)
    with pytest.raises(UserError) as caught:
        read(path, tokenizer, max_length=4096)
    assert str(caught.value).startswith(f"{path} row 651: ")


@pytest.mark.parametrize("read", [encode, stream])
def test_bad_rows_may_be_skipped_and_are_counted(write_jsonl: Write, tokenizer: Tokenizer, read: Any) -> None:
    rows: list[Any] = [{"text": f"row {i}"} for i in range(1500)]
    bad = range(5, 1500, 100)
    for place in bad:
        rows[place] = ["{", {"text": ""}, {"text": "\ud800"}, {"other": 1}][place // 100 % 4]
    path = write_jsonl(rows)
    examples, counts = read(path, tokenizer, on_bad_row="skip")
    assert [tokenizer.decode(e.tokens.tolist()) for e in examples] == [f"row {i}" for i in range(1500) if i not in bad]
    assert (counts.rows, counts.bad) == (1500, 15)
    assert len(counts.listed) == 10
    assert all(line.startswith(f"{path} row {i + 1}: ") for line, i in zip(counts.listed, bad[:10], strict=True))


def test_skipped_rows_are_told_with_their_files(
    write_jsonl: Write, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    names = [str(write_jsonl([{"text": "a"}, {"text": ""}], f"{name}.jsonl")) for name in "ab"]
    load_data(data_config(names, on_bad_row="skip"), tokenizer)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        "data.train: 2 rows skipped, as they cannot be used, among them",
        f"data.train: {names[0]} row 2: text is empty",
        f"data.train: {names[1]} row 2: text is empty",
    ]


def test_rows_of_a_file_without_a_good_one(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([{"text": ""}, {"text": " "}])
    with pytest.raises(UserError) as caught:
        load_data(data_config(path, on_bad_row="skip"), tokenizer)
    assert str(caught.value) == (
        f"data.train: no row of {path} is left to use: 2 rows skipped, as they cannot be used, among them; "
        f"{path} row 1: text is empty; {path} row 2: text is empty"
    )


# Length


def test_long_rows_are_cut_and_counted(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    rows = [GOOD, chat("a", "lamp " * 200), chat("lamp " * 200, "b"), chat("c", "lamp " * 200)]
    examples, counts = encode(write_jsonl(rows), tokenizer, max_length=32)
    assert (len(examples), counts.truncated, counts.untrained) == (3, 3, 1)
    assert numbers_of(examples) == [1, 2, 4]
    assert examples.lengths.tolist()[1:] == [32, 32]
    whole = encode_chat(rows[1]["messages"], tokenizer)
    np.testing.assert_array_equal(examples[1].tokens, whole.tokens[:32])
    np.testing.assert_array_equal(examples[1].is_trained, whole.is_trained[:32])
    assert describe_counts(counts, data_config(max_length=32)) == [
        "3 rows cut to data.max_length=32 tokens",
        "1 row with nothing to train left out",
    ]


@pytest.mark.parametrize(("overlong", "name"), [("truncate", "truncated"), ("split", "split"), ("drop", "dropped")])
def test_a_row_that_just_fits_is_not_overlong(
    write_jsonl: Write, tokenizer: Tokenizer, overlong: str, name: str
) -> None:
    whole = encode_text("lamp " * 20, tokenizer)
    path, length = write_jsonl([{"text": "lamp " * 20}, {"text": "a"}]), len(whole.tokens)
    for limit, count in ((length, 0), (length - 1, 1)):
        examples, counts = encode(path, tokenizer, overlong=overlong, max_length=limit)
        assert (getattr(counts, name), counts.truncated + counts.split + counts.dropped) == (count, count)
        assert (examples[0].tokens.tolist() == whole.tokens.tolist()) == (not count)


def test_long_rows_may_be_left_out(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    rows = [GOOD, chat("a", "lamp " * 200), GOOD]
    examples, counts = encode(write_jsonl(rows), tokenizer, max_length=32, overlong="drop")
    assert numbers_of(examples) == [1, 3]
    assert counts == Counts(rows=3, dropped=1, chats=2, terminators=2)
    assert describe_counts(counts, data_config(max_length=32)) == [
        "1 row of more than data.max_length=32 tokens left out"
    ]


@pytest.mark.parametrize("limit", [8, 9, 17, 64])
def test_splitting_a_row_loses_no_target(write_jsonl: Write, tokenizer: Tokenizer, limit: int) -> None:
    draw = random.Random(limit)
    rows: list[Any] = []
    for i in range(60):
        turns = [("lamp " * draw.randrange(1, 30) + str(i)).strip() for _ in range(2 * draw.randrange(1, 4))]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        rows.append({"messages": [message for pair in pairs for message in chat(*pair)["messages"]]})
    whole = [encode_chat(row["messages"], tokenizer) for row in rows]
    examples, counts = encode(write_jsonl(rows), tokenizer, max_length=limit, overlong="split")
    assert counts.split == sum(len(e.tokens) > limit for e in whole)
    assert counts.chats == len(examples)
    assert counts.terminators == sum(len(row["messages"]) // 2 for row in rows)
    assert examples.lengths.max() <= limit
    found: dict[int, list[int]] = {}
    for number, example in zip(numbers_of(examples), examples, strict=True):
        assert example.tokens[0] == BOS
        assert np.count_nonzero(example.tokens == BOS) == 1
        assert not example.is_trained[0]
        assert targets(example)
        found.setdefault(number, []).extend(targets(example))
    assert found == {i: targets(example) for i, example in enumerate(whole, start=1)}


def test_windows_of_a_text_are_it_again(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    text = " ".join(map(str, range(200)))
    examples, _ = encode(write_jsonl([{"text": text}]), tokenizer, max_length=50, overlong="split")
    assert examples.lengths[:-1].tolist() == [50] * (len(examples) - 1)
    tokens = [token for example in examples for token in example.tokens[1:].tolist()]
    assert [BOS, *tokens] == encode_text(text, tokenizer).tokens.tolist()


def test_short_rows_are_left_out_and_counted(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    texts = ["a", "lamp lamp", "lamp " * 30]
    lengths = [len(encode_text(text, tokenizer).tokens) for text in texts]
    assert lengths == sorted(set(lengths))
    path = write_jsonl([{"text": text} for text in texts])
    for i, length in enumerate(lengths):
        examples, counts = encode(path, tokenizer, min_length=length)
        assert numbers_of(examples) == list(range(i + 1, 4))
        assert counts.short == i
    assert describe_counts(counts, data_config(min_length=9)) == [
        "2 rows of fewer than data.min_length=9 tokens left out"
    ]


# What is left out, and what is refused


@pytest.mark.parametrize("read", [encode, stream])
def test_rows_are_filtered_and_counted(write_jsonl: Write, tokenizer: Tokenizer, read: Any) -> None:
    rows = [{"text": f"row {i}", "score": i / 10, "lang": "en" if i % 2 else "de"} for i in range(600)]
    rows[3] |= {"text": ""}  # left out, and so not looked at
    examples, counts = read(write_jsonl(rows), tokenizer, filter={"score": ">= 30", "lang": "en"})
    kept = [f"row {i}" for i in range(300, 600) if i % 2]
    assert [tokenizer.decode(e.tokens.tolist()) for e in examples] == kept
    assert counts == Counts(rows=600, filtered=600 - len(kept))
    assert describe_counts(counts, data_config()) == ["450 rows left out by data.filter"]


@pytest.mark.parametrize("read", [encode, stream])
def test_a_filter_of_no_column(write_jsonl: Write, tokenizer: Tokenizer, read: Any) -> None:
    path = write_jsonl([{"text": "a", "lang": "en"}])
    with pytest.raises(UserError, match=rf"data.filter: {path} has no column language; it has text, lang"):
        read(path, tokenizer, filter={"language": "en"})


def test_a_filter_that_cannot_compare_makes_a_bad_row(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([{"text": "a", "score": 1}, {"text": "b", "score": "high"}])
    with pytest.raises(UserError, match=r"row 2: score must be a number for data.filter's '> 0', not 'high'"):
        encode(path, tokenizer, filter={"score": "> 0"})
    examples, counts = encode(path, tokenizer, filter={"score": "> 0"}, on_bad_row="skip")
    assert (numbers_of(examples), counts.bad, counts.filtered) == ([1], 1, 0)


def test_no_row_passes_the_filter(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([{"text": "a", "lang": "en"}] * 3)
    with pytest.raises(UserError, match=r"no row of .* is left to use: 3 rows left out by data.filter"):
        load_data(data_config(path, filter={"lang": "de"}), tokenizer)


def masked(*answers: str) -> dict[str, Any]:
    """A conversation whose rows say that they are not to be trained."""
    row = [message for answer in answers for message in chat("q", answer)["messages"]]
    return {"messages": [message | {"train": False} for message in row]}


def test_rows_that_train_nothing_are_counted(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    examples, counts = encode(write_jsonl([GOOD, masked("a"), masked("b", "c"), GOOD]), tokenizer)
    assert numbers_of(examples) == [1, 4]
    assert counts.untrained == 2


@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_nothing_to_train_in_any_row_is_an_error(write_jsonl: Write, tokenizer: Tokenizer, supervise: str) -> None:
    path = write_jsonl([masked("a")] * 2)
    with pytest.raises(UserError) as caught:
        load_data(data_config(path, supervise=supervise), tokenizer)
    assert str(caught.value) == (f"data.train: no row of {path} is left to use: 2 rows with nothing to train left out")


def test_nothing_left_to_train_after_the_cut_is_an_error(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([chat("lamp " * 200, "b"), chat("lamp " * 300, "c")])
    with pytest.raises(UserError) as caught:
        load_data(data_config(path, max_length=32), tokenizer)
    assert str(caught.value) == (
        f"data.train: no row of {path} is left to use: 2 rows cut to data.max_length=32 tokens; "
        "2 rows with nothing to train left out"
    )


def test_answers_that_never_end_are_an_error(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([chat("a", "lamp " * 200)] * 3)
    words = r"data.train: no <end_of_turn> of an answer in .*rows.jsonl is trained, so none would ever end: raise data"
    with pytest.raises(UserError, match=words):
        load_data(data_config(path, max_length=32), tokenizer)
    assert len(load_data(data_config(path, max_length=32, overlong="split"), tokenizer)[0].examples)
    more = write_jsonl([GOOD], "more.jsonl")
    with pytest.raises(UserError, match=words):  # another source does not make up for it
        load_data(data_config([str(path), str(more)], max_length=32), tokenizer)
    with pytest.raises(UserError, match=words):  # nor do the ends of the user's turns
        load_data(data_config(path, max_length=32, supervise="all"), tokenizer)
    both = write_jsonl([GOOD, chat("a", "lamp " * 200)], "both.jsonl")
    assert len(load_data(data_config(both, max_length=32), tokenizer)[0].examples) == 2


def test_answers_that_never_end_are_an_error_beside_texts_too(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    chats, texts = write_jsonl([chat("a", "lamp " * 200)] * 3), write_jsonl([{"text": "a"}] * 50, "texts.jsonl")
    with pytest.raises(UserError, match="no <end_of_turn> of .* is trained"):
        load_data(data_config([str(chats), str(texts)], max_length=32), tokenizer)
    assert len(load_data(data_config(texts, max_length=32), tokenizer)[0].examples) == 50  # which have no turns


def test_a_second_bos_is_an_error(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    allowed = Tokenizer(tokenizer.path, allow_special=True)
    path = write_jsonl([GOOD, chat("a <bos> b", "c")])
    with pytest.raises(UserError, match=r"rows.jsonl row 2: BOS is doubled: a text spells <bos>"):
        encode(path, allowed, allow_special_tokens=True)
    examples, _ = encode(path, tokenizer)  # plain text without it
    assert np.count_nonzero(examples[1].tokens == BOS) == 1


def test_special_tokens_in_the_rows_are_counted(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    rows = [chat("a", "b"), chat("<eos> and <unused3>", "b <end_of_turn>"), chat("c", "<start_of_turn> d")]
    path, allowed = write_jsonl(rows), Tokenizer(tokenizer.path, allow_special=True)
    examples, counts = encode(path, tokenizer)
    assert counts.special == 2
    for token in (START_OF_TURN, END_OF_TURN):
        assert [int((e.tokens == token).sum()) for e in examples] == [2, 2, 2]
    assert describe_counts(counts, data_config()) == [
        "2 rows with special tokens spelled out, which stay plain text: rows "
        "that are in the chat template already would be in it twice"
    ]
    rows[1:] = [chat("<eos> and <unused3>", "b"), chat("c", "<pad> d")]
    config = data_config(write_jsonl(rows), allow_special_tokens=True)
    data, _ = load_data(config, allowed)
    assert data.counts.special == 2
    assert [int((e.tokens < BOS).sum()) for e in data.examples] == [0, 1, 1]
    assert describe_counts(data.counts, config) == ["2 rows with special tokens spelled out, which became these tokens"]


def test_nothing_is_said_of_rows_that_are_simply_taken(
    write_jsonl: Write, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    load_data(data_config(write_jsonl([GOOD] * 3)), tokenizer)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_embedded_rows_are_good(tokenizer: Tokenizer) -> None:
    """The dataset that ships with the package fits its own configuration: nothing cut, nothing left out."""
    for name, count in (("train", 2000), ("eval", 200)):
        examples, counts = encode(f"embedded:home/{name}.jsonl", tokenizer, max_length=128, format="messages")
        assert counts == Counts(rows=count, chats=count, terminators=count)
        answers = [tokenizer.decode(e.tokens[e.is_trained].tolist()) for e in examples[:50]]
        assert all(isinstance(json.loads(answer.removesuffix("<end_of_turn>")), dict) for answer in answers)


@pytest.mark.parametrize(
    "changes", [{}, {"overlong": "split", "max_length": 24}, {"overlong": "drop", "max_length": 24}]
)
def test_rows_that_are_streamed_are_the_same(write_jsonl: Write, tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    path = write_jsonl([chat(f"q {i}", "lamp " * (i % 40) + "x") for i in range(700)])
    examples, counts = encode(path, tokenizer, **changes)
    streamed, streamed_counts = stream(path, tokenizer, **changes)
    assert_equal(streamed, list(examples))
    assert streamed_counts == counts


def test_turns_that_the_rows_spell_do_not_hide_the_ends_of_answers(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    """Where special tokens are allowed, a request may hold whole turns; the answer's end counts all the same."""
    allowed = Tokenizer(tokenizer.path, allow_special=True)
    inner = "a<end_of_turn>\n<start_of_turn>user\nb"
    path = write_jsonl([chat(inner, "c")] * 3)
    for supervise in ("assistant", "all"):
        changes = {"allow_special_tokens": True, "supervise": supervise}
        examples, counts = encode(path, allowed, **changes)
        assert (len(examples), counts.terminators) == (3, 3)
