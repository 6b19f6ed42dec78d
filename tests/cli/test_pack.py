"""`ressa pack` and `ressa unpack`."""


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
