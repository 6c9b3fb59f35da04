import functools
import html
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import pytest

from kdx.distil.run_store import find_run
from kdx.pages.build import execute_page, load_pages
from kdx.pages.sweep import read_glued
from tests.checkout import ROOT, asked_for, copy_sources, voila_errors
from tests.clusters import cluster
from tests.forks import own_processes, python


def kdx(*arguments, home):
    command = [*python("kdx.cli"), *map(str, arguments)]
    environment = os.environ | {"KDX_HOME": str(home), "KDX_DATA": "", "KDX_NETWORKS": str(home / "networks")}
    environment["OMP_NUM_THREADS"] = "1"  # weights are equal at one thread
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def smoke_book(tmp_path_factory):
    """A checkout's sources with the smoke book built in it, and the data home it used."""
    root = copy_sources(tmp_path_factory.mktemp("book"))
    home = tmp_path_factory.mktemp("home")
    done = kdx("book", "--profile", "smoke", "--root", root, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, home


@pytest.mark.book
def test_book_builds_every_page_of_the_toc(smoke_book):
    html = smoke_book[0] / "book" / "_build" / "html"
    for page in (
        "index",
        "method",
        "reproduce",
        "architecture",
        "bibliography",
        "executed/00_data",
        "executed/01_gradcam",
        "executed/02_unicam",
        "executed/03_capacity_gap",
        "executed/04_own_models",
        "executed/05_planted",
        "executed/06_handed_over",
        "executed/07_dissection",
        "executed/08_techniques",
        "executed/09_yardsticks",
        "executed/10_text",
        "executed/11_side_by_side",
        "executed/12_leaderboard",
        "executed/13_cluster",
        "executed/explorer",
        "own_models",
        "figures",
        "glossary",
        "api",
        "executed/petimages_gradcam",
        "executed/petimages_unicam",
        "executed/plantvillage_gradcam",
        "executed/plantvillage_unicam",
        "claims",
        "benchmarks",
    ):
        assert (html / "book" / f"{page}.html").is_file()
        foot = (html / "book" / f"{page}.html").read_text().rpartition('<footer class="built-from">')[2]
        assert re.match(r"<p>Built on \d{4}-\d\d-\d\d from commit \S+ with the profile smoke: kdx ", foot)
        assert "Cite this page: The kdx authors (" in foot
    assert "url=book/index.html" in (html / "index.html").read_text()  # the root leads to the landing page


@pytest.mark.book
def test_book_says_how_to_get_the_data_of_pages_that_are_not_built(smoke_book):
    html = smoke_book[0] / "book" / "_build" / "html" / "book"
    page = re.sub("<[^>]+>", "", (html / "executed" / "plantvillage_unicam.html").read_text())
    assert "Plant leaves: features that only one of two networks has" in page
    assert "Not built here, because PlantVillage is not on this machine" in page
    assert "kdx data get plantvillage" in page
    board = (html / "claims.html").read_text()
    assert "not built here" not in board
    assert board.count("(stored run of ") == 1  # the effects of claim 8


@pytest.mark.book
def test_book_rebuild_trains_and_executes_nothing(smoke_book):
    root, home = smoke_book
    stamps = {path: path.stat().st_mtime_ns for path in [*root.glob("book/executed/*.ipynb"), *home.glob("runs/*/*")]}
    assert len(stamps) == 19 + 3 * 107
    done = kdx("book", "--profile", "smoke", "--root", root, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("unchanged") == 16  # pages, and the HTML
    written_anew = [path for path in stamps if path.stem.startswith(("petimages", "plantvillage"))]
    assert {path: path.stat().st_mtime_ns for path in stamps if path not in written_anew} == {
        path: stamp for path, stamp in stamps.items() if path not in written_anew
    }


@pytest.mark.book
def test_book_rebuild_restores_a_lost_picture(smoke_book):
    root, _ = smoke_book
    picture = root / "book" / "executed" / "01_gradcam_overview.png"
    content = picture.read_bytes()
    picture.unlink()
    assert {execute_page(page) for page in load_pages(root, "smoke")[:7]} == {"unchanged"}
    assert picture.read_bytes() == content


@pytest.mark.book
def test_a_book_page_on_a_cluster_is_the_one_made_here(smoke_book, tmp_path, monkeypatch):
    """With two workers that share no store with anyone: the same trainings, weights and numbers."""
    root, home = smoke_book
    monkeypatch.setenv("KDX_HOME", str(tmp_path / "home"))
    (page,) = (page for page in load_pages(copy_sources(tmp_path), "smoke") if page.name == "03_capacity_gap")
    with own_processes(), cluster(tmp_path / "cluster") as local:
        monkeypatch.setenv("KDX_CLUSTER", local.address)
        assert execute_page(page) == "executed"
    there, here = (read_glued(at) for at in (page.executed, root / "book/executed/03_capacity_gap.ipynb"))
    assert here
    assert all(there[key] == here[key] for key in here)
    weights = {path.parent.name: path.read_bytes() for path in (tmp_path / "home").glob("runs/*/*.safetensors")}
    assert len(weights) > 20
    assert all((home / f"runs/{key}/model.safetensors").read_bytes() == found for key, found in weights.items())
    assert all(find_run(key).history.empty for key in weights if not local.trained(key))  # those that are not trained


@pytest.mark.book
def test_book_notebooks_have_no_log_lines_or_progress_bars(smoke_book):
    for path in smoke_book[0].glob("book/executed/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "stream", f"{path.name}: {output.get('text', '')[:200]}"


@pytest.mark.book
def test_book_figures_say_what_they_show_and_are_in_the_index(smoke_book):
    book = smoke_book[0] / "book"
    index = (book / "_build" / "html" / "book" / "figures.html").read_text()
    links = dict(re.findall(r'href="(executed/[^"]*#figure-[^"]*)">([^<]*)<', index))
    texts = set()
    for path in sorted(book.glob("executed/*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
            if drawn and "remove-cell" not in cell.metadata.get("tags", []):
                text = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                assert len(text.split()) > 4, f"{path.name}, {cell.id}: expected alt text, got {text!r}"
                texts.add(text)
    assert {html.unescape(text) for text in links.values()} == texts
    for address in links:
        page, _, figure = address.partition("#")
        assert f'id="{figure}"' in (book / "_build" / "html" / "book" / page).read_text()


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *args):  # a browser that hangs up early is no failure
        pass


@pytest.fixture(scope="session")
def site(smoke_book):
    html = smoke_book[0] / "book" / "_build" / "html"

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = _Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = sorted(path.relative_to(html).as_posix() for path in html.rglob("*.html") if "_static" not in path.parts)
    yield f"http://127.0.0.1:{server.server_port}/", pages
    server.shutdown()


TABLES = """const found = [...document.querySelectorAll(".cell_output table")]
    .filter((table) => table.offsetWidth && !table.closest(".kdx-sortable, .kdx-explorer"));
const cut = found.filter((table) => {
    let box = table.parentElement;
    while (!box.matches("article") && box.scrollWidth <= box.clientWidth) box = box.parentElement;
    return !box.matches("article");
});
return [found.length, cut.map((table) => table.innerText.slice(0, 80))];"""

AXE = """const done = arguments[0], kinds = new Map();
for (const text of document.querySelectorAll("body *")) {  // contrast is checked thrice for each kind of text
    const own = [...text.childNodes].map((node) => (node.nodeType === Node.TEXT_NODE ? node.data : "")).join("");
    if (!/[\\p{L}\\p{N}].*[\\p{L}\\p{N}]/su.test(own)) continue;  // axe-core does not judge a single letter
    if (!text.checkVisibility({visibilityProperty: true}) || text.closest("mjx-container")) continue;
    const style = getComputedStyle(text), looks = [style.color, style.fontSize, style.fontWeight];
    for (let behind = text; behind; behind = behind.parentElement) {
        const {backgroundColor, backgroundImage, opacity} = getComputedStyle(behind);
        looks.push(backgroundColor, backgroundImage, opacity);
    }
    const kind = looks.join();
    kinds.set(kind, 1 + (kinds.get(kind) || 0));
    text.classList.toggle("kind", kinds.get(kind) <= 3);
}
const exclude = [["mjx-container"]], resultTypes = ["violations"];
const contrast = {runOnly: ["color-contrast"], resultTypes};
const others = {runOnly: ["wcag2a", "wcag2aa"], resultTypes, rules: {"color-contrast": {enabled: false}}};
axe.run({exclude}, others)
    .then(async (of) => [of, await axe.run({include: [[".kind"]], exclude}, contrast)])
    .then((both) => ({passes: both.flatMap((of) => of.passes), violations: both.flatMap((of) => of.violations)}))
    .then(done, (error) => done({passes: [], violations: [], error}));"""


@pytest.mark.book
@pytest.mark.browser
def test_book_pages_in_a_browser(site, browser):
    """Every page: no request to another host, every image loaded and described, no table that is cut off beside the one
    that can be sorted, no script error; every page of the book has no serious barrier by the rules of axe-core for
    WCAG 2, beside formulas, which take it minutes."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    axe = pytest.importorskip("axe_core_python")
    rules = (Path(axe.__file__).parent / "axe.min.js").read_text()
    address, pages = site
    assert len(pages) >= 8
    here = WebDriverWait(
        browser, 60, ignored_exceptions=[WebDriverException]
    )  # a redirection would end the next script
    seen, tables, barriers, cut = 0, 0, [], []
    for page in pages:
        browser.get(address + page)
        here.until(lambda b: b.execute_script("return !document.querySelector('meta[http-equiv=refresh i]')"))
        browser.execute_async_script(  # lazy images too; MathJax has run where there is math
            "const done = arguments[0]; document.querySelectorAll('img').forEach(i => i.loading = 'eager');"
            "const math = (window.MathJax && MathJax.startup) ? MathJax.startup.promise : Promise.resolve();"
            "math.then(() => setTimeout(done, 300));"
        )
        asked = [url for url in asked_for(browser) if not url.startswith(("data:", "blob:", "chrome"))]
        seen += len(asked)
        assert not [url for url in asked if urlparse(url).netloc != urlparse(address).netloc], page
        broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        assert browser.execute_script(broken) == [], page
        bare = "[...document.querySelectorAll('article img')].filter(i => !i.alt || i.alt.includes('/'))"
        assert browser.execute_script(f"return {bare}.map(i => i.src)") == [], page
        found, of_page = browser.execute_script(TABLES)
        tables += found
        cut += [(page, of) for of in of_page]
        severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        errors = [message for message in severe if "favicon" not in message]
        assert errors == [], page
        if not page.startswith("book/"):
            continue  # an index or a redirection, which the builder makes
        browser.execute_script(rules)
        judged = browser.execute_async_script(AXE)
        assert len(judged["passes"]) > 10, page
        assert "color-contrast" in {of["id"] for of in judged["passes"]}, page
        serious = [of for of in judged["violations"] if of["impact"] in ("serious", "critical")]
        barriers += [(page, of["id"], [node["html"][:200] for node in of["nodes"]]) for of in serious]
    assert barriers == []
    assert cut == []
    assert tables > 30
    assert seen > 50  # the log of requests does work


@pytest.mark.book
@pytest.mark.browser
def test_book_typesets_math_and_offers_the_notebook(site, browser):
    address, _ = site
    browser.get(address + "book/method.html")
    browser.execute_async_script("MathJax.startup.promise.then(arguments[0])")
    formulas = browser.execute_script("return [...document.querySelectorAll('mjx-container')].map(m => m.offsetWidth)")
    assert len(formulas) >= 10
    assert min(formulas) > 0
    browser.get(address + "book/executed/01_gradcam.html")
    link = browser.execute_script("return document.querySelector('a.btn-download-source-button').href")
    assert link.endswith("01_gradcam.ipynb")
    status = browser.execute_async_script("fetch(arguments[0]).then(r => arguments[1](r.status))", link)
    assert status == 200


# --- the explorer, in a browser --------------------------------------------------------------


@pytest.fixture(scope="session")
def explorer_app(smoke_book):
    """The address of the app that `make explore` starts, over the run store of the smoke book."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    recipe = (ROOT / "Makefile").read_text().partition("explore: install\n\t")[2].partition("\n")[0]
    command = recipe.replace("$(BIN)", str(Path(sys.executable).parent)) + f" --no-browser --port {port}"
    environment = os.environ | {"KDX_HOME": str(smoke_book[1]), "KDX_NETWORKS": str(smoke_book[1] / "networks")}
    log = smoke_book[1] / "voila.log"
    with log.open("w") as output:
        app = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"], env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        yield f"http://127.0.0.1:{port}/", log
        app.terminate()
        app.wait(30)


@pytest.mark.book
@pytest.mark.browser
def test_explorer_in_a_browser(explorer_app, smoke_book, browser):
    """Image, stage and technique change the picture; export writes it; nothing fails, no other host is asked."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    address, log = explorer_app
    wait = WebDriverWait(browser, 180, ignored_exceptions=[WebDriverException])
    browser.get_log("browser")
    asked_for(browser)
    wait.until(lambda driver: driver.get(address) or driver.find_elements(By.CSS_SELECTOR, "#rendered_cells"))
    find = lambda what: browser.find_elements(By.CSS_SELECTOR, what)  # noqa: E731
    wait.until(lambda _: find(".widget-html table"))  # the kernel has drawn, and has scored

    def picture():
        script = (
            "const [done, i] = [arguments[0], [...document.querySelectorAll('img.widget-image')].pop()];"
            "fetch(i.src).then(r => r.arrayBuffer()).then(b => crypto.subtle.digest('SHA-256', b))"
            ".then(d => done([...new Uint8Array(d)].join()))"
        )
        return browser.execute_async_script(script)

    seen = {picture()}

    def act(action):
        action()
        wait.until(lambda _: picture() not in seen)
        seen.add(picture())

    names = [button for button in find("button.jupyter-button") if button.text not in ("previous", "next", "export")]
    act(names[4].click)  # a thumbnail's
    act(lambda: find(".noUi-handle")[0].send_keys(Keys.ARROW_LEFT))  # the stage
    networks = Select(find("select")[1])  # one of which there are several techniques
    act(lambda: networks.select_by_visible_text("resnet10@0.125 from its base, 1 epochs"))
    technique = Select(find("select")[2])
    other = next(o.text for o in technique.options if o.text != technique.first_selected_option.text)
    act(lambda: technique.select_by_visible_text(other))
    assert len(seen) == 5
    wait.until(lambda _: find(".widget-html table"))
    exports = smoke_book[1] / "exports"
    next(button for button in find("button.jupyter-button") if button.text == "export").click()
    wait.until(lambda _: find("a[download$='.png']"))
    (facts,) = exports.glob("*.json")
    settings = json.loads(facts.read_text())
    assert (settings["technique"], settings["stage"], settings["dataset"]) == (other, "L2", "shapes")
    assert facts.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    asked = [url for url in asked_for(browser) if not url.startswith(("data:", "blob:", "chrome"))]
    assert not [url for url in asked if urlparse(url).netloc != urlparse(address).netloc]
    assert voila_errors(browser) == [], log.read_text()[-2000:]
