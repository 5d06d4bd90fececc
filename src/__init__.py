"""MaskTune: find where a classifier looks, hide it, and fine-tune for one epoch on what is left."""

from .datasets.images import Images, load_dataset, load_folder
from .layers import suggest_layers
from .repair import masktune, preview

__all__ = ["Images", "load_dataset", "load_folder", "masktune", "preview", "suggest_layers"]
