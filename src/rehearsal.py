"""The door of `masktune`: what could fail after hours of work is tried here in seconds, on copies."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import parallel
from .checks import check_images, check_labels
from .classifier import Classifier, copied
from .datasets.images import Images, load_dataset
from .inference import evaluating, pixels
from .masks import CHUNK
from .metrics import Score
from .report.report import scored
from .saliency import SMALLEST, coarse_maps, suggest_layers
from .seeding import seeded
from .state import State
from .training import check_epoch, epoch_batches, run_epoch

COLOURED = "the model takes one channel, and there are coloured images; make them grey first"
PROBE = 8  # images that the dry run looks at


def data_sets(train: object, tests: object) -> dict[str, Images]:
    """Return the training set as "train" and the test sets by their names, labels meaning the same in all of them.

    Each is an `Images`, something else with `images` and `labels`, or what `load_dataset` takes. Where both a test set
    and the training set name their classes, labels are mapped by name; a test set may lack some.

    Raises:
        TypeError, ValueError: one is not of that kind, or has classes that the training set does not have.
    """
    if not isinstance(tests, Mapping):
        raise TypeError(f"expected tests to be a dict of data sets by name, got a {type(tests).__name__}; write "
                        "tests={'test': ...}")
    if "train" in tests:
        raise ValueError("expected names of tests other than 'train', which is the training set's own")
    found = {"train": _images("the training set", train)}
    for name, data in tests.items():
        found[str(name)] = _images(f"tests[{name!r}]", data, found["train"].classes)
    return found


def _images(name: str, data: object, classes: tuple[str, ...] | None = None) -> Images:
    try:
        if not isinstance(getattr(data, "labels", None), Tensor):
            data = load_dataset(data)
        named = getattr(data, "classes", None)
        named = named and tuple(map(str, named))
        check_images(data.images)
        count = len(named or classes or range(max(2, int(data.labels.max()) + 1)))
        check_labels(data.labels, data.images, count, "the data set names" if named or classes else "there are")
        groups = getattr(data, "groups", None)
        if groups is not None and (groups.dtype != torch.int64 or groups.shape != data.labels.shape):
            raise ValueError(f"expected groups torch.int64 {tuple(data.labels.shape)}, one for each image, got "
                             f"{groups.dtype} {tuple(groups.shape)}")
        found = Images(data.images, data.labels, named or classes or tuple(map(str, range(count))), groups)
        return found if classes is None else found.with_classes(classes)
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{name}: {error}") from error


def working_copy(model: nn.Module, layer: str, mean: Sequence[float], std: Sequence[float],
                 reshape_transform: Callable | None) -> Classifier:
    """Return a copy of a model to work on: half precision widened, and in the modes in which it is to be trained.

    Modes are those of the model if it is in train mode as a whole. If it is in eval mode, as after a test, all of it is
    trained in train mode, but for BatchNorm whose own weights are frozen: it was meant to stay as it is.

    Raises:
        TypeError, ValueError: it is no model, has no such layer, or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("expected a model of Python modules, got one of TorchScript, whose layers cannot be looked "
                         "into; pass the model that it was made of")
    if torch.is_inference_mode_enabled():
        raise ValueError("expected to be called outside of torch.inference_mode, in which nothing can be trained")
    if layer is None:
        raise ValueError("expected layer to name a module of the model, got None; suggest_layers(model, images) lists "
                         "good ones")
    copy = copied(Classifier(model, layer, mean, std, reshape_transform))
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in copy.parameters()):
        copy.float()  # such weights are too coarse for small updates
    if not copy.training:
        copy.train()
        for part in copy.modules():
            if isinstance(part, _BatchNorm) and not any(weight.requires_grad for weight in part.parameters()):
                part.train(not part.affine)  # one without weights cannot be frozen
    return copy


