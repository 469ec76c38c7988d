"""Forgeries of pruned and smaller folders that `maskopt verify` refuses, with right digests all."""

import copy
import json
import os
import random
import re
import shutil
from dataclasses import replace
from functools import cache, partial

import forging
import pytest
import torch
from forging import change_tensors, config, edit, fails, forge_manifest, options, says, shards
from prunes import prune, slow, smaller
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, loud, save, tiny, tiny_vision, tokens

from maskopt.errors import ModelError, VerificationError
from maskopt.models.checkpoints.checkpoint import open_safe
from maskopt.models.checkpoints.result import TensorMask
from maskopt.models.checkpoints.schema import INDEX, MANIFEST, MASKS, read_manifest
from maskopt.models.structured import blocks as removal
from maskopt.models.training import tasks as reconstruct
from maskopt.models.verification.verify import verify_model

TRAIN = {"epochs": 2, "learning_rate": 0.003, "train": "all"}
NARROW = {"channels": 0.25, "heads": 0.5, "solver": "wanda", "update": "none"}
REMOVED = "fingerprint", "options", "removed", 0
DOWN = "model.layers.{}.mlp.down_proj"
UP, GATE = (f"model.layers.0.mlp.{x}_proj.weight" for x in ("up", "gate"))
K, V = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
NORM, ROUTER = "model.norm.weight", "model.layers.0.mlp.router.weight"


def without_first(dense, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "choose", lambda *_: {frozenset({0}): 0.0})
        smaller(dense, out, tokens(2), count=1, windows=1)


def by_pattern(dense, out):
    """The original leaves the list of its layers' types to transformers."""
    edit_json(dense / "config.json", lambda c: c.update(sliding_window_pattern=2))
    edit_json(dense / "config.json", lambda c: c.pop("layer_types"))
    without_first(dense, out)


def train_others(dense, out):
    """The first and the last of three blocks are trained, with their norms; the second stays."""
    real, blocks = reconstruct.train, iter(range(3))

    def train(task, *rest):
        options = task.options
        if next(blocks) == 1:
            options = replace(options, learning_rate=0.0)
        return real(replace(task, options=options), *rest)

    more = {"training": TRAIN, "update": "blockwise", "holdout": 0.25}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "train", train)
        report = prune(dense, out, tokens(8), **more)
    assert [bool(block.epoch) for block in report.trained] == [True, False, True]


ALL = {"update": "blockwise", "training": {"epochs": 1, "train": "all"}, "holdout": 0.34}
SMALL, SWAPPED = partial(tiny, "llama", layers=2), {"solver": "swap", "sensitivity": "uniform"}
#: name → (family or what makes the model, size of a shard, what is made of it)
MADE = {
    "refitted": ("llama", "30KB", partial(prune, update="least-squares", include=["v_proj"])),
    "trained": (partial(loud, "qwen3"), "5GB", train_others),
    "vision": (tiny_vision, "5GB", partial(prune, **ALL)),
    "rows": (SMALL, "30KB", partial(prune, **SWAPPED, allocation="rows", max_deviation=1)),
    "layers": (SMALL, "30KB", partial(prune, solver="swap", allocation="layers")),
    "both": (SMALL, "30KB", partial(prune, **SWAPPED, allocation="both", max_deviation=0.1)),
    "narrow": ("llama", "30KB", partial(smaller, channels=0.25)),
    "mistral": ("mistral", "5GB", partial(smaller, **NARROW)),
    "shallow": ("gemma3", "5GB", without_first),
    "by pattern": ("gemma3", "5GB", by_pattern),
    "blocks": ("llama", "5GB", without_first),
    "experts": ("mixtral", "30KB", partial(smaller, share=0.5)),
    "gpt_oss": ("gpt_oss", "5GB", partial(smaller, share=0.25)),
}


@pytest.fixture(scope="module")
def folders(dense_folder, pruned_folder, dense, tmp_path_factory):
    """Pruned folders with their originals, by name; nobody may change them."""
    home = tmp_path_factory.mktemp("folders")

    @cache
    def folder(name):
        original, out = dense_folder, home / name
        if name == "pruned":
            out = pruned_folder
        elif name == "tokenizer":
            prune(original := dense, out)
        else:
            of, shard, make = MADE[name]
            model = of() if callable(of) else tiny(of)
            make(original := save(model, home / f"{name} of", shard=shard), out)
        verify_model(out, original)
        return out, original

    return folder


