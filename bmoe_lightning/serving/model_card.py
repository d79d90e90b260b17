"""The model card of a served model: what it was fitted on, its table, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmoe_lightning.serving.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from bmoe_lightning.serving.calibrated_model import CalibratedModel

_NUMBERS = (float, int)


def model_card(served: CalibratedModel) -> str:
    """The model card in Markdown, with the metadata of the hub.

    Args:
        served: The model.
    """
    base, fitted = served.model.name_or_path or "", served.fitted
    if Path(base).exists():  # a path on this machine says nothing elsewhere
        base = Path(base).name
    blocks = [
        "---\n"
        "library_name: transformers\n"
        "pipeline_tag: text-generation\n"
        "tags: [mixture-of-experts, calibration, laplace-approximation, bmoe_lightning]\n"
        "---",
        f"# {type(served.model).__name__}, calibrated",
        f"Fine-tuned from {json.dumps(base) if base else 'a model in memory'}, with {len(served.methods)} methods of "
        "`bmoe_lightning` that predict probabilities of the choices of a question. The files of the model load in "
        "transformers as usual; its probabilities are then those before calibration.",
        "## Use",
        "```python\n"
        "from bmoe_lightning import CalibratedModel\n\n"
        'served = CalibratedModel.from_pretrained("THIS FOLDER")\n'
        'question = {"question": "...", "choices": ["...", "..."]}\n'
        f'predictions = served.predict([question], method="{served.method().name}")\n'
        "predictions.probabilities, predictions.entropy, predictions.mutual_information\n"
        "```",
        "## Data",
        " ".join(served.data) or "What it was trained, fitted and tested on is not recorded.",
        f"Questions are asked with the prompt format `{served.questions.prompt}`, up to {served.questions.num_choices} "
        f"choices, in the precision `{served.precision}`.",
        "## Methods",
        _table(
            [
                {"method": method.label, "name": f"`{method.name}`", "cost of a prediction": method.cost}
                for method in served.methods
            ]
        ),
    ]
    doubts = dict.fromkeys(sentence for method in served.methods for sentence in fitted.warnings_of(method))
    if doubts:
        blocks += ["What makes fits doubtful:", "\n".join(f"- {sentence}" for sentence in doubts)]
    blocks.append("## Results on the test questions")
    blocks.append(_table(served.results) if served.results else "None are recorded.")
    blocks += [
        "## Limits",
        "Probabilities are calibrated on questions like those above. Under another distribution they may not be; the "
        "scores of uncertainty do not detect that by themselves. Calibrate again, or check on labelled questions.",
        "## Identity",
        f"Fit `{fitted.fit_id}`, seed {fitted.seed}. `{MANIFEST_FILE}` has the digests of all other files.",
    ]
    return "\n\n".join(blocks) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [all(isinstance(row.get(name), _NUMBERS) for row in rows) for name in columns]
    lines = [columns, ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
