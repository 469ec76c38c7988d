"""Hidden states that go to a device and back beside the computing: the same, whenever copies happen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from outputs import contents
from tiny_models import save, tiny, tokens

from maskopt import prune_model
from maskopt.model import forward, job
from maskopt.model.activations import Activations
from maskopt.model.lanes import Lanes, Upload, lanes_to

CPU = torch.device("cpu")
SHAPE = torch.Size((1, 3, 4))


class Event:
    """A copy that happens at the latest when something waits for it."""

    def __init__(self, happen: Callable[[], Any]) -> None:
        self._happen: Callable[[], Any] | None = happen

    def wait(self) -> None:
        happen, self._happen = self._happen, None
        if happen is not None:
            happen()


class Late(Lanes):
    """A processor that plays a device: every copy waits until something waits for it, and what nothing waits
    for is seen as NaN, or as it was."""

    def __init__(self, device: torch.device = CPU, *, at_once: bool = False) -> None:
        self.device, self.at_once = device, at_once
        self.sent = 0

    def buffer(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    def up(self, host: torch.Tensor, after: Any | None) -> Upload:
        there = torch.full_like(host, torch.nan)
        self.sent += 1

        def happen() -> None:
            if after is not None:
                after.wait()
            there.copy_(host)

        return Upload(there, self._event(happen))

    def take(self, upload: Upload) -> torch.Tensor:
        upload.arrived.wait()
        return upload.there

    def down(self, state: torch.Tensor, host: torch.Tensor, after: Any | None) -> Any:
        now = state.clone()  # what is on the device is not changed before it has been read

        def happen() -> None:
            if after is not None:
                after.wait()
            host.copy_(now)

        return self._event(happen)

    def wait(self, event: Any) -> None:
        event.wait()

    def _event(self, happen: Callable[[], Any]) -> Event:
        event = Event(happen)
        if self.at_once:
            event.wait()
        return event


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dropped", [(), (0,), (1, 2), (4,)])
def test_every_pass_sees_what_the_last_one_left(dropped: tuple[int, ...], at_once: bool) -> None:
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


def test_the_next_state_is_under_way_and_one_that_is_set_meanwhile_is_not_the_old_one() -> None:
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


def test_states_in_a_file_go_there_as_they_are_needed(tmp_path: Path) -> None:
    lanes = Late()
    with Activations([0], SHAPE, torch.float32, tmp_path, lanes) as states:
        states[0] = torch.ones(SHAPE)
        assert torch.equal(states.on(CPU, 0), torch.ones(SHAPE))
    assert lanes.sent == 0


@pytest.mark.parametrize(
    "options", [{}, {"target": "dense", "weights": "refit"}, {"one_pass": True}]
)
def test_a_prune_writes_the_same_bytes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, numbers = save(tiny("llama"), tmp_path / "dense"), count()

    def pruned() -> dict[str, bytes]:
        out = tmp_path / str(next(numbers))
        prune_model(
            dense,
            tokens(5),
            output=out,
            sparsity=0.5,
            solver="wanda",
            min_tokens=1,
            threads=1,
            **options,
        )
        return contents(out)

    without, used = pruned(), list[Late]()

    def late(device: torch.device) -> Late:
        used.append(Late(device))
        return used[-1]

    for module in (forward, job):
        monkeypatch.setattr(module, "lanes_to", late)
    assert pruned() == without
    assert used and all(lanes.sent for lanes in used)  # noqa: PT018


@pytest.mark.cuda
def test_on_a_device() -> None:
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


def test_the_processor_needs_no_lanes() -> None:
    assert lanes_to(CPU) is None
