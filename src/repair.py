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
from .checks import check_count, check_images, check_labels, check_number, check_threshold
from .classifier import Classifier, copied, unwrapped
from .datasets.images import Images, load_dataset
from .device import best_device, room_for
from .inference import evaluating, pixels
from .masking import find_masks
from .metrics import Score
from .report.report import FEW, MANY, Report, hidden_share, scored
from .saliency import SMALLEST, coarse_maps, suggest_layers
from .seeding import seeded
from .state import State, digest
from .training import check_epoch, epoch_batches, run_epoch, sgd

PROBE = 8  # images that the door looks at


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
        TypeError, ValueError: something does not fit, or fails when it is tried; nothing has been trained.
        CheckpointError: the checkpoint is of something else, or cannot be written.
        FloatingPointError: the loss or the weights are no longer finite.
    """
    for name, count in (("epochs", epochs), ("iterations", iterations), ("batch_size", batch_size)):
        check_count(name, count)
    check_number("seed", seed, seed % 1 == 0, "a whole number")
    check_number("lr", lr, lr > 0, "a positive, finite number")
    check_threshold(k)
    parallel.start()
    device = torch.device(device or best_device())
    options = dict(lr=float(lr), batch_size=int(batch_size), precision=precision, augmentation=augment, seed=int(seed))

    def fresh() -> State:
        new = copied(old)
        weights = [weight for weight in new.parameters() if weight.requires_grad]
        return State(new, optimizer(weights) if optimizer else sgd(weights, momentum, weight_decay))

    def advance(state: State) -> dict[str, float]:
        iteration, epoch = divmod(state.epoch, epochs)
        if epoch == 0:
            state.masks = find_masks(state.model, images, k, state.masks if accumulate else None)
            if not FEW <= state.masks.share() <= MANY:
                warnings.warn(hidden_share(state.masks.share()), stacklevel=3)
        title = f"iteration {iteration + 1}, epoch {epoch + 1}" if iterations * epochs > 1 else "masktune"
        loss, accuracy = run_epoch(state, images, labels, masks=state.masks, title=title, **options)
        return {"loss": loss, "accuracy": accuracy}

    gpu = device if device.type == "cuda" else -1
    with torch.inference_mode(False), torch.enable_grad(), torch.cuda.device(gpu):
        sets = _data_sets(data, tests or {})
        train = sets["train"]
        old = _working_copy(model, layer, mean, std, reshape_transform).to(device)
        _rehearse(old, model, train, fresh, k=k, **options)
        before = _first_scores(old, sets)
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
        return _as_given(state.model.model, unwrapped(model)), report


@contextmanager
def _step(name: str, advice: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn whatever fails inside into a ValueError that names what was tried, with advice behind it."""
    try:
        yield
    except Exception as error:  # a model, an optimizer and a data set can fail in any way
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"{name}: {kind}{error}{advice()}") from error


def _data_sets(data: object, tests: dict) -> dict[str, Images]:
    """The training set as "train" and the test sets by their names, labels meaning the same in all of them.

    Each is something with `images` and `labels`, or what `load_dataset` takes. Where both a test set and the training
    set name their classes, labels are mapped by name; a test set may lack some.
    """
    with _step("tests, a dict of data sets by name"):
        given = dict(train=data, **tests)
    sets: dict[str, Images] = {}
    for name, one in given.items():
        with _step(f"tests[{name!r}]" if sets else "the training set"):
            if not isinstance(getattr(one, "labels", None), Tensor):
                one = load_dataset(one)
            check_images(one.images)
            known = sets["train"].classes if sets else None
            classes = getattr(one, "classes", None) or known or range(max(2, int(one.labels.max()) + 1))
            check_labels(one.labels, one.images, len(classes), "there are")
            found = Images(one.images, one.labels, tuple(map(str, classes)), getattr(one, "groups", None))
            sets[name] = found if known in (None, found.classes) else found.with_classes(known)
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


def _as_given(model: nn.Module, given: nn.Module) -> nn.Module:
    """Bring a repaired model back to the device and the precision of the one that was given, in eval mode."""
    for new, old in zip((*model.parameters(), *model.buffers()), (*given.parameters(), *given.buffers()), strict=True):
        new.data = new.data.to(old.device, old.dtype)
        new.grad = None
    return model.eval()


