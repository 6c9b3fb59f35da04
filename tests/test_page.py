"""The explorer inside a page: what it holds, and what each control does in a browser."""

import base64
import functools
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from urllib.parse import urlparse

import nbformat
import numpy as np
import pytest
import torch

import kdx
from kdx.distil.stored_pairs import stored_pairs
from kdx.explorer import page
from kdx.explorer.view import View
from tests.checkout import ROOT, asked_for, voila_errors

MOST = 4_000_000  # bytes of a page


@pytest.fixture(scope="module")
def views(trained_store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDX_HOME", str(trained_store))
        pairs = [stored_pairs("shapes", name)[0] for name in ("response", "attention")]
        return {pair.technique: View(pair, limit=100) for pair in pairs}


@pytest.fixture(scope="module")
def found(views):
    return page.payload(views, page.choose(views, 12), 32)


def numbers(text, kind=np.uint8):
    return np.frombuffer(base64.b64decode(text), kind)


def test_images_are_chosen_by_what_the_networks_make_of_them(views):
    first = next(iter(views.values()))
    rows = page.choose(views, 12)
    right = {role: answer == first.images.labels for role, answer in first.answers.items()}
    kinds = [(bool(right["student"][row]), bool(right["base"][row])) for row in rows]
    assert len(set(rows)) == len(rows)
    assert all(kinds.count(kind) <= 3 for kind in set(kinds))
    assert len(set(kinds)) >= 2


def test_stored_maps_are_those_of_the_package_to_a_255th_of_their_peak(views, found):
    rows = [image["row"] for image in found["images"]]
    maps, peaks = numbers(found["maps"]), numbers(found["peaks"], "<f4").reshape(-1, len(rows))
    view = views["attention"]
    exact = kdx.unexplained(view.reference(32), view.x[rows])
    cams = kdx.grad_cam(view.networks["base"], view.x[rows], view.images.labels[rows], view.layers["base"])
    for technique, method, kind, stage, expected in (
        ("attention", "unexplained", "distilled", "L2", exact.distilled["L2"]),
        ("attention", "unexplained, fused", "residual", "", exact.fused["residual"]),
        ("", "", "Grad-CAM of the base", "L3", cams["L3"]),
    ):
        (layer,) = [
            of for of in found["layers"] if (of["technique"], of["method"], of["kind"]) == (technique, method, kind)
        ]
        offset, row, height, width = layer["stages"][stage]
        got = maps[offset : offset + len(rows) * height * width].reshape(len(rows), height, width) / 255
        error = np.abs(got * peaks[row][:, None, None] - expected.numpy())
        assert (error <= 0.51 / 255 * peaks[row][:, None, None] + 1e-9).all()
    assert sum(np.prod(of[2:]) for layer in found["layers"] for of in layer["stages"].values()) * len(rows) == len(maps)


def test_pixels_and_answers_are_those_of_the_view(views, found):
    rows = [image["row"] for image in found["images"]]
    first = views["response"]
    pixels = numbers(found["pixels"]).reshape(len(rows), found["side"], found["side"], 3)
    assert np.array_equal(pixels, first.images.images[rows].permute(0, 2, 3, 1).numpy())
    assert [image["answers"]["base"] for image in found["images"]] == first.answers["base"][rows].tolist()
    probabilities = numbers(found["probabilities"]).reshape(3, len(rows), -1)
    assert np.abs(probabilities.sum(2, dtype=int) - 255).max() <= len(found["classes"])


def test_views_of_different_images_are_refused(views):
    other = SimpleNamespace(pair=views["response"].pair, images=views["response"].images[torch.arange(50)])
    with pytest.raises(ValueError, match="views: expected students of one base, over the same test images"):
        page.payload({"response": views["response"], "other": other}, [0, 1], 32)


def test_forty_images_of_cifar10_fit_into_the_page():
    """By their number: five kinds of three techniques at the sizes of the shipped networks, as base64."""
    each = sum(side**2 for side in (32, 16, 8, 4))
    of_technique = 2 * (1024 + 2 * each) + each
    shared = (1024 + 2 * each) + each
    assert 40 * (3 * of_technique + shared + 3 * 32**2) * 4 / 3 < MOST


@pytest.fixture(scope="module")
def site(found, tmp_path_factory):
    """The explorer in a page of its own: as a file, and from a server."""
    folder = tmp_path_factory.mktemp("explorer")
    body = page.html(found).data
    assert "://" not in body
    assert len(body) < MOST
    (folder / "page.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,"><title>t</title>{body}'
    )

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "file": (folder / "page.html").as_uri(),
        "server": f"http://127.0.0.1:{server.server_port}/page.html",
    }
    server.shutdown()


