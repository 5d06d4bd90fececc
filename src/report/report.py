"""What a repair did to a classifier, in numbers, words and pictures: the report of `masktune`."""

import base64
import html
import io
import json
import warnings
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pandas
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
UNTOUCHED = 0.1  # share of images in which nothing is hidden, from which on it is said
EXAMPLES, FIGURES = 10, 20  # images of the gallery; classes whose mean masks are drawn
PERCENT = dict(index=False, float_format="{:.1%}".format, na_rep="-")  # of tables


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What one repair did. Accuracies are in [0, 1]; a score's groups are those given, else the classes.

    `print` shows it as text, a notebook as tables and figures; `save` writes both.
    """

    classes: tuple[str, ...]
    labels: Tensor  # (N,) of the training images
    masks: Masks  # (N, H, W)
    before: dict[str, Score]  # by data set
    settings: dict[str, object]  # layer, lr, ... as given
    computed_by: str  # the GPU, or the processor and the threads
    # what follows is None or empty where `failures` say why
    after: dict[str, Score] = field(default_factory=dict)
    before_on_masked: Score | None = None  # the old model on the masked training images: what leaned on the hidden
    examples: SimpleNamespace | None = None  # see `_examples`
    failures: tuple[str, ...] = ()

    @classmethod
    def of(cls, old: nn.Module, new: nn.Module, masks: Masks, sets: dict[str, Images], before: dict[str, Score],
           settings: dict[str, object]) -> "Report":
        """The report of a repair that is done; what cannot be computed is left out, and `failures` say why."""
        found, failures, train = {}, [], sets["train"]
        for part, compute in (("after", lambda: {name: scored(new, data) for name, data in sets.items()}),
                              ("before_on_masked", lambda: scored(old, train, masks)),
                              ("examples", lambda: _examples(old, new, train, masks))):
            try:
                found[part] = compute()
            except (Exception, KeyboardInterrupt) as error:  # the repaired model is worth more than the report
                failures.append(f"{part} is missing from the report: {type(error).__name__}: {error}")
                warnings.warn(failures[-1], stacklevel=3)
        device = device_name(next(old.parameters()).device)
        return cls(train.classes, train.labels, masks, before, settings, device, failures=tuple(failures), **found)

    @cached_property
    def hidden(self) -> float:
        """The share of the pixels hidden, in [0, 1]."""
        return self.masks.share()

    @cached_property
    def mean_masks(self) -> Tensor:
        """How often each pixel is hidden in the images of a class, (classes, H, W): a shortcut in one place shows."""
        means, labels = torch.zeros(len(self.classes), *self.masks.shape[1:]), self.labels.to(self.masks.bits.device)
        for label in labels.unique().tolist():
            means[label] = self.masks.mean(labels == label)
        return means

    @property
    def hidden_by_class(self) -> dict[str, float]:
        """The share of the pixels hidden in the images of each class that occurs."""
        return {self.classes[label]: self.mean_masks[label].mean().item() for label in self.labels.unique().tolist()}

    @property
    def verdict(self) -> str:
        """What the numbers mean, in a few sentences."""
        said, untouched = [hidden_share(self.hidden)], self.masks.untouched()
        if self.hidden >= FEW and untouched > UNTOUCHED:
            said.append(f"Nothing is hidden in {untouched:.0%} of the images: name a finer layer, or lower k.")
        if self.hidden >= FEW and self.before_on_masked:
            peaks = self.mean_masks.amax((1, 2))
            most, name = peaks.max().item(), self.classes[peaks.argmax()]
            said.append(f"One spot is hidden in {most:.0%} of the images of class {name}: a shortcut in one place, if "
                        "the subject is not always there." if most >= SPOT else
                        f"No spot is hidden in more than {most:.0%} of the images of a class: do not expect a repair "
                        "of a shortcut that sits in one place.")
            whole, left = self.before["train"].average, self.before_on_masked.average
            said.append(f"Without what is hidden, the old model is right on {left:.1%} of the training images instead "
                        f"of {whole:.1%}: it {'leaned on it' if whole - left > 0.05 else 'hardly needed it'}.")
        for name in [name for name in self.after if name != "train"]:
            old, new = self.before[name].worst, self.after[name].worst
            said.append(f"The worst group of {name} goes from {old:.1%} to {new:.1%}"
                        f"{', which is worse than before' if new < old else ''}.")
        return " ".join(said)

    def as_dict(self) -> dict[str, object]:
        """All but masks and pictures, as plain numbers and strings; classes and groups by number."""
        def plain(scores: dict[str, Score]) -> dict[str, dict]:
            return {name: asdict(one) | {"worst": one.worst} for name, one in scores.items()}

        on_masked = self.before_on_masked and self.before_on_masked.average
        return {"verdict": self.verdict, "hidden": self.hidden, "hidden_by_class": self.hidden_by_class,
                "before": plain(self.before), "after": plain(self.after), "before_on_masked": on_masked,
                "classes": self.classes, "settings": self.settings, "computed_by": self.computed_by,
                "failures": self.failures}

    def table(self) -> pandas.DataFrame:
        """Accuracies before and after, of each data set: all images, every class, every group that is not a class."""
        rows = []
        for name, old in self.before.items():
            new = self.after.get(name)
            rows.append((name, "average", old.average, new and new.average))
            rows += [(name, self.classes[i], value, new and new.classes[i]) for i, value in old.classes.items()]
            if old.groups != old.classes:
                rows += [(name, f"group {i}", value, new and new.groups[i]) for i, value in old.groups.items()]
        return pandas.DataFrame(rows, columns=["data set", "accuracy of", "before", "after"])

    def __repr__(self) -> str:
        return "\n".join([self.verdict, self.table().to_string(max_rows=40, **PERCENT),
                          f"computed by {self.computed_by}", *self.failures])

    def figures(self) -> dict[str, object]:
        """The mean masks of the classes, of many those with the hottest spots, and a gallery: figures by name."""
        import matplotlib.pyplot as plt

        from . import figures  # here: training needs no matplotlib

        most = self.mean_masks.amax((1, 2)).argsort(descending=True, stable=True)[:FIGURES].sort().values
        made = {"mean_masks": figures.mean_masks(self.mean_masks[most], [self.classes[label] for label in most])}
        if self.examples is not None:
            made["gallery"] = figures.repair(self.examples, self.classes)
        for figure in made.values():
            plt.close(figure)  # shown by whoever asked, and not once more by the notebook
        return made

    def _pictures(self) -> dict[str, bytes]:
        """The figures as PNG files; none, with a warning, where they cannot be drawn."""
        buffers = {}
        try:
            for name, figure in self.figures().items():
                figure.savefig(buffers.setdefault(name, io.BytesIO()), format="png")
        except Exception as error:  # no matplotlib, or a name that it cannot write: the numbers are worth more
            warnings.warn(f"the report has no figures: {type(error).__name__}: {error}", stacklevel=3)
            return {}
        return {name: buffer.getvalue() for name, buffer in buffers.items()}

    def save(self, folder: Path | str) -> None:
        """Write `report.json` and the figures as PNG files; numbers alone, with a warning, where figures fail.

        Raises:
            FileExistsError: the folder is there, and holds no earlier report; it is left as it is.
        """
        folder = Path(folder).expanduser()
        if folder.exists() and not (folder / "report.json").is_file():
            raise FileExistsError(f"expected {folder} to be free, or to hold an earlier report; use another name")
        write_whole(folder / "report.json", json.dumps(self.as_dict(), indent=1).encode())
        for name, content in self._pictures().items():
            write_whole(folder / f"{name}.png", content)

    def _repr_html_(self) -> str:
        said = [f"<p>{html.escape(one)}</p>" for one in (self.verdict, *self.failures)]
        shares = pandas.DataFrame(self.hidden_by_class.items(), columns=["class", "pixels hidden"])
        pictures = [f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
                    for name, content in self._pictures().items()]
        return "\n".join([*said, self.table().to_html(**PERCENT), shares.to_html(**PERCENT), *pictures,
                          f"<p>Computed by {html.escape(self.computed_by)}.</p>"])


def hidden_share(share: float) -> str:
    """One sentence on how much is hidden, with advice where that is hardly anything or most of it."""
    if share < FEW:
        return (f"Only {share:.3%} of the pixels are hidden, so this is hardly more than fine-tuning: name a finer "
                "layer (suggest_layers lists some), use larger images, or lower k.")
    few = ", so little is left to learn from: raise k, or name another layer (suggest_layers lists some)"
    return f"{share:.1%} of the pixels are hidden{few if share > MANY else ''}."


def scored(model: nn.Module, data: Images, masks: Masks | None = None) -> Score:
    """The score of a model on one data set, or on what masks leave of it."""
    guesses, labels = infer(model, data.images, masks).argmax(1).cpu(), data.labels.cpu()
    return score(guesses, labels, labels if data.groups is None else data.groups.cpu())


def _examples(old: nn.Module, new: nn.Module, data: Images, masks: Masks) -> SimpleNamespace:
    """Some images of every class in turn, (n, 3, H, W) float; the old model's heat (n, H, W) and masks (n, H, W) bool.

    Of each also the label, and the class predicted before and after, (n,).
    """
    labels, each = data.labels.cpu(), max(1, EXAMPLES // len(data.classes))
    chosen = torch.cat([torch.nonzero(labels == label).flatten()[:each] for label in labels.unique()])[:EXAMPLES]
    images = data.images[chosen.to(data.images.device)]
    seen = pixels(images.to(next(old.parameters()).device))
    before, after = (infer(model, images).argmax(1).cpu() for model in (old, new))
    return SimpleNamespace(images=seen.cpu(), heat=heatmaps(old, seen, old.saliency_layer).cpu(), labels=labels[chosen],
                           masks=masks[chosen.to(masks.bits.device)].cpu(), before=before, after=after)
