"""The data end: statistics against numpy, streams, merging, casts and refusals."""

import copy
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from normprop import BatchDataNorm, GlobalDataNorm, WhiteningDataNorm, data_norm, fold

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
    (
        torch.randn(5, 0),
        {},
        "batch 0 has shape (5, 0) (its first tensor, if it is several), expected (batch",
    ),
    (torch.randn(5), {}, "batch 0 has shape (5,) (its first tensor, if it is several), expected (batch"),
    (
        [IMAGES, torch.randn(4)],
        {},
        "batch 1 has shape (4,) (its first tensor, if it is several), expected (batch",
    ),
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


@pytest.mark.parametrize("norm", [GlobalDataNorm, WhiteningDataNorm])
def test_what_is_no_data_is_refused(norm):
    for data, name in ((None, "NoneType"), (3, "int"), (np.ones((2, 3)), "ndarray")):
        with pytest.raises(
            TypeError, match=f"data must be a tensor, a DataLoader or .* batches, got {name}"
        ):
            norm.fit(data)
    with pytest.raises(TypeError, match=r"batch 0 is torch\.complex64, expected real numbers"):
        norm.fit(torch.randn(4, 3, dtype=torch.complex64))


def test_truth_values_are_numbers():
    x = torch.tensor([[True, False], [False, False], [True, True]])
    for norm in (GlobalDataNorm, WhiteningDataNorm):
        torch.testing.assert_close(norm.fit(x)(x), norm.fit(x.float())(x.float()))


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


