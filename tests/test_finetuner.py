import math
import warnings

import lightning as L
import pytest
import torch
from fake_trainer import FakeMesh
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from oracles.models import as_modules, tiny_qwen, toy_model
from oracles.waits import Waits
from published import write_published_folder
from transformers import LlamaConfig, LlamaForCausalLM

from bmoe_lightning.curvature.kfac import collect_factors
from bmoe_lightning.data import MultipleChoiceDataModule, Question, Splits, get_prompt_format, train_word_tokenizer
from bmoe_lightning.experts.layouts.intercept import expert_state
from bmoe_lightning.finetuner import ExpertFinetuner
from bmoe_lightning.methods import save_snapshot, swapped_weights

EXPERTS = {f"model.model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")}
DOWN = {name for name in EXPERTS if name.endswith("down_proj")}


def make(number, part, choices=4):
    return Question(
        f"{part}{number}", f"is {part} number{number} ?", tuple(f"c{i}" for i in range(choices)), number % 3
    )


TRAIN = tuple(make(i, "train", 3 if i % 4 == 1 else 4) for i in range(12))
CALIBRATION = tuple(make(i, "held") for i in range(5))
TEST = tuple(make(i, "test", 3 if i % 2 else 4) for i in range(7))


@pytest.fixture(scope="module")
def tokenizer():
    prompts = [get_prompt_format("letters").render(question) for question in (*TRAIN, *CALIBRATION, *TEST)]
    return train_word_tokenizer(prompts, max_vocab=100)


@pytest.fixture
def data(tokenizer):
    return MultipleChoiceDataModule(
        Splits(TRAIN, CALIBRATION, TEST), tokenizer, prompt="letters", batch_size=4, eval_batch_size=3
    )


def qwen(seed=0, **options):
    return tiny_qwen(seed, **{"vocab_size": 100, "dtype": torch.float32, "implementation": "grouped_mm", **options})


def finetuner(model=None, **options):
    return ExpertFinetuner(qwen() if model is None else model, **{"learning_rate": 0.01, **options})


def trainer(folder, *callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **options})


def copied(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def states(module):
    return [expert_state(m) for n, m in module.named_modules() if n.endswith("mlp.experts")]


def prepare(module, data):
    """What a trainer does before it runs either."""
    data.setup()
    module._answer_ids = data.answer_token_ids


class Spy(Callback):
    """Notes, at each step, what the module under training looks like."""

    def __init__(self, fail_at=None, error=RuntimeError):
        self.fail_at, self.error, self.seen = fail_at, error, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((all(m.training for m in pl_module.modules()), pl_module.model.get_experts_implementation()))
        if self.fail_at == batch_idx:
            raise self.error("stop")


# What is trained


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


# Modes and dropout


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


# Class logits


def test_class_logits_are_the_answer_tokens_at_the_last_real_position(data):
    module = finetuner()
    prepare(module, data)
    for batch in data.test_dataloader():
        logits, labels = module.class_logits(batch)
        assert logits.dtype == torch.float32
        assert torch.equal(labels, batch["label"])
        assert torch.equal(logits == -torch.inf, ~batch["choice_mask"])
        for row in range(len(labels)):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            alone = module.model(input_ids=ids[None]).logits[0, -1, data.answer_token_ids]
            present = batch["choice_mask"][row]
            torch.testing.assert_close(logits[row][present], alone[present], rtol=1e-4, atol=1e-5)


def test_right_padding_gives_the_same_logits(data):
    module = finetuner()
    prepare(module, data)
    batch = next(iter(data.train_dataloader()))
    batch["input_ids"][0, :2], batch["attention_mask"][0, :2] = 0, 0
    lengths = batch["attention_mask"].sum(1)
    right = dict(batch)
    for name in ("input_ids", "attention_mask"):
        rows = [row.roll(int(n) - len(row)) for row, n in zip(batch[name], lengths, strict=True)]
        right[name] = torch.stack(rows)
    assert lengths.min() < lengths.max()
    assert not right["attention_mask"][:, -1].all()
    torch.testing.assert_close(module.class_logits(right)[0], module.class_logits(batch)[0], rtol=1e-4, atol=1e-5)


def test_left_padding_asks_the_model_for_one_position_only(data):
    module = finetuner(qwen(output_router_logits=True))
    prepare(module, data)
    widths, seen = [], []
    module.model.lm_head.register_forward_hook(lambda m, inputs, output: widths.append(output.shape[1]))
    module.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    module.class_logits(next(iter(data.test_dataloader())))
    assert widths == [1]
    assert (seen[0]["use_cache"], seen[0]["output_router_logits"]) == (False, False)


def test_a_batch_needs_no_labels_choices_or_index(data):
    module = finetuner()
    prepare(module, data)
    batch = next(iter(data.test_dataloader()))
    bare = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, labels = module.class_logits(bare)
    assert labels is None
    assert bool(logits.isfinite().all())
    with pytest.raises(ValueError, match="no 'label'"):
        module.training_step(bare, 0)


def test_refuses_another_number_of_choices(data):
    module = finetuner(answer_token_ids=[2, 3, 4])
    data.setup()
    with pytest.raises(ValueError, match="3 answer tokens"):
        module.class_logits(next(iter(data.test_dataloader())))


def test_says_what_it_lacks():
    with pytest.raises(RuntimeError, match="answer tokens are not known"):
        finetuner().class_logits({})
    with pytest.raises(RuntimeError, match="not loaded yet"):
        finetuner("some/model").trained_parameters()


# Evaluation


def test_test_and_predict_agree_with_class_logits(data, tmp_path):
    module = finetuner()
    run = trainer(tmp_path)
    logged = run.test(module, datamodule=data, verbose=False)[0]
    parts = run.predict(module, datamodule=data)
    assert set(parts[0]) == {"log_probs", "index"}
    log_probs = torch.cat([part["log_probs"] for part in parts])
    assert torch.cat([part["index"] for part in parts]).tolist() == list(range(len(TEST)))
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(TEST)))
    labels = torch.tensor([question.answer for question in TEST])
    assert logged["test/loss"] == pytest.approx(float(torch.nn.functional.nll_loss(log_probs, labels)), rel=1e-5)
    assert logged["test/acc"] == pytest.approx(float((log_probs.argmax(-1) == labels).float().mean()))


