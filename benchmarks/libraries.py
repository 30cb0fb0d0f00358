"""Convert and fold models of libraries where BatchNorm is at home: segmentation, 3-D medical images, detection.

    pip install segmentation-models-pytorch monai transformers ultralytics
    python benchmarks/libraries.py

Random weights, float64 on the CPU; torchvision's own are among them. Each model is made small where its
library lets one. Columns are explained in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import normprop
from normprop.recipes.export import relative_error
from normprop.recipes.results import environment, write_json

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def made(where: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """What ``module:name`` returns for these arguments."""
    module, _, name = where.partition(":")
    return lambda: getattr(importlib.import_module(module), name)(*args, **kwargs)


def segmentation(name: str, encoder: str = "resnet18", **kwargs: Any) -> Case:
    return made(
        f"segmentation_models_pytorch:{name}", encoder_name=encoder, encoder_weights=None, **kwargs
    ), (3, 96, 96)


def volumes(name: str, **kwargs: Any) -> Case:
    return made(f"monai.networks.nets:{name}", spatial_dims=3, in_channels=1, **kwargs), (1, 32, 32, 32)


def hugging_face(name: str, head: str = "ForImageClassification", size: int = 64, **kwargs: Any) -> Case:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**kwargs))

    return build, (3, size, size)


def yolo(name: str, kind: str = "DetectionModel") -> Case:
    return made(f"ultralytics.nn.tasks:{kind}", f"{name}.yaml", verbose=False), (3, 256, 256)


def vision(where: str, *shape: int, **kwargs: Any) -> Case:
    return made(f"torchvision.models.{where}", weights=None, **kwargs), shape


STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64]}
CASES: dict[str, dict[str, Case]] = {
    "torchvision": {
        "fcn_resnet50": vision("segmentation:fcn_resnet50", 3, 64, 64, weights_backbone=None),
        "deeplabv3_mobilenet": vision(
            "segmentation:deeplabv3_mobilenet_v3_large", 3, 64, 64, weights_backbone=None
        ),
        "lraspp_mobilenet": vision("segmentation:lraspp_mobilenet_v3_large", 3, 64, 64, weights_backbone=None),
        "r3d_18": vision("video:r3d_18", 3, 8, 32, 32),
        "r2plus1d_18": vision("video:r2plus1d_18", 3, 8, 32, 32),
        "s3d": vision("video:s3d", 3, 16, 224, 224),
    },
    "segmentation-models-pytorch": {
        name: segmentation(name)
        for name in (
            "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "UPerNet",
            "Segformer",
        )
    }
    | {
        f"Unet, {encoder}": segmentation("Unet", encoder)
        for encoder in ("efficientnet-b0", "mobilenet_v2", "densenet121", "se_resnet50", "timm-regnetx_002")
    },
    "monai": {
        "UNet": volumes("UNet", out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch"),
        "BasicUNet": volumes("BasicUNet", out_channels=2, features=(8, 8, 16, 16, 32, 8), norm="batch"),
        "SegResNet": volumes("SegResNet", out_channels=2, init_filters=8, norm="batch"),
        "DynUNet": volumes(
            "DynUNet", out_channels=2, kernel_size=[3] * 3, strides=[1, 2, 2], upsample_kernel_size=[2, 2],
            norm_name="batch",
        ),
        "VNet": volumes("VNet", out_channels=2),
        "AttentionUnet": volumes("AttentionUnet", out_channels=2, channels=(8, 16, 32), strides=(2, 2)),
        "DenseNet121": volumes("DenseNet121", out_channels=2),
        "SEResNet50": volumes("SEResNet50", num_classes=2),
    },
    "transformers": {
        "ResNet": hugging_face("ResNet", embedding_size=16, layer_type="basic", **STAGES),
        "RegNet": hugging_face("RegNet", groups_width=8, **STAGES),
        "MobileNetV2": hugging_face("MobileNetV2"),
        "MobileViT": hugging_face("MobileViT", image_size=64),
        "LeViT": hugging_face("Levit", size=224),
        "CvT": hugging_face("Cvt"),
        "SwiftFormer": hugging_face("SwiftFormer", size=224),
        "HGNetV2": hugging_face("HGNetV2"),
    },
    "ultralytics": {name: yolo(name) for name in ("yolov5n", "yolov8n", "yolov10n", "yolo11n")}
    | {
        "yolov8n-seg": yolo("yolov8n-seg", "SegmentationModel"),
        "yolov8n-pose": yolo("yolov8n-pose", "PoseModel"),
        "yolov8n-cls": yolo("yolov8n-cls", "ClassificationModel"),
    },
}  # fmt: skip


def numbers(outputs: Any) -> list[Tensor]:
    """All maps of an output, whatever holds them."""
    return [
        t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()
    ]


def used(model: nn.Module) -> nn.Module:
    """BatchNorm's statistics and weights as after some training, at random."""
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    return model


