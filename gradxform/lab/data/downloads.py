"""Finds the files of the image data sets in a folder, or downloads them once into a cache.

Before a file is used, its SHA-256 is checked if the original's is known.
"""

import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gradxform.lab.data.formats import DataError, decompress, refuse

_ENVIRONMENT = "GRADXFORM_DATA"
_log = logging.getLogger(__name__)


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
SOURCES = {"mnist": _MNIST, "fashion_mnist": _FASHION_MNIST, "cifar10": _CIFAR10}


class Named(NamedTuple):
    path: Path  # its name in messages
    content: bytes  # uncompressed


def files_of(name: str, data_dir: str | Path | None = None) -> dict[str, Named]:
    """The files of a data set, from a folder or from the cache.

    Args:
      name: a name in :data:`SOURCES`.
      data_dir: the folder; if not given, that in the environment variable ``GRADXFORM_DATA``.
        Without either the files are downloaded into :func:`cache_dir`.

    Raises:
      DataError: a file is missing or cannot be read, or a download failed.
    """
    source = SOURCES[name]
    folder = data_dir or os.environ.get(_ENVIRONMENT)
    if not folder:
        return _fetch(name, source)
    paths = _find(name, source, Path(folder))
    _warn_of_unverified(name, source, paths)
    return {file: Named(path, _read(path)) for file, path in paths.items()}


def cache_dir() -> Path:
    """The folder for downloads, in the operating system's place for caches."""
    import pooch

    return Path(pooch.os_cache("gradxform"))


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
    return f"{', '.join(SOURCES[name].contents)}, plain or .gz"


def _fetch(name: str, source: Source) -> dict[str, Named]:
    """The files of a data set from the cache; missing ones are downloaded."""
    paths = [_download(name, source, file, digest) for file, digest in source.downloads.items()]
    if name == "cifar10":
        return _unpack(paths[0], source)
    return {path.stem: Named(path, _read(path)) for path in paths}


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


def _unpack(archive: Path, source: Source) -> dict[str, Named]:
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
                files[file] = Named(archive / file, opened.read())
    except (tarfile.TarError, KeyError, OSError, RecursionError, ValueError) as error:
        refuse(archive, f"an archive with {', '.join(source.contents)}", str(error))
    return files


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return decompress(content, path, _LARGEST) if path.suffix == ".gz" else content
