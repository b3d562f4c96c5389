"""Reads the columns of a CSV, NPZ or Parquet file. Nothing in a file is run."""

import csv
import importlib.util
import io
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gradxform.lab.data.formats import DataError
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.experiment.problems import suggest

LARGEST = 2**30  #: bytes of a file, also after decompression
_DELIMITERS = ",;\t"
_ENDINGS = (".csv", ".npz", ".parquet")
_FEW = 12  # names in a message
_SHOWN = 40  # characters of a value in a message


class Columns(NamedTuple):
    """The columns of a file by name. The first axis counts examples."""

    source: str  #: the name of the file in messages
    values: dict[str, np.ndarray]  #: numbers, or texts of a CSV file that are not converted yet
    lines: Sequence[int]  #: of a CSV file, the line of each row; else empty

    def at(self, row: int, name: str) -> str:
        """The place of a value, for messages.

        >>> Columns("a.csv", {}, (2, 3)).at(1, "age")
        "a.csv, line 3, column 'age'"
        """
        where = f"line {self.lines[row]}" if self.lines else f"row {row + 1}"
        return f"{self.source}, {where}, column {on_one_line(name)!r}"


def read_columns(file: str, folder: str | Path | None = None) -> Columns:
    """The columns of a file.

    Args:
      file: a path within the folder, of a file that ends in ``.csv``, ``.npz`` or ``.parquet``.
      folder: the folder; the working directory if not given. Links are followed only within it.

    Raises:
      DataError: there is no such file, it lies outside the folder or is too large, it is not what
        its ending says, or Parquet needs a package that is not installed.
    """
    path = _inside(file, Path(folder) if folder else Path())
    name = on_one_line(file)
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        raise DataError(f"{name}: should end in .csv, .npz or .parquet")
    if (size := path.stat().st_size) > LARGEST:
        raise DataError(f"{name}: {size} bytes, more than {LARGEST}: give a part of it")
    try:
        if ending == ".csv":
            return _csv(path, name)
        return _npz(path, name) if ending == ".npz" else _parquet(path, name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def numbers(columns: Columns, name: str, key: str) -> np.ndarray:
    """A column as finite numbers.

    Args:
      columns: the columns.
      name: the name of the column.
      key: the key of ``[task]`` that can name other columns.

    Raises:
      DataError: a value is missing or not a number. The message names its line and its column.

    >>> numbers(Columns("a.csv", {"x": np.array(["1", "2.5"])}, (2, 3)), "x", "inputs")
    array([1. , 2.5])
    """
    values = columns.values[name]
    try:
        found = values.astype(np.float64)
    except (TypeError, ValueError):
        row = next(row for row, value in enumerate(values) if not _is_number(value))
        value = str(values[row])
        if not value.strip():
            raise DataError(f"{columns.at(row, name)}: {_MISSING}") from None
        what = f"expected a number, found {value[:_SHOWN]!r}"
        mend = f"correct it, or name the columns to use in task.{key}"
        if _is_number(value.replace(",", ".")):
            mend = "write the decimal point as '.'"
        raise DataError(f"{columns.at(row, name)}: {what}; {mend}") from None
    good = np.isfinite(found)
    if not good.all():
        row = int(np.argwhere(~good)[0][0])
        what = _MISSING if np.isnan(found[row]).any() else "expected a finite number, found inf"
        raise DataError(f"{columns.at(row, name)}: {what}")
    return found


def column_of(columns: Columns, name: str, key: str) -> str:
    """The name, after a check that there is such a column.

    Args:
      columns: the columns.
      name: the name.
      key: the key of ``[task]`` that gave it.

    Raises:
      DataError: there is no such column.
    """
    if name not in columns.values:
        known = list(columns.values)
        few = ", ".join(known[:_FEW]) + (", ..." if len(known) > _FEW else "")
        hint = suggest(name, known) or f"; the columns are {few}"
        raise DataError(f"{columns.source}: task.{key}: there is no column {name!r}{hint}")
    return name


def texts(columns: Columns, name: str) -> np.ndarray:
    """A column as labels: its values, where none may be missing."""
    values = columns.values[name]
    is_missing = [not str(value).strip() or str(value) in ("nan", "None") for value in values]
    if any(is_missing):
        raise DataError(f"{columns.at(is_missing.index(True), name)}: {_MISSING}")
    return values


_MISSING = "the value is missing: fill it in, or remove the line"


def _inside(file: str, folder: Path) -> Path:
    """The path of a file that lies in the folder, even if links are followed."""
    shown, where = on_one_line(file), on_one_line(folder.absolute())
    if not folder.is_dir():
        raise DataError(f"--data-dir {on_one_line(folder)}: no such folder")
    mend = "give its folder with --data-dir, and file without the folder"
    if os.path.isabs(file) or ".." in Path(file).parts or "\0" in file:
        raise DataError(f"{shown}: should be a path within {where}: {mend}")
    path = folder / file
    try:
        found = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise DataError(f"{shown}: cannot be read: {error}") from None
    if not found.exists():
        raise DataError(f"{shown}: no such file in {where}: {mend}")
    if not found.is_relative_to(folder.resolve()):
        raise DataError(f"{shown}: is a link that leads out of {where}: {mend}")
    if not found.is_file():
        raise DataError(f"{shown}: is not a file")
    return found


def _csv(path: Path, name: str) -> Columns:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise DataError(f"{name}: not text in UTF-8: {where}") from None
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, lines = [], []
    try:
        header = [heading.strip() for heading in next(reader, [])]
        _check_header(header, name)
        for row in reader:
            if not row:  # an empty line
                continue
            if len(row) != len(header):
                what = f"{len(row)} values where the first line has {len(header)} names"
                raise DataError(f"{name}, line {reader.line_num}: {what}")
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not CSV: {error}") from None
    if not rows:
        raise DataError(f"{name}: holds no line of data below the names of its columns")
    columns = map(np.array, zip(*rows, strict=True))
    values = dict(zip(header, columns, strict=True))
    return Columns(name, values, lines)


def _check_header(header: Sequence[str], name: str) -> None:
    if not header:
        raise DataError(f"{name}: is empty; the first line should name the columns")
    if all(map(_is_number, header)):
        raise DataError(f"{name}, line 1: should name the columns, found numbers")
    for heading in header:
        if not heading:
            raise DataError(f"{name}, line 1: a column has no name")
        if header.count(heading) > 1:
            raise DataError(f"{name}, line 1: two columns are named {on_one_line(heading)!r}")


def _npz(path: Path, name: str) -> Columns:
    try:
        with zipfile.ZipFile(path) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > LARGEST:
                raise DataError(f"{name}: {size} bytes, unpacked, more than {LARGEST}")
        with np.load(path, allow_pickle=False) as arrays:
            values = {key: np.asarray(arrays[key]) for key in arrays.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        raise DataError(f"{name}: not an NPZ file of numbers: {error}") from None
    return Columns(name, _alike(values, name), ())


def _parquet(path: Path, name: str) -> Columns:
    if importlib.util.find_spec("pyarrow") is not None:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]

        try:
            found = parquet.read_table(path)
        except ArrowException as error:
            raise DataError(f"{name}: not a Parquet file: {' '.join(str(error).split())}") from None
        values = {key: found[key].to_numpy() for key in found.column_names}
        return Columns(name, _alike(values, name), ())
    raise DataError(f"{name}: a Parquet file needs pyarrow: pip install pyarrow")


def _alike(values: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays, after a check that they have equally many rows."""
    if not values:
        raise DataError(f"{name}: holds no array")
    lengths = {key: len(array) if array.ndim else 0 for key, array in values.items()}
    if len(set(lengths.values())) > 1 or not min(lengths.values()):
        each = ", ".join(f"{on_one_line(key)} {length}" for key, length in _first(lengths.items()))
        raise DataError(f"{name}: the arrays should have equally many rows, found {each}")
    return values


def _first(items: Iterable[tuple[str, int]], most: int = 8) -> list[tuple[str, int]]:
    return [item for item, _ in zip(items, range(most), strict=False)]


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True
