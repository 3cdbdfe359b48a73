"""Tokens on disk: found again, shared by runs, bounded, and never trusted when damaged."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from adaptax.config import DataConfig, UserError
from adaptax.data.cache import META, TokenCache, default_folder, fingerprint
from adaptax.data.chat import Example
from adaptax.data.pipeline import load_data
from adaptax.data.sources import content_digest
from adaptax.data.store import FIELDS, Counts, Examples, StoreWriter, TokenStore, pack_examples
from adaptax.data.tokenizer import Tokenizer
from rows import Write, chat, data_config

SRC = Path(__file__).parents[2] / "src"
KEYS = [fingerprint({"entry": i}) for i in range(5)]


class Builder:
    """Builds 1000 rows that tell their number, and counts how often."""

    def __init__(self, number: int = 0):
        self.number, self.count = number, 0

    def __call__(self, writer: StoreWriter) -> tuple[str, Counts]:
        self.count += 1
        for start in range(0, 1000, 250):
            tokens = [np.array([2, self.number, start, i], np.int32) for i in range(250)]
            examples = [Example(row, np.array([False, True, True, True])) for row in tokens]
            writer.append(pack_examples(examples, range(start, start + 250), [0] * 250))
        return "text", Counts(rows=1000, bad=2, listed=["row 3: bad", "row 5: bad"])


def entry_bytes(folder: Path, key: str) -> int:
    """The size of one entry."""
    return sum(file.stat().st_size for file in (folder / key).iterdir())


def check(store: TokenStore, number: int = 0) -> None:
    """It holds what Builder(number) builds."""
    assert (len(store), store.format, store.counts) == (1000, "text", Builder(number)(StoreWriter(None))[1])
    assert store.arrays["tokens"].reshape(-1, 4)[:, 1].tolist() == [number] * 1000
    assert Examples([store])[999].tokens.tolist() == [2, number, 750, 249]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# One run after the other


def test_what_is_built_once_is_mapped_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build = Builder()
    for name in ("first.jsonl", "renamed.jsonl"):
        store = TokenCache(tmp_path / "new" / "folder", 1e9).get(KEYS[0], name, build)
        check(store)
        assert store.name == name
        assert all(isinstance(array.base, np.memmap) for array in store.arrays.values())
    assert build.count == 1
    assert warnings_of(caplog) == []


def test_other_keys_are_other_entries(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, 1e9)
    builds = [Builder(i) for i in range(3)]
    for _ in range(2):
        for i, build in enumerate(builds):
            check(cache.get(KEYS[i], "rows", build), i)
    assert [build.count for build in builds] == [1, 1, 1]


def test_a_source_without_a_good_row_makes_an_entry(tmp_path: Path) -> None:
    """Of empty arrays, which cannot be mapped."""
    calls = []

    def build(writer: StoreWriter) -> tuple[str, Counts]:
        calls.append(1)
        return "text", Counts(rows=3, filtered=3)

    for _ in range(2):
        store = TokenCache(tmp_path, 1e9).get(KEYS[0], "rows", build)
        assert (len(store), store.counts.filtered) == (0, 3)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [UserError("row 3 is bad"), KeyboardInterrupt(), MemoryError()])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(writer: StoreWriter) -> tuple[str, Counts]:
        Builder()(writer)
        raise error

    cache = TokenCache(tmp_path, 1e9)
    with pytest.raises(type(error)):
        cache.get(KEYS[0], "rows", fail)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    check(cache.get(KEYS[0], "rows", Builder()))


def spoil_size(entry: Path, name: str) -> None:
    """Cuts the last byte of a file off."""
    path = entry / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    **{f"short {name}": lambda entry, name=name: spoil_size(entry, name) for name in FIELDS},
    "long tokens": lambda entry: (entry / "tokens.bin").write_bytes(b"\0" * 100_000),
    "empty tokens": lambda entry: (entry / "tokens.bin").write_bytes(b""),
    "no tokens": lambda entry: (entry / "tokens.bin").unlink(),
    "no digests": lambda entry: (entry / "digests.bin").unlink(),
    "no meta": lambda entry: (entry / META).unlink(),
    "empty meta": lambda entry: (entry / META).write_bytes(b""),
    "garbage meta": lambda entry: (entry / META).write_bytes(os.urandom(500)),
    "half of meta": lambda entry: (entry / META).write_bytes((entry / META).read_bytes()[:40]),
    "a list as meta": lambda entry: (entry / META).write_text("[1, 2]"),
    "null as meta": lambda entry: (entry / META).write_text("null"),
    "other meta": lambda entry: (entry / META).write_text('{"a": 1}'),
    "unknown counts": lambda entry: (entry / META).write_text(
        json.dumps(json.loads((entry / META).read_text()) | {"counts": {"lost": 1}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    cache, build = TokenCache(tmp_path, 1e9), Builder()
    cache.get(KEYS[0], "rows.jsonl", build)
    DAMAGES[damage](tmp_path / KEYS[0])
    check(cache.get(KEYS[0], "rows.jsonl", build))
    assert build.count == 2
    assert warnings_of(caplog) == [f"tokens of rows.jsonl in {tmp_path / KEYS[0]} are damaged: they are made anew"]
    check(cache.get(KEYS[0], "rows.jsonl", build))
    assert build.count == 2


@pytest.mark.parametrize("place", ["", "/deeper"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str) -> None:
    """Permissions would not stop the superuser: a file stands where the folder should."""
    (tmp_path / "taken").write_text("a file")
    build = Builder()
    check(TokenCache(Path(f"{tmp_path}/taken{place}"), 1e9).get(KEYS[0], "rows.jsonl", build))
    assert build.count == 1
    (told,) = warnings_of(caplog)
    assert told.startswith("tokens of rows.jsonl are not kept: ")
    assert told.endswith("data.cache_dir names another folder, data.cache=false keeps none")


def test_a_full_disk_in_the_middle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full stands for it."""
    build, real = Builder(), Path("/dev/full")
    if not real.exists():
        pytest.skip("no /dev/full here")

    def fill(writer: StoreWriter) -> tuple[str, Counts]:
        partial = tmp_path / f"{KEYS[0]}.partial"
        if partial.exists():
            (partial / "tokens.bin").unlink()
            (partial / "tokens.bin").symlink_to(real)
            with real.open("wb", buffering=0) as file:
                file.write(b"x")
        return build(writer)

    check(TokenCache(tmp_path, 1e9).get(KEYS[0], "rows", fill))
    assert "No space left on device" in warnings_of(caplog)[0]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


