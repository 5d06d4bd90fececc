"""The classifiers. Each takes images (B, 3, H, W) as float in [0, 1] and names its saliency layer."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from .classifier import Classifier

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _conv_block(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, kernel_size=3), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]


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
    """A convolutional classifier of torchvision by its name: (B, 3, H, W) in [0, 1] -> (B, num_classes) logits.

    It normalises by itself. layer: to be explained; `weights` and errors are as of `fitted`.
    """

    def __init__(self, name: str, num_classes: int = 2, weights: str | Path | None = None, layer: str | None = None
                 ) -> None:
        model = torchvision.models.get_model(name, num_classes=num_classes)
        head = [part for part, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        super().__init__(fitted(model, name, weights, head), layer or "features", IMAGENET_MEAN, IMAGENET_STD)
        self.reading = nn.Identity()


class ResNet50(Backbone):
    """torchvision's ResNet-50; its saliency layer is the last residual block: (B, 2048, H / 32, W / 32)."""

    def __init__(self, num_classes: int = 2, weights: str | Path | None = None, layer: str | None = None) -> None:
        super().__init__("resnet50", num_classes, weights, layer or "layer4.2")


def fitted(model: nn.Module, name: str, weights: str | Path | None, head: str) -> nn.Module:
    """Return the model, which torchvision calls `name`, with weights loaded; as it is if these are None.

    weights: torchvision's name of some, such as "IMAGENET1K_V1", downloaded once; or a file with a state_dict, with or
    without BatchNorm's counters. If the last layer, called `head`, is another or missing, the model's own is kept.
    ValueError: weights cannot be read or downloaded, or are others; the message says which file to put where.
    """
    if weights is None:
        return model
    known = torchvision.models.get_model_weights(name).__members__
    url = known[weights].url if weights in known else None
    own = model.state_dict()
    counters = {part: value for part, value in own.items() if part.endswith("num_batches_tracked")}
    last = {part: value for part, value in own.items() if part.startswith(f"{head}.")}
    try:
        if url:
            content = torch.hub.load_state_dict_from_url(url, None, "cpu", progress=False, check_hash=True)
        else:
            content = torch.load(Path(weights).expanduser(), map_location="cpu", weights_only=True)
        found = counters | content
        if any(part not in found or found[part].shape != value.shape for part, value in last.items()):
            found |= last
        model.load_state_dict(found)
    except Exception as error:  # no network, no such file, one of anything, or weights of another model
        place = f"; put {url} into {torch.hub.get_dir()}/checkpoints" if url else ""
        raise ValueError(f"expected weights of torchvision's {name}, a file or one of {', '.join(known)}, got "
                         f"{str(weights)!r}: {type(error).__name__}: {str(error)[:500]}{place}") from error
    return model
