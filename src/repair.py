"""Repair a classifier of your own: `masktune`, or look first: `preview`. What could fail late is tried at the door."""

import time
import warnings
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import evidence, parallel
from .checks import check_count, check_number
from .classifier import Classifier, copied, unwrapped
from .datasets.images import Images
from .device import best_device, computing_on, device_name, room_for
from .door import opened, rehearse, step
from .evidence import few, scored, swap_test
from .holes import COVERED, Holes, Shown, holes_of
from .inference import Score, accuracy, infer
from .masking import MOST, find_masks, spots
from .masks import Masks
from .report.report import FEW, MANY, Report, hidden_share, least_right
from .state import State
from .training import sgd, train_epoch

LRS = (0.0001, 0.0003, 0.001, 0.003, 0.01)  # tried if none is named
TIED = 0.005  # of accuracy: what two LRs may differ in without one being better


def masktune(model: nn.Module, data: Images | Dataset, *, layer: str | None = None,
             lr: float | Sequence[float] | None = None, batch_size: int = 128, k: float = 2.0,
             iterations: int | None = 1, accumulate: bool = False, holes: str | Holes = "black", momentum: float = 0.9,
             weight_decay: float = 1e-4, optimizer: Callable[[list], torch.optim.Optimizer] | None = None,
             loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, mean: Sequence[float] | None = None,
             std: Sequence[float] | None = None, reshape_transform: Callable[[Tensor], Tensor] | None = None,
             augment: Callable[[Tensor], Tensor] | None = None, precision: str = "fp32",
             device: torch.device | str | None = None, seed: int = 0, tests: dict | None = None
             ) -> tuple[nn.Module, Report]:
    """Repair a trained classifier: masks by its own heat maps, then one epoch on what is left (MaskTune, section 3).

    Returns a repaired copy of the model, in eval mode, and a report. Before anything is trained, all of it is tried
    once on a few images, and the model is scored on all data sets. Under torchrun, the processes work at it together.

    Args:
        model: any classifier, see `Classifier`; it is left as it was. Weights that ask for no gradient stay as they
            are, and so do the statistics of what is in eval mode inside a model in train mode. A model that is in eval
            mode as a whole is trained in train mode, but for BatchNorm whose weights are frozen.
        data: the images that it was trained on: `Images` as `load_folder` makes them, or what `load_dataset` takes.
        layer: the name of the module to be explained; the first that `suggest_layers` finds, if not given.
        lr: of the one epoch. Of several, or if none is given of `LRS`, each is tried, and the best returned: by the
            lower of the accuracy on training images as they are and in the swap test (`swapped`), which ranks repairs
            without an image that breaks the shortcut. Of those within half a point it is the smallest.
        batch_size: images of one update, over all processes.
        k: what is hotter than m + k s is hidden.
        iterations: of masks and one epoch each; with `accumulate`, what was found stays hidden. None: until no new spot
            is hot in most images of a class, at most five, and what was found stays hidden: for several shortcuts, of
            which a model takes the next when one is gone.
        holes: what is shown where something was hot: "black" (paper), "decoys" or "transplants" (ours): see `holes`.
            For a shortcut in one place, ask for transplants. They are no default, since where masks hit the subject
            they exchange evidence, and where there is nothing to repair they cost accuracy (the notebook has both).
        momentum, weight_decay: of SGD; or `optimizer`, which makes another one of a list of weights. Its LR is `lr`.
        loss: a function of logits (B, classes) and labels (B,) that gives their mean, for weights of classes and such.
        mean, std: of the normalisation that the model expects; if not given, those that a model of timm names, which
            is said in a warning, or else none.
        reshape_transform: makes maps (B, K, h, w) of the layer's output where that is something else.
        augment: a function of masked images (B, 3, H, W) float in [0, 1] on the device; `seed` sets torch's generators.
        precision: "fp32", or "bf16" for autocast.
        device: that computes; the GPU if there is one. The repaired model is on that of the model given.
        tests: more data sets to be scored before and after, by name; their classes are matched by name.

    Raises:
        TypeError, ValueError: something does not fit, or fails when it is tried; nothing has been trained.
        FloatingPointError: the loss or the weights are no longer finite, with every LR.
    """
    check_count("iterations", MOST if iterations is None else iterations)
    check_count("batch_size", batch_size)
    check_number("seed", seed, seed % 1 == 0, "a whole number")
    lrs = sorted(set(torch.as_tensor(LRS if lr is None else lr, dtype=torch.float64).flatten().tolist()))
    if not lrs:
        raise ValueError("expected lr to be a number, several, or None, got an empty list")
    holes, seed = holes_of(holes), int(seed)
    options = dict(batch_size=int(batch_size), precision=precision, augmentation=augment, seed=seed, loss=loss,
                   holes=holes)

    def fresh() -> State:
        new = copied(old)
        weights = [weight for weight in new.parameters() if weight.requires_grad]
        return State(new, optimizer(weights) if optimizer else sgd(weights, momentum, weight_decay))

    def tuned(rate: float) -> State:
        """The old model after its epochs at an LR."""
        state = fresh()
        for iteration in range(iterations or MOST):
            found = masks
            if iteration:
                before = state.masks if accumulate or iterations is None else None
                found = find_masks(state.model, images, k, before, holes=holes)
                if iterations is None and not spots(found, labels, before):
                    break
            state.masks = found
            lost, right = train_epoch(state, images, labels, masks=found, lr=rate, title=f"LR {rate:g}", **options)
            state.finish_epoch(loss=lost, accuracy=right)
        return state

    parallel.start()
    device = torch.device(device or best_device())
    if isinstance(loss, nn.Module):  # its weights of classes go where the logits are
        options["loss"] = copied(loss).to(device)
    with computing_on(device):
        old, sets = opened(model, data, tests or {}, layer, k, mean, std, reshape_transform, device)
        for rate in lrs if lr is not None else lrs[2:3]:
            rehearse(old, model, sets["train"], fresh, lr=rate, **options)
        images, labels, masks, before = _look(old, sets, k, device)
        state, trials = _best(tuned, lrs, *few(sets["train"], evidence.SWAPPED, masks), seed)
        settings = options | {
            "layer": old.layer, "k": float(k), "lr": trials[0]["lr"], "mean": old.mean.flatten().tolist(),
            "std": old.std.flatten().tolist(), "iterations": iterations,
            "accumulate": bool(accumulate), "holes": repr(holes),
            **{name: getattr(one, "__name__", type(one).__name__) for name, one in (("augmentation", augment),
                                                                                   ("loss", loss))}}
        theirs = dict([*unwrapped(model).named_parameters(), *unwrapped(model).named_buffers()])
        given = next(iter(theirs.values())).device
        for name, new in (*state.model.model.named_parameters(), *state.model.model.named_buffers()):
            new.data = new.data.to(theirs.get(name, new).dtype)  # a buffer may be made by the first forward pass
            new.grad = None
        report = _report(old, state.masks, masks, sets, before, settings, holes, state, trials)
        repaired = state.model.model.to(given)
        repaired.eval()  # which may return nothing
        for name, new in (*repaired.named_parameters(), *repaired.named_buffers()):
            new.data = new.data.to(theirs.get(name, new).device)
        return repaired, report


