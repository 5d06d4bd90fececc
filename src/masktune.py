"""MaskTune (NeurIPS 2022, section 3): hide what the classifier looks at, and fine-tune it one epoch on what is left.

`masktune` repairs a classifier of your own; the rest is what it is made of, in the order in which it happens.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import parallel
from .checkpoint import load_or_run
from .checks import check_count, check_images, check_masks, check_number, check_threshold
from .classifier import copied, unwrapped
from .datasets.images import Images
from .device import best_device, room_for
from .inference import inference_batch, pixels
from .masks import Masks
from .rehearsal import as_given, data_sets, first_scores, rehearse, working_copy
from .repair import FEW, MANY, Report, hidden_share
from .saliency import heatmaps
from .seeding import generator
from .state import State, digest
from .training import check_epoch, run_epoch, sgd

RANDOM_SIDES = (2, 14)  # pixels of 28, both ends included; the paper's RandMask


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
    check_threshold(k)
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
    sides = torch.randint(smallest, largest + 1, (n, 1), generator=draw)
    centres = torch.randint(0, max(lengths), (n, 2), generator=draw) * torch.tensor(lengths) // max(lengths)
    first = centres - sides // 2  # (row, column) of the corner
    rows, columns = ((torch.arange(length) >= first[:, [i]]) & (torch.arange(length) < first[:, [i]] + sides)
                     for i, length in enumerate(lengths))
    masks = Masks((n, height, width), device=device)
    for chunk in masks.chunks():
        masks[chunk] = (rows[chunk, :, None] & columns[chunk, None, :]).to(device)
    return masks


def masktune_epoch(state: State, images: Tensor, labels: Tensor, *, batch_size: int, k: float = 2.0,
                   accumulate: bool = False, precision: str = "fp32", **options) -> tuple[float, float]:
    """Run one iteration of MaskTune: masks by the model as it stands, then exactly one epoch on the masked images.

    The model and the optimizer go on from where ERM left them. `images` (N, 3, H, W) uint8 are those that ERM was
    trained on; with `accumulate`, what earlier iterations hid stays hidden. `options` are those of `train_epoch`: `lr`
    and `seed` at least. Returns the epoch's mean loss and accuracy; the masks are in `state.masks`.
    """
    check_epoch(state, images, labels, batch_size, precision, **options)
    state.masks = find_masks(state.model, images, k, state.masks if accumulate else None)
    return run_epoch(state, images, labels, masks=state.masks, batch_size=batch_size, precision=precision, **options)


def randmask_epoch(state: State, images: Tensor, labels: Tensor, *, batch_size: int, seed: int, precision: str = "fp32",
                   **options) -> tuple[float, float]:
    """Run the paper's control: the same epoch, with masks in random places; arguments as of `masktune_epoch`."""
    check_epoch(state, images, labels, batch_size, precision, **options)
    state.masks = random_masks(len(images), tuple(images.shape[2:]), seed, state.epoch, images.device)
    return run_epoch(state, images, labels, masks=state.masks, batch_size=batch_size, seed=seed, precision=precision,
                     **options)


