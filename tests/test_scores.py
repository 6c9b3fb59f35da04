import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import kdx
from kdx import distance, permutation
from kdx.data.batches import balanced_batches
from kdx.intervals import mean_interval
from kdx.measure.scorer import DegenerateWarning
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


def test_rs_is_the_mean_over_batches(dcor):
    model = Small()
    images, labels, embeddings = data()
    table = kdx.rs(model, images, labels, embeddings, **SMALL).set_index("stage")
    batches = balanced_batches(labels, 3, 20)
    for stage in ("L1", "L2", "L3"):
        values = [
            dcor.u_distance_correlation_sqr(
                features(model, images[rows], stage).astype(float), embeddings[labels[rows]].double().numpy()
            )
            for rows in batches
        ]
        expected = mean_interval(values)
        assert table.loc[stage, ["value", "low", "high"]].tolist() == pytest.approx(list(expected)[:3], abs=1e-9)
    assert (table[["n", "batches", "permutations"]] == [20, 3, 39]).all(None)
    assert (table["p"] == 1 / 40).all()
    assert (table["floor"] == 1 / 40).all()


def test_fss_paper_is_biased_on_rows_of_unit_length(dcor):
    student, base = Small(), Small(seed=1)
    images, labels, _ = data()
    table = kdx.fss(student, base, images, labels, estimator="paper", **SMALL).set_index("stage")
    values = []
    for rows in balanced_batches(labels, 3, 20):
        x, y = (features(m, images[rows], "L2").astype(float) for m in (student, base))
        x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y))
        values.append(dcor.distance_correlation_sqr(x, y))
    assert table.loc["L2", "value"] == pytest.approx(np.mean(values), abs=1e-9)


def test_ties_in_several_batches_lower_the_floor_together():
    images, labels, _ = data(48)
    table = kdx.rs(Small(), images, labels % 2, torch.eye(2), batches=2, batch_size=6, permutations=999)
    assert table["floor"].tolist() == pytest.approx([1 / 20**2] * 3)  # 3! 3! / 6! in each batch


def test_labels_all_equally_far_apart_give_nan_with_a_warning():
    student, base = Small(), Small(seed=1)
    images, _, _ = data(48)
    labels, table = torch.arange(48) % 8, torch.eye(8)
    with pytest.warns(DegenerateWarning, match="labels are all equally far apart"):
        unique = kdx.unique_rs(student, base, images, labels, table, batches=2, batch_size=8, permutations=9)
    with pytest.warns(DegenerateWarning, match="labels are all equally far apart"):
        relevance = kdx.rs(student, images, labels, table, batches=2, batch_size=8, permutations=9)
    assert unique[["value", "p"]].isna().all(None)
    assert relevance[["value", "p"]].isna().all(None)


def test_fss_of_a_network_with_itself_is_one():
    model = Small()
    images, labels, embeddings = data()
    for chosen in ("raw", "grad_cam"):
        table = kdx.fss(model, model, images, labels, features=chosen, **SMALL)
        assert table["value"].tolist() == pytest.approx([1, 1, 1])
    assert (table["p"] == 1 / 40).all()
    circular = kdx.fss(
        Small(), Small(seed=1), images, labels, features="unicam", embeddings=embeddings, batches=2, batch_size=20
    )
    assert circular["p"].isna().all()
    assert circular["value"].notna().all()


def test_rs_paper_is_the_biased_statistic():
    images, labels, embeddings = data()
    arguments = (Small(), images, labels, embeddings)
    paper = kdx.rs(*arguments, estimator="paper", **SMALL)
    assert paper["value"].equals(kdx.rs(*arguments, estimator="biased", **SMALL)["value"])


