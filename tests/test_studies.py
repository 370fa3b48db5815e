"The pages of real models run on tiny ones, and every study with parameters that make it quick."

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
load_model = {{
    "smollm2-135m-instruct": tiny_model("qwen2", max_position_embeddings=2048, num_hidden_layers={0}),
    "gemma-3-270m": tiny_model("gemma3_text", 1, max_position_embeddings=2048, num_hidden_layers={0}),
}}.__getitem__
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
@pytest.mark.parametrize("page, layers", [("index", 4), ("walkthrough", 27), ("tutorials/own_concept", 27)])
def test_page_runs(page, layers):
    "On tiny models under the names of the embedded ones, deep enough for the layers that it names."
    path = NBS / f"{page}.ipynb"
    cells = [c.source for c in code(path)]
    at = next(i for i, c in enumerate(cells) if "load_model(" in c)
    run_apart([*cells[:at], TINY.format(layers), *cells[at:]], path.parent)


@pytest.mark.study
@pytest.mark.parametrize("study", STUDIES, ids=lambda p: p.stem)
def test_study_runs(study, tmp_path):
    cells = code(study)
    (chosen,) = [c for c in cells if "parameters" in c.metadata.get("tags", ())]
    assert "quick = False" in chosen.source, "the cell tagged `parameters` must set quick = False"
    chosen.source += "\nquick = True"
    run_apart([c.source for c in cells], tmp_path)
