import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import kdx
from kdx.data import shapes
from kdx.measure import similarity
from kdx.measure.similarity import (
    HIERARCHIES,
    alike_parts,
    alike_ratio,
    categories_of,
    class_entropies,
    class_plane,
    penultimate,
    wrong_rank_correlation,
)

from .networks import Small

CATEGORIES = torch.tensor([0, 0, 0, 1, 1, 2, -1])


def entropy(p):
    return -sum(v * math.log(v) for v in p if v > 0)


def softmax(z):
    e = [math.exp(v) for v in z]
    return [v / sum(e) for v in e]


def test_class_entropies_by_hand():
    z = [2.0, 1.0, -0.5, 0.3, 0.0, -2.0, 0.7]
    found = class_entropies(torch.tensor([z] * 4), torch.tensor([0, 3, 5, 6]), CATEGORIES)
    assert found.columns.tolist() == ["entire", "within T=1", "within T=4", "wrong", "logit"]
    first, second, third, fourth = found.to_dict("records")
    assert first["entire"] == pytest.approx(entropy(softmax(z)) / math.log(7))
    assert first["within T=1"] == pytest.approx(entropy(softmax(z[:3])) / math.log(3))
    assert first["within T=4"] == pytest.approx(entropy(softmax([v / 4 for v in z[:3]])) / math.log(3))
    assert first["wrong"] == pytest.approx(entropy(softmax(z[1:3])) / math.log(2))
    assert first["logit"] == pytest.approx(entropy([2 / 3, 1 / 3]) / math.log(3))
    assert second["within T=1"] == pytest.approx(entropy(softmax(z[3:5])) / math.log(2))
    assert math.isnan(second["wrong"])  # one wrong class alone
    assert second["logit"] == 0  # all on one class
    for one in (third, fourth):  # a category of one class, and a class without a category
        assert one["entire"] == first["entire"]
        assert all(math.isnan(one[name]) for name in ("within T=1", "within T=4", "wrong", "logit"))


def test_class_entropies_of_even_and_certain_answers():
    labels = torch.tensor([0, 1])
    even = class_entropies(torch.ones(2, 7), labels, CATEGORIES)
    assert np.allclose(even, 1)
    certain = class_entropies(torch.tensor([[1e4, 0, 0, 0, 0, 0, 0]] * 2), labels, CATEGORIES)
    assert np.allclose(certain.drop(columns="wrong"), 0)
    assert certain["wrong"].tolist() == [1.0, 0.0]
    negative = class_entropies(-torch.ones(2, 7), labels, CATEGORIES)
    assert negative["logit"].isna().all()


