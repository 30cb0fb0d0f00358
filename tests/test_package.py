"""What a user installs: a wheel that works without the extras, and a README that runs."""

import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import normprop

ROOT = Path(normprop.__file__).parent.parent

WITHOUT_EXTRAS = """
import sys
for name in ("typer", "rich", "pytorch_lightning", "datasets", "sklearn", "matplotlib", "tensorboard", "PIL"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import normprop, torch
from pathlib import Path
assert Path(normprop.__file__).is_relative_to(sys.argv[1]), normprop.__file__
assert (Path(normprop.__file__).parent / "py.typed").exists()
layer = normprop.NormPropConv2d(3, 4, 3, activation="gelu")
assert layer(torch.zeros(1, 3, 5, 5)).shape == (1, 4, 3, 3)
from normprop.cli import main
main(["moments", "relu"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], check=True, timeout=120)
    (built,) = folder.glob("normprop-*.whl")
    target = folder / "elsewhere"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, built]
    subprocess.run(command, check=True, timeout=120)
    return target


def test_the_wheel_works_elsewhere_without_the_extras(wheel, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, wheel],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "normprop: the command line needs typer: pip install 'normprop[recipes]'\n"


def test_a_command_says_which_extra_it_needs(monkeypatch, capsys):
    from normprop.cli import main

    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    for name in list(sys.modules):
        if name.startswith("normprop.recipes."):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    expected = "normprop: this command needs pytorch_lightning: pip install 'normprop[recipes]'\n"
    assert capsys.readouterr().err == expected


def test_version(capsys):
    from normprop.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"normprop {normprop.__version__}\n"
    assert f"version: {normprop.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_readmes_conversion_runs(capsys):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    space = {"normprop": normprop, "torch": torch, "model": model, "images": torch.randn(2, 3, 8, 8)}
    exec(readme_blocks()[1], space)
    assert "1 site replaced, 0 skipped" in capsys.readouterr().out
    net = space["net"].eval()
    torch.testing.assert_close(space["plain"](space["images"]), net(space["images"]))


def test_the_readmes_example_runs():
    code, _ = readme_blocks()
    space = {"train_loader": [(torch.randn(4, 3, 32, 32), torch.zeros(4))]}
    exec(code, space)
    loss = space["model"](torch.randn(2, 3, 32, 32)).square().mean()
    loss.backward()
    space["optimizer"].step()
    rows = space["model"][1].weight.detach().flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(64))
    normprop.fold(space["model"], verify=torch.randn(2, 3, 32, 32))


def test_what_the_package_needs_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(re.split("[>=]", d)[0] for d in project["dependencies"]) == ["numpy", "torch"]


def test_everything_public_is_documented():
    for name, value in vars(normprop).items():
        if not name.startswith("_") and callable(value):
            assert value.__doc__, name


@pytest.mark.parametrize(
    "function",
    [
        normprop.convert,
        normprop.fold,
        normprop.lighten,
        normprop.scale_together,
        lambda model: normprop.predict(model, torch.ones(1)),
        lambda model: normprop.measure(model, torch.ones(1)),
        lambda model: normprop.param_groups(model, 0.0),
        lambda model: normprop.attach_projection(torch.optim.SGD([torch.ones(1)]), model),
    ],
)
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"^model must be an nn.Module, got int"):
        function(3)


def test_what_is_imported_while_a_model_is_traced_finds_math_as_it_is():
    """torch imports its compiler when it first needs it; its rules for math would hold for fx's wrappers."""
    code = """
        import math, torch, normprop
        from torch import nn
        net = normprop.convert(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))).model
        assert "torch._dynamo" in __import__("sys").modules  # else this tests nothing
        torch.compile(net, backend="eager", fullgraph=True)(torch.randn(4, 8))
        torch.compile(lambda x: x * math.prod((2, 3)), backend="eager", fullgraph=True)(torch.ones(1))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True)


def test_the_compiler_is_not_imported():
    """It takes longer than all the rest; torch's own decorator sets the same mark."""
    code = "import sys, normprop; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked) == {"_dynamo_marked_constant": True} == vars(normprop.pools._max_table)
