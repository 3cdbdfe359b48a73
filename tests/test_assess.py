"""How good adapters are on rows: against transformers, against a run's own loss, side by side."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import small_runs
import support
from adaptax.assess import Scores, evaluate, show, to_json
from adaptax.config import Config, UserError
from adaptax.data.questions import ask
from adaptax.data.tokenizer import Tokenizer
from adaptax.grading import GRADES
from adaptax.options import EvaluateOptions
from rows import chat, encode_chat

Write = Callable[..., Path]
NO_OPTIONS = EvaluateOptions(None, None, None, None, None, None)
NEW_TOKENS = 4


def configure(home: Path, changes: dict[str, Any] | None = None) -> Config:
    short = {"generation.max_new_tokens": NEW_TOKENS, "generation.batch_size": 3}
    return small_runs.make_config(home, short | (changes or {}))


def score(home: Path, *places: Path | None, out: Path | None = None, **changes: Any) -> list[Scores]:
    """Evaluates; keys of ``data`` and ``evaluation`` by their last names."""
    of_data = {
        "eval",
        "train",
        "eval_fraction",
        "max_length",
        "supervise",
        "format",
        "columns",
        "mixture",
        "on_bad_row",
    }
    values = {f"{'data' if name in of_data else 'evaluation'}.{name}": value for name, value in changes.items()}
    options = replace(NO_OPTIONS, out=str(out) if out else None)
    return evaluate(options, configure(home, values), support.make_mesh(), places)


# Losses


def test_loss_and_accuracy_of_every_row_are_those_of_transformers(trained: Path, tokenizer: Tokenizer) -> None:
    """With PEFT's adapter, and without."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base, adapted = score(trained, None, trained / "out" / "adapter")
    rows = [json.loads(line)["messages"] for line in (trained / "eval.jsonl").read_text().splitlines()]
    model = transformers.Gemma3ForCausalLM.from_pretrained(trained / "model", dtype=torch.float32)
    for scores, is_adapted in ((base, False), (adapted, True)):
        if is_adapted:
            model = peft.PeftModel.from_pretrained(model, str(trained / "out" / "adapter"))
        assert len(scores.losses) == len(rows)
        for row, messages in enumerate(rows):
            example = encode_chat(messages, tokenizer)
            tokens, trained_T = torch.tensor(example.tokens.astype(np.int64)), torch.tensor(example.is_trained[1:])
            with torch.no_grad():
                logits_TV = model.eval()(input_ids=tokens[None]).logits[0, :-1]
            losses_T = torch.nn.functional.cross_entropy(logits_TV, tokens[1:], reduction="none")
            assert scores.losses[row] == pytest.approx(float(losses_T[trained_T].sum()), rel=2e-5)
            assert scores.counts[row] == int(trained_T.sum())
            assert scores.right[row] == int((logits_TV.argmax(-1) == tokens[1:])[trained_T].sum())
    assert adapted.losses.sum() < 0.9 * base.losses.sum()
    assert adapted.right.sum() > base.right.sum()


def test_the_loss_is_what_the_run_itself_ended_with(trained: Path) -> None:
    [scores] = score(trained, trained / "out" / "adapter")
    assert scores.summarize(None)["loss"] == pytest.approx(
        small_runs.read_summary(trained / "out")["final_loss"], abs=1e-5
    )


def test_scores_do_not_depend_on_the_mesh(trained: Path) -> None:
    place = trained / "out" / "checkpoints" / "step_00000006"
    [alone] = score(trained, place)
    [spread] = evaluate(
        NO_OPTIONS, configure(trained, {"model.mesh_shape": [[2, 2], ["fsdp", "tp"]]}), support.make_mesh(2, 2), [place]
    )
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-5)
    np.testing.assert_array_equal(spread.right, alone.right)
    np.testing.assert_array_equal(spread.counts, alone.counts)


