"""All that a run reads: its rows, and the batches they are served in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptax.config import Config, mesh_sizes, micro_batch
from adaptax.data.packing import pad_length
from adaptax.data.pipeline import BatchSource, Dataset, choose_lengths, load_data, load_held_out
from adaptax.data.store import TokenStore
from adaptax.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from adaptax.data.streaming import StreamSource

log = logging.getLogger(__name__)
FEW_STEPS = 20


@dataclass(frozen=True)
class Feed:
    """Training and held-out rows, and their batches."""

    batches: BatchSource | StreamSource
    eval_batches: BatchSource | None  # None where nothing is held out
    train: Dataset | None  # None where rows are streamed
    held_out: Dataset
    num_steps: int
    global_batch_size: int  # sequences


@dataclass(frozen=True)
class RowSet:
    """The rows of a run, before they are put in batches."""

    train: Dataset | None  # None where rows are streamed
    held_out: Dataset
    lengths: np.ndarray  # of padded sequences, ascending

    @property
    def longest(self) -> int:
        """Tokens of the longest sequences."""
        return int(self.lengths[-1])

    def count(self, config: Config) -> int:
        """Sequences of a pass over the data; a stream has no end."""
        if self.train is None:
            return sys.maxsize
        return BatchSource(self.train, num_micro=1, batch_size=1, **_how(self.lengths, config)).steps_per_epoch


def open_feed(
    config: Config,
    tokenizer: Tokenizer,
    part: tuple[int, int] = (0, 1),
    stores: Sequence[Sequence[TokenStore]] | None = None,
) -> Feed:
    """:func:`read_rows`, then :func:`plan_feed`."""
    return plan_feed(read_rows(config, tokenizer, stores), config, tokenizer, part)


def read_rows(config: Config, tokenizer: Tokenizer, stores: Sequence[Sequence[TokenStore]] | None = None) -> RowSet:
    """Reads the rows.

    Args:
      config: of the run.
      tokenizer: the model's.
      stores: the rows of each training source, where they are in memory already.

    Raises:
      UserError: as :func:`adaptax.data.pipeline.load_data` does.
    """
    data = config.data
    if data.streaming:
        return RowSet(None, load_held_out(data, tokenizer), np.array([pad_length(data.max_length)]))
    train, held_out = load_data(data, tokenizer, stores)
    return RowSet(train, held_out, choose_lengths(data, train, held_out))


def plan_feed(rows: RowSet, config: Config, tokenizer: Tokenizer, part: tuple[int, int] = (0, 1)) -> Feed:
    """Plans the batches.

    Args:
      rows: from :func:`read_rows`.
      config: of the run; its micro-batch is a number by now.
      tokenizer: the model's.
      part: the share of each batch that this process loads: (i, of n).
    """
    training = config.training
    fsdp, _ = mesh_sizes(config.model.mesh_shape)
    num_micro, batch_size = training.gradient_accumulation_steps, micro_batch(training) * fsdp
    if rows.train is None:
        from adaptax.data.streaming import StreamSource  # brings grain, and so jax

        batches = StreamSource(config, tokenizer, num_micro=num_micro, batch_size=batch_size, part=part)
        num_steps = training.num_epochs * (training.num_batches or 0)
    else:
        how = _how(rows.lengths, config)
        batches = BatchSource(rows.train, num_micro=num_micro, batch_size=batch_size, part=part, **how)
        per_epoch = training.num_batches
        num_steps = training.num_epochs * per_epoch if per_epoch else batches.count_steps(training.num_epochs)
    eval_batches = None
    if len(rows.held_out.examples):
        packing = config.data.packing
        eval_batches = BatchSource(
            rows.held_out, num_micro=1, batch_size=batch_size, buckets=rows.lengths, packing=packing, part=part
        )
    return Feed(batches, eval_batches, rows.train, rows.held_out, num_steps, num_micro * batch_size)


def _how(lengths: np.ndarray, config: Config) -> dict[str, Any]:
    data = config.data
    return {"buckets": lengths, "packing": data.packing, "shuffle": data.shuffle, "seed": config.training.seed}


def describe_feed(feed: Feed, config: Config) -> None:
    """Logs how large a global batch is, how full its sequences are, and how many steps there will be."""
    training, train = config.training, feed.train
    rows = "rows as they come" if train is None else f"{len(train.examples)} rows to train"
    if isinstance(feed.batches, BatchSource):
        log.info(
            "sequences of %s tokens, %.1f%% full; %d steps per pass over the data",
            ", ".join(map(str, feed.batches.lengths)),
            100 * feed.batches.efficiency,
            feed.batches.steps_per_epoch,
        )
    log.info(
        "%s, %d held out%s; global batch %d = micro_batch_size %d x fsdp %d x accumulation %d; %d steps",
        rows,
        len(feed.held_out.examples),
        "" if train is None else f", {train.num_supervised} supervised tokens",
        feed.global_batch_size,
        training.micro_batch_size,
        mesh_sizes(config.model.mesh_shape)[0],
        training.gradient_accumulation_steps,
        feed.num_steps,
    )
    for line in worry_about(feed, config):
        log.warning("%s", line)


def worry_about(feed: Feed, config: Config) -> list[str]:
    """What about the batches is hardly meant, one line each."""
    lines = []
    if not isinstance(feed.batches, BatchSource):
        return lines
    if config.data.packing and feed.num_steps < FEW_STEPS and config.training.num_batches is None:
        lines.append(
            f"few steps ({feed.num_steps}): data.packing=false, a smaller data.max_length or more training.num_epochs "
            "make more"
        )
    num_sequences = len(feed.batches.rows(0)[0])
    if feed.batches.steps_per_epoch == 1 and num_sequences < feed.global_batch_size:
        lines.append(
            f"a pass over the data is {num_sequences} sequences, and a step takes {feed.global_batch_size}: the others "
            "are empty; lower training.micro_batch_size"
        )
    return lines
