"""What a repair did to a classifier, in numbers, words and pictures: the report of `masktune`."""

import base64
import html
import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import pandas
import torch
from torch import Tensor, nn

from ..datasets.images import Images
from ..device import device_name
from ..files import write_whole
from ..holes import Shown, pixels
from ..inference import Score, accuracy, infer, score
from ..masks import Masks
from ..saliency import xgradcam

FEW, MANY = 0.001, 0.5  # shares of hidden pixels at which a repair is doubtful
UNTOUCHED, SPOT = 0.1, 0.8  # shares of images: in which nothing is hidden; of a class, in which one pixel is
SAMPLE = 500  # training images on which it is seen what the masks cost the old model, at least
EXAMPLES, FIGURES = 8, 20  # images of the gallery; classes whose mean masks are drawn
PERCENT = dict(index=False, float_format="{:.1%}".format, na_rep="")  # of tables


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What one repair did, accuracies in [0, 1]: it prints as text, a notebook shows it, `save` writes it."""

    classes: tuple[str, ...]
    labels: Tensor  # (N,) of the training images
    masks: Masks  # (N, H, W)
    hidden: float  # share of the pixels, in [0, 1]
    before: dict[str, Score]  # by data set; groups are those given, else the classes
    settings: dict[str, object]  # layer, lr, ... as given
    computed_by: str  # the GPU, or the processor and the threads
    history: dict[str, list[float]] = field(default_factory=dict)  # loss and accuracy of each epoch; none: a preview
    after: dict[str, Score] = field(default_factory=dict)
    before_on_masked: float | None = None  # the old model's accuracy on masked training images, of `SAMPLE` or more
    examples: list[Tensor] | None = None  # see `_examples`
    outcomes: list[Tensor] | None = None  # see `_outcomes`; of the last of the test sets
    failure: str = ""  # why some of the four are missing

    @classmethod
    def of(cls, old: nn.Module, masks: Masks, sets: dict[str, Images], before: dict[str, Score],
           settings: dict[str, object], new: nn.Module | None = None, scores: bool = True,
           history: dict[str, list[float]] | None = None) -> "Report":
        """The report of a repair (scores: of the training images, too), or a preview; `failure` names what failed."""
        train, found = sets["train"], {}
        some = slice(None, None, max(1, len(train) // SAMPLE))
        try:
            fill = "black"
            found["before_on_masked"] = accuracy(old, Shown(train.images[some], masks[some]), train.labels[some])
            found["examples"] = _examples(old, new or old, train, masks, fill)
            if new is not None:
                guesses = {name: infer(new, data.images).argmax(1).cpu() for name, data in sets.items()
                           if scores or name != "train"}
                found["after"] = {name: scored(theirs, sets[name]) for name, theirs in guesses.items()}
                *_, (last, data) = sets.items()
                if last != "train" and data.images.shape[2:] == train.images.shape[2:]:  # for which the layer is read
                    found["outcomes"] = _outcomes(old, new, data, guesses[last])
        except (Exception, KeyboardInterrupt) as error:  # the repaired model is worth more than the report
            found["failure"] = f"The report is not complete: {type(error).__name__}: {error}"
            warnings.warn(found["failure"], stacklevel=3)
        device = device_name(next(old.parameters()).device)
        return cls(train.classes, train.labels, masks, masks.share(), before, settings, device, history or {}, **found)

    @cached_property
    def mean_masks(self) -> Tensor:
        """How often each pixel is hidden in the images of a class, (classes, H, W): a shortcut in one place shows."""
        labels = self.labels.to(self.masks.bits.device)
        means = [self.masks.mean(labels == label) for label in range(len(self.classes))]
        return torch.stack(means).nan_to_num().cpu()  # none of a class: none hidden

    @property
    def verdict(self) -> str:
        """What the numbers mean, in a few sentences."""
        said, untouched = [hidden_share(self.hidden)], self.masks.untouched()
        if untouched > UNTOUCHED:
            said.append(f"Nothing is hidden in {untouched:.0%} of the images: name a finer layer, or lower k.")
        whole, left = self.before["train"].average, self.before_on_masked
        if whole < least_right(len(self.classes)):
            said.append(f"The old model is right on only {whole:.1%} of the training images: it was never right.")
        if left is not None and self.hidden >= FEW:
            often, label = self.mean_masks.amax((1, 2)).max(0)
            told = "a shortcut in one place, if the subject is not always there" if often >= SPOT else "not a shortcut"
            if often >= SPOT and not self.settings.get("decoys"):
                told += ". Where a hole can be seen, it tells the class as well: see grow= and decoys="
            said.append(f"One spot is hidden in {often:.0%} of the images of class {self.classes[label]}: {told}.")
            said.append(f"Without what is hidden, the old model is right on {left:.1%} of the training images instead "
                        f"of {whole:.1%}: it {'leaned on it' if whole - left > 0.05 else 'hardly needed it'}.")
        for name, new in self.after.items():
            right = [sum(value > 0 for value in one.classes.values()) for one in (self.before[name], new)]
            if right[0] > right[1] == 1:  # of the classes, how many are ever read rightly
                said.append(f"On {name}, the repaired model answers one class to everything: lower lr=.")
            elif name != "train":
                said.append(f"The worst group of {name} goes from {self.before[name].worst:.1%} to {new.worst:.1%}.")
        if self.history and left is not None and abs(self.history["accuracy"][-1] - left) < 0.01 and left < 0.95:
            said.append("The epoch hardly changed the model: raise lr=.")
        if self.history and len(self.before) == 1:
            said.append("Whether it helped is not known: pass tests=, images without the shortcut or with it reversed.")
        return " ".join([*said, self.failure]).rstrip()

    def table(self) -> pandas.DataFrame:
        """Accuracies before and after, of each data set: all images, every class, every group that is not a class."""
        rows = []
        for name, old in self.before.items():
            new = self.after.get(name)
            rows.append((name, "average", old.average, new and new.average))
            rows += [(name, self.classes[i], value, new and new.classes[i]) for i, value in old.classes.items()]
            if (old.groups, new and new.groups) != (old.classes, new and new.classes):
                rows += [(name, f"group {i}", value, new and new.groups[i]) for i, value in old.groups.items()]
        table = pandas.DataFrame(rows, columns=["data set", "accuracy of", "before", "after"])
        return table if self.after else table.drop(columns="after")  # of a preview

    def as_dict(self) -> dict[str, object]:
        """All but masks and pictures, as plain numbers and strings; classes and groups go by their numbers."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)
                 if one.name not in ("labels", "masks", "examples", "outcomes")}
        scores = {when: {name: asdict(one) for name, one in plain[when].items()} for when in ("before", "after")}
        return {"verdict": self.verdict, **plain, **scores, "hidden_by_class": self.mean_masks.mean((1, 2)).tolist()}

    def pictures(self) -> dict[str, bytes]:
        """JPEG files by name: mean masks of the classes that hide most, and a gallery; a warning tells what fails."""
        files = {}
        try:
            from . import figures  # here: training needs no matplotlib

            most = self.mean_masks.amax((1, 2)).argsort(descending=True, stable=True)[:FIGURES].sort().values
            made = {"mean_masks": figures.mean_masks(self.mean_masks[most], [self.classes[i] for i in most])}
            for name, found in (("gallery", self.examples), ("tests", self.outcomes)):
                if found:
                    labels, before, after, *rows = found
                    short = [f"{i} {name}"[:12] for i, name in enumerate(self.classes)]  # numbers keep them apart
                    titles = figures.arrows(labels, before, after, names=short, between="\n→ ")
                    called = (list(self.before)[-1], "heat before", "heat after")
                    rows = figures.explained(*rows) if name == "gallery" else dict(zip(called, rows, strict=True))
                    made[name] = figures.strip(rows, {next(iter(rows)): titles})
            for name, figure in made.items():
                files[name] = figures.jpeg(figure)
        except Exception as error:  # no matplotlib, or a name that it cannot write: the numbers are worth more
            warnings.warn(f"the report lacks pictures: {type(error).__name__}: {error}", stacklevel=3)
        return files

    def save(self, folder: Path | str) -> None:
        """Write `report.json` and JPEG files into a new folder, or over an earlier report; else FileExistsError."""
        folder = Path(folder).expanduser()
        if folder.exists() and not (folder / "report.json").is_file():
            raise FileExistsError(f"expected {folder} to be free, or to hold an earlier report; use another name")
        write_whole(folder / "report.json", json.dumps(self.as_dict(), indent=1).encode())
        for name, content in self.pictures().items():
            write_whole(folder / f"{name}.jpg", content)

    def __repr__(self) -> str:
        return f"{self.verdict}\n{self.table().to_string(max_rows=40, **PERCENT)}\ncomputed by {self.computed_by}"

    def _repr_html_(self) -> str:
        said = f"<p>{html.escape(f'{self.verdict} Computed by {self.computed_by}. Title: class → before → after.')}</p>"
        pictures = "".join(f'<img alt="{name}" src="data:image/jpeg;base64,{base64.b64encode(content).decode()}">'
                           for name, content in self.pictures().items())
        return said + self.table().to_html(**PERCENT) + pictures


