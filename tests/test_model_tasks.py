"""Tasks through lm-eval: figures against log-likelihoods computed by hand, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from tiny_models import edit_json, save, save_tokenizer, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from maskopt.cli import app
from maskopt.errors import DataError, ModelError, OptionError
from maskopt.model.tasks import Tasks, TaskScore, open_tasks
from maskopt.model.walk_options import WalkOptions

QUESTIONS = [
    {
        "question": f"What comes after {i}?",
        "choices": [f" {i + 1}", " the", " no end"],
        "answer": i % 3,
    }
    for i in range(20)
]


def save_with_tokenizer(model: object, folder: Path) -> Path:
    save(model, folder)
    save_tokenizer(folder)
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(eos_token="~"))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same tokenizer, other weights."""
    root, other = tmp_path_factory.mktemp("models"), tiny("llama")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return [
        save_with_tokenizer(model, root / name)
        for name, model in (("one", tiny("llama")), ("other", other))
    ]


def write_task(folder: Path) -> Path:
    """One task of multiple choice, its data beside it."""
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "after.yaml").write_text(
        f"""
task: after
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "data.jsonl"}}}
  cache_dir: {folder / "cache"}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("of") / "tasks")


@pytest.fixture(scope="module")
def asked(folder: Path) -> Tasks:
    """lm-eval looks through thousands of files of its own: once is enough."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'maskopt[tasks]'")
    return open_tasks(["after", "after"], folder)


