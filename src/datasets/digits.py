"""SpuriousDigits: the same experiment on 1,797 real digits that come with scikit-learn, no download needed."""

import torch
import torch.nn.functional as F

from src.datasets.square import SpuriousSquare, check_arguments
from src.seeding import generator

TRAIN = 1347  # of 1,797; the other 450 are the test set
DIGIT, FRAME = 20, 28  # pixels a side; MNIST's own proportions, so that the corner with the square is empty


class SpuriousDigits(SpuriousSquare):
    """scikit-learn's 1,797 handwritten digits (UCI Optical Recognition, 8x8) in the frame of `SpuriousMNIST`.

    Input: (3, 28, 28) float in [0, 1]: the digit scaled to 20x20 inside 28x28. Labels, groups, test sets and arguments
    are those of `SpuriousMNIST`, without the root. 1,347 images to train, 450 to test, split once for every seed.

    Raises:
        ValueError: an argument is outside what is valid.
    """

    def __init__(self, train: bool, test_set: str | None = None, class_mix_ratio: float = 0.01,
                 mix_order: str = "random", seed: int = 0) -> None:
        check_arguments(train, test_set, class_mix_ratio, mix_order)
        from sklearn.datasets import load_digits  # here, so that training on MNIST needs no scikit-learn

        source = load_digits()
        eight = torch.from_numpy(source.images).float() / 16  # the source counts 0..16
        twenty = F.interpolate(eight[:, None], size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)[:, 0]
        grey = F.pad((twenty * 255).round().to(torch.uint8), [(FRAME - DIGIT) // 2] * 4)
        order = torch.randperm(len(grey), generator=generator(0, "digits split"))
        chosen = order[:TRAIN] if train else order[TRAIN:]
        super().__init__(grey[chosen], torch.from_numpy(source.target)[chosen], train, test_set, class_mix_ratio,
                         mix_order, seed)
