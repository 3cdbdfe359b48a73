"""All that a run reads: rows, batches, and how many steps they make."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptax.config import Config, UserError
from adaptax.data.feed import describe_feed, open_feed
from adaptax.data.pipeline import BatchSource
from adaptax.data.store import Counts, TokenStore
from adaptax.data.streaming import StreamSource
from adaptax.data.tokenizer import Tokenizer
from rows import Write, assert_same, chat, data_config, documents, encode_chat, hash_batch, run_config


@pytest.fixture
def path(write_jsonl: Write) -> Path:
    """A file of 50 conversations."""
    return write_jsonl(chat(f"question {i}", "yes " * (i % 13) + f"{i}") for i in range(50))


def config_of(train: Any, training: dict[str, Any] | None = None, mesh_shape: Any = None, **changes: Any) -> Config:
    """A run with these data, in global batches of 2 x 2 sequences."""
    return run_config(data_config(train, **changes), mesh_shape, **(training or {}))


def test_the_sizes_of_a_run_are_those_of_its_batches(path: Path, tokenizer: Tokenizer) -> None:
    feed = open_feed(config_of(path, eval_fraction=0.2), tokenizer)
    assert feed.train is not None
    assert (len(feed.train.examples), len(feed.held_out.examples)) == (40, 10)
    assert (feed.global_batch_size, feed.num_steps) == (4, 10)
    assert feed.batches.shape == (2, 2)
    assert feed.eval_batches is not None
    assert feed.eval_batches.shape == (1, 2)
    assert feed.eval_batches.steps_per_epoch == 5
    assert feed.eval_batches.lengths == feed.batches.lengths  # both compiled once


def test_a_mesh_makes_micro_batches_as_many_times_as_large(path: Path, tokenizer: Tokenizer) -> None:
    for shape in ([[2, 4], ["fsdp", "tp"]], [[4, 2], ["tp", "fsdp"]]):
        feed = open_feed(config_of(path, mesh_shape=shape, eval_fraction=0.2), tokenizer)
        assert (feed.global_batch_size, feed.batches.shape, feed.num_steps) == (8, (2, 4), 5)
        assert feed.eval_batches is not None
        assert feed.eval_batches.shape == (1, 4)


def test_how_many_steps(path: Path, tokenizer: Tokenizer) -> None:
    def steps(training: dict[str, Any], **changes: Any) -> int:
        return open_feed(config_of(path, training, **changes), tokenizer).num_steps

    assert steps({}) == 13
    assert steps({"num_epochs": 3}) == 39
    assert steps({"num_batches": 5}) == 5
    assert steps({"num_batches": 100, "num_epochs": 2}) == 200
    assert steps({"num_epochs": 3}, packing=True) < 39
    config = config_of(None, {"num_epochs": 3}, mixture=[{"path": str(path), "weight": 1}])
    assert open_feed(config, tokenizer).num_steps == 39


@pytest.mark.parametrize("changes", [{"packing": True}, {"length_buckets": 3}])
def test_the_section_decides_on_the_batches(path: Path, tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    config = config_of(path, {"seed": 3}, **changes)
    feed, again = (open_feed(config, tokenizer) for _ in range(2))
    assert isinstance(feed.batches, BatchSource)
    hashes = [hash_batch(feed.batches[step]) for step in range(feed.num_steps)]
    assert hashes == [hash_batch(batch) for batch in again.batches.iterate(0, feed.num_steps, 2)]
    for other in (config_of(path, {"seed": 4}, **changes), config_of(path, {"seed": 3}, shuffle=False, **changes)):
        batches = open_feed(other, tokenizer).batches.iterate(0, feed.num_steps, 2)
        assert [hash_batch(batch) for batch in batches] != hashes
    lengths = {feed.batches[step]["tokens"].shape[-1] for step in range(feed.num_steps)}
    assert lengths == ({64} if "packing" in changes else set(feed.batches.lengths))
    if "length_buckets" in changes:
        assert len(lengths) == 3


def test_evaluation_is_every_held_out_row_in_the_files_order(path: Path, tokenizer: Tokenizer) -> None:
    for packing in (True, False):
        feed = open_feed(config_of(path, {"seed": 5}, eval=str(path), packing=packing), tokenizer)
        assert feed.eval_batches is not None
        batches = [feed.eval_batches[step] for step in range(feed.eval_batches.steps_per_epoch)]
        found = [tokens.tolist() for batch in batches for tokens, _ in documents(batch)]
        expected = [example.tokens.tolist() for example in feed.held_out.examples]
        assert sorted(found) == sorted(expected)
        assert packing or found == expected
        assert sum(int(batch["loss_mask"].sum()) for batch in batches) == feed.held_out.num_supervised


def test_nothing_held_out(path: Path, tokenizer: Tokenizer) -> None:
    feed = open_feed(config_of(path), tokenizer)
    assert feed.eval_batches is None
    assert len(feed.held_out.examples) == 0


@pytest.mark.parametrize("packing", [True, False])
def test_each_process_loads_its_part(path: Path, tokenizer: Tokenizer, packing: bool) -> None:
    config = config_of(path, eval_fraction=0.2, packing=packing)
    whole, *parts = (open_feed(config, tokenizer, part) for part in ((0, 1), (0, 2), (1, 2)))
    assert [part.num_steps for part in parts] == [whole.num_steps] * 2
    assert [part.global_batch_size for part in parts] == [whole.global_batch_size] * 2
    for of in (lambda feed: feed.batches, lambda feed: feed.eval_batches):
        first, second, expected = of(parts[0])[1], of(parts[1])[1], of(whole)[1]
        assert_same({name: np.concatenate([first[name], second[name]], axis=1) for name in first}, expected)


def test_rows_that_are_in_memory_already(path: Path, tokenizer: Tokenizer) -> None:
    example = encode_chat(chat("q", "given")["messages"], tokenizer)
    store = TokenStore.of("given", "messages", [example], Counts(rows=1, chats=1, terminators=1))
    feed = open_feed(config_of(path), tokenizer, stores=[[store]])
    assert feed.train is not None
    assert [e.tokens.tolist() for e in feed.train.examples] == [example.tokens.tolist()]


def test_a_stream(path: Path, write_jsonl: Write, tokenizer: Tokenizer) -> None:
    held_out = write_jsonl([chat("other", "row")] * 3, "eval.jsonl")
    changes: dict[str, Any] = {"streaming": True, "packing": True, "shuffle": False, "eval": str(held_out)}
    config = config_of(path, {"num_batches": 7, "num_epochs": 2}, [[2, 1], ["fsdp", "tp"]], **changes)
    feed = open_feed(config, tokenizer)
    assert isinstance(feed.batches, StreamSource)
    assert feed.train is None
    assert (feed.num_steps, feed.global_batch_size) == (14, 8)
    assert feed.batches.shape == (2, 4)
    assert feed.eval_batches is not None
    assert feed.eval_batches.lengths == feed.batches.lengths == [64]
    assert feed.eval_batches.shape == (1, 4)
    part = open_feed(config, tokenizer, (1, 2))
    (whole,), (second,) = (list(f.batches.iterate(3, 4, 2)) for f in (feed, part))
    assert_same({name: array[:, 2:] for name, array in whole.items()}, second)
    without = config_of(path, {"num_batches": 7}, **changes | {"eval": None})
    assert open_feed(without, tokenizer).eval_batches is None


def test_bad_rows_are_named(write_jsonl: Write, tokenizer: Tokenizer) -> None:
    path = write_jsonl([chat("a", "b"), chat("a", "")])
    with pytest.raises(UserError, match=rf"{path} row 2: messages\[1\].content is empty"):
        open_feed(config_of(path), tokenizer)


def told_of(config: Config, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said of a feed."""
    feed = open_feed(config, tokenizer)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        describe_feed(feed, config)
    return [record.getMessage() for record in caplog.records]


