"""Text sources, windows and what they begin with, conversations, the demo's text."""

import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from commands import run
from forging import fails
from hypothesis import given, strategies as st
from prunes import manifest_of, prune
from tiny_models import CHAT_TEMPLATE, WordTokenizer, chat_tokenizer, cross_entropy, save, tiny
from tokenizers import processors
from transformers import AutoTokenizer

from maskopt import PruneOptions, Unstructured, open_job, perplexity
from maskopt.demo import demo_text
from maskopt.errors import DataError, MaskoptError, ModelError, VerificationError
from maskopt.models.calibration import chat, tokens
from maskopt.models.calibration.chat import read_conversations
from maskopt.models.calibration.tokens import (
    calibration_windows,
    evaluation_windows,
    read_documents,
    token_windows,
)
from maskopt.models.checkpoints.bos import Beginning, beginning_of
from maskopt.models.options.walk import WalkOptions
from maskopt.models.verification.verify import verify_model

TOKENIZER = WordTokenizer()
TEXT = "abcdefghijklmnopqrstuvwxyz" * 4
CHAT = chat_tokenizer()
BOS, EOS = CHAT.bos_token_id, CHAT.eos_token_id
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SHAREGPT = [{"from": "human", "value": "hello"}]
REFUSES = "line 2: the model's chat template refuses it"
PARTS = {"role": "assistant", "content": [{"type": "text"}]}
SURROGATE = '[{"role": "user", "content": "\\ud800"}]'
FEW, HALF, LAST = ("--samples", 4, "--seq-len", 48), ("--sparsity", 0.5), "layers.1"


def ids(text):
    return TOKENIZER(text)["input_ids"]


