"""Readers of other libraries' instances, and a writer of QPLIB: a set of given size, a quadratic objective.

| ending | library | chosen set |
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
from typing import Any, NamedTuple

import numpy as np
import scipy.io

from maskopt.core.files import atomic_write, has_header, read_array
from maskopt.core.pattern import Unstructured
from maskopt.core.problem import LayerProblem, RowProblem, load_npz
from maskopt.errors import ProblemError

#: difference of mirrored entries that is taken for rounding, as part of the largest entry
_SKEW = 1e-6
#: rows of a dense matrix that is read at most
_MOST_ENTRIES = 2**14


def load_problem(
    path: str | os.PathLike[str], cardinality: int | None = None, maximize: bool = False
) -> LayerProblem | RowProblem:
    """Read a layer or a row of an `.npz`, or a row out of a matrix or another library's file, by its ending.

    Args:
        cardinality: size of the chosen set where the file does not state it (matrices, `.mc`).
        maximize: choose the greatest xᵀQx of a matrix.

    Raises:
        ProblemError: no such file, or no instance that chooses a set of given size.
    """
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
            return _read_qplib(text)
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
    _check_size(len(matrix))
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


def _check_size(n: int) -> None:
    """Raise ProblemError for no entries, or for more than a dense matrix may have."""
    if not 1 <= n <= _MOST_ENTRIES:
        raise ProblemError(f"{n} vertices or variables; a dense matrix holds 1 to {_MOST_ENTRIES}")


def _read_csv(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ProblemError(f"no matrix ({error}); a line of numbers with commas a row") from None


def _read_market(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        rows, columns, count, *_ = scipy.io.mminfo(path)
        # The first line may state any number: at most one entry per byte is believed.
        if rows == columns <= _MOST_ENTRIES and count <= os.path.getsize(path):
            matrix = scipy.io.mmread(path)
            return np.asarray(matrix if isinstance(matrix, np.ndarray) else matrix.toarray())
    except (OSError, ValueError, OverflowError) as error:
        raise ProblemError(f"no Matrix Market file ({error}); write it with scipy.io") from None
    raise ProblemError(f"{rows} × {columns}, {count} entries: no square matrix of this length")


def save_problem(
    problem: RowProblem, path: str | os.PathLike[str], form: str | None = None
) -> None:
    """Write a row as .npz or .qplib, by the ending or `form`, atomically.

    Raises:
        ProblemError: the format does not hold the row.
    """
    ending = f".{form}" if form else Path(path).suffix.lower()
    if ending == ".npz":
        return problem.save(path)
    if ending != _QPLIB:
        raise ProblemError(f"{path}: no known format; one of: .npz, {_QPLIB}")
    if not isinstance(problem.pattern, Unstructured) or problem.update is not None:
        raise ProblemError(f"{path}: {ending} holds one set of a given size, and unchanged weights")
    with atomic_write(Path(path)) as file:
        # A name out of a file name may hold half of a surrogate pair.
        file.write(_write_qplib(problem).encode(errors="replace"))
    return None


class _Line(NamedTuple):
    """The words of a line that is no comment, and its number in the file."""

    number: int
    words: list[str]

    def numbers(self, kinds: str) -> list[Any]:
        """Read whole numbers (i) and others (f) from the line's beginning."""
        pairs = zip(self.words, kinds, strict=False)
        try:
            values = [int(word) if kind == "i" else float(word) for word, kind in pairs]
        except ValueError:
            values = []
        if len(values) < len(kinds):
            raise self.error(f"expected {len(kinds)} numbers, not {self.text!r}")
        return values

    @property
    def text(self) -> str:
        return " ".join(self.words)[:80]

    def error(self, fault: str) -> ProblemError:
        return ProblemError(f"line {self.number}: {fault}")


def _content_lines(text: str, comments: tuple[str, ...] = ("#", "%", "c ")) -> Iterator[_Line]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith(comments):
            yield _Line(number, line.split())


def _next(lines: Iterator[_Line]) -> _Line:
    for line in lines:
        return line
    raise ProblemError("it ends early")


def _edges(lines: Iterator[_Line], n: int, first: int, count: int) -> np.ndarray:
    """Return the symmetric matrix [n, n] of `count` lines `i j weight`, numbered from `first`."""
    _check_size(n)
    weight, seen = np.zeros((n, n)), np.zeros((n, n), dtype=bool)
    for line in lines:
        i, j = (x - first for x in line.numbers("ii"))
        w = line.numbers("iif")[2] if len(line.words) > 2 else 1.0
        if not (0 <= i < n and 0 <= j < n) or i == j or seen[i, j]:
            raise line.error(f"{line.text!r} is no new pair of two of {n}")
        weight[i, j] = weight[j, i] = w
        seen[i, j] = seen[j, i] = True
    edges = int(seen.sum()) // 2
    if edges != count:
        raise ProblemError(f"{edges} edges where the first line says {count}")
    return weight


