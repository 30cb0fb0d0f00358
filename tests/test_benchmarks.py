"""The scripts of benchmarks/: what they count, divide and refuse."""

import copy
import doctest
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normprop

pytestmark = pytest.mark.filterwarnings("default")
FOLDER = Path(normprop.__file__).parent.parent / "benchmarks"


def script(name):
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


growth, inference, graphs, libraries = (
    script(name) for name in ("growth", "inference", "graphs", "libraries")
)


def by_contender(rows):
    return {row["contender"]: row for row in rows}


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(power):
    at = [1, 2, 4, 8, 16, 32, 64]
    assert growth.exponent(at, [3e-4 * x**power for x in at]) == pytest.approx(power, abs=1e-9)
    # A fixed cost at the small end, and any order, make no difference.
    values = [5.0 if x < 8 else x**power for x in at]
    assert growth.exponent(at[::-1], values[::-1]) == pytest.approx(power, abs=1e-9)


def test_exponent_of_a_noisy_power_law():
    at = np.geomspace(1, 1e4, 400)
    noise = 0.1
    values = at**1.5 * np.exp(noise * np.random.default_rng(0).standard_normal(400))
    standard_error = noise / (np.log(at[200:]).std() * 200**0.5)
    assert abs(growth.exponent(list(at), list(values)) - 1.5) < 4 * standard_error
    assert doctest.testmod(growth).failed == 0


def test_bytes_of_a_plain_mlp_are_counted_by_hand():
    rows = {
        depth: by_contender(growth.measure_point(growth.Point("depth", "mlp", depth=depth), 1))
        for depth in (10, 20)
    }
    layer = 32 * 48 * 4  # the output of a rectifier, float32
    for depth, mine in rows.items():
        # Beside them what the loss keeps of 32 x 10 outputs.
        assert 0 <= mine["none"]["bytes"] - (depth - 1) * layer < 2048
        assert {row["status"] for row in mine.values()} == {"ok"}
    assert rows[20]["none"]["bytes"] - rows[10]["none"]["bytes"] == 10 * layer
    for label in growth.CONTENDERS:
        assert rows[20][label]["bytes"] / rows[10][label]["bytes"] == pytest.approx(19 / 9, rel=0.03)
    assert rows[10]["batch"]["bytes_ratio"] > 1.9


@pytest.mark.parametrize("family", ["mlp", "resnet"])
def test_normprop_keeps_no_more_at_a_larger_batch(family):
    extra = {}
    for batch in (1, 4, 16):
        rows = by_contender(growth.measure_point(growth.Point("batch", family, batch=batch, depth=6), 1))
        plain = rows["none"]["bytes"]
        assert plain > 4 * batch * 48 * 5  # five hidden layers or more
        for label in ("normprop, paper", "normprop, recommended"):
            extra.setdefault(label, set()).add(rows[label]["bytes"] - plain)
    for label, found in extra.items():
        assert len(found) == 1, label
        assert 0 <= found.pop() <= 6 * 48 * 4 * 2  # a vector or two a layer


def test_depth_counts_weight_layers():
    for family, depth in (("mlp", 10), ("mlp", 30), ("resnet", 10), ("resnet", 30)):
        point = growth.Point("depth", family, depth=depth)
        net = point.network(growth.Blocks("none", normprop.PAPER))
        assert sum(isinstance(m, nn.Linear | nn.Conv2d) for m in net.modules()) == depth


def test_growth_writes_fits_and_resumes(tmp_path, monkeypatch):
    todo = growth.points({"batch": (1, 2, 4, 8)}, ["mlp"])
    first = growth.growth(todo[:2], 2, tmp_path)
    assert first["fits"] == []
    result = growth.growth(todo, 2, tmp_path)
    text = (tmp_path / "growth.json").read_text()
    assert json.loads(text) == result
    assert str(Path.cwd()) not in text
    assert {"versions", "device", "threads", "commit"} <= set(result)
    assert result["rows"][: len(first["rows"])] == first["rows"]  # kept, not measured again
    assert [row["batch"] for row in result["rows"] if row["contender"] == "none"] == [1, 2, 4, 8]
    for row in result["rows"]:
        if (row["batch"], row["contender"]) == (1, "batch"):
            assert row["status"].startswith("cannot train")
            continue
        assert row["status"] == "ok"
        assert row["error"] < 1e-2
        assert row["rounds"] == 2
        assert 0 < row["ratio"] < math.inf
        assert row["ratio"] == 1 or row["contender"] != "none"
    fits = by_contender(result["fits"])
    assert set(fits) == set(growth.CONTENDERS)
    assert fits["none"]["bytes"] == pytest.approx(1, abs=0.02)
    assert isinstance(fits["normprop, paper"]["overhead_shrinks"], bool)
    assert (tmp_path / "growth.png").stat().st_size > 1000

    monkeypatch.setattr(growth, "measure_point", None)
    assert growth.growth(todo, 2, tmp_path)["rows"] == result["rows"]
    with pytest.raises(TypeError):  # other rounds are another experiment
        growth.growth(todo, 3, tmp_path)


