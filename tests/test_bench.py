"""The benchmark refuses wrong results and divides by the right thing."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

import normprop
from normprop.recipes import InputError, bench as module
from normprop.recipes.bench import Case, bench, measure

pytestmark = pytest.mark.filterwarnings("default")
SMALL = Case(model="cnn", batch_size=4, image=8)
QUIET = Console(quiet=True)


def test_rows_and_files(tmp_path):
    result = bench(
        [SMALL, Case("cnn", batch_size=1, image=8)], ["normprop", "batch"], 3, "cpu", tmp_path, QUIET
    )
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert [(r["batch_size"], r["norm"]) for r in result["rows"]] == [
        (size, norm) for size in (4, 1) for norm in ("none", "normprop", "batch")
    ]
    for row in result["rows"]:
        if (row["norm"], row["batch_size"]) == ("batch", 1):
            assert row["status"].startswith("cannot train")
            continue
        assert row["status"] == "ok"
        assert row["error"] < 1e-4
        assert set(row["ms"]) == {
            "step",
            *module.PHASES,
        }  # medians of 3 on a busy machine: no order is sure
        assert min(row["ms"].values()) > 0
    assert [r["ratio"] for r in result["rows"] if r["norm"] == "none"] == [1.0, 1.0]
    assert {"versions", "device", "threads", "commit"} <= set(result)


def test_normprop_keeps_the_bytes_of_no_normalisation():
    rows = {row["norm"]: row for row in measure(SMALL, ["normprop", "batch"], 1, "cpu")}
    # By hand, batch 4 in float32: two maps of 16x8x8 and their pool, two of 32x4x4 and theirs, 64 hidden.
    maps = 4 * 4 * (2 * 16 * 64 + 16 * 16 + 2 * 32 * 16 + 32 * 4 + 64)
    assert maps <= rows["none"]["bytes"] <= maps + 1024  # and what the loss keeps of 4 x 10 outputs
    assert rows["normprop"]["bytes_ratio"] <= 1.02
    assert rows["batch"]["bytes_ratio"] > 1.3


def test_a_wrong_contender_is_not_timed(monkeypatch):
    honest = normprop.functional.rectify
    monkeypatch.setattr(normprop.functional, "rectify", lambda y, low, slope: honest(y, low + 0.1, slope))
    rows = {row["norm"]: row for row in measure(SMALL, ["normprop"], 1, "cpu")}
    assert rows["normprop"]["status"].startswith("wrong: relative error")
    assert "ratio" not in rows["normprop"]


def test_without_a_right_network_without_norm_there_is_no_ratio(monkeypatch):
    honest = module.Contender.error
    monkeypatch.setattr(
        module.Contender, "error", lambda self, *args: 1.0 if self.norm == "none" else honest(self, *args)
    )
    rows = {row["norm"]: row for row in measure(SMALL, ["normprop"], 1, "cpu")}
    assert rows["none"]["status"] == "wrong: relative error 1 against float64"
    assert rows["normprop"]["status"] == "no ratio: 'none' is wrong: relative error 1 against float64"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_does_not_fit_is_a_row(monkeypatch, error):
    honest = module.Contender.memory

    def memory(self, *args):
        if self.norm == "batch":
            raise error
        return honest(self, *args)

    monkeypatch.setattr(module.Contender, "memory", memory)
    rows = {row["norm"]: row for row in measure(SMALL, ["batch", "normprop"], 1, "cpu")}
    assert rows["batch"]["status"] == "out of memory"
    assert "ratio" in rows["normprop"]


def test_the_definition_is_what_the_layers_compute():
    for rule in (normprop.PAPER, normprop.NormRule(True, "affine", 0.7)):
        for activation in ("relu", "gelu", torch.nn.LeakyReLU(0.2), None):
            layer = normprop.NormPropConvTranspose2d(
                4, 6, 3, 2, groups=2, activation=activation, rule=rule
            ).double()
            torch.nn.init.normal_(layer.bias)
            x = torch.randn(2, 4, 5, 5).double()
            fast = layer(x)
            with normprop.functional.plainly():
                plain = layer(x)
            torch.testing.assert_close(fast, plain)
            grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (fast, plain)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int8"}, "--precisions int8: expected one of fp32, bf16"),
        ({"layout": "nhwc"}, "--layout nhwc: expected one of channels_last"),
        ({"rule": "best"}, "--rules best: expected one of paper"),
        ({"batch_size": 0}, "--batch-sizes 0: expected at least 1"),
    ],
)
def test_bad_cases(change, message):
    with pytest.raises(InputError, match=message):
        Case(**change)


def test_no_such_device(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: torch sees no CUDA device"):
            bench([SMALL], [], 1, "cuda", tmp_path / "out", QUIET)
    with pytest.raises(InputError, match="--rounds 0"):
        bench([SMALL], [], 0, "cpu", tmp_path / "out", QUIET)
    graphs = dataclasses.replace(SMALL, compiled=True, cudagraphs=True)
    with pytest.raises(InputError, match="--modes cudagraphs: needs --device cuda"):
        bench([graphs], [], 1, "cpu", tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()
