"""Runs in processes of their own, which a test watches, stops and kills."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptax.manifest import FILE, list_checkpoints
from adaptax.run_folder import RunFolder
from command_line import SCRIPT

LIMIT_SECONDS = 240  # for anything that is waited for, on a machine that is busy with other things too
SOURCE = str(SCRIPT.parent / "src")
NUM_STEPS, EVERY = 36, 8  # how often it evaluates
TIMES = ("seconds", "per_second", "stall_share", "mfu")  # in the names of what differs from run to run
OPTIONS = (
    "model=gemma3_tiny",
    "model.model_size=auto",
    "model.weights=model",
    "model.lora_rank=4",
    'model.lora_module_path=".*(q_einsum|down_proj)"',
    "model.lora_dropout=0.1",
    "data.train=rows.jsonl",
    "data.eval=eval.jsonl",
    "data.max_length=32",
    "optimizer.learning_rate=0.02",
    "training.micro_batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.num_epochs=6",
    f"training.eval_every_steps={EVERY}",
    "checkpoint.every_steps=5",
    "checkpoint.keep=2",
    "logging.every_steps=1",
    "logging.progress=lines",
    "logging.tensorboard=false",
    "logging.plot=false",
)

# jax lets process 0 alone write programs into its cache; the others would compile them at every start.
TOGETHER = f"""\
import contextlib, sys
sys.path.insert(0, {SOURCE!r})
with contextlib.suppress(Exception):
    from jax._src import compilation_cache, compiler
    keep = compilation_cache.put_executable_and_time
    compiler._cache_write = lambda key, time, name, backend, program, _: keep(key, name, program, backend, int(time))
from adaptax.cli import main
main()
"""

# A terminal that is closed when a bar in it has come to the first steps; ends as the program in it does.
TERMINAL = """\
import os, pty, re, sys
process, terminal = pty.fork()
if not process:
    os.execv(sys.argv[1], sys.argv[1:])
shown = b""
while not re.search(rb"step [1-9]\\d*/", shown):
    shown += os.read(terminal, 4096)
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


class Started:
    """A process in a session of its own; what it says goes to a file. Leave it (``with``) and it is gone."""

    def __init__(self, command: Iterable[str | Path], cwd: Path, environment: dict[str, str], log: Path):
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*command], cwd=cwd, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL, group=True)
        self._process.wait()

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def see(self, pattern: str | re.Pattern[str]) -> bool:
        """Waits until it has said this; False where it has ended without."""
        return self.wait_until(lambda: re.search(pattern, self.text) is not None)

    def wait_until(self, is_so: Any) -> bool:
        """Waits until something is so; False where the process has ended before."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            has_ended = self._process.poll() is not None
            if is_so():
                return True
            if has_ended:
                return False
            time.sleep(0.004)
        raise AssertionError(f"waited for too long:\n{self.text}")

    def send(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the process, or to all of its group; to nobody where it has ended."""
        if self._process.poll() is None:
            (os.killpg if group else os.kill)(self._process.pid, number)

    def end(self, within: float = LIMIT_SECONDS) -> int:
        """Waits for its end; the exit code, as a shell has it."""
        try:
            code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended within {within} s:\n{self.text}") from None
        return code if code >= 0 else 128 - code

    @property
    def resume_command(self) -> list[str]:
        """What it has told to type to go on."""
        (command,) = re.findall(r"go on with: (.*)", self.text)[-1:]
        return ["sh", "-c", f"exec {command}"]


@dataclass(frozen=True)
class Bench:
    """A user's folder with model and rows, and the environment that runs are started in."""

    home: Path

    def start(self, folder: str | None, *options: str, script: Path = SCRIPT, **variables: str) -> Started:
        """Starts a run, in a folder of this name."""
        where = [] if folder is None else [f'hydra.run.dir="{folder}"']
        return self.call([sys.executable, script, *OPTIONS, *where, *options], **variables)

    @contextlib.contextmanager
    def start_two(self, folder: str | None, *options: str) -> Iterator[tuple[Started, Started]]:
        """Starts two processes of one run, with a device each."""
        script = self.home / "together.py"
        script.write_text(TOGETHER)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        options = ("model.mesh_shape=[[2,1],[fsdp,tp]]", "training.micro_batch_size=1", *options)
        together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        with (
            self.start(folder, *options, script=script, **together, JAX_PROCESS_ID="0") as first,
            self.start(folder, *options, script=script, **together, JAX_PROCESS_ID="1") as second,
        ):
            yield first, second

    def start_in_terminal(self, folder: str, *options: str) -> Started:
        """Starts a run in a terminal that is closed after the first steps."""
        run = [sys.executable, SCRIPT, *OPTIONS, f"hydra.run.dir={folder}", "logging.progress=bar", *options]
        return self.call([sys.executable, "-c", TERMINAL, *run])

    def call(self, command: Iterable[str | Path], **variables: str) -> Started:
        """Starts any command in the user's folder."""
        log = self.home / f"{time.monotonic_ns()}.txt"
        return Started(command, self.home, self.environment | variables, log)

    @property
    def environment(self) -> dict[str, str]:
        """One device, and programs that are compiled once for all processes, without much optimization."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # so that python is this one
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.home / "programs"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        return os.environ | cache | {"XLA_FLAGS": "", "PATH": path}

    def folder(self, name: str) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.home / name)


def newest_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    paths = list_checkpoints(folder.checkpoints)
    return int(paths[-1].name.removeprefix("step_")) if paths else 0


def read_manifest(folder: RunFolder) -> dict[str, Any]:
    """Of the newest checkpoint."""
    return json.loads((list_checkpoints(folder.checkpoints)[-1] / FILE).read_text())


def read_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The metrics, but for how long anything took."""
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in rows]
    return [row for row in timeless if row.keys() != {"step"}]


def read_end(folder: RunFolder) -> dict[str, Any]:
    """All that a finished run leaves, but for times and how many checkpoints are kept."""
    manifest = read_manifest(folder)
    files = [p.relative_to(folder.path) for p in folder.path.rglob("*") if folder.checkpoints not in [p, *p.parents]]
    return {
        "weights": {str(f): (folder.path / f).read_bytes() for f in files if f.suffix == ".safetensors"},
        "arrays": manifest["digests"],
        "progress": manifest["progress"],
        "step": manifest["step"],
        "rows": read_rows(folder),
        "summary": {k: v for k, v in (folder.read_summary() or {}).items() if k != "speed"},
        "files": sorted(map(str, files)),
        "unfinished": [p.name for p in folder.checkpoints.iterdir() if p not in list_checkpoints(folder.checkpoints)],
    }


def check_same(folder: RunFolder, reference: dict[str, Any]) -> None:
    """Asserts that a run has ended as another one did."""
    end = read_end(folder)
    different = [name for name in reference if end[name] != reference[name]]
    assert not different, {name: (end[name], reference[name]) for name in different if name != "weights"}
