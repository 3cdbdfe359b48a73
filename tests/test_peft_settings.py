"""What an adapter's configuration may say: plain LoRA is read, all else is a line that names the file."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from adaptax.config import UserError
from adaptax.peft_settings import CONFIG, TENSORS, PeftSettings, read_settings

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "base_model_name_or_path": "org/base"}
NAME = "layers.3.self_attn.q_proj"


def write(directory: Path, values: Any = PLAIN, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    values = values if isinstance(values, str) else json.dumps(values | changes if changes else values)
    (directory / CONFIG).write_text(values)
    (directory / TENSORS).touch()
    return directory


def read(directory: Path, **changes: Any) -> PeftSettings:
    return read_settings(write(directory, PLAIN, **changes))


def refusal(directory: Path) -> str:
    """The one line, which names the folder."""
    with pytest.raises(UserError) as caught:
        read_settings(directory).alpha_of(NAME, 8)
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_plain_lora_is_read(tmp_path: Path) -> None:
    settings = read(tmp_path)
    assert (settings.alpha_of(NAME, 8), settings.weigh(8)) == (16, 8)
    assert (settings.use_rslora, settings.dropout, settings.base) == (False, 0.1, "org/base")
    assert read(tmp_path, use_rslora=True).weigh(16) == 4
    few = write(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 0.5})
    assert read_settings(few).alpha_of(NAME, 4) == 0.5


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        f"model.{NAME}",
        f"^model.language_model.{NAME}",
        rf"language_model.model.{NAME}$",
        r".*\.3\.self_attn.q_proj",
        ".*q_proj",
    ],
)
def test_the_first_name_that_fits_counts_as_in_peft(pattern: str, tmp_path: Path) -> None:
    before = {"k_proj": 1, "attn.proj": 2, "^layers": 3, "q": 4, "^q_proj": 5}
    settings = read(tmp_path, alpha_pattern=before | {pattern: 6, "attn.q_proj": 7}, rank_pattern={NAME: 3})
    assert settings.alpha_of(NAME, 3) == 6
    assert settings.alpha_of("layers.3.mlp.up_proj", 8) == 16


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora=True is DoRA"),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        r"modules_to_save=\['lm_head'\] is training of whole modules",
    ),
    "bias": ({"bias": "lora_only"}, "bias='lora_only' trains biases"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True is a LoRA with biases"),
    "tokens": ({"trainable_token_indices": [5]}, r"trainable_token_indices=\[5\] is training of tokens"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\] is an activated LoRA"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora=True is QA-LoRA"),
    "replication": ({"layer_replication": [[0, 4], [2, 6]]}, "is a model with repeated layers"),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_16"},
        "init_lora_weights=pissa_niter_16 goes with base weights that were .*; save",
    ),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, "init_lora_weights=OLoRA goes with base weights"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq goes with base weights that were changed$"),
    "IA3": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA can be read"),
    "a list for a type": ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]; only LORA"),
    "another rank": ({"r": 4}, rf"{NAME} has rank 8 in {TENSORS}, and rank 4 here"),
    "no rank": ({"r": None}, "and rank None here"),
    "rank of text": ({"r": "8"}, "and rank '8' here"),
    "another rank by name": ({"rank_pattern": {"q_proj": 2}}, "and rank 2 here"),
    "rank by name of text": ({"rank_pattern": {"q_proj": "many"}}, "and rank 'many' here"),
    "alpha 0": ({"lora_alpha": 0}, f"{NAME} has lora_alpha 0; it must be"),
    "negative alpha": ({"lora_alpha": -16}, "lora_alpha -16; it must be"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha nan; it must be"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha inf; it must be"),
    "alpha beyond all": ({"lora_alpha": 10**400}, "lora_alpha 10000.*; it must be"),
    "alpha near nothing": ({"lora_alpha": 5e-324}, "lora_alpha 5e-324; it must be"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha None; it must be"),
    "alpha of text": ({"lora_alpha": "16"}, "lora_alpha '16'; it must be"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha True; it must be"),
    "alpha by name a list": ({"alpha_pattern": {"q_proj": [1]}}, r"lora_alpha \[1\]; it must be"),
    "patterns of text": ({"alpha_pattern": "q_proj"}, "alpha_pattern='q_proj' must be a mapping"),
    "patterns in a list": ({"rank_pattern": [1]}, r"rank_pattern=\[1\] must be a mapping"),
    "rsLoRA of text": ({"use_rslora": "false"}, "use_rslora='false' must be true or false"),
    "dropout of text": ({"lora_dropout": "0.1"}, "lora_dropout='0.1' must be a number"),
    "dropout 1": ({"lora_dropout": 1}, "lora_dropout=1 must be a number"),
    "dropout NaN": ({"lora_dropout": float("nan")}, "lora_dropout=nan must be a number"),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD.keys())
def test_what_is_no_plain_lora_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert re.search(words, refusal(write(tmp_path, PLAIN, **changes)))


@pytest.mark.parametrize("text", ["", "{nope", "[]", '"LORA"', "null", '{"r": 8}', "[" * 100_000, "\x00", "9" * 5000])
def test_what_is_no_configuration_is_refused(text: str, tmp_path: Path) -> None:
    assert re.search(r"not valid JSON|names no peft_type", refusal(write(tmp_path, text)))


def test_a_configuration_of_megabytes_is_not_read(tmp_path: Path) -> None:
    assert "larger than 4 MiB" in refusal(write(tmp_path, " " * (5 << 20)))


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\w+)+x",
        "(a|a)*b",
        ".*.*.*.*.*.*x",
        "(.|.)(.|.)(.|.)",
        r"(?:\w*)*\d",
        "q{1,999999}",
        "[",
        "(q_proj",
        "",
        "q|k",
        "a\n",
    ],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_could_match_for_ever_are_not_tried(key: str, pattern: str, tmp_path: Path) -> None:
    started = time.process_time()
    assert f"{key}: {pattern!r} is a regular expression; only names" in refusal(write(tmp_path, **{key: {pattern: 8}}))
    assert time.process_time() - started < 1


def test_many_names_take_little_time(tmp_path: Path) -> None:
    patterns = {rf".*\.{i}.mlp.up_proj.{'x' * 80}": 8 for i in range(4096)}
    started = time.process_time()
    settings = read(tmp_path, rank_pattern=patterns, alpha_pattern=patterns)
    for layer in range(4):
        settings.alpha_of(f"layers.{layer}.mlp.up_proj", 8)
    assert time.process_time() - started < 4
    assert "has 4097 names" in refusal(write(tmp_path, rank_pattern=patterns | {"q": 1}))


# Folders


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone").endswith("gone: no such folder")
    assert refusal(tmp_path).endswith(f"no adapter in PEFT's format: it has no {CONFIG}")


def test_the_folder_that_was_meant_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    best = write(run / "adapters" / "best")
    assert refusal(run).endswith(f"did you mean {best}?")
    adapter = write(run / "adapter")
    assert refusal(run).endswith(f"did you mean {adapter}?")
    assert refusal(adapter / CONFIG).endswith(f"is a folder; did you mean {adapter}?")
    assert refusal(tmp_path / "run" / "adapters").endswith(f"did you mean {best}?")


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    directory = write(tmp_path)
    (directory / TENSORS).rename(directory / "adapter_model.bin")
    assert f"has no {TENSORS}; adapter_model.bin is a pickle, which is not read" in refusal(directory)
