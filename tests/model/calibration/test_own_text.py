"""Text that the model writes itself, and mixtures of sources."""

import pytest
import torch
from commands import run
from forging import fails
from prunes import WANDA, Stop, contents, manifest_of
from tiny_models import chat_tokenizer, loud, save

from maskopt import prune_model
from maskopt.cli.command import text_of
from maskopt.errors import DataError, OptionError, VerificationError
from maskopt.models.architecture.source import Source
from maskopt.models.blockwise import job
from maskopt.models.calibration.generation import sampled, write_windows
from maskopt.models.calibration.mixture import mixed, window_counts
from maskopt.models.calibration.tokens import Windows, check_shares
from maskopt.models.checkpoints.result import read_windows
from maskopt.models.checkpoints.schema import WRITTEN
from maskopt.models.evaluation.bound import certify_model
from maskopt.models.pruning.gram_store import collect_grams, open_store
from maskopt.models.verification.verify import verify_model

SIZE = {"samples": 8, "seq_len": 16}
HOW = {**WANDA, **SIZE}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = save(loud("llama"), tmp_path_factory.mktemp("dense"))
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def writes(monkeypatch):
    """The calls in which a model writes."""
    calls = []

    def counted(*given, **how):
        calls.append(how)
        return write_windows(*given, **how)

    monkeypatch.setattr(job, "write_windows", counted)
    return calls


def test_tokens_are_drawn_by_their_probabilities():
    scores = torch.randn(1, 1300).mul(2).log_softmax(1)
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = sampled(scores.expand(20_000, -1), draws)
    assert bool((drawn.diff() >= 0).all())
    shares = torch.bincount(drawn, minlength=1300) / 20_000
    assert float((shares - scores[0].exp()).abs().max()) < 1.5 / 20_000
    banned = scores.clone()
    banned[:, :512] = -torch.inf
    assert int(sampled(banned, torch.zeros(1, dtype=torch.float64))) >= 512


