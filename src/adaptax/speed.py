"""How fast a run goes: how long its steps take, what was done in them, how long devices wait for input."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

Batch = dict[str, jax.Array]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stretch:
    """Steps, what was done in them, and the time they took."""

    num_steps: int = 0
    trained_tokens: int = 0  # supervised
    nonpadding_tokens: int = 0
    total_tokens: int = 0  # with padding
    flops: float = 0.0  # of the model
    seconds: float = 0.0
    stall_seconds: float = 0.0  # of these; devices had nothing to do, as no batch had come

    def __add__(self, other: Stretch) -> Stretch:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Stretch(*(mine + theirs for mine, theirs in pairs))

    def rates(self, peak: float | None) -> dict[str, float | None]:
        """What was done per second; all None where no step was.

        Args:
          peak: floating-point operations per second of all devices together; None where it is not known.
        """
        seconds = self.seconds or float("nan")
        values = {
            "trained_tokens_per_second": self.trained_tokens / seconds,
            "nonpadding_tokens_per_second": self.nonpadding_tokens / seconds,
            "total_tokens_per_second": self.total_tokens / seconds,
            "input_stall_share": self.stall_seconds / seconds,
            "model_tflops_per_second": self.flops / seconds / 1e12,
        }
        values["mfu"] = self.flops / seconds / (peak or float("nan"))
        return {name: value if value == value else None for name, value in values.items()}


class SpeedMeter:
    """Times steps, from when the outcome of one is read to when that of the next one is, and adds them up. Close it.

    A thread waits for the end of each step: where the loop waits for a batch while a step is still running, that is no
    stall.

    Args:
      peak: floating-point operations per second of all devices together; None where it is not known.
    """

    def __init__(self, peak: float | None) -> None:
        self._peak = peak
        self._total = self._typical = Stretch()  # of this start; typical: nothing was compiled or traced
        self._lengths: set[int] = set()
        self._watcher = ThreadPoolExecutor(1, "speed")
        self._end: Future[float] | None = None  # of the last step that was begun
        self.restart()

    def feed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, from now on."""
        batches = iter(batches)
        self.restart()
        while True:
            asked = time.monotonic()
            with jax.profiler.TraceAnnotation("wait for input"):
                batch = next(batches, None)
            came = time.monotonic()
            if batch is None:
                return
            if self._end is None or self._end.done():
                idle_since = max(asked, self._end.result()) if self._end else asked
                self._stall += max(0.0, came - idle_since)
            yield batch

    def watch(self, values: Any, length: int) -> None:
        """Takes what a step that was just begun will return; a first step of its length may have been compiled for."""
        self._end = self._watcher.submit(_await_end, values)
        self._is_new |= length not in self._lengths
        self._lengths.add(length)

    def read(self, done: Stretch, *, is_traced: bool) -> dict[str, float | None]:
        """The rates of a step whose outcome has just been read.

        Args:
          done: in that step; its times are put in here.
          is_traced: whether it was slowed by being traced.
        """
        step = dataclasses.replace(done, seconds=time.monotonic() - self._began, stall_seconds=self._stall)
        self._total += step
        if not self._is_new and not is_traced:
            self._typical += step
        self.restart()
        return {"seconds": step.seconds} | step.rates(self._peak)

    def restart(self) -> None:
        """What was done since the last step was read is part of none."""
        self._began, self._stall, self._is_new = time.monotonic(), 0.0, False

    def close(self) -> None:
        """Ends the thread."""
        self._watcher.shutdown(wait=False, cancel_futures=True)

    def summarize(self) -> dict[str, Any]:
        """Totals of this start, and rates of its typical steps."""
        total = dataclasses.asdict(self._total)
        counts = {name: total[name] for name in total if name not in ("flops", "stall_seconds")}
        return counts | {"num_typical_steps": self._typical.num_steps} | self._typical.rates(self._peak)

    def tell(self) -> None:
        """The rates of the typical steps, in a line of the log."""
        if not self._typical.num_steps:
            return
        rates = {name: value or 0.0 for name, value in self._typical.rates(self._peak).items()}
        log.info(
            "speed of %d steps, first ones and traced ones left out: %s trained, %s non-padding, %s total tok/s; "
            "%.4g model TFLOP/s%s; %.1f%% of the time waiting for input",
            self._typical.num_steps,
            *(f"{rates[f'{name}_tokens_per_second']:,.0f}" for name in ("trained", "nonpadding", "total")),
            rates["model_tflops_per_second"],
            f", MFU {rates['mfu']:.1%}" if self._peak else "",
            100 * rates["input_stall_share"],
        )


def _await_end(values: Any) -> float:
    with contextlib.suppress(Exception):  # whoever reads the values meets it too
        jax.block_until_ready(values)
    return time.monotonic()
