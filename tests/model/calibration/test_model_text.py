"""Text sources, windows and what they begin with, the demo's text."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, WordTokenizer, chat_tokenizer, save, save_tokenizer, tiny
from tokenizers import processors

from maskopt import open_job
from maskopt.demo.text import demo_text
from maskopt.errors import DataError
from maskopt.models.calibration.text import read_documents
from maskopt.models.calibration.tokens import (
    calibration_windows,
    check_vocabulary,
    evaluation_windows,
    token_windows,
)
from maskopt.models.checkpoints.bos import Beginning, beginning_of
from maskopt.models.options.walk import WalkOptions

TOKENIZER = WordTokenizer()


def ids(text):
    return TOKENIZER(text)["input_ids"]


def test_files_folders_and_the_demo_text(tmp_path):
    text = demo_text()
    assert not set(text.calibration) & set(text.evaluation)
    assert sum(map(len, text.calibration)) > 2 * sum(map(len, text.evaluation)) > 50_000
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second\n\nof it")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third", "body": "x"}\n\n{"text": "fourth"}\n')
    (tmp_path / "d.bin").write_bytes(b"\0")
    (tmp_path / "e.jsonl").write_text(r'{"body": "\ud83d\ude00 \u00e4", "text": "y"}')
    assert read_documents(tmp_path / "b" / "x.txt") == ["second\n\nof it"]
    assert read_documents(tmp_path) == ["first", "second\n\nof it", "third", "fourth", "y"]
    assert read_documents(tmp_path / "e.jsonl", field="body") == ["😀 ä"]


BAD_FILES = {
    "a.txt": {b"   \n": "no text", b"\xff\xfe": "not UTF-8"},
    "a.jsonl": {
        b"{oops": "line 1: not JSON",
        b'{"txt": "x"}': "did you mean 'txt'",
        b"[1]": "no text under 'text': the line is not a JSON object",
        b'{"text": null}': "line 1: no text under 'text': the value is null$",
        b'{"text": 3}': "line 1: no text under 'text': the value is int$",
        b'{"text": ""}\n{"text": " "}': "no text in it: 2 documents, all of them empty",
        b'{"text": "x"}\n{"text": "\\ud800"}': r"l, line 2: not JSON \('\\ud800' is half",
        b'{"text": "x", "\\udc80": 1}': r"a\.jsonl, line 1: not JSON \('\\udc80' is half",
        b"[" * 10**5: "line 1: not JSON",
        b"": "no text",
    },
}


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="holds no text file"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_documents(tmp_path / "a.bin")
    for name, cases in BAD_FILES.items():
        for content, message in cases.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=message):
                read_documents(tmp_path / name)


def test_data_sets_and_presets(monkeypatch):
    calls, module = [], types.ModuleType("datasets")

    def load_dataset(name, configuration, **how):
        calls.append((name, configuration, how))
        if name == "broken":
            raise FileNotFoundError("not on the hub")
        return {"text": [1, 2] if name == "numbers" else ["one", "", "two"]}

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_documents("hf:c4") == ["one", "two"]
    assert read_documents("hf:wikitext2:test") == ["one\n\n\n\ntwo"]
    assert read_documents("hf:me/mine:validation") == ["one", "two"]
    first = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert calls[0][0] == "allenai/c4"
    assert calls[0][2] == {"split": "train", "data_files": first}
    assert calls[1][:2] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    for name, message in (
        ("hf:broken", "not on the hub"),
        ("hf:c4:tset", "did you mean 'test'|no split"),
        ("hf:", "write hf:NAME"),
        ("hf:numbers", "no value of the column 'text' is text"),
        ("hf:../private", "'../private' is not the name of a data set on the hub"),
        ("hf:/etc", "'/etc' is not the name of a data set on the hub"),
    ):
        with pytest.raises(DataError, match=message):
            read_documents(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install .*maskopt\[data\]"):
        read_documents("hf:c4")


@given(seed=st.integers(0, 100), samples=st.integers(1, 6), length=st.integers(1, 20))
def test_crops_are_pieces_of_one_document(seed, samples, length):
    documents = ["abcdefghijklmnopqrstuvwxyz", "short", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    how = {"samples": samples, "seq_len": length, "seed": seed}
    one, two = (calibration_windows(documents, TOKENIZER, **how) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens)
    assert one.digest == two.digest
    pieces = [ids(d)[i : i + length] for d in documents for i in range(len(d) - length + 1)]
    assert all(row in pieces for row in one.tokens.tolist())


def test_windows_of_short_and_long_texts():
    windows = calibration_windows(["abc", "def"], TOKENIZER, samples=2, seq_len=8, seed=0)
    assert windows.tokens[0].tolist() == ids("abc\n\ndef")
    assert "joined" in windows.source
    text = ["".join(chr(32 + i % 90) for i in range(500))]
    how = {"samples": 8, "seq_len": 16}
    one, two = (calibration_windows(text, TOKENIZER, seed=seed, **how) for seed in (0, 1))
    assert one.digest != two.digest
    # no overlaps, and the tail is dropped
    windows = evaluation_windows(["abcde", "fghij"], TOKENIZER, seq_len=5)
    joined = ids("abcde\n\nfghij")
    assert windows.tokens.tolist() == [joined[:5], joined[5:10]]
    assert len(evaluation_windows(["a" * 50], TOKENIZER, seq_len=5, limit=3)) == 3


MAKERS = pytest.mark.parametrize("make", [calibration_windows, evaluation_windows])


@MAKERS
def test_files_of_tokens(make, tmp_path):
    path, values = tmp_path / "t.npy", np.arange(12).reshape(3, 4)
    for kind in (">i4", "<i4", ">u2", "u8", "i1"):
        np.save(path, values.astype(kind))
        assert torch.equal(make(path, None).tokens, torch.from_numpy(values))
    assert torch.equal(evaluation_windows(path, None, limit=2).tokens, torch.from_numpy(values[:2]))
    np.save(path, np.arange(12))
    assert evaluation_windows(path, None, limit=2).tokens.shape == (1, 12)
    for kind in ("U1", "f4", "c8", "?", "datetime64[s]", [("a", "i4")]):
        np.save(path, np.zeros((3, 4), dtype=kind))
        with pytest.raises(DataError, match=r"t\.npy: tokens must be whole numbers, not "):
            make(path, None)


def archive(path):
    with path.open("wb") as file:
        np.savez(file, tokens=np.zeros((3, 4), dtype=int))


def longer_than_memory(path):
    np.save(path, np.zeros((3, 4), dtype=int))
    header, longer = b"(3, 4), }" + b" " * 13, b"(3, 40000000000000), }"
    path.write_bytes(path.read_bytes().replace(header, longer))


NO_TOKENS = (
    (lambda path: np.save(path, np.array(3)), r"tokens must be \[samples, length\], not \[\]"),
    (lambda path: path.write_bytes(b"\x80\x04pickle"), "not a NumPy array"),
    (Path.unlink, "no such file"),
    (longer_than_memory, "not a NumPy array file"),
    (archive, "an archive of arrays"),
)


@MAKERS
def test_what_makes_no_windows(make, tmp_path):
    for write, message in NO_TOKENS:
        write(tmp_path / "t.npy")
        with pytest.raises(DataError, match=rf"t\.npy: {message}"):
            make(tmp_path / "t.npy", None)
    for text, tokenizer, length, message in (
        ("abc", TOKENIZER, 20, "less than one window of 20"),
        (" ", TOKENIZER, 20, "no text"),
        ("abc" * 20, None, 20, "tokenizer"),
        ("abc", TOKENIZER, 0, "leaves no room"),
    ):
        with pytest.raises(DataError, match=message):
            make([text], tokenizer, seq_len=length)


def test_tokens_that_are_none():
    windows = token_windows(torch.arange(12).view(3, 4), "given")
    check_vocabulary(windows, 12)
    with pytest.raises(DataError, match="token id 11"):
        check_vocabulary(windows, 11)
    for bad, message in (
        (torch.zeros(2, 3), "whole numbers"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"\[samples, length\]"),
        (torch.tensor([[-1]]), "negative"),
        (torch.zeros(0, 3, dtype=torch.int64), r"\[samples, length\]"),
    ):
        with pytest.raises(DataError, match=message):
            token_windows(bad, "given")


# What windows begin with: what the tokenizer puts before a text, counted as nobody's target

TEXT = "abcdefghijklmnopqrstuvwxyz" * 4


class Tokenizer:
    """A token a character from 10 on, with special tokens around a text."""

    def __init__(self, before=(), after=(), bos=None, size=200):
        self.before, self.after, self.bos_token_id, self.size = before, after, bos, size

    def __len__(self):
        return self.size

    def __call__(self, text, add_special_tokens=True, **_):
        plain = [10 + ord(c) % 100 for c in text]
        whole = [*self.before, *plain, *self.after]
        return {"input_ids": whole if add_special_tokens else plain}


LLAMA = Tokenizer(before=(1,), bos=1)
CLOSING = Tokenizer(after=(2,), bos=1)
QWEN = Tokenizer()
GPT2 = Tokenizer(bos=2)  # its BOS is its EOS, and it puts none before a text
OPT = Tokenizer(before=(2,), bos=2)  # its BOS is its EOS, and it puts that before a text
BERT = Tokenizer(before=(1,), after=(2,))  # something before a text that it does not call BOS
AROUND = Tokenizer(before=(2,), after=(2,), bos=2)
TWO = Tokenizer(before=(3, 4), bos=3)
OUTSIDE = Tokenizer(before=(500,), bos=500)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (LLAMA, {"auto": (1,), "always": (1,), "never": ()}),
        (CLOSING, {"auto": (), "always": (1,)}),
        (QWEN, {"auto": ()}),
        (GPT2, {"auto": (), "always": (2,)}),
        (OPT, {"auto": (2,), "always": (2,), "never": ()}),
        (BERT, {"always": (1,)}),
        (AROUND, {"auto": (2,)}),
        (TWO, {"auto": (3, 4)}),
        # one that is never put anywhere does not matter
        (Tokenizer(bos=500), {"auto": ()}),
        (OUTSIDE, {"never": ()}),
        # the last id of the vocabulary is in it
        (Tokenizer(bos=199), {"always": (199,)}),
    ],
)
def test_a_beginning_is_that_of_the_tokenizer(tokenizer, expected):
    for bos, ids in expected.items():
        begin = beginning_of(tokenizer, bos)
        assert begin == Beginning(bos, ids)
        assert begin.first_target == max(1, len(ids))
        assert ("token" in str(begin)) or not ids
        assert Beginning.from_record(json.loads(json.dumps(begin.record()))) == begin


@MAKERS
@pytest.mark.parametrize(
    ("tokenizer", "bos", "message"),
    [
        (QWEN, "always", "no beginning-of-sequence token; use `bos` auto or never"),
        (QWEN, "sometimes", "`bos` must be auto, always or never"),
        (OUTSIDE, "auto", "500 is outside its vocabulary of 200"),
        (Tokenizer(bos=200), "always", "200 is outside its vocabulary of 200"),
        (Tokenizer(bos=-1), "always", "outside its vocabulary"),
    ],
)
def test_beginnings_that_cannot_be(make, tokenizer, bos, message):
    with pytest.raises(DataError, match=message):
        make([TEXT], tokenizer, seq_len=8, bos=bos)


FAMILIES = st.sampled_from([LLAMA, CLOSING, QWEN, GPT2, OPT, AROUND, TWO])


@given(FAMILIES, st.integers(3, 20), st.integers(0, 50))
def test_windows_are_beginnings_and_text(tokenizer, length, seed):
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids = list(tokenizer.before)
    crops = calibration_windows([TEXT], tokenizer, samples=3, seq_len=length, seed=seed)
    text = evaluation_windows([TEXT], tokenizer, seq_len=length)
    for windows in (crops, text):
        assert windows.length == length
        for window in windows.tokens.tolist():
            assert window[: len(ids)] == ids
            rest = window[len(ids) :]
            assert any(plain[i : i + len(rest)] == rest for i in range(len(plain)))
    # consecutive and without a gap
    joined = torch.cat([w[len(ids) :] for w in text.tokens]).tolist()
    assert joined == plain[: len(joined)]
    assert len(plain) - len(joined) < length - len(ids)


def test_never_is_the_convention_of_one_long_text():
    """Tokenised once with whatever the tokenizer adds, then cut."""
    windows = evaluation_windows([TEXT], LLAMA, seq_len=8, bos="never")
    assert windows.tokens[0, 0] == 1
    assert windows.tokens.view(-1).tolist() == LLAMA(TEXT)["input_ids"][: windows.tokens.numel()]
    assert windows.beginning.first_target == 1
    # tokens that are given have no beginning
    windows = token_windows(torch.ones(2, 5, dtype=torch.long), "mine")
    assert str(windows.beginning) == "as given"
    assert windows.take([1]).beginning == windows.beginning
    with pytest.raises(DataError, match="no room"):
        calibration_windows([TEXT], TWO, samples=1, seq_len=2)


def test_a_beginning_that_the_model_does_not_know(tmp_path):
    """In the tokenizer's vocabulary, and not in the model's: as after adding tokens without resizing."""
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<added>"})
    assert tokenizer.bos_token_id == VOCABULARY == len(tokenizer) - 1
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<added> $A", special_tokens=[("<added>", VOCABULARY)]
    )
    options = WalkOptions(samples=2, seq_len=8, bos="never")
    job = open_job(tiny("llama"), [TEXT], options, tokenizer=tokenizer)
    assert int(job.windows.tokens.max()) < VOCABULARY
    for bos in ("auto", "always"):
        options = WalkOptions(samples=2, seq_len=8, bos=bos)
        with pytest.raises(DataError, match=r"token id 96 does not exist in .* vocabulary of 96"):
            open_job(tiny("llama"), [TEXT], options, tokenizer=tokenizer)
    # a tokenizer on disk without one
    model = save(tiny("llama"), tmp_path / "model")
    save_tokenizer(model)
    options = WalkOptions(samples=2, seq_len=8)
    windows = open_job(model, [TEXT], options).windows
    assert str(windows.beginning) == "without a beginning token"
    assert int(windows.tokens.min()) >= ord("a") - 31
    with pytest.raises(DataError, match="no beginning-of-sequence token; use `bos` auto or never"):
        open_job(model, [TEXT], dataclasses.replace(options, bos="always"))
