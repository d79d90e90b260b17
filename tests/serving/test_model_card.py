"""The model card of a served model."""

from __future__ import annotations

import re
from dataclasses import replace

import yaml
from finetuner_cases import TEST

from bmoe_lightning.serving import CalibratedModel
from bmoe_lightning.serving.model_card import model_card


def test_a_card_says_what_was_fitted_and_its_code_runs(saved):
    served = CalibratedModel.from_pretrained(saved)
    results = ({"method": "A|B", "acc": 0.5}, {"method": "C", "acc": 0.25})
    text = model_card(replace(served, results=results))
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert all(f"`{method.name}`" in text for method in served.methods)
    assert all(sentence in text for sentence in served.data)
    assert served.fitted.fit_id in text
    assert "| A\\|B | 0.500 |" in text
    assert re.search(r"fitted on 5 held-out labels", text)  # what makes fits doubtful
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace("THIS FOLDER", str(saved)).replace('["...", "..."]', '["yes", "no"]')
    names = {}
    exec(code, names)
    assert len(names["predictions"].probabilities) == 1


def test_the_card_is_in_the_folder(saved):
    text = (saved / "README.md").read_text()
    assert text.startswith("---\n")
    assert f"{len(TEST)} further ones" in text
    assert "None are recorded." in text
