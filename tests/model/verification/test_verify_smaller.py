"""Folders of smaller models that say of themselves what is not so, every digest being right."""

import functools
import json

import pytest
from forging import (
    change_tensors,
    copied,
    edit,
    fails,
    forge_manifest,
    redraw,
    says,
    shard_of,
    signed,
)
from safetensors.torch import load_file
from tiny_models import edit_json, save, tiny, tokens

from maskopt import remove_blocks, remove_experts, shrink_model
from maskopt.errors import ModelError, VerificationError
from maskopt.models.checkpoints.workspace import MANIFEST
from maskopt.models.structured import blocks as removal
from maskopt.models.verification.verify import verify_model

CHANNELS = {"channels": 0.25, "solver": "wanda"}


def without_first(dense, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "choose", lambda *_: {frozenset({0}): 0.0})
        remove_blocks(dense, tokens(2), count=1, output=out, windows=1)


def by_pattern(dense, out):
    """The original leaves the list of its layers' types to transformers."""
    edit_json(dense / "config.json", lambda c: c.update(sliding_window_pattern=2))
    edit_json(dense / "config.json", lambda c: c.pop("layer_types"))
    without_first(dense, out)


def shrunk(**options):
    return lambda dense, out: shrink_model(dense, tokens(6), output=out, **options)


def fewer_experts(share):
    return lambda dense, out: remove_experts(dense, tokens(6), share=share, output=out)


