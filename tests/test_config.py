"""What ``config.build`` takes and what it refuses, and in which words."""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from adaptax import cli
from adaptax.config import Config, UserError, build, check_divisible, key_paths, mesh_sizes
from adaptax.schema import one_of, unknown_key

Values = dict[str, Any]
AXES = ["fsdp", "tp"]


@pytest.fixture(scope="module")
def defaults() -> Values:
    """The shipped defaults as plain values."""
    cli.teach_hydra()
    with hydra.initialize_config_dir(cli.find_conf(), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config"), resolve=True)  # type: ignore[return-value]


@pytest.fixture
def values(defaults: Values, tmp_path: Path) -> Values:
    """The defaults with a training file: what ``build`` accepts."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    changed = copy.deepcopy(defaults)
    changed["data"]["train"] = str(tmp_path / "rows.jsonl")
    return changed


def put(values: Values, path: str, value: Any) -> Values:
    """Sets one key, named by its dotted path."""
    *groups, leaf = path.split(".")
    for group in groups:
        values = values[group]
    values[leaf] = value
    return values


def refusal(values: Values) -> str:
    """What ``build`` says of wrong values: one line."""
    with pytest.raises(UserError) as caught:
        build(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leaves() -> dict[str, Any]:
    """Every key that is not a group -> its type."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{key}": kind for key, kind in typing.get_type_hints(hint).items()}
        else:
            found[name] = hint
    return found


def keys_of(kind: type) -> list[str]:
    """The keys of that type, optional or not."""
    return [path for path, hint in leaves().items() if hint is kind or kind in typing.get_args(hint)]


def test_good_values_become_dataclasses(values: Values) -> None:
    config = build(values)
    assert dataclasses.asdict(config) == values
    assert config.model.lora_alpha is None or isinstance(config.model.lora_alpha, float)


def test_whole_number_where_a_number_is_due_becomes_one(values: Values) -> None:
    put(values, "model.lora_alpha", 16)
    alpha = build(values).model.lora_alpha
    assert alpha == 16.0
    assert isinstance(alpha, float)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.lora_rank", 1),
        ("model.lora_alpha", None),
        ("model.lora_dropout", 0.0),
        ("model.lora_dropout", 0.99),
        ("training.seed", 0),
        ("training.seed", 2**32 - 1),
        ("training.num_batches", 1),
        ("training.num_batches", None),
        ("training.exact_match_rows", 0),
        ("data.eval_fraction", 0.0),
        ("data.max_length", 8),
        ("schedule.final_fraction", 1.0),
        ("optimizer.max_grad_norm", None),
        ("optimizer.loraplus_lr_ratio", None),
        ("optimizer.loraplus_lr_ratio", 16.0),
        ("model.dtype", "bfloat16"),
    ],
)
def test_edges_are_accepted(values: Values, path: str, value: Any) -> None:
    put(values, path, value)
    built: Any = build(values)
    for name in path.split("."):
        built = getattr(built, name)
    assert built == value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.lora_rank", 0, "at least 1, not 0"),
        ("model.lora_rank", -1, "at least 1, not -1"),
        ("model.lora_alpha", 0.0, "more than 0, not 0.0"),
        ("model.lora_alpha", -16.0, "more than 0, not -16.0"),
        ("model.lora_dropout", -0.1, "at least 0, not -0.1"),
        ("model.lora_dropout", 1.0, "at most 0.99, not 1.0"),
        ("data.eval_fraction", 0.95, "at most 0.9, not 0.95"),
        ("data.eval_fraction", -0.5, "at least 0, not -0.5"),
        ("data.max_length", 7, "at least 8, not 7"),
        ("data.prefetch_batches", 0, "at least 1, not 0"),
        ("optimizer.learning_rate", 0.0, "more than 0, not 0.0"),
        ("optimizer.learning_rate", -1e-4, "more than 0, not -0.0001"),
        ("optimizer.weight_decay", -0.1, "at least 0, not -0.1"),
        ("optimizer.beta1", 1.5, "at most 1, not 1.5"),
        ("optimizer.beta2", -0.5, "at least 0, not -0.5"),
        ("optimizer.eps", 0.0, "more than 0, not 0.0"),
        ("optimizer.max_grad_norm", 0.0, "more than 0, not 0.0"),
        ("optimizer.loraplus_lr_ratio", 0.0, "more than 0, not 0.0"),
        ("schedule.warmup_steps", -1, "at least 0, not -1"),
        ("schedule.final_fraction", 1.01, "at most 1, not 1.01"),
        ("training.micro_batch_size", 0, "at least 1, not 0"),
        ("training.gradient_accumulation_steps", 0, "at least 1, not 0"),
        ("training.num_batches", 0, "at least 1, not 0"),
        ("training.num_epochs", 0, "at least 1, not 0"),
        ("training.eval_every_steps", 0, "at least 1, not 0"),
        ("training.exact_match_rows", -1, "at least 0, not -1"),
        ("training.max_nonfinite", 0, "at least 1, not 0"),
        ("training.seed", -1, "at least 0, not -1"),
        ("training.seed", 2**32, "at most 4294967295, not 4294967296"),
        ("checkpoint.every_steps", 0, "at least 1, not 0"),
        ("checkpoint.keep", 0, "at least 1, not 0"),
        ("logging.every_steps", 0, "at least 1, not 0"),
    ],
)
def test_values_out_of_range(values: Values, path: str, value: Any, words: str) -> None:
    put(values, path, value)
    assert refusal(values) == f"{path} must be {words}"


