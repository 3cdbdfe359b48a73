"""The command line: compose the configuration with Hydra, check it, hand plain dataclasses to ``train.run``.

The only module that knows Hydra and OmegaConf. jax is imported after the configuration has been found good, so that
``--help``, ``--cfg job`` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adaptax.config import Config, UserError, build, check_divisible, check_training, key_paths, one_of, unknown_key
from adaptax.manifest import list_checkpoints, step_of
from adaptax.models import find_architecture, find_family, match_modules
from adaptax.resume import Start, bring_config, find_start, how_to_resume, join_start, share_start
from adaptax.run_folder import RunFolder, write_text
from adaptax.signals import Interrupted, StopSignals

log = logging.getLogger(__name__)
COMMANDS = ("train", "preview")  # that Hydra composes a configuration for
NO_FOLDER = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=console"]  # no log file either
GROUPS = ("model", "data", "optimizer", "schedule", "training", "checkpoint", "logging", "experiment")
_SECRET = re.compile(r"\bhf_\w{16,}|(?i:(?:^|[._])(?:\w+_)?(?:token|secret|password|api_?key)=)")
_MAPPED = re.compile(r"data\.(columns|filter)(\.|=|$)")  # the names in it are the user's own


def find_conf() -> str:
    """The configuration folder: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent
    folders = (package / "conf", package.parents[1] / "conf")
    return str(next(folder for folder in folders if (folder / "config.yaml").is_file()))


def teach_hydra() -> None:
    """Gives Hydra our schema, and lets ``# @package`` stand anywhere among a file's first comments, not on top only."""
    ConfigStore.instance().store(name="schema", node=Config)
    read_header = ConfigSource._get_header_dict

    def read_any_header(config_text: str) -> dict[str, str | None]:
        comments = itertools.takewhile(lambda line: re.match(r"\s*(#|$)", line), config_text.splitlines())
        return read_header("\n".join(line for line in comments if re.match(r"\s*#\s*@", line)))

    ConfigSource._get_header_dict = staticmethod(read_any_header)


