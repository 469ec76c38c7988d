"""The walk through the blocks, used from outside; the one list of options, and the commands' dialect."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import WordTokenizer, tiny, tokens

import maskopt
from maskopt import NM, MaskoptError, PruneOptions, Unstructured, open_job, prune_model
from maskopt.cli import app
from maskopt.errors import ModelError, OptionError, PatternError
from maskopt.model.blocks import Blocks, choose, matrix
from maskopt.model.options import prune_options
from maskopt.model.plan import plan_prune
from maskopt.model.walk_options import WalkOptions

WANDA: dict[str, Any] = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1}


# The walk -------------------------------------------------------------------------------------


def by_definition(model: Any, name: str, data: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of a layer's inputs in the whole model, float64."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for row in data:
            model(row[None], use_cache=False)
    handle.remove()
    x = torch.cat(seen).reshape(-1, seen[0].shape[-1]).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_user_from_outside_sums_gram_matrices(dense: Path, in_memory: bool) -> None:
    """A use that the walk knows nothing of: traces by layer, and every block's weights doubled."""
    source = tiny("llama") if in_memory else dense
    options = WalkOptions(include=("q_proj,down_proj",), exclude=("layers.2",), threads=1)
    found = {}
    with open_job(source, tokens(), options) as job:
        assert {layer.kind for layer in job.layers} == {"self_attn.q_proj", "mlp.down_proj"}
        for block in job.blocks():
            grams = block.grams()
            for layer in block.layers:
                assert layer.block == block.index
                gram = grams.of(layer.name)
                assert gram is not None
                found[layer.name] = gram.value()
                matrix(job.source.model, layer).mul_(2)
            block.advance()
    assert len(found) == 4
    changed = tiny("llama")
    for index, block in enumerate(Blocks(changed).modules[:2]):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            layer = f"model.layers.{index}.{name}"
            expected = by_definition(changed, layer, tokens())
            assert torch.allclose(found[layer].double(), expected, rtol=1e-4, atol=1e-6)
        for name in ("self_attn.q_proj", "mlp.down_proj"):  # the next block sees this one changed
            block.get_parameter(f"{name}.weight").data.mul_(2)


def test_without_with_the_walk_ends_by_itself(dense: Path) -> None:
    before = torch.get_num_threads()
    job = open_job(dense, tokens(), WalkOptions(threads=before + 1))
    indices = []
    for block in job.blocks():
        assert torch.get_num_threads() == before + 1
        indices.append(block.index)
        block.advance()
    assert indices == [0, 1, 2]
    assert torch.get_num_threads() == before


def test_an_error_inside_the_walk_frees_what_it_holds(dense: Path) -> None:
    before = torch.get_num_threads()
    jobs = []

    def fail() -> None:
        with open_job(dense, tokens(), WalkOptions(threads=before + 1)) as job:
            jobs.append(job)
            for _ in job.blocks():
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before
    assert all(p.is_meta for p in jobs[0].source.blocks.modules.parameters())


def test_a_block_may_not_be_left_behind_nor_looked_at_afterwards() -> None:
    walk = open_job(tiny("llama"), tokens(), WalkOptions()).blocks()
    next(walk)
    with pytest.raises(RuntimeError, match="without advance"):
        next(walk)
    block = next(open_job(tiny("llama"), tokens(), WalkOptions(one_pass=True)).blocks())
    block.grams()
    with pytest.raises(RuntimeError, match="samples have left block 0"):
        block.grams()


def test_a_job_without_text_shows_layers_and_walks_nowhere(dense: Path) -> None:
    with open_job(dense, None, WalkOptions(include=("mlp",))) as job:
        assert len(job.layers) == 9
        with pytest.raises(ModelError, match="no text"):
            next(iter(job.blocks()))


