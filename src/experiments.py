"""The stages of an experiment, run or loaded: data, ERM, RandMask, MaskTune, predictions."""

import copy
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from src.checkpoint import load_or_run
from src.datasets import SQUARE, CelebA, DataUnavailable, ImageNet9, SpuriousDigits, SpuriousMNIST, Waterbirds
from src.datasets.grouped import Grouped
from src.datasets.images import Images
from src.datasets.mnist import ensure_mnist
from src.datasets.small import small_pictures
from src.datasets.square import SpuriousSquare
from src.masktune import masktune_epoch, randmask_epoch
from src.models import ResNet32, ResNet50, SmallCNN
from src.recipes import DIGITS, FINETUNE_LRS, MNIST, Erm, FineTune, PhotographErm, SelectiveErm, Setting
from src.seeding import generator
from src.state import State
from src.training import accuracy, best_device, infer, room_for, sgd, train_epoch

CHECKPOINTS = Path("checkpoints")
DATA = Path("data")
LATER = {"precision": "fp32", "classes": 2, "weights": None, "augmentation": None,
         "optimizer": "SGD", "select": "last"}  # fields that files written before them lack, with what they had
METHODS = ("ERM", "RandMask", "MaskTune")


def choose_settings(root: Path | str | None = None, dataset: str | None = None) -> tuple[Setting, ...]:
    """Return the settings on MNIST, or on scikit-learn's digits where MNIST cannot be had, which is said in one line.

    dataset: "mnist" or "digits"; taken from the environment variable MASKTUNE_DATASET, else "mnist", if not given.
    """
    dataset = dataset or os.environ.get("MASKTUNE_DATASET", "mnist")
    if dataset not in ("mnist", "digits"):
        raise ValueError(f"dataset={dataset!r} is unknown; it is 'mnist' or 'digits'")
    if dataset == "mnist":
        try:
            ensure_mnist(Path(root or DATA))
            return MNIST
        except DataUnavailable as reason:
            print(f"MNIST is not at hand, so everything below runs on scikit-learn's digits instead: {reason}.")
    return DIGITS


def load_data(erm: Erm, seed: int = 0, test_set: str | None = None, root: Path | str | None = None
              ) -> SpuriousSquare | Images:
    """Return the training set of an experiment, or one of its other sets: `images`, `labels` and `groups`.

    test_set: "raw" or "malicious" of the digits; "val" or "test" of photographs, or a variant of ImageNet-9. The seed
    draws the squares; photographs are what they are, decoded at the first call and kept in `root/cache/`.
    """
    root = Path(root or DATA)
    if isinstance(erm, PhotographErm):
        view = erm.train_view if test_set is None else erm.test_view
        name = f"{erm.dataset}-{test_set or 'train'}-{view.height}x{view.width}".lower().replace(", ", "-")
        return photographs(erm.dataset, test_set or "train", root).load(view, root / "cache" / name)
    if isinstance(erm, SelectiveErm):
        return small_pictures(erm.dataset, test_set or "train", erm.view, root)
    arguments = dict(train=test_set is None, test_set=test_set, class_mix_ratio=erm.class_mix_ratio,
                     mix_order=erm.mix_order, seed=seed)
    return SpuriousDigits(**arguments) if erm.dataset == "SpuriousDigits" else SpuriousMNIST(root, **arguments)


def photographs(dataset: str, split: str, root: Path | str | None = None) -> Grouped:
    """The files of a split of photographs, with their groups; FileNotFoundError says what is missing and where from."""
    root = Path(root or DATA)
    birds = root / "waterbird_complete95_forest2water2"
    return {"Waterbirds": lambda: Waterbirds(birds, split),
            "Waterbirds, corrected": lambda: Waterbirds(birds, split, birds / "waterbirds_fixed.csv"),
            "CelebA": lambda: CelebA(root / "celeba", split),
            "ImageNet9": lambda: ImageNet9(root, split)}[dataset]()


