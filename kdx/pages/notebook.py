"""Functions that the notebooks share: parameters, data, the environment, cells of tables."""

from __future__ import annotations

import contextlib
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML
from pandas.io.formats.style import Styler

from kdx.data.dataset import Dataset, load_dataset
from kdx.distil.run_store import versions
from kdx.intervals import mean_interval, share_interval
from kdx.networks.devices import autocast_dtype, device_name, pick_device, reuse_memory
from kdx.pages.claims import Verdict, badge
from kdx.paths import CHECKOUT
from kdx.progress import terminal

LITERALS = (bool, int, float, str, list, tuple, dict, type(None))
IPYTHON = {"In", "Out"}
reuse_memory()  # the process is a notebook's kernel


def check_parameters(namespace: Mapping[str, Any], **least: float) -> dict[str, Any]:
    """Check the parameters of a notebook right after its parameters cell.

    The annotated literals of that cell declare names and types.

    Args:
        namespace: ``globals()`` of the notebook.
        **least: Smallest value of a parameter.

    Returns:
        Name -> value.

    Raises:
        ValueError: A name that the cell does not declare, a value of another type, or one that is too small.
    """
    declared = namespace.get("__annotations__", {})
    given: dict[str, Any] = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in IPYTHON and isinstance(value, LITERALS)
    }
    if unknown := sorted(set(given) - set(declared)):
        raise ValueError(f"unknown parameters: {', '.join(unknown)}; choose from: {', '.join(declared)}")
    for name, kind in declared.items():
        value = given[name]
        accepted = int | float if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            expected = getattr(kind, "__name__", str(kind))
            raise ValueError(f"parameter {name}: expected {expected}, got {value!r}")
    for name, smallest in least.items():
        if (value := given[name]) < smallest:
            raise ValueError(f"parameter {name}: expected at least {smallest}, got {value}")
    return given


