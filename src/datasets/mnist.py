"""SpuriousMNIST: MNIST with a blue square that marks the class."""

import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torchvision

from src.datasets.square import SpuriousSquare, check_arguments

# md5 of the four unpacked IDX files
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CONNECT_TIMEOUT_S = 20


@contextmanager
def connect_timeout() -> Iterator[None]:
    """Let a download give up on a host that does not answer; urllib has no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


class DataUnavailable(RuntimeError):
    """A data set is neither on disk, whole and undamaged, nor can it be downloaded; the message says what to do."""


class SpuriousMNIST(SpuriousSquare):
    """MNIST in two classes, 0-4 and 5-9, with a 4x4 blue square that goes with the class (MaskTune, section 4.1).

    Input: (3, 28, 28) float in [0, 1]. Label: 0 for digits 0-4, 1 for 5-9. Groups: label x square (`square.GROUPS`).
    60,000 images to train, 10,000 to test. Digits: LeCun, Cortes, Burges, MNIST (CC BY-SA 3.0), through torchvision.

    Args:
        root: the folder that holds, or will hold, `MNIST/raw/`.
        train: the training set, or else a test set.
        test_set: with train=False, "raw" (no squares; the paper's "original") or "malicious" (squares on class 1 only;
            the paper's "biased").
        class_mix_ratio: share of the training images of each class whose square is on the wrong side, in [0, 1].
        mix_order: which images those are: "random", or "digit" as in the official code. See `square.conflicting`.
        seed: draws them; the same arguments give the same tensors, always.
        download: fetch MNIST where it is missing.

    Raises:
        ValueError: an argument is outside what is valid.
        DataUnavailable: MNIST is missing and cannot be downloaded, or a file of it is damaged.
    """

    def __init__(self, root: str | Path, train: bool, test_set: str | None = None, class_mix_ratio: float = 0.01,
                 mix_order: str = "random", seed: int = 0, download: bool = True) -> None:
        check_arguments(train, test_set, class_mix_ratio, mix_order)
        ensure_mnist(Path(root), download)
        mnist = torchvision.datasets.MNIST(root, train=train)
        super().__init__(mnist.data, mnist.targets, train, test_set, class_mix_ratio, mix_order, seed)


def ensure_mnist(root: Path, download: bool = True) -> None:
    """See that the four files of MNIST are under root, whole; fetch them where they are missing.

    A download goes to a temporary folder and is moved in place once whole, so that an interrupted one leaves nothing.
    """
    raw = root / "MNIST" / "raw"
    present = [name for name in MD5 if (raw / name).exists()]
    for name in present:
        if hashlib.md5((raw / name).read_bytes()).hexdigest() != MD5[name]:
            raise DataUnavailable(f"{raw / name} is damaged or only half there (its md5 is not {MD5[name]}); "
                                  "delete it and run again")
    missing = [name for name in MD5 if name not in present]
    if not missing:
        return
    how = f"put the four unpacked files ({', '.join(MD5)}) into {raw}, or run again with a network"
    if not download:
        raise DataUnavailable(f"MNIST is not in {raw} (missing: {', '.join(missing)}) and download=False; {how}")
    root.mkdir(parents=True, exist_ok=True)
    try:
        with connect_timeout(), tempfile.TemporaryDirectory(dir=root, prefix="mnist-download-") as folder:
            torchvision.datasets.MNIST(folder, download=True)
            raw.mkdir(parents=True, exist_ok=True)
            for name in missing:
                os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0].rstrip(":")
        raise DataUnavailable(f"MNIST is not in {raw} and could not be downloaded ({reason}); {how}") from error
    ensure_mnist(root, download=False)