def first_scores(model: Classifier, sets: dict[str, Images]) -> dict[str, Score]:
    """Score the model on every data set, and warn if it is hardly right on its own training images.

    Raises:
        ValueError: it fails on the images of one.
    """
    scores = {}
    for name, data in sets.items():
        try:
            scores[name] = scored(model, data)
        except RuntimeError as error:  # images of another size, for one
            raise ValueError(f"{name}: {type(model.model).__name__} fails on images {tuple(data.images.shape)}: "
                             f"{error}") from error
    right, classes = scores["train"].average, len(sets["train"].classes)
    if classes > 1 and right < max(0.5, 1.5 / classes):
        warnings.warn(f"the model is right on only {right:.1%} of the training images: are mean and std, the size of "
                      "the images and the order of the classes those that it was trained with?", stacklevel=3)
    return scores


def rehearse(model: Classifier, data: Images, new_optimizer: Callable[[nn.Module], torch.optim.Optimizer], *, lr: float,
             batch_size: int, precision: str, augmentation: Callable | None, seed: int) -> None:
    """Try everything once, on the first images: inference, a heat map, and a step of training on a copy.

    Raises:
        ValueError: something cannot work, with what was expected and what came.
    """
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    if any(isinstance(weight, nn.UninitializedParameter) for weight in model.parameters()):
        raise ValueError("expected a model with weights, got lazy layers that have seen no image yet")
    if not trainable:
        raise ValueError("expected weights that may learn, got a model in which requires_grad is False for all")
    _check_logits(_first_logits(model, data), data)
    if model.grey and not all((part == part[:, :1]).all() for part in data.images.split(CHUNK)):
        raise ValueError(COLOURED)
    _check_map(model, data)
    _try_epoch(model, data, new_optimizer, lr=lr, batch_size=batch_size, precision=precision, augmentation=augmentation,
               seed=seed)


def _first_logits(model: Classifier, data: Images) -> Tensor:
    """The logits of a few images, in the first way to hand them over that the model takes.

    Channels come last, which is faster, but where the model's `view` does not stand it; they are as many as its first
    convolution takes, or the other number, if that is not the first to be called.
    """
    first = None
    for channels_last, grey in product((True, False), (model.grey, not model.grey)):
        model.channels_last, model.grey = channels_last, grey
        try:
            return _infer(model, data)
        except Exception as error:  # a model can fail in any way
            first = first or error
    raise ValueError(f"{type(model.model).__name__} fails on images {tuple(data.images[:PROBE].shape)} in eval mode: "
                     f"{type(first).__name__}: {first}") from first


def _infer(model: Classifier, data: Images) -> Tensor:
    probe = _probe(model, data)
    if model.grey and not (probe == probe[:, :1]).all():
        raise ValueError(COLOURED)
    with evaluating(model), torch.no_grad():
        return model(probe)


def _probe(model: Classifier, data: Images) -> Tensor:
    """A few images from all over the data set, as the model sees them."""
    chosen = torch.linspace(0, len(data) - 1, PROBE).long().unique().to(data.images.device)
    return pixels(data.images[chosen].to(next(model.parameters()).device))


def _check_logits(logits: Tensor, data: Images) -> None:
    if logits.shape[1] != len(data.classes):
        raise ValueError(f"expected one logit for each of the {len(data.classes)} classes "
                         f"({', '.join(data.classes[:5])}{', ...' if len(data.classes) > 5 else ''}), got a model "
                         f"with {logits.shape[1]}; give it a new last layer, or name all its classes with classes=")
    if not logits.isfinite().all():
        raise ValueError("expected finite logits, got NaN or infinity; the weights or the images are not finite")
    sums = logits.sum(1)
    one_output = torch.equal(logits[:, 0], -logits[:, 1])  # which `logits_of` has halved
    outputs = 2 * logits[:, 1] if one_output else logits
    low, high = outputs.min().item(), outputs.max().item()
    if low >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        warnings.warn("the model's outputs add up to 1: they look like probabilities, not logits. A second softmax "
                      "would flatten loss and heat maps; take the softmax off its end", stacklevel=4)
    elif 0 <= low < high - 0.5 and high <= 1:
        warnings.warn(f"the model's output{' goes' if one_output else 's go'} from near 0 to near 1 and no further, "
                      "like probabilities rather than logits; take the sigmoid off its end", stacklevel=4)


