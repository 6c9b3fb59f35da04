"""The command line: ``kdx book``, ``kdx explain``, ...

Commands import what they need when they are called, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdx.cli_pages import Profile, run, sweep
from kdx.cli_stores import Cluster, data, errors, networks, seconds, use_cluster
from kdx.paths import check_new

LIMIT = 2000  # images of kdx explain

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(data, name="data")
app.add_typer(networks, name="networks")
app.command()(run)
app.command()(sweep)


@app.callback()
def _setup() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("kdx").setLevel(logging.INFO)


@app.command("book")
def build(
    profile: Profile = "shipped",
    root: Annotated[Path | None, typer.Option(help="the checkout; default: found from here")] = None,
    workers: Annotated[
        int, typer.Option(help="pages side by side; 0: one per core up to four, but one where a profile trains here")
    ] = 0,
    cluster: Cluster = "",
    pdf: Annotated[bool, typer.Option("--pdf", help="also print the whole book, with Chromium")] = False,
) -> None:
    """Execute the pages that changed and build the HTML; warnings are errors."""
    with errors():
        import joblib

        from kdx.data.registry import DATASETS
        from kdx.data.sources import fetch
        from kdx.pages import build as book

        if cluster := use_cluster(cluster):
            from kdx.distil.cluster import connect

            typer.echo(f"trainings go to {cluster}, watch them at {connect(cluster).client.dashboard_link}")
        root = book.find_root(root)
        pages = book.load_pages(root, profile)
        for name in dict.fromkeys(name for page in pages for name in page.datasets):
            if name in DATASETS and DATASETS[name].sources and not DATASETS[name].layout:  # photographs only if asked
                with seconds("data"):
                    fetch(name)
        workers = workers or (min(joblib.cpu_count(), 4) if cluster or profile in ("shipped", "smoke") else 1)
        for page, done, spent in book.execute_pages(pages, workers):
            typer.echo(f"page {page.name}: {done} {spent:.0f} s")
        with seconds("html") as note:
            index, done = book.build_html(root, profile)
            note.append(done)
        typer.echo(f"the book: {index}")
        if pdf:
            with seconds("pdf"):
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
    detection: Annotated[
        Path | None,
        typer.Option(
            help="instead: folder of images with boxes, as COCO or VOC; networks are detectors of torchvision"
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
    score: Annotated[
        float | None, typer.Option(help="with --detection: the least score of a detection that counts; default: 0.5")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="largest number of images, the same for each class")] = LIMIT,
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
    with errors(code=2, debug=debug), seconds("explain"):
        paths = {"student": student, "base": base, "base2": base2, "student2": student2, "teacher": teacher}
        paths |= {"labels": labels, "slices": slices, "data": data, "text": text, "detection": detection}
        for name, path in paths.items():
            if path and not path.exists():
                raise ValueError(f"{name}: no file or folder {path}")
        if [data, text, detection].count(None) != 2:
            raise ValueError("expected one of --data with images, --text with sentences, --detection with boxes")
        command = shlex.join(["kdx", *sys.argv[1:]])
        given: dict[str, Any] = {name: str(path) for name, path in paths.items() if path}
        given |= {"build": build, "build_base": build_base, "build_teacher": build_teacher, "size": size}
        others: dict[str, Any] = {
            "student2": student2,
            "slices": slices,
            "normalisation": normalisation,
            "probe": probe,
        }
        others |= {"thorough": thorough, "p": parameter}
        if text is not None:
            others |= {"labels": labels, "score": score, "fail-on": fail_on, "json-only": json_only, "size": size}
            others |= {"build": build or build_base or build_teacher, "limit": limit != LIMIT}
            _explain_text(given, text, out, command, others)
            return
        from kdx.pages.gates import OF_CLASSIFIERS, OF_DETECTORS, Gate

        metrics = OF_CLASSIFIERS if detection is None else OF_DETECTORS
        gates = [Gate.parse(text, metrics) for text in fail_on or []]
        given["limit"] = limit
        if detection is not None:
            given |= {} if score is None else {"score": score}
            failures = _explain_detection(given, detection, out, command, gates, json_only, others)
        else:
            _without({"score": score}, "--data: expected images without boxes")
            given |= {"normalisation": normalisation, "sample": limit if thorough else 0, "probe": probe}
            failures = _explain_images(given, parameter or [], out, command, gates, json_only)
        typer.echo(out / ("statement.json" if json_only else "report.html"))
    if failures:
        for failure in failures:
            typer.secho(f"failed: {failure}", fg="red", err=True)
        raise typer.Exit(3)


def _explain_text(given: dict[str, Any], text: Path, out: Path, command: str, others: dict[str, Any]) -> None:
    from kdx.pages.text_report import explain_text

    _without(others, "--text: expected student, base, base2 and teacher alone")
    named = {"student": "student", "base": "base", "second base": "base2", "teacher": "teacher"}
    typer.echo(explain_text({role: given[name] for role, name in named.items() if name in given}, text, out, command))


def _explain_detection(
    given: dict[str, Any], detection: Path, out: Path, command: str, gates: list[Any], json_only: bool,
    others: dict[str, Any],
) -> list[str]:  # fmt: skip
    from kdx.pages.detection_report import explain_detection

    _without(others, "--detection: expected student, base, base2, teacher, labels, size, limit and score")
    return explain_detection(given, detection, out, command, gates, json_only)


def _without(others: dict[str, Any], expected: str) -> None:
    """Refuse options that have no meaning here."""
    if unused := [name for name, value in others.items() if value]:
        raise ValueError(f"{expected}, got --{unused[0]}")


def _explain_images(
    given: dict[str, Any], parameters: list[str], out: Path, command: str, gates: list[Any], json_only: bool
) -> list[str]:
    check_new(out)
    from kdx.data.broden import GENERATED
    from kdx.pages import own_detectors, own_pair

    own_pair.check_given(given)
    from kdx.pages import build as book
    from kdx.pages import report

    given |= dict(book.parse_parameter(report.NOTEBOOK, item) for item in parameters)
    if taken := {"out", "command"} & set(given):
        raise ValueError(f"-p {taken.pop()}: cannot be given; the folder is given with --out")
    if given["probe"] not in ("", *GENERATED):
        own_detectors.read_probe(given["probe"], given.get("probed", own_detectors.FEWEST))
    return report.explain(given, out, command, gates, json_only)


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
    size: Annotated[
        int, typer.Option(min=0, help="pixels a side of the input; 0: that of each checkpoint, or 224")
    ] = 0,
    limit: Annotated[
        int, typer.Option(min=1, help="largest number of images; a p needs ten per answer of all networks")
    ] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    debug: Annotated[bool, typer.Option(help="show where an error came from")] = False,
) -> None:
    """Rank candidate teachers by what they explain of a student's answers beyond its base."""
    with errors(code=2, debug=debug):
        import json

        from kdx.measure import who_taught as module
        from kdx.networks.own_networks import check_headers, header_of

        pairs = [(c, "", "") if Path(c).is_file() else c.partition("=") for c in candidate]
        pairs = [(name, "=", path) if path else ("", "", name) for name, _, path in pairs]
        named = [(name or Path(path).stem, Path(path)) for name, _, path in pairs]
        if len(candidates := dict(named)) < len(named):
            raise ValueError("candidate: several have one name; give them as NAME=checkpoint")
        for paths in ([student, base, *(base2 or [])], candidates.values() if alike else []):
            check_headers({str(path): header_of(path) for path in paths}, ("classes", "architecture"))
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
    with errors(code=2, debug=debug):
        if out is not None:
            check_new(out)
            if case or tested != 100:
                raise ValueError(
                    "--out: expected a result over all cases and 100 images; leave out --case and --tested"
                )
            if not out.absolute().parent.is_dir():
                raise ValueError(f"--out: expected a file in a folder that exists, got {out}")
        from kdx.planted import benchmark as module
        from kdx.planted import entries, leaderboard, suite

        explain = entries.find(explainer)
        name = name or ("" if ":" in explainer else explainer)
        table = module.benchmark(explain, name, cases=case or tuple(suite.CASES), tested=tested)
        ends = {end: ["one seed" if v != v else f"{v:.3f}" for v in table[end]] for end in ("low", "high")}
        typer.echo(table.assign(**ends).to_string(index=False, float_format="{:.3f}".format))
        facts = table.attrs
        typer.echo(f"{facts['name']}: {facts['whole']} s, of them {facts['seconds']} s in the explainer")
        if out is not None:
            leaderboard.write(leaderboard.result(table, explainer), out)
            typer.echo(out)


if __name__ == "__main__":
    app()
