"""``normprop convert | fold | export``: files that run, whole or not at all; one line for bad input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normprop
from normprop.cli import main
from normprop.recipes import InputError, export as exporting
from normprop.recipes.export import ExportError, export, gaussian, left, load, outputs, relative_error

FACTORIES = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )

def no_statistics():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU())

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = net()[:6]
        self.a, self.b = nn.Conv2d(16, 2, 1), nn.Conv2d(16, 3, 1)
    def forward(self, image):
        y = self.trunk(image)
        return {"a": self.a(y), "b": (self.b(y), y)}

class FirstRowOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
    def forward(self, x):
        return self.linear(x.view(2, 4))
"""
SMALL = ["--input-size", "3x12x12"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with a module of models."""
    (tmp_path / "graphmodels.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("graphmodels", None)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


def files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name not in ("graphmodels.py", "__pycache__"))


# --- convert ------------------------------------------------------------------------------------------


def test_convert_prints_the_table_and_saves_a_model_that_trains(folder, capsys):
    assert run("convert", "graphmodels:net", *SMALL, "--out", "deep/net.pt") == 0
    text = capsys.readouterr().out
    assert "Conv2d -> BatchNorm2d -> relu  NormPropConv2d" in text
    assert text.endswith("0 skipped\ndeep/net.pt\n")
    assert files(folder / "deep") == ["net.pt"]
    model = torch.load("deep/net.pt", weights_only=False)
    assert isinstance(model.get_submodule("0"), normprop.NormPropConv2d)
    assert model.training
    model(torch.randn(1, 3, 12, 12)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    normprop.testing.assert_batch_independent(model, torch.randn(4, 3, 12, 12))


def test_what_convert_saves_is_what_convert_returns(folder):
    model = load("graphmodels:net")
    for layer in (model[1], model[4]):  # as if trained
        nn.init.uniform_(layer.running_mean, -1, 1)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    torch.save(model, "trained.pt")
    assert run("convert", "trained.pt", *SMALL, "--preserve", "--out", "converted.pt") == 0
    x = torch.randn(3, 3, 12, 12)
    assert relative_error(outputs(load("converted.pt"), x), outputs(model, x)) < 1e-5


@pytest.mark.parametrize("model", ["torchvision:googlenet", "timm:test_efficientnet"])
def test_saved_models_of_libraries_compute_the_same(model, tmp_path):
    """googlenet's graphs differ between train() and eval()."""
    pytest.importorskip(model.split(":")[0])
    x = gaussian((3, 64, 64))
    converted = normprop.convert(load(model), example=x).model
    exporting.save(converted, tmp_path / "model.pt")
    loaded = load(str(tmp_path / "model.pt"))
    assert relative_error(outputs(loaded, x), outputs(converted, x)) == 0
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: p.shape for name, p in converted.named_parameters()
    }


def test_dry_run_and_no_out_write_nothing(folder, capsys):
    assert run("convert", "graphmodels:net", *SMALL, "--dry-run", "--out", "net.pt") == 0
    assert capsys.readouterr().out.endswith("\ndry run: nothing was saved\n")
    assert run("convert", "graphmodels:net", *SMALL) == 0
    assert capsys.readouterr().out.endswith("\nnothing was saved; --out FILE.pt saves the model\n")
    assert files(folder) == []


