"""The paper's benchmarks of photographs: what is missing, and what is measured."""

from src.experiments import Run, load_tests, photographs, predict_all
from src.metrics import adjusted_average, score
from src.recipes import Setting
from src.tables import markdown

PUBLISHED_SPEED = 2790  # images/s: ResNet-50 at 224 in training on one H100, as published; not measured here
TRAINING_IMAGES = {"waterbirds": 4_795, "celeba": 162_770}  # published; of ImageNet-9, no count is at hand


def missing(setting: Setting) -> str | None:
    """What is not there of a benchmark's files, and where to get it; None if all of it is there."""
    try:
        for split in ("train", "val", *setting.test_sets):
            photographs(setting.erm.dataset, split)
    except FileNotFoundError as error:
        return str(error)
    return None


def to_fetch(settings: list[Setting]) -> str:
    """A table of what to fetch for benchmarks, where to put it, and how long a seed takes at the published speed."""
    rows = []
    for setting in settings:
        images = TRAINING_IMAGES.get(setting.name)
        minutes = images and images * (setting.erm.epochs + setting.finetune.iterations) / PUBLISHED_SPEED / 60
        rows.append([setting.title, missing(setting), setting.erm.epochs, f"{minutes:.0f} min" if minutes else "?",
                     setting.expect])
    return markdown(["benchmark", "missing", "epochs", "a seed on one H100, at least", "to expect"], rows)


def measures(runs: list[Run]) -> dict[str, dict[str, list[float]]]:
    """{method: {measure: one value per seed, in [0, 1]}}, of runs of one setting.

    Waterbirds and CelebA: the accuracy of each group, of the worst, the plain average (the paper's), and the average
    with the groups weighted as in training (the field's "adjusted average"). Background Challenge: the accuracy on each
    variant, and BG-gap = mixed_same - mixed_rand (Xiao et al. 2021).
    """
    setting = runs[0].setting
    tests = load_tests(setting)
    train = photographs(setting.erm.dataset, "train")
    table: dict[str, dict[str, list[float]]] = {}
    for method, sets in predict_all(runs, tests)[setting.title].items():
        seeds = table[method] = {}
        for seed in range(len(runs)):
            scored = {name: score(guesses[seed], tests[name].labels, tests[name].groups)
                      for name, guesses in sets.items()}
            if setting.erm.dataset == "ImageNet9":
                values = {name: one.average for name, one in scored.items()}
                values["BG-gap"] = values["mixed_same"] - values["mixed_rand"]
            else:
                one = scored["test"]
                values = {"average": one.average, "adjusted average": adjusted_average(one.groups, train.groups),
                          "worst group": one.worst}
                values |= {train.group_names[group]: accuracy for group, accuracy in one.groups.items()}
            for name, value in values.items():
                seeds.setdefault(name, []).append(value)
    return table
