"""What a result depends on: each condition is one row, measured once into `results/<setting>.csv`.

All start from the ERM weights of finished runs: masks of one kind or another, then one epoch, then the test sets.
Accuracies are in [0, 1]: of each test set ("average" where there is but one), of each group, and of the `worst` group.
Those that begin with `val` are of the validation set: by them alone anything is chosen.
"""

import copy
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache, lru_cache, partial

import pandas
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import datasets
from ..checkpoint import finished
from ..classifier import Classifier, copied
from ..datasets import DIGIT_SETS, Images
from ..device import best_device, room_for
from ..holes import COVERED, Holes, Shown, pixels
from ..inference import Score, accuracy, adjusted_average, infer, score, swapped
from ..masking import MOST, find_masks, hottest, random_masks, spots
from ..masks import Masks
from ..saliency import resized, unit_range, xgradcam
from ..seeding import generator
from ..state import State, digest
from ..training import train_epoch
from . import questions, stages
from .questions import KINDS, ORACLES, Row
from .recipes import DIGITS, MNIST, Places, Setting
from .rows import matching, measured, saved

SWAPPED = 2_000  # images of the swap test at most


def ask(settings: Iterable[Setting], *asked: str, places: Places = Places()) -> pandas.DataFrame:
    """The rows that answer some of a setting's questions (see `questions`); what is missing is measured now."""
    tables = []
    for setting in settings:
        wanted = [{**condition, "erm": _erm_name(places, setting, condition)}
                  for condition in questions.conditions(setting, *asked)]
        path = places.results / f"{setting.name}.csv"
        few = {"processes": 1} if setting.erm.dataset == "SpuriousDigits" else {}  # others take seconds to start
        measure, train = (partial(do, places, setting) for do in (_measure, _train))
        tables.append(measured(path, wanted, measure, train, **few))
    return pandas.concat(tables, ignore_index=True)


def shipped(*asked: str, settings: Iterable[Setting] = MNIST) -> pandas.DataFrame:
    """The same rows as `results/` has them: nothing is trained, measured, or compared with checkpoints."""
    wanted = {setting.name: questions.conditions(setting, *asked) for setting in settings}
    return pandas.concat([matching(saved(Places().results / f"{name}.csv"), conditions)
                          for name, conditions in wanted.items() if conditions], ignore_index=True)


def _erm_name(places: Places, setting: Setting, condition: Row) -> str:
    """What a row starts from: the weights where they are shipped; else the recipe and the sizes of the groups."""
    if setting in (*MNIST, *DIGITS) and _varied(setting, condition) is setting:
        return _weights(places, setting, condition["seed"])
    counts = []
    if setting.erm.dataset == "SpuriousImagenette":
        counts = datasets.imagenette(places.data, "train")[1].bincount().tolist()
    elif setting.erm.dataset not in DIGIT_SETS:
        counts = datasets.open_files(setting.erm.dataset, "train", places.data).counts()
    return digest({**asdict(setting.erm), "train": counts})[:16]


@cache
def _weights(places: Places, setting: Setting, seed: int) -> str:
    return stages.run_erm(places, setting, seed).digest()[:16]


def _varied(setting: Setting, condition: Row) -> Setting:
    """The setting with ERM as a condition has it, and a folder of its own for that."""
    own = {"class_mix_ratio" if name == "ratio" else name: condition[name]
           for name in (*questions.DATA, "ratio", "size") if name in condition}
    erm = replace(setting.erm, epochs=condition["erm_epochs"], options=setting.erm.options | own)
    name = "-".join(map(str, (setting.name, erm.epochs, *own.values())))
    return setting if erm == setting.erm else replace(setting, name=name, erm=erm)


def _train(places: Places, setting: Setting, missing: list[Row]) -> None:
    """Train the ERMs that conditions start from, each once."""
    wanted = dict.fromkeys((_varied(setting, condition), condition["seed"]) for condition in missing)
    tasks = [(one, seed) for one, seed in wanted if not finished(stages.erm_path(places, one, seed), one.erm.epochs)]
    stages.train_all(partial(stages.run_erm, places), tasks, f"{setting.name}: ERM")


def _measure(places: Places, setting: Setting, condition: Row) -> Row:
    return _subject(places, _varied(setting, condition), condition["seed"]).measure(condition)


