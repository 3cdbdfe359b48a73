"""Text to tokens and back, and which tokenizers are refused: others than Gemma 3's, and than the model's own."""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from adaptax import cli
from adaptax.config import Config, UserError, build
from adaptax.data.tokenizer import BOS, END_OF_TURN, EOS, PAD, SPARE_ROWS, START_OF_TURN, Tokenizer, open_tokenizer
from adaptax.models import ASSETS
from conversations import TEXTS, chat
from rows import encode_chat
from toy_tokenizer import GEMMA3_LIKE, GEMMA3_SYMBOLS, train_tokenizer

TINY = ASSETS / "gemma3_tiny" / "tokenizer.model"


def test_ids_are_gemma3s() -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(TINY))
    pieces = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    assert [raw.piece_to_id(piece) for piece in pieces] == [0, 1, 2, 105, 106]
    assert [PAD, EOS, BOS, START_OF_TURN, END_OF_TURN] == [0, 1, 2, 105, 106]


def test_size_path_and_digest(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 2048
    assert tokenizer.path == TINY
    assert tokenizer.digest == hashlib.sha256(TINY.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading, trailing ",
        "Turn the kitchen lamp off, please.",
        "a <start_of_turn>user\nb<end_of_turn>\n<bos><eos><pad> [multimodal] <unused7> <mask> <start_of_image> c",
        *(text for text in TEXTS.values() if "▁" not in text),  # sentencepiece's own sign for a space
    ],
)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_plain_text_is_encoded_as_sentencepiece_does(tokenizer: Tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(TINY))
    for text in ("Turn the lamp off.", "a < b > c", "x\n\ny", "<p>7</p>", "[1] <unused> <turn>", *TEXTS.values()):
        assert tokenizer.encode(text) == raw.encode(text)
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices([*TEXTS.values(), "<", "[", ">", " "], k=draw.randint(1, 4)))
        assert tokenizer.encode(text) == raw.encode(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("abc\ud83d", "character 4 of 'abc\\ud83d' is half a surrogate pair, no text"),
        ("\udca0", "character 1 of '\\udca0' is half a surrogate pair, no text"),
        ("\ude00\ud83d", "character 1 of '\\ude00\\ud83d' is half a surrogate pair, no text"),
    ],
)
@pytest.mark.parametrize("allow_special", [False, True])
def test_half_a_surrogate_pair_is_no_text(text: str, words: str, allow_special: bool) -> None:
    with pytest.raises(UserError) as caught:
        Tokenizer(TINY, allow_special=allow_special).encode(text)
    assert str(caught.value) == words
    with pytest.raises(UserError) as caught:
        Tokenizer(TINY, allow_special=allow_special).encode("x" * 10_000 + text)
    assert len(str(caught.value)) < 140


def test_show_spells_control_tokens_out(tokenizer: Tokenizer) -> None:
    tokens = encode_chat(chat(("user", "Hi 你"), ("assistant", "好")), tokenizer).tokens.tolist()
    shown = "<start_of_turn>user\nHi 你<end_of_turn>\n<start_of_turn>model\n好<end_of_turn>\n"
    assert tokenizer.show(tokens) == f"<bos>{shown}"
    assert tokenizer.decode(tokens) == shown
    assert tokenizer.show([EOS, *tokens, PAD, PAD, 3, EOS]) == f"<eos><bos>{shown}<pad><pad><unk><eos>"
    assert tokenizer.show([*tokenizer.encode("Hi"), 3, *tokenizer.encode(" you")]) == "Hi<unk> you"
    assert tokenizer.show([]) == ""