def new_model(seed: int, name: str = "SmallCNN", classes: int = 2, weights: str | None = None) -> nn.Module:
    """A model with PyTorch's default initialisation, a pure function of the seed; ResNet50 can start from `weights`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        model = (ResNet50(classes, weights) if name == "ResNet50" else
                 {"SmallCNN": SmallCNN, "ResNet32": ResNet32}[name](classes))
    return model.to(best_device(), memory_format=torch.channels_last)


def new_optimizer(model: nn.Module, erm: Erm) -> torch.optim.Optimizer:
    """A recipe's optimizer of a model; its LR is written by `train_epoch`."""
    if erm.optimizer == "Adam":
        return torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=erm.weight_decay, fused=True)
    return sgd(model, erm.momentum, erm.weight_decay)


def run_erm(setting: Setting, seed: int) -> State:
    """ERM: loaded, continued or trained; kept in `checkpoints/<setting>/erm-seed<seed>.pt`.

    The state returned has the weights that the recipe selects: the last, or the best on the validation set.
    """
    erm = setting.erm
    data, validation = _on_device(setting, seed), _on_device(setting, seed, "val")
    path = CHECKPOINTS / setting.name / f"erm-seed{seed}.pt"

    def fresh() -> State:
        weights = None if path.exists() else erm.weights  # a file that is there has its own
        model = new_model(seed, erm.model, erm.classes, weights)
        return State(model, new_optimizer(model, erm))

    def advance(state: State, after_step: Callable[[], None]) -> dict[str, float]:
        images, labels, _ = data()
        lr = erm.lr_at(state.epoch)
        loss, met = train_epoch(state, images, labels, lr=lr, after_step=after_step, **_options(erm, seed))
        seen = dict(loss=loss, accuracy=met, lr=lr)
        if erm.select == "best":
            images, labels, _ = validation()
            seen["validation"] = accuracy(state.model, images, labels)
            state.keep_if_best(seen["validation"])
        return seen

    config = {"stage": "erm", "seed": seed, **as_config(erm)}
    state = load_or_run(path, config, erm.epochs, fresh, advance, save_steps=setting.save_steps)
    if erm.select == "best":
        state.take_best()
    return state


def run_finetune(setting: Setting, seed: int, erm_state: State, finetune: FineTune | None = None) -> State:
    """The fine-tune that follows an ERM state: loaded, continued or trained. The ERM state itself is not changed.

    Kept in `checkpoints/<setting>/<method>-seed<seed>.pt`; another LR than the setting's is named in the file.
    """
    erm, finetune = setting.erm, finetune or setting.finetune
    data = _on_device(setting, seed)

    def advance(state: State, after_step: Callable[[], None]) -> dict[str, float]:
        images, labels, squares = data()
        options = dict(lr=finetune.lr, after_step=after_step, **_options(erm, seed))
        if finetune.method == "masktune":
            loss, met = masktune_epoch(state, images, labels, k=finetune.threshold_std, accumulate=finetune.accumulate,
                                       **options)
        else:
            loss, met = randmask_epoch(state, images, labels, **options)
        seen = dict(loss=loss, accuracy=met, lr=finetune.lr, hidden=state.masks.share(),
                    erm_accuracy_on_masked=accuracy(erm_state.model, images, labels, state.masks))
        if squares is not None:
            seen["squares_covered"] = state.masks[squares][:, :SQUARE, :SQUARE].float().mean().item()
        return seen

    lr_name = "" if finetune.lr == setting.finetune.lr else f"-lr{finetune.lr:g}"
    config = {"stage": "finetune", "seed": seed, **asdict(finetune), "erm": as_config(erm)}
    return load_or_run(CHECKPOINTS / setting.name / f"{finetune.method}{lr_name}-seed{seed}.pt", config,
                       erm_state.epoch + finetune.iterations, lambda: start_finetune(erm, erm_state), advance,
                       save_steps=setting.save_steps)


def start_finetune(erm: Erm, erm_state: State) -> State:
    """The state from which a fine-tune starts: copies of ERM's weights and optimizer state."""
    model = copy.deepcopy(erm_state.model)
    optimizer = new_optimizer(model, erm)
    optimizer.load_state_dict(copy.deepcopy(erm_state.optimizer.state_dict()))  # PyTorch would share its tensors
    return State(model, optimizer, epoch=erm_state.epoch, parents={"erm": erm_state.digest()})