class Subject:
    """One setting with one seed: the ERM state and the data that every condition starts from."""

    def __init__(self, places: Places, setting: Setting, seed: int) -> None:
        self.setting, self.seed, self.erm = setting, seed, stages.run_erm(places, setting, seed)
        self.train = stages.load_data(places, setting.erm, seed)
        self.tests = stages.load_tests(places, setting)
        self.val = None if setting.erm.dataset in DIGIT_SETS else stages.load_data(places, setting.erm, seed, "val")
        device = room_for(self.train.images)
        self.images, self.labels = self.train.images.to(device), self.train.labels.to(device)
        self.found = cache(lambda layer, k: find_masks(explained(self.erm.model, layer), self.images, k))
        self.random = cache(partial(random_masks, len(self.images), tuple(self.images.shape[2:]), seed, device=device))
        self.hit = cache(self._hit)  # many conditions share their masks
        data = self.val or self.train  # for the swap test, which needs no images without the shortcut
        self.few = [part[:SWAPPED] for part in (data.images, data.labels)]
        self.few_found = cache(lambda layer, k: find_masks(explained(self.erm.model, layer), self.few[0], k))

    def measure(self, condition: Row) -> Row:
        """What a condition comes to: what its masks hit, and the accuracies after its last iteration."""
        if condition["method"] == "erm":
            return self.scores(self.erm.model) | self.trial(self.erm.model)
        state = stages.start_finetune(self.setting.erm, self.erm)
        if condition["method"] == "dfr":
            data = self.val or self.train
            refit_last_layer(state.model, data.images.to(best_device()), data.labels, data.groups, self.seed)
            return self.scores(state.model) | self.trial(state.model)
        for part in state.model.train().modules() if condition["batchnorm"] == "frozen" else ():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        options = stages.epoch_options(self.setting.erm, self.seed)
        if condition["weighted"]:
            counts = self.labels.bincount()
            options["loss"] = partial(F.cross_entropy, weight=len(self.labels) / (len(counts) * counts))
        seen: Row = {}
        holes = KINDS[condition["holes"]]
        while state.epoch - self.erm.epoch < (condition["iteration"] or MOST):
            masks = self.masks(condition, state)
            if not condition["iteration"] and state.masks and not spots(masks, self.labels, state.masks):
                break
            state.masks = masks
            try:
                _, seen["met"] = train_epoch(state, self.images, self.labels, masks=masks, holes=holes,
                                             lr=condition["lr"], order=condition["order"], **options)
            except FloatingPointError:  # here a finding: such a model says "0-4" to everything
                seen["diverged"] = True
            if masks:
                shown = Shown(self.images, masks, holes, self.labels, self.seed, state.epoch)
                seen["replaced"] = sum(shown.shares())  # of all pixels, in the last epoch: hidden, or a partner's
            state.finish_epoch()
        seen["iterations"] = state.epoch - self.erm.epoch
        hit = self.hit(state.masks, holes.grow) if state.masks else {}
        known = {} if "diverged" in seen else self.trial(state.model)  # whose heat maps are not finite
        return seen | hit | self.scores(state.model) | known

    def masks(self, condition: Row, state: State) -> Masks | None:
        """The masks of the next iteration; None: nothing is hidden."""
        method = condition["method"]
        if method == "plain":
            return None
        if method == "randmask":
            return self.random(state.epoch)
        if method in ORACLES:
            return self.train.known if method == "known hidden" else Masks.of(~self.train.known[:])
        if condition["cam"] != "XGradCAM":
            return self._masks_of(condition["cam"])
        if state.epoch > self.erm.epoch:
            return find_masks(explained(state.model, condition["layer"]), self.images, condition["k"],
                              state.masks if condition["accumulate"] else None, holes=KINDS[condition["holes"]])
        return self.found(condition["layer"], condition["k"])

    def _hit(self, found: Masks, grow: float) -> Row:
        """What masks hit, grown, of all training images.

        `hidden`: the share of pixels that they cover; `untouched`: the share of images in which nothing is hidden;
        `erm_on_masked` and `erm_on_filled`: ERM's accuracy on the masked images, black or smooth, of photographs on
        every fourth. Where pixels are known, of all images and of each group: `known`, their share; `on_known`, how
        much of the hidden they are; `known_hidden`, how much of them is hidden; `known_visible`, how many images still
        show some of them.
        """
        some = slice(None, None, 1 if self.val is None else 4)
        masks = Shown(self.images, found, Holes(grow)).masks
        facts = {"hidden": masks.share(), "untouched": masks.untouched(), **{
            column: accuracy(self.erm.model, Shown(self.images[some], masks[some], Holes(0, fill)), self.labels[some])
            for column, fill in (("erm_on_masked", "black"), ("erm_on_filled", "smooth"))}}
        if self.train.known is None:
            return facts
        groups = {f": {name}": self.train.groups == group for group, name in enumerate(self.train.group_names)}
        every = torch.stack([one[:].cpu().flatten(1) for one in (masks, self.train.known)])
        for suffix, chosen in {"": slice(None), **groups}.items():
            hidden, known = every[:, chosen]
            gone, there, both = (part.sum().double() for part in (hidden, known, hidden & known))
            here = {"hidden": gone / hidden.numel(), "known": there / known.numel(), "known_hidden": both / there,
                    "on_known": both / gone.clamp(min=1), "known_visible": (known & ~hidden).any(1).sum()}
            facts |= {f"{name}{suffix}": value.item() for name, value in here.items()}
        return facts

    def _masks_of(self, cam: str) -> Masks:
        """The masks of the training images by another CAM; see `questions.BASE`."""
        import pytorch_grad_cam  # here: no training needs it, and it takes seconds

        model, found = copy.deepcopy(self.erm.model).eval(), []  # the library's classes leave traces
        draw = generator(self.seed, "random maps")
        explain = None if cam in ("random", "label") else getattr(pytorch_grad_cam, cam)(model, [model.saliency_layer])
        for images, labels in zip(self.images.split(500), self.labels.split(500), strict=True):
            if cam == "random":
                coarse = torch.rand(len(images), 8, 8, generator=draw, device="cpu").to(images.device)
                heat = unit_range(resized(coarse, *images.shape[2:]))
            elif cam == "label":
                heat = xgradcam(model, pixels(images), classes=labels)
            else:
                heat = torch.from_numpy(explain(pixels(images), targets=None)).to(images.device)
            found.append(hottest(heat))
        return Masks.of(torch.cat(found))

    def trial(self, model: nn.Module) -> Row:
        """What can be known without an image that breaks the shortcut, of validation images, else of training images.

        `as_is`: the accuracy; `swapped`: the swap test with ERM's masks, those of the setting's own layer and k, for
        all models the same; `covered`: where these are hidden; `swapped_again`: the swap test with the model's own
        masks; `spots`: how many spots these share that ERM's do not cover, one for each class at most.
        """
        images, labels = self.few
        base = questions.base(self.setting)
        masks = self.few_found(base["layer"], base["k"])
        own = find_masks(explained(model, base["layer"]), images, base["k"])
        return {"as_is": accuracy(model, images, labels), "swapped": swapped(model, images, labels, masks),
                "covered": accuracy(model, Shown(images, masks, COVERED), labels),
                "swapped_again": swapped(model, images, labels, own), "spots": float(len(spots(own, labels, masks)))}

    def scores(self, model: nn.Module) -> Row:
        """Averages of the test sets, of each group in them, of the worst of these; and of the validation set."""
        row, groups = {}, {}
        for name, test in self.tests.items():
            one = _scored(model, test)
            row |= {name: one.average} if name != "test" else {
                "average": one.average, "adjusted_average": adjusted_average(one.groups, self.train.groups)}
            groups |= {test.group_names[group]: value for group, value in one.groups.items()}
        row |= {"worst": min(groups.values()), **groups}
        if self.val is not None:
            val = _scored(model, self.val)
            row |= {"val_average": val.average, "val_worst": val.worst}
        return row


