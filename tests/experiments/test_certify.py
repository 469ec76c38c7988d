"""Certified gaps of rows of instances and of pruned models, through the library and the commands."""

import csv
import json
import math
from dataclasses import replace

import joblib
import pytest
import torch
from commands import run
from strategies import HALF, random_gram, random_weight
from tiny_models import save, save_tokenizer, tiny, tokens

from maskopt import NM, LayerProblem, Solution, Unstructured, collect_problems, prune_model
from maskopt.errors import DataError, MaskoptError, ModelError, OptionError
from maskopt.experiments.compare import sample_rows
from maskopt.experiments.store import read_records
from maskopt.models.checkpoints.report import read_manifest, result_digest
from maskopt.models.evaluation import bound as certify
from maskopt.models.evaluation.bound import GapRecord, bound_layers, by_kind, certify_model
from maskopt.protocol.bounds import lower_bound
from maskopt.protocol.solver import solve

TEXT = "the quick brown fox jumps over the lazy dog and runs away again " * 60


@pytest.fixture
def layer():
    weight, gram = random_weight(5, 24, 1), random_gram(24, "full", 2)
    return LayerProblem(weight, gram, HALF, name="a.0.q_proj")


@pytest.fixture(scope="module")
def models(dense, tmp_path_factory):
    """A tiny model, what pruning made of it, and the text."""
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT)
    words = {"calibration": root / "text.txt", "samples": 8, "seq_len": 32}
    prune_model(dense, sparsity=NM(keep=2, of=4), output=root / "pruned", **words)
    (root / "dense").symlink_to(dense)
    return root


def certified(models, dense="dense", pruned="pruned", **options):
    words = {"calibration": models / "text.txt", "method": "box", "samples": 4, "seq_len": 32}
    return certify_model(models / dense, models / pruned, **{**words, **options})


@pytest.mark.parametrize("columns", [None, 10, 24])
def test_gaps_are_what_objective_and_bound_say_of_rows_drawn_as_for_a_comparison(layer, columns):
    seen = []
    layers = [layer, LayerProblem(2 * layer.weight, layer.gram, layer.pattern, name="b")]
    words = {"columns": columns, "seed": 5}
    sampled = sample_rows(layers, 3, **words)
    listen = {"on_rows": lambda *event: seen.append(event)}
    records = bound_layers(layers, rows=3, method="box", solver="swap", **words, **listen)
    # before a layer is bounded, and after its rows; where each has columns of its own, after each
    counts = [(0, "a.0.q_proj"), (3, "a.0.q_proj"), (3, "b"), (6, "b")]
    assert columns is not None or seen == counts
    assert [f"{r.instance}[{r.row}]" for r in records] == [row.name for row in sampled]
    assert len({r.row for r in records[:3]}) == 3
    for row, record in zip(sampled, records, strict=True):
        assert row.n == record.n
        assert record.objective == pytest.approx(float(solve(row, "swap").objective), rel=1e-9)
        assert 0 <= record.lower_bound <= record.objective
        assert record.gap == pytest.approx(1 - record.lower_bound / record.objective)
    same = LayerProblem(torch.ones(3, 8), random_gram(8, "full", 4), HALF)
    assert [r.row for r in bound_layers([same], method="box")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("columns", "missing", "sizes"), [(None, [2], [4, 6]), (12, [1, 1], [4, 4, 4, 5, 5, 6])]
)
def test_an_interrupted_run_goes_on_and_keeps_records_of_other_runs(
    columns, missing, sizes, layer, tmp_path, monkeypatch
):
    """All rows that are missing are bounded together; where each has columns of its own, one by one."""
    path, bounded, held, original = tmp_path / "gaps.jsonl", [], [], certify.lower_bound
    words = {"rows": 4, "columns": columns, "method": "box", "output": path}
    shift = bound_layers([layer], rows=2, method="shift", output=path)
    whole = bound_layers([layer], **words)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:20]]))

    def counting(problem, *args, **options):
        bounded.append(problem.rows)
        return original(problem, *args, **options)

    monkeypatch.setattr(certify, "lower_bound", counting)
    # the file grows before the next rows begin
    listen = {"on_rows": lambda *event: held.append(len(read_records(path, GapRecord)))}
    again = bound_layers([layer], **words, **listen)
    assert (bounded, held) == (missing, sizes)
    assert [r.key for r in again] == [r.key for r in whole]
    assert list(read_records(path, GapRecord).values()) == [*shift, *again]
    # a matrix product may sum in another order when fewer rows are left
    expected = [r.objective for r in whole]
    assert [r.objective for r in again] == pytest.approx(expected, rel=1e-12)


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
    dropped = forged == "solution" or (forged, per) == ("another mask", "row")
    assert ("dropped" in caplog.text) == dropped
    assert [r.lower_bound for r in again] == pytest.approx([r.lower_bound for r in honest])
    assert list(read_records(path, GapRecord).values()) == again


