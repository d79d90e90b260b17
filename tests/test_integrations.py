"""The callback with LightningCLI and with loggers: the code of docs/integrations.md."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from datamodule_cases import write
from finetuner_cases import CALIBRATION, TEST, TRAIN, qwen
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from page_cases import METHODS, PAGE, block
from serving_cases import data_of
from toy import ToyModule, calibration_loader, loader, test_loader, trainer

from bmoe_lightning import BayesianMoECallback, ExpertFinetuner, MultipleChoiceDataModule
from bmoe_lightning.data.files import file_rows
from bmoe_lightning.lora_finetuner import LoRAFinetuner

METRICS = ("acc", "ece", "nll", "brier")


@pytest.mark.filterwarnings("ignore")
class TestCommandLine:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """A folder with model, tokenizer and data, as the page's configuration names them."""
        pytest.importorskip("jsonargparse")
        folder = tmp_path_factory.mktemp("cli")
        model = folder / "path" / "to" / "model"
        qwen().save_pretrained(model)
        data_of().tokenizer.save_pretrained(model)
        write(folder / "path" / "to" / "questions", train=TRAIN, validation=CALIBRATION, test=TEST)
        (folder / "config.yaml").write_text(block("LightningCLI", "yaml"))
        return folder

    @pytest.fixture
    def call(self, folder, monkeypatch):
        monkeypatch.chdir(folder)

        def call(*arguments, code=None):
            monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
            code = block("LightningCLI", "python") if code is None else code
            exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})

        return call

    def test_the_page_s_commands(self, folder, call):
        commands = [line.split()[2:] for line in block("LightningCLI", "bash").splitlines()]
        assert [command[0] for command in commands] == ["fit", "test", "predict"]
        call(*commands[0])
        [checkpoint] = folder.rglob("*.ckpt")
        for command in commands[1:]:
            call(*(checkpoint if word == "CHECKPOINT" else word for word in command))
        rows = [row for _, row in file_rows(folder / "predictions.jsonl")]
        assert [row["id"] for row in rows] == [question.id for question in TEST]
        tested = [row for path in folder.rglob("metrics.csv") for row in csv.DictReader(path.open())]
        names = {f"{method}/test/{metric}" for method in ("map", "temperature", "lpo_probit") for metric in METRICS}
        [metrics] = [row for row in tested if row.get("map/test/nll")]
        assert names <= {name for name, value in metrics.items() if value}
        probability = [row["probabilities"]["ABCD".index(row["answer"])] for row in rows]
        nll = -torch.tensor(probability, dtype=torch.float64).log().mean()
        assert float(nll) == pytest.approx(float(metrics["lpo_probit/test/nll"]), rel=1e-6)
        assert float(metrics["map/test/nll"]) != pytest.approx(float(nll), rel=1e-6)
        # What a command line has trained is loaded without one.
        module = ExpertFinetuner.load_from_checkpoint(checkpoint)
        assert (module.train_part, module.learning_rate, module.betas) == ("down_proj", 1e-3, (0.9, 0.95))

    def test_lists_of_a_command_line_are_the_tuples_of_the_class(self, folder, call, tmp_path):
        pytest.importorskip("peft")
        arguments = ["--model.model=path/to/model", "--model.target_modules=[q_proj, v_proj]", "--model.rank=2"]
        arguments += ["--data.data=path/to/questions", "--data.tokenizer=path/to/model", "--trainer.max_steps=1"]
        arguments += ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
        call("fit", *arguments, code=block("LightningCLI", "python").replace("ExpertFinetuner", "LoRAFinetuner"))
        [checkpoint] = tmp_path.rglob("*.ckpt")
        again = LoRAFinetuner("path/to/model", target_modules=("q_proj", "v_proj"), rank=2)
        data = MultipleChoiceDataModule("path/to/questions", "path/to/model")
        run = trainer(tmp_path, [])
        run.test(again, datamodule=data, ckpt_path=str(checkpoint), verbose=False)

    @pytest.mark.parametrize(
        ("command", "given", "instead", "kind", "sentence"),
        [
            (
                "fit",
                "predictions.jsonl",
                "predictions.csv",
                ValueError,
                r"path predictions\.csv must end in \.jsonl or",
            ),
            (
                "predict",
                "predictions.jsonl",
                "config.yaml/p.jsonl",
                OSError,
                "the predictions cannot be written to conf",
            ),
            (
                "fit",
                "path/to/questions",
                "lacking",
                ValueError,
                r"lacking/train\.jsonl, line 1: .*needs answerKey too",
            ),
        ],
    )
    def test_what_is_wrong_in_the_file_is_one_sentence(self, folder, call, command, given, instead, kind, sentence):
        rows = [json.loads(line) for line in (folder / "path/to/questions/train.jsonl").read_text().splitlines()]
        (folder / "lacking").mkdir(exist_ok=True)
        for split in ("train", "validation", "test"):
            lines = [json.dumps({name: row[name] for name in row if name != "answerKey"}) for row in rows]
            (folder / "lacking" / f"{split}.jsonl").write_text("\n".join(lines))
        (folder / "wrong.yaml").write_text((folder / "config.yaml").read_text().replace(given, instead))
        with pytest.raises(kind, match=f"^{sentence}[^\n]*$"):
            call(command, "--config", "wrong.yaml", "--trainer.logger=false")

    def test_a_subclass_with_arguments_of_its_own(self, folder, call, tmp_path, monkeypatch):
        code = (
            "from lightning.pytorch.cli import LightningCLI\n"
            "from bmoe_lightning import MultipleChoiceDataModule\n"
            "from test_integrations import OwnFinetuner\n"
            "LightningCLI(OwnFinetuner, MultipleChoiceDataModule)\n"
        )
        monkeypatch.setitem(sys.modules, "test_integrations", sys.modules[__name__])
        arguments = ["--model.folder=path/to/model", "--data.data=path/to/questions", "--data.tokenizer=path/to/model"]
        arguments += ["--trainer.max_steps=1", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
        call("fit", *arguments, "--trainer.accelerator=cpu", code=code)
        [checkpoint] = tmp_path.rglob("*.ckpt")
        data = MultipleChoiceDataModule("path/to/questions", "path/to/model")
        metrics = trainer(tmp_path, []).test(
            OwnFinetuner("path/to/model"), datamodule=data, ckpt_path=str(checkpoint), verbose=False
        )
        assert "test/loss" in metrics[0]

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("BayesianMoECallback", {"methods": ["map"], "class_logits": "toy.ToyModule.class_logits", "seed": 3}),
            ("RouterTrainingCallback", {"kind": "full_covariance", "layers": [0], "rank": 2, "prior_unit": "one"}),
            ("PredictionWriter", {"path": "rows.parquet", "class_names": ["bad", "good"], "overwrite": True}),
            ("ExpertFinetuner", {"model": "m", "betas": [0.8, 0.9], "schedule": "cosine", "dtype": "bfloat16"}),
            ("LoRAFinetuner", {"model": "m", "target_modules": ["q_proj"], "alpha": 3.5}),
            ("RouterFinetuner", {"model": "m", "layers": [1], "beta": 0.5, "score_function": False}),
        ],
    )
    def test_everything_that_a_trainer_meets_can_be_written_in_yaml(self, name, options):
        jsonargparse = pytest.importorskip("jsonargparse")
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments((L.Callback, L.LightningModule), "it")
        given = {"it": {"class_path": f"bmoe_lightning.{name}", "init_args": options}}
        values = parser.parse_object(given)
        again = parser.parse_string(parser.dump(values))  # what SaveConfigCallback writes
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        made = instantiate(again).it
        assert type(made).__name__ == name
        assert parser.dump(again) == parser.dump(values)
        for option in set(options) - {"class_logits", "methods"}:
            found = again.it.init_args[option]
            assert (list(found) if isinstance(found, tuple) else found) == options[option]


