"""Checkpoints as files: what is whole, what is damaged, what gets its name and what goes."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import small_runs
import support
from adaptax.manifest import (
    FORMAT,
    Damaged,
    Manifest,
    clean_up,
    delete_checkpoint,
    list_checkpoints,
    name_step,
    publish,
    read_checkpoint,
    seal,
    step_of,
)
from adaptax.run_folder import RunFolder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a run writes it."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    return small_runs.save_steps(folder, small_runs.make_state(support.make_mesh()), 7)[0]


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def files_of(checkpoint: Path) -> list[Path]:
    """All that it consists of."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def why_damaged(checkpoint: Path) -> str:
    """What is said of it."""
    with pytest.raises(Damaged) as caught:
        read_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_plain(path: Path, step: int) -> Path:
    """A small one without jax, sealed."""
    (path / "arrays").mkdir(parents=True)
    (path / "arrays" / "data").write_text(f"{step}")
    seal(path, Manifest(step, "2026-01-01T00:00:00+00:00", {}, {}, {}, {}))
    return path


# What is whole


def test_a_checkpoint_is_read_as_it_was_written(whole: Path) -> None:
    manifest = read_checkpoint(whole)
    assert (manifest.step, manifest.config, manifest.identity) == (7, {"name": "test"}, {"base": "none"})
    assert manifest.progress["train_loss"] == 1.0
    assert any("attn/q_einsum/w_lora_a" in name for name in manifest.digests)


