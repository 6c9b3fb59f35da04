"""kdx: what does a student learn from its teacher?

Explaining knowledge distillation of PyTorch networks: data, models, training, saliency.
"""

from kdx.data import DATASETS, Dataset, fetch, folds, load_dataset
from kdx.distill import TECHNIQUES, Recipe, evaluate, fit
from kdx.models import MODELS, build, load_checkpoint, save_checkpoint, stages
from kdx.runs import Run
from kdx.saliency import agreement, capture, grad_cam
from kdx.version import __version__

__all__ = [
    "DATASETS",
    "MODELS",
    "TECHNIQUES",
    "Dataset",
    "Recipe",
    "Run",
    "__version__",
    "agreement",
    "build",
    "capture",
    "evaluate",
    "fetch",
    "fit",
    "folds",
    "grad_cam",
    "load_checkpoint",
    "load_dataset",
    "save_checkpoint",
    "stages",
]