@pytest.mark.parametrize("path", keys_of(int))
@pytest.mark.parametrize("value", [True, 2.0, "8", [8]])
def test_whole_numbers_are_nothing_else(values: Values, path: str, value: Any) -> None:
    put(values, path, value)
    assert refusal(values) == f"{path} must be a whole number, not {value!r}"


@pytest.mark.parametrize("path", keys_of(float))
@pytest.mark.parametrize("value", [True, "0.5", [0.5]])
def test_numbers_are_nothing_else(values: Values, path: str, value: Any) -> None:
    put(values, path, value)
    assert refusal(values) == f"{path} must be a number, not {value!r}"


@pytest.mark.parametrize("path", keys_of(float))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(values: Values, path: str, value: float) -> None:
    put(values, path, value)
    assert refusal(values) == f"{path} must be finite, not {value}"


@pytest.mark.parametrize("path", keys_of(bool))
@pytest.mark.parametrize("value", [1, 0, "true"])
def test_flags_are_true_or_false(values: Values, path: str, value: Any) -> None:
    put(values, path, value)
    assert refusal(values) == f"{path} must be true or false, not {value!r}"


@pytest.mark.parametrize("path", keys_of(str))
@pytest.mark.parametrize("value", [3, True, ["a"]])
def test_texts_are_nothing_else(values: Values, path: str, value: Any) -> None:
    put(values, path, value)
    assert refusal(values) == f"{path} must be a text, not {value!r}"


NULLABLE = ("data.eval", "data.mixture", "data.columns", "data.filter", "evaluation.metric")


def test_null_only_where_it_means_something(values: Values) -> None:
    for path, hint in leaves().items():
        changed = copy.deepcopy(values)
        put(changed, path, None)
        if type(None) in typing.get_args(hint) or path in NULLABLE:
            build(changed)
        else:
            assert path in refusal(changed)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.dtype", "float16", "did you mean bfloat16? it is one of auto, float32, bfloat16"),
        ("optimizer.name", "adam", "did you mean adamw? it is one of adamw, lion, adafactor, sgd"),
        ("schedule.name", "cosin", "did you mean cosine? it is one of constant, linear, cosine"),
        ("data.overlong", "cut", "it is one of truncate, split, drop"),
        ("data.supervise", "asistant", "did you mean assistant? it is one of assistant, last_assistant, all"),
        ("logging.progress", "none", "it is one of auto, bar, lines, off"),
    ],
)
def test_choices(values: Values, path: str, value: str, words: str) -> None:
    put(values, path, value)
    assert refusal(values) == f"{path}={value}: {words}"


def test_unknown_keys_with_the_closest_known_one(values: Values) -> None:
    put(values, "model.lora_rnak", 8)
    assert refusal(values) == "unknown key model.lora_rnak: did you mean model.lora_rank?"


@pytest.mark.parametrize("path", ["trianing", "data.shufle"])
def test_unknown_keys_are_refused_even_when_null(values: Values, path: str) -> None:
    put(values, path, None)
    assert refusal(values).startswith(f"unknown key {path}: did you mean ")


def test_missing_keys_and_groups(values: Values) -> None:
    del values["model"]["lora_rank"]
    del values["logging"]
    assert refusal(values) == "model.lora_rank is missing; logging is missing"


@pytest.mark.parametrize("value", [None, 3, "gemma3_1b", ["gemma3_1b"]])
def test_groups_are_groups(values: Values, value: Any) -> None:
    values["model"] = value
    assert refusal(values) == f"model must be a group of keys, not {value!r}"