def test_convert_json(folder, capsys):
    assert run("convert", "graphmodels:net", *SMALL, "--rule", "paper", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert [site["path"] for site in value["replaced"]][:2] == ["0", "3"]
    assert (value["skipped"], value["saved"], value["rule"]) == ([], None, "paper")
    assert value["input_size"] == [3, 12, 12]
    assert {"versions", "device", "commit", "notes"} <= set(value)
    assert run("convert", "graphmodels:net", *SMALL, "--json", "--out", "net.pt") == 0
    assert json.loads(capsys.readouterr().out)["saved"] == "net.pt"


def test_strict_tells_what_cannot_be_converted(folder, capsys):
    arguments = ["convert", "graphmodels:no_statistics", *SMALL, "--preserve"]
    assert run(*arguments) == 0
    assert "1 skipped" in capsys.readouterr().out
    assert run(*arguments, "--strict", "--out", "net.pt") == 2
    error = capsys.readouterr().err
    assert error.startswith("normprop: MODEL graphmodels:no_statistics: 1 site cannot be converted: 1: ")
    assert error.count("\n") == 1
    assert files(folder) == []


# --- fold ---------------------------------------------------------------------------------------------


def test_fold_a_saved_model_into_one_that_needs_torch_alone(folder, capsys):
    assert run("convert", "graphmodels:net", *SMALL, "--out", "net.pt") == 0
    capsys.readouterr()
    assert run("fold", "net.pt", *SMALL, "--out", "folded.pt") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["left", "count"]
    assert ["Conv2d", "2"] in [line.split() for line in lines]
    assert lines[-1] == "folded.pt"
    x = torch.randn(3, 3, 12, 12)
    torch.save((x, outputs(load("net.pt"), x)[0]), "expected.pt")
    code = (
        "import sys; sys.modules['normprop'] = None; import torch\n"
        "x, y = torch.load('expected.pt')\n"
        "torch.testing.assert_close(torch.load('folded.pt', weights_only=False)(x), y)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_fold_json_and_convert_first(folder, capsys):
    assert run("fold", "graphmodels:net", *SMALL, "--convert", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["left"]["Conv2d"] == 2
    assert value["left"]["Linear"] == 1
    assert value["relative_error"] < 1e-5
    assert value["saved"] is None
    assert value["converted"] is True
    assert run("fold", "graphmodels:net", *SMALL, "--preserve") == 0
    assert capsys.readouterr().out.endswith("nothing was saved; --out FILE.pt saves the folded model\n")
    assert files(folder) == []


def test_what_is_left_is_counted_by_node():
    model = nn.Sequential(normprop.NormPropLinear(8, 4), normprop.NormPropLinear(4, 4), nn.Flatten())
    assert left(normprop.fold(model)) == {"Linear": 2, "Threshold": 2, "Flatten": 1}


# --- export -------------------------------------------------------------------------------------------


def run_file(path, x):
    if path.endswith(".pt2"):
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("out", ["net.onnx", "net.pt2"])
def test_exported_files_run_at_any_batch_size(folder, capsys, out):
    assert run("convert", "graphmodels:net", *SMALL, "--out", "net.pt") == 0
    capsys.readouterr()
    assert run("export", "net.pt", out, *SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["batch size 1", "batch size 3"]
    assert lines[2].startswith(f"{out}, ")
    assert files(folder) == sorted(["net.pt", out])
    x = torch.randn(7, 3, 12, 12)
    assert relative_error([run_file(out, x)], outputs(load("net.pt"), x)) < 1e-5


@pytest.mark.parametrize("out", ["net.onnx", "net.pt2"])
def test_export_json_fixed_batch_and_overwrite(folder, capsys, out):
    Path(out).write_text("old")
    arguments = ["export", "graphmodels:net", out, *SMALL, "--preserve", "--no-dynamic-batch", "--json"]
    assert run(*arguments) == 2
    assert f"OUT {out}: the file exists; pass --overwrite to replace it" in capsys.readouterr().err
    assert Path(out).read_text() == "old"
    assert run(*arguments, "--overwrite") == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["format"], value["folded"], value["dynamic_batch"]) == (out[4:], True, False)
    assert list(value["errors"]) == ["1"]
    assert value["errors"]["1"] < 1e-5
    assert value["bytes"] == Path(out).stat().st_size
    assert run_file(out, torch.randn(1, 3, 12, 12)).shape == (1, 5)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_models_without_our_layers_and_with_several_outputs_are_exported(folder, tmp_path, suffix):
    result = export(load("graphmodels:TwoHeads"), tmp_path / f"two{suffix}", gaussian((3, 12, 12), 1))
    assert result["folded"] is False
    assert set(result["errors"]) == {1, 3}


def test_a_file_that_differs_is_removed(folder, capsys, monkeypatch):
    write, read = exporting._FORMATS[".pt2"]
    wrong = (write, lambda path, inputs: [y * 1.001 for y in read(path, inputs)])
    monkeypatch.setitem(exporting._FORMATS, ".pt2", wrong)
    assert run("export", "graphmodels:net", "deep/net.pt2", *SMALL, "--convert") == 1
    assert (
        "differs from the model by 0.001 of the largest output at batch size 1" in capsys.readouterr().err
    )
    assert files(folder / "deep") == []


def test_a_model_that_loses_digits_itself_is_exported(tmp_path, monkeypatch):
    class Cancels(nn.Module):
        def forward(self, x):
            return (x + 1e4) - 1e4

    write, read = exporting._FORMATS[".pt2"]

    def reader(factor):
        return lambda path, inputs: [y * factor for y in read(path, inputs)]

    for factor, fits in ((1.0002, True), (1.01, False)):
        monkeypatch.setitem(exporting._FORMATS, ".pt2", (write, reader(factor)))
        if fits:
            errors = export(Cancels(), tmp_path / "net.pt2", gaussian((500,)))["errors"]
            assert errors[1] == pytest.approx(2e-4, rel=1e-3)
        else:
            with pytest.raises(ExportError, match=r"by 0\.01 of the largest output .* \(limit \de-04\)"):
                export(Cancels(), tmp_path / "net.pt2", gaussian((500,)), overwrite=True)


def test_a_model_of_one_batch_size_is_told(folder):
    model = load("graphmodels:FirstRowOnly")
    with pytest.raises(ExportError, match=r"torch cannot export the model: .*--no-dynamic-batch may help"):
        export(model, folder / "one.pt2", gaussian((4,)))
    assert export(model, folder / "one.pt2", gaussian((4,)), dynamic_batch=False)["errors"].keys() == {2}


def test_a_missing_package_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run("export", "graphmodels:net", "net.onnx", *SMALL, "--convert") == 2
    line = "normprop: export to .onnx needs onnxruntime: pip install 'normprop[export]'\n"
    assert capsys.readouterr().err == line
    assert files(folder) == []


# --- files and errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nothing"], "MODEL nothing: expected torchvision:NAME, timm:NAME"),
        (["convert", "none.pt"], "MODEL none.pt: no such file"),
        (["fold", "old.pt"], "MODEL old.pt cannot be read: "),
        (["fold", "state.pt"], "MODEL state.pt holds a dict; expected a whole model"),
        (["convert", "graphmodels:net", "--input-size", "3by12"], "--input-size 3by12: expected whole numbers"),
        (["convert", "graphmodels:net", "--input-size", "4x12x12"], "--input-size 4x12x12: MODEL graphmodels:net"),
        (["convert", "graphmodels:net", *SMALL, "--rule", "best"], "--rule best: expected one of paper, recommended"),
        (["convert", "graphmodels:net", *SMALL, "--out", "old.pt"], "--out old.pt: the file exists; pass"),
        (["convert", "graphmodels:net", *SMALL, "--out", "."], "--out .: is a folder"),
        (["convert", "graphmodels:net", *SMALL, "--out", "old.pt/x.pt"], "--out old.pt/x.pt: cannot write there"),
        (["fold", "graphmodels:net", *SMALL], "has no layers of normprop; pass --convert to convert it first"),
        (["fold", "graphmodels:net", *SMALL, "--out", "old.pt"], "--out old.pt: the file exists"),
        (["export", "graphmodels:net", "old.pt", *SMALL], "OUT old.pt: the file exists"),
        (["export", "graphmodels:net", "net.tflite", *SMALL], "OUT net.tflite: expected a name that ends in"),
        (["export", "graphmodels:net"], "OUT"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_exit_2_and_no_file(folder, capsys, arguments, message):
    Path("old.pt").write_text("old")
    torch.save({"weight": torch.zeros(2)}, "state.pt")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("normprop: ")
    assert error.count("\n") == 1
    assert files(folder) == ["old.pt", "state.pt"]
    assert Path("old.pt").read_text() == "old"


@pytest.mark.parametrize("command", ["convert", "fold", "export"])
def test_help(command, capsys):
    assert run(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "runs code" in text


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("old")
    model = nn.Linear(2, 2)
    model.hook = lambda: None  # pickle refuses it
    with pytest.raises(InputError, match="the model cannot be saved: "):
        exporting.save(model, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.pt"]


def test_outputs_leave_training_flags_alone():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    model[1].eval()
    outputs(model, torch.zeros(1, 2))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_difference_that_is_no_number_is_not_lost():
    ones, nan = torch.ones(1), torch.tensor([float("nan")])
    for outcome in ([ones, nan], [nan, ones]):
        assert math.isnan(relative_error(outcome, [ones, ones]))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_windows_of_unequal_sizes_are_exported(tmp_path, suffix):
    net = nn.Sequential(normprop.NormPropConv2d(3, 4, 3), normprop.NormalizedAdaptiveAvgPool2d(7))
    for size in (5, 12):  # 3 and 10 positions, 7 windows
        errors = export(net, tmp_path / f"net{size}{suffix}", gaussian((3, size, size)))["errors"]
        assert max(errors.values()) < 1e-6
