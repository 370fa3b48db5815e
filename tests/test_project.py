"What holds for the project as a whole: versions, shipped files, requirements, what `make` and the tools do."

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from importlib.metadata import packages_distributions, version
from operator import attrgetter
from pathlib import Path

import pytest
from typer.main import get_command

import concept_transfer
from concept_transfer.cli import app

ROOT = Path(__file__).parents[1]
LIB = ROOT / "concept_transfer"
MODULES = sorted(p.stem for p in LIB.glob("[!_]*.py"))
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def settings():
    cfg = ConfigParser(interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def test_versions_agree():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changes, re.M)[1]
    cited = re.search(r"^version: (\S+)", citation, re.M)[1]
    page = re.search(r"version += \{(\S+)\}", (ROOT / "nbs" / "citation.qmd").read_text(encoding="utf-8"))[1]
    ours = settings()["version"]
    assert ours == concept_transfer.__version__ == version("concept_transfer") == newest == cited == page


@pytest.mark.slow
def test_wheel_holds_every_module_and_data_file(tmp_path):
    source = tmp_path / "source"  # a copy: building leaves files behind
    shutil.copytree(LIB, source / LIB.name)
    for name in "settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE".split():
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = {p for p in LIB.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {".jsonl", ".html", ".typed"} <= {p.suffix for p in files}
    missing = {p.relative_to(ROOT).as_posix() for p in files} - inside
    assert not missing, f"not in the wheel, see package_data in settings.ini: {missing}"


@pytest.mark.slow
def test_import_needs_no_development_tools():
    code = "import sys, concept_transfer.all; print(*sorted({'nbdev', 'execnb'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not out.split()


def foreign(node, inside=False):
    "Packages of others that are imported, and whether that happens inside a function."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from [] if child.level else [(child.module.split(".")[0], inside)]
        else:
            yield from foreign(child, inside or isinstance(child, ast.FunctionDef))


@cache
def offered():
    "The distributions that a package may come from; asking for them takes a moment."
    return packages_distributions()


@pytest.mark.parametrize("name", MODULES)
def test_every_import_is_a_declared_requirement(name):
    "Inside a function also what is extra, and said to be where it is missing."

    def names(key):
        return {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in settings()[key].split()}

    always = names("requirements")
    sometimes = always | names("tasks_requirements") | names("rollout_requirements")
    sometimes |= {"datasets", "lm-eval", "vllm"}
    undeclared = set()
    for package, inside in foreign(ast.parse((LIB / f"{name}.py").read_text(encoding="utf-8"))):
        found = {d.lower().replace("_", "-") for d in offered().get(package, [package])}
        known = {*sys.stdlib_module_names, LIB.name}
        if package not in known and not found & (sometimes if inside else always):
            undeclared.add(package)
    assert not undeclared


@pytest.mark.parametrize("path", sorted(ROOT.glob("nbs/*.ipynb")), ids=lambda p: p.stem)
def test_cells_with_imports_hold_nothing_else(path):
    "The docs build runs such cells to resolve names, and with them whatever else they hold."
    mixed = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        code = "".join(cell["source"])
        exempt = re.search(r"^#\| *(exports?|exporti|exec_doc|eval: *false)\b", code, re.M)
        if cell["cell_type"] != "code" or exempt:
            continue
        nodes = list(ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.M))))
        imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)
        if imports and any(isinstance(n, (ast.Expr, ast.Assign)) for n in nodes):
            mixed.append(code[:80])
    assert not mixed


def set_up(folder, *names):
    "A copy of some files of the project, which `make` finds set up already."
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt", *names):
        here = ROOT / name
        if here.is_dir():
            leave = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(here, folder / name, symlinks=True, ignore=leave)
        else:
            shutil.copy(here, folder)
    (folder / ".venv").mkdir()
    for part in Path(sys.prefix).glob("[!.]*"):
        (folder / ".venv" / part.name).symlink_to(part)
    for name in (".runtime", ".dev"):
        (folder / ".venv" / name).touch()
    return folder


