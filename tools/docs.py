"""README and docs site, both from the notebooks with their stored outputs: only imports and signatures run.

    python tools/docs.py readme     # nbs/index.ipynb -> README.md, its pictures -> index_files/
    python tools/docs.py site       # nbs/ -> _docs/: with Quarto if installed, otherwise a smalldocs preview

nbdev's own commands would download and install Quarto where it is missing; these are their steps otherwise.
"""

import base64
import html
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from inspect import Parameter, formatannotation
from operator import attrgetter
from types import SimpleNamespace
from typing import get_type_hints

import nbformat
import yaml
from fastcore.docments import DocmentText
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
    alts = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            said = [alt for alt, _ in pictures_of(cell)]
            apply_options(cell)
            alts += said if cell.outputs else []
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
    md = re.sub(r"!\[png\]", lambda _: f"![{alts.pop(0)}]", md)
    md = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", md, flags=re.M)).strip()
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
    books = {path: nbformat.read(path, 4) for path in proc.rglob("*.ipynb")}
    shown = {
        f"{page.stem.partition('_')[2]}.html#{name.lower()}"
        for page, nb in books.items()
        for name, _ in documented(nb)
    }
    for path, nb in books.items():
        present(nb, path.relative_to(proc))
        for cell in (c for c in nb.cells if c.cell_type == "markdown"):
            cell.source = without_dead_ends(cell.source, shown)
        for _, output in documented(nb):
            output["text/markdown"] = without_dead_ends(output["text/markdown"], shown)
        nbformat.write(nb, path)
    gallery(proc)
    index = listing(proc)
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", "--no-cache"], cwd=proc, check=True)
    else:
        preview(proc)
    shutil.rmtree(CFG.doc_path, ignore_errors=True)
    shutil.move(proc / CFG.doc_path.name, CFG.doc_path)
    (CFG.doc_path / "llms.txt").write_text(index, encoding="utf-8")
    print(CFG.doc_path / "index.html")


def documented(nb):
    "Names that a processed notebook shows, each with what is shown."
    for cell in nb.cells:
        if found := re.search(r"^show_doc\((.+)\)$", cell.source, re.M):
            yield found[1], cell.outputs[0].data


def without_dead_ends(text, shown):
    "Links that nbdev made to a name lead to its page where no page shows the name."
    link = re.compile(rf"({CFG.doc_host}{CFG.doc_baseurl}/)(\w+\.html)(#[\w.]+)(?=\))")
    return link.sub(lambda m: m[0] if m[2] + m[3] in shown else m[1] + m[2], text)


def present(nb, path):
    "What a page has beyond its notebook, by where it lies: names first, tests and studies folded."
    room, study = re.match(r"\d+_(\w+)\.ipynb", path.name), path.parent.name == "studies"
    names = []
    for name, output in documented(nb):
        text = unlinked(output["text/markdown"]).replace("*Call self as a function.*", "")
        if room:
            names.append((name, re.split(r"^```$", text, flags=re.M)[-1]))
            text = with_parameters(text, attrgetter(name)(import_module(f"{CFG.lib_name}.{room[1]}")))
        output["text/markdown"] = text
    for cell in nb.cells:
        if study and cell.cell_type == "markdown":
            cell.source = boxed(cell.source)
        elif study and cell.cell_type == "code":
            cell.source = f"#| code-fold: true\n{cell.source}"
        elif room and cell.cell_type == "code" and not cell.outputs and is_test(cell.source):
            cell.source = f"#| code-fold: true\n#| code-summary: Test\n{cell.source}"
    if names:
        nb.cells.insert(1, nbformat.v4.new_markdown_cell(names_table(names)))


def is_test(source):
    return bool(re.search(r"\bassert\b|\btest_\w+\(", source))


def unlinked(text):
    "Undo the links that nbdev puts into signatures where a comment has backticks: code shows them raw."
    link = re.compile(r"\[(`[^`]+`)\]\([^)]*\)")
    return re.sub(r"^```.*?^```", lambda code: link.sub(r"\1", code[0]), text, flags=re.M | re.S)


def with_parameters(text, thing):
    "A signature with short types and defaults, and its comments as a table below it, where it has any."
    thing = getattr(thing, "fget", thing)
    if not callable(thing):
        return text
    bare, hints = DocmentText(thing, maxline=80, docstring=False), plain_hints(thing)
    table = any(p.get("docment") for p in bare.dm.values())
    rows = ["\n", "| | type | default | |", "|---|---|---|---|"]
    for name, p in bare.dm.items():
        kind, said = hints.get(name, p["anno"]), " ".join((p.pop("docment", "") or "").split())
        kind = "" if kind is Parameter.empty else re.sub(r"\b(\w+\.)+(?=\w)", "", formatannotation(kind))
        p["anno"] = Parameter.empty if table or not kind else kind
        default = ""
        if (given := p.get("default", Parameter.empty)) is not Parameter.empty:
            default = getattr(given, "__name__", repr(given))
            default = default if len(default) < 40 else "..."
            p["default"] = SimpleNamespace(__name__=default)  # by which fastcore shows it
        if name != "return" or kind != "None":
            quoted = [x and f"`{x}`" for x in (kind, default)]
            cells = "*returns*" if name == "return" else f"`{name}`", *quoted, said
            rows.append("| " + " | ".join(x.replace("|", r"\|") for x in cells) + " |")
    code = f"```python\n{bare}\n```"
    text = re.sub(r"^```python\n.*?^```", lambda _: code, text, flags=re.M | re.S)
    return text + "\n".join(rows if table else [])


def plain_hints(thing):
    "Types of parameters without what pydantic adds; none where only a type checker imports a name."
    try:
        return get_type_hints(thing)
    except NameError:
        return {}