def test_what_will_not_do_is_refused_before_anything_is_read(models, layer, tmp_path):
    path, other = tmp_path / "gaps.jsonl", tiny("llama")
    bound_layers([layer], method="box", output=path)
    with pytest.raises(DataError, match=r"gaps\.jsonl: holds gaps of another model; name another"):
        certified(models, output=path, on_rows=lambda *event: pytest.fail("it began"))
    path.unlink()
    records = certified(models, output=path, layers="layers.0.mlp")
    manifest = read_manifest(models / "pruned" / "maskopt-manifest.json")
    assert {r.model for r in records} == {result_digest(manifest)}
    with pytest.raises(DataError, match="another model"):
        bound_layers([layer], method="box", output=path)
    with pytest.raises(MaskoptError, match="unknown bound"):
        bound_layers([layer], method="bxo")

    def layers():
        pytest.fail("not to be asked for")
        yield

    for draw in (sample_rows, bound_layers):
        with pytest.raises(OptionError, match="rows must be at least 1, not 0"):
            draw(layers(), rows=0)
    with pytest.raises(OptionError, match="rows"):
        certified(models, "no", "no", rows_per_layer=0)
    # folders that do not belong together
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    save_tokenizer(save(other, tmp_path / "other"))
    for wrong in (tmp_path / "other", "pruned"):
        with pytest.raises(ModelError, match="was pruned from another model than"):
            certified(models, wrong)
    with pytest.raises(MaskoptError):
        certified(models, pruned="dense")


def test_the_masks_of_a_pruned_model_are_the_ones_judged(models, tmp_path):
    records = certified(models, rows_per_layer=2, samples=8)
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
    # layers are chosen among the pruned ones
    some = {"sparsity": NM(keep=2, of=4), "include": ("layers.0",), "output": tmp_path / "some"}
    text = {"calibration": models / "text.txt", "samples": 4, "seq_len": 32}
    prune_model(models / "dense", **some, **text)
    records = certified(models, pruned=tmp_path / "some", layers="q_proj", rows_per_layer=1)
    assert [r.instance for r in records] == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(ModelError, match=r"no layer matches 'layers\.1'"):
        certified(models, pruned=tmp_path / "some", layers="layers.1")


def test_experts_that_see_tokens_in_the_pruned_model_alone(tmp_path):
    dense, out, text = save(tiny("mixtral"), tmp_path / "dense"), tmp_path / "out", tokens(2, 4)
    prune_model(dense, text, output=out, sparsity=0.7, solver="magnitude", min_tokens=1)
    one, other = (
        [name for name, _ in collect_problems(folder, text, sparsity=0.7)]
        for folder in (dense, out)
    )
    assert one != other
    records = certify_model(dense, out, calibration=text, method="box", rows_per_layer=1)
    assert [record.instance for record in records] == other


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_with_a_common_count_have_the_bound_of_their_layer(jobs, tmp_path):
    """However many threads there are; and every row the layer's gap."""
    weight = random_weight(6, 24, 3) * 2.0 ** torch.arange(6.0)[:, None]
    pattern = Unstructured(0.5, per="layer")
    layer = LayerProblem(weight, random_gram(24, "full", 4), pattern, name="a")
    words = {"method": "box", "output": tmp_path / "gaps.jsonl"}
    with joblib.parallel_config(backend="threading"):
        records = bound_layers([layer], jobs=jobs, **words)
        assert bound_layers([layer], jobs=3 - jobs, **words) == records
    best = float(solve(layer, "swap").objective.sum())
    assert [r.row for r in records] == list(range(6))
    truth = float(lower_bound(layer, "box").value.sum())
    assert sum(r.lower_bound for r in records) == pytest.approx(truth)
    assert truth <= best * (1 + 1e-9)
    assert [r.gap for r in records] == pytest.approx([1 - truth / best] * 6)
    fewer = layer.take([0, 1, 2])
    fewer.name = "a"
    assert not {r.key for r in bound_layers([fewer], **words)} & {r.key for r in records}


def test_commands(models, layer, tmp_path):
    layer.save(tmp_path / "layer.npz")
    out, box = tmp_path / "gaps.csv", ("--method", "box")
    assert "q_proj" in run("bound", tmp_path / "layer.npz", *box, "--rows", 2, "--output", out)
    assert len(out.read_text().splitlines()) == 3
    common = ("--calibration", models / "text.txt", "--samples", 4, "--seq-len", 32)
    folders = (models / "pruned", "--original", models / "dense")
    words = ("--rows", 1, "--include", "*q_proj")
    assert "q_proj" in run("bound", *folders, *box, *words, *common)
    assert "optimal" in run(
        "compare", models / "dense", "--include", "*0*q_proj", "--sparsity", "0.5", "--rows", 1,
        "--columns", 12, "--solvers", "wanda,swap,exhaustive", *common,
    )  # fmt: skip
    assert "--calibration" in run("bound", models / "dense", fails=MaskoptError)
    gaps = []
    for extra in ((), ("--cuts", "3")):
        out = tmp_path / f"{len(extra)}.csv"
        run("bound", tmp_path / "layer.npz", "--output", out, *extra)
        with out.open() as lines:
            gaps.append([float(row["gap"]) for row in csv.DictReader(lines)])
    assert all(after <= before for before, after in zip(*gaps, strict=True))
    assert sum(gaps[1]) < sum(gaps[0])
    refused = run("bound", tmp_path / "layer.npz", *box, "--cuts", 3, fails=MaskoptError)
    assert "bound 'box' has no option 'cuts'" in refused


def test_walks_leave_torch_the_threads_that_it_had(models):
    """Through to the end, and where it fails on the way."""
    before = torch.get_num_threads()
    some = {"rows_per_layer": 1, "samples": 2, "layers": "layers.0.mlp", "threads": before + 1}
    certified(models, **some)
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        certified(models, **some, on_rows=lambda *event: 1 / 0)
    assert torch.get_num_threads() == before
