"""The words of a ``moe-posterior fit`` command that change settings, or ask about the arguments of a class."""

from typing import Any

import yaml

from moe_posterior.commands.fit import parser
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.training.runs import merge, read_experiment

__all__ = ["class_help", "parse_settings"]


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``--a.b 1 --c=x`` as a nested mapping, values read as YAML.

    Raises:
        InvalidArgumentError: a word that is neither an option nor its value.

    >>> parse_settings(["--trainer.max_epochs", "3", "--model.lr=1e-2"])
    {'trainer': {'max_epochs': 3}, 'model': {'lr': '1e-2'}}
    """
    nested: dict[str, Any] = {}
    words = iter(settings)
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        value = text if equals else next(words, None)
        if not word.startswith("--") or not key or value is None:
            raise InvalidArgumentError(f"settings must read --key value or --key=value; got {word!r}")
        try:
            leaf: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidArgumentError(f"{word} must have a YAML value; got {value!r}") from error
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        nested = merge(nested, leaf)
    return nested


def class_help(arguments: list[str]) -> list[str] | None:
    """The arguments of a call such as ``--data.help PACS`` or ``--model.method.help=Robust``; None if there is no such call.

    If no class is named, it is the one that the experiment file names there.

    >>> class_help(["--name", "x", "--data.help", "PACS"]), class_help(["--name", "x"])
    (['--data.help', 'PACS'], None)
    """
    for place, word in enumerate(arguments):
        option, equals, named = word.partition("=")
        if not option.startswith("--") or not option.endswith(".help"):
            continue
        following = arguments[place + 1 : place + 2]
        if not equals and following and not following[0].startswith("-"):
            named = following[0]
        return [option, *([named] if named else _configured(arguments, option.removeprefix("--").split(".")[:-1]))]
    return None


def _configured(arguments: list[str], keys: list[str]) -> list[str]:
    """The class that the given experiment file names under these keys, if any."""
    options, _ = parser().parse_known_args(
        [*arguments, *([] if "--config" in " ".join(arguments) else ["--config", ""])]
    )
    if not options.config:
        return []
    experiment = read_experiment(options.config)
    found: Any = experiment.config(experiment.chosen(options.arms)[0])
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return [found["class_path"]] if isinstance(found, dict) and "class_path" in found else []
