"""Text sources, windows, the demo's text."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import WordTokenizer

from maskopt.errors import DataError, OptionError
from maskopt.model.demo_text import demo_text
from maskopt.model.text import read_documents
from maskopt.model.tokens import (
    calibration_windows,
    check_vocabulary,
    evaluation_windows,
    token_windows,
)

TOKENIZER = WordTokenizer()


def test_a_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo"]


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    (tmp_path / "d.bin").write_bytes(b"\0")
    assert read_documents(tmp_path) == ["first", "second", "third", "fourth"]


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x", "text": "y"}))
    assert read_documents(tmp_path / "a.jsonl", field="body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"   \n", "no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"{oops", "line 1: not JSON"),
        ("a.jsonl", b'{"txt": "x"}', "did you mean 'txt'"),
        ("a.jsonl", b"[1]", "no text under 'text': the line is not a JSON object"),
        ("a.jsonl", b'{"text": null}', "line 1: no text under 'text': the value is null$"),
        ("a.jsonl", b'{"text": 3}', "line 1: no text under 'text': the value is int$"),
        (
            "a.jsonl",
            b'{"text": ""}\n{"text": " "}',
            "no text in it: 2 documents, all of them empty",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\\ud800"}',
            r"a\.jsonl, line 2: not JSON \('\\ud800' is half",
        ),
        (
            "a.jsonl",
            b'{"text": "x", "\\udc80": 1}',
            r"a\.jsonl, line 1: not JSON \('\\udc80' is half",
        ),
        ("a.jsonl", b"[" * 10**5, "line 1: not JSON"),
        ("a.jsonl", b"", "no text"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / name)


def test_a_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude00 \u00e4"}')
    assert read_documents(tmp_path / "a.jsonl") == ["😀 ä"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(DataError, match="holds no text file"):
        read_documents(tmp_path)


def _fake_datasets(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[object, ...]]) -> None:
    module = types.ModuleType("datasets")

    def load_dataset(name: str, configuration: str | None, **how: object) -> dict[str, list[str]]:
        calls.append((name, configuration, how))
        if name == "broken":
            raise FileNotFoundError("not on the hub")
        if name == "numbers":
            return {"text": [1, 2]}  # type: ignore[list-item]
        return {"text": ["one", "", "two"]}

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_data_sets_and_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    _fake_datasets(monkeypatch, calls)
    assert read_documents("hf:c4") == ["one", "two"]
    assert read_documents("hf:wikitext2:test") == ["one\n\n\n\ntwo"]
    assert read_documents("hf:me/mine:validation") == ["one", "two"]
    assert calls[0][0] == "allenai/c4"
    assert calls[0][2] == {
        "split": "train",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
    }
    assert calls[1][:2] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    for name, message in [
        ("hf:broken", "not on the hub"),
        ("hf:c4:tset", "did you mean 'test'|no split"),
        ("hf:", "write hf:NAME"),
        ("hf:numbers", "no value of the column 'text' is text"),
        ("hf:../private", "'../private' is not the name of a data set on the hub"),
        ("hf:/etc", "'/etc' is not the name of a data set on the hub"),
    ]:
        with pytest.raises(DataError, match=message):
            read_documents(name)


def test_data_sets_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install .*maskopt\[data\]"):
        read_documents("hf:c4")


@given(seed=st.integers(0, 100), samples=st.integers(1, 6), length=st.integers(1, 20))
def test_crops_are_pieces_of_one_document(seed: int, samples: int, length: int) -> None:
    documents = ["abcdefghijklmnopqrstuvwxyz", "short", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    one = calibration_windows(documents, TOKENIZER, samples=samples, seq_len=length, seed=seed)
    two = calibration_windows(documents, TOKENIZER, samples=samples, seq_len=length, seed=seed)
    assert torch.equal(one.tokens, two.tokens)
    assert one.digest == two.digest
    encoded = [TOKENIZER(d)["input_ids"] for d in documents]
    for row in one.tokens.tolist():
        assert any(
            row == ids[start : start + length]
            for ids in encoded
            for start in range(len(ids) - length + 1)
        )


def test_short_documents_are_joined() -> None:
    windows = calibration_windows(["abc", "def"], TOKENIZER, samples=2, seq_len=8, seed=0)
    assert windows.tokens[0].tolist() == TOKENIZER("abc\n\ndef")["input_ids"]
    assert "joined" in windows.source


def test_other_seeds_give_other_crops() -> None:
    text = ["".join(chr(32 + i % 90) for i in range(500))]
    one = calibration_windows(text, TOKENIZER, samples=8, seq_len=16, seed=0)
    two = calibration_windows(text, TOKENIZER, samples=8, seq_len=16, seed=1)
    assert one.digest != two.digest


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    windows = evaluation_windows(["abcde", "fghij"], TOKENIZER, seq_len=5)
    joined = TOKENIZER("abcde\n\nfghij")["input_ids"]
    assert windows.tokens.tolist() == [joined[:5], joined[5:10]]
    assert len(evaluation_windows(["a" * 50], TOKENIZER, seq_len=5, limit=3)) == 3


@pytest.mark.parametrize("make", [calibration_windows, evaluation_windows])
def test_too_little_text(make: object) -> None:
    with pytest.raises(DataError, match="less than one window of 20"):
        make(["abc"], TOKENIZER, seq_len=20)  # type: ignore[operator]
    with pytest.raises(DataError, match="no text"):
        make([" "], TOKENIZER, seq_len=20)  # type: ignore[operator]
    with pytest.raises(DataError, match="tokenizer"):
        make(["abc" * 20], None, seq_len=20)  # type: ignore[operator]
    with pytest.raises(OptionError, match="`seq_len` must be a whole number"):
        make(["abc"], TOKENIZER, seq_len=0)  # type: ignore[operator]


def test_tokens_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(12).reshape(3, 4))
    windows = calibration_windows(tmp_path / "t.npy")
    assert windows.tokens.tolist() == torch.arange(12).view(3, 4).tolist()
    evaluated = evaluation_windows(tmp_path / "t.npy", None, limit=2)
    assert torch.equal(evaluated.tokens, windows.tokens[:2])
    np.save(tmp_path / "one.npy", np.arange(12))
    assert evaluation_windows(tmp_path / "one.npy", None, limit=2).tokens.shape == (1, 12)
    np.save(tmp_path / "none.npy", np.array(3))
    for make in (calibration_windows, evaluation_windows):
        with pytest.raises(
            DataError, match=r"none.npy: tokens must be \[samples, length\], not \[\]"
        ):
            make(tmp_path / "none.npy", None)
    check_vocabulary(windows, 12)
    with pytest.raises(DataError, match="token id 11"):
        check_vocabulary(windows, 11)
    (tmp_path / "bad.npy").write_bytes(b"\x80\x04pickle")
    with pytest.raises(DataError, match="not a NumPy array"):
        calibration_windows(tmp_path / "bad.npy")
    with pytest.raises(DataError, match="no such file"):
        calibration_windows(tmp_path / "nowhere.npy")
    for bad, message in [
        (torch.zeros(2, 3), "whole numbers"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"\[samples, length\]"),
        (torch.tensor([[-1]]), "negative"),
        (torch.zeros(0, 3, dtype=torch.int64), r"\[samples, length\]"),
    ]:
        with pytest.raises(DataError, match=message):
            token_windows(bad, "given")


@pytest.mark.parametrize("kind", [">i4", "<i4", ">u2", "u8", "i1"])
def test_tokens_of_any_whole_numbers(kind: str, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(12, dtype=kind).reshape(3, 4))
    for make in (calibration_windows, evaluation_windows):
        found = make(tmp_path / "t.npy", None)
        assert torch.equal(found.tokens, torch.arange(12).view(3, 4))


@pytest.mark.parametrize("kind", ["U1", "f4", "c8", "?", "datetime64[s]", [("a", "i4")]])
def test_arrays_that_hold_no_tokens(kind: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((3, 4), dtype=kind))
    for make in (calibration_windows, evaluation_windows):
        with pytest.raises(DataError, match=r"t\.npy: tokens must be whole numbers, not "):
            make(tmp_path / "t.npy", None)


def test_an_array_that_says_to_be_longer_than_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((3, 4), dtype=int))
    data = (tmp_path / "t.npy").read_bytes()
    (tmp_path / "t.npy").write_bytes(
        data.replace(b"(3, 4), }" + b" " * 13, b"(3, 40000000000000), }")
    )
    with pytest.raises(DataError, match=r"t\.npy: not a NumPy array file"):
        calibration_windows(tmp_path / "t.npy")


def test_an_archive_by_the_name_of_an_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", tokens=np.zeros((3, 4), dtype=int))
    (tmp_path / "t.npz").rename(tmp_path / "t.npy")
    with pytest.raises(DataError, match=r"t\.npy: an archive of arrays"):
        calibration_windows(tmp_path / "t.npy")


def test_the_demo_text_does_not_overlap() -> None:
    text = demo_text()
    assert not set(text.calibration) & set(text.evaluation)
    calibration = sum(map(len, text.calibration))
    evaluation = sum(map(len, text.evaluation))
    assert calibration > 2 * evaluation > 50_000
