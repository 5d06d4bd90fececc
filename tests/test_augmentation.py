import math

import pytest
import torch
import torchvision.transforms.functional as reference
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomAffine, RandomCrop, RandomResizedCrop

from src.augmentation import Affine, Augmentation

LAST = torch.channels_last


def rows(*boxes, flipped=0.0, factors=(1.0, 1.0, 1.0)):
    """A table as of `draw`, from boxes (left, top, width, height)."""
    return torch.tensor([[*box, flipped, *factors] for box in boxes])


def resized_crops(images, drawn, side, antialias):
    return torch.stack([reference.resized_crop(image, int(top), int(left), int(height), int(width), [side, side],
                                               antialias=antialias)
                        for image, (left, top, width, height) in zip(images, drawn[:, :4], strict=True)])


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.rand(8, 3, 40, 60).contiguous(memory_format=LAST)


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), [
    (256, 256, (0.7, 1.0), (3 / 4, 4 / 3)),
    (256, 256, (0.08, 1.0), (3 / 4, 4 / 3)),
    (218, 178, (0.7, 1.0), (1, 4 / 3)),  # an upright image: most attempts fail, some crops are the fallback
    (30, 40, (0.08, 1.0), (0.2, 1.0)),
])
def test_crops_are_distributed_as_torchvisions(height, width, scale, ratio):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)]).double()
    ours = Augmentation(scale=scale, ratio=ratio).draw(40_000, height, width, seed=0, epoch=0).double()

    def aspects(left, top, w, h):
        return {"left": left, "top": top, "width": w, "height": h, "area": w * h, "ratio": w / h,
                "place across": left / (width - w + 1), "place down": top / (height - h + 1)}

    ours, theirs = aspects(*ours[:, :4].unbind(1)), aspects(*theirs[:, [1, 0, 3, 2]].unbind(1))
    for name, one in ours.items():
        two = theirs[name]
        # the largest gap between the two cumulative distributions; by chance above 0.033 once in 1000
        assert ks_2samp(one, two).statistic < 0.033, name
        assert abs(one.mean() - two.mean()) <= 4.5 * two.std() / len(two) ** 0.5, name


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), [
    (20, 203, (1, 1), (3 / 4, 4 / 3)),  # too wide
    (203, 20, (1, 1), (3 / 4, 4 / 3)),  # too high
    (3, 1000, (1, 1), (0.5, 1.5)),  # the height that is wanted ends in one half
    (1000, 1003, (1, 1), (0.1, 10)),  # of a ratio that is allowed: the whole image, which no attempt hits
])
def test_fallback_is_torchvisions(height, width, scale, ratio):
    torch.manual_seed(0)
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
    drawn = Augmentation(scale=scale, ratio=ratio).draw(20, height, width, seed=0, epoch=0)
    assert (drawn[:, :4] == torch.tensor([left, top, w, h])).all()


@pytest.mark.parametrize(("height", "width"), [(256, 256), (218, 178), (7, 5), (1, 1), (1, 40)])
def test_crops_are_whole_pixels_inside_the_image(height, width):
    drawn = Augmentation(scale=(0.08, 1)).draw(5000, height, width, seed=1, epoch=2)
    assert drawn.shape == (5000, 8)
    assert drawn.dtype == torch.float32
    corner, size = drawn[:, :2], drawn[:, 2:4]
    assert (drawn[:, :4] == drawn[:, :4].round()).all()
    assert (corner >= 0).all()
    assert (size >= 1).all()
    assert (corner + size <= torch.tensor([width, height])).all()
    for ratio in (0.3, 3):  # no fallback is empty
        assert Augmentation(ratio=(ratio, ratio)).draw(1, 1, 1, seed=0, epoch=0)[0, :4].tolist() == [0, 0, 1, 1]


def test_crops_reach_every_corner():
    drawn = Augmentation(scale=(0.25, 0.25), ratio=(1, 1)).draw(2000, 8, 6, seed=0, epoch=0)
    assert (drawn[:, 2:4] == 3).all()  # sqrt(12) = 3.46
    counts = torch.bincount((drawn[:, 1] * 4 + drawn[:, 0]).long())
    assert len(counts) == 6 * 4
    assert counts.min() > 50  # 83 each is expected


