"""What MaskTune does on photographs of birds, and why: each condition is one row, measured once.

Data are in Waterbirds' layout. Where the birds' pixels are known, as in a set that `datasets.compose` made, a row says
what the masks hit, and two oracles show what perfect masks would do. All start from the ERM weights of finished runs.
Accuracies are in [0, 1], those that begin with `val` on the validation set: by them alone anything is chosen.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, cached_property, lru_cache, partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import datasets
from ..checkpoint import finished
from ..classifier import copied
from ..datasets import Images
from ..device import best_device, cores
from ..inference import accuracy, infer, pixels
from ..masking import find_masks, hottest, random_masks
from ..masks import Masks
from ..metrics import Score, adjusted_average, score
from ..rows import Row, matching, measured, row, saved
from ..saliency import xgradcam
from ..seeding import generator
from ..state import State, digest
from . import stages
from .dfr import refit_last_layer
from .recipes import BIRDS, Setting
from .studies import RESULTS
from .workers import side_by_side

CHOOSING_SEEDS, CHOOSING_EPOCHS = (10, 11), 5  # of ERM's candidates, which see the validation set alone
CANDIDATES = ({"lr": 0.001, "batch_size": 32}, {"lr": 0.003, "batch_size": 32}, {"lr": 0.01, "batch_size": 32},
              {"lr": 0.01, "batch_size": 128})
SEEDS = (0, 1, 2)  # of every question but "results", which takes all
LRS = (0.001, 0.003, 0.01)  # of the fine-tune
LAYERS = ("features", "features.14.conv.0", "features.7.conv.0", "features.13")  # the last block, its map 5x5; then two
# that end in a ReLU, of 10x10 and 20x20; and one that does not, of 10x10
REBUILT = [1675, 88, 22, 428]  # training images of each group in the set of the published rows
THRESHOLDS = (0.0, 1.0, 2.0)
FILLS = ("black", "other")
OURS = ({"k": 1.0}, {"layer": LAYERS[1], "k": 0.0}, {"method": "shuffled", "k": 1.0})  # more is hidden, none in black
BASE = {  # MaskTune as the paper has it; a condition says what differs
    "method": "masktune",  # or "erm"; "plain", the epoch without masks; "randmask"; "shuffled", MaskTune's masks, each
    # for another image; "background hidden" and "bird hidden", the oracles; "dfr", the last layer fitted anew on the
    # validation images, its groups equally large
    "lr": 0.001,  # of the fine-tune; of `LRS`, the best mean accuracy on the validation images
    "k": 2.0,
    "layer": "features",  # to be explained; a map of 5x5 at 160 pixels
    "fill": "black",  # what hidden pixels show; "other": the same pixels of another training image, drawn for each
    "iteration": 1,  # the last of so many
    "accumulate": False,  # whether hidden pixels stay hidden in the next iteration
    "erm_epochs": 2,  # after which masks and fine-tune start
}
ORACLES = ("background hidden", "bird hidden")
QUESTIONS: dict[str, list[Row]] = {
    "results": [{"method": method} for method in (
        "erm", "plain", "randmask", "masktune", *ORACLES, "dfr")],
    "lr": [{"method": method, "lr": lr} for method in ("plain", "masktune", "background hidden") for lr in LRS],
    "layer": [{"layer": layer} for layer in LAYERS],
    "k": [{"k": k} for k in THRESHOLDS],
    "fill": [{"method": method, "fill": fill} for method in ("masktune", "background hidden") for fill in FILLS],
    "iterations": [{}, *({"iteration": i, "accumulate": True} for i in (2, 3))],
    "lateness": [{"method": method, "erm_epochs": epochs} for method in ("erm", "masktune") for epochs in (1, 2, 5)],
    "ours": [{"fill": "other", **change} for change in OURS],
}


def choose(setting: Setting) -> list[Row]:
    """ERM's candidates on the validation set: `average`, `worst` and `train`, the accuracies after each epoch."""
    return measured(RESULTS / f"{setting.name}-erm.json", (
        {"setting": setting.name, "seed": seed, **candidate} for seed in CHOOSING_SEEDS for candidate in CANDIDATES),
        lambda missing: side_by_side(partial(_choose, setting, stages.DATA), missing, f"{setting.name}: candidates"))


