"""One view of the explorer: a student beside its base, computed and drawn for one image."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from kdx.data.batches import scorable
from kdx.data.dataset import Dataset
from kdx.data.decoding import decode, resize_square
from kdx.data.folders import RefusedError
from kdx.data.label_embeddings import label_embeddings
from kdx.distil.stored_pairs import Pair
from kdx.explain.grad_cam import grad_cam
from kdx.explain.reference import Reference
from kdx.explain.road import perturb
from kdx.explain.unexplained import Unexplained, unexplained, unexplained_share
from kdx.explain.unicam import unicam
from kdx.measure.scorer import Scorer
from kdx.networks.stages import stages
from kdx.pages import plots

REFERENCES = (32, 64, 128, 256)  # images in the reference set
GRAD_CAM = ("Grad-CAM, base", "Grad-CAM, student")
UNIQUE = ("distilled", "residual", "control")  # control: distilled of the second base in the student's place
METHODS = ("unexplained, fused", "unexplained", "UniCAM")  # of the maps of UNIQUE; fused: one map for all stages
DPI = 100
OWN = -1  # place of an uploaded image
PICKS = {
    "all images": lambda student, base: torch.ones_like(student),
    "student right, base wrong": lambda student, base: student & ~base,
    "base right, student wrong": lambda student, base: base & ~student,
    "both wrong": lambda student, base: ~student & ~base,
    "both right": lambda student, base: student & base,
}


@dataclass(frozen=True)
class Settings:
    """The state of the widgets. ``image`` counts test images; -1 is the uploaded one."""

    image: int = 0
    stage: str = "L4"
    opacity: float = 0.6
    keep: float = 0.5
    reference: int = 128
    method: str = METHODS[0]


@dataclass(frozen=True)
class Scene:
    """The results for one image.

    Attributes:
        image: uint8 (3, h, w).
        label: Its class, in words.
        maps: Kind in ``GRAD_CAM`` and ``UNIQUE`` -> stage -> map (h, w); control only where there is a second base.
        stability: Kind in ``UNIQUE`` -> stage -> correlation of maps from two halves of the reference set; of UniCAM
            only.
        probabilities: Network -> (classes,).
    """

    image: Tensor
    label: str
    maps: dict[str, dict[str, Tensor]]
    stability: dict[str, dict[str, float]]
    probabilities: dict[str, Tensor]


class View:
    """One pair of networks over test images.

    Args:
        pair: The networks.
        limit: Number of test images, with class balance.
        seed: Draws the images, the reference sets and the batches.
    """

    def __init__(self, pair: Pair, limit: int = 2000, seed: int = 0) -> None:
        self.pair, self.seed = pair, seed
        self.images: Dataset = pair.images(limit, seed)
        self.networks = {role: run.model for role, run in pair.runs.items()}
        self.x = self.images.card.normalize(self.images.images)
        self.layers = {role: stages(net, self.x[:1]) for role, net in self.networks.items()}
        self.embeddings = label_embeddings(self.images.classes, "one-hot")
        self.own: tuple[Tensor, int] | None = None  # an uploaded image (3, h, w), and the class predicted for it
        self._references: dict[tuple[str, int], Reference] = {}
        self._scenes: dict[tuple[int, int, str], Scene] = {}
        self._canvas: _Canvas | None = None

    @cached_property
    def answers(self) -> dict[str, Tensor]:
        """Student and base -> predicted class (n,) of each test image."""
        batches = self.x.split(250)
        with torch.no_grad():
            return {r: torch.cat([self.networks[r](x).argmax(1) for x in batches]) for r in ("student", "base")}

    @property
    def stages(self) -> list[str]:
        return list(self.layers["student"])

    @property
    def references(self) -> list[int]:
        """Possible sizes of the reference set."""
        return [size for size in REFERENCES if size < len(self.images)] or [len(self.images) // 2]

    def choose(self, pick: str, name: str | None = None) -> list[int]:
        """Rows of the test images that match one of ``PICKS``, of one class or of all (None)."""
        right = {role: answer == self.images.labels for role, answer in self.answers.items()}
        chosen = PICKS[pick](right["student"], right["base"])
        if name is not None:
            chosen &= self.images.labels == self.images.classes.index(name)
        return chosen.nonzero()[:, 0].tolist()

    def upload(self, content: bytes) -> None:
        """Show an image file; its middle square is resized to the test images' size.

        Raises:
            ValueError: The file is not an image that can be read.
        """
        try:
            picture, _ = decode(io.BytesIO(content))
        except RefusedError as reason:
            raise ValueError(f"this file cannot be used: {reason}") from reason
        image = torch.from_numpy(resize_square(picture, self.images.images.shape[-1]))
        with torch.no_grad():
            predicted = int(self.networks["student"](self.images.card.normalize(image[None])).argmax())
        self.own = (image, predicted)
        self._scenes = {key: scene for key, scene in self._scenes.items() if key[0] != OWN}

    def scene(self, image: int, reference: int, method: str = METHODS[0]) -> Scene:
        """Maps and answers for an image, explained with ``reference`` others; kept for the next call.

        An uploaded image is explained for the class that the student predicts.
        """
        if (key := (image, reference, method)) in self._scenes:
            return self._scenes[key]
        if image == OWN:
            if self.own is None:
                raise ValueError("no image was uploaded")
            pixels, target = self.own
            label = f"uploaded, taken for {self.images.classes[target]}"
        else:
            pixels, target = self.images.images[image], int(self.images.labels[image])
            label = self.images.classes[target]
        x = self.images.card.normalize(pixels[None])
        two = {role: self.networks[role] for role in ("student", "base")}
        maps = {f"Grad-CAM, {role}": grad_cam(net, x, target, self.layers[role]) for role, net in two.items()}
        found: dict[str, Any] = {}
        for role in self.networks:
            if role != "base":
                of = self.reference(reference, role)
                if method == "UniCAM":
                    labels = self.embeddings[self.chosen(reference).labels]
                    found[role] = unicam(of, labels, x, self.embeddings[[target]])
                else:
                    found[role] = unexplained(of, x)
                    if method == "unexplained, fused":
                        one = {d: dict.fromkeys(of.stages, maps) for d, maps in found[role].fused.items()}
                        found[role] = Unexplained(**one)
        kinds = {"distilled": ("student", "distilled"), "residual": ("student", "residual")}
        if "second base" in found:
            kinds["control"] = ("second base", "distilled")
        maps |= {kind: getattr(found[role], direction) for kind, (role, direction) in kinds.items()}
        stability = {}
        if method == "UniCAM":
            stability = {kind: found[role].stability[direction] for kind, (role, direction) in kinds.items()}
        with torch.no_grad():
            probabilities = {role: F.softmax(net(x)[0], 0) for role, net in two.items()}
        self._scenes[key] = Scene(
            pixels,
            label,
            {kind: {s: m[0] for s, m in maps[kind].items()} for kind in (*GRAD_CAM, *kinds)},
            {kind: {s: float(v[0]) for s, v in of.items()} for kind, of in stability.items()},
            probabilities,
        )
        return self._scenes[key]

    def chosen(self, size: int) -> Dataset:
        """The images of the reference set of this size."""
        return self.images.split(size, seed=self.seed)[0]

    def reference(self, size: int, role: str = "student") -> Reference:
        """The reference set of this size for a network and the base; a larger one contains the smaller ones."""
        if (key := (role, size)) not in self._references:
            self._references[key] = Reference(
                self.networks[role],
                self.networks["base"],
                self.images.card.normalize(self.chosen(size).images),
                layers_student=self.layers[role],
                layers_base=self.layers["base"],
            )
        return self._references[key]

    @cached_property
    def scores(self) -> dict[str, pd.DataFrame]:
        """FSS, RS of both networks, unique relevance and unexplained shares: score -> table by stage with value and
        interval, and p except for shares."""
        rows, size = scorable(self.images.labels, 4, 64)
        x, y = self.x[rows], self.images.labels[rows]
        scorer = Scorer(
            self.networks, x, y, layers=self.layers, batches=4, batch_size=size, permutations=99, seed=self.seed
        )
        tables = {"FSS of student and base": scorer.fss("student", "base")}
        for role in ("student", "base"):
            tables[f"RS of the {role}"] = scorer.rs(role, self.embeddings)
        for role in self.networks:
            if role != "base":
                unique = scorer.unique_rs(role, "base", self.embeddings)
                unique = unique[unique["statistic"] == "semipartial"]
                tables |= _by_kind("unique", role, unique)
                largest = self.reference(self.references[-1], role)
                shares = unexplained_share(largest, folds=min(10, len(largest)), seed=self.seed)
                tables |= _by_kind("unexplained", role, shares)
        return {name: table.set_index("stage") for name, table in tables.items()}

    def warm_up(self) -> None:
        """Compute what the widgets will need: regressions on reference sets of every size, and scores."""
        for role in self.networks:
            for size in self.references if role != "base" else ():
                _ = self.reference(size, role).regressions
        _ = self.scores

    def perturbed(self, scene: Scene, stage: str, keep: float) -> Tensor:
        """The image (3, h, w) in [0, 1] with the ``keep`` share of its pixels that is most salient in the distilled
        map, the others imputed."""
        pixels = scene.image[None].float() / 255
        return perturb(pixels, scene.maps["distilled"][stage][None], keep, seed=self.seed)[0].clamp(0, 1)

    def draw(self, settings: Settings) -> bytes:
        """The view as PNG."""
        scene = self.scene(settings.image, settings.reference, settings.method)
        if self._canvas is None:
            self._canvas = _Canvas(self.images)
        return self._canvas.draw(scene, settings, self.perturbed(scene, settings.stage, settings.keep))


def _by_kind(score: str, role: str, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A table by direction; of the second base, its distilled part as the control."""
    parts = dict(list(table.groupby("direction", sort=False)))
    if role != "student":
        return {f"{score}, control": parts["distilled"]}
    return {f"{score}, {direction}": part for direction, part in parts.items()}


