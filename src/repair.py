"""Repair a classifier of your own: `masktune`, or look first: `preview`. What could fail late is tried at the door."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from . import parallel
from .checkpoint import load_or_run
from .checks import check_count, check_images, check_labels, check_number, check_threshold
from .classifier import Classifier, copied, unwrapped
from .datasets.images import Images, load_dataset
from .device import best_device, prepare, room_for
from .holes import check_decoys, check_grow, grown
from .inference import evaluating, infer, pixels
from .layers import suggest_layers
from .masking import find_masks, hottest
from .masks import Masks
from .metrics import Score
from .report.report import FEW, MANY, Report, hidden_share, least_right, scored
from .saliency import reader, xgradcam
from .seeding import seeded
from .state import State, contents, digest
from .training import epoch_batches, sgd, train_epoch

TINY, HUGE = 1e-9, 1e3  # of what a step may move the weights, as a share of their size


def masktune(model: nn.Module, data: Images | Dataset | DataLoader, *, layer: str, lr: float, batch_size: int = 128,
             epochs: int = 1, k: float = 2.0, iterations: int = 1, accumulate: bool = False, grow: float = 0.0,
             decoys: bool = False, fill: str = "black", momentum: float = 0.9, weight_decay: float = 1e-4,
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
        scores: whether the repaired model is scored on the training images, too, which takes a third of all forward
            passes; each of them is looked at once for its mask, once in the epoch, and once for this.
        checkpoint: a file to resume from; it is written after every epoch.

    Raises:
        TypeError, ValueError: something does not fit, or fails when it is tried; nothing has been trained.
        CheckpointError, OSError: the checkpoint is of something else, or cannot be written.
        FloatingPointError: the loss or the weights are no longer finite.
    """
    for name, count in (("epochs", epochs), ("iterations", iterations), ("batch_size", batch_size)):
        check_count(name, count)
    check_grow(grow)
    check_number("seed", seed, seed % 1 == 0, "a whole number")
    options = dict(lr=float(lr), batch_size=int(batch_size), precision=precision, augmentation=augment, seed=int(seed),
                   loss=loss, decoys=bool(decoys), fill=fill)

    def fresh() -> State:
        new = copied(old)
        weights = [weight for weight in new.parameters() if weight.requires_grad]
        return State(new, optimizer(weights) if optimizer else sgd(weights, momentum, weight_decay))

    def advance(state: State) -> dict[str, float]:
        if state.epoch == 0:
            state.masks = grown(masks, grow)
        elif state.epoch % epochs == 0:
            state.masks = grown(find_masks(state.model, images, k, state.masks if accumulate else None), grow)
        lost, accuracy = train_epoch(state, images, labels, masks=state.masks, title="masktune", **options)
        return {"loss": lost, "accuracy": accuracy}

    parallel.start()
    device = torch.device(device or best_device())
    if isinstance(loss, nn.Module):  # its weights of classes go where the logits are
        options["loss"] = copied(loss).to(device)
    with _computing_on(device):
        old, sets = _opened(model, data, tests or {}, layer, k, mean, std, reshape_transform, device)
        _rehearse(old, model, sets["train"], fresh, **options)
        images, labels, masks, before = _look(old, sets, k, device)
        settings = options | {
            "layer": old.layer, "k": float(k), "mean": old.mean.flatten().tolist(), "std": old.std.flatten().tolist(),
            "epochs": int(epochs), "iterations": int(iterations), "accumulate": bool(accumulate), "grow": float(grow),
            **{name: getattr(one, "__name__", type(one).__name__) for name, one in (("augmentation", augment),
                                                                                   ("loss", loss))}}
        if checkpoint is None:
            state = fresh()
            while state.epoch < epochs * iterations:
                state.finish_epoch(**advance(state))
        else:
            with _step("checkpoint="):
                own = digest([contents(one) for one in (augment, loss, reshape_transform)])
            config = settings | {"optimizer": repr(fresh().optimizer), "model": digest(old.state_dict()),
                                 "data": digest([labels, images]), "functions": own}
            state = load_or_run(Path(checkpoint).expanduser(), config, int(epochs * iterations), fresh, advance)
        report = Report.of(old, state.masks, sets, before, settings, state.model, scores, state.history)
        repaired = state.model.model.eval()
        tensors = ((*part.parameters(), *part.buffers()) for part in (repaired, unwrapped(model)))
        for new, given in zip(*tensors, strict=True):
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
    with _computing_on(device):
        old, sets = _opened(model, data, tests or {}, layer, k, mean, std, reshape_transform, device)
        _, _, masks, before = _look(old, sets, k, device)
        return Report.of(old, masks, sets, before, {"layer": old.layer, "k": float(k)})