def test_every_mistake_is_named_at_once(values: Values) -> None:
    put(values, "model.lora_rnak", 8)
    put(values, "model.lora_rank", 0)
    put(values, "model.mesh_shape", [[1, 1], ["data", "tp"]])
    put(values, "model.lora_module_path", "(")
    put(values, "data.train", 3)
    put(values, "data.min_length", 2000)
    put(values, "optimizer.learning_rate", math.nan)
    put(values, "training.seed", "one")
    del values["training"]["num_epochs"]
    told = refusal(values)
    for words in (
        "unknown key model.lora_rnak",
        "model.lora_rank must be at least 1",
        "not data, tp",
        "model.lora_module_path='(' is not a regular expression",
        "data.train must be a file or a list of files, not 3",
        "data.min_length=2000 is more than data.max_length=",
        "optimizer.learning_rate must be finite",
        "training.seed must be a whole number",
        "training.num_epochs is missing",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ([[1, 1], ["fsdp", "tp"]], (1, 1)),
        ([[2, 4], ["fsdp", "tp"]], (2, 4)),
        ([[2, 4], ["tp", "fsdp"]], (4, 2)),
    ],
)
def test_mesh_shapes_in_either_order(values: Values, shape: Any, sizes: tuple[int, int]) -> None:
    put(values, "model.mesh_shape", shape)
    assert mesh_sizes(build(values).model.mesh_shape) == sizes


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (None, "not None"),
        (4, "not 4"),
        ("[[1, 1], [fsdp, tp]]", "not [[1, 1]"),
        ({"fsdp": 1, "tp": 1}, "not {'fsdp': 1"),
        ([], "not []"),
        ([2, 4], "not [2, 4]"),
        ([[2, 4]], "not [[2, 4]]"),
        ([[2, 4], AXES, []], "not [[2, 4]"),
        ([[2], ["fsdp"]], "not [[2], ['fsdp']]"),
        ([[2, 2, 2], ["fsdp", "tp", "dp"]], "not [[2, 2, 2]"),
        ([[2, 4, 1], AXES], "not [[2, 4, 1]"),
        ([AXES, [2, 4]], "the axis names are fsdp and tp, not 2, 4"),
        ([[2, 4], ["data", "tp"]], "the axis names are fsdp and tp, not data, tp"),
        ([[2, 4], ["tp", "tp"]], "the axis names are fsdp and tp, not tp, tp"),
        ([[2, 4], ["FSDP", "tp"]], "the axis names are fsdp and tp, not FSDP, tp"),
        ([[2, 4], [None, None]], "the axis names are fsdp and tp, not None, None"),
        ([[0, 1], AXES], "the sizes are whole numbers from 1, not [0, 1]"),
        ([[-1, 1], AXES], "the sizes are whole numbers from 1, not [-1, 1]"),
        ([[1.0, 1], AXES], "the sizes are whole numbers from 1, not [1.0, 1]"),
        ([[True, 1], AXES], "the sizes are whole numbers from 1, not [True, 1]"),
        ([["2", 1], AXES], "the sizes are whole numbers from 1, not ['2', 1]"),
        ([[None, 1], AXES], "the sizes are whole numbers from 1, not [None, 1]"),
    ],
)
def test_bad_mesh_shapes(values: Values, shape: Any, words: str) -> None:
    put(values, "model.mesh_shape", shape)
    told = refusal(values)
    assert told.startswith('model.mesh_shape must be [[fsdp, tp], ["fsdp", "tp"]], such as [[2, 4], ["fsdp", "tp"]]')
    assert words in told


@pytest.mark.parametrize("pattern", ["(", "[a", "*proj", "q_einsum)", "a{2,1}"])
def test_regex_that_does_not_compile(values: Values, pattern: str) -> None:
    put(values, "model.lora_module_path", pattern)
    assert refusal(values).startswith(f"model.lora_module_path={pattern!r} is not a regular expression: ")


@pytest.mark.parametrize("key", ["model.lora_rank_pattern", "model.lora_alpha_pattern"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, 'must be a mapping such as {".*attn/.*": 8}, not None'),
        (8, 'must be a mapping such as {".*attn/.*": 8}, not 8'),
        ("{a 8}", "must be a mapping such as {\".*attn/.*\": 8}, not '{a 8}'"),
        ([8], 'must be a mapping such as {".*attn/.*": 8}, not [8]'),
        ({"(": 8}, "'(' is not a regular expression: "),
        ({0: 8}, "0 is not a regular expression; put it in quotes"),
        ({"a": 0}, "'a' must have a {kind}, not 0"),
        ({"a": -1}, "'a' must have a {kind}, not -1"),
        ({"a": None}, "'a' must have a {kind}, not null"),
        ({"a": True}, "'a' must have a {kind}, not True"),
        ({"a": "8"}, "'a' must have a {kind}, not '8'"),
        ({"a": math.nan}, "'a' must have a {kind}, not nan"),
        ({"a": math.inf}, "'a' must have a {kind}, not inf"),
    ],
)
def test_patterns_that_cannot_be(values: Values, key: str, value: Any, words: str) -> None:
    put(values, key, value)
    kind = "whole number from 1" if "rank" in key else "number above 0"
    separator = " " if words.startswith("must") else ": "
    assert refusal(values).startswith(key + separator + words.replace("{kind}", kind))


