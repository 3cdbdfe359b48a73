"""``adaptax generate``: a chat in the terminal, one prompt, or a file of questions."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jax.sharding import Mesh

from adaptax.config import Config, UserError
from adaptax.data.questions import Question, ask, batches, measure_questions, read_questions
from adaptax.data.tokenizer import Tokenizer
from adaptax.generate import Generator
from adaptax.lora import Arrays
from adaptax.options import GenerateOptions
from adaptax.sampling import read_sampling
from adaptax.subject import Subject, check_new_file, open_subject
from adaptax.weights import take_apart

log = logging.getLogger(__name__)
ANSWER, END = "generated", "finish_reason"
TELL_SECONDS = 10.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HELP = "Ctrl-C ends an answer, Ctrl-D or /exit the chat; /new begins another one"


@dataclass
class Speaker:
    """A model that is ready to answer."""

    subject: Subject
    generator: Generator
    base: Arrays
    adapters: Arrays
    room: tuple[int, int] = field(default=(0, 0))  # rows and tokens that have been found to fit

    @property
    def config(self) -> Config:
        """Of the run."""
        return self.subject.job.config

    def check_room(self, num_rows: int, prompt_tokens: int) -> None:
        """Refuses what does not fit the device, before it is tried."""
        capacity = self.generator.capacity(prompt_tokens, self.config.generation.max_new_tokens)
        needed = self.generator.round_rows(num_rows), capacity
        if needed[0] * needed[1] > self.room[0] * self.room[1]:
            self.subject.check_room(*needed)
            self.room = needed

    def stream(self, prompt: list[int]) -> Iterator[str]:
        """The text of an answer, piece by piece."""
        self.check_room(1, len(prompt))
        config = self.config.generation
        tokens = self.generator.stream(
            self.base, self.adapters, prompt, config.max_new_tokens, read_sampling(config), seed=config.seed
        )
        return stream_text(tokens, self.subject.tokenizer)

    def answer(self, prompts: list[list[int]], first_row: int) -> list[list[int]]:
        """The tokens of several answers, for which there was found to be room."""
        config = self.config.generation
        settings = config.max_new_tokens, read_sampling(config)
        return self.generator.answer(
            self.base,
            self.adapters,
            prompts,
            *settings,
            seed=config.seed,
            first_row=first_row,
            num_rows=config.batch_size,
        )


def generate(options: GenerateOptions, config: Config, mesh: Mesh, place: Path | None) -> None:
    """Answers what the options ask.

    Args:
      options: of the command.
      config: names the base, and how answers are drawn.
      mesh: the devices.
      place: of the adapter; None for the base alone.

    Raises:
      UserError: a file is not there, is there already, or holds what is no question.
    """
    out = check_out(options)
    subject = open_subject(config, mesh, [place])
    prompt, sizes = None, (0, 0)  # mistakes in questions are told before weights are read
    if options.prompt is not None:
        prompt = ask(begin_chat(options.system, options.prompt), subject.tokenizer)
    elif options.data is not None:
        sizes = measure_questions(config.data, options.data, subject.tokenizer)
    speaker = open_speaker(subject)
    if prompt is not None:
        show(speaker.stream(prompt))
    elif options.data is not None and out is not None:
        answer_file(speaker, options.data, out, *sizes)
    else:
        chat(speaker, options.system)
    if rates := speaker.generator.rates.describe():
        log.info("%s", rates)


def check_out(options: GenerateOptions) -> Path | None:
    """The file to write; refuses one that is there, and options that do not go together."""
    if options.prompt is not None and options.data is not None:
        raise UserError("prompt and data are both given: leave one of them out")
    if (options.data is None) != (options.out is None):
        raise UserError("data=FILE and out=FILE go together: questions from one, answers to the other")
    if options.data is not None and options.system is not None:
        raise UserError("system is of a prompt or a chat: rows of data have a column or a message of their own for it")
    return None if options.out is None else check_new_file(options.out)


def open_speaker(subject: Subject) -> Speaker:
    """Reads the weights; on a CPU they are then laid out layer by layer."""
    adapter, base = subject.adapters[0], subject.load_base()
    if subject.job.platform == "cpu":
        base = take_apart(dict(base), subject.job.dtype)
    return Speaker(subject, Generator(adapter.program, subject.job.arch), base, adapter.place())


def begin_chat(system: str | None, words: str) -> list[dict[str, str]]:
    """The first messages of a conversation."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": words}]


