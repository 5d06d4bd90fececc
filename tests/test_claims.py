"""Every number that the prose of the notebook states as ours is computed here from the rows that it speaks of."""

import re
from statistics import mean

import nbformat
import pytest

from src.experiments import birds, demonstration, selective, studies
from src.experiments.recipes import MNIST, SELECTIVE
from src.metrics import summarize
from src.rows import saved
from tests.conftest import REPOSITORY

QUOTED = {  # of others, of recipes and of arithmetic that an output shows
    "18.59", "84.05", "0.9", "0.01", "0.003", "0.001", "0.00125", "3.11", "1.3"}  # the last is a version
SHARED = re.compile(r"```.*?```|\]\([^)]*\)|`[^`]*`|^\|.*$|arXiv [\d.]+", re.DOTALL | re.MULTILINE)  # no prose


@pytest.fixture(scope="module")
def prose():
    cells = nbformat.read(REPOSITORY / "README.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        yield


def of(rows, column="malicious", **condition):
    """The values of a column in the rows of a condition; what it does not name is as in BASE."""
    found = [row[column] for row in rows if condition.items() <= row.items() and column in row]
    assert found, condition
    return found


def percent(value, digits=1):
    return f"{100 * value:.{digits}f}"


def mnist():
    rows = studies.shipped("results")
    each = {order: of(rows, setting=f"mnist-{order}", method="masktune") for order in ("random", "digit", "none")}
    means, lowest = ([percent(how(values)) for values in each.values()] for how in (mean, min))
    yield (f"ERM reads {percent(mean(of(rows, setting='mnist-digit', method='erm')))} % of the test images right, and "
           f"after one epoch of MaskTune it is {means[1]} %")
    yield f"at {means[0]} % (1 % random), {means[1]} % (by digit) and {means[2]} % (none conflicting)"
    yield f"lowest runs are {lowest[0]} %, {lowest[1]} % and {lowest[2]} %"
    covered = [mean(of(rows, "shortcut_hidden", setting=setting.name, method="randmask")) for setting in MNIST]
    assert {percent(share, 0) for share in covered} == {"5"}
    yield "it hides 5 % of the squares' pixels"
    by_seed = {seed: mean(of(rows, setting="mnist-random", method="masktune", seed=seed)) for seed in range(5)}
    visible = {seed: of(rows, "shortcut_visible", setting="mnist-random", method="masktune", seed=seed)[0]
               for seed in range(5)}
    rest, whole = (list(map(percent, sorted(by_seed[seed] for seed in by_seed if (visible[seed] > 1000) == many)))
                   for many in (True, False))
    yield f"end at {rest[0]} to {rest[-1]} %, the two others at {whole[0]} and {whole[1]} %"
    ends = studies.shipped("ending")
    decay, average = (summarize(of(ends, setting="mnist-random", ending=ending)) for ending in ("decay", "average"))
    yield f"({decay} % and {average} % at 1 % random)"
    yield f"the decay ends at {summarize(of(ends, setting='mnist-none', ending='decay'))} %"


def dependence():
    k, cam, lr = (studies.shipped(question) for question in ("threshold", "cam", "lr"))
    yield (f"falls from {percent(min(of(k, setting='mnist-digit', k=2.0)))} to "
           f"{percent(min(of(k, setting='mnist-digit', k=2.5)))} % between k = 2 and 2.5")
    hidden, after = ("{}, {} and {}".format(*(percent(value, 0) for value in of(cam, column, setting="mnist-none",
                                                                                cam="GradCAM")))
                     for column in ("shortcut_hidden", "malicious"))
    yield f"hides {hidden} % of the squares' pixels where none is conflicting, and ends at {after} %"
    slow, fast = (percent(mean(of(lr, setting="mnist-none", lr=one))) for one in (0.00125, 0.01))
    yield f"{slow} % on the malicious set where none is conflicting, {fast} % at 0.01"
    frozen = of(studies.shipped("batchnorm"), batchnorm="frozen")
    assert [round(100 * value) in (97, 98) for value in frozen].count(True) == 3
    assert len(frozen) == 9
    yield "three of nine runs end at 97 to 98 %"
    ratio = studies.ratio_study(MNIST[0])
    shares = [mean(of(ratio, ratio=share)) for share in studies.RATIOS]
    yield f"ends between {percent(min(shares))} and {percent(max(shares))} % on the malicious set"


def repair():
    rows = demonstration.demonstrate()
    before, after, worst = (summarize(of(rows, column, part="test"))
                            for column in ("before_turned", "after_turned", "after_turned_worst"))
    yield f"rises from {percent(before.mean)} % to {after} %, its worse class to {worst} %"
    chosen = sorted((1 - row["mark_hidden"], row["after_turned"]) for row in rows
                    if row["part"] == "val" and demonstration.CHOSEN.items() <= row.items())
    *good, bad = chosen
    low, high = (percent(how(value for _, value in good), 0) for how in (min, max))
    yield f"left {percent(bad[0])} % of the mark's pixels visible came back to {percent(bad[1], 0)} %, the others to " \
          f"{low} to {high} %"


def second_opinion():
    rows = saved(selective.RESULTS / f"selective-{SELECTIVE[-1].name}.json")
    errors = {method: [mean(one) for one in zip(*of(rows, "error", method=method), strict=True)]
              for method in selective.VOICES}
    assert all(product >= alone for product, alone in zip(errors["ERM × MaskTune"], errors["ERM"], strict=True))
    assert all(alone - two > 0.014 for two, alone in zip(errors["two ERM seeds"], errors["ERM"], strict=True)), errors
    yield "no better than ERM alone at any of the five coverages"


def photographs():
    rows = birds.shipped("results")
    worst = {method: summarize(of(rows, "worst", method=method)) for method in ("erm", "plain", "randmask", "masktune",
                                                                                "dfr", *birds.ORACLES)}
    seeds = of(rows, "worst", method="erm")
    yield f"reads {worst['dfr']} % of the worst group"
    yield (f"MaskTune ends at {worst['masktune']} %, RandMask at {worst['randmask']} %, a plain epoch at "
           f"{worst['plain']} %, where ERM's five seeds are between {percent(min(seeds), 0)} and "
           f"{percent(max(seeds), 0)} %")
    tuned = [row for row in rows if row["method"] == "masktune"]
    yield (f"in {percent(mean(row['untouched'] for row in tuned), 0)} % of the images none is, and "
           f"{percent(mean(row['hidden'] for row in tuned))} % of all pixels are hidden")
    layers = birds.shipped("layer")
    finer = [mean(of(layers, "worst", layer=layer)) for layer in birds.LAYERS[1:]]
    assert {percent(mean(of(layers, "hidden", layer=layer)), 0) for layer in birds.LAYERS[1:]} == {"4"}
    yield f"hide 4 %, and end at {percent(min(finer), 0)} to {percent(max(finer), 0)} %"
    relu = [mean(shares) for shares in zip(*of(layers, "on_bird_by_group", layer=birds.LAYERS[1]), strict=True)]
    yield (f"{percent(relu[1], 0)} and {percent(relu[2], 0)} % of what is hidden in the two minority groups is bird "
           f"({percent(relu[0], 0)} and {percent(relu[3], 0)} % in the others)")
    lr = birds.shipped("lr")
    yield f"at 0.01 it ends at {percent(mean(of(lr, 'worst', method='masktune', lr=0.01)))} %"
    fill = birds.shipped("fill")
    black, other = (summarize(of(fill, "worst", method="background hidden", fill=one)) for one in birds.FILLS)
    yield f"with the background black it ends at {percent(black.mean)} %, with pixels of other images at {other} %"
    kept = percent(mean(of(fill, "worst", method="masktune", fill="other")))
    more, shuffled = (percent(mean(of(birds.shipped("ours"), "worst", method=method, k=1.0)))
                      for method in ("masktune", "shuffled"))
    yield (f"filled with other images, MaskTune ends at {kept} % at k = 2 and at {more} % at k = 1, its masks shuffled "
           f"among the images at {shuffled} %")
    late = birds.shipped("lateness")
    old, new = ("{}, {} and {}".format(*(percent(mean(of(late, "worst", method=method, erm_epochs=epochs)), 0)
                                         for epochs in (1, 2, 5))) for method in ("erm", "masktune"))
    more = [percent(mean(of(birds.shipped("iterations"), "worst", iteration=i)), 0) for i in (2, 3)]
    yield (f"After 1, 2 and 5 epochs of ERM, its worst group is at {old} %, and after MaskTune at {new} %; a second "
           f"and a third iteration end at {more[0]} and {more[1]} %")
    held = (218, 218, 50, 50)  # validation images of each group
    yield f"a model that says landbird to everything has {percent((held[0] + held[1]) / sum(held))} %"


CLAIMS = (mnist, dependence, repair, second_opinion, photographs)


@pytest.mark.parametrize("claims", CLAIMS)
def test_the_prose_says_what_the_rows_say(claims, prose):
    text = " ".join(prose.split())
    for claim in claims():
        assert claim in text


def test_no_other_number_is_stated(prose):
    """A decimal in the prose is in one of the claims above, or is quoted."""
    rest = " ".join(SHARED.sub(" ", prose).split())
    for claims in CLAIMS:
        for claim in claims():
            rest = rest.replace(claim, " ")
    assert set(re.findall(r"\d+\.\d+", rest)) <= QUOTED, sorted(set(re.findall(r"\d+\.\d+", rest)) - QUOTED)
