"""timm: create a model, convert it, train at batch size 1, fold it for inference.

python examples/convert_timm.py    # needs timm; no download, seconds on a CPU
"""

import timm
import torch
from timm.utils import reparameterize_model
from torch.nn import functional as F

import normprop

torch.manual_seed(0)
source = timm.create_model("test_efficientnet", num_classes=10)  # with pretrained=True, preserve=True below
x, y = torch.randn(1, 3, 64, 64), torch.tensor([3])
conversion = normprop.convert(source, example=x)
print(conversion)  # what was replaced, what was not and why
model = conversion.model.train()

groups = normprop.param_groups(model, weight_decay=5e-4)  # weight decay where it means something
optimizer = torch.optim.SGD(groups, lr=0.1)
normprop.attach_projection(optimizer, model, trust_radius=0.01)  # unit rows, bounded steps
losses = []
for _ in range(10):
    losses.append(F.cross_entropy(model(x), y))
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
print(f"batch size 1: loss {losses[0]:.3f}, after 9 steps {losses[-1]:.3f}")
assert losses[-1] < losses[0]

expected = model.eval()(x)
by_layer = reparameterize_model(model)  # timm's: asks each layer for its .fuse(); pools and gates stay
folded = normprop.fold(model, verify=x)  # the whole graph: nothing of normprop is left
for name, plain in (("timm", by_layer), ("fold", folded)):
    gap = ((plain(x) - expected).abs().max() / expected.abs().max()).item()
    left = sum("NormProp" in type(module).__name__ for module in plain.modules())
    print(f"{name}: {left} NormProp layers left, largest difference {gap:.1e}")
    assert (left, gap < 1e-4) == (0, True)
