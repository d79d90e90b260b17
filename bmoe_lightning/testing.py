"""Contract tests that ship with the package, for methods of other packages.

from bmoe_lightning.testing import check_method
check_method(MyMethod())
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.data.tasks.contract import check_task
from bmoe_lightning.experts import down_proj_weights, find_expert_layers
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.evaluation import Predictor, evaluate
from bmoe_lightning.methods.fit_result import FitResult, NotFittedError
from bmoe_lightning.methods.fitting import fit_methods
from bmoe_lightning.methods.snapshots import save_snapshot, swapped_weights
from bmoe_lightning.methods.storage import load_fit, save_fit

__all__ = ["check_method", "check_task", "tiny_model"]

_ANSWERS = (3, 5, 7, 11)
_BATCH = 4


def tiny_model(seed: int = 0) -> nn.Module:
    """A mixture-of-experts language model of some 20 thousand random weights, in float64.

    Args:
        seed: Seed of the weights; the global random state is unchanged.
    """
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        intermediate_size=16,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2MoeForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # grouped kernels do not support float64
    return model


def check_method(method: Method, *, atol: float = 1e-8) -> None:
    """Check the contract of a method, on a tiny model with generated data.

    Checked are: a frozen dataclass with documented options; log-probabilities of the right shape and dtype that are
    normalised, with `-inf` for absent classes only, and independent of the batch size and of columns of absent
    classes; a state of CPU tensors that predicts the same after saving and loading; a `NotFittedError` that names the
    method where it is not fitted; a model with unchanged weights, modes and gradients, also after an exception; an
    unchanged global random state.

    Args:
        method: Method with a name.
        atol: Tolerance on log-probabilities between batch sizes, and with more columns. Methods that need expert
            dropout sample for each batch (one seed per batch), and are not compared.

    Raises:
        AssertionError: If the contract is violated; the message says how.
    """
    _check_declaration(method)
    with tempfile.TemporaryDirectory() as name:
        _check_behaviour(method.with_defaults(Curvature(rank=2)), Path(name), atol)


def _check_declaration(method: Method) -> None:
    kind = type(method)
    assert is_dataclass(kind) and kind.__dataclass_params__.frozen, f"{kind.__qualname__} is not a frozen dataclass"  # type: ignore[attr-defined]
    assert kind.__doc__ and kind.__doc__.strip(), f"{kind.__qualname__} has no docstring"
    assert method.name and method.label, f"{kind.__qualname__} has no name or no label"
    hash(method)
    undocumented = [entry.name for entry in fields(kind) if entry.name not in ("name", "label", "curvature")]
    undocumented = [name for name in undocumented if not _help(kind, name)]
    assert not undocumented, f"{method.name}: options without a help text: {undocumented}; use option(default, help)"
    renamed = replace(method, name="another_name", label="Another name")
    assert renamed.fit_options() == method.fit_options(), f"{method.name}: name or label change the fit options"


def _help(kind: type, name: str) -> str:
    return next(entry.metadata.get("help", "") for entry in fields(kind) if entry.name == name)


def _check_behaviour(method: Method, folder: Path, atol: float) -> None:
    model = tiny_model()
    if method.needs.lora:
        _add_lora(model)
    before = {name: weight.clone() for name, weight in _weights(method, model).items()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    snapshots = _fine_tuned(model, folder)
    if method.needs.runs:
        method = _with_runs(method, model, before, snapshots[: method.needs.runs], folder)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    state = torch.random.get_rng_state()
    method.check_run(model, folder)
    if method.is_fitted_method:
        _check_refusal(method, model)
    data = _batches(seed=3, count=25)
    fit = fit_methods(
        [method], model, _class_logits, _batches(seed=1, count=4), data, prior_mean=before, snapshots=snapshots
    )
    result = _predicted(method, fit, model, _batches(seed=2, count=3), snapshots)
    _check_log_probs(method, result)
    _check_cuts(method, fit, model, snapshots, atol)
    _check_uncertainty(method, fit, model, snapshots, atol)
    _check_absent_columns(method, fit, model, snapshots, atol)
    _check_files(method, fit, model, folder / "fit", snapshots, result)
    _check_exception(method, fit, model, snapshots)
    assert torch.equal(torch.random.get_rng_state(), state), f"{method.name} sampled from the global random state"
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
    assert not changed, f"{method.name} changed weights of the model: {changed}"
    assert all(module.training for module in model.modules()), f"{method.name} changed the training mode of modules"
    assert all(p.grad is None for p in model.parameters()), f"{method.name} left gradients behind"
    frozen_now = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen_now == frozen, f"{method.name} left parameters frozen, or trainable"


def _with_runs(
    method: Method, model: nn.Module, before: Mapping[str, Tensor], runs: Sequence[Path], folder: Path
) -> Method:
    """The method with the files of further runs, and the folders of the fits to these."""
    options: dict[str, Any] = {"runs": tuple(map(str, runs))}
    if method.needs.run_methods:
        options["fits"] = tuple(str(folder / f"fit-{index}") for index in range(len(runs)))
        for run, path in zip(runs, options["fits"], strict=True):
            with swapped_weights(model, run):
                data = _batches(seed=1, count=4), _batches(seed=3, count=25)
                fit = fit_methods(method.needs.run_methods, model, _class_logits, *data, prior_mean=before)
            save_fit(Path(path), fit)
    return replace(method, **options)


def _check_refusal(method: Method, model: nn.Module) -> None:
    try:
        Predictor(method, FitResult()).predict(model, _class_logits, _batches(seed=2, count=1)[0])
    except NotFittedError as error:
        assert method.name in str(error), (
            f"{method.name}: NotFittedError of an unfitted method does not name it: {error}"
        )
    else:
        raise AssertionError(f"{method.name} defines fit, and predicts without being fitted")


def _check_log_probs(method: Method, log_probs: Tensor) -> None:
    name = method.name
    assert log_probs.dtype == torch.float64, f"{name}: log_probs are {log_probs.dtype}, not float64"
    assert not bool(log_probs.isnan().any()), f"{name}: log_probs contain NaN"
    absent = torch.zeros_like(log_probs, dtype=torch.bool)
    absent[::_BATCH, -1] = True  # as in _class_logits
    assert bool((log_probs[absent] == -torch.inf).all()), f"{name}: an absent class has a probability above zero"
    assert bool(log_probs[~absent].isfinite().all()), f"{name}: a present class has no finite log-probability"
    total = log_probs.exp().sum(1)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-9), f"{name}: probabilities do not sum to 1"


def _check_cuts(method: Method, fit: FitResult, model: nn.Module, snapshots: Sequence[Path], atol: float) -> None:
    """Batches of four and of two give the same log-probabilities, unless the method samples for each batch."""
    batches = _batches(seed=4, count=2)
    whole = _predicted(method, fit, model, batches, snapshots)
    again = _predicted(method, fit, model, batches, snapshots)
    assert torch.equal(whole, again), f"{method.name} predicts the same batch differently the second time"
    if method.needs.expert_dropout:
        return
    cut = _predicted(method, fit, model, _halves(batches), snapshots)
    both = whole == cut
    difference = torch.where(both, 0, whole - cut).abs().max()
    assert bool(difference <= atol), (
        f"{method.name}: with another batch size, log_probs differ by {float(difference):.3g}"
    )


def _halves(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches of two from those of four."""
    return [{"ids": part, "hide": first == 0} for batch in batches for first, part in enumerate(batch["ids"].split(2))]


