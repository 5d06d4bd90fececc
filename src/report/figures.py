"""The figures: each function returns one. Heat maps share one colour scale, masks are white where pixels are hidden."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import Tensor

from ..datasets import CLASSES
from ..metrics import summarize
from ..rows import Row, pivot
from .tables import NAMES

plt.style.use(Path(__file__).with_name("style.mplstyle"))

COLOURS = {"ERM": "#7f7f7f", "RandMask": "#e69f00", "MaskTune": "#0072b2"}  # Okabe-Ito, readable when colour-blind
WRONG = "#d62728"
HEAT = dict(cmap="inferno", vmin=0, vmax=1)
MASK = dict(cmap="gray", vmin=0, vmax=1)


def results(rows: Sequence[Row], titles: dict[str, str]) -> Figure:
    """Accuracy of ERM, RandMask and MaskTune on both test sets: mean over all runs of a method; whiskers: one std."""
    figure, (axes,) = plt.subplots(1, len(titles), figsize=(4 * len(titles), 3.6), sharey=True, squeeze=False)
    for axis, (setting, title) in zip(axes, titles.items(), strict=True):
        for j, test_set in enumerate(("raw", "malicious")):
            accuracies = pivot([row for row in rows if row["setting"] == setting], ("method",), test_set)
            for i, ((method,), values) in enumerate(accuracies.items()):
                summary = summarize([100 * value for value in values])
                x, whisker = j + 0.28 * (i - 1), summary.std if summary.n > 1 else 0
                axis.bar(x, summary.mean, 0.26, yerr=whisker or None, capsize=3, color=COLOURS[NAMES[method]],
                         label=NAMES[method] if j == 0 else None)
                axis.text(x, summary.mean + whisker + 2, f"{summary.mean:.1f}", ha="center", fontsize=9)
        axis.axhline(50, color="0.6", linewidth=1, linestyle=":")  # chance, of two classes
        axis.set(title=title, ylim=(0, 112), xticks=range(2), xticklabels=["raw", "malicious"])
    axes[0].set_ylabel("accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
    return figure


def method(image: Tensor, heatmap: Tensor, mask: Tensor, share: float) -> Figure:
    """The method in one picture, on a real image (3, H, W) float, its heat map (H, W) and its mask (H, W) bool."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7))
    figure.get_layout_engine().set(wspace=0.13)
    steps = [(image, {}, "1  train (ERM)\non the images"), (heatmap, HEAT, "2  XGradCAM:\nwhere the model looks"),
             (mask, MASK, f"3  hide heat > m + 2 s\nhere {share:.1%} of the pixels"),
             (image.masked_fill(mask, 0), {}, "4  fine-tune one epoch\non what is left")]
    for axis, (picture, style, title) in zip(axes, steps, strict=True):
        _show(axis, picture, style, title)
    for left, right in pairwise(axes):
        figure.add_artist(ConnectionPatch((1.04, 0.5), (-0.04, 0.5), "axes fraction", "axes fraction", axesA=left,
                                          axesB=right, arrowstyle="-|>", mutation_scale=18, color="0.3", linewidth=1.8))
    return figure


def samples(images: Tensor, titles: Sequence[str]) -> Figure:
    """Images (N, 3, H, W) float in [0, 1] in a row, each under its title."""
    figure, (axes,) = plt.subplots(1, len(images), figsize=(1.35 * len(images), 1.75), squeeze=False)
    for axis, image, title in zip(axes, images, titles, strict=True):
        _show(axis, image, {}, title)
    return figure


def curves(histories: dict[str, dict[str, list[float]]]) -> Figure:
    """Training loss (log scale) and LR against epochs: {setting title: history}."""
    figure, (loss, lr) = plt.subplots(1, 2, figsize=(12, 3.4), width_ratios=(2, 1))
    for title, history in histories.items():
        epochs = range(1, len(history["loss"]) + 1)
        loss.plot(epochs, history["loss"], label=title)
        lr.step(epochs, history["lr"], where="mid", color="0.3")
    loss.set(title="training loss (mean over the epoch)", xlabel="epoch", yscale="log")
    lr.set(title="learning rate in force", xlabel="epoch", ylim=(0, None))
    loss.legend()
    return figure


