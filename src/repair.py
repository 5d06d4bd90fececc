"""Repair a classifier of your own: `masktune`. What could fail after hours is tried at its door, on eight images."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from . import parallel
from .checkpoint import load_or_run
from .checks import check_count, check_images, check_labels, check_number
from .classifier import Classifier, copied, unwrapped
from .datasets.images import Images, load_dataset
from .device import best_device, room_for
from .inference import evaluating, pixels
from .masking import find_masks
from .report.report import FEW, MANY, Report, hidden_share, scored
from .saliency import suggest_layers
from .seeding import seeded
from .state import State, digest
from .training import epoch_batches, run_epoch, sgd, train_epoch


def masktune(model: nn.Module, data: Images | Dataset | DataLoader, *, layer: str, lr: float, batch_size: int = 128,
             epochs: int = 1, k: float = 2.0, iterations: int = 1, accumulate: bool = False, momentum: float = 0.9,
             weight_decay: float = 1e-4, optimizer: Callable[[list], torch.optim.Optimizer] | None = None,
             mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1),
             reshape_transform: Callable[[Tensor], Tensor] | None = None,
             augment: Callable[[Tensor], Tensor] | None = None, precision: str = "fp32",
             device: torch.device | str | None = None, seed: int = 0, tests: dict | None = None,
             checkpoint: Path | str | None = None) -> tuple[nn.Module, Report]:
    """Repair a trained classifier: masks by its own heat maps, then one epoch on what is left (MaskTune, section 3).

    Returns a repaired copy of the model, in eval mode, and a report. Before anything is trained, all of it is tried
    once on a few images, and the model is scored on all data sets. Under torchrun, the processes work at it together.

    Args:
        model: any classifier, see `Classifier`; it is left as it was. Weights that ask for no gradient stay as they
            are, and so do the statistics of what is in eval mode inside a model in train mode. A model that is in eval
            mode as a whole is trained in train mode, but for BatchNorm whose weights are frozen.
        data: the images that it was trained on: `Images` as `load_folder` makes them, or what `load_dataset` takes.
        layer: the name of the module to be explained, usually the last convolutional block: see `suggest_layers`.
        lr: of the one epoch; the LR with which the training of the model began is a good first try.
        batch_size: images of one update, over all processes.
        k: what is hotter than m + k s is hidden.
        iterations, epochs: of masks, and on the same masks; with `accumulate`, hidden pixels stay hidden.
        momentum, weight_decay: of SGD; or `optimizer`, which makes another one of a list of weights. Its LR is `lr`.
        mean, std: of the normalisation that the model expects.
        reshape_transform: makes maps (B, K, h, w) of the layer's output where that is something else.
        augment: a function of masked images (B, 3, H, W) float in [0, 1] on the device; `seed` sets torch's generators.
        precision: "fp32", or "bf16" for autocast.
        device: that computes; the GPU if there is one. The repaired model is on that of the model given.
        tests: more data sets to be scored before and after, by name; their classes are matched by name.
        checkpoint: a file to resume from; it is written after every epoch.

    Raises:
        TypeError, ValueError: something does not fit, or fails when it is tried; nothing has been trained.
        CheckpointError, OSError: the checkpoint is of something else, or cannot be written.
        FloatingPointError: the loss or the weights are no longer finite.
    """
    for name, count in (("epochs", epochs), ("iterations", iterations), ("batch_size", batch_size)):
        check_count(name, count)
    check_number("seed", seed, seed % 1 == 0, "a whole number")
    parallel.start()
    device = torch.device(device or best_device())
    options = dict(lr=float(lr), batch_size=int(batch_size), precision=precision, augmentation=augment, seed=int(seed))

    def fresh() -> State:
        new = copied(old)
        weights = [weight for weight in new.parameters() if weight.requires_grad]
        return State(new, optimizer(weights) if optimizer else sgd(weights, momentum, weight_decay))

    def advance(state: State) -> dict[str, float]:
        if state.epoch % epochs == 0:
            state.masks = find_masks(state.model, images, k, state.masks if accumulate else None)
            if not FEW <= state.masks.share() <= MANY:
                warnings.warn(hidden_share(state.masks.share()), stacklevel=3)
        loss, accuracy = run_epoch(state, images, labels, masks=state.masks, title="masktune", **options)
        return {"loss": loss, "accuracy": accuracy}

    with torch.inference_mode(False), torch.enable_grad(), torch.cuda.device(device if device.type == "cuda" else -1):
        sets = _data_sets(data, tests or {})
        train = sets["train"]
        old = _working_copy(model, layer, mean, std, reshape_transform).to(device)
        _rehearse(old, model, train, fresh, k, **options)
        before = {}
        for name, one in sets.items():
            with _step(f"the images of {name}, {tuple(one.images.shape)}"):
                before[name] = scored(old, one)
        right = before["train"].average
        if right < min(1, max(0.5, 1.5 / len(train.classes))):
            warnings.warn(f"the model is right on only {right:.1%} of the training images: are mean and std, the size "
                          "of the images and the order of the classes those of its training?", stacklevel=2)
        place = room_for(train.images, device)
        images, labels = train.images.to(place), train.labels.to(place)
        settings = {"layer": old.layer, "epochs": int(epochs), "k": float(k), "iterations": int(iterations),
                    "accumulate": bool(accumulate), "mean": old.mean.flatten().tolist(),
                    "std": old.std.flatten().tolist(), **options,
                    "augmentation": getattr(augment, "__name__", repr(augment))}
        if checkpoint is None:
            state = fresh()
            while state.epoch < epochs * iterations:
                state.finish_epoch(**advance(state))
        else:
            config = settings | {"optimizer": repr(fresh().optimizer), "model": digest(old.state_dict()),
                                 "data": digest([train.labels, train.images[::max(1, len(train) // 1000)]])}
            state = load_or_run(Path(checkpoint).expanduser(), config, int(epochs * iterations), fresh, advance)
        report = Report.of(old, state.model, state.masks, sets, before, settings)
        repaired = state.model.model.eval()
        tensors = ((*part.parameters(), *part.buffers()) for part in (repaired, unwrapped(model)))
        for new, given in zip(*tensors, strict=True):
            new.data = new.data.to(given.device, given.dtype)
            new.grad = None
        return repaired, report


@contextmanager
def _step(name: str, *suggest_for: object) -> Iterator[None]:
    """Turn whatever fails inside into a ValueError that names what was tried, with the layers of a model and images."""
    try:
        yield
    except Exception as error:  # a model, an optimizer and a data set can fail in any way
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        advice = f"; suggest_layers finds {suggest_layers(*suggest_for)}" if suggest_for else ""
        raise ValueError(f"{name}: {kind}{error}{advice}") from error


def _data_sets(data: object, tests: dict) -> dict[str, Images]:
    """The training set as "train" and the test sets by name, their labels mapped to its classes by name."""
    sets: dict[str, Images] = {}
    for name, one in dict(train=data, **tests).items():
        with _step(f"tests[{name!r}]" if sets else "the training set"):
            found = one if isinstance(one, Images) else load_dataset(one)
            check_images(found.images)
            check_labels(found.labels, found.images, len(found.classes), "there are")
            known = sets["train"].classes if sets else found.classes
            sets[name] = found if known == found.classes else found.with_classes(known)
    return sets


def _working_copy(model: nn.Module, *options) -> Classifier:
    """A copy to work on, half precision widened, in the modes in which it is to be trained: see `masktune`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got a {type(model).__name__}")
    if any(isinstance(weight, nn.UninitializedParameter) for weight in model.parameters()):
        raise ValueError("expected a model with weights, got lazy layers that have seen no image yet")
    copy = copied(Classifier(model, *options))
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in copy.parameters()):
        copy.float()  # such weights are too coarse for small updates
    if not copy.training:
        copy.train()
        for part in copy.modules():
            if isinstance(part, _BatchNorm) and not any(weight.requires_grad for weight in part.parameters()):
                part.train(not part.affine)  # one without weights cannot be frozen
    return copy


