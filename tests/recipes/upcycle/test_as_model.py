"""An upcycled model in the main job."""

from __future__ import annotations

import json

import pytest
import upcycle_cases as cases
from recipe_runs import run

from recipes.upcycle.upcycling import upcycle


def questions(split, size):
    rows = [
        {
            "id": f"{split}-{i}",
            "question_stem": f"which number follows {i} in {split}",
            "choices": {"text": [f"number {i + k}" for k in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(size)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.slow
def test_the_main_job_fine_tunes_it_and_fits_a_posterior(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split, size in (("train", 80), ("validation", 110), ("test", 20)):
        (data / f"{split}.jsonl").write_text(questions(split, size))
    source = cases.save(tmp_path / "dense", cases.dense_model(max_position_embeddings=256))
    upcycle(cases.settings(model=source, output=str(tmp_path / "moe"), segments=2))
    flags = ["--model", str(tmp_path / "moe"), "--data", str(data), "--precision", "32-true"]
    assert run(tmp_path / "run", *flags, "--methods", "map,laplace_evidence", "--curvature.rank", "4") == 0
    assert "Zero-shot" in capsys.readouterr().out
    assert (tmp_path / "run" / "seed-0" / "bayesian_moe").is_dir()
