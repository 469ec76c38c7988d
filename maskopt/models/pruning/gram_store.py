"""Gram matrices of a dense model on disk: collected once, solved repeatedly.

A folder with a safetensors file for every block, with the sums of every distinct Gram matrix (float64, upper
triangles), and `maskopt-grams.json`: their fingerprint and the files' digests. A prune from them gives the
bytes of a prune with `calibrate_on` dense from the text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskopt.core.gram import Gram
from maskopt.errors import ModelError, OptionError, ProblemError
from maskopt.models.architecture.blocks import Layer
from maskopt.models.blockwise.collect import BadSample, Grams
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.forward import OnBlockProgress, Tick, ticker
from maskopt.models.blockwise.job import Job, open_job
from maskopt.models.calibration.tokens import CALIBRATION, tokens_or_tokenizer
from maskopt.models.checkpoints.checkpoint import open_safe, write_json, write_tensors
from maskopt.models.checkpoints.report import FinishedBlock, grouped
from maskopt.models.checkpoints.result import read_windows, write_windows_file
from maskopt.models.checkpoints.schema import WRITTEN, file_digest, fits, read_json
from maskopt.models.checkpoints.workspace import check_inputs
from maskopt.models.options.prune import AUTO, BLOCKWISE, PruneOptions, prune_options, with_recipe
from maskopt.models.options.walk import WalkOptions, options_by_name
from maskopt.models.pruning.run import Run, fingerprint_of

FORMAT = "maskopt-grams-1"
INDEX = "maskopt-grams.json"
#: options that decide Gram matrices; a prune takes them from the store
OF_STORE = ("token_weights", "all_experts", "skip_bad_samples", "holdout", "seed")
#: options that say how text is read
OF_TEXT = ("bos", "chat", "text_field")
_HELD = "held"
#: all that is read of an index
_INDEX = {
    "format": FORMAT,
    "fingerprint": {
        "calibration": {"samples": int, "length": int},
        "options": dict.fromkeys(OF_STORE, lambda _: True),
        "dtype": str,
        "model": str,
    },
    "files": dict,
    "layers": [str],
    "bad_samples": [dict.fromkeys(("sample", "layer", "block"), lambda _: True)],
}


def collect_grams(
    model: str | Path,
    tokenizer_or_tokens: Any = None,
    options: WalkOptions | None = None,
    *,
    output: str | Path,
    calibration: Any = None,
    overwrite: bool = False,
    on_progress: OnBlockProgress | None = None,
    ranks: Ranks = ALONE,
    **shorthand: Any,
) -> Path:
    """Write the Gram matrices of a dense model's layers into a folder, block by block; it takes 4·n² bytes
    for each distinct input of n numbers. Arguments and errors are those of `prune_model`, with options of the
    walk."""
    options = options_by_name(WalkOptions, options, {**shorthand, "calibrate_on": "dense"})
    inputs = {"model": model, "calibration": calibration}
    run = Run(output, overwrite=overwrite, ranks=ranks, **inputs)
    text, tokenizer = tokens_or_tokenizer(tokenizer_or_tokens, calibration, "Gram matrices need")
    job = open_job(model, text, options, tokenizer=tokenizer, on_progress=on_progress, ranks=ranks)
    if job.source.checkpoint is None:
        raise ModelError("Gram matrices are stored of model folders; save the model first")
    check_inputs(run.output, model=job.source.checkpoint.folder)
    files: dict[str, str] = {}
    bad: list[dict[str, Any]] = []
    with run.opened(sum(4 * layer.n**2 for layer in job.layers)) as work:
        with job, torch.no_grad():
            for block in job.blocks(folder=work.hidden):
                if block.layers:
                    path, grams = work.staging / _file_of(block.index), block.grams()
                    files[path.name] = ranks.agreed(partial(_write, path, grams))
                block.advance()
                bad += [{**dataclasses.asdict(one), "block": block.index} for one in block.bad]
        index = {
            "format": FORMAT,
            "fingerprint": fingerprint_of(job, {n: getattr(options, n) for n in OF_STORE}),
            "layers": [layer.name for layer in job.layers],
            "bad_samples": bad,
            "files": files,
        }

        def finish() -> None:
            if job.windows.written is not None:
                windows = {CALIBRATION: job.windows.written}
                files[WRITTEN] = write_windows_file(work.staging / WRITTEN, windows)
            write_json(work.staging / INDEX, index)
            work.commit()

        ranks.agreed(finish)
    return run.output


class GramStore:
    """A folder that `collect_grams` wrote, and its fingerprint; ModelError where it is none or damaged."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_json(
            self.folder / INDEX,
            "it holds no Gram matrices; give `calibration` to `maskopt sweep`, which collects them",
        )
        if not fits(index, _INDEX):
            raise ModelError(f"{self.folder / INDEX}: not an index of format {FORMAT}")
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self._files: dict[str, str] = index["files"]
        self._bad: list[dict[str, Any]] = index["bad_samples"]
        self._layers: list[str] = index["layers"]

    @property
    def own(self) -> dict[str, Any]:
        """The options that decided the store."""
        own = {name: self.fingerprint["options"][name] for name in OF_STORE}
        text = self.fingerprint["calibration"]
        # weights are solved in the precision of the passes, and a manifest records one for both
        own["dtype"] = self.fingerprint["dtype"]
        return own | {"samples": text["samples"], "seq_len": text["length"]}

    def options(
        self, options: PruneOptions | None, shorthand: Mapping[str, Any] | None = None
    ) -> PruneOptions:
        """Options of a prune from these Gram matrices; OptionError for one that needs the text."""
        shorthand = dict(shorthand or {})
        if options is None:
            shorthand = with_recipe(shorthand)
        if BLOCKWISE in (shorthand.get("update"), getattr(options, "update", None)):
            raise OptionError("`update` blockwise needs the text: give `calibration`, not `grams`")
        own = self.own
        usual = {field.name: field.default for field in dataclasses.fields(PruneOptions)}
        options = prune_options(options, shorthand if options else {**own, **shorthand})
        if options.true_sequential or options.distillation:
            name = "true_sequential" if options.true_sequential else "distillation"
            raise OptionError(f"`{name}` needs the text: give `calibration`, not `grams`")
        if options.sensitive or (options.layers_differ and not options.counts):
            raise OptionError(
                "`allocation` layers, and `sensitivity` fisher, need the text: give "
                "`calibration`, or `sensitivity` uniform or relative with `allocation` rows, or the `counts`"
            )
        made = {**own, "calibrate_on": "dense"}
        for name in (*made, *OF_TEXT):
            asked, here = getattr(options, name), made.get(name, usual[name])
            # of a `PruneOptions`, an option at its default was not asked for
            said = name in shorthand and asked != AUTO
            if asked != here and (said or asked != usual[name]):
                raise OptionError(
                    f"`{name}` {asked} says nothing here: it is part of what {self.folder} was made of; "
                    "leave it out, or collect others with `maskopt sweep`"
                )
        return dataclasses.replace(options, calibrate_on="dense", **own)

    def check_model(self, job: Job) -> None:
        """Raise ModelError for another model, or a layer without a Gram matrix."""
        assert job.source.checkpoint is not None
        if job.source.checkpoint.digest != self.fingerprint["model"]:
            raise ModelError(f"{self.folder}: holds Gram matrices of another model")
        known = set(self._layers)
        for layer in job.layers:
            if layer.name not in known:
                raise ModelError(f"{self.folder}: holds no Gram matrix of layer {layer.name!r}")

    def grams(self, block: int, device: torch.device) -> Grams:
        """The Gram matrices of a block; ModelError where the file was changed."""
        path = self.folder / _file_of(block)
        if file_digest(path) != self._files.get(path.name):
            raise ModelError(f"{path}: does not match the digest of the index: it was changed")
        file = open_safe(path)
        try:
            every = json.loads(file.metadata["leaders"])
            states: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
            for key in file.entries:
                kind, leader, part = key.split("/")
                states.setdefault((kind, leader), {})[part] = file.read(key)
            restored: dict[str, dict[str, Gram]] = {_HELD: {}, "": {}}
            for (kind, leader), state in states.items():
                try:
                    restored[kind][leader] = Gram.restored(state, device)
                except ProblemError as error:
                    what = f"{path}: layer {leader!r}: its Gram matrix was changed"
                    raise ModelError(f"{what}: {error}") from None
            held = None
            if _HELD in every:
                held = Grams.restored(device, every[_HELD], restored[_HELD])
            return Grams.restored(device, every[""], restored[""], held)
        except (KeyError, ValueError) as error:
            raise ModelError(f"{path}: holds no Gram matrices of format {FORMAT}") from error

    def bad(self, block: int) -> list[BadSample]:
        """The samples that were left out in a block."""
        return [BadSample(x["sample"], x["layer"]) for x in self._bad if x["block"] == block]


