"""The figures: each function returns one. Heat maps share one colour scale, masks are white where pixels are hidden."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pandas
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import Tensor

from .tables import NAMES, QUIET, TRAINING_SETS

plt.style.use(Path(__file__).with_name("style.mplstyle"))

_CYCLE = plt.rcParams["axes.prop_cycle"].by_key()["color"]  # of the style file: one colour means one thing everywhere
COLOURS = dict(zip((*NAMES.values(), *TRAINING_SETS.values(), *QUIET), _CYCLE, strict=True))
HATCHES = {"raw": "", "malicious": "///"}
WRONG = "#d62728"
HEAT = dict(cmap="inferno", vmin=0, vmax=1)
MASK = dict(cmap="gray", vmin=0, vmax=1)


def overview(image: Tensor, heatmap: Tensor, mask: Tensor, rows: pandas.DataFrame, titles: dict[str, str]) -> Figure:
    """The method on a real image (3, H, W) float, its heat map (H, W) and mask (H, W) bool; below it, what comes of it.

    Bars: accuracy of ERM, RandMask and MaskTune on both test sets, mean over all runs; whiskers: one std.
    """
    figure = plt.figure(figsize=(11.5, 6.6))
    figure.get_layout_engine().set(wspace=0.09)  # for the arrows
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15), hspace=0.05)
    strip, bars = above.subplots(1, 4), below.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    steps = [(image, {}, "1  train on the images (ERM)"), (heatmap, HEAT, "2  where does it look?"),
             (mask, MASK, "3  hide what is hottest"), (image.masked_fill(mask, 0), {}, "4  one epoch on the rest")]
    for axis, (picture, style, title) in zip(strip, steps, strict=True):
        _show(axis, picture, style, title)
    for left, right in pairwise(strip):
        above.add_artist(ConnectionPatch((1.03, 0.5), (-0.03, 0.5), "axes fraction", "axes fraction", axesA=left,
                                         axesB=right, arrowstyle="-|>", mutation_scale=18, color="0.3", linewidth=1.8))
    for axis, (setting, title) in zip(bars, titles.items(), strict=True):
        for j, (test_set, hatch) in enumerate(HATCHES.items()):
            own = rows[rows["setting"] == setting].groupby("method", sort=False)[test_set]
            for i, (method, values) in enumerate(own):
                x, mean = j + 0.28 * (i - 1), 100 * values.mean()
                axis.bar(x, mean, 0.26, yerr=100 * values.std(), capsize=3, color=COLOURS[NAMES[method]], hatch=hatch,
                         edgecolor="white", label=NAMES[method] if j == 0 else None)
                axis.text(x, 106, f"{mean:.0f}", ha="center")
        axis.axhline(50, color="0.6", linewidth=1, linestyle=":")  # chance, of two classes
        axis.set(title=title, ylim=(0, 115), yticks=range(0, 101, 25), xticks=range(2), xticklabels=HATCHES)
    bars[0].set_ylabel("accuracy, %")
    below.legend(*bars[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def strip(rows: dict[str, Tensor], titles: dict[str, Sequence[object]] | None = None) -> Figure:
    """Rows of pictures, one sample a column: images (N, 3, H, W), heat maps (N, H, W) in [0, 1] or bool masks.

    titles: of the pictures of a row. One of the form "label → prediction" is red where the two differ.
    """
    columns = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns, 1.45 * len(rows)), squeeze=False)
    for (name, pictures), line in zip(rows.items(), axes, strict=True):
        style = {} if pictures.dim() == 4 else MASK if pictures.dtype == torch.bool else HEAT
        for axis, picture, title in zip(line, pictures, (titles or {}).get(name, [""] * columns), strict=True):
            said = str(title).split("→")
            _show(axis, picture, style)
            axis.set_title(title, fontsize=9, color="black" if said[0].strip() == said[-1].strip() else WRONG)
        line[0].set_ylabel(name)
    return figure


def arrows(*classes: Tensor, names: Sequence[str] = ("0-4", "5-9"), between: str = " → ") -> list[str]:
    """Titles "label → prediction" of classes (N,) each."""
    return [between.join(names[one] for one in own) for own in zip(*(part.tolist() for part in classes), strict=True)]


def explained(images: Tensor, heat: Tensor, masks: Tensor, masked: Tensor | None = None) -> dict[str, Tensor]:
    """The rows of a strip: images (N, 3, H, W), heat maps (N, H, W), masks (N, H, W) and what these leave, in black."""
    return {"image": images, "heat map": heat, "mask\n(white: hidden)": masks,
            "masked": images.masked_fill(masks[:, None], 0) if masked is None else masked}


def outline(figure: Figure, objects: Tensor) -> Figure:
    """Draw the outlines of objects (N, H, W) bool into all rows of a strip of N columns."""
    for i, axis in enumerate(figure.axes):
        axis.contour(objects[i % len(objects)].float().cpu().numpy(), levels=[0.5], colors="#00e5ff", linewidths=0.9)
    return figure


def forgetting(steps: Sequence[int], accuracies: dict[str, Sequence[float]], before: float) -> Figure:
    """Accuracy on malicious images, in [0, 1], over the steps of the one epoch, by method; before: that of ERM."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for name, seen in accuracies.items():
        axis.plot([0, *steps], [100 * value for value in (before, *seen)], "o-", color=COLOURS[name], markersize=4,
                  label=name)
    axis.plot(0, 100 * before, "o", color=COLOURS["ERM"], markersize=7)
    axis.annotate("ERM", (0, 100 * before), (10, -3), textcoords="offset points")
    axis.set(xlabel="steps of the one epoch", ylabel="malicious: accuracy, %", ylim=(-2, 104), yticks=range(0, 101, 25))
    axis.legend(loc="center right")
    return figure