def _check_map(model: Classifier, data: Images) -> None:
    try:
        size = tuple(coarse_maps(model, _probe(model, data)[:2], model.saliency_layer).shape[1:])
    except ValueError as error:
        raise ValueError(f"layer {model.layer!r}: {error}. {_suggestions(model, data)}") from error
    if min(size) < 2:
        raise ValueError(f"expected a layer with a map of at least 2x2 positions, got {size[0]}x{size[1]} from "
                         f"{model.layer!r}: such a map hides nothing. {_suggestions(model, data)}")
    if min(size) < SMALLEST:
        warnings.warn(f"the map of layer {model.layer!r} has only {size[0]}x{size[1]} positions, too few to single out "
                      f"a spot. {_suggestions(model, data)}", stacklevel=4)


def _suggestions(model: Classifier, data: Images) -> str:
    found = ", ".join(f"{name!r} ({height}x{width})" for name, (height, width) in suggest_layers(model, data.images))
    return (f"Layers with larger maps: {found}" if found else
            f"suggest_layers finds none with a map of {SMALLEST}x{SMALLEST} or more; larger images give larger maps")


def _try_epoch(model: Classifier, data: Images, new_optimizer: Callable, *, batch_size: int, **options) -> None:
    """Train a copy on a few images, as the epoch will."""
    sizes = [len(batch) for batch in epoch_batches(len(data), batch_size, 0, 0)]
    few = slice(0, max(parallel.world(), min(PROBE, *sizes, len(data))))
    trial = copied(model)
    optimizer = new_optimizer(trial)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected optimizer to make a torch.optim.Optimizer of a list of weights, got a "
                        f"{type(optimizer).__name__}")
    moved = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not {id(weight) for weight in moved} <= {id(weight) for weight in trial.parameters()}:
        raise ValueError("expected an optimizer of the weights that it is made of, got others, such as those of the "
                         "model before it was copied; write optimizer=lambda weights: ...")
    if len({group["lr"] for group in optimizer.param_groups}) > 1:
        raise ValueError("expected an optimizer whose parameter groups share one LR, which lr= sets; got several")
    state = State(trial, optimizer)
    check_epoch(state, data.images, data.labels, batch_size, options["precision"], lr=options["lr"])
    _check_augmentation(options["augmentation"], _probe(model, data), options["seed"])
    try:
        run_epoch(state, data.images[few], data.labels[few], batch_size=len(data), **options)
    except FloatingPointError:
        raise
    except Exception as error:  # a model, an optimizer and an augmentation can fail in any way
        raise ValueError(f"{type(model.model).__name__} cannot be trained on {few.stop} images "
                         f"{tuple(data.images.shape[1:])}: {type(error).__name__}: {error}") from error
    if all(weight.grad is None for weight in trial.parameters()):
        raise ValueError("expected a loss that depends on weights that may learn, got no gradient for any; the model "
                         "runs under torch.no_grad, or what is not frozen is not used")


def _check_augmentation(augmentation: Callable | None, images: Tensor, seed: int) -> None:
    if augmentation is None or hasattr(augmentation, "draw"):  # ours
        return
    with seeded(seed, "rehearsal"):
        made = augmentation(images.clone())
    if not isinstance(made, Tensor) or not made.is_floating_point() or made.shape[:2] != images.shape[:2] or (
            made.dim() != 4):
        raise ValueError(f"expected augment to give a batch {tuple(images.shape)} of floats, as it gets, got "
                         f"{f'{made.dtype} {tuple(made.shape)}' if isinstance(made, Tensor) else type(made).__name__}")
    low, high = made.min().item(), made.max().item()
    if not (low >= -1 and high <= 2):  # a little noise is as may be
        raise ValueError(f"expected augment to give images in [0, 1], got [{low:.3g}, {high:.3g}]; leave "
                         "normalisation to mean= and std=")


def as_given(model: nn.Module, given: nn.Module) -> nn.Module:
    """Bring a repaired model back to the device and the precision of the one that was given, in eval mode."""
    for new, old in zip((*model.parameters(), *model.buffers()), (*given.parameters(), *given.buffers()), strict=True):
        new.data = new.data.to(old.device, old.dtype)
        new.grad = None
    return model.eval()
