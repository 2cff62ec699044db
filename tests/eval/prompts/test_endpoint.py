"""The endpoint: asked once an image, patient with a busy server, and silent about its key. Against a server of our own."""

import base64
import io
import json
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image

from eval.datasets.benchmarks import BadSample
from eval.prompts.endpoint import Endpoint
from eval.prompts.sources import Captions, Entity, Prompt


CLASSES = ("background", "person", "dog", "tree")
KEY = "sk-very-secret-0123456789"
SAID = "(person, clothes), dog, sky."
PROMPT = Prompt("person, clothes, dog, sky", (Entity("person, clothes", 1), Entity("dog", None), Entity("sky", None)))


class Server(ThreadingHTTPServer):
    """Answers with the statuses in `plan`, one a request, then always 200 and `said`; keeps what it was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.said, self.sent, self.body = [], SAID, [], None


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sent.append((self.path, self.headers["Authorization"], body))
        status = self.server.plan.pop(0) if self.server.plan else 200
        if status is None:
            self.close_connection = True
            return
        message = {"choices": [{"message": {"role": "assistant", "content": self.server.said}}]}
        wrong = {"error": {"message": f"refused: {self.headers['Authorization']}{KEY * 40}"}}
        answer = self.server.body or json.dumps(message if status == 200 else wrong).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def endpoint(server, tmp_path):
    """Makes the source anew, as a program that starts again would."""

    def make(**settings):
        url = f"http://127.0.0.1:{server.server_port}/v1/"
        return Endpoint(CLASSES, url, "some-model", tmp_path / "said.json", backoff=0, **settings)

    return make


@pytest.fixture
def image():
    return Image.fromarray(np.full((6, 9, 3), (200, 30, 60), np.uint8))


def test_asks_with_picture_and_classes(server, endpoint, image, tmp_path):
    assert endpoint()("one", image, (1,)) == [PROMPT]
    [(path, authorization, body)] = server.sent
    assert path == "/v1/chat/completions"
    assert authorization == f"Bearer {KEY}"
    assert body["model"] == "some-model"
    [text, picture] = body["messages"][0]["content"]
    assert "person, dog, tree." in text["text"]
    head, data = picture["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    assert np.abs(seen - np.asarray(image)).max() < 10
    assert json.loads((tmp_path / "said.json").read_text()) == {"one": {"caption": SAID}}


def test_resumes(server, endpoint, image, tmp_path):
    """A second run asks for what the first one has not, and its file is one of captions like any other."""
    endpoint()("one", image, (1,))
    server.said = "tree"
    again = endpoint()
    assert again("one", image, (1,)) == [PROMPT]
    assert again("two", image, (3,)) == [Prompt("tree", (Entity("tree", 3),))]
    assert len(server.sent) == 2
    assert Captions(tmp_path / "said.json", CLASSES)("one", None, (1,)) == [PROMPT]


def test_two_processes_keep_each_others_answers(server, endpoint, image, tmp_path):
    first, second = endpoint(), endpoint()
    first("one", image, ())
    second("two", image, ())
    assert set(json.loads((tmp_path / "said.json").read_text())) == {"one", "two"}


def test_labels_of_the_caption(endpoint, image):
    [prompt] = endpoint(labels="caption")("one", image, ())
    assert [entity.label for entity in prompt.entities] == [1, 2, None]


@pytest.mark.parametrize("plan", [[429], [503, 500], [None]])
def test_tries_again(server, endpoint, image, plan):
    """A busy server, a broken one, and a connection that is closed without an answer."""
    server.plan = list(plan)
    assert endpoint()("one", image, (1,)) == [PROMPT]
    assert len(server.sent) == len(plan) + 1


@pytest.mark.parametrize(("status", "requests"), [(429, 3), (503, 3), (401, 1), (404, 1)])
def test_gives_up_without_the_key(server, endpoint, image, tmp_path, status, requests, caplog):
    """The server echoes the key, and the message does not; no answer is kept."""
    server.plan = [status] * 9
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError, match=f"status {status}, .*refused: ") as caught:
        endpoint(retries=2)("one", image, (1,))
    assert len(server.sent) == requests
    assert KEY[:8] not in caplog.text + str(caught.getrepr(chain=True, style="long"))
    assert "OPENAI_API_KEY" in str(caught.value)
    assert not (tmp_path / "said.json").exists()


@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_picture_costs_one_image(server, endpoint, image, tmp_path, status, caplog):
    """The run goes on without it, and asks for it again when it is started again."""
    server.plan = [status]
    ask = endpoint(retries=2)
    with caplog.at_level(logging.DEBUG), pytest.raises(BadSample, match=f"no caption: status {status}") as caught:
        ask("one", image, (1,))
    assert KEY[:8] not in caplog.text + str(caught.getrepr(chain=True, style="long"))
    assert ask("one", image, (1,)) == [PROMPT]


def test_no_server(endpoint, server, image):
    server.server_close()
    with pytest.raises(ValueError, match=r"Expected a caption by 'some-model' from http.*ConnectionError") as caught:
        endpoint(retries=1)("one", image, (1,))
    assert KEY not in str(caught.value)


def test_server_that_is_too_slow(server, endpoint, image, monkeypatch):
    answered = Event()
    monkeypatch.setattr(Handler, "do_POST", lambda self: answered.wait(5))
    with pytest.raises(ValueError, match="imed out"):
        endpoint(retries=0, timeout=0.1)("one", image, (1,))
    answered.set()


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"{}", b'{"choices": []}', b"[]", b'{"choices": [{"message": {"content": null}}]}',
     b'{"choices": [{"message": {"content": " "}}]}'],
)  # fmt: skip
def test_strange_answer(server, endpoint, image, body):
    server.body = body
    with pytest.raises(ValueError, match="status 200"):
        endpoint()("one", image, (1,))


@pytest.mark.parametrize("key", [None, "", "kéy-secret", "key\nsecret"])
def test_key_must_be_there(server, endpoint, image, monkeypatch, key):
    """Before the first request, and not where every image has its caption."""
    source = endpoint()
    source("one", image, (1,))
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    source.check(["one"])
    with pytest.raises(ValueError, match="environment variable OPENAI_API_KEY") as caught:
        source.check(["one", "two"])
    assert "secret" not in str(caught.value)


def test_broken_cache(endpoint, tmp_path):
    (tmp_path / "said.json").write_text("{")
    with pytest.raises(ValueError, match=r"well-formed JSON in .*said.json"):
        endpoint()
