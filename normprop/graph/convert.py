r"""``convert``: a BatchNorm model in, a NormProp model out.

Five stages: copy and trace; find the sites; plan each, or say why not; raise with all reasons if
``strict``; rewrite and return. Two modes: *fresh* keeps every map that a weight layer reads at mean
0, variance 1; ``preserve=True`` computes what the source computes in eval mode (docs/method.md,
section 12).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, distributed as dist, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from normprop import activations
from normprop.functional import RECOMMENDED, NormRule, check_rule
from normprop.graph import reading, trace as tracing
from normprop.graph.reading import TraceError
from normprop.graph.rewrite import Rewriter
from normprop.graph.trace import ByMode, below, has, place
from normprop.modules import NormPropLayer, check_model

_SAMPLES = 16  # of noise: enough for the std of a map of one position and eight channels
_REHEARSAL = 4  # the same where only decisions are taken
_ELEMENTS = 10_000_000  # of an input of large images or volumes, which say as much with fewer samples


class ConversionError(ValueError):
    """``strict=True`` and something was not converted; the message holds all reasons."""


@dataclass(frozen=True)
class Site:
    """One place of the source model.

    Attributes:
        path: The module, in the source and in the result; empty for the model itself.
        source: What stood there: ``Conv2d -> BatchNorm2d -> relu``.
        target: What stands there now, or why it was left.
    """

    path: str
    source: str
    target: str


@dataclass
class Conversion:
    """What :func:`convert` returns; ``print`` shows it as a table.

    Attributes:
        model: The NormProp model.
        replaced: The sites that were rewritten.
        skipped: The sites that were left, ``target`` being the reason and the way out.
        notes: What else to know: hooks that are lost, options that had no effect.
    """

    model: nn.Module
    replaced: list[Site]
    skipped: list[Site]
    notes: list[str] = field(default_factory=list)
    _handover: dict[int, tuple[Tensor, nn.Parameter | None, bool]] = field(default_factory=dict, repr=False)

    def update_optimizer_(self, optimizer: torch.optim.Optimizer) -> None:
        """Hand the new parameters to an optimizer that was built for the source model, in place.

        A parameter that the conversion only copied takes its state (momentum) along; a replaced
        layer's starts anew: weight and gain take the place of the convolution's weight and the
        BatchNorm's, in their parameter groups, with their options.

        Raises:
            ValueError: If the optimizer holds a parameter that is not the source model's.
            TypeError: For LBFGS, which keeps a list of its own.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("LBFGS keeps its own list of parameters: build it anew on conversion.model")
        held = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = [p for p in held if id(p) not in self._handover]
        if foreign:
            raise ValueError(
                f"the optimizer holds {len(foreign)} parameters that are not the source model's, the first "
                f"of shape {tuple(foreign[0].shape)}; pass the optimizer that was built on that model"
            )
        given = {id(self._handover[id(p)][1]) for p in held}
        for group in optimizer.param_groups:
            group["params"] = [
                new for p in group["params"] if (new := self._handover[id(p)][1]) is not None
            ]
        for old in held:
            state = optimizer.state.pop(old, None)
            _, new, same = self._handover[id(old)]
            if new is not None and same and state:
                optimizer.state[new] = state
        # A layer had no bias, its BatchNorm no affine: what comes anew joins the group of its layer's weight.
        ours = {id(new) for _, new, _ in self._handover.values()}
        groups = {id(p): group["params"] for group in optimizer.param_groups for p in group["params"]}
        for layer in self.model.modules():
            own = list(layer.parameters(recurse=False))
            beside = next((groups[id(p)] for p in own if id(p) in groups), None)
            for parameter in own:
                if parameter.requires_grad and id(parameter) not in ours | given and beside is not None:
                    beside.append(parameter)
                    given.add(id(parameter))
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in optimizer.param_groups:
            if "param_names" in group:
                group["param_names"] = [names[id(p)] for p in group["params"]]

    def __str__(self) -> str:
        rows = [("path", "source", "now")] + [(s.path, s.source, s.target) for s in self.replaced]
        text = _columns(rows)
        if self.skipped:
            rows = [("path", "skipped", "because")] + [
                (s.path or "model", s.source, s.target) for s in self.skipped
            ]
            text += "\n\n" + _columns(rows)
        summary = f"{_sites(len(self.replaced))} replaced, {len(self.skipped)} skipped"
        return "\n".join([text, "", summary, *(f"note: {note}" for note in self.notes)])


