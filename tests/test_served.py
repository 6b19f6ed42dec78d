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

picture, plain, of_chats = sys.argv[1:]
image = Image.open(picture)
short = dict(max_new_tokens=4, return_full_text=False)

served = pipeline("image-text-to-text", model=plain, device="cpu")
text = "Question: what color is the shape? Short answer:"
said = served(images=image, text=text, **short)

served = pipeline("image-text-to-text", model=of_chats, device="cpu")
parts = [{"type": "image", "image": image}, {"type": "text", "text": "what ?"}]
said += served(text=[{"role": "user", "content": parts}], **short)

texts = [answer["generated_text"] for answer in said]
print(json.dumps([texts, "ressa" in sys.modules]))
"""
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} : {% for part in turn.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.slow
def test_saved_folders_are_served_by_plain_transformers(tmp_path):
    "The bundled model, and one of a class that is asked in chats."
    model, reader = tiny_models.tiny("LLaVA", tmp_path / "tiny")
    reader.chat_template = TEMPLATE
    save_model(model, reader, tmp_path / "model")
    shapes_folder.draw_pictures(tmp_path, 1, 32, 0)
    picture = tmp_path / "pictures/0000.png"
    command = [sys.executable, "-c", ASK, picture, BUNDLED, tmp_path / "model"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    (of_bundled, of_chat), imported = json.loads(done.stdout.splitlines()[-1])
    assert of_bundled.strip() and isinstance(of_chat, str) and not imported
