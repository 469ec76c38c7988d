"""The subset of QPLIB's format that is mask selection: binary variables, a quadratic objective, one sum.

½xᵀHx + bᵀx + c, H by its lower triangle (http://qplib.zib.de/doc.html): an entry off the diagonal is the
coefficient of x_i x_j, one on it twice that of x_i².
"""

from __future__ import annotations

import numpy as np

from maskopt.core.problem import RowProblem
from maskopt.core.units import check_size
from maskopt.errors import ProblemError


def read_qplib(text: str, name: str) -> RowProblem:
    """A problem of type ?BL whose only constraint is a number of ones; ProblemError, with the reason, for
    others."""
    words = _Words(text)
    title, kind, sense = (words.next() for _ in range(3))
    if len(kind) != 3 or kind[0] not in "LDCQ" or kind[1:] != "BL":
        raise ProblemError(
            f"a problem of type {kind}; only binary variables under one linear constraint (QBL) are a choice "
            "of a set of given size"
        )
    if sense.lower() not in ("minimize", "maximize"):
        raise ProblemError(f"{sense!r} is no sense of an objective")
    n, constraints = words.whole(), words.whole()
    if constraints != 1:
        raise ProblemError(
            f"{constraints} constraints; only one, on the sum of all variables, maps"
        )
    check_size(n)
    quadratic, given = np.zeros((n, n)), np.zeros((n, n), dtype=bool)
    for _ in range(0 if kind[0] == "L" else words.whole()):
        i, j = sorted((words.place(n), words.place(n)))
        _once(given[i], j, f"the quadratic term {i + 1} {j + 1}")
        quadratic[i, j] = words.number() / (2 if i == j else 1)
    linear = words.vector(n)
    constant = words.number()
    row, summed = np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(words.whole()):
        words.place(1)
        i = words.place(n)
        _once(summed, i, f"variable {i + 1} of the constraint")
        row[i] = words.number()
    words.number()  # what stands for infinity
    low, high = words.vector(1)[0], words.vector(1)[0]
    chosen = low / row[0] if row[0] else np.nan
    if (row != row[0]).any() or low != high or chosen != np.round(chosen) or not 0 <= chosen <= n:
        raise ProblemError("its constraint is not that a given number of all variables are 1")
    return RowProblem.from_quadratic(
        quadratic + np.diag(linear),
        cardinality=int(chosen),
        maximize=sense.lower() == "maximize",
        constant=constant,
        name=title or name,
    )


def write_qplib(problem: RowProblem) -> str:
    """The text of a problem of type QBL."""
    quadratic, constant = problem.quadratic()
    n = problem.n
    sense = "maximize" if problem.maximized else "minimize"
    entries = [
        f"{i + 1} {j + 1} {2 * quadratic[i, j]:.17g}"
        for i in range(n)
        for j in range(i + 1)
        if quadratic[i, j]
    ]
    count = problem.as_layer().pruned
    head = [
        "".join(problem.name.split()).lstrip("#!%") or "maskopt",
        f"QBL\n{sense}\n{n} # variables\n1 # constraint",
    ]
    sums = [f"1 {i + 1} 1" for i in range(n)]
    return "\n".join(
        [
            *head,
            f"{len(entries)} # quadratic terms in objective",
            *entries,
            "0 # default linear coefficient\n0 # others",
            f"{constant:.17g} # constant",
            f"{n} # linear terms in all constraints",
            *sums,
            "1e+30 # infinity",
            f"{count} # default left-hand side\n0 # others",
            f"{count} # default right-hand side\n0 # others",
            "0 # default start of a variable\n0 # others",
            "0 # default start of a dual\n0 # others",
            "0 # default start of a bound's dual\n0 # others",
            "0 # names of variables\n0 # names of constraints\n",
        ]
    )


class _Words:
    """The words of a file, comments left out."""

    def __init__(self, text: str) -> None:
        lines = (x for x in text.splitlines() if not x.lstrip().startswith(("!", "%")))
        self._words = (word for line in lines for word in line.partition("#")[0].split())

    def next(self) -> str:
        word = next(self._words, None)
        if word is None:
            raise ProblemError("it ends early")
        return word

    def number(self) -> float:
        word = self.next()
        try:
            return float(word)
        except ValueError:
            raise ProblemError(f"expected a number, not {word!r}") from None

    def whole(self) -> int:
        number = self.number()
        if not np.isfinite(number) or number != int(number) or number < 0:
            raise ProblemError(f"expected a count, not {number:g}")
        return int(number)

    def place(self, n: int) -> int:
        number = self.whole()
        if not 1 <= number <= n:
            raise ProblemError(f"{number} is none of 1 … {n}")
        return number - 1

    def vector(self, n: int) -> np.ndarray:
        """A default and the entries that are not it."""
        found, given = np.full(n, self.number()), np.zeros(n, dtype=bool)
        for _ in range(self.whole()):
            i = self.place(n)
            _once(given, i, f"entry {i + 1}")
            found[i] = self.number()
        return found


def _once(given: np.ndarray, place: int, what: str) -> None:
    """Note what is given; raise where it has been."""
    if given[place]:
        raise ProblemError(f"{what} is given twice; of a symmetric matrix list one triangle")
    given[place] = True