def test_rounds_of_a_true_sequential_walk(dense: Path) -> None:
    with open_job(dense, tokens(), WalkOptions(true_sequential=True)) as job:
        for block in job.blocks():
            kinds = [{layer.kind.split(".")[1] for layer in layers} for layers, _ in block.rounds()]
            assert kinds == [
                {"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"},
            ]  # fmt: skip
            block.advance()


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("gpt_oss", {"mlp.experts.*.gate_up_proj", "mlp.experts.*.down_proj"}),
    ],
)
def test_layers_know_block_and_kind(family: str, kinds: set[str]) -> None:
    blocks = Blocks(tiny(family))
    for index in range(len(blocks)):
        layers = blocks.layers(index)
        assert {layer.block for layer in layers} == {index}
        assert {layer.kind for layer in layers} >= kinds
        for layer in layers:
            assert layer.name.startswith(blocks.prefix(index))
            assert layer.name.rsplit(".", 1)[0] == layer.parent


def test_a_block_without_a_chosen_layer_has_no_gram_matrices() -> None:
    options = WalkOptions(include=("layers.1.mlp",))
    with open_job(tiny("llama"), tokens(), options) as job:
        for block in job.blocks():
            grams = block.grams()
            assert len(grams.order) == len(block.layers) == (3 if block.index else 0)
            block.advance()


def test_the_last_block_of_one_pass_ends_where_its_last_layer_has_its_inputs() -> None:
    model, ran = tiny("llama"), []
    for index, block in enumerate(Blocks(model).modules):
        block.mlp.act_fn.register_forward_hook(lambda *_, i=index: ran.append(i))
    options = WalkOptions(include=("o_proj",), one_pass=True, threads=1)
    with open_job(model, tokens(3), options) as job:
        for block in job.blocks():
            block.grams()
            block.advance()
    assert ran == [0, 0, 0, 1, 1, 1, 2]  # what follows the last layer, in one sample alone


def test_threads_started_after_a_walk_have_as_many_inside_torch() -> None:
    """New threads take the last number that any thread set."""
    before = torch.get_num_threads()
    with open_job(tiny("llama"), tokens(), WalkOptions(threads=before)) as job:
        for block in job.blocks():
            block.advance()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before


PATTERNS = st.sampled_from([
    "q_proj", "mlp", "layers.0", "0", "layers.*.mlp", "model.layers.1.mlp.up_proj", "self_attn.q_proj",
    "model", "proj", "layers.[01]", "?", "*_proj", "1.mlp", "ayers.1", "mlp.", "",
])  # fmt: skip


@given(pattern=PATTERNS)
def test_a_pattern_is_matched_as_a_whole_or_on_a_run_of_parts(pattern: str) -> None:
    layers = Blocks(tiny("llama")).all_layers()
    expected = [
        layer
        for layer in layers
        if any(
            fnmatchcase(layer.name, p)
            for p in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
        )
    ]
    if expected:
        assert choose(layers, [pattern]) == expected
    else:
        with pytest.raises(ModelError, match="no layer matches"):
            choose(layers, [pattern])


@pytest.mark.parametrize("given", ["", ",", [""], [" , ", ""]])
def test_a_filter_that_names_nothing_is_not_none(given: str | list[str]) -> None:
    """As of a variable of the shell that is not set: all layers would be pruned."""
    for name in ("include", "exclude"):
        with pytest.raises(OptionError, match="must not be empty"):
            WalkOptions(**{name: given})
    assert WalkOptions(include=["q_proj,"]).include == ("q_proj",)
    assert WalkOptions(include=[]).include == ()