DRAWN = "return document.querySelector('.kdx-explorer .picture').toDataURL()"
CHOOSE = (
    "const e = document.querySelector(`[data-name=${arguments[0]}]`); e.value = arguments[1];"
    "e.dispatchEvent(new Event(e.type === 'range' ? 'input' : 'change')); return e.value"
)


@pytest.mark.browser
@pytest.mark.parametrize("origin", ["file", "server"])
def test_every_control_changes_what_is_drawn(browser, site, found, origin):
    browser.get_log("browser")
    asked_for(browser)
    browser.get("about:blank")
    browser.get(site[origin])
    first = browser.execute_script(DRAWN)  # before anything is chosen
    assert browser.execute_script(
        "const c = document.querySelector('.picture');"
        "return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    ) > 20  # fmt: skip
    seen = [first]
    changes = (
        ("technique", "attention"), ("method", "unexplained"), ("stage", "L2"), ("left", "Grad-CAM of the base"),
        ("right", "control"), ("method", "UniCAM"), ("divide", 20), ("opacity", 90),
    )  # fmt: skip
    for name, value in changes:
        assert browser.execute_script(CHOOSE, name, value) == str(value), name
        seen.append(browser.execute_script(DRAWN))
        assert seen[-1] not in seen[:-1], name
    browser.execute_script("document.querySelectorAll('.thumbs canvas')[2].click()")
    seen.append(browser.execute_script(DRAWN))
    assert seen[-1] not in seen[:-1]
    address = browser.execute_script("return location.href")
    assert "image=2&technique=attention" in address
    browser.get("about:blank")
    browser.get(address)  # the link leads to the same view
    assert browser.execute_script(DRAWN) == seen[-1]
    outcomes = {name: browser.execute_script(COUNT, "outcome", name) for name in page.PICKS}
    assert outcomes["all images"] == len(found["images"])
    right = [(i["answers"]["attention"] == i["label"], i["answers"]["base"] == i["label"]) for i in found["images"]]
    for name, keep in page.PICKS.items():
        expected = sum(bool(keep(*map(torch.tensor, pair))) for pair in right)
        assert outcomes[name] == (expected or len(right)), name
    asked = [url for url in asked_for(browser) if not url.startswith(("data:", "chrome", "about:"))]
    assert {urlparse(url).path.rpartition("/")[2] for url in asked} == {"page.html"}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


COUNT = CHOOSE.replace("return e.value", "return document.querySelectorAll('.thumbs canvas').length")


@pytest.mark.browser
def test_keys_choose_images_and_read_values(browser, site, found):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get("about:blank")
    browser.get(site["file"] + "#image=0&method=unexplained&stage=L4&left=distilled&right=distilled&divide=100")
    thumbs, picture = (browser.find_element(By.CSS_SELECTOR, of) for of in (".thumbs", ".picture"))
    thumbs.send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script("return document.querySelector('.kdx-explorer').explorer.state.image") == 1
    chosen = browser.find_elements(By.CSS_SELECTOR, ".thumbs [aria-selected=true]")
    assert [of.get_attribute("aria-label") for of in chosen] == [
        f"image 1, {found['classes'][found['images'][1]['label']]}"
    ]
    picture.send_keys(Keys.ARROW_RIGHT)
    told = browser.find_element(By.CSS_SELECTOR, "output").text
    column, row, share = (
        float(n) for n in re.search(r"column (\d+), row (\d+): .*, ([\d.]+) % of the map", told).groups()
    )
    (layer,) = [
        of
        for of in found["layers"]
        if (of["technique"], of["method"], of["kind"]) == ("response", "unexplained", "distilled")
    ]
    offset, _, height, width = layer["stages"]["L4"]
    side = found["side"]
    of_image = numbers(found["maps"]).astype(int)[offset + height * width :][: height * width].reshape(height, width)
    cell = of_image[int(row * height // side), int(column * width // side)]
    assert share == pytest.approx(100 * cell / of_image.sum(), abs=0.06)
    assert "distilled" in picture.get_attribute("aria-label")
    ActionChains(browser).move_to_element_with_offset(picture, 5, 5).perform()
    assert browser.find_element(By.CSS_SELECTOR, "output").text.startswith("column ")
    names = browser.execute_script(
        "return [...document.querySelectorAll('select, input, button')].map(e => e.labels?.length || e.textContent)"
    )
    assert all(names)  # every control has a name


@pytest.mark.browser
def test_a_bad_link_and_a_narrow_window_do_no_harm(browser, site):
    browser.get("about:blank")
    browser.get(site["file"] + "#image=999&stage=L9&technique=magic&opacity=-3")
    state = browser.execute_script("return document.querySelector('.kdx-explorer').explorer.state")
    assert (state["image"], state["technique"], state["opacity"]) == (0, "response", 55)
    metrics = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        widths = browser.execute_script("return [document.querySelector('.kdx-explorer').scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# --- as a widget ---------------------------------------------------------------------------------

NOTEBOOK = """import json
from pathlib import Path
from kdx.explorer import page
page.widget(json.loads(Path("payload.json").read_text()))"""


@pytest.fixture
def voila(found, tmp_path):
    """The address of an app that shows the explorer twice, as widgets of Voilà."""
    pytest.importorskip("anywidget")
    (tmp_path / "payload.json").write_text(json.dumps(found))
    cells = [nbformat.v4.new_code_cell(NOTEBOOK, id=name) for name in ("first", "second")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "app.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(ROOT / "book" / "_voila"), os.environ.get("JUPYTER_PATH", "")])
    command = [sys.executable, "-m", "voila", "--template", "kdx", "--no-browser", f"--port={port}", "app.ipynb"]
    with (tmp_path / "voila.log").open("w") as log:
        app = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"JUPYTER_PATH": paths}, stdout=log, stderr=log)
        yield f"http://127.0.0.1:{port}/"
        app.terminate()
        app.wait(120)


@pytest.mark.book
@pytest.mark.browser
def test_the_same_module_serves_voila_as_a_widget(browser, site, voila, found):
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get("about:blank")
    browser.get(site["file"])
    drawn = browser.execute_script(DRAWN)
    browser.get_log("browser")
    asked_for(browser)
    browser.set_page_load_timeout(100)  # of the kernel, which imports torch; then the page is asked for again
    wait = WebDriverWait(browser, 300, ignored_exceptions=[WebDriverException])
    wait.until(lambda driver: driver.get(voila) or driver.find_elements(By.CSS_SELECTOR, "#rendered_cells"))
    wait.until(lambda driver: len(driver.find_elements(By.CSS_SELECTOR, ".kdx-explorer .picture")) == 2)
    assert browser.execute_script(DRAWN) == drawn  # as in the page
    assert browser.execute_script(CHOOSE, "technique", "attention") == "attention"
    assert browser.execute_script(DRAWN) != drawn
    ids = browser.execute_script("return [...document.querySelectorAll('.thumbs canvas')].map(of => of.id)")
    assert len(set(ids)) == 2 * len(found["images"])
    asked = [url for url in asked_for(browser) if not url.startswith(("data:", "blob:", "chrome", "about:"))]
    assert {urlparse(url).netloc for url in asked} == {urlparse(voila).netloc}
    assert voila_errors(browser) == []
