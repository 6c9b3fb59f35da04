"""The explorer: look at any student of the run store beside its base, image by image, and turn the knobs.

:class:`View` computes and draws; :class:`Explorer` is its widgets.
"""

from __future__ import annotations

import base64
import html
import io
import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import ipywidgets as widgets
import torch
import torch.nn.functional as F
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from kdx import plots
from kdx.data import Dataset
from kdx.folders import RefusedError, decode, resize_square
from kdx.home import DataError, data_home
from kdx.labels import label_embeddings
from kdx.notebook import score_cell
from kdx.pairs import Pair, stored_pairs
from kdx.perturb import perturb
from kdx.saliency import grad_cam
from kdx.scores import fss, rs, scorable, unique_rs
from kdx.tracing import stages
from kdx.unique import Reference, unicam

REFERENCES = (32, 64, 128, 256)  # images in the reference set
GRAD_CAM = ("Grad-CAM, base", "Grad-CAM, student")
UNIQUE = ("distilled", "residual", "control")  # control: distilled of the second base in the student's place
THUMBNAILS = 10
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
    """What is shown. ``image`` counts test images, -1 is the uploaded one."""

    image: int = 0
    stage: str = "L4"
    opacity: float = 0.6
    keep: float = 0.5
    reference: int = 128


@dataclass(frozen=True)
class Scene:
    """Everything that is known of one image: maps (h, w) by kind and stage, and more.

    Attributes
    ----------
    maps : of ``GRAD_CAM`` and ``UNIQUE``; control only where there is a second base.
    stability : kind in ``UNIQUE`` -> stage -> correlation of maps from two halves of the reference set.
    probabilities : network -> (classes,).
    """

    image: Tensor
    label: str
    maps: dict[str, dict[str, Tensor]]
    stability: dict[str, dict[str, float]]
    probabilities: dict[str, Tensor]


class View:
    """One pair of networks over test images.

    Parameters
    ----------
    limit : test images, with class balance.
    seed : draws them, the reference sets and batches.
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
        self._scenes: dict[tuple[int, int], Scene] = {}
        self._canvas: _Canvas | None = None

    @cached_property
    def answers(self) -> dict[str, Tensor]:
        """Student and base -> the class (n,) that it gives to each test image."""
        batches = self.x.split(250)
        with torch.no_grad():
            return {r: torch.cat([self.networks[r](x).argmax(1) for x in batches]) for r in ("student", "base")}

    @property
    def stages(self) -> list[str]:
        return list(self.layers["student"])

    @property
    def references(self) -> list[int]:
        """Sizes that a reference set may have."""
        return [size for size in REFERENCES if size < len(self.images)] or [len(self.images) // 2]

    def choose(self, pick: str, name: str | None = None) -> list[int]:
        """Test images by what the networks make of them, of one class or of all (None)."""
        right = {role: answer == self.images.labels for role, answer in self.answers.items()}
        chosen = PICKS[pick](right["student"], right["base"])
        if name is not None:
            chosen &= self.images.labels == self.images.classes.index(name)
        return chosen.nonzero()[:, 0].tolist()

    def upload(self, content: bytes) -> None:
        """Take an image file as the one to look at; its middle square is resized to the test images' size.

        Raises
        ------
        ValueError : not an image that can be read.
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

    def scene(self, image: int, reference: int) -> Scene:
        """Maps and answers for an image, explained with ``reference`` others; kept for the next time.

        An uploaded image is explained for the class that the student predicts.
        """
        if (key := (image, reference)) in self._scenes:
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
        found = {
            role: unicam(net, two["base"], x, self.embeddings[[target]], reference=self.reference(reference, role))
            for role, net in self.networks.items()
            if role != "base"
        }
        kinds = {"distilled": ("student", "distilled"), "residual": ("student", "residual")}
        if "second base" in found:
            kinds["control"] = ("second base", "distilled")
        maps |= {kind: getattr(found[role], direction) for kind, (role, direction) in kinds.items()}
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

    def reference(self, size: int, role: str = "student") -> Reference:
        """The reference set of this size for a network and the base; images of a smaller one are in a larger one."""
        if (key := (role, size)) not in self._references:
            chosen = self.images.split(size, seed=self.seed)[0]
            self._references[key] = Reference(
                self.networks[role],
                self.networks["base"],
                self.images.card.normalize(chosen.images),
                self.embeddings[chosen.labels],
                layers_student=self.layers[role],
                layers_base=self.layers["base"],
            )
        return self._references[key]

    @cached_property
    def scores(self) -> Any:
        """FSS, RS of both networks and unique relevance, by score and stage: value, interval and p."""
        rows, size = scorable(self.images.labels, 4, 64)
        x, y = self.x[rows], self.images.labels[rows]
        setting: dict[str, Any] = dict(batches=4, batch_size=size, permutations=99, seed=self.seed, kept={})
        student, base = self.networks["student"], self.networks["base"]
        layers: dict[str, Any] = {"layers_base": self.layers["base"]}
        tables = {
            "FSS of student and base": fss(
                student, base, x, y, layers_student=self.layers["student"], **layers, **setting
            )
        }
        for role in ("student", "base"):
            tables[f"RS of the {role}"] = rs(
                self.networks[role], x, y, self.embeddings, layers=self.layers[role], **setting
            )
        for role, net in self.networks.items():
            if role == "base":
                continue
            unique = unique_rs(net, base, x, y, self.embeddings, layers_student=self.layers[role], **layers, **setting)
            for direction, of in unique[unique["statistic"] == "semipartial"].groupby("direction", sort=False):
                kind = direction if role == "student" else "control" * (direction == "distilled")
                if kind:
                    tables[f"unique, {kind}"] = of
        return {name: table.set_index("stage") for name, table in tables.items()}

    def prepare(self) -> None:
        """Make what the knobs will ask for: reference sets of every size, and scores."""
        for role in self.networks:
            for size in self.references if role != "base" else ():
                self.reference(size, role)
        _ = self.scores

    def perturbed(self, scene: Scene, stage: str, keep: float) -> Tensor:
        """The image (3, h, w) in [0, 1] with the ``keep`` share of its pixels that the distilled map finds
        most salient, the others imputed."""
        pixels = scene.image[None].float() / 255
        return perturb(pixels, scene.maps["distilled"][stage][None], keep, seed=self.seed)[0].clamp(0, 1)

    def draw(self, settings: Settings) -> bytes:
        """The view as PNG."""
        scene = self.scene(settings.image, settings.reference)
        if self._canvas is None:
            self._canvas = _Canvas(self.images)
        return self._canvas.draw(scene, settings, self.perturbed(scene, settings.stage, settings.keep))


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


