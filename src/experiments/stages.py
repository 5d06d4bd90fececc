"""The stages of an experiment, run or loaded: data, ERM, the fine-tune, predictions."""

import copy
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import datasets, parallel
from ..checkpoint import finished, load_or_run
from ..datasets import Images
from ..device import best_device, cores, cpu_threads, room_for
from ..holes import Shown
from ..inference import accuracy
from ..masking import masktune_epoch, randmask_epoch
from ..models import Backbone, ResNet32, ResNet50, SmallCNN
from ..seeding import generator
from ..state import State
from ..training import sgd, train_epoch
from .recipes import DIGITS, MNIST, Erm, FineTune, Places, Setting
from .workers import side_by_side


def choose_settings() -> tuple[Setting, ...]:
    """The settings on MNIST, or with MASKTUNE_DATASET=digits in the environment on scikit-learn's few digits."""
    name, settings = os.environ.get("MASKTUNE_DATASET", "mnist"), {"mnist": MNIST, "digits": DIGITS}
    if name not in settings:
        raise ValueError(f"expected MASKTUNE_DATASET to be 'mnist' or 'digits', got {name!r}")
    return settings[name]


def load_data(places: Places, erm: Erm, seed: int = 0, part: str = "train") -> Images:
    """A part of an experiment's data: "train", "val" or a test set; the seed draws what is random in it."""
    options = dict(erm.options)
    view = options.pop("test_view", options.get("view"))
    if view and part != "train":
        options["view"] = view
    return datasets.load(erm.dataset, part, root=places.data, seed=seed, **options)


def load_tests(places: Places, setting: Setting) -> dict[str, Images]:
    """The test sets of a setting, by name. They are the same for every seed, and every setting of one data set."""
    return {name: load_data(places, setting.erm, 0, name) for name in setting.test_sets}


def new_model(seed: int, name: str = "SmallCNN", classes: int = 2, weights: str | None = None,
              layer: str | None = None) -> nn.Module:
    """A model with PyTorch's default initialisation, a pure function of the seed; others start as of `Backbone`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        ours = {"SmallCNN": SmallCNN, "ResNet32": ResNet32, "ResNet50": partial(ResNet50, weights=weights, layer=layer)}
        model = ours[name](classes) if name in ours else Backbone(name, classes, weights, layer)
    return model.to(best_device(), memory_format=torch.channels_last)


def new_optimizer(model: nn.Module, erm: Erm) -> torch.optim.Optimizer:
    """A recipe's optimizer of a model; its LR is written by `train_epoch`."""
    if erm.optimizer == "Adam":
        return torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=erm.weight_decay, fused=True)
    return sgd(model.parameters(), erm.momentum, erm.weight_decay)


def erm_path(places: Places, setting: Setting, seed: int) -> Path:
    return places.checkpoints / setting.name / f"erm-seed{seed}.pt"


def finetune_path(places: Places, setting: Setting, seed: int, finetune: FineTune) -> Path:
    """The file of a fine-tune, whose name says what is not as in the setting."""
    own = asdict(setting.finetune)
    other = "".join(f"-{name}-{value}" for name, value in asdict(finetune).items()
                    if value != own[name] and name != "method")
    return places.checkpoints / setting.name / f"{finetune.method}{other}-seed{seed}.pt"


def run_erm(places: Places, setting: Setting, seed: int) -> State:
    """ERM: loaded, continued or trained, see `load_or_run`; with the weights that the recipe selects."""
    erm = setting.erm
    data, validation = (cache(partial(_on_device, places, setting, seed, part)) for part in ("train", "val"))
    path = erm_path(places, setting, seed)

    def fresh() -> State:  # a file that is there has weights of its own
        model = new_model(seed, erm.model, erm.classes, None if path.exists() else erm.weights, erm.layer)
        return State(model, new_optimizer(model, erm))

    def advance(state: State) -> dict[str, float]:
        lr = erm.lr_at(state.epoch)
        loss, met = train_epoch(state, *data(), lr=lr, **epoch_options(erm, seed))
        seen = dict(loss=loss, accuracy=met, lr=lr)
        if erm.select == "best":
            seen["validation"] = accuracy(state.model, *validation())
            state.keep_if_best(seen["validation"])
        return seen

    state = load_or_run(path, {"stage": "erm", "seed": seed, **asdict(erm)}, erm.epochs, fresh, advance)
    if erm.select == "best":
        state.take_best()
    return state


