"""Windows of conversations: through the model's own template, from their beginning, told where they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHAT_BOS, CHAT_EOS, CHAT_TEMPLATE, chat_tokenizer, save, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskopt import open_job, perplexity, prune_model
from maskopt.errors import DataError, MaskoptError, ModelError, VerificationError
from maskopt.model.chat import chat_calibration_windows, chat_evaluation_windows, read_conversations
from maskopt.model.options import PruneOptions
from maskopt.model.verify import verify_output
from maskopt.model.walk_options import WalkOptions
from maskopt.model.workspace import MANIFEST
from maskopt.pattern import Unstructured

TOKENIZER = chat_tokenizer()
Talk = list[dict[str, str]]


def talk(*contents: str) -> Talk:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def tokens_of(messages: Talk) -> list[int]:
    """What the template says, written down by hand."""
    ids = [CHAT_BOS]
    for message in messages:
        text = f"<{message['role']}>{message['content']}"
        ids += [ord(c) - 31 for c in text] + [CHAT_EOS]
    return ids


TALKS = [talk(f"question {i}" * (1 + i % 3), f"answer {i}" * (1 + i % 4)) for i in range(12)]


def write(path: Path, talks: list[Any]) -> Path:
    path.write_text("".join(json.dumps(t) + "\n" for t in talks))
    return path


def parts(window: list[int]) -> list[list[int]]:
    """A window, split where conversations begin."""
    starts = [i for i, token in enumerate(window) if token == CHAT_BOS]
    return [window[a:b] for a, b in zip(starts, [*starts[1:], len(window)], strict=True)]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 8),
    st.integers(2, 90),
    st.integers(0, 20),
)
def test_windows_are_conversations_from_their_beginning(
    lengths: list[int], samples: int, length: int, seed: int
) -> None:
    talks = [talk(chr(65 + i) * n) for i, n in enumerate(lengths)]  # each of a letter of its own
    ids = [tokens_of(t) for t in talks]
    if sum(map(len, ids)) < length:
        with pytest.raises(DataError, match="less than one window"):
            chat_calibration_windows(talks, TOKENIZER, samples=samples, seq_len=length, seed=seed)
        return
    one, two = (
        chat_calibration_windows(talks, TOKENIZER, samples=samples, seq_len=length, seed=seed)
        for _ in range(2)
    )
    assert one.digest == two.digest
    assert (len(one), one.length) == (samples, length)
    used: list[list[int]] = []
    for window in one.tokens.tolist():
        *whole, last = parts(window)
        assert sum(map(len, whole)) + len(last) == length  # it begins with a conversation
        assert all(part in ids for part in whole)
        assert any(full[: len(last)] == last for full in ids)
        used += [*whole, last]
    if not one.source.endswith("used again"):
        heads = [tuple(part[:8]) for part in used if len(part) >= 8]  # the letter is the eighth
        assert len(set(heads)) == len(heads)


def test_a_seed_decides_the_order() -> None:
    windows = {
        chat_calibration_windows(TALKS, TOKENIZER, samples=4, seq_len=64, seed=seed).digest
        for seed in range(4)
    }
    assert len(windows) == 4


def test_a_long_conversation_is_cut_to_its_first_tokens() -> None:
    long = talk("abc" * 100, "def" * 100)
    windows = chat_calibration_windows([long], TOKENIZER, samples=2, seq_len=50)
    assert windows.tokens.tolist() == [tokens_of(long)[:50]] * 2
    assert windows.source == "given conversations, conversations used again"


def test_evaluation_takes_them_in_their_order() -> None:
    ids = [tokens_of(t) for t in TALKS]
    expected: list[list[int]] = []
    window: list[int] = []
    for one in ids:
        window += one
        if len(window) >= 64:
            expected.append(window[:64])
            window = []
    assert len(expected) > 3
    windows = chat_evaluation_windows(TALKS, TOKENIZER, seq_len=64)
    assert windows.tokens.tolist() == expected
    limited = chat_evaluation_windows(TALKS, TOKENIZER, seq_len=64, limit=2)
    assert limited.tokens.tolist() == expected[:2]
    # of tokens that nothing stands before, none is predicted
    assert windows.beginning.first_target == 1


def test_the_tokenizers_own_beginning_does_not_come_on_top() -> None:
    assert TOKENIZER("a")["input_ids"][0] == CHAT_BOS
    without = chat_tokenizer(CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    for tokenizer, count in ((TOKENIZER, 1), (without, 0)):
        windows = chat_evaluation_windows([talk("a" * 80)], tokenizer, seq_len=32)
        assert windows.tokens[0].tolist().count(CHAT_BOS) == count


def test_forms_of_the_file(tmp_path: Path) -> None:
    objects = write(tmp_path / "a.jsonl", [{"messages": t, "id": 1} for t in TALKS])
    lists = write(tmp_path / "b.JSONL", TALKS)
    lists.write_text("\n" + lists.read_text() + " \n\n")
    found = [
        chat_calibration_windows(source, TOKENIZER, samples=3, seq_len=64)
        for source in (objects, str(objects), lists, TALKS, [{"messages": t} for t in TALKS])
    ]
    assert len({windows.digest for windows in found}) == 1
    assert found[0].source == "a.jsonl"


GOOD = json.dumps(talk("hello"))
SHAREGPT = [{"from": "human", "value": "hello"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("3", "line 2: no list under 'messages'; give objects with messages"),
        ('{"text": "hello"}', "line 2: no list under 'messages'; give objects"),
        (
            json.dumps({"conversations": SHAREGPT}),
            "line 2: no list under 'messages'; call 'conversations' so, with role and content",
        ),
        (
            json.dumps(SHAREGPT),
            "line 2, message 1: has from and value; call them role and content, and say user for human",
        ),
        ("[]", "line 2: a conversation without messages"),
        ('["hello"]', "line 2, message 1: not an object with role and content"),
        ('[{"content": "hello"}]', "message 1: the role must be one of system, .*, not None"),
        (json.dumps([{"role": "human", "content": "x"}]), "message 1: the role must .* 'human'"),
        ('[{"role": [], "content": "x"}]', "message 1: the role must be one of"),
        ('[{"role": "user"}]', "line 2, message 1: no text under 'content'"),
        ('[{"role": "user", "content": null}]', "message 1: no text under 'content'"),
        (
            json.dumps([*talk("hello"), {"role": "assistant", "content": [{"type": "text"}]}]),
            "line 2, message 2: no text under 'content'; join its parts",
        ),
        (
            json.dumps(talk("hello")[:1] * 2),
            "line 2: the model's chat template refuses it .TemplateError: roles must alternate",
        ),
        ('[{"role": "system", "content": "x"}]', "line 2: the model's chat template refuses it"),
        (
            '[{"role": "user", "content": "\\ud800"}]',
            "line 2: not JSON .* is half of a surrogate pair",
        ),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(
        DataError, match=f"chats.jsonl, {message}" if "line" in message else message
    ):
        chat_calibration_windows(path, TOKENIZER, samples=1, seq_len=30)


def test_other_sources_are_refused(tmp_path: Path) -> None:
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


def test_templates_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"the tokenizer has no chat template: .* leave `chat` out"):
        chat_calibration_windows(TALKS, chat_tokenizer(None), samples=1, seq_len=30)
    with pytest.raises(DataError, match="need the model's tokenizer"):
        chat_evaluation_windows(TALKS, None, seq_len=30)
    several = chat_tokenizer(None)
    several.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    with pytest.raises(DataError, match=r"the tokenizer: .*multiple chat templates"):
        chat_evaluation_windows(TALKS, several, seq_len=30)
    several.chat_template = {"default": CHAT_TEMPLATE, "rag": "{{ nonsense() }}"}
    named = chat_evaluation_windows(TALKS, several, seq_len=30)
    assert named.digest == chat_evaluation_windows(TALKS, TOKENIZER, seq_len=30).digest


def test_templates_with_names_in_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a model in memory all are there; of a folder that by default, and the others are said to be missing.
    The card may be edited in both."""
    several = chat_tokenizer(None)
    several.chat_template = {"default": CHAT_TEMPLATE, "rag": "rag" + CHAT_TEMPLATE}
    dense = save(tiny("llama"), tmp_path / "dense")
    several.save_pretrained(dense)
    options: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1, "seq_len": 16}
    text = ["what is it that you say? " * 20]
    for name, model, tokenizer in (
        ("folder", dense, None),
        ("memory", AutoModelForCausalLM.from_pretrained(dense), several),
    ):
        prune_model(model, tokenizer, calibration=text, output=tmp_path / name, **options)
        with (tmp_path / name / "README.md").open("a") as card:
            card.write("more\n")
        verify_output(tmp_path / name)
    found = AutoTokenizer.from_pretrained(tmp_path / "memory").chat_template
    assert found == several.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "folder").chat_template == CHAT_TEMPLATE
    assert "additional_chat_templates: chat templates with names" in caplog.text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ open('/etc/passwd').read() }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('\x1b[31mred' + 'x' * 500) }}", r"TemplateError: \[31mredx{190,}\)$"),
    ],
)
def test_a_template_is_not_trusted(template: str, message: str) -> None:
    with pytest.raises(DataError, match=f"conversation 1: the model's chat template .*{message}"):
        chat_evaluation_windows(TALKS, chat_tokenizer(template), seq_len=30)


