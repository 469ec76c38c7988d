"""Hidden states that go to a device and back during the computing: the same, whenever copies happen."""

import pytest
import torch
from outputs import contents
from tiny_models import tokens

from maskopt import prune_model
from maskopt.models.blockwise import forward, job
from maskopt.models.blockwise.activations import Activations, Lanes, Upload, lanes_to

CPU = torch.device("cpu")
SHAPE = torch.Size((1, 3, 4))


class Event:
    """A copy that happens at the latest when something waits for it."""

    def __init__(self, source, target, after):
        self.ahead = [(source, target, after)]

    def wait(self):
        while self.ahead:
            source, target, after = self.ahead.pop()
            if after is not None:
                after.wait()
            target.copy_(source)


class Late(Lanes):
    """A processor that plays a device: every copy waits until something waits for it, and what nothing waits
    for is seen as NaN, or with its old values."""

    def __init__(self, device=CPU, *, at_once=False):
        self.device, self.at_once, self.sent = device, at_once, 0

    def buffer(self, shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    def up(self, host, after):
        there = torch.full_like(host, torch.nan)
        self.sent += 1
        return Upload(there, self.copy(host, there, after))

    def take(self, upload):
        upload.arrived.wait()
        return upload.there

    def down(self, state, host, after):
        # what is on the device is not changed before it has been read
        return self.copy(state.clone(), host, after)

    def wait(self, event):
        event.wait()

    def copy(self, source, target, after):
        event = Event(source, target, after)
        if self.at_once:
            event.wait()
        return event


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dropped", [(), (0,), (1, 2), (4,)])
def test_every_pass_sees_what_the_last_one_left(dropped, at_once):
    lanes = Late(at_once=at_once)
    states = Activations(range(5), SHAPE, torch.float32, lanes=lanes)
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
    assert lanes.sent == 0  # states in a file go there as they are needed
    assert lanes_to(CPU) is None  # the processor needs none


@pytest.mark.parametrize(
    "options", [{"target": "dense", "update": "least-squares"}, {"calibrate_on": "dense"}]
)
def test_a_prune_writes_the_same_bytes(options, dense_folder, tmp_path, monkeypatch):
    given = {"sparsity": 0.5, "solver": "wanda", "min_tokens": 1, "threads": 1, **options}

    def pruned(name):
        prune_model(dense_folder, tokens(5), output=tmp_path / name, **given)
        return contents(tmp_path / name)

    without, used = pruned("without"), []
    for module in (forward, job):
        monkeypatch.setattr(
            module, "lanes_to", lambda device: used.append(Late(device)) or used[-1]
        )
    assert pruned("with") == without
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
