"""The commands ``kdx run`` and ``kdx sweep``: a notebook with one set of parameters, or over a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdx.cli_stores import Cluster, errors, seconds, use_cluster
from kdx.paths import data_home

Profile = Annotated[
    str, typer.Option(help="shipped (the networks of the checkout), smoke (seconds), quick (a laptop) or paper (a GPU)")
]
Notebook = Annotated[str, typer.Argument(help="name of a page of the book or of a notebook, or a path")]


def run(
    notebook: Notebook,
    parameter: Annotated[list[str] | None, typer.Option("-p", help="name=value, may be repeated")] = None,
    profile: Profile = "shipped",
    output: Annotated[Path | None, typer.Option("-o", help="where the executed notebook goes")] = None,
    cluster: Cluster = "",
) -> None:
    """Execute a page of the book with the parameters of a profile, or any notebook; your own parameters come last."""
    with errors():
        from kdx.pages import build as book

        use_cluster(cluster)
        path, parameters = _find(notebook, profile)
        parameters |= dict(book.parse_parameter(path, item) for item in parameter or [])
        output = output or data_home() / "notebooks" / f"{Path(notebook).stem}.ipynb"
        with seconds(path.stem):
            book.execute(path, output, _resolved(parameters))
        typer.echo(output)


def sweep(
    notebook: Notebook,
    parameter: Annotated[list[str], typer.Option("-p", help="name=0:10 or name=one,two; may be repeated")],
    out: Annotated[Path, typer.Option(help="folder of the executed cells and of table.csv")],
    profile: Profile = "shipped",
    workers: Annotated[int, typer.Option(help="cells executed side by side")] = 1,
    cluster: Cluster = "",
) -> None:
    """Execute a notebook over a grid of parameters and gather its numbers; what is finished is not done again."""
    with errors():
        from kdx.pages import sweep as module

        use_cluster(cluster)
        path, parameters = _find(notebook, profile)
        grid = module.parse_grid(path, parameter)
        if "dataset" in grid:
            grid["dataset"] = [_resolved({"dataset": name})["dataset"] for name in grid["dataset"]]
        pages = module.plan_sweep(path, grid, out.absolute(), _resolved(parameters))
        missing = 0
        for i, (page, done) in enumerate(module.sweep(pages, list(grid), out.absolute(), workers), 1):
            missing += done.startswith("not built")
            typer.echo(f"{i} of {len(pages)}, {page.name}: {done}")
        typer.echo(out / "table.csv")
        if missing:
            raise ValueError(f"{missing} of {len(pages)} cells were not executed; get their data, see `kdx data list`")


def _find(notebook: str, profile: str) -> tuple[Path, dict[str, Any]]:
    """A notebook, and its parameters in a profile if it is a page."""
    from kdx.pages import build as book

    path, pages = Path(notebook), {}
    if path.suffix != ".ipynb":
        root = book.find_root()
        pages = {page.name: page for page in book.load_pages(root, profile)}
        path = pages[notebook].notebook if notebook in pages else root / "notebooks" / f"{notebook}.ipynb"
    if not path.is_file():
        found = sorted({p.stem for p in path.parent.glob("*.ipynb")} | set(pages))
        raise ValueError(f"no notebook {path}; choose from: {', '.join(found) or 'none'}")
    return path.absolute(), dict(pages[notebook].parameters) if notebook in pages else {}


def _resolved(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the whole path of a dataset that is a folder, since the notebook runs in another one."""
    from kdx.data.registry import DATASETS

    if (name := parameters.get("dataset")) and name not in DATASETS and Path(name).expanduser().is_dir():
        return parameters | {"dataset": str(Path(name).expanduser().resolve())}
    return parameters
