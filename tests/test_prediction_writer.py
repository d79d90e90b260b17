"""The file of `trainer.predict`: its rows, their order, and what is refused before anything is predicted."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from finetuner_cases import TEST, finetuner, qwen
from finetuner_cases import trainer as finetuner_trainer
from serving_cases import data_of, rows_of, served_of, write_rows
from torch.utils.data import DataLoader, IterableDataset
from toy import ToyData, ToyModule, calibration_loader, loader, test_loader, trainer

from bmoe_lightning import BayesianMoECallback, BayesianTextCallback, PredictionWriter
from bmoe_lightning.command.main import main
from bmoe_lightning.data.files import file_rows
from bmoe_lightning.methods import LaplaceLPO
from bmoe_lightning.serving import ServedPredictions

METHODS = ("map", LaplaceLPO(num_samples=100))
SCORES = ("mutual_information", "logit_variance")


def rows_in(path):
    return [row for _, row in file_rows(path)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A module, and the folder of its fit."""
    folder = tmp_path_factory.mktemp("fitted")
    module = ToyModule()
    trainer(folder, [BayesianMoECallback(METHODS, dirpath=str(folder / "b"))], max_epochs=1).fit(
        module, loader(32, 1), calibration_loader()
    )
    return module, folder


@pytest.fixture(scope="module")
def of_several(fitted):
    """The same with a module that predicts from several loaders."""

    class Several(ToyModule):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return None

    module, folder = fitted
    other = Several()
    other.load_state_dict(module.state_dict())
    return other, folder


def predicted(fitted, path, data, method="laplace_lpo", *, options=None, **arguments):
    """What `trainer.predict` returns, with a writer beside the callback."""
    module, folder = fitted
    callback = BayesianMoECallback(METHODS, dirpath=str(folder / "b"), predict_method=method)
    run = trainer(folder, [PredictionWriter(str(path), **(options or {})), callback], **arguments)
    return run.predict(module, data)


