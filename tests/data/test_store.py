"""Tokens in flat arrays: what goes in comes out, of memory and of files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from adaptax.data.chat import Example
from adaptax.data.store import (
    FIELDS,
    MAX_LISTED,
    Counts,
    Examples,
    StoreWriter,
    TokenStore,
    digest_of,
    map_arrays,
    pack_examples,
)


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Rows of 2 to 20 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 21, count)
    return [Example(rng.integers(0, 262_144, n, dtype=np.int32), rng.random(n) < 0.5) for n in lengths]


def assert_equal(examples: Examples, expected: list[Example]) -> None:
    """The same rows in the same order."""
    assert len(examples) == len(expected)
    for ours, theirs in zip(examples, expected, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.is_trained, theirs.is_trained)


@pytest.mark.parametrize("is_on_disk", [False, True])
@pytest.mark.parametrize("sizes", [(), (0,), (7,), (3, 0, 5)])
def test_what_is_written_is_read(tmp_path: Path, is_on_disk: bool, sizes: tuple[int, ...]) -> None:
    writer = StoreWriter(tmp_path if is_on_disk else None)
    expected: list[Example] = []
    for seed, size in enumerate(sizes):
        part = make_examples(size, seed)
        start = len(expected) + 11
        writer.append(pack_examples(part, range(start, start + size), [digest_of(e.tokens) for e in part]))
        expected += part
    arrays = writer.finish()
    assert {name: array.dtype for name, array in arrays.items()} == {n: np.dtype(t) for n, t in FIELDS.items()}
    examples = Examples([TokenStore("rows", "text", arrays, Counts())])
    assert_equal(examples, expected)
    assert examples.lengths.tolist() == [len(e.tokens) for e in expected]
    assert examples.supervised.tolist() == [int(e.is_trained.sum()) for e in expected]
    assert examples.digests.tolist() == [digest_of(e.tokens) for e in expected]
    assert [examples.place(i) for i in range(len(examples))] == [f"rows row {i + 11}" for i in range(len(expected))]


def test_files_are_mapped_not_read(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    part = make_examples(50)
    writer.append(pack_examples(part, range(50), [0] * 50))
    arrays = writer.finish()
    for again in (arrays, map_arrays(tmp_path)):
        assert all(isinstance(array.base, np.memmap) for array in again.values())
        assert not any(array.flags.writeable for array in again.values())
    row = Examples([TokenStore("rows", "text", arrays, Counts())]).arrays_of(3)[0]
    assert np.shares_memory(row, arrays["tokens"])  # a row is a view, no copy


def test_rows_of_several_stores_by_one_index() -> None:
    groups = [make_examples(count, seed) for seed, count in enumerate((4, 0, 1, 6))]
    stores = [TokenStore.of(f"file{i}", "text", group, Counts()) for i, group in enumerate(groups)]
    flat = [example for group in groups for example in group]
    examples = Examples(stores)
    assert_equal(examples, flat)
    assert [examples.place(i) for i in (0, 3, 4, 5, 10)] == [
        "file0 row 1",
        "file0 row 4",
        "file2 row 1",
        "file3 row 1",
        "file3 row 6",
    ]


def test_chosen_rows_in_the_order_chosen() -> None:
    groups = [make_examples(5, 0), make_examples(5, 1)]
    flat = groups[0] + groups[1]
    examples = Examples([TokenStore.of("f", "text", group, Counts()) for group in groups])
    chosen = examples.select(np.array([9, 0, 4, 5]))
    assert_equal(chosen, [flat[i] for i in (9, 0, 4, 5)])
    assert chosen.lengths.tolist() == [len(flat[i].tokens) for i in (9, 0, 4, 5)]
    assert chosen.digests.tolist() == [digest_of(flat[i].tokens) for i in (9, 0, 4, 5)]
    assert_equal(chosen.select(np.array([2, 0])), [flat[4], flat[9]])
    assert_equal(examples[3:7], flat[3:7])
    assert_equal(examples[:0], [])
    np.testing.assert_array_equal(examples[-1].tokens, flat[-1].tokens)


def test_no_stores() -> None:
    examples = Examples([])
    assert (len(examples), examples.lengths.tolist(), list(examples)) == (0, [], [])


def test_digests_tell_rows_apart() -> None:
    tokens = [np.array(t, np.int32) for t in ([1, 2], [2, 1], [1, 2, 0], [1], [1, 2])]
    digests = [digest_of(t) for t in tokens]
    assert len(set(digests)) == 4
    assert digests[0] == digests[4]
    assert all(0 <= digest < 2**64 for digest in digests)


def test_counts_add_up() -> None:
    names = [item.name for item in dataclasses.fields(Counts) if item.name != "listed"]
    total = Counts(**{name: i for i, name in enumerate(names)}, listed=["a"])
    total.add(Counts(**{name: 100 for name in names}, listed=["b"]))
    assert {name: getattr(total, name) for name in names} == {name: 100 + i for i, name in enumerate(names)}
    assert total.listed == ["a", "b"]


def test_only_the_first_bad_rows_stay_listed() -> None:
    total, further = Counts(listed=["0"]), Counts(listed=[str(i) for i in range(1, 30)])
    total.add(further)
    total.add(further)
    assert total.listed == [str(i) for i in range(MAX_LISTED)]
    assert len(further.listed) == 29