def make(folder, target):
    return subprocess.run(["make", target], cwd=folder, capture_output=True, text=True)


@needs_make
@pytest.mark.slow
def test_prepare_formats_and_then_changes_nothing(tmp_path):
    "A formatter and nbdev's export must not undo each other's work."
    made = [
        "README.md",
        "CHANGELOG.md",
        "_quarto.yml",
        "nbs",
        "tests",
        "tools",
        "benchmarks",
        "concept_transfer",
    ]
    folder = set_up(tmp_path, *made)
    notebook, module = folder / "nbs" / "00_cards.ipynb", folder / "concept_transfer" / "cards.py"
    content = json.loads(notebook.read_text())
    last = [c for c in content["cells"] if re.match(r"#\| *export", "".join(c["source"]))][-1]
    last["source"] = "".join(last["source"]) + "\n\ndef spoilt( a,b ) :\n  return {'a':a,\n 'b' : b }"
    notebook.write_text(json.dumps(content))

    def files():
        kept = [p for p in folder.rglob("*") if p.is_file() and ".venv" not in p.parts]
        return {p: p.read_bytes() for p in kept if not {"__pycache__", "_proc", ".ruff_cache"} & set(p.parts)}

    done = make(folder, "prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    formatted = 'def spoilt(a, b):\n    return {"a": a, "b": b}'
    assert (
        formatted in module.read_text() and json.dumps(formatted.split("\n")[1])[1:-1] in notebook.read_text()
    )
    before = files()
    assert make(folder, "prepare").returncode == 0
    after = files()
    assert {str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p)} == set()


@pytest.fixture
def project(tmp_path):
    "A project of one study and one benchmark."
    (tmp_path / "nbs" / "studies").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}

    def write(path, *code):
        cell = dict(cell_type="code", metadata={}, execution_count=None, outputs=[])
        cells = [cell | dict(id=f"c{i}", source=c) for i, c in enumerate(code)]
        book = dict(cells=cells, metadata={"kernelspec": kernel}, nbformat=4, nbformat_minor=5)
        path.write_text(json.dumps(book, indent=1) + "\n")
        return path

    return set_up(tmp_path), write


@needs_make
@pytest.mark.slow
def test_a_failing_study_keeps_its_stored_outputs(project):
    folder, write = project
    study = write(folder / "nbs" / "studies" / "one.ipynb", "print('evidence')", "1 / 0")
    before = study.read_text()
    done = make(folder, "studies")
    assert done.returncode and "ZeroDivisionError" in done.stderr and study.read_text() == before
    write(study, "print('evidence')")
    done = make(folder, "studies")
    assert done.returncode == 0, done.stderr
    assert "evidence" in json.dumps(json.loads(study.read_text())["cells"][0]["outputs"])
    assert "papermill" not in study.read_text() and [p.name for p in study.parent.iterdir()] == [study.name]


@needs_make
@pytest.mark.slow
def test_a_failing_benchmark_keeps_the_last_tables(project):
    folder, _ = project
    page, results = folder / "nbs" / "benchmarks.ipynb", folder / "benchmarks" / "RESULTS.md"
    shutil.copy(ROOT / "nbs" / "benchmarks.ipynb", page)
    names = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "shared")
    scripts = [folder / "benchmarks" / f"{name}.py" for name in names]
    shutil.copy(ROOT / "benchmarks" / "shared.py", folder / "benchmarks")
    old = "## Another processor\n\n### table of peers\n\nold\n\n"
    results.write_text(old + "## A processor\n\n### table of peers\n\nold\n\n")
    for script in scripts:
        script.write_text(f"print('## A processor\\n\\n### table of {script.stem}\\n\\nnew\\n')")
    done = make(folder, "benchmarks")
    assert done.returncode == 0, done.stderr
    kept, made = results.read_text().split("## A processor\n\n")
    assert kept == old and "old" not in made
    assert sorted(line.split()[-1] for line in made.splitlines() if line.startswith("### ")) == names
    assert all(f"table of {name}" in page.read_text() for name in names)
    before = results.read_text()
    scripts[-1].write_text("1 / 0")
    assert make(folder, "benchmarks").returncode and results.read_text() == before


