"""From files to batches: nothing lost, nothing doubled, nothing trained that should not be."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from adaptax.config import DataConfig, UserError
from adaptax.data.chat import Example, encode_chat
from adaptax.data.pipeline import (
    BatchSource,
    Dataset,
    encode_files,
    iterate,
    load_data,
    pad_batch,
    padded_length,
)
from adaptax.data.tokenizer import Tokenizer

FIRST_ID = 200  # row i of make_data holds the token FIRST_ID + i
Write = Callable[..., Path]
Batch = dict[str, np.ndarray]


def data_config(train: Any = None, **changes: Any) -> DataConfig:
    """A data section with usual values."""
    values: dict[str, Any] = {
        "train": train,
        "eval": None,
        "eval_fraction": 0.0,
        "format": "auto",
        "max_length": 64,
        "shuffle": True,
        "prefetch_batches": 2,
    }
    return DataConfig(**(values | changes))


def chat(user: str, assistant: str) -> dict[str, Any]:
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def make_data(num_rows: int) -> Dataset:
    """Rows of 3 to 9 tokens that tell who they are, each with something trained."""
    draw = np.random.default_rng(0)
    examples = []
    for i in range(num_rows):
        tokens = np.array([2, FIRST_ID + i, *draw.integers(10, 99, draw.integers(1, 8))], np.int32)
        is_trained = draw.random(len(tokens)) < 0.5
        is_trained[0], is_trained[-1] = False, True
        examples.append(Example(tokens, is_trained))
    return Dataset(examples)


def make_source(data: Dataset, **changes: Any) -> BatchSource:
    """Batches of 2 x 2 rows of 16 tokens."""
    values: dict[str, Any] = {"num_micro": 2, "batch_size": 2, "length": 16, "shuffle": True, "seed": 0}
    return BatchSource(data, **(values | changes))


def rows_in(batch: Batch) -> list[int]:
    """Which rows a batch holds, in order."""
    tokens, segments = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "segments"))
    return [int(row[1]) - FIRST_ID for row, segment in zip(tokens, segments, strict=True) if segment.any()]


def epoch_rows(source: BatchSource, epoch: int) -> list[int]:
    """The rows of an epoch, in order."""
    steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
    return [row for step in steps for row in rows_in(source[step])]


def assert_same(left: Batch, right: Batch) -> None:
    """Two batches are equal in every array."""
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# Files to examples


def test_every_row_of_every_file(write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer) -> None:
    chats = write_jsonl([chat("Hi", "Hello"), chat("a", "b")], "chats.jsonl")
    pairs = write_jsonl([{"prompt": "c", "completion": "d"}], "pairs.jsonl")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat("e", "f")]), tmp_path / "more.parquet")
    names = [str(chats), str(pairs), str(tmp_path / "more.parquet")]
    data = encode_files(names, data_config(), tokenizer)
    turns = [chat("Hi", "Hello"), chat("a", "b"), chat("c", "d"), chat("e", "f")]
    expected = [encode_chat(turn["messages"], tokenizer) for turn in turns]
    assert [e.tokens.tolist() for e in data.examples] == [e.tokens.tolist() for e in expected]
    assert [e.is_trained.tolist() for e in data.examples] == [e.is_trained.tolist() for e in expected]
    assert (data.num_truncated, data.num_dropped) == (0, 0)
    assert data.num_supervised == sum(int(e.is_trained.sum()) for e in expected)
    assert data.max_tokens == max(len(e.tokens) for e in expected)


GOOD = chat("Hi", "Hello")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, GOOD, {"messages": [{"role": "usr", "content": "a"}]}], " row 3: messages[0].role is 'usr': did you"),
        ([GOOD, chat("", "b")], " row 2: messages[0].content is empty"),
        ([GOOD, {"messages": GOOD["messages"][:1]}], " row 2: no assistant turn, so nothing to train on"),
        ([{"messages": GOOD["messages"][1:]}], " row 1: messages[0] is assistant: roles must alternate"),
        ([GOOD, {"messages": GOOD["messages"] + GOOD["messages"][1:]}], " row 2: messages[2] is assistant: roles must"),
        ([GOOD, {"messages": "Hi"}], " row 2: messages must be a list of turns, not 'Hi'"),
        ([GOOD, "null"], " row 2: messages must be a list of turns, not None"),
        ([GOOD, {"other": 1}], " row 2: messages must be a list of turns, not None"),
        ([GOOD, {"messages": [{"role": "user", "content": 3}]}], " row 2: messages[0].content must be a text, not 3"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}], " row 2: completion must be a text"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], " row 2: completion must be a text, not None"),
        ([{"text": "a"}, {"text": " "}], " row 2: text is empty"),
        ([{"text": "a"}, '{"text": "\\ud800"}'], " row 2: character 1 of '\\ud800' is half a surrogate pair"),
        ([GOOD, "{bad"], " line 2: not valid JSON"),
        ([{"question": "a", "answer": "b"}], " has the columns question, answer; no format fits"),
    ],
)
def test_bad_rows_are_named_with_their_file(
    write_jsonl: Write, tokenizer: Tokenizer, rows: list[Any], words: str
) -> None:
    good, bad = write_jsonl([GOOD], "good.jsonl"), write_jsonl(rows, "bad.jsonl")
    with pytest.raises(UserError) as caught:
        encode_files([str(good), str(bad)], data_config(), tokenizer)
    assert str(caught.value).startswith(f"{bad}{words}")


def test_bad_rows_of_parquet_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 20, "completion": ["b"] * 16 + [""] * 4}), path)
    with pytest.raises(UserError) as caught:
        encode_files([str(path)], data_config(), tokenizer)
    assert str(caught.value) == f"{path} row 17: completion is empty"


def test_a_named_format(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = str(write_jsonl([GOOD | {"text": "plain"}]))
    data = encode_files([path], data_config(format="text"), tokenizer)
    assert tokenizer.decode(data.examples[0].tokens.tolist()) == "plain"
    with pytest.raises(UserError, match=r"rows.jsonl has no column prompt, completion, which data.format="):
        encode_files([path], data_config(format="prompt_completion"), tokenizer)


def test_long_rows_are_cut_and_counted(
    write_jsonl: Write, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [GOOD, chat("a", "lamp " * 200), chat("lamp " * 200, "b"), chat("c", "lamp " * 200)]
    with caplog.at_level(logging.WARNING):
        data = encode_files([str(write_jsonl(rows))], data_config(max_length=32), tokenizer)
    assert (len(data.examples), data.num_truncated, data.num_dropped) == (3, 3, 1)
    assert [len(e.tokens) for e in data.examples][1:] == [32, 32]
    whole = encode_chat(rows[1]["messages"], tokenizer)
    np.testing.assert_array_equal(data.examples[1].tokens, whole.tokens[:32])
    np.testing.assert_array_equal(data.examples[1].is_trained, whole.is_trained[:32])
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "3 rows were cut to data.max_length=32 tokens",
        "1 of them had nothing left to train after the cut and were dropped",
    ]


def test_a_row_that_just_fits_is_not_cut(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    length = len(encode_chat(GOOD["messages"], tokenizer).tokens)
    path = str(write_jsonl([GOOD]))
    assert encode_files([path], data_config(max_length=length), tokenizer).num_truncated == 0
    assert encode_files([path], data_config(max_length=length - 1), tokenizer).num_truncated == 1


def test_nothing_left_to_train_is_an_error(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([chat("lamp " * 200, "b"), chat("lamp " * 300, "c")])
    with pytest.raises(UserError) as caught:
        encode_files([str(path)], data_config(max_length=32), tokenizer)
    assert str(caught.value) == (
        f"{path}: all 2 rows have nothing left to train after the cut to data.max_length=32 tokens; raise it"
    )


# Training and held-out rows


def load(path: Path, tokenizer: Tokenizer, **changes: Any) -> tuple[list[str], list[str]]:
    """The answers in (training, held-out) rows."""
    train, held_out = load_data(data_config(str(path), **changes), tokenizer)
    texts = [[tokenizer.decode(e.tokens[e.is_trained].tolist()) for e in data.examples] for data in (train, held_out)]
    return texts[0], texts[1]


@pytest.fixture
def twenty(write_jsonl: Write) -> Path:
    """A file of rows answered row 0 to row 19."""
    return write_jsonl([chat("q", f"row {i}") for i in range(20)])


ANSWERS = [f"row {i}<end_of_turn>" for i in range(20)]


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 5), (0.05, 1), (0.01, 1), (0.06, 2), (0.9, 18)])
def test_held_out_rows_are_the_others(twenty: Path, tokenizer: Tokenizer, fraction: float, count: int) -> None:
    train, held_out = load(twenty, tokenizer, eval_fraction=fraction)
    assert len(held_out) == count
    assert sorted(train + held_out) == sorted(ANSWERS)
    assert [answer for answer in ANSWERS if answer in train] == train  # in the file's order


def test_held_out_rows_are_drawn_the_same_every_time(twenty: Path, tokenizer: Tokenizer) -> None:
    """They do not depend on the run's seed, so that the losses of a sweep over seeds compare."""
    draws = [load(twenty, tokenizer, eval_fraction=0.25)[1] for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0] not in (ANSWERS[:5], ANSWERS[-5:])


