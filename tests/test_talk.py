"""Answers to a prompt, in a chat, and to a file of questions."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import small_runs
import support
from adaptax.config import Config, UserError
from adaptax.data.questions import ask, measure_questions, read_question
from adaptax.data.tokenizer import Tokenizer
from adaptax.options import GenerateOptions
from adaptax.subject import open_subject
from adaptax.talk import Speaker, answer_file, begin_chat, chat, generate, open_speaker, show, stream_text
from rows import data_config

Write = Callable[..., Path]
NEW_TOKENS = 8
NO_OPTIONS = GenerateOptions(None, None, None, None, None, None)


def configure(home: Path, **generation: Any) -> Config:
    values = {"max_new_tokens": NEW_TOKENS, "batch_size": 3} | generation
    return small_runs.make_config(home, {f"generation.{name}": value for name, value in values.items()})


@pytest.fixture(scope="module")
def speaker(trained: Path) -> Speaker:
    """The trained run, ready to answer."""
    subject = open_subject(configure(trained), support.make_mesh(), [trained / "out" / "adapter"])
    return open_speaker(subject)


def with_settings(speaker: Speaker, **generation: Any) -> Speaker:
    """The same with other settings, by the same compiled functions."""
    job = speaker.subject.job
    config = replace(job.config, generation=replace(job.config.generation, **generation))
    return replace(speaker, subject=replace(speaker.subject, job=replace(job, config=config)))


def reply(speaker: Speaker, messages: list[dict[str, str]]) -> str:
    """The answer to a conversation, all at once."""
    tokens = speaker.answer([ask(messages, speaker.subject.tokenizer)], 0)[0]
    return speaker.subject.tokenizer.decode(tokens)


# Text that comes in pieces


@pytest.mark.parametrize(
    "text", ["light on", "ü€\N{GRINNING FACE}日本 ok", " a\n\n b", "half \N{REPLACEMENT CHARACTER} x", ""]
)
def test_streamed_text_is_the_text_and_never_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    pieces = list(stream_text(tokens, tokenizer))
    assert "".join(pieces) == tokenizer.decode(tokens) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_is_streamed_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the kitchen light, please")
    seen = 0

    def count() -> Any:
        nonlocal seen
        for token in tokens:
            seen += 1
            yield token

    for number, piece in enumerate(stream_text(count(), tokenizer), 1):
        assert seen == number
        assert piece == tokenizer.decode(tokens[:number])[len(tokenizer.decode(tokens[: number - 1])) :]


def test_a_character_that_stays_half_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a\N{GRINNING FACE}")[:-1]
    assert "".join(stream_text(tokens, tokenizer)) == tokenizer.decode(tokens)
    assert tokenizer.decode(tokens).startswith("a\N{REPLACEMENT CHARACTER}")


class Terminal(io.StringIO):
    """A terminal of one's own; ``on_write`` is called with what is written."""

    on_write: Callable[[str], Any] = staticmethod(lambda text: None)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.on_write(text)
        return super().write(text)


def test_what_would_steer_a_terminal_is_spelled_out_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ["a\x1b[2J", "\tb\nü\x9b\u200d"]
    for out, text in ((Terminal(), "a\\x1b[2J\tb\nü\\x9b\u200d\n"), (io.StringIO(), "".join(pieces) + "\n")):
        monkeypatch.setattr(sys, "stdout", out)
        assert show(pieces) == "".join(pieces)
        assert out.getvalue() == text


# One prompt


def test_a_streamed_answer_is_the_answer(speaker: Speaker) -> None:
    for words in ("light", "fan off, please"):
        messages = begin_chat(None, words)
        streamed = list(speaker.stream(ask(messages, speaker.subject.tokenizer)))
        assert "".join(streamed) == reply(speaker, messages)
        assert len(streamed) > 1


def test_drawing_and_its_seed_are_those_of_the_configuration(speaker: Speaker) -> None:
    warm = {"temperature": 1.5, "top_k": 50}
    answers = [
        reply(with_settings(speaker, **settings), begin_chat(None, "light"))
        for settings in ({}, warm | {"seed": 1}, warm | {"seed": 1}, warm | {"seed": 2})
    ]
    assert answers[1] == answers[2]
    assert len(set(answers)) == 3


