"""The command ``kdx sweep``: one notebook over a grid of parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kdx.cli_stores import errors

Cluster = Annotated[
    str, typer.Option(help="trainings go to this Dask scheduler: its address, or its file; default: $KDX_CLUSTER")
]


def use_cluster(cluster: str) -> None:
    """All trainings of this process and of its kernels go to a cluster; empty leaves things as they are."""
    if cluster:
        from kdx.distil.backends import CLUSTER, check_cluster

        os.environ[CLUSTER] = check_cluster(cluster)


def sweep(
    notebook: Annotated[str, typer.Argument(help="name of a page of the book or of a notebook, or a path")],
    parameter: Annotated[list[str], typer.Option("-p", help="name=0:10, or name=one,two; may be repeated")],
    out: Annotated[Path, typer.Option(help="folder of the executed cells and of table.csv")],
    profile: Annotated[str, typer.Option(help="parameters that stay the same: shipped, smoke, quick or paper")] = "shipped",
    workers: Annotated[int, typer.Option(help="cells executed side by side")] = 1,
    cluster: Cluster = "",
) -> None:
    """Execute a notebook over a grid; what is done is kept, and its numbers become one tidy table."""
    with errors():
        from kdx.pages import sweep as module
        from kdx.pages.build import find_notebook

        use_cluster(cluster)
        path, common = find_notebook(notebook, profile)
        grid = module.parse_grid(path, parameter)
        out = out.absolute()
        pages = module.plan_sweep(path, grid, out, common)
        for i, (page, done) in enumerate(module.sweep(pages, grid, out, workers), 1):
            typer.echo(f"cell {i} of {len(pages)}, {page.name}: {done}")
        typer.echo(out / "table.csv")
