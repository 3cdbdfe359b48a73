"""The plan of an epoch: rows to sequences to batches."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from adaptax.data.packing import (
    LENGTH_MULTIPLE,
    EpochPlan,
    choose_buckets,
    pack_best_fit,
    plan_buckets,
    plan_packed,
)


def lognormal_mix(num_rows: int, seed: int = 0) -> np.ndarray:
    """Lengths as of chats: exp(N(5.5, 0.9)), a median of 245 tokens, cut to 16 .. 2048."""
    return np.clip(np.random.default_rng(seed).lognormal(5.5, 0.9, num_rows), 16, 2048).astype(np.int32)


def naive_best_fit(lengths: np.ndarray, capacity: int) -> list[int]:
    """The room left in each sequence, ascending: row by row, longest first, to where the least would be left over."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - length)
    return sorted(rooms)


def rooms_left(lengths: np.ndarray, capacity: int) -> list[int]:
    """The room left in each sequence of ours, ascending; every row must be there once."""
    rows, edges = pack_best_fit(lengths, capacity)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert (edges[0], edges[-1]) == (0, len(lengths))
    assert (np.diff(edges) > 0).all()
    return sorted(capacity - int(lengths[rows[a:b]].sum()) for a, b in itertools.pairwise(edges))


# Best fit


@pytest.mark.parametrize("seed", range(8))
def test_it_is_best_fit_decreasing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        capacity = int(rng.integers(4, 70))
        longest = int(rng.integers(1, capacity + 1))
        lengths = rng.integers(1, longest + 1, rng.integers(0, 80))
        assert rooms_left(lengths, capacity) == naive_best_fit(lengths, capacity)


@pytest.mark.parametrize(
    ("lengths", "capacity", "rooms"),
    [
        ([], 8, []),
        ([8], 8, [0]),
        ([8, 8, 8], 8, [0, 0, 0]),
        ([1] * 17, 8, [0, 0, 7]),
        ([5, 3, 5, 3], 8, [0, 0]),
        ([6, 5, 3, 2], 8, [0, 0]),  # the 3 goes behind the 5, not into a sequence of its own
        ([5, 4, 3, 3, 1], 8, [0, 0]),
        ([4, 4, 4, 3, 3, 3, 3], 10, [0, 2, 4]),  # 4+4, 4+3+3, 3+3
    ],
)
def test_by_hand(lengths: list[int], capacity: int, rooms: list[int]) -> None:
    assert rooms_left(np.array(lengths, np.int64), capacity) == rooms


def test_no_sequence_is_over_its_capacity() -> None:
    lengths = lognormal_mix(20_000)
    assert min(rooms_left(lengths, 2048)) >= 0
    assert min(rooms_left(lengths, 4096)) >= 0


def test_at_least_98_percent_are_tokens() -> None:
    lengths = lognormal_mix(20_000)
    num_sequences = len(pack_best_fit(lengths, 2048)[1]) - 1
    assert lengths.sum() / (num_sequences * 2048) >= 0.98


def test_same_lengths_same_plan() -> None:
    lengths = lognormal_mix(2_000)
    first, second = pack_best_fit(lengths, 2048), pack_best_fit(lengths.copy(), 2048)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_rows_of_one_length_are_taken_in_the_order_given() -> None:
    rows, _ = pack_best_fit(np.array([3, 5, 3, 5, 3, 5]), 8)
    assert [row for row in rows.tolist() if row % 2 == 0] == [0, 2, 4]
    assert [row for row in rows.tolist() if row % 2 == 1] == [1, 3, 5]


def test_a_million_rows_in_seconds() -> None:
    lengths = lognormal_mix(1_000_000)
    started = time.monotonic()
    pack_best_fit(lengths, 2048)
    assert time.monotonic() - started < 5


# Packed epochs

ROWS = np.arange(1000, 1400)[::-1].copy()  # indices that are no places
LENGTHS = np.random.default_rng(1).integers(2, 60, len(ROWS))


def sequences_of(plan: EpochPlan) -> list[list[int]]:
    """The rows of each sequence of an epoch."""
    return [rows.tolist() for k in range(len(plan.lengths)) for rows in plan.batch(k)[0]]