PATCHED = '''"A module."
from fastcore.basics import patch


class Sum:
    "Grows by a method a cell."

    n: int = 0


@patch
def add(self: Sum, n: int) -> "Sum":  # kept
    """Two
    lines."""
    self.n += n
    return self


@patch(as_prop=True)
def half(self: Sum) -> float:
    return self.n / 2


@patch(cls_method=True)
def of(cls: Sum, n: int) -> "Sum":
    return cls().add(n)


print(Sum.of(3).half)
'''


def test_the_type_checker_sees_patched_methods_in_their_class():
    spec = importlib.util.spec_from_file_location("typecheck", ROOT / "tools" / "typecheck.py")
    typecheck = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(typecheck)
    text, numbers = typecheck.gather(PATCHED)
    cls = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef))
    methods = [n for n in cls.body if isinstance(n, ast.FunctionDef)]
    kinds = {m.name: [ast.unparse(d) for d in m.decorator_list] for m in methods}
    assert kinds == {"add": [], "half": ["property"], "of": ["classmethod"]}
    assert all(m.args.args[0].annotation is None for m in methods) and "@patch" not in text
    original = PATCHED.splitlines()
    for number, line in zip(numbers, text.splitlines(), strict=True):
        assert (
            line.strip() == original[number - 1].strip()
            or "patch" in original[number - 1]
            or "self" in line
            or "cls" in line
        )
    line = original.index("    return cls().add(n)") + 1
    assert typecheck.place(ast.parse(PATCHED), line) == "Sum.of"
    scope = {}
    exec(compile(text, "gathered", "exec"), scope)
    assert scope["Sum"].of(3).half == 1.5


TRIPLE = r"([+-]?\d*\.\d+)\s*\[\s*([+-]?\d*\.\d+),\s*([+-]?\d*\.\d+)\]"  # a number and its interval


def triples_of(study):
    "Every number with an interval that a study has printed, or written to its results."
    printed = json.dumps([c.get("outputs") for c in json.loads(study.read_text())["cells"]])
    found = [[float(x) for x in t] for t in re.findall(TRIPLE, printed.replace("\\n", " "))]
    results = study.with_suffix(".json")
    if results.exists():
        dense = json.dumps(json.loads(results.read_text()))
        flat = re.findall(r"\[([-\d.e]+), ([-\d.e]+), ([-\d.e]+)\]", dense)
        flat += re.findall(r': ([-\d.e]+), "low": ([-\d.e]+), "high": ([-\d.e]+)', dense)
        found += [[float(x) for x in t] for t in flat]
    return found


def unknown(text, known):
    "The numbers with an interval of a text that are not among some, also turned round: *behind by*."
    for said in re.findall(TRIPLE, text):
        near = 0.5 * 10 ** -min(len(x.split(".")[1]) for x in said) + 1e-9
        m, low, high = map(float, said)
        if not any(
            max(abs(a - b) for a, b in zip(t, x, strict=True)) <= near
            for t in known
            for x in ((m, low, high), (-m, -high, -low))
        ):
            yield said


def test_numbers_in_the_readme_are_those_of_the_studies():
    "In every paragraph that links to studies, each number that has an interval is one of theirs."
    checked = 0
    for paragraph in re.split(r"\n(?=- |\n)", (ROOT / "README.md").read_text(encoding="utf-8")):
        linked = re.findall(r"\(nbs/(studies/\w+\.ipynb)\)", paragraph)
        known = [t for study in linked for t in triples_of(ROOT / "nbs" / study)]
        if linked:
            assert not [*unknown(paragraph, known)], linked
            checked += len(re.findall(TRIPLE, paragraph))
    assert checked > 50


BARE = r"(?<![\w.])[+-]?\d*\.\d\d+(?![\w.])"


