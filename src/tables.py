"""The tables of the notebook, as Markdown, from predictions."""

from collections.abc import Sequence
from operator import truediv
from statistics import median

import torch
from torch import Tensor

from src.datasets import GROUPS
from src.metrics import Score, score, summarize

Predictions = dict[str, dict[str, Tensor]]  # {method: {test set: (seeds, N) int64}}
TESTED_GROUPS = (0, 2, 3)  # "0-4, square" is in neither of the paper's test sets


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def scores(predictions: dict[str, Tensor], tests: dict) -> dict[str, list[Score]]:
    """Score predictions {test set: (seeds, N)}: {test set: one score per seed}."""
    return {name: [score(guesses, tests[name].labels, tests[name].groups) for guesses in per_seed]
            for name, per_seed in predictions.items()}


def averages(predictions: dict[str, Predictions], tests: dict) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Average accuracies: {setting title: {method: {test set: one accuracy per seed}}}."""
    return {title: {method: {name: [one.average for one in many] for name, many in scores(sets, tests).items()}
                    for method, sets in methods.items()} for title, methods in predictions.items()}


def results(predictions: dict[str, Predictions], tests: dict) -> str:
    """Accuracy in percent, mean ± std over seeds: both test sets, and the worst of the groups in them."""
    return _table(predictions, tests, ["raw", "malicious", "worst group"])


def results_by_group(predictions: dict[str, Predictions], tests: dict) -> str:
    """Accuracy of each group in percent, mean ± std over seeds."""
    return _table(predictions, tests, [GROUPS[group] for group in TESTED_GROUPS])


def _table(predictions: dict[str, Predictions], tests: dict, columns: list[str]) -> str:
    rows = []
    for title, methods in predictions.items():
        for method, sets in methods.items():
            scored = scores(sets, tests)
            per_group = [{**raw.groups, **malicious.groups}
                         for raw, malicious in zip(scored["raw"], scored["malicious"], strict=True)]
            cells = {"worst group": [min(groups.values()) for groups in per_group]}
            cells |= {name: [one.average for one in many] for name, many in scored.items()}
            cells |= {GROUPS[group]: [groups[group] for groups in per_group] for group in TESTED_GROUPS}
            rows.append([title, method, *(summarize(cells[column]) for column in columns), len(per_group)])
    return markdown(["training set", "method", *columns, "n"], rows)


def by_seed(predictions: dict[str, Predictions], tests: dict, test_set: str) -> str:
    """Accuracy of every single seed on one test set, in percent, not averaged."""
    seen = averages(predictions, tests)
    most = max(len(sets[test_set]) for methods in seen.values() for sets in methods.values())
    return markdown(["training set", "method", *(f"seed {seed}" for seed in range(most))], [
        [title, method, *(f"{100 * value:.2f}" for value in sets[test_set]), *[""] * (most - len(sets[test_set]))]
        for title, methods in seen.items() for method, sets in methods.items()])


def compare(rows: Sequence[tuple[str, str, float, Sequence[float]]]) -> str:
    """Others' numbers beside ours: (what, source, theirs in percent, ours as one accuracy in [0, 1] per seed)."""
    return markdown(["", "source", "theirs, %", "ours, %", "difference", "n"], [
        [what, source, f"{theirs:.2f}", summarize(ours), f"{100 * summarize(ours).mean - theirs:+.1f}", len(ours)]
        for what, source, theirs, ours in rows])


def groups(named: dict[str, Tensor]) -> str:
    """How many images each group has: {data set: groups (N,)}."""
    return markdown(["", *GROUPS, "all"], [
        [name, *(f"{int((group == i).sum()):,}" for i in range(len(GROUPS))), f"{len(group):,}"]
        for name, group in named.items()])


def accuracy_by_digit(predictions: Tensor, labels: Tensor, digits: Tensor) -> Tensor:
    """(seeds, N) predictions -> (seeds, 10) accuracies in [0, 1]."""
    correct = (predictions == labels).double()
    return torch.stack([correct[:, digits == digit].mean(1) for digit in range(10)], dim=1)