def _check_uncertainty(
    method: Method, fit: FitResult, model: nn.Module, snapshots: Sequence[Path], atol: float
) -> None:
    """Scores are one finite number for each prediction, however the data are cut into batches."""
    batches = _batches(seed=4, count=2)
    whole, cut = (
        evaluate([method], fit, model, _class_logits, data, snapshots)[method.name].uncertainty
        for data in (batches, _halves(batches))
    )
    number = sum(len(batch["ids"]) for batch in batches)
    for name, scores in whole.items():
        assert scores.shape == (number,), f"{method.name}: {name} has shape {list(scores.shape)}, not [{number}]"
        assert scores.dtype == torch.float64, f"{method.name}: {name} is {scores.dtype}, not float64"
        assert bool(scores.isfinite().all()), f"{method.name}: {name} is not finite"
        difference = float((scores - cut[name]).abs().max())
        assert method.needs.expert_dropout or difference <= atol, (
            f"{method.name}: with another batch size, {name} differs by {difference:.3g}"
        )


def _check_absent_columns(
    method: Method, fit: FitResult, model: nn.Module, snapshots: Sequence[Path], atol: float
) -> None:
    """Columns of classes that no example has, as another batch may have them, change no prediction."""
    if method.needs.expert_dropout:
        return
    batches = _batches(seed=4, count=1)
    expected = _predicted(method, fit, model, batches, snapshots)
    for classes in ((0, 1, 2, 3), (1, 2, 4, 6)):
        wide = [{**batch, "classes": classes} for batch in batches]
        found = _predicted(method, fit, model, wide, snapshots)[:, list(classes)]
        difference = torch.where(found == expected, 0, found - expected).abs().max()
        assert bool(difference <= atol), (
            f"{method.name}: with columns of absent classes, log_probs differ by {float(difference):.3g}; draw noise "
            "for an example's own classes"
        )


