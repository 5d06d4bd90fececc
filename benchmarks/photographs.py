"""What photographs cost: ms an image for training and masks, and peak memory: `python -m benchmarks.photographs`.

Synthetic pixels, batches of 32, all threads; the weights are random, which changes no time.
"""

import time
from itertools import product

import torch

from benchmarks.memory import Memory
from benchmarks.page import measure_cases
from src.device import best_device, prepare
from src.experiments.stages import new_model
from src.masking import find_masks
from src.seeding import generator
from src.state import State
from src.training import sgd, train_epoch

MODELS, SIDES, PRECISIONS = ("mobilenet_v2", "ResNet50"), (112, 160, 224), ("fp32", "bf16")
CASES = [*product(MODELS, SIDES, PRECISIONS, ("channels last",)),
         *product(MODELS, (112, 224), ("fp32",), ("contiguous",))]
BATCH, IMAGES = 32, 96
REPEATS = 3  # of which the median counts


def measure(name: str, side: int, precision: str, layout: str) -> dict:
    """ms an image of an epoch and of its masks, which are always found in fp32, after a warm-up of each."""
    prepare()
    draw = generator(0, "photographs")
    images = torch.randint(256, (IMAGES, 3, side, side), dtype=torch.uint8, generator=draw).to(best_device())
    labels = torch.randint(2, (IMAGES,), generator=draw).to(best_device())
    model = new_model(0, name)  # ours have channels that come last; what masktune() is given is mostly contiguous
    if layout == "contiguous":
        model = model.to(memory_format=torch.contiguous_format)
    state = State(model, sgd(model.parameters(), 0.9, 1e-4))
    train, masks = [], []
    with Memory() as memory:
        for _ in range(1 + REPEATS):
            begun = time.perf_counter()
            find_masks(model, images, batch_size=BATCH)
            between = time.perf_counter()
            train_epoch(state, images, labels, lr=0.0, batch_size=BATCH, seed=0, precision=precision)
            state.finish_epoch()
            masks.append((between - begun) / IMAGES * 1000)
            train.append((time.perf_counter() - between) / IMAGES * 1000)
    return {"model": name, "side": side, "precision": precision, "layout": layout,
            "train_ms": sorted(train[1:])[REPEATS // 2], "masks_ms": sorted(masks[1:])[REPEATS // 2],
            "peak_mb": memory.host, "device_mb": memory.device}


if __name__ == "__main__":
    measure_cases("benchmarks.photographs", __doc__, CASES, measure)
