"""``kdx explain --detection``: what a student detector gained and lost against its base, in one HTML file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kdx.intervals import mean_of_known
from kdx.measure import likeness
from kdx.measure.ledger import BASE, SECOND, STUDENT, TEACHER
from kdx.measure.objects import changes, image_of, telling_images
from kdx.pages import detection_sentences as told
from kdx.pages import html_pages, side_by_side_plots
from kdx.pages.detector_pair import DetectorPair, common_levels, facts, read_detectors
from kdx.pages.gates import Gate
from kdx.pages.report_tables import interval, p_of
from kdx.pages.statement import SCHEMA
from kdx.paths import check_new, written_whole

SHOWN = 4  # images with maps
LOOKED = 128  # images on which maps and features are compared with the teacher's
LIKE = ("CKA", "agreement of feature maps", "agreement of Grad-CAMs")
TITLE = "What the student gained and lost"


def explain_detection(
    parameters: Mapping[str, Any], folder: Path, out: Path, command: str = "", gates: Sequence[Gate] = (),
    json_only: bool = False,
) -> list[str]:  # fmt: skip
    """Compare a student detector with its base on images with boxes, and write report.html, statement.json and
    objects.csv; with ``json_only``, statement.json alone.

    Args:
        parameters: ``score`` and ``limit``, and those of :func:`kdx.pages.detector_pair.read_detectors`.
        folder: Images with boxes, in the layout of VOC or COCO.
        out: A folder that does not exist yet or is empty.
        command: What is said to have made the report.
        gates: Conditions under which a release fails.
        json_only: Keep the statement alone.

    Returns:
        Why a release fails, for each gate that does.

    Raises:
        ValueError, DataError: As for :func:`kdx.pages.detector_pair.read_detectors`; nothing is then written.
        ModuleNotFoundError: pycocotools is not installed.
    """
    check_new(out)
    pair = read_detectors(parameters, folder, parameters.get("score", 0.5), parameters.get("limit"))
    evidence = gather(pair)
    found = statement(pair, evidence, command)
    failures = {gate.text: gate.failure(found["metrics"]) for gate in gates}
    with written_whole(out.absolute(), new=True) as scratch:
        (scratch / "statement.json").write_text(json.dumps(found | {"gates": failures}, indent=2) + "\n")
        if not json_only:
            pair.per_object().to_csv(scratch / "objects.csv", index=False)
            (scratch / "report.html").write_text(_page(pair, evidence, failures, command))
    return [failure for failure in failures.values() if failure]


def gather(pair: DetectorPair) -> told.DetectionEvidence:
    """Measure all that is said of detectors."""
    like = shares = None
    caveats = [
        *pair.caveats,
        "Tests and intervals of objects count objects of one image as independent; those of AP and of false alarms are "
        "over images.",
    ]
    if TEACHER in pair.own.networks:
        if not common_levels(pair):
            caveats.append("The pyramids differ in their levels, so features and maps are not compared.")
        else:
            some = pair.images[torch.arange(min(LOOKED, len(pair.images)))]
            like, shares = _like_teacher(pair, some)
            if len(some) < len(pair.images):
                caveats.append(f"Maps and features are compared on the first {len(some)} images.")
    return told.DetectionEvidence(
        len(pair.images), pair.score, pair.ledger, pair.precision, pair.alarms, like, shares, caveats
    )


def _like_teacher(pair: DetectorPair, images: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Likeness to the teacher, as for :class:`~kdx.pages.detection_sentences.DetectionEvidence`, and shares."""
    networks = pair.own.networks
    rivals = {role: networks[role] for role in pair.own.shown}
    table = likeness.compare_detectors(rivals, networks[TEACHER], images)
    table = table[table["measure"].isin(LIKE)]
    of = table.pivot(index="image", columns=["network", "level", "measure"], values="value")
    rows = []
    for role, level, measure in of:
        values, ours = of[role, level, measure], of[STUDENT, level, measure]
        gap = mean_of_known(ours - values)[:3] if role != STUDENT else (float("nan"),) * 3
        rows.append((role, level, measure, *mean_of_known(values)[:3], *gap))
    columns = ["network", "level", "measure", "value", "low", "high", *told.GAP]
    handed = {role: networks[role] for role in (STUDENT, SECOND) if role in networks}
    return pd.DataFrame(rows, columns=columns), likeness.shares_table(handed, networks[BASE], networks[TEACHER], images)