def test_files_folders_bad_ones_and_the_demo_text(tmp_path):
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
    (bad := tmp_path / "bad").mkdir()
    text, lines = "a.txt", "a.jsonl"
    fails(DataError, "holds no text file", read_documents, bad)
    fails(DataError, "no such file", read_documents, bad / "a.bin")
    for name, content, message in (
        (text, b"   \n", "no text"),
        (text, b"\xff\xfe", "not UTF-8"),
        (lines, b"{oops", "line 1: not JSON"),
        (lines, b'{"txt": "x"}', "did you mean 'txt'"),
        (lines, b"[1]", "no text under 'text': the line is not a JSON object"),
        (lines, b'{"text": null}', "line 1: no text under 'text': the value is null$"),
        (lines, b'{"text": 3}', "line 1: no text under 'text': the value is int$"),
        (lines, b'{"text": ""}\n{"text": " "}', "no text in it: 2 documents, all of them empty"),
        (lines, b'{"text": "x"}\n{"text": "\\ud800"}', r"l, line 2: not JSON \('\\ud800' is half"),
        (lines, b'{"text": "x", "\\udc80": 1}', r"a\.jsonl, line 1: not JSON \('\\udc80' is half"),
        (lines, b"[" * 10**5, "line 1: not JSON"),
        (lines, b"", "no text"),
    ):
        (bad / name).write_bytes(content)
        fails(DataError, message, read_documents, bad / name)


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
        ("hf:broken", "not on the hub"), ("hf:c4:tset", "did you mean 'test'|no split"),
        ("hf:", "write hf:NAME"), ("hf:numbers", "no value of the column 'text' is text"),
        ("hf:../private", "'../private' is not the name of a data set on the hub"),
        ("hf:/etc", "'/etc' is not the name of a data set on the hub"),
    ):  # fmt: skip
        fails(DataError, message, read_documents, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(DataError, r"needs the package datasets: pip install datasets$", read_documents, "hf:c4")


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


def longer_than_memory(path):
    np.save(path, np.zeros((3, 4), dtype=int))
    header, longer = b"(3, 4), }" + b" " * 13, b"(3, 40000000000000), }"
    path.write_bytes(path.read_bytes().replace(header, longer))


@pytest.mark.parametrize("make", [calibration_windows, evaluation_windows])
def test_files_of_tokens_and_what_makes_no_windows(make, tmp_path):
    path, values = tmp_path / "t.npy", np.arange(12).reshape(3, 4)
    for kind in (">i4", "<i4", ">u2", "u8", "i1"):
        np.save(path, values.astype(kind))
        assert torch.equal(make(path, None).tokens, torch.from_numpy(values))
    assert torch.equal(evaluation_windows(path, None, limit=2).tokens, torch.from_numpy(values[:2]))
    np.save(path, np.arange(12))
    assert evaluation_windows(path, None, limit=2).tokens.shape == (1, 12)
    for kind in ("U1", "f4", "c8", "?", "datetime64[s]", [("a", "i4")]):
        np.save(path, np.zeros((3, 4), dtype=kind))
        fails(DataError, r"t\.npy: tokens must be whole numbers, not ", make, path, None)
    # what makes no windows
    for write, message in (
        (lambda path: np.save(path, np.array(3)), r"tokens must be \[samples, length\], not \[\]"),
        (lambda path: path.write_bytes(b"\x80\x04pickle"), "not a NumPy array"),
        (Path.unlink, "no such file"),
        (longer_than_memory, "not a NumPy array file"),
        (lambda path: np.savez(path.open("wb"), tokens=np.zeros((3, 4))), "an archive of arrays"),
    ):
        write(path)
        fails(DataError, rf"t\.npy: {message}", make, path, None)
    for text, tokenizer, length, message in (
        ("abc", TOKENIZER, 20, "less than one window of 20"), (" ", TOKENIZER, 20, "no text"),
        ("abc" * 20, None, 20, "tokenizer"), ("abc", TOKENIZER, 0, "leaves no room"),
    ):  # fmt: skip
        fails(DataError, message, make, [text], tokenizer, seq_len=length)
    windows = token_windows(torch.arange(12).view(3, 4), "given")
    tokens.check_vocabulary(windows, 12)
    fails(DataError, "token id 11", tokens.check_vocabulary, windows, 11)
    for bad, message in (
        (torch.zeros(2, 3), "whole numbers"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"\[samples, length\]"),
        (torch.tensor([[-1]]), "negative"),
        (torch.zeros(0, 3, dtype=torch.int64), r"\[samples, length\]"),
    ):
        fails(DataError, message, token_windows, bad, "given")


# --- what windows begin with: what the tokenizer puts before a text, counted as nobody's target
class Tokenizer:
    """A token a character from 10 on, with special tokens around a text."""

    def __init__(self, before=(), after=(), bos=None):
        self.before, self.after, self.bos_token_id = before, after, bos

    def __len__(self):
        return 200

    def __call__(self, text, add_special_tokens=True, **_):
        plain = [10 + ord(c) % 100 for c in text]
        return {"input_ids": [*self.before, *plain, *self.after] if add_special_tokens else plain}


LLAMA = Tokenizer(before=(1,), bos=1)
CLOSING = Tokenizer(after=(2,), bos=1)
QWEN = Tokenizer()
GPT2 = Tokenizer(bos=2)  # its BOS is its EOS, and it puts none before a text
OPT = Tokenizer(before=(2,), bos=2)  # its BOS is its EOS, and it puts that before a text
BERT = Tokenizer(before=(1,), after=(2,))  # something before a text that it does not call BOS
AROUND = Tokenizer(before=(2,), after=(2,), bos=2)
TWO = Tokenizer(before=(3, 4), bos=3)
OUTSIDE = Tokenizer(before=(500,), bos=500)


def test_a_beginning_is_that_of_the_tokenizer():
    for tokenizer, expected in (
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
    ):
        for bos, ids in expected.items():
            begin = beginning_of(tokenizer, bos)
            assert begin == Beginning(bos, ids)
            assert begin.first_target == max(1, len(ids))
            assert ("token" in str(begin)) or not ids
            assert str(Beginning(**json.loads(json.dumps(begin.record())))) == str(begin)
    for tokenizer, bos, message in (
        (QWEN, "always", "no beginning-of-sequence token; use `bos` auto or never"),
        (QWEN, "sometimes", "`bos` must be one of: auto, always, never; not"),
        (OUTSIDE, "auto", "500 is outside its vocabulary of 200"),
        (Tokenizer(bos=200), "always", "200 is outside its vocabulary of 200"),
        (Tokenizer(bos=-1), "always", "outside its vocabulary"),
    ):
        for make in (calibration_windows, evaluation_windows):
            fails(DataError, message, make, [TEXT], tokenizer, seq_len=8, bos=bos)


ALL = [LLAMA, CLOSING, QWEN, GPT2, OPT, AROUND, TWO]


@given(st.sampled_from(ALL), st.integers(3, 20), st.integers(0, 50))
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


def test_never_is_the_convention_of_one_long_text_and_other_beginnings(dense):
    windows = evaluation_windows([TEXT], LLAMA, seq_len=8, bos="never")
    assert windows.tokens[0, 0] == 1
    assert windows.tokens.view(-1).tolist() == LLAMA(TEXT)["input_ids"][: windows.tokens.numel()]
    assert windows.beginning.first_target == 1
    # tokens that are given have no beginning
    windows = token_windows(torch.ones(2, 5, dtype=torch.long), "mine")
    assert str(windows.beginning) == "as given"
    assert windows.take([1]).beginning == windows.beginning
    fails(DataError, "no room", calibration_windows, [TEXT], TWO, samples=1, seq_len=2)
    # in the tokenizer's vocabulary, and not in the model's: as after adding tokens without resizing
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<added>"})
    assert tokenizer.bos_token_id == 96 == len(tokenizer) - 1
    first = {"single": "<added> $A", "special_tokens": [("<added>", 96)]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**first)
    options = WalkOptions(samples=2, seq_len=8, bos="never")
    job = open_job(tiny("llama"), [TEXT], options, tokenizer=tokenizer)
    assert int(job.windows.tokens.max()) < 96
    said = r"token id 96 does not exist in .* vocabulary of 96"
    for how in (replace(options, bos="auto"), replace(options, bos="always")):
        fails(DataError, said, open_job, tiny("llama"), [TEXT], how, tokenizer=tokenizer)
    # a tokenizer on disk without one
    windows = open_job(dense, [TEXT], replace(options, bos="auto")).windows
    assert str(windows.beginning) == "without a beginning token"
    assert int(windows.tokens.min()) >= ord("a") - 31
    said = "no beginning-of-sequence token; use `bos` auto or never"
    fails(DataError, said, open_job, dense, [TEXT], replace(options, bos="always"))


# --- conversations
def talk(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def tokens_of(messages):
    """What the template says, written down by hand."""
    ids = [BOS]
    for message in messages:
        ids += [ord(c) - 31 for c in f"<{message['role']}>{message['content']}"] + [EOS]
    return ids


TALKS = [talk(f"question {i}" * (1 + i % 3), f"answer {i}" * (1 + i % 4)) for i in range(12)]
MESSAGES = [{"messages": t, "id": 1} for t in TALKS]


def write(path, talks):
    path.write_text("".join(json.dumps(t) + "\n" for t in talks))
    return path


def calibration(source, tokenizer=CHAT, **options):
    how = {"samples": 3, "seq_len": 64, "seed": 0, **options}
    return chat.chat_windows(source, tokenizer, **how)


def evaluation(source, tokenizer=CHAT, seq_len=30, limit=None):
    return chat.chat_windows(source, tokenizer, samples=limit, seq_len=seq_len, seed=None)


def parts(window):
    starts = [i for i, token in enumerate(window) if token == BOS]
    return [window[a:b] for a, b in zip(starts, [*starts[1:], len(window)], strict=True)]


@given(LENGTHS, st.integers(1, 8), st.integers(2, 90), st.integers(0, 20))
def test_windows_are_conversations_from_their_beginning(lengths, samples, length, seed):
    talks = [talk(chr(65 + i) * n) for i, n in enumerate(lengths)]  # each of a letter of its own
    ids = [tokens_of(t) for t in talks]
    how = {"samples": samples, "seq_len": length, "seed": seed}
    if sum(map(len, ids)) < length:
        fails(DataError, "less than one window", calibration, talks, **how)
        return
    one, two = (calibration(talks, **how) for _ in range(2))
    assert one.digest == two.digest
    assert (len(one), one.length) == (samples, length)
    used = []
    for window in one.tokens.tolist():
        *whole, last = parts(window)
        assert sum(map(len, whole)) + len(last) == length  # it begins with a conversation
        assert all(part in ids for part in whole)
        assert any(full[: len(last)] == last for full in ids)
        used += [*whole, last]
    if not one.source.endswith("used again"):
        heads = [tuple(part[:8]) for part in used if len(part) >= 8]  # the letter is the eighth
        assert len(set(heads)) == len(heads)


def test_orders_and_cuts():
    # a seed decides the order
    assert len({calibration(TALKS, samples=4, seed=seed).digest for seed in range(4)}) == 4
    # a long conversation is cut to its first tokens
    long = talk("abc" * 100, "def" * 100)
    windows = calibration([long], samples=2, seq_len=50)
    assert windows.tokens.tolist() == [tokens_of(long)[:50]] * 2
    assert windows.source == "given conversations, conversations used again"
    # evaluation takes them in their order
    expected, window = [], []
    for one in TALKS:
        window += tokens_of(one)
        if len(window) >= 64:
            expected.append(window[:64])
            window = []
    assert len(expected) > 3
    windows = evaluation(TALKS, seq_len=64)
    assert windows.tokens.tolist() == expected
    assert evaluation(TALKS, seq_len=64, limit=2).tokens.tolist() == expected[:2]
    # of tokens that nothing stands before, none is predicted
    assert windows.beginning.first_target == 1
    # the tokenizer's own beginning does not come on top
    assert CHAT("a")["input_ids"][0] == BOS
    without = chat_tokenizer(CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    for tokenizer, count in ((CHAT, 1), (without, 0)):
        window = evaluation([talk("a" * 80)], tokenizer).tokens[0].tolist()
        assert window.count(BOS) == count
    # perplexity is that of these windows
    model = tiny("llama")
    found = perplexity(model, CHAT, text=TALKS, seq_len=48, windows=3, chat=True)
    expected = math.exp(cross_entropy(model, evaluation(TALKS, seq_len=48, limit=3).tokens))
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert (found.beginning, found.targets) == ("chats through the model's template", 3 * 47)


def test_a_bad_line_is_named(tmp_path):
    for line, message in (
        *((line, "line 2: not JSON") for line in ("{", "[" * 100_000)),
        (3, "line 2: no list under 'messages'; give objects with messages"),
        ({"text": "hello"}, "line 2: no list under 'messages'; give objects"),
        ({"conversations": SHAREGPT}, "line 2: no list .*; call 'conversations' so, with role and"),
        (SHAREGPT, "line 2, message 1: has from and value; .* role and content, .* user for human"),
        ([], "line 2: a conversation without messages"),
        (["hello"], "line 2, message 1: not an object with role and content"),
        ([{"content": "hello"}], ".*message 1: the role must be one of: system, .*; not None"),
        ([{"role": "human", "content": "x"}], ".*message 1: the role must .* 'human'"),
        ([{"role": [], "content": "x"}], ".*message 1: the role must be one of"),
        ([{"role": "user"}], "line 2, message 1: no text under 'content'"),
        ([{"role": "user", "content": None}], ".*message 1: no text under 'content'"),
        ([*talk("hello"), PARTS], ".*message 2: no text under 'content'; join its parts"),
        (talk("hello") * 2, f"{REFUSES} .TemplateError: roles must alternate"),
        ([{"role": "system", "content": "x"}], REFUSES),
        (SURROGATE, "line 2: not JSON .* is half of a surrogate pair"),
    ):
        text = line if isinstance(line, str) else json.dumps(line)
        (path := tmp_path / "chats.jsonl").write_text(f"{json.dumps(talk('hello'))}\n{text}\n")
        fails(DataError, f"chats.jsonl, {message}", calibration, path, samples=1, seq_len=30)


def test_forms_of_the_file_and_other_sources(tmp_path):
    chats, lists = write(tmp_path / "a.jsonl", MESSAGES), write(tmp_path / "b.JSONL", TALKS)
    lists.write_text("\n" + lists.read_text() + " \n\n")
    found = [calibration(source) for source in (chats, str(chats), lists, TALKS, MESSAGES)]
    assert len({windows.digest for windows in found}) == 1
    assert found[0].source == "a.jsonl"
    text, empty = tmp_path / "text.txt", tmp_path / "empty.jsonl"
    text.write_text("hello")
    empty.write_text("\n")
    np.save(tmp_path / "tokens.npy", np.ones((2, 8), dtype=np.int64))
    dense, chatty = tiny("llama"), WalkOptions(chat=True)
    for source, message in (
        (text, "text.txt: `chat` takes JSON lines of messages"),
        ("hf:c4", "hf:c4: `chat` takes JSON lines"),
        (tmp_path, "`chat` takes JSON lines"),
        (tmp_path / "none.jsonl", "none.jsonl: no such file"),
        (empty, "empty.jsonl: there is no conversation in it"),
        ([], "given conversations: there is no conversation"),
        (["hello"], "given conversation 1: no list under 'messages'"),
        (tmp_path / "tokens.npy", "tokens already, not messages; leave `chat` out"),
        (torch.ones(2, 8, dtype=torch.long), "tokens already"),
    ):
        fails(DataError, message, read_conversations, source)
        fails(DataError, message, open_job, dense, source, chatty, tokenizer=CHAT)
    said = "no text under 'text'; it has messages: give `chat`"
    fails(DataError, said, open_job, dense, chats, WalkOptions(), tokenizer=CHAT)
    for name, value in (("bos", "always"), ("bos", "never"), ("text_field", "body")):
        given, said = {"chat": True, name: value}, f"`{name}` is of plain text"
        fails(DataError, said, PruneOptions, Unstructured(0.5), **given)


def test_templates_that_are_not_there_or_not_trusted(monkeypatch):
    several = chat_tokenizer(None)
    several.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    red = "{{ raise_exception('\x1b[31mred' + 'x' * 500) }}"
    failing = "conversation 1: the model's chat template .*"
    for tokenizer, message in (
        (chat_tokenizer(None), r"the tokenizer has no chat template: .* leave `chat` out"),
        (None, "need the model's tokenizer"),
        (several, r"the tokenizer: .*multiple chat templates"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", f"{failing}SecurityError"),
        ("{{ messages.append(1) }}", f"{failing}SecurityError"),
        ("{{ open('/etc/passwd').read() }}", f"{failing}UndefinedError"),
        ("{% for m in messages %}", f"{failing}TemplateSyntaxError"),
        ("{{ 1 // 0 }}", f"{failing}ZeroDivisionError"),
        (red, failing + r"TemplateError: \[31mredx{190,}\)$"),
    ):
        used = chat_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        fails(DataError, message, evaluation, TALKS, used)
    several.chat_template = {"default": CHAT_TEMPLATE, "rag": "{{ nonsense() }}"}
    assert evaluation(TALKS, several).digest == evaluation(TALKS).digest
    # a template that writes today's date writes a fixed one, and all else as it would
    today = "strftime_now('%A, %d %B %Y, %Y-%m-%d, %d %b')"
    for before in ("", "\n", "  \n  ", "a\n"):
        found = set()
        for day in (today, "'Friday, 26 July 2024, 2024-07-26, 26 Jul'"):
            template = before + "{% if true %}\n  {{ 'Today: ' + " + day + " }}\n{% endif %}x"
            found.add(evaluation(TALKS[:4], chat_tokenizer(template), seq_len=120).digest)
        assert len(found) == 1
    # a panic, as of Rust libraries, which cannot be imported
    panic = Mock(side_effect=type("PanicException", (BaseException,), {})("no entry"))
    monkeypatch.setattr(several, "apply_chat_template", panic)
    said = r"tokenizer\.json: .* stopped on this file \(no entry\)"
    fails(DataError, said, evaluation, TALKS, several)


def test_templates_with_names_in_results(tmp_path, caplog):
    """One is there, and the others are said to be missing."""
    several = chat_tokenizer(None)
    several.chat_template = {"default": CHAT_TEMPLATE, "rag": "rag" + CHAT_TEMPLATE}
    dense = save(tiny("llama"), tmp_path / "dense")
    several.save_pretrained(dense)
    text = {"calibration": ["what is it that you say? " * 20], "seq_len": 16, "samples": 4}
    prune(dense, out := tmp_path / "out", **text)
    with (out / "README.md").open("a") as card:
        card.write("more\n")
    verify_model(out)
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert "additional_chat_templates: chat templates with names" in caplog.text


def chat_prune(dense, text, out, *more):
    how = [*HALF, "--solver", "wanda", *FEW, "--min-tokens", 8, "--include", LAST]
    return ["prune", dense, *how, "--calibration", text, "--output", out, *more]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A model with the tokenizer, chats, and what a prune with them makes; nobody may change them."""
    home = tmp_path_factory.mktemp("home")
    dense, chats, out = home / "dense", write(home / "chats.jsonl", MESSAGES), home / "out"
    CHAT.save_pretrained(save(tiny("llama"), dense))
    said = "Calibrated on 4 windows of 48 tokens of chats.jsonl, chats through the model's template"
    assert said in run(*chat_prune(dense, chats, out, "--chat", "--seed", 3))
    return dense, chats, out


def test_commands_take_chats(paths, tmp_path):
    dense, chats, out = paths
    windows = calibration(chats, samples=4, seq_len=48, seed=3)
    record = manifest_of(out)["fingerprint"]["calibration"]
    assert record["beginning"] == {"bos": "template", "ids": []}
    assert record["sha256"] == windows.digest
    # the windows are made again, through the template of the original
    shown = run("verify", out, "--original", dense, "--calibration", chats)
    assert "errors (to 1e-05) and statuses of 7 layers (checked)" in shown
    # their tokens may be given, too
    np.save(tmp_path / "windows.npy", windows.tokens.numpy())
    for source in (windows.tokens, tmp_path / "windows.npy"):
        assert len(verify_model(out, dense, calibration=source).checked_layers) == 7
    # the result has the template, and is evaluated through it
    shown = run("eval", dense, out, "--text", chats, "--chat", "--seq-len", 48)
    assert "tokens from chats.jsonl, chats through the model's template" in shown
    # every other command that reads text takes chats
    layer = ("--include", "layers.1.self_attn.o_proj")
    few = ("--calibration", chats, "--chat", *FEW)
    assert "o_proj" in run("bound", out, "--original", dense, *few, *layer, "--method", "box")
    assert "o_proj" in run("bound", dense, *few, *layer, *HALF, "--method", "box")
    assert "wanda" in run("compare", dense, *few, *layer, *HALF, "--solvers", "wanda")
    run("export", dense, tmp_path / "layer.npz", *few, *layer, *HALF)
    assert (tmp_path / "layer.npz").exists()
    assert "memory" in run("prune", "--dry-run", dense, *HALF, *few, "--solver", "wanda")
    wrong = ("--calibration", tmp_path / "x.txt", *few[2:])
    assert "--chat takes JSON lines" in run("bound", dense, *wrong, *HALF, fails=DataError)


def test_other_chats_are_not_those_of_the_prune(paths, tmp_path):
    dense, chats, out = paths
    text = tmp_path / "text.txt"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    other = write(tmp_path / "other.jsonl", [talk("something else" * 4, "entirely")] * 8)
    for source, error, said in (
        (other, VerificationError, "is not what the model was calibrated on"),
        (text, DataError, "text.txt: `chat` takes JSON lines of messages"),
    ):
        assert said in run("verify", out, "--original", dense, "--calibration", source, fails=error)
    same = ["--resume", "--seed", 3]
    for source, more in ((other, ["--chat"]), (text, []), (chats, ["--chat", "--seed", 1])):
        said = run(*chat_prune(dense, source, out, *same, *more), fails=ModelError)
        assert "another run" in said
    # the same tokens are not the same run
    tokens = calibration(chats, samples=4, seq_len=48, seed=3).tokens
    options = {"min_tokens": 8, "seed": 3, "samples": 4, "seq_len": 48, "include": LAST}
    fails(ModelError, "another run", prune, dense, out, tokens, resume=True, **options)
    run(*chat_prune(dense, chats, out, *same, "--chat"))  # there is nothing left to do
    # what fails leaves nothing behind
    bad = write(tmp_path / "bad.jsonl", [talk("hello") * 2])
    command = chat_prune(dense, bad, tmp_path / "out", "--chat")
    said = run(*command, fails=MaskoptError)
    assert "\n" not in said
    assert "bad.jsonl, line 1: the model's chat template refuses it" in said
    said = run(*command, "--bos", "never", fails=DataError)
    assert "--bos is of plain text; with --chat" in said
    assert not (tmp_path / "out").exists()
