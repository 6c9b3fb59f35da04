import nbformat
import pytest

from kdx.data.sst import load_sentences
from kdx.distil import text_set
from kdx.distil.fit_text import TextRecipe
from kdx.paths import DataError
from tests.checkout import ROOT
from tests.texts import TINY

QUICK = TextRecipe(1, 20, 0.01)


def jobs(**settings):
    data = [load_sentences("generated", split, limit=40) for split in ("train", "test")]
    teachers = {"teacher": (TINY, QUICK), "other": (TINY, TextRecipe(2, 20, 0.01))}
    return text_set.jobs(*data, student=TINY, recipe=QUICK, teachers=teachers, **{"seeds": 2} | settings)


def test_every_teacher_has_its_students():
    found = jobs(settings={"response": {"alpha": 0.9}})
    names = ["scratch", "smoothing", "response", "response, other"]
    assert set(found) == {("teacher", 0), ("other", 0)} | {(name, seed) for name in names for seed in (1, 2)}
    assert found["response", 1].teacher is found["teacher", 0]
    assert found["response, other", 2].teacher is found["other", 0]
    assert found["response", 2].parts[0].alpha == 0.9
    assert found["scratch", 1].teacher is found["smoothing", 1].teacher is None
    assert {found[name, 2].seed for name in names} == {2}
    assert len({job.digest for job in found.values()}) == len(found)


def test_students_of_a_seed_begin_with_the_same_weights():
    found = jobs()
    weights = [found[name, seed].untrained.classifier.classifier.weight for name, seed in
               (("scratch", 1), ("response", 1), ("scratch", 2))]  # fmt: skip
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds: expected one or more, got 0"):
        jobs(seeds=0)


def page(**parameters):
    """Run the page's first cells of code, as far as the one that makes the trainings, with other parameters."""
    notebook = nbformat.read(ROOT / "notebooks" / "10_text.ipynb", as_version=4)
    first, *others = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    known = {}
    exec(first, known)
    known |= parameters
    for source in others:
        exec(source, known)
        if "runs = {}" in source:
            return known


def test_the_page_shows_stored_scores_of_the_networks_that_it_describes():
    assert page()["runs"] == {}  # the treebank is not here
    for other in ({"epochs": 1}, {"seeds": 1}, {"pretrained": False}, {"limit": 40}, {"corpus": "generated"}):
        with pytest.raises(ValueError, match="stored='text': expected parameters of sentences, networks and training"):
            page(**other)
    with pytest.raises(DataError, match=r'stored="": .* not on this machine: get it with `kdx data get sst`'):
        page(stored="")
