"""Certified gaps of rows of instances and of pruned models, through the library and the commands."""

import csv
import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from commands import process, run
from strategies import random_gram, random_weight
from tiny_models import save, save_tokenizer, tiny, tokens

from maskopt import (
    NM,
    LayerProblem,
    Solution,
    Unstructured,
    collect_problems,
    lower_bound,
    prune_model,
    solve,
)
from maskopt.certify import GapRecord, bound_layers, by_kind, certify_model
from maskopt.compare import sample_rows
from maskopt.errors import DataError, MaskoptError, ModelError, OptionError
from maskopt.model.report import read_manifest, result_digest
from maskopt.record_file import read_records

TEXT = "the quick brown fox jumps over the lazy dog and runs away again " * 60


@pytest.fixture
def layer():
    gram = random_gram(24, "full", 2)
    return LayerProblem(
        random_weight(5, 24, 1), gram, Unstructured(sparsity=0.5), name="a.0.q_proj"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model, and what pruning made of it."""
    root = tmp_path_factory.mktemp("models")
    save(tiny("llama"), root / "dense")
    save_tokenizer(root / "dense")
    (root / "text.txt").write_text(TEXT)
    prune_model(
        root / "dense",
        pattern=NM(keep=2, of=4),
        calibration=root / "text.txt",
        samples=8,
        seq_len=32,
        output=root / "pruned",
    )
    return root


def test_gaps_are_what_objective_and_bound_say(layer):
    seen = []
    records = bound_layers(
        [layer], rows=3, method="box", solver="swap", on_rows=lambda *event: seen.append(event)
    )
    assert seen == [(0, "a.0.q_proj"), (3, "a.0.q_proj")]  # before it is bounded, and after
    assert len({r.row for r in records}) == 3
    for record in records:
        objective = float(solve(layer.row(record.row), "swap").objective)
        assert record.objective == pytest.approx(objective, rel=1e-9)
        assert 0 <= record.lower_bound <= record.objective
        assert record.gap == pytest.approx(1 - record.lower_bound / record.objective)
    toy = bound_layers([layer], rows=2, columns=10, method="box")
    assert [r.n for r in toy] == [10, 10]
    for record in toy:
        assert record.lower_bound <= record.objective
    with pytest.raises(OptionError, match="rows"):
        bound_layers([layer], rows=0, method="box")
    with pytest.raises(MaskoptError, match="unknown bound"):
        bound_layers([layer], method="bxo")


def test_an_interrupted_run_keeps_its_rows(layer, tmp_path, monkeypatch):
    path = tmp_path / "gaps.jsonl"
    whole = bound_layers([layer], rows=4, method="box", output=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:20]]))
    bounded = []
    from maskopt import certify

    original = certify.lower_bound

    def counting(problem, *args, **options):
        bounded.append(problem.rows)
        return original(problem, *args, **options)

    monkeypatch.setattr(certify, "lower_bound", counting)
    again = bound_layers([layer], rows=4, method="box", output=path)
    assert bounded == [2]
    assert [r.key for r in again] == [r.key for r in whole]
    # a matrix product may sum in another order when fewer rows are left
    expected = [r.objective for r in whole]
    assert [r.objective for r in again] == pytest.approx(expected, rel=1e-12)


def test_a_run_may_be_interrupted_twice(layer, tmp_path):
    path = tmp_path / "gaps.jsonl"

    def run_until(count):
        """Bounds rows one by one (columns make each a part of its own) up to an interrupt."""

        def stop(done, name):
            if done == count:
                raise KeyboardInterrupt

        bound_layers([layer], rows=4, columns=12, method="box", output=path, on_rows=stop)

    with pytest.raises(KeyboardInterrupt):
        run_until(2)
    path.write_text(path.read_text()[:-40])
    for count in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            run_until(count)
        assert len(read_records(path, GapRecord)) == count
    run_until(None)
    assert len(path.read_text().splitlines()) == 4


def test_records_of_other_runs_in_the_file_are_kept(layer, tmp_path):
    path = tmp_path / "gaps.jsonl"
    shift = bound_layers([layer], rows=2, method="shift", output=path)
    box = bound_layers([layer], rows=2, method="box", output=path)
    assert [r.method for r in box] == ["box"] * 2
    assert list(read_records(path, GapRecord).values()) == [*shift, *box]


@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize("forged", ["line", "solution", "another mask"])
def test_forged_bounds_do_not_survive_a_resume(per, forged, layer, tmp_path, caplog):
    layer = layer.under(Unstructured(sparsity=0.5, per=per))
    path = tmp_path / "gaps.jsonl"
    honest = bound_layers([layer], method="box", output=path)
    if forged == "line":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lies = [json.dumps({**r, "lower_bound": r["objective"], "gap": 0.0}) for r in lines]
        path.write_text("\n".join(lies) + "\n")
    for kept in (tmp_path / "gaps.jsonl.rows").iterdir() if forged != "line" else ():
        found = Solution.load(kept)
        if forged == "solution":
            replace(found, lower_bound=found.objective).save(kept)
        else:
            rows = layer if per == "layer" else layer.row(0)
            Solution.of(rows, found.mask.flip(1)).save(kept)
    again = bound_layers([layer], method="box", output=path)
    assert ("dropped" in caplog.text) == (
        forged == "solution" or (forged, per) == ("another mask", "row")
    )
    assert [r.lower_bound for r in again] == pytest.approx([r.lower_bound for r in honest])
    assert list(read_records(path, GapRecord).values()) == again


def test_gaps_of_another_model_are_refused_before_the_models_are_read(models, layer, tmp_path):
    path = tmp_path / "gaps.jsonl"
    bound_layers([layer], method="box", output=path)
    options = {"calibration": models / "text.txt", "method": "box", "samples": 4, "seq_len": 32}
    with pytest.raises(DataError, match=r"gaps\.jsonl: holds gaps of another model; name another"):
        certify_model(
            models / "dense", models / "pruned", output=path, **options,
            on_rows=lambda *event: pytest.fail("it began"),
        )  # fmt: skip
    path.unlink()
    records = certify_model(
        models / "dense", models / "pruned", output=path, layers="layers.0.mlp", **options
    )
    manifest = read_manifest(models / "pruned" / "maskopt-manifest.json")
    assert {r.model for r in records} == {result_digest(manifest)}
    with pytest.raises(DataError, match="another model"):
        bound_layers([layer], method="box", output=path)


@pytest.mark.parametrize("columns", [None, 10, 24])
def test_rows_and_inputs_are_drawn_as_for_a_comparison(layer, columns):
    layers = [layer, LayerProblem(2 * layer.weight, layer.gram, layer.pattern, name="b")]
    sampled = sample_rows(layers, 3, columns=columns, seed=5)
    records = bound_layers(layers, rows=3, columns=columns, method="box", seed=5)
    assert [f"{r.instance}[{r.row}]" for r in records] == [row.name for row in sampled]
    for row, record in zip(sampled, records, strict=True):
        assert row.n == record.n
        assert record.objective == pytest.approx(float(solve(row, "swap").objective), rel=1e-9)


def test_a_bad_number_of_rows_is_refused_before_any_layer_is_made(models):
    def layers():
        raise AssertionError("not to be asked for")
        yield

    for draw in (sample_rows, bound_layers):
        with pytest.raises(OptionError, match="rows must be at least 1, not 0"):
            draw(layers(), rows=0)
    with pytest.raises(OptionError, match="rows"):
        certify_model(models / "no", models / "no", calibration=TEXT, rows_per_layer=0)


def test_the_masks_of_a_pruned_model_are_the_ones_judged(models):
    records = certify_model(
        models / "dense",
        models / "pruned",
        calibration=models / "text.txt",
        rows_per_layer=2,
        method="box",
        samples=8,
        seq_len=32,
    )
    kinds = by_kind(records)
    assert {kind.split(".")[-1] for kind in kinds} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(count == 6 for count, *_ in kinds.values())
    for record in records:
        assert record.pattern == "2:4"
        assert record.objective > 0
        assert 0 <= record.gap <= 1
        assert math.isfinite(record.seconds)


def test_experts_that_see_tokens_in_one_of_the_two_models_alone(tmp_path):
    dense = save(tiny("mixtral"), tmp_path / "dense")
    odd = 0
    for seed in range(6):
        text, out = tokens(2, 4, seed), tmp_path / str(seed)
        prune_model(dense, text, output=out, sparsity=0.7, solver="magnitude", min_tokens=1)
        seen = [
            [name for name, _ in collect_problems(folder, text, sparsity=0.7)]
            for folder in (dense, out)
        ]
        odd += seen[0] != seen[1]
        records = certify_model(dense, out, calibration=text, method="box", rows_per_layer=1)
        assert [record.instance for record in records] == seen[1]
    assert odd > 0


def test_folders_that_do_not_belong_together_are_refused(models, tmp_path):
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    save(other, tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    options = {"calibration": models / "text.txt", "method": "box", "samples": 4, "seq_len": 32}
    for wrong in (tmp_path / "other", models / "pruned"):
        with pytest.raises(ModelError, match="was pruned from another model than"):
            certify_model(wrong, models / "pruned", **options)
    with pytest.raises(MaskoptError):
        certify_model(models / "dense", models / "dense", **options)


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_that_trade_have_the_bound_of_their_layer(jobs, tmp_path):
    """However many jobs there are; and every row the layer's gap."""
    weight = random_weight(6, 24, 3) * 2.0 ** torch.arange(6.0)[:, None]
    pattern = Unstructured(0.5, per="layer")
    layer = LayerProblem(weight, random_gram(24, "full", 4), pattern, name="a")
    out = tmp_path / "gaps.jsonl"
    records = bound_layers([layer], method="box", jobs=jobs, output=out)
    best = solve(layer, "swap").objective
    assert [r.row for r in records] == list(range(6))
    assert sum(r.lower_bound for r in records) <= float(best.sum()) * (1 + 1e-9)
    truth = float(lower_bound(layer, "box").value.sum())
    assert sum(r.lower_bound for r in records) == pytest.approx(truth)
    assert [r.gap for r in records] == pytest.approx([1 - truth / float(best.sum())] * 6)
    assert bound_layers([layer], method="box", jobs=3 - jobs, output=out) == records
    fewer = layer.take([0, 1, 2])
    fewer.name = "a"
    bounds = bound_layers([fewer], method="box", output=out)
    assert not {r.key for r in bounds} & {r.key for r in records}


def test_rows_that_are_alike_have_records_of_their_own():
    layer = LayerProblem(torch.ones(3, 8), random_gram(8, "full", 4), Unstructured(0.5))
    assert [r.row for r in bound_layers([layer], method="box")] == [0, 1, 2]


def test_layers_are_chosen_among_those_that_were_pruned(models, tmp_path):
    text = {"calibration": models / "text.txt", "samples": 4, "seq_len": 32}
    some = tmp_path / "some"
    prune_model(
        models / "dense", pattern=NM(keep=2, of=4), output=some, include=("layers.0",), **text
    )
    records = certify_model(
        models / "dense", some, layers="q_proj", method="box", rows_per_layer=1, **text
    )
    assert [r.instance for r in records] == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(ModelError, match=r"no layer matches 'layers\.1'"):
        certify_model(models / "dense", some, layers="layers.1", method="box", **text)


def test_commands(models, layer, tmp_path):
    layer.save(tmp_path / "layer.npz")
    out = tmp_path / "gaps.csv"
    told = run("bound", tmp_path / "layer.npz", "--method", "box", "--rows", 2, "--output", out)
    assert "q_proj" in told
    assert len(out.read_text().splitlines()) == 3
    common = ("--calibration", models / "text.txt", "--samples", 4, "--seq-len", 32)
    told = run(
        "certify", models / "dense", models / "pruned", "--method", "box", "--rows-per-layer", 1,
        "--layers", "*q_proj", *common,
    )  # fmt: skip
    assert "q_proj" in told
    told = run(
        "compare", models / "dense", "--layers", "*0*q_proj", "--pattern", "0.5", "--rows", 1,
        "--columns", 12, "--solvers", "wanda,swap,exhaustive", *common,
    )  # fmt: skip
    assert "optimal" in told
    missing = process("bound", str(models / "dense"))
    assert missing.returncode == 1
    assert "--calibration" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_cuts_on_the_command_line(layer, tmp_path):
    layer.save(tmp_path / "layer.npz")
    gaps = []
    for name, extra in (("plain", []), ("cuts", ["--cuts", "3"])):
        out = tmp_path / f"{name}.csv"
        run("bound", tmp_path / "layer.npz", "--output", out, *extra)
        with out.open() as lines:
            gaps.append([float(row["gap"]) for row in csv.DictReader(lines)])
    assert all(after <= before for before, after in zip(*gaps, strict=True))
    assert sum(gaps[1]) < sum(gaps[0])
    refused = process("bound", str(tmp_path / "layer.npz"), "--method", "box", "--cuts", "3")
    assert refused.returncode == 1
    assert "bound 'box' has no option 'cuts'" in refused.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_walks_leave_torch_the_threads_that_it_had(models, fails):
    """Through to the end, and where it fails on the way."""
    before = torch.get_num_threads()

    def fail(done, name):
        if fails:
            raise ZeroDivisionError

    def run_it():
        certify_model(
            models / "dense", models / "pruned", calibration=models / "text.txt", method="box",
            rows_per_layer=1, samples=2, seq_len=32, threads=before + 1, layers="layers.0.mlp",
            on_rows=fail,
        )  # fmt: skip

    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        run_it()
    assert torch.get_num_threads() == before
