"""timm: create a model, convert it, train at batch size 1, then plain torch again for inference.

python examples/convert_timm.py    # needs timm; no download, seconds on a CPU
"""

import timm
import torch
from timm.utils import reparameterize_model
from torch.nn import functional as F

import normprop

torch.manual_seed(0)
source = timm.create_model("test_efficientnet", num_classes=10)  # pretrained=True: pass preserve=True below
x, y = torch.randn(1, 3, 64, 64), torch.tensor([3])

conversion = normprop.convert(source, example=x)
print(conversion)  # what was replaced, what was not and why
model = conversion.model.train()

groups = normprop.param_groups(model, weight_decay=5e-4)  # weight decay where it means something
optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
normprop.attach_projection(optimizer, model)  # unit rows after every step
losses = []
for _ in range(10):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"batch size 1: loss {losses[0]:.3f}, after 9 steps {losses[-1]:.3f}")
assert losses[-1] < losses[0]

model.eval()
for name, plain in (("timm", reparameterize_model(model)), ("fold", normprop.fold(model, verify=x))):
    with torch.no_grad():
        gap = (plain(x) - model(x)).abs().max().item()
    left = sum("NormProp" in type(module).__name__ for module in plain.modules())
    print(f"{name}: {left} NormProp layers left, largest difference {gap:.1e}")
    assert left == 0
    assert gap < 1e-3