def _sites(count: int) -> str:
    return f"{count} site" + "s" * (count != 1)


def _columns(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows)


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    rule: NormRule = RECOMMENDED,
    preserve: bool = False,
    strict: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    example: Any = None,
) -> Conversion:
    """Replace BatchNorm by Normalization Propagation in a whole model; ``model`` is left untouched.

    Fresh (the default): for training from the start. Weights keep their directions, gains and biases
    start anew, and sums, pools, gates and concatenations keep mean 0 and variance 1 by formula
    wherever a weight layer reads the map.

    ``preserve=True``: for going on from trained weights. The result computes what ``model.eval()``
    computes and trains batch-free from there; ``rule`` has no effect (constants "none", not centred,
    plain sums), which ``notes`` says.

    Args:
        model: A model with BatchNorm layers; training flags, device, dtype, memory format and
            requires_grad are kept.
        rule: The variant that fresh layers follow; layers that read the input, and those with
            ``fan_in`` below 16, are not centred.
        preserve: See above.
        strict: Raise if anything is skipped.
        filter_fn: ``filter_fn(module, path)``: False leaves a BatchNorm or weight layer as it is.
        example: An input, or a tuple of them, of the sizes that will be used. Its values calibrate
            constants if they look like normalised data (mean within 0.5, std in [0.5, 2], neighbouring pixels
            alike), else noise of its shape does. None: guessed, (N, C) for a model that starts with a Linear
            layer. Needed for sequences (N, L, C), where the code looks at shapes, and for the constants behind
            averages over positions.

    Returns:
        :class:`Conversion`; ``model`` has the source's module paths and key names, a BatchNorm's
        weight and bias being the layer's ``gain`` and ``bias``. It computes what ``forward`` does, as one
        graph: containers on the way (``model.layer1``) cannot be called, and ``notes`` lists the methods that
        it lacks. Code that torch.fx cannot follow stays, and its parts are converted one by one.
        Constants that were measured on the weights are in its state dict (``constants``); which layers
        have some does not depend on the seed: another process loads it into a conversion of its own.
        (Weights far from fresh ones, trained say, may need more of them: ``torch.save(model, path)``.)

    Raises:
        ConversionError: If ``strict`` and a site was skipped, with all reasons.
        TypeError: For what is not a module, a rule that is not a NormRule, or a filter_fn that is not a function.
        ValueError: For a model that is wrapped for several devices, an example that it does not take, or with
            ``preserve`` weights on the meta device.
        TraceError: For a model that cannot be copied (a ValueError).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        >>> convert(net).model
        Sequential(
          (0): NormPropConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), activation=relu, rule=...)
          (3): Flatten(start_dim=1, end_dim=-1)
        )
    """
    check_model(model)
    check_rule(rule)
    if not (filter_fn is None or callable(filter_fn)):
        raise TypeError(f"filter_fn must be a function of a module and its path, got {filter_fn!r}")
    kind = type(model).__name__
    if kind in tracing.WRAPPERS:
        raise ValueError(
            f"model is wrapped in {kind}: convert model.{tracing.WRAPPERS[kind]}, then wrap the result"
        )
    if tracing.is_sharded(model):
        raise ValueError("model is sharded (FSDP2): convert it first, then call fully_shard on the result")
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(
                f"'{name}' ({type(module).__name__}) has no weights yet: run the model once, then convert it"
            )
    if preserve and (without := tracing.without_values(model)):
        raise ValueError(f"preserve=True: '{without}' has no values (device meta); load the weights first")
    report = Conversion(model, [], [])
    worker = Converter(model, rule, preserve, filter_fn, report)
    report.model = worker.run(example)
    known = {site.path for site in report.skipped}
    for name, module in report.model.named_modules():
        if reading.is_batch_norm(module) and name not in known:
            worker.skip(name, module, _why_inside(report.model, name))
    if report.replaced:
        report.model.register_load_state_dict_pre_hook(_check_constants)
    if preserve:
        report.notes.append(
            "preserve=True: constants 'none', rows not centred, plain sums and pools, whatever rule says"
        )
    if not (worker.norms_seen or report.skipped):
        has_ours = any(reading.is_normprop(module) for module in model.modules())
        report.notes.append(
            "no BatchNorm layer found: nothing to convert" + "; it has NormProp layers already" * has_ours
        )
    report.notes += _remarks(model, report.model)
    report._handover.update(worker.handover())
    if strict and report.skipped:
        reasons = "\n".join(f"  {s.path or 'model'}: {s.source}: {s.target}" for s in report.skipped)
        raise ConversionError(f"{_sites(len(report.skipped))} cannot be converted:\n{reasons}")
    return report