# Bounds


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    builds = [Builder(i) for i in range(4)]
    TokenCache(tmp_path, 1e9).get(KEYS[0], "rows", builds[0])
    cache = TokenCache(tmp_path, 3.5 * entry_bytes(tmp_path, KEYS[0]))
    for i in (1, 2):
        cache.get(KEYS[i], "rows", builds[i])
    for age, i in enumerate((1, 2, 0)):  # used in this order, by the clock of the files
        os.utime(tmp_path / KEYS[i] / META, (1e9 + age, 1e9 + age))
    cache.get(KEYS[1], "rows", builds[1])  # and now this one
    cache.get(KEYS[3], "rows", builds[3])
    assert [(tmp_path / key).exists() for key in KEYS[:4]] == [True, True, False, True]
    assert [build.count for build in builds] == [1, 1, 1, 1]
    check(cache.get(KEYS[2], "rows", builds[2]), 2)
    assert [(tmp_path / key).exists() for key in KEYS[:4]] == [False, True, True, True]


def test_what_is_new_stays_however_large(tmp_path: Path) -> None:
    cache, builds = TokenCache(tmp_path, 10), [Builder(i) for i in range(2)]
    for i, build in enumerate(builds):
        check(cache.get(KEYS[i], "rows", build), i)
        check(cache.get(KEYS[i], "rows", build), i)
    assert [build.count for build in builds] == [1, 1]
    assert [(tmp_path / key).exists() for key in KEYS[:2]] == [False, True]