def preview(model: nn.Module, data: Images | Dataset, *, layer: str | None = None, k: float = 2.0,
            holes: str | Holes = "black", mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
            reshape_transform: Callable[[Tensor], Tensor] | None = None, device: torch.device | str | None = None,
            tests: dict | None = None, seed: int = 0) -> Report:
    """Show what `masktune` would hide, and train nothing: heat maps, masks, and what hiding them costs the model.

    Masks that miss the shortcut are the commonest failure, and they are seen here. Arguments and errors are those of
    `masktune`; a few hundred images are enough.
    """
    parallel.start()
    holes = holes_of(holes)
    device = torch.device(device or best_device())
    with computing_on(device):
        old, sets = opened(model, data, tests or {}, layer, k, mean, std, reshape_transform, device)
        _, _, masks, before = _look(old, sets, k, device)
        settings = {"layer": old.layer, "k": float(k), "holes": repr(holes), "seed": int(seed)}
        return _report(old, masks, masks, sets, before, settings, holes)


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


def _best(tuned: Callable[[float], State], lrs: Sequence[float], some: Images, masks: Masks, seed: int
          ) -> tuple[State, list[dict[str, float | None]]]:
    """The best of the LRs' states, and what was seen of each LR, the best first: see `masktune`."""
    if len(lrs) == 1:
        return tuned(lrs[0]), [{"lr": lrs[0]}]
    tied: list[tuple[float, State, dict]] = []  # those within half a point of the best so far, the smallest LR first
    trials = []
    for i, lr in enumerate(lrs):
        start = time.monotonic()
        try:
            state = tuned(lr)
        except FloatingPointError:
            if not tied and lr == lrs[-1]:
                raise
            trials.append({"lr": lr, "as is": None, "swapped": None})
            continue
        seen = {"lr": lr, "as is": accuracy(state.model, some.images, some.labels),
                "swapped": swap_test(state.model, some, masks, seed)}
        low = min(value for value in (seen["as is"], seen["swapped"]) if value is not None)
        tied.append((low, state, seen))
        tied = [one for one in tied if one[0] >= max(tied, key=itemgetter(0))[0] - TIED]
        trials.append(seen)
        if i == 0 and parallel.rank() == 0:
            took = time.monotonic() - start
            print(f"masktune: {len(lrs)} LRs are tried; {lr:g} took {took:.0f} s, the others will take about "
                  f"{(len(lrs) - 1) * took:.0f} s", flush=True)
    _, state, best = tied[0]
    return state, [best, *(one for one in trials if one is not best)]


