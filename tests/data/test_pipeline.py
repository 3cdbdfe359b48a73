"""From rows to batches: nothing lost, nothing doubled, nothing trained that should not be."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptax.config import UserError
from adaptax.data.chat import Example
from adaptax.data.pipeline import (
    BatchSource,
    Dataset,
    Part,
    choose_lengths,
    count_shared,
    load_data,
    load_held_out,
    pad_batch,
)
from adaptax.data.store import Counts, Examples, TokenStore
from adaptax.data.tokenizer import PAD, Tokenizer
from rows import FIRST_ID, Batch, Write, assert_same, chat, data_config, documents, encode_chat, hash_batch

NUM_ROWS, CAPACITY = 53, 32


def make_data(num_rows: int = NUM_ROWS, mixture: tuple[Part, ...] = (), longest: int = 30) -> Dataset:
    """Rows of 3 tokens and more that tell who they are, each with something trained."""
    draw = np.random.default_rng(0)
    examples = []
    for i in range(num_rows):
        tokens = np.array([2, FIRST_ID + i, *draw.integers(10, 99, draw.integers(1, longest - 1))], np.int32)
        is_trained = draw.random(len(tokens)) < 0.5
        is_trained[0], is_trained[-1] = False, True
        examples.append(Example(tokens, is_trained))
    return Dataset(Examples([TokenStore.of("rows", "text", examples, Counts())]), mixture=mixture)


def make_source(data: Dataset | None = None, **changes: Any) -> BatchSource:
    """Batches of 2 x 4 sequences of 32 tokens."""
    values: dict[str, Any] = {"num_micro": 2, "batch_size": 4, "buckets": np.array([CAPACITY]), "shuffle": True}
    return BatchSource(data or make_data(), **(values | changes))


BUCKETS = np.array([8, 16, 32])
MIXTURE = (Part(np.arange(10), 25), Part(np.arange(10, NUM_ROWS), 28))
KINDS: dict[str, Callable[..., BatchSource]] = {
    "one length": make_source,
    "packed": lambda **changes: make_source(packing=True, **changes),
    "buckets": lambda **changes: make_source(buckets=BUCKETS, **changes),
    "mixture": lambda **changes: make_source(make_data(mixture=MIXTURE), **changes),
    "packed mixture": lambda **changes: make_source(make_data(mixture=MIXTURE), packing=True, **changes),
    "mixture in buckets": lambda **changes: make_source(make_data(mixture=MIXTURE), buckets=BUCKETS, **changes),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
ONCE = pytest.mark.parametrize("kind", [kind for kind in KINDS if "mixture" not in kind])


def rows_in(batch: Batch) -> list[int]:
    """Which rows of make_data a batch holds, in order."""
    return [int(tokens[1]) - FIRST_ID for tokens, _ in documents(batch)]


def epoch_of(source: BatchSource, epoch: int) -> list[Batch]:
    """The batches of an epoch."""
    return [source[k] for k in range(source.count_steps(epoch), source.count_steps(epoch + 1))]


def epoch_rows(source: BatchSource, epoch: int) -> list[int]:
    """The rows of an epoch, in order."""
    return [row for batch in epoch_of(source, epoch) for row in rows_in(batch)]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Training and held-out rows


def load(path: Any, tokenizer: Tokenizer, **changes: Any) -> tuple[list[str], list[str]]:
    """The answers in (training, held-out) rows."""
    train, held_out = load_data(data_config(path, **changes), tokenizer)
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
    assert [answer for answer in ANSWERS if answer in held_out] == held_out


def test_held_out_rows_are_drawn_the_same_every_time(twenty: Path, tokenizer: Tokenizer) -> None:
    """They do not depend on the run's seed, so that the losses of a sweep over seeds compare."""
    draws = [load(twenty, tokenizer, eval_fraction=0.25)[1] for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0] not in (ANSWERS[:5], ANSWERS[-5:])


def test_no_held_out_rows(twenty: Path, tokenizer: Tokenizer) -> None:
    assert load(twenty, tokenizer, eval_fraction=0.0) == (ANSWERS, [])


