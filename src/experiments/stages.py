"""The stages of an experiment, run or loaded: data, ERM, the fine-tune, predictions."""

import copy
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import datasets, parallel
from ..checkpoint import finished, load_or_run
from ..datasets import DataUnavailable, Images, SpuriousDigits, SpuriousMNIST
from ..device import best_device, cores, cpu_threads, room_for
from ..inference import accuracy, infer
from ..masking import find_masks, masktune_epoch, randmask_epoch
from ..masks import Masks
from ..models import Backbone, ResNet32, ResNet50, SmallCNN
from ..seeding import generator
from ..state import State
from ..training import sgd, train_epoch, weight_average
from .recipes import DIGITS, MNIST, Erm, FineTune, Setting
from .workers import side_by_side

CHECKPOINTS = Path("checkpoints")
DATA = Path("data")


def choose_settings(root: Path | str | None = None, dataset: str | None = None) -> tuple[Setting, ...]:
    """Return the settings on MNIST, or on scikit-learn's digits where MNIST is unavailable, which is said in one line.

    dataset: "mnist" or "digits"; taken from the environment variable MASKTUNE_DATASET, else "mnist", if not given.
    """
    dataset = dataset or os.environ.get("MASKTUNE_DATASET", "mnist")
    if dataset not in ("mnist", "digits"):
        raise ValueError(f"expected dataset to be 'mnist' or 'digits', got {dataset!r}")
    if dataset == "mnist":
        try:
            datasets.ensure_mnist(Path(root or DATA))
            return MNIST
        except DataUnavailable as reason:
            print(f"MNIST is unavailable, so everything below runs on scikit-learn's digits instead: {reason}.")
    return DIGITS


def load_data(erm: Erm, seed: int = 0, part: str = "train", root: Path | str | None = None) -> Images | SpuriousMNIST:
    """Return a part of an experiment's data, "train" or a test set: `images`, `labels` and `groups`.

    The seed draws the squares of digits; photographs are what they are.
    """
    return datasets.load(erm.dataset, part, root=root or DATA, seed=seed, **erm.data_options(part))


def new_model(seed: int, name: str = "SmallCNN", classes: int = 2, weights: str | None = None,
              layer: str | None = None) -> nn.Module:
    """A model with PyTorch's default initialisation, a pure function of the seed.

    torchvision's can start from `weights`, and be explained at another `layer`: see `Backbone`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        ours = {"SmallCNN": SmallCNN, "ResNet32": ResNet32, "ResNet50": partial(ResNet50, weights=weights)}
        model = ours[name](classes) if name in ours else Backbone(name, classes, weights, layer)
    return model.to(best_device(), memory_format=torch.channels_last)


def new_optimizer(model: nn.Module, erm: Erm) -> torch.optim.Optimizer:
    """A recipe's optimizer of a model; its LR is written by `train_epoch`."""
    if erm.optimizer == "Adam":
        return torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=erm.weight_decay, fused=True)
    return sgd(model, erm.momentum, erm.weight_decay)


def erm_path(setting: Setting, seed: int) -> Path:
    return CHECKPOINTS / setting.name / f"erm-seed{seed}.pt"


def finetune_path(setting: Setting, seed: int, finetune: FineTune) -> Path:
    """Where a fine-tune is kept; what differs from the setting's own is named in the file."""
    own = asdict(setting.finetune)
    other = "".join(f"-{name}-{value}" for name, value in asdict(finetune).items()
                    if value != own[name] and name != "method")
    return CHECKPOINTS / setting.name / f"{finetune.method}{other}-seed{seed}.pt"


