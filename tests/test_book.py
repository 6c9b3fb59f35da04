import base64
import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdx import book
from kdx.cli import app

ROOT = Path(__file__).parent.parent
SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks")


def copy_sources(folder):
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("executed", "_build"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def kdx(*arguments, home):
    command = [sys.executable, "-m", "kdx.cli", *map(str, arguments)]
    environment = os.environ | {"KDX_HOME": str(home), "KDX_DATA": ""}
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
        "executed/explorer",
        "own_models",
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
    assert "url=book/index.html" in (html / "index.html").read_text()  # the root leads to the landing page


@pytest.mark.book
def test_book_says_how_to_get_the_data_of_pages_that_are_not_built(smoke_book):
    html = smoke_book[0] / "book" / "_build" / "html" / "book"
    page = re.sub("<[^>]+>", "", (html / "executed" / "plantvillage_unicam.html").read_text())
    assert "Plant leaves: what only one of two networks holds" in page
    assert "Not built here, because PlantVillage is not on this machine" in page
    assert "kdx data get plantvillage" in page
    assert (html / "claims.html").read_text().count("not built here") == 2 + 2 * 6


@pytest.mark.book
def test_book_rebuild_trains_and_executes_nothing(smoke_book):
    root, home = smoke_book
    stamps = {path: path.stat().st_mtime_ns for path in [*root.glob("book/executed/*.ipynb"), *home.glob("runs/*/*")]}
    assert len(stamps) == 10 + 3 * 36
    done = kdx("book", "--profile", "smoke", "--root", root, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("unchanged") == 6
    written_anew = [path for path in stamps if path.stem.startswith(("petimages", "plantvillage"))]
    assert {path: path.stat().st_mtime_ns for path in stamps if path not in written_anew} == {
        path: stamp for path, stamp in stamps.items() if path not in written_anew
    }


def test_page_key_covers_cells_metadata_parameters_package_and_tables(tmp_path, monkeypatch):
    page = book.load_pages(ROOT, "smoke")[1]
    key = book.page_key(page)
    assert book.page_key(page) == key
    assert book.page_key(replace(page, parameters={**page.parameters, "seed": 1})) != key
    changed = nbformat.read(page.notebook, as_version=4)
    changed.cells[0].source += " More."
    nbformat.write(changed, tmp_path / "text.ipynb")
    assert book.page_key(replace(page, notebook=tmp_path / "text.ipynb")) != key
    changed = nbformat.read(page.notebook, as_version=4)
    changed.cells[-1].metadata["tags"] = []
    nbformat.write(changed, tmp_path / "tags.ipynb")
    assert book.page_key(replace(page, notebook=tmp_path / "tags.ipynb")) != key
    package = shutil.copytree(ROOT / "kdx", tmp_path / "kdx")
    tables = shutil.copytree(ROOT / "data" / "paper", tmp_path / "data" / "paper")
    monkeypatch.setattr(book, "__file__", str(package / "book.py"))
    assert book.page_key(page) == key
    table = (tables / "table1.csv").read_text()
    (tables / "table1.csv").write_text(table.replace("0.0794", "0.0795"))
    assert book.page_key(page) != key
    (tables / "table1.csv").write_text(table)
    (package / "scores.py").write_text((package / "scores.py").read_text() + "\nLEVEL = 0.9\n")
    assert book.page_key(page) != key


@pytest.mark.book
def test_book_rebuild_restores_a_lost_picture(smoke_book):
    root, _ = smoke_book
    picture = root / "book" / "executed" / "01_gradcam_overview.png"
    content = picture.read_bytes()
    picture.unlink()
    assert {book.execute_page(page) for page in book.load_pages(root, "smoke")[:6]} == {"unchanged"}
    assert picture.read_bytes() == content


@pytest.mark.book
def test_book_notebooks_have_no_log_lines_or_progress_bars(smoke_book):
    for path in smoke_book[0].glob("book/executed/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "stream", f"{path.name}: {output.get('text', '')[:200]}"


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


@pytest.fixture(scope="session")
def browser(chromedriver, tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1300,1600",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def requests(driver):
    """Addresses that the page has asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.book
@pytest.mark.browser
def test_book_pages_in_a_browser(site, browser):
    """Every page: no request to another host, every image loaded and described, no script error."""
    address, pages = site
    assert len(pages) >= 8
    seen = 0
    for page in pages:
        browser.get(address + page)
        browser.execute_async_script(  # lazy images too; MathJax has run where there is math
            "const done = arguments[0]; document.querySelectorAll('img').forEach(i => i.loading = 'eager');"
            "const math = (window.MathJax && MathJax.startup) ? MathJax.startup.promise : Promise.resolve();"
            "math.then(() => setTimeout(done, 300));"
        )
        asked = [url for url in requests(browser) if not url.startswith(("data:", "blob:", "chrome:"))]
        seen += len(asked)
        assert not [url for url in asked if urlparse(url).netloc != urlparse(address).netloc], page
        broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        assert browser.execute_script(broken) == [], page
        bare = "[...document.querySelectorAll('article img')].filter(i => !i.alt || i.alt.includes('/'))"
        assert browser.execute_script(f"return {bare}.map(i => i.src)") == [], page
        severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        errors = [message for message in severe if "favicon" not in message]
        assert errors == [], page
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
    environment = os.environ | {"KDX_HOME": str(smoke_book[1])}
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
    requests(browser)
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
    technique = Select(find("select")[2])
    other = next(o.text for o in technique.options if o.text != technique.first_selected_option.text)
    act(lambda: technique.select_by_visible_text(other))
    assert len(seen) == 4
    wait.until(lambda _: find(".widget-html table"))
    exports = smoke_book[1] / "exports"
    next(button for button in find("button.jupyter-button") if button.text == "export").click()
    wait.until(lambda _: find("a[download$='.png']"))
    (facts,) = exports.glob("*.json")
    settings = json.loads(facts.read_text())
    assert (settings["technique"], settings["stage"], settings["dataset"]) == (other, "L2", "shapes")
    assert facts.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    asked = [url for url in requests(browser) if not url.startswith(("data:", "blob:", "chrome:"))]
    assert not [url for url in asked if urlparse(url).netloc != urlparse(address).netloc]
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == [], log.read_text()[-2000:]


# --- one notebook, and the command line -------------------------------------------------------


def write_notebook(path, *cells):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook.cells[0].metadata = {"tags": ["parameters"]}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def test_execute_failed_notebook_is_not_taken_for_a_page(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "x: int = 1  # a number", "1 / (x - 1)")
    with pytest.raises(book.BookError, match=r"n.ipynb: ZeroDivisionError: division by zero"):
        book.execute(path, tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.ipynb").exists()
    assert (tmp_path / "out.failed.ipynb").exists()
    book.execute(path, tmp_path / "out.ipynb", {"x": 2})
    assert (tmp_path / "out.ipynb").exists()
    assert not (tmp_path / "out.failed.ipynb").exists()


def test_publish_saves_the_one_picture_of_a_cell(tmp_path):
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("figure", metadata={"kdx": {"publish": "figure.png"}})
    cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(b"picture").decode()})]
    notebook.cells = [cell]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    book.publish_pictures(tmp_path / "n.ipynb")
    assert (tmp_path / "n_figure.png").read_bytes() == b"picture"
    cell.outputs = []
    nbformat.write(notebook, tmp_path / "n.ipynb")
    with pytest.raises(book.BookError, match=r"expected one picture to publish as figure.png, got 0"):
        book.publish_pictures(tmp_path / "n.ipynb")


@pytest.mark.real_data
@pytest.mark.book
def test_appendix_page_on_real_leaves(photographs, tmp_path, monkeypatch):
    """The page of the same notebook, from real photographs with masks; it has a title of its own."""
    monkeypatch.setenv("KDX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDX_DATA", str(photographs["plantvillage"].parent))
    (tmp_path / "root").mkdir()
    root = copy_sources(tmp_path / "root")
    (page,) = [page for page in book.load_pages(root, "smoke") if page.name == "plantvillage_unicam"]
    assert book.execute_page(page) == "executed"
    cells = nbformat.read(page.executed, as_version=4).cells
    assert cells[0].source.startswith("# Plant leaves: what only one of two networks holds\n")
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    quotes = {o.metadata["scrapbook"]["name"]: o.data for o in outputs if "scrapbook" in o.metadata}
    assert "beyond its area" in quotes["claim_8_effects"]["application/papermill.record/text/html"]
    text = " ".join(o.data.get("text/markdown", "") + o.data.get("text/html", "") for o in outputs if "data" in o)
    assert "Share of the mass on the object" in text
    assert book.execute_page(page) == "unchanged"


def test_parse_parameter_follows_the_declared_type():
    path = ROOT / "notebooks" / "01_gradcam.ipynb"
    for item, value in {"lr=1e-3": 1e-3, "epochs=2": 2, "dataset=no": "no", "progressive=false": False}.items():
        assert book.parse_parameter(path, item) == (item.partition("=")[0], value)


def test_execute_passes_the_data_home_on(tmp_path, monkeypatch):
    path = write_notebook(tmp_path / "n" / "n.ipynb", "x: int = 1  # a number", "import os; os.environ['KDX_HOME']")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDX_HOME", "relative")
    book.execute(path, tmp_path / "out.ipynb", {})
    (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs
    assert output.data["text/plain"] == repr(str(tmp_path / "relative"))
    assert os.environ["KDX_HOME"] == "relative"
    assert "KDX_DATA" not in os.environ


def test_page_is_kept_aside_when_its_data_are_gone_and_made_anew_when_they_change(tmp_path, monkeypatch):
    (tmp_path / "root" / "book" / "executed").mkdir(parents=True)
    notebook = write_notebook(tmp_path / "n" / "n.ipynb", 'dataset: str = "petimages"  # a name', "1 + 1")
    executed = tmp_path / "root" / "book" / "executed" / "pets.ipynb"
    page = book.Page("pets", notebook, {"dataset": "petimages", "size": 32}, executed, "Pets")
    del page.parameters["size"]
    for kind in ("Cat", "Dog"):
        (tmp_path / "place" / "petimages" / "PetImages" / kind).mkdir(parents=True)
        (tmp_path / "place" / "petimages" / "PetImages" / kind / "1.jpg").write_bytes(b"x")
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "place"))
    assert book.execute_page(page) == "executed"
    assert book.execute_page(page) == "unchanged"
    (tmp_path / "place" / "petimages" / "PetImages" / "Cat" / "2.jpg").write_bytes(b"x")
    key = book.page_key(page)
    assert executed.with_suffix(".key").read_text() != key
    monkeypatch.delenv("KDX_DATA")
    assert book.execute_page(page) == "not built, petimages is not here"
    assert "Not built here" in executed.read_text()
    assert "Not built here" not in executed.with_suffix(".last.ipynb").read_text()


def test_plain_papermill_refuses_unknown_parameters(tmp_path):
    """Without kdx's own check in front: the notebook defends itself."""
    papermill = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / "01_gradcam.ipynb"),
        str(tmp_path / "o.ipynb"),
    ]
    for arguments, message in {
        ("-p", "epoch", "2"): "unknown parameters: epoch; choose from: dataset, classes",
        ("-p", "epochs", "two"): "parameter epochs: expected int, got 'two'",
    }.items():
        done = subprocess.run([*papermill, *arguments], capture_output=True, text=True)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.chdir(ROOT)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


def test_cli_helps_and_lists(cli):
    for arguments in (["--help"], ["data", "--help"], ["run", "--help"], ["book", "--help"]):
        result = cli(*arguments)
        assert result.exit_code == 0
        assert "Usage" in result.output
    assert "50,000 train + 10,000 test" in cli("data", "list").output
    assert cli("data", "get", "shapes").output == "shapes: generated when loaded\n"


def test_cli_prepares_a_folder_and_names_what_it_refuses(cli, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    for i in range(25):
        (tmp_path / "photos" / "one" / f"bad\n{i:02}.jpg").touch()
    output = cli("data", "prepare", str(tmp_path / "photos"), "--size", "16").output
    assert "16 good images of 2 classes (11 train, 5 test; test share 0.3, seed 0), 16 x 16 px" in output
    assert "refused: 25\n  one/bad\\n00.jpg: empty file\n" in output
    assert "and 5 more, all in" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "get", "mnist"], "unknown dataset 'mnist'; choose from: cifar10, shapes"),
        (["run", "99_nothing"], "choose from: 00_data, 01_gradcam"),
        (["data", "prepare", "shapes"], "shapes needs no preparation"),
        (["data", "prepare", "petimages"], "petimages is not on this machine at 96 px: get it with `kdx data get"),
        (["data", "prepare", "data/paper"], "expected images as <class>/<image>, found table1.csv, table2.csv in"),
        (["run", "01_gradcam", "-p", "epoch=2"], "unknown parameters epoch; choose from: dataset, classes"),
        (["run", "01_gradcam", "-p", "epochs"], "-p epochs: expected name=value"),
        (["run", "01_gradcam", "-p", "lr=fast"], "-p lr=fast: expected float, got 'fast'"),
        (["run", "01_gradcam", "-p", "epochs=[2"], "-p epochs=[2: expected int"),
        (["run", "01_gradcam", "-o", "tests"], "expected a file to write, got the folder tests"),
        (["run", "01_gradcam", "--profile", "fast"], "unknown profile 'fast'; choose from: smoke, quick, paper"),
        (["book", "--profile", "fast"], "unknown profile 'fast'; choose from: smoke, quick, paper"),
        (["book", "--root", "/"], "run this inside a checkout of kdx"),
    ],
)
def test_cli_errors_are_one_message_and_exit_code_1(cli, arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
