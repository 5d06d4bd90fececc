"""What a result depends on: each condition is one row, measured once into `results/<setting>.json`.

All start from the ERM weights of finished runs: masks of one kind or another, then one epoch, then the test sets. A
question is a list of conditions; a condition that several ask for is measured once. Accuracies are in [0, 1]: `raw`,
`malicious`, of each group in both, and `worst` of these.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import product
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..datasets import GROUPS, SQUARE
from ..device import best_device
from ..inference import accuracy, infer, pixels
from ..masking import find_masks, hottest, random_masks
from ..masks import Masks
from ..metrics import score
from ..rows import Row, matching, measured, row, saved
from ..saliency import resized, unit_range, xgradcam
from ..seeding import generator
from ..state import State
from ..training import weight_average
from . import stages
from .dfr import refit_last_layer
from .recipes import ENDINGS, FINETUNE_LRS, MNIST, FineTune, Setting
from .workers import side_by_side

RESULTS = Path("results")
SEEDS = (0, 1, 2)  # of every question but "results" and "ending", which take all
CAMS = ("XGradCAM", "label", "GradCAM", "GradCAMPlusPlus", "LayerCAM", "EigenCAM", "random")
THRESHOLDS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # k in m + k s
ITERATIONS = 3  # official code: 1 to 3
RATIOS = (0.0, 0.001, 0.01, 0.05, 0.2)  # of conflicting images
RATIO_EPOCHS = 10
BASE = {  # MaskTune as it stands; a condition says what differs
    "method": "masktune",  # or "erm", "randmask"; "plain": the epoch without masks; "dfr": the last layer fitted anew
    # on training images with the groups equally large (Kirichenko et al. 2023), which needs images of every group
    "order": 0,  # in which the epoch visits the images
    "ending": "constant",  # of the epoch: see `FineTune`
    "lr": 0.01,
    "k": 2.0,
    "cam": "XGradCAM",  # of the predicted class; "label": of the label (paper's formula); others are the grad-cam
    # library's; "random": uniform noise of the saliency layer's size, resized and cut off as every other map
    "batchnorm": "moving",  # its statistics, as in train mode; or "frozen" at ERM's
    "iteration": 1,  # the last of so many iterations
    "accumulate": False,  # whether hidden pixels stay hidden in the next iteration
    "squares": "as found",  # or "whole": all squares of class 0 hidden whole, a diagnosis that needs to know them
}
QUESTIONS: dict[str, list[Row]] = {
    "results": [{"method": "erm"}] + [{"method": method, "order": order} for method in ("randmask", "masktune")
                                      for order in range(5)],
    "ending": [{"ending": ending, "order": order} for ending in ENDINGS for order in range(5)],
    "lr": [{"lr": lr} for lr in FINETUNE_LRS],
    "reference": [{"method": "plain"}, {"method": "dfr"}],
    "threshold": [{"k": k} for k in THRESHOLDS],
    "cam": [{"cam": cam} for cam in CAMS],
    "batchnorm": [{"batchnorm": kind} for kind in ("moving", "frozen")],
    "iterations": [{}] + [{"iteration": i, "accumulate": accumulate} for accumulate in (False, True)
                          for i in range(2, ITERATIONS + 1)],
    "squares": [{"squares": squares, "order": order} for squares in ("as found", "whole") for order in range(5)],
}


def ask(settings: Iterable[Setting], *questions: str) -> list[Row]:
    """The rows that answer some of `QUESTIONS`, for settings whose ERM is trained; what is missing is measured now."""
    rows = []
    for setting in settings:
        erms = {seed: stages.run_erm(setting, seed).digest()[:16] for seed in setting.seeds}
        rows += measured(_file(setting), _conditions(setting, questions, erms), partial(_measure_all, setting))
    return rows


def shipped(*questions: str) -> list[Row]:
    """The same rows for MNIST as `results/` has them: nothing is trained, measured, or compared with checkpoints."""
    return [matching(rows, condition) for setting in MNIST for rows in [saved(_file(setting))]
            for condition in _conditions(setting, questions)]


def _file(setting: Setting) -> Path:
    return RESULTS / f"{setting.name}.json"


def _conditions(setting: Setting, questions: Iterable[str], erms: dict[int, str] | None = None) -> list[Row]:
    """What some questions ask of a setting, each condition once; `erms` names the weights of each seed."""
    conditions = {}
    for question in questions:
        for seed, change in product(setting.seeds, QUESTIONS[question]):
            if _is_asked(question, setting, seed, change):
                condition = {"setting": setting.name, "seed": seed, **({"erm": erms[seed]} if erms else {}), **BASE,
                             "lr": setting.finetune.lr, **change}
                conditions[tuple(condition.values())] = condition
    return list(conditions.values())


def _is_asked(question: str, setting: Setting, seed: int, change: Row) -> bool:
    """Whether a question has a condition for a setting and a seed."""
    if question == "squares" and not (setting.erm.class_mix_ratio > 0 and setting.erm.mix_order == "random"):
        return False  # it is about the scatter of this training set
    if change.get("method") == "dfr" and setting.erm.class_mix_ratio == 0:
        return False  # two of the groups are empty
    return change.get("order", 0) in setting.orders and (question in ("results", "ending") or seed in SEEDS)


def ratio_study(setting: Setting) -> list[Row]:
    """ERM and MaskTune with other shares of conflicting images; ERM for 10 epochs at its first LR, to be affordable.

    `erm_raw` and so on are ERM's accuracies, the plain names MaskTune's.
    """
    return measured(RESULTS / "ratio.json", (
        {"setting": setting.name, "ratio": ratio, "seed": seed, "epochs": RATIO_EPOCHS}
        for ratio in RATIOS for seed in SEEDS), lambda missing: side_by_side(
            partial(_measure_ratio, setting, stages.DATA), missing, "ratio study"))


def _measure_ratio(setting: Setting, data: Path, condition: Row) -> Row:
    seed = condition["seed"]
    erm = replace(setting.erm, class_mix_ratio=condition["ratio"], epochs=condition["epochs"], lr_halved_every=None)
    train = stages.load_data(erm, seed, root=data)
    images, labels = train.images.to(best_device()), train.labels.to(best_device())
    tests = stages.load_tests(setting, data)
    model = stages.new_model(seed, erm.model)
    state = State(model, stages.new_optimizer(model, erm))
    for _ in range(erm.epochs):
        stages.train_epoch(state, images, labels, lr=erm.lr, **stages.epoch_options(erm, seed))
        state.finish_epoch()
    before = {f"erm_{name}": value for name, value in _accuracies(state.model, tests).items()}
    stages.finetune_epoch(state, images, labels, erm, setting.finetune, seed)
    return row(condition, {**before, "hidden": state.masks.share(), **_accuracies(state.model, tests)})


def _measure_all(setting: Setting, missing: list[Row]) -> Iterator[Row]:
    """Measure conditions of one setting; those that one training answers go together."""
    tasks: dict[tuple, list[Row]] = {}
    for condition in missing:
        one_training = {**condition, "iteration": condition["accumulate"],  # all iterations, the first but once
                        "ending": "decay" if condition["ending"] == "decay" else "other"}
        tasks.setdefault(tuple(one_training.values()), []).append(condition)
    work = partial(_measure, setting, stages.CHECKPOINTS, stages.DATA)
    for rows in side_by_side(work, tasks.values(), f"{setting.name}: {len(missing)} conditions"):
        yield from rows


def _measure(setting: Setting, checkpoints: Path, data: Path, conditions: list[Row]) -> list[Row]:
    """Measure conditions that one training answers: they differ in nothing but the iteration, or in how it ends."""
    stages.CHECKPOINTS, stages.DATA = checkpoints, data
    answers = _subject(setting, conditions[0]["seed"]).answers(conditions)
    return [row(condition, answers[condition["iteration"], condition["ending"]]) for condition in conditions]


@lru_cache(maxsize=1)
def _subject(setting: Setting, seed: int) -> "Subject":
    return Subject(setting, seed)


class Subject:
    """One setting with one seed: the ERM state and the data that every condition starts from."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.seed, self.erm = setting, seed, stages.run_erm(setting, seed)
        train = stages.load_data(setting.erm, seed)
        self.images, self.labels, self.squares, self.groups = (
            tensor.to(best_device()) for tensor in (train.images, train.labels, train.squares, train.groups))
        self.shortcut = self.squares & (self.labels == 0)  # the squares that go with the class, as nearly all do
        self.tests = stages.load_tests(setting)
        self.facts: WeakKeyDictionary[Masks, Row] = WeakKeyDictionary()  # many conditions share their masks

    def answers(self, conditions: list[Row]) -> dict[tuple[int, str], Row]:
        """What one training measures: {(iteration, ending): accuracies, and what the masks hit}."""
        asked, condition = {(one["iteration"], one["ending"]) for one in conditions}, conditions[0]
        if condition["method"] == "erm":
            return {(1, "constant"): _accuracies(self.erm.model, self.tests)}
        state = stages.start_finetune(self.setting.erm, self.erm)
        if condition["method"] == "dfr":
            refit_last_layer(state.model, self.images, self.labels, self.groups, self.seed)
            return {(1, "constant"): _accuracies(state.model, self.tests)}
        for part in state.model.train().modules() if condition["batchnorm"] == "frozen" else ():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        decays = condition["ending"] == "decay"
        finetune = FineTune(condition["method"], condition["lr"], condition["k"], accumulate=condition["accumulate"],
                            ending="decay" if decays else "constant", order=condition["order"])
        seen = {}
        for iteration in range(1, max(asked)[0] + 1):
            masks = self.masks(condition) if iteration == 1 else None
            average = weight_average(state.model)
            diverged = {}
            try:
                stages.finetune_epoch(state, self.images, self.labels, self.setting.erm, finetune, self.seed, masks,
                                      average)
            except FloatingPointError:  # here a finding: such a model says "0-4" to everything
                diverged = {"diverged": True}
            state.finish_epoch()
            for ending, model in (("decay" if decays else "constant", state.model), ("average", average.module)):
                if (iteration, ending) in asked:
                    seen[iteration, ending] = diverged | self.hit(state.masks) | _accuracies(model, self.tests)
        return seen

    def masks(self, condition: Row) -> Masks | None:
        """The masks of the first iteration."""
        if condition["method"] == "plain":
            return None
        if condition["method"] == "randmask":
            return self.random
        if condition["squares"] == "whole":
            whole = self.found[:]
            whole[self.shortcut, :SQUARE, :SQUARE] = True
            return Masks.of(whole)
        if condition["k"] != BASE["k"]:
            return find_masks(self.erm.model, self.images, k=condition["k"])
        return self.found if condition["cam"] == "XGradCAM" else self._masks_of(condition["cam"])

    @cached_property
    def found(self) -> Masks:
        """The masks of MaskTune as it stands."""
        return find_masks(self.erm.model, self.images)

    @cached_property
    def random(self) -> Masks:
        """The masks of RandMask: the same for every order of the epoch."""
        size = tuple(self.images.shape[2:])
        return random_masks(len(self.images), size, self.seed, self.erm.epoch, self.images.device)

    def hit(self, masks: Masks | None) -> Row:
        """What masks hit: `hidden`, the share of all pixels, and two numbers on the squares of class 0, the shortcut.

        `shortcut_hidden` is the share of these squares' pixels that are hidden, `shortcut_visible` the number of these
        squares of which some pixel stays visible. `erm_on_masked`: ERM's accuracy on the masked training images.
        """
        if masks is None:
            return {}
        if masks not in self.facts:
            corners = torch.cat([masks[index][:, :SQUARE, :SQUARE]
                                 for index in torch.nonzero(self.shortcut).flatten().split(4096)])
            self.facts[masks] = {"hidden": masks.share(), "shortcut_hidden": corners.double().mean().item(),
                                 "shortcut_visible": int((~corners).any(2).any(1).sum())}
            if masks in (vars(self).get("found"), vars(self).get("random")):  # takes as long as an evaluation can
                self.facts[masks]["erm_on_masked"] = accuracy(self.erm.model, self.images, self.labels, masks)
        return self.facts[masks]

    def _masks_of(self, cam: str, batch_size: int = 500) -> Masks:
        """The masks of the training images by another CAM; see `BASE`."""
        import pytorch_grad_cam  # here: no training needs it, and it takes seconds

        model = copy.deepcopy(self.erm.model).eval()  # the library's classes leave traces
        draw = generator(self.seed, "random maps")
        explain = None if cam in ("random", "label") else getattr(pytorch_grad_cam, cam)(model, [model.saliency_layer])
        masks = Masks((len(self.images), *self.images.shape[2:]), device=self.images.device)
        for start in range(0, len(self.images), batch_size):
            batch = slice(start, start + batch_size)
            seen = pixels(self.images[batch])
            if cam == "random":
                coarse = torch.rand(len(seen), 8, 8, generator=draw).to(seen.device)
                heat = unit_range(resized(coarse, *seen.shape[2:]))
            elif cam == "label":
                heat = xgradcam(model, seen, classes=self.labels[batch])
            else:
                heat = torch.from_numpy(explain(seen, targets=None)).to(seen.device)
            masks[batch] = hottest(heat)
        return masks


def _accuracies(model: nn.Module, tests: dict) -> Row:
    """Averages of both test sets, of each group in them, and of the worst of these."""
    scored = {name: score(infer(model, test.images).argmax(1).cpu(), test.labels, test.groups)
              for name, test in tests.items()}
    groups = {group: value for one in scored.values() for group, value in one.groups.items()}
    return {**{name: one.average for name, one in scored.items()},
            **{GROUPS[group]: value for group, value in groups.items()}, "worst": min(groups.values())}