def run_erm(setting: Setting, seed: int) -> State:
    """ERM: loaded, continued or trained; see `load_or_run`.

    The state returned has the weights that the recipe selects: the last, or the best on the validation set.
    """
    erm = setting.erm
    data, validation = on_device(setting, seed), on_device(setting, seed, "val")
    path = erm_path(setting, seed)

    def fresh() -> State:
        weights = None if path.exists() else erm.weights  # a file that is there has its own
        model = new_model(seed, erm.model, erm.classes, weights, erm.layer)
        return State(model, new_optimizer(model, erm))

    def advance(state: State) -> dict[str, float]:
        images, labels = data()
        lr = erm.lr_at(state.epoch)
        loss, met = train_epoch(state, images, labels, lr=lr, **epoch_options(erm, seed))
        seen = dict(loss=loss, accuracy=met, lr=lr)
        if erm.select == "best":
            images, labels = validation()
            seen["validation"] = accuracy(state.model, images, labels)
            state.keep_if_best(seen["validation"])
        return seen

    config = {"stage": "erm", "seed": seed, **asdict(erm)}
    state = load_or_run(path, config, erm.epochs, fresh, advance)
    if erm.select == "best":
        state.take_best()
    return state


def run_finetune(setting: Setting, seed: int, erm_state: State, finetune: FineTune | None = None) -> State:
    """The fine-tune that follows an ERM state: loaded, continued or trained. The ERM state itself is not changed."""
    erm, finetune = setting.erm, finetune or setting.finetune
    data = on_device(setting, seed)

    def advance(state: State) -> dict[str, float]:
        images, labels = data()
        average = weight_average(state.model) if finetune.ending == "average" else None
        loss, met = finetune_epoch(state, images, labels, erm, finetune, seed, average=average)
        if average is not None:
            state.model.load_state_dict(average.module.state_dict())
        return dict(loss=loss, accuracy=met, lr=finetune.lr, hidden=state.masks.share() if state.masks else 0.0)

    config = {"stage": "finetune", "seed": seed, **asdict(finetune), "erm": asdict(erm)}
    return load_or_run(finetune_path(setting, seed, finetune), config, erm_state.epoch + finetune.iterations,
                       lambda: start_finetune(erm, erm_state), advance)


def start_finetune(erm: Erm, erm_state: State) -> State:
    """The state from which a fine-tune starts: copies of ERM's weights and optimizer state."""
    model = copy.deepcopy(erm_state.model)
    optimizer = new_optimizer(model, erm)
    optimizer.load_state_dict(copy.deepcopy(erm_state.optimizer.state_dict()))  # PyTorch would share its tensors
    return State(model, optimizer, epoch=erm_state.epoch, parents={"erm": erm_state.digest()})


def finetune_epoch(state: State, images: Tensor, labels: Tensor, erm: Erm, finetune: FineTune, seed: int,
                   masks: Masks | None = None, average: AveragedModel | None = None) -> tuple[float, float]:
    """Run one iteration of a fine-tune; return its mean loss and accuracy, as they were met.

    masks: in place of those that the method would find; `state.masks` has those that were used. average: takes in the
    weights of the second half of the epoch.
    """
    options = dict(lr=finetune.lr, order=finetune.order, decay=finetune.ending == "decay", average=average,
                   **epoch_options(erm, seed))
    if masks is not None or finetune.method == "plain":
        state.masks = masks
        return train_epoch(state, images, labels, masks=masks, **options)
    if finetune.method == "masktune":
        return masktune_epoch(state, images, labels, k=finetune.threshold_std, accumulate=finetune.accumulate,
                              **options)
    return randmask_epoch(state, images, labels, **options)


def epoch_options(erm: Erm, seed: int) -> dict:
    """What a recipe says of every epoch, ERM's and the fine-tune's."""
    return dict(batch_size=erm.batch_size, seed=seed, precision=erm.precision, augmentation=erm.augmentation)