def test_class_entropies_names_bad_input():
    good = (torch.rand(3, 7), torch.tensor([0, 1, 2]), CATEGORIES)
    for message, change in {
        "categories: expected (7,), got (6,)": {2: CATEGORIES[:6]},
        "expected logits (n, classes) and n labels": {1: torch.tensor([0, 1, 7])},
        "got (2, 7) and (3,) from 0 to 2": {0: torch.rand(2, 7)},
        "logits: expected finite values, got NaN or infinity in 1 of 3 rows, the first being 1": {
            0: torch.tensor([[0.0] * 7, [math.nan] + [0.0] * 6, [0.0] * 7])
        },
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            class_entropies(*[change.get(i, of) for i, of in enumerate(good)])
    with pytest.raises(ValueError, match="temperatures: expected values above 0, got"):
        class_entropies(*good, temperatures=(0.0,))


def test_wrong_rank_correlation_is_spearmans():
    student, teacher = torch.randn(6, 5), torch.randn(6, 5).round()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    found = wrong_rank_correlation(student, teacher, labels)
    for i, label in enumerate(labels.tolist()):
        rest = [c for c in range(5) if c != label]
        assert found[i].item() == pytest.approx(stats.spearmanr(student[i, rest], teacher[i, rest]).statistic)
    assert torch.allclose(wrong_rank_correlation(student, student**3, labels), torch.ones(6, dtype=torch.float64))
    assert wrong_rank_correlation(torch.ones(6, 5), teacher, labels).isnan().all()
    with pytest.raises(ValueError, match="of the same images and of three classes or more"):
        wrong_rank_correlation(student, teacher[:, :4], labels)
    unknown = student.clone()
    unknown[4:] = math.nan
    for pair in ((unknown, teacher), (teacher, unknown)):
        with pytest.raises(ValueError, match="in 2 of 6 rows, the first being 4; check the network"):
            wrong_rank_correlation(*pair, labels)


def test_penultimate_features_and_templates_give_the_logits():
    network = kdx.build("resnet10", 5, "small", 0.125, seed=0).eval()
    images = torch.rand(3, 3, 32, 32)
    features, templates = penultimate(network, images)
    with torch.no_grad():
        torch.testing.assert_close(features @ templates.T + network.fc.bias, network(images))
    assert not features.requires_grad
    with pytest.raises(ValueError, match="Small: expected a network that ends in a Linear layer, found none"):
        penultimate(Small(), images)
    with pytest.raises(ValueError, match=re.escape("expected features (n, d) of 3 images, got (3, 3, 32, 32)")):
        penultimate(nn.Sequential(nn.Linear(32, 2), nn.Flatten()), images)


def test_penultimate_runs_in_chunks(monkeypatch):
    network = kdx.build("resnet10", 5, "small", 0.125, seed=0)
    images = torch.rand(5, 3, 32, 32)
    whole, _ = penultimate(network, images)
    monkeypatch.setattr(similarity, "CHUNK", 2)
    torch.testing.assert_close(penultimate(network, images)[0], whole)


def test_class_plane_by_hand():
    templates = torch.tensor([[1.0, 0, 0, 0], [4, 0, 0, 0], [1, 2, 0, 0], [9, 9, 9, 9]])
    features = torch.tensor([[1.0, 0, 5, 5], [2, 3, -1, 0], [7, 7, 7, 7], [0, -1, 0, 0]])
    plane = class_plane(features, torch.tensor([0, 2, 3, 1]), templates, (0, 1, 2))
    torch.testing.assert_close(plane.templates, torch.tensor([[0, 0], [3, 0], [0, 2]], dtype=torch.float64))
    torch.testing.assert_close(plane.points, torch.tensor([[0, 0], [1, 3], [-1, -1]], dtype=torch.float64))
    assert plane.labels.tolist() == [0, 2, 1]


def test_class_plane_keeps_distances_on_it():
    templates = torch.randn(5, 8)
    plane = class_plane(templates, torch.arange(5), templates, (4, 1, 2))
    torch.testing.assert_close(torch.pdist(plane.templates), torch.pdist(templates[[4, 1, 2]].double()))
    assert plane.templates[1, 0] > 0
    assert plane.templates[2, 1] > 0
    torch.testing.assert_close(plane.points[plane.labels.argsort()], plane.templates)


def test_class_plane_names_bad_input():
    templates, labels = torch.randn(4, 6), torch.tensor([0, 1, 2])
    for classes in ((0, 1), (0, 1, 1), (0, 1, 4)):
        with pytest.raises(ValueError, match="classes: expected three different ones of 4"):
            class_plane(torch.randn(3, 6), labels, templates, classes)
    with pytest.raises(ValueError, match=re.escape("features: expected (3, 6), a row for each label")):
        class_plane(torch.randn(3, 5), labels, templates, (0, 1, 2))
    for wrong, got in ((torch.tensor([0, 1, 4]), "0 to 4"), (torch.tensor([-1, 1, 2]), "-1 to 2")):
        with pytest.raises(ValueError, match=f"labels: expected 0 to 3, the classes of the templates, got {got}"):
            class_plane(torch.randn(3, 6), wrong, templates, (0, 1, 2))
    on_a_line = torch.arange(4.0)[:, None] * torch.ones(6)
    with pytest.raises(ValueError, match=r"templates: expected those of \[0, 1, 2\] to span a plane"):
        class_plane(torch.randn(3, 6), labels, on_a_line, (0, 1, 2))


def test_alike_ratio():
    centres = torch.tensor([[0.0, 0], [0, 1], [10, 0], [10, 1], [50, 50]])
    categories = torch.tensor([0, 0, 1, 1, -1])
    labels = torch.arange(5).repeat(20)
    exact = alike_ratio(centres[labels], labels, categories, resamples=10)
    expected = 1 / ((10 + math.sqrt(101)) / 2)
    assert exact.mean == pytest.approx(expected)
    assert (exact.low, exact.high) == (pytest.approx(expected), pytest.approx(expected))
    assert exact.n == 80
    noise = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    noisy = alike_ratio(centres[labels] + noise, labels, categories)
    assert noisy.low < noisy.mean < noisy.high
    assert noisy.low < expected < noisy.high
    with pytest.raises(ValueError, match=r"two images or more of each class with a category, got fewer of \[3\]"):
        alike_ratio(centres[:3].repeat(2, 1), torch.arange(3).repeat(2), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"two alike classes and one that is not, got \[0, 1, 2, 3\]"):
        alike_ratio(centres[labels], labels, torch.tensor([0, 1, 2, 3, -1]))


def test_the_interval_of_alike_ratio_is_the_basic_one():
    labels, rng = torch.arange(3).repeat(30), np.random.default_rng(5)
    centres = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 4, 0]])
    features = (centres[labels] + torch.randn(90, 3, generator=torch.Generator().manual_seed(0))).double()
    members = [features[labels == c].numpy() for c in range(3)]
    drawn = [[of[np.repeat(np.arange(30), times)] for times in rng.multinomial(30, np.full(30, 1 / 30), 200)]
             for of in members]  # fmt: skip

    def ratio(classes, taken_off=1.0):
        def distance(a, b):
            square = ((a.mean(0) - b.mean(0)) ** 2).sum()
            return math.sqrt(square - taken_off * (a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()) / 30)

        a, b, c = classes
        return 2 * distance(a, b) / (distance(a, c) + distance(b, c))

    low, high = np.quantile([ratio(classes) for classes in zip(*drawn, strict=True)], (0.025, 0.975))
    found = alike_ratio(features, labels, torch.tensor([0, 0, 1]), resamples=200, seed=5)
    assert found.mean == pytest.approx(ratio(members))
    assert found.low == pytest.approx(found.mean + ratio(members, 0) - high)
    assert found.high == pytest.approx(found.mean + ratio(members, 0) - low)


