"""The book: pages.yml -> papermill -> book/executed -> jupyter-book -> HTML.

A page is executed again only if its notebook, its parameters, its data or the package changed. A page whose data are
not on this machine says how to get them.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import nbformat
import pandas as pd
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node

import kdx
from kdx.data import sst
from kdx.data.dataset import available
from kdx.data.detection import DETECTION_DATASETS, find_detection
from kdx.data.registry import DATASETS, Card, find_card
from kdx.data.sources import how_to_get
from kdx.distil.backends import watching
from kdx.pages import results
from kdx.paths import data_home, networks_home, places, sha256_of
from kdx.progress import TERMINAL, progress, terminal

GLUE_PREFIX = "application/papermill.record/"  # of quotes for other pages, in myst-nb's form
QUOTES = "quotes"  # stored table of what pages on photographs tell others
PROFILES = ("smoke", "shipped", "quick", "paper")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 120_000  # milliseconds of the page's own time for formulas and figures, before it is printed
PACKAGE = Path(kdx.__file__).parent


class BookError(RuntimeError):
    """A notebook failed, or the builder complained."""


@dataclass(frozen=True)
class Page:
    name: str
    notebook: Path
    parameters: dict[str, Any]
    executed: Path
    title: str = ""  # replaces the notebook's own
    waits: bool = False  # for all pages that do not, since it shows what they trained

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets that the page uses."""
        return [str(self.parameters.get("dataset", "")), *str(self.parameters.get("show", "")).split()]


def find_root(start: Path | None = None) -> Path:
    """The nearest folder, from ``start`` upwards, that holds ``book/pages.yml``."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "book" / "pages.yml").is_file():
            return folder
    raise BookError(f"no book/pages.yml in {start} or above; run this inside a checkout of kdx")


def load_pages(root: Path, profile: str) -> list[Page]:
    """The pages of ``book/pages.yml`` with their parameters for a profile."""
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose from: {', '.join(PROFILES)}")
    listed = yaml.safe_load((root / "book" / "pages.yml").read_text())
    return [
        Page(
            name,
            root / "notebooks" / entry["notebook"],
            (entry.get("parameters") or {}).get(profile) or {},
            root / "book" / "executed" / f"{name}.ipynb",
            entry.get("title", ""),
            entry.get("waits", False),
        )
        for name, entry in listed.items()
        if not name.startswith(".")
    ]


def parse_parameter(notebook: Path, item: str) -> tuple[str, Any]:
    """``name=value`` -> the name, and the value as the notebook's parameters cell declares it."""
    name, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"-p {item}: expected name=value")
    check_names(notebook, {name: value})
    kind = papermill.inspect_notebook(str(notebook))[name]["inferred_type_name"]
    try:
        found = {"str": str, "float": float}.get(kind, yaml.safe_load)(value)
        if kind in ("int", "bool", "list", "dict") and type(found).__name__ != kind:
            raise TypeError(found)
        return name, found
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"-p {item}: expected {kind}, got {value!r}") from error


def check_names(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Raise ValueError if a notebook's parameters cell does not declare all of ``parameters``."""
    known = papermill.inspect_notebook(str(notebook))
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"{notebook.name}: unknown parameters {', '.join(unknown)}; choose from: {', '.join(known)}")


