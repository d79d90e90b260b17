"""Which files of a folder are a split, and what is said about files that cannot be read."""

import json
import logging
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unprivileged import unprivileged_folder

from bmoe_lightning.data import files
from bmoe_lightning.data.files import DataUnavailableError, FolderData

NAMES = ("train", "validation", "val", "dev", "test")


def write_lines(path: Path, *numbers: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))


def write_parquet(path: Path, *numbers: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list([{"n": n} for n in numbers]).to_parquet(str(path))


def numbers(folder: Path, *names: str, preferred=()) -> list[int] | None:
    rows = FolderData(folder, NAMES, preferred).rows(names)
    return None if rows is None else [row["n"] for _, row in rows]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_lines_are_counted_from_one_with_blank_ones(tmp_path, suffix):
    file = tmp_path / f"train.{suffix}"
    file.write_bytes(b'\xef\xbb\xbf{"n": 1}\n\n{"n": 2, "text": "before\xe2\x80\xa8after"}\n')
    rows = list(FolderData(tmp_path, NAMES, ()).rows(("train",)))
    assert rows == [(f"{file}, line 1", {"n": 1}), (f"{file}, line 3", {"n": 2, "text": "before\u2028after"})]


@pytest.mark.parametrize(
    "shards",
    [
        ["train.parquet"],
        ["train-00000-of-00001.parquet"],
        ["train-00000-of-00001-0a1b2c3d4e5f.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    ],
)
@pytest.mark.parametrize("folder", ["", "main"])
def test_parquet_as_the_hub_lays_it_out(shards, folder, tmp_path):
    for number, name in enumerate(shards):
        write_parquet(tmp_path / folder / name, 10 * number, 10 * number + 1)
    assert numbers(tmp_path, "train") == [10 * n + i for n in range(len(shards)) for i in range(2)]


@pytest.mark.parametrize(
    "other",
    ["train_backup.parquet", "train-old.parquet", "train.old.parquet", "training.parquet", "train-extra.jsonl"],
)
def test_only_the_exact_name_or_the_shards_of_a_count_are_a_split(tmp_path, other):
    write_parquet(tmp_path / "train.parquet", 1)
    (write_lines if other.endswith("jsonl") else write_parquet)(tmp_path / other, 2)
    assert numbers(tmp_path, "train") == [1]
    (tmp_path / "train.parquet").unlink()
    assert numbers(tmp_path, "train") is None


@pytest.mark.parametrize("there", [[1], [0, 1], [0, 2]])
def test_missing_shards_are_refused(tmp_path, there):
    for number in there:
        write_parquet(tmp_path / f"train-0000{number}-of-00003.parquet", number)
    with pytest.raises(ValueError, match=rf"of-00003\.parquet is one of 3 shards, but {len(there)} are there"):
        numbers(tmp_path, "train")


@pytest.mark.parametrize("other", ["train.parquet", "train.json", "train-00000-of-00001.parquet"])
def test_a_split_in_two_forms_is_refused(tmp_path, other):
    write_lines(tmp_path / "train.jsonl", 1)
    (write_parquet if other.endswith("parquet") else write_lines)(tmp_path / other, 2)
    with pytest.raises(ValueError, match=rf"more than once: train\.jsonl, {other}"):
        numbers(tmp_path, "train")


def test_shards_of_two_counts_are_refused(tmp_path):
    for name in ("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"):
        write_parquet(tmp_path / f"{name}.parquet", 1)
    with pytest.raises(ValueError, match="more than once"):
        numbers(tmp_path, "train")


def test_a_split_under_two_names_is_refused(tmp_path):
    write_lines(tmp_path / "validation.jsonl", 1)
    write_lines(tmp_path / "dev.jsonl", 2)
    with pytest.raises(ValueError, match=r"more than once: validation\.jsonl, dev\.jsonl"):
        numbers(tmp_path, "validation", "dev")
    assert numbers(tmp_path, "validation") == [1]


def test_all_splits_come_from_one_folder(tmp_path):
    write_lines(tmp_path / "train.jsonl", 1)
    write_lines(tmp_path / "other" / "validation.jsonl", 2)
    assert numbers(tmp_path, "validation") is None
    write_lines(tmp_path / "nested" / "main" / "train.jsonl", 3)
    write_lines(tmp_path / "nested" / "additional" / "validation.jsonl", 4)
    assert numbers(tmp_path / "nested", "train", preferred={"main"}) == [3]
    assert numbers(tmp_path / "nested", "validation", preferred={"main"}) is None


def test_several_sub_folders_without_a_preferred_one_are_refused(tmp_path):
    write_lines(tmp_path / "easy" / "train.jsonl", 1)
    write_lines(tmp_path / "hard" / "train.jsonl", 2)
    with pytest.raises(ValueError, match=r"several sub-folders: easy, hard; name one, as in '.*:easy'"):
        numbers(tmp_path, "train")
    assert numbers(tmp_path, "train", preferred={"hard"}) == [2]
    assert numbers(tmp_path / "easy", "train") == [1]


def test_the_files_that_are_read_are_logged_once(tmp_path, caplog):
    shards = [tmp_path / f"train-0000{number}-of-00002.parquet" for number in range(2)]
    for shard in shards:
        write_parquet(shard, 1, 2)
    with caplog.at_level(logging.INFO):
        next(FolderData(tmp_path, NAMES, ()).rows(("train",)))  # a look at the first row
        numbers(tmp_path, "train")
    assert [record.message for record in caplog.records] == [f"read 4 rows of {shards[0]}, {shards[1]}"]


@pytest.mark.parametrize("hidden", [".cache", ".ipynb_checkpoints"])
def test_hidden_sub_folders_are_not_searched(tmp_path, hidden):
    write_lines(tmp_path / hidden / "train.jsonl", 1)
    assert numbers(tmp_path, "train") is None
    write_lines(tmp_path / "data" / "train.jsonl", 2)
    assert numbers(tmp_path, "train") == [2]


@pytest.mark.parametrize("name", ["validation.jsonl", "validation.parquet", "dev.json"])
def test_a_split_that_is_a_folder_or_a_broken_link_is_not_a_missing_one(tmp_path, name):
    write_lines(tmp_path / "train.jsonl", 1)
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataUnavailableError, match=rf"{name} cannot be read \(.*; check or download"):
        numbers(tmp_path, "validation", "dev")
    (tmp_path / name).unlink()
    write_parquet(tmp_path / name / "part-0.parquet", 2)
    with pytest.raises(ValueError, match=rf"{name} is a folder; write the split to one file"):
        numbers(tmp_path, "validation", "dev")


@pytest.mark.parametrize("inner", ["", "main"])
def test_a_folder_that_cannot_be_entered_is_one_sentence(inner):
    with unprivileged_folder() as folder:
        write_lines(folder / "data" / inner / "train.jsonl", 1)
        (folder / "data" / inner).chmod(0)
        with pytest.raises(DataUnavailableError, match=rf"data/?{inner}(/train.jsonl)? cannot be read \(.*Permission"):
            numbers(folder / "data", "train")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "not a JSON object"),
        (b"[1, 2]", "a JSON list"),
        (b"3", "a JSON int"),
        (b"\xff", "no text in UTF-8"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"n": 1, "n": 2}', "the key 'n' is duplicate"),
    ],
)
def test_lines_that_are_no_objects_are_named(tmp_path, line, reason):
    (tmp_path / "test.jsonl").write_bytes(b'{"n": 1}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"test\.jsonl, line 3: (.*\()?{reason}") as caught:
        numbers(tmp_path, "test")
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", "flipped"])
def test_damaged_parquet_is_named(tmp_path, content):
    file = tmp_path / "train.parquet"
    write_parquet(file, *range(50))
    if content == "flipped":
        content = bytearray(file.read_bytes())
        content[5] ^= 64
    file.write_bytes(content)
    with pytest.raises((ValueError, DataUnavailableError), match=r"train\.parquet (is no valid|cannot be read)"):
        numbers(tmp_path, "train")


def test_a_value_of_a_parquet_file_that_python_does_not_have_is_named(tmp_path):
    file = tmp_path / "train.parquet"
    years = pa.array([0, 2**60], pa.timestamp("ms"))
    words = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
    for column, reason in ((years, "year|range|large"), (words, "utf-8")):
        pq.write_table(pa.table({"n": [1, 2], "other": column}), file)
        with pytest.raises(ValueError, match=rf"train\.parquet, row 2: a value cannot be read \(.*({reason})"):
            numbers(tmp_path, "train")


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    write_lines(tmp_path / "train.jsonl", 1)

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DataUnavailableError, match=r"train\.jsonl cannot be read \(.*Permission denied\); check"):
        numbers(tmp_path, "train")


@pytest.mark.parametrize(
    "name",
    [
        "validation-00000-of-00001.jsonl",
        "validation.csv",
        "Validation.jsonl",
        "dev-old.json",
        "validation/",
        "Val.parquet/",
        "main/dev/",
    ],
)
def test_files_that_look_like_a_split_and_are_not_read_are_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        name = name[:-1]
        write_parquet(tmp_path / name / "part-0.parquet", 1)
    else:
        (tmp_path / name).write_text("{}\n")
    with pytest.warns(UserWarning, match=re.escape(name) + " in .* is not read"):
        files.warn_of_unread_files(tmp_path, ("validation", "valid", "val", "dev"))


def test_other_files_are_not_named(tmp_path, recwarn):
    (tmp_path / "README.md").write_text("")
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "devices").mkdir()
    files.warn_of_unread_files(tmp_path, ("validation",))
    assert not recwarn
