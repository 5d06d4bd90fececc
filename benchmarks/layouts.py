"""Which layers are taken for maps of the image, on models of timm and Hugging Face: `python -m benchmarks.layouts`.

All weights are random, and models are small or cut short, which leaves their kinds of layers. The truth is known by
construction: each model is built for images of three sizes, H x W, 2H x W and H x 2W. In a true map, one axis grows
with the height alone and the next with the width alone: (B, K, h, w) or (B, h, w, K); of tokens, one axis doubles with
either, but for a constant prefix: (B, P + h w, K). Other outputs that could still be read as maps are decoys: attention
matrices (fused attention is turned off), queries and keys, patches within a map, tokens that come last. So are the
tokens of Hiera, in the order of its units, and each true map once its tokens are put into such an order, or column by
column. What `src.layout` passes over, such as layers that are called twice, counts here as little, and maps of less
than 4x4 do not, either.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.page import publish
from src import layout
from src.experiments.rows import measured
from src.layers import SMALLEST

RESULTS = Path(__file__).parents[1] / "results" / "layouts.csv"
MOST = 16  # maps and decoys of a model that are tested, spread evenly from its first layer to its last
SHORT = {"depth": 3}
TIMM = {  # pixels a side, which all strides divide, and options
    "resnet18": (64, {}), "resnet50": (64, {}), "resnext50_32x4d": (64, {}), "densenet121": (64, {}),
    "repvgg_a0": (64, {}), "mobileone_s0": (64, {}), "fastvit_t8": (128, {}), "mobilenetv2_100": (64, {}),
    "mobilenetv3_small_100": (64, {}), "efficientnet_b0": (64, {}), "ghostnet_100": (64, {}), "regnety_002": (64, {}),
    "inception_v3": (128, {}), "convnext_atto": (64, {}), "poolformer_s12": (64, {}), "edgenext_xx_small": (64, {}),
    "mobilevit_xxs": (128, {}), "mobilevitv2_050": (128, {}), "efficientformerv2_s0": (128, {}),
    "levit_128s": (256, {}), "maxvit_rmlp_pico_rw_256": (128, {}), "coatnet_nano_rw_224": (128, {}),
    "vit_tiny_patch16_224": (128, SHORT | {"qk_norm": True}), "vit_small_patch8_224": (64, SHORT),
    "vit_small_patch14_reg4_dinov2": (112, SHORT), "deit_tiny_distilled_patch16_224": (128, SHORT),
    "beit_base_patch16_224": (128, SHORT | {"embed_dim": 192}), "eva02_tiny_patch14_224": (112, SHORT),
    "cait_xxs24_224": (128, SHORT), "xcit_nano_12_p16_224": (128, {}), "mixer_s16_224": (128, {}),
    "swin_tiny_patch4_window7_224": (224, {"depths": (1, 1, 2, 1), "embed_dim": 48}),
    "hiera_tiny_224": (224, {"stages": (1, 1, 2, 1), "embed_dim": 48, "num_heads": 1}),
    "tnt_s_patch16_224": (128, SHORT), "pvt_v2_b0": (128, {})}
BLOCKS = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
STAGES = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1]}
HUGGING_FACE = {
    "vit": (128, BLOCKS), "deit": (128, BLOCKS | {"architectures": ["DeiTForImageClassification"]}),
    "beit": (128, BLOCKS), "dinov2": (112, BLOCKS | {"patch_size": 14, "image_size": 112}),
    "swin": (224, {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}), "convnext": (64, STAGES),
    "mobilevit": (128, {}), "segformer": (128, STAGES), "resnet": (64, STAGES | {"embedding_size": 16})}
MODELS = {"timm": TIMM, "Hugging Face": HUGGING_FACE}


def built(library: str, name: str, size: tuple[int, int]) -> nn.Module:
    """A model for images of (height, width) pixels, whose weights are random, also those that would begin at 0."""
    torch.manual_seed(0)
    if library == "timm":
        import timm
        timm.layers.set_fused_attn(False)
        try:
            model = timm.create_model(name, img_size=size, **TIMM[name][1])
        except TypeError:  # images of any size
            model = timm.create_model(name, **TIMM[name][1])
    else:
        import transformers
        config = transformers.AutoConfig.for_model(name, **{"image_size": size, **HUGGING_FACE[name][1]})
        model = transformers.AutoModelForImageClassification.from_config(config, attn_implementation="eager")
    for key, weight in model.named_parameters():
        if "bias" not in key and weight.abs().max() < 1e-2:  # of a last norm, or the scale of a layer
            nn.init.normal_(weight, std=0.5)
    return model.eval().requires_grad_(False)


def outputs(library: str, name: str, size: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs of all modules by name, and the images they are of."""
    model, images = built(library, name, size), layout.probe(size, torch.device("cpu")).requires_grad_()
    return layout.outputs_of(model, {key: part for key, part in model.named_modules() if key}, images)[0], images


