"""A trained BatchNorm ResNet goes on without batches: train, convert, fine-tune at batch size 1, fold, export.

python examples/convert_resnet.py [STEPS]    # scikit-learn's digits; no download, under a minute on 2 cores
"""

import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torchvision.models import resnet18

import normprop

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
torch.manual_seed(0)
digits = load_digits()
images = F.interpolate(torch.tensor(digits.images[:, None]).float(), size=32, mode="bilinear")
x, y = ((images - images.mean()) / images.std()).repeat(1, 3, 1, 1), torch.tensor(digits.target)
train_x, train_y, test_x, test_y = x[:1437], y[:1437], x[1437:], y[1437:]


def train(model, optimizer, batch_size, steps):
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(train_x), (batch_size,))
        optimizer.zero_grad()
        F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(test_x)
    return logits, (logits.argmax(1) == test_y).float().mean()


model = resnet18(num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
logits, before = train(model, optimizer, 32, steps)
print(f"BatchNorm, batch size 32: test accuracy {before:.3f}")

conversion = normprop.convert(model, preserve=True, strict=True, example=train_x[:2])
converted = conversion.model
gap = (converted(test_x) - logits).abs().max()
print(f"converted: {len(conversion.replaced)} layers replaced, largest difference {gap:.1e}")
conversion.update_optimizer_(optimizer)  # the same options, now for the new parameters
optimizer.param_groups[0]["lr"] = 2e-5  # one sample's gradient is noisy
_, after = train(converted, optimizer, 1, 2 * steps)  # BatchNorm cannot: one sample has no variance
print(f"fine-tuned at batch size 1: test accuracy {after:.3f}")
normprop.testing.assert_batch_independent(converted, test_x[:4])
folded = normprop.fold(converted, verify=test_x[:4])  # torch's own modules; raises if outputs differ
with tempfile.TemporaryDirectory() as folder:
    file, shapes = Path(folder) / "model.onnx", ({0: torch.export.Dim("batch")},)
    torch.onnx.export(folded, (test_x[:2],), file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    onnx = onnxruntime.InferenceSession(file).run(None, {"x": test_x.numpy()})[0]
same = (torch.tensor(onnx) - folded(test_x)).abs().max()
print(f"ONNX Runtime: largest difference {same:.1e}")
assert gap < 1e-3 and same < 1e-3 and after > before - 0.05  # noqa: PT018 - a script, not a test
