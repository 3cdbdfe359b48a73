"""A trace of some steps, which TensorBoard and Perfetto show."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)


class Profiler:
    """Traces steps into a folder. Leave it (``with``) and a trace that is under way is finished.

    A trace that cannot be made or written is told; the run goes on.

    Args:
      steps: which; an empty range for none.
      folder: that the trace is written to; None in processes that write nothing, and keep step with the one that does.
    """

    def __init__(self, steps: range, folder: Path | None):
        self._steps, self._folder = steps, folder
        self.is_tracing = self._is_started = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def is_due(self, step: int) -> bool:
        """Whether the trace begins or ends before this step."""
        return bool(self._steps) and step in (self._steps.start, self._steps.stop)

    def turn(self, step: int) -> None:
        """Begins the trace with this step, or ends it with the one before. No step may be running."""
        if step == self._steps.stop:
            self._stop()
            return
        self.is_tracing = True
        if not self._folder:
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # its events would crowd out the others, and slow the steps
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._is_started = True
        except (OSError, RuntimeError) as error:
            log.warning("no steps are traced: %s", error)

    def _stop(self) -> None:
        is_started, self.is_tracing, self._is_started = self._is_started, False, False
        if not is_started:
            return
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("%s: the trace is not written: %s", self._folder, error)
            return
        log.info("trace of steps %d to %d written into %s", self._steps[0], self._steps[-1], self._folder)


def choose_steps(wanted: range | None, first: int, last: int) -> range:
    """The wanted steps that a start still has, of steps ``first`` to ``last``."""
    return range(max(wanted.start, first), min(wanted.stop, last + 1)) if wanted else range(0)


def describe_steps(wanted: range | None, first: int, last: int) -> None:
    """Warns where a start does not have all the wanted steps."""
    left = choose_steps(wanted, first, last)
    if not wanted or left == wanted:
        return
    key = f"training.profile={wanted.start}:{wanted.stop}"
    if left:
        log.warning("%s: of these, this start has steps %d to %d, which are traced", key, left[0], left[-1])
    elif first <= last:
        log.warning("%s: nothing is traced, as this start has steps %d to %d", key, first, last)