def execute(notebook: Path, output: Path, parameters: Mapping[str, Any], folder: Path | None = None) -> None:
    """Execute a notebook in a fresh kernel; ``output`` appears only if every cell succeeded.

    A failed notebook is kept beside it as ``<name>.failed.ipynb``.

    Args:
        notebook: The notebook to execute, which stays as it is.
        output: Where the executed notebook goes.
        parameters: Values for its parameters cell.
        folder: Where the kernel runs; None takes the notebook's folder.

    Raises:
        BookError: A cell failed, or the kernel died.
    """
    check_names(notebook, parameters)
    if output.is_dir():
        raise ValueError(f"expected a file to write, got the folder {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_suffix(".failed.ipynb")
    passed_on = {  # the kernel has no terminal of its own
        "KDX_HOME": str(data_home()),
        "KDX_DATA": os.pathsep.join(map(str, places()[1:])),
        TERMINAL: terminal() or "",
    }
    before = {name: os.environ.get(name) for name in passed_on}
    os.environ.update(passed_on)
    try:
        papermill.execute_notebook(
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, scratch)),
            dict(parameters),
            kernel_name="python3",
            progress_bar=False,
            cwd=folder or notebook.parent,
            extra_arguments=["--log-level=50"],  # not that it is interrupted before it is shut down
        )
    except PapermillExecutionError as error:
        raise BookError(f"{notebook.name}: {error.ename}: {error.evalue}\n(the failed notebook: {scratch})") from error
    except DeadKernelError as error:
        raise BookError(f"{notebook.name}: its kernel died, perhaps for want of memory") from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    os.replace(scratch, output)


