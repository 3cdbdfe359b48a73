"""Rows of files, folders and the hub: by index, or one after another."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import re
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from adaptax.config import UserError, locate

Row = Mapping[str, Any]
MAX_ROW_BYTES = 16 << 20
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_DELIMITERS = {".jsonl": "", ".csv": ",", ".tsv": "\t"}
_READ_BYTES = MAX_ROW_BYTES + 2  # a row and the end of its line
_Outcome = Row | UserError
_Record = tuple[int, int, int, bytes]  # number of the first line, start, stop, the first _READ_BYTES bytes


class Rows(Protocol):
    """Rows by index; reading one needs memory for that one only."""

    name: str  # as shown in messages: the path, or the name on the hub
    columns: list[str]  # of the first good rows
    number: Callable[[int], int]  # of a row in its file, counted from 1; of JSONL that of its line

    def __len__(self) -> int:
        """How many rows there are, bad ones included."""
        ...

    def __getitem__(self, index: int) -> Row:
        """One row, or a UserError that says what is wrong with it, without its place."""
        ...


def find_units(name: str) -> list[str]:
    """The files, saved datasets or hub datasets that a name stands for, sorted; ``FOLDER@SPLIT`` is ``FOLDER/SPLIT``.

    A name is a file, a folder, a glob, ``FOLDER@SPLIT``, ``embedded:FILE`` or ``hub:ORG/NAME[/CONFIG][@SPLIT]``. What
    lies under that very name comes first: a file may have a glob's special characters in its name.

    Raises:
      UserError: there is nothing of that name, or it is not clear what to take of it.
    """
    if name.startswith("hub:") and parse_hub(name):
        return [name]
    with _explain(name, OSError, RuntimeError):  # the latter of ~nobody/rows.jsonl
        path, (folder, _, split) = locate(name), name.rpartition("@")
        if path.exists():
            return _list_folder(path) if path.is_dir() else [str(path)]
        if folder and locate(folder).is_dir():
            return _list_folder(locate(folder), split)
        if re.search(r"[*?[]", name):
            files = sorted(match for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
            _check(files, f"{path}: no file matches this pattern")
            return files
    is_like_hub = re.fullmatch(r"\w[\w-]*/\w[\w-]*(\.\d[\w-]*)*(@\w+)?", name)
    raise UserError(f"{path}: no such file" + (f"; for a dataset of the hub write hub:{name}" if is_like_hub else ""))


def parse_hub(name: str) -> tuple[str, str | None, str]:
    """(repository, configuration, split) of ``hub:ORG/NAME[/CONFIG][@SPLIT]``; a split that is not named is train."""
    match = re.fullmatch(r"hub:(\w[\w.-]*/\w[\w.-]*)(?:/([^/@]+))?(?:@(\w+(?:\.\w+)*))?", name)
    if not match:
        raise UserError(f"{name}: a dataset of the hub is hub:ORG/NAME[/CONFIG][@SPLIT], and SPLIT a name, no slice")
    return match[1], match[2], match[3] or "train"


def content_digest(unit: str) -> str:
    """SHA-256 of a file, or of the number, lengths and bytes of a dataset's Arrow files; read block by block."""
    unit, kind = _resolve(unit)
    digest, paths = hashlib.sha256(), [unit]
    if kind in ("hub", "folder"):
        paths = [file["filename"] for file in next(_load_tables(unit, kind)).cache_files]
        digest.update(json.dumps([os.path.getsize(path) for path in paths]).encode())
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def open_rows(unit: str, limit: int | None = None) -> Rows:
    """The rows of a unit by index, the first ``limit`` of them only.

    JSONL, CSV and TSV stay where they are, with a number per row in memory. Parquet becomes an Arrow file in the cache
    of ``datasets`` (``HF_DATASETS_CACHE``), Arrow is mapped into memory, and a JSON list is read as a whole. Raises a
    UserError that begins with the name, where it cannot be read, holds no rows, or no good one among the first.
    """
    unit, kind = _resolve(unit)
    with _explain(unit, OSError):
        if kind in _DELIMITERS:
            rows = _Text(unit, _DELIMITERS[kind]).index(limit)
        elif kind == "list":
            values = _load_list(unit)[:limit]
            rows = _Rows(unit, len(values), lambda index: _as_object(values[index]))
        else:
            table = next(_load_tables(unit, kind))
            rows = _Rows(unit, len(range(len(table))[:limit]), lambda index: _take(table, index), table.column_names)
    _check(len(rows), f"{unit} holds no rows")
    rows.columns = rows.columns or _first_columns(rows)
    return rows


