"""A served model predicts as the trainer did, whichever way it came here."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from finetuner_cases import CALIBRATION, TEST, TRAIN, finetuner, qwen, trainer
from serving_cases import CURVATURE, NAMES, bits, data_of, fitted, rows_of, served_of, small

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.data import Question
from bmoe_lightning.data.truncation import TruncationWarning
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import NotFittedError, method_names
from bmoe_lightning.serving import CalibratedModel, QuestionFormat

ROUNDING = {"rtol": 0.0, "atol": 1e-5}  # float32 weights that lie elsewhere in memory are multiplied in another order

SLOW_TO_IMPORT = """
import sys
import bmoe_lightning.serving
names = ("lightning", "pytorch_lightning", "datasets", "tensorboard", "matplotlib")
print([name for name in names if name in sys.modules])
from bmoe_lightning import CalibratedModel
served = CalibratedModel.from_pretrained(sys.argv[1])
for method in served.methods:
    served.predict([{"question": "is it red ?", "choices": ["yes", "no"]}], method.name)
print([name for name in names if name in sys.modules])
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_training_predicts_as_its_trainer_tested(trained_run, name):
    stored = trained_run.callback.predictions["test"][name]
    found = served_of(trained_run).predict(TEST, name, batch_size=3)
    torch.testing.assert_close(found.probabilities, stored.log_probs.exp(), rtol=0, atol=1e-12)
    for score in ("mutual_information", "logit_variance"):
        expected, served = stored.uncertainty.get(score), getattr(found, score)
        assert (served is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(served, expected, rtol=0, atol=1e-12)
    assert not found.log_probs.requires_grad
    assert not found.entropy.requires_grad


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["laplace_lpo", "temperature"])
def test_a_finished_training_predicts_as_its_trainer_predicts(tmp_path, method, precision):
    module, data = finetuner(qwen()), data_of()
    callback = BayesianMoECallback([small(method)], curvature=CURVATURE, dirpath=str(tmp_path), predict_method=method)
    run = trainer(tmp_path, callback, precision=precision)
    run.fit(module, datamodule=data)
    outputs = run.predict(module, datamodule=data)
    served = CalibratedModel.of_run(module, data, callback, precision=precision)
    found = served.predict(TEST, batch_size=data.eval_batch_size)
    expected = torch.cat([output["probs"] for output in outputs]).double()
    torch.testing.assert_close(found.probabilities, expected, rtol=0, atol=1e-6)


def test_cloze_prompts_are_served_from_a_saved_folder(tmp_path):
    run = fitted(tmp_path, ("map", "temperature", "laplace_lpo"), "cloze")
    served_of(run).save_pretrained(tmp_path / "saved")
    served = CalibratedModel.from_pretrained(tmp_path / "saved")
    assert served.questions == QuestionFormat.of_data(run.data)
    for name, stored in run.callback.predictions["test"].items():
        found = served.predict(TEST, name, batch_size=3).probabilities
        torch.testing.assert_close(found, stored.log_probs.exp(), **ROUNDING)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_precision_of_the_weights_is_that_of_the_training(tmp_path, precision):
    network = qwen(moe_intermediate_size=16, implementation="eager" if precision == "64-true" else "grouped_mm")
    run = fitted(tmp_path, ("map", "laplace_lpo", "swag"), module=finetuner(network), precision=precision)
    served_of(run, precision=precision).save_pretrained(tmp_path / "saved")
    served = CalibratedModel.from_pretrained(tmp_path / "saved")
    assert served.precision == precision
    assert {p.dtype for p in served.model.parameters()} == {p.dtype for p in run.module.model.parameters()}
    for name, stored in run.callback.predictions["test"].items():
        found = served.predict(TEST, name, batch_size=3).probabilities
        tolerance = 0.02 if precision == "bf16-true" else 1e-6
        torch.testing.assert_close(found, stored.log_probs.exp(), rtol=0, atol=tolerance)