class _Canvas:
    """The picture of a view. Its parts are made once and changed at each drawing, which saves most of the time."""

    def __init__(self, images: Dataset) -> None:
        self.classes = images.classes
        self.figure = Figure(figsize=(8.6, 4.7), dpi=DPI)
        self.figure.set_layout_engine("none")
        grid = self.figure.add_gridspec(2, 4, left=0.005, right=0.985, bottom=0.05, top=0.945, wspace=0.06, hspace=0.28)
        axes = [self.figure.add_subplot(grid[i]) for i in range(8)]
        titles = ("image", *GRAD_CAM, "kept pixels", *UNIQUE)
        self.bars = axes.pop(3)
        self.bars.set_box_aspect(1)
        blank = torch.zeros(images.images.shape[-2:])
        self.pictures, self.maps, self.notes = {}, {}, {}
        for title, place in zip(titles, axes, strict=True):
            place.set(xticks=[], yticks=[])
            for side in place.spines.values():
                side.set_visible(False)
            place.set_title(title, fontsize=11, color=plots.INK)
            self.pictures[title] = plots.show_image(place, images.images[0])
            self.notes[title] = place.text(0.5, -0.04, "", transform=place.transAxes, ha="center", va="top", fontsize=9)
            self.notes[title].set_parse_math(False)  # a class may be called $5
            if title in (*GRAD_CAM, *UNIQUE):
                height, width = blank.shape
                whole = (-0.5, width - 0.5, height - 0.5, -0.5)
                self.maps[title] = place.imshow(blank, cmap=plots.MAPS, interpolation="nearest", extent=whole)

    def draw(self, scene: Scene, settings: Settings, kept: Tensor) -> bytes:
        stage = settings.stage
        shared = {
            kind: max(float(scene.maps[k][stage].max()) for k in group if k in scene.maps)
            for group in (GRAD_CAM, UNIQUE)
            for kind in group
        }
        for title, picture in self.pictures.items():
            picture.set_data((kept if title == "kept pixels" else scene.image / 255).permute(1, 2, 0))
        for kind, drawn in self.maps.items():
            drawn.set_visible(kind in scene.maps)
            if kind not in scene.maps:
                self.notes[kind].set_text("no second base")
                continue
            drawn.set_data(scene.maps[kind][stage])
            drawn.set_clim(0, shared[kind] or 1)
            drawn.set_alpha(settings.opacity)
            note = f"0 to {shared[kind]:.1e}" if shared[kind] else "nothing"
            if kind in scene.stability:
                note += f", stability {scene.stability[kind][stage]:.2f}"
            self.notes[kind].set_text(note)
        self.notes["image"].set_text(scene.label)
        self.notes["kept pixels"].set_text(f"{settings.keep:.0%}, by the distilled map")
        self._draw_bars(scene.probabilities)
        content = io.BytesIO()
        self.figure.savefig(content, format="png", dpi=DPI)
        return content.getvalue()

    def _draw_bars(self, probabilities: Mapping[str, Tensor]) -> None:
        """The likeliest classes of both networks."""
        self.bars.clear()
        likely = torch.stack(list(probabilities.values())).amax(0).topk(min(4, len(self.classes))).indices.tolist()
        for i, role in enumerate(("student", "base")):
            places = [y + 0.28 * i for y in range(len(likely))]
            self.bars.barh(places, probabilities[role][likely], height=0.26, color=plots.ROLES[role], label=role)
        for y, place in enumerate(likely):
            self.bars.text(
                0, y - 0.2, self.classes[place][:24], va="bottom", fontsize=9, color=plots.INK, parse_math=False
            )
        self.bars.set(xlim=(0, 1), ylim=(len(likely) - 0.45, -0.7), xticks=[0, 0.5, 1], yticks=[])
        self.bars.set_title("probability", fontsize=11, color=plots.INK)
        self.bars.tick_params(labelsize=8, length=2)
        self.bars.legend(fontsize=8, loc="lower right", frameon=False)
        for side in ("top", "right", "left"):
            self.bars.spines[side].set_visible(False)