def statement(pair: DetectorPair, evidence: told.DetectionEvidence, command: str) -> dict[str, Any]:
    """The statement as JSON, as ``kdx/pages/statement.schema.json`` describes it."""
    classes = json.loads(evidence.ledger.by_class().to_json(orient="records", double_precision=6))
    return {
        "schema": SCHEMA,
        **facts(pair, command),
        "images": evidence.images,
        "sentences": told.sentences(evidence),
        "caveats": list(evidence.caveats),
        "metrics": {name: metric._asdict() for name, metric in told.metrics(evidence).items()},
        "groups": {"classes": classes},
    }


# --- the page ------------------------------------------------------------------------------------------


def _page(
    pair: DetectorPair, evidence: told.DetectionEvidence, failures: Mapping[str, str | None], command: str
) -> str:
    parts = [f"<h1>{TITLE}</h1>", html_pages.listed(told.sentences(evidence))]
    parts += ["<h2>Average precision</h2>", _paragraph(PRECISION), html_pages.table(_precision_table(evidence))]
    parts += [f"<h2>Objects found</h2>{_paragraph(OBJECTS.format(score=pair.score))}", _object_tables(evidence)]
    parts += [f"<h2>Images that tell most</h2>{_pictures(pair)}"]
    if evidence.likeness is not None and evidence.handed_over is not None:
        parts += ["<h2>Likeness to the teacher</h2>", _paragraph(LIKENESS), _likeness_tables(evidence)]
    parts += ["<h2>Limits</h2>", html_pages.listed(list(evidence.caveats))]
    if failures:
        lines = [f"{text}: {'failed, ' + why if why else 'passed'}" for text, why in failures.items()]
        parts += ["<h2>Gates</h2>", html_pages.listed(lines)]
    return html_pages.page(TITLE, f"<main>{''.join(parts)}</main>", command)


PRECISION = (
    "As in COCO, by pycocotools: AP50 at an overlap (IoU) of 0.5, AP the mean over 0.5 to 0.95. Intervals are of 95 %, "
    "over images, by the jackknife; differences are paired by image."
)
OBJECTS = (
    "An object is found if a detection of its class with a score of {score:g} or more overlaps with it by an IoU of "
    "0.5 or more. Gained and lost are against the base. Intervals are exact (Clopper and Pearson), p is that of "
    "McNemar's exact test."
)
MAPS = (
    "Two rows for each image, all maps of a row on one scale. Above: its objects, those that were gained in orange, "
    "those that were lost in dashed light blue, and the mean size of features. Below: the student's detections, and "
    "Grad-CAM of the scores of all detections that each network keeps. Maps are of the level of the pyramid at which "
    "Grad-CAM of student and base is largest."
)
LIKENESS = (
    "Pearson correlation of maps with the teacher's over pixels, and linear CKA of features, with 95 % intervals over "
    "images; below them the student's minus that of the network. Handed over: the share of the variance of "
    "features that the base cannot express and the teacher can; a second base, which had no teacher, is the floor."
)


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _precision_table(evidence: told.DetectionEvidence) -> pd.DataFrame:
    rows: dict[str, dict[str, str]] = {}
    for row in evidence.precision.to_dict("records"):
        cells = rows.setdefault(row["network"], {"network": row["network"]})
        cells[row["measure"]] = interval(row, form=".3f")
        cells[f"student minus it, {row['measure']}"] = interval(row, told.GAP, "+.3f")
    return pd.DataFrame(list(rows.values()))


