"""MaskTune (NeurIPS 2022, section 3): hide what the classifier looks at, and fine-tune it one epoch on what is left.

`masktune` repairs a classifier of your own; the rest is what it is made of, in the order in which it happens.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import parallel
from .checks import check_images, check_masks
from .datasets.images import Images
from .device import best_device
from .inference import inference_batch, pixels
from .masks import Masks
from .models import Classifier
from .repair import Report
from .saliency import heatmaps
from .seeding import generator
from .state import State
from .training import check_epoch, run_epoch, sgd

RANDOM_SIDES = (2, 14)  # pixels, both ends included; the paper's RandMask


def hottest(heat: Tensor, k: float = 2.0) -> Tensor:
    """Return the pixels to hide: those hotter than m + k s, m and s over the image's positive pixels (section 3).

    heat: (B, H, W) >= 0 -> (B, H, W) bool, True = hidden. s is the population's (ddof 0). A map without a positive
    pixel hides nothing.

    Raises:
        ValueError: a map is not finite.
    """
    total = heat.sum((1, 2), keepdim=True)
    if not total.isfinite().all():
        raise ValueError("expected finite heat maps, got NaN or infinity; the weights or the images are not finite")
    positive = heat > 0
    counted = positive.to(heat.dtype)  # converted once: sums of bool are slow
    count = counted.sum((1, 2), keepdim=True).clamp(min=1)
    mean = total / count
    variance = ((heat - mean) ** 2 * counted).sum((1, 2), keepdim=True) / count
    return positive & (heat > mean + k * variance.sqrt())


def find_masks(model: nn.Module, images: Tensor, k: float = 2.0, hidden: Masks | None = None,
               batch_size: int | None = None) -> Masks:
    """Return what MaskTune hides in each image, by the model's XGradCAM for its predicted class.

    images: (N, 3, H, W) uint8; hidden: what earlier iterations hid, stays hidden and is not looked at. The masks are on
    the device of the images. The model is left as it was.
    """
    check_images(images)
    check_masks(hidden, images)
    batch_size = batch_size or inference_batch(images)
    device = next(model.parameters()).device
    masks = Masks((len(images), *images.shape[2:]), device=images.device)
    starts = parallel.mine(range(0, len(images), batch_size))
    for start in tqdm(starts, desc="masks", leave=False, position=0, disable=not parallel.bars()):
        batch = slice(start, start + batch_size)
        before = None if hidden is None else hidden[batch].to(device)
        heat = heatmaps(model, pixels(images[batch].to(device), before), model.saliency_layer)
        found = hottest(heat, k)
        masks[batch] = (found if before is None else found | before).to(images.device)
    parallel.total(masks.bits)  # each process has set its own, all others are 0
    return masks


def random_masks(n: int, side: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Masks:
    """Return the masks of RandMask, the paper's control: one square in each of n images of side x side pixels.

    Its side is drawn from 2..14, its centre uniformly over the image; the square is clipped at the border. A pure
    function of the arguments.
    """
    draw = generator(seed, "randmask", epoch)
    sides = torch.randint(RANDOM_SIDES[0], RANDOM_SIDES[1] + 1, (n, 1), generator=draw)
    first = torch.randint(0, side, (n, 2), generator=draw) - sides // 2  # (row, column) of the corner
    line = torch.arange(side)
    inside = (line >= first[..., None]) & (line < (first + sides)[..., None])  # (n, 2, side): rows, columns
    masks = Masks((n, side, side), device=device)
    for chunk in masks.chunks():
        masks[chunk] = (inside[chunk, 0, :, None] & inside[chunk, 1, None, :]).to(device)
    return masks


def masktune_epoch(state: State, images: Tensor, labels: Tensor, *, batch_size: int, k: float = 2.0,
                   accumulate: bool = False, precision: str = "fp32", **options) -> tuple[float, float]:
    """Run one iteration of MaskTune: masks by the model as it stands, then exactly one epoch on the masked images.

    The model and the optimizer go on from where ERM left them. `images` (N, 3, H, W) uint8 are those that ERM was
    trained on; with `accumulate`, what earlier iterations hid stays hidden. `options` are those of `train_epoch`: `lr`
    and `seed` at least. Returns the epoch's mean loss and accuracy; the masks are in `state.masks`.
    """
    check_epoch(state, images, labels, batch_size, precision)
    state.masks = find_masks(state.model, images, k, state.masks if accumulate else None)
    return run_epoch(state, images, labels, masks=state.masks, batch_size=batch_size, precision=precision, **options)


def randmask_epoch(state: State, images: Tensor, labels: Tensor, *, batch_size: int, seed: int, precision: str = "fp32",
                   **options) -> tuple[float, float]:
    """Run the paper's control: the same epoch, with masks in random places; arguments as of `masktune_epoch`."""
    check_epoch(state, images, labels, batch_size, precision)
    state.masks = random_masks(len(images), images.shape[-1], seed, state.epoch, images.device)
    return run_epoch(state, images, labels, masks=state.masks, batch_size=batch_size, seed=seed, precision=precision,
                     **options)


def masktune(model: nn.Module, data: Images, *, layer: str, lr: float, batch_size: int = 128, k: float = 2.0,
             iterations: int = 1, accumulate: bool = False, momentum: float = 0.9, weight_decay: float = 1e-4,
             mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1), seed: int = 0,
             tests: dict[str, Images] | None = None) -> tuple[nn.Module, Report]:
    """Repair a trained classifier: masks by its own heat maps, then one epoch on what is left (MaskTune, section 3).

    Args:
        model: any classifier (B, 3, H, W) -> (B, classes); it is left as it was.
        data: the images that it was trained on.
        layer: the name of the module to be explained, usually the last convolutional block; see `Classifier`.
        lr: of the one epoch, with SGD; the LR with which the training of the model began is a good first try.
        k: what is hotter than m + k s is hidden.
        iterations: of masks and an epoch; with `accumulate`, hidden pixels stay hidden.
        mean, std: of the normalisation that the model expects.
        tests: more data sets to be scored before and after, by name.

    Returns:
        A repaired copy of the model, in eval mode, and a report.

    Raises:
        ValueError: the layer does not exist or gives no maps, or the data do not fit the model.
    """
    if iterations < 1:
        raise ValueError(f"expected at least 1 iteration, got {iterations}")
    device = best_device()
    old = Classifier(copy.deepcopy(model), layer, mean, std).to(device)
    new = copy.deepcopy(old)
    images, labels = data.images.to(device), data.labels.to(device)
    state = State(new, sgd(new, momentum, weight_decay))
    for _ in range(iterations):
        state.finish_epoch(loss=masktune_epoch(state, images, labels, lr=lr, batch_size=batch_size, seed=seed, k=k,
                                               accumulate=accumulate)[0])
    return new.model.eval(), Report.of(old, new, state.masks, data, tests or {})
