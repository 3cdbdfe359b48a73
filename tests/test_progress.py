"""What a run remembers of its losses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Iterable

import pytest

from adaptax.progress import MIN_WINDOW, SPIKE_NATS, WINDOW, Progress

NAN, INF = math.nan, math.inf


def feed(losses: Iterable[float], progress: Progress | None = None) -> tuple[Progress, list[float | None]]:
    """(progress, what each loss was told to be)."""
    progress = progress or Progress()
    return progress, [progress.add_loss(loss) for loss in losses]


def evaluate(losses: Iterable[float | None], min_delta: float = 0.0, first: int = 1) -> tuple[Progress, list[bool]]:
    """(progress, which evaluations were the best yet)."""
    progress = Progress()
    return progress, [progress.add_evaluation(step, loss, min_delta) for step, loss in enumerate(losses, first)]


# Windows and spikes


def test_the_window_holds_the_last_finite_losses() -> None:
    progress, _ = feed([NAN, *map(float, range(2 * WINDOW)), INF, -INF])
    assert progress.losses == list(map(float, range(WINDOW, 2 * WINDOW)))
    assert progress.train_loss == 2 * WINDOW - 1


def test_a_constant_loss_has_no_spikes_and_a_spike_tells_the_median() -> None:
    progress, told = feed([2.0] * 3 * WINDOW)
    assert not any(told)
    assert progress.add_loss(2.0 + SPIKE_NATS) is None
    assert progress.add_loss(2.01 + SPIKE_NATS) == 2.0


@pytest.mark.parametrize("seed", range(20))
def test_noise_has_no_spikes_and_a_spike_in_it_is_told(seed: int) -> None:
    rng = random.Random(seed)
    progress, told = feed(rng.gauss(3.0, 0.3) for _ in range(1000))
    assert not any(told)
    assert progress.add_loss(9.0) == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize("seed", range(20))
def test_falling_losses_have_no_spikes(seed: int) -> None:
    rng = random.Random(seed)
    slow = [8 * math.exp(-step / 300) + rng.gauss(0, 0.1) for step in range(1000)]
    sudden = [9.0] * 30 + [1.0] * 30 + [0.1] * 30
    assert not any(feed(slow)[1] + feed(sudden)[1])


def test_no_spike_is_told_before_there_is_a_window() -> None:
    _, told = feed([1.0] * (MIN_WINDOW - 1) + [100.0] + [100.0])
    assert told == [None] * MIN_WINDOW + [1.0]


def test_losses_that_are_not_finite_are_no_spikes_and_change_nothing() -> None:
    progress, _ = feed([1.0] * 30)
    before = dataclasses.asdict(progress)
    assert feed([NAN, INF, -INF], progress)[1] == [None] * 3
    assert dataclasses.asdict(progress) == before


def test_a_lasting_rise_is_told_until_it_is_what_is_usual() -> None:
    _, told = feed([1.0] * WINDOW + [5.0] * WINDOW)
    assert all(told[WINDOW : WINDOW + WINDOW // 2])
    assert not any(told[WINDOW + WINDOW // 2 + 1 :])


# The best evaluation


def test_the_lowest_loss_is_the_best_and_of_equal_ones_the_first() -> None:
    progress, best = evaluate([3.0, 2.0, 2.0, 2.5, 1.0, 1.0])
    assert best == [True, True, False, False, True, False]
    assert (progress.best_step, progress.best_loss) == (5, 1.0)
    assert (progress.eval_step, progress.eval_loss) == (6, 1.0)


@pytest.mark.parametrize("bad", [NAN, INF, None])
def test_a_loss_that_is_no_number_is_never_the_best(bad: float | None) -> None:
    progress, best = evaluate([bad, 2.0, bad])
    assert best == [False, True, False]
    assert (progress.best_step, progress.best_loss) == (2, 2.0)


def test_a_loss_of_minus_infinity_is_not_the_best_either() -> None:
    assert evaluate([2.0, -INF])[1] == [True, False]


def test_step_0_is_never_the_best_nor_what_early_stopping_compares_with() -> None:
    progress, best = evaluate([0.5, 2.0, 3.0], first=0)
    assert best == [False, True, False]
    assert (progress.best_step, progress.reference_loss, progress.num_worse) == (1, 2.0, 1)


def test_the_final_loss_is_that_of_the_last_evaluation_or_of_training() -> None:
    progress = Progress()
    assert math.isnan(progress.final_loss)
    feed([2.0, 1.5, NAN], progress)
    assert progress.final_loss == 1.5
    progress.add_evaluation(3, 1.75, 0.0)
    assert progress.final_loss == 1.75
    progress.add_evaluation(4, NAN, 0.0)
    assert math.isnan(progress.final_loss)


# Early stopping


def test_patience_counts_evaluations_in_a_row_that_are_not_better() -> None:
    progress, exhausted = Progress(), []
    for step, loss in enumerate([3.0, 2.0, 2.1, 2.0, 1.9, 1.9, NAN, 2.0], 1):
        progress.add_evaluation(step, loss, 0.0)
        exhausted.append(progress.is_exhausted(3))
    assert exhausted == [False] * 7 + [True]
    assert progress.is_exhausted(1)
    assert not progress.is_exhausted(None)


def test_small_gains_add_up_but_one_below_the_minimum_is_no_gain() -> None:
    """The reference is the last loss that was better by the minimum, not the best one."""
    gains = [3.0, 2.96, 2.92, 2.88, 2.84]
    progress, best = evaluate(gains, min_delta=0.1)
    assert best == [True] * 5
    assert (progress.reference_loss, progress.num_worse) == (2.88, 1)
    assert evaluate([3.0, 2.9], min_delta=0.1)[0].num_worse == 1  # exactly the minimum
    assert evaluate([3.0, 2.89], min_delta=0.1)[0].num_worse == 0


def test_evaluations_without_a_number_use_up_patience_and_nothing_held_out_does_not() -> None:
    assert evaluate([NAN, NAN, INF])[0].is_exhausted(3)
    assert not evaluate([None] * 9)[0].is_exhausted(1)


# What a checkpoint keeps of it


@pytest.mark.parametrize("stop", [0, 1, 7, 30, 77])
def test_a_progress_that_went_through_json_goes_on_as_if_it_had_not(stop: int) -> None:
    rng = random.Random(stop)
    events = [rng.choice([rng.gauss(2, 0.1), rng.gauss(2, 0.1), NAN, 9.0]) for _ in range(120)]

    def take(progress: Progress, part: Iterable[tuple[int, float]]) -> list[object]:
        return [(progress.add_loss(e), i % 5 == 0 and progress.add_evaluation(i, e, 0.01)) for i, e in part]

    straight = Progress()
    whole = take(straight, enumerate(events))
    first = Progress()
    seen = take(first, itertools.islice(enumerate(events), stop))
    second = Progress(**json.loads(json.dumps(first.as_dict())))
    assert repr(second) == repr(first)  # NaN is not itself
    seen += take(second, itertools.islice(enumerate(events), stop, None))
    assert (seen, repr(second)) == (whole, repr(straight))
