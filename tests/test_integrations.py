"""The callback with LightningCLI, a sequence classifier, and loggers: the code of docs/integrations.md."""

from __future__ import annotations

import csv
import re
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from datamodule_cases import write
from finetuner_cases import CALIBRATION, TEST, TRAIN, qwen
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from oracles.dense import dense_logit_covariance, low_rank_blocks, observe, weight_jacobians
from oracles.factors import assert_dense, assert_same, dense_of
from serving_cases import data_of
from torch.utils.data import DataLoader
from toy import ToyModule, calibration_loader, loader, test_loader, trainer
from transformers import AutoModelForSequenceClassification, MixtralConfig, Qwen2MoeConfig

from bmoe_lightning import BayesianMoECallback, ExpertFinetuner, MultipleChoiceDataModule, PredictionWriter
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.data.files import file_rows
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.lora_finetuner import LoRAFinetuner

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
METHODS = ("map", "temperature", "laplace_lpo")
METRICS = ("acc", "ece", "nll", "brier")


def block(heading, language, containing=""):
    """A block of the page, below a heading."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    [code] = [code for code in found if containing in code]
    return code


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


SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_labels": 3,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
CONFIGS = {
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def classifier(family, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(CONFIGS[family]()).to(dtype).eval()
    model.set_experts_implementation("eager")
    return model


def padded(side="right", rows=6, seed=1):
    """Rows of different lengths with padding, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 24, (rows, 7), generator=generator)
    lengths = torch.randint(2, 8, (rows, 1), generator=generator)
    place = torch.arange(7)
    mask = (place < lengths if side == "right" else place >= 7 - lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "label": torch.arange(rows) % 3}


def class_logits(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits, batch["label"]


def plain_rows(batch):
    """Each row by itself, without its padding."""
    for row in range(len(batch["label"])):
        kept = batch["attention_mask"][row].bool()
        yield {name: value[row : row + 1, ...][..., kept] if value.dim() > 1 else value[row : row + 1]
               for name, value in batch.items()}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
class TestSequenceClassification:
    def test_factors_are_those_of_the_definition(self, family):
        model, batch = classifier(family), padded()
        layers = find_expert_layers(model)
        assert [layer.num_experts for layer in layers] == [4, 4]
        factors = collect_factors(model, class_logits, [batch], rank=100, sketch="exact")
        assert_dense(factors, dense_of(model, class_logits, batch, "expand"), 1e-6)  # RMSNorm in float32
        # Neither padding nor what follows the pooled token counts.
        alone = collect_factors(model, class_logits, list(plain_rows(batch)), rank=100, sketch="exact")
        assert_same(factors, alone, 1e-9)

    def test_predictions_are_those_of_dense_matrices(self, family):
        model, batch = classifier(family), padded()
        posterior = LaplacePosterior(collect_factors(model, class_logits, [padded(seed=2)], rank=100, sketch="exact"))
        posterior = posterior.with_prior_precision(2.0)
        logits, found = posterior.logit_covariance(model, class_logits, batch)
        expected_logits, _ = observe(model, class_logits, batch)
        torch.testing.assert_close(logits, expected_logits.detach())
        weights = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
        jacobians = weight_jacobians(class_logits(model, batch)[0], weights)
        blocks = [low_rank_blocks(layer) for layer in posterior.factors.layers]
        torch.testing.assert_close(found, dense_logit_covariance(jacobians, blocks, [2.0, 2.0]), rtol=1e-6, atol=1e-9)
        log_probs = posterior.predict(model, class_logits, batch, link="mc", num_samples=100)
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(6, dtype=torch.float64))

    def test_without_variance_they_are_the_model_s(self, family):
        model, batch = classifier(family), padded()
        posterior = LaplacePosterior(collect_factors(model, class_logits, [batch], rank=4), prior_precision=1e20)
        with torch.no_grad():
            expected = class_logits(model, batch)[0].log_softmax(-1)
        for link in ("mc", "probit"):
            found = posterior.predict(model, class_logits, batch, link=link)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, family, side):
        model, batch = classifier(family), padded(side)
        posterior = LaplacePosterior(collect_factors(model, class_logits, [padded(seed=2)], rank=4))
        whole = posterior.logit_covariance(model, class_logits, batch)
        alone = [posterior.logit_covariance(model, class_logits, row) for row in plain_rows(batch)]
        for found, parts in zip(whole, zip(*alone, strict=True), strict=True):
            # Padding on the left shifts positions, whose rotations are rounded to float32.
            torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-6)

    def test_the_page_s_module_with_the_callback(self, family, tmp_path):
        page = {"L": L, "__name__": "page"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(block("Sequence classification", "python").partition("\n# Yours")[0], page)
        model = classifier(family, torch.float32)
        module = page["Classifier"](model)
        callback = BayesianMoECallback(METHODS, predict_method="laplace_lpo", dirpath=str(tmp_path / "fit"))
        writer = PredictionWriter(str(tmp_path / "rows.jsonl"), class_names=["bad", "neutral", "good"])
        data = {name: DataLoader(Rows(size, seed), 8, collate_fn=stack) for name, size, seed in SPLITS}
        run = trainer(tmp_path, [callback, writer], max_epochs=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # padding that changes logits is warned of
            warnings.filterwarnings("ignore", "(?s).*(does not have many workers|LeafSpec|few|labels).*")
            run.fit(module, data["train"], data["calibration"])
        metrics = run.test(module, data["test"], verbose=False)[0]
        assert float(callback.fitted.state_of(callback.methods[2])["prior_precision"].min()) > 0
        batches = run.predict(module, data["test"])
        found = torch.cat([batch["log_probs"] for batch in batches])
        torch.testing.assert_close(found, callback.predictions["test"]["laplace_lpo"].log_probs)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(len(found), dtype=torch.float64))
        labels = torch.cat([batch["label"] for batch in data["test"]])
        nll = -found.gather(1, labels.unsqueeze(1)).mean()
        assert metrics["laplace_lpo/test/nll"] == pytest.approx(float(nll), rel=1e-5)
        rows = [row for _, row in file_rows(tmp_path / "rows.jsonl")]
        assert [row["answer"] for row in rows] == [("bad", "neutral", "good")[label] for label in labels.tolist()]


SPLITS = (("train", 24, 5), ("calibration", 16, 6), ("test", 12, 7))


class Rows(torch.utils.data.Dataset):
    def __init__(self, size, seed):
        self.batch = padded(rows=size, seed=seed)

    def __len__(self):
        return len(self.batch["label"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


def stack(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


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
