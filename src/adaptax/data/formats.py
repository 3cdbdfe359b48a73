"""Row formats: one function and one line in FORMATS each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptax.data.chat import Piece, read_text, read_turns, render_chat, render_text
from adaptax.schema import UserError, one_of

Row = Mapping[str, Any]
SEVERAL_COLUMNS = 12  # more are not all listed in a message


@dataclass(frozen=True)
class Format:
    """How rows with these columns are rendered."""

    columns: tuple[str, ...]
    render: Callable[[Fields, str], list[Piece]]  # (fields of a row, data.supervise)
    optional: tuple[str, ...] = ()
    is_chat: bool = True


@dataclass(frozen=True)
class Fields:
    """A row seen through its column map: the format's names on top of the file's."""

    row: Row
    names: Mapping[str, str] = field(default_factory=dict)  # the format's column -> the file's

    def name(self, column: str) -> str:
        """What the file calls a column of the format."""
        return self.names.get(column, column)

    def __getitem__(self, column: str) -> Any:
        if self.name(column) not in self.row:
            raise UserError(f"column {self.name(column)} is not there; the row has {_listed(list(self.row))}")
        return self.row[self.name(column)]

    def text(self, column: str) -> str:
        """A text that must be there."""
        return read_text(self[column], self.name(column))

    def optional(self, column: str) -> str:
        """A text that may be absent, null or blank; it is empty then."""
        value = self.row.get(self.name(column))
        is_blank = value is None or (isinstance(value, str) and not value.strip())
        return "" if is_blank else read_text(value, self.name(column))


def _messages(fields: Fields, supervise: str) -> list[Piece]:
    return _conversation(fields, "messages", supervise)


def _sharegpt(fields: Fields, supervise: str) -> list[Piece]:
    return _conversation(fields, "conversations", supervise)


def _conversation(fields: Fields, column: str, supervise: str) -> list[Piece]:
    return render_chat(read_turns(fields[column], fields.name(column), fields.optional("system")), supervise)


def _alpaca(fields: Fields, supervise: str) -> list[Piece]:
    request = "\n\n".join(filter(None, (fields.text("instruction"), fields.optional("input"))))
    return _exchange(fields, request, fields.text("output"), supervise)


def _prompt_completion(fields: Fields, supervise: str) -> list[Piece]:
    return _exchange(fields, fields.text("prompt"), fields.text("completion"), supervise)


def _exchange(fields: Fields, request: str, answer: str, supervise: str) -> list[Piece]:
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return render_chat(read_turns(turns, "row", fields.optional("system")), supervise)


def _text(fields: Fields, supervise: str) -> list[Piece]:
    return render_text(fields["text"], fields.name("text"))


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages, ("system",)),
    "sharegpt": Format(("conversations",), _sharegpt, ("system",)),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "system")),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion, ("system",)),
    "text": Format(("text",), _text, is_chat=False),
}


def check_format(name: str, columns: Any, key: str = "data") -> None:
    """Refuses an unknown format, and a column map of names that the format has not; ``key`` is where they stand."""
    if name not in ("auto", *FORMATS):
        raise UserError(f"{key}.format={name}: {one_of(name, ('auto', *FORMATS))}")
    if not isinstance(columns, Mapping) or not all(isinstance(v, str) for v in columns.values()):
        raise UserError(f"{key}.columns must be like {{prompt: question, completion: answer}}, not {columns!r}")
    twice = {name for name in columns.values() if list(columns.values()).count(name) > 1}
    if twice:
        both = " and ".join(str(column) for column, name in columns.items() if name in twice)
        raise UserError(f"{key}.columns: {both} are both {min(twice)}; each needs a column of its own")
    forms = FORMATS.values() if name == "auto" else (FORMATS[name],)
    known = dict.fromkeys(c for form in forms for c in (*form.columns, *form.optional))
    for column in columns:
        if column not in known:
            raise UserError(
                f"{key}.columns: {column} is no column of a format: {one_of(str(column), known)} "
                "(the format's name goes first: {prompt: question})"
            )


def find_format(columns: Sequence[str], name: str, path: str, names: Mapping[str, str] | None = None) -> str:
    """The format of a file: the named one if its columns are there, else the first whose columns are.

    Args:
      columns: of the file.
      name: ``auto`` or a key of FORMATS.
      path: the file, for messages.
      names: the column map, the format's name -> the file's. Formats that it names go first.

    Raises:
      UserError: naming the columns that are there and those that are needed.
    """
    names = names or {}
    absent = [column for column in names.values() if column not in columns]
    if absent:
        raise UserError(
            f"{path} has no column {', '.join(absent)}, which data.columns names; it has {_listed(columns)}"
        )
    if name == "auto":
        mapped = [n for n, form in FORMATS.items() if names and set(names) <= {*form.columns, *form.optional}]
        for candidate in mapped or FORMATS:
            if all(names.get(column, column) in columns for column in FORMATS[candidate].columns):
                return candidate
        _check_header(columns, path)
        needed = "; ".join(f"{n}: {', '.join(f.columns)}" for n, f in FORMATS.items())
        found = f"the columns {_listed(columns)}" if columns else "no columns"
        raise UserError(
            f"{path} has {found}; no format fits (one of {needed}): name yours like "
            "'data.columns={prompt: question, completion: answer}'"
        )
    missing = [c for column in FORMATS[name].columns if (c := names.get(column, column)) not in columns]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}, which data.format={name} needs; it has {_listed(columns)}"
        )
    return name


def _check_header(columns: Sequence[str], path: str) -> None:
    """Refuses what is no list of names but looks like one."""
    separator = next((sign for sign in ";\t|" if len(columns) == 1 and sign in columns[0]), None)
    if separator:
        raise UserError(
            f"{path} has the single column {columns[0]!r}: its values are separated by {separator!r}; "
            "save it with commas, or with tabs as .tsv"
        )
    spaced = [column for column in columns if column != column.strip()]
    if spaced:
        raise UserError(f"{path} has the column {spaced[0]!r}, with a space at its edge: take it out of the header")


def _listed(columns: Sequence[str]) -> str:
    more = len(columns) - SEVERAL_COLUMNS
    return (", ".join(columns[:SEVERAL_COLUMNS]) or "none") + (f" and {more} more" if more > 0 else "")
