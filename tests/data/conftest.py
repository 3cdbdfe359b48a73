"""What several tests of the data start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptax.models import ASSETS
from toy_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def gemma3_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model with the kinds of symbols of Gemma 3's: image tokens, runs of newlines, HTML."""
    return train_tokenizer(tmp_path_factory.mktemp("gemma3_like") / "tokenizer.model")


@pytest.fixture(scope="module", params=["tiny", "gemma3_like"])
def model(request: pytest.FixtureRequest) -> Path:
    """Sentencepiece models: the one that ships with the package, and one in which newlines join."""
    tiny = ASSETS / "gemma3_tiny" / "tokenizer.model"
    return tiny if request.param == "tiny" else request.getfixturevalue("gemma3_like")
