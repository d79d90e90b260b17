"""The fit to a model's weights is found among others, and those that are refused are named with the reason."""

from __future__ import annotations

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model
from unprivileged import unprivileged_folder

from bmoe_lightning.laplace import WeightMismatchError
from bmoe_lightning.methods import FitResult, TemperatureScaling, fit_methods
from bmoe_lightning.methods.storage import save_fit
from bmoe_lightning.trainer import stored_fits
from bmoe_lightning.trainer.stored_fits import find_fit

BATCHES = split(toy_batch(num_rows=30), 30)


def model_of(seed):
    torch.manual_seed(seed)
    model = toy_model()
    with torch.no_grad():
        next(model.parameters()).add_(seed)
    return model


def fit_in(folder, model):
    save_fit(folder, fit_methods([TemperatureScaling()], model, answer_logits, [], BATCHES))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [fit_in(tmp_path / name, model_of(seed)) for seed, name in enumerate("abc")]


class TestFindFit:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_is_the_one_to_these_weights(self, folders, seed):
        found = find_fit(folders, model_of(seed))
        assert found.folder == folders[seed]
        assert list(found.refused) == folders[:seed]

    def test_without_one_all_are_named_with_the_reason(self, folders):
        found = find_fit([*folders, folders[0]], model_of(7))
        assert found.folder is None
        error = found.error()
        assert isinstance(error, WeightMismatchError)
        for folder in folders:
            assert f"{folder} has a fit to other weights than the model has (1 parameters differ" in str(error)
        assert "none of 3 folders has a fit to the model's weights" in str(error)
        assert "Load the checkpoint that one of them was fitted to, or run trainer.fit" in str(error)

    def test_many_are_named_in_part(self, folders, monkeypatch):
        monkeypatch.setattr(stored_fits, "_MAX_NAMED", 2)
        said = str(find_fit(folders, model_of(7)).error())
        assert str(folders[1]) in said
        assert str(folders[2]) not in said
        assert "So are 1 more folders." in said

    def test_the_only_one_gives_its_own_error(self, folders):
        with pytest.raises(WeightMismatchError, match=r"a has a fit to other weights .*refit|fit again"):
            raise find_fit(folders[:1], model_of(7)).error()

    def test_nothing_at_all(self, tmp_path):
        (tmp_path / "file").write_text("")
        found = find_fit([tmp_path, tmp_path / "file", tmp_path / "missing"], model_of(0))
        assert found.refused == {}
        with pytest.raises(RuntimeError, match=rf"no fit was found in {tmp_path}, .*missing; run trainer.fit"):
            raise found.error()
        with pytest.raises(RuntimeError, match="no fit was found in any folder"):
            raise find_fit([], model_of(0)).error()

    def test_of_another_model(self, folders):
        found = find_fit(folders[:1], torch.nn.Linear(2, 2))
        with pytest.raises(WeightMismatchError, match="a has the fit of another model than this one: "):
            raise found.error()

    def test_a_damaged_one_hides_no_other(self, folders):
        for name, damage in {"index.json": "{", "methods": "garbage"}.items():
            for path in folders[0].glob(f"{name}*"):
                path.write_text(damage)
            found = find_fit(folders, model_of(2))
            assert found.folder == folders[2]
            assert "is not a complete" in str(found.refused[folders[0]])
            with pytest.raises(ValueError, match="is not a complete"):  # alone
                raise find_fit(folders[:1], model_of(2)).error()

    def test_one_that_cannot_be_read_hides_no_other(self):
        with unprivileged_folder() as root:
            closed, right = fit_in(root / "closed", model_of(0)), fit_in(root / "right", model_of(0))
            closed.chmod(0)
            found = find_fit([closed, right], model_of(0))
            assert found.folder == right
            with pytest.raises(
                PermissionError, match=rf"the folder {closed} of a fit cannot be read .*or pass dirpath="
            ):
                raise find_fit([closed], model_of(0)).error()

    def test_the_weights_are_read_once(self, folders, monkeypatch):
        reads = []
        from bmoe_lightning.experts import weight_comparison

        original = weight_comparison.weight_fingerprint
        monkeypatch.setattr(weight_comparison, "weight_fingerprint", lambda *args: reads.append(1) or original(*args))
        find_fit(folders, model_of(7))
        assert len(reads) == 1

    def test_a_fit_of_methods_that_need_no_weights_fits_all(self, tmp_path):
        save_fit(tmp_path, FitResult())
        assert find_fit([tmp_path], model_of(3)).folder == tmp_path
