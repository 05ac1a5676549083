"""Regression: scikit-learn's diabetes, or a table in a CSV file."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import Dataset
from .draws import check_seed, shuffled

#: Shares of the rows that are for validation and for the test; the rest is for training.
VALID, TEST = 0.15, 0.15


@dataclass(frozen=True, eq=False)
class Regression(Dataset):
    """x float32 [n, features] and y float32 [n, 1], both less their mean and over their deviation in the training split.

    Attributes:
        features: names of x's columns.
        target: the name of y.
        y_mean, y_std: of the training split, in the target's own unit: ``y * y_std + y_mean`` is in it again.
    """

    features: tuple[str, ...]
    target: str
    y_mean: float
    y_std: float


def _number(field: str, where: str) -> float:
    try:
        # Python's own writing of numbers, not that of tables: 1_000 is rather a mistake than a thousand
        value = math.nan if "_" in field else float(field)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} is {field!r}, a finite number expected")
    return value


def read_csv(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Names and values of a table whose first line names the columns, all of them numbers.

    Returns:
        names, float64 [rows, columns].

    Raises:
        FileNotFoundError: no such file.
        ValueError: no header, two columns of one name, a line of another length, a field that is no finite number; names file
            and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            lines = [(reader.line_num, line) for line in reader if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: no CSV file: {error}") from None
    if not lines:
        raise ValueError(f"{path}: empty: a first line that names the columns is needed")
    names = [name.strip() for name in lines[0][1]]
    if not all(name.isprintable() for name in names):
        raise ValueError(f"{path}: no CSV file: its first line is not text")
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"{path}: columns must have different names, not {', '.join(map(repr, names))}")
    rows = []
    for number, line in lines[1:]:
        if len(line) != len(names):
            raise ValueError(f"{path}, line {number}: {len(line)} fields, but {len(names)} columns")
        rows.append([_number(field, f"{path}, line {number}: {name}") for name, field in zip(names, line, strict=True)])
    return names, np.array(rows, np.float64).reshape(-1, len(names))


def _diabetes() -> tuple[list[str], np.ndarray]:
    try:
        from sklearn.datasets import load_diabetes
    except ModuleNotFoundError:
        raise ModuleNotFoundError("diabetes is scikit-learn's: pip install 'ezo-kernels[digits]'") from None
    data = load_diabetes(scaled=False)
    return [*data.feature_names, "progression"], np.column_stack([data.data, data.target])


def load_regression(source: str | Path, target: str | None = None, *, seed: int = 0) -> Regression:
    """A table of numbers as a regression problem, split 70 / 15 / 15 by the seed, standardised by its training split.

    Args:
        source: "diabetes" (scikit-learn's 442 patients, 10 features, the disease's progression in a year), or a CSV file.
        target: the name of the column to predict; needed for a CSV file, and not for diabetes.
        seed: of the split, by numpy's frozen Philox.

    Raises:
        ModuleNotFoundError: diabetes without scikit-learn.
        FileNotFoundError: no such file.
        ValueError: a corrupt file, no such column, no other column, too few rows to split, a target that never changes,
            numbers that cannot be standardised in floating point.
    """
    seed = check_seed(seed)
    if source == "diabetes":
        (names, values), source, label = _diabetes(), "scikit-learn's load_diabetes", "diabetes"
        target = "progression" if target is None else target
    else:
        names, values = read_csv(source)
        label = Path(source).stem
    if target not in names:
        raise ValueError(f"{source}: no column {target!r} to predict: there are {', '.join(names)}")
    if len(names) < 2:
        raise ValueError(f"{source}: {target} is its only column: nothing to predict it from")
    n = len(values)
    held = int(n * VALID), int(n * TEST)
    if min(held) < 1:
        raise ValueError(f"{source}: {n} rows are too few to split 70 / 15 / 15, 7 are needed")
    # In the file's order within a split.
    order = shuffled(n, seed, "split", 1)
    valid, test, train = (np.sort(part) for part in np.split(order, np.cumsum(held)))
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = values[train].mean(0), values[train].std(0)
    column = names.index(target)
    # Not by std: the mean of equal numbers may be rounded, and they then deviate from it.
    least = values[train].min(0)
    still = least == values[train].max(0)
    if still[column]:
        raise ValueError(f"{source}: {target} is {least[column]:g} in every row of the training split")
    for name, deviation, same in zip(names, std, still, strict=True):
        if not (same or 0 < deviation < math.inf):
            raise ValueError(
                f"{source}: the deviation of {name} is {deviation} in fp64: its numbers cannot be standardised"
            )
    # A feature that never changes becomes zero, in rows outside of the training split, too, and says nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.where(still, 0, (values - mean) / np.where(still, 1, std)).astype(np.float32)
    for name, own in zip(names, scaled.T, strict=True):
        if not np.isfinite(own).all():
            raise ValueError(f"{source}: {name} has a number too far from those of the training split for fp32")
    x, y = np.delete(scaled, column, 1), scaled[:, column : column + 1]
    return Regression(
        name=label,
        x_train=x[train],
        y_train=y[train],
        x_valid=x[valid],
        y_valid=y[valid],
        x_test=x[test],
        y_test=y[test],
        genuine=False,
        source=str(source),
        features=tuple(name for name in names if name != target),
        target=target,
        y_mean=float(mean[column]),
        y_std=float(std[column]),
    )
