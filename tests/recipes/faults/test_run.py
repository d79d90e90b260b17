"""What is stored of a stage, and the folder of the runs."""

from __future__ import annotations

import pytest

from recipes.common.refusals import refusal
from recipes.faults import run as stages
from recipes.faults.outcomes import Outcome
from recipes.faults.settings import FaultSettings
from recipes.faults.work_folder import MARKER, NAME, emptied_folder, remove_folder


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.fixture
def made(monkeypatch):
    """Numbers of kills that are injected, without a run."""
    found = []

    def kills(runs, count, rng, advance):
        found.append(count)
        write(runs.folder / "recipe" / "file", "")
        outcome = Outcome("runs killed")
        outcome.add("finished")
        return [outcome]

    monkeypatch.setitem(stages._INJECTED, "kills", kills)
    monkeypatch.setattr(stages, "draw_nothing", lambda: None)
    monkeypatch.setattr(stages.torch, "set_num_threads", lambda _: None)
    return found


def settings(folder, **options):
    return FaultSettings(output_dir=str(folder), stages=("kills",), quiet=True, **options)


def test_a_stage_is_repeated_with_other_settings_or_versions(tmp_path, made, monkeypatch):
    first = stages.run(settings(tmp_path, kills=3))
    assert stages.run(settings(tmp_path, kills=3)) == first
    assert made == [3]
    stages.run(settings(tmp_path, kills=4))
    assert made == [3, 4]
    for package in ("bmoe_lightning", "torch", "safetensors", "peft"):
        versions = {**stages.library_versions(stages._PACKAGES), package: "0.0.0"}
        with monkeypatch.context() as patched:
            patched.setattr(stages, "library_versions", lambda _, found=versions: found)
            assert stages.run(settings(tmp_path, kills=4)) == first
            assert stages.run(settings(tmp_path, kills=4)) == first
    assert made == [3, *[4] * 5]


def test_folders_of_the_user_stay(tmp_path, made):
    write(tmp_path / "work" / "thesis", "text")
    stages.run(settings(tmp_path))
    assert (tmp_path / "work" / "thesis").read_text() == "text"
    assert not (tmp_path / NAME).exists()
    write(tmp_path / NAME / "thesis", "text")
    with pytest.raises(FileExistsError, match=rf"{NAME} was not made by this command.*another --output-dir") as caught:
        stages.run(settings(tmp_path, kills=1))
    assert refusal(caught.value) == str(caught.value)
    assert (tmp_path / NAME / "thesis").read_text() == "text"
    assert made == [100]


def test_the_folder_of_a_killed_command_is_emptied(tmp_path):
    folder = emptied_folder(tmp_path)
    write(folder / "recipe" / "file", "")
    write(folder / "file", "")
    assert [path.name for path in emptied_folder(tmp_path).iterdir()] == [MARKER]
    remove_folder(tmp_path)
    assert not folder.exists()
    folder.mkdir()  # of a command that was killed before it wrote the marker
    assert emptied_folder(tmp_path) == folder


def test_links_and_files_are_refused(tmp_path):
    target = emptied_folder(tmp_path / "").rename(tmp_path / "target")
    for make in (lambda path: path.symlink_to(target), lambda path: path.write_text("")):
        make(tmp_path / NAME)
        with pytest.raises(FileExistsError, match="was not made by this command"):
            emptied_folder(tmp_path)
        (tmp_path / NAME).unlink()
    assert (target / MARKER).is_file()
