"""The command line: ``kdx data``, ``kdx run``, ``kdx book``, ``kdx explain``.

Commands import what they need when they are called, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kdx.paths import check_new, data_home

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
data = typer.Typer(help="Datasets: list them, get them, prepare them.", no_args_is_help=True)
app.add_typer(data, name="data")
networks = typer.Typer(help="Networks that come with the checkout: list, verify, train.", no_args_is_help=True)
app.add_typer(networks, name="networks")

LISTED = 20  # files named on the terminal
Profile = Annotated[
    str, typer.Option(help="shipped (the networks of the checkout), smoke (seconds), quick (a laptop) or paper (a GPU)")
]


@app.callback()
def _setup() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("kdx").setLevel(logging.INFO)


@contextmanager
def _errors(code: int = 1, debug: bool = False) -> Iterator[None]:
    """Turn expected errors into one message and an exit code, without a traceback unless ``debug``."""
    try:
        yield
    except (ModuleNotFoundError, OSError, ValueError, RuntimeError) as error:
        if debug:
            raise
        extra = "; install the extra: pip install 'kdx[book]'" if isinstance(error, ModuleNotFoundError) else ""
        typer.secho(f"error: {error}{extra}", fg="red", err=True)
        raise typer.Exit(code) from error
    except KeyboardInterrupt as error:
        typer.secho("stopped; nothing is left half-written", fg="red", err=True)
        raise typer.Exit(130) from error


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
    with _errors():
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
    with _errors():
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
    """Show the shipped networks: role, architecture, and test accuracy (of detectors AP50) of each fold."""
    from kdx.distil.run_store import shipped_table

    table = shipped_table()
    for (dataset, role, model), group in table.groupby(["dataset", "role", "model"], sort=False):
        accuracies = ", ".join(
            f"{accuracy:.2%} (fold {fold})" for fold, accuracy in zip(group["fold"], group["accuracy"], strict=True)
        )
        typer.echo(f"{dataset}: {role}, {model}: {accuracies}")
    typer.echo(f"{len(table)} networks")


@networks.command("verify")
def networks_verify() -> None:
    """Evaluate every shipped network on the test images and compare with the table."""
    with _errors(), _seconds("verify"):
        from kdx.distil import shipped, shipped_detectors
        from kdx.planted import suite

        rows = []
        for row in shipped.verify((*shipped.STUDIES, suite.Study(), shipped_detectors.DetectorStudy())):
            rows.append(row)
            typer.echo(f"{row['file']}: {row['problem'] or format(row['measured'], '.2%')}")
        if wrong := [row["file"] for row in rows if row["problem"]]:
            raise ValueError(f"{len(wrong)} of {len(rows)} networks are not as the table says: {', '.join(wrong)}")
        typer.echo(f"{len(rows)} networks are as the table says")


@networks.command("train")
def networks_train(
    missing: Annotated[bool, typer.Option("--missing", help="those without a file, which is also the default")] = True,
    dataset: Annotated[list[str] | None, typer.Option(help="such as cifar10, may be repeated")] = None,
    only: Annotated[list[str] | None, typer.Option(help="role, may be repeated")] = None,
    fold: Annotated[list[int] | None, typer.Option(help="from 1, may be repeated")] = None,
    workers: Annotated[int, typer.Option(help="trained in parallel; 0: one per core, or one on a GPU")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Train the shipped networks that are missing, at the lowest priority; may be stopped and started again."""
    with _errors(), _seconds("train"):
        from kdx.distil import shipped, shipped_detectors
        from kdx.planted import suite

        os.nice(19)
        studies = (*shipped.STUDIES, suite.Study(), shipped_detectors.DetectorStudy())
        shipped.train(studies, dataset or (), only or (), fold or (), workers, device)


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="name of a page of the book or of a notebook, or a path")],
    parameter: Annotated[list[str] | None, typer.Option("-p", help="name=value, may be repeated")] = None,
    profile: Profile = "shipped",
    output: Annotated[Path | None, typer.Option("-o", help="where the executed notebook goes")] = None,
) -> None:
    """Execute a page of the book with the parameters of a profile, or any notebook; your own parameters come last."""
    with _errors():
        from kdx.data.registry import DATASETS
        from kdx.pages import build as book

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
    profile: Profile = "shipped",
    root: Annotated[Path | None, typer.Option(help="the checkout; default: found from here")] = None,
    workers: Annotated[
        int, typer.Option(help="pages side by side; 0: one per core up to four, but one where a profile trains")
    ] = 0,
    pdf: Annotated[bool, typer.Option("--pdf", help="also print the whole book, with Chromium")] = False,
) -> None:
    """Execute the pages that changed and build the HTML; warnings are errors."""
    with _errors():
        import joblib

        from kdx.data.registry import DATASETS
        from kdx.data.sources import fetch
        from kdx.pages import build as book

        root = book.find_root(root)
        pages = book.load_pages(root, profile)
        for name in dict.fromkeys(name for page in pages for name in page.datasets):
            if name in DATASETS and DATASETS[name].sources and not DATASETS[name].layout:  # photographs only if asked
                with _seconds("data"):
                    fetch(name)
        workers = workers or (min(joblib.cpu_count(), 4) if profile in ("shipped", "smoke") else 1)
        for page, done, seconds in book.execute_pages(pages, workers):
            typer.echo(f"page {page.name}: {done} {seconds:.0f} s")
        with _seconds("html") as note:
            index, done = book.build_html(root, profile)
            note.append(done)
        typer.echo(f"the book: {index}")
        if pdf:
            with _seconds("pdf"):
                printed = book.build_pdf(root, profile)
            typer.echo(f"as a PDF: {printed}")


