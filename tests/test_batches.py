import pytest
import torch

from kdx.data.batches import balanced_batches, scorable


def test_scorable_takes_the_classes_that_fill_batches_best():
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 2)
    rows, size = scorable(labels, 4)
    assert (labels[rows].unique().tolist(), size) == ([0, 1], 10)
    rows, size = scorable(torch.arange(100) % 5, 2, most=16)
    assert (len(rows), size) == (100, 16)
    for few in (torch.zeros(40, dtype=torch.long), torch.arange(10) % 2):
        with pytest.raises(ValueError, match="too few images for 4 class-balanced batches"):
            scorable(few, 4)


@pytest.mark.parametrize("seed", range(20))
def test_batches_are_disjoint_and_balanced_to_one(seed):
    labels = torch.randint(10, (3000,), generator=torch.Generator().manual_seed(seed))
    found = balanced_batches(labels, 16, 128, seed)
    assert len(torch.cat(found).unique()) == 16 * 128
    for rows in found:
        counts = labels[rows].bincount(minlength=10)
        assert counts.max() - counts.min() <= 1


def test_balanced_batches_are_disjoint_and_balanced():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 25)
    batches = balanced_batches(labels, 3, 10, seed=1)
    rows = torch.cat(batches)
    assert len(rows.unique()) == 30
    for batch in batches:
        counts = labels[batch].bincount(minlength=3)
        assert counts.max() - counts.min() <= 1
    assert not batches[0].equal(balanced_batches(labels, 3, 10, seed=2)[0])
    assert batches[0].equal(balanced_batches(labels, 3, 10, seed=1)[0])
