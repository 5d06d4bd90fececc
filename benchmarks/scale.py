"""Time and memory against the number and the size of images, on synthetic pixels: `python -m benchmarks.scale`."""

import time

import torch

from benchmarks.memory import Memory
from benchmarks.page import measure_cases
from src.device import best_device, prepare
from src.experiments.stages import new_model
from src.masking import find_masks
from src.seeding import generator
from src.state import State
from src.training import sgd, train_epoch

CASES = [("SmallCNN", n, 28) for n in (1_000, 10_000, 60_000, 600_000)] + [
    ("ResNet50", n, side) for n, side in ((320, 28), (320, 64), (64, 224))]  # (model, images, pixels a side)
BATCH = {"SmallCNN": 128, "ResNet50": 32}


def measure(name: str, n: int, side: int) -> dict:
    """Seconds of the masks of n images and of one epoch on them, and the MB beyond those of a warm-up of two batches.

    So the memory of a batch is not counted, and what grows with n is.
    """
    prepare()
    draw = generator(0, "scale")
    images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=draw).to(best_device())
    labels = torch.randint(2, (n,), generator=draw).to(best_device())
    model = new_model(0, name)
    state = State(model, sgd(model.parameters(), 0.9, 1e-4))
    few = min(n, 2 * BATCH[name])
    train_epoch(state, images[:few], labels[:few], lr=0.0, batch_size=BATCH[name], seed=0)
    find_masks(model, images[:few], batch_size=BATCH[name])
    state.finish_epoch()
    with Memory() as memory:
        begun = time.perf_counter()
        masks = find_masks(model, images, batch_size=BATCH[name])
        between = time.perf_counter()
        train_epoch(state, images, labels, masks=masks, lr=0.0, batch_size=BATCH[name], seed=0)
        done = time.perf_counter()
    return {"model": name, "images": n, "side": side, "images_mb": images.nbytes / 1e6, "masks_s": between - begun,
            "epoch_s": done - between, "peak_mb": memory.host, "device_mb": memory.device}


if __name__ == "__main__":
    measure_cases("benchmarks.scale", __doc__, CASES, measure)
