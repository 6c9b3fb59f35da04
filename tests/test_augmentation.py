import pytest
import torch
from torchvision.transforms import v2

from kdx.data.augmentation import augment


def test_augment_transforms_each_image_by_itself_and_keeps_type_and_size():
    images = torch.arange(8 * 3 * 4 * 5, dtype=torch.int32).view(8, 3, 4, 5).to(torch.uint8)
    out = augment(images, {"RandomHorizontalFlip": {}})
    kept = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert kept.any()
    assert mirrored.any()
    cropped = augment(images, {"RandomCrop": {"padding": 2, "padding_mode": "edge"}})  # to the images' own size
    assert cropped.shape == images.shape
    assert cropped.dtype == torch.uint8
    assert augment(images, {}) is images


def test_augment_is_drawn_by_the_global_seed():
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(augment(images, {"RandomHorizontalFlip": {}, "RandomResizedCrop": {"scale": [0.5, 1.0]}}))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ({"RandomFlip": {}}, "expected names from torchvision.transforms.v2, got 'RandomFlip'"),
        ({"functional": {}}, "expected names from torchvision.transforms.v2, got 'functional'"),
        ({"RandomCrop": {"pad": 4}}, r"RandomCrop does not take \{'pad': 4\}: .*unexpected keyword argument 'pad'"),
        ({"RandomHorizontalFlip": {"p": 2}}, "RandomHorizontalFlip does not take"),
    ],
)
def test_augment_names_what_it_does_not_know(augmentation, message):
    with pytest.raises(ValueError, match=message):
        augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), augmentation)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
def test_augment_crops_each_image_at_a_place_of_its_own(mode):
    torch.manual_seed(0)
    image = torch.randint(1, 256, (1, 3, 6, 7), dtype=torch.uint8)
    out = augment(image.repeat(400, 1, 1, 1), {"RandomCrop": {"padding": [1, 0], "padding_mode": mode}})
    padded = v2.functional.pad(image[0], [1, 0], padding_mode=mode)
    expected = [padded[:, :, left : left + 7] for left in range(3)]
    found = [(out == window).flatten(1).all(1) for window in expected]
    assert torch.stack(found).sum(0).eq(1).all()
    assert all(100 < window.sum() < 170 for window in found)  # a third each, 133 of 400


def test_augment_leaves_other_crops_to_torchvision():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    filled = augment(images, {"RandomCrop": {"padding": 8, "fill": 9}})
    assert set(filled.unique().tolist()) <= {0, 9}
    assert augment(images, {"RandomCrop": {"size": 5}}).shape == (4, 3, 5, 5)
