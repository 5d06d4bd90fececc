"""The tables of the notebook, as Markdown, from rows of results."""

from collections.abc import Sequence
from operator import truediv
from statistics import mean, median

import torch
from torch import Tensor

from ..datasets import GROUPS
from ..metrics import Summary, spread, summarize
from ..rows import Row, pivot

NAMES = {"erm": "ERM", "randmask": "RandMask", "masktune": "MaskTune", "plain": "plain epoch", "dfr": "DFR",
         "background hidden": "oracle: background hidden", "bird hidden": "oracle: bird hidden"}
TRAINING_SETS = ("1 % conflicting, random", "1 % conflicting, by digit", "none conflicting")  # of MNIST
COLUMNS = {"erm_raw": "ERM raw", "erm_malicious": "ERM malicious", "raw": "raw", "malicious": "malicious",
           "worst": "worst group", "hidden": "pixels hidden", "shortcut_hidden": "shortcut hidden"}
TESTED_GROUPS = tuple(GROUPS[group] for group in (0, 2, 3))  # "0-4, square" is in neither of the paper's test sets
OTHERS = (  # training set, method, test set, source, percent. The paper's figure is as re-implementers quote it; the
    # prior notebook's are those of its published weights, one seed each
    ("digit", "erm", "malicious", "paper", 18.59), ("digit", "erm", "malicious", "arithmetic", 18.74),
    ("digit", "erm", "raw", "arithmetic", 58.43), ("random", "erm", "raw", "prior notebook", 92.36),
    ("random", "erm", "malicious", "prior notebook", 84.05), ("random", "masktune", "raw", "prior notebook", 94.65),
    ("random", "masktune", "malicious", "prior notebook", 94.67), ("none", "erm", "raw", "prior notebook", 48.61),
    ("none", "erm", "malicious", "prior notebook", 0.00), ("none", "masktune", "raw", "prior notebook", 97.95),
    ("none", "masktune", "malicious", "prior notebook", 97.95))


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def summaries(rows: Sequence[Row], by: tuple[str, ...], columns: Sequence[str]) -> list[tuple[tuple, list[Summary]]]:
    """Mean ± std of some columns over the rows of each group; of a column that a group lacks, nothing."""
    tables = [pivot(rows, by, column) for column in columns]
    groups = dict.fromkeys(tuple(row[key] for key in by) for row in rows)
    return [(group, [summarize(table[group]) if group in table else "" for table in tables]) for group in groups]