def test_answer_tokens_come_from_the_datamodule_or_the_argument(data, tmp_path):
    module = finetuner()
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert torch.equal(module._answer_ids, data.answer_token_ids)
    given = finetuner(answer_token_ids=(9, 8, 7, 6))
    trainer(tmp_path).test(given, datamodule=data, verbose=False)
    assert given._answer_ids.tolist() == [9, 8, 7, 6]
    with pytest.raises(ValueError, match="answer tokens are unknown"):
        trainer(tmp_path).test(finetuner(), dataloaders=data.test_dataloader(), verbose=False)


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


# Checkpoints


def test_a_checkpoint_holds_what_was_trained_and_no_more(data, tmp_path):
    module = finetuner(train="down_proj")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, saver).fit(module, datamodule=data)
    checkpoint = torch.load(saver.last_model_path, weights_only=True)
    assert set(checkpoint["state_dict"]) == DOWN
    assert "model" not in checkpoint["hyper_parameters"]
    assert checkpoint["answer_token_ids"] == data.answer_token_ids.tolist()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found keys")
        loaded = ExpertFinetuner.load_from_checkpoint(saver.last_model_path, model=qwen())
    assert loaded.hparams == module.hparams
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(loaded.eval().class_logits(batch)[0], module.eval().class_logits(batch)[0])


def test_resume_goes_on_where_training_stopped(data, tmp_path):
    data.setup()
    options = {"answer_token_ids": data.answer_token_ids, "expert_dropout": 0.0}
    loader = data.curvature_dataloader()  # in order, so that an epoch is the same whenever it comes
    whole, saver = finetuner(**options), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer(tmp_path, saver, max_epochs=2).fit(whole, loader)
    resumed = finetuner(**options)
    trainer(tmp_path, max_epochs=2).fit(resumed, loader, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    once = finetuner(**options)
    trainer(tmp_path, max_epochs=1).fit(once, loader)
    for name in EXPERTS:
        assert not torch.equal(once.get_parameter(name), whole.get_parameter(name))
        torch.testing.assert_close(resumed.get_parameter(name), whole.get_parameter(name))


def test_refuses_a_checkpoint_of_other_parameters(data, tmp_path):
    module, saver = finetuner(train="down_proj"), ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, saver).fit(module, datamodule=data)
    with pytest.raises(RuntimeError, match=r"says 'down_proj'\): missing are .*gate_up_proj.*, unexpected are none"):
        trainer(tmp_path).test(finetuner(), datamodule=data, ckpt_path=saver.last_model_path, verbose=False)
    with pytest.raises(RuntimeError, match=r"missing are none, unexpected are .*layers\.1"):
        ExpertFinetuner.load_from_checkpoint(saver.last_model_path, model=qwen(num_hidden_layers=1))


def test_snapshots_fit_the_module_they_came_from(data, tmp_path):
    module = finetuner()
    before = copied(module)
    trainer(tmp_path).fit(module, datamodule=data)
    save_snapshot(tmp_path / "s", module.trained_parameters())
    fresh = finetuner()
    with swapped_weights(fresh, tmp_path / "s"):
        assert all(torch.equal(fresh.get_parameter(name), module.get_parameter(name)) for name in before)
    assert all(torch.equal(fresh.get_parameter(name), value) for name, value in before.items())


# Models by name


@pytest.fixture
def folder(tmp_path):
    """A model folder in the published layout."""
    return write_published_folder(tmp_path / "published", qwen(seed=2))


def test_loads_a_folder_in_the_published_layout(folder, data, tmp_path):
    module = finetuner(str(folder))
    saver = ModelCheckpoint(tmp_path / "c", save_last=True)
    trainer(tmp_path, saver).fit(module, datamodule=data)
    original = qwen(seed=2).state_dict()
    for name, value in original.items():
        changed = not torch.equal(module.model.state_dict()[name], value)
        assert changed == (f"model.{name}" in EXPERTS)
    loaded = ExpertFinetuner.load_from_checkpoint(saver.last_model_path)
    assert loaded.hparams["model"] == str(folder)
    for name, parameter in module.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert trainer(tmp_path).test(loaded, datamodule=data, verbose=False)


def test_the_dtype_is_as_asked(folder):
    module = finetuner(str(folder), dtype="bfloat16")
    module.configure_model()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_loading_again_keeps_the_model(folder):
    module = finetuner(str(folder))
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model


def test_a_model_without_experts_is_refused_at_once(tmp_path):
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no expert layers"):
        finetuner(dense)
    dense.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no expert layers"):
        finetuner(str(tmp_path)).configure_model()


# Settings


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


def test_can_be_written_in_yaml(folder):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(ExpertFinetuner, "module")
    values = parser.parse_args([f"--module.model={folder}", "--module.betas=[0.8, 0.9]", "--module.train=down_proj"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    module = instantiate(values).module
    assert (module.betas, module.train_part, module.hparams["model"]) == ((0.8, 0.9), "down_proj", str(folder))
