"Every study runs from top to bottom, with parameters that make it quick."

from pathlib import Path

import papermill as pm
import pytest

STUDIES = sorted((Path(__file__).parents[1] / "nbs" / "studies").glob("*.ipynb"))


@pytest.mark.study
@pytest.mark.parametrize("study", STUDIES, ids=lambda p: p.stem)
def test_study_runs(study, tmp_path):
    assert "quick" in pm.inspect_notebook(study), "the cell tagged `parameters` must set quick = False"
    where = dict(kernel_name="python3", cwd=tmp_path, progress_bar=False)
    pm.execute_notebook(study, tmp_path / study.name, {"quick": True}, **where)
