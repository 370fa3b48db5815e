"""mypy over the package, with every method where mypy looks for it: in its class.

    python tools/typecheck.py       # one line a finding; exits with 1 if there are any

Classes of this package grow by fastcore's `@patch`, a method a cell. mypy would see functions, and classes
that lack them, so a copy of the package is checked in which each stands in the body of its class.
"""

import ast
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "concept_transfer"
KINDS = {"as_prop": "property", "cls_method": "classmethod", "static_method": "staticmethod"}


def patch_of(node: ast.stmt) -> ast.expr | None:
    "The `@patch` or `@patch(...)` above a function."
    for decorator in getattr(node, "decorator_list", []):
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(name, ast.Name) and name.id == "patch":
            return decorator
    return None


def owners(function: ast.FunctionDef) -> list[str]:
    "The classes that a patched function belongs to: what its first parameter is annotated with."
    annotation = function.args.args[0].annotation
    return [n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)] if annotation else []


def as_method(function: ast.FunctionDef, decorator: ast.expr, lines: list[str]) -> list[tuple[int, str]]:
    "The lines of a patched function as they stand in a class, each with its number in the file."
    kept = {i: lines[i - 1] for i in range(decorator.lineno, function.end_lineno + 1)}
    for i in range(decorator.lineno, decorator.end_lineno + 1):
        del kept[i]
    for option in getattr(decorator, "keywords", []):
        kept[decorator.lineno] = f"@{KINDS.get(option.arg, f'{function.name}.setter')}"
    first = function.args.args[0]
    text, end = kept[first.lineno], first.annotation.end_col_offset
    kept[first.lineno] = text[: first.col_offset] + first.arg + text[end:]
    return [(i, "    " + text if text.strip() else text) for i, text in sorted(kept.items())]


def gather(source: str) -> tuple[str, list[int]]:
    "A module with patched functions moved into their classes, and for each line its number in `source`."
    lines, tree = source.splitlines(), ast.parse(source)
    classes = {n.name: n.end_lineno for n in tree.body if isinstance(n, ast.ClassDef)}
    moved: dict[int, list[tuple[int, str]]] = {}
    gone: set[int] = set()
    for node in tree.body:
        decorator = patch_of(node)
        if decorator is None or not set(owners(node)) <= classes.keys():  # of no class here: stays a function
            continue
        for owner in owners(node):
            moved.setdefault(classes[owner], []).extend(as_method(node, decorator, lines))
        gone.update(range(decorator.lineno, node.end_lineno + 1))
    out = []
    for i, text in enumerate(lines, 1):
        out += [] if i in gone else [(i, text)]
        out += moved.get(i, [])
    return "".join(text + "\n" for _, text in out), [i for i, _ in out]


def place(tree: ast.Module, line: int) -> str:
    "The function or class that a line stands in."
    names: list[str] = []
    for node in ast.walk(tree):  # outer ones first
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= node.end_lineno:
            names += owners(node)[:1] if patch_of(node) else []
            names.append(node.name)
    return ".".join(names) or "module"


def main() -> int:
    numbers, trees = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / LIB.name
        shutil.copytree(LIB, copy, ignore=shutil.ignore_patterns("__pycache__", "_modidx.py", "sets"))
        for file in copy.glob("*.py"):
            source = file.read_text(encoding="utf-8")
            text, numbers[file.name] = gather(source)
            trees[file.name] = ast.parse(source)
            file.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--output", "json"]
        command += ["--cache-dir", ROOT / ".mypy_cache", LIB.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.stderr or done.returncode > 1:
        sys.exit(done.stderr + done.stdout)
    lines = done.stdout.splitlines() if done.returncode else []  # else it says in words that all is well
    for found in map(json.loads, lines):
        name = Path(found["file"]).name
        line = numbers[name][max(found["line"], 1) - 1]
        where = f"{LIB.name}/{name}:{line} {place(trees[name], line)}"
        print(f"{where}: {found['message'][:400]} [{found['code']}]")
    print(f"{len(lines)} findings in {len(trees)} modules")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
