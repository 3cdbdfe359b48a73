"""How fast a run goes: what counts as waiting for input, and what the rates are made of."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from adaptax.speed import SpeedMeter, Stretch

STEP = Stretch(num_steps=1, trained_tokens=100, nonpadding_tokens=300, total_tokens=400, flops=1e9)
WAIT = 0.1


class Running:
    """What a step returns that ends when it is told to."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def block_until_ready(self) -> None:
        self.ended.wait()


@pytest.fixture
def meter() -> Iterator[SpeedMeter]:
    meter = SpeedMeter(peak=1e12)
    yield meter
    meter.close()


def take(meter: SpeedMeter, *batches: Any) -> None:
    """Waits for batches; one that is callable is called when it is asked for, and comes after a while."""

    def come() -> Iterator[Any]:
        for batch in batches:
            if callable(batch):
                batch()
                time.sleep(WAIT)
            yield batch

    for _ in meter.feed(come()):
        pass


def read(meter: SpeedMeter) -> tuple[float, float]:
    """(seconds of a step, of which devices waited)."""
    rates = meter.read(STEP, is_traced=False)
    seconds, share = rates["seconds"], rates["input_stall_share"]
    assert seconds is not None
    assert share is not None
    return seconds, seconds * share


def test_waiting_with_nothing_to_do_is_a_stall(meter: SpeedMeter) -> None:
    take(meter, lambda: None, "at once", lambda: None)
    seconds, stall = read(meter)
    assert 2 * WAIT <= stall <= seconds


def test_waiting_while_a_step_runs_is_none(meter: SpeedMeter) -> None:
    step = Running()
    meter.watch(step, 8)
    take(meter, lambda: None)
    step.ended.set()
    seconds, stall = read(meter)
    assert seconds >= WAIT
    assert stall == 0


def test_of_a_wait_that_outlasts_a_step_the_rest_is_one(meter: SpeedMeter) -> None:
    step = Running()
    meter.watch(step, 8)

    def run_on() -> None:
        time.sleep(WAIT)
        step.ended.set()

    take(meter, run_on)
    seconds, stall = read(meter)
    assert 0 < stall <= seconds - WAIT


def test_what_is_done_between_steps_counts_for_none(meter: SpeedMeter) -> None:
    time.sleep(WAIT)
    meter.restart()
    seconds, stall = read(meter)
    assert seconds < WAIT
    assert stall == 0


def test_rates_of_a_step(meter: SpeedMeter) -> None:
    rates = meter.read(STEP, is_traced=False)
    seconds = rates["seconds"]
    assert seconds
    assert rates["trained_tokens_per_second"] == pytest.approx(100 / seconds)
    assert rates["nonpadding_tokens_per_second"] == pytest.approx(300 / seconds)
    assert rates["total_tokens_per_second"] == pytest.approx(400 / seconds)
    assert rates["model_tflops_per_second"] == pytest.approx(1e-3 / seconds)
    assert rates["mfu"] == pytest.approx(1e-3 / seconds)  # of 10^12


def test_means_leave_out_steps_that_were_compiled_for_or_traced(
    meter: SpeedMeter, caplog: pytest.LogCaptureFixture
) -> None:
    assert meter.summarize()["trained_tokens_per_second"] is None
    seconds = []
    for length, is_traced in ((8, False), (8, False), (16, False), (8, False), (16, True)):
        meter.watch((), length)
        time.sleep(0.01)
        seconds.append(meter.read(STEP, is_traced=is_traced)["seconds"])
    summary = meter.summarize()
    assert (summary["num_steps"], summary["num_typical_steps"], summary["total_tokens"]) == (5, 2, 2000)
    assert summary["seconds"] == pytest.approx(sum(seconds))
    assert summary["trained_tokens_per_second"] == pytest.approx(200 / (seconds[1] + seconds[3]))
    with caplog.at_level(logging.INFO, "adaptax"):
        meter.tell()
    assert "speed of 2 steps" in caplog.text
    assert f"{summary['trained_tokens_per_second']:,.0f} trained" in caplog.text
    assert f"MFU {summary['mfu']:.1%}" in caplog.text


def test_without_a_peak_there_is_no_mfu(caplog: pytest.LogCaptureFixture) -> None:
    meter = SpeedMeter(peak=None)
    for _ in range(2):
        meter.watch((), 8)
        rates = meter.read(STEP, is_traced=False)
    with caplog.at_level(logging.INFO, "adaptax"):
        meter.tell()
    meter.close()
    assert rates["mfu"] is None
    assert meter.summarize()["mfu"] is None
    assert rates["model_tflops_per_second"]
    assert "TFLOP/s; " in caplog.text
    assert "MFU" not in caplog.text
