"""Costs of the method on this machine: ratios within one run, scaling with sizes, and comparison with peers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from recipes.benchmark.settings import BenchmarkSettings
from recipes.common.cli import command, parse

DESCRIPTION = """\
Measure what curvature, prediction and the fit of the prior cost, as ratios within one run, on a model with random
weights.

  python -m recipes.benchmark
      a small model; about 7 minutes on 2 cores
  python -m recipes.benchmark --device cuda --model-shape qwen1.5-moe --json benchmark.json
      the shape of Qwen1.5-MoE-A2.7B in bfloat16; about 60 GiB of GPU memory
  python -m recipes.benchmark --only prediction,growth --repeats 9
  python -m recipes.benchmark --only serving --write docs/serving.md
      predictions of every method at batches of 1 and 32, beside a plain forward pass; about 11 minutes
      (puts a short table between `<!-- serving -->` and `<!-- end of serving -->`)
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Print the tables; returns the exit status: 0, 1 (failed, with the reason on stderr) or 2 (wrong usage).

    A missed bound is shown in its table and does not change the status: timings depend on the machine's other load.
    """
    settings = parse(BenchmarkSettings, arguments, program="python -m recipes.benchmark", description=DESCRIPTION)
    if settings.write is not None and "serving" not in settings.only:
        print("error: --write writes the table of serving, which is not measured; add --only serving", file=sys.stderr)
        return 2
    # Imported late: torch and transformers take seconds, and --help should not.
    from recipes.benchmark.report import benchmark_json, benchmark_text, run_benchmark
    from recipes.benchmark.serving_table import serving_table
    from recipes.common.output_flags import json_written, place_filled

    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {what}", file=sys.stderr, flush=True)

    try:
        benchmark = run_benchmark(settings, say)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(benchmark_text(benchmark))
    written = json_written(settings.json, benchmark_json(benchmark))
    if settings.write is not None:
        section = next(section for section in benchmark.sections if section.name == "serving")
        written = place_filled(settings.write, "serving", serving_table(section, benchmark.machine)) and written
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
