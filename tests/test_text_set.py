import pytest

from kdx.data.sst import load_sentences
from kdx.distil import text_set
from kdx.distil.fit_text import TextRecipe
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