@app.command()
def explain(
    student: Annotated[Path, typer.Option(help="checkpoint: safetensors, or torch.save of a state dict")],
    base: Annotated[Path, typer.Option(help="checkpoint of the network that the student would replace")],
    data: Annotated[Path | None, typer.Option(help="folder of images, with a subfolder for each class or flat")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="instead of images: CSV file with columns text and label; checkpoints are text "
            "networks of kdx, or folders of sequence classifiers of transformers"
        ),
    ] = None,
    base2: Annotated[Path | None, typer.Option(help="a base from another seed, as the control")] = None,
    student2: Annotated[Path | None, typer.Option(help="a student from another seed")] = None,
    teacher: Annotated[Path | None, typer.Option(help="the student's teacher, of any family")] = None,
    build: Annotated[str, typer.Option(help="module:function that makes the network; not for checkpoints of kdx")] = "",
    build_base: Annotated[str, typer.Option(help="the same for the bases, if it differs")] = "",
    build_teacher: Annotated[str, typer.Option(help="the same for the teacher, if it differs")] = "",
    size: Annotated[
        int, typer.Option(help="pixels a side; 0: the checkpoint's, else the images' if they share one, else 224")
    ] = 0,
    normalisation: Annotated[
        str,
        typer.Option(help="imagenet (default), cifar10, half, none, or means/deviations: .5,.5,.5/.2,.2,.2"),
    ] = "",
    labels: Annotated[Path | None, typer.Option(help="text file: names of the outputs in order, one per line")] = None,
    slices: Annotated[Path | None, typer.Option(help="CSV file: file, and any columns that group the images")] = None,
    probe: Annotated[
        str, typer.Option(help="images with concept masks: planted, shapes, or a folder in Broden's layout")
    ] = "",
    limit: Annotated[int, typer.Option(help="largest number of images, the same for each class")] = 2000,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="corrupt and delete from all images, not from 256 (64 above 64 pixels)")
    ] = False,
    fail_on: Annotated[
        list[str] | None, typer.Option(help="such as 'negative_flips > 2%': exit code 3; may be repeated")
    ] = None,
    json_only: Annotated[bool, typer.Option("--json-only", help="write statement.json alone")] = False,
    parameter: Annotated[list[str] | None, typer.Option("-p", help="name=value of notebooks/04_own_models")] = None,
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("report"),
    debug: Annotated[bool, typer.Option(help="show where an error came from")] = False,
) -> None:
    """What a student gained and lost against its base: one folder with a self-contained report."""
    with _errors(code=2, debug=debug), _seconds("explain"):
        paths = {"student": student, "base": base, "base2": base2, "student2": student2, "teacher": teacher}
        paths |= {"labels": labels, "slices": slices, "data": data, "text": text}
        for name, path in paths.items():
            if path and not path.exists():
                raise ValueError(f"{name}: no file or folder {path}")
        if (data is None) == (text is None):
            raise ValueError("expected --data with images or --text with sentences, got both or neither")
        if text is not None:
            from kdx.pages.text_report import explain_text

            if unused := [name for name in ("student2", "labels", "slices") if paths[name]] + ["fail-on"] * bool(
                fail_on
            ):
                raise ValueError(f"--text: expected student, base, base2 and teacher alone, got --{unused[0]}")
            named = {"student": student, "base": base, "second base": base2, "teacher": teacher}
            command = shlex.join(["kdx", *sys.argv[1:]])
            typer.echo(explain_text({role: path for role, path in named.items() if path}, text, out, command))
            return
        from kdx.pages.gates import Gate

        gates = [Gate.parse(text) for text in fail_on or []]
        check_new(out)
        from kdx.data.broden import GENERATED
        from kdx.pages import own_detectors, own_pair

        given: dict[str, Any] = {name: str(path) for name, path in paths.items() if path}
        given |= {"build": build, "build_base": build_base, "build_teacher": build_teacher, "size": size}
        given |= {"normalisation": normalisation, "limit": limit, "sample": limit if thorough else 0, "probe": probe}
        own_pair.check_given(given)
        from kdx.pages import build as book
        from kdx.pages import report

        given |= dict(book.parse_parameter(report.NOTEBOOK, item) for item in parameter or [])
        if taken := {"out", "command"} & set(given):
            raise ValueError(f"-p {taken.pop()}: cannot be given; the folder is given with --out")
        if given["probe"] not in ("", *GENERATED):
            own_detectors.read_probe(given["probe"], given.get("probed", own_detectors.FEWEST))
        failures = report.explain(given, out, shlex.join(["kdx", *sys.argv[1:]]), gates, json_only)
        typer.echo(out / ("statement.json" if json_only else "report.html"))
    if failures:
        for failure in failures:
            typer.secho(f"failed: {failure}", fg="red", err=True)
        raise typer.Exit(3)


