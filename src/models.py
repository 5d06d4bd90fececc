"""The classifiers. Each takes images (B, 3, H, W) as float in [0, 1] and names its saliency layer."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from .classifier import Classifier

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _conv_block(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, kernel_size=3), nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True)]


class SmallCNN(nn.Module):
    """The paper's network for MNIST: (B, 3, 28, 28) in [0, 1] -> (B, num_classes) logits; 149,202 parameters for 2.

    Parameter names and order are those of the official code, so weights published by it load strictly.
    """

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *_conv_block(3, 16), *_conv_block(16, 16), nn.MaxPool2d(2),  # 28 -> 26 -> 24 -> 12
            *_conv_block(16, 32), *_conv_block(32, 32), nn.MaxPool2d(2),  # 12 -> 10 -> 8 -> 4
            nn.Flatten(),
        )
        self.linear = nn.Sequential(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True),
                                    nn.Linear(256, num_classes))

    @property
    def saliency_layer(self) -> nn.Module:
        """The last ReLU before pooling: (B, 32, 8, 8)."""
        return self.backbone[12]

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, 28, 28):
            raise ValueError(f"SmallCNN: expected images (B, 3, 28, 28), got {tuple(images.shape)}")
        relu, pool = self.backbone[5], self.backbone[6]
        features = relu(pool(self.backbone[:5](images)))  # the maximum commutes with ReLU: so it has a quarter to do
        return self.linear(self.backbone[7:](features))


class ResNet32(nn.Module):
    """The ResNet-32 of CIFAR (He et al. 2016, section 4.2): (B, 3, H, W) in [0, 1] -> (B, num_classes) logits.

    464,154 parameters for 10 classes: its shortcuts have none (option A). H and W are at least 4, 32 in the paper; the
    saliency layer, the last residual block, is (B, 64, H / 4, W / 4). Nothing is normalised but by BatchNorm.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(
            *(BasicBlock(16, 16) for _ in range(5)),
            BasicBlock(16, 32, stride=2, downsample=_Shortcut()), *(BasicBlock(32, 32) for _ in range(4)),
            BasicBlock(32, 64, stride=2, downsample=_Shortcut()), *(BasicBlock(64, 64) for _ in range(4)))
        self.linear = nn.Linear(64, num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015

    @property
    def saliency_layer(self) -> nn.Module:
        return self.blocks[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.blocks(self.stem(images)).mean((2, 3)))


class _Shortcut(nn.Module):
    """Every other pixel, and as many channels again, of zeros."""

    def forward(self, features: Tensor) -> Tensor:
        return F.pad(features[:, :, ::2, ::2], (0, 0, 0, 0, 0, features.shape[1]))


class Backbone(Classifier):
    """A classifier of torchvision by its name: (B, 3, H, W) in [0, 1] -> (B, num_classes) logits, normalised inside.

    Args:
        name: as of `torchvision.models.get_model`, such as "mobilenet_v2".
        weights: as of `ResNet50`. A file may lack the last layer.
        layer: the saliency layer; that of `LAYERS`, the family's last block, if not given.

    Raises:
        ValueError, FileNotFoundError: as of `ResNet50`, or there is no such classifier.
    """

    LAYERS: ClassVar = {  # by how names begin
        "resnet": "layer4", "resnext": "layer4", "wide_resnet": "layer4", "mobilenet": "features",
        "efficientnet": "features", "squeezenet": "features", "densenet": "features", "vgg": "features",
        "alexnet": "features", "convnext": "features", "mnasnet": "layers", "regnet": "trunk_output",
        "shufflenet": "conv5", "googlenet": "inception5b", "inception": "Mixed_7c", "swin": "norm",
        "maxvit": "blocks.3"}

    def __init__(self, name: str, num_classes: int = 2, weights: str | Path | None = None, layer: str | None = None
                 ) -> None:
        known = torchvision.models.list_models(module=torchvision.models)
        layer = layer or next((value for start, value in self.LAYERS.items() if name.startswith(start)), None)
        if name not in known or layer is None:
            raise ValueError(f"expected a classifier of torchvision such as {', '.join(self.LAYERS)}, and a layer for "
                             f"those of other families, got {name!r}")
        quiet = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, num_classes=num_classes, **quiet)
        head = [part for part, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        if weights is not None:
            content = _read_weights(name, weights)
            model.load_state_dict(fitted(model, content, f"{head}.", str(weights)))
        super().__init__(model, layer, IMAGENET_MEAN, IMAGENET_STD)


class ResNet50(Classifier):
    """torchvision's ResNet-50: (B, 3, H, W) in [0, 1] -> (B, num_classes) logits. Normalisation is its first layer.

    Its saliency layer is the last residual block: (B, 2048, H / 32, W / 32).

    Args:
        weights: a torchvision weights name such as "IMAGENET1K_V1", downloaded once; or a file of such weights, with
            ImageNet's head, which is dropped, or one of num_classes, which is kept; None for random weights.

    Raises:
        ValueError: an unknown name that is no file either, or a file that is not of a ResNet-50.
        FileNotFoundError: the weights cannot be downloaded; the message says which file to put where.
    """

    def __init__(self, num_classes: int = 2, weights: str | Path | None = None) -> None:
        model = torchvision.models.resnet50()
        model.fc = nn.Linear(model.fc.in_features, num_classes)
        if weights is not None:
            model.load_state_dict(fitted(model, _read_weights("resnet50", weights), "fc.", str(weights)))
        super().__init__(model, "layer4.2", IMAGENET_MEAN, IMAGENET_STD)


def fitted(model: nn.Module, content: object, head: str, source: str) -> dict[str, Tensor]:
    """Return what a file of weights holds for a model, as its state_dict.

    Read are a state_dict, alone or under "state_dict" or "model", with "module." and the like before all names, without
    BatchNorm's counters, with another head or none: then the model's own is kept. What belongs to no part of the model
    is passed over, with a warning.

    Args:
        head: how the names of the last layer begin.
        source: names the file in errors.

    Raises:
        ValueError: weights are missing, of another shape, or more than the model has.
    """
    while isinstance(content, Mapping) and (inner := next((key for key in ("state_dict", "model", "model_state_dict")
                                                           if isinstance(content.get(key), Mapping)), None)):
        content = content[inner]
    if not isinstance(content, Mapping):
        raise ValueError(f"expected {source} to hold a dict of weights, got a {type(content).__name__}")
    own = model.state_dict()
    prefix = max(("", "module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."),
                 key=lambda prefix: sum(prefix + name in content for name in own))
    found = {name: content[prefix + name] for name in own if prefix + name in content}
    for name, value in own.items():
        optional = name.startswith(head) or name.endswith("num_batches_tracked")
        if name not in found and not optional:
            raise ValueError(f"expected {source} to hold {name} {tuple(value.shape)}, got {len(content)} other names")
        if name in found and found[name].shape != value.shape and not name.startswith(head):
            raise ValueError(f"expected {name} in {source} to be {tuple(value.shape)}, got {tuple(found[name].shape)}")
    if any(name not in found or found[name].shape != own[name].shape for name in own if name.startswith(head)):
        found = {name: value for name, value in found.items() if not name.startswith(head)}
    more = [name for name in content if name.removeprefix(prefix) not in own]
    parts = {name.split(".")[0] for name in own}
    if foreign := [name for name in more if name.removeprefix(prefix).split(".")[0] in parts]:
        raise ValueError(f"expected {source} to hold weights of this {type(model).__name__}, got {foreign[0]} and "
                         f"{len(foreign) - 1} more, as of a larger one")
    if more:
        warnings.warn(f"{source}: passed over what belongs to no part of the model: {', '.join(more[:5])}",
                      stacklevel=3)
    return own | found


def _read_weights(name: str, weights: str | Path) -> object:
    """What a file of weights of a model holds, or torchvision's weights of that name, which are downloaded once."""
    known = torchvision.models.get_model_weights(name).__members__
    if weights in known:
        url = known[weights].url
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        try:
            return torch.hub.load_state_dict_from_url(url, folder, "cpu", progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network; a file that is damaged
            raise FileNotFoundError(f"{name}: the weights {weights} are unavailable ({error}); get {url} and put it "
                                    f"into {folder}, or name the file as weights=") from error
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"expected weights to be a file or one of {', '.join(known)}, got {str(weights)!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any file can be named
        raise ValueError(f"{weights} holds no weights of torchvision's {name} ({type(error).__name__}: "
                         f"{str(error).splitlines()[0]})") from error
