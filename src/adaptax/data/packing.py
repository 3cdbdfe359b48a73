"""Which rows share a sequence, and which sequences a batch: the plan of an epoch, made from (seed, epoch) alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LENGTH_MULTIPLE = 8  # sequences are padded to a multiple of it
MAX_CANDIDATES = 128  # lengths that buckets are chosen from


@dataclass(frozen=True)
class EpochPlan:
    """Rows of an epoch: in order, cut into sequences, which are cut into batches, each padded to one length."""

    rows: np.ndarray  # [rows] index of each row
    sequences: np.ndarray  # [sequences + 1] where in rows each begins
    batches: np.ndarray  # [batches + 1] where in sequences each begins
    lengths: np.ndarray  # [batches] tokens of a sequence, padding included

    def batch(self, k: int) -> tuple[list[np.ndarray], int]:
        """(rows of each of its sequences, padded length) of batch k."""
        edges = self.sequences[self.batches[k] : self.batches[k + 1] + 1]
        return [self.rows[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)], int(self.lengths[k])


def pack_best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing: each row, longest first, goes where the least room is left over.

    Rows of one length are placed together, so the work depends on the number of lengths, not of rows. They are
    interchangeable, and taken in the order given.

    Args:
      lengths: tokens of each row, at most ``capacity``.
      capacity: tokens of a sequence.

    Returns:
      (rows in order, where in them each sequence begins and the last one ends).
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, first, counts = np.unique(-lengths[order], return_index=True, return_counts=True)
    groups: dict[int, list[tuple[int, tuple[tuple[int, int], ...]]]] = {}  # room left -> (sequences, what is in them)
    has_room = np.zeros(capacity + 1, bool)
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        while count:
            room = size + int(has_room[size:].argmax())
            if has_room[room]:
                num, content = groups[room].pop()
                has_room[room] = bool(groups[room])
            else:
                room, num, content = capacity, count, ()
            copies = room // size  # the room behind one is the least that another of its kind fits in
            full, rest = min(num, count // copies), 0
            if full < num and count - full * copies:
                rest = min(copies, count - full * copies)
            untouched = num - full - (rest > 0)
            if not content and room == capacity:
                untouched = 0  # new sequences are made as they are needed
            for many, inside in ((full, copies), (1 if rest else 0, rest), (untouched, 0)):
                if many:
                    left = room - inside * size
                    groups.setdefault(left, []).append((many, (*content, (size, inside)) if inside else content))
                    has_room[left] = True
            count -= full * copies + rest
    start_of = dict(zip((-sizes).tolist(), first.tolist(), strict=True))
    return _fill(groups, order, start_of, len(lengths))


def _fill(
    groups: dict[int, list[tuple[int, tuple[tuple[int, int], ...]]]],
    order: np.ndarray,
    next_of: dict[int, int],
    num_rows: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Puts rows into the sequences that were planned by length."""
    rows, ends = [np.zeros(0, np.int64)], []
    for _, members in sorted(groups.items()):
        for num, content in members:
            columns = []
            for size, copies in content:
                start = next_of[size]
                next_of[size] = start + num * copies
                columns.append(order[start : next_of[size]].reshape(num, copies))
            table = np.concatenate(columns, axis=1)
            rows.append(table.reshape(-1))
            ends.append(np.full(num, table.shape[1]))
    placed = np.concatenate(rows)
    assert len(placed) == num_rows
    return placed, np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *ends]))]).astype(np.int64)


