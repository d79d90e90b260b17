"""The fine-tuners with weights that FSDP2 shards; each process writes down what it has to say.

Lightning runs this script once more for every other process: `python finetuner_runs.py FOLDER
finetuner|loading|half|lora WORLD_SIZE`.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_runs import leave, options
from lightning.pytorch.callbacks import ModelCheckpoint
from sharded_runs import rank, strategy
from torch.utils.data import DataLoader, Dataset
from toy import ToyData, toy_model, trainer

import bmoe_lightning.base_finetuner as module_file
from bmoe_lightning import BayesianMoECallback, ExpertFinetuner, LoRAFinetuner
from bmoe_lightning.curvature import Curvature, LoRALayers
from bmoe_lightning.experts import find_expert_layers, weight_fingerprint
from bmoe_lightning.experts.fsdp import full_tensor, has_shards
from bmoe_lightning.methods import LaplaceEvidence, fit_methods
from bmoe_lightning.methods.needs import NeedsError
from bmoe_lightning.utils.distributed import OtherRankError


class Questions(Dataset):
    """The toy's data as `ExpertFinetuner` takes them."""

    def __init__(self, size: int, seed: int) -> None:
        self._data = ToyData(size, seed)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index):
        ids, label = self._data.ids[index], self._data.labels[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": label}


def finetuner(world_size: int, folder: Path) -> None:
    """`ExpertFinetuner` shards its model by itself; its checkpoints are read back, of both kinds."""
    training, calibration = (DataLoader(Questions(*drawn), batch_size=8) for drawn in ((40, 1), (120, 2)))
    said = {}
    for kind in ("distributed", "single"):
        chosen = {"max_epochs": 1, "gradient_clip_val": 1.0, "precision": "32-true", "enable_checkpointing": True}
        own = folder / kind

        def given(kind=kind):
            return strategy(world_size, save_distributed_checkpoint=kind == "distributed")

        def run(epochs, own=own, chosen=chosen, given=given):
            callback = BayesianMoECallback(("map", "laplace_evidence", "laplace_lpo"), dirpath=str(own / str(epochs)))
            kept = ModelCheckpoint(own, filename="last")
            wanted = options(world_size, **{**chosen, "max_epochs": epochs, "strategy": given()})
            return callback, trainer(own, [callback, kept], **wanted)

        module = ExpertFinetuner(toy_model(), answer_token_ids=[1, 2, 3], learning_rate=1e-2, expert_dropout=0.1)
        fitting, first = run(1)
        first.fit(module, training, calibration)
        trained = fingerprint_of(module)
        tested = first.test(module, calibration, verbose=False)[0]
        said[kind] = {"nll": tested["laplace_lpo/test/nll"], "map": tested["map/test/nll"]}
        # What each process has written its shards of holds the frozen weights too.
        again = ExpertFinetuner(
            toy_model(seed=3 * (kind == "distributed")), answer_token_ids=[1, 2, 3], learning_rate=1e-2
        )
        _, second = run(1)
        result = second.test(again, calibration, ckpt_path=str(own / "last.ckpt"), weights_only=False, verbose=False)
        said[kind] |= {"same": fingerprint_of(again) == trained, "nll read back": result[0]["laplace_lpo/test/nll"]}
        completing = BayesianMoECallback(fitting.methods, name="again", dirpath=str(own / "again"))
        fresh = ExpertFinetuner(toy_model(), answer_token_ids=[1, 2, 3], learning_rate=1e-2)
        completing.fit_posterior(
            fresh,
            trainer=trainer(own, [completing], **options(world_size, **{**chosen, "strategy": given()})),
            train_dataloaders=training,
            val_dataloaders=calibration,
            ckpt_path=str(own / "last.ckpt"),
        )
        said[kind] |= {
            "fit": fitting.fitted.scalars(fitting.methods),
            "completed fit": completing.fitted.scalars(completing.methods),
        }
        refitting, third = run(2)
        resumed = ExpertFinetuner(toy_model(), answer_token_ids=[1, 2, 3], learning_rate=1e-2)
        third.fit(resumed, training, calibration, ckpt_path=str(own / "last.ckpt"), weights_only=False)
        assert fingerprint_of(resumed) != trained
        said[kind]["epochs"] = third.current_epoch
        said[kind]["prior mean"], said[kind]["resumed prior mean"] = (
            [float(dist_sum(weights[name].square().sum())) for name in sorted(weights)]
            for weights in (fitting._prior_mean.weights, refitting._prior_mean.weights)
        )
        _, fourth = run(3)
        other = ExpertFinetuner(toy_model(seed=3), answer_token_ids=[1, 2, 3], learning_rate=1e-2)
        try:
            fourth.fit(other, training, calibration, ckpt_path=str(own / "last.ckpt"), weights_only=False)
        except (NeedsError, OtherRankError) as error:
            said[kind]["refused"] = "other weights than before training in 2 of 2 layers" in str(error)
        found = {n: p for n, p in resumed.named_parameters() if n in fitting._prior_mean.weights}
        said[kind]["trained"] = [float(full_tensor(found[name]).square().sum()) for name in sorted(found)]
    (folder / f"finetuner-{rank()}.json").write_text(json.dumps(said))


def dist_sum(value):
    dist.all_reduce(value)
    return value


def loading(world_size: int, folder: Path) -> None:
    """`ExpertFinetuner` loads a model by its folder; when does each process?"""
    if rank() == 0:
        toy_model().save_pretrained(folder / "model")
    load = module_file.load_causal_model
    times = []

    def watched(*arguments):
        times.append(time.monotonic())
        model = load(*arguments)
        time.sleep(0.5)
        times.append(time.monotonic())
        return model

    module_file.load_causal_model = watched
    module = ExpertFinetuner(str(folder / "model"), answer_token_ids=[1, 2, 3])
    run = trainer(folder, [], **options(world_size, strategy=strategy(world_size), precision="32-true", max_epochs=1))
    run.fit(module, DataLoader(Questions(16, 1), batch_size=8))
    assert has_shards(module)
    (folder / f"loading-{rank()}.json").write_text(json.dumps(times))


def half(world_size: int, folder: Path) -> None:
    """Weights in bfloat16 with a float32 copy: trained without a break, and resumed from checkpoints of both kinds."""
    training, said = DataLoader(Questions(48, 1), batch_size=8), {}
    for kind in ("distributed", "single"):
        own = folder / kind

        def fit(epochs, *callbacks, own=own, kind=kind, **loading):
            module = ExpertFinetuner(
                toy_model().bfloat16(), answer_token_ids=[1, 2, 3], expert_dropout=0.0, schedule="constant"
            )
            chosen = {"max_epochs": epochs, "precision": "bf16-true", "enable_checkpointing": bool(callbacks)}
            given = strategy(world_size, save_distributed_checkpoint=kind == "distributed")
            run = trainer(own, list(callbacks), **options(world_size, strategy=given, **chosen))
            run.fit(module, training, **loading)
            [optimizer] = run.optimizers
            trained = module.trained_parameters()
            assert {parameter.dtype for parameter in trained.values()} == {torch.bfloat16}
            states = {
                f"{name}.{key}": full_tensor(value)
                for name, parameter in trained.items()
                for key, value in optimizer.state[parameter].items()
            }
            assert all(value.dtype == torch.float32 for value in states.values())
            return states | {name: full_tensor(parameter) for name, parameter in trained.items()}

        whole = fit(2, ModelCheckpoint(own, save_top_k=-1, filename="{epoch}"))
        resumed = fit(2, ckpt_path=str(own / "epoch=0.ckpt"), weights_only=False)
        start = {f"model.{name}": value for name, value in toy_model().bfloat16().state_dict().items()}
        masters = [name for name in whole if name.endswith(".master")]
        said[kind] = {
            "differing": [name for name in whole if not torch.equal(whole[name], resumed[name])],
            "copies": all(torch.equal(whole[name].bfloat16(), whole[name.removesuffix(".master")]) for name in masters),
            "number": len(masters),
            "moved": [float((whole[name] - start[name.removesuffix(".master")]).abs().mean()) for name in masters],
        }
    (folder / f"half-{rank()}.json").write_text(json.dumps(said))


def lora(world_size: int, folder: Path) -> None:
    """`LoRAFinetuner` with sharded weights and under DDP, and the fit of one process to the same weights."""
    training, calibration = (DataLoader(Questions(*drawn), batch_size=8) for drawn in ((40, 1), (120, 2)))
    methods = ("map", "bayesian_lora", LaplaceEvidence(name="evidence", curvature=Curvature(layers=LoRALayers())))
    said = {}

    def fresh():
        return LoRAFinetuner(toy_model(), answer_token_ids=[1, 2, 3], learning_rate=1e-2)

    for kind, chosen in (
        ("sharded", {"strategy": strategy(world_size), "precision": "32-true"}),
        ("replicated", {"strategy": "ddp"}),
    ):
        callback = BayesianMoECallback(methods, dirpath=str(folder / kind))
        run = trainer(folder / kind, [callback], **options(world_size, **{"precision": "32-true", **chosen}))
        module = fresh()
        run.fit(module, training, calibration)
        assert has_shards(module) == (kind == "sharded")
        trained = {name: full_tensor(parameter) for name, parameter in module.trained_parameters().items()}
        said[kind] = {"test": run.test(module, calibration, verbose=False)[0]}
        whole = fresh()
        whole.configure_model()
        mean = {name: parameter.detach().clone() for name, parameter in whole.trained_parameters().items()}
        whole.load_state_dict(trained)
        alone = fit_methods(
            callback.methods, whole, lambda m, batch: m.class_logits(batch), training, calibration, prior_mean=mean
        )
        said[kind] |= {
            "moved": [name for name in trained if torch.equal(trained[name], mean[name])] == [],
            "fit": callback.fitted.scalars(callback.methods),
            "alone": alone.scalars(callback.methods),
        }
    (folder / f"lora-{rank()}.json").write_text(json.dumps(said))


def fingerprint_of(module) -> str:
    return weight_fingerprint(module, find_expert_layers(module))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where, kind, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    {"finetuner": finetuner, "loading": loading, "half": half, "lora": lora}[kind](size, where)
    leave()
