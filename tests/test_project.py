"What holds for the package as a whole: versions, shipped files, requirements, and the direction of imports."
import ast, json, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest

import concept_transfer

ROOT = Path(__file__).parents[1]
LIB = ROOT/"concept_transfer"
ORDER = "data remote models extraction moments alignment injection tasks inference evaluation selection plots cli all".split()
MODULES = sorted(p.stem for p in LIB.glob("[!_]*.py"))


def settings():
    cfg = ConfigParser(interpolation=None)
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def imports(body):
    "Names of the modules that the statements of `body` import, without what is inside functions; our own as `.name`."
    def own(name): return re.sub(r"^concept_transfer\.?", ".", name)
    for node in body:
        if isinstance(node, ast.Import):
            yield from (own(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = f".{node.module or ''}" if node.level else own(node.module)
            yield from [f".{alias.name}" for alias in node.names] if name == "." else [name]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(ast.iter_child_nodes(node))


def test_versions_agree():
    changes = (ROOT/"CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changes, re.M)[1]
    assert settings()["version"] == concept_transfer.__version__ == version("concept_transfer") == newest


def test_wheel_holds_every_module_and_data_file(tmp_path):
    source = tmp_path/"source"                                             # a copy: building leaves files behind
    shutil.copytree(LIB, source/LIB.name)
    for name in "settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE".split(): shutil.copy(ROOT/name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    wheel, = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    data = {p for p in (LIB/"sets").rglob("*") if p.is_file()}
    assert data, "no data files in concept_transfer/sets"
    missing = {p.relative_to(ROOT).as_posix() for p in data | set(LIB.glob("*.py"))} - inside
    assert not missing, f"not in the wheel, see package_data in settings.ini: {missing}"


def test_import_needs_no_development_tools():
    code = "import sys, concept_transfer.all; print(*sorted({'nbdev', 'execnb', 'fastcore'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not out.split()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_the_house(name):
    assert name in ORDER, f"give {name} its place in ORDER"
    tree = ast.parse((LIB/f"{name}.py").read_text(encoding="utf-8"))
    ours = {i.split(".")[1] for i in imports(tree.body) if i.startswith(".")}
    above = {i for i in ours if i in ORDER[ORDER.index(name):]}
    assert not above, f"{name} imports {above}, which come later"


@pytest.mark.parametrize("name", MODULES)
def test_every_import_is_a_declared_requirement(name):
    declared = {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in requires("concept_transfer") if "extra ==" not in r}
    tree = ast.parse((LIB/f"{name}.py").read_text(encoding="utf-8"))
    tops = {i.split(".")[0] for node in ast.walk(tree) for i in imports([node]) if not i.startswith(".")}
    dists = packages_distributions()
    foreign = {t: {d.lower().replace("_", "-") for d in dists.get(t, [])} for t in tops - set(sys.stdlib_module_names)}
    assert not {t for t, names in foreign.items() if not names & declared}


@pytest.mark.parametrize("path", sorted(ROOT.glob("nbs/*.ipynb")), ids=lambda p: p.stem)
def test_cells_with_imports_hold_nothing_else(path):
    "The docs build runs such cells to resolve names, and with them whatever else they hold."
    mixed = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.search(r"^#\| *(exports?|exporti|exec_doc|eval: *false)\b", code, re.M): continue
        nodes = list(ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.M))))
        if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes) and any(isinstance(n, (ast.Expr, ast.Assign)) for n in nodes):
            mixed.append(code[:80])
    assert not mixed


@pytest.fixture
def project(tmp_path):
    "A project of one study and one benchmark, which `make` finds set up already."
    (tmp_path/"nbs"/"studies").mkdir(parents=True); (tmp_path/"benchmarks").mkdir(); (tmp_path/".venv").mkdir()
    for name in "Makefile settings.ini setup.py pyproject.toml constraints.txt".split(): shutil.copy(ROOT/name, tmp_path)
    (tmp_path/".venv"/"bin").symlink_to(Path(sys.executable).parent)
    for name in (".runtime", ".dev"): (tmp_path/".venv"/name).touch()
    def write(path, *code):
        cells = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=c) for i, c in enumerate(code)]
        path.write_text(json.dumps(dict(cells=cells, metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, nbformat=4, nbformat_minor=5), indent=1) + "\n")
        return path
    return tmp_path, write


def make(folder, target): return subprocess.run(["make", target], cwd=folder, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_failing_study_keeps_its_stored_outputs(project):
    folder, write = project; study = write(folder/"nbs"/"studies"/"one.ipynb", "print('evidence')", "1 / 0"); before = study.read_text()
    done = make(folder, "studies")
    assert done.returncode and "ZeroDivisionError" in done.stderr and study.read_text() == before
    write(study, "print('evidence')")
    done = make(folder, "studies")
    assert done.returncode == 0 and "evidence" in json.dumps(json.loads(study.read_text())["cells"][0]["outputs"]), done.stderr
    assert "papermill" not in study.read_text() and [p.name for p in study.parent.iterdir()] == [study.name]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_failing_benchmark_keeps_the_last_tables(project):
    folder, write = project; page = folder/"nbs"/"benchmarks.ipynb"; shutil.copy(ROOT/"nbs"/"benchmarks.ipynb", page)
    scripts, results = sorted(p.stem for p in (ROOT/"benchmarks").glob("*.py") if p.stem != "shared"), folder/"benchmarks"/"RESULTS.md"
    for s in scripts: (folder/"benchmarks"/f"{s}.py").write_text(f"print('## table of {s}')")
    assert make(folder, "benchmarks").returncode == 0 and sorted(l.split()[-1] for l in results.read_text().splitlines()) == scripts
    assert all(f"table of {s}" in page.read_text() for s in scripts)
    before = results.read_text(); (folder/"benchmarks"/f"{scripts[-1]}.py").write_text("1 / 0")
    assert make(folder, "benchmarks").returncode and results.read_text() == before
