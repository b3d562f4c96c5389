"""Checks the description in a checkpoint, which may come from an untrusted source.

A false but well-formed history cannot be recognised. But the code that uses it can rely on the
types of all values, on the columns of every row, and on a finite number of epochs.
"""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gradxform.lab.training.checkpoint_folders import CheckpointError

Row = dict[str, Any]

_LARGEST = 1e300  # the largest number that can be drawn
_NEEDED = {"epoch", "step", "seconds", "gradients", "cost", "train_loss", "steps_per_second"}
_METRIC = re.compile("(train|validation|test)_[A-Za-z][A-Za-z0-9_]{0,60}")
_HISTORY = {"label", "rows", "diverged", "steps_per_second", "compile_seconds", "params"}
_SWEEP = {"group", "epoch", "rows", "seconds", "compile_seconds", "members"}
_MEMBER: Mapping[str, Callable[[Any], bool]] = {
    "epochs": lambda x: _is_count(x),
    "steps": lambda x: _is_count(x),
    "diverged": lambda x: isinstance(x, bool),
    "dropped": lambda x: isinstance(x, bool),
    "seconds": lambda x: is_size(x),
    "cost": lambda x: is_number(x),
}


def race_rows(record: Mapping[str, Any], epochs: Mapping[str, int]) -> list[tuple[str, Row]]:
    """The rows of a race so far, each with the label of its optimiser.

    Args:
      record: the description in a snapshot.
      epochs: the number of epochs of every optimiser, by label, in order.

    Raises:
      CheckpointError: the description belongs to another race or is malformed.
    """
    histories = _of(record, {"histories", "goes_on"}, "told")["histories"]
    goes_on = record["goes_on"]
    _need(isinstance(goes_on, bool), "goes_on should be true or false", goes_on)
    _need(isinstance(histories, list) and histories, "histories should be a list", histories)
    labels = [_of(history, _HISTORY, "a history")["label"] for history in histories]
    if labels != list(epochs)[: len(labels)]:
        raise CheckpointError(f"it is of the optimisers {', '.join(map(str, labels))[:200]}")
    columns = None
    for history in histories:
        rows = history["rows"]
        _need(isinstance(rows, list) and rows, "rows should be a list of epochs", rows)
        _need(isinstance(history["diverged"], bool), "diverged should be true or false", history)
        for name in ("steps_per_second", "compile_seconds"):
            _need(is_size(history[name]), f"{name} should be a number", history[name])
        most = epochs[history["label"]] - (goes_on and history is histories[-1])
        _need(len(rows) <= most, f"rows should be at most {most} epochs", len(rows))
        for number, row in enumerate(rows, start=1):
            columns = columns or _columns_of(row)
            _check_epoch(row, number, columns)
    return [(history["label"], row) for history in histories for row in history["rows"]]


def ended_rows(record: Mapping[str, Any], label: str, epochs: int) -> list[tuple[str, Row]]:
    """The rows of an optimiser at its end, like :func:`race_rows`.

    Args:
      record: the description in a snapshot of one optimiser.
      label: the label of the optimiser.
      epochs: the number of epochs of the optimiser.

    Raises:
      CheckpointError: the description belongs to another optimiser or is malformed.
    """
    found = _of(record, {"history", "is_lost"}, "told")
    is_lost = found["is_lost"]
    _need(isinstance(is_lost, bool), "is_lost should be true or false", is_lost)
    return race_rows({"histories": [found["history"]], "goes_on": False}, {label: epochs})


def sweep_rows(record: Mapping[str, Any], firsts: Sequence[Row]) -> dict[int, Row]:
    """The rows of a sweep so far, by the number of the member.

    Args:
      record: the description in a snapshot.
      firsts: the row of every member before its first epoch.

    Raises:
      CheckpointError: the description belongs to another sweep or is malformed.
    """
    rows = _of(record, _SWEEP, "told")["rows"]
    _need(isinstance(rows, dict), "rows should be a table", rows)
    numbers = {str(number): number for number in range(len(firsts))}
    for name, row in rows.items():
        _need(name in numbers, "rows should be of the sweep's members", name)
        _check_member(row, firsts[numbers[name]])
    return {numbers[name]: row for name, row in rows.items()}


