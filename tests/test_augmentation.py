"""The training view against torchvision: how it is drawn, and what it makes of an image."""

import math

import pytest
import torch
import torchvision.transforms.functional as reference
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomAffine, RandomResizedCrop

from src.augmentation import Augmentation

LAST = torch.channels_last
BOXES = [(0, 0, 60, 40), (13, 7, 21, 30), (0, 39, 60, 1), (59, 0, 1, 40), (59, 39, 1, 1), (40, 20, 20, 20),
         (1, 1, 58, 38), (30, 0, 2, 3)]


def rows(*boxes, flipped=0.0):
    """A table as of `draw`, from boxes (left, top, width, height)."""
    return torch.tensor([[*box, 0.0, flipped] for box in boxes], dtype=torch.float64)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.rand(8, 3, 40, 60).contiguous(memory_format=LAST)


@pytest.mark.parametrize(("height", "width", "augmentation"), [
    (256, 256, Augmentation(scale=(0.08, 1.0))),
    (218, 178, Augmentation(ratio=(1, 4 / 3))),  # an upright image: most attempts fail, some crops are the fallback
    (30, 40, Augmentation(scale=(0.08, 1.0), ratio=(0.2, 1.0))),
    (32, 32, Augmentation(None, degrees=15, shift=3.2))])
def test_views_are_distributed_as_torchvisions(height, width, augmentation):
    torch.manual_seed(0)
    ours, image = augmentation.draw(40_000, height, width, seed=0, epoch=0), torch.empty(3, height, width)

    def aspects(left, top, w, h):
        return torch.stack([left, top, w, h, w * h, w / h, left / (width - w + 1), top / (height - h + 1)])

    if augmentation.side:
        assert torch.equal(ours[:, :4], ours[:, :4].round())
        assert (ours[:, :4] >= torch.tensor([0, 0, 1, 1])).all()
        assert (ours[:, :2] + ours[:, 2:4] <= torch.tensor([width, height])).all()
        crops = [RandomResizedCrop.get_params(image, augmentation.scale, augmentation.ratio) for _ in range(4000)]
        ours, theirs = aspects(*ours[:, :4].T), aspects(*torch.tensor(crops).double()[:, [1, 0, 3, 2]].T)
    else:
        turns = [RandomAffine.get_params([-15.0, 15.0], [0.1, 0.1], None, None, [32, 32]) for _ in range(4000)]
        theirs = torch.tensor([(-right, -down, math.radians(angle)) for angle, (right, down), _, _ in turns]).T
        ours = ours[:, [0, 1, 4]].T
    for one, two in zip(ours, theirs, strict=True):
        # the largest gap between the two cumulative distributions; by chance above 0.033 once in 1000
        assert ks_2samp(one, two).statistic < 0.033
        assert abs(one.mean() - two.mean()) <= 4.5 * two.std() / len(two) ** 0.5


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), [
    (20, 203, (1, 1), (3 / 4, 4 / 3)), (1, 40, (1, 1), (3 / 4, 4 / 3)), (7, 5, (1, 1), (3, 3)),  # too wide
    (203, 20, (1, 1), (3 / 4, 4 / 3)), (1, 1, (0.08, 1), (0.3, 0.3)),  # too high
    (3, 1000, (1, 1), (0.5, 1.5)),  # the height that is wanted ends in one half
    (1000, 1003, (1, 1), (0.1, 10))])  # of a ratio that is allowed: the whole image, which no attempt hits
def test_fallback_is_torchvisions(height, width, scale, ratio):
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
    drawn = Augmentation(scale=scale, ratio=ratio).draw(20, height, width, seed=0, epoch=0)
    assert (drawn[:, :4] == torch.tensor([left, top, max(w, 1), max(h, 1)])).all()  # theirs may be empty


def test_flips_are_drawn_as_told():
    drawn = Augmentation(flip=0.3).draw(20_000, 32, 32, seed=0, epoch=0)
    assert drawn[:, 5].unique().tolist() == [0, 1]
    assert drawn[:, 5].mean() == pytest.approx(0.3, abs=0.015)
    plain = Augmentation(flip=1).draw(1000, 32, 32, seed=0, epoch=0)
    assert (plain[:, 5] == 1).all()
    assert torch.equal(plain[:, :4], drawn[:1000, :4])  # it does not move the crops


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(None, degrees=10, shift=2)])
def test_a_draw_is_a_function_of_seed_epoch_and_index(augmentation):
    drawn = augmentation.draw(3000, 64, 48, seed=0, epoch=3)
    assert drawn.shape == (3000, 6)
    for n in (0, 1, 7, 2999, 3000):
        assert torch.equal(drawn[:n], augmentation.draw(n, 64, 48, seed=0, epoch=3))
    for seed, epoch in ((0, 4), (1, 3), (3, 0)):
        assert (augmentation.draw(3000, 64, 48, seed, epoch) != drawn).any(1).float().mean() > 0.99


@pytest.mark.parametrize("side", [1, 7, 20, 41, 60, 97])
def test_a_view_equals_resized_crop_and_a_flip_mirrors_it(images, side):
    plain, augment = rows(*BOXES), Augmentation(side)
    expected = torch.stack([reference.resized_crop(image, top, left, height, width, [side, side], antialias=False)
                            for image, (left, top, width, height) in zip(images.double(), BOXES, strict=True)])
    torch.testing.assert_close(augment(images.double(), plain), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(augment(images, plain), expected.float(), atol=1e-5, rtol=0)
    mixed = torch.cat([plain[:4], rows(*BOXES[4:], flipped=1.0)])
    view = augment(images, plain)
    torch.testing.assert_close(augment(images, mixed), torch.cat([view[:4], view[4:].flip(3)]), atol=1e-6, rtol=0)
    for shape in ((7, 6), (1, 6), (6, 8), (8,), (8, 3)):
        with pytest.raises(ValueError, match=r"expected drawn to be \(8, 6\)"):
            augment(images, torch.ones(shape))


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("augment", [Augmentation(), Augmentation(None, degrees=9, shift=3)])
def test_an_image_does_not_depend_on_its_batch(augment, layout):
    torch.manual_seed(0)
    images = torch.rand(9, 3, 240, 230).contiguous(memory_format=layout)
    drawn = augment.draw(9, 240, 230, seed=0, epoch=0)
    before, all_at_once = images.clone(), augment(images, drawn)
    assert all_at_once.is_contiguous(memory_format=layout)
    assert 0 <= all_at_once.min() <= all_at_once.max() <= 1
    for index in ([0], [7, 2], [4, 4, 4, 4, 1, 0, 3]):
        assert torch.equal(augment(images[index].contiguous(memory_format=layout), drawn[index]), all_at_once[index])
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(32, 32), (20, 31)])
def test_turn_and_shift_move_pixels_as_torchvision_does(shape):
    torch.manual_seed(0)
    images, affine = torch.rand(30, 3, *shape), Augmentation(None, degrees=15, shift=3.2)
    drawn = affine.draw(30, *shape, seed=1, epoch=2)
    assert 0 < drawn[:, 5].sum() < 30
    for image, seen, row in zip(images, affine(images, drawn), drawn.tolist(), strict=True):
        left, top, _, _, angle, flipped = row[:6]
        wanted = reference.affine(image.flip(2) if flipped else image, math.degrees(angle), [-int(left), -int(top)],
                                  1.0, [0.0, 0.0], InterpolationMode.NEAREST)
        assert torch.equal(seen, wanted)
