"""What this library saves is opened by plain transformers, in a process that does not import it."""

import json
import subprocess
import sys

import pytest
import shapes_folder
import tiny_models

from ressa.files import save_model
from ressa.models.bundled import BUNDLED

ASK = """
import json, sys
from PIL import Image
from transformers import pipeline

folder, picture, text = sys.argv[1:]
served = pipeline("image-text-to-text", model=folder, device="cpu")
image = Image.open(picture)
if text:
    said = served(images=image, text=text, max_new_tokens=4, return_full_text=False)
else:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "what ?"}]
    turns = [{"role": "user", "content": parts}]
    said = served(text=turns, max_new_tokens=4, return_full_text=False)
print(json.dumps([said[0]["generated_text"], "ressa" in sys.modules]))
"""
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} : {% for part in turn.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaVA", "bundled"])
def test_a_saved_folder_is_served_by_plain_transformers(name, tmp_path):
    folder, text = BUNDLED, "Question: what color is the shape? Short answer:"
    if name != "bundled":
        model, reader = tiny_models.tiny(name, tmp_path / "tiny")
        reader.chat_template = TEMPLATE
        folder, text = tmp_path / "model", ""
        save_model(model, reader, folder)
    shapes_folder.draw_pictures(tmp_path, 1, 32, 0)
    command = [sys.executable, "-c", ASK, folder, tmp_path / "pictures/0000.png", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    said, imported = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(said, str) and not imported
    assert name != "bundled" or said.strip()