def _choose(setting: Setting, data: Path, condition: Row) -> Row:
    seed = condition["seed"]
    erm = replace(setting.erm, epochs=CHOOSING_EPOCHS, lr=condition["lr"], batch_size=condition["batch_size"])
    train, validation = (stages.load_data(erm, seed, part, data) for part in ("train", "val"))
    model = stages.new_model(seed, erm.model, erm.classes, erm.weights, erm.layer)
    state, scores = State(model, stages.new_optimizer(model, erm)), []
    for _ in range(erm.epochs):
        _, met = stages.train_epoch(state, train.images, train.labels, lr=erm.lr, **stages.epoch_options(erm, seed))
        state.finish_epoch(train=met)
        scores.append(_scored(state.model, validation))
    return row(condition, {"average": [one.average for one in scores], "worst": [one.worst for one in scores],
                           "train": state.history["train"]})


def conditions(setting: Setting, *questions: str, counts: list[int] | None = None) -> list[Row]:
    """What some of `QUESTIONS` ask, each condition once; "recipe" names ERM's training, and data that are others.

    counts: training images of each group; None: as in the set of the published rows.
    """
    found, recipe = {}, asdict(setting.erm) | ({} if counts in (None, REBUILT) else {"train": counts})
    for question in questions:
        for seed, change in product(setting.seeds if question == "results" else SEEDS, QUESTIONS[question]):
            condition = {"setting": setting.name, "seed": seed, "recipe": digest(recipe)[:16], **BASE, **change}
            if condition["method"] not in ORACLES or knows_objects(setting):
                found[tuple(condition.values())] = condition
    return list(found.values())


def ask(setting: Setting, *questions: str) -> list[Row]:
    """The rows that answer some of `QUESTIONS` for the data that are there; what is missing is measured now."""
    counts = datasets.open_files(setting.erm.dataset, "train", stages.DATA).counts()
    return measured(_file(setting), conditions(setting, *questions, counts=counts), partial(_measure_all, setting))


def shipped(*questions: str) -> list[Row]:
    """The published rows of "Waterbirds, rebuilt" as `results/` has them: nothing is trained or measured."""
    rows = saved(_file(BIRDS[1]))
    return [matching(rows, condition) for condition in conditions(BIRDS[1], *questions)]


def tried() -> list[Row]:
    """ERM's candidates on the validation images of "Waterbirds, rebuilt", as published."""
    return saved(RESULTS / f"{BIRDS[1].name}-erm.json")


def knows_objects(setting: Setting) -> bool:
    """Whether the birds' pixels are known: Waterbirds is published without them."""
    return setting.erm.dataset == "Waterbirds, rebuilt"


def _file(setting: Setting) -> Path:
    return RESULTS / f"{setting.name}.json"


def _measure_all(setting: Setting, missing: list[Row]) -> Iterator[Row]:
    """Train the ERMs, then measure conditions; those that differ in nothing but the iteration go together."""
    tasks: dict[tuple, list[Row]] = {}
    for condition in missing:
        tasks.setdefault(tuple({**condition, "iteration": 0}.values()), []).append(condition)
    erms = [(seed, epochs) for seed, epochs in dict.fromkeys(
        (condition["seed"], condition["erm_epochs"]) for condition in missing)
        if not finished(stages.erm_path(after(setting, epochs), seed), epochs)]
    epochs = sum(epochs for _, epochs in erms) + sum(
        max(one["iteration"] for one in task) for task in tasks.values() if task[0]["method"] not in ("erm", "dfr"))
    train, masks = stages.image_seconds(setting, images=128)
    n, *held = (len(datasets.open_files(setting.erm.dataset, part, stages.DATA)) for part in ("train", "val", "test"))
    seconds = epochs * train * n + len(tasks) * masks * (n + sum(held))  # a test takes as long as a mask, or less
    hours = seconds / (1 if best_device().type == "cuda" else cores()) / 3600
    print(f"{setting.title}: {len(missing)} conditions, about {epochs} epochs: {hours:.1f} hours", flush=True)
    places = (stages.CHECKPOINTS, stages.DATA)
    for _ in side_by_side(partial(_train, setting, *places), erms, f"{setting.name}: ERM"):
        pass
    for rows in side_by_side(partial(_measure, setting, *places), tasks.values(), setting.name):
        yield from rows


