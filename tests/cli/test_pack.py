"""`ressa pack` and `ressa unpack`."""

import torch

from ressa.files import save_model
from ressa.models.bundled import load_bundled
from ressa.models.load_model import load_model
from ressa.parts import modality_map
from ressa.pruning.scores import magnitude


def test_pack_and_unpack_give_the_same_weights(tmp_path, run):
    from safetensors.torch import load_file

    from ressa.models.bundled import BUNDLED

    packed, again = tmp_path / "packed", tmp_path / "again"
    code, said, _ = run("pack", "--model", BUNDLED, "--out", packed)
    assert code == 0 and "MB became" in said
    assert run("unpack", "--model", packed, "--out", again)[0] == 0
    code, _, error = run("pack", "--model", tmp_path / "no", "--out", again)
    assert code == 2 and "no: is not a folder" in error
    old = load_file(BUNDLED / "model.safetensors")
    new = load_file(again / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)


def test_bits_make_the_file_smaller_and_load_as_ordinary_weights(tmp_path, run):
    model, processor = load_bundled("cpu", dtype=torch.bfloat16)
    for layer in modality_map(model).linears["language"].values():
        layer.weight.data = magnitude(layer.weight.data, sparsity=0.7)
    save_model(model, processor, tmp_path / "model")
    sizes = []
    for bits in ([], ["--bits", "8"], ["--bits", "4"]):
        out = tmp_path / f"packed{len(sizes)}"
        code, said, error = run(
            "pack", "--model", tmp_path / "model", "--out", out, *bits
        )
        assert code == 0, error
        sizes.append(sum(file.stat().st_size for file in out.glob("*.safetensors")))
    assert sizes[0] > sizes[1] > sizes[2]
    assert "4 bits" in said
    again, _ = load_model(out, "cpu")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name] == 0, weight == 0), name
    code, _, error = run(
        "pack", "--model", out, "--out", tmp_path / "no", "--bits", "5"
    )
    assert code != 0 and "--bits" in error
