"""Every number that the prose of the notebook states as ours is computed here from the rows that it speaks of."""

import re

import nbformat
import pytest

from src.datasets.spurious import BACKGROUNDS
from src.experiments import questions, selective, study
from src.experiments.recipes import BIRDS, HOLES, MARKS, MNIST, SELECTIVE, Places
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
    "every mask is a pixel wider, and every image also hides", "one epoch does not always finish",
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
    fill, ours = asked["fill"], asked["ours"]
    black, other = (of(fill, "worst", method="rest hidden", fill=one) for one in ("black", "other"))
    yield (f"the background black it ends at {percent(black.mean())}%, with pixels of other images at "
           f"{mean_std(other)}%")
    kept = percent(of(fill, "worst", method="masktune", fill="other").mean())
    more, shuffled = (percent(of(ours, "worst", method=method, k=1.0).mean()) for method in ("masktune", "shuffled"))
    yield (f"filled with other images, MaskTune ends at {kept}% at k = 2 and at {more}% at k = 1, its masks shuffled "
           f"among the images at {shuffled}%")
    remedied = tables.remedied(asked["holes"]).groupby(["masks", "layer"])["worst"]
    ends = {key: mean_std(values) for key, values in remedied}
    smooth, decoys, grown = (" and ".join(ends[f"MaskTune, {remedy}", layer] for layer in questions.LAYERS[:2])
                             for remedy in ("smooth", "decoys", "grown, decoys"))
    yield f"five seeds, on which ERM is at {worst['erm']}%"
    yield f"the smooth fill ends at {smooth}%, decoys at {decoys}%, grown masks with decoys at {grown}%"
    late = asked["lateness"].groupby(["method", "erm_epochs"])["worst"].mean()
    old, new = ("{}, {} and {}".format(*(percent(value, 0) for value in late[method]))
                for method in ("erm", "masktune"))
    again = [percent(of(asked["iterations"], "worst", iteration=i).mean(), 0) for i in (2, 3)]
    yield (f"After 1, 2 and 5 epochs of ERM, its worst group is at {old}%, and after MaskTune at {new}%; a second "
           f"and a third iteration end at {again[0]} and {again[1]}%")
    held = (218, 218, 50, 50)  # validation images of each group
    yield f"a model that says landbird to everything has {percent((held[0] + held[1]) / sum(held))}%"


def marks():
    rows = tables.remedied(study.shipped("results", settings=MARKS[:1])).groupby("masks")
    ends, hidden = {name: mean_std(values) for name, values in rows["malicious"]}, rows["known_hidden"].mean()
    quiet, smooth = "MaskTune, grown, decoys", "MaskTune, grown, decoys, smooth"
    perfect, perfect_smooth = quiet.replace("MaskTune", "perfect masks"), smooth.replace("MaskTune", "perfect masks")
    published = study.shipped("published", settings=MARKS[:1])
    coarse = published[~published["decoys"]]
    assert (coarse["known_hidden"] == 0).all()
    yield "**As published, nothing is repaired**"
    erm = study.shipped("results", settings=MARKS[:1])
    erm = of(erm[erm["seed"].isin(coarse["seed"])], method="erm")
    yield (f"hide nothing of the mark, and the epoch ends at {mean_std(coarse['malicious'])}% (n = {len(erm)}); ERM of "
           f"these seeds is at {mean_std(erm)}%")
    yield (f"hide {percent(hidden['MaskTune'])}% of the mark's pixels, and end at {ends['MaskTune']}%; perfect "
           f"masks, which hide the mark and nothing else, at {ends['perfect masks']}%")
    yield (f"{ends[quiet]}%, and {ends[smooth]}% with the smooth fill; perfect masks reach {ends[perfect]} and "
           f"{ends[perfect_smooth]}%")
    alone = [ends[f"MaskTune, {remedy}"] for remedy in ("grown", "decoys", "smooth")]
    yield f"grown masks alone end at {alone[0]}%, decoys alone at {alone[1]}%, the fill alone at {alone[2]}%"
    price = tables.remedied(study.shipped("price", settings=MARKS[:1])).groupby(["marks", "masks"])["raw"].mean()
    lost = {(kind, masks): percent(price[kind, "ERM"] - price[kind, masks]) for kind, masks in price.index}
    yield (f"without any mark, MaskTune costs {lost['none', 'MaskTune']} points, grown with decoys "
           f"{lost['none', quiet]}, with the fill {lost['none', smooth]}; with the mark on all images "
           f"{lost['both', 'MaskTune']}, {lost['both', quiet]} and {lost['both', smooth]}")
    sizes = tables.remedied(study.shipped("side", settings=MARKS[:1])).groupby(["side", "masks"])
    large = [percent(sizes[column].mean()[0.2, quiet]) for column in ("known_hidden", "malicious")]
    yield f"of one of 20% of the side they hide {large[0]}%, and end at {large[1]}%"
    ten, squeezed = (tables.remedied(study.shipped("results", settings=[one])).groupby("masks") for one in MARKS[1:3])
    lies, raw = ({name: mean_std(values) for name, values in ten[column]} for column in ("malicious", "raw"))
    yield (f"hardly leaned on (ERM on malicious images {lies['ERM']}%, on raw ones {raw['ERM']}%), and the "
           f"epoch can only harm: {lies[quiet]}%")
    ends, hidden = {name: mean_std(values) for name, values in squeezed["malicious"]}, squeezed["known_hidden"].mean()
    yield (f"its grown masks hide {percent(hidden[quiet])}% of the mark, and with decoys it ends at {ends[quiet]}%, "
           f"where perfect masks reach {ends[perfect]}%")
    blank = tables.remedied(study.shipped("results", settings=MARKS[3:])).groupby("masks")
    hidden, ends = percent(blank["known_hidden"].mean()["MaskTune"]), blank["malicious"].agg(mean_std)
    yield f"the masks miss the mark ({hidden}% of it), and the epoch learns it: {ends['MaskTune']}%"
    lrs = tables.remedied(study.shipped("lr", settings=MARKS[:1])).groupby(["masks", "lr"])
    yield "{}, {} and {}% at 0.001, 0.003 and 0.01 (n = 3); on validation, {} is best".format(
        *map(percent, lrs["malicious"].mean()[quiet]), lrs["val_average"].mean()[quiet].idxmax())


