import pytest
import torch

from kdx.data.batches import balanced_batches, class_indices, in_turns, rank_in_class, scorable


def test_class_indices_may_be_of_any_integer_type():
    found = class_indices(torch.tensor([2, 0], dtype=torch.uint8))
    assert (found.dtype, found.tolist()) == (torch.int64, [2, 0])
    for labels in (torch.rand(3), torch.ones(3, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"labels: expected class indices \(n,\), got torch"):
            class_indices(labels)


def test_rows_are_ranked_within_their_class_and_taken_in_turns():
    labels = torch.tensor([7, 2, 2, 7, 2])
    assert rank_in_class(labels).tolist() == [1, 1, 2, 2, 3]
    assert in_turns(labels).tolist() == [1, 0, 2, 3, 4]
    assert in_turns(labels[:0]).tolist() == []


@pytest.mark.parametrize(
    ("labels", "batches", "batch_size", "message"),
    [
        (torch.rand(20), 2, 5, "labels: expected class indices"),
        (torch.zeros(20, dtype=torch.long), 2, 5, "labels: expected images of at least two classes, got 20 of one"),
        (torch.arange(20) % 2, 1, 5, "batches, batch_size: expected at least 2 batches of at least 5 images, got 1 of"),
        (torch.arange(20) % 2, 3, 7, "need more images than 10 of the smallest of 2 classes; lower batches"),
    ],
)
def test_batches_that_cannot_be_balanced_are_refused(labels, batches, batch_size, message):
    with pytest.raises(ValueError, match=message):
        balanced_batches(labels, batches, batch_size)


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
