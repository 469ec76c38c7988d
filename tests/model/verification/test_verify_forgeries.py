"""Forgeries that `maskopt verify OUT --against MODEL` refuses, all with right digests."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import (
    change_masks,
    change_tensors,
    first_weight_shard,
    forge_manifest,
    forged,
    list_file,
    prune_by,
    shard_of,
    shards,
    signed,
)
from safetensors.torch import save_file
from tiny_models import edit_json

from maskopt.errors import VerificationError
from maskopt.model.checkpoint import INDEX
from maskopt.model.maskfile import TensorMask
from maskopt.model.verify import Verified, verify_output
from maskopt.model.workspace import MANIFEST, MASKS

Forge = Callable[[Path, Path], Any]


@pytest.fixture
def result(pruned_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pruned model that a test may forge."""
    return Path(shutil.copytree(pruned_folder, tmp_path / "result"))


# What a loader could take ---------------------------------------------------------------------

PLANTED = [
    "pytorch_model.bin", "adapter_model.bin", "adapter_model.safetensors", "adapter_config.json",
    "modeling_own.py", "generate.py", "MODEL.SAFETENSORS", "model.Safetensors",
    "consolidated.safetensors", "model.gguf", "model.pt", "model.pth", "model.ckpt", "tf_model.h5",
    "flax_model.msgpack", "model.onnx", "pytorch_model.bin.index.json", "weights.npz", "w.pkl",
    "lib.so", "sub/model.safetensors", ".hidden/model.safetensors", "sub/modeling_own.py",
    "custom_generate/generate.py", "model.fp16.safetensors", "noending", "LICENSE.py", "NOTICE.bin",
    "README.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", PLANTED)
def test_what_a_loader_could_take_is_refused(
    name: str, listed: bool, result: Path, dense_folder: Path
) -> None:
    path = result / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(first_weight_shard(result).read_bytes() if "safet" in name else b"{}")
    if listed:
        list_file(result, name)
    with pytest.raises(VerificationError, match=r"loader|is not there") as caught:
        verify_output(result)
    assert name.split("/")[0] in str(caught.value)
    with pytest.raises(VerificationError):
        verify_output(result, against=dense_folder)


def test_what_no_loader_takes_may_lie_there(result: Path) -> None:
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (result / name).write_text("mine")
    verify_output(result)


def link_out(result: Path, name: str) -> None:
    elsewhere = result.parent / f"elsewhere-{name}"
    shutil.move(result / name, elsewhere)
    (result / name).symlink_to(elsewhere)


def linked_folder(result: Path) -> None:
    elsewhere = result.parent / "elsewhere"
    elsewhere.mkdir()
    (result / "sub").symlink_to(elsewhere)


LINKS: dict[str, Callable[[Path], Any]] = {
    "weights": lambda r: link_out(r, shards(r)[0].name),
    "masks": lambda r: link_out(r, MASKS),
    "manifest": lambda r: link_out(r, MANIFEST),
    "index": lambda r: link_out(r, INDEX),
    "config": lambda r: link_out(r, "config.json"),
    "folder": linked_folder,
    "pipe": lambda r: os.mkfifo(r / "tokenizer.json"),
}


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX links")
@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_the_folder_are_refused(name: str, result: Path) -> None:
    LINKS[name](result)
    with pytest.raises(VerificationError, match=r"link|loader"):
        verify_output(result)


# What the files say ---------------------------------------------------------------------------


def in_subfolder(result: Path, dense: Path) -> None:
    """The index names a file in a subfolder; one of that name lies in the folder itself."""
    name = first_weight_shard(result).name
    (result / "sub").mkdir()
    shutil.copy(dense / name, result / "sub" / name)

    def lead(index: dict[str, Any]) -> None:
        index["weight_map"] = {
            k: f"sub/{v}" if v == name else v for k, v in index["weight_map"].items()
        }

    edit_json(result / INDEX, lead)


