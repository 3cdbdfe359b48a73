"""Batches that went wrong: which rows they were, and the dump that ``adaptax replay`` runs again."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptax.config import UserError
from adaptax.data.feed import Feed
from adaptax.data.pipeline import BatchSource
from adaptax.data.tokenizer import Tokenizer
from adaptax.manifest import name_step, step_of
from adaptax.run_folder import write_text

log = logging.getLogger(__name__)
MAX_DUMPS, MAX_NAMED = 20, 8
KINDS = {"tokens": "int32", "targets": "int32", "loss_mask": "bool", "segments": "int32", "positions": "int32"}


@dataclass(frozen=True)
class Dump:
    """A batch that was written down."""

    step: int
    loss: float
    grad_norm: float
    places: list[list[str]]  # of the rows in each sequence
    batch: dict[str, np.ndarray]  # [A, B, T] each


def find_places(feed: Feed, step: int) -> list[list[str]]:
    """File and row of all rows in each sequence of a step's batch; empty where rows are streamed."""
    if not isinstance(feed.batches, BatchSource) or feed.train is None:
        return []
    sequences, _ = feed.batches.rows(step - 1)
    return [[feed.train.examples.place(int(row)) for row in rows] for rows in sequences]


def name_rows(feed: Feed, step: int) -> str:
    """The rows of a step's batch, a few of them by name."""
    places = [place for sequence in find_places(feed, step) for place in sequence]
    if not places:
        return f"batch {step - 1} of the stream"
    more = f" and {len(places) - MAX_NAMED} more" if len(places) > MAX_NAMED else ""
    return ", ".join(places[:MAX_NAMED]) + more


def dump_batch(
    folder: Path,
    step: int,
    values: Mapping[str, float],
    batch: Mapping[str, np.ndarray],
    feed: Feed,
    tokenizer: Tokenizer,
) -> None:
    """Writes the batch of a step whose loss or gradient was not finite: ids, text, and where its rows come from.

    At most ``MAX_DUMPS`` of them are kept, the first ones.
    """
    path = folder / f"{name_step(step)}.json"
    if len(list(folder.glob("step_*.json"))) >= MAX_DUMPS and not path.exists():
        return
    places = find_places(feed, step)
    arrays = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in KINDS}
    sequences = []
    for i, tokens in enumerate(arrays["tokens"]):
        real = arrays["segments"][i] > 0
        sequence = {"rows": places[i] if i < len(places) else [], "text": tokenizer.decode(tokens[real].tolist())}
        sequences.append(sequence | {name: arrays[name][i].astype(int).tolist() for name in KINDS})
    found = {name: values[name] if math.isfinite(values[name]) else str(values[name]) for name in ("loss", "grad_norm")}
    dump = {"step": step, "shape": batch["tokens"].shape} | found | {"sequences": sequences}
    try:
        folder.mkdir(exist_ok=True)
        write_text(path, json.dumps(dump, ensure_ascii=False) + "\n")
    except OSError as error:
        log.warning("%s is not written: %s", path, error.strerror)
        return
    log.warning(
        "step %d: loss %s and gradient norm %s, not finite; the update is skipped, the batch is in %s: %s",
        step,
        values["loss"],
        values["grad_norm"],
        path,
        name_rows(feed, step),
    )


def list_dumps(folder: Path) -> list[int]:
    """The steps whose batches were written down."""
    return sorted(step for path in folder.glob("step_*.json") if (step := step_of(path.with_suffix(""))) is not None)


def read_dump(folder: Path, step: int) -> Dump:
    """A batch that was written down.

    Raises:
      UserError: the file is not what :func:`dump_batch` writes.
    """
    path = folder / f"{name_step(step)}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shape, sequences = tuple(map(int, values["shape"])), values["sequences"]
        batch = {name: np.array([s[name] for s in sequences], kind).reshape(shape) for name, kind in KINDS.items()}
        places = [list(map(str, sequence["rows"])) for sequence in sequences]
        return Dump(int(values["step"]), float(values["loss"]), float(values["grad_norm"]), places, batch)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not the dump of a batch: {error}") from None
