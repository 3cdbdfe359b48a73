"""What is written down of every step and evaluation, and what is noticed on the way: spikes, steps without a number."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from adaptax.checkpoint import Saver, gather
from adaptax.faults import dump_batch, name_rows
from adaptax.metrics import MetricsLog, ProgressDisplay
from adaptax.prepare import Prepared, is_main
from adaptax.progress import Progress
from adaptax.run_folder import RunFolder
from adaptax.step import Batch, TrainState

log = logging.getLogger(__name__)


class Recorder:
    """Reads the numbers of steps and evaluations, writes and shows them, and keeps the run's :class:`Progress`.

    Close it on every path.

    Args:
      prepared: the run.
      folder: of the run.
      earlier: rows of ``metrics.jsonl`` from before a resume.
      progress: from before a resume.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, earlier: Sequence[Mapping[str, Any]], progress: Progress):
        self._prepared, self._folder, self.progress = prepared, folder, progress
        job, is_shown = prepared.job, is_main()
        self._training = job.config.training
        self._metrics = MetricsLog(folder.path if is_shown else None, job.config.logging, earlier)
        self.display = ProgressDisplay(job.config.logging, job.num_steps, is_shown)
        self.lost: str | None = None  # why the run cannot go on
        self._unread: tuple[int, dict[str, jax.Array], Batch] | None = None
        self._clock = time.monotonic()

    def put(self, step: int, values: dict[str, jax.Array], batch: Batch) -> None:
        """Takes the numbers of a step that may not have run yet, and reads those of the step before."""
        self.flush()
        self._unread = step, values, batch

    def flush(self) -> None:
        """Reads what has not been read yet."""
        if self._unread:
            unread, self._unread = self._unread, None
            self._read(*unread)

    def _read(self, step: int, values: dict[str, jax.Array], batch: Batch) -> None:
        host = {name: float(value) for name, value in jax.device_get(values).items()}
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        row = step_row(host, seconds, batch["tokens"].size)
        self._metrics.write(step, row)
        self.display.update(step, row)
        self.progress.nonfinite_in_row = int(host["nonfinite_in_row"])
        if self.progress.nonfinite_in_row:
            whole = gather(batch)
            if is_main():
                dump_batch(self._folder.nonfinite, step, host, whole, self._prepared.feed, self._prepared.tokenizer)
            if self.progress.nonfinite_in_row >= self._training.max_nonfinite:
                self.lost = self.lost or lost_report(step, host, self._folder)
            return
        median = self.progress.add_loss(host["loss"])
        if median is not None:
            rows = name_rows(self._prepared.feed, step)
            log.warning("step %d: loss %.4f stands out from %.4f, the median: %s", step, host["loss"], median, rows)

    def evaluate(self, step: int, evaluate: Callable[[], float | None]) -> bool:
        """Evaluates and writes that down, if anything is held out; returns whether it is the best loss yet."""
        loss = evaluate()
        if loss is not None:
            self._metrics.write(step, {"eval_loss": loss})
            log.info("evaluation loss after %d steps: %.4f", step, loss)
        return self.progress.add_evaluation(step, loss, self._training.early_stopping_min_delta)

    def save(self, step: int, state: TrainState, saver: Saver) -> None:
        """Saves the state, and writes down for how long that kept the training waiting."""
        seconds = saver.save(step, state, self.progress)
        if not saver.is_saving:  # it has failed at once, and said so
            return
        self._metrics.write(step, {"checkpoint_stall_seconds": seconds})
        log.info("checkpoint of step %d: training waited %.3f s for it", step, seconds)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes down what else is to be known of a step."""
        self._metrics.write(step, values)

    def restart_clock(self) -> None:
        """What was done since the last step is no part of the next one's time."""
        self._clock = time.monotonic()

    def close(self) -> None:
        """Finishes the files."""
        self._metrics.close()

    @property
    def is_exhausted(self) -> bool:
        """Whether early stopping ends the run here."""
        return self.progress.is_exhausted(self._training.early_stopping_patience)


def lost_report(step: int, values: Mapping[str, float], folder: RunFolder) -> str:
    """Why the run stops: the loss or gradient has not been finite for too long."""
    return (
        f"step {step}: loss {values['loss']} and gradient norm {values['grad_norm']} are not finite, "
        f"{int(values['nonfinite_in_row'])} steps in a row now ({int(values['num_nonfinite'])} in all); their updates "
        f"were skipped. See what it is: adaptax replay {folder.path}. Then lower optimizer.learning_rate, mend the "
        "rows, or use model.dtype=float32"
    )


def step_row(values: dict[str, float], seconds: float, tokens_per_batch: int) -> dict[str, float]:
    """A step's row in the metrics."""
    return {
        "train_loss": values["loss"],
        "train_grad_norm": values["grad_norm"],
        "train_learning_rate": values["learning_rate"],
        "train_supervised_tokens": values["num_supervised"],
        "train_tokens_per_second": values["num_supervised"] / seconds,
        "train_padding_share": 1 - values["num_tokens"] / tokens_per_batch,
        "train_nonfinite_steps": values["num_nonfinite"],
        "train_step_seconds": seconds,
    }