def test_every_wrong_pattern_is_named_and_an_alpha_need_not_be_whole(values: Values) -> None:
    patterns = {"a": 2.5, "b": 8, "[": 4}
    put(values, "model.lora_rank_pattern", patterns)
    put(values, "model.lora_alpha_pattern", {"a": 2.5, "b": 8})
    told = refusal(values)
    assert told.count("; ") == 1
    assert "model.lora_rank_pattern: 'a' must have a whole number from 1, not 2.5" in told
    assert "'[' is not a regular expression" in told


SIZES = {"N": 8, "F": 96, "V": 1000, "D": 640}


@pytest.mark.parametrize("shape", [[[1, 1], AXES], [[5, 8], AXES], [[8, 5], ["tp", "fsdp"]]])
def test_meshes_that_divide(shape: Any) -> None:
    check_divisible(SIZES, shape)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([[1, 3], AXES], "tp=3 does not divide the model's 8 query heads; tp=2 does"),
        ([[3, 1], ["tp", "fsdp"]], "tp=3 does not divide the model's 8 query heads; tp=2 does"),
        ([[1, 16], AXES], "tp=16 does not divide the model's 8 query heads; tp=8 does"),
        ([[3, 1], AXES], "fsdp=3 does not divide the model's 640 hidden width; fsdp=2 does"),
        ([[7, 1], AXES], "fsdp=7 does not divide the model's 640 hidden width; fsdp=5 does"),
    ],
)
def test_meshes_that_do_not_divide(shape: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_divisible(SIZES, shape)
    assert str(caught.value) == f"model.mesh_shape: {words}"


@pytest.mark.parametrize(
    ("axis", "size", "words"), [("F", 94, "tp=4 does not divide the model's 94 mlp width"), ("V", 1001, "vocabulary")]
)
def test_mlp_and_vocabulary_are_divided_too(axis: str, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_divisible(SIZES | {axis: size}, [[1, 4], AXES])


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "{key} must be a file or a list of files, not []"),
        ([3], "{key} must be a file or a list of files, not [3]"),
        (3, "{key} must be a file or a list of files, not 3"),
        ({"a": 1}, "{key} must be a file or a list of files, not {{'a': 1}}"),
    ],
)
def test_what_names_no_files(values: Values, key: str, value: Any, words: str) -> None:
    put(values, key, value)
    assert refusal(values) == words.format(key=key)


def test_training_rows_must_be_named(values: Values) -> None:
    put(values, "data.train", None)
    assert refusal(values).startswith("data.train is not set: data.train=chats.jsonl, or +experiment=quickstart")


@pytest.mark.parametrize(
    ("path", "close"),
    [
        ("model.lora_rnak", "model.lora_rank"),
        ("modle.lora_rank", "model.lora_rank"),
        ("lora_rank", "model.lora_rank"),
        ("model.rank", "model.lora_rank"),
        ("model.lora_rank.x", "model.lora_rank"),
        ("model.learning_rate", "optimizer.learning_rate"),
        ("training.max_length", "data.max_length"),
        ("training.num_bathces", "training.num_batches"),
        ("training.epochs", "training.num_epochs"),
        ("modl", "model"),
        ("trianing", "training"),
    ],
)
def test_closest_key(path: str, close: str) -> None:
    assert unknown_key(path, key_paths()) == f"unknown key {path}: did you mean {close}?"


@pytest.mark.parametrize("path", ["xyz", "training.nm", "optimizer.lr"])
def test_no_key_is_close(path: str) -> None:
    assert unknown_key(path, key_paths()) == f"unknown key {path}: see --cfg job for every key"


def test_closest_choice() -> None:
    assert one_of("gemma3_1bb", ["gemma3_1b", "gemma3_4b"]) == (
        "did you mean gemma3_1b? it is one of gemma3_1b, gemma3_4b"
    )
    assert one_of("llama", ["gemma3_1b", "gemma3_4b"]) == "it is one of gemma3_1b, gemma3_4b"


def test_documented_keys_exist() -> None:
    documented = ("model_family", "model_size", "lora_rank", "lora_alpha", "lora_module_path", "mesh_shape")
    paths = {f"model.{key}" for key in documented} | {"training.micro_batch_size", "training.num_batches"}
    assert paths <= set(key_paths())