class TestRows:
    def test_are_what_predict_returns(self, fitted, tmp_path):
        batches = predicted(fitted, tmp_path / "new" / "rows.jsonl", test_loader())
        rows = rows_in(tmp_path / "new" / "rows.jsonl")
        assert list(rows[0]) == ["id", "prediction", "probabilities", "entropy", *SCORES, "answer"]
        assert [row["id"] for row in rows] == [str(number) for number in range(48)]
        for name in ("entropy", *SCORES):
            assert [row[name] for row in rows] == torch.cat([batch[name] for batch in batches]).tolist()
        probs = torch.cat([batch["probs"] for batch in batches])
        assert [row["probabilities"] for row in rows] == probs.tolist()
        assert [row["prediction"] for row in rows] == ["ABC"[index] for index in probs.argmax(1).tolist()]
        assert [row["answer"] for row in rows] == ["ABC"[label] for label in ToyData(48, 3).labels.tolist()]
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl"]

    def test_of_a_method_without_scores_in_parquet_with_names(self, fitted, tmp_path):
        predicted(fitted, tmp_path / "rows.jsonl", test_loader(), "map")
        names = {"class_names": ["bad", "fair", "good"]}
        predicted(fitted, tmp_path / "rows.parquet", test_loader(), "map", options=names)
        of_letters = {"A": "bad", "B": "fair", "C": "good"}
        rows = rows_in(tmp_path / "rows.jsonl")
        assert not set(rows[0]) & set(SCORES)
        for row in rows:
            row |= {name: of_letters[row[name]] for name in ("prediction", "answer")}
        assert rows_in(tmp_path / "rows.parquet") == rows

    @pytest.mark.parametrize("shuffled", [False, True])
    def test_are_in_the_order_of_the_data_set(self, fitted, tmp_path, shuffled):
        predicted(fitted, tmp_path / "one.jsonl", test_loader())
        predicted(fitted, tmp_path / "other.jsonl", loader(48, 3, shuffle=shuffled, batch_size=7))
        one, other = rows_in(tmp_path / "one.jsonl"), rows_in(tmp_path / "other.jsonl")
        for name in ("id", "prediction", "answer"):
            assert [row[name] for row in one] == [row[name] for row in other]
        assert [row["entropy"] for row in one] == pytest.approx([row["entropy"] for row in other], rel=1e-4)

    def test_an_entry_that_a_sampler_repeats_has_one(self, fitted, tmp_path):
        data = DataLoader(ToyData(48, 3), batch_size=2, sampler=[5, 3, 5, 0, 3])
        predicted(fitted, tmp_path / "rows.jsonl", data)
        assert [row["id"] for row in rows_in(tmp_path / "rows.jsonl")] == ["0", "3", "5"]

    def test_of_a_stream_are_numbered(self, fitted, tmp_path):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(ToyData(48, 3))

        predicted(fitted, tmp_path / "whole.jsonl", loader(48, 3, batch_size=20))
        predicted(fitted, tmp_path / "stream.jsonl", DataLoader(Stream(), batch_size=20))
        assert rows_in(tmp_path / "stream.jsonl") == rows_in(tmp_path / "whole.jsonl")

    def test_absent_classes_and_missing_labels(self, fitted, tmp_path):
        class Masked(ToyModule):
            def class_logits(self, batch):
                logits, labels = super().class_logits(batch)
                absent = torch.zeros_like(logits, dtype=torch.bool)
                absent[::2, 2] = True
                return logits.masked_fill(absent, -torch.inf), torch.where(labels == 1, -100, labels)

        module, folder = fitted
        other = Masked()
        other.load_state_dict(module.state_dict())
        predicted((other, folder), tmp_path / "rows.jsonl", test_loader())
        rows = rows_in(tmp_path / "rows.jsonl")
        assert [len(row["probabilities"]) for row in rows] == [2, 3] * 24
        assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)
        labels = ToyData(48, 3).labels.tolist()
        assert [row.get("answer") for row in rows] == [None if label == 1 else "ABC"[label] for label in labels]

    @pytest.mark.parametrize("label", ["x", torch.tensor(1)])
    def test_labels_of_the_user_s_step_are_left_to_them_and_are_no_answers(self, fitted, tmp_path, label):
        class Labelling(ToyModule):
            def predict_step(self, batch, batch_idx):
                return {"labels": [label] * 16 if isinstance(label, str) else label.expand(16)}

        module, folder = fitted
        other = Labelling()
        other.load_state_dict(module.state_dict())
        batches = predicted((other, folder), tmp_path / "rows.jsonl", test_loader())
        assert list(batches[0]["labels"]) == [label] * 16
        answers = [row["answer"] for row in rows_in(tmp_path / "rows.jsonl")]
        assert answers == ["ABC"[index] for index in ToyData(48, 3).labels.tolist()]

    def test_several_loaders_have_a_file_each(self, of_several, tmp_path):
        data = [loader(12, 3, batch_size=8), loader(9, 4)]
        predicted(of_several, tmp_path / "rows.jsonl", data)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["rows_0.jsonl", "rows_1.jsonl"]
        assert [len(rows_in(tmp_path / f"rows_{number}.jsonl")) for number in (0, 1)] == [12, 9]
        with pytest.raises(ValueError, match=r"rows_0\.jsonl exists"):
            predicted(of_several, tmp_path / "rows.jsonl", data)

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_a_loader_without_entries_has_an_empty_file(self, of_several, tmp_path, suffix):
        predicted(of_several, tmp_path / f"rows{suffix}", [loader(3, 3), DataLoader(ToyData(0, 3)), loader(2, 4)])
        assert [len(rows_in(tmp_path / f"rows_{number}{suffix}")) for number in range(3)] == [3, 0, 2]

    def test_a_score_that_is_no_number_is_left_out_of_its_row_alone(self, fitted, tmp_path):
        class Unknown(L.Callback):
            def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
                outputs["logit_variance"][:1] = torch.nan
                outputs["mutual_information"][:] = torch.nan

        module, folder = fitted
        callback = BayesianMoECallback(METHODS, dirpath=str(folder / "b"), predict_method="laplace_lpo")
        writer = PredictionWriter(str(tmp_path / "rows.jsonl"))
        trainer(folder, [callback, Unknown(), writer]).predict(module, loader(5, 3))
        rows = rows_in(tmp_path / "rows.jsonl")
        assert [row["id"] for row in rows if "logit_variance" not in row] == ["0"]
        assert not any("mutual_information" in row for row in rows)

    def test_a_row_that_cannot_be_told_leaves_no_file(self, of_several, tmp_path, monkeypatch):
        rows_of = ServedPredictions.rows_of

        def fails(self, ids, *others):
            if len(ids) == 2:
                raise RuntimeError("no such row")
            return rows_of(self, ids, *others)

        monkeypatch.setattr(ServedPredictions, "rows_of", fails)
        with pytest.raises(RuntimeError, match="no such row"):
            predicted(of_several, tmp_path / "rows.jsonl", [loader(3, 3), loader(2, 4)])
        assert list(tmp_path.iterdir()) == []

    def test_limits_and_trials(self, fitted, tmp_path):
        predicted(fitted, tmp_path / "rows.jsonl", test_loader(), limit_predict_batches=2)
        assert len(rows_in(tmp_path / "rows.jsonl")) == 32
        predicted(fitted, tmp_path / "trial.jsonl", test_loader(), fast_dev_run=True)
        assert not (tmp_path / "trial.jsonl").exists()