def test_no_held_out_rows(twenty: Path, tokenizer: Tokenizer) -> None:
    assert load(twenty, tokenizer, eval_fraction=0.0) == (ANSWERS, [])


def test_held_out_rows_of_their_own(twenty: Path, write_jsonl: Write, tokenizer: Tokenizer) -> None:
    other = write_jsonl([chat("q", "other")], "eval.jsonl")
    assert load(twenty, tokenizer, eval=str(other), eval_fraction=0.5) == (ANSWERS, ["other<end_of_turn>"])
    assert load(twenty, tokenizer, eval=[str(other), str(other)])[1] == ["other<end_of_turn>"] * 2


def test_counts_of_the_cut_stay_with_the_training_rows(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([*[chat("q", "lamp " * 100)] * 4, chat("lamp " * 100, "a")])
    train, held_out = load_data(data_config(str(path), eval_fraction=0.25, max_length=32), tokenizer)
    assert (train.num_truncated, train.num_dropped) == (5, 1)
    assert (len(train.examples), len(held_out.examples)) == (3, 1)


@pytest.mark.parametrize(("num_rows", "fraction"), [(1, 0.05), (2, 0.9)])
def test_too_few_rows_to_hold_any_out(write_jsonl: Write, tokenizer: Tokenizer, num_rows: int, fraction: float) -> None:
    path = write_jsonl([GOOD] * num_rows)
    with pytest.raises(UserError, match=rf"data.train has {num_rows} usable row\(s\): too few to hold out"):
        load(path, tokenizer, eval_fraction=fraction)


def test_no_training_file(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="data.train is not set"):
        load_data(data_config(None), tokenizer)


# Examples to batches


def test_targets_are_the_next_tokens_and_the_mask_is_theirs() -> None:
    data = make_data(5)
    batch = pad_batch(data.examples, (3, 2, 16))
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "tokens": ((3, 2, 16), "int32"),
        "targets": ((3, 2, 16), "int32"),
        "loss_mask": ((3, 2, 16), "bool"),
        "segments": ((3, 2, 16), "int32"),
        "positions": ((3, 2, 16), "int32"),
    }
    flat = {name: array.reshape(6, 16) for name, array in batch.items()}
    for i, example in enumerate(data.examples):
        n = len(example.tokens)
        assert flat["tokens"][i].tolist() == example.tokens.tolist() + [0] * (16 - n)
        assert flat["targets"][i].tolist() == example.tokens[1:].tolist() + [0] * (17 - n)
        assert flat["loss_mask"][i].tolist() == example.is_trained[1:].tolist() + [False] * (17 - n)
        assert flat["segments"][i].tolist() == [1] * n + [0] * (16 - n)
        assert flat["positions"][i, :n].tolist() == list(range(n))
    assert not flat["segments"][5].any()
    assert not flat["loss_mask"][5].any()