def _rehearse(model: Classifier, given: nn.Module, data: Images, fresh: Callable[[], State], k: float, *,
              augmentation: Callable | None, batch_size: int, seed: int, **options) -> None:
    """Try everything once, as the repair does it: inference, a heat map, and a step of training on a copy."""
    chosen = torch.linspace(0, len(data) - 1, max(8, parallel.world())).long().unique().tolist()
    images, labels = data.images[chosen], data.labels[chosen]
    seen = pixels(images.to(next(model.parameters()).device))
    with _step(f"the forward pass in eval mode on images {tuple(seen.shape)}"), evaluating(model), torch.no_grad():
        try:
            logits = model(seen)
        except Exception:  # a model's `view` does not stand channels that come last, which is faster
            model.channels_last = False
            logits = model(seen)
    if logits.shape[1] != len(data.classes):
        raise ValueError(f"expected one logit for each of the {len(data.classes)} classes, got a model with "
                         f"{logits.shape[1]}; give it a new last layer, or name all its classes with classes=")
    outputs = 2 * logits[:, 1] if torch.equal(logits[:, 0], -logits[:, 1]) else logits  # a single one was halved
    low, high = outputs.min().item(), outputs.max().item()
    if low >= 0 and (((logits.sum(1) - 1).abs() < 1e-3).all() or low + 0.5 < high <= 1):
        warnings.warn(f"the model's outputs look like probabilities, not logits: they are in [{low:.2f}, {high:.2f}], "
                      "or add up to 1; take the softmax or the sigmoid off its end", stacklevel=3)
    if model.grey and not all((part == part[:, :1]).all() for part in data.images.split(1000)):
        raise ValueError("the model takes one channel, and there are coloured images; make them grey first")
    with _step(f"the heat map of layer {model.layer!r}", model, images):
        masks = find_masks(model, images, k)
    with _step("the optimizer, which optimizer= makes of a list of weights"):
        trial = fresh()
        if len({group["lr"] for group in trial.optimizer.param_groups}) > 1:
            raise ValueError("expected parameter groups that share one LR, which lr= sets; got several")
    with _step("augment= on a batch"), seeded(seed, "rehearsal"):
        made = augmentation(seen.clone()) if augmentation and not hasattr(augmentation, "draw") else seen
        low, high = made.min().item(), made.max().item()
        if not made.is_floating_point() or made.shape[:2] != seen.shape[:2] or not (low >= -1 and high <= 2):
            raise ValueError(f"expected floats in [0, 1], but for some noise, got {made.dtype} {tuple(made.shape)} in "
                             f"[{low:.3g}, {high:.3g}]; normalisation is for mean= and std=")
    with _step("a training step"):
        few = max(parallel.world(), min(map(len, epoch_batches(len(data), batch_size, 0, 0))))
        before = [getattr(weight.grad, "_version", None) for weight in given.parameters()]
        train_epoch(trial, images[:few], labels[:few], masks=masks[:few], augmentation=augmentation, batch_size=few,
                    seed=seed, **options)
        if before != [getattr(weight.grad, "_version", None) for weight in given.parameters()]:
            raise ValueError("expected a copy on weights of its own, got gradients in the model given: by its forward?")
        if all(torch.equal(new, old) for new, old in zip(trial.model.parameters(), model.parameters(), strict=True)):
            raise ValueError("expected weights to move, got none that did: the model runs under torch.no_grad, the "
                             "optimizer has other weights than it was given, or the LR is too small")
