"""What a repair did to a classifier, in numbers, words and pictures: the report of `masktune`."""

import base64
import html
import json
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import pandas
import torch
from torch import Tensor

from ..evidence import Again
from ..files import write_whole
from ..inference import Score
from ..masking import SPOT
from ..masks import Masks

FEW, MANY = 0.001, 0.5  # shares of hidden pixels at which a repair is doubtful
UNTOUCHED = 0.1  # share of images in which nothing is hidden, above which that is said
HARM = 0.05  # of accuracy on the training images: a fall that is said
FIGURES = 20  # classes whose mean masks are drawn
PERCENT = dict(index=False, float_format="{:.1%}".format, na_rep="")  # of tables


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What one repair did, accuracies in [0, 1]: it prints as text, a notebook shows it, `save` writes it."""

    classes: tuple[str, ...]
    labels: Tensor  # (N,) of the training images
    masks: Masks  # (N, H, W)
    hidden: float  # share of all pixels, in [0, 1], in the last epoch: hidden,
    exchanged: float  # and showing those of another image
    before: dict[str, Score]  # by data set; groups are those given, else the classes
    settings: dict[str, object]  # layer, lr, ... as given or chosen
    computed_by: str  # the GPU, or the processor and the threads
    history: dict[str, list[float]] = field(default_factory=dict)  # loss and accuracy of each epoch; none: a preview
    after: dict[str, Score] = field(default_factory=dict)
    trials: list[dict[str, float | None]] = field(default_factory=list)  # of each LR, the chosen one first
    covered: float | None = None  # the old model's accuracy on training images whose hot pixels are hidden
    swaps: dict[str, list[float | None]] = field(default_factory=dict)  # the swap test, before and after, by data set
    again: Again | None = None  # where the repaired model looks
    examples: list[Tensor] | None = None  # pictures: see `evidence`
    twins: list[Tensor] | None = None
    failure: str = ""  # why some of these are missing

    @cached_property
    def mean_masks(self) -> Tensor:
        """How often each pixel is hidden in the images of a class, (classes, H, W): a shortcut in one place shows."""
        labels = self.labels.to(self.masks.bits.device)
        means = [self.masks.mean(labels == label) for label in range(len(self.classes))]
        return torch.stack(means).nan_to_num().cpu()  # none of a class: none hidden

    @property
    def verdict(self) -> str:
        """What the numbers mean, in a few sentences."""
        said, untouched = [hidden_share(self.hidden, self.exchanged)], self.masks.untouched()
        if untouched > UNTOUCHED:
            said.append(f"Nothing is hidden in {untouched:.0%} of the images: name a finer layer, or lower k.")
        whole, left = self.before["train"].average, self.covered
        if whole < least_right(len(self.classes)):
            said.append(f"The old model is right on only {whole:.1%} of the training images: it was never right.")
        if left is not None and self.masks.share() >= FEW:
            often, label = self.mean_masks.amax((1, 2)).max(0)
            told = "a shortcut in one place, if the subject is not always there" if often >= SPOT else "not a shortcut"
            said.append(f"One spot is hot in {often:.0%} of the images of class {self.classes[label]}: {told}.")
            said.append(f"Without what is hot, the old model is right on {left:.1%} of the training images instead "
                        f"of {whole:.1%}: it {'leaned on it' if whole - left > HARM else 'hardly needed it'}.")
        if len(self.trials) > 1:
            said.append(f"Of {len(self.trials)} LRs, {self.settings['lr']:g} is best by the lower of the accuracy as "
                        "is and in the swap test.")
        one_class = False
        for name, new in self.after.items():
            right = [sum(value > 0 for value in one.classes.values()) for one in (self.before[name], new)]
            if right[0] > right[1] == 1:  # of the classes, how many are ever read rightly
                one_class = True
                said.append(f"On {name}, the repaired model answers one class to everything: lower lr=.")
            elif name != "train":
                said.append(f"The worst group of {name} goes from {self.before[name].worst:.1%} to {new.worst:.1%}.")
        if self.history and left is not None and abs(self.history["accuracy"][-1] - left) < 0.01 and left < 0.95:
            said.append("" if one_class else "The epoch hardly changed the model: raise lr=.")
        said += [self._swap_said(name, *values) for name, values in self.swaps.items() if None not in values]
        if "train" in self.after and whole - self.after["train"].average > HARM:
            said.append(f"On the training images as they are, it fell to {self.after['train'].average:.1%}: what was "
                        "hot may have been the subject, of which the swap test knows nothing; look at the pictures.")
        for label, (row, column) in (self.again.spots.items() if self.again else ()):
            place = where(row, column, *self.masks.shape[1:])
            said.append(f"Now it leans on a spot {place} in images of class {self.classes[label]}: iterate, with "
                        "iterations=None.")
        return " ".join(filter(None, [*said, self.failure]))

    def _swap_said(self, name: str, old: float, new: float | None = None) -> str:
        told = "" if name == "train" else f" of {name}"
        said = (f"Where what the old model leaned on is exchanged for that of another class, it "
                f"{'was' if new is not None else 'is'} right on {old:.1%} of the images{told}")
        if new is not None:
            return f"{said}, and the repaired model is on {new:.1%}."
        leans = old < self.before["train"].average - HARM
        return said + (": if these pixels are a shortcut, ask for holes=\"transplants\", which shows it with every "
                       "class; if they are the subject, do not." if leans else ".")

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
                 if one.name not in ("labels", "masks", "again", "examples", "twins")}
        scores = {when: {name: asdict(one) for name, one in plain[when].items()} for when in ("before", "after")}
        again = self.again and {"swapped": self.again.swapped, "spots": self.again.spots}
        return {"verdict": self.verdict, **plain, **scores, "again": again,
                "hidden_by_class": self.mean_masks.mean((1, 2)).tolist()}

    def pictures(self) -> dict[str, bytes]:
        """JPEG files by name: mean masks of the classes that hide most, and a gallery; a warning tells what fails."""
        files = {}
        try:
            from . import figures  # here: training needs no matplotlib

            most = self.mean_masks.amax((1, 2)).argsort(descending=True, stable=True)[:FIGURES].sort().values
            names = [self.classes[i] for i in most]
            made = {"mean_masks": figures.mean_masks(self.mean_masks[most], names)}
            if self.again:
                made["mean_masks_after"] = figures.mean_masks(self.again.means[most], names)
            for name, found in (("gallery", self.examples), ("twins", self.twins)):
                if found:
                    labels, before, after, *rows = found
                    short = [f"{i} {name}"[:12] for i, name in enumerate(self.classes)]  # numbers keep them apart
                    titles = figures.arrows(labels, before, after, names=short, between="\n→ ")
                    if name == "gallery":
                        made[name] = figures.strip(figures.explained(*rows), {"image": titles})
                    else:
                        made[name] = figures.strip(dict(zip(("image", "exchanged"), rows, strict=True)),
                                                   {"exchanged": titles})
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

    def tried(self) -> pandas.DataFrame:
        """What was seen of each LR that was tried, the chosen one first: accuracy as is, and in the swap test."""
        return pandas.DataFrame(self.trials, columns=["lr", "as is", "swapped"])

    def __repr__(self) -> str:
        tables = [self.table().to_string(max_rows=40, **PERCENT)]
        if len(self.trials) > 1:
            tables.append(self.tried().to_string(formatters={"lr": "{:g}".format}, **PERCENT))
        text = "\n".join([self.verdict, *tables, f"computed by {self.computed_by}"])
        terminal = getattr(sys.stdout, "encoding", None) or "utf-8"  # which may not know a name's letters
        return text.encode(terminal, "replace").decode(terminal)

    def _repr_html_(self) -> str:
        said = f"<p>{html.escape(f'{self.verdict} Computed by {self.computed_by}. Title: class → before → after.')}</p>"
        pictures = "".join(f'<img alt="{name}" src="data:image/jpeg;base64,{base64.b64encode(content).decode()}">'
                           for name, content in self.pictures().items())
        tried = self.tried().to_html(formatters={"lr": "{:g}".format}, **PERCENT) if len(self.trials) > 1 else ""
        return said + self.table().to_html(**PERCENT) + tried + pictures


def hidden_share(share: float, exchanged: float = 0.0) -> str:
    """One sentence on how much is hidden, with advice where that is hardly anything or most of it."""
    few = ", so this is hardly more than fine-tuning: lower k, use larger images, or name a finer layer"
    many = ", so little is left to learn from: raise k, or name another layer"
    theirs = f", and {exchanged:.2%} show those of an image of another class" if exchanged else ""
    whole = share + exchanged
    return f"{share:.2%} of the pixels are hidden{theirs}{few if whole < FEW else many if whole > MANY else ''}."


def where(row: int, column: int, height: int, width: int) -> str:
    """A place in words: "at the lower right"."""
    across = ("left", "", "right")[3 * column // width]
    down = ("upper", "", "lower")[3 * row // height]
    return f"at the {f'{down} {across}'.strip() or 'centre'}"


def least_right(classes: int) -> float:
    """The share of its training images on which a model that was trained on them is right at least."""
    return min(1, max(0.5, 1.5 / classes))
