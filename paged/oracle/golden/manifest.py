"""manifest.json: what the files of a folder are, from which everything but a kernel's outputs follows.

What `judge` needs is the case of each file; scale, window, softcap, dtypes and shapes follow from that and are written
down for whoever reads the manifest with another program. docs/golden.md has a table of the fields.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paged import __version__
from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities, Conventions, Profile
from paged.oracle.declared import SECTIONS, declarations_of
from paged.oracle.inputs import REGIONS
from paged.oracle.recipes import score_scale

FORMAT, VERSION = "paged golden files", 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One golden file.

    Attributes:
        name: of the case; the file is name.safetensors, the kernel's results are name.out and name.lse.
        sha256: of the file, in hexadecimal.
        case: it was made of.
        poisoned: which regions hold poison; None: all that the case's poison is for.
        exercises: what the file can tell, by name.
        any_rows: rows of "out" and of "lse" in which anything is right.
        tensors: name to dtype and shape.
    """

    name: str
    sha256: str
    case: Case
    poisoned: tuple[str, ...] | None
    exercises: tuple[str, ...]
    any_rows: dict[str, list[int]]
    tensors: dict[str, dict[str, Any]]

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"{self.name}.safetensors"

    def as_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {
            "name": self.name,
            "file": self.file,
            "sha256": self.sha256,
            "case": json.loads(self.case.to_json()),
            "poisoned": self.poisoned,
            "description": self.case.describe(),
            "scale": score_scale(self.case),
            "window": self.case.window,
            "softcap": self.case.softcap,
            "exercises": self.exercises,
            "any_rows": self.any_rows,
            "tensors": self.tensors,
        }


@dataclass(frozen=True)
class Manifest:
    """A folder of golden files.

    Attributes:
        capabilities, profile, conventions: as declared.
        seed: of the numbers.
        entries: the files, simplest first.
        not_exercised: what was declared, or is checked in a kernel that can be called, and is not; with the reason.
    """

    capabilities: Capabilities
    profile: Profile
    conventions: Conventions
    seed: int
    entries: tuple[Entry, ...]
    not_exercised: tuple[str, ...]

    def to_json(self) -> str:
        """As it is written: two spaces a level, a line's end at the end."""
        declared = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        about = {"format": FORMAT, "version": VERSION, "paged": __version__, "seed": self.seed, "declared": declared}
        files = [entry.as_json() for entry in self.entries]
        return json.dumps({**about, "not_exercised": self.not_exercised, "files": files}, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        ValueError: it is no manifest, or of another version.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return _manifest(json.loads(path.read_text()), f"{path}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not complete: {type(error).__name__}: {error}") from None


def _manifest(given: Any, path: str) -> Manifest:
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of golden files: its format is not {FORMAT!r}")
    if given["version"] != VERSION:
        raise ValueError(f"{path} has version {given['version']!r}, and this program reads version {VERSION}")
    entries = tuple(_entry(file, path) for file in given["files"])
    names = [entry.name for entry in entries]
    if not entries or len(set(names)) < len(names):
        raise ValueError(f"{path} has to name one or more files, none of them twice; it names {len(names)}")
    return Manifest(
        **declarations_of(given["declared"], path),
        seed=int(given["seed"]),
        entries=entries,
        not_exercised=tuple(map(str, given["not_exercised"])),
    )


def _entry(given: dict[str, Any], path: str) -> Entry:
    name, poisoned = given["name"], given["poisoned"]
    # The name becomes a path, which has to stay within the folder.
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"{path}: a file's name is made of letters, digits and _, got {name!r}")
    if poisoned is not None and not set(poisoned) <= set(REGIONS):
        raise ValueError(f"{path}, {name}: poisoned may name {', '.join(REGIONS)}, got {poisoned!r}")
    try:
        case = Case.from_json(json.dumps(given["case"]))
    except ValueError as error:
        raise ValueError(f"{path}, {name}: {error}") from None
    return Entry(
        name=name,
        sha256=str(given["sha256"]),
        case=case,
        poisoned=None if poisoned is None else tuple(poisoned),
        exercises=tuple(map(str, given["exercises"])),
        any_rows=dict(given["any_rows"]),
        tensors=dict(given["tensors"]),
    )
