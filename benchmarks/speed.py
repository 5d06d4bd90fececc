"""Time the usual pipeline and ours side by side, on the same device, weights and data: `python -m benchmarks.speed`.

The usual pipeline is what most code of this field does: torchvision's data set, a DataLoader with workers that makes
each image anew, the grad-cam library on NumPy, an optimizer that is not fused, `.item()` at every step.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytorch_grad_cam import XGradCAM
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from benchmarks.memory import Memory, in_own_process
from benchmarks.page import RESULTS, publish
from src.datasets import SQUARE, SpuriousMNIST
from src.device import best_device, keep_freed_memory, made_with, prepare
from src.experiments.recipes import MNIST, Places
from src.experiments.stages import load_data, new_model, run_erm
from src.files import write_whole
from src.inference import accuracy, infer
from src.masking import find_masks
from src.masks import Masks
from src.seeding import generator
from src.state import State
from src.training import epoch_batches, sgd, train_epoch

SETTING = MNIST[1]
BATCH, LR, MOMENTUM, WEIGHT_DECAY = 128, 0.01, 0.9, 1e-4
PICTURES, PICTURE_BATCH = 64, 32  # synthetic photographs of 224 pixels a side, for ResNet50
BLUE = (0, 0, 255)
MEMORY = ("usual", "ours", "usual, ResNet50", "ours, ResNet50")  # of the four tasks; of the photographs' masks


class UsualDataset(Dataset):
    """torchvision's MNIST, each image decoded, coloured, given its square and made a tensor when it is asked for."""

    def __init__(self, root: Path, train: bool, squares: Tensor, masks: np.ndarray | None = None) -> None:
        for file in (root / "MNIST" / "raw").glob("*.gz"):  # torchvision reads them unpacked
            if not file.with_suffix("").exists():
                write_whole(file.with_suffix(""), gzip.decompress(file.read_bytes()))
        self.mnist = torchvision.datasets.MNIST(root, train=train)
        self.squares, self.masks = squares.tolist(), masks

    def __len__(self) -> int:
        return len(self.mnist)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, digit = self.mnist[index]
        image = image.convert("RGB")
        if self.squares[index]:
            image.paste(BLUE, (0, 0, SQUARE, SQUARE))
        if self.masks is not None:
            pixels = np.array(image)
            pixels[self.masks[index]] = 0
            image = Image.fromarray(pixels)
        return to_tensor(image), int(digit >= 5)


class Usual:
    """The four tasks as the usual pipeline does them; batches in the order of ours, so that the results compare."""

    def __init__(self, root: Path, data: SpuriousMNIST, tests: SpuriousMNIST, n: int, workers: int) -> None:
        self.root, self.data, self.tests, self.n, self.workers = root, data, tests, n, workers

    def batches(self, train: bool = True, masks: np.ndarray | None = None, shuffled: bool = True
                ) -> Iterator[tuple[Tensor, Tensor]]:
        data = UsualDataset(self.root, train, (self.data if train else self.tests).squares, masks)
        n = self.n if train else len(data)
        order = epoch_batches(n, BATCH, 0, 0) if shuffled else torch.arange(n).split(BATCH)
        loader = DataLoader(data, batch_sampler=[index.tolist() for index in order], num_workers=self.workers)
        for images, labels in loader:
            yield images.to(best_device()), labels.to(best_device())

    def epoch(self, model: nn.Module, masks: np.ndarray | None = None) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        model.train()
        total = 0.0
        for images, labels in self.batches(masks=masks):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        return total / self.n

    def find_masks(self, model: nn.Module, pictures: Tensor | None = None) -> np.ndarray:
        masks = []
        batches = (images for images, _ in self.batches(shuffled=False)) if pictures is None else (
            images / 255 for images in pictures.split(PICTURE_BATCH))
        with XGradCAM(model=model, target_layers=[model.saliency_layer]) as cam:
            for images in batches:
                for heat in cam(input_tensor=images, targets=None):
                    hot = heat[heat > 0]
                    masks.append(heat > hot.mean() + 2 * hot.std() if len(hot) else np.zeros_like(heat, dtype=bool))
        return np.stack(masks)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        model.eval()
        right = sum((model(images).argmax(1) == labels).sum().item()
                    for images, labels in self.batches(train=False, shuffled=False))
        return right / len(self.tests)


class Ours:
    """The same four tasks by this project's functions."""

    def __init__(self, data: SpuriousMNIST, tests: SpuriousMNIST, n: int) -> None:
        self.images, self.labels = (tensor[:n].to(best_device()) for tensor in (data.images, data.labels))
        self.tests, self.test_labels = tests.images.to(best_device()), tests.labels.to(best_device())

    def epoch(self, model: nn.Module, masks: Masks | None = None, **options: object) -> float:
        state = State(model, sgd(model.parameters(), MOMENTUM, WEIGHT_DECAY))
        return train_epoch(state, self.images, self.labels, masks=masks, lr=LR, batch_size=BATCH, seed=0, **options)[0]

    def find_masks(self, model: nn.Module, pictures: Tensor | None = None) -> Masks:
        if pictures is not None:
            return find_masks(model, pictures, batch_size=PICTURE_BATCH)
        return find_masks(model, self.images)

    def evaluate(self, model: nn.Module) -> float:
        return accuracy(model, self.tests, self.test_labels)


