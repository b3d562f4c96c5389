"""The lab's data sets: digits, MNIST, Fashion-MNIST, CIFAR-10, synthetic text, and points.

Files come from a folder, or are downloaded once into a cache. Before a file is used, its structure
is checked, and its SHA-256 if the original's is known. This module does not import JAX, so it
reports a problem with the data at once.
"""

import difflib
import hashlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradxform.lab.data import text
from gradxform.lab.data.downloads import SOURCES, Named, cache_dir, files_of
from gradxform.lab.data.equations import burgers_points
from gradxform.lab.data.formats import (
    CIFAR10_RECORD,
    DataError,
    Split,
    parse_cifar10,
    parse_mnist,
    refuse,
)

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "Split",
    "cache_dir",
    "checksum",
    "hold_out",
    "load",
    "synthetic_text",
]

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "synthetic_text", "burgers")

_CIFAR10_BATCH = 10_000 * CIFAR10_RECORD  # bytes of a complete batch file
_MNIST_SHAPES = {"train": (60_000, 28, 28), "t10k": (10_000, 28, 28)}


class Dataset(NamedTuple):
    """Labelled images, sequences of characters, or points of an equation, in memory."""

    name: str
    train: Split
    test: Split | None
    num_classes: int  #: 0 if the targets are numbers
    scale: float  #: the largest pixel value: ``x / scale`` is in [0, 1]; 1 for other data
    alphabet: str = ""  #: for text: the character of each class number


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Reads and verifies a data set.

    ``digits`` comes with scikit-learn: 1,797 images of 8 x 8 pixels with 16 grey levels. Stored
    neighbours are alike, so the last fifth of a fixed shuffle is the test part. ``synthetic_text``
    is generated, see :func:`synthetic_text`. ``burgers`` are points (t, x) for Burgers' equation,
    see :mod:`gradxform.lab.data.equations`.

    The other sets are read from ``data_dir``. Without it, they are read from the folder in the
    environment variable ``GRADXFORM_DATA``, and without that from :func:`cache_dir`, into which
    they are downloaded at first use. The files may be in the folder itself or in a subfolder named
    after the data set, plain or with ``.gz``. Files of Fashion-MNIST other than the original
    ``.gz`` files can only be checked for their structure, and a warning is logged. For CIFAR-10 a
    part suffices: the test batch and any of the five training batches, complete or cut after a
    record.

    Args:
      name: one of :data:`DATASETS`.
      data_dir: a folder with the original files of the data set.

    Raises:
      DataError: the name is unknown, a file is missing, truncated, corrupt or of another data set,
        or a download failed.

    References:
      MNIST: LeCun, Cortes, Burges. Fashion-MNIST: Xiao, Rasul, Vollgraf (2017). CIFAR-10:
      Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). Digits: Alpaydin,
      Kaynak (1998), from the UCI repository.

    >>> digits = load("digits")
    >>> digits.train.x.shape, digits.test.x.shape, digits.scale
    ((1437, 8, 8), (360, 8, 8), 16.0)
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"no data set is named {name!r}; there are {', '.join(DATASETS)}{hint}")
    if name == "digits":
        return _digits()
    if name == "synthetic_text":
        return synthetic_text()
    if name == "burgers":
        return Dataset(name, *burgers_points(), num_classes=0, scale=1.0)
    files = files_of(name, data_dir)
    return _cifar10(files) if name == "cifar10" else _mnist(name, files)


def synthetic_text(length: int = 64, train_size: int = 4096, test_size: int = 512) -> Dataset:
    """English-like text from a random grammar, cut into sequences, to predict the next character.

    Training and test parts are separate texts. The mean cross-entropy of a character is 3.14 nats
    for a model of character frequencies, and 2.30 nats given the previous character. Given the
    grammar and all previous characters it is at most 0.43 nats, the entropy of the random choices.

    Args:
      length: characters per sequence.
      train_size: number of training sequences.
      test_size: number of test sequences.

    References:
      Our own grammar, in :mod:`gradxform.lab.data.text`.

    >>> data = synthetic_text()
    >>> data.train.x.shape, data.test.y.shape, data.num_classes
    ((4096, 64), (512, 64), 56)
    >>> "".join(data.alphabet[number] for number in data.train.x[0])
    'Vera meets Martin beside the beach of Vera. Martin invites Marti'
    """
    sizes = train_size, test_size
    texts = [text.write(size * length + 1, seed) for seed, size in enumerate(sizes)]
    alphabet = "".join(sorted(set("".join(texts))))
    train, test = (text.cut(part, alphabet, length) for part in texts)
    return Dataset("synthetic_text", train, test, len(alphabet), scale=1.0, alphabet=alphabet)


