"""The recipe through its command, on a model with random weights."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_runs import run

import bmoe_lightning
from bmoe_lightning import LaplacePosterior
from bmoe_lightning.methods import get_method, method_names
from bmoe_lightning.methods.curvature_warnings import discarded_energy
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.report import matplotlib_available
from recipes.qwen_obqa import seed_run
from recipes.qwen_obqa.seed_training import SeedTraining

METHODS = "map,checkpoint_ensemble,temperature,laplace_evidence,laplace_lpo"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, with_figures):
    """One run with all methods."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), with_figures():
        assert run(folder) == 0
    (folder / "shown.txt").write_text(shown.getvalue())
    return folder


def killed_at(folder, batch, *arguments):
    """Have the process killed by a batch of the curvature pass, or by none; how many batches it has added."""
    script = (
        "import os, signal, sys, torch\n"
        "from bmoe_lightning.curvature import pass_sums\n"
        "from recipe_runs import run\n"
        "from recipes.qwen_obqa import reporting\n"
        "reporting.matplotlib_available = lambda: False\n"
        "torch.set_num_threads(1)\n"
        "added, add = [], pass_sums._add_batch\n"
        "def deadly(*args, **options):\n"
        "    if str(len(added)) == sys.argv[2]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(*args, **options)\n"
        "    added.append(0)\n"
        "    print('added', len(added), file=sys.stderr, flush=True)\n"
        "pass_sums._add_batch = deadly\n"
        "assert run(sys.argv[1], *sys.argv[3:]) == 0\n"
    )
    paths = [str(Path(bmoe_lightning.__file__).parents[1]), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(batch), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == (0 if batch is None else -signal.SIGKILL), done.stderr[-3000:]
    return sum(line.startswith("added ") for line in done.stderr.splitlines())


class TestOutput:
    def test_every_file_is_there_and_says_the_same(self, finished):
        content = json.loads((finished / "results.json").read_text())
        rows = {row["method"]: row for row in content["rows"]}
        needs = {name: get_method(name).needs for name in method_names()}
        names = tuple(name for name in needs if not (needs[name].lora or needs[name].router_training))
        assert tuple(rows) == names
        lines = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
        assert len(lines) == len(names) * 8
        plain = [line for line in lines if line["method"] == "map"]
        right = sum(max(range(4), key=lambda k: line["log_probs"][k]) == line["label"] for line in plain)
        assert rows["map"]["acc"]["mean"] == pytest.approx(right / 8)
        for name in names:  # of the model on the calibration split
            assert any("is not above chance (0.250; " in sentence for sentence in rows[name]["warnings"])
        for name in ("results.csv", "results.md", "label_budget.json", "run.json"):
            assert (finished / name).stat().st_size > 0

    def test_every_member_of_the_deep_ensemble_is_announced(self, finished):
        shown = (finished / "shown.txt").read_text()
        assert "fine-tuning member 2 of 2 of an ensemble (member 1 is the run itself)" in shown

    def test_the_posterior_can_be_served(self, finished):
        posterior = LaplacePosterior.load(finished / "seed-0" / "bayesian_moe" / "posterior.safetensors")
        assert len(posterior.factors.layers) == 3

    def test_the_energy_that_each_curvature_discards_is_said(self, finished):
        entries = json.loads((finished / "results.json").read_text())["curvatures"]
        fit = load_fit(finished / "seed-0" / "bayesian_moe")[0]
        assert len(entries) == len(fit.posteriors) == 2
        assert {name for entry in entries for name in entry["methods"]} >= {"laplace_lpo", "laplace_last_layer"}
        shown, markdown = (finished / "shown.txt").read_text(), (finished / "results.md").read_text()
        for entry, posterior in zip(entries, fit.posteriors.values(), strict=True):
            found = discarded_energy(posterior)
            assert (entry["seed"], entry["rank"], entry["worst_layer"]) == (0, 32, found.worst_layer)
            assert (entry["total"], entry["worst"]) == (found.total, found.worst)
            sentence = f"Rank 32 discards {found.total:.1%} of the curvature's energy, at most {found.worst:.1%} in a"
            assert sentence in shown
            assert sentence in markdown
        for entry, share in zip(entries, fit.shares.values(), strict=True):
            kappa = share.kappa if math.isfinite(share.kappa) else "inf"
            assert (entry["gradient_share"], entry["kappa"]) == (share.share, kappa)
            if share.share:
                assert f"covers {share.share:.0%} of the trained weights' gradient (kappa {share.kappa:.3g})." in shown

    def test_tensorboard_has_a_run_for_each_method(self, finished):
        runs = {path.name for path in (finished / "tensorboard").iterdir() if path.is_dir()}
        assert runs >= {"map", "mc_dropout", "deep_ensemble", "laplace_lpo", "evidence_temperature"}

    def test_figures(self, finished):
        pytest.importorskip("matplotlib")
        assert (finished / "figures" / "label_budget.png").is_file()


def test_no_stage_keeps_the_memory_of_an_earlier_one(tmp_path, monkeypatch):
    trainers, alive = [], []
    build = SeedTraining.trainer

    def recorded(self, *args, **options):
        alive.extend(number for number, trainer in enumerate(trainers) if trainer() is not None)
        trainer = build(self, *args, **options)
        trainers.append(weakref.ref(trainer))
        return trainer

    monkeypatch.setattr(SeedTraining, "trainer", recorded)
    assert run(tmp_path / "run", "--methods", "map,deep_ensemble", "--set", "deep_ensemble.size=3") == 0
    assert len(trainers) == 4
    assert not alive


class TestResume:
    def test_a_finished_run_is_only_reported_again(self, finished, monkeypatch, capsys):
        def never(*_):
            raise AssertionError("a finished stage was done again")

        monkeypatch.setattr(SeedTraining, "fresh", never)
        before = (finished / "results.csv").read_text()
        for flags in (["--resume"], []):
            assert run(finished, *flags) == 0
            assert (finished / "results.csv").read_text() == before
            shown = capsys.readouterr().out
            assert shown.startswith(f"Resuming the run in {finished}: ")
            assert "Bayesian-MoE" in shown

    @pytest.mark.parametrize("flags", [["--resume"], []])
    def test_other_settings_are_refused(self, finished, capsys, flags):
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
        assert run(finished, "--epochs", "3", *flags) == 1
        message = capsys.readouterr().err
        assert "(epochs=2)" in message
        assert "--overwrite" in message
        assert "--output-dir" in message
        assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before

    def test_only_the_stage_that_was_cut_off_is_done_again(self, tmp_path, monkeypatch, capsys):
        folder = tmp_path / "run"
        whole = tmp_path / "whole"
        assert run(whole, "--methods", METHODS) == 0

        with monkeypatch.context() as patch:

            def killed(*_, **__):
                raise RuntimeError("killed")

            patch.setattr("bmoe_lightning.trainer.run_fit.fit_methods", killed)
            with pytest.raises(RuntimeError, match="killed"):
                run(folder, "--methods", METHODS)
        trained = folder / "seed-0" / "trained.safetensors"
        written = trained.stat().st_mtime_ns

        with monkeypatch.context() as patch:
            patch.setattr(seed_run.StoredPredictions, "write", killed)
            with pytest.raises(RuntimeError, match="killed"):
                run(folder, "--methods", METHODS, "--resume")
        posterior = folder / "seed-0" / "bayesian_moe" / "posterior.safetensors"
        fitted = posterior.stat().st_mtime_ns
        capsys.readouterr()

        assert run(folder, "--methods", METHODS, "--resume") == 0
        assert "fine-tuning the experts" not in capsys.readouterr().out
        assert (trained.stat().st_mtime_ns, posterior.stat().st_mtime_ns) == (written, fitted)
        resumed, straight = (json.loads((f / "results.json").read_text())["rows"] for f in (folder, whole))
        for one, other in zip(resumed, straight, strict=True):
            assert one["nll"]["mean"] == pytest.approx(other["nll"]["mean"], rel=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
    def test_a_curvature_pass_that_was_killed_goes_on(self, tmp_path, precision):
        """Once while training's own process collects, once more in the process that goes on."""
        flags = ["--methods", METHODS, "--precision", precision, "--batch-size", "8", "--limit-train", "128"]
        whole, folder = tmp_path / "whole", tmp_path / "run"
        batches = killed_at(whole, None, *flags)
        checkpointed = [*flags, "--curvature-checkpoint-every", "4"]
        added = [killed_at(folder, batch, *checkpointed) for batch in (11, 7)]
        assert added == [11, 7]
        assert killed_at(folder, None, *flags) == batches - 8 - 4
        found, expected = (f / "seed-0" / "bayesian_moe" for f in (folder, whole))
        assert not list(found.glob("curvature_state*"))
        one, other = (load_fit(folder)[0] for folder in (found, expected))
        assert one.fingerprint == other.fingerprint
        for name, fitted in other.methods.items():
            assert all(torch.equal(value, one.methods[name].state[key]) for key, value in fitted.state.items())
        one, other = (json.loads((f / "results.json").read_text())["rows"] for f in (folder, whole))
        assert one == other

    def test_an_added_method_does_only_what_it_needs(self, tmp_path, monkeypatch, capsys):
        folder = tmp_path / "run"
        assert run(folder, "--methods", "map,laplace_lpo") == 0
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
        first = json.loads((folder / "results.json").read_text())["rows"]
        capsys.readouterr()

        def never(*_, **__):
            raise AssertionError("curvature that is there was collected again")

        monkeypatch.setattr("bmoe_lightning.methods.curvature_passes.collect_factors", never)
        assert run(folder, "--methods", "map,laplace_lpo,temperature", "--set", "temperature.label=Scaled") == 0
        shown = capsys.readouterr().out
        assert "fitting temperature to the fine-tuned weights" in shown
        assert "evaluating temperature" in shown
        assert "fine-tuning the experts" not in shown
        assert "Scaled" in shown
        rows = json.loads((folder / "results.json").read_text())["rows"]
        assert [row["method"] for row in rows] == ["map", "laplace_lpo", "temperature"]
        assert rows[:2] == first
        touched = {
            path.name for path, written in before.items() if not path.exists() or path.stat().st_mtime_ns != written
        }
        assert all(name.startswith("methods-") for name in touched)

        # Options of prediction are evaluated anew, and touch no fit.
        assert run(folder, "--methods", "map,laplace_lpo", "--set", "laplace_lpo.link=probit") == 0
        shown = capsys.readouterr().out
        assert "evaluating laplace_lpo" in shown
        assert "fitting" not in shown

    def test_damaged_files_are_named_and_made_again(self, tmp_path, capsys):
        folder = tmp_path / "run"
        flags = ("--methods", "map,temperature")
        assert run(folder, *flags) == 0
        table = (folder / "results.md").read_text()
        seed = folder / "seed-0"
        for damaged in (seed / "predictions" / "map.safetensors", next((seed / "bayesian_moe").glob("methods-*"))):
            content = bytearray(damaged.read_bytes())
            content[-1] ^= 1
            damaged.write_bytes(content)
        (seed / "predictions" / "temperature.safetensors").unlink()
        capsys.readouterr()
        assert run(folder, *flags) == 0
        captured = capsys.readouterr()
        assert "map.safetensors" in captured.err
        assert "methods-" in captured.err
        assert "fitting map, temperature to the fine-tuned weights" in captured.out
        assert (folder / "results.md").read_text() == table

        (seed / "trained.safetensors").write_bytes(b"cut off")
        (seed / "predictions" / "map.safetensors").unlink()
        model = next((folder / "model").glob("*/model.safetensors"))
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(content)
        assert run(folder, *flags) == 0
        captured = capsys.readouterr()
        assert "trained.safetensors" in captured.err
        assert f"{model} is damaged; the small model is created again" in captured.err
        assert "fine-tuning the experts" in captured.out
        assert (folder / "results.md").read_text() == table

    @pytest.mark.slow
    def test_a_fit_to_other_data_is_named_and_made_again(self, tmp_path, capsys):
        folder = tmp_path / "run"
        assert run(folder, "--methods", "map,temperature") == 0
        place = folder / "seed-0" / "bayesian_moe"
        fit, snapshots = load_fit(place)
        logits, labels = fit.calibration
        state = {"temperature": fit.methods["temperature"].state["temperature"] * 2}
        of_other_labels = {"temperature": replace(fit.methods["temperature"], state=state)}
        save_fit(place, replace(fit, calibration=(logits, labels.roll(1)), methods=of_other_labels), snapshots)
        capsys.readouterr()
        assert run(folder, "--methods", "map,temperature,shrunk_temperature") == 0
        assert "held-out data are not those of the existing fit: other labels" in capsys.readouterr().err
        again = load_fit(place)[0]
        assert again.methods.keys() == {"temperature", "shrunk_temperature"}
        assert torch.equal(again.methods["temperature"].state["temperature"] * 2, state["temperature"])
        assert torch.equal(again.calibration[1], labels)

    @pytest.mark.slow
    def test_files_of_a_run_with_other_settings_are_named_and_made_again(self, tmp_path, capsys):
        folder, other = tmp_path / "run", tmp_path / "other"
        flags = ("--methods", "map,temperature")
        assert run(folder, *flags) == 0
        table = (folder / "results.md").read_text()
        assert run(other, *flags, "--epochs", "1") == 0
        names = ("trained.safetensors", "predictions/map.safetensors")
        for name in names:
            shutil.copy(other / "seed-0" / name, folder / "seed-0" / name)
        shutil.copytree(other / "seed-0" / "bayesian_moe", folder / "seed-0" / "bayesian_moe", dirs_exist_ok=True)
        capsys.readouterr()
        assert run(folder, *flags) == 0
        captured = capsys.readouterr().err
        assert all(f"{folder / 'seed-0' / name} is from a run with other settings" in captured for name in names)
        assert (folder / "results.md").read_text() == table

        shutil.copytree(other / "seed-0" / "bayesian_moe", folder / "seed-0" / "bayesian_moe", dirs_exist_ok=True)
        (folder / "seed-0" / "predictions" / "map.safetensors").unlink()
        assert run(folder, *flags) == 0
        assert "The methods are fitted again" in capsys.readouterr().err
        assert (folder / "results.md").read_text() == table

    def test_a_method_that_needs_more_than_the_run_has_is_refused_in_a_sentence(self, tmp_path, capsys):
        folder = tmp_path / "run"
        assert run(folder, "--methods", "map") == 0
        assert run(folder, "--methods", "map,checkpoint_ensemble") == 1
        message = capsys.readouterr().err
        assert "checkpoint_ensemble needs the weights after at least 2 epochs, and there will be 0" in message

    def test_a_method_of_another_module(self, tmp_path, monkeypatch, with_figures):
        (tmp_path / "their_module.py").write_text(
            "from dataclasses import dataclass\n"
            "from bmoe_lightning.methods import Method\n"
            "@dataclass(frozen=True)\n"
            "class Mine(Method):\n"
            "    name: str = 'mine'\n"
            "    label: str = 'My method'\n"
            "    def log_probs(self, batch, state):\n"
            "        return (batch.logits / 2).log_softmax(-1)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        folder = tmp_path / "run"
        with with_figures():
            assert run(folder, "--methods", "map,their_module:Mine") == 0
        assert (folder / "tensorboard" / "mine").is_dir()
        assert "My method" in (folder / "results.md").read_text()
        assert '"mine"' in (folder / "predictions.jsonl").read_text()
        if matplotlib_available():
            assert {path.name for path in (folder / "figures").iterdir()} == {"reliability.png", "comparison.png"}

    def test_a_folder_with_other_things_is_left_alone(self, tmp_path, capsys):
        (tmp_path / "thesis.tex").write_text("mine")
        assert run(tmp_path) == 1
        assert "not empty" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


class TestRefusals:
    def test_unreachable_hub_is_one_sentence(self, tmp_path, capsys):
        assert run(tmp_path / "run", "--model", "Qwen/Qwen1.5-MoE-A2.7B", "--data", "allenai/openbookqa") == 1
        message = capsys.readouterr().err
        assert message.startswith("error: the model 'Qwen/Qwen1.5-MoE-A2.7B' could not be loaded")
        assert len(message.splitlines()) == 1

    def test_unreachable_data_are_one_sentence(self, tmp_path, capsys):
        assert run(tmp_path / "run", "--data", "allenai/openbookqa") == 1
        message = capsys.readouterr().err
        assert message.startswith("error: 'allenai/openbookqa' could not be loaded")
        assert len(message.splitlines()) == 1

    def test_malformed_row(self, tmp_path, capsys):
        data = tmp_path / "data"
        data.mkdir()
        row = {"id": "1", "question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "Z"}
        for split in ("train", "test"):
            (data / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        assert run(tmp_path / "run", "--data", str(data)) == 1
        message = capsys.readouterr().err
        assert "train.jsonl" in message
        assert "Z" in message

    def test_too_few_questions_for_the_evidence_temperature(self, tmp_path, capsys):
        assert run(tmp_path / "run", "--limit", "50") == 1
        assert "at least 100" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", [(), ("--prompt", "cloze", "--normalise", "characters", "--zero-shot")])
def test_real_questions_with_a_small_model(tmp_path, prompt):
    data = tmp_path / "data"
    data.mkdir()
    for split, size in (("train", 80), ("test", 20)):
        rows = [
            {
                "id": f"{split}-{i}",
                "question_stem": f"which number follows {i} in {split}",
                "choices": {"text": [str(i + k) for k in range(1, 4 + i % 2)], "label": list("ABCD")[: 3 + i % 2]},
                "answerKey": "A",
            }
            for i in range(size)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    methods = ("map", "deep_ensemble") if prompt else ("map", "temperature", "laplace_lpo")
    arguments = ("--data", str(data), "--methods", ",".join(methods), "--limit-test", "20", *prompt)
    assert run(folder, *arguments) == 0
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    rows = len(methods) + ("--zero-shot" in prompt)
    assert sum(line["log_probs"][3] is None for line in lines) == rows * 10  # three choices have no fourth