def by_hand(model: Path) -> dict[str, list[float]]:
    """acc and acc_norm of every question, out of the model's own logits."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for question in QUESTIONS:
        sums, norms = [], []
        for choice in question["choices"]:
            before = tokenizer(question["question"])["input_ids"]
            ids = torch.tensor(tokenizer(question["question"] + choice)["input_ids"])
            with torch.no_grad():
                logits = whole(ids[None]).logits[0].log_softmax(-1)
            at = torch.arange(len(before), len(ids))
            sums.append(float(logits[at - 1, ids[at]].sum()))
            norms.append(sums[-1] / len(choice))
        right["acc"].append(float(sums.index(max(sums)) == question["answer"]))
        right["acc_norm"].append(float(norms.index(max(norms)) == question["answer"]))
    return right


def test_scores_are_those_of_the_logits(models: list[Path], asked: Tasks) -> None:
    first, second = asked.evaluate(models, WalkOptions())
    hands = [by_hand(model) for model in models]
    assert hands[0] != hands[1]
    for scores, hand in zip((first, second), hands, strict=True):
        assert {s.metric for s in scores} == {"acc", "acc_norm"}
        for score in scores:
            values = torch.tensor(hand[score.metric], dtype=torch.float64)
            assert score.questions == len(QUESTIONS)
            assert score.value == pytest.approx(float(values.mean()))
            assert score.stderr == pytest.approx(float(values.std()) / math.sqrt(len(values)))
    for score in first:
        assert score.difference is None
    for score in second:
        mean = [sum(hand[score.metric]) / len(QUESTIONS) for hand in hands]
        assert score.difference is not None
        assert score.difference.value == pytest.approx(mean[1] - mean[0])
        assert score.difference.low <= score.difference.value <= score.difference.high


def test_a_model_beside_itself_differs_nowhere(models: list[Path], asked: Tasks) -> None:
    _, again = replace(asked, limit=5, batch=3).evaluate([models[0], models[0]], WalkOptions())
    for score in again:
        assert score.questions == 5
        assert score.difference is not None
        assert (score.difference.low, score.difference.high) == (0, 0)


def test_the_command(models: list[Path], asked: Tasks, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Pack my box with five dozen liquor jugs. " * 20)
    figures = tmp_path / "figures.json"
    command = [
        "eval", *models, "--tasks", "after", "--tasks-path", folder, "--task-limit", 6,
        "--text", text, "--seq-len", 32, "--windows", 2, "--json", figures,
    ]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exception is None, (result.output, result.exception)
    assert "acc_norm" in result.output
    records = json.loads(figures.read_text())
    assert [record["model"] for record in records] == list(map(str, models))
    assert [score["questions"] for record in records for score in record["tasks"]] == [6] * 4
    assert records[0]["perplexity"]["windows"] == 2
    assert records[0]["tasks"][0]["difference"] is None
    assert isinstance(records[1]["tasks"][0]["difference"]["value"], float)


def test_tasks_alone_need_no_text(
    models: list[Path], asked: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskopt.model.tasks.open_tasks", lambda *_, **__: asked)
    figures = tmp_path / "figures.json"
    command = ["eval", str(models[0]), "--tasks", "after", "--json", str(figures)]
    result = CliRunner().invoke(app, command)
    assert result.exception is None, (result.output, result.exception)
    (record,) = json.loads(figures.read_text())
    assert record.keys() == {"model", "tasks"}


def test_unknown_tasks_have_near_names(asked: Tasks, folder: Path) -> None:
    with pytest.raises(OptionError, match="no task is called 'aftr'; did you mean 'after'"):
        open_tasks(["after", "aftr"], folder)
    with pytest.raises(OptionError, match=r"called 'q{9}'; `lm_eval ls tasks` lists all"):
        open_tasks(["q" * 9])


def test_data_that_are_not_there(asked: Tasks, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks")
    (folder / "data.jsonl").unlink()
    with pytest.raises(DataError, match="after: FileNotFoundError"):
        open_tasks(["after"], folder)


def test_nan_logits_are_no_answers(asked: Tasks, tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():  # finite weights whose products are not
        model.model.norm.weight.fill_(3e38)
        model.lm_head.weight.fill_(3e38)
    broken = save_with_tokenizer(model, tmp_path / "broken")
    with pytest.raises(ModelError, match="NaN logits on question 0 of task 'after'"):
        asked.evaluate([broken], WalkOptions())


def test_folders_are_checked_before_anything_runs(
    models: list[Path], asked: Tasks, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        asked.evaluate([models[0], tmp_path / "none"], WalkOptions())
    remote = save_with_tokenizer(tiny("llama"), tmp_path / "remote")
    edit_json(remote / "config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Model"}))
    with pytest.raises(ModelError, match="auto_map"):
        asked.evaluate([remote], WalkOptions())
    with pytest.raises(DataError, match="puts nothing there; use `bos`"):
        asked.evaluate([models[0]], WalkOptions(bos="always"))
    bare = save(tiny("llama"), tmp_path / "bare")
    with pytest.raises(DataError, match="need a tokenizer"):
        asked.evaluate([bare], WalkOptions())
    save_tokenizer(bare)
    with pytest.raises(DataError, match="name an eos_token"):
        asked.evaluate([bare], WalkOptions())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = CliRunner().invoke(app, ["eval", "no-such-model", "--tasks", "arc_easy"])
    assert isinstance(result.exception, OptionError)
    assert str(result.exception).startswith("--tasks needs the package lm_eval")
    assert str(result.exception).endswith("pip install 'maskopt[tasks]'")


def test_values_that_cannot_be(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "no-such-model"])
    assert isinstance(result.exception, OptionError)
    assert "name a --text for the perplexity, or --tasks" in str(result.exception)
    with pytest.raises(OptionError, match="names none"):
        open_tasks([])
    with pytest.raises(OptionError, match="`task_limit` must be a whole number"):
        open_tasks(["after"], limit=0)
    with pytest.raises(OptionError, match="`task_batch` must be a whole number"):
        open_tasks(["after"], batch=0)
    with pytest.raises(OptionError, match="no such folder of tasks"):
        open_tasks(["after"], tmp_path / "none")


def test_a_score_as_json_values() -> None:
    score = TaskScore("after", "acc", "none", 0.5, None, 20)
    assert json.loads(json.dumps(score.record()))["difference"] is None
