"""What a result depends on. A study is measured once, row by row, into a small JSON file, and loaded from there.

Each starts from the ERM weights of finished runs: masks of one kind or another, then one epoch, then the test sets. A
row's accuracies are in [0, 1]: `raw`, `malicious`, and `worst` of the groups in both.
"""

import copy
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.datasets import SQUARE
from src.experiments import Run, load_data, new_model, new_optimizer, predict, start_finetune
from src.files import write_whole
from src.masks import Masks
from src.masktune import find_masks, hottest, masktune_epoch
from src.metrics import score
from src.recipes import Setting
from src.saliency import resized, unit_range, xgradcam
from src.seeding import generator
from src.state import State
from src.training import best_device, environment, infer, pixels, train_epoch

RESULTS = Path("results")
ORDERS = 5  # of the fine-tune's samples
THRESHOLDS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # k in m + k s
CAMS = ("XGradCAM", "GradCAM", "GradCAMPlusPlus", "LayerCAM", "EigenCAM", "random")  # grad-cam's classes, and chance
ITERATIONS = 3  # official code: 1 to 3
RATIOS = (0.0, 0.001, 0.01, 0.05, 0.2)  # of conflicting images
RATIO_EPOCHS = 10
DFR_DRAWS = 10  # of balanced subsets, averaged (Kirichenko et al. 2023)


def measured(path: Path, conditions: Iterable[dict], measure: Callable[[dict], dict]) -> list[dict]:
    """Return one row for each condition: from the file where it is there, else measured now and added to the file.

    A row is the condition, what `measure` returns for it, and what produced it. An interrupted study goes on with the
    first row that is missing.
    """
    rows, wanted = saved(path), []
    for condition in conditions:
        row = matching(rows, condition)
        if row is None:
            row = {**condition, **measure(condition), "made_with": environment()}
            rows.append(row)
            write_whole(path, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())
        wanted.append(row)
    return wanted


