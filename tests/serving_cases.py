"""What the tests of served models share: a small training with most kinds of methods, and changes of its files."""

from __future__ import annotations

import json
import shutil
import types
import warnings
from dataclasses import replace

import torch
from finetuner_cases import CALIBRATION, TEST, TRAIN, finetuner, qwen, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.data import MultipleChoiceDataModule, Splits, get_prompt_format, train_word_tokenizer
from bmoe_lightning.methods import get_method, save_snapshot
from bmoe_lightning.models.loading import load_tokenizer
from bmoe_lightning.models.model_files import CONFIG_FILES, file_digests, tokenizer_files
from bmoe_lightning.serving import MANIFEST_FILE, CalibratedModel
from bmoe_lightning.utils.file_header import seal

CURVATURE = Curvature(rank=3)
NAMES = (
    "map", "temperature", "shrunk_temperature", "laplace_lpo", "laplace_temperature", "checkpoint_ensemble",
    "deep_ensemble", "laplace_mixture", "router_noise", "swag", "mc_dropout",
)  # fmt: skip
SAMPLES = {"num_samples": 8}


def small(name, **options):
    """A method with few samples."""
    method = get_method(name)
    return replace(method, **(SAMPLES if hasattr(method, "num_samples") else {}), **options)


def data_of(prompt="letters", **options):
    form = get_prompt_format(prompt)
    every = (*TRAIN, *CALIBRATION, *TEST)
    texts = [f"{form.render(q)} {' '.join(form.answers(q)) if form.cloze else 'A B C D E'}" for q in every]
    options = {"batch_size": 4, "eval_batch_size": 3, **options}
    tokenizer = train_word_tokenizer(texts, max_vocab=100)
    return MultipleChoiceDataModule(Splits(TRAIN, CALIBRATION, TEST), tokenizer, prompt=prompt, **options)


def fitted(folder, names=NAMES, prompt="letters", module=None, **options):
    """A training whose methods are fitted and tested."""
    folder.mkdir(parents=True, exist_ok=True)
    data, shared = data_of(prompt), {"curvature": CURVATURE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        members = {}
        if {"deep_ensemble", "laplace_mixture"} & set(names):
            other, fit = finetuner(qwen(), learning_rate=0.02), folder / "other"
            callback = BayesianMoECallback([small("laplace_lpo")], dirpath=str(fit), **shared)
            trainer(folder, callback, max_epochs=2).fit(other, datamodule=data_of(prompt))
            weights = str(folder / "other.safetensors")
            save_snapshot(weights, other.trained_parameters())
            members = {"deep_ensemble": {"runs": (weights,)}}
            members["laplace_mixture"] = {"runs": (weights,), "fits": (str(fit),), "curvature": CURVATURE}
        methods = [small(name, **members.get(name, {})) for name in names]
        callback = BayesianMoECallback(methods, dirpath=str(folder / "fit"), **shared)
        module = finetuner(qwen()) if module is None else module
        run = trainer(folder, callback, max_epochs=2, **options)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
    return types.SimpleNamespace(folder=folder, module=module, data=data, callback=callback, run=run, test=TEST)


def served_of(found, **options):
    return CalibratedModel.of_run(found.module, found.data, found.callback, **options)


def bits(served, method, questions=TEST, **options):
    """Everything that a model predicts of questions, as one tensor."""
    found = served.predict(questions, method, **options)
    scores = [found.entropy, found.mutual_information, found.logit_variance]
    return torch.cat([found.log_probs, *(score.unsqueeze(1) for score in scores if score is not None)], dim=1)


def edit_manifest(folder, change, *, sealed=True):
    """Change the description of a folder's manifest, by default under a digest that was computed again."""
    path = folder / MANIFEST_FILE
    fields = json.loads(path.read_text())
    change(fields["description"])
    path.write_text(seal(fields)[0] if sealed else json.dumps(fields))


def as_run(folder, name="../base"):
    """Make a saved folder that of a run: its model lies elsewhere, and the manifest has digests of what is no weight.

    Returns:
        The folder of the model.
    """
    base = (folder / name).resolve()
    base.mkdir(parents=True)
    for path in (path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST_FILE):
        shutil.move(path, base)
    name_model(folder, str(base), name)
    return base


def name_model(folder, source, name):
    """Have the manifest of a run name a model as it is now."""
    digests = {
        "model_sha256": file_digests(source, CONFIG_FILES),
        "tokenizer_sha256": file_digests(source, tokenizer_files(load_tokenizer(source))),
    }
    edit_manifest(folder, lambda content: content.update(sha256={}, model=name, tokenizer=name, **digests))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rows_of(questions=TEST, *, answers=True):
    """Questions as rows of a file."""
    rows = [{"id": q.id, "question": q.question, "choices": list(q.choices)} for q in questions]
    return [{**row, "answer": q.answer} if answers else row for row, q in zip(rows, questions, strict=True)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
