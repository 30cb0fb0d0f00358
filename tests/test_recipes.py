"""Models, data, training and comparison: each sentence of the command line's promises."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import normprop
from normprop.recipes import InputError
from normprop.recipes.compare import compare, summary
from normprop.recipes.data import ImageData, load
from normprop.recipes.models import MODELS, NORMS, build
from normprop.recipes.results import output_folder, write_json
from normprop.recipes.train import Run, fit, make_orthogonal, network, newest_checkpoint, train

pytestmark = pytest.mark.filterwarnings("default")  # Lightning, datasets and matplotlib warn as they like


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits")


@pytest.fixture(scope="module")
def few(digits: ImageData) -> ImageData:
    """96 training and 32 test images."""
    return replace(
        digits,
        train_x=digits.train_x[:96],
        train_y=digits.train_y[:96],
        test_x=digits.test_x[:32],
        test_y=digits.test_y[:32],
    )


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_under_every_norm_has_a_gradient_everywhere(model, norm):
    net = build(model, (3, 32, 32), 7, norm, width=0.125)
    output = net(torch.randn(4, 3, 32, 32))
    assert output.shape == (4, 7)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    ours = any(type(m).__module__.startswith("normprop.modules") for m in net.modules())
    assert ours == (norm == "normprop")


@pytest.mark.parametrize("model", MODELS)
def test_normprop_models_keep_the_promises(model):
    net = build(model, (1, 20, 20), 5, width=0.125).double()
    x, y = torch.randn(3, 1, 20, 20).double(), torch.tensor([0, 4, 2])
    normprop.testing.assert_batch_independent(net, x)
    normprop.testing.assert_train_equals_eval(net, x)
    normprop.testing.assert_accumulation_equals_batch(net, x, y, nn.functional.cross_entropy)
    assert not list(net.buffers())


def test_nin_is_the_papers():
    """Arpit et al. 2016, sec. 5: nine convolutions, 1,555,392 weights, maps of 32, 32, 16, 16, 16, 8, 4, 8, 8."""
    net = build("nin", (3, 32, 32), 10)
    convolutions = [m for m in net if isinstance(m, nn.Conv2d)]
    maps = []
    for layer in convolutions:
        layer.register_forward_hook(lambda _, __, output: maps.append(output.shape[-1]))
    net(torch.zeros(1, 3, 32, 32))
    assert maps == [32, 32, 16, 16, 16, 8, 4, 8, 8]
    assert sum(layer.weight.numel() for layer in convolutions) == 1_555_392


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg", (3, 32, 32), 10), "--model vgg: expected one of mlp, cnn, nin"),
        (("cnn", (3, 32, 32), 10, "instance"), "--norm instance: expected one of normprop, batch"),
        (("nin", (1, 8, 8), 10), "--model nin needs images of at least 18x18, got 8x8"),
        (("cnn", (1, 3, 3), 10), "--model cnn needs images of at least 4x4, got 3x3"),
        (("cnn", (1, 8, 8), 10, "none", normprop.PAPER, 0.0), "--width 0.0: expected a number above 0"),
        (
            ("code_model:gray", (1, 8, 8), 10, "group"),
            "code_model:gray can be had with the norms normprop",
        ),
        (
            ("code_model:gray", (3, 8, 8), 10),
            "--model code_model:gray fails on images of 3x8x8: Given groups=1",
        ),
        (
            ("code_model:pair", (1, 8, 8), 10),
            "--model code_model:pair returns a tuple in training; expected one",
        ),
        (("code_model:white", (1, 8, 8), 10), "MODEL code_model:white: there is no white"),
        (("code_model:mute", (1, 8, 8), 10), "fails on images of 1x8x8: NotImplementedError"),
        (("code_model:plain", (1, 8, 8), 10), "--model code_model:plain has no BatchNorm to convert"),
        (("code_model:wide", (1, 8, 8), 10), r"returns shape \(2, 20\) for 2 images; expected \(2, 10\)"),
        (
            ("torchvision:raft_small", (3, 64, 64), 10),
            "--model torchvision:raft_small fails on images of 3x64x64",
        ),
        (
            ("code_model:gray", (1, 8, 8), 10, "normprop", normprop.PAPER, 0.5),
            "--model code_model:gray has its own width and activation; leave --width",
        ),
    ],
)
def test_bad_models_are_told_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        build(*arguments)


def test_other_libraries_models_are_had_as_they_are_bare_and_converted():
    x = torch.randn(3, 3, 32, 32)
    kinds, activations = {}, []
    for norm in ("batch", "none", "normprop"):
        net = build("timm:test_efficientnet", (3, 32, 32), 7, norm)
        kinds[norm] = {type(m).__name__ for m in net.modules()}
        normed = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert bool(normed) == (norm == "batch")
        assert not any(m.num_batches_tracked for m in normed)  # the check did not train them
        assert net(x).shape == (3, 7)
        activations.append(sum(isinstance(m, nn.SiLU) for m in net.modules()))
    assert activations[0] == activations[1] > 5
    assert "NormPropConv2d" in kinds["normprop"] - kinds["none"]
    bare = build("code_model:gray", (1, 8, 8), 10, "none")
    assert [m.bias is not None for m in bare.modules() if isinstance(m, nn.Conv2d)] == [True] * 5
    assert Run(model="timm:test_efficientnet").peak_lr == Run(norm="batch").peak_lr < Run().peak_lr
    # A factory may be the model itself, in evaluation mode: each run has its own, in training.
    one, other = (build("code_model:MADE", (1, 8, 8), 10, "batch") for _ in range(2))
    assert one is not other
    assert one[0].weight is not other[0].weight
    assert one[1].training


def test_compare_refuses_each_norm_that_the_model_cannot_be_had_with_before_it_writes(few, tmp_path):
    run = Run(model="code_model:gray", batch_size=16, epochs=1)
    with pytest.raises(
        InputError, match="code_model:gray can be had with the norms normprop, batch and none"
    ):
        compare(run, few, ["normprop", "group"], [16], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_smallest_images():
    assert build("nin", (3, 18, 18), 10, width=0.05)(torch.zeros(2, 3, 18, 18)).isfinite().all()
    assert build("cnn", (1, 4, 5), 10)(torch.zeros(2, 1, 4, 5)).isfinite().all()


# --- data -------------------------------------------------------------------------------------------


def test_digits(digits):
    assert digits.shape == (1, 8, 8)
    assert (len(digits.train_x), len(digits.test_x)) == (1437, 360)
    assert digits.train_y.bincount().min() > 100
    images = {bytes(x.numpy().tobytes()) for x in digits.train_x}
    assert sum(bytes(x.numpy().tobytes()) in images for x in digits.test_x) == 0


def write_parquet(folder, images, labels, split="train", columns=("image", "label")):
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    parquet.write_table(
        pa.table(dict(zip(columns, (images, labels), strict=True))), folder / f"{split}.parquet"
    )
    return folder


def png(size=(6, 5), mode="RGB", value=0) -> bytes:
    import io

    buffer = io.BytesIO()
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    array = (np.arange(math.prod(shape)).reshape(shape) + value) % 256
    Image.fromarray(array.astype(np.uint8), mode=None).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_folder_gives_the_pixels(tmp_path):
    folder = tmp_path / "tiny"
    write_parquet(folder, [png(value=v) for v in range(4)], [0, 1, 2, 1])
    write_parquet(folder, [png(value=9)], [2], "test")
    data = load(str(folder))
    assert (data.name, data.shape, data.classes) == ("tiny", (3, 5, 6), 3)
    assert data.train_y.tolist() == [0, 1, 2, 1]
    expected = (np.arange(90).reshape(5, 6, 3) + 9) % 256
    assert np.array_equal(data.test_x[0].permute(1, 2, 0).numpy(), expected)


def test_image_folder_and_saved_dataset(tmp_path):
    import datasets

    folder = tmp_path / "photos"
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                (folder / split / name / f"{index}.png").write_bytes(png(mode="L", value=index))
    data = load(str(folder))
    assert data.shape == (1, 5, 6)
    assert data.train_y.tolist() == [0, 0, 0, 1, 1, 1]

    arrays = {"image": [[[0.5, 1.5], [2.5, 3.5]]] * 2, "label": ["b", "a"]}
    saved = datasets.DatasetDict({split: datasets.Dataset.from_dict(arrays) for split in ("train", "test")})
    saved.save_to_disk(str(tmp_path / "saved"))
    data = load(str(tmp_path / "saved"))
    assert data.train_y.tolist() == [1, 0]
    assert data.train_x[0].tolist() == [[[0.5, 1.5], [2.5, 3.5]]]
    saved["test"] = saved["test"].select([])
    saved.save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="none of them empty"):
        load(str(tmp_path / "empty"))


GOOD = [png(), png()]
BAD_DATA = {
    "picture": (
        [GOOD, [0, 1], ("picture", "label")],
        "images called image or img, got picture, label",
    ),
    "y": (
        [GOOD, [0, 1], ("image", "y")],
        "labels called label or labels or fine_label, got image, y",
    ),
    "negative": ([GOOD, [0, -1]], "image 1 has label -1; expected 0 to 0"),
    "huge label": ([GOOD, [0, 10**9]], "label 1000000000 in 2 training images"),
    "half label": ([GOOD, [0.5, 1.0]], "label 0.5; expected an integer"),
    "sizes": ([[png(), png((7, 5))], [0, 1]], "image 1 is 5x7 with 3 channels, image 0 is 5x6"),
    "truncated": ([[png(), png()[:40]], [0, 1]], "image 1 cannot be read"),
    "text": ([[b"hello", png()], [0, 1]], "image 0 cannot be read"),
    "nan": ([[[[0.0, 1.0]], [[0.0, math.nan]]], [0, 1]], "image 1 holds NaN or infinite pixels"),
    "missing": ([[png(), None], [0, 1]], "image 1 is missing"),
    "empty": ([np.array([], "O"), np.array([], "int64")], "(none of them empty)"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_exit_2_and_no_folder(tmp_path, name, capsys):
    (images, labels, *rest), message = BAD_DATA[name]
    columns = rest[0] if rest else ("image", "label")
    for split in ("train", "test"):
        folder = write_parquet(tmp_path / "bad", images, labels, split, columns)
    error = run_cli(["train", "--dataset", str(folder), "--out", str(tmp_path / "out")], capsys)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_test_split_is_held_against_train(tmp_path):
    folder = write_parquet(tmp_path / "a", [png(), png()], [0, 1])
    write_parquet(folder, [png()], [2], "test")
    with pytest.raises(InputError, match="split test: image 0 has label 2; expected 0 to 1"):
        load(str(folder))
    write_parquet(folder, [png((9, 9))], [1], "test")
    with pytest.raises(
        InputError, match="split test: images are 9x9 with 3 channels, those of train are 5x6"
    ):
        load(str(folder))
    (folder / "test.parquet").unlink()
    with pytest.raises(InputError, match="expected splits train and test, got train"):
        load(str(folder))


# --- the command line ---------------------------------------------------------------------------------


def run_cli(arguments, capsys, code=2):
    """The one line on standard error."""
    from normprop.cli import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == code, error
    assert error.startswith("normprop: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["train", "--epochs", "0"], "--epochs 0: expected at least 1"),
        (["train", "--lr", "nan"], "--lr nan: expected a number above 0"),
        (["train", "--lr", "fast"], "got fast"),
        (["train", "--norm", "instance"], "--norm instance: expected one of normprop"),
        (["train", "--model", "vgg"], "--model vgg: expected one of mlp"),
        (["train", "--rule", "best"], "--rule best: expected one of paper, recommended"),
        (["train", "--data-norm", "white"], "--data-norm white: expected one of channel"),
        (["train", "--data-norm", "batch", "--batch-size", "1"], "use --data-norm global"),
        (["train", "--precision", "8"], "--precision 8: expected one of 32-true"),
        (["train", "--seed", "-1"], "--seed -1: expected 0 to 4294967295"),
        (["train", "--devices", "many"], "--devices many: expected 1 to "),
        (["train", "--devices", "9999"], "--devices 9999: expected 1 to "),
        (["train", "--batch-size", str(2**31)], f"--batch-size {2**31}: expected at most {2**31 - 1}"),
        (["train", "--lr", "1e300"], "--lr 1e+300: expected a number above 0, at most 1e+30"),
        (["train", "--weight-decay", "1e300"], "--weight-decay 1e+300: expected a number from 0 to 1e+30"),
        (["train", "--norm", "batch", "--trust-radius", "1"], "plain steps of --norm batch have none"),
        (["train", "--validation", "9999"], "--validation 9999: digits has 1437 training images"),
        (["train", "--nodes", "0"], "--nodes 0: expected at least 1"),
        (["train", "--width", "-1"], "--width -1.0: expected a number above 0"),
        (["train", "--model", "nin"], "--model nin needs images of at least 18x18, got 8x8"),
        (["train", "--dataset", "./nowhere"], "--dataset ./nowhere: no such folder; expected 'digits'"),
        (["train", "--dataset", "no_such_data_set"], "--dataset no_such_data_set: "),
        (["train", "--resume"], "no checkpoint in"),
        (["compare", "--norms", "normprop,instance"], "--norms instance: expected some of normprop"),
        (["compare", "--norms", ""], "--norms : expected some of"),
        (["compare", "--batch-sizes", "1,x"], "--batch-sizes 1,x: expected whole numbers"),
        (["compare", "--batch-sizes", "8,0"], "--batch-sizes 0: expected at least 1"),
        (["compare", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["compare", "--model", "nin"], "--model nin needs images"),
        (["moments", "rely"], "unknown activation 'rely'; names: identity, relu"),
        (["moments", "relu", "--std", "-1"], "std must be at least 0, got -1.0"),
        (["fly"], "fly"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_exit_2_and_no_folder(tmp_path, arguments, message, capsys):
    out = tmp_path / "deep" / "out"
    if arguments[0] in ("train", "compare"):
        arguments = [*arguments, "--out", str(out)]
    assert message in run_cli(arguments, capsys)
    assert not out.parent.exists()


def test_moments_prints_the_constants(capsys):
    from normprop.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["moments", "relu", "--json"])
    assert stop.value.code == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mean"] == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-12)
    assert values["std"] == pytest.approx(math.sqrt((1 - 1 / math.pi) / 2), abs=1e-12)
    with pytest.raises(SystemExit):
        main(["moments", "all"])
    table = capsys.readouterr().out
    assert "0.39894228" in table
    assert all(name in table for name in normprop.activations.names())


@pytest.mark.parametrize("command", [[], ["train"], ["compare"], ["moments"]])
def test_help(command, capsys):
    from normprop.cli import main

    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "Usage" in capsys.readouterr().out


# --- training -----------------------------------------------------------------------------------------

QUICK = Run(model="cnn", width=0.5, batch_size=16, epochs=3)


def test_train_writes_the_results(few, tmp_path):
    seen = []
    outcome = train(QUICK, few, tmp_path / "run", report=lambda h: seen.append(len(h)), devices="1")
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert seen == [1, 2, 3]
    assert record["status"] == "ok"
    assert record["test_accuracy"] == outcome.test_accuracy == record["epochs"][-1]["test_accuracy"]
    assert record["run"] == asdict(QUICK) | {"dataset": "digits"}
    assert {"versions", "device", "commit"} <= set(record)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-2.ckpt"]
    logs = [p.name for p in (tmp_path / "run" / "logs").rglob("*")]
    assert "metrics.csv" in logs
    assert any(name.startswith("events.out.tfevents") for name in logs)
    # model.pt is the network that the accuracy was measured on, data end included.
    net = network(replace(QUICK, seed=1), few)
    net.load_state_dict(torch.load(tmp_path / "run" / "model.pt"))
    correct = (net(few.test_x.float()).argmax(1) == few.test_y).double().mean().item()
    assert correct == pytest.approx(outcome.test_accuracy)


@pytest.mark.parametrize("change", [{}, {"flip": True}, {"model": "code_model:gray", "width": 1.0}])
def test_resume_after_a_kill_ends_bit_for_bit_where_an_uninterrupted_run_ends(few, tmp_path, change):
    run = replace(QUICK, **change)
    whole = train(run, few, tmp_path / "whole", devices="1")

    class Kill(BaseException):
        pass

    def die(history):
        if len(history) == 2:  # in the evaluation of epoch 2: epoch 1 is the last that is saved
            raise Kill

    with pytest.raises(Kill):
        train(run, few, tmp_path / "killed", report=die, devices="1")
    assert newest_checkpoint(tmp_path / "killed").name == "epoch-0.ckpt"
    resumed = train(run, few, tmp_path / "killed", resume=True, devices="1")
    records = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    for record in records:
        for epoch in record["epochs"]:
            del epoch["seconds"]
    assert records[0]["epochs"] == records[1]["epochs"]
    for (name, a), b in zip(
        whole.network.state_dict().items(), resumed.network.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_resume_after_kill_9(tmp_path):
    """A process that is killed in the middle of an epoch leaves a whole checkpoint, and no other file breaks."""
    arguments = ["train", "--model", "mlp", "--width", "0.25", "--epochs", "40", "--batch-size", "4"]
    command = [sys.executable, "-m", "normprop.cli", *arguments, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 3/40"):
            break
    process.kill()
    process.communicate()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "partial"
    at = int(newest_checkpoint(tmp_path / "run").stem.split("-")[1])
    assert at >= 1
    process = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.kill()
    process.communicate()
    assert first.startswith(f"epoch {at + 2}/40")


def test_a_checkpoint_of_another_run_is_refused(few, tmp_path):
    train(replace(QUICK, epochs=1), few, tmp_path, devices="1")
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        train(replace(QUICK, epochs=1), few, tmp_path)
    with pytest.raises(InputError, match="holds a run with model cnn, this one has mlp"):
        train(replace(QUICK, epochs=1, model="mlp"), few, tmp_path, resume=True)
    with pytest.raises(InputError, match="holds a run with dataset digits, this one has other"):
        train(replace(QUICK, epochs=1), replace(few, name="other"), tmp_path, resume=True)
    (tmp_path / "checkpoints" / "epoch-0.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="is no checkpoint of normprop train"):
        train(replace(QUICK, epochs=1), few, tmp_path, resume=True)


def test_a_norm_that_cannot_train_and_a_loss_that_is_no_number_are_statuses(few):
    refused = fit(replace(QUICK, norm="batch", batch_size=1), few)
    assert (refused.status, refused.test_accuracy) == ("cannot train", None)
    assert refused.reason == "BatchNorm saw one value a channel (a batch of 1)"
    diverged = fit(replace(QUICK, norm="none", lr=1e6), few)
    assert (diverged.status, diverged.test_accuracy) == ("diverged", None)
    assert "try --lr" in diverged.reason


def test_odd_sizes_train(few):
    one = replace(few, train_x=few.train_x[:1], train_y=few.train_y[:1])
    assert fit(replace(QUICK, epochs=1, data_norm="channel"), one).status == "ok"
    assert fit(replace(QUICK, epochs=1, batch_size=95), few).status == "ok"  # a last batch of one
    assert fit(replace(QUICK, epochs=1, batch_size=10_000), few).status == "ok"


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_and_data_norms(few, precision):
    for data_norm in ("channel", "batch", "none"):
        outcome = fit(replace(QUICK, epochs=1, precision=precision, data_norm=data_norm), few)
        assert outcome.status == "ok"


def test_rows_stay_on_the_sphere_in_training(few):
    outcome = fit(replace(QUICK, epochs=1), few)
    layer = outcome.network.model[1]
    torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.ones(layer.out_channels))


def test_two_processes_train_together(tmp_path):
    arguments = ["train", "--model", "mlp", "--epochs", "2", "--batch-size", "64", "--devices", "2"]
    command = [sys.executable, "-m", "normprop.cli", *arguments, "--out", str(tmp_path / "run"), "--json"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "ok"
    assert record["test_accuracy"] > 0.8


# --- comparison -----------------------------------------------------------------------------------------


def test_compare(few, tmp_path):
    result = compare(replace(QUICK, epochs=1), few, ["normprop", "batch"], [1, 16], 2, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert result["status"] == "complete"
    assert [(r["seed"], r["batch_size"], r["norm"], r["status"]) for r in result["rows"][:4]] == [
        (0, 1, "normprop", "ok"),
        (0, 1, "batch", "cannot train"),
        (0, 16, "normprop", "ok"),
        (0, 16, "batch", "ok"),
    ]
    for row in result["rows"]:
        assert (row["test_accuracy"] is not None) == (row["status"] == "ok")
        assert row["test_accuracy"] is None or 0 <= row["test_accuracy"] <= 1
    with Image.open(tmp_path / "out" / "compare.png") as image:
        assert min(image.size) > 300
    means = {(r["norm"], r["batch_size"]): r for r in summary(result["rows"])}
    both = [r["test_accuracy"] for r in result["rows"] if (r["norm"], r["batch_size"]) == ("batch", 16)]
    assert means["batch", 16]["mean"] == pytest.approx(np.mean(both))
    assert means["batch", 16]["std"] == pytest.approx(np.std(both, ddof=1))
    assert means["batch", 1]["mean"] is None


def test_an_interrupted_comparison_goes_on_and_another_one_is_refused(few, tmp_path):
    run = replace(QUICK, epochs=1)
    first = compare(run, few, ["normprop", "none"], [16], 1, tmp_path)
    partial = first | {"rows": first["rows"][:1], "status": "partial"}
    partial["rows"][0]["test_accuracy"] = 0.125  # a mark: the finished run is kept, not run again
    write_json(tmp_path / "results.json", partial)
    second = compare(run, few, ["normprop", "none"], [16], 1, tmp_path)
    assert [row["test_accuracy"] for row in second["rows"]] == [0.125, first["rows"][1]["test_accuracy"]]
    with pytest.raises(InputError, match="holds another comparison"):
        compare(replace(run, width=1.0), few, ["normprop", "none"], [16], 1, tmp_path)
    for other in ("[1, 2]", '{"run": 3}', "no JSON"):
        (tmp_path / "results.json").write_text(other)
        with pytest.raises(InputError, match=r"results\.json there is of something else"):
            compare(run, few, ["normprop", "none"], [16], 1, tmp_path)


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    command = [sys.executable, "-m", "normprop.cli", "train", "--model", "mlp", "--epochs", "400"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "normprop: stopped; what was finished is kept\n"
    assert newest_checkpoint(tmp_path / "run") is not None


def test_two_runs_into_one_folder_are_refused(tmp_path):
    with output_folder(tmp_path / "run"), pytest.raises(InputError, match="another run is writing there"):
        train(QUICK, None, tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


# --- output folders ---------------------------------------------------------------------------------------


def test_unwritable_output_folder(few, tmp_path):
    (tmp_path / "file").write_text("")
    for call in (
        lambda out: train(QUICK, few, out),
        lambda out: compare(QUICK, few, ["none"], [16], 1, out),
    ):
        with pytest.raises(InputError, match=r"cannot write there .*; choose another place"):
            call(tmp_path / "file" / "out")


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    out = tmp_path / "a" / "b"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def fill():
        with output_folder(out) as folder:
            (folder / "part").write_text("x")
            full()

    with pytest.raises(InputError, match="No space left on device"):
        fill()
    assert not (tmp_path / "a").exists()

    target = tmp_path / "results.json"
    write_json(target, {"kept": 1})
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(target, {"lost": 2})
    assert json.loads(target.read_text()) == {"kept": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_results_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": math.nan})


def test_batchnorm_can_have_orthogonal_steps_too():
    torch.manual_seed(0)
    net = build("cnn", (1, 8, 8), 10, "batch")
    weights = [layer.weight for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    make_orthogonal(optimizer, net, 0.02)
    net(torch.randn(4, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        step = weight.detach() - old
        torch.testing.assert_close(step.norm(), 0.02 * old.norm(), rtol=1e-3, atol=0)
        # against the singular value decomposition of the plain step
        u, s, v = torch.linalg.svd(weight.grad.flatten(1).double(), full_matrices=False)
        rank = int((s > 1e-2 * s.norm()).sum())
        wanted = (-u[:, :rank] @ v[:rank]).float()
        assert (wanted * step.flatten(1)).sum() > 0.8 * wanted.norm() * step.norm()


def test_the_trust_radius_follows_rule_and_batch_size():
    assert Run(norm="normprop", rule="paper").peak_radius is None
    assert Run(norm="batch").peak_radius is None
    assert Run(batch_size=128).peak_radius == 0.01
    assert Run(batch_size=512).peak_radius == 0.01
    assert Run(batch_size=32).peak_radius == pytest.approx(0.005)
    assert Run(trust_radius=0.0).peak_radius is None
    assert Run(rule="paper", trust_radius=0.02, batch_size=1).peak_radius == 0.02
    assert Run(orthogonal=True).peak_radius == Run(orthogonal=True, norm="batch").peak_radius == 0.02
    with pytest.raises(InputError, match="--orthogonal steps have the length --trust-radius, got 0"):
        Run(orthogonal=True, trust_radius=0.0)
    with pytest.raises(InputError, match="the weights of --norm weight are no parameters"):
        Run(orthogonal=True, norm="weight")
    with pytest.raises(InputError, match="--trust-radius -1: expected a number from 0 "):
        Run(trust_radius=-1)


@pytest.mark.parametrize(
    ("options", "batch_size", "lr"),
    [
        ({"norm": "normprop", "rule": "paper"}, 128, 0.05),
        ({"norm": "normprop", "rule": "recommended"}, 64, 0.2),
        ({"norm": "normprop", "rule": "recommended"}, 512, 0.4),
        ({"norm": "normprop", "rule": "recommended", "orthogonal": True}, 64, 0.025),
        ({"norm": "batch", "orthogonal": True}, 128, 0.1),
        ({"norm": "none", "lr": 0.3}, 1, 0.3),
    ],
)
def test_the_step_size_is_what_was_asked_for_or_follows_norm_rule_and_batch(options, batch_size, lr):
    assert Run("mlp", batch_size=batch_size, **options).peak_lr == pytest.approx(lr)
