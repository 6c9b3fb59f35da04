"""Folders of images: what is used, what is refused, and the cache that it is decoded into."""

import errno
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kdx
from kdx.data.dataset import folders, plantvillage
from kdx.data.registry import DATASETS
from kdx.data.dataset import available, load_dataset, prepare
from kdx.data.folders import Layout
from kdx.paths import DataError
from kdx.data.sources import adopt


def picture(seed, size=(40, 32), mode="RGB"):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def fill(root, classes=("one", "two"), each=8, start=0, **settings):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            picture(1000 * c + i + start, **settings).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "photos", each=10)


def ready(root, size=32):
    return folders.prepare("photos", root, Layout(), size, root.parent / "prepared")


def reasons(prepared):
    bad = prepared.files[prepared.files["split"] == ""]
    return dict(zip(bad["file"], bad["note"], strict=True))


# --- what comes out ------------------------------------------------------------------------------


def test_prepare_keeps_the_middle_of_each_image(tmp_path):
    root = fill(tmp_path / "photos", size=(64, 32))
    prepared = ready(root)
    images, labels, masks = prepared.read("train")
    files = prepared.rows("train")["file"]
    assert masks is None
    assert images.shape == (len(files), 3, 32, 32)
    assert not files.is_monotonic_increasing  # the first images are not all of one class
    for image, label, file in zip(images, labels, files, strict=True):
        original = torch.from_numpy(np.array(Image.open(root / file))).permute(2, 0, 1)
        assert torch.equal(image, original[:, :, 16:48])  # the shorter side has the size already
        assert prepared.card["classes"][label] == Path(file).parent.name


def test_prepare_splits_each_class_by_a_fixed_seed_and_records_it(root, tmp_path):
    first, again = ready(root), folders.prepare("photos", root, Layout(), 32, tmp_path / "elsewhere")
    assert first.files.equals(again.files)
    assert first.card["counts"] == {"train": 14, "test": 6}
    assert first.card["split"] == "test share 0.3, seed 0"
    assert sorted(first.read("test")[1].tolist()) == [0, 0, 0, 1, 1, 1]
    pixels = first.read("train")[0].double() / 255
    assert first.card["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert first.card["std"] == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-4)


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_prepare_takes_the_splits_that_folders_name(tmp_path, held_out):
    fill(tmp_path / "photos" / "train", each=9)
    fill(tmp_path / "photos" / held_out, each=2, start=500)
    prepared = ready(tmp_path / "photos")
    assert prepared.card["counts"] == {"train": 18, "test": 4}
    assert prepared.card["split"] == "as the folders say"
    assert set(prepared.files.loc[prepared.files["split"] == "test", "file"].str.split("/").str[0]) == {held_out}


def test_prepare_joins_validation_and_training_images_where_there_are_test_images(tmp_path):
    for part, each in {"train": 9, "val": 3, "test": 2}.items():
        fill(tmp_path / "photos" / part, each=each, start=100 * each)
    assert ready(tmp_path / "photos").card["counts"] == {"train": 24, "test": 4}


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path / "photos", ("train", "bus"))
    assert ready(tmp_path / "photos").card["classes"] == ["bus", "train"]


def test_names_of_classes_stay_text(tmp_path):
    root = fill(tmp_path / "photos", ("0", "01", "1", "True", "NA", "null"))
    prepared = ready(root)
    assert prepared.card["classes"] == ["0", "01", "1", "NA", "True", "null"]
    assert sorted(prepared.read("train")[1].bincount().tolist()) == [5, 5, 5, 6, 6, 6]


@pytest.mark.parametrize("parts", [("Train", "Test"), ("training", "testing"), ("TRAIN", "valid")])
def test_parts_are_known_by_other_spellings(tmp_path, parts):
    for part, each in zip(parts, (9, 2), strict=True):
        fill(tmp_path / "photos" / part, each=each, start=10 * each)
    assert ready(tmp_path / "photos").card["counts"] == {"train": 18, "test": 4}


def test_prepare_by_many_at_once_decodes_once(root, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: ready(root), range(4)))
    assert len({one.folder for one in sets}) == 1
    assert len([path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]) == 1


