"""``conf/`` and the dataclasses say the same, every choice composes, and the documented files and commands work."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from adaptax import cli
from adaptax.config import Config, OptimizerConfig, ScheduleConfig, build, key_paths, mesh_sizes
from adaptax.models import find_architecture, match_modules

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
GROUPS = sorted(f.name for f in dataclasses.fields(Config) if f.name != "name")
CHOICES = sorted((path.parent.name, path.stem) for group in GROUPS for path in (CONF / group).glob("*.yaml"))
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
REGEX = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"

SPECIFIED: dict[str, dict[str, Any]] = {
    "gemma3_270m": {
        "model_family": "gemma3",
        "model_size": "270m",
        "lora_rank": 32,
        "lora_alpha": 32.0,
        "lora_module_path": REGEX,
        "mesh_shape": [[1, 1], ["fsdp", "tp"]],
    },
    "gemma3_1b": {
        "model_family": "gemma3",
        "model_size": "1b",
        "lora_rank": 32,
        "lora_alpha": 32.0,
        "lora_module_path": REGEX,
        "mesh_shape": [[1, 1], ["fsdp", "tp"]],
    },
    "gemma3_4b": {
        "model_family": "gemma3",
        "model_size": "4b",
        "lora_rank": 64,
        "lora_alpha": 64.0,
        "lora_module_path": REGEX,
        "mesh_shape": [[1, 1], ["fsdp", "tp"]],
    },
}

CUSTOM = """\
# conf/model/custom.yaml
model_family: gemma3
model_size: 1b
lora_rank: 64
lora_alpha: 64.0
lora_module_path: ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"
mesh_shape: [[1, 1], ["fsdp", "tp"]]
"""

RANK_SWEEP = """\
# conf/experiment/rank_sweep.yaml
# @package _global_
training:
  num_batches: 100
"""


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A training file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    return f"data.train={path}"


def compose(*overrides: str, conf: Path = CONF) -> dict[str, Any]:
    """The composed configuration as plain values."""
    cli.teach_hydra()
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        return OmegaConf.to_container(  # type: ignore[return-value]
            hydra.compose("config", list(overrides)), resolve=True, throw_on_missing=True
        )


def read(path: Path) -> dict[str, Any]:
    """A YAML file as it stands."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def test_a_folder_per_group() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment", "hydra"}


def test_every_key_has_a_value() -> None:
    leaves = {path for path in key_paths() if path not in GROUPS}
    assert set(flatten(compose())) == leaves


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_files_hold_the_keys_of_their_dataclass(group: str, choice: str) -> None:
    known = {path.partition(".")[2] for path in key_paths() if path.startswith(f"{group}.")}
    found = set(read(CONF / group / f"{choice}.yaml"))
    assert found - {"defaults"} <= known
    if group != "model" and "defaults" not in found:  # conf/config.yaml holds what every model shares
        assert found == known


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_to_what_its_file_says(group: str, choice: str, rows: str) -> None:
    composed = compose(f"{group}={choice}", rows)
    build(composed)
    said = read(CONF / group / f"{choice}.yaml") | ({"train": composed["data"]["train"]} if group == "data" else {})
    said.pop("defaults", None)
    assert {key: composed[group][key] for key in said} == said


@pytest.mark.parametrize(("group", "section"), [("optimizer", OptimizerConfig), ("schedule", ScheduleConfig)])
def test_a_file_per_name(group: str, section: type) -> None:
    names = next(f.metadata["choices"] for f in dataclasses.fields(section) if f.name == "name")
    files = {choice: read(CONF / group / f"{choice}.yaml")["name"] for folder, choice in CHOICES if folder == group}
    assert files == {name: name for name in names}


@pytest.mark.parametrize("choice", SPECIFIED)
def test_models_are_as_specified(choice: str) -> None:
    assert read(CONF / "model" / f"{choice}.yaml") == SPECIFIED[choice]