def test_flips_and_colours_are_drawn_as_told():
    drawn = Augmentation(flip=0.3, jitter=0.2).draw(20_000, 32, 32, seed=0, epoch=0)
    assert drawn[:, 4].unique().tolist() == [0, 1]
    assert drawn[:, 4].mean() == pytest.approx(0.3, abs=0.015)
    for factor in drawn[:, 5:].T:
        assert factor.min() == pytest.approx(0.8, abs=1e-3)
        assert factor.max() == pytest.approx(1.2, abs=1e-3)
        assert factor.std() == pytest.approx(0.4 / 12 ** 0.5, rel=0.03)
    assert torch.corrcoef(drawn[:, 4:].T).triu(1).abs().max() < 0.03
    for flip in (0, 1):
        plain = Augmentation(flip=flip).draw(1000, 32, 32, seed=0, epoch=0)
        assert (plain[:, 4] == flip).all()
        assert (plain[:, 5:] == 1).all()
        assert torch.equal(plain[:, :4], drawn[:1000, :4])  # neither moves the crops


@pytest.mark.parametrize("augmentation", [Augmentation(jitter=0.1), Affine(degrees=10, shift=2, flip=0.5)])
def test_a_draw_is_a_function_of_seed_epoch_and_index(augmentation):
    drawn = augmentation.draw(3000, 64, 48, seed=0, epoch=3)
    torch.rand(5)
    for n in (0, 1, 7, 2999, 3000):
        assert torch.equal(drawn[:n], augmentation.draw(n, 64, 48, seed=0, epoch=3))
    for seed, epoch in ((0, 4), (1, 3), (3, 0)):
        other = augmentation.draw(3000, 64, 48, seed, epoch)
        assert (other != drawn).any(1).float().mean() > 0.99


BOXES = [(0, 0, 60, 40), (13, 7, 21, 30), (0, 39, 60, 1), (59, 0, 1, 40), (59, 39, 1, 1), (40, 20, 20, 20),
         (1, 1, 58, 38), (30, 0, 2, 3)]


@pytest.mark.parametrize("side", [1, 7, 20, 41, 60, 97])
def test_equals_resized_crop(images, side):
    drawn = rows(*BOXES)
    expected = resized_crops(images.double(), drawn, side, antialias=False)
    ours = Augmentation(side)(images.double(), drawn)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(Augmentation(side)(images, drawn), expected.float(), atol=1e-5, rtol=0)
    enlarged = (drawn[:, 2:4] <= side).all(1)
    if enlarged.any():  # then antialiasing changes nothing
        smooth = resized_crops(images[enlarged].double(), drawn[enlarged], side, antialias=True)
        torch.testing.assert_close(ours[enlarged], smooth, atol=1e-12, rtol=0)


def test_equals_resized_crop_at_full_size():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 256, 256)
    augmentation = Augmentation(scale=(0.08, 1), flip=0)
    drawn = augmentation.draw(8, 256, 256, seed=0, epoch=0)
    expected = resized_crops(images, drawn, 224, antialias=False)
    # at a distance of 256 pixels float32 places a pixel to about 3e-5, here as in torchvision
    torch.testing.assert_close(augmentation(images, drawn), expected, atol=5e-5, rtol=0)


def test_a_flip_mirrors_the_crop(images):
    plain, flipped = rows(*BOXES), rows(*BOXES, flipped=1.0)
    augment = Augmentation(side=33)
    assert torch.equal(augment(images, flipped), augment(images, plain).flip(3))
    mixed = torch.cat([plain[:4], flipped[4:]])
    assert torch.equal(augment(images, mixed), torch.cat([augment(images, plain)[:4], augment(images, flipped)[4:]]))


def test_colours_equal_torchvisions(images):
    drawn = Augmentation(jitter=0.9).draw(8, 40, 60, seed=0, epoch=0)
    expected = []
    for view, factors in zip(Augmentation(side=32)(images, drawn), drawn[:, 5:].tolist(), strict=True):
        view = reference.adjust_brightness(view, factors[0])
        view = reference.adjust_contrast(view, factors[1])
        expected.append(reference.adjust_saturation(view, factors[2]))
    recoloured = Augmentation(side=32, jitter=0.9)(images, drawn)
    torch.testing.assert_close(recoloured, torch.stack(expected), atol=1e-6, rtol=0)
    assert recoloured.min() == 0  # what was beyond the range is cut
    assert recoloured.max() == 1


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_an_image_does_not_depend_on_its_batch(layout, jitter):
    torch.manual_seed(0)
    images = torch.rand(9, 3, 240, 230).contiguous(memory_format=layout)
    augment = Augmentation(jitter=jitter)
    drawn = augment.draw(9, 240, 230, seed=0, epoch=0)
    before, all_at_once = images.clone(), augment(images, drawn)
    for index in ([0], [8], [7, 2], [4, 4, 4, 4, 1, 0, 3], list(range(8, -1, -1))):
        assert torch.equal(augment(images[index].contiguous(memory_format=layout), drawn[index]), all_at_once[index])
    assert torch.equal(images, before)


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_range_shape_and_layout_are_kept(images, jitter):
    augment = Augmentation(side=50, jitter=jitter)
    drawn = augment.draw(8, 40, 60, seed=0, epoch=0)
    for layout in (LAST, torch.contiguous_format):
        for batch in (images, torch.ones_like(images), torch.zeros_like(images)):
            views = augment(batch.contiguous(memory_format=layout), drawn)
            assert (views.shape, views.dtype) == ((8, 3, 50, 50), torch.float32)
            assert views.is_contiguous(memory_format=layout)
            assert 0 <= views.min() <= views.max() <= 1


