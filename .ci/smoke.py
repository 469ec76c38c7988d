"""What a user's first minute needs of an installed package; run far away from the source tree."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import torch

import maskopt

home = Path(maskopt.__file__).parent
assert "site-packages" in home.parts, home
assert (home / "py.typed").is_file()
assert not (home / "solvers").is_symlink()

for group in ("maskopt.solvers", "maskopt.bounds"):
    for entry in entry_points(group=group):
        entry.load()  # every backend's module is in the package

torch.manual_seed(0)
weight, inputs = torch.randn(4, 12), torch.randn(64, 12)
problem = maskopt.LayerProblem(weight, inputs.T @ inputs / 64, maskopt.Unstructured(0.5))
for solver in ("wanda", "swap", "scip"):
    maskopt.verify(problem, maskopt.solve(problem, solver))

command = str(Path(sys.executable).with_name("maskopt"))
listed = subprocess.run([command, "solvers"], check=True, capture_output=True, text=True).stdout
assert all(f" {name} " in listed for name in maskopt.available_solvers()), listed
problem.save("layer.npz")
compare = [command, "compare", "layer.npz", "--rows", "2", "--output", "records.jsonl"]
subprocess.run(compare, check=True, capture_output=True)
records = [json.loads(line) for line in Path("records.jsonl").read_text().splitlines()]
assert {record.get("status") for record in records} >= {"feasible", "optimal"}, records
print(f"{home}: {len(maskopt.available_solvers())} solvers, {len(records)} records")