def test_the_default_model_is_the_smallest_specified() -> None:
    composed = compose()["model"]
    assert {key: composed[key] for key in SPECIFIED["gemma3_270m"]} == SPECIFIED["gemma3_270m"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_begin_with_the_command_that_runs_them(path: Path, rows: str) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# python run_training.py +experiment={path.stem}")
    arguments = [word for word in shlex.split(first)[3:] if word != "--multirun"]
    single = [argument.partition(",")[0] for argument in arguments]  # the first of a sweep
    composed = compose(*single, *([rows] if "data.train" not in flatten(read(path)) else []))
    build(composed)
    said = {key: value for key, value in flatten(read(path)).items() if key != "defaults"}
    assert said
    assert {key: flatten(composed)[key] for key in said} == said


def test_rank_sweep_keeps_alpha_at_the_rank() -> None:
    composed = compose("+experiment=rank_sweep", "model.lora_rank=8", "model=gemma3_1b")
    assert composed["model"]["lora_alpha"] is None
    assert composed["model"]["lora_rank"] == 8
    assert composed["training"]["num_batches"] == 100


def test_quickstart_needs_nothing_from_outside() -> None:
    config = build(compose("+experiment=quickstart"))
    assert config.model.model_size == "tiny"
    assert config.data.train == "embedded:home/train.jsonl"
    assert config.data.eval == "embedded:home/eval.jsonl"


def test_custom_model_from_a_folder_of_ones_own(tmp_path: Path) -> None:
    """A real process, as a user would start it; the flag stands between the overrides."""
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "custom.yaml").write_text(CUSTOM, encoding="utf-8")
    command = [sys.executable, ROOT / "run_training.py", "training.num_batches=3", "--config-dir=mine", "model=custom"]
    done = subprocess.run([*command, "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    shown = yaml.safe_load(done.stdout)
    rest = compose()["model"]
    assert shown["model"] == rest | yaml.safe_load(CUSTOM)
    others = {"lora_dropout", "weights", "tokenizer", "dtype", "quantization", "attention"}
    others |= {"use_rslora", "lora_rank_pattern", "lora_alpha_pattern", "init_adapter"}
    assert set(shown["model"]) - set(yaml.safe_load(CUSTOM)) == others
    assert shown["training"]["num_batches"] == 3


def test_files_dropped_into_conf_as_documented(tmp_path: Path, rows: str) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "model" / "custom.yaml").write_text(CUSTOM, encoding="utf-8")
    (conf / "experiment" / "rank_sweep.yaml").write_text(RANK_SWEEP, encoding="utf-8")
    config = build(compose("model=custom", "+experiment=rank_sweep", rows, conf=conf))
    assert (config.model.model_size, config.model.lora_rank, config.model.lora_alpha) == ("1b", 64, 64.0)
    assert config.training.num_batches == 100


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.lora_rank=16", "model.lora_rank", 16),
        ("model.lora_rank=128", "model.lora_rank", 128),
        ("model.lora_alpha=${model.lora_rank}", "model.lora_alpha", 32.0),
        ("model.lora_alpha=16.0", "model.lora_alpha", 16.0),
        ('model.lora_module_path=".*"', "model.lora_module_path", ".*"),
        ("model.lora_module_path=.*einsum", "model.lora_module_path", ".*einsum"),  # what a shell leaves of the quotes
        ("model.lora_module_path=.*einsum|.*proj", "model.lora_module_path", ".*einsum|.*proj"),
        ("training.micro_batch_size=8", "training.micro_batch_size", 8),
        ("training.num_batches=100", "training.num_batches", 100),
        ('model.mesh_shape=[[2,4],["fsdp","tp"]]', "model.mesh_shape", [[2, 4], ["fsdp", "tp"]]),
        ("model.mesh_shape=[[2, 4], [fsdp, tp]]", "model.mesh_shape", [[2, 4], ["fsdp", "tp"]]),
    ],
)
def test_documented_overrides(override: str, path: str, value: Any, rows: str) -> None:
    composed = compose(override, rows)
    assert flatten(dataclasses.asdict(build(composed)))[path] == value


def test_documented_mesh_is_data_times_tensor(rows: str) -> None:
    config = build(compose('model.mesh_shape=[[2,4],["fsdp","tp"]]', rows))
    assert mesh_sizes(config.model.mesh_shape) == (2, 4)


ATTENTION = {"attn/q_einsum", "attn/kv_einsum", "attn/attn_vec_einsum"}
MLP = {"mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"}


@pytest.mark.parametrize(
    ("regex", "kinds"), [(REGEX, ATTENTION | MLP), (".*", ATTENTION | MLP), (".*einsum", ATTENTION), (".*proj", MLP)]
)
@pytest.mark.parametrize("choice", SPECIFIED)
def test_documented_regexes_match_what_they_say(choice: str, regex: str, kinds: set[str], rows: str) -> None:
    model = build(compose(f"model={choice}", f"model.lora_module_path='{regex}'", rows)).model
    arch = find_architecture(model)
    matched = match_modules(model, arch)
    assert set(matched) == kinds
    assert all(layers == tuple(range(arch.num_layers)) for layers in matched.values())