def test_unique_rs_equals_the_statistics_of_each_batch(dcor):
    student, base = Small(), Small(seed=1)
    images, labels, embeddings = data()
    table = kdx.unique_rs(student, base, images, labels, embeddings, **SMALL)
    table = table.set_index(["direction", "statistic", "stage"])
    values = []
    for rows in balanced_batches(labels, 3, 20):
        x, y = (features(m, images[rows], "L3").astype(float) for m in (student, base))
        values.append(dcor.partial_distance_correlation(y, embeddings[labels[rows]].double().numpy(), x))
    assert table.loc[("residual", "partial", "L3"), "value"] == pytest.approx(np.mean(values), abs=1e-9)
    semipartial = [
        float(
            distance.semipartial_distance_correlation(
                *(torch.tensor(features(m, images[rows], "L3")) for m in (student,)),
                embeddings[labels[rows]],
                torch.tensor(features(base, images[rows], "L3")),
            )
        )
        for rows in balanced_batches(labels, 3, 20)
    ]
    found = table.loc[("distilled", "semipartial", "L3"), "value"]
    assert found == pytest.approx(np.mean(semipartial), abs=1e-9)


def test_two_classes_make_the_embedding_irrelevant():
    images, labels, _ = data()
    labels = labels % 2
    tables = [torch.randn(2, 5), torch.eye(2)]
    first, second = (kdx.rs(Small(), images, labels, table, **SMALL)["value"] for table in tables)
    assert first.tolist() == pytest.approx(second.tolist(), abs=1e-9)


@pytest.mark.parametrize("chosen", ["raw", "grad_cam"])
def test_p_is_uniform_for_untrained_networks_and_shuffled_labels(chosen):
    p = []
    for i in range(60):
        images, _, embeddings = data(48, 8, seed=i)
        labels = torch.randperm(48, generator=torch.Generator().manual_seed(i)) % CLASSES
        table = kdx.rs(
            Small(seed=i),
            images,
            labels,
            embeddings,
            features=chosen,
            batches=2,
            batch_size=24,
            permutations=199,
            seed=i,
        )
        p.append(table["p"].iloc[1])
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_p_of_unicam_features_shuffles_labels_before_the_maps_are_made():
    """With maps made once, p is small although nothing is related (the circle)."""
    honest, circular = [], []
    for i in range(12):
        generator = torch.Generator().manual_seed(i)
        images, embeddings = torch.randn(48, 3, 16, 16, generator=generator), torch.randn(4, 5, generator=generator)
        labels = torch.randperm(48, generator=generator) % CLASSES
        student, base = Small(seed=2 * i), Small(seed=2 * i + 1)
        settings, layers = {"batches": 2, "batch_size": 24, "seed": i}, {"L1": "a"}
        table = kdx.rs(
            student,
            images,
            labels,
            embeddings,
            features="unicam",
            other=base,
            permutations=19,
            layers=layers,
            layers_other=layers,
            **settings,
        )
        honest.append(table["p"].iloc[0])
        kept, drawn = [], []
        for b, rows in enumerate(balanced_batches(labels, 2, 24, i)):
            x, g = images[rows], embeddings[labels[rows]]
            maps = kdx.unicam(kdx.Reference(student, base, x), g).distilled["L1"]
            f = torch.tensor(features(student, kdx.perturb(x, maps, seed=i), "L1"))
            kept.append(distance.distance_correlation(f, g))
            orders = permutation.random_permutations(24, 19, b)
            drawn.append(torch.stack([distance.distance_correlation(f, g[o]) for o in orders]))
        assert table["value"].iloc[0] == pytest.approx(float(sum(kept) / 2), abs=1e-6)
        circular.append(permutation.permutation_p(float(sum(kept) / 2), sum(drawn) / 2))
    assert stats.kstest(honest, "uniform").pvalue > 0.01
    assert stats.kstest(circular, "uniform").pvalue < 0.01


def test_unicam_features_have_no_p_unless_asked_for():
    images, labels, embeddings = data()
    table = kdx.rs(
        Small(), images, labels, embeddings, features="unicam", other=Small(seed=1), batches=2, batch_size=20
    )
    assert table["p"].isna().all()
    assert table["value"].notna().all()
    assert (table["permutations"] == 0).all()


