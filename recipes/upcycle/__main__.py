"""Make a mixture of experts from a dense language model, by sparse upcycling."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.common.cli import command, parse
from recipes.common.signals import run_until_stopped
from recipes.upcycle.settings import UpcycleSettings

PROGRAM = "python -m recipes.upcycle"
DESCRIPTION = """\
Make a mixture of experts from a dense Llama-like language model, by sparse upcycling: the MLPs of some layers are
copied, and a new router sends each token to a few of the copies. The result computes the function of the dense model
until it is trained further, and is a folder in the layout of Qwen2-MoE, for AutoModelForCausalLM and for --model of the
other recipes.

  python -m recipes.upcycle --model HuggingFaceTB/SmolLM2-135M-Instruct --output FOLDER
      8 copies of the MLP in the upper half of the layers, 2 of them for each token
  python -m recipes.upcycle --model FOLDER --gguf-file NAME.gguf --output FOLDER
      from a GGUF file, which needs the extra gguf
  python -m recipes.upcycle --model FOLDER_OR_ID --layers all --experts 8 --top-k 2 --segments 4 --output FOLDER
      fine-grained: 32 experts of a quarter of the width, 8 of them for each token
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Upcycle a model; returns the exit status.

    0, 1 (failed, with the reason on stderr), 2 (wrong usage), or 143 or 130 (stopped by SIGTERM or SIGINT).
    """
    settings = parse(UpcycleSettings, arguments, program=PROGRAM, description=DESCRIPTION)
    return run_until_stopped(lambda: _run(settings), "nothing has been saved")


def _run(settings: UpcycleSettings) -> int:
    # Imported late: torch and transformers take seconds, and --help should not.
    from bmoe_lightning.models.loading import MissingPackageError, ModelUnavailableError
    from recipes.upcycle.upcycling import upcycle

    try:
        upcycle(settings)
    except (ModelUnavailableError, MissingPackageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
