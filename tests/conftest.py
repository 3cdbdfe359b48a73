"""The environment of every test, set before jax and datasets are imported, and what many tests start from."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="adaptax-datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

from adaptax.data.tokenizer import Tokenizer  # noqa: E402
from adaptax.models import ASSETS  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer that ships with the package."""
    return Tokenizer(ASSETS / "gemma3_tiny" / "tokenizer.model")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Rows to a JSONL file: ``write_jsonl(rows, name="rows.jsonl")``. A row that is a text is a raw line."""

    def write(rows: Iterable[Mapping[str, Any] | str], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
