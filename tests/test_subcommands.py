"""The commands after training, called as from a terminal: whose configuration counts, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import small_runs
from adaptax.config import UserError
from adaptax.options import OPTIONS, EvaluateOptions, GenerateOptions, option_names
from adaptax.subcommands import resolve
from command_line import Called, call


@pytest.fixture(autouse=True)
def _in_the_users_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def expect_error(called: Called, *words: str) -> None:
    """Exit code 1 and one line that holds the words, after what was logged."""
    assert called.code == 1, called
    last = called.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert [word for word in words if word not in last] == [], last
    assert called.err.count("error: ") == 1
    assert "Traceback" not in called.err
    assert called.out == ""


# From the terminal to the answer


def test_a_prompt_is_answered_by_the_runs_configuration_but_for_the_keys_that_are_given() -> None:
    long = call("generate", "out", "prompt=light, fan; über = $x")
    assert long.code == 0, long.err
    assert long.err.startswith("adapter out/adapter: rank 4, 2 modules\n")
    short = call("generate", "run=out", "prompt='light, fan; über = $x'", "generation.max_new_tokens=2")
    assert len(short.out) > 2
    assert long.out.startswith(short.out.rstrip("\n"))
    assert len(long.out) > len(short.out)
    step = call("generate", "run=out/checkpoints/step_00000006", "prompt=light, fan; über = $x")
    assert step.out == long.out
    bare = call("generate", "run=out", "adapter=none", "prompt=light, fan; über = $x")
    assert bare.code == 0
    assert bare.out != long.out


def test_a_chat_through_a_pipe() -> None:
    called = call("generate", "run=out", "generation.max_new_tokens=2", stdin="light\n/new\nlight\n")
    assert called.code == 0, called.err
    first, second = called.out.splitlines()
    assert first == second
    assert "Ctrl-D" not in called.err


def test_a_file_of_questions_with_names_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\nlight,on\n")
    arguments = [f"data={tmp_path}/rows.csv", f"out={tmp_path}/out.jsonl", "data.columns.prompt=question"]
    called = call("generate", "run=out", "generation.batch_size=1", *arguments)
    assert called.code == 0, called.err
    [row] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row.keys() == {"question", "answer", "generated", "finish_reason"}
    expect_error(call("generate", "run=out", *arguments), "out.jsonl is there already")


def test_adapters_are_evaluated_beside_the_base(tmp_path: Path) -> None:
    """On the rows that the run has held out, and with the loss that it ended with."""
    called = call(
        "evaluate", "out", "adapters=[last,out/checkpoints/step_00000006]", "compare=base", f"out={tmp_path}/a"
    )
    assert called.code == 0, called.err
    base, last, step = json.loads((tmp_path / "a.summary.json").read_text())
    assert [summary["adapter"] for summary in (base, last, step)] == [
        "base",
        "out/adapters/last",
        "out/checkpoints/step_00000006",
    ]
    assert last["loss"] == step["loss"] == pytest.approx(small_runs.read_summary(Path("out"))["final_loss"], abs=1e-5)
    assert last["loss_change"] < 0
    assert "perplexity" in called.err


def test_rows_of_a_file_are_evaluated_and_answered(tmp_path: Path) -> None:
    called = call("evaluate", "run=out", "data=rows.jsonl", "evaluation.metric=[exact_match]", "evaluation.num_rows=2")
    assert called.code == 0, called.err
    assert "24 rows" in called.err
    assert "exact match, 2 rows" in called.err


# What is told before


@pytest.mark.parametrize("command", OPTIONS)
def test_help_tells_every_option(command: str) -> None:
    called = call(command, "--help")
    assert (called.code, called.err) == (0, "")
    assert called.out.startswith(f"usage: adaptax {command} [run=DIR]")
    for name in option_names(command):
        assert re.search(rf"^  {name} +\S", called.out, re.MULTILINE), name


def test_the_configuration_is_shown_without_a_run() -> None:
    called = call("generate", "model=gemma3_1b", "--cfg", "job", "generation.seed=7")
    assert called.code == 0, called.err
    shown = yaml.safe_load(called.out)
    assert (shown["model"]["model_size"], shown["generation"]["seed"]) == ("1b", 7)
    expect_error(call("generate", "out", "--cfg", "job"), "--cfg shows what is given here alone", "config.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "promt=hi"], ["unknown key promt: did you mean prompt?"]),
        (["generate", "adaptor=none"], ["unknown key adaptor: did you mean adapter?"]),
        (["evaluate", "adaptors=[a]"], ["did you mean adapters?"]),
        (["generate", "generation.temprature=1"], ["did you mean generation.temperature?"]),
        (["generate", "temperature=1"], ["did you mean generation.temperature?"]),
        (["evaluate", "metric=json"], ["did you mean evaluation.metric?"]),
        (["generate", "compare=base"], ["unknown key compare"]),
        (["train", "prompt=hi"], ["unknown key prompt"]),
        (
            ["generate", "prompt=hi", "--multirun"],
            ["adaptax generate looks at one configuration: leave --multirun out"],
        ),
        (["evaluate", "-m", "run=out"], ["adaptax evaluate looks at one configuration"]),
        (["generate", "run=gone", "prompt=a"], ["run=gone: no such folder; a run's folder is outputs/NAME/DATE/TIME"]),
        (["generate", "run=.", "prompt=a"], ["run=.: holds no config.yaml; did you mean out?"]),
        (["generate", "run=model", "prompt=a"], ["run=model: holds no config.yaml"]),
        (["generate", "run=", "prompt=a"], ["run= is empty"]),
        (
            ["generate", "run=out", "prompt=a", "generation.temperature=-1"],
            ["generation.temperature must be at least 0"],
        ),
        (["generate", "run=out", "prompt=a", "generation.top_p=0"], ["generation.top_p must be more than 0"]),
        (["generate", "run=out", "prompt=a", "generation.top_k=few"], ["generation.top_k", "'few'"]),
        (["generate", "run=out", "prompt=a", "generation.max_new_tokens=0"], ["max_new_tokens must be at least 1"]),
        (["evaluate", "run=out", "evaluation.metric=exact"], ["did you mean exact_match?"]),
        (["evaluate", "run=out", "evaluation.metric=regex"], ["evaluation.metric=regex needs evaluation.pattern"]),
        (["evaluate", "run=out", "adapters=none"], ["adapters must be a list such as", "not 'none'"]),
        (["evaluate", "run=out", "adapters=[]"], ["adapters must be a list such as"]),
        (["evaluate", "run=out", "adapters=[best]", "adapter=last"], ["adapter and adapters are both given"]),
        (["generate", "run=out", "prompt=a", "model.lora_rank=2"], ["model.lora_rank is of a training"]),
        (["generate", "run=out", "prompt=a", "model.init_adapter=x"], ["model.init_adapter is of a training"]),
        (["generate", "adapter=out/adapter", "prompt=a"], ["out/adapter is of a run", "set run=", "/out too"]),
        (["generate", "adapter=out/checkpoints/step_00000003", "prompt=a"], ["is of a run", "/out too"]),
        (["generate", "adapter=best", "prompt=a"], ["adapter=best is one of a run's: set run=DIR"]),
        (
            ["generate", "run=out/checkpoints/step_00000009", "prompt=a"],
            ["no such checkpoint; there are step_00000003"],
        ),
        (["generate", "run=out", "prompt=a", "model=gemma3_tiny"], ["model= must be the model"]),
        (["generate", "run=out", "prompt=a", "model.mesh_shape=[[32,1],[fsdp,tp]]"], ["32 devices"]),
        (["evaluate", "run=out", "data=gone.jsonl"], ["gone.jsonl: no such file"]),
        (["evaluate", "run=out", "data=eval.json"], ["did you mean eval.jsonl?"]),
        (["evaluate", "run=out", "out=gone/a.jsonl"], ["out=gone/a.jsonl: the folder gone is not there"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(arguments: list[str], words: list[str]) -> None:
    expect_error(call(*arguments), *words)


def test_a_run_whose_weights_are_named_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree("out", tmp_path / "out"))
    values = yaml.safe_load((out / "config.yaml").read_text())
    values["model"]["weights"], values["data"]["eval"], weights = "model", "eval.jsonl", values["model"]["weights"]
    (out / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    expect_error(call("generate", "out", "prompt=light"), "model.weights=model: no such directory")
    called = call(
        "generate", "out", "prompt=light", f"model.weights={weights}", "adapter=out/checkpoints/step_00000003"
    )
    assert called.code == 0, called.err


def test_an_unfinished_run(tmp_path: Path) -> None:
    out = Path(shutil.copytree("out", tmp_path / "out"))
    shutil.rmtree(out / "adapter")
    called = call("generate", f"run={out}", "prompt=light")
    assert called.code == 0
    assert f"{out} has not ended: {out}/adapters/best is taken" in called.err
    shutil.rmtree(out / "adapters")
    expect_error(call("generate", f"run={out}", "prompt=light"), "holds no adapter: the run has saved nothing yet")


# What is resolved, without jax


def values_of(home: Path, **changes: Any) -> dict[str, Any]:
    return dataclasses.asdict(small_runs.make_config(home, {f"model.{k}": v for k, v in changes.items()}))


GENERATE = GenerateOptions("out", None, None, None, None, None)
EVALUATE = EvaluateOptions(None, None, None, None, None, None)


def test_only_the_keys_that_are_given_are_not_the_runs(trained: Path) -> None:
    values = values_of(trained, dtype="bfloat16", quantization="int8") | {"name": "now"}
    config, places = resolve(GENERATE, values, ["model.dtype"])
    assert (config.model.dtype, config.model.quantization) == ("bfloat16", None)
    assert config.name == "gemma3_tiny"
    assert config.generation.max_new_tokens == 8  # of the run
    assert places == [Path("out/adapter")]


def test_rows_of_a_file_take_the_place_of_all_others(trained: Path) -> None:
    values = values_of(trained)
    values["data"] |= {"streaming": True, "mixture": [{"path": "rows.jsonl", "weight": 1}]}
    options = EvaluateOptions(None, None, ["none", "model", "model"], "rows.jsonl", "base", None)
    config, places = resolve(options, values, [])
    data = config.data
    assert (data.train, data.mixture, data.eval, data.streaming) == (None, None, "rows.jsonl", False)
    assert places == [None, Path("model")]  # each once, and the base where it was


def test_what_a_run_had_begun_from_does_not_count(trained: Path) -> None:
    """Its configuration is no run that goes on, and needs no folder of an earlier one."""
    values = values_of(trained)
    values["checkpoint"] |= {"resume": "gone"}
    values["model"] |= {"init_adapter": "gone"}
    config, places = resolve(EVALUATE, values, [])
    assert (config.checkpoint.resume, config.model.init_adapter, places) == ("auto", None, [None])


def test_an_adapter_of_a_run_may_go_with_a_base_that_is_named(trained: Path) -> None:
    options = dataclasses.replace(EVALUATE, adapter="out/adapter")
    with pytest.raises(UserError, match="is of a run, which knows its base"):
        resolve(options, values_of(trained), ["data.eval"])
    assert resolve(options, values_of(trained), ["model.weights"])[1] == [Path("out/adapter")]
