"""Batches from sources that do not fit the disk: read, encoded and packed by grain on the fly."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from adaptax.config import Config, UserError
from adaptax.data.catalog import Source, train_sources
from adaptax.data.encode import describe_counts, stream_examples
from adaptax.data.packing import pad_length
from adaptax.data.pipeline import Batch, Place
from adaptax.data.store import Counts
from adaptax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)
NUM_BINS = 64  # sequences that are filled at once
SHUFFLE_ROWS = 10_000  # rows that are shuffled among each other


class StreamSource:
    """Batches of packed sequences, one after another; to start at batch k, the k before it are read again.

    A batch is {tokens, targets, loss_mask, segments, positions}, each [A, B, T], as of ``BatchSource``. A source that
    ends begins anew.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, *, num_micro: int, batch_size: int, part: tuple[int, int] = (0, 1)
    ):
        self._config, self._tokenizer = config, tokenizer
        self._sources = train_sources(config.data)
        length = pad_length(config.data.max_length)
        self._shape, self._part, self.lengths = (num_micro, batch_size, length), part, [length]
        self.shape = (num_micro, batch_size // part[1])
        self._told: set[tuple[str, str]] = set()  # (path, what became of its rows)

    def iterate(self, start: int, stop: int, prefetch: int, place: Place = lambda batch: batch) -> Iterator[Any]:
        """Batches start .. stop - 1, some prepared ahead, and put in their place (on the device), by a thread."""
        shuffle, seed = self._config.data.shuffle, self._config.training.seed
        rows: Any = _Elements(self._read_all)
        if shuffle:
            rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=SHUFFLE_ROWS, seed=seed)
        packed = grain.experimental.BestFitPackIterDataset(
            rows,
            length_struct=dict.fromkeys(("tokens", "targets", "loss_mask"), self._shape[2]),
            num_packing_bins=NUM_BINS,
            seed=seed,
            shuffle_bins=shuffle,
        )
        batches = packed.batch(self._shape[0] * self._shape[1], drop_remainder=True)
        wanted = _Elements(lambda: itertools.islice(iter(batches), start, stop))
        ahead = wanted.map(lambda batch: place(self._shape_batch(batch)))
        return iter(grain.experimental.ThreadPrefetchIterDataset(ahead, prefetch_buffer_size=prefetch))

    def _shape_batch(self, packed: dict[str, np.ndarray]) -> Batch:
        arrays = {name: packed[name] for name in ("tokens", "targets", "loss_mask")}
        arrays["segments"], arrays["positions"] = packed["tokens_segment_ids"], packed["tokens_positions"]
        i, n = self._part
        width = self._shape[1] // n
        whole = {name: np.asarray(array).reshape(self._shape) for name, array in arrays.items()}
        return {name: array[:, i * width : (i + 1) * width] for name, array in whole.items()}

    def _read_all(self) -> Iterator[dict[str, np.ndarray]]:
        """Rows of all sources, in proportion to their weights, without end."""
        streams = [self._read(source) for source in self._sources]
        if self._config.data.mixture is None:  # one source after the other, again and again
            for turn, source in enumerate(itertools.cycle(self._sources)):
                yield from self._read_once(source, is_first=turn < len(self._sources))
        taken = np.zeros(len(streams))
        weights = np.array([source.weight for source in self._sources])
        while True:
            i = int(((taken + 0.5) / weights).argmin())
            taken[i] += 1
            yield next(streams[i])

    def _read(self, source: Source) -> Iterator[dict[str, np.ndarray]]:
        for turn in itertools.count():
            yield from self._read_once(source, is_first=turn == 0)

    def _read_once(self, source: Source, is_first: bool) -> Iterator[dict[str, np.ndarray]]:
        total = Counts()
        is_empty = True
        for streamed in stream_examples(source, self._config.data, self._tokenizer, total, is_told=is_first):
            is_empty = False
            tokens, trained = streamed.example.tokens, streamed.example.is_trained
            yield {
                "tokens": tokens,
                "targets": np.append(tokens[1:], np.int32(0)),
                "loss_mask": np.append(trained[1:], False),
            }
        lines = describe_counts(total, self._config.data)
        for line in lines:
            if (source.path, line) not in self._told:  # a short source is passed over again and again
                log.warning("%s: %s", source.path, line)
                self._told.add((source.path, line))
        if is_empty:
            raise UserError(f"no row of {source.path} is left to use: {'; '.join(lines) or 'there are none'}")
        if total.chats and not total.terminators:
            raise UserError(f"no <end_of_turn> of {source.path} is trained: raise data.max_length")


class _Elements(grain.IterDataset):
    """What a function yields; to go on at a place, it is called and read again up to there."""

    def __init__(self, read: Callable[[], Iterator[Any]]):
        super().__init__()
        self._read = read

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self._read)


class _Iterator(grain.DatasetIterator):
    def __init__(self, read: Callable[[], Iterator[Any]]):
        super().__init__()
        self._read, self._elements, self._count = read, read(), 0

    def __next__(self) -> Any:
        element = next(self._elements)
        self._count += 1
        return element

    def get_state(self) -> dict[str, Any]:
        return {"count": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        self._elements = itertools.islice(self._read(), self._count, None)