def test_the_ratio_does_not_grow_as_images_get_fewer():
    labels, generator = torch.arange(3).repeat(10), torch.Generator().manual_seed(0)
    centres = torch.cat([torch.tensor([[0.0, 0], [4, 0], [0, 8]]), torch.zeros(3, 30)], 1)
    truth = 4 / ((8 + math.sqrt(80)) / 2)
    for score in (lambda *given: alike_ratio(*given, resamples=2).mean, lambda *given: alike_parts(*given).mean()):
        found = [
            score(centres[labels] + torch.randn(30, 32, generator=generator), labels, torch.tensor([0, 0, 1]))
            for _ in range(40)
        ]
        assert np.mean(found) == pytest.approx(truth, abs=0.02)  # 0.06 more if errors of the means are not taken off


def test_classes_that_cannot_be_told_apart_have_no_ratio():
    labels, categories = torch.arange(3).repeat(10), torch.tensor([0, 0, 1])
    apart = torch.tensor([1.0, -1]).repeat(15)[:, None] * torch.ones(30, 4)  # equal means, and wide
    found = alike_ratio(apart, labels, categories, resamples=9)
    assert math.isnan(found.mean)
    assert math.isnan(found.low)
    assert np.isnan(alike_parts(apart, labels, categories, blocks=5)).all()


def test_alike_parts_are_the_ratio_and_vary_as_its_interval():
    categories = torch.tensor([0, 0, 1])
    labels = torch.arange(3).repeat(400)
    noise = torch.randn(1200, 2, generator=torch.Generator().manual_seed(0))
    features = torch.tensor([[0.0, 0], [0, 2], [10, 0]])[labels] + 3 * noise
    parts = alike_parts(features, labels, categories, blocks=20)
    whole = alike_ratio(features, labels, categories)
    assert parts.mean() == pytest.approx(whole.mean, rel=0.02)
    half = 2.09 * parts.std(ddof=1) / math.sqrt(20)
    assert 2 * half == pytest.approx(whole.high - whole.low, rel=0.4)
    exact = alike_parts(features - 3 * noise, labels, categories, blocks=5)
    assert exact == pytest.approx(np.full(5, 2 / ((10 + math.sqrt(104)) / 2)))
    assert np.array_equal(alike_parts(7 * features, labels, categories), alike_parts(7 * features, labels, categories))
    assert alike_parts(7 * features, labels, categories) == pytest.approx(alike_parts(features, labels, categories))
    with pytest.raises(ValueError, match="blocks: expected at least 2, got 1"):
        alike_parts(features, labels, categories, blocks=1)
    with pytest.raises(
        ValueError, match=r"features: expected 500 images or more of each class .* fewer of \[0, 1, 2\]"
    ):
        alike_parts(features, labels, categories, blocks=500)


@pytest.mark.parametrize("score", [alike_parts, alike_ratio])
def test_alike_needs_a_label_for_each_row(score):
    labels, categories = torch.arange(3).repeat(20), torch.tensor([0, 0, 1])
    for features in (torch.randn(59, 2), torch.randn(61, 2), torch.randn(60)):
        message = f"features: expected (60, d), a row for each label, got {tuple(features.shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            score(features, labels, categories)


def test_hierarchies_fit_their_classes():
    cifar10 = kdx.DATASETS["cifar10"].classes
    assert categories_of(cifar10, HIERARCHIES["cifar10"]).bincount().tolist() == [4, 6]
    assert (categories_of(cifar10, HIERARCHIES["cifar10 pairs"]) >= 0).sum() == 4
    assert categories_of(shapes.CLASSES, HIERARCHIES["shapes"]).bincount().tolist() == [3, 3, 3, 1]
    hundred = [name for names in HIERARCHIES["cifar100"].values() for name in names]
    assert len(set(hundred)) == 100
    assert {len(names) for names in HIERARCHIES["cifar100"].values()} == {5}
    with pytest.raises(ValueError, match="each once, got lion"):
        categories_of(["cat", "dog"], {"one": ["cat", "lion"]})
    with pytest.raises(ValueError, match="each once, got cat"):
        categories_of(["cat", "dog"], {"one": ["cat"], "two": ["cat"]})
