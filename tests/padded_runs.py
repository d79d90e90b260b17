"""The padding side that several processes measure together: `python padded_runs.py FOLDER padding WORLD_SIZE`.

Lightning runs this script once more for every other process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data.test_padding import data_of
from distributed_runs import leave, options
from sharded_runs import rank, strategy
from toy import trainer

from bmoe_lightning import ExpertFinetuner
from bmoe_lightning.experts.fsdp import has_shards
from recipes.supported_models.tiny import build


def padding(world_size: int, folder: Path) -> None:
    """Each process writes the side on which its batches were padded."""
    said = {}
    for kind in ("replicated", "sharded"):
        for family in ("deepseek_v4", "mixtral"):
            data, module = data_of(), ExpertFinetuner(build(family).model.float(), expert_dropout=0.0)
            over = strategy(world_size) if kind == "sharded" else "ddp"
            run = trainer(folder, [], **options(world_size, strategy=over, precision="32-true", max_epochs=1))
            run.fit(module, datamodule=data)
            said[f"{kind} {family}"] = [data.train_dataloader().collate_fn.side, has_shards(module)]
    (folder / f"padding-{rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    where, kind, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    {"padding": padding}[kind](size, where)
    leave()
