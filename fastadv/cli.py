"""Define the command `fastadv`. No torch before a command runs: `main` sets first how its threads wait."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperCommand

    UsageError: Any = typer.BadParameter.__base__  # of an option that cannot be read, an argument too many
except ImportError as error:  # what the extra brings
    sys.exit(f"error: the command fastadv needs more packages ({error.name}): pip install 'fastadv[train]'")

import fastadv
from fastadv.jobs import folders, names, threads, writable
from fastadv.jobs.errors import Interrupted, UserError, writing
from fastadv.jobs.shown import say, visible
from fastadv.pretrain.command import Pretrain, pretrain
from fastadv.train import shared

RUNS = Path("runs")
MORE: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
}  # shared.check_extra looks through them


class Which(str, Enum):
    """Name the models of a run."""

    plain = folders.PLAIN
    adversarial = folders.ADVERSARIAL


app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


class Train(TyperCommand):
    """List the options that come with the methods when help is asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        r"""Write the list; `\b` keeps click from filling a paragraph."""
        from fastadv.train import options

        self.epilog = "\n\n".join("\b\n" + part for part in options.listing().split("\n\n"))
        super().format_epilog(ctx, formatter)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastadv {fastadv.__version__}")
        raise typer.Exit


@app.callback()
def fastadv_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train text classifiers and language models adversarially, compare, and measure models under attack."""


@app.command(cls=Train, context_settings=MORE)
@shared.with_job
def train(
    context: typer.Context,
    make: shared.Make,
    method: Annotated[str, typer.Option(help="One of the methods below.")] = "fgm",
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/DATE-TIME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run: the latest, or --output-dir's.")
    ] = False,
) -> None:
    """Fine-tune a text classifier plainly and adversarially, and compare the two.

    Ends with a table, and writes result.json, report.html, log.jsonl and both models to the run's folder. A method's
    parameters and TrainingArguments are options too, by their own names. Ctrl-C saves a checkpoint; --resume goes on.
    """
    if not resume:
        shared.check_extra(context)
    from fastadv.jobs import run_folder
    from fastadv.train import run, tables, verdict
    from fastadv.train.announce import announce
    from fastadv.train.job import prepare

    with contextlib.ExitStack() as stack:
        if resume:
            names.only(context, "resume", "output_dir")
            chosen, settings, command = run.to_resume(RUNS, output_dir)
            folder = stack.enter_context(run_folder.held(chosen))
            job = prepare(settings)
        else:
            command = _command(context)
            if output_dir is not None:
                run_folder.check(output_dir)
            job = prepare(make(method=method, extra=tuple(context.args)))
            folder = stack.enter_context(run_folder.new(output_dir, RUNS, run.settings(job, command)))
        samples = f"{len(job.samples.train):,} training and {len(job.samples.test):,} test samples"
        say(f"{folder}: {samples}, {job.model_path}")
        if not resume:
            announce(job)
        goes_on = f"fastadv train --resume --output-dir {folder}"
        try:
            with writing(folder, goes_on):
                result = run.run(job, folder, command)
        except Interrupted as stopped:
            raise Interrupted(f"{stopped}; to continue: {goes_on}") from None
    tables.show(tables.comparison(result))
    say(*verdict.sentences(result), folder / run.REPORT, folder / folders.RESULT)


app.command(cls=Pretrain, context_settings=MORE)(pretrain)


@app.command(context_settings=MORE)
def evaluate(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one model that `fastadv train` saved.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Test on this file or data set, all of it. Default: the run's test samples.")
    ] = None,
    text_column: shared.TextColumn = "text",
    label_column: shared.LabelColumn = "label",
    label_separator: shared.LabelSeparator = None,
    skip_empty: shared.SkipEmpty = False,
    max_length: shared.AsTrained = None,
    radii: shared.Radii = "0.05,0.1,0.2,0.4",
    attack_steps: Annotated[int, typer.Option("--attack-steps", "--steps", help="Steps of this attack.")] = 20,
    attack_samples: Annotated[int | None, typer.Option(help="Attack only so many test samples. Default: all.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.svg. Default: RUN.")
    ] = None,
) -> None:
    """Measure trained models: clean accuracy, and accuracy under a PGD attack on their word embeddings.

    Of a run it measures the plain and the adversarial model, side by side.
    """
    if str(folder).startswith("--"):  # an option that nobody knows, taken for the argument
        context.args.insert(0, str(folder))
    shared.check_extra(context, training=False)
    folders.models_of(folder)
    from fastadv.train import checkpoint, tables
    from fastadv.train.data import DataSettings

    given = None
    if data is not None:
        given = DataSettings(
            data,
            text_column=text_column,
            label_column=label_column,
            label_separator=label_separator,
            skip_empty=skip_empty,
        )
    writable.check_files(output_dir or folder, checkpoint.FILES)
    result = checkpoint.evaluate(
        folder,
        given,
        shared.numbers("--radii", radii),
        steps=attack_steps,
        samples=attack_samples,
        max_length=max_length,
    )
    files = checkpoint.write(result, output_dir or folder)
    tables.show(tables.evaluation(result))
    say(*files)


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one model in it.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to answer.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A file of texts, as in `fastadv train`; - is standard input, a text a line.")
    ] = None,
    text_column: shared.TextColumn = "text",
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Leave out rows without a text.")] = False,
    model: Annotated[Which | None, typer.Option(help="Which model of the run. Default: adversarial.")] = None,
    max_length: shared.AsTrained = None,
    output: Annotated[Path | None, typer.Option(help="File to write to. Default: standard output.")] = None,
) -> None:
    """Answer texts with a trained model: a JSON object a line, with the text, its label and the scores."""
    chosen = folders.chosen(folder, None if model is None else model.value)
    from fastadv.train import predict as predicting

    if output is not None:
        writable.check_file(output, "--output")
    found = predicting.texts_of(texts or [], data, text_column, skip_empty)
    predicting.write(predicting.Predictor(chosen, max_length)(found), output)


@app.command(context_settings=MORE)
@shared.with_job
def sweep(
    context: typer.Context,
    make: shared.Make,
    tries: Annotated[
        list[str], typer.Option("--try", help='A method and its values: "fgm epsilon=0.1,0.2 scope=sample".')
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder of sweep.json; what it holds already is not run again.")],
    seeds: shared.Seeds = "0",
) -> None:
    """Train plainly and with every setting of --try, for every seed; TrainingArguments as in `fastadv train`."""
    shared.check_extra(context)
    from fastadv.train import sweep as sweeping
    from fastadv.train import tables

    whole = shared.seeds("--seeds", seeds)
    result = sweeping.run(make(extra=tuple(context.args)), tries, whole, output_dir, _command(context))
    tables.show(tables.sweep(sweeping.summary(result["runs"])))
    say(output_dir / sweeping.RESULT)


@app.command(context_settings=MORE)
@shared.with_job
def compare(
    context: typer.Context,
    make: shared.Make,
    output_dir: Annotated[Path, typer.Option(help="Folder of the comparison; what it holds already is not run again.")],
    methods: Annotated[str, typer.Option(help="Methods, with commas between, at this job's defaults.")] = "all",
    tries: Annotated[
        list[str] | None, typer.Option("--try", help='A setting besides: "smart epsilon=0.01 weight=5".')
    ] = None,
    seeds: shared.Seeds = "0,1,2",
) -> None:
    """Train plainly and with every method, for every seed, and compare accuracy, robustness, time and memory.

    Ends with a table; the folder gets compare.json, compare.md and compare.svg. Stop it with Ctrl-C whenever you like:
    the same command goes on. TrainingArguments as in `fastadv train`.
    """
    shared.check_extra(context)
    from fastadv.train import compare as comparing
    from fastadv.train import tables

    grid = comparing.grid_of(methods, tries or [])
    whole = shared.seeds("--seeds", seeds)
    result = comparing.run(make(extra=tuple(context.args)), grid, whole, output_dir, _command(context))
    rows = comparing.summary(result["runs"])
    tables.show(tables.methods(comparing.headings(rows), [comparing.cells(row) for row in rows]))
    say(*(output_dir / name for name in (comparing.RESULT, comparing.TABLE, comparing.PICTURE)))


@app.command()
def info() -> None:
    """List what is available here, and why the rest is not."""
    from fastadv import available
    from fastadv.jobs.surroundings import versions
    from fastadv.train.run import default_packages

    print(available.report())
    print()
    print(available.aligned([*versions().items(), *default_packages().items()]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. A mistake in its options or data is one line on standard error, and exit code 2."""
    threads.wait_passively()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(app(given, prog_name="fastadv", obj=given, standalone_mode=False) or 0)
    except UsageError as error:
        error.message = visible(error.message) if given else error.message  # without arguments it is the help
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that vanished: not a defect of the command
        where = "" if error.filename is None else f"{error.filename}: "
        print(visible(f"error: {where}{error.strerror or error}: check the path and the space there"), file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)


def _command(context: typer.Context) -> str:
    from fastadv.jobs.surroundings import command_line

    return command_line(context.obj)
