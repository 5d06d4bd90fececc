"""Repair a classifier of your own: `masktune`, what is checked before it and reported after it."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import parallel
from .checkpoint import load_or_run
from .checks import check_count, check_number, check_threshold
from .classifier import copied, unwrapped
from .datasets.images import Images
from .device import best_device, room_for
from .masking import find_masks
from .rehearsal import as_given, data_sets, first_scores, rehearse, working_copy
from .report.report import FEW, MANY, Report, hidden_share
from .state import State, digest
from .training import run_epoch, sgd


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