def in_range(model: nn.Module, x: Tensor) -> float:
    """Share of NormProp layers that read a map of std in [0.7, 1.4]."""
    stds: dict[nn.Module, float] = {}
    layers = [m for m in model.modules() if hasattr(m, "gain") and hasattr(m, "weight")]
    handles = [
        layer.register_forward_pre_hook(lambda m, args: stds.setdefault(m, float(args[0].std())) and None)
        for layer in layers
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return sum(0.7 <= std <= 1.4 for std in stds.values()) / len(stds)


def check(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, Any]:
    """One model's row."""
    torch.manual_seed(0)
    model = build().train()
    x = torch.randn(2, *shape)
    start = time.perf_counter()
    conversion = normprop.convert(model, example=x)
    row: dict[str, Any] = {
        "batch_norms": sum(isinstance(m, _BatchNorm) for m in model.modules()),
        "sites": len(conversion.replaced),
        "skipped": [f"{site.path}: {site.target}" for site in conversion.skipped],
        "seconds": time.perf_counter() - start,
        "by_parts": any("child by child" in note for note in conversion.notes),
        "notes": conversion.notes,
    }
    fresh, x = conversion.model.double(), x.double()
    step = numbers(fresh(x[:1]))
    sum(y.square().mean() for y in step if y.requires_grad).backward()
    gradients = [p.grad for p in fresh.parameters() if p.grad is not None]
    row["finite_at_1"] = all(bool(torch.isfinite(t).all()) for t in step + gradients)
    with torch.no_grad():
        y = [t.clone() for t in numbers(fresh.eval()(x))]
        alone = [numbers(fresh(sample)) for sample in x.split(1)]
        row["batch"] = relative_error([torch.cat(parts) for parts in zip(*alone, strict=True)], y)
        row["in_range"] = in_range(fresh, torch.randn(8, *shape, dtype=torch.float64))
        row["fold"] = relative_error(numbers(normprop.fold(fresh, verify=x)(x)), y)
        source = used(build().double()).eval()
        preserved = normprop.convert(source, preserve=True, example=x).model
        row["preserve"] = relative_error(numbers(preserved(x)), numbers(source(x)))
    return row


def misses(row: dict[str, Any]) -> list[str]:
    """Which of the promises a row breaks."""
    if "error" in row:
        return [row["error"]]
    limits = {"batch": 1e-9, "fold": 1e-9, "preserve": 1e-9}
    found = [f"{name} {row[name]:.0e}" for name, limit in limits.items() if not row[name] < limit]
    found += [f"in range {row['in_range']:.2f}"] if row["in_range"] < 0.9 else []
    if row["skipped"]:
        found.append(f"{len(row['skipped'])} skipped: {row['skipped'][0].partition(': ')[2]}")
    return found + ([] if row["finite_at_1"] else ["not finite at batch size 1"])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = ("library", "model", "BatchNorms", "sites", "seconds", "by parts", "std in range")
    lines = [
        f"| {' | '.join(columns)} | batch | preserve | fold | misses |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for row in rows:
        said = ", ".join(misses(row)) or "-"
        cells = [row["library"], row["model"], *[""] * 8, said]
        if "error" not in row:
            parts = "yes" if row["by_parts"] else "-"
            cells[2:7] = [
                row["batch_norms"],
                row["sites"],
                f"{row['seconds']:.1f}",
                parts,
                f"{row['in_range']:.2f}",
            ]
            cells[7:10] = [f"{row[name]:.0e}" for name in ("batch", "preserve", "fold")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(
        [*lines, f"\n{len(rows)} models, {sum(not misses(row) for row in rows)} keep every promise."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="models whose name starts with this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "zoo")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    waiting = [
        (library, name, *case)
        for library, cases in CASES.items()
        for name, case in cases.items()
        if name.startswith(arguments.only or "")
    ]
    rows, started = [], time.perf_counter()
    for number, (library, name, build, shape) in enumerate(waiting, 1):
        try:
            row = check(build, shape)
        except Exception as error:  # other people's code
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        rows.append({"library": library, "model": name} | row)
        left = (time.perf_counter() - started) / number * (len(waiting) - number)
        said = ", ".join(misses(row)) or "fine"
        print(f"{number}/{len(waiting)} {library} {name}: {said} ({left / 60:.0f} min left)", flush=True)
    if not arguments.only:
        versions = {library: version(library) for library in CASES}
        write_json(
            arguments.out / "libraries.json",
            {"environment": environment() | {"libraries": versions}, "rows": rows},
        )
        (arguments.out / "libraries.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
