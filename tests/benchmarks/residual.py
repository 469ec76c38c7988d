"""Does a lower error of every layer make a better model? Layers pruned in other bases of the residual stream.

    python tests/benchmarks/residual.py --calibration valid.txt --text test.txt

A layer that reads or writes the residual stream is pruned at 2:4 in a basis of it and turned back, which is
what pruning a model rewritten in that basis would be. Bases: as stored; channels in an order made for
all layers at once; a random rotation, where no norm is between. Masks: Wanda, 1-swap.

Of every case, over dense activations of the evaluated text: the relative error of layers; how errors that
layers write into the stream add up, ‖Σ e‖² / Σ ‖e‖²; and the divergence that the errors e foretell to second
order, nats per token, with gradients g of the log-likelihood of sampled tokens: ½ Σ E(g·e)² of layers alone,
and ½ E(Σ g·e)² of all together. Finished models are lines of a JSONL file (`--data`). CSV file: `--csv`.
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
MASKS: dict[str, dict[str, Any]] = {"Wanda": {"solver": "wanda"}, "1-swap": {"start": "relax"}}
LABELS = 4


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
    windows = torch.tensor(ids[: 8 * 511]).view(8, 511)
    if tokenizer.bos_token_id is not None:
        windows = torch.cat([torch.full((8, 1), tokenizer.bos_token_id), windows], 1)
    for case, found in foretold(model, windows, changes).items():
        cases[case] |= found
    limit: dict[str, Any] = {"windows": args.windows, "seq_len": 512}
    dense = perplexity(model, tokenizer, text=args.text, **limit).value
    weights = {layer: model.get_parameter(f"{layer}.weight") for layer in layers}
    stored = {layer: weight.clone() for layer, weight in weights.items()}
    for case, of_layers in changes.items():
        for layer, by in of_layers.items():
            weights[layer].copy_(stored[layer] + by)
        cases[case]["perplexity"] = perplexity(model, tokenizer, text=args.text, **limit).value
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


def foretold(
    model: Any, windows: Tensor, changes: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Of every case: errors of layers, their sum in the stream, and what they change of the likelihood."""
    names, generator = list(next(iter(changes.values()))), torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, given: Any, made: Tensor) -> None:
        inputs[name], outputs[name] = given[0][0].detach(), made

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, x, y, n=name: keep(n, x, y))
        for name in names
    ]
    errors = {case: torch.zeros(len(names), 2, dtype=torch.float64) for case in changes}
    written = {case: torch.zeros(2, dtype=torch.float64) for case in changes}
    products: dict[str, list[Tensor]] = {case: [] for case in changes}
    for ids in windows:
        embedded = model.get_input_embeddings()(ids[None]).requires_grad_()
        log_p = model(inputs_embeds=embedded).logits[0].log_softmax(1)
        gradients = []
        for _ in range(LABELS):
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            loss = log_p.gather(1, labels).sum()
            gradients.append(
                torch.autograd.grad(loss, [outputs[n] for n in names], retain_graph=True)
            )
        for case, change in changes.items():
            found = torch.zeros(LABELS, len(names), dtype=torch.float64)
            stream = torch.zeros(())
            for k, name in enumerate(names):
                error = inputs[name] @ change[name].T
                size = error.double().square().sum()
                errors[case][k] += torch.stack([size, outputs[name].double().square().sum()])
                for label, of_layers in enumerate(gradients):
                    found[label, k] = (of_layers[k][0] * error).sum(dtype=torch.float64)
                if name.endswith(WRITERS):
                    into = in_stream(model, name, outputs[name][0].detach(), error).double()
                    stream = stream + into
                    written[case][1] += into.square().sum()
            written[case][0] += stream.square().sum()
            products[case].append(found)
        del embedded, log_p, gradients, loss
    for hook in hooks:
        hook.remove()
    result, tokens = {}, windows.shape[1]
    for case in changes:
        every = torch.cat(products[case])
        alone, together = every.square().sum(1), every.sum(1).square()
        result[case] = {
            "error_of_layers": float((errors[case][:, 0] / errors[case][:, 1]).mean()),
            "written_errors_add_up": float(written[case][0] / written[case][1]),
            "foretold_alone": float(alone.mean()) / 2 / tokens,
            "foretold_together": float(together.mean()) / 2 / tokens,
        }
    return result


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
