"""`maskopt compare`, `bound` and `export`: rows of instances, or of the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from maskopt.cli.command import (
    CARDINALITY,
    FOR_A_MODEL,
    JOBS,
    MAXIMIZE,
    OVERWRITE,
    command,
    given,
    option_list,
    read_pairs,
)
from maskopt.cli.console import errors, make_table, print_table, screen, written
from maskopt.cli.view import PruneView, view
from maskopt.core.fields import OUTPUT, argument, option, options_of
from maskopt.core.files import check_writable
from maskopt.core.least_squares import LeastSquaresUpdate
from maskopt.core.pattern import Pattern, parse_sparsity
from maskopt.core.problem import LayerProblem
from maskopt.core.table import value_text
from maskopt.errors import OptionError, SolverError
from maskopt.experiments.compare import (
    bound_cells,
    compare as compare_rows,
    comparison_table,
    sample_rows,
)
from maskopt.experiments.jobs import check_format
from maskopt.experiments.prove import SECONDS, SMALL
from maskopt.instances.formats import load_problem, save_problem
from maskopt.models.options.prune import DAMPING, LEAST_SQUARES, NONE, PruneOptions
from maskopt.models.options.walk import LayerOptions, PassOptions, RuntimeOptions, TextOptions
from maskopt.protocol.solver import make_solver

if TYPE_CHECKING:
    from maskopt.models.evaluation.bound import GapRecord

_UPDATE = replace(
    *options_of(PruneOptions, "update"),
    choices=(NONE, LEAST_SQUARES),
    help="How kept weights are updated. none: unchanged; least-squares: solved per row.",
)
#: options of Gram matrices of the dense model, and of the problems that are made of them
_OF_PROBLEMS = (
    *options_of(LayerOptions),
    *options_of(PassOptions, "skip_bad_samples", "dtype"),
    *options_of(TextOptions),
    *options_of(RuntimeOptions),
    *options_of(PruneOptions, "sparsity", "gram_shrinkage"),
    _UPDATE,
    *DAMPING,
)
#: fewer and shorter windows than a prune has: defaults of `collect_problems`
_DEFAULTS = {"samples": 32, "seq_len": 512, "sparsity": None}
#: options of a command whose source may be a model
OF_A_MODEL = tuple(
    replace(one, group=FOR_A_MODEL, default=_DEFAULTS.get(one.name, one.default))
    for one in _OF_PROBLEMS
)
#: options of an update by the fields of `LeastSquaresUpdate`; options that also apply to instances
_OF_UPDATE = {"damping": "damping", "damping_exponent": "power"}
_OF_BOTH = ("sparsity", "update", *_OF_UPDATE, "activation_memory")
RECORDS = option(None, "File of results: .jsonl (resumable) or .csv.", OUTPUT)
TEXT_OF_A_MODEL = option(None, "Calibration text, as for `maskopt prune`; required.", FOR_A_MODEL)
COLUMNS = option(None, "Number of inputs sampled per row. Default: all.", least=1)
#: of `bound --original`: seconds of sdp for a layer, whose bounds are valid at any time, and rows of a layer
SDP_SECONDS, ROWS = 60.0, 4
#: up to this number of rows `bound` prints each
FEW = 24
#: of `export`: formats of solvers of integer programs, and all
PROGRAMS = ("cip", "lp", "mps")
FORMATS = ("npz", *PROGRAMS, "qplib")


@command(*OF_A_MODEL, example="maskopt compare row.npz --solvers swap,branch,scip --columns 48")
def compare(
    source: list[Path] = argument("A model folder, or instances (.npz, .dat, …)."),
    solvers: str | None = option(
        None,
        f"Names, separated by commas. Default: wanda, swap, and up to {SMALL} inputs branch "
        f"({SECONDS:.0f} s a row), else tabu.",
    ),
    solver_options: list[str] | None = option(
        None, "Option of one of the solvers, SOLVER.NAME=VALUE; may be repeated."
    ),
    rows: int = option(4, "Rows sampled from every layer.", least=1),
    columns: int | None = COLUMNS,
    row_time_limit: float | None = option(None, "Seconds per row.", least=0),
    jobs: int = JOBS,
    seed: int = option(0, "Random seed of the sample and of the solvers.", least=0),
    cardinality: int | None = CARDINALITY,
    maximize: bool = MAXIMIZE,
    calibration: str | None = TEXT_OF_A_MODEL,
    output: Path | None = RECORDS,
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Solve the same rows with several solvers: objective, bound, gap, status, time."""
    check_format(output, overwrite=overwrite)
    chosen = with_options(option_list(solvers or "wanda,swap,branch,tabu"), solver_options)
    layers, pattern, _ = load_layers(source, options, calibration, seed, cardinality, maximize)
    sampled = sample_rows(layers, rows, columns=columns, pattern=pattern, seed=seed)
    if solvers is None:
        chosen.pop("tabu" if all(row.n <= SMALL for row in sampled) else "branch")
        row_time_limit = SECONDS if row_time_limit is None else row_time_limit
    with view() as shown:
        records = compare_rows(
            sampled,
            chosen,
            time_limit=row_time_limit,
            seed=seed,
            jobs=jobs,
            output=output,
            on_progress=lambda done, total: shown.show("solving", done, total),
        )
    narrow: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": 0}
    print_table(comparison_table(records), no_wrap=True, **narrow)
    if any(layer.shared_budget for layer in layers):
        said = "each row is solved alone, at the sparsity of its layer: no budget is shared"
        screen.print(said, soft_wrap=True)
    for record in records:
        if record.error:
            said = f"{record.instance}, {record.solver}: {record.error}"
            errors.print(said, soft_wrap=True, markup=False, emoji=False)
    written(output)
    if all(record.status == "failed" for record in records):
        raise typer.Exit(1)


