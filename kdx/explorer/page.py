"""The explorer inside a page, or as a widget: precomputed maps of some images, drawn by one JavaScript module."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import HTML
from torch import Tensor

from kdx.explain.grad_cam import grad_cam
from kdx.explain.unexplained import unexplained
from kdx.explain.unicam import unicam
from kdx.explorer.view import METHODS, PICKS, UNIQUE, View
from kdx.pages import plots

FUSED, EACH_STAGE, UNICAM = METHODS
CAMS = {"Grad-CAM of the student": "student", "Grad-CAM of the base": "base"}
EVERY = ""  # technique of maps that do not depend on it
Layer = tuple[str, str, str, dict[str, Tensor]]  # technique, method, kind, stage -> maps (n, h, w)


def choose(views: Mapping[str, View], n: int) -> list[int]:
    """Rows of test images, as many of each of ``PICKS`` as there are, up to an equal share of ``n``.

    The answers are those of the first view. Fewer than ``n`` come where an outcome is rare.
    """
    first = next(iter(views.values()))
    picks = [name for name in PICKS if name != "all images"]
    return [row for name in picks for row in first.choose(name)[: n // len(picks)]]


def payload(views: Mapping[str, View], rows: Sequence[int], reference: int) -> dict[str, Any]:
    """Everything that the explorer draws, as JSON: numbers as base64.

    Args:
        views: Technique -> its view; all of one base and the same test images.
        rows: Those that are shown.
        reference: Images in the reference set.

    Returns:
        ``images`` (row, label, and each network's answer), ``pixels`` uint8 (n, side, side, 3), ``probabilities``
        uint8 (networks, n, classes) in 1/255, ``layers`` (technique, method, kind, and stage -> offset, height and
        width), ``maps`` uint8 (n, h, w) of each layer and stage in turn, as shares of the largest value of each map,
        ``peaks`` float32, these values, and what the controls need.

    Raises:
        ValueError: Views of different images or bases.
    """
    first = next(iter(views.values()))
    for view in views.values():
        same = torch.equal(view.images.images, first.images.images)
        if not same or view.pair.keys["base"] != first.pair.keys["base"]:
            raise ValueError("views: expected students of one base, over the same test images")
    layers = [layer for name, view in views.items() for layer in _layers(name, view, rows, reference, view is first)]
    probabilities = _probabilities(views, rows)
    maps: list[np.ndarray] = []
    peaks: list[np.ndarray] = []
    listed, offset = [], 0
    for technique, method, kind, of in layers:
        places = {}
        for stage, drawn in of.items():
            peak = drawn.flatten(1).amax(1)
            share = drawn / torch.where(peak > 0, peak, 1)[:, None, None]
            maps.append((255 * share).round().byte().numpy().ravel())
            places[stage] = [offset, len(peaks), *drawn.shape[1:]]
            peaks.append(peak.numpy())
            offset += maps[-1].size
        listed.append({"technique": technique, "method": method, "kind": kind, "stages": places})
    images = first.images.images[list(rows)].permute(0, 2, 3, 1)
    answers = {name: of.argmax(1).tolist() for name, of in probabilities.items()}
    return {
        "side": images.shape[1],
        "classes": list(first.images.classes),
        "images": [
            {"row": row, "label": int(first.images.labels[row]), "answers": {n: a[i] for n, a in answers.items()}}
            for i, row in enumerate(rows)
        ],
        "stages": first.stages,
        "techniques": list(views),
        "methods": [FUSED, EACH_STAGE, UNICAM],
        "kinds": [*UNIQUE, *CAMS],
        "fused": FUSED,
        "reference": reference,
        "networks": first.pair.networks,
        "layers": listed,
        "pixels": _text(images.numpy()),
        "probabilities": _text(np.stack([(255 * p).round().byte().numpy() for p in probabilities.values()])),
        "maps": _text(np.concatenate(maps)),
        "peaks": _text(np.stack(peaks).astype("<f4")),
        "colours": _text((255 * matplotlib.colormaps[plots.MAPS](np.arange(256))[:, :3]).round().astype(np.uint8)),
    }


def _layers(technique: str, view: View, rows: Sequence[int], reference: int, first: bool) -> list[Layer]:
    """All maps of one technique; those that all techniques share with the first alone."""
    x, y = view.x[list(rows)], view.images.labels[list(rows)]
    known = view.embeddings[view.chosen(reference).labels]
    found: list[Layer] = []
    parts = [(technique, "student", {kind: kind for kind in ("distilled", "residual")})]
    if first and "second base" in view.networks:
        parts.append((EVERY, "second base", {"control": "distilled"}))
    for name, role, kinds in parts:
        of = view.reference(reference, role)
        each, cams = unexplained(of, x), unicam(of, known, x, view.embeddings[y])
        for kind, direction in kinds.items():
            found.append((name, FUSED, kind, {"": each.fused[direction]}))
            found.append((name, EACH_STAGE, kind, getattr(each, direction)))
            found.append((name, UNICAM, kind, getattr(cams, direction)))
    for kind, role in CAMS.items():
        if role == "student" or first:
            maps = grad_cam(view.networks[role], x, y, view.layers[role])
            found.append((technique if role == "student" else EVERY, "", kind, maps))
    return found


def _probabilities(views: Mapping[str, View], rows: Sequence[int]) -> dict[str, Tensor]:
    """Network -> (n, classes): the base, and the student of each technique."""
    first = next(iter(views.values()))
    networks = {"base": first.networks["base"]} | {name: view.networks["student"] for name, view in views.items()}
    with torch.no_grad():
        return {name: F.softmax(net(first.x[list(rows)]), 1) for name, net in networks.items()}


def _text(numbers: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()


def module() -> str:
    """The JavaScript module, in the form that anywidget loads: ``export default { render({ model, el }) }``."""
    return (files("kdx.explorer") / "explorer.mjs").read_text()


def html(found: Mapping[str, Any]) -> HTML:
    """The explorer as a part of a page. It asks no host for anything.

    Args:
        found: From :func:`payload`.
    """
    text = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")
    inside = module().replace("export default", "const explorer =")
    return HTML(
        '<div class="kdx-explorer"><noscript>The explorer draws with JavaScript, which is off.</noscript>'
        f'<script type="application/json">{text}</script></div>\n'
        f'<script type="module">\n{inside}\n'
        'for (const el of document.querySelectorAll(".kdx-explorer")) {\n'
        '  const data = JSON.parse(el.querySelector("script").textContent);\n'
        "  explorer.render({ model: { get: () => data }, el });\n"
        "}\n</script>"
    )


def widget(found: Mapping[str, Any]) -> Any:
    """The same explorer as a widget of JupyterLab or Voilà, by the same module. It needs the package anywidget.

    Args:
        found: From :func:`payload`.

    Returns:
        An ``anywidget.AnyWidget``, to be displayed, or put into a box of ipywidgets.
    """
    import anywidget
    import traitlets

    class PageExplorer(anywidget.AnyWidget):
        _esm = module()
        data = traitlets.Dict().tag(sync=True)

    return PageExplorer(data=dict(found))
