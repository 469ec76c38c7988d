"""One run that writes a model folder: it checks the output folder, locks it, goes on with an unfinished run
or replaces an earlier result, and moves the finished files into view together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.errors import ModelError
from maskopt.models.blockwise.distributed import ALONE, Ranks
from maskopt.models.blockwise.job import Job
from maskopt.models.calibration.tokens import Windows
from maskopt.models.checkpoints.bases import Bases
from maskopt.models.checkpoints.checkpoint import Checkpoint, damage
from maskopt.models.checkpoints.report import PruneReport, versions, write_manifest
from maskopt.models.checkpoints.result import (
    Unchanged,
    bases_digest,
    copy_side_files,
    read_bases,
    read_windows,
)
from maskopt.models.checkpoints.schema import (
    BASES,
    MANIFEST,
    differences,
    file_digest,
    read_json,
    read_manifest,
)
from maskopt.models.checkpoints.workspace import (
    CARD,
    GONE,
    HIDDEN,
    JOURNAL,
    Journal,
    Workspace,
    check_inputs,
    check_output,
    open_workspace,
)
from maskopt.models.pruning.card import hub_name, write_card

_STATUS = Path("/proc/self/status")


class Run:
    """The output folder of a run. Of several processes rank 0 writes, into a folder that all of them read.
    `complete` is the file that a finished run leaves; ModelError where `check_output` refuses the folder."""

    work: Workspace
    journal: Journal

    def __init__(
        self,
        output: str | Path,
        *,
        overwrite: bool,
        resume: bool = False,
        complete: str = MANIFEST,
        ranks: Ranks = ALONE,
        **inputs: Any,
    ) -> None:
        if resume and overwrite:
            raise ModelError("`resume` goes on with what `overwrite` drops; choose one")
        self.output, self.overwrite, self.resume = Path(output), overwrite, resume
        self.complete, self.ranks = complete, ranks
        self._read: dict[str, Unchanged] = {}
        how: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "complete": complete}
        ranks.agreed(lambda: check_output(self.output, **how, **inputs))

    def reads(self, **models: Checkpoint) -> None:
        """Record the models that are read; ModelError where one is the output, or has changed."""
        check_inputs(self.output, **{name: x.folder for name, x in models.items()})
        self._read = {name: Unchanged(checkpoint) for name, checkpoint in models.items()}

    def check_models(self) -> None:
        """Raise ModelError where a model folder has changed since `reads`."""
        for model in self._read.values():
            model.check()

    def finished(self, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a complete run to be resumed; None: not complete. ModelError: another run."""
        return self.ranks.agreed(lambda: self._finished(fingerprint)) if self.resume else None

    def _finished(self, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
        path = self.output / self.complete
        if (self.output / HIDDEN).exists() or not path.exists():
            return None
        record = read_manifest(path, smaller=True) if self.complete == MANIFEST else read_json(path)
        if apart := differences(record.get("fingerprint"), dict(fingerprint)):
            raise self._another("the result", apart)
        files = record.get("files")
        if not isinstance(files, dict):
            raise ModelError(f"{path}: is damaged; start over with `overwrite`")
        if what := damage(self.output, {n: d for n, d in files.items() if n != CARD}):
            raise ModelError(
                f"{self.output}: holds the result of this run, but {what}; `overwrite` writes it again"
            )
        shutil.rmtree(self.output / GONE, ignore_errors=True)
        return record

    def finished_report(self, fingerprint: Mapping[str, Any]) -> PruneReport | None:
        """The report of a complete prune, as `finished`."""
        manifest = self.finished(fingerprint)
        return None if manifest is None else PruneReport.of(manifest, self.output, memory={})

    def recorded(self, name: str, options: Mapping[str, Any]) -> Any:
        """Return what the run to be resumed records as option `name`; None where there is no such run.

        Raises:
            ModelError: a run with other `options` than these, `name` left out.
        """
        journal, manifest = self.output / HIDDEN / JOURNAL, self.output / MANIFEST
        what, header = "the result", None
        if self.resume and journal.exists():
            what, header = "the unfinished part", Journal(journal).header
        elif self.resume and manifest.exists():
            header = read_manifest(manifest, smaller=True)["fingerprint"]
        if header is None:
            return None
        recorded, none = header["options"], {name: None}
        if apart := differences({**recorded, **none}, {**options, **none}, "options"):
            raise self._another(what, apart)
        return recorded.get(name)

    def recorded_bases(self) -> Bases | None:
        """Those of the run to be resumed; None where it has none yet."""
        places = [folder / BASES for folder in (Workspace(self.output).staging, self.output)]
        found = next((path for path in places if self.resume and path.is_file()), None)
        return None if found is None else read_bases(found)

    def recorded_windows(self, use: str) -> Tensor | None:
        """The windows that the model wrote in the run to be resumed; None where there are none yet."""
        places = (Workspace(self.output).staging, self.output) if self.resume else ()
        known = (read_windows(folder, use) for folder in places)
        return next((windows for windows in known if windows is not None), None)

    def _another(self, what: str, apart: str) -> ModelError:
        return ModelError(
            f"{self.output}: holds {what} of another run: {apart}; `overwrite` replaces it"
        )

    @contextmanager
    def opened(
        self, needed: int, fingerprint: Mapping[str, Any] | None = None, remedy: str = ""
    ) -> Iterator[Workspace]:
        """Lock the folder while the run writes it; ModelError where it is refused.

        Args:
            needed: bytes of the result, those of an unfinished run included.
            fingerprint: of a run that can be resumed: begins its journal, or is compared with it.
            remedy: what helps where the disk is too small.
        """

        def begin() -> None:
            self.work = stack.enter_context(
                open_workspace(self.output, overwrite=self.overwrite, resume=self.resume)
            )
            hidden = self.work.hidden.rglob("*")
            there = sum(file.stat().st_size for file in hidden if file.is_file())
            if (free := shutil.disk_usage(self.output).free) < needed - there:
                raise ModelError(
                    f"{self.output}: the result takes {(needed - there) / 2**30:.2f} GiB, "
                    f"{free / 2**30:.2f} GiB are free on the disk{remedy}"
                )
            if fingerprint is not None:
                journal = Journal(self.work.journal)
                if journal.header is None:
                    journal.add("header", header=dict(fingerprint))
                elif apart := differences(journal.header, dict(fingerprint)):
                    raise self._another("the unfinished part", apart)

        with ExitStack() as stack:
            self.work = Workspace(self.output)
            self.ranks.agreed(begin)
            if fingerprint is not None:
                self.journal = Journal(self.work.journal)
            yield self.work

    def finish(
        self,
        report: PruneReport,
        files: Mapping[str, str],
        rewrite: Callable[[Path], None] = lambda _: None,
        **more: Any,
    ) -> None:
        """Copy side files, `rewrite` the staged folder, write card and manifest, and move the result into
        view. `files`: SHA-256 of the written ones by name; `more`: of the manifest."""
        model = self._read["model"]
        copied = copy_side_files(model.checkpoint, self.work.staging)
        rewrite(self.work.staging)
        folder = model.checkpoint.folder
        names = write_card(self.work.staging, report, hub_name(folder), folder.name, copied)
        self.check_models()
        digests = {name: file_digest(self.work.staging / name) for name in names}
        write_manifest(self.work.staging / MANIFEST, report, {**files, **digests}, **more)
        self.work.commit()


def fingerprint_of(
    job: Job, options: Mapping[str, Any], calibration: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What decides the result of a walk: versions, options, text, precision, device and the model's digest.
    `calibration`: what an earlier walk recorded of the text, where the job has none."""
    source = job.source
    fingerprint = {
        "versions": versions(),
        "options": dict(options),
        "calibration": text_record(job.windows) if calibration is None else dict(calibration),
        "dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
        "device": source.device.type,
    }
    if source.checkpoint is not None:
        fingerprint["model"] = source.checkpoint.digest
        if source.checkpoint.bases:
            fingerprint["bases"] = bases_digest(source.checkpoint.bases)
    return fingerprint


def text_record(windows: Windows) -> dict[str, Any]:
    """What a manifest holds of windows."""
    return {
        "source": windows.source,
        "samples": len(windows),
        "length": windows.length,
        "beginning": windows.beginning.record(),
        "sha256": windows.digest,
    }


def peaks(device: torch.device) -> Mapping[str, int | None]:
    """Most bytes of the `process` (None without /proc) and of tensors on a CUDA `device` (else None)."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    resident = None
    if _STATUS.is_file():  # not getrusage: Linux counts there what the process was forked from
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        resident = int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
    return {"process": resident, "device": on_device}