def data_of(task: Any, data_dir: str | Path | None = None) -> Dataset:
    """The data set that a config's ``[task]`` names; see :func:`load`."""
    return load(task.dataset, data_dir)


def hold_out(split: Split, fraction: float) -> tuple[Split, Split]:
    """Splits off the last ``fraction`` of the examples for validation, unshuffled like Keras.

    Args:
      split: n examples.
      fraction: the fraction to hold out, above 0 and below 1.

    Returns:
      The first ⌊n (1 - fraction)⌋ examples, and the others.

    Raises:
      DataError: ``fraction`` is out of range or leaves one of the two empty.

    >>> train, validation = hold_out(Split(np.zeros((10, 2, 2), np.uint8), np.arange(10)), 0.2)
    >>> validation.y
    array([8, 9])
    """
    if not 0 < fraction < 1:
        raise DataError(f"the validation split is {fraction}; give a fraction between 0 and 1")
    at = math.floor(len(split.y) * (1 - fraction))
    if at in (0, len(split.y)):
        use = "validate with" if at else "train on"
        raise DataError(
            f"a validation split of {fraction} leaves none of {len(split.y)} examples to {use}"
        )
    return Split(split.x[:at], split.y[:at]), Split(split.x[at:], split.y[at:])


def checksum(data: Dataset) -> int:
    """24 bits of the CRC-32 of all examples and labels, to compare the data of processes.

    Args:
      data: the data set.

    >>> checksum(load("digits")) == checksum(load("digits")) != checksum(synthetic_text())
    True
    """
    found = 0
    for x in (*data.train, *(data.test or ())):
        found = zlib.crc32(np.ascontiguousarray(x).data, found)
    return found >> 8


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    x, y = map(np.asarray, load_digits(return_X_y=True))
    # NumPy guarantees the raw stream of a bit generator for ever, but not its permutations.
    order = np.argsort(np.random.PCG64(0).random_raw(len(y)))
    shuffled = Split(x[order].astype(np.uint8).reshape(-1, 8, 8), y[order].astype(np.int32))
    return Dataset("digits", *hold_out(shuffled, 0.2), num_classes=10, scale=16.0)


def _mnist(name: str, files: Mapping[str, Named]) -> Dataset:
    def split(part: str) -> Split:
        images = files[f"{part}-images-idx3-ubyte"]
        labels = files[f"{part}-labels-idx1-ubyte"]
        parsed = parse_mnist(images.content, labels.content, (images.path, labels.path))
        if parsed.x.shape != _MNIST_SHAPES[part]:
            refuse(images.path, f"images of shape {_MNIST_SHAPES[part]}", str(parsed.x.shape))
        return parsed

    train, test = split("train"), split("t10k")
    for file, found in files.items():
        digest = hashlib.sha256(found.content).hexdigest()
        expected = SOURCES[name].contents[file]
        if expected is not None and digest != expected:
            refuse(found.path, f"the original's content, SHA-256 {expected}", digest)
        # Both sets use the same names and shapes, so only the content distinguishes them.
        if name != "mnist" and digest == SOURCES["mnist"].contents[file]:
            refuse(found.path, f"a file of {name}", "MNIST's file of that name")
    return Dataset(name, train, test, num_classes=10, scale=255.0)


def _cifar10(files: Mapping[str, Named]) -> Dataset:
    def split(file: str) -> Split:
        path, content = files[file]
        parsed = parse_cifar10(content, path)
        if len(content) >= _CIFAR10_BATCH:
            digest = hashlib.sha256(content).hexdigest()
            expected = SOURCES["cifar10"].contents[file]
            if digest != expected:
                refuse(path, f"the original's content, SHA-256 {expected}", digest)
        return parsed

    batches = [split(file) for file in sorted(files) if file.startswith("data_batch")]
    train = Split(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    return Dataset("cifar10", train, split("test_batch.bin"), num_classes=10, scale=255.0)
