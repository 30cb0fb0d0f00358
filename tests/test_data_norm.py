"""The data end: statistics against numpy, streams, merging, casts and refusals."""

import copy
import io
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from normprop import BatchDataNorm, GlobalDataNorm

IMAGES = torch.randn(50, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 3 + 7
AXES = {"element": 0, "channel": (0, 2, 3)}


class DictData(torch.utils.data.Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return {"name": "cat", "image": IMAGES[index], "label": index}


SOURCES = {
    "tensor": lambda: IMAGES,
    "loader of tuples": lambda: DataLoader(TensorDataset(IMAGES, torch.arange(50)), batch_size=7),
    "loader of dicts": lambda: DataLoader(DictData(), batch_size=16, shuffle=True),
    "list of tuples": lambda: [("first", IMAGES[:20], 0), ("second", IMAGES[20:], 1)],
    "uneven generator": lambda: (part for part in IMAGES.split([1, 30, 2, 17])),
    "with an empty batch": lambda: [IMAGES[:9], IMAGES[:0], IMAGES[9:]],
}


def truth(data, per="element"):
    """Mean and standard deviation of the population by numpy, in float64."""
    data = data.numpy().astype(np.float64)
    keep = per == "channel"
    mean, std = data.mean(AXES[per], keepdims=keep), data.std(AXES[per], keepdims=keep)
    return (torch.from_numpy(v[0] if keep else v) for v in (mean, std))


def assert_fits(norm, data, per="element"):
    mean, std = truth(data, per)
    torch.testing.assert_close(norm.mean, mean)
    torch.testing.assert_close(norm.std, std)
    assert norm.count == data.numel() // mean.numel()


@pytest.mark.parametrize("per", AXES)
@pytest.mark.parametrize("source", SOURCES)
def test_fit_equals_numpy(source, per):
    norm = GlobalDataNorm.fit(SOURCES[source](), per=per)
    assert norm.mean.shape == ((3, 4, 5) if per == "element" else (3, 1, 1))
    assert_fits(norm, IMAGES, per)
    y = norm(IMAGES)
    assert y.dtype == torch.float32
    dims = AXES[per]
    torch.testing.assert_close(y.mean(dims), torch.zeros_like(y.mean(dims)), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std(dims, correction=0), torch.ones_like(y.mean(dims)))


def test_fit_reads_the_data_once():
    reads = []

    def stream():
        for index in range(5):
            reads.append(index)
            yield IMAGES[10 * index : 10 * index + 10], index

    assert_fits(GlobalDataNorm.fit(stream()), IMAGES)
    assert reads == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_a_large_mean_costs_no_digits(batch):
    data = (torch.randn(4096, 3, dtype=torch.float64) * 1e-2 + 1e4).float()
    norm = GlobalDataNorm.fit(iter(data.split(batch)))
    mean, std = truth(data)
    # mean^2/var is 1e12, of float64's 4e15: 1e-4 would be left of a sum of squares.
    torch.testing.assert_close(norm.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(norm.std, std, rtol=1e-9, atol=0)
    y = norm(data).double()
    torch.testing.assert_close(y, (data.double() - mean) / std, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        y.std(0, correction=0), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("cut", [1, 13, 49])
def test_merge_equals_the_fit_of_both(cut):
    for per in AXES:
        a, b = GlobalDataNorm.fit(IMAGES[:cut], per=per), GlobalDataNorm.fit(IMAGES[cut:], per=per)
        before = copy.deepcopy(a.state_dict())
        assert_fits(a.merge(b), IMAGES, per)
        assert_fits(b.merge(a), IMAGES, per)
        assert all(torch.equal(a.state_dict()[key], value) for key, value in before.items())
    empty = GlobalDataNorm((3, 4, 5))
    assert_fits(empty.merge(GlobalDataNorm.fit(IMAGES)), IMAGES)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -3e-8])
@pytest.mark.parametrize("batch", [1, 7, 50])
def test_constant_features_become_0(value, batch):
    data = torch.randn(50, 3)
    data[:, 1] = value
    norm = GlobalDataNorm.fit(iter(data.split(batch)))
    y = norm(data)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:, 1], torch.zeros(50))
    assert norm.std[1] == 0
    torch.testing.assert_close(y[:, 0].std(correction=0), torch.tensor(1.0))


REFUSALS = [
    ([], {}, "no data: expected at least one batch with at least one sample"),
    (IMAGES[:0], {}, "no data"),
    (torch.randn(5), {}, "batch 0 has shape (5,), expected (batch, features, ...)"),
    ([IMAGES, torch.randn(4)], {}, "batch 1 has shape (4,), expected (batch, features, ...)"),
    ([IMAGES, IMAGES * float("nan")], {}, "batch 1 holds NaN or infinite values"),
    ([IMAGES / 0], {}, "batch 0 holds NaN or infinite values"),
    ([IMAGES, IMAGES[..., :3]], {}, "cannot merge statistics of shape (3, 4, 3) into (3, 4, 5)"),
    (IMAGES, {"per": "pixel"}, "per must be 'element' or 'channel', got 'pixel'"),
]