def results(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Accuracy in percent, mean ± std over seeds and orders: both test sets, the worst group, and the lowest run."""
    lowest = _lowest(rows, ("setting", "method"))
    return markdown(["training set", "method", "raw", "malicious", "worst group", "lowest malicious", "n"], [
        [titles[setting], NAMES[method], *cells, lowest[setting, method], cells[0].n]
        for (setting, method), cells in summaries(rows, ("setting", "method"), ("raw", "malicious", "worst"))])


def spreads(rows: Sequence[Row], titles: dict[str, str], vary: str = "method") -> str:
    """Where the scatter on the malicious set comes from, in points: seeds (ERM and all) or orders of the one epoch."""
    lowest, cells = _lowest(rows, ("setting", vary)), []
    for (setting, value), accuracies in pivot(rows, ("setting", vary), "malicious").items():
        same = [row for row in rows if row["setting"] == setting and row[vary] == value]
        over_seeds, over_orders = spread(list(pivot(same, ("seed",), "malicious").values()))
        cells.append([titles[setting], NAMES.get(value, value), summarize(accuracies), f"{100 * over_seeds:.1f}",
                      f"{100 * over_orders:.1f}", lowest[setting, value], len(accuracies)])
    return markdown(["training set", vary, "malicious", "std over seeds", "std over orders", "lowest", "n"], cells)


def _lowest(rows: Sequence[Row], by: tuple[str, ...]) -> dict[tuple, str]:
    """The lowest accuracy on the malicious set in each group, and the run that it is of."""
    found = {}
    for row in sorted(rows, key=lambda row: row["malicious"]):
        order = f", order {row['order']}" if row["method"] != "erm" else ""
        found.setdefault(tuple(row[key] for key in by), f"{100 * row['malicious']:.1f} (seed {row['seed']}{order})")
    return found


def results_by_group(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Accuracy of each group in percent, mean ± std over seeds and orders."""
    return markdown(["training set", "method", *TESTED_GROUPS, "n"], [
        [titles[setting], NAMES[method], *cells, cells[0].n]
        for (setting, method), cells in summaries(rows, ("setting", "method"), TESTED_GROUPS)])


def by_seed(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Accuracy of every seed on the malicious set, in percent: mean over orders, not over seeds."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    cells = pivot(rows, ("setting", "method", "seed"), "malicious")
    return markdown(["training set", "method", *(f"seed {seed}" for seed in seeds)], [
        [titles[setting], NAMES[method], *(f"{100 * mean(cells[setting, method, seed]):.2f}" for seed in seeds)]
        for setting, method in dict.fromkeys(key[:2] for key in cells)])


def others(rows: Sequence[Row]) -> str:
    """Our rows of MNIST beside what others have published, in percent."""
    lines = []
    for order, method, test_set, source, theirs in OTHERS:
        ours = [row[test_set] for row in rows if row["setting"] == f"mnist-{order}" and row["method"] == method]
        lines.append([f"{order}: {NAMES[method]}, {test_set}", source, f"{theirs:.2f}", summarize(ours),
                      f"{100 * summarize(ours).mean - theirs:+.1f}", len(ours)])
    return markdown(["", "source", "theirs", "ours", "difference", "n"], lines)


def groups(named: dict[str, Tensor]) -> str:
    """How many images each group has: {data set: groups (N,)}."""
    return markdown(["", *GROUPS, "all"], [
        [name, *(f"{int((group == i).sum()):,}" for i in range(len(GROUPS))), f"{len(group):,}"]
        for name, group in named.items()])


def accuracy_by_digit(predictions: Tensor, labels: Tensor, digits: Tensor) -> Tensor:
    """(seeds, N) predictions -> (seeds, 10) accuracies in [0, 1]."""
    correct = (predictions == labels).double()
    return torch.stack([correct[:, digits == digit].mean(1) for digit in range(10)], dim=1)


def masks(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """What the masks hit, in percent, mean ± std over seeds."""
    facts = {"hidden": "pixels hidden", "shortcut_hidden": "shortcut hidden",
             "erm_on_masked": "ERM's accuracy on the masked training images"}
    rows = [row for row in rows if row["method"] != "erm" and row["order"] == 0]
    return markdown(["training set", "masks of", *facts.values(), "n"], [
        [titles[setting], NAMES[method], *cells, cells[0].n]
        for (setting, method), cells in summaries(rows, ("setting", "method"), tuple(facts))])


def squares(rows: Sequence[Row]) -> str:
    """Accuracy on malicious in percent, mean ± std over orders and the lowest, by seed and masks."""
    cells, visible = pivot(rows, ("seed", "squares"), "malicious"), pivot(rows, ("seed", "squares"), "shortcut_visible")
    return markdown(["seed", "squares of 0-4 with a visible rest", "masks as found", "lowest", "squares hidden whole",
                     "lowest", "orders"], [
        [seed, f"{visible[seed, 'as found'][0]:,}", *(cell for name in ("as found", "whole") for cell in (
            summarize(cells[seed, name]), f"{100 * min(cells[seed, name]):.1f}")), len(cells[seed, "whole"])]
        for seed in dict.fromkeys(row["seed"] for row in rows)])


def study(rows: Sequence[Row], vary: str, titles: dict[str, str]) -> str:
    """A study's rows, in percent, mean ± std over seeds: a line for each setting and each value of what is varied.

    Three seeds that are far apart are listed instead.
    """
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    cells = {column: pivot(rows, ("setting", vary), column) for column in columns}
    keys = dict.fromkeys((row["setting"], row[vary]) for row in rows)
    several = len({setting for setting, _ in keys}) > 1
    return markdown([*(["training set"] if several else []), vary, *(COLUMNS[column] for column in columns)], [
        [*([titles[setting]] if several else []), NAMES.get(value, value),
         *(_shown(cells[column].get((setting, value), ())) for column in columns)] for setting, value in keys])


def _shown(values: Sequence[float]) -> str:
    """Mean ± std in percent; each value where there are few and far between; nothing of none."""
    if not values:
        return ""
    if 1 < len(values) <= 3 and summarize(values).std > 0.1:
        return ", ".join(f"{100 * value:.1f}" for value in values)
    return str(summarize(values))


def iterations(rows: Sequence[Row]) -> list[Row]:
    """The same rows with `iterations` for a line of a table: "1", "2", "2, accumulated" and so on."""
    return [{**row, "iterations": f"{row['iteration']}{', accumulated' if row['accumulate'] else ''}"} for row in rows]


def photos(rows: Sequence[Row]) -> str:
    """Benchmarks of photographs in percent, mean ± std over seeds: a table for each, a column for each method."""
    blocks = []
    for title in dict.fromkeys(row["benchmark"] for row in rows):
        cells = pivot([row for row in rows if row["benchmark"] == title], ("measure", "method"), "value")
        methods = list(dict.fromkeys(method for _, method in cells))
        blocks.append(markdown([title, *methods, "n"], [
            [measure, *(summarize(cells[measure, method]) for method in methods), len(cells[measure, methods[0]])]
            for measure in dict.fromkeys(measure for measure, _ in cells)]))
    return "\n\n".join(blocks)


def candidates(rows: Sequence[Row]) -> str:
    """ERM's candidates on the validation set: average / worst group after each epoch, in percent, means over seeds."""
    def cell(own: list[Row], epoch: int) -> str:
        return " / ".join(f"{100 * mean(row[key][epoch] for row in own):.1f}" for key in ("average", "worst"))

    groups: dict[tuple, list[Row]] = {}
    for one in rows:
        groups.setdefault((one["lr"], one["batch_size"]), []).append(one)
    epochs = range(len(rows[0]["average"]))
    return markdown(["LR, batch", *(f"epoch {epoch + 1}" for epoch in epochs)], [
        [f"{lr:g}, {size}", *(cell(own, epoch) for epoch in epochs)] for (lr, size), own in groups.items()])


def birds(rows: Sequence[Row], groups: Sequence[str]) -> str:
    """The methods on photographs, mean ± std over seeds in percent: averages and the worst group; then every group."""
    wide = [row | dict(zip(groups, row["groups"], strict=True)) for row in rows]
    return "\n\n".join(markdown(["method", *(column.replace("_", " ") for column in columns)], [
        [NAMES.get(method, method), *cells] for (method,), cells in summaries(wide, ("method",), columns)])
        for columns in (("average", "adjusted_average", "worst"), tuple(groups)))


def birds_study(rows: Sequence[Row], vary: str) -> str:
    """A study on photographs, in percent, mean ± std over seeds; seeds that are far apart are listed instead."""
    columns = {"average": "average", "worst": "worst group", "hidden": "pixels hidden",
               "on_bird": "of these on the bird", "untouched": "images untouched"}
    cells = {column: pivot(rows, ("method", vary), column) for column in columns}
    keys = dict.fromkeys((row["method"], row[vary]) for row in rows)
    return markdown(["method", vary.replace("_", " "), *columns.values()], [
        [NAMES.get(method, method), value, *(_shown(cells[column].get((method, value), ())) for column in columns)]
        for method, value in keys])


def hits(rows: Sequence[Row], groups: Sequence[str]) -> str:
    """How much of what is hidden is bird, by group, beside the birds' share of all pixels: mean over seeds, percent."""
    lines = [["all pixels", "", *(f"{100 * share:.1f}" for share in rows[0]["bird_by_group"])]]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        lines.append([f"hidden by {NAMES[method]}", summarize([row["hidden"] for row in own]), *(
            summarize([row["on_bird_by_group"][i] for row in own]) for i in range(len(groups)))])
    return markdown(["on the bird", "hidden", *groups], lines)


def costs(result: dict) -> str:
    """What photographs cost: ms an image (images per second) of training and masks; peak memory beyond the program."""
    return markdown(["model", "side", "precision of training", "training, ms (images/s)", "masks, ms (images/s)",
                     "peak, MB"], [
        [row["model"], row["side"], row["precision"],
         *(f"{row[key]:.1f} ({1000 / row[key]:.0f})" for key in ("train_ms", "masks_ms")),
         f"{row['device_mb'] or row['peak_mb']:,.0f}"] for row in result["rows"]])


def listed(rows: Sequence[Row]) -> str:
    """Rows as they are."""
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


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


def demonstration(rows: Sequence[Row]) -> str:
    """What `masktune` did to a network of one's own, before → after, in percent: each seed, and their mean ± std."""
    rows = [row for row in rows if row["part"] == "test"]
    columns = ("turned", "turned_worst", "plain", "plain_worst")

    def line(name: object, shown: Sequence[Row]) -> list[object]:
        return [name, summarize([row["mark_hidden"] for row in shown]), *(
            f"{summarize([row['before_' + column] for row in shown])} → "
            f"{summarize([row['after_' + column] for row in shown])}" for column in columns)]

    return markdown(["seed", "mark hidden", "turned", "turned, worse class", "plain", "plain, worse class"], [
        *(line(row["seed"], [row]) for row in rows), line(f"mean ± std, n = {len(rows)}", rows)])


def selective(rows: Sequence[Row], coverages: Sequence[float], reported: dict[str, dict[float, float]]) -> str:
    """Selective classification: the error among the answers in percent, and in brackets the coverage that came of it.

    rows: one for each method and seed; reported: {whose: {coverage: error}}, figures of others set below.
    """
    error, coverage, area = (pivot(rows, ("method",), name) for name in ("error", "coverage", "aurc"))
    lines = []
    for (method,), errors in error.items():
        cells = [f"{summarize([seed[i] for seed in errors]):.2f} "
                 f"({100 * mean(seed[i] for seed in coverage[method,]):.1f})" for i in range(len(coverages))]
        lines.append([method, *cells, f"{summarize(area[method,]):.2f}"])
    for whose, errors in reported.items():
        lines.append([whose, *(f"{100 * errors[one]:.2f}" if one in errors else "" for one in coverages), ""])
    return markdown(["score of", *(f"error at {coverage:.0%}" for coverage in coverages), "AURC × 100"], lines)


def selective_lrs(rows: Sequence[Row]) -> str:
    """The LR study of selective classification, mean ± std over seeds: on what the LR is chosen, and on the tests."""
    columns = {"error_val": "validation: error of MaskTune alone", "aurc_val": "validation: AURC × 100 with ERM",
               "error_test": "test: error of MaskTune alone", "aurc_test": "test: AURC × 100 with ERM"}
    return markdown(["LR", *columns.values(), "n"], [
        [lr, *(f"{cell:.2f}" for cell in cells), cells[0].n]
        for (lr,), cells in summaries(rows, ("lr",), tuple(columns))])
