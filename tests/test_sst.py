import zipfile

import pytest
import torch

import kdx
from kdx.data import sst
from kdx.paths import DataError, sha256_of

TREES = [
    "(3 (2 a) (3 (4 lovely) (2 film)))",
    "(2 (2 no) (2 one))",
    r"(0 (1 (2 -LRB-) (2 1\/2)) (0 (0 awful) (2 -RRB-)))",
]


def test_read_trees_by_hand():
    found = sst.read_trees(TREES)
    assert found.words == (("a", "lovely", "film"), ("(", "1/2", "awful", ")"))  # the neutral sentence is left out
    assert found.labels.tolist() == [2, 0]
    assert found.polarities == ((0, 1, 0), (0, 0, -1, 0))
    assert found.signs.tolist() == [1, -1]


@pytest.mark.parametrize(
    "line", ["", "a lovely film", "(3 (2 a) (3 lovely)", "(7 (2 a) (2 film))", "(3 (2 a) (2 b) (2 c))"]
)
def test_read_trees_names_the_line(line):
    with pytest.raises(ValueError, match="line 2: expected a binary tree"):
        sst.read_trees([TREES[0], line])


@pytest.mark.parametrize(
    "word", ["-LRB-", "-RRB-", r"1\/2", r"\*\*", "n't", "coming-of-age", "'70s", "cliché", "a\xa0b"]
)
def test_escapes_are_reversible(word):
    assert sst.escape(sst.unescape(word)) == word


def test_limit_keeps_the_proportions_of_the_classes():
    whole = kdx.load_sentences("generated", "train")
    assert whole.limit(40).labels.bincount().tolist() == [10, 10, 10, 10]
    assert whole.limit(0) is whole
    with pytest.raises(ValueError, match=r"limit: expected 0 \(all\) to 800 sentences, got 801"):
        whole.limit(801)


def test_join_and_rows():
    parts = [kdx.load_sentences("generated", split) for split in ("dev", "test")]
    both = sst.join(*parts)
    assert len(both) == 300
    assert both.words[100] == parts[1].words[0]
    assert both[torch.tensor([299])].polarities == parts[1].polarities[-1:]
    assert both.fingerprint != parts[0].fingerprint


def test_rows_that_do_not_fit_are_refused():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="each of 2 sentences, got 2 labels and 1 rows of polarities"):
        sst.Sentences((("a", "film"), ("b",)), labels, ((0, 0),))
    with pytest.raises(ValueError, match=r"polarities: expected one for each word .* got 2 in row 1, of 1 words"):
        sst.Sentences((("a", "film"), ("b",)), labels, ((0, 0), (0, 1)))


def test_generated_sentences_have_their_label_in_most_polar_words():
    some = kdx.load_sentences("generated", "test")
    sums = torch.tensor([sum(p) for p in some.polarities])
    assert torch.equal(sums.sign(), some.signs)
    assert {len({q for q in p if q}) for p in some.polarities} == {1, 2}  # some have words of both kinds
    assert kdx.load_sentences("generated", "test", seed=1).words != some.words


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected one of train, dev, test, got 'val'"):
        kdx.load_sentences("generated", "val")
    with pytest.raises(ValueError, match="unknown corpus 'imdb'"):
        kdx.load_sentences("imdb")
    with pytest.raises(DataError, match="not on this machine: get it with `kdx data get sst`"):
        kdx.load_sentences()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A folder like the original, whose checksums are expected."""
    folder = tmp_path / "trees"
    folder.mkdir()
    for split in sst.SHA256:
        (folder / f"{split}.txt").write_text("\n".join(TREES) + "\n")
    monkeypatch.setattr(sst, "SHA256", {split: sha256_of(folder / f"{split}.txt") for split in sst.SHA256})
    return folder


def test_adopt_links_a_folder_and_unpacks_an_archive(copy, home, tmp_path):
    sst.adopt_sst(copy.parent)
    assert len(kdx.load_sentences(split="dev")) == 2
    (home / "raw" / "sst").unlink()
    with zipfile.ZipFile(tmp_path / "trees.zip", "w") as packed:
        for path in copy.iterdir():
            packed.write(path, f"trees/{path.name}")
    sst.adopt_sst(tmp_path / "trees.zip")
    assert len(kdx.load_sentences(split="test")) == 2


def test_changed_files_are_passed_over(copy, tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    copy.rename(place / "sst")
    monkeypatch.setenv("KDX_DATA", str(place))
    assert sst.find_sst() == place / "sst"
    (place / "sst" / "dev.txt").write_text("(3 (2 a) (3 lie))\n")
    assert sst.find_sst() is None
    with pytest.raises(DataError, match=r"dev\.txt: expected SHA-256"):
        sst.adopt_sst(place / "sst")


def test_fetch_tries_every_source_and_verifies(copy, home, monkeypatch):
    def broken(folder):
        raise OSError("no route")

    def wrong(folder):
        for split in sst.SHA256:
            (folder / f"{split}.txt").write_text("(3 (2 a) (3 lie))\n")

    def right(folder):
        for path in copy.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(sst, "SOURCES", {"one": broken, "two": wrong})
    with pytest.raises(DataError, match=r"one: no route\n  two: .*expected SHA-256"):
        sst.fetch_sst()
    assert not (home / "raw" / "sst").exists()
    monkeypatch.setattr(sst, "SOURCES", {"one": broken, "three": right})
    assert sst.fetch_sst() == home / "raw" / "sst"
    assert sst.fetch_sst() == home / "raw" / "sst"  # found, not fetched again


@pytest.mark.real_data
@pytest.mark.usefixtures("treebank")
def test_the_treebank_is_the_published_one():
    found = {split: kdx.load_sentences("sst", split) for split in sst.SHA256}
    assert [len(of) for of in found.values()] == [6920, 872, 1821]
    test = found["test"]
    polar = [(p, s) for row, s in zip(test.polarities, test.signs.tolist(), strict=True) for p in row if p]
    assert sum(p == s for p, s in polar) / len(polar) == pytest.approx(0.665, abs=0.001)
