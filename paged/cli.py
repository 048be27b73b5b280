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
  paged simulate trace.csv --policy paged max pow2 oracle --rate 1 2 4
                                      where the memory goes on a real trace, and who waits how long
  paged check my_kernel:attend        whether a kernel is right, and which token it gets wrong
  paged oracle export golden          cases and right answers as files, for kernels that are not Python
  paged oracle judge golden --output out.safetensors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 right, 1 wrong (a check failed), 2 a usage error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        room = {"demo": _demo, "simulate": _simulate, "check": _check, "oracle": _oracle}[options.command]
        return room(options)
    except (ValueError, OSError) as error:
        print(f"paged: error: {error}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace) -> int:
    from paged.demo import DemoSettings, run_demo

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


def _simulate(options: argparse.Namespace) -> int:
    from paged.traces.command import SimulateSettings, run_simulate

    return run_simulate(
        SimulateSettings(
            trace=options.trace,
            format=options.format,
            tokenizer=options.tokenizer,
            multi_turn=options.multi_turn,
            skip_bad=options.skip_bad,
            first=options.requests,
            thin=options.thin,
            time_scale=options.time_scale,
            max_prompt=options.max_prompt,
            max_model_len=options.max_model_len,
            samples=options.samples,
            system_prompt=options.system_prompt,
            rates=tuple(options.rate),
            burstiness=options.burstiness,
            policies=tuple(options.policy),
            batching=options.batching,
            allocator=options.allocator,
            blocks=options.blocks,
            memory=options.memory,
            block_size=options.block_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            prefix_caching=options.prefix_caching,
            cost=options.cost,
            seed=options.seed,
            as_json=options.json,
            plot=options.plot,
        )
    )


def _check(options: argparse.Namespace) -> int:
    _needs_hypothesis("paged check")
    from paged.oracle.command import CheckSettings, run_check

    return run_check(
        CheckSettings(
            kernel=options.kernel,
            adapter=options.layout,
            dtypes=tuple(options.dtype),
            device=options.device,
            budget=options.budget,
            seed=options.seed,
            max_shapes=options.max_shapes,
            time_limit=options.time_limit,
            declarations=options.capabilities,
            as_json=options.json,
            junit=options.junitxml,
        )
    )


def _oracle(options: argparse.Namespace) -> int:
    _needs_hypothesis("paged oracle")
    from paged.oracle.golden.command import ExportSettings, run_export, run_judge

    if options.action == "judge":
        return run_judge(options.folder, options.output, options.json)
    return run_export(
        ExportSettings(
            folder=options.folder,
            dtypes=tuple(options.dtype),
            declarations=options.capabilities,
            num_cases=options.cases,
            seed=options.seed,
            as_json=options.json,
        )
    )


def _needs_hypothesis(command: str) -> None:
    try:
        import hypothesis  # noqa: F401 (drawn cases need it)
    except ImportError:
        raise ValueError(
            f"{command} needs hypothesis; install paged with the extra 'oracle': pip install 'paged[oracle]'"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paged",
        description="PagedAttention in plain PyTorch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"paged {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_simulate(commands)
    _add_check(commands)
    _add_oracle(commands)
    return parser


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    simulate = commands.add_parser(
        "simulate",
        help="a trace through the scheduler without a model: where the memory goes, and who waits how long",
        description="Runs the scheduler and the block bookkeeping over a workload, with made-up tokens and a cost for "
        "the time of a step, and beside it contiguous pools of the same size. No GPU, no model, no weights.",
    )
    simulate.add_argument(
        "trace", metavar="TRACE", help="a file, or sharegpt-like or alpaca-like: drawn with the published means"
    )
    for add in (_add_workload, _add_pool, _add_output):
        add(simulate)


def _add_workload(simulate: argparse.ArgumentParser) -> None:
    workload = simulate.add_argument_group("workload")
    workload.add_argument("--format", default="auto", help="auto, azure, lengths, mooncake or sharegpt (default: auto)")
    workload.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="for ShareGPT (default: the tiny model's)")
    workload.add_argument("--multi-turn", action="store_true", help="all turns of ShareGPT, each with those before it")
    workload.add_argument("--skip-bad", action="store_true", help="leave bad rows out, and say how many")
    workload.add_argument("--requests", type=int, metavar="N", help="the first N (default: all; drawn ones: 1000)")
    workload.add_argument("--thin", type=float, metavar="SHARE", help="keep each request with this probability")
    workload.add_argument("--time-scale", type=float, metavar="X", help="multiply all times of arrival")
    workload.add_argument(
        "--rate", type=float, nargs="+", default=[], metavar="R", help="draw arrivals: R a second, inf"
    )
    workload.add_argument(
        "--burstiness", type=float, default=1.0, help="variation of --rate's gaps (default: 1, Poisson)"
    )
    workload.add_argument("--max-prompt", type=int, metavar="N", help="cut prompts to N tokens")
    workload.add_argument(
        "--max-model-len", type=int, metavar="N", help="cut outputs to fit (default: the longest of a file, else 2048)"
    )
    workload.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each request (default: 1)")
    workload.add_argument("--system-prompt", type=int, metavar="N", help="N tokens that every prompt begins with")
    workload.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")


def _add_pool(simulate: argparse.ArgumentParser) -> None:
    pool = simulate.add_argument_group("pool and scheduler")
    pool.add_argument(
        "--policy", nargs="+", default=["paged"], metavar="P", help="of paged, max, pow2, oracle, grow (default: paged)"
    )
    pool.add_argument("--batching", choices=("iteration", "static"), default="iteration", help="of contiguous policies")
    pool.add_argument("--allocator", choices=("first-fit", "buddy"), default="first-fit", help="of the same")
    size = pool.add_mutually_exclusive_group()
    size.add_argument("--blocks", type=int, metavar="N", help="of the pool (default: 981, about 15.7k tokens)")
    size.add_argument("--memory", metavar="SIZE", help="of the pool, such as 24GiB, for the model of --cost")
    pool.add_argument("--block-size", type=int, default=16, help="tokens (default: %(default)s)")
    pool.add_argument("--max-num-seqs", type=int, default=256, help="most sequences in a step (default: %(default)s)")
    pool.add_argument("--max-num-batched-tokens", type=int, default=8192, help="most tokens (default: %(default)s)")
    pool.add_argument(
        "--prefix-caching", action=argparse.BooleanOptionalAction, help="(default: if prompts of the trace can share)"
    )
    pool.add_argument(
        "--cost", default="h200-llama-3-8b", help="of a step: a name, or a JSON file (default: %(default)s)"
    )


def _add_output(simulate: argparse.ArgumentParser) -> None:
    simulate.add_argument("--plot", type=Path, metavar="PATH", help="save a picture (.png, .svg or .pdf)")
    simulate.add_argument("--json", action="store_true", help="print the figures as JSON instead of text")


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    check = commands.add_parser(
        "check",
        help="whether a paged attention kernel is right, and which token it gets wrong",
        description="Calls a kernel on cases whose right answer is known, and says that it is right, or what is wrong. "
        "Exit code 0: right; 1: wrong; 2: it cannot be imported, or a declaration cannot be.",
    )
    check.add_argument("kernel", metavar="MODULE:FUNCTION", help="looked for in the current folder first")
    check.add_argument(
        "--layout",
        default="contract",
        metavar="NAME",
        help="an adapter, or MODULE:CLASS of your own (default: contract)",
    )
    check.add_argument(
        "--dtype", nargs="+", default=[], metavar="DTYPE", help="of queries and output (default: bfloat16)"
    )
    check.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    check.add_argument(
        "--capabilities", type=Path, metavar="FILE", help="JSON with capabilities, profile and conventions"
    )
    check.add_argument("--budget", choices=("fast", "standard", "long"), default="fast", help="default: %(default)s")
    check.add_argument("--seed", type=int, default=0, help="of values and draw (default: 0)")
    check.add_argument("--max-shapes", type=int, metavar="N", help="for kernels that are compiled for each shape")
    check.add_argument(
        "--time-limit", type=float, default=60.0, metavar="S", help="seconds for a call, ten times that for the first"
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.add_argument("--junitxml", type=Path, metavar="FILE", help="write the report as JUnit XML, too")


def _add_oracle(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    oracle = commands.add_parser(
        "oracle",
        help="golden files: cases, right answers and bounds for kernels that are not Python",
        description="Golden files are cases with their right answers and the room around them. A kernel in any "
        "language reads the cases and writes its outputs to one safetensors file, which is then judged.",
    )
    actions = oracle.add_subparsers(dest="action", metavar="ACTION", required=True)
    export = actions.add_parser("export", help="write a folder of golden files and their manifest.json")
    export.add_argument("folder", type=Path, metavar="DIR", help="new, or empty")
    export.add_argument(
        "--capabilities", type=Path, metavar="FILE", help="JSON with capabilities, profile and conventions"
    )
    export.add_argument(
        "--dtype", nargs="+", default=[], metavar="DTYPE", help="of queries and output (default: bfloat16)"
    )
    export.add_argument("--cases", type=int, metavar="N", help="how many (default: one round of directed ones)")
    export.add_argument("--seed", type=int, default=0, help="of the numbers (default: 0)")
    export.add_argument("--json", action="store_true", help="print what was written as JSON")
    judge = actions.add_parser(
        "judge",
        help="whether the outputs in a file are right, and which token is wrong",
        description="Exit code 0: right; 1: wrong; 2: a file is missing or is not what it should be.",
    )
    judge.add_argument("folder", type=Path, metavar="DIR", help="with golden files")
    judge.add_argument(
        "--output", type=Path, metavar="FILE", required=True, help="safetensors with NAME.out, and NAME.lse if declared"
    )
    judge.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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


if __name__ == "__main__":
    sys.exit(main())
