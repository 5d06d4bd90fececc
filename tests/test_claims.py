"""Every number that the prose of the notebook states as ours is computed here from the rows that it speaks of."""

import re

import nbformat
import pytest

from src.datasets.spurious import BACKGROUNDS
from src.experiments import questions, selective, study
from src.experiments.recipes import BIRDS, HOLES, MARKS, MNIST, SELECTIVE, TWO, Places
from src.experiments.rows import saved
from src.report import tables
from src.report.tables import SHORTCUT, mean_std
from tests.conftest import REPOSITORY

QUOTED = {  # of others, of recipes and of arithmetic that an output shows; the last three are of versions
    "18.59", "84.05", "86.4", "0.9", "0.01", "0.003", "0.001", "0.00125", "2.5", "3.11", "1.3", "3.0"}
ABSOLUTE = re.compile(r"\b(every|equal|twice|or more|always|never|exactly|almost|no other)\b", re.IGNORECASE)
SETTLED = (  # where such a word is no claim about rows: definitions, recipes, what cells do, and what other tests show
    "Every pixel hotter than", "on groups of equal size", "as many images of every group", "that does exactly this",
    "halved every 25", "the first 2,560 images, twice", "then after every 20th",
    "they show what was hot with every class", "every image also hides what was hot",
    "the square is still never seen with the other label", "one epoch does not always finish",
    "MNIST never shows it, since black is the colour of its paper", "every result, what it depends on",
    "saved after every epoch", "Equal bits are not promised",
    "So every 0-4 without a square is a 4, and every 5-9 with one is a 5", "but of every digit",
    "counter-examples are of every digit", "on all 0-4 and on no other image", "on every training image of the first",
    "the pixels of every bird are")
SHARED = re.compile(r"```.*?```|\]\([^)]*\)|`[^`]*`|^\|[^\n]*$|arXiv [\d.]+", re.DOTALL | re.MULTILINE)  # no prose


@pytest.fixture(scope="module")
def prose():
    cells = nbformat.read(REPOSITORY / "README.ipynb", as_version=4).cells
    pages = [*(cell.source for cell in cells if cell.cell_type == "markdown"), (REPOSITORY / "README.md").read_text()]
    return "\n".join(pages)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def of(rows, column="malicious", **condition):
    """The values of a column in the rows of a condition."""
    for key, value in condition.items():
        rows = rows[rows[key] == value]
    assert len(rows), condition
    return rows[column]


def percent(value, digits=1):
    return f"{100 * value:.{digits}f}"


def mnist():
    rows = study.shipped("results")
    each = [of(rows, setting=f"mnist-{order}", method="masktune") for order in ("random", "digit", "none")]
    means, lowest = [percent(values.mean()) for values in each], [percent(values.min()) for values in each]
    erm = of(rows, setting="mnist-digit", method="erm")
    yield (f"ERM reads {percent(erm.mean())}% of the malicious images right (mean of {len(erm)} runs), and after one "
           f"epoch of MaskTune it is {means[1]}% (mean of {len(each[1])} runs)")
    yield f"at {means[0]}% (1% random), {means[1]}% (by digit) and {means[2]}% (none conflicting)"
    yield f"lowest runs are {lowest[0]}%, {lowest[1]}% and {lowest[2]}%"
    blind = rows[(rows["setting"] == "mnist-none") & (rows["method"] == "erm")]
    assert (blind["0-4, no square"].max(), blind["5-9, no square"].min()) == (0, 1)
    yield "every image without a square is 5-9 to ERM"
    covered = rows[rows["method"] == "randmask"].groupby("setting")[f"known_hidden{SHORTCUT}"].mean()
    assert {percent(share, 0) for share in covered} == {"5"}
    yield "it hides 5% of the squares' pixels"
    tuned = rows[(rows["setting"] == "mnist-random") & (rows["method"] == "masktune")].groupby("seed")
    many = tuned[f"known_visible{SHORTCUT}"].first() > 1000
    rest, whole = ([percent(value) for value in sorted(tuned["malicious"].mean()[chosen])] for chosen in (many, ~many))
    assert (of(rows, f"known_visible{SHORTCUT}", setting="mnist-none", method="masktune") == 0).all()
    yield (f"the seeds whose masks leave one on a thousand squares or more end at {rest[0]} to {rest[-1]}%, the two "
           f"others at {whole[0]} and {whole[1]}%")


