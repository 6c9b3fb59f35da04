import html
import re

import pandas as pd
import pytest
import torch

from kdx.data.sst import load_sentences
from kdx.measure.ledger import Ledger
from kdx.networks.text_networks import save_text
from kdx.pages import text_report
from kdx.pages.text_report import explain_text, read_texts
from tests.texts import tiny

NAMES = ("very negative", "negative", "positive", "very positive")


@pytest.fixture
def given(tmp_path):
    """A student, a base and a table of sentences."""
    for seed, name in enumerate(("student", "base")):
        save_text(tmp_path / f"{name}.safetensors", tiny(seed), {"classes": NAMES})
    some = load_sentences("generated", "test", limit=24)
    texts, labels = [" ".join(w) for w in some.words], [NAMES[i] for i in some.labels]
    pd.DataFrame({"text": texts, "label": labels}).to_csv(tmp_path / "texts.csv", index=False)
    return {name: tmp_path / f"{name}.safetensors" for name in ("student", "base")}


@pytest.mark.usefixtures("closed_figures")
def test_report_counts_what_was_gained_and_lost(given, tmp_path):
    page = explain_text(given, tmp_path / "texts.csv", tmp_path / "out", "kdx explain").read_text()
    table = pd.read_csv(tmp_path / "out" / "answers.csv")
    right = {role: table[role] == table["label"] for role in given}
    lost, gained = (right["base"] & ~right["student"]).sum(), (right["student"] & ~right["base"]).sum()
    assert f"{lost} right answers of the base lost and {gained} gained" in page
    assert lost + gained > 0
    assert page.count("<img alt=") == int(lost > 0) + int(gained > 0)
    assert "24 sentences of 4 classes" in page
    assert not re.search("image[^/]", re.sub('src="[^"]+"', "", page))
    assert "<code>kdx explain</code>" in page
    with pytest.raises(ValueError, match="is there already"):
        explain_text(given, tmp_path / "texts.csv", tmp_path / "out")


def test_a_folder_of_transformers_is_a_network(given, tmp_path):
    from transformers import PreTrainedTokenizerFast

    network = tiny(2)
    network.classifier.config.id2label = dict(enumerate(NAMES))
    network.classifier.save_pretrained(tmp_path / "folder")
    PreTrainedTokenizerFast(tokenizer_object=network.tokenizer).save_pretrained(tmp_path / "folder")
    save_text(tmp_path / "file.safetensors", tiny(2), {"classes": NAMES})
    answers = []
    for name in ("folder", "file.safetensors"):  # the same weights
        explain_text(given | {"teacher": tmp_path / name}, tmp_path / "texts.csv", tmp_path / f"out of {name}")
        answers.append(pd.read_csv(tmp_path / f"out of {name}" / "answers.csv")["teacher"])
    assert answers[0].equals(answers[1])


def test_networks_of_other_classes_are_refused(given, tmp_path):
    save_text(tmp_path / "other.safetensors", tiny(2, classes=2), {"classes": ["no", "yes"]})
    with pytest.raises(ValueError, match=r"teacher: expected the classes very negative, .* got no, yes"):
        explain_text(given | {"teacher": tmp_path / "other.safetensors"}, tmp_path / "texts.csv", tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="expected a file of kdx, or a sequence classifier"):
        explain_text(given | {"base": tmp_path / "nothing"}, tmp_path / "texts.csv", tmp_path / "out")


def test_a_network_beside_itself_is_refused(given, tmp_path):
    twice = {"student": given["student"], "base": given["student"]}
    with pytest.raises(ValueError, match=r"base and student are the same network .* expected two that differ"):
        explain_text(twice, tmp_path / "texts.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("closed_figures")
def test_names_of_classes_stay_as_they_are(tmp_path, given):
    names = ("image", "no images", "a & b", "images")
    for seed, path in enumerate(given.values()):
        save_text(path, tiny(seed), {"classes": names})
    labels = torch.arange(240) % 4
    answers = {"student": torch.zeros(240, dtype=int), "base": labels}
    lines = "\n".join(text_report._told(Ledger(labels, answers, names)))
    assert "On 240 sentences of 4 classes" in lines
    assert "clearly worse on no images, a & b, images" in lines
    table = pd.read_csv(tmp_path / "texts.csv")
    table["label"] = [names[NAMES.index(label)] for label in table["label"]]
    table.to_csv(tmp_path / "texts.csv", index=False)
    page = explain_text(given, tmp_path / "texts.csv", tmp_path / "out").read_text()
    assert all(f"<td>{html.escape(name)}</td>" in page for name in names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\na film\n", "got no label"),
        ("text,label\na film,good\n", "line 2: expected a text and one of no, yes, got 'a film', 'good'"),
        ("text,label\na film,1\n ,0\n", "line 3: expected a text"),
        ("text,label\n", "at least one text, got none"),
        ("", "expected a CSV file"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / "t.csv", ("no", "yes"))


def test_labels_are_names_or_numbers(tmp_path):
    (tmp_path / "t.csv").write_text('text,label\na film,1\n"no, none",no\nNA,yes\n')
    texts, labels = read_texts(tmp_path / "t.csv", ("no", "yes"))
    assert texts == ["a film", "no, none", "NA"]
    assert labels.tolist() == [1, 0, 1]
    (tmp_path / "t.csv").write_text("\ufefftext,label\na film,1\n$_$ and $x,2\n")
    assert read_texts(tmp_path / "t.csv", ("1", "2"))[1].tolist() == [0, 1]  # a name comes before a number
    (tmp_path / "t.csv").write_text("text,label\na film,0\nanother,1\n")
    assert read_texts(tmp_path / "t.csv", ("1", "2"))[1].tolist() == [0, 1]
    (tmp_path / "t.csv").write_text("text,label\na film,0\nanother,1\na third,2\n")
    with pytest.raises(ValueError, match=r"expected labels that are all names \(1, 2\) or all indices, got both"):
        read_texts(tmp_path / "t.csv", ("1", "2"))
    (tmp_path / "t.csv").write_text("text,label\na film,1\nanother,good\n")
    with pytest.raises(ValueError, match="line 3: expected a text and one of 1, 2, got 'another', 'good'"):
        read_texts(tmp_path / "t.csv", ("1", "2"))
