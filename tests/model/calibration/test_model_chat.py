"""Windows of conversations: through the model's own template, from their beginning, and where they fail."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHAT_BOS, CHAT_EOS, CHAT_TEMPLATE, chat_tokenizer, save, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskopt import open_job, perplexity, prune_model
from maskopt.core.pattern import Unstructured
from maskopt.errors import DataError, MaskoptError, ModelError, VerificationError
from maskopt.models.calibration.chat import (
    chat_calibration_windows,
    chat_evaluation_windows,
    read_conversations,
)
from maskopt.models.checkpoints.report import read_manifest
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.options.prune import PruneOptions
from maskopt.models.options.walk import WalkOptions
from maskopt.models.verification.verify import verify_model

TOKENIZER = chat_tokenizer()


def talk(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def tokens_of(messages):
    """What the template says, written down by hand."""
    ids = [CHAT_BOS]
    for message in messages:
        text = f"<{message['role']}>{message['content']}"
        ids += [ord(c) - 31 for c in text] + [CHAT_EOS]
    return ids


TALKS = [talk(f"question {i}" * (1 + i % 3), f"answer {i}" * (1 + i % 4)) for i in range(12)]
MESSAGES = [{"messages": t, "id": 1} for t in TALKS]


def write(path, talks):
    path.write_text("".join(json.dumps(t) + "\n" for t in talks))
    return path


def calibration(source, tokenizer=TOKENIZER, samples=3, seq_len=64, **options):
    return chat_calibration_windows(source, tokenizer, samples=samples, seq_len=seq_len, **options)


def evaluation(source, tokenizer=TOKENIZER, seq_len=30, **options):
    return chat_evaluation_windows(source, tokenizer, seq_len=seq_len, **options)


def parts(window):
    """A window, split where conversations begin."""
    starts = [i for i, token in enumerate(window) if token == CHAT_BOS]
    return [window[a:b] for a, b in zip(starts, [*starts[1:], len(window)], strict=True)]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 8), st.integers(2, 90), st.integers(0, 20))
def test_windows_are_conversations_from_their_beginning(lengths, samples, length, seed):
    talks = [talk(chr(65 + i) * n) for i, n in enumerate(lengths)]  # each of a letter of its own
    ids = [tokens_of(t) for t in talks]
    if sum(map(len, ids)) < length:
        with pytest.raises(DataError, match="less than one window"):
            calibration(talks, samples=samples, seq_len=length, seed=seed)
        return
    one, two = (calibration(talks, samples=samples, seq_len=length, seed=seed) for _ in range(2))
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
    assert TOKENIZER("a")["input_ids"][0] == CHAT_BOS
    without = chat_tokenizer(CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    for tokenizer, count in ((TOKENIZER, 1), (without, 0)):
        window = evaluation([talk("a" * 80)], tokenizer).tokens[0].tolist()
        assert window.count(CHAT_BOS) == count


SHAREGPT = [{"from": "human", "value": "hello"}]
REFUSES = "line 2: the model's chat template refuses it"
PARTS = {"role": "assistant", "content": [{"type": "text"}]}
SURROGATE = '[{"role": "user", "content": "\\ud800"}]'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        (3, "line 2: no list under 'messages'; give objects with messages"),
        ({"text": "hello"}, "line 2: no list under 'messages'; give objects"),
        ({"conversations": SHAREGPT}, "line 2: no list .*; call 'conversations' so, with role and"),
        (SHAREGPT, "line 2, message 1: has from and value; .* role and content, .* user for human"),
        ([], "line 2: a conversation without messages"),
        (["hello"], "line 2, message 1: not an object with role and content"),
        ([{"content": "hello"}], ".*message 1: the role must be one of system, .*, not None"),
        ([{"role": "human", "content": "x"}], ".*message 1: the role must .* 'human'"),
        ([{"role": [], "content": "x"}], ".*message 1: the role must be one of"),
        ([{"role": "user"}], "line 2, message 1: no text under 'content'"),
        ([{"role": "user", "content": None}], ".*message 1: no text under 'content'"),
        ([*talk("hello"), PARTS], ".*message 2: no text under 'content'; join its parts"),
        (talk("hello") * 2, f"{REFUSES} .TemplateError: roles must alternate"),
        ([{"role": "system", "content": "x"}], REFUSES),
        (SURROGATE, "line 2: not JSON .* is half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    line = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(talk('hello'))}\n{line}\n")
    with pytest.raises(DataError, match=f"chats.jsonl, {message}"):
        calibration(tmp_path / "chats.jsonl", samples=1, seq_len=30)


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
        with pytest.raises(DataError, match=message):
            read_conversations(source)
        with pytest.raises(DataError, match=message):
            open_job(tiny("llama"), source, WalkOptions(chat=True), tokenizer=TOKENIZER)
    with pytest.raises(DataError, match="no text under 'text'; it has messages: give `chat`"):
        open_job(tiny("llama"), chats, WalkOptions(), tokenizer=TOKENIZER)
    for given_ in ({"bos": "always"}, {"bos": "never"}, {"text_field": "body"}):
        with pytest.raises(DataError, match=f"`{next(iter(given_))}` is of plain text"):
            PruneOptions(Unstructured(0.5), chat=True, **given_)


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
        with pytest.raises(DataError, match=message):
            evaluation(TALKS, used)
    several.chat_template = {"default": CHAT_TEMPLATE, "rag": "{{ nonsense() }}"}
    assert evaluation(TALKS, several).digest == evaluation(TALKS).digest
    # a panic, as of Rust libraries, which cannot be imported
    panic = Mock(side_effect=type("PanicException", (BaseException,), {})("no entry"))
    monkeypatch.setattr(several, "apply_chat_template", panic)
    with pytest.raises(DataError, match=r"tokenizer\.json: .* stopped on this file \(no entry\)"):
        evaluation(TALKS, several)


def test_templates_with_names_in_results(tmp_path, caplog):
    """Of a model in memory all are there; of a folder that by default, and the others are said to be missing.
    The card may be edited in both."""
    several = chat_tokenizer(None)
    several.chat_template = {"default": CHAT_TEMPLATE, "rag": "rag" + CHAT_TEMPLATE}
    dense = save(tiny("llama"), tmp_path / "dense")
    several.save_pretrained(dense)
    options = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1, "seq_len": 16, "samples": 4}
    text, found = ["what is it that you say? " * 20], []
    loaded = AutoModelForCausalLM.from_pretrained(dense)
    for name, model, tokenizer in (("folder", dense, None), ("memory", loaded, several)):
        out = tmp_path / name
        prune_model(model, tokenizer, calibration=text, output=out, **options)
        with (out / "README.md").open("a") as card:
            card.write("more\n")
        verify_model(out)
        found.append(AutoTokenizer.from_pretrained(out).chat_template)
    assert found == [CHAT_TEMPLATE, several.chat_template]
    assert "additional_chat_templates: chat templates with names" in caplog.text


def test_windows_do_not_depend_on_the_day():
    """A template that writes today's date writes a fixed one, and all else as it would."""
    days = (
        "strftime_now('%A, %d %B %Y, %Y-%m-%d, %d %b')",
        "'Friday, 26 July 2024, 2024-07-26, 26 Jul'",
    )
    for before in ("", "\n", "  \n  ", "a\n"):
        texts = [
            before + "{% if true %}\n  {{ 'Today: ' + " + d + " }}\n{% endif %}x" for d in days
        ]
        one, two = (evaluation(TALKS[:4], chat_tokenizer(text), seq_len=120) for text in texts)
        assert one.digest == two.digest