def dependence():
    k, cam, lr = (study.shipped(question) for question in ("threshold", "cam", "lr"))
    yield (f"falls from {percent(of(k, setting='mnist-digit', k=2.0).min())} to "
           f"{percent(of(k, setting='mnist-digit', k=2.5).min())}% between k = 2 and 2.5")
    hidden, after = ("{}, {} and {}".format(*(percent(value, 0) for value in of(cam, column, setting="mnist-none",
                                                                                cam="GradCAM")))
                     for column in (f"known_hidden{SHORTCUT}", "malicious"))
    yield f"hides {hidden}% of the squares' pixels where none is conflicting, and ends at {after}%"
    label, guess = (of(cam, cam=one).tolist() for one in ("label", "XGradCAM"))
    assert label == guess
    yield "gives the same masks, since ERM reads the training set without an error"
    erm = study.shipped("results")
    erm = of(erm[erm["seed"] < 3], method="erm").groupby(erm["setting"]).mean()
    plain = study.shipped("reference")
    assert (of(plain, method="plain").groupby(plain["setting"]).mean() - erm).abs().max() < 0.01
    yield "changes less than a point"
    hidden = k.groupby(["setting", "k"])["hidden"].mean().unstack()
    assert round(hidden[1.0].min(), 2) == 0.1 > hidden[1.5].max()
    yield "At k = 1 and below, a tenth of the pixels and more are hidden"
    slow, fast = (mean_std(of(lr, setting="mnist-none", lr=one)).split()[0] for one in (0.00125, 0.01))
    yield f"{slow}% on the malicious set, {fast}% at 0.01"
    frozen = of(study.shipped("batchnorm"), batchnorm="frozen")
    assert (frozen.between(0.965, 0.985).sum(), len(frozen)) == (3, 9)
    yield "three of nine runs end at 97 to 98%"
    ratio = study.shipped("ratio").groupby(["method", "ratio"])["malicious"].mean()
    shares, erm = ratio["masktune"], ratio["erm"]
    yield f"ends between {percent(shares.min())} and {percent(shares.max())}% on the malicious set"
    yield f"at 5 and 20% it is itself at {percent(erm[0.05])} and {percent(erm[0.2])}%"


def second_opinion():
    rows = saved(Places().results / f"selective-{SELECTIVE[-1].name}.csv")
    errors = rows.groupby("method")[[f"error_{coverage}" for coverage in selective.COVERAGES]].mean()
    assert (errors.loc["ERM × MaskTune"] >= errors.loc["ERM"]).all()
    better = 100 * (errors.loc["ERM"] - errors.loc["two ERM seeds"])
    yield (f"no better than ERM alone at any of the five coverages; that of two ERM seeds is better by "
           f"{better.min():.1f} to {better.max():.1f} points")