def on_device(setting: Setting, seed: int, part: str = "train") -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns images and labels; built at its first call.

    They are on the device where they fit, else stay where they are: photographs in their memory map.
    """

    @cache
    def data() -> tuple[Tensor, Tensor]:
        found = load_data(setting.erm, seed, part)
        device = room_for(found.images)
        return found.images.to(device), found.labels.to(device)

    return data


@dataclass(frozen=True)
class Run:
    """One setting with one seed: the states after ERM and after MaskTune."""

    setting: Setting
    seed: int
    erm: State
    finetuned: State


def run(setting: Setting, seed: int, threads: int | None = None) -> Run:
    """Load or run ERM and MaskTune for one setting and seed.

    threads: on a CPU; the setting's own if not given, which is one for the SmallCNN, else all cores.
    """
    threads = threads or setting.threads or max(1, cores() // parallel.world())
    if setting.threads is None and parallel.leads() and not finetune_path(setting, seed, setting.finetune).exists():
        print(f"{setting.name}, seed {seed}: {best_device().type}, {threads} CPU threads", flush=True)
    with cpu_threads(threads):
        erm = run_erm(setting, seed)
        return Run(setting, seed, erm, run_finetune(setting, seed, erm))


def run_all(settings: tuple[Setting, ...], seeds: tuple[int, ...] | None = None, processes: int = 1) -> list[Run]:
    """Load or run all seeds of all settings; those that are not finished run side by side.

    processes: how many large trainings at once share the cores; of the SmallCNN, there is one on each core.
    """
    pairs = [(setting, seed) for setting in settings for seed in seeds or setting.seeds]
    missing = [pair for pair in pairs if not _finished(*pair)]
    if missing and parallel.world() == 1:  # the trial is a training, at which several processes would have to meet
        hours = sum(_hours(setting) for setting, _ in missing)
        print(f"{len(missing)} of {len(pairs)} runs are to be trained, or go on: at most {hours:.1f} hours", flush=True)

    def beside(large: bool, at_once: int | None, threads: int) -> None:
        tasks = [pair for pair in missing if (pair[0].threads is None) == large]
        for _ in side_by_side(partial(_run, CHECKPOINTS, DATA, threads), tasks, "training", at_once, threads):
            pass

    if parallel.world() == 1:
        beside(large=False, at_once=None, threads=1)
        if processes > 1:
            beside(large=True, at_once=processes, threads=max(1, cores() // processes))
    return [run(setting, seed) for setting, seed in pairs]


@cache
def _hours(setting: Setting) -> float:
    """How long one run of a setting takes where all cores, or the GPU, work at such runs."""
    train, masks = image_seconds(setting)
    n = len(load_data(setting.erm))
    seconds = n * (train * (setting.erm.epochs + setting.finetune.iterations) + masks * setting.finetune.iterations)
    return seconds / (1 if best_device().type == "cuda" else cores()) / 3600


def image_seconds(setting: Setting, images: int = 256) -> tuple[float, float]:
    """Seconds that training and masks take for an image, on one core or one GPU, by a short trial."""
    erm, data = setting.erm, load_data(setting.erm)
    few, labels = data.images[:images].to(best_device()), data.labels[:images].to(best_device())
    model = new_model(0, erm.model, erm.classes)
    state, seconds = State(model, new_optimizer(model, erm)), []
    with cpu_threads(1):
        for work in (partial(train_epoch, state, few, labels, lr=0.0, **epoch_options(erm, 0)),
                     partial(find_masks, model, few)):
            begun = time.perf_counter()
            work()
            seconds.append((time.perf_counter() - begun) / len(few))
    return tuple(seconds)


def _finished(setting: Setting, seed: int) -> bool:
    return finished(finetune_path(setting, seed, setting.finetune), setting.erm.epochs + setting.finetune.iterations)


def _run(checkpoints: Path, data: Path, threads: int, pair: tuple[Setting, int]) -> None:
    global CHECKPOINTS, DATA
    CHECKPOINTS, DATA = checkpoints, data
    run(*pair, threads)


def load_tests(setting: Setting, root: Path | str | None = None) -> dict[str, SpuriousMNIST | SpuriousDigits | Images]:
    """The test sets of a setting, by name. They are the same for every seed, and every setting of one data set."""
    return {name: load_data(setting.erm, 0, name, root) for name in setting.test_sets}


def predict(states: list[State], tests: dict) -> dict[str, Tensor]:
    """Predicted classes on each test set: one state a seed -> {test set: (seeds, N) int64}."""
    return {name: torch.stack([infer(state.model, test.images).argmax(1).cpu() for state in states])
            for name, test in tests.items()}
