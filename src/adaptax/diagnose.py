"""Where a batch stops being finite, and what to do about it."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from adaptax.lora import Arrays
from adaptax.probe import HALVES, Evidence, Notes, Weight, build_measure
from adaptax.report import log_table
from adaptax.step import Batch, Program

log = logging.getLogger(__name__)
LARGE = 1e3  # adapters that learn well stay around 1

SLOWER = "go on from an earlier checkpoint, with a lower optimizer.learning_rate or with optimizer.max_grad_norm"
DAMAGED_BASE = "the base weights are damaged: fetch or convert them again"
DAMAGED_ADAPTER = f"an earlier update made it so: {SLOWER}"
TOO_LARGE = "model.dtype=float32 has room for them"
GROWN = f"the adapters have run away: {SLOWER}"
USUAL = (
    "the adapters are of usual size: look at the rows of this batch, and at the base weights, whose largest value is"
)
NO_TOKEN = "the tokenizer and the weights do not belong together: look at model.tokenizer and model.weights"


@dataclass(frozen=True)
class Row:
    """A line of the table: the embedding, a layer, the final norm, or the loss of the batch."""

    place: str
    top: float  # the largest |x| behind it that is finite; the loss itself
    num_finite: int  # sequences that are finite behind it
    gradient: float | None  # norm of the gradient of its adapters, with the loss of all; None where it has none
    is_gradient_finite: bool  # of its adapters, and the one that it hands down


@dataclass(frozen=True)
class Finding:
    """The first thing that is not finite."""

    place: str  # layers/3/mlp (forward)
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}; {self.advice}"


@dataclass(frozen=True)
class Diagnosis:
    """What one compute type makes of a batch."""

    finding: Finding | None  # None: all is finite
    rows: tuple[Row, ...]
    damaged: tuple[str, ...]  # in words: weights and adapters that are not finite, or too large for the type
    sequences: tuple[tuple[int, int], ...]  # (micro-batch, sequence): those whose forward pass is not finite
    num_sequences: int
    loss: float  # as the step's metrics have it
    grad_norm: float

    @property
    def first(self) -> str | None:
        """The finding in a line, with what to do about it."""
        return None if self.finding is None else str(self.finding)


def diagnose(program: Program, base: Arrays, adapters: Arrays, batch: Batch, key: jax.Array | None = None) -> Diagnosis:
    """Runs a batch once more, forward and backward, and says what is the first thing that is not finite.

    Args:
      program: the step's, with the compute type to look at. The caller sets the precision of matrix products.
      base: the frozen weights.
      adapters: those that the step began with.
      batch: the global one, [A, B, T], on the mesh.
      key: of the step, ``fold_in(state.key, state.step)``; needed where adapters have dropout.
    """
    return build_diagnose(program)(base, adapters, batch, key)


def build_diagnose(program: Program) -> Callable[..., Diagnosis]:
    """``(base, adapters, batch, key=None) -> diagnosis``: compiled once, for several batches of a program."""
    measure = build_measure(program)

    def run(base: Arrays, adapters: Arrays, batch: Batch, key: jax.Array | None = None) -> Diagnosis:
        evidence = measure(base, adapters, batch, key)
        bad_AB = functools.reduce(np.logical_or, (note["bad"] for note in evidence.forward.values()))
        return Diagnosis(
            finding=next(_find(evidence), None),
            rows=tuple(_rows(evidence)),
            damaged=tuple(str(weight) for weight in evidence.weights if weight.is_damaged),
            sequences=tuple((int(a), int(b)) for a, b in np.argwhere(bad_AB)),
            num_sequences=bad_AB.size,
            loss=evidence.loss,
            grad_norm=evidence.grad_norm,
        )

    return run


def _rows(evidence: Evidence) -> Iterator[Row]:
    broken = {finding.place for a in range(evidence.num_micro) for finding in _find_backward(a, evidence)}
    for place, note in evidence.forward.items():
        layer, _, half = place.rpartition("/")
        if half in HALVES[:-1]:
            continue  # what is behind the last half is behind the layer
        norms = [norm for path, norm in evidence.norms.items() if layer and path.startswith(f"{layer}/")]
        gradient, top = (math.hypot(*norms) if norms else None), float(note["top"].max())
        if place == "loss":
            gradient, top = evidence.grad_norm, evidence.loss
        parts = [f"{layer}/{half} (gradient)" for half in HALVES] if layer else [f"{place} (gradient)"]
        is_finite = not broken.intersection(parts) and (gradient is None or math.isfinite(gradient))
        yield Row(layer or place, top, int((~note["bad"]).sum()), gradient, is_finite)


def _find(evidence: Evidence) -> Iterator[Finding]:
    """What is not finite, in the order of the computation; what follows from the first is told too, so take that."""
    order = {place: i for i, place in enumerate(evidence.forward)}
    damaged = next((weight for weight in evidence.weights if weight.is_damaged), None)
    for a in range(evidence.num_micro):
        broken = next((place for place, note in evidence.forward.items() if note["bad"][a].any()), None)
        if damaged and order[damaged.place] <= order[broken or "loss"]:
            yield _find_damage(damaged, evidence)
        if broken:
            yield _find_forward(broken, a, evidence)
        yield from _find_backward(a, evidence)
    yield from _find_total(evidence)


def _find_damage(weight: Weight, evidence: Evidence) -> Finding:
    others = sum(other.is_damaged for other in evidence.weights) - 1
    more = f", and {others} more behind it have such values" if others else ""
    advice = DAMAGED_ADAPTER if weight.is_adapter else DAMAGED_BASE
    advice = advice if any(weight.counts[:2]) else TOO_LARGE
    return Finding(f"{weight.place} (forward)", f"its {weight}{more}", advice)


def _find_forward(place: str, a: int, evidence: Evidence) -> Finding:
    places, where = list(evidence.forward), _name_sequences(evidence.forward[place], a)
    if place == places[0] and evidence.unknown_token is not None:
        what = f"token {evidence.unknown_token} is not among the {evidence.vocab_size:,} of the model, {where}"
        return Finding(f"{place} (forward)", what, NO_TOKEN)
    sizes, advice = _judge_sizes(evidence)
    if place != places[0]:
        before = evidence.forward[places[places.index(place) - 1]]["top"][a].max()
        sizes = f"before it |x| is at most {before:.3g}, {sizes}"
    return Finding(f"{place} (forward)", f"its weights are finite, what comes out is not, {where}; {sizes}", advice)


def _find_backward(a: int, evidence: Evidence) -> Iterator[Finding]:
    """Place by place from the last: the gradients of its adapters, then the one that it hands down."""
    places = list(evidence.forward)
    adapted = {weight.path: places.index(weight.place) for weight in evidence.weights if weight.is_adapter}
    lowest = min(adapted.values())
    sizes, advice = _judge_sizes(evidence)
    for i in range(len(places) - 1, lowest - 1, -1):
        bad = [path for path, place in adapted.items() if place == i and evidence.bad_grads[path][a]]
        onward = evidence.backward.get(places[i - 1]) if i > lowest else None  # further down nothing needs it
        if bad:
            more = f" and of {len(bad) - 1} more" if bad[1:] else ""
            what = f"the gradient of its adapter {bad[0]}{more} is not finite"
        elif onward is not None and onward["bad"][a].any():
            what = f"the gradient that it hands down is not finite, {_name_sequences(onward, a)}"
        else:
            continue
        arriving = evidence.backward.get(places[i])
        if arriving is not None:
            what += f"; the one that arrives is at most {arriving['top'][a].max():.3g}"
        yield Finding(f"{places[i]} (gradient)", f"the forward pass is finite, {what}, {sizes}", advice)


def _find_total(evidence: Evidence) -> Iterator[Finding]:
    """What is finite in every micro-batch, but not over all of them, or not when it is squared."""
    sizes, advice = _judge_sizes(evidence)
    bad = [path for path, norm in evidence.norms.items() if not math.isfinite(norm)]
    if not math.isfinite(evidence.loss):
        yield Finding("loss (sum)", f"that of each micro-batch is finite, their sum is not; {sizes}", advice)
    if bad:
        what = f"that of each micro-batch is finite, their sum is not, in {bad[0]} and {len(bad) - 1} more"
        yield Finding("gradient (sum)", f"{what}; {sizes}", advice)
    if not math.isfinite(evidence.grad_norm):
        path, norm = max(evidence.norms.items(), key=lambda item: item[1])
        what = f"the gradient is finite, its square is not: of {path} alone the norm is {norm:.3g}"
        yield Finding("gradient norm", f"{what}; {sizes}", advice)


def _judge_sizes(evidence: Evidence) -> tuple[str, str]:
    """(the largest value of an adapter in words, what to do about a value that overflowed)."""
    adapters, base = ([w for w in evidence.weights if w.is_adapter is side] for side in (True, False))
    largest, largest_base = (max(weights, key=lambda weight: weight.top) for weights in (adapters, base))
    sizes = f"the largest value of an adapter is {largest.top:.3g}, in {largest.path}"
    return sizes, GROWN if largest.top > LARGE else f"{USUAL} {largest_base.top:.3g}, in {largest_base.path}"


def _name_sequences(note: Notes, a: int) -> str:
    """Which sequences of micro-batch a are not finite."""
    bad_B = np.flatnonzero(note["bad"][a])
    tokens_B = note["token"][a] if "token" in note else None
    named = [f"({a}, {b})" + ("" if tokens_B is None else f" from its token {tokens_B[b]}") for b in bad_B[:3]]
    more = f" and {len(bad_B) - 3} more" if len(bad_B) > 3 else ""
    return f"in {len(bad_B)} of {note['bad'].shape[1]} sequences of micro-batch {a}: {', '.join(named)}{more}"


def show_diagnosis(named: Mapping[str, Diagnosis]) -> None:
    """Logs diagnoses side by side, by the compute type: the run's own first, float32 last."""
    table = Table(title="the batch once more")
    table.add_column("layer")
    for title in ("max |x|", "gradient norm", "finite"):
        for name in named:
            table.add_column(f"{title}\n{name}", justify="right")
    for rows in zip(*(diagnosis.rows for diagnosis in named.values()), strict=True):
        total = next(iter(named.values())).num_sequences
        cells = [_show_top(row) for row in rows]
        cells += ["" if row.gradient is None else f"{row.gradient:.3g}" for row in rows]
        cells += [_show_finite(row, total) for row in rows]
        table.add_row(rows[0].place, *map(Text, cells))
    log_table(table)
    log.info("%s", conclude(named))


