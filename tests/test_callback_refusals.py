"""What the callback refuses, before time is spent."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.utils.data import DataLoader, IterableDataset
from toy import (
    LAPLACE,
    ToyData,
    ToyModule,
    calibration_loader,
    loader,
    test_loader,
    train_loader,
    trainer,
)

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature, ExpertLayers


class TestRefusals:
    def test_module_without_class_logits(self, tmp_path):
        class Plain(ToyModule):
            class_logits = None

        with pytest.raises(TypeError, match="class_logits"):
            trainer(tmp_path, [BayesianMoECallback()]).fit(Plain(), train_loader(), calibration_loader())

    def test_class_logits_as_an_argument(self, tmp_path):
        class Renamed(ToyModule):
            def scores(self, batch):
                return ToyModule.class_logits(self, batch)

            def training_step(self, batch, batch_idx):
                logits, labels = self.scores(batch)
                return torch.nn.functional.cross_entropy(logits, labels)

            def validation_step(self, batch, batch_idx):
                return None

            class_logits = None

        callback = BayesianMoECallback(class_logits=lambda module, batch: module.scores(batch))
        trainer(tmp_path, [callback], max_epochs=1).fit(Renamed(), train_loader(), calibration_loader())
        assert callback.fitted is not None

    def test_model_without_experts(self, tmp_path):
        class NoExperts(ToyModule):
            def __init__(self):
                super().__init__()
                self.network = torch.nn.Linear(2, 2)

        with pytest.raises(ValueError, match="no expert layers"):
            trainer(tmp_path, [BayesianMoECallback()]).fit(NoExperts(), train_loader(), calibration_loader())

    def test_no_validation_data_is_noticed_before_training(self, tmp_path):
        module = ToyModule()
        before = next(module.parameters()).clone()
        with pytest.raises(ValueError, match="validation split"):
            trainer(tmp_path, [BayesianMoECallback()]).fit(module, train_loader())
        torch.testing.assert_close(next(module.parameters()), before)

    def test_too_few_inputs_for_the_evidence_temperature_are_noticed_before_training(self, tmp_path):
        module = ToyModule()
        before = next(module.parameters()).clone()
        callback = BayesianMoECallback(methods=("map", "evidence_temperature"))
        with pytest.raises(ValueError, match="at least 100 inputs"):
            trainer(tmp_path, [callback]).fit(module, train_loader(), loader(48, 2))
        torch.testing.assert_close(next(module.parameters()), before)

    def test_endless_training_data_need_a_cap(self, tmp_path):
        class Stream(IterableDataset):
            def __iter__(self):
                data = ToyData(64, 1)
                return (data[i % 64] for i in range(10_000))

        options = {"max_steps": 4, "max_epochs": None}
        stream = DataLoader(Stream(), batch_size=16)
        with pytest.raises(RuntimeError, match="max_batches"):
            trainer(tmp_path, [BayesianMoECallback()], **options).fit(ToyModule(), stream, calibration_loader())
        callback = BayesianMoECallback(curvature=Curvature(max_batches=3))
        trainer(tmp_path, [callback], **options).fit(ToyModule(), stream, calibration_loader())
        (posterior,) = callback.fitted.posteriors.values()
        assert posterior.factors.num_examples == 48

    def test_several_validation_loaders(self, tmp_path):
        class Lists(ToyModule):
            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                return None

        with pytest.raises(RuntimeError, match="validation loader"):
            trainer(tmp_path, [BayesianMoECallback()]).fit(
                Lists(), train_loader(), [calibration_loader(), calibration_loader()]
            )

    def test_callbacks_that_change_weights_must_come_first(self, tmp_path):
        averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
        with pytest.raises(ValueError, match="StochasticWeightAveraging"):
            trainer(tmp_path, [BayesianMoECallback(), averaging]).fit(ToyModule(), train_loader(), calibration_loader())

    def test_one_epoch_makes_no_checkpoint_ensemble(self, tmp_path):
        callback = BayesianMoECallback(methods=("map", "checkpoint_ensemble"))
        with pytest.raises(ValueError, match="at least 2 epochs, and there will be 1"):
            trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(), train_loader())

    def test_experts_that_only_the_user_can_name(self, tmp_path):
        class Square(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.router = torch.nn.Linear(8, 3)
                make = lambda: torch.nn.ModuleDict({"up": torch.nn.Linear(8, 8), "out": torch.nn.Linear(8, 8)})  # noqa: E731
                self.mlps = torch.nn.ModuleList(make() for _ in range(3))

            def forward(self, x):
                weight, chosen = self.router(x).softmax(-1).max(-1)
                y = torch.zeros_like(x)
                for i, mlp in enumerate(self.mlps):
                    rows = (chosen == i).nonzero().squeeze(1)
                    y = y.index_copy(0, rows, mlp["out"](mlp["up"](x[rows]).relu()))
                return y * weight.unsqueeze(1)

        class Module(ToyModule):
            def __init__(self):
                super().__init__()
                self.network = torch.nn.Sequential(torch.nn.Embedding(24, 8), Square(), torch.nn.Linear(8, 3))

            def class_logits(self, batch):
                return self.network(batch["input_ids"][:, 0]), batch.get("labels")

        with pytest.raises(ValueError, match="down_proj="):
            trainer(tmp_path, [BayesianMoECallback()], max_epochs=1).fit(Module(), train_loader(), calibration_loader())
        callback = BayesianMoECallback(
            LAPLACE, curvature=Curvature(layers=ExpertLayers(experts="*mlps", down_proj="out"))
        )
        module = Module()
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())
        assert "laplace_lpo/test/nll" in run.test(module, test_loader(), verbose=False)[0]

    def test_best_without_a_monitor(self, tmp_path):
        with pytest.raises(ValueError, match="monitor"):
            trainer(tmp_path, [BayesianMoECallback(fit_at="best")]).fit(
                ToyModule(), train_loader(), calibration_loader()
            )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"methods": ("map", "magic")}, "magic"),
            ({"methods": ()}, "no method"),
            ({"methods": ("map", "map")}, "distinct"),
            ({"fit_at": "middle"}, "fit_at"),
            (
                {"predict_method": "temperature"},
                "unknown predict_method 'temperature'; valid are map, shrunk_temperature, laplace_lpo",
            ),
            ({"curvature_checkpoint_every": 0}, "curvature_checkpoint_every must be at least 1, got 0"),
            ({"methods": ("deep_ensemble",)}, "pass runs="),
            ({"methods": ("evidence_temperature",), "curvature": Curvature(fisher="mc")}, "exact"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            BayesianMoECallback(**options)

    def test_skipping_a_layer_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="skip_layers"):
            trainer(tmp_path, [BayesianMoECallback(curvature=Curvature(skip_layers=(7,)))]).fit(
                ToyModule(), train_loader(), calibration_loader()
            )
