"""``lighten``: the same function, with the passes of a network without normalisation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normprop
from normprop import NormalizedActivation, NormalizedAdd, NormPropConv2d, TraceError, lighten
from normprop.recipes.models import build


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


RULES = pytest.mark.parametrize("rule", [normprop.PAPER, normprop.RECOMMENDED])


def resnet(rule=normprop.RECOMMENDED, name="resnet20"):
    torch.manual_seed(0)
    net = build(name, (3, 16, 16), 10, rule=rule, width=0.25).double()
    for parameter in net.parameters():  # gains and biases as training leaves them
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def kinds(net):
    return [type(module).__name__ for module in net.modules()]


@RULES
@pytest.mark.parametrize(
    "name", ["resnet20", "resnet110"]
)  # the trunk of the second drifts out of its range
def test_the_same_function_and_gradients(rule, name):
    net = resnet(rule, name)
    light = lighten(net)
    x = randn(2, 3, 16, 16)
    torch.testing.assert_close(light(x), net(x), rtol=1e-10, atol=1e-10)
    for path in ("stem", "stage1.0.conv1", "stage2.0.shortcut", "stage3.2.conv2", "output"):
        for key in ("weight", "gain"):
            one, other = (
                torch.autograd.grad(n(x).square().sum(), n.get_submodule(path).get_parameter(key))[0]
                for n in (net, light)
            )
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@RULES
def test_no_pass_over_a_map_that_a_plain_network_does_not_make(rule):
    light = lighten(resnet(rule))
    assert kinds(light).count("NormalizedActivation") == 1  # before the mean over positions
    assert kinds(light).count("ShiftedReLU") == 9
    sums = [m for m in light.modules() if isinstance(m, NormalizedAdd)]
    assert [m.factors[1] for m in sums] == [1.0] * 9
    assert [m.factors[0] for m in sums[:-1]] == [1.0] * 8
    reads = {True: [], False: []}  # std of what layers read
    for is_light, net in ((True, light), (False, resnet(rule))):
        for module in net.modules():
            if isinstance(module, NormPropConv2d):
                keep = reads[is_light]
                module.register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0].detach().std()))
        net(randn(8, 3, 16, 16))
    assert len(reads[True]) == len(reads[False]) == 21
    assert all(0.8 <= one / other <= 1.25 for one, other in zip(reads[True], reads[False], strict=True))


def test_the_model_is_left_untouched_and_modes_are_kept():
    net = resnet()
    net.stage1.eval()
    before, state = kinds(net), copy.deepcopy(net.state_dict())
    light = lighten(net)
    assert kinds(net) == before
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert (net.training, net.stage1.training) == (True, False)
    assert (light.training, light.get_submodule("stage1.0.conv1").training) == (True, False)
    with pytest.raises(RuntimeError, match="constants"):
        light.load_state_dict(net.state_dict())
    light.load_state_dict(light.state_dict())


def test_a_light_model_folds_is_predicted_alike_and_can_be_copied():
    light = lighten(resnet()).eval()
    x = randn(2, 3, 16, 16)
    normprop.fold(light, verify=x)
    again = lighten(light)
    torch.testing.assert_close(again(x), light(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(copy.deepcopy(light)(x), light(x))
    one, other = (
        {r.path: r for r in normprop.predict(net, x).records} for net in (lighten(resnet()), resnet())
    )
    for path, record in other.items():
        if path.endswith("conv1"):  # conv2 gives the map that is carried, in other units
            assert one[path].gradient == pytest.approx(record.gradient, rel=0.1)


def test_a_folded_residual_net_has_the_operations_of_a_plain_one():
    folded = normprop.fold(resnet(), verify=randn(2, 3, 16, 16))
    made = [n.target for n in folded.graph.nodes if n.op == "call_function"]
    assert made.count(torch.add) == 9
    assert len(made) == 18  # and a threshold in front of each block
    plain = resnet().eval()
    x = randn(2, 3, 21, 19)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-9, atol=1e-9)


class Block(nn.Module):
    """A trunk that something else may read too."""

    def __init__(self, read="", **options):
        super().__init__()
        self.stem = NormPropConv2d(3, 4, 3, padding=1, activation=None)
        self.first, self.second = NormalizedActivation("relu"), NormalizedActivation("relu")
        self.a, self.b, self.last = (
            NormPropConv2d(4, 4, 3, padding=1, activation=None),
            NormPropConv2d(4, 4, 3, padding=1, activation=None),
            NormPropConv2d(4, 2, 3, padding=1, activation=None),
        )
        self.add, self.sum = NormalizedAdd.residual(2, **options), NormalizedAdd.residual(2, **options)
        self.end, self.read = NormalizedActivation("relu"), read

    def forward(self, x):
        x = self.stem(x)
        extra = x.mean() if self.read == "stem" else 0.0
        y = self.first(x)
        x = self.add(x, self.a(y))
        z = self.second(x)
        if self.read == "trunk":
            extra = torch.sin(x).mean()
        if self.read == "entry":
            extra = z.mean()
        if self.read == "twice":
            x = self.add(x, self.b(z))
        elif self.read == "swapped":
            x = self.sum(self.b(z), x)
        else:
            x = self.sum(x, self.b(z))
        if self.read == "mode":
            x = F.dropout(x, 0.5, self.training)
        return self.last(self.end(x)) + extra


@pytest.mark.parametrize("read", ["", "stem", "trunk", "entry", "twice", "swapped"])
@pytest.mark.parametrize("options", [{}, {"learnable": True}, {"drop_prob": 0.3}], ids=str)
def test_what_others_read_stays_as_it_is(read, options):
    torch.manual_seed(0)
    net = Block(read, **options).double().eval()
    x = randn(2, 3, 8, 8)
    torch.testing.assert_close(lighten(net)(x), net(x), rtol=1e-10, atol=1e-10)
    normprop.fold(net, verify=x)


def test_hooked_modules_stay_as_they_are():
    net = Block().double()
    net.a.register_forward_hook(lambda _, inputs, output: output * 2)
    x = randn(2, 3, 8, 8)
    torch.testing.assert_close(lighten(net)(x), net(x), rtol=1e-10, atol=1e-10)


def test_errors():
    with pytest.raises(TraceError, match="training and eval"):
        lighten(Block("mode"))
    net = resnet()
    normprop.scale_together(net)
    with pytest.raises(ValueError, match="hook on 'model': lighten, then register it"):
        lighten(net)
    net = resnet()
    net.stage1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hook on 'stage1'"):
        lighten(net)