def photographs():
    asked = {question: study.shipped(question, settings=BIRDS[1:]) for question in questions.ON_PHOTOGRAPHS}
    rows = asked["results"]
    worst = {method: mean_std(values) for method, values in rows.groupby("method")["worst"]}
    seeds = of(rows, "worst", method="erm")
    means = rows.groupby("method")["worst"].mean().drop("dfr")
    assert means.max() < means["erm"] + 0.01
    yield "But for DFR, nothing in the table raises the worst group, waterbirds on land, by a point"
    assert of(asked["k"], "worst").groupby(asked["k"]["k"]).mean().is_monotonic_increasing
    yield "**More hidden is worse**"
    yield f"reads {worst['dfr']}% of the worst group"
    yield (f"MaskTune ends at {worst['masktune']}%, RandMask at {worst['randmask']}%, a plain epoch at "
           f"{worst['plain']}%, where ERM's five seeds are between {percent(seeds.min(), 0)} and "
           f"{percent(seeds.max(), 0)}%")
    first, whole = (percent(seeds[:n].mean()) for n in (3, 5))
    yield f"the first three of the five seeds, on which ERM is at {first}% (on all five, {whole}%)"
    birds = rows.groupby("method")[[column for column in rows if column.startswith("on_known: ")]].mean()
    more = birds.loc["masktune"] / birds.loc["randmask"]
    yield f"the bird's share is {more.min():.1f} to {more.max():.1f} times that under a random square"
    tuned = rows[rows["method"] == "masktune"].mean(numeric_only=True)
    yield (f"in {percent(tuned['untouched'], 0)}% of the images none is, and {percent(tuned['hidden'])}% of all "
           "pixels are hidden")
    layers = asked["layer"].groupby("layer").mean(numeric_only=True)
    finer = layers.loc[list(questions.LAYERS[1:])]
    assert {percent(share, 0) for share in finer["hidden"]} == {"4"}
    yield f"hide 4%, and end at {percent(finer['worst'].min(), 0)} to {percent(finer['worst'].max(), 0)}%"
    assert finer["worst"].max() < layers["worst"][questions.LAYERS[0]]
    yield "**Finer maps do not help.**"
    sharp = [percent(share, 0) for share in layers.loc[questions.LAYERS[1]].filter(like="on_known: ")]
    yield (f"{sharp[1]} and {sharp[2]}% of what is hidden in the two minority groups is bird ({sharp[0]} and "
           f"{sharp[3]}% in the others)")
    yield f"at 0.01 it ends at {percent(of(asked['lr'], 'worst', method='masktune', lr=0.01).mean())}%"
    late = asked["lateness"].groupby(["method", "erm_epochs"])["worst"].mean()
    old, new = ("{}, {} and {}".format(*(percent(value, 0) for value in late[method]))
                for method in ("erm", "masktune"))
    again = [percent(of(asked["iterations"], "worst", iteration=i).mean(), 0) for i in (2, 3)]
    yield (f"After 1, 2 and 5 epochs of ERM, its worst group is at {old}%, and after MaskTune at {new}%; a second "
           f"and a third iteration end at {again[0]} and {again[1]}%")
    swaps = asked["holes"].dropna(subset="made_with")
    swaps = swaps[(swaps["layer"] == questions.LAYERS[1]) & (swaps["k"] == 1) & (swaps["method"] == "masktune")]
    black, ours = (of(swaps, "worst", seed=0, holes=kind).item() for kind in ("black", "transplants"))
    yield (f"at k = 1 on the sharp map, transplants end at {percent(ours)}%, black holes at {percent(black)}% (one "
           f"seed; its ERM is at {percent(of(rows, 'worst', method='erm', seed=0).item())}%)")
    held = (218, 218, 50, 50)  # validation images of each group
    yield f"a model that says landbird to everything has {percent((held[0] + held[1]) / sum(held))}%"


def holes():
    rows = tables.named(study.shipped("holes", settings=[HOLES]).dropna(subset="made_with"))
    rows = rows[rows["ratio"] == 0]
    means = rows.groupby(["lr", "masks", "background"])["malicious"].mean().map(percent)

    def ends(masks, lr=0.01):
        return "{}, {}, {} and {}%".format(*(means[lr, masks, one] for one in BACKGROUNDS))

    assert rows.groupby(["lr", "masks", "background"]).size().unique().tolist() == [5]
    yield f"perfect masks end at {ends('perfect masks')} on black, white, grey and coloured paper"
    yield f"MaskTune ends at {ends('MaskTune')}"
    yield f"they end at {ends('MaskTune, decoys')} at an LR of 0.01, and at {ends('MaskTune, decoys', 0.003)} at 0.003"
    ours = rows[rows["masks"] == "MaskTune, transplants"]["malicious"]
    yield (f"{ends('MaskTune, transplants')} at 0.01, {ends('MaskTune, transplants', 0.003)} at 0.003; the lowest of "
           f"the {len(ours)} runs is at {percent(ours.min())}%")
    yield f"perfect masks with transplants reach {ends('perfect masks, transplants')} at 0.01"
    yield f"RandMask with transplants stays at {ends('RandMask, transplants')}"
    ranked = tables.ranking(rows, ("background", "seed"), "malicious").set_index("chosen by")
    lower, usual = (ranked.loc[tables.CRITERIA[name]] for name in ("lower", "as_is"))
    yield (f"{lower['rank correlation']:.2f} on average and never below {lower['lowest']:.2f}; for accuracy as is it "
           f"is {usual['rank correlation']:.2f}")
    tuned = tables.ranking(rows[rows["method"] == "masktune"], ("background", "seed"), "malicious")
    lower, usual = (tuned.set_index("chosen by").loc[tables.CRITERIA[name]] for name in ("lower", "as_is"))
    yield (f"costs {lower['points lost']:.1f} points on average, {lower['at most']:.1f} at most; by accuracy as is "
           f"{usual['points lost']:.1f} and {usual['at most']:.1f}")


