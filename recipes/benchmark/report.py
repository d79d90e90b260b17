"""The results of all sections, as markdown and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from bmoe_lightning import LaplacePosterior
from recipes.benchmark.curvature import measure_curvature
from recipes.benchmark.growth import measure_growth
from recipes.benchmark.head import measure_head
from recipes.benchmark.measure import Amount, Growth, Peer, Ratio, Section, Spread
from recipes.benchmark.peers import SAME, measure_peers
from recipes.benchmark.prediction import measure_lpo, measure_prediction
from recipes.benchmark.routers import measure_routers
from recipes.benchmark.serving import measure_serving
from recipes.benchmark.settings import BenchmarkSettings
from recipes.benchmark.workload import PRESETS, Preset, Workload
from recipes.common.report_parts import markdown_table

_PEER_HEAD = ("peer", "work", "peer", "ours", "peer / ours", "difference", "note")


@dataclass(frozen=True)
class Benchmark:
    """All results.

    Attributes:
        settings: Settings of the command line.
        machine: Versions, number of threads, and processor or accelerator, by name.
        shape: Shape of the model behind curvature, prediction, LPO and routers, in words.
        sections: Sections in the order in which they ran.
    """

    settings: BenchmarkSettings
    machine: dict[str, str]
    shape: str
    sections: tuple[Section, ...]


def run_benchmark(settings: BenchmarkSettings, say: Callable[[str], None]) -> Benchmark:
    """Run the sections; the number of threads is restored afterwards.

    Args:
        settings: What to measure.
        say: Function that prints progress messages.

    Raises:
        RuntimeError: If the device is not available or runs out of memory.
    """
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch finds no CUDA device here; leave --device out to measure on the CPU")
    threads = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        preset = PRESETS[settings.model_shape]
        sections = (
            *_on_main_shape(settings, device, say),
            *([measure_head(preset.head, settings.repeats, device, say)] if "head" in settings.only else []),
            *([measure_growth(preset, settings.repeats, device, say)] if "growth" in settings.only else []),
            *([_serving(preset, settings.repeats, device, say)] if "serving" in settings.only else []),
            *([measure_peers(preset, settings.repeats, device, say)] if "peers" in settings.only else []),
        )
        return Benchmark(settings, _machine(device), str(preset.main), sections)
    finally:
        torch.set_num_threads(threads)


def _on_main_shape(settings: BenchmarkSettings, device: torch.device, say: Callable[[str], None]) -> list[Section]:
    if not {"curvature", "prediction", "lpo", "routers"} & set(settings.only):
        return []
    preset = PRESETS[settings.model_shape]
    say(f"building: {preset.main}")
    work = Workload(preset.main, device)
    sections = []
    if "curvature" in settings.only:
        say("curvature")
        sections.append(measure_curvature(work, settings.repeats))
    if {"prediction", "lpo"} & set(settings.only):
        say("a posterior to predict with")
        posterior = LaplacePosterior(work.collect([work.batch]))
    if "prediction" in settings.only:
        say("prediction")
        counts, bar = preset.class_counts, preset.predictive_bar
        sections.append(measure_prediction(work, posterior, counts, bar, settings.repeats))
    if "lpo" in settings.only:
        say("lpo")
        sections.append(measure_lpo(work, posterior, settings.repeats))
    if "routers" in settings.only:
        say("routers")
        sections.append(measure_routers(work, settings.repeats))
    return sections


def _serving(preset: Preset, repeats: int, device: torch.device, say: Callable[[str], None]) -> Section:
    say(f"serving: {preset.serving}")
    return measure_serving(Workload(preset.serving, device), repeats)


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": name,
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def benchmark_json(benchmark: Benchmark) -> str:
    """All results with every single timing, and with medians and exponents."""
    content = asdict(benchmark)
    for shown, section in zip(content["sections"], benchmark.sections, strict=True):
        for entry, ratio in zip(shown["ratios"], section.ratios, strict=True):
            entry["ratio"] = asdict(ratio.spread)
        for entry, growth in zip(shown["growth"], section.growth, strict=True):
            entry["exponent"] = growth.exponent
    return json.dumps(content, indent=2) + "\n"


def benchmark_text(benchmark: Benchmark) -> str:
    """Markdown: one heading and one or more tables a section."""
    machine = ", ".join(f"{key} {value}" for key, value in benchmark.machine.items())
    repeats = benchmark.settings.repeats
    parts = [
        "# Benchmark",
        f"Model: {benchmark.shape}. Machine: {machine}.",
        f"Medians over {repeats} turns with minimum and maximum; what is compared was run in turn.",
    ]
    for section in benchmark.sections:
        parts += [f"## {section.title}", *section.notes]
        tables = (
            (("ratio", "median", "min to max", "bar", ""), [_ratio_cells(row) for row in section.ratios]),
            (("", "median", "min to max", "bar", ""), [_amount_cells(row) for row in section.amounts]),
            (("", "with", "sizes", "measured", "exponent", "bar", ""), [_growth_cells(row) for row in section.growth]),
            (_PEER_HEAD, [_peer_cells(row) for row in section.peers]),
        )
        parts += [markdown_table(head, rows) for head, rows in tables if rows]
    return "\n\n".join(parts)


def _ratio_cells(ratio: Ratio) -> tuple[str, ...]:
    spread = ratio.spread
    return ratio.name, f"{spread.median:.3g}", f"{spread.low:.3g} to {spread.high:.3g}", *_bar(spread.median, ratio.bar)


def _amount_cells(amount: Amount) -> tuple[str, ...]:
    spread, unit = Spread.of(amount.values), amount.unit
    around = f"{spread.low:.3g} to {spread.high:.3g} {unit}" if len(amount.values) > 1 else ""
    return amount.name, f"{spread.median:.3g} {unit}", around, *_bar(spread.median, amount.bar)


def _growth_cells(growth: Growth) -> tuple[str, ...]:
    kind = "time" if growth.unit == "s" else "memory"
    sizes = ", ".join(map(str, growth.sizes))
    measured = ", ".join(f"{value:.3g}" for value in growth.values) + f" {growth.unit}"
    return (
        f"{growth.name}: {kind}", growth.axis, sizes, measured, f"{growth.exponent:.2f}",
        *_bar(growth.exponent, growth.bar),
    )  # fmt: skip


def _peer_cells(peer: Peer) -> tuple[str, ...]:
    ours = f"{Spread.of(peer.our_seconds).median:.3g} s, {peer.our_megabytes:.3g} MB"
    if peer.error is not None:
        return peer.name, peer.work, "cannot run", ours, "", "", " ".join(peer.error.replace("|", "/").split())
    assert peer.peer_megabytes is not None
    theirs = f"{Spread.of(peer.peer_seconds).median:.3g} s, {peer.peer_megabytes:.3g} MB"
    ratio = Ratio(peer.name, peer.peer_seconds, peer.our_seconds).spread
    factors = f"{ratio.median:.3g} ({ratio.low:.3g} to {ratio.high:.3g}) in time, "
    factors += f"{peer.peer_megabytes / max(peer.our_megabytes, 1e-6):.3g} in memory"
    if peer.difference is None:
        return peer.name, peer.work, theirs, ours, factors, "", ""
    note = "same answer" if peer.difference <= SAME else f"**answers differ by more than {SAME:.0e}**"
    return peer.name, peer.work, theirs, ours, factors, f"{peer.difference:.0e}", note


def _bar(value: float, bar: float | None) -> tuple[str, str]:
    if bar is None:
        return "", ""
    return f"{bar:.3g}", "met" if value <= bar else "**missed**"
