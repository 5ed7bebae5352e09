"""The program ``trace``: parse, call one library function, print. Results on stdout, everything else on stderr."""

from __future__ import annotations

import os
import sys

import click

from trace_cli._lazy import LazyGroup
from trace_cli._replay import replay

# Command → (module, or module:object where the object is not called command; one line of help). A module is imported
# only when its command runs, so that help is instant.
_COMMANDS = {
    "build": ("trace_cli.commands.build", "Collect the gradient of every training row into an index."),
    "demo": ("trace_cli.commands.demo", "See it work: invented facts, a small model, and the texts that taught it."),
    "evaluate": ("trace_cli.commands.evaluate", "How good scores are: LDS, recall, mislabels, stability."),
    "hessian": ("trace_cli.commands.hessian", "Fit the Fisher information of every module: K-FAC, EK-FAC and kin."),
    "method": ("trace_cli.commands.method", "Score training rows for queries by any method; method list lists them."),
    "preconditioners": ("trace_cli.commands.preconditioners", "Fit the second moment of sketched gradients."),
    "probe": ("probing.cli:probe", "Find the subnetwork that computes a variable."),
    "query": ("trace_cli.commands.query", "Ask an index which rows made the model say a text."),
    "reduce": ("trace_cli.commands.reduce", "Sum a dataset's gradients into a query, or one a group."),
    "sae": ("sparsify.cli:sae", "Train, evaluate, convert and push sparse autoencoders and transcoders."),
    "score": ("trace_cli.commands.score", "Score a dataset against query gradients in one pass."),
    "store": ("trace_cli.commands.store", "Look at an index on disk, and check it."),
    "trackstar": ("trace_cli.commands.trackstar", "Score training rows for queries as TrackStar does."),
}
# Those that several processes can share; the others would get into each other's way.
_SHARED = {"build", "hessian", "preconditioners", "reduce", "sae", "score", "trackstar"}
# Errors meant for people, by the package that raises them. Looked up in what is loaded already: importing the
# packages here would cost seconds.
_EXPECTED = (
    ("attribute", "AttributionError"),
    ("gradcore", "GradCoreError"),
    ("gradstore", "GradStoreError"),
    ("probing", "ProbingError"),
    ("sparsify", "SparsifyError"),
)

SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


@click.group(cls=LazyGroup, commands_at=_COMMANDS, context_settings=SETTINGS, invoke_without_command=True)
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="Run again what a config.yaml says.")
@click.version_option(package_name="trace-cli", prog_name="trace")
@click.pass_context
def cli(context: click.Context, config: str | None) -> None:
    """Find what in the training data made a language model behave as it does.

    New here? `trace demo` shows the whole of it in about a minute.
    """
    if config is not None:
        if context.invoked_subcommand is not None:
            raise click.UsageError("--config names the command itself: leave the command away")
        replay(context, config)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and context.invoked_subcommand not in {None, *_SHARED}:
        raise click.UsageError(f"trace {context.invoked_subcommand} runs in one process: start it without torchrun")
    elif context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit: 0 done, 1 an error with its explanation, 2 wrong usage, 130 interrupted."""
    # OpenMP barriers spin for milliseconds by default, which costs small models a factor of seven to ten on a machine
    # that does anything else at the same time; a short spin costs them a tenth on a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        # Outside its standalone mode click returns the code of an Exit instead of raising it.
        given = sys.argv[1:] if arguments is None else arguments
        code = cli.main(args=list(given), prog_name="trace", standalone_mode=False, obj=list(given))
        _leave(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\ninterrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if os.environ.get("TRACE_DEBUG"):
            raise
        code = getattr(error, "exit_code", 1)
        if code == 1 or "TRACE_RENDEZVOUS" not in os.environ:  # whoever started the processes says what happened
            click.echo(f"error: {_explanation(error)}", err=True)
        _leave(code)


def _leave(code: int) -> None:
    """Exit; threads that gloo leaves behind abort the interpreter's own teardown now and then."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def _explanation(error: Exception) -> str:
    for package, name in _EXPECTED:
        if package in sys.modules and isinstance(error, getattr(sys.modules[package], name)):
            return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return f"{type(error).__name__}: {error} (this was not foreseen; TRACE_DEBUG=1 shows where it comes from)"
