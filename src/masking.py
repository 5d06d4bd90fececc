"""What is hidden (MaskTune, NeurIPS 2022, section 3): the hottest pixels of each image; or the paper's control."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import parallel
from .checks import check_number
from .holes import Holes, Shown, holes_of
from .inference import inference_batch
from .masks import Masks
from .saliency import heatmaps, reader
from .seeding import generator
from .state import State
from .training import check_epoch, train_epoch

MOST = 5  # iterations, where it is not said how many
SPOT = 0.8  # of the images of a class, in which one spot is hot: a shortcut in one place, or a subject that never moves
RANDOM_SIDES = (2, 14)  # pixels of 28, both ends included; the paper's RandMask


def hottest(heat: Tensor, k: float = 2.0) -> Tensor:
    """Return the pixels to hide: those hotter than m + k s, m and s over the image's positive pixels (section 3).

    heat: (B, H, W) >= 0 -> (B, H, W) bool, True = hidden. s is the population's (ddof 0). A map without a positive
    pixel hides nothing.
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
               batch_size: int | None = None, guesses: Tensor | None = None, holes: str | Holes = "black") -> Masks:
    """Return what MaskTune hides in each image, by the model's XGradCAM for its predicted class.

    images: (N, 3, H, W) uint8; hidden: what earlier iterations found, which stays and is not looked at, hidden as
    `holes` have it; guesses: (N,) int64 zeros, into which the predicted classes are written. The masks are on the
    device of the images. The model is left as it was.
    """
    holes = holes_of(holes)
    shown = Shown(images, hidden, Holes(holes.grow, holes.fill))  # nothing of other images: where does it look in this?
    check_number("k", k, k >= 0, "a finite number of standard deviations, not negative")
    batch_size = batch_size or inference_batch(images)
    device = next(model.parameters()).device
    masks = Masks((len(images), *images.shape[2:]), device=images.device)
    read = reader(model, model.saliency_layer, tuple(images.shape[2:]))
    starts = parallel.mine(range(0, len(images), batch_size))
    for start in tqdm(starts, desc="masks", leave=False, position=0, disable=not parallel.bars()):
        batch = slice(start, start + batch_size)
        heat, classes = heatmaps(model, shown(batch, device), model.saliency_layer, read)
        found = hottest(heat, k).to(images.device)
        if guesses is not None:
            guesses[batch] = classes.to(guesses.device)
        masks[batch] = found if hidden is None else found | hidden[batch].to(images.device)
    parallel.total(masks.bits)  # each process has set its own, all others are 0
    if guesses is not None:
        parallel.total(guesses)
    return masks


def spots(masks: Masks, labels: Tensor, known: Masks | None = None) -> dict[int, tuple[int, int]]:
    """Of each class, the place (row, column) that is hot in most of its images, if it is in `SPOT` of them.

    masks: (N, H, W), labels: (N,) int64; known: what was found before, not counted again.
    """
    found = {}
    for label in labels.unique().tolist():
        often, before = (one.mean((labels == label).to(one.bits.device)).cpu() if one else 0 for one in (masks, known))
        new = often - before
        if new.max() >= SPOT:
            found[label] = divmod(int(new.argmax()), masks.shape[2])
    return found


def random_masks(n: int, size: int | tuple[int, int], seed: int, epoch: int, device: torch.device | str = "cpu"
                 ) -> Masks:
    """Return the masks of RandMask, the paper's control: one square in each of n images.

    size: pixels of a side, or (height, width). The square's side is drawn from 2..14 in images of 28 pixels, and in
    proportion to the shorter side of others; its centre uniformly over the image; it is clipped at the border. A pure
    function of the arguments.
    """
    height, width = lengths = (size, size) if isinstance(size, int) else tuple(size)
    smallest, largest = (max(1, round(side * min(lengths) / 28)) for side in RANDOM_SIDES)
    draw = generator(seed, "randmask", epoch)
    sides = torch.randint(smallest, largest + 1, (n, 1), generator=draw, device="cpu")
    centres = torch.randint(0, max(lengths), (n, 2), generator=draw, device="cpu")
    centres = centres * torch.tensor(lengths) // max(lengths)
    first = centres - sides // 2  # (row, column) of the corner
    rows, columns = ((torch.arange(length) >= first[:, [i]]) & (torch.arange(length) < first[:, [i]] + sides)
                     for i, length in enumerate(lengths))
    masks = Masks((n, height, width), device=device)
    for chunk in masks.chunks():
        masks[chunk] = (rows[chunk, :, None] & columns[chunk, None, :]).to(device)
    return masks


def masktune_epoch(state: State, images: Tensor, labels: Tensor, *, k: float = 2.0, accumulate: bool = False,
                   holes: str | Holes = "black", **options) -> tuple[float, float]:
    """Run one iteration of MaskTune: masks by the model as it stands, then exactly one epoch on the masked images.

    The model and the optimizer go on from where ERM left them. `images` (N, 3, H, W) uint8 are those that ERM was
    trained on; with `accumulate`, what earlier iterations found stays hidden; `holes`: what is shown there. `options`
    are those of `train_epoch`: `lr`, `batch_size` and `seed` at least. Returns the epoch's mean loss and accuracy.
    """
    check_epoch(state, images, labels, holes=holes, **options)
    state.masks = find_masks(state.model, images, k, state.masks if accumulate else None, holes=holes)
    return train_epoch(state, images, labels, masks=state.masks, holes=holes, **options)


def randmask_epoch(state: State, images: Tensor, labels: Tensor, *, seed: int, **options) -> tuple[float, float]:
    """Run the paper's control: the same epoch, with masks in random places; arguments as in `masktune_epoch`."""
    check_epoch(state, images, labels, **options)
    state.masks = random_masks(len(images), tuple(images.shape[2:]), seed, state.epoch, images.device)
    return train_epoch(state, images, labels, masks=state.masks, seed=seed, **options)
