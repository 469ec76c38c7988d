"""A pruned folder without its zeros, and back; its mask file; its model card."""

import itertools
import json
import shutil
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from commands import run, shows
from forging import change_tensors, copied, edit, fails, flip, forge_manifest, list_file, shard_of
from huggingface_hub import ModelCard
from hypothesis import given, strategies as st
from prunes import but_slow, contents, prune, read_masks, smaller
from safetensors.torch import load_file
from tiny_models import save, save_with_own_code, tiny, tokens
from transformers import AutoModelForCausalLM

from maskopt import NM, load_packed
from maskopt.errors import ModelError, OptionError, VerificationError
from maskopt.models.checkpoints.checkpoint import open_safe, write_tensors
from maskopt.models.checkpoints.pack import pack, unpack_folder
from maskopt.models.checkpoints.result import TensorMask, join_masks, write_masks
from maskopt.models.checkpoints.schema import MANIFEST, MASKS
from maskopt.models.evaluation.bound import certify_model
from maskopt.models.pruning import run as running
from maskopt.models.pruning.card import hub_name, write_card
from maskopt.models.pruning.output import apply_masks, extract_masks
from maskopt.models.verification.verify import verify_model

HALF, WHOLE = torch.bfloat16, torch.float32
FIRST = [("llama", HALF), ("gpt2", WHOLE), ("gemma3", WHOLE), ("gpt_oss", HALF)]
EACH = itertools.product(("llama", "gpt2", "gemma3", "gpt_oss", "mixtral"), (HALF, WHOLE))
EVIL = [".bashrc", "evil.py", ".x.json", ".x.safetensors", "x.so", "Makefile", "autoexec.bat"]


def pruned(family, home, *, dtype=torch.float32, sparsity=0.5):
    dense = save(tiny(family, dtype=dtype), home / "dense", shard="30KB")
    (dense / "LICENSE").write_text("yours")
    return Path(prune(dense, home / "out", sparsity=sparsity).output)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("made")
    pack(pruned("llama", home), home / "packed")
    return home


@pytest.fixture
def out(made, tmp_path):
    return copied(made / "out", tmp_path)


@pytest.fixture
def packed(made, tmp_path):
    return Path(shutil.copytree(made / "packed", tmp_path / "packed"))


