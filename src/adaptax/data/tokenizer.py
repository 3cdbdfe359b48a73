"""Gemma's sentencepiece tokenizer, with special tokens kept out of what users write."""

from __future__ import annotations

import re
from pathlib import Path

import sentencepiece

from adaptax.config import UserError

PAD, EOS, BOS = 0, 1, 2
START_OF_TURN, END_OF_TURN = 105, 106
SPECIAL_TEXT = re.compile(r"<(?:start|end)_of_(?:turn|image)>|<mask>|\[multimodal\]|<unused\d+>")


class Tokenizer:
    """Text to token ids and back. Raises UserError where the model is not Gemma 3's."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path} is missing: set model.tokenizer=FILE to Gemma 3's tokenizer.model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(
                f"{path} is not a sentencepiece model: model.tokenizer needs Gemma 3's tokenizer.model"
            ) from None
        expected = {
            "<pad>": PAD,
            "<eos>": EOS,
            "<bos>": BOS,
            "<start_of_turn>": START_OF_TURN,
            "<end_of_turn>": END_OF_TURN,
        }
        for piece, token in expected.items():
            found = self._model.piece_to_id(piece)
            if found != token:
                raise UserError(f"{path} is not a Gemma 3 tokenizer: {piece} is {found}, not {token}")
        self.path = path
        self.vocab_size: int = self._model.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text. A special token spelled out in it is taken apart, and stays text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell it: "\\ud83d" without its other half
            raise UserError(f"character {error.start + 1} of {text!r:.60} is half a surrogate pair, no text") from None
        pieces, start = [], 0
        for match in SPECIAL_TEXT.finditer(text):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [token for piece in [*pieces, text[start:]] for token in self._model.encode(piece)]

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; those of the turns stay visible, other control tokens vanish."""
        return self._model.decode(tokens)
