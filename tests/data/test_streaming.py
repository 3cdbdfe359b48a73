"""Rows read, encoded and packed on the fly: the same batches every time, and no file written."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from adaptax.config import UserError
from adaptax.data.catalog import train_sources
from adaptax.data.chat import Example
from adaptax.data.encode import encode_source
from adaptax.data.store import Examples
from adaptax.data.streaming import NUM_BINS, StreamSource
from adaptax.data.tokenizer import PAD, Tokenizer
from rows import Batch, Write, assert_same, chat, data_config, documents, hash_batch, run_config


def make_source(
    tokenizer: Tokenizer, train: Any = None, seed: int = 0, part: tuple[int, int] = (0, 1), **changes: Any
) -> StreamSource:
    """Batches of 2 x 4 sequences of 64 tokens."""
    data = data_config(train, **{"streaming": True, "packing": True, "shuffle": False} | changes)
    config = run_config(data, num_batches=10, seed=seed)
    return StreamSource(config, tokenizer, num_micro=2, batch_size=4, part=part)


def take(source: StreamSource, count: int, start: int = 0, prefetch: int = 2) -> list[Batch]:
    """The first batches."""
    return list(source.iterate(start, start + count, prefetch))


def encode(tokenizer: Tokenizer, train: Any, **changes: Any) -> list[Example]:
    """The rows of a file."""
    config = data_config(train, **changes)
    return list(Examples([s for source in train_sources(config) for s in encode_source(source, config, tokenizer)]))


def keys_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    """The tokens of each document, in order."""
    return [tuple(tokens.tolist()) for batch in batches for tokens, _ in documents(batch)]


@pytest.fixture
def path(write_jsonl: Write) -> Path:
    """A file of 300 conversations, each of its own."""
    return write_jsonl(chat(f"question {i}", "yes " * (i % 13) + f"{i}") for i in range(300))


# The same batches every time


def test_the_same_batches_every_time(path: Path, tokenizer: Tokenizer) -> None:
    first, second = (take(make_source(tokenizer, path, seed), 12) for seed in (0, 1))
    assert [hash_batch(batch) for batch in first] == [hash_batch(batch) for batch in second]
    assert len({hash_batch(batch) for batch in first}) == 12


@pytest.mark.parametrize("start", [1, 9, 30])
def test_starting_later_is_skipping(path: Path, tokenizer: Tokenizer, start: int) -> None:
    source = make_source(tokenizer, path)
    whole = [hash_batch(batch) for batch in take(source, start + 5)]
    assert [hash_batch(batch) for batch in take(source, 5, start)] == whole[start:]
    assert [hash_batch(batch) for batch in take(make_source(tokenizer, path), 5, start)] == whole[start:]


def test_shuffled_batches_are_those_of_the_seed(path: Path, tokenizer: Tokenizer) -> None:
    """Ten thousand rows are read for each."""
    whole = [hash_batch(batch) for batch in take(make_source(tokenizer, path, shuffle=True), 12)]
    later = [hash_batch(batch) for batch in take(make_source(tokenizer, path, shuffle=True), 5, 7)]
    other = [hash_batch(batch) for batch in take(make_source(tokenizer, path, seed=1, shuffle=True), 12)]
    plain = [hash_batch(batch) for batch in take(make_source(tokenizer, path), 12)]
    assert later == whole[7:]
    assert len({*whole, *other, *plain}) == 36


@pytest.mark.parametrize("prefetch", [1, 7, 50])
def test_what_is_prepared_ahead_changes_nothing(path: Path, tokenizer: Tokenizer, prefetch: int) -> None:
    source = make_source(tokenizer, path)
    expected = [hash_batch(batch) for batch in take(source, 10)]
    assert [hash_batch(batch) for batch in take(source, 10, prefetch=prefetch)] == expected
    assert take(source, 0) == []
    placed = list(source.iterate(0, 4, prefetch, place=lambda batch: ("placed", hash_batch(batch))))
    assert placed == [("placed", h) for h in expected[:4]]


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_the_parts_of_processes_are_the_batch(path: Path, tokenizer: Tokenizer, num_parts: int) -> None:
    whole = take(make_source(tokenizer, path), 5)
    sources = [make_source(tokenizer, path, part=(i, num_parts)) for i in range(num_parts)]
    for batches in zip(whole, *(take(source, 5) for source in sources), strict=True):
        joined = {name: np.concatenate([batch[name] for batch in batches[1:]], axis=1) for name in batches[0]}
        assert_same(joined, batches[0])
    assert {source.shape for source in sources} == {(2, 4 // num_parts)}


# What is in them


@pytest.mark.parametrize(
    "changes", [{}, {"shuffle": True}, {"max_length": 50}, {"max_length": 24, "overlong": "split"}]
)
def test_every_document_of_a_batch_is_a_row(path: Path, tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    rows = {tuple(e.tokens.tolist()): e.is_trained for e in encode(tokenizer, path, **changes)}
    source = make_source(tokenizer, path, **changes)
    length = -(-changes.get("max_length", 64) // 8) * 8
    assert source.lengths == [length]
    for batch in take(source, 12):
        assert {name: str(array.dtype) for name, array in batch.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "loss_mask": "bool",
            "segments": "int32",
            "positions": "int32",
        }
        assert {array.shape for array in batch.values()} == {(2, 4, length)}
        for tokens, arrays in documents(batch):
            np.testing.assert_array_equal(arrays["positions"], np.arange(len(tokens)))
            np.testing.assert_array_equal(arrays["targets"][:-1], tokens[1:])
            np.testing.assert_array_equal(arrays["loss_mask"][:-1], rows[tuple(tokens.tolist())][1:])
            assert not arrays["loss_mask"][-1]  # its target would be the next document's
        padding = batch["segments"] == 0
        assert not batch["loss_mask"][padding].any()
        assert (batch["tokens"][padding] == PAD).all()


def test_rows_come_round_in_their_order(path: Path, tokenizer: Tokenizer) -> None:
    """So many sequences are filled at once, and then served: among these is every row before any comes again."""
    rows = [tuple(e.tokens.tolist()) for e in encode(tokenizer, path)]
    sequences: list[list[tuple[int, ...]]] = []
    for batch in take(make_source(tokenizer, path), 8 * NUM_BINS // 8):
        for a, b in itertools.product(range(2), range(4)):
            sequences.append(keys_of([{name: array[a : a + 1, b : b + 1] for name, array in batch.items()}]))
    start = 0
    for group in range(0, len(sequences), NUM_BINS):
        found = [key for sequence in sequences[group : group + NUM_BINS] for key in sequence]
        expected = [rows[(start + i) % len(rows)] for i in range(len(found))]
        assert Counter(found) == Counter(expected)
        start += len(found)
    assert start > 2 * len(rows)


def test_every_row_of_a_pass_comes_once_before_any_comes_again(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    """Rows that fill a sequence each, so that their order shows."""
    path = write_jsonl({"text": f"{i} " + "lamp " * 100} for i in range(40))
    rows = [tuple(e.tokens.tolist()) for e in encode(tokenizer, path)]
    assert len(set(rows)) == 40
    found = keys_of(take(make_source(tokenizer, path), 16))
    assert found == (rows * 4)[: 16 * 8]


def test_sequences_are_filled(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    """Rows of exp(N(4, 0.9)) words, 4 to 500, in sequences of 512 tokens."""
    words = np.clip(np.random.default_rng(0).lognormal(4, 0.9, 1500), 4, 500).astype(int)
    path = write_jsonl({"text": "lamp " * count} for count in words.tolist())
    segments = np.concatenate([b["segments"].ravel() for b in take(make_source(tokenizer, path, max_length=512), 16)])
    assert (segments > 0).mean() > 0.95


def test_files_follow_each_other(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    files = [
        write_jsonl([{"text": f"{name}{i} " + "lamp " * 100} for i in range(10)], f"{name}.jsonl") for name in "ab"
    ]
    names = [str(path) for path in files]
    rows = [tuple(e.tokens.tolist()) for e in encode(tokenizer, names)]
    assert keys_of(take(make_source(tokenizer, names), 5)) == rows * 2


@pytest.mark.parametrize("shuffle", [pytest.param(True, marks=pytest.mark.slow), False])
def test_shares_of_a_mixture(write_jsonl: Write, tokenizer: Tokenizer, shuffle: bool) -> None:
    """3 : 1 of the rows, however many there are of each."""
    files = [
        write_jsonl([{"text": f"{name}{i} " + "lamp " * 100} for i in range(n)], f"{name}.jsonl")
        for name, n in (("small", 7), ("large", 200))
    ]
    entries = [{"path": str(path), "weight": weight} for path, weight in zip(files, (3, 1), strict=True)]
    found = keys_of(take(make_source(tokenizer, mixture=entries, shuffle=shuffle), 25))
    small, large = ([tuple(e.tokens.tolist()) for e in encode(tokenizer, path)] for path in files)
    assert len(found) == 200
    count = sum(key in small for key in found)
    assert set(found) <= set(small) | set(large)
    if shuffle:
        assert 110 < count < 190
        return
    assert count == 150
    for prefix in range(1, 200):
        assert abs(sum(key in small for key in found[:prefix]) - 0.75 * prefix) <= 1
    assert [key for key in found if key in small] == (small * 22)[:150]
    assert [key for key in found if key in large] == large[:50]


def test_only_rows_that_are_taken(path: Path, write_jsonl: Write, tokenizer: Tokenizer) -> None:
    rows = write_jsonl([{"text": f"{i} " + "lamp " * 100, "n": i} for i in range(50)], "texts.jsonl")
    expected = [tuple(e.tokens.tolist()) for e in encode(tokenizer, rows)]
    source = make_source(tokenizer, rows, filter={"n": ">= 2"}, max_rows=10)
    assert keys_of(take(source, 2)) == expected[2:10] * 2


# What goes wrong


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_bad_row_is_named_when_it_is_met(write_jsonl: Write, tokenizer: Tokenizer, shuffle: bool) -> None:
    rows: list[Any] = [chat("a", "b")] * 400
    rows[301] = chat("a", "")
    path = write_jsonl(rows)
    with pytest.raises(UserError) as caught:
        take(make_source(tokenizer, path, shuffle=shuffle), 40)
    assert str(caught.value).startswith(f"{path} row 302: messages[1].content is empty")


def test_rows_far_ahead_are_not_read(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    rows: list[Any] = [{"text": f"{i} " + "lamp " * 100} for i in range(2000)]
    path = write_jsonl([*rows, "{ no JSON"])
    assert len(take(make_source(tokenizer, path), 10)) == 10
    with pytest.raises(UserError, match=rf"{path} row 2001: "):
        take(make_source(tokenizer, path), 300)


def test_skipped_rows_are_told_once(write_jsonl: Write, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """Not in every pass: shuffled, ten thousand rows are read before the first batch."""
    path = write_jsonl([*[chat(f"{i}", "b") for i in range(100)], chat("a", ""), {"messages": 3}])
    batches = take(make_source(tokenizer, path, on_bad_row="skip", shuffle=True), 3)
    assert len(set(keys_of(batches))) > 20
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told[0] == f"{path}: 2 rows skipped, as they cannot be used, among them"
    assert told[1:] == [
        f"{path}: {path} row 101: messages[1].content is empty",
        f"{path}: {path} row 102: messages must be a list of turns, not 3",
    ]


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (
            [{"text": "a", "n": 1}],
            {"filter": {"n": 2}},
            "no row of .* is left to use: 1 row left out by data.filter",
        ),
        (
            [{"text": ""}, {"text": " "}],
            {"on_bad_row": "skip"},
            "no row of .* is left to use: 2 rows skipped, as they cannot be used",
        ),
        ([chat("a", "lamp " * 200)], {}, "no <end_of_turn> of .* is trained: raise data.max_length"),
        ([], {}, "is empty"),
    ],
)
def test_a_source_of_nothing_to_train_is_an_error_not_an_endless_search(
    write_jsonl: Write, tokenizer: Tokenizer, rows: list[Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        take(make_source(tokenizer, write_jsonl(rows), **changes), 1)


# Nothing is written


def files_under(*folders: Path) -> set[Path]:
    """Every file in these folders."""
    return {file for folder in folders for file in folder.rglob("*") if file.is_file()}


def test_no_file_is_written(path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([chat(f"{i}", "b") for i in range(100)])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    watched = tmp_path, Path(os.environ["XDG_CACHE_HOME"]), Path(os.environ["HF_DATASETS_CACHE"])
    before = files_under(*watched)
    for name in (path, tmp_path / "rows.parquet"):
        take(make_source(tokenizer, name, cache=True, cache_dir=str(tmp_path / "cache")), 4)
        take(make_source(tokenizer, name, cache=True), 4)
    assert files_under(*watched) == before


def test_the_state_of_an_iterator_is_a_place_to_go_on_from(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([chat(f"{i}", "b") for i in range(40)])
    running, again = (make_source(tokenizer, path, shuffle=True).iterate(1, 6, 2) for _ in range(2))
    for _ in range(2):
        next(running)
    again.set_state(running.get_state())  # type: ignore[attr-defined]
    rest = list(running)
    assert [hash_batch(batch) for batch in again] == [hash_batch(batch) for batch in rest]
    assert len(rest) == 3
