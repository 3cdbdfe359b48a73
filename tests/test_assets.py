"""What ships with the package is what its recipes make."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from adaptax.assets.recipes import chats, tokenizer
from adaptax.models import ASSETS


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def recorded() -> dict[str, str]:
    lines = (ASSETS / "SHA256SUMS").read_text().splitlines()
    return {name: value for value, name in (line.split() for line in lines)}


def test_every_file_has_its_recorded_hash_and_all_fit_in_12_mib() -> None:
    files = [p for folder in ("gemma3_tiny", "home") for p in (ASSETS / folder).iterdir()]
    assert {str(p.relative_to(ASSETS)): digest(p.read_bytes()) for p in files} == recorded()
    assert sum(p.stat().st_size for p in files) <= 12 << 20


def test_the_dataset_and_the_tokenizer_are_made_byte_for_byte_by_their_recipes() -> None:
    for name, rows in zip(("train", "eval"), chats.datasets(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        assert digest(text.encode()) == recorded()[f"home/{name}.jsonl"]
    assert digest(tokenizer.train()) == recorded()["gemma3_tiny/tokenizer.model"]


def test_held_out_requests_combine_what_training_saw_apart() -> None:
    """No answer without its time occurs in both; every value of every key of a held-out answer occurs in training."""
    answers = {}
    for name in ("train", "eval"):
        lines = Path(ASSETS / "home" / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line)["messages"] for line in lines]
        answers[name] = [json.loads(messages[1]["content"]) for messages in rows]
    without_time = {
        name: {json.dumps({k: v for k, v in a.items() if k != "time"}) for a in found}
        for name, found in answers.items()
    }
    assert not without_time["train"] & without_time["eval"]
    values = {name: {pair for a in found for pair in a.items()} for name, found in answers.items()}
    assert values["eval"] <= values["train"]
