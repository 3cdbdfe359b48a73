"""The list of a run's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adaptax.config import UserError
from adaptax.inventory import show_checkpoints
from adaptax.manifest import name_step, read_checkpoint, seal
from adaptax.run_folder import RunFolder
from command_line import Answer
from small_runs import make_config, write_run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of 2 (the best), 4 and 6."""
    return write_run(tmp_path / "run", make_config(tmp_path), 2, 4, 6)


def rows_of(text: str) -> dict[int, list[str]]:
    """Step -> the cells beside it, those put together that go over several lines."""
    rows: dict[int, list[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0]:
            rows[int(cells[0].removeprefix("step_"))] = cells[1:]
        elif cells:
            last = rows[max(rows)]
            last[:] = [f"{above} {below}".strip() for above, below in zip(last, cells[1:], strict=True)]
    return rows


def test_every_checkpoint_is_listed_with_its_losses(folder: RunFolder, capsys) -> None:
    assert show_checkpoints(folder.path)
    shown = capsys.readouterr().out
    assert folder.path.name in shown
    rows = rows_of(shown)
    assert {step: [row[0], *row[2:]] for step, row in rows.items()} == {
        2: ["2026-01-01T00:00:00", "0.5000", "1.0000", "good, best"],
        4: ["2026-01-01T00:00:00", "1.0000", "2.0000", "good"],
        6: ["2026-01-01T00:00:00", "1.5000", "3.0000", "good, resumed from"],
    }
    assert all(float(row[1]) >= 0 for row in rows.values())


def test_damaged_ones_are_named_and_the_newest_good_one_is_resumed_from(folder: RunFolder, capsys) -> None:
    (folder.checkpoints / name_step(6) / "arrays" / "data").write_text("7")
    (folder.checkpoints / name_step(2) / "SHA256SUMS").unlink()
    (folder.checkpoints / "step_00000007.partial").mkdir()
    assert not show_checkpoints(folder.path)
    shown = capsys.readouterr().out
    rows = rows_of(shown)
    assert [rows[step][-1].partition(":")[0] for step in (2, 4, 6)] == ["damaged", "good, resumed from", "damaged"]
    assert rows[2][-1] == "damaged: SHA256SUMS is missing"
    assert rows[6][-1] == "damaged: arrays/data is not what was written"


def test_a_list_changes_nothing(folder: RunFolder) -> None:
    (folder.checkpoints / "step_00000007.partial").mkdir()
    before = sorted(path.stat().st_mtime_ns for path in folder.path.rglob("*"))
    show_checkpoints(folder.path)
    assert sorted(path.stat().st_mtime_ns for path in folder.path.rglob("*")) == before


def test_losses_that_are_not_there_are_left_out_and_markup_is_none(tmp_path: Path, capsys) -> None:
    folder = write_run(tmp_path / "[red]run[" / "a", make_config(tmp_path), 1)
    path = folder.checkpoints / name_step(1)
    saved = read_checkpoint(path)
    saved.progress.update(train_loss=float("nan"), eval_step=None, eval_loss=None)
    seal(path, saved)
    assert show_checkpoints(folder.path)
    shown = capsys.readouterr().out
    assert rows_of(shown)[1][2:4] == ["nan", ""]
    assert "[red]run[" in "".join(line.strip() for line in shown.splitlines())


@pytest.mark.parametrize(("what", "words"), [("used", "has no checkpoints"), ("empty", "is no run's folder")])
def test_a_folder_without_checkpoints_is_told(tmp_path: Path, what: str, words: str) -> None:
    write_run(tmp_path / "used", make_config(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        show_checkpoints(tmp_path / what)
    with pytest.raises(UserError, match="does not exist"):
        show_checkpoints(tmp_path / "nowhere")


def test_the_command_answers_by_its_exit_code_without_jax(home: Path, run: Callable[..., Answer]) -> None:
    folder = write_run(home / "run", make_config(home), 2, 4)
    good = run("checkpoints", "run")
    assert (good.code, good.imported_jax) == (0, False), good.err
    assert good.out.count("step_") == 2
    (folder.checkpoints / name_step(4) / "manifest.json").write_text("")
    bad = run("checkpoints", "run")
    assert bad.code == 1
    assert rows_of(bad.out)[4][-1] == "damaged: manifest.json is not what was written"
    assert run("checkpoints", "nowhere").err.startswith("error: nowhere does not exist")