@app.command("who-taught")
def who_taught(
    student: Annotated[Path, typer.Option(help="checkpoint: safetensors, or torch.save of a state dict")],
    base: Annotated[Path, typer.Option(help="its architecture, trained without a teacher")],
    candidate: Annotated[list[str], typer.Option(help="checkpoint, or NAME=checkpoint; may be repeated")],
    data: Annotated[Path, typer.Option(help="folder of images, with a subfolder for each class or flat")],
    base2: Annotated[list[Path] | None, typer.Option(help="a base from another seed, may be repeated")] = None,
    build: Annotated[str, typer.Option(help="module:function that makes the networks; not for those of kdx")] = "",
    build_candidate: Annotated[str, typer.Option(help="the same for the candidates, if it differs")] = "",
    alike: Annotated[bool, typer.Option("--alike", help="the candidates are of one kind, so a p can be given")] = False,
    size: Annotated[int, typer.Option(help="pixels a side of the input; 0: that of each checkpoint, or 224")] = 0,
    limit: Annotated[
        int, typer.Option(help="largest number of images; a p needs ten per answer of all networks")
    ] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    debug: Annotated[bool, typer.Option(help="show where an error came from")] = False,
) -> None:
    """Rank candidate teachers by what they explain of a student's answers beyond its base."""
    with _errors(code=2, debug=debug):
        import json

        from kdx.measure import who_taught as module

        pairs = [(c, "", "") if Path(c).is_file() else c.partition("=") for c in candidate]
        pairs = [(name, "=", path) if path else ("", "", name) for name, _, path in pairs]
        named = [(name or Path(path).stem, Path(path)) for name, _, path in pairs]
        if len(candidates := dict(named)) < len(named):
            raise ValueError("candidate: several have one name; give them as NAME=checkpoint")
        of_student, of_base, *more = (
            module.read_answers(path, build, data, size, limit) for path in (student, base, *(base2 or []))
        )
        others = {
            name: module.read_answers(path, build_candidate or build, data, size, limit)
            for name, path in candidates.items()
        }
        table = module.who_taught(of_student, of_base, others, bases=more, alike=list(others) if alike else None)
        if as_json:
            rows = [{k: None if v != v else v for k, v in row.items()} for row in table.to_dict("records")]
            facts = {"images": len(of_student), "candidates": rows, "verdict": module.verdict(table)}
            typer.echo(json.dumps(facts, indent=2))
        else:
            typer.echo(table.to_string(index=False, float_format="{:.3f}".format))
            typer.echo(module.verdict(table))


@app.command()
def benchmark(
    explainer: Annotated[str, typer.Argument(help="module:function, or the name of an explainer on the leaderboard")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write, such as data/leaderboard/mine.json")] = None,
    name: Annotated[str, typer.Option(help="on the leaderboard; default: the function's name")] = "",
    case: Annotated[list[str] | None, typer.Option(help="kind of images, may be repeated; default: all")] = None,
    tested: Annotated[int, typer.Option(help="images that are explained, for each planting")] = 100,
    debug: Annotated[bool, typer.Option(help="show where an error came from")] = False,
) -> None:
    """Score an explainer of distillation on the shipped planted networks, where the truth is known."""
    with _errors(code=2, debug=debug):
        if out is not None:
            check_new(out)
        from kdx.planted import benchmark as module
        from kdx.planted import entries, leaderboard, suite

        explain = entries.find(explainer)
        name = name or ("" if ":" in explainer else explainer)
        table = module.benchmark(explain, name, cases=case or tuple(suite.CASES), tested=tested)
        typer.echo(table.to_string(index=False, float_format="{:.3f}".format))
        facts = table.attrs
        typer.echo(f"{facts['name']}: {facts['whole']} s, of them {facts['seconds']} s in the explainer")
        if out is not None:
            leaderboard.write(leaderboard.result(table, explainer), out)
            typer.echo(out)


@contextmanager
def _seconds(what: str) -> Iterator[list[str]]:
    start = time.perf_counter()
    note: list[str] = []
    yield note
    typer.echo(f"{what}: {' '.join([*note, f'{time.perf_counter() - start:.0f} s'])}")


if __name__ == "__main__":
    app()
