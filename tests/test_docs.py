"The docs as a reader sees them: built into a copy, opened in headless Chromium."

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --window-size=1280,1000""".split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    copy = tmp_path_factory.mktemp("project")
    for name in ["settings.ini", "_quarto.yml", "CHANGELOG.md"]:
        shutil.copy(ROOT / name, copy)
    for name in ["nbs", "tools", "concept_transfer"]:
        shutil.copytree(ROOT / name, copy / name, symlinks=True)
    run = [sys.executable, "tools/docs.py", "site"]
    made = subprocess.run(run, cwd=copy, check=True, stderr=subprocess.PIPE, text=True)
    warned = [line for line in made.stderr.splitlines() if line.startswith("warning:")]
    assert warned in (
        [],
        ["warning: format.html.grid is ignored"],
    )  # a key that nobody knows would stand here
    return copy / "_docs"


def browse(page, folder):
    "The page's DOM after its scripts ran, and a screenshot of it."
    shot = folder / "page.png"
    taken = [f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"--screenshot={shot}"]
    run = [CHROMIUM, *FLAGS, *taken, page.as_uri()]
    dom = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120).stdout
    return dom, shot


def text(dom):
    return html.unescape(re.sub(r"<[^>]+>", "", dom))


def test_index_has_its_content_and_a_sidebar_with_every_notebook(site, tmp_path):
    dom, shot = browse(site / "index.html", tmp_path)
    assert shot.stat().st_size > 10_000
    assert "load_model(" in text(dom) and "Recipes, questions, errors" in text(dom)
    sidebar = dom.split('id="quarto-sidebar"')[1].split("</nav>")[0]
    linked = {Path(link).stem for link in re.findall(r'href="([^"]+)"', sidebar)}
    found = [p for p in (ROOT / "nbs").rglob("[!._]*.ipynb") if "checkpoints" not in str(p)]
    notebooks = {re.sub(r"^\d+_", "", p.stem) for p in found}
    assert notebooks <= linked, f"add to _quarto.yml: {notebooks - linked}"


@pytest.mark.parametrize("page, shows", [("data", "def ContrastPairs("), ("steering", "Transplant.generate")])
def test_module_page_shows_signatures(site, tmp_path, page, shows):
    "Of classes, and of methods that were patched into them; names first, parameters in a table."
    dom, shot = browse(site / f"{page}.html", tmp_path)
    assert shot.stat().st_size > 10_000 and shows in text(dom)
    assert dom.index("Public names") < dom.index("sourceCode")
    assert re.search(r"<th[^>]*>type</th>\s*<th[^>]*>default</th>", dom)
    assert "Call self as a function" not in dom and " at 0x" not in dom


def test_tests_and_the_code_of_studies_are_folded(site):
    room, study = (
        (site / f"{name}.html").read_text(encoding="utf-8")
        for name in ("artefacts", "studies/word_or_concept")
    )
    folded = re.compile(r"<details.*?</details>", re.S)
    assert "Test" in room and "test_eq(" in text(" ".join(folded.findall(room)))
    main = study.split("<main")[1].split("</main>")[0]
    assert "import" in text(main) and "import" not in text(folded.sub("", main))
    assert re.search(r"callout-note.*?Summary.*?The emotions were carried", main, re.S)


def test_formulas_need_no_server(site):
    page = (site / "maps.html").read_text(encoding="utf-8")
    assert page.count("<math") > 40 and '<math xmlns="http' in page and 'display="block"' in page
    assert "katex" not in page and 'class="math inline">\\(' not in page


def test_every_picture_says_what_it_shows(site):
    pages = {p.name: re.findall(r"<img[^>]*>", p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    mute = [name for name, tags in pages.items() for tag in tags if not re.search(r'alt="[^"]+"', tag)]
    assert not mute and len(pages["gallery.html"]) > 40


def test_links_inside_the_site_lead_somewhere(site):
    "To a page that is there, and to a place on it."
    pages = {p.resolve(): p.read_text(encoding="utf-8") for p in site.rglob("*.html")}
    places = {p: {html.unescape(x) for x in re.findall(r'\sid="([^"]+)"', t)} for p, t in pages.items()}
    dead = set()
    for page, content in pages.items():
        for link in re.findall(r'href="([^":][^":]*)"', content):
            path, _, place = html.unescape(link).partition("#")
            to = (page.parent / path.split("?")[0]).resolve() if path else page
            if not to.exists() or (place and place not in places[to]):
                dead.add(f"{page.name} -> {link}")
    assert not dead


def test_llms_txt_lists_the_pages_of_the_sidebar(site):
    listed = re.findall(r"^- \[.+?\]\(\S+/concept_transfer/(\S+)\)", (site / "llms.txt").read_text(), re.M)
    sidebar = (
        (site / "index.html").read_text(encoding="utf-8").split('id="quarto-sidebar"')[1].split("</nav>")[0]
    )
    linked = {link.removeprefix("./") for link in re.findall(r'href="([^"#]+\.html)"', sidebar)}
    assert set(listed) == linked and all((site / page).exists() for page in listed)


def test_no_page_shows_where_it_was_made(site):
    "Such a path stands in what a cell said when it failed."
    told = [p.name for p in site.rglob("*.html") if str(ROOT) in p.read_text(encoding="utf-8")]
    assert not told