def blurred(*shape, seed=0):
    """Images whose neighbours and channels are correlated, mean 40."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    for dim in range(2, x.ndim):
        x = x + x.roll(1, dim) + 0.5 * x.roll(2, dim)
    return 10 * (x + 0.8 * x[:, :1]) + 40


def by_patches(x, kernel, eps):
    """The filters from the correlation of all patches, cut out one by one."""
    x = x.double()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    patches = F.unfold(x, kernel).transpose(1, 2).reshape(-1, x.shape[1] * kernel**2)
    matrix = patches.T @ patches / len(patches)
    values, vectors = np.linalg.eigh(matrix.numpy())
    root = torch.from_numpy(vectors @ np.diag((values + eps) ** -0.5) @ vectors.T)
    rows = root.view(x.shape[1], kernel, kernel, -1)[:, kernel // 2, kernel // 2]
    return rows.view(x.shape[1], x.shape[1], kernel, kernel)


def test_whitening_filters_are_those_of_the_correlation_of_patches():
    data = blurred(400, 3, 24, 24)
    data = torch.cat([data, data.flip(2), data.flip(3), data.flip(2, 3)])
    norm = WhiteningDataNorm.fit(data.split(300), kernel_size=5, eps=0.1)
    # Patches do not reach the border as often as all pairs at a lag do: they differ by sampling.
    expected = by_patches(data, 5, 0.1)
    lengths = [w.square().sum((1, 2, 3), keepdim=True).sqrt() for w in (norm.weight.double(), expected)]
    torch.testing.assert_close(norm.weight / lengths[0], expected / lengths[1], rtol=0, atol=3e-3)


def test_correlations_at_lags_are_counted_sums():
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    sums, counts = data_norm._products_at_lags(x, [2, 3])
    for i in range(-2, 3):
        for j in range(-3, 4):
            here = x[:, :, max(0, -i) : 4 - max(0, i), max(0, -j) : 5 - max(0, j)]
            there = x[:, :, max(0, i) : 4 + min(0, i), max(0, j) : 5 + min(0, j)]
            expected = torch.einsum("nahw,nbhw->ab", here, there)
            torch.testing.assert_close(sums[:, :, i + 2, j + 3], expected)
            assert counts[i + 2, j + 3] == here[:, 0].numel()


@pytest.mark.parametrize("shape", [(500, 3, 40), (200, 3, 16, 16), (60, 2, 9, 10, 11), (500, 3)])
def test_whitened_data_is_uncorrelated(shape):
    data = blurred(*shape)
    norm = WhiteningDataNorm.fit(data, eps=1e-3)
    y = norm(data).double()
    assert y.shape == data.shape

    def correlations(x):
        x = (x - x.mean()).transpose(0, 1)
        pairs = [x[:, :, 1:] * x[:, :, :-1]] if x.ndim > 2 else []  # neighbours, then channels
        return [abs(float(p.mean() / x.square().mean())) for p in [*pairs, x[0] * x[1]]]

    assert min(correlations(data.double())) > 0.5
    assert max(correlations(y)) < 0.12
    assert abs(float(y.mean())) < 0.05
    torch.testing.assert_close(float(y.std()), 1.0, rtol=0, atol=1e-3)


def test_whitening_takes_what_a_data_norm_takes():
    data = blurred(40, 3, 6, 7)
    norm = WhiteningDataNorm.fit(DataLoader(TensorDataset(data, torch.arange(40)), batch_size=7))
    assert norm.weight.shape == (3, 3, 5, 7)  # the largest odd sizes that the images have
    torch.testing.assert_close(norm(data), WhiteningDataNorm.fit(data)(data), rtol=0, atol=1e-5)
    assert norm(data[:1].to(torch.uint8)).dtype == torch.float32
    torch.testing.assert_close(norm(data[:1]), norm(data)[:1])
    assert norm(data[..., :4]).shape == (40, 3, 6, 4)
    twin = WhiteningDataNorm(3, (5, 7))
    twin.load_state_dict(norm.state_dict())
    assert torch.equal(twin(data), norm(data))
    assert repr(norm).startswith("WhiteningDataNorm(\n  3, kernel_size=(5, 7)")
    assert WhiteningDataNorm.fit(data, kernel_size=1).weight.shape == (3, 3, 1, 1)


def test_what_never_changes_is_whitened_to_nothing():
    data = blurred(50, 3, 8, 8)
    data[:, 1] = 4.0
    y = WhiteningDataNorm.fit(data, eps=0.0)(data)
    assert y.isfinite().all()
    assert y[:, 1].abs().max() < 1e-6
    torch.testing.assert_close(y[:, ::2].std(), torch.tensor(1.0), rtol=0, atol=1e-3)


def test_whitening_refuses():
    data = blurred(10, 3, 4, 4)
    with pytest.raises(ValueError, match="kernel_size must be odd and at least 1, got 4"):
        WhiteningDataNorm.fit(data, kernel_size=4)
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps must be a number of at least 0"):
            WhiteningDataNorm.fit(data, eps=eps)
    with pytest.raises(
        ValueError, match="data is read three times, and a list_iterator can be read only once"
    ):
        WhiteningDataNorm.fit(iter([data]))
    with pytest.raises(ValueError, match="no data"):
        WhiteningDataNorm.fit(data[:0])
    with pytest.raises(ValueError, match="NaN"):
        WhiteningDataNorm.fit(torch.full((4, 3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match=r"expected \(N, 3, 1, 1\)"):
        WhiteningDataNorm.fit(data)(torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("per", AXES)
def test_a_large_tensor_is_read_in_parts(per, monkeypatch):
    whole = GlobalDataNorm.fit(IMAGES, per)
    monkeypatch.setattr(data_norm, "_in_parts", lambda x: x.split(7))
    parts = GlobalDataNorm.fit(IMAGES, per)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())
    assert len(data_norm._in_parts(IMAGES)) == 8


def test_parts_are_bounded_in_numbers():
    x = torch.zeros(5, 1).expand(5, 2**21)
    assert [len(part) for part in data_norm._in_parts(x)] == [2, 2, 1]
    assert [len(part) for part in data_norm._in_parts(torch.zeros(1, 1).expand(1, 2**23))] == [1]
    assert data_norm._in_parts(torch.zeros(0, 3)) == ()


def test_batch_norm_of_data_in_double_precision():
    x = torch.randn(9, 2, dtype=torch.float64)
    y = BatchDataNorm((2,))(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, (x - x.mean(0)) / x.std(0, correction=0), rtol=1e-5, atol=1e-5)


def test_maps_smaller_than_the_whitening_filters_are_refused():
    norm = WhiteningDataNorm.fit(torch.randn(64, 3, 8, 8), kernel_size=7)
    assert norm(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"at least 4 x 4 positions.*got \(2, 3, 8, 3\); fit with a smaller"
    ):
        norm(torch.randn(2, 3, 8, 3))


def test_only_data_norms_merge():
    with pytest.raises(TypeError, match="other must be a GlobalDataNorm, as fit makes it, got Tensor"):
        GlobalDataNorm.fit(IMAGES).merge(IMAGES)


def test_a_shape_may_be_one_number():
    assert GlobalDataNorm(3).mean.shape == (3,)
    assert BatchDataNorm(3)(torch.randn(8, 3)).shape == (8, 3)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 5"):
        BatchDataNorm(3, momentum=5)


def test_a_feature_that_never_changed_comes_out_as_0():
    norm = GlobalDataNorm.fit(torch.tensor([[3.0, 1.0], [3.0, 2.0]]))
    x = torch.tensor([[300.0, 2.0]])
    torch.testing.assert_close(norm(x), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(fold(torch.nn.Sequential(norm))(x), norm(x))


def test_whitening_filters_need_data_of_one_size():
    with pytest.raises(ValueError, match=r"data of one size.*do not fit \(20, 3, 6, 6\)"):
        WhiteningDataNorm.fit([torch.randn(20, 3, 16, 16), torch.randn(20, 3, 6, 6)])


def test_batch_norm_of_data_loses_no_digits_of_float64():
    norm = BatchDataNorm((4,))
    x = 1e4 + 1e-2 * torch.randn(500, 4, dtype=torch.float64)
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-8, atol=1e-8)
    assert norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, (0.1 * x.mean(0)).float())
