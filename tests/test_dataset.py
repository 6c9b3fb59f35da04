from dataclasses import replace

import pytest
import torch

import kdx
from kdx.data import shapes
from kdx.data.dataset import available, folds, load_dataset
from kdx.paths import DataError
from tests.photographs import fill


def test_load_dataset_names_the_choices():
    with pytest.raises(ValueError, match="unknown dataset 'svhn'; choose from: cifar10, mnist, shapes"):
        load_dataset("svhn")
    with pytest.raises(ValueError, match="unknown split 'val' of shapes; choose from: train, test"):
        load_dataset("shapes", "val")


def test_labels_may_be_of_any_integer_type():
    whole = load_dataset("shapes", "test")
    narrow = replace(whole, labels=whole.labels.to(torch.uint8))
    assert torch.equal(narrow.limit(20).labels, whole.limit(20).labels)
    assert narrow.only(whole.classes[2:4]).labels.unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"labels: expected class indices \(n,\), got torch.float32"):
        replace(whole, labels=whole.labels.float())


def test_limit_keeps_the_class_balance_and_is_drawn_by_the_seed():
    whole = load_dataset("shapes", "test")
    assert (len(whole), whole.labels.bincount().tolist()) == (1600, [160] * 10)
    part, again, other = whole.limit(200, 0), whole.limit(200, 0), whole.limit(200, 1)
    assert part.labels.bincount().tolist() == [20] * 10
    assert part.fingerprint == again.fingerprint != other.fingerprint
    assert part.masks.shape == (200, 64, 64)
    assert whole.limit(None) is whole
    assert whole.limit(1599).labels.bincount().sum() == 1599
    uneven = whole[torch.cat([(whole.labels == c).nonzero()[: 10 + 10 * c, 0] for c in range(10)])]
    assert uneven.limit(55).labels.bincount().tolist() == list(range(1, 11))
    with pytest.raises(TypeError, match=r"expected an index tensor \(m,\), got 3"):
        whole[3]
    for n in (9, 1601):
        with pytest.raises(ValueError, match="expected 10"):
            whole.limit(n)


def test_folds_partition_and_stratify():
    labels = torch.arange(60) % 3
    parts = folds(labels, 4, seed=1)
    held_out = torch.cat([rows for _, rows in parts])
    assert sorted(held_out.tolist()) == list(range(60))
    for train, rows in parts:
        assert not set(train.tolist()) & set(rows.tolist())
        assert labels[rows].bincount().tolist() == [5, 5, 5]
    for k in (1, 21):
        with pytest.raises(ValueError, match=f"expected 2 to 20 .* got {k}"):
            folds(labels, k)


def test_load_dataset_at_another_size_and_normalisation(monkeypatch):
    monkeypatch.setitem(shapes.COUNTS, "test", 100)  # takes less time to draw
    whole = load_dataset("shapes", limit=20)
    small = load_dataset("shapes", limit=20, size=32, normalisation=[[0.5] * 3, [0.25] * 3])
    assert small.images.shape == (20, 3, 32, 32)
    assert small.masks.shape == (20, 32, 32)
    assert set(small.masks.unique().tolist()) <= {0, 1, 2}
    assert small.card.size == (3, 32, 32)
    averaged = whole.images.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert (small.images - averaged).abs().mean() < 12  # of 255: the same pictures, smaller
    assert float(small.card.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))[0, 0, 0, 0]) == 2.0
    for wrong in ([[0.5], [0.2]], [[0.5] * 3, [0.0] * 3], [0.5, 0.2], [[0.5] * 3]):
        with pytest.raises(ValueError, match="normalisation: expected 3 means and 3 standard deviations > 0"):
            load_dataset("shapes", limit=20, normalisation=wrong)
    with pytest.raises(ValueError, match="size: expected 16 to 1024 pixels, got 8"):
        load_dataset("shapes", limit=20, size=8)


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "photos", each=10)


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
    assert {path.name for path in home.iterdir() if path.is_dir()} == {"prepared", "runs", "locks"}
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


def test_only_keeps_some_classes_in_the_order_asked_for(tmp_path):
    whole = load_dataset(str(fill(tmp_path / "photos", ("a", "b", "c"))), "train", size=32)
    part = whole.only(["c", "a"])
    assert part.classes == ("c", "a")
    assert part.labels.bincount().tolist() == [whole.labels.bincount()[2], whole.labels.bincount()[0]]
    assert torch.equal(part.images[part.labels == 1], whole.images[whole.labels == 0])
    with pytest.raises(ValueError, match="unknown classes d; choose from: a, b, c"):
        whole.only(["a", "d"])
    with pytest.raises(ValueError, match="classes: expected at least two different names"):
        whole.only(["a", "a"])