def _why_inside(model: nn.Module, name: str) -> str:
    """Why nothing became of a BatchNorm that no graph calls."""
    while name := name.rpartition(".")[0]:
        kind = type(model.get_submodule(name)).__name__
        if kind in tracing.WRAPPERS:
            return f"it is wrapped in {kind}: put model.{name}.{tracing.WRAPPERS[kind]} in the place of model.{name}"
    return "it is inside a module whose code is not followed"


def _remarks(source: nn.Module, result: nn.Module) -> Iterator[str]:
    """What a user of the result should know that its code does not show."""
    if lost := _lost_methods(source, result):
        yield f"the result computes forward() alone; it has no {_listed(lost)}"
    if lost := _lost_names(source, result):
        yield f"second names of modules are lost: {_listed(lost)}"
    if read := _read_elsewhere(result):
        yield (
            f"forward() itself reads {', '.join(read)}: projection and trust region, which rescale a layer's rows, "
            "change what is computed there"
        )
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and any(getattr(module, "constants", ()) for module in result.modules()):
        yield (
            "constants were measured on this rank's weights, for which DDP puts rank 0's: seed all ranks alike "
            "before the model is built, or load rank 0's state dict"
        )


def _remarks_on_code(graphs: list[fx.GraphModule], prefix: str, guessed: bool) -> Iterator[str]:
    """What of a part's code is not in its graphs (one a mode), traced with a guessed input or a given one."""

    def of_all(name: str) -> list[str]:
        return sorted({text for graph in graphs for text in graph.meta[name]})

    part = prefix or "model"
    fixed = graphs[0].meta["fixed"]
    if fixed and not prefix:
        yield f"forward() has no {', '.join(fixed)} (taken at the default); a tensor stays if example= has it"
    if left := of_all("left"):
        yield f"forward() sets self.{', self.'.join(left)}, which the result does not"
    if dropped := of_all("dropped"):
        yield f"'{part}' loses {' and '.join(dropped)}"
    if decided := of_all("decisions"):
        more = f" (and {len(decided) - 1} more)" if len(decided) > 1 else ""
        sizes = "one that was guessed; pass example=" if guessed else "the example's"
        yield f"'{decided[0] or part}' decides by its input's size{more}: the result is for sizes like {sizes}"


def _check_example(model: nn.Module, example: Any) -> None:
    """Raises ValueError for an input that the model does not take; one without data cannot be tried."""
    inputs = tracing.as_inputs(example)
    tensors = (*inputs, *model.parameters())
    if any(x.is_meta for x in tensors) or len({x.device for x in tensors}) > 1:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tracing.copied(model).eval()(*(x.clone() for x in inputs))
    except TypeError:  # it wants what no tensor is
        return
    except Exception as error:
        got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(f"the model does not take example ({got}): {error}") from error


