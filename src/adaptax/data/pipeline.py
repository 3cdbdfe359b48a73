"""Examples to batches. Batch k is a pure function of the data, the seed and k."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import grain
import numpy as np

from adaptax.config import DataConfig, UserError, paths_of
from adaptax.data.chat import Example
from adaptax.data.formats import FORMATS, find_format
from adaptax.data.sources import open_rows
from adaptax.data.tokenizer import PAD, Tokenizer

log = logging.getLogger(__name__)
SPLIT_SEED = 0  # the same rows are held out whatever the run's seed, so that a sweep compares like with like
LENGTH_MULTIPLE = 8  # sequences are padded to a multiple of it


@dataclass
class Dataset:
    """Examples and what was done to get them."""

    examples: list[Example] = field(default_factory=list)
    num_truncated: int = 0
    num_dropped: int = 0  # rows of which truncation left nothing to train

    @property
    def num_supervised(self) -> int:
        """Tokens that are trained."""
        return int(sum(e.is_trained.sum() for e in self.examples))

    @property
    def max_tokens(self) -> int:
        """The longest example."""
        return max((len(e.tokens) for e in self.examples), default=0)


def load_data(config: DataConfig, tokenizer: Tokenizer) -> tuple[Dataset, Dataset]:
    """(training, evaluation) data; the latter is ``data.eval`` or a fraction held out, and may be empty."""
    if not paths_of(config.train):
        raise UserError("data.train is not set: data.train=FILE.jsonl")
    if any(name.startswith("embedded:") for name in paths_of(config.train)):
        log.info("the training rows are the small dataset that ships with adaptax; data.train=FILE takes your own")
    train = encode_files(paths_of(config.train), config, tokenizer)
    if paths_of(config.eval):
        return train, encode_files(paths_of(config.eval), config, tokenizer)
    num_held_out = math.ceil(len(train.examples) * config.eval_fraction)
    if num_held_out >= len(train.examples):
        raise UserError(
            f"data.train has {len(train.examples)} usable row(s): too few to hold out "
            f"data.eval_fraction={config.eval_fraction:g}; give more rows, data.eval=FILE or data.eval_fraction=0"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train.examples))
    held_out, kept = order[:num_held_out], np.sort(order[num_held_out:])
    evaluation = Dataset([train.examples[i] for i in np.sort(held_out)])
    return Dataset([train.examples[i] for i in kept], train.num_truncated, train.num_dropped), evaluation


def encode_files(names: Sequence[str], config: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Every row of the files as tokens, cut to ``data.max_length``.

    Raises:
      UserError: naming file and row (counted from 1) of the first bad one, or that nothing is left to train.
    """
    data = Dataset()
    for name in names:
        path, rows, columns = open_rows(name, {column for form in FORMATS.values() for column in form.columns})
        form = FORMATS[find_format(columns, config.format, str(path))]
        for number, row in enumerate(rows, start=1):
            try:
                _add(data, form.encode(row, tokenizer), config.max_length)
            except UserError as error:
                raise UserError(f"{path} row {number}: {error}") from None
    if data.num_truncated:
        log.warning("%d rows were cut to data.max_length=%d tokens", data.num_truncated, config.max_length)
    if data.num_dropped:
        log.warning("%d of them had nothing left to train after the cut and were dropped", data.num_dropped)
    if not data.examples:
        raise UserError(
            f"{', '.join(names)}: all {data.num_dropped} rows have nothing left to train after the cut to "
            f"data.max_length={config.max_length} tokens; raise it"
        )
    return data


def _add(data: Dataset, example: Example, max_length: int) -> None:
    if len(example.tokens) > max_length:
        data.num_truncated += 1
        example = Example(example.tokens[:max_length], example.is_trained[:max_length])
    if example.is_trained[1:].any():
        data.examples.append(example)
    else:
        data.num_dropped += 1


class BatchSource:
    """Batches by index, over and over the data: epoch e holds the batches e * steps to (e + 1) * steps - 1.

    An epoch takes every row once, in an order of its own; its last batch is filled up with rows that train nothing.
    A batch is {tokens, targets, loss_mask, segments, positions}, each [A, B, T].
    """

    def __init__(self, data: Dataset, *, num_micro: int, batch_size: int, length: int, shuffle: bool, seed: int):
        self._rows_per_batch = num_micro * batch_size
        self.shape = (num_micro, batch_size, length)
        self._num_rows = len(data.examples)
        rows = grain.MapDataset.source(data.examples)
        self._rows = (rows.seed(seed).shuffle() if shuffle else rows).repeat()
        self.tokens_per_batch = math.prod(self.shape)  # padding included
        self.steps_per_epoch = math.ceil(self._num_rows / self._rows_per_batch)

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(index, self.steps_per_epoch)
        start = place * self._rows_per_batch
        stop = min(start + self._rows_per_batch, self._num_rows)
        rows = [self._rows[epoch * self._num_rows + i] for i in range(start, stop)]
        return pad_batch(cast(list[Example], rows), self.shape)


def pad_batch(examples: Sequence[Example], shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Examples side by side as [A, B, T] arrays: target t is token t + 1, padding has segment 0."""
    rows, length = shape[0] * shape[1], shape[2]
    tokens = np.full((rows, length), PAD, np.int32)
    targets = np.full((rows, length), PAD, np.int32)
    mask, segments = np.zeros((rows, length), bool), np.zeros((rows, length), np.int32)
    for i, example in enumerate(examples):
        n = len(example.tokens)
        tokens[i, :n], segments[i, :n] = example.tokens, 1
        targets[i, : n - 1], mask[i, : n - 1] = example.tokens[1:], example.is_trained[1:]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    arrays = {"tokens": tokens, "targets": targets, "loss_mask": mask, "segments": segments, "positions": positions}
    return {name: np.ascontiguousarray(array).reshape(shape) for name, array in arrays.items()}


def padded_length(*datasets: Dataset) -> int:
    """The one sequence length of a run: its longest example, rounded up."""
    longest = max(data.max_tokens for data in datasets)
    return -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def iterate(source: BatchSource, start: int, stop: int, prefetch: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches start .. stop - 1, some prepared ahead by a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(source)[start:stop].to_iter_dataset(options))
