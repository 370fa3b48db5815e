"The index runs, and every study from top to bottom with parameters that make it quick."

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pytest
from execnb.shell import CaptureShell, format_exc

NBS = Path(__file__).parents[1] / "nbs"
STUDIES = sorted((NBS / "studies").glob("*.ipynb"))
APART = get_context("forkserver")  # a process of its own for each, in which the package is imported already
APART.set_forkserver_preload(["concept_transfer.all", "execnb.shell"])
TINY = """
load_model = {
    "smollm2-135m-instruct": tiny_model("qwen2", max_position_embeddings=2048),
    "gemma-3-270m": tiny_model("gemma3_text", 1, max_position_embeddings=2048),
}.__getitem__
"""


def code(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def run(cells, folder):
    os.chdir(folder)
    shell = CaptureShell(mpl_format="png")
    for cell in cells:
        shell.run(cell)
        if shell.exc:  # which may not travel between processes
            raise RuntimeError(f"{cell}\n\n{''.join(format_exc(shell.exc))}")


def run_apart(cells, folder):
    with ProcessPoolExecutor(1, APART) as pool:
        pool.submit(run, cells, folder).result()


@pytest.mark.study
def test_the_index_runs():
    "On tiny models under the names of the embedded ones, with which its evidence takes minutes."
    cells = [c.source for c in code(NBS / "index.ipynb")]
    at = next(i for i, c in enumerate(cells) if "load_model(" in c)
    run_apart([*cells[:at], TINY, *cells[at:]], NBS)


@pytest.mark.study
@pytest.mark.parametrize("study", STUDIES, ids=lambda p: p.stem)
def test_study_runs(study, tmp_path):
    cells = code(study)
    (chosen,) = [c for c in cells if "parameters" in c.metadata.get("tags", ())]
    assert "quick = False" in chosen.source, "the cell tagged `parameters` must set quick = False"
    chosen.source += "\nquick = True"
    run_apart([c.source for c in cells], tmp_path)
