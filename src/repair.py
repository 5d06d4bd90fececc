"""Repair a classifier of your own: `masktune`, or look first: `preview`. What could fail late is tried at the door."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import parallel
from .checkpoint import load_or_run
from .checks import check_count, check_number
from .classifier import Classifier, copied, unwrapped
from .datasets.images import Images
from .device import best_device, computing_on, room_for
from .door import opened, rehearse, step
from .holes import Holes, holes_of
from .inference import Score, infer
from .masking import find_masks
from .masks import Masks
from .report.report import FEW, MANY, Report, hidden_share, least_right, scored
from .state import State, contents, digest
from .training import sgd, train_epoch


def masktune(model: nn.Module, data: Images | Dataset | DataLoader, *, layer: str, lr: float, batch_size: int = 128,
             epochs: int = 1, k: float = 2.0, iterations: int = 1, accumulate: bool = False,
             holes: str | Holes = "black", momentum: float = 0.9, weight_decay: float = 1e-4,
             optimizer: Callable[[list], torch.optim.Optimizer] | None = None,
             loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, mean: Sequence[float] | None = None,
             std: Sequence[float] | None = None, reshape_transform: Callable[[Tensor], Tensor] | None = None,
             augment: Callable[[Tensor], Tensor] | None = None, precision: str = "fp32",
             device: torch.device | str | None = None, seed: int = 0, tests: dict | None = None, scores: bool = True,
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
        lr: of the one epoch; begin with that at which the training of the model began, and take the one of a few around
            it that keeps accuracy on validation images.
        batch_size: images of one update, over all processes.
        k: what is hotter than m + k s is hidden.
        iterations, epochs: of masks, and on the same masks; with `accumulate`, hidden pixels stay hidden.
        grow, decoys, fill: holes that give nothing away (ours, see `holes`): by what share of the side masks are
            widened; whether each image also hides what was hidden in one of another class; what hidden pixels show. Off
            by default, as in the paper: grow=0.036 and decoys=True are what repairs a mark in one place (the notebook's
            "The hole tells"), but they cost accuracy where there is nothing to repair.
        momentum, weight_decay: of SGD; or `optimizer`, which makes another one of a list of weights. Its LR is `lr`.
        loss: a function of logits (B, classes) and labels (B,) that gives their mean, for weights of classes and such.
        mean, std: of the normalisation that the model expects; if not given, those that a model of timm names, which
            is said in a warning, or else none.
        reshape_transform: makes maps (B, K, h, w) of the layer's output where that is something else.
        augment: a function of masked images (B, 3, H, W) float in [0, 1] on the device; `seed` sets torch's generators.
        precision: "fp32", or "bf16" for autocast.
        device: that computes; the GPU if there is one. The repaired model is on that of the model given.
        tests: more data sets to be scored before and after, by name; their classes are matched by name.
        scores: whether the repaired model is scored on the training images, too: a third of all forward passes.
        checkpoint: a file to resume from; it is written after every epoch.

    Raises:
        TypeError, ValueError: something does not fit, or fails when it is tried; nothing has been trained.
        CheckpointError, OSError: the checkpoint is of something else, or cannot be written.
        FloatingPointError: the loss or the weights are no longer finite.
    """
    for name, count in (("epochs", epochs), ("iterations", iterations), ("batch_size", batch_size)):
        check_count(name, count)
    holes_of(holes)
    check_number("seed", seed, seed % 1 == 0, "a whole number")
    options = dict(lr=float(lr), batch_size=int(batch_size), precision=precision, augmentation=augment, seed=int(seed),
                   loss=loss, holes=holes)

    def fresh() -> State:
        new = copied(old)
        weights = [weight for weight in new.parameters() if weight.requires_grad]
        return State(new, optimizer(weights) if optimizer else sgd(weights, momentum, weight_decay))

    def advance(state: State) -> dict[str, float]:
        if state.epoch == 0:
            state.masks = masks
        elif state.epoch % epochs == 0:
            state.masks = find_masks(state.model, images, k, state.masks if accumulate else None, holes=holes)
        lost, accuracy = train_epoch(state, images, labels, masks=state.masks, title="masktune", **options)
        return {"loss": lost, "accuracy": accuracy}

    parallel.start()
    device = torch.device(device or best_device())
    if isinstance(loss, nn.Module):  # its weights of classes go where the logits are
        options["loss"] = copied(loss).to(device)
    with computing_on(device):
        old, sets = opened(model, data, tests or {}, layer, k, mean, std, reshape_transform, device)
        rehearse(old, model, sets["train"], fresh, **options)
        images, labels, masks, before = _look(old, sets, k, device)
        settings = options | {
            "layer": old.layer, "k": float(k), "mean": old.mean.flatten().tolist(), "std": old.std.flatten().tolist(),
            "epochs": int(epochs), "iterations": int(iterations), "accumulate": bool(accumulate),
            **{name: getattr(one, "__name__", type(one).__name__) for name, one in (("augmentation", augment),
                                                                                   ("loss", loss))}}
        if checkpoint is None:
            state = fresh()
            while state.epoch < epochs * iterations:
                state.finish_epoch(**advance(state))
        else:
            with step("checkpoint="):
                own = digest([contents(one) for one in (augment, loss, reshape_transform)])
                parts = [[{key: value for key, value in vars(part).items() if isinstance(value, str | int | float)},
                          contents(type(part))] for part in old.modules()]
                made = digest([old.state_dict(), parts, [weight.requires_grad for weight in old.parameters()]])
            config = settings | {"optimizer": repr(fresh().optimizer), "model": made,
                                 "data": digest([labels, images]), "functions": own}
            state = load_or_run(Path(checkpoint).expanduser(), config, int(epochs * iterations), fresh, advance)
        report = Report.of(old, state.masks, sets, before, settings, state.model, scores, state.history)
        theirs = dict([*unwrapped(model).named_parameters(), *unwrapped(model).named_buffers()])
        repaired = state.model.model.to(next(iter(theirs.values())).device)
        repaired.eval()  # which may return nothing
        for name, new in (*repaired.named_parameters(), *repaired.named_buffers()):
            given = theirs.get(name, new)  # a buffer may be made by the first forward pass
            new.data = new.data.to(given.device, given.dtype)
            new.grad = None
        return repaired, report


