"""README and docs site, both from the notebooks with their stored outputs: only imports and signatures run.

    python tools/docs.py readme     # nbs/index.ipynb -> README.md, its pictures -> index_files/
    python tools/docs.py site       # nbs/ -> _docs/: with Quarto if installed, otherwise a smalldocs preview

nbdev's own commands would download and install Quarto where it is missing; these are their steps otherwise.
"""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbdev.serve_drv import exec_nb

CFG = get_config()
ROOT = CFG.config_path


def readme():
    "Render the index as GitHub shows it: title, text, code, stored outputs, links into the published docs."
    refresh_quarto_yml()
    processed = ROOT / "_proc" / CFG.readme_nb
    processed.parent.mkdir(exist_ok=True)
    os.environ["IN_TEST"] = "1"  # as nbdev does, so that no export is triggered
    exec_nb(CFG.nbs_path / CFG.readme_nb, processed, FilterDefaults)
    nb = nbformat.read(processed, 4)
    nb.metadata.language_info = {"name": "python"}
    front = yaml.safe_load(nb.cells.pop(0).source.strip("-\n"))  # from the title cell, written by nbdev
    for cell in nb.cells:
        if cell.cell_type == "code":
            apply_options(cell)
    pictures = ROOT / f"{processed.stem}_files"
    md, resources = MarkdownExporter().from_notebook_node(
        nb, {"unique_key": "figure", "output_files_dir": pictures.name}
    )
    shutil.rmtree(pictures, ignore_errors=True)
    for name, data in resources["outputs"].items():
        pictures.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    md = re.sub(r"^:::.*\n", "", md, flags=re.M)  # Quarto's fenced divs
    md = re.sub(r"(?<=\]\()((?:\w+/)*\w+\.ipynb)", r"nbs/\1", md)  # links between notebooks
    md = (
        re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", md, flags=re.M))
        .replace("![png](", "![figure](")
        .strip()
    )
    (ROOT / "README.md").write_text(
        f"# {front['title']}\n\n{front['description']}\n\n{md}\n", encoding="utf-8"
    )
    print(ROOT / "README.md")


def apply_options(cell):
    "Obey `#| echo: false`, `#| output: false` and `#| include: false` in a code cell; drop its option lines."
    options = dict(re.findall(r"^#\|\s*(\w+):\s*(\w+)", cell.source, re.M))
    off = {name for name, value in options.items() if value == "false"}
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    cell.metadata.transient = {"remove_source": bool(off & {"echo", "include"})}
    if off & {"output", "include"}:
        cell.outputs = []


def site():
    "Process the notebooks as nbdev does and render them; prints where the site is."
    refresh_quarto_yml()
    proc = proc_nbs(n_workers=2, force=True)
    for p in proc.rglob("*.ipynb"):
        unlink_signatures(p)
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", "--no-cache"], cwd=proc, check=True)
    else:
        preview(proc)
    shutil.rmtree(CFG.doc_path, ignore_errors=True)
    shutil.move(proc / CFG.doc_path.name, CFG.doc_path)
    print(CFG.doc_path / "index.html")


def unlink_signatures(path):
    "Undo the links that nbdev puts into signatures where a comment has backticks: code shows them raw."
    nb = nbformat.read(path, 4)
    for out in (o for c in nb.cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})):
        out.data["text/markdown"] = re.sub(
            r"^```.*?^```",
            lambda code: re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", code[0]),
            out.data["text/markdown"],
            flags=re.M | re.S,
        )
    nbformat.write(nb, path)


def preview(proc):
    "Render with smalldocs: page names as Quarto gives them (01_data -> data), links into the docs relative."
    renamed = {p.name: re.sub(r"^\d+[a-z]?_", "", p.name) for p in proc.glob("[0-9]*_*.ipynb")}
    for old, new in renamed.items():
        (proc / old).rename(proc / new)
    for p in [*proc.rglob("*.ipynb"), *proc.glob("*.yml")]:
        text = p.read_text(encoding="utf-8")
        for old, new in renamed.items():
            text = text.replace(old, new)
        p.write_text(re.sub(r"output-file: \S+?\\n", "", text), encoding="utf-8")  # the rename has done that
    subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", "--quiet", proc], check=True)
    published, out = f'href="{CFG.doc_host}{CFG.doc_baseurl}/', proc / CFG.doc_path.name
    for p in out.rglob("*.html"):
        top = "../" * len(p.relative_to(out).parent.parts)
        p.write_text(p.read_text(encoding="utf-8").replace(published, f'href="{top}'), encoding="utf-8")


if __name__ == "__main__":  # proc_nbs starts workers that import this file
    commands = {"readme": readme, "site": site}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    os.chdir(ROOT)
    commands[sys.argv[1]]()