def _object_tables(evidence: told.DetectionEvidence) -> str:
    ledger = evidence.ledger
    alarms, of = evidence.alarms.set_index("network"), ledger.accuracy().set_index("network")
    rates = ledger.rates().set_index(["network", "quantity"])
    rows = []
    for role in of.index:
        row = {"network": role, "finds": f"{of.loc[role, 'right']:,} of {of.loc[role, 'n']:,}"}
        row["share"] = interval(of.loc[role])
        for quantity in ("gained", "lost"):
            if (role, quantity) in rates.index:
                of_role = rates.loc[(role, quantity)]
                row[quantity] = f"{of_role['images']:,.0f}\n{interval(of_role)}"
        row["p"] = "" if role == BASE else p_of(ledger.against(BASE, of=role).p)
        row["false alarms an image"] = interval(alarms.loc[role], form=".2f")
        rows.append(row)
    by_class = ledger.by_class()
    table = pd.DataFrame({"class": by_class["group"], "objects": by_class["n"]})
    for role in (BASE, STUDENT, *[SECOND] * evidence.second):
        table[role] = by_class[role].map("{:.1%}".format)
    table[["gained", "lost"]] = by_class[["gained", "lost"]]
    table["difference"] = [interval(row, ("difference", "low", "high"), "+.1%") for row in by_class.to_dict("records")]
    table["p"] = by_class["p"].map(p_of)
    table["p adjusted (Holm)"] = by_class["p adjusted"].map(p_of)
    if evidence.second:
        table["against both bases"] = by_class["against both"].map(p_of)
    return html_pages.table(pd.DataFrame(rows)) + html_pages.table(table)


def _likeness_tables(evidence: told.DetectionEvidence) -> str:
    assert evidence.likeness is not None
    assert evidence.handed_over is not None
    tables = []
    for measure, rows in evidence.likeness.groupby("measure", sort=False):
        cells = rows.assign(
            cell=[
                interval(row, form=".2f")
                + (f"\nstudent {interval(row, told.GAP, '+.2f')}" if row["network"] != STUDENT else "")
                for row in rows.to_dict("records")
            ]
        )
        wide = cells.pivot(index="network", columns="level", values="cell").reindex(rows["network"].unique())
        tables.append(
            f"<h3>{html.escape(str(measure))}</h3>{html_pages.table(wide.rename_axis(None, axis=1).reset_index())}"
        )
    shares = evidence.handed_over.assign(cell=[interval(row) for row in evidence.handed_over.to_dict("records")])
    wide = shares.pivot(index="network", columns="level", values="cell").rename_axis(None, axis=1).reset_index()
    return "".join(tables) + f"<h3>handed over</h3>{html_pages.table(wide)}"


def _pictures(pair: DetectorPair) -> str:
    if not (levels := common_levels(pair)):
        return _paragraph("The pyramids differ in their levels, so maps are not drawn.")
    chosen = telling_images(pair.images, pair.ledger, SHOWN)
    some = pair.images[torch.tensor(chosen)]
    roles = [*pair.own.shown, *[TEACHER] * (TEACHER in pair.own.networks)]
    seen = {role: likeness.seen_levels(pair.own.networks[role], some.images) for role in roles}
    owners, kinds = image_of(pair.images), changes(pair.ledger)
    rows = []
    for i, image in enumerate(chosen):
        mass = {s: sum(float(seen[r][s][1][likeness.CAM][i].sum()) for r in (STUDENT, BASE)) for s in levels}
        level = max(levels, key=lambda name: mass[name])
        found = pair.detections[STUDENT][image]
        drawn = {
            likeness.FEATURES: (some.boxes[i], [k for k, owner in zip(kinds, owners, strict=True) if owner == image]),
            likeness.CAM: (found["boxes"][found["scores"] >= pair.score], []),
        }
        name = Path(pair.files[image]).stem
        for kind, (boxes, of_boxes) in drawn.items():
            maps = {role: seen[role][level][1][kind][i] for role in roles}
            caption = f"{name if len(name) < 21 else name[:19] + '…'}\n{kind}, {level}"
            rows.append(side_by_side_plots.Row(caption, some.images[i], maps, boxes, of_boxes))
    figure = side_by_side_plots.side_by_side(rows)
    alt = "Images with their objects and detections, and feature maps and Grad-CAM maps of each network beside them"
    return _paragraph(MAPS) + html_pages.picture(figure, alt)