@pytest.mark.parametrize("before", ["", "\n", "  \n  ", "a\n"])
def test_windows_do_not_depend_on_the_day(before: str) -> None:
    """A template that writes today's date writes a fixed one, and all else as it would."""
    says = "{% if true %}\n  {{ 'Today: ' + strftime_now('%A, %d %B %Y, %Y-%m-%d, %d %b') }}\n{% endif %}x"
    fixed = "{% if true %}\n  {{ 'Today: Friday, 26 July 2024, 2024-07-26, 26 Jul' }}\n{% endif %}x"
    one, two = (
        chat_evaluation_windows(TALKS[:4], chat_tokenizer(before + template), seq_len=120)
        for template in (says, fixed)
    )
    assert one.digest == two.digest


def test_options_of_plain_text_are_refused_beside_it() -> None:
    for given_ in ({"bos": "always"}, {"bos": "never"}, {"text_field": "body"}):
        with pytest.raises(DataError, match=f"`{next(iter(given_))}` is of plain text"):
            PruneOptions(pattern=Unstructured(0.5), chat=True, **given_)


def test_a_file_of_messages_without_chat_says_what_to_do(tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", [{"messages": t} for t in TALKS])
    with pytest.raises(
        DataError, match="line 1: no text under 'text'; it has messages: give `chat`"
    ):
        open_job(tiny("llama"), chats, WalkOptions(), tokenizer=TOKENIZER)


def test_perplexity_of_chats() -> None:
    """By a plain forward pass over the windows."""
    model = tiny("llama")
    found = perplexity(model, TOKENIZER, text=TALKS, seq_len=48, windows=3, chat=True)
    windows = chat_evaluation_windows(TALKS, TOKENIZER, seq_len=48, limit=3)
    with torch.no_grad():
        logits = model(windows.tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.tokens[:, 1:].flatten())
    assert found.value == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found.beginning == "chats through the model's template"
    assert found.targets == 3 * 47


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tiny("llama"), tmp_path_factory.mktemp("dense") / "model")
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("chats") / "chats.jsonl", [{"messages": t} for t in TALKS])