def check(plan: EpochPlan, batch_size: int) -> None:
    """Every row is there once, and every batch but the last is full."""
    assert sorted(plan.rows.tolist()) == sorted(ROWS.tolist())
    assert sorted(row for sequence in sequences_of(plan) for row in sequence) == sorted(ROWS.tolist())
    sizes = [len(plan.batch(k)[0]) for k in range(len(plan.lengths))]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= batch_size
    length_of = dict(zip(ROWS.tolist(), LENGTHS.tolist(), strict=True))
    for k in range(len(plan.lengths)):
        sequences, padded = plan.batch(k)
        assert all(sum(length_of[row] for row in rows.tolist()) <= padded for rows in sequences)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_row_once_in_a_packed_epoch(batch_size: int, seed: int | None) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    plan = plan_packed(ROWS, LENGTHS, 64, batch_size, rng)
    check(plan, batch_size)
    assert plan.lengths.tolist() == [64] * len(plan.lengths)


def test_a_packed_epoch_that_is_not_shuffled_keeps_the_order_of_first_rows() -> None:
    place = {row: i for i, row in enumerate(ROWS.tolist())}
    plan = plan_packed(ROWS, LENGTHS, 64, 3, None)
    sequences = [[place[row] for row in rows] for rows in sequences_of(plan)]
    assert all(rows == sorted(rows) for rows in sequences)
    firsts = [rows[0] for rows in sequences]
    assert firsts == sorted(firsts)
    assert firsts[0] == 0


