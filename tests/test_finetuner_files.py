"""What the fine-tuner loads and saves: models, checkpoints, snapshots, its arguments in YAML."""

import warnings

import pytest
import torch
from finetuner_cases import CALIBRATION, DOWN, EXPERTS, TEST, TRAIN, copied, finetuner, qwen, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from published import write_published_folder
from transformers import LlamaConfig, LlamaForCausalLM

from bmoe_lightning.data import MultipleChoiceDataModule, Splits, get_prompt_format, train_word_tokenizer
from bmoe_lightning.finetuner import ExpertFinetuner
from bmoe_lightning.methods import save_snapshot, swapped_weights


@pytest.fixture(scope="module")
def tokenizer():
    prompts = [get_prompt_format("letters").render(question) for question in (*TRAIN, *CALIBRATION, *TEST)]
    return train_word_tokenizer(prompts, max_vocab=100)


@pytest.fixture
def data(tokenizer):
    return MultipleChoiceDataModule(
        Splits(TRAIN, CALIBRATION, TEST), tokenizer, prompt="letters", batch_size=4, eval_batch_size=3
    )


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
    with pytest.raises(
        RuntimeError, match=r"says train='down_proj'\): missing are .*gate_up_proj.*, unexpected are none"
    ):
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


def test_can_be_written_in_yaml(folder):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(ExpertFinetuner, "module")
    values = parser.parse_args([f"--module.model={folder}", "--module.betas=[0.8, 0.9]", "--module.train=down_proj"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    module = instantiate(values).module
    assert (module.betas, module.train_part, module.hparams["model"]) == ((0.8, 0.9), "down_proj", str(folder))
