"""The figures: each function returns one. Heat maps share one colour scale, masks are white where pixels are hidden."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .tables import COLUMNS, KINDS, NAMES, PERFECT, TRAINING_SETS

plt.style.use(Path(__file__).with_name("style.mplstyle"))

_CYCLE = plt.rcParams["axes.prop_cycle"].by_key()["color"]  # of the style file: one colour means one thing everywhere
COLOURS = dict(zip((*NAMES.values(), *TRAINING_SETS.values(), PERFECT, *KINDS), _CYCLE, strict=True))
WRONG = "#d62728"
HEAT = dict(cmap="inferno", vmin=0, vmax=1)
MASK = dict(cmap="gray", vmin=0, vmax=1)
WIDTH = 9  # inches, of the widest figures


def animation(image: Tensor, heat: Tensor, mask: Tensor, lie: Tensor, maps: dict[int, Tensor],
              accuracies: dict[int, float]) -> dict[str, str]:
    """The method in motion, as a GIF, and its last picture, as a PNG.

    A training image (3, H, W), its heat map (H, W) and mask (H, W) bool; a malicious image, its heat map by step of the
    one epoch, and the accuracy on such images, in [0, 1]. Returned as a display takes them: base64 by MIME type.
    """
    figure, axes = plt.subplots(1, 6, figsize=(WIDTH, 2), width_ratios=(1, 1, 1, 1, 1, 1.7))
    still = [(image, {}, "a training image"), (heat, HEAT, "where ERM looks"), (mask, MASK, "what is hidden"),
             (lie, {}, "a malicious image")]
    for axis, (picture, style, title) in zip(axes, still, strict=False):
        _show(axis, picture, style, title)
    moving, frames = _show(axes[4], maps[0], HEAT), []
    line, = axes[5].plot([], [], color=COLOURS["MaskTune"], linewidth=2.5)
    axes[5].set(xlim=(0, max(maps)), ylim=(0, 100), xlabel="steps of the one epoch", yticks=(0, 50, 100))
    for step, picture in maps.items():
        moving.set_data(picture.cpu())
        axes[4].set_title(f"heat after step {step}")
        line.set_data(list(zip(*((at, 100 * right) for at, right in accuracies.items() if at <= step), strict=True)))
        axes[5].set_title(f"malicious: {accuracies[step]:.0%} right")
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
    gif, png = io.BytesIO(), io.BytesIO()
    palette = frames[-1].quantize(64)  # one for all: what stays as it was is not stored again
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(gif, "GIF", save_all=True, append_images=rest, duration=[80] * len(rest) + [2500], loop=0)  # ms
    frames[-1].save(png, "PNG")
    return {f"image/{kind}": base64.b64encode(file.getvalue()).decode() for kind, file in (("gif", gif), ("png", png))}


def strip(rows: dict[str, Tensor], titles: dict[str, Sequence[object]] | None = None) -> Figure:
    """Rows of pictures, one sample a column: images (N, 3, H, W), heat maps (N, H, W) in [0, 1] or bool masks.

    titles: of the pictures of a row. One of the form "label → prediction" is red where the two differ.
    """
    columns = len(next(iter(rows.values())))
    side = min(1.2, WIDTH / columns)
    figure, axes = plt.subplots(len(rows), columns, figsize=(side * columns, 1.12 * side * len(rows)), squeeze=False)
    for (name, pictures), line in zip(rows.items(), axes, strict=True):
        style = {} if pictures.dim() == 4 else MASK if pictures.dtype == torch.bool else HEAT
        for axis, picture, title in zip(line, pictures, (titles or {}).get(name, [""] * columns), strict=True):
            said = str(title).split("→")
            _show(axis, picture, style)
            axis.set_title(title, color="black" if said[0].strip() == said[-1].strip() else WRONG)
        line[0].set_ylabel(name)
    return figure


def jpeg(figure: Figure) -> bytes:
    """The JPEG of a figure with photographs, which as PNG would be large; it is closed, so it is not shown twice."""
    plt.close(figure)
    figure.savefig(file := io.BytesIO(), format="jpeg", pil_kwargs={"quality": 85})
    return file.getvalue()


def arrows(*classes: Tensor, names: Sequence[str] = ("0-4", "5-9"), between: str = " → ") -> list[str]:
    """Titles "label → prediction" of classes (N,) each."""
    return [between.join(names[one] for one in own) for own in zip(*(part.tolist() for part in classes), strict=True)]


def explained(images: Tensor, heat: Tensor, masks: Tensor, masked: Tensor | None = None) -> dict[str, Tensor]:
    """The rows of a strip: images (N, 3, H, W), heat maps and masks (N, H, W), what these leave or is trained on."""
    return {"image": images, "heat map": heat, "mask\n(white: hidden)": masks,
            **({"masked": images.masked_fill(masks[:, None], 0)} if masked is None else {"trained on": masked})}


def outline(figure: Figure, objects: Tensor) -> Figure:
    """Draw the outlines of objects (N, H, W) bool into all rows of a strip of N columns."""
    for i, axis in enumerate(axis for axis in figure.axes if axis.images):
        axis.contour(objects[i % len(objects)].float().cpu().numpy(), levels=[0.5], colors="#00e5ff", linewidths=0.9)
    return figure


def forgetting(accuracies: dict[str, dict[int, float]], heat: dict[int, Tensor] | None = None) -> Figure:
    """Accuracy on malicious images, in [0, 1], by method and step of the one epoch; step 0 is ERM.

    heat: the heat map (H, W) of one image after some of the steps, shown above them.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4 if heat else 2.8))
    for name, seen in accuracies.items():
        axis.plot(seen.keys(), [100 * value for value in seen.values()], ".-", color=COLOURS[name], label=name)
    erm = 100 * next(iter(accuracies.values()))[0]
    axis.plot(0, erm, "o", color=COLOURS["ERM"], markersize=7)
    axis.annotate("ERM", (0, erm), (-4, 7), textcoords="offset points", ha="right")
    axis.set(xlabel="steps (compressed from 40 on)", ylabel="malicious, %", ylim=(-2, 104), yticks=range(0, 101, 25))
    axis.set_xscale("symlog", linthresh=40, linscale=2)  # most happens in the first steps
    ticks = [0, 5, 10, 20, 30, 40, 100, max(seen)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlim(-2, ticks[-1])
    axis.legend(loc="center right")
    for i, (step, picture) in enumerate((heat or {}).items()):
        inset = axis.inset_axes([0.02 + 0.25 * i, 1.04, 0.2, 0.36])
        _show(inset, picture, HEAT, f"after step {step}" if step else "ERM")
    return figure


def mean_masks(shares: Tensor, classes: Sequence[str]) -> Figure:
    """How often each pixel is hidden, class by class: shares (classes, H, W) in [0, 1]."""
    figure, axes = _grid(len(classes), 5, WIDTH / 5, 1.7)
    for axis, often, name in zip(axes, shares, classes, strict=True):
        shown = _show(axis, often, dict(cmap="viridis", vmin=0, vmax=1), fill(name, 22))
    figure.colorbar(shown, ax=axes, label="share of images\nthat hide the pixel")
    return figure


def panels(panels: dict[str, tuple[pandas.DataFrame, str]], names: dict[str, str], series: str = "setting",
           value: str = "worst", lines: dict[str, float] | None = None, chosen: dict | None = None) -> Figure:
    """What an accuracy depends on, a small panel for each question: dots are runs, a line or a tick their means.

    panels: {title: (rows, the column that varies)}; names: of the values of the column `series`, as in `COLOURS`;
    value: the column of the accuracy; lines: references across all panels, in [0, 1]; chosen: the value of what varies
    that is used elsewhere, by column, set in bold.
    """
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    figure, axes = _grid(len(panels), columns, WIDTH / columns, 2.5, sharey=True)
    for axis, (title, (answers, vary)) in zip(axes, panels.items(), strict=True):
        ticks = answers[vary].unique().tolist()
        ticks = ticks if isinstance(ticks[0], str) else sorted(ticks)
        shown = answers[series].unique().tolist()
        for i, name in enumerate(shown):
            own, aside = answers[answers[series] == name], 0 if series == vary else 0.1 * (i - (len(shown) - 1) / 2)
            x, percent = own[vary].map(ticks.index) + aside, 100 * own[value]
            means = percent.groupby(x, sort=False).mean()
            spread = 0.02 * (own.groupby(vary).cumcount() % 5 - 2)  # of dots that would hide each other
            joined = dict(linestyle="", marker="_", markersize=13) if isinstance(ticks[0], str) else {}  # no order
            axis.plot(means.index, means, color=COLOURS[names[name]], label=names[name], **joined)
            axis.plot(x + spread, percent, "o", color=COLOURS[names[name]], markersize=3.5)
        for style, (name, level) in zip(("--", ":", "-."), (lines or {}).items(), strict=False):
            axis.axhline(100 * level, color="0.35", linewidth=1.1, linestyle=style)
            if axis in axes[columns - 1::columns]:  # beside the last panel of a row: within, it would hide dots
                axis.annotate(f" {name}", (1, 100 * level), xycoords=("axes fraction", "data"), va="center")
        axis.set(title=title, ylim=(-4, 104), yticks=range(0, 101, 25), xlim=(-0.4, len(ticks) - 0.6))
        turned = dict(rotation=30, ha="right") if max(len(str(one)) for one in ticks) > 8 else {}
        names_of = [str(NAMES.get(one, one)).replace("PlusPlus", "++") for one in ticks]
        axis.set_xticks(range(len(ticks)), names_of, **turned)
        for tick, label in zip(ticks, axis.get_xticklabels(), strict=True):
            label.set_fontweight("bold" if tick == (chosen or {}).get(vary) else "normal")
    for axis in axes[::columns]:
        axis.set_ylabel(f"{COLUMNS.get(value, value)}, %")
    handles = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def risk_curves(rows: pandas.DataFrame, title: str) -> Figure:
    """Error among the answers against coverage, one line a method: mean over seeds, and a band of one std."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4))
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