def index_beside_a_single_file(result: Path, _: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path in shards(result):
        change_tensors(path, tensors.update)
        path.unlink()
    save_file(tensors, result / "model.safetensors", metadata={"format": "pt"})
    edit_json(
        result / INDEX,
        lambda i: i.update(
            metadata={"total_size": 1}, weight_map=dict.fromkeys(tensors, "model.safetensors")
        ),
    )

    def only_one(manifest: dict[str, Any]) -> None:
        for name in [n for n in manifest["files"] if n.startswith("model-")]:
            del manifest["files"][name]
        manifest["files"]["model.safetensors"] = ""

    forge_manifest(result, only_one)


def twice(result: Path, _: Path) -> None:
    """A pruned tensor's dense original in a second shard, which transformers reads last."""
    name = sorted(json.loads((result / INDEX).read_text())["weight_map"])[0]
    other = next(p for p in reversed(shards(result)) if p != shard_of(result, name))
    change_tensors(other, lambda t: t.update({name: torch.ones(3)}))


def unnamed(result: Path, _: Path) -> None:
    change_tensors(shards(result)[0], lambda t: t.update(extra=torch.ones(3)))


def renamed_tensor(result: Path, _: Path) -> None:
    path = first_weight_shard(result)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if "proj" in n)
        tensors["other." + name] = tensors.pop(name)
        index = json.loads((result / INDEX).read_text())
        index["weight_map"]["other." + name] = index["weight_map"].pop(name)
        (result / INDEX).write_text(json.dumps(index))

    change_tensors(path, rename)


def ghost(result: Path, _: Path) -> None:
    edit_json(result / INDEX, lambda i: i["weight_map"].update(ghost=shards(result)[0].name))


def extra_mask(result: Path, _: Path) -> None:
    change_masks(
        result, lambda m: m.update(ghost=TensorMask(torch.ones(4, 4, dtype=torch.bool), 1))
    )


def config(**changes: Any) -> Forge:
    return lambda result, _: edit_json(result / "config.json", lambda c: c.update(changes))


def shuffled(weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[torch.randperm(len(row))] for row in kept])


def nothing_pruned(result: Path, dense: Path) -> None:
    prune_by(result, dense, lambda _, kept: torch.ones_like(kept))


def no_masks(result: Path, dense: Path) -> None:
    """The dense model, and a manifest that knows of no layer."""
    nothing_pruned(result, dense)
    change_masks(result, dict.clear)
    forge_manifest(result, lambda m: m.update(tensors={}, layers=[], fallbacks=[], sparsity=0.0))


def pattern_of_nothing(result: Path, dense: Path) -> None:
    nothing_pruned(result, dense)
    pattern = {"kind": "unstructured", "sparsity": 0.0, "keep": None}

    def forge(manifest: dict[str, Any]) -> None:
        manifest["fingerprint"]["options"]["pattern"] = pattern
        manifest["sparsity"] = 0.0
        for tensor in manifest["tensors"].values():
            tensor["pattern"] = pattern
        for layer in manifest["layers"]:
            layer.update(pattern="0", pruned=0, sparsity=0.0, error=0.0)

    forge_manifest(result, forge)


def layer_left_out(result: Path, dense: Path) -> None:
    """One layer stays dense, and nothing tells of it."""
    name = "model.layers.1.mlp.up_proj"
    change_masks(result, lambda m: m.pop(name + ".weight"))
    shard = shard_of(result, name + ".weight").name
    original: dict[str, torch.Tensor] = {}
    change_tensors(dense_copy(dense, result) / shard, original.update)
    change_tensors(
        result / shard, lambda t: t.update({name + ".weight": original[name + ".weight"]})
    )

    def forge(manifest: dict[str, Any]) -> None:
        del manifest["tensors"][name + ".weight"]
        manifest["layers"] = [x for x in manifest["layers"] if x["name"] != name]
        pruned, all_ = (
            sum(map(f, manifest["layers"]))
            for f in (lambda x: x["pruned"], lambda x: x["rows"] * x["n"])
        )
        manifest["sparsity"] = pruned / all_

    forge_manifest(result, forge)


def dense_copy(dense: Path, result: Path) -> Path:
    return Path(shutil.copytree(dense, result.parent / "dense-copy"))


def same_parameter(result: Path, _: Path) -> None:
    """A dense tensor without the name of the base model, which transformers would take."""
    path, name = first_weight_shard(result), "layers.0.mlp.up_proj.weight"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones(48, 32)

    change_tensors(path, add)
    edit_json(result / INDEX, lambda i: i["weight_map"].update({name: path.name}))


