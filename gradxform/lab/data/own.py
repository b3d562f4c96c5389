"""Data sets of the user's own: columns of a file, or arrays that a registered function returns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradxform.lab.data.formats import DataError, Split
from gradxform.lab.data.sets import Dataset, load
from gradxform.lab.data.tables import column_of, numbers, read_columns, texts
from gradxform.lab.experiment.registry import Entry, find, in_own_words

_KEY = 0x73706C6974  # of the random order; the seed is its other half
_MANY = 10  # classes; more need two examples each
_WANTED = "should return arrays (x, y), or ((x, y), (x_test, y_test))"


def data_of(task: Any, data_dir: str | Path | None = None) -> Dataset:
    """The data set of a config's ``[task]`` of kind classification or regression."""
    is_regression = task.kind == "regression"
    entry = find("dataset", task.dataset)
    parted = {"is_regression": is_regression, "split_seed": task.split_seed}
    parted["test_split"] = task.test_split
    if task.file is not None:
        return from_file(task.file, task.target, inputs=task.inputs, folder=data_dir, **parted)
    if entry is not None:
        return from_function(entry, task.dataset_options or {}, **parted)
    return load(task.dataset, data_dir)


def from_file(
    file: str,
    target: str,
    *,
    inputs: Sequence[str] | None = None,
    is_regression: bool,
    test_split: float = 0.2,
    split_seed: int = 0,
    folder: str | Path | None = None,
) -> Dataset:
    """A data set from a CSV, NPZ or Parquet file.

    A classification takes every different value of the target as a class, in sorted order. The
    input columns lie side by side; a single array of an NPZ file keeps its shape.

    Args:
      file: path of the file within ``folder``.
      target: the column to predict.
      inputs: the columns to predict from; all others if not given.
      is_regression: whether the target is a number, not a class.
      test_split: the fraction of the examples that tests; 0 for none.
      split_seed: seed of the random order in which the examples are split.
      folder: the folder; the working directory if not given.

    Raises:
      DataError: the file cannot be read, a column does not exist, or a value is missing or not a
        number.
    """
    columns = read_columns(file, folder)
    names = [name for name in columns.values if name != target] if inputs is None else inputs
    column_of(columns, target, "target")
    for name in names:
        column_of(columns, name, "inputs")
    if target in names:
        raise DataError(f"{columns.source}: task.inputs holds the target {target!r} too")
    if not names:
        raise DataError(f"{columns.source}: there is no column but the target {target!r}")
    parts = [numbers(columns, name, "inputs") for name in names]
    if len(parts) > 1 or parts[0].ndim == 1:
        parts = [np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)]
    y = numbers(columns, target, "target") if is_regression else texts(columns, target)
    train, test = split(Split(parts[0], y), test_split, split_seed)
    return _checked(columns.source, train, test, is_regression)


def from_function(
    entry: Entry,
    options: Mapping[str, Any],
    *,
    is_regression: bool,
    test_split: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    """A data set from a registered function, see :func:`gradxform.lab.dataset`.

    Args:
      entry: the function.
      options: its arguments.
      is_regression: whether the target is a number, not a class.
      test_split: the fraction of the examples that tests, if the function does not say.
      split_seed: seed of the random order in which the examples are split.

    Raises:
      DataError: the function fails or returns something else.
    """
    try:
        found = entry.make(**options)
    except Exception as error:
        raise DataError(f"data set {entry.name}: {in_own_words(error, entry.make)}") from error
    match found:
        case ((x, y) as one, (x_test, y_test) as other) if _are_parts(one, other):
            train, test = _arrays(entry.name, x, y), _arrays(entry.name, x_test, y_test)
        case (x, y):
            train, test = split(_arrays(entry.name, x, y), test_split, split_seed)
        case _:
            raise DataError(f"data set {entry.name}: {_WANTED}, found {type(found).__name__}")
    return _checked(entry.name, train, test, is_regression)


def _are_parts(*parts: Any) -> bool:
    """Whether each is a pair of arrays, and not an array written as a list."""
    return all(isinstance(part, tuple) and len(part) == 2 for part in parts)


def split(data: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """The examples in a random order, and the last ``fraction`` of them apart for testing.

    >>> train, test = split(Split(np.arange(5.0), np.arange(5)), 0.4, seed=0)
    >>> sorted([*train.y.tolist(), *test.y.tolist()]), len(test.y)
    ([0, 1, 2, 3, 4], 2)
    """
    size = len(data.y)
    # NumPy guarantees the raw stream of a bit generator for ever, but not its permutations. Data
    # that come from default_rng(seed) hold the stream of PCG64(seed), which would sort them by it.
    order = np.argsort(np.random.Philox(key=[seed, _KEY]).random_raw(size), kind="stable")
    x, y = data.x[order], data.y[order]
    at = size - round(size * fraction)
    if fraction and at in (0, size):
        use = "test on" if at else "train on"
        found = f"task.test_split = {fraction} leaves none of {size} examples to {use}"
        raise DataError(f"{found}: give more examples, or test_split = 0")
    return Split(x[:at], y[:at]), Split(x[at:], y[at:]) if fraction else None


def _checked(name: str, train: Split, test: Split | None, is_regression: bool) -> Dataset:
    """The data set as float32 inputs, with class numbers or float32 targets."""
    x = [part.x.astype(np.float32) for part in (train, test) if part is not None]
    targets = [part.y for part in (train, test) if part is not None]
    num_classes = 0
    if is_regression:
        targets = [target.astype(np.float64) for target in targets]
    else:
        classes, numbers = np.unique(np.concatenate(targets), return_inverse=True)
        num_classes = len(classes)
        if not 2 <= num_classes <= max(len(numbers) // 2, _MANY):
            found = f"{num_classes} different values in {len(numbers)} examples"
            mend = 'for a number as target use kind = "regression"'
            raise DataError(f"{name}: the target has {found}, which are no classes; {mend}")
        at = len(targets[0])
        targets = [numbers[:at].astype(np.int32), numbers[at:].astype(np.int32)]
    parts = [Split(inputs, target) for inputs, target in zip(x, targets, strict=False)]
    return Dataset(name, parts[0], parts[1] if test is not None else None, num_classes, scale=1.0)


def _arrays(name: str, x: Any, y: Any) -> Split:
    """The arrays of a registered data set, after a check of what they hold."""
    try:
        found = Split(np.asarray(x), np.asarray(y))
    except Exception as error:  # lists of different lengths
        raise DataError(f"data set {name}: {_WANTED}; {' '.join(str(error).split())}") from None
    if found.x.dtype.kind not in "biuf" or not found.x.ndim:
        raise DataError(f"data set {name}: x should hold numbers, found {found.x.dtype}")
    if found.x.ndim == 1:
        found = found._replace(x=found.x[:, None])
    if not found.y.ndim or len(found.x) != len(found.y) or not len(found.x):
        shapes = f"shapes {found.x.shape} and {found.y.shape}"
        raise DataError(f"data set {name}: x and y should have equally many rows, found {shapes}")
    for part in (found.x, found.y):
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise DataError(f"data set {name}: holds a number that is not finite")
    return found