def timed(task: Callable, *arguments: object) -> tuple[float, object]:
    """Seconds of a task, the device waited for, and its result."""
    begun = time.perf_counter()
    result = task(*arguments)
    if best_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def synthetic_photographs() -> Tensor:
    """(PICTURES, 3, 224, 224) uint8 on the device: noise."""
    pictures = torch.randint(256, (PICTURES, 3, 224, 224), dtype=torch.uint8, generator=generator(0, "pictures"))
    return pictures.to(best_device())


def measure(root: Path, n: int, repeats: int, workers: int) -> list[dict]:
    """Each task by both, in turn, after a warm-up; every time in seconds, and what shows that the results agree."""
    data, tests = (load_data(Places(data=root), SETTING.erm, 0, part) for part in ("train", "raw"))
    trained = run_erm(Places(data=root), SETTING, 0).model
    few = 10 * BATCH
    for side in (Usual(root, data, tests, few, workers), Ours(data, tests, few)):  # warm-up
        side.epoch(new_model(0))
        side.find_masks(trained)
    sides = {"usual": Usual(root, data, tests, n, workers), "ours": Ours(data, tests, n)}
    masks = {name: side.find_masks(trained) for name, side in sides.items()}
    resnet, pictures = new_model(0, "ResNet50"), synthetic_photographs()
    picture_masks = {name: side.find_masks(resnet, pictures) for name, side in sides.items()}

    def agreement(found: dict) -> float:
        return (torch.from_numpy(found["usual"]) == found["ours"][:].cpu()).double().mean().item()

    rows: list[dict] = []

    def time_both(task: str, images: int, run: Callable, check: str, judge: Callable) -> None:
        for repeat in range(repeats):
            one = {"task": task, "images": images, "repeat": repeat, "check": check}
            for name, side in sides.items():
                model = new_model(0)
                keep_freed_memory(name == "ours")
                one[f"{name}_s"], result = timed(run, name, side, model)
                one[f"{name}_value"] = judge(result, model)
            print(f"{task}: usual {one['usual_s']:.2f} s, ours {one['ours_s']:.2f} s", flush=True)
            rows.append(one)

    def judged(_: object, model: nn.Module) -> float:
        return sides["ours"].evaluate(model)

    after, agree = "accuracy on raw after it", "share of pixels on which the masks agree"
    variants = {"ERM, one epoch": {}, "the same, ours in bf16": {"precision": "bf16"}}
    for task, options in variants.items():
        time_both(task, n, lambda name, side, model, options=options: side.epoch(
            model, **(options if name == "ours" else {})), after, judged)
    time_both("heat maps and masks", n, lambda _, side, model: side.find_masks(trained), agree,
              lambda *_: agreement(masks))
    time_both("the same, ResNet50", PICTURES, lambda _, side, model: side.find_masks(resnet, pictures), agree,
              lambda *_: agreement(picture_masks))
    time_both("fine-tune, one epoch", n, lambda name, side, model: side.epoch(model, masks[name]), after, judged)
    time_both("evaluation", len(tests), lambda _, side, model: side.evaluate(trained), "accuracy on raw",
              lambda result, _: result)
    return rows


def convolution_share(root: Path) -> float:
    """The share of our training steps' time that convolutions take, forward and backward (PyTorch's profiler, CPU)."""
    ours = Ours(*(load_data(Places(data=root), SETTING.erm, 0, part) for part in ("train", "raw")), 20 * BATCH)
    ours.epoch(new_model(0))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        ours.epoch(new_model(0))
    rows = profiled.key_averages()
    return sum(row.self_cpu_time_total for row in rows if "convolution" in row.key) / sum(
        row.self_cpu_time_total for row in rows)


def peak_memory(root: Path, name: str, n: int, workers: int) -> dict:
    """MB of host memory (and of the device) that one of `MEMORY` takes over the data itself, its workers included."""
    data, tests = (load_data(Places(data=root), SETTING.erm, 0, part) for part in ("train", "raw"))
    side, _, network = name.partition(", ")
    model, pictures = (new_model(0, network), synthetic_photographs()) if network else (new_model(0), None)
    infer(model, tests.images[:BATCH] if pictures is None else pictures[:1])  # first use loads things: not counted
    keep_freed_memory(side == "ours")
    with Memory() as memory:
        task = Usual(root, data, tests, n, workers) if side == "usual" else Ours(data, tests, n)
        if pictures is not None:
            task.find_masks(model, pictures)
        else:
            task.epoch(model)
            task.epoch(model, task.find_masks(model))
            task.evaluate(model)
    return {"host_mb": memory.host, "device_mb": memory.device}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=60_000, help="of the training set (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of the usual pipeline's DataLoader")
    parser.add_argument("--root", type=Path, default=Path("data"), help="the folder with MNIST")
    parser.add_argument("--memory", choices=MEMORY, help=argparse.SUPPRESS)  # a process of its own
    arguments = parser.parse_args()
    prepare()
    common = (arguments.images, arguments.workers)
    if arguments.memory:
        print(json.dumps(peak_memory(arguments.root, arguments.memory, *common)))
        return
    rows = measure(arguments.root, arguments.images, arguments.repeats, arguments.workers)
    share = convolution_share(arguments.root)
    pandas.DataFrame(rows).assign(convolution_share=share, workers=arguments.workers, made_with=made_with()).to_csv(
        RESULTS / "speed.csv", index=False)
    memory = [{"side": name, **in_own_process("benchmarks.speed", *sys.argv[1:], "--memory", name)} for name in MEMORY]
    pandas.DataFrame(memory).assign(made_with=made_with()).to_csv(RESULTS / "memory.csv", index=False)
    publish()


if __name__ == "__main__":
    main()
