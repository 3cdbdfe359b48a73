"""Rows to tokens: filtered, rendered, encoded on all cores, and cut to length, with everything counted."""

from __future__ import annotations

import collections
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adaptax.config import DataConfig, UserError, locate
from adaptax.data.cache import TokenCache, build_in_memory, default_folder, fingerprint
from adaptax.data.catalog import Source
from adaptax.data.chat import Example, Piece, encode_rows
from adaptax.data.filters import RowFilter
from adaptax.data.formats import FORMATS, Fields, find_format
from adaptax.data.sources import Row, Rows, content_digest, find_units, open_rows, stream_rows
from adaptax.data.store import Arrays, Counts, StoreWriter, TokenStore, digest_of, pack_examples
from adaptax.data.tokenizer import BOS, END_OF_TURN, START_OF_TURN, Tokenizer, is_special

log = logging.getLogger(__name__)
CHUNK_ROWS = 256
MANY_FILES = 10  # of more, one line is logged for all
HEAD_ROWS, COLUMN_ROWS = 1000, 100  # of a stream: looked at for a good row; good ones looked at for columns
SETTINGS = ("supervise", "allow_special_tokens", "min_length", "max_length", "overlong", "on_bad_row")
SECONDS_BETWEEN_LINES = 10
BAD_ROWS = "skipped, as they cannot be used, among them"


@dataclass(frozen=True)
class Encoder:
    """All that decides about the tokens of a row, but the row."""

    config: DataConfig
    source: Source
    format: str
    tokenizer: Tokenizer
    is_taken: RowFilter

    def encode(self, rows: Iterable[tuple[int, Row | UserError]]) -> tuple[Arrays, Counts]:
        """(arrays of a store, counts) of numbered rows; bad ones are counted and listed."""
        counts = Counts()
        rendered: list[tuple[int, list[Piece]]] = []
        bad: list[tuple[int, str]] = []
        for number, row in rows:
            counts.rows += 1
            try:
                if isinstance(row, UserError):
                    raise row
                if self.is_taken and not self.is_taken(row):
                    counts.filtered += 1
                    continue
                pieces = FORMATS[self.format].render(Fields(row, self.source.columns), self.config.supervise)
            except UserError as error:
                bad.append((number, str(error)))
                continue
            rendered.append((number, pieces))
        kept: list[tuple[int, Example]] = []
        examples = encode_rows([pieces for _, pieces in rendered], self.tokenizer)
        for (number, pieces), example in zip(rendered, examples, strict=True):
            if isinstance(example, UserError):
                bad.append((number, str(example)))
                continue
            counts.special += any(is_special(piece.text) for piece in pieces if piece.text)
            kept += [(number, part) for part in self._fit(example, counts)]
        counts.bad = len(bad)
        counts.listed = [f"row {number}: {message}" for number, message in sorted(bad)]
        arrays = pack_examples([e for _, e in kept], [n for n, _ in kept], [digest_of(e.tokens) for _, e in kept])
        counts.chats = len(kept) if FORMATS[self.format].is_chat else 0
        return arrays, counts

    def _fit(self, example: Example, counts: Counts) -> list[Example]:
        """The sequences of a row: none, itself, cut, or in several parts."""
        limit, num_tokens = self.config.max_length, len(example.tokens)
        if num_tokens < self.config.min_length:
            counts.short += 1
            return []
        parts = [example]
        if num_tokens > limit:
            how = self.config.overlong
            if how == "drop":
                counts.dropped += 1
                return []
            parts = _split(example, limit)[: None if how == "split" else 1]
            counts.split += how == "split"
            counts.truncated += how == "truncate"
        parts = [part for part in parts if part.is_trained[1:].any()]
        counts.untrained += not parts
        if FORMATS[self.format].is_chat:
            ends = _ends_of_model(example.tokens, self.tokenizer)
            within = num_tokens if self.config.overlong == "split" else limit
            counts.terminators += int(np.count_nonzero(example.is_trained[ends[ends < within]]))
        return parts


