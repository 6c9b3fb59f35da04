import pandas as pd
import pytest
import torch

import kdx
from tests.networks import Small

pytestmark = pytest.mark.usefixtures("one_thread")


CLASSES = 4


def data(n=120, size=16, seed=0):
    """Noise images, brighter by class in one channel; labels; embeddings."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = torch.randn(n, 3, size, size, generator=generator)
    images[:, 0] += labels[:, None, None]
    return images, labels, torch.randn(CLASSES, 5, generator=generator)


SMALL = {"batches": 3, "batch_size": 20, "permutations": 39}


def features(model, images, stage):
    return kdx.activations(model, images, kdx.stages(model, images))[stage].flatten(1).numpy()


@pytest.mark.parametrize("features", ["raw", "grad_cam"])
def test_a_scorer_runs_each_network_once_and_changes_nothing_else(features, monkeypatch):
    student, base = Small(), Small(seed=1)
    images, labels, embeddings = data()
    alone = [
        kdx.fss(student, base, images, labels, features=features, **SMALL),
        kdx.rs(student, images, labels, embeddings, features=features, **SMALL),
        kdx.rs(base, images, labels, embeddings, features=features, **SMALL),
        kdx.rs(base, images, labels, torch.eye(CLASSES) + embeddings[:, :4], features=features, **SMALL),
        kdx.unique_rs(student, base, images, labels, embeddings, **SMALL),
    ]
    calls = []
    scorer = kdx.Scorer({"student": student, "base": base}, images, labels, **SMALL)
    distances = scorer._distances
    monkeypatch.setattr(scorer, "_distances", lambda network, *a: (calls.append(network), distances(network, *a))[1])
    together = [
        scorer.fss("student", "base", features),
        scorer.rs("student", embeddings, features),
        scorer.rs("base", embeddings, features),
        scorer.rs("base", torch.eye(CLASSES) + embeddings[:, :4], features),
        scorer.unique_rs("student", "base", embeddings),
    ]
    scorer.cka("student", "base")
    for one, other in zip(together, alone, strict=True):
        pd.testing.assert_frame_equal(one, other)
    kinds = 1 if features == "raw" else 2  # unique_rs is of raw features
    assert calls.count("student") == calls.count("base") == kinds * SMALL["batches"]


def test_a_scorer_names_its_networks():
    images, labels, embeddings = data()
    scorer = kdx.Scorer({("base", 1): Small()}, images, labels, **SMALL)
    assert scorer.rs(("base", 1), embeddings).shape == (3, 12)
    with pytest.raises(ValueError, match=r"unknown network 'base'; choose from: \('base', 1\)"):
        scorer.rs("base", embeddings)
    with pytest.raises(ValueError, match="embeddings: expected with features 'unicam' only, got none"):
        scorer.fss(("base", 1), ("base", 1), "unicam")


def test_labels_may_be_of_any_integer_type():
    images, labels, embeddings = data()
    expected = kdx.rs(Small(), images, labels, embeddings, **SMALL)
    pd.testing.assert_frame_equal(expected, kdx.rs(Small(), images, labels.to(torch.uint8), embeddings, **SMALL))
    with pytest.raises(ValueError, match=r"labels: expected class indices \(n,\), got torch.float32 \(120,\)"):
        kdx.rs(Small(), images, labels.float(), embeddings, **SMALL)
