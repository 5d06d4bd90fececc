"""Models and data of other libraries, end to end: Hugging Face, timm and MedMNIST, offline and with random weights.

transformers and medmnist are no requirements: where they are absent, their tests are skipped.
"""

import os
import subprocess
import sys

import numpy
import pytest
import timm
import torch

from src import load_dataset, masktune, suggest_layers
from tests.conftest import REPOSITORY
from tests.strangers import Net, equal, images

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:the model is right on only:UserWarning")]
BLOCKS = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
HUGGING_FACE = {  # the class, its configuration, the layer suggested first
    "ViT": (BLOCKS | {"patch_size": 16}, "vit.layers.1"),
    "Swin": ({"patch_size": 4, "embed_dim": 24, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 4},
             "swin.layernorm"),
    "ConvNext": ({"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1]}, "convnext.encoder.stages.2")}
PROGRAM = """
import sys
import timm
import torch
from src import masktune, suggest_layers
from tests.strangers import images
torch.set_num_threads(1)
torch.manual_seed(0)
name, side = sys.argv[1], int(sys.argv[2])
model, data = timm.create_model(name, num_classes=2), images(40, side)
layer, _ = suggest_layers(model, data.images)[0]
report = masktune(model, data, layer=layer, lr=0.01, batch_size=20)[1]
print("repaired", report.after.keys())
"""


def assert_repaired(model: torch.nn.Module, side: int, layer: str) -> None:
    data, given = images(40, side), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert (layer, (4, 4)) in suggest_layers(model, data.images)
    repaired, report = masktune(model, data, layer=layer, lr=0.01, batch_size=20, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert type(repaired) is type(model)
    assert 0.001 < report.hidden < 0.2
    assert report.masks.untouched() < 0.5
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
    assert not equal(repaired, model)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name):
    transformers = pytest.importorskip("transformers", reason="transformers is absent: no model of Hugging Face")
    options, layer = HUGGING_FACE[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=2, image_size=64, **options)
    assert_repaired(getattr(transformers, f"{name}ForImageClassification")(config), 64, layer)


def test_a_class_token_and_one_of_distillation():
    torch.manual_seed(0)
    assert_repaired(timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=3, num_classes=2), 64,
                    "blocks.1")


@pytest.mark.parametrize(("name", "side"), [("repvgg_a0", 64), ("mobileone_s0", 64), ("fastvit_t8", 128)])
def test_what_torch_crashes_on_lives(name, side):
    """Their 1x1 convolutions with stride 2 corrupt a CPU's memory where channels come last: a fault of torch."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, name, str(side)], cwd=REPOSITORY, text=True,
                          capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"  # -11: killed
    assert done.stdout.startswith("repaired")


def test_medmnist(tmp_path):
    """Its labels are arrays of one number, its images grey."""
    medmnist = pytest.importorskip("medmnist", reason="medmnist is absent")
    draw = numpy.random.default_rng(0)
    parts = {f"{part}_{kind}": made for part, n in medmnist.INFO["breastmnist"]["n_samples"].items() for kind, made in (
        ("images", draw.integers(0, 256, (n, 28, 28), numpy.uint8)), ("labels", numpy.arange(n)[:, None] % 2))}
    numpy.savez(tmp_path / "breastmnist.npz", **parts)
    data = medmnist.BreastMNIST(split="train", root=str(tmp_path))
    assert isinstance(data[1][1], numpy.ndarray)
    loaded = load_dataset(data)
    assert loaded.labels.tolist() == parts["train_labels"][:, 0].tolist()
    assert torch.equal(loaded.images, torch.from_numpy(parts["train_images"])[:, None].expand(-1, 3, -1, -1))
    assert masktune(Net(), data, layer="f", lr=0.01)[1].before["train"].average > 0