def test_a_lightning_checkpoint_is_served_with_its_fit(trained_run, tmp_path):
    base, checkpoint = tmp_path / "base", tmp_path / "last.ckpt"
    qwen().save_pretrained(base)
    trained_run.data.tokenizer.save_pretrained(base)
    trained_run.run.save_checkpoint(checkpoint)
    form = QuestionFormat.of_data(trained_run.data)
    options = {"fit": trained_run.folder / "fit", "questions": form}
    names = ("map", "temperature", "laplace_lpo", "swag")
    methods = [small(name) for name in names[:1]] + [trained_run.callback.methods[NAMES.index(n)] for n in names[1:]]
    served = CalibratedModel.from_pretrained(base, weights=checkpoint, methods=methods, **options)
    for name in names:
        found = served.predict(TEST, name, batch_size=3).probabilities
        torch.testing.assert_close(found, trained_run.callback.predictions["test"][name].log_probs.exp(), **ROUNDING)
    assert {method.name for method in CalibratedModel.from_pretrained(base, weights=checkpoint, **options).methods} == {
        name for name in NAMES if trained_run.callback.fitted.methods.get(name)
    }
    with pytest.raises(WeightMismatchError, match="other weights"):
        CalibratedModel.from_pretrained(base, **options)  # the weights before training


def test_what_a_manifest_says_is_not_said_again(saved, trained_run):
    with pytest.raises(ValueError, match="leave them out"):
        CalibratedModel.from_pretrained(saved, fit=trained_run.folder / "fit")
    with pytest.raises(ValueError, match="give fit= with the folder of its fit, and questions="):
        CalibratedModel.from_pretrained(trained_run.folder)
    with pytest.raises(ValueError, match="and not in '8-true'"):
        CalibratedModel.from_pretrained(
            trained_run.folder,
            fit=trained_run.folder / "fit",
            questions=QuestionFormat.of_data(trained_run.data),
            precision="8-true",
        )


def test_no_lightning_is_imported(saved):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SLOW_TO_IMPORT, str(saved)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.splitlines() == ["[]", "[]"]


def test_predictions_do_not_depend_on_the_batches(saved):
    served = CalibratedModel.from_pretrained(saved)
    for name in NAMES:
        if name == "mc_dropout":  # each batch has the masks of the same seed, token by token of the batch
            continue
        expected = served.predict(TEST, name, batch_size=len(TEST))
        for size in (1, 2, 100):
            found = served.predict(TEST, name, batch_size=size)
            torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=0, atol=1e-6)
            torch.testing.assert_close(found.logit_variance, expected.logit_variance, rtol=1e-5, atol=1e-5)