def _train(setting: Setting, checkpoints: Path, data: Path, which: tuple[int, int]) -> None:
    stages.CHECKPOINTS, stages.DATA = checkpoints, data
    stages.run_erm(after(setting, which[1]), which[0])


def after(setting: Setting, epochs: int) -> Setting:
    """The setting with another number of ERM's epochs, and a folder of its own for them."""
    if epochs == setting.erm.epochs:
        return setting
    return replace(setting, name=f"{setting.name}-{epochs}", erm=replace(setting.erm, epochs=epochs))


def _measure(setting: Setting, checkpoints: Path, data: Path, conditions: list[Row]) -> list[Row]:
    stages.CHECKPOINTS, stages.DATA = checkpoints, data
    answers = _subject(after(setting, conditions[0]["erm_epochs"]), conditions[0]["seed"]).answers(conditions)
    return [row(condition, answers[condition["iteration"]]) for condition in conditions]


@lru_cache(maxsize=1)
def _subject(setting: Setting, seed: int) -> "Subject":
    return Subject(setting, seed)


class Subject:
    """One setting with one seed: the ERM state and the data that every condition starts from."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.seed, self.erm = setting, seed, stages.run_erm(setting, seed)
        self.train, self.val, self.test = (stages.load_data(setting.erm, seed, part)
                                           for part in ("train", "val", "test"))
        self.found = cache(lambda layer, k: find_masks(explained(self.erm.model, layer), self.train.images, k))

    @cached_property
    def objects(self) -> Masks:
        """The birds' pixels in the training images."""
        files = datasets.open_files(self.setting.erm.dataset, "train", stages.DATA)
        return Masks.of(files.objects(self.setting.erm.train_view))

    def answers(self, conditions: list[Row]) -> dict[int, Row]:
        """What one training measures, by iteration."""
        erm, condition = self.setting.erm, conditions[0]
        if condition["method"] == "erm":
            return {1: self.scores(self.erm.model)}
        state = stages.start_finetune(erm, self.erm)
        if condition["method"] == "dfr":
            refit_last_layer(state.model, self.val.images, self.val.labels, self.val.groups, self.seed)
            return {1: self.scores(state.model)}
        asked = {one["iteration"] for one in conditions}
        seen = {}
        for iteration in range(1, max(asked) + 1):
            before = state.masks if condition["accumulate"] else None
            masks = self.masks(condition, state, before)
            images = self.train.images
            if condition["fill"] == "other" and masks is not None:
                images, masks = self.filled(masks), None
            _, met = stages.train_epoch(state, images, self.train.labels, lr=condition["lr"], masks=masks,
                                        **stages.epoch_options(erm, self.seed))
            state.finish_epoch()
            if iteration in asked:
                seen[iteration] = self.hit(state.masks) | {"met": met} | self.scores(state.model)
        return seen

    def masks(self, condition: Row, state: State, before: Masks | None) -> Masks | None:
        """The masks of the next iteration, kept in the state; None: nothing is hidden."""
        method, images = condition["method"], self.train.images
        if method == "plain":
            return None
        if method == "randmask":
            state.masks = random_masks(len(images), tuple(images.shape[2:]), self.seed, state.epoch)
        elif method == "shuffled":
            masks = self.found(condition["layer"], condition["k"])
            order = torch.randperm(len(masks), generator=generator(self.seed, "shuffled"))
            state.masks = Masks(masks.shape, masks.bits[order])
        elif method in ORACLES:
            state.masks = self.objects if method == "bird hidden" else _inverted(self.objects)
        elif state.epoch == self.erm.epoch:
            state.masks = self.found(condition["layer"], condition["k"])
        else:
            state.masks = find_masks(explained(state.model, condition["layer"]), images, condition["k"], before)
        return state.masks

    def filled(self, masks: Masks) -> Tensor:
        """The training images with hidden pixels from another one each, drawn from the seed."""
        images = self.train.images.clone()
        others = torch.randperm(len(images), generator=generator(self.seed, "fill"))
        for chunk in torch.arange(len(images)).split(256):
            hidden = masks[chunk][:, None]
            images[chunk] = torch.where(hidden, self.train.images[others[chunk]], images[chunk])
        return images

    def hit(self, masks: Masks | None) -> Row:
        """What masks hit, of all training images and of each group: `hidden`, the share of pixels; `on_bird`, the share
        of these that lie on the bird; `bird`, the share of all pixels that do. `untouched`: the share of images in
        which nothing is hidden. `erm_on_masked`: ERM's accuracy on every fourth masked image."""
        if masks is None:
            return {}
        fourth = torch.arange(0, len(masks), 4)
        facts = {"hidden": masks.share(), "untouched": masks.untouched(),
                 "erm_on_masked": accuracy(self.erm.model, self.train.images[fourth], self.train.labels[fourth],
                                           Masks.of(masks[fourth]))}
        if not knows_objects(self.setting):
            return facts
        counts = torch.zeros(4, 4, dtype=torch.float64)  # of a group: pixels, hidden ones, birds', both
        for chunk in torch.arange(len(masks)).split(256):
            hidden, bird = masks[chunk], self.objects[chunk]
            each = torch.stack([torch.ones_like(hidden), hidden, bird, hidden & bird], 1).double().sum((2, 3))
            counts.index_add_(0, self.train.groups[chunk], each)
        for name, parts in (("", counts.sum(0, keepdim=True)), ("_by_group", counts)):
            pixels, hidden, bird, both = parts.T
            shares = {"hidden": hidden / pixels, "on_bird": both / hidden.clamp(min=1), "bird": bird / pixels}
            facts |= {f"{key}{name}": value.tolist() if name else value.item() for key, value in shares.items()}
        return facts

    def scores(self, model: nn.Module) -> Row:
        """Accuracies on the test set and on the validation set."""
        test, val = _scored(model, self.test), _scored(model, self.val)
        return {"average": test.average, "adjusted_average": adjusted_average(test.groups, self.train.groups),
                "worst": test.worst, "groups": list(test.groups.values()), "val_average": val.average,
                "val_worst": val.worst}


def examples(setting: Setting, seed: int = 0, each: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """The first training images of each group: images, heat maps, masks, the birds' pixels, and titles."""
    subject = Subject(setting, seed)
    chosen = torch.cat([torch.nonzero(subject.train.groups == group).flatten()[:each] for group in range(4)])
    images = pixels(subject.train.images[chosen])
    heat = xgradcam(subject.erm.model, images.to(best_device())).cpu()
    names = datasets.open_files(setting.erm.dataset, "train", stages.DATA).group_names
    titles = [names[group].replace(", ", "\non ") for group in subject.train.groups[chosen].tolist()]
    return images, heat, hottest(heat), subject.objects[chosen], titles


def explained(model: nn.Module, layer: str) -> nn.Module:
    """A copy of a classifier that names another saliency layer."""
    copy = copied(model)
    copy.layer = layer
    return copy


def _inverted(masks: Masks) -> Masks:
    return Masks.of(torch.cat([~masks[chunk] for chunk in masks.chunks()]))


def _scored(model: nn.Module, data: Images) -> Score:
    return score(infer(model, data.images).argmax(1).cpu(), data.labels, data.groups)