def published():
    rows = study.shipped("results", "holes").dropna(subset="made_with")
    ends = tables.named(rows).groupby(["setting", "masks"])["malicious"].agg(["mean", "min", "size"])
    ours = [ends.loc[setting.name, "MaskTune, transplants"] for setting in MNIST]
    yield ("with transplants it ends at {}, {} and {}%".format(*(percent(one["mean"]) for one in ours)))
    yield "with lowest runs of {}, {} and {}%".format(*(percent(one["min"]) for one in ours))
    calm = [ends.loc[setting.name, "MaskTune, decoys"] for setting in MNIST]
    yield "decoys end at {}, {} and {}%, lowest {}, {} and {}%".format(
        *(percent(one["mean"]) for one in calm), *(percent(one["min"]) for one in calm))


def two():
    rows = study.shipped("results", settings=[TWO]).dropna(subset="made_with")
    assert (of(rows, method="erm") == 0).all()
    yield "ERM leans on the blue one, on the red one, or on both, by seed"
    ours = rows[rows["holes"] == "transplants"].set_index(["background", "seed"])
    first, until = (ours[ours["iteration"] == i] for i in (1, 0))
    lost = first[first["malicious"] < 0.9]
    low, high = percent(lost["malicious"].min()), percent(lost["malicious"].max())
    yield (f"After one iteration with transplants, {len(first) - len(lost)} of {len(first)} runs are repaired; the "
           f"others lean on the other square, at {low} to {high}%, while accuracy as is and the swap test with the old "
           f"masks say {percent(lost[['as_is', 'swapped']].min(axis=None))}% and more")
    assert (until["iterations"] == 1 + until.index.isin(lost.index)).all()
    ends = until.groupby("background")["malicious"].mean()
    yield (f"goes on in these {len(lost)} alone, for one iteration more, and ends at {percent(ends['white'])} and "
           f"{percent(ends['black'])}% on white and black paper, lowest run {percent(until['malicious'].min())}%")
    twice = ours[ours["iteration"] == 2].groupby("background")["malicious"].mean()
    yield f"Two iterations in all runs end at {percent(twice['white'])} and {percent(twice['black'])}%"
    plain = rows[(rows["holes"] == "black") & (rows["iteration"] == 3)].groupby("background")["malicious"].mean()
    yield f"as published, three end at {percent(plain['white'])} and {percent(plain['black'])}%"