FILES: dict[str, tuple[Forge, str]] = {
    "two tensors of a parameter": (same_parameter, "are the same parameter"),
    "blocks without end": (
        config(num_hidden_layers=10**5),
        "`num_hidden_layers` is 100000, and the",
    ),
    "experts without end": (config(num_local_experts=10**5), "have 0 experts"),
    "index into a subfolder": (in_subfolder, "not the name of a"),
    "index beside a single file": (index_beside_a_single_file, "loader"),
    "tensor in two shards": (twice, "is in .* and in"),
    "tensor that the index does not name": (unnamed, "index does not name"),
    "tensor that is not there": (ghost, "it is not"),
    "renamed tensor": (renamed_tensor, "is not there|only one"),
    "extra mask": (extra_mask, "different tensors"),
    "other weights by config": (config(transformers_weights="x.safetensors"), "other weights"),
    "code by config": (config(auto_map={"AutoModel": "x--y.Z"}), "code"),
    "code by a pipeline": (config(custom_pipelines={"x": {"impl": "a.B"}}), "code"),
    "kernel of the hub": (config(attn_implementation="some/kernel"), "code"),
    "kernel of the hub, nested": (config(sub={"_attn_implementation": "some/kernel"}), "code"),
    "quantised": (config(quantization_config={"quant_method": "x"}), "quantization_config"),
    "nothing pruned": (nothing_pruned, "pruned"),
    "no masks": (no_masks, "no layer|nothing is pruned"),
    "pattern of nothing": (pattern_of_nothing, "nothing is pruned"),
    "layer left out": (layer_left_out, "model.layers.1.mlp.up_proj"),
    "broken index": (lambda r, _: (r / INDEX).write_text('{"weight_map": 3}'), "weight_map"),
    "broken config": (lambda r, _: (r / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("name", FILES)
def test_forged_files_are_refused(name: str, result: Path, dense_folder: Path) -> None:
    forge, message = FILES[name]
    forge(result, dense_folder)
    forge_manifest(result)
    with pytest.raises(VerificationError, match=message):
        verify_output(result)
    with pytest.raises(VerificationError):
        verify_output(result, against=dense_folder)


AGAINST: dict[str, tuple[Forge, str]] = {
    "config": (config(rope_theta=1.0), "config.json"),
    "config, a new key": (config(note="x"), "config.json"),
    "generation config": (
        lambda r, _: edit_json(r / "generation_config.json", lambda c: c.update(eos_token_id=7)),
        "generation_config.json",
    ),
    "no generation config": (
        lambda r, _: (
            (r / "generation_config.json").unlink(),
            forge_manifest(r, lambda m: m["files"].pop("generation_config.json")),
        ),
        "generation_config.json",
    ),
    "tokenizer": (
        lambda r, _: edit_json(r / "tokenizer.json", lambda t: t["model"]["vocab"].update(x=1)),
        "tokenizer.json",
    ),
    "tokenizer's code": (
        lambda r, _: edit_json(
            r / "tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": ["x.Y"]})
        ),
        "tokenizer_config.json",
    ),
    "another tokenizer": (
        lambda r, _: ((r / "vocab.txt").write_text("a"), list_file(r, "vocab.txt")),
        "vocab.txt",
    ),
    "index": (
        lambda r, _: edit_json(r / INDEX, lambda i: i["metadata"].update(total_size=7)),
        INDEX,
    ),
    "model digest": (
        lambda r, _: forge_manifest(r, lambda m: m["fingerprint"].update(model="0" * 64)),
        "digest of another model",
    ),
}


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a tokenizer, and what Wanda makes of it."""
    from tiny_models import save, save_tokenizer, tiny, tokens

    from maskopt import prune_model

    home = tmp_path_factory.mktemp("tokenizer")
    dense = save(tiny("llama"), home / "dense", shard="30KB")
    save_tokenizer(dense)
    prune_model(dense, tokens(), sparsity=0.5, solver="wanda", min_tokens=1, output=home / "out")
    return dense, home / "out"


@pytest.mark.parametrize("name", AGAINST)
def test_what_differs_from_the_model_is_refused(
    name: str, with_tokenizer: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, out = with_tokenizer
    copied = Path(shutil.copytree(out, tmp_path / "result"))
    verify_output(copied, against=dense)
    forge, message = AGAINST[name]
    forge(copied, dense)
    forge_manifest(copied)
    with pytest.raises(VerificationError, match=message):
        verify_output(copied, against=dense)


# What the manifest says -----------------------------------------------------------------------


def layer(change: Callable[[dict[str, Any]], Any], index: int = 3) -> Callable[..., Any]:
    return lambda m: change(m["layers"][index])


def all_layers(change: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    return lambda m: [change(x) for x in m["layers"]]


def swap_names(manifest: dict[str, Any]) -> None:
    one, two = (manifest["layers"][i] for i in (0, 3))
    one["name"], two["name"] = two["name"], one["name"]


def other_pattern(manifest: dict[str, Any]) -> None:
    manifest["fingerprint"]["options"]["pattern"]["sparsity"] = 0.51


SAYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rows doubled": all_layers(lambda x: x.update(rows=2 * x["rows"])),
    "rows negative": layer(lambda x: x.update(rows=-x["rows"])),
    "rows moved": lambda m: (
        m["layers"][0].update(rows=m["layers"][0]["rows"] + 1),
        m["layers"][3].update(rows=m["layers"][3]["rows"] - 1),
    ),
    "inputs": layer(lambda x: x.update(n=2 * x["n"], rows=x["rows"] // 2)),
    "pruned": layer(lambda x: x.update(pruned=x["pruned"] + 1)),
    "pruned moved": lambda m: (
        m["layers"][0].update(pruned=m["layers"][0]["pruned"] + 1),
        m["layers"][3].update(pruned=m["layers"][3]["pruned"] - 1),
    ),
    "sparsity": lambda m: m.update(sparsity=31.5),
    "sparsity of a layer": layer(lambda x: x.update(sparsity=0.9)),
    "pattern of a layer": layer(lambda x: x.update(pattern="2:4")),
    "pattern of the options": other_pattern,
    "a layer left out": lambda m: m["layers"].pop(3),
    "a layer twice": lambda m: m["layers"].append(copy.deepcopy(m["layers"][3])),
    "a layer renamed": layer(lambda x: x.update(name="model.layers.0.self_attn.x_proj")),
    "names exchanged": swap_names,
    "another block": layer(lambda x: x.update(block=x["block"] + 1)),
    "another kind": layer(lambda x: x.update(kind="mlp.up_proj")),
    "excluded": lambda m: m["fingerprint"]["options"].update(exclude=["q_proj"]),
    "included": lambda m: m["fingerprint"]["options"].update(include=["mlp"]),
    "min_tokens": lambda m: m["fingerprint"]["options"].update(min_tokens=10**6),
    "fallback": layer(lambda x: x.update(fallback=True)),
    "fallbacks": lambda m: m["fallbacks"].append(m["layers"][0]["name"]),
    "error NaN": layer(lambda x: x.update(error=float("nan"))),
    "error infinite": layer(lambda x: x.update(error=float("inf"))),
    "error negative": layer(lambda x: x.update(error=-1.0)),
    "error in words": layer(lambda x: x.update(error="small")),
    "bound above the error": layer(lambda x: x.update(lower_bound=2 * x["error"])),
    "statuses of more rows": layer(lambda x: x.update(statuses={"swap-optimal": 10**6})),
    "unknown status": layer(lambda x: x.update(statuses={"perfect": x["rows"]})),
    "tokens negative": all_layers(lambda x: x.update(tokens=-1)),
    "format": lambda m: m.update(format="maskopt-manifest-9"),
    "no fingerprint": lambda m: m.pop("fingerprint"),
    "no masks listed": lambda m: m["files"].pop(MASKS),
    "config not listed": lambda m: m["files"].pop("config.json"),
    "seconds": lambda m: m.update(seconds=-3.0),
}


@pytest.mark.parametrize("name", SAYS)
def test_a_forged_manifest_is_refused(name: str, result: Path, dense_folder: Path) -> None:
    forge_manifest(result, SAYS[name])
    with pytest.raises(VerificationError):
        verify_output(result)
    with pytest.raises(VerificationError):
        verify_output(result, against=dense_folder)


def test_any_edit_of_the_manifest_is_refused_or_changes_nothing(
    pruned_folder: Path, dense_folder: Path, tmp_path: Path
) -> None:
    result = Path(shutil.copytree(pruned_folder, tmp_path / "result"))
    sound = json.loads((result / MANIFEST).read_text())
    alone, compared = verify_output(result), verify_output(result, against=dense_folder)
    passed = 0
    for seed in range(100):
        edited = signed(forged(sound, random.Random(seed)))
        (result / MANIFEST).write_text(json.dumps(edited))
        for against, expected in ((None, alone), (dense_folder, compared)):
            found, said = try_to_verify(result, against)
            assert found in (expected, None), seed
            assert "\n" not in said, seed
            passed += found is not None
    assert passed  # seconds and versions may be anything


def try_to_verify(result: Path, against: Path | None) -> tuple[Verified | None, str]:
    try:
        return verify_output(result, against=against), ""
    except VerificationError as error:
        return None, str(error)


def test_masks_of_another_run_are_claims(result: Path, dense_folder: Path) -> None:
    """Random masks under the errors of a real run: without calibration nobody can know, and the
    result says that errors and statuses are claimed."""
    prune_by(result, dense_folder, shuffled)
    verified = verify_output(result, against=dense_folder)
    assert {"errors", "statuses", "bounds"} <= set(verified.claimed)
    assert not verified.checked_layers


# A model that was pruned in memory and saved anew ---------------------------------------------


@pytest.fixture(scope="module")
def saved_anew(with_tokenizer: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from maskopt import prune_model

    dense, _ = with_tokenizer
    out = tmp_path_factory.mktemp("anew") / "out"
    model = AutoModelForCausalLM.from_pretrained(dense)
    prune_model(
        model, AutoTokenizer.from_pretrained(dense), calibration=["some text " * 40], samples=4,
        seq_len=16, sparsity=0.5, solver="wanda", min_tokens=1, output=out,
    )  # fmt: skip
    return out


def test_a_model_saved_anew(
    saved_anew: Path, with_tokenizer: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its configuration must mean the same; that its tokenizer does is claimed."""
    dense = Path(shutil.copytree(with_tokenizer[0], tmp_path / "dense"))
    edit_json(
        dense / "config.json",
        lambda c: c.update(torch_dtype=c.pop("dtype"), transformers_version="5.0.0"),
    )
    claimed = verify_output(saved_anew, against=dense).claimed
    assert "configuration and tokenizer" in claimed
    assert "kept weights" not in claimed
    for changes in (
        {"rope_theta": 3.0},
        {"hidden_act": "gelu"},
        {"auto_map": {"AutoModel": "x.Y"}},
    ):
        copied = Path(shutil.copytree(saved_anew, tmp_path / next(iter(changes))))
        edit_json(copied / "config.json", lambda c, changes=changes: c.update(changes))
        forge_manifest(copied)
        with pytest.raises(VerificationError, match=r"config\.json"):
            verify_output(copied, against=dense)


def test_leaving_the_digest_out_hides_nothing(
    with_tokenizer: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without the model's digest a result counts as saved anew: what then may differ is claimed."""
    dense, out = with_tokenizer
    copied = Path(shutil.copytree(out, tmp_path / "result"))
    forge_manifest(copied, lambda m: m["fingerprint"].pop("model"))
    assert verify_output(copied, against=dense) == verify_output(out, against=dense)
    edit_json(copied / "tokenizer.json", lambda t: t["model"]["vocab"].update(x=1))
    forge_manifest(copied)
    assert "configuration and tokenizer" in verify_output(copied, against=dense).claimed
    edit_json(copied / "tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": "x"}))
    forge_manifest(copied)
    with pytest.raises(VerificationError, match="asks to run code"):
        verify_output(copied, against=dense)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX links")
def test_a_result_in_the_hubs_cache(result: Path, dense_folder: Path, tmp_path: Path) -> None:
    """There the files are links into blobs/, beside the snapshots."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    result.rename(tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    verify_output(snapshot, against=dense_folder)