def heatmaps(images: Tensor, maps: Tensor, masks: Tensor, labels: Tensor, predictions: Tensor) -> Figure:
    """Samples (N, 3, H, W), their heat maps (N, H, W), masks (N, H, W) bool and masked images, one sample a column."""
    rows = [("image", images, {}), ("heat map", maps, HEAT), ("mask\n(white: hidden)", masks, MASK),
            ("masked", images.masked_fill(masks[:, None], 0), {})]
    figure = _rows(rows)
    _title_predictions(figure, labels, predictions)
    return figure


def before_after(images: Tensor, before: Tensor, after: Tensor, labels: Tensor, predicted_before: Tensor,
                 predicted_after: Tensor, title: str) -> Figure:
    """The same samples (N, 3, H, W) with the heat maps (N, H, W) and predictions (N,) of ERM and of MaskTune."""
    figure = _rows([("image", images, {}), ("ERM", before, HEAT), ("MaskTune", after, HEAT)])
    columns = len(images)
    for row, predicted in ((1, predicted_before), (2, predicted_after)):
        for axis, label, guess in zip(figure.axes[row * columns:(row + 1) * columns], labels, predicted, strict=True):
            axis.set_title(f"→ {CLASSES[guess][7:]}", color="black" if label == guess else WRONG, fontsize=10)
    for axis, label in zip(figure.axes[:columns], labels, strict=True):
        axis.set_title(CLASSES[label][7:], fontsize=10)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def mean_masks(shares: Tensor, classes: Sequence[str]) -> Figure:
    """How often each pixel is hidden, class by class: shares (classes, H, W) in [0, 1]."""
    columns = min(5, len(classes))
    rows, side = math.ceil(len(classes) / columns), min(4.2, 16 / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, 0.86 * side * rows), squeeze=False)
    for axis in axes.flat[len(classes):]:
        axis.set_axis_off()
    for axis, often, name in zip(axes.flat, shares, classes, strict=False):
        shown = _show(axis, often, dict(cmap="viridis", vmin=0, vmax=1), name)
    figure.colorbar(shown, ax=axes, label="share of images in which the pixel is hidden")
    return figure


def repair(examples, classes: Sequence[str]) -> Figure:
    """What a repair looked at and hid, and what it changed: label → prediction before → after, red where wrong."""
    figure = _rows([("image", examples.images, {}), ("heat map", examples.heat, HEAT),
                    ("masked", examples.images.masked_fill(examples.masks[:, None], 0), {})])
    for axis, label, before, after in zip(figure.axes, examples.labels, examples.before, examples.after, strict=False):
        axis.set_title("\n→ ".join(classes[one][:18] for one in (label, before, after)), fontsize=8,
                       color="black" if label == after else WRONG)
    return figure


