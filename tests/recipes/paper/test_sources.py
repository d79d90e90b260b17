"""Model and questions of the runs of a study: what does not fit is refused before a training."""

from __future__ import annotations

import json

import pytest

from recipes.paper.plan import PlannedRun
from recipes.paper.presets import chosen_preset
from recipes.paper.run import run_settings
from recipes.paper.settings import PaperSettings
from recipes.paper.sources import load_study_questions, source_of
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.sources import RecipeError

METHODS = ("map", "laplace_lpo")


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, content in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def lettered(split, size, *, words=1):
    """Rows in the columns of OpenBookQA."""
    return [
        {
            "id": f"{split}-{i}",
            "question_stem": f"which number follows {i} in {split}" + " indeed" * words,
            "choices": {"text": [f"n{i + k}" for k in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(size)
    ]


def judged(split, size):
    """Rows in the columns of BoolQ."""
    return [
        {"question": f"is {i} even in {split}", "passage": f"A text about {i} in {split}.", "answer": i % 2 == 0}
        for i in range(size)
    ]


@pytest.fixture
def boolq(tmp_path):
    return write(tmp_path / "boolq", train=judged("train", 100), validation=judged("test", 30))


@pytest.fixture
def openbookqa(tmp_path):
    return write(tmp_path / "openbookqa", train=lettered("train", 100), validation=lettered("test", 30))


def study(tmp_path, *folders, **options):
    """The questions of a study, and a function that prepares a run on its first data set."""
    data = tuple(f"{folder.name}={folder}" for folder in folders)
    settings = PaperSettings(
        all=True, data=data, output_dir=str(tmp_path / "study"), quiet=True, **{"dry_run": True, **options}
    )
    preset = chosen_preset(settings)
    questions = load_study_questions(preset)
    home, *others = questions.data

    def prepare(methods=METHODS):
        run = PlannedRun(home, "experts", methods, tuple(others))
        resolved = run_settings(run, preset, settings, questions)
        return source_of(run, questions, tmp_path / "model", resolved, build_methods(resolved))

    return questions, prepare


class TestOtherSets:
    def test_each_is_asked_with_its_own_prompt(self, tmp_path, boolq, openbookqa):
        """Not with that of the first one, if it has none of its own."""
        source = study(tmp_path, boolq, openbookqa)[1]()
        assert source.data(0).prompt_format.name == "true_false"
        other = source.data_of("openbookqa")
        assert (other.prompt_format.name, other.num_choices) == ("instruction", 4)
        source = study(tmp_path, openbookqa, boolq)[1]()
        assert source.data(0).prompt_format.name == "instruction"
        assert source.data_of("boolq").prompt_format.name == "true_false"

    def test_test_questions_that_do_not_fit_are_refused_before_the_training(self, tmp_path, openbookqa):
        # A data set whose rows can be read, with the name of one whose prompt they do not fit.
        boolq = write(tmp_path / "boolq", train=lettered("train", 100), validation=lettered("test", 30))
        with pytest.raises(RecipeError, match="the prompt 'true_false' is answered by False or True"):
            study(tmp_path, openbookqa, boolq)[1]()

    def test_their_training_questions_need_not_fit(self, tmp_path, openbookqa):
        rows = lettered("train", 100)
        for row in rows[:50]:
            row["choices"]["text"][0] = "long " * 400
        other = write(tmp_path / "other", train=rows, validation=lettered("other", 30))
        source = study(tmp_path, openbookqa, other)[1]()
        data = source.data_of("other")
        assert [question.id for question in data.questions("test")] == [
            question.id for question in source.others["other"].splits.test
        ]
        assert max(len(data.questions(part)) for part in ("train", "calibration")) == 1

    def test_test_questions_that_are_too_long_are_refused_before_the_training(self, tmp_path, openbookqa):
        rows = lettered("other", 4)
        for row in rows:
            row["choices"]["text"][0] = "long " * 400
        other = write(tmp_path / "other", train=lettered("train", 100), validation=rows)
        with pytest.raises(RecipeError, match="max_length"):
            study(tmp_path, openbookqa, other)[1]()

    def test_their_calibration_questions_may_be_few(self, tmp_path):
        """The evidence temperature needs some hundred calibration questions of the data set it is tuned on."""
        home = write(tmp_path / "home", train=lettered("train", 600), validation=lettered("test", 30))
        few = write(tmp_path / "few", train=lettered("few", 40), validation=lettered("other", 30))
        methods = ("map", "evidence_temperature")
        assert study(tmp_path, home, few)[1](methods).others["few"].splits.test
        with pytest.raises(RecipeError, match="evidence_temperature"):
            study(tmp_path, few, home)[1](methods)

    def test_the_limit_of_test_questions_is_theirs_too(self, tmp_path, openbookqa, boolq):
        source = study(tmp_path, openbookqa, boolq, limit_test=3)[1]()
        assert len(source.others["boolq"].splits.test) == 3
