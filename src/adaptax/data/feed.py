"""All that a run reads: its rows, and the batches they are served in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaptax.config import Config, mesh_sizes
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


def open_feed(
    config: Config,
    tokenizer: Tokenizer,
    part: tuple[int, int] = (0, 1),
    stores: Sequence[Sequence[TokenStore]] | None = None,
) -> Feed:
    """Reads the rows and plans the batches.

    Args:
      config: of the run.
      tokenizer: the model's.
      part: the share of each batch that this process loads: (i, of n).
      stores: the rows of each training source, where they are in memory already.

    Raises:
      UserError: as :func:`adaptax.data.pipeline.load_data` does.
    """
    training, data = config.training, config.data
    fsdp, _ = mesh_sizes(config.model.mesh_shape)
    num_micro, batch_size = training.gradient_accumulation_steps, training.micro_batch_size * fsdp
    if data.streaming:
        from adaptax.data.streaming import StreamSource  # brings grain, and so jax

        train, held_out = None, load_held_out(data, tokenizer)
        batches = StreamSource(config, tokenizer, num_micro=num_micro, batch_size=batch_size, part=part)
        buckets = np.array(batches.lengths)
        num_steps = training.num_epochs * (training.num_batches or 0)
    else:
        train, held_out = load_data(data, tokenizer, stores)
        buckets = choose_lengths(data, train, held_out)
        batches = BatchSource(
            train,
            num_micro=num_micro,
            batch_size=batch_size,
            buckets=buckets,
            packing=data.packing,
            shuffle=data.shuffle,
            seed=training.seed,
            part=part,
        )
        per_epoch = training.num_batches
        num_steps = training.num_epochs * per_epoch if per_epoch else batches.count_steps(training.num_epochs)
    eval_batches = None
    if len(held_out.examples):
        eval_batches = BatchSource(
            held_out, num_micro=1, batch_size=batch_size, buckets=buckets, packing=data.packing, part=part
        )
    return Feed(batches, eval_batches, train, held_out, num_steps, num_micro * batch_size)


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
