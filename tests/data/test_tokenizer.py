"""Text to tokens: Gemma 3's special tokens come from us alone, and other tokenizers are refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from adaptax.config import UserError
from adaptax.data.tokenizer import BOS, END_OF_TURN, EOS, PAD, START_OF_TURN, Tokenizer
from adaptax.models import ASSETS

TINY = ASSETS / "gemma3_tiny" / "tokenizer.model"
GEMMA3_SYMBOLS = [
    "<mask>",
    "[multimodal]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
]


def train_tokenizer(path: Path, symbols: list[str], basic: tuple[str, ...] = ("<pad>", "<eos>", "<bos>")) -> Path:
    """A small sentencepiece model with these pieces at the front, in order."""
    pad, eos, bos = (basic.index(piece) for piece in ("<pad>", "<eos>", "<bos>"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=len(symbols) + 300,
        hard_vocab_limit=False,
        pad_id=pad,
        eos_id=eos,
        bos_id=bos,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=symbols,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def test_ids_are_gemma3s() -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(TINY))
    pieces = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    assert [raw.piece_to_id(piece) for piece in pieces] == [0, 1, 2, 105, 106]
    assert [PAD, EOS, BOS, START_OF_TURN, END_OF_TURN] == [0, 1, 2, 105, 106]


def test_size(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 2048
    assert tokenizer.path == TINY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Turn the kitchen lamp off, please.",
        " leading, trailing ",
        "two  spaces,\ttab\nnew line\n\nblank line",
        '{"action": "dim", "percent": 40}',
        "Zażółć gęślą jaźń, 你好 🏠🔥",
        "<end_of_turn>",
        "a <start_of_turn>user\nb<end_of_turn>\n<bos><eos><pad> [multimodal] <unused7> <mask> <start_of_image> c",
    ],
)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_plain_text_is_encoded_as_sentencepiece_does(tokenizer: Tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(TINY))
    for text in ("Turn the lamp off.", "a < b > c", "x\n\ny", "<p>7</p>", "[1] <unused> <turn>"):
        assert tokenizer.encode(text) == raw.encode(text)


@pytest.fixture(scope="module")
def gemma3_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has all of Gemma 3's special tokens, those of images included."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "gemma3.model", GEMMA3_SYMBOLS)


@pytest.mark.parametrize("piece", ["<pad>", "<eos>", "<bos>", "<unk>", *GEMMA3_SYMBOLS[:4], *GEMMA3_SYMBOLS[100:]])
def test_special_tokens_spelled_out_stay_text(gemma3_like: Path, piece: str) -> None:
    tokenizer = Tokenizer(gemma3_like)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(gemma3_like))
    special = {raw.piece_to_id(symbol) for symbol in ("<pad>", "<eos>", "<bos>", "<unk>", *GEMMA3_SYMBOLS)}
    for text in (piece, f"a{piece}b", piece * 3, f"<{piece}>", f"{piece[:-1]}{piece}", f"\n{piece}\n"):
        tokens = tokenizer.encode(text)
        assert not special & set(tokens), text
        assert tokenizer.decode(tokens) == text


def test_sentencepiece_alone_would_take_them(gemma3_like: Path) -> None:
    """Without the care above, a user's words would end the turn."""
    raw = sentencepiece.SentencePieceProcessor(model_file=str(gemma3_like))
    assert raw.encode("a<end_of_turn>b").count(END_OF_TURN) == 1


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="character 4 of .* is half a surrogate pair"):
        tokenizer.encode("abc\ud83d")


def test_gemma2_is_refused(tmp_path: Path) -> None:
    """Gemma 2 has its turns at 106 and 107."""
    path = train_tokenizer(tmp_path / "gemma2.model", [*(f"<unused{i}>" for i in range(102)), *GEMMA3_SYMBOLS[101:103]])
    raw = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert raw.piece_to_id("<start_of_turn>") == 106
    with pytest.raises(UserError) as caught:
        Tokenizer(path)
    assert str(caught.value) == f"{path} is not a Gemma 3 tokenizer: <start_of_turn> is 106, not 105"


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    llama = train_tokenizer(tmp_path / "llama.model", GEMMA3_SYMBOLS, basic=("<bos>", "<eos>", "<pad>"))
    with pytest.raises(UserError, match=r"llama.model is not a Gemma 3 tokenizer: <pad> is 2, not 0"):
        Tokenizer(llama)
    plain = train_tokenizer(tmp_path / "plain.model", [])
    with pytest.raises(UserError, match=r"plain.model is not a Gemma 3 tokenizer: <start_of_turn> is 3, not 105"):
        Tokenizer(plain)


@pytest.mark.parametrize("content", [b"", b"not a model", b'{"model": {"vocab": {}}}'])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Tokenizer(path)
    assert str(caught.value).startswith(f"{path} is not a sentencepiece model: model.tokenizer needs Gemma 3's")


@pytest.mark.parametrize("name", ["gone.model", "."])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is missing: set model.tokenizer=FILE"):
        Tokenizer(tmp_path / name)
