"""Zeros of a pruned model that a quantiser leaves: the table of docs/guide/after.md."""

import pytest
import torch
from commands import ROOT
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

PAGE = ROOT / "docs" / "guide" / "after.md"
#: zeros of a matrix of 128 × 512 normal numbers, half of them pruned, that are still zero
EVERY = 32768


def pruned():
    """A matrix and what is pruned of it: in each row as many, of some groups of 32 all and of some none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 512, generator=generator)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    gone.scatter_(1, torch.rand(128, 512, generator=generator).argsort(1)[:, :256], True)
    gone[0] = torch.arange(512) < 256
    return weight.masked_fill(gone, 0), gone


@pytest.mark.parametrize("mapping", [None, "SYMMETRIC", "ASYMMETRIC"])
def test_integers_of_torchao_keep_every_zero(mapping):
    ao = pytest.importorskip("torchao.quantization", reason="needs torchao, which is in no extra")
    config = ao.Int8WeightOnlyConfig()
    if mapping is not None:
        how = {"granularity": ao.PerGroup(32), "mapping_type": getattr(ao.MappingType, mapping)}
        config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, **how)
    weight, gone = pruned()
    module = torch.nn.Sequential(torch.nn.Linear(512, 128, bias=False)).to(torch.bfloat16)
    module[0].weight.data = weight.to(torch.bfloat16)
    ao.quantize_(module, config)
    assert int((module[0].weight.dequantize()[gone] == 0).sum()) == EVERY


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "BF16", "F16", "Q4_1", "Q5_1"])
def test_types_of_gguf_without_a_minimum_keep_every_zero(name):
    weight, gone = pruned()
    kind = GGMLQuantizationType[name]
    kept = int((dequantize(quantize(weight.numpy(), kind), kind)[gone.numpy()] == 0).sum())
    assert kept <= EVERY // 10 if name.endswith("_1") else kept == EVERY
    line = next(x for x in PAGE.read_text().splitlines() if f"`{name}`" in x)
    assert f"{100 * kept / EVERY:.0f}%" in line
