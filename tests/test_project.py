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
