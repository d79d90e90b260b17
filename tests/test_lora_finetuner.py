"""The fine-tuner of low-rank updates: what it adds to a model, trains, saves and refuses."""

import importlib.util
import math

import pytest
import torch
from finetuner_cases import CALIBRATION, TEST, TRAIN, copied, prepare, qwen, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from published import write_published_folder
from transformers import LlamaConfig, LlamaForCausalLM

from bmoe_lightning import LoRAFinetuner
from bmoe_lightning.data import MultipleChoiceDataModule, Splits, get_prompt_format, train_word_tokenizer
from bmoe_lightning.models.answer_logits import answer_logits
from bmoe_lightning.optim import MasterWeightAdamW

peft = pytest.importorskip("peft")

ATTENTION = {
    f"model.model.layers.{i}.self_attn.{name}_proj.lora_{matrix}.default.weight"
    for i in (0, 1)
    for name in "qv"
    for matrix in "AB"
}
MATRICES = ATTENTION | {f"model.lm_head.lora_{matrix}.default.weight" for matrix in "AB"}


def finetuner(model=None, **options):
    return LoRAFinetuner(qwen() if model is None else model, **{"learning_rate": 0.01, **options})


def prepared(model=None, **options):
    module = finetuner(model, **options)
    module.configure_model()
    return module


def first(module):
    """The initial A of the adapted layers, by name."""
    return {name: p.detach() for name, p in module.trained_parameters().items() if ".lora_A." in name}


@pytest.fixture(scope="module")
def tokenizer():
    prompts = [get_prompt_format("letters").render(question) for question in (*TRAIN, *CALIBRATION, *TEST)]
    return train_word_tokenizer(prompts, max_vocab=100)


@pytest.fixture
def data(tokenizer):
    return MultipleChoiceDataModule(
        Splits(TRAIN, CALIBRATION, TEST), tokenizer, prompt="letters", batch_size=4, eval_batch_size=3
    )


