"The rules of the house, measured: direction of imports, size, width, an example after every stretch of code."

import ast
import io
import json
import re
import statistics
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIB = ROOT / "concept_transfer"
ORDER = """cards data tasks stats artefacts toys engine remote ndif zoo models concepts pairing moments maps
    steering measure arms evidence suites selection drift vllm_plugin export plots views report uselog rollout
    monitor play cli all""".split()
MODULES = sorted(p.stem for p in LIB.glob("[!_]*.py"))
ROOMS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
TOKENS = 122_700  # rises with a feature, by what that needs; 48,000 was the goal for what 0.1.0 did
WIDTH = 110
LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}


@dataclass
class Cell:
    source: str
    outputs: int

    @property
    def exported(self):
        return bool(re.search(r"^#\| *export", self.source, re.M))

    @property
    def lines(self):
        "How many lines it has, without blank ones and `#|` options."
        return sum(bool(line.strip()) and not line.startswith("#|") for line in self.source.splitlines())

    @property
    def only_imports(self):
        return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(self.source).body)

    @property
    def example(self):
        "Something for a reader to see, or an assertion that teaches."
        aside = self.exported or re.search(r"^#\| *(default_exp|hide)\b", self.source, re.M)
        return not aside and (self.outputs > 0 or bool(re.search(r"\bassert\b|\btest_\w+\(", self.source)))


@cache
def cells(path):
    "The code cells of a notebook, without lines that are commands to the notebook."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = [c for c in found if c["cell_type"] == "code"]
    return [
        Cell(re.sub(r"^\s*[%!].*$", "pass", "".join(c["source"]), flags=re.M), len(c["outputs"]))
        for c in found
    ]


@cache
def written():
    "All Python that somebody wrote or reads, as {name: source}; cells of notebooks one by one."
    scripts = [
        *LIB.glob("[!_]*.py"),
        *(p for d in ("tests", "tools", "benchmarks") for p in (ROOT / d).rglob("*.py")),
    ]
    found = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in scripts}
    for path in (ROOT / "nbs").rglob("[!._]*.ipynb"):
        found |= {f"{path.relative_to(ROOT)} cell {i}": c.source for i, c in enumerate(cells(path))}
    return found


def tokens(source):
    return [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in LAYOUT]


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_patch(function):
    return any(ast.unparse(d).split("(")[0] == "patch" for d in function.decorator_list)


def imports(body):
    "Modules that the statements of `body` import, without what is inside functions; our own as `.name`."
    for node in body:
        if isinstance(node, ast.Import):
            yield from (re.sub(r"^concept_transfer\.?", ".", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = (
                f".{node.module or ''}" if node.level else re.sub(r"^concept_transfer\.?", ".", node.module)
            )
            yield from [f".{alias.name}" for alias in node.names] if name == "." else [name]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(ast.iter_child_nodes(node))


@cache
def tree(module):
    return ast.parse((LIB / f"{module}.py").read_text(encoding="utf-8"))


def test_every_room_has_its_place():
    assert [re.sub(r"^\d+_", "", p.stem) for p in ROOMS] == ORDER[:-1]
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_the_house(name):
    ours = {i.split(".")[1] for i in imports(tree(name).body) if i.startswith(".")}
    above = ours & set(ORDER[ORDER.index(name) :])
    assert not above, f"{name} imports {above}, which come later"


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"engine", "remote", "ndif"}))
def test_only_engines_touch_nnsight(name):
    "Other rooms know of it the type of a model."
    touched = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            touched += [a.name for a in node.names if a.name.split(".")[0] == "nnsight"]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "nnsight":
            touched += [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.With):
            calls = [i.context_expr for i in node.items if isinstance(i.context_expr, ast.Call)]
            names = [c.func.attr for c in calls if isinstance(c.func, ast.Attribute)]
            touched += [f"with .{n}()" for n in names if n in ("trace", "session", "scan", "edit")]
    assert set(touched) <= {"nnsight.TransformersModel"}