def _check_files(
    method: Method, fit: FitResult, model: nn.Module, folder: Path, snapshots: Sequence[Path], expected: Tensor
) -> None:
    state = fit.state_of(method)
    assert isinstance(state, Mapping), f"{method.name}: a state must be a mapping, got {type(state).__name__}"
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor) or value.device.type != "cpu"]
    assert not wrong, f"{method.name}: entries of the state are not CPU tensors: {wrong}"
    save_fit(folder, fit)
    loaded, _ = load_fit(folder)
    found = _predicted(method, loaded, model, _batches(seed=2, count=3), snapshots)
    assert torch.equal(found, expected), f"{method.name} predicts differently after its state was saved and loaded"


def _check_exception(method: Method, fit: FitResult, model: nn.Module, snapshots: Sequence[Path]) -> None:
    def failing(model: Any, batch: Any) -> Any:
        _class_logits(model, batch)
        raise KeyboardInterrupt

    try:
        Predictor(method, fit, snapshots).predict(model, failing, _batches(seed=2, count=1)[0])
    except KeyboardInterrupt:
        return
    raise AssertionError(f"{method.name} swallowed an exception of class_logits, or did not run the model")


def _predicted(
    method: Method, fit: FitResult, model: nn.Module, batches: list[dict[str, Any]], snapshots: Sequence[Path]
) -> Tensor:
    return evaluate([method], fit, model, _class_logits, batches, snapshots)[method.name].log_probs


def _class_logits(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits of four answers; the last answer is absent for the first example of each batch of four.

    A batch with `classes` has eight columns, of which these are the answers.
    """
    logits = model(input_ids=batch["ids"], use_cache=False).logits[:, -1, list(_ANSWERS)]
    labels = batch["ids"].sum(1) % (len(_ANSWERS) - 1)
    if batch["hide"]:
        logits = torch.cat(
            [logits[:1].masked_fill(torch.arange(len(_ANSWERS)) == len(_ANSWERS) - 1, -torch.inf), logits[1:]]
        )
    if "classes" in batch:
        columns = torch.tensor(batch["classes"])
        wide = logits.new_full((len(logits), 8), -torch.inf)
        return wide.index_copy(1, columns, logits), columns[labels]
    return logits, labels


def _batches(*, seed: int, count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"ids": torch.randint(64, (_BATCH, 6), generator=generator), "hide": True} for _ in range(count)]


def _add_lora(model: Any) -> None:
    """Adapt the attention and the head by LoRA."""
    from peft import LoraConfig

    targets = ["q_proj", "v_proj", "lm_head"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=targets))
    model.eval()


def _weights(method: Method, model: nn.Module) -> dict[str, Tensor]:
    """The weights of the layers of a method's curvatures, or of the experts."""
    layers = [layer for curvature in method.curvatures for layer in curvature.find_layers(model)]
    found = layers or find_expert_layers(model)
    return {name: weight for layer in found for name, weight in down_proj_weights(model, layer).items()}


def _fine_tuned(model: nn.Module, folder: Path) -> list[Path]:
    """Perturb the weights of the experts or of LoRA four times, as epochs would, and save a snapshot after each."""
    generator = torch.Generator().manual_seed(7)
    adapted = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    parameters = adapted or {name: p for name, p in model.named_parameters() if ".experts." in name}
    paths = []
    for epoch in range(4):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        paths.append(folder / "snapshots" / f"00000000-epoch-{epoch:04d}.safetensors")
        save_snapshot(paths[-1], parameters)
    return paths
