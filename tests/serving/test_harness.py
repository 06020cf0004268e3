"""The Language Model Evaluation Harness over HTTP: the scores that it gives in process."""

import pytest

from tests.harness.conftest import tasks  # noqa: F401

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'jax-it[harness]'")
pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
pytest.importorskip("requests", reason="pip install 'lm-eval[api]'")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
HarnessModel = pytest.importorskip("jax_it.harness.model", exc_type=ModuleNotFoundError).HarnessModel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the warnings are lm_eval's


@pytest.mark.parametrize("api", ["local-completions", "local-chat-completions"])
def test_scores_over_http_are_those_in_process(served, served_folders, listening, tasks, api):  # noqa: F811
    chat = "chat" in api
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = {"tasks": ["write"] if chat else ["choose", "write"], "task_manager": manager, "bootstrap_iters": 0}
    settings |= {"apply_chat_template": chat, "log_samples": True}
    url = f"{listening(served)}/v1/{'chat/completions' if chat else 'completions'}"
    arguments = {"base_url": url, "model": "llama", "max_length": 152}
    if chat:
        arguments |= {"tokenizer_backend": None, "tokenized_requests": False}
    over_http = lm_eval.simple_evaluate(api, model_args=arguments, **settings)
    in_process = lm_eval.simple_evaluate(HarnessModel(str(served_folders["llama"]), max_length=152), **settings)
    for task in settings["tasks"]:
        for found, expected in zip(over_http["samples"][task], in_process["samples"][task], strict=True):
            if task == "write":
                assert found["resps"] == expected["resps"]
            else:
                pairs = zip(found["resps"], expected["resps"], strict=True)
                for ((value, greedy),), ((wanted, is_greedy),) in pairs:
                    assert value == pytest.approx(wanted, abs=1e-3) and greedy == is_greedy
        assert (
            over_http["results"][task].items()
            >= {
                name: value for name, value in in_process["results"][task].items() if "," in name and value != "N/A"
            }.items()
        )
