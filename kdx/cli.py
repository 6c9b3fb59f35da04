"""The command line: ``kdx data``, ``kdx run``, ``kdx book``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kdx.cards import DATASETS, find_card
from kdx.data import prepare
from kdx.home import data_home
from kdx.sources import adopt, fetch, find_source

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
data = typer.Typer(help="Datasets: list them, get them, prepare them.", no_args_is_help=True)
app.add_typer(data, name="data")

LISTED = 20  # files named on the terminal
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
        here = f"in {find_source(card)}" if find_source(card) else "not on this machine"
        images = f"{counts} images" if card.counts else f"images in folders, {here}"
        typer.echo(f"{card.name:12} {card.title}: {len(card.classes)} classes, {images}")


@data.command("get")
def data_get(name: Annotated[str, typer.Argument(help="a name from `kdx data list`")]) -> None:
    """Download a dataset into data/raw and verify it; at once if it is there already."""
    with _errors():
        if find_card(name).source:
            raise ValueError(f"{name} is a folder of your own; `kdx data prepare {name}` checks and decodes it")
        folder = fetch(name)
        ready = "generated when loaded" if not find_card(name).sources else f"ready in {folder}"
        typer.echo(f"{name}: {ready}")


@data.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="petimages, plantvillage, or a folder with a subfolder for each class")],
    origin: Annotated[Path | None, typer.Option("--from", help="a folder or an archive that you have")] = None,
    size: Annotated[int | None, typer.Option(help="pixels a side; default: the card's")] = None,
) -> None:
    """Decode the images of a dataset into a compact cache; list the files that cannot be used."""
    with _errors():
        if origin is not None:
            adopt(name, origin)
        prepared = prepare(name, size)
        card, files = prepared.card, prepared.files
        counts = ", ".join(f"{n:,} {split}" for split, n in card["counts"].items())
        typer.echo(
            f"{name}: {sum(card['counts'].values()):,} good images of {len(card['classes'])} classes ({counts}; "
            f"{card['split']}), {card['size']} x {card['size']} px, in {prepared.folder}"
        )
        for title, rows in (
            ("refused", files[files["split"] == ""]),
            ("noted", files[(files["split"] != "") & (files["note"] != "")]),
        ):
            if len(rows):
                typer.echo(f"{title}: {len(rows):,}")
            for file, note in rows[["file", "note"]].head(LISTED).itertuples(index=False):
                typer.echo(f"  {file}: {note}")
            if len(rows) > LISTED:
                typer.echo(f"  and {len(rows) - LISTED:,} more, all in {prepared.folder / 'files.csv'}")


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="name of a page of the book or of a notebook, or a path")],
    parameter: Annotated[list[str] | None, typer.Option("-p", help="name=value, may be repeated")] = None,
    profile: Profile = "quick",
    output: Annotated[Path | None, typer.Option("-o", help="where the executed notebook goes")] = None,
) -> None:
    """Execute a page of the book with the parameters of a profile, or any notebook, and your own on top."""
    with _errors():
        from kdx import book

        path, pages = Path(notebook), {}
        if path.suffix != ".ipynb":
            root = book.find_root()
            pages = {page.name: page for page in book.load_pages(root, profile)}
            path = pages[notebook].notebook if notebook in pages else root / "notebooks" / f"{notebook}.ipynb"
        if not path.is_file():
            found = sorted({p.stem for p in path.parent.glob("*.ipynb")} | set(pages))
            raise ValueError(f"no notebook {path}; choose from: {', '.join(found) or 'none'}")
        parameters = dict(pages[notebook].parameters) if notebook in pages else {}
        parameters |= dict(book.parse_parameter(path, item) for item in parameter or [])
        if (name := parameters.get("dataset")) and name not in DATASETS and Path(name).expanduser().is_dir():
            parameters["dataset"] = str(Path(name).expanduser().resolve())  # the notebook runs in another folder
        output = output or data_home() / "notebooks" / f"{Path(notebook).stem}.ipynb"
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
                note.append(book.execute_page(page))
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
