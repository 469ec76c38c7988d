"""Ahead-of-time compilation of every Triton kernel to machine code; needs no GPU.

    python tests/benchmarks/triton_programs.py [architecture …]

compiles for sm_80 and sm_90 (or for the architectures named, such as 89) and prints, per program,
registers a thread, bytes of shared memory and of local memory (spills). It ends with exit code 1
when one does not compile, spills, or does not fit a multiprocessor (in single precision: twice).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)
#: shared memory a block may use without opting in, registers of a multiprocessor
SHARED_LIMIT, REGISTER_FILE = 48 * 1024, 65536


@dataclass(frozen=True)
class Report:
    """What one compiled program needs."""

    kernel: str
    variant: str
    architecture: int
    warps: int
    registers: int
    shared: int
    local: int
    """Bytes of stack frame a thread: anything above 0 is a spill or a local array."""
    spilled: int
    """Instructions that load from or store to local memory."""
    instructions: int
    """Of machine code, padding excluded."""

    @property
    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        if self.local or self.spilled:
            return f"spills ({self.local} bytes of stack, {self.spilled} accesses to it)"
        if self.shared > SHARED_LIMIT:
            return f"needs {self.shared} bytes of shared memory, above {SHARED_LIMIT}"
        blocks = 2 if self.variant.startswith("fp32") else 1  # of a multiprocessor
        if self.registers * 32 * self.warps * blocks > REGISTER_FILE:
            return f"needs {self.registers} registers in {self.warps} warps, above the file"
        return None


@dataclass(frozen=True)
class Variant:
    """One program: a kernel, its constants, and what the compiler knows of its arguments."""

    kernel: str
    label: str
    constants: dict[str, Any]
    floating: str = "fp32"
    warps: int = 4


def variants() -> Iterator[Variant]:
    """The programs that `steps.TritonKernel` launches, in single and double precision."""
    import torch

    from maskopt.solvers.swap.triton import launch, steps

    for floating, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):

        def variant(
            kernel: str, constants: dict[str, Any], label: str = "", kind: str = floating
        ) -> Variant:
            return Variant(kernel, f"{kind} {label}".strip(), constants, kind)

        for grouped in (False, True):
            label = "grouped" if grouped else ""
            block = {"N": steps.WIDTH, "GROUPED": grouped}
            one = variant("swap_block", block, f"N={steps.WIDTH} {label}")
            yield replace(one, warps=launch.swap_block_warps(steps.WIDTH, dtype))
            sizes = {"BU": launch.BLOCK_U, "BP": launch.BLOCK_P, "GROUPED": grouped}
            yield variant("scan_survivors", sizes, label)
        yield variant("column_terms", {"BLOCK": launch.STRIP})
        yield variant("lower_envelope", {"T": launch.GRID, "BLOCK": 32})
        yield variant("list_finite", {"BLOCK": launch.STRIP})
        for size in (4, 32):
            together = launch.groups_together(size, dtype)
            yield variant("scan_groups", {"MP": size, "BG": together}, f"M={size}")
    constants = {"N": steps.WIDTH, "BLOCK": launch.STRIP}
    yield Variant("move_correlation", f"fp64 N={steps.WIDTH}", constants, "fp64")


#: arguments that are not pointers to the kernel's floating dtype
_INTEGERS = {"n", "group", "M", "groups"}
_POINTERS = {
    "gram": "*fp32",
    "blocks": "*fp32",
    "kept": "*i8",
    "kept_after": "*i8",
    "index": "*i64",
    **dict.fromkeys(("c", "d", "diagonal"), "*fp64"),
    **dict.fromkeys(
        (
            "columns", "room", "made", "count", "partner", "kept_list", "kept_count",
            "pruned_list", "pruned_count", "kept_best", "pruned_best",
        ),
        "*i32",
    ),
}  # fmt: skip


def compile_one(variant: Variant, architecture: int) -> Report:
    """Compile one program for compute capability architecture / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from maskopt.solvers.swap.triton import kernels

    function = getattr(kernels, variant.kernel)
    signature: dict[str, str] = {}
    for name in function.arg_names:
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in _INTEGERS:
            signature[name] = "i32"
        elif name == "margin":
            signature[name] = "fp32"
        else:
            signature[name] = _POINTERS.get(name, f"*{variant.floating}")
    if variant.floating == "fp64":
        # the larger of the two that G may be
        signature.update(dict.fromkeys({"gram", "blocks"} & signature.keys(), "*fp64"))
    if variant.kernel in {"swap_block", "column_terms"}:
        signature["x"] = "*fp64"
    # torch's memory always is aligned, and n is a multiple of 16, as in every language model
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name == "n"
    }
    source = ASTSource(
        fn=function, signature=signature, constexprs=variant.constants, attrs=aligned
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(
            source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": variant.warps}
        )
    return Report(
        kernel=variant.kernel,
        variant=variant.label,
        architecture=architecture,
        warps=variant.warps,
        shared=int(compiled.metadata.shared),
        **_inspect(compiled.asm["cubin"]),
    )


def _inspect(binary: bytes) -> dict[str, int]:
    """Registers, stack, spills and length, from NVIDIA's tools that come with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        usage, listing = (
            subprocess.run([*tool, str(path)], capture_output=True, text=True, check=True).stdout
            for tool in (
                [knobs.nvidia.cuobjdump.path, "-res-usage"],
                [knobs.nvidia.nvdisasm.path, "-c"],
            )
        )

    def number(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump prints no {name}: {usage}")
        return int(found.group(1))

    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", listing, re.M)
    return {
        "registers": number("REG"),
        "local": number("STACK") + number("LOCAL"),
        "spilled": sum(name in ("LDL", "STL") for name in operations),
        "instructions": sum(name != "NOP" for name in operations),
    }


def table(found: list[Report]) -> str:
    """One line a program."""
    head = f"{'kernel':18}{'variant':22}{'arch':>6}{'warps':>6}{'regs':>6}{'shared':>8}"
    lines = [head + f"{'stack':>7}{'spills':>7}{'length':>8}"]
    for one in found:
        lines.append(
            f"{one.kernel:18}{one.variant:22}{'sm_' + str(one.architecture):>6}{one.warps:>6}"
            f"{one.registers:>6}{one.shared:>8}{one.local:>7}{one.spilled:>7}{one.instructions:>8}"
            + (f"  {one.fault}" if one.fault else "")
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command; see the module."""
    os.environ.pop("TRITON_INTERPRET", None)
    architectures = tuple(map(int, arguments)) or ARCHITECTURES
    found = [compile_one(v, architecture) for architecture in architectures for v in variants()]
    print(table(found))
    return int(any(one.fault for one in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