def masktune(model: nn.Module, data: Images | Dataset | DataLoader, *, layer: str, lr: float, batch_size: int = 128,
             epochs: int = 1, k: float = 2.0, iterations: int = 1, accumulate: bool = False, momentum: float = 0.9,
             weight_decay: float = 1e-4, optimizer: Callable[[list], torch.optim.Optimizer] | None = None,
             mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1),
             reshape_transform: Callable[[Tensor], Tensor] | None = None,
             augment: Callable[[Tensor], Tensor] | None = None, precision: str = "fp32",
             device: torch.device | str | None = None, seed: int = 0, tests: dict | None = None,
             checkpoint: Path | str | None = None) -> tuple[nn.Module, Report]:
    """Repair a trained classifier: masks by its own heat maps, then one epoch on what is left (MaskTune, section 3).

    Before anything is trained, all of it is tried once on a few images, and the model is scored on all data sets. Under
    torchrun, the processes work at it together.

    Args:
        model: any classifier, see `Classifier`; it is left as it was. Weights that ask for no gradient stay as they
            are, and so do the statistics of what is in eval mode inside a model in train mode. A model that is in eval
            mode as a whole is trained in train mode, but for BatchNorm whose weights are frozen.
        data: the images that it was trained on: `Images` as `load_folder` and `load_dataset` make them, or what the
            latter takes.
        layer: the name of the module to be explained, usually the last convolutional block: see `suggest_layers`.
        lr: of the one epoch; the LR with which the training of the model began is a good first try.
        batch_size: images of one update, over all processes.
        epochs: on the same masks; the paper has 1.
        k: what is hotter than m + k s is hidden.
        iterations: of masks and epochs; with `accumulate`, hidden pixels stay hidden.
        momentum, weight_decay: of SGD; or `optimizer`, which makes another one of a list of weights. Its LR is `lr`.
        mean, std: of the normalisation that the model expects.
        reshape_transform: makes maps (B, K, h, w) of the layer's output where that is something else.
        augment: a function of masked images (B, 3, H, W) float in [0, 1] on the device; it may draw from torch's own
            generators, which `seed` sets.
        precision: "fp32", or "bf16" for autocast.
        device: that computes; the GPU if there is one. The repaired model is on that of the model given.
        tests: more data sets to be scored before and after, by name; their classes are matched by name.
        checkpoint: a file to resume from; it is written after every epoch.

    Returns:
        A repaired copy of the model, in eval mode, and a report.

    Raises:
        TypeError, ValueError: something does not fit; nothing has been trained.
        CheckpointError: the checkpoint is of something else, or cannot be written.
        FloatingPointError: the loss or the weights are no longer finite.
    """
    check_number("seed", seed, seed % 1 == 0, "a whole number")
    check_count("epochs", epochs)
    check_count("iterations", iterations)
    check_count("batch_size", batch_size)
    check_threshold(k)
    check_number("lr", lr, lr > 0, "a positive, finite number")
    parallel.start()
    device = torch.device(device or best_device())
    sets = data_sets(data, tests or {})
    train = sets["train"]
    old = working_copy(model, layer, mean, std, reshape_transform).to(device)
    options = dict(lr=float(lr), batch_size=int(batch_size), precision=precision, augmentation=augment,
                   seed=int(seed))
    settings = {"layer": old.layer, "epochs": int(epochs), "k": float(k), "iterations": int(iterations),
                "accumulate": bool(accumulate), "mean": old.mean.flatten().tolist(), "std": old.std.flatten().tolist(),
                **options, "augmentation": getattr(augment, "__name__", repr(augment))}

    def new_optimizer(classifier: nn.Module) -> torch.optim.Optimizer:
        weights = [weight for weight in classifier.parameters() if weight.requires_grad]
        return optimizer(weights) if optimizer else sgd(weights, momentum, weight_decay)

    def fresh() -> State:
        new = copied(old)
        return State(new, new_optimizer(new))

    def advance(state: State) -> dict[str, float]:
        iteration, epoch = divmod(state.epoch, epochs)
        if epoch == 0:
            state.masks = find_masks(state.model, images, k, state.masks if accumulate else None)
            if not FEW <= state.masks.share() <= MANY:
                warnings.warn(hidden_share(state.masks.share()), stacklevel=3)
        title = f"iteration {iteration + 1}, epoch {epoch + 1}" if iterations * epochs > 1 else "masktune"
        loss, accuracy = run_epoch(state, images, labels, masks=state.masks, title=title, **options)
        return {"loss": loss, "accuracy": accuracy}

    with torch.enable_grad(), torch.cuda.device(device if device.type == "cuda" else -1):
        rehearse(old, train, new_optimizer, **options)
        before = first_scores(old, sets)
        images, labels = (tensor.to(room_for(train.images, device)) for tensor in (train.images, train.labels))
        if checkpoint is None:
            state = fresh()
            while state.epoch < epochs * iterations:
                state.finish_epoch(**advance(state))
        else:
            config = settings | {"optimizer": repr(new_optimizer(old)), "model": digest(old.state_dict()),
                                 "data": digest([train.labels, train.images[::max(1, len(train) // 1000)]])}
            state = load_or_run(Path(checkpoint).expanduser(), config, int(epochs * iterations), fresh, advance)
        report = Report.of(old, state.model, state.masks, sets, before, settings)
        return as_given(state.model.model, unwrapped(model)), report