def test_members_of_an_ensemble_are_set_up_once_for_several_batches(trained_run, monkeypatch):
    served, calls = served_of(trained_run), []
    kind = type(served.method("deep_ensemble"))
    members = kind.members

    def counted(self, *arguments):
        calls.append(self.name)
        return members(self, *arguments)

    monkeypatch.setattr(kind, "members", counted)
    questions = [*TEST, *TRAIN, *CALIBRATION]
    alone = served.predict(questions[:3], "deep_ensemble", batch_size=1)
    assert calls == ["deep_ensemble"]
    found = list(served.predict_batches(questions, "deep_ensemble", batch_size=1))
    assert len(calls) == 1 + -(-len(questions) // 16)
    assert [group for group, _ in found] == [[question] for question in questions]
    assert torch.equal(torch.cat([part.log_probs for _, part in found[:3]]), alone.log_probs)


def test_choices_that_a_question_lacks_have_no_probability(saved):
    found = CalibratedModel.from_pretrained(saved).predict(TEST)
    for row, question in zip(found.probabilities, TEST, strict=True):
        assert bool((row[len(question.choices) :] == 0).all())
        assert float(row.sum()) == pytest.approx(1)


def test_the_answer_of_a_question_does_not_matter(saved):
    served = CalibratedModel.from_pretrained(saved)
    assert torch.equal(bits(served, None), bits(served, None, rows_of(answers=False)))


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "there are no questions"),
        ([Question("five", "is it ?", tuple("abcde"), 0)], "'five' has 5 choices.*at most 4"),
        ([{"question": "is it ?"}], "question 0: choices missing"),
        ([{"question": "is it ?", "choices": ["yes"]}], "question 0: .*1 choices"),
        ([{"question": "is it ?", "choices": "yes"}], "question 0: choices must be a list, found the text 'yes'"),
        ([{"question": " ", "choices": ["yes", "no"]}], "question 0: .*empty"),
        ([{"question": "is it ?", "choices": ["yes", 3]}], "question 0: .*must be a text"),
        ([{"question": "is it ?", "choices": ["yes", "no"], "answer": 2}], "question 0: .*outside"),
        ([{"question": "is it ?", "choices": ["yes", "no"], "answer": "A"}], "question 0: .*integer"),
        ([{"question": "is it ?", "choices": ["yes", "no"], "id": ["a"]}], "question 0: id must be a text or a number"),
        ([{"question": "is it ?", "choices": ["yes", "no"], "id": True}], "question 0: id must be a text or a number"),
        (["is it ?"], "question 0: a str"),
        ({"question": "is it ?", "choices": ["yes", "no"]}, "question 0: a str"),
    ],
)
def test_malformed_questions_are_named(saved, questions, message):
    with pytest.raises(ValueError, match=message):
        CalibratedModel.from_pretrained(saved).predict(questions)


def test_batch_sizes_are_positive(saved):
    with pytest.raises(ValueError, match="batch_size is 0"):
        CalibratedModel.from_pretrained(saved).predict(TEST, batch_size=0)


def test_methods_are_found_by_name(saved, trained_run):
    served = CalibratedModel.from_pretrained(saved, methods=["map", "laplace_lpo"])
    assert served.method().name == "laplace_lpo"
    assert torch.equal(bits(served, None), bits(served, "laplace_lpo"))
    with pytest.raises(ValueError, match="this model has no method 'swag'; it has map, laplace_lpo"):
        served.predict(TEST, "swag")  # registered, and not fitted
    with pytest.raises(ValueError, match="no method 'nothing'; it has map, laplace_lpo"):
        served.method("nothing")
    with pytest.raises(ValueError, match="no method 'os:system'"):
        served.method("os:system")
    assert served.method("mc_dropout").name == "mc_dropout"
    plain = CalibratedModel.from_pretrained(saved, methods=["laplace_lpo"])
    assert torch.equal(bits(plain, "map"), bits(served, "map"))
    with pytest.raises(ValueError, match="map"):
        CalibratedModel.from_pretrained(saved, methods=["map", "map"])
    with pytest.raises(ValueError, match="nothing"):
        CalibratedModel.from_pretrained(saved, methods=["nothing"])
    unfitted = next(name for name in method_names() if name.startswith("leave_one_out"))
    with pytest.raises(NotFittedError, match="has not been fitted"):
        CalibratedModel.from_pretrained(saved, methods=[unfitted])


def test_a_method_with_other_options_of_the_fit_is_refused(saved):
    with pytest.raises(NotFittedError, match="scope='layer' \\(here 'global'\\)"):
        CalibratedModel.from_pretrained(saved, methods=[small("laplace_lpo", scope="global", curvature=CURVATURE)])


def test_weights_that_are_not_those_of_the_fit_are_refused(trained_run):
    weight = next(iter(trained_run.module.trained_parameters().values()))
    with torch.no_grad():
        before, _ = weight.clone(), weight.add_(1e-3)
    try:
        with pytest.raises(WeightMismatchError, match="other weights"):
            served_of(trained_run)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    served_of(trained_run)


