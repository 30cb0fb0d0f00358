"""``normprop reproduce``: what it runs, what it keeps after a kill, what it says; on digits, in seconds."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import normprop
from normprop.recipes import InputError, claims
from normprop.recipes.claims import CLAIMS, PROTOCOLS, Protocol, run_key
from normprop.recipes.data import load, subset
from normprop.recipes.hidden import hidden_statistics
from normprop.recipes.reproduce import reproduce, study
from normprop.recipes.results import output_folder
from normprop.recipes.summary import largest_lr, summarize
from normprop.recipes.train import RULES, Run, fit

pytestmark = pytest.mark.filterwarnings("default")  # Lightning and matplotlib warn as they like

TINY = Protocol(
    "tiny",
    Run("cnn", width=0.25, batch_size=64, epochs=2, data_norm="batch", train_images=128),
    seeds=1,
    short={"train_images": 64, "epochs": 1},
    batches={"train_images": 64, "epochs": 1},
    search={"train_images": 256, "epochs": 1, "validation": 100},
    final={},
    table={"": {}},
)
DIGITS = {"protocol": "tiny", "dataset": "digits"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "tiny", TINY)
    monkeypatch.setattr(claims, "BATCH_SIZES", (1, 32))
    monkeypatch.setattr(claims, "LEARNING_RATES", (0.05, 1e12))
    monkeypatch.setattr(claims, "ACTIVATIONS", ("relu", "tanh"))
    monkeypatch.setattr(claims, "LIBRARIES", ("code_model:gray",))


def saved(out):
    return json.loads((out / "results.json").read_text())


def cli(arguments, capsys):
    from normprop.cli import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code, capsys.readouterr()


TRAINED = [name for name, claim in CLAIMS.items() if claim.plan is not None]


@pytest.mark.parametrize("name", TRAINED)
def test_every_claim_runs_to_results_and_a_figure(name, tmp_path):
    out = tmp_path / name
    result = reproduce(name, out=out, **DIGITS)
    assert saved(out) == result
    assert result["claim"] == name
    assert (result["protocol"], result["status"], result["dataset"]) == ("tiny", "complete", "digits")
    assert (
        result["planned"]
        == result["finished"]
        == len(result["rows"])
        == len(list((out / "runs").glob("*/")))
    )
    assert {"device", "versions", "commit"} <= set(result)
    for row in result["rows"]:
        # Everything that decides a run is in its row: it can be made again from there.
        fields = {field: row[field] for field in asdict(Run()) if field != "rule"}
        run = Run(**fields, rule=row["rule"] or "recommended")
        assert run_key(TINY, "digits", run) == row["key"]
        assert row["rule_is"] == (asdict(RULES[row["rule"]]) if row["norm"] == "normprop" else None)
        assert {"device", "versions", "commit"} <= set(row)
        if row["status"] == "ok":
            assert len(row[run.measures]) == run.epochs
            assert len(row["hidden"]) >= 5
        assert ("test_accuracy" in row) != bool(run.validation)
    with Image.open(out / "figure.png") as image:
        assert min(image.size) > 300


def test_what_a_norm_cannot_do_and_divergence_are_rows(tmp_path):
    result = reproduce("batch-size", out=tmp_path / "a", **DIGITS)
    statuses = {(row["norm"], row["batch_size"]): row["status"] for row in result["rows"]}
    assert statuses["batch", 1] == "cannot train"
    assert statuses["normprop", 1] == statuses["group", 32] == statuses["batch", 32] == "ok"
    result = reproduce("step-size", out=tmp_path / "b", **DIGITS)
    wild = [row for row in result["rows"] if row["norm"] == "none" and row["lr"] == 1e12]
    assert [row["status"] for row in wild] == ["diverged"]
    assert result["findings"]["largest step size, none"] == 0.05


def test_a_log_file_tells_how_far_a_long_run_is(tmp_path, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr("normprop.recipes.reproduce.EVERY", 0)
    reproduce(
        "convergence", out=tmp_path, only="none,seed0", console=Console(file=said, width=200), **DIGITS
    )
    key = next(iter((tmp_path / "runs").glob("*/"))).name
    lines = said.getvalue().splitlines()
    assert [line.split(": ")[2].split(",")[0] for line in lines if f": {key}: " in line][:-1] == [
        "epoch 1 of 2",
        "epoch 2 of 2",
    ]


def test_beyond_tests_at_the_step_size_that_did_best_on_held_out_images(tmp_path):
    result = reproduce("beyond", out=tmp_path, **DIGITS)
    final = [row for row in result["rows"] if row["stage"] == "final"]
    assert {(row["label"], row["model"]) for row in final} == {
        (f"{label}{aid}", model)
        for label in ("normprop, recommended", "batch")
        for aid in ("", ", whitened", ", orthogonal")
        for model in ("cnn", "resnet20")
    }
    for row in final:
        rivals = [r for r in result["rows"] if r["stage"] == "selection" and r["status"] == "ok"]
        rivals = [r for r in rivals if (r["label"], r["model"]) == (row["label"], row["model"])]
        assert row["lr"] == max(rivals, key=lambda r: r["validation_accuracy"][-1])["lr"]


def test_a_second_command_runs_only_what_is_missing(tmp_path, monkeypatch):
    first = reproduce("convergence", out=tmp_path, only="seed0", **DIGITS)
    assert first["status"] == "complete"
    more = reproduce("convergence", out=tmp_path, only="none,seed1", seeds=2, **DIGITS)
    assert (more["status"], more["finished"], more["planned"]) == ("partial", 16, 26)
    assert [row for row in more["rows"] if row["seed"] == 0] == first["rows"]
    assert [row["norm"] for row in more["rows"] if row["seed"] == 1] == ["none"]
    monkeypatch.setattr("normprop.recipes.reproduce.load", lambda _: pytest.fail("nothing was missing"))
    again = reproduce("convergence", out=tmp_path, **DIGITS)
    assert (again["status"], again["finished"], again["planned"]) == ("complete", 15, 15)
    assert again["rows"] == [*first["rows"], *(row for row in more["rows"] if row["seed"] == 1)]


def test_rows_without_a_run_folder_are_kept_and_count_as_missing_here(tmp_path):
    """Results come with the repository, the folders of their runs do not."""
    first = reproduce("convergence", out=tmp_path, only="seed0", **DIGITS)
    shutil.rmtree(tmp_path / "runs")
    more = reproduce("convergence", out=tmp_path, only="weight,seed0", **DIGITS)
    assert [row["key"] for row in more["rows"]] == [row["key"] for row in first["rows"]]
    assert (more["status"], more["findings"]) == ("complete", first["findings"])
    here = study("convergence", "tiny", "digits", None, tmp_path)
    assert len(here.missing("")) == first["planned"] - 1
    assert here.missing("weight,seed0") == []


def test_an_interrupted_command_keeps_its_epochs_marked_partial_and_goes_on(tmp_path, monkeypatch):
    whole = reproduce("hidden-mean", out=tmp_path / "whole", only="normprop-paper", **DIGITS)

    class Kill(BaseException):
        pass

    calls = []

    def die(net, data):
        calls.append(1)
        if len(calls) == 2:  # in the evaluation of epoch 2
            raise Kill
        return {}

    observe = CLAIMS["hidden-mean"].observe
    monkeypatch.setitem(CLAIMS, "hidden-mean", replace(CLAIMS["hidden-mean"], observe=die))
    with pytest.raises(Kill):
        reproduce("hidden-mean", out=tmp_path / "killed", only="normprop-paper", **DIGITS)
    partial = saved(tmp_path / "killed")
    (row,) = partial["rows"]
    assert (partial["status"], row["status"], len(row["test_accuracy"])) == ("partial", "partial", 1)
    assert partial["summary"][0]["n"] == 0

    monkeypatch.setitem(CLAIMS, "hidden-mean", replace(CLAIMS["hidden-mean"], observe=observe))
    resumed = reproduce("hidden-mean", out=tmp_path / "killed", only="normprop-paper", **DIGITS)
    for key in ("test_accuracy", "train_loss", "hidden", "status"):
        assert resumed["rows"][0][key] == whole["rows"][0][key]


SCRIPT = """
import sys
from normprop.recipes import claims
from normprop.recipes.train import Run
claims.PROTOCOLS["tiny"] = claims.Protocol(
    "tiny", Run("cnn", width=0.25, batch_size=64, epochs={epochs}, data_norm="batch", train_images=128), 1,
    {{}}, {{}}, {{}}, {{}}, {{"": {{}}}},
)
if __name__ == "__main__":
    from normprop.cli import main
    main(sys.argv[1:])
