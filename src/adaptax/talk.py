"""``adaptax generate``: a chat in the terminal, one prompt, or a file of questions."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jax.sharding import Mesh

from adaptax.config import Config, UserError
from adaptax.data.questions import Question, ask, batches, count_questions, read_questions
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
HELP = "Ctrl-D or /exit ends the chat, /new begins another one"


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
        """The tokens of several answers."""
        self.check_room(len(prompts), max(map(len, prompts)))
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
    if options.prompt is not None and options.data is not None:
        raise UserError("prompt and data are both given: leave one of them out")
    out = check_out(options)
    subject = open_subject(config, mesh, [place])
    first = None
    if options.prompt is not None:  # a mistake in it is told before weights are read
        first = ask(begin_chat(options.system, options.prompt), subject.tokenizer)
    elif options.data is not None:
        count_questions(options.data)
    speaker = open_speaker(subject)
    if options.data is not None and out is not None:
        answer_file(speaker, options.data, out)
    elif first is not None:
        show(speaker.stream(first))
    else:
        chat(speaker, options.system)
    log.info("%s", speaker.generator.rates.describe())


def check_out(options: GenerateOptions) -> Path | None:
    """The file to write; refuses one that is there, and answers to a file that would go nowhere."""
    if (options.data is None) != (options.out is None):
        raise UserError("data=FILE and out=FILE go together: questions from one, answers to the other")
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
    """Questions from the terminal, or line by line from a pipe, and answers with all that was said before."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(HELP, file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            words = (input("> ") if is_terminal else next(sys.stdin)).strip()
        except (EOFError, StopIteration):
            return
        if words == "/exit":
            return
        if words == "/new":
            messages = []
        if not words or words == "/new":
            continue
        asked = [*messages, {"role": "user", "content": words}] if messages else begin_chat(system, words)
        with contextlib.ExitStack() as stack:
            if is_terminal:  # Ctrl-C ends the answer, not the chat
                stack.enter_context(contextlib.suppress(KeyboardInterrupt))
            answer = show(speaker.stream(ask(asked, speaker.subject.tokenizer)))
            messages = [*asked, {"role": "assistant", "content": answer}] if answer.strip() else messages


def show(pieces: Iterable[str]) -> str:
    """Writes an answer as it comes, and returns it whole."""
    whole = ""
    for piece in pieces:
        sys.stdout.write(piece)
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


def answer_file(speaker: Speaker, data: str, out: Path) -> None:
    """Answers every row of a file, in order; what is there when it is cut short stays in ``out.partial``."""
    config, total = speaker.config, count_questions(data)
    partial, done = out.with_name(out.name + ".partial"), 0
    started = told = time.monotonic()
    questions = read_questions(config.data, data, speaker.subject.tokenizer)
    with partial.open("w", encoding="utf-8") as file:
        for batch in batches(questions, config.generation.batch_size):
            answers = speaker.answer([question.tokens for question in batch], done)
            for question, tokens in zip(batch, answers, strict=True):
                file.write(json.dumps(describe(question, tokens, speaker), ensure_ascii=False) + "\n")
            file.flush()
            done += len(batch)
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                left = (told - started) / done * (total - done)
                log.info("%d of %d rows, %s, %.0f s left", done, total, speaker.generator.rates.describe(), left)
    partial.rename(out)
    log.info("%d answers in %s", done, out)


def describe(question: Question, tokens: list[int], speaker: Speaker) -> dict[str, object]:
    """The row of an answer: that of the question, with the answer and why it ended."""
    is_cut = len(tokens) == speaker.config.generation.max_new_tokens
    text = speaker.subject.tokenizer.decode(tokens)
    return {**question.row, ANSWER: text, END: "length" if is_cut else "stop"}