def stream_rows(unit: str) -> Iterator[tuple[str, Row | UserError]]:
    """(place, row) one after another, with nothing indexed or copied to disk; a bad row is handed out as its error.

    What :func:`open_rows` refuses is refused here too, at once or on the way.
    """
    unit, kind = _resolve(unit)
    if kind in _DELIMITERS:
        return _number(unit, _Text(unit, _DELIMITERS[kind]).stream(), OSError)
    if kind == "list":
        return _number(unit, enumerate((_attempt(_as_object, value) for value in _load_list(unit)), 1), OSError)
    tables = _load_tables(unit, kind, is_streamed=True)
    each = (_attempt(_take, table, index) for table in tables for index in range(len(table)))
    return _number(unit, enumerate(next(tables) if kind == "hub" else each, 1), Exception)


def _number(unit: str, rows: Iterable[tuple[int, _Outcome]], errors: type[Exception]) -> Iterator[tuple[str, _Outcome]]:
    number = 0
    with _explain(unit, errors):
        for number, row in rows:
            yield f"{unit} row {number}", row
    _check(number, f"{unit} holds no rows")


def _attempt(read: Callable[..., Row], *args: Any) -> _Outcome:
    try:
        return read(*args)
    except UserError as error:
        return error


def _check(is_fine: Any, problem: str) -> None:
    if not is_fine:
        raise UserError(problem)