class OwnFinetuner(ExpertFinetuner):
    """A module of a user's own with another signature."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, train="down_proj", learning_rate=1e-3)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """What the page's blocks on loggers find, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader(32, 1)

        def val_dataloader(self):
            return calibration_loader()

        def test_dataloader(self):
            return test_loader()

    return {
        "L": L,
        "BayesianMoECallback": BayesianMoECallback,
        "callback": BayesianMoECallback(METHODS),
        "module": ToyModule(),
        "data": Data(),
        "__name__": "page",
    }


def run_block(page, containing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block("Loggers", "python", containing), str(PAGE), "exec"), page)
    return {name: float(value) for name, value in page["trainer"].callback_metrics.items()}


def assert_arrived(logged, metrics):
    """Everything of every method, and of the fit."""
    expected = {f"{method}/test/{metric}" for method in METHODS for metric in METRICS}
    assert expected <= set(metrics)
    for name in expected:
        assert logged[name] == pytest.approx(metrics[name], rel=1e-5), name
    assert logged["posterior/temperature/temperature"] > 0
    assert any(name.startswith("posterior/laplace_lpo/") for name in logged)


def later_run(page, logger):
    """Another process with another run of the logger finds the fit."""
    metrics = trainer(Path.cwd(), [BayesianMoECallback(METHODS)], logger=logger).test(
        page["module"], test_loader(), verbose=False
    )
    return metrics[0]


