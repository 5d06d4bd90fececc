"""What `masktune()` costs beside its epoch, with a ResNet-50 on 200 photographs: `python -m benchmarks.door`.

Synthetic pixels of 224 a side, random weights, one thread: seconds until the epoch begins, of the epoch, and after it.
"""

import math
import time
import warnings

import torch
import torchvision

from benchmarks.page import measure_cases
from src.datasets import Images
from src.device import cpu_threads
from src.repair import masktune
from src.seeding import generator

IMAGES, SIDE, BATCH = 200, 224, 32


def measure() -> dict:
    """Seconds of the three parts; an augmentation that changes nothing tells when a batch of the epoch comes."""
    draw = generator(0, "door")
    data = Images(torch.randint(256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw),
                  torch.randint(2, (IMAGES,), generator=draw), ("a", "b"))
    model, batches = torchvision.models.resnet50(num_classes=2), []

    def noted(images: torch.Tensor) -> torch.Tensor:
        batches.append(time.perf_counter())
        return images

    warnings.simplefilter("ignore")  # random weights know nothing
    begun = time.perf_counter()
    masktune(model, data, layer="layer4", lr=1e-3, batch_size=BATCH, augment=noted)
    done = time.perf_counter()
    steps = math.ceil(IMAGES / BATCH)
    first, *_, last = batches[-steps:]
    step = (last - first) / (steps - 1)
    return {"images": IMAGES, "before the epoch, s": first - begun, "epoch, s": last - first + step,
            "after it, s": done - last - step, "in all, s": done - begun}


if __name__ == "__main__":
    with cpu_threads(1):  # of this process, which names them, and of the one that measures
        measure_cases("benchmarks.door", __doc__, [()], measure)
