"""Sources of text: a file, a folder, JSON lines, or a named data set, each read as a list of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maskopt.core.files import from_json
from maskopt.errors import DataError, near

#: name → (dataset, configuration, data files by split, text column): the conventions of the field
PRESETS: dict[str, tuple[str, str | None, dict[str, str] | None, str]] = {
    "c4": (
        "allenai/c4",
        None,
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        "text",
    ),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text"),
}
TEXT_SUFFIXES = (".txt", ".md", ".text")


def read_documents(source: str | Path, *, field: str = "text") -> list[str]:
    """The documents of a source, in a fixed order; empty ones are left out.

    Args:
        source: a text file (one document), a `.jsonl` file (one document a line, under `field`), a folder
            (every text and JSON-lines file in it, sorted by path), or `hf:NAME[:SPLIT]` for the `datasets`
            package, where NAME may be a preset (`c4`, `wikitext2`).

    Raises:
        DataError: nothing there, not UTF-8, not JSON, no such field, or no text at all.
    """
    name = str(source)
    if name.startswith("hf:"):
        documents = _hub_documents(name, field)
    else:
        documents = _path_documents(Path(source), field)
    filled = [document for document in documents if document.strip()]
    if not filled:
        count = f": {len(documents)} documents, all of them empty" if len(documents) > 1 else ""
        raise DataError(f"{name}: there is no text in it{count}")
    return filled


def _path_documents(path: Path, field: str) -> list[str]:
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and file.suffix.lower() in (*TEXT_SUFFIXES, ".jsonl")
        )
        if not files:
            known = ", ".join((*TEXT_SUFFIXES, ".jsonl"))
            raise DataError(f"{path}: the folder holds no text file ({known})")
        return [document for file in files for document in _path_documents(file, field)]
    return _json_lines(path, field) if path.suffix.lower() == ".jsonl" else [_read_text(path)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line of a file of JSON lines; DataError where it cannot be read."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = from_json(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        yield where, value


def _json_lines(path: Path, field: str) -> list[str]:
    documents = []
    for where, record in json_records(path):
        if not isinstance(record, dict):
            raise DataError(f"{where}: no text under {field!r}: the line is not a JSON object")
        text = record.get(field)
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            hint = f": the value is {kind}" if field in record else near(field, record)
            if isinstance(record.get("messages"), list):
                hint = "; it has messages: give `chat`"
            raise DataError(f"{where}: no text under {field!r}{hint}")
        documents.append(text)
    return documents


def _hub_documents(name: str, field: str) -> list[str]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    _, dataset, *rest = name.split(":")
    if not dataset or len(rest) > 1:
        raise DataError(f"{name!r}: write hf:NAME or hf:NAME:SPLIT; presets: {', '.join(PRESETS)}")
    split = rest[0] if rest else "train"
    try:
        validate_repo_id(dataset)  # `datasets` reads a folder where the name is a path
    except HFValidationError:
        raise DataError(
            f"{name}: {dataset!r} is not the name of a data set on the hub; give a file or a folder "
            "without hf:"
        ) from None
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError(f"{name}: needs the package datasets: pip install datasets") from None
    repository, configuration, files, field = PRESETS.get(dataset, (dataset, None, None, field))
    arguments: dict[str, Any] = {"split": split}
    if files is not None:
        if split not in files:
            raise DataError(f"{name}: no split {split!r}{near(split, files)}")
        arguments["data_files"] = {split: files[split]}
    try:
        table = datasets.load_dataset(repository, configuration, **arguments)
        column: Sequence[Any] = table[field]
    except Exception as error:  # the hub client raises whatever its layers raise
        line = (str(error).splitlines() or [""])[0]
        raise DataError(f"{name}: {type(error).__name__}: {line}") from error
    documents = [document for document in column if isinstance(document, str)]
    if not documents:
        raise DataError(f"{name}: no value of the column {field!r} is text")
    # WikiText-2 comes a line per record; its convention is one text, joined by blank lines
    return ["\n\n".join(documents)] if dataset == "wikitext2" else documents
