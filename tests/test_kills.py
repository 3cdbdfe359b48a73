"""Runs that are killed, stopped by signals and started again end as if nothing had happened, to the last bit.

Every test is a chain of processes on one folder. All chains that were asked for begin at once, since a process alone
does not keep two cores busy; a test waits for the end of its own.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import moments
import small_runs
from adaptax.manifest import list_checkpoints
from adaptax.run_folder import RunFolder
from command_line import start_process
from rows import chat
from started import (
    EVERY,
    NUM_STEPS,
    OPTIONS,
    SOURCE,
    Bench,
    Started,
    check_same,
    newest_step,
    read_end,
    read_manifest,
    read_rows,
)

pytestmark = pytest.mark.slow
GRACE_SECONDS = 30  # as configured
Reference = dict[str, Any]
Chain = Callable[[Bench, Reference], None]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = small_runs.write_home(tmp_path_factory.mktemp("home"))
    small_runs.write_rows(home / "eval.jsonl", 40, seed=1)
    return Bench(home)


@pytest.fixture(scope="module")
def reference(bench: Bench) -> Reference:
    """What an uninterrupted run leaves behind."""
    with bench.start("reference") as run:
        assert run.end() == 0, run.text
    end = read_end(bench.folder("reference"))
    assert [row["step"] for row in end["rows"] if "train_loss" in row] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in end["rows"] if "eval_loss" in row] == [*range(0, NUM_STEPS, EVERY), NUM_STEPS]
    assert end["step"] == NUM_STEPS
    assert not end["unfinished"]
    assert {str(Path(name).parent) for name in end["weights"]} == {"adapter", "adapters/best", "adapters/last"}
    return end


@pytest.fixture(scope="module")
def begun(request: pytest.FixtureRequest, bench: Bench, reference: Reference) -> Iterator[dict[Chain, Future[None]]]:
    """The chains that were asked for, begun together."""
    items = [item for item in request.session.items if item.nodeid.startswith(request.node.nodeid)]
    asked = [item.callspec.params["chain"] for item in items if hasattr(item, "callspec")]  # type: ignore[attr-defined]
    crew = ThreadPoolExecutor(3)
    yield {chain: crew.submit(chain, bench, reference) for chain in CHAINS if chain in asked}
    crew.shutdown(cancel_futures=True)


# Kills


def killed(bench: Bench, reference: Reference) -> None:
    """The first half of 25 kills."""
    kill_again_and_again(bench, reference, 0)


def killed_too(bench: Bench, reference: Reference) -> None:
    """The other half."""
    kill_again_and_again(bench, reference, 1)


def kill_again_and_again(bench: Bench, reference: Reference, half: int) -> None:
    folder, rng, told = bench.folder(f"killed_{half}"), random.Random(half), []
    for moment in moments.HALVES[half]:
        with bench.start(folder.path.name) as run:
            moment(run, folder, rng)
            run.send(signal.SIGKILL)
            code = run.end()
            told.append((moment.__name__, code, newest_step(folder)))
            assert code == 137, (told, run.text)
    with bench.start(folder.path.name) as run:
        assert run.end() == 0, (told, run.text)
    check_same(folder, reference)


# Signals


def stop_in_training(folder: RunFolder, run: Started, number: int, *, group: bool = False) -> list[str]:
    """Stops a run after a few steps, of which none is lost. Returns the command that goes on."""
    assert run.see(rf"\nstep {newest_step(folder) + 4}/"), run.text
    run.send(number, group=group)
    assert run.end(within=GRACE_SECONDS) == 128 + number, run.text
    assert f"stopped by {signal.Signals(number).name}: saved; go on with: python " in run.text
    assert newest_step(folder) == last_step(run)
    return run.resume_command


def last_step(run: Started) -> int:
    """The last step that a run has told of."""
    return max(int(step) for step in re.findall(r"\nstep (\d+)/", run.text))


def stop_in_evaluation(bench: Bench, folder: RunFolder, command: list[str]) -> list[str]:
    """Stops a run while it evaluates, which it leaves off at once. Returns the command that goes on."""
    for _ in range(6):
        with bench.call(command) as run:
            step = newest_step(folder) // EVERY * EVERY + EVERY
            assert run.see(rf"\nstep {step}/"), run.text
            for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):  # it stands still while the signal comes
                run.send(number)
            assert run.end(within=GRACE_SECONDS) == 143, run.text
            command = run.resume_command
        if f"evaluation loss after {step} " not in run.text:
            manifest = read_manifest(folder)
            assert (manifest["step"], manifest["progress"]["eval_step"]) == (step, step - EVERY)
            return command
    raise AssertionError("it was never met while it evaluated")


def stopped(bench: Bench, reference: Reference) -> None:
    """While it compiles, with nothing to save yet; in training, alone and with its whole group; in an evaluation."""
    folder = bench.folder(name := "stopped (by=signals), it's")
    with bench.start(name) as run:
        assert run.see("rows to train")
        run.send(signal.SIGINT, group=True)
        assert run.end(within=GRACE_SECONDS) == 130
        assert "stopped by SIGINT: nothing was saved yet" in run.text
    with bench.start(name) as run:
        command = stop_in_training(folder, run, signal.SIGTERM)
    with bench.call(command) as run:
        command = stop_in_training(folder, run, signal.SIGINT, group=True)
    command = stop_in_evaluation(bench, folder, command)
    with bench.call(command) as run:
        assert run.end() == 0, run.text
    check_same(folder, reference)


LAUNCHER = f"""\
import signal, sys
sys.path.insert(0, {SOURCE!r})
from adaptax.cli import main
signal.signal(signal.SIGUSR2, lambda number, frame: print(f"the launcher was called: {{number}}", file=sys.stderr))
signal.signal(signal.SIGTERM, lambda number, frame: print(f"the launcher passes over {{number}}", file=sys.stderr))
main()
"""


def stopped_under_a_launcher(bench: Bench, reference: Reference) -> None:
    """Signals of a user, then those of a launcher that has handlers of its own: they are called after the save."""
    folder, script = bench.folder("launched"), bench.home / "launcher.py"
    script.write_text(LAUNCHER)
    with bench.start("launched") as run:
        stop_in_training(folder, run, signal.SIGUSR1)
    with bench.start("launched", script=script) as run:
        assert run.see("resumed from")
        run.send(signal.SIGTERM)
        command = stop_in_training(folder, run, signal.SIGUSR2, group=True)
        told = re.findall("the launcher .*|stopped by.*saved", run.text)
        assert told == ["the launcher passes over 15", "stopped by SIGUSR2: saved", "the launcher was called: 12"]
    with bench.call(command) as run:
        assert run.end() == 0, run.text
    check_same(folder, reference)


def stopped_at_once(bench: Bench, reference: Reference) -> None:
    """By a second signal, and by the end of the time of grace, in a step of some seconds: nothing is damaged."""
    options = ["training.gradient_accumulation_steps=512", "training.num_batches=1", "training.num_epochs=2"]
    options += ["training.eval_every_steps=null", "checkpoint.every_steps=1"]
    folder = bench.folder("long")
    with bench.start("long", *options) as run:
        assert run.see("evaluation loss after 0")
        started = time.monotonic()
        assert run.see("checkpoint of step 1:")
        seconds = time.monotonic() - started
        assert run.wait_until(lambda: newest_step(folder) == 1)
        run.send(signal.SIGTERM)
        assert run.see("SIGTERM: saving, then stopping")
        assert time_end(run, signal.SIGTERM) < seconds / 2
        assert run.end() == 143
        assert "SIGTERM again: stopped at once, nothing more is saved" in run.text
    with bench.start("long", *options, "checkpoint.grace_seconds=0.1") as run:
        assert run.see("start-up took")
        time.sleep(seconds / 4)
        assert time_end(run, signal.SIGINT) < seconds / 2
        assert run.end() == 130
        assert "not saved within checkpoint.grace_seconds=0.1" in run.text
    assert newest_step(folder) == 1
    with bench.start("long", *options) as run:
        assert run.end() == 0, run.text
    assert [row["step"] for row in read_end(folder)["rows"]] == [0, 1, 2, 2]


def time_end(run: Started, number: int) -> float:
    """Seconds from a signal to the end."""
    started = time.monotonic()
    run.send(number)
    run.end()
    return time.monotonic() - started


def closed_terminal(bench: Bench, reference: Reference) -> None:
    """In which a progress bar is drawn, and now cannot be."""
    folder = bench.folder("terminal")
    with bench.start_in_terminal("terminal") as run:
        assert run.end() == 129, run.text
    assert 0 < newest_step(folder) < NUM_STEPS
    assert "stopped by SIGHUP: saved" in (folder.path / "run.log").read_text()


# Two processes of one run


def two_processes(bench: Bench, reference: Reference) -> None:
    """Killed both, and one, without which the other comes to its end too; a signal to one saves and stops both."""
    small_runs.write_rows(bench.home / "small.jsonl", 6, seed=1)
    small = "data.eval=small.jsonl"
    with bench.start_two(None, "name=two", small) as both:
        assert [process.end() for process in both] == [0, 0], (both[0].text, both[1].text)
    (undisturbed,) = bench.home.glob("outputs/two/*/*")  # of process 0, and none of the other's
    folder, rng = bench.folder("two"), random.Random(0)
    for moment, numbers in moments.TOGETHER:
        with bench.start_two("two", small) as both:
            moment(both[0], folder, rng)
            for number in numbers:
                both[number].send(signal.SIGKILL)
            assert {both[number].end() for number in numbers} == {137}, (both[0].text, both[1].text)
            if numbers == [0]:
                assert both[1].end() != 0
    with bench.start_two("two", small) as both:
        assert both[0].see(rf"\nstep {newest_step(folder) + 4}/"), both[0].text
        both[1].send(signal.SIGTERM)
        assert [process.end(within=GRACE_SECONDS) for process in both] == [143, 143], (both[0].text, both[1].text)
        assert newest_step(folder) == last_step(both[0])
    with bench.start_two("two", small) as both:
        assert [process.end() for process in both] == [0, 0], (both[0].text, both[1].text)
    check_same(folder, read_end(RunFolder(undisturbed)))


def two_processes_of_which_one_fails(bench: Bench, reference: Reference) -> None:
    """Neither waits for the other, be it that one is stopped before there is something to save."""
    with bench.start_two(None, "name=alone", "data.eval=null") as both:
        assert both[0].see("rows to train"), both[0].text
        both[1].send(signal.SIGTERM)
        assert both[1].end(within=GRACE_SECONDS) == 143
        assert both[0].end(within=2 * GRACE_SECONDS) != 0


# Errors and sweeps


def bad_row_late_in_a_stream(bench: Bench, reference: Reference) -> None:
    """The save that is under way is kept; once the row is mended, the run goes on as if it had been good."""
    rows = [chat(f"turn on light {i}", f"light {i} is on") for i in range(600)]
    options = ["data.train=stream.jsonl", "data.streaming=true", "data.shuffle=false", "data.eval=null"]
    options += ["data.eval_fraction=0", "training.num_batches=60", "training.num_epochs=1"]
    options += ["training.eval_every_steps=null", "checkpoint.every_steps=8"]
    bad = [row | {"messages": 3} if i == 300 else row for i, row in enumerate(rows)]
    write(bench.home / "stream.jsonl", bad)
    folder = bench.folder("stream")
    with bench.start("stream", *options) as run:
        assert run.end() == 1, run.text
        assert run.text.endswith("\nerror: stream.jsonl row 301: messages must be a list of turns, not 3\n")
        assert newest_step(folder) == last_step(run) == 48
    write(bench.home / "stream.jsonl", rows)
    for name in ("stream", "straight"):
        with bench.start(name, *options) as run:
            assert run.end() == 0, run.text
    check_same(folder, read_end(bench.folder("straight")))


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sweep(bench: Bench, reference: Reference) -> None:
    """A signal ends all of it; started again, it passes over the finished job and goes on with the other."""
    options = ["--multirun", "training.num_epochs=1,6", "hydra.sweep.dir=sweep"]
    first, second = bench.folder("sweep/0"), bench.folder("sweep/1")
    with bench.start(None, *options) as run:
        stop_in_training(first, run, signal.SIGTERM)
    assert not second.path.exists()
    with bench.start(None, *options) as run:
        assert run.see(r"\nstep 20/"), run.text
        run.send(signal.SIGKILL)
        run.end()
    before = contents(first.path)
    with bench.start(None, *options) as run:
        assert run.end() == 0, run.text
        assert re.search(r"sweep/0 is finished: 6 steps(.|\n)*resumed from .*sweep/1/", run.text), run.text
    assert contents(first.path) == before
    check_same(second, reference)


def contents(path: Path) -> dict[str, bytes]:
    """All files of a folder, but its messages."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "run.log"]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


