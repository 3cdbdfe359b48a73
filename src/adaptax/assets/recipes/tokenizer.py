"""Train the tiny model's SentencePiece tokenizer, laid out like Gemma 3's with 2,048 pieces.

Run ``python -m adaptax.assets.recipes.tokenizer`` to write ``gemma3_tiny/tokenizer.model``.  The special
tokens have Gemma 3's own ids, so code that handles the full tokenizer handles this one.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from adaptax.assets.recipes import chats, corpus

MODEL = Path(__file__).resolve().parents[1] / "gemma3_tiny" / "tokenizer.model"
SEED = 7
CORPUS_ROWS = 20_000
VOCABULARY = 2048
BASIC = ["<pad>", "<eos>", "<bos>", "<unk>"]
SPECIAL = [
    "<mask>",
    "[multimodal]",
    *(f"<unused{number}>" for number in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
    "\n",
]
SAMPLES = (
    "Turn the kitchen lamp off, please.",
    '{"action": "dim", "room": "living room", "device": "lamp", "percent": 40, "time": "7:30"}',
    "two  spaces,\ttab\nnew line\n\nblank line ",
    " leading space",
    "Zażółć gęślą jaźń, 你好 🏠🔥",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
)


def texts() -> Iterator[str]:
    """Yield lines of text: the corpus and the training chats."""
    train, _ = chats.datasets()
    for row in (*corpus.rows(SEED, CORPUS_ROWS), *train):
        parts = [message["content"] for message in row.get("messages", [])] or [row["text"]]
        for part in parts:
            yield from part.splitlines()


def train() -> bytes:
    """Train the tokenizer; one thread and no files, so that the bytes depend on the text alone."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece=BASIC[0],
        eos_piece=BASIC[1],
        bos_piece=BASIC[2],
        unk_piece=BASIC[3],
        user_defined_symbols=SPECIAL,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def check(model: bytes) -> None:
    """Assert the size, the special ids, and that text survives a round trip."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.get_piece_size() == VOCABULARY
    for place, piece in enumerate(BASIC + SPECIAL):
        assert tokenizer.id_to_piece(place) == piece, (place, piece)
        assert place < len(BASIC) or tokenizer.encode(piece) == [place], (place, piece)
    ids = (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2, 3)
    for key in chats.KEYS:
        assert len(tokenizer.encode(json.dumps(key))) <= 3, f"{key} is not a single piece"
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text)) == text, text
        assert tokenizer.unk_id() not in tokenizer.encode(text), text


def main() -> None:
    """Train, check and write the tokenizer."""
    model = train()
    check(model)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    MODEL.write_bytes(model)
    print(f"tokenizer.model: {len(model)} bytes, sha256 {hashlib.sha256(model).hexdigest()}")


if __name__ == "__main__":
    main()
