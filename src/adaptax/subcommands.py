"""The commands after training: their options, the run whose configuration counts, and what they call."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adaptax.checking import read_config
from adaptax.compose import find_conf, given_keys, read_flags, to_plain
from adaptax.config import Config, UserError
from adaptax.manifest import step_of
from adaptax.options import OPTIONS, describe_options, take_options
from adaptax.redact import SecretFilter, redact
from adaptax.resume import bring_saved
from adaptax.resume import read_config as read_saved_config
from adaptax.run_folder import RunFolder

DESCRIPTIONS = {
    "generate": "Answers questions: a chat in the terminal, one prompt, or a file of rows.",
    "evaluate": "Loss, perplexity and token accuracy on rows, and scores of generated answers (evaluation.metric).",
    "export": "Writes what was trained for other programs, reads it again and compares.",
    "inspect": "Shows the singular values of an adapter, and truncates it to a lower rank.",
}


def build_job(command: str) -> Callable[[Any], None]:
    """What a command does with a composed configuration; takes its own options from the command line."""
    described = "".join(f"  {name:14} {words}\n" for name, words in describe_options(OPTIONS[command]))
    parser = argparse.ArgumentParser(
        prog=f"adaptax {command}",
        usage=f"adaptax {command} [run=DIR] [option=value ...] [key=value ...]",
        description=DESCRIPTIONS[command],
        epilog=f"option=value:\n{described}\nOther keys are those of a run: adaptax --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _, arguments = parser.parse_known_args(sys.argv[1:])
    flags = read_flags(arguments)
    if flags.multirun:
        raise UserError(f"adaptax {command} looks at one configuration: leave --multirun out")
    options, overrides = take_options(OPTIONS[command], flags.overrides, _is_choice_of_data)
    if flags.cfg and options.run is not None:
        raise UserError("--cfg shows what is given here alone: look at the run's config.yaml, or leave run out")
    sys.argv[1:] = overrides + [argument for argument in arguments if argument not in flags.overrides]

    def job(cfg: Any) -> None:
        try:
            config, places = resolve(options, to_plain(cfg), given_keys())
            _COMMANDS[command](options, config, places)
        except UserError as error:
            fail(str(error))
        except BrokenPipeError:  # who read the answers has left: so do we, and Python's last flush finds no pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)

    return job


def resolve(options: Any, values: dict[str, Any], given: Sequence[str]) -> tuple[Config, list[Path | None]]:
    """(the configuration, where the adapters lie).

    Args:
      options: of the command.
      values: of the composed configuration.
      given: the keys that were given on the command line; others are those of the run, if there is one.

    Raises:
      UserError: the run or an adapter is not there, or a key is given that only the adapter can say.
    """
    from adaptax.subject import find_adapter

    for key in given:
        if key.startswith("model.lora_") or key in ("model.use_rslora", "model.init_adapter"):
            raise UserError(f"{key} is of a training: here the adapter says it; leave it out, and set adapter=DIR")
    folder, names = None, _adapter_names(options)
    if options.run is not None:
        folder = Path(options.run).expanduser()
        if step_of(folder) is not None:
            names = [str(folder) if name is None else name for name in names]
            folder = folder.absolute().parents[1]
        values = bring_saved(values, _read_saved(folder), given)
    data = getattr(options, "data", None)
    if data is not None:
        values["data"] = values["data"] | {"train": None, "mixture": None, "eval": data, "streaming": False}
    values["checkpoint"] = values["checkpoint"] | {"resume": "auto"}
    values["model"] = values["model"] | {"init_adapter": None}
    places = [find_adapter(folder, name) for name in names]
    if folder is None and not any(key.partition(".")[0] == "model" for key in given):
        _suggest_run(places)
    if getattr(options, "compare", None) == "base" and None not in places:
        places.insert(0, None)
    return read_config(values, is_trained=False), list(dict.fromkeys(places))


def _suggest_run(places: Sequence[Path | None]) -> None:
    """Refuses an adapter of a run where nothing says which base it goes with."""
    for place in filter(None, places):
        for folder in place.absolute().parents[:2]:
            if RunFolder(folder).config.is_file():
                raise UserError(f"{place} is of a run, which knows its base: set run={folder} too, or model=NAME")


def _adapter_names(options: Any) -> list[str | None]:
    several = getattr(options, "adapters", None)
    if several is None:
        return [options.adapter]
    if not isinstance(several, list) or not several or not all(isinstance(name, str) for name in several):
        raise UserError(f"adapters must be a list such as [outputs/a/adapter,outputs/b/adapter], not {several!r}")
    if options.adapter is not None:
        raise UserError("adapter and adapters are both given: leave one of them out")
    return several


def _read_saved(folder: Path) -> dict[str, Any]:
    saved = read_saved_config(RunFolder(folder))
    if saved is None:
        what = "holds no config.yaml" if folder.is_dir() else "no such folder"
        inner = sorted(path.parent for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
        hint = f"; did you mean {inner[0]}?" if inner else "; a run's folder is outputs/NAME/DATE/TIME"
        raise UserError(f"run={folder}: {what}{hint}")
    return saved


def _is_choice_of_data(name: str) -> bool:
    return (Path(find_conf()) / "data" / f"{name}.yaml").is_file()


def _generate(options: Any, config: Config, places: list[Path | None]) -> None:
    from adaptax import talk

    talk.generate(options, config, open_mesh(config), places[0])


def _evaluate(options: Any, config: Config, places: list[Path | None]) -> None:
    from adaptax import assess

    assess.evaluate(options, config, open_mesh(config), places)


def _export(options: Any, config: Config, places: list[Path | None]) -> None:
    from adaptax import deliver

    deliver.export(options, config, open_mesh(config), places[0])


def _inspect(options: Any, config: Config, places: list[Path | None]) -> None:
    from adaptax import spectrum

    spectrum.inspect(options, config, open_mesh(config), places[0])


_COMMANDS = {"generate": _generate, "evaluate": _evaluate, "export": _export, "inspect": _inspect}


def open_mesh(config: Config) -> Any:
    """The devices of a run, and the programs that were compiled for such before."""
    from adaptax import mesh, program_cache

    program_cache.keep_programs(config.training.compile_cache_gib)
    return mesh.build_mesh(config.model.mesh_shape)


def log_to_terminal() -> None:
    """What Hydra does for a run: the messages of this package, as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(SecretFilter())
    logging.getLogger().addHandler(handler)
    logging.getLogger("adaptax").setLevel(logging.INFO)


def fail(message: str) -> NoReturn:
    """Ends the program with one line."""
    print(f"error: {as_line(message)}", file=sys.stderr)
    sys.exit(1)


def as_line(message: str) -> str:
    """A message in one line, without secrets."""
    line = " ".join(redact(message).split())  # a name out of a file may hold what steers a terminal
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
