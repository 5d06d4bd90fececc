"""What is shown where something was hot: grown masks, decoys, transplants and the smooth fill; and the swap test."""

import pytest
import torch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from torch import nn

from src.experiments.stages import new_model
from src.holes import HOLES, SWAP, Holes, Shown, grown, partners, pixels, smooth
from src.inference import infer, swapped
from src.masking import find_masks, masktune_epoch
from src.masks import Masks
from src.state import State
from src.training import sgd, train_epoch

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (12, 3, 29, 30), dtype=torch.uint8, generator=DRAW)
HIDDEN = torch.rand(12, 29, 30, generator=DRAW) < 0.4
CPU = torch.device("cpu")
N = 4000


def numbered(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 2, 8), each of one colour that tells its number; labels."""
    number = torch.arange(N)
    colour = torch.stack([number // 256, number % 256, 0 * number], 1).to(torch.uint8)
    return colour[:, :, None, None].expand(N, 3, 2, 8).contiguous(), number % classes


def read(shown: torch.Tensor) -> torch.Tensor:
    """The number of the image that each pixel is from, (B, H, W)."""
    stored = (shown * 255).round().long()
    return stored[:, 0] * 256 + stored[:, 1]


def test_grown_masks_reach_so_many_pixels_further():
    masks = torch.zeros(2, 28, 28).bool()
    masks[0, 10, 20] = masks[1, 0, 0] = True
    wide = grown(Masks.of(masks), 1 / 28)[:]
    assert wide[0, 9:12, 19:22].all()
    assert wide.flatten(1).sum(1).tolist() == [9, 4]
    assert torch.equal(grown(Masks.of(masks), 0)[:], masks)


@pytest.mark.parametrize("classes", [2, 10])
def test_partners_are_of_another_class_and_uniform(classes):
    labels = torch.arange(N) % classes * 2  # odd classes are absent
    found, count = partners(labels, 0, 5)
    assert count == classes
    assert (labels[found] != labels).all()
    share = torch.bincount(labels[found][labels == 0])[2::2] / (N / classes)
    assert share == pytest.approx(torch.full((classes - 1,), 1 / (classes - 1)).numpy(), abs=0.06)
    for other in (partners(labels, 0, 6), partners(labels, 1, 5)):
        assert not torch.equal(other[0], found)


@pytest.mark.parametrize("classes", [2, 10])
def test_transplants_are_the_partners_pixels_as_often_as_is_said(classes):
    """The own mask alone, both, the partner's alone: of each the image's own, the partner's, or none.

    The masks of two classes differ; of more, class 0 has one and all others the other.
    """
    left, right = torch.zeros(2, 2, 8).bool()
    left[:, :4] = right[:, 2:6] = True
    images, labels = numbered(classes)
    masks = torch.where((labels == 0)[:, None, None], left, right)
    shown = Shown(images, masks, Holes(0, "smooth", True, None, 0.5), labels, 3, 5)
    seen, (hidden, exchanged) = shown(slice(None), CPU), shown.replaced(slice(None), CPU)
    assert torch.equal(seen, shown(torch.arange(N), CPU))
    expected = torch.where(exchanged, shown.partners[:, None, None], torch.arange(N)[:, None, None])
    assert torch.equal(read(seen), expected)  # the smooth fill of one colour is that colour
    partner = masks[shown.partners]
    assert not (exchanged & ~partner).any()  # at the partner's place
    assert not (hidden & ~(masks | partner)).any()
    assert not (hidden & exchanged).any()
    first = labels == 0
    q = 1 / (2 * (classes - 1))
    own, both, theirs = ([(part[first][:, :, where].double().mean().item()) for part in (hidden, exchanged)]
                         for where in (slice(0, 2), slice(2, 4), slice(4, 6)))
    assert own == pytest.approx([1 - q, 0], abs=0.05 if classes == 2 else 0.02)
    assert theirs == pytest.approx([0.5, 0.5], abs=0.05)
    assert both == pytest.approx([(1 - q) / 2, 0.5 - q / 4], abs=0.05)  # equally often, if both are to be shown
    if classes == 2:
        assert 1 - sum(both) == pytest.approx(both[1], abs=0.05)
    assert shown.shares() == pytest.approx([part.double().mean().item() for part in (hidden, exchanged)])


def test_nothing_hot_and_classes_of_one_image():
    labels = torch.tensor([0] * 11 + [1])
    empty = torch.zeros_like(HIDDEN)
    for holes in HOLES:
        assert torch.equal(Shown(IMAGES, empty, holes, labels)(slice(None), CPU), pixels(IMAGES))
    shown = Shown(IMAGES, HIDDEN, "transplants", labels)
    assert shown.partners[:11].tolist() == [11] * 11
    assert shown(slice(0, 2), CPU).shape == (2, 3, 29, 30)
    assert torch.equal(Shown(IMAGES, HIDDEN)(slice(None), CPU), pixels(IMAGES, HIDDEN))
    for one in (labels * 0, None):
        with pytest.raises(ValueError, match="at least two classes"):
            Shown(IMAGES, HIDDEN, "decoys", one)
    decoys = Shown(IMAGES, HIDDEN, "decoys", labels)
    wide = grown(Masks.of(HIDDEN), 1 / 28)
    assert torch.equal(decoys(slice(None), CPU), pixels(IMAGES, wide[:] | wide[decoys.partners]))


@pytest.mark.parametrize(("holes", "said"), [("white", "'transplants', or Holes"), (3, "expected holes to be one of")])
def test_other_holes_are_refused_at_the_door(holes, said):
    state = State(model := new_model(0), sgd(model.parameters(), 0.9, 0))
    images, labels = IMAGES[:, :, :28, :28], torch.arange(12) % 2
    for call in (lambda: train_epoch(state, images, labels, lr=0.01, batch_size=4, seed=0, holes=holes),
                 lambda: masktune_epoch(state, images, labels, lr=0.01, batch_size=4, seed=0, holes=holes)):
        with pytest.raises(ValueError, match=said):
            call()
    for options in ({"fill": "white"}, {"grow": 0.3}, {"grow": float("nan")}, {"own": 2}, {"theirs": -1}):
        with pytest.raises(ValueError, match=f"expected {next(iter(options))} to be"):
            Holes(**options)
    with pytest.raises(ValueError, match="at least two classes"):
        train_epoch(state, images, 0 * labels, lr=0.01, batch_size=4, seed=0, masks=HIDDEN[:, :28, :28], holes="decoys")


class Corner(nn.Module):
    """Answers class 1 where one pixel is bright."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.row, self.column, self.weight = row, column, nn.Parameter(torch.ones(1))

    def forward(self, images):
        bright = images[:, 0, self.row, self.column] * self.weight
        return torch.stack([0.5 - bright, bright - 0.5], 1)


