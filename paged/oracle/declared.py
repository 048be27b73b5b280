"""Declarations in a file, for the command line:

{"capabilities": {"dtypes": ["float16"], "window": true, "lse": "e"},
 "profile": {"p_dtype": "float32"},
 "conventions": {"empty_lse": "any"}}
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from paged.oracle.declarations import Capabilities, Conventions, Profile

SECTIONS = {"capabilities": Capabilities, "profile": Profile, "conventions": Conventions}


def read_declarations(file: Path | None) -> dict[str, Any]:
    """The three declarations from a file; the defaults without one.

    Raises:
        ValueError: no JSON, or something in it that nobody knows.
        OSError: the file cannot be read.

    Example:
        >>> read_declarations(None)["capabilities"].dtypes
        ('bfloat16',)
    """
    if file is None:
        return declarations_of({}, "")
    try:
        return declarations_of(json.loads(file.read_text()), f"{file}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: {error}") from None


def declarations_of(given: Any, where: str) -> dict[str, Any]:
    """The three declarations from what a file held; the defaults of those that are not there.

    Args:
        given: an object of objects, as JSON has it.
        where: it was read, for errors.

    Returns:
        A `Capabilities`, a `Profile` and a `Conventions`, by the names of `SECTIONS`.

    Raises:
        ValueError: something that nobody knows, or that cannot be.

    Example:
        >>> declarations_of({"profile": {"exp_rel": "small"}}, "declared.json")
        Traceback (most recent call last):
        ...
        ValueError: declared.json, profile: '<=' not supported between instances of 'int' and 'str'
    """
    if not isinstance(given, dict) or not all(isinstance(section, dict) for section in given.values()):
        raise ValueError(f"{where} has to hold an object of the objects {', '.join(SECTIONS)}")
    _known(given, list(SECTIONS), where)
    declared = {}
    for name, kind in SECTIONS.items():
        section = given.get(name, {})
        _known(section, [field.name for field in fields(kind)], f"{where}, {name}")
        try:
            declared[name] = kind(**section)
        except TypeError as error:
            raise ValueError(f"{where}, {name}: {error}") from None
    return declared


def _known(given: dict[str, Any], names: list[str], where: str) -> None:
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; there are {', '.join(names)}")