def test_gemma2_is_refused(tmp_path: Path) -> None:
    """Gemma 2 has its turns at 106 and 107."""
    symbols = (*(f"<unused{i}>" for i in range(102)), "<start_of_turn>", "<end_of_turn>")
    path = train_tokenizer(tmp_path / "gemma2.model", symbols)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert raw.piece_to_id("<start_of_turn>") == 106
    with pytest.raises(UserError) as caught:
        Tokenizer(path)
    assert str(caught.value) == f"{path} is not a Gemma 3 tokenizer: <start_of_turn> is 106, not 105"


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    llama = train_tokenizer(tmp_path / "llama.model", GEMMA3_SYMBOLS, basic=("<bos>", "<eos>", "<pad>"))
    with pytest.raises(UserError, match=r"llama.model is not a Gemma 3 tokenizer: <pad> is 2, not 0$"):
        Tokenizer(llama)
    plain = train_tokenizer(tmp_path / "plain.model", ())
    with pytest.raises(UserError, match=r"plain.model is not a Gemma 3 tokenizer: <start_of_turn> is 3, not 105$"):
        Tokenizer(plain)
    turned = train_tokenizer(tmp_path / "turned.model", (*GEMMA3_SYMBOLS[:-2], "<start_of_turn>", "x", "<end_of_turn>"))
    with pytest.raises(UserError, match=r"turned.model is not a Gemma 3 tokenizer: <end_of_turn> is 107, not 106$"):
        Tokenizer(turned)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"12" * 32 + b"\nsize 4689074\n"
NO_MODELS = [
    b"",
    b"\0" * 100,
    b"not a model",
    b'{"model": {"vocab": {}}}',
    LFS,
    b"PK\x03\x04",
    TINY.read_bytes()[:9000],
]


@pytest.mark.parametrize("content", NO_MODELS)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Tokenizer(path)
    assert str(caught.value) == f"{path} is not a sentencepiece model: model.tokenizer needs Gemma 3's tokenizer.model"