def test_the_swap_test_is_0_of_a_model_that_reads_what_is_hot_and_1_of_one_that_reads_elsewhere():
    labels = torch.arange(300) % 2
    images = torch.full((300, 3, 28, 28), 100, dtype=torch.uint8)
    images[:, :, 2, 2] = images[:, :, 20, 20] = (255 * labels)[:, None].to(torch.uint8)
    masks = torch.zeros(300, 28, 28).bool()
    masks[:, 2, 2] = True
    assert swapped(Corner(2, 2), images, labels, masks) == 0
    assert swapped(Corner(20, 20), images, labels, masks) == 1
    assert infer(Corner(2, 2), images).argmax(1).equal(labels)
    with pytest.raises(ValueError, match="at least two classes"):
        swapped(Corner(2, 2), images, 0 * labels, masks)
    shown = Shown(images, masks, SWAP, labels)
    assert shown.shares() == (0, pytest.approx(9 / 784))


def test_iterations_do_not_grow_what_is_grown(train, run):
    few = slice(0, 64)
    masks = find_masks(run.erm.model, train.images[few])
    again = find_masks(run.erm.model, train.images[few], hidden=masks, holes="transplants")
    assert (again[:] | masks[:]).equal(again[:])
    third = find_masks(run.erm.model, train.images[few], k=50, hidden=again, holes="transplants")  # finds nothing new
    assert third[:].equal(again[:])


def test_an_epoch_is_a_function_of_seed_and_epoch_whatever_is_shown(train):
    def end(holes, seed=0, epoch=0) -> list[float]:
        state = State(model := new_model(0), sgd(model.parameters(), 0.9, 0), epoch=epoch)
        images, labels = train.images[:96], train.labels[:96]
        masks = torch.rand(96, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.2
        train_epoch(state, images, labels, lr=0.01, batch_size=32, seed=seed, masks=masks, holes=holes)
        return model.state_dict()["linear.3.weight"].flatten().tolist()

    ends = [end("black"), end("decoys"), end("transplants"), end("transplants", seed=1), end("transplants", epoch=1)]
    assert len(set(map(tuple, ends))) == 5
    assert end("transplants") == ends[2]


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
