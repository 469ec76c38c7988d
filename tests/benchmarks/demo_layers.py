"""Layers of the demo model as problems, on the demo's calibration text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from maskopt import LayerProblem, load_problem
from maskopt.demo import demo_model, demo_text
from maskopt.models.pruning.prune import collect_problems

#: layers of the comparison of masks
LAYERS = ("0.q", "0.o", "2.gate", "2.down", "4.q", "4.o")
KINDS = {
    "q": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
#: one layer of every kind and depth
SIXTEEN = tuple(f"{block}.{kind}" for block in (0, 5, 10, 17) for kind in KINDS)


def name_of(layer: str) -> str:
    block, kind = layer.split(".")
    return f"model.layers.{block}.{KINDS[kind]}"


def collect(
    args: argparse.Namespace, layers: list[str], sparsity: float, text: str | None = None
) -> Iterator[tuple[str, LayerProblem]]:
    """The problems of the demo model, by the model's names; None: on the demo's calibration text."""
    return collect_problems(
        demo_model(),
        layers=layers,
        sparsity=sparsity,
        calibration=demo_text().calibration if text is None else text,
        samples=args.samples,
        seq_len=512,
        bos=args.bos,
        seed=args.seed,
        device="cpu",
    )


def sample(problem: LayerProblem, rows: int, seed: int) -> LayerProblem:
    """Some rows, chosen by seed; a prefix of a larger sample is the smaller one."""
    order = torch.randperm(problem.rows, generator=torch.Generator().manual_seed(seed))
    return problem.take(order[:rows].tolist())


def ratio(objective: torch.Tensor, base: torch.Tensor) -> list[float]:
    return (objective / base).tolist()


def columns_of(n: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:count].sort().values


def loaded(args: argparse.Namespace, layers: tuple[str, ...]) -> Iterator[tuple[str, LayerProblem]]:
    """The problems of these layers, 60%; collected ones are kept as files for the next study."""
    args.problems.mkdir(parents=True, exist_ok=True)
    kind = f"{args.bos}-{args.samples}-{args.seed}"
    files = {layer: args.problems / f"{layer}-{kind}.npz" for layer in layers}
    missing = {name_of(layer): file for layer, file in files.items() if not file.exists()}
    if missing:
        for name, problem in collect(args, list(missing), 0.6):
            problem.save(missing[name])
    for layer, file in files.items():
        yield layer, load_problem(file).as_layer()
