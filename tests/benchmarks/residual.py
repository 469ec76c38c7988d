"""Does a lower error of every layer make a better model? Layers pruned in other bases of the residual stream.

    python tests/benchmarks/residual.py --calibration valid.txt --text test.txt

A layer that reads or writes the residual stream is pruned at 2:4 in a basis of it and turned back, which is
what pruning a model rewritten in that basis would be. Bases: as stored; channels in an order made for
all layers at once; a random rotation, where no norm is between. Masks: Wanda, 1-swap.

Of every case, over dense activations of the evaluated text: the relative error of layers, and how errors that
layers write into the stream add up, ‖Σ e‖² / Σ ‖e‖². And the divergence of the model from the dense one, nats
per token: as it is; and to second order, KL / ε² of a model that goes a small way ε to the pruned one, with
the layers all together, and each by itself: with random signs of the layers' changes, over which products of
two layers' effects are zero on average. Finished models are lines of a JSONL file (`--data`).
CSV file: `--csv`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from book import FIGURES, TABLES, TITLES, Book
from machine import machine
from tables import write_csv
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskopt import LayerProblem, perplexity, solve
from maskopt.core.pattern import parse_sparsity
from maskopt.demo import demo_model
from maskopt.models.pruning.prune import layer_problems
from maskopt.solvers.grouping import group_inputs

READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
#: of the rows of all layers, for the groups
EVERY = 8
MASKS: dict[str, dict[str, Any]] = {"Wanda": {"solver": "wanda"}, "1-swap": {"solver": "swap"}}
#: windows whose activations and divergences are measured
MEASURED = 4
#: part of the way from the dense model to the pruned one; draws of the signs
SMALL, SIGNS = 0.1, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="text for the Gram matrices")
    parser.add_argument("--text", required=True, help="text that models are evaluated on")
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 for calibration")
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, for perplexity")
    parser.add_argument("--models", nargs="*", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--data", type=Path, default=FIGURES / "residual.jsonl")
    parser.add_argument("--csv", type=Path, default=TABLES / "residual.csv")
    args = parser.parse_args()
    book = Book(args.data)
    texts = {name: Path(getattr(args, name)).name for name in ("calibration", "text")}
    sizes = {"samples": args.samples, "windows": args.windows}
    book.begin({**texts, **sizes, "date": time.strftime("%Y-%m-%d"), "machine": machine()})
    for name in args.models:
        if f"{name}/stored/1-swap" not in book:
            for case, found in measure(args, name).items():
                book.put(f"{name}/{case}", found)
        write_csv(args.csv, (row(*x) for x in book.lines.items() if x[0] != "about"))


def row(key: str, one: Mapping[str, Any]) -> dict[str, Any]:
    model, basis, masks = key.split("/")
    return {"model": TITLES[model], "basis": basis, "masks": masks, **one}


def measure(args: argparse.Namespace, name: str) -> dict[str, dict[str, Any]]:
    """All cases of a model; the one as stored with 1-swap masks comes last."""
    folder, how = demo_model(name), {"samples": args.samples, "seq_len": 512, "sparsity": "2:4"}
    layers = {x.name: p for x, p in layer_problems(folder, calibration=args.calibration, **how)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases: dict[str, dict[str, Any]] = {}
    changes: dict[str, dict[str, Tensor]] = {}
    for basis, matrix in bases(model, layers).items():
        for masks, options in MASKS.items():
            case = f"{basis}/{masks}"
            changes[case] = {}
            unread = []
            for layer, problem in layers.items():
                change, mask = pruned(model, layer, problem, matrix, options)
                changes[case][layer] = change
                if layer.endswith(READERS):
                    unread.append(float((~mask.any(0)).double().mean()))
            cases[case] = {"inputs_that_no_row_reads": float(np.mean(unread))}
    ids = tokenizer(Path(args.text).read_text(), add_special_tokens=False).input_ids
    windows = torch.tensor(ids[: MEASURED * 511]).view(MEASURED, 511)
    if tokenizer.bos_token_id is not None:
        windows = torch.cat([torch.full((MEASURED, 1), tokenizer.bos_token_id), windows], 1)
    limit: dict[str, Any] = {"windows": args.windows, "seq_len": 512}
    dense = perplexity(model, tokenizer, text=args.text, **limit).value
    logits = model(windows).logits
    for case, found in errors(model, windows, changes).items():
        cases[case] |= found
    weights = {layer: model.get_parameter(f"{layer}.weight") for layer in layers}
    stored = {layer: weight.clone() for layer, weight in weights.items()}
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (SIGNS, len(layers)), generator=generator) * 2 - 1

    def divergence(case: str, of_layers: Tensor) -> float:
        """From the dense model, of one that goes the given part of the way in every layer."""
        for part, (layer, by) in zip(of_layers.tolist(), changes[case].items(), strict=True):
            weights[layer].copy_(stored[layer] + part * by)
        apart = [_kl(logits[k], model(ids[None]).logits[0]) for k, ids in enumerate(windows)]
        return float(np.mean(apart))

    every = torch.ones(len(layers))
    for case in changes:
        alone = [divergence(case, SMALL * sign) for sign in signs]
        cases[case] |= {
            "second_order_alone": float(np.mean(alone)) / SMALL**2,
            "second_order_together": divergence(case, SMALL * every) / SMALL**2,
            "divergence": divergence(case, every),
            "perplexity": perplexity(model, tokenizer, text=args.text, **limit).value,
        }
    first = f"stored/{list(MASKS)[-1]}"
    order = sorted(cases, key=lambda case: case == first)
    return {case: {"perplexity_dense": dense, **cases[case]} for case in order}


def bases(model: Any, layers: Mapping[str, LayerProblem]) -> dict[str, Tensor]:
    """Orthogonal matrices of the residual stream, float64."""
    readers = [p for name, p in layers.items() if name.endswith(READERS)]
    scores = [(p.weight.double().square() * p.gram.double().diagonal())[::EVERY] for p in readers]
    # every layer counts the same
    score = torch.cat([score / score.sum() for score in scores]).numpy()
    d = readers[0].n
    one, order = torch.eye(d, dtype=torch.float64), group_inputs(score, 2, 4).order
    found = {"stored": one, "grouped": one[:, torch.from_numpy(order)]}
    if model.config.model_type == "llama":
        noise = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found["random"] = torch.linalg.qr(noise).Q
    return found


def pruned(
    model: nn.Module, name: str, problem: LayerProblem, r: Tensor, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """What a layer's weights change by when it is pruned in a basis of the stream; and its mask there."""
    weight, gram, scale = problem.weight.double(), problem.gram.double(), torch.ones(1)
    reads, rotated = name.endswith(READERS), bool((r.square() != r.abs()).any())
    if reads:
        if rotated:  # the norm's factors become part of the layer
            block, attention = name.rsplit(".", 2)[0], ".self_attn." in name
            norm = "input_layernorm" if attention else "post_attention_layernorm"
            scale = model.get_parameter(f"{block}.{norm}.weight").double()
        moved, gram = (weight * scale) @ r, r.T @ (gram / scale / scale[:, None]) @ r
        gram = (gram + gram.T) / 2
    else:
        moved = r.T @ weight
    mask = solve(LayerProblem(moved, gram, parse_sparsity("2:4"), assume_psd=True), **options).mask
    kept = moved * mask
    back = (kept @ r.T) / scale if reads else r @ kept
    return (back - weight).float(), mask