def _read_graph(ending: str, text: str, name: str, cardinality: int | None) -> RowProblem:
    """Read a graph whose chosen pairs, each once, have the greatest sum of weights."""
    lines = _content_lines(text)
    if ending == ".dat":
        n, chosen, count = _next(lines).numbers("iii")
        # An edge is given by the entry ½ of a symmetric matrix: it counts 1.
        weight = 2 * _edges(lines, n, 1, count)
    elif ending in (".mdp", ".txt"):
        n, chosen = _next(lines).numbers("ii")
        weight = _edges(lines, n, 0, n * (n - 1) // 2)
    elif cardinality is None:
        raise ProblemError("a graph does not say how many vertices are chosen; pass cardinality")
    else:
        n, count = _next(lines).numbers("ii")
        chosen, weight = cardinality, _edges(lines, n, 1, count)
    return RowProblem.from_quadratic(weight / 2, cardinality=chosen, maximize=True, name=name)


_MATRICES: dict[str, Callable[[str | os.PathLike[str]], np.ndarray]] = {
    ".npy": read_array,
    ".csv": _read_csv,
    ".mtx": _read_market,
}
_QPLIB = ".qplib"
_TEXTS = (".dat", ".mc", ".rudy", ".mdp", ".txt", _QPLIB)


def _read_qplib(text: str) -> RowProblem:
    """Read a problem of type ?BL whose only constraint is a number of ones; ProblemError for others.

    ½xᵀHx + bᵀx + c has H by its lower triangle: an entry off the diagonal is the coefficient of x_i x_j, one
    on it twice that of x_i².
    """
    lines = _content_lines(text, ("!", "%", "#"))
    name, kind, sense = (_next(lines).words[0] for _ in range(3))
    if len(kind) != 3 or kind[0] not in "LDCQ" or kind[1:] != "BL":
        raise ProblemError(
            f"a problem of type {kind}; only binary variables under one linear constraint (QBL) are a choice "
            "of a set of given size"
        )
    if sense.lower() not in ("minimize", "maximize"):
        raise ProblemError(f"{sense!r} is no sense of an objective")
    n, constraints = (_next(lines).numbers("i")[0] for _ in range(2))
    if constraints != 1:
        raise ProblemError(
            f"{constraints} constraints; only one, on the sum of all variables, maps"
        )
    _check_size(n)
    quadratic = np.zeros((n, n)) if kind[0] == "L" else _entries(lines, (n, n))
    quadratic[np.diag_indices(n)] /= 2
    linear = _vector(lines, n)
    constant = _next(lines).numbers("f")[0]
    row = _entries(lines, (1, n))[0]
    _next(lines)  # what stands for infinity
    low, high = _vector(lines, 1)[0], _vector(lines, 1)[0]
    chosen = low / row[0] if row[0] else np.nan
    if (row != row[0]).any() or low != high or chosen != np.round(chosen) or not 0 <= chosen <= n:
        raise ProblemError("its constraint is not that a given number of all variables are 1")
    return RowProblem.from_quadratic(
        quadratic + np.diag(linear),
        cardinality=int(chosen),
        maximize=sense.lower() == "maximize",
        constant=constant,
        name=name,
    )


def _vector(lines: Iterator[_Line], n: int) -> np.ndarray:
    """Read a vector: a default value, then the entries that differ from it."""
    return _entries(lines, (n,), _next(lines).numbers("f")[0])


def _entries(lines: Iterator[_Line], shape: tuple[int, ...], default: float = 0.0) -> np.ndarray:
    """Read an array: the number of listed entries, then a line for each; of a square one a triangle."""
    values, listed = np.full(shape, default), np.zeros(shape, dtype=bool)
    for _ in range(_next(lines).numbers("i")[0]):
        line = _next(lines)
        *position, value = line.numbers("i" * len(shape) + "f")
        if shape[0] == shape[-1]:
            position.sort()
        at = tuple(i - 1 for i in position)
        if not all(0 <= i < size for i, size in zip(at, shape, strict=True)) or listed[at]:
            raise line.error(
                f"{line.text!r} is no new entry of {shape[-1]}; of a symmetric matrix list one triangle"
            )
        values[at], listed[at] = value, True
    return values


def _write_qplib(problem: RowProblem) -> str:
    """Return the text of a problem of type QBL (http://qplib.zib.de/doc.html)."""
    quadratic, constant = problem.quadratic()
    n = problem.n
    units = problem.as_layer().units
    sense = "maximize" if units and units.sign < 0 else "minimize"
    entries = [
        f"{i + 1} {j + 1} {2 * quadratic[i, j]:.17g}"
        for i in range(n)
        for j in range(i + 1)
        if quadratic[i, j]
    ]
    count = problem.as_layer().pruned
    return "\n".join(
        [
            "".join(problem.name.split()).lstrip("#!%") or "maskopt",
            f"QBL\n{sense}\n{n} # variables\n1 # constraint",
            f"{len(entries)} # quadratic terms in objective",
            *entries,
            "0 # default linear coefficient\n0 # others",
            f"{constant:.17g} # constant",
            f"{n} # linear terms in all constraints",
            *(f"1 {i + 1} 1" for i in range(n)),
            "1e+30 # infinity",
            f"{count} # default left-hand side\n0 # others",
            f"{count} # default right-hand side\n0 # others",
            "0 # default start of a variable\n0 # others",
            "0 # default start of a dual\n0 # others",
            "0 # default start of a bound's dual\n0 # others",
            "0 # names of variables\n0 # names of constraints\n",
        ]
    )