#: name → (family, size of a shard, how it was made smaller)
MADE = {
    "narrow": ("llama", "30KB", shrunk(channels=0.25)),
    "mistral": ("mistral", "5GB", shrunk(**CHANNELS, heads=0.5, update="none")),
    "shallow": ("gemma3", "5GB", without_first),
    "by pattern": ("gemma3", "5GB", by_pattern),
    "blocks": ("llama", "5GB", without_first),
    "experts": ("mixtral", "30KB", fewer_experts(0.5)),
    "gpt_oss": ("gpt_oss", "5GB", fewer_experts(0.25)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Smaller models with their originals, by name; nobody may change them."""
    home = tmp_path_factory.mktemp("smaller")

    @functools.cache
    def pair(name):
        family, shard, make = MADE[name]
        dense, out = save(tiny(family), home / name / "dense", shard=shard), home / name / "out"
        make(dense, out)
        verify_model(out, dense)
        return dense, out

    return pair


def record_of(out):
    return json.loads((out / MANIFEST).read_text())["shrunk"]


def shrunk_says(*path, to):
    return says(edit("shrunk", *path, to=to))


def lacks(*path):
    *path, last = path
    return says(edit("shrunk", *path, to=lambda x: x.pop(last) and x))


def settings(**changes):
    def forge(out, _):
        edit_json(out / "config.json", lambda c: c.update(changes))
        forge_manifest(out, lambda m: m["shrunk"]["settings"].update(changes))

    return forge


DOWN = "model.layers.{}.mlp.down_proj"
UP, GATE = (f"model.layers.0.mlp.{x}_proj.weight" for x in ("up", "gate"))
K, V = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
NORM, ROUTER = "model.norm.weight", "model.layers.0.mlp.router.weight"


def exchange(out, _):
    """Two tensors of one shape, and what the manifest says that they were called."""

    names = record_of(out).get("names", {})
    names |= {K: names.get(V, V), V: names.get(K, K)}
    change_tensors(out / "model.safetensors", lambda t: t.update({K: t[V], V: t[K]}))
    forge_manifest(out, lambda m: m["shrunk"].update(names=names))


def cut_by(tensor, by):
    def forge(out, dense):
        cut = load_file(dense / "model.safetensors")[tensor][record_of(out)["kept"][by]]
        change_tensors(out / "model.safetensors", lambda t: t.update({tensor: cut}))
        forge_manifest(out, edit("shrunk", "tensors", tensor, 0, "by", to=by))

    return forge


def refitted(tensor):
    def forge(out, _):
        redraw(out, tensor)
        forge_manifest(out, edit("shrunk", "set_anew", to=[tensor]))

    return forge


def one_more(tensor):
    add = lambda tensors: tensors[tensor].view(-1)[0].add_(1)  # noqa: E731
    return lambda out, _: change_tensors(shard_of(out, tensor), add)


def other_channels(out, _):
    kept = record_of(out)["kept"][DOWN.format(1)]
    gone = next(i for i in range(48) if i not in kept)
    forge_manifest(out, edit("shrunk", "kept", DOWN.format(1), to=sorted({*kept[1:], gone})))


def first_experts(out, _):
    kept = record_of(out)["kept"]
    assert kept[min(kept)] != [0, 1]
    forge_manifest(out, edit("shrunk", "kept", min(kept), to=[0, 1]))


def expert_gone(manifest):
    names = manifest["shrunk"]["names"]
    manifest["shrunk"]["gone"].append(names.pop(max(names)))


NOTHING = [{"axis": 0, "by": DOWN.format(0), "parts": [[48, 1]]}]
SLIDING, FULL = "sliding_attention", "full_attention"
TYPES = (
    "types of blocks",
    settings(layer_types=[SLIDING, FULL]),
    "layer_types is not the original's",
)
EXCHANGED = ("exchanged", exchange, "is not where the kept blocks")
SIZE, REFITTED = "is no size", "or not, unlike a least-squares update"
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
EXPERTS = "model.layers.1.mlp.experts"
#: smaller model → name, how to forge, what is said
FORGED = {
    "narrow": [
        ("a channel that is not there", shrunk_says("kept", DOWN.format(0), 0, to=40), "damaged"),
        ("a channel less", lacks("kept", DOWN.format(0), -1), "leaves"),
        ("other channels", other_channels, "is not the original's, cut as"),
        ("no cut", lacks("tensors", UP), "shape"),
        ("another size", shrunk_says("settings", "intermediate_size", to=37), "is not the 37"),
        ("no size", lacks("settings", "intermediate_size"), "in more than the sizes"),
        ("nothing kept", says(lambda m: m["shrunk"].pop("kept")), "damaged"),
        ("another model", says(edit("fingerprint", "model", to="0")), "another model"),
        ("parts", shrunk_says("tensors", UP, 0, "parts", 0, to=[36, 1]), "than it is long|damaged"),
        ("a norm refitted", says(lambda m: m["shrunk"]["set_anew"].append(NORM)), "damaged"),
        ("a cut of nothing", shrunk_says("tensors", "no", to=NOTHING), "not there"),
        ("one more in a layer", one_more(UP), "is not the original's"),
        ("one more in a norm", one_more(NORM), "is not the original's"),
    ],
    "mistral": [
        ("window", settings(sliding_window=1), "sliding_window is no size of what was removed"),
        ("list", settings(mlp_only_layers=[0]), f"mlp_only_layers {SIZE}"),
        ("blocks", settings(num_hidden_layers=2), f"num_hidden_layers {SIZE}"),
        ("epsilon", settings(rms_norm_eps=100), "rms_norm_eps"),
        ("channels", settings(intermediate_size=20), "intermediate_size is not the original's .* 36"),
        ("as many columns of other heads", settings(**HEADS), "is not the original's"),
        EXCHANGED,
        ("of another block", cut_by(UP, DOWN.format(1)), "up_proj.* is not cut as what was removed asks"),
        *(
            (x, shrunk_says("kept", f"model.layers.0.{x}", to=[0]), "takes channels or heads")
            for x in ("self_attn.dense", "self_attn.q_proj", "mlp.up_proj")
        ),
        # refitting sets those of all blocks, and of what takes the channels alone
        ("refitted what gives channels", refitted(GATE), REFITTED),
        ("refitted in one block", refitted(DOWN.format(0) + ".weight"), REFITTED),
    ],
    "shallow": [
        ("window", settings(sliding_window=1), f"sliding_window {SIZE}"),
        TYPES,
        (
            "fewer blocks", settings(num_hidden_layers=1, layer_types=[FULL]),
            "num_hidden_layers is not the original's",
        ),
        EXCHANGED,
    ],
    "by pattern": [TYPES],
    "blocks": [
        ("another block", shrunk_says("blocks", 0, to=2), "is of no removed block|not the original's"),
        ("a tensor not gone", lacks("gone", -1), "in only one of the two"),
        ("no names", shrunk_says("names", to={}), "in only one of the two|twice"),
        ("another count", shrunk_says("settings", "num_hidden_layers", to=1), "is not the 1"),
        ("no settings", shrunk_says("settings", to={}), "in more than the sizes"),
    ],
    "experts": [
        ("an expert gone", says(expert_gone), "only one of|where the kept"),
        ("the first experts", first_experts, "where the kept|cut as"),
        ("no experts", says(lambda m: m["shrunk"].pop("experts")), "no removed block or expert"),
        ("another number", shrunk_says("settings", "num_local_experts", to=3), "is not the 3"),
    ],
    "gpt_oss": [
        ("of another block", cut_by(ROUTER, EXPERTS), "router.* is not cut as what was removed"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("of", "forge", "said"),
    [pytest.param(of, *x[1:], id=f"{of}-{x[0]}") for of, rows in FORGED.items() for x in rows],
)
def test_a_forged_smaller_model_is_refused(of, forge, said, models, tmp_path):
    dense, out = models(of)[0], copied(models(of)[1], tmp_path)
    forge(out, dense)
    forge_manifest(out)
    fails(VerificationError, said, verify_model, out, dense)


def test_what_the_folder_alone_shows(models, tmp_path):
    out = copied(models("mistral")[1], tmp_path / "shape")
    settings(intermediate_size=20)(out, out)
    forge_manifest(out)
    fails(VerificationError, r"in the shards, .* by config\.json", verify_model, out)
    out = copied(models("narrow")[1], tmp_path / "digest")
    edit_json(out / MANIFEST, edit("files", "config.json", to="0" * 64))
    edit_json(out / MANIFEST, lambda m: m.update(signed(m)))
    fails(VerificationError, "was changed", verify_model, out, models("narrow")[0])


def test_a_link_out_of_the_original_is_no_file_of_it(tmp_path):
    """No run copies it, and none begins with it there."""
    dense = save(tiny("llama"), tmp_path / "dense")
    (tmp_path / "vocab.txt").write_text("elsewhere")
    (dense / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    with pytest.raises(ModelError, match=r"vocab\.txt: is a link out of the model folder"):
        shrink_model(dense, tokens(6), output=tmp_path / "out", **CHANNELS)
    assert not (tmp_path / "out").exists()
    (dense / "vocab.txt").unlink()
    shrink_model(dense, tokens(6), output=tmp_path / "out", **CHANNELS)
    (dense / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    assert "other tensors" in verify_model(tmp_path / "out", dense).checked