def _ends_of_model(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Where the turns of the model end; every end has its start before it."""
    starts, ends = np.flatnonzero(tokens == START_OF_TURN), np.flatnonzero(tokens == END_OF_TURN)
    roles = tokens[starts[np.searchsorted(starts, ends) - 1] + 1]
    return ends[roles == tokenizer.template_tokens("model\n")[0]]


def _split(example: Example, limit: int) -> list[Example]:
    """Windows of at most ``limit`` tokens; all but the first begin with a BOS of their own: every target stays one."""
    parts = [Example(example.tokens[:limit], example.is_trained[:limit])]
    for start in range(limit, len(example.tokens), limit - 1):
        tokens, trained = example.tokens[start : start + limit - 1], example.is_trained[start : start + limit - 1]
        parts.append(Example(np.insert(tokens, 0, BOS), np.insert(trained, 0, False)))
    return parts


def encode_source(source: Source, config: DataConfig, tokenizer: Tokenizer) -> list[TokenStore]:
    """The rows of a source as tokens, a store for each of its files, from the cache where they are there.

    Raises:
      UserError: naming file and row of the first bad one (``data.on_bad_row=error``), or what is wrong with a file.
    """
    stores: list[TokenStore] = []
    left = source.max_rows
    units = find_units(source.path)
    for unit in units:
        stores.append(_encode_unit(unit, left, source, config, tokenizer))
        if len(units) <= MANY_FILES:
            log.info("%s: %d rows, format %s", unit, stores[-1].counts.rows, stores[-1].format)
        if left is not None:
            left -= stores[-1].counts.rows
            if left <= 0:
                break
    if len(units) > MANY_FILES:
        num_rows, formats = sum(store.counts.rows for store in stores), sorted({store.format for store in stores})
        log.info("%s: %d files, %d rows, format %s", source.path, len(stores), num_rows, ", ".join(formats))
    return stores


def _encode_unit(unit: str, limit: int | None, source: Source, config: DataConfig, tokenizer: Tokenizer) -> TokenStore:
    is_taken, stamp = RowFilter(source.filter), _stamp(unit)

    def build(writer: StoreWriter) -> tuple[str, Counts]:
        rows = open_rows(unit, limit)
        is_taken.check_columns(rows.columns, rows.name)
        form = find_format(rows.columns, source.format, rows.name, source.columns)
        encoder = Encoder(config, source, form, tokenizer, is_taken)
        counts = _encode_all(encoder, rows, writer)
        if _stamp(unit) != stamp:  # its tokens would be kept under the hash of what it was
            raise UserError(f"{unit} changed while it was read: start again when it is written")
        return form, counts

    if config.cache:
        parts = {
            "content": content_digest(unit),
            "kind": Path(unit).suffix.lower(),  # the same bytes are other rows in a .csv than in a .tsv
            "tokenizer": tokenizer.digest,
            "source": [source.format, dict(source.columns), is_taken.described, limit],
            "settings": [getattr(config, name) for name in SETTINGS],
        }
        folder = Path(config.cache_dir).expanduser() if config.cache_dir else default_folder()
        store = TokenCache(folder, config.cache_gib * 2**30).get(fingerprint(parts), unit, build)
    else:
        store = build_in_memory(unit, build)
    return store


def _stamp(unit: str) -> tuple[int, ...]:
    """What changes with a file's content; nothing of what is no file."""
    path = locate(unit)
    stat = path.stat() if path.is_file() else None
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino) if stat else ()


def _encode_all(encoder: Encoder, rows: Rows, writer: StoreWriter) -> Counts:
    """Encodes every row, several chunks at once, and writes them in order."""
    total = Counts()
    clock = started = time.monotonic()
    num_tokens = 0
    for arrays, counts in _map_chunks(encoder, rows):
        if counts.bad and encoder.config.on_bad_row == "error":
            raise UserError(f"{rows.name} {counts.listed[0]}")
        total.add(counts)
        writer.append(arrays)
        num_tokens += len(arrays["tokens"])
        if time.monotonic() - clock > SECONDS_BETWEEN_LINES:
            clock = time.monotonic()
            rate, share = num_tokens / (clock - started), total.rows / len(rows)
            left = (clock - started) * (1 / share - 1)
            log.info("%s: %.0f%% encoded, %.2fM tokens/s, %.0f s left", rows.name, 100 * share, rate / 1e6, left)
    return total


