"""Image data sets, held in memory as tensors: digits, or anything that Hugging Face datasets loads."""

from __future__ import annotations

import io
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normprop.recipes import InputError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class ImageData:
    """Two splits of labelled images of one size.

    Attributes:
        name: The data set's name, never a path.
        train_x: Shape ``(N, C, H, W)``, uint8 or float32.
        train_y: Shape ``(N,)``, int64, in [0, classes).
        test_x: As ``train_x``.
        test_y: As ``train_y``.
        classes: Number of classes.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train_x.shape[1:])  # type: ignore[return-value]


def subset(data: ImageData, train_images: int | None = None, validation: int = 0) -> ImageData:
    """Fewer training images, or some of them held out; always the same ones.

    Args:
        data: The whole set.
        train_images: How many to train on; None for all that are left.
        validation: How many training images to hold out. They take the test images' place.

    Returns:
        ``data`` itself if there is nothing to choose.

    Raises:
        InputError: If there are not so many.
    """
    if train_images is None and not validation:
        return data
    count = len(data.train_y)
    wanted = validation + (1 if train_images is None else train_images)
    if wanted > count:
        asked = f"--train-images {train_images} " if train_images is not None else ""
        raise InputError(f"{asked}--validation {validation}: {data.name} has {count} training images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held, rest = order[:validation], order[validation:][:train_images]
    chosen = replace(data, train_x=data.train_x[rest], train_y=data.train_y[rest])
    return replace(chosen, test_x=data.train_x[held], test_y=data.train_y[held]) if validation else chosen


class Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Whole batches by index, without a Python loop over samples."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        return self.x[chosen], self.y[chosen]


def load(dataset: str) -> ImageData:
    """Load a data set.

    Args:
        dataset: ``"digits"`` (scikit-learn's, 1,797 images of 8x8, 360 of them for test), a folder
            (parquet files, or images in ``train/CLASS/`` and ``test/CLASS/``, or what ``datasets``
            saved), or any name on the Hugging Face Hub.

    Returns:
        The data, decoded.

    Raises:
        InputError: If it cannot be found, or is not labelled images of one size in two splits.
    """
    if dataset == "digits":
        return _digits()
    splits = _hub_splits(dataset)
    name = Path(dataset).name or dataset
    train, test = _split(splits, ("train",), dataset), _split(splits, ("test", "validation"), dataset)
    image_column, label_column = _columns(train, dataset)
    names = _class_names(train, label_column)
    parts: list[Tensor] = []
    for label, split in (("train", train), ("test", test)):
        where = f"{name}, split {label}"
        for column in (image_column, label_column):
            if column not in split.column_names:
                raise InputError(
                    f"{where}: expected a column '{column}', as in train, got {split.column_names}"
                )
        x = _images(split, image_column, where)
        y = _labels(split[label_column], names, where)
        if parts and x.shape[1:] != parts[0].shape[1:]:
            raise InputError(
                f"{where}: images are {_size(x[0])}, those of train are {_size(parts[0][0])}; "
                "resize them to one size"
            )
        parts += [x, y]
    classes = len(names) if names else int(parts[1].max()) + 1
    if classes > len(parts[1]):
        raise InputError(
            f"{name}: label {classes - 1} in {len(parts[1])} training images; labels must be 0 to "
            "(number of classes - 1)"
        )
    for label, y in (("train", parts[1]), ("test", parts[3])):
        bad = (y < 0) | (y >= classes)
        if bad.any():
            index = int(bad.nonzero()[0])
            raise InputError(
                f"{name}, split {label}: image {index} has label {int(y[index])}; expected 0 to {classes - 1}"
            )
    return ImageData(name, parts[0], parts[1], parts[2], parts[3], classes)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(y)), test_size=360, stratify=y, random_state=0)
    return ImageData("digits", x[train], y[train], x[test], y[test], classes=10)


def _hub_splits(dataset: str) -> dict[str, Any]:
    """The splits as ``datasets`` loads them, its own messages turned into one line."""
    import datasets

    path = Path(dataset).expanduser()
    expected = (
        "expected 'digits', a folder of parquet files or images (none of them empty), or a name on the "
        "Hugging Face Hub"
    )
    if not path.exists() and (dataset.startswith((".", "/", "~")) or dataset.count("/") > 1):
        raise InputError(f"--dataset {dataset}: no such folder; {expected}")
    if not dataset.strip():
        raise InputError(f"--dataset '{dataset}': {expected}")
    if path.is_file():
        raise InputError(f"--dataset {dataset} is a file; {expected}")
    datasets.disable_progress_bars()
    for logger in ("datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        if (path / "dataset_dict.json").exists():
            return dict(datasets.load_from_disk(str(path)))
        if not path.exists():
            _go_offline_if_unreachable()
        loaded = datasets.load_dataset(str(path) if path.exists() else dataset)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # datasets wraps what went wrong
            cause = cause.__cause__
        first_line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise InputError(f"--dataset {dataset}: {first_line}; {expected}") from error
    return dict(loaded)


def _go_offline_if_unreachable() -> None:
    """Without network the Hub's client retries for half a minute: use its local copies at once."""
    import datasets
    import huggingface_hub

    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=3)
    except urllib.error.HTTPError:
        return  # it answers
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _split(splits: dict[str, Any], wanted: tuple[str, ...], dataset: str) -> Any:
    for name in wanted:
        if name in splits:
            if len(splits[name]) == 0:
                raise InputError(f"--dataset {dataset}: split {name} is empty")
            return splits[name]
    raise InputError(
        f"--dataset {dataset}: expected splits train and test, got {', '.join(splits)}; name the files "
        "train*.parquet and test*.parquet, or put the images into train/CLASS/ and test/CLASS/"
    )


