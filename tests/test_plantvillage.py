"""PlantVillage: names of classes, masks of leaves."""

import numpy as np
import torch
from PIL import Image

from kdx.data import plantvillage
from kdx.data.folders import UNKNOWN
from kdx.data.prepared import prepare_folder
from kdx.data.registry import DATASETS


def test_plantvillage_names_its_folders_in_both_layouts():
    known = {
        "Apple___Apple_scab": "Apple: Apple scab",
        "Cherry_(including_sour)___Powdery_mildew": "Cherry: Powdery mildew",
        "Cherry___Powdery_mildew": "Cherry: Powdery mildew",
        "Corn_(maize)___Common_rust_": "Corn: Common rust",
        "Corn_(maize)___Cercospora_leaf_spot Gray_leaf_spot": "Corn: Cercospora leaf spot Gray leaf spot",
        "Pepper,_bell___healthy": "Pepper, bell: healthy",
        "Grape___Esca_(Black_Measles)": "Grape: Esca (Black Measles)",
        "Tomato___Spider_mites Two-spotted_spider_mite": "Tomato: Spider mites Two-spotted spider mite",
        "Background_without_leaves": None,
        "Apple": None,
    }
    assert {folder: plantvillage.class_name(folder) for folder in known} == known
    assert len(set(plantvillage.CLASSES)) == 38


def test_leaf_masks_follow_their_image(tmp_path):
    """A white square on black is the leaf; the image is white there, too, so that both can be compared."""
    source = tmp_path / "plantvillage"
    for name in ("Apple___healthy", "Raspberry___healthy"):
        for kind in ("color", "segmented"):
            (source / kind / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((48, 96, 3), 4, np.uint8)  # dark as JPEG noise on black
            pixels[12:36, 30 + i : 60 + i] = 200
            pixels[0, 36] = i, name[0] == "A", 0  # no two are alike
            Image.fromarray(pixels).save(source / "color" / name / f"{i}.JPG", format="PNG")
            if i < 6:
                Image.fromarray(pixels).save(source / "segmented" / name / f"{i}_final_masked.jpg", format="PNG")
        (source / "segmented" / name / "6_final_masked.jpg").write_text("broken")
        Image.fromarray(pixels[:20]).save(source / "segmented" / name / "7_final_masked.jpg")
    prepared = prepare_folder("plantvillage", source, DATASETS["plantvillage"].layout, 48, tmp_path / "prepared")
    notes = prepared.files.set_index("file")["note"]
    assert notes["color/Apple___healthy/6.JPG"] == "mask refused: not an image"
    assert notes["color/Apple___healthy/7.JPG"] == "mask refused: 96 x 20 pixels, the image 96 x 48"
    for split in ("train", "test"):
        images, _, masks = prepared.read(split)
        known = masks[:, 0, 0] != UNKNOWN
        assert set(masks[~known].unique().tolist()) <= {UNKNOWN}
        assert torch.equal(masks[known] == 1, images[known, 0] > 100)
    assert int(prepared.files["mask"].sum()) == 12