def check_sweep(
    record: Mapping[str, Any],
    firsts: Sequence[Row],
    groups: Sequence[Iterable[int]],
    epochs: Sequence[int],
    metrics: Iterable[str],
) -> dict[int, Row]:
    """Like :func:`sweep_rows`, and also checks everything that the sweep needs to continue.

    Args:
      record: the description in a snapshot.
      firsts: the row of every member before its first epoch.
      groups: the members of each program.
      epochs: the number of epochs of each program.
      metrics: the columns of a member that has been evaluated.

    Raises:
      CheckpointError: the description belongs to another sweep or is malformed.
    """
    rows = sweep_rows(record, firsts)
    group, epoch, training = (record[name] for name in ("group", "epoch", "members"))
    for name in ("seconds", "compile_seconds"):
        _need(is_size(record[name]), f"{name} should be a number", record[name])
    _need(_is_count(group) and group <= len(groups), "group should be one of the sweep's", group)
    begun = _is_count(epoch) and epoch > 0
    wanted = set(groups[group]) if begun and group < len(groups) else set()
    _need(not begun or (wanted and epoch < epochs[group]), "epoch should be before the last", epoch)
    _need(begun or epoch == 0, "epoch should be a whole number", epoch)
    good = isinstance(training, list) and all(type(n) is int for n in training)
    good = good and wanted.issuperset(training) and training == sorted(set(training))
    _need(good and bool(training) == begun, "members should be of the program", training)
    done = {number for numbers in groups[:group] for number in numbers} | wanted
    _need(rows.keys() == done, "rows should be of all members so far", len(rows))
    for number in done.difference(training):
        lacking = set(metrics).difference(rows[number])
        _need(not lacking, f"the row of member {number} should have {', '.join(lacking)}", "none")
    return rows


def made_with(about: Any) -> tuple[str, str, dict[str, Any]]:
    """The command, the config and the versions that wrote a checkpoint.

    Raises:
      CheckpointError: one of them is missing.
    """
    found = _of(about, {"command", "config", "made_with"}, "about")
    versions = _of(found["made_with"], {"device", "versions"}, "made_with")["versions"]
    _need(found["command"] in ("run", "sweep"), "command should be run or sweep", found["command"])
    _need(isinstance(versions, dict), "versions should be a table", versions)
    for text in (found["config"], found["made_with"]["device"], *versions.values()):
        _need(isinstance(text, str), "config, device and versions should be texts", text)
    return found["command"], found["config"], found["made_with"]


def _of(table: Any, keys: set[str], name: str) -> Mapping[str, Any]:
    good = isinstance(table, dict) and table.keys() == keys
    _need(good, f"{name} should be a table of {', '.join(sorted(keys))}", table)
    return table


def _columns_of(row: Any) -> set[str]:
    _need(isinstance(row, dict), "a row should be a table", row)
    strange = {key for key in row.keys() - _NEEDED if not _METRIC.fullmatch(key)}
    _need(not strange, "a row should have the columns of an epoch", strange)
    _need(row.keys() >= _NEEDED, "a row should have the columns of an epoch", row)
    return set(row)


def _check_epoch(row: Any, number: int, columns: set[str]) -> None:
    _need(isinstance(row, dict) and row.keys() == columns, "rows should be alike", row)
    _need(row["epoch"] == number and _is_count(row["epoch"]), f"epoch should be {number}", row)
    _need(_is_count(row["step"]), "step should be a whole number", row["step"])
    for name in ("seconds", "gradients", "steps_per_second"):
        _need(is_size(row[name]), f"{name} should be a number", row[name])
    for name in columns:
        _need(is_number(row[name]), f"{name} should be a number", row[name])


def _check_member(row: Any, first: Row) -> None:
    _need(isinstance(row, dict) and row.keys() >= first.keys(), "a row should be a member's", row)
    for name, value in row.items():
        if name in _MEMBER:
            good = _MEMBER[name](value)
        elif name in first:
            good = type(value) is type(first[name]) and value == first[name]
        else:
            good = _METRIC.fullmatch(name) and is_number(value)
        _need(good, f"{reprlib.repr(name)} should be what a member has", value)


def _need(good: Any, what: str, found: Any) -> None:
    if not good:
        raise CheckpointError(
            f"another version has written it: {what}, found {reprlib.repr(found)}"
        )


def is_number(x: Any) -> bool:
    """Whether ``x`` is a number that can be drawn, or is not finite."""
    return type(x) in (int, float) and not _LARGEST < abs(x) < math.inf


def is_size(x: Any) -> bool:
    """Whether ``x`` is a finite number of at least 0."""
    return is_number(x) and 0 <= x < math.inf


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**53
