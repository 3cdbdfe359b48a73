"""Files from elsewhere that are made to harm: each is one line that says so, runs nothing, and costs little."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import support
from adaptax.config import UserError
from adaptax.data.tokenizer import Tokenizer
from adaptax.models import ASSETS, find_architecture
from command_line import Answer

GOLDEN = Path(__file__).parent / "golden" / "text"
CONFIG: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
ROWS = "data.train=rows.jsonl"
LIMIT_BYTES, LIMIT_SECONDS = 1 << 30, 2.0


def split_checkpoint() -> tuple[dict[str, Any], bytes]:
    """The header and the data of a small checkpoint."""
    raw = (GOLDEN / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


HEADER, DATA = split_checkpoint()
START, STOP = HEADER[EMBEDDING]["data_offsets"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint: ``checkpoint(header, data, length=None)``, a header that is no dict being raw text."""

    def write(header: dict[str, Any] | str | bytes = HEADER, data: bytes = DATA, length: int | None = None) -> Path:
        text = json.dumps(header) if isinstance(header, dict) else header
        raw = text.encode() if isinstance(text, str) else text
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        file = struct.pack("<Q", len(raw) if length is None else length) + raw + data
        (tmp_path / "model.safetensors").write_bytes(file)
        return tmp_path

    return write


@pytest.fixture
def bounded() -> Iterator[None]:
    """The test may take a gigabyte more than there is now, and two seconds; else it fails, and not the machine."""
    support.make_mesh()  # jax's own start is not counted
    before, pages = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if pages.is_file():
        taken = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES, before[1]))
    started = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - started < LIMIT_SECONDS