def prune_source(
    grams: str | Path | None, options: PruneOptions | None, shorthand: Mapping[str, Any]
) -> tuple[PruneOptions, GramStore | None]:
    """Return the options of a prune, and the store of its Gram matrices; None: collected from text."""
    if grams is None:
        return prune_options(options, shorthand), None
    store = GramStore(grams)
    return store.options(options, shorthand), store


def open_store(
    model: str | Path,
    folder: str | Path,
    calibration: Any,
    options: Mapping[str, Any],
    *,
    on_progress: OnBlockProgress | None = None,
    ranks: Ranks = ALONE,
) -> GramStore:
    """The Gram matrices in a folder, collected first by `collect_grams` if there are none; ModelError where
    they are of another text."""
    if not ranks.agreed((Path(folder) / INDEX).exists):
        how: Any = {"output": folder, "calibration": calibration, "on_progress": on_progress}
        collect_grams(model, ranks=ranks, **how, **options)
        return GramStore(folder)
    store = GramStore(folder)
    text, tokenizer = tokens_or_tokenizer(None, calibration)
    walk = options_by_name(WalkOptions, None, {**store.own, **options})
    written = read_windows(Path(folder), CALIBRATION)
    job = open_job(model, text, walk, tokenizer=tokenizer, ranks=ranks, written=written)
    if fingerprint_of(job, {})["calibration"] != store.fingerprint["calibration"]:
        raise ModelError(
            f"{store.folder}: holds Gram matrices of other text than `calibration`; leave it out, or name "
            "another folder"
        )
    return store