def test_rows_of_questions_are_those_of_the_command(tmp_path):
    """Ids, letters and numbers, of the same batches."""
    data, module = data_of(), finetuner(qwen())
    folder = str(tmp_path / "fit")
    options = {"predict_method": "laplace_lpo", "dirpath": folder}
    callback = BayesianMoECallback(METHODS, **options)
    run = finetuner_trainer(tmp_path, callback, PredictionWriter(str(tmp_path / "rows.jsonl")))
    run.fit(module, datamodule=data)
    run.predict(module, datamodule=data)
    rows = rows_in(tmp_path / "rows.jsonl")
    assert [row["id"] for row in rows] == [question.id for question in TEST]
    served_of(type("Found", (), {"module": module, "data": data, "callback": callback})).save_pretrained(
        tmp_path / "served"
    )
    questions = write_rows(tmp_path / "questions.jsonl", rows_of(TEST))
    given = ["--run", tmp_path / "served", "--data", questions, "--output", tmp_path / "c.jsonl", "--device", "cpu"]
    given += ["--method", "laplace_lpo", "--batch-size", str(data.eval_batch_size), "--quiet"]
    assert main(["predict", *map(str, given)]) == 0
    expected = rows_in(tmp_path / "c.jsonl")
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            assert row[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-9)), name


