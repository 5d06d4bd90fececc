import torch

from benchmarks.speed import Ours, Usual
from src.datasets import load
from src.experiments.stages import new_model


def test_both_sides_of_the_benchmark_do_the_same_work(mnist_root):
    """Same batches in the same order: the same loss, masks and accuracy, so that only the time differs."""
    data, tests = load("SpuriousMNIST", root=mnist_root), load("SpuriousMNIST", "malicious", root=mnist_root)
    usual, ours = Usual(mnist_root, data, tests, n=300, workers=0), Ours(data, tests, n=300)
    model = new_model(0)
    losses = [side.epoch(new_model(0)) for side in (usual, ours)]
    assert abs(losses[0] - losses[1]) < 1e-3
    ours.epoch(model)
    ours_masks, usual_masks = ours.find_masks(model)[:], torch.from_numpy(usual.find_masks(model))
    assert ours_masks.any()
    assert (ours_masks == usual_masks).double().mean() > 0.999
    losses = [side.epoch(new_model(0), masks) for side, masks in ((usual, usual_masks.numpy()), (ours, ours_masks))]
    assert abs(losses[0] - losses[1]) < 1e-3
    ours.tests, ours.test_labels = ours.tests[:500], ours.test_labels[:500]
    assert 0 <= ours.evaluate(model) <= 1
