"""The experiments as frozen data, each number with its unit and origin, and the stages that run them."""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from src.checkpoint import load_or_run
from src.datasets import SQUARE, TEST_SETS, DataUnavailable, SpuriousDigits, SpuriousMNIST
from src.datasets.mnist import ensure_mnist
from src.masktune import masktune_epoch, randmask_epoch
from src.models import ResNet50, SmallCNN
from src.seeding import generator
from src.state import State
from src.training import PRECISIONS, best_device, infer, sgd, train_epoch

CHECKPOINTS = Path("checkpoints")
DATASETS = ("SpuriousMNIST", "SpuriousDigits")
MODELS = {"SmallCNN": SmallCNN, "ResNet50": ResNet50}
FINETUNES = ("masktune", "randmask")
LATER = {"precision": "fp32"}  # fields that files written before them lack
VALID = {"dataset": f"one of {DATASETS}", "model": f"one of {tuple(MODELS)}", "method": f"one of {FINETUNES}",
         "epochs": "at least 1", "batch_size": "at least 1 image", "lr": "positive and finite",
         "lr_halved_every": "at least 1 epoch", "iterations": "at least 1", "threshold_std": "finite",
         "precision": f"one of {PRECISIONS}"}


def _check(config: object, **valid: bool) -> None:
    """Raise ValueError for the first field that is not valid, naming it and what would be."""
    for name, good in valid.items():
        if not good:
            raise ValueError(f"{type(config).__name__}: {name}={getattr(config, name)!r}; it is {VALID[name]}")


