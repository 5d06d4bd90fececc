"""The classifiers. Each takes images (B, 3, H, W) as float in [0, 1] and names its saliency layer."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


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


class Classifier(nn.Module):
    """Any classifier as the method takes it: images (B, 3, H, W) in [0, 1] in, its saliency layer named.

    Args:
        model: takes (B, 3, H, W), gives (B, classes) logits. It is wrapped, not copied.
        layer: the name of the module whose (B, K, h, w) output is explained, as in `model.named_modules()`; usually the
            last convolutional block, such as "layer4" of a torchvision ResNet or "features" of a MobileNet.
        mean, std: of each channel, for a model that expects normalised images; nothing is normalised here if not given.

    Raises:
        ValueError: the model has no such layer; the message lists those that it has.
    """

    def __init__(self, model: nn.Module, layer: str, mean: Sequence[float] = (0, 0, 0),
                 std: Sequence[float] = (1, 1, 1)) -> None:
        super().__init__()
        names = [name for name, _ in model.named_modules() if name]
        if layer not in names:
            raise ValueError(f"expected layer to name a module of {type(model).__name__}, got {layer!r}; it has "
                             f"{', '.join(names)}")
        self.model, self.layer = model, layer
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    @property
    def saliency_layer(self) -> nn.Module:
        return self.model.get_submodule(self.layer)

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


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
            state = _resnet50_weights(weights)
            if len(state["fc.bias"]) != num_classes:  # ImageNet's thousand classes
                state |= {"fc.weight": model.fc.weight, "fc.bias": model.fc.bias}
            model.load_state_dict(state)
        super().__init__(model, "layer4.2", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # ImageNet's


def _resnet50_weights(weights: str | Path) -> dict[str, Tensor]:
    known = torchvision.models.ResNet50_Weights.__members__
    if weights in known:
        url = known[weights].url
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        try:
            return torch.hub.load_state_dict_from_url(url, folder, "cpu", progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network; a file that is damaged
            raise FileNotFoundError(f"ResNet50: the weights {weights} are unavailable ({error}); get {url} and put it "
                                    f"into {folder}, or name the file as weights=") from error
    if not Path(weights).is_file():
        raise ValueError(f"expected weights to be a file or one of {', '.join(known)}, got {str(weights)!r}")
    try:
        state = dict(torch.load(weights, map_location="cpu", weights_only=True))
        expected = {name: value.shape for name, value in torchvision.models.resnet50().state_dict().items()}
        for name, shape in expected.items():
            if not name.startswith("fc.") and state[name].shape != shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)}")
        return state
    except Exception as error:  # any file can be named
        raise ValueError(f"{weights} holds no weights of torchvision's ResNet-50 ({type(error).__name__}: "
                         f"{str(error).splitlines()[0]})") from error