def preview(model: nn.Module, data: Images | Dataset | DataLoader, *, layer: str, k: float = 2.0,
            mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
            reshape_transform: Callable[[Tensor], Tensor] | None = None, device: torch.device | str | None = None,
            tests: dict | None = None) -> Report:
    """Show what `masktune` would hide, and train nothing: heat maps, masks, and what hiding them costs the model.

    Masks that miss the shortcut are the commonest failure, and they are seen here. Arguments and errors are those of
    `masktune`; a few hundred images are enough.
    """
    parallel.start()
    device = torch.device(device or best_device())
    with computing_on(device):
        old, sets = opened(model, data, tests or {}, layer, k, mean, std, reshape_transform, device)
        _, _, masks, before = _look(old, sets, k, device)
        return Report.of(old, masks, sets, before, {"layer": old.layer, "k": float(k)})


def _look(model: Classifier, sets: dict[str, Images], k: float, device: torch.device
          ) -> tuple[Tensor, Tensor, Masks, dict[str, Score]]:
    """Training images and labels where they are kept, the first masks, and the scores before, each image seen once."""
    train, before = sets["train"], {}
    place = room_for(train.images, device)
    images, labels = train.images.to(place), train.labels.to(place)
    guesses = torch.zeros_like(labels)
    with step(f"the images of train, {tuple(images.shape)}"):
        masks = find_masks(model, images, k, guesses=guesses)
    if not FEW <= masks.share() <= MANY:
        warnings.warn(hidden_share(masks.share()), stacklevel=3)
    before["train"] = scored(guesses, train)
    if (right := before["train"].average) < least_right(len(train.classes)):
        warnings.warn(f"the model is right on only {right:.1%} of the training images: are mean and std, the size "
                      "of the images and the order of the classes those of its training?", stacklevel=3)
    for name, one in list(sets.items())[1:]:
        with step(f"the images of {name}, {tuple(one.images.shape)}"):
            before[name] = scored(infer(model, one.images).argmax(1), one)
    return images, labels, masks, before