def test_lists_of_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates and checks name every layer: thousands, of a mixture of experts."""
    layers = Blocks(tiny("llama")).all_layers()
    asked: list[str] = []
    match = lambda name, pattern: (asked.append(pattern), fnmatchcase(name, pattern))[1]  # noqa: E731
    monkeypatch.setattr("maskopt.model.blocks.fnmatchcase", match)
    names = [layer.name for layer in layers]
    assert choose(layers, names[:-1], names[:3]) == layers[3:-1]
    assert asked == []


# Options --------------------------------------------------------------------------------------


def test_options_and_shorthand_are_the_same() -> None:
    options = PruneOptions(NM(keep=2, of=4), "wanda", min_tokens=1, include=["mlp"])  # type: ignore[arg-type]
    one = prune_model(tiny("llama"), tokens(), options)
    two = prune_model(
        tiny("llama"),
        tokens(),
        pattern=NM(keep=2, of=4),
        solver="wanda",
        min_tokens=1,
        include="mlp",
    )
    three = prune_model(tiny("llama"), tokens(), options, seed=3)
    assert one.fingerprint == two.fingerprint
    assert all(torch.equal(mask, two.masks[name]) for name, mask in one.masks.items())
    assert three.fingerprint["options"] == {**one.fingerprint["options"], "seed": 3}


def test_what_decides_the_masks_is_recorded_and_nothing_else() -> None:
    record = PruneOptions(Unstructured(0.5), "wanda").record()
    decides = {f.name: f.metadata["decides"] for f in dataclasses.fields(PruneOptions)}
    assert set(record) == {name for name, what in decides.items() if what == "masks"}
    assert set(decides) - set(record) == {
        "samples", "seq_len", "bos", "text_field", "chat", "device", "dtype", "threads", "activation_memory",
        "max_memory", "trust_remote_code",
    }  # fmt: skip
    for name in decides:
        assert f"\n    {name}: " in (PruneOptions.__doc__ or "")


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (OptionError, "'solvr'; did you mean 'solver'", {"solvr": "swap"}),
        (OptionError, "'sample'; did you mean 'samples'", {"sample": 3}),
        (PatternError, "exactly one", {"pattern": NM(keep=2, of=4)}),
        (OptionError, "`threads` must be a whole number from 1 to 1024, not 0", {"threads": 0}),
        (OptionError, "not -2", {"threads": -2}),
        (OptionError, "not 100000", {"threads": 100_000}),
        (OptionError, "not 1.5", {"threads": 1.5}),
        (OptionError, "`samples` must be a whole number ≥ 1, not 0", {"samples": 0}),
        (OptionError, "`seq_len` must be a whole number ≥ 1, not -1", {"seq_len": -1}),
        (OptionError, "`min_tokens` must be a whole number ≥ 1", {"min_tokens": 0}),
        (OptionError, "`seed` must be a whole number from 0 to", {"seed": -1}),
        (OptionError, "`seed` must be a whole number from 0 to", {"seed": "x"}),
        (OptionError, "`holdout` must be a number [0, 1), not '0.2'", {"holdout": "0.2"}),
        (OptionError, "`all_experts` must be true or false", {"all_experts": "no"}),
        (OptionError, "'lots' is no amount of memory", {"max_memory": "lots"}),
        (OptionError, "`max_memory` must be", {"max_memory": -1}),
        (OptionError, "`activation_memory` must be", {"activation_memory": 1.5}),
        (OptionError, "`pattern` must be", {"sparsity": None, "pattern": "2:4"}),
        (OptionError, "`solver_options` must be", {"solver_options": "x"}),
    ],
)
def test_options_that_cannot_be(error: type[Exception], message: str, given: Any) -> None:
    for use in (prune_model, maskopt.collect_problems, plan_prune):
        with pytest.raises(error) as caught:
            use(tiny("llama", layers=1), tokens(), **{**WANDA, **given})  # type: ignore[operator]
        assert isinstance(caught.value, MaskoptError)
        assert message in str(caught.value)


def test_amounts_of_memory_may_have_units() -> None:
    options = PruneOptions(Unstructured(0.5), max_memory="16GiB", activation_memory="500MB")
    assert (options.max_memory, options.activation_memory) == (2**34, 500 * 10**6)


def test_perplexity_refuses_options_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="`threads`"):
        maskopt.perplexity(tiny("llama"), tokens(), threads=0)
    with pytest.raises(OptionError, match="no option is called 'samples'"):
        maskopt.perplexity(tiny("llama"), tokens(), samples=3)


def test_an_option_given_twice_changes_that_one_alone() -> None:
    options = prune_options(PruneOptions(Unstructured(0.5), samples=7), {"sparsity": 0.25})
    assert (options.pattern, options.samples) == (Unstructured(0.25), 7)


# The commands ---------------------------------------------------------------------------------


def parameters(name: str) -> dict[str, tuple[Any, ...]]:
    """Of a command: flags and kind by the parameter's name."""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    kinds = ("is_flag", "multiple", "nargs")
    return {
        p.name: (*p.opts, *p.secondary_opts, *(getattr(p, kind, None) for kind in kinds))
        for p in command.params
    }


