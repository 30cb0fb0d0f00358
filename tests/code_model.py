"""Models for tests of graphs, written where they are used."""

from torch import nn


class Code(nn.Module):
    """A model whose forward is a function of itself and its input; modules by name."""

    def __init__(self, body, **modules):
        super().__init__()
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.body(self, x)


def gray():
    """A network with BatchNorm for images of one channel, ten classes."""
    layers = []
    for channels in (1, 6, 6, 6, 6):
        layers += [nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))


def pair():
    """A network that returns two tensors."""
    return Code(lambda self, x: (self.net(x), x), net=gray())


MADE = gray().eval()


def plain():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))


def wide():
    return nn.Sequential(gray(), nn.Linear(10, 20))


def mute():
    """A network that fails and does not say why."""

    def body(self, x):
        raise NotImplementedError

    return Code(body, net=gray())