class Explorer:
    """Widgets over a :class:`View`; ``Explorer().show()`` in a notebook, or the app of `make explore`.

    Parameters
    ----------
    dataset : of the pairs offered; None: all that have pairs in the run store.
    limit, seed : as of :class:`View`.

    Raises
    ------
    ValueError : no pair in the run store.
    """

    def __init__(self, dataset: str | None = None, limit: int = 2000, seed: int = 0) -> None:
        self.pairs = stored_pairs(dataset)
        self.limit, self.seed = limit, seed
        self.views: dict[Pair, View] = {}
        self.chosen: list[int] = []
        self.page = 0
        self._silent = False
        self._make_widgets()
        self._open_dataset()

    def show(self) -> None:
        display(self.box)

    # --- widgets ---------------------------------------------------------------------------------

    def _make_widgets(self) -> None:
        wide = {"description_width": "5.2em"}
        slim = widgets.Layout(width="21em")

        def dropdown(name: str, options: Any, width: str = "21em") -> widgets.Dropdown:
            return widgets.Dropdown(description=name, options=options, style=wide, layout=widgets.Layout(width=width))

        names = list(dict.fromkeys(pair.dataset for pair in self.pairs))
        self.dataset = dropdown("dataset", names)
        self.networks = dropdown("networks", [], "44em")
        self.technique = dropdown("technique", [])
        self.pick = dropdown("images", list(PICKS))
        self.of_class = dropdown("class", ["all classes"])
        self.stage = widgets.SelectionSlider(description="stage", options=["L3"], style=wide, layout=slim)
        self.opacity = widgets.FloatSlider(
            description="overlay", value=0.6, min=0, max=1, step=0.05, style=wide, layout=slim
        )
        self.keep = widgets.FloatSlider(
            description="kept", value=0.5, min=0.05, max=0.95, step=0.05, style=wide, layout=slim
        )
        self.reference = widgets.SelectionSlider(
            description="reference", options=REFERENCES, value=128, style=wide, layout=slim
        )
        small = widgets.Layout(width="7em")
        self.previous = widgets.Button(description="previous", layout=small)
        self.next = widgets.Button(description="next", layout=small)
        self.random = widgets.Button(description="random", layout=small)
        self.uploader = widgets.FileUpload(accept="image/*", multiple=False, description="your image")
        self.export = widgets.Button(description="export", layout=small)
        self.thumbnails = [
            (widgets.Image(format="png", layout=widgets.Layout(width="72px", height="72px")), self._thumbnail_button())
            for _ in range(THUMBNAILS)
        ]
        self.picture = widgets.Image(format="png", layout=widgets.Layout(width="100%", max_width="860px"))
        self.status, self.table, self.link = widgets.HTML(), widgets.HTML(), widgets.HTML()
        strip = widgets.HBox(
            [widgets.VBox(pair) for pair in self.thumbnails], layout=widgets.Layout(flex_flow="row wrap")
        )
        wrap = widgets.Layout(flex_flow="row wrap")
        self.box = widgets.VBox(
            [
                widgets.HBox([self.dataset, self.networks, self.technique], layout=wrap),
                widgets.HBox(
                    [self.pick, self.of_class, self.previous, self.next, self.random, self.uploader], layout=wrap
                ),
                strip,
                widgets.HBox([self.stage, self.opacity, self.keep, self.reference], layout=wrap),
                self.picture,
                widgets.HBox([self.export, self.status, self.link], layout=wrap),
                self.table,
            ]
        )
        self.dataset.observe(self._guard(self._open_dataset), "value")
        self.networks.observe(self._guard(self._open_networks), "value")
        self.technique.observe(self._guard(self._open_pair), "value")
        for widget in (self.pick, self.of_class):
            widget.observe(self._guard(self._choose), "value")
        for widget in (self.stage, self.opacity, self.keep, self.reference):
            widget.observe(self._guard(self._redraw), "value")
        self.uploader.observe(self._guard(self._upload), "value")
        self.previous.on_click(self._guard(lambda: self._turn(-1)))
        self.next.on_click(self._guard(lambda: self._turn(1)))
        self.random.on_click(self._guard(self._pick_at_random))
        self.export.on_click(self._guard(self._export))
        for place, (_, button) in enumerate(self.thumbnails):
            button.on_click(self._guard(lambda place=place: self._look_at(self._shown()[place])))

    @staticmethod
    def _thumbnail_button() -> widgets.Button:
        return widgets.Button(
            layout=widgets.Layout(width="72px", height="22px", padding="0"), style={"font_size": "10px"}
        )

    def _guard(self, action: Any) -> Any:
        """What an event calls: problems are shown in the app, and changes made by the app itself start nothing."""

        def handle(_: Any) -> None:
            if self._silent:
                return
            try:
                action()
            except Exception as error:  # whatever it is, the app goes on
                self.status.value = f"<span style='color:#b00020'>{html.escape(str(error))}</span>"

        return handle

    # --- what was chosen -------------------------------------------------------------------------

    @property
    def view(self) -> View:
        pair = next(
            p
            for p in self.pairs
            if (p.dataset, p.networks, p.technique) == (self.dataset.value, self.networks.value, self.technique.value)
        )
        if pair not in self.views:
            self.status.value = "reading the networks and images ..."
            self.views = {pair: View(pair, self.limit, self.seed)}  # one at a time is held
        return self.views[pair]

    def settings(self) -> Settings:
        return Settings(self.image, self.stage.value, self.opacity.value, self.keep.value, self.reference.value)

    def _options(self, widget: Any, options: Any, value: Any = None) -> None:
        """New options, and ``value`` or the old one where it is still there, without an event."""
        self._silent, value = True, value or widget.value
        try:
            widget.options = options
            widget.value = value if value in options else options[0]
        finally:
            self._silent = False

    def _open_dataset(self) -> None:
        self._options(
            self.networks, list(dict.fromkeys(p.networks for p in self.pairs if p.dataset == self.dataset.value))
        )
        self._open_networks()

    def _open_networks(self) -> None:
        chosen = (self.dataset.value, self.networks.value)
        self._options(self.technique, [p.technique for p in self.pairs if (p.dataset, p.networks) == chosen])
        self._open_pair()

    def _open_pair(self) -> None:
        view = self.view
        self._options(self.stage, view.stages)
        self._options(self.reference, view.references)
        self._options(self.of_class, ["all classes", *view.images.classes])
        self.table.value = ""
        name = None if self.of_class.value == "all classes" else self.of_class.value
        if not view.choose(self.pick.value, name):  # which another pair may have had
            self._options(self.pick, list(PICKS), "all images")
            self._options(self.of_class, self.of_class.options, "all classes")
        self._choose()
        self.status.value = "scoring, and preparing reference sets ..."
        view.prepare()
        self._write_table()
        self.status.value = self._describe()

    def _choose(self) -> None:
        """The images that the widgets describe; an error, and what was chosen stays, if there is none."""
        name = None if self.of_class.value == "all classes" else self.of_class.value
        if not (chosen := self.view.choose(self.pick.value, name)):
            raise ValueError(f"there is no image of {self.of_class.value} with {self.pick.value}")
        self.chosen, self.page = chosen, 0
        self._draw_thumbnails()
        self._look_at(self.chosen[0])

    def _shown(self) -> list[int]:
        return self.chosen[self.page * THUMBNAILS : (self.page + 1) * THUMBNAILS]

    def _turn(self, step: int) -> None:
        self.page = (self.page + step) % (-(-len(self.chosen) // THUMBNAILS))
        self._draw_thumbnails()
        self._look_at(self._shown()[0])

    def _pick_at_random(self) -> None:
        place = random.randrange(len(self.chosen))
        self.page = place // THUMBNAILS
        self._draw_thumbnails()
        self._look_at(self.chosen[place])

    def _upload(self) -> None:
        if self.uploader.value:
            content = bytes(self.uploader.value[0]["content"])
            self._silent, self.uploader.value = True, ()  # so that the same file may come again
            self._silent = False
            self.view.upload(content)
            self._look_at(OWN)

    def _look_at(self, image: int) -> None:
        self.image = image
        self._redraw()

    def _draw_thumbnails(self) -> None:
        view, shown = self.view, self._shown()
        for place, (picture, button) in enumerate(self.thumbnails):
            there = place < len(shown)
            for widget in (picture, button):
                widget.layout.visibility = "visible" if there else "hidden"
            if there:
                picture.value = _png(view.images.images[shown[place]])
                button.description = view.images.classes[int(view.images.labels[shown[place]])]
                button.tooltip = f"test image {shown[place]}"

    def _redraw(self) -> None:
        settings = self.settings()
        self.picture.value = self.view.draw(settings)
        self.drawn = (self.view.pair, settings)
        self.link.value = ""
        self.status.value = self._describe()
        if self.table.value:
            self._write_table()

    def _describe(self) -> str:
        view = self.view
        if self.image == OWN:
            return "your image, explained for the class that the student predicts"
        names = view.images.classes
        answers = ", ".join(f"{role}: {names[int(of[self.image])]}" for role, of in view.answers.items())
        name = names[int(view.images.labels[self.image])]
        return html.escape(f"test image {self.image}, {name} ({answers}); {len(self.chosen)} to choose from")

    def _write_table(self) -> None:
        """Scores at every stage; that of the slider is marked."""
        view = self.view
        head = "".join(f"<th style='padding:2px 12px'>{s}</th>" for s in view.stages)
        body = ""
        for name, table in view.scores.items():
            cells = "".join(
                f"<td style='padding:2px 12px;{'background:#fff3d6' * (s == self.stage.value)}'>"
                f"{score_cell(table.loc[s]).replace(chr(10), ' ')}</td>"
                for s in view.stages
            )
            body += f"<tr><th style='text-align:left'>{name}</th>{cells}</tr>"
        self.table.value = (
            f"<table style='font-size:12px;line-height:1.5'><tr><th></th>{head}</tr>{body}</table>"
            "<small>Means over 4 class-balanced batches of test images, 95 % intervals, p by permutation.</small>"
        )

    def _export(self) -> None:
        """The view and its settings as files, and as links for a browser on another machine."""
        pair, settings = self.drawn
        facts = asdict(settings) | {
            "dataset": pair.dataset,
            "networks": pair.networks,
            "technique": pair.technique,
            "runs": dict(pair.keys),
            "limit": self.limit,
            "seed": self.seed,
        }
        content = {"png": bytes(self.picture.value), "json": (json.dumps(facts, indent=2) + "\n").encode()}
        folder = data_home() / "exports"
        folder.mkdir(parents=True, exist_ok=True)
        stem = time.strftime("explorer-%Y%m%d-%H%M%S")
        links = []
        for kind, data in content.items():
            (folder / f"{stem}.{kind}").write_bytes(data)
            mime = {"png": "image/png", "json": "application/json"}[kind]
            address = f"data:{mime};base64,{base64.b64encode(data).decode()}"
            links.append(f"<a download='{stem}.{kind}' href='{address}'>{stem}.{kind}</a>")
        self.link.value = f"&nbsp; saved in {html.escape(str(folder))}: {', '.join(links)}"


def explore(dataset: str | None = None, limit: int = 2000, seed: int = 0) -> None:
    """Show the explorer, or what keeps it from showing; parameters as of :class:`Explorer`."""
    try:
        Explorer(dataset, limit, seed).show()
    except (DataError, ValueError) as error:
        display(widgets.HTML(f"<b>The explorer has nothing to show:</b> {html.escape(str(error))}"))


def _png(image: Tensor) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
    return content.getvalue()