def test_an_answer_to_a_prompt_goes_to_the_standard_output(
    trained: Path, speaker: Speaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the system's words, and without the adapter."""
    options = replace(NO_OPTIONS, prompt="light", system="Be brief.")
    generate(options, configure(trained), support.make_mesh(), None)
    subject = open_subject(configure(trained), support.make_mesh(), [None])
    bare = reply(open_speaker(subject), begin_chat("Be brief.", "light"))
    assert capsys.readouterr().out == f"{bare}\n"
    assert bare != reply(speaker, begin_chat("Be brief.", "light"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompt": "a", "data": "b"}, "prompt and data are both given"),
        ({"data": "rows.jsonl"}, "data=FILE and out=FILE go together"),
        ({"prompt": "a", "out": "b"}, "data=FILE and out=FILE go together"),
        ({"out": "b"}, "data=FILE and out=FILE go together"),
        ({"data": "rows.jsonl", "out": "b", "system": "c"}, "system is of a prompt or a chat"),
        ({"data": "rows.jsonl", "out": "rows.jsonl"}, "out=rows.jsonl is there already"),
        ({"data": "gone.jsonl", "out": "b"}, "gone.jsonl: no such file"),
        ({"data": "bad.jsonl", "out": "b"}, "bad.jsonl row 2: prompt is empty"),
        ({"prompt": "a\udcff"}, "half a surrogate pair"),
        ({"prompt": " "}, "messages[0].content is empty"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "model" / name).symlink_to(trained / "model" / name)
    with pytest.raises(UserError, match=re.escape(problem)):
        generate(replace(NO_OPTIONS, **options), configure(tmp_path), support.make_mesh(), None)
    assert not (tmp_path / "b.partial").exists()


# A chat


def talk(speaker: Speaker, monkeypatch: pytest.MonkeyPatch, text: str, system: str | None = None) -> list[str]:
    """The answers to what comes through a pipe, a line each."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(sys, "stdout", out)
    chat(speaker, system)
    return out.getvalue().splitlines()


def test_a_chat_remembers_what_was_said_until_a_new_one_begins(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = with_settings(speaker, max_new_tokens=3)
    answers = talk(speaker, monkeypatch, "light\n\n  warm blue \n/new\nlight\n/exit\nfan\n", "Be brief.")
    begun = begin_chat("Be brief.", "light")
    first = reply(speaker, begun)
    messages = [*begun, {"role": "assistant", "content": first}, {"role": "user", "content": "warm blue"}]
    assert answers == [first, reply(speaker, messages), first]
    assert reply(speaker, begin_chat("Be brief.", "warm blue")) != answers[1]


def test_a_mistake_in_a_pipe_ends_the_chat(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="half a surrogate pair"):
        talk(speaker, monkeypatch, "light\n\udcff\nfan\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"light\n\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="the standard input is not UTF-8: invalid start byte"):
        chat(speaker, None)


def test_in_a_terminal_mistakes_and_interrupts_end_an_answer_and_not_the_chat(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = with_settings(speaker, max_new_tokens=3)
    first = reply(speaker, begin_chat(None, "light"))
    out = Terminal()
    interrupts = [first[:1]]

    def press(text: str) -> None:
        if interrupts and text.startswith(interrupts[0]):  # Ctrl-C at the first word of the answer
            interrupts.pop()
            signal.raise_signal(signal.SIGINT)

    out.on_write = press
    monkeypatch.setattr(sys, "stdin", Terminal("light\nbad \udcff\nlight\n"))
    monkeypatch.setattr(sys, "stdout", out)
    chat(speaker, None)
    assert not interrupts
    assert out.getvalue() == f"> \n> > {first}\n> \n"  # a question that was not answered is forgotten
    err = capsys.readouterr().err
    assert err.startswith("Ctrl-C ends an answer, Ctrl-D or /exit the chat")
    assert err.count("error: character 5 of") == 1


def test_an_interrupt_ends_what_reads_a_pipe(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    out.on_write = lambda text: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("light\n"))
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(KeyboardInterrupt):
        chat(speaker, None)


TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "  # keys become signals of this process
PROGRAM = "from adaptax.cli import main; main()"


@pytest.mark.slow
def test_a_chat_in_a_terminal(trained: Path) -> None:
    """A real one, with a key that moves the cursor, an answer that is interrupted, and Ctrl-D."""
    ours, theirs = pty.openpty()
    arguments = ["generate", "out", "generation.max_new_tokens=8000"]  # which take many seconds
    command = [sys.executable, "-c", TERMINAL + PROGRAM, *arguments]
    process = subprocess.Popen(command, cwd=trained, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = b""
    with process, open(ours, "r+b", buffering=0) as terminal, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        for words, keys in (
            (rb"> ", b"ligt\x1b[Dh\n"),
            (rb"lig.*t.*\r\n.*\w", b"\x03"),
            (rb"\^C\r\n> ", b"\x04"),
        ):
            start, end = len(shown), time.monotonic() + 60
            while not re.search(words, shown[start:], re.DOTALL) and time.monotonic() < end:
                if select.select([terminal], [], [], 0.2)[0]:
                    shown += terminal.read(4096)
            assert re.search(words, shown[start:], re.DOTALL), shown
            terminal.write(keys)
        assert process.wait(timeout=60) == 0, shown
    assert b"Traceback" not in shown


def test_who_reads_the_answers_may_leave(trained: Path) -> None:
    """As ``head`` does; the exit code is that of the signal that would have ended another program."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "generate", "out", "prompt=light"],
        cwd=trained,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGPIPE, err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


# A file of questions

ROWS = [
    {"prompt": "light", "completion": "x", "id": 1},
    {"messages": [{"role": "user", "content": "fan"}, {"role": "assistant", "content": "off"}]},
    {"instruction": "door", "note": "ü \ud83d"},  # half of a pair, which JSON can spell
    {"prompt": "red " * 40},
]


def measured(speaker: Speaker, path: Path) -> tuple[int, int]:
    return measure_questions(speaker.config.data, str(path), speaker.subject.tokenizer)


def test_every_row_of_a_file_is_answered_in_order(speaker: Speaker, write_jsonl: Write, tmp_path: Path) -> None:
    data, out = write_jsonl(ROWS), tmp_path / "out.jsonl"
    answer_file(speaker, str(data), out, *measured(speaker, data))
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in a.items() if k not in ("generated", "finish_reason")} for a in answers] == ROWS
    tokenizer = speaker.subject.tokenizer
    for row, answer in zip(ROWS, answers, strict=True):
        tokens = speaker.answer([read_question(row, data_config(), tokenizer).tokens], 0)[0]
        assert answer["generated"] == tokenizer.decode(tokens)
        assert answer["finish_reason"] == ("length" if len(tokens) == NEW_TOKENS else "stop")
    assert '"ü ' in out.read_text(encoding="utf-8")
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_answer_that_is_drawn_does_not_depend_on_the_batch(
    speaker: Speaker, write_jsonl: Write, tmp_path: Path
) -> None:
    data = write_jsonl([{"prompt": "light"}] * 4)
    found = []
    for size in (3, 2):
        drawing = with_settings(speaker, temperature=1.5, batch_size=size)
        answer_file(drawing, str(data), tmp_path / f"{size}.jsonl", *measured(speaker, data))
        found.append((tmp_path / f"{size}.jsonl").read_text())
    assert found[0] == found[1]
    assert len(set(found[0].splitlines())) == 4


def test_values_that_json_does_not_have_become_texts(speaker: Speaker, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    data, out = tmp_path / "rows.parquet", tmp_path / "out.jsonl"
    pandas.DataFrame({"prompt": ["light"], "day": [pandas.Timestamp("2026-01-02")], "raw": [b"x"]}).to_parquet(data)
    answer_file(speaker, str(data), out, *measured(speaker, data))
    answer = json.loads(out.read_text())
    assert answer["day"].startswith("2026-01-02")
    assert answer["raw"] == "b'x'"


def test_what_was_answered_stays_when_it_is_cut_short(
    speaker: Speaker, write_jsonl: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here by a row that has gone bad meanwhile."""
    caplog.set_level(logging.INFO)
    data, out = write_jsonl([{"prompt": "light"}] * 7), tmp_path / "out.jsonl"
    sizes = measured(speaker, data)
    write_jsonl([*[{"prompt": "light"}] * 6, {"prompt": ""}])
    with pytest.raises(UserError, match=r"rows\.jsonl row 7: prompt is empty"):
        answer_file(speaker, str(data), out, *sizes)
    partial = tmp_path / "out.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 6
    assert f"6 of 7 answers are in {partial}" in caplog.messages
    assert not out.exists()
    with pytest.raises(UserError, match=r"out\.jsonl\.partial is what an earlier try has left"):
        generate(replace(NO_OPTIONS, data=str(data), out=str(out)), speaker.config, support.make_mesh(), None)
    assert len(partial.read_text().splitlines()) == 6


def test_answers_that_cannot_be_written_are_one_line(speaker: Speaker, write_jsonl: Write) -> None:
    data = write_jsonl([{"prompt": "light"}])
    with pytest.raises(UserError, match=r"/proc/out\.jsonl\.partial cannot be written: "):
        answer_file(speaker, str(data), Path("/proc/out.jsonl"), *measured(speaker, data))


def test_a_file_that_does_not_fit_is_refused_before_its_first_answer(
    speaker: Speaker, write_jsonl: Write, tmp_path: Path
) -> None:
    job = speaker.subject.job
    config = replace(job.config, training=replace(job.config.training, memory_gib=0.001))
    small = replace(speaker, subject=replace(speaker.subject, job=replace(job, config=config)), room=(0, 0))
    small.check_room(1, 10)
    data = write_jsonl([{"prompt": "light"}, {"prompt": "red " * 4000}])
    with pytest.raises(UserError, match=r"do not fit the device, which has 1\.0 MiB"):
        answer_file(small, str(data), tmp_path / "out.jsonl", *measured(speaker, data))
    assert not (tmp_path / "out.jsonl.partial").exists()