def test_what_is_not_ready_is_not_served(trained_run):
    run = trained_run
    with pytest.raises(NotFittedError, match="the callback has no fit yet"):
        CalibratedModel.of_run(run.module, run.data, BayesianMoECallback(["map"]))
    with pytest.raises(ValueError, match="and not in 'bf16'"):
        CalibratedModel.of_run(run.module, run.data, run.callback, precision="bf16")
    run.module.train()
    CalibratedModel.of_run(run.module, run.data, run.callback).predict(TEST[:2], "map")
    assert run.module.training
    assert run.module.model.training
    fresh = data_of()
    fresh.tokenizer = "folder"
    with pytest.raises(RuntimeError, match="no tokenizer yet"):
        CalibratedModel.of_run(run.module, fresh, run.callback)


def test_threads_get_what_they_get_alone(saved):
    served = CalibratedModel.from_pretrained(saved)
    work = [(name, part) for name in ("laplace_lpo", "swag", "laplace_mixture", "map", "router_noise", "mc_dropout")
            for part in (TEST, TRAIN[:5], CALIBRATION)]  # fmt: skip
    alone = [bits(served, name, part, batch_size=2) for name, part in work]
    found = {}

    def predict(number):
        order = range(len(work)) if number else reversed(range(len(work)))
        for index in order:
            name, part = work[index]
            found[number, index] = bits(served, name, part, batch_size=2)

    threads = [threading.Thread(target=predict, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 * len(work)
    assert [key for key, value in found.items() if not torch.equal(value, alone[key[1]])] == []


def test_batches_of_ones_own_are_predicted(saved):
    served = CalibratedModel.from_pretrained(saved)
    batch = served.questions.batch(served.questions.encoded(served.tokenizer, TEST)[0], served.device)
    found, _ = served.predictor("laplace_lpo").predict(served.module, served.class_logits, batch)
    assert torch.equal(found, served.predict(TEST, "laplace_lpo").log_probs)


def test_questions_that_lose_words_are_counted_once(saved):
    served = CalibratedModel.from_pretrained(saved, methods=["map"])
    long = {"question": " ".join(["is"] * 3000), "choices": ["c0", "c1"]}
    message = r"2 of 4 questions were longer than the 256 tokens of prompts .* words were cut from their passage, or"
    with pytest.warns(TruncationWarning, match=message) as warned:
        served.predict([long, TEST[0], TEST[1], long], "map", batch_size=1)
    assert len(warned) == 1
    several = served.predict_batches([long, TEST[0]], "map", batch_size=1)
    next(several)
    with pytest.warns(TruncationWarning, match="1 of 1 questions were longer"):
        several.close()


@pytest.mark.filterwarnings("error")
def test_an_error_is_raised_rather_than_the_warning_of_lost_words(saved):
    served = CalibratedModel.from_pretrained(saved, methods=["map"])
    long = {"question": " ".join(["is"] * 3000), "choices": ["c0", "c1"]}
    with pytest.raises(ValueError, match="choices"):
        served.predict([long, {"question": "is", "choices": ["c0"]}], "map", batch_size=1)
    with pytest.raises(TruncationWarning):
        served.predict([long], "map")


def test_sets_of_too_few_labels_are_refused_before_the_questions_are_predicted(saved, monkeypatch):
    served = CalibratedModel.from_pretrained(saved, methods=["map"])
    enough = served.prediction_sets(CALIBRATION[:3], coverage=0.75)
    assert enough.num_labels == 3
    monkeypatch.setattr(CalibratedModel, "predict", None)
    with pytest.raises(ValueError, match=r"3 labels are too few for a coverage of 0.9: .* give at least 9"):
        served.prediction_sets(CALIBRATION[:3])
    with pytest.raises(ValueError, match="coverage must lie between 0 and 1"):
        served.prediction_sets(CALIBRATION, coverage=1.0)
