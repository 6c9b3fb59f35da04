"""The command line: ``kdx data``, ``kdx run``, ``kdx book``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kdx.data import DATASETS, data_home, fetch

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
data = typer.Typer(help="Datasets: list them, get them.", no_args_is_help=True)
app.add_typer(data, name="data")

Profile = Annotated[str, typer.Option(help="smoke (seconds), quick (a laptop) or paper (a GPU)")]


@app.callback()
def _setup() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("kdx").setLevel(logging.INFO)


@contextmanager
def _errors() -> Iterator[None]:
    """Expected errors end as one message and exit code 1, without a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        typer.secho(f"error: {error}; install the extra: pip install 'kdx[book]'", fg="red", err=True)
        raise typer.Exit(1) from error
    except (OSError, ValueError, RuntimeError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


@data.command("list")
def data_list() -> None:
    """Show the datasets of the registry."""
    for card in DATASETS.values():
        counts = " + ".join(f"{n:,} {split}" for split, n in card.counts.items())
        typer.echo(f"{card.name:10} {card.title}: {len(card.classes)} classes, {counts} images")


@data.command("get")
def data_get(name: Annotated[str, typer.Argument(help="a name from `kdx data list`")]) -> None:
    """Fetch a dataset into data/raw and verify it; at once if it is there already."""
    with _errors():
        folder = fetch(name)
        ready = "generated when loaded" if not DATASETS[name].sources else f"ready in {folder}"
        typer.echo(f"{name}: {ready}")


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="name of a notebook in notebooks/, or a path")],
    parameter: Annotated[list[str] | None, typer.Option("-p", help="name=value, may be repeated")] = None,
    profile: Profile = "quick",
    output: Annotated[Path | None, typer.Option("-o", help="where the executed notebook goes")] = None,
) -> None:
    """Execute a notebook with the parameters of a profile (if it is a page of the book) and your own on top."""
    with _errors():
        from kdx import book

        path, parameters = Path(notebook), {}
        if path.suffix != ".ipynb":
            root = book.find_root()
            path = root / "notebooks" / f"{notebook}.ipynb"
            pages = {page.notebook: page.parameters for page in book.load_pages(root, profile)}
            parameters = pages.get(path, {})
        if not path.is_file():
            found = ", ".join(sorted(p.stem for p in path.parent.glob("*.ipynb"))) or "none"
            raise ValueError(f"no notebook {path}; choose from: {found}")
        parameters = parameters | dict(book.parse_parameter(path, item) for item in parameter or [])
        output = output or data_home() / "notebooks" / path.name
        with _seconds(path.stem):
            book.execute(path, output, parameters)
        typer.echo(output)


@app.command("book")
def build(
    profile: Profile = "quick",
    root: Annotated[Path | None, typer.Option(help="the checkout; default: found from here")] = None,
) -> None:
    """Execute the pages that changed and build the HTML, warnings being errors."""
    with _errors():
        from kdx import book

        root = book.find_root(root)
        for page in book.load_pages(root, profile):
            with _seconds(f"page {page.name}") as note:
                note.append("executed" if book.execute_page(page) else "unchanged")
        with _seconds("html"):
            index = book.build_html(root)
        typer.echo(f"the book: {index}")


@contextmanager
def _seconds(what: str) -> Iterator[list[str]]:
    start = time.perf_counter()
    note: list[str] = []
    yield note
    typer.echo(f"{what}: {' '.join([*note, f'{time.perf_counter() - start:.0f} s'])}")


if __name__ == "__main__":
    app()