def run_finetune(places: Places, setting: Setting, seed: int, erm_state: State, finetune: FineTune | None = None
                 ) -> State:
    """The fine-tune that follows an ERM state: loaded, continued or trained. The ERM state itself is not changed."""
    erm, finetune = setting.erm, finetune or setting.finetune
    data = cache(partial(_on_device, places, setting, seed, "train"))  # a finished stage needs none
    epoch = {"plain": train_epoch, "randmask": randmask_epoch, "masktune": partial(
        masktune_epoch, k=finetune.threshold_std, accumulate=finetune.accumulate)}[finetune.method]

    def advance(state: State) -> dict[str, float]:
        loss, met = epoch(state, *data(), lr=finetune.lr, order=finetune.order, holes=finetune.holes,
                          **epoch_options(erm, seed))
        shown = Shown(data()[0], state.masks, finetune.holes, data()[1], seed, state.epoch)
        return dict(loss=loss, accuracy=met, lr=finetune.lr, hidden=sum(shown.shares()))

    config = {"stage": "finetune", "seed": seed, **finetune.named(), "erm": asdict(erm)}
    return load_or_run(finetune_path(places, setting, seed, finetune), config, erm_state.epoch + finetune.iterations,
                       lambda: start_finetune(erm, erm_state), advance)


def start_finetune(erm: Erm, erm_state: State) -> State:
    """The state from which a fine-tune starts: copies of ERM's weights and optimizer state."""
    model = copy.deepcopy(erm_state.model)
    optimizer = new_optimizer(model, erm)
    optimizer.load_state_dict(copy.deepcopy(erm_state.optimizer.state_dict()))  # PyTorch would share its tensors
    return State(model, optimizer, epoch=erm_state.epoch, parents={"erm": erm_state.digest()})


def epoch_options(erm: Erm, seed: int) -> dict:
    """What a recipe says of every epoch, ERM's and the fine-tune's."""
    return dict(batch_size=erm.batch_size, seed=seed, precision=erm.precision, augmentation=erm.augmentation)


def _on_device(places: Places, setting: Setting, seed: int, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels, on the device where they fit, else where they are: photographs in their memory map."""
    found = load_data(places, setting.erm, seed, part)
    device = room_for(found.images)
    return found.images.to(device), found.labels.to(device)


class Run(NamedTuple):
    """One setting with one seed: the states after ERM and after MaskTune."""

    setting: Setting
    seed: int
    erm: State
    finetuned: State


def run(places: Places, setting: Setting, seed: int) -> Run:
    """Load or run ERM and MaskTune; the SmallCNN with one thread, so that no number of cores changes a bit."""
    with cpu_threads(1 if setting.erm.model == "SmallCNN" else torch.get_num_threads()):
        erm = run_erm(places, setting, seed)
        return Run(setting, seed, erm, run_finetune(places, setting, seed, erm))


def run_all(settings: tuple[Setting, ...], seeds: tuple[int, ...] | None = None,
            processes: int | None = None, places: Places = Places()) -> list[Run]:
    """Load or run all seeds of settings of one model; those that are not finished run side by side.

    processes: how many trainings share the cores, if not one on each GPU; the SmallCNN's are one on each core.
    """
    processes = None if settings[0].erm.model == "SmallCNN" else processes or max(1, torch.cuda.device_count())
    pairs = [(setting, seed) for setting in settings for seed in seeds or setting.seeds]
    missing = [(setting, seed) for setting, seed in pairs
               if not finished(finetune_path(places, setting, seed, setting.finetune),
                               setting.erm.epochs + setting.finetune.iterations)]
    if missing and parallel.world() == 1:
        print(f"{len(missing)} of {len(pairs)} runs are to be trained, or go on", flush=True)
        train_all(partial(run, places), missing, "training", processes, max(1, cores() // (processes or cores())))
    with cpu_threads(max(1, cores() // parallel.world())):
        return [run(places, setting, seed) for setting, seed in pairs]


def train_all(stage: Callable, tasks: list[tuple[Setting, int]], desc: str, *workers: int | None) -> None:
    """Run a stage of each setting and seed, side by side; what it returns is not sent between processes."""
    for _ in side_by_side(partial(_run, stage), tasks, desc, *workers):
        pass


def _run(stage: Callable, task: tuple[Setting, int]) -> None:
    stage(*task)
