"""The folder of a run: who may write to it, who may read it, and what does not stand in it."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from adaptax.config import UserError
from adaptax.run_folder import RunFolder, write_text
from small_runs import as_overrides, write_home

SCRIPT = Path(__file__).parents[1] / "run_training.py"
SECRET = "hf_" + "Sup3rSecret" * 3


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "näh\n")
    assert path.read_text(encoding="utf-8") == "näh\n"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "näh\n"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "file", "text")


def test_a_folder_is_used_when_a_run_has_begun_in_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.is_used()
    folder.config.write_text("name: a")
    (tmp_path / "run.log").write_text("")
    assert not folder.is_used()
    folder.checkpoints.mkdir()
    assert folder.is_used()
    folder.checkpoints.rmdir()
    folder.metrics.write_text("")
    assert folder.is_used()


def test_a_folder_is_locked_once_and_free_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.lock(), pytest.raises(UserError, match="another run is at work in"):
        folder.lock()
    with folder.lock():
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to: .*; choose another hydra.run.dir"):
        RunFolder(tmp_path / "file").lock()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_told_in_a_line_and_other_errors_are_not(tmp_path: Path, code: int) -> None:
    folder = RunFolder(tmp_path)
    for name in ("some/file", None):
        with (
            pytest.raises(UserError, match=f"{name or tmp_path} cannot be written: {os.strerror(code)}"),
            folder.guard(),
        ):
            raise OSError(code, os.strerror(code), name)
    with pytest.raises(FileNotFoundError), folder.guard():
        raise FileNotFoundError(errno.ENOENT, "gone", "file")
    with folder.guard():
        pass


def test_what_a_run_writes_is_for_all_to_read_and_holds_no_secret(tmp_path: Path) -> None:
    home = write_home(tmp_path)
    changes = {"training.num_batches": 2, "hydra.run.dir": "run", "logging.tensorboard": True, "logging.plot": True}
    changes |= {"optimizer.learning_rate": 3e38, "optimizer.max_grad_norm": None}  # the second batch is written down
    overrides = as_overrides(changes)
    done = subprocess.run(
        [sys.executable, SCRIPT, *overrides],
        cwd=home,
        env=os.environ | {"HF_TOKEN": SECRET, "HUGGING_FACE_HUB_TOKEN": SECRET, "MY_API_KEY": SECRET},
        capture_output=True,
        text=True,
        umask=0o022,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    names = {path.relative_to(tmp_path / "run").parts[0] for path in written[1:]}
    assert {"adapter", "adapters", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "run.log"} <= names
    assert {"run.lock", "summary.json", "tensorboard", "nonfinite"} <= names
    for path in written:
        mode = path.stat().st_mode
        assert stat.S_IMODE(mode) == (0o755 if path.is_dir() else 0o644), path
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
        assert not path.name.endswith((".partial", ".old", ".deleted", ".replaced")), path
    assert SECRET not in done.stdout + done.stderr