def names_table(names):
    "Names of a room with the first sentence of each, linked; methods only of classes from other rooms."
    tops = {name for name, _ in names if "." not in name}
    lines = ["**Public names**", "", "| | |", "|---|---|"]
    for name, said in names:
        if not name.startswith("_") and ("." not in name or name.split(".")[0] not in tops):
            first = re.match(r".*?\.(?=\*? [A-Z])|.*", " ".join(said.split()).strip("*"))
            lines.append(f"| [`{name}`](#{name.lower()}) | {first[0]} |")
    return "\n".join(lines)


def boxed(text):
    "A study's summary, from where it begins to the end of its cell, as a box."
    if not (begin := re.search(r"^(> )?\*\*Summary\.\*\* |^In short[:,] ", text, re.M)):
        return text
    body = re.sub(r"^> ?", "", text[begin.start() :], flags=re.M) if begin[1] else text[begin.start() :]
    body = re.sub(r"^(\*\*Summary\.\*\* |In short[:,] )(\w)", lambda m: m[2].upper(), body)
    return f"{text[: begin.start()]}::: {{.callout-note}}\n## Summary\n\n{body}\n:::"


def pictures_of(cell):
    "Alternative text and PNG of each picture that a cell has stored."
    alt = re.search(r'^#\| fig-alt: "(.+)"$', cell.source, re.M)
    for out in cell.get("outputs", []):
        if "image/png" in out.get("data", {}):
            yield alt[1] if alt else "", out.data["image/png"]


def front_matter(path):
    "What stands at the head of a processed notebook or of a page: at least its title."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = nbformat.reads(text, 4).cells[0].source
    found = re.match(r"---\n(.*?)^---", text, re.M | re.S)
    return yaml.safe_load(found[1]) if found else {"title": re.search(r"^# (.+)", text, re.M)[1]}


def gallery(proc):
    "Pictures of the studies and of what there is to look at, as files and on a page of their own."
    about = "Pictures of the studies and views, under the page that makes them"
    lines = ["---", "title: Gallery", f"description: {about}", "---"]
    (proc / "gallery").mkdir()
    pages = [proc / "index.ipynb", proc / "walkthrough.ipynb", *sorted(proc.glob("*_views.ipynb"))]
    for page in [*pages, *sorted(proc.glob("studies/*.ipynb"))]:
        found = [p for cell in nbformat.read(page, 4).cells for p in pictures_of(cell)]
        if not found:
            continue
        title = f"[{front_matter(page)['title']}]({page.relative_to(proc)})"
        lines += ["", f"## {title}", "", "::: {layout-ncol=2}"]
        for i, (alt, png) in enumerate(found):
            file = proc / "gallery" / f"{page.stem}-{i}.png"
            file.write_bytes(base64.b64decode(png))
            lines += ["", f"![{alt}]({file.relative_to(proc)})"]
        lines += ["", ":::"]
    (proc / "gallery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def listing(proc):
    "The text of llms.txt: every page of the sidebar with its address, its title and what it says of itself."
    config = yaml.safe_load((proc / "_quarto.yml").read_text(encoding="utf-8"))
    lines = [f"# {CFG.lib_name}", "", f"> {CFG.description}"]
    for part in config["website"]["sidebar"]["contents"]:
        section, pages = (part["section"], part["contents"]) if isinstance(part, dict) else ("", [part])
        lines += ["", f"## {section}"] if section else []
        for page in pages:
            front = front_matter(proc / page)
            file = front.get("output-file", f"{(proc / page).stem}.html")
            url = f"{CFG.doc_host}{CFG.doc_baseurl}/{(proc / page).relative_to(proc).with_name(file)}"
            lines.append(f"- [{front['title']}]({url}): {front.get('description', '')}".rstrip(": "))
    return "\n".join(lines) + "\n"


def preview(proc):
    "Render with smalldocs: page names as Quarto gives them (01_data -> data), links into the docs relative."
    renamed = {p.name: re.sub(r"^\d+[a-z]?_", "", p.name) for p in proc.glob("[0-9]*_*.ipynb")}
    for old, new in renamed.items():
        (proc / old).rename(proc / new)
    for p in (q for end in ("ipynb", "qmd", "md", "yml") for q in proc.rglob(f"*.{end}")):
        text = p.read_text(encoding="utf-8")
        for old, new in renamed.items():
            text = text.replace(old, new)
        p.write_text(re.sub(r"output-file: \S+?\\n", "", text), encoding="utf-8")  # the rename has done that
    subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", "--quiet", proc], check=True)
    published, out = f'href="{CFG.doc_host}{CFG.doc_baseurl}/', proc / CFG.doc_path.name
    for p in out.rglob("*.html"):
        top = "../" * len(p.relative_to(out).parent.parts)
        text = p.read_text(encoding="utf-8").replace(published, f'href="{top}')
        p.write_text(with_mathml(text), encoding="utf-8")


def with_mathml(page):
    "The page with its formulas as MathML, which browsers draw, in the place of a script from a CDN."
    from latex2mathml.converter import convert  # which README and Quarto do without

    page = re.sub(r"<(link|script)[^>]*katex[^>]*>(</script>)?\s*", "", page)

    def drawn(found):
        display = "block" if found[2] == "display" else "inline"
        return found[1] + convert(html.unescape(found[3]), display=display)

    return re.sub(
        r'(<span class="math (inline|display)">)\\[(\[](.+?)\\[)\]](?=</span>)', drawn, page, flags=re.S
    )


if __name__ == "__main__":  # proc_nbs starts workers that import this file
    commands = {"readme": readme, "site": site}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    os.chdir(ROOT)
    commands[sys.argv[1]]()
