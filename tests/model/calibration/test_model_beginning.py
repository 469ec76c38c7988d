"""What windows begin with: what the tokenizer puts before a text, counted as nobody's target."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, chat_tokenizer, save, save_tokenizer, tiny
from tokenizers import processors

from maskopt import open_job
from maskopt.errors import DataError
from maskopt.model.beginning import Beginning, beginning_of
from maskopt.model.tokens import calibration_windows, evaluation_windows, token_windows
from maskopt.model.walk_options import WalkOptions

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
def test_bad_input_gets_one_line(tokenizer, bos, message):
    with pytest.raises(DataError, match=message):
        calibration_windows([TEXT], tokenizer, samples=2, seq_len=8, bos=bos)
    with pytest.raises(DataError, match=message):
        evaluation_windows([TEXT], tokenizer, seq_len=8, bos=bos)


@given(
    st.sampled_from([LLAMA, CLOSING, QWEN, GPT2, OPT, AROUND, TWO]),
    st.integers(3, 20),
    st.integers(0, 50),
)
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


def test_tokens_that_are_given_have_no_beginning():
    windows = token_windows(torch.ones(2, 5, dtype=torch.long), "mine")
    assert str(windows.beginning) == "as given"
    assert windows.take([1]).beginning == windows.beginning


def test_no_room_is_refused():
    with pytest.raises(DataError, match="no room"):
        calibration_windows([TEXT], TWO, samples=1, seq_len=2)


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_a_beginning_that_the_model_does_not_know(bos):
    """In the tokenizer's vocabulary, and not in the model's: as after adding tokens without resizing."""
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<added>"})
    assert tokenizer.bos_token_id == VOCABULARY == len(tokenizer) - 1
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<added> $A", special_tokens=[("<added>", VOCABULARY)]
    )
    options = WalkOptions(samples=2, seq_len=8, bos=bos)
    if bos == "never":
        job = open_job(tiny("llama"), [TEXT], options, tokenizer=tokenizer)
        assert int(job.windows.tokens.max()) < VOCABULARY
        return
    message = "token id 96 does not exist in the model's vocabulary of 96"
    with pytest.raises(DataError, match=message):
        open_job(tiny("llama"), [TEXT], options, tokenizer=tokenizer)


def test_a_tokenizer_on_disk_without_a_beginning(tmp_path):
    model = save(tiny("llama"), tmp_path / "model")
    save_tokenizer(model)
    options = WalkOptions(samples=2, seq_len=8)
    windows = open_job(model, [TEXT], options).windows
    assert str(windows.beginning) == "without a beginning token"
    assert int(windows.tokens.min()) >= ord("a") - 31
    with pytest.raises(DataError, match="no beginning-of-sequence token; use `bos` auto or never"):
        open_job(model, [TEXT], dataclasses.replace(options, bos="always"))