def test_what_is_mapped_stays_readable_when_it_is_deleted(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, 10)
    store = cache.get(KEYS[0], "rows", Builder(0))
    cache.get(KEYS[1], "rows", Builder(1))
    assert not (tmp_path / KEYS[0]).exists()
    check(store)


def test_what_is_no_entry_is_never_deleted(tmp_path: Path) -> None:
    """Somebody may name a folder that holds other things."""
    for name in ("thesis", "thesis.partial", KEYS[0][:39]):
        (tmp_path / name).mkdir()
        (tmp_path / name / META).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    TokenCache(tmp_path, 10).get(KEYS[0], "rows", Builder())
    TokenCache(tmp_path, 10).get(KEYS[1], "rows", Builder())
    kept = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert kept == sorted(["thesis", "thesis.partial", KEYS[0][:39], "notes.txt", KEYS[1]])


def test_data_cache_gib_is_the_bound(write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "cache"
    for i in range(3):
        path = write_jsonl([{"text": f"{i} lamp" * 300}] * 20, f"{i}.jsonl")
        load_data(data_config(path, cache=True, cache_dir=str(folder), cache_gib=1e-5), tokenizer)  # 10 KiB
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1


# Several runs at once

BUILD_SLOWLY = """
import hashlib, os, sys, time
from pathlib import Path
import numpy as np
from adaptax.data.cache import TokenCache
from adaptax.data.chat import Example
from adaptax.data.store import Counts, pack_examples

folder, key, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def build(writer):
    (folder / f"built_by_{os.getpid()}").touch()
    for start in range(4):
        examples = [Example(np.arange(start, start + 500, dtype=np.int32), np.ones(500, bool))] * 20
        writer.append(pack_examples(examples, range(20), [0] * 20))
        time.sleep(seconds / 4)
    return "text", Counts(rows=80)

print("ready", flush=True)
sys.stdin.readline()
store = TokenCache(folder, float(sys.argv[4])).get(key, "rows", build)
tokens = store.arrays["tokens"]
print(hashlib.sha256(tokens.tobytes()).hexdigest(), len(store), type(tokens.base).__name__)
"""


def start_run(folder: Path, key: str, seconds: float, limit_bytes: float = 1e9) -> subprocess.Popen[str]:
    """A process that builds an entry once it is told to go."""
    arguments = [sys.executable, "-c", BUILD_SLOWLY, str(folder), key, str(seconds), str(limit_bytes)]
    run = subprocess.Popen(arguments, cwd=SRC, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout
    assert run.stdout.readline() == "ready\n"
    return run


def go(run: subprocess.Popen[str]) -> None:
    """Lets it build."""
    assert run.stdin
    run.stdin.write("\n")
    run.stdin.flush()


def finish(run: subprocess.Popen[str]) -> list[str]:
    """What it printed, as words."""
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    return output.split()


def wait_for(is_there: Callable[[], Any]) -> Any:
    """What it gives, once that is something."""
    for _ in range(3000):
        if found := is_there():
            return found
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_two_runs_build_an_entry_once(tmp_path: Path) -> None:
    runs = [start_run(tmp_path, KEYS[0], 0.5) for _ in range(2)]
    for run in runs:
        go(run)
    first, second = (finish(run) for run in runs)
    assert first == second
    assert first[1:] == ["80", "memmap"]
    assert len(list(tmp_path.glob("built_by_*"))) == 1


def test_a_run_that_was_killed_leaves_nothing_to_trip_over(tmp_path: Path) -> None:
    """Neither in the way of the same entry, nor on the disk for ever."""
    for key in KEYS[:2]:
        run = start_run(tmp_path, key, 60)
        go(run)
        wait_for(lambda key=key: list(tmp_path.glob(f"{key}.partial/tokens.bin")))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert (tmp_path / f"{key}.partial").exists()
    build = Builder()
    check(TokenCache(tmp_path, 1e9).get(KEYS[0], "rows", build))
    assert build.count == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [KEYS[0]]


def test_a_run_that_was_killed_at_the_very_end(tmp_path: Path) -> None:
    """All is written, but not yet given its name."""
    cache = TokenCache(tmp_path, 1e9)
    cache.get(KEYS[0], "rows", Builder(0))
    for key in KEYS[:2]:
        shutil.copytree(tmp_path / KEYS[0], tmp_path / f"{key}.partial")
    check(cache.get(KEYS[2], "rows", Builder(2)), 2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted([KEYS[0], KEYS[2]])


def test_what_another_run_builds_is_not_deleted(tmp_path: Path) -> None:
    run = start_run(tmp_path, KEYS[0], 2)
    go(run)
    wait_for(lambda: list(tmp_path.glob("*.partial/tokens.bin")))
    for i in (1, 2):
        TokenCache(tmp_path, 10).get(KEYS[i], "rows", Builder(i))
    assert run.poll() is None  # it was still at it
    assert (tmp_path / f"{KEYS[0]}.partial").exists()
    assert finish(run)[1:] == ["80", "memmap"]
    assert (tmp_path / KEYS[0] / META).exists()


def test_a_killed_encoding_is_done_again(write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(chat(f"question {i}", "lamp " * 20) for i in range(20_000))
    folder = tmp_path / "cache"
    config = data_config(path, cache=True, cache_dir=str(folder))
    script = (
        "import sys; sys.path += ['../tests']\n"
        "from pathlib import Path; from rows import data_config\n"
        "from adaptax.data.pipeline import load_data; from adaptax.data.tokenizer import Tokenizer\n"
        f"load_data(data_config({str(path)!r}, cache=True, cache_dir={str(folder)!r}), "
        f"Tokenizer(Path({str(tokenizer.path)!r})))"
    )
    run = subprocess.Popen([sys.executable, "-c", script], cwd=SRC)
    partial = wait_for(lambda: list(folder.glob("*.partial/tokens.bin")))[0]
    wait_for(lambda: partial.stat().st_size > 0)
    run.kill()
    run.wait()
    assert partial.exists()  # it was killed in the middle
    again, _ = load_data(config, tokenizer)
    fresh, _ = load_data(data_config(path), tokenizer)
    for name in FIELDS:
        ours, theirs = again.examples.stores[0].arrays[name], fresh.examples.stores[0].arrays[name]
        np.testing.assert_array_equal(ours, theirs)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1


# What an entry depends on

ROWS = [
    {"prompt": "Is the lamp on?", "completion": "Yes.", "text": "alpha <end_of_turn>", "other": "question", "n": i}
    for i in range(6)
]
CHANGES: dict[str, Any] = {  # what changes tokens, or which there are
    "format": "text",
    "columns": {"prompt": "other"},
    "filter": {"n": "< 3"},
    "max_rows": 2,
    "on_bad_row": "skip",
    "supervise": "all",
    "allow_special_tokens": True,
    "min_length": 2,
    "max_length": 40,
    "overlong": "split",
}
NO_CHANGES: dict[str, Any] = {
    "eval": None,
    "eval_fraction": 0.5,
    "packing": True,
    "length_buckets": 3,
    "shuffle": False,
    "streaming": False,
    "cache_gib": 2.0,
    "prefetch_batches": 7,
}


def cached(config: DataConfig, tokenizer: Tokenizer, folder: Path) -> set[str]:
    """The entries there are after these data were loaded."""
    load_data(config, tokenizer)
    return {path.name for path in folder.iterdir() if path.is_dir()}


@pytest.fixture
def base(write_jsonl: Write, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """(changes of a configuration that keeps its tokens, where)."""
    folder = tmp_path / "cache"
    return {"train": str(write_jsonl(ROWS)), "cache": True, "cache_dir": str(folder)}, folder


def test_every_key_is_known_to_change_tokens_or_not() -> None:
    others = {"train", "mixture", "cache", "cache_dir"}
    assert {field.name for field in fields(DataConfig)} == others | CHANGES.keys() | NO_CHANGES.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_tokens_makes_another_entry(
    base: tuple[dict[str, Any], Path], tokenizer: Tokenizer, name: str
) -> None:
    values, folder = base
    first = cached(data_config(**values), tokenizer, folder)
    both = cached(data_config(**values, **{name: CHANGES[name]}), tokenizer, folder)
    assert len(first) == 1
    assert len(both) == 2


def test_a_setting_that_changes_no_tokens_makes_none(base: tuple[dict[str, Any], Path], tokenizer: Tokenizer) -> None:
    values, folder = base
    first = cached(data_config(**values), tokenizer, folder)
    for name, value in NO_CHANGES.items():
        assert cached(data_config(**values, **{name: value}), tokenizer, folder) == first, name


def test_the_content_and_not_the_name_of_a_file_decides(
    base: tuple[dict[str, Any], Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    values, folder = base
    first = cached(data_config(**values), tokenizer, folder)
    renamed = tmp_path / "elsewhere" / "renamed.jsonl"
    renamed.parent.mkdir()
    Path(values["train"]).rename(renamed)
    assert cached(data_config(**values | {"train": str(renamed)}), tokenizer, folder) == first
    stat = renamed.stat()
    renamed.write_text(renamed.read_text().replace("Yes.", "Yes!"))  # as long as before, and as old
    os.utime(renamed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    config = data_config(**values | {"train": str(renamed)})
    assert len(cached(config, tokenizer, folder)) == 2
    example = load_data(config, tokenizer)[0].examples[0]
    assert tokenizer.decode(example.tokens[example.is_trained].tolist()) == "Yes!<end_of_turn>"


def test_the_kind_of_a_file_decides_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A comma is a column's end in CSV, and text in TSV."""
    counts = []
    for name in ("rows.csv", "rows.tsv", "rows.csv"):
        (tmp_path / name).write_text("text\na,b\nc\n")
        config = data_config(tmp_path / name, cache=True, cache_dir=str(tmp_path / "cache"), on_bad_row="skip")
        counts.append(len(load_data(config, tokenizer)[0].examples))
    assert counts == [1, 2, 1]


def test_another_tokenizer_makes_another_entry(
    base: tuple[dict[str, Any], Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    values, folder = base
    other = tmp_path / "tokenizer.model"
    other.write_bytes(tokenizer.path.read_bytes() + b"\xfa\x7f\x00")  # an unknown field, which is passed over
    first = cached(data_config(**values), tokenizer, folder)
    assert cached(data_config(**values), Tokenizer(tokenizer.path), folder) == first
    assert len(cached(data_config(**values), Tokenizer(other), folder)) == 2


def test_other_code_makes_another_key(tmp_path: Path) -> None:
    shutil.copytree(SRC / "adaptax", tmp_path / "adaptax", ignore=shutil.ignore_patterns("__pycache__", "assets"))

    def key() -> str:
        command = "from adaptax.data.cache import fingerprint; print(fingerprint({'a': 1}))"
        return subprocess.run(
            [sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert key() == fingerprint({"a": 1})
    with (tmp_path / "adaptax" / "data" / "chat.py").open("a") as file:
        file.write("# changed\n")
    assert key() != fingerprint({"a": 1})


def test_each_file_has_an_entry_and_they_give_what_none_gives(
    write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "cache"
    files = [write_jsonl([chat(f"{i} {j}", "yes") for j in range(300)], f"{i}.jsonl") for i in range(3)]
    names = [str(path) for path in files]
    config = data_config(names, cache=True, cache_dir=str(folder))
    for _ in range(2):
        assert len(cached(config, tokenizer, folder)) == 3
    ours, theirs = (load_data(c, tokenizer)[0].examples for c in (config, data_config(names)))
    assert ours.digests.tolist() == theirs.digests.tolist()
    assert [ours.place(i) for i in range(900)] == [theirs.place(i) for i in range(900)]
    assert all(isinstance(array.base, np.memmap) for store in ours.stores for array in store.arrays.values())


def test_what_was_said_of_the_rows_is_said_again(
    write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl([{"text": "a"}, {"text": ""}, {"text": "lamp " * 100}])
    config = data_config(path, cache=True, cache_dir=str(tmp_path / "cache"), on_bad_row="skip")
    told = []
    for _ in range(2):
        caplog.clear()
        load_data(config, tokenizer)
        told.append(warnings_of(caplog))
    assert told[0] == told[1]
    assert len(told[0]) == 3


def test_no_cache_writes_nothing(write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder, path = tmp_path / "cache", write_jsonl(ROWS)
    before = sorted(default_folder().glob("*"))
    load_data(data_config(path, cache_dir=str(folder)), tokenizer)
    assert not folder.exists()
    assert sorted(default_folder().glob("*")) == before


def test_where_tokens_are_kept(
    write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(ROWS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_data(data_config(path, cache=True), tokenizer)
    assert len(list((tmp_path / "xdg" / "adaptax" / "tokens").glob("*/tokens.bin"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_data(data_config(path, cache=True), tokenizer)
    assert len(list((tmp_path / "home" / ".cache" / "adaptax" / "tokens").glob("*/tokens.bin"))) == 1
    load_data(data_config(path, cache=True, cache_dir="~/mine"), tokenizer)
    assert len(list((tmp_path / "home" / "mine").glob("*/tokens.bin"))) == 1


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(
    write_jsonl: Write, tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    taken = write_jsonl([], "taken")
    path = write_jsonl(ROWS)
    data, _ = load_data(data_config(path, cache=True, cache_dir=str(taken)), tokenizer)
    assert len(data.examples) == len(ROWS)
    assert warnings_of(caplog)[0].startswith(f"tokens of {path} are not kept: ")


def test_a_changed_byte_is_noticed(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """Not its size alone."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(chat(f"question {i}", f"answer {i}")) + "\n" for i in range(20)))
    config = data_config(path, cache=True, cache_dir=str(tmp_path / "cache"))
    before = load_data(config, tokenizer)[0].examples
    expected = [before[i].tokens.tolist() for i in range(len(before))]
    (file,) = (tmp_path / "cache").glob("*/tokens.bin")
    raw = bytearray(file.read_bytes())
    raw[101] ^= 4
    file.write_bytes(raw)
    after = load_data(config, tokenizer)[0].examples
    assert [after[i].tokens.tolist() for i in range(len(after))] == expected
    assert any("damaged" in record.getMessage() for record in caplog.records)


def test_an_entry_in_a_folder_that_others_own_is_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A lock file cannot be made there; a folder that stands in its place does as much to root."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + "\n")
    config = data_config(path, cache=True, cache_dir=str(tmp_path / "cache"))
    load_data(config, tokenizer)
    (lock,) = (tmp_path / "cache").glob("*.lock")
    lock.unlink()
    lock.mkdir()
    (store,) = load_data(config, tokenizer)[0].examples.stores
    assert isinstance(store.arrays["tokens"].base, np.memmap)


def test_a_parquet_file_that_changed_without_a_new_date_is_read_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.parquet"
    config = data_config(path, cache=True, cache_dir=str(tmp_path / "cache"))
    shown = []
    for word in ("old", "new"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [word]}), path)
        os.utime(path, (1_000_000_000, 1_000_000_000))
        shown.append(tokenizer.decode(load_data(config, tokenizer)[0].examples[0].tokens.tolist()))
    assert shown == ["old", "new"]


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n")

    def digest_and_replace(unit: str) -> str:
        found = content_digest(unit)
        path.write_text(json.dumps({"text": "three"}) + "\n")
        return found

    monkeypatch.setattr("adaptax.data.encode.content_digest", digest_and_replace)
    config = data_config(path, cache=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"rows.jsonl changed while it was read"):
        load_data(config, tokenizer)
    assert not list((tmp_path / "cache").glob("*/meta.json"))