@pytest.mark.parametrize("size", [3, 9, 251])
def test_white_stays_white(size):
    augment = Augmentation(scale=(0.08, 1))
    drawn = torch.cat([augment.draw(63, size, size, seed=0, epoch=0), rows((0, 0, size, size))])
    views = augment(torch.ones(64, 3, size, size), drawn)
    assert 1 - 2e-7 < views.min() <= views.max() == 1  # four weights sum to 1 but for rounding; none is outside


@pytest.mark.parametrize("wrong", [
    dict(side=0), dict(side=22.5), dict(scale=(0, 1)), dict(scale=(0.8, 0.7)), dict(scale=(0.7, 1.1)),
    dict(scale=(float("nan"), 1)), dict(ratio=(0, 1)), dict(ratio=(2, 1)), dict(ratio=(1, float("inf"))),
    dict(flip=-0.1), dict(flip=1.1), dict(jitter=-0.1), dict(jitter=1.0), dict(jitter=float("nan")),
])
def test_a_field_that_is_not_valid_is_named(wrong):
    with pytest.raises(ValueError, match=rf"Augmentation: expected {next(iter(wrong))} to be .*, got "):
        Augmentation(**wrong)


@pytest.mark.parametrize(("field", "value"), [("degrees", -1), ("degrees", 181), ("shift", -0.1), ("flip", 1.1),
                                              ("shift", math.inf), ("degrees", math.nan)])
def test_a_field_of_affine_that_is_not_valid_is_named(field, value):
    with pytest.raises(ValueError, match=f"Affine: expected {field} to be .*, got {value}"):
        Affine(**{field: value})


@pytest.mark.parametrize("shape", [(7, 8), (9, 8), (1, 8), (8, 7), (8,), (0, 4), (8, 3)])
def test_a_table_of_another_length_is_refused(images, shape):
    for augmentation, columns in ((Augmentation(), 8), (Affine(), 4)):
        with pytest.raises(ValueError, match=rf"expected drawn to be \(8, {columns}\), .* got \({shape[0]},"):
            augmentation(images, torch.ones(shape))


@pytest.mark.parametrize("shape", [(32, 32), (20, 31)])
def test_affine_moves_pixels_as_torchvision_does(shape):
    torch.manual_seed(0)
    images, affine = torch.rand(30, 3, *shape), Affine(degrees=15, shift=3.2, flip=0.5)
    drawn = affine.draw(30, *shape, seed=1, epoch=2)
    assert 0 < drawn[:, 3].sum() < 30
    for image, seen, (angle, right, down, flipped) in zip(images, affine(images, drawn), drawn.tolist(), strict=True):
        image = image.flip(2) if flipped else image
        wanted = reference.affine(image, math.degrees(angle), [int(right), int(down)], 1.0, [0.0, 0.0],
                                  InterpolationMode.NEAREST)
        assert torch.equal(seen, wanted)


def test_affine_is_drawn_as_torchvision_draws():
    torch.manual_seed(0)
    theirs = torch.tensor([(math.radians(angle), *shift) for angle, shift, _, _ in (
        RandomAffine.get_params([-15.0, 15.0], [0.1, 0.1], None, None, [32, 32]) for _ in range(4000))])
    ours = Affine(degrees=15, shift=3.2, flip=0.3).draw(40_000, 32, 32, seed=0, epoch=0)
    for i in range(3):
        assert ks_2samp(ours[:, i].double(), theirs[:, i].double()).statistic < 0.033
    assert abs(ours[:, 3].mean() - 0.3) < 0.01


def test_a_shift_of_four_and_a_half_is_a_padded_crop():
    shifts = Affine(shift=4.5).draw(90_000, 32, 32, seed=0, epoch=0)[:, 1:3].flatten().long()
    counts = (shifts + 4).bincount()
    assert len(counts) == 9  # -4 to 4
    assert (counts - 20_000).abs().max() < 600  # 4.5 standard deviations
    image = torch.rand(1, 3, 32, 32)
    left, top = 1, 7  # of 0 to 8
    crop = RandomCrop(32)(reference.pad(image, 4)[..., top:top + 32, left:left + 32])
    assert torch.equal(Affine(shift=4.5)(image, torch.tensor([[0.0, 4 - left, 4 - top, 0]])), crop)