@contextlib.contextmanager
def _explain(name: str, *errors: type[Exception]) -> Iterator[None]:
    """One line of what goes wrong inside."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        cause = error.__cause__ or error
        text = " ".join(str(getattr(cause, "strerror", None) or cause).split())[:400] or type(cause).__name__
        fix = "; let this user read it, such as with chmod u+r" if isinstance(error, PermissionError) else ""
        problem = _hub_problem(name, cause, text) if name.startswith("hub:") else f"cannot be read: {text}{fix}"
        raise UserError(f"{name} {problem}") from None


def _list_folder(folder: Path, split: str = "") -> list[str]:
    """What a folder stands for: itself or one of its splits if ``datasets`` saved it, else its files, of one kind."""
    splits = sorted(p.parent.name for p in folder.glob("*/state.json") if (folder / "dataset_dict.json").is_file())
    if split in splits or (len(splits) == 1 and not split):
        return [str(folder / (split or splits[0]))]
    _check(not splits, f"{folder} has the splits {', '.join(splits)}: name one, as {folder}@SPLIT")
    _check(not split, f"{folder} has no splits: leave @{split} away")
    if (folder / "state.json").is_file():
        return [str(folder)]
    files = [file for file in sorted(folder.iterdir()) if file.name[0] != "." and file.name != "dataset_info.json"]
    files = [file for file in files if file.suffix.lower() in (*SUFFIXES, *PACKED) and file.is_file()]
    kinds = sorted({file.suffix.lower().replace(".ndjson", ".jsonl") for file in files})
    _check(kinds, f"{folder} holds no {', '.join(SUFFIXES)} file; {folder}/**/*.jsonl takes those of its folders")
    _check(len(kinds) == 1, f"{folder} holds {', '.join(kinds)} files: name a kind, such as {folder}/*{kinds[0]}")
    return [str(file) for file in files]


def _resolve(name: str) -> tuple[str, str]:
    """The one unit that a name stands for, and its kind: hub, folder, list (of a .json file) or a suffix."""
    units = find_units(name)
    _check(len(units) == 1, f"{name} stands for {len(units)} files: open them one by one")
    unit, suffix = units[0], Path(units[0]).suffix.lower().replace(".ndjson", ".jsonl")
    if unit.startswith("hub:") or Path(unit).is_dir():
        return unit, "hub" if unit.startswith("hub:") else "folder"
    _check(suffix not in PACKED, f"{unit} is packed: unpack it first")
    _check(suffix in SUFFIXES and Path(unit).is_file(), f"{unit}: rows are read from {', '.join(SUFFIXES)} files")
    with _explain(unit, OSError), open(unit, "rb") as file:
        start = os.pread(file.fileno(), 4096, 0)
        _check(start, f"{unit} is empty")
        _check(not start.startswith(b"version https://git-lfs"), f"{unit} is a pointer of Git LFS: run git lfs pull")
        is_text = b"\0" not in start or suffix in (".parquet", ".arrow")
        _check(is_text, f"{unit} is UTF-16 or no text: turn it into UTF-8, such as with iconv -f UTF-16 -t UTF-8")
        if suffix != ".json":
            return unit, suffix
        first = next(_Text(unit, "").records(file), (1, 0, 0, b"{}"))[3].strip()
        return unit, ".jsonl" if first.startswith(b"{") and first.endswith(b"}") else "list"


class _Rows:
    """Rows that a function reads by index, numbered by another."""

    def __init__(self, name: str, count: int, read: Callable[[int], Row], columns: Iterable[str] = ()):
        self.name, self.columns, self.count, self.read = name, list(columns), count, read
        self.number: Callable[[int], int] = lambda index: index + 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        return self.read(range(self.count)[index])

    def place(self, index: int) -> str:
        return f"{self.name} row {self.number(index)}"


def _first_columns(rows: Rows) -> list[str]:
    """Of the first 100 good rows; where the first 1000 are all bad it is no data, and the first of them says why."""
    tried = (_attempt(rows.__getitem__, index) for index in range(min(len(rows), 1000)))
    good = list(islice((row for row in tried if not isinstance(row, UserError)), 100))
    _check(good, f"{f'{rows.name} row {rows.number(0)}'}: {_attempt(rows.__getitem__, 0)}")
    return list(dict.fromkeys(column for row in good for column in row))


class _Text:
    """JSON objects, one on a line, or records of CSV under a header, whose values are texts; read where they lie."""

    def __init__(self, path: str, delimiter: str):
        self.path, self.delimiter, self.columns = path, delimiter, []
        self.blank = b"\r\n" if delimiter else b" \t\r\n"
        csv.field_size_limit(max(csv.field_size_limit(), _READ_BYTES))  # of the process, and 128 KiB at first
        with open(path, "rb") as file:
            for line, start, stop, raw in islice(self.records(file), len(delimiter)):
                header = _attempt(self.parse, line, stop - start, raw)
                _check(not isinstance(header, UserError), f"{path}: the header is {header}")
                self.columns = list(cast(Row, header).values())
        _check(len(set(self.columns)) == len(self.columns), f"{path}: the header has a name twice: {self.columns}")

    def index(self, limit: int | None) -> _Rows:
        """The rows by index. The file is not mapped: mapped pages would count as memory of this process."""
        starts, lines, stop = array("q"), array("I"), 0
        with open(self.path, "rb", buffering=1 << 20) as file:
            for line, start, stop, _ in islice(islice(self.records(file), len(self.delimiter), None), limit):  # noqa: B007
                starts.append(start)
                lines.append(line)
            descriptor = os.dup(file.fileno())
        starts.append(stop)

        def read(index: int) -> Row:
            size = starts[index + 1] - starts[index]
            raw = os.pread(descriptor, min(size, _READ_BYTES), starts[index])
            return self.parse(lines[index], size, raw)

        rows = _Rows(self.path, len(lines), read, self.columns)
        rows.number = rows.number if self.delimiter else lines.__getitem__
        weakref.finalize(rows, os.close, descriptor)
        return rows

    def stream(self) -> Iterator[tuple[int, _Outcome]]:
        with open(self.path, "rb", buffering=1 << 20) as file:
            for number, (line, start, stop, raw) in enumerate(islice(self.records(file), len(self.delimiter), None), 1):
                yield number if self.delimiter else line, _attempt(self.parse, line, stop - start, raw)

    def records(self, file: BinaryIO) -> Iterator[_Record]:
        """Lines, or of CSV as many lines as a quote is open for; blank ones are passed over."""
        start, line = file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0), 0
        while piece := file.readline(_READ_BYTES):
            line, size, is_open = line + 1, len(piece), self.delimiter and self.is_open(False, piece, piece)
            first, raw = line, bytearray(piece) if is_open else piece
            while piece and (is_open or (len(piece) == _READ_BYTES and not piece.endswith(b"\n"))):
                line += piece.endswith(b"\n")
                piece = file.readline(_READ_BYTES)
                size += len(piece)
                if len(raw) < _READ_BYTES:  # what is too long is not kept
                    raw += piece
                    is_open = self.is_open(bool(is_open), piece, raw)
            if not raw.isspace() or raw.strip(self.blank):
                yield first, start, start + size, bytes(raw)
            start += size

    def is_open(self, was_open: bool, piece: bytes, raw: bytes | bytearray) -> bool:
        """Whether a quoted value goes on after this piece of a record; two quotes, or ten, change nothing."""
        if not self.delimiter or piece.count(b'"') % 2 == 0:
            return was_open
        try:
            return not self.split(raw.decode("latin-1"))
        except csv.Error as error:
            return "unexpected end" in str(error)

    def split(self, text: str) -> list[list[str]]:
        return [r for r in csv.reader(io.StringIO(text, newline="\n"), delimiter=self.delimiter, strict=True) if r]

    def parse(self, line: int, size: int, raw: bytes) -> Row:
        raw = raw.rstrip(self.blank)  # of blank lines after it, too
        length = f"{size / 1e6:.1f} MB long; a row may have {MAX_ROW_BYTES >> 20} MiB"
        _check(len(raw) <= MAX_ROW_BYTES, f"{length}: is a newline missing?")
        _check(b"\0" not in raw, "holds NUL bytes: was the file cut off while it was written?")
        try:
            if not self.delimiter:
                return _as_object(_decode(raw.decode()))
            values, *others = self.split(raw.decode())
        except (ValueError, RecursionError, csv.Error) as error:  # also a number of 5000 digits, or 5000 nested lists
            kind = "UTF-8" if isinstance(error, UnicodeError) else "CSV" if self.delimiter else "JSON"
            why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            place = f", at line {line}: is a quote missing?" if self.delimiter else ""
            raise UserError(f"not valid {kind} ({why}){place}") from None
        columns = self.columns or [str(number) for number in range(len(values))]  # the header comes as a row, too
        found = f"{len(values)} values under {len(columns)} columns, at line {line}"
        _check(not others and len(values) == len(columns), f"{found}: is a quote missing?")
        return dict(zip(columns, values, strict=True))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise UserError(f"the key {max(row, key=[k for k, _ in pairs].count)!r:.60} occurs twice in {row!s:.60}")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode  # made once: json.loads makes one for every row


def _as_object(value: Any) -> Row:
    _check(isinstance(value, dict), f"not a JSON object but {type(value).__name__}")
    return value


def _load_list(path: str) -> list[Any]:
    """The elements of the one list that a JSON file holds."""
    fix = f"jq -c '.[]' {path} > rows.jsonl"
    _check(os.path.getsize(path) <= 1 << 30, f"{path} is over 1 GiB, too long for JSON in one piece: {fix}")
    try:
        value = _decode(Path(path).read_bytes().decode("utf-8-sig"))
    except (UserError, ValueError, RecursionError) as error:
        place = f" line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{place}: not valid JSON ({getattr(error, 'msg', error)})") from None
    if isinstance(value, dict):
        lists = [k for k, v in value.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
        fix = fix.replace(".[]", f".{json.dumps(lists)}[]")
        _check(len(lists) != 1, f"{path} is one object with the rows under {lists}: {fix}")
    _check(isinstance(value, list), f"{path} is one JSON value, not rows: write a list of objects, or JSON lines")
    return cast(list[Any], value)


def _load_tables(unit: str, kind: str, is_streamed: bool = False) -> Iterator[Any]:
    """The dataset behind a hub name, a folder, Parquet or Arrow; of streamed Parquet piece by piece."""
    import datasets.config  # slow to import, and not needed for text
    import pyarrow.parquet

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said here
    with _explain(unit, Exception):  # whatever the readers raise: it is not in our hands
        if kind == "hub":
            repository, configuration, split = parse_hub(unit)
            _check(not Path(repository).exists(), f"{unit}: datasets would read the folder {repository} that is here")
            builder = datasets.load_dataset_builder(repository, configuration)
            splits = list(builder.info.splits or [split])
            _check(split in splits, f"{unit} has no split {split}: it has {', '.join(splits)}")
            if not is_streamed:
                builder.download_and_prepare()
            yield builder.as_streaming_dataset(split) if is_streamed else builder.as_dataset(split, in_memory=False)
        elif kind == "folder":
            _check(any(Path(unit).glob("*.arrow")), f"{unit} holds no rows")
            yield datasets.load_from_disk(unit, keep_in_memory=False).with_format(None)
        elif kind == ".parquet":
            with pyarrow.parquet.ParquetFile(unit, buffer_size=1 << 20) as file:
                _check(file.metadata.num_rows, f"{unit} holds no rows")
                for batch in file.iter_batches(256) if is_streamed else []:
                    yield datasets.Dataset(pyarrow.Table.from_batches([batch]), fingerprint="-")
            if not is_streamed:
                # Not load_dataset, which tells the hub of every file. A copy is known by its content, not by its date.
                copies = f"{datasets.config.HF_DATASETS_CACHE}/{content_digest(unit)}"
                yield datasets.Dataset.from_parquet(glob.escape(unit), cache_dir=copies)
        else:
            data = pyarrow.memory_map(unit).read_buffer()
            is_file = data[:6].to_pybytes() == b"ARROW1"  # the other form of Arrow is the stream
            reader = pyarrow.ipc.open_file(data) if is_file else pyarrow.ipc.open_stream(data)
            yield datasets.Dataset(reader.read_all(), fingerprint="-")


def _take(table: Any, index: int) -> Row:
    with _explain("the row", Exception):  # an image that is none
        return table[index]


def _hub_problem(unit: str, error: BaseException, text: str) -> str:
    page = f"https://huggingface.co/datasets/{parse_hub(unit)[0]}"
    if "gated" in text or type(error).__name__ == "GatedRepoError":
        return f"is gated: ask for access at {page}, then set HF_TOKEN or run `hf auth login`"
    if "doesn't exist" in text:
        return f"does not exist or is private: look at {page}, and set HF_TOKEN or run `hf auth login` if it is yours"
    if isinstance(error, ConnectionError):
        return "is not in the local cache and the hub is out of reach: connect once, with HF_HUB_OFFLINE unset"
    return f"could not be loaded ({type(error).__name__}: {text}); the name is hub:ORG/NAME[/CONFIG][@SPLIT]"
