"""`ressa prune`: a sparse model in its folder, or nothing."""

import errno

import pytest

from ressa import files


@pytest.mark.slow
def test_prune_saves_a_sparse_model(tmp_path, run):
    from ressa.cli.results import part_sparsity
    from ressa.models.load_model import load_model

    line = f"prune --pattern 2:4 --calibration 8 --out {tmp_path / 'out'}"
    assert run(*line.split())[0] == 0
    model, _ = load_model(tmp_path / "out" / "model", "cpu")
    assert part_sparsity(model) == {"vision": 0.5, "interface": 0.0, "language": 0.5}


@pytest.mark.slow
def test_a_path_that_cannot_be_written(tmp_path, run):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    code, _, error = run("prune", "--calibration", 8, "--out", out)
    assert code == 1 and "cannot be written" in error


@pytest.mark.slow
@pytest.mark.parametrize("where", ["save_model", "_put_in_place"])
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, monkeypatch, run, where):
    def full_disk(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(files, where, full_disk)
    code, _, error = run("prune", "--calibration", 8, "--out", out)
    assert code == 1 and "No space left on device. Nothing half-written" in error
    assert [path.name for path in out.iterdir()] == ["run.json"]