def test_growth_refuses_wrong_layers(monkeypatch):
    honest = normprop.functional.rectify
    monkeypatch.setattr(normprop.functional, "rectify", lambda y, low, slope: honest(y, low + 0.1, slope))
    rows = by_contender(growth.measure_point(growth.Point("batch", "mlp", batch=4), 1))
    assert rows["normprop, paper"]["status"].startswith("wrong: relative error")
    assert "ms" not in rows["normprop, paper"]
    assert rows["batch"]["status"] == "ok"


def test_without_norm_is_the_network_around_its_batch_norms():
    pytest.importorskip("torchvision")
    model = inference.load_model("torchvision:resnet18").eval()
    bare = inference.without_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in bare.modules())
    assert all(m.bias is not None for m in bare.modules() if isinstance(m, nn.Conv2d))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1 - module.eps)  # now it changes nothing
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(bare(x), model(x), rtol=1e-4, atol=1e-4)


def test_inference_times_what_the_model_computes(tmp_path):
    case = inference.Case("nin", 2, width=0.1)
    result = inference.inference([case, inference.Case("nin", 2, "bf16", width=0.1)], 3, tmp_path)
    assert json.loads((tmp_path / "inference.json").read_text()) == result
    assert (tmp_path / "inference.png").stat().st_size > 1000
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert 0 < row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1] < math.inf
        assert row["in_bar"] == (0.98 <= row["ratio"] <= 1.02)
        assert row["operations"]["Conv2d"] == 9
        if row["contender"].startswith("folded"):
            assert row["error"] <= 1e-4
    assert [r["ratio"] for r in result["rows"] if r["contender"] == "plain"] == [1.0, 1.0]

    _, models = inference.networks(case)
    x = torch.randn(2, 3, 32, 32)
    for model in models.values():
        with torch.no_grad():
            torch.testing.assert_close(normprop.fold(model)(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_wrong_fold_is_not_timed(monkeypatch):
    honest = normprop.fold

    def off(model):
        folded = copy.deepcopy(honest(model))
        with torch.no_grad():
            for parameter in folded.parameters():
                parameter.mul_(1.1)
        return folded

    monkeypatch.setattr(normprop, "fold", off)
    rows = by_contender(inference.compare(inference.Case("nin", 1, width=0.1), 1))
    assert rows["folded, paper"]["status"].startswith("wrong: ")
    assert "ms" not in rows["folded, paper"]
    assert rows["plain, again"]["rounds"] == 5


def test_graphs_reports_medians(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    verbs = graphs.once("torchvision:resnet18", 64)
    assert set(verbs) == {"convert", "predict", "fold", "fold, verified"}
    assert all(0 < seconds < 60 for seconds in verbs.values())

    runs = iter([{"fold": 1.0}, {"fold": 30.0}, {"fold": 12.0}])
    monkeypatch.setattr(graphs, "once", lambda spec, image: next(runs))
    result = graphs.graphs("torchvision:resnet18", 64, 3, tmp_path)
    assert json.loads((tmp_path / "graphs.json").read_text()) == result
    assert result["rows"] == [{"verb": "fold", "seconds": 12.0, "all": [1.0, 30.0, 12.0], "in_bar": False}]
    assert result["rounds"] == 3


def test_a_model_of_a_library_is_checked():
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))

    row = libraries.check(build, (3, 9, 9))
    assert (row["batch_norms"], row["sites"], libraries.misses(row)) == (1, 2, [])
    worse = row | {"fold": 1e-3, "in_range": 0.5, "skipped": ["a: unused", "b: unused"]}
    assert libraries.misses(worse) == ["fold 1e-03", "in range 0.50", "2 skipped: unused"]


def test_the_committed_table_of_libraries_is_of_its_results():
    rows = json.loads((FOLDER / "zoo" / "libraries.json").read_text())["rows"]
    assert libraries.table(rows) + "\n" == (FOLDER / "zoo" / "libraries.md").read_text()
    assert {(row["library"], row["model"]) for row in rows} == {
        (library, name) for library, cases in libraries.CASES.items() for name in cases
    }