def true_reading(shape: torch.Size, tall: torch.Size, wide: torch.Size) -> str | None:
    """Which reading of the first of three shapes is right, by what grows with height and with width; see above."""
    grown = ["".join(side for side, now in zip("hw", axis[1:], strict=True) if now > axis[0])
             for axis in list(zip(shape, tall, wide, strict=True))[1:]]
    if grown == ["hw", ""]:
        prefix = 2 * shape[1] - tall[1]
        return f"(B, {prefix} + h w, K)" if prefix else "(B, h w, K)"
    return {("", "h", "w"): "(B, K, h, w)", ("h", "w", ""): "(B, h, w, K)"}.get(tuple(grown))


def disordered(maps: Tensor) -> list[Tensor]:
    """Maps (B, K, h, w) as tokens (B, h w, K) in two orders that are wrong: column by column, and as Hiera's units."""
    found = [maps.transpose(2, 3)]
    if not (maps.shape[2] % 2 or maps.shape[3] % 2):
        found.append(nn.functional.pixel_unshuffle(maps, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(3)
                     .transpose(1, 2))
    return [one.flatten(2).transpose(1, 2) for one in found]


def measure(condition: dict) -> dict:
    """How many maps and decoys of a model are told right; the other maps are refused or misread."""
    library, name, side = condition["library"], condition["model"], condition["side"]
    made, images = outputs(library, name, (side, side))
    tall, wide = ({key: one.shape for key, one in outputs(library, name, size)[0].items()}
                  for size in ((2 * side, side), (side, 2 * side)))
    maps, decoys = {}, {}
    for key in [key for key in made if key in tall and key in wide]:  # others have one window at one size
        output = made[key]
        if possible := layout.readings(output, (side, side)):
            true = true_reading(output.shape, tall[key], wide[key])
            if name.startswith("hiera") and key.startswith("blocks") and output.shape[1] > (side // 32) ** 2:
                true = None
            if true not in possible:
                decoys[key] = output
            elif min(possible[true](output).shape[2:]) >= SMALLEST:
                maps[key] = true
    maps, decoys = ({key: some[key] for key in list(some)[::-(-len(some) // MOST) or 1]} for some in (maps, decoys))
    told = {key: (layout.reading_of(made[key], images) or [None])[0] for key in maps}
    for key, true in maps.items():
        ordered = layout.readings(made[key], (side, side))[true](made[key])
        decoys |= {f"{key}, order {i}": tokens for i, tokens in enumerate(disordered(ordered))}
    taken = {key: found[0] for key, output in decoys.items() if (found := layout.reading_of(output, images))}
    wrong = {key: reading for key, reading in told.items() if reading not in (None, maps[key])}
    return {"maps": len(maps), "read": sum(told[key] == true for key, true in maps.items()),
            "refused": sum(reading is None for reading in told.values()), "misread": len(wrong),
            "decoys": len(decoys), "decoys_misread": len(taken),
            "what": "; ".join(f"{key}: {reading}" for key, reading in (wrong | taken).items())}


if __name__ == "__main__":
    conditions = []
    for library, module in (("timm", "timm"), ("Hugging Face", "transformers")):
        if importlib.util.find_spec(module):
            conditions += [{"library": library, "model": name, "side": MODELS[library][name][0]}
                           for name in MODELS[library]]
        else:
            print(f"{module} is absent: its models are left out")
    print(measured(RESULTS, conditions, measure).drop(columns="made_with").to_string())
    publish()