@pytest.mark.parametrize(("family", "dtype"), but_slow(FIRST, EACH))
def test_there_and_back_every_byte_is_the_same(family, dtype, tmp_path, monkeypatch):
    for module in ("checkpoint", "result"):  # tensors are cut in many places
        monkeypatch.setattr(f"maskopt.models.checkpoints.{module}.CHUNK", 64)
    out, packed = pruned(family, tmp_path, dtype=dtype), tmp_path / "packed"
    pack(out, packed)
    assert not list(packed.glob("*.safetensors"))
    found = load_packed(packed).state_dict()
    whole = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())
    unpack_folder(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    verify_model(tmp_path / "again", tmp_path / "dense")


def test_it_takes_what_is_kept_and_a_bit_a_weight(tmp_path):
    out, packed = pruned("llama", tmp_path, dtype=torch.bfloat16, sparsity=0.75), tmp_path / "p"
    assert "MB of" in run("masks", "pack", out, "--output", packed)
    shards = [*out.glob("model*.safetensors")]
    stored = [(n, t.numel()) for f in shards for n, t in load_file(f).items()]
    masked = sum(size for name, size in stored if "proj" in name)
    saved = sum(f.stat().st_size for f in shards)
    saved -= sum(f.stat().st_size for f in packed.glob("*.packed"))
    # headers are kept twice; the masks' bits lie in both folders
    assert saved == pytest.approx(2 * masked * 0.75, rel=0.25)
    assert "unpacked" in run("masks", "unpack", packed, "--output", tmp_path / "again")


def test_files_that_were_not_packed_are_refused(made, packed, tmp_path):
    file = next(f for f in packed.glob("*.packed") if any("~" in n for n in load_file(f)))
    sound, again, there = file.read_bytes(), tmp_path / "again", open_safe(file)
    flip(file)
    fails(ModelError, "does not give the file of the manifest", unpack_folder, packed, again)
    file.write_bytes(sound)
    not_packed = "is not what `maskopt masks pack` writes"
    for change, message in (
        (lambda t, name: t.update({name: t[name][:-1].clone()}), "holds another number of values"),
        (lambda t, name: t.update({name: t[name].repeat(2)}), "holds another number of values"),
        (lambda t, name: t.update({"~nothing": t.pop(name)}), "'nothing' has no mask"),
        (lambda t, name: t.update({"?other": t.pop(name)}), not_packed),
        (lambda t, name: t.clear(), not_packed),
    ):
        tensors = {name: there.read(name) for name in there.entries}
        change(tensors, next(n for n in tensors if n.startswith("~")))
        write_tensors(file, tensors, {"format": "maskopt-packed-1"})
        fails(ModelError, message, unpack_folder, packed, again)
        file.write_bytes(sound)
    assert not again.exists()
    # nor folders that are none
    (packed / "config.json").unlink()
    for write, folder, to, message in (
        (unpack_folder, made / "out", again, "no file that `maskopt masks pack` wrote"),
        (pack, made / "dense", again, "no such file"),
        (pack, made / "out", packed, "is not empty"),
        (unpack_folder, packed, again, "config.json is gone"),
    ):
        fails(ModelError, message, write, folder, to)


def test_what_was_added_since_comes_back_and_what_was_changed_is_refused(out, tmp_path):
    (out / "NOTICE").write_text("ours")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "vocab.bpe").write_text("a b")
    list_file(out, "vocab.bpe")  # every file of the manifest is packed
    packed = pack(out, tmp_path / "packed")
    unpack_folder(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    for name in ("generation_config.json", "maskopt-masks.bits"):
        for source, write in ((out, pack), (packed, unpack_folder)):
            flip(source / name)
            fails(ModelError, rf"{name} was changed since", write, source, tmp_path / "none")
            flip(source / name)
    (out / "vocab.bpe").unlink()
    fails(ModelError, r"vocab\.bpe is gone", pack, out, tmp_path / "none")
    (out / "vocab.bpe").write_text("a b")
    # what is not zero is not dropped
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(shard_of(out, name), lambda tensors: tensors[name].fill_(1.0))
    for message in ("was changed since, and could not be packed", "its mask prunes"):
        fails(ModelError, message, pack, out, tmp_path / "none")
        forge_manifest(out)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", EVIL)
def test_hidden_files_and_code_are_not_packed_and_not_unpacked(name, out, packed, tmp_path):
    (packed / name.replace(".safetensors", ".packed")).write_text("evil")
    said = f"lists '{name}', and packed folders hold no hidden"
    for folder, write in ((packed, unpack_folder), (out, pack)):
        (folder / name).write_text("evil")
        list_file(folder, name)
        fails(ModelError, said, write, folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_nothing_is_written_outside_the_output(packed, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "model.safetensors").write_text("of somebody")
    shutil.copy(next(packed.glob("*.packed")), tmp_path / "victim" / "model.packed")
    files = json.loads((packed / MANIFEST).read_text())["files"]
    digest = files.pop(next(name for name in files if name.endswith(".safetensors")))
    outside = r"../victim/model.safetensors C:x.json a\b.json /victim/model.safetensors .."
    for wrong in (*({**files, name: digest} for name in outside.split()), ["model.safetensors"]):
        forge_manifest(packed, edit("files", to=wrong))
        said = "`files` must have names without a path|the manifest is damaged"
        fails(ModelError, said, unpack_folder, packed, tmp_path / "again")
    assert (tmp_path / "victim" / "model.safetensors").read_text() == "of somebody"


# --- mask files
@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(0, 99), st.booleans())
def test_masks_come_back(shape, seed, last):
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    axis = len(shape) - (1 if last else 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_masks(path, {"a.weight": TensorMask(kept, axis), "b": TensorMask(~kept, axis)})
        back = read_masks(path)
    b = back["b"]
    assert torch.equal(back["a.weight"].kept, kept)
    assert torch.equal(b.kept, ~kept)
    assert (b.input_axis, b.rows().shape[1]) == (axis, shape[axis])


def test_masks_are_applied_and_extracted(dense_folder, pruned_folder, tmp_path, monkeypatch):
    apply_masks(dense_folder, pruned_folder / MASKS, tmp_path / "out")
    for shard in pruned_folder.glob("model*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    masks, path = pruned_folder / MASKS, tmp_path / "masks.bits"
    fails(ModelError, "not empty", apply_masks, dense_folder, masks, tmp_path / "out")
    assert len(extract_masks(pruned_folder, path)) == 21
    theirs = read_masks(path)
    for name, mask in read_masks(masks).items():
        assert torch.equal(mask.kept, theirs[name].kept)
        assert mask.input_axis == theirs[name].input_axis
    fails(OptionError, "`overwrite`", extract_masks, pruned_folder, path)
    extract_masks(pruned_folder, path, overwrite=True)
    refuse = Mock(side_effect=OSError(30, "Read-only file system"))
    said = "cannot be written: Read-only file system"
    with monkeypatch.context() as patch:
        patch.setattr("maskopt.core.files.tempfile.mkstemp", refuse)
        fails(ModelError, said, extract_masks, pruned_folder, tmp_path / "masks.safetensors")
    # masks that do not belong to the model
    other, small = save(tiny("gpt2"), tmp_path / "gpt2"), tmp_path / "m.safetensors"
    mask = TensorMask(torch.ones(2, 2, dtype=torch.bool), 1)
    write_masks(small, {"model.layers.0.mlp.up_proj.weight": mask})
    result = copied(pruned_folder, tmp_path / "changed")
    flip(result / MASKS, -10)
    for model, masks, message in (
        (other, pruned_folder / MASKS, "has no tensor"),
        (dense_folder, small, r"is \[2, 2\]"),
        (dense_folder, result / MASKS, "does not match its digest"),
    ):
        fails(ModelError, message, apply_masks, model, masks, tmp_path / "applied")
    assert not (tmp_path / "applied").exists()
    fails(VerificationError, "was changed", verify_model, result)
    write_masks(small, {"x": mask})
    fails(ModelError, "another part", join_masks, tmp_path / "b.safetensors", [small, small])


# --- cards
TAKEN_OVER = """license: other
license_name: mine
license_link: https://example.org/licence
language: [en, de]
pipeline_tag: text-generation
"""
CARD = f"""---
{TAKEN_OVER}base_model: someone/below
extra_gated_prompt: Say please
tags: [chat]
---
# The original

Its text.
"""
OURS = {"library_name": "transformers", "tags": ["maskopt", "pruned", "sparse"]}
CODE = "put those files next to it"


@pytest.fixture(scope="module")
def snapshot(dense_folder, tmp_path_factory):
    """A model with a card where the hub's cache would have it."""
    home = tmp_path_factory.mktemp("hub") / "models--owner--name" / "snapshots" / "0123"
    shutil.copytree(dense_folder, home)
    (home / "README.md").write_text(CARD)
    return home


@pytest.fixture(scope="module")
def report(snapshot, tmp_path_factory):
    return prune(snapshot, tmp_path_factory.mktemp("pruned") / "out")


@pytest.fixture
def carded(report, tmp_path):
    return copied(report.output, tmp_path)


def test_a_card_inherits_what_still_holds_and_keeps_the_original(snapshot, report, carded):
    card = ModelCard.load(carded / "README.md")
    assert card.data.to_dict() == {**yaml.safe_load(TAKEN_OVER), "base_model": "owner/name", **OURS}
    manifest = json.loads((carded / MANIFEST).read_text())
    fingerprint, again = manifest["fingerprint"], "$ maskopt prune MODEL"
    shows(card.text, "owner/name, pruned to 50% zeros by maskopt", "wanda pruned 50.0% of")
    shows(card.text, f"{again} --config FOLDER/{MANIFEST} --calibration TEXT")
    shows(card.text, "that of the original holds: mine", fingerprint["model"])
    assert fingerprint["calibration"]["sha256"] in card.text
    assert CODE not in card.text
    for folder in (snapshot.parents[2], Path(report.output).parent):  # are nobody's business
        assert str(folder) not in card.content
    assert (carded / "README-original.md").read_text() == CARD
    assert "README-original.md" in manifest["files"]
    verify_model(carded, snapshot)
    (carded / "README.md").write_text("Edited by hand.")
    verify_model(carded, snapshot)
    (carded / "README-original.md").write_text("Not the original's.")
    fails(VerificationError, r"README-original.md: was changed", verify_model, carded, snapshot)


def test_the_figures_are_those_of_the_report(snapshot, tmp_path):
    model = shutil.copytree(snapshot, tmp_path / "dense")
    how = {"sparsity": NM(keep=2, of=4), "solver": "swap", "holdout": 0.34}
    report = prune(model, tmp_path / "out", include="layers.0", **how)
    text = (tmp_path / "out" / "README.md").read_text()
    for name in ("relative", "relative_held"):
        mean = sum(getattr(layer, name) for layer in report.layers) / len(report.layers)
        assert f"| {mean:.4g} |" in text
    assert "| 100% |" in text  # of the rows are proven
    assert "# dense, pruned to 2:4 by maskopt" in text
    assert "base_model: someone/below" in text  # of a folder without a name, its own card's


def test_every_card_outlives_packs_prunes_and_stops(snapshot, carded, tmp_path, monkeypatch):
    packed, twice = pack(carded, tmp_path / "packed"), tmp_path / "twice"
    assert (packed / "README.md").read_bytes() == (carded / "README.md").read_bytes()
    unpack_folder(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(carded)
    smaller(snapshot, first := tmp_path / "first", count=1)
    prune(first, twice)
    assert (twice / "README-original.md").read_text() == CARD
    assert (twice / "README-original-2.md").read_bytes() == (first / "README.md").read_bytes()
    verify_model(twice, first)
    fails(ModelError, "was pruned by maskopt already", prune, carded, tmp_path / "third")
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(running, "write_manifest", Mock(side_effect=KeyboardInterrupt))
        fails(KeyboardInterrupt, None, prune, snapshot, stopped)
    staging = next(path.parent for path in stopped.rglob("README-original.md"))
    assert (staging / "README.md").exists()
    prune(snapshot, stopped, resume=True)
    assert contents(stopped) == contents(carded)


UNUSABLE = [
    *(None, b"no metadata", b"\xff\xfe\x00", b"---\n- a\n- list\n---\n", b"---\nlicense: [\n---\n"),
    b"---\nlicense: " + b"m" * 500 + b"\n---\n",
    b"---\nlicense_name: 'mine\n\n  # of all others'\n---\n",
    b"---\nlicense: {a: 1}\nlanguage: [1, 2]\nbase_model: 3\n---\n",
    b"---\nlicense: mit\n---\n" + b"x" * 2**20,
    b"---\neval_results: 7\nmodel-index: [{results: broken}]\n---\n",
]
LICENSED = b"---\nlicense: [mit, apache-2.0]\n---\n"


@pytest.mark.parametrize("card", [*UNUSABLE, LICENSED])
def test_of_an_unusable_card_nothing_is_taken_over(card, snapshot, report, tmp_path):
    shutil.copy(snapshot / "config.json", tmp_path)
    there = [] if card is None else ["README.md"]
    if there:
        (tmp_path / "README.md").write_bytes(card)
    files = write_card(tmp_path, report, None, "dense", ["LICENSE", *there])
    ours = ModelCard.load(tmp_path / "README.md")
    licences, said = {}, "its card names none"
    if card is LICENSED:
        licences = {"license": ["mit", "apache-2.0"]}
        said = "that of the original holds: mit, apache-2.0."
    assert ours.data.to_dict() == licences | OURS
    assert said in ours.text
    assert files == ["LICENSE", *(["README-original.md"] if there else [])]
    if there:
        assert (tmp_path / "README-original.md").read_bytes() == card


def test_an_unreadable_card_does_not_stop_a_prune_but_a_link_does(dense_folder, snapshot, tmp_path):
    model, out = Path(shutil.copytree(dense_folder, tmp_path / "dense")), tmp_path / "out"
    (model / "README.md").symlink_to(snapshot / "README.md")
    fails(ModelError, r"README\.md: is a link out of the model folder", prune, model, out)
    assert not out.exists()
    (model / "README.md").unlink()
    (model / "README.md").write_bytes(b"\xff\xfe\x00")
    prune(model, out)
    assert ModelCard.load(out / "README.md").data.to_dict() == OURS
    verify_model(out, model)


def test_cards_of_models_with_code_of_their_own(tmp_path):
    for path in ("/x/models--google--gemma-3-270m/snapshots/abc", "google/gemma-3-270m"):
        assert hub_name(path) == "google/gemma-3-270m"
    for path in ("/home/me/x", "./me/x", "", "a/b/c", "/x/models--alone/snapshots/abc"):
        assert hub_name(path) is None
    # code is not copied
    dense, out = save_with_own_code(tmp_path / "dense"), tmp_path / "own"
    prune(dense, out, trust_remote_code=True)
    assert CODE in (out / "README.md").read_text()
    shutil.copy(dense / "modeling_own.py", out)
    how = {"method": "box", "rows_per_layer": 1, "trust_remote_code": True}
    assert certify_model(dense, out, calibration=tokens(), **how)