"""


def script(tmp_path, epochs, *arguments):
    """A process, for kills: the tiny protocol exists in this one alone."""
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(SCRIPT.format(epochs=epochs)))
    command = [sys.executable, str(file), "reproduce", "hidden-mean", "--protocol", "tiny"]
    command += ["--dataset", "digits", "--out", str(tmp_path / "out"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Where tests run in the background, SIGINT is ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def epochs_there(out):
    records = [json.loads(file.read_text()) for file in out.glob("runs/*/results.json")]
    return [len(record["epochs"]) for record in records]


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_command_leaves_no_process_and_two_jobs_go_on(tmp_path, how, code):
    process = script(tmp_path, 400, "--jobs", "2")
    out = tmp_path / "out"
    wait_for(lambda: sum(count >= 3 for count in epochs_there(out)) == 2)
    children = [
        int(pid)
        for task in os.listdir(f"/proc/{process.pid}/task")
        for pid in Path(f"/proc/{process.pid}/task/{task}/children").read_text().split()
    ]
    assert len(children) >= 2
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    if how == signal.SIGINT:
        assert error == "normprop: stopped; what was finished is kept\n"
        assert saved(out)["status"] == "partial"
    wait_for(lambda: all(gone(pid) for pid in children))
    before = epochs_there(out)
    assert all(count < 400 for count in before)
    again = script(tmp_path, 400, "--only", "normprop-paper")
    wait_for(lambda: max(epochs_there(out)) > max(before) + 2)
    again.kill()
    again.communicate()


def test_jobs_give_what_one_process_gives(tmp_path):
    one = reproduce("hidden-mean", out=tmp_path / "one", **DIGITS)
    two = reproduce("hidden-mean", out=tmp_path / "two", jobs=2, **DIGITS)
    assert two["status"] == "complete"
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["key"] == b["key"]
        torch.testing.assert_close(
            torch.tensor(a["train_loss"]), torch.tensor(b["train_loss"]), rtol=1e-3, atol=1e-3
        )


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path):
    planned = CLAIMS["hidden-mean"].plan(TINY, "digits", 1, [])
    key = run_key(TINY, "digits", planned[1].run)
    with output_folder(tmp_path / "runs" / key, keep=(".lock",)):
        result = reproduce("hidden-mean", out=tmp_path, **DIGITS)
    assert (result["status"], result["finished"]) == ("partial", 3)
    assert key not in [row["key"] for row in result["rows"]]
    assert reproduce("hidden-mean", out=tmp_path, **DIGITS)["status"] == "complete"


def test_protocols_data_sets_and_rules_are_never_mixed(tmp_path, monkeypatch):
    reproduce("hidden-mean", out=tmp_path, only="paper", **DIGITS)
    with pytest.raises(InputError, match="holds results of protocol tiny, not reduced"):
        reproduce("hidden-mean", dataset="digits", out=tmp_path)
    with pytest.raises(InputError, match="holds results of dataset digits, not cifar10"):
        reproduce("hidden-mean", protocol="tiny", out=tmp_path)
    with pytest.raises(InputError, match="holds results of claim hidden-mean, not table"):
        reproduce("table", out=tmp_path, **DIGITS)
    monkeypatch.setitem(RULES, "paper", normprop.NormRule(gain=0.5))
    with pytest.raises(InputError, match=r"holds a run with rule_is .*'jacobian'.*delete that folder"):
        reproduce("hidden-mean", out=tmp_path, **DIGITS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "CLAIM fly: expected one of data-norm, hidden-mean, convergence"),
        (["table", "--protocol", "half"], "--protocol half: expected one of reduced, full"),
        (["table", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["table", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["table", "--device", "tpu"], "--device tpu: expected one of auto, cpu, cuda"),
        (["table", "--only", "seed9"], "--only seed9: no run of table has this in its name; one is called"),
        (["table", "--dataset", "/no/such"], "--dataset /no/such: no such folder"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_exit_2_and_no_folder(tmp_path, arguments, message, capsys):
    code, output = cli(["reproduce", *arguments, "--out", str(tmp_path / "deep" / "out")], capsys)
    assert code == 2
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not (tmp_path / "deep").exists()


def test_images_that_are_too_small_leave_nothing(tmp_path, capsys):
    arguments = ["reproduce", "table", "--dataset", "digits", "--out", str(tmp_path / "out")]
    code, output = cli(arguments, capsys)
    assert (code, output.err.count("\n")) == (2, 1)
    assert "needs images of at least 18x18, got 8x8" in output.err
    assert not (tmp_path / "out").exists()


def test_jacobian_end_to_end_within_a_minute(tmp_path, capsys):
    started = time.process_time()
    code, output = cli(["reproduce", "jacobian", "--out", str(tmp_path), "--json"], capsys)
    assert code == 0
    assert time.process_time() - started < 60
    result = json.loads(output.out)
    assert result == saved(tmp_path)
    found = result["findings"]
    exact = math.sqrt(math.pi / (math.pi - 1))
    for fan_in in (256, 4096):
        assert found[f"rms singular value, mean over inputs, fan-in {fan_in}"] == pytest.approx(
            exact, rel=0.01
        )
    # 49 layers between: each multiplies the gradient by the Jacobian's factor at gain 1, by 1 at its inverse.
    assert found["gradient of layer 1 / layer 50, gain 1"] == pytest.approx(exact**49, rel=0.3)
    assert 0.7 < found["gradient of layer 1 / layer 50, gain 1/1.21"] < 1.4
    assert all(row["actual"] <= row["bound"] for row in result["rows"] if row["part"] == "bound")
    with Image.open(tmp_path / "figure.png") as image:
        assert min(image.size) > 300


def test_speed_rows_say_seconds_an_epoch(tmp_path, monkeypatch):
    from normprop.recipes.bench import Case

    monkeypatch.setattr(
        "normprop.recipes.speed.Case", lambda model, width, *rest, **kw: Case("cnn", 0.1, *rest, **kw)
    )
    result = reproduce("speed", protocol="tiny", device="cpu", out=tmp_path)
    assert [row["label"] for row in result["rows"]] == [
        "none",
        "normprop, paper",
        "batch",
        "normprop, recommended",
    ]
    for row in result["rows"]:
        none = result["rows"][0]["ms"]["step"]  # of 1,000 steps, in milliseconds
        assert row["seconds_per_epoch"] == pytest.approx(row["ratio"] * none)
    assert set(result["findings"]) == {
        f"normprop, {r} / batch, fp32, eager" for r in ("paper", "recommended")
    }


# --- the parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["reduced", "full", "narrow"])
@pytest.mark.parametrize("dataset", ["cifar10", "svhn"])
@pytest.mark.parametrize("name", TRAINED)
def test_keys_are_unique_and_protocols_apart(name, dataset, protocol, monkeypatch):
    monkeypatch.undo()  # the real grids
    plan = CLAIMS[name].plan(PROTOCOLS[protocol], dataset, 3, [])
    keys = [run_key(PROTOCOLS[protocol], dataset, p.run) for p in plan]
    assert len(set(keys)) == len(keys)
    assert all(key.startswith(f"{protocol}-{dataset}-") and len(key) < 200 for key in keys)
    assert {p.run.seed for p in plan} == {0, 1, 2}
    assert all(p.run.lr is not None for p in plan)


def test_the_papers_protocol():
    full = PROTOCOLS["full"]
    paper, recommended = (p.run for p in CLAIMS["convergence"].plan(full, "cifar10", 1, [])[:2])
    assert replace(recommended, rule="paper", trust_radius=None) == paper
    run = paper
    assert (run.model, run.width, run.batch_size, run.lr, run.halve_every, run.epochs) == (
        "nin",
        1,
        50,
        0.05,
        10,
        50,
    )
    assert (run.weight_decay, run.data_norm) == (5e-4, "batch")
    table = [p.run for p in CLAIMS["table"].plan(full, "cifar10", 1, [])]
    assert {(r.epochs, r.halve_every, r.lr, r.batch_size) for r in table} == {(200, 25, 0.05, 50)}
    assert {r.flip for r in table} == {False, True}
    svhn = [p.run for p in CLAIMS["table"].plan(full, "svhn", 1, [])]
    assert {(r.epochs, r.halve_every, r.lr, r.batch_size, r.flip) for r in svhn} == {
        (25, 5, 0.08, 100, False)
    }
    assert full.run("none").lr == 1e-4
    for norm in ("normprop, paper", "batch"):
        assert PROTOCOLS["narrow"].run(norm) == replace(full.run(norm), width=0.25)
    assert all(p.run.data_norm == "global" for p in CLAIMS["batch-size"].plan(full, "cifar10", 1, []))


def test_halving_and_decay_reach_the_optimizer():
    digits = subset(load("digits"), 128)
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append((self.param_groups[0]["lr"], max(g["weight_decay"] for g in self.param_groups)))
            return super().step(closure)

    run = Run(
        "mlp", norm="none", width=0.1, batch_size=64, epochs=5, lr=0.08, halve_every=2, weight_decay=0.003
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Spy)
        fit(run, digits)
    rates = [0.08] * 4 + [0.04] * 4 + [0.02] * 2
    assert seen == [(pytest.approx(rate), 0.003) for rate in rates]


def test_subset_is_fixed_disjoint_and_never_of_the_test_images():
    digits = load("digits")
    chosen = subset(digits, 1000, 300)
    assert (len(chosen.train_y), len(chosen.test_y)) == (1000, 300)
    rows = {bytes(x.numpy().tobytes()) for x in digits.train_x}
    train, held = ([bytes(x.numpy().tobytes()) for x in part] for part in (chosen.train_x, chosen.test_x))
    assert set(train) | set(held) <= rows
    assert not set(train) & set(held)
    assert torch.equal(subset(digits, 1000, 300).train_x, chosen.train_x)
    assert torch.equal(subset(digits, 200, 300).test_x, chosen.test_x)  # whatever is trained on
    assert subset(digits) is digits
    with pytest.raises(InputError, match="digits has 1437 training images"):
        subset(digits, 1200, 300)


def test_hidden_statistics_are_those_of_the_tensors():
    net = nn.Sequential(
        nn.Identity(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(32, 5)
    )
    x = torch.randn(250, 3, 6, 6)
    first, second = hidden_statistics(net.train(), x)
    assert net.training
    with torch.no_grad():
        one = net[:3](x).double().movedim(1, 0).flatten(1)
        two = net[:5](x).double().movedim(1, 0).flatten(1)
    for record, units, name in ((first, one, "3"), (second, two, "5")):
        mean, var = units.mean(1), units.var(1, correction=0)
        expected = [mean[0], mean.mean(), var.mean(), mean.abs().mean(), (var - 1).abs().mean()]
        found = [record[key] for key in ("unit_mean", "mean", "var", "mean_error", "var_error")]
        assert (record["layer"], record["units"]) == (name, len(units))
        torch.testing.assert_close(
            torch.tensor(found).double(), torch.stack(expected), rtol=1e-4, atol=1e-5
        )


def row(label, lr, finals, statuses=None):
    statuses = statuses or ["ok"] * len(finals)
    return [
        {"label": label, "lr": lr, "status": s, "validation_accuracy": [f]}
        for f, s in zip(finals, statuses, strict=True)
    ]


def test_failed_runs_are_counted_and_never_averaged():
    rows = row("a", 0.1, [0.5, 0.7, 0.1], ["ok", "ok", "diverged"]) + row("a", 0.2, [0.9], ["partial"])
    mixed, partial = summarize(rows, ("lr",))
    assert (mixed["n"], mixed["mean"], mixed["failed"]) == (2, pytest.approx(0.6), {"diverged": 1})
    assert (partial["n"], partial["mean"], partial["partial"]) == (0, None, 1)


def test_the_largest_step_size_is_that_of_the_worst_seed():
    rows = row("a", 0.1, [0.6, 0.62, 0.61]) + row("a", 0.2, [0.57, 0.60, 0.60])
    rows += row("a", 0.4, [0.50, 0.66, 0.60]) + row("a", 0.8, [0.7, 0.7, 0.1], ["ok", "ok", "diverged"])
    assert largest_lr(rows, "a") == 0.2
    assert largest_lr(rows, "b") is None