class Recorder(Logger):
    """A logger that has what every logger must have, and nothing else."""

    def __init__(self, name):
        self.metrics, self._name = {}, name

    @property
    def name(self):
        return self._name

    @property
    def version(self):
        return 0

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics


class TestLoggers:
    def test_csv(self, page):
        metrics = run_block(page, "CSVLogger")
        [path] = Path("logs").rglob("metrics.csv")
        assert path.as_posix() == "logs/obqa/version_0/metrics.csv"
        rows = list(csv.DictReader(path.open()))
        assert_arrived({name: float(value) for row in rows for name, value in row.items() if value}, metrics)
        assert later_run(page, CSVLogger("logs", name="obqa")) == pytest.approx(metrics, rel=1e-5)

    def test_wandb(self, page, monkeypatch):
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_MODE", "offline")
        seen = []
        original = wandb.sdk.wandb_run.Run.log

        def log(self, data, *arguments, **options):
            seen.append(dict(data))
            return original(self, data, *arguments, **options)

        monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", log)
        try:
            metrics = run_block(page, "WandbLogger")
            run = page["logger"].experiment
            logged = {name: value for data in seen for name, value in data.items()}
            assert_arrived(logged, metrics)
            assert_arrived(dict(run.summary), metrics)
            assert {"test/best_method/nll", "test/reliability/all_methods"} <= set(logged)
            assert len(list(Path(run.dir).rglob("*.png"))) == 2
            wandb.finish()
            assert later_run(page, wandb_logger("obqa")) == pytest.approx(metrics, rel=1e-5)
        finally:
            wandb.finish()

    def test_mlflow(self, page):
        pytest.importorskip("mlflow")
        from lightning.pytorch.loggers import MLFlowLogger

        metrics = run_block(page, "MLFlowLogger")
        logger = page["logger"]
        assert_arrived(logger.experiment.get_run(logger.run_id).data.metrics, metrics)
        images = [file.path for file in logger.experiment.list_artifacts(logger.run_id, "test/reliability")]
        assert images == ["test/reliability/all_methods-2.png"]
        later = MLFlowLogger("obqa", tracking_uri="sqlite:///logs/mlflow.db")
        assert later_run(page, later) == pytest.approx(metrics, rel=1e-5)

    def test_several(self, tmp_path):
        """Those that have only what every logger has, and TensorBoard, which alone gets sub-runs."""
        one, two = Recorder("one"), Recorder("two")
        tensorboard = TensorBoardLogger(tmp_path, name="tb", version="run")
        run = trainer(tmp_path, [BayesianMoECallback(METHODS)], logger=[one, tensorboard, two], max_epochs=1)
        module = ToyModule()
        run.fit(module, loader(32, 1), calibration_loader())
        [metrics] = run.test(module, test_loader(), verbose=False)
        assert_arrived(one.metrics, metrics)
        assert one.metrics == two.metrics
        sub_runs = sorted(path.name for path in (tmp_path / "tb" / "run" / "methods").iterdir() if path.is_dir())
        assert sub_runs == sorted(METHODS)


def wandb_logger(project):
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(project=project, save_dir="logs", offline=True)