def page_key(page: Page) -> str:
    """Digest of everything that a page depends on: cells, parameters, data, the package and stored tables."""
    cells = [(c.cell_type, c.source, c.metadata) for c in load_notebook_node(str(page.notebook)).cells]
    code = _package_code(tuple((path, path.stat().st_mtime_ns) for path in sorted(PACKAGE.rglob("*.py"))))
    data = PACKAGE.parent / "data"
    stored = [*data.glob("results/*.csv"), *data.glob("paper/*.csv"), *data.glob("leaderboard/*.json")]
    stored += PACKAGE.rglob("*.mjs")
    tables = [path.read_text() for path in sorted([*stored, *networks_home().rglob("networks.csv")])]
    files = {name: available(name, page.parameters.get("size")) for name in page.datasets if name}
    files |= {name: str(find_detection(name)) for name in DETECTION_DATASETS} | {sst.NAME: str(sst.find_sst())}
    text = json.dumps([cells, page.title, page.parameters, files, code, tables], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def _package_code(files: tuple[tuple[Path, int], ...]) -> dict[str, str]:
    """File and what its code is without comments and layout, of files with the times of their last changes."""
    return {str(path.relative_to(PACKAGE)): ast.dump(ast.parse(path.read_text())) for path, _ in files}


def needs_kernel(page: Page) -> bool:
    """Whether a page is to be executed: its data are here, and it is not up to date."""
    dataset, stamp = page.parameters.get("dataset"), page.executed.with_suffix(".key")
    here = not dataset or available(dataset, page.parameters.get("size")) is not None
    return here and not (page.executed.is_file() and stamp.is_file() and stamp.read_text() == page_key(page))


def execute_page(page: Page) -> str:
    """Execute a page unless it is up to date; return what was done: executed, unchanged, or not built."""
    dataset, stamp = page.parameters.get("dataset"), page.executed.with_suffix(".key")
    if dataset and available(dataset, page.parameters.get("size")) is None:
        if stamp.is_file():
            stamp.unlink()
            os.replace(page.executed, page.executed.with_suffix(".last.ipynb"))  # it may have taken hours
        _write_placeholder(page, find_card(dataset))
        return f"not built, {dataset} is not here"
    if not needs_kernel(page):
        publish_pictures(page.executed)
        return "unchanged"
    key = page_key(page)
    stamp.unlink(missing_ok=True)
    execute(page.notebook, page.executed, page.parameters)
    if page.title:
        notebook = nbformat.read(page.executed, as_version=4)
        notebook.cells[0].source = re.sub(r"\A# .*", lambda _: f"# {page.title}", notebook.cells[0].source)
        nbformat.write(notebook, page.executed)
    publish_pictures(page.executed)
    stamp.write_text(key)
    return "executed"


def execute_pages(pages: Sequence[Page], workers: int = 1) -> Iterator[tuple[Page, str, float]]:
    """Execute the pages that are not up to date.

    Args:
        pages: The pages; those that wait come last.
        workers: Pages executed side by side, each in a process with its share of the cores.

    Yields:
        A page as soon as it is finished, what was done as :func:`execute_page` says it, and the seconds.

    Raises:
        BookError: A page failed; those beside it are stopped.
    """
    if workers < 1:
        raise ValueError(f"workers: expected 1 page at a time or more, got {workers}")
    pages = sorted(pages, key=lambda page: page.waits)
    alone = pages if workers == 1 else [page for page in pages if not needs_kernel(page)]
    for page in alone:
        yield page, *_timed(page)
    pool = joblib.Parallel(workers, backend="loky", return_as="generator_unordered", batch_size=1, pre_dispatch=workers)
    cores = max(1, joblib.cpu_count() // workers)
    for waits in (False, True):
        some = [page for page in pages if page.waits == waits and page not in alone]
        with progress(total=len(some), desc="pages", unit="page") as bar, watching(bar):
            for page, done, seconds in pool(joblib.delayed(_execute_elsewhere)(page, cores) for page in some):
                bar.update()
                yield page, done, seconds


def _timed(page: Page) -> tuple[str, float]:
    start = time.perf_counter()
    return execute_page(page), time.perf_counter() - start


def _execute_elsewhere(page: Page, cores: int) -> tuple[Page, str, float]:
    """In a process whose kernel takes so many cores, and shows no progress bars among those of other pages."""
    os.environ |= {"LOKY_MAX_CPU_COUNT": str(cores), TERMINAL: os.devnull}
    return page, *_timed(page)


def has_photographs(page: Page) -> bool:
    """Whether the page uses a dataset that does not come by itself."""
    return any(name in DATASETS and DATASETS[name].layout for name in page.datasets[:1])


def quotes(pages: Sequence[Page]) -> pd.DataFrame:
    """What executed pages store for other pages: page, name, html.

    Raises:
        ValueError: A page that was not built, or not executed.
    """
    rows = []
    for page in pages:
        if not page.executed.with_suffix(".key").is_file():
            raise ValueError(f"{page.name}: expected an executed page, got none; get its data and run `make book`")
        for cell in nbformat.read(page.executed, as_version=4).cells:
            for output in cell.get("outputs", []):
                if (name := output.get("metadata", {}).get("scrapbook", {}).get("name")) and (
                    html := output.data.get(f"{GLUE_PREFIX}text/html")
                ):
                    rows.append((page.name, name, html))
    return pd.DataFrame(rows, columns=["page", "name", "html"])


def _stored_quotes(page: str) -> dict[str, str]:
    """Name -> HTML of an earlier run of a page, with its date; empty where none is stored."""
    try:
        table, facts = results.load(QUOTES)
    except ValueError:
        return {}
    of = table[table["page"] == page]
    return {
        name: html if name.endswith("_verdict") else f"{html} (stored run of {facts['date']})"
        for name, html in zip(of["name"], of["html"], strict=True)
    }


def _write_placeholder(page: Page, card: Card) -> None:
    """Write a page that says why it is empty, also in every place where others quote its numbers."""
    text = (
        f"# {page.title or page.name}\n\nNot built here, because {card.title} is not on this machine: "
        f"{how_to_get(card)}; then run `make book` again."
    )
    root = page.executed.parents[2]
    quoted = {
        name
        for prose in (root / "book").glob("*.md")
        for name in re.findall(rf"{re.escape(page.executed.name)}::(\w+)", prose.read_text())
    }
    known = _stored_quotes(page.name)
    quotes = nbformat.v4.new_code_cell("# what other pages quote", id="quotes", metadata={"tags": ["remove-cell"]})
    quotes.outputs = [
        nbformat.v4.new_output(
            "display_data",
            {f"{GLUE_PREFIX}text/{kind}": known.get(name, "not built here") for kind in ("html", "plain")},
            metadata={"scrapbook": {"name": name, "mime_prefix": GLUE_PREFIX}},
        )
        for name in sorted(quoted)
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="why"), quotes])
    notebook.metadata = load_notebook_node(str(page.notebook)).metadata
    page.executed.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, page.executed)


