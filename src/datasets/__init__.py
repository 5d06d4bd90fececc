"""The data sets: one `load` for all of them, by name."""

from .catalogue import load, missing, open_files
from .decode import View
from .images import Images
from .photographs import CelebA, ImageNet9, Waterbirds
from .spurious import (
    CLASSES,
    GROUPS,
    SQUARE,
    TEST_SETS,
    DataUnavailable,
    SpuriousDigits,
    SpuriousMNIST,
    ensure_mnist,
)

__all__ = ["CLASSES", "GROUPS", "SQUARE", "TEST_SETS", "CelebA", "DataUnavailable", "ImageNet9", "Images",
           "SpuriousDigits", "SpuriousMNIST", "View", "Waterbirds", "ensure_mnist", "load", "missing", "open_files"]
