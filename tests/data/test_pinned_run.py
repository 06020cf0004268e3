"""A run on a data set of the hub, whose calls are replaced, keeps the commit it was started with."""

import json
import types

import pytest

from jax_it import config as settings
from jax_it.errors import UserError
from jax_it.training import train
from tests.tiny_run import write_recipe

OLD, NEW = "a" * 40, "b" * 40


class Rows(list):
    """As the library's Dataset."""


def test_a_run_goes_on_after_the_hub_has_a_new_commit(tmp_path, monkeypatch):
    write_recipe(tmp_path)
    newest, loaded = [OLD], []
    records = [json.loads(line) for line in (tmp_path / "say.jsonl").read_text().splitlines()]

    def load(path, subset, split, revision):
        loaded.append(revision)
        rows = Rows(records)
        rows.info, rows._fingerprint = types.SimpleNamespace(download_checksums=None), f"of {revision}"
        return rows

    def info(self, path, revision):
        return types.SimpleNamespace(sha=newest[0])

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def run(**changes):
        tree = settings.override(settings.read(f"{tmp_path}/config.py"), {"train.duration": "2 steps"})
        tree["data"]["train"] = [{"path": "org/set", **changes}]
        tree["data"]["cache_dir"] = str(tmp_path / f"cache {len(loaded)}")
        return train(settings.resolve(tree), tmp_path / "run")

    run()
    newest[0] = NEW  # as after an edit of the data set's README
    assert int(run().step) == 2
    assert set(loaded) == {OLD}
    with pytest.raises(UserError, match=r"config\.data\.train\.0\.revision='', not 'v2'"):
        run(revision="v2")
