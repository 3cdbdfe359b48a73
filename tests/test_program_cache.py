"""Compiled programs kept for the next run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, jax, jax.numpy as jnp
from adaptax.program_cache import keep_programs
events = []
jax.monitoring.register_event_listener(lambda name, **kwargs: events.append(name))
folder = keep_programs(float(sys.argv[1]))
def slow(x):
    for _ in range(150):
        x = jnp.sin(x @ x) + jax.lax.fori_loop(0, 3, lambda i, y: y * jnp.cos(y), x)
    return x
jax.jit(slow)(jnp.ones((8, 8))).block_until_ready()
print(folder, sum("cache_hits" in name for name in events))
"""


def compile_it(cache: Path, limit: str, **environment: str) -> tuple[str, int, str]:
    """(folder, programs found in it, what was said)."""
    known = {
        key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    environment = known | {"XDG_CACHE_HOME": str(cache)} | environment
    command = [sys.executable, "-c", PROGRAM, limit]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    folder, hits = done.stdout.split()
    return folder, int(hits), done.stderr


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_next_process_finds_what_was_compiled(tmp_path: Path) -> None:
    folder, hits, _ = compile_it(tmp_path, "1.0")
    assert hits == 0
    assert Path(folder).is_relative_to(tmp_path / "adaptax" / "programs")
    assert Path(folder).stat().st_mode & 0o077 == 0  # of the user alone: what lies there is run
    assert size_of(Path(folder)) > 1000
    again, hits, _ = compile_it(tmp_path, "1.0")
    assert (again, hits > 0) == (folder, True)


def test_a_program_that_a_kill_cut_short_is_made_anew(tmp_path: Path) -> None:
    folder, _, _ = compile_it(tmp_path, "1.0")
    programs = list(Path(folder).glob("*-cache"))
    for path in programs:
        path.write_bytes(path.read_bytes()[:100])
        path.with_name(path.name.removesuffix("-cache") + "-atime").unlink()
    _, hits, said = compile_it(tmp_path, "1.0")
    assert (hits, said) == (0, "")
    assert all(path.stat().st_size > 100 for path in programs)
    assert compile_it(tmp_path, "1.0")[1] > 0


def test_what_a_removal_left_is_removed(tmp_path: Path) -> None:
    """Else the program would pass for a whole one, were it written anew and cut short."""
    folder = Path(compile_it(tmp_path, "1.0")[0])
    left = folder / "jit_gone-0123-atime"
    left.write_bytes(b"12345678")
    whole = set(folder.glob("*-cache"))
    assert compile_it(tmp_path, "1.0")[1] > 0
    assert not left.exists()
    assert set(folder.glob("*-cache")) == whole


def test_it_is_bounded_and_can_be_turned_off(tmp_path: Path) -> None:
    folder, _, _ = compile_it(tmp_path, "0.00000001")
    assert size_of(Path(folder)) < 1000
    assert compile_it(tmp_path / "off", "0")[:2] == ("None", 0)
    assert not (tmp_path / "off").exists()


def test_a_cache_that_the_user_has_named_is_used(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    folder, _, _ = compile_it(tmp_path / "other", "1.0", JAX_COMPILATION_CACHE_DIR=str(mine))
    assert folder == str(mine)
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="not a POSIX system")
def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "adaptax").write_text("a file in its place")
    folder, _, said = compile_it(tmp_path, "1.0")
    assert folder == "None"
    assert "programs are compiled anew in every run" in said