class TestModel:
    def test_begins_as_the_model_itself(self, data):
        module = prepared()
        prepare(module, data)
        batch = next(iter(data.test_dataloader()))
        expected = answer_logits(qwen(), batch, data.answer_token_ids)
        assert torch.equal(module.eval().class_logits(batch)[0], expected)
        assert all(not p.any() for name, p in module.trained_parameters().items() if ".lora_B." in name)

    def test_computes_the_update_of_lora(self):
        module = prepared(rank=3, alpha=5)
        layer = module.model.model.layers[0].self_attn.q_proj
        layer.lora_B.default.weight.data.normal_()
        x = torch.randn(4, 16)
        low = layer.lora_B.default.weight @ layer.lora_A.default.weight
        expected = layer.base_layer(x) + 5 / 3 * x @ low.T
        torch.testing.assert_close(module.eval().model.model.layers[0].self_attn.q_proj(x), expected)

    def test_the_defaults_are_those_of_bayesian_lora(self):
        module = prepared()
        (config,) = module.model.peft_config.values()
        assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
        assert config.target_modules == {"q_proj", "v_proj", "lm_head"}
        assert set(module.trained_parameters()) == MATRICES

    def test_initial_values_come_from_the_seed_alone(self):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        one = first(prepared(seed=3))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        again, other = first(prepared(seed=3)), first(prepared(seed=4))
        half = first(prepared(qwen(dtype=torch.bfloat16), seed=3))
        for name, value in one.items():
            assert torch.equal(again[name], value)
            assert not torch.equal(other[name], value)
            assert torch.equal(half[name], value.bfloat16())
            bound = 1 / math.sqrt(value.shape[1])  # of PEFT's own initialisation
            assert value.abs().max() <= bound < 1.3 * value.abs().max()

    @pytest.mark.parametrize("training", [True, False])
    def test_modes_are_left_alone(self, training):
        model = qwen().train(training)
        LoRAFinetuner(model).configure_model()
        assert {module.training for module in model.modules()} == {training}

    def test_adapters_are_added_once(self):
        module = prepared()
        names = dict(module.named_parameters()).keys()
        module.configure_model()
        assert dict(module.named_parameters()).keys() == names

    def test_a_tied_head_is_adapted_and_the_embeddings_are_not(self, data, tmp_path, recwarn):
        model = qwen(tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        module, before = finetuner(model), model.lm_head.weight.detach().clone()
        trainer(tmp_path).fit(module, datamodule=data)
        assert not any("tie_word_embeddings" in str(warning.message) for warning in recwarn)
        assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
        assert torch.equal(model.model.embed_tokens.weight, before)
        assert model.lm_head.lora_B.default.weight.any()
        assert set(module.trained_parameters()) == MATRICES

    def test_a_dense_model_has_low_rank_updates_too(self, data, tmp_path):
        module = finetuner(dense(), target_modules=["v_proj"])
        trainer(tmp_path).fit(module, datamodule=data)
        (b,) = [p for name, p in module.trained_parameters().items() if ".lora_B." in name]
        assert b.any()


def dense():
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


class TestTraining:
    def test_moves_the_matrices_and_nothing_else(self, data, tmp_path):
        module = prepared()
        before = copied(module)
        assert {name for name, p in module.named_parameters() if p.requires_grad} == MATRICES
        trainer(tmp_path).fit(module, datamodule=data)
        moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
        assert moved == MATRICES
        rows = module.model.lm_head.lora_B.default.weight.any(1).nonzero().flatten()
        assert set(rows.tolist()) == set(data.answer_token_ids.tolist())

    def test_lowers_the_loss(self, data, tmp_path):
        module, losses = finetuner(dropout=0.0, learning_rate=0.03), []

        class Losses(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                losses.append(float(outputs["loss"]))

        trainer(tmp_path, Losses(), max_epochs=10).fit(module, datamodule=data)
        assert sum(losses[-3:]) < sum(losses[:3]) / 2

    def test_dropout_is_on_in_training_alone(self, data, tmp_path):
        module, same = finetuner(dropout=0.5), {"train": [], "val": []}

        class Twice(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if batch_idx:  # before the first step B is zero
                    self.note("train", pl_module, batch)

            def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
                self.note("val", pl_module, batch)

            @torch.no_grad()
            def note(self, stage, module, batch):
                same[stage].append(torch.equal(*(module.class_logits(batch)[0] for _ in range(2))))

        trainer(tmp_path, Twice(), num_sanity_val_steps=0).fit(module, datamodule=data)
        assert set(same["train"]) == {False}
        assert set(same["val"]) == {True}

    def test_half_precision_has_master_weights(self, data, tmp_path):
        module = finetuner(qwen(dtype=torch.bfloat16, moe_intermediate_size=16), learning_rate=1e-5)
        run = trainer(tmp_path)
        run.fit(module, datamodule=data)
        assert isinstance(run.optimizers[0], MasterWeightAdamW)
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


class TestFiles:
    def test_a_checkpoint_holds_the_matrices_and_no_more(self, data, tmp_path):
        module, saver = finetuner(alpha=4, rank=2), ModelCheckpoint(tmp_path, save_last=True)
        trainer(tmp_path, saver).fit(module, datamodule=data)
        checkpoint = torch.load(saver.last_model_path, weights_only=True)
        assert set(checkpoint["state_dict"]) == MATRICES
        loaded = LoRAFinetuner.load_from_checkpoint(saver.last_model_path, model=qwen())
        assert loaded.hparams == module.hparams
        assert (loaded.rank, loaded.alpha, loaded.target_modules) == (2, 4, ("q_proj", "v_proj", "lm_head"))
        batch = next(iter(data.test_dataloader()))
        assert torch.equal(loaded.eval().class_logits(batch)[0], module.eval().class_logits(batch)[0])

    def test_resume_goes_on_where_training_stopped(self, data, tmp_path):
        data.setup()
        options = {"answer_token_ids": data.answer_token_ids, "dropout": 0.0}
        loader = data.curvature_dataloader()  # in order, so that an epoch is the same whenever it comes
        whole, saver = finetuner(**options), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        trainer(tmp_path, saver, max_epochs=2).fit(whole, loader)
        resumed = finetuner(**options)
        trainer(tmp_path, max_epochs=2).fit(resumed, loader, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
        for name in MATRICES:
            torch.testing.assert_close(resumed.get_parameter(name), whole.get_parameter(name))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": 32}, r"rank=8, alpha=32, .*says rank=8, alpha=16, .*missing are none"),
            ({"target_modules": ["q_proj"]}, r"unexpected are .*lm_head"),
        ],
    )
    def test_a_checkpoint_of_another_update_is_refused(self, data, tmp_path, options, message):
        """Another scale gives another function of equally shaped matrices."""
        saver = ModelCheckpoint(tmp_path, save_last=True)
        trainer(tmp_path, saver, limit_train_batches=1).fit(finetuner(), datamodule=data)
        with pytest.raises(RuntimeError, match=message):
            trainer(tmp_path).test(finetuner(**options), datamodule=data, ckpt_path=saver.last_model_path)

    def test_loads_a_folder(self, data, tmp_path):
        folder = write_published_folder(tmp_path / "published", qwen(seed=2))
        module = finetuner(str(folder), dtype="bfloat16", target_modules=("v_proj",))
        assert module.model is None
        module.configure_model()
        assert {p.dtype for p in module.trained_parameters().values()} == {torch.bfloat16}
        wrong = finetuner(str(folder), target_modules=["qkv"])
        with pytest.raises(ValueError, match="no linear layer called qkv"):
            wrong.configure_model()

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
    def test_peft_reads_what_the_model_saves(self, data, tmp_path):
        module = finetuner(target_modules=["q_proj", "v_proj"])
        trainer(tmp_path).fit(module, datamodule=data)
        module.model.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        served = peft.PeftModel.from_pretrained(qwen(), str(tmp_path / "adapter")).eval()
        batch = next(iter(data.test_dataloader()))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(served(**inputs).logits, module.model.eval()(**inputs).logits)

    def test_can_be_written_in_yaml(self):
        jsonargparse = pytest.importorskip("jsonargparse")
        parser = jsonargparse.ArgumentParser()
        parser.add_class_arguments(LoRAFinetuner, "module")
        values = parser.parse_args(["--module.model=m", "--module.alpha=3.5", "--module.target_modules=[k_proj]"])
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        module = instantiate(values).module
        assert (module.alpha, module.target_modules, module.hparams["rank"]) == (3.5, ("k_proj",), 8)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
            ({"rank": 2.5}, "rank must be an integer"),
            ({"alpha": 0}, "alpha must be positive"),
            ({"alpha": math.nan}, "alpha must be positive"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
            ({"target_modules": []}, "at least one linear layer"),
            (
                {"target_modules": ["q_proj", "out", "embed_tokens"]},
                r"called embed_tokens, out; .*k_proj, lm_head, o_pr",
            ),
            ({"target_modules": ["proj"]}, "no linear layer called proj"),
            ({"learning_rate": 0.0}, "learning_rate must be positive"),
            ({"schedule": "step"}, "unknown schedule"),
            ({"answer_token_ids": [3]}, "two or more different"),
        ],
    )
    def test_arguments(self, options, says):
        with pytest.raises(ValueError, match=says):
            LoRAFinetuner(qwen(), **options)

    def test_types(self):
        with pytest.raises(TypeError, match="single string 'q_proj'; put it in a list"):
            LoRAFinetuner(qwen(), target_modules="q_proj")
        with pytest.raises(TypeError, match="Linear; pass a transformers model"):
            LoRAFinetuner(torch.nn.Linear(2, 2))

    def test_a_model_with_adapters(self):
        module = prepared()
        with pytest.raises(ValueError, match=r"has 5 layers with adapters of PEFT already, 'model\.layers"):
            LoRAFinetuner(module.model)

    def test_without_peft(self, monkeypatch):
        found = importlib.util.find_spec
        monkeypatch.setattr(
            "bmoe_lightning.lora_finetuner.find_spec", lambda name: None if name == "peft" else found(name)
        )
        with pytest.raises(ImportError, match=r"needs PEFT.*install the extra lora"):
            LoRAFinetuner(qwen())

    def test_unknown_answer_tokens_name_this_class(self):
        with pytest.raises(RuntimeError, match=r"pass LoRAFinetuner\(answer_token_ids"):
            prepared().class_logits({})
