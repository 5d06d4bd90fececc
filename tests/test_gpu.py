"""On a real GPU, with `python -m pytest -m gpu`: the notebook's stages, and masktune() on a network of one's own."""

from dataclasses import replace

import pytest
import torch
import torchvision

from src.datasets.images import Images
from src.device import room_for
from src.experiments import stages
from src.experiments.recipes import Places
from src.inference import accuracy
from src.masking import find_masks
from src.repair import masktune
from tests.conftest import same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_the_stages_of_the_notebook(setting, tmp_path):
    first, again = (stages.run(Places(tmp_path), setting, seed=0) for _ in range(2))
    assert next(first.finetuned.model.parameters()).is_cuda
    assert same(first.finetuned.model, again.finetuned.model)  # loaded
    anew = stages.run(Places(tmp_path / "anew"), setting, seed=0)
    assert same(first.finetuned.model, anew.finetuned.model)  # deterministic
    train = stages.load_data(Places(), setting.erm)
    images = train.images.to(room_for(train.images))
    assert images.is_cuda
    there, here = find_masks(first.erm.model, images), find_masks(first.erm.model.cpu(), train.images)
    assert (there[:].cpu() == here[:]).double().mean() > 0.999
    malicious = stages.load_tests(Places(), setting)["malicious"]
    before, after = (accuracy(state.model, malicious.images, malicious.labels) for state in (anew.erm, anew.finetuned))
    assert after > before


@pytest.mark.filterwarnings("ignore:the model is right on only")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_of_ones_own_is_repaired(precision):
    draw = torch.Generator().manual_seed(0)
    data = Images(torch.randint(0, 256, (64, 3, 128, 128), dtype=torch.uint8, generator=draw),
                  torch.randint(0, 2, (64,), generator=draw), ("a", "b"))
    model = torchvision.models.resnet18(num_classes=2)
    options = dict(layer="layer4", lr=1e-3, batch_size=16, precision=precision, holes="transplants")
    repaired, report = masktune(model, data, tests={"test": replace(data)}, **options)
    again, _ = masktune(model, data, tests={"test": replace(data)}, **options)
    assert same(repaired, again)
    assert not next(repaired.parameters()).is_cuda  # as it was given
    assert 0 < report.hidden < 0.5