_subject = lru_cache(maxsize=1)(Subject)  # the conditions of one come together


def examples(setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """The first two training images of each group: images, heat maps, masks, the known pixels, and groups."""
    train, model = stages.load_data(Places(), setting.erm), stages.run_erm(Places(), setting, 0).model
    chosen = torch.cat([torch.nonzero(train.groups == group).flatten()[:2] for group in train.groups.unique()])
    images = pixels(train.images[chosen])
    heat = xgradcam(model, images.to(best_device())).cpu()
    names = [train.group_names[group].replace(", ", ",\n") for group in train.groups[chosen]]
    return images, heat, hottest(heat), train.known[chosen], names


def explained(model: nn.Module, layer: str) -> nn.Module:
    """A model with another saliency layer, as a copy; "own": the model itself."""
    if layer == "own":
        return model
    model = copied(model)
    if not isinstance(model, Classifier):  # it explains a layer of its own choice, whatever it is told
        return Classifier(model, layer)
    model.layer = layer
    return model


def _scored(model: nn.Module, data: Images) -> Score:
    return score(infer(model, data.images).argmax(1).cpu(), data.labels, data.groups)


def refit_last_layer(model: nn.Module, images: Tensor, labels: Tensor, groups: Tensor, seed: int) -> None:
    """Deep feature reweighting (Kirichenko et al. 2023): fit the last layer of two classes anew, with groups known.

    The mean of ten regressions, on as many images of every group as the smallest has; L2 penalty 1 (authors: an L1).
    """
    from sklearn.linear_model import LogisticRegression

    head = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    body = copy.deepcopy(model)
    body.set_submodule(head, nn.Identity())
    members = [torch.nonzero(groups == group).flatten() for group in range(4)]
    size, draw = min(map(len, members)), generator(seed, "dfr")
    lines = []
    for _ in range(10):  # as the authors
        chosen = torch.cat([group[torch.randperm(len(group), generator=draw, device="cpu")[:size]]
                            for group in members])
        fit = LogisticRegression(max_iter=1000).fit(infer(body, images[chosen]).cpu(), labels[chosen].cpu())
        lines.append(torch.tensor([*fit.coef_[0], *fit.intercept_], dtype=torch.float64))
    *weight, bias = torch.stack(lines).mean(0)
    with torch.no_grad():
        model.get_submodule(head).weight.copy_(torch.stack([torch.zeros(len(weight)), torch.stack(weight)]))
        model.get_submodule(head).bias.copy_(torch.stack([torch.tensor(0.0), bias]))
