"""Instances of other libraries, read and written: one set of a given size, by a quadratic objective.

| ending | library | what is chosen |
|---|---|---|
| `.npy`, `.npz`, `.csv`, `.mtx` | one matrix | as many as `cardinality` says, of least or greatest xᵀQx |
| `.dat` | k-cluster | k vertices with the most edges between them |
| `.mc`, `.rudy` | BiqMac, rudy | as many vertices as `cardinality` says, of greatest weight between them |
| `.mdp`, `.txt` | MDPLIB | m elements of greatest distance |
| `.qplib` | QPLIB | binary variables under one constraint on their sum |

The chosen are the pruned entries of the mask. Objectives are reported as the library has them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io

from maskopt.core.files import atomic_write, has_header, read_array
from maskopt.core.pattern import Unstructured
from maskopt.core.problem import LayerProblem, RowProblem, load_npz
from maskopt.core.units import MOST_ENTRIES, check_size
from maskopt.errors import ProblemError

#: weights of an edge list: their decimals are enough to get the same float64 back
_DIGITS = ".17g"
#: difference of mirrored entries that is taken for rounding, as part of the largest entry
_SKEW = 1e-6


def load_problem(
    path: str | os.PathLike[str], cardinality: int | None = None, maximize: bool = False
) -> LayerProblem | RowProblem:
    """A layer or a row of an `.npz`, or a row out of a matrix or another library's file, by its ending.
    `cardinality`: how many are chosen, where the file does not say (matrices, `.mc`). `maximize`: the
    greatest xᵀQx of a matrix. Raises ProblemError: no such file, or no instance that chooses a set of given
    size."""
    ending = Path(path).suffix.lower()
    matrix = ending in _MATRICES or (ending == ".npz" and not has_header(path))
    if maximize and not matrix:
        raise ProblemError(f"{path}: `maximize` is for matrices; the file says what is sought")
    if not matrix and ending not in _TEXTS:
        if cardinality is not None:
            raise ProblemError(
                f"{path}: `cardinality` is for matrices and graphs that name no number (.mc, .rudy)"
            )
        if ending and ending != ".npz":
            known = ", ".join((".npz", *_MATRICES, *_TEXTS))
            raise ProblemError(f"{path}: no known format by its ending; one of: {known}")
        return load_npz(path)
    try:
        if not Path(path).is_file():
            raise ProblemError("no such file")
        if matrix:
            return _of_matrix(path, cardinality, maximize)
        if cardinality is not None and ending not in (".mc", ".rudy"):
            raise ProblemError("the file says how many are chosen; leave `cardinality` out")
        text = Path(path).read_text(encoding="utf-8-sig")  # with a byte order mark or without
        if ending == _QPLIB:
            return _read_qplib(text, Path(path).stem)
        return _read_graph(ending, text, Path(path).stem, cardinality)
    except ProblemError as error:
        raise ProblemError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path}: not a text file ({error})") from None


def _of_matrix(path: str | os.PathLike[str], cardinality: int | None, maximize: bool) -> RowProblem:
    if cardinality is None:
        raise ProblemError("a matrix does not say how many are chosen; give `cardinality`")
    matrix = _MATRICES.get(Path(path).suffix.lower(), read_array)(path)
    matrix = matrix.astype(np.result_type(matrix, np.float64))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ProblemError(
            f"the array is {list(matrix.shape)}, not square; of inputs X, save X.T @ X / len(X)"
        )
    check_size(len(matrix))
    if len(bad := np.argwhere(~np.isfinite(matrix))):
        raise ProblemError(
            f"{len(bad)} entries are NaN or infinite, the first at {bad[0].tolist()}; replace them"
        )
    skew = np.abs(matrix - matrix.T)
    if skew.max() > _SKEW * np.abs(matrix).max():
        i, j = divmod(int(skew.argmax()), len(matrix))
        raise ProblemError(
            f"not symmetric: {matrix[i, j]:g} at [{i}, {j}], {matrix[j, i]:g} at [{j}, {i}]; "
            "(Q + Q.T) / 2 has the same values xᵀQx"
        )
    return RowProblem.from_quadratic(
        matrix, cardinality=cardinality, maximize=maximize, name=Path(path).stem
    )


def _read_csv(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ProblemError(f"no matrix ({error}); a line of numbers with commas a row") from None


def _read_market(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        rows, columns, count, *_ = scipy.io.mminfo(path)
        # a first line is believed if the file is as long as it says
        if rows == columns <= MOST_ENTRIES and count <= os.path.getsize(path):
            matrix = scipy.io.mmread(path)
            return np.asarray(matrix if isinstance(matrix, np.ndarray) else matrix.toarray())
    except (OSError, ValueError, OverflowError) as error:
        raise ProblemError(f"no Matrix Market file ({error}); write it with scipy.io") from None
    raise ProblemError(f"{rows} × {columns}, {count} entries: no square matrix of this length")


def save_problem(
    problem: RowProblem, path: str | os.PathLike[str], form: str | None = None
) -> None:
    """Write a row in the format of the ending, or `form`, atomically; ProblemError: the format cannot hold
    it."""
    ending = f".{form}" if form else Path(path).suffix.lower()
    if ending == ".npz":
        return problem.save(path)
    if ending not in _TEXTS:
        raise ProblemError(f"{path}: no known format; one of: .npz, {', '.join(_TEXTS)}")
    pattern = problem.pattern
    if not isinstance(pattern, Unstructured) or problem.update is not None:
        raise ProblemError(f"{path}: {ending} holds one set of a given size, and unchanged weights")
    text = _write_qplib(problem) if ending == _QPLIB else _write_graph(ending, problem)
    with atomic_write(Path(path)) as file:
        # a name out of a file name may be no text
        file.write(text.encode(errors="replace"))
    return None


class _Line(NamedTuple):
    """A line of a file that says something: its number there, and its words."""

    number: int
    words: list[str]

    def numbers(self, kinds: str) -> list[float]:
        """Whole numbers (i) and others (f); the rest of the line is left."""
        given = zip(self.words, kinds, strict=False)
        try:
            found = [int(word) if kind == "i" else float(word) for word, kind in given]
        except ValueError:
            found = []
        if len(found) < len(kinds):
            raise self.error(f"expected {len(kinds)} numbers, not {self.text!r}")
        return found

    @property
    def text(self) -> str:
        return " ".join(self.words)[:80]

    def error(self, what: str) -> ProblemError:
        return ProblemError(f"line {self.number}: {what}")


def _lines(text: str) -> Iterator[_Line]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith(("#", "%", "c ")):
            yield _Line(number, line.split())


def _edges(lines: Iterator[_Line], n: int, first: int, count: int) -> np.ndarray:
    """Symmetric [n, n] of the lines `i j weight`, numbered from `first`."""
    check_size(n)
    weight, seen, found = np.zeros((n, n)), np.zeros((n, n), dtype=bool), 0
    for line in lines:
        i, j = (int(x) - first for x in line.numbers("ii"))
        w = line.numbers("iif")[2] if len(line.words) > 2 else 1.0
        if not (0 <= i < n and 0 <= j < n) or i == j or seen[i, j]:
            raise line.error(f"{line.text!r} is no new pair of two of {n}")
        weight[i, j] = weight[j, i] = w
        seen[i, j] = seen[j, i] = True
        found += 1
    if found != count:
        raise ProblemError(f"{found} edges where the first line says {count}")
    return weight


def _first(lines: Iterator[_Line]) -> _Line:
    return next(lines, _Line(1, []))


def _read_graph(ending: str, text: str, name: str, cardinality: int | None) -> RowProblem:
    """Σ over chosen pairs of their weight, each once, is maximized."""
    lines = _lines(text)
    if ending == ".dat":
        n, chosen, count = (int(x) for x in _first(lines).numbers("iii"))
        # an edge is given by the entry ½ of a symmetric matrix: it counts 1
        weight = 2 * _edges(lines, n, 1, count)
    elif ending in (".mdp", ".txt"):
        n, chosen = (int(x) for x in _first(lines).numbers("ii"))
        weight = _edges(lines, n, 0, n * (n - 1) // 2)
    elif cardinality is None:
        raise ProblemError("a graph does not say how many vertices are chosen; pass cardinality")
    else:
        n, count = (int(x) for x in _first(lines).numbers("ii"))
        chosen, weight = cardinality, _edges(lines, n, 1, count)
    return RowProblem.from_quadratic(weight / 2, cardinality=chosen, maximize=True, name=name)


def _pairs(problem: RowProblem) -> tuple[np.ndarray, int]:
    """The weights of the pairs, where these are all that is maximized, and how many are chosen."""
    quadratic, constant = problem.quadratic()
    n, chosen = problem.n, problem.as_layer().pruned
    if not problem.maximized:
        raise ProblemError("the format maximises, and the problem is to be minimised; take .qplib")
    diagonal = quadratic.diagonal()
    rest = constant + chosen * float(diagonal[0])
    if (diagonal != diagonal[0]).any() or abs(rest) > 1e-9 * np.abs(quadratic).sum():
        raise ProblemError(f"the format has weights of pairs of {n} alone; take .qplib")
    return 2 * (quadratic - np.diag(diagonal)), chosen


def _write_graph(ending: str, problem: RowProblem) -> str:
    weight, chosen = _pairs(problem)
    n, head = problem.n, f"{problem.n} {chosen}"
    first = 0 if ending in (".mdp", ".txt") else 1
    pairs = np.nonzero(np.triu(weight)) if first else np.triu_indices(n, 1)
    if first:
        head = f"{head if ending == '.dat' else n} {len(pairs[0])}"
    weight = weight / 2 if ending == ".dat" else weight
    edges = zip(*pairs, strict=True)
    lines = [f"{a + first} {b + first} {weight[a, b]:{_DIGITS}}" for a, b in edges]
    return "\n".join([head, *lines, ""])


_MATRICES: dict[str, Callable[[str | os.PathLike[str]], np.ndarray]] = {
    ".npy": read_array,
    ".csv": _read_csv,
    ".mtx": _read_market,
}
_QPLIB = ".qplib"
_TEXTS = (".dat", ".mc", ".rudy", ".mdp", ".txt", _QPLIB)


def _read_qplib(text: str, name: str) -> RowProblem:
    """A problem of type ?BL whose only constraint is a number of ones; ProblemError, with the reason, for
    others. ½xᵀHx + bᵀx + c has H by its lower triangle: an entry off the diagonal is the coefficient of
    x_i x_j, one on it twice that of x_i²."""
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


def _write_qplib(problem: RowProblem) -> str:
    """The text of a problem of type QBL (http://qplib.zib.de/doc.html)."""
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
