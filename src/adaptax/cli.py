"""The command line: a configuration composed and checked, handed as plain dataclasses to what the command names.

jax is imported after the configuration has been found good, so that ``--help``, ``--cfg job`` and mistakes are answered
at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from adaptax.checking import read_config
from adaptax.compose import (
    COMMANDS,
    check_arguments,
    explain,
    find_conf,
    find_run_folder,
    given_keys,
    teach_hydra,
    to_plain,
)
from adaptax.config import Config, UserError
from adaptax.manifest import list_checkpoints
from adaptax.options import option_names
from adaptax.redact import redact
from adaptax.resume import Start, bring_config, find_start, how_to_resume, join_start, share_start
from adaptax.resume import read_config as read_saved_config
from adaptax.run_folder import RunFolder
from adaptax.signals import Interrupted, StopSignals
from adaptax.subcommands import as_line, build_job, fail, log_to_terminal, open_mesh

log = logging.getLogger(__name__)
NO_FOLDER = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=console"]  # no log file either


def main() -> None:
    """Trains, or does what the command says.

    Exit code 0 when all went well, 1 after an error, 2 after a misuse, 128 and its number after a signal.
    """
    command = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "train"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, and become one line below
    logging.raiseExceptions = False  # where run.log cannot be written, the disk being full, the terminal still can
    sys.unraisablehook = _show_unraisable
    try:
        if command == "checkpoints":
            _list_checkpoints()
        elif command == "replay":
            _replay()
        elif command == "verify-resume":
            _verify_resume()
        else:
            jobs = {"preview": _preview_job, "plan": _plan_job, "train": lambda: _train}
            job = jobs[command]() if command in jobs else build_job(command)
            _run_hydra(job, [] if command == "train" else NO_FOLDER, option_names(command))
    except UserError as error:
        fail(str(error))
    except Interrupted as interrupted:
        sys.exit(128 + interrupted.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run_hydra(job: Callable[[DictConfig], Any], added: list[str], options: Iterable[str]) -> None:
    """Composes the configuration of the command line and calls the job with it; ``options`` are the command's own."""
    teach_hydra()
    try:
        arguments = check_arguments(sys.argv[1:], options)
        sys.argv[1:] = (added or find_run_folder(arguments)) + arguments  # flags last: none between the overrides
        hydra.main(version_base="1.3", config_path=find_conf(), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        if any(frame.f_code is job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise  # the run's own fault: the traceback is wanted
        fail(explain(error))


def _train(cfg: DictConfig) -> float:
    """One job: the configuration as dataclasses, checked without jax, then the run."""
    try:
        values, given = to_plain(cfg), given_keys()
        brought = bring_config(values, given)
        config = read_config(brought, given, is_saved=brought is not values)
        folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
        with StopSignals(config.checkpoint.grace_seconds) as stop, contextlib.ExitStack() as stack:
            try:
                with folder.guard():
                    return _start(config, folder, stop, stack)
            except Interrupted as interrupted:
                is_saved = bool(list_checkpoints(folder.checkpoints))
                hint = f"saved; {how_to_resume(folder)}" if is_saved else "nothing was saved yet"
                log.warning("stopped by %s: %s", interrupted, hint)
                stop.call_previous(interrupted.number)
                raise
    except Exception as error:
        is_ours = isinstance(error, (UserError, OmegaConfBaseException))
        message = explain(error)
        if HydraConfig.get().mode == RunMode.RUN:
            if not is_ours:
                raise
            _record(message)
            fail(message)
        if not is_ours:
            print(redact(traceback.format_exc()), file=sys.stderr)
        traceback.clear_frames(error.__traceback__)  # the sweep goes on, without this job's arrays
    _record(message)
    print(f"error in job {HydraConfig.get().job.num}: {redact(message)}", file=sys.stderr)
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
        stop.renew()
        if not _is_alone() and HydraConfig.get().mode == RunMode.RUN:
            stack.push(functools.partial(_leave_others, stop))
        start, folder = _share_start(start, folder)
    if start.summary:
        log.info(
            "%s is finished: %s steps, final loss %.4f; more training.num_epochs or num_batches go on from there",
            folder.path,
            start.summary["step"],
            start.summary["final_loss"],
        )
        return float(start.summary["final_loss"])
    if is_first and not start.checkpoints:  # a run that is resumed may yet be refused, for its rows or weights
        folder.begin(dataclasses.asdict(start.config))
    device_mesh = open_mesh(start.config)

    from adaptax import train

    return train.run(start, device_mesh, folder, stop)


def _leave_others(stop: StopSignals, kind: object, error: BaseException | None, trace: object) -> None:
    """Ends a process that fails alone, and does not wait for the others, which may be waiting for it."""
    if error is None or (isinstance(error, Interrupted) and stop.is_holding):  # all end at the same step
        return
    if isinstance(error, UserError):
        _record(str(error))
        print(f"error: {as_line(str(error))}", file=sys.stderr)
    elif isinstance(error, Exception):
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(128 + error.number if isinstance(error, Interrupted) else 1)


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


def _list_checkpoints() -> None:
    """``adaptax checkpoints RUN``."""
    parser = argparse.ArgumentParser(
        prog="adaptax checkpoints", description="Lists the checkpoints of a run, and checks each of them whole."
    )
    parser.add_argument("run", type=Path, help="the run's folder: outputs/NAME/DATE/TIME")
    folder = parser.parse_args().run

    from adaptax.inventory import show_checkpoints

    sys.exit(0 if show_checkpoints(folder) else 1)


def _replay() -> None:
    """``adaptax replay RUN``."""
    parser = argparse.ArgumentParser(
        prog="adaptax replay",
        description="Runs a batch again whose loss or gradient was not finite, in float32 and in the run's own type, "
        "and names the first layer that is not finite.",
    )
    parser.add_argument("run", type=Path, help="the run's folder: outputs/NAME/DATE/TIME")
    parser.add_argument("--step", type=int, help="which step (default: the first one that was written down)")
    options = parser.parse_args()
    log_to_terminal()
    values = read_saved_config(RunFolder(options.run))
    if values is None:
        raise UserError(f"{options.run} is no run's folder: it has no config.yaml")
    config = read_config(values, is_saved=True)

    from adaptax import replay

    replay.replay(config, open_mesh(config), RunFolder(options.run), options.step)


def _verify_resume() -> None:
    """``adaptax verify-resume CONFIG...``."""
    parser = argparse.ArgumentParser(
        prog="adaptax verify-resume",
        usage="adaptax verify-resume [--steps N] [--at K] [key=value ...]",
        description="Proves on this machine that a run with these keys, stopped and resumed, is the uninterrupted run: "
        "trains N steps straight, then K, and in a new process the rest, and compares every loss and every array.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="steps in all (default 6)")
    parser.add_argument("--at", type=int, metavar="K", help="steps before the stop (default N / 2)")
    options, overrides = parser.parse_known_args()

    from adaptax.verify_resume import verify_resume

    check_arguments(overrides)
    at = options.steps // 2 if options.at is None else options.at
    sys.exit(0 if verify_resume(overrides, options.steps, at) else 1)


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
            preview.preview(
                read_config(to_plain(cfg), given_keys()), preview.check_samples(options.rows), options.html, command
            )
        except UserError as error:
            fail(str(error))

    return job


def _plan_job() -> Callable[[DictConfig], None]:
    """What ``adaptax plan`` does with the configuration."""
    parser = argparse.ArgumentParser(
        prog="adaptax plan",
        usage="adaptax plan [key=value ...]",
        description="Tells the memory and the work of a run with the same keys, from its compiled steps: nothing is "
        "fetched, no weight and no row is read. Exit code 1 where it does not fit.",
        epilog="Keys are those of a run: adaptax --help",
        allow_abbrev=False,
    )
    _, rest = parser.parse_known_args(sys.argv[1:])
    if {"-m", "--multirun"} & set(rest):
        raise UserError("adaptax plan looks at one configuration: leave --multirun out")

    def job(cfg: DictConfig) -> None:
        try:
            config = read_config(to_plain(cfg), given_keys())

            from adaptax import plan

            fits = plan.plan(config, open_mesh(config))
        except UserError as error:
            fail(str(error))
        sys.exit(0 if fits else 1)

    return job


def _process_number() -> int:
    """The number of this process among those of the run; 0 where it is alone."""
    is_step = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    number = os.environ.get("JAX_PROCESS_ID") or (os.environ.get("SLURM_PROCID") if is_step else None)
    return int(number) if number and number.isdecimal() else 0


def _is_alone() -> bool:
    return "JAX_COORDINATOR_ADDRESS" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) <= 1


def _show_unraisable(unraisable: Any) -> None:
    """Shows all but the writes that Orbax left when another one had failed, which is told in a line."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _record(message: str) -> None:
    """Writes into the run's log file alone, why it stopped."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, message, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(record)
