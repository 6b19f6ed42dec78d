"""Files and folders: written completely or not at all, read with checks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ressa.files import (
    Steps,
    last_whole_checkpoint,
    read_json,
    save_model,
    whole_folder,
    write_json,
)


class Weights:
    "What `save_model` needs of a model and of a processor: it writes one file."

    def __init__(self, text="weights", name="config.json"):
        self.text, self.name = text, name

    def save_pretrained(self, folder, **options):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / self.name).write_text(self.text)


PROCESSOR = Weights("words", "processor_config.json")


class Broken(Weights):
    def save_pretrained(self, folder, **options):
        super().save_pretrained(folder)
        raise ZeroDivisionError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_but_a_model_is_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("notes", "file"):
        with pytest.raises(ValueError, match=f"{name}: exists and is not a model"):
            save_model(Weights(), PROCESSOR, tmp_path / name)
    assert (tmp_path / "notes" / "precious.txt").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"
    for text in ("first", "second"):
        save_model(Weights(text), PROCESSOR, tmp_path / "model")
        assert (tmp_path / "model" / "config.json").read_text() == text
    (tmp_path / "empty").mkdir()
    save_model(Weights(), PROCESSOR, tmp_path / "empty")
    assert names(tmp_path) == ["empty", "file", "model", "notes"]


def test_what_is_there_stays_after_an_error(tmp_path):
    save_model(Weights("old"), PROCESSOR, tmp_path / "model")
    with pytest.raises(ZeroDivisionError):
        save_model(Broken("new"), PROCESSOR, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_kill_between_the_renames_loses_no_model(tmp_path):
    "The old model is back before the new one is written, which may fail."
    save_model(Weights("old"), PROCESSOR, tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.old")  # as such a kill leaves it
    with pytest.raises(ZeroDivisionError):
        save_model(Broken("new"), PROCESSOR, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


KILLED = """
import os, signal, sys
from ressa import files
folder, moment = sys.argv[1], int(sys.argv[2])
rename, done = os.replace, []

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def counted(*args):
    if len(done) == moment:
        die()
    done.append(args)
    rename(*args)

os.replace = counted
with files.whole_folder(folder, replace_model=True) as part:
    with open(part / "config.json", "w") as file:
        file.write("new")
    if moment == 2:
        files.shutil.rmtree = die
"""


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_killed_at_a_rename_or_after_both(tmp_path, moment):
    "The name never belongs to half of a model, and the next call succeeds."
    model = tmp_path / "model"
    save_model(Weights("old"), PROCESSOR, model)
    done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(moment)])
    assert done.returncode == -signal.SIGKILL
    left = model / "config.json"
    assert (left.read_text() if left.exists() else None) == ["old", None, "new"][moment]
    save_model(Weights("newest"), PROCESSOR, model)
    assert left.read_text() == "newest"
    assert names(tmp_path) == ["model"]


def test_a_new_folder_must_be_new(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists already"):
        with whole_folder(tmp_path / "there"):
            pass
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        with whole_folder(tmp_path / "there" / "config.json" / "inside"):
            pass
    with whole_folder(tmp_path / "deep" / "down") as part:
        (part / "file").write_text("")
    assert names(tmp_path / "deep" / "down") == ["file"]


def test_a_folder_that_is_filled_meanwhile_is_not_touched(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        with whole_folder(tmp_path / "folder") as part:
            (part / "mine").write_text("")
            (tmp_path / "folder" / "theirs").write_text("")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["theirs"]


def test_a_full_disk_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="new: cannot be written: No space left"):
        with whole_folder(tmp_path / "new") as part:
            (part / "half").write_text("half")
            raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, "ä"]}, indent=1)
    assert read_json(tmp_path / "a.json") == {"b": [1, "ä"]}
    with pytest.raises(TypeError, match="serializable"):
        write_json(tmp_path / "a.json", {"b": print})
    assert read_json(tmp_path / "a.json") == {"b": [1, "ä"]}
    assert names(tmp_path) == ["a.json"]


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: order.append("fsync") or fsync(n))
    monkeypatch.setattr(os, "replace", lambda *a: order.append("rename") or rename(*a))
    write_json(tmp_path / "a.json", {})
    assert order == ["fsync", "rename"]


def test_json_that_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        write_json(tmp_path, {})
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(ValueError, match="is not a file"):
            read_json(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "[" * 10**5, "\udcff"])
def test_json_that_is_broken_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="a.json: cannot be read"):
        read_json(tmp_path / "a.json")


def test_json_that_is_too_large_or_missing(tmp_path):
    write_json(tmp_path / "a.json", {"b": "x" * 99})
    with pytest.raises(ValueError, match="larger than 50 bytes"):
        read_json(tmp_path / "a.json", max_bytes=50)
    with pytest.raises(ValueError, match="b.json: cannot be read: it does not exist"):
        read_json(tmp_path / "b.json")


def test_steps_run_once(tmp_path, capsys):
    calls = []

    def step():
        calls.append(1)
        return len(calls)

    for _ in range(2):
        steps = Steps(tmp_path / "steps.json")
        assert steps.run("a_step", step) == 1
    stored = json.loads((tmp_path / "steps.json").read_text())
    assert stored["a_step"] == 1 and stored["seconds"]["a_step"] >= 0
    assert capsys.readouterr().err == "· a step\n"


def test_only_whole_checkpoints_count(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    for step, state in ((9, "{}"), (50, "{}"), (100, '{"log'), (150, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()  # not of a trainer
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-50")
    assert names(tmp_path) == ["checkpoint-50", "checkpoint-9", "checkpoint-best"]
