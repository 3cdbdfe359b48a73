"""Safetensors files: which tensors they hold, and the way to their bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from adaptax.schema import UserError

PIECE_BYTES = 64 << 20
READ_BYTES = 4 << 20  # what passes through a processor's cache is worked on fastest
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, from its file's header."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    offset: int  # of its first byte in the file
    num_bytes: int

    def map(self, rows: range | None = None) -> np.ndarray:
        """The tensor, or some of its rows, in place in the file; its pages are given back with the array."""
        rows = range(self.shape[0]) if rows is None else rows
        dtype, shape = DTYPES[self.dtype], (len(rows), *self.shape[1:])
        start = self.offset + rows.start * math.prod(shape[1:]) * dtype.itemsize
        return np.memmap(self.path, dtype, "r", start, shape)

    def split(self) -> Iterator[range]:
        """Its rows in pieces of at most PIECE_BYTES in float32."""
        num_rows = self.shape[0]
        step = max(1, PIECE_BYTES // (math.prod(self.shape[1:]) * 4))
        return (range(start, min(start + step, num_rows)) for start in range(0, num_rows, step))

    def read(self) -> Iterator[bytes]:
        """Its bytes as they are stored, whatever their type, in pieces of whole rows; see :func:`read_pieces`."""
        num_rows = self.shape[0] if self.shape else 1
        row_bytes = max(1, self.num_bytes // max(1, num_rows))
        return read_pieces(self.path, self.offset, self.num_bytes, max(1, READ_BYTES // row_bytes) * row_bytes)


def read_pieces(path: Path, offset: int, num_bytes: int, piece_bytes: int = READ_BYTES) -> Iterator[bytes]:
    """So many bytes of a file, in pieces; where a mapped file would have the process killed, this raises.

    Raises:
      UserError: the file cannot be read, or ends early.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while num_bytes:
                piece = file.read(min(piece_bytes, num_bytes))
                if not piece:
                    raise UserError(f"{path} cannot be read: it ends early")
                num_bytes -= len(piece)
                yield piece
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def list_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Tensor name -> where it lies, from one or many safetensors files.

    Raises:
      UserError: there is none, one cannot be read, or a name is in two of them.
    """
    paths = _list_files(directory)
    if not paths:
        raise UserError(f"{directory} holds no *.safetensors file and no Orbax checkpoint")
    tensors = {}
    for path in paths:
        for name, tensor in list_file(path).items():
            if name in tensors:
                raise UserError(f"{name:.200} is in {tensors[name].path} and in {path}: take one of them away")
            tensors[name] = tensor
    return tensors


def list_file(path: Path) -> dict[str, StoredTensor]:
    """The same of one file."""
    try:
        with safe_open(path, "numpy"), path.open("rb") as file:  # the first one checks all that the header says
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, said in header.items():
        start, stop = said["data_offsets"]
        tensors[name] = StoredTensor(path, tuple(said["shape"]), said["dtype"], 8 + length + start, stop - start)
    return tensors


def _list_files(directory: Path) -> list[Path]:
    """The safetensors files: those that the index names, or else all."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return sorted(directory.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise UserError(f"{index} is not a valid index: it has no weight_map") from None
    for name in names:
        if isinstance(name, str) and Path(name).name != name:
            raise UserError(f"{index}: {name!r:.80}: file names must not leave the directory")
        if not isinstance(name, str) or not name.endswith(".safetensors") or not name.isprintable():
            raise UserError(f"{index} is not a valid index: {name!r:.80} is not the name of a safetensors file")
    return [directory / name for name in sorted(names)]