def _columns(split: Any, dataset: str) -> tuple[str, str]:
    found = []
    for kind, names in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS)):
        column = next((name for name in names if name in split.column_names), None)
        if (
            column is None
            and kind == "label"
            and "image" in split.column_names
            and len(split.column_names) == 1
        ):
            raise InputError(
                f"--dataset {dataset}: expected a folder for each of at least two classes, train/CLASS/ and "
                "test/CLASS/"
            )
        if column is None:
            raise InputError(
                f"--dataset {dataset}: expected a column of {kind}s called {' or '.join(names)}, got "
                f"{', '.join(split.column_names)}; rename it"
            )
        found.append(column)
    return found[0], found[1]


def _class_names(split: Any, column: str) -> list[str] | None:
    feature = split.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    if split.num_rows and isinstance(split[0][column], str):
        return sorted({name for name in split[column] if name is not None})
    return None


def _labels(column: Any, names: list[str] | None, where: str) -> Tensor:
    values: list[Any] = list(column)
    if values and isinstance(values[0], str):
        index = {name: i for i, name in enumerate(names or ())}
        unknown = [value for value in values if value not in index]
        if unknown:
            raise InputError(
                f"{where}: label {unknown[0]!r} does not occur in train; expected one of {names}"
            )
        values = [index[v] for v in values]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or abs(int(value)) >= 2**31:
            raise InputError(f"{where}: label {value!r}; expected an integer, 0 to (number of classes - 1)")
    return torch.tensor(values, dtype=torch.int64)


def _images(split: Any, column: str, where: str) -> Tensor:
    """All images of a split, shape (N, C, H, W); uint8 for images, float32 for arrays of numbers."""
    images: np.ndarray | None = None
    for index, array in enumerate(_arrays(split, column, where)):
        if images is None:
            images = np.empty((split.num_rows, *array.shape), array.dtype)
        if array.shape != images.shape[1:]:
            raise InputError(
                f"{where}: image {index} is {_size(array)}, image 0 is {_size(images[0])}; "
                "resize them to one size"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{where}: image {index} holds NaN or infinite pixels; remove or repair it")
        images[index] = array
    assert images is not None
    return torch.from_numpy(images)


def _size(image: Any) -> str:
    channels, height, width = image.shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def _arrays(split: Any, column: str, where: str) -> Iterator[np.ndarray]:
    """One (C, H, W) array an image."""
    import datasets
    from PIL import Image

    feature = split.features[column]
    encoded = isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    encoded = encoded or getattr(feature, "dtype", "") in ("binary", "large_binary")
    if encoded:
        split = split.cast_column(column, datasets.Image(decode=False))
    mode = None
    for index, row in enumerate(split.select_columns([column])):
        value = row[column]
        if value is None:
            raise InputError(f"{where}: image {index} is missing; remove the row")
        if not encoded:
            try:
                array = np.asarray(value, dtype=np.float32)
            except (TypeError, ValueError) as error:
                raise InputError(f"{where}: image {index} is not an array of numbers ({error})") from error
            if array.ndim not in (2, 3):
                raise InputError(
                    f"{where}: image {index} has shape {array.shape}, expected (H, W) or (C, H, W)"
                )
            if array.ndim == 3 and array.shape[0] > 4 and array.shape[2] in (1, 3, 4):
                raise InputError(
                    f"{where}: image {index} has shape {array.shape}, channels last; expected (C, H, W)"
                )
            yield array[None] if array.ndim == 2 else array
            continue
        path = value.get("path")
        try:
            source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else path
            with Image.open(source) as image:
                image.load()
                if mode is None:
                    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
                    mode = "F" if image.mode in ("F", "I", "I;16") else mode
                array = np.asarray(image if image.mode == mode else image.convert(mode))
        except (OSError, SyntaxError, ValueError) as error:
            file = f" ({Path(path).name})" if path else ""
            raise InputError(
                f"{where}: image {index}{file} cannot be read: {error}; repair or remove it"
            ) from error
        yield array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