def mean_masks(shares: Tensor, classes: Sequence[str]) -> Figure:
    """How often each pixel is hidden, class by class: shares (classes, H, W) in [0, 1]."""
    figure, axes = _grid(len(classes), 5, 3, 2.58)
    for axis, often, name in zip(axes, shares, classes, strict=True):
        shown = _show(axis, often, dict(cmap="viridis", vmin=0, vmax=1), name)
    figure.colorbar(shown, ax=axes, label="share of images\nthat hide the pixel")
    return figure


def by_digit(correct: dict[str, Tensor], digits: Tensor) -> Figure:
    """ERM's accuracy of each digit 0-9 on the malicious set, in one panel per order of the data.

    correct: {title: (seeds, N) bool}, which images each seed reads right; digits: (N,).
    """
    figure, (axes,) = plt.subplots(1, len(correct), figsize=(6 * len(correct), 3.6), sharey=True, squeeze=False)
    for axis, (title, right) in zip(axes, correct.items(), strict=True):
        values = torch.stack([100 * right[:, digits == digit].double().mean(1) for digit in range(10)], dim=1)
        axis.bar(range(10), values.mean(0), color=COLOURS["ERM"], hatch=HATCHES["malicious"], edgecolor="white")
        axis.plot(range(10), values.T, "k.", markersize=4)
        for digit, value in enumerate(values.mean(0).tolist()):
            axis.text(digit, 113, f"{value:.0f}", ha="center", fontsize=10)  # in one line above all bars
        axis.set(title=f"{title}: {100 * right.double().mean():.2f} %", xlabel="digit", xticks=range(10), ylim=(0, 122),
                 yticks=range(0, 101, 25))
    axes[0].set_ylabel("ERM, malicious: accuracy, %")
    return figure


def panels(panels: dict[str, tuple[pandas.DataFrame, str]], ylabel: str, names: dict[str, str],
           series: str = "setting", lines: dict[str, float] | None = None) -> Figure:
    """What the worst group depends on, a small panel for each question: dots are runs, a line or a tick their means.

    panels: {title: (rows, the column that varies)}; names: of the values of the column `series`, as in `COLOURS`;
    lines: references across all panels, accuracies in [0, 1].
    """
    figure, axes = _grid(len(panels), 3, 4.1, 2.9, sharey=True)
    for axis, (title, (answers, vary)) in zip(axes, panels.items(), strict=True):
        ticks = answers[vary].unique().tolist()
        ticks = ticks if isinstance(ticks[0], str) else sorted(ticks)
        shown = answers[series].unique().tolist()
        for i, name in enumerate(shown):
            own = answers[answers[series] == name]
            x, percent = own[vary].map(ticks.index) + 0.1 * (i - (len(shown) - 1) / 2), 100 * own["worst"]
            means = percent.groupby(x, sort=False).mean()
            joined = dict(linestyle="", marker="_", markersize=13) if isinstance(ticks[0], str) else {}  # no order
            axis.plot(means.index, means, color=COLOURS[names[name]], label=names[name], **joined)
            axis.plot(x, percent, "o", color=COLOURS[names[name]], markersize=3.5)
        for style, (name, level) in zip(("--", ":", "-."), (lines or {}).items(), strict=False):
            axis.axhline(100 * level, color="0.35", linewidth=1.1, linestyle=style, label=name)
        axis.set(title=title, ylim=(-4, 104), yticks=range(0, 101, 25), xlim=(-0.4, len(ticks) - 0.6))
        turned = dict(rotation=30, ha="right") if max(len(str(one)) for one in ticks) > 8 else {}
        axis.set_xticks(range(len(ticks)), [NAMES.get(one, one) for one in ticks], **turned)
    for axis in axes[::3]:
        axis.set_ylabel(ylabel)
    handles = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def risk_curves(rows: pandas.DataFrame, title: str) -> Figure:
    """Error among the answers against coverage, one line a method: mean over seeds, and a band of one std."""
    figure, axis = plt.subplots(figsize=(7, 4))
    looks = {"ERM": ("ERM", "-"), "two ERM seeds": ("ERM", "--"), "MaskTune alone": ("MaskTune", "--"),
             "ERM × MaskTune": ("MaskTune", "-")}
    for method, (whose, line) in looks.items():
        risks = 100 * rows[rows["method"] == method].filter(like="risk_")
        mean, std = risks.mean(), risks.std()
        axis.plot(range(1, 101), mean, color=COLOURS[whose], linestyle=line, label=method)
        axis.fill_between(range(1, 101), mean - std, mean + std, color=COLOURS[whose], alpha=0.15, linewidth=0)
    axis.set(title=title, xlabel="coverage, % of the test images", ylabel="error among the answers, %")
    axis.legend(loc="upper left")
    return figure


def _grid(count: int, columns: int, width: float, height: float, **options: object) -> tuple[Figure, Sequence[Axes]]:
    """Panels in so many columns at most, each of a width and a height in inches."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def _show(axis: Axes, picture: Tensor, style: dict, title: str = ""):
    axis.grid(False)
    axis.set(xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(False)
    picture = picture.detach().cpu().float().numpy()
    return axis.imshow(picture.transpose(1, 2, 0) if picture.ndim == 3 else picture, **style)


def one_of_each_digit(digits: Tensor) -> Tensor:
    """Indices (10,) of the first image of each digit: the same samples before and after."""
    return torch.stack([torch.nonzero(digits == digit)[0, 0] for digit in range(10)])
