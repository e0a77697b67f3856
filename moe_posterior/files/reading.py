"""Reading files that may be torn, foreign or hostile: whatever is wrong with one becomes one sentence that names it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe_posterior.errors import DamagedFileError, MissingDataError, MissingDependencyError, MoEPosteriorError
from moe_posterior.files.torchfile import read_plain_file


@contextmanager
def decoding(
    path: str | os.PathLike[str], what: str, advice: str = "", error: type[MoEPosteriorError] = DamagedFileError
) -> Iterator[None]:
    """Turn whatever a decoder raises at a file's content into one error of one line.

    Args:
        path: the file, for the message.
        what: the file should be, for instance "valid JSON".
        advice: what to do then.
        error: its type; our own errors pass as they are, on one line.

    >>> with decoding("a.json", "valid JSON", "make it again"):
    ...     json.loads("{")
    Traceback (most recent call last):
    moe_posterior.errors.DamagedFileError: a.json is not valid JSON (JSONDecodeError: Expecting property name enclosed in double \
quotes: line 1 column 2 (char 1)); make it again
    """
    try:
        yield
    except MoEPosteriorError as cause:
        if "\n" in str(cause):
            raise error(one_line(cause)) from cause
        raise
    except Exception as cause:  # a decoder given torn or foreign bytes fails in any way there is
        text = f"{path} is not {what} ({type(cause).__name__}: {one_line(cause)})"
        raise error(f"{text}; {advice}" if advice else text) from cause


def one_line(error: object, most: int = 300) -> str:
    """A message without its line breaks, and not endless.

    >>> one_line("a\\n  b")
    'a b'
    """
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[:most]} …"


def read_text(path: str | os.PathLike[str], advice: str = "", error: type[MoEPosteriorError] = DamagedFileError) -> str:
    """The text of a plain file in UTF-8.

    Raises:
        MissingDataError: there is none; the advice says what to do. DamagedFileError: it is no plain file. ``error``: it is no text.
    """
    try:
        data = read_plain_file(path)
    except MissingDataError as cause:
        raise MissingDataError(f"{cause}; {advice}" if advice else str(cause)) from cause
    with decoding(path, "text in UTF-8", advice, error):
        return data.decode()


def read_json(path: str | os.PathLike[str], advice: str = "", error: type[MoEPosteriorError] = DamagedFileError) -> Any:
    """The content of a JSON file.

    Raises:
        MissingDataError: there is none. DamagedFileError: it is no plain file. ``error``: it is no JSON.
    """
    text = read_text(path, advice, error)
    with decoding(path, "valid JSON", advice, error):
        return json.loads(text)


def read_mapping(
    path: str | os.PathLike[str], advice: str = "", error: type[MoEPosteriorError] = DamagedFileError
) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        MissingDataError: there is none. DamagedFileError: it is no plain file. ``error``: it is no YAML,
            or holds something else than a mapping.
        MissingDependencyError: without PyYAML.
    """
    try:
        import yaml
    except ImportError as cause:
        raise MissingDependencyError("yaml", "train") from cause
    text = read_text(path, advice, error)
    with decoding(path, "valid YAML", advice, error):
        content = yaml.safe_load(text)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        got = "keys that are no text" if isinstance(content, dict) else type(content).__name__
        raise error(f"{path} must hold a mapping of settings; got {got}" + (f"; {advice}" if advice else ""))
    return content
