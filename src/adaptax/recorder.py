"""What is written down of every step and evaluation, and what is noticed on the way: spikes, steps without a number."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from adaptax.checkpoint import Saver, gather
from adaptax.config import profiled_steps
from adaptax.devices import peak_flops
from adaptax.evaluate import Sample
from adaptax.faults import dump_batch, name_rows
from adaptax.flops import Counts, step_flops
from adaptax.job import Job
from adaptax.lora import Arrays
from adaptax.memory import tell_measured_peak
from adaptax.metrics import MetricsLog, ProgressDisplay
from adaptax.prepare import Prepared, is_main
from adaptax.profiler import Profiler, choose_steps, describe_steps
from adaptax.progress import Progress
from adaptax.run_folder import RunFolder
from adaptax.speed import SpeedMeter, Stretch
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
      sample: answers of adapters that are shown at every evaluation.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        earlier: Sequence[Mapping[str, Any]],
        progress: Progress,
        sample: Callable[[Arrays], Sequence[Sample]] = lambda adapters: (),
    ):
        self._prepared, self._folder, self.progress, self._sample = prepared, folder, progress, sample
        job, is_shown = prepared.job, is_main()
        self._training = job.config.training
        self._metrics = MetricsLog(folder.path if is_shown else None, job.config.logging, earlier)
        self.display = ProgressDisplay(job.config.logging, job.num_steps, is_shown)
        self._footprint = prepared.footprint
        self.lost: str | None = None  # why the run cannot go on
        self._unread: tuple[int, dict[str, Any], Batch] | None = None
        self.speed = SpeedMeter(find_peak(job, str(job.dtype)))
        self._profiler = Profiler(range(0), None)

    @contextlib.contextmanager
    def show(self, first: int, last: int) -> Iterator[None]:
        """Shows and traces steps ``first`` to ``last`` while it is entered."""
        wanted = profiled_steps(self._training)
        if is_main():
            describe_steps(wanted, first, last)
        self._profiler = Profiler(choose_steps(wanted, first, last), self._folder.profile if is_main() else None)
        with self.display, self._profiler:
            yield

    def mark(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Names a step in a trace, which begins or ends here where it is due."""
        if self._profiler.is_due(step):
            self.flush()
            self._profiler.turn(step)
            self.speed.restart()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def put(self, step: int, values: dict[str, Any], batch: Batch) -> None:
        """Takes the numbers of a step that may not have run yet, and reads those of the step before."""
        self.speed.watch(values, batch["tokens"].shape[-1])
        self.flush()
        self._unread = step, values, batch

    def flush(self) -> None:
        """Reads what has not been read yet."""
        if self._unread:
            unread, self._unread = self._unread, None
            self._read(*unread)

    def _read(self, step: int, values: dict[str, Any], batch: Batch) -> None:
        values = jax.device_get(values)
        pairs = values.pop("pairs")
        host = {name: float(value) for name, value in values.items()}
        done = self._count(host, pairs, batch["tokens"].size)
        row = step_row(host, done, self.speed.read(done, is_traced=self._profiler.is_tracing))
        self._metrics.write(step, row)
        if self._footprint:  # told once
            tell_measured_peak(self._footprint, self._prepared.job.mesh)
            self._footprint = None
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

    def _count(self, host: Mapping[str, float], pairs: Any, num_places: int) -> Stretch:
        """What was done in a step."""
        job, windows = self._prepared.job, self._prepared.steps.program.windows
        num_pairs = {window: 256 * int(high) + int(low) for window, (high, low) in zip(windows, pairs, strict=True)}
        counts = Counts(int(host["num_tokens"]), int(host["num_supervised"]), num_pairs)
        flops = step_flops(job.family, job.arch, job.spec, counts)
        return Stretch(1, int(counts.num_supervised), int(counts.num_tokens), num_places, flops)

    def evaluate(self, step: int, adapters: Arrays, evaluate: Callable[[Arrays], float | None]) -> bool:
        """Evaluates and writes that down, if anything is held out; returns whether it is the best loss yet."""
        loss = evaluate(adapters)
        for i, sample in enumerate(self._sample(adapters)):
            self._metrics.write_text(step, f"sample/{i}", sample.describe())
            log.info("after %d steps: %s", step, sample.describe())
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

    def close(self) -> None:
        """Finishes the files."""
        self.speed.close()
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


def find_peak(job: Job, dtype: str) -> float | None:
    """Operations per second that the run's devices can do at best, all together; says so where that is not known."""
    kind, tflops = job.mesh.devices.flat[0].device_kind, job.config.logging.peak_tflops
    peak = tflops * 1e12 if tflops else peak_flops(kind, dtype)
    if peak is None:
        log.info("no MFU: the peak of %r in %s is not known; logging.peak_tflops sets it", kind, dtype)
        return None
    return peak * job.mesh.size


def step_row(
    values: Mapping[str, float], done: Stretch, rates: Mapping[str, float | None]
) -> dict[str, float | int | None]:
    """A step's row in the metrics: what it gave, what was done in it, and how fast."""
    return {
        "train_loss": values["loss"],
        "train_grad_norm": values["grad_norm"],
        "train_learning_rate": values["learning_rate"],
        "train_supervised_tokens": values["num_supervised"],
        "train_padding_share": 1 - done.nonpadding_tokens / done.total_tokens,
        "train_nonfinite_steps": values["num_nonfinite"],
        "train_step_seconds": rates["seconds"],
        "train_tokens_per_second": rates["trained_tokens_per_second"],
        "train_nonpadding_tokens_per_second": rates["nonpadding_tokens_per_second"],
        "train_total_tokens_per_second": rates["total_tokens_per_second"],
        "train_input_stall_share": rates["input_stall_share"],
        "train_model_tflops_per_second": rates["model_tflops_per_second"],
        "train_mfu": rates["mfu"],
    }
