"""The `mollifier` command: one module for each of its commands, which import what is heavy when they run."""

import sys

import typer

from app.cli.audit import audit
from app.cli.config import config
from app.cli.dead_letters import dead_letters
from app.cli.demo import demo
from app.cli.dev import dev
from app.cli.doctor import doctor
from app.cli.drain import drain
from app.cli.gate import gate
from app.cli.migrate import migrate
from app.cli.orgs import orgs
from app.cli.runs import runs
from app.cli.status import status, top
from app.cli.switch import switch
from app.cli.trigger import trigger

app = typer.Typer(
    help="The front door of a task queue: it takes bursts of triggers and keeps the database calm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, dev, trigger, migrate, config, doctor, status, top, switch, audit):
    app.command()(command)
app.add_typer(runs, name="runs")
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(drain, name="drain")
app.add_typer(orgs, name="orgs")
app.add_typer(gate, name="gate")


def main() -> None:
    """Run the command line; whatever goes wrong is said in a sentence, with exit status 1."""
    try:
        app()
    except Exception as error:
        from app.cli.complaints import sentence

        complaint = sentence(error)
        if complaint is None:
            raise
        print(f"mollifier: {complaint}", file=sys.stderr)
        sys.exit(1)