def test_held_out_rows_of_their_own(
    twenty: Path, write_jsonl: Write, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_jsonl([chat("q", "other")], "eval.jsonl")
    assert load(twenty, tokenizer, eval=str(other), eval_fraction=0.5) == (ANSWERS, ["other<end_of_turn>"])
    assert load(twenty, tokenizer, eval=[str(other), str(other)])[1] == ["other<end_of_turn>"] * 2
    assert len(load_held_out(data_config(twenty, eval=str(other)), tokenizer).examples) == 1
    assert len(load_held_out(data_config(twenty, eval_fraction=0.5), tokenizer).examples) == 0
    assert warnings_of(caplog) == []


def test_max_rows_is_of_training_alone(twenty: Path, tokenizer: Tokenizer) -> None:
    assert load(twenty, tokenizer, eval=str(twenty), max_rows=3) == (ANSWERS[:3], ANSWERS)


def test_bad_rows_of_evaluation_are_named(twenty: Path, write_jsonl: Write, tokenizer: Tokenizer) -> None:
    bad = write_jsonl([chat("q", "a"), chat("q", "")], "eval.jsonl")
    with pytest.raises(UserError) as caught:
        load(twenty, tokenizer, eval=str(bad))
    assert str(caught.value).startswith(f"{bad} row 2: messages[1].content is empty")


def test_counts_of_the_cut_stay_with_the_training_rows(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    rows = [*[chat(f"q {i}", "lamp " * 100) for i in range(4)], chat("lamp " * 100, "a"), chat("q", "a")]
    train, held_out = load_data(data_config(write_jsonl(rows), eval_fraction=0.25, max_length=32), tokenizer)
    assert (train.counts.truncated, train.counts.untrained) == (5, 1)
    assert (len(train.examples), len(held_out.examples)) == (3, 2)


def test_sequences_that_a_row_was_split_into_stay_together(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    """Held out is a whole row of a file: the half of it that is trained would tell of the other."""
    files = [
        write_jsonl([{"text": f"{name} {i} " + "lamp " * (90 if i % 2 else 5)} for i in range(12)], f"{name}.jsonl")
        for name in "ab"
    ]
    config = data_config([str(path) for path in files], eval_fraction=0.25, overlong="split", max_length=32)
    places = [[data.examples.place(i) for i in range(len(data.examples))] for data in load_data(config, tokenizer)]
    assert not set(places[0]) & set(places[1])
    assert (len(set(places[0])), len(set(places[1]))) == (18, 6)
    assert len(places[1]) > 6  # some of them in several sequences


@pytest.mark.parametrize(("num_rows", "fraction"), [(1, 0.05), (2, 0.9)])
def test_too_few_rows_to_hold_any_out(write_jsonl: Write, tokenizer: Tokenizer, num_rows: int, fraction: float) -> None:
    path = write_jsonl([chat("Hi", "Hello")] * num_rows)
    with pytest.raises(UserError, match=rf"data.train has {num_rows} usable row\(s\): too few to hold out"):
        load(path, tokenizer, eval_fraction=fraction)


def test_evaluation_rows_that_are_also_trained_are_told(
    write_jsonl: Write, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_jsonl([chat("a", "b"), chat("c", "d"), chat("c", "d")], "train.jsonl")
    other = write_jsonl([chat("c", "d"), chat("a ", "b"), chat("c", "e"), {"text": "x"} | chat("c", "d")], "eval.jsonl")
    datasets = load_data(data_config(train, eval=str(other)), tokenizer)
    told = "3 evaluation rows also stand in the training data: the evaluation flatters"
    assert warnings_of(caplog) == [told]
    assert count_shared(*datasets) == 3
    caplog.clear()
    load_data(data_config(write_jsonl([chat("same", "row")] * 10), eval_fraction=0.2), tokenizer)
    assert warnings_of(caplog) == [told.replace("3", "2")]


def test_evaluation_rows_that_differ_beyond_the_cut_alone_are_told(
    write_jsonl: Write, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that differ only beyond data.max_length are the same to the model."""
    train = write_jsonl([chat("a", "b"), chat("c", "lamp " * 100)])
    other = write_jsonl([chat("c", "lamp " * 99 + "end"), chat("a", "c")], "eval.jsonl")
    load_data(data_config(train, eval=str(other), max_length=40), tokenizer)
    assert "1 evaluation rows also stand in the training data: the evaluation flatters" in warnings_of(caplog)


def test_rows_that_are_in_memory_already(twenty: Path, tokenizer: Tokenizer) -> None:
    example = encode_chat(chat("q", "given")["messages"], tokenizer)
    store = TokenStore.of("given", "messages", [example], Counts(rows=1, chats=1, terminators=1))
    train, _ = load_data(data_config(twenty), tokenizer, [[store]])
    assert [e.tokens.tolist() for e in train.examples] == [example.tokens.tolist()]


def test_numbers_of_a_dataset() -> None:
    data = make_data(7)
    assert data.num_tokens == sum(len(e.tokens) for e in data.examples)
    assert data.num_supervised == sum(int(e.is_trained.sum()) for e in data.examples)
    assert data.max_tokens == max(len(e.tokens) for e in data.examples)
    assert Dataset(Examples([])).max_tokens == 0


# Sequences to arrays


def pairs(*examples: Example) -> list[tuple[np.ndarray, np.ndarray]]:
    """As pad_batch takes them."""
    return [(example.tokens, example.is_trained) for example in examples]


def test_targets_are_the_next_tokens_and_the_mask_is_theirs() -> None:
    data = make_data(5, longest=16)
    batch = pad_batch([pairs(example) for example in data.examples], (3, 2, 16))
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


def test_rows_side_by_side_by_hand() -> None:
    first = Example(np.array([2, 10, 11], np.int32), np.array([False, True, True]))
    second = Example(np.array([2, 20, 21, 22], np.int32), np.array([True, False, True, True]))
    batch = pad_batch([pairs(first, second), []], (1, 2, 9))
    assert {name: array[0, 0].tolist() for name, array in batch.items()} == {
        "tokens": [2, 10, 11, 2, 20, 21, 22, 0, 0],
        "targets": [10, 11, 0, 20, 21, 22, 0, 0, 0],
        "loss_mask": [True, True, False, False, True, True, False, False, False],
        "segments": [1, 1, 1, 2, 2, 2, 2, 0, 0],
        "positions": [0, 1, 2, 0, 1, 2, 3, 0, 1],
    }
    assert not any(batch[name][0, 1].any() for name in ("tokens", "targets", "loss_mask", "segments"))


def test_trained_targets_are_the_answer(tokenizer: Tokenizer) -> None:
    batch = pad_batch([pairs(encode_chat(chat("Hi", "Hello")["messages"], tokenizer))], (1, 1, 32))
    assert tokenizer.decode(batch["targets"][batch["loss_mask"]].tolist()) == "Hello<end_of_turn>"


def test_a_row_as_long_as_the_batch_is_whole() -> None:
    tokens = np.arange(10, 26, dtype=np.int32)
    batch = pad_batch([pairs(Example(tokens, np.ones(16, bool)))], (1, 1, 16))
    assert batch["tokens"][0, 0].tolist() == tokens.tolist()
    assert batch["targets"][0, 0].tolist() == [*range(11, 26), 0]
    assert batch["loss_mask"][0, 0].tolist() == [True] * 15 + [False]


# How long sequences are


def of_lengths(*lengths: int) -> Dataset:
    """Rows of these lengths."""
    examples = [Example(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    return Dataset(Examples([TokenStore.of("rows", "text", examples, Counts())]))


@pytest.mark.parametrize(("lengths", "padded"), [((3,), 8), ((8,), 8), ((9,), 16), ((3, 33), 40), ((33, 3), 40)])
def test_one_length_for_training_and_evaluation(lengths: tuple[int, ...], padded: int) -> None:
    datasets = [of_lengths(n) for n in lengths]
    assert choose_lengths(data_config(), *datasets, Dataset(Examples([]))).tolist() == [padded]


def test_several_lengths_for_training_and_evaluation() -> None:
    lengths = choose_lengths(data_config(length_buckets=3), of_lengths(*[5] * 9, *[60] * 9), of_lengths(61, 30, 30))
    assert lengths.tolist() == [8, 32, 64]


@pytest.mark.parametrize(
    ("max_length", "lengths", "padded"), [(64, [40, 40], 64), (61, [40, 40], 64), (1024, [5, 6, 7], 24), (10, [10], 16)]
)
def test_packed_sequences_are_no_longer_than_all_rows_together(
    max_length: int, lengths: list[int], padded: int
) -> None:
    config = data_config(packing=True, max_length=max_length)
    assert choose_lengths(config, of_lengths(*lengths), of_lengths(3)).tolist() == [padded]
    assert choose_lengths(config, of_lengths(3), of_lengths(*lengths)).tolist() == [padded]


# Every row once, and nothing else


def check_documents(batch: Batch, data: Dataset) -> None:
    """Every document is a row, whole and alone; around them nothing is trained."""
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    for segments in flat["segments"]:
        present = segments[segments > 0]
        assert not segments[len(present) :].any()  # padding comes last
        assert (np.diff(present) >= 0).all()
        assert np.isin(np.diff(present), (0, 1)).all()
        assert not len(present) or present[0] == 1
    for tokens, arrays in documents(batch):
        row = data.examples[int(tokens[1]) - FIRST_ID]
        np.testing.assert_array_equal(tokens, row.tokens)
        np.testing.assert_array_equal(arrays["positions"], np.arange(len(tokens)))
        np.testing.assert_array_equal(arrays["targets"][:-1], row.tokens[1:])
        np.testing.assert_array_equal(arrays["loss_mask"][:-1], row.is_trained[1:])
        assert not arrays["loss_mask"][-1]  # its target would be the next document's
        assert arrays["targets"][-1] == PAD
    padding = flat["segments"] == 0
    assert not flat["loss_mask"][padding].any()
    assert (flat["tokens"][padding] == PAD).all()
    assert (flat["positions"] < flat["positions"].shape[1]).all()


@EVERY_KIND
def test_every_document_of_a_batch_is_a_row(kind: str) -> None:
    source = KINDS[kind]()
    for epoch in range(3):
        for batch in epoch_of(source, epoch):
            check_documents(batch, make_data())


@ONCE
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 53])
def test_every_row_once_in_every_epoch(kind: str, num_rows: int, shuffle: bool) -> None:
    data = make_data(num_rows)
    changes: dict[str, Any] = {"packed": {"packing": True}, "buckets": {"buckets": BUCKETS}}.get(kind, {})
    source = make_source(data, shuffle=shuffle, **changes)
    for epoch in range(3):
        assert sorted(epoch_rows(source, epoch)) == list(range(num_rows))
        assert sum(int(batch["loss_mask"].sum()) for batch in epoch_of(source, epoch)) == data.num_supervised
    if kind != "packed":
        assert source.steps_per_epoch == -(-num_rows // 8)
    assert source.count_steps(3) == 3 * source.steps_per_epoch


@EVERY_KIND
def test_only_the_last_batch_of_an_epoch_is_not_full(kind: str) -> None:
    source = KINDS[kind]()
    for epoch in range(3):
        filled = [int(batch["segments"].any(axis=-1).sum()) for batch in epoch_of(source, epoch)]
        assert filled[:-1] == [8] * (len(filled) - 1)
        assert 1 <= filled[-1] <= 8
        last = epoch_of(source, epoch)[-1]
        empty = ~last["segments"].any(axis=-1)
        assert not last["loss_mask"][empty].any()
        assert not last["tokens"][empty].any()


@EVERY_KIND
def test_epochs_have_orders_of_their_own(kind: str) -> None:
    source = KINDS[kind]()
    orders = [tuple(epoch_rows(source, epoch)) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert tuple(range(NUM_ROWS)) not in orders


def test_packed_rows_have_new_company_in_every_epoch() -> None:
    source = make_source(make_data(400, longest=12), packing=True)

    def companies(epoch: int) -> set[tuple[int, int]]:
        """Rows that share a sequence."""
        batches = [source.rows(k)[0] for k in range(source.count_steps(epoch), source.count_steps(epoch + 1))]
        return {(a, b) for batch in batches for rows in batch for a in rows.tolist() for b in rows.tolist() if a < b}

    first, second = companies(0), companies(1)
    assert len(first) > 300
    assert len(first & second) < 0.1 * len(first)


def test_the_files_order_without_shuffling() -> None:
    source = make_source(shuffle=False)
    assert [epoch_rows(source, epoch) for epoch in range(2)] == [list(range(NUM_ROWS))] * 2


@pytest.mark.parametrize("kind", ["packed", "buckets"])
def test_epochs_are_the_same_without_shuffling(kind: str) -> None:
    source = KINDS[kind](shuffle=False)
    assert epoch_rows(source, 0) == epoch_rows(source, 1)
    sequences = [rows.tolist() for k in range(source.steps_per_epoch) for rows in source.rows(k)[0]]
    assert all(rows == sorted(rows) for rows in sequences)
    if kind == "packed":
        assert [rows[0] for rows in sequences] == sorted(rows[0] for rows in sequences)


@EVERY_KIND
def test_the_seed_alone_decides(kind: str) -> None:
    first, same, other = (KINDS[kind](seed=seed) for seed in (3, 3, 4))
    for step in range(8):
        assert_same(first[step], same[step])
    assert epoch_rows(first, 0) != epoch_rows(other, 0)


def test_the_shape_of_a_batch_does_not_change_the_order() -> None:
    """The same rows in the same order, however many go into a step."""
    shapes = [(1, 1), (2, 1), (1, 3), (2, 3)]
    for packing in (False, True):
        sources = [make_source(num_micro=a, batch_size=b, packing=packing) for a, b in shapes]
        orders = [epoch_rows(source, 1) for source in sources]
        assert all(order == orders[0] for order in orders)


# Batch k is a pure function of the data, the seed and k


@EVERY_KIND
def test_batches_do_not_depend_on_where_one_starts(kind: str) -> None:
    whole = KINDS[kind]()
    hashes = [hash_batch(batch) for batch in whole.iterate(0, whole.count_steps(4), 2)]
    assert len(set(hashes)) == len(hashes)
    for start in np.random.default_rng(0).integers(0, len(hashes), 20).tolist():
        fresh = KINDS[kind]()
        assert hash_batch(fresh[start]) == hashes[start]
        stop = min(start + 3, len(hashes))
        assert [hash_batch(batch) for batch in fresh.iterate(start, stop, 2)] == hashes[start:stop]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("is_mixture", [True, False])
def test_starting_anew_takes_less_than_a_second(packing: bool, is_mixture: bool) -> None:
    """At any step of the first epochs of 100,000 rows."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.5, 0.9, 100_000), 4, 512).astype(np.int32)
    tokens = rng.integers(4, 2000, int(lengths.sum()), dtype=np.int32)
    arrays = {
        "tokens": tokens,
        "trained": tokens % 2 == 0,
        "lengths": lengths,
        "supervised": lengths,
        "rows": np.arange(len(lengths)),
        "digests": np.arange(len(lengths), dtype=np.uint64),
    }
    parts = (Part(np.arange(30_000), 60_000), Part(np.arange(30_000, 100_000), 40_000))
    data = Dataset(Examples([TokenStore("rows", "text", arrays, Counts())]), mixture=parts if is_mixture else ())
    changes: dict[str, Any] = {"buckets": np.array([64, 128, 512]), "packing": packing, "seed": 5}
    whole = make_source(data, **changes)
    for step in rng.integers(0, whole.count_steps(3), 20).tolist():
        started = time.monotonic()
        batch = make_source(data, **changes)[step]
        assert time.monotonic() - started < 1
        assert hash_batch(batch) == hash_batch(whole[step])


@EVERY_KIND
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_the_parts_of_processes_are_the_batch(kind: str, num_parts: int) -> None:
    """Each loads its share of every micro-batch, and as many batches as the others."""
    whole = KINDS[kind]()
    parts = [KINDS[kind](part=(i, num_parts)) for i in range(num_parts)]
    assert [part.count_steps(3) for part in parts] == [whole.count_steps(3)] * num_parts
    for step in range(whole.count_steps(2)):
        batches = [part[step] for part in parts]
        joined = {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in whole[step]}
        assert_same(joined, whole[step])
        assert {batch["tokens"].shape[:2] for batch in batches} == {parts[0].shape} == {(2, 4 // num_parts)}


@EVERY_KIND
@pytest.mark.parametrize("prefetch", [1, 2, 7, 100])
def test_what_is_prepared_ahead_changes_nothing(kind: str, prefetch: int) -> None:
    source = KINDS[kind]()
    for start in (0, 1, source.steps_per_epoch):
        batches = list(source.iterate(start, start + 9, prefetch))
        assert len(batches) == 9
        for step, batch in enumerate(batches, start=start):
            assert_same(batch, source[step])


def test_batches_are_put_in_their_place_ahead() -> None:
    source = make_source()
    placed = list(source.iterate(2, 6, 2, place=lambda batch: ("placed", hash_batch(batch))))
    assert placed == [("placed", hash_batch(source[step])) for step in range(2, 6)]


def test_what_goes_wrong_in_the_thread_is_raised() -> None:
    def fail(batch: Batch) -> Batch:
        raise ValueError("no such device")

    with pytest.raises(ValueError, match="no such device"):
        next(make_source().iterate(0, 5, 2, place=fail))


def test_nothing_is_left_to_iterate() -> None:
    assert list(make_source(make_data(3)).iterate(4, 4, 2)) == []


# Shapes


@pytest.mark.parametrize("kind", ["one length", "packed", "mixture", "packed mixture"])
def test_one_shape(kind: str) -> None:
    source = KINDS[kind]()
    assert source.lengths == [CAPACITY]
    assert {batch["tokens"].shape for epoch in range(3) for batch in epoch_of(source, epoch)} == {(2, 4, CAPACITY)}


@pytest.mark.parametrize("num_buckets", [1, 2, 4])
@pytest.mark.parametrize("is_mixture", [True, False])
def test_at_most_so_many_shapes(num_buckets: int, is_mixture: bool) -> None:
    data = make_data(300, (Part(np.arange(20), 100), Part(np.arange(20, 300), 150)) if is_mixture else (), longest=60)
    buckets = choose_lengths(data_config(length_buckets=num_buckets), data)
    source = make_source(data, buckets=buckets)
    shapes = {batch["tokens"].shape for epoch in range(4) for batch in epoch_of(source, epoch)}
    assert len(shapes) <= len(source.lengths) <= num_buckets
    assert shapes <= {(2, 4, length) for length in source.lengths}
    if not is_mixture:
        assert {length for _, _, length in shapes} == set(source.lengths)


def test_more_lengths_less_padding() -> None:
    data = make_data(300, longest=60)
    sources = [
        make_source(data, buckets=choose_lengths(data_config(length_buckets=count), data)) for count in (1, 2, 4)
    ]
    places = [sum(batch["tokens"].size for batch in epoch_of(source, 0)) for source in sources]
    assert places[0] > places[1] > places[2]
    assert places[2] < 0.75 * places[0]
    assert [source.efficiency for source in sources] == sorted(source.efficiency for source in sources)


@ONCE
def test_efficiency_is_the_share_of_tokens(kind: str) -> None:
    source = KINDS[kind]()
    segments = [batch["segments"] for batch in epoch_of(source, 0)]
    places = sum(int(s.any(axis=-1).sum()) * s.shape[-1] for s in segments)  # sequences that fill the batch up left out
    assert source.efficiency == pytest.approx(sum(int((s > 0).sum()) for s in segments) / places)


def test_the_longest_shape_is_known_before_a_mixture_draws_it() -> None:
    """The memory of a step is told for it; here the first epoch takes two rows of thirty, the long one last."""
    examples = [Example(np.full(n, 9, np.int32), np.ones(n, bool)) for n in [5] * 29 + [60]]
    data = Dataset(
        Examples([TokenStore.of("rows", "text", examples, Counts())]),
        mixture=(Part(np.arange(30), 2),),
    )
    source = make_source(data, buckets=np.array([8, 64, 512]), shuffle=False)
    lengths = {batch["tokens"].shape[-1] for epoch in range(15) for batch in epoch_of(source, epoch)}
    assert lengths == set(source.lengths) == {8, 64}
    assert source.lengths[0] == 64


# Mixtures


@pytest.mark.parametrize("kind", ["mixture", "packed mixture", "mixture in buckets"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_of_a_mixture_takes_what_the_weights_say(kind: str, shuffle: bool) -> None:
    """And of each source pass after pass: no row is taken again before all others were."""
    source = KINDS[kind](shuffle=shuffle)
    taken: Counter[int] = Counter()
    for epoch in range(7):
        rows = epoch_rows(source, epoch)
        assert [sum(row < 10 for row in rows), sum(row >= 10 for row in rows)] == [25, 28]
        taken.update(rows)
        for part in MIXTURE:
            times = [taken[row] for row in part.rows.tolist()]
            assert max(times) - min(times) <= 1


def test_a_mixture_that_is_not_shuffled_goes_round_in_the_files_order() -> None:
    source = make_source(make_data(mixture=MIXTURE), shuffle=False)
    rows = [row for epoch in range(4) for row in epoch_rows(source, epoch)]
    assert [row for row in rows if row < 10] == (list(range(10)) * 10)
    assert [row for row in rows if row >= 10] == (list(range(10, NUM_ROWS)) * 3)[: 4 * 28]
    for count in range(1, 53):  # evenly mixed within an epoch
        assert abs(sum(row < 10 for row in rows[:count]) - count * 25 / 53) <= 1.5


def test_passes_over_a_source_have_orders_of_their_own() -> None:
    """Two epochs are a pass: which rows are in its first half is drawn anew."""
    source = make_source(make_data(mixture=(Part(np.arange(40), 20), Part(np.arange(40, NUM_ROWS), 13))))
    halves = [{row for row in epoch_rows(source, epoch) if row < 40} for epoch in range(6)]
    assert all(halves[i] | halves[i + 1] == set(range(40)) for i in (0, 2, 4))
    assert halves[0] != halves[2] != halves[4] != halves[0]


def mixture(*entries: tuple[Path, float], **changes: Any) -> list[dict[str, Any]]:
    """data.mixture of files and weights."""
    return [{"path": str(path), "weight": weight} | changes for path, weight in entries]


def test_weights_are_shares_of_as_many_rows_as_there_are(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    small = write_jsonl([chat("s", f"{i}") for i in range(10)], "small.jsonl")
    large = write_jsonl([chat("l", f"{i}") for i in range(30)], "large.jsonl")
    data, _ = load_data(data_config(mixture=mixture((small, 3), (large, 1))), tokenizer)
    assert [(part.rows.tolist(), part.per_epoch) for part in data.mixture] == [
        (list(range(10)), 30),
        (list(range(10, 40)), 10),
    ]
    data, _ = load_data(data_config(mixture=mixture((small, 0.001), (large, 1))), tokenizer)
    assert [part.per_epoch for part in data.mixture] == [1, 40]
    assert load_data(data_config([str(small), str(large)]), tokenizer)[0].mixture == ()


def test_held_out_rows_are_not_in_a_mixture(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    files = [write_jsonl([chat(name, f"{i}") for i in range(20)], f"{name}.jsonl") for name in "ab"]
    config = data_config(mixture=mixture((files[0], 1), (files[1], 3)), eval_fraction=0.25)
    train, held_out = load_data(config, tokenizer)
    assert len(held_out.examples) == 10
    assert count_shared(train, held_out) == 0
    for part, name in zip(train.mixture, "ab", strict=True):
        places = [train.examples.place(row) for row in part.rows.tolist()]
        assert all(place.startswith(str(files["ab".index(name)])) for place in places)
    assert sum(len(part.rows) for part in train.mixture) == len(train.examples) == 30
    assert [part.per_epoch for part in train.mixture] == [8, 22]  # 7.5 and 22.5, to the even number


def test_sources_of_a_mixture_are_read_each_its_own_way(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    asked = write_jsonl([{"question": "q", "answer": f"a{i}", "ok": i % 2} for i in range(8)], "asked.jsonl")
    plain = write_jsonl([{"text": f"t{i}", "prompt": "p", "completion": "c"} for i in range(8)], "plain.jsonl")
    entries = [
        {
            "path": str(asked),
            "weight": 1,
            "columns": {"prompt": "question", "completion": "answer"},
            "filter": {"ok": 1},
        },
        {"path": str(plain), "weight": 1, "format": "text", "max_rows": 3},
    ]
    data, _ = load_data(data_config(mixture=entries), tokenizer)
    answers = [tokenizer.decode(e.tokens[e.is_trained].tolist()) for e in data.examples]
    assert answers == [f"a{i}<end_of_turn>" for i in (1, 3, 5, 7)] + ["t0", "t1", "t2"]
    assert data.counts.filtered == 4


def test_a_source_of_a_mixture_without_rows(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    files = [write_jsonl([{"text": "a", "n": n}], f"{n}.jsonl") for n in range(2)]
    with pytest.raises(UserError, match=r"data.mixture: no row of .*1.jsonl is left to use"):
        load_data(data_config(mixture=mixture((files[0], 1), (files[1], 1), filter={"n": 0})), tokenizer)
