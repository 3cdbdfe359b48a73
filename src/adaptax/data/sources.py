"""Rows from files."""

from __future__ import annotations

import glob
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.exceptions import DatasetGenerationError

from adaptax.config import UserError, locate

# Not datasets.load_dataset, which would tell the hub of every file that is read, and wait 5 s where it cannot.
READERS = {
    ".jsonl": datasets.Dataset.from_json,
    ".json": datasets.Dataset.from_json,
    ".parquet": datasets.Dataset.from_parquet,
}


def open_rows(name: str, text_columns: Collection[str]) -> tuple[Path, Sequence[dict[str, Any]], list[str]]:
    """(path, rows, columns) of a JSONL or Parquet file; what looks like a date in ``text_columns`` stays text.

    Raises:
      UserError: the file is missing, empty, or not what its name says; a bad JSON line is named by its number.
    """
    path = locate(name)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if suffix not in READERS:
        raise UserError(f"{path}: rows are read from {', '.join(READERS)} files")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if suffix != ".parquet":
        _check_utf8(path)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong with a file is said here
    try:
        rows = cast(datasets.Dataset, READERS[suffix](glob.escape(str(path))))
    except (DatasetGenerationError, ValueError, TypeError, OSError) as error:
        if suffix == ".parquet":
            cause = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"{path} cannot be read as Parquet, or holds no rows: {cause}") from None
        return path, *_read_jsonl(path)
    if len(rows) == 0:
        raise UserError(f"{path} holds no rows")
    if suffix == ".jsonl" and any("timestamp" in repr(rows.features.get(column)) for column in text_columns):
        return path, *_read_jsonl(path)
    return path, cast(Sequence[dict[str, Any]], rows), rows.column_names


def _check_utf8(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number}: not valid UTF-8 ({error})") from None


def _read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a JSONL file that Arrow has no schema for (a list here, a text there), or the line that is broken."""
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
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: each line must be a JSON object, not {type(row).__name__}")
            yield row
