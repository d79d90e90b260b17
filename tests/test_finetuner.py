import math
import warnings

import lightning as L
import pytest
import torch
from fake_trainer import FakeMesh
from finetuner_cases import CALIBRATION, DOWN, EXPERTS, TEST, TRAIN, copied, finetuner, prepare, qwen, trainer
from lightning.pytorch.callbacks import Callback
from oracles.models import as_modules, toy_model
from oracles.waits import Waits
from published import write_published_folder

from bmoe_lightning.curvature.kfac import collect_factors
from bmoe_lightning.data import MultipleChoiceDataModule, Splits, get_prompt_format, train_word_tokenizer
from bmoe_lightning.experts.layouts.intercept import expert_state
from bmoe_lightning.finetuner import ExpertFinetuner


@pytest.fixture(scope="module")
def tokenizer():
    prompts = [get_prompt_format("letters").render(question) for question in (*TRAIN, *CALIBRATION, *TEST)]
    return train_word_tokenizer(prompts, max_vocab=100)


@pytest.fixture
def data(tokenizer):
    return MultipleChoiceDataModule(
        Splits(TRAIN, CALIBRATION, TEST), tokenizer, prompt="letters", batch_size=4, eval_batch_size=3
    )


def states(module):
    return [expert_state(m) for n, m in module.named_modules() if n.endswith("mlp.experts")]


class Spy(Callback):
    """Notes, at each step, what the module under training looks like."""

    def __init__(self, fail_at=None, error=RuntimeError):
        self.fail_at, self.error, self.seen = fail_at, error, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((all(m.training for m in pl_module.modules()), pl_module.model.get_experts_implementation()))
        if self.fail_at == batch_idx:
            raise self.error("stop")


@pytest.mark.parametrize(("part", "expected"), [("experts", EXPERTS), ("down_proj", DOWN)])
def test_trains_the_experts_and_nothing_else(data, tmp_path, part, expected):
    module = finetuner(train=part)
    before = copied(module)
    trainer(tmp_path).fit(module, datamodule=data)
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == expected
    assert set(module.trained_parameters()) == expected
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == expected
    assert module.trained_parameters()[next(iter(expected))] is module.get_parameter(next(iter(expected)))


def test_trains_experts_that_are_separate_modules():
    model = as_modules(toy_model())
    module = ExpertFinetuner(model, [3, 4, 5], train="down_proj")
    module.configure_model()
    assert set(module.trained_parameters()) == {
        f"model.layers.{i}.mixture.crew.{e}.fall.weight" for i in (0, 1) for e in range(4)
    }
    module = ExpertFinetuner(model, [3, 4, 5])
    module.configure_model()
    assert len(module.trained_parameters()) == 2 * 4 * 3
    assert not model.layers[0].mixture.router.weight.requires_grad


def test_lowers_the_loss_and_logs_it(data, tmp_path):
    module, losses = finetuner(expert_dropout=0.0, learning_rate=0.03), []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))
            assert trainer.callback_metrics["train/loss"] == pytest.approx(losses[-1])

    run = trainer(tmp_path, Losses(), max_epochs=10)
    run.fit(module, datamodule=data)
    assert sum(losses[-3:]) < sum(losses[:3]) / 2
    assert {"val/loss", "val/acc"} <= set(run.callback_metrics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_without_dropout_the_models_own_implementation_trains(data, tmp_path, dtype, implementation):
    # Torch's grouped product wants rows of a multiple of 16 bytes, in bfloat16 of 8 numbers.
    model = qwen(dtype=dtype, implementation=implementation, moe_intermediate_size=16)
    module = finetuner(model, expert_dropout=0.0)
    before, spy = copied(module), Spy()
    trainer(tmp_path, spy).fit(module, datamodule=data)
    assert {seen for _, seen in [(t, str(i)) for t, i in spy.seen]} == {str({"": implementation})}
    assert all(not torch.equal(module.get_parameter(name), before[name]) for name in EXPERTS)


def test_a_model_in_evaluation_mode_trains_in_training_mode(data, tmp_path):
    model = qwen()
    assert not model.training
    spy = Spy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, spy).fit(finetuner(model), datamodule=data)
    assert not any("eval mode" in str(warning.message) for warning in caught)
    assert spy.seen
    assert all(training for training, _ in spy.seen)


def test_dropout_is_on_in_training_only_and_gone_afterwards(data, tmp_path):
    module, spy, outputs = finetuner(expert_dropout=0.5), Spy(), {"train": [], "val": []}

    class Twice(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                outputs["train"].append([pl_module.class_logits(batch)[0] for _ in range(2)])

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            outputs["val"].append([pl_module.class_logits(batch)[0] for _ in range(2)])

    trainer(tmp_path, spy, Twice()).fit(module, datamodule=data)
    assert {str(implementation) for _, implementation in spy.seen} == {"{'': 'bmoe'}"}
    assert all(not torch.equal(*pair) for pair in outputs["train"])
    assert all(torch.equal(*pair) for pair in outputs["val"])
    assert module.model.get_experts_implementation() == {"": "grouped_mm"}
    assert states(module) == [None, None]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_dropout_is_gone_after_an_exception_half_way(data, tmp_path, error):
    module = finetuner()
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, Spy(fail_at=1, error=error)).fit(module, datamodule=data)
    assert module.model.get_experts_implementation() == {"": "grouped_mm"}
    assert states(module) == [None, None]
    spy = Spy()
    trainer(tmp_path, spy).fit(module, datamodule=data)
    assert len(spy.seen) == 3
    assert module.model.get_experts_implementation() == {"": "grouped_mm"}