def with_options(names: list[str], items: list[str] | None) -> dict[str, dict[str, Any]]:
    """Return each solver's options; OptionError for a solver named twice, or an option of another one."""
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    if len(options) < len(names):
        raise OptionError(f"a solver is given twice in {', '.join(names)}; name each once")
    for item in items or []:
        name, dot, setting = item.partition(".")
        if not dot:
            raise OptionError(f"`solver_options` takes SOLVER.NAME=VALUE, not {item!r}")
        if name not in options:
            raise OptionError(
                f"`solver_options` {item}: there is no solver {name!r} among {', '.join(names)}"
            )
        options[name] |= read_pairs([setting])
    return options


@command(*OF_A_MODEL, example="maskopt bound OUT --original MODEL --calibration text.txt")
def bound(
    source: list[Path] = argument("A pruned folder (with --original), a model, or instances."),
    original: str | None = option(None, "Dense model of the pruned folder."),
    method: str = option("sdp", "sdp, box, shift, or another bound of `maskopt solvers`."),
    solver: str | None = option(None, "Solver of the masks without --original. Default: swap."),
    rows: int | None = option(
        None, f"Rows sampled per layer. Default: all; {ROWS} with --original.", least=1
    ),
    cuts: int | None = option(None, "Rounds of triangle cuts for sdp; 8 is a good value.", least=0),
    layer_time_limit: float | None = option(
        None,
        f"Seconds for the rows of a layer. Default: none; {SDP_SECONDS:.0f} for sdp with --original.",
        least=0,
    ),
    jobs: int = JOBS,
    seed: int = option(0, "Random seed of the sampled rows.", least=0),
    cardinality: int | None = CARDINALITY,
    maximize: bool = MAXIMIZE,
    calibration: str | None = TEXT_OF_A_MODEL,
    output: Path | None = RECORDS,
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Compute certified lower bounds of rows, and the gaps of masks to them.

    With --original, SOURCE is a pruned folder whose masks are bounded, by default on as many windows of the
    same length as the prune.
    """
    from maskopt.models.evaluation.bound import bound_layers, certify_model

    check_format(output, overwrite=overwrite)
    layers: list[LayerProblem] = []
    how: dict[str, Any] = {"solver": solver}
    if original is None:
        layers, _, kinds = load_layers(source, options, calibration, seed, cardinality, maximize)
        how |= {"rows": rows, "kinds": kinds, "solver": solver or "swap"}
        bounded = partial(bound_layers, layers, **how)
    else:
        how |= {"cardinality": cardinality, "maximize": maximize or None}
        _check_pruned(source, calibration, {**options, **how})
        if layer_time_limit is None and method == "sdp":
            layer_time_limit = SDP_SECONDS
        how = {"calibration": calibration, "rows_per_layer": rows or ROWS}
        bounded = partial(certify_model, original, source[0], **how, **options)
    with view() as shown:
        records = bounded(
            method=method,
            method_options=given(cuts=cuts, time_limit=layer_time_limit),
            seed=seed,
            jobs=jobs,
            output=output,
            on_rows=lambda done, name: shown.show(f"{name}, rows bounded: {done}", done, None),
        )
    few = original is None and len(records) <= FEW
    screen.print(_rows_table(records) if few else _kinds_table(records))
    if any(layer.shared_budget for layer in layers):
        screen.print("rows of a shared budget: the bound is of their sum, weighted by ω")
    written(output)


def _check_pruned(source: list[Path], calibration: str | None, asked: dict[str, Any]) -> None:
    """Raise OptionError for several sources, no text, or an option that a pruned folder decides."""
    if len(source) > 1:
        raise OptionError("`original` is of one pruned folder")
    if calibration is None:
        raise OptionError("`calibration` is missing: name text for the Gram matrices")
    searched = ("sparsity", "update", "damping", "damping_exponent")
    for name in (*searched, "solver", "cardinality", "maximize"):
        if asked.get(name) is not None:
            raise OptionError(f"`{name}` is of masks that are searched, not of a pruned folder")


_CAPTION = "gap: from objective to bound; no mask is better by more"


def _rows_table(records: Sequence[GapRecord]) -> Table:
    """Return a table with a line per row, in the original units of the instance."""
    headings = ("instance, n", "row", "objective", "bound", "gap", "seconds")
    table = make_table(*headings, no_wrap=True, caption=_CAPTION)
    for r in records:
        cells = (value_text(r.value, 6), *bound_cells(r), f"{r.seconds:.3f}")
        table.add_row(f"{r.instance}, {r.n}, {r.pattern}", str(r.row), *cells)
    return table


def _kinds_table(records: Sequence[GapRecord]) -> Table:
    from maskopt.models.evaluation.bound import by_kind

    headings = ("layer kind", "rows", "median gap", "worst gap", "seconds a row")
    table = make_table(*headings, caption=_CAPTION)
    for kind, gaps in by_kind(records).items():
        shares = f"{gaps.median:.2%}", f"{gaps.worst:.2%}"
        table.add_row(kind, str(gaps.rows), *shares, f"{gaps.seconds:.3f}")
    return table


@command(
    *OF_A_MODEL,
    example="maskopt export MODEL row.npz --include up_proj --calibration text.txt --sparsity 0.6",
)
def export(
    source: Path = argument("A model folder, or an instance."),
    destination: Path = argument("The file to write."),
    row: int = option(0, "Index of the row in the layer.", least=0),
    columns: str | None = option(
        None, "Number of inputs to sample, or their indices separated by commas."
    ),
    format: str | None = option(
        None, f"One of {', '.join(FORMATS)}. Default: the ending of the name."
    ),
    formulation: str = option("factored", "factored or linear (mps holds no squares)."),
    seed: int = option(0, "Random seed of the sampled inputs.", least=0),
    cardinality: int | None = CARDINALITY,
    maximize: bool = MAXIMIZE,
    calibration: str | None = TEXT_OF_A_MODEL,
    overwrite: bool = OVERWRITE,
    **options: Any,
) -> None:
    """Write one row, or a sample of its inputs, as an instance for maskopt or another IP solver."""
    form = format or destination.suffix.lstrip(".").lower()
    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}; one of: {', '.join(FORMATS)}")
    check_writable(destination, overwrite=overwrite, instance=source)
    layers, pattern, _ = load_layers([source], options, calibration, seed, cardinality, maximize)
    if len(layers) != 1:
        names = ", ".join(layer.name for layer in layers[:8])
        raise OptionError(f"--include must name one layer; {len(layers)} match: {names}")
    problem = layers[0].row(row)
    if columns is not None or pattern is not None:
        chosen = np.arange(problem.n) if columns is None else _columns(columns, problem.n, seed)
        problem = problem.restrict(chosen, pattern)
    if form in PROGRAMS:
        write = getattr(make_solver("scip"), "write_instance", None)
        if write is None:
            raise SolverError("the solver registered as 'scip' cannot write instances")
        write(problem, destination, form=form, formulation=formulation)
    else:
        save_problem(problem, destination, form)
    screen.print(f"{destination}: {problem!r}", soft_wrap=True)
    units = problem.as_layer().units
    if form in PROGRAMS and units is not None:
        sign, shift = ("−" if units.sign < 0 else ""), units.shift * problem.as_layer().pruned
        value = f"value = {sign}(objective − {shift:.17g}) + {units.constant:.17g}"
        screen.print(f"it is minimised, shifted to be convex: {value}", soft_wrap=True)


def _columns(text: str, n: int, seed: int) -> np.ndarray:
    try:
        numbers = [int(part) for part in option_list(text)]
    except ValueError:
        raise OptionError(f"--columns takes whole numbers, not {text!r}") from None
    if len(numbers) > 1 and all(0 <= number < n for number in numbers):
        return np.array(numbers)
    if len(numbers) != 1 or not 1 <= numbers[0] <= n:
        raise OptionError(
            f"--columns is how many, 1 … {n}, or which ones, 0 … {n - 1} separated by commas"
        )
    return np.sort(np.random.default_rng(seed).choice(n, size=numbers[0], replace=False))


def load_layers(
    source: list[Path],
    options: Mapping[str, Any],
    calibration: str | None,
    seed: int,
    cardinality: int | None,
    maximize: bool,
) -> tuple[list[LayerProblem], Pattern | None, dict[str, str]]:
    """Load the layers of instances, or of one model folder by running text through it.

    Returns:
        The layers, with the update of kept weights that `options` name; the requested sparsity, or None; the
        kinds of a model's layers, by name.

    Raises:
        OptionError: a model without calibration text or sparsity, or among other sources.
    """
    _UPDATE.checked(options.get("update", NONE))
    pattern = parse_sparsity(options["sparsity"]) if "sparsity" in options else None
    model = next((path for path in source if path.is_dir()), None)
    if model is None:
        asked = {**options, **given(calibration=calibration)}
        return _of_instances(source, pattern, asked, cardinality, maximize), pattern, {}
    if len(source) > 1:
        raise OptionError(f"{model} is a model folder: name it alone, or .npz instances")
    if calibration is None:
        raise OptionError(f"{model} is a model: name text for its Gram matrices, --calibration")
    if pattern is None:
        raise OptionError(f"{model} is a model: say what to prune, --sparsity 0.6 or 2:4")
    from maskopt.models.pruning.prune import layer_problems

    with view() as shown:
        how: dict[str, Any] = {"calibration": calibration, "seed": seed, **options}
        found = list(layer_problems(model, on_progress=PruneView(shown), **how))
    kinds = {layer.name: layer.kind for layer, _ in found}
    return [problem for _, problem in found], pattern, kinds


def _of_instances(
    source: list[Path],
    pattern: Pattern | None,
    asked: Mapping[str, Any],
    cardinality: int | None,
    maximize: bool,
) -> list[LayerProblem]:
    for name, value in asked.items():
        if name not in _OF_BOTH:
            raise OptionError(
                f"`{name}` is for a model folder, and {value!r} says nothing of an instance"
            )
    layers = [load_problem(path, cardinality, maximize).as_layer() for path in source]
    if pattern is not None:
        layers = [layer.under(pattern) for layer in layers]
    if asked.get("update") == LEAST_SQUARES:
        how = {field: asked[name] for name, field in _OF_UPDATE.items() if name in asked}
        return [layer.with_update(LeastSquaresUpdate(**how)) for layer in layers]
    for name in _OF_UPDATE:
        if name in asked:
            raise OptionError(f"`{name}` needs `update` least-squares")
    return layers
