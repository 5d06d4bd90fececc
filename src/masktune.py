"""MaskTune (NeurIPS 2022, section 3): hide what the classifier looks at, and fine-tune it one epoch on what is left."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.saliency import xgradcam
from src.seeding import generator
from src.training import pixels, train_epoch

RANDOM_SIDES = (2, 14)  # pixels, both ends included; the paper's RandMask


def hottest(heatmaps: Tensor, k: float = 2.0) -> Tensor:
    """Return the pixels to hide: those hotter than m + k s, m and s over the image's positive pixels (section 3).

    heatmaps: (B, H, W) >= 0 -> (B, H, W) bool, True = hidden. s is the population's (ddof 0). A map without a positive
    pixel hides nothing.
    """
    positive = heatmaps > 0
    count = positive.sum((1, 2), keepdim=True).clamp(min=1)
    mean = heatmaps.sum((1, 2), keepdim=True) / count
    variance = ((heatmaps - mean) ** 2 * positive).sum((1, 2), keepdim=True) / count
    return positive & (heatmaps > mean + k * variance.sqrt())


def find_masks(model: nn.Module, images: Tensor, k: float = 2.0, hidden: Tensor | None = None,
               batch_size: int = 250) -> Tensor:
    """Return what MaskTune hides in each image, by the model's XGradCAM for its predicted class.

    images: (N, 3, H, W) uint8; hidden: (N, H, W) bool, what earlier iterations hid, stays hidden and is not looked at.
    Returns (N, H, W) bool, True = hidden, on the device of the images. The model is left as it was.
    """
    device = next(model.parameters()).device
    masks = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
    for start in tqdm(range(0, len(images), batch_size), desc="masks", leave=False, position=0):
        batch = slice(start, start + batch_size)
        before = None if hidden is None else hidden[batch].to(device)
        found = hottest(xgradcam(model, pixels(images[batch].to(device), before)), k)
        masks[batch] = found if before is None else found | before
    return masks


def random_masks(n: int, side: int, seed: int, epoch: int) -> Tensor:
    """Return the masks of RandMask, the paper's control: (n, side, side) bool, one square of True per image.

    Its side is drawn from 2..14, its centre uniformly over the image; the square is clipped at the border. A pure
    function of the arguments.
    """
    draw = generator(seed, "randmask", epoch)
    sides = torch.randint(RANDOM_SIDES[0], RANDOM_SIDES[1] + 1, (n, 1), generator=draw)
    first = torch.randint(0, side, (n, 2), generator=draw) - sides // 2  # (row, column) of the corner
    line = torch.arange(side)
    inside = (line >= first[..., None]) & (line < (first + sides)[..., None])  # (n, 2, side): rows, columns
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def masktune(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *, lr: float,
             batch_size: int, seed: int, epoch: int, k: float = 2.0, hidden: Tensor | None = None
             ) -> tuple[Tensor, float, float]:
    """Run one iteration of MaskTune: masks by the model as it stands, then exactly one epoch on the masked images.

    The model and the optimizer go on from where ERM left them. `images` (N, 3, H, W) uint8 are those that ERM was
    trained on; `hidden` is what earlier iterations hid, where hidden pixels accumulate; `epoch` numbers the epoch, for
    the order of the samples. Returns the masks (N, H, W) bool and the epoch's mean loss and accuracy.
    """
    masks = find_masks(model, images, k, hidden)
    loss, accuracy = train_epoch(model, optimizer, images, labels, masks=masks, lr=lr, batch_size=batch_size, seed=seed,
                                 epoch=epoch)
    return masks, loss, accuracy
