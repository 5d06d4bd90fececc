"""What a repair did to a classifier, in numbers, words and pictures: the report of `masktune`."""

import base64
import html
import io
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..datasets.images import Images
from ..device import device_name
from ..files import write_whole
from ..inference import infer, pixels
from ..masks import Masks
from ..metrics import Score, score
from ..saliency import heatmaps

FEW, MANY = 0.001, 0.5  # shares of hidden pixels at which a repair is doubtful
SPOT = 0.8  # share of a class's images in which one pixel is hidden, from which on it is called one spot
EXAMPLES = 10  # images of the gallery
UNTOUCHED = 0.1  # share of images in which nothing is hidden, from which on it is said
FIGURES = 20  # classes whose mean masks are drawn


@dataclass(frozen=True)
class Examples:
    """Some training images (n, 3, H, W) float in [0, 1], as the old model and the new one see them."""

    images: Tensor
    heat: Tensor  # (n, H, W), the old model's
    masks: Tensor  # (n, H, W) bool
    labels: Tensor  # (n,)
    before: Tensor  # (n,) predicted classes
    after: Tensor


@dataclass(frozen=True)
class Report:
    """What one repair did. Accuracies are in [0, 1]; a score's groups are those given, else the classes.

    `print` shows it as text, a notebook as tables and figures; `save` writes both.
    """

    classes: tuple[str, ...]
    settings: dict[str, object]  # layer, lr, ... as given
    computed_by: str  # the GPU, or the processor and the threads
    masks: Masks  # of the training images
    before: dict[str, Score]  # by data set
    # what follows is None or empty where `failures` say why
    after: dict[str, Score] = field(default_factory=dict)
    before_on_masked: Score | None = None  # the old model on the masked training images: what leaned on the hidden
    hidden: float = math.nan  # share of the pixels hidden, in [0, 1]
    hidden_by_class: dict[str, float] = field(default_factory=dict)
    mean_masks: Tensor | None = None  # (classes, H, W): how often each pixel is hidden; a shortcut in one place shows
    examples: Examples | None = None
    failures: tuple[str, ...] = ()

    @classmethod
    def of(cls, old: nn.Module, new: nn.Module, masks: Masks, sets: dict[str, Images], before: dict[str, Score],
           settings: dict[str, object]) -> "Report":
        """The report of a repair that is done; what cannot be computed is left out, and `failures` say why."""
        found, failures, train = {}, [], sets["train"]
        for names, compute in {
                ("after",): lambda: [{name: scored(new, data) for name, data in sets.items()}],
                ("before_on_masked",): lambda: [scored(old, train, masks)],
                ("hidden", "hidden_by_class", "mean_masks"): lambda: hidden_where(masks, train),
                ("examples",): lambda: [examples(old, new, train, masks)]}.items():
            try:
                found |= zip(names, compute(), strict=True)
            except (Exception, KeyboardInterrupt) as error:  # the repaired model is worth more than the report
                failures.append(f"{names[0]} is missing from the report: {type(error).__name__}: {error}")
                warnings.warn(failures[-1], stacklevel=3)
        device = device_name(next(old.parameters()).device)
        return cls(train.classes, settings, device, masks, before, failures=tuple(failures), **found)

    @property
    def verdict(self) -> str:
        """What the numbers mean, in a few sentences."""
        said, untouched = [hidden_share(self.hidden)], self.masks.untouched()
        if self.hidden >= FEW and untouched > UNTOUCHED:
            said.append(f"Nothing is hidden in {untouched:.0%} of the images: in a coarse map, often no pixel is hotter"
                        " than m + k s. Name a layer with a finer map, or lower k.")
        if self.hidden >= FEW and self.before_on_masked:
            often, name = max((often.max().item(), name) for often, name in zip(self.mean_masks, self.classes,
                                                                               strict=True))
            said.append(f"One spot is hidden in {often:.0%} of the images of class {name}: a shortcut in one place, if "
                        "the subject is not always there." if often >= SPOT else
                        f"No spot stands out: none is hidden in more than {often:.0%} of the images of a class. Do not "
                        "expect a repair of a shortcut that sits in one place.")
            fall = self.before["train"].average - self.before_on_masked.average
            said.append(f"Without what is hidden, the old model is right on {self.before_on_masked.average:.1%} of the "
                        f"training images instead of {self.before['train'].average:.1%}: it "
                        f"{'leaned on it' if fall > 0.05 else 'hardly needed it'}.")
        for name, old in self.before.items():
            if name != "train" and name in self.after:
                change = self.after[name].worst - old.worst
                said.append(f"The worst group of {name} goes from {old.worst:.1%} to {self.after[name].worst:.1%}"
                            f"{', which is worse than before' if change < 0 else ''}.")
        return " ".join(said)

    def as_dict(self) -> dict[str, object]:
        """All but masks and pictures, as plain numbers and strings."""
        def plain(one: Score | None) -> dict[str, object] | None:
            return one and {"average": one.average, "worst": one.worst,
                            "groups": {str(group): value for group, value in one.groups.items()},
                            "classes": {self.classes[label]: value for label, value in one.classes.items()}}

        return {"verdict": self.verdict, "hidden": self.hidden, "hidden_by_class": self.hidden_by_class,
                "before": {name: plain(one) for name, one in self.before.items()},
                "after": {name: plain(one) for name, one in self.after.items()},
                "before_on_masked": plain(self.before_on_masked), "settings": self.settings,
                "computed_by": self.computed_by, "failures": self.failures}

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows (data set, of what, before, after): the average, every class, and every group that is not a class."""
        rows = []
        for name, old in self.before.items():
            new = self.after.get(name)
            parts = [("average", old.average, new and new.average)]
            parts += [(self.classes[label], value, new and new.classes[label]) for label, value in old.classes.items()]
            if old.groups != old.classes:
                parts += [(f"group {group}", value, new and new.groups[group]) for group, value in old.groups.items()]
            rows += [(name, part, f"{value:.1%}", "-" if later is None else f"{later:.1%}")
                     for part, value, later in parts]
        return rows

    def __str__(self) -> str:
        lines = [f"{self.hidden:.1%} of the pixels hidden"]
        if self.before_on_masked:
            lines[0] += f"; on what was left, the old model is right on {self.before_on_masked.average:.1%}"
        lines += [f"{name}: {old.average:.1%} -> {self.after[name].average:.1%}, worst group {old.worst:.1%} -> "
                  f"{self.after[name].worst:.1%}" for name, old in self.before.items() if name in self.after]
        lines += [self.verdict, f"computed by {self.computed_by}"]
        return "\n".join([*lines, *self.failures])

    def figures(self) -> dict[str, object]:
        """The mean masks of the classes, of many those with the hottest spots, and a gallery: figures by name."""
        import matplotlib.pyplot as plt

        from . import figures  # here: training needs no matplotlib

        made = {}
        if self.mean_masks is not None:
            most = self.mean_masks.amax((1, 2)).argsort(descending=True, stable=True)[:FIGURES].sort().values
            made["mean_masks"] = figures.mean_masks(self.mean_masks[most], [self.classes[label] for label in most])
        if self.examples is not None:
            made["gallery"] = figures.repair(self.examples, self.classes)
        for figure in made.values():
            plt.close(figure)  # shown by whoever asked, and not once more by the notebook
        return made

    def _pictures(self) -> dict[str, bytes]:
        """The figures as PNG files."""
        pictures = {}
        for name, figure in self.figures().items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            pictures[name] = buffer.getvalue()
        return pictures

    def save(self, folder: Path | str) -> None:
        """Write `report.json` and the figures as PNG files.

        Raises:
            FileExistsError: the folder holds something else than an earlier report; it is left as it is.
        """
        folder = Path(folder).expanduser()
        names = {"report.json", "mean_masks.png", "gallery.png"}
        if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= names):
            raise FileExistsError(f"expected {folder} to be free, or to hold a report and nothing else; use another "
                                  "name")
        pictures = self._pictures()
        write_whole(folder / "report.json", json.dumps(self.as_dict(), indent=1, ensure_ascii=False).encode())
        for name, content in pictures.items():
            write_whole(folder / f"{name}.png", content)

    def _repr_html_(self) -> str:
        def line(cells: tuple[str, ...], tag: str = "td") -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        parts = [f"<p>{html.escape(said)}</p>" for said in (self.verdict, *self.failures)]
        parts += ["<table>", line(("data set", "accuracy of", "before", "after"), "th"), *map(line, self.table()),
                  "</table>", "<table>", line(("class", "pixels hidden"), "th"),
                  *(line((name, f"{share:.1%}")) for name, share in self.hidden_by_class.items()), "</table>"]
        try:
            pictures = self._pictures()
        except ImportError as error:
            parts.append(f"<p>No figures without matplotlib ({html.escape(str(error))}).</p>")
        else:
            parts += [f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
                      for name, content in pictures.items()]
        return "\n".join([*parts, f"<p>Computed by {html.escape(self.computed_by)}.</p>"])


def hidden_share(share: float) -> str:
    """One sentence on how much is hidden, with advice where that is hardly anything or most of it."""
    if share < FEW:
        return (f"Only {share:.3%} of the pixels are hidden, so this is hardly more than fine-tuning: name a finer "
                "layer (suggest_layers lists some), use larger images, or lower k.")
    if share > MANY:
        return (f"{share:.1%} of the pixels are hidden, so little is left to learn from: raise k, or name another "
                "layer (suggest_layers lists some).")
    return f"{share:.1%} of the pixels are hidden."


def scored(model: nn.Module, data: Images, masks: Masks | None = None) -> Score:
    """The score of a model on one data set, or on what masks leave of it."""
    guesses = infer(model, data.images, masks).argmax(1).cpu()
    labels = data.labels.cpu()
    return score(guesses, labels, labels if data.groups is None else data.groups.cpu())


def hidden_where(masks: Masks, data: Images) -> tuple[float, dict[str, float], Tensor]:
    """The share of hidden pixels, that of each class which occurs, and the mean masks of all classes, (C, H, W)."""
    labels = data.labels.to(masks.bits.device)
    means = torch.zeros(len(data.classes), *masks.shape[1:])
    for label in labels.unique().tolist():
        means[label] = masks.mean(labels == label)
    shares = {data.classes[label]: means[label].mean().item() for label in labels.unique().tolist()}
    return masks.share(), shares, means


def examples(old: nn.Module, new: nn.Module, data: Images, masks: Masks) -> Examples:
    """Some images of every class in turn, the first ones of each."""
    labels = data.labels.cpu()
    each = max(1, EXAMPLES // len(data.classes))
    chosen = torch.cat([torch.nonzero(labels == label).flatten()[:each] for label in labels.unique()])[:EXAMPLES]
    device = next(old.parameters()).device
    images = data.images[chosen.to(data.images.device)]
    seen = pixels(images.to(device))
    heat = heatmaps(old, seen, old.saliency_layer)
    guesses = [infer(model, images).argmax(1).cpu() for model in (old, new)]
    return Examples(seen.cpu(), heat.cpu(), masks[chosen.to(masks.bits.device)].cpu(), labels[chosen], *guesses)
