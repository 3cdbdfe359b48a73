"""Batches by index. Batch k is a pure function of the data, the seed and k."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from adaptax.config import DataConfig, UserError
from adaptax.data.catalog import Source, eval_sources, train_sources
from adaptax.data.encode import count_all, describe_counts, encode_source
from adaptax.data.packing import EpochPlan, choose_buckets, pad_length, plan_buckets, plan_packed
from adaptax.data.store import Counts, Examples, TokenStore
from adaptax.data.tokenizer import PAD, Tokenizer

log = logging.getLogger(__name__)
SPLIT_SEED = 0  # the same rows are held out whatever the run's seed, so that a sweep compares like with like
ROWS, SEQUENCES = 0, 1  # streams of random numbers
Batch = dict[str, np.ndarray]
Place = Callable[[Batch], Any]


@dataclass(frozen=True)
class Part:
    """Rows of one source of a mixture."""

    rows: np.ndarray  # index of each
    per_epoch: int  # how many of them an epoch takes; more than there are comes round again


@dataclass
class Dataset:
    """Rows as tokens, what was done to get them, and how a mixture draws from them."""

    examples: Examples = field(default_factory=lambda: Examples([]))
    counts: Counts = field(default_factory=Counts)
    mixture: tuple[Part, ...] = ()  # empty: every row once in every epoch

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.examples.lengths.sum(dtype=np.int64))

    @property
    def num_supervised(self) -> int:
        """Tokens that are trained."""
        return int(self.examples.supervised.sum(dtype=np.int64))

    @property
    def max_tokens(self) -> int:
        """The longest row."""
        return int(self.examples.lengths.max(initial=0))


def load_data(
    config: DataConfig, tokenizer: Tokenizer, stores: Sequence[Sequence[TokenStore]] | None = None
) -> tuple[Dataset, Dataset]:
    """(training, evaluation) data; the latter is ``data.eval`` or a fraction held out, and may be empty.

    Args:
      config: of the data.
      tokenizer: the model's.
      stores: the rows of each training source, where they are in memory already.

    Raises:
      UserError: naming file and row of the first bad row, or why there is nothing to train or to evaluate.
    """
    sources = train_sources(config)
    if _is_embedded(sources):
        log.info("the training rows are the small dataset that ships with adaptax; data.train=FILE takes your own")
    stores = stores or [encode_source(source, config, tokenizer) for source in sources]
    train, owners = _join(sources, stores, config, "data.mixture" if config.mixture else "data.train")
    held_out = load_held_out(config, tokenizer)
    if not len(held_out.examples) and config.eval_fraction:
        train, held_out, owners = _hold_out(train, owners, config)
    if config.mixture is not None:
        train.mixture = _plan_mixture(sources, owners)
    if not _is_embedded(sources) and _is_embedded(eval_sources(config)):
        log.warning("data.eval is a dataset that ships with adaptax, not yours: data.eval=FILE, or data.eval=null")
    num_shared = count_shared(train, held_out)
    if num_shared:
        log.warning("%d evaluation rows also stand in the training data: the evaluation flatters", num_shared)
    return train, held_out


def _is_embedded(sources: Sequence[Source]) -> bool:
    return any(source.path.startswith("embedded:") for source in sources)


def load_held_out(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """The rows of ``data.eval``, if it is set."""
    sources = eval_sources(config)
    stores = [encode_source(source, config, tokenizer) for source in sources]
    return _join(sources, stores, config, "data.eval")[0] if sources else Dataset()


def count_shared(train: Dataset, held_out: Dataset) -> int:
    """Evaluation rows whose tokens are also those of a training row."""
    return int(np.isin(held_out.examples.digests, train.examples.digests).sum())


def _join(
    sources: Sequence[Source], stores: Sequence[Sequence[TokenStore]], config: DataConfig, key: str
) -> tuple[Dataset, np.ndarray]:
    """(the rows of all sources, which source each is of)."""
    flat = [store for group in stores for store in group]
    counts, names = count_all(flat), ", ".join(source.path for source in sources)
    for line in describe_counts(counts, config):
        log.warning("%s: %s", key, line)
    data = Dataset(Examples(flat), counts)
    if not len(data.examples):
        reasons = "; ".join(describe_counts(counts, config)) or "there are none"
        raise UserError(f"{key}: no row of {names} is left to use: {reasons}")
    for source, group in zip(sources, stores, strict=True):
        counts = count_all(group)
        if counts.chats and not counts.terminators:
            raise UserError(
                f"{key}: no <end_of_turn> of an answer in {source.path} is trained, so none would ever end: raise "
                "data.max_length, or look at the train and weight of the messages"
            )
    return data, np.repeat(np.arange(len(stores)), [sum(map(len, group)) for group in stores])


def _hold_out(train: Dataset, owners: np.ndarray, config: DataConfig) -> tuple[Dataset, Dataset, np.ndarray]:
    origins = train.examples.origins  # sequences of one row, which data.overlong=split made of it, stay together
    row_of = np.cumsum(np.concatenate([[False], np.any(origins[1:] != origins[:-1], axis=1)]))
    num_rows = int(row_of[-1]) + 1
    num_held_out = math.ceil(num_rows * config.eval_fraction)
    if num_held_out >= num_rows:
        raise UserError(
            f"data.train has {num_rows} usable row(s): too few to hold out "
            f"data.eval_fraction={config.eval_fraction:g}; give more rows, data.eval=FILE or data.eval_fraction=0"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(num_rows)
    is_held_out = np.isin(row_of, order[:num_held_out])
    held_out, kept = np.flatnonzero(is_held_out), np.flatnonzero(~is_held_out)
    evaluation = Dataset(train.examples.select(held_out))
    return Dataset(train.examples.select(kept), train.counts), evaluation, owners[kept]


def _plan_mixture(sources: Sequence[Source], owners: np.ndarray) -> tuple[Part, ...]:
    """How many rows of each source an epoch takes: shares by weight of as many rows as there are."""
    weights = np.array([source.weight for source in sources], float)
    per_epoch = np.maximum(1, np.round(weights / weights.sum() * len(owners)).astype(int))
    parts = tuple(Part(np.flatnonzero(owners == i), int(n)) for i, n in enumerate(per_epoch))
    for source, part in zip(sources, parts, strict=True):
        if not len(part.rows):
            raise UserError(f"data.mixture: no row of {source.path} is left to use")
        passes = part.per_epoch / len(part.rows)
        log.info("%s: %d rows, %d in an epoch (%.2f passes)", source.path, len(part.rows), part.per_epoch, passes)
    return parts


class BatchSource:
    """Batches by index, epoch after epoch; packed sequences, or one row each in few lengths.

    An epoch takes every row once (of a mixture: as many as the weights say), in an order of its own; its last batch is
    filled up with sequences that train nothing.

    Args:
      data: the rows.
      num_micro: A, micro-batches of a batch.
      batch_size: B, sequences of a micro-batch.
      buckets: padded lengths, ascending.
      packing: whether to fill sequences of the last bucket's length with several rows.
      shuffle: whether an epoch has an order of its own, or that of the files.
      seed: of the order.
      part: (i, n): of each micro-batch only the i-th of n equal parts, for process i of n.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        num_micro: int,
        batch_size: int,
        buckets: np.ndarray,
        packing: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
    ):
        self._data, self._packing, self._shuffle, self._seed = data, packing, shuffle, seed
        self._num_micro, self._batch_size, self._part = num_micro, batch_size, part
        self._buckets = buckets[-1:] if packing else buckets
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self._epoch_starts = [0]  # of mixtures, whose epochs may differ in length
        first = self._plan(0)
        self.steps_per_epoch = len(first.lengths)
        self.shape = (num_micro, batch_size // part[1])
        lengths = first.lengths
        if data.mixture:  # another epoch may draw longer rows
            lengths = self._buckets[: np.searchsorted(self._buckets, data.max_tokens) + 1]
        self.lengths = sorted({int(length) for length in lengths}, reverse=True)
        places = int(first.lengths @ np.diff(first.batches))
        self.efficiency = int(data.examples.lengths[first.rows].sum(dtype=np.int64)) / places

    def __len__(self) -> int:
        return 2**62

    @property
    def first_rows(self) -> np.ndarray:
        """The rows of the first epoch; some stand there several times, or not at all, where a mixture says so."""
        return self._plan(0).rows

    def count_steps(self, num_epochs: int) -> int:
        """Batches of the first epochs."""
        if not self._data.mixture:
            return num_epochs * self.steps_per_epoch
        while len(self._epoch_starts) <= num_epochs:
            epoch = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[-1] + len(self._plan(epoch).lengths))
        return self._epoch_starts[num_epochs]

    def rows(self, index: int) -> tuple[list[np.ndarray], int]:
        """(which rows stand in each sequence of a batch, its padded length)."""
        epoch = index // self.steps_per_epoch
        if self._data.mixture:
            epoch = 0
            while self.count_steps(epoch + 1) <= index:
                epoch += 1
        return self._plan(epoch).batch(index - self.count_steps(epoch))

    def __getitem__(self, index: int) -> Batch:
        sequences, length = self.rows(index)
        i, n = self._part
        width = self._batch_size // n
        chosen = []
        for micro in range(self._num_micro):
            start = micro * self._batch_size + i * width
            chosen += (sequences[start : start + width] + [np.zeros(0, np.int64)] * width)[:width]
        contents = [[self._data.examples.arrays_of(row) for row in rows] for rows in chosen]
        return pad_batch(contents, (self._num_micro, width, length))

    def iterate(self, start: int, stop: int, prefetch: int, place: Place = lambda batch: batch) -> Iterator[Any]:
        """Batches start .. stop - 1, some prepared ahead, and put in their place (on the device), by a thread."""
        import grain  # brings jax, which what only looks at the data does without

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        batches = cast(Sequence[Batch], self)
        return iter(grain.MapDataset.source(batches)[start:stop].map(place).to_iter_dataset(options))

    def _make_plan(self, epoch: int) -> EpochPlan:
        rows = self._draw(epoch)
        rng = np.random.default_rng([self._seed, epoch, SEQUENCES]) if self._shuffle else None
        lengths = self._data.examples.lengths[rows]
        size = self._num_micro * self._batch_size
        if self._packing:
            return plan_packed(rows, lengths, int(self._buckets[-1]), size, rng)
        return plan_buckets(rows, lengths, self._buckets, size, rng)

    def _draw(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, in its order."""
        rows = np.arange(len(self._data.examples))
        if self._data.mixture:
            parts = [self._draw_part(i, part, epoch) for i, part in enumerate(self._data.mixture)]
            shares = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
            rows = np.concatenate(parts)[np.argsort(shares, kind="stable")]  # evenly mixed, where nothing is shuffled
        return np.random.default_rng([self._seed, epoch, ROWS]).permutation(rows) if self._shuffle else rows

    def _draw_part(self, i: int, part: Part, epoch: int) -> np.ndarray:
        """The next rows of pass after pass over a source, so that none is taken again before all others were."""
        start = epoch * part.per_epoch
        first, last = start // len(part.rows), (start + part.per_epoch - 1) // len(part.rows)
        passes = [part.rows] * (last - first + 1)
        if self._shuffle:  # a pass that lies within the epoch is shuffled with it
            for j in {0, last - first}:
                passes[j] = np.random.default_rng([self._seed, first + j, ROWS, i]).permutation(part.rows)
        start -= first * len(part.rows)
        return np.concatenate(passes)[start : start + part.per_epoch]


def pad_batch(sequences: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], shape: tuple[int, int, int]) -> Batch:
    """Sequences below each other as [A, B, T] arrays.

    Within a sequence rows stand side by side, each a segment of its own with positions from 0. Target t is token t + 1
    of the same row; padding has segment 0.

    Args:
      sequences: the rows of each as (tokens, whether each is trained).
      shape: A, B, T.
    """
    num, length = shape[0] * shape[1], shape[2]
    tokens = np.full((num, length), PAD, np.int32)
    targets = np.full((num, length), PAD, np.int32)
    mask, segments = np.zeros((num, length), bool), np.zeros((num, length), np.int32)
    positions = np.zeros((num, length), np.int32)
    count = np.arange(length, dtype=np.int32)
    for i, rows in enumerate(sequences):
        start = 0
        for segment, (row, trained) in enumerate(rows, start=1):
            stop = start + len(row)
            tokens[i, start:stop], segments[i, start:stop] = row, segment
            targets[i, start : stop - 1], mask[i, start : stop - 1] = row[1:], trained[1:]
            positions[i, start:stop] = count[: stop - start]
            start = stop
        positions[i, start:] = count[: length - start]
    arrays = {"tokens": tokens, "targets": targets, "loss_mask": mask, "segments": segments, "positions": positions}
    return {name: array.reshape(shape) for name, array in arrays.items()}


def choose_lengths(config: DataConfig, *datasets: Dataset) -> np.ndarray:
    """The padded lengths of a run's sequences, ascending; packed ones have one, no longer than all rows together."""
    lengths = np.concatenate([data.examples.lengths for data in datasets])
    if not config.packing:
        return choose_buckets(lengths, config.length_buckets)
    limit = min(config.max_length, max(data.num_tokens for data in datasets))
    return np.array([pad_length(limit)])