@dataclass(frozen=True)
class Erm:
    """Plain training."""

    dataset: str = "SpuriousMNIST"
    model: str = "SmallCNN"  # paper
    class_mix_ratio: float = 0.01  # share of training images whose square is on the wrong side; paper
    mix_order: str = "random"  # which images those are; prior notebook. "digit": official code
    epochs: int = 100  # paper
    batch_size: int = 128  # images; paper
    lr: float = 0.01  # paper
    lr_halved_every: int = 25  # epochs; paper
    momentum: float = 0.9  # paper
    weight_decay: float = 1e-4  # paper
    precision: str = "fp32"  # of the training steps, the fine-tune's too; "bf16" is faster on a GPU

    def __post_init__(self) -> None:
        _check(self, dataset=self.dataset in DATASETS, model=self.model in MODELS, epochs=self.epochs >= 1,
               precision=self.precision in PRECISIONS, batch_size=self.batch_size >= 1, lr=0 < self.lr < math.inf,
               lr_halved_every=self.lr_halved_every >= 1)

    def lr_at(self, epoch: int) -> float:
        """The LR in force during an epoch, counted from 0."""
        return self.lr * 0.5 ** (epoch // self.lr_halved_every)


@dataclass(frozen=True)
class FineTune:
    """The one-epoch fine-tune on masked images."""

    method: str = "masktune"  # whose masks: "masktune" or "randmask", the paper's control
    lr: float = 0.01  # official code; the paper's last LR, 0.00125, forgets the square too slowly (see the notebook)
    threshold_std: float = 2.0  # k in m + k s; paper. RandMask has no threshold
    iterations: int = 1  # of masks and one epoch each; paper
    accumulate: bool = False  # whether pixels hidden in one iteration stay hidden in the next

    def __post_init__(self) -> None:
        _check(self, method=self.method in FINETUNES, lr=0 < self.lr < math.inf, iterations=self.iterations >= 1,
               threshold_std=math.isfinite(self.threshold_std))


@dataclass(frozen=True)
class Setting:
    """One experiment: how ERM is trained, and what is expected of it on the test sets."""

    name: str  # folder under checkpoints/
    title: str
    erm: Erm
    expect: str
    finetune: FineTune = field(default_factory=FineTune)
    seeds: tuple[int, ...] = (0, 1, 2)
    save_steps: int | None = None  # also save in the middle of an epoch, every so many steps: for long epochs


MNIST = (
    Setting("mnist-random", "1 % conflicting, random", Erm(),
            "ERM raw about 92 %, malicious 80 to 88 %; MaskTune at least 98.5 % on both"),
    Setting("mnist-digit", "1 % conflicting, by digit", Erm(mix_order="digit"),
            "ERM raw about 57 %, malicious 18 to 20 % (by arithmetic 18.74 %); MaskTune at least 98 % on both"),
    Setting("mnist-none", "none conflicting", Erm(class_mix_ratio=0.0),
            "ERM raw about 49 %, malicious about 0 %; MaskTune at least 97 % on both"),
)
DIGITS = tuple(
    replace(setting, name=setting.name.replace("mnist", "digits"), seeds=(0, 1),  # a minute on two cores
            expect="MaskTune clearly better than ERM on malicious, with 450 test images",
            erm=replace(setting.erm, dataset="SpuriousDigits", epochs=10, batch_size=32))
    for setting in MNIST)
METHODS = ("ERM", "RandMask", "MaskTune")
FINETUNE_LRS = (0.01, 0.005, 0.0025, 0.00125)  # the four of ERM's schedule: official code's first to paper's last


def choose_settings(root: Path | str = "data", dataset: str | None = None) -> tuple[Setting, ...]:
    """Return the settings on MNIST, or on scikit-learn's digits where MNIST cannot be had, which is said in one line.

    dataset: "mnist" or "digits"; taken from the environment variable MASKTUNE_DATASET, else "mnist", if not given.
    """
    dataset = dataset or os.environ.get("MASKTUNE_DATASET", "mnist")
    if dataset not in ("mnist", "digits"):
        raise ValueError(f"dataset={dataset!r} is unknown; it is 'mnist' or 'digits'")
    if dataset == "mnist":
        try:
            ensure_mnist(Path(root))
            return MNIST
        except DataUnavailable as reason:
            print(f"MNIST is not at hand, so everything below runs on scikit-learn's digits instead: {reason}.")
    return DIGITS


def load_data(erm: Erm, seed: int, test_set: str | None = None, root: Path | str = "data"
              ) -> SpuriousMNIST | SpuriousDigits:
    """Return the training set of an experiment and seed, or one of its test sets, "raw" or "malicious"."""
    arguments = dict(train=test_set is None, test_set=test_set, class_mix_ratio=erm.class_mix_ratio,
                     mix_order=erm.mix_order, seed=seed)
    return SpuriousDigits(**arguments) if erm.dataset == "SpuriousDigits" else SpuriousMNIST(root, **arguments)


def new_model(seed: int, name: str = "SmallCNN") -> nn.Module:
    """A model with PyTorch's default initialisation, a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        model = MODELS[name]()
    return model.to(best_device(), memory_format=torch.channels_last)


def run_erm(setting: Setting, seed: int) -> State:
    """ERM: loaded, continued or trained; kept in `checkpoints/<setting>/erm-seed<seed>.pt`."""
    erm = setting.erm
    data = _on_device(setting, seed)

    def fresh() -> State:
        model = new_model(seed, erm.model)
        return State(model, sgd(model, erm.momentum, erm.weight_decay))

    def advance(state: State, after_step: Callable[[], None]) -> dict[str, float]:
        lr = erm.lr_at(state.epoch)
        images, labels, _ = data()
        loss, accuracy = train_epoch(state, images, labels, lr=lr, batch_size=erm.batch_size, seed=seed,
                                     precision=erm.precision, after_step=after_step)
        return dict(loss=loss, accuracy=accuracy, lr=lr)

    config = {"stage": "erm", "seed": seed, **_as_config(erm)}
    return load_or_run(CHECKPOINTS / setting.name / f"erm-seed{seed}.pt", config, erm.epochs, fresh, advance,
                       save_steps=setting.save_steps)


def run_finetune(setting: Setting, seed: int, erm_state: State, finetune: FineTune | None = None) -> State:
    """The fine-tune that follows an ERM state: loaded, continued or trained. The ERM state itself is not changed.

    Kept in `checkpoints/<setting>/<method>-seed<seed>.pt`; another LR than the setting's is named in the file.
    """
    erm, finetune = setting.erm, finetune or setting.finetune
    data = _on_device(setting, seed)

    def advance(state: State, after_step: Callable[[], None]) -> dict[str, float]:
        images, labels, squares = data()
        common = dict(lr=finetune.lr, batch_size=erm.batch_size, seed=seed, precision=erm.precision,
                      after_step=after_step)
        if finetune.method == "masktune":
            loss, accuracy = masktune_epoch(state, images, labels, k=finetune.threshold_std,
                                            accumulate=finetune.accumulate, **common)
        else:
            loss, accuracy = randmask_epoch(state, images, labels, **common)
        seen = infer(erm_state.model, images, state.masks).argmax(1)
        return dict(loss=loss, accuracy=accuracy, lr=finetune.lr, hidden=state.masks.share(),
                    squares_covered=state.masks[squares][:, :SQUARE, :SQUARE].float().mean().item(),
                    erm_accuracy_on_masked=(seen == labels).float().mean().item())

    lr_name = "" if finetune.lr == setting.finetune.lr else f"-lr{finetune.lr:g}"
    config = {"stage": "finetune", "seed": seed, **asdict(finetune), "erm": _as_config(erm)}
    return load_or_run(CHECKPOINTS / setting.name / f"{finetune.method}{lr_name}-seed{seed}.pt", config,
                       erm_state.epoch + finetune.iterations, lambda: start_finetune(erm, erm_state), advance,
                       save_steps=setting.save_steps)


def start_finetune(erm: Erm, erm_state: State) -> State:
    """The state from which a fine-tune starts: copies of ERM's last weights and optimizer state."""
    model = copy.deepcopy(erm_state.model)
    optimizer = sgd(model, erm.momentum, erm.weight_decay)
    optimizer.load_state_dict(copy.deepcopy(erm_state.optimizer.state_dict()))  # PyTorch would share its tensors
    return State(model, optimizer, epoch=erm_state.epoch, parents={"erm": erm_state.digest()})


@dataclass(frozen=True)
class Run:
    """One setting with one seed: the states after ERM, RandMask and MaskTune."""

    setting: Setting
    seed: int
    erm: State
    randmask: State
    masktune: State


def run(setting: Setting, seed: int) -> Run:
    """Load or run ERM, RandMask and MaskTune for one setting and seed."""
    erm = run_erm(setting, seed)
    randmask = run_finetune(setting, seed, erm, replace(setting.finetune, method="randmask"))
    return Run(setting, seed, erm, randmask, run_finetune(setting, seed, erm))


def load_tests(setting: Setting, root: Path | str = "data") -> dict[str, SpuriousMNIST | SpuriousDigits]:
    """Both test sets of a setting, by name. They are the same for every setting and seed of one data set."""
    return {name: load_data(setting.erm, 0, name, root) for name in TEST_SETS}


def predict(states: list[State], tests: dict) -> dict[str, Tensor]:
    """Predicted classes on each test set: one state a seed -> {test set: (seeds, N) int64}."""
    return {name: torch.stack([infer(state.model, test.images).argmax(1).cpu() for state in states])
            for name, test in tests.items()}


def predict_all(runs: list[Run], tests: dict) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Predictions of every method: {setting title: {method: {test set: (seeds, N) int64}}}."""
    titles = dict.fromkeys(run.setting.title for run in runs)
    return {title: {method: predict([getattr(run, method.lower()) for run in runs if run.setting.title == title], tests)
                    for method in METHODS} for title in titles}


def finetune_lr_study(runs: list[Run], tests: dict) -> dict[str, dict[str, Tensor]]:
    """MaskTune's accuracy at each LR of `FINETUNE_LRS`, same ERM weights: {setting title: {test set: (seeds, LRs)}}."""
    table = {}
    for run in runs:
        states = [run_finetune(run.setting, run.seed, run.erm, replace(run.setting.finetune, lr=lr))
                  for lr in FINETUNE_LRS]
        for name, guesses in predict(states, tests).items():
            correct = (guesses == tests[name].labels).double().mean(1)
            table.setdefault(run.setting.title, {}).setdefault(name, []).append(correct)
    return {title: {name: torch.stack(seeds) for name, seeds in sets.items()} for title, sets in table.items()}


def _as_config(erm: Erm) -> dict:
    """What a file holds of a recipe: all fields, but those that came later only where they are not at their default."""
    return {name: value for name, value in asdict(erm).items() if name not in LATER or value != LATER[name]}


def _on_device(setting: Setting, seed: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """A function that returns the training images, labels and squares on the device; built at its first call."""

    @cache
    def data() -> tuple[Tensor, Tensor, Tensor]:
        train = load_data(setting.erm, seed)
        return tuple(tensor.to(best_device()) for tensor in (train.images, train.labels, train.squares))

    return data
