"""Tokens of many rows side by side in flat arrays, in memory or mapped from files."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaptax.data.chat import Example

# One entry per token, then one per row. Tokens of row i are those before which lengths[:i] tokens stand.
FIELDS: dict[str, Any] = {
    "tokens": np.int32,
    "trained": np.bool_,  # the token is a target
    "lengths": np.int32,
    "supervised": np.int32,  # trained tokens of the row
    "rows": np.int64,  # number in its file, counted from 1
    "digests": np.uint64,  # of the row's tokens
}
MAX_LISTED = 10
Arrays = Mapping[str, np.ndarray]


@dataclass
class Counts:
    """What became of the rows of a source."""

    rows: int = 0  # read
    filtered: int = 0  # left out by data.filter
    bad: int = 0  # could not be used, and data.on_bad_row=skip
    short: int = 0  # under data.min_length
    truncated: int = 0  # cut to data.max_length
    split: int = 0  # made into several sequences
    dropped: int = 0  # over data.max_length, and left out
    untrained: int = 0  # with nothing to train
    special: int = 0  # spell a special token out
    chats: int = 0  # kept conversations
    terminators: int = 0  # ends of turns that are trained
    listed: list[str] = field(default_factory=list)  # the first bad rows

    def add(self, other: Counts) -> None:
        """Adds the counts of further rows."""
        for item in dataclasses.fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        del self.listed[MAX_LISTED:]


@dataclass(frozen=True)
class TokenStore:
    """The rows of one file as tokens."""

    name: str
    format: str
    arrays: Arrays
    counts: Counts

    @classmethod
    def of(
        cls, name: str, form: str, examples: Sequence[Example], counts: Counts, rows: Sequence[int] | None = None
    ) -> TokenStore:
        """Examples that are in memory already; ``rows`` are their numbers in the file, else counted."""
        digests = [digest_of(example.tokens) for example in examples]
        return cls(name, form, pack_examples(examples, rows or range(1, len(examples) + 1), digests), counts)

    def __len__(self) -> int:
        return len(self.arrays["lengths"])

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where in the tokens each row begins, and the last one ends."""
        return np.concatenate([[0], np.cumsum(self.arrays["lengths"], dtype=np.int64)])


class StoreWriter:
    """Collects arrays of rows in memory, or in files of a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in FIELDS} if folder else {}

    def append(self, arrays: Arrays) -> None:
        """The arrays of further rows."""
        for name, array in arrays.items():
            if self._files:
                array.tofile(self._files[name])
            else:
                self._parts[name].append(array)

    def finish(self) -> dict[str, np.ndarray]:
        """All of them."""
        for file in self._files.values():
            file.close()
        if self._folder:
            return map_arrays(self._folder)
        return {n: np.concatenate([np.zeros(0, FIELDS[n]), *parts]) for n, parts in self._parts.items()}

    def close(self) -> None:
        """Lets go of the files, finished or not."""
        for file in self._files.values():
            file.close()


def digest_of(tokens: np.ndarray) -> int:
    """64 bits by which rows of the same tokens are told."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest())


def map_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays in the files of a folder, mapped."""
    arrays = {}
    for name, dtype in FIELDS.items():
        path = folder / f"{name}.bin"
        arrays[name] = np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)
    return arrays


def pack_examples(examples: Sequence[Example], rows: Sequence[int], digests: Sequence[int]) -> dict[str, np.ndarray]:
    """Examples as the arrays of a store."""
    tokens = [example.tokens for example in examples]
    trained = [example.is_trained for example in examples]
    return {
        "tokens": np.concatenate([np.zeros(0, np.int32), *tokens]),
        "trained": np.concatenate([np.zeros(0, bool), *trained]),
        "lengths": np.array([len(t) for t in tokens], np.int32),
        "supervised": np.array([np.count_nonzero(t) for t in trained], np.int32),
        "rows": np.array(rows, np.int64),
        "digests": np.array(digests, np.uint64),
    }


class Examples(Sequence[Example]):
    """Rows of several stores by one index, all of them or those of ``index``."""

    def __init__(self, stores: Sequence[TokenStore], index: np.ndarray | None = None):
        self.stores = stores
        self._starts = list(itertools.accumulate((len(store) for store in stores), initial=0))
        self._offsets = [store.offsets for store in stores]
        self._index = np.arange(self._starts[-1]) if index is None else index
        self.lengths = self._gather("lengths")
        self.supervised = self._gather("supervised")
        self.digests = self._gather("digests")

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Rows that are in memory already."""
        return cls([TokenStore.of("memory", "", examples, Counts(rows=len(examples)))])

    def select(self, index: np.ndarray) -> Examples:
        """The rows at these places, in this order."""
        return Examples(self.stores, self._index[index])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        tokens, trained = self.arrays_of(i)
        return Example(tokens, trained)

    def arrays_of(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, whether each is trained) of a row."""
        which, row = self._locate(i)
        start, stop = self._offsets[which][row : row + 2]
        arrays = self.stores[which].arrays
        return arrays["tokens"][start:stop], arrays["trained"][start:stop]

    def place(self, i: int) -> str:
        """Where a row comes from: its file and its number there."""
        which, row = self._locate(i)
        store = self.stores[which]
        return f"{store.name} row {store.arrays['rows'][row]}"

    @property
    def origins(self) -> np.ndarray:
        """[rows, 2] of each: its file and its number there."""
        files = np.searchsorted(self._starts, self._index, side="right") - 1
        return np.stack([files, self._gather("rows")], axis=1)

    def _locate(self, i: int) -> tuple[int, int]:
        place = int(self._index[i])
        which = bisect.bisect_right(self._starts, place) - 1
        return which, place - self._starts[which]

    def _gather(self, name: str) -> np.ndarray:
        parts = [np.asarray(store.arrays[name]) for store in self.stores]
        return np.concatenate([np.zeros(0, FIELDS[name]), *parts])[self._index]
