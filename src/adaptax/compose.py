"""Hydra's part of the command line: how configurations are found and composed, what is refused, what errors say.

With ``cli``, the only module that knows Hydra and OmegaConf.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig, OmegaConf

from adaptax.config import Config, UserError, key_paths
from adaptax.manifest import step_of
from adaptax.options import OPTIONS
from adaptax.redact import check_no_secrets, find_secret, is_secret_name, redact
from adaptax.resume import GROUPS as RUN_GROUPS
from adaptax.resume import read_config
from adaptax.run_folder import RunFolder
from adaptax.schema import one_of, unknown_key

COMMANDS = ("train", "plan", "preview", "replay", "checkpoints", "verify-resume", *OPTIONS)
GROUPS = (*RUN_GROUPS, "experiment")
_MAPPED = re.compile(r"data\.(columns|filter)(\.|=|$)")  # the names in it are the user's own
_PATTERN_KEYS = "model.lora_rank_pattern", "model.lora_alpha_pattern"
_PATTERNS = re.compile(r"\+*(model\.lora_(?:rank|alpha)_pattern)(=|\.|$)(.*)", re.S)
_MAPPING = re.compile(r"""(?<!\$)\{(?:"[^"]*"|'[^']*'|[^{}"'])*\}""")
_PAIR = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,:{}"']+?)\s*:\s*([^\s,{}"']+)\s*(?:,|$)""")
_NAMED = re.compile(r"(?:^|[{,])\s*([\w.+~/@-]+)\s*[=:]")  # the key of an override, and keys in braces behind it
_MADE = re.compile(r"logging\.(?:Stream|File|Null|_Stderr)Handler|adaptax\.redact\.SecretFilter")
_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")  # of which Hydra makes only those that it has found


def find_conf() -> str:
    """The configuration folder: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent
    folders = (package / "conf", package.parents[1] / "conf")
    return str(next(folder for folder in folders if (folder / "config.yaml").is_file()))


def teach_hydra() -> None:
    """Gives Hydra our schema, and has it refuse configurations that hold secrets or name code.

    ``# @package`` may stand anywhere among a file's first comments, not on top only.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    read_header = ConfigSource._get_header_dict

    def read_any_header(config_text: str) -> dict[str, str | None]:
        comments = itertools.takewhile(lambda line: re.match(r"\s*(#|$)", line), config_text.splitlines())
        return read_header("\n".join(line for line in comments if re.match(r"\s*#\s*@", line)))

    ConfigSource._get_header_dict = staticmethod(read_any_header)
    load = ConfigLoaderImpl.load_configuration

    def load_checked(*args: Any, **kwargs: Any) -> DictConfig:
        cfg = load(*args, **kwargs)
        for key in _PATTERN_KEYS:
            if isinstance(value := OmegaConf.select(cfg, key), str):
                OmegaConf.update(cfg, key, read_patterns(value), merge=False)
        values = OmegaConf.to_container(cfg, resolve=False)
        check_no_secrets(values)  # type: ignore[arg-type]  # before a folder is named by it
        check_no_code(values)
        return cfg

    ConfigLoaderImpl.load_configuration = load_checked


def read_patterns(value: str) -> Any:
    """The mapping in a text, as which the command line brings it: Hydra's own mappings have no quotes around keys.

    A text that is no mapping stays as it is.
    """
    if not _MAPPING.fullmatch(value.strip()):
        return value
    text = value.strip()[1:-1].strip()
    pairs = list(_PAIR.finditer(text))
    if "".join(pair[0] for pair in pairs) != text:
        return value
    return {pair[1].strip("\"'"): _read_value(pair[2]) for pair in pairs}


def _read_value(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return yaml.safe_load(text)


def _quote_patterns(argument: str) -> str:
    """An override with its mappings as texts, if it is one of patterns."""
    match = _PATTERNS.fullmatch(argument)
    if not match or not match[2]:
        return argument
    if match[2] == ".":
        raise UserError(f"{argument}: {_give_patterns(match[1])}")
    quoted = _MAPPING.sub(lambda mapping: QuotedString(mapping[0], Quote.single).with_quotes(), match[3])
    return f"{match[1]}={quoted}"


def _give_patterns(key: str) -> str:
    return f"""give a mapping, with quotes around all and around patterns: '{key}={{".*attn/.*": 8}}'"""


def check_no_code(values: Any, where: str = "") -> None:
    """Refuses values that would make Hydra (``_target_``) or logging (``class``, ``()``) call what they name.

    Raises:
      UserError: naming the key.
    """
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        path = f"{where}.{key}".lstrip(".")
        is_made = key in ("_target_", "()") or (key == "class" and path.startswith("hydra."))
        is_plugin = path in ("hydra.launcher._target_", "hydra.sweeper._target_") and str(value).startswith(_PLUGINS)
        if is_made and not is_plugin and not _MADE.fullmatch(str(value)):
            raise UserError(f"{path}={value}: a configuration cannot name code to run; take it out")
        check_no_code(value, path)


def read_flags(arguments: Sequence[str]) -> Any:
    """Hydra's own flags; ``overrides`` are the arguments between them."""
    return get_args_parser().parse_intermixed_args(list(arguments))


def check_arguments(arguments: list[str], options: Iterable[str] = ()) -> list[str]:
    """The arguments with the overrides in one piece, as Hydra wants them: a flag may stand between them.

    Refuses unknown keys (Hydra would take them after a ``+``), secrets, and what would unpickle a file. ``options`` of
    the command have been taken out; one of them may have been meant.
    """
    secret = next((argument for argument in arguments if _holds_secret(argument)), None)
    if secret:
        name = f"{redact(secret.partition('=')[0])}: " if "=" in secret else ""
        raise UserError(f"{name}secrets do not go on the command line, where runs record them; set HF_TOKEN")
    arguments = [_quote_patterns(argument) for argument in arguments]
    flags = read_flags(arguments)
    if flags.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle and is not supported; use the run's config.yaml instead")
    known = key_paths()
    try:
        overrides = OverridesParser.create().parse_overrides(flags.overrides)
    except OverrideParseException as error:
        raise UserError(explain(error)) from None
    for override in overrides:
        key = override.key_or_group
        if _MAPPED.match(key):
            continue
        if key.partition(".")[0].partition("/")[0] != "hydra" and key not in GROUPS and key not in known:
            raise UserError(unknown_key(key, [*options, *known, "experiment"]))
        if key in GROUPS and not override.is_delete() and isinstance(override.value(), (int, float, type(None))):
            raise UserError(f"{key}={override.get_value_string()}: it must name a file of conf/{key}")
    others = [a for a in arguments if a not in flags.overrides]
    return [*(f"++{a.lstrip('+')}" if _MAPPED.match(a.lstrip("+")) else a for a in flags.overrides), *others]


def _holds_secret(argument: str) -> bool:
    """Whether it does by its look, or by the name of a key in it that is not the name of a column."""
    is_mapped = _MAPPED.match(argument.lstrip("+~")) or _PATTERNS.fullmatch(argument.lstrip("~"))
    names = [] if is_mapped else _NAMED.findall(argument)
    return find_secret(argument) is not None or any(is_secret_name(name) for name in names)


def find_run_folder(arguments: list[str]) -> list[str]:
    """The override that lets a run go on in the folder that ``checkpoint.resume`` names, unless one was chosen.

    Where it names a step, a new folder is begun, under the name of the run that the step is of.
    """
    flags = read_flags(arguments)
    given = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(flags.overrides)}
    resume = given["checkpoint.resume"].value() if "checkpoint.resume" in given else None
    if flags.multirun or "hydra.run.dir" in given or not isinstance(resume, (str, QuotedString)):
        return []
    path = Path(str(getattr(resume, "text", resume)))
    if not path.is_dir():
        return []
    if step_of(path) is None:
        return [_quote("hydra.run.dir", str(path))]
    saved = read_config(RunFolder(path.absolute().parents[1])) or {}
    return [_quote("name", str(saved["name"]))] if "name" in saved and "name" not in given else []


def _quote(key: str, text: str) -> str:
    """An override with a text as it stands."""
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The values of a composed configuration."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def given_keys() -> list[str]:
    """The keys and groups that were given on the command line; all groups, where an experiment was."""
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    keys = [".".join(str(override.key_or_group).split(".")[:2]) for override in overrides]
    if "experiment" not in keys:
        return keys
    return [*(name for name in key_paths() if "." not in name), *(key for key in keys if "." in key)]


def explain(error: Exception) -> str:
    """One line for what went wrong while a configuration was composed."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, yaml.YAMLError):
        return f"not valid YAML: {error}"
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, RecursionError):
        return "a configuration file is nested too deeply to be read"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}; choose another hydra.run.dir"
    if not isinstance(error, OverrideParseException):
        return _one_line(error)
    key, equals, value = error.override.partition("=")
    if not equals:
        return f"{error.override} is no key=value; a command ({', '.join(COMMANDS)}) goes first"
    if key in _PATTERN_KEYS:
        return f"{error.override}: {_give_patterns(key)}"
    if value.lstrip().startswith(("{", "[")):
        return (
            f"{error.override}: a bracket is not closed, or a text in it needs quotes, as in "
            "'data.filter={score: \">= 0.5\"}'"
        )
    return f"{error.override}: Hydra cannot read this value; quote it twice: '{key}=\"...\"'"


def _missing_choice(error: MissingConfigException) -> str:
    """``model=gemma3_1bb: did you mean gemma3_1b? ...``"""
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if not group or not error.options:
        return _one_line(error)
    return f"{group}={choice}: {one_of(choice, error.options)}"


def _one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages without their context lines, with the close match for an unknown key."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        key, said = "", []
        for line in str(cause).splitlines() or [type(cause).__name__]:
            if line.strip().startswith("full_key:"):
                key = line.partition(":")[2].strip()
            elif not re.match(r"\s*(reference|object)_type=", line):
                said.append(re.sub(r": \w+ raised while composing config:$", "", line.strip()).rstrip(".: "))
        if key and any(re.match(r"Key '\S+' (not in|is not in struct)", line) for line in said):
            said[-1] = _unknown_key(key)
        elif key:
            said[-1] = f"{key}: {said[-1]}"
        parts += said
        cause = cause.__cause__
    if any(part.startswith("unknown key") for part in parts):  # that says it all, but for the file
        parts = [part for part in parts if part.startswith(("In '", "unknown key"))]
    return ": ".join(dict.fromkeys(parts))


def _unknown_key(key: str) -> str:
    if key.partition(".")[0] == "experiment":
        return "a file of conf/experiment needs the line '# @package _global_' among its first comments"
    return unknown_key(key, key_paths())
