"""The model card of a pruned folder: a README.md with the metadata of the Hugging Face hub. The original's
card is kept under another name, and its licence, language and task are taken over. It holds the command that
gives the same bytes, which is rebuilt from the manifest."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from maskopt.core.fields import options_of
from maskopt.core.files import atomic_write
from maskopt.core.pattern import NM, parse_sparsity
from maskopt.errors import OptionError, PatternError
from maskopt.models.checkpoints.checkpoint import names_hub_model
from maskopt.models.checkpoints.report import (
    PruneReport,
    mean_error,
    mean_held_error,
    proven_share,
    ratio_to_wanda,
)
from maskopt.models.checkpoints.schema import (
    BLOCKS,
    EXPERTS,
    MANIFEST,
    PRUNE,
    STRUCTURES,
    read_json,
)
from maskopt.models.checkpoints.workspace import CARD
from maskopt.models.options.prune import BOTH, ROWS, PruneOptions
from maskopt.models.options.structured import ShrinkOptions

HUB = "https://huggingface.co"
#: metadata of the original that is taken over
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
#: bytes of a card that are read, and characters of a value that is taken over
LONGEST_CARD, LONGEST_VALUE = 2**20, 200


def write_card(
    folder: Path, report: PruneReport, base: str | None, name: str, there: Sequence[str]
) -> list[str]:
    """Write README.md of a pruned model; the original's becomes README-original.md. The report's fingerprint
    and layers decide the bytes, so that a resumed run writes the same.

    Args:
        base: the original's name on the hub; None: not known.
        name: of its folder, for the heading where there is no other.
        there: names of the original's files in the folder, without its weights.

    Returns:
        The names of these files now, without README.md, which users may edit.
    """
    original, kept = None, None
    if CARD in there:
        original, kept = _readable(folder / CARD), _free_name(there)
        os.replace(folder / CARD, folder / kept)
    inherited = _inherited(original)
    above = base or inherited.pop("base_model", None)
    smaller = report.kind != PRUNE
    data = ModelCardData(
        **(inherited | ({"base_model": above} if above else {})),
        library_name="transformers",
        tags=["maskopt", "pruned", "structured" if smaller else "sparse"],
    )
    text = "\n\n".join(
        [
            f"# {base or name}, {_made(report)} by maskopt",
            report.sentence(),
            _use(smaller, bool(read_json(folder / "config.json").get("auto_map"))),
            *([_figures(report, smaller)] if report.layers else []),
            _origin(report, base, inherited, kept),
        ]
    )
    with atomic_write(folder / CARD) as file:
        file.write(f"---\n{data.to_yaml()}\n---\n\n{text}\n".encode())
    return sorted({*there, *([kept] if kept else [])} - {CARD})


def hub_name(path: str | Path) -> str | None:
    """The name on the hub of a snapshot in its cache, or of OWNER/NAME; None for other paths."""
    for part in reversed(Path(path).parts):
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    return str(path) if names_hub_model(str(path)) else None


def _readable(path: Path) -> ModelCard | None:
    """A card of unknown origin; None where it cannot be used."""
    try:
        if path.stat().st_size > LONGEST_CARD:
            return None
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except Exception:  # a broken card is kept, and nothing is taken over
        return None


def _inherited(card: ModelCard | None) -> dict[str, Any]:
    """Plain values of the original's metadata, `base_model` among them."""
    if card is None:
        return {}
    found = {}
    for key in (*INHERITED, "base_model"):
        value = card.data.get(key)
        every = value if isinstance(value, list) else [value]
        texts = [x for x in every if isinstance(x, str) and 0 < len(x) <= LONGEST_VALUE]
        if every and texts == every and all(map(str.isprintable, texts)):
            found[key] = value
    return found


def _free_name(there: Sequence[str]) -> str:
    """README-original.md, with a number where the original has one already."""
    numbered = (f"README-original-{i}.md" for i in range(2, len(there) + 2))
    return next(name for name in ("README-original.md", *numbered) if name not in there)


def _made(report: PruneReport) -> str:
    if report.kind != PRUNE:
        return "made smaller"
    pattern = parse_sparsity(report.fingerprint["options"]["sparsity"])
    return f"pruned to {pattern if isinstance(pattern, NM) else f'{report.sparsity:.0%} zeros'}"