@dataclass(frozen=True)
class Run:
    """One setting with one seed: the states after ERM, RandMask (where it runs) and MaskTune."""

    setting: Setting
    seed: int
    erm: State
    randmask: State | None
    masktune: State


def run(setting: Setting, seed: int) -> Run:
    """Load or run ERM, RandMask and MaskTune for one setting and seed."""
    erm = run_erm(setting, seed)
    control = replace(setting.finetune, method="randmask")
    randmask = run_finetune(setting, seed, erm, control) if setting.randmask else None
    return Run(setting, seed, erm, randmask, run_finetune(setting, seed, erm))


def load_tests(setting: Setting, root: Path | str | None = None) -> dict[str, SpuriousSquare | Images]:
    """The test sets of a setting, by name. They are the same for every seed, and every setting of one data set."""
    return {name: load_data(setting.erm, 0, name, root) for name in setting.test_sets}


def predict(states: list[State], tests: dict) -> dict[str, Tensor]:
    """Predicted classes on each test set: one state a seed -> {test set: (seeds, N) int64}."""
    return {name: torch.stack([infer(state.model, test.images).argmax(1).cpu() for state in states])
            for name, test in tests.items()}


def predict_all(runs: list[Run], tests: dict) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Predictions of every method: {setting title: {method: {test set: (seeds, N) int64}}}."""
    by_title: dict[str, list[Run]] = {}
    for run in runs:
        by_title.setdefault(run.setting.title, []).append(run)
    return {title: {method: predict([getattr(run, method.lower()) for run in same], tests)
                    for method in METHODS if method != "RandMask" or same[0].setting.randmask}
            for title, same in by_title.items()}


def finetune_lr_study(runs: list[Run], tests: dict) -> dict[str, dict[str, Tensor]]:
    """MaskTune's accuracy at each LR of `FINETUNE_LRS`, same ERM weights: {setting title: {test set: (seeds, LRs)}}."""
    table = {}
    for run in runs:
        own = run.setting.finetune
        states = [run.masktune if lr == own.lr else
                  run_finetune(run.setting, run.seed, run.erm, replace(own, lr=lr)) for lr in FINETUNE_LRS]
        for name, test in tests.items():
            correct = torch.tensor([accuracy(state.model, test.images, test.labels) for state in states],
                                   dtype=torch.float64)
            table.setdefault(run.setting.title, {}).setdefault(name, []).append(correct)
    return {title: {name: torch.stack(seeds) for name, seeds in sets.items()} for title, sets in table.items()}


def as_config(erm: Erm) -> dict:
    """What a file holds of a recipe: all fields, but those that came later only where they are not at their default."""
    return {name: value for name, value in asdict(erm).items() if name not in LATER or value != LATER[name]}


def _options(erm: Erm, seed: int) -> dict:
    """What a recipe says of every epoch, ERM's and the fine-tune's; CUDA graphs if MASKTUNE_CAPTURE=1 asks for them."""
    capture = os.environ.get("MASKTUNE_CAPTURE", "0")
    if capture not in ("0", "1"):
        raise ValueError(f"MASKTUNE_CAPTURE={capture!r} is unknown; it is '0' or '1'")
    return dict(batch_size=erm.batch_size, seed=seed, precision=erm.precision, augmentation=erm.augmentation,
                capture=capture == "1")


def _on_device(setting: Setting, seed: int, test_set: str | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """A function that returns images, labels and squares (None of photographs); built at its first call.

    They are on the device where they fit, else stay where they are: photographs in their memory map.
    """

    @cache
    def data() -> tuple[Tensor, Tensor, Tensor | None]:
        found = load_data(setting.erm, seed, test_set)
        device = room_for(found.images)
        squares = getattr(found, "squares", None)
        return found.images.to(device), found.labels.to(device), None if squares is None else squares.to(device)

    return data