def test_decimals_without_an_interval_are_also_those_of_the_studies():
    "In the README's findings, as far as a paragraph links to a study."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    findings, checked = text.split("## What the studies found")[1].split("## What is not shown")[0], 0
    for paragraph in re.split(r"\n(?=- |\n)", findings):
        linked = re.findall(r"\(nbs/(studies/\w+)\.ipynb\)", paragraph)
        files = [ROOT / "nbs" / f"{x}{end}" for x in linked for end in (".ipynb", ".json")]
        books = [json.loads(f.read_text()) for f in files if f.exists()]
        stored = json.dumps([[c.get("outputs") for c in b["cells"]] if "cells" in b else b for b in books])
        known = {float(x) for x in re.findall(r"-?\d*\.\d+", stored.replace("\\n", " "))}
        for said in re.findall(BARE, re.sub(TRIPLE, "", paragraph)) if linked else ():
            near = 0.5 * 10 ** -len(said.split(".")[1]) + 1e-9
            assert any(abs(abs(float(said)) - abs(x)) <= near for x in known), (linked, said)
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("study", sorted((ROOT / "nbs" / "studies").glob("*.ipynb")), ids=lambda p: p.stem)
def test_numbers_in_the_text_of_a_study_are_those_it_stored(study):
    "Of its own run, or of a study that it links to; but for its plan, which quotes what was known before."
    parts = [
        "".join(c["source"]) for c in json.loads(study.read_text())["cells"] if c["cell_type"] == "markdown"
    ]
    text = "\n".join(x.split("## The plan")[0] for x in parts)
    linked = {study, *(study.parent / x for x in re.findall(r"\((\w+\.ipynb)\)", text))}
    assert not [*unknown(text, [t for x in linked for t in triples_of(x)])]


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("[!._]*.ipynb")), ids=lambda p: p.stem)
def test_every_stored_picture_says_what_it_shows(path):
    "By `#| fig-alt:`, which site and README show to those who cannot see it."
    mute = []
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if pictures and not re.search(r'^#\| fig-alt: ".{20,}"$', "".join(cell["source"]), re.M):
            mute.append(i)
    assert not mute


def messages():
    "Texts of all errors that the package makes, with an ellipsis for what is filled in."
    for name in MODULES:
        for node in ast.walk(ast.parse((LIB / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Error", "NotCompared")):
                for part in (p for arg in node.args for p in ast.walk(arg)):
                    if isinstance(part, ast.JoinedStr):
                        parts = part.values
                        yield "".join(p.value if isinstance(p, ast.Constant) else "…" for p in parts)
                    elif isinstance(part, ast.Constant):
                        yield str(part.value)


def test_errors_in_the_help_are_those_of_the_code():
    page = (ROOT / "nbs" / "help.qmd").read_text(encoding="utf-8").split("## Errors")[1]
    quoted, made = re.findall(r"^- `(.+?)` ", page, re.M), list(messages())
    assert len(quoted) > 15
    unknown = []
    for said in quoted:
        pattern = ".*".join(map(re.escape, said.split("…")))
        if not any(re.search(pattern, text, re.S) for text in made):
            unknown.append(said)
    assert not unknown


def test_commands_in_the_help_are_those_of_the_command_line():
    known = get_command(app).commands
    found = re.findall(
        r"`concept-transfer (\w+)([^`]*)`", (ROOT / "nbs" / "help.qmd").read_text(encoding="utf-8")
    )
    assert len(found) > 5
    for name, rest in found:
        options = {o for p in known[name].params for o in p.opts}
        assert set(re.findall(r"--\w+", rest)) <= options, (name, rest)


@pytest.mark.parametrize("page", ["glossary", "help"])
def test_names_in_pages_are_those_of_the_room_they_link_to(page):
    found = re.findall(
        r"\[`([A-Za-z_.]+)[^`]*`\]\(\d+_(\w+)\.ipynb",
        (ROOT / "nbs" / f"{page}.qmd").read_text(encoding="utf-8"),
    )
    assert len(found) > 5
    for name, room in found:
        attrgetter(name)(import_module(f"concept_transfer.{room}"))