def test_prepared_images_are_found_again_where_the_folder_has_moved(root, tmp_path):
    first = ready(root)
    moved = root.rename(tmp_path / "moved")
    assert folders.prepare("photos", moved, Layout(), 32, tmp_path / "prepared").folder == first.folder


def test_prepare_is_done_once_and_again_when_a_file_changes(root):
    first = ready(root)
    stamp = (first.folder / "images.bin").stat().st_mtime_ns
    assert ready(root).folder == first.folder
    assert (first.folder / "images.bin").stat().st_mtime_ns == stamp
    assert ready(root, size=16).folder != first.folder
    picture(77).save(root / "one" / "new.png")
    assert ready(root).folder != first.folder
    assert sum(ready(root).card["counts"].values()) == 21


# --- hostile content -----------------------------------------------------------------------------


def bomb(path, side=40_000):
    """A PNG of a few bytes that says it is `side` pixels wide and high."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    )


def strip(path):
    """A narrow picture that would be millions of pixels wide if its shorter side were enlarged."""
    Image.new("RGB", (1_000_000, 8), "red").save(path)


def test_hostile_content_is_refused_file_by_file(root, tmp_path):
    one = root / "one"
    (one / "text.jpg").write_text("not a picture")
    (root / "stray.png").write_bytes((one / "0.png").read_bytes())
    strip(one / "strip.png")
    (Path(os.fsdecode(os.fsencode(root) + b"/cl\xff"))).mkdir()
    for i in range(8):
        picture(900 + i).save(Path(os.fsdecode(os.fsencode(root) + b"/cl\xff")) / f"{i}.png")
    (one / "empty.jpg").touch()
    (one / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 50)
    bomb(one / "bomb.png")
    bomb(one / "big.png", 10_500)
    whole = tmp_path / "whole.jpg"
    picture(5, (200, 200)).save(whole)
    (one / "cut.jpg").write_bytes(whole.read_bytes()[:-4000])
    (tmp_path / "secret.png").write_bytes((one / "0.png").read_bytes())
    (one / "link.png").symlink_to(tmp_path / "secret.png")
    (one / "loop").symlink_to(root, target_is_directory=True)
    (one / "dangling.png").symlink_to(one / "nowhere.png")
    (root / "outside").symlink_to(tmp_path, target_is_directory=True)
    picture(6, (1, 1)).save(one / "dot.png")
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(one / "deep.png")
    (one / "postscript.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n")
    (one / "copy.png").write_bytes((one / "0.png").read_bytes())
    os.mkfifo(one / "pipe.jpg")
    (one / "ничего 🙈.jpg").write_text("")
    (Path(os.fsdecode(os.fsencode(one) + b"/bad\xff.jpg"))).write_text("")
    picture(77).save(one / "имя с пробелом 🐈.png")
    prepared = ready(root)
    assert prepared.card["classes"] == ["cl\\xff", "one", "two"]
    assert reasons(prepared) == {
        "stray.png": "not in the folder of a class",
        "one/Thumbs.db": "not an image",
        "one/bad\\xff.jpg": "empty file",
        "one/big.png": "more than 50,000,000 pixels: 10500 x 10500",
        "one/bomb.png": "far more than 50,000,000 pixels",
        "one/copy.png": "the same pixels as one/0.png",
        "one/cut.jpg": reasons(prepared)["one/cut.jpg"],
        "one/dangling.png": "no regular file",
        "one/deep.png": "more than 8 bits a channel (mode I;16)",
        "one/dot.png": "smaller than 8 pixels: 1 x 1",
        "one/empty.jpg": "empty file",
        "one/link.png": "a link out of the folder",
        "one/loop": "a link to a folder",
        "one/pipe.jpg": "no regular file",
        "one/postscript.jpg": "not an image",
        "one/text.jpg": "not an image",
        "one/ничего 🙈.jpg": "empty file",
        "outside/": "a link out of the folder",
    }
    assert "unreadable: image file is truncated" in reasons(prepared)["one/cut.jpg"]
    assert "one/имя с пробелом 🐈.png" in set(prepared.files.loc[prepared.files["split"] != "", "file"])
    assert sum(prepared.card["counts"].values()) == 30  # 8 of the new class, the strip, the photograph of a cat
    assert prepared.card["refused"] == 18


def test_other_colours_are_converted_and_noted(root):
    for mode, name in {
        "L": "grey.png",
        "P": "palette.png",
        "CMYK": "print.jpg",
        "RGBA": "alpha.png",
        "1": "ink.png",
    }.items():
        picture(50 + len(name), mode=mode).save(root / "two" / name)
    prepared = ready(root)
    noted = prepared.files[prepared.files["note"] != ""].set_index("file")["note"].to_dict()
    assert noted == {
        "two/alpha.png": "converted from RGBA, laid on white",
        "two/grey.png": "converted from L",
        "two/ink.png": "converted from 1",
        "two/palette.png": "converted from P",
        "two/print.jpg": "converted from CMYK",
    }
    assert reasons(prepared) == {}


def test_photographs_are_turned_upright(tmp_path):
    root = fill(tmp_path / "photos")
    plain = picture(99, (32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    plain.save(root / "one" / "turned.png", exif=exif)
    prepared = ready(root)
    split = prepared.files.set_index("file").loc["one/turned.png", "split"]
    images = prepared.read(split)[0]
    upright = torch.from_numpy(np.asarray(plain.transpose(Image.Transpose.ROTATE_270)).copy()).permute(2, 0, 1)
    assert any(torch.equal(image, upright) for image in images)


# --- what cannot be prepared -----------------------------------------------------------------------


def test_wrong_folders_are_clear_errors_and_leave_nothing(tmp_path):
    def check(message, make):
        root = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        make(root)
        with pytest.raises(DataError, match=message):
            folders.prepare("photos", next(root.glob("photos"), root), Layout(), 32, tmp_path / "prepared")

    check(r"expected images as <class>/<image>, found nothing in", lambda root: None)
    check(
        r"expected images as <class>/<image>, found 1.png, 2.png in",
        lambda root: [picture(i).save(root / f"{i}.png") for i in (1, 2)],
    )
    check(r"expected images of at least two classes, got one in", lambda root: fill(root, ("one",)))
    check(r"at least 8 readable images of each class, got 3 of few in", one_class_of_three_images)
    check(
        r"found both \(test, train; extra\) in", lambda root: [fill(root / part) for part in ("train", "test", "extra")]
    )
    check(r"photos/train is a link out of the folder", train_is_a_link)
    check(r"no readable image in .* \(2 refused, such as a/x.jpg: not an image; b/x.jpg", unreadable)
    check(r"train and test, got none of three \(test\) in", split_without_a_class)
    check(r"a channel of the training images .* is constant", grey_world)
    with pytest.raises(DataError, match="found no folder"):
        folders.prepare("photos", tmp_path / "nowhere", Layout(), 32, tmp_path / "prepared")
    with pytest.raises(ValueError, match="size: expected 16 to 1024 pixels, got 4000"):
        folders.prepare("photos", tmp_path, Layout(), 4000, tmp_path / "prepared")
    assert [path.name for path in (tmp_path / "prepared").iterdir() if path.suffix != ".lock"] == []


def unreadable(root):
    for name in ("a", "b"):
        (root / name).mkdir()
        (root / name / "x.jpg").write_text("x")


def parts_beside_a_class(root):
    for part in ("train", "test", "extra"):
        fill(root / part)


def train_is_a_link(root):
    fill(root / "elsewhere")
    fill(root / "photos" / "test", each=2)
    (root / "photos" / "train").symlink_to(root / "elsewhere", target_is_directory=True)


def one_class_of_three_images(root):
    fill(root)
    fill(root, ("few",), 3, start=5000)


def split_without_a_class(root):
    fill(root / "train", ("one", "two", "three"))
    fill(root / "test", ("one", "two"), each=2, start=300)


def grey_world(root):
    for c, name in enumerate(("a", "b")):
        (root / name).mkdir()
        for i in range(8):
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[:, :, 0] = 10 * i + c
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def test_a_full_disk_or_an_interruption_leaves_nothing_half_made(root, tmp_path, monkeypatch):
    def fail(error):
        def statistics(*args):
            raise error

        monkeypatch.setattr(folders, "_statistics", statistics)

    fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DataError, match=r"photos: the disk of .* is full; nothing was kept"):
        ready(root)
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        ready(root)
    assert [path.name for path in (tmp_path / "prepared").iterdir() if path.suffix != ".lock"] == []
    monkeypatch.undo()
    assert sum(ready(root).card["counts"].values()) == 20


def test_damaged_prepared_images_are_refused(root):
    prepared = ready(root)
    with (prepared.folder / "images.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"are damaged; delete that folder"):
        ready(root).read("train")
    (prepared.folder / "card.json").write_text("{")
    with pytest.raises(DataError, match=r"are damaged \(.*delete that folder"):
        ready(root)


# --- as a dataset ----------------------------------------------------------------------------------


def test_a_path_is_a_dataset_that_networks_train_on(root, home):
    train, test = (load_dataset(str(root), split, size=32) for split in ("train", "test"))
    assert (len(train), len(test)) == (14, 6)
    assert train.classes == ("one", "two")
    assert train.card.size == (3, 32, 32)
    assert train.card.normalize(train.images).mean().abs() < 0.01
    assert not train.masked.any()
    run = kdx.fit("resnet10", train, test, recipe=kdx.Recipe(epochs=1, batch_size=4), width=0.125, device="cpu")
    assert run.classes == ("one", "two")
    assert run.manifest["spec"]["input"]["size"] == [3, 32, 32]
    assert run.manifest["spec"]["recipe"]["augmentation"] == {"RandomHorizontalFlip": {}}
    assert [path.name for path in home.iterdir() if path.is_dir()] == ["prepared", "runs"]
    assert "one, two" in train.card._repr_markdown_()


def test_load_dataset_says_where_it_looked_for_a_folder(tmp_path):
    with pytest.raises(
        ValueError, match=r"choose from: cifar10, .*; or give the path of a folder .* none at .*/nowhere"
    ):
        load_dataset(str(tmp_path / "nowhere"))


def test_a_folder_of_ones_own_is_not_taken_for_a_registered_dataset(tmp_path, home):
    fill(tmp_path / "petimages")
    assert load_dataset(str(tmp_path / "petimages"), size=96).classes == ("one", "two")
    assert available("petimages") is None
    with pytest.raises(DataError, match="petimages is not on this machine"):
        load_dataset("petimages")


def test_a_place_without_the_data_is_passed_over(tmp_path, home, monkeypatch, caplog):
    (home / "raw" / "petimages").mkdir(parents=True)
    pets(tmp_path / "place" / "petimages")
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "place"))
    assert load_dataset("petimages", size=32).classes == ("cat", "dog")
    assert "petimages: passed over: expected images as PetImages/<class>/<image>" in caplog.text


def test_only_keeps_some_classes_in_the_order_asked_for(tmp_path):
    whole = load_dataset(str(fill(tmp_path / "photos", ("a", "b", "c"))), "train", size=32)
    part = whole.only(["c", "a"])
    assert part.classes == ("c", "a")
    assert part.labels.bincount().tolist() == [whole.labels.bincount()[2], whole.labels.bincount()[0]]
    assert torch.equal(part.images[part.labels == 1], whole.images[whole.labels == 0])
    with pytest.raises(ValueError, match="no classes d; choose from: a, b, c"):
        whole.only(["a", "d"])
    with pytest.raises(ValueError, match="at least two different classes"):
        whole.only(["a", "a"])


def pets(root, each=8):
    return fill(root / "PetImages", ("Cat", "Dog"), each)


def test_a_registered_dataset_is_found_in_kdx_data_or_says_how_to_get_it(tmp_path, home, monkeypatch):
    assert available("petimages") is None
    with pytest.raises(
        DataError, match=r"petimages is not on this machine at 96 px: get it with `kdx data get petimages`"
    ):
        load_dataset("petimages")
    pets(tmp_path / "place" / "petimages")
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "place"))
    assert available("petimages")
    assert load_dataset("petimages", size=32).classes == ("cat", "dog")
    monkeypatch.delenv("KDX_DATA")  # the files are gone, what was prepared is not
    assert len(load_dataset("petimages", "train", size=32)) == 11
    assert available("petimages") is None
    assert available("petimages", 32)
    pets(tmp_path / "other" / "petimages", each=9)
    monkeypatch.setenv("KDX_DATA", str(tmp_path / "other"))
    assert len(load_dataset("petimages", "train", size=32)) == 12
    monkeypatch.delenv("KDX_DATA")
    with pytest.raises(DataError, match="several prepared sets"):
        load_dataset("petimages", size=32)


def test_adopt_links_a_folder_and_unpacks_an_archive(tmp_path, home):
    folder = tmp_path / "mine"
    pets(folder)
    assert adopt("petimages", folder) == home / "raw" / "petimages"
    assert (home / "raw" / "petimages").is_symlink()
    assert sum(prepare("petimages", 32).card["counts"].values()) == 16
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for path in pets(tmp_path / "more", 9).rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path / "more"))
    adopt("petimages", tmp_path / "pets.zip")
    assert not (home / "raw" / "petimages").is_symlink()
    assert sum(prepare("petimages", 32).card["counts"].values()) == 18
    with pytest.raises(DataError, match="is there already; leave out --from to use it"):
        adopt("petimages", folder)
    assert len(list(folder.rglob("*.png"))) == 16  # the user's own files are untouched


def test_adopt_refuses_what_is_not_the_dataset(tmp_path, root, home):
    for origin, message in {
        root: "expected images as PetImages/<class>/<image> or <class>/<image>, found one/, two/ in",
        tmp_path / "nowhere": "expected a folder or an archive, found nothing at",
    }.items():
        with pytest.raises(DataError, match=message):
            adopt("petimages", origin)
    with pytest.raises(ValueError, match="only registered datasets of images in folders"):
        adopt("shapes", root)
    with pytest.raises(ValueError, match="shapes needs no preparation"):
        prepare("shapes")
    assert not (home / "raw" / "petimages").exists()


# --- PlantVillage ------------------------------------------------------------------------------------


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
    prepared = folders.prepare("plantvillage", source, DATASETS["plantvillage"].layout, 48, tmp_path / "prepared")
    notes = prepared.files.set_index("file")["note"]
    assert notes["color/Apple___healthy/6.JPG"] == "mask refused: not an image"
    assert notes["color/Apple___healthy/7.JPG"] == "mask refused: 96 x 20 pixels, the image 96 x 48"
    for split in ("train", "test"):
        images, _, masks = prepared.read(split)
        known = masks[:, 0, 0] != folders.UNKNOWN
        assert set(masks[~known].unique().tolist()) <= {folders.UNKNOWN}
        assert torch.equal(masks[known] == 1, images[known, 0] > 100)
    assert int(prepared.files["mask"].sum()) == 12


@pytest.mark.real_data
def test_real_photographs_are_prepared_and_the_bad_ones_named(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("KDX_HOME", str(tmp_path))
    pets = prepare("petimages")
    assert sum(pets.card["counts"].values()) == 1000
    assert {file.rpartition("PetImages/")[2]: note for file, note in reasons(pets).items()} == {
        "Cat/666.jpg": "empty file",
        "Dog/11702.jpg": "empty file",
    }
    leaves = load_dataset("plantvillage", "train"), load_dataset("plantvillage", "test")
    assert sum(map(len, leaves)) == 1050
    assert sum(int(part.masked.sum()) for part in leaves) == 280
    masks = leaves[1].masks[leaves[1].masked]
    assert 0.2 < (masks == 1).double().mean() < 0.8
    inside = torch.stack([leaves[1].images[leaves[1].masked][:, c][masks == 1].double().mean() for c in (0, 1, 2)])
    assert inside.argmax() == 1  # leaves are green
