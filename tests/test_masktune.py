"""What is hidden, and the one epoch on what is left."""

import copy

import pytest
import torch

from src.experiments import stages
from src.experiments.recipes import FineTune, Places
from src.holes import pixels
from src.inference import accuracy
from src.masking import find_masks, random_masks
from src.masks import Masks
from src.state import State
from src.training import train_epoch


@pytest.fixture(scope="module")
def finetuned(run, setting, tmp_path_factory):
    """The state after a fine-tune, by its method."""
    places = Places(tmp_path_factory.mktemp("finetuned"))
    return {"masktune": run.finetuned, **{method: stages.run_finetune(places, setting, 0, run.erm, FineTune(method))
                                          for method in ("randmask", "plain")}}


def test_accumulated_masks_keep_what_was_hidden(run, train):
    first = find_masks(run.erm.model, train.images[:200])[:]
    second = find_masks(run.erm.model, train.images[:200], hidden=Masks.of(first))[:]
    assert (second & first).sum() == first.sum()
    assert second.sum() > first.sum()


def test_hidden_pixels_are_black_and_the_others_untouched(train):
    images, masks = train.images[:50], torch.rand(50, 28, 28) < 0.3
    assert torch.equal(pixels(images, masks), images.float() / 255 * ~masks[:, None])


@pytest.mark.parametrize(("size", "smallest", "largest"), [(28, 2, 14), ((56, 112), 4, 28)])
def test_random_masks_are_clipped_squares_from_seed_and_epoch(size, smallest, largest):
    masks = random_masks(4000, size, seed=1, epoch=7)[:]
    heights, widths = masks.any(2).sum(1), masks.any(1).sum(1)
    assert torch.equal(masks.sum((1, 2)), heights * widths)  # a filled rectangle
    inside = ~(masks[:, [0, -1]].any(2).any(1) | masks[:, :, [0, -1]].any(2).any(1))
    assert torch.equal(heights[inside], widths[inside])
    assert heights[inside].unique().tolist() == list(range(smallest, largest + 1))
    assert masks.any(0).all()  # every pixel is hit by some
    assert masks.float().mean((0, 1))[largest // 2:-largest // 2].std() < 0.01  # as often on the left as on the right
    assert torch.equal(masks, random_masks(4000, size, seed=1, epoch=7)[:])
    for seed, epoch in ((1, 8), (2, 7)):
        assert not torch.equal(masks, random_masks(4000, size, seed, epoch)[:])


def test_masktune_trains_on_erms_images_under_their_masks(run, train, setting):
    """Recomputed by hand from ERM's weights, momentum and images, squares included; ERM's state is as before."""
    digest = run.erm.digest()
    masks = find_masks(run.erm.model, train.images)
    assert masks[train.squares][:, :4, :4].float().mean() > 0.9  # they find the squares
    assert masks.share() < 0.1
    assert run.finetuned.history["hidden"] == [pytest.approx(masks.share())]
    assert torch.equal(run.finetuned.masks[:], masks[:])
    model = copy.deepcopy(run.erm.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    optimizer.load_state_dict(copy.deepcopy(run.erm.optimizer.state_dict()))
    train_epoch(State(model, optimizer, epoch=setting.erm.epochs), train.images, train.labels, masks=masks[:], lr=0.01,
                batch_size=setting.erm.batch_size, seed=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, run.finetuned.model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert run.erm.digest() == digest


def test_masktune_repairs_what_erm_gets_wrong(run, setting, finetuned):
    """Masks in random places do less, and so does the epoch without masks; each is one epoch in train mode."""
    test = stages.load_tests(Places(), setting)["malicious"]
    states = {"erm": run.erm, **finetuned}
    right = {method: accuracy(state.model, test.images, test.labels) for method, state in states.items()}
    assert right["erm"] < 0.5
    assert right["masktune"] > max(right["erm"] + 0.2, right["randmask"], right["plain"])
    assert finetuned["plain"].masks is None
    norms = {method: state.model.backbone[1] for method, state in states.items()}
    assert [int(norm.num_batches_tracked) for norm in norms.values()] == [3 * 43, 4 * 43, 4 * 43, 4 * 43]
    assert not any(torch.equal(norms[method].running_mean, norms["erm"].running_mean) for method in finetuned)
