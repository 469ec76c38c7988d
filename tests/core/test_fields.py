"""Options as fields: every bad value is refused with its name, every good one is kept."""

from dataclasses import dataclass, fields

import numpy as np
import pytest

from maskopt import available_bounds, available_solvers
from maskopt.bounds import REGISTRY as BOUNDS
from maskopt.errors import OptionError
from maskopt.fields import build, check_options, option, options_of
from maskopt.solver import REGISTRY as SOLVERS
from maskopt.solver import make_solver


@dataclass(frozen=True)
class Sample:
    count: int | None = option(3, "how many", unit="pieces", least=1)
    share: float = option(0.5, "which part", least=0, below=1)
    word: str = option("a", "which", choices=("a", "b"))
    names: tuple[str, ...] = option(("x",), "whose")
    loud: bool = option(False, "whether")
    above: float = option(1.0, "how much", least=0)
    plain: int = 7

    def __post_init__(self) -> None:
        check_options(self, "sample")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, " must be a whole number or None ≥ 1, not 0"),
        ("count", np.float64(3), " must be a whole number or None ≥ 1, not 3.0"),
        ("share", 1.0, r" must be a number \[0, 1\), not 1.0"),
        ("above", float("inf"), " must be a number ≥ 0, not inf"),
        ("word", "c", " must be text a or b, not 'c'"),
        ("names", "x", " must be a list of names"),
        ("loud", 1, " must be true or false"),
        ("count", 1.5, ""), ("count", True, ""), ("count", "3", ""), ("count", np.bool_(True), ""),
        ("share", -0.1, ""), ("share", float("nan"), ""), ("share", None, ""),
        ("word", 1, ""), ("names", (1,), ""),
        ("above", np.float32("nan"), ""), ("above", np.ones(1), ""),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(name, value, message):
    with pytest.raises(OptionError, match=name + message):
        Sample(**{name: value})


def test_what_fits_is_kept_and_numbers_of_numpy_become_those_of_python():
    made = Sample(count=None, share=0, word="b", names=["y", "z"], loud=True, plain="anything")
    assert (made.count, made.share, made.word, made.loud) == (None, 0, "b", True)
    assert (made.names, made.plain) == (("y", "z"), "anything")
    hash(made)
    given = {"count": np.int64(4), "share": np.float32(0.25), "loud": np.bool_(True)}
    made = Sample(**given, word=np.str_("b"))
    assert made == Sample(count=4, share=0.25, word="b", loud=True)
    assert [type(getattr(made, name)) for name in given] == [int, float, bool]
    assert make_solver("swap", max_swaps=np.arange(9)[3]).max_swaps == 3


def test_options_are_listed_with_their_ranges_and_unknown_ones_get_near_names():
    near = r"thing 'sample' has no option 'shar'; did you mean 'share'"
    for kind, given, message in ((Sample, "shar", near), (object, "x", "it has none")):
        with pytest.raises(OptionError, match=message):
            build(kind, "sample", {given: 1}, "thing")
    assert [(o.name, o.range) for o in options_of(Sample)] == [
        ("count", "≥ 1"), ("share", "[0, 1)"), ("word", "a or b"), ("names", ""), ("loud", ""),
        ("above", "≥ 0"),
    ]  # fmt: skip


@pytest.mark.parametrize("registry", [SOLVERS, BOUNDS], ids=["solvers", "bounds"])
def test_every_backend_documents_every_option_in_one_line(registry):
    for name in registry.names():
        kind = registry.find(name)
        assert kind.__doc__, name
        assert [o.name for o in options_of(kind)] == [f.name for f in fields(kind)], name
        for known in options_of(kind):
            assert 3 <= len(known.help) <= 160, (name, known)
            assert "\n" not in known.help, (name, known)
            numeric = "number" in known.type
            assert not numeric or known.range or known.unit, (name, known.name, "unit or range")


def test_a_backend_is_asked_once_whether_it_runs_and_where_it_cannot_say_hides_no_other(
    monkeypatch,
):
    def broken():
        raise OSError("licence server is silent")

    assert {"swap", "scip"} <= set(available_solvers())
    assert {"sdp", "box"} <= set(available_bounds())
    monkeypatch.setattr("maskopt.solvers.exact.gurobi.Gurobi.unavailable", staticmethod(broken))
    found = available_solvers()
    assert found["gurobi"].unavailable == "OSError: licence server is silent"
    assert found["swap"].available
    assert all(info.available == (info.unavailable is None) for info in found.values())
    asked = []
    unavailable = staticmethod(lambda: asked.append(1))
    monkeypatch.setattr("maskopt.solvers.swap.solver.Swap.unavailable", unavailable)
    make_solver("swap")
    assert asked == [1]