@contextmanager
def _computing_on(device: torch.device) -> Iterator[None]:
    """Compute on a device, exactly, and with gradients, whatever the caller has set; afterwards all is as it was."""
    with torch.inference_mode(False), torch.enable_grad(), torch.cuda.device(device if device.type == "cuda" else -1):
        exact = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            prepare()
            yield
        finally:
            torch.use_deterministic_algorithms(exact[0], warn_only=exact[1])


def _opened(model: nn.Module, data: object, tests: dict, layer: str, k: float, mean: Sequence[float] | None,
            std: Sequence[float] | None, reshape_transform: Callable | None, device: torch.device
            ) -> tuple[Classifier, dict[str, Images]]:
    """A working copy of the model, tried on a few images, and the data sets, labelled alike."""
    check_threshold(k)
    sets = _data_sets(data, tests)
    old = _working_copy(model, layer, mean, std, reshape_transform).to(device)
    if mean is None and old.mean.any():
        warnings.warn(f"images are normalised by the model's own pretrained_cfg, mean {old.mean.flatten().tolist()}; "
                      "pass mean= and std= for others, (0,) and (1,) for none", stacklevel=3)
    if old.grey and not all((part == part[:, :1]).all() for one in sets.values() for part in one.images.split(1000)):
        raise ValueError("the model takes one channel, and there are coloured images; make them grey first")
    with _untouched(model):
        _try(old, sets["train"], k)
    return old, sets


def _look(model: Classifier, sets: dict[str, Images], k: float, device: torch.device
          ) -> tuple[Tensor, Tensor, Masks, dict[str, Score]]:
    """Training images and labels where they are kept, the first masks, and the scores before, each image seen once."""
    train, before = sets["train"], {}
    place = room_for(train.images, device)
    images, labels = train.images.to(place), train.labels.to(place)
    guesses = torch.zeros_like(labels)
    with _step(f"the images of train, {tuple(images.shape)}"):
        masks = find_masks(model, images, k, guesses=guesses)
    if not FEW <= masks.share() <= MANY:
        warnings.warn(hidden_share(masks.share()), stacklevel=3)
    before["train"] = scored(guesses, train)
    if (right := before["train"].average) < least_right(len(train.classes)):
        warnings.warn(f"the model is right on only {right:.1%} of the training images: are mean and std, the size "
                      "of the images and the order of the classes those of its training?", stacklevel=3)
    for name, one in list(sets.items())[1:]:
        with _step(f"the images of {name}, {tuple(one.images.shape)}"):
            before[name] = scored(infer(model, one.images).argmax(1), one)
    return images, labels, masks, before


@contextmanager
def _step(name: str, *suggest_for: object) -> Iterator[None]:
    """Turn whatever fails inside into a ValueError that names what was tried, with the layers of a model and images."""
    try:
        yield
    except Exception as error:  # a model, an optimizer and a data set can fail in any way
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        advice = f"; suggest_layers finds {suggest_layers(*suggest_for)}" if suggest_for else ""
        if isinstance(error, torch.OutOfMemoryError):
            advice = "; lower batch_size=, or pass precision='bf16'"
        raise ValueError(f"{name}: {kind}{error}{advice}") from error


