"""kdx: what does a student learn from its teacher?

Explaining knowledge distillation of PyTorch networks: data, models, training, saliency.
"""

from kdx.background import background_control, explained_share
from kdx.cards import DATASETS
from kdx.chains import distill_chain
from kdx.data import Dataset, folds, load_dataset, prepare
from kdx.distill import Recipe, evaluate, fit
from kdx.labels import label_embeddings
from kdx.models import MODELS, build, load_checkpoint, save_checkpoint
from kdx.own import load_own
from kdx.perturb import perturb
from kdx.runs import Run
from kdx.saliency import activations, agreement, capture, grad_cam, mass_on
from kdx.scores import fss, rs, unique_rs
from kdx.sources import fetch
from kdx.study import cross_chains, cross_fit
from kdx.teachers import complexity, fidelity, rank_teachers
from kdx.techniques import TECHNIQUES
from kdx.tracing import stages
from kdx.unexplained import Unexplained, unexplained, unexplained_share
from kdx.unique import Reference, UniCAM, unicam
from kdx.version import __version__

__all__ = [
    "DATASETS",
    "MODELS",
    "TECHNIQUES",
    "Dataset",
    "Recipe",
    "Reference",
    "Run",
    "Unexplained",
    "UniCAM",
    "__version__",
    "activations",
    "agreement",
    "background_control",
    "build",
    "capture",
    "complexity",
    "cross_chains",
    "cross_fit",
    "distill_chain",
    "evaluate",
    "explained_share",
    "fetch",
    "fidelity",
    "fit",
    "folds",
    "fss",
    "grad_cam",
    "label_embeddings",
    "load_checkpoint",
    "load_dataset",
    "load_own",
    "mass_on",
    "perturb",
    "prepare",
    "rank_teachers",
    "rs",
    "save_checkpoint",
    "stages",
    "unexplained",
    "unexplained_share",
    "unicam",
    "unique_rs",
]
