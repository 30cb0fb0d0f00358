"""Convert and fold other people's models, and check what is promised for each: a table and its JSON.

    python benchmarks/zoo.py torchvision      all its classification models with BatchNorm
    python benchmarks/zoo.py timm             the smallest model with BatchNorm of each family

Random weights, float32 on the CPU unless said otherwise; results are written after each model, and a
run goes on where the last one stopped. Columns are explained in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normprop
from normprop.graph.predict import walk
from normprop.graph.trace import trace
from normprop.recipes.export import export
from normprop.recipes.results import environment, write_json
from normprop.recipes.zoo import load_model

GRADIENT = (
    "resnet18", "resnet50", "resnet152", "densenet121", "efficientnet_b0", "mobilenet_v3_small",
    "mobilenet_v3_large", "regnet_x_400mf", "regnet_y_400mf",
)  # fmt: skip


def torchvision_names() -> list[str]:
    """All with BatchNorm, the smallest first."""
    import torchvision

    sizes = []
    for name in torchvision.models.list_models(module=torchvision.models):
        if count := parameters_of(f"torchvision:{name}"):
            sizes.append((count, name))
    return [f"torchvision:{name}" for _, name in sorted(sizes)]


def timm_names() -> list[str]:
    """Of each family (timm's module), the model with BatchNorm that has the fewest parameters."""
    import timm

    smallest = []
    for family in timm.list_modules():
        counted = [(parameters_of(f"timm:{name}"), name) for name in timm.list_models(module=family)]
        smallest += sorted(pair for pair in counted if pair[0])[:1]
    return [f"timm:{name}" for _, name in sorted(smallest)]


def parameters_of(spec: str) -> int:
    """How many parameters a model with BatchNorm has; 0 for others, and for those that need a download."""
    try:
        with torch.device("meta"):
            model = load_model(spec)
    except Exception:  # some read values while they are built
        if spec.startswith("timm:"):
            return 0
        model = load_model(spec)
    normed = any(isinstance(m, _BatchNorm) for m in model.modules())
    return normed * sum(p.numel() for p in model.parameters())


def quiet(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth at 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
        for name in ("drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def sizes(spec: str, model: nn.Module) -> tuple[int, int, int]:
    """(the size that it was made for, a small odd one, another) in pixels; equal if only one is possible."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = 299 if "inception_v3" in spec and "torchvision" in spec else 224
    size = config.get("input_size", (3, size, size))[1]
    for small, other in ((97, 111), (160, 192)):
        try:
            with torch.no_grad():
                for s in (small, other):
                    copy.deepcopy(model).train()(
                        torch.randn(2, 3, s, s)
                    )  # auxiliary heads are the choosiest
            return size, small, other
        except Exception:
            continue
    return size, size, size


def first_output(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    return next(iter(outputs.values() if isinstance(outputs, dict) else outputs))


def gap(actual: Any, expected: Any) -> float:
    a, e = first_output(actual), first_output(expected)
    return float((a - e).abs().max() / e.abs().max())


def check(spec: str) -> dict[str, Any]:
    """One model's row."""
    torch.manual_seed(0)
    model = quiet(load_model(spec)).train()
    size, small, other = sizes(spec, model)
    name = spec.split(":")[1]
    row: dict[str, Any] = {"model": spec, "commit": environment()["commit"], "size": size, "small": small}

    start = time.perf_counter()
    conversion = normprop.convert(model, example=torch.empty(1, 3, size, size, device="meta"))
    row["seconds"] = time.perf_counter() - start
    row["sites"] = len(conversion.replaced)
    row["skipped"] = [f"{s.path}: {s.target}" for s in conversion.skipped]
    row["notes"] = conversion.notes
    fresh = conversion.model
    try:
        with torch.no_grad():
            for s in (small, other):
                fresh(torch.randn(2, 3, s, s))
    except Exception:  # its code decides by the input's size: the graph is for sizes like the example's
        small = other = row["small"] = size
    row["batch_norm_left"] = sum(isinstance(m, _BatchNorm) for m in fresh.modules())
    kept = {n for n, _ in model.named_buffers()}
    row["new_buffers"] = [n for n, _ in fresh.named_buffers() if n not in kept]

    start = time.perf_counter()
    normprop.predict(fresh, torch.empty(1, 3, size, size, device="meta"))
    row["predict_seconds"] = time.perf_counter() - start
    row |= signals(fresh, torch.randn(4, 3, size, size))
    if name in GRADIENT:
        row["gradient"] = gradient(fresh, size)
    one = torch.randn(1, 3, size, size)
    first_output(fresh(one)).square().mean().backward()
    gradients = [p.grad for p in fresh.parameters() if p.grad is not None]
    row["finite_at_1"] = all(bool(torch.isfinite(g).all()) for g in gradients) and len(gradients) > 0
    fresh.zero_grad()
    row["promises"] = promises(fresh, small)
    row["fold"] = folds(fresh, small, other)
    row["export"] = exports(fresh, small)
    del fresh, conversion
    gc.collect()

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.5)
    model.double().eval()  # the statistics were rounded to float32 before: both start from the same
    x = torch.randn(2, 3, small, small, dtype=torch.float64)
    with torch.no_grad():
        exact = model(x)
        row["preserve_float64"] = gap(normprop.convert(model, preserve=True, example=x).model(x), exact)
        rounded = model.float()(x.float())
        kept_model = normprop.convert(model, preserve=True, example=x.float()).model
        row["preserve_float32"], row["rounding"] = gap(kept_model(x.float()), rounded), gap(rounded, exact)
    del model
    gc.collect()
    row["fold_preserved"] = folds(kept_model, small, other)
    row["step_at_1"] = step(kept_model.train(), x[:1].float())
    return row


@torch.no_grad()
def signals(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Of the maps that NormProp layers read: shares with std in [0.7, 1.4], and as predict says."""
    graph_module = trace(model, x)
    predicted = {record.name: record for record in walk(graph_module).trace()}
    in_range, agree = [], []

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_module" and hasattr(graph_module.get_submodule(str(n.target)), "rule"):
                source = n.all_input_nodes[0]
                var, mean = torch.var_mean(self.env[source].double())
                std, foreseen = float(var.sqrt()), predicted[source.name]
                in_range.append(0.7 <= std <= 1.4)
                close = 1 / 1.2 <= std / max(foreseen.std, 1e-9) <= 1.2
                agree.append(close and abs(float(mean) - foreseen.mean) <= 0.2 * foreseen.std)
            return super().run_node(n)

    Reader(graph_module).run(x)
    count = max(1, len(agree))
    return {"layers": len(agree), "in_range": sum(in_range) / count, "agree": sum(agree) / count}


def gradient(model: nn.Module, size: int) -> dict[str, float]:
    """L2 norm of the gradient of the first over the last convolution's output map."""
    measured = normprop.measure(model, torch.randn(8, 3, size, size))  # of 2 it varies by 12 %
    assert measured.predicted is not None
    place = [i for i, r in enumerate(measured.records) if "Conv" in r.op]
    ratios = [
        float(t.records[place[0]].gradient or 0) / float(t.records[place[-1]].gradient or 1)
        for t in (measured, measured.predicted)
    ]
    return {"measured": ratios[0], "predicted": ratios[1]}


def promises(model: nn.Module, size: int) -> str:
    """The three checks of normprop.testing, in float64; empty if they hold."""
    twin = copy.deepcopy(model).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    try:
        if not hasattr(model, "graphs"):  # auxiliary heads: train() returns something else by purpose
            normprop.testing.assert_train_equals_eval(twin, x)
        normprop.testing.assert_batch_independent(twin, x)
        normprop.testing.assert_accumulation_equals_batch(
            twin, x, torch.zeros(2), lambda out, _: first_output(out).square().mean()
        )
    except AssertionError as error:
        return str(error)
    return ""


@torch.no_grad()
def folds(model: nn.Module, small: int, other: int) -> dict[str, Any]:
    """Largest relative differences of the folded model, at two odd sizes, and what is left of ours."""
    model = copy.deepcopy(model).eval()
    start = time.perf_counter()
    folded = normprop.fold(model, verify=torch.randn(1, 3, small, small))
    seconds = time.perf_counter() - start
    errors, rounding, single = [], 0.0, copy.deepcopy(model)
    model.double()
    for size in {small, other}:
        x = torch.randn(1, 3, size, size)
        y = single(x)
        errors.append(gap(folded(x), y))
        rounding = max(rounding, gap(y, model(x.double())))
    x = torch.randn(1, 3, small, small, dtype=torch.float64)
    exact = gap(normprop.fold(model, verify=x)(x), model(x))
    ours = [n for n, m in folded.named_modules() if type(m).__module__.startswith("normprop")]
    return {
        "seconds": seconds,
        "float32": max(errors),
        "rounding": rounding,
        "float64": exact,
        "ours": ours,
    }


def exports(model: nn.Module, size: int) -> dict[str, float | str]:
    """Largest relative difference of the files that ``normprop export`` writes, by format, or why there is none."""
    found: dict[str, float | str] = {}
    x = torch.randn(2, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("pt2", "onnx"):
            try:
                written = export(model, Path(folder) / f"model.{kind}", x)
                found[kind] = max(written["errors"].values())
            except Exception as error:  # whatever torch.export meets in other people's code
                found[kind] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


def step(model: nn.Module, x: Tensor) -> bool:
    """Whether a training step at batch size 1 changes the output and leaves it finite."""
    before = first_output(model(x)).detach()
    # With random statistics outputs may be huge: their squares must not overflow.
    (first_output(model(x)) / before.abs().max()).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-3)
    after = first_output(model(x)).detach()
    return bool(torch.isfinite(after).all()) and not torch.equal(before, after)


def own(fold: dict[str, Any], dtype: str) -> str:
    """What of an error in float32 the model makes alone."""
    rounding = fold.get("rounding", 0.0) if dtype == "float32" else 0.0
    return f" (the model's own rounding {rounding:.0e})" if rounding > 1e-5 else ""


def failures(row: dict[str, Any]) -> list[str]:
    """Which of the promises a row breaks."""
    if "error" in row:
        return [row["error"]]
    found = []
    gradient = row.get("gradient")
    residual = any(s in row["model"] for s in ("resnet", "regnet_x"))
    if gradient:
        ratio = gradient["measured"] / gradient["predicted"]
        found += [f"gradient {ratio:.2f} of predicted"] if not 1 / 1.5 <= ratio <= 1.5 else []
        found += [f"gradient {gradient['measured']:.0f}"] if residual and gradient["measured"] > 10 else []
    for name, bad in (
        ("skipped", bool(row["skipped"])),
        ("BatchNorm left", bool(row["batch_norm_left"])),
        ("new buffers", bool(row["new_buffers"])),
        (f"in range {row['in_range']:.2f}", row["in_range"] < 0.9),
        (f"agree {row['agree']:.2f}", row["agree"] < 0.9),
        ("not finite at batch size 1", not row["finite_at_1"]),
        (row["promises"], bool(row["promises"])),
        (
            f"preserve float32 {row['preserve_float32']:.0e}{own(row, 'float32')}",
            not row["preserve_float32"] < 1e-4,
        ),
        (f"preserve float64 {row['preserve_float64']:.0e}", not row["preserve_float64"] < 1e-9),
        ("step at batch size 1", not row["step_at_1"]),
        *(
            (f"{kind} {dtype} {row[kind][dtype]:.0e}{own(row[kind], dtype)}", not row[kind][dtype] < limit)
            for kind in ("fold", "fold_preserved")
            for dtype, limit in (("float32", 1e-4), ("float64", 1e-9))
        ),
        *(
            (
                f"export {kind}: {digits(error)}{own(row['fold'], 'float32')}"
                if isinstance(error, float)
                else f"export {kind}: {error}",
                not (isinstance(error, float) and error < 1e-4),
            )
            for kind, error in row.get("export", {}).items()
        ),
        ("ours left after fold", bool(row["fold"]["ours"] or row["fold_preserved"]["ours"])),
    ):
        found += [name] if bad else []
    return found


def digits(error: float | str) -> str:
    return f"{error:.0e}" if isinstance(error, float) else "none"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | sites | skipped | seconds | std in range | agrees | gradient first/last (predicted) | "
        "preserve f32 / f64 | fold f32 / f64 | pt2 / onnx | misses |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | | | | | | | | | | {row['error']} |")
            continue
        g = row.get("gradient")
        ratio = f"{g['measured']:.1f} ({g['predicted']:.1f})" if g else ""
        lines.append(
            f"| {row['model'].split(':')[1]} | {row['sites']} | {len(row['skipped'])} | {row['seconds']:.1f} | "
            f"{row['in_range']:.2f} | {row['agree']:.2f} | {ratio} | "
            f"{row['preserve_float32']:.0e} / {row['preserve_float64']:.0e} | "
            f"{row['fold']['float32']:.0e} / {row['fold']['float64']:.0e} | "
            f"{' / '.join(digits(e) for e in row.get('export', {}).values())} | {', '.join(failures(row)) or '-'} |"
        )
    good = sum(not failures(row) for row in rows)
    strict = sum("error" not in row and not row["skipped"] for row in rows)
    lines.append(f"\n{len(rows)} models, {strict} convert with strict=True, {good} keep every promise.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("library", choices=("torchvision", "timm"))
    parser.add_argument("--only", help="comma-separated names")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "zoo")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    path = arguments.out / f"{arguments.library}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if "error" not in row]
    if arguments.only:
        waiting = [f"{arguments.library}:{name}" for name in arguments.only.split(",")]
    else:
        names = torchvision_names() if arguments.library == "torchvision" else timm_names()
        done = {row["model"] for row in rows}
        waiting = [name for name in names if name not in done]
    started = time.perf_counter()
    for number, name in enumerate(waiting, 1):
        try:
            row = check(name)
        except Exception as error:
            row = {"model": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        rows = [other for other in rows if other["model"] != name] + [row]
        rows.sort(key=lambda row: row["model"])
        write_json(path, {"environment": environment(), "rows": rows})
        (arguments.out / f"{arguments.library}.md").write_text(table(rows) + "\n")
        left = (time.perf_counter() - started) / number * (len(waiting) - number) / 60
        print(
            f"{number}/{len(waiting)} {name}: {', '.join(failures(row)) or 'fine'} ({left:.0f} min left)",
            flush=True,
        )
        gc.collect()


if __name__ == "__main__":
    main()