def test_a_trainer_can_be_used_again_for_any_module(data, tmp_path, caplog):
    run, spy = trainer(tmp_path), Spy(fail_at=1)
    run.fit(finetuner(), datamodule=data)
    run.test(finetuner(), datamodule=data, verbose=False)
    assert not any("override" in record.getMessage() for record in caplog.records)
    run.callbacks.append(spy)
    module = finetuner()
    run.fit_loop.max_epochs = 2
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(module, datamodule=data)
    assert states(module) == [None, None]

    class Other(L.LightningModule):
        def test_step(self, batch, batch_idx):
            raise OSError("its own")

    with pytest.raises(OSError, match="its own"):
        run.test(Other(), datamodule=data, verbose=False)


def test_dropout_of_separate_modules_leaves_no_hook(tmp_path):
    model = as_modules(toy_model())
    module = ExpertFinetuner(model, [3, 4, 5])
    hooks = lambda: sum(len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    module.trainer = trainer(tmp_path)
    module.on_train_start()
    assert hooks() == 8
    module.on_train_end()
    module.teardown("fit")
    assert hooks() == 0


def test_sanity_check_and_fast_dev_run(data, tmp_path):
    module = finetuner()
    trainer(tmp_path, fast_dev_run=True).fit(module, datamodule=data)
    trainer(tmp_path, num_sanity_val_steps=2, limit_train_batches=1).fit(module, datamodule=data)
    assert states(module) == [None, None]


def test_a_nan_loss_is_the_trainers_matter(data, tmp_path):
    model = qwen()
    model.lm_head.weight.data[:] = torch.nan
    module = finetuner(model)
    trainer(tmp_path, num_sanity_val_steps=0, limit_val_batches=0).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match=r"NaN or \+inf.*lower the learning rate"):
        collect_factors(module, lambda m, b: m.class_logits(b), [batch])


def test_a_training_step_waits_for_no_device(data):
    """Apart from the model's own forward, whose padding decides about shapes."""
    module = finetuner()
    prepare(module, data)
    module.log = lambda *_, **__: None
    batch = next(iter(data.train_dataloader()))
    with Waits() as forward:
        module.class_logits(batch)
    with Waits() as step:
        module.training_step(batch, 0)
    assert step.count == forward.count


def test_tensor_parallelism_is_refused():
    module = finetuner()
    module._device_mesh = FakeMesh(data_parallel=2, tensor_parallel=2)
    with pytest.raises(ValueError, match=r"tensor-parallel group of 2 .*data_parallel_size=4, tensor_parallel_size=1"):
        module.configure_model()


@pytest.fixture
def folder(tmp_path):
    """A model folder in the published layout."""
    return write_published_folder(tmp_path / "published", qwen(seed=2))


def test_the_optimiser_is_the_papers_and_steps_its_schedule(data, tmp_path):
    module, rates = ExpertFinetuner(qwen()), []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run = trainer(tmp_path, Rates(), max_epochs=2)
    run.fit(module, datamodule=data)
    group = run.optimizers[0].param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.0)
    assert len(group["params"]) == len(EXPERTS)
    assert rates == pytest.approx([5e-5 * (6 - step) / 6 for step in range(6)])
    assert module.hparams["expert_dropout"] == 0.1


def test_a_schedule_without_an_end_is_refused(data, tmp_path):
    run = trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match="set max_steps or max_epochs"):
        run.fit(finetuner(), datamodule=data)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train": "router"}, "unknown train 'router'; valid are down_proj, experts"),
        ({"schedule": "step"}, "unknown schedule"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"warmup_fraction": 1.0}, "warmup_fraction must be"),
        ({"expert_dropout": 1.0}, "expert_dropout must be"),
        ({"answer_token_ids": [3, 3]}, "two or more different"),
        ({"answer_token_ids": [3]}, "two or more different"),
    ],
)
def test_refuses_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        ExpertFinetuner(qwen(), **options)


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="Linear; pass a transformers model"):
        ExpertFinetuner(torch.nn.Linear(2, 2))


def test_hyperparameters_are_plain(data):
    data.setup()
    module = finetuner(answer_token_ids=data.answer_token_ids, betas=[0.8, 0.9])
    assert module.hparams["answer_token_ids"] == data.answer_token_ids.tolist()
    assert module.hparams["betas"] == (0.8, 0.9)
    assert "model" not in module.hparams