def marks():
    rows = tables.named(study.shipped("results", settings=MARKS[:1]).dropna(subset="made_with"))
    groups = rows.groupby(["masks", "lr"])["malicious"]
    ends = {key: mean_std(values) for key, values in groups}
    lowest = {key: percent(values.min()) for key, values in groups}
    erm = of(rows, masks="ERM")
    hidden = of(rows, "known_hidden", masks="MaskTune", lr=0.003)
    yield f"ERM is at {mean_std(erm)}% (n = {len(erm)})"
    yield f"masks hide {percent(hidden.mean())}% of the mark's pixels, and end at {ends['MaskTune', 0.003]}% at 0.003"
    yield (f"{ends['MaskTune, transplants', 0.001]}% at 0.001 and {ends['MaskTune, transplants', 0.003]}% at 0.003, "
           f"lowest runs {lowest['MaskTune, transplants', 0.001]} and {lowest['MaskTune, transplants', 0.003]}%")
    price = tables.named(study.shipped("price", settings=MARKS[:1]).dropna(subset="made_with"))
    price = price[price["marks"] == "none"]
    raw = price.groupby("masks")["raw"].mean()
    lost = [percent(raw["ERM"] - raw[masks]) for masks in ("MaskTune", "MaskTune, decoys", "MaskTune, transplants")]
    yield (f"black holes cost {lost[0]} points of accuracy on raw images, decoys {lost[1]}, transplants {lost[2]} "
           f"(n = {price['seed'].nunique()}); a plain epoch gains {percent(raw['plain epoch'] - raw['ERM'])}")
    quiet = "MaskTune, decoys"
    sizes = tables.named(study.shipped("side", settings=MARKS[:1]).dropna(subset="made_with"))
    sizes = sizes.groupby(["side", "masks"])
    large = [percent(sizes[column].mean()[0.2, quiet]) for column in ("known_hidden", "malicious")]
    yield f"of a mark of 20% of the side, masks hide {large[0]}%, and the epoch ends at {large[1]}%"
    ten, squeezed, blank = (tables.named(study.shipped("results", settings=[one]).dropna(subset="made_with")).groupby(
        "masks") for one in MARKS[1:])
    ends = {name: mean_std(values) for name, values in squeezed["malicious"]}
    hidden = squeezed["known_hidden"].mean()
    yield (f"its masks hide {percent(hidden[quiet])}% of the mark, and it ends at {ends[quiet]}%, where perfect masks "
           f"reach {ends['perfect masks, decoys']}%")
    missed = percent(blank["known_hidden"].mean()["MaskTune"])
    yield (f"the masks miss the mark ({missed}% of it), and the epoch learns "
           f"it: {mean_std(blank['malicious'].get_group('MaskTune'))}%")
    lies, raw = ({name: mean_std(values) for name, values in ten[column]} for column in ("malicious", "raw"))
    yield (f"hardly leaned on (ERM on malicious images {lies['ERM']}%, on raw ones {raw['ERM']}%), and the epoch can "
           f"only harm: {lies[quiet]}%")


def landing():
    rows = tables.named(study.shipped("holes", settings=[HOLES]).dropna(subset="made_with"))
    rows = rows[(rows["ratio"] == 0) & (rows["lr"] == 0.01)]
    paper = rows.groupby(["background", "masks"])["malicious"]
    photos = tables.named(study.shipped("results", settings=MARKS[:1]).dropna(subset="made_with"))
    marked = photos[photos["lr"] == 0.003].groupby("masks")["malicious"]
    kinds = ("MaskTune", "MaskTune, transplants")
    (old, new), (seen, repaired) = ([percent(groups.mean()[(*first, kind) if first else kind]) for kind in kinds]
                                    for groups, first in ((paper, ("white",)), (marked, ())))
    lowest = [percent(paper.min()["white", kinds[1]]), percent(marked.min()[kinds[1]])]
    yield (f"from {old} to {new}% on inverted digits, and from {seen} to {repaired}% on photographs with a mark (means "
           f"of 5 runs; lowest {lowest[0]} and {lowest[1]}%; ERM is at 0 and "
           f"{percent(of(photos, masks='ERM').mean())}%)")


CLAIMS = (mnist, dependence, second_opinion, photographs, holes, published, two, marks, landing)


@pytest.mark.parametrize("claims", CLAIMS)
def test_the_prose_says_what_the_rows_say(claims, prose):
    text = " ".join(prose.split())
    for claim in claims():
        assert " ".join(claim.split()) in text


def test_no_other_number_and_no_other_absolute_is_stated(prose):
    """A decimal in the prose is in one of the claims above, or is quoted; so is a word that allows no exception."""
    rest = " ".join(SHARED.sub(" ", prose).split())
    for claims in CLAIMS:
        for claim in claims():
            rest = rest.replace(" ".join(claim.split()), " ")
    assert set(re.findall(r"\d+\.\d+", rest)) <= QUOTED, sorted(set(re.findall(r"\d+\.\d+", rest)) - QUOTED)
    for phrase in SETTLED:
        assert phrase in rest
        rest = rest.replace(phrase, " ")
    assert not [rest[max(0, found.start() - 60):found.end() + 40] for found in ABSOLUTE.finditer(rest)]
