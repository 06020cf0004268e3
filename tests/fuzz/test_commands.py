"""The fuzzing harness itself."""


def test_a_command_is_run_refused_or_killed(commands, tmp_path):
    assert commands.run("--help").kind == "ran"
    refused = commands.run("preview", "--config", tmp_path / "missing.py")
    assert refused.kind == "refused" and "does not exist" in refused.err
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)")
    hung = commands.run("preview", "--config", tmp_path / "hangs.py", timeout=1)
    assert hung.kind == "fault" and hung.code is None
    (tmp_path / "dies.py").write_text("import os\nos.abort()")
    assert commands.run("preview", "--config", tmp_path / "dies.py").code == -6


def test_a_child_trains(commands, tmp_path):
    from tests.tiny_run import write_recipe

    config = write_recipe(tmp_path)
    trained = commands.run(
        "train", "--config", config, "--workdir", tmp_path / "run", "--config.train.duration=2 steps"
    )
    assert trained.kind == "ran", trained