def _show_top(row: Row) -> str:
    return f"{row.top:.3g}" if row.num_finite else ""


def _show_finite(row: Row, total: int) -> str:
    if row.num_finite < total:
        return f"{row.num_finite} of {total}" if row.num_finite else "no"
    return "yes" if row.is_gradient_finite else "forward only"


def conclude(named: Mapping[str, Diagnosis]) -> str:
    """What the diagnoses say together: whether it is the compute type, the weights or the batch."""
    (own_name, own), (wide_name, wide) = list(named.items())[0], list(named.items())[-1]
    names = " and in ".join(named)
    if own.finding is None and wide.finding is None:
        return (
            f"all is finite in {names} (loss {own.loss:.4g}, gradient norm {own.grad_norm:.4g}): these numbers do not "
            "do it again, so look at the hardware, and at what has changed since: versions, mesh"
        )
    if own.finding and wide.finding is None:
        besides = f"; besides, {GROWN}" if own.finding.advice == GROWN else ""
        return (
            f"the compute type {own_name} overflowed: in {wide_name} all is finite, in {own_name} it is not from "
            f"{own.finding.place} on: {own.finding.what}; set model.dtype={wide_name}{besides}"
        )
    if own.finding is None:
        return f"all is finite in {own_name}, not in {wide_name}: {wide.first}"
    if wide.finding and own.finding.place == wide.finding.place:
        return f"the first that is not finite, in {names}: {wide.first}"
    return f"the first that is not finite is, in {own_name}, {own.first}; in {wide_name}, {wide.first}"