def test_a_model_writes_the_same_windows_for_the_same_seed():
    tokenizer, model = chat_tokenizer(), loud("llama")
    how = {"samples": 3, "seq_len": 12}
    one, two, other = (
        write_windows(Source(model), tokenizer, seed=seed, **how) for seed in (0, 0, 1)
    )
    assert one.digest == two.digest != other.digest
    assert one.tokens.shape == (3, 12)
    assert set(one.tokens[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert not set(one.tokens[:, 1:].flatten().tolist()) & set(tokenizer.all_special_ids)
    bare = write_windows(Source(model), tokenizer, seed=0, bos="never", **how)
    assert torch.equal(bare.tokens[:, :11], one.tokens[:, 1:])
    chat = write_windows(Source(model), tokenizer, seed=0, chat=True, **how)
    turn = [tokenizer.bos_token_id, *tokenizer("<user>")["input_ids"][1:]]
    assert chat.tokens[0, : len(turn)].tolist() == turn
    fails(
        DataError, "needs the model's tokenizer", write_windows, Source(model), None, seed=0, **how
    )
    fails(
        DataError, "no room", write_windows, Source(model), tokenizer, samples=1, seq_len=1, seed=0
    )


def test_shares_and_their_windows():
    assert check_shares({"a": None, "b": None}) == {"a": 0.5, "b": 0.5}
    assert check_shares({"a": 0.6, "b": None, "c": None}) == {"a": 0.6, "b": 0.2, "c": 0.2}
    for wrong in ({}, {"a": 0.5}, {"a": 1.0, "b": None}, {"a": 0.7, "b": 0.7}):
        fails(DataError, "must sum to 1", check_shares, wrong)
    for wrong in (0, -0.5, 1.5, True, "half"):
        fails(DataError, r"must be in \(0, 1\]", check_shares, {"a": wrong})
    assert window_counts([0.5, 0.5], 9) == [5, 4]
    assert window_counts([0.1, 0.7, 0.2], 10) == [1, 7, 2]
    fails(DataError, "too few", window_counts, [0.1, 0.9], 2)
    parts = [Windows(torch.full((n, 2), n), f"{n}") for n in (6, 3)]
    both = mixed(parts)
    assert both.tokens[:, 0].tolist() == [6, 3, 6, 6, 3, 6, 6, 3, 6]
    assert both.source == "6 of 6 + 3 of 3"
    fails(DataError, "one length", mixed, [*parts, Windows(torch.zeros(1, 3), "x")])
    assert text_of(["a.txt"]) == "a.txt"
    assert text_of(["a.txt", "self=0.5"]) == {"a.txt": None, "self": 0.5}


def test_a_prune_without_text_is_written_verified_bounded_and_repeated(dense, tmp_path, writes):
    prune_model(dense, output=tmp_path / "out", **HOW)
    assert len(writes) == 1
    said = manifest_of(tmp_path / "out")
    assert said["fingerprint"]["calibration"]["source"] == "self"
    assert WRITTEN in said["files"]
    kept = read_windows(tmp_path / "out", "calibration")
    assert Windows(kept.long(), "").digest == said["fingerprint"]["calibration"]["sha256"]
    assert verify_model(tmp_path / "out", dense, calibration="self").checked_layers
    assert certify_model(dense, tmp_path / "out", calibration="self", rows_per_layer=1)
    again = prune_model(dense, output=tmp_path / "out", resume=True, **HOW)
    assert again.fingerprint == said["fingerprint"]
    assert len(writes) == 1
    run("verify", tmp_path / "out", "--original", dense, "--calibration", "self")
    run("prune", dense, "--sparsity", 0.5, "--solver", "wanda", "--min-tokens", 1, "--samples", 8,
        "--seq-len", 16, "--output", tmp_path / "two")  # fmt: skip
    one, two = (contents(tmp_path / name) for name in ("out", "two"))
    assert one == two
    (tmp_path / "out" / WRITTEN).write_bytes(b"\0" * 9)
    fails(VerificationError, "digest is another one", verify_model, tmp_path / "out", dense)


def test_a_mixture_takes_exact_shares_and_goes_on_after_an_end(dense, tmp_path, writes):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 30)
    text = {str(tmp_path / "text.txt"): None, "self": 0.25}
    prune_model(dense, output=tmp_path / "whole", calibration=text, **HOW)
    source = manifest_of(tmp_path / "whole")["fingerprint"]["calibration"]["source"]
    assert source == "6 of text.txt + 2 of self"

    def stop(event):
        if (event.block, event.stage) == (1, "solve") and event.done:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        prune_model(dense, output=out, calibration=text, on_progress=stop, **HOW)
    before = len(writes)
    prune_model(dense, output=out, calibration=text, resume=True, **HOW)
    assert len(writes) == before == 2
    assert contents(out) == contents(tmp_path / "whole")
    assert verify_model(out, dense, calibration=text).checked_layers
    alone = str(tmp_path / "text.txt")
    fails(VerificationError, "not what the model", verify_model, out, dense, calibration=alone)


def test_stored_gram_matrices_keep_their_text(dense, tmp_path, writes):
    collect_grams(dense, output=tmp_path / "grams", calibration="self", **SIZE)
    open_store(dense, tmp_path / "grams", "self", SIZE)
    assert len(writes) == 1
    prune_model(dense, grams=tmp_path / "grams", output=tmp_path / "out", **WANDA)


def test_what_cannot_be_written_is_refused(dense, tmp_path, writes):
    out = tmp_path / "out"
    for text in ({"self": 0.5}, {"self": 2.0}):
        fails(DataError, "share", prune_model, dense, output=out, calibration=text, **HOW)
    fails(OptionError, "samples", prune_model, dense, output=out, **{**HOW, "samples": 0})
    assert not writes
