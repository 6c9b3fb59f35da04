"""Units of a report that detect something new, on a probe whose answer is known."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image

import kdx
from kdx.pages import own_detectors as module
from tests.probes import Given, as_given, make_probe

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = {"cat": (0, 0), "dog": (3, 3), "head": (1, 2)}


@pytest.fixture(scope="module")
def found():
    """Networks whose units are masks of concepts, on 20 images that show all of them."""
    masks = torch.zeros(20, 2, 4, 4, dtype=torch.int16)
    masks[:, 0, 0, 0], masks[:, 0, 3, 3], masks[:, 1, 1, 2] = 1, 2, 3
    probe = make_probe(masks, {"object": ("cat", "dog"), "part": ("head",)})
    units = {
        "student": ["cat", "dog", "dog", "head"],
        "base": ["cat", "cat", "cat", "cat"],
        "second base": ["cat", "cat", "dog", "cat"],
    }
    dissected = {}
    for role, concepts in units.items():
        table = torch.zeros(20, 4, 4, 4)
        for unit, name in enumerate(concepts):
            table[(slice(None), unit, *PLACES[name])] = 1
        network = Given(table)
        dissected[role] = kdx.dissect(
            network, probe, quantile=0.1, iou=0.5, normalize=as_given, layers=network.layers, permutations=2
        )
    return dissected


def test_units_of_concepts_that_the_base_lacks_are_new(found):
    table = module.new_detectors(found, 0).set_index(["network", "count"])
    assert table["value"].to_dict() == pytest.approx(
        {
            ("student", "total"): 1.0,
            ("student", "beyond"): 0.75,
            ("base", "total"): 1.0,
            ("second base", "total"): 1.0,
            ("second base", "beyond"): 0.25,
        }
    )
    assert (table["n"] == 20).all()
    assert table["by chance"].notna().tolist() == [True, False, True, True, False]
    new, floor = (module.new_at_deepest(table.reset_index(), role) for role in ("student", "second base"))
    assert (new.mean, floor.mean, new.n) == (pytest.approx(0.75), pytest.approx(0.25), 20)
    assert module.new_at_deepest(table.reset_index(), "second student") is None
    assert module.facts(found) == {"name": "own", "images": 20, "concepts": 3, "quantile": 0.1, "iou": 0.5}


def test_new_concepts_are_named_with_the_floor(found):
    table = module.new_concepts(found)
    assert table[["concept", "student", "second base"]].values.tolist() == [["dog", 2, 1], ["head", 1, 0]]
    assert table["images"].tolist() == [20, 20]
    assert table["unit"].tolist() == [1, 3]
    same = module.new_concepts({"student": found["base"], "base": found["base"]})
    assert same.empty
    assert list(same.columns) == ["stage", "concept", "category", "images", "unit", "iou", "student"]


def test_networks_see_images_as_their_input():
    """Each network gets the normalisation of its role."""
    seen = {}

    roles = ("student", "base")
    networks = {role: kdx.build("resnet10", 3, "small", 0.125, seed=i).eval() for i, role in enumerate(roles)}

    def inputs(role, images):
        seen[role] = seen.get(role, 0) + len(images)
        return images.float() / (255 if role == "student" else 128)

    pair = SimpleNamespace(own=SimpleNamespace(shown=roles, networks=networks), inputs=inputs)
    probe = module.read_probe("planted", 20)
    layers = {role: {"L1": "layer1.0"} for role in roles}
    found = module.dissect_roles(pair, layers, probe, 0.02, 0.05, 0)
    assert list(found) == ["student", "base"]
    assert min(seen.values()) >= 20
    expected = kdx.dissect(
        networks["base"], probe, quantile=0.02, normalize=lambda x: x.float() / 128, layers=layers["base"],
        permutations=module.EXCHANGES,
    )  # fmt: skip
    pd.testing.assert_frame_equal(found["base"].units, expected.units)


def test_a_bad_probe_is_named_when_it_is_read(tmp_path):
    with pytest.raises(ValueError, match="unknown probe 'nowhere'"):
        module.read_probe("nowhere", 100)
    with pytest.raises(ValueError, match="probed: expected 20 images or more, got 5"):
        module.read_probe("planted", 5)
    tables = {
        "category": "name,first,last,count,frequency\nobject,1,1,1,1\n",
        "label": "number,name,category,frequency,coverage,syns\n1,cat,object,1,0.1,\n",
        "c_object": "code,number,name,frequency,coverage\n1,1,cat,1,0.1\n",
        "index": "image,split,ih,iw,sh,sw,object\n" + "".join(f"{i}.png,train,4,4,4,4,1\n" for i in range(20)),
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text)
    with pytest.raises(ValueError, match=r"expected images and masks that can be read; .*0\.png"):
        module.read_probe(str(tmp_path), 100)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "0.png")
    assert len(module.read_probe(str(tmp_path), 100)) == 20
    (tmp_path / "index.csv").write_text("\n".join(tables["index"].splitlines()[:9]))
    with pytest.raises(ValueError, match="probe: expected 20 images or more, got 8"):
        module.read_probe(str(tmp_path), 100)
