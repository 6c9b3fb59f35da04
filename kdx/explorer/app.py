"""The explorer: any student of the run store beside its base, image by image, with widgets."""

from __future__ import annotations

import base64
import html
import io
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ipywidgets as widgets
from IPython.display import display
from PIL import Image
from torch import Tensor

from kdx.distil.stored_pairs import Pair, stored_pairs
from kdx.explain.reference import ANSWER
from kdx.explorer.view import METHODS, OWN, PICKS, REFERENCES, Settings, View
from kdx.pages.notebook import score_cell
from kdx.paths import DataError, data_home

THUMBNAILS = 10


class Explorer:
    """Widgets over a :class:`View`; ``Explorer().show()`` in a notebook, or the app of ``make explore``.

    Args:
        dataset: Of the pairs offered; None offers all datasets that have pairs in the run store.
        limit: As for :class:`View`.
        seed: As for :class:`View`.

    Raises:
        ValueError: No pair in the run store.
    """

    def __init__(self, dataset: str | None = None, limit: int = 2000, seed: int = 0) -> None:
        self.pairs = stored_pairs(dataset)
        self.limit, self.seed = limit, seed
        self.views: dict[Pair, View] = {}
        self.chosen: list[int] = []
        self.page = 0
        self._silent = False
        self._make_widgets()
        self.box = self._arrange()
        self._connect()
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
        self.method = dropdown("maps", METHODS)
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

    def _arrange(self) -> widgets.VBox:
        strip = widgets.HBox(
            [widgets.VBox(pair) for pair in self.thumbnails], layout=widgets.Layout(flex_flow="row wrap")
        )
        wrap = widgets.Layout(flex_flow="row wrap")
        return widgets.VBox(
            [
                widgets.HBox([self.dataset, self.networks, self.technique], layout=wrap),
                widgets.HBox(
                    [self.pick, self.of_class, self.previous, self.next, self.random, self.uploader], layout=wrap
                ),
                strip,
                widgets.HBox([self.method, self.stage, self.opacity, self.keep, self.reference], layout=wrap),
                self.picture,
                widgets.HBox([self.export, self.status, self.link], layout=wrap),
                self.table,
            ]
        )

    def _connect(self) -> None:
        """Call the methods that the widgets stand for."""
        self.dataset.observe(self._guard(self._open_dataset), "value")
        self.networks.observe(self._guard(self._open_networks), "value")
        self.technique.observe(self._guard(self._open_pair), "value")
        for widget in (self.pick, self.of_class):
            widget.observe(self._guard(self._choose), "value")
        for widget in (self.method, self.stage, self.opacity, self.keep, self.reference):
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
        """A handler for an event: errors are shown in the app, and changes made by the app itself start nothing."""

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
        knobs = (self.stage, self.opacity, self.keep, self.reference, self.method)
        return Settings(self.image, *(knob.value for knob in knobs))

    def _options(self, widget: Any, options: Any, value: Any = None) -> None:
        """Set options, and ``value`` or the old value if it is still among them, without an event."""
        value = value or widget.value
        with self._silently():
            widget.options = options
            widget.value = value if value in options else options[0]

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Changes of widgets inside the block start no event."""
        self._silent = True
        try:
            yield
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
        view.warm_up()
        self._write_table()
        self.status.value = self._describe()

    def _choose(self) -> None:
        """Choose the images that the widgets describe; if there is none, raise an error and keep the old ones."""
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
            with self._silently():
                self.uploader.value = ()  # so that the same file may come again
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
        """Write the scores at every stage, with the stage of the slider marked."""
        view = self.view
        columns = [*view.stages, ANSWER]
        head = "".join(f"<th style='padding:2px 12px'>{s}</th>" for s in columns)
        body = ""
        for name, table in view.scores.items():
            cells = "".join(
                f"<td style='padding:2px 12px;{'background:#fff3d6' if s == self.stage.value else ''}'>"
                f"{score_cell(table.loc[s]).replace(chr(10), ' ') if s in table.index else ''}</td>"
                for s in columns
            )
            body += f"<tr><th style='text-align:left'>{name}</th>{cells}</tr>"
        self.table.value = (
            f"<table style='font-size:12px;line-height:1.5'><tr><th></th>{head}</tr>{body}</table>"
            "<small>Means over 4 class-balanced batches of test images, 95 % intervals, p by permutation.</small>"
        )

    def _export(self) -> None:
        """Write the view and its settings to files, and offer them as links to a browser on another machine."""
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
    """Show the explorer, or why it cannot be shown; arguments as for :class:`Explorer`."""
    try:
        Explorer(dataset, limit, seed).show()
    except (DataError, ValueError) as error:
        display(widgets.HTML(f"<b>The explorer has nothing to show:</b> {html.escape(str(error))}"))


def _png(image: Tensor) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
    return content.getvalue()
