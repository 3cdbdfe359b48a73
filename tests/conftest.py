"""The environment of every test, set before jax and datasets are imported, and what many tests start from."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tokens and tables go to a folder of this session; models and fonts stay where the user's other programs look for them.
_home_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_session_cache = Path(tempfile.mkdtemp(prefix="adaptax-tests-"))
os.environ.setdefault("HF_HOME", str(_home_cache / "huggingface"))
os.environ.setdefault("MPLCONFIGDIR", str(_home_cache / "matplotlib"))
os.environ["XDG_CACHE_HOME"] = str(_session_cache)
os.environ["HF_DATASETS_CACHE"] = str(_session_cache / "datasets")
# Many tests, and their processes, compile the same small programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_session_cache / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
atexit.register(shutil.rmtree, _session_cache, ignore_errors=True)

from adaptax.data.tokenizer import Tokenizer  # noqa: E402
from adaptax.models import ASSETS  # noqa: E402
from command_line import Answer, start_process  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer that ships with the package."""
    return Tokenizer(ASSETS / "gemma3_tiny" / "tokenizer.model")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: ``model``, ``rows.jsonl``, ``eval.jsonl`` and ``out``, a run of six steps; not to be changed."""
    import small_runs

    home = small_runs.write_home(tmp_path_factory.mktemp("trained"))
    changes = {"checkpoint.every_steps": 3, "training.eval_every_steps": 3, "generation.max_new_tokens": 8}
    small_runs.train(home / "out", small_runs.make_config(home, changes))
    return home


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Rows to a JSONL file: ``write_jsonl(rows, name="rows.jsonl")``. A row that is a text is a raw line."""

    def write(rows: Iterable[Mapping[str, Any] | str], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's folder with training rows."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Runs ``python run_training.py`` with these arguments in the user's folder."""
    site = tmp_path / "site"
    site.mkdir()
    return functools.partial(start_process, home, site)


@pytest.fixture(scope="module")
def collected() -> Iterator[None]:
    """Leaves no garbage of a module's tests to those of another."""
    yield
    gc.collect()
