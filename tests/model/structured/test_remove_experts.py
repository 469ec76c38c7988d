"""Whole experts removed: costs by definition, the exact choice, and samples that are left out."""

import itertools

import pytest
import torch
from outputs import contents
from test_structures import record_of
from tiny_models import save, tiny, tokens

from maskopt import open_job, remove_experts
from maskopt.errors import ModelError
from maskopt.model.experts import costs, mixtures_of
from maskopt.model.walk_options import WalkOptions


def test_costs_are_what_the_outputs_miss():
    """Against each mixture called with the weights of removed experts at zero."""
    model = tiny("mixtral")
    walk = WalkOptions(threads=2)
    with open_job(model, tokens(3), walk) as job, torch.no_grad():
        for block in job.blocks():
            (mixture,) = mixtures_of(job.source.blocks, block.index)
            q, count = costs(block, mixture)
            module, calls = model.get_submodule(mixture.name), []
            handle = module.register_forward_hook(lambda *call, calls=calls: calls.append(call[1:]))
            for sample in range(3):
                block.opened.run(sample, block.opened.samples.states)
            handle.remove()
            assert count == sum(len(args[0]) for args, _ in calls)
            for size in range(mixture.count + 1):
                for gone in itertools.combinations(range(mixture.count), size):
                    p = torch.zeros(mixture.count, dtype=torch.float64)
                    p[list(gone)] = 1
                    missed = 0.0
                    for (hidden, index, weights), out in calls:
                        left = torch.where(torch.isin(index, torch.tensor(gone)), 0.0, weights)
                        missed += float((module(hidden, index, left) - out).double().square().sum())
                    assert float(p @ q @ p) == pytest.approx(missed / count, rel=1e-4, abs=1e-12)
            block.advance()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_choice_is_the_best_by_enumeration(family, tmp_path):
    dense, out = save(tiny(family), tmp_path / "dense", shard="30KB"), tmp_path / "out"
    report = remove_experts(dense, tokens(6), output=out, share=0.5)
    with open_job(dense, tokens(6), WalkOptions()) as job, torch.no_grad():
        block = next(iter(job.blocks()))
        (mixture,) = mixtures_of(job.source.blocks, 0)
        q, _ = costs(block, mixture)
    every = itertools.combinations(range(4), 2)
    by_cost = {gone: float(q[list(gone)][:, list(gone)].sum()) for gone in every}
    best = min(by_cost, key=by_cost.__getitem__)
    assert record_of(out)["kept"][mixture.name] == sorted({0, 1, 2, 3} - set(best))
    assert report.layers[0].error_kept == pytest.approx(by_cost[best], rel=1e-6)


def test_samples_that_are_left_out_are_reported(tmp_path):
    """Of one token alone the first experts' products are beyond float32."""
    model = tiny("mixtral")
    with torch.no_grad():
        embedding, block = model.get_input_embeddings().weight, model.model.layers[0]
        embedding[:, 0], embedding[5] = 0, 0
        embedding[5, 0] = 1
        block.self_attn.o_proj.weight[0] = 0
        block.mlp.experts.gate_up_proj[:, :, 0] = 1e38
    dense, data = save(model, tmp_path / "dense"), tokens(4)
    data[data == 5] = 6
    data[2, 3] = 5
    skip = WalkOptions(skip_bad_samples=True)
    report = remove_experts(dense, data, share=0.25, output=tmp_path / "out", options=skip)
    assert [sample["sample"] for sample in report.bad_samples] == [2]
    assert report.fingerprint["options"]["skip_bad_samples"]
    with pytest.raises(ModelError, match="sample 2 has NaN"):
        remove_experts(dense, data, share=0.25, output=tmp_path / "again")


def test_threads_change_nothing(tmp_path):
    dense = save(tiny("mixtral"), tmp_path / "dense", shard="30KB")
    for threads in (1, 3):
        walk = WalkOptions(threads=threads)
        remove_experts(dense, tokens(6), share=0.25, output=tmp_path / str(threads), options=walk)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