def criterion():
    rows = study.shipped("layer", settings=MARKS[:1])
    rows = rows[(rows["grow"] > 0) & (rows["fill"] == "black")]
    rows = rows.assign(worth=(1 - rows["erm_on_filled"]) / rows["hidden"])
    gaps = [100 * (own["malicious"].max() - own.loc[own["worth"].idxmax(), "malicious"]) for _, own in
            rows.groupby("seed")]
    assert sorted(gap > 0 for gap in gaps) == [False, False, True]
    yield f"in two of three seeds the best of the six, in the third {max(gaps):.1f} points below it"


def holes():
    rows = tables.remedied(study.shipped("holes", settings=[HOLES]))
    means = rows.groupby(["ratio", "masks", "background"])["malicious"].agg(mean_std).str.split().str[0]  # as tables

    def ends(masks, ratio=0.0):
        return "{}, {}, {} and {}%".format(*(means[ratio, masks, one] for one in BACKGROUNDS))

    quiet = "MaskTune, grown, decoys"
    yield f"MaskTune ends at {ends('MaskTune')} on black, white, grey and coloured paper"
    yield f"perfect masks end at {ends('perfect masks')}"
    yield f"With perfect masks, grown with decoys, it is {ends('perfect masks, grown, decoys')}"
    yield f"grown masks with decoys end at {ends(quiet)}; decoys alone at {ends('MaskTune, decoys')}"
    yield f"The smooth fill alone reaches {ends('MaskTune, smooth')}, all three together {ends(f'{quiet}, smooth')}"
    yield f"MaskTune ends at {ends('MaskTune', 0.01)}, grown with decoys at {ends(quiet, 0.01)}"
    yield f"decoys alone at {ends('MaskTune, decoys', 0.01)}"
    best = max(float(value) for (ratio, masks, paper), value in means.items() if (ratio, paper) == (0, "black")
               and masks.startswith("MaskTune"))
    yield f"the best of the remedies ends at {best}% there"
    yield f"Widening alone: {ends('MaskTune, grown')} where none is conflicting"
    large = tables.remedied(study.shipped("large", settings=[HOLES])).groupby(["background", "masks"])["malicious"]
    assert large.size().unique().tolist() == [5]
    (paper, perfect, ours), (black, _, dark) = ([mean_std(large.get_group((one, masks))) for masks in (
        "MaskTune", "perfect masks", quiet)] for one in ("white", "black"))
    yield (f"inverted digits end at {paper}% with MaskTune, at {perfect}% with perfect masks, and at {ours}% with "
           f"grown masks and decoys; black paper at {black}% with MaskTune and at {dark}% with these")
    whole = study.shipped("results", "holes")
    whole = tables.remedied(whole[whole["method"] == "masktune"]).groupby(["setting", "masks"])["malicious"]
    full = {key: (mean_std(values), percent(values.min())) for key, values in whole}
    (calm, low), (usual, worst) = (full["mnist-random", masks] for masks in (quiet, "MaskTune"))
    yield f"{calm}%, lowest {low}%, instead of {usual}%, lowest {worst}%. By digit"
    yield f"cost a little: {full['mnist-digit', quiet][0]}% instead of {full['mnist-digit', 'MaskTune'][0]}%"
    (wild, low), (usual, worst) = (full["mnist-none", masks] for masks in (quiet, "MaskTune"))
    yield f"scatter more: {wild}%, lowest {low}%, instead of {usual}%, lowest {worst}%"
    (alone, low), (wide, _) = (full["mnist-random", f"MaskTune, {remedy}"] for remedy in ("decoys", "grown"))
    yield f"Decoys alone end at {alone}%, lowest {low}%, at 1% random; masks that are only wider at {wide}%"
    three, lows = zip(*(full[setting.name, f"{quiet}, smooth"] for setting in MNIST), strict=True)
    yield "have no run below {}%, and means of {}, {} and {}%".format(
        min(lows, key=float), *(mean.split()[0] for mean in three))
    white = [means[0.0, masks, "white"] for masks in ("MaskTune", quiet)]
    photos = tables.remedied(study.shipped("results", settings=MARKS[:1])).groupby("masks")["malicious"].mean()
    marked = [percent(photos[masks]) for masks in ("MaskTune", quiet)]
    yield (f"from {white[0]} to {white[1]}% on inverted digits, and from {marked[0]} to {marked[1]}% on photographs "
           "with a mark")


CLAIMS = (mnist, dependence, second_opinion, photographs, holes, marks, criterion)


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
