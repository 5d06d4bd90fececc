"""How a layer's output is laid out over the image: tested by gradients, not guessed from names or shapes.

Of a true map, what a position sees lies around that position. So take a few positions in each quarter of the map:
of the gradient of each with respect to the image, most of the energy must lie in the same quarter of the image.
Attention matrices, keys and channel attention have the proportions of maps now and then, but do not follow.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .seeding import generator

PREFIXES = (0, 1, 2, 4, 5)  # tokens before those of the grid: a class token, one for distillation, four registers
OWN_QUARTER = 0.4  # of the energy of each gradient, on average; 0.25 is chance
Reading = Callable[[Tensor], Tensor]  # makes maps (B, K, h, w) of an output


def readings(output: Tensor, size: tuple[int, int]) -> dict[str, Reading]:
    """The ways in which an output of images of (height, width) pixels could be read as maps, by name."""
    found: dict[str, Reading] = {}
    if output.dim() == 4:
        found["(B, K, h, w)"] = lambda maps: maps
        found["(B, h, w, K)"] = lambda maps: maps.permute(0, 3, 1, 2)
    elif output.dim() == 3:
        for prefix in PREFIXES:
            n = output.shape[1] - prefix
            rows = round(math.sqrt(max(0, n) * size[0] / size[1]))
            if rows and n % rows == 0:
                name = f"(B, {prefix} + h w, K)" if prefix else "(B, h w, K)"
                found[name] = lambda tokens, prefix=prefix, rows=rows: tokens[:, prefix:].transpose(1, 2).unflatten(
                    2, (rows, -1))
    return {name: read for name, read in found.items()  # of several positions a side, but hardly more than pixels
            if all(2 <= side <= pixels + 4 for side, pixels in zip(read(output).shape[2:], size, strict=True))}


def probe(size: tuple[int, int], device: torch.device) -> Tensor:
    """Two smooth random pictures (2, 3, height, width) in [0, 1], always the same."""
    draw = generator(0, "layout")
    coarse = torch.rand(2, 3, 6, 6, generator=draw, device="cpu", dtype=torch.float32)  # whatever the defaults are
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1).to(device)


def outputs_of(model: nn.Module, layers: dict[str, nn.Module], images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What layers give for images, with the graph back to these, of layers that are called but once; and the logits.

    They are in the order in which they are done: a block after its parts.
    """
    calls: dict[str, list] = {}

    def keep(name: str, output: object) -> Tensor | None:
        calls.setdefault(name, []).append(output)
        return output.clone() if isinstance(output, Tensor) else None  # the next layer may work in place

    handles = [layer.register_forward_hook(lambda _layer, _inputs, output, name=name: keep(name, output))
               for name, layer in layers.items()]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: made[0] for name, made in calls.items() if len(made) == 1 and isinstance(made[0], Tensor)
            and made[0].requires_grad and made[0].is_floating_point() and made[0].shape[:1] == images.shape[:1]}, logits


def follows_quarters(maps: Tensor, images: Tensor) -> tuple[float, float]:
    """What share of some positions see most in their own quarter of the image, and the mean share that they see there.

    They lie an eighth and a quarter of the side from the corners, since tokens in another order may pass at one of the
    two; on maps of less than 8x8, where a quarter is near the middle, an eighth.
    """
    height, width = maps.shape[2:]
    draw = generator(0, "layout", "projection")
    projection = torch.randn(maps.shape[1], generator=draw, device="cpu", dtype=torch.float32)
    projection = projection.to(maps.device, maps.dtype)
    right, shares = 0, []
    for quarter, part in product(range(4), (8, 4) if min(height, width) >= 8 else (8,)):
        i = height // part if quarter < 2 else height - 1 - height // part
        j = width // part if quarter % 2 == 0 else width - 1 - width // part
        seen = (maps[:, :, i, j] * projection).sum()
        gradient, = torch.autograd.grad(seen, images, retain_graph=True, allow_unused=True)
        if gradient is None:
            return 0.0, 0.0
        gradient = gradient.float() / gradient.float().abs().amax().clamp(min=1e-37)  # its square may underflow
        energy = gradient.square().sum((0, 1))
        halves = energy.split((energy.shape[0] // 2, energy.shape[0] - energy.shape[0] // 2))
        parts = torch.stack([part.sum() for half in halves
                             for part in half.split((half.shape[1] // 2, half.shape[1] - half.shape[1] // 2), dim=1)])
        right += int(parts.argmax() == quarter and parts[quarter] > 0)
        shares.append((parts[quarter] / parts.sum().clamp(min=1e-30)).item())
    return right / len(shares), sum(shares) / len(shares)


def reading_of(output: Tensor, images: Tensor) -> tuple[str, Reading] | None:
    """The reading that follows the quarters of the image, with its name; None: the output is no map of the image.

    output: has a graph back to images (B, 3, H, W), which ask for a gradient.
    """
    best = None
    for name, read in readings(output, tuple(images.shape[2:])).items():
        maps = read(output)
        right, share = follows_quarters(maps, images)
        rank = (maps.shape[2] * images.shape[3] == maps.shape[3] * images.shape[2], share)  # 16 tokens: 4x4
        if right == 1 and share > OWN_QUARTER and (best is None or rank > best[0]):
            best = (rank, name, read)
    return best and best[1:]


def framing(output: Tensor, maps: Tensor, images: Tensor) -> str:
    """What a model does to the frame of its images before a layer, "" if nothing: else maps do not lie over them.

    output: of the layer, with its graph back to two images (2, 3, H, W) that differ everywhere; maps: (2, K, h, w), how
    it is read.
    """
    gradient, = torch.autograd.grad(output.square().sum(), images, retain_graph=True)
    for name, axis in (("rows", 2), ("columns", 3)):
        seen = torch.nonzero((gradient.movedim(axis, 0).flatten(1) != 0).any(1)).flatten().tolist() or [0]
        blind = images.shape[axis] - (seen[-1] - seen[0] + 1)  # at the ends: between them, a stride may leave gaps
        if blind > images.shape[axis] / maps.shape[axis] + 1:  # the last ones may not fill a position
            return f"of {images.shape[axis]} {name} of pixels it never sees {blind}: the model crops its images"
        lines = maps.movedim(axis, 0)
        if blank := int((lines[:, 0] == lines[:, 1]).flatten(1).all(1).sum()):
            return f"{blank} of its {len(lines)} {name} are the same for any image: the model pads its images"
    return ""