# --- what a loader could take
PLANTED = [
    "pytorch_model.bin", "adapter_model.bin", "adapter_model.safetensors", "adapter_config.json",
    "modeling_own.py", "generate.py", "MODEL.SAFETENSORS", "model.Safetensors",
    "consolidated.safetensors", "model.gguf", "model.pt", "model.pth", "model.ckpt", "tf_model.h5",
    "flax_model.msgpack", "model.onnx", "pytorch_model.bin.index.json", "weights.npz", "w.pkl",
    "lib.so", "sub/model.safetensors", ".hidden/model.safetensors", "sub/modeling_own.py",
    "custom_generate/generate.py", "model.fp16.safetensors", "noending", "LICENSE.py", "NOTICE.bin",
    "README.safetensors",
]  # fmt: skip


def planted(name, listed):
    def plant(result, _):
        path = result / name
        path.parent.mkdir(exist_ok=True)
        weights = forging.first_weight_shard(result).read_bytes()
        path.write_bytes(weights if "safet" in name else b"{}")
        if listed:
            forging.list_file(result, name)

    return plant, rf"(?=.*(loader|is not there)).*{re.escape(name.split('/')[0])}"


def link_out(name, to="../elsewhere"):
    def link(result, _):
        elsewhere = result / to
        elsewhere.parent.mkdir(exist_ok=True)
        elsewhere.mkdir() if name == "sub" else shutil.move(result / name, elsewhere)
        (result / name).symlink_to(elsewhere)

    return link, "link|loader"


# --- what the files say
def in_subfolder(result, dense):
    """The index names a file in a subfolder; one of that name lies in the folder itself."""
    name = forging.first_weight_shard(result).name
    (result / "sub").mkdir()
    shutil.copy(dense / name, result / "sub" / name)
    lead = lambda where: {k: f"sub/{v}" if v == name else v for k, v in where.items()}  # noqa: E731
    edit_json(result / INDEX, edit("weight_map", to=lead))


