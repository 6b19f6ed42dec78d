"""The command line of lmms-eval."""

import pytest

from ressa.evaluation.lmms_eval import lmms_command
from ressa.models.bundled import BUNDLED


def test_the_command_names_the_model_class_and_the_tasks(tmp_path):
    command = lmms_command(BUNDLED, "vqav2_val,gqa", limit=8)
    assert command[1:5] == ["-m", "lmms_eval", "--model", "instructblip"]
    assert command[command.index("--tasks") + 1] == "vqav2_val,gqa"
    assert command[-2:] == ["--limit", "8"]
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    command = lmms_command(tmp_path)
    assert command[command.index("--model") + 1] == "huggingface"
    assert "--limit" not in command


@pytest.mark.parametrize("config", [None, "{}", "{"])
def test_a_folder_without_a_model_is_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="no model is saved in"):
        lmms_command(tmp_path)
