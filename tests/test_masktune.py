import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from src.experiments import stages
from src.experiments.recipes import FineTune
from src.inference import infer, pixels
from src.masking import find_masks, hottest, random_masks
from src.masks import Masks
from src.state import State
from src.training import sgd, train_epoch


@pytest.fixture(scope="module")
def finetuned(run, setting, tmp_path_factory):
    """The state after a fine-tune, by its method."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CHECKPOINTS", tmp_path_factory.mktemp("finetuned"))
        return {"masktune": run.finetuned, **{method: stages.run_finetune(setting, 0, run.erm, FineTune(method))
                                              for method in ("randmask", "plain")}}


def test_threshold_by_hand():
    # positive: six of 0.1 and one of 1.0, so m = 1.6 / 7 = 0.2286, s = sqrt(0.6943 / 7) = 0.3149, m + 2 s = 0.8584
    heatmap = torch.tensor([[[0.0, 0.1, 0.1], [0.1, 1.0, 0.1], [0.1, 0.1, 0.0]]])
    assert hottest(heatmap)[0].tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert not hottest(heatmap, k=2.5).any()  # m + 2.5 s = 1.0159
    assert hottest(heatmap, k=-1).sum() == 7  # zeros are never hidden
    heatmap[0, 1, 1] = 0.1
    heatmap[0, 0, 1] = heatmap[0, 1, 0] = 0.4  # m = 1.3 / 7 = 0.1857, s = 0.1355, m + 2 s = 0.4567, m + 1.5 s = 0.389
    assert not hottest(heatmap).any()
    assert hottest(heatmap, k=1.5).sum() == 2


def test_empty_and_constant_maps_hide_nothing_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hottest(torch.zeros(2, 4, 4)).any()
        assert not hottest(torch.full((2, 4, 4), 0.5)).any()


def test_accumulated_masks_keep_what_was_hidden(run, train):
    first = find_masks(run.erm.model, train.images[:200])[:]
    second = find_masks(run.erm.model, train.images[:200], hidden=Masks.of(first))[:]
    assert (second & first).sum() == first.sum()
    assert second.sum() > first.sum()


def test_hidden_pixels_are_black_and_the_others_untouched(train):
    images, masks = train.images[:50], torch.rand(50, 28, 28) < 0.3
    masked = pixels(images, masks)
    assert (masked.permute(0, 2, 3, 1)[masks] == 0).all()
    kept = ~masks[:, None].expand_as(masked)
    assert torch.equal(masked[kept], (images.float() / 255)[kept])


def test_random_masks_are_clipped_squares_from_seed_and_epoch():
    masks = random_masks(4000, 28, seed=1, epoch=7)[:]
    heights, widths = masks.any(2).sum(1), masks.any(1).sum(1)
    assert torch.equal(masks.sum((1, 2)), heights * widths)  # a filled rectangle
    inside = ~(masks[:, [0, -1]].any(2).any(1) | masks[:, :, [0, -1]].any(2).any(1))
    assert torch.equal(heights[inside], widths[inside])
    assert heights[inside].unique().tolist() == list(range(2, 15))
    assert masks.any(0).all()  # every pixel is hit by some
    assert torch.equal(masks, random_masks(4000, 28, seed=1, epoch=7)[:])
    assert not torch.equal(masks, random_masks(4000, 28, seed=1, epoch=8)[:])
    assert not torch.equal(masks, random_masks(4000, 28, seed=2, epoch=7)[:])


def test_random_masks_grow_with_the_image():
    masks = random_masks(4000, (56, 112), seed=1, epoch=7)[:]
    assert masks.shape == (4000, 56, 112)
    heights, widths = masks.any(2).sum(1), masks.any(1).sum(1)
    inside = ~(masks[:, [0, -1]].any(2).any(1) | masks[:, :, [0, -1]].any(2).any(1))
    assert torch.equal(heights[inside], widths[inside])
    assert heights[inside].unique().tolist() == list(range(4, 29))  # twice 2 to 14
    assert masks.any(0).all()
    assert masks.float().mean((0, 1))[28:-28].std() < 0.01  # as often on the left as on the right


def test_a_fine_tune_is_one_epoch_in_train_mode(run, train, setting, finetuned):
    """BatchNorm's counters move by the batches of one epoch, also when the model arrives in eval mode."""
    batches = -(-len(train) // setting.erm.batch_size)
    for state in finetuned.values():
        for before, after in zip(run.erm.model.modules(), state.model.modules(), strict=True):
            if hasattr(before, "num_batches_tracked"):
                assert after.num_batches_tracked - before.num_batches_tracked == batches
                assert not torch.equal(after.running_mean, before.running_mean)
    infer(run.erm.model, train.images[:10])
    model = copy.deepcopy(run.erm.model).eval()
    train_epoch(State(model, sgd(model, 0.9, 1e-4)), train.images[:64], train.labels[:64], lr=0.01, batch_size=32,
                seed=0)
    assert model.backbone[1].num_batches_tracked == run.erm.model.backbone[1].num_batches_tracked + 2


def test_masktune_trains_on_erms_images_under_their_masks(run, train, setting):
    """Recomputed by hand from ERM's weights, momentum and images, squares included; ERM's state is as before."""
    digest = run.erm.digest()
    masks = find_masks(run.erm.model, train.images)
    assert masks[train.squares][:, :4, :4].float().mean() > 0.9  # they find the squares
    assert masks.share() < 0.1
    assert run.finetuned.history["hidden"] == [masks.share()]
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
    """Masks in random places do less, and so does the epoch without masks."""
    test = stages.load_tests(setting)["malicious"]
    states = {"erm": run.erm, **finetuned}
    guesses = stages.predict(list(states.values()), {"malicious": test})["malicious"]
    right = dict(zip(states, (guesses == test.labels).double().mean(1).tolist(), strict=True))
    assert right["erm"] < 0.5
    assert right["masktune"] > right["erm"] + 0.2
    assert right["masktune"] > max(right["randmask"], right["plain"])
    assert finetuned["plain"].masks is None


def test_loss_is_that_of_the_masked_images(run, train):
    """With an LR of 0 an epoch's loss is the model's own on the masked batches."""
    model, masks = copy.deepcopy(run.erm.model), torch.rand(64, 28, 28) < 0.5
    loss, _ = train_epoch(State(model, sgd(model, 0, 0)), train.images[:64], train.labels[:64], masks=masks, lr=0.0,
                          batch_size=64, seed=0)
    twin = copy.deepcopy(run.erm.model).train()
    expected = F.cross_entropy(twin(pixels(train.images[:64], masks)), train.labels[:64]).item()
    assert loss == pytest.approx(expected, rel=1e-4)