def _map_chunks(encoder: Encoder, rows: Rows) -> Iterator[tuple[Arrays, Counts]]:
    """Chunks in order; sentencepiece runs outside of Python's lock, so threads use every core."""
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pending: collections.deque[Future[tuple[Arrays, Counts]]] = collections.deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for start in range(0, len(rows), CHUNK_ROWS):
            pending.append(pool.submit(lambda s: encoder.encode(_read(rows, s)), start))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(rows: Rows, start: int) -> Iterator[tuple[int, Row | UserError]]:
    for index in range(start, min(start + CHUNK_ROWS, len(rows))):
        try:
            yield rows.number(index), rows[index]
        except UserError as error:
            yield rows.number(index), error


class Streamed(NamedTuple):
    """A row of a stream as tokens, and where it comes from."""

    unit: str
    format: str
    number: int
    example: Example


def stream_examples(
    source: Source, config: DataConfig, tokenizer: Tokenizer, total: Counts, *, is_told: bool = True
) -> Iterator[Streamed]:
    """The rows of a source as tokens, one after another, kept nowhere; they are added to the counts.

    ``is_told`` has the format of each file logged.
    """
    left = source.max_rows
    for unit in find_units(source.path):
        if left is not None and left <= 0:
            return
        rows = itertools.islice(stream_rows(unit), left)
        head = list(itertools.islice(rows, HEAD_ROWS))
        encoder = _encoder_of_stream(unit, head, source, config, tokenizer)
        log.log(logging.INFO if is_told else logging.DEBUG, "%s: format %s", unit, encoder.format)
        rows = itertools.chain(head, rows)
        while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
            arrays, counts = encoder.encode((int(place.rpartition(" ")[2]), row) for place, row in chunk)
            counts.listed = [f"{unit} {line}" for line in counts.listed]
            if counts.bad and config.on_bad_row == "error":
                raise UserError(counts.listed[0])
            total.add(counts)
            left = None if left is None else left - counts.rows
            edges = np.cumsum(arrays["lengths"])[:-1]
            split = zip(np.split(arrays["tokens"], edges), np.split(arrays["trained"], edges), strict=True)
            for number, pair in zip(arrays["rows"].tolist(), split, strict=False):
                yield Streamed(unit, encoder.format, number, Example(*pair))


def _encoder_of_stream(
    unit: str, head: Sequence[tuple[str, Row | UserError]], source: Source, config: DataConfig, tokenizer: Tokenizer
) -> Encoder:
    good = [row for _, row in head if not isinstance(row, UserError)]
    if not good:
        place, problem = head[0]
        raise UserError(f"{place}: {problem}")
    columns = list(dict.fromkeys(column for row in good[:COLUMN_ROWS] for column in row))
    is_taken = RowFilter(source.filter)
    is_taken.check_columns(columns, unit)
    return Encoder(config, source, find_format(columns, source.format, unit, source.columns), tokenizer, is_taken)


def count_all(stores: Sequence[TokenStore]) -> Counts:
    """The counts of all stores, the bad rows with their files."""
    total = Counts()
    for store in stores:
        total.add(replace(store.counts, listed=[f"{store.name} {line}" for line in store.counts.listed]))
    return total


def describe_counts(counts: Counts, config: DataConfig) -> Sequence[str]:
    """What became of the rows that were not simply taken, one line each."""
    limit, shortest = f"data.max_length={config.max_length}", f"data.min_length={config.min_length}"
    fate = "became these tokens"
    if not config.allow_special_tokens:
        fate = "stay plain text: rows that are in the chat template already would be in it twice"
    lines = {
        "left out by data.filter": counts.filtered,
        BAD_ROWS: counts.bad,
        f"of fewer than {shortest} tokens left out": counts.short,
        f"cut to {limit} tokens": counts.truncated,
        f"split into sequences of {limit} tokens": counts.split,
        f"of more than {limit} tokens left out": counts.dropped,
        "with nothing to train left out": counts.untrained,
        f"with special tokens spelled out, which {fate}": counts.special,
    }
    told: list[str] = []
    for line, count in lines.items():
        told += [f"{count:,} row{'s' * (count != 1)} {line}"] if count else []
        told += counts.listed if line == BAD_ROWS else []
    return told
