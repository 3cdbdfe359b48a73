"""What would be trained, shown before a step is spent: no weights are read, and no jax is imported."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptax.config import Config, UserError
from adaptax.data.catalog import train_sources
from adaptax.data.encode import describe_counts, stream_examples
from adaptax.data.feed import Feed, open_feed, worry_about
from adaptax.data.pipeline import BatchSource, count_shared
from adaptax.data.store import Counts, Examples, TokenStore
from adaptax.data.tokenizer import Tokenizer, open_tokenizer
from adaptax.models import find_architecture, find_source
from adaptax.models.hub import SMALL_FILES, fetch_files
from adaptax.preview_page import Histogram, Part, Sample, Span, check_page, visible, write_page

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
OF_WHOLE_DATA = ("packing efficiency", "steps per epoch")  # which a stream knows nothing of
STREAM_ROWS = 1000  # of a stream, so many are looked at
MAX_SHOWN = 1200  # characters of a span in the terminal
NUM_BARS, MAX_FILES = 24, 10
STYLES = {"trained": "bold green", "context": "", "padding": "dim"}


@dataclass(frozen=True)
class Report:
    """What preview tells, whether in a terminal or on a page."""

    facts: list[tuple[str, str]]
    warnings: list[str]
    histogram: Histogram | None
    samples: list[Sample]


def preview(config: Config, num_samples: int, page: Path | None, command: str) -> None:
    """Prints some sequences as they would be trained and a table about all rows; ``page`` gets the same as HTML.

    Raises:
      UserError: whatever would keep the data from being trained, or the page from being written.
    """
    if page is not None:
        check_page(page)
    directory = _find_directory(config)
    arch = find_architecture(config.model, directory)
    tokenizer = open_tokenizer(config, directory, arch.vocab_size)
    is_stream = config.data.streaming
    feed = _open_start_of_stream(config, tokenizer) if is_stream else open_feed(config, tokenizer)
    report = build_report(config, feed, tokenizer, num_samples)
    if is_stream:
        report.facts[:] = [fact for fact in report.facts if fact[0] not in OF_WHOLE_DATA]
        report.facts.insert(0, ("looked at", f"the first {STREAM_ROWS} rows of each source (data.streaming=true)"))
    print_report(report, Console(file=sys.stdout, highlight=False))
    if page is not None:
        title = f"adaptax preview: {config.name}"
        write_page(page, title, command, report.facts, report.warnings, report.histogram, report.samples)
        print(f"written to {page}")


def _find_directory(config: Config) -> Path | None:
    """Where tokenizer and numbers of the model are; the hub is not asked where both are known without it."""
    source = find_source(config.model)
    is_known = config.model.tokenizer is not None and config.model.model_size != "auto"
    return None if is_known and not Path(source).expanduser().is_dir() else fetch_files(source, SMALL_FILES)


def build_report(config: Config, feed: Feed, tokenizer: Tokenizer, num_samples: int) -> Report:
    """Everything that preview shows."""
    train, batches = feed.train, feed.batches
    assert train is not None
    assert isinstance(batches, BatchSource)
    counts, rows = train.counts, batches.first_rows
    lengths, supervised = train.examples.lengths[rows], train.examples.supervised[rows]
    num_tokens, num_supervised = int(lengths.sum(dtype=np.int64)), int(supervised.sum(dtype=np.int64))
    percentiles = np.percentile(lengths, PERCENTILES, method="nearest").astype(int)
    num_duplicates = len(train.examples) - len(np.unique(train.examples.digests))
    num_shared = count_shared(train, feed.held_out)
    facts = [
        ("rows read", f"{counts.rows:,}"),
        ("rows to train", f"{len(train.examples):,}" + (f", {len(rows):,} in an epoch" if train.mixture else "")),
        ("rows held out", f"{len(feed.held_out.examples):,}"),
        ("formats", _describe_formats(train.examples.stores)),
        ("held-out rows of", _describe_formats(feed.held_out.examples.stores) or "none"),
        ("tokens", f"{num_tokens:,}"),
        ("supervised", f"{num_supervised:,} tokens, {num_supervised / num_tokens:.1%}"),
        ("tokens per row", ", ".join(f"p{p} {n:,}" for p, n in zip(PERCENTILES, percentiles, strict=True))),
        ("truncated", f"{counts.truncated:,} rows (data.max_length={config.data.max_length})"),
        ("split", f"{counts.split:,} rows"),
        ("dropped", _describe_dropped(counts)),
        ("duplicate rows", f"{num_duplicates:,}"),
        ("in both training and evaluation", f"{num_shared:,} evaluation rows"),
        ("sequence length", ", ".join(f"{n:,}" for n in batches.lengths)),
        ("packing efficiency" if config.data.packing else "sequences full", f"{batches.efficiency:.1%}"),
        ("sequences per step", f"{feed.global_batch_size:,}"),
        ("steps per epoch", _describe_steps(batches.steps_per_epoch, config.training.num_batches)),
        ("steps", f"{feed.num_steps:,}"),
    ]
    warnings = [*describe_counts(counts, config.data)]
    warnings += [f"evaluation: {line}" for line in describe_counts(feed.held_out.counts, config.data)]
    warnings += worry_about(feed, config)
    if num_duplicates:
        warnings.append(f"{num_duplicates} training rows stand there more than once")
    if num_shared:
        warnings.append(f"{num_shared} evaluation rows also stand in the training data: the evaluation flatters")
    samples = list(itertools.islice(_samples(batches, train.examples, tokenizer), num_samples))
    return Report(facts, warnings, _histogram(lengths), samples)


def _describe_formats(stores: Sequence[TokenStore]) -> str:
    listed = [f"{store.name}: {store.format}" for store in stores[:MAX_FILES]]
    return ", ".join(listed) + (f" and {len(stores) - MAX_FILES:,} more files" if len(stores) > MAX_FILES else "")


def _describe_steps(per_pass: int, num_batches: int | None) -> str:
    return f"{num_batches:,}; a pass over the data is {per_pass:,}" if num_batches else f"{per_pass:,}"


def _describe_dropped(counts: Counts) -> str:
    reasons = {
        "bad": counts.bad,
        "left out by data.filter": counts.filtered,
        "too short": counts.short,
        "too long": counts.dropped,
        "nothing to train": counts.untrained,
    }
    listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    return f"{sum(reasons.values()):,} rows" + (f" ({listed})" if listed else "")


def _histogram(lengths: np.ndarray) -> Histogram:
    width = max(1, -(-(int(lengths.max()) + 1) // NUM_BARS))
    edges = np.arange(0, width * NUM_BARS + 1, width)
    counts, _ = np.histogram(lengths, edges)
    last = int(np.flatnonzero(counts)[-1]) + 1
    return Histogram(tuple(edges[: last + 1].tolist()), tuple(counts[:last].tolist()))


def _samples(batches: BatchSource, examples: Examples, tokenizer: Tokenizer) -> Iterator[Sample]:
    """The sequences of the first epoch, in the order of training."""
    number = 0
    for step in range(batches.steps_per_epoch):
        sequences, length = batches.rows(step)
        for rows in sequences:
            number += 1
            parts = [_part(examples, int(row), tokenizer) for row in rows]
            num_padding = length - sum(part.num_tokens for part in parts)
            if num_padding:
                parts.append(Part("", (Span(f"{num_padding} padding tokens", "padding"),), num_padding, 0))
            yield Sample(f"sequence {number}, step {step + 1}", tuple(parts))


def _part(examples: Examples, row: int, tokenizer: Tokenizer) -> Part:
    tokens, trained = examples.arrays_of(row)
    edges = np.flatnonzero(np.diff(trained)) + 1
    spans = tuple(
        Span(tokenizer.show(piece.tolist()), "trained" if is_trained else "context")
        for piece, is_trained in zip(np.split(tokens, edges), trained[[0, *edges]], strict=True)
    )
    return Part(examples.place(row), spans, len(tokens), int(trained.sum()))


def _open_start_of_stream(config: Config, tokenizer: Tokenizer) -> Feed:
    """The first rows of each source of a stream, as if they were all."""
    stores = []
    for source in train_sources(config.data):
        counts = Counts()
        limit = min(source.max_rows or STREAM_ROWS, STREAM_ROWS)
        streamed = stream_examples(replace(source, max_rows=limit), config.data, tokenizer, counts)
        group = []
        for (unit, form), found in itertools.groupby(streamed, key=lambda row: (row.unit, row.format)):
            rows = list(found)
            group.append(
                TokenStore.of(unit, form, [row.example for row in rows], Counts(), [row.number for row in rows])
            )
        if group:
            group[0] = replace(group[0], counts=counts)
        stores.append(group)
    return open_feed(replace(config, data=replace(config.data, streaming=False)), tokenizer, stores=stores)


def print_report(report: Report, console: Console) -> None:
    """The sequences, then the table, then the warnings. Without colour, brackets tell what is trained."""
    is_plain = console.color_system is None or console.no_color
    legend = Text("trained ⟦…⟧, context, padding ·" if is_plain else "")
    if not is_plain:
        legend = Text.assemble(*((f"{kind}  ", STYLES[kind]) for kind in STYLES))
    console.print(legend)
    for sample in report.samples:
        console.rule(sample.title, align="left")
        for part in sample.parts:
            if part.place:
                header = f"{part.place}: {part.num_tokens} tokens, {part.num_trained} trained"
                console.print(Text(header, style="italic cyan"), soft_wrap=True)
            console.print(_render(part.spans, is_plain), soft_wrap=True)
    console.print()
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report.facts:
        table.add_row(Text(name), Text(visible(value)))
    console.print(table)
    for warning in report.warnings:
        console.print(Text(f"note: {visible(warning)}", style="yellow"), soft_wrap=True)


def _render(spans: Sequence[Span], is_plain: bool) -> Text:
    text = Text()
    for span in spans:
        words = visible(span.text)
        if len(words) > MAX_SHOWN:
            words = f"{words[:MAX_SHOWN]}… {len(words) - MAX_SHOWN:,} more characters"
        if span.kind == "padding":
            words = f"· {words}"
        text.append(f"⟦{words}⟧" if is_plain and span.kind == "trained" else words, STYLES[span.kind])
    return text


def check_samples(value: str) -> int:
    """The number behind ``--rows``."""
    if not value.isdecimal() or not 0 <= int(value) <= 10_000:
        raise UserError(f"--rows={value}: it must be a whole number from 0 to 10000")
    return int(value)