@dataclasses.dataclass(frozen=True)
class StoredBlock:
    """One block of a model whose Gram matrices are stored: a `Block` without a walk."""

    job: Job
    index: int
    layers: Sequence[Layer]
    store: GramStore

    @property
    def bad(self) -> list[BadSample]:
        return self.store.bad(self.index)

    def ticker(self, stage: str, total: int) -> Tick:
        return ticker(self.job.tell, self.index, self.job.last + 1, stage, total)

    def rounds(self) -> Iterator[tuple[Sequence[Layer], Grams]]:
        """All layers in one."""
        yield self.layers, self.store.grams(self.index, self.job.source.device)

    def advance(self) -> None:
        """Nothing moves."""


def stored_blocks(
    job: Job, store: GramStore, finished: Mapping[int, FinishedBlock]
) -> Iterator[StoredBlock]:
    """The blocks that have chosen layers and are not finished, with their dense weights in memory."""
    for index, layers in sorted(grouped(job.layers, "block").items()):
        if index not in finished:
            with job.source.open(index):
                yield StoredBlock(job, index, layers, store)


def _file_of(block: int) -> str:
    return f"grams-{block:05d}.bits"


def _write(path: Path, grams: Grams) -> str:
    """Its SHA-256. The name does not end in .safetensors: servers load every such file of a folder."""
    kinds = {"": grams} | ({} if grams.held is None else {_HELD: grams.held})
    states = {
        f"{kind}/{leader}/{part}": value
        for kind, some in kinds.items()
        for leader in dict.fromkeys(some.leaders.values())
        if (gram := some.of(leader)) is not None
        for part, value in gram.state().items()
    }
    leaders = {kind: dict(some.leaders) for kind, some in kinds.items()}
    return write_tensors(path, states, {"leaders": json.dumps(leaders)})
