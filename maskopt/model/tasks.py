"""Zero-shot tasks through EleutherAI's lm-eval: model folders on the same questions, and side by side.

lm-eval brings tasks, data, prompts and metrics, as `lm_eval --model hf` does; maskopt reads the folder, as it
does everywhere, and holds every model against the first one, question by question. Unlike a walk through the
blocks, this has a whole model in memory.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from maskopt.errors import DataError, ModelError, OptionError, near
from maskopt.limits import torch_threads
from maskopt.model.beginning import beginning_of
from maskopt.model.loading import return_memory
from maskopt.model.opening import capped_length, load_tokenizer, open_source
from maskopt.model.perplexity import interval
from maskopt.model.source import FolderSource
from maskopt.model.tokens import check_count
from maskopt.model.walk_options import WalkOptions

INSTALL = "pip install 'maskopt[tasks]'"
#: those of lm-eval's own command line, so that its figures are these
SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
#: how far the mean over the questions may be from the metric: beyond, the metric is no such mean
MEAN = 1e-9


@dataclass(frozen=True)
class Difference:
    """A metric minus the first model's on the same questions; 95%, by bootstrap over the questions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        filter: of lm-eval's, what it does to an answer before it is judged; `none` as a rule.
        value, stderr: as lm-eval computes them; `stderr` is None where it has none.
        questions: how many were asked.
        difference: None for the first model, and where the metric is not a mean over the questions.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    questions: int
    difference: Difference | None = None

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data are at hand; `open_tasks` makes them."""

    names: tuple[str, ...]
    manager: Any
    limit: int | None
    batch: int

    def evaluate(self, models: Sequence[str | Path], options: WalkOptions) -> list[list[TaskScore]]:
        """The scores of every model, in the order of the models.

        Args:
            options: `device`, `dtype`, `threads`, `bos`, `trust_remote_code`, and `seq_len`: a question
                that is longer loses its beginning.

        Raises:
            OptionError: no model.
            ModelError: a folder that cannot be read, or whose logits are NaN.
            DataError: no tokenizer, or one that cannot begin texts as `bos` says.
        """
        if not models:
            raise OptionError("name at least one model")
        for model in models:
            _open(model, options)
        first: dict[tuple[str, str, str], list[float]] = {}
        found = []
        for model in models:
            results = self._run(model, options)
            return_memory()  # a whole model's
            answers = _answers(results["samples"], str(model))
            found.append([_beside(score, answers, first) for score in _scores(results)])
            first = first or answers
        return found

    def _run(self, folder: str | Path, options: WalkOptions) -> dict[str, Any]:
        """What lm-eval says of one model."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        source, tokenizer = _open(folder, options)
        with torch_threads(options.threads), torch.no_grad(), _quiet():
            lm = HFLM(
                pretrained=source.load_whole(),
                tokenizer=tokenizer,
                batch_size=self.batch,
                max_length=capped_length(source.model, options.seq_len),
                add_bos_token=False if options.bos == "never" else None,
            )
            results: dict[str, Any] = simple_evaluate(
                lm,
                tasks=list(self.names),
                task_manager=self.manager,
                limit=self.limit,
                log_samples=True,
                **SEEDS,
            )
        return results


