"""Holes that give nothing away: grown masks, decoys and the smooth fill."""

import pytest
import torch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer

from src.holes import grown, smooth, with_decoys
from src.holes import pixels
from src.masks import Masks
from src.models import SmallCNN
from src.state import State
from src.training import sgd, train_epoch

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (12, 3, 29, 30), dtype=torch.uint8, generator=DRAW)
HIDDEN = torch.rand(12, 29, 30, generator=DRAW) < 0.4


def test_grown_masks_reach_so_many_pixels_further():
    masks = torch.zeros(2, 28, 28).bool()
    masks[0, 10, 20] = masks[1, 0, 0] = True
    wide = grown(Masks.of(masks), 1 / 28)[:]
    assert wide[0, 9:12, 19:22].all()
    assert wide.flatten(1).sum(1).tolist() == [9, 4]
    assert torch.equal(grown(Masks.of(masks), 0)[:], masks)


def test_decoys_are_of_another_class_and_the_own_mask_stays_hidden():
    labels = torch.arange(300) % 4 * 2  # classes 0, 2, 4, 6; 1, 3 and 5 are absent
    masks = torch.zeros(300, 3, 100).bool()
    masks.view(300, -1)[torch.arange(300), torch.arange(300)] = True  # each its own pixel, so partners can be told
    masks[:4] = False  # nothing to hide
    both = with_decoys(Masks.of(masks), labels, seed=0, epoch=5)
    assert (both[:] | masks).equal(both[:])
    others = (both[:] & ~masks).flatten(1)
    assert set(others.sum(1).tolist()) == {0, 1}  # of the first four images there is nothing to hide
    image, partner = others.nonzero().T
    assert (labels[image] != labels[partner]).all()
    counts = torch.bincount(labels[partner][labels[image] == 0])
    assert counts[[2, 4, 6]].min() > 10  # any other class
    assert len(partner.unique()) > 150
    again, later, seeded = (with_decoys(Masks.of(masks), labels, *how).bits for how in ((0, 5), (0, 6), (1, 5)))
    assert again.equal(both.bits)
    assert not later.equal(both.bits)
    assert not seeded.equal(both.bits)


def test_a_smooth_fill_shows_nothing_of_what_is_hidden():
    filled, black = pixels(IMAGES, HIDDEN, "smooth"), pixels(IMAGES, HIDDEN)
    visible = ~HIDDEN[:, None].expand_as(IMAGES)
    assert filled[visible].equal((IMAGES / 255)[visible])
    assert black[~visible].max() == 0
    poisoned = torch.where(visible, IMAGES, 255 - IMAGES)
    assert pixels(poisoned, HIDDEN, "smooth").equal(filled)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_image_is_filled_with_itself(value):
    constant = torch.full_like(IMAGES, value)
    assert pixels(constant, HIDDEN, "smooth").equal(constant / 255)


def test_a_smooth_fill_continues_a_ramp_and_is_grey_where_nothing_is_visible():
    ramp = (torch.arange(64) * 4).to(torch.uint8).expand(1, 3, 64, 64)
    hole = torch.zeros(1, 64, 64).bool()
    hole[:, 20:40, 20:40] = True
    assert (pixels(ramp, hole, "smooth") - ramp / 255).abs().max() < 0.1  # black is off by 0.6
    assert pixels(ramp, torch.ones_like(hole), "smooth").unique().tolist() == [pytest.approx(128 / 255)]


def test_the_smooth_fill_is_within_twice_the_error_of_the_linear_imputation_of_road():
    """Rong et al. 2022, as the grad-cam library has it, without its noise; black is off several times as far."""
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)), 64,
                                             mode="bicubic").clamp(0, 1)
    hole = torch.zeros(8, 1, 64, 64).bool()
    hole[:, :, 20:32, 40:52] = True
    impute = NoisyLinearImputer(0.0)
    road = torch.stack([impute(image, (~one[0]).float()) for image, one in zip(images, hole, strict=True)])
    ours, theirs, black = (((filled - images).abs() * hole).sum() for filled in (
        smooth(images, (~hole).float()), road, 0 * images))
    assert ours < 2 * theirs < black / 3


def test_an_epoch_takes_them_and_names_what_it_cannot_take():
    images, labels = IMAGES[:, :, :28, :28].contiguous(), torch.arange(12) % 2

    def epoch(**options) -> dict:
        torch.manual_seed(0)
        state = State(model := SmallCNN(), sgd(model.parameters(), 0.9, 0))
        train_epoch(state, images, options.pop("labels", labels), lr=0.01, batch_size=4, seed=0,
                    masks=HIDDEN[:, :28, :28], **options)
        return model.state_dict()

    ends = [epoch()["linear.3.weight"]] + [epoch(**change)["linear.3.weight"] for change in (
        {"decoys": True}, {"fill": "smooth"}, {"decoys": True, "fill": "smooth"})]
    assert len({tuple(end.flatten().tolist()) for end in ends}) == 4
    for change, said in (({"fill": "white"}, "fill to be one of"), ({"decoys": True, "labels": labels * 0},
                                                                    "at least two classes")):
        with pytest.raises(ValueError, match=said):
            epoch(**change)
    for grow in (-0.1, 0.3, float("nan")):
        with pytest.raises(ValueError, match="grow to be a share"):
            grown(Masks.of(HIDDEN), grow)
