"""What the hub is asked, against a server of its own kind on this machine, and against none."""

import http.server
import os
import threading

import pytest
from huggingface_hub import constants

from experiments import hub, models

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def online(monkeypatch):
    """The hub's client as on a machine that is online; what a test turns off is on again afterwards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    datasets_config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)


@pytest.fixture
def answering(online, monkeypatch):
    """A hub that answers every question with the status and the error code that the test names."""
    answer = {"status": 200, "code": None, "asked": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer["asked"] += 1
            self.send_response(answer["status"])
            if answer["code"]:
                self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"id": "a/b", "modelId": "a/b", "tags": [], "siblings": []}')

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield answer
        server.shutdown()


def test_a_folder_is_taken_before_any_hub(answering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    hub.require_model("org/model")
    hub.require_model(str(tmp_path))
    models.require("tiny")
    assert answering["asked"] == 0


@pytest.mark.parametrize(
    "name, message",
    [
        ("./none", r"model='\./none': there is no such folder"),
        ("a/b/c", r"model='a/b/c': there is no such folder"),
        ("org/modle/", r"model='org/modle/': there is no such folder; did you mean org/model\?"),
        ("file", r"model='file' is a file: give the folder that holds config\.json"),
    ],
)
def test_a_path_that_is_not_there_is_never_asked_for(name, message, answering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=message):
        hub.require_model(name)
    assert answering["asked"] == 0


@pytest.mark.parametrize(
    "status, code, message",
    [
        (404, "RepoNotFound", r"model='org/typo' is no folder here; the hub has none of that name"),
        (403, "GatedRepo", r"the hub's copy is gated: accept its licence there"),
    ],
)
def test_the_hub_answers_at_once(status, code, message, answering):
    answering |= {"status": status, "code": code}
    with pytest.raises(OSError, match=message):
        hub.require_model("org/typo")
    assert answering["asked"] <= 2  # newer clients look for a repository of another kind


def test_a_model_that_is_there(answering):
    hub.require_model("org/model")
    assert answering["asked"] == 1


def test_a_hub_that_does_not_answer(online, tmp_path, monkeypatch):
    """A name that is not cached is refused with the nearest one; one that is cached is used, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"(?s)the hub does not answer \(ConnectError.*no copy is cached.*mean tiny\?"):
        models.require("tny")
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("0" * 40)
    hub.require_model("org/model")
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"


def test_offline_asks_nothing(answering):
    hub.go_offline()
    with pytest.raises(OSError, match="offline the hub is not asked, and no copy is cached"):
        hub.require_model("org/model")
    hub.prefer_cache("org/data")
    assert answering["asked"] == 0