@pytest.mark.parametrize(("data", "options", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_bad_data_is_refused(data, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GlobalDataNorm.fit(data, **options)


def test_batches_without_a_tensor_are_refused():
    for batch, name in (({"label": 3}, "dict"), (("a", 2), "tuple"), (np.ones((2, 3)), "ndarray")):
        with pytest.raises(
            TypeError, match=f"a batch must be a tensor, or a tuple or dict with one, got {name}"
        ):
            GlobalDataNorm.fit([batch])


def test_images_of_different_sizes_fit_per_channel():
    norm = GlobalDataNorm.fit([IMAGES, IMAGES[..., :3]], per="channel")
    values = torch.cat([IMAGES.flatten(2), IMAGES[..., :3].flatten(2)], 2).numpy().astype(np.float64)
    torch.testing.assert_close(norm.mean.flatten(), torch.from_numpy(values.mean((0, 2))))
    torch.testing.assert_close(norm.std.flatten(), torch.from_numpy(values.std((0, 2))))
    assert norm.count == values.size // 3


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_statistics_stay_in_float64(cast):
    norm = GlobalDataNorm.fit(IMAGES)
    kept = copy.deepcopy(norm.state_dict())
    model = torch.nn.Sequential(norm, torch.nn.Flatten())
    getattr(model, cast)()
    model.to(torch.float16)
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in kept.items())
    assert {key: value.dtype for key, value in norm.state_dict().items()} == {
        "mean": torch.float64,
        "std": torch.float64,
        "count": torch.int64,
    }
    assert norm(IMAGES.half()).dtype == torch.float16
    assert norm(IMAGES.double()).dtype == torch.float64


def test_state_dict_round_trip():
    norm = GlobalDataNorm.fit(IMAGES)
    buffer = io.BytesIO()
    torch.save(norm.state_dict(), buffer)
    buffer.seek(0)
    twin = GlobalDataNorm((3, 4, 5))
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(twin(IMAGES), norm(IMAGES))
    assert repr(twin) == "GlobalDataNorm((3, 4, 5), count=50)"
    with pytest.raises(RuntimeError, match="size mismatch"):
        GlobalDataNorm((3, 1, 1)).load_state_dict(norm.state_dict())


def test_bytes_are_data():
    data = torch.randint(0, 256, (40, 3, 2, 2), dtype=torch.uint8)
    norm = GlobalDataNorm.fit(data)
    assert_fits(norm, data)
    y = norm(data)
    assert y.dtype == torch.float32
    mean, std = truth(data)
    torch.testing.assert_close(y, ((data.double() - mean) / std).float())


def test_one_sample_depends_on_no_other():
    norm = GlobalDataNorm.fit(IMAGES)
    assert torch.equal(norm(IMAGES[3:4])[0], norm(IMAGES)[3])
    assert torch.equal(norm.train()(IMAGES), norm.eval()(IMAGES))


def test_batch_norm_of_the_data():
    norm = BatchDataNorm((3, 4, 5), momentum=0.25)
    running_mean, running_var = np.zeros(60), np.ones(60)
    for part in IMAGES.split([20, 2, 28]):
        y = norm(part)
        x = part.flatten(1).numpy().astype(np.float64)
        expected = (x - x.mean(0)) / x.std(0)
        torch.testing.assert_close(y.flatten(1), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)
        running_mean = 0.75 * running_mean + 0.25 * x.mean(0)
        running_var = 0.75 * running_var + 0.25 * x.var(0, ddof=1)
    y = norm(IMAGES)
    torch.testing.assert_close(y.mean(0), torch.zeros(3, 4, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(3, 4, 5))
    x = IMAGES.flatten(1).numpy().astype(np.float64)
    running_mean = 0.75 * running_mean + 0.25 * x.mean(0)
    running_var = 0.75 * running_var + 0.25 * x.var(0, ddof=1)
    norm.eval()
    expected = torch.from_numpy((x - running_mean) / running_var**0.5).float().view_as(IMAGES)
    torch.testing.assert_close(norm(IMAGES), expected)
    torch.testing.assert_close(norm(IMAGES[:1]), expected[:1])
    assert set(norm.state_dict()) == {"running_mean", "running_var"}
    twin = BatchDataNorm((3, 4, 5)).eval()
    assert not torch.equal(twin(IMAGES), norm(IMAGES))
    twin.load_state_dict(norm.state_dict())
    assert torch.equal(twin(IMAGES), norm(IMAGES))


def test_batch_norm_of_the_data_refuses():
    norm = BatchDataNorm((3, 4, 5))
    with pytest.raises(ValueError, match=r"cannot train on a batch of 1: .* use normprop.GlobalDataNorm"):
        norm(IMAGES[:1])
    with pytest.raises(ValueError, match=re.escape("expected shape (N, 3, 4, 5), got (50, 3, 4)")):
        norm(IMAGES[..., 0])
    assert norm(torch.randint(0, 256, (4, 3, 4, 5), dtype=torch.uint8)).dtype == torch.float32


def test_a_dataset_of_single_samples_and_a_wrong_shape_are_refused():
    data = torch.randn(10, 3, 4, 4)
    with pytest.raises(TypeError, match="wrap the Dataset"):
        GlobalDataNorm.fit(TensorDataset(data, torch.zeros(10)))
    norm = GlobalDataNorm.fit(data)
    with pytest.raises(ValueError, match=r"expected \(N, 3, 4, 4\) as at fit .* got \(2, 3, 5, 4\)"):
        norm(torch.zeros(2, 3, 5, 4))
    with pytest.raises(ValueError, match="got"):
        norm(torch.zeros(2, 1, 4, 4))  # would broadcast
    per_channel = GlobalDataNorm.fit(data, per="channel")
    assert per_channel(torch.zeros(2, 3, 9, 7)).shape == (2, 3, 9, 7)
