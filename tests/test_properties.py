"""Properties that hold for every input, sought by hypothesis."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from src.datasets.spurious import SQUARE, SpuriousSquare
from src.masking import hottest
from src.masks import Masks
from src.state import digest
from src.training import epoch_batches
from tests.miniature import wrong

settings.register_profile("quick", max_examples=50, deadline=None)
settings.load_profile("quick")

digits = hnp.arrays(np.int64, st.integers(0, 300), elements=st.integers(0, 9)).map(torch.from_numpy)
ratios = st.floats(0, 1)
orders = st.sampled_from(["random", "digit"])
seeds = st.integers(-2 ** 40, 2 ** 40)


@given(digits, ratios, orders, seeds, st.sampled_from([None, "raw", "malicious"]), st.data())
def test_a_square_is_the_only_change_and_groups_tell_it(digits, ratio, order, seed, test_set, data):
    shape = (len(digits), 28, 28)
    grey = torch.from_numpy(data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255), fill=st.just(9))))
    built = SpuriousSquare(grey, digits, test_set is None, test_set, ratio, order, seed)
    outside = torch.ones(28, 28, dtype=torch.bool)
    outside[:SQUARE, :SQUARE] = False
    assert torch.equal(built.images[:, :, outside], grey[:, None].expand(-1, 3, -1, -1)[:, :, outside])
    corner = built.images[:, :, :SQUARE, :SQUARE]
    assert (corner[built.squares] == torch.tensor([0, 0, 255]).view(3, 1, 1)).all()
    assert torch.equal(corner[~built.squares, 0], grey[~built.squares, :SQUARE, :SQUARE])
    assert torch.equal(built.groups, 2 * (digits >= 5).long() + built.squares)
    if test_set is not None:
        assert torch.equal(built.squares, (digits >= 5) & (test_set == "malicious"))
        return
    for members in (digits < 5, digits >= 5):  # the share is exact in each class
        assert wrong(built)[members].sum() == round(ratio * int(members.sum()))


maps = hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
                  elements=st.floats(0, 1, width=16)).map(torch.from_numpy)


@given(maps, st.floats(0, 3, width=16))
def test_the_threshold_is_that_of_the_paper(maps, k):
    """Against NumPy in double precision, one image after the other; ties with the threshold are left open."""
    hidden = hottest(maps, k)
    for one, mask in zip(maps.double().numpy(), hidden.numpy(), strict=True):
        positive = one[one > 0]
        if len(positive) == 0:
            assert not mask.any()
            continue
        distance = one - (positive.mean() + k * positive.std())
        clear = np.abs(distance) > 1e-5
        assert (mask[clear] == (distance[clear] > 0)).all()
        assert not mask[one == 0].any()


@given(st.integers(1, 500), st.integers(1, 200), seeds, st.integers(0, 1000), st.integers(0, 9))
def test_an_epoch_visits_every_image_once(n, batch_size, seed, epoch, order):
    batches = epoch_batches(n, batch_size, seed, epoch, order)
    assert torch.cat(batches).sort().values.tolist() == list(range(n))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert len(batches[-1]) <= batch_size + 1
    assert len(batches[-1]) > 1 or n == 1 or batch_size == 1


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=11)), st.data())
def test_masks_as_bits_are_the_masks(masks, data):
    masks = torch.from_numpy(masks)
    packed = Masks.of(masks)
    assert torch.equal(packed[:], masks)
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(masks) - 1), min_size=1)))
    assert torch.equal(packed[index], masks[index])
    assert packed.bits.numel() == len(masks) * -(-masks[0].numel() // 8)
    assert packed.share() == masks.double().mean()
    assert digest(packed) == digest(masks)
