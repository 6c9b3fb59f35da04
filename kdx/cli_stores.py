"""The commands ``kdx data`` and ``kdx networks``, and what commands share: errors in one line, seconds, the cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kdx.distil.studies import Study

data = typer.Typer(help="Datasets: list them, get them, prepare them.", no_args_is_help=True)
networks = typer.Typer(help="Networks that come with the checkout: list, verify, train.", no_args_is_help=True)
LISTED = 20  # files named on the terminal
Cluster = Annotated[
    str, typer.Option(help="train on this Dask cluster: address or file of its scheduler; default: $KDX_CLUSTER")
]


def use_cluster(cluster: str) -> str:
    """Send all trainings of this process and of its kernels to a cluster; return it. Empty leaves ``KDX_CLUSTER``."""
    from kdx.distil.backends import CLUSTER, check_cluster

    if cluster := check_cluster(cluster or os.environ.get(CLUSTER, "")):
        os.environ[CLUSTER] = cluster
    return cluster


@contextmanager
def errors(code: int = 1, debug: bool = False) -> Iterator[None]:
    """Turn expected errors into one message and an exit code, without a traceback unless ``debug``."""
    try:
        yield
    except (ModuleNotFoundError, OSError, ValueError, RuntimeError, FloatingPointError) as error:
        if debug:
            raise
        bare = isinstance(error, ModuleNotFoundError) and "pip install" not in str(error)
        extra = "; install the extra: pip install 'kdx[book]'" if bare else ""
        typer.secho(f"error: {error}{extra}", fg="red", err=True)
        raise typer.Exit(code) from error
    except KeyboardInterrupt as error:
        typer.secho("stopped; nothing is left half-written", fg="red", err=True)
        raise typer.Exit(130) from error


@contextmanager
def seconds(what: str) -> Iterator[list[str]]:
    start = time.perf_counter()
    note: list[str] = []
    yield note
    typer.echo(f"{what}: {' '.join([*note, f'{time.perf_counter() - start:.0f} s'])}")


@data.command("list")
def data_list() -> None:
    """Show the datasets of the registry, those with boxes, sentences, and the probe set Broden."""
    from kdx.data import sst
    from kdx.data.broden_copy import BRODEN, find_broden
    from kdx.data.detection import DETECTION_DATASETS, find_detection
    from kdx.data.registry import DATASETS
    from kdx.data.sources import find_source

    for card in DATASETS.values():
        counts = " + ".join(f"{n:,} {split}" for split, n in card.counts.items())
        here = f"in {find_source(card)}" if find_source(card) else "not on this machine"
        images = f"{counts} images" if card.counts else f"images in folders, {here}"
        typer.echo(f"{card.name:12} {card.title}: {len(card.classes)} classes, {images}")
    for boxed in DETECTION_DATASETS.values():
        here = f"in {find_detection(boxed.name)}" if find_detection(boxed.name) else "not on this machine"
        typer.echo(f"{boxed.name:12} {boxed.title}: boxes of {len(boxed.classes)} classes, {here}; {boxed.licence}")
    here = f"in {find_broden()}" if find_broden() else "not on this machine"
    typer.echo(f"{BRODEN.name:12} {BRODEN.title}: a probe, images with concept masks, {here}; {BRODEN.licence}")
    here = f"in {sst.find_sst()}" if sst.find_sst() else "not on this machine"
    typer.echo(f"{sst.NAME:12} {sst.TITLE}: sentences of {len(sst.CLASSES)} classes, {here}; licence: {sst.LICENCE}")


@data.command("get")
def data_get(name: Annotated[str, typer.Argument(help="name from `kdx data list`")]) -> None:
    """Download a dataset into data/raw and verify it; a verified one is not downloaded again."""
    with errors():
        from kdx.data import sst
        from kdx.data.broden_copy import BRODEN
        from kdx.data.detection import DETECTION_DATASETS, fetch_detection
        from kdx.data.registry import find_card
        from kdx.data.sources import fetch

        if name in DETECTION_DATASETS:
            typer.echo(f"{name}: ready in {fetch_detection(name)}")
            return
        if name == sst.NAME:
            typer.echo(f"{name}: ready in {sst.fetch_sst()}")
            return
        if name == BRODEN.name:
            raise ValueError(f"{name} is not downloaded, since no checksum of it is published: {BRODEN.how_to_get}")
        if find_card(name).source:
            raise ValueError(f"{name} is a folder of your own; `kdx data prepare {name}` checks and decodes it")
        folder = fetch(name)
        ready = "generated when loaded" if not find_card(name).sources else f"ready in {folder}"
        typer.echo(f"{name}: {ready}")


@data.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="petimages, plantvillage, broden, sst, or a folder of class folders")],
    origin: Annotated[Path | None, typer.Option("--from", help="a folder or an archive that you have")] = None,
    size: Annotated[int | None, typer.Option(help="pixels a side; default: the card's")] = None,
) -> None:
    """Decode the images of a dataset into a compact cache; list the files that cannot be used."""
    with errors():
        from kdx.data import broden_copy, detection, sst
        from kdx.data.dataset import prepare
        from kdx.data.sources import adopt

        if name == sst.NAME:
            typer.echo(f"{name}: ready in {sst.fetch_sst() if origin is None else sst.adopt_sst(origin)}")
            return
        if name == broden_copy.BRODEN.name:
            if size is not None:
                raise ValueError("--size: expected none for broden, whose images stay as they are")
            typer.echo(broden_copy.prepare_broden(origin))
            return
        if name in detection.DETECTION_DATASETS:
            if size is not None:
                raise ValueError(f"--size: expected none for {name}, whose images are scaled when they are loaded")
            for line in detection.prepare_detection(name, origin):
                typer.echo(line)
            return
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


@networks.command("list")
def networks_list() -> None:
    """Show the shipped networks: role, architecture, and test accuracy (of detectors AP50) of each fold, of text
    networks of each seed."""
    from kdx.distil import shipped_texts
    from kdx.distil.run_store import shipped_table

    table = shipped_table()
    for (dataset, role, model), group in table.groupby(["dataset", "role", "model"], sort=False):
        accuracies = ", ".join(
            f"{accuracy:.2%} (fold {fold})" for fold, accuracy in zip(group["fold"], group["accuracy"], strict=True)
        )
        typer.echo(f"{dataset}: {role}, {model}: {accuracies}")
    texts = shipped_texts.table()
    for (role, layers), group in texts.groupby(["role", "layers"], sort=False):
        accuracies = ", ".join(f"{of.accuracy:.2%} (seed {of.seed})" for of in group.itertuples())
        typer.echo(f"text: {role}, {layers} blocks: {accuracies}")
    typer.echo(f"{len(table)} networks of images, {len(texts)} of sentences")


def all_studies() -> tuple[Study, ...]:
    """All studies of images, classified or with boxes, whose networks come with the checkout."""
    from kdx.distil.shipped_detectors import DetectorStudy
    from kdx.distil.studies import STUDIES
    from kdx.planted import suite

    return (*STUDIES, suite.Study(), DetectorStudy())


@networks.command("verify")
def networks_verify() -> None:
    """Evaluate every shipped network on the test images or sentences and compare with the tables."""
    with errors(), seconds("verify"):
        from kdx.data import sst
        from kdx.distil import shipped, shipped_texts
        from kdx.distil.fit_text import evaluate_text

        test = sst.load_sentences() if sst.find_sst() else None
        accuracy = None if test is None else lambda network: evaluate_text(network, test).accuracy
        rows = []
        for row in chain(shipped.verify(all_studies()), shipped_texts.verify(accuracy)):
            rows.append(row)
            skipped = row["skipped"] and f"not measured, {row['skipped']}"
            typer.echo(f"{row['file']}: {row['problem'] or skipped or format(row['measured'], '.2%')}")
        if wrong := [row["file"] for row in rows if row["problem"]]:
            raise ValueError(
                f"{len(wrong)} of {len(rows)} networks are not as the tables say: {', '.join(wrong)}; "
                "take them from the repository again, or delete them and run `kdx networks train`"
            )
        measured = sum(not row["skipped"] for row in rows)
        rest = f"; {len(rows) - measured} were not measured" if measured < len(rows) else ""
        typer.echo(f"{measured} networks are as the tables say{rest}")


@networks.command("train")
def networks_train(
    missing: Annotated[bool, typer.Option("--missing", help="those without a file, which is also the default")] = True,
    dataset: Annotated[list[str] | None, typer.Option(help="such as cifar10, may be repeated")] = None,
    only: Annotated[list[str] | None, typer.Option(help="role, may be repeated")] = None,
    fold: Annotated[list[int] | None, typer.Option(help="from 1, may be repeated")] = None,
    workers: Annotated[int, typer.Option(help="trained in parallel; 0: one per core, or one on a GPU")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    cluster: Cluster = "",
) -> None:
    """Train the shipped networks that are missing, at the lowest priority; may be stopped and started again."""
    with errors(), seconds("train"):
        from kdx.distil import shipped
        from kdx.networks.devices import reuse_memory

        use_cluster(cluster)
        os.nice(19)
        reuse_memory()
        shipped.train(all_studies(), dataset or (), only or (), fold or (), workers, device)