def chat(speaker: Speaker, system: str | None) -> None:
    """Questions from the terminal, or line by line from a pipe, and answers with all that was said before.

    In a terminal Ctrl-C ends an answer, which is forgotten with its question, and a mistake does not end the chat.
    """
    is_terminal = sys.stdin.isatty()
    speaker.check_room(1, speaker.generator.piece_tokens)  # a short question
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys, and questions to repeat
        print(HELP, file=sys.stderr)
    messages: list[dict[str, str]] = []
    while (words := _read_words(is_terminal)) not in (None, "/exit"):
        if words == "/new":
            messages = []
        if not words or words == "/new":
            continue
        asked = [*messages, {"role": "user", "content": words}] if messages else begin_chat(system, words)
        try:
            answer = show(speaker.stream(ask(asked, speaker.subject.tokenizer)))
            messages = [*asked, {"role": "assistant", "content": answer}] if answer.strip() else messages
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
        except UserError as error:
            if not is_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)


def _read_words(is_terminal: bool) -> str | None:
    """The next line without space around it; None where there is none."""
    try:
        return (input("> ") if is_terminal else next(sys.stdin)).strip()
    except EOFError:
        print()
    except StopIteration:
        pass
    except UnicodeDecodeError as error:
        raise UserError(f"the standard input is not UTF-8: {error.reason}") from None
    return None


def show(pieces: Iterable[str]) -> str:
    """Writes an answer as it comes, and returns it whole; what would steer a terminal is spelled out there."""
    whole, is_terminal = "", sys.stdout.isatty()
    for piece in pieces:
        sys.stdout.write(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], piece) if is_terminal else piece)
        sys.stdout.flush()
        whole += piece
    sys.stdout.write("\n")
    sys.stdout.flush()
    return whole


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as it becomes certain: half a character waits for its other bytes."""
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(seen)[len(shown) :]
    if rest:
        yield rest


def answer_file(speaker: Speaker, data: str, out: Path, num_rows: int, longest: int) -> None:
    """Answers every row of a file, in order; what is there when it is cut short stays in ``out.partial``.

    Args:
      speaker: who answers.
      data: the file.
      out: where the answers go.
      num_rows: of the file.
      longest: tokens of its longest question.

    Raises:
      UserError: the longest does not fit the device, or the answers cannot be written.
    """
    config, done = speaker.config, 0
    speaker.check_room(config.generation.batch_size, longest)
    partial = out.with_name(f"{out.name}.partial")
    started = told = time.monotonic()
    questions = read_questions(config.data, data, speaker.subject.tokenizer)
    try:
        # A half of a surrogate pair, which JSON can spell, is spelled so again.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for batch in batches(questions, config.generation.batch_size):
                answers = speaker.answer([question.tokens for question in batch], done)
                for question, tokens in zip(batch, answers, strict=True):
                    row = describe(question, tokens, speaker)
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                file.flush()
                done += len(batch)
                if time.monotonic() - told > TELL_SECONDS:
                    told = time.monotonic()
                    left = (told - started) / done * (num_rows - done)
                    rates = speaker.generator.rates.describe() or "compiling"
                    log.info("%d of %d rows, %s, %.0f s left", done, num_rows, rates, left)
        partial.rename(out)
    except BaseException as error:
        log.warning("%d of %d answers are in %s", done, num_rows, partial)
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or partial} cannot be written: {error.strerror}") from None
        raise
    log.info("%d answers in %s", done, out)


def describe(question: Question, tokens: list[int], speaker: Speaker) -> dict[str, object]:
    """The row of an answer: that of the question, with the answer and why it ended."""
    is_cut = len(tokens) == speaker.config.generation.max_new_tokens
    text = speaker.subject.tokenizer.decode(tokens)
    return {**question.row, ANSWER: text, END: "length" if is_cut else "stop"}
