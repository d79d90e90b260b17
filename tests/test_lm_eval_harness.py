"""The model of lm-evaluation-harness, with the harness itself on local tasks; what the package says without it."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from methods_cases import RANK3
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import toy_model
from transformers import PreTrainedTokenizerFast

from bmoe_lightning.data.questions import LETTERS, Question
from bmoe_lightning.lm_eval_harness.__main__ import main
from bmoe_lightning.methods.base import PRIOR_PRECISION
from bmoe_lightning.methods.fitting import fit_methods
from bmoe_lightning.methods.laplace_lpo import LaplaceLPO
from bmoe_lightning.methods.map import MAP
from bmoe_lightning.methods.temperature import TemperatureScaling
from bmoe_lightning.serving import CalibratedModel, QuestionFormat
from bmoe_lightning.serving.question_format import ServedModule
from bmoe_lightning.utils.late_import import how_to_install

ROOT = Path(__file__).parents[1]
WORDS = [f"w{i}" for i in range(12)]
VOCABULARY = ["[UNK]", "<s>", "</s>", *"ABCD", "Answer:", *WORDS]
SIZE = 14
RUNNER = "runpy.run_module('bmoe_lightning.lm_eval_harness', run_name='__main__')"


def test_without_the_harness_the_runner_names_the_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "bmoe_lightning.lm_eval_harness.calibrated_lm", raising=False)
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main() == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the model bmoe needs lm-evaluation-harness, which cannot be imported (")
    assert line.endswith(f"); {how_to_install('lm-eval')}")


def test_extra_and_entry_point_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["bmoe"].partition(":")
    assert any(entry.startswith("lm-eval") for entry in project["optional-dependencies"]["lm-eval"])
    assert f"class {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


@pytest.fixture(scope="module")
def harness():
    """The harness and the class, where the harness is installed."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: extra lm-eval")
    pytest.importorskip("accelerate", reason="accelerate is not installed: extra lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    module = import_module("bmoe_lightning.lm_eval_harness.calibrated_lm")
    return SimpleNamespace(simple_evaluate=simple_evaluate, HFLM=HFLM, TaskManager=TaskManager, module=module)


def tokenizer():
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")


def drawn_words(generator):
    length = int(torch.randint(1, 7, (), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))


@pytest.fixture(scope="module")
def served():
    """A tiny model with a few fitted methods, one of them with next to no variance."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    words, module = tokenizer(), ServedModule(toy_model().eval().requires_grad_(False))
    form = QuestionFormat("letters", 4, tuple(VOCABULARY.index(letter) for letter in "ABCD"), 32)
    questions = [
        Question(
            str(i), drawn_words(generator), ("w1", "w2", "w3", "w4"), int(torch.randint(4, (), generator=generator))
        )
        for i in range(32)
    ]
    items, _ = form.encoded(words, questions)
    batches = [
        {**form.batch(items[i : i + 8]), "label": torch.tensor([item.label for item in items[i : i + 8]])}
        for i in range(0, len(items), 8)
    ]

    def class_logits(model, batch):
        return form.class_logits(model.model, batch), batch["label"]

    methods = (MAP(), TemperatureScaling(), LaplaceLPO(curvature=RANK3), LaplaceLPO("certain", curvature=RANK3))
    fitted = fit_methods(methods, module, class_logits, batches, batches)
    with_states = {**fitted.methods}
    for name, precision in (("laplace_lpo", 0.05), ("certain", 1e30)):
        state = {PRIOR_PRECISION: torch.full_like(with_states[name].state[PRIOR_PRECISION], precision)}
        with_states[name] = replace(with_states[name], state=state)
    with_states["temperature"] = replace(
        with_states["temperature"], state={"temperature": torch.tensor(2.5, dtype=torch.float64)}
    )
    return CalibratedModel(module, words, form, replace(fitted, methods=with_states), methods)


@pytest.fixture(scope="module")
def folder(served, tmp_path_factory):
    place = tmp_path_factory.mktemp("served") / "model"
    served.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder with the tasks, of which `ragged` has two to four choices, and the others four or none."""
    place = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(SIZE):
        texts = [f"{drawn_words(generator)} w{number}" for number in range(4)]
        row = {"question": f"{drawn_words(generator)} w{i % 12}", "texts": texts, "label": i % 4, "first": i % 2}
        rows.append({**row, "letters": list(LETTERS[:4]), "some": list(LETTERS[: 2 + i % 3])})
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}, "cache_dir": str(place / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}} Answer:",
    }
    choices = {
        **data,
        "output_type": "multiple_choice",
        "doc_to_target": "label",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "exact_match", "brier_score")],
    }
    some = {"doc_to_target": "first", "metric_list": [{"metric": "acc"}]}  # the harness's Brier score takes one K alone
    until = {"until": ["w0"], "max_gen_toks": 2}
    for task in (
        {**choices, "task": "letters", "doc_to_choice": "letters"},
        {**choices, "task": "ragged", "doc_to_choice": "some", **some},
        {**choices, "task": "texts", "doc_to_choice": "texts"},
        {
            **data,
            "task": "generated",
            "output_type": "generate_until",
            "doc_to_target": "w1",
            "generation_kwargs": until,
        },
        {
            **data,
            "task": "rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "w1 w2",
        },
    ):
        (place / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return place


@pytest.fixture(scope="module")
def evaluated(harness, tasks):
    """Values `(log-likelihood, is greedy)` of each document's choices, and metrics, of a model on a task."""
    found = {}

    def run(model, task="letters", batch_size=1, **arguments):
        key = (model, task, batch_size, *sorted(arguments.items()))
        if key not in found:
            result = harness.simple_evaluate(
                model,
                model_args=arguments,
                tasks=[task],
                batch_size=batch_size,
                device="cpu",
                task_manager=harness.TaskManager(include_path=str(tasks), include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
            )
            samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
            found[key] = SimpleNamespace(
                values=[[response[0] for response in sample["resps"]] for sample in samples],
                docs=[sample["doc"] for sample in samples],
                metrics=result["results"][task],
                config=result["config"],
            )
        return found[key]

    return run


def exact(values):
    return [[(float(value), bool(is_greedy)) for value, is_greedy in document] for document in values]


def log_likelihoods(values):
    return [torch.tensor([float(value) for value, _ in document], dtype=torch.float64) for document in values]


def alone(served, document):
    """A document as a batch of its own, without padding, and its class logits."""
    ids = torch.tensor([served.tokenizer.encode(f"{document['question']} Answer:")])
    choices = [VOCABULARY.index(letter) for letter in document["letters"]]

    def class_logits(module, batch):
        return module.model(**batch).logits[:, -1, choices], None

    return class_logits, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("task", ["letters", "ragged"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("method", ["map", "certain"])
def test_a_posterior_without_variance_equals_hf_bit_for_bit(evaluated, folder, method, batch_size, task):
    found = evaluated("bmoe", task, run=folder, method=method, batch_size=batch_size)
    plain = evaluated("hf", task, pretrained=folder, batch_size=batch_size)
    assert len(found.values) == SIZE
    assert exact(found.values) == exact(plain.values)
    assert found.metrics == plain.metrics


@pytest.mark.parametrize("method", ["temperature", "laplace_lpo"])
def test_values_are_the_prediction_over_the_choices_and_their_mass(evaluated, served, folder, method):
    found, plain = evaluated("bmoe", run=folder, method=method), evaluated("hf", pretrained=folder)
    predictor, accuracy, brier = served.predictor(method), [], []
    for document, values, of_plain in zip(
        found.docs, log_likelihoods(found.values), log_likelihoods(plain.values), strict=True
    ):
        expected = predictor.predict(served.module, *alone(served, document))[0][0]
        assert (values - of_plain).abs().max() > 1e-3
        torch.testing.assert_close(values.log_softmax(0), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(values.logsumexp(0), of_plain.logsumexp(0), rtol=0, atol=1e-6)
        accuracy.append(int(expected.argmax()) == document["label"])
        target = torch.nn.functional.one_hot(torch.tensor(document["label"]), len(expected))
        brier.append(float((expected.exp() - target).square().sum()))
    assert found.metrics["acc,none"] == found.metrics["acc_norm,none"] == pytest.approx(sum(accuracy) / SIZE)
    assert found.metrics["brier_score,none"] == pytest.approx(sum(brier) / SIZE, abs=1e-6)
    assert found.metrics["brier_score,none"] != pytest.approx(plain.metrics["brier_score,none"], abs=1e-3)


@pytest.mark.parametrize("batch_size", [3, SIZE, "auto"])
def test_numbers_do_not_depend_on_the_batch_size(evaluated, folder, batch_size):
    found = evaluated("bmoe", "ragged", run=folder, method="laplace_lpo", batch_size=batch_size)
    expected = evaluated("bmoe", "ragged", run=folder, method="laplace_lpo")
    for values, of_one in zip(log_likelihoods(found.values), log_likelihoods(expected.values), strict=True):
        torch.testing.assert_close(values, of_one, rtol=1e-6, atol=1e-6)


def test_pads_on_the_side_of_the_question_format(evaluated, harness, served, tmp_path, monkeypatch):
    other = replace(served, questions=replace(served.questions, padding_side="right", pad_id=5))
    other.save_pretrained(tmp_path / "right")
    sides, predict = [], harness.module.CalibratedLM._class_logits

    def noted(self, module, batch):
        mask = batch["attention_mask"].bool()
        padded = mask[~mask.all(1)]
        sides.append("left" if bool(padded[:, -1].all()) else "right")
        assert set(batch["input_ids"][~mask].tolist()) <= {5}
        return predict(self, module, batch)

    expected = evaluated("bmoe", run=served_folder(served, tmp_path), method="laplace_lpo", batch_size=SIZE)
    monkeypatch.setattr(harness.module.CalibratedLM, "_class_logits", noted)
    found = evaluated("bmoe", run=str(tmp_path / "right"), method="laplace_lpo", batch_size=SIZE)
    assert set(sides) == {"right"}
    for values, of_left in zip(log_likelihoods(found.values), log_likelihoods(expected.values), strict=True):
        torch.testing.assert_close(values, of_left, rtol=1e-6, atol=1e-6)


def served_folder(served, place):
    served.save_pretrained(place / "left")
    return str(place / "left")


def test_the_default_method_is_the_first_that_was_fitted_and_the_results_name_it(evaluated, folder):
    default, named = evaluated("bmoe", run=folder), evaluated("bmoe", run=folder, method="temperature")
    assert exact(default.values) == exact(named.values)
    assert default.config["method"] == "temperature"


@pytest.mark.parametrize("task", ["texts", "generated", "rolling"])
def test_all_else_is_the_plain_model_with_one_warning(evaluated, folder, task, caplog):
    with caplog.at_level(logging.WARNING, logger="bmoe_lightning"):
        found = evaluated("bmoe", task, run=folder, method="laplace_lpo")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("bmoe_lightning")] == [
        "laplace_lpo predicts choices that are single tokens after one context; what else the tasks ask for is "
        "answered by the plain model, as model hf does"
    ]
    plain = evaluated("hf", task, pretrained=folder)
    assert found.values == plain.values
    assert found.metrics == plain.metrics


def test_one_warning_a_model_and_none_for_what_is_predicted(harness, served, folder, caplog):
    model = harness.module.CalibratedLM(folder, "laplace_lpo", device="cpu")
    with caplog.at_level(logging.WARNING, logger="bmoe_lightning"):
        model.loglikelihood(requests_of("w1 Answer:", "A", "B"), disable_tqdm=True)
        assert caplog.text.count("plain model") == 0
        model.loglikelihood(requests_of("w1 Answer:", "w1 w2", "B"), disable_tqdm=True)
        model.loglikelihood(requests_of("w1 Answer:", "A", "A"), disable_tqdm=True)
    assert caplog.text.count("plain model") == 1


def requests_of(context, *choices, document=0):
    from lm_eval.api.instance import Instance

    return [
        Instance("loglikelihood", {}, (context, f" {choice}"), number, ("task", document, 1))
        for number, choice in enumerate(choices)
    ]


def test_documents_with_one_context_are_told_apart(harness, folder):
    model = harness.module.CalibratedLM(folder, "laplace_lpo", device="cpu", batch_size=2)
    groups = [("w1 Answer:", "A", "B"), ("w1 Answer:", "A", "C", "D"), ("w2 w1 Answer:", "A", "B")]
    apart = [model.loglikelihood(requests_of(*group), disable_tqdm=True) for group in groups]
    mixed = [requests_of(*group, document=number) for number, group in enumerate(groups)]
    order = [(2, 1), (0, 0), (1, 2), (0, 1), (1, 0), (2, 0), (1, 1)]
    found = model.loglikelihood([mixed[group][number] for group, number in order], disable_tqdm=True)
    for (group, number), (value, is_greedy) in zip(order, found, strict=True):
        assert value == pytest.approx(apart[group][number][0], abs=1e-6)
        assert is_greedy == apart[group][number][1]


def test_a_context_that_is_too_long_is_cut_as_the_harness_does(harness, folder):
    model = harness.module.CalibratedLM(folder, "laplace_lpo", device="cpu", max_length=4)
    long = model.loglikelihood(requests_of("w5 w6 w1 w2 w3 Answer:", "A", "B", "C"), disable_tqdm=True)
    short = model.loglikelihood(requests_of("w1 w2 w3 Answer:", "A", "B", "C"), disable_tqdm=True)
    assert long == short


@pytest.mark.parametrize("kinds", [("A", "B"), ("A", "B", "C", "D")])
def test_at_most_one_choice_is_greedy(harness, folder, kinds):
    model = harness.module.CalibratedLM(folder, "laplace_lpo", device="cpu")
    plain = harness.HFLM(folder, device="cpu")
    for word in WORDS:
        requests = requests_of(f"{word} Answer:", *kinds)
        values, of_plain = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (model, plain))
        greedy = [position for position, (_, is_greedy) in enumerate(values) if is_greedy]
        assert bool(greedy) == any(is_greedy for _, is_greedy in of_plain)
        assert all(position == max(range(len(values)), key=lambda i: values[i][0]) for position in greedy)


def test_an_interrupted_run_leaves_no_values_of_the_plain_model_in_a_cache(harness, folder, tmp_path, monkeypatch):
    from lm_eval.api.model import CachingLM

    model = harness.module.CalibratedLM(folder, "laplace_lpo", device="cpu")
    cached, requests = CachingLM(model, str(tmp_path / "cache.db")), requests_of("w1 Answer:", "A", "B")
    with monkeypatch.context() as patch:
        patch.setattr(model, "_predicted", lambda documents: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cached.loglikelihood(requests)
    assert len(cached.dbdict) == 0
    first = cached.loglikelihood(requests)
    assert len(cached.dbdict) == 2
    assert [tuple(value) for value in cached.loglikelihood(requests)] == first
    cached.dbdict.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "the model bmoe has no option dtype: its run says what model it is"),
        (
            {"methd": "map", "peft": "x"},
            "the model bmoe has no option methd, peft: .* the options are run, method, .*batch",
        ),
        ({"method": "swag"}, "this model has no method 'swag'; it has map, temperature, laplace_lpo, certain"),
    ],
)
def test_refusals(harness, folder, options, message):
    with pytest.raises(ValueError, match=message):
        harness.module.CalibratedLM(folder, device="cpu", **options)


def test_the_model_runs_in_the_mixed_precision_of_the_fit(harness, served, tmp_path):
    replace(served, precision="bf16-mixed").save_pretrained(tmp_path / "mixed")
    requests = requests_of("w1 w2 Answer:", *"ABCD")
    model = harness.module.CalibratedLM(str(tmp_path / "mixed"), "map", device="cpu")
    plain = harness.HFLM(str(tmp_path / "mixed"), device="cpu", mixed_precision_dtype="bfloat16")
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert found == plain.loglikelihood(requests, disable_tqdm=True)
    assert found != harness.HFLM(str(tmp_path / "mixed"), device="cpu").loglikelihood(requests, disable_tqdm=True)
    posterior = harness.module.CalibratedLM(str(tmp_path / "mixed"), "laplace_lpo", device="cpu")
    values = torch.tensor([value for value, _ in posterior.loglikelihood(requests, disable_tqdm=True)])
    assert math.isfinite(float(values.logsumexp(0)))


@pytest.mark.slow
def test_the_runner_runs_the_harness_without_lightning(harness, folder, tasks, tmp_path):
    code = (
        "import atexit, runpy, sys; names = 'lightning', 'pytorch_lightning'; "
        "atexit.register(lambda: print('imported:', [name for name in names if name in sys.modules])); "
        "sys.argv[0] = 'runner'; "
    )
    arguments = ["run", "--model", "bmoe", "--model_args", f"run={folder},method=laplace_lpo", "--tasks", "letters"]
    arguments += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "4", "--limit", "4"]
    run = subprocess.run(
        [sys.executable, "-c", code + RUNNER, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "brier_score" in run.stdout
    assert "imported: []" in run.stdout