def test_sha256sum_agrees(whole: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {line.rpartition(": ")[0] for line in done.stdout.splitlines()}
    assert names == {file.relative_to(whole).as_posix() for file in files_of(whole)} - {"SHA256SUMS"}


def test_what_systems_leave_behind_is_no_damage(checkpoint: Path) -> None:
    for folder in (checkpoint, checkpoint / "arrays", checkpoint / "arrays" / "state"):
        (folder / ".DS_Store").write_bytes(b"\0\1")
        (folder / "._manifest.json").write_bytes(b"\0")
    (checkpoint / "empty folder").mkdir()
    assert read_checkpoint(checkpoint).step == 7


# What is damaged


def flip(file: Path, rng: random.Random) -> None:
    """One bit of a file."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


@pytest.mark.parametrize("is_by_size", [True, False], ids=["by_size", "by_file"])
def test_each_of_a_hundred_flipped_bits_is_found_and_its_file_is_named(checkpoint: Path, is_by_size: bool) -> None:
    rng = random.Random(is_by_size)
    files = [file for file in files_of(checkpoint) if file.stat().st_size]
    weights = [file.stat().st_size if is_by_size else 1 for file in files]
    chosen = rng.choices(files, weights, k=100)
    for file in chosen:
        good = file.read_bytes()
        flip(file, rng)
        told, name = why_damaged(checkpoint), file.relative_to(checkpoint).as_posix()
        # a sum that was flipped is a sum that the file has no more
        assert f"{name} is " in told or name == "SHA256SUMS", (name, told)
        assert "is not what was written" in told or "is missing" in told
        file.write_bytes(good)
    assert read_checkpoint(checkpoint).step == 7
    assert len(set(chosen)) > 8 or is_by_size


@pytest.mark.parametrize("change", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"\0"])
def test_a_file_of_another_length_is_found_and_named(checkpoint: Path, change: Callable[[bytes], bytes]) -> None:
    for file in files_of(checkpoint):
        good = file.read_bytes()
        if change(good) == good:
            continue
        file.write_bytes(change(good))
        name = file.relative_to(checkpoint).as_posix()
        assert why_damaged(checkpoint) == f"{name} is not what was written"
        file.write_bytes(good)


def test_each_file_that_is_missing_is_named(checkpoint: Path) -> None:
    for file in files_of(checkpoint):
        good = file.read_bytes()
        file.unlink()
        assert why_damaged(checkpoint) == f"{file.relative_to(checkpoint).as_posix()} is missing"
        file.write_bytes(good)


def test_a_file_too_many_is_named(checkpoint: Path) -> None:
    (checkpoint / "arrays" / "extra").write_text("")
    assert why_damaged(checkpoint) == "arrays/extra is none of its files"


def test_two_files_that_changed_places_are_found(checkpoint: Path) -> None:
    first, second = checkpoint / "manifest.json", checkpoint / "arrays" / "state" / "_METADATA"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert "is not what was written" in why_damaged(checkpoint)


@pytest.mark.parametrize("is_folder", [False, True])
def test_links_are_not_followed(checkpoint: Path, tmp_path: Path, is_folder: bool) -> None:
    path = checkpoint / "arrays" if is_folder else checkpoint / "manifest.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert why_damaged(checkpoint) == f"{path.name} is a link"


def test_links_that_nobody_wrote_are_damage_even_where_they_are_hidden(checkpoint: Path) -> None:
    (checkpoint / ".loop").symlink_to(checkpoint)
    assert why_damaged(checkpoint) == ".loop is a link"


def test_sums_that_are_a_link_are_not_read(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "SHA256SUMS").rename(tmp_path / "sums")
    (checkpoint / "SHA256SUMS").symlink_to(tmp_path / "sums")
    assert why_damaged(checkpoint) == "SHA256SUMS is a link"


def test_a_step_that_is_missing_or_empty_or_a_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / name_step(1)
    assert why_damaged(path) == "it is missing"
    path.mkdir()
    assert why_damaged(path) == "SHA256SUMS is missing"
    path.rmdir()
    path.write_text("")
    assert "it cannot be read" in why_damaged(path)


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS"])
def test_a_folder_in_place_of_a_file_is_damage(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    assert why_damaged(checkpoint) in (f"{name} is missing", "it cannot be read: Is a directory")


def reseal(checkpoint: Path, text: str) -> str:
    """What is said of a checkpoint whose manifest says this, all hashes being right."""
    import hashlib

    file = checkpoint / "manifest.json"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(text)
    sums = checkpoint / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, hashlib.sha256(file.read_bytes()).hexdigest()))
    return why_damaged(checkpoint)


def test_another_format_is_told_as_that(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "manifest.json").read_text())
    text = json.dumps(values | {"format": FORMAT + 1, "new key": 0})
    assert reseal(checkpoint, text) == (
        f"it was written by another version of adaptax (format {FORMAT + 1}, this one reads {FORMAT})"
    )


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"format": 1}', "[" * 100_000, '{"format": 1, "step": 7, "surprise": 0}'],
    ids=["empty", "null", "list", "nothing", "format_alone", "deep", "other_keys"],
)
def test_a_manifest_that_is_none_is_told(checkpoint: Path, text: str) -> None:
    assert reseal(checkpoint, text) == "manifest.json is not a manifest"


def test_keys_that_are_missing_from_a_manifest_are_told(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "manifest.json").read_text())
    del values["digests"]
    assert reseal(checkpoint, json.dumps(values)) == "manifest.json is not a manifest"


def test_a_checkpoint_under_another_ones_name_is_damaged(checkpoint: Path) -> None:
    other = checkpoint.with_name(name_step(8))
    checkpoint.rename(other)
    assert why_damaged(other) == "its manifest.json is of step 7"


# Names


def test_only_names_of_steps_are_checkpoints(tmp_path: Path) -> None:
    steps = [0, 10, 9, 123456789, 99999999]
    for step in steps:
        (tmp_path / name_step(step)).mkdir()
    for name in (
        "step_1",
        "step_../",
        "step_0000000x",
        "step_00000003.partial",
        "step_00000001.orig",
        "other",
        "step_",
    ):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / " step_00000005").mkdir()
    (tmp_path / "step_٠٠٠٠٠٠٠٧").mkdir()
    (tmp_path / "step_000000009").mkdir()  # the same number, but not as it is written
    (tmp_path / "step_00000006").write_text("a file")
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == sorted(steps)
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_names_and_steps_go_both_ways() -> None:
    for step in (0, 1, 99_999_999, 100_000_000, 10**12):
        assert step_of(Path("a") / name_step(step)) == step


# Putting into place, and away


def test_a_checkpoint_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = publish(make_plain(tmp_path / "step_00000004.partial", 4))
    assert path == tmp_path / "step_00000004"
    assert read_checkpoint(path).step == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000004"]


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    old = make_plain(tmp_path / "step_00000004", 4)
    (old / "arrays" / "data").write_text("damaged")
    publish(make_plain(tmp_path / "step_00000004.partial", 4))
    assert read_checkpoint(old).step == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000004"]


def test_what_a_kill_left_behind_goes_and_what_it_had_put_aside_comes_back(tmp_path: Path) -> None:
    make_plain(tmp_path / "step_00000001.partial", 1)
    make_plain(tmp_path / "step_00000002.deleted", 2)
    make_plain(tmp_path / "step_00000003.replaced", 3)  # killed between the two renames
    make_plain(tmp_path / "step_00000003.partial", 3)
    make_plain(tmp_path / "step_00000004.replaced", 4)  # killed after them
    make_plain(tmp_path / "step_00000004", 4)
    (tmp_path / "step_00000005.partial").write_text("half a file")
    foreign = {"step_9.partial", "notes.partial", "step_00000009.bak"}
    for name in foreign:
        (tmp_path / name).mkdir()
    clean_up(tmp_path)
    left = {path.name for path in tmp_path.iterdir()} - {"step_00000005.partial"}
    assert left == {"step_00000003", "step_00000004"} | foreign
    assert [read_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [3, 4]
    clean_up(tmp_path)  # again changes nothing
    clean_up(tmp_path / "nowhere")
    assert {path.name for path in tmp_path.iterdir()} - {"step_00000005.partial"} == left


def test_a_replaced_one_that_a_kill_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    """A kill came while the replaced one was being deleted, and nothing cleaned up since."""
    make_plain(tmp_path / "step_00000004.replaced", 4)
    make_plain(tmp_path / "step_00000004", 4)
    publish(make_plain(tmp_path / "step_00000004.partial", 4))
    assert read_checkpoint(tmp_path / "step_00000004").step == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000004"]


def test_a_checkpoint_is_deleted_even_where_an_earlier_deletion_was_cut_short(tmp_path: Path) -> None:
    path = make_plain(tmp_path / name_step(1), 1)
    make_plain(tmp_path / (name_step(1) + ".deleted"), 1)
    delete_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_plain_json(whole: Path) -> None:
    values = json.loads((whole / "manifest.json").read_text())
    assert values.pop("format") == FORMAT
    assert values.keys() == {field.name for field in dataclasses.fields(Manifest)}