# One folder, several runs


def second_run_on_a_folder(bench: Bench, reference: Reference) -> None:
    """It is refused while the first one is at work, and changes none of its files; not after that was killed."""
    folder = bench.folder("held")
    with bench.start("held") as first:
        assert first.see("checkpoint of step 5")
        first.send(signal.SIGSTOP)
        before = contents(folder.path)
        with bench.start("held") as second:
            assert second.end() == 1
        where = f"{folder.path}: wait for it, or choose another hydra.run.dir"
        assert second.text == f"error: another run is at work in {where}\n"
        assert contents(folder.path) == before
        first.send(signal.SIGKILL)
        first.end()
    with bench.start("held") as third:
        assert third.see("rows to train"), third.text


def runs_that_start_together(bench: Bench, reference: Reference) -> None:
    """They get folders of their own."""
    with bench.start(None, "name=twins") as first, bench.start(None, "name=twins") as second:
        assert first.see("rows to train")
        assert second.see("rows to train")
    folders = {path.parent for path in bench.home.glob("outputs/twins/*/*/config.yaml")}
    assert len(folders) == 2


def finished_run_with_more_epochs(bench: Bench, reference: Reference) -> None:
    folder = copy_reference(bench, "longer")
    with bench.start("longer", "training.num_epochs=7") as run:
        assert run.end() == 0, run.text
        assert "the learning-rate schedule (cosine) now spans the new number of steps" in run.text
    rows, before = read_rows(folder), reference["rows"]
    assert rows[: len(before)] == before
    more = list(range(NUM_STEPS + 1, NUM_STEPS + 7))
    assert [row["step"] for row in rows[len(before) :] if "train_loss" in row] == more
    assert read_end(folder)["summary"]["step"] == more[-1]


