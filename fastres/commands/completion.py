"""``fastres completion``: let a shell complete commands, options, names of models and files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fastres.errors import MissingDependencyError

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """to complete in every new shell:
  bash: echo 'eval "$(fastres completion bash)"' >> ~/.bashrc
  zsh:  echo 'eval "$(fastres completion zsh)"' >> ~/.zshrc
  fish: fastres completion fish > ~/.config/fish/completions/fastres.fish
"""
# The options and arguments that take the name of a model.
_OF_MODELS = ("model", "models", "patterns", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fastres completion`` to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("shell", choices=SHELLS, help="the shell that runs the code")


def run(options: argparse.Namespace) -> int:
    """Print the code for the shell."""
    print(_argcomplete().shellcode(["fastres"], shell=options.shell))
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asked for completions of ``parser``'s arguments, and end the process."""
    for command in commands_of(parser).values():
        for action in command._actions:
            if action.dest in _OF_MODELS:
                action.completer = _models  # type: ignore[attr-defined]
    _argcomplete().autocomplete(parser)


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return the parsers of the commands of ``parser`` by name."""
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _models(**kwargs: Any) -> list[str]:
    from fastres.network.catalogue import list_models

    return list_models()


def _argcomplete() -> Any:
    try:
        import argcomplete
    except ImportError as error:
        raise MissingDependencyError(
            "Completion needs argcomplete, which is not installed: pip install argcomplete"
        ) from error
    return argcomplete