def test_the_package_is_small():
    size = {name: len(tokens((LIB / f"{name}.py").read_text(encoding="utf-8"))) for name in MODULES}
    total = sum(size.values())
    assert total <= TOKENS, f"{total} tokens: {dict(sorted(size.items(), key=lambda kv: -kv[1]))}"


def test_no_line_is_wide():
    wide = [
        f"{name}: {line[:60]}"
        for name, text in written().items()
        for line in text.splitlines()
        if len(line) > WIDTH
    ]
    assert not wide


@pytest.mark.slow
def test_no_statements_are_joined():
    joined = []
    for name, text in written().items():
        seen = list(tokenize.generate_tokens(io.StringIO(text).readline))
        for this, following in zip(seen, seen[1:], strict=False):
            if this.string == ";" and following.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
                joined.append(f"{name}: {this.line.strip()[:60]}")
    assert not joined


@pytest.mark.slow
def test_no_private_name_is_used_elsewhere():
    "Neither between modules nor by tests, tools, benchmarks and studies."
    private = set()
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                private.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                private.add(node.id)
    private = {n for n in private if is_private(n)} - {"_repr_html_", "_"}
    used = []
    for where, text in written().items():
        inside = where.startswith("concept_transfer")
        if re.match(
            r"nbs/\d", where
        ):  # the cells of a room may use its private names; its exports are in `inside`
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                ours = node.level or (node.module or "").startswith("concept_transfer")
                used += [f"{where}: {a.name}" for a in node.names if ours and is_private(a.name)]
            elif not inside and isinstance(node, ast.Attribute) and node.attr in private:
                used.append(f"{where}: .{node.attr}")
            elif not inside and isinstance(node, ast.Constant) and node.value in private:
                used.append(f"{where}: {node.value!r}")
    assert not used


def test_classes_grow_by_patch_alone():
    hung = []
    for name in MODULES:
        for node in tree(name).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            parts = [t for target in targets if target for t in ast.walk(target)]
            if any(isinstance(t, ast.Attribute) for t in parts) and not isinstance(node, (ast.For, ast.With)):
                hung.append(f"{name}: {ast.unparse(node)[:60]}")
            call = node.value if isinstance(node, ast.Expr) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "setattr":
                hung.append(f"{name}: {ast.unparse(node)[:60]}")
    assert not hung


@pytest.mark.slow
def test_no_function_takes_more_than_eight_things():
    long = []
    for where, text in written().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                a = node.args
                names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
                if len(names) - (names[:1] in (["self"], ["cls"])) > 8:
                    long.append(f"{where}: {getattr(node, 'name', 'lambda')} {names}")
    assert not long


def test_exported_cells_are_short():
    sizes = [c.lines for path in ROOMS for c in cells(path) if c.exported and not c.only_imports]
    assert statistics.median(sizes) <= 12
    assert sum(n <= 30 for n in sizes) >= 0.9 * len(sizes)


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_an_example_follows_soon(path):
    "No exported cell above 60 lines, and no 60 exported lines without something to see."
    stretch, worst = [], []
    for cell in cells(path):
        if cell.example:
            stretch = []
        elif cell.exported and not cell.only_imports:
            assert cell.lines <= 60, cell.source[:80]
            stretch = [*stretch, cell]
            worst = max(worst, stretch, key=lambda s: sum(c.lines for c in s))
    total = sum(c.lines for c in worst)
    assert total <= 60, f"{total} exported lines without an example, from {worst[0].source[:80]!r}"


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_say_what_they_take(name):
    "Methods may leave it to the protocol they follow, tokenizers have no common type; mypy checks the rest."
    bare = []
    for node in tree(name).body:
        if isinstance(node, ast.FunctionDef) and not is_private(node.name) and not is_patch(node):
            own = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare += [f"{node.name}({a.arg})" for a in own if a.annotation is None and a.arg != "tokenizer"]
    assert not bare
