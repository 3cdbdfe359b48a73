"""Which sources of rows a configuration names, and whether they are there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptax.config import Config, DataConfig, UserError, locate, paths_of
from adaptax.data.filters import RowFilter
from adaptax.data.formats import check_format
from adaptax.data.sources import find_units
from adaptax.schema import one_of

HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """Rows of one name, and how they are read."""

    path: str
    format: str
    columns: Mapping[str, str]
    filter: Mapping[str, Any]
    max_rows: int | None
    weight: float | None = None  # share of an epoch's rows; null outside of mixtures: all of them


def train_sources(config: DataConfig) -> list[Source]:
    """What is trained on: ``data.mixture``, or else ``data.train``."""
    if config.mixture is None:
        return [_source(config, path, config.max_rows) for path in paths_of(config.train)]
    if config.train is not None and not all(path.startswith("embedded:") for path in paths_of(config.train)):
        raise UserError("data.train and data.mixture are both set: data.train=null, or data.mixture=null")
    if not isinstance(config.mixture, list) or not config.mixture:
        raise UserError(f"data.mixture must be like '[{{path: a.jsonl, weight: 2}}, ...]', not {config.mixture!r}")
    return [_read_entry(config, entry, f"data.mixture[{i}]") for i, entry in enumerate(config.mixture)]


def eval_sources(config: DataConfig) -> list[Source]:
    """The files of held-out rows, if any are named."""
    return [_source(config, path, None) for path in paths_of(config.eval)]


def check_sources(config: Config) -> None:
    """Everything about the sources that is wrong before a row is read; hub names are not looked up.

    Raises:
      UserError: a file that is not there, an unknown format or column, a filter that cannot be read.
    """
    data, training = config.data, config.training
    if data.streaming and training.num_batches is None:
        raise UserError("data.streaming=true does not know how long an epoch is: set training.num_batches")
    if data.streaming and data.eval is None and data.eval_fraction:
        raise UserError("data.streaming=true cannot hold rows out: data.eval=FILE, or data.eval_fraction=0")
    if data.streaming and not data.packing:
        raise UserError("data.streaming=true packs rows: data.packing=true")
    check_format(data.format, _or_empty(data.columns))
    for key, sources in (("mixture" if data.mixture else "train", train_sources(data)), ("eval", eval_sources(data))):
        for source in sources:
            check_format(source.format, source.columns, f"data.{key}" if key == "mixture" else "data")
            RowFilter(source.filter)
            if not source.path.startswith(HUB):
                try:
                    find_units(source.path)
                except UserError as error:
                    problem = str(error).removeprefix(str(locate(source.path))).removeprefix(": ")
                    raise UserError(f"data.{key}={source.path}: {problem}{_suggest(source.path)}") from None


def _suggest(name: str) -> str:
    """The file beside it that its name may have meant."""
    path = locate(name)
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() and not path.exists() else []
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def _source(config: DataConfig, path: str, max_rows: int | None) -> Source:
    return Source(path, config.format, _or_empty(config.columns), _or_empty(config.filter), max_rows)


def _or_empty(mapping: Any) -> Any:
    return {} if mapping is None else mapping


def _read_entry(config: DataConfig, entry: Any, key: str) -> Source:
    known = {field.name for field in dataclasses.fields(Source)}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise UserError(f"{key} must be like {{path: a.jsonl, weight: 2}}, not {entry!r}")
    for name in entry:
        if name not in known:
            raise UserError(f"{key}.{name}: {one_of(str(name), sorted(known))}")
    if "weight" not in entry:
        raise UserError(f"{key}.weight is missing: its share of an epoch's rows, such as 1")
    weight, max_rows = entry["weight"], entry.get("max_rows", config.max_rows)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"{key}.weight must be a number above 0, not {weight!r}")
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
        raise UserError(f"{key}.max_rows must be a whole number from 1, not {max_rows!r}")
    given = {"format": config.format, "columns": config.columns, "filter": config.filter} | dict(entry)
    given |= {name: _or_empty(given[name]) for name in ("columns", "filter")}
    check_format(given["format"], given["columns"], key)
    RowFilter(given["filter"], f"{key}.filter")
    return Source(entry["path"], given["format"], given["columns"], given["filter"], max_rows, float(weight))
