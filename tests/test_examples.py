"""The examples run, and what they print is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normprop

FOLDER = Path(normprop.__file__).parent.parent / "examples"
NEEDS = {"convert_resnet": ["onnxruntime", "sklearn", "torchvision"], "convert_timm": ["timm"]}


def run(name: str, *arguments: str) -> str:
    for package in NEEDS.get(name, ["torchvision"]):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # tests run side by side
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str, pattern: str) -> list[float]:
    found = re.findall(pattern, text)
    assert found, text
    return [float(number) for number in found]


def test_every_example_is_run():
    tested = {"convert_resnet", "convert_timm", "norm_layer"}
    assert {path.stem for path in FOLDER.glob("*.py")} == tested


def test_a_trained_resnet_goes_on_at_batch_size_1():
    text = run("convert_resnet", "30")
    before, after = numbers(text, r"accuracy ([\d.]+)")
    assert before > 0.3  # of 10 classes
    assert after > before - 0.05
    assert "20 layers replaced" in text  # 20 convolutions, each with its BatchNorm
    assert max(numbers(text, r"largest difference ([\d.e+-]+)")) < 1e-3


def test_a_timm_model_trains_and_folds():
    text = run("convert_timm")
    first, last = numbers(text, r"(?:loss|9 steps) ([\d.]+)")
    assert last < first
    assert numbers(text, r"(\d+) NormProp layers left") == [0, 0]
    assert max(numbers(text, r"largest difference ([\d.e+-]+)")) < 1e-4


def test_models_built_with_norm_layer():
    text = run("norm_layer")
    assert numbers(text, r"(\d+) BatchNorms left") == [0, 0]
    assert "resnet18(norm_layer=nn.Identity): 0 replaced, no BatchNorm layer found" in text