def publish_pictures(executed: Path, optional: bool = False) -> None:
    """Save the PNG of each cell with metadata ``kdx: {publish: NAME}`` beside the notebook as ``<page>_NAME``, for use
    in other pages. Only where pictures are ``optional`` may a cell have none."""
    for cell in nbformat.read(executed, as_version=4).cells:
        if name := cell.metadata.get("kdx", {}).get("publish"):
            pictures = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
            if not pictures and optional:
                continue
            if len(pictures) != 1:
                raise BookError(f"{executed.name}: expected one picture to publish as {name}, got {len(pictures)}")
            (executed.parent / f"{executed.stem}_{name}").write_bytes(base64.b64decode(pictures[0]))


def html_key(root: Path, profile: str = "") -> str:
    """Digest of everything that the HTML is made of: prose, executed pages, settings, and the package's docstrings."""
    book = root / "book"
    sources = [path for path in book.rglob("*") if path.is_file() and "_build" not in path.relative_to(book).parts]
    sources += [root / "_config.yml", root / "_toc.yml", *PACKAGE.rglob("*.py*")]
    files = {str(path): sha256_of(path) for path in sorted(sources) if path.suffix != ".pyc"}
    return hashlib.sha256(json.dumps([files, profile, version("jupyter-book")]).encode()).hexdigest()


def build_html(root: Path, profile: str = "") -> tuple[Path, str]:
    """Build the HTML with warnings as errors, unless it is up to date. Its foot names the profile.

    Returns:
        Its first page, and what was done: built or unchanged.
    """
    index, stamp = root / "book" / "_build" / "html" / "index.html", root / "book" / "_build" / "html.key"
    key = html_key(root, profile)
    if index.is_file() and stamp.is_file() and stamp.read_text() == key:
        return index, "unchanged"
    stamp.unlink(missing_ok=True)
    _jupyter_book(root, "html", profile)
    stamp.write_text(key)
    return index, "built"


def build_pdf(root: Path, profile: str = "") -> Path:
    """The whole book as one PDF: all pages in one, printed by headless Chromium; return its path.

    Raises:
        BookError: There is no Chromium, or it wrote nothing.
    """
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        raise BookError(f"the PDF is printed by Chromium; none of {', '.join(CHROMIUM)} is installed")
    _jupyter_book(root, "singlehtml", profile)
    folder = root / "book" / "_build" / "singlehtml"
    page, pdf = folder / "print.html", root / "book" / "_build" / "book.pdf"
    shutil.copy(folder / "book" / "index.html", page)  # its addresses are relative to the folder above
    pdf.unlink(missing_ok=True)
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--virtual-time-budget={PATIENCE}", "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not pdf.is_file():
        raise BookError(f"{browser} printed nothing:\n{done.stdout[-1000:]}")
    return pdf


def _jupyter_book(root: Path, builder: str, profile: str) -> None:
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", "--path-output", "book"]
    command += ["--builder", builder, "-W", "-n", "--keep-going"]
    settled = os.environ | {
        "KDX_PROFILE": profile,  # for book/_ext/page_foot.py
        "PYTHONHASHSEED": "0",  # jupyter-book lists a set in its configuration: else all is read anew
    }
    done = subprocess.run(command, cwd=root, env=settled, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = root / "book" / "_build" / "build.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout)
    problems = [line for line in done.stdout.splitlines() if "WARNING" in line or "ERROR" in line]
    if done.returncode or problems:
        tail = problems or done.stdout.splitlines()[-15:]
        raise BookError("jupyter-book complained:\n  " + "\n  ".join(tail) + f"\n(the whole log: {log})")
