"""The tables of the notebook, as DataFrames of text, from rows of results. Accuracies and shares are in percent."""

from collections.abc import Sequence

import pandas

from ..datasets import GROUPS

NAMES = {"erm": "ERM", "randmask": "RandMask", "masktune": "MaskTune", "plain": "plain epoch", "dfr": "DFR",
         "rest hidden": "oracle: background hidden", "known hidden": "oracle: bird hidden"}
TRAINING_SETS = {"mnist-random": "1% conflicting, random", "mnist-digit": "1% conflicting, by digit",
                 "mnist-none": "none conflicting"}
KINDS = tuple(f"{whose}, {shown}" for whose in ("MaskTune", "perfect masks") for shown in ("decoys", "transplants"))
PERFECT = "perfect masks"  # of `named`, in figures
CRITERIA = {"lower": "the lower of as is and swapped", "swapped": "swapped", "as_is": "accuracy as is",
            "covered": "accuracy with what was hot hidden"}
SHORTCUT = ": 0-4, square"  # the group of MNIST whose squares go with the class, as a suffix of what masks hit
STUDIED = ("average", "raw", "malicious", "worst", "hidden", f"known_hidden{SHORTCUT}", "on_known", "untouched")
COLUMNS = {"setting": "training set", "adjusted_average": "adjusted average", "worst": "worst group",
           "hidden": "pixels hidden", f"known_hidden{SHORTCUT}": "shortcut hidden", "on_known": "of these on the bird",
           "untouched": "images untouched", "erm_on_masked": "ERM on the masked training images"}
TESTED_GROUPS = [GROUPS[group] for group in (0, 2, 3)]  # "0-4, square" is in neither of the paper's test sets


def mean_std(values: pandas.Series, digits: int = 1) -> str:
    """Mean ± sample standard deviation (ddof 1) in percent; of one value no deviation, of none nothing."""
    values = 100 * values.dropna()
    if values.empty:
        return ""
    spread = f" ± {values.std():.{digits}f}".replace(" ", "\N{NO-BREAK SPACE}") if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def summary(rows: pandas.DataFrame, by: Sequence[str], columns: Sequence[str], how=mean_std) -> pandas.DataFrame:
    """A line for each group of rows, in the order in which they come; n counts its rows."""
    groups = rows.groupby(list(by), sort=False)
    table = groups[list(columns)].agg(how)
    table["n"] = groups.size()
    digits = {key.replace("mnist", "digits"): f"digits, {title}" for key, title in TRAINING_SETS.items()}
    names = {"setting": TRAINING_SETS | digits, "method": NAMES}
    table = table.reset_index().replace({column: names[column] for column in names if column in by})
    return table.rename(columns=COLUMNS)


def results(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Accuracy, mean ± std over seeds and orders: both test sets, the worst group, and the lowest run."""
    table = summary(rows, ("setting", "method"), ("raw", "malicious", "worst"))
    found = rows.loc[rows.groupby(["setting", "method"], sort=False)["malicious"].idxmin()]
    table.insert(5, "lowest malicious", [
        f"{100 * row.malicious:.1f} (seed {row.seed}{f', order {row.order}' if row.method != 'erm' else ''})"
        for row in found.itertuples()])
    return table


def study(rows: pandas.DataFrame, *vary: str) -> pandas.DataFrame:
    """A study's rows, mean ± std: a line for each setting, method and value of what is varied."""
    by = [column for column in ("setting", "method") if rows[column].nunique() > 1 or column in vary]
    columns = [column for column in STUDIED if column in rows and rows[column].notna().any()]
    return summary(rows, dict.fromkeys([*by, *vary]), columns).drop(columns="n")


def named(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The rows with a column `masks`: whose they are, and what is shown there, if not black."""
    whose = rows["method"].replace({**NAMES, "known hidden": "perfect masks"})
    shown = (", " + rows["holes"]).where(rows["holes"] != "black", "")
    return pandas.concat([rows.drop(columns="masks", errors="ignore"), (whose + shown).rename("masks")], axis=1)


def holes(rows: pandas.DataFrame, across: str, value: str = "malicious") -> pandas.DataFrame:
    """What comes of each kind of masks, mean ± std, a column for each value of what is varied."""
    rows = named(rows)
    table = rows.groupby(["masks", across], sort=False)[value].agg(mean_std).unstack(fill_value="")
    return table.loc[rows["masks"].unique(), rows[across].unique()].rename_axis(columns=None).reset_index()


def ranking(rows: pandas.DataFrame, subject: Sequence[str], target: str) -> pandas.DataFrame:
    """How well what is known without clean images ranks models, and how many points choosing the best by it costs.

    subject: the columns that say whose models are compared with each other; target: the accuracy that is wanted. Rank
    correlations are Spearman's, means over the subjects and their range.
    """
    rows, lines = rows.assign(lower=rows[["as_is", "swapped"]].min(axis=1)), []
    for criterion, name in CRITERIA.items():
        every = [own for _, own in rows.groupby(list(subject))]
        ranks = pandas.Series([own[criterion].rank().corr(own[target].rank()) for own in every])
        lost = pandas.Series([own[target].max() - own.loc[own[criterion].idxmax(), target] for own in every])
        lines.append({"chosen by": name, "rank correlation": ranks.mean(), "lowest": ranks.min(),
                      "points lost": 100 * lost.mean(), "at most": 100 * lost.max(), "n": len(every)})
    return pandas.DataFrame(lines)


def selective(rows: pandas.DataFrame, coverages: Sequence[float]) -> pandas.DataFrame:
    """Selective classification: the error among the answers, and in brackets the coverage that came of it."""
    lines = []
    for method, own in rows.groupby("method", sort=False):
        errors = {f"error at {at:.0%}": f"{mean_std(own[f'error_{at}'], 2)} ({100 * own[f'coverage_{at}'].mean():.1f})"
                  for at in coverages}
        lines.append({"score of": method, **errors, "AURC × 100": mean_std(own["aurc"], 2)})
    return pandas.DataFrame(lines)