def test_features_without_variance_are_nan_with_a_warning():
    model = Small()
    nn.init.zeros_(model.b.weight)
    nn.init.ones_(model.b.bias)
    images, labels, embeddings = data()
    nn.init.dirac_(model.c.weight)  # and L3 passes L2 on
    with pytest.warns(DegenerateWarning, match="L[23]: the score is NaN, because in a batch features do not vary"):
        table = kdx.rs(model, images, labels, embeddings, **SMALL).set_index("stage")
    assert table.loc["L2", ["value", "low", "high", "p"]].isna().all()
    assert table.loc["L1"].notna().all()
    with pytest.warns(DegenerateWarning, match="L2"):
        unique = kdx.unique_rs(model, Small(seed=1), images, labels, embeddings, **SMALL)
    unique = unique.set_index(["direction", "stage"])
    assert unique.loc[("distilled", "L2"), "value"].isna().all()
    assert unique.loc[("residual", "L2"), "value"].notna().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features": "saliency"}, "choose from: raw, grad_cam, unicam"),
        ({"features": "unicam"}, "expects other=a network"),
        ({"other": Small()}, "expects other=None"),
        ({"estimator": "v"}, "choose from: unbiased, biased, paper"),
        ({"batches": 1}, "at least 2 batches of at least 5 images"),
        ({"batch_size": 100}, "lower batches or batch_size"),
        ({"permutations": -1}, r"expected 0 \(no p\) or more"),
        ({"labels": torch.zeros(120, dtype=torch.long)}, "120 of one class"),
        ({"labels": torch.arange(120) % 5}, "classes 0 to 3, one per row of embeddings, got 0 to 4"),
        ({"labels": torch.rand(120)}, r"expected class indices \(n,\)"),
        ({"labels": torch.arange(100) % 4}, "120 images and 100 labels"),
        ({"embeddings": torch.ones(4, 3)}, "those of all classes coincide"),
        ({"embeddings": torch.full((4, 3), math.nan)}, "expected finite"),
        ({"images": torch.full((120, 3, 16, 16), math.nan)}, "L1: .*NaN"),
    ],
)
def test_bad_input_is_named(change, says):
    images, labels, embeddings = data()
    arguments = {"images": images, "labels": labels, "embeddings": embeddings} | SMALL | change
    with pytest.raises(ValueError, match=says):
        kdx.rs(Small(), **arguments)


def test_fss_and_unique_rs_refuse_stages_that_differ():
    images, labels, embeddings = data()
    layers = {"L1": "a", "L2": "b"}
    with pytest.raises(ValueError, match="same stages in both networks"):
        kdx.fss(Small(), Small(seed=1), images, labels, layers_base=layers, **SMALL)
    with pytest.raises(ValueError, match="same stages in both networks"):
        kdx.unique_rs(Small(), Small(seed=1), images, labels, embeddings, layers_base=layers, **SMALL)
    with pytest.raises(ValueError, match="no valid permutation test"):
        kdx.fss(Small(), Small(), images, labels, features="unicam", embeddings=embeddings, **SMALL)


def test_cka_equals_the_unbiased_estimator_written_out():
    """HSIC₁ of Song et al. (2012), with its traces and sums as printed."""
    student, base = Small(), Small(seed=1)
    images, labels, _ = data()
    table = kdx.Scorer({"s": student, "b": base}, images, labels, **SMALL).cka("s", "b").set_index("stage")

    def hsic(k, m):
        n = len(k)
        k, m = (a - np.diag(np.diag(a)) for a in (k, m))
        whole = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
        return whole / (n * (n - 3))

    values = []
    for rows in balanced_batches(labels, 3, 20):
        x, y = (features(m, images[rows], "L3").astype(float) for m in (student, base))
        k, m = x @ x.T, y @ y.T
        values.append(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))
    assert table.loc["L3", "value"] == pytest.approx(np.mean(values), abs=1e-6)
    itself = kdx.Scorer({"s": student}, images, labels, **SMALL).cka("s", "s")
    assert itself["value"].tolist() == pytest.approx([1, 1, 1])
