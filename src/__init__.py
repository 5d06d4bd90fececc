"""MaskTune: find where a classifier looks, hide it, and fine-tune for one epoch on what is left."""

from .datasets.images import Images, load_dataset, load_folder
from .repair import masktune, preview
from .saliency import suggest_layers

__all__ = ["Images", "load_dataset", "load_folder", "masktune", "preview", "suggest_layers"]
