"""Read data sets of the hub, and folders, through the package `datasets`."""

from __future__ import annotations

import importlib.util
from typing import Any

from fastadv.jobs import formats
from fastadv.jobs.errors import UserError, loading
from fastadv.jobs.hub import is_saved, named
from fastadv.train.sources import Columns, Found, checked


def hub_rows(name: str, columns: Columns) -> tuple[Found, Found | None]:
    """Read the training rows of a hub data set or folder (NAME or NAME:CONFIG), and its test rows if it has some.

    Raises:
        UserError: `datasets` is not installed, or finds no such data set; and as `sources.checked`.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{name} is no file ({', '.join(formats.READERS)}), and data sets of the hub and folders need a package: "
            "pip install datasets"
        )
    with loading(f"the data set {name} could not be loaded", "give a file or the name of a data set"):
        splits = _load(name)
    train = splits.get("train")
    if train is None:
        raise UserError(f"the data set {name} has no split 'train' (it has {', '.join(splits)})")
    test = splits.get("test")
    if test is None or test.num_rows == 0 or _unlabelled(test, columns.label):
        test = splits.get("validation")
    return _rows(train, name, columns), None if test is None else _rows(test, name, columns)


def _load(name: str) -> Any:
    """Load the splits: of the hub, of a folder of files, or of one that `save_to_disk` wrote."""
    import datasets

    datasets.disable_progress_bars()
    if is_saved(name):
        loaded = datasets.load_from_disk(name)
        return loaded if isinstance(loaded, dict) else {"train": loaded}
    path, config = named(name)
    return datasets.load_dataset(path, config, trust_remote_code=False)


def _unlabelled(split: Any, label: str) -> bool:
    """Tell whether a test split hides its labels behind -1, as benchmarks do."""
    return label in split.column_names and set(_kinds(split, label)) == {-1}


def _kinds(split: Any, label: str) -> list[Any]:
    """List the values of a column of classes or numbers; none for lists."""
    kind = getattr(split.features[label], "dtype", "")
    return list(split.unique(label)) if str(kind).startswith(("int", "float")) else []


def _rows(split: Any, name: str, columns: Columns) -> Found:
    found = checked(((f"row {i}", row) for i, row in enumerate(split)), name, columns)
    feature = split.features[columns.label]
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    if names is None:
        return found
    return found._replace(rows=[row._replace(label=_named(row.label, names)) for row in found.rows])


def _named(label: Any, names: list[str]) -> Any:
    return [names[one] for one in label] if isinstance(label, list) else names[int(label)]
