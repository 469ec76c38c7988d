"""A line to begin with, for every command: the end of its help."""

from __future__ import annotations

EXAMPLES = {
    "demo": "maskopt demo --model smollm2",
    "solvers": "maskopt solvers swap",
    "solve": "maskopt solve row.npz --solver branch --output solution.npz",
    "prove": "maskopt prove row.npz --output proof.npz",
    "check": "maskopt check row.npz proof.npz",
    "compare": "maskopt compare row.npz --solvers wanda,swap,scip --columns 48",
    "bound": "maskopt bound row.npz --method sdp",
    "certify": "maskopt certify MODEL OUT --calibration text.txt",
    "extract": "maskopt extract MODEL row.npz --layers up_proj --calibration text.txt --sparsity 0.6",
    "prune": "maskopt prune MODEL --sparsity 0.5 --calibration text.txt --output OUT",
    "gram": "maskopt gram MODEL --calibration text.txt --samples 32 --output GRAMS",
    "sweep": "maskopt sweep MODEL --grams GRAMS --sparsity 0.5,0.6 --weights keep,refit --output SWEEP",
    "distill": "maskopt distill OUT --teacher MODEL --calibration text.txt --output TRAINED",
    "shrink": "maskopt shrink MODEL --channels 0.25 --calibration text.txt --output SMALLER",
    "plan": "maskopt plan MODEL --pattern 2:4 --samples 64",
    "eval": "maskopt eval MODEL OUT --text test.txt --windows 64",
    "verify": "maskopt verify OUT --against MODEL",
    "report": "maskopt report OUT --output report.html",
    "pack": "maskopt pack OUT --output PACKED",
    "unpack": "maskopt unpack PACKED --output OUT",
    "apply": "maskopt apply MODEL OUT/maskopt-masks.bits --output MASKED",
    "extract-masks": "maskopt extract-masks OUT --output masks.bits",
}
#: below the list of commands
STATUSES = (
    "Exit status: 0 done; 1 refused or failed, with one line that says why; 2 a command line that is none; "
    "130 stopped by Ctrl-C."
)
