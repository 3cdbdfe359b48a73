"""What the commands after training take beside the keys of a run. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, TypeVar

from adaptax.schema import UserError, build_group, knob

T = TypeVar("T")
_RUN = "A run's folder, or one of its ``checkpoints/step_N``; its own configuration counts, but for keys given here."
_ADAPTER = (
    "A folder with an adapter in PEFT's format; ``best`` or ``last`` of the run; ``none`` for the base alone. Null: "
    "what the run ended with, or else its best or last one."
)


@dataclass
class GenerateOptions:
    """``adaptax generate``: without ``prompt`` and ``data`` a chat in the terminal."""

    run: Optional[str] = knob(_RUN)
    adapter: Optional[str] = knob(_ADAPTER)
    prompt: Optional[str] = knob("A single question; its answer goes to the standard output.")
    system: Optional[str] = knob("Words that go before the first question.")
    data: Optional[str] = knob("A file of questions: rows as for training, of which the last answer may be missing.")
    out: Optional[str] = knob("Where the answers to ``data`` go: a JSONL file that is not there yet.")


@dataclass
class EvaluateOptions:
    """``adaptax evaluate``."""

    run: Optional[str] = knob(_RUN)
    adapter: Optional[str] = knob(_ADAPTER)
    adapters: Any = knob("Several adapters, in the place of ``adapter``: ``adapters=[DIR,DIR,none]``.")
    data: Optional[str] = knob("A file of rows to evaluate on; null: the rows that the run has held out.")
    compare: Optional[str] = knob("``base`` evaluates the model without the adapter too.", choices=("base",))
    out: Optional[str] = knob("Where predictions go: a JSONL file that is not there yet.")


@dataclass
class ExportOptions:
    """``adaptax export``."""

    run: Optional[str] = knob(_RUN)
    adapter: Optional[str] = knob(_ADAPTER)
    format: str = knob(
        "``peft``: an adapter; ``merged``: a Hugging Face checkpoint of the sum; ``orbax``: the sum as Google "
        "publishes Gemma for JAX; ``gguf``: an adapter for llama.cpp.",
        choices=("peft", "merged", "orbax", "gguf"),
    )
    out: Optional[str] = knob("The folder to write, which must not be there yet.")
    uniform: bool = knob("Of ``peft``: all modules at one rank and scale, for servers that know no other.")
    max_shard_gib: float = knob("Of ``merged``: weights are split into files of at most this size.", above=0)


@dataclass
class InspectOptions:
    """``adaptax inspect``."""

    run: Optional[str] = knob(_RUN)
    adapter: Optional[str] = knob(_ADAPTER)
    energy: float = knob("Tell the rank that holds this share of the energy.", above=0, maximum=1)
    plot: Optional[str] = knob("Draw the singular values into this PNG file.")
    rank: Optional[int] = knob("Truncate the adapter to this rank, tell the change of loss, and write it.", minimum=1)
    out: Optional[str] = knob("Where the truncated adapter goes: a folder that is not there yet.")


DEFAULTS: dict[str, Any] = {"format": "peft", "uniform": False, "max_shard_gib": 2.0, "energy": 0.99}
OPTIONS: dict[str, type] = {
    "generate": GenerateOptions,
    "evaluate": EvaluateOptions,
    "export": ExportOptions,
    "inspect": InspectOptions,
}


def option_names(command: str) -> list[str]:
    """What a command takes beside the keys of a run."""
    return [f.name for f in dataclasses.fields(OPTIONS[command])] if command in OPTIONS else []


def take_options(cls: type[T], arguments: Sequence[str], is_choice: Callable[[str], bool]) -> tuple[T, list[str]]:
    """(the options of a command, the other arguments). An argument without ``=`` is the run's folder.

    Args:
      cls: one of OPTIONS.
      arguments: of the command line, without Hydra's flags and their values.
      is_choice: whether ``data=NAME`` is a file of ``conf/data``, and not of rows.

    Raises:
      UserError: an option that is given twice or is empty, or has a value that it may not have.
    """
    hints = {f.name: str(f.type) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    rest: list[str] = []
    for argument in arguments:
        name, equals, text = argument.partition("=")
        name = name.lstrip("+")  # as Hydra wants it before keys that it does not know
        if not equals and not argument.startswith("-") and "run" in hints:
            name, text = "run", argument
        elif not equals or name not in hints or (name == "data" and is_choice(text)):
            rest.append(argument)
            continue
        if name in given:
            raise UserError(f"{name} is given twice: {given[name]} and {text}")
        if not text.strip("'\" "):
            raise UserError(f"{name}= is empty: give it a value, or leave it out")
        given[name] = _read(name, text, is_text="str" in hints[name])
    problems: list[str] = []
    values = {name: DEFAULTS.get(name) for name in hints} | given
    options = build_group(cls, values, problems)
    if problems:
        raise UserError("; ".join(problems))
    return options, rest


def _read(name: str, text: str, *, is_text: bool) -> Any:
    """Texts are taken as they stand, but for quotes around all; other values are YAML. ``null`` is none."""
    import yaml

    if text == "null":
        return None
    if is_text:
        is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
        return text[1:-1] if is_quoted else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{name}={text}: it cannot be read; is a bracket or a quote not closed?") from None


def describe_options(cls: type) -> Iterable[tuple[str, str]]:
    """(name, what it is) of every option of a command."""
    for f in dataclasses.fields(cls):
        default = DEFAULTS.get(f.name)
        words = str(f.metadata["doc"]).replace("``", "")
        yield f.name, words + (f" Default {default}." if default is not None else "")
