"""Gemma's sentencepiece tokenizer, with special tokens kept out of what users write."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import re
from pathlib import Path

import sentencepiece

from adaptax.config import Config, UserError, locate
from adaptax.models.hub import find_file

log = logging.getLogger(__name__)
PAD, EOS, BOS, UNK = 0, 1, 2, 3
START_OF_TURN, END_OF_TURN = 105, 106
SPECIAL_IDS = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<start_of_turn>": 105, "<end_of_turn>": 106}
SPECIAL_TEXT = re.compile(r"<(?:start|end)_of_(?:turn|image)>|<mask>|\[multimodal\]|<unused\d+>")
SPARE_ROWS = 64  # embedding rows that Gemma 3 has beyond its tokens
CONTROL_TEXT = re.compile(r"<(?:pad|eos|bos|unk)>")  # sentencepiece itself never makes these of text
ANY_SPECIAL_TEXT = re.compile(f"{SPECIAL_TEXT.pattern}|{CONTROL_TEXT.pattern}")


def is_special(text: str) -> bool:
    """Whether a text spells a special token out."""
    return ("<" in text or "[" in text) and ANY_SPECIAL_TEXT.search(text) is not None


class Tokenizer:
    """Text to token ids and back. Raises UserError where the model is not Gemma 3's.

    Args:
      path: the sentencepiece model.
      allow_special: special tokens that are spelled out in a text become the tokens, as they do in transformers.
    """

    def __init__(self, path: Path, *, allow_special: bool = False):
        if not path.is_file():
            what = "a folder" if path.is_dir() else "missing"
            raise UserError(f"{path} is {what}: set model.tokenizer=FILE to Gemma 3's tokenizer.model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self._model.id_to_piece(list(range(self._model.get_piece_size())))  # each piece is text, or else ValueError
        except (RuntimeError, OSError, ValueError):
            raise UserError(
                f"{path} is not a sentencepiece model: model.tokenizer needs Gemma 3's tokenizer.model"
            ) from None
        for piece, token in SPECIAL_IDS.items():
            found = self._model.piece_to_id(piece)
            if found != token:
                raise UserError(f"{path} is not a Gemma 3 tokenizer: {piece} is {found}, not {token}")
        self.path, self.allow_special = path, allow_special
        self._template: dict[str, list[int]] = {}
        self.vocab_size: int = self._model.get_piece_size()

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the model's file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def check_against(self, other: Path) -> None:
        """Refuses this tokenizer where the model was trained with another one, ``other``."""
        theirs = Tokenizer(other)
        if self.digest == theirs.digest:
            return
        if self.vocab_size != theirs.vocab_size:
            raise UserError(
                f"{self.path} is not the model's tokenizer: it has {self.vocab_size} pieces, {other} has "
                f"{theirs.vocab_size}; leave model.tokenizer null to use that one"
            )
        for token in range(self.vocab_size):
            ours, wanted = self._model.id_to_piece(token), theirs._model.id_to_piece(token)
            if ours != wanted:
                raise UserError(
                    f"{self.path} is not the model's tokenizer: token {token} is {ours!r}, in {other} it is "
                    f"{wanted!r}; leave model.tokenizer null to use that one"
                )

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text. A special token spelled out in it is taken apart, and stays text, unless allowed."""
        parts = self.split(text)
        encoded = iter(self.encode_pieces([part for part in parts if isinstance(part, str)]))
        return [token for part in parts for token in (next(encoded) if isinstance(part, str) else (part,))]

    def split(self, text: str) -> list[str | int]:
        """The pieces of a text that are encoded each by itself, and allowed control tokens between them."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell it: "\\ud83d" without its other half
            raise UserError(f"character {error.start + 1} of {text!r:.60} is half a surrogate pair, no text") from None
        if self.allow_special:
            return self._split_control(text)
        match = SPECIAL_TEXT.search(text) if "<" in text or "[" in text else None
        parts: list[str | int] = []
        start = 0
        while match:  # "<" and the rest of it
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
            match = SPECIAL_TEXT.search(text, start)
        return [*parts, text[start:]] if parts else [text]

    def _split_control(self, text: str) -> list[str | int]:
        parts: list[str | int] = []
        start = 0
        for match in CONTROL_TEXT.finditer(text):
            parts += [text[start : match.start()], self._model.piece_to_id(match.group())]
            start = match.end()
        return [*parts, text[start:]]

    def template_tokens(self, words: str) -> list[int]:
        """Tokens of words of the chat template."""
        if words not in self._template:
            self._template[words] = self._model.encode(words)
        return self._template[words]

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Tokens of each piece, as sentencepiece has them: a special token in a piece is that token."""
        return self._model.encode(pieces, num_threads=1)  # threads of the caller use the other cores

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; those of the turns stay visible, other control tokens vanish."""
        return self._model.decode(tokens)

    def show(self, tokens: list[int]) -> str:
        """Text of tokens, special ones spelled out; a text that spells one itself has a backslash before it."""
        specials = {i for i, token in enumerate(tokens) if is_special(self._model.id_to_piece(token))}
        edges = sorted({0, len(tokens), *specials, *(i + 1 for i in specials)})
        parts = []
        for start, stop in itertools.pairwise(edges):
            if start in specials:
                parts.append(self._model.id_to_piece(tokens[start]))
            else:
                parts.append(ANY_SPECIAL_TEXT.sub(r"\\\g<0>", self._model.decode(tokens[start:stop])))
        return "".join(parts)


def open_tokenizer(config: Config, weights_directory: Path | None, vocab_size: int) -> Tokenizer:
    """``model.tokenizer``, or the one beside the weights, checked against the model.

    Args:
      config: of the run.
      weights_directory: where the weights are; None for random ones.
      vocab_size: embedding rows of the model.

    Raises:
      UserError: there is none, it is not Gemma 3's, or not the one that the model was trained with.
    """
    beside = find_file(weights_directory, "tokenizer.model") if weights_directory else None
    path = locate(config.model.tokenizer) if config.model.tokenizer else beside
    if path is None:
        raise UserError("model.weights=random has no tokenizer beside it: set model.tokenizer=FILE")
    tokenizer = Tokenizer(path, allow_special=config.data.allow_special_tokens)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} pieces, the model only {vocab_size} rows: it is another model's"
        )
    if beside and path != beside and beside.is_file():
        tokenizer.check_against(beside)
    if beside and tokenizer.vocab_size + SPARE_ROWS < vocab_size:
        log.warning("%s has %d pieces, the model %d rows: is it its own?", path, tokenizer.vocab_size, vocab_size)
    return tokenizer