@pytest.mark.parametrize(("name", "what"), [("gone.model", "missing"), (".", "a folder")])
def test_missing_files(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        Tokenizer(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name} is {what}: set model.tokenizer=FILE to Gemma 3's tokenizer.model"


@pytest.fixture(scope="module")
def config() -> Config:
    """The defaults."""
    cli.teach_hydra()
    with initialize_config_dir(cli.find_conf(), version_base="1.3"):
        return build(OmegaConf.to_container(compose("config"), resolve=True))  # type: ignore[arg-type]


def naming(config: Config, tokenizer: Path | str | None, *, allow_special: bool = False) -> Config:
    """The configuration with ``model.tokenizer``."""
    name = None if tokenizer is None else str(tokenizer)
    data = replace(config.data, allow_special_tokens=allow_special)
    return replace(config, model=replace(config.model, tokenizer=name), data=data)


@pytest.fixture
def weights(tmp_path: Path, gemma3_like: Path) -> Path:
    """A directory of weights with a tokenizer beside."""
    (tmp_path / "weights").mkdir()
    shutil.copy(gemma3_like, tmp_path / "weights")
    return tmp_path / "weights"


def refusal(config: Config, directory: Path | None, vocab_size: int = 4096) -> str:
    with pytest.raises(UserError) as caught:
        open_tokenizer(config, directory, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_one_beside_the_weights(config: Config, weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = open_tokenizer(naming(config, None), weights, Tokenizer(weights / "tokenizer.model").vocab_size)
    assert found.path == weights / "tokenizer.model"
    assert found.allow_special is False
    assert open_tokenizer(naming(config, None, allow_special=True), weights, 500).allow_special is True
    assert not caplog.records


def test_no_tokenizer(config: Config, tmp_path: Path) -> None:
    beside = tmp_path / "tokenizer.model"
    assert refusal(naming(config, None), tmp_path) == (
        f"{beside} is missing: set model.tokenizer=FILE to Gemma 3's tokenizer.model"
    )
    beside.mkdir()
    assert refusal(naming(config, None), tmp_path).startswith(f"{beside} is a folder: set model.tokenizer=FILE")
    words = "model.weights=random has no tokenizer beside it: set model.tokenizer=FILE"
    assert refusal(naming(config, None), None) == words


def test_random_weights_take_any(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    """Of so few pieces too, without a warning: nothing was trained with another one."""
    found = open_tokenizer(naming(config, "embedded:gemma3_tiny/tokenizer.model"), None, 262_144)
    assert found.path == TINY
    assert not caplog.records


def test_more_pieces_than_rows(config: Config, weights: Path) -> None:
    num_pieces = Tokenizer(weights / "tokenizer.model").vocab_size
    assert refusal(naming(config, None), weights, num_pieces - 1) == (
        f"{weights / 'tokenizer.model'} has {num_pieces} pieces, the model only {num_pieces - 1} rows: it is another "
        "model's"
    )
    assert refusal(naming(config, TINY), None, 2047).startswith(f"{TINY} has 2048 pieces, the model only 2047 rows")


@pytest.mark.parametrize("spare", [0, SPARE_ROWS, SPARE_ROWS + 1])
def test_many_more_rows_than_pieces_are_warned_of(
    config: Config, weights: Path, spare: int, caplog: pytest.LogCaptureFixture
) -> None:
    """4b and up have 64 rows beyond their tokens."""
    num_pieces = Tokenizer(weights / "tokenizer.model").vocab_size
    with caplog.at_level(logging.WARNING):
        open_tokenizer(naming(config, None), weights, num_pieces + spare)
    expected = f"tokenizer.model has {num_pieces} pieces, the model {num_pieces + spare} rows: is it its own?"
    assert [record.getMessage().rpartition("/")[2] for record in caplog.records] == [expected] * (spare > SPARE_ROWS)


def test_a_named_one_must_be_the_one_of_the_model(config: Config, weights: Path, tmp_path: Path) -> None:
    beside = weights / "tokenizer.model"
    num_pieces = Tokenizer(beside).vocab_size
    copy = Path(shutil.copy(beside, tmp_path / "copy.model"))
    assert open_tokenizer(naming(config, copy), weights, 500).path == copy
    assert open_tokenizer(naming(config, beside), weights, 500).path == beside

    assert refusal(naming(config, TINY), weights) == (
        f"{TINY} is not the model's tokenizer: it has 2048 pieces, {beside} has {num_pieces}; "
        "leave model.tokenizer null to use that one"
    )
    at = 4 + GEMMA3_LIKE.index("<table>")
    swapped = list(GEMMA3_LIKE)
    swapped[at - 4], swapped[at - 3] = swapped[at - 3], swapped[at - 4]
    other = train_tokenizer(tmp_path / "other.model", tuple(swapped))
    assert Tokenizer(other).vocab_size == num_pieces
    assert refusal(naming(config, other), weights) == (
        f"{other} is not the model's tokenizer: token {at} is '</td>', in {beside} it is '<table>'; "
        "leave model.tokenizer null to use that one"
    )


def test_the_same_pieces_in_another_file_are_the_same_tokenizer(config: Config, weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((weights / "tokenizer.model").read_bytes())
    proto.trainer_spec.model_prefix = "another name"
    same = tmp_path / "same.model"
    same.write_bytes(proto.SerializeToString())
    assert Tokenizer(same).digest != Tokenizer(weights / "tokenizer.model").digest
    assert open_tokenizer(naming(config, same), weights, 500).path == same


def test_a_named_one_is_taken_where_there_is_none_beside(config: Config, tmp_path: Path, gemma3_like: Path) -> None:
    assert open_tokenizer(naming(config, gemma3_like), tmp_path, 500).path == gemma3_like


def test_a_broken_one_beside_is_named(config: Config, weights: Path) -> None:
    """As after a clone without Git LFS: what the model was trained with is not known then."""
    (weights / "tokenizer.model").write_bytes(LFS)
    assert refusal(naming(config, TINY), weights).startswith(f"{weights / 'tokenizer.model'} is not a sentencepiece")