def _use(smaller: bool, own_code: bool) -> str:
    what, zeros = "An ordinary dense model of smaller sizes, as config.json says.", ""
    if not smaller:
        what = "Weights are plain safetensors in the original's data types; pruned ones are zeros."
        zeros = ", and `maskopt.keep_masks(model, FOLDER)` holds the zeros through fine-tuning"
    if own_code:
        what += (
            " It asks for code of the original (`auto_map` in config.json), which is not copied: put those "
            "files next to it, and load it with `trust_remote_code=True`."
        )
    return (
        f"## Use\n\n{what} Every program that loads the original loads this model:\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        "```\n\n"
        "`maskopt verify FOLDER --original ORIGINAL` checks that nothing but the named weights differs"
        f"{zeros}."
    )


def _figures(report: PruneReport, smaller: bool) -> str:
    solved, proven = report.solved, proven_share(report.solved)
    gone = "removed" if smaller else "pruned"
    lines = ["| | |", "|---|---|", f"| {gone} weights of these layers | {report.sparsity:.2%} |"]
    if (mean := mean_error(solved)) is not None:
        lines.append(f"| error of the layers' outputs, mean | {mean:.4g} |")
    if (ratio := ratio_to_wanda(solved)) is not None:
        lines.append(
            f"| sum of errors, ratio to Wanda's masks at the same sparsity | {ratio:.3f} |"
        )
    if (held := mean_held_error(solved)) is not None:
        lines.append(f"| mean error on held-out windows | {held:.4g} |")
    if report.distillation is not None:
        before, after = (report.distillation[x]["held"] for x in ("before", "after"))
        lines.append(
            f"| KL to the original on held-out windows, nats | {before:.4f} → {after:.4f} |"
        )
    if proven is not None and not smaller:
        lines.append(f"| rows whose mask is proven optimal, or 1-swap optimal | {proven:.0%} |")
    return "\n\n".join(
        [
            "## Figures",
            "\n".join(lines),
            "Errors are parts of the energy of a layer's output, on the inputs that the pruned blocks before "
            "leave. `maskopt-manifest.json` has them layer by layer. They are not the quality of the "
            "model: `maskopt eval` measures perplexity.",
        ]
    )


def _origin(
    report: PruneReport, base: str | None, inherited: dict[str, Any], kept: str | None
) -> str:
    found = report.fingerprint
    lines = []
    if base is not None:
        lines.append(f"- The original: [{base}]({HUB}/{base}).")
    lines.append(f"- SHA-256 of its configuration and weights: `{found['model']}`.")
    if kept is not None:
        lines.append(f"- Its card: [{kept}]({kept}).")
    licence = inherited.get("license_name") or inherited.get("license")
    named = ", ".join([licence] if isinstance(licence, str) else licence or [])
    named = f": {named}" if named else "; its card names none"
    lines.append(f"- Licence: that of the original holds{named}.")
    lines.append(f"- SHA-256 of the calibration tokens: `{found['calibration']['sha256']}`.")
    used = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    lines.append(f"- Made with {used}.")
    return (
        "## Origin\n\n"
        + "\n".join(lines)
        + "\n\nThe same once more, from the same model and text:\n\n```console\n"
        + f"$ {command_again(report.kind, 'FOLDER')}\n"
        + ("" if report.kind == PRUNE else _trained_again(found))
        + "```"
    )


def _trained_again(fingerprint: Mapping[str, Any]) -> str:
    """Return the command that trains the smaller model again; empty where it was not trained."""
    if "distillation" not in fingerprint:
        return ""
    run = fingerprint["distillation"]
    text, options = run["calibration"], dict(run["options"])
    options |= {"samples": text["samples"], "seq_len": text["length"]}
    flags = " ".join(f"--{name.replace('_', '-')} {options[name]}" for name in sorted(options))
    return f"$ maskopt distill AGAIN --teacher MODEL --calibration TEXT {flags} --output TRAINED\n"


#: keys that a fingerprint records. Anybody can write a manifest: it must not grant trust or name a path
_RECORDED = {"removed", "experts"} | {
    one.name for kind in (PruneOptions, ShrinkOptions) for one in options_of(kind) if one.recorded
}


def options_again(kind: str, fingerprint: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Options that repeat a run, its text only if it is of the hub; OptionError for other options."""
    options, text = dict(fingerprint["options"]), fingerprint["calibration"]
    if odd := set(options) - _RECORDED:
        raise OptionError(
            f"{where}: sets `{min(odd)}`, which a manifest cannot set; give it on the command line"
        )
    windows = {"samples": text["samples"], "seq_len": text["length"]}
    if kind == BLOCKS:  # how many, scored on as many windows
        options = {"blocks": len(options["removed"]), "windows": windows.pop("samples")}
    elif kind == EXPERTS:
        options.pop("update", None)
    elif kind == STRUCTURES:
        options.pop("removed", None)
    elif kind == PRUNE:
        try:
            parse_sparsity(options["sparsity"])
        except (KeyError, TypeError, PatternError):
            raise OptionError(f"{where}: holds no sparsity") from None
        # rows without recorded limits have none, where the default would set some
        if options.get("allocation") in (ROWS, BOTH) and options.get("max_deviation") is None:
            options["max_deviation"] = 1.0
    options |= windows
    bos = text["beginning"]["bos"]
    if bos in ("auto", "always", "never"):
        options["bos"] = bos
    options["chat"] = bos == "template"
    precision = fingerprint["dtype"]
    # `auto` is that on the CPU; elsewhere it depends on the model, of which nothing is known here
    if (fingerprint["device"], precision) != ("cpu", "float32"):
        options["dtype"] = precision
    if str(text["source"]).startswith("hf:"):
        options["calibration"] = text["source"]
    return {key: value for key, value in options.items() if value not in (None, {}, [])}


def command_again(kind: str, folder: str | Path) -> str:
    """The command that gives the same bytes from the same model and text, whose paths a manifest does not
    have."""
    command = "prune" if kind == PRUNE else "prune-structured"
    config = shlex.quote(str(Path(folder) / MANIFEST))
    return f"maskopt {command} MODEL --config {config} --calibration TEXT --output AGAIN"