def gallery(images: Tensor, masks: Tensor, titles: Sequence[str]) -> Figure:
    """Images (N, 3, H, W) float in [0, 1], one a column, with what their masks (N, H, W) bool leave of them."""
    figure = _rows([("image", images, {}), ("masked", images.masked_fill(masks[:, None], 0), {})])
    for axis, title in zip(figure.axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
    return figure


def by_digit(accuracies: dict[str, Tensor], whole: dict[str, float]) -> Figure:
    """Accuracy of each digit 0-9 on the malicious set, in [0, 1], in one panel per order of the data.

    accuracies: {title: (seeds, 10)}; whole: {title: accuracy over the whole set}.
    """
    figure, (axes,) = plt.subplots(1, len(accuracies), figsize=(6 * len(accuracies), 3.6), sharey=True, squeeze=False)
    for axis, (title, values) in zip(axes, accuracies.items(), strict=True):
        values = 100 * values
        axis.bar(range(10), values.mean(0), color=COLOURS["ERM"])
        axis.plot(range(10), values.T, "k.", markersize=4)
        for digit, value in enumerate(values.mean(0).tolist()):
            axis.text(digit, values[:, digit].max() + 3, f"{value:.0f}", ha="center", fontsize=9)
        line = axis.axhline(100 * whole[title], color=WRONG, linewidth=1.2, linestyle="--")
        axis.legend([line], [f"all digits: {100 * whole[title]:.2f} %"], loc="upper left")
        axis.set(title=title, xlabel="digit", xticks=range(10), ylim=(0, 125), yticks=range(0, 101, 20))
    axes[0].set_ylabel("ERM, malicious set: accuracy, %")
    return figure


def sweep(rows: Sequence[Row], vary: str, titles: dict[str, str], xlabel: str, log: bool = False) -> Figure:
    """MaskTune's accuracy against what is varied: a panel for each setting, a dot for each run, a line of means."""
    figure, (axes,) = plt.subplots(1, len(titles), figsize=(5 * len(titles), 3.4), sharey=True, squeeze=False)
    for axis, (setting, title) in zip(axes, titles.items(), strict=True):
        own = [row for row in rows if row["setting"] == setting]
        for test_set, colour in (("raw", COLOURS["RandMask"]), ("malicious", COLOURS["MaskTune"])):
            points = {value: accuracies for (value,), accuracies in pivot(own, (vary,), test_set).items()}
            axis.plot(list(points), [100 * summarize(one).mean for one in points.values()], "o-", color=colour,
                      label=test_set)
            axis.plot([row[vary] for row in own], [100 * row[test_set] for row in own], ".", color=colour, markersize=4)
        axis.set(title=title, xscale="log" if log else "linear", xlabel=xlabel)
        axis.set_xticks(list(points), [f"{value:g}" for value in points])
        axis.minorticks_off()
    axes[0].set_ylabel("MaskTune: accuracy, %")
    axes[0].legend()
    return figure


def runs(rows: Sequence[Row], vary: str, titles: dict[str, str]) -> Figure:
    """Every run on the malicious set as a dot, for each value of what is varied; a bar marks the mean."""
    figure, (axes,) = plt.subplots(1, len(titles), figsize=(4 * len(titles), 3.4), sharey=True, squeeze=False)
    values = list(dict.fromkeys(row[vary] for row in rows))
    for axis, (setting, title) in zip(axes, titles.items(), strict=True):
        for x, value in enumerate(values):
            own = [row for row in rows if row["setting"] == setting and row[vary] == value]
            axis.plot([x + 0.08 * (row["seed"] - 2) for row in own], [100 * row["malicious"] for row in own], ".",
                      color=COLOURS["MaskTune"], markersize=5)
            axis.plot([x - 0.3, x + 0.3], [100 * summarize([row["malicious"] for row in own]).mean] * 2, color="0.3")
        axis.set(title=title, xticks=range(len(values)), xticklabels=values)
    axes[0].set_ylabel("malicious: accuracy, %")
    return figure


def risk_curves(rows: Sequence[Row], title: str) -> Figure:
    """Error among the answers against coverage, one line a method: mean over seeds, and a band of one std."""
    figure, axis = plt.subplots(figsize=(7, 4))
    colours = [COLOURS["ERM"], COLOURS["RandMask"], COLOURS["MaskTune"], "#009e73"]
    coverages = [100 * (i + 1) / len(rows[0]["risks"]) for i in range(len(rows[0]["risks"]))]
    for method, colour in zip(dict.fromkeys(row["method"] for row in rows), colours, strict=True):
        points = list(zip(*(row["risks"] for row in rows if row["method"] == method), strict=True))
        seeds = [summarize([100 * risk for risk in point]) for point in points]
        axis.plot(coverages, [one.mean for one in seeds], color=colour, label=method)
        if seeds[0].n > 1:
            axis.fill_between(coverages, [one.mean - one.std for one in seeds], [one.mean + one.std for one in seeds],
                              color=colour, alpha=0.2, linewidth=0)
    axis.set(title=title, xlabel="coverage, % of the test images", ylabel="error among the answers, %")
    axis.legend(loc="upper left")
    return figure


def _show(axis: Axes, picture: Tensor, style: dict, title: str = ""):
    axis.grid(False)
    axis.set(xticks=[], yticks=[], title=title)
    for spine in axis.spines.values():
        spine.set_visible(False)
    picture = picture.detach().cpu().float().numpy()
    return axis.imshow(picture.transpose(1, 2, 0) if picture.ndim == 3 else picture, **style)


def _rows(rows: list[tuple[str, Tensor, dict]]) -> Figure:
    """A grid with one named row per entry and one sample a column."""
    columns = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns, 1.45 * len(rows)), squeeze=False)
    for (name, pictures, style), line in zip(rows, axes, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            _show(axis, picture, style)
        line[0].set_ylabel(name)
    return figure


def _title_predictions(figure: Figure, labels: Tensor, predictions: Tensor) -> None:
    for axis, label, guess in zip(figure.axes, labels, predictions, strict=False):
        axis.set_title(f"{CLASSES[label][7:]} → {CLASSES[guess][7:]}", fontsize=9.5,
                       color="black" if label == guess else WRONG)


def one_of_each_digit(digits: Tensor) -> Tensor:
    """Indices (10,) of the first image of each digit: the same samples before and after."""
    return torch.stack([torch.nonzero(digits == digit)[0, 0] for digit in range(10)])