def refusal(call: Callable[[], object], where: Path) -> str:
    """The one line of a UserError, which names the file and is not long."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert str(where) in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def changed(name: str, **values: Any) -> dict[str, Any]:
    """The header with another description of a tensor."""
    return HEADER | {name: HEADER[name] | values}


def twice(name: str, **values: Any) -> str:
    """The header with a second description of a tensor."""
    return f"{json.dumps(HEADER)[:-1]}, {json.dumps(name)}: {json.dumps(HEADER[name] | values)}}}"


SAFETENSORS: dict[str, dict[str, Any]] = {
    "header of 2**62 bytes": {"length": 2**62},
    "header of 2**64-1 bytes": {"length": 2**64 - 1},
    "header longer than the file": {"length": 2 * len(DATA)},
    "header of no bytes": {"length": 0},
    "no JSON": {"header": "{nope"},
    "no UTF-8": {"header": b"\xff\xfe" * 8},
    "a list": {"header": "[]"},
    "nested too deeply": {"header": '{"a":' * 100_000},
    "nothing in it": {"header": "{}"},
    "a pickle": {"header": pickle.dumps({"a": 1}), "length": 0x80},
    "negative shape": {"header": changed(EMBEDDING, shape=[-1, 32])},
    "fractional shape": {"header": changed(EMBEDDING, shape=[1.5, 32])},
    "shape of text": {"header": changed(EMBEDDING, shape="32")},
    "shape of 2**124 numbers": {"header": changed(EMBEDDING, shape=[2**62, 2**62])},
    "shape of 10**40 rows": {"header": changed(EMBEDDING, shape=[10**40, 32])},
    "shape of another size": {"header": changed(EMBEDDING, shape=[3, 5])},
    "unknown type": {"header": changed(EMBEDDING, dtype="OBJECT")},
    "type of number": {"header": changed(EMBEDDING, dtype=3)},
    "overlapping offsets": {"header": changed(NORM, data_offsets=[START, START + 128])},
    "offsets outside the file": {"header": changed(EMBEDDING, data_offsets=[len(DATA), len(DATA) + STOP - START])},
    "offsets of 2**62": {"header": changed(EMBEDDING, data_offsets=[2**62, 2**62 + STOP - START])},
    "negative offsets": {"header": changed(EMBEDDING, data_offsets=[-4, STOP - 4])},
    "offsets from end to start": {"header": changed(EMBEDDING, data_offsets=[STOP, START])},
    "a name twice": {"header": twice(NORM, data_offsets=[START, START + 128])},
    "a name twice, of two types": {"header": twice(NORM, dtype="F64")},
    "metadata that is no text": {"header": HEADER | {"__metadata__": {"format": ["x"]}}},
    "more data than described": {"data": DATA + b"\0" * 8},
    "less data than described": {"data": DATA[:-8]},
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_that_lie_about_themselves(checkpoint: Callable[..., Path], name: str) -> None:
    folder = checkpoint(**SAFETENSORS[name])
    message = refusal(lambda: support.open_checkpoint(folder), folder)
    assert message.startswith(f"{folder / 'model.safetensors'} cannot be read: ")


@pytest.mark.usefixtures("bounded")
def test_a_header_of_200_megabytes_is_not_read(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("{", b"", 200 << 20)
    os.truncate(folder / "model.safetensors", 8 + (200 << 20))  # it is as long as it says, with a hole in it
    assert "header too large" in refusal(lambda: support.open_checkpoint(folder), folder)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"dtype": "F4", "shape": [1536, 32]}, f"{EMBEDDING} is [1536, 32], not [192, 32]"),
        ({"dtype": "I32"}, f"{EMBEDDING} is of type I32, not F32, BF16 or F16"),
        ({"shape": [32, 192]}, f"{EMBEDDING} is [32, 192], not [192, 32]"),
        ({"shape": [6144]}, f"{EMBEDDING} is [6144], not [192, 32]"),
    ],
)
def test_tensors_that_are_not_the_models(checkpoint: Callable[..., Path], tensor: dict[str, Any], words: str) -> None:
    folder = checkpoint(changed(EMBEDDING, **tensor))
    assert words in refusal(lambda: support.open_checkpoint(folder), folder)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("dtype", "width"), [("F4", 0.5), ("F8_E4M3", 1), ("F8_E8M0", 1), ("BOOL", 1), ("C64", 8)])
def test_a_second_head_of_a_foreign_type(checkpoint: Callable[..., Path], dtype: str, width: float) -> None:
    """numpy has not all of these types."""
    size = int(math.prod(HEADER[EMBEDDING]["shape"]) * width)
    head = HEADER[EMBEDDING] | {"dtype": dtype, "data_offsets": [len(DATA), len(DATA) + size]}
    folder = checkpoint(HEADER | {"lm_head.weight": head}, DATA + bytes(size))
    assert f"lm_head.weight is of type {dtype}, not F32" in refusal(lambda: support.open_checkpoint(folder), folder)


@pytest.mark.usefixtures("bounded")
def test_names_of_any_length_make_no_long_line(checkpoint: Callable[..., Path]) -> None:
    tensors = {f"{'x' * 100_000}{place}": HEADER[NORM] | {"shape": [0], "data_offsets": [0, 0]} for place in range(3)}
    folder = checkpoint(HEADER | tensors)
    assert "3 of its tensors are wrong: unexpected xxx" in refusal(lambda: support.open_checkpoint(folder), folder)


@pytest.mark.usefixtures("bounded")
def test_a_tensor_in_two_files_is_not_chosen_from(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    save_file({NORM: load_file(GOLDEN / "model.safetensors")[NORM] + np.float32(1)}, folder / "other.safetensors")
    message = refusal(lambda: support.open_checkpoint(folder), folder)
    assert message.startswith(f"{NORM} is in {folder / 'model.safetensors'} and in {folder / 'other.safetensors'}")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ('"../x.safetensors"', "must not leave the directory"),
        ('"/etc/passwd"', "must not leave the directory"),
        ('"a/../../x.safetensors"', "must not leave the directory"),
        ('"."', "must not leave the directory"),
        ('".."', "not a valid index: '..' is not the name of a safetensors file"),
        ('""', "not a valid index: '' is not the name of a safetensors file"),
        ('"config.json"', "not a valid index: 'config.json' is not the name of a safetensors file"),
        ('"x\\u0000.safetensors"', "not a valid index: 'x\\x00.safetensors' is not the name"),
        ('"\\ud800.safetensors"', "not a valid index: '\\ud800.safetensors' is not the name"),
        ('"\\u001b[2J.safetensors"', "not a valid index: '\\x1b[2J.safetensors' is not the name"),
        (f'"{"x" * 100_000}"', "is not the name of a safetensors file"),
        ("3", "not a valid index: 3 is not the name of a safetensors file"),
        ("null", "not a valid index: None is not the name of a safetensors file"),
        ('["x"]', "not a valid index"),
        ("[" * 100_000, "not a valid index"),
        ('"gone.safetensors"', "gone.safetensors cannot be read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_index_that_names_other_files(checkpoint: Callable[..., Path], names: str, words: str) -> None:
    folder = checkpoint()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": {names}}}}}')
    assert words in refusal(lambda: support.open_checkpoint(folder), folder)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_folders_in_place_of_files(checkpoint: Callable[..., Path], name: str) -> None:
    folder = checkpoint()
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    refusal(lambda: support.open_checkpoint(folder), folder / name)


NUMBERS = ("hidden_size", "intermediate_size", "head_dim", "vocab_size", "num_attention_heads", "num_hidden_layers")
DEEP = "[" * 100_000
CONFIGS: list[tuple[str | dict[str, Any], str]] = [
    *(({key: 10**12}, f"{key} must be a whole number up to") for key in NUMBERS),
    *(({key: 1.5}, f"{key} must be a whole number up to") for key in NUMBERS),
    *(({key: math.nan}, f"{key} must be a number above 0, not nan") for key in (*NUMBERS, "rms_norm_eps")),
    *(({key: math.inf}, f"{key} must be a ") for key in (*NUMBERS, "query_pre_attn_scalar")),
    *(({"hidden_size": value}, "hidden_size must be") for value in ("32", [32], {"a": 32}, True, None, -32, 0)),
    ({"hidden_size": "x" * 100_000}, "hidden_size must be a number above 0, not 'xxx"),
    ({"num_hidden_layers": 10**12, "layer_types": None}, "num_hidden_layers must be a whole number up to 1,000"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number up to 1"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    *(
        ({"layer_types": None, "sliding_window_pattern": value}, "sliding_window_pattern must be a ")
        for value in (0, -1, 1.5, "6", math.nan, [6], 10**12)
    ),
    *(({"layer_types": value}, "") for value in ("full_attention", 8, [[]] * 8, {"a": 1}, ["x"] * 8)),
    *(({"rope_parameters": value}, "") for value in ("x", [1], {"full_attention": 3}, {"full_attention": "xy"})),
    *(
        ({"rope_parameters": {"full_attention": {"rope_theta": value}}}, "rope_theta must be a number")
        for value in (math.nan, math.inf, -1, 0, "1e6", 10**400)
    ),
    ({"rope_parameters": {"full_attention": {"rope_type": ["x" * 10_000]}}}, "rope_type ['xxx"),
    ({"rope_scaling": {"factor": math.nan, "rope_type": "linear"}}, "factor must be a number above 0, not nan"),
    ({"hidden_activation": "x" * 10_000}, "hidden_activation=xxx"),
    ({"model_type": ["x" * 10_000]}, "model_type is ['xxx"),
    ({"model_type": "gemma3", "text_config": None}, "text_config must hold the numbers of the text model, not None"),
    ({"model_type": "gemma3", "text_config": [1]}, "text_config must hold the numbers of the text model, not [1]"),
    (DEEP, "not a valid config.json"),
    (f'{{"model_type": "gemma3_text", "a": {DEEP}', "not a valid config.json"),
    (f'{{"model_type": "gemma3_text", "hidden_size": {"9" * 100_000}}}', "not a valid config.json"),
    *((text, "not a valid config.json") for text in ("", "[]", "3", "null", '"gemma3"', "\0" * 100)),
]


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("config", "words"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_config_of_nonsense(config: str | dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(CONFIG | config))
    assert words in refusal(lambda: find_architecture(support.model_config(tmp_path)), path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("sprung",)


@pytest.mark.usefixtures("bounded")
def test_tokenizers_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, draw = tmp_path / "tokenizer.model", random.Random(0)
    noise = [draw.randbytes(size) for size in (1, 10, 100, 1000, 10_000, 1_000_000)]
    claims = [
        b"\x0a\xff\xff\xff\xff\x07",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 100,
    ]
    # Two lengths of a piece that the file has not, and what is nested without an end.
    for content in (pickle.dumps(Trap()), *noise, *claims, b"\x0a" * 100_000, b"\x0b" * 100_000):
        path.write_bytes(content)
        assert "is not a sentencepiece model" in refusal(lambda: Tokenizer(path), path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.usefixtures("bounded")
def test_tokenizers_that_were_changed_at_random(tmp_path: Path) -> None:
    """Either they work or they are refused."""
    path, draw = tmp_path / "tokenizer.model", random.Random(1)
    good = (ASSETS / "gemma3_tiny" / "tokenizer.model").read_bytes()
    refused = 0
    for _ in range(200):
        content = bytearray(good)
        content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            tokenizer = Tokenizer(path)
        except UserError:
            refused += 1
        else:
            tokenizer.decode(tokenizer.encode("Turn the lamp off."))
            tokenizer.show(list(range(tokenizer.vocab_size)))
    assert 0 < refused < 200


def expect_refusal(home: Path, answer: Answer, words: str) -> None:
    """Exit code 1 and one line with the words; no trap was sprung."""
    assert answer.code == 1, answer.err
    assert "Traceback" not in answer.err
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert len(lines[0]) < 1000
    assert not (home / "sprung").exists()
    assert answer.seconds < 30


TRAP = "{_target_: os.mkdir, path: sprung}"
GLOBAL = "# @package _global_\n"
YAML = [
    ("model", "lora_rank: !!python/object/apply:os.mkdir [sprung]\n", "python/object/apply:os.mkdir"),
    ("model", f"lora_rank: {TRAP}\n", "model.lora_rank"),
    ("model", "lora_rank: 8\n_target_: os.mkdir\npath: sprung\n", "unknown key model._target_"),
    ("experiment", f"{GLOBAL}hydra: {{callbacks: {{trap: {TRAP}}}}}\n", "hydra.callbacks.trap._target_=os.mkdir"),
    (
        "experiment",
        f'{GLOBAL}hydra: {{job_logging: {{handlers: {{trap: {{"()": os.mkdir, path: sprung}}}}}}}}\n',
        "hydra.job_logging.handlers.trap.()=os.mkdir",
    ),
    ("model", f"lora_rank: {'[' * 1500}{']' * 1500}\n", "nested too deeply"),
]


@pytest.mark.parametrize(("group", "text", "words"), YAML, ids=["tag", "value", "group", "callback", "logging", "deep"])
def test_conf_files_run_nothing(run: Callable[..., Answer], home: Path, group: str, text: str, words: str) -> None:
    (home / "mine" / group).mkdir(parents=True)
    (home / "mine" / group / "mine.yaml").write_text(text)
    choice = f"{'+' * (group == 'experiment')}{group}=mine"
    expect_refusal(home, run("--config-dir=mine", choice, ROWS, "model.weights=gone"), words)


def test_overrides_run_nothing(run: Callable[..., Answer], home: Path) -> None:
    answer = run(ROWS, f"+hydra.callbacks.trap={TRAP.replace(': ', ':')}", "model.weights=gone")
    expect_refusal(home, answer, "hydra.callbacks.trap._target_=os.mkdir")


def test_a_config_of_too_many_layers_on_the_command_line(run: Callable[..., Answer], home: Path) -> None:
    (home / "base").mkdir()
    (home / "base" / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 10**12, "layer_types": None}))
    answer = run(ROWS, "model.weights=base", "model.model_size=auto")
    expect_refusal(home, answer, "base/config.json: num_hidden_layers must be a whole number up to 1,000")
    assert not answer.imported_jax


def test_a_tokenizer_that_is_a_pickle_on_the_command_line(run: Callable[..., Answer], home: Path) -> None:
    (home / "tokenizer.model").write_bytes(pickle.dumps(Trap()))
    answer = run("preview", ROWS, "model=gemma3_tiny", "model.tokenizer=tokenizer.model")
    expect_refusal(home, answer, "tokenizer.model is not a sentencepiece model")


def test_weights_with_a_header_of_2_62_bytes_on_the_command_line(run: Callable[..., Answer], home: Path) -> None:
    (home / "base").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (home / "base" / name).write_bytes((ASSETS / "gemma3_tiny" / name).read_bytes())
    (home / "base" / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    arguments = ["model=gemma3_tiny", "model.weights=base", "training=default", "data.eval=rows.jsonl"]
    answer = run(ROWS, *arguments, "hydra.run.dir=out")
    assert answer.code == 1
    assert "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].startswith("error: base/model.safetensors cannot be read: ")
    assert not list((home / "out").rglob("*.safetensors"))
