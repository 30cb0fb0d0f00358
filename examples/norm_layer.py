"""Libraries that take ``norm_layer=``: build with BatchNorm, the default, and convert the whole model.

A norm layer cannot be NormProp: it normalises through the weights of the layer before it. So leave
``norm_layer`` alone, or pass ``nn.BatchNorm2d``: the BatchNorms mark the places, and convert takes
them and the layers before them together. ``nn.Identity`` marks nothing and leaves nothing to convert.

python examples/norm_layer.py    # no download, seconds on a CPU
"""

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import normprop

torch.manual_seed(0)
x = torch.randn(1, 3, 64, 64)

models = {
    "resnet18": resnet18(norm_layer=nn.BatchNorm2d),
    "lraspp_mobilenet_v3_large": lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
}
for name, source in models.items():
    model = normprop.convert(source, strict=True, example=x).model.train()
    y = model(x)
    y = y["out"] if isinstance(y, dict) else y
    y.square().mean().backward()  # one sample is enough
    left = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    print(f"{name}: {left} BatchNorms left, output std {y.std():.2f}")
    assert left == 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

bare = normprop.convert(resnet18(norm_layer=nn.Identity))
print(f"resnet18(norm_layer=nn.Identity): {len(bare.replaced)} replaced, {bare.notes[0]}")
assert not bare.replaced