def test_a_packed_epoch_that_is_shuffled_is_in_another_order() -> None:
    kept, drawn, other = (
        plan_packed(ROWS, LENGTHS, 64, 3, rng) for rng in (None, np.random.default_rng(0), np.random.default_rng(1))
    )
    assert {frozenset(rows) for rows in sequences_of(kept)} == {frozenset(rows) for rows in sequences_of(drawn)}
    orders = [[min(rows) for rows in sequences_of(plan)] for plan in (kept, drawn, other)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_new_order_of_rows_makes_new_company() -> None:
    """Rows of one length are interchangeable: who comes first decides who goes where."""
    lengths = np.tile([20, 30, 14], 100)
    pairs = []
    for seed in range(2):
        rows = np.random.default_rng(seed).permutation(len(lengths))
        plan = plan_packed(rows, lengths[rows], 64, 4, np.random.default_rng(seed))
        pairs.append({frozenset(sequence) for sequence in sequences_of(plan)})
    assert len(pairs[0] & pairs[1]) < 10


# Epochs of one row per sequence


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
@pytest.mark.parametrize("buckets", [[64], [16, 40, 64], [8, 16, 24, 32, 40, 48, 56, 64], [16, 64, 512]])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_row_once_in_buckets(batch_size: int, buckets: list[int], seed: int | None) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    plan = plan_buckets(ROWS, LENGTHS, np.array(buckets), batch_size, rng)
    check(plan, batch_size)
    assert all(len(rows) == 1 for rows in sequences_of(plan))
    assert set(plan.lengths.tolist()) <= set(buckets)


def test_rows_of_like_length_are_in_a_batch() -> None:
    """All but what a bucket could not fill: less than one batch of each bucket is in a longer one."""
    buckets = np.array([16, 40, 64])
    plan = plan_buckets(ROWS, LENGTHS, buckets, 8, np.random.default_rng(0))
    length_of = dict(zip(ROWS.tolist(), LENGTHS.tolist(), strict=True))
    moved = 0
    for k in range(len(plan.lengths)):
        sequences, padded = plan.batch(k)
        moved += sum(int(buckets[np.searchsorted(buckets, length_of[int(rows[0])])]) < padded for rows in sequences)
    assert moved < 2 * 8


def test_a_last_batch_is_no_longer_than_it_must_be() -> None:
    lengths = np.array([5, 5, 60, 60])
    plan = plan_buckets(np.arange(4), lengths, np.array([8, 64]), 3, None)
    assert [plan.batch(k)[1] for k in range(2)] == [64, 64]
    plan = plan_buckets(np.arange(4), np.array([60, 60, 60, 5]), np.array([8, 64]), 3, None)
    assert sorted(plan.batch(0)[0][i][0] for i in range(3)) == [0, 1, 3]  # the 5 first, then what comes first
    plan = plan_buckets(np.arange(2), np.array([5, 5]), np.array([8, 64]), 3, None)
    assert plan.lengths.tolist() == [8]


@pytest.mark.parametrize("buckets", [[64], [16, 40, 64]])
def test_buckets_that_are_not_shuffled_come_by_their_first_rows(buckets: list[int]) -> None:
    place = {row: i for i, row in enumerate(ROWS.tolist())}
    plan = plan_buckets(ROWS, LENGTHS, np.array(buckets), 8, None)
    firsts = [min(place[int(rows[0])] for rows in plan.batch(k)[0]) for k in range(len(plan.lengths) - 1)]
    assert firsts == sorted(firsts)
    if len(buckets) == 1:
        assert plan.rows.tolist() == ROWS.tolist()


def test_one_bucket_keeps_the_order_given_as_it_is_shuffled_already() -> None:
    plan = plan_buckets(ROWS, LENGTHS, np.array([64]), 8, np.random.default_rng(0))
    assert plan.rows.tolist() == ROWS.tolist()


def test_buckets_that_are_shuffled_do_not_come_by_length() -> None:
    plan = plan_buckets(ROWS, LENGTHS, np.array([16, 40, 64]), 8, np.random.default_rng(0))
    changes = np.count_nonzero(np.diff(plan.lengths))
    assert changes > 5
    other = plan_buckets(ROWS, LENGTHS, np.array([16, 40, 64]), 8, np.random.default_rng(1))
    assert plan.lengths.tolist() != other.lengths.tolist()


# Which lengths


def padded_tokens(lengths: np.ndarray, buckets: np.ndarray) -> int:
    """Tokens of all rows, each padded to its bucket."""
    return int(buckets[np.searchsorted(buckets, lengths)].sum())


def least_padded_tokens(lengths: np.ndarray, num_buckets: int) -> int:
    """By trying every choice."""
    places = np.unique(-(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    most = min(num_buckets, len(places))
    choices = (c for n in range(most) for c in itertools.combinations(places[:-1].tolist(), n))
    return min(padded_tokens(lengths, np.array([*choice, places[-1]])) for choice in choices)


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 4, 16])
def test_no_choice_of_lengths_pads_less(num_buckets: int) -> None:
    rng = np.random.default_rng(num_buckets)
    for _ in range(30):
        lengths = rng.integers(1, rng.integers(2, 90), rng.integers(1, 50))
        buckets = choose_buckets(lengths, num_buckets)
        assert len(buckets) <= num_buckets
        assert (np.diff(buckets) > 0).all()
        assert not (buckets % LENGTH_MULTIPLE).any()
        assert lengths.max() <= buckets[-1] < lengths.max() + LENGTH_MULTIPLE
        assert padded_tokens(lengths, buckets) == least_padded_tokens(lengths, num_buckets)


def test_of_very_long_rows_the_choice_is_near_the_best() -> None:
    """There the candidates are every 1/128 of the longest."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        lengths = rng.choice(rng.integers(1, 30_000, 10), 200)
        buckets = choose_buckets(lengths, 4)
        assert len(buckets) <= 4
        assert lengths.max() <= buckets[-1] < lengths.max() + LENGTH_MULTIPLE
        step = lengths.max() / 128 + LENGTH_MULTIPLE
        assert padded_tokens(lengths, buckets) <= least_padded_tokens(lengths, 4) + step * len(lengths)


def test_no_more_lengths_than_help() -> None:
    assert choose_buckets(np.array([8, 8, 3, 7]), 4).tolist() == [8]
    assert choose_buckets(np.array([8, 8, 30]), 4).tolist() == [8, 32]


def test_lengths_of_a_million_rows_in_seconds() -> None:
    lengths = lognormal_mix(1_000_000)
    started = time.monotonic()
    choose_buckets(lengths, 16)
    assert time.monotonic() - started < 5
