"""Peak memory of pruning a synthetic model of LLaMA-3.1-8B's shapes from disk, most layers skipped.

    python tests/benchmarks/stream_8b.py --folder /path/with/32GB

Writes 16 GB of bfloat16 shards (random weights, the same in every block), then prunes one projection in
the first, middle and last block, so that all 32 blocks have to stream through, verifies the result
against the model, and evaluates it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine_now

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
    "input_layernorm": (4096,),
    "post_attention_layernorm": (4096,),
}
BLOCKS = 32
VOCABULARY = 128256


def write_model(folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=BLOCKS, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131072, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        part = torch.randn(min(shape[0], 1024), shape[1], generator=generator) * 0.02
        repeats = -(-shape[0] // part.shape[0])
        return part.bfloat16().repeat(repeats, 1)[: shape[0]].contiguous()

    weight_map: dict[str, str] = {}
    block = {name: random(*shape) for name, shape in SHAPES.items()}
    for index in range(BLOCKS):
        shard = f"model-{index + 1:05d}-of-{BLOCKS + 1:05d}.safetensors"
        tensors = {f"model.layers.{index}.{name}.weight": t for name, t in block.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    shard = f"model-{BLOCKS + 1:05d}-of-{BLOCKS + 1:05d}.safetensors"
    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, 4096),
        "lm_head.weight": random(VOCABULARY, 4096),
        "model.norm.weight": random(4096),
    }
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, shard)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def peak() -> float:
    """GiB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step(title: str, work: Callable[[], str]) -> None:
    """Run in a process of its own, so that its peak resident size is its own."""
    child = os.fork()
    if child == 0:
        began = time.perf_counter()
        said = work()
        seconds = time.perf_counter() - began
        print(f"{title}: {said}, {seconds:.0f} s, peak resident size {peak():.2f} GiB", flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{title}: failed")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--solver", default="wanda")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    model, out = arguments.folder / "model", arguments.folder / "out"
    print(machine_now(), flush=True)
    shape = (arguments.samples, arguments.seq_len)
    tokens = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    print(f"{shape[0]} windows of {shape[1]} random tokens", flush=True)

    def prune() -> str:
        from maskopt.models.blockwise.forward import BlockProgress
        from maskopt.models.pruning.prune import prune_model

        seen = -1

        def show(event: BlockProgress) -> None:
            nonlocal seen
            if event.block > seen:
                seen = event.block
                print(f"block {seen}, peak resident size so far {peak():.2f} GiB", flush=True)

        report = prune_model(
            model, tokens, sparsity=0.5, solver=arguments.solver, output=out, overwrite=True,
            on_progress=show,
            include=[f"layers.{i}.self_attn.q_proj" for i in (0, BLOCKS // 2, BLOCKS - 1)],
        )  # fmt: skip
        return f"{len(report.layers)} layers by {arguments.solver}"

    def verify() -> str:
        from maskopt.models.verification.verify import verify_model

        return f"{verify_model(out, original=model).rows} rows hold"

    def evaluate() -> str:
        from maskopt.models.evaluation.evaluate import perplexity

        return f"perplexity {perplexity(out, tokens).value:.6g}"

    def write() -> str:
        write_model(model)
        return f"{sum(file.stat().st_size for file in model.iterdir()) / 2**30:.2f} GiB"

    if not model.exists():
        step("model written", write)
    step("pruned", prune)
    step("verified", verify)
    step("evaluated", evaluate)
    if not arguments.keep:
        shutil.rmtree(out)
        shutil.rmtree(model)


if __name__ == "__main__":
    main()
