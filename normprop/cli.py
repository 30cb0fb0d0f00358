"""The command line: ``normprop compare | train | reproduce | bench | inspect | convert | ...``, see ``app``."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated, Any

import normprop

# The console script must say what is missing where the extras are not installed.
try:
    import typer
except ImportError:  # pragma: no cover - tests/test_package.py runs it without the extras
    typer = None  # type: ignore[assignment]

EXTRA = "pip install 'normprop[recipes]'"
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point: bad usage and bad input are one line on standard error and exit code 2."""
    if typer is None:
        _exit(f"the command line needs typer: {EXTRA}")
    from normprop.recipes import InputError

    try:
        code = app(args=arguments, prog_name="normprop", standalone_mode=False)
    except InputError as error:
        _exit(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "normprop":
            raise
        _exit(f"this command needs {error.name}: {EXTRA}")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors have it, whichever click they use
            raise
        if message := error.format_message():
            _exit(message + _value_given(error, sys.argv[1:] if arguments is None else arguments))
        sys.exit(2)  # no arguments: the help was shown
    if code == INTERRUPTED:  # typer's answer to Ctrl-C too
        _exit("stopped; what was finished is kept", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _value_given(error: Any, arguments: list[str]) -> str:
    """typer says which option is wrong, not what was typed."""
    options = getattr(getattr(error, "param", None), "opts", ())
    for option, value in itertools.pairwise(arguments):
        if option in options and value not in str(error):
            return f", got {value}"
    return ""


def _exit(message: str, code: int = 2) -> None:
    print(f"normprop: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _console(json: bool) -> Any:
    """Where progress and tables go: beside what a program reads, and no narrower than a table in a file."""
    from rich.console import Console

    return Console(stderr=json, width=None if sys.stdout.isatty() else 160)


if typer is not None:
    app = typer.Typer(
        help="Normalization Propagation: normalised hidden layers without batch statistics.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )

    Dataset = Annotated[
        str,
        typer.Option(
            help="'digits', a folder of parquet files or images, or a name on the Hugging Face Hub."
        ),
    ]
    Model = Annotated[
        str,
        typer.Option(
            help="mlp, cnn, nin, resnet20, resnet18, resnet110, or another library's: torchvision:NAME, timm:NAME, "
            "package.module:factory."
        ),
    ]
    Rule = Annotated[str, typer.Option(help="NormProp's rule: paper or recommended.")]
    Width = Annotated[float, typer.Option(help="Factor on the numbers of hidden channels.")]
    Epochs = Annotated[int, typer.Option(help="Passes over the training data.")]
    LearningRate = Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate; by default it follows from norm and batch size."),
    ]
    DataNorm = Annotated[
        str,
        typer.Option(
            help="channel, whitening, global (per pixel, as the paper), batch (per pixel, by the batch) or none."
        ),
    ]
    Flip = Annotated[bool, typer.Option("--flip", help="Mirror half of the training images.")]
    Seed = Annotated[int, typer.Option(help="Seed of weights, order and flips.")]
    Precision = Annotated[str, typer.Option(help="32-true, bf16-mixed, 16-mixed or 64-true.")]
    Limit = Annotated[int | None, typer.Option("--limit-train-batches", help="Steps an epoch, at most.")]
    Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

    def _version(show: bool) -> None:
        if show:
            print(f"normprop {normprop.__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
        ] = False,
    ) -> None:
        pass

    @app.command()
    def moments(
        activation: Annotated[
            str, typer.Argument(help="Its name, such as relu; 'all' for the whole table.")
        ],
        mean: Annotated[float, typer.Option(help="Mean of the Gaussian input.")] = 0.0,
        std: Annotated[float, typer.Option(help="Standard deviation of the Gaussian input.")] = 1.0,
        json: Json = False,
    ) -> None:
        """The constants of an activation: mean, std, slope and Jacobian factor under a Gaussian."""
        from normprop.activations import as_module, is_learned, names
        from normprop.recipes import InputError

        try:
            rows = {}
            for name in names() if activation == "all" else [activation]:
                values = normprop.moments(name, mean, std)
                if is_learned(as_module(name)):
                    values = normprop.Moments(*(value.item() for value in values))
                rows[name] = values._asdict()
        except ValueError as error:
            raise InputError(str(error)) from error
        if json:
            _print_json(rows[activation] if activation != "all" else rows)
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        view = Table(
            title=f"phi(u), u ~ N({mean:g}, {std:g}²)",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        view.add_column("activation", no_wrap=True)
        for column in normprop.Moments._fields:
            view.add_column(column, justify="right", no_wrap=True)
        for name, row in rows.items():
            view.add_row(name, *(f"{round(value, 8) + 0.0:.8f}" for value in row.values()))
        Console().print(view)

    @app.command()
    def train(
        dataset: Dataset = "digits",
        model: Model = "cnn",
        norm: Annotated[
            str, typer.Option(help="normprop, batch, group, layer, weight or none.")
        ] = "normprop",
        rule: Rule = "recommended",
        width: Width = 1.0,
        batch_size: Annotated[int, typer.Option(help="Samples a step, on each device.")] = 128,
        epochs: Epochs = 20,
        lr: LearningRate = None,
        data_norm: DataNorm = "channel",
        flip: Flip = False,
        seed: Seed = 0,
        precision: Precision = "32-true",
        limit_train_batches: Limit = None,
        halve_every: Annotated[
            int | None,
            typer.Option(help="Halve --lr every so many epochs, as the paper; by default one cycle."),
        ] = None,
        weight_decay: Annotated[float, typer.Option(help="Of what is no NormProp layer's.")] = 5e-4,
        train_images: Annotated[
            int | None, typer.Option(help="Train on so many, always the same ones; by default on all.")
        ] = None,
        validation: Annotated[
            int,
            typer.Option(
                help="Hold out so many training images and evaluate on them, not on the test images."
            ),
        ] = 0,
        activation: Annotated[
            str, typer.Option(help="Of the hidden layers; 'normprop moments all' lists the names.")
        ] = "relu",
        trust_radius: Annotated[
            float | None,
            typer.Option(
                help="NormProp's largest change of a unit in a step, 0 for any; 0.01 if recommended, "
                "0.02 if orthogonal."
            ),
        ] = None,
        orthogonal: Annotated[
            bool,
            typer.Option("--orthogonal", help="Orthogonal steps of the weights, Nesterov momentum."),
        ] = False,
        devices: Annotated[str, typer.Option(help="How many, or auto.")] = "auto",
        nodes: Annotated[int, typer.Option(help="Number of machines.")] = 1,
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on from the last finished epoch in --out.")
        ] = False,
        out: Annotated[Path, typer.Option(help="Folder for results, checkpoints and logs.")] = Path(
            "runs/train"
        ),
        json: Json = False,
    ) -> None:
        """Train one model; checkpoints after every epoch, --resume goes on after a stop."""
        import os
        import time

        import torch

        from normprop.recipes import InputError, check_count, duration
        from normprop.recipes.data import load
        from normprop.recipes.train import Run, is_first_process, train as fit

        run = Run(
            model=model, norm=norm, rule=rule, width=width, batch_size=batch_size, epochs=epochs, lr=lr,
            data_norm=data_norm, flip=flip, seed=seed, precision=precision, limit_train_batches=limit_train_batches,
            halve_every=halve_every, weight_decay=weight_decay, train_images=train_images, validation=validation,
            activation=activation, trust_radius=trust_radius, orthogonal=orthogonal,
        )  # fmt: skip
        measured = run.measures.replace("_", " ")
        most = torch.cuda.device_count() or os.cpu_count() or 1
        if devices != "auto" and not (devices.isdigit() and 0 < int(devices) <= most):
            raise InputError(f"--devices {devices}: expected 1 to {most}, which this machine has, or auto")
        check_count("--nodes", nodes)
        console = _console(json)
        data = load(dataset)
        started, first = time.perf_counter(), None

        def report(history: list[dict[str, Any]]) -> None:
            nonlocal first
            first = len(history) - 1 if first is None else first
            last = history[-1]
            left = (time.perf_counter() - started) / (len(history) - first) * (epochs - len(history))
            if console.is_terminal:
                console.print()  # below the bar
            rest = f", about {duration(left)} left" if len(history) < epochs else ""
            console.print(
                f"epoch {last['epoch']}/{epochs}: loss {last['train_loss']:.4f}, {measured} "
                f"{100 * last[run.measures]:.2f} %, {duration(last['seconds'])}{rest}"
            )

        outcome = fit(run, data, out, resume, report, console.is_terminal, devices, nodes)
        if not is_first_process():
            return
        if json:
            print((out / "results.json").read_text(), end="")
        elif outcome.status == "ok":
            console.print(f"{measured} {100 * outcome.history[-1][run.measures]:.2f} %; {out}/results.json")
        if outcome.status != "ok":
            _exit(f"{outcome.status}: {outcome.reason}", 1)

    @app.command()
    def compare(
        dataset: Dataset = "digits",
        model: Model = "cnn",
        norms: Annotated[str, typer.Option(help="Separated by commas.")] = "normprop,batch,none",
        rule: Rule = "recommended",
        width: Width = 1.0,
        batch_sizes: Annotated[str, typer.Option(help="Separated by commas.")] = "1,8,128",
        epochs: Epochs = 20,
        lr: LearningRate = None,
        data_norm: DataNorm = "channel",
        flip: Flip = False,
        seed: Seed = 0,
        seeds: Annotated[int, typer.Option(help="How many, counted up from --seed.")] = 1,
        precision: Precision = "32-true",
        limit_train_batches: Limit = None,
        out: Annotated[Path, typer.Option(help="Folder for results.json and compare.png.")] = Path(
            "runs/compare"
        ),
        json: Json = False,
    ) -> None:
        """The same model under several norms and batch sizes: a table, results.json and a figure."""
        from normprop.recipes.compare import compare as run_all
        from normprop.recipes.data import load
        from normprop.recipes.train import Run

        sizes = _numbers("--batch-sizes", batch_sizes)
        run = Run(
            model=model, norm="none", rule=rule, width=width, batch_size=max(sizes), epochs=epochs, lr=lr,
            data_norm=data_norm, flip=flip, seed=seed, precision=precision, limit_train_batches=limit_train_batches,
        )  # fmt: skip
        console = _console(json)
        result = run_all(run, load(dataset), norms.split(","), sizes, seeds, out, console)
        if json:
            _print_json(result)
        else:
            console.print(f"{out}/compare.png, {out}/results.json")

    @app.command()
    def reproduce(
        claim: Annotated[
            str,
            typer.Argument(
                help="data-norm, hidden-mean, convergence, batch-size, table, speed, jacobian, activations, "
                "step-size, beyond, depth or converted."
            ),
        ],
        protocol: Annotated[
            str,
            typer.Option(
                help="reduced (finishes on two CPU cores), full (the paper's) or narrow (at a quarter of its width)."
            ),
        ] = "reduced",
        dataset: Dataset = "cifar10",
        out: Annotated[
            Path | None,
            typer.Option(
                help="Folder for results.json, figure.png and runs/; by default experiments/CLAIM and "
                "experiments/runs, which all claims share."
            ),
        ] = None,
        jobs: Annotated[int, typer.Option(help="Runs at once, each in a process of its own.")] = 1,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        only: Annotated[
            str, typer.Option(help="Make only the runs with these texts in their name: batch-w0.25,seed0.")
        ] = "",
        seeds: Annotated[
            int | None, typer.Option(help="How many, counted up from 0; by default the protocol's.")
        ] = None,
        json: Json = False,
    ) -> None:
        """Test a claim of the paper: run what is missing, write results.json and a figure.

        The same command goes on after a stop; what another process runs in the same folder is left to it.
        """
        from normprop.recipes.reproduce import reproduce as run_all

        console = _console(json)
        result = run_all(claim, protocol, dataset, out, jobs, device, only, seeds, console)
        if json:
            _print_json(result)
            return
        folder = Path("experiments") / claim if out is None else out
        count = f", {result['finished']} of {result['planned']} runs" if "planned" in result else ""
        console.print(f"{result['status']}{count}: {folder}/figure.png, {folder}/results.json")

    @app.command()
    def bench(
        model: Model = "nin",
        width: Width = 1.0,
        norms: Annotated[
            str, typer.Option(help="Separated by commas; none is always there.")
        ] = "normprop,batch",
        batch_sizes: Annotated[str, typer.Option(help="Separated by commas.")] = "1,8,128",
        precisions: Annotated[str, typer.Option(help="fp32, bf16, separated by commas.")] = "fp32,bf16",
        rules: Annotated[
            str, typer.Option(help="paper, recommended, separated by commas.")
        ] = "recommended",
        modes: Annotated[
            str, typer.Option(help="eager, compiled, cudagraphs (on cuda), separated by commas.")
        ] = "eager",
        layout: Annotated[str, typer.Option(help="channels_last or contiguous.")] = "channels_last",
        image: Annotated[int, typer.Option(help="Height and width of the images.")] = 32,
        rounds: Annotated[int, typer.Option(help="Timed rounds a case.")] = 20,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path(
            "runs/bench"
        ),
        json: Json = False,
    ) -> None:
        """Time and memory of a training step as a ratio to no normalisation, contenders interleaved."""
        from normprop.recipes import check_choice
        from normprop.recipes.bench import Case, bench as run_all

        for mode in modes.split(","):
            check_choice("--modes", mode, ("eager", "compiled", "cudagraphs"))
        cases = [
            Case(
                model,
                width,
                size,
                precision,
                mode != "eager",
                layout,
                rule,
                image,
                cudagraphs=mode == "cudagraphs",
            )
            for mode in modes.split(",")
            for rule in rules.split(",")
            for precision in precisions.split(",")
            for size in _numbers("--batch-sizes", batch_sizes)
        ]
        console = _console(json)
        result = run_all(cases, norms.split(","), rounds, device, out, console)
        if json:
            _print_json(result)
        else:
            console.print(f"{out}/bench.png, {out}/bench.json")

    Source = Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="torchvision:NAME, timm:NAME, package.module:factory, or a FILE.pt that torch.save or "
            "'normprop convert' wrote. Reading a file runs code that it holds: open only what you trust.",
        ),
    ]
    InputSize = Annotated[
        str | None,
        typer.Option(help="Shape of one sample, such as 3x224x224; by default what the model says."),
    ]

    @app.command()
    def inspect(
        model: Source,
        input_size: InputSize = None,
        batch: Annotated[int, typer.Option(help="Samples, drawn from N(0, 1).")] = 8,
        seed: Annotated[int, typer.Option(help="Seed of weights, input and gradient.")] = 0,
        convert: Annotated[
            bool, typer.Option("--convert", help="Inspect what normprop.convert makes of it.")
        ] = False,
        out: Annotated[
            Path | None, typer.Option(help="Folder for signal.png and signal.json; by default none.")
        ] = None,
        every: Annotated[
            bool, typer.Option("--every", help="Nodes that only move values (views, slices) too.")
        ] = False,
        json: Json = False,
    ) -> None:
        """The signal through a model, node by node: mean, std and gradient, predicted and measured."""
        from json import loads

        import torch

        from normprop.recipes import InputError, check_count, check_seed
        from normprop.recipes.export import load
        from normprop.recipes.results import environment, output_folder, write_json
        from normprop.recipes.zoo import input_size as size_of

        check_count("--batch", batch)
        check_seed(seed)
        torch.manual_seed(seed)
        network = load(model)
        size = size_of(network, input_size, batch)
        try:
            if convert:
                network = normprop.convert(network, example=torch.empty(batch, *size)).model
            trace = normprop.measure(network, torch.randn(batch, *size), seed)
        except (normprop.DataError, normprop.TraceError) as error:
            raise InputError(f"MODEL {model}: {error}") from error
        setting = {"model": model, "converted": convert, "input_size": size, "batch": batch, "seed": seed}
        result = {**setting, **loads(trace.to_json()), **environment()}
        if json:
            _print_json(result)
        else:
            print(trace.table(every))
        if out is None:
            return
        with output_folder(out, keep=("signal.json",)):
            trace.plot(out / "signal.png")
            write_json(out / "signal.json", result)
        if not json:
            print(f"{out}/signal.png, {out}/signal.json")

    Preserve = Annotated[
        bool,
        typer.Option(
            "--preserve", help="Convert to what the model computes in eval mode (trained weights)."
        ),
    ]
    First = Annotated[bool, typer.Option("--convert", help="Convert the model first.")]
    Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]
    Out = Annotated[Path | None, typer.Option(help="File to save the model to, such as model.pt.")]

    @app.command()
    def convert(
        model: Source,
        preserve: Preserve = False,
        rule: Rule = "recommended",
        strict: Annotated[
            bool, typer.Option("--strict", help="Fail if a BatchNorm cannot be converted.")
        ] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
        input_size: InputSize = None,
        out: Out = None,
        overwrite: Overwrite = False,
        json: Json = False,
    ) -> None:
        """BatchNorm to Normalization Propagation in a whole model: what was replaced, what not and why."""
        from dataclasses import asdict

        from normprop.recipes.export import check_target, save
        from normprop.recipes.results import environment

        if out is not None:
            check_target(out, overwrite, "--out")
        network, example = _model(model, input_size)
        conversion = _converted(model, network, example, preserve, rule, strict)
        saved = None if dry_run else out
        if saved is not None:
            save(conversion.model, saved)
        if json:
            setting = {"model": model, "preserve": preserve, "rule": rule, "input_size": example.shape[1:]}
            sites = {
                kind: [asdict(site) for site in getattr(conversion, kind)]
                for kind in ("replaced", "skipped")
            }
            file = {"saved": None if saved is None else str(saved)}
            _print_json({**setting, **sites, "notes": conversion.notes, **file, **environment()})
            return
        print(conversion)
        unsaved = (
            "dry run: nothing was saved" if dry_run else "nothing was saved; --out FILE.pt saves the model"
        )
        print(saved or unsaved)

    @app.command()
    def fold(
        model: Source,
        input_size: InputSize = None,
        convert: First = False,
        preserve: Preserve = False,
        out: Out = None,
        overwrite: Overwrite = False,
        json: Json = False,
    ) -> None:
        """A NormProp model as plain torch for inference, compared with the model on a Gaussian input."""
        from normprop.recipes import InputError
        from normprop.recipes.export import (
            check_target,
            has_our_layers,
            left,
            outputs,
            relative_error,
            save,
        )
        from normprop.recipes.results import environment

        if out is not None:
            check_target(out, overwrite, "--out")
        network, example = _model(model, input_size)
        if convert or preserve:
            network = _converted(model, network, example, preserve).model
        if not has_our_layers(network):
            raise InputError(f"MODEL {model} has no layers of normprop; pass --convert to convert it first")
        try:
            folded = normprop.fold(network, verify=example)
        except normprop.TraceError as error:
            raise InputError(f"MODEL {model}: {error}") from error
        except normprop.FoldError as error:
            _exit(f"MODEL {model}: {error}", 1)
        gap = relative_error(outputs(folded, example), outputs(network, example))
        if out is not None:
            save(folded, out)
        counts = left(folded)
        if json:
            setting = {"model": model, "converted": convert or preserve, "input_size": example.shape[1:]}
            file = {"saved": None if out is None else str(out)}
            _print_json({**setting, "left": counts, "relative_error": gap, **file, **environment()})
            return
        width = max(map(len, counts))
        print(f"{'left':{width}}  count")
        for name, count in counts.items():
            print(f"{name:{width}}  {count:5}")
        print(f"\nlargest difference from the model: {gap:.1e} of its largest output")
        print(out or "nothing was saved; --out FILE.pt saves the folded model")

    @app.command()
    def export(
        model: Source,
        out: Annotated[
            Path, typer.Argument(metavar="OUT", help="FILE.onnx (ONNX) or FILE.pt2 (torch.export).")
        ],
        input_size: InputSize = None,
        convert: First = False,
        preserve: Preserve = False,
        dynamic_batch: Annotated[
            bool, typer.Option(help="Any number of samples a call, or always one.")
        ] = True,
        overwrite: Overwrite = False,
        json: Json = False,
    ) -> None:
        """Fold a model, export it to ONNX or torch.export, and compare the file's outputs with the model's."""
        from normprop.recipes import InputError
        from normprop.recipes.export import ExportError, check_target, export as write
        from normprop.recipes.results import environment

        check_target(out, overwrite, "OUT")
        network, example = _model(model, input_size)
        if convert or preserve:
            network = _converted(model, network, example, preserve).model
        try:
            result = write(
                network, out, example if dynamic_batch else example[:1], dynamic_batch, overwrite
            )
        except normprop.TraceError as error:
            raise InputError(f"MODEL {model}: {error}") from error
        except (ExportError, normprop.FoldError) as error:
            _exit(f"MODEL {model}: {error}", 1)
        if json:
            setting = {"model": model, "converted": convert or preserve, "input_size": example.shape[1:]}
            _print_json({**setting, **result, "saved": str(out), **environment()})
            return
        for count, gap in result["errors"].items():
            print(f"batch size {count}: largest difference {gap:.1e} of the model's largest output")
        print(f"{out}, {result['bytes'] / 1e6:.1f} MB")


