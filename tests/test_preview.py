"""``adaptax preview`` as a process: what it shows, and what it does without."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from command_line import SCRIPT, Answer
from rows import chat

Run = Callable[..., Answer]
TINY = ("preview", "model=gemma3_tiny", "data.train=chats.jsonl", "data.eval_fraction=0")


def write_chats(home: Path, *rows: object, name: str = "chats.jsonl") -> None:
    """Rows into a file of the user's folder."""
    (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def facts(answer: Answer) -> dict[str, str]:
    """The table that was printed: name -> value, which may stand on several lines."""
    assert answer.code == 0, answer.err
    found: dict[str, str] = {}
    name = ""
    for line in answer.out.splitlines():
        if cells := re.fullmatch(r"│ (.*?) +│ (.*?) *│", line):
            name = cells[1].strip() or name
            found[name] = f"{found.get(name, '')} {cells[2]}".strip()
    return found


def page_text(path: Path) -> str:
    """The words of a page, without its style and script."""
    words: list[str] = []

    class Reader(HTMLParser):
        skipped = False

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.skipped = tag in ("style", "script")

        def handle_endtag(self, tag: str) -> None:
            self.skipped = False

        def handle_data(self, data: str) -> None:
            if not self.skipped:
                words.append(data)

    Reader().feed(path.read_text(encoding="utf-8"))
    return re.sub(r"\s+", " ", "".join(words))


def test_rows_with_what_is_trained_between_marks(run: Run, home: Path) -> None:
    write_chats(home, chat("Is it open?", "Yes."), chat("Until when?", "Four."))
    answer = run(*TINY, "data.packing=false", "data.shuffle=false", "data.length_buckets=1")
    assert answer.code == 0, answer.err
    assert not answer.imported_jax
    shown = answer.out
    assert "chats.jsonl row 1:" in shown
    assert "<bos><start_of_turn>user\nIs it open?<end_of_turn>\n<start_of_turn>model\n⟦Yes.<end_of_turn>⟧\n" in shown
    assert "⟦Four.<end_of_turn>⟧" in shown
    assert re.search(r"· \d+ padding tokens?", shown)


def test_it_leaves_nothing_behind_and_needs_no_weights(run: Run, home: Path) -> None:
    """A folder with config.json and tokenizer.model, but no weights, will do."""
    write_chats(home, chat("Hi", "Hello"))
    base = SCRIPT.parent / "src" / "adaptax" / "assets" / "gemma3_tiny"
    (home / "model").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (home / "model" / name).write_bytes((base / name).read_bytes())
    before = sorted(home.rglob("*"))
    answer = run(*TINY[:1], "model.model_size=auto", "model.weights=model", *TINY[2:])
    assert answer.code == 0, answer.err
    assert not answer.imported_jax
    assert sorted(home.rglob("*")) == before


def test_a_tokenizer_of_ones_own_needs_no_hub(run: Run, home: Path) -> None:
    write_chats(home, chat("Hi", "Hello"))
    tokenizer = "model.tokenizer=embedded:gemma3_tiny/tokenizer.model"
    answer = run("preview", "model=gemma3_1b", tokenizer, *TINY[2:])
    assert answer.code == 0, answer.err
    assert "⟦Hello<end_of_turn>⟧" in answer.out


def test_the_table(run: Run, home: Path) -> None:
    rows = [chat(f"question {i}", "answer " * (i + 1)) for i in range(20)]
    rows += [rows[0], rows[1], chat("q " * 300, "answer")]
    user, assistant = chat("a", "b")["messages"]
    rows += [{"messages": [user, assistant | {"train": False}]}, {"messages": []}]
    write_chats(home, *(row | {"lang": "en"} for row in rows), chat("drop me", "x") | {"lang": "de"})
    write_chats(home, *(row | {"lang": "en"} for row in (rows[3], chat("other", "row"))), name="eval.jsonl")
    table = facts(
        run(
            *TINY,
            "data.eval=eval.jsonl",
            "data.max_length=128",
            "data.on_bad_row=skip",
            'data.filter={lang: "!= de"}',
            "training.micro_batch_size=2",
            "training.num_epochs=3",
        )
    )
    assert table["rows read"] == "26"
    assert table["rows to train"] == "22"
    assert table["rows held out"] == "2"
    assert table["truncated"].startswith("1 rows")
    assert "1 bad" in table["dropped"]
    assert "1 left out by data.filter" in table["dropped"]
    assert "2 nothing to train" in table["dropped"]
    assert table["duplicate rows"] == "2"
    assert table["in both training and evaluation"] == "1 evaluation rows"
    assert table["sequence length"] == "128"
    assert 0.5 < float(table["packing efficiency"].rstrip("%")) / 100 <= 1
    assert table["sequences per step"] == "2"
    assert int(table["steps"]) == 3 * int(table["steps per epoch"])
    assert re.search(r"p50 \d+, .*p100 \d+", table["tokens per row"])
    assert re.fullmatch(r"[\d,]+ tokens, \d+\.\d%", table["supervised"])


def test_colour_where_there_is_some(home: Path) -> None:
    write_chats(home, chat("Is it open?", "Yes."))
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(
        [sys.executable, SCRIPT, *TINY], cwd=home, env=environment, capture_output=True, text=True, check=True
    )
    assert "⟦" not in done.stdout
    assert re.search(r"\x1b\[1;32mYes\.<end_of_turn>\x1b\[0m", done.stdout)
    assert "\x1b[1;32mIs it open?" not in done.stdout


def test_what_rows_write_reaches_the_terminal_as_text(run: Run, home: Path) -> None:
    write_chats(home, chat("a\x1b]0;owned\x07b\x1b[31m [bold]x[/bold]", "c\u202ed"))
    answer = run(*TINY)
    assert answer.code == 0, answer.err
    assert "\x1b" not in answer.out
    assert "\x07" not in answer.out
    assert "\u202e" not in answer.out
    assert "[bold]x[/bold]" in answer.out


def test_the_page_says_what_the_terminal_says(run: Run, home: Path) -> None:
    hostile = '<script>document.title="owned"</script> & "quotes"'
    write_chats(home, chat(hostile, "Yes."), chat("Until when?", "Four."))
    answer = run(*TINY, "--html", "page.html", "--rows", "50")
    table, text = facts(answer), page_text(home / "page.html")
    assert "written to page.html" in answer.out
    assert not answer.imported_jax
    for name in ("rows read", "tokens", "packing efficiency", "steps per epoch", "supervised"):
        assert re.search(rf"{name}\s*{re.escape(table[name])}", text), name
    assert hostile in text
    assert "Until when?" in text
    assert "adaptax preview model=gemma3_tiny" in text


def test_rows_of_a_mixture_and_of_a_stream(run: Run, home: Path) -> None:
    write_chats(home, *(chat(f"a{i}", "x") for i in range(30)), name="a.jsonl")
    write_chats(home, *(chat(f"b{i}", "y") for i in range(10)), name="b.jsonl")
    mixture = "data.mixture=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}]"
    model = ("preview", "model=gemma3_tiny", "data.eval_fraction=0")
    table = facts(run(*model, mixture))
    assert table["rows read"] == "40"
    answer = run(*model, "data.train=a.jsonl", "data.streaming=true", "training.num_batches=3")
    table = facts(answer)
    assert not answer.imported_jax
    assert table["rows read"] == "30"
    assert "first 1000 rows" in table["looked at"]
    assert table["steps"] == "3"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "many"], ["--rows=many", "whole number"]),
        (["--multirun"], ["--multirun"]),
        (["--html", "gone/page.html"], ["gone"]),
        (["data.train=gone.jsonl"], ["data.train=gone.jsonl: no such file"]),
        (["data.trian=x"], ["data.trian", "did you mean data.train"]),
        (["data.format=alpaca"], ["chats.jsonl", "instruction"]),
        (["model.tokenizer=chats.jsonl"], ["chats.jsonl is not a sentencepiece model"]),
    ],
)
def test_mistakes_are_one_line(run: Run, home: Path, arguments: list[str], words: list[str]) -> None:
    write_chats(home, chat("Hi", "Hello"))
    answer = run(*TINY, *arguments)
    assert answer.code == 1, answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, answer.err
    assert "Traceback" not in answer.err
    assert [word for word in words if word not in errors[0]] == [], errors