def test_trained_targets_are_the_answer(tokenizer: Tokenizer) -> None:
    batch = pad_batch([encode_chat(GOOD["messages"], tokenizer)], (1, 1, 32))
    assert tokenizer.decode(batch["targets"][batch["loss_mask"]].tolist()) == "Hello<end_of_turn>"


def test_a_row_as_long_as_the_batch_is_whole() -> None:
    tokens = np.arange(10, 26, dtype=np.int32)
    batch = pad_batch([Example(tokens, np.ones(16, bool))], (1, 1, 16))
    assert batch["tokens"][0, 0].tolist() == tokens.tolist()
    assert batch["targets"][0, 0].tolist() == [*range(11, 26), 0]
    assert batch["loss_mask"][0, 0].tolist() == [True] * 15 + [False]


@pytest.mark.parametrize(("lengths", "padded"), [((3,), 8), ((8,), 8), ((9,), 16), ((3, 33), 40), ((33, 3), 40)])
def test_one_length_for_training_and_evaluation(lengths: tuple[int, ...], padded: int) -> None:
    datasets = [Dataset([Example(np.zeros(n, np.int32), np.ones(n, bool))]) for n in lengths]
    assert padded_length(*datasets, Dataset()) == padded


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_rows", [1, 3, 4, 8, 13])
def test_every_row_once_in_every_epoch(num_rows: int, shuffle: bool) -> None:
    data = make_data(num_rows)
    source = make_source(data, shuffle=shuffle)
    assert source.steps_per_epoch == -(-num_rows // 4)
    for epoch in range(3):
        assert sorted(epoch_rows(source, epoch)) == list(range(num_rows))
        steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
        assert sum(int(source[step]["loss_mask"].sum()) for step in steps) == data.num_supervised


def test_the_last_batch_is_filled_with_rows_that_train_nothing() -> None:
    source = make_source(make_data(13))
    for epoch in range(2):
        batch = source[epoch * 4 + 3]
        assert batch["tokens"].shape == (2, 2, 16)
        assert len(rows_in(batch)) == 1
        assert batch["loss_mask"].reshape(4, 16)[1:].sum() == 0
        assert batch["segments"].reshape(4, 16)[1:].sum() == 0


def test_epochs_have_orders_of_their_own() -> None:
    source = make_source(make_data(13))
    orders = [tuple(epoch_rows(source, epoch)) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert tuple(range(13)) not in orders


def test_the_files_order_without_shuffling() -> None:
    source = make_source(make_data(13), shuffle=False)
    assert [epoch_rows(source, epoch) for epoch in range(2)] == [list(range(13))] * 2


def test_the_seed_alone_decides() -> None:
    first, same, other = (make_source(make_data(13), seed=seed) for seed in (3, 3, 4))
    for step in range(8):
        assert_same(first[step], same[step])
    assert epoch_rows(first, 0) != epoch_rows(other, 0)


def test_the_shape_of_a_batch_does_not_change_the_order() -> None:
    """The same rows in the same order, however many go into a step."""
    orders = [
        epoch_rows(make_source(make_data(13), num_micro=num_micro, batch_size=batch_size), 1)
        for num_micro, batch_size in itertools.product((1, 2), (1, 3))
    ]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("prefetch", [1, 2, 7])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_batches_do_not_depend_on_where_one_starts(start: int, prefetch: int) -> None:
    source = make_source(make_data(13))
    batches = list(iterate(source, start, 9, prefetch))
    assert len(batches) == 9 - start
    for step, batch in enumerate(batches, start=start):
        assert_same(batch, source[step])


def test_nothing_is_left_to_iterate() -> None:
    assert list(iterate(make_source(make_data(3)), 4, 4, 2)) == []


def test_embedded_rows_are_good(tokenizer: Tokenizer) -> None:
    """The dataset that ships with the package fits its own configuration: nothing cut, nothing dropped."""
    names = ["embedded:home/eval.jsonl"]
    data = encode_files(names, data_config(max_length=128, format="messages"), tokenizer)
    assert (data.num_truncated, data.num_dropped) == (0, 0)
    answers = [tokenizer.decode(e.tokens[e.is_trained].tolist()).removesuffix("<end_of_turn>") for e in data.examples]
    assert all(isinstance(json.loads(answer), dict) for answer in answers[:50])