def plan_packed(
    rows: np.ndarray, lengths: np.ndarray, capacity: int, batch_size: int, rng: np.random.Generator | None
) -> EpochPlan:
    """An epoch of packed sequences.

    Args:
      rows: index of each row of the epoch, in its order.
      lengths: tokens of each of them.
      capacity: tokens of a sequence.
      batch_size: sequences of a batch; the last batch has what is left.
      rng: draws the order of the sequences; None keeps that of their first rows.
    """
    placed, edges = pack_best_fit(lengths, capacity)
    sizes = np.diff(edges)
    if rng is None:
        placed = placed[np.lexsort((placed, np.repeat(np.arange(len(sizes)), sizes)))]
        order = np.argsort(placed[edges[:-1]], kind="stable")
    else:
        order = rng.permutation(len(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes[order])])
    within = np.arange(len(placed)) - np.repeat(starts[:-1], sizes[order])
    placed = placed[np.repeat(edges[:-1][order], sizes[order]) + within]
    batches = np.append(np.arange(0, len(sizes), batch_size), len(sizes))
    return EpochPlan(rows[placed], starts, batches, np.full(len(batches) - 1, capacity))


def plan_buckets(
    rows: np.ndarray, lengths: np.ndarray, buckets: np.ndarray, batch_size: int, rng: np.random.Generator | None
) -> EpochPlan:
    """An epoch of one row per sequence, rows of like length in a batch.

    What does not fill a batch of its bucket goes to the next longer one, so only the last batch may have rows missing.

    Args:
      rows: index of each row of the epoch, in its order.
      lengths: tokens of each of them.
      buckets: padded lengths, ascending, the last at least as long as every row.
      batch_size: rows of a batch.
      rng: draws the order of the batches; None keeps that of their first rows.
    """
    bucket_of = np.searchsorted(buckets, lengths)
    order: list[np.ndarray] = []
    padded: list[int] = []
    left = np.zeros(0, np.int64)
    for bucket, length in enumerate(buckets.tolist()):
        members = np.concatenate([left, np.flatnonzero(bucket_of == bucket)])
        num_full = len(members) // batch_size
        order += np.split(members[: num_full * batch_size], num_full) if num_full else []
        padded += [length] * num_full
        left = members[num_full * batch_size :]
    firsts = np.array([members.min() for members in order], np.int64)
    shuffled = np.argsort(firsts, kind="stable") if rng is None or len(buckets) == 1 else rng.permutation(len(order))
    order, padded = [order[i] for i in shuffled], [padded[i] for i in shuffled]
    if len(left):
        order, padded = [*order, left], [*padded, int(buckets[np.searchsorted(buckets, lengths[left].max())])]
    placed = np.concatenate([np.zeros(0, np.int64), *order])
    batches = np.concatenate([[0], np.cumsum([len(members) for members in order])]).astype(np.int64)
    return EpochPlan(rows[placed], np.arange(len(placed) + 1), batches, np.array(padded, np.int64))


def pad_length(length: int) -> int:
    """The length of a padded sequence that holds so many tokens."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def choose_buckets(lengths: np.ndarray, num_buckets: int) -> np.ndarray:
    """At most so many padded lengths, ascending, that leave the least padding."""
    padded = -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    longest = int(padded.max())
    step = max(1, -(-(longest // LENGTH_MULTIPLE) // MAX_CANDIDATES)) * LENGTH_MULTIPLE
    places, counts = np.unique(-(-padded // step) * step, return_counts=True)
    places[-1] = longest
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[k][j]: least padded tokens of the rows up to place j with k + 1 buckets, the last of which is place j
    cost = [places * below[1:]]
    came: list[np.ndarray] = []
    for _ in range(min(num_buckets, len(places)) - 1):
        table = np.full((len(places), len(places)), np.iinfo(np.int64).max)
        for j in range(1, len(places)):
            table[j, :j] = cost[-1][:j] + places[j] * (below[j + 1] - below[1 : j + 1])
        came.append(table.argmin(axis=1))
        cost.append(np.minimum(table.min(axis=1), cost[-1]))
        came[-1] = np.where(cost[-1] < cost[-2], came[-1], -1)
    chosen, j = [len(places) - 1], len(places) - 1
    for back in reversed(came):
        if back[j] >= 0:
            j = int(back[j])
            chosen.append(j)
    return places[sorted(chosen)].astype(np.int64)