def _report(old: Classifier, masks: Masks, first: Masks, sets: dict[str, Images], before: dict[str, Score],
            settings: dict[str, object], holes: Holes, state: State | None = None,
            trials: Sequence[dict] = ()) -> Report:
    """The report of a repair, or a preview; `failure` names what failed.

    masks: those trained on; first: those of the old model.
    """
    train, seed, k, found = sets["train"], settings["seed"], settings["k"], {}
    new = state.model if state else old
    shown = Shown(train.images, masks, holes, train.labels, seed, state.epoch - 1 if state else 0)
    some, own = few(train, evidence.SWAPPED, first)
    try:
        found["covered"] = accuracy(old, Shown(some.images, own, COVERED), some.labels)
        found["swaps"] = {"train": [swap_test(old, some, own, seed)]}
        if state:
            known = trials[0].get("swapped")
            found["swaps"]["train"].append(swap_test(new, some, own, seed) if known is None else known)
        found["examples"] = evidence.examples(old, new, train, shown)
        if state:
            found["after"] = {name: scored(infer(new, data.images).argmax(1), data) for name, data in sets.items()}
            for name, data in sets.items():
                if name != "train" and data.groups is None and data.images.shape[2:] == train.images.shape[2:]:
                    part, _ = few(data, evidence.SWAPPED)
                    hot = find_masks(old, part.images, k)
                    found["swaps"][name] = [swap_test(model, part, hot, seed) for model in (old, new)]
            found["again"] = evidence.look_again(new, *few(train, evidence.SWAPPED, masks), k, seed)
            if found["swaps"]["train"][0] is not None:
                found["twins"] = evidence.twins(old, new, some, own, seed)
    except (Exception, KeyboardInterrupt) as error:  # the repaired model is worth more than the report
        found["failure"] = f"The report is not complete: {type(error).__name__}: {error}"
        warnings.warn(found["failure"], stacklevel=3)
    hidden, exchanged = shown.shares()
    device = device_name(next(old.parameters()).device)
    return Report(train.classes, train.labels, masks, hidden, exchanged, before, settings, device,
                  state.history if state else {}, trials=list(trials), **found)