def open_tasks(
    names: Sequence[str],
    folder: str | Path | None = None,
    *,
    limit: int | None = None,
    batch: int = 8,
) -> Tasks:
    """Find tasks by name, and fetch their data or read them out of the cache.

    Args:
        names: tasks, groups or tags of lm-eval.
        folder: with task files (YAML) of one's own, which go before those of lm-eval. Python that they
            name (`!function`) is run.
        limit: ask only the first so many questions of each task.
        batch: answers that go through a model at a time.

    Raises:
        OptionError: lm-eval is not installed; no such folder or task; numbers that cannot be; tasks
            that run code which the model writes, or look at images.
        DataError: a task whose data cannot be had.
    """
    if not names:
        raise OptionError("`tasks` names none; write arc_easy,hellaswag")
    check_count("task_batch", batch)
    if limit is not None:
        check_count("task_limit", limit)
    if folder is not None and not Path(folder).is_dir():
        raise OptionError(f"{folder}: no such folder of tasks")
    with _quiet():
        manager = _manager(folder)
        names = tuple(dict.fromkeys(names))
        for name in names:
            if name not in manager.all_tasks:
                raise OptionError(f"no task is called {name!r}{_hint(name, manager.all_tasks)}")
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # data sets fail in as many ways as there are of them
            line = (str(error).splitlines() or [""])[0]
            raise DataError(f"{', '.join(names)}: {type(error).__name__}: {line}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise OptionError(f"task {name!r} runs code that the model writes, which is not done")
        if getattr(task, "MULTIMODAL", False):
            raise OptionError(f"task {name!r} looks at images, which these models do not")
    return Tasks(names, manager, limit, batch)


def _manager(folder: str | Path | None) -> Any:
    try:
        import accelerate  # noqa: F401  # lm-eval's models need it, and do not bring it
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError(f"`tasks` needs the package lm_eval ({error}): {INSTALL}") from None
    return TaskManager(include_path=None if folder is None else str(folder))


def _hint(name: str, known: Sequence[str]) -> str:
    """Of thousands of names only near ones are worth a line."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return near(name, close) if close else "; `lm_eval ls tasks` lists all"


def _open(model: str | Path, options: WalkOptions) -> tuple[FolderSource, Any]:
    """The checked folder, its weights still unread, and its tokenizer."""
    source = open_source(
        model,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    assert isinstance(source, FolderSource)
    folder = source.checkpoint.folder
    tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    if tokenizer is None:
        raise DataError(f"{folder}: tasks need a tokenizer, and the folder holds none")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise DataError(
            f"{folder}: the tokenizer has neither a beginning- nor an end-of-sequence token, one of "
            "which lm-eval puts before an empty context; name an eos_token in tokenizer_config.json"
        )
    if options.bos == "always" and not beginning_of(tokenizer).ids:
        raise DataError(
            f"{folder}: tasks begin with what the tokenizer puts before a text, and this one puts "
            "nothing there; use `bos` auto or never"
        )
    return source, tokenizer


def _scores(results: dict[str, Any]) -> Iterator[TaskScore]:
    """Every metric of every task and group, in lm-eval's order."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = values.get(f"{metric}_stderr,{answers}")
            yield TaskScore(
                task,
                metric,
                answers,
                float(value),
                float(stderr) if _is_number(stderr) else None,
                int(values["sample_len"]) if "sample_len" in values else 0,
            )


def _answers(
    samples: dict[str, list[dict[str, Any]]], model: str
) -> dict[tuple[str, str, str], list[float]]:
    """(task, metric, filter) → its value for each question, where it has one.

    Raises:
        ModelError: an answer's log-likelihood is NaN.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for task, questions in samples.items():
        for question in questions:
            if any(map(_has_nan, question["filtered_resps"])):
                raise ModelError(
                    f"{model}: NaN logits on question {question['doc_id']} of task {task!r}"
                )
            for metric in question["metrics"]:
                if _is_number(question[metric]):
                    key = (task, metric, question["filter"])
                    found.setdefault(key, []).append(float(question[metric]))
    return found


def _beside(
    score: TaskScore,
    answers: dict[tuple[str, str, str], list[float]],
    first: dict[tuple[str, str, str], list[float]],
) -> TaskScore:
    """The score, with the difference to the first model where every question has a value of its own
    and the metric is their mean."""
    key = (score.task, score.metric, score.filter)
    one, two = first.get(key, []), answers.get(key, [])
    if not one or len(one) != len(two) or abs(sum(two) / len(two) - score.value) > MEAN:
        return score
    changes = torch.tensor(two, dtype=torch.float64) - torch.tensor(one, dtype=torch.float64)
    difference = Difference(float(changes.mean()), *interval(changes))
    return TaskScore(**{**vars(score), "difference": difference})


def _has_nan(answer: Any) -> bool:
    parts = answer if isinstance(answer, list | tuple) else [answer]
    return any(isinstance(part, float) and math.isnan(part) for part in parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "dtype") and value.ndim == 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of every way to call it that is not its command line."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
