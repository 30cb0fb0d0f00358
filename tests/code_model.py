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