def test_perplexity_of_chats():
    """By a plain forward pass over the windows."""
    model = tiny("llama")
    found = perplexity(model, TOKENIZER, text=TALKS, seq_len=48, windows=3, chat=True)
    windows = evaluation(TALKS, seq_len=48, limit=3)
    with torch.no_grad():
        logits = model(windows.tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.tokens[:, 1:].flatten())
    assert found.value == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found.beginning == "chats through the model's template"
    assert found.targets == 3 * 47


FEW = ("--samples", 4, "--seq-len", 48)
HALF = ("--sparsity", 0.5)
BLOCK = {"include": "layers.1"}


def prune(dense, text, out, *more):
    how = [*HALF, "--solver", "wanda", *FEW, "--min-tokens", 8, "--include", BLOCK["include"]]
    return ["prune", dense, *how, "--calibration", text, "--output", out, *more]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A model with the tokenizer, chats, and what a prune with them makes; nobody may change them."""
    home = tmp_path_factory.mktemp("home")
    dense, chats, out = home / "dense", write(home / "chats.jsonl", MESSAGES), home / "out"
    TOKENIZER.save_pretrained(save(tiny("llama"), dense))
    shown = run(*prune(dense, chats, out, "--chat", "--seed", 3))
    assert "calibrated on 4 windows of 48 tokens, chats through the model's template" in shown
    return dense, chats, out


def test_prune_and_verify_from_the_command_line(paths, tmp_path):
    dense, chats, out = paths
    windows = calibration(chats, samples=4, seq_len=48, seed=3)
    record = read_manifest(out / MANIFEST)["fingerprint"]["calibration"]
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
        said = run(*prune(dense, source, out, *same, *more), fails=ModelError)
        assert "another run" in said
    tokens = calibration(chats, samples=4, seq_len=48, seed=3).tokens
    options = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 8, "seed": 3, "samples": 4}
    with pytest.raises(ModelError, match="another run"):  # the same tokens are not the same run
        prune_model(dense, tokens, output=out, resume=True, seq_len=48, **BLOCK, **options)
    run(*prune(dense, chats, out, *same, "--chat"))  # there is nothing left to do


def test_every_command_that_reads_text_takes_chats(paths, tmp_path):
    dense, chats, out = paths
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


def test_what_fails_leaves_nothing_behind(paths, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [talk("hello") * 2])
    command = prune(paths[0], bad, tmp_path / "out", "--chat")
    said = run(*command, fails=MaskoptError)
    assert "\n" not in said
    assert "bad.jsonl, line 1: the model's chat template refuses it" in said
    said = run(*command, "--bos", "never", fails=DataError)
    assert "--bos is of plain text; with --chat" in said
    assert not (tmp_path / "out").exists()
