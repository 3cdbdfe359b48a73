"""Orbax checkpoints, as Google publishes Gemma in them: which arrays they hold, and the way to their values. No jax.

Orbax stores arrays as zarr, in a folder each or all in one OCDBT database. tensorstore, by which it writes them, reads
both, so a checkpoint can be looked at before jax is imported, and read by several threads and by every process alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from adaptax.schema import UserError
from adaptax.tensor_files import DTYPES, PIECE_BYTES

METADATA, DATABASE = "_METADATA", "manifest.ocdbt"
DRIVERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}  # by the file that tells an array's shape
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of what was not written to its end
_SPELLINGS = {str(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint; used as a :class:`~adaptax.tensor_files.StoredTensor` is."""

    path: Path  # a file that is another one when the checkpoint is written anew
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    store: Any  # its tensorstore

    def map(self, rows: range | None = None) -> np.ndarray:
        """The array, or some of its rows, decompressed."""
        part = self.store if rows is None else self.store[rows.start : rows.stop]
        try:
            return part.read(order="C").result()
        except (ValueError, OSError) as error:
            raise _unreadable(self.path.parent, error, self.name) from None

    def split(self) -> Iterator[range]:
        """Its rows in pieces of whole chunks, of at most PIECE_BYTES in float32 where a chunk is no larger."""
        num_rows, chunk = self.shape[0], self.store.chunk_layout.read_chunk.shape[0]
        row_bytes = 4 * int(np.prod(self.shape[1:]))
        step = max(1, PIECE_BYTES // (chunk * row_bytes)) * chunk
        return (range(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def find_checkpoint(directory: Path) -> Path | None:
    """The folder with the arrays: the directory itself, or the only such one in it, or in one in it.

    None where there is none, and where the directory holds safetensors, which then are the weights.

    Raises:
      UserError: there are several.
    """
    if any(directory.glob("*.safetensors")) or (directory / "model.safetensors.index.json").exists():
        return None
    for below in ("", "*/", "*/*/"):
        found = sorted(path.parent for path in directory.glob(f"{below}{METADATA}") if UNFINISHED not in str(path))
        if len(found) > 1:
            names = ", ".join(str(path) for path in found[:5])
            raise UserError(
                f"{directory} holds {len(found)} Orbax checkpoints: set model.weights to one, such as {names}"
            )
        if found:
            return found[0]
    return None


def list_arrays(folder: Path, spell: Callable[[str], str]) -> dict[str, StoredArray]:
    """Name -> where an array lies. No array is read.

    Args:
      folder: what :func:`find_checkpoint` has found.
      spell: the name that is asked for, of one in the checkpoint: its keys, joined by ``/``.

    Raises:
      UserError: the folder cannot be read, an array is not described as Orbax does, or two names are spelled alike.
    """
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    is_database = (folder / DATABASE).is_file()
    store = {"driver": "ocdbt", "base": base} if is_database else base
    prefix = "" if is_database else base["path"]
    context, options = ts.Context(), {"fill_missing_data_reads": not _has_all_data(folder)}
    arrays: dict[str, StoredArray] = {}
    try:
        opened = {}
        for key in ts.KvStore.open(store, context=context).result().list().result():
            name, _, end = key.decode().rpartition("/")
            if driver := DRIVERS.get(f"/{end}"):
                where = store | {"path": f"{prefix}{name}/"}
                spec = {"driver": driver, "kvstore": where} | options
                opened[name] = key.decode(), ts.open(spec, open=True, read=True, context=context)
        for name, (key, future) in opened.items():
            array = future.result()
            path = folder / (DATABASE if is_database else key)
            spelled = spell(name.replace(".", "/"))
            if spelled in arrays:
                raise UserError(f"{folder} holds {name:.200} and {arrays[spelled].name:.200}, which are the same")
            arrays[spelled] = _describe(path, name, array)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise _unreadable(folder, error) from None
    return arrays


def _describe(path: Path, name: str, store: Any) -> StoredArray:
    shape, chunk = tuple(store.shape), store.chunk_layout.write_chunk.shape or ()  # a number has none
    if any(part > max(whole, 1) for part, whole in zip(chunk, shape, strict=True)):
        raise ValueError(f"{name:.200} {list(shape)} has chunks of {list(chunk)}")  # each is decompressed as a whole
    dtype = str(store.dtype.name)
    return StoredArray(path, name, shape, _SPELLINGS.get(dtype, dtype), store)


def _has_all_data(folder: Path) -> bool:
    """Whether zeros were written too, so that what is missing is lost; older versions left out chunks of zeros."""
    path = folder / METADATA
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("store_array_data_equal_to_fill_value", False))
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception, name: str = "") -> UserError:
    """In a line: tensorstore says much about itself."""
    reason = " ".join(str(error).split()).partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
    return UserError(f"{path}{f': {name:.200}' if name else ''} cannot be read: {reason:.300}")
