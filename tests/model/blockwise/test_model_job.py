"""The walk through the blocks, used from outside; the one list of options; states on a device."""

import re
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

import pytest
import torch
from commands import run, shows
from forging import fails
from prunes import WANDA, contents, prune
from tiny_models import WordTokenizer, inputs_of, tiny, tokens

import maskopt
from maskopt import NM, MaskoptError, PruneOptions, Unstructured, open_job, prune_model
from maskopt.core.fields import options_of
from maskopt.errors import ModelError, OptionError, PatternError
from maskopt.models.architecture.blocks import Blocks, choose, matrix
from maskopt.models.blockwise import forward, job
from maskopt.models.blockwise.activations import Activations, Lanes, Upload, lanes_to
from maskopt.models.options.prune import prune_options
from maskopt.models.options.walk import WalkOptions
from maskopt.models.pruning.plan import plan_prune

CPU, SHAPE = torch.device("cpu"), torch.Size((1, 3, 4))
MOVED = [{"target": "dense", "update": "least-squares"}, {"calibrate_on": "dense"}]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_user_from_outside_sums_gram_matrices(dense_folder, in_memory):
    source = tiny("llama") if in_memory else dense_folder
    options = WalkOptions(include=("q_proj,down_proj",), exclude=("layers.2",), threads=1)
    kinds, found = {"self_attn.q_proj", "mlp.down_proj"}, {}
    with open_job(source, tokens(), options) as job:
        assert {layer.kind for layer in job.layers} == kinds
        for block in job.blocks():
            grams = block.grams()
            for layer in block.layers:
                assert layer.block == block.index
                found[layer.name] = grams.of(layer.name).value()
                matrix(job.source.model, layer).mul_(2)
            block.advance()
    assert len(found) == 4
    changed = tiny("llama")
    for index in range(2):
        layers = {f"model.layers.{index}.{kind}" for kind in kinds}
        for layer in layers:
            x = inputs_of(changed, layer, tokens())
            assert torch.allclose(found[layer].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        for layer in layers:  # the next block sees this one changed
            changed.get_parameter(f"{layer}.weight").data.mul_(2)


def test_a_walk_ends_with_the_threads_that_it_found_and_follows_the_blocks(dense_folder):
    """Without `with` by itself, and where an error leaves it, with what it holds in memory."""
    before, jobs = torch.get_num_threads(), []
    options = WalkOptions(threads=before + 1)
    for index, block in enumerate(open_job(dense_folder, tokens(), options).blocks()):
        assert (torch.get_num_threads(), block.index) == (before + 1, index)
        block.advance()
    assert (torch.get_num_threads(), index) == (before, 2)
    with ThreadPoolExecutor(1) as pool:  # new threads take the last number that any thread set
        assert pool.submit(torch.get_num_threads).result() == before

    def fail():
        with open_job(dense_folder, tokens(), options) as job:
            jobs.append(job)
            for _ in job.blocks():
                raise ZeroDivisionError

    fails(ZeroDivisionError, None, fail)
    assert torch.get_num_threads() == before
    assert all(p.is_meta for p in jobs[0].source.blocks.modules.parameters())
    # a block may not be left behind, nor looked at afterwards
    walk = open_job(tiny("llama"), tokens(), WalkOptions()).blocks()
    next(walk)
    fails(RuntimeError, "without advance", next, walk)
    block = next(open_job(tiny("llama"), tokens(), WalkOptions(calibrate_on="dense")).blocks())
    block.grams()
    fails(RuntimeError, "samples have left block 0", block.grams)
    # a job without text shows layers and walks nowhere
    with open_job(dense_folder, None, WalkOptions(include=("mlp",))) as job:
        assert len(job.layers) == 9
        fails(ModelError, "no text", next, iter(job.blocks()))


def test_layers_rounds_a_block_without_a_chosen_layer_and_the_end_of_the_last_block():
    for family, kinds in (
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("gpt_oss", {"mlp.experts.*.gate_up_proj", "mlp.experts.*.down_proj"}),
    ):
        blocks = Blocks(tiny(family))
        for index in range(len(blocks)):
            layers = blocks.layers(index)
            assert {layer.block for layer in layers} == {index}
            assert {layer.kind for layer in layers} >= kinds
            for layer in layers:
                assert layer.name.startswith(blocks.prefix(index))
                assert layer.name.rsplit(".", 1)[0] == layer.parent
    rounds = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    with open_job(tiny("llama"), tokens(), WalkOptions(true_sequential=True)) as job:
        for block in job.blocks():
            kinds = [{layer.kind.split(".")[1] for layer in layers} for layers, _ in block.rounds()]
            assert kinds == rounds
            block.advance()
    options = WalkOptions(include=("layers.1.mlp",))
    with open_job(tiny("llama"), tokens(), options) as job:
        for block in job.blocks():
            assert len(block.grams().leaders) == len(block.layers) == (3 if block.index == 1 else 0)
            block.advance()
    # in one pass the last block ends where its last layer has its inputs
    model, ran = tiny("llama"), []
    for index, block in enumerate(Blocks(model).modules):
        block.mlp.act_fn.register_forward_hook(lambda *_, i=index: ran.append(i))
    options = WalkOptions(include=("o_proj",), calibrate_on="dense", threads=1)
    with open_job(model, tokens(3), options) as job:
        for block in job.blocks():
            block.grams()
            block.advance()
    assert ran == [0, 0, 0, 1, 1, 1, 2]  # what follows the last layer, in one sample alone


def test_filters(monkeypatch):
    """One that names nothing, as a variable that is not set, is not none. Lists of names are looked up."""
    layers, asked = Blocks(tiny("llama")).all_layers(), []
    patterns = "q_proj mlp layers.0 0 layers.*.mlp model.layers.1.mlp.up_proj self_attn.q_proj"
    patterns += " model proj layers.[01] ? *_proj 1.mlp ayers.1 mlp. "
    for pattern in patterns.split(" "):  # a whole or a run of parts; the last one is empty
        forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
        expected = [layer for layer in layers if any(fnmatchcase(layer.name, p) for p in forms)]
        if expected:
            assert choose(layers, [pattern]) == expected
        else:
            fails(ModelError, "no layer matches", choose, layers, [pattern])
    for nothing in ("", ",", [""], [" , ", ""]):
        for name in ("include", "exclude"):
            fails(OptionError, "must not be empty", WalkOptions, **{name: nothing})
    assert WalkOptions(include=["q_proj,"]).include == ("q_proj",)
    assert WalkOptions(include=[]).include == ()
    match = lambda name, pattern: (asked.append(pattern), fnmatchcase(name, pattern))[1]  # noqa: E731
    monkeypatch.setattr("maskopt.models.architecture.blocks.fnmatchcase", match)
    names = [layer.name for layer in layers]
    assert choose(layers, names[:-1], names[:3]) == layers[3:-1]
    assert asked == []


def test_options_and_shorthand_are_the_same():
    given = {"sparsity": NM(keep=2, of=4), "solver": "wanda", "min_tokens": 1, "include": "mlp"}
    options = PruneOptions(**{**given, "include": ["mlp"]})
    calls = ((options,), {}), ((), given), ((options,), {"seed": 3})
    one, two, three = (prune_model(tiny("llama"), tokens(), *a, **named) for a, named in calls)
    assert one.fingerprint == two.fingerprint
    assert all(torch.equal(mask, two.masks[name]) for name, mask in one.masks.items())
    assert three.fingerprint["options"] == {**one.fingerprint["options"], "seed": 3}
    # they have units, and one that is given twice changes alone
    options = PruneOptions(Unstructured(0.5), max_memory="16GiB", activation_memory="500MB")
    assert (options.max_memory, options.activation_memory) == (2**34, 500 * 10**6)
    options = prune_options(PruneOptions(Unstructured(0.5), samples=7), {"sparsity": 0.25})
    assert (options.pattern, options.samples) == (Unstructured(0.25), 7)
    # what decides the masks is recorded, and nothing else
    record = PruneOptions(Unstructured(0.5), "wanda").record()
    decides = {one.name: one.recorded for one in options_of(PruneOptions)}
    assert set(record) == {name for name, recorded in decides.items() if recorded}
    assert set(decides) - set(record) == {
        "samples", "seq_len", "bos", "text_field", "chat", "device", "dtype", "threads", "activation_memory",
        "max_memory", "trust_remote_code",
    }  # fmt: skip
    for name in decides:
        assert f"\n    {name}: " in (PruneOptions.__doc__ or "")


def test_options_that_cannot_be():
    model = tiny("llama", layers=1)
    for message, given in (
        ("'solvr'; did you mean 'solver'", {"solvr": "swap"}),
        ("'sample'; did you mean 'samples'", {"sample": 3}),
        ("`threads` must be a whole number or None [1, 1024], not 0", {"threads": 0}),
        *((f"not {threads}", {"threads": threads}) for threads in (-2, 100000, 1.5)),
        ("`samples` must be a whole number ≥ 1, not 0", {"samples": 0}),
        ("`seq_len` must be a whole number ≥ 1, not -1", {"seq_len": -1}),
        ("`min_tokens` must be a whole number ≥ 1", {"min_tokens": 0}),
        ("`seed` must be a whole number [0, ", {"seed": -1}),
        ("`seed` must be a whole number [0, ", {"seed": "x"}),
        ("`holdout` must be a number [0, 1), not '0.2'", {"holdout": "0.2"}),
        ("`all_experts` must be true or false", {"all_experts": "no"}),
        ("'lots' is no amount of memory", {"max_memory": "lots"}),
        ("`max_memory` must be", {"max_memory": -1}),
        ("`activation_memory` must be", {"activation_memory": 1.5}),
        ("`sparsity` must be like 0.6, 60% or 2:4", {"sparsity": "2/4"}),
        ("`sparsity` is missing", {"sparsity": None}),
        ("`solver_options` must be", {"solver_options": "x"}),
    ):
        error = PatternError if "sparsity" in given else OptionError
        assert issubclass(error, MaskoptError)
        for use in (prune_model, maskopt.collect_problems, plan_prune):
            fails(error, re.escape(message), use, model, tokens(), **{**WANDA, **given})


def test_a_prune_command_with_dry_run_added(dense, data, tmp_path):
    out = tmp_path / "out"
    words = "--sparsity 0.5 --solver wanda --text-field body --seed 3 --all-experts --min-tokens 1"
    words += " --gram-shrinkage 0.1 --skip-bad-samples"
    words += " --include q_proj,mlp --exclude layers.1,up_proj"
    rest = [dense, "--calibration", data, "--output", out, "--overwrite", *words.split()]
    shown = run("prune", "--dry-run", *rest)
    shows(shown, "self_attn.q_proj", "1,536")  # half of two gate projections of 48 × 32
    assert "up_proj" not in shown
    assert not out.exists()
    run("prune", *rest)
    rest.remove("--overwrite")
    assert "not empty" in run("prune", "--dry-run", *rest, fails=ModelError)


def test_patterns_and_layers_are_read_in_one_way_and_errors_name_flags(dense, data, tmp_path):
    common, results = [dense, "--solvers", "wanda", "--rows", 1, "--calibration", data], []
    for share, *include in (("0.5", "q_proj", "layers.0.mlp.*"), ("50%", "q_proj, layers.0.mlp.*")):
        words = ["--sparsity", share, *(word for name in include for word in ("--include", name))]
        run("compare", *common, *words, "--output", out := tmp_path / f"{share}.csv")
        results.append([line.split(",")[0] for line in out.read_text().splitlines()])
        assert len(results[0]) == 1 + 3 + 3
    assert results[0] == results[1]
    pruned = ["prune", dense, "--sparsity", 0.5, "--calibration", data, "--output", "x"]
    said = run(*pruned, "--threads", 0, fails=OptionError)
    assert said == "--threads must be a whole number or None [1, 1024], not 0"
    said = run("eval", dense, "--text", data, "--threads", 100_000, fails=OptionError)
    assert "--threads must be" in said
    fails(OptionError, "`threads` must", prune, dense, None, data=WordTokenizer(), threads=0)


# --- states that go to a device and back
class Event:
    """A copy that happens at the latest when something waits for it."""

    def __init__(self, source, target, after):
        self.ahead = [(source, target, after)]

    def synchronize(self):
        while self.ahead:
            source, target, after = self.ahead.pop()
            if after is not None:
                after.synchronize()
            target.copy_(source)


class Late(Lanes):
    """A processor that plays a device: what nothing waits for is seen as NaN, or with its old values."""

    def __init__(self, device=CPU, *, at_once=False):
        self.device, self.at_once, self.sent = device, at_once, 0

    def buffer(self, shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    def up(self, host, after):
        there = torch.full_like(host, torch.nan)
        self.sent += 1
        return Upload(there, self.copy(host, there, after))

    def take(self, upload):
        upload.arrived.synchronize()
        return upload.there

    def down(self, state, host, after):
        # what is on the device is not changed before it has been read
        return self.copy(state.clone(), host, after)

    def copy(self, source, target, after):
        event = Event(source, target, after)
        if self.at_once:
            event.synchronize()
        return event


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dropped", [(), (0,), (1, 2), (4,)])
def test_every_pass_sees_what_the_last_one_left(dropped, at_once):
    states = Activations(range(5), SHAPE, torch.float32, lanes=Late(at_once=at_once))
    for sample in range(5):
        states[sample] = torch.full(SHAPE, float(sample))
    for passes in range(3):
        for sample in range(5):
            if sample not in dropped:
                there = states.on(CPU, sample)
                states[sample] = there + 1
                there.fill_(torch.nan)  # a block may change its input in place
        for sample in range(5):
            expected = sample + (passes + 1) * (sample not in dropped)
            assert torch.equal(states[sample], torch.full(SHAPE, float(expected)))


def test_the_next_state_is_under_way_and_one_that_is_set_meanwhile_is_not_the_old_one(tmp_path):
    lanes = Late()
    states = Activations([3, 5], SHAPE, torch.float32, lanes=lanes)
    states[3], states[5] = torch.zeros(SHAPE), torch.ones(SHAPE)
    states.on(CPU, 3)
    assert lanes.sent == 2
    states[5] = torch.full(SHAPE, 7.0)
    assert torch.equal(states.on(CPU, 5), torch.full(SHAPE, 7.0))
    assert torch.equal(states.on(CPU, 3), torch.zeros(SHAPE))
    states.on(CPU, 3)  # a pass that is repeated
    assert torch.equal(states[5], torch.full(SHAPE, 7.0))
    lanes = Late()
    with Activations([0], SHAPE, torch.float32, tmp_path, lanes) as states:
        states[0] = torch.ones(SHAPE)
        assert torch.equal(states.on(CPU, 0), torch.ones(SHAPE))
    assert lanes.sent == 0  # states in a file go there when they are needed
    assert lanes_to(CPU) is None  # the processor needs none


TRAINED = {"update": "blockwise", "holdout": 0.3, "training": {"epochs": 1}}
MOVED = [TRAINED, {"calibrate_on": "dense"}]


@pytest.mark.parametrize("options", MOVED)
def test_a_prune_writes_the_same_bytes(options, dense_folder, tmp_path, monkeypatch):
    given, used = {"data": tokens(5), "threads": 1, **options}, []
    prune(dense_folder, tmp_path / "without", **given)
    late = lambda device: used.append(Late(device)) or used[-1]  # noqa: E731
    for module in (forward, job):
        monkeypatch.setattr(module, "lanes_to", late)
    prune(dense_folder, tmp_path / "with", **given)
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    assert used
    assert all(lanes.sent for lanes in used)


@pytest.mark.cuda
def test_on_a_device():
    device = torch.device("cuda")
    lanes = lanes_to(device)
    shape = torch.Size((1, 2048, 4096))
    states = Activations(range(6), shape, torch.bfloat16, lanes=lanes)
    for sample in range(6):
        states[sample] = torch.full(shape, float(sample), dtype=torch.bfloat16, device=device)
    for _ in range(20):
        for sample in range(6):
            states[sample] = states.on(device, sample) + 1
    for sample in range(6):
        assert torch.equal(states[sample], torch.full(shape, sample + 20.0, dtype=torch.bfloat16))