def main() -> None:
    """Trains, or previews. Exit code 0 when all went well, 1 after an error, 2 after a misuse, 130 after Ctrl-C."""
    command = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "train"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, and become one line below
    teach_hydra()
    try:
        job = _preview_job() if command == "preview" else _train
        arguments = check_arguments(sys.argv[1:])
        sys.argv[1:] = arguments + (NO_FOLDER if command == "preview" else find_run_folder(arguments))
        hydra.main(version_base="1.3", config_path=find_conf(), config_name="config")(job)()
    except UserError as error:
        _fail(str(error))
    except yaml.YAMLError as error:
        _fail(f"not valid YAML: {error}")
    except MissingConfigException as error:
        _fail(_missing_choice(error))
    except OverrideParseException as error:
        key = error.override.partition("=")[0]
        if "=" not in error.override:
            _fail(f"{error.override} is no key=value; a command ({' or '.join(COMMANDS)}) goes first")
        if error.override.partition("=")[2].lstrip().startswith(("{", "[")):
            _fail(
                f"{error.override}: a bracket is not closed, or a text in it needs quotes, as in "
                "'data.filter={score: \">= 0.5\"}'"
            )
        _fail(f"{error.override}: Hydra cannot read this value; quote it twice: '{key}=\"...\"'")
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if any(frame.f_code is job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise  # the run's own fault: the traceback is wanted
        _fail(_one_line(error))
    except OSError as error:
        if any(frame.f_code is job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        _fail(f"{error.filename}: {error.strerror}; choose another hydra.run.dir")
    except Interrupted as interrupted:
        sys.exit(128 + interrupted.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _train(cfg: DictConfig) -> float:
    """One job: the configuration as dataclasses, checked without jax, then the run."""
    try:
        config = read_config(bring_config(_plain(cfg), _given_keys()))
        folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
        with StopSignals(config.checkpoint.grace_seconds) as stop, contextlib.ExitStack() as stack:
            try:
                return _start(config, folder, stop, stack)
            except Interrupted as interrupted:
                is_saved = bool(list_checkpoints(folder.checkpoints))
                hint = f"saved; {how_to_resume(folder)}" if is_saved else "nothing was saved yet"
                log.warning("stopped by %s: %s", interrupted, hint)
                stop.call_previous(interrupted.number)
                raise
    except Exception as error:
        is_ours = isinstance(error, (UserError, OmegaConfBaseException))
        message = str(error) if isinstance(error, UserError) else _one_line(error)
        if HydraConfig.get().mode == RunMode.RUN:
            if not is_ours:
                raise
            _record(message)
            _fail(message)
        if not is_ours:
            traceback.print_exc()
        traceback.clear_frames(error.__traceback__)  # the sweep goes on, without this job's arrays
    _record(message)
    print(f"error in job {HydraConfig.get().job.num}: {message}", file=sys.stderr)
    raise UserError(message)


def _start(config: Config, folder: RunFolder, stop: StopSignals, stack: contextlib.ExitStack) -> float:
    """Finds out where the run begins, in process 0 and without jax, and runs it from there."""
    is_first, start = _process_number() == 0, Start(config)
    if is_first:  # before anything of it is overwritten
        stack.enter_context(folder.lock())
        start = find_start(config, folder)

    if not (start.summary and _is_alone()):
        from adaptax import mesh

        mesh.start_processes()
        start, folder = _share_start(start, folder)
    if start.summary:
        log.info(
            "%s is finished: %s steps, final loss %.4f; more training.num_epochs or num_batches go on from there",
            folder.path,
            start.summary["step"],
            start.summary["final_loss"],
        )
        return float(start.summary["final_loss"])
    if is_first:
        folder.summary.unlink(missing_ok=True)
        write_text(folder.config, OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(start.config))))
    device_mesh = mesh.build_mesh(start.config.model.mesh_shape)

    from adaptax import train

    return train.run(start, device_mesh, folder, stop)


def _share_start(start: Start, folder: RunFolder) -> tuple[Start, RunFolder]:
    """Where the run begins and writes, as process 0 says; the others' own folders go."""
    from adaptax import mesh

    shared = mesh.share_text(share_start(start, folder))
    if _process_number() == 0:
        return start, folder
    start, common = join_start(start.config, shared)
    if common.path != folder.path.absolute():
        for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
            logging.getLogger().removeHandler(handler)
            handler.close()
            Path(handler.baseFilename).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.path.rmdir()
    return start, common


def _preview_job() -> Callable[[DictConfig], None]:
    """What ``adaptax preview`` does with the configuration; takes its own options from the command line."""
    parser = argparse.ArgumentParser(
        prog="adaptax preview",
        usage="adaptax preview [--rows N] [--html FILE] [key=value ...]",
        description="Shows what a run with the same keys would train on: no weights are read, nothing is trained.",
        epilog="Keys are those of a run: adaptax --help",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", default="3", help="sequences to show (default 3)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page that opens in a browser")
    command = shlex.join(["adaptax", "preview", *sys.argv[1:]])
    options, rest = parser.parse_known_args(sys.argv[1:])
    if {"-m", "--multirun"} & set(rest):
        raise UserError("adaptax preview looks at one configuration: leave --multirun out")
    sys.argv[1:] = rest

    def job(cfg: DictConfig) -> None:
        from adaptax import preview

        try:
            preview.preview(read_config(_plain(cfg)), preview.check_samples(options.rows), options.html, command)
        except UserError as error:
            _fail(str(error))

    return job


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def _given_keys() -> list[str]:
    """The keys and groups that were given on the command line; all groups, where an experiment was."""
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    keys = [".".join(str(override.key_or_group).split(".")[:2]) for override in overrides]
    return [name for name in key_paths() if "." not in name] if "experiment" in keys else keys


def _process_number() -> int:
    """The number of this process among those of the run; 0 where it is alone."""
    is_step = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    number = os.environ.get("JAX_PROCESS_ID") or (os.environ.get("SLURM_PROCID") if is_step else None)
    return int(number) if number and number.isdecimal() else 0


def _is_alone() -> bool:
    return "JAX_COORDINATOR_ADDRESS" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) <= 1


def read_config(values: Mapping[str, Any]) -> Config:
    """The configuration as dataclasses, checked as far as that goes without jax.

    Raises:
      UserError: naming what is wrong in it.
    """
    config = build(values)
    check_training(config)
    check_model(config)
    check_data(config)
    return config


def check_model(config: Config) -> None:
    """Everything about the model that can be found wrong before jax is imported and weights are fetched."""
    family, arch = find_family(config.model.model_family), find_architecture(config.model)
    match_modules(config.model, arch)
    check_divisible(family.checkpoint.axis_sizes(arch), config.model.mesh_shape)


def check_data(config: Config) -> None:
    """Everything about the data that can be found wrong before a row is read."""
    from adaptax.data import catalog  # brings numpy and sentencepiece, which --help does without

    catalog.check_sources(config)


def check_arguments(arguments: list[str]) -> list[str]:
    """The arguments with the overrides in one piece, as Hydra wants them: a flag may stand between them.

    Refuses unknown keys (Hydra would take them after a ``+``), secrets, and what would unpickle a file.
    """
    secret = next((a for a in arguments if _SECRET.search(a)), None)
    if secret:
        name = f"{secret.partition('=')[0]}: " if "=" in secret else ""
        raise UserError(f"{name}secrets do not go on the command line, where runs record them; set HF_TOKEN")
    flags = get_args_parser().parse_intermixed_args(arguments)
    if flags.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle and is not supported; use the run's config.yaml instead")
    known = key_paths()
    for override in OverridesParser.create().parse_overrides(flags.overrides):
        key = override.key_or_group
        if _MAPPED.match(key):
            continue
        if key.partition(".")[0].partition("/")[0] != "hydra" and key not in GROUPS and key not in known:
            raise UserError(unknown_key(key, [*known, "experiment"]))
        if key in GROUPS and not override.is_delete() and isinstance(override.value(), (int, float, type(None))):
            raise UserError(f"{key}={override.get_value_string()}: it must name a file of conf/{key}")
    others = [a for a in arguments if a not in flags.overrides]
    return [*(f"++{a.lstrip('+')}" if _MAPPED.match(a.lstrip("+")) else a for a in flags.overrides), *others]


def find_run_folder(arguments: list[str]) -> list[str]:
    """The override that lets a run go on in the folder that ``checkpoint.resume`` names, unless one was chosen."""
    flags = get_args_parser().parse_intermixed_args(arguments)
    given = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(flags.overrides)}
    resume = given.get("checkpoint.resume")
    if (
        flags.multirun
        or resume is None
        or "hydra.run.dir" in given
        or not isinstance(resume.value(), (str, QuotedString))
    ):
        return []
    path = Path(str(getattr(resume.value(), "text", resume.value())))
    if not path.is_dir() or step_of(path) is not None:
        return []
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.run.dir='{text}'"]


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


def _record(message: str) -> None:
    """Writes into the run's log file alone, why it stopped."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, message, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(record)


def _fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)
