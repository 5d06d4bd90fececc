"""MaskTune (NeurIPS 2022, section 3): hide what the classifier looks at, and fine-tune it one epoch on what is left."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src import parallel
from src.checks import check_images, check_masks
from src.masks import Masks
from src.saliency import xgradcam
from src.seeding import generator
from src.state import State
from src.training import folded, inference_batch, pixels, train_epoch

RANDOM_SIDES = (2, 14)  # pixels, both ends included; the paper's RandMask


def hottest(heatmaps: Tensor, k: float = 2.0) -> Tensor:
    """Return the pixels to hide: those hotter than m + k s, m and s over the image's positive pixels (section 3).

    heatmaps: (B, H, W) >= 0 -> (B, H, W) bool, True = hidden. s is the population's (ddof 0). A map without a positive
    pixel hides nothing.

    Raises:
        ValueError: a map is not finite.
    """
    total = heatmaps.sum((1, 2), keepdim=True)
    if not total.isfinite().all():
        raise ValueError("heat maps hold NaN or infinity; the weights or the images that they came from are not finite")
    positive = heatmaps > 0
    counted = positive.to(heatmaps.dtype)  # converted once: sums of bool are slow
    count = counted.sum((1, 2), keepdim=True).clamp(min=1)
    mean = total / count
    variance = ((heatmaps - mean) ** 2 * counted).sum((1, 2), keepdim=True) / count
    return positive & (heatmaps > mean + k * variance.sqrt())


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
    model = folded(model)
    masks = Masks((len(images), *images.shape[2:]), device=images.device)
    starts = parallel.share(range(0, len(images), batch_size))
    for start in tqdm(starts, desc="masks", leave=False, position=0, disable=parallel.rank() > 0):
        batch = slice(start, start + batch_size)
        before = None if hidden is None else hidden[batch].to(device)
        found = hottest(xgradcam(model, pixels(images[batch].to(device), before)), k)
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


def masktune_epoch(state: State, images: Tensor, labels: Tensor, *, lr: float, batch_size: int, seed: int,
                   k: float = 2.0, accumulate: bool = False, **options: object) -> tuple[float, float]:
    """Run one iteration of MaskTune: masks by the model as it stands, then exactly one epoch on the masked images.

    The model and the optimizer go on from where ERM left them. `images` (N, 3, H, W) uint8 are those that ERM was
    trained on; with `accumulate`, what earlier iterations hid stays hidden. `options` are those of `train_epoch`.
    Returns the epoch's mean loss and accuracy; the masks are in `state.masks`.
    """
    if state.masked_epoch != state.epoch:  # else the epoch was cut off, and goes on with the masks that it began with
        state.mask(find_masks(state.model, images, k, state.masks if accumulate else None))
    return train_epoch(state, images, labels, masks=state.masks, lr=lr, batch_size=batch_size, seed=seed, **options)


def randmask_epoch(state: State, images: Tensor, labels: Tensor, *, lr: float, batch_size: int, seed: int,
                   **options: object) -> tuple[float, float]:
    """Run the paper's control: the same epoch, with masks in random places; arguments as of `masktune_epoch`."""
    if state.masked_epoch != state.epoch:
        state.mask(random_masks(len(images), images.shape[-1], seed, state.epoch, images.device))
    return train_epoch(state, images, labels, masks=state.masks, lr=lr, batch_size=batch_size, seed=seed, **options)
