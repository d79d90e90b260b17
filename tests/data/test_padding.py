"""The padding side of a model: measured on it, used by the DataModule, or refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from unittest import mock

import lightning as L
import pytest
import torch
from oracles.models import tiny_qwen
from torch import nn

from bmoe_lightning import ExpertFinetuner
from bmoe_lightning.data.batches import Collate, EncodedQuestion
from bmoe_lightning.data.datamodule import MultipleChoiceDataModule
from bmoe_lightning.data.padding import measured_padding_side, padding_error, row_errors, shortened
from bmoe_lightning.data.prompts import get_prompt_format
from bmoe_lightning.data.questions import Question, Splits
from bmoe_lightning.data.tokenizer import train_word_tokenizer
from bmoe_lightning.models.last_logits import last_logits
from recipes.supported_models.overrides import OVERRIDES
from recipes.supported_models.tiny import build

QUESTION = EncodedQuestion(tuple(3 + i % 17 for i in range(13)), 4, 1, 0)
COLLATE = Collate(pad_id=0, num_choices=4)


def causal(model):
    return lambda batch: (last_logits(model, batch["input_ids"], batch["attention_mask"])[:, 3:7], batch["label"])


def side_of(model, class_logits=None, rows=8):
    return measured_padding_side(model, class_logits or causal(model), QUESTION, COLLATE, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_over_single_positions_takes_either(dtype):
    assert side_of(tiny_qwen().to(dtype)) == "left"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek_v4", "minimax_m3_vl"])
def test_attention_over_blocks_takes_the_right(family, dtype):
    model = nn.Module.to(build(family).model, dtype)
    assert side_of(model) == "right"
    questions = shortened(QUESTION, 8)
    logits = causal(model)
    with torch.no_grad():
        alone = torch.cat([logits(COLLATE([question]))[0] for question in questions]).double()
        right = padding_error(logits(Collate(0, 4, "right")(questions))[0].double(), alone)
        left = padding_error(logits(COLLATE(questions))[0].double(), alone)
    assert left > 0.05
    assert right < {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]


def test_padding_on_the_right_takes_no_places_of_a_limited_expert_capacity():
    settings = OVERRIDES["switch_transformers"]
    limited = replace(settings, config={**settings.config, "expert_capacity": 3})
    with mock.patch.dict(OVERRIDES, switch_transformers=limited):
        model = build("switch_transformers").model

    def class_logits(batch):
        decoder = torch.full((len(batch["label"]), 2), 5)
        found = model(batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=decoder)
        return found.logits[:, -1, 3:7], batch["label"]

    assert side_of(model, class_logits) == "right"
    for layer in model.modules():
        if hasattr(layer, "expert_capacity"):
            layer.expert_capacity = 64
    assert side_of(model, class_logits) == "left"


def test_reading_the_last_column_fits_padding_on_the_left_alone():
    model = tiny_qwen()

    def last_column(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, -1, 3:7], batch["label"]

    assert side_of(model, last_column) == "left"
    blocks = build("deepseek_v4").model
    with pytest.raises(ValueError, match="last position that is not padding"):
        side_of(blocks, lambda b: (blocks(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, -1, 3:7], None))


def test_modes_and_the_random_state_are_restored():
    model = tiny_qwen().train()
    model.lm_head.eval()
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    seen = []

    def class_logits(batch):
        seen.append((model.training, torch.is_grad_enabled()))
        torch.rand(1)
        return causal(model)(batch)

    side_of(model, class_logits)
    assert set(seen) == {(False, False)}
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_absent_classes_and_a_common_shift_do_not_count():
    alone = torch.tensor([[1.0, 2.0, -torch.inf]], dtype=torch.float64)
    assert padding_error(alone + 7, alone) == 0
    assert padding_error(alone + torch.tensor([0.0, 0.5, 0.0]), alone) == pytest.approx(0.25)
    assert padding_error(alone * torch.nan, alone) == float("inf")


def test_only_classes_that_both_have_are_compared():
    wide = torch.tensor([[1.0, 2.0, 4.0, -torch.inf], [0.0, 3.0, -torch.inf, 6.0]])
    narrow = torch.tensor([[2.0, 3.0], [3.0, 3.0]])
    assert row_errors(wide, narrow).tolist() == row_errors(narrow, wide).tolist() == [0.0, 1.0]
    masked = torch.tensor([[1.0, -torch.inf, 4.0], [0.0, 3.0, 8.0]])
    assert row_errors(wide, masked).tolist() == [0.0, 0.0]
    assert row_errors(torch.tensor([[0.1, 0.3]]), torch.tensor([[0.3, 0.1]]), 0.4).tolist() == pytest.approx([0.5])


def words(number):
    return " ".join(["so"] * (number % 6) + ["is", "it"])


SPLITS = Splits(
    *(
        tuple(Question(f"{part}{i}", f"{words(i)} {part} {i}", ("x", "y"), i % 2) for i in range(9))
        for part in ("a", "b", "c")
    )
)


def data_of(**options):
    texts = [get_prompt_format("letters").render(question) for question in SPLITS.train]
    tokenizer = train_word_tokenizer(texts, max_vocab=30)
    return MultipleChoiceDataModule(SPLITS, tokenizer, prompt="letters", batch_size=4, **options)


class Trained(ExpertFinetuner):
    def on_train_batch_start(self, batch, batch_idx):
        self.masks.append(batch["attention_mask"])

    def test_step(self, batch, batch_idx):
        logits, _ = self.class_logits(batch)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            ids = batch["input_ids"][row][mask]
            alone = self.model(input_ids=ids[None]).logits[0, -1, self._answer_ids].float()
            torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "side"), [("deepseek_v4", "right"), ("mixtral", "left")])
def test_the_datamodule_pads_where_it_is_right_for_the_model(family, side, tmp_path):
    model = build(family).model.float()
    model.train()
    module, data = Trained(model, expert_dropout=0.0), data_of()
    module.masks = []
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    padded = [mask for mask in module.masks if not mask.bool().all()]
    assert padded
    assert all(bool(mask[:, -1].all()) is (side == "left") for mask in padded)
    trainer.test(module, datamodule=data, verbose=False)
    assert data.test_dataloader().collate_fn.side == side
    data.trainer = None
    assert data.test_dataloader().collate_fn.side == side
    assert pickle.loads(pickle.dumps(data)).test_dataloader().collate_fn.side == "left"  # measured again by its trainer


def test_a_side_that_is_given_is_used():
    data = data_of(padding_side="right")
    data.setup()
    assert data.train_dataloader().collate_fn.side == "right"
    left = data_of()
    left.setup()
    assert left.train_dataloader().collate_fn.side == "left"
    with pytest.raises(ValueError, match="padding_side is 'middle'; it must be auto, left or right"):
        data_of(padding_side="middle")


def test_batches_of_one_are_not_measured():
    data = data_of()
    data.batch_size = data.eval_batch_size = 1
    data.setup()

    class Unmeasured(nn.Module):
        def class_logits(self, batch):
            raise AssertionError

    data.trainer = type("Trainer", (), {"lightning_module": Unmeasured(), "strategy": None})()
    assert data.test_dataloader().collate_fn.side == "left"
