"""The lab's data sets: digits, MNIST, Fashion-MNIST, CIFAR-10, synthetic text, and points.

Files come from a folder, or are downloaded once into a cache. Before a file is used, its structure
is checked, and its SHA-256 if the original's is known. This module does not import JAX, so it
reports a problem with the data at once.
"""

import difflib
import hashlib
import io
import logging
import math
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradxform.lab.data import text
from gradxform.lab.data.equations import burgers_points
from gradxform.lab.data.formats import (
    CIFAR10_RECORD,
    DataError,
    Split,
    decompress,
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

_ENVIRONMENT = "GRADXFORM_DATA"
_log = logging.getLogger(__name__)


class Dataset(NamedTuple):
    """Labelled images, sequences of characters, or points of an equation, in memory."""

    name: str
    train: Split
    test: Split
    num_classes: int
    scale: float  #: the largest pixel value: ``x / scale`` is in [0, 1]; 1 for text
    alphabet: str = ""  #: for text: the character of each class number


class Source(NamedTuple):
    """Where the files of a data set are found, and their checksums."""

    folders: tuple[str, ...]  #: names of subfolders to look in
    mirrors: tuple[str, ...]  #: addresses; append the name of a download
    downloads: Mapping[str, str]  #: SHA-256 of each file to download
    contents: Mapping[str, str | None]  #: SHA-256 of each uncompressed file, if published


_MNIST = Source(
    folders=("mnist",),
    mirrors=(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    downloads={
        "train-images-idx3-ubyte.gz": (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        "train-labels-idx1-ubyte.gz": (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
        ),
    },
    contents={
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
)
_FASHION_MNIST = Source(
    folders=("fashion_mnist", "fashion-mnist"),
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
    downloads={
        "train-images-idx3-ubyte.gz": (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
        ),
        "train-labels-idx1-ubyte.gz": (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
        ),
    },
    contents=dict.fromkeys(_MNIST.contents),
)
_CIFAR10 = Source(
    folders=("cifar10", "cifar-10-batches-bin", "cifar10_subset"),
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    downloads={
        "cifar-10-binary.tar.gz": (
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
        ),
    },
    contents={
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
)
_LARGEST = 2**28  # bytes; more than any of these files or archives
_CIFAR10_BATCH = 10_000 * CIFAR10_RECORD  # bytes of a complete batch file
_SOURCES = {"mnist": _MNIST, "fashion_mnist": _FASHION_MNIST, "cifar10": _CIFAR10}
_MNIST_SHAPES = {"train": (60_000, 28, 28), "t10k": (10_000, 28, 28)}


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
    source = _SOURCES[name]
    folder = data_dir or os.environ.get(_ENVIRONMENT)
    if folder:
        paths = _find(name, source, Path(folder))
        _warn_of_unverified(name, source, paths)
        files = {file: _Named(path, _read(path)) for file, path in paths.items()}
    else:
        files = _fetch(name, source)
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
    for x in (*data.train, *data.test):
        found = zlib.crc32(np.ascontiguousarray(x).data, found)
    return found >> 8


def cache_dir() -> Path:
    """The folder for downloads, in the operating system's place for caches."""
    import pooch

    return Path(pooch.os_cache("gradxform"))


class _Named(NamedTuple):
    path: Path  # its name in messages
    content: bytes  # uncompressed


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    x, y = map(np.asarray, load_digits(return_X_y=True))
    # NumPy guarantees the raw stream of a bit generator for ever, but not its permutations.
    order = np.argsort(np.random.PCG64(0).random_raw(len(y)))
    shuffled = Split(x[order].astype(np.uint8).reshape(-1, 8, 8), y[order].astype(np.int32))
    return Dataset("digits", *hold_out(shuffled, 0.2), num_classes=10, scale=16.0)


def _mnist(name: str, files: Mapping[str, _Named]) -> Dataset:
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
        expected = _SOURCES[name].contents[file]
        if expected is not None and digest != expected:
            refuse(found.path, f"the original's content, SHA-256 {expected}", digest)
        # Both sets use the same names and shapes, so only the content distinguishes them.
        if name != "mnist" and digest == _SOURCES["mnist"].contents[file]:
            refuse(found.path, f"a file of {name}", "MNIST's file of that name")
    return Dataset(name, train, test, num_classes=10, scale=255.0)


def _cifar10(files: Mapping[str, _Named]) -> Dataset:
    def split(file: str) -> Split:
        path, content = files[file]
        parsed = parse_cifar10(content, path)
        if len(content) >= _CIFAR10_BATCH:
            digest = hashlib.sha256(content).hexdigest()
            expected = _SOURCES["cifar10"].contents[file]
            if digest != expected:
                refuse(path, f"the original's content, SHA-256 {expected}", digest)
        return parsed

    batches = [split(file) for file in sorted(files) if file.startswith("data_batch")]
    train = Split(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    return Dataset("cifar10", train, split("test_batch.bin"), num_classes=10, scale=255.0)


def _find(name: str, source: Source, folder: Path) -> dict[str, Path]:
    """The files of a data set in a folder or in its subfolder for the data set."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; --data-dir or {_ENVIRONMENT} must name one that holds the "
            f"files of {name}"
        )
    for place in [*(folder / sub for sub in source.folders), folder]:
        pairs = [(file, place / (file + end)) for file in source.contents for end in (".gz", "")]
        if found := {file: path for file, path in pairs if path.is_file()}:
            break
    else:
        raise DataError(
            f"{folder} holds no file of {name}: expected {_wanted(name)} there or in "
            f"{' or '.join(source.folders)}; leave out --data-dir and {_ENVIRONMENT} to download"
        )
    missing = [file for file in source.contents if file not in found]
    if name == "cifar10" and len(missing) < 5 and "test_batch.bin" not in missing:
        return found  # a part of the training set is enough
    if missing:
        raise DataError(f"{place} lacks {', '.join(missing)}: expected {_wanted(name)}")
    return found


def _warn_of_unverified(name: str, source: Source, paths: Mapping[str, Path]) -> None:
    def is_original(file: str, path: Path) -> bool:
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            return True  # reading it will raise an error
        return digest == source.downloads[f"{file}.gz"]

    unknown = [file for file, digest in source.contents.items() if digest is None]
    doubtful = [paths[file].name for file in unknown if not is_original(file, paths[file])]
    if doubtful:
        place = next(iter(paths.values())).parent
        _log.warning(
            "%s: not the original .gz files of %s, so only their structure is checked: %s",
            place,
            name,
            ", ".join(doubtful),
        )


def _wanted(name: str) -> str:
    if name == "cifar10":
        return "data_batch_1.bin to data_batch_5.bin (or some) and test_batch.bin, plain or .gz"
    return f"{', '.join(_SOURCES[name].contents)}, plain or .gz"


def _fetch(name: str, source: Source) -> dict[str, _Named]:
    """The files of a data set from the cache; missing ones are downloaded."""
    paths = [_download(name, source, file, digest) for file, digest in source.downloads.items()]
    if name == "cifar10":
        return _unpack(paths[0], source)
    return {path.stem: _Named(path, _read(path)) for path in paths}


def _download(name: str, source: Source, file: str, digest: str) -> Path:
    """Fetches one file from the first mirror that delivers it completely.

    Pooch writes to a temporary file and moves it into place when its digest is right, so the cache
    never contains a partial file. It also checks the digest of a file in the cache.
    """
    import pooch

    downloader: Any = pooch.HTTPDownloader(chunk_size=1 << 16, timeout=30)
    failures = []
    for mirror in source.mirrors:
        try:
            path = pooch.retrieve(
                mirror + file, f"sha256:{digest}", file, cache_dir() / name, downloader=downloader
            )
            return Path(path)
        except (OSError, ValueError) as error:  # network, HTTP status, full disk, or digest
            failures.append(f"  {mirror}{file}: {error}")
    raise DataError(
        "\n".join(
            [
                f"{file} of {name} could not be downloaded to {cache_dir() / name}:",
                *failures,
                f"Without a network, put {_wanted(name)}, in a folder and name the folder with "
                f"--data-dir or {_ENVIRONMENT}.",
            ]
        )
    )


def _unpack(archive: Path, source: Source) -> dict[str, _Named]:
    """Reads the batches of CIFAR-10 by name; nothing is extracted to a path of the archive."""
    files = {}
    content = io.BytesIO(_read(archive))
    try:
        with tarfile.open(fileobj=content, mode="r:") as tar:
            for file in source.contents:
                member = tar.getmember(f"cifar-10-batches-bin/{file}")
                opened = tar.extractfile(member) if member.isreg() else None  # follow no link
                if opened is None:
                    raise KeyError(f"{file} is not a file")
                files[file] = _Named(archive / file, opened.read())
    except (tarfile.TarError, KeyError, OSError, RecursionError, ValueError) as error:
        refuse(archive, f"an archive with {', '.join(source.contents)}", str(error))
    return files


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return decompress(content, path, _LARGEST) if path.suffix == ".gz" else content
