"""The command `paged`. Imports wait until a command needs them, so that `paged --help` answers at once."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paged import __version__

EXAMPLES = """examples:
  paged demo                          32 requests through a contiguous cache and through a paged one
  paged demo --plot memory.png        and a picture of both pools
  paged demo --json > demo.json       the same figures for a program
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 right, 1 wrong (a check failed), 2 a usage error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    from paged.demo import DemoSettings, run_demo

    try:
        return run_demo(
            DemoSettings(
                model=options.model,
                prompts_file=options.prompts,
                rows=options.rows,
                max_model_len=options.max_model_len,
                device=options.device,
                seed=options.seed,
                threads=options.threads,
                plot=options.plot,
                as_json=options.json,
            )
        )
    except (ValueError, OSError) as error:
        print(f"paged: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paged",
        description="PagedAttention in plain PyTorch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"paged {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="the same requests through a contiguous KV cache and through a paged one, side by side",
        description="Runs the same requests, greedily, through reference.engine (a contiguous cache, static batching) "
        "and through paged, on equal KV memory; compares every token; prints a table of what the memory did. "
        "Exit code 1 if a token differs and it is no near tie.",
    )
    demo.add_argument("--model", default="tiny", help="'tiny', a folder, or a hub name (default: %(default)s)")
    demo.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line instead of the 32 built in")
    demo.add_argument("--rows", type=int, default=2, help="sequences that the contiguous cache holds (default: 2)")
    demo.add_argument("--max-model-len", type=int, metavar="N", help="slots of each row (default: the model's)")
    demo.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the output lengths wanted (default: 0)")
    demo.add_argument(
        "--threads", type=int, default=1, help="CPU threads; more help with larger models only (default: %(default)s)"
    )
    demo.add_argument("--plot", type=Path, metavar="PATH", help="save the picture of both pools (.png, .svg or .pdf)")
    demo.add_argument("--json", action="store_true", help="print the figures as JSON instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