def test_what_is_said(path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(path, {"num_epochs": 2}, [[2, 1], ["fsdp", "tp"]], eval_fraction=0.2)
    feed = open_feed(config, tokenizer)
    assert feed.train is not None
    assert isinstance(feed.batches, BatchSource)
    assert told_of(config, tokenizer, caplog) == [
        f"sequences of {feed.batches.lengths[0]} tokens, {100 * feed.batches.efficiency:.1f}% full; "
        "5 steps per pass over the data",
        f"40 rows to train, 10 held out, {feed.train.num_supervised} supervised tokens; "
        "global batch 8 = micro_batch_size 2 x fsdp 2 x accumulation 2; 10 steps",
    ]
    config = config_of(path, {"num_batches": 7}, streaming=True, packing=True)
    assert told_of(config, tokenizer, caplog) == [
        "rows as they come, 0 held out; global batch 4 = micro_batch_size 2 x fsdp 1 x accumulation 2; 7 steps"
    ]


def test_packing_that_leaves_few_steps_is_told(
    path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the configuration does not say how many there are."""

    def warnings_of(training: dict[str, Any], **changes: Any) -> list[str]:
        told_of(config_of(path, training, **changes), tokenizer, caplog)
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    (told,) = warnings_of({}, packing=True)
    num_steps = open_feed(config_of(path, packing=True), tokenizer).num_steps
    assert told == (
        f"few steps ({num_steps}): data.packing=false, a smaller data.max_length or more training.num_epochs make more"
    )
    (_, told) = warnings_of({"micro_batch_size": 999}, packing=True)
    assert told.endswith("a step takes 1998: the others are empty; lower training.micro_batch_size")
    assert warnings_of({"num_epochs": 10}, packing=True) == []
    assert warnings_of({"num_batches": 5}, packing=True) == []
    assert warnings_of({}, packing=False) == []
    assert warnings_of({"num_batches": 5}, packing=True, streaming=True) == []