def test_adapters_are_compared_row_by_row(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    places = [None, trained / "out" / "checkpoints" / "step_00000003", trained / "out" / "adapter"]
    base, earlier, ended = score(trained, *places)
    assert [scores.name for scores in (base, earlier, ended)] == ["base", *map(str, places[1:])]
    assert "loss_change" not in base.summarize(None)
    summary = ended.summarize(base)
    assert summary["loss_change"] == pytest.approx(summary["loss"] - base.summarize(None)["loss"])
    low, high = summary["loss_change_interval"]
    assert low < summary["loss_change"] < high < 0
    table = caplog.messages[-1]
    assert "6 rows" in table
    assert f"{int(base.counts.sum())} trained tokens" in table
    assert "loss change" in table
    assert "perplexity" in table


def test_the_summary_of_scores_by_hand(trained: Path) -> None:
    scores = Scores("a", np.array([2.0, 6.0]), np.array([2, 2]), np.array([1, 2]))
    scores.grades["json"] = [True, False]
    reference = Scores("b", np.array([4.0, 6.0]), np.array([2, 2]), np.array([0, 0]))
    summary = scores.summarize(reference)
    assert (summary["rows"], summary["tokens"], summary["loss"], summary["token_accuracy"]) == (2, 4, 2.0, 0.75)
    half = 1.959964  # residuals -2 and 2; sqrt(2 / 1 * 8) / 4 = 1
    assert summary["loss_interval"] == pytest.approx([2 - half, 2 + half])
    assert summary["perplexity_interval"] == pytest.approx([math.exp(2 - half), math.exp(2 + half)])
    assert summary["token_accuracy_interval"] == pytest.approx([0.75 - half / 4, 0.75 + half / 4])
    assert summary["loss_change"] == -0.5
    assert (summary["json"], summary["json_rows"]) == (0.5, 2)


def test_names_with_brackets_are_shown_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    scores = Scores("runs/[b]/adapter", np.array([1e4]), np.array([1]), np.array([1]))
    show([scores.summarize(None)])
    assert "runs/[b]/adapter" in caplog.text
    assert "1.0142e+304" in caplog.text  # a perplexity of a loss of 700 and more; and there is no interval
    assert "nan" not in caplog.text


# Answers


@pytest.fixture(scope="module")
def said(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the adapter makes of the held-out rows, as written; any answer has whatever an empty pattern asks for."""
    out = tmp_path_factory.mktemp("said") / "out.jsonl"
    score(trained, trained / "out" / "adapter", out=out, metric=["exact_match", "regex"], pattern="", num_rows=4)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_predictions_name_their_row_and_hold_what_every_adapter_says(
    trained: Path, said: list[dict[str, Any]], tokenizer: Tokenizer
) -> None:
    name = str(trained / "out" / "adapter")
    rows = [json.loads(line)["messages"] for line in (trained / "eval.jsonl").read_text().splitlines()]
    assert [line["row"] for line in said] == [f"{trained / 'eval.jsonl'} row {i}" for i in range(1, 7)]
    [scores] = score(trained, Path(name))
    for row, (line, messages) in enumerate(zip(said, rows, strict=True)):
        found = line["adapters"][name]
        assert found["loss"] == pytest.approx(scores.losses[row])
        assert (found["tokens"], found["right"]) == (scores.counts[row], scores.right[row])
        if row < 4:
            assert (
                line["prompt"] == f"<start_of_turn>user\n{messages[0]['content']}<end_of_turn>\n<start_of_turn>model\n"
            )
            assert line["expected"] == messages[1]["content"]
            assert found["exact_match"] is (found["generated"].strip() == line["expected"])
            assert found["regex"] is True
        else:
            assert "expected" not in line
            assert found.keys() == {"loss", "tokens", "right"}


def test_answers_that_are_right_are_counted(
    trained: Path, said: list[dict[str, Any]], write_jsonl: Write, tmp_path: Path
) -> None:
    """Two rows whose expected answers are the model's own, and one whose is not."""
    name = str(trained / "out" / "adapter")
    asked = [re.sub(r"<.*?>(user\n|model\n)?", "", line["prompt"]).strip() for line in said[:4]]
    own = [line["adapters"][name]["generated"].strip() for line in said[:4]]
    good = [(question, answer) for question, answer in zip(asked, own, strict=True) if answer.isascii() and answer]
    data = write_jsonl([chat(*good[0]), chat(*good[1]), chat(good[0][0], "something else")])
    out = tmp_path / "out.jsonl"
    [scores] = score(trained, Path(name), out=out, eval=str(data), metric="exact_match")
    assert scores.grades == {"exact_match": [True, True, False]}
    [summary] = json.loads((tmp_path / "out.summary.json").read_text())
    assert (summary["exact_match"], summary["exact_match_rows"]) == (pytest.approx(2 / 3), 3)
    assert summary["exact_match_interval"] == pytest.approx([0.20766, 0.93851], abs=1e-4)
    assert (summary["rows"], summary["adapter"]) == (3, name)


def test_rows_without_a_whole_answer_have_a_loss_and_no_grade(
    trained: Path, write_jsonl: Write, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut by data.max_length: behind the first words of the answer, or before them."""
    caplog.set_level(logging.INFO)
    rows = [chat("light", "on " * 40), chat("light", "42"), chat("light " * 40, "on")]
    [scores] = score(trained, None, eval=str(write_jsonl(rows)), metric=["numeric", "json"])
    assert len(scores.counts) == 2
    assert scores.counts[0] == 24 - len(ask(rows[0]["messages"], tokenizer))  # data.max_length without the question
    assert {metric: len(grades) for metric, grades in scores.grades.items()} == {"numeric": 1, "json": 1}
    assert "answers are generated for 1 of 2 rows: others end in none that is whole" in caplog.messages
    assert "numeric, 1 rows" in caplog.messages[-1]


def test_a_single_row_has_no_interval(trained: Path, write_jsonl: Write, tmp_path: Path) -> None:
    out = tmp_path / "one.jsonl"
    score(trained, None, out=out, eval=str(write_jsonl([chat("light", "on")])))
    [summary] = json.loads((tmp_path / "one.summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["loss_interval"] == [None, None]
    assert summary["loss"] > 0


def test_losses_that_are_not_finite_are_told_and_are_no_json(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    bad = Path(shutil.copytree(trained / "out" / "adapter", tmp_path / "bad"))
    tensors = load_file(bad / "adapter_model.safetensors")
    next(iter(tensors.values()))[:] = 3e38  # finite itself
    save_file(tensors, bad / "adapter_model.safetensors")
    out = tmp_path / "out.jsonl"
    good, found = score(trained, None, bad, out=out)
    assert np.isfinite(good.losses).all()
    assert np.isnan(found.losses).all()
    first = f"{trained / 'eval.jsonl'} row 1"
    assert f"{bad}: the loss of 6 rows is not finite, the first is {first}" in caplog.messages
    texts = [*out.read_text().splitlines(), out.with_suffix(".summary.json").read_text()]
    values = [json.loads(text, parse_constant=pytest.fail) for text in texts]
    assert values[0]["adapters"][str(bad)]["loss"] is None
    assert values[-1][1]["loss"] is values[-1][1]["loss_change"] is None
    assert to_json({"a": [1.5, math.inf, "NaN"]}) == '{"a": [1.5, null, "NaN"]}'


def test_there_is_a_grade_for_every_metric_at_once(trained: Path, write_jsonl: Write) -> None:
    data = write_jsonl([chat("light", "1"), chat("fan", "[2]")])
    [scores] = score(trained, None, eval=str(data), metric=list(GRADES), pattern="^x")
    assert list(scores.grades) == list(GRADES)
    assert all(len(grades) == 2 for grades in scores.grades.values())


# Mistakes


NO_ANSWER = "no row ends in an answer that is whole and trained alone: documents have none, data.supervise=all trains"


@pytest.mark.parametrize(
    ("row", "changes", "problem"),
    [
        (chat("a", "no"), {"metric": "json"}, "row 1: evaluation.metric=json, and the expected answer is no JSON: no"),
        (chat("a", "no"), {"metric": "numeric"}, "evaluation.metric=numeric, and the expected answer holds no number"),
        ({"text": "a document"}, {"metric": "exact_match"}, f"evaluation.metric=exact_match: {NO_ANSWER}"),
        (chat("a", "b"), {"metric": ["regex"], "pattern": "b", "supervise": "all"}, NO_ANSWER),
        (chat("a", "b"), {"columns": {"promt": "a"}}, "data.columns: promt is no column of a format"),
        ({"prompt": "a", "completion": ""}, {}, "rows.jsonl row 1: completion is empty"),
        (chat("a " * 40, "b"), {}, "data.eval: no row of"),
    ],
)
def test_rows_that_cannot_be_evaluated(
    trained: Path, write_jsonl: Write, row: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        score(trained, None, eval=str(write_jsonl([row])), **changes)


def test_no_rows_to_evaluate_on(trained: Path) -> None:
    config = small_runs.change(configure(trained), {"data.eval": None, "data.train": None})
    with pytest.raises(UserError, match="no rows to evaluate on: set data=FILE, or run=DIR"):
        evaluate(NO_OPTIONS, config, support.make_mesh(), [None])
    with pytest.raises(UserError, match="no rows are held out"):
        score(trained, None, eval=None, eval_fraction=0.0)
    with pytest.raises(UserError, match=r"data\.eval=gone\.jsonl: no such file"):
        score(trained, None, eval="gone.jsonl")


def test_rows_that_a_run_has_held_out_of_its_own(trained: Path) -> None:
    """The training rows must be there for that, and for nothing else."""
    [scores] = score(trained, None, eval=None, eval_fraction=0.25)
    assert len(scores.counts) == 6
    assert len(score(trained, None, train="gone.jsonl")[0].counts) == 6
    with pytest.raises(UserError, match=r"data\.train=gone\.jsonl: no such file"):
        score(trained, None, eval=None, train="gone.jsonl")


def test_files_that_are_there_already_are_left_alone(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"out\.jsonl is there already"):
        score(trained, None, out=out)
    out.rename(tmp_path / "other.summary.json")
    with pytest.raises(UserError, match=r"other\.summary\.json is there already"):
        score(trained, None, out=tmp_path / "other.jsonl")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_the_table_is_shown_where_predictions_cannot_be_written(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match=r"/proc/out\.jsonl\.partial cannot be written: "):
        score(trained, None, out=Path("/proc/out.jsonl"))
    assert "perplexity" in caplog.messages[-1]