SMALL = ("--samples", 4, "--seq-len", 48, "--min-tokens", 8)


def prune(dense: Path, text: Path, out: Path, *more: object) -> list[object]:
    return [
        "prune", dense, "--sparsity", 0.5, "--warm-start", "wanda", "--calibration", text,
        "--output", out, *SMALL, *more,
    ]  # fmt: skip


def test_prune_and_verify_from_the_command_line(dense: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run(*prune(dense, chats, out, "--chat", "--seed", 3))
    assert "calibrated on 4 windows of 48 tokens, chats through the model's template" in shown
    calibration = json.loads((out / MANIFEST).read_text())["fingerprint"]["calibration"]
    assert calibration["beginning"] == {"bos": "template", "ids": []}
    windows = chat_calibration_windows(chats, TOKENIZER, samples=4, seq_len=48, seed=3)
    assert calibration["sha256"] == windows.digest
    # the windows are made again, through the template of the original
    shown = run("verify", out, "--against", dense, "--calibration", chats)
    assert "errors (to 1e-05) and statuses of 21 layers (checked)" in shown
    # they may be given as they are, too
    assert len(verify_output(out, dense, calibration=windows.tokens).checked_layers) == 21
    np.save(tmp_path / "windows.npy", windows.tokens.numpy())
    npy = tmp_path / "windows.npy"
    assert len(verify_output(out, dense, calibration=npy).checked_layers) == 21
    # the result has the template, and is evaluated through it
    shown = run("eval", dense, out, "--text", chats, "--chat", "--seq-len", 48)
    assert "tokens from chats.jsonl, chats through the model's template" in shown


def test_other_chats_are_not_those_of_the_prune(dense: Path, chats: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("Pack my box with five dozen liquor jugs. " * 40)
    run(*prune(dense, chats, out, "--chat"))
    other = write(tmp_path / "other.jsonl", [talk("something else" * 4, "entirely")] * 8)
    said = run("verify", out, "--against", dense, "--calibration", other, fails=VerificationError)
    assert "is not what the model was calibrated on" in said
    said = run("verify", out, "--against", dense, "--calibration", text, fails=DataError)
    assert "text.txt: `chat` takes JSON lines of messages" in said
    for source, more in ((other, ["--chat"]), (text, []), (chats, ["--chat", "--seed", 1])):
        said = run(*prune(dense, source, out, "--resume", *more), fails=ModelError)
        assert "another run" in said
    run(*prune(dense, chats, out, "--chat", "--resume"))  # there is nothing left to do


def test_the_same_tokens_as_chats_and_as_tokens_are_two_runs(dense: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "samples": 4, "seq_len": 48}
    out = tmp_path / "out"
    prune_model(dense, calibration=TALKS, output=out, chat=True, **options)
    windows = chat_calibration_windows(TALKS, TOKENIZER, samples=4, seq_len=48)
    with pytest.raises(ModelError, match="another run"):
        prune_model(dense, windows.tokens, output=out, resume=True, **options)


def test_every_command_that_reads_text_takes_chats(
    dense: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(*prune(dense, chats, out, "--chat"))
    few = ("--calibration", chats, "--chat", "--samples", 4, "--seq-len", 48, "--include", "o_proj")
    half = ("--sparsity", 0.5)
    assert "o_proj" in run("certify", dense, out, *few, "--method", "box")
    assert "o_proj" in run("bound", dense, *few, *half, "--method", "box")
    assert "wanda" in run("compare", dense, *few, *half, "--solvers", "wanda")
    run("extract", dense, tmp_path / "layer.npz", *few[:-1], "layers.0.self_attn.o_proj", *half)
    assert (tmp_path / "layer.npz").exists()
    assert "memory" in run("plan", dense, *half, *few[:-2], "--solver", "wanda")
    said = run(
        "bound", dense, *few[2:], *half, "--calibration", tmp_path / "x.txt", fails=DataError
    )
    assert "--chat takes JSON lines" in said


def test_what_fails_leaves_nothing_behind(dense: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [talk("hello")[:1] * 2])
    said = run(*prune(dense, bad, tmp_path / "out", "--chat"), fails=MaskoptError)
    assert said.count("\n") == 0
    assert "bad.jsonl, line 1: the model's chat template refuses it" in said
    said = run(*prune(dense, bad, tmp_path / "out", "--chat", "--bos", "never"), fails=DataError)
    assert "--bos is of plain text; with --chat" in said
    assert not (tmp_path / "out").exists()


def test_a_panic_of_the_tokenizer_names_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As that of Rust libraries, which cannot be imported."""

    def panic(*_: object, **__: object) -> None:
        raise PanicException("no entry")

    tokenizer = chat_tokenizer()
    monkeypatch.setattr(tokenizer, "apply_chat_template", panic)
    with pytest.raises(DataError, match=r"tokenizer\.json: .* stopped on this file \(no entry\)"):
        chat_evaluation_windows(TALKS, tokenizer, seq_len=30)