def index_of_a_single_file(result, _):
    tensors, name = {}, "model.safetensors"
    for path in shards(result):
        change_tensors(path, tensors.update)
        path.unlink()
    save_file(tensors, result / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
    edit_json(result / INDEX, lambda i: i.update(index))
    forge_manifest(result, lambda m: [m["files"].pop(x) for x in [*m["files"]] if "model-" in x])
    forging.list_file(result, name)


def twice(result, _):
    """A pruned tensor's dense original in a second shard, which transformers reads last."""
    name = min(json.loads((result / INDEX).read_text())["weight_map"])
    other = next(p for p in reversed(shards(result)) if p != forging.shard_of(result, name))
    change_tensors(other, lambda t: t.update({name: torch.ones(3)}))


def renamed_tensor(result, _):
    where = json.loads((result / INDEX).read_text())["weight_map"]
    name = next(n for n in where if "proj" in n)
    change_tensors(result / where[name], lambda t: t.update({"other." + name: t.pop(name)}))
    where["other." + name] = where.pop(name)
    edit_json(result / INDEX, edit("weight_map", to=where))


def masks(change):
    return lambda result, _: forging.change_masks(result, change)


def transpose(masks):
    """The first mask that is no square counts its outputs as inputs."""
    name = next(n for n, mask in masks.items() if len({*mask.kept.shape}) > 1)
    masks[name] = replace(masks[name], input_axis=0)


def nothing_pruned(result, dense):
    forging.prune_by(result, dense, lambda _, kept: torch.ones_like(kept))


def no_masks(result, dense):
    nothing_pruned(result, dense)
    forging.change_masks(result, dict.clear)
    forge_manifest(result, lambda m: m.update(layers=[], sparsity=0.0))


def pattern_of_nothing(result, dense):
    nothing_pruned(result, dense)
    forge_manifest(result, pattern_of_all("0", pruned=0, sparsity=0.0, error=0.0))
    forge_manifest(result, edit("sparsity", to=0.0))


def pattern_of_all(pattern, **more):
    def change(manifest):
        manifest["fingerprint"]["options"]["sparsity"] = pattern
        every_layer(pattern=pattern, **more)(manifest)

    return change


def layer_left_out(result, dense):
    name = "model.layers.1.mlp.up_proj"
    tensor = name + ".weight"
    forging.change_masks(result, lambda m: m.pop(tensor))
    path = forging.shard_of(result, tensor)
    change_tensors(path, lambda t: t.update({tensor: load_file(dense / path.name)[tensor]}))

    def forge(manifest):
        manifest["layers"] = layers = [x for x in manifest["layers"] if x["name"] != name]
        weights = sum(x["rows"] * x["n"] for x in layers)
        manifest["sparsity"] = sum(x["pruned"] for x in layers) / weights

    forge_manifest(result, forge)


def same_parameter(result, _):
    """A dense tensor without the name of the base model, which transformers would take."""
    path, name = forging.first_weight_shard(result), "layers.0.mlp.up_proj.weight"
    change_tensors(path, lambda t: t.update({name: torch.ones(48, 32)}))
    edit_json(result / INDEX, lambda i: i["weight_map"].update({name: path.name}))


def masks_gone(result, _):
    (result / MASKS).unlink()
    forge_manifest(result, lambda m: m["files"].pop(MASKS))


def listed_pipe(result, _):
    os.mkfifo(result / "tokenizer.json")
    forging.list_file(result, "tokenizer.json")


def other_dtype(result, _):
    change_tensors(forging.shard_of(result, NORM), lambda t: t.update({NORM: t[NORM].double()}))


def mask_of_another_tensor(result, _):
    of, other = (f"model.layers.2.self_attn.{x}_proj.weight" for x in "vk")
    gone = ~forging.change_masks(result, lambda m: m.update({other: m.pop(of)}))[other].kept
    change_tensors(forging.shard_of(result, other), lambda t: t[other].masked_fill_(gone, 0))


FILES = {
    "a pruned weight": (lambda r, _: forging.change_weight(r, "pruned", 1.25), "that its mask prunes"),
    "a pruned weight, -0": (lambda r, _: forging.change_weight(r, "pruned", -0.0), "that its mask prunes"),
    "a mask of another size": (
        masks(lambda m: next(iter(m.values())).kept[2].fill_(True)), "row 2: 0 of 32 pruned",
    ),
    "one file and shards": (  # the one file is loaded first
        lambda r, _: shutil.copy(forging.first_weight_shard(r), r / "model.safetensors"), "or the shards",
    ),
    "two tensors of a parameter": (same_parameter, "are the same parameter"),
    "blocks without end": (config(num_hidden_layers=10**5), "`num_hidden_layers` is 100000, and the"),
    "experts without end": (config(num_local_experts=10**5), "have 0 experts"),
    "index into a subfolder": (in_subfolder, "not the name of a"),
    "index of a single file": (index_of_a_single_file, "loader"),
    "tensor in two shards": (twice, "is in .* and in"),
    "tensor that the index does not name": (
        lambda r, _: change_tensors(shards(r)[0], lambda t: t.update(x=torch.ones(3))), "index does not name",
    ),
    "tensor that is not there": (
        lambda r, _: edit_json(r / INDEX, lambda i: i["weight_map"].update(x=shards(r)[0].name)), "it is not",
    ),
    "renamed tensor": (renamed_tensor, "is not there|only one"),
    "extra mask": (masks(lambda m: m.update(ghost=min(m.items())[1])), "'ghost' has a mask and is not"),
    "other weights by config": (config(transformers_weights="x.safetensors"), "other weights"),
    "code by config": (config(auto_map={"AutoModel": "x--y.Z"}), "code"),
    "code by a pipeline": (config(custom_pipelines={"x": {"impl": "a.B"}}), "code"),
    "no mask of a layer": (masks(lambda m: m.popitem()), "has no mask"),
    "another axis": (masks(transpose), "is said to have|counts other rows|not 16 of|of .* pruned"),
    "kernel of the hub": (config(attn_implementation="some/kernel"), "code"),
    "kernel of the hub, nested": (config(sub={"_attn_implementation": "some/kernel"}), "code"),
    "quantised": (config(quantization_config={"quant_method": "x"}), "quantization_config"),
    "nothing pruned": (nothing_pruned, "pruned"),
    "no masks": (no_masks, "no layer|nothing is pruned"),
    "pattern of nothing": (pattern_of_nothing, "nothing is pruned"),
    "layer left out": (layer_left_out, "model.layers.1.mlp.up_proj"),
    "masks that are not there": (masks_gone, "the manifest does not know this file"),
    "a parameter without a tensor": (config(attention_bias=True), "bias', of which there is no tensor"),
    "broken index": (lambda r, _: (r / INDEX).write_text('{"weight_map": 3}'), "weight_map"),
    "broken config": (lambda r, _: (r / "config.json").write_text("{"), "config.json"),
    **{f"{name}, listed {listed}": planted(name, listed) for name in PLANTED for listed in (0, 1)},
}  # fmt: skip
if os.name == "posix":
    FILES |= {f"link for {x}": link_out(x) for x in (MASKS, MANIFEST, INDEX, "config.json", "sub")}
    FILES["link to masks in a folder of transformers"] = link_out(
        MASKS, "additional_chat_templates/m"
    )
    first_link = lambda r, d: link_out(shards(r)[0].name)[0](r, d)  # noqa: E731
    FILES["link for weights"] = (first_link, "link|loader")
    FILES["listed pipe"] = (listed_pipe, "a loader could hang on it")
    FILES["pipe"] = (lambda r, _: os.mkfifo(r / "tokenizer.json"), "link|loader")


# --- what the manifest says
def layer(home="layers", /, **changes):
    """Of the fourth layer some values are changed, by functions of the layer or to values."""

    def change(manifest, index=3):
        one = manifest[home][index]
        one.update({k: v(one) if callable(v) else v for k, v in changes.items()})

    return change


def every_layer(**changes):
    return lambda m: [layer(**changes)(m, i) for i in range(len(m["layers"]))]


def moved(key):
    one, other = (layer(**{key: lambda x, by=by: x[key] + by}) for by in (1, -1))
    return lambda m: (one(m, 0), other(m, 3))


def swap_names(manifest):
    names = [manifest["layers"][i]["name"] for i in (3, 0)]
    layer(name=names[0])(manifest, 0)
    layer(name=names[1])(manifest, 3)


def keep_in_a_row(count):
    """The first row of a layer keeps so many weights more."""

    def keep(masks):
        row = masks[f"{LATER_UP}.weight"].kept[0]
        row[(~row).nonzero()[:count]] = True

    return masks(keep)


LATER_UP, COUNTS = "model.layers.1.mlp.up_proj", ("fingerprint", "options", "counts")
SAYS = {
    "no last layer": (lambda m: m["layers"].pop(), "down_proj' is only in the model"),
    "a file": (lambda m: m["files"].update(ghost="x"), "is not there"),
    "a file elsewhere": (lambda m: m["files"].update({"../x": "x"}), "is not there"),
    "nothing pruned": (lambda m: m["layers"][0].pop("pruned"), "damaged or was changed"),
    "no pattern": (options(sparsity={}), "damaged or was changed"),
    "a sensitivity of no allocation": (options(sensitivity="uniform"), "damaged or was changed"),
    "a damping of no update": (options(damping=0.3), "damaged or was changed"),
    "sevens": (pattern_of_all("1:7"), "do not divide into groups of 7"),
}  # fmt: skip
#: refused with one message or another
UNSAID = {
    "rows doubled": every_layer(rows=lambda x: 2 * x["rows"]),
    "rows negative": layer(rows=lambda x: -x["rows"]), "rows moved": moved("rows"),
    "inputs": layer(n=lambda x: 2 * x["n"], rows=lambda x: x["rows"] // 2),
    "pruned": layer(pruned=lambda x: x["pruned"] + 1), "pruned moved": moved("pruned"),
    "sparsity": lambda m: m.update(sparsity=31.5), "sparsity of a layer": layer(sparsity=0.9),
    "pattern of a layer": layer(pattern="2:4"),
    "pattern of the options": edit("fingerprint", "options", "sparsity", to="0.51"),
    "a layer left out": lambda m: m["layers"].pop(3),
    "a layer twice": lambda m: m["layers"].append(copy.deepcopy(m["layers"][3])),
    "a layer renamed": layer(name="model.layers.0.self_attn.x_proj"), "names exchanged": swap_names,
    "another block": layer(block=lambda x: x["block"] + 1), "another kind": layer(kind="mlp.up_proj"),
    "excluded": options(exclude=["q_proj"]), "included": options(include=["mlp"]),
    "min_tokens": options(min_tokens=10**6), "fallback": layer(fallback=True),
    "error NaN": layer(error=float("nan")), "error infinite": layer(error=float("inf")),
    "error negative": layer(error=-1.0), "error in words": layer(error="small"),
    "bound above the error": layer(lower_bound=lambda x: 2 * x["error"]),
    "statuses of more rows": layer(statuses={"swap-optimal": 10**6}),
    "unknown status": layer(statuses=lambda x: {"perfect": x["rows"]}),
    "tokens negative": every_layer(tokens=-1), "format": edit("format", to="maskopt-manifest-9"),
    "kind": edit("kind", to="channels"), "kind of a smaller model": edit("kind", to="blocks"),
    "cut": lambda m: m.update(shrunk={}), "no fingerprint": lambda m: m.pop("fingerprint"),
    "no masks listed": lambda m: m["files"].pop(MASKS),
    "config not listed": lambda m: m["files"].pop("config.json"), "seconds": edit("seconds", to=-3.0),
}  # fmt: skip


def shrunk_says(*path, to):
    return says(edit("shrunk", *path, to=to))


def lacks(*path):
    *path, last = path
    return says(edit("shrunk", *path, to=lambda x: x.pop(last) and x))


DOWN, MIXTURE = "model.layers.{}.mlp.down_proj", "model.layers.1.mlp.experts"
OUT, NO_PARTS = "model.layers.0.self_attn.o_proj", "does not have the .* kept parts of"
#: name → (folder, how to forge, what is said of the folder alone); with the original it is refused, too
ALONE = {
    **{f"file: {name}": ("pruned", *case) for name, case in FILES.items()},
    **{f"says: {name}": ("pruned", says(change), said) for name, (change, said) in SAYS.items()},
    **{f"says: {name}": ("pruned", says(change), "") for name, change in UNSAID.items()},
    "another mask": ("refitted", mask_of_another_tensor, r"2\.self_attn\.v_proj' has no mask"),
    "a size": ("mistral", config(intermediate_size=20), r"in the shards, .* by config\.json"),
    "a channel less": ("narrow", lacks("kept", DOWN.format(0), -1), NO_PARTS),
    "an expert less": ("experts", lacks("kept", MIXTURE, -1), NO_PARTS),
    "more heads": ("mistral", shrunk_says("kept", OUT, to=[0, 1, 2]), NO_PARTS),
    "a row of layers": ("layers", keep_in_a_row(1), "row 0: .* as in no layer there"),
    "a row of rows": ("rows", keep_in_a_row(None), "is said to have 768 weights pruned; its mask has"),
    "a row of both": ("both", keep_in_a_row(None), "row 0: 0 of .* beyond the deviation of its layer"),
}  # fmt: skip


def block(index, **changes):
    return lambda m: layer("trained", **changes)(m, index)


def all_stay(manifest):
    for one in manifest["trained"]:
        one.update(epoch=0, held_after=one["held_before"], fitted_after=one["fitted_before"])


def keep_all(kind):
    """Other weights, excused by a mask that keeps all."""
    tensor = f"model.layers.2.self_attn.{kind}_proj.weight"

    def forge(result, _):
        forging.redraw(result, tensor)
        kept = torch.ones_like(tiny("llama").get_parameter(tensor), dtype=torch.bool)
        forging.change_masks(result, lambda m: m.update({tensor: TensorMask(kept, 1)}))

    return forge


def no_generation_config(result, _):
    (result / "generation_config.json").unlink()
    forge_manifest(result, lambda m: m["files"].pop("generation_config.json"))


def redraw_vision(result, _):
    names = open_safe(result / "model.safetensors").entries
    forging.redraw(result, next(x for x in names if "vision" in x and ".0.layer_norm1.weight" in x))


def edited(file, change):
    return "tokenizer", lambda result, _: edit_json(result / file, change), file


def one_more(tensor):
    add = lambda tensors: tensors[tensor].view(-1)[0].add_(1)  # noqa: E731
    return lambda out, _: change_tensors(forging.shard_of(out, tensor), add)


def other_counts(manifest):
    """Counts and layers that agree with each other, and not with the masks."""
    there = manifest["fingerprint"]["options"]["counts"]
    for name, by in ((LATER_UP, 1), (LATER_UP.replace(".1.", ".0."), -1)):
        there[name] += by
        (one,) = (x for x in manifest["layers"] if x["name"] == name)
        one["pruned"] += by * one["rows"]
        one["sparsity"] = one["pruned"] / (one["rows"] * one["n"])
        one["pattern"] = f"keep {one['n'] - there[name]}"


def count(by):
    return edit(*COUNTS, LATER_UP, to=lambda count: count + by)


PATTERN, ALLOCATION = "has another pattern than the options", "otherwise than its allocation says"
COUNTED = [
    ("layers", count(1), "prunes another number of weights in all than its pattern"),
    ("layers", count(10**6), "counts that leave nothing of a row"),
    ("layers", count(-(10**6)), "damaged or was changed"),
    ("layers", other_counts, "weights pruned; its mask has"),
    ("layers", edit(*COUNTS, to=lambda x: x.pop(LATER_UP) and x), "counts of other layers"),
    ("layers", options(counts={}), ALLOCATION),
    ("layers", options(allocation="uniform"), ALLOCATION),
    ("rows", edit("layers", 9, "pruned", to=1023), "counts other pruned weights than its pattern"),
    ("rows", edit("layers", 9, "pattern", to="0.5"), PATTERN),
    ("rows", options(allocation="uniform"), "has an allocation that is not its pattern's"),
    ("both", options(max_deviation=0.2), PATTERN),
    ("both", options(max_deviation=2), "damaged or was changed"),
    ("both", options(allocation="layers"), PATTERN),
    ("both", options(counts={}), ALLOCATION),
]
LOSSES = "not what its losses say"
OTHERS = "lists other trained blocks"
#: name → (change of a manifest of which two of three blocks were trained, what is said)
TRAINED = {
    "no block": (edit("trained", to=[]), OTHERS),
    "a block twice": (lambda m: m["trained"].append(m["trained"][0]), OTHERS),
    "another block": (lambda m: m["trained"].append({**m["trained"][0], "block": 77}), OTHERS),
    "an epoch that there was not": (edit("trained", 0, "epoch", to=3), "longer than"),
    "a loss that rose": (block(0, held_after=lambda x: 2 * x["held_before"]), LOSSES),
    "a loss that fell by itself": (block(1, fitted_after=lambda x: x["fitted_after"] / 2), LOSSES),
    "nothing that became better": (all_stay, "differs from the original"),
    "no way of training": (options(training={}), "how its weights were trained"),
    "options of no kind": (options(training=None), "damaged or was changed"),
    "a dtype of no kind": (edit("fingerprint", "dtype", to=[]), "damaged or was changed"),
    "weights that were kept": (options(update="none"), "its options train none"),
}  # fmt: skip
#: the second block stayed, and the last norm is in no block
UNTRAINED = [
    "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight", "model.norm.weight",
]  # fmt: skip
#: name → (folder, how to forge, what is said when the original is given)
AGAINST = {
    "a kept weight": ("pruned", lambda r, _: forging.change_weight(r, "kept", 1.25), "kept weight differs"),
    "another dtype": ("pruned", other_dtype, "has another dtype or shape than the original"),
    "config": edited("config.json", edit("rope_theta", to=1.0)),
    "config, a new key": edited("config.json", lambda c: c.update(note="x")),
    "generation config": edited("generation_config.json", edit("eos_token_id", to=7)),
    "no generation config": ("tokenizer", no_generation_config, "generation_config.json"),
    "tokenizer": edited("tokenizer.json", lambda t: t["model"]["vocab"].update(x=1)),
    "tokenizer's code": edited("tokenizer_config.json", lambda t: t.update(auto_map={"A": ["x.Y"]})),
    "another tokenizer": ("tokenizer", planted("vocab.txt", True)[0], "vocab.txt"),
    "index": edited(INDEX, edit("metadata", "total_size", to=7)),
    "model digest": ("tokenizer", says(edit("fingerprint", "model", to="0" * 64)), "digest of another model"),
    **{f"trained: {name}": ("trained", says(change), said) for name, (change, said) in TRAINED.items()},
    **{f"untrained {x}": ("trained", one_more(x), rf"{x}.*differs from the original") for x in UNTRAINED},
    **{f"a mask that keeps all of {x}_proj": ("refitted", keep_all(x), "counts other rows") for x in "qk"},
    "a norm of the vision tower": ("vision", redraw_vision, r"layer_norm1.* differs from the original"),
}  # fmt: skip


# Smaller models ---------------------------------------------------------------------------------


def exchange(out, _):
    change_tensors(out / "model.safetensors", lambda t: t.update({K: t[V], V: t[K]}))


def not_gone(out, dense):
    """A tensor of the original that is gone, or would have another name."""
    theirs, ours = (
        {k: x for p in shards(y) for k, x in load_file(p).items()} for y in (dense, out)
    )
    name = max(theirs.keys() - ours.keys())
    change_tensors(shards(out)[0], lambda tensors: tensors.update({name: theirs[name]}))


def cut_by(tensor, by):
    def forge(out, dense):
        cut = load_file(dense / "model.safetensors")[tensor][forging.record_of(out)["kept"][by]]
        change_tensors(out / "model.safetensors", lambda t: t.update({tensor: cut}))

    return forge


def refitted(tensor):
    def forge(out, _):
        forging.redraw(out, tensor)
        forge_manifest(out, edit("shrunk", "updated", to=[tensor]))

    return forge


def other_channels(out, _):
    kept = forging.record_of(out)["kept"][DOWN.format(1)]
    gone = next(i for i in range(48) if i not in kept)
    forge_manifest(out, edit("shrunk", "kept", DOWN.format(1), to=sorted({*kept[1:], gone})))


def first_experts(out, _):
    kept = forging.record_of(out)["kept"]
    assert kept[min(kept)] != [0, 1]
    forge_manifest(out, edit("shrunk", "kept", min(kept), to=[0, 1]))


SLIDING, FULL = "sliding_attention", "full_attention"
OTHER_TYPES = config(layer_types=[SLIDING, FULL])
ONE_BLOCK = config(num_hidden_layers=1, layer_types=[FULL])
TYPES = ("types of blocks", OTHER_TYPES, "layer_types was")
EXCHANGED = ("exchanged", exchange, "is not the original's")
SIZE, REFITTED = "was", "or not, unlike a least-squares update"
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
#: smaller model → name, how to forge, what is said when the original is given
SMALLER = {
    "narrow": [
        ("a channel that is not there", shrunk_says("kept", DOWN.format(0), -1, to=48), "number 48 of 48"),
        ("a channel twice", shrunk_says("kept", DOWN.format(0), to=lambda x: [x[0], *x]), "damaged"),
        ("other channels", other_channels, "is not the original's, cut as"),
        ("another share", says(options(channels=0.5)), "numbers than the options, 24 of every 48"),
        ("nothing kept", says(lambda m: m["shrunk"].pop("kept")), "damaged"),
        ("another model", says(edit("fingerprint", "model", to="0")), "another model"),
        ("a norm refitted", says(lambda m: m["shrunk"]["updated"].append(NORM)), REFITTED),
        ("a tensor of no name refitted", says(lambda m: m["shrunk"]["updated"].append("no")), REFITTED),
        ("a norm of another dtype", other_dtype, "has another shape or type"),
        ("nothing of a layer", says(lambda m: m["shrunk"]["kept"].pop(DOWN.format(0))), "what stays of"),
        ("one more in a layer", one_more(UP), "is not the original's"),
        ("one more in a norm", one_more(NORM), "is not the original's"),
    ],
    "mistral": [
        ("window", config(sliding_window=1), "sizes that the removal leaves: .*sliding_window was"),
        ("list", config(mlp_only_layers=[0]), f"mlp_only_layers {SIZE}"),
        ("blocks", config(num_hidden_layers=2), f"num_hidden_layers {SIZE}"),
        ("epsilon", config(rms_norm_eps=100), "rms_norm_eps"),
        ("channels", config(intermediate_size=20), "intermediate_size was 36"),
        ("as many columns of other heads", config(**HEADS), "num_attention_heads was"),
        EXCHANGED,
        ("of another block", cut_by(UP, DOWN.format(1)), "up_proj.* is not the original's, cut as"),
        *(
            (x, shrunk_says("kept", f"model.layers.0.{x}", to=[0]), "takes channels or heads")
            for x in ("self_attn.dense", "self_attn.q_proj", "mlp.up_proj")
        ),
        # refitting sets those of all blocks, and of what takes the channels alone
        ("refitted what gives channels", refitted(GATE), REFITTED),
        ("refitted in one block", refitted(DOWN.format(0) + ".weight"), REFITTED),
    ],
    "shallow": [
        ("window", config(sliding_window=1), f"sliding_window {SIZE}"),
        TYPES,
        ("fewer blocks", ONE_BLOCK, "num_hidden_layers was"),
    ],
    "by pattern": [TYPES],
    "blocks": [
        ("another block", says(edit(*REMOVED, to=2)), "not the original's"),
        ("a block twice", says(edit(*REMOVED[:-1], to=[0, 0])), "damaged"),
        ("no block", says(edit(*REMOVED[:-1], to=0)), "damaged"),
        ("a tensor not gone", not_gone, "is only in the folder"),
    ],
    "experts": [
        ("a tensor not gone", not_gone, "is only in the folder"),
        ("the first experts", first_experts, "cut as"),
        ("of another kind", says(edit("kind", to="blocks")), "damaged"),
        ("another number", config(num_local_experts=3), "num_local_experts was 2"),
    ],
    "gpt_oss": [
        ("of another block", cut_by(ROUTER, MIXTURE), "router.* is not the original's, cut as"),
    ],
}  # fmt: skip
AGAINST |= {f"{of}: {name}": (of, *case) for of, rows in SMALLER.items() for name, *case in rows}
AGAINST |= {f"{of}: {i}": (of, says(change), said) for i, (of, change, said) in enumerate(COUNTED)}


@pytest.mark.parametrize("name", [*ALONE, *AGAINST])
def test_a_forged_folder_is_refused(name, folders, tmp_path):
    of, forge, said = (ALONE | AGAINST)[name]
    result, original = forging.copied(folders(of)[0], tmp_path), folders(of)[1]
    forge(result, original)
    forge_manifest(result)
    if name in ALONE:
        fails(VerificationError, said or None, verify_model, result)
    elif of in ("pruned", "tokenizer") and "code" not in name:
        verify_model(result)  # all of the folder agrees with itself
    fails(VerificationError, None if name in ALONE else said, verify_model, result, original)


def test_what_was_changed_without_its_digest(dense_folder, pruned_folder, folders, tmp_path):
    result = forging.copied(pruned_folder, tmp_path)
    forging.change_weight(result, "kept", 1.25)
    fails(VerificationError, "was changed", verify_model, result)
    edit_json(result / MANIFEST, lambda m: m.update(sparsity=0.9))
    fails(VerificationError, "damaged or was changed", verify_model, result)
    fails(VerificationError, "not written by maskopt", verify_model, dense_folder)
    other = save(tiny("qwen2"), tmp_path / "other")
    fails(VerificationError, "only one of the two", verify_model, pruned_folder, other)
    # of a smaller folder, with the right digest of the manifest itself
    narrow, original = folders("narrow")
    fails(ModelError, "is a dense model without masks", read_manifest, narrow / MANIFEST)
    out = forging.copied(narrow, tmp_path / "narrow")
    edit_json(out / MANIFEST, edit("files", "config.json", to="0" * 64))
    edit_json(out / MANIFEST, lambda m: m.update(forging.signed(m)))
    fails(VerificationError, "was changed", verify_model, out, original)
    linked = forging.copied(pruned_folder, tmp_path / "linked")
    manifest = shutil.move(linked / MANIFEST, tmp_path / "elsewhere.json")
    (linked / MANIFEST).symlink_to(manifest)
    fails(VerificationError, "link out of the model folder", verify_model, linked)
    # a link out of the original is no file of it
    dense = forging.copied(original, tmp_path / "dense")
    (tmp_path / "vocab.txt").write_text("elsewhere")
    (dense / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    assert "other tensors" in verify_model(narrow, dense).checked


@pytest.mark.parametrize("seeds", [range(25), slow(range(25, 100))])
def test_any_edit_of_a_manifest_is_refused_or_none(seeds, pruned_folder, dense_folder, tmp_path):
    def verified(original):
        try:
            return verify_model(result, original=original)
        except VerificationError as error:
            return str(error)

    result, passed = forging.copied(pruned_folder, tmp_path), 0
    sound = json.loads((result / MANIFEST).read_text())
    expected = {original: verified(original) for original in (None, dense_folder)}
    assert not any(isinstance(found, str) for found in expected.values())
    for seed in seeds:
        edited = forging.signed(forging.forged(sound, random.Random(seed)))
        (result / MANIFEST).write_text(json.dumps(edited))
        for original in expected:
            found = verified(original)
            refused = isinstance(found, str)
            assert "\n" not in found if refused else found == expected[original], seed
            passed += not refused
    assert passed  # seconds and versions may be anything