class TestRefusals:
    def test_of_arguments_of_another_type(self):
        for path in (3, None, ["rows.jsonl"]):
            with pytest.raises(TypeError, match="path must be the path of a file, got "):
                PredictionWriter(path)
        for names in ("abc", 3, [1, 2], {"a": 0, "b": 1}):
            with pytest.raises(TypeError, match="class_names must be a list of names in the order of the classes"):
                PredictionWriter("rows.jsonl", class_names=names)
        with pytest.raises(TypeError, match="overwrite must be True or False, got 'no'"):
            PredictionWriter("rows.jsonl", overwrite="no")

    @pytest.mark.parametrize("stage", ["fit", "predict"])
    def test_of_arguments_before_any_work(self, tmp_path, stage):
        def refused(message, *arguments):
            run = trainer(tmp_path, [PredictionWriter(*arguments), BayesianMoECallback(["map"], predict_method="map")])
            with pytest.raises(ValueError, match=message):
                getattr(run, stage)(ToyModule(), loader(8, 1))

        refused(r"^path rows\.csv must end in \.jsonl or \.parquet$", "rows.csv")
        for names in ([], ["a", "a"], ["a", " "]):
            refused("^class_names must be different names", "rows.jsonl", names)

    @pytest.mark.parametrize("name", ["file/rows.jsonl", "file/below/rows.jsonl"])
    def test_of_a_folder_that_cannot_be_created(self, tmp_path, name):
        (tmp_path / "file").write_text("")
        callbacks = [BayesianMoECallback(["map"], predict_method="map"), PredictionWriter(str(tmp_path / name))]
        module = ToyModule()
        module.configure_model = lambda: pytest.fail("refused too late")
        with pytest.raises(OSError, match=r"predictions cannot be written to .*file is not a writable folder \(Not a"):
            trainer(tmp_path, callbacks).predict(module, test_loader())

    @pytest.mark.parametrize("callbacks", [[], [BayesianMoECallback(["map"])]])
    def test_no_method_predicts(self, tmp_path, callbacks):
        writer = PredictionWriter(str(tmp_path / "rows.jsonl"))
        with pytest.raises(ValueError, match="no callback of the trainer predicts with one"):
            trainer(tmp_path, [*callbacks, writer]).predict(ToyModule(), test_loader())

    def test_scores_of_texts(self, tmp_path):
        callbacks = [BayesianTextCallback(), PredictionWriter(str(tmp_path / "rows.jsonl"))]
        module = ToyModule()
        module.sequence_log_prob = lambda batch: None
        with pytest.raises(ValueError, match="BayesianTextCallback scores texts, which have none; leave"):
            trainer(tmp_path, callbacks).predict(module, test_loader())

    def test_an_existing_file(self, fitted, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text("old")
        with pytest.raises(ValueError, match=r"rows\.jsonl exists; pass PredictionWriter\(overwrite=True\)"):
            predicted(fitted, path, test_loader())
        assert path.read_text() == "old"
        predicted(fitted, path, test_loader(), options={"overwrite": True})
        assert len(rows_in(path)) == 48
        (tmp_path / "folder.jsonl").mkdir()
        with pytest.raises(ValueError, match="is a folder"):
            predicted(fitted, tmp_path / "folder.jsonl", test_loader(), options={"overwrite": True})

    def test_too_few_names(self, fitted, tmp_path):
        with pytest.raises(ValueError, match="there are 3 classes, and 2 of them have a name"):
            predicted(fitted, tmp_path / "rows.jsonl", test_loader(), options={"class_names": ["a", "b"]})
        assert list(tmp_path.iterdir()) == []

    def test_entries_with_several_examples(self, fitted, tmp_path):
        class Pairs(ToyData):
            def __len__(self):
                return len(self.labels) // 2

            def __getitem__(self, index):
                return {
                    "input_ids": self.ids[2 * index : 2 * index + 2],
                    "labels": self.labels[2 * index : 2 * index + 2],
                }

        def flat(items):
            return {name: torch.cat([item[name] for item in items]) for name in items[0]}

        data = DataLoader(Pairs(48, 3), batch_size=4, collate_fn=flat)
        with pytest.raises(ValueError, match="a batch of 4 entries of the data set has 8 predictions"):
            predicted(fitted, tmp_path / "rows.jsonl", data)

    def test_a_stream_on_several_ranks(self):
        writer = PredictionWriter("rows.jsonl")
        writer._loaders = [type("Found", (), {"path": writer.path, "source": [1]})()]
        with pytest.raises(ValueError, match=r"on 2 ranks .* and this list has none"):
            writer._check_loaders(2)


def test_nothing_is_left_of_a_prediction_that_fails(fitted, tmp_path):
    class Fails(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("stopped")

    module, folder = fitted
    callback = BayesianMoECallback(METHODS, dirpath=str(folder / "b"), predict_method="map")
    writer = PredictionWriter(str(tmp_path / "rows.jsonl"))
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(folder, [callback, writer, Fails()]).predict(module, test_loader())
    assert list(tmp_path.iterdir()) == []
    trainer(folder, [callback, writer]).predict(module, loader(5, 3))
    assert [json.loads(line)["id"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == list("01234")
