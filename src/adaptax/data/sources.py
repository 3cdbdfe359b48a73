"""Rows from files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from adaptax.config import UserError
from adaptax.models import ASSETS

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def open_rows(name: str) -> tuple[Path, Sequence[dict[str, Any]], list[str]]:
    """(path, rows, columns) of a JSONL or Parquet file; ``embedded:`` names one that ships with the package.

    Raises:
      UserError: the file is missing, empty, or not what its name says; a bad JSON line is named by its number.
    """
    path = ASSETS / name.removeprefix("embedded:") if name.startswith("embedded:") else Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in LOADERS:
        raise UserError(f"{path}: rows are read from {', '.join(LOADERS)} files")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, TypeError, OSError, UnicodeDecodeError) as error:
        return path, *_read_jsonl(path, error)
    if len(rows) == 0:
        raise UserError(f"{path} holds no rows")
    return path, rows, rows.column_names


def _read_jsonl(path: Path, error: Exception) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a JSONL file that has no common schema (a list here, a text there), or the line that is broken."""
    if LOADERS[path.suffix] != "json":
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    rows = list(_parse_lines(path))
    if not rows:
        raise UserError(f"{path} holds no rows")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column) for column in columns} for row in rows], columns


def _parse_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path} line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: each line must be a JSON object, not {type(row).__name__}")
            yield row
