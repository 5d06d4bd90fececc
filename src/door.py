"""The door of `masktune` and `preview`: what could fail late is tried first, on a few images, and named."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import parallel
from .checks import check_images, check_labels, check_number
from .classifier import Classifier, copied
from .datasets.images import Images, load_dataset
from .holes import holes_of, partners, pixels
from .inference import evaluating
from .layers import suggest_layers
from .masking import hottest
from .saliency import reader, xgradcam
from .seeding import seeded
from .state import State
from .training import epoch_batches, train_epoch

UNLIKE = 1e-3  # share by which logits may differ between two passes, by rounding
TINY, HUGE = 1e-9, 1e3  # of what a step may move the weights, as a share of their size


def opened(model: nn.Module, data: object, tests: dict, layer: str | None, k: float, mean: Sequence[float] | None,
            std: Sequence[float] | None, reshape_transform: Callable | None, device: torch.device
            ) -> tuple[Classifier, dict[str, Images]]:
    """A working copy of the model, tried on a few images, and the data sets, labelled alike."""
    check_number("k", k, k >= 0, "a finite number of standard deviations, not negative")
    sets = _data_sets(data, tests)
    old = _working_copy(model, layer, mean, std, reshape_transform).to(device)
    if mean is None and old.mean.any():
        warnings.warn(f"images are normalised by the model's own pretrained_cfg, mean {old.mean.flatten().tolist()}; "
                      "pass mean= and std= for others, (0,) and (1,) for none", stacklevel=3)
    if layer is None:
        old.layer = suggest_layers(old, sets["train"].images)[0][0]
    with _untouched(model):
        _try(old, sets["train"], k)
    if old.grey and not all((part == part[:, :1]).all() for one in sets.values() for part in one.images.split(1000)):
        raise ValueError("the model takes one channel, and there are coloured images; make them grey first")
    return old, sets


def _data_sets(data: object, tests: dict) -> dict[str, Images]:
    """The training set as "train" and the test sets by name, their labels mapped to its classes by name."""
    if not isinstance(tests, dict) or "train" in tests:
        raise TypeError(f"expected tests as a dict of data sets by names but 'train', got a {type(tests).__name__}")
    sets: dict[str, Images] = {}
    for name, one in {"train": data, **tests}.items():
        with step(f"tests[{name!r}]" if sets else "the training set"):
            found = one if isinstance(one, Images) else load_dataset(one)
            check_images(found.images)
            check_labels(found.labels, found.images, len(found.classes), "there are")
            with step("groups"):
                check_labels(found.labels if found.groups is None else found.groups, found.images, 2 ** 62)
            train = sets.get("train", found)
            if found.numbered != train.numbered:
                warnings.warn(f"the classes of tests[{name!r}] are matched by number, since only one of it and the "
                              "training set names them", stacklevel=5)
                found = replace(found, numbered=True)
            sets[name] = found if train.classes == found.classes else found.with_classes(train.classes)
    return sets


def _working_copy(model: nn.Module, *options) -> Classifier:
    """A copy to work on, half precision widened, in the modes in which it is to be trained: see `masktune`."""
    wrapped = Classifier(model, *options)
    tensors = (*model.parameters(), *model.buffers())
    if any(isinstance(tensor, nn.UninitializedParameter) or tensor.is_meta for tensor in tensors):
        raise ValueError("expected a model with weights, got lazy layers or some on the meta device; load them first")
    if quantised := [name for name, part in model.named_modules() if "quantized" in type(part).__module__]:
        raise ValueError(f"expected layers that can learn, got quantised ones: {', '.join(quantised[:5])}")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError("expected weights that can learn, got a model in which all are frozen: requires_grad_(True)")
    copy = copied(wrapped)
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
    with step(f"the forward pass in eval mode on images {tuple(seen.shape)}"), evaluating(model), torch.no_grad():
        logits, again = model(seen), model(seen)
        halves = torch.cat([model(part) for part in seen.split((len(seen) + 1) // 2)])
    for other, cause in ((again, "two passes differ, as with dropout that stays on in eval mode"),
                         (halves, "it depends on the other images, as with BatchNorm without running statistics")):
        if (other - logits).norm() > UNLIKE * logits.norm():
            raise ValueError("expected a model whose answer is a function of one image alone; in eval mode, " + cause)
    if logits.shape[1] != len(data.classes):
        raise ValueError(f"expected one logit for each of the {len(data.classes)} classes, got a model with "
                         f"{logits.shape[1]}; give it a new last layer, or name all its classes with classes=")
    outputs = 2 * logits[:, 1] if torch.equal(logits[:, 0], -logits[:, 1]) else logits  # a single one was halved
    low, high = outputs.min().item(), outputs.max().item()
    if low >= 0 and (((logits.sum(1) - 1).abs() < 1e-3).all() or low + 0.9 < high <= 1):
        warnings.warn(f"the model's outputs look like probabilities, not logits: they are in [{low:.2f}, {high:.2f}], "
                      "or add up to 1; take the softmax or the sigmoid off its end", stacklevel=4)
    with step(f"the heat map of layer {model.layer!r}", model, data.images[chosen]):
        model.reading = reader(model, model.saliency_layer, tuple(seen.shape[2:]))
        heat = xgradcam(model, seen)
        hottest(heat, k)
    if (empty := (heat.amax((1, 2)) == 0).double().mean().item()) > 0.5:
        warnings.warn(f"the heat maps of layer {model.layer!r} are zero in {empty:.0%} of the images tried, in which "
                      "nothing will be hidden: name an earlier one, see suggest_layers", stacklevel=4)


def rehearse(model: Classifier, given: nn.Module, data: Images, fresh: Callable[[], State], *,
              augmentation: Callable | None, batch_size: int, seed: int, **options) -> None:
    """Try a step of training on a copy, as the repair does it: on a GPU with a whole batch, which must fit."""
    with step("the optimizer, which optimizer= makes of a list of weights"):
        trial = fresh()
        if len({group["lr"] for group in trial.optimizer.param_groups}) > 1:
            raise ValueError("expected parameter groups that share one LR, which lr= sets; got several")
    chosen = list(range(min(batch_size, len(data)))) if model.mean.is_cuda else _few(data)
    images, labels = data.images[chosen], data.labels[chosen]
    with step("augment= on a batch"), seeded(seed, "rehearsal"):
        seen = pixels(images.to(model.mean.device))
        made = augmentation(seen.clone()) if augmentation and not hasattr(augmentation, "draw") else seen
        low, high = made.min().item(), made.max().item()
        if (not made.is_floating_point() or made.shape[:2] != seen.shape[:2] or not (low >= -1 and high <= 2)
                or made.clamp(max=0).mean() < -0.1):
            raise ValueError(f"expected floats in [0, 1], but for some noise, got {made.dtype} {tuple(made.shape)} in "
                             f"[{low:.3g}, {high:.3g}]; normalisation is for mean= and std=")
    with step("a training step"):
        smallest = max(parallel.world(), min(map(len, epoch_batches(len(data), batch_size, 0, 0))))
        few = len(images) if model.mean.is_cuda else smallest
        if holes_of(options.pop("holes")).partners:  # a few images may be of one class
            partners(data.labels, 0, 0)
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


def _few(data: Images) -> list[int]:
    return torch.linspace(0, len(data) - 1, max(8, parallel.world()), dtype=torch.float64).long().unique().tolist()


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
            if not torch.isclose(buffer, before, rtol=0, atol=0, equal_nan=True).all():
                changed = True
                buffer.data.copy_(before)
    if changed:
        raise ValueError("expected a model whose copy works on its own, got one whose forward, replaced by a function, "
                         "goes on with the given model; define forward in a class. It is as it was")


@contextmanager
def step(name: str, *suggest_for: object) -> Iterator[None]:
    """Turn whatever fails inside into a ValueError that names what was tried, with the layers of a model and images."""
    try:
        yield
    except Exception as error:  # a model, an optimizer and a data set can fail in any way
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        advice = ""
        if isinstance(error, torch.OutOfMemoryError):
            advice = "; lower batch_size=, or pass precision='bf16'" if "step" in name else "; use smaller images"
        if suggest_for and not advice:
            with suppress(Exception):  # the error at hand is the one to be told
                advice = f"; suggest_layers finds {suggest_layers(*suggest_for)}"
        raise ValueError(f"{name}: {kind}{error}{advice}") from error
