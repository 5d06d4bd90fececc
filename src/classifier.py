"""Any classifier as the method takes it: images (B, 3, H, W) in [0, 1] in, logits (B, classes) out."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


class Classifier(nn.Module):
    """A model of yours, its saliency layer named, its normalisation inside, its outputs brought to one form.

    Args:
        model: takes (B, 3, H, W), or where it cannot take that (B, 1, H, W), and gives logits: see `logits_of`. It
            is wrapped, not copied; what DataParallel, DDP or torch.compile put around it is left out.
        layer: the module to be explained, or its name as in `model.named_modules()`: see `layers.suggest_layers`.
        mean, std: of each channel, for a model that expects normalised images; if not given, those that a model of timm
            names in its `pretrained_cfg`, else nothing is normalised.
        reshape_transform: makes maps (B, K, h, w) of the layer's output, as in the grad-cam library, if need be.

    Raises:
        ValueError: the model has no such layer, or mean and std are not of images in [0, 1].
    """

    def __init__(self, model: nn.Module, layer: str | nn.Module | None, mean: Sequence[float] | None = None,
                 std: Sequence[float] | None = None, reshape_transform: Callable[[Tensor], Tensor] | None = None
                 ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be a torch.nn.Module, got a {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule) or type(model).__module__.startswith("torch.export"):
            raise TypeError("expected a model in Python, got one that was scripted, traced or exported; load its "
                            "weights into the class that it was made of")
        model = unwrapped(model)
        names = [name for name, _ in model.named_modules() if name]
        layer = next((name for name, part in model.named_modules() if part is layer), layer)
        if layer is not None and layer not in names:
            raise ValueError(f"expected layer to name a module of {type(model).__name__}, got {layer!r}; it has "
                             f"{', '.join(names[:9])}, ...; suggest_layers(model, images) lists good ones")
        if (mean is None) != (std is None):
            raise ValueError(f"expected mean and std, or neither, got {mean=} and {std=}")
        if isinstance(model, Classifier) and mean is not None:
            raise ValueError("expected mean and std once, got them beside a Classifier, which normalises by its own")
        if mean is None:
            known = getattr(model, "pretrained_cfg", None)
            mean, std = [known["mean"], known["std"]] if isinstance(known, dict) and "mean" in known else [(0,), (1,)]
        mean, std = (torch.as_tensor(values, dtype=torch.float32).flatten() for values in (mean, std))
        if not ({len(mean), len(std)} <= {1, 3} and 0 <= mean.min() <= mean.max() <= 1 and std.min() > 0
                and std.max() <= 1):
            raise ValueError("expected mean in [0, 1] and std in (0, 1], one of each channel, for images in [0, 1]; "
                             f"got mean={mean.tolist()}, std={std.tolist()}")
        self.model, self.layer, self.reshape_transform = model, layer, reshape_transform
        self.reading: Callable[[Tensor], Tensor] | None = None  # how the layer is read, once it is tested: see `reader`
        self.grey: bool | None = None  # whether it takes one channel: tried at the first call
        self.training = model.training
        self.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(-1, 1, 1), persistent=False)

    @property
    def saliency_layer(self) -> nn.Module | None:
        return None if self.layer is None else self.model.get_submodule(self.layer)

    def forward(self, images: Tensor) -> Tensor:
        inputs = (images - self.mean) / self.std
        # in the layout of its weights: channels that come last are faster, but not all can work on them, and torch's
        # backward pass of a 1x1 convolution with stride 2 on 3 to 12 such channels corrupts the memory of a CPU
        kernel = next((weight for weight in self.model.parameters() if weight.dim() == 4), None)
        inputs = inputs.contiguous() if kernel is None or kernel.is_contiguous() else inputs
        dtype = next((weight.dtype for weight in self.model.parameters() if weight.is_floating_point()), inputs.dtype)
        logits = logits_of(self._called(inputs.to(dtype)), self.training)
        if len(logits) != len(images):
            raise ValueError(f"expected logits of {len(images)} images, got {len(logits)}: the model squeezes a batch "
                             "of one image, or joins images; flatten(1) keeps the batch")
        return logits

    def _called(self, inputs: Tensor) -> object:
        if self.grey is not None:
            return self.model(inputs[:, :1] if self.grey else inputs)
        try:
            output, self.grey = self.model(inputs), False
        except RuntimeError as coloured:
            try:
                output, self.grey = self.model(inputs[:, :1]), True
            except RuntimeError:
                raise coloured from None
        return output


def logits_of(output: object, training: bool = False) -> Tensor:
    """Return the logits (B, classes) in what a model gives.

    That is a tensor (B, classes) or (B, classes, 1, 1); one logit of the second class, (B,) or (B, 1), which becomes
    two of the same sigmoid; a dict or an object with `logits`, as of Hugging Face; or a tuple with one tensor of these
    shapes. In train mode a tuple may hold several of one shape, as with auxiliary heads: the first counts.
    ValueError: it is none of these, or could be read in two ways.
    """
    output = output["logits"] if isinstance(output, dict) and "logits" in output else getattr(output, "logits", output)
    if isinstance(output, (tuple, list)):
        found = [part for part in output if _is_logits(part)]
        if not found or (len(found) > 1 and not (training and len({part.shape for part in found}) == 1)):
            raise ValueError(f"expected one tensor of logits in the model's {type(output).__name__}, got "
                             f"{', '.join(map(_described, output))}; wrap the model so that it gives its logits alone")
        output = found[0]
    if not _is_logits(output):
        raise ValueError(f"expected logits (B, classes) of the model, or something with `logits`, got "
                         f"{_described(output)}")
    logits = output.flatten(1) if output.dim() > 1 else output[:, None]
    if logits.shape[1] == 1:  # softmax of (-z / 2, z / 2) is the sigmoid of z
        logits = torch.cat([-logits / 2, logits / 2], 1)
    return logits.float()


def _is_logits(output: object) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and (
        output.dim() in (1, 2) or (output.dim() == 4 and output.shape[2:] == (1, 1)))


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"{output.dtype} {tuple(output.shape)}"
    return f"a {type(output).__name__}" + (f" of {', '.join(map(str, output))}" if isinstance(output, dict) else "")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what runs it on several devices or compiles it."""
    # among its own modules: hasattr would see through a wrapper that passes on what it lacks
    while isinstance(model, (DataParallel, DistributedDataParallel)) or "_orig_mod" in model._modules:
        model = model._modules.get("_orig_mod", model._modules.get("module"))
    return model


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, also of one that keeps what it has computed; ValueError if it cannot be copied otherwise."""
    kept = [tensor for part in model.modules() for tensor in _tensors(vars(part))]
    # an activation, or the weight that weight_norm computes at each call
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # a module can hold anything: locks, files, loggers
        raise ValueError(f"expected a model that copy.deepcopy can copy; it says {type(error).__name__}: {error}; "
                         "build it anew and load its state_dict into that") from error


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
