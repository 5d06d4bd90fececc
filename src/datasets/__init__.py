from src.datasets.digits import SpuriousDigits
from src.datasets.grouped import CelebA, ImageNet9, Waterbirds
from src.datasets.mnist import DataUnavailable, SpuriousMNIST
from src.datasets.square import CLASSES, GROUPS, SQUARE, TEST_SETS

__all__ = ["CLASSES", "GROUPS", "SQUARE", "TEST_SETS", "CelebA", "DataUnavailable", "ImageNet9", "SpuriousDigits",
           "SpuriousMNIST", "Waterbirds"]
