"""Text networks that tests share."""

from types import SimpleNamespace

import torch
from torch import nn

from kdx.data.sst import load_sentences
from kdx.networks.text_networks import Architecture, TextNetwork, learn_pieces

TINY = Architecture(layers=2, width=8, heads=2, vocabulary=110, positions=40)


def tiny(seed=0, classes=4, architecture=TINY):
    """An untrained network in evaluation mode, with weights of some size so that words matter."""
    words = load_sentences("generated", "dev").words
    network = architecture.build(words, classes, seed).eval()
    for parameter in network.parameters():
        parameter.data *= 2
    return network


class Bag(nn.Module):
    """Logits are the sums of the embeddings of a sentence's pieces, so that a word's share is known."""

    def __init__(self, pieces, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(pieces, classes)
        self.config = SimpleNamespace(
            max_position_embeddings=40, pad_token_id=0, num_labels=classes, hidden_size=classes
        )

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask):
        summed = (self.embeddings(input_ids) * attention_mask[..., None]).sum(1)
        return SimpleNamespace(logits=summed)


def bag(words):
    tokenizer = learn_pieces(words, 200)
    return TextNetwork(Bag(tokenizer.get_vocab_size()), tokenizer).eval()