def _kl(dense: Tensor, other: Tensor) -> float:
    """Mean over tokens, float64."""
    p, q = (x.double().log_softmax(1) for x in (dense, other))
    return float((p.exp() * (p - q)).sum(1).mean())


def errors(
    model: Any, windows: Tensor, changes: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Of every case: errors of layers, and how those add up that layers write into the stream."""
    names = list(next(iter(changes.values())))
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, given: Any, made: Tensor) -> None:
        inputs[name], outputs[name] = given[0][0], made[0]

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, x, y, n=name: keep(n, x, y))
        for name in names
    ]
    sizes = {case: torch.zeros(len(names), 2, dtype=torch.float64) for case in changes}
    written = {case: torch.zeros(2, dtype=torch.float64) for case in changes}
    for ids in windows:
        model(ids[None])
        for case, change in changes.items():
            stream = torch.zeros((), dtype=torch.float64)
            for k, name in enumerate(names):
                error = inputs[name] @ change[name].T
                sizes[case][k] += torch.stack([_square(error), _square(outputs[name])])
                if name.endswith(WRITERS):
                    into = in_stream(model, name, outputs[name], error).double()
                    stream = stream + into
                    written[case][1] += _square(into)
            written[case][0] += _square(stream)
    for hook in hooks:
        hook.remove()
    return {
        case: {
            "error_of_layers": float((sizes[case][:, 0] / sizes[case][:, 1]).mean()),
            "written_errors_add_up": float(written[case][0] / written[case][1]),
        }
        for case in changes
    }


def _square(x: Tensor) -> Tensor:
    return x.double().square().sum()


def in_stream(model: nn.Module, name: str, output: Tensor, error: Tensor) -> Tensor:
    """The error as the stream gets it: some models normalise what layers write."""
    block: Any = model.get_submodule(name.rsplit(".", 2)[0])
    if not hasattr(block, "post_feedforward_layernorm"):
        return error
    of_attention = ".self_attn." in name
    norm = block.post_attention_layernorm if of_attention else block.post_feedforward_layernorm
    change: Tensor = norm(output + error) - norm(output)
    return change


if __name__ == "__main__":
    main()
