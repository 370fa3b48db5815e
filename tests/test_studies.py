"The index runs, and every study from top to bottom with parameters that make it quick."

from pathlib import Path

import papermill as pm
import pytest

NBS = Path(__file__).parents[1] / "nbs"
INDEX, STUDIES = NBS / "index.ipynb", sorted((NBS / "studies").glob("*.ipynb"))


@pytest.mark.study
def test_the_index_runs(tmp_path):
    pm.execute_notebook(INDEX, tmp_path / "index.ipynb", kernel_name="python3", cwd=NBS, progress_bar=False)


@pytest.mark.study
@pytest.mark.parametrize("study", STUDIES, ids=lambda p: p.stem)
def test_study_runs(study, tmp_path):
    assert "quick" in pm.inspect_notebook(study), "the cell tagged `parameters` must set quick = False"
    where = dict(kernel_name="python3", cwd=tmp_path, progress_bar=False)
    pm.execute_notebook(study, tmp_path / study.name, {"quick": True}, **where)