def load_data(
    dataset: str,
    classes: Sequence[str] = (),
    size: int = 0,
    normalisation: Sequence[Sequence[float]] = (),
    limit: int = 0,
    test_limit: int = 0,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Training and test images of a page.

    Args:
        dataset: Name or path, as for :func:`kdx.load_dataset`.
        classes: Names of the classes to keep; empty keeps all.
        size: Pixels per side; 0 takes the dataset's own.
        normalisation: Means and standard deviations; empty takes the dataset's own.
        limit: Training images to keep at most, with the class proportions of the whole; 0 keeps all.
        test_limit: Test images to keep, likewise.
        seed: Of subsets and generated images.

    Returns:
        Training and test images.
    """
    parts = []
    for split, most in (("train", limit), ("test", test_limit)):
        data = load_dataset(dataset, split, seed=seed, size=size or None, normalisation=normalisation or None)
        data = data.only(classes) if classes else data
        parts.append(data.limit(min(most or len(data), len(data)), seed))
    return parts[0], parts[1]


def environment(parameters: Mapping[str, Any], device: str, **datasets: Dataset) -> Styler:
    """A table of parameters, versions, device and fingerprints of the data."""
    chosen = pick_device(device)
    rows = {("parameter", name): repr(value) for name, value in parameters.items()}
    rows |= {("version", name): version for name, version in versions().items()}
    rows["device", "name"] = device_name(chosen)
    rows["device", "precision"] = str(autocast_dtype(chosen)).removeprefix("torch.")
    rows |= {("data (SHA-256)", f"{k}, {len(d):,} images"): d.fingerprint[:16] for k, d in datasets.items()}
    table = pd.Series(rows, name="value").to_frame()
    return table.style.format(escape="html").set_table_styles([{"selector": "td", "props": "text-align: left"}])


def gather_warnings() -> list[str]:
    """A list to which the package's warnings go from now on instead of into the page, once each, whatever their
    numbers."""
    found: list[str] = []
    known: set[str] = set()
    show = warnings.showwarning

    def keep(message: Any, category: type[Warning], *args: Any, **settings: Any) -> None:
        if not category.__module__.startswith("kdx."):
            show(message, category, *args, **settings)
        elif (kind := re.sub(r"\d+", "", str(message))) not in known:
            known.add(kind)
            found.append(str(message))

    warnings.showwarning = keep
    return found


def chapters(seconds: float) -> Callable[[str], None]:
    """A function that says on the terminal of the user, if there is one, which chapter begins.

    Args:
        seconds: About how long all of them take.
    """
    start = time.perf_counter()

    def tell(name: str) -> None:
        if path := terminal():
            with contextlib.suppress(OSError), open(path, "w") as file:
                file.write(f"{time.perf_counter() - start:.0f} s of about {seconds:.0f} s: {name}\n")

    return tell


def score_cell(row: Mapping[str, Any], form: str = ".3f") -> str:
    """One row of a score table as lines of text: value, 95 % interval and, if there is one, p."""
    p = row.get("p", math.nan)
    last = "" if pd.isna(p) else f"\np {'≤' if p <= row['floor'] else '='} {p:.3f}"
    return f"{row['value']:{form}}\n[{row['low']:{form}}, {row['high']:{form}}]{last}"


def interval_cell(values: pd.Series, form: str = "+.2f") -> str:
    """The mean with its 95 % interval; a single value alone."""
    return f"{mean_interval(values):{form}}" if len(values) > 1 else f"{values.iloc[0]:{form}}"


def rank_cell(row: Mapping[str, Any]) -> str:
    """The ranks that a network may have, from :func:`kdx.measure.teachers.rank`."""
    if pd.isna(row["best"]):
        return "unknown"
    return f"{row['best']:.0f}" if row["best"] == row["worst"] else f"{row['best']:.0f} to {row['worst']:.0f}"


def multiline(table: pd.DataFrame) -> Styler:
    """A table of text that keeps line breaks and shows names as they are, markup included."""
    narrow = "font-size: 0.8em; padding: 2px; vertical-align: top; text-align: left"
    cell = {"selector": "td", "props": f"white-space: pre; {narrow}"}
    heading = {"selector": "th", "props": f"white-space: pre-line; {narrow}"}
    caption = {"selector": "caption", "props": "white-space: normal"}
    style = table.style.format(escape="html")
    for axis in ("index", "columns"):
        style = style.format_index(escape="html", axis=axis)
    return style.set_table_styles([cell, heading, caption])


def naming_rates(table: pd.DataFrame) -> dict[str, Any]:
    """How often teachers are named, found, and others accused, as text with 95 % intervals.

    Args:
        table: Rows of ``data/results/who_taught.csv``, one for each set of candidates.
    """

    def rate(values: pd.Series) -> str:
        return f"{share_interval(values):.0%}" if len(values) else "no p"

    there, gone = (table[table["teacher"] == with_it] for with_it in (True, False))
    tested, alone = (of[of["p"].notna()] for of in (there, gone))
    low, right = tested["p"] <= 0.05, tested["accused the teacher"].astype(bool)
    found = {"named": rate(there["named by share"]), "found": rate(low & right), "wrongly accused": rate(low & ~right)}
    return {
        "students": table.groupby(["dataset", "group", "student", "fold"]).ngroups,
        **(found if len(there) else dict.fromkeys(found, "")),
        "false alarms": rate(alone["p"] <= 0.05),
    }


def paper_table(name: str, dataset: str = "") -> pd.DataFrame:
    """The paper's values in ``data/paper/NAME.csv``, by stage.

    A table with a column ``dataset`` gives the rows of that dataset, perhaps none, by technique and stage.
    """
    table = pd.read_csv(checkout_file(f"paper/{name}.csv"))
    if "dataset" not in table:
        return table.set_index("stage")
    return table[table["dataset"] == dataset].drop(columns="dataset").set_index(["technique", "stage"])


def published(paper: pd.DataFrame, technique: str, column: str) -> pd.Series | str:
    """Lines with the paper's value per stage for a table cell; empty where the paper has none."""
    if column not in paper or technique not in paper.index.get_level_values("technique"):
        return ""
    return "\npaper: " + paper.loc[technique][column].map("{:.4f}".format)


def checkout_file(name: str) -> Path:
    """The path of a committed file in ``data``.

    Raises:
        ValueError: There is none, since the package is not in a checkout.
    """
    path = CHECKOUT / "data" / name
    if not path.is_file():
        raise ValueError(f"no {path}: tables come with a checkout; install kdx from one, with pip install -e")
    return path


def glue_verdicts(verdicts: Sequence[Verdict], numbers: Sequence[int | str]) -> None:
    """Store verdicts in the executed notebook, where the board of claims reads them.

    Args:
        verdicts: Of the claims that were tested.
        numbers: Of all claims that the page tests; those without a verdict are shown as not tested.
    """
    from myst_nb import glue

    known = {verdict.number: verdict for verdict in verdicts}
    for number in numbers:
        pieces = {"verdict": "not tested", "effects": "not with the parameters of this build"}
        if number in known:
            verdict = known[number]
            pieces = {"verdict": badge(verdict.word), "effects": f"{verdict.effect}: {verdict.summary}"}
        for name, text in pieces.items():
            glue(f"claim_{number}_{name}", HTML(text), display=False)