def _model(spec: str, size: str | None) -> tuple[Any, Any]:
    """A model and two Gaussian samples that it takes."""
    import torch

    from normprop.recipes import InputError, first_line
    from normprop.recipes.export import gaussian, load, outputs
    from normprop.recipes.zoo import input_size

    torch.manual_seed(0)  # of the weights
    network = load(spec)
    shape = input_size(network, size)
    example = gaussian(shape)
    try:
        outputs(network, example)
    except Exception as error:  # the model's code meets an input that it was not made for
        said = "x".join(map(str, shape))
        raise InputError(
            f"--input-size {said}: MODEL {spec} cannot run on such samples ({first_line(error)})"
            + ("; pass another --input-size" if size is None else "")
        ) from error
    return network, example


def _converted(
    spec: str, network: Any, example: Any, preserve: bool, rule: str = "recommended", strict: bool = False
) -> Any:
    from normprop.recipes import InputError, check_choice

    rules = {"paper": normprop.PAPER, "recommended": normprop.RECOMMENDED}
    check_choice("--rule", rule, rules)
    try:
        return normprop.convert(network, rules[rule], preserve, strict, example=example)
    except normprop.ConversionError as error:
        head, *reasons = str(error).splitlines()
        raise InputError(f"MODEL {spec}: {head} {'; '.join(map(str.strip, reasons))}") from error
    except ValueError as error:
        raise InputError(f"MODEL {spec}: {error}") from error


def _numbers(option: str, text: str) -> list[int]:
    from normprop.recipes import InputError, check_count

    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: expected whole numbers separated by commas") from error
    for number in numbers:
        check_count(option, number)
    return numbers


def _print_json(value: Any) -> None:
    from json import dumps

    print(dumps(value, indent=1))


if __name__ == "__main__":
    main()