def test_plan_takes_every_option_of_prune() -> None:
    assert parameters("plan") == parameters("prune")
    fields = {f.name for f in dataclasses.fields(PruneOptions)}
    assert fields <= parameters("prune").keys()


def test_one_dialect() -> None:
    """What two commands call alike is read alike."""
    prune = parameters("prune")
    for name in ("compare", "bound", "extract", "certify", "eval"):
        found = parameters(name)
        for shared in found.keys() & prune.keys() - {"out", "model", "calibration", "solver"}:
            assert found[shared] == prune[shared], (name, shared)
    for name in ("compare", "bound", "extract"):
        assert {"sparsity", "pattern", "include", "exclude"} <= parameters(name).keys()
    assert {"include", "exclude"} <= parameters("certify").keys()
    for name in ("compare", "bound", "extract", "certify", "eval"):
        assert {"bos", "seq_len", "text_field", "threads"} <= parameters(name).keys()


def test_a_prune_command_with_plan_in_its_place(dense: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rest = [
        dense, "--pattern", "0.5", "--solver", "wanda", "--calibration", data, "--output", out,
        "--text-field", "body", "--seed", 3, "--all-experts", "--min-tokens", 1, "--shrink", 0.1,
        "--skip-bad-samples", "--overwrite", "--layers", "q_proj,mlp", "--exclude", "layers.1,up_proj",
    ]  # fmt: skip
    shown = run("plan", *rest)
    assert "self_attn.q_proj" in shown
    assert "up_proj" not in shown
    assert "1,536" in shown  # half of two gate projections of 48 × 32
    assert not out.exists()
    run("prune", *rest)
    assert "not empty" in run("plan", *[x for x in rest if x != "--overwrite"], fails=ModelError)


def test_patterns_and_layers_are_read_alike(dense: Path, data: Path, tmp_path: Path) -> None:
    spellings = [
        ["--include", "q_proj", "--include", "layers.0.mlp.*"],
        ["--include", "q_proj, layers.0.mlp.*"],
        ["--layers", "q_proj,layers.0.mlp.*"],
    ]
    common = [dense, "--solvers", "wanda", "--rows", 1, "--calibration", data]
    results = set()
    for number, (pattern, names) in enumerate(
        (pattern, names)
        for pattern in (["--sparsity", "0.5"], ["--pattern", "0.5"])
        for names in spellings
    ):
        out = tmp_path / f"{number}.csv"
        run("compare", *common, *pattern, *names, "--output", out)
        lines = out.read_text().splitlines()
        assert len(lines) == 1 + 3 + 3
        results.add(tuple(line.split(",")[0] for line in lines))
    assert len(results) == 1
    said = run("compare", *common, "--sparsity", 0.5, "--pattern", "2:4", fails=PatternError)
    assert "--sparsity (0.6) or a --pattern (2:4), exactly one" in said


def test_errors_name_flags_that_the_command_has(dense: Path, data: Path) -> None:
    said = run(
        "prune", dense, "--sparsity", 0.5, "--calibration", data, "--output", "x", "--threads", 0,
        fails=OptionError,
    )  # fmt: skip
    assert said == "--threads must be a whole number from 1 to 1024, not 0"
    assert "--threads must be" in run(
        "eval", dense, "--text", data, "--threads", 100_000, fails=OptionError
    )
    with pytest.raises(OptionError, match="`threads` must"):
        prune_model(dense, WordTokenizer(), calibration=data, threads=0, **WANDA)
