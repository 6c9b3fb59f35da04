"""Label embeddings: class names as vectors.

``python -m kdx.data.label_embeddings PATH NAME`` rewrites the shipped table with the encoder at PATH, for the classes
of all registered datasets. NAME is the name of the encoder in the provenance of the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TABLE = Path(__file__).with_name("label_embeddings.safetensors")
UNNAMED = ("planted", "mnist")  # datasets whose class names (values of cues, digits) do not say what is alike


def label_embeddings(classes: Sequence[str], encoder: str = "shipped", download: bool = False) -> Tensor:
    """Embeddings of class names; ``table[labels]`` has a row for each image.

    Args:
        classes: At least two different names.
        encoder: ``"shipped"``: the table that comes with kdx, for the classes of its datasets (:func:`shipped_encoder`
            names its encoder). ``"one-hot"``: all classes equally far apart. Otherwise a transformers encoder by path
            or name, such as the paper's ``"bert-base-uncased"``; the embedding is the mean of its last hidden states
            over the tokens of a name.
        download: Whether transformers may download an encoder that is not on this machine.

    Returns:
        float32 (classes, m).

    Raises:
        ValueError: There are fewer than two classes, a name repeats or is missing in the shipped table, or the encoder
            or the package transformers is not on this machine.

    Examples:
        >>> import kdx
        >>> tuple(kdx.label_embeddings(["cat", "dog", "truck"]).shape)
        (3, 384)
        >>> kdx.label_embeddings(["cat", "dog"], "one-hot")
        tensor([[1., 0.],
                [0., 1.]])
    """
    if isinstance(classes, str) or len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"classes: expected at least two different class names, got {classes!r}")
    if encoder == "one-hot":
        return torch.eye(len(classes))
    if encoder == "shipped":
        return _shipped(classes)
    return _encode(classes, encoder, download)


def shipped_encoder() -> dict[str, str]:
    """The provenance of the shipped table: ``encoder``, ``pooling``, ``command``, ``versions``."""
    with safe_open(TABLE, framework="pt") as file:
        return json.loads(file.metadata()["kdx"])


def _shipped(classes: Sequence[str]) -> Tensor:
    with safe_open(TABLE, framework="pt") as file:
        known = set(file.keys())
        if missing := [name for name in classes if name not in known]:
            raise ValueError(
                f"the shipped label embeddings lack {', '.join(map(repr, missing))}; use encoder='one-hot', "
                "or a transformers encoder by name or path"
            )
        return torch.stack([file.get_tensor(name) for name in classes])


def _encode(classes: Sequence[str], encoder: str, download: bool) -> Tensor:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ValueError(f"encoder: {encoder!r} needs the package transformers: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=not download)
        model = AutoModel.from_pretrained(encoder, local_files_only=not download, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        remedy = "check its name and the connection" if download else "pass download=True to fetch it"
        raise ValueError(
            f"encoder: no transformers encoder {encoder!r} with safetensors weights on this machine; {remedy}, or use "
            "encoder='shipped' or 'one-hot'"
        ) from error
    tokens = tokenizer([name.replace("_", " ") for name in classes], padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**tokens).last_hidden_state.float()  # (classes, tokens, m)
    mask = tokens["attention_mask"][:, :, None]
    return ((states * mask).sum(1) / mask.sum(1)).clone()


def _write_table(encoder: str, name: str) -> None:
    import transformers

    from kdx.data.registry import DATASETS

    names = sorted({name for card in DATASETS.values() for name in card.classes if card.name not in UNNAMED})
    rows = label_embeddings(names, encoder)
    facts = {
        "encoder": name,
        "pooling": "mean over tokens",
        "command": f"python -m kdx.data.label_embeddings PATH {name!r}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    save_file({n: row.contiguous() for n, row in zip(names, rows, strict=True)}, TABLE, {"kdx": json.dumps(facts)})
    print(f"{TABLE.name}: {len(names)} names, {rows.shape[1]} numbers each, {TABLE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    _write_table(*sys.argv[1:])
