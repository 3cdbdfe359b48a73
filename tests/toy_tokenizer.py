"""Small sentencepiece models, trained in a moment, with the special tokens of Gemma 3 or of others."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece

CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
GEMMA3_SYMBOLS = ("<mask>", "[multimodal]", *(f"<unused{i}>" for i in range(99)), *TURNS)  # ids 4 to 106
RUNS = (*("\n" * n for n in range(1, 32)), *("\t" * n for n in range(2, 9)))
IMAGES = ("<start_of_image>", "<end_of_image>", "<unused99>", "<unused6241>")
GEMMA3_LIKE = (*GEMMA3_SYMBOLS, *RUNS, "<table>", "</td>", "<b>", "</code>", *IMAGES)
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "user and model take turns; the user asks",
    "naïve 你好, 2 + 2",
)


def train_tokenizer(
    path: Path,
    symbols: tuple[str, ...] = GEMMA3_LIKE,
    *,
    basic: tuple[str, ...] = ("<pad>", "<eos>", "<bos>"),
    sentences: tuple[str, ...] = SENTENCES,
    num_words: int = 60,
) -> Path:
    """Writes a model: ``basic`` in order, ``<unk>``, the symbols, 256 bytes, at most ``num_words`` learnt pieces."""
    pad, eos, bos = (basic.index(piece) for piece in ("<pad>", "<eos>", "<bos>"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=4 + len(symbols) + 256 + num_words,
        hard_vocab_limit=False,
        pad_id=pad,
        eos_id=eos,
        bos_id=bos,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=list(symbols),
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path
