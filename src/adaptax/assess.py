"""``adaptax evaluate``: how good adapters are on rows, side by side."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.table import Table
from rich.text import Text

from adaptax.answer_config import metrics_of
from adaptax.config import Config, UserError
from adaptax.data.catalog import check_sources
from adaptax.data.feed import read_rows
from adaptax.data.packing import choose_buckets
from adaptax.data.pipeline import BatchSource, Dataset, load_held_out
from adaptax.data.tokenizer import Tokenizer
from adaptax.evaluate import answered_rows, build_score
from adaptax.generate import Generator
from adaptax.grading import GRADES, mean_interval, share_interval, why_not
from adaptax.lora import Arrays
from adaptax.mesh import shard_batch
from adaptax.options import EvaluateOptions, InspectOptions
from adaptax.report import log_table
from adaptax.run_folder import write_text
from adaptax.sampling import read_sampling
from adaptax.subject import Adapter, Subject, check_new_file, open_subject
from adaptax.weights import take_apart

log = logging.getLogger(__name__)
TELL_SECONDS = 10.0


@dataclass
class Scores:
    """What an adapter makes of the rows; arrays have an entry for each."""

    name: str
    losses: np.ndarray  # summed, in nats
    counts: np.ndarray  # supervised tokens
    right: np.ndarray  # of these, the ones that are the most likely
    generated: list[str] = field(default_factory=list)
    grades: dict[str, list[bool]] = field(default_factory=dict)  # metric -> of each answer

    def summarize(self, reference: Scores | None) -> dict[str, Any]:
        """Its numbers, with 95% intervals; against a reference, the mean difference of loss, row by row."""
        loss, half = mean_interval(self.losses, self.counts)
        accuracy, accuracy_half = mean_interval(self.right.astype(float), self.counts)
        summary: dict[str, Any] = {
            "adapter": self.name,
            "rows": len(self.counts),
            "tokens": int(self.counts.sum()),
            "loss": loss,
            "loss_interval": [loss - half, loss + half],
            "perplexity": math.exp(min(loss, 700)),
            "perplexity_interval": [math.exp(min(loss - half, 700)), math.exp(min(loss + half, 700))],
            "token_accuracy": accuracy,
            "token_accuracy_interval": [accuracy - accuracy_half, accuracy + accuracy_half],
        }
        if reference is not None:
            change, half = mean_interval(self.losses - reference.losses, self.counts)
            summary |= {"loss_change": change, "loss_change_interval": [change - half, change + half]}
        for metric, grades in self.grades.items():
            share, low, high = share_interval(grades)
            summary |= {metric: share, f"{metric}_interval": [low, high], f"{metric}_rows": len(grades)}
        return summary


def evaluate(options: EvaluateOptions, config: Config, mesh: Mesh, places: Sequence[Path | None]) -> list[Scores]:
    """Scores the adapters one after the other, with one reading of base and rows, and tells how they compare.

    Args:
      options: of the command.
      config: names the base and the rows.
      mesh: the devices.
      places: of the adapters; None is the base alone. The first is what the others are compared with.

    Raises:
      UserError: there are no rows, or an expected answer is none that the metric could find.
    """
    out = None if options.out is None else check_new_file(options.out)
    summary = None if out is None else check_new_file(str(out.with_suffix(".summary.json")))
    check_rows(config)  # before anything is fetched
    subject = open_subject(config, mesh, places)
    data = find_rows(options, config, subject.tokenizer)
    answers = find_answers(data, config, subject.tokenizer)
    base = subject.load_base()
    scores = [score_rows(adapter, base, data, config) for adapter in subject.adapters]
    if answers:
        if subject.job.platform == "cpu":
            base = take_apart(dict(base), subject.job.dtype)
        for adapter, score in zip(subject.adapters, scores, strict=True):
            grade_answers(subject, adapter, base, answers, score)
    summaries = [score.summarize(scores[0] if i else None) for i, score in enumerate(scores)]
    show(summaries)
    if out is not None and summary is not None:
        lines = describe_rows(data, subject.tokenizer, answers, scores)
        try:
            write_text(out, "".join(to_json(line) + "\n" for line in lines))
            write_text(summary, to_json(summaries, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{error.filename or out} cannot be written: {error.strerror}") from None
        log.info("predictions in %s, the table in %s", out, summary)
    return scores


def check_rows(config: Config) -> Config:
    """The configuration with the sources alone that are read: with ``data.eval`` nothing needs the training rows.

    Raises:
      UserError: none is named, or one is not there.
    """
    if config.data.eval is not None:
        config = replace(config, data=replace(config.data, train=None, mixture=None, streaming=False))
    elif config.data.train is None and config.data.mixture is None:
        raise UserError("no rows to evaluate on: set data=FILE, or run=DIR of a run that has held some out")
    check_sources(config)
    return config


def find_rows(options: EvaluateOptions | InspectOptions, config: Config, tokenizer: Tokenizer) -> Dataset:
    """The rows of ``data``, or those that the run has held out; raises what :func:`check_rows` does."""
    config = check_rows(config)
    if config.data.eval is not None:
        return load_held_out(config.data, tokenizer)
    data = read_rows(config, tokenizer).held_out
    if not len(data.examples):
        where = "" if options.run is None else f"run={options.run}: "
        raise UserError(f"{where}no rows are held out (data.eval, data.eval_fraction): set data=FILE")
    return data


@dataclass(frozen=True)
class Answer:
    """A row whose last answer is generated."""

    row: int
    prompt: list[int]
    expected: str


def find_answers(data: Dataset, config: Config, tokenizer: Tokenizer) -> list[Answer]:
    """The rows that answers are generated for, if any are asked for.

    Raises:
      UserError: naming a row whose expected answer no answer can equal by a metric.
    """
    metrics, evaluation = metrics_of(config.evaluation), config.evaluation
    if not metrics:
        return []
    answers = []
    for row, example, (start, stop) in itertools.islice(answered_rows(data.examples), evaluation.num_rows):
        expected = tokenizer.decode(example.tokens[start : stop - 1].tolist())
        for metric in metrics:
            if problem := why_not(metric, expected):
                raise UserError(
                    f"{data.examples.place(row)}: evaluation.metric={metric}, and the expected answer {problem}: "
                    f"{expected:.60}"
                )
        answers.append(Answer(row, example.tokens[:start].tolist(), expected))
    if not answers:
        raise UserError(
            f"evaluation.metric={metrics[0]}: no row ends in an answer that is whole and trained alone: documents have "
            "none, data.supervise=all trains the questions too, and data.max_length cuts"
        )
    wanted = min(len(data.examples), evaluation.num_rows or len(data.examples))
    if len(answers) < wanted:
        log.warning("answers are generated for %d of %d rows: others end in none that is whole", len(answers), wanted)
    return answers


def score_rows(adapter: Adapter, base: Arrays, data: Dataset, config: Config) -> Scores:
    """Loss and accuracy of every row."""
    mesh, program = adapter.job.mesh, adapter.program
    fsdp = mesh.shape["fsdp"]
    size = -(-config.generation.batch_size // fsdp) * fsdp
    buckets = choose_buckets(data.examples.lengths, config.data.length_buckets)
    batches = BatchSource(data, num_micro=1, batch_size=size, buckets=buckets)
    score, adapters, num_rows = build_score(program), adapter.place(), len(data.examples)
    losses, counts, right = np.zeros(num_rows), np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
    started = told = time.monotonic()
    for k in range(batches.steps_per_epoch):
        rows = np.concatenate(batches.rows(k)[0])
        found = score(adapters, base, shard_batch(batches[k], mesh))
        for array, values in zip((losses, counts, right), found, strict=True):
            array[rows] = np.asarray(values)[: len(rows)]
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            left = (told - started) / (k + 1) * (batches.steps_per_epoch - k - 1)
            log.info("%s: %d of %d batches scored, %.0f s left", adapter.name, k + 1, batches.steps_per_epoch, left)
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        place = data.examples.place(int(bad[0]))
        log.warning("%s: the loss of %d rows is not finite, the first is %s", adapter.name, len(bad), place)
    return Scores(adapter.name, losses, counts, right)


def grade_answers(subject: Subject, adapter: Adapter, base: Any, answers: Sequence[Answer], scores: Scores) -> None:
    """Generates the answers, and grades them."""
    config, generator = subject.job.config, Generator(adapter.program, adapter.job.arch)
    adapters, size = adapter.place(), config.generation.batch_size
    longest = max(len(answer.prompt) for answer in answers)
    subject.check_room(generator.round_rows(size), generator.capacity(longest, config.generation.max_new_tokens))
    settings = config.generation.max_new_tokens, read_sampling(config.generation)
    started = told = time.monotonic()
    for first in range(0, len(answers), size):
        prompts = [answer.prompt for answer in answers[first : first + size]]
        given = generator.answer(
            base, adapters, prompts, *settings, seed=config.generation.seed, first_row=first, num_rows=size
        )
        scores.generated += [subject.tokenizer.decode(tokens) for tokens in given]
        if time.monotonic() - told > TELL_SECONDS:
            told, done = time.monotonic(), len(scores.generated)
            left = (told - started) / done * (len(answers) - done)
            log.info("%s: %d of %d answers, %.0f s left", adapter.name, done, len(answers), left)
    for metric in metrics_of(config.evaluation):
        scores.grades[metric] = [
            GRADES[metric](given, answer.expected, config.evaluation)
            for given, answer in zip(scores.generated, answers, strict=True)
        ]
    if rates := generator.rates.describe():
        log.info("%s: %s", adapter.name, rates)


def show(summaries: Sequence[dict[str, Any]]) -> None:
    """The table."""
    table = Table("95% intervals", title=f"{summaries[0]['rows']} rows, {summaries[0]['tokens']:,} trained tokens")
    for summary in summaries:
        table.add_column(Text(summary["adapter"]), justify="right", overflow="fold")
    for name in (name for name in summaries[-1] if f"{name}_interval" in summaries[-1]):
        label = name.replace("_", " ") + (f", {summaries[-1][f'{name}_rows']} rows" if name in GRADES else "")
        table.add_row(label, *(Text(_show_cell(summary, name)) for summary in summaries))
    log_table(table)


def _show_cell(summary: dict[str, Any], name: str) -> str:
    if name not in summary:
        return ""
    low, high = summary[f"{name}_interval"]
    form = {"token_accuracy": "{:.1%}", "perplexity": "{:.5g}", "loss_change": "{:+.4f}"}.get(name, "{:.4f}")
    form = "{:.1%}" if name in GRADES else form
    interval = "" if math.isnan(low) else f" [{form.format(low)}, {form.format(high)}]"
    return form.format(summary[name]) + interval


def describe_rows(
    data: Dataset, tokenizer: Tokenizer, answers: Sequence[Answer], scores: Sequence[Scores]
) -> Iterator[dict[str, Any]]:
    """Of each row: where it is from, and what each adapter makes of it."""
    number = {answer.row: i for i, answer in enumerate(answers)}
    for row in range(len(data.examples)):
        line: dict[str, Any] = {"row": data.examples.place(row)}
        i = number.get(row)
        if i is not None:
            line |= {"prompt": tokenizer.decode(answers[i].prompt), "expected": answers[i].expected}
        line["adapters"] = {}
        for score in scores:
            said = {"loss": score.losses[row], "tokens": int(score.counts[row]), "right": int(score.right[row])}
            if i is not None:
                said |= {"generated": score.generated[i]} | {name: grades[i] for name, grades in score.grades.items()}
            line["adapters"][score.name] = said
        yield line


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which knows no NaN: such numbers are null."""
    return json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
