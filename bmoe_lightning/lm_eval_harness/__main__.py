"""`python -m bmoe_lightning.lm_eval_harness`: the harness's own command, which then knows the model `bmoe`.

Releases of the harness that find models by entry points need it not.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the harness's command with the arguments of the process; returns the exit status, 1 without the harness."""
    try:
        import bmoe_lightning.lm_eval_harness.calibrated_lm  # noqa: F401  # registers the model
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
