"""`ressa unpack`: what it says of a folder that it cannot read."""


def test_without_arguments_it_names_the_folder_that_it_looks_for(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("unpack")
    assert code == 2 and "ressa-out/packed" in error and len(error.splitlines()) == 1


def test_packed_and_unpacked_without_arguments(run, tmp_path, monkeypatch):
    import shutil

    from ressa.models.bundled import BUNDLED

    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUNDLED, tmp_path / "ressa-out" / "model")
    assert run("pack")[0] == 0 and run("unpack")[0] == 0
    assert (tmp_path / "ressa-out" / "unpacked" / "config.json").is_file()
