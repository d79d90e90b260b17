"""Model and questions of the runs of a study: what does not fit is refused before a training."""

from __future__ import annotations

import json
import warnings

import pytest
from transformers import AutoTokenizer

from bmoe_lightning.data.questions import question_key
from recipes.common.errors import RecipeError
from recipes.paper import run as paper_run
from recipes.paper import sources
from recipes.paper.generated import GENERATED_SETS
from recipes.paper.plan import PlannedRun
from recipes.paper.presets import chosen_preset
from recipes.paper.run import pretrain_one, run_settings
from recipes.paper.settings import PaperSettings
from recipes.paper.sources import load_study_questions, source_of
from recipes.qwen_obqa import sources as main_sources
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.reader_model import read_questions

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

    def prepare(methods=METHODS, home=None):
        home = home or next(iter(questions.data))
        run = PlannedRun(home, "experts", methods, tuple(name for name in questions.data if name != home))
        resolved = run_settings(run, preset, settings, questions)
        return source_of(run, questions, tmp_path / "study" / "model", resolved, build_methods(resolved))

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


def keys(questions):
    return {question_key(question) for question in questions}


@pytest.mark.filterwarnings("ignore:.*also asked in the:UserWarning")
class TestSharedQuestions:
    """Of `one`, 20 training questions are tests of `two`; the rest of them are in both."""

    @pytest.fixture
    def folders(self, tmp_path):
        tests = lettered("two test", 20)
        one = write(tmp_path / "one", train=[*lettered("train", 200), *tests], validation=lettered("one test", 30))
        two = write(tmp_path / "two", train=lettered("train", 150), validation=tests)
        return one, two

    def test_what_one_tests_trains_and_calibrates_none(self, tmp_path, folders):
        with pytest.warns(UserWarning, match="test part of another data set") as caught:
            questions, _ = study(tmp_path, *folders)
        one, two = questions.splits.values()
        for found in (one, two):
            assert not keys((*found.train, *found.calibration)) & keys((*one.test, *two.test))
            assert not keys(found.train) & keys(found.calibration)
        assert len(one.train) + len(one.calibration) == 200
        assert len(two.train) + len(two.calibration) == 150
        assert (len(one.test), len(two.test)) == (30, 20)
        (said,) = [str(entry.message) for entry in caught if "another data set" in str(entry.message)]
        counts = [int(clause.split(" of ")[0].split()[-1]) for clause in said.split(", and ")]
        assert sum(counts) == 20
        assert "one train questions" in said
        assert "two" not in said

    def test_the_small_model_is_pretrained_on_what_calibrates_and_tests_none(self, tmp_path, folders, monkeypatch):
        with pytest.warns(UserWarning, match="two train questions.* the small model is not pre-trained on them"):
            questions, prepare = study(tmp_path, *folders)
        held_out = [q for found in questions.splits.values() for q in (*found.calibration, *found.test)]
        trained = [q for found in questions.splits.values() for q in found.train]
        assert keys(trained) & keys(held_out)  # what calibrates one is in the training part of the other
        read, reader = [], sources.reader
        monkeypatch.setattr(
            sources, "reader", lambda s, given, *rest, **seed: read.extend(given) or reader(s, given, *rest, **seed)
        )
        prepare()
        assert keys(read) == keys(trained) - keys(held_out)

    def test_a_given_model_is_trained_on_what_calibrates_others(self, tmp_path, folders):
        """It is not tested on those, and small data sets would lose what their larger versions calibrate with."""
        with pytest.warns(UserWarning, match="test part of another data set") as caught:
            one, two = study(tmp_path, *folders, model="some/model")[0].splits.values()
        assert keys(one.train) & keys(two.calibration)
        assert not any("pre-trained" in str(entry.message) for entry in caught)

    def test_nothing_left_is_told(self, tmp_path):
        one = write(tmp_path / "one", train=lettered("train", 50), validation=lettered("test", 30))
        two = write(tmp_path / "two", train=lettered("more", 50), validation=lettered("train", 50))
        with pytest.raises(RecipeError, match="all train questions of one are test questions of another data set"):
            study(tmp_path, one, two)


def test_generated_sets_keep_all_questions_and_share_none():
    """Forms of the same fact have equal texts, but a fact is in one split of all of them."""
    expected = {entry.name: entry.splits() for entry in GENERATED_SETS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        questions = load_study_questions(chosen_preset(PaperSettings(all=True)))
        assert questions.splits == expected
        disjoint, pool = sources._disjoint(expected, pretrains=True)
    assert disjoint == expected
    assert pool == questions.pretraining
    assert keys(expected["recall"].train) & keys(expected["pairs"].train)


def test_every_seed_of_a_small_model_has_its_own_pretraining(tmp_path, openbookqa, boolq):
    """A report says that a seed is a pre-training, and its intervals have that spread."""
    source = study(tmp_path, openbookqa, boolq, seeds=2, first_seed=1)[1]()
    models = [source.model_of(seed) for seed in (1, 2)]
    assert source.model == models[0]
    assert source.model_hash(1) != source.model_hash(2)
    one, other = (AutoTokenizer.from_pretrained(model).get_vocab() for model in models)
    assert one == other


def test_a_model_that_is_given_is_that_of_all_seeds(tmp_path, openbookqa):
    model = study(tmp_path, openbookqa)[1]().model
    source = study(tmp_path, openbookqa, model=model)[1]()
    assert source.small_model is None
    assert source.model_of(0) == source.model_of(1) == model


def test_several_processes_pretrain_each_seed_first_for_all_prompts(tmp_path, openbookqa, boolq, monkeypatch):
    """Otherwise two of them would pre-train the same model."""
    monkeypatch.setattr(main_sources, "read_questions", lambda *args, **o: read_questions(*args, **{**o, "steps": 0}))
    data = tuple(f"{folder.name}={folder}" for folder in (openbookqa, boolq))
    settings = PaperSettings(
        table=(6,), data=data, output_dir=str(tmp_path / "study"), quiet=True, seeds=2, first_seed=3
    )
    asked = []
    monkeypatch.setattr(paper_run, "run_jobs", lambda jobs, at_a_time: asked.append([job.name for job in jobs]))
    paper_run._run_in_processes(settings, paper_run._planned(settings), 2)
    assert asked == [["pre-training, seed 3", "pre-training, seed 4"], ["openbookqa-experts", "boolq-experts"]]
    pretrain_one(settings, 3)
    made = {path.name for path in (tmp_path / "study" / "model").iterdir()}
    prepare = study(tmp_path, openbookqa, boolq, dry_run=False, seeds=2, first_seed=3)[1]
    for name in ("openbookqa", "boolq"):
        prepare(home=name)
    assert len(made) == 2
    assert {path.name for path in (tmp_path / "study" / "model").iterdir()} == made