def saved(path: Path) -> list[dict]:
    """The rows that a file of results has; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def matching(rows: Iterable[dict], condition: dict) -> dict | None:
    """The row of a condition; None if it is not measured yet."""
    return next((row for row in rows if condition.items() <= row.items()), None)


def study(name: str, runs: list[Run], variations: Iterable[dict], vary: Callable[[Run, dict], dict]) -> list[dict]:
    """Measure every variation on every run; the file is `results/<name>.json`."""
    variations = list(variations)
    of = {(run.setting.name, run.seed): run for run in runs}
    return measured(RESULTS / f"{name}.json", (
        {"setting": run.setting.name, "seed": run.seed, "erm": run.erm.digest()[:16], **variation}
        for run in runs for variation in variations),
        lambda condition: vary(of[condition["setting"], condition["seed"]], condition))


def threshold_study(runs: list[Run], tests: dict) -> list[dict]:
    """The fine-tune with masks at other thresholds k."""
    def vary(run: Run, condition: dict) -> dict:
        return _finetuned(run, tests, find_masks(run.erm.model, _inputs(run)[0], k=condition["k"]))

    return study("threshold", runs, ({"k": k} for k in THRESHOLDS), vary)


def cam_study(runs: list[Run], tests: dict) -> list[dict]:
    """The fine-tune with masks of other heat maps, all at k = 2, and with chance in their place.

    "label": XGradCAM of the label instead of the predicted class, as in the paper's formula. "random": uniform noise of
    the saliency layer's size instead of a CAM, resized and cut off as every other map.
    """
    def vary(run: Run, condition: dict) -> dict:
        return _finetuned(run, tests, _masks_of(condition["cam"], run))

    return study("cam", runs, ({"cam": cam} for cam in (*CAMS, "label")), vary)


def batchnorm_study(runs: list[Run], tests: dict) -> list[dict]:
    """The fine-tune with BatchNorm's statistics moving, as in train mode, or frozen at ERM's."""
    def vary(run: Run, condition: dict) -> dict:
        return _finetuned(run, tests, _found(run), frozen=condition["batchnorm"] == "frozen")

    return study("batchnorm", runs, ({"batchnorm": kind} for kind in ("moving", "frozen")), vary)


def iteration_study(runs: list[Run], tests: dict) -> list[dict]:
    """Up to three iterations of masks and an epoch; hidden pixels accumulate or not. One list entry an iteration."""
    def vary(run: Run, condition: dict) -> dict:
        images, labels, _, _ = _inputs(run)
        state, seen = start_finetune(run.setting.erm, run.erm), {}
        for _ in range(ITERATIONS):
            masktune_epoch(state, images, labels, lr=run.setting.finetune.lr, seed=run.seed,
                           batch_size=run.setting.erm.batch_size, accumulate=condition["accumulate"])
            state.finish_epoch()
            for name, value in {"hidden": state.masks.share(), **_accuracies(state, tests)}.items():
                seen.setdefault(name, []).append(value)
        return seen

    return study("iterations", runs, ({"accumulate": accumulate} for accumulate in (False, True)), vary)


def reference_study(runs: list[Run], tests: dict) -> list[dict]:
    """What one epoch of plain further training does, and what knowing the groups would buy.

    "plain": the fine-tune without masks, the lower reference. "DFR": the last layer fitted anew on training images with
    the groups equally large (Kirichenko et al. 2023), the upper one; it needs images of every group, so a setting
    without conflicting images has no such row.
    """
    def vary(run: Run, condition: dict) -> dict:
        if condition["training"] == "plain":
            return _finetuned(run, tests, None)
        state = start_finetune(run.setting.erm, run.erm)
        _refit_last_layer(state.model, *_inputs(run)[:2], _inputs(run)[3], run.seed)
        return _accuracies(state, tests)

    with_groups = [run for run in runs if run.setting.erm.class_mix_ratio > 0]
    return (study("reference", runs, [{"training": "plain"}], vary)
            + study("reference", with_groups, [{"training": "DFR"}], vary))


def ratio_study(setting: Setting, tests: dict) -> list[dict]:
    """ERM and MaskTune with other shares of conflicting images; ERM for 10 epochs at its first LR, to be affordable.

    `erm_raw` and so on are ERM's accuracies, the plain names MaskTune's.
    """
    def measure(condition: dict) -> dict:
        erm = replace(setting.erm, class_mix_ratio=condition["ratio"])
        data = load_data(erm, condition["seed"])
        images, labels = data.images.to(best_device()), data.labels.to(best_device())
        model = new_model(condition["seed"], erm.model)
        state = State(model, new_optimizer(model, erm))
        options = dict(lr=erm.lr, batch_size=erm.batch_size, seed=condition["seed"])
        for _ in tqdm(range(condition["epochs"]), desc=f"{condition}", leave=False, position=0):
            train_epoch(state, images, labels, **options)
            state.finish_epoch()
        before = {f"erm_{name}": value for name, value in _accuracies(state, tests).items()}
        masktune_epoch(state, images, labels, **options | {"lr": setting.finetune.lr})
        return {**before, "hidden": state.masks.share(), **_accuracies(state, tests)}

    return measured(RESULTS / "ratio.json", (
        {"setting": setting.name, "ratio": ratio, "seed": seed, "epochs": RATIO_EPOCHS}
        for ratio in RATIOS for seed in setting.seeds), measure)


def order_study(runs: list[Run], tests: dict) -> list[dict]:
    """Repeat the fine-tune of each run, all of one setting, in other orders of its samples: same weights, same masks.

    Order 0 is the published run's. Each order runs twice: with the masks "as found", and with every square of class 0
    hidden "whole". The latter needs to know the squares: it is a diagnosis, not a method. `partly_visible` counts the
    squares of class 0 of which some pixel stays visible.
    """
    by_seed = {run.seed: run for run in runs}

    def measure(condition: dict) -> dict:
        run = by_seed[condition["seed"]]
        _, labels, squares, _ = _inputs(run)
        marked = squares & (labels == 0)
        masks = _found(run)[:]
        visible = int((~masks[marked, :SQUARE, :SQUARE]).any(2).any(1).sum())
        if condition["squares"] == "whole":
            masks[marked, :SQUARE, :SQUARE] = True
        seen = _finetuned(run, tests, masks, order=condition["order"])
        return {"partly_visible": visible, "raw": seen["raw"], "malicious": seen["malicious"]}

    return measured(RESULTS / f"{runs[0].setting.name}-order.json", (
        {"seed": run.seed, "squares": squares, "order": order, "erm": run.erm.digest()[:16]}
        for run in runs for squares in ("as found", "whole") for order in range(ORDERS)), measure)


def _inputs(run: Run) -> tuple[Tensor, ...]:
    return _training_data(run.setting, run.seed)


@lru_cache(maxsize=1)
def _training_data(setting: Setting, seed: int) -> tuple[Tensor, ...]:
    """Images, labels, squares and groups, on the device; of the setting and seed at hand, for there are many."""
    data = load_data(setting.erm, seed)
    return tuple(tensor.to(best_device()) for tensor in (data.images, data.labels, data.squares, data.groups))


@lru_cache(maxsize=1)
def _found(run: Run) -> Masks:
    """The masks of MaskTune as it is, of the run at hand."""
    return find_masks(run.erm.model, _inputs(run)[0])


def _accuracies(state: State, tests: dict) -> dict[str, float]:
    scored = {name: score(guesses[0], tests[name].labels, tests[name].groups)
              for name, guesses in predict([state], tests).items()}
    return {**{name: one.average for name, one in scored.items()}, "worst": min(one.worst for one in scored.values())}


def _finetuned(run: Run, tests: dict, masks: Masks | Tensor | None, frozen: bool = False, order: int = 0) -> dict:
    """One epoch from the run's ERM, and what came of it; `order` 0 of the samples is the published run's."""
    images, labels, squares, _ = _inputs(run)
    state = start_finetune(run.setting.erm, run.erm)
    for part in state.model.modules() if frozen else ():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval().train = lambda mode=True, part=part: part  # stays in eval mode, whatever the model is put into
    state.epoch += order  # the order of the samples follows the epoch's number
    seen = {}
    try:
        train_epoch(state, images, labels, masks=masks, lr=run.setting.finetune.lr, seed=run.seed,
                    batch_size=run.setting.erm.batch_size)
    except FloatingPointError:  # here a finding: such a model says "0-4" to everything
        seen["diverged"] = True
    seen |= _accuracies(state, tests)
    if isinstance(masks, Masks):
        marked = squares & (labels == 0)
        seen |= {"hidden": masks.share(), "squares_covered": masks.mean(marked)[:SQUARE, :SQUARE].mean().item()}
    return seen


def _masks_of(cam: str, run: Run, batch_size: int = 500) -> Masks:
    """The masks of the training images by another CAM; see `cam_study`."""
    images, labels, _, _ = _inputs(run)
    if cam == "XGradCAM":
        return _found(run)
    import pytorch_grad_cam  # here: no training needs it, and it takes seconds

    model = copy.deepcopy(run.erm.model).eval()  # the library's classes leave traces
    draw = generator(run.seed, "random maps")

    def heat(batch: slice) -> Tensor:
        if cam == "random":
            coarse = torch.rand(len(labels[batch]), 8, 8, generator=draw).to(images.device)
            return unit_range(resized(coarse, *images.shape[2:]))
        if cam == "label":
            return xgradcam(model, pixels(images[batch]), classes=labels[batch])
        return torch.from_numpy(explain(pixels(images[batch]), targets=None)).to(images.device)

    masks = Masks((len(images), *images.shape[2:]), device=images.device)
    with ExitStack() as stack:
        if cam not in ("random", "label"):
            explain = stack.enter_context(getattr(pytorch_grad_cam, cam)(model, [model.saliency_layer]))
        for start in tqdm(range(0, len(images), batch_size), desc=cam, leave=False, position=0):
            batch = slice(start, start + batch_size)
            masks[batch] = hottest(heat(batch))
    return masks


def _refit_last_layer(model: nn.Module, images: Tensor, labels: Tensor, groups: Tensor, seed: int) -> None:
    """Deep feature reweighting (Kirichenko et al. 2023) of SmallCNN, in place: the mean of ten logistic regressions.

    Each is fitted to as many images of every group as the smallest has, with the L2 penalty 1 (the authors tune an L1).
    """
    from sklearn.linear_model import LogisticRegression

    body = copy.deepcopy(model)
    body.linear[-1] = nn.Identity()
    members = [torch.nonzero(groups == group).flatten() for group in range(4)]
    size, draw = min(map(len, members)), generator(seed, "dfr")
    lines = []
    for _ in range(DFR_DRAWS):
        chosen = torch.cat([group[torch.randperm(len(group), generator=draw)[:size].to(group.device)]
                            for group in members])
        fit = LogisticRegression(max_iter=1000).fit(infer(body, images[chosen]).cpu(), labels[chosen].cpu())
        lines.append(torch.from_numpy(numpy.append(fit.coef_[0], fit.intercept_)))
    *weight, bias = torch.stack(lines).mean(0)
    with torch.no_grad():
        model.linear[-1].weight.copy_(torch.stack([torch.zeros(len(weight)), torch.stack(weight)]))
        model.linear[-1].bias.copy_(torch.stack([torch.tensor(0.0), bias]))
