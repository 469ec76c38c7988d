"""No certificate that does not fit, is out of range or was changed on disk gets past."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from certificates import certificate, layer, triangles, unclamped

from maskopt import Certificate, Solution, solve, verify
from maskopt.certificate import Cuts
from maskopt.errors import ProblemError, VerificationError
from maskopt.files import write_arrays

TAU = torch.ones(2, dtype=torch.float64)
FIVE = {
    "index": torch.tensor([[0, 1, 2, 3, 4], [3, 2, 1, 0, -1]]),
    "sign": torch.tensor([[1, -1, 1, 1], [1, 1, 1, -1]]),
}
PAIRED = {"index": FIVE["index"][:, :4], "sign": FIVE["sign"][:, :3]}
GOOD = Cuts(torch.tensor([[-1, 0, 7], [3, 2, 1]]), torch.tensor([[1, -1], [-1, -1]]), TAU)


@pytest.mark.parametrize(
    ("part", "bad", "message"),
    [
        ("diagonal", lambda c: c.diagonal.float(), "diagonal must be float64"),
        ("diagonal", lambda c: c.diagonal[:1], "diagonal must be float64"),
        ("diagonal", lambda c: c.diagonal[:, :7], "diagonal must be float64"),
        ("penalty", lambda c: c.penalty.float(), "penalty must be float64"),
        ("penalty", lambda c: c.penalty[:, :1], "penalty must be float64"),
        ("point", lambda c: c.point[:, :1], "point must be float64"),
        ("point", lambda c: c.point / (torch.arange(8) != 3), "point holds NaN or infinite"),
        ("penalty", lambda c: c.penalty / torch.tensor([0.0, 1.0]), "penalty holds NaN or inf"),
        ("product", lambda c: torch.zeros(2, 8, 2).double(), "product must be float64"),
        ("product", lambda c: torch.zeros(2, 2, 8), "product must be float64"),
        ("product", lambda c: torch.full((2, 2, 8), torch.nan).double(), "product holds NaN"),
        ("cuts", lambda c: [GOOD], "1 cut lists for 2 rows"),
        ("cuts", lambda c: [None, GOOD, GOOD], "3 cut lists for 2 rows"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(part, bad, message):
    problem = layer()
    given = certificate(problem)
    with pytest.raises(VerificationError, match=message):
        replace(given, **{part: bad(given)}).check(problem)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multiplier": TAU.float()}, "wrong shape or type"),
        ({"multiplier": TAU[:1]}, "wrong shape or type"),
        ({"multiplier": TAU[:, None]}, "wrong shape or type"),
        ({"multiplier": TAU[0]}, "wrong shape or type"),
        ({"index": GOOD.index[:, :2]}, "wrong shape or type"),
        ({"index": GOOD.index.flatten()}, "wrong shape or type"),
        ({"sign": GOOD.sign[:, :1]}, "wrong shape or type"),
        ({"sign": GOOD.sign[:1]}, "wrong shape or type"),
        ({"index": GOOD.index.float()}, "not whole numbers"),
        ({"sign": GOOD.sign.float()}, "not whole numbers"),
        ({"index": torch.tensor([[-3, 0, 7], [3, 2, 1]])}, "outside the row"),
        ({"index": torch.tensor([[-2, 0, 7], [3, 2, 1]])}, "no odd number of inputs"),
        ({"index": torch.tensor([[-2, -2, 7], [3, 2, 1]])}, "no odd number of inputs, or one"),
        ({"index": torch.tensor([[-2, -2, -2], [3, 2, 1]])}, "no odd number of inputs"),
        (PAIRED, "no odd number of inputs"),
        ({**PAIRED, "index": torch.tensor([[0, 1, 2, 0], [3, 2, 1, -2]])}, "no odd number"),
        ({**FIVE, "index": torch.tensor([[0, 1, 2, 3, 0], [3, 2, 1, 0, -1]])}, "twice"),
        ({**FIVE, "sign": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}, "not ±1"),
        ({**FIVE, "sign": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 3]])}, "not ±1"),
        ({"index": torch.tensor([[-1, 0, 7], [3, 2, 8]])}, "outside the row"),
        ({"index": torch.tensor([[1, 1, 7], [3, 2, 1]])}, "twice"),
        ({"index": torch.tensor([[7, 1, 7], [3, 2, 1]])}, "twice"),
        ({"index": torch.tensor([[-1, 1, 7], [3, 2, 2]])}, "twice"),
        ({"index": torch.tensor([[-1, -1, 7], [3, 2, 1]])}, "twice"),
        ({"sign": torch.tensor([[1, 0], [1, 1]])}, "not ±1"),
        ({"sign": torch.tensor([[1, -1], [-2, 1]])}, "not ±1"),
        ({"multiplier": TAU * torch.tensor([1.0, -1e-9]).double()}, "negative multiplier"),
        ({"multiplier": TAU * torch.tensor([1.0, torch.inf]).double()}, "negative multiplier"),
        ({"multiplier": TAU * torch.nan}, "negative multiplier"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("row", [0, 1])
def test_cuts_that_are_no_inequalities_of_all_masks_are_refused(changes, message, row):
    problem = layer()
    cuts = [None, None]
    cuts[row] = replace(GOOD, **changes)
    given = replace(certificate(problem), cuts=cuts)
    with pytest.raises(VerificationError, match=rf"row {row} .*{message}"):
        given.check(problem)


def test_every_whole_number_and_a_multiplier_of_zero_make_a_cut():
    problem = layer()
    given = certificate(problem)
    for kind in (torch.int8, torch.int16, torch.int32, torch.int64):
        cuts = Cuts(GOOD.index.to(kind), GOOD.sign.to(kind), 0 * TAU)
        value = replace(given, cuts=[cuts, None]).check(problem)
        torch.testing.assert_close(value, given.check(problem))
    none = Cuts(GOOD.index[:0], GOOD.sign[:0], TAU[:0])
    torch.testing.assert_close(
        replace(given, cuts=[none, none]).check(problem), given.check(problem)
    )


@pytest.mark.parametrize("size", [1e100, 1e160, 1e300])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("part", ["diagonal", "penalty", "point", "product", "cuts"])
def test_numbers_near_the_end_of_float64_prove_nothing_and_break_nothing(part, sign, size):
    problem = layer()
    given = certificate(problem, product=True)
    huge = (
        [Cuts(GOOD.index, GOOD.sign, TAU * size), None]
        if part == "cuts"
        else torch.full_like(getattr(given, part), sign * size)
    )
    value = replace(given, **{part: huge}).check(problem)
    assert bool((value <= solve(problem, "exhaustive").objective).all())
    assert bool((value >= 0).all())


@pytest.mark.parametrize("cuts", ["none", "absent", "some", "empty"])
def test_a_certificate_comes_back_from_disk_and_proves_the_same(cuts, tmp_path):
    problem = layer(rows=3)
    given = certificate(problem, product=True)
    nothing = Cuts(GOOD.index[:0], GOOD.sign[:0], TAU[:0])
    lists = {
        "none": None,
        "absent": [None] * 3,
        "some": [None, triangles(), GOOD],
        "empty": [nothing] * 3,
    }
    given = replace(given, cuts=lists[cuts])
    given.save(tmp_path / "c.npz")
    read = Certificate.load(tmp_path / "c.npz")
    assert torch.equal(read.product, given.product)
    for row in range(3):
        assert unclamped(read, problem, row) == unclamped(given, problem, row)
    assert torch.equal(read.check(problem), given.check(problem))


@pytest.mark.parametrize(
    "changes",
    [
        {"diagonal": np.array(["a"])},
        {"diagonal": np.zeros((2, 8), ">f8")},
        {"cut_count": np.array([1, 1])},
        {"cut_count": np.array(["1", "1"])},
        {"cut_count": np.array([3, -1])},
        {"cut_count": np.array([[1], [1]])},
        {"cut_count": np.array([1.0, 1.0])},
        {"cut_count": np.array([1, 7])},
    ],
    ids=str,
)
def test_a_file_of_another_making_is_named(changes, tmp_path):
    arrays = {
        "diagonal": np.zeros((2, 8)), "penalty": np.zeros((2, 2)), "point": np.zeros((2, 8)),
    }  # fmt: skip
    if "cut_count" in changes and len(changes) == 1 and changes["cut_count"].tolist() != [1, 1]:
        changes = {
            **changes,
            "cut_index": GOOD.index.numpy(),
            "cut_sign": GOOD.sign.numpy(),
            "cut_multiplier": TAU.numpy(),
        }
    write_arrays(tmp_path / "c.npz", "certificate", {}, {**arrays, **changes})
    with pytest.raises(ProblemError, match=r"c\.npz: not a sound (certificate|file)"):
        Certificate.load(tmp_path / "c.npz")


def test_verify_names_a_forged_cut_from_disk(tmp_path):
    problem = layer()
    given = replace(certificate(problem), cuts=[replace(GOOD, multiplier=TAU[:, None]), None])
    mask = solve(problem, "wanda").mask
    bound = 0.5 * problem.objective(mask)
    Solution.of(problem, mask, lower_bound=bound, certificate=given).save(tmp_path / "s.npz")
    with pytest.raises(VerificationError, match="wrong shape or type"):
        verify(problem, Solution.load(tmp_path / "s.npz"))
