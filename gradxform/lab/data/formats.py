"""The file formats of the image data sets: IDX (MNIST) and CIFAR-10's binary version.

Every function takes the complete content of a file, and its name for error messages. They are our
own, because libraries that read these formats bring a framework, such as TensorFlow or PyTorch.
"""

import gzip
import io
import math
import zlib
from typing import NamedTuple, NoReturn

import numpy as np

CIFAR10_RECORD = 1 + 3 * 32 * 32  #: bytes of one image: its label, then three colour planes
_IDX_UNSIGNED_BYTE = 0x0800  # the magic number without its last byte, the number of dimensions


class DataError(Exception):
    """Data are missing, truncated, corrupt, or not what their name says."""


class Split(NamedTuple):
    """A part of a data set: examples and their labels."""

    x: np.ndarray  #: uint8 (n, height, width) or (n, height, width, channels); for text (n, length)
    y: np.ndarray  #: int32 (n,), class numbers from 0; for text (n, length), the next characters


def refuse(name: object, expected: str, found: str) -> NoReturn:
    """Raises a :class:`DataError` for a file.

    >>> refuse("a.gz", "12 bytes", "11")
    Traceback (most recent call last):
        ...
    gradxform.lab.data.formats.DataError: a.gz: expected 12 bytes, found 11
    """
    raise DataError(f"{name}: expected {expected}, found {found}")


def decompress(content: bytes, name: object, largest: int) -> bytes:
    """The content of a gzip file.

    Args:
      content: the compressed file.
      name: the name of the file in messages.
      largest: the largest expected size in bytes; a file of kilobytes can expand to gigabytes.

    Raises:
      DataError: the file is not gzip, is truncated, fails its checksum or is too large.
    """
    try:
        with gzip.open(io.BytesIO(content)) as file:
            found = file.read(largest + 1)
        if len(found) > largest:
            refuse(name, f"at most {largest} bytes, uncompressed", "more")
        return found
    except gzip.BadGzipFile as error:
        refuse(name, "a gzip file (drop .gz from the name of an uncompressed one)", str(error))
    except (EOFError, zlib.error) as error:
        refuse(name, "a whole gzip file", f"a truncated or corrupt one ({error})")


def parse_idx(content: bytes, name: object, dimensions: int) -> np.ndarray:
    """The array in an IDX file of unsigned bytes.

    The layout is a magic number, one size for each dimension (all big-endian 32-bit integers), and
    the array's bytes with the last dimension varying fastest.

    Args:
      content: the uncompressed file.
      name: the name of the file in messages.
      dimensions: the dimensions that the array must have: 3 for images, 1 for labels.

    Returns:
      A read-only uint8 array over ``content``.

    Raises:
      DataError: the magic number is wrong, or the size does not match the header.

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]), "labels", dimensions=1)
    array([7, 2, 1], dtype=uint8)
    """
    header = 4 * (1 + dimensions)
    if len(content) < header:
        refuse(name, f"an IDX header of {header} bytes", f"{len(content)} bytes in all")
    magic, *shape = np.frombuffer(content, ">u4", 1 + dimensions).tolist()
    expected = _IDX_UNSIGNED_BYTE + dimensions
    if magic != expected:
        what = f"magic number {expected} (IDX, unsigned bytes, dimensions: {dimensions})"
        refuse(name, what, str(magic))
    size = math.prod(shape)
    if len(content) - header != size:
        what = f"{header + size} bytes for shape {tuple(shape)}"
        refuse(name, what, f"{len(content)} bytes")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def parse_labels(values: np.ndarray, name: object, num_classes: int) -> np.ndarray:
    """Labels as int32, after a check that all are below ``num_classes``.

    Raises:
      DataError: a label is out of range.
    """
    wrong = values >= num_classes
    if wrong.any():
        at = int(np.argmax(wrong))
        refuse(name, f"labels from 0 to {num_classes - 1}", f"{values[at]} (example {at})")
    return values.astype(np.int32)


def parse_mnist(
    images: bytes, labels: bytes, names: tuple[object, object], num_classes: int = 10
) -> Split:
    """One part of MNIST, or of a data set in its format, from its two IDX files.

    Args:
      images: the uncompressed file of the images.
      labels: the uncompressed file of the labels.
      names: the names of the two files in messages.
      num_classes: labels must be below this.

    Raises:
      DataError: a file is malformed, or the numbers of images and labels differ.
    """
    x = parse_idx(images, names[0], dimensions=3)
    y = parse_labels(parse_idx(labels, names[1], dimensions=1), names[1], num_classes)
    if len(x) != len(y):
        refuse(names[1], f"{len(x)} labels, one for each image of {names[0]}", str(len(y)))
    return Split(x, y)


def parse_cifar10(content: bytes, name: object) -> Split:
    """The images and labels in one batch file of CIFAR-10's binary version.

    There is no header. A record is a label byte, followed by the red, green and blue planes of a
    32 x 32 image, each row by row.

    Args:
      content: the uncompressed file.
      name: the name of the file in messages.

    Returns:
      Images of shape (n, 32, 32, 3) and labels below 10.

    Raises:
      DataError: there is no record, a record is incomplete, or a label is out of range.
    """
    records, rest = divmod(len(content), CIFAR10_RECORD)
    if rest or not records:
        what = f"one or more whole records of {CIFAR10_RECORD} bytes"
        refuse(name, what, f"{len(content)} bytes: {records} records and {rest} bytes")
    table = np.frombuffer(content, np.uint8).reshape(records, CIFAR10_RECORD)
    planes = table[:, 1:].reshape(records, 3, 32, 32)
    labels = parse_labels(table[:, 0], name, num_classes=10)
    return Split(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels)