def masks(histories: dict[str, dict[str, list[dict[str, list[float]]]]]) -> str:
    """What the masks hit, in percent, mean ± std over seeds: {setting title: {method: fine-tune histories}}."""
    facts = {"hidden": "pixels hidden", "squares_covered": "squares' pixels hidden",
             "erm_accuracy_on_masked": "ERM's accuracy on the masked training images"}
    return markdown(["training set", "masks of", *facts.values(), "n"], [
        [title, method, *(summarize([history[fact][0] for history in seeds]) for fact in facts), len(seeds)]
        for title, methods in histories.items() for method, seeds in methods.items()])


def finetune_lr(lrs: Sequence[float], accuracies: dict[str, dict[str, Tensor]]) -> str:
    """Accuracy after the fine-tune at each LR, in percent: {setting title: {test set: (seeds, LRs) in [0, 1]}}."""
    return markdown(["training set", "test set", *(f"LR {lr:g}" for lr in lrs), "n"], [
        [title, name, *(summarize(column.tolist()) for column in values.T), len(values)]
        for title, sets in accuracies.items() for name, values in sets.items()])


def orders(rows: Sequence[dict]) -> str:
    """The order study: accuracy on malicious in percent, mean ± std over orders and the lowest, by seed and masks."""
    cells = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed]
        found, whole = ([row["malicious"] for row in mine if row["squares"] == squares]
                        for squares in ("as found", "whole"))
        cells.append([seed, f"{mine[0]['partly_visible']:,}", summarize(found), f"{100 * min(found):.1f}",
                      summarize(whole), f"{100 * min(whole):.1f}", len(found)])
    return markdown(["seed", "squares on 0-4 with a visible rest", "masks as found", "lowest", "squares hidden whole",
                     "lowest", "orders"], cells)


def benchmark(result: dict) -> str:
    """The speed benchmark: medians in seconds, images per second, and what shows that the results agree."""
    rows = []
    for task in result["tasks"]:
        usual, ours = (median(task["seconds"][side]) for side in ("usual", "ours"))
        values = task["values"]
        rows.append([task["task"], f"{task['images']:,}", f"{usual:.2f}", f"{ours:.2f}",
                     f"{median(map(truediv, *task['seconds'].values())):.1f}", f"{task['images'] / ours:,.0f}",
                     f"{task['check']}: {values['usual']:.4f}, {values['ours']:.4f}"])
    return markdown(["task", "images", "usual, s", "ours, s", "times faster", "ours, images/s", "usual, ours"], rows)


def scale(result: dict) -> str:
    """Time and memory against the number and the size of images: the constants should stay the same down the rows."""
    return markdown(["model", "images", "side", "masks, ms/image", "epoch, ms/image", "masks, ns/pixel",
                     "epoch, ns/pixel", "images, MB", "more than the warm-up, MB"], [
        [row["model"], f"{row['images']:,}", row["side"], f"{1e3 * row['masks_s'] / row['images']:.2f}",
         f"{1e3 * row['epoch_s'] / row['images']:.2f}",
         *(f"{1e9 * row[key] / row['images'] / row['side'] ** 2:,.0f}" for key in ("masks_s", "epoch_s")),
         f"{row['images_mb']:,.0f}", f"{row['peak_mb']:,.0f}"] for row in result["rows"]])


def expectations(predictions: dict[str, Predictions], tests: dict, expected: dict[str, str]) -> str:
    """What an experiment promised beside what was observed, in percent: {setting title: promise}."""
    seen = averages(predictions, tests)
    return markdown(["training set", "expected", "observed: ERM raw", "ERM malicious", "MaskTune raw",
                     "MaskTune malicious"], [
        [title, promise, *(summarize(seen[title][method][name]) for method in ("ERM", "MaskTune")
                           for name in ("raw", "malicious"))] for title, promise in expected.items()])