def hidden_share(share: float) -> str:
    """One sentence on how much is hidden, with advice where that is hardly anything or most of it."""
    few = ", so this is hardly more than fine-tuning: lower k, use larger images, or name a finer layer"
    many = ", so little is left to learn from: raise k, or name another layer"
    return f"{share:.2%} of the pixels are hidden{few if share < FEW else many if share > MANY else ''}."


def least_right(classes: int) -> float:
    """The share of its training images on which a model that was trained on them is right at least."""
    return min(1, max(0.5, 1.5 / classes))


def scored(guesses: Tensor, data: Images) -> Score:
    """The score of guesses (N,) on a data set; classes where it has no groups."""
    labels = data.labels.cpu()
    return score(guesses.cpu(), labels, labels if data.groups is None else data.groups.cpu())


def _examples(old: nn.Module, new: nn.Module, data: Images, masks: Masks, fill: str) -> list[Tensor]:
    """Of the first images of every class: labels, guesses before and after, images, heat, masks, what these leave."""
    labels, each = data.labels.cpu(), max(1, EXAMPLES // len(data.classes))
    chosen = torch.cat([torch.nonzero(labels == label).flatten()[:each] for label in labels.unique()])[:EXAMPLES]
    images, hidden = data.images[chosen.to(data.images.device)], masks[chosen.to(masks.bits.device)].cpu()
    guesses = [infer(model, images).argmax(1).cpu() for model in (old, new)]
    return [labels[chosen], *guesses, *_seen(images, old), hidden, pixels(images.cpu(), hidden, fill)]


def _outcomes(old: nn.Module, new: nn.Module, data: Images, after: Tensor) -> list[Tensor] | None:
    """As `_examples`, of a test set: half repaired, half still wrong, and the heat before and after; None: neither."""
    some = torch.arange(0, len(data), max(1, len(data) // SAMPLE))
    images = data.images[some.to(data.images.device)]
    labels, before, after = data.labels.cpu()[some], infer(old, images).argmax(1).cpu(), after[some]
    repaired, wrong = (before != labels) & (after == labels), after != labels
    chosen = torch.cat([torch.nonzero(part).flatten()[:EXAMPLES // 2] for part in (repaired, wrong)])
    if not len(chosen):
        return None
    return [*(part[chosen] for part in (labels, before, after)), *_seen(images[chosen.to(images.device)], old, new)]


def _seen(images: Tensor, *models: nn.Module) -> list[Tensor]:
    """Images as floats, and where each of the models looks in them."""
    seen = pixels(images.to(next(models[0].parameters()).device))
    return [seen.cpu(), *(xgradcam(model, seen).cpu() for model in models)]
