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
    for name in ["settings.ini", "_quarto.yml"]:
        shutil.copy(ROOT / name, copy)
    for name in ["nbs", "tools", "concept_transfer"]:
        shutil.copytree(ROOT / name, copy / name, symlinks=True)
    subprocess.run([sys.executable, "tools/docs.py", "site"], cwd=copy, check=True)
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
    assert "load_model(" in text(dom)
    sidebar = dom.split('id="quarto-sidebar"')[1].split("</nav>")[0]
    linked = {Path(link).stem for link in re.findall(r'href="([^"]+)"', sidebar)}
    found = [p for p in (ROOT / "nbs").rglob("[!._]*.ipynb") if "checkpoints" not in str(p)]
    notebooks = {re.sub(r"^\d+_", "", p.stem) for p in found}
    assert notebooks <= linked, f"add to _quarto.yml: {notebooks - linked}"


@pytest.mark.parametrize("page, shows", [("data", "def ContrastPairs("), ("steering", "Transplant.generate")])
def test_module_page_shows_signatures(site, tmp_path, page, shows):
    "Of classes, and of methods that were patched into them."
    dom, shot = browse(site / f"{page}.html", tmp_path)
    assert shot.stat().st_size > 10_000 and shows in text(dom)


def test_links_inside_the_site_lead_somewhere(site):
    dead = set()
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="([^"#?:]+\.(?:html|ipynb))', page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists():
                dead.add(f"{page.name} -> {link}")
    assert not dead


def test_no_page_shows_where_it_was_made(site):
    "Such a path stands in what a cell said when it failed."
    told = [p.name for p in site.rglob("*.html") if str(ROOT) in p.read_text(encoding="utf-8")]
    assert not told
