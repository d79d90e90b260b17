"""Options of the command; torch is not imported here, so that `--help` is fast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

_STOPPED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for what cannot be done, 2 for wrong options, 130 if stopped.

    Args:
        arguments: The arguments; by default those of the process.
    """
    given = _parser().parse_args(arguments)
    try:
        if given.command == "predict":
            from bmoe_lightning.command.predict import predict_file

            return _reported(lambda: predict_file(given))
        from bmoe_lightning.command.export_temperature import export_temperature

        return _reported(lambda: export_temperature(given))
    except KeyboardInterrupt:
        remedy = "; run the same command again, without --overwrite, to resume" if given.command == "predict" else ""
        print(f"stopped{remedy}", file=sys.stderr)
        return _STOPPED


def _reported(action: Callable[[], object]) -> int:
    from bmoe_lightning.data.files import DataUnavailableError
    from bmoe_lightning.laplace.posterior import WeightMismatchError
    from bmoe_lightning.methods.fit_result import NotFittedError
    from bmoe_lightning.models.loading import ModelUnavailableError

    try:
        action()
    except (
        DataUnavailableError,
        ImportError,
        ModelUnavailableError,
        NotFittedError,
        OSError,
        ValueError,
        WeightMismatchError,
    ) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bmoe-lightning",
        description="Use a fine-tuned model with its fitted methods.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict = commands.add_parser(
        "predict",
        help="probabilities and scores of uncertainty for a file of questions",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Predict the questions of a file, a row each.\n\n"
        "A row has `question` and `choices` (a list of texts), and maybe `passage`, `id` and `answer` (the position\n"
        "of the right choice, from 0). A row of the output has `id`, `prediction` (a letter), `probabilities`,\n"
        "`entropy` and, where the method has them, `mutual_information` and `logit_variance`; and `answer`, the\n"
        "letter of the right choice, where it is known. A command that was stopped resumes.",
    )
    _add_run(predict)
    predict.add_argument("--data", required=True, metavar="FILE", help="questions, JSON Lines or parquet")
    predict.add_argument("--output", required=True, metavar="FILE", help="predictions, .jsonl or .parquet")
    predict.add_argument(
        "--method", metavar="NAME", help="name of the method; default: the first fitted one of the model"
    )
    predict.add_argument("--task", metavar="NAME", help="data set whose columns the rows have, such as arc or boolq")
    predict.add_argument(
        "--sets-from",
        metavar="FILE",
        help="questions with answers, like those of --data and in no fit: adds `set`, letters that contain the right "
        "choice at the rate of --coverage (split conformal prediction)",
    )
    predict.add_argument(
        "--coverage", type=float, metavar="RATE", help="rate of the sets, between 0 and 1; default: 0.9"
    )
    predict.add_argument("--set-score", choices=("lac", "aps"), help="score of the sets; default: lac")
    predict.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions of a batch; default: 8")
    predict.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ...; default: a GPU if there is one"
    )
    predict.add_argument("--overwrite", action="store_true", help="replace the output, and do not resume")
    predict.add_argument(
        "--quiet", action="store_true", help="no progress; results and warnings are printed all the same"
    )
    export = commands.add_parser(
        "export-temperature",
        help="write a fitted temperature into generation_config.json, which every server reads",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write the temperature of a method into the generation_config.json of a model folder.\n\n"
        "It was fitted on the tokens of answers. Check it on held-out text before you use it for anything else.",
    )
    _add_run(export)
    export.add_argument("--method", required=True, metavar="NAME", help="a method that predicts with one temperature")
    export.add_argument(
        "--model", metavar="FOLDER", help="folder of the model in the format of transformers; default: that of the run"
    )
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        required=True,
        metavar="FOLDER",
        help="folder of CalibratedModel.save_pretrained, or of a run of recipes.qwen_obqa",
    )