def torn_metrics(bench: Bench, reference: Reference) -> None:
    """As a machine leaves them that has lost its power: half a line at the end, and the last checkpoint not there."""
    folder = copy_reference(bench, "torn")
    shutil.rmtree(list_checkpoints(folder.checkpoints)[-1])
    shutil.rmtree(folder.adapter)
    folder.summary.unlink()
    folder.metrics.write_bytes(folder.metrics.read_bytes()[:-9])
    with bench.start("torn") as run:
        assert run.end() == 0, run.text
    check_same(folder, reference)


def copy_reference(bench: Bench, name: str) -> RunFolder:
    """A copy of the reference run under another name."""
    shutil.copytree(bench.folder("reference").path, bench.home / name)
    return bench.folder(name)


CHAINS: list[Chain] = [two_processes, killed, killed_too, stopped, stopped_under_a_launcher, stopped_at_once]
CHAINS += [closed_terminal, bad_row_late_in_a_stream, sweep, two_processes_of_which_one_fails, second_run_on_a_folder]
CHAINS += [runs_that_start_together, finished_run_with_more_epochs, torn_metrics]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.__name__)
def test_a_run_goes_on_as_if_nothing_had_happened(begun: dict[Chain, Future[None]], chain: Chain) -> None:
    begun[chain].result()


def test_a_finished_run_says_so_and_changes_nothing(bench: Bench, reference: Reference, tmp_path: Path) -> None:
    folder = bench.folder("reference")
    before = contents(folder.path)
    answer = start_process(bench.home, tmp_path, *OPTIONS, "hydra.run.dir=reference")
    assert answer.code == 0, answer.err
    assert f"is finished: {NUM_STEPS} steps" in answer.err
    assert not answer.imported_jax
    assert contents(folder.path) == before