def _rehearse(model: Classifier, given: nn.Module, data: Images, fresh: Callable[[], State], *, k: float, lr: float,
              batch_size: int, precision: str, augmentation: Callable | None, seed: int) -> None:
    """Try everything once, as the repair does it: inference, a heat map, and a step of training on a copy."""
    chosen = torch.linspace(0, len(data) - 1, max(PROBE, parallel.world())).long().unique().tolist()
    images, labels = data.images[chosen], data.labels[chosen]
    seen = pixels(images.to(next(model.parameters()).device))
    inference = f"the forward pass in eval mode: {type(model.model).__name__} fails on images {tuple(images.shape)}"
    with _step(inference), evaluating(model), torch.no_grad():
        try:
            logits = model(seen)
        except Exception:  # a model's `view` does not stand channels that come last, which is faster
            model.channels_last = False
            logits = model(seen)
    _check_logits(logits, data.classes)
    if model.grey and not all((part == part[:, :1]).all() for part in data.images.split(1000)):
        raise ValueError("the model takes one channel, and there are coloured images; make them grey first")

    def advice() -> str:
        found = ", ".join(f"{name!r} ({height}x{width})" for name, (height, width) in suggest_layers(model, images))
        return f". Layers with larger maps: {found or 'none; larger images give larger ones'}"

    with _step(f"the heat map of layer {model.layer!r}", advice):
        masks = find_masks(model, images, k)
        height, width = coarse_maps(model, seen[:2], model.saliency_layer).shape[1:]
        if min(height, width) < 2:
            raise ValueError(f"expected at least 2x2 positions, got {height}x{width}, which hides nothing")
    if min(height, width) < SMALLEST:
        warnings.warn(f"the map of layer {model.layer!r} has only {height}x{width} positions, too few to single out a "
                      f"spot{advice()}", stacklevel=3)
    with _step("the optimizer, which optimizer= makes of a list of weights"):
        trial = fresh()
        groups, own = trial.optimizer.param_groups, set(map(id, trial.model.parameters()))
        if not all(id(weight) in own for group in groups for weight in group["params"]):
            raise ValueError("expected one of the weights that it is made of, got one of others, such as those of the "
                             "model before it was copied")
        if len({group["lr"] for group in groups}) > 1:
            raise ValueError("expected parameter groups that share one LR, which lr= sets; got several")
    with _step("augment= on a batch"), seeded(seed, "rehearsal"):
        made = seen if augmentation is None or hasattr(augmentation, "draw") else augmentation(seen.clone())
        low, high = made.min().item(), made.max().item()
        if not made.is_floating_point() or made.shape[:2] != seen.shape[:2] or not (low >= -1 and high <= 2):
            raise ValueError(f"expected floats in [0, 1], give or take some noise, {tuple(seen.shape)} as it gets; got "
                             f"{made.dtype} {tuple(made.shape)} in [{low:.3g}, {high:.3g}]; normalisation is for mean=")
    with _step("a training step"):
        check_epoch(trial, data.images, data.labels, batch_size, precision, lr=lr)
        few = max(parallel.world(), min(map(len, epoch_batches(len(data), batch_size, 0, 0))))
        touched = _gradients(given)
        run_epoch(trial, images[:few], labels[:few], masks=masks[:few], lr=lr, batch_size=len(data), seed=seed,
                  precision=precision, augmentation=augmentation)
        if _gradients(given) != touched:
            raise ValueError("expected a copy that runs on weights of its own, got gradients in the model given: it "
                             "holds on to itself, as by a forward that was replaced")
        if all(torch.equal(new, old) for new, old in zip(trial.model.parameters(), model.parameters(), strict=True)):
            raise ValueError("expected weights to move, got none that did: the model runs under torch.no_grad, what is "
                             "not frozen is not used, or the LR is too small")


def _check_logits(logits: Tensor, classes: tuple[str, ...]) -> None:
    """One for each class, and no probabilities: these would flatten loss and heat maps without a word."""
    if logits.shape[1] != len(classes):
        raise ValueError(f"expected one logit for each of the {len(classes)} classes ({', '.join(classes[:5])}"
                         f"{', ...' if len(classes) > 5 else ''}), got a model with {logits.shape[1]}; give it a new "
                         "last layer, or name all its classes with classes=")
    outputs = 2 * logits[:, 1] if torch.equal(logits[:, 0], -logits[:, 1]) else logits  # a single one was halved
    low, high = outputs.min().item(), outputs.max().item()
    if low >= 0 and (((logits.sum(1) - 1).abs() < 1e-3).all() or low + 0.5 < high <= 1):
        warnings.warn(f"the model's outputs look like probabilities, not logits: they are in [{low:.2f}, {high:.2f}], "
                      "or add up to 1; take the softmax or the sigmoid off its end", stacklevel=4)


def _gradients(model: nn.Module) -> list[int | None]:
    """What tells whether a backward pass has reached a model's weights."""
    return [None if weight.grad is None else weight.grad._version for weight in model.parameters()]


def _first_scores(model: Classifier, sets: dict[str, Images]) -> dict[str, Score]:
    """Score the model on every data set, and warn if it is hardly right on its own training images."""
    scores = {}
    for name, data in sets.items():
        with _step(f"{name}: {type(model.model).__name__} fails on images {tuple(data.images.shape)}"):
            scores[name] = scored(model, data)
    right, classes = scores["train"].average, len(sets["train"].classes)
    if classes > 1 and right < max(0.5, 1.5 / classes):
        warnings.warn(f"the model is right on only {right:.1%} of the training images: are mean and std, the size of "
                      "the images and the order of the classes those that it was trained with?", stacklevel=3)
    return scores