def _check_constants(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Refuse, strict or not, the state dict of another conversion: it would compute something else.

    One without any constants may be part of a model; torch says what is missing, if that is asked for.
    """
    own = {f"{prefix}{name}.constants" for name, m in module.named_modules() if getattr(m, "constants", ())}
    given = {key for key in state if key.startswith(prefix) and key.endswith(".constants")}
    if given and own != given:
        errors.append(
            f"{min(own ^ given)} is in one and not in the other: the state dict is of another conversion. "
            "Convert the same model with the same example=, or save it whole: torch.save(model, path)"
        )


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _lost_methods(model: nn.Module, result: nn.Module) -> list[str]:
    """Public methods of the model's own classes that the result has not, its own ``train()`` among them."""
    own = (cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch."))
    found = {name for cls in own for name, value in vars(cls).items() if callable(value)}
    of_all = {"forward", "extra_repr"}
    return sorted(
        f"{name}() of its own" if name in vars(nn.Module) else name
        for name in found - of_all
        if not name.startswith("_")
        and getattr(type(result), name, None) is not getattr(type(model), name)
        and (name in vars(nn.Module) or not hasattr(result, name))
    )


def _read_elsewhere(result: nn.Module) -> list[str]:
    """Weights of NormProp layers that the code of a graph reads too."""
    weights = {id(m.weight) for m in result.modules() if isinstance(m, NormPropLayer)}
    graphs = [*(result.graphs.values() if isinstance(result, ByMode) else ()), *result.modules()]
    nodes = [node for g in graphs if isinstance(g, fx.GraphModule) for node in g.graph.nodes]
    read = {str(node.target) for node in nodes if node.op == "get_attr" and node.users}
    named = dict(result.named_parameters(remove_duplicate=False))
    return sorted(name for name in read if id(named.get(name)) in weights)


def _lost_names(model: nn.Module, result: nn.Module) -> list[str]:
    """Paths under which the model has a module for the second time, and the result has none."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    here = {name for name, _ in result.named_modules(remove_duplicate=False)}
    lost = {name for names in paths.values() if here & {*names} for name in names if name not in here}
    return sorted(name for name in lost if name.rpartition(".")[0] not in lost)


def calibration(model: nn.Module, example: Any) -> tuple[Tensor, ...] | None:
    """What fresh conversion runs once, for the constants that formulas cannot give.

    The example's values if they look like normalised data (mean within 0.5, std in [0.5, 2],
    neighbours alike) or are no floating-point numbers, else Gaussian noise of its shape, or of the
    guessed one; None for a model without data.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None or like.is_meta:
        return None
    if example is None:
        example = tracing.guess_example(model)
    given = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(x, Tensor) and x.ndim for x in given):
        return None
    kept = [not x.is_floating_point() or _is_data(x) for x in given]
    if any(keep and not len(x) for x, keep in zip(given, kept, strict=True)):
        return None
    sizes = {len(x) for x in given}
    largest = max(x[:1].numel() for x in given)
    wanted = min(_SAMPLES, max(_REHEARSAL, _ELEMENTS // max(1, largest)))
    # At least ``wanted`` samples: noise is drawn, an example's own inputs are repeated.
    times = 1 if all(kept) or len(sizes) > 1 else -(-wanted // max(1, *sizes))
    inputs = []
    for x, keep in zip(given, kept, strict=True):
        if not keep:
            generator = torch.Generator().manual_seed(0)
            count = max(wanted, len(x)) if not any(kept) else times * len(x)
            x = torch.randn(count, *x.shape[1:], generator=generator)
        elif times > 1:
            x = x.repeat(times, *[1] * (x.ndim - 1))
        x = torch.zeros_like(x, device="cpu") if x.is_meta else x
        inputs.append(x.to(like.device, like.dtype if x.is_floating_point() else x.dtype, copy=True))
    return tuple(inputs)


def _is_data(x: Tensor) -> bool:
    if x.is_meta or x.numel() < 2:
        return False
    x = x.detach().float()
    var, mean = torch.var_mean(x)
    scaled = bool(abs(mean) <= 0.5) and bool(0.25 <= var <= 4.0)
    if not scaled or x.ndim < 3 or x.shape[-1] < 2:
        return scaled and x.ndim < 3
    alike = ((x[..., 1:] - mean) * (x[..., :-1] - mean)).mean() / var
    return bool(alike > 0.1)


class Converter:
    """One conversion: what is shared by the graphs of a model."""

    def __init__(
        self,
        model: nn.Module,
        rule: NormRule,
        preserve: bool,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        report: Conversion,
    ) -> None:
        self.source = model
        self.twin = tracing.copied(model)
        self.rule, self.preserve, self.filter_fn, self.report = rule, preserve, filter_fn, report
        self.new: dict[str, nn.Module] = {}  # by path in the whole model
        self.pools: dict[str, nn.Module] = {}  # those that were replaced, by path
        self.absorbed: set[str] = set()
        self.moved: dict[str, str | None] = {}  # parameter's name in the source -> in the result
        self.norms_seen = any(isinstance(m, _BatchNorm) for m in model.modules())

    def run(self, example: Any) -> nn.Module:
        for name, module in self.source.named_modules():
            if "BatchNorm" in getattr(module, "original_name", ""):  # TorchScript's
                self.skip(
                    name,
                    module,
                    "TorchScript cannot be followed: convert the Python model that it was made from",
                )
        if not self.norms_seen:
            self._skip_functional(example)
            return self.twin
        with torch.random.fork_rng(devices=[]):  # code that draws numbers must not change the caller's
            result = self.convert_part(self.twin, "", example)
        for name, module in self.source.named_modules():
            if activations.hooked(module):
                self._note_hook(name, result)
        return result

    def _note_hook(self, name: str, result: nn.Module) -> None:
        if name and has(result, name) and type(result.get_submodule(name)) is nn.Module:
            note = "ran once: what it did to values is part of the graph, it is not called again"
        elif not name or not has(result, name):
            note = "is lost: register it anew"
        else:
            return
        self.report.notes.append(f"hook on '{name or 'model'}' {note}")

    def _skip_functional(self, example: Any) -> None:
        """Say where F.batch_norm stands in a model without BatchNorm modules."""
        try:
            graph = tracing.trace(copy.deepcopy(self.twin), example)
        except TraceError:
            return
        for node in graph.graph.nodes:
            if reading.is_functional_norm(node):
                self.skip_functional(reading.owner(node))

    def convert_part(
        self, part: nn.Module, prefix: str, example: Any, inputs: tuple[Tensor, ...] | None = None
    ) -> nn.Module:
        """A submodule as a graph; if its code cannot be followed, its children one by one.

        Args:
            part: The submodule.
            prefix: Its path.
            example: An input.
            inputs: What it is called with behind the parts that are converted; None for the model itself, and
                where that is not known.
        """
        try:
            graphs = tracing.by_mode(part, example)
        except TraceError as error:
            if not prefix and example is not None:
                _check_example(self.source, example)
            given = inputs or calibration(part, example)
            if given is not None and example is None:  # noise; the code may make larger maps of it
                given = tuple(x[:_REHEARSAL] for x in given)
            calls = None if given is None else tracing.calls_within(part, given)

            def again(child: nn.Module) -> Any:
                return None if self.preserve or given is None else tracing.call_of(part, child, given)

            return self.convert_children(part, prefix, str(error), calls, again)
        failed = any("error" in node.meta for graph in graphs.values() for node in graph.graph.nodes)
        if failed and not prefix and example is not None:
            _check_example(self.source, example)
        hidden = inputs is not None and bool(self.new)
        if self.preserve:
            inputs = None
        elif not hidden:
            inputs = calibration(part, example)
        part.eval()
        self.report.notes += _remarks_on_code(list(graphs.values()), prefix, example is None)
        alone = len(graphs) == 1 and not prefix  # a part's modules may be called by what is around it
        rehearsed: list[dict[str, bool] | None] = [None] * len(graphs)
        if inputs is not None:
            rehearsed = self.rehearse(graphs, prefix, inputs, alone, hidden)
        built = [
            Rewriter(self, graph, prefix, inputs, alone, hidden, decided).run()
            for graph, decided in zip(graphs.values(), rehearsed, strict=True)
        ]
        result: nn.Module = built[0] if len(built) == 1 else ByMode(*built)
        self.finish(result, part, prefix)
        return result

    def rehearse(
        self,
        graphs: dict[bool, fx.GraphModule],
        prefix: str,
        inputs: tuple[Tensor, ...],
        alone: bool,
        hidden: bool,
    ) -> list[dict[str, bool] | None]:
        """What each graph decides on noise and on weights that are always the same.

        What stands where, and with it the keys of the state dict, then does not depend on a seed.
        """
        other = copy.copy(self)
        other.report = Conversion(self.source, [], [])
        other.new, other.pools, other.absorbed, other.moved = {}, {}, set(), {}
        generator = torch.Generator().manual_seed(0)
        noise = tuple(
            torch.randn(_REHEARSAL, *x.shape[1:], generator=generator).to(x)
            if x.is_floating_point()
            else x[torch.arange(_REHEARSAL) % len(x)]
            for x in inputs
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            twins = copy.deepcopy(list(graphs.values()))
            for layer in dict.fromkeys(m for twin in twins for m in twin.modules()):
                if reading.is_parametrized(layer):
                    continue
                for weight in (p for p in layer.parameters(recurse=False) if p.ndim > 1):
                    length = float(weight.float().square().mean().sqrt()) or 1.0
                    weight.copy_(torch.randn(weight.shape, generator=generator) * length)
            plans = [Rewriter(other, twin, prefix, noise, alone, hidden) for twin in twins]
            for plan in plans:
                plan.flow.chance = {}
                plan.run()
        return [None if plan.flow.failure else plan.decided for plan in plans]

    def convert_children(
        self,
        part: nn.Module,
        prefix: str,
        reason: str,
        calls: dict[nn.Module, Any] | None,
        again: Callable[[nn.Module], Any],
    ) -> nn.Module:
        """``again`` gives a child's inputs as they are now, behind what was converted before it."""
        if reading.is_batch_norm(part):
            self.skip(prefix, part, f"its caller's code cannot be followed ({reason})")
            return part
        for name, child in list(part.named_children()):
            if any(isinstance(m, _BatchNorm) for m in child.modules()):
                path = below(prefix, name)
                if reading.is_batch_norm(child):
                    self.skip(path, child, f"the code around it cannot be followed ({reason})")
                elif calls is not None and calls.get(child) is None:
                    odd = "not called" if child not in calls else "called with more than tensors"
                    self.convert_children(child, path, f"it is {odd} by its parent", calls, again)
                else:
                    inputs = None if calls is None else again(child)
                    given = inputs or (calls or {}).get(child)
                    tracing.put_in_place_of(child, self.convert_part(child, path, given, inputs), self.twin)
        self.report.notes.append(f"'{prefix or 'model'}' was converted child by child: {reason}")
        return part

    def skip(self, path: str, source: nn.Module | str, reason: str) -> None:
        site = Site(path, source if isinstance(source, str) else type(source).__name__, reason)
        if site not in self.report.skipped:
            self.report.skipped.append(site)

    def skip_functional(self, path: str) -> None:
        self.skip(path, "F.batch_norm", "written as a function; use an nn.BatchNorm module")

    def note_replaced(self, path: str, source: str, target: str) -> None:
        if all(site.path != path for site in self.report.replaced):  # both modes' graphs report it
            self.report.replaced.append(Site(path, source, target))

    def became(self, path: str, target: str) -> None:
        """A later stage put something else in a site's place."""
        self.report.replaced[:] = [
            replace(site, target=target) if site.path == path else site for site in self.report.replaced
        ]

    def finish(self, result: nn.Module, part: nn.Module, prefix: str) -> None:
        """Modules that no graph calls, plain attributes and training flags, as they were."""
        for name, module in part.named_modules():
            path = below(prefix, name)
            own = any(True for _ in module.parameters(recurse=False))
            if name and own and path not in self.absorbed and not has(result, name):
                place(result, name, module)
                if reading.is_batch_norm(module):
                    rest = [site for site in self.report.replaced if site.path != path]
                    unread = len(rest) < len(self.report.replaced)
                    self.report.replaced[:] = rest
                    why = "nothing reads what it makes" if unread else "the model never calls it"
                    self.skip(path, module, f"{why}; delete it")
        for name, module in part.named_modules():  # what containers hold themselves
            path = below(prefix, name)
            holder = result.get_submodule(name) if has(result, name) or not name else None
            if holder is None or path in self.new or not (holder is result or type(holder) is nn.Module):
                continue
            for table in ("_parameters", "_buffers"):
                for key, value in getattr(module, table).items():
                    if value is not None and not hasattr(holder, key):
                        getattr(holder, table)[key] = value
            holder._non_persistent_buffers_set |= module._non_persistent_buffers_set & set(holder._buffers)
        tracing.keep_attributes(part, result)
        for name, module in result.named_modules():
            path = below(prefix, name)
            module.training = (
                self.source.get_submodule(path) if has(self.source, path) else self.source
            ).training

    def handover(self) -> dict[int, tuple[Tensor, nn.Parameter | None, bool]]:
        now = dict(self.report.model.named_parameters(remove_duplicate=False))
        table: dict[int, tuple[Tensor, nn.Parameter | None, bool]] = {}
        for name, parameter in self.source.named_parameters(remove_duplicate=False):
            target = self.moved.get(name, name)
            new = now.get(target) if target is not None else None
            if id(parameter) not in table or table[id(parameter)][1] is None:
                table[id(parameter)] = (parameter, new, target == name and name not in self.moved)
        return table
