"""What several tests of the data start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from toy_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def gemma3_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model with the kinds of symbols of Gemma 3's: image tokens, runs of newlines, HTML."""
    return train_tokenizer(tmp_path_factory.mktemp("gemma3_like") / "tokenizer.model")
