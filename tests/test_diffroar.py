from dataclasses import replace

import pytest
import torch
from torch import nn

import kdx
from kdx.distil.fit import Job
from kdx.intervals import mean_interval
from kdx.measure.diffroar import AT_ONCE, attributions, removed, retrained

FAST = {"model": "resnet10@0.0625", "recipe": kdx.Recipe(epochs=4, batch_size=32, lr=0.1, augmentation={})}


def halves(n, seed):
    """Noise, in which one of two squares is brighter; the class says which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = 80 + 60 * torch.rand(n, 3, 12, 12, generator=generator)
    for i in range(2):
        images[labels == i, :, 4:8, 1 + 6 * i : 5 + 6 * i] += 80
    card = replace(kdx.DATASETS["shapes"], classes=("left", "right"), size=(3, 12, 12), counts={})
    return kdx.Dataset(images.byte(), labels, card)


def linear():
    """The network of which it is known that its gradient is right: it looks at both squares and at nothing else."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 2))
    weight = torch.zeros(2, 3, 12, 12)
    weight[:, :, 4:8, 1:5] = torch.tensor([1.0, -1.0])[:, None, None, None]
    weight[:, :, 4:8, 7:11] = torch.tensor([-1.0, 1.0])[:, None, None, None]
    model[1].weight.data = weight.flatten(1)
    return model


def test_elements_removed_by_hand():
    maps = torch.tensor([[[3.0, 1.0], [2.0, 4.0]]])
    assert removed(maps, 0.5, highest=True).tolist() == [[[True, False], [False, True]]]
    assert removed(maps, 0.25, highest=False).tolist() == [[[False, True], [False, False]]]
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            removed(maps, wrong, highest=True)


def test_ends_are_complements_and_equal_values_are_removed_at_random():
    maps = torch.randint(3, (700, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    high, low = removed(maps, 0.25, True), removed(maps, 0.75, False)
    assert (high.flatten(1).sum(1) == 12).all()
    assert maps[high].min() >= 1  # a third of the values are 2
    assert (low.flatten(1).sum(1) == 36).all()
    often = removed(torch.ones(2000, 4, 4), 0.25, True).double().mean(0)
    assert (often - 0.25).abs().max() < 0.05
    assert not torch.equal(removed(maps, 0.25, True, seed=1), high)


@pytest.mark.parametrize("highest", [True, False])
def test_of_equal_values_the_first_in_a_random_order_are_removed(highest):
    maps = torch.randint(4, (600, 30), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(5)
    draws = [torch.rand(part.shape, generator=generator) for part in maps.split(AT_ONCE)]
    found = removed(maps, 0.3, highest, seed=5)
    for values, draw, gone in zip(maps.tolist(), torch.cat(draws).tolist(), found, strict=True):
        order = sorted(range(30), key=lambda i: (-values[i] if highest else values[i], draw[i]))
        assert gone.nonzero()[:, 0].tolist() == sorted(order[:9])
    mask = maps > 1
    assert torch.equal(removed(mask, 0.3, highest), removed(mask.float(), 0.3, highest))


def test_images_without_a_part_are_grey_there_and_masks_stand_alone(home):
    train, test = halves(64, 0), halves(20, 1)
    explain = lambda x, y: kdx.saliency(linear(), x, y).sum(1)  # noqa: E731
    maps = attributions(train, explain), attributions(test, explain)
    one = {"model": "resnet10@0.03125", "recipe": kdx.Recipe(epochs=0, batch_size=32), "fractions": [2 / 9]}
    seen = retrained(train, test, maps, ends=["highest", "mask alone"], **one)
    found = {end: images.images for _, end, _, images in seen}
    gone = maps[1][:, None].expand_as(test.images) > 0
    assert gone.double().mean().item() == pytest.approx(2 / 9)
    mean = round(train.images.double().mean().item())
    assert (found["highest"][gone] == mean).all()
    assert torch.equal(found["highest"][~gone], test.images[~gone])
    assert torch.equal(found["mask alone"] == 255, gone)


def test_a_right_gradient_is_above_zero_and_a_random_one_is_not(home, one_thread, monkeypatch):
    train, test = halves(160, 0), halves(200, 1)
    generator = torch.Generator().manual_seed(2)
    entries = {
        "linear": lambda x, y: kdx.saliency(linear(), x, y),
        "random": lambda x, y: torch.rand(x.shape, generator=generator),
    }
    found = {
        name: [kdx.diffroar(train, test, explain, fractions=[2 / 9], seed=s, **FAST)["value"].item() for s in range(3)]
        for name, explain in entries.items()
    }
    assert mean_interval(found["linear"]).low > 0
    assert mean_interval(found["random"]).low <= 0
    monkeypatch.setattr(Job, "run", lambda job: pytest.fail("it was trained before"))
    again = kdx.diffroar(train, test, entries["linear"], fractions=[2 / 9], **FAST)
    assert again["value"].tolist() == found["linear"][:1]


def test_a_mask_that_knows_the_class_leaks_it(home, one_thread):
    train, test = halves(160, 0), halves(200, 1)
    tell = lambda x, y: (y[:, None, None] == torch.arange(12)[None, None] // 6).expand(-1, 12, 12).float()  # noqa: E731
    table = kdx.diffroar(train, test, tell, fractions=[0.5], mask_alone=True, **FAST)
    assert list(table) == ["fraction", "highest", "lowest", "mask alone", "value"]
    assert table["mask alone"].item() > 0.95


@pytest.mark.parametrize("maps", [torch.rand(20, 6, 6), torch.full((20, 12, 12), float("nan"))])
def test_maps_that_do_not_fit_are_refused(maps):
    with pytest.raises(ValueError, match=r"expected finite maps \(20, 3, 12, 12\) or \(20, 12, 12\)"):
        attributions(halves(20, 1), lambda x, y: maps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": [0.5, 1.5]}, "that remove some of 432 elements, got 1.5"),
        ({"fractions": [0.001]}, "that remove some of 432 elements, got 0.001"),
        ({"recipe": kdx.Recipe(epochs=0)}, "recipe: expected an epoch or more"),
    ],
)
def test_settings_are_checked_before_anything_is_computed(settings, message):
    explain = lambda x, y: pytest.fail("it was computed")  # noqa: E731
    with pytest.raises(ValueError, match=message):
        kdx.diffroar(halves(20, 0), halves(20, 1), explain, **{**FAST, **settings})
