"""What a result depends on. A study is measured once, row by row, into a small JSON file, and loaded from there."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from src.datasets import SQUARE
from src.experiments import Run, load_data, predict, start_finetune
from src.files import write_whole
from src.masktune import find_masks
from src.metrics import score
from src.training import best_device, environment, train_epoch

RESULTS = Path("results")
ORDERS = 5  # of the fine-tune's samples


def measured(path: Path, conditions: Iterable[dict], measure: Callable[[dict], dict]) -> list[dict]:
    """Return one row for each condition: from the file where it is there, else measured now and added to the file.

    A row is the condition, what `measure` returns for it, and what produced it. An interrupted study goes on with the
    first row that is missing.
    """
    rows = json.loads(path.read_text()) if path.exists() else []
    wanted = []
    for condition in conditions:
        row = next((row for row in rows if condition.items() <= row.items()), None)
        if row is None:
            row = {**condition, **measure(condition), "made_with": environment()}
            rows.append(row)
            write_whole(path, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())
        wanted.append(row)
    return wanted


def order_study(runs: list[Run], tests: dict) -> list[dict]:
    """Repeat the fine-tune of each run, all of one setting, in other orders of its samples: same weights, same masks.

    Order 0 is the published run's. Each order runs twice: with the masks "as found", and with every square of class 0
    hidden "whole". The latter needs to know the squares: it is a diagnosis, not a method. Accuracies are in [0, 1];
    `partly_visible` counts the squares of class 0 of which some pixel stays visible.
    """
    setting = runs[0].setting
    by_seed = {run.seed: run for run in runs}
    inputs: dict[int, tuple[Tensor, ...]] = {}  # of the seed at hand; none if every row of it is on file

    def measure(condition: dict) -> dict:
        run = by_seed[condition["seed"]]
        if run.seed not in inputs:
            inputs.clear()
            data = load_data(setting.erm, run.seed)
            images, on_class_0 = data.images.to(best_device()), (data.squares & (data.labels == 0)).to(best_device())
            inputs[run.seed] = images, data.labels.to(best_device()), on_class_0, find_masks(run.erm.model, images)[:]
        images, labels, on_class_0, masks = inputs[run.seed]
        corner = masks[on_class_0, :SQUARE, :SQUARE]
        if condition["squares"] == "whole":
            masks = masks.clone()
            masks[on_class_0, :SQUARE, :SQUARE] = True
        state = start_finetune(setting.erm, run.erm)
        state.epoch += condition["order"]  # the order of the samples follows the epoch's number
        train_epoch(state, images, labels, masks=masks, lr=setting.finetune.lr, batch_size=setting.erm.batch_size,
                    seed=run.seed)
        accuracies = {name: score(guesses[0], tests[name].labels, tests[name].groups).average
                      for name, guesses in predict([state], tests).items()}
        return {"partly_visible": int((~corner).any(2).any(1).sum()), **accuracies}

    return measured(RESULTS / f"{setting.name}-order.json", (
        {"seed": run.seed, "squares": squares, "order": order, "erm": run.erm.digest()[:16]}
        for run in runs for squares in ("as found", "whole") for order in range(ORDERS)), measure)
