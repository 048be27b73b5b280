"""`paged oracle export DIR` and `paged oracle judge DIR --output FILE`: golden files on the command line."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from paged.oracle.declared import read_declarations
from paged.oracle.golden.export import export
from paged.oracle.golden.judge import judge_files


@dataclass(frozen=True)
class ExportSettings:
    """What the command line says.

    Attributes:
        folder: to write.
        dtypes: of queries and output, instead of the file's.
        declarations: a file as in `paged.oracle.declared`.
        num_cases, seed: as for `export`.
        as_json: print what was written as JSON.
    """

    folder: Path
    dtypes: tuple[str, ...] = ()
    declarations: Path | None = None
    num_cases: int | None = None
    seed: int = 0
    as_json: bool = False


def run_export(settings: ExportSettings) -> int:
    """Write the folder and print what is in it.

    Returns:
        0.

    Raises:
        ValueError: a declaration that cannot be, or a folder with something in it.
        OSError: a file cannot be read or written.
    """
    declared = read_declarations(settings.declarations)
    if settings.dtypes:
        declared["capabilities"] = replace(declared["capabilities"], dtypes=settings.dtypes)
    manifest = export(settings.folder, num_cases=settings.num_cases, seed=settings.seed, **declared)
    num_bytes = sum(path.stat().st_size for path in settings.folder.iterdir())
    if settings.as_json:
        about = {"folder": f"{settings.folder}", "files": len(manifest.entries), "bytes": num_bytes}
        print(json.dumps(about | {"not_exercised": manifest.not_exercised}, indent=1))
        return 0
    print(f"{settings.folder}: {len(manifest.entries)} golden files and manifest.json, {num_bytes / 1e6:.1f} MB")
    for words in manifest.not_exercised:
        print(f"  not exercised   {words}")
    print(f"then            paged oracle judge {settings.folder} --output FILE")
    return 0


def run_judge(folder: Path, output: Path, as_json: bool) -> int:
    """Judge a file of outputs and print what came of it.

    Returns:
        0 if they are right, 1 if they are not.

    Raises:
        ValueError: a file that is not what it should be.
        OSError: a file cannot be read.
    """
    report = judge_files(folder, output)
    print(report.to_json() if as_json else report)
    return 0 if report.ok else 1
