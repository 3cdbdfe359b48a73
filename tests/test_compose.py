"""How the command line's overrides become a configuration: mappings from patterns, which Hydra has no words for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from adaptax.compose import check_arguments, find_conf, read_patterns, teach_hydra
from adaptax.config import UserError

RANKS = "model.lora_rank_pattern"


def compose(*arguments: str, search: Path | None = None) -> dict[str, Any]:
    """The model's section as a command line makes it."""
    teach_hydra()
    extra = [f"hydra.searchpath=[file://{search}]"] if search else []
    with hydra.initialize_config_dir(find_conf(), version_base="1.3"):
        cfg = hydra.compose("config", [*check_arguments(list(arguments)), *extra])
    return OmegaConf.to_container(cfg, resolve=True)["model"]  # type: ignore[index,call-overload,return-value]


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ('{".*attn/.*": 8}', {".*attn/.*": 8}),
        ("{.*attn/.*: 8}", {".*attn/.*": 8}),
        ("{'.*attn/.*': 8,\".*\":4}", {".*attn/.*": 8, ".*": 4}),
        (r'{"layers/(1[0-7]|\d{1,2})/.*": 8}', {r"layers/(1[0-7]|\d{1,2})/.*": 8}),
        (r'{"layers/[^0]/(?!attn)\w+/.*$": 8}', {r"layers/[^0]/(?!attn)\w+/.*$": 8}),
        ('{"a, b: c = {d}": 1e-3, x: 2.5}', {"a, b: c = {d}": 1e-3, "x": 2.5}),
        ('{ "a" : null }', {"a": None}),
        ("{}", {}),
        ("{ }", {}),
        ("{a 8}", "{a 8}"),
        ("{a: 8 b: 4}", "{a: 8 b: 4}"),
        ("many", "many"),
    ],
)
def test_mappings_from_patterns(text: str, patterns: Any) -> None:
    assert read_patterns(text) == patterns
    assert compose(f"{RANKS}={text}")["lora_rank_pattern"] == patterns
    if isinstance(patterns, dict):
        assert list(read_patterns(text)) == list(patterns)


@pytest.mark.parametrize("prefix", ["+", "++"])
def test_a_plus_before_it_changes_nothing(prefix: str) -> None:
    model = compose(f'{prefix}{RANKS}={{".*": 8}}', 'model.lora_alpha_pattern={".*": 2.5}', "model.use_rslora=true")
    assert (model["lora_rank_pattern"], model["lora_alpha_pattern"]) == ({".*": 8}, {".*": 2.5})
    assert model["use_rslora"] is True


def test_a_file_may_have_them_and_the_command_line_replaces_them(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = 'lora_rank_pattern:\n  ".*attn/.*": 8\n  "layers/[01]/.*": 16\n'
    (tmp_path / "model" / "mine.yaml").write_text(text)
    found = compose("model=mine", search=tmp_path)["lora_rank_pattern"]
    assert list(found.items()) == [(".*attn/.*", 8), ("layers/[01]/.*", 16)]
    assert compose("model=mine", RANKS + '={".*": 4}', search=tmp_path)["lora_rank_pattern"] == {".*": 4}


@pytest.mark.parametrize(
    "argument", [RANKS + ".attn=8", RANKS + "..*attn=8", RANKS + '={".*": 8', "+" + RANKS + ".a=8"]
)
def test_what_is_no_mapping_is_told_the_form(argument: str) -> None:
    with pytest.raises(UserError) as caught:
        check_arguments([argument])
    assert f"""'{RANKS}={{".*attn/.*": 8}}'""" in str(caught.value)
    assert "\n" not in str(caught.value)
