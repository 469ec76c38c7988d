"""A line to begin with, for every command: the end of its help."""

from __future__ import annotations

EXAMPLES = {
    "demo": "maskopt demo --model smollm2",
    "solvers": "maskopt solvers swap",
    "solve": "maskopt solve row.npz --prove --output proof.npz",
    "compare": "maskopt compare row.npz --solvers wanda,swap,scip --columns 48",
    "bound": "maskopt bound OUT --original MODEL --calibration text.txt",
    "export": "maskopt export MODEL row.npz --layers up_proj --calibration text.txt --sparsity 0.6",
    "prune": "maskopt prune MODEL --sparsity 0.5 --calibration text.txt --output OUT",
    "gram": "maskopt gram MODEL --calibration text.txt --samples 32 --output GRAMS",
    "sweep": "maskopt sweep MODEL --grams GRAMS --sparsity 0.5,0.6 --update none,least-squares --output OUT",
    "distill": "maskopt distill OUT --teacher MODEL --calibration text.txt --output TRAINED",
    "prune-structured": "maskopt prune-structured MODEL --channels 0.25 --calibration t.txt --output SMALLER",
    "eval": "maskopt eval MODEL OUT --text test.txt --windows 64",
    "verify": "maskopt verify OUT --original MODEL",
    "report": "maskopt report OUT --output report.html",
    "masks apply": "maskopt masks apply MODEL OUT/maskopt-masks.bits --output MASKED",
    "masks export": "maskopt masks export OUT --output masks.bits",
    "masks pack": "maskopt masks pack OUT --output PACKED",
    "masks unpack": "maskopt masks unpack PACKED --output OUT",
}
#: below the list of commands
STATUSES = (
    "Exit status: 0 done; 1 failure, one line gives the reason; 2 invalid command line; "
    "130 stopped by Ctrl-C."
)