@contextmanager
def _untouched(given: nn.Module) -> Iterator[None]:
    """See that a model's buffers and gradients stay; else put them back and raise ValueError: a copy works on them."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in given.buffers()]
    gradients = [(weight, weight.grad) for weight in given.parameters()]
    for weight, _ in gradients:
        weight.grad = None
    try:
        yield
    finally:
        changed = any(weight.grad is not None for weight, _ in gradients)
        for weight, gradient in gradients:
            weight.grad = gradient
        for buffer, before in buffers:
            changed |= not torch.equal(buffer, before)
            buffer.data.copy_(before)
    if changed:
        raise ValueError("expected a model whose copy works on its own, got one whose forward, replaced by a function, "
                         "goes on with the given model; define forward in a class. It is as it was")


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
    tensors = (*model.parameters(), *model.buffers())
    if any(isinstance(tensor, nn.UninitializedParameter) or tensor.is_meta for tensor in tensors):
        raise ValueError("expected a model with weights, got lazy layers or some on the meta device; load them first")
    if quantised := [name for name, part in model.named_modules() if "quantized" in type(part).__module__]:
        raise ValueError(f"expected layers that can learn, got quantised ones: {', '.join(quantised[:5])}")
    copy = copied(Classifier(model, *options))
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in copy.parameters()):
        copy.float()  # such weights are too coarse for small updates
    if not copy.training:
        copy.train()
        for part in copy.modules():
            if isinstance(part, _BatchNorm) and not any(weight.requires_grad for weight in part.parameters()):
                part.train(not part.affine)  # one without weights cannot be frozen
    return copy


def _try(model: Classifier, data: Images, k: float) -> None:
    """Try inference and a heat map on a few images, and keep how the layer is read."""
    chosen = _few(data)
    seen = pixels(data.images[chosen].to(model.mean.device))
    with _step(f"the forward pass in eval mode on images {tuple(seen.shape)}"), evaluating(model), torch.no_grad():
        logits = model(seen)
    if logits.shape[1] != len(data.classes):
        raise ValueError(f"expected one logit for each of the {len(data.classes)} classes, got a model with "
                         f"{logits.shape[1]}; give it a new last layer, or name all its classes with classes=")
    outputs = 2 * logits[:, 1] if torch.equal(logits[:, 0], -logits[:, 1]) else logits  # a single one was halved
    low, high = outputs.min().item(), outputs.max().item()
    if low >= 0 and (((logits.sum(1) - 1).abs() < 1e-3).all() or low + 0.9 < high <= 1):
        warnings.warn(f"the model's outputs look like probabilities, not logits: they are in [{low:.2f}, {high:.2f}], "
                      "or add up to 1; take the softmax or the sigmoid off its end", stacklevel=4)
    with _step(f"the heat map of layer {model.layer!r}", model, data.images[chosen]):
        model.reshape_transform = reader(model, model.saliency_layer, tuple(seen.shape[2:]))
        heat = xgradcam(model, seen)
        hottest(heat, k)
    if (empty := (heat.amax((1, 2)) == 0).double().mean().item()) > 0.5:
        warnings.warn(f"the heat maps of layer {model.layer!r} are zero in {empty:.0%} of the images tried, in which "
                      f"nothing will be hidden: name an earlier layer, of {suggest_layers(model, data.images[chosen])}",
                      stacklevel=4)


def _few(data: Images) -> list[int]:
    return torch.linspace(0, len(data) - 1, max(8, parallel.world()), dtype=torch.float64).long().unique().tolist()


def _rehearse(model: Classifier, given: nn.Module, data: Images, fresh: Callable[[], State], *,
              augmentation: Callable | None, batch_size: int, seed: int, **options) -> None:
    """Try a step of training on a copy, as the repair does it: on a GPU with a whole batch, which must fit."""
    with _step("the optimizer, which optimizer= makes of a list of weights"):
        trial = fresh()
        if len({group["lr"] for group in trial.optimizer.param_groups}) > 1:
            raise ValueError("expected parameter groups that share one LR, which lr= sets; got several")
    chosen = list(range(min(batch_size, len(data)))) if model.mean.is_cuda else _few(data)
    images, labels = data.images[chosen], data.labels[chosen]
    with _step("augment= on a batch"), seeded(seed, "rehearsal"):
        seen = pixels(images.to(model.mean.device))
        made = augmentation(seen.clone()) if augmentation and not hasattr(augmentation, "draw") else seen
        low, high = made.min().item(), made.max().item()
        if not made.is_floating_point() or made.shape[:2] != seen.shape[:2] or not (low >= -1 and high <= 2):
            raise ValueError(f"expected floats in [0, 1], but for some noise, got {made.dtype} {tuple(made.shape)} in "
                             f"[{low:.3g}, {high:.3g}]; normalisation is for mean= and std=")
    with _step("a training step"):
        smallest = max(parallel.world(), min(map(len, epoch_batches(len(data), batch_size, 0, 0))))
        few = len(images) if model.mean.is_cuda else smallest
        if options.pop("decoys"):  # a few images may be of one class
            check_decoys(data.labels)
        with _untouched(given):
            train_epoch(trial, images[:few], labels[:few], augmentation=augmentation, batch_size=few, seed=seed,
                        **options)
        weights = [(new.detach().double(), old.double()) for new, old in zip(
            trial.model.parameters(), model.parameters(), strict=True) if new.requires_grad]
        moved, size = (torch.stack([part.norm() for part in parts]).norm().item() if weights else 0.0
                       for parts in ([new - old for new, old in weights], [old for _, old in weights]))
        if moved == 0:
            raise ValueError("expected weights to move, got none that did: the model runs under torch.no_grad, the "
                             "optimizer has other weights than it was given, or the LR is too small")
        if not TINY < moved / size < HUGE:
            raise ValueError(f"expected lr to move the weights a little, got {options['lr']:g}, with which one step "
                             f"moves them by {moved / size:.1g} times their size")
    if moved > size / 2:
        warnings.warn(f"one step at LR {options['lr']:g} moves the weights by {moved / size:.1g} times their size, and "
                      "may destroy what the model has learned: lower lr=", stacklevel=3)