def photographs(measured: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Benchmarks of photographs in percent, mean ± std over seeds: {benchmark: {method: {measure: one per seed}}}."""
    blocks = []
    for title, methods in measured.items():
        names = list(next(iter(methods.values())))
        blocks.append(markdown(["benchmark", "method", *names, "n"], [
            [title, method, *(summarize(values[name]) for name in names), len(values[names[0]])]
            for method, values in methods.items()]))
    return "\n\n".join(blocks)


def study(rows: Sequence[dict], vary: str, named: dict[str, str]) -> str:
    """A study's rows, in percent, mean ± std over seeds: one line for each setting and each value of what is varied.

    "lowest malicious": of the seeds.

    vary: the key whose values are the variations; named: {setting name: title}.
    """
    columns = {"erm_raw": "ERM raw", "erm_malicious": "ERM malicious", "hidden": "pixels hidden", "squares_covered":
               "squares' pixels hidden", "raw": "raw", "malicious": "malicious", "worst": "worst group"}
    columns = {key: title for key, title in columns.items() if any(key in row for row in rows)}
    cells = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for value in dict.fromkeys(row[vary] for row in rows):
            seeds = [row for row in rows if row["setting"] == setting and row[vary] == value]
            if not seeds:  # not every variation is possible on every setting
                continue
            cells.append([named[setting], value, *(summarize([row[key] for row in seeds]) if key in seeds[0] else ""
                                                   for key in columns),
                          f"{100 * min(row['malicious'] for row in seeds):.1f}", len(seeds)])
    return markdown(["training set", vary, *columns.values(), "lowest malicious", "n"], cells)


def sweep(rows: Sequence[dict], vary: str, named: dict[str, str]) -> dict[str, dict[str, Tensor]]:
    """The same for a figure: {setting title: {test set: (seeds, values)}}."""
    return {named[setting]: {test_set: torch.tensor([[row[test_set] for row in rows
                                                      if row["setting"] == setting and row["seed"] == seed]
                                                     for seed in dict.fromkeys(row["seed"] for row in rows)])
                             for test_set in ("raw", "malicious")}
            for setting in dict.fromkeys(row["setting"] for row in rows)}


def each_iteration(rows: Sequence[dict]) -> list[dict]:
    """The iteration study's rows, which hold lists, as one row an iteration: "1", "2", "2, accumulated" and so on."""
    flat = []
    for row in rows:
        for i in range(int(row["accumulate"]), len(row["raw"])):  # the first is the same for both
            values = {key: row[key][i] for key in ("hidden", "raw", "malicious", "worst")}
            flat.append({**row, **values, "iteration": f"{i + 1}{', accumulated' if row['accumulate'] else ''}"})
    return flat


def selective(rows: Sequence[dict], coverages: Sequence[float], reported: dict[str, dict[float, float]]) -> str:
    """Selective classification: the error among the answers in percent, and in brackets the coverage that came of it.

    rows: one for each method and seed; reported: {whose: {coverage: error}}, figures of others set below.
    """
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        seeds = [row for row in rows if row["method"] == method]
        cells = [f"{summarize([row['error'][i] for row in seeds]):.2f} "
                 f"({100 * summarize([row['coverage'][i] for row in seeds]).mean:.1f})" for i in range(len(coverages))]
        lines.append([method, *cells, f"{summarize([row['aurc'] for row in seeds]):.2f}", len(seeds)])
    for whose, errors in reported.items():
        lines.append([whose, *(f"{100 * errors[coverage]:.2f}" if coverage in errors else "" for coverage in coverages),
                      "", ""])
    return markdown(["score of", *(f"error at {coverage:.0%}" for coverage in coverages), "AURC × 100", "n"], lines)


def selective_lrs(rows: Sequence[dict]) -> str:
    """The LR study of selective classification, mean ± std over seeds: on what the LR is chosen, and on the tests."""
    columns = {"error_val": "validation: error of MaskTune alone", "aurc_val": "validation: AURC × 100 with ERM",
               "error_test": "test: error of MaskTune alone", "aurc_test": "test: AURC × 100 with ERM"}
    lines = []
    for lr in dict.fromkeys(row["lr"] for row in rows):
        seeds = [row for row in rows if row["lr"] == lr]
        lines.append([lr, *(f"{summarize([row[key] for row in seeds]):.2f}" for key in columns), len(seeds)])
    return markdown(["LR", *columns.values(), "n"], lines)
