"""What the method costs on this machine: ratios within one run, growth with sizes, and peers on the same work."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

DESCRIPTION = """\
Measure what curvature, prediction and the fit of the prior cost, as ratios within one run, on a model with random
weights.

  python -m recipes.benchmark
      a small model; under 5 minutes on 2 cores
  python -m recipes.benchmark --device cuda --model-shape qwen1.5-moe --json benchmark.json
      the shape of Qwen1.5-MoE-A2.7B in bfloat16; about 60 GiB of GPU memory
  python -m recipes.benchmark --only prediction,growth --repeats 9
"""
SECTIONS = ("curvature", "prediction", "lpo", "growth", "peers")
SHAPES = ("default", "qwen1.5-moe", "tiny")


class _UsageError(ValueError):
    """A flag has an impossible value."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status: 0, 1 (it failed, with a sentence why) or 2 (wrong usage).

    A bar that is missed is shown in its table and is no failure: timings depend on what else the machine does.
    """
    flags = _parser().parse_args(arguments)
    try:
        _check(flags)
    except _UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Late: torch and transformers take seconds to import, and --help should not.
    from recipes.benchmark.report import BenchmarkSettings, benchmark_json, benchmark_text, run_benchmark
    from recipes.common.json_flag import written

    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {what}", file=sys.stderr, flush=True)

    settings = BenchmarkSettings(**{name: value for name, value in vars(flags).items() if name != "json"})
    try:
        benchmark = run_benchmark(settings, say)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(benchmark_text(benchmark))
    return 0 if flags.json is None or written(flags.json, benchmark_json(benchmark)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmark",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    parser.add_argument(
        "--model-shape", default="default", choices=SHAPES, help="sizes of model and batch (default: default)"
    )
    parser.add_argument(
        "--threads", type=int, default=None, metavar="INT", help="of the CPU (default: what torch chooses)"
    )
    parser.add_argument("--repeats", type=int, default=4, metavar="INT", help="turns behind each median (default: 4)")
    parser.add_argument(
        "--only",
        type=lambda text: tuple(text.split(",")),
        default=SECTIONS,
        metavar="A,B",
        help=f"sections to run (default: {','.join(SECTIONS)})",
    )
    parser.add_argument("--json", default=None, metavar="FILE", help="also write every single timing as JSON")
    return parser


def _check(flags: argparse.Namespace) -> None:
    """Refuse values that mean nothing."""
    for name in ("threads", "repeats"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise _UsageError(f"--{name} must be at least 1, got {value}")
    unknown = sorted(set(flags.only) - set(SECTIONS))
    if unknown:
        raise _UsageError(f"--only knows {', '.join(SECTIONS)}, got {', '.join(unknown)}")


if __name__ == "__main__":
    sys.exit(main())
